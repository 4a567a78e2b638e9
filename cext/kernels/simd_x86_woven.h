/* simd_x86_woven.h: products along a row, without a 32-bit dot instruction, of codes without a sign and scales of 16 values.
 *
 * 64 values, blocks 2 j and 2 j + 1 of 32, lie "woven" in two vectors: the even dwords of both blocks in turns, then the odd
 * ones. Both vectors have the same scales, so that products are added up in 16 bits, and get them, as whole numbers, in the
 * step that makes 32 bits of 16. Activations are packed in the same order (act_meta.woven). */
#pragma once

/* Of 256 values: scales that are whole numbers, and minimums; d and dmin. */
typedef struct row_woven {
    v32 scale; /* words: of the first half of each block of 32, then of the second halves */
    v32 min; /* words, of each 16 values */
    f8 d, dmin;
} row_woven;

/* Words of 16 signed bytes in the order of row_woven.scale. */
DS_INLINE v32 woven_words(v16 bytes) {
    const v16 order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
}
DS_INLINE v32 v32_words(v16 bytes) { return _mm256_cvtepi8_epi16(bytes); }
DS_INLINE v32 v32_low_nibbles(v32 words) { return _mm256_and_si256(words, _mm256_set1_epi16(15)); }
DS_INLINE v32 v32_high_nibbles(v32 words) {
    return _mm256_and_si256(_mm256_srli_epi16(words, 4), _mm256_set1_epi16(15));
}

/* Of 32 bytes at p the even or, if odd is 1, the odd dwords, each twice: what two blocks share. */
DS_INLINE v32 woven_shared(const uint8_t *p, int odd) {
    const f8 x = _mm256_loadu_ps((const float *)(const void *)p);
    return _mm256_castps_si256(odd ? _mm256_movehdup_ps(x) : _mm256_moveldup_ps(x));
}
/* The even or the odd dwords of 32 bytes at p and of 32 at q in turns; reads four bytes before q or behind those at p. */
DS_INLINE v32 woven_turns(const uint8_t *p, const uint8_t *q, int odd) {
    return _mm256_blend_epi32(x86_load(p + 4 * odd), x86_load(q + 4 * odd - 4), 0xaa);
}
/* Bits of every byte moved down by `low` in even dwords, by `high` in odd ones, up where either is negative; what comes in
 * from neighbours is masked away: `low_mask` and `high_mask` are of a byte. */
DS_INLINE v32 woven_bits(v32 a, int low, int high, int low_mask, int high_mask) {
    const uint64_t mask = (uint64_t)DS_BYTES(high_mask) << 32 | DS_BYTES(low_mask);
    if (low == high) a = low ? x86_shift(a, low) : a;
    else if (low < 0 || high < 0) a = _mm256_sllv_epi32(a, _mm256_set1_epi64x((long long)-high << 32 | -low));
    else a = _mm256_srlv_epi32(a, _mm256_set1_epi64x((long long)high << 32 | low));
    return _mm256_and_si256(a, _mm256_set1_epi64x((long long)mask));
}

/* The scales of blocks 2 j and 2 j + 1. */
DS_INLINE v32 woven_scale(v32 scales, int j) {
    return _mm256_shuffle_epi8(scales, _mm256_set1_epi64x(0x0302030201000100 + j * 0x0404040404040404));
}
/* The products of 64 values times their scales, of both blocks in turns. Four products of 63 * 127 just fit 16 bits. */
DS_INLINE f8 woven_dots(const v32 q[2], const act_meta *x, int j, v32 scale) {
    const v32 words = _mm256_add_epi16(_mm256_maddubs_epi16(q[0], x86_load(x->woven[j][0])),
                                       _mm256_maddubs_epi16(q[1], x86_load(x->woven[j][1])));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(words, scale));
}
/* The minimums' part over dmin; a lane is a block. */
DS_INLINE f8 woven_min(v32 min, const act_meta *x) {
    return f8_mul(_mm256_cvtepi32_ps(_mm256_madd_epi16(min, x86_load(x->woven_sum))), f8_load(x->scale));
}

/* Pack 32 values, block b of a group, their scale and the sums of their halves. */
DS_INLINE void i8_woven32(const int8_t q[32], float scale, const int sums[2], int b, act_meta *m) {
    DS_UNROLL
    for (int i = 0; i < 8; i++) memcpy(m->woven[b / 2][i % 2] + 8 * (i / 2) + 4 * (b % 2), q + 4 * i, 4);
    DS_UNROLL
    for (int i = b % 2; i < 8; i += 2) {
        m->woven_scale[b / 2][i] = scale;
        m->woven_pairs[b / 2][i] = b % 2 ? scale / 4.0f : scale;
    }
    DS_UNROLL
    for (int h = 0; h < 2; h++) m->woven_sum[2 * b + h] = (int16_t)sums[h];
}
