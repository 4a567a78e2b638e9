/* simd_x86_int.h: the integer primitives on x86, for products with coded weights.
 *
 * vi: DS_LANES dwords; in a panel a lane is a weight row and its dword four consecutive values of it.
 * v64, v16, f8: 64 or 16 bytes and 8 floats, whatever the ISA, for products along a row. */
#pragma once

#define DS_HAS_DOTS 1 /* this ISA has the fast products */

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define DS_CODE_BIAS 128 /* signed codes are used plus this: the dot instruction wants unsigned */
#define DS_ROW_SPLIT 1   /* in rows, parts of bytes are used where they are, up to 64 times as large */
#else
#define DS_CODE_BIAS 0
#define DS_ROW_SPLIT 0
#endif

#if defined(__AVXVNNI__)
/* The dot instructions of AVX-VNNI, or for tests on machines without it their twins of AVX-512VL, which differ in coding only. */
#if DS_AVXVNNI_AS_EVEX
#define X86_VNNI_CODING "%{evex%} "
#else
#define X86_VNNI_CODING "%{vex%} "
#endif

DS_INLINE __m256i x86_dpbusd(__m256i sums, __m256i u, __m256i s) {
#if DS_AVXVNNI_AS_EVEX
    __asm__(X86_VNNI_CODING "vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(u), "x"(s));
    return sums;
#else
    return _mm256_dpbusd_avx_epi32(sums, u, s);
#endif
}
#endif

/* Index of a shuffle that copies byte `byte` of every dword to all four of its bytes. */
#define X86_COPY_BYTE(byte)                                                                               \
    _mm_set_epi32((int)(DS_BYTES(12 + (byte))), (int)(DS_BYTES(8 + (byte))), (int)(DS_BYTES(4 + (byte))), \
                  (int)(DS_BYTES(byte)))

#if defined(__AVX512F__)

typedef __m512i vi;

DS_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
DS_INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
DS_INLINE vi vi_set(uint32_t x) { return _mm512_set1_epi32((int)x); }
DS_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
DS_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
DS_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
DS_INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
DS_INLINE vi vi_shr(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
DS_INLINE vi vi_shl(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
DS_INLINE vi vi_sar(vi a, int n) { return _mm512_srai_epi32(a, (unsigned)n); } /* keeps the sign */
/* table[b] for each byte b < 16 */
DS_INLINE vi vi_lookup(const int8_t table[16], vi index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), index);
}
/* a, with 16 in byte b of each dword whose bit 4 g + b is set in bits; a's bytes are below 16. */
DS_INLINE vi vi_fifth_bits(vi a, vi bits, int g) {
    const vi copies = _mm512_shuffle_epi8(bits, _mm512_broadcast_i32x4(X86_COPY_BYTE(g / 2)));
    const __mmask64 set = _mm512_test_epi8_mask(copies, vi_set(g % 2 ? 0x80402010u : 0x08040201u));
    return _mm512_mask_add_epi8(a, set, a, vi_set(DS_BYTES(16)));
}
DS_INLINE vf vi_to_float(vi a) { return _mm512_cvtepi32_ps(a); }
DS_INLINE vf vi_low_f16(vi a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); } /* of each dword's low half */
DS_INLINE vi vf_as_int(vf a) { return _mm512_castps_si512(a); }
DS_INLINE vf vi_as_float(vi a) { return _mm512_castsi512_ps(a); }

/* out[i] lane r = dword i of the 16 bytes at rows[r] + at. */
DS_INLINE void vi_columns4(const uint8_t *const rows[DS_LANES], size_t at, vi out[4]) {
    vi a[4];
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[i] + at)));
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)(rows[4 + i] + at)), 1);
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)(rows[8 + i] + at)), 2);
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)(rows[12 + i] + at)), 3);
    }
    const vi b = _mm512_unpacklo_epi32(a[0], a[1]), c = _mm512_unpackhi_epi32(a[0], a[1]);
    const vi d = _mm512_unpacklo_epi32(a[2], a[3]), e = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(b, d);
    out[1] = _mm512_unpackhi_epi64(b, d);
    out[2] = _mm512_unpacklo_epi64(c, e);
    out[3] = _mm512_unpackhi_epi64(c, e);
}

#else

typedef __m256i vi;

DS_INLINE vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
DS_INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256(p, a); }
DS_INLINE vi vi_set(uint32_t x) { return _mm256_set1_epi32((int)x); }
DS_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
DS_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
DS_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
DS_INLINE vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
DS_INLINE vi vi_shr(vi a, int n) { return _mm256_srli_epi32(a, n); }
DS_INLINE vi vi_shl(vi a, int n) { return _mm256_slli_epi32(a, n); }
DS_INLINE vi vi_sar(vi a, int n) { return _mm256_srai_epi32(a, n); }
DS_INLINE vi vi_lookup(const int8_t table[16], vi index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), index);
}
DS_INLINE vi vi_fifth_bits(vi a, vi bits, int g) {
    const vi copies = _mm256_shuffle_epi8(bits, _mm256_broadcastsi128_si256(X86_COPY_BYTE(g / 2)));
    const vi mask = vi_set(g % 2 ? 0x80402010u : 0x08040201u);
    const vi set = _mm256_cmpeq_epi8(vi_and(copies, mask), mask);
    return vi_or(a, vi_and(set, vi_set(DS_BYTES(16))));
}
DS_INLINE vf vi_to_float(vi a) { return _mm256_cvtepi32_ps(a); }
DS_INLINE vf vi_low_f16(vi a) {
    const vi halves = _mm256_packus_epi32(vi_and(a, vi_set(0xffff)), _mm256_setzero_si256());
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
}
DS_INLINE vi vf_as_int(vf a) { return _mm256_castps_si256(a); }
DS_INLINE vf vi_as_float(vi a) { return _mm256_castsi256_ps(a); }

DS_INLINE void vi_columns4(const uint8_t *const rows[DS_LANES], size_t at, vi out[4]) {
    vi a[4];
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(rows[i] + at)));
        a[i] = _mm256_inserti128_si256(a[i], _mm_loadu_si128((const __m128i *)(rows[4 + i] + at)), 1);
    }
    const vi b = _mm256_unpacklo_epi32(a[0], a[1]), c = _mm256_unpackhi_epi32(a[0], a[1]);
    const vi d = _mm256_unpacklo_epi32(a[2], a[3]), e = _mm256_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm256_unpacklo_epi64(b, d);
    out[1] = _mm256_unpackhi_epi64(b, d);
    out[2] = _mm256_unpacklo_epi64(c, e);
    out[3] = _mm256_unpackhi_epi64(c, e);
}

#endif

/* out[i] lane r = dword i of the 4 DS_LANES bytes at rows[r] + at. */
DS_INLINE void vi_columns(const uint8_t *const rows[DS_LANES], size_t at, vi out[DS_LANES]) {
    vf t[DS_LANES];
    DS_UNROLL
    for (int r = 0; r < DS_LANES; r++) t[r] = vf_load((const float *)(const void *)(rows[r] + at));
    vf_transpose(t);
    DS_UNROLL
    for (int i = 0; i < DS_LANES; i++) out[i] = vf_as_int(t[i]);
}

/* ---- Along a row: 64 bytes of one, and the 16 floats that their dots make ---- */

typedef __m128i v16;
typedef __m256i v32;
typedef __m256 f8;

DS_INLINE f8 f8_set(float x) { return _mm256_set1_ps(x); }
DS_INLINE f8 f8_load(const float *p) { return _mm256_loadu_ps(p); }
DS_INLINE f8 f8_sub(f8 a, f8 b) { return _mm256_sub_ps(a, b); }
DS_INLINE f8 f8_mul(f8 a, f8 b) { return _mm256_mul_ps(a, b); }
DS_INLINE f8 f8_fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }
DS_INLINE float f8_sum(f8 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
DS_INLINE float f32_of_f16(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
/* Four halves, the first at p and each `step` bytes after the one before. Put together outside of vector registers: one is
 * entered in a vector by a shuffle each, and those are scarce. */
DS_INLINE __m128i x86_halves4(const uint8_t *p, size_t step) {
    uint64_t all = 0;
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        uint16_t h;
        memcpy(&h, p + (size_t)i * step, 2);
        all |= (uint64_t)h << 16 * i;
    }
    return _mm_cvtsi64_si128((long long)all);
}
/* Eight of them as floats. */
DS_INLINE f8 f8_halves(const uint8_t *p, size_t step) {
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(x86_halves4(p, step), x86_halves4(p + 4 * step, step)));
}
/* Eight unsigned bytes as floats. */
DS_INLINE f8 f8_bytes(uint64_t bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)));
}
DS_INLINE v16 v16_load(const void *p) { return _mm_loadu_si128(p); }
DS_INLINE v16 v16_set(int x) { return _mm_set1_epi8((char)x); }
DS_INLINE v16 v16_and(v16 a, v16 b) { return _mm_and_si128(a, b); }
DS_INLINE v16 v16_high_nibbles(v16 a) { return _mm_and_si128(_mm_srli_epi16(a, 4), _mm_set1_epi8(15)); }

DS_INLINE __m256i x86_load(const void *p) { return _mm256_loadu_si256(p); }
/* p, as something that the compiler knows nothing about: or it would take single values out of the registers that were
 * stored there, with two instructions each or more. */
DS_INLINE const void *x86_memory(const void *p) {
    __asm__("" : "+r"(p));
    return p;
}

/* The 6-bit scales of Q4_K or Q5_K as 8 bytes, then the minimums, from a block's first 16 bytes. */
DS_INLINE v16 v16_scales_k4(const void *block) {
    const v16 p = _mm_loadu_si128(
        (const __m128i *)((const char *)block + 4)); /* dwords: 4 scales, 4 minimums, halves of the rest */
    const v16 low = _mm_and_si128(p, _mm_set1_epi8(63));
    const v16 halves =
        _mm_and_si128(_mm_srlv_epi32(_mm_shuffle_epi32(p, 0xaa), _mm_setr_epi32(0, 4, 0, 0)), _mm_set1_epi8(15));
    const v16 high = _mm_or_si128(halves, _mm_and_si128(_mm_srli_epi32(p, 2), _mm_set1_epi8(48)));
    return _mm_unpacklo_epi32(low, high);
}
/* The 6-bit scales of Q3_K, less 32, from 12 bytes. */
DS_INLINE v16 v16_scales_q3_k(const uint8_t packed[12]) {
    const v16 p = _mm_loadu_si128((const __m128i *)(packed - 4)); /* four bytes before them are the block's too */
    const v16 low = _mm_shuffle_epi32(p, 0x99), high = _mm_shuffle_epi32(p, 0xff);
    const v16 four = _mm_and_si128(_mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 4, 4)), _mm_set1_epi8(15));
    const v16 two = _mm_and_si128(_mm_srlv_epi32(high, _mm_setr_epi32(0, 2, 4, 6)), _mm_set1_epi8(3));
    return _mm_sub_epi8(_mm_or_si128(four, _mm_slli_epi32(two, 4)), _mm_set1_epi8(32));
}

#if defined(__AVX512F__)

#define DS_ROW_AHEAD true /* in rows, all 256 codes are decoded before they are used: registers hold them */

typedef __m512i v64;
typedef __m512 f16x;

DS_INLINE v64 v64_load(const void *p) { return _mm512_loadu_si512(p); }
/* 32 bytes at p, then 32 at q. */
DS_INLINE v64 v64_load2(const void *p, const void *q) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(p)), _mm256_loadu_si256(q), 1);
}
DS_INLINE v64 v64_twice(const void *p) { return _mm512_broadcast_i64x4(_mm256_loadu_si256(p)); }
DS_INLINE v64 v64_and(v64 a, int byte) { return _mm512_and_si512(a, _mm512_set1_epi8((char)byte)); }
DS_INLINE v64 v64_or(v64 a, v64 b) { return _mm512_or_si512(a, b); }
DS_INLINE v64 v64_bias(v64 a) { return _mm512_xor_si512(a, _mm512_set1_epi8((char)DS_CODE_BIAS)); }
/* Bits of every byte moved down by `low` in the first 32 bytes and `high` in the others (up where negative); what comes in
 * from neighbours is for the caller to mask away. */
DS_INLINE v64 v64_shift(v64 a, int low, int high) {
    const long long l = low & 63, h = high & 63;
    return _mm512_rorv_epi64(a, _mm512_set_epi64(h, h, h, h, l, l, l, l));
}
/* The low halves of 32 bytes at p, then the high halves, 16 times as large if DS_ROW_SPLIT. */
DS_INLINE v64 v64_split(const void *p) {
    const long long low = 0x0f0f0f0f0f0f0f0f, high = ~low;
    return _mm512_and_si512(v64_twice(p), _mm512_set_epi64(high, high, high, high, low, low, low, low));
}
/* Pairs of bits of 32 bytes at p, the lowest or, if high, the third; then those beside them; all in their place. */
DS_INLINE v64 v64_split_pairs(const void *p, bool high) {
    const __m256i low = _mm256_set1_epi8(high ? 0x30 : 0x03), next = _mm256_slli_epi16(low, 2);
    return _mm512_and_si512(v64_twice(p), _mm512_inserti64x4(_mm512_castsi256_si512(low), next, 1));
}
/* The low halves of the 16 bytes at p, the high halves of them, and the same of q. */
DS_INLINE v64 v64_nibbles2(const void *p, const void *q) {
    const v64 first = _mm512_broadcast_i32x4(_mm_loadu_si128(p));
    const v64 both = _mm512_mask_broadcast_i32x4(first, 0xff00, _mm_loadu_si128(q));
    return v64_and(_mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0)), 15);
}
DS_INLINE v64 v64_lookup(const int8_t table[16], v64 index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), index);
}
/* a, with 16 in each byte whose bit is set in the 32 bits at p, then in those at q; a's bytes are below 16. */
DS_INLINE v64 v64_fifth_bits2(v64 a, const void *p, const void *q) {
    uint32_t low, high;
    memcpy(&low, p, sizeof low);
    memcpy(&high, q, sizeof high);
    return _mm512_mask_add_epi8(a, (uint64_t)high << 32 | low, a, _mm512_set1_epi8(16));
}

/* The sums of one row with one token. Two of dots, because an FMA waits for the one before it. */
typedef struct row_sum {
    f16x y[2], min; /* min in all lanes with scales per 16 values, else in the last eight */
} row_sum;

DS_INLINE void row_sum_clear(row_sum *s) { s->y[0] = s->y[1] = s->min = _mm512_setzero_ps(); }
DS_INLINE float row_sum_total(const row_sum *s, bool per_16, float min_factor) {
    const f16x min = per_16 ? s->min : _mm512_maskz_mov_ps(0xff00, s->min);
    const f16x y = _mm512_fnmadd_ps(min, _mm512_set1_ps(min_factor), _mm512_add_ps(s->y[0], s->y[1]));
    return f8_sum(_mm256_add_ps(_mm512_castps512_ps256(y), _mm512_extractf32x8_ps(y, 1)));
}

/* Scales of 256 values: one per 32 in the first eight lanes and minimums in the others, or one per 16 and min. */
typedef struct row_scales {
    f16x scale, min;
} row_scales;

DS_INLINE row_scales row_scales_32(f8 scale, f8 min) {
    return (row_scales){.scale = _mm512_insertf32x8(_mm512_castps256_ps512(scale), min, 1)};
}
/* From 8 bytes of scales, then 8 of minimums; and the halves d and dmin at p. */
DS_INLINE row_scales row_scales_k4(v16 bytes, const void *p) {
    const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const f16x d = _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadu_si32(p))));
    return (row_scales){.scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), d)};
}
/* sc * d and m * dmin, for signed bytes. */
DS_INLINE row_scales row_scales_16(v16 sc, float d, v16 m, float dmin) {
    return (row_scales){.scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sc)), _mm512_set1_ps(d)),
                        .min = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(m)), _mm512_set1_ps(dmin))};
}
/* Of 16 bytes, the low halves times the half at p and the high ones times the half behind it. */
DS_INLINE row_scales row_scales_nibbles(const uint8_t bytes[16], const void *p) {
    const __m512i both = _mm512_cvtepu8_epi32(v16_load(bytes));
    const f16x d = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadu_si32(p)));
    const f16x low = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
    const f16x high = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
    return (row_scales){.scale = _mm512_mul_ps(low, _mm512_permutexvar_ps(_mm512_setzero_si512(), d)),
                        .min = _mm512_mul_ps(high, _mm512_permutexvar_ps(_mm512_set1_epi32(1), d))};
}
/* The scales times a token's; the minimums' part of the sums. */
DS_INLINE void row_start(row_sum *s, const row_scales *w, bool per_16, bool split, const act_meta *x, row_scales *out) {
    if (per_16) {
        s->min = _mm512_fmadd_ps(w->min, _mm512_load_ps(x->sum_16), s->min);
        out->scale = _mm512_mul_ps(w->scale, _mm512_load_ps(split ? x->split_16 : x->scale_16));
        return;
    }
    const f16x scale = _mm512_mul_ps(w->scale, _mm512_load_ps(split ? x->split : x->scale)); /* and sum_32 behind it */
    s->min = _mm512_add_ps(s->min, scale);
    out->scale = scale;
}
/* Add the products of 64 values, the j-th of four: codes q (biased if signed) and x. */
DS_INLINE void row_sum_add(row_sum *s, bool is_signed, bool per_16, v64 q, const int8_t *x, const act_meta *meta,
                           const row_scales *scales, int j) {
    const __m512i index_32 = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i index_16 = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i index = per_16 ? _mm512_add_epi32(index_16, _mm512_set1_epi32(4 * j))
                                 : _mm512_add_epi32(index_32, _mm512_set1_epi32(2 * j));
    const __m512i start = is_signed ? _mm512_load_si512(meta->less_128 + 16 * j) : _mm512_setzero_si512();
    const f16x dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, q, v64_load(x)));
    s->y[j % 2] = _mm512_fmadd_ps(dots, _mm512_permutexvar_ps(index, scales->scale), s->y[j % 2]);
}

#else

#define DS_ROW_AHEAD false

typedef struct v64 {
    __m256i a, b;
} v64;

DS_INLINE v64 v64_load2(const void *p, const void *q) { return (v64){_mm256_loadu_si256(p), _mm256_loadu_si256(q)}; }
DS_INLINE v64 v64_load(const void *p) { return v64_load2(p, (const char *)p + 32); }
DS_INLINE v64 v64_twice(const void *p) { return v64_load2(p, p); }
DS_INLINE v64 v64_and(v64 v, int byte) {
    const __m256i mask = _mm256_set1_epi8((char)byte);
    return (v64){_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
DS_INLINE v64 v64_or(v64 v, v64 w) { return (v64){_mm256_or_si256(v.a, w.a), _mm256_or_si256(v.b, w.b)}; }
DS_INLINE v64 v64_bias(v64 v) {
    const __m256i bias = _mm256_set1_epi8((char)DS_CODE_BIAS);
    return (v64){_mm256_xor_si256(v.a, bias), _mm256_xor_si256(v.b, bias)};
}
DS_INLINE v64 v64_split(const void *p) {
    const __m256i x = _mm256_loadu_si256(p), low = _mm256_set1_epi8(15);
    if (DS_ROW_SPLIT) return (v64){_mm256_and_si256(x, low), _mm256_andnot_si256(low, x)};
    return (v64){_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi16(x, 4), low)};
}
DS_INLINE v64 v64_split_pairs(const void *p, bool high) {
    const __m256i x = _mm256_loadu_si256(p);
    const __m256i place = _mm256_set1_epi8(high ? 0x30 : 0x03), next = _mm256_set1_epi8((char)(high ? 0xc0 : 0x0c));
    return (v64){_mm256_and_si256(x, place), _mm256_and_si256(x, next)};
}
DS_INLINE __m256i x86_shift(__m256i a, int n) { return n < 0 ? _mm256_slli_epi16(a, -n) : _mm256_srli_epi16(a, n); }
DS_INLINE v64 v64_shift(v64 v, int low, int high) { return (v64){x86_shift(v.a, low), x86_shift(v.b, high)}; }
DS_INLINE __m256i x86_nibbles(const void *p) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(p));
    return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_set_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15));
}
DS_INLINE v64 v64_nibbles2(const void *p, const void *q) { return (v64){x86_nibbles(p), x86_nibbles(q)}; }
DS_INLINE v64 v64_lookup(const int8_t table[16], v64 index) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (v64){_mm256_shuffle_epi8(twice, index.a), _mm256_shuffle_epi8(twice, index.b)};
}
DS_INLINE __m256i x86_fifth_bits(__m256i a, const void *p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    const __m256i index = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), index);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(copies, mask), mask);
    return _mm256_or_si256(a, _mm256_and_si256(set, _mm256_set1_epi8(16)));
}
DS_INLINE v64 v64_fifth_bits2(v64 v, const void *p, const void *q) {
    return (v64){x86_fifth_bits(v.a, p), x86_fifth_bits(v.b, q)};
}

typedef struct row_sum {
    f8 y[2][2], min;
} row_sum;

DS_INLINE void row_sum_clear(row_sum *s) { s->y[0][0] = s->y[0][1] = s->y[1][0] = s->y[1][1] = s->min = f8_set(0.0f); }
DS_INLINE float row_sum_total(const row_sum *s, bool per_16, float min_factor) {
    const f8 a = _mm256_add_ps(s->y[0][0], s->y[0][1]), b = _mm256_add_ps(s->y[1][0], s->y[1][1]);
    return f8_sum(_mm256_fnmadd_ps(s->min, f8_set(min_factor), _mm256_add_ps(a, b)));
}

/* Scales of 256 values, one per 32 or 16; they end in memory, from where one is loaded into all lanes at once. */
typedef struct row_scales {
    DS_ALIGNED float scale[16];
    float min[16];
} row_scales;

DS_INLINE row_scales row_scales_32(f8 scale, f8 min) {
    row_scales s;
    _mm256_store_ps(s.scale, scale);
    _mm256_store_ps(s.min, min);
    return s;
}
DS_INLINE f8 x86_bytes(v16 bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
DS_INLINE row_scales row_scales_k4(v16 bytes, const void *p) {
    const __m128 d = _mm_cvtph_ps(_mm_loadu_si32(p));
    const f8 scale = _mm256_broadcastss_ps(d), min = _mm256_broadcastss_ps(_mm_movehdup_ps(d));
    return row_scales_32(f8_mul(x86_bytes(bytes), scale), f8_mul(x86_bytes(_mm_srli_si128(bytes, 8)), min));
}
DS_INLINE row_scales row_scales_16(v16 sc, float d, v16 m, float dmin) {
    row_scales s;
    DS_UNROLL
    for (int i = 0; i < 2; i++, sc = _mm_srli_si128(sc, 8), m = _mm_srli_si128(m, 8)) {
        _mm256_store_ps(s.scale + 8 * i, f8_mul(x86_bytes(sc), f8_set(d)));
        _mm256_store_ps(s.min + 8 * i, f8_mul(x86_bytes(m), f8_set(dmin)));
    }
    return s;
}
DS_INLINE row_scales row_scales_nibbles(const uint8_t bytes[16], const void *p) {
    const v16 both = v16_load(bytes);
    uint16_t d[2];
    memcpy(d, p, sizeof d);
    return row_scales_16(v16_and(both, v16_set(15)), f32_of_f16(d[0]), v16_high_nibbles(both), f32_of_f16(d[1]));
}
DS_INLINE void row_start(row_sum *s, const row_scales *w, bool per_16, bool split, const act_meta *x, row_scales *out) {
    if (per_16) {
        const float *scales = split ? x->split_16 : x->scale_16;
        DS_UNROLL
        for (int i = 0; i < 16; i += 8) {
            _mm256_store_ps(out->scale + i, f8_mul(f8_load(w->scale + i), f8_load(scales + i)));
            s->min = f8_fma(f8_load(w->min + i), f8_load(x->sum_16 + i), s->min);
        }
    } else {
        _mm256_store_ps(out->scale, f8_mul(f8_load(w->scale), f8_load(split ? x->split : x->scale)));
        s->min = f8_fma(f8_load(w->min), f8_load(x->sum_32), s->min);
    }
}
/* Products of 4 neighbours summed, with q signed or not, of the i-th 32 values of a group. */
DS_INLINE f8 row_dot_32(bool is_signed, __m256i q, __m256i s, const act_meta *meta, int i) {
#if defined(__AVXVNNI__)
    const int32_t *less = meta->less_128 + 8 * i;
    const __m256i start = is_signed ? _mm256_load_si256((const __m256i *)less) : _mm256_setzero_si256();
    return _mm256_cvtepi32_ps(x86_dpbusd(start, q, s));
#else
    /* |q| times x with q's sign: two products of 128 * 127 just fit 16 bits. */
    const __m256i words =
        is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(s, q)) : _mm256_maddubs_epi16(q, s);
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(words, _mm256_set1_epi16(1)));
#endif
}
DS_INLINE f8 row_scale_32(bool per_16, const float *of, int i) {
    if (!per_16) return f8_set(of[i]);
    return _mm256_blend_ps(f8_set(of[2 * i]), f8_set(of[2 * i + 1]), 0xf0);
}
DS_INLINE void row_sum_add(row_sum *s, bool is_signed, bool per_16, v64 q, const int8_t *x, const act_meta *meta,
                           const row_scales *scales, int j) {
    const float *scale = x86_memory(scales->scale);
    const v64 own = v64_load(x);
    f8 *y = s->y[j % 2];
    y[0] = f8_fma(row_dot_32(is_signed, q.a, own.a, meta, 2 * j), row_scale_32(per_16, scale, 2 * j), y[0]);
    y[1] = f8_fma(row_dot_32(is_signed, q.b, own.b, meta, 2 * j + 1), row_scale_32(per_16, scale, 2 * j + 1), y[1]);
}

#endif

/* ---- Packing and multiplying in panels ---- */

#define DS_ROW_TOKENS 4 /* up to here a row is decoded for all tokens at once; above it, a panel pays */

/* q[0..32) = x * inverse to nearest even; sums of the two halves. */
DS_INLINE void f32_quantize32(const float *x, float inverse, int8_t *q, int sums[2]) {
    const __m256 s = _mm256_set1_ps(inverse);
    __m256i d[4];
    DS_UNROLL
    for (int i = 0; i < 4; i++) d[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), s));
    const __m256i words = _mm256_packs_epi32(d[0], d[1]), more = _mm256_packs_epi32(d[2], d[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), order);
    _mm256_storeu_si256((__m256i *)q, bytes);
    /* Sums of absolute differences from zero, of the values plus 128. */
    const __m256i sad = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8((char)0x80)), _mm256_setzero_si256());
    const __m128i low = _mm256_castsi256_si128(sad), high = _mm256_extracti128_si256(sad, 1);
    sums[0] = _mm_cvtsi128_si32(_mm_add_epi64(low, _mm_unpackhi_epi64(low, low))) - 16 * 128;
    sums[1] = _mm_cvtsi128_si32(_mm_add_epi64(high, _mm_unpackhi_epi64(high, high))) - 16 * 128;
}
DS_INLINE float f32_max_abs32(const float *x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 max = _mm256_andnot_ps(sign, _mm256_loadu_ps(x));
    DS_UNROLL
    for (int i = 8; i < 32; i += 8) max = _mm256_max_ps(max, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

#define DS_TILE_TOKENS 6

DS_INLINE vi x86_dot_add(vi acc, vi u, vi s) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, u, s);
#else
    return x86_dpbusd(acc, u, s);
#endif
}

/* acc[t][v] += dots over n_k4 dwords of k: w is (n_k4, DS_PANEL_ROWS) dwords, of which two vectors of rows are used; a is
 * (n_k4, n_tok) dwords. n_tok and n_k4 are constants. */
DS_INLINE void panel_dot(code_range range, int n_k4, int n_tok, const uint8_t *w, const int8_t *a,
                         vi acc[DS_TILE_TOKENS][2]) {
    DS_UNROLL
    for (int i = 0; i < n_k4; i++) {
        const vi w0 = vi_load(w + (size_t)i * 4 * DS_PANEL_ROWS),
                 w1 = vi_load(w + (size_t)i * 4 * DS_PANEL_ROWS + 4 * DS_LANES);
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            int32_t four;
            memcpy(&four, a + 4 * (i * n_tok + t), sizeof four);
            const vi x = vi_set((uint32_t)four);
            acc[t][0] = x86_dot_add(acc[t][0], w0, x);
            acc[t][1] = x86_dot_add(acc[t][1], w1, x);
        }
    }
}

#else

#define DS_TILE_TOKENS 4

#define DS_PANEL_WIDE 1 /* codes with a sign are multiplied in 16 bits */

/* The first or the last two bytes of each dword, with their signs. */
DS_INLINE vi vi_widen_bytes(vi a, bool last) {
    const __m256i dwords =
        _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400, 0x08000800, 0x0c000c00);
    const __m256i high = _mm256_or_si256(dwords, vi_set(last ? 0x03800280u : 0x01800080u));
    return _mm256_srai_epi16(_mm256_shuffle_epi8(a, high), 8);
}

/* Products of w and x, two neighbours summed, added to 16-bit sums. */
DS_INLINE __m256i x86_add_pairs(__m256i words, bool first, __m256i w, __m256i x) {
    const __m256i p = _mm256_maddubs_epi16(w, x);
    words = first ? p : _mm256_add_epi16(words, p);
    /* Keeps the compiler from reordering the sums, which would need more registers than there are. */
    __asm__("" : "+x"(words));
    return words;
}

/* Without a dot instruction: pairs of products are summed in 16 bits, as many as are sure to fit, and then widened. */
DS_INLINE void panel_dot(code_range range, int n_k4, int n_tok, const uint8_t *w, const int8_t *a,
                         vi acc[DS_TILE_TOKENS][2]) {
    const int most = range == CODES_4   ? 8
                     : range == CODES_5 ? 4
                     : range == CODES_6 ? 2
                                        : 1,
              step = most < n_k4 ? most : n_k4;
    DS_UNROLL
    for (int i0 = 0; i0 < n_k4; i0 += step) {
        __m256i words[DS_TILE_TOKENS][2];
        DS_UNROLL
        for (int i = 0; i < step; i++) {
            const uint8_t *rows = w + (size_t)(i0 + i) * 4 * DS_PANEL_ROWS;
            const vi w0 = vi_load(rows), w1 = vi_load(rows + 4 * DS_LANES);
            DS_UNROLL
            for (int t = 0; t < n_tok; t++) {
                const vi x = _mm256_castps_si256(
                    _mm256_broadcast_ss((const float *)(const void *)(a + 4 * ((i0 + i) * n_tok + t))));
                words[t][0] = x86_add_pairs(words[t][0], i == 0, w0, x);
                words[t][1] = x86_add_pairs(words[t][1], i == 0, w1, x);
            }
        }
        DS_UNROLL
        for (int t = 0; t < n_tok; t++)
            DS_UNROLL for (int v = 0; v < 2; v++) acc[t][v] =
                _mm256_add_epi32(acc[t][v], _mm256_madd_epi16(words[t][v], _mm256_set1_epi16(1)));
    }
}

/* The same of 32 values whose codes have signs: w is (8, 2, DS_PANEL_ROWS) pairs of int16. With magnitudes and signs of
 * bytes, products would have to be widened each by itself. */
DS_INLINE void panel_dot_wide(int n_tok, const int16_t *w, const int8_t *a, vi acc[DS_TILE_TOKENS][2]) {
    DS_ALIGNED int16_t wide[8 * DS_TILE_TOKENS * 4];
    DS_UNROLL
    for (int i = 0; i < 2 * n_tok; i++)
        vi_store(wide + 16 * i, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(a + 16 * i))));
    const char *x16 = (const char *)wide;
    __asm__("" : "+r"(x16) : "m"(wide)); /* one register, not one for each place in it */
    DS_UNROLL
    for (int i = 0; i < 16; i++) {
        const int16_t *rows = w + (size_t)i * 2 * DS_PANEL_ROWS;
        const vi w0 = vi_load(rows), w1 = vi_load(rows + 2 * DS_LANES);
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            int32_t two;
            memcpy(&two, x16 + 8 * (i / 2 * n_tok + t) + 4 * (i % 2), sizeof two);
            const vi x = vi_set((uint32_t)two);
            acc[t][0] = _mm256_add_epi32(acc[t][0], _mm256_madd_epi16(w0, x));
            acc[t][1] = _mm256_add_epi32(acc[t][1], _mm256_madd_epi16(w1, x));
            __asm__("" : "+x"(acc[t][0]), "+x"(acc[t][1])); /* as above */
        }
    }
}

#endif
