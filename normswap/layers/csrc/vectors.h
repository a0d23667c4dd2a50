/* Vectors of this variant of the engine: VECTOR_BYTES is 64, 32 or 16. Other compilers than GCC and Clang have vectors
 * of one number.
 *
 * For each arithmetic type (float, double) there are a vector, its number of lanes, a sum of lanes, and a function that
 * sets the first lanes to 0; for each stored type a load, which converts, and a store.
 */
#if defined(__GNUC__)
#if defined(CONVERTS_HALF)
#include <immintrin.h>
#endif

typedef float FloatVector __attribute__((vector_size(VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t FloatMask __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t DoubleMask __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t ShortBits __attribute__((vector_size(VECTOR_BYTES / 2)));
enum { FLOAT_LANES = VECTOR_BYTES / 4, DOUBLE_LANES = VECTOR_BYTES / 8 };

/* Sums of lanes, pairwise. */
typedef float Quad __attribute__((vector_size(16)));
typedef double Pair __attribute__((vector_size(16)));

INLINE float sum_float(FloatVector v) {
#if VECTOR_BYTES == 16
    const Quad q = v;
#elif VECTOR_BYTES == 32
    Quad part[2];
    memcpy(part, &v, sizeof v);
    const Quad q = part[0] + part[1];
#else
    Quad part[4];
    memcpy(part, &v, sizeof v);
    const Quad q = (part[0] + part[1]) + (part[2] + part[3]);
#endif
    return (q[0] + q[1]) + (q[2] + q[3]);
}

INLINE double sum_double(DoubleVector v) {
#if VECTOR_BYTES == 16
    const Pair p = v;
#elif VECTOR_BYTES == 32
    Pair part[2];
    memcpy(part, &v, sizeof v);
    const Pair p = part[0] + part[1];
#else
    Pair part[4];
    memcpy(part, &v, sizeof v);
    const Pair p = (part[0] + part[1]) + (part[2] + part[3]);
#endif
    return p[0] + p[1];
}

/* Set the first `count` lanes to 0. */
INLINE FloatVector skip_float(FloatVector v, Py_ssize_t count) {
    static const int32_t keep[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                     -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    FloatMask mask;
    memcpy(&mask, keep + 16 - count, sizeof mask);
    return (FloatVector)((FloatMask)v & mask);
}

INLINE DoubleVector skip_double(DoubleVector v, Py_ssize_t count) {
    static const int64_t keep[16] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
    DoubleMask mask;
    memcpy(&mask, keep + 8 - count, sizeof mask);
    return (DoubleVector)((DoubleMask)v & mask);
}

INLINE FloatVector load_float(const float *p) {
    FloatVector v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_float(float *p, FloatVector v) { memcpy(p, &v, sizeof v); }

INLINE DoubleVector load_double(const double *p) {
    DoubleVector v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_double(double *p, DoubleVector v) { memcpy(p, &v, sizeof v); }

INLINE FloatVector load_bfloat16(const uint16_t *p) {
    ShortBits bits;
    memcpy(&bits, p, sizeof bits);
    return (FloatVector)(__builtin_convertvector(bits, Bits) << 16);
}

INLINE void store_bfloat16(uint16_t *p, FloatVector v) {
    const Bits bits = (Bits)v;
    const ShortBits rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, ShortBits);
    memcpy(p, &rounded, sizeof rounded);
}

#if defined(CONVERTS_HALF) && VECTOR_BYTES == 64
INLINE FloatVector load_half(const uint16_t *p) {
    return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

INLINE void store_half(uint16_t *p, FloatVector v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(CONVERTS_HALF) && VECTOR_BYTES == 32
INLINE FloatVector load_half(const uint16_t *p) {
    return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

INLINE void store_half(uint16_t *p, FloatVector v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
INLINE FloatVector load_half(const uint16_t *p) {
    __fp16 values[FLOAT_LANES];
    FloatVector v;
    memcpy(values, p, sizeof values);
    for (int i = 0; i < FLOAT_LANES; i++)
        v[i] = (float)values[i];
    return v;
}

INLINE void store_half(uint16_t *p, FloatVector v) {
    __fp16 values[FLOAT_LANES];
    for (int i = 0; i < FLOAT_LANES; i++)
        values[i] = (__fp16)v[i];
    memcpy(p, values, sizeof values);
}
#else
INLINE FloatVector load_half(const uint16_t *p) {
    FloatVector v;
    for (int i = 0; i < FLOAT_LANES; i++)
        v[i] = from_half(p[i]);
    return v;
}

INLINE void store_half(uint16_t *p, FloatVector v) {
    for (int i = 0; i < FLOAT_LANES; i++)
        p[i] = to_half(v[i]);
}
#endif

#else
typedef float FloatVector;
typedef double DoubleVector;
enum { FLOAT_LANES = 1, DOUBLE_LANES = 1 };

INLINE float sum_float(FloatVector v) { return v; }
INLINE double sum_double(DoubleVector v) { return v; }
INLINE FloatVector skip_float(FloatVector v, Py_ssize_t count) { return count ? 0 : v; }
INLINE DoubleVector skip_double(DoubleVector v, Py_ssize_t count) { return count ? 0 : v; }
INLINE FloatVector load_float(const float *p) { return *p; }
INLINE void store_float(float *p, FloatVector v) { *p = v; }
INLINE DoubleVector load_double(const double *p) { return *p; }
INLINE void store_double(double *p, DoubleVector v) { *p = v; }
INLINE FloatVector load_bfloat16(const uint16_t *p) { return from_bfloat16(*p); }
INLINE void store_bfloat16(uint16_t *p, FloatVector v) { *p = to_bfloat16(v); }
INLINE FloatVector load_half(const uint16_t *p) { return from_half(*p); }
INLINE void store_half(uint16_t *p, FloatVector v) { *p = to_half(v); }
#endif
