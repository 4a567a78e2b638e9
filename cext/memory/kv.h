/* kv.h: the caches of sequences. A cache is a table of blocks, each of DS_KV_BLOCK positions in all layers with their token
 * ids, out of the store of its model and type; sequences with a common past hold the same blocks. Knows no attention:
 * what a layer keeps of a position is told to the store. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arch/attention.h"
#include "base/status.h"
#include "kernels/kernels.h"
#include "memory/blocks.h"

typedef enum ds_kv_type { DS_KV_F16, DS_KV_Q8_0, DS_KV_F32, DS_KV_TYPES } ds_kv_type;

enum {
    DS_KV_BLOCK = 64, /* positions of a block: with f16 rows of V2-Lite's 27 layers, a huge page */
};

/* What the caches of one model and type have in common, and their memory. */
typedef struct ds_kv_store {
    ds_kv_type type;
    int n_layer, n_rows;
    ds_cache_rows rows[DS_CACHE_ROWS];
    ds_row_layout layouts[DS_CACHE_ROWS]; /* of one of the count, in layer 0 of a block */
    size_t layer_bytes, block_bytes;
    ds_blocks blocks;
} ds_kv_store;

typedef struct ds_kv {
    ds_kv_store *store;
    int n_ctx, n_blocks;
    unsigned char **blocks; /* (n_ctx / DS_KV_BLOCK, rounded up), of which n_blocks are held */
} ds_kv;

/* The type of that name; false for another name. */
bool ds_kv_type_from_name(const char *name, ds_kv_type *out);
const char *ds_kv_type_name(ds_kv_type type);

/* Takes no memory before the first block. Release it after its caches. */
void ds_kv_store_create(ds_kv_type type, int n_layer, const ds_cache_rows *rows, int n_rows, ds_kv_store *out);
void ds_kv_store_release(ds_kv_store *store);
/* Of n_ctx positions' rows. */
size_t ds_kv_bytes(const ds_kv_store *store, int n_ctx);

/* An empty cache with room for n_ctx positions; memory comes as it fills. */
ds_status ds_kv_create(ds_kv_store *store, int n_ctx, ds_kv *out, ds_error *err);
void ds_kv_release(ds_kv *kv);

/* Make positions [begin, end) its own to write, begin being how many it holds: new blocks, and a copy of the last one
 * where others hold that too. On failure it holds what it held. */
ds_status ds_kv_reserve(ds_kv *kv, int begin, int end, ds_error *err);
/* Drop all but the first n positions. */
void ds_kv_truncate(ds_kv *kv, int n);
/* A cache that shares the first n positions with this one. Nobody writes to this one meanwhile. */
ds_status ds_kv_fork(const ds_kv *kv, int n, ds_kv *out, ds_error *err);
/* Positions [n, n_pos), reserved, become those of [0, n), over and over; n is at least 1. */
void ds_kv_repeat(ds_kv *kv, int n, int n_pos);

/* Rows `head` of sort `which` in layer il, from position pos on, a multiple of DS_KV_BLOCK. */
ds_row_table ds_kv_table(const ds_kv *kv, int il, int which, int head, int pos);
/* The one row of any position. */
ds_rows ds_kv_row(const ds_kv *kv, int il, int which, int head, int pos);
/* The token ids from position pos on, as far as its block goes. */
int32_t *ds_kv_ids(const ds_kv *kv, int pos);

/* A block's content outside of memory: block_bytes; the bytes of n <= DS_KV_BLOCK positions, and zeros for the others. */
void ds_kv_block_save(const ds_kv *kv, int block, int n, unsigned char *out);
/* Take it as the next block; the cache holds whole blocks only. */
ds_status ds_kv_block_load(ds_kv *kv, const unsigned char *content, ds_error *err);
