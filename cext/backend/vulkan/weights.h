/* weights.h: the matrices and vectors of a model's layers that a GPU computes, in its memory. */
#pragma once

#include "backend/backend.h"
#include "backend/vulkan/gpu.h"

/* Where one expert lies; 0s where it is not here. As experts.glsl has it. */
typedef struct ds_gpu_expert {
    uint64_t gate, up, down;
} ds_gpu_expert;

/* Addresses of what a layer has here (ds_layer), the others 0. */
typedef struct ds_gpu_layer {
    uint64_t attn_norm, q_a_norm, kv_a_norm, q, o, q_a, kv_a, k_b, v_b;
    uint64_t ffn_norm, gate, up, down, router, router_bias, gate_shared, up_shared, down_shared;
    uint64_t experts; /* ds_gpu_expert (n_expert) in its memory */
    ds_gpu_expert *expert; /* (n_expert) the same in the host's, or NULL */
} ds_gpu_layer;

typedef struct ds_gpu_weights {
    ds_gpu_layer *layers; /* (layers) */
    ds_gpu_expert *experts; /* of all of them */
    uint64_t output_norm, output, tables;
    ds_gpu_buffer *chunks;
    int n_chunks;
    uint64_t bytes;
} ds_gpu_weights;

/* Copy what the places give to backend `number`. limit: bytes that it may take, 0: what there is. DS_ENOMEM where that does
 * not hold it, DS_EUNSUPPORTED where a matrix is larger than an allocation. */
ds_status ds_gpu_weights_load(ds_gpu *gpu, const ds_facts *facts, int number, uint64_t limit, ds_gpu_weights *out,
                              ds_error *err);
void ds_gpu_weights_release(ds_gpu *gpu, ds_gpu_weights *w);
