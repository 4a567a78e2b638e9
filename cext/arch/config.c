#include "arch/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Reads of "<arch>.<key>"; the first failure sticks in `status` so that a run of reads needs one check at its end. */
typedef struct reader {
    const ds_gguf *gguf;
    const char *arch;
    ds_status status;
    ds_error *err;
} reader;

enum { DS_MAX_DIM = 1 << 24 };

static void key_of(const reader *r, const char *key, char *out, size_t size) {
    snprintf(out, size, "%s.%s", r->arch, key);
}

static bool present(const reader *r, const char *key) {
    char full[160];
    key_of(r, key, full, sizeof full);
    return ds_gguf_kv_find(r->gguf, full) != NULL;
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
        tokens && tokens->type == DS_GGUF_ARRAY && tokens->n_items < DS_MAX_DIM ? (int64_t)tokens->n_items : -1;
    return read_int(r, "vocab_size", 1, DS_MAX_DIM, fallback);
}

/* Head widths: files in the latent form state them as *_mla, older ones as the plain lengths. */
static void read_heads(reader *r, ds_config *c) {
    bool latent = present(r, "attention.key_length_mla");
    int qk;
    c->n_head = read_int(r, "attention.head_count", 1, 65536, -1);
    c->q_lora_rank = read_int(r, "attention.q_lora_rank", 0, DS_MAX_DIM, 0);
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

static void read_experts(reader *r, ds_config *c) {
    c->n_layer_dense = read_int(r, "leading_dense_block_count", 0, c->n_layer, 0);
    c->n_ff_dense = read_int(r, "feed_forward_length", c->n_layer_dense ? 1 : 0, DS_MAX_DIM, c->n_layer_dense ? -1 : 0);
    c->n_group = c->n_group_used = 1;
    c->expert_scale = 1.0f;
    c->gating = DS_GATING_SOFTMAX;
    if (r->status != DS_OK || c->n_layer_dense == c->n_layer) return;
    c->n_expert = read_int(r, "expert_count", 1, 65536, -1);
    c->n_expert_used = read_int(r, "expert_used_count", 1, c->n_expert, -1);
    c->n_expert_shared = read_int(r, "expert_shared_count", 0, 1024, 0);
    c->n_ff_expert = read_int(r, "expert_feed_forward_length", 1, DS_MAX_DIM, -1);
    c->n_group = read_int(r, "expert_group_count", 0, c->n_expert, 1);
    if (c->n_group < 1) c->n_group = 1;
    c->n_group_used = read_int(r, "expert_group_used_count", 0, c->n_group, c->n_group);
    if (c->n_group_used < 1) c->n_group_used = c->n_group;
    c->expert_scale = read_float(r, "expert_weights_scale", 0.0, 1e6, 1.0);
    if (c->expert_scale == 0.0f) c->expert_scale = 1.0f; /* written as 0 by tools that mean "not set" */
    c->expert_norm = read_bool(r, "expert_weights_norm", false);
    c->gating = (ds_gating)read_int(r, "expert_gating_func", 0, 2, DS_GATING_SOFTMAX);
    if (c->gating == 0) c->gating = DS_GATING_SOFTMAX;
    if (r->status != DS_OK) return;
    if (c->n_expert % c->n_group || c->n_expert_used > c->n_group_used * (c->n_expert / c->n_group)) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: %d of %d experts cannot come from %d of %d groups",
                            ds_gguf_label(r->gguf), c->n_expert_used, c->n_expert, c->n_group_used, c->n_group);
    }
}

/* YaRN: cos and sin carry mscale / mscale_all_dim, the softmax scale carries m * m (DeepSeek-V2, section 3.1.4). */
static void read_rope(reader *r, ds_config *c) {
    char type[DS_MAX_NAME], key[160];
    double log_mul, m;
    c->rope_base = read_float(r, "rope.freq_base", 1.0, 1e12, 10000.0);
    c->rope_factor = 1.0f;
    c->rope_attn_factor = 1.0f;
    c->rope_beta_fast = read_float(r, "rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0);
    c->rope_beta_slow = read_float(r, "rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0);
    c->rope_orig_ctx = read_int(r, "rope.scaling.original_context_length", 1, 1 << 30, c->n_ctx_train);
    c->attn_scale = 1.0f / sqrtf((float)ds_qk_dim(c));
    key_of(r, "rope.scaling.type", key, sizeof key);
    read_string(r->gguf, key, type, sizeof type);
    if (r->status != DS_OK || type[0] == '\0' || strcmp(type, "none") == 0) return;
    if (strcmp(type, "yarn") != 0) {
        r->status = ds_fail(r->err, DS_EUNSUPPORTED, "%s: `%s` is `%s`", ds_gguf_label(r->gguf), key, type);
        ds_hint(r->err, "the engine runs models with YaRN or unscaled rotary positions");
        return;
    }
    c->rope_factor = read_float(r, "rope.scaling.factor", 1.0, 1e6, 1.0);
    log_mul = read_float(r, "rope.scaling.yarn_log_multiplier", 0.0, 1e3, 0.0);
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
    };
    for (size_t i = 0; i < sizeof PRODUCTS / sizeof *PRODUCTS && r->status == DS_OK; i++) {
        if (PRODUCTS[i].a * PRODUCTS[i].b > DS_MAX_DIM) {
            r->status = ds_fail(r->err, DS_EFORMAT, "%s: %s are %lld x %lld, expected at most %d together",
                                ds_gguf_label(r->gguf), PRODUCTS[i].what, (long long)PRODUCTS[i].a,
                                (long long)PRODUCTS[i].b, DS_MAX_DIM);
        }
    }
}

ds_status ds_config_read(const ds_gguf *gguf, ds_config *out, ds_error *err) {
    ds_config c = {0};
    reader r = {gguf, c.arch, DS_OK, err};
    read_string(gguf, "general.architecture", c.arch, sizeof c.arch);
    read_string(gguf, "general.name", c.name, sizeof c.name);
    if (strcmp(c.arch, "deepseek2") != 0) {
        ds_fail(err, DS_EUNSUPPORTED, "%s: architecture is `%s`, not `deepseek2`", ds_gguf_label(gguf),
                c.arch[0] ? c.arch : "(missing)");
        return ds_hint(
            err, "dsv2 runs the DeepSeek-V2 family: V2, V2-Lite, V2.5, Coder-V2, V3 and models of their architecture");
    }
    c.n_layer = read_int(&r, "block_count", 1, 1024, -1);
    c.n_ctx_train = read_int(&r, "context_length", 1, 1 << 30, -1);
    c.n_embd = read_int(&r, "embedding_length", 1, DS_MAX_DIM, -1);
    c.n_vocab = read_vocab(&r);
    c.rms_eps = read_float(&r, "attention.layer_norm_rms_epsilon", 0.0, 1.0, 1e-6);
    read_heads(&r, &c);
    read_experts(&r, &c);
    read_rope(&r, &c);
    check_products(&r, &c);
    if (r.status == DS_OK) *out = c;
    return r.status;
}
