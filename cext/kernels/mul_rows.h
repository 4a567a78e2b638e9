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

/* 256 values of a row: w = scale * q - min (block scales, one per 32) or w = scale * sc * q - step * m (per 16). */
typedef struct row_group {
    v32 q[8];
    f8 scale; /* of each 32 values */
    f8 min;   /* block scales: of each 32 values; sub-scales: the step, in every lane */
    v16 sc;   /* sub-scales of each 16 values */
    v16 m;    /* sub-minimums of each 16 values, signed */
} row_group;

/* What a format's groups look like; constants, so that each format's loop is compiled for it alone. */
typedef enum row_traits {
    ROW_PLAIN = 0,      /* q is unsigned */
    ROW_SIGNED = 1,     /* q is signed, -128..127 */
    ROW_MIN = 2,        /* min is not zero */
    ROW_SUB_SCALES = 4, /* sc and m count */
} row_traits;

/* The sums of n_tok tokens with one row; two each, because an FMA waits for the one before it. */
typedef struct row_sums {
    f8 y[DS_ROW_TOKENS][2];
    f8 min[DS_ROW_TOKENS];
} row_sums;

DS_INLINE void row_add(row_traits traits, const row_group *g, int n_tok, const act_rows *a, size_t i, row_sums *sums) {
    DS_ALIGNED float scale[DS_ROW_TOKENS][8];
    DS_UNROLL
    for (int t = 0; t < n_tok; t++) {
        const f8 x_scale = f8_load(a->scale + (size_t)t * a->scale_stride + i / ACT_BLOCK);
        f8_store(scale[t], f8_mul(g->scale, x_scale));
        if (traits & ROW_MIN) {
            const int16_t *x_sums = a->sums + (size_t)t * a->sums_stride + i / 16;
            const f8 part = traits & ROW_SUB_SCALES ? f8_weighted_sums(x_sums, g->m) : f8_pair_sums(x_sums);
            sums->min[t] = f8_fma(f8_mul(g->min, x_scale), part, sums->min[t]);
        }
    }
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            const v32 x = v32_load(a->q + (size_t)t * a->q_stride + i + 32 * (size_t)j);
            const f8 dots = traits & ROW_SUB_SCALES ? v32_dot_scaled(g->q[j], x, g->sc, j)
                            : traits & ROW_SIGNED   ? v32_dot_signed(g->q[j], x)
                                                    : v32_dot(g->q[j], x);
            sums->y[t][j % 2] = f8_fma(dots, f8_set(scale[t][j]), sums->y[t][j % 2]);
        }
    }
}

/* ---- Formats of 32 values: a group is eight blocks ---- */

/* A half of each of eight blocks. */
#define ROW_HALVES(b, member) f8_halves((const uint8_t *)(b) + offsetof(__typeof__(*(b)), member), sizeof *(b))

DS_INLINE void row_group_Q4_0(const void *block, row_group *g) {
    const ds_block_Q4_0 *b = block;
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_nibbles(b[j].qs);
    g->scale = ROW_HALVES(b, d);
    g->min = f8_mul(g->scale, f8_set(8.0f));
}

DS_INLINE void row_group_Q4_1(const void *block, row_group *g) {
    const ds_block_Q4_1 *b = block;
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_nibbles(b[j].qs);
    g->scale = ROW_HALVES(b, d);
    g->min = f8_sub(f8_set(0.0f), ROW_HALVES(b, m));
}

DS_INLINE void row_group_Q5_0(const void *block, row_group *g) {
    const ds_block_Q5_0 *b = block;
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_fifth_bits(v32_nibbles(b[j].qs), b[j].qh);
    g->scale = ROW_HALVES(b, d);
    g->min = f8_mul(g->scale, f8_set(16.0f));
}

DS_INLINE void row_group_Q5_1(const void *block, row_group *g) {
    const ds_block_Q5_1 *b = block;
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_fifth_bits(v32_nibbles(b[j].qs), b[j].qh);
    g->scale = ROW_HALVES(b, d);
    g->min = f8_sub(f8_set(0.0f), ROW_HALVES(b, m));
}

DS_INLINE void row_group_Q8_0(const void *block, row_group *g) {
    const ds_block_Q8_0 *b = block;
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_load(b[j].qs);
    g->scale = ROW_HALVES(b, d);
}

DS_INLINE void row_group_IQ4_NL(const void *block, row_group *g) {
    const ds_block_IQ4_NL *b = block;
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_lookup(ds_iq4_values, v32_nibbles(b[j].qs));
    g->scale = ROW_HALVES(b, d);
}

/* ---- Formats of 256 values ---- */

/* The 6-bit scales (low word) and minimums of Q4_K and Q5_K, as bytes in order. */
DS_INLINE void row_scales_k4(const uint8_t packed[12], uint64_t *sc, uint64_t *m) {
    uint32_t p[3];
    memcpy(p, packed, sizeof p);
    const uint32_t high_sc = (p[2] & DS_BYTES(15)) | (p[0] >> 2 & DS_BYTES(48));
    const uint32_t high_m = (p[2] >> 4 & DS_BYTES(15)) | (p[1] >> 2 & DS_BYTES(48));
    *sc = (uint64_t)high_sc << 32 | (p[0] & DS_BYTES(63));
    *m = (uint64_t)high_m << 32 | (p[1] & DS_BYTES(63));
}

DS_INLINE void row_group_k4(uint16_t d, uint16_t dmin, const uint8_t packed[12], row_group *g) {
    uint64_t sc, m;
    row_scales_k4(packed, &sc, &m);
    g->scale = f8_mul(f8_bytes(sc), f8_set(f32_of_f16(d)));
    g->min = f8_mul(f8_bytes(m), f8_set(f32_of_f16(dmin)));
}

DS_INLINE void row_group_Q4_K(const void *block, row_group *g) {
    const ds_block_Q4_K *b = block;
    row_group_k4(b->d, b->dmin, b->scales, g);
    DS_UNROLL
    for (int j = 0; j < 8; j += 2) {
        const v32 two = v32_load(b->qs + 16 * j);
        g->q[j] = v32_and(two, v32_set(15));
        g->q[j + 1] = v32_and(v32_shr(two, 4), v32_set(15));
    }
}

DS_INLINE void row_group_Q5_K(const void *block, row_group *g) {
    const ds_block_Q5_K *b = block;
    row_group_k4(b->d, b->dmin, b->scales, g);
    const v32 high = v32_load(b->qh);
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        const v32 low = v32_and(v32_shr(v32_load(b->qs + 32 * (j / 2)), j % 2 * 4), v32_set(15));
        const v32 fifth = j < 4 ? v32_shl(high, 4 - j) : v32_shr(high, j - 4);
        g->q[j] = v32_or(low, v32_and(fifth, v32_set(16)));
    }
}

DS_INLINE void row_group_Q6_K(const void *block, row_group *g) {
    const ds_block_Q6_K *b = block;
    g->scale = f8_set(f32_of_f16(b->d));
    g->min = f8_mul(g->scale, f8_set(32.0f));
    g->sc = g->m = v16_load(b->scales);
    DS_UNROLL
    for (int h = 0; h < 2; h++) {
        const v32 high = v32_load(b->qh + 32 * h);
        DS_UNROLL
        for (int j = 0; j < 4; j++) {
            const v32 low = v32_and(v32_shr(v32_load(b->ql + 64 * h + 32 * (j % 2)), j / 2 * 4), v32_set(15));
            const v32 two = j < 2 ? v32_shl(high, 4 - 2 * j) : v32_shr(high, 2 * j - 4);
            g->q[4 * h + j] = v32_or(low, v32_and(two, v32_set(48)));
        }
    }
}

DS_INLINE void row_twos(const uint8_t qs[64], row_group *g) {
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_and(v32_shr(v32_load(qs + 32 * (j / 4)), j % 4 * 2), v32_set(3));
}

DS_INLINE void row_group_Q2_K(const void *block, row_group *g) {
    const ds_block_Q2_K *b = block;
    const v16 scales = v16_load(b->scales);
    g->scale = f8_set(f32_of_f16(b->d));
    g->min = f8_set(f32_of_f16(b->dmin));
    g->sc = v16_and(scales, v16_set(15));
    g->m = v16_high_nibbles(scales);
    row_twos(b->qs, g);
}

DS_INLINE void row_group_Q3_K(const void *block, row_group *g) {
    const ds_block_Q3_K *b = block;
    uint32_t p[3], sc[4];
    memcpy(p, b->scales, sizeof p);
    sc[0] = (p[0] & DS_BYTES(15)) | (p[2] << 4 & DS_BYTES(48));
    sc[1] = (p[1] & DS_BYTES(15)) | (p[2] << 2 & DS_BYTES(48));
    sc[2] = (p[0] >> 4 & DS_BYTES(15)) | (p[2] & DS_BYTES(48));
    sc[3] = (p[1] >> 4 & DS_BYTES(15)) | (p[2] >> 2 & DS_BYTES(48));
    g->scale = f8_set(f32_of_f16(b->d));
    g->min = f8_mul(g->scale, f8_set(4.0f));
    g->sc = g->m = v16_sub(v16_load(sc), v16_set(32));
    const v32 high = v32_load(b->hmask);
    row_twos(b->qs, g);
    DS_UNROLL
    for (int j = 0; j < 8; j++) {
        const v32 third = j < 2 ? v32_shl(high, 2 - j) : v32_shr(high, j - 2);
        g->q[j] = v32_or(g->q[j], v32_and(third, v32_set(4)));
    }
}

DS_INLINE void row_group_IQ4_XS(const void *block, row_group *g) {
    const ds_block_IQ4_XS *b = block;
    uint32_t low;
    memcpy(&low, b->scales_l, sizeof low);
    const uint64_t sc = spread_nibbles(low) | spread_pairs(b->scales_h) << 4;
    g->scale = f8_mul(f8_sub(f8_bytes(sc), f8_set(32.0f)), f8_set(f32_of_f16(b->d)));
    DS_UNROLL
    for (int j = 0; j < 8; j++) g->q[j] = v32_lookup(ds_iq4_values, v32_nibbles(b->qs + 16 * j));
}

/* ---- The product ---- */

typedef void (*row_group_fn)(const void *block, row_group *g);

/* What the loop needs to know of a format; constant where it is used. */
typedef struct row_format {
    row_group_fn group;
    row_traits traits;
    size_t group_bytes;
    int block_elements;
} row_format;

DS_INLINE float row_total(const row_sums *s, int t, row_traits traits) {
    const f8 y = f8_add(s->y[t][0], s->y[t][1]);
    return f8_sum(traits & ROW_MIN ? f8_sub(y, s->min[t]) : y);
}

DS_INLINE void mul_rows(row_format f, int n_tok, const ds_mul *job) {
    enum { MAX_GROUP_BYTES = 8 * 34 };
    const act_rows a = act_rows_at(job->act, n_tok, job->k);
    const int whole = job->k / ACT_GROUP * ACT_GROUP;
    for (int r = job->row_begin; r < job->row_end; r++) {
        const char *w = (const char *)job->w + (size_t)r * job->row_bytes;
        row_sums sums;
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) sums.y[t][0] = sums.y[t][1] = sums.min[t] = f8_set(0.0f);
        for (int i = 0; i < whole; i += ACT_GROUP, w += f.group_bytes) {
            DS_UNROLL
            for (size_t line = 0; line < f.group_bytes; line += 64) __builtin_prefetch(w + DS_PREFETCH_BYTES + line);
            row_group g;
            f.group(w, &g);
            row_add(f.traits, &g, n_tok, &a, (size_t)i, &sums);
        }
        if (f.block_elements < ACT_GROUP && whole < job->k) {
            /* The last blocks of a row that is no multiple of 256: missing ones are zero, scale and all. */
            char tail[MAX_GROUP_BYTES] = {0};
            memcpy(tail, w, (size_t)(job->k - whole) * f.group_bytes / ACT_GROUP);
            row_group g;
            f.group(tail, &g);
            row_add(f.traits, &g, n_tok, &a, (size_t)whole, &sums);
        }
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) job->y[(size_t)t * job->ldy + (size_t)r] = row_total(&sums, t, f.traits);
    }
}

#define MUL_ROWS(id, row_traits_)                                                                                   \
    static void mul_rows_##id(const ds_mul *job) {                                                                  \
        const row_format f = {.group = row_group_##id,                                                              \
                              .traits = (row_traits)(row_traits_),                                                  \
                              .group_bytes = sizeof(ds_block_##id) * (ACT_GROUP / DS_ELEMENTS_##id),                \
                              .block_elements = DS_ELEMENTS_##id};                                                  \
        if (job->n_tok == 1) mul_rows(f, 1, job);                                                                   \
        else if (job->n_tok == 2) mul_rows(f, 2, job);                                                              \
        else if (job->n_tok == 3) mul_rows(f, 3, job);                                                              \
        else mul_rows(f, 4, job);                                                                                   \
    }
MUL_ROWS(Q4_0, ROW_MIN)
MUL_ROWS(Q4_1, ROW_MIN)
MUL_ROWS(Q5_0, ROW_MIN)
MUL_ROWS(Q5_1, ROW_MIN)
MUL_ROWS(Q8_0, ROW_SIGNED)
MUL_ROWS(Q2_K, ROW_SUB_SCALES | ROW_MIN)
MUL_ROWS(Q3_K, ROW_SUB_SCALES | ROW_MIN)
MUL_ROWS(Q4_K, ROW_MIN)
MUL_ROWS(Q5_K, ROW_MIN)
MUL_ROWS(Q6_K, ROW_SUB_SCALES | ROW_MIN)
MUL_ROWS(IQ4_NL, ROW_SIGNED)
MUL_ROWS(IQ4_XS, ROW_SIGNED)
