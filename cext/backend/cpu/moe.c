/* moe.c: the feed-forward half of a block: dense, or routed experts beside shared ones. Knows no ISA.
 *
 *   y = sum_{e in top-k} w_e down_e(silu(gate_e x) * up_e x) + shared(x)            (DeepSeek-V2, eq. 20 to 22)
 *
 * Tokens are grouped by expert, so that an expert's matrices are read once a step whatever the number of its tokens. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "backend/cpu/lane.h"

/* A group's score: V2 takes its best expert (modeling_deepseek.py, group_limited_greedy), V3 its best two (noaux_tc). */
static float group_score(ds_gating gating, const float *score, int n) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (score[i] > first) second = first, first = score[i];
        else if (score[i] > second) second = score[i];
    }
    return gating == DS_GATING_SIGMOID && n > 1 ? first + second : first;
}

/* The index of the largest of n values, the first of equals; it is struck out. */
static int take_best(float *score, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) best = score[i] > score[best] ? i : best;
    score[best] = -INFINITY;
    return best;
}

/* Leave only the experts of the n_group_used best groups selectable. */
static void limit_to_groups(const ds_config *c, float *score /* (n_expert) */) {
    int size = c->n_expert / c->n_group;
    float groups[c->n_group];
    for (int g = 0; g < c->n_group; g++) groups[g] = group_score(c->gating, score + g * size, size);
    for (int i = 0; i < c->n_group_used; i++) take_best(groups, c->n_group);
    for (int g = 0; g < c->n_group; g++) { /* taken groups are struck out: the others are not chosen from */
        for (int e = g * size; groups[g] != -INFINITY && e < (g + 1) * size; e++) score[e] = -INFINITY;
    }
}

/* Choose a token's experts and their weights from its router logits; `select` is scratch (n_expert). logits become probabilities. */
static void route(const ds_config *c, const ds_kernels *kern, const float *bias, float *logits /* (n_expert) */,
                  float *select, int32_t *ids /* (n_expert_used) */, float *weights /* (n_expert_used) */) {
    float sum = 0;
    if (c->gating == DS_GATING_SOFTMAX) kern->softmax(c->n_expert, logits);
    else
        for (int e = 0; e < c->n_expert; e++) logits[e] = 1.0f / (1.0f + expf(-logits[e]));
    for (int e = 0; e < c->n_expert; e++) {
        float s = logits[e] + (bias ? bias[e] : 0.0f);
        select[e] = s == s ? s : -FLT_MAX; /* a NaN must not decide an index */
    }
    if (c->n_group_used < c->n_group) limit_to_groups(c, select);
    for (int k = 0; k < c->n_expert_used; k++) {
        ids[k] = take_best(select, c->n_expert);
        weights[k] = logits[ids[k]];
        sum += weights[k];
    }
    for (int k = 0; k < c->n_expert_used; k++)
        weights[k] = (c->expert_norm ? weights[k] / (sum + 1e-20f) : weights[k]) * c->expert_scale;
}

/* Group the (token, k) choices by expert, tokens in order. Experts without tokens do not appear. */
static void plan_experts(const ds_step *s, const int32_t *ids /* (n_tok, n_expert_used) */, ds_plan *plan) {
    const ds_config *c = s->config;
    int n = s->n_tok * c->n_expert_used, place[c->n_expert], slot = 0;
    memset(place, 0, sizeof place);
    for (int i = 0; i < n; i++) place[ids[i]]++;
    plan->n_active = 0;
    for (int e = 0; e < c->n_expert; e++) {
        if (!place[e]) continue;
        plan->expert[plan->n_active] = e;
        plan->first[plan->n_active] = slot;
        plan->count[plan->n_active++] = place[e];
        slot += place[e];
        place[e] = slot - place[e];
    }
    for (int i = 0; i < n; i++) {
        plan->slot_of[i] = place[ids[i]]++;
        plan->slot_token[plan->slot_of[i]] = i / c->n_expert_used;
    }
}

/* Where each active expert's rows start in a pack buffer of rows of k values. */
static void offsets(const ds_step *s, const ds_plan *plan, ds_act_kind kind, int k, size_t *out /* (n_active) */) {
    size_t at = 0;
    for (int a = 0; a < plan->n_active; a++) {
        out[a] = at;
        at += (s->kern->act_bytes(kind, plan->count[a], k) + DS_ACT_ALIGN - 1) / DS_ACT_ALIGN * DS_ACT_ALIGN;
    }
}

/* The act kinds of an expert's inputs and of its hidden rows. Gate and up share one; they are bound to the same kind. */
static ds_act_kind input_kind(const ds_experts *x) { return ds_format_get(x->gate.format)->act; }
static ds_act_kind hidden_kind(const ds_experts *x) { return ds_format_get(x->down.format)->act; }

/* Each lane routes its tokens; then the step's plan, each expert's rows gathered and packed. Returns the plan and sets
 * *gathered to the packs. A solo worker's one pack serves all its experts as it is. */
static const ds_plan *dispatch(const ds_lane *lane, const ds_layer *l, const ds_act *act_x, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    ds_plan *plan = lane->solo ? &lane->own->plan : &b->plan;
    int32_t *ids = lane->solo ? lane->own->ids : b->ids;
    float *weights = lane->solo ? lane->own->weights : b->weights;
    ds_lane_tap(lane, DS_TAP_ROUTER_LOGITS, il, b->router, c->n_expert);
    for (int t = lane->t0; t < lane->t1; t++) {
        float *logits = b->router + (size_t)t * (size_t)c->n_expert;
        if (lane->solo) logits = memcpy(lane->own->logits, logits, (size_t)c->n_expert * sizeof *logits);
        route(c, s->kern, l->router_bias, logits, lane->own->select, ids + t * c->n_expert_used,
              weights + t * c->n_expert_used);
    }
    ds_lane_tap(lane, DS_TAP_EXPERTS, il, ids, c->n_expert_used);
    ds_lane_tap(lane, DS_TAP_EXPERT_WEIGHTS, il, weights, c->n_expert_used);
    ds_lane_sync(lane);
    if (lane->solo || lane->worker->ith == 0) {
        plan_experts(s, ids, plan);
        offsets(s, plan, input_kind(&l->experts), c->n_embd, plan->act_offset);
        offsets(s, plan, hidden_kind(&l->experts), c->n_ff_expert, plan->act_offset + plan->n_active);
    }
    ds_lane_sync(lane);
    if (lane->solo) return plan;
    ds_act_kind kind = input_kind(&l->experts);
    for (size_t a = ds_claim(lane->worker); a < (size_t)plan->n_active; a = ds_claim(lane->worker)) {
        s->kern->act_pack(kind, 0, plan->count[a], plan->count[a], c->n_embd, lane->xn, (size_t)c->n_embd,
                          plan->slot_token + plan->first[a],
                          (unsigned char *)b->act_gathered.pack[kind] + plan->act_offset[a]);
    }
    ds_barrier(lane->worker);
    return plan;
}

static void gate_up_experts(const ds_lane *lane, const ds_layer *l, const ds_plan *plan, const ds_act *act_x) {
    const ds_step *s = lane->step;
    const ds_experts *x = &l->experts;
    ds_scratch *b = s->scratch;
    ds_act_kind kind = input_kind(x);
    size_t f = (size_t)s->config->n_ff_expert;
    ds_job *jobs = lane->own->jobs;
    for (int a = 0; a < plan->n_active; a++) {
        ds_expert e = ds_experts_get(x, plan->expert[a]);
        const void *act =
            lane->solo ? act_x->pack[kind] : (unsigned char *)b->act_gathered.pack[kind] + plan->act_offset[a];
        size_t at = (size_t)plan->first[a] * f;
        jobs[2 * a] = ds_cpu_job(&x->gate, e.gate, act, plan->count[a], b->gate_exps + at, f);
        jobs[2 * a + 1] = ds_cpu_job(&x->up, e.up, act, plan->count[a], b->up_exps + at, f);
    }
    ds_cpu_mul(lane->worker, s->kern, jobs, 2 * plan->n_active);
}

/* Hidden rows silu(gate) * up of one expert, packed for its down projection. Solo workers keep a copy of their own. */
static void activate_expert(const ds_lane *lane, const ds_layer *l, const ds_plan *plan, int a) {
    const ds_step *s = lane->step;
    ds_scratch *b = s->scratch;
    size_t f = (size_t)s->config->n_ff_expert, at = (size_t)plan->first[a] * f;
    ds_act_kind kind = hidden_kind(&l->experts);
    unsigned char *pack = (lane->solo ? &lane->own->act_experts : &b->act_experts)->pack[kind];
    float *hidden = (lane->solo ? lane->own->hidden_exps : b->gate_exps) + at;
    s->kern->silu_mul(plan->count[a] * (int)f, b->gate_exps + at, b->up_exps + at, hidden);
    s->kern->act_pack(kind, 0, plan->count[a], plan->count[a], (int)f, hidden, f, NULL,
                      pack + plan->act_offset[plan->n_active + a]);
}

static void tap_expert_hidden(const ds_lane *lane, const ds_plan *plan, int il) {
    const ds_step *s = lane->step;
    const ds_tap_entry *entry = ds_lane_tapped(lane, DS_TAP_EXPERT_HIDDEN, il);
    size_t f = (size_t)s->config->n_ff_expert, n = (size_t)s->n_tok * (size_t)s->config->n_expert_used;
    const float *hidden = lane->solo ? lane->own->hidden_exps : s->scratch->gate_exps;
    if (!entry) return;
    ds_barrier(lane->worker);
    for (size_t i = 0; lane->worker->ith == 0 && i < n; i++) {
        float *out = (float *)entry->data + ((size_t)entry->row * (size_t)s->config->n_expert_used + i) * f;
        memcpy(out, hidden + (size_t)plan->slot_of[i] * f, f * sizeof *out);
    }
    ds_barrier(lane->worker);
}

/* Hidden rows of a plain feed-forward (dense or shared) of the lane's tokens, packed for its down projection. */
static const ds_act *activate(const ds_lane *lane, const ds_mat *down, ds_tap_point point, int il) {
    const ds_step *s = lane->step;
    ds_scratch *b = s->scratch;
    size_t f = (size_t)down->k, at = (size_t)lane->t0 * f;
    float *hidden = lane->solo ? lane->own->hidden : b->gate;
    const ds_act *act;
    s->kern->silu_mul((lane->t1 - lane->t0) * (int)f, b->gate + at, b->up + at, hidden + at);
    act = ds_lane_pack(lane, ds_kind_of(down), (int)f, hidden, &lane->own->act_hidden, &b->act_hidden);
    ds_lane_tap(lane, point, il, hidden, (int)f);
    return act;
}

/* The down projections of the experts and of the shared ones, in one phase. */
static void down_all(const ds_lane *lane, const ds_layer *l, const ds_plan *plan, const ds_act *shared) {
    const ds_step *s = lane->step;
    const ds_experts *x = &l->experts;
    ds_scratch *b = s->scratch;
    ds_act_kind kind = hidden_kind(x);
    size_t d = (size_t)s->config->n_embd;
    const unsigned char *pack = (lane->solo ? &lane->own->act_experts : &b->act_experts)->pack[kind];
    ds_job *jobs = lane->own->jobs;
    int n = 0;
    for (int a = 0; a < plan->n_active; a++) {
        ds_expert e = ds_experts_get(x, plan->expert[a]);
        jobs[n++] = ds_cpu_job(&x->down, e.down, pack + plan->act_offset[plan->n_active + a], plan->count[a],
                               b->out_exps + (size_t)plan->first[a] * d, d);
    }
    if (shared)
        jobs[n++] =
            ds_cpu_job(&l->down_shared, l->down_shared.data, ds_act_for(shared, &l->down_shared), s->n_tok, b->y, d);
    ds_cpu_mul(lane->worker, s->kern, jobs, n);
}

/* x += shared output + weighted expert outputs, in the order of choice: the same sum whatever the grouping was. */
static void combine(const ds_lane *lane, const ds_plan *plan, bool shared) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const float *weights = lane->solo ? lane->own->weights : s->scratch->weights;
    size_t d = (size_t)c->n_embd;
    for (int t = lane->t0; t < lane->t1; t++) {
        float *x = lane->x + (size_t)t * d;
        if (shared) s->kern->add_scaled((int)d, 1.0f, s->scratch->y + (size_t)t * d, x);
        for (int k = t * c->n_expert_used; k < (t + 1) * c->n_expert_used; k++) {
            s->kern->add_scaled((int)d, weights[k], s->scratch->out_exps + (size_t)plan->slot_of[k] * d, x);
        }
    }
}

static void experts(const ds_lane *lane, const ds_layer *l, const ds_act *act, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    const ds_act *shared = NULL;
    const ds_plan *plan;
    ds_job jobs[3] = {
        ds_cpu_job(&l->router, l->router.data, ds_act_for(act, &l->router), s->n_tok, b->router, (size_t)c->n_expert)};
    int n = 1;
    if (l->down_shared.data) { /* the shared experts need no routing: they fill the router's phase */
        jobs[n++] = ds_cpu_job(&l->gate_shared, l->gate_shared.data, ds_act_for(act, &l->gate_shared), s->n_tok,
                               b->gate, (size_t)l->gate_shared.rows);
        jobs[n++] = ds_cpu_job(&l->up_shared, l->up_shared.data, ds_act_for(act, &l->up_shared), s->n_tok, b->up,
                               (size_t)l->up_shared.rows);
    }
    ds_cpu_mul(lane->worker, s->kern, jobs, n);
    ds_barrier(lane->worker);
    plan = dispatch(lane, l, act, il);
    gate_up_experts(lane, l, plan, act);
    if (n > 1) shared = activate(lane, &l->down_shared, DS_TAP_SHARED_HIDDEN, il);
    ds_barrier(lane->worker);
    if (lane->solo)
        for (int a = 0; a < plan->n_active; a++) activate_expert(lane, l, plan, a);
    else
        for (size_t a = ds_claim(lane->worker); a < (size_t)plan->n_active; a = ds_claim(lane->worker))
            activate_expert(lane, l, plan, (int)a);
    tap_expert_hidden(lane, plan, il);
    ds_lane_sync(lane);
    down_all(lane, l, plan, shared);
    ds_barrier(lane->worker);
    combine(lane, plan, shared != NULL);
}

static void dense(const ds_lane *lane, const ds_layer *l, const ds_act *act, int il) {
    const ds_step *s = lane->step;
    ds_scratch *b = s->scratch;
    size_t d = (size_t)s->config->n_embd;
    const ds_act *hidden;
    ds_job jobs[2] = {
        ds_cpu_job(&l->gate, l->gate.data, ds_act_for(act, &l->gate), s->n_tok, b->gate, (size_t)l->gate.rows),
        ds_cpu_job(&l->up, l->up.data, ds_act_for(act, &l->up), s->n_tok, b->up, (size_t)l->up.rows),
    };
    ds_cpu_mul(lane->worker, s->kern, jobs, 2);
    ds_barrier(lane->worker);
    hidden = activate(lane, &l->down, DS_TAP_DENSE_HIDDEN, il);
    ds_lane_sync(lane);
    jobs[0] = ds_cpu_job(&l->down, l->down.data, ds_act_for(hidden, &l->down), s->n_tok, b->y, d);
    ds_cpu_mul(lane->worker, s->kern, jobs, 1);
    ds_barrier(lane->worker);
    for (int t = lane->t0; t < lane->t1; t++)
        s->kern->add_scaled((int)d, 1.0f, b->y + (size_t)t * d, lane->x + (size_t)t * d);
}

void ds_feed_forward_norm(const ds_lane *lane, const ds_layer *layer, int il) {
    ds_lane_norm(lane, lane->step->config->n_embd, lane->x, layer->ffn_norm, lane->xn);
    ds_lane_tap(lane, DS_TAP_FFN_NORM, il, lane->xn, lane->step->config->n_embd);
}

void ds_feed_forward(const ds_lane *lane, const ds_layer *layer, int il) {
    const ds_config *c = lane->step->config;
    bool is_dense = il < c->n_layer_dense;
    unsigned kinds = is_dense
                         ? ds_kind_of(&layer->gate) | ds_kind_of(&layer->up)
                         : ds_kind_of(&layer->router) | ds_kind_of(&layer->gate_shared) | ds_kind_of(&layer->up_shared);
    const ds_act *act;
    if (!is_dense && lane->solo) kinds |= ds_kind_of(&layer->experts.gate); /* otherwise packed expert by expert */
    ds_lane_norm(lane, c->n_embd, lane->x, layer->ffn_norm, lane->xn);
    act = ds_lane_pack(lane, kinds, c->n_embd, lane->xn, &lane->own->act_x, &lane->step->scratch->act_x);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_FFN_NORM, il, lane->xn, c->n_embd);
    if (is_dense) dense(lane, layer, act, il);
    else experts(lane, layer, act, il);
}
