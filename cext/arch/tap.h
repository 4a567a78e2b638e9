/* tap.h: named intermediates of a step, copied out for tests and for calibration. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arch/config.h"

/* Every point that can be tapped: enum suffix, name, whether it is int32, row width as an expression of the config c. */
#define DS_TAP_POINTS(P)                                                      \
    P(INP_EMBD, "inp_embd", 0, c->n_embd)                                     \
    P(ATTN_NORM, "attn_norm", 0, c->n_embd)                                   \
    P(Q_A_NORM, "q_a_norm", 0, c->q_lora_rank)                                \
    P(KV_A_NORM, "kv_a_norm", 0, c->kv_lora_rank)                             \
    P(ATTN_HEADS, "attn_heads", 0, c->n_head * c->v_dim)                      \
    P(ATTN_OUT, "attn_out", 0, c->n_embd)                                     \
    P(FFN_INP, "ffn_inp", 0, c->n_embd)                                       \
    P(FFN_NORM, "ffn_norm", 0, c->n_embd)                                     \
    P(ROUTER_LOGITS, "router_logits", 0, c->n_expert)                         \
    P(EXPERTS, "experts", 1, c->n_expert_used)                                \
    P(EXPERT_WEIGHTS, "expert_weights", 0, c->n_expert_used)                  \
    P(EXPERT_HIDDEN, "expert_hidden", 0, c->n_expert_used * c->n_ff_expert)   \
    P(SHARED_HIDDEN, "shared_hidden", 0, c->n_expert_shared * c->n_ff_expert) \
    P(DENSE_HIDDEN, "dense_hidden", 0, c->n_ff_dense)                         \
    P(L_OUT, "l_out", 0, c->n_embd)                                           \
    P(RESULT_NORM, "result_norm", 0, c->n_embd)

typedef enum ds_tap_point {
#define P(id, name, integer, width) DS_TAP_##id,
    DS_TAP_POINTS(P)
#undef P
        DS_TAP_COUNT
} ds_tap_point;

/* One request: a point of a layer (il; -1 for points outside the blocks), filled row by row at `data`. */
typedef struct ds_tap_entry {
    ds_tap_point point;
    int il;
    void *data; /* (rows, width) float or int32, the caller's */
    int row; /* where the step's first token goes */
} ds_tap_entry;

typedef struct ds_tap {
    ds_tap_entry *entries;
    int n;
} ds_tap;

/* Parse "name-il" or "name"; false where no such point exists in the model. */
bool ds_tap_parse(const ds_config *config, const char *name, ds_tap_point *point, int *il);
/* Values in a row of a point; 0 where the model has none. */
int ds_tap_width(const ds_config *config, ds_tap_point point);
bool ds_tap_is_int(ds_tap_point point);
/* Whether a point lies in what is run. */
bool ds_tap_within(ds_sublayer sublayer, ds_tap_point point);
/* Whether a point exists in layer il (dense and expert layers differ). */
bool ds_tap_exists(const ds_config *config, ds_tap_point point, int il);
