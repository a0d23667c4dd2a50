/* The passes over activations stored as T, computed with as A and, in the sums of backward over rows, as S: rows of positions where contiguous, columns (rows of
 * channels) where channels_last.
 *
 * Included once for every kind of number. Sums are taken in A over a few values, and in double over those, around the
 * first value: a large mean costs no digits. Where it turns out to be far from all others, they are taken again around
 * the mean.
 */

/* Sums over a row of x - origin and of its square. */
INLINE void NAME(row_squares)(const T *x, Py_ssize_t positions, A origin, double *sum, double *squares) {
    *sum = *squares = 0;
    for (Py_ssize_t block = 0; block < positions; block += ROW_BLOCK) {
        const Py_ssize_t end = positions - block < ROW_BLOCK ? positions : block + ROW_BLOCK;
        A s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
        for (Py_ssize_t i = block; i < end; i++) {
            const A away = LOAD(x[i]) - origin;
            s += away;
            q += away * away;
        }
        *sum += (double)s;
        *squares += (double)q;
    }
}

/* Mean and variance of each of `channels` rows, stored from `at` on. */
CLONES static void NAME(row_moments)(const void *from, Py_ssize_t channels, Py_ssize_t positions, Table means,
                                     Table variances, Py_ssize_t at) {
    const T *x = from;
    A *mean = (A *)means.values + at, *var = (A *)variances.values + at;
    const double share = 1 / (double)positions;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions) {
        const A first = LOAD(x[0]);
        double sum, squares;
        NAME(row_squares)(x, positions, first, &sum, &squares);
        const double centre = sum * share, spread = spread_of(squares * share, centre);
        mean[c] = (A)((double)first + centre);
        var[c] = (A)fmax(spread, 0);
        if (!(squares * share <= DOUBTFUL(A) * spread)) {
            NAME(row_squares)(x, positions, mean[c], &sum, &squares);
            var[c] = (A)spread_of(squares * share, sum * share);
        }
    }
}

/* A row of the activation as A. */
CLONES static void NAME(origin)(const void *from, Py_ssize_t channels, void *to) {
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++)
        ((A *)to)[c] = LOAD(((const T *)from)[c]);
}

/* Sums over positions of x - origin and of its square, for each channel. `scratch` is for 2 C numbers. */
CLONES static void NAME(column_squares)(const void *from, const void *origin, Py_ssize_t channels, Py_ssize_t positions,
                                        double *restrict sum, double *restrict squares, double *scratch) {
    const T *x = from;
    const A *restrict first = origin;
    A *restrict s = (A *)scratch, *restrict q = s + channels;
    memset(sum, 0, (size_t)channels * sizeof(double));
    memset(squares, 0, (size_t)channels * sizeof(double));
    for (Py_ssize_t block = 0; block < positions; block += BLOCK) {
        const Py_ssize_t end = positions - block < BLOCK ? positions - block : BLOCK;
        memset(s, 0, (size_t)(2 * channels) * sizeof(A));
        Py_ssize_t i = 0;
        for (; i + 4 <= end; i += 4, x += 4 * channels) /* sums are read and written once for four rows */
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
                const A away = LOAD(x[c]) - first[c];
                s[c] += away;
                q[c] += away * away;
            }
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++) {
            sum[c] += (double)s[c];
            squares[c] += (double)q[c];
        }
    }
}

/* Mean and variance of each column of a sample out of these sums, stored from `at` on. `scratch` is for 3 C. */
CLONES static void NAME(column_moments)(const void *from, Py_ssize_t channels, Py_ssize_t positions,
                                        double *restrict sum, double *restrict squares, Table means, Table variances,
                                        Py_ssize_t at, double *scratch) {
    const T *x = from;
    A *restrict mean = (A *)means.values + at, *restrict var = (A *)variances.values + at;
    const double share = 1 / (double)positions;
    int doubtful = 0;
#pragma omp simd reduction(| : doubtful)
    for (Py_ssize_t c = 0; c < channels; c++) {
        const double centre = sum[c] * share, square = squares[c] * share, spread = spread_of(square, centre);
        mean[c] = (A)((double)LOAD(x[c]) + centre);
        var[c] = (A)(spread > 0 ? spread : 0);
        doubtful |= !(square <= DOUBTFUL(A) * spread);
    }
    if (!doubtful || positions == 1)
        return;
    NAME(column_squares)(from, mean, channels, positions, sum, squares, scratch);
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        var[c] = (A)spread_of(squares[c] * share, sum[c] * share);
    }
}

/* y = scale (x - centre) + shift. x minus the rounded centre is exact where it matters; what the rounding left out goes
 * into the shift. */
CLONES static void NAME(affine_rows)(const void *from, void *to, Py_ssize_t channels, Py_ssize_t positions,
                                     const double *scale, const double *shift, const double *centre, double *scratch) {
    const T *x = from;
    T *restrict y = to;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, y += positions) {
        const A a = (A)quiet(scale[c]), m = (A)quiet(centre[c]);
        const A b = (A)quiet(shift[c] + left_out((double)m, centre[c]) * scale[c]);
#pragma omp simd
        for (Py_ssize_t i = 0; i < positions; i++)
            y[i] = STORE((LOAD(x[i]) - m) * a + b);
    }
}

CLONES static void NAME(affine_columns)(const void *from, void *to, Py_ssize_t channels, Py_ssize_t positions,
                                        const double *scale, const double *shift, const double *centre,
                                        double *scratch) {
    const T *x = from;
    T *restrict y = to;
    A *restrict a = (A *)scratch, *restrict b = a + channels, *restrict m = b + channels;
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        a[c] = (A)quiet(scale[c]);
        m[c] = (A)quiet(centre[c]);
        b[c] = (A)quiet(shift[c] + left_out((double)m[c], centre[c]) * scale[c]);
    }
    for (Py_ssize_t i = 0; i < positions; i++, x += channels, y += channels)
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++)
            y[c] = STORE((LOAD(x[c]) - m[c]) * a[c] + b[c]);
}

/* Sums over positions of dy and of dy (x - centre). */
CLONES static void NAME(row_sums)(const void *gradient, const void *from, Py_ssize_t channels, Py_ssize_t positions,
                                  const double *centre, double *sum, double *product, double *scratch) {
    const T *dy = gradient, *x = from;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, dy += positions) {
        const A m = (A)centre[c];
        double total = 0, by_x = 0;
        for (Py_ssize_t block = 0; block < positions; block += ROW_BLOCK) {
            const Py_ssize_t end = positions - block < ROW_BLOCK ? positions : block + ROW_BLOCK;
            S s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
            for (Py_ssize_t i = block; i < end; i++) {
                const S given = (S)LOAD(dy[i]);
                s += given;
                q += given * ((S)LOAD(x[i]) - (S)m);
            }
            total += (double)s;
            by_x += (double)q;
        }
        sum[c] = total;
        product[c] = by_x + total * left_out((double)m, centre[c]); /* what rounding the centre left out */
    }
}

CLONES static void NAME(column_sums)(const void *gradient, const void *from, Py_ssize_t channels, Py_ssize_t positions,
                                     const double *centre, double *restrict sum, double *restrict product,
                                     double *scratch) {
    const T *dy = gradient, *x = from;
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
                const A given = LOAD(dy[c]);
                s[c] += given;
                q[c] += given * (LOAD(x[c]) - m[c]);
            }
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++) {
            sum[c] += (double)s[c];
            product[c] += (double)q[c];
        }
    }
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) /* what rounding the centre left out */
        product[c] += sum[c] * left_out((double)m[c], centre[c]);
}

/* dx = scale dy + slope (x - centre) + shift. */
CLONES static void NAME(combine_rows)(const void *gradient, const void *from, void *to, Py_ssize_t channels,
                                      Py_ssize_t positions, const double *scale, const double *slope,
                                      const double *shift, const double *centre, double *scratch) {
    const T *dy = gradient, *x = from;
    T *restrict dx = to;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, dy += positions, dx += positions) {
        const A a = (A)quiet(scale[c]), b = (A)quiet(slope[c]), d = (A)quiet(shift[c]), m = (A)quiet(centre[c]);
#pragma omp simd
        for (Py_ssize_t i = 0; i < positions; i++)
            dx[i] = STORE(a * LOAD(dy[i]) + (b * (LOAD(x[i]) - m) + d));
    }
}

CLONES static void NAME(combine_columns)(const void *gradient, const void *from, void *to, Py_ssize_t channels,
                                         Py_ssize_t positions, const double *scale, const double *slope,
                                         const double *shift, const double *centre, double *scratch) {
    const T *dy = gradient, *x = from;
    T *restrict dx = to;
    A *restrict a = (A *)scratch, *restrict b = a + channels, *restrict d = b + channels, *restrict m = d + channels;
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        a[c] = (A)quiet(scale[c]);
        b[c] = (A)quiet(slope[c]);
        d[c] = (A)quiet(shift[c]);
        m[c] = (A)quiet(centre[c]);
    }
    for (Py_ssize_t i = 0; i < positions; i++, x += channels, dy += channels, dx += channels)
#pragma omp simd
        for (Py_ssize_t c = 0; c < channels; c++)
            dx[c] = STORE(a[c] * LOAD(dy[c]) + (b[c] * (LOAD(x[c]) - m[c]) + d[c]));
}

static const Passes NAME(passes) = {
    sizeof(T),
    NAME(row_moments),
    NAME(origin),
    NAME(column_squares),
    NAME(column_moments),
    {NAME(affine_rows), NAME(affine_columns)},
    {NAME(row_sums), NAME(column_sums)},
    {NAME(combine_rows), NAME(combine_columns)},
};
#undef T
#undef A
#undef S
#undef LOAD
#undef STORE
#undef NAME
