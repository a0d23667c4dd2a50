/* passes.h for each dtype. VERSION(name) makes the name of each function. */
#define T float
#define A float
#define S double
#define LOAD(value) (value)
#define STORE(value) (value)
#define NAME(function) VERSION(function##_float)
#include "passes.h"
#define T double
#define A double
#define S double
#define LOAD(value) (value)
#define STORE(value) (value)
#define NAME(function) VERSION(function##_double)
#include "passes.h"
#define T uint16_t
#define A float
#define S float
#define LOAD(value) from_bfloat16(value)
#define STORE(value) to_bfloat16(value)
#define NAME(function) VERSION(function##_bfloat16)
#include "passes.h"
#define T uint16_t
#define A float
#define S float
#define LOAD(value) from_half(value)
#define STORE(value) to_half(value)
#define NAME(function) VERSION(function##_half)
#include "passes.h"

static const Passes *const VERSION(PASSES)[FLOAT_DTYPES] = {
    &VERSION(passes_float),
    &VERSION(passes_double),
    &VERSION(passes_bfloat16),
    &VERSION(passes_half),
};
