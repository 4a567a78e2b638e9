/* scratch.c: the memory of a step, carved from one block sized up front: nothing is allocated in the token loop.
 * Pages are touched as steps need them, so a long prompt's share costs nothing in decode. */
#include <string.h>

#include "backend/cpu/step.h"
#include "base/os.h"

static int max2(int a, int b) { return a > b ? a : b; }

/* Hands out aligned pieces of base; with base NULL it only measures. */
typedef struct carver {
    unsigned char *base;
    size_t used;
    const ds_kernels *kern;
} carver;

static void *carve(carver *c, size_t count, size_t item) {
    size_t at = c->used;
    c->used += (count * item + DS_ACT_ALIGN - 1) / DS_ACT_ALIGN * DS_ACT_ALIGN;
    return c->base ? c->base + at : NULL;
}

static float *floats(carver *c, size_t n) { return carve(c, n, sizeof(float)); }

/* Room for n_tok rows of up to k values in every kind of pack. */
static ds_act act(carver *c, int n_tok, int k) {
    ds_act a;
    k = (k + 31) / 32 * 32; /* a narrower row may be of whole blocks where the widest is not */
    for (int kind = 0; kind < DS_ACT_COUNT; kind++)
        a.pack[kind] = carve(c, c->kern->act_bytes((ds_act_kind)kind, n_tok, k), 1);
    return a;
}

/* Gathered rows lie expert by expert, each a pack of its own: each may round up to one more tile of rows. */
static ds_act act_by_expert(carver *c, int n_slots, int n_expert, int k) {
    ds_act a;
    int tiles = n_slots < n_expert ? n_slots : n_expert;
    k = (k + 31) / 32 * 32;
    for (int kind = 0; kind < DS_ACT_COUNT; kind++) {
        size_t row = c->kern->act_bytes((ds_act_kind)kind, 1, k) + DS_ACT_ALIGN;
        a.pack[kind] =
            carve(c, c->kern->act_bytes((ds_act_kind)kind, n_slots, k) + row * DS_PANEL_ROWS * (size_t)tiles, 1);
    }
    return a;
}

static ds_moe_room moe_room(carver *c, const ds_config *g, int n_tok) {
    size_t slots = (size_t)n_tok * (size_t)g->n_expert_used,
           active = slots < (size_t)g->n_expert ? slots : (size_t)g->n_expert;
    return (ds_moe_room){
        .plan = {.expert = carve(c, active, sizeof(int)),
                 .first = carve(c, active, sizeof(int)),
                 .count = carve(c, active, sizeof(int)),
                 .slot_token = carve(c, slots, sizeof(int32_t)),
                 .slot_of = carve(c, slots, sizeof(int)),
                 .place = carve(c, (size_t)g->n_expert, sizeof(int))},
        .input_at = carve(c, active, sizeof(size_t)),
        .hidden_at = carve(c, active, sizeof(size_t)),
    };
}

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

/* A block of expanded rows of any kind: n values, of which the last n_tail may be kept apart. */
static unsigned char *expanded_rows(carver *c, size_t float_bytes, int n, int n_tail) {
    size_t most = ds_row_layout_of(DS_ROWS_F32, float_bytes, 0, DS_ATTEND_BLOCK).bytes;
    for (ds_row_kind kind = DS_ROWS_I16; kind <= DS_ROWS_Q8; kind++) {
        const int tail = kind == DS_ROWS_Q8 ? n_tail : 0;
        const size_t bytes = ds_row_bytes_of(kind, n - tail, tail);
        most = max_size(most, ds_row_layout_of(kind, bytes, tail, DS_ATTEND_BLOCK).bytes);
    }
    return carve(c, most, 1);
}

/* Float rows take the most room of all kinds in everything but what is expanded. */
static ds_attend_lane attend_lane(carver *c, const ds_config *g, int n_tok) {
    size_t r = (size_t)g->kv_lora_rank, rows = (size_t)ds_attend_pad(n_tok),
           row = ds_expand_ld(g->nope_dim, g->rope_dim, g->v_dim) * sizeof(float);
    int width = max2(ds_kv_width(g), ds_qk_dim(g)),
        n_rows = DS_GROUP_ROWS > DS_QUERY_BLOCK ? DS_GROUP_ROWS : DS_QUERY_BLOCK;
    return (ds_attend_lane){
        .row = floats(c, (size_t)width),
        .scratch = carve(c, ds_attend_scratch(n_rows), 1),
        .k_b = floats(c, r * (size_t)g->nope_dim),
        .v_b = floats(c, r * (size_t)g->v_dim),
        .columns = floats(c, r * DS_ATTEND_ROWS),
        .weights = carve(c,
                         max_size(ds_expand_weights_bytes(DS_ROWS_F32, g->kv_lora_rank, g->nope_dim, g->v_dim),
                                  ds_expand_weights_bytes(DS_ROWS_I16, g->kv_lora_rank, g->nope_dim, g->v_dim)),
                         1),
        .expand = carve(c, ds_expand_scratch(DS_ROWS_I16, g->nope_dim, g->rope_dim, g->v_dim), 1),
        .queries =
            carve(c, rows, ds_query_bytes(DS_ROWS_F32, 1, (int)ds_row_pad(ds_qk_dim(g)), (int)ds_row_pad(g->rope_dim))),
        .key_block = expanded_rows(c, row, ds_qk_dim(g), g->rope_dim),
        .value_block = expanded_rows(c, row, g->v_dim, 0),
        .visible = carve(c, rows, sizeof(int32_t)),
        .m = floats(c, rows),
        .l = floats(c, rows),
        .acc = floats(c, rows * ds_row_pad(g->v_dim)),
    };
}

static ds_attend_room attend_room(carver *c, const ds_config *g, int n_tok) {
    size_t n = (size_t)n_tok, rows = ds_attend_max_rows(g, n_tok), slots = ds_attend_max_slots(g, n_tok);
    size_t blocks = ((size_t)g->n_head + DS_GROUP_ROWS - 1) / DS_GROUP_ROWS;
    size_t expanded =
        2 * n * (size_t)g->n_head * (size_t)ds_expand_max_parts(g); /* padding at most doubles a span's rows */
    return (ds_attend_room){
        .plan = {.routes = carve(c, n, sizeof(ds_attend_route)),
                 .groups = carve(c, n * blocks, sizeof(ds_attend_group)),
                 .visible = carve(c, rows, sizeof(int32_t))},
        .latent = floats(c, n * (size_t)g->n_head * (size_t)ds_kv_width(g)),
        .queries = carve(c, rows, ds_attend_query_bytes(g)),
        .m = floats(c, slots),
        .l = floats(c, slots),
        .acc = floats(c, slots * ds_row_pad(g->kv_lora_rank)),
        .head_m = floats(c, expanded),
        .head_l = floats(c, expanded),
        .head_acc = floats(c, expanded * ds_row_pad(g->v_dim)),
    };
}

static void carve_lane(carver *c, const ds_config *g, int n_tok, ds_lane_scratch *lane) {
    size_t d = (size_t)g->n_embd;
    int hidden = max2(g->n_ff_dense, g->n_expert_shared * g->n_ff_expert);
    ds_lane_scratch l = {
        .x = floats(c, d),
        .xn = floats(c, d),
        .q_a = floats(c, (size_t)g->q_lora_rank),
        .hidden = floats(c, (size_t)hidden),
        .hidden_exps = floats(c, (size_t)g->n_expert_used * (size_t)g->n_ff_expert),
        .logits = floats(c, (size_t)g->n_expert),
        .select = floats(c, (size_t)g->n_expert),
        .act_x = act(c, 1, g->n_embd),
        .act_q = act(c, 1, g->q_lora_rank),
        .act_heads = act(c, 1, g->n_head * g->v_dim),
        .act_hidden = act(c, 1, hidden),
        .act_experts = act_by_expert(c, g->n_expert_used, g->n_expert, g->n_ff_expert),
        .act_nope = act(c, n_tok, g->nope_dim),
        .act_latent = act(c, n_tok, g->kv_lora_rank),
        .groups = floats(c, (size_t)g->n_group),
        .moe = moe_room(c, g, 1),
        .ids = carve(c, (size_t)g->n_expert_used, sizeof(int32_t)),
        .weights = floats(c, (size_t)g->n_expert_used),
        .jobs = carve(c, 2 * (size_t)g->n_expert + 4, sizeof(ds_job)),
        .attend = attend_lane(c, g, n_tok),
    };
    if (!lane) return;
    *lane = l;
    lane->attend.keys = (ds_row_table){.blocks = &lane->attend.key_block, .block_rows = DS_ATTEND_BLOCK};
    lane->attend.values = (ds_row_table){.blocks = &lane->attend.value_block, .block_rows = DS_ATTEND_BLOCK};
}

static void carve_all(carver *c, const ds_config *g, int n_threads, int n_tok, int n_logits, ds_scratch *s) {
    size_t n = (size_t)n_tok, d = (size_t)g->n_embd, h = (size_t)g->n_head, kv = (size_t)ds_kv_width(g);
    size_t shared = (size_t)g->n_expert_shared * (size_t)g->n_ff_expert, slots = n * (size_t)g->n_expert_used;
    size_t hidden = shared > (size_t)g->n_ff_dense ? shared : (size_t)g->n_ff_dense;
    s->lanes = carve(c, (size_t)n_threads, sizeof *s->lanes);
    s->x = floats(c, n * d), s->xn = floats(c, n * d), s->y = floats(c, n * d);
    s->rope = floats(c, n * (size_t)g->rope_dim);
    s->q_a = floats(c, n * (size_t)g->q_lora_rank), s->kv_a = floats(c, n * kv),
    s->q = floats(c, n * h * (size_t)ds_qk_dim(g));
    s->attend = attend_room(c, g, n_tok);
    s->heads = floats(c, n * h * (size_t)g->v_dim);
    s->router = floats(c, n * (size_t)g->n_expert), s->ids = carve(c, slots, sizeof(int32_t)),
    s->weights = floats(c, slots);
    s->gate = floats(c, n * hidden), s->up = floats(c, n * hidden);
    s->gate_exps = floats(c, slots * (size_t)g->n_ff_expert), s->up_exps = floats(c, slots * (size_t)g->n_ff_expert),
    s->out_exps = floats(c, slots * d);
    s->act_x = act(c, n_tok > n_logits ? n_tok : n_logits, g->n_embd), s->act_q = act(c, n_tok, g->q_lora_rank);
    s->act_heads = act(c, n_tok, g->n_head * g->v_dim), s->act_hidden = act(c, n_tok, (int)hidden);
    s->act_gathered = act_by_expert(c, (int)slots, g->n_expert, g->n_embd);
    s->act_experts = act_by_expert(c, (int)slots, g->n_expert, g->n_ff_expert);
    s->moe = moe_room(c, g, n_tok);
    for (int i = 0; i < n_threads; i++) carve_lane(c, g, n_tok, c->base ? &s->lanes[i] : NULL);
}

size_t ds_scratch_bytes(const ds_config *config, const ds_kernels *kern, int n_threads, int n_tok) {
    carver c = {.kern = kern};
    ds_scratch unused = {0};
    carve_all(&c, config, n_threads, n_tok, n_tok, &unused);
    return c.used;
}

ds_status ds_scratch_reserve(ds_scratch *scratch, const ds_config *config, const ds_kernels *kern, int n_threads,
                             int n_tok, ds_error *err) {
    carver c = {.kern = kern};
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
