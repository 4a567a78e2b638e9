#include "memory/residency.h"

#include <stdlib.h>
#include <string.h>

static ds_mat one_of(const ds_mat *m, int e) {
    ds_mat one = *m;
    one.data = ds_mat_block(m, e);
    one.n = 1;
    return one;
}

static ds_expert mapped_get(const ds_residency *r, int il, int e) {
    const ds_experts *x = &ds_weights_layer(r->weights, il)->experts;
    return (ds_expert){one_of(&x->gate, e), one_of(&x->up, e), one_of(&x->down, e)};
}

static const ds_residency_ops MAPPED = {.get = mapped_get};

ds_status ds_residency_mapped(const ds_config *config, const ds_weights *weights, ds_residency **out, ds_error *err) {
    const size_t n_layer = (size_t)(weights->layer_end - weights->layer_begin), n = n_layer * (size_t)config->n_expert;
    ds_residency *r = calloc(1, sizeof *r);
    if (r) {
        *r = (ds_residency){.ops = &MAPPED,
                            .weights = weights,
                            .n_expert = config->n_expert,
                            .place = calloc(n + 1, sizeof *r->place),
                            .uses = calloc(n + 1, sizeof *r->uses),
                            .n_used = config->n_expert_used,
                            .recent = calloc(n_layer * (1 + (size_t)config->n_expert_used), sizeof *r->recent)};
    }
    if (!r || !r->place || !r->uses || !r->recent) {
        ds_residency_destroy(r);
        return ds_fail(err, DS_ENOMEM, "no memory to keep count of %zu experts", n);
    }
    *out = r;
    return DS_OK;
}

void ds_residency_destroy(ds_residency *r) {
    if (!r) return;
    if (r->ops->destroy) r->ops->destroy(r);
    free(r->place);
    free(r->uses);
    free(r->recent);
    free(r);
}

static int *recent_of(ds_residency *r, int il) {
    return r->recent + (size_t)(il - r->weights->layer_begin) * (1 + (size_t)r->n_used);
}

/* Tokens that follow each other share experts: what layer il + 1 chose for the last step is a guess at what it will. */
static void forecast_next(ds_residency *r, int il, const ds_plan *plan) {
    int *recent = recent_of(r, il), *next = recent + 1 + r->n_used;
    recent[0] = plan->n_active < r->n_used ? plan->n_active : r->n_used;
    memcpy(recent + 1, plan->expert, (size_t)recent[0] * sizeof *recent);
    if (il + 1 < r->weights->layer_end) r->ops->forecast(r, il + 1, next + 1, next[0]);
}

ds_status ds_residency_begin(ds_residency *r, int il, const ds_plan *plan, ds_error *err) {
    uint64_t *uses = ds_residency_uses(r, il);
    for (int a = 0; a < plan->n_active; a++) uses[plan->expert[a]] += (uint64_t)plan->count[a];
    if (r->ops->begin) {
        ds_status st = r->ops->begin(r, il, plan, err);
        if (st != DS_OK) return st;
    }
    if (r->ops->forecast) forecast_next(r, il, plan);
    return DS_OK;
}

ds_status ds_residency_wait(ds_residency *r, int il, int e, ds_error *err) {
    return !r->ops->wait || (r->ops->ready && r->ops->ready(r, il, e)) ? DS_OK : r->ops->wait(r, il, e, err);
}

ds_expert ds_residency_get(const ds_residency *r, int il, int e) { return r->ops->get(r, il, e); }

void ds_residency_end(ds_residency *r, int il) {
    if (r->ops->end) r->ops->end(r, il);
}
