/* moe.c: the feed-forward half of a block: dense, or routed experts beside shared ones. Knows no ISA.
 *
 *   y = sum_{e in top-k} w_e down_e(silu(gate_e x) * up_e x) + shared(x)            (DeepSeek-V2, eq. 20 to 22)
 *
 * Tokens are grouped by expert, so that an expert's matrices are read once a step whatever the number of its tokens. */
#include <string.h>

#include "backend/cpu/lane.h"

/* Rows silu(gate) * up of the lane's tokens, packed for the down projection. Solo workers keep a copy of their own. */
static const ds_act *activate(const ds_lane *lane, const ds_mat *down, ds_tap_point point, int il) {
    ds_scratch *b = lane->step->scratch;
    size_t f = (size_t)down->k, at = (size_t)lane->t0 * f;
    float *hidden = lane->solo ? lane->own->hidden : b->gate;
    const ds_act *act;
    ds_lane_silu_mul(lane, (size_t)(lane->t1 - lane->t0) * f, b->gate + at, b->up + at, hidden + at);
    act = ds_lane_pack(lane, ds_kind_of(down), (int)f, hidden, &lane->own->act_hidden, &b->act_hidden);
    ds_lane_tap(lane, point, il, hidden, (int)f);
    return act;
}

static void norm(const ds_lane *lane, const ds_layer *l) {
    ds_lane_norm(lane, lane->step->config->n_embd, lane->x, l->ffn_norm, lane->xn);
}

bool ds_cpu_ffn_norm(const ds_lane *lane, const ds_op *op) {
    const int d = lane->step->config->n_embd;
    norm(lane, ds_weights_layer(lane->step->weights, op->il));
    ds_lane_tap(lane, DS_TAP_FFN_NORM, op->il, lane->xn, d);
    return true;
}

bool ds_cpu_dense(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    const ds_layer *l = ds_weights_layer(s->weights, op->il);
    ds_scratch *b = s->scratch;
    const int n_embd = s->config->n_embd;
    const size_t d = (size_t)n_embd;
    const ds_act *act, *hidden;
    norm(lane, l);
    act = ds_lane_pack(lane, ds_kind_of(&l->gate) | ds_kind_of(&l->up), n_embd, lane->xn, &lane->own->act_x, &b->act_x);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_FFN_NORM, op->il, lane->xn, n_embd);
    ds_job jobs[2] = {
        ds_cpu_job(&l->gate, l->gate.data, ds_act_for(act, &l->gate), s->n_tok, b->gate, (size_t)l->gate.rows),
        ds_cpu_job(&l->up, l->up.data, ds_act_for(act, &l->up), s->n_tok, b->up, (size_t)l->up.rows),
    };
    ds_cpu_mul(lane->worker, s->kern, jobs, 2);
    ds_barrier(lane->worker);
    hidden = activate(lane, &l->down, DS_TAP_DENSE_HIDDEN, op->il);
    ds_lane_sync(lane);
    jobs[0] = ds_cpu_job(&l->down, l->down.data, ds_act_for(hidden, &l->down), s->n_tok, b->y, d);
    ds_cpu_mul(lane->worker, s->kern, jobs, 1);
    ds_barrier(lane->worker);
    for (int t = lane->t0; t < lane->t1; t++)
        s->kern->add_scaled(n_embd, 1.0f, b->y + (size_t)t * d, lane->x + (size_t)t * d);
    ds_lane_tap(lane, DS_TAP_L_OUT, op->il, lane->x, n_embd);
    return true;
}

/* ---- The router ---- */

/* The kinds of pack that ROUTE makes. Several tokens' rows are packed for the experts one by one, behind the plan. */
static unsigned route_kinds(const ds_lane *lane, const ds_layer *l) {
    return ds_kind_of(&l->router) | ds_kind_of(&l->gate_shared) | ds_kind_of(&l->up_shared) |
           (lane->solo ? ds_kind_of(&l->experts.gate) : 0);
}

static int32_t *ids_of(const ds_lane *lane) { return lane->solo ? lane->own->ids : lane->step->scratch->ids; }
static float *weights_of(const ds_lane *lane) { return lane->solo ? lane->own->weights : lane->step->scratch->weights; }

/* Each lane routes its own tokens. */
static void choose(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const size_t n_used = (size_t)c->n_expert_used;
    ds_lane_tap(lane, DS_TAP_ROUTER_LOGITS, il, s->scratch->router, c->n_expert);
    for (int t = lane->t0; t < lane->t1; t++) {
        float *logits = s->scratch->router + (size_t)t * (size_t)c->n_expert;
        if (lane->solo) logits = memcpy(lane->own->logits, logits, (size_t)c->n_expert * sizeof *logits);
        ds_route(c, s->kern, l->router_bias, logits, lane->own->select, lane->own->groups,
                 ids_of(lane) + (size_t)t * n_used, weights_of(lane) + (size_t)t * n_used);
    }
    ds_lane_tap(lane, DS_TAP_EXPERTS, il, ids_of(lane), c->n_expert_used);
    ds_lane_tap(lane, DS_TAP_EXPERT_WEIGHTS, il, weights_of(lane), c->n_expert_used);
}

bool ds_cpu_route(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const ds_layer *l = ds_weights_layer(s->weights, op->il);
    ds_scratch *b = s->scratch;
    int n = 1;
    norm(lane, l);
    const ds_act *act = ds_lane_pack(lane, route_kinds(lane, l), c->n_embd, lane->xn, &lane->own->act_x, &b->act_x);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_FFN_NORM, op->il, lane->xn, c->n_embd);
    ds_job jobs[3] = {
        ds_cpu_job(&l->router, l->router.data, ds_act_for(act, &l->router), s->n_tok, b->router, (size_t)c->n_expert)};
    if (l->down_shared.data) { /* the shared experts need no routing: they fill the router's phase */
        jobs[n++] = ds_cpu_job(&l->gate_shared, l->gate_shared.data, ds_act_for(act, &l->gate_shared), s->n_tok,
                               b->gate, (size_t)l->gate_shared.rows);
        jobs[n++] = ds_cpu_job(&l->up_shared, l->up_shared.data, ds_act_for(act, &l->up_shared), s->n_tok, b->up,
                               (size_t)l->up_shared.rows);
    }
    ds_cpu_mul(lane->worker, s->kern, jobs, n);
    ds_barrier(lane->worker);
    choose(lane, l, op->il);
    ds_lane_sync(lane);
    return true;
}

/* ---- The experts ---- */

/* One layer's experts as a worker runs them. */
typedef struct moe {
    const ds_lane *lane;
    const ds_layer *layer;
    const ds_op *op;
    ds_moe_room *room;
    const ds_plan *plan;
    ds_wave *wave; /* every worker's, or where experts have to be waited for, one for all that worker 0 writes */
    float *rows; /* (n_slots, n_embd) */
} moe;

static moe moe_of(const ds_lane *lane, const ds_op *op) {
    ds_moe_room *room = lane->solo ? &lane->own->moe : &lane->step->scratch->moe;
    return (moe){
        .lane = lane,
        .layer = ds_weights_layer(lane->step->weights, op->il),
        .op = op,
        .room = room,
        .plan = op->split ? &op->split->plan : &room->plan,
        .wave = ds_residency_is_settled(lane->step->residency) ? &room->wave : &lane->step->scratch->moe.wave,
        .rows = op->split && !op->shared ? op->split->rows : lane->step->scratch->out_exps,
    };
}

static bool is_mine(const moe *m, int e) { return !m->op->split || m->op->split->owner[e] == m->lane->step->backend; }

static ds_expert expert_of(const moe *m, int a) {
    return ds_residency_get(m->lane->step->residency, m->op->il, m->plan->expert[a]);
}

/* Its formats and shapes, whether it is ready or not. */
static ds_expert bound_of(const moe *m, int a) {
    return ds_residency_bound(m->lane->step->weights, m->op->il, m->plan->expert[a]);
}

/* The kind of pack that an expert's inputs take (its gate's and its up's: they are bound to the same), or its hidden rows. */
static ds_act_kind kind_of(const ds_mat *mat) { return ds_format_get(mat->format)->act; }

/* Where each active expert's rows start in the packs of inputs and of hidden rows. */
static void lay_out(const moe *m) {
    const ds_step *s = m->lane->step;
    size_t input[DS_ACT_COUNT] = {0}, hidden[DS_ACT_COUNT] = {0};
    for (int a = 0; a < m->plan->n_active; a++) {
        if (!is_mine(m, m->plan->expert[a])) continue;
        const ds_expert e = bound_of(m, a);
        const ds_act_kind in = kind_of(&e.gate), mid = kind_of(&e.down);
        const int n = m->plan->count[a];
        m->room->input_at[a] = input[in];
        m->room->hidden_at[a] = hidden[mid];
        input[in] += (s->kern->act_bytes(in, n, s->config->n_embd) + DS_ACT_ALIGN - 1) / DS_ACT_ALIGN * DS_ACT_ALIGN;
        hidden[mid] +=
            (s->kern->act_bytes(mid, n, s->config->n_ff_expert) + DS_ACT_ALIGN - 1) / DS_ACT_ALIGN * DS_ACT_ALIGN;
    }
}

/* Nothing of this backend's part is computed yet: all of it is one wave, or is left. */
static void begin_waves(const moe *m, bool settled) {
    ds_wave *w = m->wave;
    int *to = settled ? w->now : w->left, n = 0;
    for (int a = 0; a < m->plan->n_active; a++)
        if (is_mine(m, m->plan->expert[a])) to[n++] = a;
    w->n_now = settled ? n : 0;
    w->n_left = settled ? 0 : n;
}

/* The plan, this backend's part of it laid out and being made ready; worker 0 tells with the first wave where that failed.
 * Where the host made the plan, the experts have been begun already. */
static void prepare(const moe *m) {
    const ds_lane *lane = m->lane;
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const bool first = lane->worker->ith == 0, settled = ds_residency_is_settled(s->residency);
    if (!m->op->split && (lane->solo || first))
        ds_plan_build(&m->room->plan, c->n_expert, s->n_tok, c->n_expert_used, ids_of(lane));
    if (first && !m->op->split) s->failure->status = ds_residency_begin(s->residency, m->op->il, m->plan, s->failure);
    if (first && !settled && m->op->shared && s->failure->status == DS_OK) ds_cpu_forecast(lane, m->op->il);
    if (lane->solo || first) lay_out(m);
    if (first || (lane->solo && settled)) begin_waves(m, settled);
    ds_lane_sync(lane);
}

/* Worker 0: the experts that are ready, of those that are left. At least one where `wait`. */
static ds_status choose_ready(const moe *m, bool wait) {
    ds_residency *r = m->lane->step->residency;
    ds_wave *w = m->wave;
    const int il = m->op->il;
    int n = 0;
    for (int i = 0; i < w->n_left; i++) w->experts[i] = m->plan->expert[w->left[i]];
    if (wait) {
        const ds_status st = ds_residency_wait(r, il, w->experts, w->n_left, m->lane->step->failure);
        if (st != DS_OK) return st;
    }
    w->n_now = 0;
    for (int i = 0; i < w->n_left; i++) {
        if (ds_residency_ready(r, il, w->experts[i])) w->now[w->n_now++] = w->left[i];
        else w->left[n++] = w->left[i];
    }
    w->n_left = n;
    return DS_OK;
}

/* Worker 0: nothing reads the wave's experts any more. */
static void release_wave(const moe *m) {
    ds_wave *w = m->wave;
    for (int i = 0; i < w->n_now; i++) w->experts[i] = m->plan->expert[w->now[i]];
    ds_residency_release(m->lane->step->residency, m->op->il, w->experts, w->n_now);
}

static void end_experts(const moe *m) {
    if (!m->op->split) ds_residency_end(m->lane->step->residency, m->op->il);
}

typedef enum wave_outcome { WAVE_FAILED, WAVE_DONE, WAVE_NEXT } wave_outcome;

/* The next experts to compute; every worker calls it. The first wave takes what is there and waits for nothing where the
 * shared experts are to be computed in it. */
static wave_outcome next_wave(const moe *m, bool first, bool shared) {
    const ds_lane *lane = m->lane;
    const ds_step *s = lane->step;
    ds_wave *w = m->wave;
    if (ds_residency_is_settled(s->residency)) return first ? WAVE_NEXT : WAVE_DONE;
    if (lane->worker->ith == 0 && s->failure->status == DS_OK) { /* else the layer could not be begun */
        if (!first) release_wave(m);
        w->n_now = 0;
        if (w->n_left) s->failure->status = choose_ready(m, !first || !shared);
        if (s->failure->status != DS_OK || (!w->n_now && !first)) end_experts(m);
    }
    ds_barrier(lane->worker);
    if (s->failure->status != DS_OK) return WAVE_FAILED;
    return w->n_now || first ? WAVE_NEXT : WAVE_DONE;
}

static unsigned char *input_pack(const moe *m, const ds_expert *e, int a) {
    const ds_lane *lane = m->lane;
    const ds_act_kind kind = kind_of(&e->gate);
    if (lane->solo) return lane->own->act_x.pack[kind]; /* a solo worker's one row serves all its experts as it is */
    return (unsigned char *)lane->step->scratch->act_gathered.pack[kind] + m->room->input_at[a];
}

static unsigned char *hidden_pack(const moe *m, const ds_expert *e, int a) {
    const ds_act *act = m->lane->solo ? &m->lane->own->act_experts : &m->lane->step->scratch->act_experts;
    return (unsigned char *)act->pack[kind_of(&e->down)] + m->room->hidden_at[a];
}

/* The inputs of a solo worker's experts, in the kinds that ROUTE has not packed them in already. */
static void pack_one(const moe *m) {
    const ds_lane *lane = m->lane;
    unsigned kinds = 0, packed = m->op->shared ? route_kinds(lane, m->layer) : 0;
    for (int a = 0; a < m->plan->n_active; a++) {
        if (!is_mine(m, m->plan->expert[a])) continue;
        const ds_expert e = bound_of(m, a);
        kinds |= 1u << kind_of(&e.gate);
    }
    ds_lane_pack(lane, kinds & ~packed, lane->step->config->n_embd, lane->xn, &lane->own->act_x, NULL);
}

/* Each expert's rows gathered and packed. */
static void gather(const moe *m) {
    const ds_step *s = m->lane->step;
    const ds_plan *plan = m->plan;
    const int d = s->config->n_embd;
    for (size_t a = ds_claim(m->lane->worker); a < (size_t)plan->n_active; a = ds_claim(m->lane->worker)) {
        if (!is_mine(m, plan->expert[a])) continue;
        const ds_expert e = bound_of(m, (int)a);
        s->kern->act_pack(kind_of(&e.gate), 0, plan->count[a], plan->count[a], d, m->lane->xn, (size_t)d,
                          plan->slot_token + plan->first[a], input_pack(m, &e, (int)a));
    }
    ds_barrier(m->lane->worker);
}

static void gate_up(const moe *m) {
    const ds_step *s = m->lane->step;
    const ds_plan *plan = m->plan;
    const size_t f = (size_t)s->config->n_ff_expert;
    ds_job *jobs = m->lane->own->jobs;
    int n = 0;
    for (int i = 0; i < m->wave->n_now; i++) {
        const int a = m->wave->now[i];
        const ds_expert e = expert_of(m, a);
        const void *act = input_pack(m, &e, a);
        const size_t at = (size_t)plan->first[a] * f;
        jobs[n++] = ds_cpu_job(&e.gate, e.gate.data, act, plan->count[a], s->scratch->gate_exps + at, f);
        jobs[n++] = ds_cpu_job(&e.up, e.up.data, act, plan->count[a], s->scratch->up_exps + at, f);
    }
    ds_cpu_mul(m->lane->worker, s->kern, jobs, n);
}

/* Hidden rows silu(gate) * up of one expert, packed for its down projection. Solo workers keep a copy of their own. */
static void activate_expert(const moe *m, int a) {
    const ds_step *s = m->lane->step;
    const ds_plan *plan = m->plan;
    ds_scratch *b = s->scratch;
    const ds_expert e = bound_of(m, a);
    const size_t f = (size_t)s->config->n_ff_expert, at = (size_t)plan->first[a] * f;
    float *hidden = (m->lane->solo ? m->lane->own->hidden_exps : b->gate_exps) + at;
    ds_lane_silu_mul(m->lane, (size_t)plan->count[a] * f, b->gate_exps + at, b->up_exps + at, hidden);
    s->kern->act_pack(kind_of(&e.down), 0, plan->count[a], plan->count[a], (int)f, hidden, f, NULL,
                      hidden_pack(m, &e, a));
}

static void activate_all(const moe *m) {
    const ds_lane *lane = m->lane;
    const ds_wave *w = m->wave;
    if (lane->solo)
        for (int i = 0; i < w->n_now; i++) activate_expert(m, w->now[i]);
    else
        for (size_t i = ds_claim(lane->worker); i < (size_t)w->n_now; i = ds_claim(lane->worker))
            activate_expert(m, w->now[i]);
}

static void tap_hidden(const moe *m) {
    const ds_lane *lane = m->lane;
    const ds_step *s = lane->step;
    const ds_tap_entry *entry = ds_lane_tapped(lane, DS_TAP_EXPERT_HIDDEN, m->op->il);
    const size_t f = (size_t)s->config->n_ff_expert, n = (size_t)s->n_tok * (size_t)s->config->n_expert_used;
    const float *hidden = lane->solo ? lane->own->hidden_exps : s->scratch->gate_exps;
    if (!entry) return;
    ds_barrier(lane->worker);
    for (size_t i = 0; lane->worker->ith == 0 && i < n; i++) {
        if (m->op->split && !is_mine(m, m->op->split->ids[i])) continue; /* another backend's */
        memcpy((float *)entry->data + ((size_t)entry->row * (size_t)s->config->n_expert_used + i) * f,
               hidden + (size_t)m->plan->slot_of[i] * f, f * sizeof *hidden);
    }
    ds_barrier(lane->worker);
}

/* The down projections of the experts and of the shared ones, in one phase. */
static void down_all(const moe *m, const ds_act *shared) {
    const ds_step *s = m->lane->step;
    const ds_layer *l = m->layer;
    const ds_plan *plan = m->plan;
    const size_t d = (size_t)s->config->n_embd;
    ds_job *jobs = m->lane->own->jobs;
    int n = 0;
    for (int i = 0; i < m->wave->n_now; i++) {
        const int a = m->wave->now[i];
        const ds_expert e = expert_of(m, a);
        jobs[n++] = ds_cpu_job(&e.down, e.down.data, hidden_pack(m, &e, a), plan->count[a],
                               m->rows + (size_t)plan->first[a] * d, d);
    }
    if (shared) {
        jobs[n++] = ds_cpu_job(&l->down_shared, l->down_shared.data, ds_act_for(shared, &l->down_shared), s->n_tok,
                               s->scratch->y, d);
    }
    ds_cpu_mul(m->lane->worker, s->kern, jobs, n);
}

/* What is ready is computed while the drive reads the rest. */
bool ds_cpu_experts(const ds_lane *lane, const ds_op *op) {
    const moe m = moe_of(lane, op);
    const bool has_shared = op->shared && m.layer->down_shared.data;
    const ds_act *shared = NULL;
    wave_outcome outcome;
    prepare(&m);
    if (lane->solo) pack_one(&m);
    else gather(&m);
    for (bool first = true; (outcome = next_wave(&m, first, has_shared)) == WAVE_NEXT; first = false) {
        gate_up(&m);
        if (has_shared && first) shared = activate(lane, &m.layer->down_shared, DS_TAP_SHARED_HIDDEN, op->il);
        ds_barrier(lane->worker);
        activate_all(&m);
        ds_lane_sync(lane);
        down_all(&m, first ? shared : NULL);
        ds_barrier(lane->worker);
    }
    if (outcome == WAVE_FAILED) return false;
    tap_hidden(&m);
    if (ds_residency_is_settled(lane->step->residency) && lane->worker->ith == 0) end_experts(&m);
    return true;
}

/* x += shared output + weighted expert outputs, in the order of choice: the same sum whatever the grouping was, and
 * whoever computed a row. */
bool ds_cpu_combine(const ds_lane *lane, const ds_op *op) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const moe m = moe_of(lane, op);
    const float *weights = weights_of(lane);
    const size_t d = (size_t)c->n_embd, n_used = (size_t)c->n_expert_used;
    for (int t = lane->t0; t < lane->t1; t++) {
        float *x = lane->x + (size_t)t * d;
        if (m.layer->down_shared.data) s->kern->add_scaled(c->n_embd, 1.0f, s->scratch->y + (size_t)t * d, x);
        for (size_t i = (size_t)t * n_used; i < ((size_t)t + 1) * n_used; i++) {
            const float *rows = op->split && !is_mine(&m, op->split->ids[i]) ? op->split->rows : s->scratch->out_exps;
            s->kern->add_scaled(c->n_embd, weights[i], rows + (size_t)m.plan->slot_of[i] * d, x);
        }
    }
    ds_lane_tap(lane, DS_TAP_L_OUT, op->il, lane->x, c->n_embd);
    return true;
}
