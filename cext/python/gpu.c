/* gpu.c: GPUs as they are found, and one shader run over arrays, for tests. */
#include "backend/vulkan/share.h"
#include "backend/vulkan/single.h"
#include "python/py.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void release_gpu(void *gpu) { ds_gpu_close(gpu); }

/* [(kind of memory in words, bytes of its heap)] */
static PyObject *types_of(const ds_gpu_info *g) {
    static const char *const WORDS[] = {"device", "visible", "coherent", "cached"};
    PyObject *list = PyList_New((Py_ssize_t)g->n_types);
    for (uint32_t i = 0; list && i < g->n_types; i++) {
        char words[64] = "";
        for (int bit = 0; bit < 4; bit++)
            if (g->types[i] >> bit & 1)
                snprintf(words + strlen(words), sizeof words - strlen(words), "%s%s", *words ? " " : "", WORDS[bit]);
        PyObject *one = Py_BuildValue("(sK)", words, (unsigned long long)g->type_bytes[i]);
        if (!one) return Py_DECREF(list), NULL;
        PyList_SetItem(list, (Py_ssize_t)i, one);
    }
    return list;
}

static PyObject *told(const ds_gpu_info *g) {
    static const char *const KINDS[] = {"other", "integrated", "discrete", "virtual", "software"};
    char api[32], coop[40] = "";
    if (g->coop[0]) snprintf(coop, sizeof coop, "%ux%ux%u", g->coop[0], g->coop[1], g->coop[2]);
    snprintf(api, sizeof api, "%u.%u.%u", g->api >> 22, g->api >> 12 & 1023, g->api & 4095);
    return Py_BuildValue("{s:s,s:s,s:s,s:s,s:K,s:K,s:i,s:i,s:O,s:O,s:s,s:s,s:N}", "name", g->name, "driver", g->driver,
                         "kind", g->kind < sizeof KINDS / sizeof *KINDS ? KINDS[g->kind] : KINDS[0], "missing",
                         g->missing, "memory", (unsigned long long)g->memory, "free", (unsigned long long)g->free,
                         "subgroup", (int)g->subgroup, "shared_bytes", (int)g->shared_bytes, "int_dot",
                         g->int_dot ? Py_True : Py_False, "float16", g->float16 ? Py_True : Py_False, "api", api,
                         "coop", coop, "types", types_of(g));
}

/* gpu_built() -> whether shaders were compiled into this build */
static PyObject *gpu_built(PyObject *self, PyObject *args) { return PyBool_FromLong(ds_gpu_built()); }

/* gpu_list() -> a dict of each device that Vulkan knows */
static PyObject *gpu_list(PyObject *self, PyObject *args) {
    ds_gpu_info *infos = calloc(DS_GPU_MAX, sizeof *infos);
    PyObject *list = NULL;
    ds_error err;
    ds_status st;
    int n = 0;
    if (!infos) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    st = ds_gpu_list(infos, &n, &err);
    Py_END_ALLOW_THREADS
    if (st != DS_OK) ds_py_raise(&err);
    else list = PyList_New(n);
    for (int i = 0; list && i < n; i++) {
        PyObject *one = told(&infos[i]);
        if (!one) Py_CLEAR(list);
        else PyList_SetItem(list, i, one);
    }
    free(infos);
    return list;
}

/* gpu_open(number or letters of the name, or None for the best) */
static PyObject *gpu_open(PyObject *self, PyObject *args) {
    const char *which;
    ds_gpu *gpu;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "z", &which)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_gpu_open(which, &gpu, &err);
    Py_END_ALLOW_THREADS
    return st == DS_OK ? ds_py_own(gpu, DS_PY_GPU, release_gpu) : ds_py_raise(&err);
}

static PyObject *gpu_close(PyObject *self, PyObject *gpu) { return ds_py_close(gpu, DS_PY_GPU); }

/* gpu_link(gpu, bytes) -> bytes a second of copies of so many from, and to the host's memory */
static PyObject *gpu_link(void *gpu, PyObject *args) {
    PyObject *capsule;
    unsigned long long bytes;
    double in, out;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "OK", &capsule, &bytes)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_gpu_rates(gpu, bytes, &in, &out, &err);
    Py_END_ALLOW_THREADS
    return st == DS_OK ? Py_BuildValue("(dd)", in, out) : ds_py_raise(&err);
}
DS_PY_HELD(gpu_link, DS_PY_GPU)

/* gpu_reads(gpu, bytes) -> bytes a second of a shader that reads so many of the device's own memory */
static PyObject *gpu_reads(void *gpu, PyObject *args) {
    PyObject *capsule;
    unsigned long long bytes;
    double rate;
    ds_error err;
    ds_status st;
    if (!PyArg_ParseTuple(args, "OK", &capsule, &bytes)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    st = ds_gpu_reads(gpu, bytes, &rate, &err);
    Py_END_ALLOW_THREADS
    return st == DS_OK ? PyFloat_FromDouble(rate) : ds_py_raise(&err);
}
DS_PY_HELD(gpu_reads, DS_PY_GPU)

/* The arrays of a job and their links, from lists; false with an exception. */
static bool read_arrays(PyObject *list, Py_buffer *views, ds_gpu_single *job) {
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++, job->n_arrays++) {
        PyObject *item = PyList_GetItem(list, i);
        const bool writable = PyObject_GetBuffer(item, &views[i], PyBUF_CONTIG) == 0;
        if (!writable) {
            PyErr_Clear();
            if (PyObject_GetBuffer(item, &views[i], PyBUF_CONTIG_RO) != 0) return false;
        }
        job->arrays[i] = (ds_gpu_array){views[i].buf, (uint64_t)views[i].len, writable};
    }
    return true;
}

static bool read_links(PyObject *list, ds_gpu_link *links, ds_gpu_single *job) {
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++, job->n_links++) {
        unsigned long long at, to_at;
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "iKiK", &links[i].where, &at, &links[i].to, &to_at))
            return false;
        links[i].at = at, links[i].to_at = to_at;
    }
    return true;
}

static bool read_specs(PyObject *list, ds_gpu_single *job) {
    for (; job->n_specs < PyList_Size(list); job->n_specs++) {
        if (job->n_specs == DS_GPU_SPECS) return PyErr_SetString(PyExc_ValueError, "too many constants"), false;
        job->specs[job->n_specs] = (uint32_t)PyLong_AsUnsignedLong(PyList_GetItem(list, job->n_specs));
        if (PyErr_Occurred()) return false;
    }
    return true;
}

/* Run the job over arrays and links, with these push constants. */
static PyObject *run_over(ds_gpu *gpu, ds_gpu_single *job, PyObject *arrays, PyObject *links, const char *push,
                          Py_ssize_t n_push) {
    ds_error err;
    ds_status st = DS_OK;
    if (n_push > DS_GPU_PUSH) return PyErr_Format(PyExc_ValueError, "%zd bytes of push constants", n_push);
    memcpy(job->push, push, (size_t)n_push);
    job->push_bytes = (uint32_t)n_push;
    Py_buffer *views = calloc((size_t)PyList_Size(arrays) + 1, sizeof *views);
    ds_gpu_link *link = calloc((size_t)PyList_Size(links) + 1, sizeof *link);
    job->arrays = calloc((size_t)PyList_Size(arrays) + 1, sizeof *job->arrays);
    job->links = link;
    bool ok = views && link && job->arrays;
    if (!ok) PyErr_NoMemory();
    ok = ok && read_arrays(arrays, views, job) && read_links(links, link, job);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        st = ds_gpu_run_single(gpu, job, &err);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < job->n_arrays; i++) PyBuffer_Release(&views[i]);
    free(views);
    free(link);
    free(job->arrays);
    if (!ok) return NULL;
    if (st != DS_OK) return ds_py_raise(&err);
    Py_RETURN_NONE;
}

/* gpu_run(gpu, shader, [array], push bytes, [(where, at, to, to_at)], (x, y, z), [specialization constant]): see single.h */
static PyObject *gpu_run(void *gpu, PyObject *args) {
    PyObject *capsule, *arrays, *links, *specs;
    const char *push;
    Py_ssize_t n_push;
    ds_gpu_single job = {0};
    if (!PyArg_ParseTuple(args, "OsO!y#O!(III)O!", &capsule, &job.shader, &PyList_Type, &arrays, &push, &n_push,
                          &PyList_Type, &links, &job.groups[0], &job.groups[1], &job.groups[2], &PyList_Type, &specs))
        return NULL;
    return read_specs(specs, &job) ? run_over(gpu, &job, arrays, links, push, n_push) : NULL;
}
DS_PY_HELD(gpu_run, DS_PY_GPU)

static bool read_format(const char *name, ds_format *out) {
    for (int f = 0; f < DS_FORMAT_COUNT; f++)
        if (strcmp(ds_format_get((ds_format)f)->name, name) == 0) return *out = (ds_format)f, true;
    PyErr_Format(PyExc_ValueError, "unknown format '%s'", name);
    return false;
}

/* gpu_product(gpu, operation, (format, up's format), (bytes of up's row, blocks), [array], product's bytes, [link]): an
 * operation of product.h, see single.h */
static PyObject *gpu_product(void *gpu, PyObject *args) {
    PyObject *capsule, *arrays, *links;
    const char *push, *format, *up_format;
    Py_ssize_t n_push;
    ds_gpu_single job = {0};
    ds_gpu_operation *o = &job.operation;
    if (!PyArg_ParseTuple(args, "Os(ss)(II)O!y#O!", &capsule, &o->name, &format, &up_format, &o->up_row_bytes,
                          &o->n_blocks, &PyList_Type, &arrays, &push, &n_push, &PyList_Type, &links))
        return NULL;
    if (!read_format(format, &o->format) || !read_format(up_format, &o->up_format)) return NULL;
    return run_over(gpu, &job, arrays, links, push, n_push);
}
DS_PY_HELD(gpu_product, DS_PY_GPU)

/* gpu_tables() -> the bytes that a product's `tables` is to point at */
static PyObject *gpu_tables(PyObject *self, PyObject *args) {
    uint16_t tables[DS_GPU_TABLES_BYTES / 2];
    ds_gpu_tables(tables);
    return PyBytes_FromStringAndSize((const char *)tables, sizeof tables);
}

/* gpu_copies(gpu, [array], threads, bytes of a piece, out uint8): see ds_gpu_run_copies */
static PyObject *gpu_copies(void *gpu, PyObject *args) {
    PyObject *capsule, *arrays, *out;
    Py_buffer to = {0};
    unsigned long long piece;
    ds_gpu_single job = {0};
    ds_error err;
    ds_status st = DS_OK;
    int n_threads;
    if (!PyArg_ParseTuple(args, "OO!iKO", &capsule, &PyList_Type, &arrays, &n_threads, &piece, &out)) return NULL;
    if (PyObject_GetBuffer(out, &to, PyBUF_CONTIG) != 0) return NULL;
    Py_buffer *views = calloc((size_t)PyList_Size(arrays) + 1, sizeof *views);
    job.arrays = calloc((size_t)PyList_Size(arrays) + 1, sizeof *job.arrays);
    bool ok = views && job.arrays;
    if (!ok) PyErr_NoMemory();
    ok = ok && read_arrays(arrays, views, &job);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        st = ds_gpu_run_copies(gpu, job.arrays, job.n_arrays, n_threads, piece, to.buf, (uint64_t)to.len, &err);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < job.n_arrays; i++) PyBuffer_Release(&views[i]);
    PyBuffer_Release(&to);
    free(views);
    free(job.arrays);
    if (!ok) return NULL;
    return st == DS_OK ? Py_NewRef(Py_None) : ds_py_raise(&err);
}
DS_PY_HELD(gpu_copies, DS_PY_GPU)

/* gpu_share((bytes, ns) copied, [(slots, ns, waited)], [(experts, slots, ns)] of the processor, [counts], bytes of an expert,
 * bytes under way, slots) -> (how many are copied, crossing): see share.h */
static PyObject *gpu_share(PyObject *self, PyObject *args) {
    PyObject *device, *processor, *list;
    unsigned long long bytes, ns, slots, experts, expert_bytes, under_way;
    ds_share share = {0};
    int waited;
    if (!PyArg_ParseTuple(args, "(KK)O!O!O!KKK", &bytes, &ns, &PyList_Type, &device, &PyList_Type, &processor,
                          &PyList_Type, &list, &expert_bytes, &under_way, &slots))
        return NULL;
    const uint64_t n_slots = slots;
    ds_share_copied(&share, bytes, ns);
    for (Py_ssize_t i = 0; i < PyList_Size(device); i++) {
        if (!PyArg_ParseTuple(PyList_GetItem(device, i), "KKp", &slots, &ns, &waited)) return NULL;
        ds_share_device(&share, slots, ns, waited);
    }
    for (Py_ssize_t i = 0; i < PyList_Size(processor); i++) {
        if (!PyArg_ParseTuple(PyList_GetItem(processor, i), "KKK", &experts, &slots, &ns)) return NULL;
        ds_share_processor(&share, experts, slots, ns);
    }
    const int n = (int)PyList_Size(list);
    int *counts = calloc((size_t)n + 1, sizeof *counts);
    if (!counts) return PyErr_NoMemory();
    for (int i = 0; i < n; i++) counts[i] = (int)PyLong_AsLong(PyList_GetItem(list, i));
    const int chosen = ds_share_choose(&share, counts, n, expert_bytes, under_way, n_slots);
    free(counts);
    return Py_BuildValue("(id)", chosen, ds_share_crossing(&share, expert_bytes));
}

/* gpu_share_ways(ns a byte, ns an expert and a slot of the processor, experts, bytes of one, [(tokens, ns where shared out,
 * where all are copied)]) -> bytes: of each step, whether all were copied (share.h) */
static PyObject *gpu_share_ways(PyObject *self, PyObject *args) {
    PyObject *steps;
    int byte_ns, expert_ns, slot_ns, n, n_tok;
    unsigned long long expert_bytes, shared, whole;
    ds_share share = {0};
    if (!PyArg_ParseTuple(args, "iiiiKO!", &byte_ns, &expert_ns, &slot_ns, &n, &expert_bytes, &PyList_Type, &steps))
        return NULL;
    PyObject *out = PyBytes_FromStringAndSize(NULL, PyList_Size(steps));
    for (Py_ssize_t i = 0; out && i < PyList_Size(steps); i++) {
        if (!PyArg_ParseTuple(PyList_GetItem(steps, i), "iKK", &n_tok, &shared, &whole)) return Py_DECREF(out), NULL;
        const bool all = ds_share_whole(&share, n_tok, n, (uint64_t)n_tok, expert_bytes);
        ds_share_step(&share, n_tok, all, all ? whole : shared);
        PyBytes_AsString(out)[i] = all;
        if (all || !byte_ns) continue;
        ds_share_copied(&share, 1000, 1000 * (uint64_t)byte_ns);
        for (uint64_t e = 1; e < 3; e++)
            ds_share_processor(&share, e, 10, e * (uint64_t)expert_ns + 10 * (uint64_t)slot_ns);
    }
    return out;
}

PyMethodDef ds_py_gpu_methods[] = {
    {"gpu_built", gpu_built, METH_NOARGS, NULL},
    {"gpu_list", gpu_list, METH_NOARGS, NULL},
    {"gpu_open", gpu_open, METH_VARARGS, NULL},
    {"gpu_close", gpu_close, METH_O, NULL},
    {"gpu_run", gpu_run_held, METH_VARARGS, NULL},
    {"gpu_product", gpu_product_held, METH_VARARGS, NULL},
    {"gpu_tables", gpu_tables, METH_NOARGS, NULL},
    {"gpu_copies", gpu_copies_held, METH_VARARGS, NULL},
    {"gpu_share", gpu_share, METH_VARARGS, NULL},
    {"gpu_link", gpu_link_held, METH_VARARGS, NULL},
    {"gpu_reads", gpu_reads_held, METH_VARARGS, NULL},
    {"gpu_share_ways", gpu_share_ways, METH_VARARGS, NULL},
    {0},
};
