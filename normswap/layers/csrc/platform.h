/* Includes and compiler differences. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Always inlined, so that each engine has its own version. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")
#else
#define INLINE static inline
#define UNROLL
#endif

/* Whether there are engines for several x86 processors. */
#if defined(__GNUC__) && defined(__x86_64__)
#define X86_ENGINES 1
#else
#define X86_ENGINES 0
#endif
