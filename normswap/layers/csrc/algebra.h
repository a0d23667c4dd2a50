/* The algebra on tables of moments: how they are pooled and mixed, forward and backward.
 *
 * Same results as backends/moment_algebra.py. Tables (N, C) are processed one sample at a time, in double. A branch of
 * weight 0 is replaced by zeros, because its moments may be infinite.
 */

/* Moments of one sample over the channels of each group: mean of variances + variance of means. `scratch` has 2 C
 * numbers. */
static void pool_sample(const Site *s, Py_ssize_t n, double *scratch) {
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
static void pool_batch(const Site *s, double *scratch) {
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

/* Where the mixed moments of sample n begin. */
static Py_ssize_t mixed_at(const Site *s, Py_ssize_t n) { return s->fixed ? 0 : n * s->channels; }

/* Write the mixed mean and 1 / sqrt(mixed variance + eps) of sample n. Each variance contains eps: the scaled sums lose
 * no digits. `scratch` has 2 C numbers. */
static void mix(const Site *s, Py_ssize_t n, double *scratch) {
    const double *w = s->means, *u = s->variances, eps = s->eps;
    double *restrict mean = s->centre + mixed_at(s, n), *restrict rstd = s->rstd + mixed_at(s, n);
    const double *restrict m = w[IN] != 0 ? scratch : s->zeros;
    const double *restrict v = u[IN] != 0 ? scratch + s->channels : s->zeros;
    const double *restrict bn_mean = w[BN] != 0 ? s->bn_mean : s->zeros;
    const double *restrict bn_var = u[BN] != 0 ? s->bn_var : s->zeros;
    const double *restrict shift = s->ln_shift, *restrict scale = s->ln_scale, *restrict in = s->in_scale;
    const Py_ssize_t size = s->channels / s->groups;
    if (w[IN] != 0)
        load(scratch, s->mean, n * s->channels, s->channels);
    if (u[IN] != 0)
        load(scratch + s->channels, s->var, n * s->channels, s->channels);
    for (Py_ssize_t g = 0; g < s->groups; g++) {
        const double ln_mean = w[LN] != 0 ? s->ln_mean[n * s->groups + g] : 0;
        const double ln_var = w[LN] != 0 || u[LN] != 0 ? s->ln_var[n * s->groups + g] + eps : 0;
        const double by_mean = w[LN] * ln_mean, by_shift = w[LN] != 0 ? w[LN] * sqrt(ln_var) : 0;
        const double by_var = u[LN] != 0 ? u[LN] * ln_var : 0;
#pragma omp simd
        for (Py_ssize_t c = g * size; c < (g + 1) * size; c++) {
            /* A shift of 0 ignores an infinite deviation. */
            mean[c] = w[IN] * m[c] + by_mean + (shift[c] != 0 ? by_shift * shift[c] : 0) + w[BN] * bn_mean[c];
            rstd[c] = 1 / sqrt(u[IN] * ((v[c] + eps) * in[c]) + by_var * scale[c] + u[BN] * (bn_var[c] + eps));
        }
    }
}

/* Coefficients of y = scale (x - centre) + shift for `count` channels of sample n from index `at`; the centre is that
 * of `mix` and the shift is the bias. */
static void forward_row(const Site *s, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count, double *restrict scale) {
    const double *restrict rstd = s->rstd + mixed_at(s, n) + at, *restrict weight = s->weight + at;
#pragma omp simd
    for (Py_ssize_t c = 0; c < count; c++)
        scale[c] = rstd[c] * weight[c];
}

/* The part of `backward_sample` for the channels of one group of `ln`, from index `at`. */
static void backward_group(const Site *s, Terms *terms, Py_ssize_t n, Py_ssize_t group, Py_ssize_t count,
                           const double *restrict m, const double *restrict v) {
    const Py_ssize_t at = group * count, row = n * s->groups + group, here = n * s->channels + at;
    double *restrict p = terms->p + here, *restrict q = terms->q + here;
    double *restrict p_bn = terms->p_bn + at, *restrict q_bn = terms->q_bn + at;
    double *gates = terms->gates + 2 * BRANCHES * row;
    const double *restrict rstd = s->rstd + mixed_at(s, n) + at, *restrict weight = s->weight + at;
    const double *restrict bn_mean = s->bn_mean + at, *restrict bn_var = s->bn_var + at;
    const double *restrict shift = s->ln_shift + at, *restrict ln_scale = s->ln_scale + at;
    const double *restrict in = s->in_scale + at;
    const double ln_mean = s->ln_mean[row], factor = -1 / (double)s->positions, eps = s->eps;
    const double ln_var = s->ln_var[row] + eps, deviation = sqrt(ln_var), per_sample = 1 / (double)s->samples;
    const int uses_batch = !s->constant;
    double p_all = 0, q_all = 0, p_shift = 0, mean_ln = 0, mean_bn = 0, var_in = 0, var_bn = 0;
#pragma omp simd reduction(+ : p_all, q_all, p_shift, mean_ln, mean_bn, var_in, var_bn)
    for (Py_ssize_t c = 0; c < count; c++) {
        const double scale = factor * rstd[c] * weight[c], xhat_sum = q[c] * rstd[c];
        const double p_in = scale * p[c], q_in = scale * rstd[c] * xhat_sum;
        q[c] = xhat_sum;
        if (uses_batch) {
            p_bn[c] += p_in * per_sample;
            q_bn[c] += q_in * per_sample;
        }
        p_all += p_in;
        q_all += q_in * ln_scale[c];
        p_shift += p_in * shift[c];
        /* A term is 0 if the variance is infinite; 0 times infinity must not reach the gradient of a gate. */
        const double shifted = shift[c] != 0 ? ln_mean + shift[c] * deviation : ln_mean;
        mean_ln -= p_in != 0 ? p_in * (m[c] - shifted) : 0;
        mean_bn -= p_in != 0 ? p_in * (m[c] - bn_mean[c]) : 0;
        var_in += q_in != 0 ? q_in * ((v[c] + eps) * in[c]) : 0;
        var_bn += q_in != 0 ? q_in * (bn_var[c] + eps) : 0;
    }
    const double w_ln = s->means[LN], u_ln = s->variances[LN], positions = (double)s->positions;
    terms->p_ln[row] = p_all / (double)count;
    terms->slope_ln[row] = u_ln != 0 ? u_ln * (q_all / (double)count) : 0;
    terms->slope_ln[row] += w_ln != 0 && p_shift != 0 ? w_ln * (p_shift / (double)count) / deviation : 0;
    gates[IN] = 0;
    gates[LN] = mean_ln * positions;
    gates[BN] = mean_bn * positions;
    gates[BRANCHES + IN] = var_in * positions / 2;
    gates[BRANCHES + LN] = q_all != 0 ? q_all * ln_var * positions / 2 : 0;
    gates[BRANCHES + BN] = var_bn * positions / 2;
}

/* Fill the terms of sample n. On entry p and q contain the sums over positions of dy and of dy (x - centre); q becomes
 * the sum of dy xhat. `scratch` has 2 C numbers. */
static void backward_sample(const Site *s, Terms *terms, Py_ssize_t n, double *scratch) {
    const Py_ssize_t size = s->channels / s->groups;
    double *m = scratch, *v = m + s->channels;
    load(m, s->mean, n * s->channels, s->channels);
    load(v, s->var, n * s->channels, s->channels);
    for (Py_ssize_t g = 0; g < s->groups; g++)
        backward_group(s, terms, n, g, size, m + g * size, v + g * size);
}

/* The same if neither dx nor a gate needs more than q. */
static void normalise_products(const Site *s, Terms *terms, Py_ssize_t n) {
    double *restrict q = terms->q + n * s->channels;
    const double *restrict rstd = s->rstd + mixed_at(s, n);
#pragma omp simd
    for (Py_ssize_t c = 0; c < s->channels; c++)
        q[c] *= rstd[c];
}

/* Add up the terms of all samples, in their order: gradients of weight, bias and, if `with_gates`, importance weights.
 */
static void finish_terms(const Site *s, Terms *terms, int with_gates) {
    for (Py_ssize_t n = 0; n < s->samples; n++) {
        const double *restrict p = terms->p + n * s->channels, *restrict q = terms->q + n * s->channels;
#pragma omp simd
        for (Py_ssize_t c = 0; c < s->channels; c++) {
            terms->weight[c] += q[c];
            terms->bias[c] += p[c];
        }
    }
    for (Py_ssize_t row = 0; with_gates && row < s->samples * s->groups; row++)
        for (int branch = 0; branch < BRANCHES; branch++) {
            terms->means[branch] += terms->gates[2 * BRANCHES * row + branch];
            terms->variances[branch] += terms->gates[2 * BRANCHES * row + BRANCHES + branch];
        }
}

/* Coefficients of dx = scale dy + slope (x - centre) + shift for `count` channels of sample n from index `at`; the
 * centre is the mean over positions. */
static void backward_row(const Site *s, const Terms *terms, Py_ssize_t n, Py_ssize_t at, Py_ssize_t count,
                         double *restrict scale, double *restrict slope, double *restrict shift,
                         double *restrict centre) {
    /* Constant moments do not depend on x. */
    const double depends_on_x = s->constant ? 0 : 1, factor = -1 / (double)s->positions;
    const double w_in = s->means[IN], u_in = s->variances[IN], w_bn = depends_on_x * s->means[BN];
    const double u_bn = depends_on_x * s->variances[BN], w_ln = s->means[LN];
    const int has_slope = s->variances[LN] != 0 || w_ln != 0;
    const Py_ssize_t here = n * s->channels + at, size = s->channels / s->groups;
    const double *restrict rstd = s->rstd + mixed_at(s, n) + at, *restrict weight = s->weight + at;
    const double *restrict in = s->in_scale + at;
    const double *restrict p = w_in != 0 ? terms->p + here : s->zeros;
    const double *restrict q = u_in != 0 ? terms->q + here : s->zeros;
    const double *restrict p_bn = w_bn != 0 ? terms->p_bn + at : s->zeros;
    const double *restrict q_bn = u_bn != 0 ? terms->q_bn + at : s->zeros;
    const double *restrict bn_mean = u_bn != 0 ? s->bn_mean + at : s->zeros;
    load(centre, s->mean, here, count);
    for (Py_ssize_t first = 0, end; first < count; first = end) {
        const Py_ssize_t group = (at + first) / size, row = n * s->groups + group;
        end = (group + 1) * size - at < count ? (group + 1) * size - at : count;
        const double by_mean = w_ln != 0 ? w_ln * terms->p_ln[row] : 0;
        const double by_var = has_slope ? terms->slope_ln[row] : 0, ln_mean = has_slope ? s->ln_mean[row] : 0;
#pragma omp simd
        for (Py_ssize_t c = first; c < end; c++) {
            const double by_batch = u_bn * q_bn[c], own = rstd[c] * weight[c], p_in = factor * own * p[c];
            scale[c] = own;
            slope[c] = u_in * (factor * own * rstd[c] * q[c] * in[c]) + by_var + by_batch;
            shift[c] = w_in * p_in + by_mean + w_bn * p_bn[c];
            shift[c] += has_slope ? by_var * (centre[c] - ln_mean) : 0;
            shift[c] += u_bn != 0 ? by_batch * (centre[c] - bn_mean[c]) : 0;
        }
    }
}
