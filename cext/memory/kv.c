#include "memory/kv.h"

#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    ds_row_kind kind;
} TYPES[DS_KV_TYPES] = {
    [DS_KV_F16] = {"f16", DS_ROWS_I16},
    [DS_KV_Q8_0] = {"q8_0", DS_ROWS_Q8},
    [DS_KV_F32] = {"f32", DS_ROWS_F32},
};

_Static_assert(DS_KV_BLOCK % DS_ROW_PAD == 0, "a table's blocks are of whole row groups");

enum { IDS_BYTES = DS_KV_BLOCK * sizeof(int32_t) /* at a block's start */ };

bool ds_kv_type_from_name(const char *name, ds_kv_type *out) {
    for (int i = 0; i < DS_KV_TYPES; i++) {
        if (strcmp(TYPES[i].name, name) == 0) return *out = (ds_kv_type)i, true;
    }
    return false;
}

const char *ds_kv_type_name(ds_kv_type type) { return TYPES[type].name; }

/* ---- The store ---- */

/* A layout moved within its block. */
static ds_row_layout moved(ds_row_layout l, size_t by) {
    l.data += by, l.scale += by, l.tail += by, l.tail_scale += by, l.sum += by;
    return l;
}

void ds_kv_store_create(ds_kv_type type, int n_layer, const ds_cache_rows *rows, int n_rows, ds_kv_store *out) {
    const ds_row_kind kind = TYPES[type].kind;
    *out = (ds_kv_store){.type = type, .n_layer = n_layer, .n_rows = n_rows};
    for (int i = 0; i < n_rows; i++) {
        const ds_row_layout l =
            ds_row_layout_of(kind, ds_row_bytes_of(kind, rows[i].n, rows[i].n_tail), rows[i].n_tail, DS_KV_BLOCK);
        out->rows[i] = rows[i];
        out->layouts[i] = moved(l, IDS_BYTES + out->layer_bytes);
        out->layer_bytes += (size_t)rows[i].count * l.bytes;
    }
    out->block_bytes = IDS_BYTES + (size_t)n_layer * out->layer_bytes;
    ds_blocks_create(out->block_bytes, &out->blocks);
}

void ds_kv_store_release(ds_kv_store *store) {
    ds_blocks_release(&store->blocks);
    *store = (ds_kv_store){0};
}

static int blocks_for(int n_pos) { return (n_pos + DS_KV_BLOCK - 1) / DS_KV_BLOCK; }

size_t ds_kv_bytes(const ds_kv_store *store, int n_ctx) {
    return (size_t)store->n_layer * store->layer_bytes / DS_KV_BLOCK * (size_t)n_ctx;
}

/* ---- A cache ---- */

ds_status ds_kv_create(ds_kv_store *store, int n_ctx, ds_kv *out, ds_error *err) {
    unsigned char **blocks = calloc((size_t)blocks_for(n_ctx), sizeof *blocks);
    if (!blocks) return ds_fail(err, DS_ENOMEM, "no memory for the table of a context of %d tokens", n_ctx);
    *out = (ds_kv){.store = store, .n_ctx = n_ctx, .blocks = blocks};
    return DS_OK;
}

void ds_kv_release(ds_kv *kv) {
    if (kv->blocks) ds_kv_truncate(kv, 0);
    free(kv->blocks);
    *kv = (ds_kv){0};
}

void ds_kv_truncate(ds_kv *kv, int n) {
    while (kv->n_blocks > blocks_for(n)) ds_blocks_drop(&kv->store->blocks, kv->blocks[--kv->n_blocks]);
}

static ds_status no_memory(const ds_kv *kv, ds_error *err) {
    ds_fail(err, DS_ENOMEM, "no memory for another %d tokens of context (%.1f MiB)", (int)DS_KV_BLOCK,
            (double)kv->store->blocks.stride / (1 << 20));
    return ds_hint(err, "close other sessions, or ask for a smaller context");
}

/* A block of its own in place of one that others hold too. */
static ds_status own_block(ds_kv *kv, int i, ds_error *err) {
    ds_blocks *pool = &kv->store->blocks;
    if (ds_blocks_sole(pool, kv->blocks[i])) return DS_OK;
    unsigned char *copy = ds_blocks_take(pool);
    if (!copy) return no_memory(kv, err);
    memcpy(copy, kv->blocks[i], kv->store->block_bytes);
    ds_blocks_drop(pool, kv->blocks[i]);
    kv->blocks[i] = copy;
    return DS_OK;
}

static ds_status add_block(ds_kv *kv, ds_error *err) {
    unsigned char *block = ds_blocks_take(&kv->store->blocks);
    if (!block) return no_memory(kv, err);
    kv->blocks[kv->n_blocks++] = block;
    return DS_OK;
}

ds_status ds_kv_reserve(ds_kv *kv, int begin, int end, ds_error *err) {
    ds_status st = begin % DS_KV_BLOCK ? own_block(kv, begin / DS_KV_BLOCK, err) : DS_OK;
    while (st == DS_OK && kv->n_blocks < blocks_for(end)) st = add_block(kv, err);
    if (st != DS_OK) ds_kv_truncate(kv, begin);
    return st;
}

ds_status ds_kv_fork(const ds_kv *kv, int n, ds_kv *out, ds_error *err) {
    ds_kv fork;
    ds_status st = ds_kv_create(kv->store, kv->n_ctx, &fork, err);
    if (st != DS_OK) return st;
    for (; fork.n_blocks < blocks_for(n); fork.n_blocks++) {
        fork.blocks[fork.n_blocks] = kv->blocks[fork.n_blocks];
        ds_blocks_share(&kv->store->blocks, kv->blocks[fork.n_blocks]);
    }
    *out = fork;
    return DS_OK;
}

/* ---- Rows ---- */

ds_row_table ds_kv_table(const ds_kv *kv, int il, int which, int head, int pos) {
    const ds_kv_store *store = kv->store;
    const size_t at = (size_t)il * store->layer_bytes + (size_t)head * store->layouts[which].bytes;
    return (ds_row_table){.layout = moved(store->layouts[which], at),
                          .blocks = kv->blocks + pos / DS_KV_BLOCK,
                          .block_rows = DS_KV_BLOCK};
}

ds_rows ds_kv_row(const ds_kv *kv, int il, int which, int head, int pos) {
    const ds_row_table table = ds_kv_table(kv, il, which, head, 0);
    return ds_table_rows(&table, pos);
}

int32_t *ds_kv_ids(const ds_kv *kv, int pos) {
    return (int32_t *)(void *)kv->blocks[pos / DS_KV_BLOCK] + pos % DS_KV_BLOCK;
}

/* Copy n rows from row `from` of a block to row `to` of another; the parts that a kind lacks are of no bytes. */
static void copy_rows(const ds_row_layout *l, const unsigned char *in, int from, unsigned char *out, int to, int n) {
    const size_t scaled = l->kind != DS_ROWS_F32, split = l->kind == DS_ROWS_Q8;
    const struct {
        size_t at, bytes;
    } PARTS[] = {{l->data, l->row_bytes},
                 {l->scale, scaled * sizeof(float)},
                 {l->tail, l->tail_bytes},
                 {l->tail_scale, split * sizeof(float)},
                 {l->sum, split * sizeof(int32_t)}};
    for (size_t i = 0; i < sizeof PARTS / sizeof *PARTS; i++)
        memcpy(out + PARTS[i].at + (size_t)to * PARTS[i].bytes, in + PARTS[i].at + (size_t)from * PARTS[i].bytes,
               (size_t)n * PARTS[i].bytes);
}

/* Copy everything that is kept of n positions. */
static void copy_positions(const ds_kv_store *store, const unsigned char *in, int from, unsigned char *out, int to,
                           int n) {
    memcpy((int32_t *)(void *)out + to, (const int32_t *)(const void *)in + from, (size_t)n * sizeof(int32_t));
    for (int il = 0; il < store->n_layer; il++)
        for (int which = 0; which < store->n_rows; which++)
            for (int head = 0; head < store->rows[which].count; head++) {
                const size_t at = (size_t)il * store->layer_bytes + (size_t)head * store->layouts[which].bytes;
                const ds_row_layout l = moved(store->layouts[which], at);
                copy_rows(&l, in, from, out, to, n);
            }
}

void ds_kv_repeat(ds_kv *kv, int n, int n_pos) {
    for (int pos = n, run; pos < n_pos; pos += run) {
        const int from = pos % n, in_from = DS_KV_BLOCK - from % DS_KV_BLOCK, in_to = DS_KV_BLOCK - pos % DS_KV_BLOCK;
        run = n_pos - pos;
        if (run > n - from) run = n - from;
        if (run > in_from) run = in_from;
        if (run > in_to) run = in_to;
        ds_blocks_renew(kv->blocks[pos / DS_KV_BLOCK]);
        copy_positions(kv->store, kv->blocks[from / DS_KV_BLOCK], from % DS_KV_BLOCK, kv->blocks[pos / DS_KV_BLOCK],
                       pos % DS_KV_BLOCK, run);
    }
}

/* ---- Outside of memory ---- */

void ds_kv_block_save(const ds_kv *kv, int block, int n, unsigned char *out) {
    memset(out, 0, kv->store->block_bytes); /* what a forgotten position held is nobody's business */
    copy_positions(kv->store, kv->blocks[block], 0, out, 0, n);
}

ds_status ds_kv_block_load(ds_kv *kv, const unsigned char *content, ds_error *err) {
    ds_status st = add_block(kv, err);
    if (st == DS_OK) memcpy(kv->blocks[kv->n_blocks - 1], content, kv->store->block_bytes);
    return st;
}
