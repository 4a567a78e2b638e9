#include "arch/keys.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

typedef enum use {
    READ,   /* by config.c */
    IDLE,   /* nothing that the engine computes depends on it */
    UNLESS, /* changes the arithmetic of attention, router or feed-forward, unless it has one of the neutral values */
} use;

typedef struct rule {
    const char *key; /* without the architecture; a final dot stands for all keys that begin so */
    use use;
    double neutral[2]; /* of UNLESS: of a number, a flag (0 or 1), or each number of a list */
    const char *text; /* of UNLESS: the neutral string */
} rule;

/* The keys that llama.cpp's converters and loader know, by what they mean to this engine. */
static const rule RULES[] = {
    {.key = "block_count", .use = READ},
    {.key = "nextn_predict_layers", .use = READ},
    {.key = "context_length", .use = READ},
    {.key = "embedding_length", .use = READ},
    {.key = "vocab_size", .use = READ},
    {.key = "feed_forward_length", .use = READ},
    {.key = "leading_dense_block_count", .use = READ},
    {.key = "attention.head_count", .use = READ},
    {.key = "attention.head_count_kv", .use = READ}, /* latent: says nothing: 1, or all heads in the older form */
    {.key = "attention.q_lora_rank", .use = READ},
    {.key = "attention.kv_lora_rank", .use = READ},
    {.key = "attention.key_length", .use = READ},
    {.key = "attention.value_length", .use = READ},
    {.key = "attention.key_length_mla", .use = READ},
    {.key = "attention.value_length_mla", .use = READ},
    {.key = "attention.layer_norm_rms_epsilon", .use = READ},
    {.key = "attention.temperature_length", .use = READ},
    {.key = "attention.temperature_scale", .use = READ},
    {.key = "rope.dimension_count", .use = READ},
    {.key = "rope.freq_base", .use = READ},
    {.key = "rope.scaling.type", .use = READ},
    {.key = "rope.scaling.factor", .use = READ},
    {.key = "rope.scaling.original_context_length", .use = READ},
    {.key = "rope.scaling.attn_factor", .use = READ},
    {.key = "rope.scaling.yarn_log_multiplier", .use = READ},
    {.key = "rope.scaling.yarn_beta_fast", .use = READ},
    {.key = "rope.scaling.yarn_beta_slow", .use = READ},
    {.key = "expert_count", .use = READ},
    {.key = "expert_used_count", .use = READ},
    {.key = "expert_shared_count", .use = READ},
    {.key = "expert_feed_forward_length", .use = READ},
    {.key = "expert_shared_feed_forward_length", .use = READ},
    {.key = "expert_group_count", .use = READ},
    {.key = "expert_group_used_count", .use = READ},
    {.key = "expert_weights_scale", .use = READ},
    {.key = "expert_weights_norm", .use = READ},
    {.key = "expert_gating_func", .use = READ},

    {.key = "attention.layer_norm_epsilon", .use = IDLE},
    {.key = "attention.group_norm_epsilon", .use = IDLE},
    {.key = "attention.key_length_swa", .use = IDLE}, /* sliding windows are refused by their own key */
    {.key = "attention.value_length_swa", .use = IDLE},
    {.key = "attention.sliding_window_pattern", .use = IDLE},
    {.key = "rope.dimension_count_swa", .use = IDLE},
    {.key = "rope.freq_base_swa", .use = IDLE},
    {.key = "rope.scaling.finetuned", .use = IDLE},
    {.key = "decoder_start_token_id", .use = IDLE},
    {.key = "pooling_type", .use = IDLE},
    {.key = "classifier.", .use = IDLE},

    {.key = "attention.causal", .use = UNLESS, .neutral = {1, 1}},
    {.key = "attention.clamp_kqv", .use = UNLESS},
    {.key = "attention.compress_ratios", .use = UNLESS},
    {.key = "attention.indexer.", .use = UNLESS},
    {.key = "attention.gate_lora_rank", .use = UNLESS},
    {.key = "attention.group_norm_groups", .use = UNLESS},
    {.key = "attention.max_alibi_bias", .use = UNLESS},
    {.key = "attention.output_group_count", .use = UNLESS},
    {.key = "attention.output_lora_rank", .use = UNLESS},
    {.key = "attention.output_scale", .use = UNLESS, .neutral = {0, 1}},
    {.key = "attention.recurrent_layers", .use = UNLESS},
    {.key = "attention.relative_buckets_count", .use = UNLESS},
    {.key = "attention.scale", .use = UNLESS},
    {.key = "attention.shared_kv_layers", .use = UNLESS},
    {.key = "attention.sliding_window", .use = UNLESS},
    {.key = "attention.value_residual_mix_lora_rank", .use = UNLESS},
    {.key = "attention.value_scale", .use = UNLESS, .neutral = {0, 1}},
    {.key = "rope.dimension_sections", .use = UNLESS},
    {.key = "rope.scale_linear", .use = UNLESS, .neutral = {0, 1}},
    {.key = "rope.scaling.alpha", .use = UNLESS, .neutral = {0, 1}},
    {.key = "rope.scaling.yarn_attn_factor", .use = UNLESS, .neutral = {1, 1}},
    {.key = "rope.scaling.yarn_ext_factor", .use = UNLESS, .neutral = {1, -1}}, /* -1: not set */
    {.key = "activation.", .use = UNLESS},
    {.key = "activation_sparsity_scale", .use = UNLESS},
    {.key = "adapters.", .use = UNLESS},
    {.key = "altup.", .use = UNLESS},
    {.key = "attn_logit_softcapping", .use = UNLESS},
    {.key = "attn_res.", .use = UNLESS},
    {.key = "embedding_length_per_layer_input", .use = UNLESS},
    {.key = "embedding_scale", .use = UNLESS, .neutral = {0, 1}},
    {.key = "expert_chunk_feed_forward_length", .use = UNLESS},
    {.key = "expert_group_scale", .use = UNLESS, .neutral = {0, 1}},
    {.key = "expert_latent_length", .use = UNLESS},
    {.key = "experts_per_group", .use = UNLESS},
    {.key = "final_logit_softcapping", .use = UNLESS},
    {.key = "full_attention_interval", .use = UNLESS, .neutral = {0, 1}},
    {.key = "hash_layer_count", .use = UNLESS},
    {.key = "hidden_activation", .use = UNLESS, .text = "silu"},
    {.key = "hyper_connection.", .use = UNLESS},
    {.key = "interleave_moe_layer_step", .use = UNLESS, .neutral = {0, 1}},
    {.key = "kda.", .use = UNLESS},
    {.key = "logit_scale", .use = UNLESS, .neutral = {0, 1}},
    {.key = "moe_every_n_layers", .use = UNLESS, .neutral = {0, 1}},
    {.key = "moe_latent_size", .use = UNLESS},
    {.key = "n_deepstack_layers", .use = UNLESS},
    {.key = "num_loops", .use = UNLESS, .neutral = {0, 1}},
    {.key = "ple.", .use = UNLESS},
    {.key = "residual_scale", .use = UNLESS, .neutral = {0, 1}},
    {.key = "router_logit_softcapping", .use = UNLESS},
    {.key = "shortconv.", .use = UNLESS},
    {.key = "ssm.", .use = UNLESS},
    {.key = "swiglu_clamp_exp", .use = UNLESS},
    {.key = "swiglu_clamp_shexp", .use = UNLESS},
    {.key = "swin_norm", .use = UNLESS},
    {.key = "use_parallel_residual", .use = UNLESS},
    {.key = "wkv.", .use = UNLESS},
};

static const rule *find_rule(const char *key, size_t size) {
    for (size_t i = 0; i < sizeof RULES / sizeof *RULES; i++) {
        const size_t n = strlen(RULES[i].key);
        const bool family = RULES[i].key[n - 1] == '.';
        if ((family ? size > n : size == n) && memcmp(RULES[i].key, key, n) == 0) return &RULES[i];
    }
    return NULL;
}

/* One number at *at, stepped over; false for what is no number. */
static bool next_number(ds_gguf_type type, const unsigned char **at, double *out) {
#define CASE(id, ctype)                \
    case DS_GGUF_##id: {               \
        ctype v;                       \
        memcpy(&v, *at, sizeof v);     \
        *at += sizeof v;               \
        return *out = (double)v, true; \
    }
    switch (type) {
        CASE(U8, uint8_t)
        CASE(I8, int8_t)
        CASE(U16, uint16_t)
        CASE(I16, int16_t)
        CASE(U32, uint32_t)
        CASE(I32, int32_t)
        CASE(U64, uint64_t)
        CASE(I64, int64_t)
        CASE(F32, float)
        CASE(F64, double)
        CASE(BOOL, uint8_t)
    default:
        return false;
    }
#undef CASE
}

/* Whether the value leaves the arithmetic as it is; *value is the first that does not. */
static bool is_neutral(const ds_gguf_kv *kv, const rule *r, double *value, ds_str *text) {
    const unsigned char *at = kv->data;
    const ds_gguf_type type = kv->type == DS_GGUF_ARRAY ? kv->item_type : kv->type;
    if (type == DS_GGUF_STRING) {
        if (kv->type == DS_GGUF_ARRAY) return kv->n_items == 0;
        *text = (ds_str){(const char *)kv->data + sizeof(uint64_t), kv->n_bytes - sizeof(uint64_t)};
        return r->text && text->size == strlen(r->text) && memcmp(text->data, r->text, text->size) == 0;
    }
    if (r->text) return false;
    for (uint64_t i = 0; i < kv->n_items; i++) {
        if (!next_number(type, &at, value)) return false;
        if (*value != r->neutral[0] && *value != r->neutral[1]) return false;
    }
    return true;
}

enum { SHOWN_BYTES = 60, SHOWN_KEYS = 3 };

static int shown(size_t size) { return size > SHOWN_BYTES ? SHOWN_BYTES : (int)size; }

static ds_status refuse(const ds_gguf *gguf, const ds_gguf_kv *kv, double value, ds_str text, ds_error *err) {
    char what[SHOWN_BYTES + 8];
    if (text.data) snprintf(what, sizeof what, "`%.*s`", shown(text.size), text.data);
    else if (kv->type == DS_GGUF_ARRAY && kv->item_type == DS_GGUF_STRING) snprintf(what, sizeof what, "a list");
    else snprintf(what, sizeof what, "%s%g", kv->type == DS_GGUF_ARRAY ? "a list with " : "", value);
    ds_fail(err, DS_EUNSUPPORTED, "%s: `%.*s` is %s, which this engine does not compute", ds_gguf_label(gguf),
            shown(kv->key.size), kv->key.data, what);
    return ds_hint(err, "run without it the model would give wrong answers: a newer dsv2 may know it, or llama.cpp");
}

ds_status ds_keys_check(const ds_gguf *gguf, const char *arch, ds_notes *notes, ds_error *err) {
    const size_t prefix = strlen(arch);
    char unknown[DS_NOTE_BYTES / 2] = "";
    size_t used = 0;
    int n_unknown = 0;
    for (size_t i = 0; i < ds_gguf_n_kv(gguf); i++) {
        const ds_gguf_kv *kv = ds_gguf_kv_at(gguf, i);
        double value = 0;
        ds_str text = {0};
        if (kv->key.size <= prefix + 1 || memcmp(kv->key.data, arch, prefix) != 0 || kv->key.data[prefix] != '.')
            continue;
        const rule *r = find_rule(kv->key.data + prefix + 1, kv->key.size - prefix - 1);
        if (r && r->use == UNLESS && !is_neutral(kv, r, &value, &text)) return refuse(gguf, kv, value, text, err);
        if (r) continue;
        if (n_unknown++ < SHOWN_KEYS && used < sizeof unknown)
            used += (size_t)snprintf(unknown + used, sizeof unknown - used, "%s`%.*s`", n_unknown > 1 ? ", " : "",
                                     shown(kv->key.size), kv->key.data);
    }
    if (n_unknown) {
        char more[32] = "";
        if (n_unknown > SHOWN_KEYS) snprintf(more, sizeof more, " and %d more", n_unknown - SHOWN_KEYS);
        ds_note(notes, "unknown keys, not read: %s%s; if they change the arithmetic, the answers are wrong", unknown,
                more);
    }
    return DS_OK;
}
