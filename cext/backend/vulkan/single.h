/* single.h: one shader, one operation of product.h, or copies by threads, run over arrays of the host's, for tests. */
#pragma once

#include "backend/vulkan/product.h"

typedef struct ds_gpu_array {
    void *data;
    uint64_t bytes;
    bool changes; /* it is read back */
} ds_gpu_array;

/* The 8 bytes at `at` of array `where`, or of the push constants where that is -1, are the address of array `to` and so many
 * bytes on. */
typedef struct ds_gpu_link {
    int where;
    uint64_t at;
    int to;
    uint64_t to_at;
} ds_gpu_link;

/* An operation of product.h; its ds_gpu_product are the push constants. */
typedef struct ds_gpu_operation {
    const char *name; /* "mul", "mul_gated", "mul_sum" (up: weights, x_scale: others), "pack", "rows" */
    ds_format format, up_format;
    uint32_t up_row_bytes, n_blocks;
} ds_gpu_operation;

typedef struct ds_gpu_single {
    const char *shader; /* or NULL: the operation */
    ds_gpu_operation operation;
    ds_gpu_array *arrays;
    int n_arrays;
    const ds_gpu_link *links;
    int n_links;
    unsigned char push[DS_GPU_PUSH];
    uint32_t push_bytes, groups[3], specs[DS_GPU_SPECS];
    int n_specs;
} ds_gpu_single;

/* Each array to a buffer of its own, the shader once, and back; what a link wrote into an array comes back with it. */
ds_status ds_gpu_run_single(ds_gpu *gpu, const ds_gpu_single *job, ds_error *err);

/* Arrays copied by threads (copies.h), three to a copy, into a buffer of the device, and the buffer back to `out`: each begins
 * at a multiple of DS_GPU_ALIGN behind the one before. The order is changed on the way. out_bytes: of all, padded. */
ds_status ds_gpu_run_copies(ds_gpu *gpu, const ds_gpu_array *arrays, int n, int n_threads, uint64_t piece,
                            unsigned char *out, uint64_t out_bytes, ds_error *err);
