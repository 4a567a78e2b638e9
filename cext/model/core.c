/* core.c: sets a model's parts up, and runs the program of a step on its backends. */
#include "model/core.h"

#include <stdlib.h>
#include <string.h>

#include "memory/disk.h"
#include "memory/slots.h"

enum { DS_MAX_SLOTS = 1 << 30 /* of a plan: an int counts them */ };

/* uses: as a budget has them, checked. */
static ds_status open_backends(ds_core *c, const ds_device *processor, const ds_placement *placement,
                               const uint64_t *uses, ds_error *err) {
    const ds_facts facts = {&c->places, &c->config, &c->weights, &c->rope, c->residency, uses};
    const int n = 1 + (placement ? placement->n_devices : 0);
    for (; c->n_backends < n; c->n_backends++) {
        const ds_device *device = c->n_backends ? &placement->devices[c->n_backends - 1] : processor;
        const ds_status st = ds_device_open(device, &facts, c->n_backends, &c->backends[c->n_backends], err);
        if (st != DS_OK) return st;
    }
    return DS_OK;
}

static int together(const ds_core *c) {
    int n = c->backends[c->n_backends > 1]->n_together;
    for (int i = 2; i < c->n_backends; i++)
        if (c->backends[i]->n_together < n) n = c->backends[i]->n_together;
    return n;
}

static ds_status make_room(ds_core *c, ds_error *err) {
    c->program = calloc(ds_forward_max_ops(c), sizeof *c->program);
    c->tail_spans = calloc(DS_CHUNK, sizeof *c->tail_spans);
    return c->program && c->tail_spans ? DS_OK : ds_fail(err, DS_ENOMEM, "no memory for a step's program");
}

static size_t bytes_of_all(const ds_gguf *gguf) {
    size_t bytes = 0;
    for (size_t i = 0; i < ds_gguf_n_tensors(gguf); i++) bytes += ds_gguf_tensor_at(gguf, i)->n_bytes;
    return bytes;
}

static bool fits(const ds_gguf *gguf, const ds_budget *budget) {
    return !budget || !budget->ram || budget->ram >= bytes_of_all(gguf);
}

/* What every token needs, in memory of our own, once the model is open. */
static size_t shared_bytes(const ds_core *c, const ds_gguf *gguf) {
    return ds_loaded_bytes(gguf, &c->config) - c->copied_bytes + c->weights.owned_bytes;
}

/* The routed experts' part of a budget that the other weights have taken theirs of. */
static ds_status create_disk(ds_core *c, const ds_gguf *gguf, const ds_budget *budget, ds_error *err) {
    const size_t shared = shared_bytes(c, gguf), least = ds_slots_least(&c->config, &c->weights);
    if (budget->ram < shared || budget->ram - shared < least) {
        ds_fail(err, DS_EINVAL,
                "%s: %zu bytes of memory for its weights: expected at least %zu, of which %zu are for "
                "what every token needs",
                ds_gguf_label(gguf), budget->ram, shared + least, shared);
        return ds_hint(err, "give it more memory, or take a file of fewer bits a weight");
    }
    if (c->loaded.cached)
        ds_note(&c->config.notes,
                "its file system has no reads past the system's cache: they go through it, slower, and "
                "are dropped from it");
    return ds_residency_disk(&c->config, &c->weights, gguf, budget->ram - shared, c->loaded.cached, budget,
                             &c->residency, err);
}

static ds_status check_uses(const ds_core *c, const ds_gguf *gguf, const ds_budget *budget, ds_error *err) {
    if (!budget || !budget->uses || budget->n_uses == (size_t)c->config.n_layer * (size_t)c->config.n_expert)
        return DS_OK;
    return ds_fail(err, DS_EINVAL, "%s: uses of %zu experts, expected %d layers of %d", ds_gguf_label(gguf),
                   budget->n_uses, c->config.n_layer, c->config.n_expert);
}

/* Weights, and where the routed experts are. */
static ds_status bind(const ds_gguf *metadata, ds_source source, const ds_core_spec *spec, int layer_end, ds_core *c,
                      ds_error *err) {
    const bool mapped = fits(metadata, spec->budget);
    c->copied_bytes = ds_loaded_bytes_of(metadata, &c->config, ds_placement_takes, spec->placement);
    ds_status st = check_uses(c, metadata, spec->budget, err);
    if (st != DS_OK) return st;
    if (!mapped) {
        st = ds_loaded_open(metadata, &c->config, source, spec->budget, &c->loaded, err);
        if (st == DS_OK) source = ds_loaded_view(&c->loaded);
    }
    if (st == DS_OK)
        st = ds_weights_bind(&c->config, source, spec->layer_begin, layer_end, spec->ends, spec->sublayer, &c->weights,
                             err);
    if (st != DS_OK) return st;
    return mapped ? ds_residency_mapped(&c->config, &c->weights, &c->residency, err)
                  : create_disk(c, metadata, spec->budget, err);
}

ds_needs ds_core_needs(const ds_core *c, const ds_gguf *gguf) {
    const ds_weights *w = &c->weights;
    ds_needs needs = {.all = bytes_of_all(gguf), .shared = shared_bytes(c, gguf)};
    for (int il = c->config.n_layer_dense; il < c->config.n_layer; il++) {
        const ds_expert x = ds_residency_bound(w, il, 0);
        for (int i = 0; i < DS_PIECES; i++) {
            const size_t bytes = ds_piece_bytes(ds_expert_piece(&x, i)), n = (size_t)c->config.n_expert;
            needs.experts += bytes * n;
            needs.slots += ds_read_room(bytes) * n;
        }
    }
    needs.least = needs.shared + ds_slots_least(&c->config, w);
    return needs;
}

ds_status ds_core_create(const ds_gguf *metadata, ds_source source, const ds_core_spec *spec, ds_core *out,
                         ds_error *err) {
    ds_status st;
    memset(out, 0, sizeof *out);
    out->process = ds_process_id();
    atomic_init(&out->stopping, false);
    if ((st = ds_config_read(metadata, source, &out->config, err)) != DS_OK) return st;
    const int layer_end = spec->layer_end < 0 ? out->config.n_layer : spec->layer_end;
    if (spec->layer_begin < 0 || layer_end > out->config.n_layer) {
        return ds_fail(err, DS_EINVAL, "layer %d is not in the model's 0 to %d", spec->layer_begin,
                       out->config.n_layer - 1);
    }
    if (!ds_lock_init(&out->lock)) return ds_fail(err, DS_ENOMEM, "no memory for a lock");
    st = bind(metadata, source, spec, layer_end, out, err);
    if (st == DS_OK) st = ds_rope_create(&out->config, &out->rope, err);
    if (st == DS_OK) st = ds_places_create(&out->config, spec->placement, out->residency, &out->places, err);
    if (st == DS_OK)
        st = open_backends(out, spec->processor, spec->placement, spec->budget ? spec->budget->uses : NULL, err);
    if (st == DS_OK) out->n_together = together(out);
    if (st == DS_OK) st = make_room(out, err);
    if (st == DS_OK) ds_loaded_forget(&out->loaded, ds_placement_takes, spec->placement);
    else ds_core_release(out);
    return st;
}

void ds_core_release(ds_core *core) {
    for (int i = 0; i < core->n_backends; i++) core->backends[i]->ops->destroy(core->backends[i]);
    ds_pages_release(core->exchange.memory, core->exchange.bytes);
    ds_places_release(&core->places);
    ds_residency_destroy(core->residency);
    ds_rope_release(&core->rope);
    ds_weights_release(&core->weights);
    ds_loaded_release(&core->loaded);
    free(core->program);
    free(core->tail_spans);
    ds_lock_free(&core->lock);
}

ds_status ds_core_check(const ds_core *core, ds_error *err) {
    if (core->process == ds_process_id()) return DS_OK;
    ds_fail(err, DS_EINVAL, "the model was opened in process %ld, and its threads are there", core->process);
    return ds_hint(err, "after a fork, open the model in the child: weights are mapped once for all");
}

/* ---- Room ---- */

/* Sizes come in powers of two, so that growing prompts do not map memory again and again. */
static int step_capacity(int n_tok) {
    int n = 1;
    while (n < n_tok) n *= 2;
    return n;
}

static void exchange_carve(ds_exchange *x, const ds_config *c, unsigned char *base) {
    const size_t n = (size_t)x->n_tok, d = (size_t)c->n_embd, slots = n * (size_t)c->n_expert_used,
                 active = slots < (size_t)c->n_expert ? slots : (size_t)c->n_expert;
    ds_plan *plan = &x->split.plan;
    x->bytes = 0;
    x->x = ds_core_take(base, &x->bytes, n * d, sizeof(float));
    x->input = ds_core_take(base, &x->bytes, n * d, sizeof(float));
    x->ids = ds_core_take(base, &x->bytes, slots, sizeof(int32_t));
    x->split.ids = x->ids;
    x->split.rows = ds_core_take(base, &x->bytes, slots * d, sizeof(float));
    plan->expert = ds_core_take(base, &x->bytes, active, sizeof(int));
    plan->first = ds_core_take(base, &x->bytes, active, sizeof(int));
    plan->count = ds_core_take(base, &x->bytes, active, sizeof(int));
    plan->slot_token = ds_core_take(base, &x->bytes, slots, sizeof(int32_t));
    plan->slot_of = ds_core_take(base, &x->bytes, slots, sizeof(int));
    plan->place = ds_core_take(base, &x->bytes, (size_t)c->n_expert, sizeof(int));
    x->split.owner = x->owner = ds_core_take(base, &x->bytes, (size_t)c->n_expert, sizeof *x->owner);
}

static ds_status exchange_reserve(ds_exchange *x, const ds_config *c, int n_tok, ds_error *err) {
    ds_exchange next = {.n_tok = n_tok};
    if (x->memory && x->n_tok >= n_tok) return DS_OK;
    exchange_carve(&next, c, NULL);
    if (!(next.memory = ds_pages_new(next.bytes)))
        return ds_fail(err, DS_ENOMEM, "no memory for what the devices exchange in a step of %d tokens (%.1f MiB)",
                       n_tok, (double)next.bytes / (1 << 20));
    exchange_carve(&next, c, next.memory);
    ds_pages_release(x->memory, x->bytes);
    *x = next;
    return DS_OK;
}

static ds_status reserve(ds_core *c, int n_tok, ds_error *err) {
    ds_status st = DS_OK;
    if ((int64_t)n_tok * c->config.n_expert_used > DS_MAX_SLOTS)
        return ds_fail(err, DS_EINVAL, "a step of %d tokens with %d experts each: expected at most %d together", n_tok,
                       c->config.n_expert_used, DS_MAX_SLOTS);
    for (int i = 0; i < c->n_backends && st == DS_OK; i++)
        st = c->backends[i]->ops->reserve(c->backends[i], n_tok, err);
    return st == DS_OK && c->n_backends > 1 ? exchange_reserve(&c->exchange, &c->config, n_tok, err) : st;
}

size_t ds_core_step_bytes(const ds_core *c, int n_tok, int piece) {
    ds_exchange x = {.n_tok = step_capacity(n_tok < piece ? n_tok : piece)};
    size_t total = n_tok > piece ? ds_core_pieces_bytes(c, n_tok, piece) : 0;
    for (int i = 0; i < c->n_backends; i++) total += c->backends[i]->ops->bytes(c->backends[i], x.n_tok);
    if (c->n_backends > 1) exchange_carve(&x, &c->config, NULL);
    return total + x.bytes;
}

/* ---- The run ---- */

/* Whether a run is for experts of which the plan has none. */
static bool is_idle(const ds_core *c, const ds_op *ops, int n) {
    const ds_op *last = &ops[n - 1];
    const ds_plan *plan = &c->exchange.split.plan;
    if (last->kind != DS_OP_EXPERTS || !last->split || last->shared) return false;
    for (int a = 0; a < plan->n_active; a++)
        if (last->split->owner[plan->expert[a]] == last->backend) return false;
    return true;
}

/* Hand each backend its run of the operations, then wait for all, whatever became of one. */
static ds_status run_together(ds_core *c, const ds_op *ops, int n, ds_error *err) {
    bool under_way[DS_MAX_BACKENDS] = {false};
    ds_status status = DS_OK, st;
    for (int i = 0, end; i < n && status == DS_OK; i = end) {
        ds_backend *b = c->backends[ops[i].backend];
        for (end = i + 1; end < n && ops[end].backend == ops[i].backend;) end++;
        if (is_idle(c, ops + i, end - i)) continue;
        status = b->ops->submit(b, ops + i, end - i, err);
        under_way[ops[i].backend] = status == DS_OK;
    }
    for (int i = 0; i < c->n_backends; i++) { /* 0 first: it may work here */
        ds_error other;
        const int64_t since = i ? 0 : ds_now_ns();
        if (!under_way[i]) continue;
        st = c->backends[i]->ops->wait(c->backends[i], status == DS_OK ? err : &other);
        if (!i) c->exchange.split.processor_ns = ds_now_ns() - since;
        if (status == DS_OK) status = st;
    }
    return status;
}

/* The host's own step behind a run; *begun is the split layer whose experts are held, or -1. */
static ds_status step_host(ds_core *c, const ds_op *op, int n_tok, int *begun, ds_error *err) {
    ds_split *split = &c->exchange.split;
    ds_status st;
    if (op->kind != (ds_op_kind)DS_OP_PLAN) {
        if (op->il >= 0) ds_residency_end(c->residency, op->il);
        *begun = -1;
        return DS_OK;
    }
    ds_plan_build(&split->plan, c->config.n_expert, n_tok, c->config.n_expert_used, split->ids);
    memcpy(c->exchange.owner, ds_residency_place(c->residency, op->il), (size_t)c->config.n_expert);
    split->processor_ns = 0;
    ds_backend *router = c->backends[c->places.feed_forward[op->il - c->weights.layer_begin]];
    if (router->ops->share) router->ops->share(router, op->il, &split->plan, c->exchange.owner);
    if ((st = ds_residency_begin(c->residency, op->il, &split->plan, err)) == DS_OK) *begun = op->il;
    return st;
}

static ds_status run_program(ds_core *c, const ds_request *whole, const ds_request *tail, ds_error *err) {
    int begun = -1;
    ds_status st = DS_OK;
    for (int i = 0, end; i < c->n_ops && st == DS_OK; i = end + 1) {
        for (end = i; end < c->n_ops && c->program[end].backend != DS_HOST;) end++;
        if (end > i) st = run_together(c, c->program + i, end - i, err);
        if (st != DS_OK || end == c->n_ops) break;
        const ds_op *op = &c->program[end];
        st = step_host(c, op, op->tail ? tail->n_tok : whole->n_tok, &begun, err);
    }
    if (begun >= 0) ds_residency_end(c->residency, begun);
    return st;
}

ds_status ds_core_run_layers(ds_core *core, const ds_request *request, int begin, int end, ds_error *err) {
    ds_request tail;
    const bool cut = ds_forward_tail(request, core->tail_spans, &tail);
    for (int i = 0; i < core->n_backends; i++)
        core->backends[i]->ops->begin(core->backends[i], request, cut ? &tail : NULL);
    ds_forward(core, request, cut ? &tail : NULL, begin, end);
    return run_program(core, request, cut ? &tail : NULL, err);
}

ds_status ds_core_run(ds_core *core, const ds_request *request, ds_error *err) {
    const ds_weights *w = &core->weights;
    const int piece = request->piece ? request->piece : request->n_tok;
    const bool in_pieces = request->n_tok > piece;
    ds_lock_take(&core->lock);
    atomic_store(&core->stopping, false); /* under the lock: what is asked until then is of the step before */
    ds_status st = reserve(core, step_capacity(in_pieces ? piece : request->n_tok), err);
    if (st == DS_OK) {
        ds_residency_step(core->residency, request->n_tok, ds_core_n_pieces(request->n_tok, piece));
        st = in_pieces ? ds_core_run_pieces(core, request, err)
                       : ds_core_run_layers(core, request, w->layer_begin, w->layer_end, err);
    }
    ds_lock_give(&core->lock);
    return st;
}

ds_status ds_core_run_part(ds_core *core, const ds_request *request, int begin, int end, ds_error *err) {
    ds_lock_take(&core->lock);
    atomic_store(&core->stopping, false);
    ds_status st = reserve(core, step_capacity(request->n_tok), err);
    if (st == DS_OK) {
        ds_residency_step(core->residency, request->n_tok, 1);
        st = ds_core_run_layers(core, request, begin, end, err);
    }
    ds_lock_give(&core->lock);
    return st;
}
