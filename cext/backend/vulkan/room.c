/* room.c: the memory of a step on a GPU. */
#include "backend/vulkan/step.h"

#include <string.h>

/* Hands out pieces of a buffer; with no buffer it only measures. */
typedef struct carver {
    const ds_gpu_buffer *buffer;
    uint64_t used;
} carver;

static ds_gpu_span carve(carver *c, uint64_t n, uint64_t item) {
    const uint64_t at = c->used;
    c->used += ds_gpu_padded(n * item);
    if (!c->buffer) return (ds_gpu_span){0};
    return (ds_gpu_span){c->buffer->address + at, c->buffer->host ? c->buffer->host + at : NULL};
}

static uint64_t floats(carver *c, uint64_t n) { return carve(c, n, 4).at; }

static uint64_t most(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* What of the places this backend has to do with. */
typedef struct roles {
    bool attends, feeds, splits, helps, ends;
} roles;

static roles roles_of(const ds_gpu_backend *b) {
    const ds_places *p = b->facts.places;
    const int n = b->facts.weights->layer_end - b->facts.weights->layer_begin;
    roles r = {.ends = p->ends == b->number, .attends = b->attend_end > b->attend_begin};
    for (int i = 0; i < n; i++) {
        r.feeds |= p->feed_forward[i] == b->number;
        r.splits |= p->feed_forward[i] == b->number && p->helpers[i];
        r.helps |= p->helpers[i] >> b->number & 1;
    }
    return r;
}

/* What lies between attention's queries and its heads' values. */
static void carve_attend(const ds_gpu_backend *b, ds_gpu_room *r, carver *c) {
    const ds_config *g = b->facts.config;
    const uint64_t heads = (uint64_t)g->n_head, together = (uint64_t)ds_gpu_attend_together(b, r->n_tok),
                   rank = (uint64_t)g->kv_lora_rank, width = ds_row_pad(g->kv_lora_rank) + ds_row_pad(g->rope_dim);
    r->absorbed = floats(c, together * heads * rank);
    r->queries = floats(c, together * heads * width);
    r->parts = floats(c, most(together * heads, (uint64_t)ds_gpu_part_rows(b)) * (width + 2));
    r->latent = floats(c, together * heads * rank);
}

uint64_t ds_gpu_attend_bytes(const ds_gpu_backend *b, int n_tok) {
    ds_gpu_room r = {.n_tok = n_tok};
    carver c = {0};
    carve_attend(b, &r, &c);
    return c.used;
}

static void carve_own(const ds_gpu_backend *b, ds_gpu_room *r, carver *c) {
    const ds_config *g = b->facts.config;
    const roles role = roles_of(b);
    const uint64_t n = (uint64_t)r->n_tok, d = (uint64_t)g->n_embd, heads = (uint64_t)g->n_head,
                   slots = n * (uint64_t)g->n_expert_used;
    const uint64_t shared = (uint64_t)g->n_expert_shared * (uint64_t)g->n_ff_expert;
    for (int i = 0; i < DS_GPU_STEPS; i++) r->x[i] = floats(c, n * d);
    r->xn = floats(c, n * d);
    if (role.attends) {
        r->kv_a = floats(c, n * (uint64_t)ds_latent_width(g));
        r->q_a = floats(c, n * (uint64_t)g->q_lora_rank);
        r->q = floats(c, n * heads * (uint64_t)ds_qk_dim(g));
        carve_attend(b, r, c);
        r->heads = floats(c, n * heads * (uint64_t)g->v_dim);
    }
    if (!role.feeds && !role.helps) return;
    r->router = floats(c, n * (uint64_t)g->n_expert);
    r->ids = floats(c, slots);
    r->weights = floats(c, slots);
    r->groups = carve(c, 3 * most(slots, (uint64_t)g->n_expert), sizeof(ds_gpu_group)).at;
    r->slot_row = floats(c, slots);
    r->slot_of = floats(c, slots);
    r->hidden = floats(c, n * most((uint64_t)g->n_ff_dense, shared));
    r->hidden_exps = floats(c, slots * (uint64_t)g->n_ff_expert);
    r->rows = floats(c, slots * d);
    r->shared = floats(c, n * d);
}

/* Bytes of W's and x's factors in halves, of the product that takes the most of either. */
typedef struct halved {
    uint64_t w, x;
} halved;

static void count_halves(const ds_gpu_backend *b, halved *most_of, uint64_t n_slots, uint64_t n_blocks, int rows,
                         int k) {
    const uint64_t w = n_blocks * ds_gpu_halved_weights(b->gpu, (uint32_t)rows, (uint32_t)k),
                   x = ds_gpu_halved_rows(b->gpu, n_slots, n_blocks, (uint32_t)k);
    most_of->w = most(most_of->w, w);
    most_of->x = most(most_of->x, x);
}

/* Of a card's memory a 32nd for weights, but not so little that pieces leave it idle, and what an allocation has beside x. */
static uint64_t most_halves(const ds_gpu *gpu, uint64_t x) {
    const uint64_t share = ds_gpu_memory(gpu) / 32, least = DS_GPU_HALVES,
                   all = x < DS_GPU_CHUNK ? DS_GPU_CHUNK - x : 0, wanted = share < least ? least : share;
    return wanted < all ? wanted : all / 2 * 2;
}

/* Products by matrix units: their pieces of weights take turns in two halves of the room. */
static void carve_halves(const ds_gpu_backend *b, ds_gpu_room *r, carver *c) {
    const ds_config *g = b->facts.config;
    const roles role = roles_of(b);
    const uint64_t n = (uint64_t)r->n_tok, heads = (uint64_t)g->n_head, experts = (uint64_t)g->n_expert,
                   slots = n * (uint64_t)g->n_expert_used, together = (uint64_t)ds_gpu_attend_together(b, r->n_tok);
    const int shared = g->n_expert_shared * g->n_ff_expert, wide = g->n_ff_dense > shared ? g->n_ff_dense : shared;
    halved h = {0};
    if (role.ends) count_halves(b, &h, n < DS_GPU_LOGIT_ROWS ? n : DS_GPU_LOGIT_ROWS, 1, g->n_vocab, g->n_embd);
    if (role.attends) {
        const int q = g->q_lora_rank ? g->q_lora_rank : g->n_embd;
        count_halves(b, &h, n, 1, g->n_head * ds_qk_dim(g), q);
        count_halves(b, &h, n, 1, ds_latent_width(g), g->n_embd);
        count_halves(b, &h, n, 1, g->n_embd, g->n_head * g->v_dim);
        count_halves(b, &h, together * heads, heads, g->kv_lora_rank, g->nope_dim);
        count_halves(b, &h, together * heads, heads, g->v_dim, g->kv_lora_rank);
        count_halves(b, &h, heads * ds_gpu_expand_most(b, r->n_tok), heads, g->v_dim, g->kv_lora_rank);
    }
    if (role.feeds || role.helps) {
        count_halves(b, &h, n, 2, wide, g->n_embd);
        count_halves(b, &h, n, 1, g->n_embd, wide);
        count_halves(b, &h, slots, 2 * experts, g->n_ff_expert, g->n_embd);
        count_halves(b, &h, slots, experts, g->n_embd, g->n_ff_expert);
    }
    r->halves.x = carve(c, h.x, 1).at;
    const uint64_t most_w = most_halves(b->gpu, c->used);
    r->halves.w_bytes = 2 * h.w < most_w ? 2 * h.w : most_w;
    r->halves.w = carve(c, r->halves.w_bytes, 1).at;
}

static void carve_in(const ds_gpu_backend *b, ds_gpu_room *r, carver *c) {
    const ds_config *g = b->facts.config;
    const roles role = roles_of(b);
    const uint64_t n = (uint64_t)r->n_tok, d = (uint64_t)g->n_embd, slots = n * (uint64_t)g->n_expert_used;
    for (int i = 0; i < DS_GPU_STEPS; i++) {
        r->tokens[i] = carve(c, n, sizeof(ds_gpu_token));
        r->angles[i] = carve(c, n * (uint64_t)g->rope_dim, sizeof(float));
    }
    r->taken = carve(c, n, sizeof(uint32_t));
    r->logit_rows = carve(c, n, sizeof(uint32_t));
    r->x_in = carve(c, n * d, sizeof(float));
    if (role.helps) r->input_in = carve(c, n * d, sizeof(float));
    if (!role.helps && !role.splits) return;
    r->split_groups = carve(c, 3 * (uint64_t)g->n_expert, sizeof(ds_gpu_group));
    r->split_row = carve(c, slots, sizeof(uint32_t));
    r->split_of = carve(c, slots, sizeof(uint32_t));
    const uint64_t layers = (uint64_t)(b->facts.weights->layer_end - b->facts.weights->layer_begin);
    if (role.splits) r->taken_experts = carve(c, layers * (uint64_t)g->n_expert, sizeof(ds_gpu_expert));
    if (role.splits) r->others = carve(c, slots * d, sizeof(float));
}

/* A row of the cache as the host takes it, of the kind that takes the most. */
static uint64_t row_bytes(const ds_config *g) {
    return (ds_row_pad(g->kv_lora_rank) + ds_row_pad(g->rope_dim)) * sizeof(float) + 16;
}

static void carve_out(const ds_gpu_backend *b, ds_gpu_room *r, carver *c) {
    const ds_config *g = b->facts.config;
    const roles role = roles_of(b);
    const uint64_t n = (uint64_t)r->n_tok, d = (uint64_t)g->n_embd, slots = n * (uint64_t)g->n_expert_used,
                   layers = (uint64_t)(b->facts.weights->layer_end - b->facts.weights->layer_begin);
    r->cached_bytes = n * row_bytes(g);
    if (role.attends) r->cached = carve(c, (uint64_t)(b->attend_end - b->attend_begin + 1), r->cached_bytes);
    if (role.feeds) r->chosen = carve(c, layers * slots, sizeof(int32_t));
    r->x_out = carve(c, n * d, sizeof(float));
    r->input_out = carve(c, n * d, sizeof(float));
    if (role.helps) r->rows_out = carve(c, slots * d, sizeof(float));
    if (role.ends)
        r->logits = carve(c, (n < DS_GPU_LOGIT_ROWS ? n : DS_GPU_LOGIT_ROWS) * (uint64_t)g->n_vocab, sizeof(float));
}

static ds_status make(ds_gpu_backend *b, ds_gpu_room *r, ds_gpu_use use, ds_gpu_buffer *buffer,
                      void (*lay)(const ds_gpu_backend *, ds_gpu_room *, carver *), ds_error *err) {
    carver c = {0};
    lay(b, r, &c);
    if (!c.used) return DS_OK;
    const ds_status st = ds_gpu_buffer_new(b->gpu, c.used, use, buffer, err);
    if (st != DS_OK) return st;
    c = (carver){.buffer = buffer};
    lay(b, r, &c);
    return DS_OK;
}

static void release(ds_gpu *gpu, ds_gpu_room *r) {
    ds_gpu_buffer_release(gpu, &r->own);
    ds_gpu_buffer_release(gpu, &r->halved);
    ds_gpu_buffer_release(gpu, &r->in);
    ds_gpu_buffer_release(gpu, &r->out);
}

ds_status ds_gpu_room_reserve(ds_gpu_backend *b, int n_tok, ds_error *err) {
    ds_gpu_room next = {.n_tok = n_tok, .table = b->room.table};
    if (b->room.own.buffer && b->room.n_tok >= n_tok) return DS_OK;
    release(b->gpu, &b->room); /* nothing is under way, and both need not fit */
    b->room = (ds_gpu_room){.table = next.table};
    ds_status st = make(b, &next, DS_GPU_OWN, &next.own, carve_own, err);
    if (st == DS_OK) st = make(b, &next, DS_GPU_OWN, &next.halved, carve_halves, err);
    if (st == DS_OK) st = make(b, &next, DS_GPU_IN, &next.in, carve_in, err);
    if (st == DS_OK) st = make(b, &next, DS_GPU_OUT, &next.out, carve_out, err);
    if (st != DS_OK) {
        release(b->gpu, &next);
        if (st == DS_ENOMEM) ds_hint(err, "give it less of the model: --vram SIZE, or take shorter steps");
        return st;
    }
    b->room = next;
    return DS_OK;
}

void ds_gpu_room_release(ds_gpu_backend *b) {
    release(b->gpu, &b->room);
    ds_gpu_buffer_release(b->gpu, &b->room.table);
    b->room = (ds_gpu_room){0};
}

bool ds_gpu_room_fits(const ds_gpu_backend *b, int n_tok) {
    void (*const lays[])(const ds_gpu_backend *, ds_gpu_room *, carver *) = {carve_own, carve_halves, carve_in,
                                                                             carve_out};
    bool fits = true;
    for (size_t i = 0; i < sizeof lays / sizeof *lays; i++) {
        ds_gpu_room r = {.n_tok = n_tok};
        carver c = {0};
        lays[i](b, &r, &c);
        fits &= c.used <= DS_GPU_CHUNK;
    }
    return fits;
}

uint64_t ds_gpu_room_own(const ds_gpu_backend *b, int n_tok) {
    ds_gpu_room r = {.n_tok = n_tok};
    carver c = {0};
    carve_own(b, &r, &c);
    carve_halves(b, &r, &c);
    carve_in(b, &r, &c);
    if (ds_gpu_told(b->gpu)->kind != VKB_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU) carve_out(b, &r, &c);
    return c.used;
}

size_t ds_gpu_room_bytes(const ds_gpu_backend *b, int n_tok) {
    ds_gpu_room r = {.n_tok = n_tok};
    carver c = {0};
    carve_in(b, &r, &c);
    carve_out(b, &r, &c);
    return (size_t)c.used;
}
