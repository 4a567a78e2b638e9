/* encode.c: the encoder over numpy arrays. Sizes are checked here; the arrays' meaning is quantize/encode/feedback.py's. */
#include "python/py.h"

#include <math.h>
#include <stdlib.h>

#include "encode/encode.h"

enum { MAX_SWEEPS = 8, N_ARRAYS = 4 };

typedef struct call {
    ds_sweep sweeps[MAX_SWEEPS];
    Py_buffer arrays[MAX_SWEEPS][N_ARRAYS];
    Py_buffer w, out;
    int n_sweeps;
} call;

/* One (all, carry, cov, tri, var). */
static bool take_sweep(call *c, PyObject *item, int n) {
    const size_t width = (size_t)n * DS_ENCODE_WIDTH * sizeof(float),
                 sizes[N_ARRAYS] = {(size_t)n * (size_t)n * sizeof(float), width, width, (size_t)n * sizeof(float)};
    PyObject *arrays[N_ARRAYS];
    Py_buffer *views = c->arrays[c->n_sweeps];
    int all;
    if (!PyArg_ParseTuple(item, "pOOOO", &all, &arrays[0], &arrays[1], &arrays[2], &arrays[3])) return false;
    for (int i = 0; i < N_ARRAYS; i++)
        if (!ds_py_buffer(arrays[i], sizes[i], false, &views[i])) return false;
    c->sweeps[c->n_sweeps++] = (ds_sweep){n, all, views[0].buf, views[1].buf, views[2].buf, views[3].buf};
    return true;
}

static void release(call *c) {
    for (int i = 0; i < MAX_SWEEPS; i++)
        for (int k = 0; k < N_ARRAYS; k++)
            if (c->arrays[i][k].obj) PyBuffer_Release(&c->arrays[i][k]);
    if (c->w.obj) PyBuffer_Release(&c->w);
    if (c->out.obj) PyBuffer_Release(&c->out);
    free(c);
}

/* The first of n values that is not finite; n where all are. */
static size_t first_not_finite(const float *x, size_t n) {
    size_t i = 0;
    while (i < n && isfinite(x[i])) i++;
    return i;
}

/* encode(GGUF type, w, n_rows, n, sweeps, rounds, polish, out) */
static PyObject *encode(PyObject *self, PyObject *args) {
    PyObject *w, *list, *out, *result = NULL;
    unsigned type;
    int n_rows, n;
    ds_effort effort;
    if (!PyArg_ParseTuple(args, "IOiiO!iiO", &type, &w, &n_rows, &n, &PyList_Type, &list, &effort.rounds,
                          &effort.polish, &out))
        return NULL;
    const ds_format format = ds_format_from_gguf(type);
    const Py_ssize_t n_sweeps = PyList_Size(list);
    if (format == DS_FORMAT_COUNT || !ds_encode_can(format))
        return PyErr_Format(PyExc_ValueError, "GGUF type %u cannot be encoded", type);
    if (n < 1 || n > 1 << 20 || n_rows < 0 || n % (int)ds_format_get(format)->block_elements)
        return PyErr_Format(PyExc_ValueError, "%d rows of %d values", n_rows, n);
    if (n_sweeps < 1 || n_sweeps > MAX_SWEEPS || effort.rounds < 1 || effort.polish < 0) {
        return PyErr_Format(PyExc_ValueError, "%zd sweeps of %d rounds and %d polishing passes", n_sweeps,
                            effort.rounds, effort.polish);
    }
    call *c = calloc(1, sizeof *c);
    if (!c) return PyErr_NoMemory();
    bool ok = ds_py_buffer(w, (size_t)n_rows * (size_t)n * sizeof(float), false, &c->w) &&
              ds_py_buffer(out, (size_t)n_rows * ds_row_bytes(format, n), true, &c->out);
    for (Py_ssize_t i = 0; i < n_sweeps && ok; i++) ok = take_sweep(c, PyList_GetItem(list, i), n);
    if (ok) {
        const ds_encode_rows rows = {.n_rows = n_rows, .w = c->w.buf, .out = c->out.buf};
        const size_t n_values = (size_t)n_rows * (size_t)n;
        size_t bad;
        Py_BEGIN_ALLOW_THREADS
        bad = first_not_finite(rows.w, n_values);
        if (bad == n_values) ok = n_rows == 0 || ds_encode(format, c->sweeps, c->n_sweeps, &effort, &rows);
        Py_END_ALLOW_THREADS
        if (bad < n_values) PyErr_Format(PyExc_ValueError, "value %zu is not finite", bad);
        else result = ok ? Py_NewRef(Py_None) : PyErr_NoMemory();
    }
    release(c);
    return result;
}

PyMethodDef ds_py_encode_methods[] = {
    {"encode", encode, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
