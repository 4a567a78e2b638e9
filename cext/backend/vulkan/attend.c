/* attend.c: latent attention of tokens together, absorbed (backend/cpu/latent_attend.c has the equations): queries
 * over the latents, the positions of few tokens shared out among workgroups and joined.
 *
 * Prompts whose keys and values are not made first (expand.c) take matrix units where there are any, over caches that keep 16 bits or fewer: in halves, whose 11 bits each are
 * about what those hold. A cache of floats is there for who wants them kept, and is read in floats. */
#include "backend/vulkan/attend.h"

/* The product of each head with its matrix: x and y (n_tok, n_head, ...), head h at x_at and y_at floats of its own. */
static ds_gpu_product by_heads(const ds_gpu_backend *b, const ds_mat *m, uint64_t w, uint64_t x, int x_head, uint64_t y,
                               int y_head, int n) {
    const int n_head = b->facts.config->n_head;
    return (ds_gpu_product){.w = w,
                            .x = x,
                            .y = y,
                            .tables = b->w.tables,
                            .stride_w = m->stride,
                            .stride_x = (uint32_t)x_head,
                            .stride_y = (uint32_t)y_head,
                            .ldx = (uint32_t)(n_head * x_head),
                            .ldy = (uint32_t)(n_head * y_head),
                            .row_bytes = (uint32_t)m->row_bytes,
                            .k = (uint32_t)m->k,
                            .rows = (uint32_t)m->rows,
                            .n_slots = (uint32_t)n};
}

/* Values of a row as the cache keeps them: all, of the head that has a scale of its own, and of those that are values; and
 * of a query, 0 behind the row's. */
typedef struct widths {
    uint32_t all, head, v, query;
} widths;

static widths widths_of(const ds_config *c, uint32_t kind) {
    const uint32_t rank = (uint32_t)c->kv_lora_rank, tail = (uint32_t)c->rope_dim;
    if (kind == DS_ROWS_F32) return (widths){rank + tail, rank + tail, rank, rank + tail};
    if (kind == DS_ROWS_I16) {
        const uint32_t all = (uint32_t)ds_row_pad((int)(rank + tail));
        return (widths){all, all, ds_gpu_whole(rank, 32), all};
    }
    const uint32_t head = (uint32_t)ds_row_pad((int)rank), all = head + (uint32_t)ds_row_pad((int)tail);
    return (widths){all, head, head, all};
}

/* ---- In halves ---- */

/* As latent_coop.comp has them; what a subgroup's registers hold of sums and queries. */
enum { SUBGROUPS = 8, ROWS = 32, TAKEN = 16, MOST_VALUES = 512, MOST_WIDTH = 640, MOST_THREADS = 256 };

/* Bytes that a workgroup shares. */
static uint32_t shared_bytes(const ds_gpu_info *d, uint32_t width, uint32_t v) {
    const uint32_t key = (width > v ? width : v) + 8;
    return TAKEN * key * 2 + SUBGROUPS * d->coop[0] * d->coop[1] * 4 + ROWS * (TAKEN + 1) * 4 + ROWS * (TAKEN + 8) * 2 +
           ROWS * 4 * 4;
}

/* Whether the device's matrices fit the shader, and the model's rows its registers and memory; then the constants of it. */
static bool takes_halves(const ds_gpu_backend *b, uint32_t kind, uint32_t specs[6]) {
    const ds_gpu_info *d = ds_gpu_told(b->gpu);
    const uint32_t m = d->coop[0], n = d->coop[1], k = d->coop[2], split = SUBGROUPS * m * n / (ROWS * TAKEN);
    if (!m || kind == DS_ROWS_F32 || SUBGROUPS * d->subgroup > MOST_THREADS) return false;
    if (ROWS % m || TAKEN % n || TAKEN % k || !split || SUBGROUPS * m * n % (ROWS * TAKEN)) return false;
    const widths w = widths_of(b->facts.config, kind);
    const uint32_t width = ds_gpu_whole(w.all, k * split), v = ds_gpu_whole(w.v, SUBGROUPS * n);
    if (v > MOST_VALUES || width > MOST_WIDTH || shared_bytes(d, width, v) > d->shared_bytes) return false;
    const uint32_t all[] = {SUBGROUPS * d->subgroup, m, n, k, width, v};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) specs[i] = all[i];
    return true;
}

int ds_gpu_attend_together(const ds_gpu_backend *b, int n_tok) {
    const int rows = ds_gpu_told(b->gpu)->coop[0] ? DS_GPU_ATTEND_ROWS / b->facts.config->n_head : 0;
    const int most = rows > DS_GPU_ATTEND_TOKENS ? rows : DS_GPU_ATTEND_TOKENS;
    return n_tok < most ? n_tok : most;
}

int ds_gpu_part_rows(const ds_gpu_backend *b) {
    return DS_GPU_ATTEND_GROUPS * (ds_gpu_told(b->gpu)->coop[0] ? (int)ROWS : (int)DS_GPU_ATTEND_HEADS);
}

/* ---- Both ---- */

/* Parts that positions are cut into, so that a large device has work: of this step alone, so that sums are the same whatever
 * came before it. */
static uint32_t parts_of(const ds_gpu_backend *b, int n, int n_pos, uint32_t groups) {
    const int tiles = (n_pos + 255) / 256, most = ds_gpu_part_rows(b) / (n * b->facts.config->n_head);
    int parts = DS_GPU_ATTEND_GROUPS / (int)groups;
    if (parts > most) parts = most;
    return (uint32_t)(parts < 1 ? 1 : parts < tiles ? parts : tiles);
}

/* Where the queries of the tokens that attend begin, of all of them. */
static uint64_t queries_at(const ds_gpu_backend *b, const ds_gpu_attending *a) {
    const ds_config *c = b->facts.config;
    return b->room.q + (uint64_t)a->begin * (uint64_t)c->n_head * (uint64_t)ds_qk_dim(c) * 4;
}

/* W_uk^T q_nope of each head. */
static ds_status absorb(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_mat *m = &ds_weights_layer(b->facts.weights, op->il)->latent.k_b;
    const ds_gpu_product p = by_heads(b, m, ds_gpu_layer_of(b, op->il)->k_b, queries_at(b, a), ds_qk_dim(c),
                                      b->room.absorbed, c->kv_lora_rank, a->n);
    return ds_gpu_mul(b->gpu, &b->commands, &b->room.halves, m->format, &p, (uint32_t)c->n_head, err);
}

/* A workgroup a head of a token, which shares a row. */
static ds_status by_rows(ds_gpu_backend *b, const char *shader, const ds_gpu_attending *a, const void *push,
                         uint32_t bytes, ds_error *err) {
    const ds_config *c = b->facts.config;
    const uint32_t row = (uint32_t)(c->kv_lora_rank + c->rope_dim);
    vk_Pipeline pipeline;
    const ds_status st = ds_gpu_pipeline(b->gpu, shader, &row, 1, &pipeline, err);
    if (st == DS_OK)
        ds_gpu_dispatch(b->gpu, &b->commands, pipeline, push, bytes, (uint32_t)c->n_head, (uint32_t)a->n, 1);
    return st;
}

static ds_status queries(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, const widths *w, bool halves,
                         ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_gpu_room *m = &b->room;
    const uint64_t from = (uint64_t)a->begin;
    ds_gpu_then(b);
    const struct {
        uint64_t tokens, absorbed, q, angles, to;
        uint32_t kind, rank, nope, n_tail, width;
    } push = {m->tokens[op->tail].at + from * sizeof(ds_gpu_token),
              m->absorbed,
              queries_at(b, a),
              m->angles[op->tail].at + from * (uint64_t)c->rope_dim * 4,
              m->queries,
              ds_gpu_rows_kind(a->store),
              (uint32_t)c->kv_lora_rank,
              (uint32_t)c->nope_dim,
              (uint32_t)c->rope_dim,
              w->query};
    return by_rows(b, halves ? "latent_query_half" : "latent_query", a, &push, 60, err);
}

/* Whether latent_few.comp takes them, which knows no floats and no longer rows. */
static bool are_few(int n, uint32_t kind, const widths *w) {
    return n <= DS_GPU_ATTEND_FEW && kind != DS_ROWS_F32 && w->all <= DS_GPU_FEW_WIDTH;
}

/* Parts of few tokens' positions: a tile each, as long as the device has room for all groups at once. */
static uint32_t parts_of_few(int n_pos, uint32_t groups) {
    const uint32_t parts = DS_GPU_FEW_GROUPS / groups, tiles = ds_gpu_pieces((uint32_t)n_pos, 64);
    return parts < 1 ? 1 : parts < tiles ? parts : tiles;
}

/* How a shader is cut: groups of heads or rows, and parts of what they see. */
typedef struct cut {
    const char *shader;
    uint32_t specs[6];
    int n_specs;
    uint64_t queries; /* what it reads as such */
    uint32_t parts, grid[3];
} cut;

static uint32_t groups_of_heads(const ds_gpu_backend *b) {
    return ds_gpu_pieces((uint32_t)b->facts.config->n_head, DS_GPU_ATTEND_HEADS);
}

/* Of heads a few at a time. */
static cut in_floats(const ds_gpu_backend *b, const ds_gpu_attending *a, const widths *w) {
    static const char *const SHADERS[] = {"latent_attend_f32", "latent_attend_i16", "latent_attend_q8"};
    const uint32_t n = (uint32_t)a->n, each = groups_of_heads(b), parts = parts_of(b, a->n, a->n_pos, n * each);
    return (cut){SHADERS[ds_gpu_rows_kind(a->store)],
                 {ds_gpu_pieces(w->v, DS_GPU_THREADS)},
                 1,
                 b->room.queries,
                 parts,
                 {parts, each, n}};
}

/* The same of few tokens, whose queries are made on the way. */
static cut of_few(const ds_gpu_backend *b, const ds_gpu_attending *a, const widths *w) {
    const bool shorts = ds_gpu_rows_kind(a->store) == DS_ROWS_I16;
    const uint32_t n = (uint32_t)a->n, each = groups_of_heads(b), parts = parts_of_few(a->n_pos, n * each);
    return (cut){shorts ? "latent_few_i16" : "latent_few_q8",
                 {ds_gpu_pieces(w->v, DS_GPU_FEW_VALUES)},
                 1,
                 b->room.absorbed,
                 parts,
                 {parts, each, n}};
}

/* Of rows of queries ROWS at a time; the constants are there. */
static void in_halves(const ds_gpu_backend *b, const ds_gpu_attending *a, cut *out) {
    const uint32_t groups = ds_gpu_pieces((uint32_t)(a->n * b->facts.config->n_head), ROWS);
    out->shader = ds_gpu_rows_kind(a->store) == DS_ROWS_I16 ? "latent_coop_i16" : "latent_coop_q8";
    out->n_specs = 6;
    out->queries = b->room.queries;
    out->parts = parts_of(b, a->n, a->n_pos, groups);
    out->grid[0] = groups, out->grid[1] = out->parts, out->grid[2] = 1;
}

/* Parts of positions, of each head: what the three shaders are told is in the same places. */
static ds_status attend_by(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, const widths *w,
                           const cut *by, ds_error *err) {
    const ds_config *c = b->facts.config;
    const struct {
        uint64_t tokens, queries, q, angles, to;
        uint32_t n_head, rank, nope, n_tail, width, head, v, n_parts, at;
        ds_gpu_layout l;
        uint32_t n_tok;
    } push = {b->room.tokens[op->tail].at + (uint64_t)a->begin * sizeof(ds_gpu_token),
              by->queries,
              queries_at(b, a),
              b->room.angles[op->tail].at + (uint64_t)a->begin * (uint64_t)c->rope_dim * 4,
              b->room.parts,
              (uint32_t)c->n_head,
              (uint32_t)c->kv_lora_rank,
              (uint32_t)c->nope_dim,
              (uint32_t)c->rope_dim,
              w->all,
              w->head,
              w->v,
              by->parts,
              ds_gpu_layer_at(b, a->store, op->il),
              ds_gpu_layout_of(a->store),
              (uint32_t)a->n};
    vk_Pipeline pipeline;
    static_assert(sizeof push == 112, "the same bytes as in shaders/attend.glsl");
    const ds_status st = ds_gpu_pipeline(b->gpu, by->shader, by->specs, by->n_specs, &pipeline, err);
    if (st == DS_OK)
        ds_gpu_dispatch(b->gpu, &b->commands, pipeline, &push, sizeof push, by->grid[0], by->grid[1], by->grid[2]);
    return st;
}

/* The heads' values of a part each, joined, or of several; then W_uv of each head. That of one token joins on the way. */
static ds_status values(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, const widths *w, uint32_t parts,
                        ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_gpu_room *m = &b->room;
    const ds_mat *v_b = &ds_weights_layer(b->facts.weights, op->il)->latent.v_b;
    const uint32_t kind = ds_gpu_rows_kind(a->store), rank = (uint32_t)c->kv_lora_rank;
    const bool joins = a->n == 1 && parts <= DS_GPU_JOIN_PARTS && rank <= DS_GPU_JOIN_VALUES;
    const struct {
        uint64_t parts, to;
        uint32_t kind, rank, v, n_parts;
    } join = {m->parts, m->latent, kind, rank, w->v, parts};
    ds_gpu_product p =
        by_heads(b, v_b, ds_gpu_layer_of(b, op->il)->v_b, m->latent, c->kv_lora_rank,
                 m->heads + (uint64_t)a->begin * (uint64_t)c->n_head * (uint64_t)c->v_dim * 4, c->v_dim, a->n);
    if (joins) {
        p.x = m->parts;
        p.stride_x = parts * (w->v + 2);
        p.usual = parts;
        p.flags = DS_GPU_JOIN * (1 + kind);
    } else {
        const ds_status st = by_rows(b, "latent_join", a, &join, sizeof join, err);
        if (st != DS_OK) return st;
        ds_gpu_then(b);
    }
    return ds_gpu_mul(b->gpu, &b->commands, &b->room.halves, v_b->format, &p, (uint32_t)c->n_head, err);
}

ds_status ds_gpu_attend(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, ds_error *err) {
    const uint32_t kind = ds_gpu_rows_kind(a->store);
    cut by = {0};
    const bool halves = a->alone && takes_halves(b, kind, by.specs);
    widths w = widths_of(b->facts.config, kind);
    if (halves) w.query = by.specs[4];
    const bool few = !halves && are_few(a->n, kind, &w);
    ds_status st = absorb(b, op, a, err);
    if (st == DS_OK && !few) st = queries(b, op, a, &w, halves, err);
    if (st != DS_OK) return st;
    if (halves) in_halves(b, a, &by);
    else by = few ? of_few(b, a, &w) : in_floats(b, a, &w);
    ds_gpu_then(b);
    st = attend_by(b, op, a, &w, &by, err);
    if (st != DS_OK) return st;
    ds_gpu_then(b);
    return values(b, op, a, &w, by.parts, err);
}
