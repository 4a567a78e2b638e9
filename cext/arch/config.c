#include "arch/config.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "arch/keys.h"

/* Reads of "<arch>.<key>"; the first failure sticks in `status` so that a run of reads needs one check at its end. */
typedef struct reader {
    const ds_gguf *gguf;
    ds_source source;
    const char *arch;
    ds_notes *notes;
    ds_status status;
    ds_error *err;
} reader;

/* A step has up to 2^10 tokens and counts its values in ints. A row of logits is counted on its own. */
enum { DS_MAX_WIDTH = 1 << 20, DS_MAX_VOCAB = 1 << 24 };

static void key_of(const reader *r, const char *key, char *out, size_t size) {
    snprintf(out, size, "%s.%s", r->arch, key);
}

static bool present(const reader *r, const char *key) {
    char full[160];
    key_of(r, key, full, sizeof full);
    return ds_gguf_kv_find(r->gguf, full) != NULL;
}

static bool has_tensor(const reader *r, const char *format, ...) {
    char name[DS_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return r->source.find(r->source.ctx, name) != NULL;
}

/* A key that is missing and cannot be guessed: what it should say is in the hint. */
static void fail_missing(reader *r, const char *key, const char *hint) {
    if (r->status != DS_OK) return;
    r->status =
        ds_fail(r->err, DS_EFORMAT, "%s: metadata key `%s.%s` is missing", ds_gguf_label(r->gguf), r->arch, key);
    ds_hint(r->err, hint);
}

/* An integer in [min, max]; `fallback` where the key is absent and fallback >= 0, else the key is required. */
static int read_int(reader *r, const char *key, int64_t min, int64_t max, int64_t fallback) {
    char full[160];
    int64_t value = fallback;
    bool bad = false;
    if (r->status != DS_OK) return 0;
    key_of(r, key, full, sizeof full);
    if (!ds_gguf_get_i64(r->gguf, full, &value, &bad, r->err) && !bad && fallback < 0) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: metadata key `%s` is missing", ds_gguf_label(r->gguf), full);
        return 0;
    }
    if (bad) return r->status = r->err->status, 0;
    if (value < min || value > max) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: `%s` is %lld, expected %lld to %lld", ds_gguf_label(r->gguf), full,
                            (long long)value, (long long)min, (long long)max);
        return 0;
    }
    return (int)value;
}

static float read_float(reader *r, const char *key, double min, double max, double fallback) {
    char full[160];
    double value = fallback;
    bool bad = false;
    if (r->status != DS_OK) return 0;
    key_of(r, key, full, sizeof full);
    ds_gguf_get_f64(r->gguf, full, &value, &bad, r->err);
    if (bad) return r->status = r->err->status, 0.0f;
    if (!(value >= min && value <= max)) { /* a NaN fails too */
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: `%s` is %g, expected %g to %g", ds_gguf_label(r->gguf), full,
                            value, min, max);
        return 0;
    }
    return (float)value;
}

static bool read_bool(reader *r, const char *key, bool fallback) {
    char full[160];
    bool value = fallback, bad = false;
    if (r->status != DS_OK) return false;
    key_of(r, key, full, sizeof full);
    ds_gguf_get_bool(r->gguf, full, &value, &bad, r->err);
    if (bad) r->status = r->err->status;
    return value;
}

static void read_string(const ds_gguf *gguf, const char *key, char *out, size_t size) {
    ds_str value = {0};
    bool bad = false;
    ds_error ignored; /* a name of another type is no reason to refuse a model */
    out[0] = '\0';
    if (ds_gguf_get_str(gguf, key, &value, &bad, &ignored))
        snprintf(out, size, "%.*s", (int)(value.size < size ? value.size : size), value.data);
}

static int read_vocab(reader *r) {
    const ds_gguf_kv *tokens = ds_gguf_kv_find(r->gguf, "tokenizer.ggml.tokens");
    int64_t fallback =
        tokens && tokens->type == DS_GGUF_ARRAY && tokens->n_items < DS_MAX_VOCAB ? (int64_t)tokens->n_items : -1;
    return read_int(r, "vocab_size", 1, DS_MAX_VOCAB, fallback);
}

/* block_count counts the blocks of a draft head (multi-token prediction) too, which the model itself does not run. */
static void read_layers(reader *r, ds_config *c) {
    int n_block = read_int(r, "block_count", 1, 1024, -1), n_draft = read_int(r, "nextn_predict_layers", 0, 1024, 0);
    if (r->status == DS_OK && !present(r, "nextn_predict_layers")) {
        while (n_draft < n_block && has_tensor(r, "blk.%d.nextn.eh_proj.weight", n_block - n_draft - 1)) n_draft++;
        if (n_draft)
            ds_note(r->notes, "`%s.nextn_predict_layers` is missing: %d, by the blocks that have nextn tensors",
                    r->arch, n_draft);
    }
    c->n_layer = n_block - n_draft;
    if (r->status != DS_OK || !n_draft) return;
    if (c->n_layer < 1 ||
        (!has_tensor(r, "blk.0.attn_norm.weight") && has_tensor(r, "blk.%d.attn_norm.weight", c->n_layer))) {
        r->status = ds_fail(r->err, DS_EUNSUPPORTED,
                            "%s: a draft head alone (multi-token prediction): %d of its model's %d blocks",
                            ds_gguf_label(r->gguf), n_draft, n_block);
        ds_hint(
            r->err,
            "it drafts for a model and is none by itself: take the model's own file, which needs no draft head here");
    }
}

/* Head widths: files in the latent form state them as *_mla, older ones as the plain lengths. */
static void read_heads(reader *r, ds_config *c) {
    bool latent = present(r, "attention.key_length_mla");
    int qk;
    c->n_head = read_int(r, "attention.head_count", 1, 65536, -1);
    c->q_lora_rank = read_int(r, "attention.q_lora_rank", 0, DS_MAX_WIDTH, 0);
    c->kv_lora_rank = read_int(r, "attention.kv_lora_rank", 1, 65536, -1);
    c->rope_dim = read_int(r, "rope.dimension_count", 2, 65536, -1);
    qk = read_int(r, latent ? "attention.key_length_mla" : "attention.key_length", 3, 65536, -1);
    c->v_dim = read_int(r, latent ? "attention.value_length_mla" : "attention.value_length", 1, 65536, -1);
    c->nope_dim = qk - c->rope_dim;
    if (r->status == DS_OK && (c->nope_dim < 1 || c->rope_dim % 2)) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: a head of %d values cannot hold %d rotated ones",
                            ds_gguf_label(r->gguf), qk, c->rope_dim);
    }
}

/* V3's router (noaux_tc) is the one with a bias. Its converters wrote no key before they wrote one, GLM-4.7-Flash's never. */
static void read_gating(reader *r, ds_config *c) {
    const int gating = read_int(r, "expert_gating_func", 0, 2, 0);
    for (int il = c->n_layer_dense; il < c->n_layer && !c->router_bias; il++)
        c->router_bias = has_tensor(r, "blk.%d.exp_probs_b.bias", il);
    c->gating = gating ? (ds_gating)gating : c->router_bias ? DS_GATING_SIGMOID : DS_GATING_SOFTMAX;
    if (!gating && c->router_bias)
        ds_note(r->notes, "`%s.expert_gating_func` is missing: sigmoid, because the router has a bias (exp_probs_b)",
                r->arch);
    if (c->gating == DS_GATING_SIGMOID && !c->router_bias)
        ds_note(r->notes, "the router has no bias (exp_probs_b.bias), which models with sigmoid scores have: experts "
                          "are chosen without");
}

/* Converters before autumn 2025, and ik_llama.cpp's, write no group keys: these are the shapes of the published models
 * that have groups. JoyAI (256 experts, 40 layers) and Kimi (384) have none. */
static void assume_groups(reader *r, ds_config *c) {
    static const struct {
        ds_gating gating;
        int n_expert, n_used, n_layer, n_embd; /* 0: any */
        int n_group, n_group_used;
        const char *model;
    } KNOWN[] = {
        {DS_GATING_SOFTMAX, 160, 6, 0, 0, 8, 3, "DeepSeek-V2"},
        {DS_GATING_SIGMOID, 256, 8, 61, 7168, 8, 4, "DeepSeek-V3"},
    };
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
        if (c->gating != KNOWN[i].gating || c->n_expert != KNOWN[i].n_expert || c->n_expert_used != KNOWN[i].n_used)
            continue;
        if (KNOWN[i].n_layer && (c->n_layer != KNOWN[i].n_layer || c->n_embd != KNOWN[i].n_embd)) continue;
        c->n_group = KNOWN[i].n_group;
        c->n_group_used = KNOWN[i].n_group_used;
        ds_note(r->notes, "`%s.expert_group_count` is missing: %d of %d groups, because the shape is %s's", r->arch,
                c->n_group_used, c->n_group, KNOWN[i].model);
    }
}

static void read_groups(reader *r, ds_config *c) {
    c->n_group = read_int(r, "expert_group_count", 0, c->n_expert, 0);
    if (!c->n_group) {
        c->n_group = c->n_group_used = 1;
        if (r->status == DS_OK) assume_groups(r, c);
        return;
    }
    c->n_group_used = read_int(r, "expert_group_used_count", 0, c->n_group, 0);
    if (c->n_group > 1 && !c->n_group_used)
        fail_missing(r, "expert_group_used_count",
                     "without it no expert can be chosen as the model does: convert it again");
    if (!c->n_group_used) c->n_group_used = 1;
    if (r->status == DS_OK &&
        (c->n_expert % c->n_group || c->n_expert_used > c->n_group_used * (c->n_expert / c->n_group))) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: %d of %d experts cannot come from %d of %d groups",
                            ds_gguf_label(r->gguf), c->n_expert_used, c->n_expert, c->n_group_used, c->n_group);
    }
}

/* The chosen experts' weights. All published models with sigmoid scores normalise them and scale them by a number of
 * their own; with softmax, V2-Lite's kind neither normalises nor scales. */
static void read_expert_weights(reader *r, ds_config *c) {
    const bool sigmoid = c->gating == DS_GATING_SIGMOID;
    c->expert_norm = read_bool(r, "expert_weights_norm", sigmoid);
    if (sigmoid && !present(r, "expert_weights_norm"))
        ds_note(r->notes, "`%s.expert_weights_norm` is missing: true, as in all models with sigmoid scores", r->arch);
    c->expert_scale = read_float(r, "expert_weights_scale", 0.0, 1e6, 0.0);
    if (c->expert_scale != 0.0f || r->status != DS_OK) return; /* 0 is written by tools that mean "not set" */
    if (sigmoid || c->n_group > 1) {
        fail_missing(
            r, "expert_weights_scale",
            "models with such a router have one (routed_scaling_factor in config.json): convert the model again, "
            "or take another file of it");
    }
    c->expert_scale = 1.0f;
    ds_note(r->notes, "`%s.expert_weights_scale` is missing: 1, as V2-Lite's", r->arch);
}

/* One width for all shared experts together: their number times an expert's. */
static void read_shared(reader *r, ds_config *c) {
    const ds_tensor *gate = NULL;
    for (int il = c->n_layer_dense; il < c->n_layer && !gate; il++) {
        char name[DS_MAX_NAME];
        snprintf(name, sizeof name, "blk.%d.ffn_gate_shexp.weight", il);
        gate = r->source.find(r->source.ctx, name);
    }
    c->n_expert_shared = read_int(r, "expert_shared_count", 0, 1024, 0);
    if (r->status == DS_OK && gate && !present(r, "expert_shared_count")) {
        int64_t n = gate->ne[1] / c->n_ff_expert;
        c->n_expert_shared = n < 1024 ? (int)n : 1024;
        ds_note(r->notes, "`%s.expert_shared_count` is missing: %d, by the shape of ffn_gate_shexp", r->arch,
                c->n_expert_shared);
    }
    int width = read_int(r, "expert_shared_feed_forward_length", 0, DS_MAX_WIDTH, 0);
    if (r->status == DS_OK && width && width != c->n_expert_shared * (int64_t)c->n_ff_expert) {
        r->status =
            ds_fail(r->err, DS_EUNSUPPORTED, "%s: `%s.expert_shared_feed_forward_length` is %d, expected %d x %d",
                    ds_gguf_label(r->gguf), r->arch, width, c->n_expert_shared, c->n_ff_expert);
    }
}

static void read_experts(reader *r, ds_config *c) {
    c->n_layer_dense = read_int(r, "leading_dense_block_count", 0, c->n_layer, 0);
    c->n_ff_dense =
        read_int(r, "feed_forward_length", c->n_layer_dense ? 1 : 0, DS_MAX_WIDTH, c->n_layer_dense ? -1 : 0);
    c->n_group = c->n_group_used = 1;
    c->expert_scale = 1.0f;
    c->gating = DS_GATING_SOFTMAX;
    if (r->status != DS_OK || c->n_layer_dense == c->n_layer) return;
    c->n_expert = read_int(r, "expert_count", 1, 65536, -1);
    c->n_expert_used = read_int(r, "expert_used_count", 1, c->n_expert, -1);
    c->n_ff_expert = read_int(r, "expert_feed_forward_length", 1, DS_MAX_WIDTH, -1);
    if (r->status != DS_OK) return;
    read_shared(r, c);
    read_gating(r, c);
    read_groups(r, c);
    read_expert_weights(r, c);
}

/* By how much positions are scaled; 0 where they are not. Files of before the keys were settled lack one or
 * another of them. Every published model of the family with a scaling has YaRN, from context_length / factor tokens. */
static double read_scaling(reader *r, ds_config *c) {
    char type[DS_MAX_NAME], key[160];
    double factor = read_float(r, "rope.scaling.factor", 1.0, 1e6, 1.0);
    const bool has_factor = present(r, "rope.scaling.factor"),
               has_orig = present(r, "rope.scaling.original_context_length");
    key_of(r, "rope.scaling.type", key, sizeof key);
    read_string(r->gguf, key, type, sizeof type);
    c->rope_orig_ctx = read_int(r, "rope.scaling.original_context_length", 1, 1 << 30, c->n_ctx_train);
    if (r->status != DS_OK || strcmp(type, "none") == 0) return 0.0;
    if (!present(r, "rope.scaling.type")) {
        if (factor == 1.0 && !present(r, "rope.scaling.yarn_log_multiplier")) return 0.0;
        ds_note(r->notes, "`%s` is missing beside other keys of a scaling: yarn, as in all models of the family", key);
    } else if (strcmp(type, "yarn") != 0) {
        r->status = ds_fail(r->err, DS_EUNSUPPORTED, "%s: `%s` is `%s`", ds_gguf_label(r->gguf), key, type);
        ds_hint(r->err, "the engine runs models with YaRN or unscaled rotary positions");
        return 0.0;
    }
    if (!has_factor) {
        factor = (double)c->n_ctx_train / c->rope_orig_ctx;
        if (!has_orig || factor <= 1.0 || factor != floor(factor)) {
            fail_missing(r, "rope.scaling.factor",
                         "it stands in config.json under rope_scaling: convert the model again");
            return 0.0;
        }
        ds_note(r->notes, "`%s.rope.scaling.factor` is missing: %g, the trained context of %d over the original %d",
                r->arch, factor, c->n_ctx_train, c->rope_orig_ctx);
    }
    if (!has_orig && factor > 1.0) {
        const double orig = c->n_ctx_train / factor;
        if (orig != floor(orig)) {
            fail_missing(r, "rope.scaling.original_context_length",
                         "it stands in config.json under rope_scaling: convert the model again");
            return 0.0;
        }
        c->rope_orig_ctx = (int)orig;
        ds_note(r->notes,
                "`%s.rope.scaling.original_context_length` is missing: %d, the trained context over the factor",
                r->arch, c->rope_orig_ctx);
    }
    return factor;
}

/* YaRN: cos and sin carry mscale / mscale_all_dim, the softmax scale carries m * m (DeepSeek-V2, section 3.1.4). */
static void read_rope(reader *r, ds_config *c) {
    double factor, log_mul, m;
    c->rope_base = read_float(r, "rope.freq_base", 1.0, 1e12, 10000.0);
    if (!present(r, "rope.freq_base"))
        ds_note(r->notes, "`%s.rope.freq_base` is missing: 10000, as DeepSeek's models have it", r->arch);
    c->rope_factor = 1.0f;
    c->rope_attn_factor = 1.0f;
    c->rope_beta_fast = read_float(r, "rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0);
    c->rope_beta_slow = read_float(r, "rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0);
    c->attn_scale = 1.0f / sqrtf((float)ds_qk_dim(c));
    factor = read_scaling(r, c);
    if (r->status != DS_OK || factor == 0.0) return;
    c->rope_factor = (float)factor;
    log_mul = read_float(r, "rope.scaling.yarn_log_multiplier", 0.0, 1e3, 0.0);
    if (!present(r, "rope.scaling.yarn_log_multiplier"))
        ds_note(
            r->notes,
            "`%s.rope.scaling.yarn_log_multiplier` is missing: 0, plain YaRN; DeepSeek's models have 0.0707 or 0.1 and "
            "answer worse without",
            r->arch);
    m = 1.0 + log_mul * log((double)c->rope_factor);
    c->rope_attn_factor = read_float(r, "rope.scaling.attn_factor", 1e-6, 1e6,
                                     log_mul != 0.0 ? 1.0 : 1.0 + 0.1 * log((double)c->rope_factor));
    c->attn_scale *= (float)(m * m);
}

/* Widths that are products of two keys must be ints as the keys are: the code that multiplies them trusts that. */
static void check_products(reader *r, const ds_config *c) {
    const struct {
        const char *what;
        int64_t a, b;
    } PRODUCTS[] = {
        {"heads times their query width", c->n_head, ds_qk_dim(c)},
        {"heads times their value width", c->n_head, c->v_dim},
        {"heads times the cached width", c->n_head, ds_kv_width(c)},
        {"heads times the width of a key and a value", c->n_head, c->nope_dim + c->v_dim},
        {"shared experts times their width", c->n_expert_shared, c->n_ff_expert},
        {"chosen experts times their width", c->n_expert_used, c->n_ff_expert},
    };
    for (size_t i = 0; i < sizeof PRODUCTS / sizeof *PRODUCTS && r->status == DS_OK; i++) {
        if (PRODUCTS[i].a * PRODUCTS[i].b > DS_MAX_WIDTH) {
            r->status = ds_fail(r->err, DS_EFORMAT, "%s: %s are %lld x %lld, expected at most %d together",
                                ds_gguf_label(r->gguf), PRODUCTS[i].what, (long long)PRODUCTS[i].a,
                                (long long)PRODUCTS[i].b, DS_MAX_WIDTH);
        }
    }
}

ds_status ds_config_read(const ds_gguf *gguf, ds_source source, ds_config *out, ds_error *err) {
    ds_config c = {0};
    reader r = {gguf, source, c.arch, &c.notes, DS_OK, err};
    read_string(gguf, "general.architecture", c.arch, sizeof c.arch);
    read_string(gguf, "general.name", c.name, sizeof c.name);
    if (strcmp(c.arch, "deepseek2") != 0) {
        ds_fail(err, DS_EUNSUPPORTED, "%s: architecture is `%s`, not `deepseek2`", ds_gguf_label(gguf),
                c.arch[0] ? c.arch : "(missing)");
        return ds_hint(
            err, "dsv2 runs the DeepSeek-V2 family: V2, V2-Lite, V2.5, Coder-V2, V3 and models of their architecture");
    }
    read_layers(&r, &c);
    c.n_ctx_train = read_int(&r, "context_length", 1, 1 << 30, -1);
    c.n_embd = read_int(&r, "embedding_length", 1, DS_MAX_WIDTH, -1);
    c.n_vocab = read_vocab(&r);
    c.rms_eps = read_float(&r, "attention.layer_norm_rms_epsilon", 0.0, 1.0, 1e-6);
    if (!present(&r, "attention.layer_norm_rms_epsilon"))
        ds_note(&c.notes, "`%s.attention.layer_norm_rms_epsilon` is missing: 1e-6, as DeepSeek's models have it",
                c.arch);
    read_heads(&r, &c);
    read_experts(&r, &c);
    read_rope(&r, &c);
    check_products(&r, &c);
    if (r.status == DS_OK) r.status = ds_keys_check(gguf, c.arch, &c.notes, err);
    if (r.status == DS_OK) *out = c;
    return r.status;
}
