/* expand.c: attention of many tokens of a sequence over keys and values made of the cache's latents for each head: K = W_uk c_kv and
 * V = W_uv c_kv, some positions at a time, by matrix units (backend/cpu/latent_attend.c has the equations and does the same). A pair
 * of a query and a position then takes nope + rope + v multiply-adds of a head, where absorbed ones (attend.c) take 2 rank +
 * rope; what positions cost to make is shared by all tokens. */
#include "backend/vulkan/attend.h"

/* Subgroups of a workgroup, and positions that it takes at a time: of 4 and 8 by 16 and 32 about the same on an H200. What a
 * subgroup's registers hold. */
enum { SUBGROUPS = 4, TAKEN = 32, MOST_VALUES = 128, MOST_WIDTH = 192, LEAST_POS = 256 };

/* How it is cut, and where what lies between is: in the room of what absorbed attention needs. */
typedef struct plan {
    uint32_t taken, width, v;
    int n_tok, n_pos; /* that go together */
    uint64_t queries, transposed, sums, tops, latent, tails, keys, values;
} plan;

static uint32_t shared_bytes(const plan *p, uint32_t m) {
    return p->taken * (p->width + 8 + p->v + 8) * 2 + SUBGROUPS * m * (p->taken * 4 + (p->taken + 8) * 2);
}

static uint64_t carve(uint64_t *at, uint64_t n, uint64_t item) {
    const uint64_t from = *at;
    *at += ds_gpu_padded(n * item);
    return from;
}

/* Bytes of the plan's tokens and positions, which are laid from `at` on. */
static uint64_t lay(const ds_config *c, uint32_t rows, uint64_t at, plan *p) {
    const uint64_t heads = (uint64_t)c->n_head, n_pos = (uint64_t)p->n_pos, rank = (uint64_t)c->kv_lora_rank,
                   n = ds_gpu_whole((uint32_t)p->n_tok, rows), from = at;
    p->queries = carve(&at, n * heads * p->width, 2);
    p->transposed = carve(&at, heads * (uint64_t)c->nope_dim * rank, 2);
    p->sums = carve(&at, n * heads * p->v, 4);
    p->tops = carve(&at, n * heads * 2, 4);
    p->latent = carve(&at, n_pos * rank, 4);
    p->tails = carve(&at, n_pos * (uint64_t)c->rope_dim, 4);
    p->keys = carve(&at, n_pos * heads * (uint64_t)c->nope_dim, 4);
    p->values = carve(&at, n_pos * heads * (uint64_t)c->v_dim, 4);
    return at - from;
}

/* Bytes of a position's latent, key and value. */
static uint64_t position_bytes(const ds_config *c) {
    return 4 * (uint64_t)(ds_latent_width(c) + (c->nope_dim + c->v_dim) * c->n_head);
}

uint64_t ds_gpu_expand_most(const ds_gpu_backend *b, int n_tok) {
    return ds_gpu_attend_bytes(b, n_tok) / position_bytes(b->facts.config);
}

/* As many tokens as leave room for some positions, then as many of these as there is room for: of these tokens alone, so that sums
 * are the same whatever came before. */
static bool find_room(const ds_gpu_backend *b, int n, int n_pos, uint32_t m, plan *p) {
    const ds_config *c = b->facts.config;
    const uint64_t room = ds_gpu_attend_bytes(b, n), each = position_bytes(c);
    for (p->n_tok = n; p->n_tok; p->n_tok /= 2) {
        p->n_pos = 0;
        const uint64_t tokens = lay(c, SUBGROUPS * m, b->room.absorbed, p) + 4 * DS_GPU_ALIGN;
        const uint64_t most = tokens < room ? (room - tokens) / each / DS_KV_BLOCK * DS_KV_BLOCK : 0;
        p->n_pos = most < (uint64_t)n_pos ? (int)most : n_pos;
        if (p->n_pos < n_pos && p->n_pos < LEAST_POS) continue;
        lay(c, SUBGROUPS * m, b->room.absorbed, p);
        return true;
    }
    return false;
}

/* Whether multiply-adds are fewer so, of n tokens that see up to n_pos. */
static bool is_cheaper(const ds_config *c, int n, int n_pos, int together) {
    const double pairs = (double)n * (n_pos - (n - 1) / 2.0), up = (double)c->kv_lora_rank * (c->nope_dim + c->v_dim);
    const double absorbed = pairs * (2.0 * c->kv_lora_rank + c->rope_dim) + n * up;
    const double expanded =
        pairs * (c->nope_dim + c->rope_dim + c->v_dim) + (double)((n + together - 1) / together) * n_pos * up;
    return expanded < absorbed;
}

static bool plan_of(const ds_gpu_backend *b, const ds_gpu_attending *a, plan *p) {
    const ds_gpu_info *d = ds_gpu_told(b->gpu);
    const ds_config *c = b->facts.config;
    const uint32_t m = d->coop[0], n = d->coop[1], k = d->coop[2];
    if (!m || !a->alone || ds_gpu_rows_kind(a->store) == DS_ROWS_F32 || d->subgroup % m || m % 8 || n % 8 || k % 8)
        return false;
    if (c->nope_dim % 8 || c->rope_dim % 8 || c->v_dim % 8) return false;
    *p = (plan){.width = ds_gpu_whole((uint32_t)ds_qk_dim(c), k), .v = ds_gpu_whole((uint32_t)c->v_dim, n)};
    if (p->width > MOST_WIDTH || p->v > MOST_VALUES) return false;
    if ((uint32_t)a->n < SUBGROUPS * m / 2) return false; /* most of a workgroup would be idle */
    p->taken = TAKEN;
    if (shared_bytes(p, m) > d->shared_bytes) p->taken = TAKEN / 2;
    if (p->taken % n || p->taken % k || shared_bytes(p, m) > d->shared_bytes ||
        SUBGROUPS * d->subgroup > DS_GPU_WORKGROUP)
        return false;
    return find_room(b, a->n, a->n_pos, m, p) && is_cheaper(c, a->n, a->n_pos, p->n_tok);
}

static ds_status dispatch(ds_gpu_backend *b, const char *shader, const uint32_t *specs, int n_specs, const void *push,
                          uint32_t bytes, uint32_t x, uint32_t y, uint32_t z, ds_error *err) {
    vk_Pipeline pipeline;
    const ds_status st = ds_gpu_pipeline(b->gpu, shader, specs, n_specs, &pipeline, err);
    if (st == DS_OK) ds_gpu_dispatch(b->gpu, &b->commands, pipeline, push, bytes, x, y, z);
    return st;
}

/* W_uk of each head (rank, nope) transposed, so that latents are what it is multiplied by. */
static ds_status transpose(ds_gpu_backend *b, const ds_op *op, const plan *p, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_mat *k_b = &ds_weights_layer(b->facts.weights, op->il)->latent.k_b;
    const ds_gpu_product transposed = {.w = ds_gpu_layer_of(b, op->il)->k_b,
                                       .y = p->transposed,
                                       .tables = b->w.tables,
                                       .stride_w = k_b->stride,
                                       .stride_y = (uint32_t)(c->nope_dim * c->kv_lora_rank / 2),
                                       .ldy = (uint32_t)c->kv_lora_rank,
                                       .row_bytes = (uint32_t)k_b->row_bytes,
                                       .k = (uint32_t)k_b->k,
                                       .rows = (uint32_t)k_b->rows};
    return ds_gpu_transpose(b->gpu, &b->commands, k_b->format, &transposed, (uint32_t)c->n_head, err);
}

static ds_status queries(ds_gpu_backend *b, const ds_op *op, const plan *p, uint64_t first, int n, ds_error *err) {
    const ds_config *c = b->facts.config;
    const struct {
        uint64_t tokens, q, angles, to;
        uint32_t nope, n_tail, width;
    } push = {b->room.tokens[op->tail].at + first * sizeof(ds_gpu_token),
              b->room.q + first * (uint64_t)c->n_head * (uint64_t)ds_qk_dim(c) * 4,
              b->room.angles[op->tail].at + first * (uint64_t)c->rope_dim * 4,
              p->queries,
              (uint32_t)c->nope_dim,
              (uint32_t)c->rope_dim,
              p->width};
    return dispatch(b, "expanded_query", NULL, 0, &push, 44, (uint32_t)c->n_head, (uint32_t)n, 1, err);
}

/* Rows of the cache from position `first` on, as floats. */
static ds_status rows(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, const plan *p, int first, int n,
                      ds_error *err) {
    const ds_config *c = b->facts.config;
    const uint32_t row = (uint32_t)c->kv_lora_rank;
    const struct {
        uint64_t tokens, latent, tails;
        uint32_t rank, n_tail, first, at;
        ds_gpu_layout l;
    } push = {b->room.tokens[op->tail].at + (uint64_t)a->begin * sizeof(ds_gpu_token),
              p->latent,
              p->tails,
              row,
              (uint32_t)c->rope_dim,
              (uint32_t)first,
              ds_gpu_layer_at(b, a->store, op->il),
              ds_gpu_layout_of(a->store)};
    const char *shader = ds_gpu_rows_kind(a->store) == DS_ROWS_I16 ? "expanded_rows_i16" : "expanded_rows_q8";
    return dispatch(b, shader, &row, 1, &push, 68, (uint32_t)n, 1, 1, err);
}

/* Of n latents, with a matrix of each head: y (n, n_head, rows). Matrices that lie together are one. */
static ds_status expand(ds_gpu_backend *b, const plan *p, ds_format format, uint64_t w, uint64_t stride,
                        uint32_t row_bytes, uint32_t n_rows, uint64_t y, int n, ds_error *err) {
    const ds_config *c = b->facts.config;
    const bool together = stride == (uint64_t)n_rows * row_bytes;
    const uint32_t heads = (uint32_t)c->n_head;
    const ds_gpu_product product = {.w = w,
                                    .x = p->latent,
                                    .y = y,
                                    .tables = b->w.tables,
                                    .stride_w = stride,
                                    .stride_y = n_rows,
                                    .ldx = (uint32_t)c->kv_lora_rank,
                                    .ldy = heads * n_rows,
                                    .row_bytes = row_bytes,
                                    .k = (uint32_t)c->kv_lora_rank,
                                    .rows = together ? heads * n_rows : n_rows,
                                    .n_slots = (uint32_t)n};
    return ds_gpu_mul(b->gpu, &b->commands, &b->room.halves, format, &product, together ? 1 : heads, err);
}

static ds_status keys_and_values(ds_gpu_backend *b, const ds_op *op, const plan *p, int n, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_mat *v_b = &ds_weights_layer(b->facts.weights, op->il)->latent.v_b;
    const uint64_t head = (uint64_t)c->nope_dim * (uint64_t)c->kv_lora_rank * 2;
    const ds_status st = expand(b, p, DS_FORMAT_F16, p->transposed, head, (uint32_t)c->kv_lora_rank * 2,
                                (uint32_t)c->nope_dim, p->keys, n, err);
    if (st != DS_OK) return st;
    return expand(b, p, v_b->format, ds_gpu_layer_of(b, op->il)->v_b, v_b->stride, (uint32_t)v_b->row_bytes,
                  (uint32_t)v_b->rows, p->values, n, err);
}

static ds_status attend(ds_gpu_backend *b, const ds_op *op, const plan *p, uint64_t token, int n_tok, int first, int n,
                        ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_gpu_info *d = ds_gpu_told(b->gpu);
    const uint32_t specs[] = {
        SUBGROUPS * d->subgroup, d->coop[0], d->coop[1], d->coop[2], p->width, p->v, SUBGROUPS, p->taken};
    const struct {
        uint64_t tokens, queries, keys, tails, values, sums, tops, to;
        uint32_t n_tok, n_head, nope, n_tail, v, begin, count;
    } push = {b->room.tokens[op->tail].at + token * sizeof(ds_gpu_token),
              p->queries,
              p->keys,
              p->tails,
              p->values,
              p->sums,
              p->tops,
              b->room.heads + token * (uint64_t)c->n_head * (uint64_t)c->v_dim * 4,
              (uint32_t)n_tok,
              (uint32_t)c->n_head,
              (uint32_t)c->nope_dim,
              (uint32_t)c->rope_dim,
              (uint32_t)c->v_dim,
              (uint32_t)first,
              (uint32_t)n};
    return dispatch(b, "expanded_attend", specs, 8, &push, 92, (uint32_t)c->n_head,
                    ds_gpu_pieces((uint32_t)n_tok, SUBGROUPS * d->coop[0]), 1, err);
}

/* n of the tokens, from `token` on. */
static ds_status attend_tokens(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, const plan *p, int token,
                               int n, ds_error *err) {
    ds_status st = queries(b, op, p, (uint64_t)token, n, err);
    if (st == DS_OK && token == a->begin) st = transpose(b, op, p, err);
    const int n_pos = a->n_pos - (a->begin + a->n - token - n); /* what the last of them sees */
    for (int first = 0; first < n_pos && st == DS_OK; first += p->n_pos) {
        const int taken = n_pos - first < p->n_pos ? n_pos - first : p->n_pos;
        ds_gpu_then(b); /* the cache's rows are there, and what was made of others was used */
        st = rows(b, op, a, p, first, taken, err);
        ds_gpu_then(b);
        if (st == DS_OK) st = keys_and_values(b, op, p, taken, err);
        ds_gpu_then(b);
        if (st == DS_OK) st = attend(b, op, p, (uint64_t)token, n, first, taken, err);
    }
    return st;
}

bool ds_gpu_expands(const ds_gpu_backend *b, const ds_gpu_attending *a) {
    plan p;
    return plan_of(b, a, &p);
}

ds_status ds_gpu_attend_expanded(ds_gpu_backend *b, const ds_op *op, const ds_gpu_attending *a, ds_error *err) {
    plan p;
    if (!plan_of(b, a, &p)) return ds_fail(err, DS_EINVAL, "attention of %d tokens is not expanded", a->n);
    ds_status st = DS_OK;
    for (int t = a->begin; t < a->begin + a->n && st == DS_OK; t += p.n_tok) {
        const int left = a->begin + a->n - t;
        if (t > a->begin) ds_gpu_then(b);
        st = attend_tokens(b, op, a, &p, t, left < p.n_tok ? left : p.n_tok, err);
    }
    return st;
}
