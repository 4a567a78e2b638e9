/* tile.h: how the sums of a tile of tokens lie in vectors, for products with panels: a vector of sums holds DS_LANES
 * rows of one token, unless the ISA's own order (DS_TILE_PAIRS) is defined beside its primitives. */
#pragma once

#if !DS_TILE_PAIRS

/* Vectors of sums for each vector of rows. */
DS_INLINE int tile_vecs(int n_tok) { return n_tok; }
/* What belongs to the rows and to the tokens of vector t of row vector v. */
DS_INLINE vf tile_rows(const float *rows, int t, int v) { return vf_load(rows + v * DS_LANES); }
DS_INLINE vf tile_tokens(const float *tokens, int t) { return vf_set(tokens[t]); }
DS_INLINE vi tile_ints(const int32_t *tokens, int t) { return vi_set((uint32_t)tokens[t]); }
DS_INLINE vi tile_ints2(const int32_t *a, const int32_t *b, int t) { return vi_set((uint32_t)(a[t] + b[t])); }
/* Where dword d of a token's 32 values lies among those of the n tokens of its tile. */
DS_INLINE size_t tile_dword(size_t d, size_t n, size_t token) { return 4 * (d * n + token); }
/* The codes of a panel, of n_k4 dwords, as panel_dot wants them. */
DS_INLINE void tile_weights(int n_k4, uint8_t (*q)[DS_PANEL_ROWS][4]) {}
/* The sums of token t over all rows, in place or in `line`. */
DS_INLINE const float *tile_line(const float *sums, int t, float line[DS_PANEL_ROWS]) {
    return sums + t * DS_PANEL_ROWS;
}

#endif
