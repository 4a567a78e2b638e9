/* attention.c: the operations of attention: the model's kind of it, between the norm and the output's projection. */
#include "backend/cpu/attention.h"

#include <math.h>
#include <string.h>

#include "backend/cpu/lane.h"

const ds_cpu_attention_kind *ds_cpu_attention_of(const ds_config *c) {
    static const ds_cpu_attention_kind *const KINDS[DS_ATTENTION_KINDS] = {
        [DS_ATTENTION_LATENT] = &DS_CPU_LATENT_ATTENTION,
        [DS_ATTENTION_PLAIN] = &DS_CPU_PLAIN_ATTENTION,
    };
    return KINDS[c->attention];
}

const ds_act *ds_attend_input(const ds_lane *lane, const ds_layer *layer, int il, unsigned kinds) {
    const int d = lane->step->config->n_embd;
    ds_lane_norm(lane, d, lane->x, layer->attn_norm, lane->xn);
    const ds_act *act = ds_lane_pack(lane, kinds, d, lane->xn, &lane->own->act_x, &lane->step->scratch->act_x);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_ATTN_NORM, il, lane->xn, d);
    return act;
}

static int min2(int a, int b) { return a < b ? a : b; }

/* Lengths of the parts before `part`, the last third's as the unit: the second third's are twice and the first's four times
 * as long, so that who is done first waits for less. */
static int part_units(int n_parts, int part) {
    return part + min2(part, n_parts * 2 / 3) + 2 * min2(part, n_parts / 3);
}

int ds_attend_part_begin(int n_pos, int n_parts, int part) {
    int at = part_units(n_parts, part), all = part_units(n_parts, n_parts);
    if (part == n_parts) return n_pos;
    if (n_pos / all < DS_MIN_PART / 2) at = part, all = n_parts; /* none is short: each costs a pass over its sums */
    return (int)((int64_t)n_pos * at / all) / DS_ROW_PAD * DS_ROW_PAD;
}

void ds_attend_join(const ds_kernels *kern, int n_parts, size_t stride, const float *m, const float *l,
                    const float *acc, size_t ld, int n, float *out) {
    float top = -INFINITY, sum = 0;
    for (int p = 0; p < n_parts; p++) top = fmaxf(top, m[(size_t)p * stride]);
    for (int p = 0; p < n_parts; p++) sum += l[(size_t)p * stride] * exp2f(m[(size_t)p * stride] - top);
    memset(out, 0, (size_t)n * sizeof *out);
    for (int p = 0; p < n_parts; p++) {
        const float weight = exp2f(m[(size_t)p * stride] - top) / sum;
        if (weight != 0) kern->add_scaled(n, weight, acc + (size_t)p * stride * ld, out);
    }
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

bool ds_cpu_remember(const ds_lane *lane, const ds_op *op) {
    ds_cpu_attention_of(lane->step->config)->remember(lane, ds_weights_layer(lane->step->weights, op->il), op->il);
    return true;
}

bool ds_cpu_attention(const ds_lane *lane, const ds_op *op) {
    const ds_layer *layer = ds_weights_layer(lane->step->weights, op->il);
    ds_cpu_attention_of(lane->step->config)->attend(lane, layer, op->il);
    ds_barrier(lane->worker);
    output(lane, layer, op->il);
    return true;
}
