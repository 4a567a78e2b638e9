/* weights.h: a model's matrices bound by name to the bytes of a file (or of caller's arrays), with every shape checked
 * against the configuration. Borrows the tensors' memory; owns only the small vectors that it decodes to float. */
#pragma once

#include "arch/config.h"
#include "quant/mat.h"

/* A layer's routed experts as they lie in the file; where to find one for use is told by memory/residency.h. */
typedef struct ds_experts {
    ds_mat gate, up; /* n_expert x (n_ff_expert, n_embd) */
    ds_mat down;     /* n_expert x (n_embd, n_ff_expert) */
} ds_experts;

/* Keys and values of the latent kind (latent.c), and its queries' down-projection. */
typedef struct ds_latent_weights {
    const float *q_a_norm;  /* (q_lora_rank) or NULL */
    const float *kv_a_norm; /* (kv_lora_rank) */
    ds_mat q_a;             /* (q_lora_rank, n_embd) */
    ds_mat kv_a;            /* (kv_lora_rank + rope_dim, n_embd) */
    ds_mat k_b; /* n_head x (kv_lora_rank, nope_dim): W_uk transposed, so that q absorbs it as a plain product */
    ds_mat v_b; /* n_head x (v_dim, kv_lora_rank): W_uv */
} ds_latent_weights;

/* Of the plain kind (plain.c). */
typedef struct ds_plain_weights {
    ds_mat k, v; /* (n_head_kv * qk_dim, n_embd), (n_head_kv * v_dim, n_embd) */
} ds_plain_weights;

typedef struct ds_layer {
    const float *attn_norm, *ffn_norm; /* (n_embd) */
    ds_mat q; /* (n_head * qk_dim, n_embd), or (.., q_lora_rank) behind a latent's q_a */
    ds_mat o; /* (n_embd, n_head * v_dim) */
    union { /* by the model's kind of attention */
        ds_latent_weights latent;
        ds_plain_weights plain;
    };
    ds_mat gate, up, down;                /* dense layers */
    ds_mat router;                        /* (n_expert, n_embd) */
    const float *router_bias;             /* (n_expert) or NULL */
    ds_experts experts;
    ds_mat gate_shared, up_shared, down_shared;
} ds_layer;

typedef struct ds_weights {
    ds_mat token_embd; /* (n_vocab, n_embd) */
    ds_mat output;     /* (n_vocab, n_embd); token_embd where tied */
    const float *output_norm;
    ds_layer *layers;
    int layer_begin, layer_end; /* which blocks are bound: all, or one for calibration */
    ds_sublayer sublayer;       /* of each block, what is bound and run */
    struct ds_owned *owned;     /* decoded vectors and transposed legacy matrices */
    size_t owned_bytes;
} ds_weights;

/* Bind blocks [layer_begin, layer_end), or one sublayer of each; ends: embeddings and head too. On failure nothing is kept. */
ds_status ds_weights_bind(const ds_config *config, ds_source source, int layer_begin, int layer_end, bool ends,
                          ds_sublayer sublayer, ds_weights *out, ds_error *err);
void ds_weights_release(ds_weights *weights);

static inline ds_layer *ds_weights_layer(const ds_weights *w, int il) { return &w->layers[il - w->layer_begin]; }
