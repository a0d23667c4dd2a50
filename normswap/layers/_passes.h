/* The passes over one activation of type T, contiguous (rows of positions) or channels_last (rows of channels).
 *
 * Included once for float and once for double. Sums are taken in double, around the first value: a large mean costs no
 * digits. In channels_last a few positions are summed in T first, so that all channels stay in the fastest cache.
 */
CLONES static void NAME(row_moments)(const T *values, Py_ssize_t count, double *mean, double *var) {
    const double first = (double)values[0];
    double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (Py_ssize_t i = 0; i < count; i++) {
        const double away = (double)values[i] - first;
        sum += away;
        squares += away * away;
    }
    const double centre = sum / (double)count;
    *mean = first + centre;
    *var = fmax(squares / (double)count - centre * centre, 0);
    if (!(squares / (double)count <= DOUBTFUL * *var)) { /* the first value was far out, or something is not finite */
        squares = 0;
#pragma omp simd reduction(+ : squares)
        for (Py_ssize_t i = 0; i < count; i++) {
            const double away = (double)values[i] - *mean;
            squares += away * away;
        }
        *var = squares / (double)count;
    }
}

/* Of a few positions: the sums of x - first and of its square, in T, added to `sum` and `squares`. */
CLONES static void NAME(block_moments)(const T *x, Py_ssize_t positions, Py_ssize_t channels, const T *restrict first,
                                       T *restrict s, T *restrict q, double *restrict sum, double *restrict squares) {
    for (Py_ssize_t c = 0; c < channels; c++)
        s[c] = q[c] = 0;
    for (Py_ssize_t i = 0; i < positions; i++, x += channels)
        for (Py_ssize_t c = 0; c < channels; c++) {
            const T away = x[c] - first[c];
            s[c] += away;
            q[c] += away * away;
        }
    for (Py_ssize_t c = 0; c < channels; c++) {
        sum[c] += (double)s[c];
        squares[c] += (double)q[c];
    }
}

/* Of a few positions: the sums of dy and of dy (x - mean), in T, added to `sum` and `product`. */
CLONES static void NAME(block_sums)(const T *dy, const T *x, Py_ssize_t positions, Py_ssize_t channels,
                                    const T *restrict mean, T *restrict s, T *restrict q, double *restrict sum,
                                    double *restrict product) {
    for (Py_ssize_t c = 0; c < channels; c++)
        s[c] = q[c] = 0;
    for (Py_ssize_t i = 0; i < positions; i++, x += channels, dy += channels)
        for (Py_ssize_t c = 0; c < channels; c++) {
            s[c] += dy[c];
            q[c] += dy[c] * (x[c] - mean[c]);
        }
    for (Py_ssize_t c = 0; c < channels; c++) {
        sum[c] += (double)s[c];
        product[c] += (double)q[c];
    }
}

/* Moments of one sample, (C). `scratch` is for 4 C numbers. */
static void NAME(moments)(const T *x, Shape s, T *mean, T *var, double *scratch) {
    if (!s.by_channel) {
        for (Py_ssize_t c = 0; c < s.channels; c++) {
            double centre, spread;
            NAME(row_moments)(x + c * s.positions, s.positions, &centre, &spread);
            mean[c] = (T)centre;
            var[c] = (T)spread;
        }
        return;
    }
    double *sum = scratch, *squares = scratch + s.channels;
    memset(scratch, 0, (size_t)(2 * s.channels) * sizeof(double));
    T *partial = (T *)(scratch + 2 * s.channels);
    const Py_ssize_t count = s.positions;
    for (Py_ssize_t i = 0; i < count; i += BLOCK)
        NAME(block_moments)(x + i * s.channels, count - i < BLOCK ? count - i : BLOCK, s.channels, x, partial,
                            partial + s.channels, sum, squares);
    for (Py_ssize_t c = 0; c < s.channels; c++) {
        const double centre = sum[c] / (double)count;
        double spread = fmax(squares[c] / (double)count - centre * centre, 0);
        if (!(squares[c] / (double)count <= DOUBTFUL * spread)) {
            spread = 0;
            for (Py_ssize_t i = 0; i < count; i++) {
                const double away = (double)x[i * s.channels + c] - ((double)x[c] + centre);
                spread += away * away;
            }
            spread /= (double)count;
        }
        mean[c] = (T)((double)x[c] + centre);
        var[c] = (T)spread;
    }
}

/* y = scale (x - centre) + shift, for one sample. */
CLONES static void NAME(affine)(const T *x, T *restrict y, Shape s, const T *restrict scale, const T *restrict shift,
                                const T *restrict centre) {
    if (!s.by_channel) {
        for (Py_ssize_t c = 0; c < s.channels; c++) {
            const T a = scale[c], b = shift[c], m = centre[c];
            for (Py_ssize_t i = c * s.positions; i < (c + 1) * s.positions; i++)
                y[i] = (x[i] - m) * a + b;
        }
        return;
    }
    for (Py_ssize_t i = 0; i < s.positions; i++)
        for (Py_ssize_t c = 0; c < s.channels; c++)
            y[i * s.channels + c] = (x[i * s.channels + c] - centre[c]) * scale[c] + shift[c];
}

CLONES static void NAME(row_sums)(const T *dy, const T *x, Py_ssize_t count, double mean, double *sum,
                                  double *product) {
    double s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
    for (Py_ssize_t i = 0; i < count; i++) {
        s += (double)dy[i];
        q += (double)dy[i] * ((double)x[i] - mean);
    }
    *sum = s;
    *product = q;
}

/* Sums over the positions of one sample of dy and of dy (x - mean) rstd, (C). `scratch` is for 3 C numbers. */
static void NAME(sums)(const T *dy, const T *x, Shape s, const double *mean, const double *rstd, double *plain,
                       double *scaled, double *scratch) {
    if (s.by_channel) {
        T *partial = (T *)scratch, *centre = partial + 2 * s.channels;
        for (Py_ssize_t c = 0; c < s.channels; c++) {
            centre[c] = (T)mean[c];
            plain[c] = scaled[c] = 0;
        }
        for (Py_ssize_t i = 0; i < s.positions; i += BLOCK)
            NAME(block_sums)(dy + i * s.channels, x + i * s.channels, s.positions - i < BLOCK ? s.positions - i : BLOCK,
                             s.channels, centre, partial, partial + s.channels, plain, scaled);
        for (Py_ssize_t c = 0; c < s.channels; c++)  /* what rounding the mean left out */
            scaled[c] += plain[c] * ((double)centre[c] - mean[c]);
    } else
        for (Py_ssize_t c = 0; c < s.channels; c++)
            NAME(row_sums)(dy + c * s.positions, x + c * s.positions, s.positions, mean[c], &plain[c], &scaled[c]);
    for (Py_ssize_t c = 0; c < s.channels; c++)
        scaled[c] *= rstd[c];
}

/* dx = scale dy + slope (x - centre) + shift, for one sample. */
CLONES static void NAME(combine)(const T *dy, const T *x, T *restrict dx, Shape s, const T *restrict scale,
                                 const T *restrict slope, const T *restrict shift, const T *restrict centre) {
    if (!s.by_channel) {
        for (Py_ssize_t c = 0; c < s.channels; c++) {
            const T a = scale[c], b = slope[c], d = shift[c], m = centre[c];
            for (Py_ssize_t i = c * s.positions; i < (c + 1) * s.positions; i++)
                dx[i] = a * dy[i] + (b * (x[i] - m) + d);
        }
        return;
    }
    for (Py_ssize_t i = 0; i < s.positions; i++)
        for (Py_ssize_t c = 0; c < s.channels; c++) {
            const Py_ssize_t at = i * s.channels + c;
            dx[at] = scale[c] * dy[at] + (slope[c] * (x[at] - centre[c]) + shift[c]);
        }
}
