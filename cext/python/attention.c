/* attention.c: the attention kernels as Python functions on float arrays, for tests and benchmarks of the low level.
 * Rows are packed here as the engine packs them, and every size is checked. */
#include "python/py.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

static const struct {
    const char *name;
    ds_row_kind kind;
} KINDS[] = {
    {"f32", DS_ROWS_F32},
    {"i16", DS_ROWS_I16},
    {"q8_0", DS_ROWS_Q8},
};

static bool find_kind(const char *name, ds_row_kind *out) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (strcmp(KINDS[i].name, name) == 0) return *out = KINDS[i].kind, true;
    return PyErr_Format(PyExc_ValueError, "unknown kind of rows '%s'", name), false;
}

static const ds_kernels *find_isa(const char *isa) {
    const ds_kernels *table = ds_kernels_find(isa);
    if (!table) PyErr_Format(PyExc_ValueError, "no kernels named '%s' on this machine", isa);
    return table;
}

/* Memory at a multiple of 64, zeroed; freed with the call. */
typedef struct arena {
    void *blocks[24];
    int n;
} arena;

static void *take(arena *a, size_t n_bytes) {
    void *p = aligned_alloc(DS_ACT_ALIGN, (n_bytes / DS_ACT_ALIGN + 1) * DS_ACT_ALIGN);
    if (p) memset(p, 0, n_bytes);
    else PyErr_NoMemory();
    a->blocks[a->n++] = p;
    return p;
}

static void drop(arena *a) {
    for (int i = 0; i < a->n; i++) free(a->blocks[i]);
}

/* A table for n_rows rows in blocks of block_rows. */
static bool table_new(arena *a, ds_row_kind kind, int n_rows, int block_rows, size_t row_bytes, int n_tail,
                      ds_row_table *out) {
    const int n_blocks = (n_rows + block_rows - 1) / block_rows;
    unsigned char **blocks = take(a, (size_t)n_blocks * sizeof *blocks);
    *out = (ds_row_table){.layout = ds_row_layout_of(kind, row_bytes, n_tail, block_rows), .block_rows = block_rows};
    /* In one piece, but not in order: a block's neighbour in memory is not the next of the table. */
    unsigned char *data = blocks ? take(a, (size_t)n_blocks * out->layout.bytes) : NULL;
    for (int i = 0; data && i < n_blocks; i++) blocks[i] = data + (size_t)(n_blocks - 1 - i) * out->layout.bytes;
    out->blocks = blocks;
    return data != NULL;
}

/* Rows packed from floats (n_rows, n + n_tail). */
static bool table_from_floats(arena *a, const ds_kernels *table, ds_row_kind kind, const float *x, int n_rows,
                              int block_rows, int n, int n_tail, ds_row_table *out) {
    float *row = take(a, (size_t)(n + n_tail + 1) * sizeof *row);
    if (!row || !table_new(a, kind, n_rows, block_rows, ds_row_bytes_of(kind, n, n_tail), n_tail, out)) return false;
    for (int i = 0; i < n_rows; i++) {
        const ds_rows to = ds_table_rows(out, i);
        memcpy(row, x + (size_t)i * (size_t)(n + n_tail), (size_t)(n + n_tail) * sizeof *row);
        table->rows_put(&to, 0, n, n_tail, row);
    }
    return true;
}

/* The table from row i on: the start of a block, or anywhere in a table of one. */
static ds_row_table table_from(const ds_row_table *t, int i) {
    ds_row_table from = *t;
    const size_t at = (size_t)(i % t->block_rows);
    from.blocks += i / t->block_rows;
    from.layout.data += at * from.layout.row_bytes, from.layout.scale += at * sizeof(float);
    from.layout.tail += at * from.layout.tail_bytes, from.layout.tail_scale += at * sizeof(float);
    from.layout.sum += at * sizeof(int32_t);
    return from;
}

/* A packed row as floats (n + n_tail); a rotated head stays rotated. */
static void row_to_floats(const ds_rows *rows, int i, int n, int n_tail, float *out) {
    const char *row = (const char *)rows->data + (size_t)i * rows->row_bytes;
    for (int c = 0; c < n + n_tail; c++) {
        if (rows->kind == DS_ROWS_F32) memcpy(out + c, row + (size_t)c * sizeof(float), sizeof(float));
        else if (rows->kind == DS_ROWS_I16)
            out[c] = rows->scale[i] * (float)((const int16_t *)(const void *)row)[ds_row_place16(c)];
        else if (c < n) out[c] = rows->scale[i] * (float)(int8_t)row[ds_row_place8(c)];
        else
            out[c] =
                rows->tail_scale[i] * (float)rows->tail[(size_t)i * ds_row_pad(n_tail) + (size_t)ds_row_place16(c - n)];
    }
}

static PyObject *finish(Py_buffer *buffers, int n, arena *a) {
    for (int i = 0; i < n; i++)
        if (buffers[i].obj) PyBuffer_Release(&buffers[i]);
    drop(a);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* Raises unless the buffer holds exactly this many floats (or int32). */
static bool holds(const Py_buffer *b, const char *name, size_t n) {
    if ((size_t)b->len == n * sizeof(float)) return true;
    return PyErr_Format(PyExc_ValueError, "%s: %zd bytes, expected %zu", name, b->len, n * sizeof(float)), false;
}

static bool positive(int n, const char *name) {
    return n > 0 || (PyErr_Format(PyExc_ValueError, "%s is %d, expected a positive number", name, n), false);
}

PyDoc_STRVAR(pack_doc, "_pack_rows(isa, kind, n, n_tail, x, y): store rows x (?, n + n_tail) as the kind and read them "
                       "back into y; the heads of 'q8_0' rows come back rotated.");

static PyObject *py_pack_rows(PyObject *self, PyObject *args) {
    Py_buffer b[2] = {{0}};
    arena a = {0};
    const char *isa, *name;
    const ds_kernels *table;
    ds_row_kind kind;
    ds_row_table rows;
    int n, n_tail;
    if (!PyArg_ParseTuple(args, "ssiiy*w*:_pack_rows", &isa, &name, &n, &n_tail, &b[0], &b[1])) return finish(b, 2, &a);
    if (!(table = find_isa(isa)) || !find_kind(name, &kind) || !positive(n, "n") || n_tail < 0) return finish(b, 2, &a);
    const size_t width = (size_t)(n + n_tail), n_rows = (size_t)b[0].len / sizeof(float) / width;
    if (holds(&b[0], "x", n_rows * width) && holds(&b[1], "y", n_rows * width) &&
        table_from_floats(&a, table, kind, b[0].buf, (int)n_rows, (int)n_rows + 1, n, n_tail, &rows))
        for (size_t i = 0; i < n_rows; i++) {
            const ds_rows row = ds_table_rows(&rows, (int)i);
            row_to_floats(&row, 0, n, n_tail, (float *)b[1].buf + i * width);
        }
    return finish(b, 2, &a);
}

PyDoc_STRVAR(rotate_doc, "_rotate(isa, x): the rotation of 'q8_0' rows, in place.");

static PyObject *py_rotate(PyObject *self, PyObject *args) {
    Py_buffer b[1] = {{0}};
    arena a = {0};
    const char *isa;
    if (!PyArg_ParseTuple(args, "sw*:_rotate", &isa, &b[0])) return finish(b, 1, &a);
    const ds_kernels *table = find_isa(isa);
    if (table && b[0].len >= (Py_ssize_t)sizeof(float))
        table->rotate((int)(b[0].len / (Py_ssize_t)sizeof(float)), b[0].buf);
    return finish(b, 1, &a);
}

/* The job's buffers from Python's arrays, then its result back into them. */
static void attend_all(arena *a, const ds_kernels *table, ds_attend *job, const int32_t *cuts, int n_cuts, float scale,
                       const float *q, float *m, float *l, float *acc) {
    const int width = job->n + job->n_tail, padded = ds_attend_pad(job->n_rows);
    const ds_row_table keys = job->keys, values = job->values;
    const ds_row_kind kind = keys.layout.kind;
    job->ld_acc = ds_row_pad(job->v_dim);
    float *row = take(a, (size_t)width * sizeof *row);
    void *pack = take(a, ds_query_bytes(kind, padded, job->n, job->n_tail));
    job->m = take(a, (size_t)padded * sizeof(float));
    job->l = take(a, (size_t)padded * sizeof(float));
    job->acc = take(a, (size_t)padded * job->ld_acc * sizeof(float));
    job->scratch = take(a, ds_attend_scratch(job->n_rows));
    if (PyErr_Occurred()) return;
    for (int i = 0; i < job->n_rows; i++) {
        memcpy(row, q + (size_t)i * (size_t)width, (size_t)width * sizeof *row);
        table->query_put(kind, i, padded, job->n, job->n_tail, row, scale, pack);
        job->m[i] = -INFINITY;
    }
    job->q = pack;
    for (int i = 0; i + 1 < n_cuts; i++) {
        job->first_pos = cuts[i];
        job->n_pos = cuts[i + 1] - cuts[i];
        if (!job->n_pos) continue;
        job->keys = table_from(&keys, cuts[i]);
        if (values.blocks) job->values = table_from(&values, cuts[i]);
        table->attend(job);
    }
    for (int i = 0; i < job->n_rows; i++) {
        float *out = job->acc + (size_t)i * job->ld_acc;
        if (kind == DS_ROWS_Q8) table->rotate(job->v_dim, out);
        m[i] = job->m[i], l[i] = job->l[i];
        memcpy(acc + (size_t)i * (size_t)job->v_dim, out, (size_t)job->v_dim * sizeof *out);
    }
}

/* The rows of a block for a table of n_pos rows: 0 asks for one block. 0 with an exception where a table cannot be so. */
static int block_rows_of(int block, size_t n_pos, const int32_t *cuts, int n_cuts) {
    bool whole = block >= 0 && block % DS_ROW_PAD == 0;
    for (int i = 0; whole && block && i + 1 < n_cuts; i++) whole = cuts[i] % block == 0;
    if (!whole)
        PyErr_Format(PyExc_ValueError, "blocks of %d rows: expected 0, or a multiple of 64 that cuts keep", block);
    return !whole ? 0 : block ? block : (int)n_pos;
}

PyDoc_STRVAR(
    attend_doc,
    "_attend(isa, kind, n, n_tail, v_dim, scale, block, q, keys, values, visible, cuts, m, l, acc): queries q "
    "(rows, n + n_tail) over keys (positions, n + n_tail), and values (positions, v_dim) or None for the keys' "
    "first v_dim values, in the pieces that cuts (int32: 0, ..., positions) make; visible (rows) int32 or None. "
    "block: rows that lie together, 0 for all. Fills m, l (rows) and acc (rows, v_dim).");

static PyObject *py_attend(PyObject *self, PyObject *args) {
    Py_buffer b[8] = {{0}};
    arena a = {0};
    const char *isa, *name;
    float scale;
    int block, block_rows;
    ds_attend job = {0};
    ds_row_kind kind;
    if (!PyArg_ParseTuple(args, "ssiiifiy*y*z*z*y*w*w*w*:_attend", &isa, &name, &job.n, &job.n_tail, &job.v_dim, &scale,
                          &block, &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7]))
        return finish(b, 8, &a);
    const ds_kernels *table = find_isa(isa);
    if (!table || !find_kind(name, &kind) || !positive(job.n, "n") || !positive(job.v_dim, "v_dim") || job.n_tail < 0)
        return finish(b, 8, &a);
    const size_t width = (size_t)(job.n + job.n_tail), n_rows = (size_t)b[0].len / sizeof(float) / width,
                 n_pos = (size_t)b[1].len / sizeof(float) / width;
    const size_t v_dim = (size_t)job.v_dim;
    const int32_t *cuts = b[4].buf;
    const int n_cuts = (int)(b[4].len / (Py_ssize_t)sizeof *cuts);
    job.n_rows = (int)n_rows;
    if (!holds(&b[0], "q", n_rows * width) || !holds(&b[1], "keys", n_pos * width) || !positive((int)n_rows, "rows") ||
        !positive((int)n_pos, "positions") || (b[2].buf && !holds(&b[2], "values", n_pos * v_dim)) ||
        (b[3].buf && !holds(&b[3], "visible", n_rows)) || !holds(&b[5], "m", n_rows) || !holds(&b[6], "l", n_rows) ||
        !holds(&b[7], "acc", n_rows * v_dim))
        return finish(b, 8, &a);
    bool ordered = n_cuts > 1 && cuts[0] == 0 && cuts[n_cuts - 1] == (int)n_pos;
    for (int i = 0; ordered && i + 1 < n_cuts; i++) ordered = cuts[i] <= cuts[i + 1];
    if (!ordered || (!b[2].buf && job.v_dim > job.n)) {
        PyErr_SetString(PyExc_ValueError, "cuts do not run from 0 to the number of positions, or v_dim is over n");
        return finish(b, 8, &a);
    }
    if (b[3].buf) {
        int32_t *visible = take(&a, (size_t)ds_attend_pad(job.n_rows) * sizeof *visible);
        if (!visible) return finish(b, 8, &a);
        memcpy(visible, b[3].buf, (size_t)b[3].len);
        job.visible = visible;
    }
    if ((block_rows = block_rows_of(block, n_pos, cuts, n_cuts)) &&
        table_from_floats(&a, table, kind, b[1].buf, (int)n_pos, block_rows, job.n, job.n_tail, &job.keys) &&
        (!b[2].buf || table_from_floats(&a, table, kind, b[2].buf, (int)n_pos, block_rows, job.v_dim, 0, &job.values)))
        attend_all(&a, table, &job, cuts, n_cuts, scale, b[0].buf, b[5].buf, b[6].buf, b[7].buf);
    return finish(b, 8, &a);
}

PyDoc_STRVAR(
    expand_doc,
    "_expand(isa, kind, rank, n_tail, k_dim, v_dim, block, latents, k_b, v_b, keys, values): keys (positions, k_dim + "
    "n_tail) and values (positions, v_dim) of latents (positions, rank + n_tail), `block` of them together (0: all), "
    "by "
    "k_b (rank, k_dim) and v_b (v_dim, rank); those of 'q8_0' come out rotated.");

static PyObject *py_expand(PyObject *self, PyObject *args) {
    Py_buffer b[5] = {{0}};
    arena a = {0};
    const char *isa, *name;
    ds_expand job = {0};
    ds_row_kind kind;
    int block, block_rows;
    if (!PyArg_ParseTuple(args, "ssiiiiiy*y*y*w*w*:_expand", &isa, &name, &job.rank, &job.n_tail, &job.k_dim,
                          &job.v_dim, &block, &b[0], &b[1], &b[2], &b[3], &b[4]))
        return finish(b, 5, &a);
    const ds_kernels *table = find_isa(isa);
    if (!table || !find_kind(name, &kind) || !positive(job.rank, "rank") || !positive(job.k_dim, "k_dim") ||
        !positive(job.v_dim, "v_dim") || job.n_tail < 0)
        return finish(b, 5, &a);
    const size_t rank = (size_t)job.rank, width = rank + (size_t)job.n_tail,
                 n_pos = (size_t)b[0].len / sizeof(float) / width;
    const size_t k_dim = (size_t)job.k_dim, v_dim = (size_t)job.v_dim, k_width = k_dim + (size_t)job.n_tail;
    if (!holds(&b[0], "latents", n_pos * width) || !holds(&b[1], "k_b", rank * k_dim) ||
        !holds(&b[2], "v_b", rank * v_dim) || !holds(&b[3], "keys", n_pos * k_width) ||
        !holds(&b[4], "values", n_pos * v_dim) || !positive((int)n_pos, "positions"))
        return finish(b, 5, &a);
    const int tail = kind == DS_ROWS_Q8 ? job.n_tail : 0, head = (int)k_width - tail;
    const size_t floats = ds_expand_ld(job.k_dim, job.n_tail, job.v_dim) * sizeof(float);
    ds_expand_weights weights = {.from = kind, .rank = job.rank, .k_dim = job.k_dim, .v_dim = job.v_dim};
    weights.k_b = take(&a, (size_t)b[1].len);
    weights.v_b = take(&a, (size_t)b[2].len);
    weights.scratch = take(&a, DS_ATTEND_ROWS * rank * sizeof(float));
    weights.out = take(&a, ds_expand_weights_bytes(kind, job.rank, job.k_dim, job.v_dim));
    job.scratch = take(&a, ds_expand_scratch(kind, job.k_dim, job.n_tail, job.v_dim));
    const bool padded = kind == DS_ROWS_F32; /* there is room for padded columns */
    ds_row_table latents, keys, values;
    if (block > 0 && block % DS_ATTEND_BLOCK && DS_ATTEND_BLOCK % block)
        PyErr_Format(PyExc_ValueError, "blocks of %d rows do not keep pieces of %d", block, DS_ATTEND_BLOCK);
    if (PyErr_Occurred() || !(block_rows = block_rows_of(block, n_pos, NULL, 0)) ||
        !table_new(&a, kind, DS_ATTEND_BLOCK, DS_ATTEND_BLOCK, padded ? floats : ds_row_bytes_of(kind, head, tail),
                   tail, &keys) ||
        !table_new(&a, kind, DS_ATTEND_BLOCK, DS_ATTEND_BLOCK, padded ? floats : ds_row_bytes_of(kind, job.v_dim, 0), 0,
                   &values) ||
        !table_from_floats(&a, table, kind, b[0].buf, (int)n_pos, block_rows, job.rank, job.n_tail, &latents))
        return finish(b, 5, &a);
    job.keys = ds_table_rows(&keys, 0), job.values = ds_table_rows(&values, 0);
    memcpy(weights.k_b, b[1].buf, (size_t)b[1].len);
    memcpy(weights.v_b, b[2].buf, (size_t)b[2].len);
    table->expand_weights(&weights);
    job.weights = weights.out;
    for (int at = 0; at < (int)n_pos; at += DS_ATTEND_BLOCK) {
        job.n_pos = (int)n_pos - at < DS_ATTEND_BLOCK ? (int)n_pos - at : DS_ATTEND_BLOCK;
        job.latents = table_from(&latents, at);
        table->expand(&job);
        for (int i = 0; i < job.n_pos; i++) {
            row_to_floats(&job.keys, i, head, tail, (float *)b[3].buf + (size_t)(at + i) * k_width);
            row_to_floats(&job.values, i, job.v_dim, 0, (float *)b[4].buf + (size_t)(at + i) * v_dim);
        }
    }
    return finish(b, 5, &a);
}

PyMethodDef ds_py_attention_methods[] = {
    {"_pack_rows", py_pack_rows, METH_VARARGS, pack_doc},
    {"_rotate", py_rotate, METH_VARARGS, rotate_doc},
    {"_attend", py_attend, METH_VARARGS, attend_doc},
    {"_expand", py_expand, METH_VARARGS, expand_doc},
    {NULL, NULL, 0, NULL},
};
