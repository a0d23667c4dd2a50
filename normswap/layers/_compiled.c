/* Switchable Normalization on CPU in one call forward and one backward: float, double, bfloat16 and half, contiguous or
 * channels_last, on as many threads as torch has.
 *
 * Optional: where no compiler was at hand when the package was installed, numpy and torch do the same in some hundred.
 * Tables of (N, C) are float, or double where x is; all algebra on them is done in double. Addresses come from torch
 * tensors that the caller keeps alive and has checked; 0 stands for one that is not there. Equations: tables.py.
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

#include "_numbers.h"

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
#include "_kinds.h"

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
#include "_kinds.h"
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

#include "_threads.h"
#include "_gates.h"
#include "_algebra.h"
#include "_layer.h"

/* What both functions are given first, in this order; a pair is the address of a table and its kind. */
enum { SITE_ARGUMENTS = 21 };

static Table read_table(PyObject *const *pair) {
    return (Table){PyLong_AsVoidPtr(pair[0]), (int)PyLong_AsLong(pair[1])};
}

static int read_job(PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted, Job *j) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, count);
        return -1;
    }
    memset(j, 0, sizeof *j);
    Site *s = &j->site;
    const long kind = PyLong_AsLong(args[0]);
    const int table_kind = kind == DOUBLE ? DOUBLE : FLOAT;
    s->samples = PyLong_AsSsize_t(args[1]);
    s->channels = PyLong_AsSsize_t(args[2]);
    s->positions = PyLong_AsSsize_t(args[3]);
    j->by_channel = PyObject_IsTrue(args[4]) || s->positions == 1;
    j->threads = PyLong_AsSsize_t(args[5]);
    Table *tables[] = {&s->mean, &s->var, &s->fixed_mean, &s->fixed_var};
    for (int i = 0; i < 4; i++)
        *tables[i] = (Table){PyLong_AsVoidPtr(args[6 + i]), table_kind};
    s->weight = read_table(args + 10);
    s->bias = read_table(args + 12);
    j->gates.mean = read_table(args + 14);
    j->gates.var = read_table(args + 16);
    j->gates.softmax = PyObject_IsTrue(args[18]);
    const long order = PyLong_AsLong(args[19]);
    for (int branch = 0; branch < BRANCHES; branch++)
        j->gates.count += (j->gates.place[branch] = (int)(order >> 2 * branch & 3) - 1) >= 0;
    s->eps = PyFloat_AsDouble(args[20]);
    if (PyErr_Occurred())
        return -1;
    if (kind < 0 || kind >= KINDS || s->samples < 1 || s->channels < 1 || s->positions < 1) {
        PyErr_SetString(PyExc_ValueError, "expected a kind of number and a shape without zeros");
        return -1;
    }
    j->passes = widest((int)kind);
    j->sums_of_rows = s->positions < WIDE ? PASSES[kind] : j->passes;
    return 0;
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

static int read_addresses(PyObject *const *args, int count, void **out) {
    for (int i = 0; i < count; i++)
        out[i] = PyLong_AsVoidPtr(args[i]);
    return PyErr_Occurred() ? -1 : 0;
}

/* (site..., x, y, bn_mean, bn_var): the forward pass; the site's mean and var (N, C) are written too. */
static PyObject *normalise(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Job job;
    void *out[4];
    if (read_job(args, count, SITE_ARGUMENTS + 4, &job) < 0 || read_addresses(args + SITE_ARGUMENTS, 4, out) < 0)
        return NULL;
    double *block;
    Py_BEGIN_ALLOW_THREADS
    block = prepare(&job, 0);
    if (block != NULL) {
        job.x = out[0];
        job.y = out[1];
        forward(&job);
        store((Table){out[2], job.site.mean.kind}, job.site.bn_mean, job.site.channels);
        store((Table){out[3], job.site.mean.kind}, job.site.bn_var, job.site.channels);
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
    void *out[7];
    if (read_job(args, count, SITE_ARGUMENTS + 7, &job) < 0 || read_addresses(args + SITE_ARGUMENTS, 7, out) < 0)
        return NULL;
    double *block;
    Py_BEGIN_ALLOW_THREADS
    block = prepare(&job, 1);
    if (block != NULL) {
        const Site *s = &job.site;
        job.dy = out[0];
        job.x = out[1];
        job.y = out[2];
        backward(&job);
        write_gate(&job.gates, s->means, job.pulls.means, (Table){out[3], job.gates.mean.kind});
        write_gate(&job.gates, s->variances, job.pulls.variances, (Table){out[4], job.gates.var.kind});
        store((Table){out[5], s->mean.kind}, job.pulls.weight, s->channels);
        store((Table){out[6], s->mean.kind}, job.pulls.bias, s->channels);
        free(block);
    }
    Py_END_ALLOW_THREADS
    if (block == NULL)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* (channels, momentum, factor, kind of the new ones, mean, var, running_mean, kind, running_var, kind, count): running
 * statistics moved towards mean and factor var, and the count of batches, if there is one, by one. */
static PyObject *record(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 11) {
        PyErr_Format(PyExc_TypeError, "expected 11 arguments, got %zd", count);
        return NULL;
    }
    const Py_ssize_t channels = PyLong_AsSsize_t(args[0]);
    const double momentum = PyFloat_AsDouble(args[1]), factor = PyFloat_AsDouble(args[2]);
    const int kind = (int)PyLong_AsLong(args[3]);
    const Table mean = {PyLong_AsVoidPtr(args[4]), kind}, var = {PyLong_AsVoidPtr(args[5]), kind};
    const Table running_mean = read_table(args + 6), running_var = read_table(args + 8);
    int64_t *batches = PyLong_AsVoidPtr(args[10]);
    if (PyErr_Occurred())
        return NULL;
    for (Py_ssize_t c = 0; c < channels; c++) {
        const double old_mean = get(running_mean, c), old_var = get(running_var, c);
        put(running_mean, c, old_mean + momentum * (get(mean, c) - old_mean));
        put(running_var, c, old_var + momentum * (factor * get(var, c) - old_var));
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
    if (read_addresses(args, 3, entry) < 0)
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

PyMODINIT_FUNC PyInit__compiled(void) { return PyModule_Create(&module); }
