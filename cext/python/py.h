/* py.h: what the binding files share. The binding is thin: capsules, buffers and errors; arrays and classes are Python's. */
#pragma once

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API /* the build sets it */
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include "dsv2.h"

/* Raise the exception of cext.errors that fits err, with its hint. Returns NULL. */
PyObject *ds_py_raise(const ds_error *err);

/* A capsule that owns `pointer` until ds_py_close or its own end; release frees it. NULL with MemoryError on failure,
 * after release(pointer). */
PyObject *ds_py_own(void *pointer, const char *name, void (*release)(void *));
/* Close: calls after it are told, calls under way end as they began, and the last of them releases what the capsule owns.
 * Once closed, nothing. Returns None. */
PyObject *ds_py_close(PyObject *capsule, const char *name);

/* The pointer in a capsule of that name, there until ds_py_drop; NULL with an exception where it is closed or something
 * else. The GIL guards the count of users. */
void *ds_py_hold(PyObject *capsule, const char *name);
void ds_py_drop(PyObject *capsule, const char *name);
/* Call use with the pointer held: args is the capsule, or a tuple that begins with it. */
PyObject *ds_py_with(PyObject *args, const char *name, PyObject *(*use)(void *pointer, PyObject *args));
/* NAME_held: the function of a method table that calls NAME so. */
#define DS_PY_HELD(NAME, CAPSULE) \
    static PyObject *NAME##_held(PyObject *self, PyObject *args) { return ds_py_with(args, CAPSULE, NAME); }

/* A C-contiguous buffer of at least `bytes`; false with an exception. Release with PyBuffer_Release. */
bool ds_py_buffer(PyObject *object, size_t bytes, bool writable, Py_buffer *out);

/* Each file's functions, added by module.c. */
extern PyMethodDef ds_py_gguf_methods[], ds_py_model_methods[], ds_py_session_methods[], ds_py_block_methods[],
    ds_py_sampler_methods[], ds_py_attention_methods[], ds_py_encode_methods[], ds_py_gpu_methods[];
int ds_py_add_kernels(PyObject *module);

/* Read a list of (point name, buffer) pairs into tap entries; buffers hold n_rows rows. False with an exception. */
typedef struct ds_py_tap {
    ds_tap tap;
    Py_buffer *buffers;
} ds_py_tap;
bool ds_py_tap_open(PyObject *list, const ds_config *config, size_t n_rows, int row, ds_py_tap *out);
void ds_py_tap_close(ds_py_tap *tap);
PyObject *ds_py_config(const ds_config *config); /* a new dict */
PyObject *ds_py_notes(const ds_notes *notes); /* a new tuple of str */

#define DS_PY_GGUF "cext.gguf"
#define DS_PY_MODEL "cext.model"
#define DS_PY_SESSION "cext.session"
#define DS_PY_READING "cext.reading"
#define DS_PY_BLOCK "cext.block"
#define DS_PY_SAMPLER "cext.sampler"
#define DS_PY_GPU "cext.gpu"
