/* attention.c: multi-head latent attention on a GPU: where a step's tokens stand, what their layers' rows of the cache are,
 * and which tokens attend together (attend.c). */
#include "backend/vulkan/attend.h"

#include <limits.h>
#include <string.h>

/* Tokens [begin, end) of a request, whose sequences' caches are of one type. */
typedef struct run {
    const ds_kv_store *store;
    int begin, end;
    int n_pos; /* most that one of them sees */
    bool alone; /* of one sequence, and many */
} run;

/* From a span on; one of `many` tokens or more is a run of its own. */
static run run_from(const ds_request *r, int span, int many) {
    run all = {.store = r->spans[span].kv->store, .begin = r->spans[span].first, .alone = r->spans[span].n >= many};
    for (const int first = span; span < r->n_spans && r->spans[span].kv->store == all.store; span++) {
        const ds_span *s = &r->spans[span];
        if (span > first && (all.alone || s->n >= many)) break;
        all.end = s->first + s->n;
        if (s->pos + s->n > all.n_pos) all.n_pos = s->pos + s->n;
    }
    return all;
}

static int span_behind(const ds_request *r, const run *u) {
    int i = 0;
    while (i < r->n_spans && r->spans[i].first < u->end) i++;
    return i;
}

static uint32_t out_bytes(const ds_kv_store *store) {
    return (uint32_t)((store->layouts[0].row_bytes + store->layouts[0].tail_bytes + 12 + 15) / 16 * 16);
}

/* ---- Where tokens stand ---- */

static int blocks_of(const ds_span *s) { return (s->pos + s->n + DS_KV_BLOCK - 1) / DS_KV_BLOCK; }

/* Of the table of a step's blocks, its tail's with it: what is recorded for the whole reads it where it is. */
static uint64_t table_bytes(const ds_gpu_backend *b) {
    uint64_t bytes = 0;
    for (int step = 0; step < DS_GPU_STEPS; step++) {
        const ds_request *r = b->requests[step];
        for (int i = 0; r && i < r->n_spans; i++) bytes += (uint64_t)blocks_of(&r->spans[i]) * 8;
    }
    return bytes;
}

/* Room for a step's table, made before any of it is there: what it held is of steps before. */
static ds_status reserve_table(ds_gpu_backend *b, ds_error *err) {
    const uint64_t bytes = table_bytes(b);
    uint64_t size = 64 << 10;
    if (b->room.table.bytes >= bytes) return DS_OK;
    while (size < bytes) size *= 2;
    ds_gpu_buffer_release(b->gpu, &b->room.table);
    return ds_gpu_buffer_new(b->gpu, size, DS_GPU_IN, &b->room.table, err);
}

static ds_gpu_cache *cache_of(ds_gpu_backend *b, const ds_kv_store *store) {
    const int first = b->facts.weights->layer_begin;
    if (!b->cached[store->type])
        ds_gpu_cache_create(store, b->attend_begin - first, b->attend_end - first, &b->caches[store->type]);
    b->cached[store->type] = true;
    return &b->caches[store->type];
}

/* A span's blocks into the table from `at` on. A tail's are as the whole step left them. */
static ds_status place_blocks(ds_gpu_backend *b, const ds_span *s, bool tail, uint64_t *at, ds_error *err) {
    ds_gpu_cache *cache = cache_of(b, s->kv->store);
    ds_status st = DS_OK;
    for (int i = 0; i < blocks_of(s) && st == DS_OK; i++) {
        const int held = s->pos - i * DS_KV_BLOCK, here = held < 0 ? 0 : held < DS_KV_BLOCK ? held : DS_KV_BLOCK;
        st = ds_gpu_cache_get(b->gpu, cache, s->kv, i, tail ? -1 : here, &at[i], err);
    }
    return st;
}

ds_status ds_gpu_place(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_request *r = ds_gpu_request(b, op);
    ds_gpu_token *tokens = (ds_gpu_token *)(void *)b->room.tokens[op->tail].host;
    float *angles = (float *)(void *)b->room.angles[op->tail].host;
    ds_status st = reserve_table(b, err);
    for (int i = 0; i < r->n_spans && st == DS_OK; i++) {
        const ds_span *s = &r->spans[i];
        const uint64_t at = b->room.table.address + b->table_used;
        st = place_blocks(b, s, op->tail, (uint64_t *)(void *)(b->room.table.host + b->table_used), err);
        b->table_used += (uint64_t)blocks_of(s) * 8;
        for (int t = 0; t < s->n; t++) {
            tokens[s->first + t] =
                (ds_gpu_token){at, (uint32_t)(s->pos + t), ds_query_scale(b->facts.config, s->pos + t)};
            ds_rope_angles(b->facts.rope, s->pos + t,
                           angles + (size_t)(s->first + t) * (size_t)b->facts.config->rope_dim);
        }
    }
    return st;
}

/* ---- The cache's rows ---- */

static ds_status store_rows(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    static const char *const STORE[] = {"latent_store_f32", "latent_store_i16", "latent_store_q8"};
    const ds_request *r = ds_gpu_request(b, op);
    const ds_config *c = b->facts.config;
    const ds_gpu_room *m = &b->room;
    ds_status st = DS_OK;
    for (int i = 0; i < r->n_spans && st == DS_OK;) {
        const run u = run_from(r, i, INT_MAX);
        const uint64_t n = (uint64_t)u.begin;
        const struct {
            uint64_t tokens, kv_a, w, angles, out;
            uint32_t rank, n_tail, out_bytes, at;
            float eps;
            ds_gpu_layout l;
        } push = {m->tokens[op->tail].at + n * sizeof(ds_gpu_token),
                  m->kv_a + n * (uint64_t)ds_latent_width(c) * 4,
                  ds_gpu_layer_of(b, op->il)->kv_a_norm,
                  m->angles[op->tail].at + n * (uint64_t)c->rope_dim * 4,
                  ds_gpu_cached_rows(b, op).at + n * (m->cached_bytes / (uint64_t)m->n_tok),
                  (uint32_t)c->kv_lora_rank,
                  (uint32_t)c->rope_dim,
                  out_bytes(u.store),
                  ds_gpu_layer_at(b, u.store, op->il),
                  c->rms_eps,
                  ds_gpu_layout_of(u.store)};
        st = ds_gpu_do(b, STORE[ds_gpu_rows_kind(u.store)], &push, sizeof push, (uint32_t)(u.end - u.begin), 1, 1, err);
        i = span_behind(r, &u);
    }
    return st;
}

/* One row as store_rows left it, into a block of the host's. */
static void take_row(const ds_kv_store *store, const unsigned char *from, const ds_rows *to) {
    const ds_row_layout *l = &store->layouts[0];
    const unsigned char *scales = from + l->row_bytes + l->tail_bytes;
    memcpy(to->data, from, l->row_bytes);
    if (l->kind != DS_ROWS_F32) memcpy(to->scale, scales, sizeof(float));
    if (l->kind != DS_ROWS_Q8) return;
    memcpy(to->tail, from + l->row_bytes, l->tail_bytes);
    memcpy(to->tail_scale, scales + 4, sizeof(float));
    memcpy(to->sum, scales + 8, sizeof(int32_t));
}

void ds_gpu_take_rows(ds_gpu_backend *b, const ds_op *op) {
    const ds_request *r = ds_gpu_request(b, op);
    const unsigned char *rows = ds_gpu_cached_rows(b, op).host;
    const bool last = op->il + 1 == b->attend_end;
    for (int i = 0, next; i < r->n_spans; i = next) {
        const run u = run_from(r, i, INT_MAX);
        const unsigned char *from = rows + (size_t)u.begin * (b->room.cached_bytes / (size_t)b->room.n_tok);
        for (next = span_behind(r, &u); i < next; i++) {
            const ds_span *s = &r->spans[i];
            for (int t = 0; t < s->n; t++) {
                const ds_rows to = ds_kv_row(s->kv, op->il - b->facts.weights->layer_begin, 0, 0, s->pos + t);
                take_row(u.store, from + (size_t)(s->first + t - u.begin) * out_bytes(u.store), &to);
            }
            for (int j = s->pos / DS_KV_BLOCK; last && j < blocks_of(s); j++) {
                const int n = s->pos + s->n - j * DS_KV_BLOCK;
                ds_gpu_cache_same(cache_of(b, u.store), s->kv, j, n < DS_KV_BLOCK ? n : DS_KV_BLOCK);
            }
        }
    }
}

/* ---- Attention ---- */

static ds_status project(ds_gpu_backend *b, const ds_op *op, bool queries, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_layer *l = ds_weights_layer(b->facts.weights, op->il);
    const ds_gpu_layer *g = ds_gpu_layer_of(b, op->il);
    const ds_gpu_room *m = &b->room;
    const int n = ds_gpu_request(b, op)->n_tok, d = c->n_embd, q_rows = c->n_head * ds_qk_dim(c);
    ds_gpu_input x;
    ds_status st = ds_gpu_normed(b, m->x[op->tail], g->attn_norm, m->xn, n, d, &x, err);
    if (st == DS_OK) st = ds_gpu_times(b, &l->latent.kv_a, g->kv_a, x, m->kv_a, n, d, ds_latent_width(c), 0, err);
    if (st != DS_OK || !queries) return st;
    if (!c->q_lora_rank) return ds_gpu_times(b, &l->q, g->q, x, m->q, n, d, q_rows, 0, err);
    st = ds_gpu_times(b, &l->latent.q_a, g->q_a, x, m->q_a, n, d, c->q_lora_rank, 0, err);
    ds_gpu_then(b);
    if (st == DS_OK) st = ds_gpu_normed(b, m->q_a, g->q_a_norm, m->q_a, n, c->q_lora_rank, &x, err);
    return st == DS_OK ? ds_gpu_times(b, &l->q, g->q, x, m->q, n, c->q_lora_rank, q_rows, 0, err) : st;
}

ds_status ds_gpu_remember(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_status st = project(b, op, false, err);
    if (st != DS_OK) return st;
    ds_gpu_then(b);
    return store_rows(b, op, err);
}

ds_status ds_gpu_attention(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_request *r = ds_gpu_request(b, op);
    const ds_config *c = b->facts.config;
    ds_status st = project(b, op, true, err);
    ds_gpu_then(b);
    if (st == DS_OK) st = store_rows(b, op, err);
    for (int i = 0; i < r->n_spans && st == DS_OK;) {
        const run u = run_from(r, i, DS_GPU_ATTEND_MANY);
        const int most = ds_gpu_attend_together(b, r->n_tok);
        const ds_gpu_attending whole = {u.store, u.begin, u.end - u.begin, u.n_pos, u.alone};
        if (ds_gpu_expands(b, &whole)) {
            if (i) ds_gpu_then(b);
            st = ds_gpu_attend_expanded(b, op, &whole, err);
            i = span_behind(r, &u);
            continue;
        }
        for (int t = u.begin; t < u.end && st == DS_OK; t += most) {
            const ds_gpu_attending a = {u.store, t, u.end - t < most ? u.end - t : most, u.n_pos, u.alone};
            if (i || t != u.begin) ds_gpu_then(b); /* what lies between is used again */
            st = ds_gpu_attend(b, op, &a, err);
        }
        i = span_behind(r, &u);
    }
    ds_gpu_then(b);
    if (st != DS_OK) return st;
    const ds_gpu_input heads = {b->room.heads, 0, 0};
    return ds_gpu_times(b, &ds_weights_layer(b->facts.weights, op->il)->o, ds_gpu_layer_of(b, op->il)->o, heads,
                        b->room.x[op->tail], r->n_tok, c->n_head * c->v_dim, c->n_embd, DS_GPU_ADD, err);
}
