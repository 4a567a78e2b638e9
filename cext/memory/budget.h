/* budget.h: how much memory the weights of a model may take, and who can stop a wait for the rest. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/os.h"

enum { DS_STOP_LOOK_NS = 20 * 1000 * 1000 }; /* how often who waits for a drive looks whether it is to stop */

typedef struct ds_budget {
    size_t ram; /* bytes for weights; 0, or as much as all take: they stay mapped */
    const uint64_t *uses; /* (n_layer, n_expert) how often each expert was used so far, to begin with; or NULL */
    size_t n_uses;
    /* Asked by who waits for a drive, or for a thread that does, on the thread that waits: whether the caller wants no
     * more of it. May be NULL. */
    bool (*stop)(void *ctx);
    void *stop_ctx;
} ds_budget;

/* What the weights of a model take of memory. */
typedef struct ds_needs {
    size_t all; /* every tensor of the file, as it has them */
    /* Within a budget: what every token needs, but for what devices have copies of (while it is opened that is there
     * too), and slots for all routed experts. */
    size_t shared, slots;
    size_t experts; /* the routed experts alone */
    size_t least; /* the smallest budget */
    size_t long_step; /* what the longest step takes then, beside that of one of its pieces */
} ds_needs;

static inline bool ds_budget_stops(const ds_budget *budget) { return budget->stop && budget->stop(budget->stop_ctx); }
