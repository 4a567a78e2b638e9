/* dequantize.h: rows of weights decoded to floats, for embeddings and inspection. */
#pragma once

/* w = scale * q - min with the two roundings of the scalar decoder: bit-equal to it on every ISA. */
DS_INLINE void codes_to_float(const ds_codes *c, int n, float *y) {
    for (int g = 0; g < n / 16; g++)
        for (int i = 16 * g; i < 16 * g + 16; i++) y[i] = c->scale[g] * (float)c->q[i] - c->min[g];
}

#define DEQUANTIZE(id)                                                     \
    static void dequantize_##id(int64_t n, const void *blocks, float *y) { \
        const ds_block_##id *block = blocks;                               \
        for (int64_t i = 0; i < n; i += DS_ELEMENTS_##id) {                \
            ds_codes codes;                                                \
            ds_codes_##id(block++, &codes);                                \
            codes_to_float(&codes, DS_ELEMENTS_##id, y + i);               \
        }                                                                  \
    }
DS_CODED_FORMATS(DEQUANTIZE)

static void dequantize_F32(int64_t n, const void *blocks, float *y) { memcpy(y, blocks, (size_t)n * sizeof *y); }
static void dequantize_F16(int64_t n, const void *blocks, float *y) { f16_to_f32((int)n, blocks, y); }
static void dequantize_BF16(int64_t n, const void *blocks, float *y) { bf16_to_f32((int)n, blocks, y); }
