/* act.h: activation packs. F32 packs are float rows. Q8 packs hold each 32 values as int8 with one float scale, and the sums
 * of the integers, for a format's offset or minimum. They come in two orders: rows for
 * few tokens, tiles (tokens side by side, for products with panels of weight rows) for many. */
#pragma once

#include "kernels/act_layout.h"
#include "kernels/tile.h"

DS_INLINE size_t act_round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* Quantise 32 values: scale = max|x| / 127, q = x / scale to the nearest, ties to even; the sums of the two halves. A block
 * under 2^-100 is zero: its inverse would overflow. */
DS_INLINE float act_quantize(const float *x, int8_t q[32], int sums[2]) {
    const float max = f32_max_abs32(x);
    const bool zero = max < 0x1p-100f;
    f32_quantize32(x, zero ? 0.0f : 127.0f / max, q, sums);
    return zero ? 0.0f : max / 127.0f;
}

static void act_pack_row(int t, int n_tok, int k, const float *x, void *act) {
    const act_rows a = act_rows_at(act, n_tok, k);
    int8_t *q = a.q + (size_t)t * a.n_groups * ACT_GROUP;
    act_meta *meta = a.meta + (size_t)t * a.n_groups;
    memset(meta + a.n_groups - 1, 0, sizeof *meta);
    memset(q + k, 0, a.n_groups * ACT_GROUP - (size_t)k);
    for (int i = 0; i < k; i += ACT_BLOCK) {
        act_meta *m = meta + i / ACT_GROUP;
        const int b = i % ACT_GROUP / ACT_BLOCK;
        int sums[2];
        const float scale = act_quantize(x + i, q + i, sums);
        m->scale[b] = scale;
        m->split[b] = b % 2 ? scale / 16.0f : scale;
        m->sum_32[b] = m->split_sum_32[b] = scale * (float)(sums[0] + sums[1]);
        for (int h = 0; h < 2; h++) {
            m->scale_16[2 * b + h] = scale;
            m->split_16[2 * b + h] = scale / (float)(1 << b % 4 * 2);
            m->sum_16[2 * b + h] = scale * (float)sums[h];
        }
#if DS_GRID_PAIRS
        i8_pairs32(q + i, b, m->pairs);
#endif
#if DS_GRID_EIGHTS
        i8_eights32(q + i, b, m->eights);
#endif
#if DS_ROW_CROSSED
        i8_crossed32(q + i, scale, b, m);
        i8_woven32(q + i, scale, sums, b, m);
#endif
#if DS_LESS_128
        for (int j = 0; j < 8; j++)
            m->less_128[8 * b + j] = -128 * (q[i + 4 * j] + q[i + 4 * j + 1] + q[i + 4 * j + 2] + q[i + 4 * j + 3]);
#endif
    }
}

/* ---- Tile order: [group of 256 values][tile of tokens][block of 32 values], each 32 n bytes of q (tile_dword) then rows of n
 * floats or ints: scale, less[2] (the sums of 16, negated), sum (scale times the sum of 32). ---- */

DS_INLINE int act_n_tiles(int n_tok) { return (n_tok + DS_TILE_TOKENS - 1) / DS_TILE_TOKENS; }

/* First token of a tile; tiles are as even as can be, because a narrow one costs nearly as much as a wide one. */
DS_INLINE int act_tile_begin(int tile, int n_tok, int n_tiles) { return (int)((int64_t)tile * n_tok / n_tiles); }

/* The tile that starts with token `first`, in the group of values that starts with value i. */
DS_INLINE size_t act_tile_at(int i, int first, int n_tok, int k) {
    const int n_blocks = k - i < ACT_GROUP ? (k - i) / ACT_BLOCK : ACT_GROUP / ACT_BLOCK;
    return ((size_t)i / ACT_BLOCK * (size_t)n_tok + (size_t)n_blocks * (size_t)first) * ACT_TILE_BLOCK_BYTES;
}

DS_INLINE size_t act_tiles_bytes(int n_tok, int k) {
    return (size_t)n_tok * (size_t)(k / ACT_BLOCK) * ACT_TILE_BLOCK_BYTES;
}

static void act_pack_tiled(int t, int n_tok, int k, const float *x, void *act) {
    const int n_tiles = act_n_tiles(n_tok);
    int tile = (int)((int64_t)t * n_tiles / n_tok);
    while (tile + 1 < n_tiles && act_tile_begin(tile + 1, n_tok, n_tiles) <= t) tile++;
    const int first = act_tile_begin(tile, n_tok, n_tiles), column = t - first;
    const size_t n = (size_t)(act_tile_begin(tile + 1, n_tok, n_tiles) - first);
    for (int i = 0; i < k; i += ACT_GROUP) {
        char *block = (char *)act + act_tile_at(i, first, n_tok, k);
        for (int b = i; b < i + ACT_GROUP && b < k; b += ACT_BLOCK, block += n * ACT_TILE_BLOCK_BYTES) {
            int8_t q[32];
            int sums[2];
            const float scale = act_quantize(x + b, q, sums);
            for (size_t d = 0; d < 8; d++) memcpy(block + tile_dword(d, n, (size_t)column), q + 4 * d, 4);
            float *scales = (float *)(void *)(block + 32 * n) + column;
            int32_t *less = (int32_t *)(void *)(scales + n);
            float *sum = (float *)(void *)(less + 2 * n);
            scales[0] = scale;
            less[0] = -sums[0];
            less[n] = -sums[1];
            sum[0] = scale * (float)(sums[0] + sums[1]);
        }
    }
}

/* Callers pack parts of the tokens into one buffer sized for all of them: no part may need more than its share. */
size_t DS_OF(act_bytes)(ds_act_kind kind, int n_tok, int k) {
    if (kind == DS_ACT_F32) return act_round_up((size_t)n_tok * (size_t)k * sizeof(float), DS_ACT_ALIGN);
    const size_t rows = act_rows_bytes(n_tok, k), tiles = act_tiles_bytes(n_tok, k);
    return act_round_up(rows > tiles ? rows : tiles, DS_ACT_ALIGN);
}

void DS_OF(act_pack)(ds_act_kind kind, int tok_begin, int tok_end, int n_tok, int k, const float *x, size_t ldx,
                     const int32_t *rows, void *act) {
    for (int t = tok_begin; t < tok_end; t++) {
        const float *row = x + (size_t)(rows ? rows[t] : t) * ldx;
        if (kind == DS_ACT_F32) memcpy((float *)act + (size_t)t * (size_t)k, row, (size_t)k * sizeof *row);
        else if (n_tok <= DS_ROW_TOKENS) act_pack_row(t, n_tok, k, row, act);
        else act_pack_tiled(t, n_tok, k, row, act);
    }
}
