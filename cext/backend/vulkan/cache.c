#include "backend/vulkan/cache.h"

#include <stdlib.h>
#include <string.h>

void ds_gpu_cache_create(const ds_kv_store *store, int begin, int end, ds_gpu_cache *out) {
    *out = (ds_gpu_cache){.offset = store->layouts[0].data + (uint64_t)begin * store->layer_bytes,
                          .bytes = (uint64_t)(end - begin) * store->layer_bytes};
}

void ds_gpu_cache_release(ds_gpu *gpu, ds_gpu_cache *c) {
    for (int i = 0; i < c->n_chunks; i++) ds_gpu_buffer_release(gpu, &c->chunks[i]);
    free(c->chunks);
    free(c->blocks);
    free(c->heads);
    *c = (ds_gpu_cache){0};
}

void ds_gpu_cache_step(ds_gpu_cache *c) { c->step++; }

static int *head_of(const ds_gpu_cache *c, uint64_t serial) {
    return &c->heads[serial * 0x9e3779b97f4a7c15u >> 32 & (uint64_t)(c->n_heads - 1)];
}

static ds_gpu_block *find(const ds_gpu_cache *c, uint64_t serial) {
    for (int i = c->n_heads ? *head_of(c, serial) : -1; i >= 0; i = c->blocks[i].next)
        if (c->blocks[i].serial == serial) return &c->blocks[i];
    return NULL;
}

static void link_block(ds_gpu_cache *c, int i) {
    int *head = head_of(c, c->blocks[i].serial);
    c->blocks[i].next = *head;
    *head = i;
}

static void unlink_block(ds_gpu_cache *c, int i) {
    int *at = head_of(c, c->blocks[i].serial);
    while (*at != i) at = &c->blocks[*at].next;
    *at = c->blocks[i].next;
    c->blocks[i].serial = 0;
}

/* Room for more blocks, all free. */
static ds_status grow(ds_gpu *gpu, ds_gpu_cache *c, ds_error *err) {
    const uint64_t stride = ds_gpu_padded(c->bytes);
    const int more = stride < DS_CACHE_CHUNK ? (int)(DS_CACHE_CHUNK / stride) : 1, all = c->n_blocks + more;
    int n_heads = c->n_heads ? c->n_heads : 64;
    ds_gpu_buffer chunk;
    while (n_heads < all) n_heads *= 2;
    ds_gpu_buffer *chunks = realloc(c->chunks, (size_t)(c->n_chunks + 1) * sizeof *chunks);
    if (chunks) c->chunks = chunks;
    ds_gpu_block *blocks = realloc(c->blocks, (size_t)all * sizeof *blocks);
    if (blocks) c->blocks = blocks;
    int *heads = realloc(c->heads, (size_t)n_heads * sizeof *heads);
    if (heads) c->heads = heads;
    if (!chunks || !blocks || !heads) return ds_fail(err, DS_ENOMEM, "no memory for a table of the cache's blocks");
    const ds_status st = ds_gpu_buffer_new(gpu, stride * (uint64_t)more, DS_GPU_OWN, &chunk, err);
    for (int i = 0; i < more && st == DS_OK; i++)
        blocks[c->n_blocks + i] = (ds_gpu_block){.address = chunk.address + stride * (uint64_t)i,
                                                 .chunk = c->n_chunks,
                                                 .at = stride * (uint64_t)i,
                                                 .next = -1};
    if (st == DS_OK) chunks[c->n_chunks++] = chunk, c->n_blocks = all;
    c->n_heads = n_heads;
    for (int i = 0; i < n_heads; i++) heads[i] = -1;
    for (int i = 0; i < c->n_blocks; i++)
        if (blocks[i].serial) link_block(c, i);
    return st;
}

/* The block that was needed the longest ago, or a free one; -1 where this step needs all. */
static int oldest(const ds_gpu_cache *c) {
    int best = -1;
    for (int i = 0; i < c->n_blocks; i++) {
        const ds_gpu_block *b = &c->blocks[i];
        if (!b->serial) return i;
        if (b->used < c->step && (best < 0 || b->used < c->blocks[best].used)) best = i;
    }
    return best;
}

/* Blocks that are no more are not told of, but are needed no more: they become the oldest. So there is no more memory than
 * for as many as the host ever held, or a step needed. */
static ds_status take(ds_gpu *gpu, ds_gpu_cache *c, ds_kv_store *store, uint64_t serial, ds_gpu_block **out,
                      ds_error *err) {
    int i = oldest(c);
    if (i < 0 || (c->blocks[i].serial && (size_t)c->n_blocks < ds_blocks_count(&store->blocks).n_used)) {
        const ds_status st = grow(gpu, c, err);
        if (st == DS_OK) i = oldest(c);
        else if (i < 0) return st;
    }
    if (c->blocks[i].serial) unlink_block(c, i);
    c->blocks[i].serial = serial;
    c->blocks[i].n_same = 0;
    link_block(c, i);
    *out = &c->blocks[i];
    return DS_OK;
}

ds_status ds_gpu_cache_get(ds_gpu *gpu, ds_gpu_cache *c, const ds_kv *kv, int i, int n, uint64_t *address,
                           ds_error *err) {
    const unsigned char *host = kv->blocks[i];
    const uint64_t serial = ds_blocks_serial(host);
    ds_gpu_block *b = find(c, serial);
    ds_status st = b ? DS_OK : take(gpu, c, kv->store, serial, &b, err);
    if (st != DS_OK) return st;
    b->used = c->step;
    *address = b->address;
    if (n < 0) return DS_OK;
    if (b->n_same < n) {
        st = ds_gpu_write(gpu, &c->chunks[b->chunk], b->at, host + c->offset, c->bytes, err);
        if (st != DS_OK) return st;
    }
    b->n_same = n; /* what is behind is about to be written, here first */
    return DS_OK;
}

void ds_gpu_cache_same(ds_gpu_cache *c, const ds_kv *kv, int i, int n) {
    ds_gpu_block *b = find(c, ds_blocks_serial(kv->blocks[i]));
    if (b && b->n_same < n) b->n_same = n;
}
