/* mul_groups.h: the grid formats whose 256 codes are decoded at once. */
#pragma once

/* 256 values of a row. */
typedef struct row_group {
    grid_codes codes;
    row_scales scales;
} row_group;

typedef void (*row_group_fn)(const void *block, row_group *g);

DS_INLINE void row_group_IQ2_XXS(const void *block, row_group *g) {
    const ds_block_IQ2_XXS *b = block;
    const grid_tails tails = grid_tails_seconds(b->sub);
    const grid_index index = grid_index_fours(b->sub);
    g->scales = grid_tails_scales(tails, f32_of_f16(b->d) / 8.0f);
    grid_codes8(&g->codes, grid_IQ2_XXS, 256, &index);
    grid_codes_sign(&g->codes, grid_tails_signs(tails));
}

DS_INLINE void row_group_IQ2_XS(const void *block, row_group *g) {
    const ds_block_IQ2_XS *b = block;
    const grid_index index = grid_index_nines(b->qs);
    g->scales = grid_scales_16(v16_odd_nibbles(b->scales), f32_of_f16(b->d) / 8.0f);
    grid_codes8(&g->codes, grid_IQ2_XS, 512, &index);
    grid_codes_sign(&g->codes, grid_signs_top(b->qs));
}

#if !DS_GRID_EIGHTS
DS_INLINE void row_group_IQ2_S(const void *block, row_group *g) {
    const ds_block_IQ2_S *b = block;
    const grid_index index = grid_index_tens(b->qs, b->qh);
    g->scales = grid_scales_16(v16_odd_nibbles(b->scales), f32_of_f16(b->d) / 8.0f);
    grid_codes8(&g->codes, grid_IQ2_S, 1024, &index);
    grid_codes_sign(&g->codes, grid_signs_load(b->signs));
}
#endif

DS_INLINE void row_group_IQ3_XXS(const void *block, row_group *g) {
    const ds_block_IQ3_XXS *b = block;
    const grid_tails tails = grid_tails_load(b->tail);
    const grid_index index[2] = {grid_index_seconds(b->qs, false), grid_index_seconds(b->qs, true)};
    g->scales = grid_tails_scales(tails, f32_of_f16(b->d) / 4.0f);
    grid_codes4(&g->codes, grid_IQ3_XXS, 256, grid_values_IQ3_XXS, index);
    grid_codes_sign(&g->codes, grid_tails_signs(tails));
}

DS_INLINE void row_group_IQ3_S(const void *block, row_group *g) {
    const ds_block_IQ3_S *b = block;
    const float d = f32_of_f16(b->d);
    const grid_index index[2] = {grid_index_seconds_nine(b->qs, b->qh, false),
                                 grid_index_seconds_nine(b->qs, b->qh, true)};
    uint32_t packed;
    memcpy(&packed, b->scales, sizeof packed);
    g->scales = grid_scales_32(f8_fma(f8_bytes(spread_nibbles(packed)), f8_set(2.0f * d), f8_set(d)));
    grid_codes4(&g->codes, grid_IQ3_S, 512, grid_values_IQ3_S, index);
    grid_codes_sign(&g->codes, grid_signs_load(b->signs));
}
