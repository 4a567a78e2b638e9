/* simd_x86_crossed.h: products along a row, without a 32-bit dot instruction, of signed codes.
 *
 * 64 values, blocks 2 j and 2 j + 1 of 32, lie "crossed" in two vectors: the first halves of both blocks, then the second ones. Sums
 * of two products get scales that are whole numbers in the step that makes 32 bits of 16, and a vector of sums is of two blocks,
 * so that half as many are made floats. Activations are packed in the same order (act_meta.crossed). */
#pragma once

/* Of 256 values: scales that are whole numbers, and d. */
typedef struct row_crossed {
    v32 scale; /* words: of each 32 values 0 2 4 6, then the others */
    f8 d; /* alike, or of each 32 values where blocks are no larger: then scales are 1 */
} row_crossed;

/* Eight signed bytes, of each 32 values, as words in the order of row_crossed.scale. */
DS_INLINE v32 crossed_words_32(v16 bytes) {
    const v16 order = _mm_setr_epi8(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7);
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
}
/* Word i of each lane in all of the lane's. */
DS_INLINE v32 crossed_scale(v32 scales, int i) {
    return _mm256_shuffle_epi8(scales, _mm256_set1_epi16((short)(0x0100 + 0x0202 * i)));
}
/* Lane 2 j four times, then lane 2 j + 1. */
DS_INLINE f8 crossed_spread(f8 d, int j) {
    const __m256i second = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(d, _mm256_add_epi32(second, _mm256_set1_epi32(2 * j)));
}
/* The i-th of the four halves at p in all lanes. Loaded together: a half of its own would be entered by a shuffle. */
DS_INLINE f8 f8_half_of(const void *p, int i) {
    const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(p));
    return i ? _mm256_permutevar8x32_ps(_mm256_castps128_ps256(four), _mm256_set1_epi32(i))
             : _mm256_broadcastss_ps(four);
}

DS_INLINE v16 v16_sub(v16 a, v16 b) { return _mm_sub_epi8(a, b); }
DS_INLINE v16 v16_bytes(uint64_t bytes) { return _mm_cvtsi64_si128((long long)bytes); }
DS_INLINE v32 v32_or(v32 a, v32 b) { return _mm256_or_si256(a, b); }
DS_INLINE v32 v32_lookup(const int8_t table[16], v32 index) { return vi_lookup(table, index); }
DS_INLINE v32 v32_ones(void) { return _mm256_set1_epi16(1); }
DS_INLINE v32 v32_nibbles(v32 a, bool high) {
    return _mm256_and_si256(high ? _mm256_srli_epi16(a, 4) : a, _mm256_set1_epi8(15));
}
/* 16 bytes at p, then 16 at q. */
DS_INLINE v32 v32_two(const void *p, const void *q) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(p)), _mm_loadu_si128(q), 1);
}
/* The products of 64 values times their scales, summed by fours: of block 2 j, then of 2 j + 1. Codes are above -128 and get the
 * activations' signs. */
DS_INLINE f8 crossed_dots(const v32 q[2], const act_meta *x, int j, v32 scale) {
    v32 sums[2];
    DS_UNROLL
    for (int h = 0; h < 2; h++) {
        const v32 own = _mm256_sign_epi8(q[h], x86_load(x->crossed[j][h]));
        sums[h] = _mm256_madd_epi16(_mm256_maddubs_epi16(x86_load(x->crossed_abs[j][h]), own), scale);
    }
    return _mm256_cvtepi32_ps(_mm256_add_epi32(sums[0], sums[1]));
}

/* Pack 32 values, block b of a group, and their scale. */
DS_INLINE void i8_crossed32(const int8_t q[32], float scale, int b, act_meta *m) {
    DS_UNROLL
    for (int h = 0; h < 2; h++) {
        const v16 half = v16_load(q + 16 * h);
        _mm_store_si128((__m128i *)m->crossed[b / 2][h] + b % 2, half);
        _mm_store_si128((__m128i *)m->crossed_abs[b / 2][h] + b % 2, _mm_abs_epi8(half));
    }
    DS_UNROLL
    for (int i = 4 * (b % 2); i < 4 * (b % 2) + 4; i++) m->spread[b / 2][i] = scale;
}
