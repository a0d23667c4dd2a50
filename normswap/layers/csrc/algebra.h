/* Importance weights from gate parameters, and the algebra on tables of moments.
 *
 * Same results as gating.py and backends/moment_algebra.py. Tables (N, C) are processed one sample at a time, in
 * double. A branch of weight 0 is replaced by zeros, because its moments may be infinite.
 */

/* --- gates: parameters (K,) to importance weights, and gradients back ---------------------------------------- */

enum { IN, LN, BN, BRANCHES };

typedef struct {
    int softmax, index_of[BRANCHES], count; /* index of a branch in the parameters, -1 if not mixed; K */
    Table mean, var;                        /* gate parameters (K,) */
} Gates;

static void project(const double *point, int count, double *weights) {
    double whole = 0, minimum = point[0], top = point[0], sorted[BRANCHES], total = 0, threshold = 0;
    for (int k = 0; k < count; k++) {
        whole += point[k];
        minimum = fmin(minimum, point[k]);
        top = fmax(top, point[k]);
        int at = k;
        for (; at > 0 && sorted[at - 1] < point[k]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = point[k];
    }
    for (int k = 0; k < count; k++)
        weights[k] = whole == 1 && minimum >= 0 ? point[k] : NAN;
    if ((whole == 1 && minimum >= 0) || !isfinite(whole))
        return;
    /* Adding a constant to all entries does not change the projection. With the largest entry at 0, the 1 below is not
     * lost to rounding. */
    for (int k = 0; k < count; k++) {
        total += sorted[k] - top;
        if ((k + 1) * (sorted[k] - top) > total - 1)
            threshold = (total - 1) / (k + 1);
    }
    for (int k = 0; k < count; k++)
        weights[k] = fmax(point[k] - top - threshold, 0);
}

static void apply_softmax(const double *logits, int count, double *weights) {
    double top = logits[0], total = 0;
    for (int k = 1; k < count; k++)
        top = logits[k] > top ? logits[k] : top;
    for (int k = 0; k < count; k++)
        total += weights[k] = exp(logits[k] - top);
    for (int k = 0; k < count; k++)
        weights[k] /= total;
}

/* The importance weight of each branch; 0 for a branch that is not mixed. */
static void read_gate(const Gates *gates, Table parameter, double branch_weights[BRANCHES]) {
    double values[BRANCHES] = {0}, weights[BRANCHES] = {0};
    for (int k = 0; k < gates->count; k++)
        values[k] = get(parameter, k);
    (gates->softmax ? apply_softmax : project)(values, gates->count, weights);
    for (int branch = 0; branch < BRANCHES; branch++)
        branch_weights[branch] = gates->index_of[branch] < 0 ? 0 : weights[gates->index_of[branch]];
}

/* The gradient of a gate parameter from the gradient g of the weights, which may contain an added constant. Softmax:
 * w (g - sum w g); simplex: g - mean(g). */
static void write_gate(const Gates *gates, const double *branch_weights, const double *gradient, Table out) {
    double upstream[BRANCHES], centre = 0;
    if (out.values == NULL)
        return;
    for (int branch = 0; branch < BRANCHES; branch++) {
        /* A weight of 0 ignores statistics that are not finite, so they do not reach its gradient either. */
        upstream[branch] = branch_weights[branch] == 0 && !isfinite(gradient[branch]) ? 0 : gradient[branch];
        if (gates->index_of[branch] >= 0)
            centre += upstream[branch] * (gates->softmax ? branch_weights[branch] : 1.0 / gates->count);
    }
    for (int branch = 0; branch < BRANCHES; branch++)
        if (gates->index_of[branch] >= 0)
            put(out, gates->index_of[branch],
                (upstream[branch] - centre) * (gates->softmax ? branch_weights[branch] : 1));
}

/* --- moments: how they are pooled and mixed, forward and backward -------------------------------------------- */

typedef struct {
    Py_ssize_t samples, channels, positions;
    double eps, means[BRANCHES], variances[BRANCHES]; /* importance weights */
    Table mean, var;                                  /* of x over its positions, (N, C) */
    Table constant_mean, constant_var;                /* (C) for `bn` in place of the batch's, or NULL */
    Table weight, bias;                               /* (C) */
    Table ln_shift, ln_scale, in_scale;               /* (C), constants of matched branches, or NULL */
    Py_ssize_t groups;                                /* G, of channels that `ln` pools over */
    int extended;                                     /* whether branches are matched or there are several groups */
    double *ln_mean, *ln_var, *bn_mean, *bn_var;      /* pooled: (N, G), (N, G), (C), (C) */
    double *shift, *scale, *in_scales;                /* (C), the constants or the identity; only if extended */
    double *zeros;                                    /* (C) */
} Site;

/* Results of the backward pass before dx: p and q of `in` (N, C), p of `ln` and its part of the slope (N, G), p and q
 * of `bn` (C); gradients of weight and bias (C). */
typedef struct {
    double *p, *q, *p_ln, *slope_ln, *p_bn, *q_bn, *weight, *bias;
    double means[BRANCHES],
        variances[BRANCHES]; /* gradients of the importance weights; those of the means plus a constant */
} Terms;

/* Moments of one sample over the channels of each group: mean of variances + variance of means. `scratch` has 2 C
 * numbers. */
CLONES static void pool_sample(const Site *s, Py_ssize_t n, double *scratch) {
    const Py_ssize_t size = s->channels / s->groups;
    for (Py_ssize_t row = n * s->groups; row < (n + 1) * s->groups; row++) {
        double *restrict m = scratch, *restrict v = m + size, sum = 0, spread = 0;
        load(m, s->mean, row * size, size);
        load(v, s->var, row * size, size);
#pragma omp simd reduction(+ : sum)
        for (Py_ssize_t c = 0; c < size; c++)
            sum += m[c];
        const double mean = sum / (double)size;
#pragma omp simd reduction(+ : spread)
        for (Py_ssize_t c = 0; c < size; c++)
            spread += v[c] + (m[c] - mean) * (m[c] - mean);
        s->ln_mean[row] = mean;
        s->ln_var[row] = spread / (double)size;
    }
}

/* Moments of each channel over all samples. `scratch` has 2 C numbers. */
CLONES static void pool_batch(const Site *s, double *scratch) {
    double *restrict m = scratch, *restrict v = m + s->channels;
    double *restrict mean = s->bn_mean, *restrict var = s->bn_var;
    const double per_sample = 1 / (double)s->samples;
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
        mean[c] *= per_sample;
    for (Py_ssize_t n = 0; n < s->samples; n++) {
        load(m, s->mean, n * s->channels, s->channels);
        load(v, s->var, n * s->channels, s->channels);
#pragma omp simd
        for (Py_ssize_t c = 0; c < s->channels; c++)
            var[c] += v[c] + (m[c] - mean[c]) * (m[c] - mean[c]);
    }
#pragma omp simd
    for (Py_ssize_t c = 0; c < s->channels; c++)
        var[c] *= per_sample;
}

/* `mix` for matched branches and groups. Each variance contains eps: the scaled sums lose no digits. */
CLONES static void mix_extended(const Site *s, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count, double *restrict mean,
                                double *restrict rstd, const double *restrict m, const double *restrict v) {
    const double *w = s->means, *u = s->variances, eps = s->eps;
    const double *restrict bn_mean = w[BN] != 0 ? s->bn_mean + at : s->zeros;
    const double *restrict bn_var = u[BN] != 0 ? s->bn_var + at : s->zeros;
    const double *restrict shift = s->shift + at, *restrict scale = s->scale + at, *restrict in = s->in_scales + at;
    const Py_ssize_t size = s->channels / s->groups;
    for (Py_ssize_t first = 0, end; first < count; first = end) {
        const Py_ssize_t group = (at + first) / size, row = n * s->groups + group;
        end = (group + 1) * size - at < count ? (group + 1) * size - at : count;
        const double ln_var = s->ln_var[row] + eps, by_mean = w[LN] != 0 ? w[LN] * s->ln_mean[row] : 0;
        const double by_shift = w[LN] != 0 ? w[LN] * sqrt(ln_var) : 0, by_var = u[LN] != 0 ? u[LN] * ln_var : 0;
#pragma omp simd
        for (Py_ssize_t c = first; c < end; c++) {
            /* A shift of 0 ignores an infinite deviation. */
            mean[c] = w[IN] * m[c] + by_mean + (shift[c] != 0 ? by_shift * shift[c] : 0) + w[BN] * bn_mean[c];
            rstd[c] = 1 / sqrt(u[IN] * ((v[c] + eps) * in[c]) + by_var * scale[c] + u[BN] * (bn_var[c] + eps));
        }
    }
}

/* The mixed mean and 1 / sqrt(mixed variance + eps) of sample n, `count` channels from index `at`. `scratch` has 2 C
 * numbers. */
CLONES static void mix(const Site *s, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count, double *restrict mean,
                       double *restrict rstd, double *scratch) {
    const double *w = s->means, *u = s->variances, eps = s->eps;
    const double *restrict m = w[IN] != 0 ? scratch : s->zeros, *restrict v = u[IN] != 0 ? scratch + count : s->zeros;
    const double *restrict bn_mean = w[BN] != 0 ? s->bn_mean + at : s->zeros;
    const double *restrict bn_var = u[BN] != 0 ? s->bn_var + at : s->zeros;
    if (w[IN] != 0)
        load(scratch, s->mean, n * s->channels + at, count);
    if (u[IN] != 0)
        load(scratch + count, s->var, n * s->channels + at, count);
    if (s->extended) {
        mix_extended(s, n, at, count, mean, rstd, m, v);
        return;
    }
    const double by_mean = w[LN] != 0 ? w[LN] * s->ln_mean[n] : 0, by_var = u[LN] != 0 ? u[LN] * s->ln_var[n] : 0;
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

/* Coefficients of y = scale (x - centre) + shift. `scratch` has 2 C numbers. */
static void forward_row(const Site *s, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count, double *scale, double *shift,
                        double *centre, double *scratch) {
    mix(s, n, at, count, centre, scale, scratch);
    multiply(scale, s->weight, at, count, scratch);
    if (s->bias.values != NULL)
        load(shift, s->bias, at, count);
    else
        memset(shift, 0, (size_t)count * sizeof(double));
}

/* Add to `Terms` the channels of one sample in one group of `ln`, `count` channels from index `at`. The arrays point to
 * these channels; p and q contain the sums over positions of dy and of dy (x - mixed mean). `extended` is a constant.
 */
INLINE void backward_group(const Site *s, Terms *terms, Py_ssize_t row, Py_ssize_t at, Py_ssize_t count,
                           double *restrict p, double *restrict q, const double *restrict m, const double *restrict v,
                           const double *restrict rstd, const double *restrict scale, const int extended) {
    double *restrict p_bn = terms->p_bn + at, *restrict q_bn = terms->q_bn + at;
    double *restrict weight = terms->weight + at, *restrict bias = terms->bias + at;
    const double *restrict bn_mean = s->bn_mean + at, *restrict bn_var = s->bn_var + at;
    const double *restrict shift = s->shift + at, *restrict ln_scale = s->scale + at, *restrict in = s->in_scales + at;
    const double ln_mean = s->ln_mean[row], factor = -1 / (double)s->positions, eps = extended ? s->eps : 0;
    const double ln_var = s->ln_var[row] + eps, deviation = sqrt(ln_var), per_sample = 1 / (double)s->samples;
    double p_all = 0, q_all = 0, p_shift = 0, mean_ln = 0, mean_bn = 0, var_in = 0, var_bn = 0;
#pragma omp simd reduction(+ : p_all, q_all, p_shift, mean_ln, mean_bn, var_in, var_bn)
    for (Py_ssize_t c = 0; c < count; c++) {
        const double dy_sum = p[c], dy_xhat_sum = q[c] * rstd[c];
        const double p_in = factor * scale[c] * dy_sum, q_in = factor * scale[c] * rstd[c] * dy_xhat_sum;
        weight[c] += dy_xhat_sum;
        bias[c] += dy_sum;
        p[c] = p_in;
        q[c] = extended ? q_in * in[c] : q_in;
        p_bn[c] += p_in * per_sample;
        q_bn[c] += q_in * per_sample;
        p_all += p_in;
        q_all += extended ? q_in * ln_scale[c] : q_in;
        const double shifted = extended && shift[c] != 0 ? ln_mean + shift[c] * deviation : ln_mean;
        p_shift += extended ? p_in * shift[c] : 0;
        /* A term is 0 if the variance is infinite; 0 times infinity must not reach the gradient of a gate. */
        mean_ln -= p_in != 0 ? p_in * (m[c] - shifted) : 0;
        mean_bn -= p_in != 0 ? p_in * (m[c] - bn_mean[c]) : 0;
        var_in += q_in != 0 ? q_in * ((v[c] + eps) * (extended ? in[c] : 1)) : 0;
        var_bn += q_in != 0 ? q_in * (bn_var[c] + eps) : 0;
    }
    const double w_ln = s->means[LN], u_ln = s->variances[LN];
    terms->p_ln[row] = p_all / (double)count;
    terms->slope_ln[row] = u_ln != 0 ? u_ln * (q_all / (double)count) : 0;
    terms->slope_ln[row] += w_ln != 0 && p_shift != 0 ? w_ln * (p_shift / (double)count) / deviation : 0;
    terms->means[LN] += mean_ln * (double)s->positions;
    terms->means[BN] += mean_bn * (double)s->positions;
    terms->variances[IN] += var_in * (double)s->positions / 2;
    terms->variances[LN] += q_all != 0 ? q_all * ln_var * (double)s->positions / 2 : 0;
    terms->variances[BN] += var_bn * (double)s->positions / 2;
}

/* Add sample n to `Terms`. On entry p and q contain the sums over positions of dy and of dy (x - mixed mean). `scratch`
 * has 7 C numbers. */
CLONES static void backward_sample(const Site *s, Terms *terms, Py_ssize_t n, double *scratch) {
    const Py_ssize_t all = s->channels, size = all / s->groups;
    double *m = scratch, *v = m + all, *mean = v + all, *rstd = mean + all, *scale = rstd + all;
    double *p = terms->p + n * all, *q = terms->q + n * all;
    mix(s, n, 0, all, mean, rstd, scale);
    memcpy(scale, rstd, (size_t)all * sizeof(double));
    multiply(scale, s->weight, 0, all, m);
    load(m, s->mean, n * all, all);
    load(v, s->var, n * all, all);
    if (!s->extended) {
        backward_group(s, terms, n, 0, all, p, q, m, v, rstd, scale, 0);
        return;
    }
    for (Py_ssize_t g = 0, at = 0; g < s->groups; g++, at += size)
        backward_group(s, terms, n * s->groups + g, at, size, p + at, q + at, m + at, v + at, rstd + at, scale + at, 1);
}

/* Coefficients of dx = scale dy + slope (x - centre) + shift; the centre is the mean over positions. `scratch` has 4 C
 * numbers. */
CLONES static void backward_row(const Site *s, const Terms *terms, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count,
                                double *restrict scale, double *restrict slope, double *restrict shift,
                                double *restrict centre, double *restrict scratch) {
    /* Constant moments do not depend on x. */
    const double depends_on_x = s->constant_mean.values == NULL ? 1 : 0;
    const double w_in = s->means[IN], u_in = s->variances[IN], w_bn = depends_on_x * s->means[BN];
    const double u_bn = depends_on_x * s->variances[BN], w_ln = s->means[LN];
    const int has_slope = s->variances[LN] != 0 || (s->extended && w_ln != 0);
    const double *restrict p = w_in != 0 ? terms->p + n * s->channels + at : s->zeros;
    const double *restrict q = u_in != 0 ? terms->q + n * s->channels + at : s->zeros;
    const double *restrict p_bn = w_bn != 0 ? terms->p_bn + at : s->zeros;
    const double *restrict q_bn = u_bn != 0 ? terms->q_bn + at : s->zeros;
    const double *restrict bn_mean = u_bn != 0 ? s->bn_mean + at : s->zeros;
    const Py_ssize_t size = s->channels / s->groups;
    mix(s, n, at, count, centre, scale, scratch);
    multiply(scale, s->weight, at, count, scratch);
    load(centre, s->mean, n * s->channels + at, count);
    for (Py_ssize_t first = 0, end; first < count; first = end) {
        const Py_ssize_t group = (at + first) / size, row = n * s->groups + group;
        end = (group + 1) * size - at < count ? (group + 1) * size - at : count;
        const double by_mean = w_ln != 0 ? w_ln * terms->p_ln[row] : 0;
        const double by_var = has_slope ? terms->slope_ln[row] : 0, ln_mean = has_slope ? s->ln_mean[row] : 0;
#pragma omp simd
        for (Py_ssize_t c = first; c < end; c++) {
            const double by_batch = u_bn * q_bn[c];
            slope[c] = u_in * q[c] + by_var + by_batch;
            shift[c] = w_in * p[c] + by_mean + w_bn * p_bn[c];
            shift[c] += has_slope ? by_var * (centre[c] - ln_mean) : 0;
            shift[c] += u_bn != 0 ? by_batch * (centre[c] - bn_mean[c]) : 0;
        }
    }
}
