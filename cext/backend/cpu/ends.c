/* ends.c: what stands before and behind the blocks: embeddings, places, the tail, the head; and copies of states. */
#include <string.h>

#include "backend/cpu/attention.h"
#include "backend/cpu/lane.h"

bool ds_cpu_embed(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    const ds_mat *e = &s->weights->token_embd;
    const size_t d = (size_t)s->config->n_embd;
    for (int t = lane->t0; t < lane->t1; t++) {
        float *x = lane->x + (size_t)t * d;
        if (s->ids) s->kern->dequantize[e->format]((int64_t)d, e->data + (size_t)s->ids[t] * e->row_bytes, x);
        else memcpy(x, s->x + (size_t)t * d, d * sizeof *x);
    }
    ds_lane_tap(lane, DS_TAP_INP_EMBD, -1, lane->x, s->config->n_embd);
    return true;
}

/* Where the step's tokens stand: the rotary angles of their positions, and attention's plan. */
bool ds_cpu_place(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    if (lane->worker->ith == 0) {
        ds_cpu_attention_of(s->config)->plan(s);
        for (int i = 0; i < s->n_spans; i++) {
            const ds_span *span = &s->spans[i];
            for (int t = 0; t < span->n; t++) {
                ds_rope_angles(s->rope, span->pos + t,
                               s->scratch->rope + (size_t)(span->first + t) * (size_t)s->config->rope_dim);
            }
        }
    }
    ds_barrier(lane->worker);
    return true;
}

/* The lane is the tail's already; the whole step, of several tokens, has left its rows in the shared stream. */
bool ds_cpu_tail(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    const size_t d = (size_t)s->config->n_embd;
    ds_barrier(lane->worker); /* nobody needs the other rows and their angles any more */
    for (int t = 0; t < s->n_tok && (lane->solo || lane->worker->ith == 0); t++)
        memmove(lane->x + (size_t)t * d, s->scratch->x + (size_t)s->taken[t] * d, d * sizeof *lane->x);
    return true;
}

/* Final norm and head of the tokens whose logits are wanted. */
bool ds_cpu_head(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    const ds_mat *head = &s->weights->output;
    int d = s->config->n_embd;
    ds_act_kind kind = ds_format_get(head->format)->act;
    const ds_act *act = lane->solo ? &lane->own->act_x : &s->scratch->act_x;
    ds_lane_norm(lane, d, lane->x, s->weights->output_norm, lane->xn);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_RESULT_NORM, -1, lane->xn, d);
    if (!s->n_logits) return true;
    if (lane->solo || lane->worker->ith == 0)
        s->kern->act_pack(kind, 0, s->n_logits, s->n_logits, d, lane->xn, (size_t)d, s->logit_rows, act->pack[kind]);
    ds_lane_sync(lane);
    ds_job job = ds_cpu_job(head, head->data, act->pack[kind], s->n_logits, s->logits, (size_t)head->rows);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
    return true;
}

bool ds_cpu_copy_in(const ds_lane *lane, const ds_op *op) {
    const size_t d = (size_t)lane->step->config->n_embd, at = (size_t)lane->t0 * d;
    float *to = op->state == DS_STATE_X ? lane->x : lane->xn;
    memcpy(to + at, (const float *)op->host + at, (size_t)(lane->t1 - lane->t0) * d * sizeof *to);
    ds_lane_sync(lane);
    return true;
}

bool ds_cpu_copy_out(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    const size_t n_rows = (size_t)(lane->t1 - lane->t0);
    const bool choice = op->state == DS_STATE_CHOICE;
    const size_t row = (size_t)(choice ? s->config->n_expert_used : s->config->n_embd) * 4; /* float and int32 alike */
    const void *from = op->state == DS_STATE_X       ? (const void *)lane->x
                       : op->state == DS_STATE_INPUT ? (const void *)lane->xn
                       : lane->solo                  ? (const void *)lane->own->ids
                                                     : (const void *)s->scratch->ids;
    if (lane->solo && lane->worker->ith) return true; /* every worker has the same */
    memcpy((unsigned char *)op->host + (size_t)lane->t0 * row, (const unsigned char *)from + (size_t)lane->t0 * row,
           n_rows * row);
    return true;
}
