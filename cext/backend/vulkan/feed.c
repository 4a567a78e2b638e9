/* feed.c: the feed-forward half of a block on a GPU (backend/cpu/moe.c has the equations). The router and the grouping of
 * tokens by expert are the device's; where experts are split, the host has made the plan. */
#include "backend/vulkan/step.h"

#include <string.h>

enum {
    SIGMOID = 1,
    NORMALISE = 2, /* route.comp's flags */
    OTHER_SLOT = 1 << 31, /* combine.comp's */
};

/* Hidden rows silu(gate) * up of n tokens. */
static ds_status gated(ds_gpu_backend *b, const ds_mat *gate, uint64_t gate_at, const ds_mat *up, uint64_t up_at,
                       ds_gpu_input x, int n, ds_error *err) {
    const ds_gpu_product p = {.w = gate_at,
                              .x = x.x,
                              .norm = x.norm,
                              .eps = b->facts.config->rms_eps,
                              .y = b->room.hidden,
                              .tables = b->w.tables,
                              .up = up_at,
                              .ldx = (uint32_t)gate->k,
                              .ldy = (uint32_t)gate->rows,
                              .row_bytes = (uint32_t)gate->row_bytes,
                              .k = (uint32_t)gate->k,
                              .rows = (uint32_t)gate->rows,
                              .n_slots = (uint32_t)n};
    return ds_gpu_mul_gated(b->gpu, &b->commands, &b->room.halves, gate->format, up->format, (uint32_t)up->row_bytes,
                            &p, 1, err);
}

/* What the layer's products read, the residual stream normalised: of one token as they read it, but where others compute
 * some of the experts, who are given it. */
static ds_gpu_input input_of(const ds_gpu_backend *b, const ds_op *op) {
    const bool given = b->facts.places->helpers[op->il - b->facts.weights->layer_begin];
    if (given || ds_gpu_request(b, op)->n_tok != 1) return (ds_gpu_input){b->room.xn, 0, 0};
    return (ds_gpu_input){b->room.x[op->tail], ds_gpu_layer_of(b, op->il)->ffn_norm, 0};
}

static ds_status norm(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const int d = b->facts.config->n_embd;
    if (input_of(b, op).norm) return DS_OK;
    const ds_status st = ds_gpu_norm(b, b->room.x[op->tail], ds_gpu_layer_of(b, op->il)->ffn_norm, b->room.xn, 0,
                                     ds_gpu_request(b, op)->n_tok, d, d, d, err);
    ds_gpu_then(b);
    return st;
}

ds_status ds_gpu_dense(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_layer *l = ds_weights_layer(b->facts.weights, op->il);
    const ds_gpu_layer *g = ds_gpu_layer_of(b, op->il);
    const int n = ds_gpu_request(b, op)->n_tok;
    ds_status st = norm(b, op, err);
    if (st == DS_OK) st = gated(b, &l->gate, g->gate, &l->up, g->up, input_of(b, op), n, err);
    ds_gpu_then(b);
    if (st != DS_OK) return st;
    return ds_gpu_times(b, &l->down, g->down, (ds_gpu_input){b->room.hidden, 0, 0}, b->room.x[op->tail], n, l->down.k,
                        l->down.rows, DS_GPU_ADD, err);
}

/* What a layer's choice of experts is for the host: (n_tok, n_expert_used). */
static ds_gpu_span chosen(const ds_gpu_backend *b, int il) {
    const uint64_t at = (uint64_t)(il - b->facts.weights->layer_begin) * (uint64_t)b->room.n_tok *
                        (uint64_t)b->facts.config->n_expert_used * sizeof(int32_t);
    return (ds_gpu_span){b->room.chosen.at + at, b->room.chosen.host + at};
}

/* Whether each slot is a block of its own: few are, and need no plan. */
static bool is_single(const ds_request *r) { return r->n_tok == 1; }

/* Whether its experts' rows are summed as they are made, into the residual stream. */
static bool is_summed(const ds_gpu_backend *b, const ds_op *op) {
    return !op->split && is_single(ds_gpu_request(b, op));
}

static ds_status choose(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_request *r = ds_gpu_request(b, op);
    const ds_gpu_layer *g = ds_gpu_layer_of(b, op->il);
    const ds_gpu_room *m = &b->room;
    const struct {
        uint64_t logits, bias, ids, copy, weights, blocks, groups;
        uint32_t n_expert, n_used, n_group, n_group_used, flags;
        float scale;
    } push = {m->router,
              g->router_bias,
              m->ids,
              chosen(b, op->il).at,
              m->weights,
              is_single(r) ? g->experts : 0,
              m->groups,
              (uint32_t)c->n_expert,
              (uint32_t)c->n_expert_used,
              (uint32_t)c->n_group,
              (uint32_t)c->n_group_used,
              (c->gating == DS_GATING_SIGMOID ? SIGMOID : 0u) | (c->expert_norm ? NORMALISE : 0u),
              c->expert_scale};
    return ds_gpu_do(b, "route", &push, sizeof push, (uint32_t)r->n_tok, 1, 1, err);
}

ds_status ds_gpu_route(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_layer *l = ds_weights_layer(b->facts.weights, op->il);
    const ds_gpu_layer *g = ds_gpu_layer_of(b, op->il);
    const int n = ds_gpu_request(b, op)->n_tok;
    const ds_gpu_input x = input_of(b, op);
    ds_status st = norm(b, op, err);
    if (st == DS_OK) st = ds_gpu_times(b, &l->router, g->router, x, b->room.router, n, c->n_embd, c->n_expert, 0, err);
    if (st == DS_OK && l->down_shared.data)
        st = gated(b, &l->gate_shared, g->gate_shared, &l->up_shared, g->up_shared, x, n, err);
    ds_gpu_then(b);
    if (st == DS_OK) st = choose(b, op, err);
    if (st != DS_OK || !l->down_shared.data) return st;
    return ds_gpu_times(b, &l->down_shared, g->down_shared, (ds_gpu_input){b->room.hidden, 0, 0}, b->room.shared, n,
                        l->down_shared.k, l->down_shared.rows, 0, err); /* beside the choice, which few threads make */
}

/* Which blocks the experts' products have, and where that stands. */
typedef struct blocks {
    uint64_t groups,
        slot_row; /* groups: gate's, up's, down's, `stride` of them each; slot_row 0: all slots read row 0 */
    uint32_t n, stride, most, usual; /* slots: most of one, and what many have about */
} blocks;

/* Where an expert that is computed here lies: for good, or for this step. */
static ds_gpu_expert expert_at(const ds_gpu_backend *b, int il, int e) {
    const bool stays = ds_residency_place(b->facts.residency, il)[e] == b->number;
    return stays ? ds_gpu_layer_of(b, il)->expert[e] : ds_ahead_expert(b->ahead, il, e);
}

/* What an expert has about: by the step alone, so that products are cut the same wherever experts lie. */
static uint32_t usual_slots(const ds_config *c, uint32_t n_slots) { return n_slots / (uint32_t)c->n_expert + 1; }

/* The host's plan of a split layer, of it what is computed here. */
static blocks split_blocks(ds_gpu_backend *b, const ds_op *op) {
    const ds_plan *plan = &op->split->plan;
    const int n_slots = ds_gpu_request(b, op)->n_tok * b->facts.config->n_expert_used;
    ds_gpu_group *groups = (ds_gpu_group *)(void *)b->room.split_groups.host;
    blocks to = {.groups = b->room.split_groups.at,
                 .slot_row = b->room.split_row.at,
                 .stride = (uint32_t)b->facts.config->n_expert,
                 .usual = usual_slots(b->facts.config, (uint32_t)n_slots)};
    for (int a = 0; a < plan->n_active; a++) {
        const int e = plan->expert[a];
        const uint32_t first = (uint32_t)plan->first[a], count = (uint32_t)plan->count[a];
        if (op->split->owner[e] != b->number) continue;
        const ds_gpu_expert x = expert_at(b, op->il, e);
        groups[to.n] = (ds_gpu_group){x.gate, first, count};
        groups[to.stride + to.n] = (ds_gpu_group){x.up, first, count};
        groups[2 * to.stride + to.n] = (ds_gpu_group){x.down, first, count};
        to.n++;
        if (count > to.most) to.most = count;
    }
    memcpy(b->room.split_row.host, plan->slot_token, (size_t)n_slots * sizeof(int32_t));
    return to;
}

/* Where a layer's experts lie, as plan.comp reads it. */
static uint64_t experts_of(ds_gpu_backend *b, const ds_op *op) {
    const int n = b->facts.config->n_expert, i = op->il - b->facts.weights->layer_begin;
    const uint64_t at = (uint64_t)i * (uint64_t)n * sizeof(ds_gpu_expert);
    if (!ds_gpu_is_taken(b, op)) return ds_gpu_layer_of(b, op->il)->experts;
    ds_gpu_expert *table = (ds_gpu_expert *)(void *)(b->room.taken_experts.host + at);
    for (int e = 0; e < n; e++) table[e] = expert_at(b, op->il, e);
    return b->room.taken_experts.at + at;
}

static ds_status own_blocks(ds_gpu_backend *b, const ds_op *op, blocks *out, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_request *r = ds_gpu_request(b, op);
    const ds_gpu_room *m = &b->room;
    const uint32_t n_slots = (uint32_t)r->n_tok * (uint32_t)c->n_expert_used;
    *out = (blocks){.groups = m->groups, .slot_row = m->slot_row, .n = n_slots, .stride = n_slots, .most = 1};
    if (is_single(r)) return out->slot_row = 0, DS_OK; /* all read the one row: nothing is asked before it */
    out->n = out->stride = (uint32_t)c->n_expert;
    out->most = (uint32_t)r->n_tok; /* a token has an expert once */
    out->usual = usual_slots(c, n_slots);
    const struct {
        uint64_t ids, experts, groups, slot_row, slot_of;
        uint32_t n_expert, n_slots, n_used;
    } push = {m->ids,  experts_of(b, op),         m->groups, m->slot_row, m->slot_of, out->n,
              n_slots, (uint32_t)c->n_expert_used};
    const ds_status st = ds_gpu_do(b, "plan", &push, 52, 1, 1, 1, err);
    ds_gpu_then(b);
    return st;
}

static ds_status multiply(ds_gpu_backend *b, const ds_op *op, const blocks *k, ds_error *err) {
    const ds_experts *x = &ds_weights_layer(b->facts.weights, op->il)->experts;
    const uint64_t each = (uint64_t)k->stride * sizeof(ds_gpu_group);
    const ds_gpu_input input = input_of(b, op);
    ds_gpu_product p = {.x = input.x,
                        .norm = input.norm,
                        .eps = b->facts.config->rms_eps,
                        .y = b->room.hidden_exps,
                        .groups = k->groups,
                        .slot_row = k->slot_row,
                        .tables = b->w.tables,
                        .up = k->groups + each,
                        .ldx = k->slot_row ? (uint32_t)x->gate.k : 0,
                        .ldy = (uint32_t)x->gate.rows,
                        .row_bytes = (uint32_t)x->gate.row_bytes,
                        .k = (uint32_t)x->gate.k,
                        .rows = (uint32_t)x->gate.rows,
                        .n_slots = k->most,
                        .usual = k->usual};
    if (!k->n) return DS_OK;
    const ds_status st = ds_gpu_mul_gated(b->gpu, &b->commands, &b->room.halves, x->gate.format, x->up.format,
                                          (uint32_t)x->up.row_bytes, &p, k->n, err);
    if (st != DS_OK) return st;
    ds_gpu_then(b);
    p = (ds_gpu_product){.x = b->room.hidden_exps,
                         .y = op->split && !op->shared ? b->room.rows_out.at : b->room.rows,
                         .groups = k->groups + 2 * each,
                         .tables = b->w.tables,
                         .ldx = (uint32_t)x->down.k,
                         .ldy = (uint32_t)x->down.rows,
                         .row_bytes = (uint32_t)x->down.row_bytes,
                         .k = (uint32_t)x->down.k,
                         .rows = (uint32_t)x->down.rows,
                         .n_slots = k->most,
                         .usual = k->usual};
    if (!is_summed(b, op)) return ds_gpu_mul(b->gpu, &b->commands, &b->room.halves, x->down.format, &p, k->n, err);
    const bool shared = ds_weights_layer(b->facts.weights, op->il)->down_shared.data;
    p.y = b->room.x[op->tail];
    return ds_gpu_mul_sum(b->gpu, &b->commands, x->down.format, &p, k->n, b->room.weights, shared ? b->room.shared : 0,
                          err);
}

ds_status ds_gpu_experts(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    blocks k = {0};
    ds_status st = DS_OK;
    if (op->split) k = split_blocks(b, op);
    else st = own_blocks(b, op, &k, err);
    return st == DS_OK ? multiply(b, op, &k, err) : st;
}

/* The choices are counted; where another backend combines, the rows made here are put to the others. */
void ds_gpu_take_experts(ds_gpu_backend *b, const ds_op *op) {
    const ds_config *c = b->facts.config;
    const size_t d = (size_t)c->n_embd;
    if (!op->split) {
        ds_residency_count(b->facts.residency, op->il, (const int32_t *)(const void *)chosen(b, op->il).host,
                           ds_gpu_request(b, op)->n_tok * c->n_expert_used);
        return;
    }
    const ds_plan *plan = &op->split->plan;
    for (int a = 0; !op->shared && a < plan->n_active; a++) {
        if (op->split->owner[plan->expert[a]] != b->number) continue;
        const size_t at = (size_t)plan->first[a] * d;
        memcpy(op->split->rows + at, (const float *)(const void *)b->room.rows_out.host + at,
               (size_t)plan->count[a] * d * sizeof(float));
    }
}

/* Rows of other backends' experts to where the device reads them, and which slots those are. */
static void give_others(ds_gpu_backend *b, const ds_op *op) {
    const ds_split *s = op->split;
    const size_t d = (size_t)b->facts.config->n_embd;
    const int n_slots = ds_gpu_request(b, op)->n_tok * b->facts.config->n_expert_used;
    uint32_t *slot_of = (uint32_t *)(void *)b->room.split_of.host;
    for (int a = 0; a < s->plan.n_active; a++) {
        if (s->owner[s->plan.expert[a]] == b->number) continue;
        const size_t at = (size_t)s->plan.first[a] * d;
        memcpy((float *)(void *)b->room.others.host + at, s->rows + at, (size_t)s->plan.count[a] * d * sizeof(float));
    }
    for (int i = 0; i < n_slots; i++)
        slot_of[i] = (uint32_t)s->plan.slot_of[i] | (s->owner[s->ids[i]] == b->number ? 0u : (uint32_t)OTHER_SLOT);
}

ds_status ds_gpu_combine(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_config *c = b->facts.config;
    const ds_gpu_room *m = &b->room;
    const bool shared = ds_weights_layer(b->facts.weights, op->il)->down_shared.data;
    if (is_summed(b, op)) return DS_OK;
    if (op->split) give_others(b, op);
    const struct {
        uint64_t x, y, rows, others, slot_of, weights;
        uint32_t n, n_used;
    } push = {m->x[op->tail],
              shared ? m->shared : 0,
              m->rows,
              m->others.at,
              op->split ? m->split_of.at : m->slot_of,
              m->weights,
              (uint32_t)c->n_embd,
              (uint32_t)c->n_expert_used};
    return ds_gpu_do(b, "combine", &push, sizeof push, ds_gpu_pieces((uint32_t)c->n_embd, DS_GPU_THREADS),
                     (uint32_t)ds_gpu_request(b, op)->n_tok, 1, err);
}
