/* gguf.c: GGUF files as Python sees them: metadata as plain values, tensors as records, rows decoded into buffers. */
#include "python/py.h"

#include <string.h>

#include "gguf/types.h"
#include "kernels/kernels.h"

static void release(void *gguf) { ds_gguf_close(gguf); }

static PyObject *gguf_open(PyObject *self, PyObject *args) {
    PyObject *path, *capsule = NULL;
    ds_gguf *gguf;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path)) return NULL;
    const char *name = PyBytes_AsString(path);
    Py_BEGIN_ALLOW_THREADS
    st = ds_gguf_open(name, &gguf, &err);
    Py_END_ALLOW_THREADS
    capsule = st == DS_OK ? ds_py_own(gguf, DS_PY_GGUF, release) : ds_py_raise(&err);
    Py_DECREF(path);
    return capsule;
}

static PyObject *gguf_close(PyObject *self, PyObject *capsule) { return ds_py_close(capsule, DS_PY_GGUF); }

static PyObject *gguf_size(void *gguf, PyObject *args) { return PyLong_FromSize_t(ds_gguf_size(gguf)); }
DS_PY_HELD(gguf_size, DS_PY_GGUF)

/* Whether the file is as it was when it was opened: what stands in it is lent, not copied. */
static bool unchanged(const ds_gguf *gguf) {
    ds_error err;
    return ds_gguf_check(gguf, &err) == DS_OK || ds_py_raise(&err);
}

static PyObject *text(ds_str s) { return PyUnicode_DecodeUTF8(s.data, (Py_ssize_t)s.size, "surrogateescape"); }

/* Read one packed value and step past it. */
static PyObject *value(ds_gguf_type type, const void **at) {
    const unsigned char *p = *at;
    union {
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
        float f32;
        uint64_t u64;
        int64_t i64;
        double f64;
    } v;
#define STEP(member) (memcpy(&v.member, p, sizeof v.member), *at = p + sizeof v.member)
    switch (type) {
    case DS_GGUF_U8:
        return *at = p + 1, PyLong_FromLong(*p);
    case DS_GGUF_I8:
        return *at = p + 1, PyLong_FromLong((signed char)*p);
    case DS_GGUF_BOOL:
        return *at = p + 1, PyBool_FromLong(*p);
    case DS_GGUF_U16:
        return STEP(u16), PyLong_FromLong(v.u16);
    case DS_GGUF_I16:
        return STEP(i16), PyLong_FromLong(v.i16);
    case DS_GGUF_U32:
        return STEP(u32), PyLong_FromUnsignedLong(v.u32);
    case DS_GGUF_I32:
        return STEP(i32), PyLong_FromLong(v.i32);
    case DS_GGUF_F32:
        return STEP(f32), PyFloat_FromDouble(v.f32);
    case DS_GGUF_U64:
        return STEP(u64), PyLong_FromUnsignedLongLong(v.u64);
    case DS_GGUF_I64:
        return STEP(i64), PyLong_FromLongLong(v.i64);
    case DS_GGUF_F64:
        return STEP(f64), PyFloat_FromDouble(v.f64);
    case DS_GGUF_STRING:
        return text(ds_gguf_next_str(at));
    default:
        return Py_NewRef(Py_None);
    }
#undef STEP
}

static PyObject *entry(const ds_gguf_kv *kv) {
    const void *at = kv->data;
    PyObject *list;
    if (kv->type != DS_GGUF_ARRAY) return value(kv->type, &at);
    list = PyList_New((Py_ssize_t)kv->n_items);
    for (uint64_t i = 0; list && i < kv->n_items; i++) {
        PyObject *item = value(kv->item_type, &at);
        if (!item) Py_CLEAR(list);
        else PyList_SetItem(list, (Py_ssize_t)i, item);
    }
    return list;
}

static PyObject *gguf_keys(void *gguf, PyObject *args) {
    PyObject *list = unchanged(gguf) ? PyList_New(0) : NULL;
    for (size_t i = 0; list && i < ds_gguf_n_kv(gguf); i++) {
        PyObject *key = text(ds_gguf_kv_at(gguf, i)->key);
        if (!key || PyList_Append(list, key) != 0) Py_CLEAR(list);
        Py_XDECREF(key);
    }
    return list;
}
DS_PY_HELD(gguf_keys, DS_PY_GGUF)

static PyObject *gguf_value(void *gguf, PyObject *args) {
    PyObject *capsule;
    Py_ssize_t i;
    if (!PyArg_ParseTuple(args, "On", &capsule, &i) || !unchanged(gguf)) return NULL;
    if (i < 0 || (size_t)i >= ds_gguf_n_kv(gguf)) return PyErr_Format(PyExc_IndexError, "no metadata entry %zd", i);
    return entry(ds_gguf_kv_at(gguf, (size_t)i));
}
DS_PY_HELD(gguf_value, DS_PY_GGUF)

/* [(name, type id, type name or None where nothing is known of it, shape, offset, bytes, part)] */
static PyObject *gguf_tensors(void *gguf, PyObject *args) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < ds_gguf_n_tensors(gguf); i++) {
        const ds_tensor *t = ds_gguf_tensor_at(gguf, i);
        PyObject *shape = PyTuple_New(t->n_dims), *name, *record;
        ds_gguf_tensor_type type = {0};
        ds_gguf_tensor_type_get(t->gguf_type, &type);
        for (int d = 0; shape && d < t->n_dims; d++) PyTuple_SetItem(shape, d, PyLong_FromLongLong(t->ne[d]));
        name = PyUnicode_DecodeUTF8(t->name, (Py_ssize_t)strlen(t->name), "surrogateescape");
        record = shape && name ? Py_BuildValue("(OIzOKni)", name, t->gguf_type, type.name, shape,
                                               (unsigned long long)t->offset, (Py_ssize_t)t->n_bytes, t->part)
                               : NULL;
        if (!record || PyList_Append(list, record) != 0) Py_CLEAR(list);
        Py_XDECREF(record);
        Py_XDECREF(name);
        Py_XDECREF(shape);
    }
    return list;
}
DS_PY_HELD(gguf_tensors, DS_PY_GGUF)

static PyObject *gguf_bytes(void *gguf, PyObject *args) {
    PyObject *capsule;
    Py_ssize_t i;
    if (!PyArg_ParseTuple(args, "On", &capsule, &i) || !unchanged(gguf)) return NULL;
    if (i < 0 || (size_t)i >= ds_gguf_n_tensors(gguf)) return PyErr_Format(PyExc_IndexError, "no tensor %zd", i);
    const ds_tensor *t = ds_gguf_tensor_at(gguf, (size_t)i);
    return PyBytes_FromStringAndSize(t->data, (Py_ssize_t)t->n_bytes);
}
DS_PY_HELD(gguf_bytes, DS_PY_GGUF)

/* gguf_decode(gguf, i, out): the tensor as float32 into out. */
static PyObject *gguf_decode(void *gguf, PyObject *args) {
    PyObject *capsule, *out;
    Py_ssize_t i;
    Py_buffer buffer;
    ds_error err;
    if (!PyArg_ParseTuple(args, "OnO", &capsule, &i, &out) || !unchanged(gguf)) return NULL;
    if (i < 0 || (size_t)i >= ds_gguf_n_tensors(gguf)) return PyErr_Format(PyExc_IndexError, "no tensor %zd", i);
    const ds_tensor *t = ds_gguf_tensor_at(gguf, (size_t)i);
    int64_t n = t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
    if (t->format == DS_FORMAT_COUNT) {
        ds_gguf_tensor_type type = {.name = "of a type unknown to it"};
        ds_gguf_tensor_type_get(t->gguf_type, &type);
        ds_fail(&err, DS_EUNSUPPORTED, "`%s`: tensor `%s` is %s (type %u), which this build cannot decode",
                ds_gguf_label(gguf), t->name, type.name, t->gguf_type);
        return ds_py_raise(&err);
    }
    if (!ds_py_buffer(out, (size_t)n * sizeof(float), true, &buffer)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ds_dequantize_row(t->format, n, t->data, buffer.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    return unchanged(gguf) ? Py_NewRef(Py_None) : NULL;
}
DS_PY_HELD(gguf_decode, DS_PY_GGUF)

/* gguf_shape(gguf) -> (hparams, notes) of the model in it */
static PyObject *gguf_shape(void *gguf, PyObject *args) {
    ds_config config;
    ds_error err;
    if (!unchanged(gguf)) return NULL;
    if (ds_config_of(gguf, &config, &err) != DS_OK) return ds_py_raise(&err);
    return Py_BuildValue("(NN)", ds_py_config(&config), ds_py_notes(&config.notes));
}
DS_PY_HELD(gguf_shape, DS_PY_GGUF)

PyMethodDef ds_py_gguf_methods[] = {
    {"gguf_open", gguf_open, METH_VARARGS, NULL},          {"gguf_close", gguf_close, METH_O, NULL},
    {"gguf_size", gguf_size_held, METH_O, NULL},           {"gguf_keys", gguf_keys_held, METH_O, NULL},
    {"gguf_value", gguf_value_held, METH_VARARGS, NULL},   {"gguf_tensors", gguf_tensors_held, METH_O, NULL},
    {"gguf_bytes", gguf_bytes_held, METH_VARARGS, NULL},   {"gguf_shape", gguf_shape_held, METH_O, NULL},
    {"gguf_decode", gguf_decode_held, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL},
};
