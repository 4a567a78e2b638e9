/* quant.h: the tensor formats as facts (block size, bytes, name) and their scalar decoders.
 * Owns the block layouts (blocks.h) and nothing else: no threads, no ISA, no allocation. */
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef enum ds_format {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) DS_FORMAT_##id,
#include "quant/formats.def"
#undef DS_FORMAT
    DS_FORMAT_COUNT
} ds_format;

typedef enum ds_act_kind {
    DS_ACT_F32, /* float rows */
    DS_ACT_Q8,  /* int8 rows, one float scale per 32 values, sums of the int8 values for formats with a minimum */
    DS_ACT_COUNT
} ds_act_kind;

typedef struct ds_format_info {
    const char *name;        /* lower case, as users write it: "q4_k" */
    uint32_t gguf_type;      /* the id in a GGUF tensor record */
    uint32_t block_elements; /* values in a block; a row is a whole number of blocks */
    uint32_t block_bytes;
    ds_act_kind act;         /* what a matrix product with this format takes */
} ds_format_info;

/* Facts of a format; never NULL for a value below DS_FORMAT_COUNT. */
const ds_format_info *ds_format_get(ds_format format);

/* The format of a GGUF type id, or DS_FORMAT_COUNT where the engine does not read it. */
ds_format ds_format_from_gguf(uint32_t gguf_type);

/* Bytes of a row of n values; n must be a multiple of block_elements. */
size_t ds_row_bytes(ds_format format, int64_t n);

/* Decode n values (a multiple of block_elements) of `format` at `blocks` to float; bit-equal to ggml's decoders. */
void ds_dequantize_row(ds_format format, int64_t n, const void *blocks, float *y /* (n) */);

/* IEEE half and bfloat16, scalar; round to nearest even. */
float ds_f16_to_f32(uint16_t h);
uint16_t ds_f32_to_f16(float f);
float ds_bf16_to_f32(uint16_t h);
