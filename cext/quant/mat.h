/* mat.h: a matrix in a tensor format, borrowed from a file or an array. */
#pragma once

#include "quant/quant.h"

/* `rows` rows of k values; data NULL where a model has no such matrix. Matrices of several heads or experts are n such
 * blocks, `stride` bytes apart. */
typedef struct ds_mat {
    ds_format format;
    int rows, k;
    size_t row_bytes;
    const unsigned char *data;
    int n; /* heads or experts; 1 for a plain matrix */
    size_t stride;
} ds_mat;

static inline const void *ds_mat_block(const ds_mat *m, int i) { return m->data + (size_t)i * m->stride; }
