/* The dtypes of tensors: float, double, bfloat16, half, and int64 for the number of batches.
 *
 * bfloat16 and half are converted by integer arithmetic without branches, which every compiler can vectorize.
 * Conversions round to nearest even and preserve infinities and NaN.
 */
enum { FLOAT, DOUBLE, BFLOAT16, HALF, FLOAT_DTYPES, INT64 = FLOAT_DTYPES };

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float from_bfloat16(uint16_t value) { return of_bits((uint32_t)value << 16); }

/* A NaN must have a zero in the upper half of its payload, as NaN from bfloat16 and from arithmetic have. */
INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* All bits set if the condition is true: for a selection without a branch. */
INLINE uint32_t mask_if(int condition) { return 0u - (uint32_t)condition; }

INLINE float from_half(uint16_t value) {
    const uint32_t bits = (uint32_t)(value & 0x7fff) << 13, special = mask_if(bits >= 0x0f800000) & (112u << 23);
    /* Numbers below 2^-14 have no leading one bit: it is added and subtracted again. */
    const uint32_t small = bits_of(of_bits(bits + (113u << 23)) - of_bits(113u << 23)),
                   is_small = mask_if(bits < 1 << 23);
    const uint32_t found = (small & is_small) | ((bits + (112u << 23) + special) & ~is_small);
    return of_bits(found | (uint32_t)(value & 0x8000) << 16);
}

INLINE uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), size = bits & 0x7fffffff, top = 143u << 23, bottom = 113u << 23;
    const uint32_t limited = size < top ? size : top, exponent = limited & 0x7f800000;
    const uint32_t scale = exponent > bottom ? exponent : bottom, ruler = scale + (13u << 23);
    /* Adding a power of two whose last bit has the value of the last bit of the half rounds to the half. */
    const uint32_t steps = bits_of(of_bits(limited) + of_bits(ruler)) - ruler,
                   nan = mask_if(size > 0x7f800000) & 0x0200;
    return (uint16_t)((((scale - bottom) >> 13) + steps) | nan | ((bits >> 16) & 0x8000));
}

/* Replace every NaN by the one with payload zero. */
INLINE double quiet_nan(double value) { return value == value ? value : (double)NAN; }

/* The variance, from the mean square and the mean of deviations from any value. Infinite if the squares overflow. */
INLINE double variance_around(double square, double centre) {
    return isinf(square) && isfinite(centre) ? square : square - centre * centre;
}

/* Rounded centre minus centre; 0 if the rounded centre is infinite. */
INLINE double rounding_error(double rounded, double centre) { return isfinite(rounded) ? rounded - centre : 0; }

/* A table of numbers; `values` is NULL if the caller passed None. */
typedef struct {
    void *values;
    int dtype;
} Table;

static inline double get(Table table, Py_ssize_t i) {
    switch (table.dtype) {
    case DOUBLE:
        return ((const double *)table.values)[i];
    case BFLOAT16:
        return (double)from_bfloat16(((const uint16_t *)table.values)[i]);
    case HALF:
        return (double)from_half(((const uint16_t *)table.values)[i]);
    default:
        return (double)((const float *)table.values)[i];
    }
}

static inline void put(Table table, Py_ssize_t i, double value) {
    switch (table.dtype) {
    case DOUBLE:
        ((double *)table.values)[i] = value;
        break;
    case BFLOAT16:
        ((uint16_t *)table.values)[i] = to_bfloat16((float)quiet_nan(value));
        break;
    case HALF:
        ((uint16_t *)table.values)[i] = to_half((float)value);
        break;
    default:
        ((float *)table.values)[i] = (float)value;
    }
}

/* Copy `count` numbers, from index `start`, as double. Each dtype has its own loop so that the compiler vectorizes it.
 */
static inline void load(double *restrict out, Table table, Py_ssize_t start, Py_ssize_t count) {
    if (table.dtype == FLOAT)
#pragma omp simd
        for (Py_ssize_t i = 0; i < count; i++)
            out[i] = (double)((const float *)table.values)[start + i];
    else if (table.dtype == DOUBLE)
        memcpy(out, (const double *)table.values + start, (size_t)count * sizeof(double));
    else
#pragma omp simd
        for (Py_ssize_t i = 0; i < count; i++)
            out[i] = get(table, start + i);
}

static inline void store_values(Table table, const double *values, Py_ssize_t count) {
    if (table.values != NULL)
#pragma omp simd
        for (Py_ssize_t i = 0; i < count; i++)
            put(table, i, values[i]);
}
