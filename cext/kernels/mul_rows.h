/* mul_rows.h: products with coded weights for few tokens (decode). One weight row at a time in the order of memory, 256 values
 * of it decoded into registers and used for each token: the pace is the memory's.
 *
 * A format plugs in as a function that turns 256 values into a row_group. */
#pragma once

/* Each half of four bytes in a byte of its own; each pair of bits of two bytes likewise. */
DS_INLINE uint64_t spread_nibbles(uint32_t a) {
    uint64_t x = ((uint64_t)a | (uint64_t)a << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
}

DS_INLINE uint64_t spread_pairs(uint16_t a) {
    uint64_t x = ((uint64_t)a | (uint64_t)a << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    return (x | x << 6) & 0x0303030303030303;
}

/* 256 values of a row: w = scale * q - min_factor * min, scale and min per 32 or per 16 values. */
typedef struct row_group {
    v64 q[4];
    row_scales scales;
#if DS_GRID_PAIRS
    grid_signs signs; /* grid formats: not yet in q */
#endif
} row_group;

typedef void (*row_group_fn)(const void *block, row_group *g);

/* What the loop needs to know of a format; constant where it is used, so that each is compiled for it alone. */
typedef struct row_format {
    row_group_fn group;
    size_t group_bytes;
    int block_elements;
    bool is_signed; /* q is signed, -128..127, plus DS_CODE_BIAS */
    bool split; /* q of every second 32 values is 16 times as large */
    bool per_16; /* scales are per 16 values, not per 32 */
    bool pairs; /* q is by pairs, without its signs (simd_avx512_grid.h) */
    float min_factor; /* 0 where there is no minimum */
} row_format;

/* Add the products of the first n values of a group, 64 at a time; grid formats always add all. */
DS_INLINE void row_add(row_format f, const row_group *g, int n, int n_tok, const act_rows *a, size_t group,
                       row_sum sums[]) {
#if DS_GRID_PAIRS
    if (f.pairs) {
        DS_UNROLL
        for (int t = 0; t < n_tok; t++)
            row_sum_add_grid(&sums[t], g->q, &g->signs, &g->scales, a->meta + (size_t)t * a->n_groups + group);
        return;
    }
#endif
    row_scales scales[DS_ROW_TOKENS];
    DS_UNROLL
    for (int t = 0; t < n_tok; t++)
        scales[t] = row_start(&sums[t], &g->scales, f.per_16, f.split, a->meta + (size_t)t * a->n_groups + group);
    DS_UNROLL
    for (int j = 0; j < n / 64; j++) {
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            const size_t at = (size_t)t * a->n_groups + group;
            row_sum_add(&sums[t], f.is_signed, f.per_16, g->q[j], a->q + at * ACT_GROUP + 64 * j, a->meta + at,
                        &scales[t], j);
        }
    }
}

/* ---- Formats of 32 values: a group is eight blocks ---- */

/* A half of each of eight blocks. */
#define ROW_HALVES(b, member) f8_halves((const uint8_t *)(b) + offsetof(__typeof__(*(b)), member), sizeof *(b))

DS_INLINE void row_group_Q4_0(const void *block, row_group *g) {
    const ds_block_Q4_0 *b = block;
    const f8 d = ROW_HALVES(b, d);
    DS_UNROLL
    for (int j = 0; j < 4; j++) g->q[j] = v64_nibbles2(b[2 * j].qs, b[2 * j + 1].qs);
    g->scales = row_scales_32(d, d);
}

DS_INLINE void row_group_Q4_1(const void *block, row_group *g) {
    const ds_block_Q4_1 *b = block;
    DS_UNROLL
    for (int j = 0; j < 4; j++) g->q[j] = v64_nibbles2(b[2 * j].qs, b[2 * j + 1].qs);
    g->scales = row_scales_32(ROW_HALVES(b, d), ROW_HALVES(b, m));
}

DS_INLINE void row_group_Q5_0(const void *block, row_group *g) {
    const ds_block_Q5_0 *b = block;
    const f8 d = ROW_HALVES(b, d);
    DS_UNROLL
    for (int j = 0; j < 4; j++)
        g->q[j] = v64_fifth_bits2(v64_nibbles2(b[2 * j].qs, b[2 * j + 1].qs), b[2 * j].qh, b[2 * j + 1].qh);
    g->scales = row_scales_32(d, d);
}

DS_INLINE void row_group_Q5_1(const void *block, row_group *g) {
    const ds_block_Q5_1 *b = block;
    DS_UNROLL
    for (int j = 0; j < 4; j++)
        g->q[j] = v64_fifth_bits2(v64_nibbles2(b[2 * j].qs, b[2 * j + 1].qs), b[2 * j].qh, b[2 * j + 1].qh);
    g->scales = row_scales_32(ROW_HALVES(b, d), ROW_HALVES(b, m));
}

DS_INLINE void row_group_Q8_0(const void *block, row_group *g) {
    const ds_block_Q8_0 *b = block;
    const f8 d = ROW_HALVES(b, d);
    DS_UNROLL
    for (int j = 0; j < 4; j++) g->q[j] = v64_bias(v64_load2(b[2 * j].qs, b[2 * j + 1].qs));
    g->scales = row_scales_32(d, d);
}

DS_INLINE void row_group_IQ4_NL(const void *block, row_group *g) {
    const ds_block_IQ4_NL *b = block;
    const f8 d = ROW_HALVES(b, d);
    DS_UNROLL
    for (int j = 0; j < 4; j++) g->q[j] = v64_lookup(iq4_codes, v64_nibbles2(b[2 * j].qs, b[2 * j + 1].qs));
    g->scales = row_scales_32(d, d);
}

/* ---- Formats of 256 values ---- */

DS_INLINE void row_group_Q4_K(const void *block, row_group *g) {
    const ds_block_Q4_K *b = block;
    g->scales = row_scales_k4(v16_scales_k4(b), &b->d);
    DS_UNROLL
    for (int j = 0; j < 4; j++) g->q[j] = v64_split(b->qs + 32 * j);
}

DS_INLINE void row_group_Q5_K(const void *block, row_group *g) {
    const ds_block_Q5_K *b = block;
    g->scales = row_scales_k4(v16_scales_k4(b), &b->d);
    const v64 high = v64_twice(b->qh);
    DS_UNROLL
    for (int j = 0; j < 4; j++) {
        const v64 low = v64_and(v64_shift(v64_twice(b->qs + 32 * j), 0, 4), 15);
        g->q[j] = v64_or(low, v64_and(v64_shift(high, 2 * j - 4, 2 * j - 3), 16));
    }
}

DS_INLINE void row_group_Q6_K(const void *block, row_group *g) {
    const ds_block_Q6_K *b = block;
    const float d = f32_of_f16(b->d);
    const v16 sc = v16_load(b->scales);
    g->scales = row_scales_16(sc, d, sc, d);
    DS_UNROLL
    for (int h = 0; h < 2; h++) {
        const v64 low = v64_load(b->ql + 64 * h), high = v64_twice(b->qh + 32 * h);
        g->q[2 * h] = v64_or(v64_and(low, 15), v64_and(v64_shift(high, -4, -2), 48));
        g->q[2 * h + 1] = v64_or(v64_and(v64_shift(low, 4, 4), 15), v64_and(v64_shift(high, 0, 2), 48));
    }
}

DS_INLINE void row_group_Q2_K(const void *block, row_group *g) {
    const ds_block_Q2_K *b = block;
    const v16 scales = v16_load(b->scales);
    g->scales =
        row_scales_16(v16_and(scales, v16_set(15)), f32_of_f16(b->d), v16_high_nibbles(scales), f32_of_f16(b->dmin));
    DS_UNROLL
    for (int j = 0; j < 4; j++)
        g->q[j] = v64_and(v64_shift(v64_twice(b->qs + 32 * (j / 2)), j % 2 * 4, j % 2 * 4 + 2), 3);
}

DS_INLINE void row_group_Q3_K(const void *block, row_group *g) {
    const ds_block_Q3_K *b = block;
    const float d = f32_of_f16(b->d);
    const v16 sc = v16_scales_q3_k(b->scales);
    g->scales = row_scales_16(sc, d, sc, d);
    const v64 high = v64_twice(b->hmask);
    DS_UNROLL
    for (int j = 0; j < 4; j++) {
        const v64 two = v64_and(v64_shift(v64_twice(b->qs + 32 * (j / 2)), j % 2 * 4, j % 2 * 4 + 2), 3);
        g->q[j] = v64_or(two, v64_and(v64_shift(high, 2 * j - 2, 2 * j - 1), 4));
    }
}

DS_INLINE void row_group_IQ4_XS(const void *block, row_group *g) {
    const ds_block_IQ4_XS *b = block;
    uint32_t low;
    memcpy(&low, b->scales_l, sizeof low);
    const uint64_t sc = spread_nibbles(low) | spread_pairs(b->scales_h) << 4;
    const f8 scale = f8_mul(f8_sub(f8_bytes(sc), f8_set(32.0f)), f8_set(f32_of_f16(b->d)));
    g->scales = row_scales_32(scale, scale);
    DS_UNROLL
    for (int j = 0; j < 4; j++) g->q[j] = v64_lookup(iq4_codes, v64_nibbles2(b->qs + 32 * j, b->qs + 32 * j + 16));
}

/* ---- Grid formats ---- */

DS_INLINE void row_put_signs(row_group *g, grid_signs signs) {
#if DS_GRID_PAIRS
    g->signs = signs;
#else
    v64_signed(g->q, &signs);
#endif
}

DS_INLINE void row_group_store(const row_group *g, uint8_t codes[ACT_GROUP], float scale[16]) {
#if DS_GRID_PAIRS
    grid_store(g->q, &g->signs, &g->scales, codes, scale);
#else
    grid_store(g->q, &g->scales, codes, scale);
#endif
}

DS_INLINE void row_group_IQ2_XXS(const void *block, row_group *g) {
    const ds_block_IQ2_XXS *b = block;
    const grid_tails tails = grid_tails_seconds(b->sub);
    const grid_index index = grid_index_fours(b->sub);
    g->scales = grid_tails_scales(tails, f32_of_f16(b->d) / 8.0f);
    v64_grid8(grid_IQ2_XXS, 256, &index, g->q);
    row_put_signs(g, grid_tails_signs(tails));
}

DS_INLINE void row_group_IQ2_XS(const void *block, row_group *g) {
    const ds_block_IQ2_XS *b = block;
    const grid_index index = grid_index_nines(b->qs);
    g->scales = grid_scales_16(v16_odd_nibbles(b->scales), f32_of_f16(b->d) / 8.0f);
    v64_grid8(grid_IQ2_XS, 512, &index, g->q);
    row_put_signs(g, grid_signs_top(b->qs));
}

DS_INLINE void row_group_IQ2_S(const void *block, row_group *g) {
    const ds_block_IQ2_S *b = block;
    const grid_index index = grid_index_tens(b->qs, b->qh);
    g->scales = grid_scales_16(v16_odd_nibbles(b->scales), f32_of_f16(b->d) / 8.0f);
    v64_grid8(grid_IQ2_S, 1024, &index, g->q);
    row_put_signs(g, grid_signs_load(b->signs));
}

DS_INLINE void row_group_IQ3_XXS(const void *block, row_group *g) {
    const ds_block_IQ3_XXS *b = block;
    const grid_tails tails = grid_tails_load(b->tail);
    const grid_index index[2] = {grid_index_seconds(b->qs, false), grid_index_seconds(b->qs, true)};
    g->scales = grid_tails_scales(tails, f32_of_f16(b->d) / 4.0f);
    v64_grid4(grid_IQ3_XXS, 256, grid_values_IQ3_XXS, index, g->q);
    row_put_signs(g, grid_tails_signs(tails));
}

DS_INLINE void row_group_IQ3_S(const void *block, row_group *g) {
    const ds_block_IQ3_S *b = block;
    const float d = f32_of_f16(b->d);
    const grid_index index[2] = {grid_index_seconds_nine(b->qs, b->qh, false),
                                 grid_index_seconds_nine(b->qs, b->qh, true)};
    uint32_t packed;
    memcpy(&packed, b->scales, sizeof packed);
    g->scales = grid_scales_32(f8_fma(f8_bytes(spread_nibbles(packed)), f8_set(2.0f * d), f8_set(d)));
    v64_grid4(grid_IQ3_S, 512, grid_values_IQ3_S, index, g->q);
    row_put_signs(g, grid_signs_load(b->signs));
}

/* ---- The product ---- */

/* Decode the group at w and add the products of its first n values. */
DS_INLINE void row_take(row_format f, const char *w, int n, int n_tok, const act_rows *a, size_t group,
                        row_sum sums[]) {
    row_group g;
    f.group(w, &g);
    row_add(f, &g, n, n_tok, a, group, sums);
}

DS_INLINE void mul_rows(row_format f, int n_tok, const ds_mul *job) {
    enum { MAX_GROUP_BYTES = 8 * 34 };
    const act_rows a = act_rows_at(job->act, n_tok, job->k);
    const int whole = job->k / ACT_GROUP * ACT_GROUP, left = f.block_elements < ACT_GROUP ? job->k - whole : 0;
    char tail[MAX_GROUP_BYTES] = {
        0}; /* the last blocks of a row that is no multiple of 256; missing ones are zero, scale and all */
    for (int r = job->row_begin; r < job->row_end; r++) {
        const char *w = (const char *)job->w + (size_t)r * job->row_bytes;
        row_sum sums[DS_ROW_TOKENS];
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) row_sum_clear(&sums[t]);
        for (int i = 0; i < whole; i += ACT_GROUP, w += f.group_bytes) {
            DS_UNROLL
            for (size_t line = 0; line < f.group_bytes; line += 64) __builtin_prefetch(w + DS_PREFETCH_BYTES + line);
            row_take(f, w, ACT_GROUP, n_tok, &a, (size_t)i / ACT_GROUP, sums);
        }
        if (left == ACT_GROUP / 2) { /* an expert's width is often an odd multiple of 128 */
            memcpy(tail, w, f.group_bytes / 2);
            row_take(f, tail, ACT_GROUP / 2, n_tok, &a, (size_t)whole / ACT_GROUP, sums);
        } else if (left) {
            memcpy(tail, w, (size_t)left * f.group_bytes / ACT_GROUP);
            row_take(f, tail, ACT_GROUP, n_tok, &a, (size_t)whole / ACT_GROUP, sums);
        }
        DS_UNROLL
        for (int t = 0; t < n_tok; t++)
            job->y[(size_t)t * job->ldy + (size_t)r] = row_sum_total(&sums[t], f.per_16, f.min_factor);
    }
}

#define MUL_ROWS(id, ...)                                                                            \
    static void mul_rows_##id(const ds_mul *job) {                                                   \
        const row_format f = {.group = row_group_##id,                                               \
                              .group_bytes = sizeof(ds_block_##id) * (ACT_GROUP / DS_ELEMENTS_##id), \
                              .block_elements = DS_ELEMENTS_##id,                                    \
                              __VA_ARGS__};                                                          \
        if (job->n_tok == 1) mul_rows(f, 1, job);                                                    \
        else if (job->n_tok == 2) mul_rows(f, 2, job);                                               \
        else if (job->n_tok == 3) mul_rows(f, 3, job);                                               \
        else mul_rows(f, 4, job);                                                                    \
    }
MUL_ROWS(Q4_0, .min_factor = 8)
MUL_ROWS(Q4_1, .min_factor = -1)
MUL_ROWS(Q5_0, .min_factor = 16)
MUL_ROWS(Q5_1, .min_factor = -1)
MUL_ROWS(Q8_0, .is_signed = true)
MUL_ROWS(Q2_K, .per_16 = true, .min_factor = 1)
MUL_ROWS(Q3_K, .per_16 = true, .min_factor = 4)
MUL_ROWS(Q4_K, .split = DS_ROW_SPLIT, .min_factor = 1)
MUL_ROWS(Q5_K, .min_factor = 1)
MUL_ROWS(Q6_K, .per_16 = true, .min_factor = 32)
MUL_ROWS(IQ4_NL, .is_signed = true)
MUL_ROWS(IQ4_XS, .is_signed = true)
#define SIGNED_GRID .is_signed = true, .pairs = DS_GRID_PAIRS
MUL_ROWS(IQ2_XXS, SIGNED_GRID)
MUL_ROWS(IQ2_XS, SIGNED_GRID, .per_16 = true)
MUL_ROWS(IQ2_S, SIGNED_GRID, .per_16 = true)
MUL_ROWS(IQ3_XXS, SIGNED_GRID)
MUL_ROWS(IQ3_S, SIGNED_GRID)
