/* latent.c: multi-head latent attention (DeepSeek-V2, section 2.1): its projections, and what goes into the cache. Knows no ISA,
 * owns no cache.
 *
 *   c_kv = norm(W_dkv x), k_pe = rope(W_kr x): all that is cached, for all heads together
 *   q = W_uq norm(W_dq x), or W_q x; y = W_o (attention of the heads: attend.c) */
#include <string.h>

#include "backend/cpu/attention.h"
#include "backend/cpu/lane.h"

/* The latents' down-projection and, if queries are wanted, theirs (or all of theirs, where the model has one only). */
static void project(const ds_lane *lane, const ds_layer *l, int il, bool queries) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    const ds_mat *first = c->q_lora_rank ? &l->q_a : &l->q;
    float *q_out = c->q_lora_rank ? b->q_a : b->q;
    ds_job jobs[2];
    const ds_act *act;
    ds_lane_norm(lane, c->n_embd, lane->x, l->attn_norm, lane->xn);
    act = ds_lane_pack(lane, (queries ? ds_kind_of(first) : 0) | ds_kind_of(&l->kv_a), c->n_embd, lane->xn,
                       &lane->own->act_x, &b->act_x);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_ATTN_NORM, il, lane->xn, c->n_embd);
    jobs[0] = ds_cpu_job(&l->kv_a, l->kv_a.data, ds_act_for(act, &l->kv_a), s->n_tok, b->kv_a, (size_t)ds_kv_width(c));
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
            float *row = s->scratch->kv_a + (size_t)t * (size_t)ds_kv_width(c);
            s->kern->rms_norm(c->kv_lora_rank, row, l->kv_a_norm, c->rms_eps, row);
            ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)t * (size_t)c->rope_dim, row + c->kv_lora_rank);
            const ds_rows to = ds_kv_row(span->kv, il - s->weights->layer_begin, 0, 0, span->pos + t - span->first);
            memcpy(lane->own->attend.row, row,
                   (size_t)ds_kv_width(c) * sizeof *row); /* packing may overwrite what others tap */
            s->kern->rows_put(&to, 0, c->kv_lora_rank, c->rope_dim, lane->own->attend.row);
        }
    }
}

static void project_q(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    const ds_act *act;
    ds_job job;
    if (!c->q_lora_rank) return;
    float *normed =
        lane->solo ? lane->own->q_a : b->q_a; /* a solo worker may not overwrite what the others still read */
    ds_lane_norm(lane, c->q_lora_rank, b->q_a, l->q_a_norm, normed);
    act = ds_lane_pack(lane, ds_kind_of(&l->q), c->q_lora_rank, normed, &lane->own->act_q, &b->act_q);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_Q_A_NORM, il, normed, c->q_lora_rank);
    job = ds_cpu_job(&l->q, l->q.data, ds_act_for(act, &l->q), s->n_tok, b->q, (size_t)l->q.rows);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
}

/* Output projection of the heads, added to the lane's residual rows. */
static void output(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    const ds_act *act =
        ds_lane_pack(lane, ds_kind_of(&l->o), c->n_head * c->v_dim, b->heads, &lane->own->act_heads, &b->act_heads);
    ds_job job;
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_ATTN_HEADS, il, b->heads, c->n_head * c->v_dim);
    job = ds_cpu_job(&l->o, l->o.data, ds_act_for(act, &l->o), s->n_tok, b->y, (size_t)c->n_embd);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
    ds_barrier(lane->worker);
    ds_lane_tap(lane, DS_TAP_ATTN_OUT, il, b->y, c->n_embd);
    for (int t = lane->t0; t < lane->t1; t++)
        s->kern->add_scaled(c->n_embd, 1.0f, b->y + (size_t)t * (size_t)c->n_embd,
                            lane->x + (size_t)t * (size_t)c->n_embd);
    ds_lane_tap(lane, DS_TAP_FFN_INP, il, lane->x, c->n_embd);
}

static void remember(const ds_lane *lane, const ds_layer *layer, int il) {
    project(lane, layer, il, false);
    store_latent(lane, layer, il);
}

static void attend(const ds_lane *lane, const ds_layer *layer, int il) {
    project(lane, layer, il, true);
    store_latent(lane, layer, il);
    ds_lane_tap(lane, DS_TAP_KV_A_NORM, il, lane->step->scratch->kv_a, ds_kv_width(lane->step->config));
    project_q(lane, layer, il);
    ds_barrier(lane->worker); /* q is whole and the cache holds this step's rows */
    ds_attend_heads(lane, layer, il);
    ds_barrier(lane->worker);
    output(lane, layer, il);
}

const ds_cpu_attention_kind DS_CPU_LATENT_ATTENTION = {
    .plan = ds_attend_plan_step, .remember = remember, .attend = attend};
