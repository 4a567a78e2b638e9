/* attend_rows.h: rows of latents, keys, values and queries as the products of attention want them, and the product of
 * rows with a panel (columns side by side, DS_LANES to a vector). */
#pragma once

enum {
    ROW_ORDER16 = 32,        /* values of an int16 row that are put in order together */
    ROW_ORDER8 = 64,         /* and of an int8 row */
    ROW_COLS = 2 * DS_LANES, /* columns of a panel that a tile takes at a time */
};

/* A row of length 46300 takes 23 bits of a 31-bit product with another: the square root of 2^31 is 46341, and rounding
 * to a half and to an integer may add 24 and 16. */
#define ROW_NORM 46300.0f
#define ROW_MAX 32700.0f

/* ---- Rotation ---- */

/* One stage of a Walsh-Hadamard transform: sums and differences of values `half` apart. */
DS_INLINE void rotate_stage(int n, int half, float *x) {
    for (int i = 0; i < n; i += 2 * half)
        for (int j = i; j < i + half; j += DS_LANES <= half ? DS_LANES : 1) {
            if (DS_LANES <= half) {
                const vf a = vf_load(x + j), b = vf_load(x + j + half);
                vf_store(x + j, vf_add(a, b));
                vf_store(x + j + half, vf_sub(a, b));
            } else {
                const float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
        }
}

/* The stages below DS_LANES, of up to DS_LANES vectors of x: in columns they need no shuffles of their own. */
DS_INLINE void rotate_lanes(int n_vecs, float *x) {
    vf v[DS_LANES];
    DS_UNROLL
    for (int i = 0; i < DS_LANES; i++) v[i] = i < n_vecs ? vf_load(x + i * DS_LANES) : vf_set(0.0f);
    vf_transpose(v);
    DS_UNROLL
    for (int half = 1; half < DS_LANES; half *= 2) {
        DS_UNROLL
        for (int i = 0; i < DS_LANES; i++) {
            if (i & half) continue;
            const vf a = v[i], b = v[i + half];
            v[i] = vf_add(a, b);
            v[i + half] = vf_sub(a, b);
        }
    }
    vf_transpose(v);
    DS_UNROLL
    for (int i = 0; i < DS_LANES; i++)
        if (i < n_vecs) vf_store(x + i * DS_LANES, v[i]);
}

/* x times an orthogonal and symmetric matrix: Walsh-Hadamard over blocks of the largest power of two in n. An outlier
 * spreads over its block, so that one scale serves a whole row; twice is the identity. */
void DS_OF(rotate)(int n, float *x) {
    const int block = n & -n, n_vecs = n / DS_LANES, done = block >= DS_LANES ? DS_LANES : 1;
    for (int i = 0; i < n_vecs && done > 1; i += DS_LANES)
        rotate_lanes(n_vecs - i < DS_LANES ? n_vecs - i : DS_LANES, x + i * DS_LANES);
    for (int half = done; half < block; half *= 2) rotate_stage(n, half, x);
    scale_row(n, 1.0f / sqrtf((float)block), x);
}

/* ---- Packing ---- */

/* The largest |x|. NaN is passed over. */
DS_INLINE float row_abs_max(int n, const float *x) {
    vf top = vf_set(0.0f), bottom = vf_set(0.0f);
    DS_FOR_LANES(
        i, n,
        {
            top = vf_max(vf_load(x + i), top);
            bottom = vf_min(vf_load(x + i), bottom);
        },
        {
            top = vf_max(vf_load_n(x + i, n - i), top);
            bottom = vf_min(vf_load_n(x + i, n - i), bottom);
        });
    return vf_hmax(vf_max(top, vf_sub(vf_set(0.0f), bottom)));
}

DS_INLINE float row_norm(int n, const float *x) {
    vf squares = vf_set(0.0f);
    DS_FOR_LANES(
        i, n, { squares = vf_fma(vf_load(x + i), vf_load(x + i), squares); },
        { squares = vf_fma(vf_load_n(x + i, n - i), vf_load_n(x + i, n - i), squares); });
    return sqrtf(vf_sum(squares));
}

/* The scale at which x becomes a row of int16; 0 for a row of zeros. NaN stays NaN. */
DS_INLINE float i16_scale(int n, const float *x) {
    const float of_max = row_abs_max(n, x) / ROW_MAX, of_norm = row_norm(n, x) / ROW_NORM;
    const float scale = of_max > of_norm ? of_max : of_norm;
    return scale < 0x1p-100f ? 0.0f : scale;
}

DS_INLINE float row_inverse(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

/* Values [i, i + 32) of x (n), zeros past its end, as int16. */
DS_INLINE void i16_pack_part(int n, int i, const float *x, float inverse, int16_t out[ROW_ORDER16]) {
    if (i + ROW_ORDER16 <= n) {
        i16_pack32(x + i, inverse, out);
        return;
    }
    float part[ROW_ORDER16] = {0};
    if (i < n) memcpy(part, x + i, (size_t)(n - i) * sizeof *part);
    i16_pack32(part, inverse, out);
}

/* x (n) as a padded row of int16; returns its scale. */
DS_INLINE float i16_put(int n, const float *x, int16_t *out) {
    const float scale = i16_scale(n, x), inverse = row_inverse(scale);
    for (size_t i = 0; i < ds_row_pad(n); i += ROW_ORDER16) i16_pack_part(n, (int)i, x, inverse, out + i);
    return scale;
}

DS_INLINE float i8_scale(int n, const float *x) {
    const float max = row_abs_max(n, x);
    return max < 0x1p-100f ? 0.0f : max / 127.0f;
}

/* Values [i, i + 64) of x (n), zeros past its end, as int8. */
DS_INLINE void i8_pack_part(int n, int i, const float *x, float inverse, int8_t out[ROW_ORDER8]) {
    if (i + ROW_ORDER8 <= n) {
        i8_pack64(x + i, inverse, out);
        return;
    }
    float part[ROW_ORDER8] = {0};
    memcpy(part, x + i, (size_t)(n - i) * sizeof *part);
    i8_pack64(part, inverse, out);
}

/* The head of row i in int8, of x (n) already rotated. */
DS_INLINE void rows_put_head(const ds_rows *rows, int i, int n, const float *x) {
    int8_t *row = (int8_t *)rows->data + (size_t)i * rows->row_bytes;
    const float scale = rows->scale[i] = i8_scale(n, x), inverse = row_inverse(scale);
    int32_t sum = 0;
    for (int at = 0; at < n; at += ROW_ORDER8) i8_pack_part(n, at, x, inverse, row + at);
    for (size_t at = 0; at < ds_row_pad(n); at++) sum += row[at];
    rows->sum[i] = sum;
}

/* Store x (n + n_tail) as row i; x is overwritten where rows are rotated. */
void DS_OF(rows_put)(const ds_rows *rows, int i, int n, int n_tail, float *x) {
    char *row = (char *)rows->data + (size_t)i * rows->row_bytes;
    if (rows->kind == DS_ROWS_F32) {
        memcpy(row, x, (size_t)(n + n_tail) * sizeof *x);
    } else if (rows->kind == DS_ROWS_I16) {
        rows->scale[i] = i16_put(n + n_tail, x, (int16_t *)(void *)row);
    } else {
        DS_OF(rotate)(n, x);
        rows_put_head(rows, i, n, x);
        rows->tail_scale[i] = i16_put(n_tail, x + n, rows->tail + (size_t)i * ds_row_pad(n_tail));
    }
}

/* ---- Panels: columns of dwords, in groups of ROW_COLS ----
 *
 * A last group of DS_LANES columns would leave a tile one vector of columns for each broadcast dword. Where the ISA can
 * broadcast four dwords (DS_FOURS), such a group is kept in fours, neighbouring dwords of a column side by side, so that
 * four vectors of a quarter of the columns each share a broadcast. */

/* Where dword i of a column of k dwords lies in a panel of n_cols columns. */
DS_INLINE size_t panel_place(bool fours, int k, int n_cols, int col, int i) {
    const int group = col / ROW_COLS * ROW_COLS, c = col - group;
    const size_t base = (size_t)group * (size_t)k;
    if (n_cols - group >= ROW_COLS) return base + (size_t)(i * ROW_COLS + c);
    if (!fours) return base + (size_t)(i * DS_LANES + c);
    return base + (size_t)((i / 4 * 4 + c % 4) * DS_LANES + c / 4 * 4 + i % 4); /* vi_join_fours sets them in order */
}

DS_INLINE void panel_put_f32(int n, int n_cols, int col, const float *x, uint32_t *panel) {
    for (int i = 0; i < n; i++) memcpy(panel + panel_place(false, n, n_cols, col, i), x + i, sizeof *x);
}

DS_INLINE float panel_put_i16(int n, int n_cols, int col, const float *x, uint32_t *panel) {
    const int n_pad = (int)ds_row_pad(n);
    const float scale = i16_scale(n, x), inverse = row_inverse(scale);
    for (int i = 0; i < n_pad; i += ROW_ORDER16) {
        int16_t part[ROW_ORDER16];
        i16_pack_part(n, i, x, inverse, part);
        DS_UNROLL
        for (int j = 0; j < ROW_ORDER16; j += 2)
            i16_put_pair(panel, panel_place(DS_FOURS, n_pad / 2, n_cols, col, (i + j) / 2), part + j);
    }
    return scale;
}

DS_INLINE float panel_put_i8(int n, int n_cols, int col, const float *x, uint32_t *panel) {
    const int k = (int)ds_row_pad(n) / 4;
    const float scale = i8_scale(n, x), inverse = row_inverse(scale);
    for (int i = 0; i < n; i += ROW_ORDER8) {
        int8_t part[ROW_ORDER8];
        i8_pack_part(n, i, x, inverse, part);
        DS_UNROLL
        for (int j = 0; j < ROW_ORDER8; j += 4) {
            uint32_t four;
            memcpy(&four, part + j, sizeof four);
            panel[panel_place(DS_FOURS, k, n_cols, col, (i + j) / 4)] = four ^ DS_BYTES(DS_QUERY_BIAS);
        }
    }
    return scale;
}

/* ---- Rows times a panel ---- */

/* What a dword holds, and which dot it takes. */
typedef enum dot_type {
    DOT_F32,     /* a float */
    DOT_I16,     /* two int16 */
    DOT_QUERY,   /* four int8 of a row, four of a query */
    DOT_WEIGHTS, /* four unsigned weights, four int8 of rows */
} dot_type;

/* sums[v] + a . b[v], where a is a dword for all lanes: broadcast once, for loads are as scarce as dots. */
DS_INLINE void dot_vecs(dot_type type, int vecs, vi *sums, vi_dword a, const vi *b) {
    DS_UNROLL
    for (int v = 0; v < vecs; v++) {
        if (type == DOT_F32) sums[v] = vf_as_int(vf_fma(vi_dword_as_float(a), vi_as_float(b[v]), vi_as_float(sums[v])));
        else if (type == DOT_I16) sums[v] = vi_dot16(sums[v], b[v], a);
        else if (type == DOT_QUERY) sums[v] = vi_dot_query(sums[v], b[v], a);
        else sums[v] = vi_dot_weights(sums[v], a, b[v]);
    }
}

/* Rows [at, at + n) of a table, block by block. */
typedef struct row_runs {
    int n;
    struct {
        ds_rows rows;
        int n, at; /* rows that lie together, behind `at` others */
    } run[DS_ATTEND_BLOCK_Q8 / DS_ROW_PAD];
    ds_rows next; /* those behind the last; the first again where that is the table's last in use */
} row_runs;

/* Of a table that holds `end` rows; n is at most DS_ATTEND_BLOCK_Q8, and at a multiple of what stands before it. */
DS_INLINE void row_runs_of(const ds_row_table *t, int at, int n, int end, row_runs *out) {
    out->n = 0;
    for (int i = 0; i < n; i += out->run[out->n++].n) {
        out->run[out->n].rows = ds_table_rows(t, at + i);
        out->run[out->n].n = ds_table_run(t, at + i, at + n);
        out->run[out->n].at = i;
    }
    out->next = ds_table_rows(t, at + n < end ? at + n : at);
}

/* out (rows, ld) = row_scale[i] * col_scale[c] * row i . column c */
typedef struct row_product {
    const row_runs *rows;
    bool tail; /* their tails, in place of their data */
    int k;     /* dwords of each */
    const uint32_t *panel;  /* (k, n_cols) in groups */
    const float *col_scale; /* (n_cols) */
    int n_cols;             /* a multiple of 2 DS_LANES, or of DS_LANES */
    float *out;
    size_t ld;
    int lead; /* rows are brought into cache as many rows ahead of their turn; 0: not at all */
    bool within; /* of these rows alone: somebody else brings those behind them */
    const row_runs *next; /* NULL, or rows that are brought there instead, run by run: */
    size_t next_bytes;    /* so many bytes a row, from the run's start */
} row_product;

/* One run of a product's rows. */
typedef struct row_part {
    int n;
    const char *rows, *next; /* next: NULL where nothing is to be brought into cache */
    size_t row_bytes, next_bytes;
    int lead;
    const float *scale; /* (n), or NULL: 1 */
    const int32_t *sum; /* (n) sums of the rows' values, where queries carry a bias */
    float *out;
} row_part;

DS_INLINE row_part row_part_of(const row_product *p, int i) {
    const ds_rows *rows = &p->rows->run[i].rows,
                  *next = i + 1 < p->rows->n ? &p->rows->run[i + 1].rows : &p->rows->next;
    row_part part = {.n = p->rows->run[i].n, .out = p->out + (size_t)p->rows->run[i].at * p->ld};
    if (p->tail) {
        part.rows = (const char *)rows->tail, part.next = (const char *)next->tail;
        part.row_bytes = (size_t)p->k * 4, part.scale = rows->tail_scale;
    } else {
        part.rows = rows->data, part.next = next->data;
        part.row_bytes = rows->row_bytes, part.scale = rows->scale, part.sum = rows->sum;
    }
    part.lead = p->lead, part.next_bytes = part.row_bytes;
    if (p->within && i + 1 == p->rows->n) part.next = NULL;
    if (p->next) {
        part.next = i < p->next->n ? p->next->run[i].rows.data : NULL;
        part.lead = part.n, part.next_bytes = p->next_bytes;
    }
    return part;
}

/* Sums of a tile, scaled and stored, or added to what is there. */
DS_INLINE void product_store(dot_type type, bool add, int rows, int vecs, const row_product *p, const row_part *part,
                             int row, int col, vi sums[2 * DS_ROW_TILE][4]) {
    const float *row_scale = part->scale ? part->scale + row : NULL;
    const size_t ld = p->ld;
    float *out = part->out + (size_t)row * ld + (size_t)col;
    vf col_scale[2];
    DS_UNROLL
    for (int v = 0; v < vecs; v++) col_scale[v] = vf_load(p->col_scale + col + v * DS_LANES);
    DS_UNROLL
    for (int i = 0; i < rows; i++, out += ld) {
        DS_UNROLL
        for (int v = 0; v < vecs; v++) {
            const vf x = type == DOT_F32 ? vi_as_float(sums[i][v]) : vi_to_float(sums[i][v]);
            const vf scale = type == DOT_F32 && !row_scale ? col_scale[v] : vf_mul(col_scale[v], vf_set(row_scale[i]));
            vf_store(out + v * DS_LANES, add ? vf_fma(x, scale, vf_load(out + v * DS_LANES)) : vf_mul(x, scale));
        }
    }
}

/* What the bias of queries adds to a row's sums, taken off. */
DS_INLINE vi product_start(dot_type type, const row_part *part, int row) {
    return vi_set(type == DOT_QUERY && DS_QUERY_BIAS != 0 ? (uint32_t)-DS_QUERY_BIAS * (uint32_t)part->sum[row] : 0);
}

/* rows by vecs vectors of columns (constants); fours: four vectors that become one. */
DS_INLINE void product_tile(dot_type type, bool add, bool fours, int rows, int vecs, const row_product *p,
                            const row_part *part, int row, int col, const uint32_t *b) {
    vi sums[2 * DS_ROW_TILE][4];
    const size_t row_bytes = part->row_bytes;
    const char *a = part->rows + (size_t)row * row_bytes;
    const int n = fours ? p->k / 4 : p->k;
    DS_UNROLL
    for (int i = 0; i < rows; i++)
        DS_UNROLL for (int v = 0; v < vecs; v++) sums[i][v] = fours ? vi_set(0) : product_start(type, part, row + i);
    /* The tile's share of what is to come, spread evenly; without any, one line again and again. */
    const int to = row + part->lead;
    const bool here = to < part->n, any = part->lead && (here || part->next);
    const char *ahead = here || !any ? part->rows + (size_t)(any ? to : row) * row_bytes
                                     : part->next + (size_t)(to - part->n) * part->next_bytes;
    const size_t step = any ? (size_t)rows * (here ? row_bytes : part->next_bytes) / (size_t)n : 0;
    for (int k = 0; k < n; k++, a += fours ? 16 : 4, b += vecs * DS_LANES, ahead += step) {
        __builtin_prefetch(ahead, 0, 2); /* into L2: in L1 it would push out the panel */
        vi columns[4];
        DS_UNROLL
        for (int v = 0; v < vecs; v++) columns[v] = vi_load(b + v * DS_LANES);
        DS_UNROLL
        for (int i = 0; i < rows; i++) {
            const char *at = a + (size_t)i * row_bytes;
            dot_vecs(type, vecs, sums[i], fours ? vi_four_dwords_load(at) : vi_dword_load(at), columns);
        }
    }
    DS_UNROLL
    for (int i = 0; i < rows; i++)
        if (fours) sums[i][0] = vi_add(vi_join_fours(sums[i]), product_start(type, part, row + i));
    product_store(type, add, rows, fours ? 1 : vecs, p, part, row, col, sums);
}

/* All columns of one group against all rows: whole tiles, then single rows. */
DS_INLINE void product_group(dot_type type, bool add, bool fours, int vecs, const row_product *p, int col) {
    const int tile = 2 * DS_ROW_TILE / vecs;
    const uint32_t *panel = p->panel + (size_t)col * (size_t)p->k;
    for (int i = 0; i < p->rows->n; i++) {
        const row_part part = row_part_of(p, i);
        int row = 0;
        for (; row + tile <= part.n; row += tile) product_tile(type, add, fours, tile, vecs, p, &part, row, col, panel);
        for (; row < part.n; row++) product_tile(type, add, fours, 1, vecs, p, &part, row, col, panel);
    }
}

DS_INLINE void product(dot_type type, bool add, const row_product *p) {
    const bool fours = DS_FOURS && type != DOT_F32;
    for (int col = 0; col < p->n_cols; col += ROW_COLS) {
        if (p->n_cols - col >= ROW_COLS) product_group(type, add, false, 2, p, col);
        else if (fours) product_group(type, add, true, 4, p, col);
        else product_group(type, add, false, 1, p, col);
    }
}

static void product_f32(const row_product *p) { product(DOT_F32, false, p); }
static void product_i16(const row_product *p) { product(DOT_I16, false, p); }
static void product_i16_add(const row_product *p) { product(DOT_I16, true, p); }
static void product_query(const row_product *p) { product(DOT_QUERY, false, p); }
