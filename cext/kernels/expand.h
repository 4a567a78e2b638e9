/* expand.h: keys and values of one head from latents: K = (W_uk c | rotary key), V = W_uv c, a block of positions at a time. */
#pragma once

typedef struct expand_pack {
    float *k_scale, *v_scale; /* one a column */
    uint32_t *k, *v;          /* panels: a column for each value of a key, of a value */
    int n_dwords, k_cols, v_cols;
} expand_pack;

DS_INLINE expand_pack expand_at(ds_row_kind from, int rank, int k_dim, int v_dim, const void *pack) {
    expand_pack e = {.n_dwords = from == DS_ROWS_F32 ? rank : (int)ds_row_pad(rank) / 2,
                     .k_cols = (int)ds_expand_cols(k_dim), .v_cols = (int)ds_expand_cols(v_dim), .k_scale = (float *)pack};
    e.v_scale = e.k_scale + e.k_cols;
    e.k = (uint32_t *)(void *)(e.v_scale + e.v_cols);
    e.v = e.k + (size_t)e.k_cols * (size_t)e.n_dwords;
    return e;
}

DS_INLINE void expand_put_column(ds_row_kind from, int rank, float *x, int n_cols, int col, float *scale, uint32_t *panel) {
    if (from == DS_ROWS_F32) {
        panel_put_f32(rank, n_cols, col, x, panel);
        scale[col] = 1.0f;
        return;
    }
    if (from == DS_ROWS_Q8) rotate(rank, x);
    scale[col] = panel_put_i16(rank, n_cols, col, x, panel);
}

/* Columns [col, col + n) of a (rank, n_cols) matrix as rows (n, rank); n at most DS_LANES. */
DS_INLINE void expand_columns(int rank, int n_cols, int col, int n, const float *w, float *rows) {
    for (int r = 0; r < rank; r += DS_LANES) {
        const int depth = rank - r < DS_LANES ? rank - r : DS_LANES;
        vf v[DS_LANES];
        DS_UNROLL
        for (int i = 0; i < DS_LANES; i++) v[i] = i < depth ? vf_load_n(w + (size_t)(r + i) * (size_t)n_cols + col, n) : vf_set(0.0f);
        vf_transpose(v);
        for (int i = 0; i < n; i++) vf_store_n(rows + (size_t)i * (size_t)rank + r, v[i], depth);
    }
}

static void expand_weights(const ds_expand_weights *job) {
    const expand_pack e = expand_at(job->from, job->rank, job->k_dim, job->v_dim, job->out);
    memset(job->out, 0, ds_expand_weights_bytes(job->from, job->rank, job->k_dim, job->v_dim));
    for (int col = 0; col < job->k_dim; col += DS_LANES) {
        const int n = job->k_dim - col < DS_LANES ? job->k_dim - col : DS_LANES;
        expand_columns(job->rank, job->k_dim, col, n, job->k_b, job->scratch);
        for (int i = 0; i < n; i++)
            expand_put_column(job->from, job->rank, job->scratch + (size_t)i * (size_t)job->rank, e.k_cols, col + i, e.k_scale, e.k);
    }
    for (int col = 0; col < job->v_dim; col++)
        expand_put_column(job->from, job->rank, job->v_b + (size_t)col * (size_t)job->rank, e.v_cols, col, e.v_scale, e.v);
}

/* The heads of latent rows as int16 rows in scratch. */
DS_INLINE ds_rows expand_latents(const ds_expand *job, void *scratch) {
    if (job->latents.kind == DS_ROWS_F32) return job->latents;
    if (job->latents.kind == DS_ROWS_F16) return rows_from_f16(&job->latents, job->n_pos, job->rank, scratch);
    const ds_rows out = {.kind = DS_ROWS_I16, .data = scratch, .row_bytes = ds_row_pad(job->rank) * sizeof(int16_t), .scale = job->latents.scale};
    for (int j = 0; j < job->n_pos; j++)
        for (size_t i = 0; i < ds_row_pad(job->rank); i += ROW_ORDER8)
            i16_from_i8((const int8_t *)job->latents.data + (size_t)j * job->latents.row_bytes + i,
                        (int16_t *)(void *)((char *)scratch + (size_t)j * out.row_bytes) + i);
    return out;
}

/* The tail of latent row j as floats. */
DS_INLINE void expand_tail(const ds_expand *job, int j, float *out) {
    const char *row = (const char *)job->latents.data + (size_t)j * job->latents.row_bytes;
    if (job->latents.kind == DS_ROWS_F32) {
        memcpy(out, (const float *)(const void *)row + job->rank, (size_t)job->n_tail * sizeof *out);
    } else if (job->latents.kind == DS_ROWS_F16) {
        f16_to_f32(job->n_tail, (const uint16_t *)(const void *)row + job->rank, out);
    } else {
        static const int16_t zeros[ROW_ORDER16];
        const int16_t *tail = job->latents.tail + (size_t)j * ds_row_pad(job->n_tail);
        const float scale = job->latents.tail_scale[j] * 0x1p-16f; /* paired above a zero, a value counts 65536-fold */
        for (int i = 0; i < job->n_tail; i += ROW_ORDER16) {
            uint32_t pairs[ROW_ORDER16];
            i16_pairs(zeros, tail + i, pairs);
            for (int c = 0; c < ROW_ORDER16 && i + c < job->n_tail; c++) out[i + c] = (float)(int32_t)pairs[c] * scale;
        }
    }
}

DS_INLINE void expand_product(const ds_expand *job, const ds_rows *latents, const expand_pack *e, bool values, float *out, size_t ld) {
    const row_product p = {.n = job->n_pos, .k = e->n_dwords, .rows = latents->data, .row_bytes = latents->row_bytes,
                           .row_scale = latents->kind == DS_ROWS_F32 ? NULL : latents->scale, .panel = values ? e->v : e->k,
                           .col_scale = values ? e->v_scale : e->k_scale, .n_cols = values ? e->v_cols : e->k_cols, .out = out, .ld = ld};
    if (latents->kind == DS_ROWS_F32) product_f32(&p);
    else product_i16(&p);
}

static void expand(const ds_expand *job) {
    const expand_pack e = expand_at(job->latents.kind, job->rank, job->k_dim, job->v_dim, job->weights);
    const ds_rows latents = expand_latents(job, job->scratch);
    const bool exact = latents.kind == DS_ROWS_F32;
    float *floats = (float *)(void *)((char *)job->scratch + DS_ATTEND_BLOCK * ds_row_pad(job->rank) * sizeof(int16_t));
    const size_t ld = exact ? job->keys.row_bytes / sizeof(float) : ds_expand_ld(job->k_dim, job->n_tail, job->v_dim);
    float *keys = exact ? job->keys.data : floats, *values = exact ? job->values.data : floats;
    expand_product(job, &latents, &e, false, keys, ld);
    for (int j = 0; j < job->n_pos; j++) {
        expand_tail(job, j, keys + (size_t)j * ld + job->k_dim);
        if (!exact) rows_put(&job->keys, j, job->k_dim + job->n_tail, 0, keys + (size_t)j * ld);
    }
    expand_product(job, &latents, &e, true, values, exact ? job->values.row_bytes / sizeof(float) : ld);
    for (int j = 0; j < job->n_pos && !exact; j++) rows_put(&job->values, j, job->v_dim, 0, values + (size_t)j * ld);
}
