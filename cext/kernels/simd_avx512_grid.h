/* simd_avx512_grid.h: the grid formats with permutes of words.
 *
 * The 256 codes of a group lie in four vectors "by pairs": word i of vector s holds values 8 i + 2 s and 8 i + 2 s + 1,
 * so that a shift alone brings them out of the packed entries, and dword L sums what values 16 L to 16 L + 15 give over
 * all four. Codes are without their signs, which go to the activations, packed in the same order (act_meta.pairs).
 * IQ2_S is not among them: 16 permutes would find its entries more slowly than loads do (simd_x86_eights.h). */
#pragma once

#include "kernels/grid_codes.h"

#define X86_VALUE(value) value,
DS_ALIGNED static const int8_t grid_values_IQ2[16] = {DS_GRID_VALUES_IQ2(X86_VALUE)};
DS_ALIGNED static const int8_t grid_values_IQ3_XXS[16] = {DS_GRID_VALUES_IQ3_XXS(X86_VALUE)};
DS_ALIGNED static const int8_t grid_values_IQ3_S[16] = {DS_GRID_VALUES_IQ3_S(X86_VALUE)};

typedef uint16_t grid8_entry, grid4_entry;
typedef uint64_t grid8_loaded;
#define GRID_ENTRY_IQ2(entry) entry,
#define GRID_LOADED_IQ2(entry) GRID_CODES_IQ2(entry),
#define GRID_ENTRY_IQ3_XXS(entry) entry,
#define GRID_ENTRY_IQ3_S(entry) entry,

/* 32 indices: bits 0 to 7 in words, with anything above; bit 8 where a grid has as many entries. */
typedef struct grid_index {
    __m512i words;
    __mmask32 bit_8;
} grid_index;

/* Each of 8 bytes in four words. */
DS_INLINE __m512i x86_fours(const uint8_t bytes[8]) {
    const __m512i spread = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)bytes));
    return _mm512_shuffle_epi8(spread, _mm512_set4_epi32(0x08080808, 0x08080808, 0, 0));
}

/* The first four bytes of every eight. */
DS_INLINE grid_index grid_index_fours(const void *p) {
    const __m128i order = _mm_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1);
    return (grid_index){.words = _mm512_shuffle_epi8(_mm512_loadu_si512(p), _mm512_broadcast_i32x4(order))};
}
/* The low nine bits of words. */
DS_INLINE grid_index grid_index_nines(const void *p) {
    const __m512i words = _mm512_loadu_si512(p);
    return (grid_index){.words = words, .bit_8 = _mm512_test_epi16_mask(words, _mm512_set1_epi16(256))};
}
/* The even or the odd ones of 64 bytes. */
DS_INLINE grid_index grid_index_seconds(const void *p, bool odd) {
    const __m512i bytes = _mm512_loadu_si512(p);
    return (grid_index){.words = odd ? _mm512_srli_epi16(bytes, 8) : bytes};
}
/* The same with bit 8 from 64 bits. */
DS_INLINE grid_index grid_index_seconds_nine(const void *p, const uint8_t bits[8], bool odd) {
    grid_index index = grid_index_seconds(p, odd);
    const long long which = odd ? 0x0080002000080002 : 0x0040001000040001;
    index.bit_8 = _mm512_test_epi16_mask(x86_fours(bits), _mm512_set1_epi64(which));
    return index;
}

/* The entries of a grid of 256 or 512. Parts are blended as soon as two are there: all of them would not fit the
 * registers. */
DS_INLINE __m512i x86_grid_words(const uint16_t *grid, int n, const grid_index *index) {
    const __mmask32 upper[3] = {_mm512_test_epi16_mask(index->words, _mm512_set1_epi16(64)),
                                _mm512_test_epi16_mask(index->words, _mm512_set1_epi16(128)), index->bit_8};
    __m512i parts[4]; /* [bit]: of 64 << bit entries */
    DS_UNROLL
    for (int i = 0; i < n / 64; i++) {
        const __m512i low = _mm512_load_si512(grid + 64 * i), high = _mm512_load_si512(grid + 64 * i + 32);
        __m512i part = _mm512_permutex2var_epi16(low, index->words, high);
        int bit = 0;
        for (; bit < 3 && i >> bit & 1; bit++) part = _mm512_mask_blend_epi16(upper[bit], parts[bit], part);
        parts[bit] = part;
    }
    return parts[n == 256 ? 2 : 3];
}

/* Signs: bit j of both bytes of word i is the sign of value 8 i + j. */
typedef __m512i grid_signs;

/* The 256 codes of a group. */
typedef struct grid_codes {
    v64 q[4];
    grid_signs signs;
} grid_codes;

/* 32 entries of eight values. */
DS_INLINE void grid_codes8(grid_codes *codes, const grid8_entry *grid, int n, const grid_index *index) {
    const __m512i entries = x86_grid_words(grid, n, index);
    DS_UNROLL
    for (int s = 0; s < 4; s++)
        codes->q[s] = v64_lookup(grid_values_IQ2, v64_and(_mm512_srli_epi16(entries, (unsigned)(2 * s)), 3));
}
/* 64 entries of four values, the even ones and the odd ones. */
DS_INLINE void grid_codes4(grid_codes *codes, const grid4_entry *grid, int n, const int8_t values[16],
                           const grid_index index[2]) {
    DS_UNROLL
    for (int odd = 0; odd < 2; odd++) {
        const __m512i entries = x86_grid_words(grid, n, &index[odd]);
        DS_UNROLL
        for (int s = 0; s < 2; s++)
            codes->q[2 * odd + s] = v64_lookup(values, v64_and(_mm512_srli_epi16(entries, (unsigned)(3 * s)), 7));
    }
}

DS_INLINE void grid_codes_sign(grid_codes *codes, grid_signs signs) { codes->signs = signs; }

DS_INLINE grid_signs x86_both_bytes(__m512i words) {
    const __m128i twice = _mm_setr_epi8(0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
    return _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(twice));
}
/* From seven bits in words. */
DS_INLINE grid_signs x86_sevens(__m512i words) {
    const __m512i folded = v64_and(_mm512_xor_si512(words, _mm512_srli_epi16(words, 4)), 15);
    return x86_both_bytes(_mm512_or_si512(words, _mm512_shuffle_epi8(_mm512_broadcast_i32x4(X86_ODD_NIBBLES), folded)));
}
DS_INLINE grid_signs grid_signs_load(const uint8_t signs[32]) {
    return x86_both_bytes(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)signs)));
}
/* From the top seven bits of words. */
DS_INLINE grid_signs grid_signs_top(const void *p) { return x86_sevens(_mm512_srli_epi16(_mm512_loadu_si512(p), 9)); }

/* Dwords, each twice, of four times 7 sign bits and 4 of scale. */
typedef __m512i grid_tails;

DS_INLINE grid_tails grid_tails_load(const void *p) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(_mm256_loadu_si256(p)));
}
/* Every second dword of 64 bytes. */
DS_INLINE grid_tails grid_tails_seconds(const void *p) {
    return _mm512_shuffle_epi32(_mm512_loadu_si512(p), _MM_PERM_DDBB);
}

DS_INLINE grid_signs grid_tails_signs(grid_tails tails) {
    const __m128i order = _mm_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 8, 9, 8, 9, 9, 10, 10, 11);
    const __m512i words = _mm512_shuffle_epi8(tails, _mm512_broadcast_i32x4(order));
    const __m512i moved = _mm512_srlv_epi16(words, _mm512_set1_epi64(0x0005000600070000));
    return x86_sevens(_mm512_and_si512(moved, _mm512_set1_epi16(127)));
}
/* (2 n + 1) unit. */
DS_INLINE row_scales grid_tails_scales(grid_tails tails, float unit) {
    const f16x n = _mm512_cvtepi32_ps(_mm512_srli_epi32(tails, 28));
    return (row_scales){.scale = _mm512_fmadd_ps(n, _mm512_set1_ps(2.0f * unit), _mm512_set1_ps(unit))};
}
DS_INLINE row_scales grid_scales_32(f8 scale) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return (row_scales){.scale = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(scale))};
}
DS_INLINE row_scales grid_scales_16(v16 sc, float d) {
    return (row_scales){.scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sc)), _mm512_set1_ps(d))};
}

/* Which bytes of vector s of a group have a sign. */
DS_INLINE __mmask64 x86_minus(grid_signs signs, int s) {
    return _mm512_test_epi8_mask(signs, _mm512_set1_epi16((short)(uint16_t)(0x0201u << 2 * s)));
}
DS_INLINE v64 x86_negate(v64 a, __mmask64 minus) { return _mm512_mask_sub_epi8(a, minus, _mm512_setzero_si512(), a); }

/* Add the products of a group and one token's activations. */
DS_INLINE void row_sum_add_grid(row_sum *sum, const grid_codes *codes, const row_scales *scales, const act_meta *x) {
    __m512i dots = _mm512_setzero_si512();
    DS_UNROLL
    for (int s = 0; s < 4; s++)
        dots = _mm512_dpbusd_epi32(dots, codes->q[s], x86_negate(v64_load(x->pairs[s]), x86_minus(codes->signs, s)));
    const f16x scale = _mm512_mul_ps(scales->scale, _mm512_load_ps(x->scale_16));
    sum->y[0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, sum->y[0]);
}

/* The codes of a group, biased, and its scales, in memory: dword i is dword grid_place(i) of the 256 codes. */
DS_INLINE int grid_place(int i) { return 2 * (i % 16 / 4 * 8 + i / 16 % 2 * 4 + i % 4) + i / 32; }
enum { DS_GRID_SCALE_STEP = 2 }; /* scales per 32 values are stored twice */
DS_INLINE void grid_store(const grid_codes *from, const row_scales *scales, uint8_t codes[256], float scale[16]) {
    v64 c[4];
    DS_UNROLL
    for (int s = 0; s < 4; s++) c[s] = x86_negate(v64_bias(from->q[s]), x86_minus(from->signs, s));
    DS_UNROLL
    for (int s = 0; s < 4; s += 2) {
        _mm512_storeu_si512(codes + 64 * s, _mm512_unpacklo_epi16(c[s], c[s + 1]));
        _mm512_storeu_si512(codes + 64 * s + 64, _mm512_unpackhi_epi16(c[s], c[s + 1]));
    }
    _mm512_storeu_ps(scale, scales->scale);
}
DS_INLINE vi vi_add8(vi a, vi b) { return _mm512_add_epi8(a, b); }

/* Pack 32 values, block b of a group, by pairs. */
DS_INLINE void i8_pairs32(const int8_t q[32], int b, int8_t pairs[4][64]) {
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i values = _mm256_loadu_si256((const __m256i *)q);
    const __m256i words = _mm256_shuffle_epi8(values, _mm256_broadcastsi128_si256(order));
    int64_t by_pair[4];
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)by_pair, _mm256_permutevar8x32_epi32(words, lanes));
    for (int s = 0; s < 4; s++) memcpy(pairs[s] + 8 * b, &by_pair[s], 8);
}
