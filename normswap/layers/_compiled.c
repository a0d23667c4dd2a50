/* The algebra of normswap/layers/tables.py in one call each, on float or double tables of (N, C), and for small
 * activations the passes around it in the same call.
 *
 * Optional: where no compiler was at hand when the package was installed, numpy and torch do the same in some hundred.
 * Everything is computed in double. Addresses come from torch tensors that the caller keeps alive and has checked;
 * 0 stands for one that is not there. Equations: tables.py.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int wide; /* double, else float */
    Py_ssize_t samples, channels;
    const void *mean, *var, *fixed_mean, *fixed_var, *weight, *bias;
    double means[3], variances[3], eps; /* shares of in, ln, bn */
} Site;

typedef struct {
    double *block, *ln_mean, *ln_var, *bn_mean, *bn_var, *scratch;
} Pools;

static inline double get(const void *table, Py_ssize_t i, int wide) {
    return wide ? ((const double *)table)[i] : (double)((const float *)table)[i];
}

static inline void put(void *table, Py_ssize_t i, int wide, double value) {
    if (wide)
        ((double *)table)[i] = value;
    else
        ((float *)table)[i] = (float)value;
}

/* Moments of ln and bn: mean of variances + variance of means. `extra` more numbers are allocated as scratch. */
static int pool(const Site *s, Pools *p, Py_ssize_t extra) {
    const Py_ssize_t n_all = s->samples, c_all = s->channels;
    p->block = malloc((size_t)(2 * (n_all + c_all) + extra) * sizeof(double));
    if (p->block == NULL)
        return -1;
    memset(p->block, 0, (size_t)(2 * (n_all + c_all)) * sizeof(double));
    p->ln_mean = p->block;
    p->ln_var = p->ln_mean + n_all;
    p->bn_mean = p->ln_var + n_all;
    p->bn_var = p->bn_mean + c_all;
    p->scratch = p->bn_var + c_all;
    for (Py_ssize_t n = 0; n < n_all; n++) {
        double sum = 0;
        for (Py_ssize_t c = 0; c < c_all; c++) {
            const double m = get(s->mean, n * c_all + c, s->wide);
            sum += m;
            p->bn_mean[c] += m;
        }
        p->ln_mean[n] = sum / (double)c_all;
    }
    for (Py_ssize_t c = 0; c < c_all; c++)
        p->bn_mean[c] = s->fixed_mean ? get(s->fixed_mean, c, s->wide) : p->bn_mean[c] / (double)n_all;
    for (Py_ssize_t n = 0; n < n_all; n++) {
        double sum = 0;
        for (Py_ssize_t c = 0; c < c_all; c++) {
            const double m = get(s->mean, n * c_all + c, s->wide), v = get(s->var, n * c_all + c, s->wide);
            const double by_sample = m - p->ln_mean[n], by_channel = m - p->bn_mean[c];
            sum += v + by_sample * by_sample;
            p->bn_var[c] += v + by_channel * by_channel;
        }
        p->ln_var[n] = sum / (double)c_all;
    }
    for (Py_ssize_t c = 0; c < c_all; c++)
        p->bn_var[c] = s->fixed_var ? get(s->fixed_var, c, s->wide) : p->bn_var[c] / (double)n_all;
    return 0;
}

/* A share of zero leaves out what it would multiply, which may be infinite. */
static inline double mix(const double *shares, double in, double ln, double bn) {
    double total = 0;
    if (shares[0] != 0)
        total += shares[0] * in;
    if (shares[1] != 0)
        total += shares[1] * ln;
    if (shares[2] != 0)
        total += shares[2] * bn;
    return total;
}

static inline void mixed(const Site *s, const Pools *p, Py_ssize_t n, Py_ssize_t c, double *mean, double *rstd) {
    const Py_ssize_t i = n * s->channels + c;
    *mean = mix(s->means, get(s->mean, i, s->wide), p->ln_mean[n], p->bn_mean[c]);
    *rstd = 1 / sqrt(mix(s->variances, get(s->var, i, s->wide), p->ln_var[n], p->bn_var[c]) + s->eps);
}

/* Read what every function is given first: so many arguments of the `wanted` ones. */
enum { SITE_ARGUMENTS = 16 };

static int read_site(PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted, Site *s) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, count);
        return -1;
    }
    s->wide = PyObject_IsTrue(args[0]);
    s->samples = PyLong_AsSsize_t(args[1]);
    s->channels = PyLong_AsSsize_t(args[2]);
    const void **tables[] = {&s->mean, &s->var, &s->fixed_mean, &s->fixed_var, &s->weight, &s->bias};
    for (int i = 0; i < 6; i++)
        *tables[i] = PyLong_AsVoidPtr(args[3 + i]);
    for (int i = 0; i < 3; i++) {
        s->means[i] = PyFloat_AsDouble(args[9 + i]);
        s->variances[i] = PyFloat_AsDouble(args[12 + i]);
    }
    s->eps = PyFloat_AsDouble(args[15]);
    return PyErr_Occurred() ? -1 : 0;
}

/* scale and shift (N, C) of the forward pass. */
static void forward_coefficients(const Site *s, const Pools *p, double *scale, double *shift) {
    for (Py_ssize_t n = 0; n < s->samples; n++)
        for (Py_ssize_t c = 0; c < s->channels; c++) {
            const Py_ssize_t i = n * s->channels + c;
            double mean, rstd;
            mixed(s, p, n, c, &mean, &rstd);
            scale[i] = s->weight ? rstd * get(s->weight, c, s->wide) : rstd;
            shift[i] = (s->bias ? get(s->bias, c, s->wide) : 0) - mean * scale[i];
        }
}

/* The mixed mean and 1 / sqrt(var + eps), (N, C). */
static void statistics(const Site *s, const Pools *p, double *means, double *rstds) {
    for (Py_ssize_t n = 0; n < s->samples; n++)
        for (Py_ssize_t c = 0; c < s->channels; c++)
            mixed(s, p, n, c, &means[n * s->channels + c], &rstds[n * s->channels + c]);
}

/* scale, slope and shift (N, C) of dx from the sums (N, C) of dy and of dy xhat; gradients of the shares of means (up to
 * a common shift) and of variances. `pulls` is scratch for 2 (N C + N + C). */
static void backward_coefficients(const Site *s, const Pools *p, double positions, const double *plain,
                                  const double *scaled, double *scale, double *slope, double *shift, double *pulls,
                                  double shares[6]) {
    const Py_ssize_t n_all = s->samples, c_all = s->channels;
    double *p_in = pulls, *q_in = p_in + n_all * c_all, *p_ln = q_in + n_all * c_all, *q_ln = p_ln + n_all;
    double *p_bn = q_ln + n_all, *q_bn = p_bn + c_all;
    double mean_ln = 0, mean_bn = 0, var_in = 0, var_ln = 0, var_bn = 0;
    for (Py_ssize_t i = 0; i < 2 * (n_all + c_all); i++)
        p_ln[i] = 0;
    for (Py_ssize_t n = 0; n < n_all; n++)
        for (Py_ssize_t c = 0; c < c_all; c++) {
            const Py_ssize_t i = n * c_all + c;
            double mean, rstd;
            mixed(s, p, n, c, &mean, &rstd);
            scale[i] = s->weight ? rstd * get(s->weight, c, s->wide) : rstd;
            const double pulled = -scale[i] * plain[i] / positions, spread = -scale[i] * rstd * scaled[i] / positions;
            const double m = get(s->mean, i, s->wide);
            p_in[i] = pulled;
            q_in[i] = spread;
            p_ln[n] += pulled / (double)c_all;
            q_ln[n] += spread / (double)c_all;
            p_bn[c] += pulled / (double)n_all;
            q_bn[c] += spread / (double)n_all;
            mean_ln -= pulled * (m - p->ln_mean[n]);
            mean_bn -= pulled * (m - p->bn_mean[c]);
            var_in += spread * get(s->var, i, s->wide);
            var_ln += spread * p->ln_var[n];
            var_bn += spread * p->bn_var[c];
        }
    /* x does not move moments that are constants. */
    const double means[3] = {s->means[0], s->means[1], s->fixed_mean ? 0 : s->means[2]};
    const double variances[3] = {s->variances[0], s->variances[1], s->fixed_mean ? 0 : s->variances[2]};
    for (Py_ssize_t n = 0; n < n_all; n++)
        for (Py_ssize_t c = 0; c < c_all; c++) {
            const Py_ssize_t i = n * c_all + c;
            const double m = get(s->mean, i, s->wide);
            slope[i] = mix(variances, q_in[i], q_ln[n], q_bn[c]);
            shift[i] = mix(means, p_in[i], p_ln[n], p_bn[c]);
            if (variances[1] != 0)
                shift[i] += variances[1] * q_ln[n] * (m - p->ln_mean[n]);
            if (variances[2] != 0)
                shift[i] += variances[2] * q_bn[c] * (m - p->bn_mean[c]);
        }
    const double half = positions / 2;
    const double found[6] = {0, positions * mean_ln, positions * mean_bn, half * var_in, half * var_ln, half * var_bn};
    for (int i = 0; i < 6; i++)
        shares[i] = found[i];
}

static void store(void *table, const double *values, Py_ssize_t count, int wide) {
    if (table != NULL)
        for (Py_ssize_t i = 0; i < count; i++)
            put(table, i, wide, values[i]);
}

static void load(double *values, const void *table, Py_ssize_t count, int wide) {
    for (Py_ssize_t i = 0; i < count; i++)
        values[i] = get(table, i, wide);
}

/* Sums over samples of a table (N, C), stored as (C). */
static void store_sums(void *out, const double *table, const Site *s) {
    if (out != NULL)
        for (Py_ssize_t c = 0; c < s->channels; c++) {
            double sum = 0;
            for (Py_ssize_t n = 0; n < s->samples; n++)
                sum += table[n * s->channels + c];
            put(out, c, s->wide, sum);
        }
}

static int read_pointers(PyObject *const *args, int count, void **out) {
    for (int i = 0; i < count; i++)
        out[i] = PyLong_AsVoidPtr(args[i]);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *share_gradients(const double g[6]) {
    return Py_BuildValue("((ddd)(ddd))", g[0], g[1], g[2], g[3], g[4], g[5]);
}

/* (site..., scale, shift, bn_mean, bn_var): writes them, (N, C) and (C). */
static PyObject *scale_and_shift(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    void *out[4];
    if (read_site(args, count, SITE_ARGUMENTS + 4, &s) < 0 || read_pointers(args + SITE_ARGUMENTS, 4, out) < 0)
        return NULL;
    const Py_ssize_t size = s.samples * s.channels;
    if (pool(&s, &p, 2 * size) < 0)
        return PyErr_NoMemory();
    forward_coefficients(&s, &p, p.scratch, p.scratch + size);
    store(out[0], p.scratch, size, s.wide);
    store(out[1], p.scratch + size, size, s.wide);
    store(out[2], p.bn_mean, s.channels, s.wide);
    store(out[3], p.bn_var, s.channels, s.wide);
    free(p.block);
    Py_RETURN_NONE;
}

/* (site..., mean, rstd): writes them, (N, C). */
static PyObject *mean_and_rstd(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    void *out[2];
    if (read_site(args, count, SITE_ARGUMENTS + 2, &s) < 0 || read_pointers(args + SITE_ARGUMENTS, 2, out) < 0)
        return NULL;
    const Py_ssize_t size = s.samples * s.channels;
    if (pool(&s, &p, 2 * size) < 0)
        return PyErr_NoMemory();
    statistics(&s, &p, p.scratch, p.scratch + size);
    store(out[0], p.scratch, size, s.wide);
    store(out[1], p.scratch + size, size, s.wide);
    free(p.block);
    Py_RETURN_NONE;
}

/* (site..., positions, plain, scaled, scale, slope, shift, weight, bias): from the sums (N, C) to the coefficients of dx
 * (N, C) and the gradients of weight and bias (C); returns those of the shares. */
static PyObject *pull(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    void *table[7];
    if (read_site(args, count, SITE_ARGUMENTS + 8, &s) < 0 || read_pointers(args + SITE_ARGUMENTS + 1, 7, table) < 0)
        return NULL;
    const double positions = PyFloat_AsDouble(args[SITE_ARGUMENTS]);
    const Py_ssize_t size = s.samples * s.channels;
    if (PyErr_Occurred())
        return NULL;
    if (pool(&s, &p, 7 * size + 2 * (s.samples + s.channels)) < 0)
        return PyErr_NoMemory();
    double shares[6], *plain = p.scratch, *scaled = plain + size, *scale = scaled + size, *slope = scale + size;
    double *shift = slope + size;
    load(plain, table[0], size, s.wide);
    load(scaled, table[1], size, s.wide);
    backward_coefficients(&s, &p, positions, plain, scaled, scale, slope, shift, shift + size, shares);
    store(table[2], scale, size, s.wide);
    store(table[3], slope, size, s.wide);
    store(table[4], shift, size, s.wide);
    store_sums(table[5], scaled, &s);
    store_sums(table[6], plain, &s);
    free(p.block);
    return share_gradients(shares);
}

/* Whole passes, for activations that fit into the cache. */

typedef struct {
    Py_ssize_t samples, channels, positions;
    int by_channel;
} Shape;

/* One version for any processor, one for those of today; the loader chooses. */
#if defined(__GNUC__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define CLONES
#endif

enum { BLOCK = 16 };
/* Beyond this ratio of the square around the first value to the variance, the difference of the two is not trusted. */
#define DOUBTFUL 1e4

#define T float
#define NAME(function) function##_float
#include "_passes.h"
#undef T
#undef NAME
#define T double
#define NAME(function) function##_double
#include "_passes.h"

#define AT(table, bytes) ((void *)((char *)(table) + (bytes)))
#define TYPED(function, wide, ...) ((wide) ? function##_double(__VA_ARGS__) : function##_float(__VA_ARGS__))

/* Bytes of one row of a table (N, C). */
static Py_ssize_t line_of(const Site *s) { return s->channels * (s->wide ? sizeof(double) : sizeof(float)); }

static int read_shape(PyObject *const *args, const Site *s, Shape *shape) {
    shape->samples = s->samples;
    shape->channels = s->channels;
    shape->positions = PyLong_AsSsize_t(args[0]);
    shape->by_channel = PyObject_IsTrue(args[1]);
    return PyErr_Occurred() ? -1 : 0;
}

/* (site..., positions, by_channel, x, y, bn_mean, bn_var): the forward pass; the site's mean and var (N, C) are written
 * first. */
static PyObject *normalise(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    Shape shape;
    void *table[4];
    if (read_site(args, count, SITE_ARGUMENTS + 6, &s) < 0 || read_shape(args + SITE_ARGUMENTS, &s, &shape) < 0 ||
        read_pointers(args + SITE_ARGUMENTS + 2, 4, table) < 0)
        return NULL;
    const Py_ssize_t size = s.samples * s.channels;
    const Py_ssize_t line = line_of(&s), row = line * shape.positions;
    double *scratch = malloc((size_t)(4 * s.channels) * sizeof(double));
    if (scratch == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t n = 0; n < s.samples; n++)
        TYPED(moments, s.wide, AT(table[0], n * row), shape, AT(s.mean, n * line), AT(s.var, n * line), scratch);
    Py_END_ALLOW_THREADS
    free(scratch);
    if (pool(&s, &p, 6 * size) < 0)
        return PyErr_NoMemory();
    double *scale = p.scratch, *shift = scale + size, *centre = shift + size;
    void *typed_scale = centre + size, *typed_shift = centre + 2 * size, *typed_centre = centre + 3 * size;
    statistics(&s, &p, centre, scale);
    /* x minus the rounded mean is exact where it matters; what the rounding left out goes into the shift. */
    store(typed_centre, centre, size, s.wide);
    for (Py_ssize_t i = 0; i < size; i++) {
        const Py_ssize_t c = i % s.channels;
        if (s.weight)
            scale[i] *= get(s.weight, c, s.wide);
        shift[i] = (get(typed_centre, i, s.wide) - centre[i]) * scale[i] + (s.bias ? get(s.bias, c, s.wide) : 0);
    }
    store(typed_scale, scale, size, s.wide);
    store(typed_shift, shift, size, s.wide);
    Py_BEGIN_ALLOW_THREADS
    /* From the last sample back: it is still in the cache. */
    for (Py_ssize_t n = s.samples - 1; n >= 0; n--)
        TYPED(affine, s.wide, AT(table[0], n * row), AT(table[1], n * row), shape, AT(typed_scale, n * line),
              AT(typed_shift, n * line), AT(typed_centre, n * line));
    Py_END_ALLOW_THREADS
    store(table[2], p.bn_mean, s.channels, s.wide);
    store(table[3], p.bn_var, s.channels, s.wide);
    free(p.block);
    Py_RETURN_NONE;
}

/* (site..., positions, by_channel, dy, x, dx, weight, bias): the backward pass; returns the gradients of the shares. */
static PyObject *differentiate(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    Shape shape;
    void *table[5];
    if (read_site(args, count, SITE_ARGUMENTS + 7, &s) < 0 || read_shape(args + SITE_ARGUMENTS, &s, &shape) < 0 ||
        read_pointers(args + SITE_ARGUMENTS + 2, 5, table) < 0)
        return NULL;
    const Py_ssize_t size = s.samples * s.channels;
    if (pool(&s, &p, 10 * size + 2 * s.samples + 3 * s.channels) < 0)
        return PyErr_NoMemory();
    double shares[6], *plain = p.scratch, *scaled = plain + size, *scale = scaled + size, *slope = scale + size;
    double *shift = slope + size, *typed = shift + size, *pulls = typed + 3 * size;
    statistics(&s, &p, scale, slope);
    const Py_ssize_t line = line_of(&s), row = line * shape.positions;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t n = 0; n < s.samples; n++)
        TYPED(sums, s.wide, AT(table[0], n * row), AT(table[1], n * row), shape, scale + n * s.channels,
              slope + n * s.channels, plain + n * s.channels, scaled + n * s.channels, pulls);
    backward_coefficients(&s, &p, (double)shape.positions, plain, scaled, scale, slope, shift, pulls, shares);
    if (table[2] != NULL) {
        void *coefficients[3] = {typed, typed + size, typed + 2 * size};
        store(coefficients[0], scale, size, s.wide);
        store(coefficients[1], slope, size, s.wide);
        store(coefficients[2], shift, size, s.wide);
        for (Py_ssize_t n = s.samples - 1; n >= 0; n--)
            TYPED(combine, s.wide, AT(table[0], n * row), AT(table[1], n * row), AT(table[2], n * row), shape,
                  AT(coefficients[0], n * line), AT(coefficients[1], n * line), AT(coefficients[2], n * line),
                  AT(s.mean, n * line));
    }
    Py_END_ALLOW_THREADS
    store_sums(table[3], scaled, &s);
    store_sums(table[4], plain, &s);
    free(p.block);
    return share_gradients(shares);
}

static PyMethodDef methods[] = {
    {"scale_and_shift", (PyCFunction)(void (*)(void))scale_and_shift, METH_FASTCALL, NULL},
    {"mean_and_rstd", (PyCFunction)(void (*)(void))mean_and_rstd, METH_FASTCALL, NULL},
    {"pull", (PyCFunction)(void (*)(void))pull, METH_FASTCALL, NULL},
    {"normalise", (PyCFunction)(void (*)(void))normalise, METH_FASTCALL, NULL},
    {"differentiate", (PyCFunction)(void (*)(void))differentiate, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_compiled", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__compiled(void) { return PyModule_Create(&module); }
