/* The engine for x86-64 processors with 512-bit vectors. */
#include "platform.h"

#if X86_ENGINES
/* Every such processor converts half precision too (F16C). */
static int is_available(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "dtypes.h"
#include "job.h"

#define VECTOR_BYTES 64
#define CONVERTS_HALF 1
#define ENGINE normswap_avx512
#define ENGINE_NAME "avx512"
#define ENGINE_IS_AVAILABLE is_available
#include "engine.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
