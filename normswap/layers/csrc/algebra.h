/* The algebra of tables.py: how moments pool and mix, forward and backward, in double and sample by sample.
 *
 * Tables of (N, C) are read and written a row at a time. A share of zero leaves out what it would multiply, which may be
 * infinite: zeros stand in its place.
 */
typedef struct {
    Py_ssize_t samples, channels, positions;
    double eps, means[BRANCHES], variances[BRANCHES]; /* shares */
    Table mean, var;                                  /* of x over its positions, (N, C) */
    Table fixed_mean, fixed_var;                      /* (C) that `bn` takes instead of those of the batch */
    Table weight, bias;                               /* (C) */
    double *ln_mean, *ln_var, *bn_mean, *bn_var;      /* pooled: (N), (N), (C), (C) */
    double *zeros;                                    /* (C) */
} Site;

/* What backward finds out before dx: (N, C) of p and q, what `ln` and `bn` make of them, and sums over samples (C). */
typedef struct {
    double *p, *q, *p_ln, *q_ln, *p_bn, *q_bn, *weight, *bias;
    double means[BRANCHES], variances[BRANCHES]; /* gradients of the shares, of the means' up to a common shift */
} Pulls;

/* Moments of one sample over its channels: mean of variances + variance of means. `scratch` is for 2 C. */
CLONES static void pool_sample(const Site *s, Py_ssize_t n, double *scratch) {
    double *restrict m = scratch, *restrict v = m + s->channels, sum = 0, spread = 0;
    load(m, s->mean, n * s->channels, s->channels);
    load(v, s->var, n * s->channels, s->channels);
#pragma omp simd reduction(+ : sum)
    for (Py_ssize_t c = 0; c < s->channels; c++)
        sum += m[c];
    const double mean = sum / (double)s->channels;
#pragma omp simd reduction(+ : spread)
    for (Py_ssize_t c = 0; c < s->channels; c++)
        spread += v[c] + (m[c] - mean) * (m[c] - mean);
    s->ln_mean[n] = mean;
    s->ln_var[n] = spread / (double)s->channels;
}

/* Moments of all samples in each channel. `scratch` is for 2 C. */
CLONES static void pool_batch(const Site *s, double *scratch) {
    double *restrict m = scratch, *restrict v = m + s->channels;
    double *restrict mean = s->bn_mean, *restrict var = s->bn_var;
    const double share = 1 / (double)s->samples;
    memset(mean, 0, (size_t)s->channels * sizeof(double));
    memset(var, 0, (size_t)s->channels * sizeof(double));
    for (Py_ssize_t n = 0; n < s->samples; n++) {
        load(m, s->mean, n * s->channels, s->channels);
#pragma omp simd
        for (Py_ssize_t c = 0; c < s->channels; c++)
            mean[c] += m[c];
    }
#pragma omp simd
    for (Py_ssize_t c = 0; c < s->channels; c++)
        mean[c] *= share;
    for (Py_ssize_t n = 0; n < s->samples; n++) {
        load(m, s->mean, n * s->channels, s->channels);
        load(v, s->var, n * s->channels, s->channels);
#pragma omp simd
        for (Py_ssize_t c = 0; c < s->channels; c++)
            var[c] += v[c] + (m[c] - mean[c]) * (m[c] - mean[c]);
    }
#pragma omp simd
    for (Py_ssize_t c = 0; c < s->channels; c++)
        var[c] *= share;
}

/* Of sample n, channels from `at` on: the mixed mean and 1 / sqrt(var + eps). `scratch` is for 2 C. */
CLONES static void mix(const Site *s, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count, double *restrict mean,
                       double *restrict rstd, double *scratch) {
    const double *w = s->means, *u = s->variances, eps = s->eps;
    const double *restrict m = w[IN] != 0 ? scratch : s->zeros, *restrict v = u[IN] != 0 ? scratch + count : s->zeros;
    const double *restrict bn_mean = w[BN] != 0 ? s->bn_mean + at : s->zeros;
    const double *restrict bn_var = u[BN] != 0 ? s->bn_var + at : s->zeros;
    const double by_mean = w[LN] != 0 ? w[LN] * s->ln_mean[n] : 0, by_var = u[LN] != 0 ? u[LN] * s->ln_var[n] : 0;
    if (w[IN] != 0)
        load(scratch, s->mean, n * s->channels + at, count);
    if (u[IN] != 0)
        load(scratch + count, s->var, n * s->channels + at, count);
#pragma omp simd
    for (Py_ssize_t c = 0; c < count; c++) {
        mean[c] = w[IN] * m[c] + by_mean + w[BN] * bn_mean[c];
        rstd[c] = 1 / sqrt(u[IN] * v[c] + by_var + u[BN] * bn_var[c] + eps);
    }
}

static void multiply(double *values, Table factors, Py_ssize_t at, Py_ssize_t count, double *scratch) {
    if (factors.values == NULL)
        return;
    load(scratch, factors, at, count);
#pragma omp simd
    for (Py_ssize_t c = 0; c < count; c++)
        values[c] *= scratch[c];
}

/* y = scale (x - centre) + shift. `scratch` is for 2 C. */
static void forward_row(const Site *s, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count, double *scale, double *shift,
                        double *centre, double *scratch) {
    mix(s, n, at, count, centre, scale, scratch);
    multiply(scale, s->weight, at, count, scratch);
    if (s->bias.values != NULL)
        load(shift, s->bias, at, count);
    else
        memset(shift, 0, (size_t)count * sizeof(double));
}

/* From the sums over positions of dy and of dy (x - mixed mean), which p and q hold, to `Pulls`. `scratch` is for 7 C.
 */
CLONES static void pull_sample(const Site *s, Pulls *pulls, Py_ssize_t n, double *scratch) {
    const Py_ssize_t all = s->channels;
    double *restrict m = scratch, *restrict v = m + all, *restrict mean = v + all, *restrict rstd = mean + all;
    double *restrict scale = rstd + all, *restrict p = pulls->p + n * all, *restrict q = pulls->q + n * all;
    double *restrict p_bn = pulls->p_bn, *restrict q_bn = pulls->q_bn;
    double *restrict weight = pulls->weight, *restrict bias = pulls->bias;
    const double *restrict bn_mean = s->bn_mean, *restrict bn_var = s->bn_var;
    const double ln_mean = s->ln_mean[n], each = -1 / (double)s->positions, share = 1 / (double)s->samples;
    double p_all = 0, q_all = 0, mean_ln = 0, mean_bn = 0, var_in = 0, var_bn = 0;
    mix(s, n, 0, all, mean, rstd, scale);
    memcpy(scale, rstd, (size_t)all * sizeof(double));
    multiply(scale, s->weight, 0, all, m);
    load(m, s->mean, n * all, all);
    load(v, s->var, n * all, all);
#pragma omp simd reduction(+ : p_all, q_all, mean_ln, mean_bn, var_in, var_bn)
    for (Py_ssize_t c = 0; c < all; c++) {
        const double plain = p[c], scaled = q[c] * rstd[c];
        const double pulled = each * scale[c] * plain, spread = each * scale[c] * rstd[c] * scaled;
        weight[c] += scaled;
        bias[c] += plain;
        p[c] = pulled;
        q[c] = spread;
        p_bn[c] += pulled * share;
        q_bn[c] += spread * share;
        p_all += pulled;
        q_all += spread;
        /* An infinite variance lets nothing through: what pulls at it is zero, and so is what it says of its share. */
        mean_ln -= pulled != 0 ? pulled * (m[c] - ln_mean) : 0;
        mean_bn -= pulled != 0 ? pulled * (m[c] - bn_mean[c]) : 0;
        var_in += spread != 0 ? spread * v[c] : 0;
        var_bn += spread != 0 ? spread * bn_var[c] : 0;
    }
    pulls->p_ln[n] = p_all / (double)all;
    pulls->q_ln[n] = q_all / (double)all;
    pulls->means[LN] += mean_ln * (double)s->positions;
    pulls->means[BN] += mean_bn * (double)s->positions;
    pulls->variances[IN] += var_in * (double)s->positions / 2;
    pulls->variances[LN] += q_all != 0 ? q_all * s->ln_var[n] * (double)s->positions / 2 : 0;
    pulls->variances[BN] += var_bn * (double)s->positions / 2;
}

/* dx = scale dy + slope (x - centre) + shift, with the mean over positions as centre. `scratch` is for 4 C. */
CLONES static void backward_row(const Site *s, const Pulls *pulls, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count,
                                double *restrict scale, double *restrict slope, double *restrict shift,
                                double *restrict centre, double *restrict scratch) {
    /* x does not move moments that are constants. */
    const double moved = s->fixed_mean.values == NULL ? 1 : 0;
    const double w_in = s->means[IN], u_in = s->variances[IN], w_bn = moved * s->means[BN];
    const double u_bn = moved * s->variances[BN], u_ln = s->variances[LN];
    const double *restrict p = w_in != 0 ? pulls->p + n * s->channels + at : s->zeros;
    const double *restrict q = u_in != 0 ? pulls->q + n * s->channels + at : s->zeros;
    const double *restrict p_bn = w_bn != 0 ? pulls->p_bn + at : s->zeros;
    const double *restrict q_bn = u_bn != 0 ? pulls->q_bn + at : s->zeros;
    const double *restrict bn_mean = u_bn != 0 ? s->bn_mean + at : s->zeros;
    const double by_mean = s->means[LN] != 0 ? s->means[LN] * pulls->p_ln[n] : 0;
    const double by_var = u_ln != 0 ? u_ln * pulls->q_ln[n] : 0, ln_mean = u_ln != 0 ? s->ln_mean[n] : 0;
    mix(s, n, at, count, centre, scale, scratch);
    multiply(scale, s->weight, at, count, scratch);
    load(centre, s->mean, n * s->channels + at, count);
#pragma omp simd
    for (Py_ssize_t c = 0; c < count; c++) {
        const double by_batch = u_bn * q_bn[c];
        slope[c] = u_in * q[c] + by_var + by_batch;
        shift[c] = w_in * p[c] + by_mean + w_bn * p_bn[c];
        shift[c] += u_ln != 0 ? by_var * (centre[c] - ln_mean) : 0;
        shift[c] += u_bn != 0 ? by_batch * (centre[c] - bn_mean[c]) : 0;
    }
}
