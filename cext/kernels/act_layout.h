/* act_layout.h: how Q8 activation packs in row order lie in memory, for the primitives that read them. */
#pragma once

enum {
    ACT_BLOCK = 32,                   /* values that share a scale */
    ACT_GROUP = 256,                  /* values that a panel holds of each row */
    ACT_TILE_BLOCK_BYTES = 32 + 4 * 4 /* of one token in a tile: q, scale, less[2], sum */
};

/* How grid formats are multiplied: by eights, an entry's load for each index (simd_x86_eights.h), or in groups of 256 codes, on
 * AVX-512 by pairs, found by lookups (simd_avx512_grid.h). Either has an order of activations of its own. */
#if defined(__AVX512F__)
#define DS_GRID_PAIRS 1
#else
#define DS_GRID_PAIRS 0
#endif
#if defined(__AVX2__)
#define DS_GRID_EIGHTS 1
#else
#define DS_GRID_EIGHTS 0
#endif
#define DS_GRID_GROUPS (DS_GRID_PAIRS || !DS_GRID_EIGHTS)

/* Where the dot instruction takes codes without a sign only. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define DS_LESS_128 1
#else
#define DS_LESS_128 0
#endif

/* Without a 32-bit dot instruction some other formats have orders of their own too (simd_x86_crossed.h,
 * simd_x86_woven.h). */
#if defined(__AVX2__) && !DS_LESS_128
#define DS_ROW_CROSSED 1
#else
#define DS_ROW_CROSSED 0
#endif

/* Of one token and 256 values: what the primitives load whole vectors of. */
typedef struct act_meta {
    DS_ALIGNED float scale[8]; /* of each 32 values */
    float sum_32[8]; /* scale times the sum of each 32 */
    float split[8]; /* scale, of every second block over 16: for codes left in the high halves of bytes */
    float split_sum_32[8]; /* sum_32 again, so that it stands behind split too */
    float scale_16[16]; /* each scale twice, for each 16 values */
    float sum_16[16]; /* scale times the sum of each 16 */
    float split_16[16]; /* scale_16 over 1, 4, 16 and 64 in turn: for pairs of bits left where they are */
#if DS_GRID_PAIRS
    int8_t pairs[4][64]; /* the values again, by pairs (simd_avx512_grid.h) */
#endif
#if DS_GRID_EIGHTS
    int8_t eights[4][64]; /* the values again, by eights (simd_x86_eights.h) */
#endif
#if DS_ROW_CROSSED
    int8_t crossed[4][2][32]; /* the values again: of blocks 2 j and 2 j + 1 the first halves, then the second ones */
    int8_t crossed_abs[4][2][32]; /* without their signs */
    float spread[4][8]; /* scale of block 2 j four times, then that of block 2 j + 1 */
    int8_t woven[4][2][32]; /* the values again: of these blocks the even dwords in turns, then the odd ones */
    float woven_scale[4][8]; /* their scales in turns */
    float woven_pairs[4][8]; /* woven_scale, of every second block over 4: for pairs of bits left where they are */
    int16_t woven_sum[16]; /* sums of each 16 */
#endif
#if DS_LESS_128
    int32_t less_128[64]; /* -128 times the sum of each 4: takes 128 off signed codes made unsigned */
#endif
} act_meta;

/* The planes of a pack, each token's row padded with zeros to whole groups. */
typedef struct act_rows {
    int8_t *q; /* (n_tok, n_groups * 256) */
    act_meta *meta; /* (n_tok, n_groups) */
    size_t n_groups;
} act_rows;

DS_INLINE act_rows act_rows_at(const void *act, int n_tok, int k) {
    act_rows a;
    a.n_groups = ((size_t)k + ACT_GROUP - 1) / ACT_GROUP;
    a.q = (int8_t *)act;
    a.meta = (act_meta *)(void *)(a.q + (size_t)n_tok * a.n_groups * ACT_GROUP);
    return a;
}

DS_INLINE size_t act_rows_bytes(int n_tok, int k) {
    return (size_t)n_tok * (((size_t)k + ACT_GROUP - 1) / ACT_GROUP) * (ACT_GROUP + sizeof(act_meta));
}
