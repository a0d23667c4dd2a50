/* What a caller says of its memory, compared with what will be read and written, before anything is.
 *
 * Each buffer comes as three numbers: its address, its kind and how many numbers it has; -1 of one that is not there. The caller has laid them out one after the other.
 */
enum { OPTIONAL = 1, WRITTEN = 2, ANY_KIND = -1, MOST_BUFFERS = 16 };

typedef struct {
    const char *name;
    Table table;
    Py_ssize_t count;
    int written;
} Buffer;

typedef struct {
    Buffer all[MOST_BUFFERS];
    int count;
} Buffers;

static size_t size_of(int kind) { return kind == DOUBLE ? 8 : kind == FLOAT ? 4 : 2; }

/* Read a buffer and compare it with what is wanted of it; without a table where it is not there. */
static int read_buffer(Buffers *buffers, PyObject *const *args, const char *name, int kind, Py_ssize_t wanted, int options,
                       Table *out) {
    Buffer buffer = {name, {PyLong_AsVoidPtr(args[0]), (int)PyLong_AsLong(args[1])}, PyLong_AsSsize_t(args[2]), 0};
    if (PyErr_Occurred())
        return -1;
    *out = (Table){NULL, kind == ANY_KIND ? FLOAT : kind};
    if (buffer.count == -1 && options & OPTIONAL)
        return 0;
    if (buffer.table.kind < 0 || buffer.table.kind >= KINDS || (kind != ANY_KIND && buffer.table.kind != kind)) {
        PyErr_Format(PyExc_ValueError, "%s: expected another kind of number than %d", name, buffer.table.kind);
        return -1;
    }
    if (buffer.count != wanted) {
        PyErr_Format(PyExc_ValueError, "%s should contain %zd elements not %zd", name, wanted, buffer.count);
        return -1;
    }
    if (buffer.table.values == NULL) {
        PyErr_Format(PyExc_ValueError, "%s has no memory for its %zd elements", name, buffer.count);
        return -1;
    }
    buffer.written = options & WRITTEN;
    buffers->all[buffers->count++] = buffer;
    *out = buffer.table;
    return 0;
}

/* Nothing that is written may share memory with anything else. */
static int check_overlap(const Buffers *buffers) {
    for (int i = 0; i < buffers->count; i++) {
        const Buffer *a = &buffers->all[i];
        const uintptr_t begin = (uintptr_t)a->table.values, end = begin + (size_t)a->count * size_of(a->table.kind);
        for (int k = 0; a->written && k < buffers->count; k++) {
            const Buffer *b = &buffers->all[k];
            const uintptr_t other = (uintptr_t)b->table.values;
            if (k != i && other < end && begin < other + (size_t)b->count * size_of(b->table.kind)) {
                PyErr_Format(PyExc_ValueError, "%s and %s share memory", a->name, b->name);
                return -1;
            }
        }
    }
    return 0;
}

/* The product of two counts, neither of which is negative; -1 where it does not fit. */
static Py_ssize_t product(Py_ssize_t a, Py_ssize_t b) {
    return a < 0 || b < 0 || (b != 0 && a > PY_SSIZE_T_MAX / b) ? -1 : a * b;
}
