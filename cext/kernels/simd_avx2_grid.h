/* simd_avx2_grid.h: the grid formats with an entry's load for each index. Codes come in order without their signs,
 * which go to the activations. */
#pragma once

#include "kernels/grid_codes.h"

DS_INLINE __m256i x86_load(const void *p) { return _mm256_loadu_si256(p); }

/* 32 indices: bytes of the block where they are whole, or words made of several parts. */
typedef struct grid_index {
    const uint8_t *bytes; /* NULL: words */
    int step; /* of bytes in a four; from one four to the next it is eight */
    __m256i a, b;
} grid_index;

DS_INLINE grid_index x86_index(__m256i a, __m256i b) { return (grid_index){.a = a, .b = b}; }
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

DS_INLINE grid_index grid_index_fours(const void *p) { return (grid_index){.bytes = p, .step = 1}; }
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
    return (grid_index){.bytes = (const uint8_t *)p + odd, .step = 2};
}
DS_INLINE grid_index grid_index_seconds_nine(const void *p, const uint8_t bits[8], bool odd) {
    const int64_t factors = odd ? 0x0002000800200080 : 0x0004001000400100;
    return x86_index(x86_with_high(x86_seconds(p, odd), bits, factors, 0x100),
                     x86_with_high(x86_seconds((const char *)p + 32, odd), bits + 4, factors, 0x100));
}

/* 256 codes, given by 64 just before they are used: registers hold no more. Indices and signs are loaded one by one, from
 * the block itself where it has them whole. */
typedef struct grid_codes {
    const grid8_entry *grid8; /* or NULL: grid4 */
    const grid4_entry *grid4;
    const uint8_t *bytes[2]; /* the even and the odd indices, or NULL: words */
    int step;
    const uint16_t *words[2];
    const char *signs; /* (8, 4) bytes */
    DS_ALIGNED uint16_t made_words[2][32]; /* where words and signs are if they are not the block's */
    DS_ALIGNED uint32_t made_signs[8];
} grid_codes;

DS_INLINE void x86_put_index(grid_codes *codes, int odd, const grid_index *index) {
    codes->bytes[odd] = index->bytes;
    codes->step = index->step;
    if (index->bytes) return;
    _mm256_store_si256((__m256i *)codes->made_words[odd], index->a);
    _mm256_store_si256((__m256i *)codes->made_words[odd] + 1, index->b);
    codes->words[odd] = x86_memory(codes->made_words[odd]);
}
/* 32 entries of eight values. */
DS_INLINE void grid_codes8(grid_codes *codes, const grid8_entry *grid, int n, const grid_index *index) {
    codes->grid8 = grid;
    codes->grid4 = NULL;
    x86_put_index(codes, 0, index);
}
/* 64 entries of four values, the even ones and the odd ones. */
DS_INLINE void grid_codes4(grid_codes *codes, const grid4_entry *grid, int n, int values, const grid_index index[2]) {
    codes->grid8 = NULL;
    codes->grid4 = grid;
    x86_put_index(codes, 0, &index[0]);
    x86_put_index(codes, 1, &index[1]);
}
DS_INLINE size_t x86_index_at(const grid_codes *codes, int odd, int i) {
    if (codes->bytes[odd]) return codes->bytes[odd][i / 4 * 8 + i % 4 * codes->step];
    return codes->words[odd][i];
}
/* 32 codes from the index i on. */
DS_INLINE __m256i x86_entries(const grid_codes *codes, int i) {
    if (codes->grid8) {
        const grid8_entry *grid = codes->grid8;
        return _mm256_setr_epi64x(
            (long long)grid[x86_index_at(codes, 0, i)], (long long)grid[x86_index_at(codes, 0, i + 1)],
            (long long)grid[x86_index_at(codes, 0, i + 2)], (long long)grid[x86_index_at(codes, 0, i + 3)]);
    }
    const grid4_entry *grid = codes->grid4;
    int entry[8];
    DS_UNROLL
    for (int e = 0; e < 8; e++) entry[e] = (int)grid[x86_index_at(codes, e % 2, i + e / 2)];
    return _mm256_setr_epi32(entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7]);
}

/* Bit j of byte i is the sign of value 8 i + j. */
typedef struct grid_signs {
    const void *bytes; /* NULL: made */
    __m256i made;
} grid_signs;

/* From seven bits in bytes. */
DS_INLINE grid_signs x86_sevens(__m256i a) {
    const __m256i folded = _mm256_and_si256(_mm256_xor_si256(a, _mm256_srli_epi16(a, 4)), _mm256_set1_epi8(15));
    const __m256i eighth = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(X86_ODD_NIBBLES), folded);
    return (grid_signs){.made = _mm256_or_si256(a, eighth)};
}
DS_INLINE grid_signs grid_signs_load(const uint8_t signs[32]) { return (grid_signs){.bytes = signs}; }
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

DS_INLINE void grid_codes_sign(grid_codes *codes, grid_signs signs) {
    if (!signs.bytes) _mm256_store_si256((__m256i *)codes->made_signs, signs.made);
    codes->signs = signs.bytes ? signs.bytes : x86_memory(codes->made_signs);
}
/* From 32 bits: bytes below zero where one is set, above it elsewhere. */
DS_INLINE __m256i x86_minus(const void *p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    const __m256i order = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), order);
    return _mm256_add_epi8(_mm256_and_si256(copies, mask), _mm256_set1_epi8(127));
}
DS_INLINE v64 x86_signed(v64 a, v64 minus) {
    return (v64){_mm256_sign_epi8(a.a, minus.a), _mm256_sign_epi8(a.b, minus.b)};
}

/* 64 of the codes and their signs, the j-th of four. */
typedef struct grid_part {
    v64 q, minus;
} grid_part;

DS_INLINE grid_part grid_codes_part(const grid_codes *codes, int j) {
    const char *signs = codes->signs + 8 * j;
    return (grid_part){{x86_entries(codes, 8 * j), x86_entries(codes, 8 * j + 4)},
                       {x86_minus(signs), x86_minus(signs + 4)}};
}
/* Add their products. */
DS_INLINE void row_sum_add_part(row_sum *s, bool per_16, grid_part part, const int8_t *x, const act_meta *meta,
                                const row_scales *scales, int j) {
    x86_add64(s, false, per_16, part.q, x86_signed(v64_load(x), part.minus), meta->less_128, scales, j);
}

DS_INLINE int grid_place(int i) { return i; }
enum { DS_GRID_SCALE_STEP = 1 };
DS_INLINE void grid_store(const grid_codes *from, const row_scales *scales, uint8_t codes[256], float scale[16]) {
    DS_UNROLL
    for (int j = 0; j < 4; j++) {
        const grid_part part = grid_codes_part(from, j);
        const v64 c = v64_bias(x86_signed(part.q, part.minus));
        _mm256_storeu_si256((__m256i *)(codes + 64 * j), c.a);
        _mm256_storeu_si256((__m256i *)(codes + 64 * j + 32), c.b);
    }
    memcpy(scale, scales->scale, sizeof scales->scale);
}
DS_INLINE vi vi_add8(vi a, vi b) { return _mm256_add_epi8(a, b); }
