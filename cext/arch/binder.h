/* binder.h: tensors found by name, checked and bound; for what binds the weights of a layer's parts. */
#pragma once

#include "arch/weights.h"

/* The first failure sticks in `status`, and nothing is bound after it. */
typedef struct ds_binder {
    const ds_config *config;
    ds_source source;
    ds_weights *out;
    ds_status status;
    ds_error *err;
} ds_binder;

/* Memory that goes with the weights, at a multiple of 64; NULL where there is none. */
void *ds_bind_own(ds_binder *b, size_t size);
/* The tensor named by the format, checked to be ne[0] = k, ne[1] = rows, ne[2] = n; data NULL where absent or refused. */
ds_mat ds_bind_matrix(ds_binder *b, bool required, int64_t k, int64_t rows, int64_t n, const char *format, ...);
/* The same of all heads, where ik_llama.cpp's files have the heads' rows one after the other in two dimensions. */
ds_mat ds_bind_heads(ds_binder *b, int64_t k, int64_t rows, const char *part, int il);
/* A vector decoded to float; NULL where absent or refused. */
const float *ds_bind_vector(ds_binder *b, bool required, int64_t n, const char *format, ...);
