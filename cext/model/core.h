/* core.h: what a model and a single block share: configuration, bound weights, what computes them, and the program of a
 * step. */
#pragma once

#include <stdatomic.h>

#include "backend/backend.h"
#include "base/os.h"
#include "memory/budget.h"
#include "memory/loaded.h"
#include "model/placement.h"

/* Host memory through which backends read each other's states: (n_tok, ...) of a step. Only where there are several. */
typedef struct ds_exchange {
    float *x, *input; /* (n_tok, n_embd) */
    int32_t *ids; /* (n_tok, n_expert_used) */
    ds_split split; /* of the layer under way */
    uint8_t *owner; /* (n_expert) its */
    int n_tok; /* what it was sized for */
    void *memory;
    size_t bytes;
} ds_exchange;

/* The steps that the host takes itself; they part a program. Between two of them each backend has one run of operations,
 * and all these are under way at once. */
enum {
    DS_HOST = -1,
    DS_OP_PLAN = DS_OP_COUNT, /* make a split layer's plan, and have its experts made ready */
    DS_OP_JOIN, /* go on when all are done, with a split layer's experts if il is one, else il is -1 */
};

typedef struct ds_core {
    ds_config config;
    ds_loaded loaded; /* where a budget does not hold all weights */
    size_t copied_bytes; /* of what a budget has read, that only devices read, which have copies */
    ds_weights weights;
    ds_rope rope;
    ds_residency *residency;
    ds_places places;
    ds_backend *backends[DS_MAX_BACKENDS];
    int n_backends;
    int n_together; /* most tokens that are computed together: the least of what further backends say, or the one's */
    ds_exchange exchange;
    ds_op *program;
    int n_ops;
    ds_span *tail_spans; /* (DS_CHUNK) */
    long process; /* that made it, and has its threads */
    ds_lock lock; /* one step at a time: all of the above is shared */
    atomic_bool stopping; /* the step under way, at its next wait; each begins without */
    atomic_int n_run, n_runs; /* layers of pieces that are computed, of all of the step under way; of no piece: 0 */
} ds_core;

/* Which part of a model, and what runs it. */
typedef struct ds_core_spec {
    int layer_begin, layer_end; /* layer_end -1: to the last */
    bool ends;
    ds_sublayer sublayer;
    const ds_device *processor; /* device 0 */
    const ds_placement *placement; /* or NULL */
    /* NULL, or a ram of 0 or as much as all weights take: these stay where the source has them. Else metadata is the file
     * that they are in, and outlives the core; the layers are all. */
    const ds_budget *budget;
} ds_core_spec;

/* Set up everything but the file, in `out`, which stays where it is: on failure nothing is kept. */
ds_status ds_core_create(const ds_gguf *metadata, ds_source source, const ds_core_spec *spec, ds_core *out,
                         ds_error *err);
void ds_core_release(ds_core *core);

/* Whether this is the process that made it: one forked from that has not its threads, and would wait for them for ever
 * (DS_EINVAL). To be asked before anything that another thread may have locked at the fork. */
ds_status ds_core_check(const ds_core *core, ds_error *err);

/* The next n items of a block of memory, on cache lines of their own; with base NULL it only measures. */
static inline void *ds_core_take(unsigned char *base, size_t *used, size_t n, size_t item) {
    const size_t at = *used;
    *used += (n * item + 63) / 64 * 64;
    return base ? base + at : NULL;
}

/* What the weights take. gguf: the file that they are in, all layers of it. */
ds_needs ds_core_needs(const ds_core *core, const ds_gguf *gguf);
/* Memory that steps of n_tok tokens in such pieces take, beside weights and caches. */
size_t ds_core_step_bytes(const ds_core *core, int n_tok, int piece);
/* Run a step. On failure what it was to fill is undefined. Of more tokens than its piece it must give ids and no x, and have
 * neither tap nor x_out. */
ds_status ds_core_run(ds_core *core, const ds_request *request, ds_error *err);

/* As a step of its own, its layers [begin, end) alone; of the other steps between two such parts it knows nothing. */
ds_status ds_core_run_part(ds_core *core, const ds_request *request, int begin, int end, ds_error *err);

/* Its layers [begin, end) of a step's own: what goes in is x where these are not the first, and x_out comes out where they
 * are not the last. For who holds the lock, has room reserved and has told the residency of the step. */
ds_status ds_core_run_layers(ds_core *core, const ds_request *request, int begin, int end, ds_error *err);
/* Run a step of more tokens than its piece (pieces.c), for the same. */
ds_status ds_core_run_pieces(ds_core *core, const ds_request *request, ds_error *err);
static inline int ds_core_n_pieces(int n_tok, int piece) { return (n_tok + piece - 1) / piece; }
/* Memory that the pieces of such a step take together. */
size_t ds_core_pieces_bytes(const ds_core *core, int n_tok, int piece);

/* Write the program of a step's layers [begin, end); tail NULL where all tokens go to the end (forward.c). At most so many
 * operations: */
void ds_forward(ds_core *core, const ds_request *whole, const ds_request *tail, int begin, int end);
static inline size_t ds_forward_max_ops(const ds_core *core) {
    const size_t n_layer = (size_t)(core->weights.layer_end - core->weights.layer_begin);
    return (n_layer + 1) * (16 + 2 * (size_t)core->n_backends);
}
/* Fill `tail` with the tokens whose logits are wanted, if the others may stop before the last block and these are the
 * last of their spans: one block less for them. spans: room for those of the request. Returns whether it did. */
bool ds_forward_tail(const ds_request *request, ds_span *spans, ds_request *tail);
