/* simd_x86_eights.h: the grid formats with an entry's load for each index.
 *
 * The 256 codes of a group lie "by eights": qword b of vectors e, 64 bytes each, holds values 32 b + 8 e to 32 b + 8 e + 7, so
 * that sums over e stay apart by blocks of 32 and get their scales once. Codes are without their signs, which go to the
 * activations, packed in the same order (act_meta.eights).
 *
 * What entries wait for is made for several groups before it is used, in memory: within one group, the way from a block to its
 * indices, through memory to the entries and on to their sums is longer than what processors look ahead. */
#pragma once

enum { DS_EIGHTS_AHEAD = 8 }; /* groups */

typedef struct row_ahead {
    const uint8_t *index
        [2]; /* 8 qwords: the e-th index of qword b; of the even and the odd entries where they are of four values */
    const uint8_t *signs;    /* (8, 4): bit j of byte e is the sign of value 8 e + j; with AVX-512 turned, (4, 8) */
    DS_ALIGNED uint16_t
        made_index[2][32]; /* where indices and signs are that the block does not have as they are wanted */
    DS_ALIGNED uint8_t made_signs[32];
    DS_ALIGNED float scale[16]; /* one per 32 values, or per 16 */
} row_ahead;

/* ---- Before ---- */

/* Stored by halves: loads out of a store of 64 bytes that is still under way take twice as long. */
DS_INLINE void eights_put_words(row_ahead *a, int odd, __m256i first, __m256i second) {
    _mm256_store_si256((__m256i *)a->made_index[odd], first);
    _mm256_store_si256((__m256i *)a->made_index[odd] + 1, second);
    a->index[odd] = (const uint8_t *)a->made_index[odd];
}
/* words, with `mask` of words that are copies of four bytes, four of each, times `factors`. */
DS_INLINE __m256i eights_with_high(__m256i words, const uint8_t bytes[4], int64_t factors, int mask) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    const __m256i order = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);
    const __m256i copies = _mm256_shuffle_epi8(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), order);
    const __m256i moved = _mm256_mullo_epi16(copies, _mm256_set1_epi64x(factors));
    return _mm256_or_si256(words, _mm256_and_si256(moved, _mm256_set1_epi16((short)mask)));
}
/* Bytes, with bits 8 and 9 from pairs of bits. */
DS_INLINE void eights_index_tens(row_ahead *a, const uint8_t low[32], const uint8_t pairs[8]) {
    const int64_t factors = 0x0004001000400100;
    const __m256i first = _mm256_cvtepu8_epi16(v16_load(low)), second = _mm256_cvtepu8_epi16(v16_load(low + 16));
    eights_put_words(a, 0, eights_with_high(first, pairs, factors, 0x300),
                     eights_with_high(second, pairs + 4, factors, 0x300));
}
/* Bytes, even and odd ones apart, with bit 8 from 64 bits. */
DS_INLINE void eights_index_nines(row_ahead *a, const uint8_t low[64], const uint8_t bits[8]) {
    const __m256i first = x86_load(low), second = x86_load(low + 32), mask = _mm256_set1_epi16(255);
    const int64_t even = 0x0004001000400100, odd = 0x0002000800200080;
    eights_put_words(a, 0, eights_with_high(_mm256_and_si256(first, mask), bits, even, 0x100),
                     eights_with_high(_mm256_and_si256(second, mask), bits + 4, even, 0x100));
    eights_put_words(a, 1, eights_with_high(_mm256_srli_epi16(first, 8), bits, odd, 0x100),
                     eights_with_high(_mm256_srli_epi16(second, 8), bits + 4, odd, 0x100));
}

DS_INLINE void eights_signs_load(row_ahead *a, const uint8_t signs[32]) {
#if defined(__AVX512F__)
    const __m256i turn =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i fours = _mm256_shuffle_epi8(x86_load(signs), turn);
    const __m256i turned = _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_store_si256((__m256i *)a->made_signs, turned);
    a->signs = a->made_signs;
#else
    a->signs = signs;
#endif
}
/* From seven bits in bytes. */
DS_INLINE void eights_signs_7(row_ahead *a, __m256i sevens) {
    const __m256i folded =
        _mm256_and_si256(_mm256_xor_si256(sevens, _mm256_srli_epi16(sevens, 4)), _mm256_set1_epi8(15));
    const __m256i eighth = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(X86_ODD_NIBBLES), folded);
    _mm256_store_si256((__m256i *)a->made_signs, _mm256_or_si256(sevens, eighth));
    a->signs = a->made_signs;
}
/* From the top seven bits of words. */
DS_INLINE void eights_signs_top(row_ahead *a, const void *p) {
    const __m256i first = _mm256_srli_epi16(x86_load(p), 9),
                  second = _mm256_srli_epi16(x86_load((const char *)p + 32), 9);
    eights_signs_7(a, _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xd8));
}

/* Dwords of four times 7 sign bits and 4 of scale: every second one of 64 bytes. */
DS_INLINE __m256i eights_tails(const void *p) {
    const __m256 a = _mm256_castsi256_ps(x86_load(p)), b = _mm256_castsi256_ps(x86_load((const char *)p + 32));
    return _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
}
/* Their signs, and (2 n + 1) unit of their scales. */
DS_INLINE void eights_take_tails(row_ahead *a, __m256i tails, float unit) {
    const __m256i low = _mm256_and_si256(tails, _mm256_set1_epi32(0x3fff));
    const __m256i high = _mm256_and_si256(_mm256_slli_epi32(tails, 2), _mm256_set1_epi32(0x3fff0000));
    const __m256i twos = _mm256_or_si256(low, high);
    eights_signs_7(a, _mm256_or_si256(_mm256_and_si256(twos, _mm256_set1_epi16(0x7f)),
                                      _mm256_and_si256(_mm256_add_epi16(twos, twos), _mm256_set1_epi16(0x7f00))));
    const f8 n = _mm256_cvtepi32_ps(_mm256_srli_epi32(tails, 28));
    _mm256_store_ps(a->scale, f8_fma(n, f8_set(2.0f * unit), f8_set(unit)));
}
DS_INLINE void eights_scales_32(row_ahead *a, f8 scale) { _mm256_store_ps(a->scale, scale); }
/* Stored as they are loaded: out of two stores that are still under way a load has to wait for both. */
DS_INLINE void eights_scales_16(row_ahead *a, v16 sc, float d) {
#if defined(__AVX512F__)
    _mm512_store_ps(a->scale, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sc)), _mm512_set1_ps(d)));
#else
    const f8 first = x86_bytes(sc), second = x86_bytes(_mm_srli_si128(sc, 8));
    _mm256_store_ps(a->scale, f8_mul(first, f8_set(d)));
    _mm256_store_ps(a->scale + 8, f8_mul(second, f8_set(d)));
#endif
}

/* ---- Entries: 32 codes, those of eight e of blocks 4 half to 4 half + 3 ---- */

/* A value in all lanes is a load alone, and blends run where shuffles cannot. */
DS_INLINE v32 eights_blend(const __m256i q[4]) {
    return _mm256_blend_epi32(_mm256_blend_epi32(q[0], q[1], 0x0c), _mm256_blend_epi32(q[2], q[3], 0xc0), 0xf0);
}
/* The e-th index at p, of `bits`; loaded by itself, or taken out of all of eight bytes in a register. */
DS_INLINE size_t eights_index(const uint8_t *p, int bits, int mask, int e, bool in_register) {
    uint64_t all;
    uint16_t word;
    if (in_register) {
        memcpy(&all, p, sizeof all);
        return all >> bits * e & (unsigned)mask;
    }
    if (mask < 256) return p[bits / 8 * e];
    memcpy(&word, p + bits / 8 * e, sizeof word);
    return word & (unsigned)mask;
}
/* Entries of eight values by indices of `bits` (8 or 16). Of bytes a quarter and else half are taken out of registers: more
 * wait for instructions, fewer for loads. */
DS_INLINE v32 eights_entries8(const row_ahead *a, const uint64_t *grid, int bits, int mask, int e, int half) {
    __m256i q[4];
    DS_UNROLL
    for (int b = 0; b < 4; b++) {
        const uint8_t *at = a->index[0] + 32 * half + 8 * b;
        q[b] = _mm256_set1_epi64x((long long)grid[eights_index(at, bits, mask, e, b < bits / 8)]);
    }
    return eights_blend(q);
}
/* Pairs of entries of four values, by indices of 16 bits of two planes, or by bytes. */
DS_INLINE v32 eights_entries4(const row_ahead *a, const uint32_t *grid, int bits, int mask, int e, int half) {
    __m256i q[4];
    DS_UNROLL
    for (int b = 0; b < 4; b++) {
        const size_t at = 32 * (size_t)half + 8 * (size_t)b;
        const bool bytes = bits == 8;
        const size_t first = eights_index(a->index[0] + at, bits, mask, bytes ? 2 * e : e, b < 2);
        const size_t second = eights_index(a->index[!bytes] + at, bits, mask, bytes ? 2 * e + 1 : e, b < 2);
        q[b] = _mm256_blend_epi32(_mm256_set1_epi32((int)grid[first]), _mm256_set1_epi32((int)grid[second]), 0xaa);
    }
    return eights_blend(q);
}
typedef v32 (*row_eights_fn)(const row_ahead *a, int e, int half);

/* ---- Their products ---- */

#if defined(__AVX512F__)

/* Which bytes of vectors e have a sign. */
DS_INLINE __mmask64 eights_minus(const row_ahead *a, int e) {
    uint64_t bits;
    memcpy(&bits, a->signs + 8 * e, sizeof bits);
    return bits;
}
DS_INLINE v64 eights_negate(v64 a, __mmask64 minus) {
    return _mm512_mask_sub_epi8(a, minus, _mm512_setzero_si512(), a);
}
DS_INLINE v64 eights_codes(row_eights_fn of, const row_ahead *a, int e) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(of(a, e, 0)), of(a, e, 1), 1);
}

/* Add the products of a group, with scales per 16 values, and the activations of n_tok tokens, those of one token `stride`
 * after another's. */
DS_INLINE void row_sums_add_eights(row_sum sums[], bool per_16, row_eights_fn of, const row_ahead *a, int n_tok,
                                   const act_meta *meta, size_t stride) {
    v64 q[4];
    DS_UNROLL
    for (int e = 0; e < 4; e++) q[e] = eights_codes(of, a, e);
    DS_UNROLL
    for (int t = 0; t < n_tok; t++) {
        const act_meta *x = meta + (size_t)t * stride;
        const f16x scale = _mm512_mul_ps(_mm512_load_ps(a->scale), _mm512_load_ps(x->scale_16));
        DS_UNROLL
        for (int h = 0; h < 2; h++) {
            __m512i dots = _mm512_setzero_si512();
            DS_UNROLL
            for (int e = 2 * h; e < 2 * h + 2; e++)
                dots = _mm512_dpbusd_epi32(dots, q[e], eights_negate(v64_load(x->eights[e]), eights_minus(a, e)));
            const f16x own = h ? _mm512_movehdup_ps(scale) : _mm512_moveldup_ps(scale);
            sums[t].y[h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), own, sums[t].y[h]);
        }
    }
}

/* The codes of a group, biased, and its scales, in memory, in the order of grid_place (simd_avx512_grid.h). */
DS_INLINE void eights_store(row_eights_fn of, const row_ahead *a, uint8_t codes[256], float scale[16]) {
    v64 c[4];
    DS_UNROLL
    for (int e = 0; e < 4; e++) c[e] = eights_negate(v64_bias(eights_codes(of, a, e)), eights_minus(a, e));
    DS_UNROLL
    for (int half = 0; half < 2; half++) { /* the first dwords of all four and the second ones; the others */
        const __m512i first = half ? _mm512_unpackhi_epi32(c[0], c[1]) : _mm512_unpacklo_epi32(c[0], c[1]);
        const __m512i second = half ? _mm512_unpackhi_epi32(c[2], c[3]) : _mm512_unpacklo_epi32(c[2], c[3]);
        _mm512_storeu_si512(codes + 64 * half, _mm512_unpacklo_epi64(first, second));
        _mm512_storeu_si512(codes + 64 * half + 128, _mm512_unpackhi_epi64(first, second));
    }
    _mm512_storeu_ps(scale, _mm512_load_ps(a->scale));
}

#else

/* For entries: bytes below zero where one has its sign, above it elsewhere. */
DS_INLINE __m256i eights_minus(const row_ahead *a, int e, int half) {
    const __m256i order = _mm256_set_epi64x(0x0c0c0c0c0c0c0c0c, 0x0808080808080808, 0x0404040404040404, 0);
    const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i bits = _mm256_broadcastsi128_si256(v16_load(a->signs + 16 * half));
    const __m256i copies = _mm256_shuffle_epi8(bits, _mm256_add_epi8(order, _mm256_set1_epi8((char)e)));
    return _mm256_add_epi8(_mm256_and_si256(copies, mask), _mm256_set1_epi8(127));
}
/* dots + the products of 4 neighbours summed, of two vectors of codes below 64. */
DS_INLINE __m256i eights_dots2(__m256i dots, const __m256i q[2], const __m256i x[2]) {
#if defined(__AVXVNNI__)
    return x86_dpbusd(x86_dpbusd(dots, q[0], x[0]), q[1], x[1]);
#else
    const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(q[0], x[0]), _mm256_maddubs_epi16(q[1], x[1]));
    return _mm256_add_epi32(dots, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
#endif
}
/* The scales of a group times a token's, in the order of dots: of blocks 4 half to 4 half + 3, each twice; of their halves
 * with scales per 16. */
DS_INLINE void eights_scales(bool per_16, const row_ahead *a, const act_meta *x, f8 scales[2][2]) {
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const f8 all = f8_mul(f8_load(a->scale), f8_load(x->scale));
    DS_UNROLL
    for (int half = 0; half < 2; half++) {
        if (per_16) {
            const f8 own = f8_mul(f8_load(a->scale + 8 * half), f8_load(x->scale_16 + 8 * half));
            scales[half][0] = _mm256_moveldup_ps(own);
            scales[half][1] = _mm256_movehdup_ps(own);
        } else {
            scales[half][0] = scales[half][1] =
                _mm256_permutevar8x32_ps(all, _mm256_add_epi32(twice, _mm256_set1_epi32(4 * half)));
        }
    }
}

/* Add the products of a group and the activations of n_tok tokens, those of one token `stride` after another's. */
DS_INLINE void row_sums_add_eights(row_sum sums[], bool per_16, row_eights_fn of, const row_ahead *a, int n_tok,
                                   const act_meta *meta, size_t stride) {
    f8 scales[DS_ROW_TOKENS][2][2];
    DS_UNROLL
    for (int t = 0; t < n_tok; t++) eights_scales(per_16, a, meta + (size_t)t * stride, scales[t]);
    DS_UNROLL
    for (int half = 0; half < 2; half++) {
        __m256i dots[DS_ROW_TOKENS];
        DS_UNROLL
        for (int h = 0; h < 2; h++) {
            const __m256i q[2] = {of(a, 2 * h, half), of(a, 2 * h + 1, half)};
            const __m256i minus[2] = {eights_minus(a, 2 * h, half), eights_minus(a, 2 * h + 1, half)};
            DS_UNROLL
            for (int t = 0; t < n_tok; t++) {
                const int8_t (*eights)[64] = (meta + (size_t)t * stride)->eights + 2 * h;
                const __m256i x[2] = {_mm256_sign_epi8(x86_load(eights[0] + 32 * half), minus[0]),
                                      _mm256_sign_epi8(x86_load(eights[1] + 32 * half), minus[1])};
                dots[t] = eights_dots2(per_16 || !h ? _mm256_setzero_si256() : dots[t], q, x);
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
DS_INLINE void eights_store(row_eights_fn of, const row_ahead *a, uint8_t codes[256], float scale[16]) {
    const __m256i bias = _mm256_set1_epi8((char)DS_CODE_BIAS);
    DS_UNROLL
    for (int i = 0; i < 8; i++) {
        const __m256i q = _mm256_sign_epi8(of(a, i / 2, i % 2), eights_minus(a, i / 2, i % 2));
        _mm256_storeu_si256((__m256i *)(codes + 32 * i), _mm256_xor_si256(q, bias));
    }
    memcpy(scale, a->scale, sizeof a->scale);
}
DS_INLINE vi vi_add8(vi a, vi b) { return _mm256_add_epi8(a, b); }

#endif

/* Pack 32 values, block b of a group, by eights. */
DS_INLINE void i8_eights32(const int8_t q[32], int b, int8_t eights[4][64]) {
    DS_UNROLL
    for (int e = 0; e < 4; e++) memcpy(eights[e] + 8 * b, q + 8 * e, 8);
}
