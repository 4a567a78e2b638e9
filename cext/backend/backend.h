/* backend.h: what computes. A step through the model is a short program of the operations below, which model/forward.c
 * writes. A backend holds the states of the step (the residual stream and what comes of it) and, of the layers that it
 * is given work of, whatever it needs, in memory of its own; what another backend reads goes through the host's memory.
 *
 * Work is handed over in runs of operations: submit starts one and returns, wait ends when its results are there. A
 * processor runs it in one go with all its threads, a GPU as one command buffer. Runs of different backends may be under
 * way at the same time; of one backend, one. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "arch/plan.h"
#include "arch/rope.h"
#include "arch/tap.h"
#include "arch/weights.h"
#include "backend/work.h"
#include "memory/kv.h"
#include "memory/residency.h"

enum {
    DS_CHUNK = 1024,      /* most tokens that the processor computes together: bounds what it holds */
    DS_WIDE_CHUNK = 2048, /* and a device that routes all layers: weights that are copied to it are copied for more */
    DS_MAX_BACKENDS = 16, /* of one model */
};

/* Tokens [first, first + n) of a step belong to one sequence, at positions pos, pos + 1, ... of its cache. */
typedef struct ds_span {
    ds_kv *kv;
    int first, n, pos;
} ds_span;

/* What a step is asked: its tokens and what is wanted of them. */
typedef struct ds_request {
    int n_tok;
    const int32_t *ids; /* (n_tok), or NULL where x is given */
    const float *x;     /* (n_tok, n_embd) */
    const ds_span *spans;
    int n_spans;
    const int32_t *logit_rows; /* (n_logits) tokens whose logits are wanted; NULL: the first n_logits */
    int n_logits;
    float *logits; /* (n_logits, n_vocab) */
    float *x_out;  /* (n_tok, n_embd) or NULL: the last block's output */
    ds_tap *tap;   /* or NULL */
    const int32_t *taken; /* of a tail: (n_tok) which tokens of the whole step these are */
    int piece; /* 0, or the most tokens that are computed together (model/pieces.c) */
} ds_request;

/* The states that can be copied, each (n_tok, ...) of its operation's request. */
typedef enum ds_state {
    DS_STATE_X,      /* the residual stream (n_embd) */
    DS_STATE_INPUT,  /* of the experts, normalised (n_embd) */
    DS_STATE_CHOICE, /* the experts chosen (n_expert_used) int32; copied out only */
} ds_state;

typedef enum ds_op_kind {
    DS_OP_EMBED,     /* x = the tokens' embeddings, or what the request gives */
    DS_OP_PLACE,     /* where the tokens stand in their sequences; before the first attention of a request */
    DS_OP_ATTENTION, /* x += attention(x), its rows written to the cache */
    DS_OP_REMEMBER,  /* of attention, only what later tokens need: the rows in the cache */
    DS_OP_TAIL,      /* go on with the tail: its rows of x move to the front */
    DS_OP_DENSE,     /* x += feed-forward(x) */
    DS_OP_ROUTE, /* input = norm(x); choose each token's experts and their weights. May begin the shared experts. */
    DS_OP_EXPERTS, /* a row for each slot of the plan; with `shared` the shared experts as well */
    DS_OP_COMBINE, /* x += shared experts + weighted rows, in the order of choice */
    DS_OP_FFN_NORM, /* the feed-forward's norm alone, for who taps it */
    DS_OP_HEAD, /* logits of the tokens that they are wanted of */
    DS_OP_COPY_IN, /* a state from the host's memory */
    DS_OP_COPY_OUT, /* a state to the host's memory */
    DS_OP_COUNT
} ds_op_kind;

/* A layer's experts shared out among backends, in the host's memory. A token's sum has the same order wherever its parts
 * were computed: a backend gives rows, not sums. */
typedef struct ds_split {
    ds_plan plan;
    const int32_t *ids; /* (n_tok, n_expert_used) the choice behind the plan */
    const uint8_t *owner; /* (n_expert) which backend computes an expert */
    int64_t processor_ns; /* that backend 0 took for its part, once it was waited for */
    float *rows; /* (n_slots, n_embd) of experts that another than the router's backend computes: EXPERTS there writes
                    them, COMBINE reads them */
} ds_split;

typedef struct ds_op {
    ds_op_kind kind;
    int backend; /* its number, which ds_split's owners name */
    int il;
    bool tail; /* of the request's tail */
    bool shared; /* EXPERTS: this backend routed, and the shared experts are its own */
    ds_state state; /* COPY_* */
    void *host; /* COPY_*: (n_tok, ...) */
    const ds_split *split; /* EXPERTS, COMBINE: NULL where one backend does it all and makes its own plan */
} ds_op;

typedef struct ds_backend ds_backend;

/* Which backend computes which part, by number. The routed experts' places are the residency's. */
typedef struct ds_places {
    uint8_t ends;
    uint8_t *attention, *feed_forward; /* (layers) */
    uint32_t *helpers; /* (layers) bit i: backend i computes experts of a layer that another routes */
} ds_places;

/* What every backend of a model is made over; all outlives it. */
typedef struct ds_facts {
    const ds_places *places;
    const ds_config *config;
    const ds_weights *weights;
    const ds_rope *rope;
    ds_residency *residency;
    const uint64_t
        *uses; /* (n_layer, n_expert) how often each routed expert was used so far, or NULL; the caller's own */
} ds_facts;

typedef struct ds_backend_ops {
    /* Room for steps of n_tok tokens; keeps what is large enough. Nothing is allocated behind it. */
    ds_status (*reserve)(ds_backend *backend, int n_tok, ds_error *err);
    size_t (*bytes)(const ds_backend *backend,
                    int n_tok); /* that this takes, of the host's memory, once it is touched */
    /* The step that the next operations, which are written behind this, belong to; tail NULL where there is none. Both stay until the last wait. */
    void (*begin)(ds_backend *backend, const ds_request *whole, const ds_request *tail);
    /* Start operations in order; ops stay until wait. */
    ds_status (*submit)(ds_backend *backend, const ds_op *ops, int n, ds_error *err);
    /* Until they are done; the first failure of one. A backend that has no thread of its own works here. */
    ds_status (*wait)(ds_backend *backend, ds_error *err);
    /* Of a layer that it routes and shares with others: take over experts of the plan for this step, by its number in
     * owner (n_expert). Asked once a layer, before the residency is; NULL: it never does. */
    void (*share)(ds_backend *backend, int il, const ds_plan *plan, uint8_t *owner);
    /* Whether it computes all experts of such a layer for n_tok tokens of the step that was begun, whatever they choose: then
     * they are not split, and nobody asks it to share. NULL: it never does. */
    bool (*takes)(const ds_backend *backend, int il, int n_tok);
    /* Count its work from zero, from now on with times as well or not; then the number of kinds that were timed. NULL, both,
     * where nothing is counted. */
    ds_status (*watch)(ds_backend *backend, bool times, ds_error *err);
    int (*watched)(const ds_backend *backend, ds_work_time out[DS_WORK_TIMES], ds_work *work);
    void (*destroy)(ds_backend *backend);
} ds_backend_ops;

/* The head of every backend. */
struct ds_backend {
    const ds_backend_ops *ops;
    const char *isa; /* what its arithmetic is made of */
    int n_threads; /* of the processor */
    int n_together; /* most tokens that it computes together: DS_CHUNK or DS_WIDE_CHUNK */
};
