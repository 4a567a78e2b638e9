/* simd_neon_grid.h: 256 codes of the grid formats from their indices and signs, with an entry's load for each index.
 * Codes come with their signs, in order. */
#pragma once

#include "kernels/grid_loaded.h"

enum { grid_values_IQ3_XXS, grid_values_IQ3_S }; /* in the entries already */

/* 32 indices, in memory, because they are used one by one. */
typedef struct grid_index {
    DS_ALIGNED uint16_t words[32];
} grid_index;

/* 2 n + 1 of the 16 halves n of 8 bytes, low ones first. */
DS_INLINE v16 v16_odd_nibbles(const uint8_t p[8]) {
    const uint8x8_t a = vld1_u8(p), low = vand_u8(a, vdup_n_u8(15)), high = vshr_n_u8(a, 4);
    const v16 n = vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
    return vorrq_u8(vshlq_n_u8(n, 1), vdupq_n_u8(1));
}

DS_INLINE void neon_put_index(grid_index *index, int i, uint16x8_t words) { vst1q_u16(index->words + 8 * i, words); }
DS_INLINE uint16x8_t neon_words(const void *p, int i) { return vld1q_u16((const uint16_t *)p + 8 * i); }
/* Of each of two bytes four words: two bits of it, from the lowest pair up, whose first is moved up by `shift`; `mask`
 * of that. */
DS_INLINE uint16x8_t neon_high_bits(const uint8_t bytes[2], int shift, int mask) {
    static const int16_t steps[8] = {0, -2, -4, -6, 0, -2, -4, -6};
    const uint16x8_t copies = vcombine_u16(vdup_n_u16(bytes[0]), vdup_n_u16(bytes[1]));
    const int16x8_t shifts = vaddq_s16(vld1q_s16(steps), vdupq_n_s16((int16_t)shift));
    return vandq_u16(vshlq_u16(copies, shifts), vdupq_n_u16((uint16_t)mask));
}

/* The first four bytes of every eight. */
DS_INLINE grid_index grid_index_fours(const void *p) {
    grid_index index;
    DS_UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8x16_t bytes = vreinterpretq_u8_u32(vld2q_u32((const uint32_t *)p + 8 * i).val[0]);
        neon_put_index(&index, 2 * i, vmovl_u8(vget_low_u8(bytes)));
        neon_put_index(&index, 2 * i + 1, vmovl_high_u8(bytes));
    }
    return index;
}
/* The low nine bits of words. */
DS_INLINE grid_index grid_index_nines(const void *p) {
    grid_index index;
    DS_UNROLL
    for (int i = 0; i < 4; i++) neon_put_index(&index, i, vandq_u16(neon_words(p, i), vdupq_n_u16(511)));
    return index;
}
/* Bytes, with bits 8 and 9 from pairs of bits. */
DS_INLINE grid_index grid_index_tens(const uint8_t low[32], const uint8_t pairs[8]) {
    grid_index index;
    DS_UNROLL
    for (int i = 0; i < 4; i++)
        neon_put_index(&index, i, vorrq_u16(vmovl_u8(vld1_u8(low + 8 * i)), neon_high_bits(pairs + 2 * i, 8, 0x300)));
    return index;
}
DS_INLINE uint16x8_t neon_seconds(const void *p, int i, bool odd) {
    return odd ? vshrq_n_u16(neon_words(p, i), 8) : vandq_u16(neon_words(p, i), vdupq_n_u16(255));
}
/* The even or the odd ones of 64 bytes. */
DS_INLINE grid_index grid_index_seconds(const void *p, bool odd) {
    grid_index index;
    DS_UNROLL
    for (int i = 0; i < 4; i++) neon_put_index(&index, i, neon_seconds(p, i, odd));
    return index;
}
/* The same with bit 8 from 64 bits. */
DS_INLINE grid_index grid_index_seconds_nine(const void *p, const uint8_t bits[8], bool odd) {
    grid_index index;
    DS_UNROLL
    for (int i = 0; i < 4; i++)
        neon_put_index(&index, i, vorrq_u16(neon_seconds(p, i, odd), neon_high_bits(bits + 2 * i, odd ? 7 : 8, 0x100)));
    return index;
}

/* The 256 codes of a group. */
typedef struct grid_codes {
    v64 q[4];
} grid_codes;

/* 32 entries of eight values. */
DS_INLINE void grid_codes8(grid_codes *codes, const grid8_entry *grid, int n, const grid_index *index) {
    DS_UNROLL
    for (int i = 0; i < 16; i++)
        codes->q[i / 4].part[i % 4] =
            vcombine_u8(vcreate_u8(grid[index->words[2 * i]]), vcreate_u8(grid[index->words[2 * i + 1]]));
}
/* 64 entries of four values, the even ones and the odd ones. */
DS_INLINE void grid_codes4(grid_codes *codes, const grid4_entry *grid, int n, int values, const grid_index index[2]) {
    DS_UNROLL
    for (int i = 0; i < 16; i++) {
        const uint16_t *even = index[0].words + 2 * i, *odd = index[1].words + 2 * i;
        codes->q[i / 4].part[i % 4] = vcombine_u8(vcreate_u8(grid[even[0]] | (uint64_t)grid[odd[0]] << 32),
                                                  vcreate_u8(grid[even[1]] | (uint64_t)grid[odd[1]] << 32));
    }
}

/* Bit j of byte i is the sign of value 8 i + j. */
typedef struct grid_signs {
    uint8x16_t half[2];
} grid_signs;

/* The eighth sign makes the number of signs even. */
DS_INLINE uint8x16_t neon_sevens(uint8x16_t a) { return vorrq_u8(a, vshlq_n_u8(vcntq_u8(a), 7)); }
DS_INLINE grid_signs grid_signs_load(const uint8_t signs[32]) {
    return (grid_signs){{vld1q_u8(signs), vld1q_u8(signs + 16)}};
}
/* From the top seven bits of words. */
DS_INLINE grid_signs grid_signs_top(const void *p) {
    grid_signs signs;
    DS_UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8x16_t tops = vshrn_high_n_u16(vshrn_n_u16(neon_words(p, 2 * i), 8), neon_words(p, 2 * i + 1), 8);
        signs.half[i] = neon_sevens(vshrq_n_u8(tops, 1));
    }
    return signs;
}

/* Dwords of four times 7 sign bits and 4 of scale. */
typedef struct grid_tails {
    uint32x4_t half[2];
} grid_tails;

DS_INLINE grid_tails grid_tails_load(const void *p) {
    return (grid_tails){{vi_load(p), vi_load((const char *)p + 16)}};
}
/* Every second dword of 64 bytes. */
DS_INLINE grid_tails grid_tails_seconds(const void *p) {
    return (grid_tails){{vld2q_u32(p).val[1], vld2q_u32((const uint32_t *)p + 8).val[1]}};
}
DS_INLINE grid_signs grid_tails_signs(grid_tails tails) {
    grid_signs signs;
    DS_UNROLL
    for (int i = 0; i < 2; i++) {
        const vi a = tails.half[i];
        const vi low = vi_or(vi_and(a, vi_set(127)), vi_and(vi_shl(a, 1), vi_set(127u << 8)));
        const vi high = vi_or(vi_and(vi_shl(a, 2), vi_set(127u << 16)), vi_and(vi_shl(a, 3), vi_set(127u << 24)));
        signs.half[i] = neon_sevens(neon_bytes(vi_or(low, high)));
    }
    return signs;
}
DS_INLINE row_scales grid_scales_32(f8 scale) { return row_scales_32(scale, scale); }
DS_INLINE row_scales grid_scales_16(v16 sc, float d) { return row_scales_16(sc, d, sc, d); }
/* (2 n + 1) unit. */
DS_INLINE row_scales grid_tails_scales(grid_tails tails, float unit) {
    const f8 n = {vi_to_float(vi_shr(tails.half[0], 28)), vi_to_float(vi_shr(tails.half[1], 28))};
    return grid_scales_32(f8_fma(n, f8_set(2.0f * unit), f8_set(unit)));
}

/* Negates the codes whose bits are set. */
DS_INLINE void grid_codes_sign(grid_codes *codes, grid_signs signs) {
    const uint8x16_t copies = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
    DS_UNROLL
    for (int i = 0; i < 16; i++) {
        const uint8x16_t place = vaddq_u8(copies, vdupq_n_u8((uint8_t)(i % 8 * 2)));
        const uint8x16_t minus = vtstq_u8(vqtbl1q_u8(signs.half[i / 8], place), neon_bit_masks());
        uint8x16_t *part = &codes->q[i / 4].part[i % 4];
        *part = vsubq_u8(veorq_u8(*part, minus), minus);
    }
}

/* 64 of the codes, the j-th of four. */
typedef v64 grid_part;

DS_INLINE grid_part grid_codes_part(const grid_codes *codes, int j) { return codes->q[j]; }
/* Add their products. */
DS_INLINE void row_sum_add_part(row_sum *s, bool per_16, grid_part part, const int8_t *x, const act_meta *meta,
                                const row_scales *scales, int j) {
    row_sum_add(s, true, per_16, part, x, meta, scales, j);
}

/* The codes of a group and its scales, in memory: dword i is dword grid_place(i) of the 256 codes. */
DS_INLINE int grid_place(int i) { return i; }
enum { DS_GRID_SCALE_STEP = 1 };
DS_INLINE void grid_store(const grid_codes *from, const row_scales *scales, uint8_t codes[256], float scale[16]) {
    DS_UNROLL
    for (int i = 0; i < 16; i++) vst1q_u8(codes + 16 * i, from->q[i / 4].part[i % 4]);
    DS_UNROLL
    for (int i = 0; i < 4; i++) vst1q_f32(scale + 4 * i, scales->scale[i]);
}

#include "kernels/grid_tables.h"
