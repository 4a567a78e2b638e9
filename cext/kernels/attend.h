/* attend.h: attention of query rows (a token's head each) over rows of the cache that they share, or over keys and
 * values expanded from it: scores by one product, an online softmax with a query to a lane, the values by another
 * product. Memory rows are converted once for all queries. */
#pragma once

/* The largest sum of a block's int16 weights: times a value of 32767 it stays within 31 bits. */
#define ATTEND_SUM_I16 32700.0f

/* ---- Packed queries ---- */

typedef struct query_pack {
    float *scale, *tail_scale; /* (n_rows) */
    uint32_t *panel, *tail;    /* (k, n_rows), (k_tail, n_rows) in groups */
    int k, k_tail;
} query_pack;

DS_INLINE query_pack query_at(ds_row_kind kind, int n_rows, int n, int n_tail, const void *pack) {
    query_pack q = {.scale = (float *)pack};
    if (kind == DS_ROWS_F32) q.k = n + n_tail;
    else if (kind == DS_ROWS_Q8) q.k = (int)ds_row_pad(n) / 4, q.k_tail = (int)ds_row_pad(n_tail) / 2;
    else q.k = (int)ds_row_pad(n + n_tail) / 2;
    q.tail_scale = q.scale + n_rows;
    q.panel = (uint32_t *)(void *)(q.tail_scale + n_rows);
    q.tail = q.panel + (size_t)q.k * (size_t)n_rows;
    return q;
}

void DS_OF(query_put)(ds_row_kind kind, int i, int n_rows, int n, int n_tail, float *x, float scale, void *pack) {
    const query_pack q = query_at(kind, n_rows, n, n_tail, pack);
    scale *= 0x1.715476p+0f; /* log2 e: a score is then an exponent of 2 */
    if (kind == DS_ROWS_F32) {
        panel_put_f32(n + n_tail, n_rows, i, x, q.panel);
        q.scale[i] = scale;
    } else if (kind == DS_ROWS_Q8) {
        DS_OF(rotate)(n, x);
        q.scale[i] = scale * panel_put_i8(n, n_rows, i, x, q.panel);
        q.tail_scale[i] = scale * panel_put_i16(n_tail, n_rows, i, x + n, q.tail);
    } else {
        q.scale[i] = scale * panel_put_i16(n + n_tail, n_rows, i, x, q.panel);
    }
}

/* ---- One block of positions ---- */

/* What a block's phases share. Weights take the place of the scores they are made of. */
typedef struct attend_block {
    const ds_attend *job;
    query_pack q;
    int n_rows, n; /* rows padded to whole lanes; positions of this block */
    int share;     /* positions whose weights share a scale */
    ds_row_kind kind; /* of the values */
    row_runs keys, values;
    const int32_t *visible; /* (n_rows) or NULL */
    int first_pos;          /* position of the block's first row */
    float *scores;          /* (n, n_rows) */
    float *keep;            /* (n_rows): what the sums so far are worth under the new maximum */
    float *gain;            /* (shares, n_rows): what a unit of a weight is worth */
    float value_scale[DS_ATTEND_BLOCK_Q8]; /* (n) of the values; unset for floats */
    bool ready;             /* the keys are in cache */
    row_runs next;          /* of the block to come, brought into cache meanwhile */
    size_t
        in_scores; /* bytes of each of its rows that come while scores are made; the rest, while values are added up */
} attend_block;

/* The scales of a run of rows, brought into cache: too little for a processor to see them coming. */
DS_INLINE void prefetch_scales(const ds_rows *rows, int n) {
    for (int i = 0; i < n; i += DS_ACT_ALIGN / (int)sizeof *rows->scale) {
        __builtin_prefetch(rows->scale + i);
        if (rows->tail_scale) __builtin_prefetch(rows->tail_scale + i);
        if (rows->sum) __builtin_prefetch(rows->sum + i);
    }
}

DS_INLINE void attend_scores(const attend_block *b) {
    row_product p = {.rows = &b->keys,
                     .k = b->q.k,
                     .panel = b->q.panel,
                     .col_scale = b->q.scale,
                     .n_cols = b->n_rows,
                     .out = b->scores,
                     .ld = (size_t)b->n_rows};
    const ds_row_kind kind = b->job->keys.layout.kind;
    if (kind == DS_ROWS_F32) {
        product_f32(&p);
        return;
    }
    p.lead = 2 * DS_ROW_TILE;
    p.within = b->next.n;
    if (b->ready) p.next = &b->next, p.next_bytes = b->in_scores;
    for (int i = 1; i < b->keys.n; i++) prefetch_scales(&b->keys.run[i].rows, b->keys.run[i].n);
    prefetch_scales(&b->keys.next, b->keys.run[0].n);
    if (kind == DS_ROWS_I16) {
        product_i16(&p);
        return;
    }
    product_query(&p);
    if (!b->q.k_tail) return;
    p.tail = true;
    p.next = NULL;
    p.k = b->q.k_tail;
    p.panel = b->q.tail;
    p.col_scale = b->q.tail_scale;
    product_i16_add(&p);
}

/* The weights of one vector of queries, already 2^(score - top), as dwords of two int16: they share one scale, which is
 * returned, and their sum is bounded. The last dword is filled up with a zero. */
DS_INLINE void attend_weights16(const attend_block *b, int lane, vf sum) {
    const vf some = vf_max(sum, vf_set(0x1p-100f)), scale = vf_div(vf_set(ATTEND_SUM_I16), some);
    vf_store(b->gain + lane, vf_mul(some, vf_set(1.0f / ATTEND_SUM_I16)));
    for (int j = 0; j < b->n; j += 2) {
        const float *w = b->scores + (size_t)j * (size_t)b->n_rows + lane;
        const vi low = vf_to_int(vf_mul(vf_load(w), scale));
        const vi high = j + 1 < b->n ? vf_to_int(vf_mul(vf_load(w + b->n_rows), scale)) : vi_set(0);
        vi_store(b->scores + (size_t)(j / 2) * (size_t)b->n_rows + lane, vi_or(low, vi_shl(high, 16)));
    }
}

/* Four weights as a dword of unsigned int8; those from `n` on are zero. */
DS_INLINE vi attend_four(const float *w, size_t ld, int n, vf scale) {
    vi four = vf_to_int(vf_mul(vf_load(w), scale));
    DS_UNROLL
    for (int i = 1; i < 4; i++)
        if (i < n) four = vi_or(four, vi_shl(vf_to_int(vf_mul(vf_load(w + (size_t)i * ld), scale)), 8 * i));
    return four;
}

/* The same as dwords of four unsigned int8, a scale for each share of the positions, whose largest is in gain. */
DS_INLINE void attend_weights8(const attend_block *b, int lane) {
    const size_t ld = (size_t)b->n_rows;
    for (int j = 0, s = 0; j < b->n; s++) {
        float *gain = b->gain + (size_t)s * ld + lane;
        const vf top = vf_max(vf_load(gain), vf_set(0x1p-100f)), scale = vf_div(vf_set(255.0f), top);
        const int end = b->n - j < b->share ? b->n : j + b->share;
        vf_store(gain, vf_mul(top, vf_set(1.0f / 255.0f)));
        for (; j < end; j += 4) {
            const float *w = b->scores + (size_t)j * ld + lane;
            float *out = b->scores + (size_t)(j / 4) * ld + lane;
            if (end - j >= 4) vi_store(out, attend_four(w, ld, 4, scale));
            else vi_store(out, attend_four(w, ld, end - j, scale));
        }
    }
}

/* The largest scores of one vector of queries; what a query does not see becomes -infinity. */
DS_INLINE vf attend_top(const attend_block *b, int lane) {
    enum { CHAINS = 4 }; /* one would wait for each maximum */
    float *s = b->scores + lane;
    vf top[CHAINS];
    DS_UNROLL
    for (int i = 0; i < CHAINS; i++) top[i] = vf_set(-INFINITY);
    if (b->visible)
        for (int j = 0; j < b->n; j++) {
            float *at = s + (size_t)j * (size_t)b->n_rows;
            vf_store(at, vf_below(vf_load(at), b->first_pos + j, vi_load(b->visible + lane)));
        }
    int j = 0;
    for (; j + CHAINS <= b->n; j += CHAINS)
        DS_UNROLL for (int i = 0; i < CHAINS; i++) top[i] =
            vf_max(vf_load(s + (size_t)(j + i) * (size_t)b->n_rows), top[i]);
    for (; j < b->n; j++) top[0] = vf_max(vf_load(s + (size_t)j * (size_t)b->n_rows), top[0]);
    return vf_max(vf_max(top[0], top[1]), vf_max(top[2], top[3]));
}

/* Softmax of one vector of queries over the block: weights into the place of scores, m and l brought up to date. */
DS_INLINE void attend_softmax(const attend_block *b, int lane) {
    const ds_attend *job = b->job;
    const float *value_scale = b->kind == DS_ROWS_F32 ? NULL : b->value_scale;
    const vf top = attend_top(b, lane);
    /* A query that sees nothing yet has a maximum of -infinity: shifted by the lowest float, its weights are 0. */
    const vf old = vf_load(job->m + lane), lowest = vf_set(-FLT_MAX);
    const vf new_max = vf_max(top, old), shift = vf_max(top, lowest), base = vf_max(new_max, lowest);
    vf sum = vf_set(0.0f), scaled_sum = vf_set(0.0f);
    for (int j = 0, s = 0; j < b->n; s++) {
        vf share_top = vf_set(0.0f);
        for (const int end = b->n - j < b->share ? b->n : j + b->share; j < end; j++) {
            float *at = b->scores + (size_t)j * (size_t)b->n_rows + lane;
            vf w = vf_exp2(vf_sub(vf_load(at), shift));
            sum = vf_add(sum, w);
            if (value_scale) w = vf_mul(w, vf_set(value_scale[j]));
            scaled_sum = vf_add(scaled_sum, w);
            share_top = vf_max(w, share_top);
            vf_store(at, w);
        }
        vf_store(b->gain + (size_t)s * (size_t)b->n_rows + lane, share_top);
    }
    const vf keep = vf_exp2(vf_sub(old, base)), gain = vf_exp2(vf_sub(shift, base));
    vf_store(b->keep + lane, keep);
    vf_store(job->m + lane, new_max);
    vf_store(job->l + lane, vf_fma(vf_load(job->l + lane), keep, vf_mul(sum, gain)));
    if (b->kind == DS_ROWS_F32) vf_store(b->gain + lane, vf_set(1.0f));
    else if (b->kind == DS_ROWS_Q8) attend_weights8(b, lane);
    else attend_weights16(b, lane, scaled_sum);
    for (int j = 0, s = 0; j < b->n; j += b->share, s++) {
        float *at = b->gain + (size_t)s * (size_t)b->n_rows + lane;
        vf_store(at, vf_mul(vf_load(at), gain));
    }
}

/* ---- Values ---- */

enum { VALUE_COLS = 64 /* columns of values that are paired up at a time */ };

/* Columns [col, col + VALUE_COLS) of n rows that lie together, neighbours paired up in dwords: (k, VALUE_COLS). */
DS_INLINE void value_panel(dot_type type, const ds_rows *values, int n, int v_dim, int col, uint32_t *panel) {
    const char *rows = (const char *)values->data;
    const size_t row_bytes = values->row_bytes;
    if (type == DOT_F32) {
        const int left = v_dim - col;
        for (int j = 0; j < n; j++, panel += VALUE_COLS) {
            const float *row = (const float *)(const void *)(rows + (size_t)j * row_bytes) + col;
            for (int c = 0; c < VALUE_COLS; c += DS_LANES) {
                vf x = vf_set(0.0f);
                if (left - c >= DS_LANES) x = vf_load(row + c);
                else if (left > c) x = vf_load_n(row + c, left - c);
                vf_store((float *)(void *)panel + c, x);
            }
        }
        return;
    }
    /* Past the last position its row stands again: the weights there are zero. */
    if (type == DOT_I16) {
        for (int j = 0; j < n; j += 2, panel += VALUE_COLS) {
            const int16_t *a = (const int16_t *)(const void *)(rows + (size_t)j * row_bytes) + col;
            const int16_t *c = j + 1 < n ? (const int16_t *)(const void *)((const char *)a + row_bytes) : a;
            for (int i = 0; i < VALUE_COLS; i += ROW_ORDER16) i16_pairs(a + i, c + i, panel + i);
        }
        return;
    }
    for (int j = 0; j < n; j += 4, panel += VALUE_COLS) {
        const int8_t *four[4];
        for (int i = 0; i < 4; i++)
            four[i] = (const int8_t *)rows + (size_t)(j + i < n ? j + i : n - 1) * row_bytes + col;
        for (int i = 0; i < VALUE_COLS; i += ROW_ORDER8) {
            i8_quads(four, panel + i);
            for (int r = 0; r < 4; r++) four[r] += ROW_ORDER8;
        }
    }
}

enum { VALUE_ROWS = 2 * DS_ROW_TILE / DS_VALUE_VECS /* rows of sums that a tile keeps in registers */ };

/* What is brought into cache beside other work, in even steps; a step of 0: nothing. */
typedef struct prefetcher {
    const char *at;
    size_t step;
} prefetcher;

/* What tile `tile` of n_tiles, of n_steps steps each, brings: its share of what scores have left of the block to come. */
DS_INLINE prefetcher value_ahead(const attend_block *b, size_t tile, size_t n_tiles, size_t n_steps) {
    if (!b->next.n) return (prefetcher){0};
    const size_t per_run = n_tiles > (size_t)b->next.n ? n_tiles / (size_t)b->next.n : 1, run = tile / per_run;
    if (run >= (size_t)b->next.n) return (prefetcher){0};
    const ds_rows *rows = &b->next.run[run].rows;
    const size_t n = (size_t)b->next.run[run].n, data = n * rows->row_bytes, begin = n * b->in_scores;
    const size_t piece = (data + n * b->job->keys.layout.tail_bytes - begin) / per_run;
    const size_t at = begin + tile % per_run * piece;
    return (prefetcher){at < data ? (const char *)rows->data + at : (const char *)rows->tail + (at - data),
                        (piece + n_steps - 1) / n_steps};
}

DS_INLINE void value_dots(dot_type type, int k, const uint32_t *weights, size_t n_rows, const uint32_t *panel,
                          vi sums[VALUE_ROWS][DS_VALUE_VECS], bool any, prefetcher ahead) {
    for (int p = 0; p < k; p++, weights += n_rows, panel += VALUE_COLS) {
        if (any) {
            __builtin_prefetch(ahead.at, 0, 2);
            ahead.at += ahead.step;
        }
        vi columns[DS_VALUE_VECS];
        DS_UNROLL
        for (int v = 0; v < DS_VALUE_VECS; v++) columns[v] = vi_load(panel + v * DS_LANES);
        DS_UNROLL
        for (int i = 0; i < VALUE_ROWS; i++)
            dot_vecs(type, DS_VALUE_VECS, sums[i], vi_dword_load(weights + i), columns);
    }
}

/* acc rows [0, VALUE_ROWS) of a tile's columns: times keep (NULL: 1), plus gain times weights . values. */
DS_INLINE void value_tile(dot_type type, int k, const uint32_t *weights, size_t n_rows, const uint32_t *panel,
                          const float *keep, const float *gain, float *acc, size_t ld, prefetcher ahead) {
    vi sums[VALUE_ROWS][DS_VALUE_VECS];
    DS_UNROLL
    for (int i = 0; i < VALUE_ROWS; i++) DS_UNROLL for (int v = 0; v < DS_VALUE_VECS; v++) sums[i][v] = vi_set(0);
    if (ahead.step) value_dots(type, k, weights, n_rows, panel, sums, true, ahead);
    else value_dots(type, k, weights, n_rows, panel, sums, false, ahead);
    /* All is loaded before anything is stored: rows lie 2 KB apart, and a load waits for a store that is as far into its
     * page of 4 KB. */
    DS_UNROLL
    for (int i = 0; i < VALUE_ROWS; i++) DS_UNROLL for (int v = 0; v < DS_VALUE_VECS; v++) {
            const vf x = type == DOT_F32 ? vi_as_float(sums[i][v]) : vi_to_float(sums[i][v]);
            const vf old = vf_load(acc + (size_t)i * ld + (size_t)(v * DS_LANES));
            sums[i][v] = vf_as_int(vf_fma(x, vf_set(gain[i]), keep ? vf_mul(old, vf_set(keep[i])) : old));
        }
    DS_UNROLL
    for (int i = 0; i < VALUE_ROWS; i++)
        DS_UNROLL for (int v = 0; v < DS_VALUE_VECS; v++)
            vf_store(acc + (size_t)i * ld + (size_t)(v * DS_LANES), vi_as_float(sums[i][v]));
}

DS_INLINE void attend_values(dot_type type, const attend_block *b) {
    const int per_dword = type == DOT_F32 ? 1 : type == DOT_I16 ? 2 : 4;
    const size_t n_rows = (size_t)b->n_rows;
    DS_ALIGNED uint32_t panel[DS_ATTEND_BLOCK * VALUE_COLS];
    const size_t n_shares = (size_t)((b->n + b->share - 1) / b->share), n_cols = ds_row_pad(b->job->v_dim);
    const size_t n_tiles = n_shares * n_cols / (DS_VALUE_VECS * DS_LANES) * (n_rows / VALUE_ROWS);
    size_t tile = 0;
    for (int col = 0; col < b->job->v_dim; col += VALUE_COLS) {
        for (int i = 0; i < b->values.n; i++)
            value_panel(type, &b->values.run[i].rows, b->values.run[i].n, b->job->v_dim, col,
                        panel + (size_t)(b->values.run[i].at / per_dword) * VALUE_COLS);
        for (int begin = 0, s = 0; begin < b->n; begin += b->share, s++) {
            const int n = b->n - begin < b->share ? b->n - begin : b->share, k = (n + per_dword - 1) / per_dword;
            const uint32_t *weights = (const uint32_t *)(const void *)b->scores + (size_t)(begin / per_dword) * n_rows;
            for (int c = 0; c < VALUE_COLS; c += DS_VALUE_VECS * DS_LANES)
                for (int row = 0; row < b->n_rows; row += VALUE_ROWS, tile++)
                    value_tile(type, k, weights + row, n_rows, panel + (size_t)(begin / per_dword) * VALUE_COLS + c,
                               s ? NULL : b->keep + row, b->gain + (size_t)s * n_rows + row,
                               b->job->acc + (size_t)row * b->job->ld_acc + (size_t)(col + c), b->job->ld_acc,
                               value_ahead(b, tile, n_tiles, (size_t)k));
        }
    }
}

static void attend_values_f32(const attend_block *b) { attend_values(DOT_F32, b); }
static void attend_values_i16(const attend_block *b) { attend_values(DOT_I16, b); }
static void attend_values_q8(const attend_block *b) { attend_values(DOT_WEIGHTS, b); }

/* ---- The job ---- */

/* How many positions of the job every query sees, and how many the one that sees most. */
DS_INLINE void attend_limits(const ds_attend *job, int *least, int *most) {
    *least = *most = job->n_pos;
    if (!job->visible) return;
    *most = 0;
    for (int i = 0; i < job->n_rows; i++) {
        const int sees = job->visible[i] - job->first_pos;
        if (sees < *least) *least = sees;
        if (sees > *most) *most = sees;
    }
    if (*most > job->n_pos) *most = job->n_pos;
}

/* The n positions from row `at` of the tables on: their rows, and the values' scales side by side. */
DS_INLINE void attend_enter(attend_block *b, int at, int n) {
    const ds_attend *job = b->job;
    row_runs_of(&job->keys, at, n, job->n_pos, &b->keys);
    if (job->values.blocks) row_runs_of(&job->values, at, n, job->n_pos, &b->values);
    else b->values = b->keys;
    b->n = n;
    b->first_pos = job->first_pos + at;
    if (b->kind == DS_ROWS_F32) return;
    for (int i = 0; i < b->values.n; i++)
        memcpy(b->value_scale + b->values.run[i].at, b->values.run[i].rows.scale,
               (size_t)b->values.run[i].n * sizeof *b->value_scale);
}

/* What is to be brought into cache: the rows of the job's next block, or of the job to come. Half of it comes while
 * scores are made, unless they wait for rows of their own. */
DS_INLINE void attend_look_ahead(attend_block *b, int at, int most, int size) {
    const ds_attend *job = b->job;
    const int next = at + b->n, left = next < most ? most - next : job->n_next;
    b->ready = at ? b->next.n : job->ready;
    b->next.n = 0;
    b->in_scores = b->ready ? (job->keys.layout.row_bytes + job->keys.layout.tail_bytes) / 2 : 0;
    if (b->kind == DS_ROWS_F32 || job->values.blocks || left <= 0) return;
    const ds_row_table *rows = next < most ? &job->keys : &job->next;
    row_runs_of(rows, next < most ? next : 0, left < size ? left : size, 0, &b->next);
}

void DS_OF(attend)(const ds_attend *job) {
    const ds_row_kind kind = job->keys.layout.kind;
    const int n_rows = ds_attend_pad(job->n_rows), size = kind == DS_ROWS_Q8 ? DS_ATTEND_BLOCK_Q8 : DS_ATTEND_BLOCK;
    attend_block b;
    b.next.n = 0;
    b.job = job;
    b.kind = job->values.blocks ? job->values.layout.kind : kind;
    b.q = query_at(kind, n_rows, job->n, job->n_tail, job->q);
    b.n_rows = n_rows;
    b.share = kind == DS_ROWS_Q8 ? DS_ATTEND_SHARE : size;
    b.scores = job->scratch;
    b.keep = b.scores + (size_t)size * (size_t)n_rows;
    b.gain = b.keep + n_rows;
    int least, most;
    attend_limits(job, &least, &most);
    for (int at = 0; at < most; at += size) {
        attend_enter(&b, at, most - at < size ? most - at : size);
        attend_look_ahead(&b, at, most, size);
        b.visible = least < at + b.n ? job->visible : NULL;
        attend_scores(&b);
        for (int lane = 0; lane < n_rows; lane += DS_LANES) attend_softmax(&b, lane);
        if (b.kind == DS_ROWS_F32) attend_values_f32(&b);
        else if (b.kind == DS_ROWS_Q8) attend_values_q8(&b);
        else attend_values_i16(&b);
    }
}
