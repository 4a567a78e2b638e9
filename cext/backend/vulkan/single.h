/* single.h: one shader run over arrays of the host's, for tests. */
#pragma once

#include "backend/vulkan/gpu.h"

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

typedef struct ds_gpu_single {
    const char *shader;
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
