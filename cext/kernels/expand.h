/* expand.h: keys and values of one head from latents: K = (W_uk c | rotary key), V = W_uv c, a block of positions at a
 * time. Over Q8 rows everything is in int8: latents are used where they lie, and the weights are turned so that keys
 * and values come out rotated. */
#pragma once

typedef struct expand_pack {
    float *k_scale, *v_scale; /* one a column */
    uint32_t *k, *v;          /* panels: a column for each value of a key, of a value */
    int n_dwords, k_cols, v_cols;
} expand_pack;

DS_INLINE expand_pack expand_at(ds_row_kind from, int rank, int k_dim, int v_dim, const void *pack) {
    expand_pack e = {.n_dwords = from == DS_ROWS_F32 ? rank : (int)ds_row_pad(rank) / (from == DS_ROWS_Q8 ? 4 : 2),
                     .k_cols = (int)ds_expand_cols(k_dim),
                     .v_cols = (int)ds_expand_cols(v_dim),
                     .k_scale = (float *)pack};
    e.v_scale = e.k_scale + e.k_cols;
    e.k = (uint32_t *)(void *)(e.v_scale + e.v_cols);
    e.v = e.k + (size_t)e.k_cols * (size_t)e.n_dwords;
    return e;
}

DS_INLINE void expand_put_column(ds_row_kind from, int rank, float *x, int n_cols, int col, float *scale,
                                 uint32_t *panel) {
    if (from == DS_ROWS_F32) {
        panel_put_f32(rank, n_cols, col, x, panel);
        scale[col] = 1.0f;
        return;
    }
    if (from == DS_ROWS_I16) {
        scale[col] = panel_put_i16(rank, n_cols, col, x, panel);
        return;
    }
    DS_OF(rotate)(rank, x);
    scale[col] = panel_put_i8(rank, n_cols, col, x, panel);
}

/* Each column of x (n, width) rotated. */
DS_INLINE void rotate_columns(int n, int width, float *x) {
    const int block = n & -n;
    for (int half = 1; half < block; half *= 2)
        for (int i = 0; i < n; i++) {
            if (i & half) continue;
            float *a = x + (size_t)i * (size_t)width, *b = a + (size_t)half * (size_t)width;
            for (int j = 0; j < width; j++) {
                const float sum = a[j] + b[j];
                b[j] = a[j] - b[j];
                a[j] = sum;
            }
        }
    scale_row(n * width, 1.0f / sqrtf((float)block), x);
}

/* Columns [col, col + n) of a (rank, n_cols) matrix as rows (n, rank); n at most DS_LANES. */
DS_INLINE void expand_columns(int rank, int n_cols, int col, int n, const float *w, float *rows) {
    for (int r = 0; r < rank; r += DS_LANES) {
        const int depth = rank - r < DS_LANES ? rank - r : DS_LANES;
        vf v[DS_LANES];
        DS_UNROLL
        for (int i = 0; i < DS_LANES; i++)
            v[i] = i < depth ? vf_load_n(w + (size_t)(r + i) * (size_t)n_cols + col, n) : vf_set(0.0f);
        vf_transpose(v);
        for (int i = 0; i < n; i++) vf_store_n(rows + (size_t)i * (size_t)rank + r, v[i], depth);
    }
}

void DS_OF(expand_weights)(const ds_expand_weights *job) {
    const expand_pack e = expand_at(job->from, job->rank, job->k_dim, job->v_dim, job->out);
    memset(job->out, 0, ds_expand_weights_bytes(job->from, job->rank, job->k_dim, job->v_dim));
    if (job->from == DS_ROWS_Q8) {
        for (int r = 0; r < job->rank; r++) DS_OF(rotate)(job->k_dim, job->k_b + (size_t)r * (size_t)job->k_dim);
        rotate_columns(job->v_dim, job->rank, job->v_b);
    }
    for (int col = 0; col < job->k_dim; col += DS_LANES) {
        const int n = job->k_dim - col < DS_LANES ? job->k_dim - col : DS_LANES;
        expand_columns(job->rank, job->k_dim, col, n, job->k_b, job->scratch);
        for (int i = 0; i < n; i++)
            expand_put_column(job->from, job->rank, job->scratch + (size_t)i * (size_t)job->rank, e.k_cols, col + i,
                              e.k_scale, e.k);
    }
    for (int col = 0; col < job->v_dim; col++)
        expand_put_column(job->from, job->rank, job->v_b + (size_t)col * (size_t)job->rank, e.v_cols, col, e.v_scale,
                          e.v);
}

/* ROW_ORDER16 values of an int16 row times its scale, in order (ds_row_place16). */
DS_INLINE void i16_unpack32(const int16_t *in, float scale, float *out) {
    DS_UNROLL
    for (int four = 0; four < ROW_ORDER16 / 4; four++)
        DS_UNROLL for (int i = 0; i < 4; i++) out[four % 2 * 16 + four / 2 * 4 + i] = scale * (float)in[4 * four + i];
}

/* The tail of row j of a run of latents as floats. */
DS_INLINE void expand_tail(const ds_expand *job, const ds_rows *latents, int j, float *out) {
    const char *row = (const char *)latents->data + (size_t)j * latents->row_bytes;
    if (latents->kind == DS_ROWS_F32) {
        memcpy(out, (const float *)(const void *)row + job->rank, (size_t)job->n_tail * sizeof *out);
        return;
    }
    const int16_t *values = (const int16_t *)(const void *)row;
    for (int i = 0; i < job->n_tail;) {
        const int inside = (job->rank + i) % ROW_ORDER16, left = job->n_tail - i;
        const int n = left < ROW_ORDER16 - inside ? left : ROW_ORDER16 - inside;
        float part[ROW_ORDER16];
        i16_unpack32(values + job->rank + i - inside, latents->scale[j], n == ROW_ORDER16 ? out + i : part);
        if (n < ROW_ORDER16) memcpy(out + i, part + inside, (size_t)n * sizeof *part);
        i += n;
    }
}

/* The tails of all latents behind the heads of keys (n_pos, ld). */
DS_INLINE void expand_tails(const ds_expand *job, const row_runs *latents, float *keys, size_t ld) {
    float *at = keys + job->k_dim;
    for (int i = 0; i < latents->n; i++)
        for (int j = 0; j < latents->run[i].n; j++, at += ld) expand_tail(job, &latents->run[i].rows, j, at);
}

/* Floats (n_pos, ld) by one of the panels. */
DS_INLINE void expand_product(ds_row_kind kind, const row_runs *latents, const expand_pack *e, bool values, float *out,
                              size_t ld) {
    const row_product p = {.rows = latents,
                           .k = e->n_dwords,
                           .panel = values ? e->v : e->k,
                           .col_scale = values ? e->v_scale : e->k_scale,
                           .n_cols = values ? e->v_cols : e->k_cols,
                           .out = out,
                           .ld = ld};
    if (kind == DS_ROWS_F32) product_f32(&p);
    else if (kind == DS_ROWS_Q8) product_query(&p);
    else product_i16(&p);
}

/* F32: straight into the rows. */
DS_INLINE void expand_f32(const ds_expand *job, const row_runs *latents, const expand_pack *e) {
    const size_t ld = job->keys.row_bytes / sizeof(float);
    expand_product(DS_ROWS_F32, latents, e, false, job->keys.data, ld);
    expand_tails(job, latents, job->keys.data, ld);
    expand_product(DS_ROWS_F32, latents, e, true, job->values.data, job->values.row_bytes / sizeof(float));
}

DS_INLINE void expand_i16(const ds_expand *job, const row_runs *latents, const expand_pack *e) {
    const size_t ld = ds_expand_ld(job->k_dim, job->n_tail, job->v_dim);
    float *floats = job->scratch;
    expand_product(DS_ROWS_I16, latents, e, false, floats, ld);
    expand_tails(job, latents, floats, ld);
    for (int j = 0; j < job->n_pos; j++)
        DS_OF(rows_put)(&job->keys, j, job->k_dim + job->n_tail, 0, floats + (size_t)j * ld);
    expand_product(DS_ROWS_I16, latents, e, true, floats, ld);
    for (int j = 0; j < job->n_pos; j++) DS_OF(rows_put)(&job->values, j, job->v_dim, 0, floats + (size_t)j * ld);
}

DS_INLINE void expand_q8(const ds_expand *job, const row_runs *latents, const expand_pack *e) {
    const size_t ld = ds_expand_ld(job->k_dim, job->n_tail, job->v_dim), tail = ds_row_pad(job->n_tail);
    float *floats = job->scratch;
    expand_product(DS_ROWS_Q8, latents, e, false, floats, ld);
    for (int j = 0; j < job->n_pos; j++) rows_put_head(&job->keys, j, job->k_dim, floats + (size_t)j * ld);
    for (int i = 0; i < latents->n; i++) {
        const ds_rows *from = &latents->run[i].rows, to = ds_rows_from(&job->keys, latents->run[i].at, job->n_tail);
        memcpy(to.tail, from->tail, (size_t)latents->run[i].n * tail * sizeof *to.tail);
        memcpy(to.tail_scale, from->tail_scale, (size_t)latents->run[i].n * sizeof *to.tail_scale);
    }
    expand_product(DS_ROWS_Q8, latents, e, true, floats, ld);
    for (int j = 0; j < job->n_pos; j++) rows_put_head(&job->values, j, job->v_dim, floats + (size_t)j * ld);
}

void DS_OF(expand)(const ds_expand *job) {
    const ds_row_kind kind = job->latents.layout.kind;
    const expand_pack e = expand_at(kind, job->rank, job->k_dim, job->v_dim, job->weights);
    row_runs latents;
    row_runs_of(&job->latents, 0, job->n_pos, job->n_pos, &latents);
    if (kind == DS_ROWS_F32) expand_f32(job, &latents, &e);
    else if (kind == DS_ROWS_I16) expand_i16(job, &latents, &e);
    else expand_q8(job, &latents, &e);
}
