/* kernels.c: the kernel tables as Python functions on buffers, for tests and benchmarks of the low level.
 * Private names; every size is checked here, so that a wrong call raises instead of reading past a buffer. Outputs are
 * written into buffers that the caller brings (numpy arrays), as in C. */
#include "python/py.h"

#include <stdbool.h>
#include <string.h>

#include "kernels/kernels.h"

static const ds_kernels *find_isa(const char *isa) {
    const ds_kernels *table = ds_kernels_find(isa);
    if (!table) PyErr_Format(PyExc_ValueError, "no kernels named '%s' on this machine", isa);
    return table;
}

static ds_format find_format(const char *name) {
    for (int f = 0; f < DS_FORMAT_COUNT; f++)
        if (strcmp(ds_format_get((ds_format)f)->name, name) == 0) return (ds_format)f;
    PyErr_Format(PyExc_ValueError, "unknown format '%s'", name);
    return DS_FORMAT_COUNT;
}

/* Raises unless `buffer` holds at least count items of item bytes. */
static bool holds(const Py_buffer *buffer, const char *name, size_t count, size_t item) {
    if ((size_t)buffer->len / item >= count) return true;
    PyErr_Format(PyExc_ValueError, "%s: %zd bytes, expected at least %zu", name, buffer->len, count * item);
    return false;
}

static bool positive(const char *name, long long value) {
    if (value > 0) return true;
    PyErr_Format(PyExc_ValueError, "%s: %lld, expected a positive number", name, value);
    return false;
}

static bool aligned(const Py_buffer *buffer, const char *name) {
    if ((uintptr_t)buffer->buf % DS_ACT_ALIGN == 0) return true;
    PyErr_Format(PyExc_ValueError, "%s: not aligned to %d bytes", name, DS_ACT_ALIGN);
    return false;
}

/* Closes a call: releases its buffers and returns None, or NULL where an error was raised. */
static PyObject *finish(Py_buffer *buffers, int n) {
    for (int i = 0; i < n; i++)
        if (buffers[i].obj) PyBuffer_Release(&buffers[i]);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(dequantize_doc,
             "_dequantize(isa, format, blocks, y): decode y's n floats; isa None takes the scalar decoder.");

static PyObject *py_dequantize(PyObject *self, PyObject *args) {
    Py_buffer b[2] = {{0}};
    const char *isa, *name;
    if (!PyArg_ParseTuple(args, "zsy*w*:_dequantize", &isa, &name, &b[0], &b[1])) return finish(b, 2);
    const ds_kernels *table = isa ? find_isa(isa) : NULL;
    const ds_format format = (isa && !table) ? DS_FORMAT_COUNT : find_format(name);
    if (format < DS_FORMAT_COUNT) {
        const ds_format_info *info = ds_format_get(format);
        const int64_t n = b[1].len / (Py_ssize_t)sizeof(float);
        if (n % info->block_elements != 0)
            PyErr_Format(PyExc_ValueError, "y: %lld values are not whole blocks", (long long)n);
        else if (!holds(&b[0], "blocks", ds_row_bytes(format, n), 1)) {
        } else if (table) table->dequantize[format](n, b[0].buf, b[1].buf);
        else ds_dequantize_row(format, n, b[0].buf, b[1].buf);
    }
    return finish(b, 2);
}

static ds_act_kind kind_of(const char *format) {
    const ds_format f = find_format(format);
    return f < DS_FORMAT_COUNT ? ds_format_get(f)->act : DS_ACT_COUNT;
}

PyDoc_STRVAR(act_bytes_doc,
             "_act_bytes(isa, format, n_tok, k) -> int: size of the activation pack that format's products take.");

static PyObject *py_act_bytes(PyObject *self, PyObject *args) {
    const char *isa, *format;
    int n_tok, k;
    if (!PyArg_ParseTuple(args, "ssii:_act_bytes", &isa, &format, &n_tok, &k)) return NULL;
    const ds_kernels *table = find_isa(isa);
    const ds_act_kind kind = table ? kind_of(format) : DS_ACT_COUNT;
    if (kind == DS_ACT_COUNT || !positive("n_tok", n_tok) || !positive("k", k)) return NULL;
    return PyLong_FromSize_t(table->act_bytes(kind, n_tok, k));
}

PyDoc_STRVAR(
    act_pack_doc,
    "_act_pack(isa, format, tok_begin, tok_end, n_tok, k, x, ldx, rows, act): pack x[rows[t]] (rows None: x[t]).");

static PyObject *py_act_pack(PyObject *self, PyObject *args) {
    Py_buffer b[3] = {{0}};
    const char *isa, *format;
    int begin, end, n_tok, k;
    Py_ssize_t ldx;
    if (!PyArg_ParseTuple(args, "ssiiiiy*nz*w*:_act_pack", &isa, &format, &begin, &end, &n_tok, &k, &b[0], &ldx, &b[1],
                          &b[2]))
        return finish(b, 3);
    const ds_kernels *table = find_isa(isa);
    const ds_act_kind kind = table ? kind_of(format) : DS_ACT_COUNT;
    if (kind == DS_ACT_COUNT || !positive("n_tok", n_tok) || !positive("k", k)) return finish(b, 3);
    const int32_t *rows = b[1].buf;
    if (rows && !holds(&b[1], "rows", (size_t)n_tok, sizeof *rows)) return finish(b, 3);
    int last = n_tok - 1;
    for (int t = 0; rows && t < n_tok; t++) {
        if (t == 0) last = 0;
        if (rows[t] < 0) last = INT32_MAX / 2;
        else if (rows[t] > last) last = rows[t];
    }
    if (begin < 0 || end > n_tok || begin > end || ldx < k || (kind == DS_ACT_Q8 && k % 32 != 0))
        PyErr_SetString(PyExc_ValueError, "token range, ldx or k out of range");
    else if (holds(&b[0], "x", (size_t)last * (size_t)ldx + (size_t)k, sizeof(float)) &&
             holds(&b[2], "act", table->act_bytes(kind, n_tok, k), 1) && aligned(&b[2], "act"))
        table->act_pack(kind, begin, end, n_tok, k, b[0].buf, (size_t)ldx, rows, b[2].buf);
    return finish(b, 3);
}

PyDoc_STRVAR(mul_doc, "_mul(isa, format, w, row_bytes, k, row_begin, row_end, act, n_tok, y, ldy): rows of y = x w^T.");

static PyObject *py_mul(PyObject *self, PyObject *args) {
    Py_buffer b[3] = {{0}};
    const char *isa, *name;
    int k, begin, end, n_tok;
    Py_ssize_t row_bytes, ldy;
    if (!PyArg_ParseTuple(args, "ssy*niiiy*iw*n:_mul", &isa, &name, &b[0], &row_bytes, &k, &begin, &end, &b[1], &n_tok,
                          &b[2], &ldy))
        return finish(b, 3);
    const ds_kernels *table = find_isa(isa);
    const ds_format format = table ? find_format(name) : DS_FORMAT_COUNT;
    if (format == DS_FORMAT_COUNT || !positive("n_tok", n_tok) || !positive("k", k)) return finish(b, 3);
    const ds_format_info *info = ds_format_get(format);
    if (k % (int)info->block_elements != 0 || begin < 0 || begin > end || ldy < end || row_bytes < 0 ||
        begin % DS_PANEL_ROWS != 0) /* 0: the same row again, in a cache */
        PyErr_SetString(PyExc_ValueError, "k, row_bytes, ldy or the row range is out of range");
    else if (end > begin && holds(&b[0], "w", (size_t)(end - 1) * (size_t)row_bytes + ds_row_bytes(format, k), 1) &&
             holds(&b[1], "act", table->act_bytes(info->act, n_tok, k), 1) && aligned(&b[1], "act") &&
             holds(&b[2], "y", (size_t)(n_tok - 1) * (size_t)ldy + (size_t)end, sizeof(float))) {
        const ds_mul job = {.w = b[0].buf,
                            .row_bytes = (size_t)row_bytes,
                            .k = k,
                            .row_begin = begin,
                            .row_end = end,
                            .act = b[1].buf,
                            .n_tok = n_tok,
                            .y = b[2].buf,
                            .ldy = (size_t)ldy};
        Py_BEGIN_ALLOW_THREADS
        table->mul[format](&job);
        Py_END_ALLOW_THREADS
    }
    return finish(b, 3);
}

PyDoc_STRVAR(gemm_doc,
             "_gemm(isa, op, m, n, k, alpha, a, lda, b, ldb, c, ldc): op 'nt' is C = alpha A B^T, 'nn_add' C += A B.");

static PyObject *py_gemm(PyObject *self, PyObject *args) {
    Py_buffer b[3] = {{0}};
    const char *isa, *op;
    int m, n, k;
    float alpha;
    Py_ssize_t lda, ldb, ldc;
    if (!PyArg_ParseTuple(args, "ssiiify*ny*nw*n:_gemm", &isa, &op, &m, &n, &k, &alpha, &b[0], &lda, &b[1], &ldb, &b[2],
                          &ldc))
        return finish(b, 3);
    const ds_kernels *table = find_isa(isa);
    const bool nt = strcmp(op, "nt") == 0;
    if (!table || !positive("m", m) || !positive("n", n) || !positive("k", k)) return finish(b, 3);
    const size_t b_rows = (size_t)(nt ? n : k), b_cols = (size_t)(nt ? k : n);
    if (lda < k || ldb < (Py_ssize_t)b_cols || ldc < n)
        PyErr_SetString(PyExc_ValueError, "lda, ldb or ldc is too small");
    else if (holds(&b[0], "a", (size_t)(m - 1) * (size_t)lda + (size_t)k, sizeof(float)) &&
             holds(&b[1], "b", (b_rows - 1) * (size_t)ldb + b_cols, sizeof(float)) &&
             holds(&b[2], "c", (size_t)(m - 1) * (size_t)ldc + (size_t)n, sizeof(float))) {
        if (nt) table->gemm_nt(m, n, k, alpha, b[0].buf, (size_t)lda, b[1].buf, (size_t)ldb, b[2].buf, (size_t)ldc);
        else table->gemm_nn_add(m, n, k, b[0].buf, (size_t)lda, b[1].buf, (size_t)ldb, b[2].buf, (size_t)ldc);
    }
    return finish(b, 3);
}

PyDoc_STRVAR(
    row_doc,
    "_row(isa, op, x, other, y, number) -> float: an operation on a row: 'rms_norm' (other: weight or None, number: "
    "eps), 'exp_sum' (number: max) and 'softmax' (in place in y; x is not read), 'silu_mul' (x gate, other up), "
    "'add_scaled' (number: scale). Returns exp_sum's sum, otherwise 0.");

static PyObject *py_row(PyObject *self, PyObject *args) {
    Py_buffer b[3] = {{0}};
    const char *isa, *op;
    float number, result = 0.0f;
    if (!PyArg_ParseTuple(args, "ssy*z*w*f:_row", &isa, &op, &b[0], &b[1], &b[2], &number)) return finish(b, 3);
    const ds_kernels *table = find_isa(isa);
    const size_t n = (size_t)b[2].len / sizeof(float);
    const bool has_other = b[1].buf != NULL;
    if (table && holds(&b[0], "x", n, sizeof(float)) && (!has_other || holds(&b[1], "other", n, sizeof(float)))) {
        const int count = (int)n;
        if (strcmp(op, "rms_norm") == 0) table->rms_norm(count, b[0].buf, b[1].buf, number, b[2].buf);
        else if (strcmp(op, "exp_sum") == 0) result = table->exp_sum(count, number, b[2].buf);
        else if (strcmp(op, "softmax") == 0) table->softmax(count, b[2].buf);
        else if (strcmp(op, "silu_mul") == 0 && has_other) table->silu_mul(count, b[0].buf, b[1].buf, b[2].buf);
        else if (strcmp(op, "add_scaled") == 0) table->add_scaled(count, number, b[0].buf, b[2].buf);
        else PyErr_Format(PyExc_ValueError, "unknown row operation '%s'", op);
    }
    PyObject *none = finish(b, 3);
    if (!none) return NULL;
    Py_DecRef(none);
    return PyFloat_FromDouble((double)result);
}

PyDoc_STRVAR(half_doc,
             "_half(op, x, y): the scalar conversions 'f16_to_f32', 'f32_to_f16', 'bf16_to_f32' over buffers.");

static PyObject *py_half(PyObject *self, PyObject *args) {
    Py_buffer b[2] = {{0}};
    const char *op;
    if (!PyArg_ParseTuple(args, "sy*w*:_half", &op, &b[0], &b[1])) return finish(b, 2);
    const bool to_half = strcmp(op, "f32_to_f16") == 0, from_half = strcmp(op, "f16_to_f32") == 0;
    const size_t n = (size_t)b[1].len / (to_half ? 2 : 4);
    if (holds(&b[0], "x", n, to_half ? 4 : 2)) {
        for (size_t i = 0; i < n; i++) {
            if (to_half) ((uint16_t *)b[1].buf)[i] = ds_f32_to_f16(((const float *)b[0].buf)[i]);
            else ((float *)b[1].buf)[i] = (from_half ? ds_f16_to_f32 : ds_bf16_to_f32)(((const uint16_t *)b[0].buf)[i]);
        }
    }
    return finish(b, 2);
}

PyDoc_STRVAR(
    read_all_doc,
    "_read_all(isa, data) -> int: read a buffer in order; the XOR of its dwords, but for a tail under 512 bytes.");

static PyObject *py_read_all(PyObject *self, PyObject *args) {
    Py_buffer b[1] = {{0}};
    const char *isa;
    unsigned long sum = 0;
    if (!PyArg_ParseTuple(args, "sy*:_read_all", &isa, &b[0])) return finish(b, 1);
    const ds_kernels *table = find_isa(isa);
    if (table) {
        Py_BEGIN_ALLOW_THREADS
        sum = table->read_all((size_t)b[0].len, b[0].buf);
        Py_END_ALLOW_THREADS
    }
    PyObject *none = finish(b, 1);
    if (!none) return NULL;
    Py_DecRef(none);
    return PyLong_FromUnsignedLong(sum);
}

PyDoc_STRVAR(dot_peak_doc,
             "_dot_peak(isa, n_rounds) -> int: run the int8 dot instruction; the number of multiply-adds done.");

static PyObject *py_dot_peak(PyObject *self, PyObject *args) {
    const char *isa;
    int n_rounds;
    long long n = 0;
    if (!PyArg_ParseTuple(args, "si:_dot_peak", &isa, &n_rounds)) return NULL;
    const ds_kernels *table = find_isa(isa);
    if (!table || !positive("n_rounds", n_rounds)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    n = table->dot_peak(n_rounds);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(n);
}

PyDoc_STRVAR(chain_doc, "_chain(isa, n_rounds) -> int: operations that wait for each other; the cycles they took.");

static PyObject *py_chain(PyObject *self, PyObject *args) {
    const char *isa;
    int n_rounds;
    long long n = 0;
    if (!PyArg_ParseTuple(args, "si:_chain", &isa, &n_rounds)) return NULL;
    const ds_kernels *table = find_isa(isa);
    if (!table || !positive("n_rounds", n_rounds)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    n = table->chain(n_rounds);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(n);
}

static PyMethodDef methods[] = {
    {"_dequantize", py_dequantize, METH_VARARGS, dequantize_doc},
    {"_act_bytes", py_act_bytes, METH_VARARGS, act_bytes_doc},
    {"_act_pack", py_act_pack, METH_VARARGS, act_pack_doc},
    {"_mul", py_mul, METH_VARARGS, mul_doc},
    {"_gemm", py_gemm, METH_VARARGS, gemm_doc},
    {"_row", py_row, METH_VARARGS, row_doc},
    {"_half", py_half, METH_VARARGS, half_doc},
    {"_read_all", py_read_all, METH_VARARGS, read_all_doc},
    {"_dot_peak", py_dot_peak, METH_VARARGS, dot_peak_doc},
    {"_chain", py_chain, METH_VARARGS, chain_doc},
    {NULL, NULL, 0, NULL},
};

int ds_py_add_kernels(PyObject *module) { return PyModule_AddFunctions(module, methods); }
