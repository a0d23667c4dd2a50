/* The forward and the backward pass for one kind of processor. The including file defines ENGINE, its name, when it is
 * available, and VECTOR_BYTES. */
#include "vectors.h"

#if defined(__GNUC__)
#define ZERO(V) ((V){0})
#else
#define ZERO(V) ((V)0)
#endif

/* Largest trusted ratio of the mean square around the first value to the variance; above it, cancellation loses digits.
 */
#define CANCELLATION_LIMIT(A) (sizeof(A) == sizeof(double) ? 1e4 : 32)

/* The functions of passes.h for one dtype; pairs are for rows and for columns. */
typedef struct Passes {
    size_t size;
    void (*row_moments)(const void *, Py_ssize_t, Py_ssize_t, Table, Table, Py_ssize_t);
    void (*first_column)(const void *, Py_ssize_t, void *);
    void (*column_squares)(const void *, const void *, Py_ssize_t, Py_ssize_t, double *sums, double *scratch);
    void (*column_moments)(const void *, Py_ssize_t, Py_ssize_t, double *, double *, Table, Table, Py_ssize_t);
    void (*affine[2])(const void *, void *, Py_ssize_t, Py_ssize_t, const double *, const double *, const double *,
                      double *);
    void (*sums[2])(const void *, const void *, Py_ssize_t, Py_ssize_t, const double *, double *, double *, double *);
    void (*input_gradient[2])(const void *, const void *, void *, Py_ssize_t, Py_ssize_t, const double *,
                              const double *, const double *, const double *, double *);
    void (*row_gradients)(const void *, const void *, void *, Py_ssize_t, Py_ssize_t, const double *, const double *,
                          double *, double *, Table, Table, Py_ssize_t);
    void (*column_gradients)(const void *, const void *, void *, const void *, Py_ssize_t, Py_ssize_t, const double *,
                             const double *, double *, int, double *);
} Passes;

/* Number of columns that are read together, a divisor of BLOCK: a few short ones, to use what is in registers; long
 * ones one by one, in the order of memory. */
static Py_ssize_t columns_at_once(Py_ssize_t channels) { return channels <= 64 ? 4 : channels <= 128 ? 2 : 1; }

#include "instantiate.h"

#include "algebra.h"
#include "layer.h"

const Engine ENGINE = {ENGINE_NAME, ENGINE_IS_AVAILABLE, forward, backward};
