/* module.c: the extension module cext._engine, and what its files share. */
#include "python/py.h"

#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/os.h"
#include "kernels/kernels.h"

typedef struct handle {
    void *pointer; /* NULL once released */
    void (*release)(void *);
    int n_users; /* calls that hold the pointer; some without the GIL */
    bool closed;
} handle;

static const char *const EXCEPTIONS[] = {
    [DS_ENOMEM] = "OutOfMemoryError",       [DS_EIO] = "FileError",        [DS_EFORMAT] = "FormatError",
    [DS_EUNSUPPORTED] = "UnsupportedError", [DS_EINVAL] = "ArgumentError", [DS_ECONTEXT] = "ContextFullError",
    [DS_ESTOPPED] = "StoppedError",         [DS_EDEVICE] = "DeviceError",
};

PyObject *ds_py_raise(const ds_error *err) {
    PyObject *module = PyImport_ImportModule("cext.errors");
    PyObject *type = module ? PyObject_GetAttrString(module, EXCEPTIONS[err->status]) : NULL;
    PyObject *message = type ? PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)strlen(err->message), "replace") : NULL;
    PyObject *hint = message ? PyUnicode_DecodeUTF8(err->hint, (Py_ssize_t)strlen(err->hint), "replace") : NULL;
    PyObject *exception = hint ? PyObject_CallFunctionObjArgs(type, message, hint, NULL) : NULL;
    if (exception) PyErr_SetObject(type, exception);
    Py_XDECREF(exception);
    Py_XDECREF(hint);
    Py_XDECREF(message);
    Py_XDECREF(type);
    Py_XDECREF(module);
    return NULL;
}

static void end_capsule(PyObject *capsule) {
    handle *h = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
    if (h && h->pointer) h->release(h->pointer);
    free(h);
}

PyObject *ds_py_own(void *pointer, const char *name, void (*release)(void *)) {
    handle *h = malloc(sizeof *h);
    PyObject *capsule = NULL;
    if (h) {
        *h = (handle){.pointer = pointer, .release = release};
        capsule = PyCapsule_New(h, name, end_capsule);
    } else {
        PyErr_NoMemory();
    }
    if (!capsule) {
        release(pointer);
        free(h);
    }
    return capsule;
}

/* "model" of "cext.model". */
static const char *noun(const char *name) { return strchr(name, '.') + 1; }

void *ds_py_hold(PyObject *capsule, const char *name) {
    handle *h = PyCapsule_GetPointer(capsule, name);
    ds_error err;
    if (h && !h->closed) return h->n_users++, h->pointer;
    if (!h) return NULL;
    ds_fail(&err, DS_EINVAL, "the %s is closed", noun(name));
    return ds_py_raise(&err);
}

static void release_unused(handle *h) {
    void *pointer = h->pointer;
    if (!h->closed || h->n_users) return;
    h->pointer = NULL; /* before the release, which may run code that comes here again */
    if (pointer) h->release(pointer);
}

void ds_py_drop(PyObject *capsule, const char *name) {
    handle *h = PyCapsule_GetPointer(capsule, name);
    if (!h) return;
    h->n_users--;
    release_unused(h);
}

PyObject *ds_py_with(PyObject *args, const char *name, PyObject *(*use)(void *pointer, PyObject *args)) {
    PyObject *capsule = args;
    if (PyTuple_Check(args) && !(capsule = PyTuple_GetItem(args, 0))) return NULL;
    void *pointer = ds_py_hold(capsule, name);
    if (!pointer) return NULL;
    PyObject *result = use(pointer, args);
    ds_py_drop(capsule, name);
    return result;
}

PyObject *ds_py_close(PyObject *capsule, const char *name) {
    handle *h = PyCapsule_GetPointer(capsule, name);
    if (!h) return NULL;
    h->closed = true;
    release_unused(h);
    Py_RETURN_NONE;
}

bool ds_py_buffer(PyObject *object, size_t bytes, bool writable, Py_buffer *out) {
    if (PyObject_GetBuffer(object, out, writable ? PyBUF_CONTIG : PyBUF_CONTIG_RO) != 0) return false;
    if ((size_t)out->len >= bytes) return true;
    PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes where %zu are needed", out->len, bytes);
    PyBuffer_Release(out);
    return false;
}

bool ds_py_tap_open(PyObject *list, const ds_config *config, size_t n_rows, int row, ds_py_tap *out) {
    Py_ssize_t n = PyList_Size(list);
    *out = (ds_py_tap){0};
    if (n <= 0) return n == 0;
    out->tap.entries = calloc((size_t)n, sizeof *out->tap.entries);
    out->buffers = calloc((size_t)n, sizeof *out->buffers);
    if (!out->tap.entries || !out->buffers) return PyErr_NoMemory(), ds_py_tap_close(out), false;
    for (Py_ssize_t i = 0; i < n; i++) {
        ds_tap_entry *entry = &out->tap.entries[i];
        const char *name;
        PyObject *buffer;
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "sO", &name, &buffer)) return ds_py_tap_close(out), false;
        if (!ds_tap_parse(config, name, &entry->point, &entry->il)) {
            PyErr_Format(PyExc_ValueError, "the model has no intermediate named `%s`", name);
            return ds_py_tap_close(out), false;
        }
        if (!ds_py_buffer(buffer, n_rows * (size_t)ds_tap_width(config, entry->point) * 4, true, &out->buffers[i]))
            return ds_py_tap_close(out), false;
        entry->data = out->buffers[i].buf;
        entry->row = row;
        out->tap.n = (int)i + 1;
    }
    return true;
}

void ds_py_tap_close(ds_py_tap *tap) {
    for (int i = 0; i < tap->tap.n; i++) PyBuffer_Release(&tap->buffers[i]);
    free(tap->tap.entries);
    free(tap->buffers);
    *tap = (ds_py_tap){0};
}

static PyObject *formats(PyObject *self, PyObject *unused) {
    PyObject *list = PyList_New(0);
    for (int f = 0; list && f < DS_FORMAT_COUNT; f++) {
        const ds_format_info *info = ds_format_get((ds_format)f);
        PyObject *item = Py_BuildValue("{s:s,s:I,s:I,s:I}", "name", info->name, "gguf_type", info->gguf_type,
                                       "block_elements", info->block_elements, "block_bytes", info->block_bytes);
        if (!item || PyList_Append(list, item) != 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *architectures(PyObject *self, PyObject *unused) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && ds_config_arch(i); i++) {
        PyObject *item = PyUnicode_FromString(ds_config_arch(i));
        if (!item || PyList_Append(list, item) != 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *isas(PyObject *self, PyObject *unused) {
    int n;
    const ds_kernels *const *all = ds_kernels_available(&n);
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < n; i++) {
        PyObject *item = PyUnicode_FromString(all[i]->isa);
        if (!item || PyList_Append(list, item) != 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *isa(PyObject *self, PyObject *unused) {
    const ds_kernels *table = ds_kernels_find(NULL);
    return table ? PyUnicode_FromString(table->isa)
                 : PyErr_Format(PyExc_ValueError, "no kernels named '%s' on this machine", ds_cpu_isa_override());
}

static PyObject *cores(PyObject *self, PyObject *unused) { return PyLong_FromLong(ds_os_cores()); }

static PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "general.architecture of the files that can be run."},
    {"formats", formats, METH_NOARGS, NULL},
    {"isas", isas, METH_NOARGS, NULL},
    {"isa", isa, METH_NOARGS, "The kernels that run unless another name is asked for."},
    {"cores", cores, METH_NOARGS, "Cores for this process: physical, of its affinity mask, within its cgroup's quota."},
    {NULL, NULL, 0, NULL},
};

static int exec(PyObject *module) {
    if (PyModule_AddFunctions(module, ds_py_gguf_methods) != 0 ||
        PyModule_AddFunctions(module, ds_py_model_methods) != 0 ||
        PyModule_AddFunctions(module, ds_py_session_methods) != 0)
        return -1;
    if (PyModule_AddFunctions(module, ds_py_block_methods) != 0 ||
        PyModule_AddFunctions(module, ds_py_sampler_methods) != 0)
        return -1;
    if (PyModule_AddFunctions(module, ds_py_attention_methods) != 0 ||
        PyModule_AddFunctions(module, ds_py_encode_methods) != 0 ||
        PyModule_AddFunctions(module, ds_py_gpu_methods) != 0)
        return -1;
    if (PyModule_AddIntConstant(module, "MAX_STEP", DS_MAX_STEP) != 0 ||
        PyModule_AddIntConstant(module, "SESSION_BLOCK", DS_SESSION_BLOCK) != 0)
        return -1;
    return ds_py_add_kernels(module);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec}, {0, NULL}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "cext._engine", NULL, 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__engine(void) { return PyModuleDef_Init(&definition); }
