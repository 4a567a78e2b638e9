/* mul_panels.h: products with coded weights for many tokens (prefill). 32 weight rows by 256 values are unpacked into L1 once,
 * and every tile of tokens runs over them: int32 sums per 32 (or 16) values in registers, scaled into float sums. */
#pragma once

enum {
    PANEL_TOKENS = 256, /* float sums of a panel on the stack: 32 KB */
    PANEL_VECS = DS_PANEL_ROWS / DS_LANES,
};

/* What the tile loop needs to know of a format; constant where it is used. */
typedef struct panel_format {
    void (*unpack)(const unpacker *u);
    size_t block_bytes;
    int block_elements;
    code_range range;
    bool sub_scales; /* scale and min per 16 values, not 32 */
    bool has_min;
    int offset_log2; /* codes carry an offset of 2^this; 0: none */
} panel_format;

/* The start of integer sums: what the codes' offset adds up to, taken off. */
DS_INLINE vi panel_start(panel_format f, const int32_t *less, int n_tok, int t) {
    if (f.offset_log2 == 0) return vi_set(0);
    const vi sum = f.sub_scales ? vi_set((uint32_t)less[t]) : vi_add(vi_set((uint32_t)less[t]), vi_set((uint32_t)less[n_tok + t]));
    return vi_shl(sum, f.offset_log2);
}

/* One tile of n_tok tokens (a constant) against two vectors of a panel's rows: sums (n_tok, DS_PANEL_ROWS) grow. */
DS_INLINE void panel_tile(panel_format f, int n_tok, const panel *p, int row, const char *act, int n_blocks, float *sums) {
    const int n_parts = f.sub_scales ? 2 : 1, n_k4 = 8 / n_parts;
    vf y[DS_TILE_TOKENS][2];
    DS_UNROLL
    for (int t = 0; t < n_tok; t++)
        DS_UNROLL for (int v = 0; v < 2; v++) y[t][v] = vf_load(sums + t * DS_PANEL_ROWS + row + v * DS_LANES);
    for (int b = 0; b < n_blocks; b++, act += (size_t)n_tok * ACT_TILE_BLOCK_BYTES) {
        const float *x_scale = (const float *)(const void *)(act + 32 * n_tok);
        const int32_t *less = (const int32_t *)(const void *)(x_scale + n_tok);
        const float *x_sum = (const float *)(const void *)(less + 2 * n_tok);
        DS_UNROLL
        for (int part = 0; part < n_parts; part++) {
            const int sub = n_parts * b + part;
            vi acc[DS_TILE_TOKENS][2];
            DS_UNROLL
            for (int t = 0; t < n_tok; t++) acc[t][0] = acc[t][1] = panel_start(f, less + part * n_tok, n_tok, t);
            panel_dot(f.range, n_k4, n_tok, p->q[8 * b + n_k4 * part][row], (const int8_t *)act + 4 * n_k4 * part * n_tok, acc);
            const vf scale[2] = {vf_load(p->scale[sub] + row), vf_load(p->scale[sub] + row + DS_LANES)};
            DS_UNROLL
            for (int t = 0; t < n_tok; t++)
                DS_UNROLL for (int v = 0; v < 2; v++)
                    y[t][v] = vf_fma(vi_to_float(acc[t][v]), vf_mul(scale[v], vf_set(x_scale[t])), y[t][v]);
            if (!f.has_min) continue;
            const vf min[2] = {vf_load(p->min[sub] + row), vf_load(p->min[sub] + row + DS_LANES)};
            DS_UNROLL
            for (int t = 0; t < n_tok; t++) {
                const vf x = f.sub_scales ? vf_set(x_sum[part * n_tok + t]) : vf_add(vf_set(x_sum[t]), vf_set(x_sum[n_tok + t]));
                DS_UNROLL
                for (int v = 0; v < 2; v++) y[t][v] = vf_fnma(min[v], x, y[t][v]);
            }
        }
    }
    DS_UNROLL
    for (int t = 0; t < n_tok; t++)
        DS_UNROLL for (int v = 0; v < 2; v++) vf_store(sums + t * DS_PANEL_ROWS + row + v * DS_LANES, y[t][v]);
}

/* All rows of a panel against one tile of any width. */
DS_INLINE void panel_tile_any(panel_format f, int n_tok, const panel *p, const char *act, int n_blocks, float *sums) {
    for (int row = 0; row < DS_PANEL_ROWS; row += 2 * DS_LANES) {
        switch (n_tok) {
        case 1: panel_tile(f, 1, p, row, act, n_blocks, sums); break;
        case 2: panel_tile(f, 2, p, row, act, n_blocks, sums); break;
        case 3: panel_tile(f, 3, p, row, act, n_blocks, sums); break;
        case 4: panel_tile(f, 4, p, row, act, n_blocks, sums); break;
#if DS_TILE_TOKENS > 4
        case 5: panel_tile(f, 5, p, row, act, n_blocks, sums); break;
        default: panel_tile(f, 6, p, row, act, n_blocks, sums); break;
#endif
        }
    }
}

/* Reads ahead of the panel at hand: the rows of the next one, in the order of memory, a share with each group. The hardware
 * cannot guess them, because a panel walks 32 rows side by side. */
DS_INLINE void panel_prefetch(const char *next, size_t n_bytes) {
    for (size_t line = 0; line < n_bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
}

/* Rows [row, row + 32) of the job for the tiles [tile_begin, tile_end): sums (tokens, DS_PANEL_ROWS). */
DS_INLINE void panel_mul(panel_format f, const ds_mul *job, int row, int tile_begin, int tile_end, float *sums) {
    const int n_tiles = act_n_tiles(job->n_tok), first = act_tile_begin(tile_begin, job->n_tok, n_tiles);
    const char *w = (const char *)job->w + (size_t)row * job->row_bytes;
    const size_t group_bytes = f.block_bytes * (size_t)(ACT_GROUP / f.block_elements);
    panel p;
    for (int i = 0; i < job->k; i += ACT_GROUP, w += group_bytes) {
        const int n_blocks = job->k - i < ACT_GROUP ? (job->k - i) / ACT_BLOCK : ACT_GROUP / ACT_BLOCK;
        for (int lane0 = 0; lane0 < DS_PANEL_ROWS; lane0 += DS_LANES) {
            unpacker u = {.p = &p, .lane0 = lane0, .n_blocks = n_blocks};
            for (int lane = 0; lane < DS_LANES; lane++) {
                /* Past the last row, that row again: its sums are not stored. */
                const int r = row + lane0 + lane < job->row_end ? lane0 + lane : job->row_end - 1 - row;
                u.rows[lane] = (const uint8_t *)w + (size_t)r * job->row_bytes;
            }
            f.unpack(&u);
        }
        if (row + DS_PANEL_ROWS < job->row_end)
            panel_prefetch((const char *)job->w + (size_t)(row + DS_PANEL_ROWS) * job->row_bytes + (size_t)(i / ACT_GROUP) * DS_PANEL_ROWS * group_bytes, DS_PANEL_ROWS * group_bytes);
        for (int tile = tile_begin; tile < tile_end; tile++) {
            const int t = act_tile_begin(tile, job->n_tok, n_tiles), end = act_tile_begin(tile + 1, job->n_tok, n_tiles);
            panel_tile_any(f, end - t, &p, (const char *)job->act + act_tile_at(i, t, job->n_tok, job->k), n_blocks,
                           sums + (t - first) * DS_PANEL_ROWS);
        }
    }
}

DS_INLINE void mul_panels(panel_format f, const ds_mul *job) {
    DS_ALIGNED float sums[PANEL_TOKENS * DS_PANEL_ROWS];
    const int n_tiles = act_n_tiles(job->n_tok);
    for (int row = job->row_begin; row < job->row_end; row += DS_PANEL_ROWS) {
        const size_t n_rows = (size_t)(job->row_end - row < DS_PANEL_ROWS ? job->row_end - row : DS_PANEL_ROWS);
        for (int tile = 0; tile < n_tiles; tile += PANEL_TOKENS / DS_TILE_TOKENS) {
            const int end = tile + PANEL_TOKENS / DS_TILE_TOKENS < n_tiles ? tile + PANEL_TOKENS / DS_TILE_TOKENS : n_tiles;
            const int t0 = act_tile_begin(tile, job->n_tok, n_tiles), t1 = act_tile_begin(end, job->n_tok, n_tiles);
            memset(sums, 0, (size_t)(t1 - t0) * DS_PANEL_ROWS * sizeof *sums);
            panel_mul(f, job, row, tile, end, sums);
            for (int t = t0; t < t1; t++)
                memcpy(job->y + (size_t)t * job->ldy + (size_t)row, sums + (t - t0) * DS_PANEL_ROWS, n_rows * sizeof *sums);
        }
    }
}

#define MUL_PANELS(id, ...)                                                                                                  \
    static void mul_panels_##id(const ds_mul *job) {                                                                         \
        const panel_format f = {                                                                                             \
            .unpack = unpack_##id, .block_bytes = sizeof(ds_block_##id), .block_elements = DS_ELEMENTS_##id, __VA_ARGS__};    \
        mul_panels(f, job);                                                                                                  \
    }
#define SIGNED_CODES .range = CODES_SIGNED, .offset_log2 = DS_CODE_BIAS ? 7 : 0
MUL_PANELS(Q4_0, .range = CODES_4, .offset_log2 = 3)
MUL_PANELS(Q4_1, .range = CODES_4, .has_min = true)
MUL_PANELS(Q5_0, .range = CODES_5, .offset_log2 = 4)
MUL_PANELS(Q5_1, .range = CODES_5, .has_min = true)
MUL_PANELS(Q8_0, SIGNED_CODES)
MUL_PANELS(Q2_K, .range = CODES_4, .sub_scales = true, .has_min = true)
MUL_PANELS(Q3_K, .range = CODES_4, .sub_scales = true, .offset_log2 = 2)
MUL_PANELS(Q4_K, .range = CODES_4, .has_min = true)
MUL_PANELS(Q5_K, .range = CODES_5, .has_min = true)
MUL_PANELS(Q6_K, .range = CODES_6, .sub_scales = true, .offset_log2 = 5)
MUL_PANELS(IQ4_NL, SIGNED_CODES)
MUL_PANELS(IQ4_XS, SIGNED_CODES)
