/* forward.c: a step through the model, read first. Embedding, blocks, final norm, head; all workers run it together. */
#include <string.h>

#include "model/lane.h"

static ds_lane lane_of(const ds_worker *worker, const ds_step *step) {
    ds_lane_scratch *own = &step->scratch->lanes[worker->ith];
    ds_lane lane = {.worker = worker, .step = step, .own = own, .solo = step->n_tok == 1, .t1 = 1, .x = own->x, .xn = own->xn};
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

/* The residual stream of the lane's tokens, and the rotary angles of their positions. */
static void enter(const ds_lane *lane) {
    const ds_step *s = lane->step;
    size_t d = (size_t)s->config->n_embd;
    for (int t = lane->t0; t < lane->t1; t++) {
        float *x = lane->x + (size_t)t * d;
        const ds_mat *e = &s->weights->token_embd;
        if (s->ids) s->kern->dequantize[e->format]((int64_t)d, e->data + (size_t)s->ids[t] * e->row_bytes, x);
        else memcpy(x, s->x + (size_t)t * d, d * sizeof *x);
    }
    if (lane->worker->ith != 0) return;
    ds_attend_plan_step(s);
    for (int i = 0; i < s->n_spans; i++) {
        const ds_span *span = &s->spans[i];
        for (int t = 0; t < span->n; t++) {
            ds_rope_angles(s->rope, span->pos + t, s->scratch->rope + (size_t)(span->first + t) * (size_t)s->config->rope_dim);
        }
    }
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
    if (lane->solo || lane->worker->ith == 0) s->kern->act_pack(kind, 0, s->n_logits, s->n_logits, d, lane->xn, (size_t)d, s->logit_rows, act->pack[kind]);
    ds_lane_sync(lane);
    ds_job job = ds_cpu_job(head, head->data, act->pack[kind], s->n_logits, s->logits, (size_t)head->rows);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
}

static void run(const ds_worker *worker, void *arg) {
    const ds_step *s = arg;
    ds_lane lane = lane_of(worker, s);
    size_t row = (size_t)s->config->n_embd * sizeof(float);
    enter(&lane);
    ds_lane_tap(&lane, DS_TAP_INP_EMBD, -1, lane.x, s->config->n_embd);
    ds_barrier(worker); /* the angles and the plan */
    for (int il = s->weights->layer_begin; il < s->weights->layer_end; il++) {
        const ds_layer *layer = ds_weights_layer(s->weights, il);
        ds_mla(&lane, layer, il);
        ds_feed_forward(&lane, layer, il);
        ds_lane_tap(&lane, DS_TAP_L_OUT, il, lane.x, s->config->n_embd);
    }
    if (s->x_out && !(lane.solo && worker->ith)) {
        memcpy(s->x_out + (size_t)lane.t0 * (size_t)s->config->n_embd, lane.x + (size_t)lane.t0 * (size_t)s->config->n_embd, (size_t)(lane.t1 - lane.t0) * row);
    }
    if (s->weights->output.data) leave(&lane);
}

void ds_step_run(ds_pool *pool, ds_step *step) { ds_pool_run(pool, run, step); }
