/* mul_crossed.h: formats without a 32-bit dot instruction: functions that make the scales of 256 values, and half h (the first or
 * the second 16 values) of blocks 2 j and 2 j + 1 of 32 (simd_x86_crossed.h). The others gained nothing by it (cext/NOTES.md). */
#pragma once

typedef v32 (*crossed_codes_fn)(const void *block, int j, int h);
typedef row_crossed (*crossed_scales_fn)(const void *block);

#define CROSSED_CODES(id) DS_INLINE v32 crossed_codes_##id(const void *block, int j, int h)
#define CROSSED_SCALES(id) DS_INLINE row_crossed crossed_scales_##id(const void *block)

/* Pairs of bits, those of the second block 4 times as large. */
DS_INLINE v32 crossed_twos(const uint8_t qs[64], int j, int h) {
    return v32_and(v32_shift(v32_twice(qs + 32 * (j / 2) + 16 * h), j % 2 * 4, j % 2 * 4), 3, 12);
}

CROSSED_CODES(Q2_K) { return crossed_twos(((const ds_block_Q2_K *)block)->qs, j, h); }
CROSSED_SCALES(Q2_K) {
    const ds_block_Q2_K *b = block;
    const uint8_t *four = (const uint8_t *)(b + 1) - 8; /* d and dmin are the last two halves */
    row_crossed w = {.d = f8_half_of(four, 2), .dmin = f8_half_of(four, 3)};
    crossed_nibbles(v16_load(b->scales), &w.scale, &w.min);
    return w;
}

CROSSED_CODES(Q3_K) {
    const ds_block_Q3_K *b = block;
    const v32 third = v32_and(v32_shift(v32_twice(b->hmask + 16 * h), 2 * j - 2, 2 * j - 3), 4, 16);
    return v32_or(crossed_twos(b->qs, j, h), third);
}
CROSSED_SCALES(Q3_K) {
    const ds_block_Q3_K *b = block;
    const v32 sc = crossed_words(v16_scales_q3_k(b->scales));
    const f8 d = f8_half_of((const uint8_t *)(b + 1) - 8, 3); /* the last half */
    return (row_crossed){.scale = sc, .min = sc, .d = d, .dmin = d};
}

CROSSED_CODES(IQ4_NL) {
    const ds_block_IQ4_NL *b = (const ds_block_IQ4_NL *)block + 2 * j;
    return v32_lookup(iq4_codes, v32_and(v32_shift(v32_two(b[0].qs, b[1].qs), 4 * h, 4 * h), 15, 15));
}
CROSSED_SCALES(IQ4_NL) { return (row_crossed){.scale = v32_words(1), .d = f8_halves(block, sizeof(ds_block_IQ4_NL))}; }

CROSSED_CODES(IQ4_XS) {
    const v32 both = x86_load(((const ds_block_IQ4_XS *)block)->qs + 32 * j);
    return v32_lookup(iq4_codes, v32_and(v32_shift(both, 4 * h, 4 * h), 15, 15));
}
CROSSED_SCALES(IQ4_XS) {
    const ds_block_IQ4_XS *b = block;
    const v16 sc = v16_sub(v16_bytes(scales_iq4_xs(b)), v16_set(32));
    return (row_crossed){.scale = crossed_words_32(sc), .d = f8_half_of(b, 0)};
}
