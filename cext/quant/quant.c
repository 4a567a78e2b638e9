/* quant.c: facts of the formats, half and bfloat16 conversion, and the scalar decoders that everything is judged by. */
#include "quant/quant.h"

#include <string.h>

#include "quant/blocks.h"
#include "quant/codes.h"

static const ds_format_info infos[DS_FORMAT_COUNT] = {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) {name, gguf, elements, bytes, DS_ACT_##act},
#include "quant/formats.def"
#undef DS_FORMAT
};

const ds_format_info *ds_format_get(ds_format format) { return &infos[format]; }

ds_format ds_format_from_gguf(uint32_t gguf_type) {
    for (int f = 0; f < DS_FORMAT_COUNT; f++)
        if (infos[f].gguf_type == gguf_type) return (ds_format)f;
    return DS_FORMAT_COUNT;
}

size_t ds_row_bytes(ds_format format, int64_t n) {
    return (size_t)n / infos[format].block_elements * infos[format].block_bytes;
}

static float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

float ds_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13); /* infinity, NaN */
    if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    /* Subnormal: magnitude * 2^-24, which a float holds exactly. */
    return float_of(sign | bits_of((float)magnitude * 0x1p-24f));
}

uint16_t ds_f32_to_f16(float f) {
    const uint16_t sign = (uint16_t)(bits_of(f) >> 16 & 0x8000);
    const uint32_t magnitude = bits_of(f) & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00 | (uint16_t)(magnitude >> 13 & 0x1ff); /* NaN stays a quiet NaN */
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and above round to infinity */
    if (magnitude < 0x38800000) {
        /* Subnormal half: adding 0.5 leaves magnitude / 2^-24, rounded to nearest even, in the low bits of the sum. */
        return sign | (uint16_t)(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000);
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return sign | (uint16_t)((magnitude - (112u << 23) + 0xfff + odd) >> 13);
}

float ds_bf16_to_f32(uint16_t h) { return float_of((uint32_t)h << 16); }

static void dequantize_F32(int64_t n, const void *blocks, float *y) { memcpy(y, blocks, (size_t)n * sizeof *y); }

static void dequantize_F16(int64_t n, const void *blocks, float *y) {
    const ds_block_F16 *b = blocks;
    for (int64_t i = 0; i < n; i++) y[i] = ds_f16_to_f32(b[i].x);
}

static void dequantize_BF16(int64_t n, const void *blocks, float *y) {
    const ds_block_BF16 *b = blocks;
    for (int64_t i = 0; i < n; i++) y[i] = ds_bf16_to_f32(b[i].x);
}

static void codes_to_float(const ds_codes *c, int n, float *y) {
    for (int i = 0; i < n; i++) y[i] = c->scale[i / 16] * (float)c->q[i] - c->min[i / 16];
}

#define DEQUANTIZE(id)                                                     \
    static void dequantize_##id(int64_t n, const void *blocks, float *y) { \
        const ds_block_##id *b = blocks;                                   \
        const int step = (int)infos[DS_FORMAT_##id].block_elements;        \
        ds_codes c;                                                        \
        for (int64_t i = 0; i < n; i += step) {                            \
            ds_codes_##id(b++, &c);                                        \
            codes_to_float(&c, step, y + i);                               \
        }                                                                  \
    }
DS_CODED_FORMATS(DEQUANTIZE)

void ds_dequantize_row(ds_format format, int64_t n, const void *blocks, float *y) {
    static void (*const decoders[DS_FORMAT_COUNT])(int64_t, const void *, float *) = {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) dequantize_##id,
#include "quant/formats.def"
#undef DS_FORMAT
    };
    decoders[format](n, blocks, y);
}
