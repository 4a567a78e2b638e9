/* config.h: a model's shape, read from GGUF metadata and checked. Of tensors it asks only which are there: they tell what
 * some converters leave unsaid. */
#pragma once

#include <stdbool.h>

#include "base/notes.h"
#include "gguf/gguf.h"

/* Where tensors come from: a GGUF, or a table of arrays. find returns NULL where the name is absent. */
typedef struct ds_source {
    const ds_tensor *(*find)(const void *ctx, const char *name);
    const void *ctx;
    const char *label; /* for errors */
} ds_source;

typedef enum ds_gating { DS_GATING_SOFTMAX = 1, DS_GATING_SIGMOID = 2 } ds_gating;

enum { DS_MAX_NAME = 96 };

/* How a layer attends: a row of attention.h's table, and one of each backend's. */
typedef enum ds_attention_id { DS_ATTENTION_LATENT, DS_ATTENTION_PLAIN, DS_ATTENTION_KINDS } ds_attention_id;

/* A block has two: as far as the residual after attention, and from there on. */
typedef enum ds_sublayer { DS_SUBLAYER_BOTH, DS_SUBLAYER_ATTENTION, DS_SUBLAYER_FEED_FORWARD } ds_sublayer;

typedef struct ds_config {
    char arch[DS_MAX_NAME], name[DS_MAX_NAME];
    ds_attention_id attention;
    int n_layer; /* of the model proper: blocks of a draft head (multi-token prediction) come after them and are not run */
    int n_ctx_train, n_embd, n_vocab;
    int n_head, n_head_kv; /* of queries, and of what is cached of keys and values: each serves n_head / n_head_kv */
    int nope_dim, rope_dim, v_dim; /* per head: q and k without and with position, and the value */
    int q_lora_rank; /* latent: 0: q comes straight from the hidden state */
    int kv_lora_rank; /* latent: width of the latent c_kv */
    int n_ff_dense, n_layer_dense; /* the leading layers with one plain feed-forward */
    int n_expert, n_expert_used, n_expert_shared, n_ff_expert;
    int n_group, n_group_used; /* 1 and 1 where experts are not grouped */
    float expert_scale;
    bool expert_norm; /* renormalise the chosen experts' weights */
    ds_gating gating;
    bool router_bias; /* experts are chosen by their score plus a bias (exp_probs_b) */
    float rms_eps;
    float rope_base, rope_factor, rope_beta_fast, rope_beta_slow, rope_attn_factor;
    int rope_orig_ctx;
    float attn_scale; /* of q . k, YaRN's m*m included */
    float attn_temp_scale; /* 0: queries have one scale wherever they stand (ds_query_scale) */
    int attn_temp_length;
    ds_notes notes; /* what the file leaves unsaid, and what was assumed */
} ds_config;

/* GGUF's name of the i-th architecture that runs here; NULL behind the last. */
const char *ds_config_arch(int i);

/* Read and check every value the engine uses; errors name the key. What is missing and can be told from the rest is assumed
 * and noted; what cannot is an error. Widths are at most 2^20, so that a step's tokens times a width is an int. */
ds_status ds_config_read(const ds_gguf *gguf, ds_source source, ds_config *out, ds_error *err);

static inline int ds_qk_dim(const ds_config *c) { return c->nope_dim + c->rope_dim; }
/* Heads of queries that share a head of keys and values. */
static inline int ds_head_share(const ds_config *c) { return c->n_head / c->n_head_kv; }
/* Of the latent kind: a latent and its rotary key. */
static inline int ds_latent_width(const ds_config *c) { return c->kv_lora_rank + c->rope_dim; }
