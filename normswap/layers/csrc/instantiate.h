/* passes.h for each dtype: T is the stored type, A the type of the arithmetic, V a vector of A. */
#define T float
#define A float
#define V FloatVector
#define LANES FLOAT_LANES
#define SUM sum_float
#define SKIP skip_float
#define LOAD_V load_float
#define STORE_V store_float
#define LOAD_A load_float
#define STORE_A store_float
#define LOAD(value) (value)
#define STORE(value) (value)
#define NAME(function) function##_float
#include "passes.h"
#define T double
#define A double
#define V DoubleVector
#define LANES DOUBLE_LANES
#define SUM sum_double
#define SKIP skip_double
#define LOAD_V load_double
#define STORE_V store_double
#define LOAD_A load_double
#define STORE_A store_double
#define LOAD(value) (value)
#define STORE(value) (value)
#define NAME(function) function##_double
#include "passes.h"
#define T uint16_t
#define A float
#define V FloatVector
#define LANES FLOAT_LANES
#define SUM sum_float
#define SKIP skip_float
#define LOAD_V load_bfloat16
#define STORE_V store_bfloat16
#define LOAD_A load_float
#define STORE_A store_float
#define LOAD(value) from_bfloat16(value)
#define STORE(value) to_bfloat16(value)
#define NAME(function) function##_bfloat16
#include "passes.h"
#define T uint16_t
#define A float
#define V FloatVector
#define LANES FLOAT_LANES
#define SUM sum_float
#define SKIP skip_float
#define LOAD_V load_half
#define STORE_V store_half
#define LOAD_A load_float
#define STORE_A store_float
#define LOAD(value) from_half(value)
#define STORE(value) to_half(value)
#define NAME(function) function##_half
#include "passes.h"

static const Passes *const PASSES[FLOAT_DTYPES] = {&passes_float, &passes_double, &passes_bfloat16, &passes_half};
