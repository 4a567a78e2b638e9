/* session.c: what sessions share and what is kept of them. */
#include "python/py.h"

static void release_session(void *session) { ds_session_destroy(session); }

/* session_fork(session, n) */
static PyObject *session_fork(void *session, PyObject *args) {
    PyObject *capsule;
    int n;
    ds_session *fork;
    ds_error err;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &n)) return NULL;
    if (ds_session_fork(session, n, &fork, &err) != DS_OK) return ds_py_raise(&err);
    return ds_py_own(fork, DS_PY_SESSION, release_session);
}
DS_PY_HELD(session_fork, DS_PY_SESSION)

/* session_ids(session, int32 buffer of n_past) */
static PyObject *session_ids(void *session, PyObject *args) {
    PyObject *capsule, *out;
    Py_buffer ids;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &out)) return NULL;
    if (!ds_py_buffer(out, (size_t)ds_session_n_past(session) * sizeof(int32_t), true, &ids)) return NULL;
    ds_session_ids(session, ids.buf);
    PyBuffer_Release(&ids);
    Py_RETURN_NONE;
}
DS_PY_HELD(session_ids, DS_PY_SESSION)

/* session_block_bytes(session) */
static PyObject *session_block_bytes(void *session, PyObject *args) {
    return PyLong_FromSize_t(ds_session_block_bytes(session));
}
DS_PY_HELD(session_block_bytes, DS_PY_SESSION)

/* session_block_save(session, block, buffer) */
static PyObject *session_block_save(void *session, PyObject *args) {
    PyObject *capsule, *out;
    Py_buffer content;
    int block;
    ds_status st;
    ds_error err;
    if (!PyArg_ParseTuple(args, "OiO", &capsule, &block, &out)) return NULL;
    if (!ds_py_buffer(out, ds_session_block_bytes(session), true, &content)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_session_block_save(session, block, content.buf, &err);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&content);
    return st == DS_OK ? Py_NewRef(Py_None) : ds_py_raise(&err);
}
DS_PY_HELD(session_block_save, DS_PY_SESSION)

/* session_block_load(session, buffer, n) */
static PyObject *session_block_load(void *session, PyObject *args) {
    PyObject *capsule, *in;
    Py_buffer content;
    int n;
    ds_status st;
    ds_error err;
    if (!PyArg_ParseTuple(args, "OOi", &capsule, &in, &n)) return NULL;
    if (!ds_py_buffer(in, ds_session_block_bytes(session), false, &content)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_session_block_load(session, content.buf, n, &err);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&content);
    return st == DS_OK ? Py_NewRef(Py_None) : ds_py_raise(&err);
}
DS_PY_HELD(session_block_load, DS_PY_SESSION)

/* Feeds update(bytes) of a Python object; stops at the first exception. */
static void feed(void *update, const void *data, size_t n_bytes) {
    if (PyErr_Occurred()) return;
    Py_XDECREF(PyObject_CallFunction(update, "y#", (const char *)data, (Py_ssize_t)n_bytes));
}

/* model_identity(model, update): all that its caches' numbers depend on, in calls of update(bytes) */
static PyObject *model_identity(void *model, PyObject *args) {
    PyObject *capsule, *update;
    const ds_gguf *gguf = ds_model_gguf(model);
    ds_error err;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &update)) return NULL;
    if (ds_gguf_check(gguf, &err) != DS_OK) return ds_py_raise(&err);
    ds_model_identity(model, feed, update);
    if (PyErr_Occurred()) return NULL;
    if (ds_gguf_check(gguf, &err) != DS_OK) return ds_py_raise(&err); /* it may have changed meanwhile */
    Py_RETURN_NONE;
}
DS_PY_HELD(model_identity, DS_PY_MODEL)

/* model_cache(model) -> (blocks, shared blocks, bytes) */
static PyObject *model_cache(void *model, PyObject *args) {
    const ds_cache_usage usage = ds_model_cache(model);
    return Py_BuildValue("(nnn)", (Py_ssize_t)usage.n_blocks, (Py_ssize_t)usage.n_shared, (Py_ssize_t)usage.bytes);
}
DS_PY_HELD(model_cache, DS_PY_MODEL)

PyMethodDef ds_py_session_methods[] = {
    {"session_fork", session_fork_held, METH_VARARGS, NULL},
    {"session_ids", session_ids_held, METH_VARARGS, NULL},
    {"session_block_bytes", session_block_bytes_held, METH_O, NULL},
    {"session_block_save", session_block_save_held, METH_VARARGS, NULL},
    {"session_block_load", session_block_load_held, METH_VARARGS, NULL},
    {"model_identity", model_identity_held, METH_VARARGS, NULL},
    {"model_cache", model_cache_held, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
