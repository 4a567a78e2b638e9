/* step.h: one forward step as its workers see it. Private to the model.
 *
 * All workers of the pool run the same functions (single program); a phase writes shared buffers, ds_barrier ends it.
 * Elementwise work on hidden states is owned by rows: a worker's `lane` says which tokens are its own. With one token
 * (decode) every worker repeats that little work on a copy of its own, which costs less than the barriers it saves. */
#pragma once

#include "arch/tap.h"
#include "arch/weights.h"
#include "backend/cpu/attend.h"
#include "backend/cpu/mul.h"
#include "base/pool.h"

enum {
    DS_CHUNK = 1024,     /* most tokens in a step: bounds the scratch */
};

/* Tokens [first, first + n) of a step belong to one sequence, at positions pos, pos + 1, ... of its cache. */
typedef struct ds_span {
    ds_kv *kv;
    int first, n, pos;
} ds_span;

typedef struct ds_rope {
    int n;                 /* rope_dim / 2 */
    float *inv_freq;       /* (n) YaRN-blended */
    float scale;           /* of cos and sin */
} ds_rope;

/* A packed activation per kind; NULL where no product of the phase takes that kind. */
typedef struct ds_act {
    void *pack[DS_ACT_COUNT];
} ds_act;

/* Which experts a step runs, over which tokens: slot s (grouped by expert) holds token slot_token[s]. */
typedef struct ds_plan {
    int n_active;
    int *expert, *first, *count; /* (n_active) */
    int32_t *slot_token;         /* (n_slots) */
    int *slot_of;                /* (n_tok, n_expert_used): the slot of a token's k-th expert */
    size_t *act_offset; /* (2, n_active) of an expert's rows in the packs of its inputs and of its hidden rows */
} ds_plan;

typedef struct ds_lane_scratch {
    float *x, *xn, *q_a; /* one token's rows (n_embd), (n_embd), (q_lora_rank) */
    float *hidden; /* (max of the feed-forward widths) one token's */
    float *hidden_exps; /* (n_expert_used, n_ff_expert) one token's */
    float *logits, *select; /* (n_expert) one token's router logits, and the scores to select by */
    ds_act act_x, act_q, act_heads, act_hidden, act_experts; /* one token */
    ds_act act_nope, act_latent; /* (n_tok, nope_dim), (n_tok, kv_lora_rank): one head's rows */
    ds_plan plan; /* one token */
    int32_t *ids; /* (n_expert_used) */
    float *weights; /* (n_expert_used) */
    ds_job *jobs; /* (2 * n_expert + 4) */
    ds_attend_lane attend;
} ds_lane_scratch;

typedef struct ds_scratch {
    float *x, *xn, *y; /* (n_tok, n_embd) */
    float *rope; /* (n_tok, rope_dim): cos, sin pairs */
    float *q_a, *kv_a, *q; /* (n_tok, q_lora_rank), (n_tok, kv width), (n_tok, n_head * qk_dim) */
    ds_attend_room attend;
    float *heads; /* (n_tok, n_head * v_dim) */
    float *router; /* (n_tok, n_expert) */
    int32_t *ids; /* (n_tok, n_expert_used) */
    float *weights; /* (n_tok, n_expert_used) */
    float *gate, *up; /* (n_tok, dense or shared width) */
    float *gate_exps, *up_exps, *out_exps; /* (n_slots, n_ff_expert) x 2, (n_slots, n_embd) */
    ds_act act_x, act_q, act_heads, act_hidden, act_gathered, act_experts;
    ds_plan plan;
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
    const int32_t *logit_rows; /* (n_logits) tokens whose logits are wanted */
    int n_logits;
    float *logits; /* (n_logits, n_vocab) */
    float *x_out; /* (n_tok, n_embd) or NULL: the last block's output */
    ds_tap *tap; /* or NULL */
    const struct ds_step *tail; /* the tokens whose last block is read, as a step of their own; NULL: all of them */
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

/* Attention and feed-forward of block il: read and update lane->x (owned rows). */
void ds_mla(const ds_lane *lane, const ds_layer *layer, int il);
/* Only what later tokens need of these: their latents into the cache of block il. */
void ds_mla_remember(const ds_lane *lane, const ds_layer *layer, int il);
void ds_feed_forward(const ds_lane *lane, const ds_layer *layer, int il);
/* Its norm alone, for who taps it: the end of a block that is attention only. */
void ds_feed_forward_norm(const ds_lane *lane, const ds_layer *layer, int il);

/* Run the step on the pool. */
void ds_step_run(ds_pool *pool, ds_step *step);

ds_status ds_rope_create(const ds_config *config, ds_rope *out, ds_error *err);
void ds_rope_release(ds_rope *rope);
/* cos, sin pairs of a position into row (2 n). */
void ds_rope_angles(const ds_rope *rope, int pos, float *row);
/* Rotate adjacent pairs of x (2 n) by a row of angles. */
void ds_rope_apply(int n, const float *angles, float *x);

/* Make scratch hold steps of n_tok tokens; keeps what is large enough. */
ds_status ds_scratch_reserve(ds_scratch *scratch, const ds_config *config, const ds_kernels *kern, int n_threads,
                             int n_tok, ds_error *err);
void ds_scratch_release(ds_scratch *scratch);
