#include "memory/residency.h"

#include <stdlib.h>
#include <string.h>

static ds_mat one_of(const ds_mat *m, int e) {
    ds_mat one = *m;
    one.data = ds_mat_block(m, e);
    one.n = 1;
    return one;
}

ds_expert ds_residency_bound(const ds_weights *weights, int il, int e) {
    const ds_experts *x = &ds_weights_layer(weights, il)->experts;
    return (ds_expert){one_of(&x->gate, e), one_of(&x->up, e), one_of(&x->down, e)};
}

static ds_expert mapped_get(const ds_residency *r, int il, int e) { return ds_residency_bound(r->weights, il, e); }

static const ds_residency_ops MAPPED = {.get = mapped_get};

static void release_head(ds_residency *r) {
    free(r->place);
    free(r->uses);
}

ds_status ds_residency_init(const ds_config *config, const ds_weights *weights, const ds_residency_ops *ops,
                            ds_residency *out, ds_error *err) {
    const size_t n = (size_t)(weights->layer_end - weights->layer_begin) * (size_t)config->n_expert;
    *out = (ds_residency){.ops = ops,
                          .weights = weights,
                          .n_expert = config->n_expert,
                          .place = calloc(n + 1, sizeof *out->place),
                          .uses = calloc(n + 1, sizeof *out->uses)};
    if (out->place && out->uses) return DS_OK;
    release_head(out);
    return ds_fail(err, DS_ENOMEM, "no memory to keep count of %zu experts", n);
}

ds_status ds_residency_mapped(const ds_config *config, const ds_weights *weights, ds_residency **out, ds_error *err) {
    ds_residency *r = malloc(sizeof *r);
    if (!r) return ds_fail(err, DS_ENOMEM, "no memory for a residency");
    const ds_status st = ds_residency_init(config, weights, &MAPPED, r, err);
    if (st == DS_OK) *out = r;
    else free(r);
    return st;
}

void ds_residency_destroy(ds_residency *r) {
    if (!r) return;
    if (r->ops->destroy) r->ops->destroy(r);
    release_head(r);
    free(r);
}

void ds_residency_step(ds_residency *r, int n_tok, int n_pieces) {
    if (r->ops->step) r->ops->step(r, n_tok, n_pieces);
}

ds_status ds_residency_begin(ds_residency *r, int il, const ds_plan *plan, ds_error *err) {
    uint64_t *uses = ds_residency_uses(r, il);
    for (int a = 0; a < plan->n_active; a++) uses[plan->expert[a]] += (uint64_t)plan->count[a];
    return r->ops->begin ? r->ops->begin(r, il, plan, err) : DS_OK;
}

void ds_residency_count(ds_residency *r, int il, const int32_t *ids, int n) {
    uint64_t *uses = ds_residency_uses(r, il);
    for (int i = 0; i < n; i++)
        if (ids[i] >= 0 && ids[i] < r->n_expert) uses[ids[i]]++;
}

bool ds_residency_ready(ds_residency *r, int il, int e) { return !r->ops->ready || r->ops->ready(r, il, e); }

ds_status ds_residency_wait(ds_residency *r, int il, const int *experts, int n, ds_error *err) {
    return r->ops->wait ? r->ops->wait(r, il, experts, n, err) : DS_OK;
}

bool ds_residency_stops(ds_residency *r) { return r->ops->stops && r->ops->stops(r); }

ds_expert ds_residency_get(const ds_residency *r, int il, int e) { return r->ops->get(r, il, e); }

void ds_residency_release(ds_residency *r, int il, const int *experts, int n) {
    if (r->ops->release) r->ops->release(r, il, experts, n);
}

void ds_residency_end(ds_residency *r, int il) {
    if (r->ops->end) r->ops->end(r, il);
}

void ds_residency_forecast(ds_residency *r, int il, const int *experts, int n) {
    if (r->ops->forecast && il < r->weights->layer_end) r->ops->forecast(r, il, experts, n);
}
