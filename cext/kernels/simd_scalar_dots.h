/* simd_scalar_dots.h: the integer primitives of attention in plain C. */
#pragma once

#define DS_ROW_TILE 4
#define DS_VALUE_VECS 2
#define DS_QUERY_BIAS 0

typedef uint32_t vi, vi_dword;

DS_INLINE vi vi_load(const void *p) {
    vi a;
    memcpy(&a, p, sizeof a);
    return a;
}
DS_INLINE void vi_store(void *p, vi a) { memcpy(p, &a, sizeof a); }
DS_INLINE vi vi_set(uint32_t x) { return x; }
DS_INLINE vi vi_or(vi a, vi b) { return a | b; }
DS_INLINE vi vi_and(vi a, vi b) { return a & b; }
DS_INLINE vi vi_shl(vi a, int n) { return a << n; }
DS_INLINE vf vi_to_float(vi a) { return (float)(int32_t)a; }
DS_INLINE vi vf_as_int(vf a) { return vi_load(&a); }
DS_INLINE vf vi_as_float(vi a) {
    vf x;
    memcpy(&x, &a, sizeof x);
    return x;
}

/* To the nearest, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves the rounded integer in the low bits. */
DS_INLINE vi vf_to_int(vf a) { return vf_as_int(a + 0x1.8p23f) - 0x4b400000u; }
DS_INLINE vf vf_below(vf x, int i, vi limit) { return (int32_t)limit > i ? x : -INFINITY; }

DS_INLINE vi vi_add(vi a, vi b) { return a + b; }
DS_INLINE vi_dword vi_dword_load(const void *p) { return vi_load(p); }
DS_INLINE vf vi_dword_as_float(vi_dword a) { return vi_as_float(a); }

#define DS_FOURS false /* no panel has half a group */
DS_INLINE vi_dword vi_four_dwords_load(const void *p) { return vi_load(p); }
DS_INLINE vi vi_join_fours(const vi x[4]) { return x[0]; }

DS_INLINE vi vi_dot16(vi sums, vi a, vi_dword b) {
    return sums + (vi)((int16_t)a * (int16_t)b) + (vi)((int16_t)(a >> 16) * (int16_t)(b >> 16));
}
DS_INLINE vi vi_dot_query(vi sums, vi q, vi_dword c) {
    for (int i = 0; i < 32; i += 8) sums += (vi)((int8_t)(q >> i) * (int8_t)(c >> i));
    return sums;
}
DS_INLINE vi vi_dot_weights(vi sums, vi_dword p, vi c) {
    for (int i = 0; i < 32; i += 8) sums += (vi)((uint8_t)(p >> i) * (int8_t)(c >> i));
    return sums;
}

DS_INLINE void i16_pack32(const float *x, float scale, int16_t out[32]) {
    for (int i = 0; i < 32; i++) out[ds_row_place16(i)] = (int16_t)vf_to_int(x[i] * scale);
}
DS_INLINE void i8_pack64(const float *x, float scale, int8_t out[64]) {
    for (int i = 0; i < 64; i++) out[ds_row_place8(i)] = (int8_t)vf_to_int(x[i] * scale);
}
/* The pair of column `at` in a panel. */
DS_INLINE void i16_put_pair(uint32_t *panel, size_t at, const int16_t pair[2]) { memcpy(panel + at, pair, 4); }
DS_INLINE void i16_pairs(const int16_t a[32], const int16_t b[32], uint32_t out[32]) {
    for (int i = 0; i < 32; i++)
        out[i] = (uint16_t)a[ds_row_place16(i)] | (uint32_t)(uint16_t)b[ds_row_place16(i)] << 16;
}
DS_INLINE void i8_quads(const int8_t *const rows[4], uint32_t out[64]) {
    for (int i = 0; i < 64; i++) {
        out[i] = 0;
        for (int r = 0; r < 4; r++) out[i] |= (uint32_t)(uint8_t)rows[r][ds_row_place8(i)] << (8 * r);
    }
}
