/* kv.h: the latent cache of one sequence: per layer and position, the normalised c_kv and the rotated k_pe.
 * Owns the memory, which is reserved for n_ctx positions and touched only as it fills. Knows no attention. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"
#include "kernels/kernels.h"

typedef enum ds_kv_type { DS_KV_F16, DS_KV_Q8_0, DS_KV_F32, DS_KV_TYPES } ds_kv_type;

typedef struct ds_kv {
    ds_kv_type type;
    int n_layer, n_ctx;
    int rank, n_tail; /* of a row: kv_lora_rank and rope_dim */
    ds_rows shape;    /* how rows lie, without their place */
    size_t layer_bytes;
    unsigned char *data; /* (n_layer) of the parts of n_ctx rows: data, scales, tails */
    size_t bytes;
} ds_kv;

/* The type of that name; false for another name. */
bool ds_kv_type_from_name(const char *name, ds_kv_type *out);
const char *ds_kv_type_name(ds_kv_type type);

ds_status ds_kv_create(ds_kv_type type, int n_layer, int n_ctx, int rank, int n_tail, ds_kv *out, ds_error *err);
void ds_kv_release(ds_kv *kv);

/* Rows [n, n_pos) of every layer become those of [0, n), over and over. n is at least 1, n_pos at most n_ctx. */
void ds_kv_repeat(ds_kv *kv, int n, int n_pos);

/* The rows of a layer from position pos on. */
ds_rows ds_kv_rows(const ds_kv *kv, int il, int pos);
