/* cache.h: blocks of the caches (memory/kv.h) as a GPU has them: copies of the host's, for the layers whose attention it
 * computes. The host's blocks are the truth: a step's rows go to both, what else is written to a block makes it another one
 * (ds_blocks_serial), and a copy that is not there, or holds fewer rows than are needed, is made anew. */
#pragma once

#include "backend/vulkan/gpu.h"
#include "memory/kv.h"

enum { DS_CACHE_CHUNK = 64 << 20 /* bytes that the copies grow by */ };

typedef struct ds_gpu_block {
    uint64_t serial; /* of the host's block; 0: free */
    uint64_t address;
    int chunk;
    uint64_t at; /* in it */
    int n_same; /* positions from the first on that are as the host's */
    uint64_t used; /* the last step that needed it */
    int next; /* of those with the same hash, or -1 */
} ds_gpu_block;

/* Of one type of cache. */
typedef struct ds_gpu_cache {
    uint64_t offset, bytes; /* of a block that is copied: from there on, so many */
    ds_gpu_buffer *chunks;
    int n_chunks;
    ds_gpu_block *blocks;
    int n_blocks, *heads, n_heads; /* a power of two */
    uint64_t step;
} ds_gpu_cache;

/* Of layers [begin, end) of the caches of a store. */
void ds_gpu_cache_create(const ds_kv_store *store, int begin, int end, ds_gpu_cache *out);
void ds_gpu_cache_release(ds_gpu *gpu, ds_gpu_cache *cache);
/* A step begins: what it asks for from here on stays until the next one begins. */
void ds_gpu_cache_step(ds_gpu_cache *cache);
/* The copy of block i of a cache in which positions below n (of the block) are as the host's; what is behind them is about
 * to be written. n -1: the copy as it is, which this step has had already. */
ds_status ds_gpu_cache_get(ds_gpu *gpu, ds_gpu_cache *cache, const ds_kv *kv, int i, int n, uint64_t *address,
                           ds_error *err);
/* Positions below n of a block are the same in both now. */
void ds_gpu_cache_same(ds_gpu_cache *cache, const ds_kv *kv, int i, int n);
