/* Loops over an activation: moments, affine pass, gradient sums and input gradient.
 *
 * T is the stored type, A the type of the arithmetic, V a vector of A with LANES numbers. A contiguous activation is a
 * list of rows (all positions of one channel); a channels_last activation is a list of columns (all channels of one
 * position). instantiate.h includes this file once for each dtype.
 *
 * A lane adds at most BLOCK values in A, and these sums are added in double. Values are taken relative to the first
 * one, so that a large mean costs no digits; if the first one turns out to be far from the others, the sums are
 * computed again around the mean.
 *
 * A number of values that is no multiple of LANES ends with a vector that overlaps the one before; lanes that were
 * seen already count as 0 in sums, and are written again with the same values.
 */

/* --- rows ---------------------------------------------------------------------------------------------------- */

/* Sums over a row of x - origin and of its square. */
INLINE void NAME(row_squares)(const T *x, Py_ssize_t positions, A origin, double *sum, double *squares) {
    const Py_ssize_t rest = positions % LANES, whole = positions - rest;
    V s[4] = {{0}}, q[4] = {{0}};
    *sum = *squares = 0;
    if (whole == 0) {
        for (Py_ssize_t i = 0; i < positions; i++) {
            const A deviation = LOAD(x[i]) - origin;
            *sum += (double)deviation;
            *squares += (double)(deviation * deviation);
        }
        return;
    }
    if (rest) {
        const V deviation = SKIP(LOAD_V(x + positions - LANES) - origin, LANES - rest);
        s[0] = deviation;
        q[0] = deviation * deviation;
    }
    for (Py_ssize_t i = 0; i < whole;) {
        const Py_ssize_t end = whole - i < BLOCK * 4 * LANES ? whole : i + BLOCK * 4 * LANES;
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            UNROLL for (int k = 0; k < 4; k++) {
                const V deviation = LOAD_V(x + i + k * LANES) - origin;
                s[k] += deviation;
                q[k] += deviation * deviation;
            }
        for (; i < end; i += LANES) {
            const V deviation = LOAD_V(x + i) - origin;
            s[1] += deviation;
            q[1] += deviation * deviation;
        }
        *sum += (double)SUM((s[0] + s[1]) + (s[2] + s[3]));
        *squares += (double)SUM((q[0] + q[1]) + (q[2] + q[3]));
        UNROLL for (int k = 0; k < 4; k++) s[k] = q[k] = ZERO(V);
    }
}

/* Mean and variance of a row from its sums around `origin`. */
INLINE void NAME(finish_row)(const T *x, Py_ssize_t positions, A origin, double sum, double squares, A *mean, A *var) {
    const double share = 1 / (double)positions, centre = sum * share;
    const double spread = variance_around(squares * share, centre);
    *mean = (A)((double)origin + centre);
    *var = (A)fmax(spread, 0);
    if (!(squares * share <= CANCELLATION_LIMIT(A) * spread)) {
        NAME(row_squares)(x, positions, *mean, &sum, &squares);
        *var = (A)variance_around(squares * share, sum * share);
    }
}

/* Mean and variance of `channels` rows, stored at index `at` and after. */
static void NAME(row_moments)(const void *source, Py_ssize_t channels, Py_ssize_t positions, Table means,
                              Table variances, Py_ssize_t at) {
    const T *x = source;
    A *mean = (A *)means.values + at, *var = (A *)variances.values + at;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions) {
        const A first = LOAD(x[0]);
        double sum, squares;
        NAME(row_squares)(x, positions, first, &sum, &squares);
        NAME(finish_row)(x, positions, first, sum, squares, mean + c, var + c);
    }
}

/* y = scale (x - centre) + shift. The centre is rounded to A, which makes x - centre exact where x is close to it; the
 * shift contains the rounding error. */
static void NAME(affine_rows)(const void *source, void *target, Py_ssize_t channels, Py_ssize_t positions,
                              const double *scale, const double *shift, const double *centre, double *scratch) {
    const T *x = source;
    T *y = target;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, y += positions) {
        const A a = (A)quiet_nan(scale[c]), m = (A)quiet_nan(centre[c]);
        const A b = (A)quiet_nan(shift[c] + rounding_error((double)m, centre[c]) * scale[c]);
        Py_ssize_t i = 0;
        for (; i + LANES <= positions; i += LANES)
            STORE_V(y + i, (LOAD_V(x + i) - m) * a + b);
        if (i < positions && i > 0)
            STORE_V(y + positions - LANES, (LOAD_V(x + positions - LANES) - m) * a + b);
        for (; i < positions && positions < LANES; i++)
            y[i] = STORE((LOAD(x[i]) - m) * a + b);
    }
}

/* Sums over positions of dy and of dy (x - centre). */
static void NAME(row_sums)(const void *gradient, const void *source, Py_ssize_t channels, Py_ssize_t positions,
                           const double *centre, double *sum, double *product, double *scratch) {
    const T *dy = gradient, *x = source;
    const Py_ssize_t rest = positions % LANES, whole = positions - rest;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, dy += positions) {
        const A m = (A)centre[c];
        double total = 0, by_x = 0;
        V s[4] = {{0}}, q[4] = {{0}};
        for (Py_ssize_t i = 0; whole == 0 && i < positions; i++) {
            total += (double)LOAD(dy[i]);
            by_x += (double)(LOAD(dy[i]) * (LOAD(x[i]) - m));
        }
        if (whole && rest) {
            const V g = SKIP(LOAD_V(dy + positions - LANES), LANES - rest);
            s[0] = g;
            q[0] = SKIP(g * (LOAD_V(x + positions - LANES) - m), LANES - rest);
        }
        for (Py_ssize_t i = 0; i < whole;) {
            const Py_ssize_t end = whole - i < BLOCK * 4 * LANES ? whole : i + BLOCK * 4 * LANES;
            for (; i + 4 * LANES <= end; i += 4 * LANES)
                UNROLL for (int k = 0; k < 4; k++) {
                    const V g = LOAD_V(dy + i + k * LANES);
                    s[k] += g;
                    q[k] += g * (LOAD_V(x + i + k * LANES) - m);
                }
            for (; i < end; i += LANES) {
                const V g = LOAD_V(dy + i);
                s[1] += g;
                q[1] += g * (LOAD_V(x + i) - m);
            }
            total += (double)SUM((s[0] + s[1]) + (s[2] + s[3]));
            by_x += (double)SUM((q[0] + q[1]) + (q[2] + q[3]));
            UNROLL for (int k = 0; k < 4; k++) s[k] = q[k] = ZERO(V);
        }
        sum[c] = total;
        product[c] = by_x + total * rounding_error((double)m, centre[c]); /* correct for the rounded centre */
    }
}

/* dx = scale dy + slope (x - centre) + shift. */
static void NAME(input_gradient_rows)(const void *gradient, const void *source, void *target, Py_ssize_t channels,
                                      Py_ssize_t positions, const double *scale, const double *slope,
                                      const double *shift, const double *centre, double *scratch) {
    const T *dy = gradient, *x = source;
    T *dx = target;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, dy += positions, dx += positions) {
        const A a = (A)quiet_nan(scale[c]), b = (A)quiet_nan(slope[c]), d = (A)quiet_nan(shift[c]),
                m = (A)quiet_nan(centre[c]);
        Py_ssize_t i = 0;
        for (; i + LANES <= positions; i += LANES)
            STORE_V(dx + i, a * LOAD_V(dy + i) + (b * (LOAD_V(x + i) - m) + d));
        if (i < positions && i > 0) {
            i = positions - LANES;
            STORE_V(dx + i, a * LOAD_V(dy + i) + (b * (LOAD_V(x + i) - m) + d));
            i = positions;
        }
        for (; i < positions; i++)
            dx[i] = STORE(a * LOAD(dy[i]) + (b * (LOAD(x[i]) - m) + d));
    }
}

/* One row of `row_gradients`: dx = a dy, the sums of `row_sums` and, if `moments`, those of `row_squares`. */
INLINE void NAME(row_gradient)(const T *dy, const T *x, T *dx, Py_ssize_t positions, const A a, const A m,
                               const A origin, double *sums, const int moments) {
    const Py_ssize_t rest = positions % LANES, whole = positions - rest;
    V s[2] = {{0}}, q[2] = {{0}}, t[2] = {{0}}, r[2] = {{0}};
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
    for (Py_ssize_t i = 0; whole == 0 && i < positions; i++) {
        const A g = LOAD(dy[i]), value = LOAD(x[i]), deviation = value - origin;
        dx[i] = STORE(a * g);
        sums[0] += (double)g;
        sums[1] += (double)(g * (value - m));
        sums[2] += (double)deviation;
        sums[3] += (double)(deviation * deviation);
    }
    if (whole && rest) {
        const Py_ssize_t i = positions - LANES;
        const V g = LOAD_V(dy + i), value = LOAD_V(x + i), deviation = SKIP(value - origin, LANES - rest);
        STORE_V(dx + i, a * g);
        s[0] = SKIP(g, LANES - rest);
        q[0] = SKIP(g * (value - m), LANES - rest);
        t[0] = deviation;
        r[0] = deviation * deviation;
    }
    for (Py_ssize_t i = 0; i < whole;) {
        const Py_ssize_t end = whole - i < BLOCK * 2 * LANES ? whole : i + BLOCK * 2 * LANES;
        for (; i + 2 * LANES <= end; i += 2 * LANES)
            UNROLL for (int k = 0; k < 2; k++) {
                const V g = LOAD_V(dy + i + k * LANES), value = LOAD_V(x + i + k * LANES), deviation = value - origin;
                STORE_V(dx + i + k * LANES, a * g);
                s[k] += g;
                q[k] += g * (value - m);
                if (moments) {
                    t[k] += deviation;
                    r[k] += deviation * deviation;
                }
            }
        for (; i < end; i += LANES) {
            const V g = LOAD_V(dy + i), value = LOAD_V(x + i), deviation = value - origin;
            STORE_V(dx + i, a * g);
            s[1] += g;
            q[1] += g * (value - m);
            if (moments) {
                t[1] += deviation;
                r[1] += deviation * deviation;
            }
        }
        sums[0] += (double)SUM(s[0] + s[1]);
        sums[1] += (double)SUM(q[0] + q[1]);
        if (moments) {
            sums[2] += (double)SUM(t[0] + t[1]);
            sums[3] += (double)SUM(r[0] + r[1]);
        }
        UNROLL for (int k = 0; k < 2; k++) s[k] = q[k] = t[k] = r[k] = ZERO(V);
    }
}

/* dx = scale dy, the sums of `row_sums` and, if `means` has memory, the moments of `row_moments`, in one pass. */
static void NAME(row_gradients)(const void *gradient, const void *source, void *target, Py_ssize_t channels,
                                Py_ssize_t positions, const double *scale, const double *centre, double *sum,
                                double *product, Table means, Table variances, Py_ssize_t at) {
    const T *dy = gradient, *x = source;
    T *dx = target;
    A *mean = (A *)means.values + at, *var = (A *)variances.values + at;
    for (Py_ssize_t c = 0; c < channels; c++, x += positions, dy += positions, dx += positions) {
        const A a = (A)quiet_nan(scale[c]), m = (A)quiet_nan(centre[c]), first = LOAD(x[0]);
        double sums[4];
        if (means.values != NULL) {
            NAME(row_gradient)(dy, x, dx, positions, a, m, first, sums, 1);
            NAME(finish_row)(x, positions, first, sums[2], sums[3], mean + c, var + c);
        } else
            NAME(row_gradient)(dy, x, dx, positions, a, m, first, sums, 0);
        sum[c] = sums[0];
        product[c] = sums[1] + sums[0] * rounding_error((double)m, centre[c]);
    }
}

/* --- columns ------------------------------------------------------------------------------------------------- */

/* Run `body` for tiles of K vectors, then of one vector; it uses the first channel c, the number of vectors K and the
 * number of lanes to skip. There are at least LANES channels. */
#define FOR_TILES(wide, body)                                                                                          \
    do {                                                                                                               \
        Py_ssize_t c = 0;                                                                                              \
        for (; c + (wide) * LANES <= channels; c += (wide) * LANES) {                                                  \
            enum { K = (wide) };                                                                                       \
            const Py_ssize_t skip = 0;                                                                                 \
            body;                                                                                                      \
        }                                                                                                              \
        for (; c + LANES <= channels; c += LANES) {                                                                    \
            enum { K = 1 };                                                                                            \
            const Py_ssize_t skip = 0;                                                                                 \
            body;                                                                                                      \
        }                                                                                                              \
        if (c < channels) {                                                                                            \
            enum { K = 1 };                                                                                            \
            const Py_ssize_t skip = LANES - (channels - c);                                                            \
            c = channels - LANES;                                                                                      \
            body;                                                                                                      \
        }                                                                                                              \
        (void)c;                                                                                                       \
    } while (0)

/* Memory is read in its order, a few columns at a time, because processors prefetch few streams; so the sums of a block
 * are in memory too, in the precision of the arithmetic. */

/* Add a vector to sums, except the first `skip` lanes. */
INLINE void NAME(add_to)(A *sums, V v, Py_ssize_t skip) { STORE_A(sums, LOAD_A(sums) + (skip ? SKIP(v, skip) : v)); }

/* Add the sums of a block to doubles and set them to 0. */
static void NAME(flush)(double *restrict total, A *restrict sums, Py_ssize_t count) {
#pragma omp simd
    for (Py_ssize_t i = 0; i < count; i++) {
        total[i] += (double)sums[i];
        sums[i] = 0;
    }
}

/* One column of the activation, converted to A. */
static void NAME(first_column)(const void *source, Py_ssize_t channels, void *target) {
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++)
        ((A *)target)[c] = LOAD(((const T *)source)[c]);
}

INLINE void NAME(tile_squares)(const T *x, const A *origin, Py_ssize_t channels, Py_ssize_t count, A *sum,
                               A *squares, const int tiles, Py_ssize_t skip) {
    V s[4] = {{0}}, q[4] = {{0}}, o[4];
    UNROLL for (int k = 0; k < tiles; k++) o[k] = LOAD_A(origin + k * LANES);
    for (Py_ssize_t i = 0; i < count; i++, x += channels)
        UNROLL for (int k = 0; k < tiles; k++) {
            const V deviation = LOAD_V(x + k * LANES) - o[k];
            s[k] += deviation;
            q[k] += deviation * deviation;
        }
    UNROLL for (int k = 0; k < tiles; k++) {
        NAME(add_to)(sum + k * LANES, s[k], skip);
        NAME(add_to)(squares + k * LANES, q[k], skip);
    }
}

/* Sums over positions of x - origin and of its square, for each channel: (2, C). `scratch` has 2 C numbers. */
static void NAME(column_squares)(const void *source, const void *origin, Py_ssize_t channels, Py_ssize_t positions,
                                 double *sums, double *scratch) {
    const T *x = source;
    const A *first = origin;
    const Py_ssize_t columns = columns_at_once(channels);
    A *s = (A *)scratch, *q = s + channels;
    double *sum = sums, *squares = sums + channels;
    memset(sums, 0, (size_t)(2 * channels) * sizeof(double));
    memset(s, 0, (size_t)(2 * channels) * sizeof(A));
    for (Py_ssize_t i = 0; channels < LANES && i < positions; i++, x += channels)
        for (Py_ssize_t c = 0; c < channels; c++) {
            const A deviation = LOAD(x[c]) - first[c];
            sum[c] += (double)deviation;
            squares[c] += (double)(deviation * deviation);
        }
    for (Py_ssize_t i = 0; channels >= LANES && i < positions; i += columns, x += columns * channels) {
        const Py_ssize_t count = positions - i < columns ? positions - i : columns;
        FOR_TILES(4, NAME(tile_squares)(x + c, first + c, channels, count, s + c, q + c, K, skip));
        if ((i + columns) % BLOCK == 0 || i + columns >= positions)
            NAME(flush)(sums, s, 2 * channels);
    }
}

/* Mean and variance of each channel of a sample from its sums around `first`; stored at index `at` and after. The sums
 * of channels where they lose digits are computed again. */
static void NAME(column_moments)(const void *source, Py_ssize_t channels, Py_ssize_t positions, double *sum,
                                 double *squares, Table means, Table variances, Py_ssize_t at) {
    const T *x = source;
    A *mean = (A *)means.values + at, *var = (A *)variances.values + at;
    const double share = 1 / (double)positions;
    for (Py_ssize_t c = 0; c < channels; c++) {
        const double centre = sum[c] * share, square = squares[c] * share, spread = variance_around(square, centre);
        mean[c] = (A)((double)LOAD(x[c]) + centre);
        var[c] = (A)fmax(spread, 0);
        if (square <= CANCELLATION_LIMIT(A) * spread || positions == 1)
            continue;
        double again = 0, squares_again = 0;
        for (Py_ssize_t i = 0; i < positions; i++) {
            const A deviation = LOAD(x[i * channels + c]) - mean[c];
            again += (double)deviation;
            squares_again += (double)(deviation * deviation);
        }
        var[c] = (A)variance_around(squares_again * share, again * share);
    }
}

INLINE void NAME(tile_affine)(const T *x, T *y, Py_ssize_t channels, Py_ssize_t count, const A *scale, const A *shift,
                              const A *centre, const int tiles) {
    V a[4], b[4], m[4];
    UNROLL for (int k = 0; k < tiles; k++) {
        a[k] = LOAD_A(scale + k * LANES);
        b[k] = LOAD_A(shift + k * LANES);
        m[k] = LOAD_A(centre + k * LANES);
    }
    for (Py_ssize_t i = 0; i < count; i++, x += channels, y += channels)
        UNROLL for (int k = 0; k < tiles; k++) STORE_V(y + k * LANES, (LOAD_V(x + k * LANES) - m[k]) * a[k] + b[k]);
}

/* As `affine_rows`. `scratch` has 2 C numbers. */
static void NAME(affine_columns)(const void *source, void *target, Py_ssize_t channels, Py_ssize_t positions,
                                 const double *scale, const double *shift, const double *centre, double *scratch) {
    const T *x = source;
    T *y = target;
    const Py_ssize_t columns = columns_at_once(channels);
    A *a = (A *)scratch, *b = a + channels, *m = b + channels;
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        a[c] = (A)quiet_nan(scale[c]);
        m[c] = (A)quiet_nan(centre[c]);
        b[c] = (A)quiet_nan(shift[c] + rounding_error((double)m[c], centre[c]) * scale[c]);
    }
    for (Py_ssize_t i = 0; channels < LANES && i < positions; i++, x += channels, y += channels)
        for (Py_ssize_t c = 0; c < channels; c++)
            y[c] = STORE((LOAD(x[c]) - m[c]) * a[c] + b[c]);
    for (Py_ssize_t i = 0; channels >= LANES && i < positions;
         i += columns, x += columns * channels, y += columns * channels) {
        const Py_ssize_t count = positions - i < columns ? positions - i : columns;
        FOR_TILES(4, (void)skip; NAME(tile_affine)(x + c, y + c, channels, count, a + c, b + c, m + c, K));
    }
}

INLINE void NAME(tile_sums)(const T *dy, const T *x, Py_ssize_t channels, Py_ssize_t count, const A *centre, A *sum,
                            A *product, const int tiles, Py_ssize_t skip) {
    V s[4] = {{0}}, q[4] = {{0}}, m[4];
    UNROLL for (int k = 0; k < tiles; k++) m[k] = LOAD_A(centre + k * LANES);
    for (Py_ssize_t i = 0; i < count; i++, x += channels, dy += channels)
        UNROLL for (int k = 0; k < tiles; k++) {
            const V g = LOAD_V(dy + k * LANES);
            s[k] += g;
            q[k] += g * (LOAD_V(x + k * LANES) - m[k]);
        }
    UNROLL for (int k = 0; k < tiles; k++) {
        NAME(add_to)(sum + k * LANES, s[k], skip);
        NAME(add_to)(product + k * LANES, q[k], skip);
    }
}

/* As `row_sums`. `scratch` has 3 C numbers. */
static void NAME(column_sums)(const void *gradient, const void *source, Py_ssize_t channels, Py_ssize_t positions,
                              const double *centre, double *sum, double *product, double *scratch) {
    const T *dy = gradient, *x = source;
    const Py_ssize_t columns = columns_at_once(channels);
    A *m = (A *)scratch, *s = m + channels, *q = s + channels;
    memset(sum, 0, (size_t)channels * sizeof(double));
    memset(product, 0, (size_t)channels * sizeof(double));
    memset(s, 0, (size_t)(2 * channels) * sizeof(A));
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++)
        m[c] = (A)centre[c];
    for (Py_ssize_t i = 0; channels < LANES && i < positions; i++, x += channels, dy += channels)
        for (Py_ssize_t c = 0; c < channels; c++) {
            sum[c] += (double)LOAD(dy[c]);
            product[c] += (double)(LOAD(dy[c]) * (LOAD(x[c]) - m[c]));
        }
    for (Py_ssize_t i = 0; channels >= LANES && i < positions;
         i += columns, x += columns * channels, dy += columns * channels) {
        const Py_ssize_t count = positions - i < columns ? positions - i : columns;
        FOR_TILES(4, NAME(tile_sums)(dy + c, x + c, channels, count, m + c, s + c, q + c, K, skip));
        if ((i + columns) % BLOCK == 0 || i + columns >= positions) {
            NAME(flush)(sum, s, channels);
            NAME(flush)(product, q, channels);
        }
    }
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) /* correct for the rounded centre */
        product[c] += sum[c] * rounding_error((double)m[c], centre[c]);
}

INLINE void NAME(tile_input_gradient)(const T *dy, const T *x, T *dx, Py_ssize_t channels, Py_ssize_t count,
                                      const A *scale, const A *slope, const A *shift, const A *centre,
                                      const int tiles) {
    V a[2], b[2], d[2], m[2];
    UNROLL for (int k = 0; k < tiles; k++) {
        a[k] = LOAD_A(scale + k * LANES);
        b[k] = LOAD_A(slope + k * LANES);
        d[k] = LOAD_A(shift + k * LANES);
        m[k] = LOAD_A(centre + k * LANES);
    }
    for (Py_ssize_t i = 0; i < count; i++, x += channels, dy += channels, dx += channels)
        UNROLL for (int k = 0; k < tiles; k++)
            STORE_V(dx + k * LANES, a[k] * LOAD_V(dy + k * LANES) + (b[k] * (LOAD_V(x + k * LANES) - m[k]) + d[k]));
}

/* As `input_gradient_rows`. `scratch` has 2 C numbers. */
static void NAME(input_gradient_columns)(const void *gradient, const void *source, void *target, Py_ssize_t channels,
                                         Py_ssize_t positions, const double *scale, const double *slope,
                                         const double *shift, const double *centre, double *scratch) {
    const T *dy = gradient, *x = source;
    T *dx = target;
    const Py_ssize_t columns = columns_at_once(channels);
    A *a = (A *)scratch, *b = a + channels, *d = b + channels, *m = d + channels;
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        a[c] = (A)quiet_nan(scale[c]);
        b[c] = (A)quiet_nan(slope[c]);
        d[c] = (A)quiet_nan(shift[c]);
        m[c] = (A)quiet_nan(centre[c]);
    }
    for (Py_ssize_t i = 0; channels < LANES && i < positions; i++, x += channels, dy += channels, dx += channels)
        for (Py_ssize_t c = 0; c < channels; c++)
            dx[c] = STORE(a[c] * LOAD(dy[c]) + (b[c] * (LOAD(x[c]) - m[c]) + d[c]));
    for (Py_ssize_t i = 0; channels >= LANES && i < positions;
         i += columns, x += columns * channels, dy += columns * channels, dx += columns * channels) {
        const Py_ssize_t count = positions - i < columns ? positions - i : columns;
        FOR_TILES(2, (void)skip; NAME(tile_input_gradient)(dy + c, x + c, dx + c, channels, count, a + c, b + c, d + c,
                                                           m + c, K));
    }
}

/* The sums of a tile: of dy, of dy (x - centre) and, if `moments`, of x - origin and of its square; C apart. */
INLINE void NAME(tile_gradients)(const T *dy, const T *x, T *dx, Py_ssize_t channels, Py_ssize_t count, const A *scale,
                                 const A *centre, const A *origin, A *sums, const int tiles, Py_ssize_t skip,
                                 const int moments) {
    V s[2] = {{0}}, q[2] = {{0}}, t[2] = {{0}}, r[2] = {{0}}, a[2], m[2], o[2];
    UNROLL for (int k = 0; k < tiles; k++) {
        a[k] = LOAD_A(scale + k * LANES);
        m[k] = LOAD_A(centre + k * LANES);
        o[k] = LOAD_A(origin + k * LANES);
    }
    for (Py_ssize_t i = 0; i < count; i++, x += channels, dy += channels, dx += channels)
        UNROLL for (int k = 0; k < tiles; k++) {
            const V g = LOAD_V(dy + k * LANES), value = LOAD_V(x + k * LANES), deviation = value - o[k];
            STORE_V(dx + k * LANES, a[k] * g);
            s[k] += g;
            q[k] += g * (value - m[k]);
            if (moments) {
                t[k] += deviation;
                r[k] += deviation * deviation;
            }
        }
    UNROLL for (int k = 0; k < tiles; k++) {
        NAME(add_to)(sums + k * LANES, s[k], skip);
        NAME(add_to)(sums + channels + k * LANES, q[k], skip);
        if (moments) {
            NAME(add_to)(sums + 2 * channels + k * LANES, t[k], skip);
            NAME(add_to)(sums + 3 * channels + k * LANES, r[k], skip);
        }
    }
}

/* dx = scale dy and the sums of `tile_gradients`, (4, C), in one pass. `scratch` has 6 C numbers. */
static void NAME(column_gradients)(const void *gradient, const void *source, void *target, const void *origin,
                                   Py_ssize_t channels, Py_ssize_t positions, const double *scale,
                                   const double *centre, double *sums, int moments, double *scratch) {
    const T *dy = gradient, *x = source;
    T *dx = target;
    const A *first = origin;
    const Py_ssize_t columns = columns_at_once(channels);
    A *a = (A *)scratch, *m = a + channels, *s = m + channels;
    memset(s, 0, (size_t)(4 * channels) * sizeof(A));
    memset(sums, 0, (size_t)(4 * channels) * sizeof(double));
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) {
        a[c] = (A)quiet_nan(scale[c]);
        m[c] = (A)quiet_nan(centre[c]);
    }
    for (Py_ssize_t i = 0; channels < LANES && i < positions; i++, x += channels, dy += channels, dx += channels)
        for (Py_ssize_t c = 0; c < channels; c++) {
            const A g = LOAD(dy[c]), value = LOAD(x[c]), deviation = value - first[c];
            dx[c] = STORE(a[c] * g);
            sums[c] += (double)g;
            sums[channels + c] += (double)(g * (value - m[c]));
            sums[2 * channels + c] += (double)deviation;
            sums[3 * channels + c] += (double)(deviation * deviation);
        }
    for (Py_ssize_t i = 0; channels >= LANES && i < positions;
         i += columns, x += columns * channels, dy += columns * channels, dx += columns * channels) {
        const Py_ssize_t count = positions - i < columns ? positions - i : columns;
        if (moments)
            FOR_TILES(2, NAME(tile_gradients)(dy + c, x + c, dx + c, channels, count, a + c, m + c, first + c, s + c, K,
                                              skip, 1));
        else
            FOR_TILES(2, NAME(tile_gradients)(dy + c, x + c, dx + c, channels, count, a + c, m + c, first + c, s + c, K,
                                              skip, 0));
        if ((i + columns) % BLOCK == 0 || i + columns >= positions)
            NAME(flush)(sums, s, (moments ? 4 : 2) * channels);
    }
#pragma omp simd
    for (Py_ssize_t c = 0; c < channels; c++) /* correct for the rounded centre */
        sums[channels + c] += sums[c] * rounding_error((double)m[c], centre[c]);
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
    NAME(row_gradients),
    NAME(column_gradients),
};
#undef T
#undef A
#undef V
#undef LANES
#undef SUM
#undef SKIP
#undef LOAD_V
#undef STORE_V
#undef LOAD_A
#undef STORE_A
#undef LOAD
#undef STORE
#undef NAME
#undef FOR_TILES
