/* product.h: products with weights in any tensor format on a GPU: which shader, which grid, which constants. Records
 * commands and runs none; barriers between operations are the caller's, but for those inside of one. */
#pragma once

#include <assert.h>

#include "backend/vulkan/gpu.h"
#include "quant/quant.h"

/* y = x W^T, as shaders/product.glsl reads it. Rows of x and y are floats at any multiple of 4 bytes; rows of W lie at
 * multiples of 2 (formats of blocks of 4 or 16 bytes: of these). Addresses are the device's. */
typedef struct ds_gpu_product {
    uint64_t w; /* (blocks, rows, k) in its format; groups tell otherwise */
    uint64_t x; /* (.., ldx) */
    uint64_t y; /* (.., ldy) */
    uint64_t groups; /* 0, or ds_gpu_group (n_blocks): what each block is */
    uint64_t slot_row; /* 0, or uint32_t (..): the row of x that a slot reads; else its own */
    uint64_t tables; /* what ds_gpu_tables gives */
    uint64_t up; /* of a gated product, as w; with groups, ds_gpu_group (n_blocks) of the same slots */
    uint64_t x_scale; /* of a product with packed activations (ds_gpu_pack): float (.., ldx / 32) */
    uint64_t norm; /* 0, or float (k): x, of one slot a block and not packed, is normalised first, by these weights */
    uint64_t stride_w; /* bytes from a block's weights to the next one's */
    uint32_t stride_x, stride_y; /* floats likewise; 0 with groups */
    uint32_t ldx, ldy; /* floats between rows */
    uint32_t row_bytes, k, rows; /* of W: `rows` rows of k values */
    uint32_t n_slots; /* of each block: rows of x and y; with groups, the most that one may have */
    uint32_t flags; /* DS_GPU_ADD, DS_GPU_EXACT, DS_GPU_JOIN times 1 + the kind of the cache's rows */
    uint32_t
        usual; /* slots that most groups have about, or 0: the grid's, and how many go together. With DS_GPU_JOIN, parts */
    float eps; /* of the norm */
} ds_gpu_product;

static_assert(sizeof(ds_gpu_product) == DS_GPU_PUSH, "the same bytes as in shaders/product.glsl");

enum {
    DS_GPU_ADD = 1, /* y += */
    DS_GPU_GATE = 2, /* y = silu(y) * (x W^T): the second half of a gated product */
    DS_GPU_JOIN =
        16, /* of one slot: x is a head's parts of positions, which latent_join.comp else joins, stride_x floats */
    DS_GPU_JOIN_PARTS = 64, /* at most so many, */
    DS_GPU_JOIN_VALUES = 4096, /* of as many values, k, of a head */
    DS_GPU_LANES = 256, /* product.c's own */
    DS_GPU_EXACT = 4, /* in floats, where many slots would else be taken as halves on devices with matrix units */
};

/* Slots [first, first + count) are multiplied by the block at w, in memory of the device, groups in the order of their slots.
 * w or count 0: nothing to do. */
typedef struct ds_gpu_group {
    uint64_t w;
    uint32_t first, count;
} ds_gpu_group;

static_assert(sizeof(ds_gpu_group) == 16, "the same bytes as in shaders/product.glsl");

/* Memory of the device in which products of many slots by matrix units have their factors as halves: weights, a piece at a
 * time, and all rows of x. NULL, or no bytes of w: they are computed in floats. */
typedef struct ds_gpu_halves {
    uint64_t w, x; /* addresses */
    uint64_t w_bytes;
} ds_gpu_halves;

/* What a matrix takes of it, of which there is twice as much for pieces in turns. 0 on devices without matrix units. */
uint64_t ds_gpu_halved_weights(const ds_gpu *gpu, uint32_t rows, uint32_t k);
/* What x takes of it: n_slots rows of k values in n_blocks blocks or groups. 0 on devices without matrix units. */
uint64_t ds_gpu_halved_rows(const ds_gpu *gpu, uint64_t n_slots, uint64_t n_blocks, uint32_t k);

/* The grids of the codebook formats, which products read behind `tables`. */
enum { DS_GPU_TABLES_BYTES = (256 + 512 + 1024 + 256 + 512) * 2 };
void ds_gpu_tables(uint16_t out[DS_GPU_TABLES_BYTES / 2]);

/* Whether the device multiplies packed activations by this format: then x may be what ds_gpu_pack made. */
bool ds_gpu_packs(const ds_gpu *gpu, ds_format format);
/* Whole rows x (n_slots, ldx) as the processor's kernels pack them: bytes at y (n_slots, ldx), scales at x_scale. ldx is a
 * multiple of 32; nothing else is read. In a product with them, x and x_scale are these; stride_x is a multiple of 32. */
ds_status ds_gpu_pack(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_product *p, ds_error *err);

/* y = x W^T in each of n_blocks blocks. */
ds_status ds_gpu_mul(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_halves *h, ds_format format, const ds_gpu_product *p,
                     uint32_t n_blocks, ds_error *err);
/* y = silu(x W^T) * (x Up^T), up of the same shape as w; up_row_bytes: between its rows. No flags. */
ds_status ds_gpu_mul_gated(ds_gpu *gpu, ds_gpu_commands *c, const ds_gpu_halves *h, ds_format format,
                           ds_format up_format, uint32_t up_row_bytes, const ds_gpu_product *p, uint32_t n_blocks,
                           ds_error *err);
/* y += others + the sum over n_blocks groups, each of one slot in order, of weights[i] x[i] W_i^T: what the experts of a token give
 * it. weights: float (n_blocks), others: 0 or float (rows), addresses both. No flags. */
ds_status ds_gpu_mul_sum(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, uint32_t n_blocks,
                         uint64_t weights, uint64_t others, ds_error *err);
/* y[j][i] = W[i][j] of each of n_blocks blocks, as halves: rows of y ldy halves apart, blocks stride_y times 4 bytes; x is not read. */
ds_status ds_gpu_transpose(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p,
                           uint32_t n_blocks, ds_error *err);
/* y[i] = row slot_row[i] of W decoded, n_slots of them; x and groups are not read. */
ds_status ds_gpu_rows(ds_gpu *gpu, ds_gpu_commands *c, ds_format format, const ds_gpu_product *p, ds_error *err);
