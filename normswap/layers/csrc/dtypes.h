/* Numbers as tensors store them: float, double, bfloat16 and half, the last two as 16 bits.
 *
 * The conversions are integer arithmetic without branches, so that every compiler makes vectors of them; they round to
 * nearest even and keep what is not finite.
 */
#include <stdint.h>
#include <string.h>

enum { FLOAT, DOUBLE, BFLOAT16, HALF, KINDS };

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

/* A NaN has to have a zero in the upper half of its payload, as those of bfloat16 and those that arithmetic makes. */
INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* All ones where a condition holds, for a choice without a branch. */
INLINE uint32_t where(int condition) { return 0u - (uint32_t)condition; }

INLINE float from_half(uint16_t value) {
    const uint32_t bits = (uint32_t)(value & 0x7fff) << 13, special = where(bits >= 0x0f800000) & (112u << 23);
    /* Below 2^-14 there is no leading one: it is put there and taken off again. */
    const uint32_t small = bits_of(of_bits(bits + (113u << 23)) - of_bits(113u << 23)), is_small = where(bits < 1 << 23);
    const uint32_t found = (small & is_small) | ((bits + (112u << 23) + special) & ~is_small);
    return of_bits(found | (uint32_t)(value & 0x8000) << 16);
}

INLINE uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), size = bits & 0x7fffffff, top = 143u << 23, bottom = 113u << 23;
    const uint32_t held = size < top ? size : top, exponent = held & 0x7f800000;
    const uint32_t scale = exponent > bottom ? exponent : bottom, ruler = scale + (13u << 23);
    /* Added to a power of two whose last bit is that of the half, the value is rounded to it. */
    const uint32_t steps = bits_of(of_bits(held) + of_bits(ruler)) - ruler, nan = where(size > 0x7f800000) & 0x0200;
    return (uint16_t)((((scale - bottom) >> 13) + steps) | nan | ((bits >> 16) & 0x8000));
}

/* Any NaN as one of zero payload. */
INLINE double quiet(double value) { return value == value ? value : (double)NAN; }

/* The mean square around a mean, given that around another value. Squares that overflow leave it infinite. */
INLINE double spread_of(double square, double centre) {
    return isinf(square) && isfinite(centre) ? square : square - centre * centre;
}

/* What rounding left out of a centre: nothing of one that is infinite. */
INLINE double left_out(double rounded, double centre) { return isfinite(rounded) ? rounded - centre : 0; }

/* A table of any kind; without values, one that is not there. */
typedef struct {
    void *values;
    int kind;
} Table;

static inline double get(Table table, Py_ssize_t i) {
    switch (table.kind) {
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
    switch (table.kind) {
    case DOUBLE:
        ((double *)table.values)[i] = value;
        break;
    case BFLOAT16:
        ((uint16_t *)table.values)[i] = to_bfloat16((float)quiet(value));
        break;
    case HALF:
        ((uint16_t *)table.values)[i] = to_half((float)value);
        break;
    default:
        ((float *)table.values)[i] = (float)value;
    }
}

/* Copies of `count` numbers from `start` on, as double. Loops of their own, so that they become vectors. */
CLONES static void load(double *restrict out, Table table, Py_ssize_t start, Py_ssize_t count) {
    if (table.kind == FLOAT)
#pragma omp simd
        for (Py_ssize_t i = 0; i < count; i++)
            out[i] = (double)((const float *)table.values)[start + i];
    else if (table.kind == DOUBLE)
        memcpy(out, (const double *)table.values + start, (size_t)count * sizeof(double));
    else
#pragma omp simd
        for (Py_ssize_t i = 0; i < count; i++)
            out[i] = get(table, start + i);
}

static void store(Table table, const double *values, Py_ssize_t count) {
    if (table.values != NULL)
#pragma omp simd
        for (Py_ssize_t i = 0; i < count; i++)
            put(table, i, values[i]);
}
