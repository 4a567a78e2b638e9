/* step.h: one forward step as the processor's workers see it. Private to backend/cpu.
 *
 * All workers of the pool run the same functions (single program); a phase writes shared buffers, ds_barrier ends it.
 * Elementwise work on hidden states is owned by rows: a worker's `lane` says which tokens are its own. With one token
 * (decode) every worker repeats that little work on a copy of its own, which costs less than the barriers it saves. */
#pragma once

#include "backend/backend.h"
#include "backend/cpu/carve.h"
#include "backend/cpu/mul.h"
#include "base/pool.h"

/* Which experts of a plan are computed together, as their numbers in it: all, or those that are ready while others are
 * not. */
typedef struct ds_wave {
    int *now, n_now;   /* (n_active) */
    int *left, n_left; /* (n_active) not computed yet */
    int *experts;      /* (n_active) room for what the residency is asked */
} ds_wave;

/* A layer's plan, and where the rows of each active expert lie in the packs of its inputs and of its hidden rows. */
typedef struct ds_moe_room {
    ds_plan plan;
    size_t *input_at, *hidden_at; /* (n_active) */
    ds_wave wave;
} ds_moe_room;

/* Room to guess what the next layer chooses. */
typedef struct ds_forecast_room {
    float *xn; /* (n_embd) */
    ds_act act; /* of it */
    int32_t *ids; /* (n_expert_used) */
    float *weights; /* (n_expert_used) */
    float *chance; /* (n_expert) */
    int *experts; /* (n_expert) */
} ds_forecast_room;

typedef struct ds_lane_scratch {
    float *x, *xn; /* (n_embd) one token's rows */
    float *hidden; /* (max of the feed-forward widths) one token's */
    float *hidden_exps; /* (n_expert_used, n_ff_expert) one token's */
    float *logits, *select; /* (n_expert) one token's router logits, and the scores to select by */
    ds_act act_x, act_heads, act_hidden, act_experts; /* one token */
    float *groups; /* (n_group) their scores */
    ds_moe_room moe; /* one token */
    ds_forecast_room forecast;
    int32_t *ids; /* (n_expert_used) */
    float *weights; /* (n_expert_used) */
    ds_job *jobs; /* (2 * n_expert + 4) */
    void *attention; /* what its kind takes: lane_room of attention.h */
} ds_lane_scratch;

typedef struct ds_scratch {
    float *x, *xn, *y; /* (n_tok, n_embd) */
    float *rope; /* (n_tok, rope_dim): cos, sin pairs */
    float *q; /* (n_tok, n_head * qk_dim) */
    void *attention; /* what its kind takes: room of attention.h */
    float *heads; /* (n_tok, n_head * v_dim) */
    float *router; /* (n_tok, n_expert) */
    int32_t *ids; /* (n_tok, n_expert_used) */
    float *weights; /* (n_tok, n_expert_used) */
    float *gate, *up; /* (n_tok, dense or shared width) */
    float *gate_exps, *up_exps, *out_exps; /* (n_slots, n_ff_expert) x 2, (n_slots, n_embd) */
    ds_act act_x, act_heads, act_hidden, act_gathered, act_experts;
    ds_moe_room moe;
    ds_lane_scratch *lanes; /* (n_threads) */
    int n_tok; /* what it was sized for */
    void *memory;
    size_t bytes;
} ds_scratch;

typedef struct ds_step {
    const ds_config *config;
    const ds_weights *weights;
    const ds_kernels *kern;
    const ds_rope *rope;
    ds_scratch *scratch;
    int n_tok;
    const int32_t *ids; /* (n_tok), or NULL where x is given */
    const float *x; /* (n_tok, n_embd) */
    const ds_span *spans;
    int n_spans;
    const int32_t *logit_rows; /* (n_logits) tokens whose logits are wanted, or NULL: the first n_logits */
    int n_logits;
    float *logits; /* (n_logits, n_vocab) */
    const int32_t *taken; /* of a tail: (n_tok) which tokens of the whole step these are */
    ds_tap *tap; /* or NULL */
    ds_residency *residency;
    int backend; /* this one's number among the owners of experts */
    ds_error *failure; /* worker 0 writes it, and a barrier makes it known */
} ds_step;

/* A worker's part in a step. */
typedef struct ds_lane {
    const ds_worker *worker;
    const ds_step *step;
    ds_lane_scratch *own;
    bool solo; /* one token: elementwise work is repeated by each worker */
    int t0, t1; /* rows that this worker owns */
    float *x, *xn;
} ds_lane;

/* A worker's part in a step of which n_tok tokens are left. */
ds_lane ds_lane_of(const ds_worker *worker, const ds_step *step);

/* The operations (backend.h); every worker calls them. They read and update lane->x (owned rows) and return false, on
 * every worker alike, where the step has failed and the rest of its operations must not run. */
bool ds_cpu_embed(const ds_lane *lane, const ds_op *op);
bool ds_cpu_place(const ds_lane *lane, const ds_op *op);
bool ds_cpu_attention(const ds_lane *lane, const ds_op *op);
bool ds_cpu_remember(const ds_lane *lane, const ds_op *op);
bool ds_cpu_tail(const ds_lane *lane, const ds_op *op);
bool ds_cpu_dense(const ds_lane *lane, const ds_op *op);
bool ds_cpu_route(const ds_lane *lane, const ds_op *op);
bool ds_cpu_experts(const ds_lane *lane, const ds_op *op);
bool ds_cpu_combine(const ds_lane *lane, const ds_op *op);
bool ds_cpu_ffn_norm(const ds_lane *lane, const ds_op *op);
bool ds_cpu_head(const ds_lane *lane, const ds_op *op);
bool ds_cpu_copy_in(const ds_lane *lane, const ds_op *op);
bool ds_cpu_copy_out(const ds_lane *lane, const ds_op *op);

/* Worker 0, between the routing of layer il and the end of its experts, which are begun: tell the residency what the next
 * layer may choose. */
void ds_cpu_forecast(const ds_lane *lane, int il);

/* Choose a token's experts and their weights from its router logits, which become probabilities. */
void ds_route(const ds_config *config, const ds_kernels *kern, const float *bias /* (n_expert) or NULL */,
              float *logits /* (n_expert) */, float *select /* (n_expert), room */, float *groups /* (n_group), room */,
              int32_t *ids /* (n_expert_used) */, float *weights /* (n_expert_used) */);

/* Make scratch hold steps of n_tok tokens; keeps what is large enough. */
ds_status ds_scratch_reserve(ds_scratch *scratch, const ds_config *config, const ds_kernels *kern, int n_threads,
                             int n_tok, ds_error *err);
/* What that takes. */
size_t ds_scratch_bytes(const ds_config *config, const ds_kernels *kern, int n_threads, int n_tok);
void ds_scratch_release(ds_scratch *scratch);
