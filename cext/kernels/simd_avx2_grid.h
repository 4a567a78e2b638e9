/* simd_avx2_grid.h: the grid formats with an entry's load for each index. Codes come with their signs and DS_CODE_BIAS
 * (at 128 the negative of such a byte is the negative code's byte), in order. */
#pragma once

#include "kernels/grid_codes.h"

DS_INLINE __m256i x86_load(const void *p) { return _mm256_loadu_si256(p); }
DS_INLINE grid_index x86_index(__m256i a, __m256i b) {
    grid_index index;
    _mm256_store_si256((__m256i *)index.words, a);
    _mm256_store_si256((__m256i *)index.words + 1, b);
    return index;
}
/* Each of 4 bytes in four words. */
DS_INLINE __m256i x86_fours(const uint8_t bytes[4]) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    const __m256i order = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);
    return _mm256_shuffle_epi8(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), order);
}
/* a, with `mask` of words that are copies of bytes times `factors`. */
DS_INLINE __m256i x86_with_high(__m256i a, const uint8_t bytes[4], int64_t factors, int mask) {
    const __m256i moved = _mm256_mullo_epi16(x86_fours(bytes), _mm256_set1_epi64x(factors));
    return _mm256_or_si256(a, _mm256_and_si256(moved, _mm256_set1_epi16((short)mask)));
}

DS_INLINE grid_index grid_index_fours(const void *p) {
    const __m128i order = _mm_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1);
    const __m256i both = _mm256_broadcastsi128_si256(order);
    return x86_index(_mm256_shuffle_epi8(x86_load(p), both), _mm256_shuffle_epi8(x86_load((const char *)p + 32), both));
}
DS_INLINE grid_index grid_index_nines(const void *p) {
    const __m256i mask = _mm256_set1_epi16(511);
    return x86_index(_mm256_and_si256(x86_load(p), mask), _mm256_and_si256(x86_load((const char *)p + 32), mask));
}
DS_INLINE __m256i x86_bytes16(const uint8_t *p) { return _mm256_cvtepu8_epi16(v16_load(p)); }
DS_INLINE grid_index grid_index_tens(const uint8_t low[32], const uint8_t pairs[8]) {
    const int64_t factors = 0x0004001000400100;
    return x86_index(x86_with_high(x86_bytes16(low), pairs, factors, 0x300),
                     x86_with_high(x86_bytes16(low + 16), pairs + 4, factors, 0x300));
}
DS_INLINE __m256i x86_seconds(const void *p, bool odd) {
    return odd ? _mm256_srli_epi16(x86_load(p), 8) : _mm256_and_si256(x86_load(p), _mm256_set1_epi16(255));
}
DS_INLINE grid_index grid_index_seconds(const void *p, bool odd) {
    return x86_index(x86_seconds(p, odd), x86_seconds((const char *)p + 32, odd));
}
DS_INLINE grid_index grid_index_seconds_nine(const void *p, const uint8_t bits[8], bool odd) {
    const int64_t factors = odd ? 0x0002000800200080 : 0x0004001000400100;
    return x86_index(x86_with_high(x86_seconds(p, odd), bits, factors, 0x100),
                     x86_with_high(x86_seconds((const char *)p + 32, odd), bits + 4, factors, 0x100));
}

DS_INLINE void v64_grid8(const grid8_entry *grid, int n, const grid_index *index, v64 q[4]) {
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        const uint16_t *i = index->words + 4 * j;
        *(j % 2 ? &q[j / 2].b : &q[j / 2].a) = _mm256_setr_epi64x((long long)grid[i[0]], (long long)grid[i[1]],
                                                                  (long long)grid[i[2]], (long long)grid[i[3]]);
    }
}
DS_INLINE void v64_grid4(const grid4_entry *grid, int n, int values, const grid_index index[2], v64 q[4]) {
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        const uint16_t *e = index[0].words + 4 * j, *o = index[1].words + 4 * j;
        *(j % 2 ? &q[j / 2].b : &q[j / 2].a) =
            _mm256_setr_epi32((int)grid[e[0]], (int)grid[o[0]], (int)grid[e[1]], (int)grid[o[1]], (int)grid[e[2]],
                              (int)grid[o[2]], (int)grid[e[3]], (int)grid[o[3]]);
    }
}

/* Bit j of byte i is the sign of value 8 i + j. */
typedef __m256i grid_signs;

/* From seven bits in bytes. */
DS_INLINE grid_signs x86_sevens(__m256i a) {
    const __m256i folded = _mm256_and_si256(_mm256_xor_si256(a, _mm256_srli_epi16(a, 4)), _mm256_set1_epi8(15));
    return _mm256_or_si256(a, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(X86_ODD_NIBBLES), folded));
}
DS_INLINE grid_signs grid_signs_load(const uint8_t signs[32]) { return x86_load(signs); }
DS_INLINE grid_signs grid_signs_top(const void *p) {
    const __m256i a = _mm256_srli_epi16(x86_load(p), 9), b = _mm256_srli_epi16(x86_load((const char *)p + 32), 9);
    return x86_sevens(_mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8));
}

/* Dwords of four times 7 sign bits and 4 of scale. */
typedef __m256i grid_tails;

DS_INLINE grid_tails grid_tails_load(const void *p) { return x86_load(p); }
DS_INLINE grid_tails grid_tails_seconds(const void *p) {
    const __m256 a = _mm256_castsi256_ps(x86_load(p)), b = _mm256_castsi256_ps(x86_load((const char *)p + 32));
    return _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
}
DS_INLINE grid_signs grid_tails_signs(grid_tails a) {
    const __m256i seven = _mm256_set1_epi32(127);
    const __m256i first = _mm256_and_si256(a, seven), second = _mm256_and_si256(_mm256_srli_epi32(a, 7), seven);
    const __m256i third = _mm256_and_si256(_mm256_srli_epi32(a, 14), seven);
    const __m256i fourth = _mm256_and_si256(_mm256_srli_epi32(a, 21), seven);
    const __m256i low = _mm256_or_si256(first, _mm256_slli_epi32(second, 8));
    const __m256i high = _mm256_or_si256(third, _mm256_slli_epi32(fourth, 8));
    return x86_sevens(_mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}
DS_INLINE row_scales grid_tails_scales(grid_tails tails, float unit) {
    const f8 scale = f8_fma(_mm256_cvtepi32_ps(_mm256_srli_epi32(tails, 28)), f8_set(2.0f * unit), f8_set(unit));
    return row_scales_32(scale, scale);
}
DS_INLINE row_scales grid_scales_32(f8 scale) { return row_scales_32(scale, scale); }
DS_INLINE row_scales grid_scales_16(v16 sc, float d) { return row_scales_16(sc, d, sc, d); }

/* Negates the bytes of a whose bits are set. */
DS_INLINE __m256i x86_signed(__m256i a, uint32_t bits) {
    const __m256i order = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), order);
    const __m256i minus = _mm256_cmpeq_epi8(_mm256_and_si256(copies, mask), mask);
    return _mm256_sign_epi8(a, _mm256_or_si256(minus, _mm256_set1_epi8(1)));
}
DS_INLINE void v64_signed(v64 q[4], const grid_signs *signs) {
    DS_ALIGNED uint32_t minus[8];
    _mm256_store_si256((__m256i *)minus, *signs);
    DS_UNROLL
    for (int j = 0; j < 4; j++) q[j] = (v64){x86_signed(q[j].a, minus[2 * j]), x86_signed(q[j].b, minus[2 * j + 1])};
}

DS_INLINE int grid_place(int i) { return i; }
enum { DS_GRID_SCALE_STEP = 1 };
DS_INLINE void grid_store(const v64 q[4], const row_scales *scales, uint8_t codes[256], float scale[16]) {
    DS_UNROLL
    for (int j = 0; j < 4; j++) {
        _mm256_storeu_si256((__m256i *)(codes + 64 * j), q[j].a);
        _mm256_storeu_si256((__m256i *)(codes + 64 * j + 32), q[j].b);
    }
    memcpy(scale, scales->scale, sizeof scales->scale);
}
DS_INLINE vi vi_add8(vi a, vi b) { return _mm256_add_epi8(a, b); }
