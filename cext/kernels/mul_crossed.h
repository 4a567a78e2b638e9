/* mul_crossed.h: formats of signed codes without a 32-bit dot instruction: functions that make the scales of 256 values, and half
 * h (the first or the second 16 values) of blocks 2 j and 2 j + 1 of 32 (simd_x86_crossed.h). */
#pragma once

typedef v32 (*crossed_codes_fn)(const void *block, int j, int h);
typedef row_crossed (*crossed_scales_fn)(const void *block);

#define CROSSED_CODES(id) DS_INLINE v32 crossed_codes_##id(const void *block, int j, int h)
#define CROSSED_SCALES(id) DS_INLINE row_crossed crossed_scales_##id(const void *block)

CROSSED_CODES(IQ4_NL) {
    const ds_block_IQ4_NL *b = (const ds_block_IQ4_NL *)block + 2 * j;
    return v32_lookup(iq4_codes, v32_nibbles(v32_two(b[0].qs, b[1].qs), h));
}
CROSSED_SCALES(IQ4_NL) { return (row_crossed){.scale = v32_ones(), .d = f8_halves(block, sizeof(ds_block_IQ4_NL))}; }

CROSSED_CODES(IQ4_XS) {
    const v32 both = x86_load(((const ds_block_IQ4_XS *)block)->qs + 32 * j);
    return v32_lookup(iq4_codes, v32_nibbles(both, h));
}
CROSSED_SCALES(IQ4_XS) {
    const ds_block_IQ4_XS *b = block;
    const v16 sc = v16_sub(v16_bytes(scales_iq4_xs(b)), v16_set(32));
    return (row_crossed){.scale = crossed_words_32(sc), .d = f8_half_of(b, 0)};
}
