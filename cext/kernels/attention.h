/* attention.h: the contract of latent attention: rows of a cache, queries over them, keys and values expanded of them.
 *
 * A cache's rows come in blocks, which a job walks by itself: which blocks are whose is not the kernels' affair.
 * Rows, packs and scratch have the same size on every ISA, and packed rows the same bytes, given the same scale; how a
 * query pack is laid out is the table's own affair. Integer sums are bit-equal on every ISA. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    DS_ROW_PAD = 64,          /* packed rows are padded with zeros to a multiple of this many values */
    DS_ATTEND_ROWS = 16,      /* buffers over query rows are padded to a multiple of this many */
    DS_ATTEND_BLOCK = 128,    /* positions scored at a time, and the most that one job expands */
    DS_ATTEND_BLOCK_Q8 = 256, /* scored over int8 rows: used where they lie, a larger block costs no room */
    DS_ATTEND_SHARE = 64,     /* of these, those whose int8 weights share a scale */
    DS_EXPAND_COLS = 32,      /* columns of expanded rows are padded to a multiple of this many */
};

/* How a row of a head and a tail (latent and rotary key) lies in memory. */
typedef enum ds_row_kind {
    DS_ROWS_F32, /* floats; products in float */
    DS_ROWS_I16, /* int16 and a scale: no product of two rows leaves 31 bits, and steps are on the whole finer than a half's */
    DS_ROWS_Q8, /* the head rotated, in int8 with a scale; the tail an I16 row of its own: keys suffer most there */
} ds_row_kind;

typedef struct ds_rows {
    ds_row_kind kind;
    void *data;
    size_t row_bytes;
    float *scale; /* one a row; NULL for F32 */
    int16_t *tail; /* Q8: (rows, padded tail) */
    float *tail_scale; /* Q8 */
    int32_t *sum; /* Q8: of the row's int8 values */
} ds_rows;

/* Where value i of an int16 row, or of an int8 row, is kept: the order that vectors' packing instructions make, and
 * that pairing two rows undoes for nothing. */
static inline int ds_row_place16(int i) { return i / 32 * 32 + i % 16 / 4 * 8 + i % 32 / 16 * 4 + i % 4; }
static inline int ds_row_place8(int i) { return i / 64 * 64 + i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4; }

static inline size_t ds_row_pad(int n) { return ((size_t)n + DS_ROW_PAD - 1) / DS_ROW_PAD * DS_ROW_PAD; }
static inline int ds_attend_pad(int n_rows) { return (n_rows + DS_ATTEND_ROWS - 1) / DS_ATTEND_ROWS * DS_ATTEND_ROWS; }

/* Bytes of a row's head part, or of the whole row where the kind keeps no separate tail. */
static inline size_t ds_row_bytes_of(ds_row_kind kind, int n, int n_tail) {
    if (kind == DS_ROWS_F32) return (size_t)(n + n_tail) * sizeof(float);
    return kind == DS_ROWS_I16 ? ds_row_pad(n + n_tail) * sizeof(int16_t) : ds_row_pad(n);
}

/* The same rows from row i on. */
static inline ds_rows ds_rows_from(const ds_rows *rows, int i, int n_tail) {
    ds_rows r = *rows;
    r.data = (char *)r.data + (size_t)i * r.row_bytes;
    if (r.scale) r.scale += i;
    if (r.tail) r.tail += (size_t)i * ds_row_pad(n_tail);
    if (r.tail_scale) r.tail_scale += i;
    if (r.sum) r.sum += i;
    return r;
}

/* Where the parts of a block of rows lie in it, in bytes, each on cache lines of its own. */
typedef struct ds_row_layout {
    ds_row_kind kind;
    size_t row_bytes, tail_bytes; /* of one row */
    size_t data, scale, tail, tail_scale, sum;
    size_t bytes; /* of the block */
} ds_row_layout;

static inline size_t ds_row_part(size_t at, size_t n_bytes) { return (at + n_bytes + 63) / 64 * 64; }

/* Of n_rows rows; row_bytes is ds_row_bytes_of, or more. */
static inline ds_row_layout ds_row_layout_of(ds_row_kind kind, size_t row_bytes, int n_tail, int n_rows) {
    const size_t n = (size_t)n_rows, scaled = kind != DS_ROWS_F32, split = kind == DS_ROWS_Q8;
    ds_row_layout l = {.kind = kind, .row_bytes = row_bytes};
    l.tail_bytes = split * ds_row_pad(n_tail) * sizeof(int16_t);
    l.scale = ds_row_part(l.data, n * row_bytes);
    l.tail = ds_row_part(l.scale, n * scaled * sizeof(float));
    l.tail_scale = ds_row_part(l.tail, n * l.tail_bytes);
    l.sum = ds_row_part(l.tail_scale, n * split * sizeof(float));
    l.bytes = ds_row_part(l.sum, n * split * sizeof(int32_t));
    return l;
}

/* The rows of a block from row i on; the block is aligned as its parts want to be: to 64 bytes. */
static inline ds_rows ds_rows_at(const ds_row_layout *l, unsigned char *block, int i) {
    const size_t at = (size_t)i;
    ds_rows r = {.kind = l->kind, .data = block + l->data + at * l->row_bytes, .row_bytes = l->row_bytes};
    if (l->kind != DS_ROWS_F32) r.scale = (float *)(void *)(block + l->scale) + at;
    if (l->kind != DS_ROWS_Q8) return r;
    r.tail = (int16_t *)(void *)(block + l->tail + at * l->tail_bytes);
    r.tail_scale = (float *)(void *)(block + l->tail_scale) + at;
    r.sum = (int32_t *)(void *)(block + l->sum) + at;
    return r;
}

/* Rows in blocks: row i is row i % block_rows of block i / block_rows. Where there are several, block_rows is a multiple
 * of DS_ROW_PAD. */
typedef struct ds_row_table {
    ds_row_layout layout;
    unsigned char *const *blocks; /* enough for the rows in use */
    int block_rows;
} ds_row_table;

/* The rows from row i on, as far as its block goes. */
static inline ds_rows ds_table_rows(const ds_row_table *t, int i) {
    return ds_rows_at(&t->layout, t->blocks[i / t->block_rows], i % t->block_rows);
}

/* Of rows [i, end), how many lie in one block with row i. */
static inline int ds_table_run(const ds_row_table *t, int i, int end) {
    const int left = t->block_rows - i % t->block_rows;
    return end - i < left ? end - i : left;
}

/* Bytes of a pack of n_rows queries (a multiple of DS_ATTEND_ROWS), linear in n_rows. */
static inline size_t ds_query_bytes(ds_row_kind kind, int n_rows, int n, int n_tail) {
    size_t dwords = 2; /* scales */
    if (kind == DS_ROWS_F32) dwords += (size_t)(n + n_tail);
    else if (kind == DS_ROWS_Q8) dwords += ds_row_pad(n) / 4 + ds_row_pad(n_tail) / 2;
    else dwords += ds_row_pad(n + n_tail) / 2;
    return (size_t)n_rows * dwords * 4;
}

/* Query rows attend over n_pos rows: score = q . key, then an online softmax update of the running maximum m, the sum l
 * and acc = sum e^(score - m) * value. Scores, and m with them, are kept times log2 e, as exponents of 2. The caller
 * starts with m = -INFINITY, l = 0, acc = 0. Buffers over query rows, the pack included, are padded to DS_ATTEND_ROWS;
 * what stands in the padding is read and written, and means nothing. */
typedef struct ds_attend {
    int n_rows, n_pos;
    int n, n_tail; /* of a key: 512 and 64 over latents, 128 and 64 over expanded keys */
    int v_dim;
    const void *q; /* pack of n_rows queries; the scores' scale is in it */
    ds_row_table keys;
    ds_row_table values; /* blocks NULL: the first v_dim values of the keys */
    const int32_t *visible; /* (n_rows): a row sees the positions below this; NULL: all */
    int first_pos; /* the first key's position */
    float *m, *l; /* (n_rows) */
    float *acc; /* (n_rows, ld_acc), ld_acc at least v_dim padded; over Q8 values it is rotated as they are */
    size_t ld_acc;
    void *scratch; /* ds_attend_scratch */
    bool ready; /* the first block of keys is likely to be in cache */
    ds_row_table next; /* keys of the job to come, n_next of them: their first block is brought there meanwhile */
    int n_next;
} ds_attend;

static inline size_t ds_attend_scratch(int n_rows) {
    size_t per_row = DS_ATTEND_BLOCK_Q8 + 1 + DS_ATTEND_BLOCK_Q8 / DS_ATTEND_SHARE;
    return (size_t)ds_attend_pad(n_rows) * per_row * sizeof(float);
}

/* W_uk and W_uv of one head, packed for ds_expand. */
typedef struct ds_expand_weights {
    ds_row_kind from; /* the kind of the latents */
    int rank, k_dim, v_dim;
    float *k_b, *v_b; /* (rank, k_dim), (v_dim, rank); overwritten */
    float *scratch; /* (DS_ATTEND_ROWS, rank) */
    void *out; /* ds_expand_weights_bytes */
} ds_expand_weights;

static inline size_t ds_expand_cols(int n) {
    return ((size_t)n + DS_EXPAND_COLS - 1) / DS_EXPAND_COLS * DS_EXPAND_COLS;
}

static inline size_t ds_expand_weights_bytes(ds_row_kind from, int rank, int k_dim, int v_dim) {
    size_t dwords = from == DS_ROWS_F32 ? (size_t)rank : ds_row_pad(rank) / (from == DS_ROWS_Q8 ? 4 : 2);
    return (ds_expand_cols(k_dim) + ds_expand_cols(v_dim)) * (dwords + 1) * 4;
}

/* Keys (W_uk c | rotary key) and values W_uv c of one head at n_pos <= DS_ATTEND_BLOCK positions. */
typedef struct ds_expand {
    int n_pos, rank, n_tail, k_dim, v_dim;
    const void *weights; /* packed */
    ds_row_table latents;
    ds_rows keys, values; /* rows to fill, of the latents' kind; F32 rows have room for the padded columns */
    void *scratch; /* ds_expand_scratch */
} ds_expand;

/* Floats between expanded rows, while they are floats. */
static inline size_t ds_expand_ld(int k_dim, int n_tail, int v_dim) {
    size_t k = ds_expand_cols(k_dim), whole = (size_t)(k_dim + n_tail), v = ds_row_pad(v_dim);
    size_t most = k > whole ? k : whole;
    return most > v ? most : v;
}

static inline size_t ds_expand_scratch(ds_row_kind from, int k_dim, int n_tail, int v_dim) {
    return from == DS_ROWS_F32 ? 0 : DS_ATTEND_BLOCK * ds_expand_ld(k_dim, n_tail, v_dim) * sizeof(float);
}
