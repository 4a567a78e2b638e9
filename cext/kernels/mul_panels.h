/* mul_panels.h: products with coded weights for many tokens (prefill). 32 weight rows by 256 values are unpacked into L1 once,
 * and every tile of tokens runs over them: int32 sums per 32 (or 16) values in registers, scaled into float sums. */
#pragma once

enum {
    PANEL_TOKENS = 256, /* float sums of a panel on the stack: 32 KB */
    TILE_SUMS = DS_TILE_TOKENS * DS_PANEL_ROWS,
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

/* Reads the rows of the next panel ahead into L2, in the order of memory, some lines at each step of the panel at hand: the
 * hardware cannot guess them, because a panel walks 32 rows side by side, and a burst of them would block other loads. */
typedef struct read_ahead {
    const char *at, *end;
    size_t step_bytes;
} read_ahead;

DS_INLINE void read_ahead_step(read_ahead *r) {
    for (const char *end = r->at + r->step_bytes; r->at < end && r->at < r->end; r->at += 64)
        __builtin_prefetch(r->at, 0, 2);
}

/* Of one tile and 32 values: what stands behind the codes, each for n_tok tokens. */
typedef struct tile_meta {
    const float *scale;
    const int32_t *less[2]; /* the sums of the two 16, negated */
    const float *sum; /* scale times the sum of the 32 */
} tile_meta;

DS_INLINE tile_meta tile_meta_at(const char *block, int n_tok) {
    const float *scale = (const float *)(const void *)(block + 32 * n_tok);
    const int32_t *less = (const int32_t *)(const void *)(scale + n_tok);
    return (tile_meta){
        .scale = scale, .less = {less, less + n_tok}, .sum = (const float *)(const void *)(less + 2 * n_tok)};
}

/* The start of integer sums: what an offset of 2^log2 in all codes adds up to, taken off. */
DS_INLINE vi panel_start(int log2, vi less) { return log2 ? vi_shl(less, log2) : vi_set(0); }

/* Dots of 32 values: acc grows. */
DS_INLINE void panel_dots(code_range range, int n_tok, const panel *p, int row, int b, const char *act,
                          vi acc[DS_TILE_TOKENS][2]) {
#if DS_PANEL_WIDE
    if (range == CODES_SIGNED) {
        panel_dot_wide(n_tok, p->wide[8 * b][0][row], (const int8_t *)act, acc);
        return;
    }
#endif
    panel_dot(range, 8, n_tok, p->q[8 * b][row], (const int8_t *)act, acc);
}

/* 32 values with one scale: y += w_scale x_scale dots - w_min x_sum. */
DS_INLINE void panel_block(panel_format f, int n_tok, const panel *p, int row, int b, const char *act,
                           vf y[DS_TILE_TOKENS][2]) {
    const tile_meta m = tile_meta_at(act, n_tok);
    const int n = tile_vecs(n_tok);
    vi acc[DS_TILE_TOKENS][2];
    DS_UNROLL
    for (int t = 0; t < n; t++) acc[t][0] = acc[t][1] = panel_start(f.offset_log2, tile_ints2(m.less[0], m.less[1], t));
    panel_dots(f.range, n_tok, p, row, b, act, acc);
    DS_UNROLL
    for (int v = 0; v < 2; v++) {
        DS_UNROLL
        for (int t = 0; t < n; t++) {
            const vf scale = vf_mul(tile_rows(p->scale[b] + row, t, v), tile_tokens(m.scale, t));
            y[t][v] = vf_fma(vi_to_float(acc[t][v]), scale, y[t][v]);
        }
        if (!f.has_min) continue;
        DS_UNROLL
        for (int t = 0; t < n; t++) y[t][v] = vf_fnma(tile_rows(p->min[b] + row, t, v), tile_tokens(m.sum, t), y[t][v]);
    }
}

/* 32 values with two scales: y += x_scale (sum over both of w_scale dots - w_min sum). */
DS_INLINE void panel_block_subs(panel_format f, int n_tok, const panel *p, int row, int b, const char *act,
                                vf y[DS_TILE_TOKENS][2]) {
    const tile_meta m = tile_meta_at(act, n_tok);
    const int n = tile_vecs(n_tok);
    vf both[DS_TILE_TOKENS][2];
    DS_UNROLL
    for (int h = 0; h < 2; h++) {
        vi acc[DS_TILE_TOKENS][2];
        DS_UNROLL
        for (int t = 0; t < n; t++) acc[t][0] = acc[t][1] = panel_start(f.offset_log2, tile_ints(m.less[h], t));
        panel_dot(f.range, 4, n_tok, p->q[8 * b + 4 * h][row], (const int8_t *)act + 16 * h * n_tok, acc);
        DS_UNROLL
        for (int v = 0; v < 2; v++) {
            DS_UNROLL
            for (int t = 0; t < n; t++) {
                const vf dots = vi_to_float(acc[t][v]), scale = tile_rows(p->scale[2 * b + h] + row, t, v);
                both[t][v] = h ? vf_fma(scale, dots, both[t][v]) : vf_mul(scale, dots);
            }
            if (!f.has_min) continue;
            DS_UNROLL
            for (int t = 0; t < n; t++)
                both[t][v] =
                    vf_fma(tile_rows(p->min[2 * b + h] + row, t, v), vi_to_float(tile_ints(m.less[h], t)), both[t][v]);
        }
    }
    DS_UNROLL
    for (int t = 0; t < n; t++)
        DS_UNROLL for (int v = 0; v < 2; v++) y[t][v] = vf_fma(both[t][v], tile_tokens(m.scale, t), y[t][v]);
}

/* One tile of n_tok tokens (a constant) against two vectors of a panel's rows: sums (tile_vecs, DS_PANEL_ROWS) grow. */
DS_INLINE void panel_tile(panel_format f, int n_tok, const panel *p, int row, const char *act, int n_blocks,
                          float *sums, read_ahead *ahead) {
    vf y[DS_TILE_TOKENS][2];
    DS_UNROLL
    for (int t = 0; t < tile_vecs(n_tok); t++)
        DS_UNROLL for (int v = 0; v < 2; v++) y[t][v] = vf_load(sums + t * DS_PANEL_ROWS + row + v * DS_LANES);
    for (int b = 0; b < n_blocks; b++, act += (size_t)n_tok * ACT_TILE_BLOCK_BYTES) {
        read_ahead_step(ahead);
        if (f.sub_scales) panel_block_subs(f, n_tok, p, row, b, act, y);
        else panel_block(f, n_tok, p, row, b, act, y);
    }
    DS_UNROLL
    for (int t = 0; t < tile_vecs(n_tok); t++)
        DS_UNROLL for (int v = 0; v < 2; v++) vf_store(sums + t * DS_PANEL_ROWS + row + v * DS_LANES, y[t][v]);
}

/* All rows of a panel against one tile of any width. */
DS_INLINE void panel_tile_any(panel_format f, int n_tok, const panel *p, const char *act, int n_blocks, float *sums,
                              read_ahead *ahead) {
    for (int row = 0; row < DS_PANEL_ROWS; row += 2 * DS_LANES) {
        switch (n_tok) {
        case 1:
            panel_tile(f, 1, p, row, act, n_blocks, sums, ahead);
            break;
        case 2:
            panel_tile(f, 2, p, row, act, n_blocks, sums, ahead);
            break;
        case 3:
            panel_tile(f, 3, p, row, act, n_blocks, sums, ahead);
            break;
        case 4:
            panel_tile(f, 4, p, row, act, n_blocks, sums, ahead);
            break;
#if DS_TILE_TOKENS > 4
        case 5:
            panel_tile(f, 5, p, row, act, n_blocks, sums, ahead);
            break;
        default:
            panel_tile(f, 6, p, row, act, n_blocks, sums, ahead);
            break;
#endif
        }
    }
}

/* Rows [row, row + 32) of the job for the tiles [tile_begin, tile_end): sums (tiles, TILE_SUMS). */
DS_INLINE void panel_mul(panel_format f, const ds_mul *job, int row, int tile_begin, int tile_end, float *sums) {
    const int n_tiles = act_n_tiles(job->n_tok);
    const char *w = (const char *)job->w + (size_t)row * job->row_bytes;
    const size_t group_bytes = f.block_bytes * (size_t)(ACT_GROUP / f.block_elements);
    panel p;
    read_ahead ahead = {.at = w + DS_PANEL_ROWS * job->row_bytes,
                        .end = (const char *)job->w + (size_t)job->row_end * job->row_bytes};
    /* Done a little before this panel is. */
    const size_t n_steps =
        (size_t)(tile_end - tile_begin) * (size_t)(job->k / ACT_BLOCK) * (DS_PANEL_ROWS / (2 * DS_LANES));
    ahead.step_bytes = DS_PANEL_ROWS * job->row_bytes / n_steps + 64;
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
        tile_weights(n_blocks * ACT_BLOCK / 4, p.q);
        for (int tile = tile_begin; tile < tile_end; tile++) {
            const int t = act_tile_begin(tile, job->n_tok, n_tiles),
                      end = act_tile_begin(tile + 1, job->n_tok, n_tiles);
            panel_tile_any(f, end - t, &p, (const char *)job->act + act_tile_at(i, t, job->n_tok, job->k), n_blocks,
                           sums + (tile - tile_begin) * TILE_SUMS, &ahead);
        }
    }
}

/* The first n_rows sums of a tile's token t. A whole panel's by vectors: copies of unknown length begin slowly. */
DS_INLINE void panel_store(const float *sums, int t, size_t n_rows, float *y) {
    float own[DS_PANEL_ROWS];
    const float *line = tile_line(sums, t, own);
    if (n_rows == DS_PANEL_ROWS) memcpy(y, line, DS_PANEL_ROWS * sizeof *line);
    else memcpy(y, line, n_rows * sizeof *line);
}

DS_INLINE void mul_panels(panel_format f, const ds_mul *job) {
    DS_ALIGNED float sums[PANEL_TOKENS * DS_PANEL_ROWS];
    const int n_tiles = act_n_tiles(job->n_tok);
    for (int row = job->row_begin; row < job->row_end; row += DS_PANEL_ROWS) {
        const size_t n_rows = (size_t)(job->row_end - row < DS_PANEL_ROWS ? job->row_end - row : DS_PANEL_ROWS);
        for (int tile = 0; tile < n_tiles; tile += PANEL_TOKENS / DS_TILE_TOKENS) {
            const int end =
                tile + PANEL_TOKENS / DS_TILE_TOKENS < n_tiles ? tile + PANEL_TOKENS / DS_TILE_TOKENS : n_tiles;
            memset(sums, 0, (size_t)(end - tile) * TILE_SUMS * sizeof *sums);
            panel_mul(f, job, row, tile, end, sums);
            for (int i = tile; i < end; i++) {
                const int t0 = act_tile_begin(i, job->n_tok, n_tiles), t1 = act_tile_begin(i + 1, job->n_tok, n_tiles);
                for (int t = t0; t < t1; t++)
                    panel_store(sums + (i - tile) * TILE_SUMS, t - t0, n_rows,
                                job->y + (size_t)t * job->ldy + (size_t)row);
            }
        }
    }
}

#define MUL_PANELS(id, ...)                                           \
    static void mul_panels_##id(const ds_mul *job) {                  \
        const panel_format f = {.unpack = unpack_##id,                \
                                .block_bytes = sizeof(ds_block_##id), \
                                .block_elements = DS_ELEMENTS_##id,   \
                                __VA_ARGS__};                         \
        mul_panels(f, job);                                           \
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
#define OFFSET_CODES(code_range, log2) .range = code_range, .offset_log2 = DS_CODE_BIAS ? 7 : log2
MUL_PANELS(IQ2_XXS, OFFSET_CODES(CODES_7, 6))
MUL_PANELS(IQ2_XS, OFFSET_CODES(CODES_7, 6), .sub_scales = true)
MUL_PANELS(IQ2_S, OFFSET_CODES(CODES_7, 6), .sub_scales = true)
MUL_PANELS(IQ3_XXS, OFFSET_CODES(CODES_7, 6))
MUL_PANELS(IQ3_S, OFFSET_CODES(CODES_5, 4))
