/* vulkan.c: a GPU as a backend: operations recorded in order, run when all of a submission are, and what the host takes
 * from them behind the wait. */
#include "backend/vulkan/vulkan.h"

#include <stdlib.h>
#include <string.h>

#include "backend/vulkan/copies.h"
#include "backend/vulkan/step.h"
#include "base/os.h"

ds_status ds_gpu_do(ds_gpu_backend *b, const char *shader, const void *push, uint32_t bytes, uint32_t x, uint32_t y,
                    uint32_t z, ds_error *err) {
    vk_Pipeline pipeline;
    const ds_status st = ds_gpu_pipeline(b->gpu, shader, NULL, 0, &pipeline, err);
    if (st == DS_OK) ds_gpu_dispatch(b->gpu, &b->commands, pipeline, push, bytes, x, y, z);
    return st;
}

ds_status ds_gpu_normed(ds_gpu_backend *b, uint64_t x, uint64_t w, uint64_t to, int n, int width, ds_gpu_input *out,
                        ds_error *err) {
    *out = n == 1 ? (ds_gpu_input){x, w, 0} : (ds_gpu_input){to, 0, 0};
    if (n == 1) return DS_OK;
    const ds_status st = ds_gpu_norm(b, x, w, to, 0, n, width, width, width, err);
    ds_gpu_then(b);
    return st;
}

ds_status ds_gpu_times(ds_gpu_backend *b, const ds_mat *m, uint64_t w, ds_gpu_input x, uint64_t y, int n, int ldx,
                       int ldy, uint32_t flags, ds_error *err) {
    const ds_gpu_product p = {.w = w,
                              .x = x.x,
                              .y = y,
                              .slot_row = x.row,
                              .tables = b->w.tables,
                              .norm = x.norm,
                              .ldx = (uint32_t)ldx,
                              .ldy = (uint32_t)ldy,
                              .row_bytes = (uint32_t)m->row_bytes,
                              .k = (uint32_t)m->k,
                              .rows = (uint32_t)m->rows,
                              .n_slots = (uint32_t)n,
                              .flags = flags,
                              .eps = b->facts.config->rms_eps};
    return ds_gpu_mul(b->gpu, &b->commands, &b->room.halves, m->format, &p, 1, err);
}

ds_status ds_gpu_norm(ds_gpu_backend *b, uint64_t x, uint64_t w, uint64_t y, uint64_t row, int n, int width, int ldx,
                      int ldy, ds_error *err) {
    const struct {
        uint64_t x, w, y, row;
        uint32_t n, ldx, ldy;
        float eps;
    } push = {x, w, y, row, (uint32_t)width, (uint32_t)ldx, (uint32_t)ldy, b->facts.config->rms_eps};
    return ds_gpu_do(b, "norm", &push, sizeof push, (uint32_t)n, 1, 1, err);
}

/* ---- The ends, and copies of states ---- */

/* y[i] = x[row[i]] of n rows. */
static ds_status gather(ds_gpu_backend *b, uint64_t x, uint64_t y, uint64_t row, int n, ds_error *err) {
    const uint32_t d = (uint32_t)b->facts.config->n_embd;
    const struct {
        uint64_t x, y, row;
        uint32_t n;
    } push = {x, y, row, d};
    return ds_gpu_do(b, "gather", &push, 28, ds_gpu_pieces(d, DS_GPU_THREADS), (uint32_t)n, 1, err);
}

/* The host hands in the tokens' rows as the file has them: that is little, and the table of them all need not be in the
 * device's memory. */
static ds_status embed(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_request *r = ds_gpu_request(b, op);
    const ds_mat *e = &b->facts.weights->token_embd;
    const size_t d = (size_t)b->facts.config->n_embd;
    unsigned char *to = b->room.x_in.host;
    if (!r->ids) {
        memcpy(to, r->x, (size_t)r->n_tok * d * sizeof(float));
        return gather(b, b->room.x_in.at, b->room.x[op->tail], 0, r->n_tok, err);
    }
    for (int t = 0; t < r->n_tok; t++)
        memcpy(to + (size_t)t * e->row_bytes, e->data + (size_t)r->ids[t] * e->row_bytes, e->row_bytes);
    const ds_gpu_product p = {.w = b->room.x_in.at,
                              .y = b->room.x[op->tail],
                              .tables = b->w.tables,
                              .ldy = (uint32_t)d,
                              .row_bytes = (uint32_t)e->row_bytes,
                              .k = (uint32_t)d,
                              .n_slots = (uint32_t)r->n_tok};
    return ds_gpu_rows(b->gpu, &b->commands, e->format, &p, err);
}

static ds_status tail(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_request *r = ds_gpu_request(b, op);
    memcpy(b->room.taken.host, r->taken, (size_t)r->n_tok * sizeof *r->taken);
    return gather(b, b->room.x[0], b->room.x[1], b->room.taken.at, r->n_tok, err);
}

static ds_status copy_in(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const int n = ds_gpu_request(b, op)->n_tok;
    const bool is_x = op->state == DS_STATE_X;
    const ds_gpu_span from = is_x ? b->room.x_in : b->room.input_in;
    memcpy(from.host, op->host, (size_t)n * (size_t)b->facts.config->n_embd * sizeof(float));
    return gather(b, from.at, is_x ? b->room.x[op->tail] : b->room.xn, 0, n, err);
}

static ds_status copy_out(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const int n = ds_gpu_request(b, op)->n_tok;
    if (op->state == DS_STATE_CHOICE) return DS_OK; /* the router has put it there */
    return op->state == DS_STATE_X ? gather(b, b->room.x[op->tail], b->room.x_out.at, 0, n, err)
                                   : gather(b, b->room.xn, b->room.input_out.at, 0, n, err);
}

/* The choice of the layer that was routed last. */
static const unsigned char *last_choice(const ds_gpu_backend *b, const ds_op *op) {
    const ds_op *route = op;
    while (route > b->ops && route->kind != DS_OP_ROUTE) route--;
    const size_t layer = (size_t)b->room.n_tok * (size_t)b->facts.config->n_expert_used * sizeof(int32_t);
    return b->room.chosen.host + (size_t)(route->il - b->facts.weights->layer_begin) * layer;
}

/* The choices of a layer that was routed here, for who taps them. */
static void take_choice(ds_gpu_backend *b, const ds_op *op) {
    const ds_tap *tap = b->requests[0]->tap;
    const size_t n_used = (size_t)b->facts.config->n_expert_used;
    for (int i = 0; tap && i < tap->n; i++)
        if (tap->entries[i].point == DS_TAP_EXPERTS && tap->entries[i].il == op->il)
            memcpy((int32_t *)tap->entries[i].data + (size_t)tap->entries[i].row * n_used, last_choice(b, op),
                   (size_t)ds_gpu_request(b, op)->n_tok * n_used * sizeof(int32_t));
}

static void take_copy(ds_gpu_backend *b, const ds_op *op) {
    const ds_config *c = b->facts.config;
    const size_t n = (size_t)ds_gpu_request(b, op)->n_tok;
    if (op->state == DS_STATE_CHOICE)
        memcpy(op->host, last_choice(b, op), n * (size_t)c->n_expert_used * sizeof(int32_t));
    else
        memcpy(op->host, op->state == DS_STATE_X ? b->room.x_out.host : b->room.input_out.host,
               n * (size_t)c->n_embd * sizeof(float));
}

/* Logits of n rows. */
static ds_status some_logits(ds_gpu_backend *b, ds_gpu_input x, int n, ds_error *err) {
    const ds_config *c = b->facts.config;
    return ds_gpu_times(b, &b->facts.weights->output, b->w.output, x, b->room.logits.at, n, c->n_embd, c->n_vocab, 0,
                        err);
}

static int logits_together(const ds_gpu_backend *b, const ds_request *r, int from) {
    const int most = b->room.n_tok < DS_GPU_LOGIT_ROWS ? b->room.n_tok : DS_GPU_LOGIT_ROWS, left = r->n_logits - from;
    return left < most ? left : most;
}

static ds_status head(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_request *r = ds_gpu_request(b, op);
    const int d = b->facts.config->n_embd;
    const uint64_t x = b->room.x[op->tail];
    uint64_t rows = 0;
    if (!r->n_logits) return DS_OK;
    if (r->logit_rows) {
        memcpy(b->room.logit_rows.host, r->logit_rows, (size_t)r->n_logits * sizeof *r->logit_rows);
        rows = b->room.logit_rows.at;
    }
    if (r->n_logits == 1) return some_logits(b, (ds_gpu_input){x, b->w.output_norm, rows}, 1, err);
    const ds_status st = ds_gpu_norm(b, x, b->w.output_norm, b->room.xn, rows, r->n_logits, d, d, d, err);
    ds_gpu_then(b);
    return st == DS_OK ? some_logits(b, (ds_gpu_input){b->room.xn, 0, 0}, logits_together(b, r, 0), err) : st;
}

/* What is there is taken, and the rest computed, a few rows at a time: it is the last operation. */
static ds_status take_logits(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    const ds_request *r = ds_gpu_request(b, op);
    const size_t row = (size_t)b->facts.config->n_vocab;
    ds_status st = DS_OK;
    for (int from = 0, n; from < r->n_logits && st == DS_OK; from += n) {
        n = logits_together(b, r, from);
        if (from) {
            b->commands.at = b->n_submitted; /* the list of the step's end stays as it is */
            st = ds_gpu_record(b->gpu, &b->commands, err);
            const uint64_t x = b->room.xn + (uint64_t)from * (uint64_t)b->facts.config->n_embd * 4;
            if (st == DS_OK) st = some_logits(b, (ds_gpu_input){x, 0, 0}, n, err);
            if (st == DS_OK) st = ds_gpu_recorded(b->gpu, &b->commands, err);
            if (st == DS_OK) st = ds_gpu_submit(b->gpu, &b->commands, err);
            if (st == DS_OK) st = ds_gpu_wait(b->gpu, err);
        }
        if (st == DS_OK) memcpy(r->logits + (size_t)from * row, b->room.logits.host, (size_t)n * row * sizeof(float));
    }
    return st;
}

static ds_status nothing(ds_gpu_backend *b, const ds_op *op, ds_error *err) { return DS_OK; }

/* ---- Runs ---- */

static ds_status (*const RECORD[DS_OP_COUNT])(ds_gpu_backend *b, const ds_op *op, ds_error *err) = {
    [DS_OP_EMBED] = embed,
    [DS_OP_PLACE] = ds_gpu_place,
    [DS_OP_ATTENTION] = ds_gpu_attention,
    [DS_OP_REMEMBER] = ds_gpu_remember,
    [DS_OP_TAIL] = tail,
    [DS_OP_DENSE] = ds_gpu_dense,
    [DS_OP_ROUTE] = ds_gpu_route,
    [DS_OP_EXPERTS] = ds_gpu_experts,
    [DS_OP_COMBINE] = ds_gpu_combine,
    [DS_OP_FFN_NORM] = nothing, /* for who taps, and nobody can here */
    [DS_OP_HEAD] = head,
    [DS_OP_COPY_IN] = copy_in,
    [DS_OP_COPY_OUT] = copy_out,
};

/* What is copied out behind a router is there before it chooses. */
static bool beside_route(const ds_op *op) { return op->kind == DS_OP_COPY_OUT && op->state != DS_STATE_X; }

static ds_status begin_list(ds_gpu_backend *b, ds_error *err) {
    b->commands.at = b->n_submitted++;
    return ds_gpu_record(b->gpu, &b->commands, err);
}

/* The experts of a layer that are copied for this step are computed in a list of its own, behind their copies. */
static ds_status take_layer(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    ds_status st = ds_gpu_recorded(b->gpu, &b->commands, err);
    if (st != DS_OK) return st;
    b->last_cut = ds_ahead_then(b->ahead, ds_gpu_list_of(&b->commands), true);
    b->n_cuts++;
    st = begin_list(b, err);
    if (st == DS_OK) ds_ahead_take(b->ahead, op->il);
    return st;
}

static ds_status submit(ds_backend *backend, const ds_op *ops, int n, ds_error *err) {
    ds_gpu_backend *b = (ds_gpu_backend *)backend;
    const ds_tap *tap = b->requests[0]->tap;
    for (int i = 0; tap && i < tap->n; i++)
        if (tap->entries[i].point != DS_TAP_EXPERTS)
            return ds_fail(err, DS_EUNSUPPORTED, "%s: of what a GPU computes only the experts' choice can be tapped",
                           ds_gpu_told(b->gpu)->name);
    const int64_t begin = ds_now_ns();
    b->n_cuts = 0;
    ds_status st = begin_list(b, err);
    for (int i = 0; i < n && st == DS_OK; i++) {
        if (ds_gpu_is_taken(b, &ops[i])) st = take_layer(b, &ops[i], err);
        if (st != DS_OK) break;
        if (!beside_route(&ops[i])) ds_gpu_then(b);
        st = RECORD[ops[i].kind](b, &ops[i], err);
    }
    if (st == DS_OK) st = ds_gpu_recorded(b->gpu, &b->commands, err);
    b->behind = st == DS_OK && b->ahead && ds_ahead_submit(b->ahead, ds_gpu_list_of(&b->commands));
    if (st == DS_OK && !b->behind) st = ds_gpu_submit(b->gpu, &b->commands, err);
    if (st != DS_OK && b->ahead) ds_ahead_abandon(b->ahead);
    b->ops = ops, b->n_ops = n;
    b->record_ns += (uint64_t)(ds_now_ns() - begin);
    return st;
}

/* What the host takes of an operation that has run. */
static ds_status take(ds_gpu_backend *b, const ds_op *op, ds_error *err) {
    if (op->kind == DS_OP_ATTENTION || op->kind == DS_OP_REMEMBER) ds_gpu_take_rows(b, op);
    if (op->kind == DS_OP_ROUTE) take_choice(b, op);
    if (op->kind == DS_OP_EXPERTS) ds_gpu_take_experts(b, op);
    if (op->kind == DS_OP_EXPERTS && op->split && op->shared && b->ahead) ds_ahead_measure(b->ahead, op->split);
    if (op->kind == DS_OP_COPY_OUT) take_copy(b, op);
    return op->kind == DS_OP_HEAD ? take_logits(b, op, err) : DS_OK;
}

/* Until the first list that was not waited for has run; that of the run's end, and all before it, where no other follows. */
static ds_status wait_next(ds_gpu_backend *b, ds_error *err) {
    if (b->n_cuts) return ds_ahead_reached(b->ahead, b->last_cut - (uint64_t)--b->n_cuts, err);
    const ds_status st = b->behind ? ds_ahead_wait(b->ahead, err) : ds_gpu_wait(b->gpu, err);
    if (b->ahead) ds_ahead_ended(b->ahead);
    return st;
}

/* What a list left is taken while the next ones run. */
static ds_status wait_for(ds_backend *backend, ds_error *err) {
    ds_gpu_backend *b = (ds_gpu_backend *)backend;
    ds_status st = wait_next(b, err);
    for (int i = 0; i < b->n_ops && st == DS_OK; i++) {
        if (ds_gpu_is_taken(b, &b->ops[i])) st = wait_next(b, err);
        if (st == DS_OK) st = take(b, &b->ops[i], err);
    }
    if (st != DS_OK && b->ahead) ds_ahead_abandon(b->ahead);
    b->behind = false;
    b->n_ops = 0;
    return st;
}

static ds_status reserve(ds_backend *backend, int n_tok, ds_error *err) {
    return ds_gpu_room_reserve((ds_gpu_backend *)backend, n_tok, err);
}

static size_t bytes(const ds_backend *backend, int n_tok) {
    return ds_gpu_room_bytes((const ds_gpu_backend *)backend, n_tok);
}

static void begin(ds_backend *backend, const ds_request *whole, const ds_request *rest) {
    ds_gpu_backend *b = (ds_gpu_backend *)backend;
    b->requests[0] = whole, b->requests[1] = rest;
    b->table_used = 0;
    b->n_submitted = 0;
    for (int type = 0; type < DS_KV_TYPES; type++) ds_gpu_cache_step(&b->caches[type]);
    ds_gpu_hot_step(b->gpu, &b->hot, whole->n_tok); /* before it is asked what is not there */
    if (b->ahead) ds_ahead_begin(b->ahead, whole, rest);
}

static void destroy(ds_backend *backend) {
    ds_gpu_backend *b = (ds_gpu_backend *)backend;
    ds_error ignored;
    if (!b) return;
    if (b->gpu && ds_gpu_here(b->gpu)) {
        ds_gpu_wait(b->gpu, &ignored);
        ds_ahead_destroy(b->ahead);
        for (int type = 0; type < DS_KV_TYPES; type++) ds_gpu_cache_release(b->gpu, &b->caches[type]);
        ds_gpu_room_release(b);
        ds_gpu_hot_release(b->gpu, &b->hot);
        ds_gpu_weights_release(b->gpu, &b->w);
        ds_gpu_commands_release(b->gpu, &b->commands);
        ds_gpu_close(b->gpu);
    }
    free(b);
}

static void share(ds_backend *backend, int il, const ds_plan *plan, uint8_t *owner) {
    ds_gpu_backend *b = (ds_gpu_backend *)backend;
    if (b->ahead) ds_ahead_share(b->ahead, il, plan, owner);
}

static bool takes(const ds_backend *backend, int il, int n_tok) {
    const ds_gpu_backend *b = (const ds_gpu_backend *)backend;
    return b->ahead && ds_ahead_takes(b->ahead, il, n_tok);
}

static ds_status watch(ds_backend *backend, bool times, ds_error *err) {
    ds_gpu_backend *b = (ds_gpu_backend *)backend;
    b->record_ns = 0;
    if (b->ahead) ds_ahead_watch(b->ahead);
    b->hot.work = (ds_work_hot){0};
    return ds_gpu_watch_begin(b->gpu, times, err);
}

static int watched(const ds_backend *backend, ds_work_time out[DS_WORK_TIMES], ds_work *work) {
    const ds_gpu_backend *b = (const ds_gpu_backend *)backend;
    const int n = ds_gpu_watched(b->gpu, out, work);
    work->record_ns = b->record_ns;
    if (b->ahead) ds_ahead_watched(b->ahead, work);
    work->hot = b->hot.work;
    work->hot.slots = (uint64_t)b->hot.slots.n;
    return n;
}

static const ds_backend_ops OPS = {.watch = watch,
                                   .watched = watched,
                                   .reserve = reserve,
                                   .bytes = bytes,
                                   .begin = begin,
                                   .share = share,
                                   .takes = takes,
                                   .submit = submit,
                                   .wait = wait_for,
                                   .destroy = destroy};

/* ---- What it takes on ---- */

static void find_attention(ds_gpu_backend *b) {
    const ds_weights *w = b->facts.weights;
    for (int il = w->layer_begin; il < w->layer_end; il++) {
        if (b->facts.places->attention[il - w->layer_begin] != b->number) continue;
        if (b->attend_end == 0) b->attend_begin = il;
        b->attend_end = il + 1;
    }
}

static bool has_experts(const ds_gpu_backend *b) {
    const ds_weights *w = b->facts.weights;
    const int n_expert = b->facts.config->n_expert, dense = b->facts.config->n_layer_dense;
    for (int il = dense > w->layer_begin ? dense : w->layer_begin; il < w->layer_end; il++)
        for (int e = 0; e < n_expert; e++)
            if (ds_residency_place(b->facts.residency, il)[e] == b->number) return true;
    return false;
}

static ds_status check(const ds_gpu_backend *b, ds_error *err) {
    const ds_config *c = b->facts.config;
    const char *name = ds_gpu_told(b->gpu)->name;
    if (b->attend_end && c->attention != DS_ATTENTION_LATENT) {
        ds_fail(err, DS_EUNSUPPORTED, "%s: attention that is not latent is not computed on a GPU", name);
        return ds_hint(err, "leave attention on the processor");
    }
    if (b->attend_end && ds_row_pad(c->kv_lora_rank) + ds_row_pad(c->rope_dim) > DS_GPU_MAX_ROW)
        return ds_fail(err, DS_EUNSUPPORTED, "%s: latents of %d and %d values, expected at most %d", name,
                       c->kv_lora_rank, c->rope_dim, DS_GPU_MAX_ROW);
    if (c->n_expert > DS_GPU_MAX_EXPERTS)
        return ds_fail(err, DS_EUNSUPPORTED, "%s: %d experts, expected at most %d", name, c->n_expert,
                       DS_GPU_MAX_EXPERTS);
    if (!ds_residency_is_settled(b->facts.residency) && has_experts(b)) {
        ds_fail(err, DS_EUNSUPPORTED, "%s: experts cannot be on a GPU where others come from the drive", name);
        return ds_hint(err, "leave the routed experts on the processor, or give it memory for all of them");
    }
    return DS_OK;
}

/* Bytes of the device that are left where caches begin, beside weights and steps of so many tokens. */
static uint64_t left_beside(const ds_gpu_backend *b, const ds_device *device, int n_tok) {
    const bool shares = ds_gpu_told(b->gpu)->kind != VKB_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU; /* the ring is there, too */
    const uint64_t all = device->memory ? device->memory : ds_gpu_told(b->gpu)->free,
                   steps = ds_gpu_room_own(b, n_tok) + (b->attend_end ? DS_CACHE_CHUNK : 0),
                   ring = shares ? (uint64_t)(DS_COPY_THREADS + DS_COPY_AHEAD) * DS_COPY_PIECE : 0,
                   held = b->w.bytes + device->hot + steps + ring;
    return all > held ? all - held : 0;
}

/* Whether it computes every layer but for routed experts that lie in memory: then the processor has little room to hold for
 * longer steps, and what is copied for a prompt is copied for more of it. */
static bool routes_all(const ds_gpu_backend *b) {
    const ds_weights *w = b->facts.weights;
    bool all = ds_residency_is_settled(b->facts.residency);
    for (int i = 0; i < w->layer_end - w->layer_begin; i++)
        all &= b->facts.places->attention[i] == b->number && b->facts.places->feed_forward[i] == b->number;
    return all;
}

/* Copies through what is left where the longest steps are so long, and of what is not given to this model alone half. */
static ds_status open_copies(ds_gpu_backend *b, const ds_device *device, int n_tok, ds_error *err) {
    const uint64_t left = left_beside(b, device, n_tok);
    b->head.n_together = n_tok;
    return ds_ahead_create(b->gpu, &b->facts, b->number, device->memory ? left : left / 2, device->copying, &b->ahead,
                           err);
}

/* How long steps are, and copies beside them: rather short steps than none. */
static ds_status open_steps(ds_gpu_backend *b, const ds_device *device, ds_error *err) {
    const bool wide = !device->short_steps && routes_all(b) && ds_gpu_room_fits(b, DS_WIDE_CHUNK) &&
                      left_beside(b, device, DS_WIDE_CHUNK);
    ds_status st = open_copies(b, device, wide ? DS_WIDE_CHUNK : DS_CHUNK, err);
    if (st != DS_OK || b->ahead || !wide) return st;
    st = open_copies(b, device, DS_CHUNK, err);
    if (!b->ahead) b->head.n_together = DS_WIDE_CHUNK;
    return st;
}

ds_status ds_gpu_backend_create(const ds_facts *facts, int number, const ds_device *device, ds_backend **out,
                                ds_error *err) {
    ds_gpu_backend *b = calloc(1, sizeof *b);
    if (!b) return ds_fail(err, DS_ENOMEM, "no memory for a backend");
    b->head = (ds_backend){.ops = &OPS, .isa = "vulkan", .n_threads = 0};
    b->facts = *facts;
    b->number = number;
    find_attention(b);
    ds_status st = ds_gpu_open(device->name, &b->gpu, err);
    if (st == DS_OK) st = check(b, err);
    if (st == DS_OK) ds_gpu_limit(b->gpu, device->memory);
    if (st == DS_OK) st = ds_gpu_weights_load(b->gpu, facts, number, device->memory, &b->w, err);
    /* Before any come and go: of every layer all may have to be copied. */
    if (st == DS_OK) st = open_steps(b, device, err);
    if (st == DS_OK && device->hot) st = ds_gpu_hot_create(b->gpu, facts, number, device->hot, &b->w, &b->hot, err);
    b->facts.uses = NULL; /* the caller's own until this returns */
    if (st == DS_OK) *out = &b->head;
    else destroy(&b->head);
    return st;
}
