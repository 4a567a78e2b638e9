/* sampler.c: the sampler as Python sees it. */
#include "python/py.h"

static void release(void *sampler) { ds_sampler_destroy(sampler); }

/* sampler_open(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed) */
static PyObject *sampler_open(PyObject *self, PyObject *args) {
    ds_sampler_options o;
    unsigned long long seed;
    ds_sampler *sampler;
    ds_error err;
    if (!PyArg_ParseTuple(args, "fifffiK", &o.temperature, &o.top_k, &o.top_p, &o.min_p, &o.repeat_penalty,
                          &o.repeat_last_n, &seed))
        return NULL;
    o.seed = seed;
    if (ds_sampler_create(&o, &sampler, &err) != DS_OK) return ds_py_raise(&err);
    return ds_py_own(sampler, DS_PY_SAMPLER, release);
}

/* sampler_sample(sampler, logits float32 buffer) -> token */
static PyObject *sampler_sample(void *sampler, PyObject *args) {
    PyObject *capsule, *logits;
    Py_buffer view;
    int32_t token = 0;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &logits)) return NULL;
    if (!ds_py_buffer(logits, sizeof(float), false, &view)) return NULL;
    st = ds_sampler_sample(sampler, view.buf, (int)(view.len / (Py_ssize_t)sizeof(float)), &token, &err);
    PyBuffer_Release(&view);
    return st == DS_OK ? PyLong_FromLong(token) : ds_py_raise(&err);
}
DS_PY_HELD(sampler_sample, DS_PY_SAMPLER)

static PyObject *sampler_accept(void *sampler, PyObject *args) {
    PyObject *capsule;
    int token;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &token)) return NULL;
    ds_sampler_accept(sampler, token);
    Py_RETURN_NONE;
}
DS_PY_HELD(sampler_accept, DS_PY_SAMPLER)

/* sampler_kept(sampler, tokens int32 buffer, weights float64 buffer) -> how many there are, also where fewer fit */
static PyObject *sampler_kept(void *sampler, PyObject *args) {
    PyObject *capsule, *tokens, *weights;
    Py_buffer ids, values;
    if (!PyArg_ParseTuple(args, "OOO", &capsule, &tokens, &weights)) return NULL;
    if (!ds_py_buffer(tokens, 0, true, &ids)) return NULL;
    int capacity = (int)(ids.len / (Py_ssize_t)sizeof(int32_t));
    if (!ds_py_buffer(weights, (size_t)capacity * sizeof(double), true, &values)) {
        PyBuffer_Release(&ids);
        return NULL;
    }
    int n = ds_sampler_kept(sampler, ids.buf, values.buf, capacity);
    PyBuffer_Release(&ids);
    PyBuffer_Release(&values);
    return PyLong_FromLong(n);
}
DS_PY_HELD(sampler_kept, DS_PY_SAMPLER)

PyMethodDef ds_py_sampler_methods[] = {
    {"sampler_open", sampler_open, METH_VARARGS, NULL},
    {"sampler_sample", sampler_sample_held, METH_VARARGS, NULL},
    {"sampler_accept", sampler_accept_held, METH_VARARGS, NULL},
    {"sampler_kept", sampler_kept_held, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
