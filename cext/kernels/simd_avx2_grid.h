/* simd_avx2_grid.h: the grid formats with an entry's load for each index.
 *
 * The 256 codes of a group lie in eight vectors "by eights": qword b of vectors 2 e and 2 e + 1 together holds values
 * 32 b + 8 e to 32 b + 8 e + 7, so that sums over e stay apart by blocks of 32 and get their scales once for four vectors.
 * Codes are without their signs, which go to the activations, packed in the same order (act_meta.eights). */
#pragma once

#include "kernels/grid_codes.h"

DS_INLINE __m256i x86_load(const void *p) { return _mm256_loadu_si256(p); }

#include "kernels/simd_avx2_loads.h"

/* 256 codes, given by 32 just before they are used: registers hold no more. */
typedef struct grid_codes {
    const grid8_entry *grid8; /* or NULL: grid4 */
    const grid4_entry *grid4;
    grid_places index[2]; /* the even and the odd entries' where they are of four values */
    const uint8_t *signs; /* (8, 4) bytes */
    DS_ALIGNED uint8_t made_signs[32]; /* where they are if they are not the block's */
} grid_codes;

/* 32 entries of eight values. */
DS_INLINE void grid_codes8(grid_codes *codes, const grid8_entry *grid, int n, const grid_index *index) {
    codes->grid8 = grid;
    codes->grid4 = NULL;
    x86_put_index(&codes->index[0], index);
}
/* 64 entries of four values, the even ones and the odd ones. */
DS_INLINE void grid_codes4(grid_codes *codes, const grid4_entry *grid, int n, int values, const grid_index index[2]) {
    codes->grid8 = NULL;
    codes->grid4 = grid;
    x86_put_index(&codes->index[0], &index[0]);
    x86_put_index(&codes->index[1], &index[1]);
}
/* 32 codes: eight e of blocks 4 half to 4 half + 3. */
DS_INLINE __m256i x86_entries(const grid_codes *codes, int e, int half) {
    return codes->grid8 ? x86_entries8(codes->grid8, &codes->index[0], e, half)
                        : x86_entries4(codes->grid4, codes->index, e, half);
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
    const __m256i twos = _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi32(0x3fff)),
                                         _mm256_and_si256(_mm256_slli_epi32(a, 2), _mm256_set1_epi32(0x3fff0000)));
    return x86_sevens(_mm256_or_si256(_mm256_and_si256(twos, _mm256_set1_epi16(0x7f)),
                                      _mm256_and_si256(_mm256_add_epi16(twos, twos), _mm256_set1_epi16(0x7f00))));
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
/* For the codes of x86_entries: bytes below zero where one has its sign, above it elsewhere. */
DS_INLINE __m256i x86_minus(const grid_codes *codes, int e, int half) {
    const __m256i order = _mm256_set_epi64x(0x0c0c0c0c0c0c0c0c, 0x0808080808080808, 0x0404040404040404, 0);
    const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i bits = _mm256_broadcastsi128_si256(v16_load(codes->signs + 16 * half));
    const __m256i copies = _mm256_shuffle_epi8(bits, _mm256_add_epi8(order, _mm256_set1_epi8((char)e)));
    return _mm256_add_epi8(_mm256_and_si256(copies, mask), _mm256_set1_epi8(127));
}

/* dots + the products of 4 neighbours summed, of two vectors of codes below 64. */
DS_INLINE __m256i x86_dots2(__m256i dots, const __m256i q[2], const __m256i x[2]) {
#if defined(__AVXVNNI__)
    return x86_dpbusd(x86_dpbusd(dots, q[0], x[0]), q[1], x[1]);
#else
    const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(q[0], x[0]), _mm256_maddubs_epi16(q[1], x[1]));
    return _mm256_add_epi32(dots, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
#endif
}
/* The scales of a group times a token's, in the order of dots: of blocks 4 half to 4 half + 3, each twice; of their halves
 * with scales per 16. */
DS_INLINE void x86_grid_scales(bool per_16, const row_scales *w, const act_meta *x, f8 scales[2][2]) {
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const f8 all = f8_mul(f8_load(w->scale), f8_load(x->scale));
    DS_UNROLL
    for (int half = 0; half < 2; half++) {
        if (per_16) {
            const f8 own = f8_mul(f8_load(w->scale + 8 * half), f8_load(x->scale_16 + 8 * half));
            scales[half][0] = _mm256_moveldup_ps(own);
            scales[half][1] = _mm256_movehdup_ps(own);
        } else {
            scales[half][0] = scales[half][1] =
                _mm256_permutevar8x32_ps(all, _mm256_add_epi32(twice, _mm256_set1_epi32(4 * half)));
        }
    }
}

/* Add the products of a group and the activations of n_tok tokens, those of one token `stride` after another's. */
DS_INLINE void row_sums_add_grid(row_sum sums[], bool per_16, const grid_codes *codes, const row_scales *w, int n_tok,
                                 const act_meta *meta, size_t stride) {
    f8 scales[DS_ROW_TOKENS][2][2];
    DS_UNROLL
    for (int t = 0; t < n_tok; t++) x86_grid_scales(per_16, w, meta + (size_t)t * stride, scales[t]);
    DS_UNROLL
    for (int half = 0; half < 2; half++) {
        __m256i dots[DS_ROW_TOKENS];
        DS_UNROLL
        for (int h = 0; h < 2; h++) {
            const __m256i q[2] = {x86_entries(codes, 2 * h, half), x86_entries(codes, 2 * h + 1, half)};
            const __m256i minus[2] = {x86_minus(codes, 2 * h, half), x86_minus(codes, 2 * h + 1, half)};
            DS_UNROLL
            for (int t = 0; t < n_tok; t++) {
                const int8_t (*eights)[64] = (meta + (size_t)t * stride)->eights + 2 * h;
                const __m256i x[2] = {_mm256_sign_epi8(x86_load(eights[0] + 32 * half), minus[0]),
                                      _mm256_sign_epi8(x86_load(eights[1] + 32 * half), minus[1])};
                dots[t] = x86_dots2(per_16 || !h ? _mm256_setzero_si256() : dots[t], q, x);
                if (!per_16 && !h) continue;
                f8 *y = &sums[t].y[half][h];
                *y = f8_fma(_mm256_cvtepi32_ps(dots[t]), scales[t][half][h], *y);
            }
        }
    }
}

/* The codes of a group, biased, and its scales, in memory: dword i is dword grid_place(i) of the 256 codes. */
DS_INLINE int grid_place(int i) { return i % 16 / 2 * 8 + i / 16 * 2 + i % 2; }
enum { DS_GRID_SCALE_STEP = 1 };
DS_INLINE void grid_store(const grid_codes *from, const row_scales *scales, uint8_t codes[256], float scale[16]) {
    const __m256i bias = _mm256_set1_epi8((char)DS_CODE_BIAS);
    DS_UNROLL
    for (int e = 0; e < 4; e++)
        for (int half = 0; half < 2; half++) {
            const __m256i q = _mm256_sign_epi8(x86_entries(from, e, half), x86_minus(from, e, half));
            _mm256_storeu_si256((__m256i *)(codes + 64 * e + 32 * half), _mm256_xor_si256(q, bias));
        }
    memcpy(scale, scales->scale, sizeof scales->scale);
}
DS_INLINE vi vi_add8(vi a, vi b) { return _mm256_add_epi8(a, b); }

/* Pack 32 values, block b of a group, by eights. */
DS_INLINE void i8_eights32(const int8_t q[32], int b, int8_t eights[4][64]) {
    DS_UNROLL
    for (int e = 0; e < 4; e++) memcpy(eights[e] + 8 * b, q + 8 * e, 8);
}
