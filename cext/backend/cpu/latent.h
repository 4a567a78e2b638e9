/* latent.h: attention of a step's tokens over their sequences' latent caches, between the projections of q and of the
 * output. For latent.c and latent_attend.c. */
#pragma once

#include "backend/cpu/attention.h"

enum {
    DS_QUERY_BLOCK = 64,   /* queries scored at a time against expanded keys */
    DS_EXPAND_PART = 8192, /* positions that unpacking a head's weights for one more task is worth */
    DS_EXPAND_TASKS = 64,  /* enough for any team to share them evenly */
};

/* Query rows of one sequence that walk the latent cache together: n_tok tokens x n_heads heads. */
typedef struct ds_latent_group {
    int span, token, n_tok; /* tokens of the step */
    int head, n_heads;
    int row;     /* of the group's first query among all, padding included */
    int n_rows;  /* padded */
    int n_parts; /* its positions are split into */
    int slot;    /* of part 0 among the results; each part takes n_rows */
} ds_latent_group;

/* A sequence's way through attention. */
typedef struct ds_latent_route {
    bool absorb;     /* by the latent, or by keys and values expanded from it */
    int first_group; /* absorbed */
    int n_parts;     /* expanded: each head's positions are split into */
    int row;         /* of the first query among those expanded, padding included */
} ds_latent_route;

/* How a step's attention is done; the same for all its layers. */
typedef struct ds_latent_plan {
    ds_latent_route *routes; /* (n_spans) */
    ds_latent_group *groups;
    int n_groups, n_absorbed; /* spans that absorb */
    int n_joined;             /* spans that expand in more than one part */
    int n_expanded_rows;
    int32_t *visible; /* (query rows) positions that a row sees */
} ds_latent_plan;

/* One worker's room. */
typedef struct ds_latent_lane {
    float *q_a; /* (q_lora_rank) one token's */
    ds_act act_q; /* one token */
    ds_act act_nope, act_latent; /* (n_tok, nope_dim), (n_tok, kv_lora_rank): one head's rows */
    float *row;    /* one row of a cache, or of a query */
    void *scratch; /* of the kernel */
    /* Expanded attention of one head: its weights, a block of keys and values, all of its queries and their results. */
    float *k_b, *v_b, *columns;
    void *weights, *expand, *queries;
    unsigned char *key_block, *value_block; /* DS_ATTEND_BLOCK rows of any kind */
    ds_row_table keys, values; /* of one block each: these */
    int32_t *visible;
    float *m, *l, *acc;
} ds_latent_lane;

/* What the workers share. */
typedef struct ds_latent_room {
    ds_latent_plan plan;
    float *q_a, *kv_a; /* (n_tok, q_lora_rank), (n_tok, latent width) */
    ds_act act_q; /* (n_tok, q_lora_rank) */
    float *latent; /* (n_tok, n_head, latent width): q with W_uk absorbed, then the attention's latent output */
    void *queries; /* packs of all groups */
    float *m, *l, *acc; /* (slots[, padded kv_lora_rank]) */
    float *head_m, *head_l, *head_acc; /* (n_head, parts, expanded rows[, padded v_dim]) of spans expanded in parts */
} ds_latent_room;

/* Decide how each sequence of the step attends; one worker does it, before the first layer. */
void ds_latent_plan_step(const ds_step *step);

/* Attention of layer il: reads the step's q (rotary part not yet rotated) and the caches, fills the step's heads. Every
 * worker calls it; q is whole before, the caches too unless a span absorbs, the heads after a barrier. */
void ds_latent_heads(const ds_lane *lane, const ds_layer *layer, int il);

static inline int ds_expand_max_parts(const ds_config *c) { return (DS_EXPAND_TASKS + c->n_head - 1) / c->n_head; }

/* Bounds for scratch: query rows of n_tok tokens, padding included, and the slots of their results. */
static inline size_t ds_latent_max_rows(const ds_config *c, int n_tok) {
    return (size_t)n_tok * (size_t)ds_attend_pad(c->n_head);
}

/* Bytes of one query row in a pack of any kind: every kind's pack is linear in its rows. */
static inline size_t ds_latent_query_bytes(const ds_config *c) {
    return ds_query_bytes(DS_ROWS_F32, 1, (int)ds_row_pad(c->kv_lora_rank), (int)ds_row_pad(c->rope_dim));
}

/* parts <= 1 + DS_MAX_PARTS / groups for each group, and a group has at most DS_GROUP_ROWS rows. */
static inline size_t ds_latent_max_slots(const ds_config *c, int n_tok) {
    size_t rows = ds_latent_max_rows(c, n_tok);
    return rows + DS_MAX_PARTS * (rows < DS_GROUP_ROWS ? rows : DS_GROUP_ROWS);
}

static inline ds_latent_room *ds_latent_room_of(const ds_step *s) { return s->scratch->attention; }
static inline ds_latent_lane *ds_latent_lane_of(const ds_lane *lane) { return lane->own->attention; }
