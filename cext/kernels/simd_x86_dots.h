/* simd_x86_dots.h: the integer primitives of attention on x86: dots of rows in int16 and int8, and their packing.
 * Lane L of a vector (128 bits) holds values 4 L to 4 L + 3, then the same of the next 16: see ds_row_place16. */
#pragma once

#if defined(__AVX512F__)

#define DS_ROW_TILE 8 /* rows by two vectors of sums in registers */
#define DS_VALUE_VECS 4 /* vectors of values by rows of sums: 4 by 4 take fewer loads than 2 by 8 */

DS_INLINE vi vf_to_int(vf a) { return _mm512_cvtps_epi32(a); } /* to the nearest, ties to even */
/* x, or -infinity in lanes whose limit is not above i. */
DS_INLINE vf vf_below(vf x, int i, vi limit) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), _mm512_cmpgt_epi32_mask(limit, _mm512_set1_epi32(i)), x);
}
DS_INLINE vi x86_pack16(vi a, vi b) { return _mm512_packs_epi32(a, b); }
DS_INLINE vi x86_pack8(vi a, vi b) { return _mm512_packs_epi16(a, b); }
DS_INLINE vi x86_pair16(vi a, vi b, int high) {
    return high ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
}
DS_INLINE vi x86_pair8(vi a, vi b, int high) { return high ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b); }

#else

#define DS_ROW_TILE 4
#define DS_VALUE_VECS 2

DS_INLINE vi vf_to_int(vf a) { return _mm256_cvtps_epi32(a); }
DS_INLINE vf vf_below(vf x, int i, vi limit) {
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x,
                            _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_set1_epi32(i))));
}
DS_INLINE vi x86_pack16(vi a, vi b) { return _mm256_packs_epi32(a, b); }
DS_INLINE vi x86_pack8(vi a, vi b) { return _mm256_packs_epi16(a, b); }
DS_INLINE vi x86_pair16(vi a, vi b, int high) {
    return high ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
}
DS_INLINE vi x86_pair8(vi a, vi b, int high) { return high ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b); }

#endif

/* A dword of memory in all lanes. */
typedef vi vi_dword;

DS_INLINE vi_dword vi_dword_load(const void *dword) {
    int32_t x;
    memcpy(&x, dword, sizeof x);
    return vi_set((uint32_t)x);
}
DS_INLINE vf vi_dword_as_float(vi_dword a) { return vi_as_float(a); }

#if defined(__AVX512F__)

#define DS_FOURS true

/* Four dwords of memory, again and again. */
DS_INLINE vi_dword vi_four_dwords_load(const void *dwords) { return _mm512_broadcast_i32x4(_mm_loadu_si128(dwords)); }
/* Sums of each four neighbouring lanes: lane 4 L + v is of the L-th four of x[v]. */
DS_INLINE vi vi_join_fours(const vi x[4]) {
    const vi a = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const vi b = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

#else

#define DS_FOURS false /* no panel has half a group */
DS_INLINE vi_dword vi_four_dwords_load(const void *dwords) { return vi_dword_load(dwords); }
DS_INLINE vi vi_join_fours(const vi x[4]) { return x[0]; }

#endif

/* The dot instructions as assembly: with the compiler's functions gcc copies every sum twice a step and spills some. */
#if defined(__AVX512VNNI__)
#define X86_DOT(name, sums, a, b) __asm__(name " %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))
#elif defined(__AVXVNNI__)
#define X86_DOT(name, sums, a, b) __asm__(X86_VNNI_CODING name " %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b))
#endif

/* sums + a . b over the two int16 of each dword. */
DS_INLINE vi vi_dot16(vi sums, vi a, vi_dword b) {
#if defined(X86_DOT)
    X86_DOT("vpdpwssd", sums, a, b);
    return sums;
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}

#if defined(X86_DOT)

#define DS_QUERY_BIAS 128 /* queries are stored with it: the dot instruction wants one side unsigned */

/* sums + (q + DS_QUERY_BIAS) . c over the four bytes of each dword, c within -127..127. */
DS_INLINE vi vi_dot_query(vi sums, vi q, vi_dword c) {
    X86_DOT("vpdpbusd", sums, q, c);
    return sums;
}
/* sums + p . c over the four bytes of each dword, p unsigned and c within -127..127. */
DS_INLINE vi vi_dot_weights(vi sums, vi_dword p, vi c) {
    X86_DOT("vpdpbusd", sums, p, c);
    return sums;
}

#else

#define DS_QUERY_BIAS 0

DS_INLINE vi vi_dot_query(vi sums, vi q, vi_dword c) {
    const __m256i words = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(c, q));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
/* Even and odd bytes apart, because two products of 255 * 127 do not fit 16 bits. */
DS_INLINE vi vi_dot_weights(vi sums, vi_dword p, vi c) {
    const vi even =
        _mm256_madd_epi16(_mm256_and_si256(p, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(c, 8), 8));
    const vi odd = _mm256_madd_epi16(_mm256_srli_epi16(p, 8), _mm256_srai_epi16(c, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}

#endif

/* Two vectors of floats, times s and rounded, as a vector of int16. */
DS_INLINE void x86_store16(vf low, vf high, vf s, int16_t *out) {
    vi_store(out, x86_pack16(vf_to_int(vf_mul(low, s)), vf_to_int(vf_mul(high, s))));
}

/* out = x * scale to the nearest, in order. */
DS_INLINE void i16_pack32(const float *x, float scale, int16_t out[32]) {
    DS_UNROLL
    for (int h = 0; h < 16; h += DS_LANES) x86_store16(vf_load(x + h), vf_load(x + 16 + h), vf_set(scale), out + 2 * h);
}

DS_INLINE void i8_pack64(const float *x, float scale, int8_t out[64]) {
    const vf s = vf_set(scale);
    DS_UNROLL
    for (int h = 0; h < 16; h += DS_LANES) {
        vi q[4];
        DS_UNROLL
        for (int z = 0; z < 4; z++) q[z] = vf_to_int(vf_mul(vf_load(x + 16 * z + h), s));
        vi_store(out + 4 * h, x86_pack8(x86_pack16(q[0], q[1]), x86_pack16(q[2], q[3])));
    }
}

/* The pair of column `at` in a panel. */
DS_INLINE void i16_put_pair(uint32_t *panel, size_t at, const int16_t pair[2]) { memcpy(panel + at, pair, 4); }
/* Dword c holds value c of a, then of b. */
DS_INLINE void i16_pairs(const int16_t a[32], const int16_t b[32], uint32_t out[32]) {
    DS_UNROLL
    for (int h = 0; h < 16; h += DS_LANES) {
        const vi x = vi_load(a + 2 * h), y = vi_load(b + 2 * h);
        vi_store(out + h, x86_pair16(x, y, 0));
        vi_store(out + 16 + h, x86_pair16(x, y, 1));
    }
}

/* Dword c holds value c of each of four rows. */
DS_INLINE void i8_quads(const int8_t *const rows[4], uint32_t out[64]) {
    DS_UNROLL
    for (int h = 0; h < 16; h += DS_LANES) {
        vi r[4];
        DS_UNROLL
        for (int i = 0; i < 4; i++) r[i] = vi_load(rows[i] + 4 * h);
        DS_UNROLL
        for (int half = 0; half < 2; half++) {
            const vi first = x86_pair8(r[0], r[1], half), second = x86_pair8(r[2], r[3], half);
            vi_store(out + 32 * half + h, x86_pair16(first, second, 0));
            vi_store(out + 32 * half + 16 + h, x86_pair16(first, second, 1));
        }
    }
}
