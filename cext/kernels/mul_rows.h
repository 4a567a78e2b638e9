/* mul_rows.h: products with coded weights for few tokens (decode). One weight row at a time in the order of memory, 256 values
 * of it decoded into registers and used for each token: the pace is the memory's.
 *
 * A format plugs in as functions that decode the scales of 256 values and then 64 of them at a time, or as those of
 * mul_crossed.h or mul_woven.h; a grid format as one that decodes all, or as those of mul_eights.h. */
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

/* The eight scales, plus 32. */
DS_INLINE uint64_t scales_iq4_xs(const ds_block_IQ4_XS *b) {
    uint32_t low;
    memcpy(&low, b->scales_l, sizeof low);
    return spread_nibbles(low) | spread_pairs(b->scales_h) << 4;
}

#if DS_GRID_EIGHTS
#include "kernels/mul_eights.h"
#endif
#if DS_GRID_GROUPS
#include "kernels/mul_groups.h"
#endif
#if DS_ROW_CROSSED
#include "kernels/mul_crossed.h"
#include "kernels/mul_woven.h"
#endif

typedef v64 (*row_codes_fn)(const void *block, int j);
typedef row_scales (*row_scales_fn)(const void *block);

/* What the loop needs to know of a format, w = scale * q - min_factor * min with scale and min per 32 or per 16 values;
 * constant where it is used, so that each is compiled for it alone. */
typedef struct row_format {
#if DS_GRID_EIGHTS
    row_ahead_fn ahead; /* grid formats whose entries are loaded, */
    row_eights_fn eights;
#endif
#if DS_GRID_GROUPS
    row_group_fn group; /* other grid formats */
#endif
#if DS_ROW_CROSSED
    crossed_codes_fn crossed; /* formats whose values lie crossed */
    crossed_scales_fn crossed_scales;
    woven_codes_fn woven; /* formats whose values lie woven */
    woven_scales_fn woven_scales;
#endif
    row_codes_fn codes; /* formats without a grid: 64 values, the j-th of four */
    row_scales_fn scales;
    size_t group_bytes;
    int block_elements;
    bool is_signed; /* q is signed, -128..127, plus DS_CODE_BIAS */
    bool split; /* q of every second 32 values is 16 times as large; per_16: 1, 4, 16 and 64 times in turn */
    bool per_16; /* scales are per 16 values, not per 32 */
    float min_factor; /* 0 where there is no minimum */
} row_format;

/* Add the products of 64 values, the j-th of a group's four. */
DS_INLINE void row_add64(row_format f, v64 q, int j, int n_tok, const act_rows *a, size_t group,
                         const row_scales scales[], row_sum sums[]) {
    DS_UNROLL
    for (int t = 0; t < n_tok; t++) {
        const size_t at = (size_t)t * a->n_groups + group;
        row_sum_add(&sums[t], f.is_signed, f.per_16, q, a->q + at * ACT_GROUP + 64 * j, a->meta + at, &scales[t], j);
    }
}

DS_INLINE void row_starts(row_format f, const row_scales *w, int n_tok, const act_rows *a, size_t group,
                          row_scales scales[], row_sum sums[]) {
    DS_UNROLL
    for (int t = 0; t < n_tok; t++)
        row_start(&sums[t], w, f.per_16, f.split, a->meta + (size_t)t * a->n_groups + group, &scales[t]);
}

/* ---- Formats of 32 values: a group is eight blocks ---- */

#define ROW_CODES(id) DS_INLINE v64 row_codes_##id(const void *block, int j)
#define ROW_SCALES(id) DS_INLINE row_scales row_scales_##id(const void *block)
/* A half of each of eight blocks. */
#define ROW_HALVES(id, member) \
    f8_halves((const uint8_t *)block + offsetof(ds_block_##id, member), sizeof(ds_block_##id))
/* Pointers to a member of two neighbouring blocks. */
#define ROW_TWO(id, member) \
    ((const ds_block_##id *)block)[2 * j].member, ((const ds_block_##id *)block)[2 * j + 1].member

ROW_CODES(Q4_0) { return v64_nibbles2(ROW_TWO(Q4_0, qs)); }
ROW_SCALES(Q4_0) {
    const f8 d = ROW_HALVES(Q4_0, d);
    return row_scales_32(d, d);
}

ROW_CODES(Q4_1) { return v64_nibbles2(ROW_TWO(Q4_1, qs)); }
ROW_SCALES(Q4_1) { return row_scales_32(ROW_HALVES(Q4_1, d), ROW_HALVES(Q4_1, m)); }

ROW_CODES(Q5_0) { return v64_fifth_bits2(v64_nibbles2(ROW_TWO(Q5_0, qs)), ROW_TWO(Q5_0, qh)); }
ROW_SCALES(Q5_0) {
    const f8 d = ROW_HALVES(Q5_0, d);
    return row_scales_32(d, d);
}

ROW_CODES(Q5_1) { return v64_fifth_bits2(v64_nibbles2(ROW_TWO(Q5_1, qs)), ROW_TWO(Q5_1, qh)); }
ROW_SCALES(Q5_1) { return row_scales_32(ROW_HALVES(Q5_1, d), ROW_HALVES(Q5_1, m)); }

ROW_CODES(Q8_0) { return v64_bias(v64_load2(ROW_TWO(Q8_0, qs))); }
ROW_SCALES(Q8_0) {
    const f8 d = ROW_HALVES(Q8_0, d);
    return row_scales_32(d, d);
}

ROW_CODES(IQ4_NL) { return v64_lookup(iq4_codes, v64_nibbles2(ROW_TWO(IQ4_NL, qs))); }
ROW_SCALES(IQ4_NL) {
    const f8 d = ROW_HALVES(IQ4_NL, d);
    return row_scales_32(d, d);
}

/* ---- Formats of 256 values ---- */

ROW_CODES(Q4_K) { return v64_split(((const ds_block_Q4_K *)block)->qs + 32 * j); }
ROW_SCALES(Q4_K) { return row_scales_k4(v16_scales_k4(block), &((const ds_block_Q4_K *)block)->d); }

ROW_CODES(Q5_K) {
    const ds_block_Q5_K *b = block;
    const v64 low = v64_and(v64_shift(v64_twice(b->qs + 32 * j), 0, 4), 15);
    return v64_or(low, v64_and(v64_shift(v64_twice(b->qh), 2 * j - 4, 2 * j - 3), 16));
}
ROW_SCALES(Q5_K) { return row_scales_k4(v16_scales_k4(block), &((const ds_block_Q5_K *)block)->d); }

ROW_CODES(Q6_K) {
    const ds_block_Q6_K *b = block;
    const v64 low = v64_load(b->ql + 64 * (j / 2)), high = v64_twice(b->qh + 32 * (j / 2));
    if (j % 2) return v64_or(v64_and(v64_shift(low, 4, 4), 15), v64_and(v64_shift(high, 0, 2), 48));
    return v64_or(v64_and(low, 15), v64_and(v64_shift(high, -4, -2), 48));
}
ROW_SCALES(Q6_K) {
    const ds_block_Q6_K *b = block;
    const float d = f32_of_f16(b->d);
    const v16 sc = v16_load(b->scales);
    return row_scales_16(sc, d, sc, d);
}

ROW_CODES(Q2_K) {
    const uint8_t *quarters = ((const ds_block_Q2_K *)block)->qs + 32 * (j / 2);
    return v64_split_pairs(quarters, j % 2);
}
ROW_SCALES(Q2_K) {
    const ds_block_Q2_K *b = block;
    return row_scales_nibbles(b->scales, &b->d);
}

ROW_CODES(Q3_K) {
    const ds_block_Q3_K *b = block;
    const v64 two = v64_and(v64_shift(v64_twice(b->qs + 32 * (j / 2)), j % 2 * 4, j % 2 * 4 + 2), 3);
    return v64_or(two, v64_and(v64_shift(v64_twice(b->hmask), 2 * j - 2, 2 * j - 1), 4));
}
ROW_SCALES(Q3_K) {
    const ds_block_Q3_K *b = block;
    const float d = f32_of_f16(b->d);
    const v16 sc = v16_scales_q3_k(b->scales);
    return row_scales_16(sc, d, sc, d);
}

ROW_CODES(IQ4_XS) {
    const ds_block_IQ4_XS *b = block;
    return v64_lookup(iq4_codes, v64_nibbles2(b->qs + 32 * j, b->qs + 32 * j + 16));
}
ROW_SCALES(IQ4_XS) {
    const ds_block_IQ4_XS *b = block;
    const f8 scale = f8_mul(f8_sub(f8_bytes(scales_iq4_xs(b)), f8_set(32.0f)), f8_set(f32_of_f16(b->d)));
    return row_scales_32(scale, scale);
}

/* ---- The product ---- */

#if DS_GRID_GROUPS
/* The group at w of a grid format. */
DS_INLINE void row_take_group(row_format f, const char *w, int n_tok, const act_rows *a, size_t group, row_sum sums[]) {
    row_group g;
    f.group(w, &g);
#if DS_GRID_PAIRS
    DS_UNROLL
    for (int t = 0; t < n_tok; t++)
        row_sum_add_grid(&sums[t], &g.codes, &g.scales, a->meta + (size_t)t * a->n_groups + group);
#else
    row_scales scales[DS_ROW_TOKENS];
    row_starts(f, &g.scales, n_tok, a, group, scales, sums);
    DS_UNROLL
    for (int j = 0; j < 4; j++) {
        const grid_part part = grid_codes_part(&g.codes, j);
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            const size_t at = (size_t)t * a->n_groups + group;
            row_sum_add_part(&sums[t], f.per_16, part, a->q + at * ACT_GROUP + 64 * j, a->meta + at, &scales[t], j);
        }
    }
#endif
}
#endif

#if DS_ROW_CROSSED
/* Add the products of the first n values of the group at w. */
DS_INLINE void row_take_crossed(row_format f, const char *w, int n, int n_tok, const act_rows *a, size_t group,
                                row_sum sums[]) {
    const row_crossed own = f.crossed_scales(w);
    const bool small = f.block_elements < ACT_GROUP;
    DS_UNROLL
    for (int j = 0; j < n / 64; j++) {
        const v32 q[2] = {f.crossed(w, j, 0), f.crossed(w, j, 1)};
        const v32 scale = small ? own.scale : crossed_scale(own.scale, j);
        const f8 d = small ? crossed_spread(own.d, j) : own.d;
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            const act_meta *x = a->meta + (size_t)t * a->n_groups + group;
            f8 *y = &sums[t].y[j / 2][j % 2];
            *y = f8_fma(crossed_dots(q, x, j, scale), f8_mul(d, f8_load(x->spread[j])), *y);
        }
    }
}

/* Add the products of the group at w. */
DS_INLINE void row_take_woven(row_format f, const char *w, int n_tok, const act_rows *a, size_t group, row_sum sums[]) {
    const row_woven own = f.woven_scales(w);
    f8 y[DS_ROW_TOKENS];
    DS_UNROLL
    for (int j = 0; j < 4; j++) {
        const v32 q[2] = {f.woven(w, j, 0), f.woven(w, j, 1)};
        const v32 scale = woven_scale(own.scale, j);
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            const act_meta *x = a->meta + (size_t)t * a->n_groups + group;
            const f8 dots = woven_dots(q, x, j, scale), unit = f8_load(f.split ? x->woven_pairs[j] : x->woven_scale[j]);
            y[t] = j ? f8_fma(dots, unit, y[t]) : f8_mul(dots, unit);
        }
    }
    DS_UNROLL
    for (int t = 0; t < n_tok; t++) {
        const f8 min = woven_min(own.min, a->meta + (size_t)t * a->n_groups + group);
        sums[t].y[0][0] = f8_fma(y[t], own.d, sums[t].y[0][0]);
        sums[t].min = f8_fma(min, own.dmin, sums[t].min);
    }
}
#endif

/* Decode the group at w and add the products of its first n values, 64 at a time; grid formats always add all. Codes are
 * decoded just before they are used where registers would not hold all of them. */
DS_INLINE void row_take(row_format f, const char *w, int n, int n_tok, const act_rows *a, size_t group,
                        row_sum sums[]) {
#if DS_GRID_GROUPS
    if (f.group) {
        row_take_group(f, w, n_tok, a, group, sums);
        return;
    }
#endif
#if DS_ROW_CROSSED
    if (f.crossed) {
        row_take_crossed(f, w, n, n_tok, a, group, sums);
        return;
    }
    if (f.woven) {
        row_take_woven(f, w, n_tok, a, group, sums);
        return;
    }
#endif
    row_scales scales[DS_ROW_TOKENS];
    const row_scales own = f.scales(w);
    v64 q[4];
    DS_UNROLL
    for (int j = 0; j < 4 && DS_ROW_AHEAD; j++) q[j] = f.codes(w, j);
    row_starts(f, &own, n_tok, a, group, scales, sums);
    DS_UNROLL
    for (int j = 0; j < n / 64; j++)
        row_add64(f, DS_ROW_AHEAD ? q[j] : f.codes(w, j), j, n_tok, a, group, scales, sums);
}

DS_INLINE void row_prefetch(row_format f, const char *w) {
    DS_UNROLL
    for (size_t line = 0; line < f.group_bytes; line += 64) __builtin_prefetch(w + DS_PREFETCH_BYTES + line);
}

#if DS_GRID_EIGHTS
/* n groups at w of a grid format whose entries are loaded. */
DS_INLINE void row_take_eights(row_format f, const char *w, size_t n, int n_tok, const act_rows *a, row_sum sums[]) {
    for (size_t group = 0; group < n;) {
        row_ahead ahead[DS_EIGHTS_AHEAD];
        const size_t end = n - group < DS_EIGHTS_AHEAD ? n : group + DS_EIGHTS_AHEAD;
        for (size_t i = group; i < end; i++, w += f.group_bytes) {
            row_prefetch(f, w);
            f.ahead(w, &ahead[i - group]);
        }
        for (const row_ahead *at = x86_memory(ahead); group < end; at++, group++)
            row_sums_add_eights(sums, f.per_16, f.eights, at, n_tok, a->meta + group, a->n_groups);
    }
}
#endif

/* The whole groups of a row at w. */
DS_INLINE void row_take_whole(row_format f, const char *w, size_t n, int n_tok, const act_rows *a, row_sum sums[]) {
#if DS_GRID_EIGHTS
    if (f.ahead) {
        row_take_eights(f, w, n, n_tok, a, sums);
        return;
    }
#endif
    for (size_t group = 0; group < n; group++, w += f.group_bytes) {
        row_prefetch(f, w);
        row_take(f, w, ACT_GROUP, n_tok, a, group, sums);
    }
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
        row_take_whole(f, w, (size_t)whole / ACT_GROUP, n_tok, &a, sums);
        w += (size_t)whole / ACT_GROUP * f.group_bytes;
        if (left == ACT_GROUP / 2) { /* an expert's width is often an odd multiple of 128 */
            /* Behind it lies the next row, whose codes are not taken and whose scales meet zeros; behind the last, nothing. */
            if (r + 1 == job->row_end) w = memcpy(tail, w, f.group_bytes / 2);
            row_take(f, w, ACT_GROUP / 2, n_tok, &a, (size_t)whole / ACT_GROUP, sums);
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
        const row_format f = {.group_bytes = sizeof(ds_block_##id) * (ACT_GROUP / DS_ELEMENTS_##id), \
                              .block_elements = DS_ELEMENTS_##id,                                    \
                              __VA_ARGS__};                                                          \
        if (job->n_tok == 1) mul_rows(f, 1, job);                                                    \
        else if (job->n_tok == 2) mul_rows(f, 2, job);                                               \
        else if (job->n_tok == 3) mul_rows(f, 3, job);                                               \
        else mul_rows(f, 4, job);                                                                    \
    }
#define ROW_PARTS(id) .codes = row_codes_##id, .scales = row_scales_##id
#if DS_ROW_CROSSED
#define ROW_PARTS_CROSSED(id) .crossed = crossed_codes_##id, .crossed_scales = crossed_scales_##id
#define ROW_PARTS_WOVEN(id) .woven = woven_codes_##id, .woven_scales = woven_scales_##id
#else
#define ROW_PARTS_CROSSED ROW_PARTS
#define ROW_PARTS_WOVEN ROW_PARTS
#endif
MUL_ROWS(Q4_0, ROW_PARTS(Q4_0), .min_factor = 8)
MUL_ROWS(Q4_1, ROW_PARTS(Q4_1), .min_factor = -1)
MUL_ROWS(Q5_0, ROW_PARTS(Q5_0), .min_factor = 16)
MUL_ROWS(Q5_1, ROW_PARTS(Q5_1), .min_factor = -1)
MUL_ROWS(Q8_0, ROW_PARTS(Q8_0), .is_signed = true)
MUL_ROWS(Q2_K, ROW_PARTS_WOVEN(Q2_K), .split = DS_ROW_SPLIT || DS_ROW_CROSSED, .per_16 = true, .min_factor = 1)
MUL_ROWS(Q3_K, ROW_PARTS_WOVEN(Q3_K), .split = DS_ROW_CROSSED, .per_16 = true, .min_factor = 4)
MUL_ROWS(Q4_K, ROW_PARTS(Q4_K), .split = DS_ROW_SPLIT, .min_factor = 1)
MUL_ROWS(Q5_K, ROW_PARTS(Q5_K), .min_factor = 1)
MUL_ROWS(Q6_K, ROW_PARTS_WOVEN(Q6_K), .per_16 = true, .min_factor = 32)
MUL_ROWS(IQ4_NL, ROW_PARTS_CROSSED(IQ4_NL), .is_signed = true)
MUL_ROWS(IQ4_XS, ROW_PARTS_CROSSED(IQ4_XS), .is_signed = true)

/* ---- Grid formats: and all codes of a block, biased, and its scales, in memory, for panels ---- */

typedef void (*row_store_fn)(const void *block, uint8_t codes[256], float scale[16]);

#define BY_GROUPS(id, ...)                                                                  \
    DS_INLINE void row_store_##id(const void *block, uint8_t codes[256], float scale[16]) { \
        row_group g;                                                                        \
        row_group_##id(block, &g);                                                          \
        grid_store(&g.codes, &g.scales, codes, scale);                                      \
    }                                                                                       \
    MUL_ROWS(id, .group = row_group_##id, .is_signed = true, __VA_ARGS__)
#define BY_EIGHTS(id, ...)                                                                  \
    DS_INLINE void row_store_##id(const void *block, uint8_t codes[256], float scale[16]) { \
        row_ahead ahead;                                                                    \
        row_ahead_##id(block, &ahead);                                                      \
        eights_store(row_eights_##id, x86_memory(&ahead), codes, scale);                    \
    }                                                                                       \
    MUL_ROWS(id, .ahead = row_ahead_##id, .eights = row_eights_##id, __VA_ARGS__)
#if DS_GRID_GROUPS
#define SMALL_GRID BY_GROUPS
#else
#define SMALL_GRID BY_EIGHTS
#endif
#if DS_GRID_EIGHTS
#define LARGE_GRID BY_EIGHTS
#else
#define LARGE_GRID BY_GROUPS
#endif
SMALL_GRID(IQ2_XXS, .per_16 = false)
SMALL_GRID(IQ2_XS, .per_16 = true)
LARGE_GRID(IQ2_S, .per_16 = true)
SMALL_GRID(IQ3_XXS, .per_16 = false)
SMALL_GRID(IQ3_S, .per_16 = false)
