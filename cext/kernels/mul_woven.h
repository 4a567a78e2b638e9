/* mul_woven.h: formats without a 32-bit dot instruction whose codes have no sign and scales are of 16 values: functions that
 * make the scales of 256 values, and the even or the odd dwords of blocks 2 j and 2 j + 1 of 32 (simd_x86_woven.h). */
#pragma once

typedef v32 (*woven_codes_fn)(const void *block, int j, int odd);
typedef row_woven (*woven_scales_fn)(const void *block);

#define WOVEN_CODES(id) DS_INLINE v32 woven_codes_##id(const void *block, int j, int odd)
#define WOVEN_SCALES(id) DS_INLINE row_woven woven_scales_##id(const void *block)

/* Pairs of bits, those of the second block 4 times as large. */
DS_INLINE v32 woven_twos(const uint8_t qs[64], int j, int odd) {
    return woven_bits(woven_shared(qs + 32 * (j / 2), odd), j % 2 * 4, j % 2 * 4, 3, 12);
}

WOVEN_CODES(Q2_K) { return woven_twos(((const ds_block_Q2_K *)block)->qs, j, odd); }
WOVEN_SCALES(Q2_K) {
    const ds_block_Q2_K *b = block;
    const uint8_t *four = (const uint8_t *)(b + 1) - 8; /* d and dmin are the last two halves */
    const v16 both = v16_load(b->scales);
    return (row_woven){.scale = v32_low_nibbles(woven_words(both)),
                       .min = v32_high_nibbles(v32_words(both)),
                       .d = f8_half_of(four, 2),
                       .dmin = f8_half_of(four, 3)};
}

WOVEN_CODES(Q3_K) {
    const ds_block_Q3_K *b = block;
    const v32 third = woven_bits(woven_shared(b->hmask, odd), 2 * j - 2, 2 * j - 3, 4, 16);
    return v32_or(woven_twos(b->qs, j, odd), third);
}
WOVEN_SCALES(Q3_K) {
    const ds_block_Q3_K *b = block;
    const v16 sc = v16_scales_q3_k(b->scales);
    const f8 d = f8_half_of((const uint8_t *)(b + 1) - 8, 3); /* the last half */
    return (row_woven){.scale = woven_words(sc), .min = v32_words(sc), .d = d, .dmin = d};
}

WOVEN_CODES(Q6_K) {
    const ds_block_Q6_K *b = block;
    const uint8_t *ql = b->ql + 64 * (j / 2);
    const v32 four = woven_bits(woven_turns(ql, ql + 32, odd), j % 2 * 4, j % 2 * 4, 15, 15);
    const int at = j % 2 ? 0 : -4;
    return v32_or(four, woven_bits(woven_shared(b->qh + 32 * (j / 2), odd), at, at + 2, 48, 48));
}
WOVEN_SCALES(Q6_K) {
    const ds_block_Q6_K *b = block;
    const v16 sc = v16_load(b->scales);
    const f8 d = f8_half_of((const uint8_t *)(b + 1) - 8, 3); /* the last half */
    return (row_woven){.scale = woven_words(sc), .min = v32_words(sc), .d = d, .dmin = d};
}
