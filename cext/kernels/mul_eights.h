/* mul_eights.h: the grid formats whose entries are loaded (simd_x86_eights.h), as functions that make what entries wait for and
 * then the codes. */
#pragma once

typedef void (*row_ahead_fn)(const void *block, row_ahead *a);

#define ROW_AHEAD(id) DS_INLINE void row_ahead_##id(const void *block, row_ahead *a)
#define ROW_EIGHTS(id) DS_INLINE v32 row_eights_##id(const row_ahead *a, int e, int half)

ROW_AHEAD(IQ2_S) {
    const ds_block_IQ2_S *b = block;
    eights_index_tens(a, b->qs, b->qh);
    eights_signs_load(a, b->signs);
    eights_scales_16(a, v16_odd_nibbles(b->scales), f32_of_f16(b->d) / 8.0f);
}
ROW_EIGHTS(IQ2_S) { return eights_entries8(a, grid_IQ2_S, 16, 0xffff, e, half); }

#if !DS_GRID_GROUPS

ROW_AHEAD(IQ2_XXS) {
    const ds_block_IQ2_XXS *b = block;
    a->index[0] = (const uint8_t *)b->sub;
    eights_take_tails(a, eights_tails(b->sub), f32_of_f16(b->d) / 8.0f);
}
ROW_EIGHTS(IQ2_XXS) { return eights_entries8(a, grid_IQ2_XXS, 8, 255, e, half); }

ROW_AHEAD(IQ2_XS) {
    const ds_block_IQ2_XS *b = block;
    a->index[0] = (const uint8_t *)b->qs;
    eights_signs_top(a, b->qs);
    eights_scales_16(a, v16_odd_nibbles(b->scales), f32_of_f16(b->d) / 8.0f);
}
ROW_EIGHTS(IQ2_XS) { return eights_entries8(a, grid_IQ2_XS, 16, 511, e, half); }

ROW_AHEAD(IQ3_XXS) {
    const ds_block_IQ3_XXS *b = block;
    a->index[0] = b->qs;
    eights_take_tails(a, x86_load(b->tail), f32_of_f16(b->d) / 4.0f);
}
ROW_EIGHTS(IQ3_XXS) { return eights_entries4(a, grid_IQ3_XXS, 8, 255, e, half); }

ROW_AHEAD(IQ3_S) {
    const ds_block_IQ3_S *b = block;
    const float d = f32_of_f16(b->d);
    uint32_t packed;
    memcpy(&packed, b->scales, sizeof packed);
    eights_index_nines(a, b->qs, b->qh);
    eights_signs_load(a, b->signs);
    eights_scales_32(a, f8_fma(f8_bytes(spread_nibbles(packed)), f8_set(2.0f * d), f8_set(d)));
}
ROW_EIGHTS(IQ3_S) { return eights_entries4(a, grid_IQ3_S, 16, 0xffff, e, half); }

#endif
