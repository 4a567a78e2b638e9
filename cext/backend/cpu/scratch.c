/* scratch.c: the memory of a step, carved from one block sized up front: nothing is allocated in the token loop.
 * Pages are touched as steps need them, so a long prompt's share costs nothing in decode. */
#include <string.h>

#include "backend/cpu/attention.h"
#include "base/os.h"

static int max2(int a, int b) { return a > b ? a : b; }

/* Gathered rows lie expert by expert, each a pack of its own: each may round up to one more tile of rows. */
static ds_act act_by_expert(ds_carver *c, int n_slots, int n_expert, int k) {
    ds_act a;
    int tiles = n_slots < n_expert ? n_slots : n_expert;
    k = (k + 31) / 32 * 32;
    for (int kind = 0; kind < DS_ACT_COUNT; kind++) {
        size_t row = c->kern->act_bytes((ds_act_kind)kind, 1, k) + DS_ACT_ALIGN;
        a.pack[kind] =
            ds_carve(c, c->kern->act_bytes((ds_act_kind)kind, n_slots, k) + row * DS_PANEL_ROWS * (size_t)tiles, 1);
    }
    return a;
}

static ds_moe_room moe_room(ds_carver *c, const ds_config *g, int n_tok) {
    size_t slots = (size_t)n_tok * (size_t)g->n_expert_used,
           active = slots < (size_t)g->n_expert ? slots : (size_t)g->n_expert;
    return (ds_moe_room){
        .plan = {.expert = ds_carve(c, active, sizeof(int)),
                 .first = ds_carve(c, active, sizeof(int)),
                 .count = ds_carve(c, active, sizeof(int)),
                 .slot_token = ds_carve(c, slots, sizeof(int32_t)),
                 .slot_of = ds_carve(c, slots, sizeof(int)),
                 .place = ds_carve(c, (size_t)g->n_expert, sizeof(int))},
        .input_at = ds_carve(c, active, sizeof(size_t)),
        .hidden_at = ds_carve(c, active, sizeof(size_t)),
        .wave = {.now = ds_carve(c, active, sizeof(int)),
                 .left = ds_carve(c, active, sizeof(int)),
                 .experts = ds_carve(c, active, sizeof(int))},
    };
}

static void carve_lane(ds_carver *c, const ds_config *g, int n_tok, ds_lane_scratch *lane) {
    size_t d = (size_t)g->n_embd;
    int hidden = max2(g->n_ff_dense, g->n_expert_shared * g->n_ff_expert);
    ds_lane_scratch l = {
        .x = ds_carve_floats(c, d),
        .xn = ds_carve_floats(c, d),
        .hidden = ds_carve_floats(c, (size_t)hidden),
        .hidden_exps = ds_carve_floats(c, (size_t)g->n_expert_used * (size_t)g->n_ff_expert),
        .logits = ds_carve_floats(c, (size_t)g->n_expert),
        .select = ds_carve_floats(c, (size_t)g->n_expert),
        .act_x = ds_carve_act(c, 1, g->n_embd),
        .act_heads = ds_carve_act(c, 1, g->n_head * g->v_dim),
        .act_hidden = ds_carve_act(c, 1, hidden),
        .act_experts = act_by_expert(c, g->n_expert_used, g->n_expert, g->n_ff_expert),
        .groups = ds_carve_floats(c, (size_t)g->n_group),
        .moe = moe_room(c, g, 1),
        .forecast = {.xn = ds_carve_floats(c, d),
                     .act = ds_carve_act(c, 1, g->n_embd),
                     .ids = ds_carve(c, (size_t)g->n_expert_used, sizeof(int32_t)),
                     .weights = ds_carve_floats(c, (size_t)g->n_expert_used),
                     .chance = ds_carve_floats(c, (size_t)g->n_expert),
                     .experts = ds_carve(c, (size_t)g->n_expert, sizeof(int))},
        .ids = ds_carve(c, (size_t)g->n_expert_used, sizeof(int32_t)),
        .weights = ds_carve_floats(c, (size_t)g->n_expert_used),
        .jobs = ds_carve(c, 2 * (size_t)g->n_expert + 4, sizeof(ds_job)),
        .attention = ds_cpu_attention_of(g)->lane_room(c, g, n_tok),
    };
    if (lane) *lane = l;
}

static void carve_all(ds_carver *c, const ds_config *g, int n_threads, int n_tok, int n_logits, ds_scratch *s) {
    size_t n = (size_t)n_tok, d = (size_t)g->n_embd, h = (size_t)g->n_head;
    size_t shared = (size_t)g->n_expert_shared * (size_t)g->n_ff_expert, slots = n * (size_t)g->n_expert_used;
    size_t hidden = shared > (size_t)g->n_ff_dense ? shared : (size_t)g->n_ff_dense;
    s->lanes = ds_carve(c, (size_t)n_threads, sizeof *s->lanes);
    s->x = ds_carve_floats(c, n * d), s->xn = ds_carve_floats(c, n * d), s->y = ds_carve_floats(c, n * d);
    s->rope = ds_carve_floats(c, n * (size_t)g->rope_dim);
    s->q = ds_carve_floats(c, n * h * (size_t)ds_qk_dim(g));
    s->attention = ds_cpu_attention_of(g)->room(c, g, n_tok);
    s->heads = ds_carve_floats(c, n * h * (size_t)g->v_dim);
    s->router = ds_carve_floats(c, n * (size_t)g->n_expert), s->ids = ds_carve(c, slots, sizeof(int32_t)),
    s->weights = ds_carve_floats(c, slots);
    s->gate = ds_carve_floats(c, n * hidden), s->up = ds_carve_floats(c, n * hidden);
    s->gate_exps = ds_carve_floats(c, slots * (size_t)g->n_ff_expert),
    s->up_exps = ds_carve_floats(c, slots * (size_t)g->n_ff_expert), s->out_exps = ds_carve_floats(c, slots * d);
    s->act_x = ds_carve_act(c, n_tok > n_logits ? n_tok : n_logits, g->n_embd);
    s->act_heads = ds_carve_act(c, n_tok, g->n_head * g->v_dim), s->act_hidden = ds_carve_act(c, n_tok, (int)hidden);
    s->act_gathered = act_by_expert(c, (int)slots, g->n_expert, g->n_embd);
    s->act_experts = act_by_expert(c, (int)slots, g->n_expert, g->n_ff_expert);
    s->moe = moe_room(c, g, n_tok);
    for (int i = 0; i < n_threads; i++) carve_lane(c, g, n_tok, c->base ? &s->lanes[i] : NULL);
}

size_t ds_scratch_bytes(const ds_config *config, const ds_kernels *kern, int n_threads, int n_tok) {
    ds_carver c = {.kern = kern};
    ds_scratch unused = {0};
    carve_all(&c, config, n_threads, n_tok, n_tok, &unused);
    return c.used;
}

ds_status ds_scratch_reserve(ds_scratch *scratch, const ds_config *config, const ds_kernels *kern, int n_threads,
                             int n_tok, ds_error *err) {
    ds_carver c = {.kern = kern};
    ds_scratch next = {.n_tok = n_tok};
    if (scratch->memory && scratch->n_tok >= n_tok) return DS_OK;
    next.bytes = ds_scratch_bytes(config, kern, n_threads, n_tok);
    next.memory = ds_pages_new(next.bytes);
    if (!next.memory) {
        return ds_fail(err, DS_ENOMEM, "no memory for a step of %d tokens (%.1f MiB)", n_tok,
                       (double)next.bytes / (1 << 20));
    }
    c.base = next.memory;
    carve_all(&c, config, n_threads, n_tok, n_tok, &next);
    ds_scratch_release(scratch);
    *scratch = next;
    return DS_OK;
}

void ds_scratch_release(ds_scratch *scratch) {
    ds_pages_release(scratch->memory, scratch->bytes);
    *scratch = (ds_scratch){0};
}
