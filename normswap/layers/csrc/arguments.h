/* Arguments by name, and checks of every buffer before anything reads or writes its memory.
 *
 * Each function has a struct of arguments and a table that maps names to its fields. A caller passes a dict with all
 * names. A buffer is a tuple (address, dtype, number of elements), or None; the caller guarantees that its elements
 * are adjacent in memory.
 */
enum { OPTIONAL = 1, WRITTEN = 2 };
enum { ANY_FLOAT = -1, MAX_BUFFERS = 24, MAX_ARGUMENTS = 32 };

/* --- reading ------------------------------------------------------------------------------------------------- */

typedef struct {
    Table table;
    Py_ssize_t count; /* -1 for None */
} Buffer;

typedef enum { INTEGER, REAL, BUFFER } ArgumentType;

typedef struct {
    const char *name;
    ArgumentType type;
    size_t offset; /* of the field in the struct of arguments */
} Argument;

typedef struct {
    const Argument *arguments;
    Py_ssize_t count;
    PyObject *names[MAX_ARGUMENTS]; /* interned, in the order of `arguments` */
} Signature;

/* Create the names. Interned names have a stored hash and compare as pointers with those of the caller. */
static int intern_names(Signature *signature) {
    for (Py_ssize_t i = 0; i < signature->count; i++) {
        signature->names[i] = PyUnicode_InternFromString(signature->arguments[i].name);
        if (signature->names[i] == NULL)
            return -1;
    }
    return 0;
}

static void read_buffer(const char *name, PyObject *value, Buffer *buffer) {
    *buffer = (Buffer){{NULL, FLOAT}, -1};
    if (value == Py_None)
        return;
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 3) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tuple (address, dtype, number of elements) or None", name);
        return;
    }
    buffer->table.values = PyLong_AsVoidPtr(PyTuple_GET_ITEM(value, 0));
    buffer->table.dtype = (int)PyLong_AsLong(PyTuple_GET_ITEM(value, 1));
    buffer->count = PyLong_AsSsize_t(PyTuple_GET_ITEM(value, 2));
    if (!PyErr_Occurred() && buffer->count < 0)
        PyErr_Format(PyExc_ValueError, "%s: expected a number of elements of at least 0, got %zd", name, buffer->count);
}

static void read_argument(const Argument *argument, PyObject *value, void *out) {
    char *field = (char *)out + argument->offset;
    switch (argument->type) {
    case INTEGER:
        *(Py_ssize_t *)field = PyLong_AsSsize_t(value);
        break;
    case REAL:
        *(double *)field = PyFloat_AsDouble(value);
        break;
    case BUFFER:
        read_buffer(argument->name, value, (Buffer *)field);
        break;
    }
}

/* Fill the struct `out` from the dict `values`, which has exactly the names of the signature. */
static int read_arguments(const Signature *signature, PyObject *values, void *out) {
    if (!PyDict_Check(values) || PyDict_GET_SIZE(values) != signature->count) {
        PyErr_Format(PyExc_TypeError, "expected a dict of %zd arguments", signature->count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < signature->count; i++) {
        PyObject *value = PyDict_GetItemWithError(values, signature->names[i]);
        if (value == NULL && !PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "missing argument %R", signature->names[i]);
        if (value != NULL)
            read_argument(&signature->arguments[i], value, out);
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* --- checking ------------------------------------------------------------------------------------------------ */

/* A buffer that passed its checks. */
typedef struct {
    const char *name;
    Buffer buffer;
    int written;
} Checked;

typedef struct {
    Checked all[MAX_BUFFERS];
    int count;
} CheckedBuffers;

static size_t size_of(int dtype) { return dtype == DOUBLE || dtype == INT64 ? 8 : dtype == FLOAT ? 4 : 2; }

/* Check dtype, number of elements and address of a buffer. None passes if `options` has OPTIONAL. */
static int check_buffer(CheckedBuffers *checked, const char *name, const Buffer *buffer, int dtype, Py_ssize_t expected,
                        int options) {
    const int found = buffer->table.dtype;
    if (buffer->count == -1 && options & OPTIONAL)
        return 0;
    if (buffer->count == -1) {
        PyErr_Format(PyExc_ValueError, "%s: expected a buffer of %zd elements, got None", name, expected);
        return -1;
    }
    if (dtype == ANY_FLOAT ? found < 0 || found >= FLOAT_DTYPES : found != dtype) {
        PyErr_Format(PyExc_ValueError, "%s: unexpected dtype code %d", name, found);
        return -1;
    }
    if (buffer->count != expected) {
        PyErr_Format(PyExc_ValueError, "%s should contain %zd element%s not %zd", name, expected,
                     expected == 1 ? "" : "s", buffer->count);
        return -1;
    }
    if (buffer->table.values == NULL) {
        PyErr_Format(PyExc_ValueError, "%s has no memory for its %zd elements", name, expected);
        return -1;
    }
    checked->all[checked->count++] = (Checked){name, *buffer, options & WRITTEN};
    return 0;
}

/* A buffer that is written must not share memory with any other buffer. */
static int check_overlap(const CheckedBuffers *checked) {
    for (int i = 0; i < checked->count; i++) {
        const Checked *a = &checked->all[i];
        const uintptr_t begin = (uintptr_t)a->buffer.table.values;
        const uintptr_t end = begin + (size_t)a->buffer.count * size_of(a->buffer.table.dtype);
        for (int k = 0; a->written && k < checked->count; k++) {
            const Checked *b = &checked->all[k];
            const uintptr_t other = (uintptr_t)b->buffer.table.values;
            if (k != i && other < end && begin < other + (size_t)b->buffer.count * size_of(b->buffer.table.dtype)) {
                PyErr_Format(PyExc_ValueError, "%s and %s share memory", a->name, b->name);
                return -1;
            }
        }
    }
    return 0;
}

/* The product of two counts; -1 if one is negative or the product overflows. */
static Py_ssize_t product(Py_ssize_t a, Py_ssize_t b) {
    return a < 0 || b < 0 || (b != 0 && a > PY_SSIZE_T_MAX / b) ? -1 : a * b;
}
