/* Loops over an activation: moments, affine pass, gradient sums and input gradient.
 *
 * T is the stored type, A the type of the arithmetic, S that of the gradient sums over rows. A contiguous activation is
 * a list of rows (all positions of one channel); a channels_last activation is a list of columns (all channels of one
 * position). instantiate.h includes this file once for each dtype.
 *
 * Sums add a few values in A and their results in double. Values are taken relative to the first one, so that a large
 * mean costs no digits; if the first one turns out to be far from the others, the sums are computed again around the
 * mean.
 */

/* Sums over a row of x - origin and of its square. */
INLINE void NAME(row_squares)(const T *x, Py_ssize_t positions, A origin, double *sum, double *squares) {
    *sum = *squares = 0;
    for (Py_ssize_t block = 0; block < positions; block += ROW_BLOCK) {
        const Py_ssize_t end = positions - block < ROW_BLOCK ? positions : block + ROW_BLOCK;
        A s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
        for (Py_ssize_t i = block; i < end; i++) {
            const A deviation = LOAD(x[i]) - origin;
            s += deviation;
            q += deviation * deviation;
        }
        *sum += (double)s;
        *squares += (double)q;
    }
}

/* Mean and variance of `channels` rows, stored at index `at` and after. */
CLONES static void NAME(row_moments)(const void *source, Py_ssize_t channels, Py_ssize_t positions, Table means,
                                     Table variances, Py_ssize_t at) {
    const T *x = source;
    A *mean = (A *)means.values + at, *var = (A *)variances.values + at;
    const double share = 1 / (double)positions;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions) {
        const A first = LOAD(x[0]);
        double sum, squares;
        NAME(row_squares)(x, positions, first, &sum, &squares);
        const double centre = sum * share, spread = variance_around(squares * share, centre);
        mean[c] = (A)((double)first + centre);
        var[c] = (A)fmax(spread, 0);
        if (!(squares * share <= CANCELLATION_LIMIT(A) * spread)) {
            NAME(row_squares)(x, positions, mean[c], &sum, &squares);
            var[c] = (A)variance_around(squares * share, sum * share);
        }
    }
}

/* One column of the activation, converted to A. */
CLONES static void NAME(first_column)(const void *source, Py_ssize_t channels, void *target) {
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++)
        ((A *)target)[c] = LOAD(((const T *)source)[c]);
}

/* Sums over positions of x - origin and of its square, for each channel. `scratch` has 2 C numbers. */
CLONES static void NAME(column_squares)(const void *source, const void *origin, Py_ssize_t channels,
                                        Py_ssize_t positions, double *restrict sum, double *restrict squares,
                                        double *scratch) {
    const T *x = source;
    const A *restrict first = origin;
    A *restrict s = (A *)scratch, *restrict q = s + channels;
    memset(sum, 0, (size_t)channels * sizeof(double));
    memset(squares, 0, (size_t)channels * sizeof(double));
    for (Py_ssize_t block = 0; block < positions; block += BLOCK) {
        const Py_ssize_t end = positions - block < BLOCK ? positions - block : BLOCK;
        memset(s, 0, (size_t)(2 * channels) * sizeof(A));
        Py_ssize_t i = 0;
        for (; i + 4 <= end; i += 4, x += 4 * channels) /* four positions for each access to the sums */
#pragma omp simd
            for (Py_ssize_t c = 0; c < channels; c++) {
                const A f = first[c], one = LOAD(x[c]) - f, two = LOAD(x[channels + c]) - f;
                const A three = LOAD(x[2 * channels + c]) - f, four = LOAD(x[3 * channels + c]) - f;
                s[c] += (one + two) + (three + four);
                q[c] += (one * one + two * two) + (three * three + four * four);
            }
        for (; i < end; i++, x += channels)
#pragma omp simd
            for (Py_ssize_t c = 0; c < channels; c++) {
                const A deviation = LOAD(x[c]) - first[c];
                s[c] += deviation;
                q[c] += deviation * deviation;
            }
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++) {
            sum[c] += (double)s[c];
            squares[c] += (double)q[c];
        }
    }
}

/* Mean and variance of each channel of a sample, from these sums; stored at index `at` and after. `scratch` has 3 C
 * numbers. */
CLONES static void NAME(column_moments)(const void *source, Py_ssize_t channels, Py_ssize_t positions,
                                        double *restrict sum, double *restrict squares, Table means, Table variances,
                                        Py_ssize_t at, double *scratch) {
    const T *x = source;
    A *restrict mean = (A *)means.values + at, *restrict var = (A *)variances.values + at;
    const double share = 1 / (double)positions;
    int cancels = 0;
#pragma omp simd reduction(| : cancels)
    for (Py_ssize_t c = 0; c < channels; c++) {
        const double centre = sum[c] * share, square = squares[c] * share, spread = variance_around(square, centre);
        mean[c] = (A)((double)LOAD(x[c]) + centre);
        var[c] = (A)(spread > 0 ? spread : 0);
        cancels |= !(square <= CANCELLATION_LIMIT(A) * spread);
    }
    if (!cancels || positions == 1)
        return;
    NAME(column_squares)(source, mean, channels, positions, sum, squares, scratch);
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        var[c] = (A)variance_around(squares[c] * share, sum[c] * share);
    }
}

/* y = scale (x - centre) + shift. The centre is rounded to A, which makes x - centre exact where x is close to it; the
 * shift contains the rounding error. */
CLONES static void NAME(affine_rows)(const void *source, void *target, Py_ssize_t channels, Py_ssize_t positions,
                                     const double *scale, const double *shift, const double *centre, double *scratch) {
    const T *x = source;
    T *restrict y = target;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, y += positions) {
        const A a = (A)quiet_nan(scale[c]), m = (A)quiet_nan(centre[c]);
        const A b = (A)quiet_nan(shift[c] + rounding_error((double)m, centre[c]) * scale[c]);
#pragma omp simd
        for (Py_ssize_t i = 0; i < positions; i++)
            y[i] = STORE((LOAD(x[i]) - m) * a + b);
    }
}

CLONES static void NAME(affine_columns)(const void *source, void *target, Py_ssize_t channels, Py_ssize_t positions,
                                        const double *scale, const double *shift, const double *centre,
                                        double *scratch) {
    const T *x = source;
    T *restrict y = target;
    A *restrict a = (A *)scratch, *restrict b = a + channels, *restrict m = b + channels;
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        a[c] = (A)quiet_nan(scale[c]);
        m[c] = (A)quiet_nan(centre[c]);
        b[c] = (A)quiet_nan(shift[c] + rounding_error((double)m[c], centre[c]) * scale[c]);
    }
    for (Py_ssize_t i = 0; i < positions; i++, x += channels, y += channels)
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++)
            y[c] = STORE((LOAD(x[c]) - m[c]) * a[c] + b[c]);
}

/* Sums over positions of dy and of dy (x - centre). */
CLONES static void NAME(row_sums)(const void *gradient, const void *source, Py_ssize_t channels, Py_ssize_t positions,
                                  const double *centre, double *sum, double *product, double *scratch) {
    const T *dy = gradient, *x = source;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, dy += positions) {
        const A m = (A)centre[c];
        double total = 0, by_x = 0;
        for (Py_ssize_t block = 0; block < positions; block += ROW_BLOCK) {
            const Py_ssize_t end = positions - block < ROW_BLOCK ? positions : block + ROW_BLOCK;
            S s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
            for (Py_ssize_t i = block; i < end; i++) {
                const S gradient_value = (S)LOAD(dy[i]);
                s += gradient_value;
                q += gradient_value * ((S)LOAD(x[i]) - (S)m);
            }
            total += (double)s;
            by_x += (double)q;
        }
        sum[c] = total;
        product[c] = by_x + total * rounding_error((double)m, centre[c]); /* correct for the rounded centre */
    }
}

CLONES static void NAME(column_sums)(const void *gradient, const void *source, Py_ssize_t channels,
                                     Py_ssize_t positions, const double *centre, double *restrict sum,
                                     double *restrict product, double *scratch) {
    const T *dy = gradient, *x = source;
    A *restrict m = (A *)scratch, *restrict s = m + channels, *restrict q = s + channels;
    memset(sum, 0, (size_t)channels * sizeof(double));
    memset(product, 0, (size_t)channels * sizeof(double));
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++)
        m[c] = (A)centre[c];
    for (Py_ssize_t block = 0; block < positions; block += BLOCK) {
        const Py_ssize_t end = positions - block < BLOCK ? positions - block : BLOCK;
        memset(s, 0, (size_t)(2 * channels) * sizeof(A));
        Py_ssize_t i = 0;
        for (; i + 4 <= end; i += 4, x += 4 * channels, dy += 4 * channels)
#pragma omp simd
            for (Py_ssize_t c = 0; c < channels; c++) {
                const A one = LOAD(dy[c]), two = LOAD(dy[channels + c]), three = LOAD(dy[2 * channels + c]);
                const A four = LOAD(dy[3 * channels + c]), centred = LOAD(x[c]) - m[c];
                s[c] += (one + two) + (three + four);
                q[c] += (one * centred + two * (LOAD(x[channels + c]) - m[c])) +
                        (three * (LOAD(x[2 * channels + c]) - m[c]) + four * (LOAD(x[3 * channels + c]) - m[c]));
            }
        for (; i < end; i++, x += channels, dy += channels)
#pragma omp simd
            for (Py_ssize_t c = 0; c < channels; c++) {
                const A gradient_value = LOAD(dy[c]);
                s[c] += gradient_value;
                q[c] += gradient_value * (LOAD(x[c]) - m[c]);
            }
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++) {
            sum[c] += (double)s[c];
            product[c] += (double)q[c];
        }
    }
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) /* correct for the rounded centre */
        product[c] += sum[c] * rounding_error((double)m[c], centre[c]);
}

/* dx = scale dy + slope (x - centre) + shift. */
CLONES static void NAME(input_gradient_rows)(const void *gradient, const void *source, void *target,
                                             Py_ssize_t channels, Py_ssize_t positions, const double *scale,
                                             const double *slope, const double *shift, const double *centre,
                                             double *scratch) {
    const T *dy = gradient, *x = source;
    T *restrict dx = target;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, dy += positions, dx += positions) {
        const A a = (A)quiet_nan(scale[c]), b = (A)quiet_nan(slope[c]), d = (A)quiet_nan(shift[c]),
                m = (A)quiet_nan(centre[c]);
#pragma omp simd
        for (Py_ssize_t i = 0; i < positions; i++)
            dx[i] = STORE(a * LOAD(dy[i]) + (b * (LOAD(x[i]) - m) + d));
    }
}

CLONES static void NAME(input_gradient_columns)(const void *gradient, const void *source, void *target,
                                                Py_ssize_t channels, Py_ssize_t positions, const double *scale,
                                                const double *slope, const double *shift, const double *centre,
                                                double *scratch) {
    const T *dy = gradient, *x = source;
    T *restrict dx = target;
    A *restrict a = (A *)scratch, *restrict b = a + channels, *restrict d = b + channels, *restrict m = d + channels;
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        a[c] = (A)quiet_nan(scale[c]);
        b[c] = (A)quiet_nan(slope[c]);
        d[c] = (A)quiet_nan(shift[c]);
        m[c] = (A)quiet_nan(centre[c]);
    }
    for (Py_ssize_t i = 0; i < positions; i++, x += channels, dy += channels, dx += channels)
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++)
            dx[c] = STORE(a[c] * LOAD(dy[c]) + (b[c] * (LOAD(x[c]) - m[c]) + d[c]));
}

static const Passes NAME(passes) = {
    sizeof(T),
    NAME(row_moments),
    NAME(first_column),
    NAME(column_squares),
    NAME(column_moments),
    {NAME(affine_rows), NAME(affine_columns)},
    {NAME(row_sums), NAME(column_sums)},
    {NAME(input_gradient_rows), NAME(input_gradient_columns)},
};
#undef T
#undef A
#undef S
#undef LOAD
#undef STORE
#undef NAME
