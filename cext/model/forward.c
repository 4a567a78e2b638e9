/* forward.c: a step through the model, read first. Embedding, blocks, final norm, head; all workers run it together. */
#include <string.h>

#include "backend/cpu/lane.h"

static ds_lane lane_of(const ds_worker *worker, const ds_step *step) {
    ds_lane_scratch *own = &step->scratch->lanes[worker->ith];
    ds_lane lane = {
        .worker = worker, .step = step, .own = own, .solo = step->n_tok == 1, .t1 = 1, .x = own->x, .xn = own->xn};
    if (!lane.solo) { /* whole tiles of rows, because packs are laid out by tiles */
        int tiles = (step->n_tok + DS_PANEL_ROWS - 1) / DS_PANEL_ROWS;
        lane.t0 = tiles * worker->ith / worker->nth * DS_PANEL_ROWS;
        lane.t1 = tiles * (worker->ith + 1) / worker->nth * DS_PANEL_ROWS;
        if (lane.t0 > step->n_tok) lane.t0 = step->n_tok;
        if (lane.t1 > step->n_tok) lane.t1 = step->n_tok;
        lane.x = step->scratch->x;
        lane.xn = step->scratch->xn;
    }
    return lane;
}

/* Where the step's tokens stand: the rotary angles of their positions, and attention's plan. */
static void place(const ds_step *s) {
    ds_attend_plan_step(s);
    for (int i = 0; i < s->n_spans; i++) {
        const ds_span *span = &s->spans[i];
        for (int t = 0; t < span->n; t++) {
            ds_rope_angles(s->rope, span->pos + t,
                           s->scratch->rope + (size_t)(span->first + t) * (size_t)s->config->rope_dim);
        }
    }
}

/* The residual stream of the lane's tokens. */
static void enter(const ds_lane *lane) {
    const ds_step *s = lane->step;
    size_t d = (size_t)s->config->n_embd;
    for (int t = lane->t0; t < lane->t1; t++) {
        float *x = lane->x + (size_t)t * d;
        const ds_mat *e = &s->weights->token_embd;
        if (s->ids) s->kern->dequantize[e->format]((int64_t)d, e->data + (size_t)s->ids[t] * e->row_bytes, x);
        else memcpy(x, s->x + (size_t)t * d, d * sizeof *x);
    }
    if (lane->worker->ith == 0) place(s);
}

/* Go on with the tail: its rows of the residual stream move to the front. */
static ds_lane enter_tail(const ds_lane *all) {
    const ds_step *s = all->step, *tail = s->tail;
    const size_t d = (size_t)s->config->n_embd;
    ds_lane lane = lane_of(all->worker, tail);
    ds_barrier(all->worker); /* nobody needs the other rows and their angles any more */
    for (int t = 0; t < tail->n_tok && (lane.solo || lane.worker->ith == 0); t++) {
        memmove(lane.x + (size_t)t * d, all->x + (size_t)s->logit_rows[t] * d, d * sizeof *lane.x);
    }
    if (lane.worker->ith == 0) place(tail);
    ds_barrier(all->worker);
    return lane;
}

/* Final norm and head of the tokens whose logits are wanted. */
static void leave(const ds_lane *lane) {
    const ds_step *s = lane->step;
    const ds_mat *head = &s->weights->output;
    int d = s->config->n_embd;
    ds_act_kind kind = ds_format_get(head->format)->act;
    const ds_act *act = lane->solo ? &lane->own->act_x : &s->scratch->act_x;
    ds_lane_norm(lane, d, lane->x, s->weights->output_norm, lane->xn);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_RESULT_NORM, -1, lane->xn, d);
    if (!s->n_logits) return;
    if (lane->solo || lane->worker->ith == 0)
        s->kern->act_pack(kind, 0, s->n_logits, s->n_logits, d, lane->xn, (size_t)d, s->logit_rows, act->pack[kind]);
    ds_lane_sync(lane);
    ds_job job = ds_cpu_job(head, head->data, act->pack[kind], s->n_logits, s->logits, (size_t)head->rows);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
}

static void run(const ds_worker *worker, void *arg) {
    const ds_step *s = arg;
    ds_lane lane = lane_of(worker, s);
    size_t row = (size_t)s->config->n_embd * sizeof(float);
    ds_sublayer sublayer = s->weights->sublayer;
    enter(&lane);
    ds_lane_tap(&lane, DS_TAP_INP_EMBD, -1, lane.x, s->config->n_embd);
    ds_barrier(worker); /* the angles and the plan */
    for (int il = s->weights->layer_begin; il < s->weights->layer_end; il++) {
        const ds_layer *layer = ds_weights_layer(s->weights, il);
        if (s->tail && il + 1 == s->weights->layer_end) {
            ds_mla_remember(&lane, layer, il);
            if (!s->tail->n_tok) return;
            lane = enter_tail(&lane);
        }
        if (sublayer != DS_SUBLAYER_FEED_FORWARD) ds_mla(&lane, layer, il);
        if (sublayer != DS_SUBLAYER_ATTENTION) ds_feed_forward(&lane, layer, il);
        else ds_feed_forward_norm(&lane, layer, il);
        ds_lane_tap(&lane, DS_TAP_L_OUT, il, lane.x, s->config->n_embd);
    }
    if (s->x_out && !(lane.solo && worker->ith)) {
        memcpy(s->x_out + (size_t)lane.t0 * (size_t)s->config->n_embd,
               lane.x + (size_t)lane.t0 * (size_t)s->config->n_embd, (size_t)(lane.t1 - lane.t0) * row);
    }
    if (s->weights->output.data) leave(&lane);
}

/* Fill `tail` with the tokens whose logits are wanted, if the others may stop before the last block and these are the
 * last of their spans: one block less for them. A tap wants every row. Returns whether it did. */
static bool cut_tail(const ds_step *step, ds_step *tail, ds_span *spans) {
    int taken = 0;
    if (step->tap || step->x_out || step->n_logits == step->n_tok) return false;
    *tail = *step;
    tail->ids = NULL, tail->logit_rows = NULL, tail->spans = spans, tail->n_spans = 0, tail->n_tok = step->n_logits;
    for (int i = 0; i < step->n_spans; i++) {
        const ds_span *all = &step->spans[i];
        ds_span *s = &spans[tail->n_spans];
        *s = (ds_span){.kv = all->kv, .first = taken};
        while (taken < step->n_logits && step->logit_rows[taken] < all->first + all->n) {
            if (step->logit_rows[taken] < all->first) return false;
            taken++, s->n++;
        }
        s->pos = all->pos + all->n - s->n;
        if (!s->n) continue;
        if (step->logit_rows[s->first] != all->first + all->n - s->n) return false;
        tail->n_spans++;
    }
    return taken == step->n_logits;
}

void ds_step_run(ds_pool *pool, ds_step *step) {
    ds_step tail;
    ds_span spans[DS_CHUNK];
    if (cut_tail(step, &tail, spans)) step->tail = &tail;
    ds_pool_run(pool, run, step);
    step->tail = NULL;
}
