/* latent.c: multi-head latent attention (DeepSeek-V2, section 2.1): its projections, and what goes into the cache. Knows no ISA,
 * owns no cache.
 *
 *   c_kv = norm(W_dkv x), k_pe = rope(W_kr x): all that is cached, for all heads together
 *   q = W_uq norm(W_dq x), or W_q x; y = W_o (attention of the heads: latent_attend.c) */
#include <string.h>

#include "backend/cpu/attention.h"
#include "backend/cpu/lane.h"
#include "backend/cpu/latent.h"

/* The latents' down-projection and, if queries are wanted, theirs (or all of theirs, where the model has one only). */
static void project(const ds_lane *lane, const ds_layer *l, int il, bool queries) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_latent_room *b = ds_latent_room_of(s);
    const ds_mat *first = c->q_lora_rank ? &l->latent.q_a : &l->q, *kv_a = &l->latent.kv_a;
    float *q_out = c->q_lora_rank ? b->q_a : s->scratch->q;
    ds_job jobs[2];
    const ds_act *act = ds_attend_input(lane, l, il, (queries ? ds_kind_of(first) : 0) | ds_kind_of(kv_a));
    jobs[0] = ds_cpu_job(kv_a, kv_a->data, ds_act_for(act, kv_a), s->n_tok, b->kv_a, (size_t)ds_latent_width(c));
    jobs[1] = ds_cpu_job(first, first->data, ds_act_for(act, first), s->n_tok, q_out, (size_t)first->rows);
    ds_cpu_mul(lane->worker, s->kern, jobs, queries ? 2 : 1);
    ds_barrier(lane->worker);
}

/* Normalise and rotate the lane's latent rows into the cache of their sequences. */
static void store_latent(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    if (lane->solo && lane->worker->ith) return;
    for (int i = 0; i < s->n_spans; i++) {
        const ds_span *span = &s->spans[i];
        int begin = span->first > lane->t0 ? span->first : lane->t0;
        int end = span->first + span->n < lane->t1 ? span->first + span->n : lane->t1;
        for (int t = begin; t < end; t++) {
            float *row = ds_latent_room_of(s)->kv_a + (size_t)t * (size_t)ds_latent_width(c);
            s->kern->rms_norm(c->kv_lora_rank, row, l->latent.kv_a_norm, c->rms_eps, row);
            ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)t * (size_t)c->rope_dim, row + c->kv_lora_rank);
            const ds_rows to = ds_kv_row(span->kv, il - s->weights->layer_begin, 0, 0, span->pos + t - span->first);
            memcpy(ds_latent_lane_of(lane)->row, row,
                   (size_t)ds_latent_width(c) * sizeof *row); /* packing may overwrite what others tap */
            s->kern->rows_put(&to, 0, c->kv_lora_rank, c->rope_dim, ds_latent_lane_of(lane)->row);
        }
    }
}

static void project_q(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_latent_room *b = ds_latent_room_of(s);
    const ds_latent_lane *own = ds_latent_lane_of(lane);
    const ds_act *act;
    ds_job job;
    if (!c->q_lora_rank) return;
    float *normed = lane->solo ? own->q_a : b->q_a; /* a solo worker may not overwrite what the others still read */
    ds_lane_norm(lane, c->q_lora_rank, b->q_a, l->latent.q_a_norm, normed);
    act = ds_lane_pack(lane, ds_kind_of(&l->q), c->q_lora_rank, normed, &own->act_q, &b->act_q);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_Q_A_NORM, il, normed, c->q_lora_rank);
    job = ds_cpu_job(&l->q, l->q.data, ds_act_for(act, &l->q), s->n_tok, s->scratch->q, (size_t)l->q.rows);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
}

static void remember(const ds_lane *lane, const ds_layer *layer, int il) {
    project(lane, layer, il, false);
    store_latent(lane, layer, il);
}

static void attend(const ds_lane *lane, const ds_layer *layer, int il) {
    project(lane, layer, il, true);
    store_latent(lane, layer, il);
    ds_lane_tap(lane, DS_TAP_KV_A_NORM, il, ds_latent_room_of(lane->step)->kv_a, ds_latent_width(lane->step->config));
    project_q(lane, layer, il);
    /* q is whole and the cache holds this step's rows; where q was whole before and is absorbed first, the barrier behind
     * that does it. */
    if (lane->step->config->q_lora_rank || !ds_latent_room_of(lane->step)->plan.n_absorbed) ds_barrier(lane->worker);
    ds_latent_heads(lane, layer, il);
}

/* ---- Memory ---- */

static int max2(int a, int b) { return a > b ? a : b; }

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

/* A block of expanded rows of any kind: n values, of which the last n_tail may be kept apart. */
static unsigned char *expanded_rows(ds_carver *c, size_t float_bytes, int n, int n_tail) {
    size_t most = ds_row_layout_of(DS_ROWS_F32, float_bytes, 0, DS_ATTEND_BLOCK).bytes;
    for (ds_row_kind kind = DS_ROWS_I16; kind <= DS_ROWS_Q8; kind++) {
        const int tail = kind == DS_ROWS_Q8 ? n_tail : 0;
        const size_t bytes = ds_row_bytes_of(kind, n - tail, tail);
        most = max_size(most, ds_row_layout_of(kind, bytes, tail, DS_ATTEND_BLOCK).bytes);
    }
    return ds_carve(c, most, 1);
}

/* Float rows take the most room of all kinds in everything but what is expanded. */
static void *lane_room(ds_carver *c, const ds_config *g, int n_tok) {
    size_t r = (size_t)g->kv_lora_rank, rows = (size_t)ds_attend_pad(n_tok),
           row = ds_expand_ld(g->nope_dim, g->rope_dim, g->v_dim) * sizeof(float);
    int width = max2(ds_latent_width(g), ds_qk_dim(g)), n_rows = max2(DS_GROUP_ROWS, DS_QUERY_BLOCK);
    ds_latent_lane *lane = ds_carve(c, 1, sizeof *lane);
    const ds_latent_lane l = {
        .q_a = ds_carve_floats(c, (size_t)g->q_lora_rank),
        .act_q = ds_carve_act(c, 1, g->q_lora_rank),
        .act_nope = ds_carve_act(c, n_tok, g->nope_dim),
        .act_latent = ds_carve_act(c, n_tok, g->kv_lora_rank),
        .row = ds_carve_floats(c, (size_t)width),
        .scratch = ds_carve(c, ds_attend_scratch(n_rows), 1),
        .k_b = ds_carve_floats(c, r * (size_t)g->nope_dim),
        .v_b = ds_carve_floats(c, r * (size_t)g->v_dim),
        .columns = ds_carve_floats(c, r * DS_ATTEND_ROWS),
        .weights = ds_carve(c,
                            max_size(ds_expand_weights_bytes(DS_ROWS_F32, g->kv_lora_rank, g->nope_dim, g->v_dim),
                                     ds_expand_weights_bytes(DS_ROWS_I16, g->kv_lora_rank, g->nope_dim, g->v_dim)),
                            1),
        .expand = ds_carve(c, ds_expand_scratch(DS_ROWS_I16, g->nope_dim, g->rope_dim, g->v_dim), 1),
        .queries = ds_carve(
            c, rows, ds_query_bytes(DS_ROWS_F32, 1, (int)ds_row_pad(ds_qk_dim(g)), (int)ds_row_pad(g->rope_dim))),
        .key_block = expanded_rows(c, row, ds_qk_dim(g), g->rope_dim),
        .value_block = expanded_rows(c, row, g->v_dim, 0),
        .visible = ds_carve(c, rows, sizeof(int32_t)),
        .m = ds_carve_floats(c, rows),
        .l = ds_carve_floats(c, rows),
        .acc = ds_carve_floats(c, rows * ds_row_pad(g->v_dim)),
    };
    if (!lane) return NULL;
    *lane = l;
    lane->keys = (ds_row_table){.blocks = &lane->key_block, .block_rows = DS_ATTEND_BLOCK};
    lane->values = (ds_row_table){.blocks = &lane->value_block, .block_rows = DS_ATTEND_BLOCK};
    return lane;
}

static void *room(ds_carver *c, const ds_config *g, int n_tok) {
    size_t n = (size_t)n_tok, rows = ds_latent_max_rows(g, n_tok), slots = ds_latent_max_slots(g, n_tok);
    size_t blocks = ((size_t)g->n_head + DS_GROUP_ROWS - 1) / DS_GROUP_ROWS;
    size_t expanded =
        2 * n * (size_t)g->n_head * (size_t)ds_expand_max_parts(g); /* padding at most doubles a span's rows */
    ds_latent_room *room = ds_carve(c, 1, sizeof *room);
    const ds_latent_room r = {
        .q_a = ds_carve_floats(c, n * (size_t)g->q_lora_rank),
        .kv_a = ds_carve_floats(c, n * (size_t)ds_latent_width(g)),
        .act_q = ds_carve_act(c, n_tok, g->q_lora_rank),
        .plan = {.routes = ds_carve(c, n, sizeof(ds_latent_route)),
                 .groups = ds_carve(c, n * blocks, sizeof(ds_latent_group)),
                 .visible = ds_carve(c, rows, sizeof(int32_t))},
        .latent = ds_carve_floats(c, n * (size_t)g->n_head * (size_t)ds_latent_width(g)),
        .queries = ds_carve(c, rows, ds_latent_query_bytes(g)),
        .m = ds_carve_floats(c, slots),
        .l = ds_carve_floats(c, slots),
        .acc = ds_carve_floats(c, slots * ds_row_pad(g->kv_lora_rank)),
        .head_m = ds_carve_floats(c, expanded),
        .head_l = ds_carve_floats(c, expanded),
        .head_acc = ds_carve_floats(c, expanded * ds_row_pad(g->v_dim)),
    };
    if (room) *room = r;
    return room;
}

const ds_cpu_attention_kind DS_CPU_LATENT_ATTENTION = {
    .room = room, .lane_room = lane_room, .plan = ds_latent_plan_step, .remember = remember, .attend = attend};
