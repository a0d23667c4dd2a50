/* Switchable Normalization on CPU: one call for the forward pass, one for the backward pass.
 *
 * Activations are float, double, bfloat16 or half, contiguous or channels_last. Tables (N, C) are float, or double if
 * the activation is double; arithmetic on tables is double. The caller allocates all tensors and keeps them alive; the
 * functions check every size before they access memory. Equations: backends/moment_algebra.py.
 *
 * The extension is optional: without a compiler at installation, NumPy and torch compute the same.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* Compile one version for every processor and one for AVX2; the loader chooses. */
#if defined(__GNUC__) && defined(__x86_64__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define CLONES
#endif
/* Always inlined, so that each version of the caller has it. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* Number of values summed in single precision before the result is added to a double: in a row, in a column. */
enum { ROW_BLOCK = 512, BLOCK = 16 };
/* Below this length the sums over a row are faster with narrow vectors, which leave a shorter remainder. */
enum { SHORT_ROW = 196 };
/* Largest trusted ratio of the mean square around the first value to the variance; above it, cancellation loses digits.
 */
#define CANCELLATION_LIMIT(A) (sizeof(A) == sizeof(double) ? 1e4 : 32)

#include "dtypes.h"

/* The functions of passes.h for one dtype; pairs are for rows and for columns. */
typedef struct {
    size_t size;
    void (*row_moments)(const void *, Py_ssize_t, Py_ssize_t, Table, Table, Py_ssize_t);
    void (*first_column)(const void *, Py_ssize_t, void *);
    void (*column_squares)(const void *, const void *, Py_ssize_t, Py_ssize_t, double *, double *, double *);
    void (*column_moments)(const void *, Py_ssize_t, Py_ssize_t, double *, double *, Table, Table, Py_ssize_t,
                           double *);
    void (*affine[2])(const void *, void *, Py_ssize_t, Py_ssize_t, const double *, const double *, const double *,
                      double *);
    void (*sums[2])(const void *, const void *, Py_ssize_t, Py_ssize_t, const double *, double *, double *, double *);
    void (*input_gradient[2])(const void *, const void *, void *, Py_ssize_t, Py_ssize_t, const double *,
                              const double *, const double *, const double *, double *);
} Passes;

#define VERSION(name) name
#include "instantiate.h"

/* A second version for 512-bit vectors, which halve the time of 16-bit activations. It is not a clone because GCC
 * limits clones for AVX-512 to 256-bit vectors. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#pragma push_macro("CLONES")
#undef VERSION
#undef CLONES
#define VERSION(name) name##_512
#define CLONES
#include "instantiate.h"
#undef CLONES
#pragma pop_macro("CLONES")
#pragma GCC pop_options

static const Passes *widest(int dtype) {
    const int available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("fma");
    return available ? PASSES_512[dtype] : PASSES[dtype];
}
#else
static const Passes *widest(int dtype) { return PASSES[dtype]; }
#endif

#include "algebra.h"
#include "layer.h"
#include "arguments.h"

/* Version of the functions below. backends/cpu.py ignores an extension with another version. */
enum { INTERFACE = 4 };

/* --- arguments of the passes --------------------------------------------------------------------------------- */

/* Arguments of both passes, then those of the forward pass, then those of the backward pass. Shapes: x, y, dy, dx
 * (N, C, *spatial); mean, var (N, C); mean_weight, var_weight and their gradients (K,); all others (C,). */
typedef struct {
    Py_ssize_t dtype, samples, channels, positions, channels_last, threads, softmax, branch_order, num_groups;
    double eps;
    Buffer x, mean, var, constant_mean, constant_var, weight, bias, mean_weight, var_weight;
    Buffer ln_mean_shift, ln_var_scale, in_var_scale;
    Buffer y, batch_mean, batch_var;
    Buffer dy, dx, mean_weight_gradient, var_weight_gradient, weight_gradient, bias_gradient;
} LayerArguments;

#define FIELD(type, name) {#name, type, offsetof(LayerArguments, name)}
#define LAYER_FIELDS                                                                                                   \
    FIELD(INTEGER, dtype), FIELD(INTEGER, samples), FIELD(INTEGER, channels), FIELD(INTEGER, positions),               \
        FIELD(INTEGER, channels_last), FIELD(INTEGER, threads), FIELD(INTEGER, softmax), FIELD(INTEGER, branch_order), \
        FIELD(INTEGER, num_groups), FIELD(BUFFER, ln_mean_shift), FIELD(BUFFER, ln_var_scale),                         \
        FIELD(BUFFER, in_var_scale),                                                                                   \
        FIELD(REAL, eps), FIELD(BUFFER, x), FIELD(BUFFER, mean), FIELD(BUFFER, var), FIELD(BUFFER, constant_mean),     \
        FIELD(BUFFER, constant_var), FIELD(BUFFER, weight), FIELD(BUFFER, bias), FIELD(BUFFER, mean_weight),           \
        FIELD(BUFFER, var_weight)

static const Argument forward_arguments[] = {
    LAYER_FIELDS,
    FIELD(BUFFER, y),
    FIELD(BUFFER, batch_mean),
    FIELD(BUFFER, batch_var),
};

static const Argument backward_arguments[] = {
    LAYER_FIELDS,
    FIELD(BUFFER, dy),
    FIELD(BUFFER, dx),
    FIELD(BUFFER, mean_weight_gradient),
    FIELD(BUFFER, var_weight_gradient),
    FIELD(BUFFER, weight_gradient),
    FIELD(BUFFER, bias_gradient),
};

#define SIGNATURE(arguments) {arguments, sizeof arguments / sizeof *arguments, {NULL}}

static Signature forward_signature = SIGNATURE(forward_arguments), backward_signature = SIGNATURE(backward_arguments);

/* Decode two bits for each branch: its index among the mixed branches plus 1, or 0 for a branch that is not mixed. */
static int read_order(Py_ssize_t order, Gates *gates) {
    unsigned used = 0;
    for (int branch = 0; branch < BRANCHES; branch++) {
        gates->index_of[branch] = (int)(order >> 2 * branch & 3) - 1;
        if (gates->index_of[branch] >= 0) {
            used |= 1u << gates->index_of[branch];
            gates->count++;
        }
    }
    if (gates->count > 0 && used == (1u << gates->count) - 1)
        return 0;
    PyErr_SetString(PyExc_ValueError, "branch_order: expected a different index below K for each of the K branches");
    return -1;
}

static int check_shape(const LayerArguments *a) {
    if (a->dtype < 0 || a->dtype >= FLOAT_DTYPES || a->samples <= 0 || a->channels <= 0 || a->positions <= 0 ||
        product(product(a->samples, a->channels), a->positions) <= 0) {
        PyErr_SetString(PyExc_ValueError, "expected a floating dtype and a shape without zeros");
        return -1;
    }
    if (a->num_groups <= 0 || a->channels % a->num_groups != 0) {
        PyErr_SetString(PyExc_ValueError, "num_groups: expected a divisor of the number of channels");
        return -1;
    }
    return 0;
}

/* Check the buffers of both passes. `moments` is WRITTEN in the forward pass, which writes mean and var, else 0. */
static int check_layer(const LayerArguments *a, const Gates *gates, CheckedBuffers *checked, int moments) {
    const Py_ssize_t entries = a->samples * a->channels, channels = a->channels;
    const int table = a->dtype == DOUBLE ? DOUBLE : FLOAT;
    if (check_buffer(checked, "x", &a->x, (int)a->dtype, entries * a->positions, 0) < 0 ||
        check_buffer(checked, "mean", &a->mean, table, entries, moments) < 0 ||
        check_buffer(checked, "var", &a->var, table, entries, moments) < 0 ||
        check_buffer(checked, "constant_mean", &a->constant_mean, table, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "constant_var", &a->constant_var, table, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "weight", &a->weight, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "bias", &a->bias, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "ln_mean_shift", &a->ln_mean_shift, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "ln_var_scale", &a->ln_var_scale, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "in_var_scale", &a->in_var_scale, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "mean_weight", &a->mean_weight, ANY_FLOAT, gates->count, 0) < 0 ||
        check_buffer(checked, "var_weight", &a->var_weight, ANY_FLOAT, gates->count, 0) < 0)
        return -1;
    if ((a->constant_mean.count < 0) != (a->constant_var.count < 0)) {
        PyErr_SetString(PyExc_ValueError, "expected constant_mean and constant_var together");
        return -1;
    }
    if ((a->ln_mean_shift.count < 0) != (a->ln_var_scale.count < 0)) {
        PyErr_SetString(PyExc_ValueError, "expected ln_mean_shift and ln_var_scale together");
        return -1;
    }
    return 0;
}

static int check_forward(const LayerArguments *a, CheckedBuffers *checked) {
    const Py_ssize_t all = a->samples * a->channels * a->positions;
    const int table = a->dtype == DOUBLE ? DOUBLE : FLOAT, batch = WRITTEN | OPTIONAL;
    if (check_buffer(checked, "y", &a->y, (int)a->dtype, all, WRITTEN) < 0 ||
        check_buffer(checked, "batch_mean", &a->batch_mean, table, a->channels, batch) < 0 ||
        check_buffer(checked, "batch_var", &a->batch_var, table, a->channels, batch) < 0)
        return -1;
    return check_overlap(checked);
}

/* The gradient of a gate has the dtype of its parameter; those of weight and bias have the dtype of the tables. */
static int check_backward(const LayerArguments *a, const Gates *gates, CheckedBuffers *checked) {
    const Py_ssize_t all = a->samples * a->channels * a->positions;
    const int table = a->dtype == DOUBLE ? DOUBLE : FLOAT, result = WRITTEN | OPTIONAL;
    if (check_buffer(checked, "dy", &a->dy, (int)a->dtype, all, 0) < 0 ||
        check_buffer(checked, "dx", &a->dx, (int)a->dtype, all, result) < 0 ||
        check_buffer(checked, "mean_weight_gradient", &a->mean_weight_gradient, gates->mean.dtype, gates->count,
                     result) < 0 ||
        check_buffer(checked, "var_weight_gradient", &a->var_weight_gradient, gates->var.dtype, gates->count, result) <
            0 ||
        check_buffer(checked, "weight_gradient", &a->weight_gradient, table, a->channels, result) < 0 ||
        check_buffer(checked, "bias_gradient", &a->bias_gradient, table, a->channels, result) < 0)
        return -1;
    return check_overlap(checked);
}

/* Check the arguments of both passes and fill the job. */
static int read_job(const LayerArguments *a, Job *j, CheckedBuffers *checked, int moments) {
    Site *s = &j->site;
    memset(j, 0, sizeof *j);
    checked->count = 0;
    if (check_shape(a) < 0 || read_order(a->branch_order, &j->gates) < 0 ||
        check_layer(a, &j->gates, checked, moments) < 0)
        return -1;
    s->samples = a->samples;
    s->channels = a->channels;
    s->positions = a->positions;
    s->eps = a->eps;
    s->mean = a->mean.table;
    s->var = a->var.table;
    s->constant_mean = a->constant_mean.table;
    s->constant_var = a->constant_var.table;
    s->weight = a->weight.table;
    s->bias = a->bias.table;
    s->ln_shift = a->ln_mean_shift.table;
    s->ln_scale = a->ln_var_scale.table;
    s->in_scale = a->in_var_scale.table;
    s->groups = a->num_groups;
    s->extended = s->groups > 1 || s->ln_shift.values != NULL || s->in_scale.values != NULL;
    j->gates.softmax = a->softmax != 0;
    j->gates.mean = a->mean_weight.table;
    j->gates.var = a->var_weight.table;
    j->channels_last = a->channels_last || a->positions == 1;
    j->threads = a->threads;
    j->passes = widest((int)a->dtype);
    j->row_passes = a->positions < SHORT_ROW ? PASSES[a->dtype] : j->passes;
    j->x = a->x.table.values;
    return 0;
}

/* --- the functions of the module ----------------------------------------------------------------------------- */

static Py_ssize_t minimum(Py_ssize_t a, Py_ssize_t b) { return a < b ? a : b; }

static Py_ssize_t maximum(Py_ssize_t a, Py_ssize_t b) { return a > b ? a : b; }

/* Load constants, or the identity for a branch that is not matched. */
static void load_constants(const Site *s, double *out, Table constants, double identity) {
    if (constants.values != NULL)
        load(out, constants, 0, s->channels);
    for (Py_ssize_t c = 0; constants.values == NULL && c < s->channels; c++)
        out[c] = identity;
}

/* Read the gates, divide the work and allocate memory. */
static double *prepare_job(Job *j, int with_terms) {
    Site *s = &j->site;
    const Py_ssize_t sample = s->channels * s->positions;
    j->segments = maximum(1, minimum(minimum(sample / SEGMENT, SEGMENTS / s->samples), s->positions));
    j->threads = maximum(1, minimum(j->threads, s->samples * sample / GRAIN));
    read_gate(&j->gates, j->gates.mean, s->means);
    read_gate(&j->gates, j->gates.var, s->variances);
    double *block = allocate(j, with_terms);
    if (block != NULL && s->constant_mean.values != NULL) {
        load(s->bn_mean, s->constant_mean, 0, s->channels);
        load(s->bn_var, s->constant_var, 0, s->channels);
    }
    if (block != NULL && s->extended) {
        load_constants(s, s->shift, s->ln_shift, 0);
        load_constants(s, s->scale, s->ln_scale, 1);
        load_constants(s, s->in_scales, s->in_scale, 1);
    }
    return block;
}

/* Run the forward pass; see LayerArguments. Writes y, mean, var and, unless None, batch_mean and batch_var. */
static PyObject *forward_pass(PyObject *self, PyObject *arguments) {
    LayerArguments a = {0};
    Job job;
    CheckedBuffers checked;
    if (read_arguments(&forward_signature, arguments, &a) < 0 ||
        read_job(&a, &job, &checked, WRITTEN) < 0 || check_forward(&a, &checked) < 0)
        return NULL;
    double *block;
    Py_BEGIN_ALLOW_THREADS
    job.y = a.y.table.values;
    block = prepare_job(&job, 0);
    if (block != NULL) {
        forward(&job);
        store(a.batch_mean.table, job.site.bn_mean, a.channels);
        store(a.batch_var.table, job.site.bn_var, a.channels);
        free(block);
    }
    Py_END_ALLOW_THREADS
    if (block == NULL)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* Run the backward pass; see LayerArguments. Writes every gradient that is not None. */
static PyObject *backward_pass(PyObject *self, PyObject *arguments) {
    LayerArguments a = {0};
    Job job;
    CheckedBuffers checked;
    if (read_arguments(&backward_signature, arguments, &a) < 0 || read_job(&a, &job, &checked, 0) < 0 ||
        check_backward(&a, &job.gates, &checked) < 0)
        return NULL;
    double *block;
    Py_BEGIN_ALLOW_THREADS
    job.dy = a.dy.table.values;
    job.y = a.dx.table.values;
    block = prepare_job(&job, 1);
    if (block != NULL) {
        const Site *s = &job.site;
        backward(&job);
        write_gate(&job.gates, s->means, job.terms.means, a.mean_weight_gradient.table);
        write_gate(&job.gates, s->variances, job.terms.variances, a.var_weight_gradient.table);
        store(a.weight_gradient.table, job.terms.weight, a.channels);
        store(a.bias_gradient.table, job.terms.bias, a.channels);
        free(block);
    }
    Py_END_ALLOW_THREADS
    if (block == NULL)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* num_batches_tracked has 1 element of int64, or is None; the other buffers are (C,). */
typedef struct {
    Py_ssize_t channels;
    double momentum, var_factor;
    Buffer mean, var, running_mean, running_var, num_batches_tracked;
} UpdateArguments;

#undef FIELD
#define FIELD(type, name) {#name, type, offsetof(UpdateArguments, name)}

static const Argument update_arguments[] = {
    FIELD(INTEGER, channels),   FIELD(REAL, momentum),
    FIELD(REAL, var_factor),    FIELD(BUFFER, mean),
    FIELD(BUFFER, var),         FIELD(BUFFER, running_mean),
    FIELD(BUFFER, running_var), FIELD(BUFFER, num_batches_tracked),
};

static Signature update_signature = SIGNATURE(update_arguments);

static int check_update(const UpdateArguments *a) {
    CheckedBuffers checked = {.count = 0};
    if (check_buffer(&checked, "mean", &a->mean, ANY_FLOAT, a->channels, 0) < 0 ||
        check_buffer(&checked, "var", &a->var, ANY_FLOAT, a->channels, 0) < 0 ||
        check_buffer(&checked, "running_mean", &a->running_mean, ANY_FLOAT, a->channels, WRITTEN) < 0 ||
        check_buffer(&checked, "running_var", &a->running_var, ANY_FLOAT, a->channels, WRITTEN) < 0 ||
        check_buffer(&checked, "num_batches_tracked", &a->num_batches_tracked, INT64, 1, WRITTEN | OPTIONAL) < 0)
        return -1;
    return check_overlap(&checked);
}

/* Update running statistics; see UpdateArguments. The new value is (1 - momentum) old + momentum new, as BN computes
 * it: an infinite value stays infinite, while old + momentum (new - old) would give NaN. */
static PyObject *update_running(PyObject *self, PyObject *arguments) {
    UpdateArguments a = {0};
    if (read_arguments(&update_signature, arguments, &a) < 0 || check_update(&a) < 0)
        return NULL;
    const double momentum = a.momentum, rest = 1 - momentum;
    const Table running_mean = a.running_mean.table, running_var = a.running_var.table;
    for (Py_ssize_t c = 0; c < a.channels; c++) {
        put(running_mean, c, rest * get(running_mean, c) + momentum * get(a.mean.table, c));
        put(running_var, c, rest * get(running_var, c) + momentum * (a.var_factor * get(a.var.table, c)));
    }
    if (a.num_batches_tracked.count == 1)
        ++*(int64_t *)a.num_batches_tracked.table.values;
    Py_RETURN_NONE;
}

/* Use torch's threads. Arguments: the addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads. */
static PyObject *use_threads(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    void *entry[3];
    if (count != 3) {
        PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
        return NULL;
    }
    for (int i = 0; i < 3; i++)
        entry[i] = PyLong_AsVoidPtr(args[i]);
    if (PyErr_Occurred())
        return NULL;
    memcpy(&parallel, &entry[0], sizeof parallel);
    memcpy(&thread_number, &entry[1], sizeof thread_number);
    memcpy(&team_size, &entry[2], sizeof team_size);
    Py_RETURN_NONE;
}

#define METHOD(name, function, flags) {name, (PyCFunction)(void (*)(void))function, flags, NULL}

static PyMethodDef methods[] = {
    METHOD("forward", forward_pass, METH_O),
    METHOD("backward", backward_pass, METH_O),
    METHOD("update_running", update_running, METH_O),
    METHOD("use_threads", use_threads, METH_FASTCALL),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_compiled", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__compiled(void) {
    if (intern_names(&forward_signature) < 0 || intern_names(&backward_signature) < 0 ||
        intern_names(&update_signature) < 0)
        return NULL;
    PyObject *created = PyModule_Create(&module);
    if (created != NULL && PyModule_AddIntConstant(created, "INTERFACE", INTERFACE) < 0)
        Py_CLEAR(created);
    return created;
}
