/* residency.h: where the routed experts are, and when one can be used. One thread tells that a step begins, and asks, once a
 * layer, or once for each piece of a long step, when the layer's plan is known: begin; and end when nothing reads them any
 * more, behind every begin that succeeded. Between them, of each
 * backend one thread waits for the experts that it computes; then its threads may get those, until they are released.
 *
 * Owns the answer, its counts and where each expert is computed. A tier (the file's mapping, slots that a drive fills) is
 * a row of functions. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "arch/plan.h"
#include "arch/weights.h"

/* One expert's matrices where they are, in formats of their own. Gate and up take packs of one kind. */
typedef struct ds_expert {
    ds_mat gate, up; /* (n_ff_expert, n_embd) */
    ds_mat down; /* (n_embd, n_ff_expert) */
} ds_expert;

typedef struct ds_residency ds_residency;

enum { DS_DECODED_TOKENS = 16 }; /* a longer step reads a prompt */

/* What became of the experts that steps needed, counted once a layer and step, or piece of one. */
typedef struct ds_residency_counts {
    uint64_t n_tokens;
    uint64_t needed, ready, late; /* all; in memory when asked for; then being read already */
    uint64_t told, right; /* of layers that a forecast was made for: experts told, and of them those needed */
    uint64_t needed_told; /* all that were needed in such layers */
    uint64_t bytes_read, wait_ns; /* wait: what the calls of wait took */
} ds_residency_counts;

/* Functions that a tier has no use for are NULL. */
typedef struct ds_residency_ops {
    /* A step of n_tok tokens in n_pieces: a layer is begun up to so many times in a row, each time for other tokens. */
    void (*step)(ds_residency *residency, int n_tok, int n_pieces);
    /* The experts of a plan are needed: start reads or copies, and wait for none. */
    ds_status (*begin)(ds_residency *residency, int il, const ds_plan *plan, ds_error *err);
    bool (*ready)(ds_residency *residency, int il, int e);
    /* Return when one of n experts of a plan begun is ready. Not all need be at once. */
    ds_status (*wait)(ds_residency *residency, int il, const int *experts, int n, ds_error *err);
    /* Whether the caller wants no more of the step, asked by who waits for a thread that may be in `wait`. */
    bool (*stops)(ds_residency *residency);
    /* Of an expert that is ready. Every thread may ask. */
    ds_expert (*get)(const ds_residency *residency, int il, int e);
    /* n experts that were ready have been computed. */
    void (*release)(ds_residency *residency, int il, const int *experts, int n);
    void (*end)(ds_residency *residency, int il);
    /* Layer il may soon need these n experts, the likeliest first. It may be wrong: what is told here changes no result. */
    void (*forecast)(ds_residency *residency, int il, const int *experts, int n);
    /* Counts of steps of up to DS_DECODED_TOKENS, and of longer ones. */
    void (*count)(ds_residency *residency, ds_residency_counts *decoding, ds_residency_counts *reading);
    void (*destroy)(ds_residency *residency);
} ds_residency_ops;

struct ds_residency {
    const ds_residency_ops *ops;
    const ds_weights *weights;
    int n_expert;
    uint8_t *place; /* (layers, n_expert) number of the backend that computes it */
    uint64_t *uses; /* (layers, n_expert) tokens that chose it */
};

/* The head of a tier's own: on failure released, and not the tier. */
ds_status ds_residency_init(const ds_config *config, const ds_weights *weights, const ds_residency_ops *ops,
                            ds_residency *out, ds_error *err);
/* The weights' experts where they lie in the mapping: always ready. All are placed at backend 0. */
ds_status ds_residency_mapped(const ds_config *config, const ds_weights *weights, ds_residency **out, ds_error *err);
void ds_residency_destroy(ds_residency *residency);

/* An expert as the weights bind it: formats and shapes, and data in the file's mapping. */
ds_expert ds_residency_bound(const ds_weights *weights, int il, int e);

/* Whether nobody ever has to wait. */
static inline bool ds_residency_is_settled(const ds_residency *r) { return !r->ops->wait; }

static inline size_t ds_residency_row(const ds_residency *r, int il) {
    return (size_t)(il - r->weights->layer_begin) * (size_t)r->n_expert;
}
/* (n_expert) of a layer. */
static inline uint8_t *ds_residency_place(const ds_residency *r, int il) { return r->place + ds_residency_row(r, il); }
static inline uint64_t *ds_residency_uses(const ds_residency *r, int il) { return r->uses + ds_residency_row(r, il); }

void ds_residency_step(ds_residency *residency, int n_tok, int n_pieces);
/* Count the plan's experts, and have them made ready. */
ds_status ds_residency_begin(ds_residency *residency, int il, const ds_plan *plan, ds_error *err);
/* Count n choices that were made where no plan of the layer is known here. */
void ds_residency_count(ds_residency *residency, int il, const int32_t *ids, int n);
bool ds_residency_ready(ds_residency *residency, int il, int e);
ds_status ds_residency_wait(ds_residency *residency, int il, const int *experts, int n, ds_error *err);
bool ds_residency_stops(ds_residency *residency);
ds_expert ds_residency_get(const ds_residency *residency, int il, int e);
void ds_residency_release(ds_residency *residency, int il, const int *experts, int n);
void ds_residency_end(ds_residency *residency, int il);
void ds_residency_forecast(ds_residency *residency, int il, const int *experts, int n);
