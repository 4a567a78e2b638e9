/* simd_neon_int.h: the integer primitives on ARM, for products with coded weights: the dot instructions of ARMv8.2
 * (sdot), and where the table has them the matrix ones of ARMv8.6 (i8mm).
 *
 * vi: DS_LANES dwords; in a panel a lane is a weight row and its dword four consecutive values of it.
 * v64, v16, f8: 64 or 16 bytes and 8 floats, whatever the ISA, for products along a row. */
#pragma once

#define DS_HAS_DOTS 1
#define DS_CODE_BIAS 0 /* the dot instruction takes signed codes as they are, and unsigned ones up to 127 as signed */
#define DS_ROW_SPLIT 0

typedef uint32x4_t vi;

DS_INLINE uint8x16_t neon_bytes(vi a) { return vreinterpretq_u8_u32(a); }
DS_INLINE vi neon_dwords(uint8x16_t a) { return vreinterpretq_u32_u8(a); }

DS_INLINE vi vi_load(const void *p) { return neon_dwords(vld1q_u8(p)); }
DS_INLINE void vi_store(void *p, vi a) { vst1q_u8(p, neon_bytes(a)); }
DS_INLINE vi vi_set(uint32_t x) { return vdupq_n_u32(x); }
DS_INLINE vi vi_add(vi a, vi b) { return vaddq_u32(a, b); }
DS_INLINE vi vi_and(vi a, vi b) { return vandq_u32(a, b); }
DS_INLINE vi vi_or(vi a, vi b) { return vorrq_u32(a, b); }
DS_INLINE vi vi_xor(vi a, vi b) { return veorq_u32(a, b); }
/* Shifts as operators: constants after inlining, for which the functions want literals. */
DS_INLINE vi vi_shr(vi a, int n) { return a >> (uint32_t)n; }
DS_INLINE vi vi_shl(vi a, int n) { return a << (uint32_t)n; }
DS_INLINE vi vi_sar(vi a, int n) { return vreinterpretq_u32_s32(vreinterpretq_s32_u32(a) >> n); } /* keeps the sign */
DS_INLINE vi vi_add8(vi a, vi b) { return neon_dwords(vaddq_u8(neon_bytes(a), neon_bytes(b))); }
/* table[b] for each byte b < 16 */
DS_INLINE vi vi_lookup(const int8_t table[16], vi index) {
    return neon_dwords(vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(table)), neon_bytes(index)));
}
/* 16 in each byte of `copies` that has the mask's bit there. */
DS_INLINE uint8x16_t neon_sixteens(uint8x16_t copies, uint8x16_t mask) {
    return vandq_u8(vtstq_u8(copies, mask), vdupq_n_u8(16));
}
/* a, with 16 in byte b of each dword whose bit 4 g + b is set in bits; a's bytes are below 16. */
DS_INLINE vi vi_fifth_bits(vi a, vi bits, int g) {
    static const uint8_t first[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const uint8x16_t copies = vqtbl1q_u8(neon_bytes(bits), vaddq_u8(vld1q_u8(first), vdupq_n_u8((uint8_t)(g / 2))));
    return vorrq_u32(a, neon_dwords(neon_sixteens(copies, neon_bytes(vi_set(g % 2 ? 0x80402010u : 0x08040201u)))));
}
DS_INLINE vf vi_to_float(vi a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
/* Of each dword's low half. */
DS_INLINE vf vi_low_f16(vi a) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a))); }
DS_INLINE vi vf_as_int(vf a) { return vreinterpretq_u32_f32(a); }
DS_INLINE vf vi_as_float(vi a) { return vreinterpretq_f32_u32(a); }

/* out[i] lane r = dword i of the 16 bytes at rows[r] + at. */
DS_INLINE void vi_columns4(const uint8_t *const rows[DS_LANES], size_t at, vi out[4]) {
    vf t[4];
    DS_UNROLL
    for (int r = 0; r < 4; r++) t[r] = vi_as_float(vi_load(rows[r] + at));
    vf_transpose(t);
    DS_UNROLL
    for (int i = 0; i < 4; i++) out[i] = vf_as_int(t[i]);
}
DS_INLINE void vi_columns(const uint8_t *const rows[DS_LANES], size_t at, vi out[DS_LANES]) {
    vi_columns4(rows, at, out);
}

/* ---- Along a row: 64 bytes of one, and what their dots make ---- */

typedef uint8x16_t v16;
typedef struct f8 {
    float32x4_t a, b;
} f8;
#define DS_ROW_AHEAD true /* in rows, all 256 codes are decoded before they are used: registers hold them */

typedef struct v64 {
    uint8x16_t part[4];
} v64;

DS_INLINE f8 f8_set(float x) { return (f8){vdupq_n_f32(x), vdupq_n_f32(x)}; }
DS_INLINE f8 f8_load(const float *p) { return (f8){vld1q_f32(p), vld1q_f32(p + 4)}; }
DS_INLINE f8 f8_sub(f8 x, f8 y) { return (f8){vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
DS_INLINE f8 f8_mul(f8 x, f8 y) { return (f8){vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
DS_INLINE f8 f8_fma(f8 x, f8 y, f8 z) { return (f8){vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
DS_INLINE float f32_of_f16(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }
/* Eight halves, the first at p and each `step` bytes after the one before. */
DS_INLINE f8 f8_halves(const uint8_t *p, size_t step) {
    uint16_t h[8];
    DS_UNROLL
    for (int i = 0; i < 8; i++) memcpy(&h[i], p + (size_t)i * step, 2);
    return (f8){vf_load_f16(h), vf_load_f16(h + 4)};
}
/* Eight bytes as floats. */
DS_INLINE f8 neon_f8_unsigned(uint8x8_t bytes) {
    const uint16x8_t words = vmovl_u8(bytes);
    return (f8){vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), vcvtq_f32_u32(vmovl_high_u16(words))};
}
DS_INLINE f8 neon_f8_signed(int8x8_t bytes) {
    const int16x8_t words = vmovl_s8(bytes);
    return (f8){vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
}
DS_INLINE f8 f8_bytes(uint64_t bytes) { return neon_f8_unsigned(vcreate_u8(bytes)); }
DS_INLINE v16 v16_load(const void *p) { return vld1q_u8(p); }
DS_INLINE v16 v16_set(int x) { return vdupq_n_u8((uint8_t)x); }
DS_INLINE v16 v16_and(v16 a, v16 b) { return vandq_u8(a, b); }
DS_INLINE v16 v16_high_nibbles(v16 a) { return vshrq_n_u8(a, 4); }

/* The 6-bit scales of Q4_K or Q5_K as 8 bytes, then the minimums, from a block's first 16 bytes. */
DS_INLINE v16 v16_scales_k4(const void *block) {
    static const int32_t half_at[4] = {0, -4, 0, 0};
    const vi p = vi_load((const char *)block + 4); /* dwords: 4 scales, 4 minimums, halves of the rest */
    const vi low = vi_and(p, vi_set(DS_BYTES(63)));
    const vi halves = vi_and(vshlq_u32(vdupq_laneq_u32(p, 2), vld1q_s32(half_at)), vi_set(DS_BYTES(15)));
    const vi high = vi_or(halves, vi_and(vi_shr(p, 2), vi_set(DS_BYTES(48))));
    return neon_bytes(vzip1q_u32(low, high));
}
/* The 6-bit scales of Q3_K, less 32, from 12 bytes. */
DS_INLINE v16 v16_scales_q3_k(const uint8_t packed[12]) {
    static const int32_t four_at[4] = {0, 0, -4, -4}, two_at[4] = {0, -2, -4, -6};
    const vi p = vi_load(packed - 4); /* four bytes before them are the block's too */
    const vi low = vreinterpretq_u32_u64(vdupq_laneq_u64(vreinterpretq_u64_u32(vextq_u32(p, p, 1)), 0));
    const vi four = vi_and(vshlq_u32(low, vld1q_s32(four_at)), vi_set(DS_BYTES(15)));
    const vi two = vi_and(vshlq_u32(vdupq_laneq_u32(p, 3), vld1q_s32(two_at)), vi_set(DS_BYTES(3)));
    return vsubq_u8(neon_bytes(vi_or(four, vi_shl(two, 4))), vdupq_n_u8(32));
}

DS_INLINE v64 v64_load2(const void *p, const void *q) {
    const uint8_t *a = p, *b = q;
    return (v64){{vld1q_u8(a), vld1q_u8(a + 16), vld1q_u8(b), vld1q_u8(b + 16)}};
}
DS_INLINE v64 v64_load(const void *p) { return v64_load2(p, (const char *)p + 32); }
DS_INLINE v64 v64_twice(const void *p) { return v64_load2(p, p); }
DS_INLINE v64 v64_and(v64 v, int byte) {
    DS_UNROLL
    for (int i = 0; i < 4; i++) v.part[i] = vandq_u8(v.part[i], vdupq_n_u8((uint8_t)byte));
    return v;
}
DS_INLINE v64 v64_or(v64 v, v64 w) {
    DS_UNROLL
    for (int i = 0; i < 4; i++) v.part[i] = vorrq_u8(v.part[i], w.part[i]);
    return v;
}
DS_INLINE v64 v64_bias(v64 v) { return v; }
/* Bits of every byte moved down by `low` in the first 32 bytes and `high` in the others (up where negative). */
DS_INLINE v64 v64_shift(v64 v, int low, int high) {
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        const int n = i < 2 ? low : high;
        v.part[i] = n < 0 ? v.part[i] << (uint8_t)-n : v.part[i] >> (uint8_t)n;
    }
    return v;
}
DS_INLINE uint8x16_t neon_low(uint8x16_t a) { return vandq_u8(a, vdupq_n_u8(15)); }
DS_INLINE uint8x16_t neon_high(uint8x16_t a) { return vshrq_n_u8(a, 4); }
/* The low halves of 32 bytes at p, then the high halves. */
DS_INLINE v64 v64_split(const void *p) {
    const uint8x16_t a = vld1q_u8(p), b = vld1q_u8((const uint8_t *)p + 16);
    return (v64){{neon_low(a), neon_low(b), neon_high(a), neon_high(b)}};
}
/* Pairs of bits of 32 bytes at p, the lowest or, if high, the third; then those beside them. */
DS_INLINE v64 v64_split_pairs(const void *p, bool high) {
    return v64_and(v64_shift(v64_twice(p), high ? 4 : 0, high ? 6 : 2), 3);
}
/* The low halves of the 16 bytes at p, the high halves of them, and the same of q. */
DS_INLINE v64 v64_nibbles2(const void *p, const void *q) {
    const uint8x16_t a = vld1q_u8(p), b = vld1q_u8(q);
    return (v64){{neon_low(a), neon_high(a), neon_low(b), neon_high(b)}};
}
DS_INLINE v64 v64_lookup(const int8_t table[16], v64 index) {
    const uint8x16_t values = vreinterpretq_u8_s8(vld1q_s8(table));
    DS_UNROLL
    for (int i = 0; i < 4; i++) index.part[i] = vqtbl1q_u8(values, index.part[i]);
    return index;
}

/* Byte i is a copy of byte i / 8 of the two at p, and the mask of one bit of it. */
DS_INLINE uint8x16_t neon_copies(const uint8_t p[2]) { return vcombine_u8(vdup_n_u8(p[0]), vdup_n_u8(p[1])); }
DS_INLINE uint8x16_t neon_bit_masks(void) { return vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u)); }
/* a, with 16 in each byte whose bit is set in the 32 bits at p, then in those at q; a's bytes are below 16. */
DS_INLINE v64 v64_fifth_bits2(v64 v, const void *p, const void *q) {
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        const uint8_t *bits = (const uint8_t *)(i < 2 ? p : q) + i % 2 * 2;
        v.part[i] = vorrq_u8(v.part[i], neon_sixteens(neon_copies(bits), neon_bit_masks()));
    }
    return v;
}

/* The sums of one row with one token. Two of dots, because an FMA waits for the one before it. */
typedef struct row_sum {
    float32x4_t y[2], min;
} row_sum;

DS_INLINE void row_sum_clear(row_sum *s) { s->y[0] = s->y[1] = s->min = vdupq_n_f32(0.0f); }
DS_INLINE float row_sum_total(const row_sum *s, bool per_16, float min_factor) {
    return vaddvq_f32(vfmsq_f32(vaddq_f32(s->y[0], s->y[1]), s->min, vdupq_n_f32(min_factor)));
}

/* Scales of 256 values, one per 32 or 16; of the former the first two vectors. */
typedef struct row_scales {
    float32x4_t scale[4], min[4];
} row_scales;

DS_INLINE row_scales row_scales_32(f8 scale, f8 min) {
    return (row_scales){.scale = {scale.a, scale.b}, .min = {min.a, min.b}};
}
/* From 8 bytes of scales, then 8 of minimums; and the halves d and dmin at p. */
DS_INLINE row_scales row_scales_k4(v16 bytes, const void *p) {
    uint16_t d[2];
    memcpy(d, p, sizeof d);
    return row_scales_32(f8_mul(neon_f8_unsigned(vget_low_u8(bytes)), f8_set(f32_of_f16(d[0]))),
                         f8_mul(neon_f8_unsigned(vget_high_u8(bytes)), f8_set(f32_of_f16(d[1]))));
}
/* sc * d and m * dmin, for signed bytes. */
DS_INLINE row_scales row_scales_16(v16 sc, float d, v16 m, float dmin) {
    const int8x16_t s = vreinterpretq_s8_u8(sc), t = vreinterpretq_s8_u8(m);
    const f8 scale[2] = {f8_mul(neon_f8_signed(vget_low_s8(s)), f8_set(d)),
                         f8_mul(neon_f8_signed(vget_high_s8(s)), f8_set(d))};
    const f8 min[2] = {f8_mul(neon_f8_signed(vget_low_s8(t)), f8_set(dmin)),
                       f8_mul(neon_f8_signed(vget_high_s8(t)), f8_set(dmin))};
    return (row_scales){.scale = {scale[0].a, scale[0].b, scale[1].a, scale[1].b},
                        .min = {min[0].a, min[0].b, min[1].a, min[1].b}};
}
/* Of 16 bytes, the low halves times the half at p and the high ones times the half behind it. */
DS_INLINE row_scales row_scales_nibbles(const uint8_t bytes[16], const void *p) {
    const v16 both = v16_load(bytes);
    uint16_t d[2];
    memcpy(d, p, sizeof d);
    return row_scales_16(v16_and(both, v16_set(15)), f32_of_f16(d[0]), v16_high_nibbles(both), f32_of_f16(d[1]));
}
/* The scales times a token's, a lane for each sum that row_sum_add makes; the minimums' part of the sums. */
DS_INLINE void row_start(row_sum *s, const row_scales *w, bool per_16, bool split, const act_meta *x, row_scales *out) {
    if (per_16) {
        DS_UNROLL
        for (int i = 0; i < 4; i++) {
            out->scale[i] = vmulq_f32(w->scale[i], vld1q_f32(x->scale_16 + 4 * i));
            s->min = vfmaq_f32(s->min, w->min[i], vld1q_f32(x->sum_16 + 4 * i));
        }
        return;
    }
    DS_UNROLL
    for (int i = 0; i < 2; i++) {
        const float32x4_t scale = vmulq_f32(w->scale[i], vld1q_f32(x->scale + 4 * i));
        s->min = vfmaq_f32(s->min, w->min[i], vld1q_f32(x->sum_32 + 4 * i));
        out->scale[2 * i] = vzip1q_f32(scale, scale);
        out->scale[2 * i + 1] = vzip2q_f32(scale, scale);
    }
}
/* Add the products of 64 values, the j-th of four: codes q and x. Sums of 16 neighbours, or of halves of 32. */
DS_INLINE void row_sum_add(row_sum *s, bool is_signed, bool per_16, v64 q, const int8_t *x, const act_meta *meta,
                           const row_scales *scales, int j) {
    int32x4_t dots[4];
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        const int32x4_t start = per_16 || i % 2 == 0 ? vdupq_n_s32(0) : dots[i / 2];
        dots[per_16 ? i : i / 2] = vdotq_s32(start, vreinterpretq_s8_u8(q.part[i]), vld1q_s8(x + 16 * i));
    }
    const int32x4_t sums =
        per_16 ? vpaddq_s32(vpaddq_s32(dots[0], dots[1]), vpaddq_s32(dots[2], dots[3])) : vpaddq_s32(dots[0], dots[1]);
    s->y[j % 2] = vfmaq_f32(s->y[j % 2], vcvtq_f32_s32(sums), scales->scale[j]);
}

/* ---- Packing and multiplying in panels ---- */

#define DS_ROW_TOKENS 4 /* up to here a row is decoded for all tokens at once; above it, a panel pays */

/* q[0..32) = x * inverse to nearest even; sums of the two halves. */
DS_INLINE void f32_quantize32(const float *x, float inverse, int8_t *q, int sums[2]) {
    DS_UNROLL
    for (int h = 0; h < 2; h++) {
        int32x4_t d[4];
        DS_UNROLL
        for (int i = 0; i < 4; i++) d[i] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 16 * h + 4 * i), inverse));
        const int16x8_t a = vqmovn_high_s32(vqmovn_s32(d[0]), d[1]), b = vqmovn_high_s32(vqmovn_s32(d[2]), d[3]);
        vst1q_s8(q + 16 * h, vqmovn_high_s16(vqmovn_s16(a), b));
        sums[h] = vaddvq_s32(vaddq_s32(vaddq_s32(d[0], d[1]), vaddq_s32(d[2], d[3])));
    }
}
DS_INLINE float f32_max_abs32(const float *x) {
    vf max = vabsq_f32(vld1q_f32(x));
    DS_UNROLL
    for (int i = 4; i < 32; i += 4) max = vmaxq_f32(max, vabsq_f32(vld1q_f32(x + i)));
    return vmaxvq_f32(max);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include "kernels/simd_neon_mm.h"
#else

#define DS_TILE_TOKENS 6

/* The first n of four dwords, without reading past them. */
DS_INLINE int8x16_t neon_tokens(int n, const int8_t *p) {
    if (n >= 4) return vld1q_s8(p);
    int32_t last = 0;
    memcpy(&last, p + 4 * (n - 1), sizeof last);
    if (n == 1) return vreinterpretq_s8_s32((int32x4_t){last});
    const int8x8_t two = vld1_s8(p);
    return vcombine_s8(two, n == 3 ? vreinterpret_s8_s32((int32x2_t){last}) : vdup_n_s8(0));
}
/* acc + dots of w with one dword of x; the instruction wants the dword's place as a literal. */
DS_INLINE vi neon_dot_lane(vi acc, int8x16_t w, int8x16_t x, int lane) {
    const int32x4_t a = vreinterpretq_s32_u32(acc);
    return vreinterpretq_u32_s32(lane == 0   ? vdotq_laneq_s32(a, w, x, 0)
                                 : lane == 1 ? vdotq_laneq_s32(a, w, x, 1)
                                 : lane == 2 ? vdotq_laneq_s32(a, w, x, 2)
                                             : vdotq_laneq_s32(a, w, x, 3));
}

/* acc[t][v] += dots over n_k4 dwords of k: w is (n_k4, DS_PANEL_ROWS) dwords, of which two vectors of rows are used; a
 * is (n_k4, n_tok) dwords. n_tok and n_k4 are constants. */
DS_INLINE void panel_dot(code_range range, int n_k4, int n_tok, const uint8_t *w, const int8_t *a,
                         vi acc[DS_TILE_TOKENS][2]) {
    DS_UNROLL
    for (int i = 0; i < n_k4; i++) {
        const int8_t *rows = (const int8_t *)w + (size_t)i * 4 * DS_PANEL_ROWS, *tokens = a + 4 * i * n_tok;
        const int8x16_t w0 = vld1q_s8(rows), w1 = vld1q_s8(rows + 16);
        int8x16_t x[(DS_TILE_TOKENS + 3) / 4];
        DS_UNROLL
        for (int t = 0; t < n_tok; t += 4) x[t / 4] = neon_tokens(n_tok - t, tokens + 4 * t);
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            acc[t][0] = neon_dot_lane(acc[t][0], w0, x[t / 4], t % 4);
            acc[t][1] = neon_dot_lane(acc[t][1], w1, x[t / 4], t % 4);
        }
    }
}

#endif
