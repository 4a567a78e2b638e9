/* simd_neon_dots.h: the integer primitives of attention on ARM: dots of rows in int16 and int8, and their packing.
 *
 * There is no dot of int16 that sums into int32, but a multiply-add of four values by one. Vectors of pairs therefore
 * hold the first value of four columns, then the second of them. */
#pragma once

#define DS_ROW_TILE 8   /* rows by two vectors of sums in registers */
#define DS_VALUE_VECS 2 /* vectors of values by rows of sums */
#define DS_QUERY_BIAS 0 /* both sides of the dot instruction are signed */

DS_INLINE vi vf_to_int(vf a) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(a)); } /* to the nearest, ties to even */
/* x, or -infinity in lanes whose limit is not above i. */
DS_INLINE vf vf_below(vf x, int i, vi limit) {
    return vbslq_f32(vcgtq_s32(vreinterpretq_s32_u32(limit), vdupq_n_s32(i)), x, vdupq_n_f32(-INFINITY));
}

/* A dword of memory in the first lane: what the instructions broadcast from. */
typedef int32x2_t vi_dword;

DS_INLINE vi_dword vi_dword_load(const void *p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return (int32x2_t){x, 0};
}

DS_INLINE vf vi_dword_as_float(vi_dword a) { return vreinterpretq_f32_s32(vdupq_lane_s32(a, 0)); }

#define DS_FOURS false /* no panel has half a group */
DS_INLINE vi_dword vi_four_dwords_load(const void *p) { return vi_dword_load(p); }
DS_INLINE vi vi_join_fours(const vi x[4]) { return x[0]; }

/* sums + a . b over the two int16 of each column. */
DS_INLINE vi vi_dot16(vi sums, vi a, vi_dword b) {
    const int16x8_t pairs = vreinterpretq_s16_u32(a);
    const int16x4_t x = vreinterpret_s16_s32(b);
    const int32x4_t first = vmlal_lane_s16(vreinterpretq_s32_u32(sums), vget_low_s16(pairs), x, 0);
    return vreinterpretq_u32_s32(vmlal_high_lane_s16(first, pairs, x, 1));
}
/* sums + q . c over the four bytes of each dword. */
DS_INLINE vi vi_dot_query(vi sums, vi q, vi_dword c) {
    return vreinterpretq_u32_s32(
        vdotq_lane_s32(vreinterpretq_s32_u32(sums), vreinterpretq_s8_u32(q), vreinterpret_s8_s32(c), 0));
}
/* sums + p . c over the four bytes of each dword, p unsigned and c within -127..127. */
DS_INLINE vi vi_dot_weights(vi sums, vi_dword x, vi c) {
    const vi p = vdupq_lane_u32(vreinterpret_u32_s32(x), 0);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vreinterpretq_u32_s32(vusdotq_s32(vreinterpretq_s32_u32(sums), neon_bytes(p), vreinterpretq_s8_u32(c)));
#else
    /* Both unsigned, and 128 times the sum of p taken off. */
    const uint32x4_t extra = vdotq_u32(vdupq_n_u32(0), neon_bytes(p), vdupq_n_u8(128));
    return vsubq_u32(vdotq_u32(sums, neon_bytes(p), veorq_u8(neon_bytes(c), vdupq_n_u8(128))), extra);
#endif
}

DS_INLINE int16x8_t neon_pack16(vf low, vf high, float s) {
    const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(low, s)), b = vcvtnq_s32_f32(vmulq_n_f32(high, s));
    return vqmovn_high_s32(vqmovn_s32(a), b);
}

/* out = x * scale to the nearest, in the order of ds_row_place16. */
DS_INLINE void i16_pack32(const float *x, float scale, int16_t out[32]) {
    DS_UNROLL
    for (int h = 0; h < 16; h += 4) vst1q_s16(out + 2 * h, neon_pack16(vf_load(x + h), vf_load(x + 16 + h), scale));
}

DS_INLINE void i8_pack64(const float *x, float scale, int8_t out[64]) {
    DS_UNROLL
    for (int h = 0; h < 16; h += 4) {
        const int16x8_t a = neon_pack16(vf_load(x + h), vf_load(x + 16 + h), scale);
        const int16x8_t b = neon_pack16(vf_load(x + 32 + h), vf_load(x + 48 + h), scale);
        vst1q_s8(out + 4 * h, vqmovn_high_s16(vqmovn_s16(a), b));
    }
}

/* The pair of column `at` in a panel. */
DS_INLINE void i16_put_pair(uint32_t *panel, size_t at, const int16_t pair[2]) {
    int16_t *four = (int16_t *)(void *)(panel + at / 4 * 4) + at % 4;
    four[0] = pair[0];
    four[4] = pair[1];
}

/* Columns of value c of a, then of b. */
DS_INLINE void i16_pairs(const int16_t a[32], const int16_t b[32], uint32_t out[32]) {
    DS_UNROLL
    for (int h = 0; h < 16; h += 4) {
        const uint64x2_t x = vreinterpretq_u64_s16(vld1q_s16(a + 2 * h)),
                         y = vreinterpretq_u64_s16(vld1q_s16(b + 2 * h));
        vi_store(out + h, vreinterpretq_u32_u64(vzip1q_u64(x, y)));
        vi_store(out + 16 + h, vreinterpretq_u32_u64(vzip2q_u64(x, y)));
    }
}

/* Dword c holds value c of each of four rows. */
DS_INLINE void i8_quads(const int8_t *const rows[4], uint32_t out[64]) {
    DS_UNROLL
    for (int h = 0; h < 16; h += 4) {
        uint8x16_t r[4];
        DS_UNROLL
        for (int i = 0; i < 4; i++) r[i] = neon_bytes(vi_load(rows[i] + 4 * h));
        const uint16x8_t a = vreinterpretq_u16_u8(vzip1q_u8(r[0], r[1])),
                         b = vreinterpretq_u16_u8(vzip1q_u8(r[2], r[3]));
        const uint16x8_t c = vreinterpretq_u16_u8(vzip2q_u8(r[0], r[1])),
                         d = vreinterpretq_u16_u8(vzip2q_u8(r[2], r[3]));
        vi_store(out + h, vreinterpretq_u32_u16(vzip1q_u16(a, b)));
        vi_store(out + 16 + h, vreinterpretq_u32_u16(vzip2q_u16(a, b)));
        vi_store(out + 32 + h, vreinterpretq_u32_u16(vzip1q_u16(c, d)));
        vi_store(out + 48 + h, vreinterpretq_u32_u16(vzip2q_u16(c, d)));
    }
}
