/* check_attention.c: rows of the caches, attention over them, and keys and values expanded from them. */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Everything about one comparison: query rows, positions, a key's head and tail, a value's width. */
typedef struct shape {
    ds_row_kind kind;
    int n_rows, n_pos, n, n_tail, v_dim;
} shape;

static const char *const KINDS[] = {[DS_ROWS_F32] = "f32", [DS_ROWS_I16] = "i16", [DS_ROWS_Q8] = "q8_0"};

static ds_rows new_rows(ds_row_kind kind, int n_rows, int n, int n_tail) {
    const ds_row_layout layout = ds_row_layout_of(kind, ds_row_bytes_of(kind, n, n_tail), n_tail, n_rows);
    return ds_rows_at(&layout, buffer(layout.bytes + 64), 0);
}

/* The rows from `first` on as a table of one block. */
static ds_row_table one_block(const ds_rows *rows, int first, int n_tail) {
    unsigned char **blocks = buffer(sizeof *blocks);
    const ds_rows r = ds_rows_from(rows, first, n_tail);
    unsigned char *at = r.data;
    ds_row_table t = {.layout = {.kind = r.kind, .row_bytes = r.row_bytes}, .blocks = blocks, .block_rows = 1 << 20};
    blocks[0] = at;
    if (r.scale) t.layout.scale = (size_t)((unsigned char *)r.scale - at);
    if (r.tail) t.layout.tail_bytes = ds_row_pad(n_tail) * sizeof *r.tail;
    if (r.tail) t.layout.tail = (size_t)((unsigned char *)r.tail - at);
    if (r.tail_scale) t.layout.tail_scale = (size_t)((unsigned char *)r.tail_scale - at);
    if (r.sum) t.layout.sum = (size_t)((unsigned char *)r.sum - at);
    return t;
}

/* Row i, normal but for one value in the head and one in the tail that are most of it: then its scale comes of that
 * value alone, and is the same on every ISA. `alike`: the same scale in all rows. */
static void random_row(const shape *s, int i, bool outlier, bool alike, float *x) {
    for (int j = 0; j < s->n + s->n_tail; j++) x[j] = random_normal();
    if (!outlier) return;
    for (int j = 0; alike && j < s->n + s->n_tail; j++) x[j] = (float)random_int(-8, 8);
    x[i % s->n] = 4096.0f;
    if (s->n_tail) x[s->n + i % s->n_tail] = alike ? 1024.0f : 4096.0f;
}

static ds_rows random_rows(const ds_kernels *table, const shape *s, int n_rows, bool outlier, bool alike) {
    const ds_rows rows = new_rows(s->kind, n_rows, s->n, s->n_tail);
    float *x = buffer((size_t)(s->n + s->n_tail) * sizeof *x);
    for (int i = 0; i < n_rows; i++) {
        random_row(s, i, outlier, alike, x);
        table->rows_put(&rows, i, s->n, s->n_tail, x);
    }
    return rows;
}

static void check_rotation(check *c) {
    static const int LENGTHS[] = {1, 3, 4, 8, 12, 22, 64, 96, 512, 640};
    for (size_t i = 0; i < sizeof LENGTHS / sizeof *LENGTHS; i++) {
        const size_t n = (size_t)LENGTHS[i];
        float *got = buffer(n * sizeof *got), *want = buffer(n * sizeof *want);
        for (size_t j = 0; j < n; j++) got[j] = want[j] = random_normal();
        c->isa->rotate((int)n, got);
        c->scalar->rotate((int)n, want);
        strcpy(c->what, "rotation");
        same_floats(c, "rotate", n, got, want);
    }
    release();
}

static void check_packing(check *c, const shape *s) {
    float *x = buffer((size_t)(s->n + s->n_tail) * sizeof *x), *y = buffer((size_t)(s->n + s->n_tail) * sizeof *y);
    const ds_rows got = new_rows(s->kind, s->n_pos, s->n, s->n_tail),
                  want = new_rows(s->kind, s->n_pos, s->n, s->n_tail);
    const size_t n_pos = (size_t)s->n_pos;
    for (int i = 0; i < s->n_pos; i++) {
        random_row(s, i, true, false, x);
        memcpy(y, x, (size_t)(s->n + s->n_tail) * sizeof *y);
        c->isa->rows_put(&got, i, s->n, s->n_tail, x);
        c->scalar->rows_put(&want, i, s->n, s->n_tail, y);
    }
    same_bytes(c, "rows", n_pos * got.row_bytes, got.data, want.data);
    if (s->kind != DS_ROWS_F32) same_floats(c, "scales of rows", n_pos, got.scale, want.scale);
    if (s->kind != DS_ROWS_Q8) return;
    same_bytes(c, "tails", n_pos * ds_row_pad(s->n_tail) * sizeof(int16_t), got.tail, want.tail);
    same_floats(c, "scales of tails", s->n_tail ? n_pos : 0, got.tail_scale, want.tail_scale);
    same_bytes(c, "sums of rows", n_pos * sizeof(int32_t), got.sum, want.sum);
}

typedef struct outcome {
    float *m, *l, *acc; /* (n_rows), (n_rows), (n_rows, v_dim padded) */
    size_t ld;
} outcome;

/* Queries (n_rows, n + n_tail) over positions [first, first + n_pos) of the keys. */
static outcome attend(const ds_kernels *table, const shape *s, const float *queries, float scale, const ds_rows *keys,
                      const ds_rows *values, int first, int n_pos, const int32_t *visible) {
    const int n_rows = ds_attend_pad(s->n_rows), width = s->n + s->n_tail;
    outcome o = {.ld = ds_row_pad(s->v_dim)};
    o.m = buffer((size_t)n_rows * sizeof(float));
    o.l = buffer((size_t)n_rows * sizeof(float));
    o.acc = buffer((size_t)n_rows * o.ld * sizeof(float));
    void *pack = buffer(ds_query_bytes(s->kind, n_rows, s->n, s->n_tail));
    float *x = buffer((size_t)width * sizeof *x);
    for (int i = 0; i < n_rows; i++) {
        o.m[i] = -INFINITY;
        if (i < s->n_rows) memcpy(x, queries + (size_t)i * (size_t)width, (size_t)width * sizeof *x);
        else memset(x, 0, (size_t)width * sizeof *x);
        table->query_put(s->kind, i, n_rows, s->n, s->n_tail, x, scale, pack);
    }
    ds_attend job = {.n_rows = s->n_rows,
                     .n_pos = n_pos,
                     .n = s->n,
                     .n_tail = s->n_tail,
                     .v_dim = s->v_dim,
                     .q = pack,
                     .keys = one_block(keys, first, s->n_tail),
                     .visible = visible,
                     .first_pos = first,
                     .m = o.m,
                     .l = o.l,
                     .acc = o.acc,
                     .ld_acc = o.ld,
                     .scratch = buffer(ds_attend_scratch(n_rows))};
    if (values) job.values = one_block(values, 0, 0);
    table->attend(&job);
    return o;
}

static float *random_queries(const shape *s, bool outlier) {
    const size_t width = (size_t)(s->n + s->n_tail);
    float *q = buffer((size_t)s->n_rows * width * sizeof *q);
    for (int i = 0; i < s->n_rows; i++) random_row(s, i, outlier, false, q + (size_t)i * width);
    return q;
}

/* One position at a time the maximum is the score: integer sums times scales, the same bits on every ISA. Over Q8 rows
 * of the heads alone: tails are added to them, fused or not, and are what I16 rows are. */
static void check_scores(check *c, const shape *of) {
    shape alone = *of;
    if (of->kind == DS_ROWS_Q8) alone.n_tail = 0;
    const shape *s = &alone;
    const ds_rows keys = random_rows(c->scalar, s, s->n_pos, true, false);
    const float *q = random_queries(s, true);
    for (int i = 0; i < s->n_pos && i < 40; i++) {
        const outcome got = attend(c->isa, s, q, 1e-8f, &keys, NULL, i, 1, NULL);
        const outcome want = attend(c->scalar, s, q, 1e-8f, &keys, NULL, i, 1, NULL);
        same_floats(c, "scores", (size_t)s->n_rows, got.m, want.m);
    }
}

/* Queries of zero weigh all positions alike, and rows of one scale then have the same integer weights everywhere: up to
 * a block, sums are the same bits. */
static void check_values(check *c, const shape *s) {
    const ds_rows keys = random_rows(c->scalar, s, s->n_pos, true, true);
    const float *q = buffer((size_t)s->n_rows * (size_t)(s->n + s->n_tail) * sizeof *q);
    for (int n_pos = 1; n_pos <= s->n_pos && n_pos <= (s->kind == DS_ROWS_Q8 ? DS_ATTEND_SHARE : DS_ATTEND_BLOCK);
         n_pos += 21) {
        const outcome got = attend(c->isa, s, q, 1.0f, &keys, NULL, 0, n_pos, NULL);
        const outcome want = attend(c->scalar, s, q, 1.0f, &keys, NULL, 0, n_pos, NULL);
        same_floats(c, "sums of weights", (size_t)s->n_rows, got.l, want.l);
        for (int i = 0; i < s->n_rows; i++)
            same_floats(c, "sums of values", (size_t)s->v_dim, got.acc + (size_t)i * got.ld,
                        want.acc + (size_t)i * want.ld);
    }
}

/* Row i of `rows` as floats, rotated where they are: (width). */
static void row_floats(const ds_rows *rows, int i, int width, float *x) {
    const char *row = (const char *)rows->data + (size_t)i * rows->row_bytes;
    for (int j = 0; j < width; j++) {
        if (rows->kind == DS_ROWS_F32) x[j] = ((const float *)(const void *)row)[j];
        else if (rows->kind == DS_ROWS_I16)
            x[j] = rows->scale[i] * (float)((const int16_t *)(const void *)row)[ds_row_place16(j)];
        else x[j] = rows->scale[i] * (float)((const int8_t *)row)[ds_row_place8(j)];
    }
}

/* Anything at all: weights may come out a step apart, and sums then differ by a step of each weight times its value. */
static void check_attending(check *c, const shape *s, bool causal) {
    const ds_rows keys = random_rows(c->scalar, s, s->n_pos, false, false);
    const shape of_values = {.kind = s->kind, .n = s->v_dim};
    const bool own = s->v_dim > s->n;
    const ds_rows values = own ? random_rows(c->scalar, &of_values, s->n_pos, false, false) : keys;
    const float *q = random_queries(s, false);
    const float scale = 2.0f / (float)(s->n + s->n_tail);
    int32_t *visible = buffer((size_t)ds_attend_pad(s->n_rows) * sizeof *visible);
    for (int i = 0; i < s->n_rows; i++) visible[i] = i * 7 % s->n_pos + 1;
    const int32_t *sees = causal ? visible : NULL;
    const outcome got = attend(c->isa, s, q, scale, &keys, own ? &values : NULL, 0, s->n_pos, sees);
    const outcome want = attend(c->scalar, s, q, scale, &keys, own ? &values : NULL, 0, s->n_pos, sees);
    const size_t n_rows = (size_t)s->n_rows;
    double *bound = buffer((n_rows + (size_t)s->v_dim) * sizeof *bound);
    /* Queries' scales differ by a rounding or two; their integers then by one step here and there. */
    for (size_t i = 0; i < n_rows; i++)
        bound[i] = (s->kind == DS_ROWS_F32 ? 1e-5 : 1e-3) * (1 + fabs((double)want.m[i]));
    close_floats(c, "maxima", n_rows, got.m, want.m, bound);
    for (size_t i = 0; i < n_rows; i++) bound[i] = (s->kind == DS_ROWS_F32 ? 1e-5 : 2e-3) * want.l[i];
    close_floats(c, "sums of weights", n_rows, got.l, want.l, bound);
    float *size = buffer((size_t)s->v_dim * sizeof *size), *x = buffer((size_t)s->v_dim * sizeof *x);
    for (int i = 0; i < s->n_rows; i++) {
        const int n_pos = causal ? visible[i] : s->n_pos;
        memset(size, 0, (size_t)s->v_dim * sizeof *size);
        for (int j = 0; j < n_pos; j++) {
            row_floats(&values, j, s->v_dim, x);
            for (int d = 0; d < s->v_dim; d++) size[d] += fabsf(x[d]);
        }
        const double step = s->kind == DS_ROWS_F32   ? 1e-5
                            : s->kind == DS_ROWS_I16 ? n_pos / 32700.0 + 3e-3
                                                     : 1 / 255.0 + 3e-3;
        for (int d = 0; d < s->v_dim; d++) bound[d] = step * size[d] + 1e-6;
        close_floats(c, causal ? "values, causal" : "values", (size_t)s->v_dim, got.acc + (size_t)i * got.ld,
                     want.acc + (size_t)i * want.ld, bound);
    }
}

/* Keys and values of one head: packed rows may come out a step apart. */
static void check_expansion(check *c, ds_row_kind kind, int rank, int n_tail, int k_dim, int v_dim, int n_pos) {
    const shape latent = {.kind = kind, .n = rank, .n_tail = n_tail};
    const ds_rows latents = random_rows(c->scalar, &latent, n_pos, false, false);
    const size_t n_k = (size_t)rank * (size_t)k_dim, n_v = (size_t)rank * (size_t)v_dim;
    float *weights = buffer((n_k + n_v) * sizeof *weights);
    for (size_t i = 0; i < n_k + n_v; i++) weights[i] = random_normal();
    ds_expand jobs[2];
    for (int which = 0; which < 2; which++) {
        const ds_kernels *table = which ? c->scalar : c->isa;
        float *k_b = buffer(n_k * sizeof *k_b), *v_b = buffer(n_v * sizeof *v_b);
        memcpy(k_b, weights, n_k * sizeof *k_b);
        memcpy(v_b, weights + n_k, n_v * sizeof *v_b);
        void *pack = buffer(ds_expand_weights_bytes(kind, rank, k_dim, v_dim));
        const ds_expand_weights put = {.from = kind,
                                       .rank = rank,
                                       .k_dim = k_dim,
                                       .v_dim = v_dim,
                                       .k_b = k_b,
                                       .v_b = v_b,
                                       .scratch = buffer(DS_ATTEND_ROWS * (size_t)rank * sizeof(float)),
                                       .out = pack};
        table->expand_weights(&put);
        ds_expand *job = &jobs[which];
        *job = (ds_expand){.n_pos = n_pos,
                           .rank = rank,
                           .n_tail = n_tail,
                           .k_dim = k_dim,
                           .v_dim = v_dim,
                           .weights = pack,
                           .latents = one_block(&latents, 0, n_tail),
                           .scratch = buffer(ds_expand_scratch(kind, k_dim, n_tail, v_dim) + 64)};
        const size_t ld = ds_expand_ld(k_dim, n_tail, v_dim);
        job->keys = new_rows(kind, n_pos, kind == DS_ROWS_F32 ? (int)ld : k_dim, kind == DS_ROWS_F32 ? 0 : n_tail);
        job->values = new_rows(kind, n_pos, kind == DS_ROWS_F32 ? (int)ld : v_dim, 0);
        table->expand(job);
    }
    const size_t most = (size_t)(k_dim + n_tail > v_dim ? k_dim + n_tail : v_dim);
    float *got = buffer(most * sizeof *got), *want = buffer(most * sizeof *want);
    double *bound = buffer(most * sizeof *bound);
    for (int i = 0; i < n_pos; i++)
        for (int values = 0; values < 2; values++) {
            const ds_rows *a = values ? &jobs[0].values : &jobs[0].keys, *b = values ? &jobs[1].values : &jobs[1].keys;
            const int width = values ? v_dim : kind == DS_ROWS_Q8 ? k_dim : k_dim + n_tail;
            row_floats(a, i, width, got);
            row_floats(b, i, width, want);
            const double step = kind == DS_ROWS_F32 ? 1e-4 : 1.01 * b->scale[i] + 1e-3;
            for (int j = 0; j < width; j++) bound[j] = step + 1e-4 * fabs((double)want[j]);
            close_floats(c, values ? "expanded values" : "expanded keys", (size_t)width, got, want, bound);
        }
}

void check_attention(check *c) {
    static const shape SHAPES[] = {
        {.n_rows = 1, .n_pos = 1, .n = 8, .n_tail = 0, .v_dim = 8},
        {.n_rows = 3, .n_pos = 70, .n = 32, .n_tail = 8, .v_dim = 32},
        {.n_rows = 16, .n_pos = 300, .n = 512, .n_tail = 64, .v_dim = 512},
        {.n_rows = 5, .n_pos = 19, .n = 36, .n_tail = 6, .v_dim = 36},
        {.n_rows = 33, .n_pos = 257, .n = 64, .n_tail = 8, .v_dim = 64},
        {.n_rows = 17, .n_pos = 140, .n = 30, .n_tail = 0, .v_dim = 40},
    };
    check_rotation(c);
    for (int kind = DS_ROWS_F32; kind <= DS_ROWS_Q8; kind++) {
        for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
            shape s = SHAPES[i];
            s.kind = (ds_row_kind)kind;
            snprintf(c->what, sizeof c->what, "attention, %s, %d rows, %d positions, %d + %d", KINDS[kind], s.n_rows,
                     s.n_pos, s.n, s.n_tail);
            check_packing(c, &s);
            release();
            if (kind != DS_ROWS_F32) check_scores(c, &s);
            release();
            if (kind != DS_ROWS_F32 && s.v_dim <= s.n) check_values(c, &s);
            release();
            check_attending(c, &s, false);
            check_attending(c, &s, true);
            release();
        }
        snprintf(c->what, sizeof c->what, "expansion, %s", KINDS[kind]);
        check_expansion(c, (ds_row_kind)kind, 96, 8, 40, 24, 13);
        check_expansion(c, (ds_row_kind)kind, 512, 64, 128, 128, 33);
        release();
    }
}
