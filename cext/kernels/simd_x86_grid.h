/* simd_x86_grid.h: 256 codes of the grid formats from their indices and signs.
 *
 * AVX-512 looks all indices up at once in the packed grids of grids.h, with permutes of 64 words, and spreads the entries it
 * finds; AVX2 has no such permutes and loads each entry from a table of codes. Codes come with DS_CODE_BIAS: at 128 the
 * negative of such a byte is the negative code's byte. */
#pragma once

#define X86_BIASED(value) (uint8_t)((value) + DS_CODE_BIAS),
DS_ALIGNED static const uint8_t grid_values_IQ2[16] = {DS_GRID_VALUES_IQ2(X86_BIASED)};
DS_ALIGNED static const uint8_t grid_values_IQ3_XXS[16] = {DS_GRID_VALUES_IQ3_XXS(X86_BIASED)};
DS_ALIGNED static const uint8_t grid_values_IQ3_S[16] = {DS_GRID_VALUES_IQ3_S(X86_BIASED)};

typedef __m256i v32; /* 32 bytes, or 8 dwords */

/* The 7 low bits of each dword in its first byte, the next 7 in the second, and so on. */
DS_INLINE v32 v32_sevens(v32 a) {
    const v32 first = _mm256_and_si256(a, _mm256_set1_epi32(0x7f)), second = _mm256_and_si256(_mm256_slli_epi32(a, 1), _mm256_set1_epi32(0x7f00));
    const v32 third = _mm256_and_si256(_mm256_slli_epi32(a, 2), _mm256_set1_epi32(0x7f0000));
    const v32 fourth = _mm256_and_si256(_mm256_slli_epi32(a, 3), _mm256_set1_epi32(0x7f000000));
    return _mm256_or_si256(_mm256_or_si256(first, second), _mm256_or_si256(third, fourth));
}
/* Bytes of 7 bits, with an eighth that makes their number even. */
DS_INLINE v32 v32_even(v32 a) {
    const v32 odd = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
    const v32 folded = _mm256_and_si256(_mm256_xor_si256(a, _mm256_srli_epi16(a, 4)), _mm256_set1_epi8(15));
    return _mm256_or_si256(a, _mm256_shuffle_epi8(odd, folded));
}
DS_INLINE v32 v32_load(const void *p) { return _mm256_loadu_si256(p); }
DS_INLINE v32 v32_shr(v32 a, int n) { return _mm256_srli_epi32(a, n); } /* dwords */
DS_INLINE f8 f8_dwords(v32 a) { return _mm256_cvtepi32_ps(a); }
/* 2 n + 1 of the 16 halves n of 8 bytes, low ones first. */
DS_INLINE v16 v16_odd_nibbles(const uint8_t p[8]) {
    const v16 a = _mm_loadl_epi64((const __m128i *)p), twice = _mm_add_epi8(a, a);
    const v16 both = _mm_unpacklo_epi8(twice, _mm_srli_epi16(a, 3));
    return _mm_or_si128(_mm_and_si128(both, _mm_set1_epi8(30)), _mm_set1_epi8(1));
}

#if defined(__AVX512F__)

DS_INLINE vi vi_add8(vi a, vi b) { return _mm512_add_epi8(a, b); }

typedef __m512i w32; /* 32 words: indices, with any bits above */

typedef uint16_t grid8_entry, grid4_entry;
#define X86_GRID_IQ2(entry) entry,
#define X86_GRID_IQ3_XXS(entry) entry,
#define X86_GRID_IQ3_S(entry) entry,

/* The low 9 bits of 32 words. */
DS_INLINE w32 w32_nines(const void *p) { return _mm512_loadu_si512(p); }
DS_INLINE w32 w32_bytes(v32 a) { return _mm512_cvtepu8_epi16(a); }
/* The first or second dword of each 8 bytes of 64. */
DS_INLINE v32 v32_dwords(const void *p, bool second) {
    const __m512i a = _mm512_loadu_si512(p);
    return _mm512_cvtepi64_epi32(second ? _mm512_srli_epi64(a, 32) : a);
}
/* The top 7 bits of 32 words, as bytes. */
DS_INLINE v32 v32_top_sevens(const void *p) { return _mm512_cvtepi16_epi8(_mm512_srli_epi16(_mm512_loadu_si512(p), 9)); }
/* 32 bytes, with bits 8 and 9 from 32 pairs of bits. */
DS_INLINE w32 w32_tens(const uint8_t low[32], const uint8_t pairs[8]) {
    const __m512i spread = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)pairs));
    const __m512i copies = _mm512_shuffle_epi8(spread, _mm512_set4_epi32(0x08080808, 0x08080808, 0, 0));
    const __m512i moved = _mm512_mullo_epi16(copies, _mm512_set1_epi64(0x0004001000400100));
    return _mm512_or_si512(_mm512_cvtepu8_epi16(v32_load(low)), _mm512_and_si512(moved, _mm512_set1_epi16(0x300)));
}
/* 32 bytes, with bit 8 from 32 bits. */
DS_INLINE w32 w32_with_bits(const uint8_t low[32], const uint8_t bits[4]) {
    uint32_t mask;
    memcpy(&mask, bits, sizeof mask);
    const __m512i words = _mm512_cvtepu8_epi16(v32_load(low));
    return _mm512_mask_add_epi16(words, mask, words, _mm512_set1_epi16(256));
}

/* Entries of a grid of n, a power of two. */
DS_INLINE __m512i x86_grid_words(const uint16_t *grid, int n, w32 index) {
    __m512i found[16];
    DS_UNROLL
    for (int i = 0; i < n / 64; i++)
        found[i] = _mm512_permutex2var_epi16(_mm512_load_si512(grid + 64 * i), index, _mm512_load_si512(grid + 64 * i + 32));
    DS_UNROLL
    for (int half = n / 128, bit = 64; half > 0; half /= 2, bit *= 2) {
        const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16((short)bit));
        DS_UNROLL
        for (int i = 0; i < half; i++) found[i] = _mm512_mask_blend_epi16(upper, found[2 * i], found[2 * i + 1]);
    }
    return found[0];
}

DS_INLINE v64 x86_signed(v64 a, uint64_t minus) { return _mm512_mask_sub_epi8(a, minus, _mm512_setzero_si512(), a); }

/* Each of 8 words four times, and each of 16 words twice. */
#define X86_FOUR(i) (i), (i), (i), (i)
#define X86_TWO(i) (i), (i)
DS_ALIGNED static const uint16_t x86_fours[32] = {X86_FOUR(0), X86_FOUR(1), X86_FOUR(2), X86_FOUR(3),
                                                  X86_FOUR(4), X86_FOUR(5), X86_FOUR(6), X86_FOUR(7)};
DS_ALIGNED static const uint16_t x86_twos[32] = {X86_TWO(0),  X86_TWO(1),  X86_TWO(2),  X86_TWO(3), X86_TWO(4),  X86_TWO(5),
                                                 X86_TWO(6),  X86_TWO(7),  X86_TWO(8),  X86_TWO(9), X86_TWO(10), X86_TWO(11),
                                                 X86_TWO(12), X86_TWO(13), X86_TWO(14), X86_TWO(15)};

/* q = 32 entries of eight values; n entries in the grid. */
DS_INLINE void v64_grid8(const grid8_entry *grid, int n, const w32 *index, v32 signs, v64 q[4]) {
    uint64_t minus[4];
    _mm256_storeu_si256((__m256i *)minus, signs);
    const __m512i entries = x86_grid_words(grid, n, *index), fours = _mm512_load_si512(x86_fours);
    DS_UNROLL
    for (int j = 0; j < 4; j++) {
        const __m512i order = _mm512_add_epi16(fours, _mm512_set1_epi16((short)(8 * j)));
        const __m512i shifted = _mm512_srlv_epi16(_mm512_permutexvar_epi16(order, entries), _mm512_set1_epi64(0x0006000400020000));
        q[j] = x86_signed(v64_lookup((const int8_t *)grid_values_IQ2, v64_and(shifted, 3)), minus[j]);
    }
}

/* q = 64 entries of four values, in two halves. */
DS_INLINE void v64_grid4(const grid4_entry *grid, int n, const uint8_t values[16], const w32 index[2], v32 signs, v64 q[4]) {
    uint64_t minus[4];
    _mm256_storeu_si256((__m256i *)minus, signs);
    const __m512i twos = _mm512_load_si512(x86_twos);
    DS_UNROLL
    for (int half = 0; half < 2; half++) {
        const __m512i entries = x86_grid_words(grid, n, index[half]);
        DS_UNROLL
        for (int i = 0; i < 2; i++) {
            const __m512i order = _mm512_add_epi16(twos, _mm512_set1_epi16((short)(16 * i)));
            const __m512i shifted = _mm512_srlv_epi16(_mm512_permutexvar_epi16(order, entries), _mm512_set1_epi32(0x00030000));
            q[2 * half + i] = x86_signed(v64_lookup((const int8_t *)values, v64_and(shifted, 7)), minus[2 * half + i]);
        }
    }
}

DS_INLINE void v64_store(void *p, v64 a) { _mm512_storeu_si512(p, a); }
/* The scales as 16 floats; the last 8 are undefined where there is one per 32 values. */
DS_INLINE void row_scales_store(const row_scales *s, float out[16]) { _mm512_storeu_ps(out, s->scale); }

#else

DS_INLINE vi vi_add8(vi a, vi b) { return _mm256_add_epi8(a, b); }

/* In memory: indices are used one by one. */
typedef struct w32 {
    DS_ALIGNED uint16_t at[32];
} w32;

/* Entries as bytes of codes. */
typedef uint64_t grid8_entry;
typedef uint32_t grid4_entry;
#define X86_VALUE_IQ2(place) ((place) == 0 ? 8 : (place) == 1 ? 25 : 43)
#define X86_VALUE_IQ3_XXS(place) ((place) == 7 ? 62 : 8 * (place) + 4)
#define X86_VALUE_IQ3_S(place) (2 * (place) + 1)
#define X86_BYTE(value, i) (uint64_t)(uint8_t)((value) + DS_CODE_BIAS) << 8 * (i)
#define X86_BYTE_2(e, i) X86_BYTE(X86_VALUE_IQ2(DS_GRID_PLACE_IQ2(e, i)), i)
#define X86_BYTE_3(value, e, i) X86_BYTE(value(DS_GRID_PLACE_IQ3(e, i)), i)
#define X86_FOUR_3(value, e) (uint32_t)(X86_BYTE_3(value, e, 0) | X86_BYTE_3(value, e, 1) | X86_BYTE_3(value, e, 2) | X86_BYTE_3(value, e, 3))
#define X86_GRID_IQ2(e) X86_BYTE_2(e, 0) | X86_BYTE_2(e, 1) | X86_BYTE_2(e, 2) | X86_BYTE_2(e, 3) | \
    X86_BYTE_2(e, 4) | X86_BYTE_2(e, 5) | X86_BYTE_2(e, 6) | X86_BYTE_2(e, 7),
#define X86_GRID_IQ3_XXS(e) X86_FOUR_3(X86_VALUE_IQ3_XXS, e),
#define X86_GRID_IQ3_S(e) X86_FOUR_3(X86_VALUE_IQ3_S, e),

DS_INLINE w32 x86_words(__m256i a, __m256i b) {
    w32 w;
    _mm256_store_si256((__m256i *)w.at, a);
    _mm256_store_si256((__m256i *)w.at + 1, b);
    return w;
}

DS_INLINE w32 w32_nines(const void *p) {
    const __m256i mask = _mm256_set1_epi16(511);
    return x86_words(_mm256_and_si256(v32_load(p), mask), _mm256_and_si256(v32_load((const char *)p + 32), mask));
}
DS_INLINE w32 w32_bytes(v32 a) {
    return x86_words(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)));
}
DS_INLINE v32 v32_dwords(const void *p, bool second) {
    const __m256 a = _mm256_castsi256_ps(v32_load(p)), b = _mm256_castsi256_ps(v32_load((const char *)p + 32));
    const __m256 mixed = second ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xd8);
}
DS_INLINE v32 v32_top_sevens(const void *p) {
    const __m256i a = _mm256_srli_epi16(v32_load(p), 9), b = _mm256_srli_epi16(v32_load((const char *)p + 32), 9);
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
}
/* 16 bytes as words, with bits 8 and 9 from 16 pairs of bits: four copies of each byte of them, shifted by a product. */
DS_INLINE __m256i x86_tens(const uint8_t low[16], const uint8_t pairs[4]) {
    int32_t four;
    memcpy(&four, pairs, sizeof four);
    const __m256i spread = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i copies = _mm256_shuffle_epi8(spread, _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0));
    const __m256i moved = _mm256_mullo_epi16(copies, _mm256_set1_epi64x(0x0004001000400100));
    return _mm256_or_si256(_mm256_cvtepu8_epi16(v16_load(low)), _mm256_and_si256(moved, _mm256_set1_epi16(0x300)));
}
DS_INLINE w32 w32_tens(const uint8_t low[32], const uint8_t pairs[8]) {
    return x86_words(x86_tens(low, pairs), x86_tens(low + 16, pairs + 4));
}
DS_INLINE __m256i x86_with_bits(const uint8_t low[16], const uint8_t bits[2]) {
    int16_t sixteen;
    memcpy(&sixteen, bits, sizeof sixteen);
    const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(sixteen), each), each);
    return _mm256_or_si256(_mm256_cvtepu8_epi16(v16_load(low)), _mm256_and_si256(set, _mm256_set1_epi16(256)));
}
DS_INLINE w32 w32_with_bits(const uint8_t low[32], const uint8_t bits[4]) {
    return x86_words(x86_with_bits(low, bits), x86_with_bits(low + 16, bits + 2));
}

/* Bytes of a negated where bits are set. */
DS_INLINE __m256i x86_signed(__m256i a, uint32_t bits) {
    const __m256i index = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i mask = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), index);
    const __m256i minus = _mm256_cmpeq_epi8(_mm256_and_si256(copies, mask), mask);
    return _mm256_sign_epi8(a, _mm256_or_si256(minus, _mm256_set1_epi8(1)));
}

DS_INLINE void v64_grid8(const grid8_entry *grid, int n, const w32 *index, v32 signs, v64 q[4]) {
    DS_ALIGNED uint32_t minus[8];
    _mm256_store_si256((__m256i *)minus, signs);
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        const uint16_t *i = index->at + 4 * j;
        const __m256i a = _mm256_set_epi64x((long long)grid[i[3]], (long long)grid[i[2]], (long long)grid[i[1]], (long long)grid[i[0]]);
        *(j % 2 ? &q[j / 2].b : &q[j / 2].a) = x86_signed(a, minus[j]);
    }
}

DS_INLINE void v64_grid4(const grid4_entry *grid, int n, const uint8_t values[16], const w32 index[2], v32 signs, v64 q[4]) {
    DS_ALIGNED uint32_t minus[8];
    _mm256_store_si256((__m256i *)minus, signs);
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        const uint16_t *i = index[j / 4].at + j % 4 * 8;
        const __m256i a = _mm256_setr_epi32((int)grid[i[0]], (int)grid[i[1]], (int)grid[i[2]], (int)grid[i[3]],
                                            (int)grid[i[4]], (int)grid[i[5]], (int)grid[i[6]], (int)grid[i[7]]);
        *(j % 2 ? &q[j / 2].b : &q[j / 2].a) = x86_signed(a, minus[j]);
    }
}

DS_INLINE void v64_store(void *p, v64 v) {
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)p + 1, v.b);
}
DS_INLINE void row_scales_store(const row_scales *s, float out[16]) { memcpy(out, s->scale, sizeof s->scale); }

#endif

DS_ALIGNED static const grid8_entry grid_IQ2_XXS[256] = {DS_GRID_IQ2_XXS(X86_GRID_IQ2)};
DS_ALIGNED static const grid8_entry grid_IQ2_XS[512] = {DS_GRID_IQ2_XS(X86_GRID_IQ2)};
DS_ALIGNED static const grid8_entry grid_IQ2_S[1024] = {DS_GRID_IQ2_S(X86_GRID_IQ2)};
DS_ALIGNED static const grid4_entry grid_IQ3_XXS[256] = {DS_GRID_IQ3_XXS(X86_GRID_IQ3_XXS)};
DS_ALIGNED static const grid4_entry grid_IQ3_S[512] = {DS_GRID_IQ3_S(X86_GRID_IQ3_S)};
