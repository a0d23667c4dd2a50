/* The algebra of normswap/layers/tables.py in one call each, on float or double tables of (N, C).
 *
 * Optional: where no compiler was at hand when the package was installed, numpy does the same in some fifty calls.
 * Everything is computed in double. Addresses come from torch tensors that the caller keeps alive and has checked;
 * 0 stands for one that is not there. Equations: tables.py.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>

typedef struct {
    int wide; /* double, else float */
    Py_ssize_t samples, channels;
    const void *mean, *var, *fixed_mean, *fixed_var, *weight, *bias;
    double means[3], variances[3], eps; /* shares of in, ln, bn */
} Site;

typedef struct {
    double *block, *ln_mean, *ln_var, *bn_mean, *bn_var;
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

/* Moments of ln and bn: mean of variances + variance of means. */
static int pool(const Site *s, Pools *p) {
    const Py_ssize_t n_all = s->samples, c_all = s->channels;
    p->block = calloc((size_t)(2 * (n_all + c_all)), sizeof(double));
    if (p->block == NULL)
        return -1;
    p->ln_mean = p->block;
    p->ln_var = p->ln_mean + n_all;
    p->bn_mean = p->ln_var + n_all;
    p->bn_var = p->bn_mean + c_all;
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

/* Read what every function is given first; return how many arguments that were. */
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

/* (site..., scale, shift, bn_mean, bn_var): scale and shift (N, C) of the forward pass, moments (C) of bn. */
static PyObject *scale_and_shift(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    void *out[4];
    if (read_site(args, count, SITE_ARGUMENTS + 4, &s) < 0)
        return NULL;
    for (int i = 0; i < 4; i++)
        out[i] = PyLong_AsVoidPtr(args[SITE_ARGUMENTS + i]);
    if (PyErr_Occurred())
        return NULL;
    if (pool(&s, &p) < 0)
        return PyErr_NoMemory();
    for (Py_ssize_t n = 0; n < s.samples; n++)
        for (Py_ssize_t c = 0; c < s.channels; c++) {
            double mean, rstd;
            mixed(&s, &p, n, c, &mean, &rstd);
            const double scale = s.weight ? rstd * get(s.weight, c, s.wide) : rstd;
            put(out[0], n * s.channels + c, s.wide, scale);
            put(out[1], n * s.channels + c, s.wide, (s.bias ? get(s.bias, c, s.wide) : 0) - mean * scale);
        }
    for (Py_ssize_t c = 0; c < s.channels && out[2] != NULL; c++) {
        put(out[2], c, s.wide, p.bn_mean[c]);
        put(out[3], c, s.wide, p.bn_var[c]);
    }
    free(p.block);
    Py_RETURN_NONE;
}

/* (site..., mean, rstd): the mixed mean and 1 / sqrt(var + eps), (N, C). */
static PyObject *mean_and_rstd(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    if (read_site(args, count, SITE_ARGUMENTS + 2, &s) < 0)
        return NULL;
    void *means = PyLong_AsVoidPtr(args[SITE_ARGUMENTS]), *rstds = PyLong_AsVoidPtr(args[SITE_ARGUMENTS + 1]);
    if (PyErr_Occurred())
        return NULL;
    if (pool(&s, &p) < 0)
        return PyErr_NoMemory();
    for (Py_ssize_t n = 0; n < s.samples; n++)
        for (Py_ssize_t c = 0; c < s.channels; c++) {
            double mean, rstd;
            mixed(&s, &p, n, c, &mean, &rstd);
            put(means, n * s.channels + c, s.wide, mean);
            put(rstds, n * s.channels + c, s.wide, rstd);
        }
    free(p.block);
    Py_RETURN_NONE;
}

/* (site..., positions, plain, scaled, scale, slope, shift, weight, bias): coefficients (N, C) of dx and gradients (C).
 *
 * plain and scaled (N, C) are the sums of dy and of dy xhat. Returns the gradients of the shares of means and of
 * variances, for in, ln and bn, those of means up to a common shift.
 */
static PyObject *backward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Site s;
    Pools p;
    void *table[7];
    if (read_site(args, count, SITE_ARGUMENTS + 8, &s) < 0)
        return NULL;
    const double positions = PyFloat_AsDouble(args[SITE_ARGUMENTS]);
    for (int i = 0; i < 7; i++)
        table[i] = PyLong_AsVoidPtr(args[SITE_ARGUMENTS + 1 + i]);
    if (PyErr_Occurred())
        return NULL;
    if (pool(&s, &p) < 0)
        return PyErr_NoMemory();
    const Py_ssize_t n_all = s.samples, c_all = s.channels;
    double *pulls = calloc((size_t)(2 * n_all * c_all + 2 * (n_all + c_all)), sizeof(double));
    if (pulls == NULL) {
        free(p.block);
        return PyErr_NoMemory();
    }
    double *p_in = pulls, *q_in = p_in + n_all * c_all, *p_ln = q_in + n_all * c_all, *q_ln = p_ln + n_all;
    double *p_bn = q_ln + n_all, *q_bn = p_bn + c_all, mean_ln = 0, mean_bn = 0, var_in = 0, var_ln = 0, var_bn = 0;
    for (Py_ssize_t c = 0; c < c_all; c++) {
        double weight = 0, bias = 0;
        for (Py_ssize_t n = 0; n < n_all; n++) {
            weight += get(table[1], n * c_all + c, s.wide);
            bias += get(table[0], n * c_all + c, s.wide);
        }
        put(table[5], c, s.wide, weight);
        put(table[6], c, s.wide, bias);
    }
    for (Py_ssize_t n = 0; n < n_all; n++)
        for (Py_ssize_t c = 0; c < c_all; c++) {
            const Py_ssize_t i = n * c_all + c;
            double mean, rstd;
            mixed(&s, &p, n, c, &mean, &rstd);
            const double scale = s.weight ? rstd * get(s.weight, c, s.wide) : rstd;
            const double pulled = -scale * get(table[0], i, s.wide) / positions;
            const double spread = -scale * rstd * get(table[1], i, s.wide) / positions;
            const double m = get(s.mean, i, s.wide);
            put(table[2], i, s.wide, scale);
            p_in[i] = pulled;
            q_in[i] = spread;
            p_ln[n] += pulled / (double)c_all;
            q_ln[n] += spread / (double)c_all;
            p_bn[c] += pulled / (double)n_all;
            q_bn[c] += spread / (double)n_all;
            mean_ln -= pulled * (m - p.ln_mean[n]);
            mean_bn -= pulled * (m - p.bn_mean[c]);
            var_in += spread * get(s.var, i, s.wide);
            var_ln += spread * p.ln_var[n];
            var_bn += spread * p.bn_var[c];
        }
    /* x does not move moments that are constants. */
    double means[3] = {s.means[0], s.means[1], s.fixed_mean ? 0 : s.means[2]};
    double variances[3] = {s.variances[0], s.variances[1], s.fixed_mean ? 0 : s.variances[2]};
    for (Py_ssize_t n = 0; n < n_all; n++)
        for (Py_ssize_t c = 0; c < c_all; c++) {
            const Py_ssize_t i = n * c_all + c;
            const double m = get(s.mean, i, s.wide);
            double shift = mix(means, p_in[i], p_ln[n], p_bn[c]);
            if (variances[1] != 0)
                shift += variances[1] * q_ln[n] * (m - p.ln_mean[n]);
            if (variances[2] != 0)
                shift += variances[2] * q_bn[c] * (m - p.bn_mean[c]);
            put(table[3], i, s.wide, mix(variances, q_in[i], q_ln[n], q_bn[c]));
            put(table[4], i, s.wide, shift);
        }
    free(pulls);
    free(p.block);
    const double half = positions / 2;
    return Py_BuildValue("((ddd)(ddd))", 0.0, positions * mean_ln, positions * mean_bn, half * var_in, half * var_ln,
                         half * var_bn);
}

static PyMethodDef methods[] = {
    {"scale_and_shift", (PyCFunction)(void (*)(void))scale_and_shift, METH_FASTCALL, NULL},
    {"mean_and_rstd", (PyCFunction)(void (*)(void))mean_and_rstd, METH_FASTCALL, NULL},
    {"backward", (PyCFunction)(void (*)(void))backward, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_tables", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__tables(void) { return PyModule_Create(&module); }
