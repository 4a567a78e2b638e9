/* grid.c: the grids of the formats, and their packing. */
#include "encode/grid.h"

#include <string.h>

#include "quant/blocks.h"
#include "quant/codes.h"

/* The code books value by value, place by place. */
#define IQ2(entry, i) (DS_GRID_PLACE_IQ2(entry, i) == 0 ? 8.0f : DS_GRID_PLACE_IQ2(entry, i) == 1 ? 25.0f : 43.0f),
#define IQ3_XXS(entry, i) \
    (4.0f + 8.0f * DS_GRID_PLACE_IQ3(entry, i) + (DS_GRID_PLACE_IQ3(entry, i) == 7 ? 2.0f : 0.0f)),
#define IQ3_S(entry, i) (1.0f + 2.0f * DS_GRID_PLACE_IQ3(entry, i)),
#define IQ2_0(x) IQ2(x, 0)
#define IQ2_1(x) IQ2(x, 1)
#define IQ2_2(x) IQ2(x, 2)
#define IQ2_3(x) IQ2(x, 3)
#define IQ2_4(x) IQ2(x, 4)
#define IQ2_5(x) IQ2(x, 5)
#define IQ2_6(x) IQ2(x, 6)
#define IQ2_7(x) IQ2(x, 7)
#define IQ3_XXS_0(x) IQ3_XXS(x, 0)
#define IQ3_XXS_1(x) IQ3_XXS(x, 1)
#define IQ3_XXS_2(x) IQ3_XXS(x, 2)
#define IQ3_XXS_3(x) IQ3_XXS(x, 3)
#define IQ3_S_0(x) IQ3_S(x, 0)
#define IQ3_S_1(x) IQ3_S(x, 1)
#define IQ3_S_2(x) IQ3_S(x, 2)
#define IQ3_S_3(x) IQ3_S(x, 3)
#define EIGHT(LIST)                                                                                                \
    {                                                                                                              \
        {LIST(IQ2_0)}, {LIST(IQ2_1)}, {LIST(IQ2_2)}, {LIST(IQ2_3)}, {LIST(IQ2_4)}, {LIST(IQ2_5)}, {LIST(IQ2_6)}, { \
            LIST(IQ2_7)                                                                                            \
        }                                                                                                          \
    }
static const float values_iq2_xxs[8][256] = EIGHT(DS_GRID_IQ2_XXS);
static const float values_iq2_xs[8][512] = EIGHT(DS_GRID_IQ2_XS);
static const float values_iq2_s[8][1024] = EIGHT(DS_GRID_IQ2_S);
static const float values_iq3_xxs[4][256] = {{DS_GRID_IQ3_XXS(IQ3_XXS_0)},
                                             {DS_GRID_IQ3_XXS(IQ3_XXS_1)},
                                             {DS_GRID_IQ3_XXS(IQ3_XXS_2)},
                                             {DS_GRID_IQ3_XXS(IQ3_XXS_3)}};
static const float values_iq3_s[4][512] = {
    {DS_GRID_IQ3_S(IQ3_S_0)}, {DS_GRID_IQ3_S(IQ3_S_1)}, {DS_GRID_IQ3_S(IQ3_S_2)}, {DS_GRID_IQ3_S(IQ3_S_3)}};
static const ds_points points_iq2_xxs = {
    .width = 8, .n = 256, .even_signs = true, .most = 43, .values = values_iq2_xxs[0]};
static const ds_points points_iq2_xs = {
    .width = 8, .n = 512, .even_signs = true, .most = 43, .values = values_iq2_xs[0]};
static const ds_points points_iq2_s = {.width = 8, .n = 1024, .most = 43, .values = values_iq2_s[0]};
static const ds_points points_iq3_xxs = {
    .width = 4, .n = 256, .even_signs = true, .most = 62, .values = values_iq3_xxs[0]};
static const ds_points points_iq3_s = {.width = 4, .n = 512, .most = 15, .values = values_iq3_s[0]};

#define POINTS(list, run, per) \
    {.sub = run, .nested = true, .sc_min = 1, .sc_max = 31, .points = &points_##list, .unit = per}

static const ds_grid grids[DS_FORMAT_COUNT] = {
    [DS_FORMAT_Q4_0] = {.sub = 32, .q_min = -8, .q_max = 7},
    [DS_FORMAT_Q4_1] = {.sub = 32, .q_min = 0, .q_max = 15, .has_min = true},
    [DS_FORMAT_Q5_0] = {.sub = 32, .q_min = -16, .q_max = 15},
    [DS_FORMAT_Q5_1] = {.sub = 32, .q_min = 0, .q_max = 31, .has_min = true},
    [DS_FORMAT_Q8_0] = {.sub = 32, .q_min = -127, .q_max = 127},
    [DS_FORMAT_IQ4_NL] = {.sub = 32, .q_min = 0, .q_max = 15, .values = ds_iq4_values},
    [DS_FORMAT_Q2_K] =
        {.sub = 16, .q_min = 0, .q_max = 3, .has_min = true, .nested = true, .sc_min = 0, .sc_max = 15, .m_max = 15},
    [DS_FORMAT_Q3_K] = {.sub = 16, .q_min = -4, .q_max = 3, .nested = true, .sc_min = -32, .sc_max = 31},
    [DS_FORMAT_Q4_K] =
        {.sub = 32, .q_min = 0, .q_max = 15, .has_min = true, .nested = true, .sc_min = 0, .sc_max = 63, .m_max = 63},
    [DS_FORMAT_Q5_K] =
        {.sub = 32, .q_min = 0, .q_max = 31, .has_min = true, .nested = true, .sc_min = 0, .sc_max = 63, .m_max = 63},
    [DS_FORMAT_Q6_K] = {.sub = 16, .q_min = -32, .q_max = 31, .nested = true, .sc_min = -128, .sc_max = 127},
    [DS_FORMAT_IQ4_XS] =
        {.sub = 32, .q_min = 0, .q_max = 15, .values = ds_iq4_values, .nested = true, .sc_min = -32, .sc_max = 31},
    [DS_FORMAT_IQ2_XXS] = POINTS(iq2_xxs, 32, 8),
    [DS_FORMAT_IQ2_XS] = POINTS(iq2_xs, 16, 8),
    [DS_FORMAT_IQ2_S] = POINTS(iq2_s, 16, 8),
    [DS_FORMAT_IQ3_XXS] = POINTS(iq3_xxs, 32, 4),
    [DS_FORMAT_IQ3_S] = POINTS(iq3_s, 32, 1),
};

const ds_grid *ds_grid_of(ds_format format) { return grids[format].sub ? &grids[format] : NULL; }

bool ds_encode_can(ds_format format) { return ds_grid_of(format) != NULL; }

/* 32 codes of 4 bits, less their offset: value i low, value 16 + i high. */
static void pack_nibbles(const int8_t q[32], int offset, uint8_t qs[16]) {
    for (int i = 0; i < 16; i++) qs[i] = (uint8_t)(((q[i] + offset) & 15) | ((q[16 + i] + offset) & 15) << 4);
}

static void pack_fifth_bits(const int8_t q[32], int offset, uint8_t qh[4]) {
    memset(qh, 0, 4);
    for (int i = 0; i < 32; i++) qh[i / 8] |= (uint8_t)(((q[i] + offset) >> 4 & 1) << i % 8);
}

static void pack_Q4_0(const ds_choice *c, int i, ds_block_Q4_0 *b) {
    b->d = ds_f32_to_f16(c->scale[i]);
    pack_nibbles(c->q + 32 * i, 8, b->qs);
}

static void pack_Q4_1(const ds_choice *c, int i, ds_block_Q4_1 *b) {
    b->d = ds_f32_to_f16(c->scale[i]);
    b->m = ds_f32_to_f16(-c->min[i]);
    pack_nibbles(c->q + 32 * i, 0, b->qs);
}

static void pack_Q5_0(const ds_choice *c, int i, ds_block_Q5_0 *b) {
    b->d = ds_f32_to_f16(c->scale[i]);
    pack_nibbles(c->q + 32 * i, 16, b->qs);
    pack_fifth_bits(c->q + 32 * i, 16, b->qh);
}

static void pack_Q5_1(const ds_choice *c, int i, ds_block_Q5_1 *b) {
    b->d = ds_f32_to_f16(c->scale[i]);
    b->m = ds_f32_to_f16(-c->min[i]);
    pack_nibbles(c->q + 32 * i, 0, b->qs);
    pack_fifth_bits(c->q + 32 * i, 0, b->qh);
}

static void pack_Q8_0(const ds_choice *c, int i, ds_block_Q8_0 *b) {
    b->d = ds_f32_to_f16(c->scale[i]);
    memcpy(b->qs, c->q + 32 * i, 32);
}

static void pack_IQ4_NL(const ds_choice *c, int i, ds_block_IQ4_NL *b) {
    b->d = ds_f32_to_f16(c->scale[i]);
    pack_nibbles(c->q + 32 * i, 0, b->qs);
}

static void pack_Q2_K(const ds_choice *c, int i, ds_block_Q2_K *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = ds_f32_to_f16(c->d);
    b->dmin = ds_f32_to_f16(c->dmin);
    for (int s = 0; s < 16; s++) b->scales[s] = (uint8_t)(c->sc[s] | c->m[s] << 4);
    for (int k = 0; k < 256; k++) b->qs[32 * (k / 128) + k % 32] |= (uint8_t)(c->q[k] << 2 * (k / 32 % 4));
}

static void pack_Q3_K(const ds_choice *c, int i, ds_block_Q3_K *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = ds_f32_to_f16(c->d);
    for (int s = 0; s < 16; s++) {
        int code = c->sc[s] + 32;
        b->scales[s % 8] |= (uint8_t)((code & 15) << 4 * (s / 8));
        b->scales[8 + s % 4] |= (uint8_t)(code >> 4 << 2 * (s / 4));
    }
    for (int k = 0; k < 256; k++) {
        int code = c->q[k] + 4;
        b->qs[32 * (k / 128) + k % 32] |= (uint8_t)((code & 3) << 2 * (k / 32 % 4));
        b->hmask[k % 32] |= (uint8_t)(code >> 2 << k / 32);
    }
}

/* The inverse of ds_scales_k4. */
static void pack_scales_k4(const ds_choice *c, uint8_t packed[12]) {
    for (int j = 0; j < 4; j++) {
        packed[j] = (uint8_t)(c->sc[j] | c->sc[4 + j] >> 4 << 6);
        packed[4 + j] = (uint8_t)(c->m[j] | c->m[4 + j] >> 4 << 6);
        packed[8 + j] = (uint8_t)((c->sc[4 + j] & 15) | (c->m[4 + j] & 15) << 4);
    }
}

static void pack_Q4_K(const ds_choice *c, int i, ds_block_Q4_K *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = ds_f32_to_f16(c->d);
    b->dmin = ds_f32_to_f16(c->dmin);
    pack_scales_k4(c, b->scales);
    for (int k = 0; k < 256; k++) b->qs[32 * (k / 64) + k % 32] |= (uint8_t)(c->q[k] << 4 * (k / 32 % 2));
}

static void pack_Q5_K(const ds_choice *c, int i, ds_block_Q5_K *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = ds_f32_to_f16(c->d);
    b->dmin = ds_f32_to_f16(c->dmin);
    pack_scales_k4(c, b->scales);
    for (int k = 0; k < 256; k++) {
        b->qs[32 * (k / 64) + k % 32] |= (uint8_t)((c->q[k] & 15) << 4 * (k / 32 % 2));
        b->qh[k % 32] |= (uint8_t)(c->q[k] >> 4 << k / 32);
    }
}

static void pack_Q6_K(const ds_choice *c, int i, ds_block_Q6_K *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = ds_f32_to_f16(c->d);
    for (int s = 0; s < 16; s++) b->scales[s] = (int8_t)c->sc[s];
    for (int k = 0; k < 256; k++) {
        int code = c->q[k] + 32, half = k / 128, j = k / 32 % 4, l = k % 32;
        b->ql[64 * half + 32 * (j % 2) + l] |= (uint8_t)((code & 15) << 4 * (j / 2));
        b->qh[32 * half + l] |= (uint8_t)(code >> 4 << 2 * j);
    }
}

static void pack_IQ4_XS(const ds_choice *c, int i, ds_block_IQ4_XS *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = ds_f32_to_f16(c->d);
    for (int j = 0; j < 8; j++) {
        int code = c->sc[j] + 32;
        b->scales_l[j / 2] |= (uint8_t)((code & 15) << 4 * (j % 2));
        b->scales_h |= (uint16_t)(code >> 4 << 2 * j);
        pack_nibbles(c->q + 32 * j, 0, b->qs + 16 * j);
    }
}

/* A byte of signs of the columns from k on. */
static unsigned signs_of(const ds_choice *c, int k) {
    unsigned signs = 0;
    for (int j = 0; j < 8; j++) signs |= (unsigned)(c->q[k + j] < 0) << j;
    return signs;
}

/* Seven bits of signs for each of four groups, and the scale of all. */
static uint32_t tail_of(const ds_choice *c, int s) {
    uint32_t tail = (uint32_t)(c->sc[s] / 2) << 28;
    for (int l = 0; l < 4; l++) tail |= (signs_of(c, 32 * s + 8 * l) & 127) << 7 * l;
    return tail;
}

static uint16_t half_of(const ds_choice *c, int unit) { return ds_f32_to_f16(c->d * (float)unit); }

static void pack_IQ2_XXS(const ds_choice *c, int i, ds_block_IQ2_XXS *b) {
    (void)i;
    b->d = half_of(c, 8);
    for (int s = 0; s < 8; s++) {
        for (int l = 0; l < 4; l++) b->sub[s].qs[l] = (uint8_t)c->point[4 * s + l];
        b->sub[s].tail = tail_of(c, s);
    }
}

static void pack_IQ2_XS(const ds_choice *c, int i, ds_block_IQ2_XS *b) {
    (void)i;
    b->d = half_of(c, 8);
    for (int k = 0; k < 32; k++) b->qs[k] = (uint16_t)(c->point[k] | (signs_of(c, 8 * k) & 127) << 9);
    for (int s = 0; s < 8; s++) b->scales[s] = (uint8_t)(c->sc[2 * s] / 2 | c->sc[2 * s + 1] / 2 << 4);
}

static void pack_IQ2_S(const ds_choice *c, int i, ds_block_IQ2_S *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = half_of(c, 8);
    for (int k = 0; k < 32; k++) {
        b->qs[k] = (uint8_t)c->point[k];
        b->qh[k / 4] |= (uint8_t)(c->point[k] >> 8 << 2 * (k % 4));
        b->signs[k] = (uint8_t)signs_of(c, 8 * k);
    }
    for (int s = 0; s < 8; s++) b->scales[s] = (uint8_t)(c->sc[2 * s] / 2 | c->sc[2 * s + 1] / 2 << 4);
}

static void pack_IQ3_XXS(const ds_choice *c, int i, ds_block_IQ3_XXS *b) {
    (void)i;
    b->d = half_of(c, 4);
    for (int k = 0; k < 64; k++) b->qs[k] = (uint8_t)c->point[k];
    for (int s = 0; s < 8; s++) b->tail[s] = tail_of(c, s);
}

static void pack_IQ3_S(const ds_choice *c, int i, ds_block_IQ3_S *b) {
    (void)i;
    memset(b, 0, sizeof *b);
    b->d = half_of(c, 1);
    for (int k = 0; k < 64; k++) {
        b->qs[k] = (uint8_t)c->point[k];
        b->qh[k / 8] |= (uint8_t)(c->point[k] >> 8 << k % 8);
    }
    for (int k = 0; k < 32; k++) b->signs[k] = (uint8_t)signs_of(c, 8 * k);
    for (int s = 0; s < 4; s++) b->scales[s] = (uint8_t)(c->sc[2 * s] / 2 | c->sc[2 * s + 1] / 2 << 4);
}

void ds_pack(ds_format format, int n, const ds_choice *choice, void *blocks) {
    const int n_blocks = n / (int)ds_format_get(format)->block_elements;
    switch (format) {
#define PACK(id)                                                                              \
    case DS_FORMAT_##id:                                                                      \
        for (int i = 0; i < n_blocks; i++) pack_##id(choice, i, (ds_block_##id *)blocks + i); \
        break;
        /* clang-format off */
        PACK(Q4_0) PACK(Q4_1) PACK(Q5_0) PACK(Q5_1) PACK(Q8_0) PACK(IQ4_NL)
        PACK(Q2_K) PACK(Q3_K) PACK(Q4_K) PACK(Q5_K) PACK(Q6_K) PACK(IQ4_XS)
        PACK(IQ2_XXS) PACK(IQ2_XS) PACK(IQ2_S) PACK(IQ3_XXS) PACK(IQ3_S)
        /* clang-format on */
            default : break;
    }
}
