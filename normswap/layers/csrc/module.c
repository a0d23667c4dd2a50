/* Switchable Normalization on CPU in one call forward and one backward: float, double, bfloat16 and half, contiguous or
 * channels_last, on as many threads as torch has.
 *
 * Optional: where no compiler was at hand when the package was installed, numpy and torch do the same in some hundred.
 * Tables of (N, C) are float, or double where x is; all algebra on them is done in double. Memory comes from torch
 * tensors that the caller keeps alive and has laid out; how much of it there is is checked here. Equations: tables.py.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One version for any processor, one for those of today; the loader chooses. */
#if defined(__GNUC__) && defined(__x86_64__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define CLONES
#endif
/* Part of each version of its caller, which no function of another version can be. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* So many values are summed before they are added to a sum in double: of a row, of a column. */
enum { ROW_BLOCK = 512, BLOCK = 16 };
/* Sums over shorter rows are faster in narrower vectors, which leave less over. */
enum { WIDE = 196 };
/* Beyond this ratio of the square around the first value to the variance, the difference of the two is not trusted. */
#define DOUBTFUL(A) (sizeof(A) == sizeof(double) ? 1e4 : 32)

#include "dtypes.h"

/* The passes for one kind of number; pairs are for rows and for columns. */
typedef struct {
    size_t size;
    void (*row_moments)(const void *, Py_ssize_t, Py_ssize_t, Table, Table, Py_ssize_t);
    void (*origin)(const void *, Py_ssize_t, void *);
    void (*column_squares)(const void *, const void *, Py_ssize_t, Py_ssize_t, double *, double *, double *);
    void (*column_moments)(const void *, Py_ssize_t, Py_ssize_t, double *, double *, Table, Table, Py_ssize_t,
                           double *);
    void (*affine[2])(const void *, void *, Py_ssize_t, Py_ssize_t, const double *, const double *, const double *,
                      double *);
    void (*sums[2])(const void *, const void *, Py_ssize_t, Py_ssize_t, const double *, double *, double *, double *);
    void (*combine[2])(const void *, const void *, void *, Py_ssize_t, Py_ssize_t, const double *, const double *,
                       const double *, const double *, double *);
} Passes;

#define VERSION(name) name
#include "instantiate.h"

/* Once more for vectors of 512 bits, with which passes over 16-bit numbers take half the time. A clone would not have
 * them: GCC tunes processors with AVX-512 for 256. */
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

static const Passes *widest(int kind) {
    const int there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma");
    return there ? PASSES_512[kind] : PASSES[kind];
}
#else
static const Passes *widest(int kind) { return PASSES[kind]; }
#endif

#include "threads.h"
#include "gates.h"
#include "algebra.h"
#include "layer.h"
#include "checks.h"

/* What this file expects of its caller; compiled.py leaves an extension aside that was built for another one. */
enum { INTERFACE = 2 };

/* What both functions are given first, in this order: (kind, samples, channels, positions, whether channels come last,
 * threads), eight buffers, (whether the gate is softmax, places of the branches, eps). */
enum { SITE_ARGUMENTS = 33 };

/* Where each branch stands among those in use, each place once. */
static int read_order(long order, Gates *gates) {
    unsigned taken = 0;
    for (int branch = 0; branch < BRANCHES; branch++) {
        gates->place[branch] = (int)(order >> 2 * branch & 3) - 1;
        if (gates->place[branch] >= 0) {
            taken |= 1u << gates->place[branch];
            gates->count++;
        }
    }
    if (gates->count > 0 && taken == (1u << gates->count) - 1)
        return 0;
    PyErr_SetString(PyExc_ValueError, "expected every branch in use at a place of its own");
    return -1;
}

static int read_tables(PyObject *const *args, int table_kind, Job *j, Buffers *buffers, int measured) {
    Site *s = &j->site;
    const Py_ssize_t entries = product(s->samples, s->channels), each = s->channels, gates = j->gates.count;
    if (read_buffer(buffers, args, "mean", table_kind, entries, measured, &s->mean) < 0 ||
        read_buffer(buffers, args + 3, "var", table_kind, entries, measured, &s->var) < 0 ||
        read_buffer(buffers, args + 6, "running_mean", table_kind, each, OPTIONAL, &s->fixed_mean) < 0 ||
        read_buffer(buffers, args + 9, "running_var", table_kind, each, OPTIONAL, &s->fixed_var) < 0 ||
        read_buffer(buffers, args + 12, "weight", ANY_KIND, each, OPTIONAL, &s->weight) < 0 ||
        read_buffer(buffers, args + 15, "bias", ANY_KIND, each, OPTIONAL, &s->bias) < 0 ||
        read_buffer(buffers, args + 18, "mean_weight", ANY_KIND, gates, 0, &j->gates.mean) < 0 ||
        read_buffer(buffers, args + 21, "var_weight", ANY_KIND, gates, 0, &j->gates.var) < 0)
        return -1;
    if ((s->fixed_mean.values == NULL) != (s->fixed_var.values == NULL)) {
        PyErr_SetString(PyExc_ValueError, "expected running_mean and running_var together");
        return -1;
    }
    return 0;
}

/* `measured` is WRITTEN where the moments of x are written, and 0 where they are read. Returns the kind of x. */
static int read_job(PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted, Job *j, Buffers *buffers, int measured) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, count);
        return -1;
    }
    memset(j, 0, sizeof *j);
    buffers->count = 0;
    Site *s = &j->site;
    const long kind = PyLong_AsLong(args[0]);
    s->samples = PyLong_AsSsize_t(args[1]);
    s->channels = PyLong_AsSsize_t(args[2]);
    s->positions = PyLong_AsSsize_t(args[3]);
    j->by_channel = PyObject_IsTrue(args[4]) || s->positions == 1;
    j->threads = PyLong_AsSsize_t(args[5]);
    j->gates.softmax = PyObject_IsTrue(args[30]);
    const long order = PyLong_AsLong(args[31]);
    s->eps = PyFloat_AsDouble(args[32]);
    if (PyErr_Occurred())
        return -1;
    if (kind < 0 || kind >= KINDS || s->samples < 1 || s->channels < 1 || s->positions < 1 ||
        product(product(s->samples, s->channels), s->positions) < 0) {
        PyErr_SetString(PyExc_ValueError, "expected a kind of number and a shape without zeros");
        return -1;
    }
    if (read_order(order, &j->gates) < 0 ||
        read_tables(args + 6, kind == DOUBLE ? DOUBLE : FLOAT, j, buffers, measured) < 0)
        return -1;
    j->passes = widest((int)kind);
    j->sums_of_rows = s->positions < WIDE ? PASSES[kind] : j->passes;
    return (int)kind;
}

static Py_ssize_t least(Py_ssize_t a, Py_ssize_t b) { return a < b ? a : b; }

static Py_ssize_t most(Py_ssize_t a, Py_ssize_t b) { return a > b ? a : b; }

/* Read the gates, settle how the work is cut, allocate. */
static double *prepare(Job *j, int with_pulls) {
    Site *s = &j->site;
    const Py_ssize_t sample = s->channels * s->positions;
    j->segments = most(1, least(least(sample / SEGMENT, SEGMENTS / s->samples), s->positions));
    j->threads = most(1, least(j->threads, s->samples * sample / GRAIN));
    read_gate(&j->gates, j->gates.mean, s->means);
    read_gate(&j->gates, j->gates.var, s->variances);
    double *block = allocate(j, with_pulls);
    if (block != NULL && s->fixed_mean.values != NULL) {
        load(s->bn_mean, s->fixed_mean, 0, s->channels);
        load(s->bn_var, s->fixed_var, 0, s->channels);
    }
    return block;
}

/* (site..., x, y, bn_mean, bn_var): the forward pass; the site's mean and var (N, C) are written too. */
static PyObject *normalise(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Job job;
    Buffers buffers;
    Table x, y, bn_mean, bn_var;
    const int kind = read_job(args, count, SITE_ARGUMENTS + 12, &job, &buffers, WRITTEN);
    if (kind < 0)
        return NULL;
    const Py_ssize_t all = job.site.samples * job.site.channels * job.site.positions, each = job.site.channels;
    const int table_kind = job.site.mean.kind, batch = WRITTEN | OPTIONAL;
    args += SITE_ARGUMENTS;
    if (read_buffer(&buffers, args, "x", kind, all, 0, &x) < 0 ||
        read_buffer(&buffers, args + 3, "y", kind, all, WRITTEN, &y) < 0 ||
        read_buffer(&buffers, args + 6, "bn_mean", table_kind, each, batch, &bn_mean) < 0 ||
        read_buffer(&buffers, args + 9, "bn_var", table_kind, each, batch, &bn_var) < 0 || check_overlap(&buffers) < 0)
        return NULL;
    double *block;
    Py_BEGIN_ALLOW_THREADS
    block = prepare(&job, 0);
    if (block != NULL) {
        job.x = x.values;
        job.y = y.values;
        forward(&job);
        store(bn_mean, job.site.bn_mean, each);
        store(bn_var, job.site.bn_var, each);
        free(block);
    }
    Py_END_ALLOW_THREADS
    if (block == NULL)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* (site..., dy, x, dx, mean_point, var_point, weight, bias): the backward pass; gradients of gates are of the kind of
 * these, those of weight and bias of that of the tables. */
static PyObject *differentiate(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Job job;
    Buffers buffers;
    Table dy, x, dx, mean_point, var_point, weight, bias;
    const int kind = read_job(args, count, SITE_ARGUMENTS + 21, &job, &buffers, 0);
    if (kind < 0)
        return NULL;
    const Py_ssize_t all = job.site.samples * job.site.channels * job.site.positions, each = job.site.channels;
    const Gates *gates = &job.gates;
    const int table_kind = job.site.mean.kind, found = WRITTEN | OPTIONAL;
    args += SITE_ARGUMENTS;
    if (read_buffer(&buffers, args, "dy", kind, all, 0, &dy) < 0 ||
        read_buffer(&buffers, args + 3, "x", kind, all, 0, &x) < 0 ||
        read_buffer(&buffers, args + 6, "gradient of x", kind, all, found, &dx) < 0 ||
        read_buffer(&buffers, args + 9, "gradient of mean_weight", gates->mean.kind, gates->count, found, &mean_point) < 0 ||
        read_buffer(&buffers, args + 12, "gradient of var_weight", gates->var.kind, gates->count, found, &var_point) < 0 ||
        read_buffer(&buffers, args + 15, "gradient of weight", table_kind, each, found, &weight) < 0 ||
        read_buffer(&buffers, args + 18, "gradient of bias", table_kind, each, found, &bias) < 0 ||
        check_overlap(&buffers) < 0)
        return NULL;
    double *block;
    Py_BEGIN_ALLOW_THREADS
    block = prepare(&job, 1);
    if (block != NULL) {
        const Site *s = &job.site;
        job.dy = dy.values;
        job.x = x.values;
        job.y = dx.values;
        backward(&job);
        write_gate(gates, s->means, job.pulls.means, mean_point);
        write_gate(gates, s->variances, job.pulls.variances, var_point);
        store(weight, job.pulls.weight, each);
        store(bias, job.pulls.bias, each);
        free(block);
    }
    Py_END_ALLOW_THREADS
    if (block == NULL)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* (channels, momentum, factor, mean, var, running_mean, running_var, address and length of the count): running statistics
 * moved towards mean and factor var, and the count of batches, if there is one, by one. As BN moves them, so that an
 * infinite one stays infinite: the difference of two infinities would be none. */
static PyObject *record(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 17) {
        PyErr_Format(PyExc_TypeError, "expected 17 arguments, got %zd", count);
        return NULL;
    }
    const Py_ssize_t channels = PyLong_AsSsize_t(args[0]);
    const double momentum = PyFloat_AsDouble(args[1]), factor = PyFloat_AsDouble(args[2]), rest = 1 - momentum;
    int64_t *batches = PyLong_AsVoidPtr(args[15]);
    const Py_ssize_t counts = PyLong_AsSsize_t(args[16]);
    Buffers buffers = {.count = 0};
    Table mean, var, running_mean, running_var;
    if (batches != NULL)
        buffers.all[buffers.count++] = (Buffer){"num_batches_tracked", {batches, DOUBLE}, 1, WRITTEN};
    if (PyErr_Occurred() ||
        read_buffer(&buffers, args + 3, "mean of the batch", ANY_KIND, channels, 0, &mean) < 0 ||
        read_buffer(&buffers, args + 6, "variance of the batch", ANY_KIND, channels, 0, &var) < 0 ||
        read_buffer(&buffers, args + 9, "running_mean", ANY_KIND, channels, WRITTEN, &running_mean) < 0 ||
        read_buffer(&buffers, args + 12, "running_var", ANY_KIND, channels, WRITTEN, &running_var) < 0 ||
        check_overlap(&buffers) < 0)
        return NULL;
    if (batches != NULL && counts != 1) {
        PyErr_Format(PyExc_ValueError, "num_batches_tracked should contain 1 element not %zd", counts);
        return NULL;
    }
    for (Py_ssize_t c = 0; c < channels; c++) {
        put(running_mean, c, rest * get(running_mean, c) + momentum * get(mean, c));
        put(running_var, c, rest * get(running_var, c) + momentum * (factor * get(var, c)));
    }
    if (batches != NULL)
        ++*batches;
    Py_RETURN_NONE;
}

/* (GOMP_parallel, omp_get_thread_num, omp_get_num_threads): the entry points, as addresses. */
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

#define METHOD(function) {#function, (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD(normalise), METHOD(differentiate), METHOD(record), METHOD(use_threads), {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_compiled", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__compiled(void) {
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0)
        Py_CLEAR(made);
    return made;
}
