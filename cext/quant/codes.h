/* codes.h: what a block says, as integers and scales: w = scale * q - min, with a scale and a min per 16 values.
 * The one place that knows how each format packs its bits in plain C. quant.c makes floats of it; the kernels make products
 * of it where a format has no faster unpacking. scale, min and their products with q round once at most, as ggml's do. */
#pragma once

#include <string.h>

#include "quant/blocks.h"
#include "quant/grids.h"
#include "quant/quant.h"

typedef struct ds_codes {
    int8_t q[256];   /* block_elements of them */
    float scale[16]; /* per 16 values */
    float min[16];   /* per 16 values; 0 in formats without a minimum */
} ds_codes;

/* The non-linear 4-bit values of IQ4_NL and IQ4_XS. */
static const int8_t ds_iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* The eight 6-bit scales and minimums of Q4_K and Q5_K. */
static inline void ds_scales_k4(const uint8_t packed[12], uint8_t sc[8], uint8_t m[8]) {
    for (int j = 0; j < 4; j++) {
        sc[j] = packed[j] & 63;
        m[j] = packed[4 + j] & 63;
        sc[4 + j] = (packed[8 + j] & 15) | (packed[j] >> 6) << 4;
        m[4 + j] = packed[8 + j] >> 4 | (packed[4 + j] >> 6) << 4;
    }
}

/* The sixteen scales of Q3_K, less their offset of 32. */
static inline void ds_scales_q3_k(const uint8_t packed[12], int8_t sc[16]) {
    for (int j = 0; j < 16; j++) {
        int low = j < 8 ? packed[j] & 15 : packed[j - 8] >> 4;
        int high = packed[8 + j % 4] >> 2 * (j / 4) & 3;
        sc[j] = (int8_t)((low | high << 4) - 32);
    }
}

static inline void ds_codes_set_scale(ds_codes *c, int sub, float scale, float min) {
    c->scale[2 * sub] = c->scale[2 * sub + 1] = scale;
    c->min[2 * sub] = c->min[2 * sub + 1] = min;
}

static inline void ds_codes_nibbles(const uint8_t qs[16], int8_t q[32], int offset) {
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)((qs[i] & 15) - offset);
        q[16 + i] = (int8_t)((qs[i] >> 4) - offset);
    }
}

static inline void ds_codes_fifth_bits(const uint8_t qh[4], int8_t q[32]) {
    for (int i = 0; i < 32; i++) q[i] = (int8_t)(q[i] + ((qh[i / 8] >> i % 8 & 1) << 4));
}

static inline void ds_codes_Q4_0(const ds_block_Q4_0 *b, ds_codes *c) {
    ds_codes_nibbles(b->qs, c->q, 8);
    ds_codes_set_scale(c, 0, ds_f16_to_f32(b->d), 0.0f);
}

static inline void ds_codes_Q4_1(const ds_block_Q4_1 *b, ds_codes *c) {
    ds_codes_nibbles(b->qs, c->q, 0);
    ds_codes_set_scale(c, 0, ds_f16_to_f32(b->d), -ds_f16_to_f32(b->m));
}

static inline void ds_codes_Q5_0(const ds_block_Q5_0 *b, ds_codes *c) {
    ds_codes_nibbles(b->qs, c->q, 16);
    ds_codes_fifth_bits(b->qh, c->q);
    ds_codes_set_scale(c, 0, ds_f16_to_f32(b->d), 0.0f);
}

static inline void ds_codes_Q5_1(const ds_block_Q5_1 *b, ds_codes *c) {
    ds_codes_nibbles(b->qs, c->q, 0);
    ds_codes_fifth_bits(b->qh, c->q);
    ds_codes_set_scale(c, 0, ds_f16_to_f32(b->d), -ds_f16_to_f32(b->m));
}

static inline void ds_codes_Q8_0(const ds_block_Q8_0 *b, ds_codes *c) {
    memcpy(c->q, b->qs, 32);
    ds_codes_set_scale(c, 0, ds_f16_to_f32(b->d), 0.0f);
}

static inline void ds_codes_Q2_K(const ds_block_Q2_K *b, ds_codes *c) {
    const float d = ds_f16_to_f32(b->d), dmin = ds_f16_to_f32(b->dmin);
    for (int i = 0; i < 16; i++) {
        c->scale[i] = d * (float)(b->scales[i] & 15);
        c->min[i] = dmin * (float)(b->scales[i] >> 4);
    }
    for (int i = 0; i < 256; i++) c->q[i] = (int8_t)(b->qs[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3);
}

static inline void ds_codes_Q3_K(const ds_block_Q3_K *b, ds_codes *c) {
    const float d = ds_f16_to_f32(b->d);
    int8_t sc[16];
    ds_scales_q3_k(b->scales, sc);
    for (int i = 0; i < 16; i++) {
        c->scale[i] = d * (float)sc[i];
        c->min[i] = 0.0f;
    }
    for (int i = 0; i < 256; i++) {
        int low = b->qs[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3;
        int high = b->hmask[i % 32] >> i / 32 & 1;
        c->q[i] = (int8_t)((low | high << 2) - 4);
    }
}

static inline void ds_codes_scales_k4(uint16_t d, uint16_t dmin, const uint8_t packed[12], ds_codes *c) {
    const float scale = ds_f16_to_f32(d), min = ds_f16_to_f32(dmin);
    uint8_t sc[8], m[8];
    ds_scales_k4(packed, sc, m);
    for (int j = 0; j < 8; j++) ds_codes_set_scale(c, j, scale * (float)sc[j], min * (float)m[j]);
}

static inline void ds_codes_Q4_K(const ds_block_Q4_K *b, ds_codes *c) {
    ds_codes_scales_k4(b->d, b->dmin, b->scales, c);
    for (int i = 0; i < 256; i++) c->q[i] = (int8_t)(b->qs[32 * (i / 64) + i % 32] >> 4 * (i / 32 % 2) & 15);
}

static inline void ds_codes_Q5_K(const ds_block_Q5_K *b, ds_codes *c) {
    ds_codes_scales_k4(b->d, b->dmin, b->scales, c);
    for (int i = 0; i < 256; i++) {
        int low = b->qs[32 * (i / 64) + i % 32] >> 4 * (i / 32 % 2) & 15;
        int high = b->qh[i % 32] >> i / 32 & 1;
        c->q[i] = (int8_t)(low | high << 4);
    }
}

static inline void ds_codes_Q6_K(const ds_block_Q6_K *b, ds_codes *c) {
    const float d = ds_f16_to_f32(b->d);
    for (int i = 0; i < 16; i++) {
        c->scale[i] = d * (float)b->scales[i];
        c->min[i] = 0.0f;
    }
    for (int i = 0; i < 256; i++) {
        int half = i / 128, j = i / 32 % 4, l = i % 32;
        int low = b->ql[64 * half + 32 * (j % 2) + l] >> 4 * (j / 2) & 15;
        int high = b->qh[32 * half + l] >> 2 * j & 3;
        c->q[i] = (int8_t)((low | high << 4) - 32);
    }
}

static inline void ds_codes_iq4(const uint8_t qs[16], int8_t q[32]) {
    for (int i = 0; i < 16; i++) {
        q[i] = ds_iq4_values[qs[i] & 15];
        q[16 + i] = ds_iq4_values[qs[i] >> 4];
    }
}

static inline void ds_codes_IQ4_NL(const ds_block_IQ4_NL *b, ds_codes *c) {
    ds_codes_iq4(b->qs, c->q);
    ds_codes_set_scale(c, 0, ds_f16_to_f32(b->d), 0.0f);
}

static inline void ds_codes_IQ4_XS(const ds_block_IQ4_XS *b, ds_codes *c) {
    const float d = ds_f16_to_f32(b->d);
    for (int j = 0; j < 8; j++) {
        int sc = (b->scales_l[j / 2] >> 4 * (j % 2) & 15) | (b->scales_h >> 2 * j & 3) << 4;
        ds_codes_set_scale(c, j, d * (float)(sc - 32), 0.0f);
        ds_codes_iq4(b->qs + 16 * j, c->q + 32 * j);
    }
}

/* The 8 signs that 7 bits stand for: the last makes their number even. */
static inline unsigned ds_signs_7(unsigned seven) {
    unsigned parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    return seven | ((parity ^ parity >> 1) & 1) << 7;
}

/* Entries of 8 and of 4 values, with a byte of signs, or its lower or upper half. */
static inline void ds_codes_grid8(uint16_t entry, unsigned signs, int8_t q[8]) {
    for (int i = 0; i < 8; i++) {
        const int8_t v = ds_grid_values_iq2[DS_GRID_PLACE_IQ2(entry, i)];
        q[i] = signs >> i & 1 ? -v : v;
    }
}

static inline void ds_codes_grid4(uint16_t entry, unsigned signs, const int8_t values[8], int8_t q[4]) {
    for (int i = 0; i < 4; i++) {
        const int8_t v = values[DS_GRID_PLACE_IQ3(entry, i)];
        q[i] = signs >> i & 1 ? -v : v;
    }
}

static inline void ds_codes_IQ2_XXS(const ds_block_IQ2_XXS *b, ds_codes *c) {
    const float d = ds_f16_to_f32(b->d) / 8.0f;
    for (int j = 0; j < 8; j++) {
        const uint32_t tail = b->sub[j].tail;
        ds_codes_set_scale(c, j, d * (float)(2 * (tail >> 28) + 1), 0.0f);
        for (int l = 0; l < 4; l++)
            ds_codes_grid8(ds_grid_iq2_xxs[b->sub[j].qs[l]], ds_signs_7(tail >> 7 * l & 127), c->q + 32 * j + 8 * l);
    }
}

/* Two scales of four bits for each 32 values. */
static inline void ds_codes_scales_iq2(uint16_t half, const uint8_t scales[8], ds_codes *c) {
    const float d = ds_f16_to_f32(half) / 8.0f;
    for (int i = 0; i < 16; i++) {
        c->scale[i] = d * (float)(2 * (scales[i / 2] >> 4 * (i % 2) & 15) + 1);
        c->min[i] = 0.0f;
    }
}

static inline void ds_codes_IQ2_XS(const ds_block_IQ2_XS *b, ds_codes *c) {
    ds_codes_scales_iq2(b->d, b->scales, c);
    for (int i = 0; i < 32; i++)
        ds_codes_grid8(ds_grid_iq2_xs[b->qs[i] & 511], ds_signs_7(b->qs[i] >> 9), c->q + 8 * i);
}

static inline void ds_codes_IQ2_S(const ds_block_IQ2_S *b, ds_codes *c) {
    ds_codes_scales_iq2(b->d, b->scales, c);
    for (int i = 0; i < 32; i++)
        ds_codes_grid8(ds_grid_iq2_s[b->qs[i] | (b->qh[i / 4] >> 2 * (i % 4) & 3) << 8], b->signs[i], c->q + 8 * i);
}

static inline void ds_codes_IQ3_XXS(const ds_block_IQ3_XXS *b, ds_codes *c) {
    const float d = ds_f16_to_f32(b->d) / 4.0f;
    for (int j = 0; j < 8; j++) ds_codes_set_scale(c, j, d * (float)(2 * (b->tail[j] >> 28) + 1), 0.0f);
    for (int i = 0; i < 64; i++) {
        const unsigned signs = ds_signs_7(b->tail[i / 8] >> 7 * (i / 2 % 4) & 127) >> 4 * (i % 2);
        ds_codes_grid4(ds_grid_iq3_xxs[b->qs[i]], signs, ds_grid_values_iq3_xxs, c->q + 4 * i);
    }
}

static inline void ds_codes_IQ3_S(const ds_block_IQ3_S *b, ds_codes *c) {
    const float d = ds_f16_to_f32(b->d);
    for (int j = 0; j < 8; j++)
        ds_codes_set_scale(c, j, d * (float)(2 * (b->scales[j / 2] >> 4 * (j % 2) & 15) + 1), 0.0f);
    for (int i = 0; i < 64; i++) {
        const int index = b->qs[i] | (b->qh[i / 8] >> i % 8 & 1) << 8;
        ds_codes_grid4(ds_grid_iq3_s[index], b->signs[i / 2] >> 4 * (i % 2), ds_grid_values_iq3_s, c->q + 4 * i);
    }
}

/* The formats that have codes, for tables: X(id). F32, F16 and BF16 have none. */
/* clang-format off */
#define DS_CODED_FORMATS(X) \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS) \
    X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S)
/* clang-format on */
