/* block.c: one transformer block over numpy arrays, for calibration and for models larger than memory. */
#include "python/py.h"

#include <stdlib.h>
#include <string.h>

/* A block, the header it was configured from and the arrays it reads. */
typedef struct bound {
    ds_block *block;
    ds_gguf *header;
    Py_buffer header_bytes;
    ds_tensor *tensors;
    Py_buffer *views;
    int n;
} bound;

static void release(void *pointer) {
    bound *b = pointer;
    ds_block_close(b->block);
    ds_gguf_close(b->header);
    for (int i = 0; i < b->n; i++) {
        free((char *)b->tensors[i].name);
        PyBuffer_Release(&b->views[i]);
    }
    if (b->header_bytes.obj) PyBuffer_Release(&b->header_bytes);
    free(b->tensors);
    free(b->views);
    free(b);
}

/* One (name, GGUF type id, shape in ggml's order, buffer). */
static bool bind(bound *b, PyObject *record) {
    ds_tensor *t = &b->tensors[b->n];
    const char *name;
    PyObject *buffer;
    size_t values = 1;
    unsigned type;
    *t = (ds_tensor){.n_dims = 4};
    if (!PyArg_ParseTuple(record, "sI(LLLL)O", &name, &type, &t->ne[0], &t->ne[1], &t->ne[2], &t->ne[3], &buffer))
        return false;
    t->gguf_type = type;
    t->format = ds_format_from_gguf(type);
    if (t->format == DS_FORMAT_COUNT)
        return PyErr_Format(PyExc_ValueError, "tensor `%s` has type %u, which this build lacks", name, type), false;
    const ds_format_info *format = ds_format_get(t->format);
    if (t->ne[0] % (int64_t)format->block_elements) {
        return PyErr_Format(PyExc_ValueError, "tensor `%s`: a row of %lld values is not whole blocks of %s", name,
                            (long long)t->ne[0], format->name),
               false;
    }
    for (int i = 0; i < 4; i++) values *= (size_t)t->ne[i];
    t->n_bytes = values / format->block_elements * format->block_bytes;
    if (!ds_py_buffer(buffer, t->n_bytes, false, &b->views[b->n])) return false;
    t->data = b->views[b->n].buf;
    t->name = strdup(name);
    b->n++;
    return t->name || (PyErr_NoMemory(), false);
}

/* block_open(header GGUF bytes, il, [(name, type, shape, buffer)], threads, sublayer) */
static PyObject *block_open(PyObject *self, PyObject *args) {
    PyObject *header, *list;
    int il, threads, sublayer;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "OiO!ii", &header, &il, &PyList_Type, &list, &threads, &sublayer)) return NULL;
    if (sublayer < DS_SUBLAYER_BOTH || sublayer > DS_SUBLAYER_FEED_FORWARD)
        return PyErr_Format(PyExc_ValueError, "sublayer is %d, expected 0 to 2", sublayer);
    Py_ssize_t n = PyList_Size(list);
    bound *b = calloc(1, sizeof *b);
    if (b) {
        b->tensors = calloc((size_t)n + 1, sizeof *b->tensors);
        b->views = calloc((size_t)n + 1, sizeof *b->views);
    }
    if (!b || !b->tensors || !b->views) {
        if (b) release(b);
        return PyErr_NoMemory();
    }
    bool ok = ds_py_buffer(header, 0, false, &b->header_bytes);
    for (Py_ssize_t i = 0; i < n && ok; i++) ok = bind(b, PyList_GetItem(list, i));
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        st = ds_gguf_view(b->header_bytes.buf, (size_t)b->header_bytes.len, "layer", &b->header, &err);
        if (st == DS_OK)
            st = ds_block_open(b->header, il, b->tensors, b->n, threads, (ds_sublayer)sublayer, &b->block, &err);
        Py_END_ALLOW_THREADS
        if (st == DS_OK) return ds_py_own(b, DS_PY_BLOCK, release);
        ds_py_raise(&err);
    }
    release(b);
    return NULL;
}

static PyObject *block_close(PyObject *self, PyObject *capsule) { return ds_py_close(capsule, DS_PY_BLOCK); }

static PyObject *block_hparams(void *pointer, PyObject *args) {
    const bound *b = pointer;
    return ds_py_config(ds_block_config(b->block));
}
DS_PY_HELD(block_hparams, DS_PY_BLOCK)

/* block_tap_shape(block, name) -> (row width, is int32) */
static PyObject *block_tap_shape(void *pointer, PyObject *args) {
    PyObject *capsule;
    const char *name;
    const bound *b = pointer;
    ds_tap_point point;
    int il;
    if (!PyArg_ParseTuple(args, "Os", &capsule, &name)) return NULL;
    const ds_config *config = ds_block_config(b->block);
    if (!ds_tap_parse(config, name, &point, &il))
        return PyErr_Format(PyExc_ValueError, "the layer has no intermediate named `%s`", name);
    return Py_BuildValue("(iO)", ds_tap_width(config, point), ds_tap_is_int(point) ? Py_True : Py_False);
}
DS_PY_HELD(block_tap_shape, DS_PY_BLOCK)

/* block_forward(block, x, n_seq, n_tok, y, [(tap name, buffer)]) */
static PyObject *block_forward(void *pointer, PyObject *args) {
    PyObject *capsule, *x, *y, *taps;
    int n_seq, n_tok;
    const bound *b = pointer;
    Py_buffer in, out = {0};
    ds_py_tap tap = {0};
    ds_error err;
    ds_status st = DS_OK;
    bool ok;
    if (!PyArg_ParseTuple(args, "OOiiOO!", &capsule, &x, &n_seq, &n_tok, &y, &PyList_Type, &taps)) return NULL;
    if (n_seq < 1 || n_tok < 1 || n_tok > 1 << 20 || n_seq > 1 << 20)
        return PyErr_Format(PyExc_ValueError, "%d windows of %d tokens", n_seq, n_tok);
    size_t rows = (size_t)n_seq * (size_t)n_tok,
           bytes = rows * (size_t)ds_block_config(b->block)->n_embd * sizeof(float);
    if (!ds_py_buffer(x, bytes, false, &in)) return NULL;
    ok = ds_py_buffer(y, bytes, true, &out);
    if (ok && (ok = ds_py_tap_open(taps, ds_block_config(b->block), rows, 0, &tap))) {
        Py_BEGIN_ALLOW_THREADS
        st = ds_block_forward(b->block, in.buf, n_seq, n_tok, out.buf, tap.tap.n ? &tap.tap : NULL, &err);
        Py_END_ALLOW_THREADS
        if (st != DS_OK) ds_py_raise(&err);
    }
    ds_py_tap_close(&tap);
    if (out.obj) PyBuffer_Release(&out);
    PyBuffer_Release(&in);
    return ok && st == DS_OK ? Py_NewRef(Py_None) : NULL;
}
DS_PY_HELD(block_forward, DS_PY_BLOCK)

PyMethodDef ds_py_block_methods[] = {
    {"block_open", block_open, METH_VARARGS, NULL},
    {"block_close", block_close, METH_O, NULL},
    {"block_hparams", block_hparams_held, METH_O, NULL},
    {"block_tap_shape", block_tap_shape_held, METH_VARARGS, NULL},
    {"block_forward", block_forward_held, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
