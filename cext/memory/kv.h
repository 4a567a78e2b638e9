/* kv.h: the latent cache of one sequence: per layer and position, the normalised c_kv and the rotated k_pe.
 * Owns the memory, which is reserved for n_ctx positions and touched only as it fills. Knows no attention. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"
#include "kernels/kernels.h"

typedef enum ds_kv_type { DS_KV_F16, DS_KV_F32 } ds_kv_type;

typedef struct ds_kv {
    ds_kv_type type;
    int n_layer, n_ctx, width; /* width = kv_lora_rank + rope_dim */
    size_t row_bytes;
    unsigned char *data;       /* (n_layer, n_ctx, width) in `type` */
    size_t bytes;
} ds_kv;

/* The type named "f16" or "f32"; false for another name. */
bool ds_kv_type_from_name(const char *name, ds_kv_type *out);
const char *ds_kv_type_name(ds_kv_type type);

ds_status ds_kv_create(ds_kv_type type, int n_layer, int n_ctx, int width, ds_kv *out, ds_error *err);
void ds_kv_release(ds_kv *kv);

static inline void *ds_kv_row(const ds_kv *kv, int il, int pos) {
    return kv->data + ((size_t)il * (size_t)kv->n_ctx + (size_t)pos) * kv->row_bytes;
}

/* Store one row of floats (width) at a position; load reads n rows back. */
void ds_kv_store(const ds_kv *kv, const ds_kernels *kern, int il, int pos, const float *row /* (width) */);
void ds_kv_load(const ds_kv *kv, const ds_kernels *kern, int il, int pos, int n, float *rows /* (n, width) */);
