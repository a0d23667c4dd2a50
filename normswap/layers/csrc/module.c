/* Switchable Normalization on CPU: one call for the forward pass, one for the backward pass.
 *
 * Activations are float, double, bfloat16 or half, contiguous or channels_last. Tables (N, C) are float, or double if
 * the activation is double; arithmetic on tables is double. The caller allocates all tensors and keeps them alive; the
 * functions check every size before they access memory. Equations: backends/moment_algebra.py.
 *
 * The extension is optional: without a compiler at installation, NumPy and torch compute the same.
 */
#include "platform.h"

#include "dtypes.h"
#include "job.h"

#include "arguments.h"
#include "gates.h"

/* Version of the functions below. backends/cpu.py ignores an extension with another version. */
enum { INTERFACE = 5 };

/* --- arguments of the passes --------------------------------------------------------------------------------- */

/* Arguments of both passes, then those of the forward pass, then those of the backward pass. Shapes: x, y, dy, dx
 * (N, C, *spatial); mean, var (N, C); mean_weight, var_weight and their gradients (K,); kept_constants (2, C): a copy
 * of those of `bn`; all others (C,). */
typedef struct {
    Py_ssize_t dtype, samples, channels, positions, channels_last, threads, softmax, branch_order, num_groups;
    double eps;
    Buffer x, mean, var, constant_mean, constant_var, weight, bias, mean_weight, var_weight;
    Buffer ln_mean_shift, ln_var_scale, in_var_scale;
    Buffer y, batch_mean, batch_var, kept_constants;
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
    FIELD(BUFFER, kept_constants),
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

/* Check the buffers of both passes. `moments` is WRITTEN in the forward pass, which writes mean and var; in the
 * backward pass it is OPTIONAL. */
static int check_layer(const LayerArguments *a, const Gates *gates, CheckedBuffers *checked, int moments) {
    const Py_ssize_t entries = a->samples * a->channels, channels = a->channels;
    const int table = a->dtype == DOUBLE ? DOUBLE : FLOAT;
    if (check_buffer(checked, "x", &a->x, (int)a->dtype, entries * a->positions, 0) < 0 ||
        check_buffer(checked, "mean", &a->mean, table, entries, moments) < 0 ||
        check_buffer(checked, "var", &a->var, table, entries, moments) < 0 ||
        check_buffer(checked, "constant_mean", &a->constant_mean, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "constant_var", &a->constant_var, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "weight", &a->weight, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "bias", &a->bias, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "ln_mean_shift", &a->ln_mean_shift, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "ln_var_scale", &a->ln_var_scale, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "in_var_scale", &a->in_var_scale, ANY_FLOAT, channels, OPTIONAL) < 0 ||
        check_buffer(checked, "mean_weight", &a->mean_weight, ANY_FLOAT, gates->count, 0) < 0 ||
        check_buffer(checked, "var_weight", &a->var_weight, ANY_FLOAT, gates->count, 0) < 0)
        return -1;
    if ((a->mean.count < 0) != (a->var.count < 0)) {
        PyErr_SetString(PyExc_ValueError, "expected mean and var together");
        return -1;
    }
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
        check_buffer(checked, "batch_var", &a->batch_var, table, a->channels, batch) < 0 ||
        check_buffer(checked, "kept_constants", &a->kept_constants, table, 2 * a->channels, batch) < 0)
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
    s->groups = a->num_groups;
    s->eps = a->eps;
    s->mean = a->mean.table;
    s->var = a->var.table;
    s->constant = a->constant_mean.table.values != NULL;
    j->gates.softmax = a->softmax != 0;
    j->gates.mean = a->mean_weight.table;
    j->gates.var = a->var_weight.table;
    j->dtype = (int)a->dtype;
    j->channels_last = a->channels_last || a->positions == 1;
    j->threads = a->threads;
    j->x = a->x.table.values;
    return 0;
}

/* --- engines ------------------------------------------------------------------------------------------------- */

Threads normswap_threads;

/* From the narrowest vectors to the widest. */
static const Engine *const ENGINES[] = {
    &normswap_baseline,
#if X86_ENGINES
    &normswap_avx2,
    &normswap_avx512,
#endif
};

enum { ENGINE_COUNT = sizeof ENGINES / sizeof *ENGINES, NARROW = 16 };

static int widest = 0;

/* The engine for a job. Rows or columns of few values leave most of a wide vector unused. */
static const Engine *engine_for(const Job *j) {
    const Py_ssize_t length = j->channels_last ? j->site.channels : j->site.positions;
    return ENGINES[widest == ENGINE_COUNT - 1 && widest > 0 && length < NARROW ? widest - 1 : widest];
}

/* --- the functions of the module ----------------------------------------------------------------------------- */

static Py_ssize_t minimum(Py_ssize_t a, Py_ssize_t b) { return a < b ? a : b; }

static Py_ssize_t maximum(Py_ssize_t a, Py_ssize_t b) { return a > b ? a : b; }

/* Load numbers (C,), or fill them with the identity if there are none. */
static void load_or(const Site *s, double *out, Table numbers, double identity) {
    if (numbers.values != NULL)
        load(out, numbers, 0, s->channels);
    for (Py_ssize_t c = 0; numbers.values == NULL && c < s->channels; c++)
        out[c] = identity;
}

static int is_on_bn(const double *weights) { return weights[IN] == 0 && weights[LN] == 0 && weights[BN] == 1; }

/* Allocate one block for all tables of a job; NULL if there is no memory. Tables that sums are added to start at 0. */
static double *allocate(Job *j, int is_backward) {
    Site *s = &j->site;
    Terms *t = &j->terms;
    const size_t n = (size_t)s->samples, c = (size_t)s->channels, rows = n * (size_t)s->groups;
    const size_t partial = j->channels_last && j->segments > 1 ? n * (size_t)j->segments * 4 * c : 0;
    const size_t mixed = s->fixed ? c : n * c, terms = is_backward ? n * c : 0, own = is_backward ? c : 0;
    const size_t term_rows = is_backward ? rows : 0, moments = is_backward && !j->has_moments ? n * c : 0;
    struct {
        double **table;
        size_t size;
    } tables[] = {
        {&s->zeros, c},        {&t->p_bn, own},        {&t->q_bn, own},
        {&t->weight, own},     {&t->bias, own},        {&s->bn_mean, c},
        {&s->bn_var, c},       {&s->weight, c},        {&s->bias, c},
        {&s->ln_shift, c},     {&s->ln_scale, c},      {&s->in_scale, c},
        {&s->ln_mean, rows},   {&s->ln_var, rows},     {&s->centre, mixed},
        {&s->rstd, mixed},     {&t->p, terms},         {&t->q, terms},
        {&t->p_ln, term_rows}, {&t->slope_ln, term_rows}, {&t->gates, 2 * BRANCHES * term_rows},
        {(double **)&s->mean.values, moments}, {(double **)&s->var.values, moments},
        {&j->partial, partial}, {&j->scratch, (size_t)j->threads * SCRATCH * c},
    };
    const size_t count = sizeof tables / sizeof *tables, zeroed = c + 4 * own;
    size_t total = 0;
    for (size_t i = 0; i < count; i++)
        total += tables[i].size;
    double *block = malloc(total * sizeof(double)), *next = block;
    if (block == NULL)
        return NULL;
    for (size_t i = 0; i < count; next += tables[i].size, i++)
        if (tables[i].size > 0)
            *tables[i].table = next;
    memset(block, 0, zeroed * sizeof(double));
    return block;
}

/* Read the gates, divide the work, allocate memory and read the numbers of each channel. */
static double *prepare_job(const LayerArguments *a, Job *j, int is_backward) {
    Site *s = &j->site;
    const Py_ssize_t sample = s->channels * s->positions;
    j->segments = maximum(1, minimum(minimum(sample / SEGMENT, SEGMENTS / s->samples), s->positions));
    j->threads = maximum(1, minimum(j->threads, s->samples * sample / GRAIN));
    read_gate(&j->gates, j->gates.mean, s->means);
    read_gate(&j->gates, j->gates.var, s->variances);
    s->fixed = s->constant && is_on_bn(s->means) && is_on_bn(s->variances);
    if (is_backward && !j->has_moments)
        s->mean.dtype = s->var.dtype = a->dtype == DOUBLE ? DOUBLE : FLOAT;
    double *block = allocate(j, is_backward);
    if (block == NULL)
        return NULL;
    load_or(s, s->bn_mean, a->constant_mean.table, 0);
    load_or(s, s->bn_var, a->constant_var.table, 1);
    load_or(s, s->weight, a->weight.table, 1);
    load_or(s, s->bias, a->bias.table, 0);
    load_or(s, s->ln_shift, a->ln_mean_shift.table, 0);
    load_or(s, s->ln_scale, a->ln_var_scale.table, 1);
    load_or(s, s->in_scale, a->in_var_scale.table, 1);
    return block;
}

/* Write the moments of `bn`, (2, C). */
static void keep_constants(const Site *s, Table out) {
    for (Py_ssize_t c = 0; out.values != NULL && c < s->channels; c++) {
        put(out, c, s->bn_mean[c]);
        put(out, s->channels + c, s->bn_var[c]);
    }
}

/* Run the forward pass; see LayerArguments. Writes y and, unless None, batch_mean and batch_var; returns whether it
 * wrote mean and var, which a layer with all weight on constants does not need. */
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
    block = prepare_job(&a, &job, 0);
    if (block != NULL) {
        engine_for(&job)->forward(&job);
        store_values(a.batch_mean.table, job.site.bn_mean, a.channels);
        store_values(a.batch_var.table, job.site.bn_var, a.channels);
        keep_constants(&job.site, a.kept_constants.table);
        free(block);
    }
    Py_END_ALLOW_THREADS
    if (block == NULL)
        return PyErr_NoMemory();
    return PyBool_FromLong(!job.site.fixed);
}

/* Run the backward pass; see LayerArguments. Writes every gradient that is not None. Without mean and var, it computes
 * those of x if it needs them. */
static PyObject *backward_pass(PyObject *self, PyObject *arguments) {
    LayerArguments a = {0};
    Job job;
    CheckedBuffers checked;
    if (read_arguments(&backward_signature, arguments, &a) < 0 || read_job(&a, &job, &checked, OPTIONAL) < 0 ||
        check_backward(&a, &job.gates, &checked) < 0)
        return NULL;
    double *block;
    Py_BEGIN_ALLOW_THREADS
    job.dy = a.dy.table.values;
    job.y = a.dx.table.values;
    job.has_moments = a.mean.table.values != NULL;
    job.needs_gates = a.mean_weight_gradient.table.values != NULL || a.var_weight_gradient.table.values != NULL;
    block = prepare_job(&a, &job, 1);
    if (block != NULL) {
        const Site *s = &job.site;
        engine_for(&job)->backward(&job);
        write_gate(&job.gates, s->means, job.terms.means, a.mean_weight_gradient.table);
        write_gate(&job.gates, s->variances, job.terms.variances, a.var_weight_gradient.table);
        store_values(a.weight_gradient.table, job.terms.weight, a.channels);
        store_values(a.bias_gradient.table, job.terms.bias, a.channels);
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
    memcpy(&normswap_threads.parallel, &entry[0], sizeof entry[0]);
    memcpy(&normswap_threads.thread_number, &entry[1], sizeof entry[1]);
    memcpy(&normswap_threads.team_size, &entry[2], sizeof entry[2]);
    Py_RETURN_NONE;
}

/* The rounding error that a point of this dtype has. */
static double tolerance(int dtype) {
    return dtype == DOUBLE ? 0x1p-52 : dtype == BFLOAT16 ? 0x1p-7 : dtype == HALF ? 0x1p-10 : 0x1p-23;
}

static int is_on_simplex(Table point, Py_ssize_t count) {
    double sum = 0, minimum = 0;
    for (Py_ssize_t k = 0; k < count; k++) {
        sum += get(point, k);
        minimum = fmin(minimum, get(point, k));
    }
    return minimum >= 0 && fabs(sum - 1) <= tolerance(point.dtype);
}

/* Return bits: 1 if all weight is on `bn`, 2 and 4 if the points of the means and of the variances are on the simplex.
 * Arguments: the two gate parameters, whether they are logits, the order of the branches. */
static PyObject *read_gates(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Gates gates = {0};
    Buffer buffers[2];
    double means[BRANCHES], variances[BRANCHES];
    if (count != 4) {
        PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
        return NULL;
    }
    read_buffer("mean_weight", args[0], &buffers[0]);
    if (!PyErr_Occurred())
        read_buffer("var_weight", args[1], &buffers[1]);
    gates.softmax = PyErr_Occurred() ? 0 : PyObject_IsTrue(args[2]);
    const Py_ssize_t order = PyErr_Occurred() ? 0 : PyLong_AsSsize_t(args[3]);
    CheckedBuffers checked = {.count = 0};
    if (PyErr_Occurred() || read_order(order, &gates) < 0 ||
        check_buffer(&checked, "mean_weight", &buffers[0], ANY_FLOAT, gates.count, 0) < 0 ||
        check_buffer(&checked, "var_weight", &buffers[1], ANY_FLOAT, gates.count, 0) < 0)
        return NULL;
    read_gate(&gates, buffers[0].table, means);
    read_gate(&gates, buffers[1].table, variances);
    return PyLong_FromLong((is_on_bn(means) && is_on_bn(variances) ? 1 : 0) |
                           (is_on_simplex(buffers[0].table, gates.count) ? 2 : 0) |
                           (is_on_simplex(buffers[1].table, gates.count) ? 4 : 0));
}

/* Return the names of the engines that this processor can run, from the narrowest to the widest vectors. */
static PyObject *list_engines(PyObject *self, PyObject *unused) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < ENGINE_COUNT; i++) {
        PyObject *name = ENGINES[i]->is_available() ? PyUnicode_FromString(ENGINES[i]->name) : NULL;
        if (name != NULL ? PyList_Append(names, name) < 0 : PyErr_Occurred() != NULL)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* Use the engine of this name. */
static PyObject *use_engine(PyObject *self, PyObject *name) {
    for (int i = 0; i < ENGINE_COUNT; i++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, ENGINES[i]->name) == 0 &&
            ENGINES[i]->is_available()) {
            widest = i;
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "expected the name of an engine that this processor can run, got %R", name);
    return NULL;
}

#define METHOD(name, function, flags) {name, (PyCFunction)(void (*)(void))function, flags, NULL}

static PyMethodDef methods[] = {
    METHOD("forward", forward_pass, METH_O),
    METHOD("backward", backward_pass, METH_O),
    METHOD("update_running", update_running, METH_O),
    METHOD("use_threads", use_threads, METH_FASTCALL),
    METHOD("read_gates", read_gates, METH_FASTCALL),
    METHOD("list_engines", list_engines, METH_NOARGS),
    METHOD("use_engine", use_engine, METH_O),
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
