/* The engine for x86-64 processors with 256-bit vectors. */
#include "platform.h"

#if X86_ENGINES
/* Every such processor converts half precision too (F16C). */
static int is_available(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "dtypes.h"
#include "job.h"

#define VECTOR_BYTES 32
#define CONVERTS_HALF 1
#define ENGINE normswap_avx2
#define ENGINE_NAME "avx2"
#define ENGINE_IS_AVAILABLE is_available
#include "engine.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
