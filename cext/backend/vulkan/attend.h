/* attend.h: how caches' rows are told to the shaders of latent attention, and tokens that attend together. */
#pragma once

#include "backend/vulkan/step.h"

/* How a layer's rows of one type of cache are told to shaders. */
typedef struct ds_gpu_layout {
    uint32_t data, scale, tail, tail_scale, sum, row_bytes, tail_bytes;
} ds_gpu_layout;

static inline ds_gpu_layout ds_gpu_layout_of(const ds_kv_store *store) {
    const ds_row_layout *l = &store->layouts[0];
    const size_t base = l->data;
    return (ds_gpu_layout){0,
                           (uint32_t)(l->scale - base),
                           (uint32_t)(l->tail - base),
                           (uint32_t)(l->tail_scale - base),
                           (uint32_t)(l->sum - base),
                           (uint32_t)l->row_bytes,
                           (uint32_t)l->tail_bytes};
}

static inline uint32_t ds_gpu_rows_kind(const ds_kv_store *store) { return (uint32_t)store->layouts[0].kind; }

/* Where a layer's rows begin in the copy of a block. */
static inline uint32_t ds_gpu_layer_at(const ds_gpu_backend *b, const ds_kv_store *store, int il) {
    return (uint32_t)((size_t)(il - b->attend_begin) * store->layer_bytes);
}

/* Tokens [begin, begin + n) of a request, of one type of cache. */
typedef struct ds_gpu_attending {
    const ds_kv_store *store;
    int begin, n;
    int n_pos; /* most that one of them sees */
    bool alone; /* of one sequence, which has DS_GPU_ATTEND_MANY or more */
} ds_gpu_attending;

/* What their queries give, of the heads' values: q to room.heads. At most ds_gpu_attend_together of them. */
ds_status ds_gpu_attend(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, ds_error *err);
/* Whether it takes fewer multiply-adds to make keys and values of the cache for each head first, and there is room for them; */
bool ds_gpu_expands(const ds_gpu_backend *b, const ds_gpu_attending *a);
/* then by these, of any number of tokens. */
ds_status ds_gpu_attend_expanded(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, ds_error *err);
