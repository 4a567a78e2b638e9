#include "arch/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "arch/attention.h"
#include "arch/keys.h"
#include "arch/reader.h"

/* Mistral Small 4's file differs by its name, and by a key that llama.cpp's converter leaves out. */
static const struct arch {
    const char *name;
    ds_attention_id attention;
    double temp_scale; /* where the file does not say */
    const char *temp_source;
} ARCHS[] = {
    {.name = "deepseek2", .attention = DS_ATTENTION_LATENT},
    {.name = "deepseek", .attention = DS_ATTENTION_PLAIN},
    {.name = "mistral4", .attention = DS_ATTENTION_LATENT, .temp_scale = 0.1, .temp_source = "Mistral Small 4"},
};

enum { N_ARCHS = sizeof ARCHS / sizeof *ARCHS };

const char *ds_config_arch(int i) { return i >= 0 && i < N_ARCHS ? ARCHS[i].name : NULL; }

static const struct arch *find_arch(const char *name) {
    for (int i = 0; i < N_ARCHS; i++)
        if (strcmp(ARCHS[i].name, name) == 0) return &ARCHS[i];
    return NULL;
}

static ds_status refuse_arch(const ds_gguf *gguf, const char *name, ds_error *err) {
    char names[N_ARCHS * (DS_MAX_NAME + 4)] = "";
    size_t used = 0;
    for (int i = 0; i < N_ARCHS; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s`%s`", i ? ", " : "", ARCHS[i].name);
    ds_fail(err, DS_EUNSUPPORTED, "%s: architecture is `%s`, expected one of %s", ds_gguf_label(gguf),
            name[0] ? name : "(missing)", names);
    return ds_hint(err, "dsv2 runs the DeepSeek-V2 family: V2, V2-Lite, V2.5, Coder-V2, V3 and models of their "
                        "architecture, DeepSeekMoE, Mistral Small 4");
}

static int read_vocab(ds_reader *r) {
    const ds_gguf_kv *tokens = ds_gguf_kv_find(r->gguf, "tokenizer.ggml.tokens");
    int64_t fallback =
        tokens && tokens->type == DS_GGUF_ARRAY && tokens->n_items < DS_MAX_VOCAB ? (int64_t)tokens->n_items : -1;
    return ds_read_int(r, "vocab_size", 1, DS_MAX_VOCAB, fallback);
}

/* block_count counts the blocks of a draft head (multi-token prediction) too, which the model itself does not run. */
static void read_layers(ds_reader *r, ds_config *c) {
    int n_block = ds_read_int(r, "block_count", 1, 1024, -1),
        n_draft = ds_read_int(r, "nextn_predict_layers", 0, 1024, 0);
    if (r->status == DS_OK && !ds_read_present(r, "nextn_predict_layers")) {
        while (n_draft < n_block && ds_read_has_tensor(r, "blk.%d.nextn.eh_proj.weight", n_block - n_draft - 1))
            n_draft++;
        if (n_draft)
            ds_note(r->notes, "`%s.nextn_predict_layers` is missing: %d, by the blocks that have nextn tensors",
                    r->arch, n_draft);
    }
    c->n_layer = n_block - n_draft;
    if (r->status != DS_OK || !n_draft) return;
    if (c->n_layer < 1 || (!ds_read_has_tensor(r, "blk.0.attn_norm.weight") &&
                           ds_read_has_tensor(r, "blk.%d.attn_norm.weight", c->n_layer))) {
        r->status = ds_fail(r->err, DS_EUNSUPPORTED,
                            "%s: a draft head alone (multi-token prediction): %d of its model's %d blocks",
                            ds_gguf_label(r->gguf), n_draft, n_block);
        ds_hint(
            r->err,
            "it drafts for a model and is none by itself: take the model's own file, which needs no draft head here");
    }
}

/* V3's router (noaux_tc) is the one with a bias. Its converters wrote no key before they wrote one, GLM-4.7-Flash's never. */
static void read_gating(ds_reader *r, ds_config *c) {
    const int gating = ds_read_int(r, "expert_gating_func", 0, 2, 0);
    for (int il = c->n_layer_dense; il < c->n_layer && !c->router_bias; il++)
        c->router_bias = ds_read_has_tensor(r, "blk.%d.exp_probs_b.bias", il);
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
static void assume_groups(ds_reader *r, ds_config *c) {
    static const struct {
        ds_attention_id attention;
        ds_gating gating;
        int n_expert, n_used, n_layer, n_embd; /* 0: any */
        int n_group, n_group_used;
        const char *model;
    } KNOWN[] = {
        {DS_ATTENTION_LATENT, DS_GATING_SOFTMAX, 160, 6, 0, 0, 8, 3, "DeepSeek-V2"},
        {DS_ATTENTION_LATENT, DS_GATING_SIGMOID, 256, 8, 61, 7168, 8, 4, "DeepSeek-V3"},
    };
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
        if (c->attention != KNOWN[i].attention || c->gating != KNOWN[i].gating || c->n_expert != KNOWN[i].n_expert ||
            c->n_expert_used != KNOWN[i].n_used)
            continue;
        if (KNOWN[i].n_layer && (c->n_layer != KNOWN[i].n_layer || c->n_embd != KNOWN[i].n_embd)) continue;
        c->n_group = KNOWN[i].n_group;
        c->n_group_used = KNOWN[i].n_group_used;
        ds_note(r->notes, "`%s.expert_group_count` is missing: %d of %d groups, because the shape is %s's", r->arch,
                c->n_group_used, c->n_group, KNOWN[i].model);
    }
}

static void read_groups(ds_reader *r, ds_config *c) {
    c->n_group = ds_read_int(r, "expert_group_count", 0, c->n_expert, 0);
    if (!c->n_group) {
        c->n_group = c->n_group_used = 1;
        if (r->status == DS_OK) assume_groups(r, c);
        return;
    }
    c->n_group_used = ds_read_int(r, "expert_group_used_count", 0, c->n_group, 0);
    if (c->n_group > 1 && !c->n_group_used)
        ds_read_missing(r, "expert_group_used_count",
                        "without it no expert can be chosen as the model does: convert it again");
    if (!c->n_group_used) c->n_group_used = 1;
    if (r->status == DS_OK && c->n_group > 1 && strcmp(c->arch, "mistral4") == 0) {
        r->status = ds_fail(r->err, DS_EUNSUPPORTED, "%s: `%s.expert_group_count` is %d: no such model has groups",
                            ds_gguf_label(r->gguf), r->arch, c->n_group);
        ds_hint(r->err, "which groups such a router would take is not settled: run the file with llama.cpp");
        return;
    }
    if (r->status == DS_OK &&
        (c->n_expert % c->n_group || c->n_expert_used > c->n_group_used * (c->n_expert / c->n_group))) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: %d of %d experts cannot come from %d of %d groups",
                            ds_gguf_label(r->gguf), c->n_expert_used, c->n_expert, c->n_group_used, c->n_group);
    }
}

/* The chosen experts' weights. All published models with sigmoid scores normalise them and scale them by a number of
 * their own; with softmax, V2-Lite's kind neither normalises nor scales. */
static void read_expert_weights(ds_reader *r, ds_config *c) {
    const bool sigmoid = c->gating == DS_GATING_SIGMOID;
    c->expert_norm = ds_read_bool(r, "expert_weights_norm", sigmoid);
    if (sigmoid && !ds_read_present(r, "expert_weights_norm"))
        ds_note(r->notes, "`%s.expert_weights_norm` is missing: true, as in all models with sigmoid scores", r->arch);
    c->expert_scale = ds_read_float(r, "expert_weights_scale", 0.0, 1e6, 0.0);
    if (c->expert_scale != 0.0f || r->status != DS_OK) return; /* 0 is written by tools that mean "not set" */
    if (sigmoid || c->n_group > 1) {
        ds_read_missing(
            r, "expert_weights_scale",
            "models with such a router have one (routed_scaling_factor in config.json): convert the model again, "
            "or take another file of it");
    }
    c->expert_scale = 1.0f;
    ds_note(r->notes, "`%s.expert_weights_scale` is missing: 1, as V2-Lite's", r->arch);
}

/* One width for all shared experts together: their number times an expert's. */
static void read_shared(ds_reader *r, ds_config *c) {
    const ds_tensor *gate = NULL;
    for (int il = c->n_layer_dense; il < c->n_layer && !gate; il++) {
        char name[DS_MAX_NAME];
        snprintf(name, sizeof name, "blk.%d.ffn_gate_shexp.weight", il);
        gate = r->source.find(r->source.ctx, name);
    }
    c->n_expert_shared = ds_read_int(r, "expert_shared_count", 0, 1024, 0);
    if (r->status == DS_OK && gate && !ds_read_present(r, "expert_shared_count")) {
        int64_t n = gate->ne[1] / c->n_ff_expert;
        c->n_expert_shared = n < 1024 ? (int)n : 1024;
        ds_note(r->notes, "`%s.expert_shared_count` is missing: %d, by the shape of ffn_gate_shexp", r->arch,
                c->n_expert_shared);
    }
    int width = ds_read_int(r, "expert_shared_feed_forward_length", 0, DS_MAX_WIDTH, 0);
    if (r->status == DS_OK && width && width != c->n_expert_shared * (int64_t)c->n_ff_expert) {
        r->status =
            ds_fail(r->err, DS_EUNSUPPORTED, "%s: `%s.expert_shared_feed_forward_length` is %d, expected %d x %d",
                    ds_gguf_label(r->gguf), r->arch, width, c->n_expert_shared, c->n_ff_expert);
    }
}

static void read_experts(ds_reader *r, ds_config *c) {
    c->n_layer_dense = ds_read_int(r, "leading_dense_block_count", 0, c->n_layer, 0);
    c->n_ff_dense =
        ds_read_int(r, "feed_forward_length", c->n_layer_dense ? 1 : 0, DS_MAX_WIDTH, c->n_layer_dense ? -1 : 0);
    c->n_group = c->n_group_used = 1;
    c->expert_scale = 1.0f;
    c->gating = DS_GATING_SOFTMAX;
    if (r->status != DS_OK || c->n_layer_dense == c->n_layer) return;
    c->n_expert = ds_read_int(r, "expert_count", 1, 65536, -1);
    c->n_expert_used = ds_read_int(r, "expert_used_count", 1, c->n_expert, -1);
    c->n_ff_expert = ds_read_int(r, "expert_feed_forward_length", 1, DS_MAX_WIDTH, -1);
    if (r->status != DS_OK) return;
    read_shared(r, c);
    read_gating(r, c);
    read_groups(r, c);
    read_expert_weights(r, c);
}

/* By how much positions are scaled; 0 where they are not. Files of before the keys were settled lack one or
 * another of them. Every published model of the family with a scaling has YaRN, from context_length / factor tokens. */
static double read_scaling(ds_reader *r, ds_config *c) {
    char type[DS_MAX_NAME], key[160];
    double factor = ds_read_float(r, "rope.scaling.factor", 1.0, 1e6, 1.0);
    const bool has_factor = ds_read_present(r, "rope.scaling.factor"),
               has_orig = ds_read_present(r, "rope.scaling.original_context_length");
    ds_read_key(r, "rope.scaling.type", key, sizeof key);
    ds_read_string(r->gguf, key, type, sizeof type);
    c->rope_orig_ctx = ds_read_int(r, "rope.scaling.original_context_length", 1, 1 << 30, c->n_ctx_train);
    if (r->status != DS_OK || strcmp(type, "none") == 0) return 0.0;
    if (!ds_read_present(r, "rope.scaling.type")) {
        if (factor == 1.0 && !ds_read_present(r, "rope.scaling.yarn_log_multiplier")) return 0.0;
        ds_note(r->notes, "`%s` is missing beside other keys of a scaling: yarn, as in all models of the family", key);
    } else if (strcmp(type, "yarn") != 0) {
        r->status = ds_fail(r->err, DS_EUNSUPPORTED, "%s: `%s` is `%s`", ds_gguf_label(r->gguf), key, type);
        ds_hint(r->err, "the engine runs models with YaRN or unscaled rotary positions");
        return 0.0;
    }
    if (!has_factor) {
        factor = (double)c->n_ctx_train / c->rope_orig_ctx;
        if (!has_orig || factor <= 1.0 || factor != floor(factor)) {
            ds_read_missing(r, "rope.scaling.factor",
                            "it stands in config.json under rope_scaling: convert the model again");
            return 0.0;
        }
        ds_note(r->notes, "`%s.rope.scaling.factor` is missing: %g, the trained context of %d over the original %d",
                r->arch, factor, c->n_ctx_train, c->rope_orig_ctx);
    }
    if (!has_orig && factor > 1.0) {
        const double orig = c->n_ctx_train / factor;
        if (orig != floor(orig)) {
            ds_read_missing(r, "rope.scaling.original_context_length",
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

/* Converters wrote no betas before the end of 2025: DeepSeek's 32 and 1 need no word, Kimi's are others. All its models
 * have 384 experts. */
static void assume_betas(ds_reader *r, ds_config *c) {
    if (c->n_expert != 384 || ds_read_present(r, "rope.scaling.yarn_beta_fast")) return;
    if (c->rope_factor == 32.0f) {
        c->rope_beta_fast = 1.0f;
        ds_note(r->notes, "`%s.rope.scaling.yarn_beta_fast` is missing: 1, because the shape is Kimi-K2's", r->arch);
    } else if (c->rope_factor == 64.0f) {
        ds_note(r->notes,
                "`%s.rope.scaling.yarn_beta_fast` is missing: 32, as Kimi-K2-Thinking has it; Kimi-K2-0905 has 1, and "
                "answers worse with this file",
                r->arch);
    }
}

/* YaRN: cos and sin carry mscale / mscale_all_dim, the softmax scale carries m * m (DeepSeek-V2, section 3.1.4). */
static void read_rope(ds_reader *r, ds_config *c) {
    const double most = ds_attention(c)->yarn_log_most;
    double factor, log_mul, m;
    c->rope_base = ds_read_float(r, "rope.freq_base", 1.0, 1e12, 10000.0);
    if (!ds_read_present(r, "rope.freq_base"))
        ds_note(r->notes, "`%s.rope.freq_base` is missing: 10000, as DeepSeek's models have it", r->arch);
    c->rope_factor = 1.0f;
    c->rope_attn_factor = 1.0f;
    c->rope_beta_fast = ds_read_float(r, "rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0);
    c->rope_beta_slow = ds_read_float(r, "rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0);
    c->attn_scale = 1.0f / sqrtf((float)ds_qk_dim(c));
    factor = read_scaling(r, c);
    if (r->status != DS_OK || factor == 0.0) return;
    c->rope_factor = (float)factor;
    assume_betas(r, c);
    log_mul = ds_read_float(r, "rope.scaling.yarn_log_multiplier", 0.0, most, 0.0);
    if (most > 0.0 && !ds_read_present(r, "rope.scaling.yarn_log_multiplier"))
        ds_note(
            r->notes,
            "`%s.rope.scaling.yarn_log_multiplier` is missing: 0, plain YaRN; DeepSeek's models have 0.0707 or 0.1 and "
            "answer worse without",
            r->arch);
    m = 1.0 + log_mul * log((double)c->rope_factor);
    c->rope_attn_factor = ds_read_float(r, "rope.scaling.attn_factor", 1e-6, 1e6,
                                        log_mul != 0.0 ? 1.0 : 1.0 + 0.1 * log((double)c->rope_factor));
    c->attn_scale *= (float)(m * m);
}

/* Llama 4's rule for long contexts, as Mistral took it: queries grow with their position. */
static void read_temperature(ds_reader *r, ds_config *c, const struct arch *arch) {
    c->attn_temp_scale = ds_read_float(r, "attention.temperature_scale", 0.0, 1e3, arch->temp_scale);
    c->attn_temp_length = ds_read_int(r, "attention.temperature_length", 0, 1 << 30, 0);
    if (r->status != DS_OK || c->attn_temp_scale == 0.0f) return;
    if (!ds_read_present(r, "attention.temperature_scale"))
        ds_note(r->notes, "`%s.attention.temperature_scale` is missing: %g, as %s has it", r->arch, arch->temp_scale,
                arch->temp_source);
    if (c->attn_temp_length) return;
    if (c->rope_factor == 1.0f && !ds_read_present(r, "rope.scaling.original_context_length")) {
        ds_read_missing(r, "attention.temperature_length",
                        "it is original_max_position_embeddings in config.json: convert the model again");
        return;
    }
    c->attn_temp_length = c->rope_orig_ctx;
    if (ds_read_present(r, "attention.temperature_scale"))
        ds_note(r->notes, "`%s.attention.temperature_length` is missing: %d, the original context", r->arch,
                c->attn_temp_length);
}

ds_status ds_config_read(const ds_gguf *gguf, ds_source source, ds_config *out, ds_error *err) {
    ds_config c = {0};
    ds_reader r = {gguf, source, c.arch, &c.notes, DS_OK, err};
    ds_read_string(gguf, "general.architecture", c.arch, sizeof c.arch);
    ds_read_string(gguf, "general.name", c.name, sizeof c.name);
    const struct arch *arch = find_arch(c.arch);
    if (!arch) return refuse_arch(gguf, c.arch, err);
    c.attention = arch->attention;
    read_layers(&r, &c);
    c.n_ctx_train = ds_read_int(&r, "context_length", 1, 1 << 30, -1);
    c.n_embd = ds_read_int(&r, "embedding_length", 1, DS_MAX_WIDTH, -1);
    c.n_vocab = read_vocab(&r);
    c.rms_eps = ds_read_float(&r, "attention.layer_norm_rms_epsilon", 0.0, 1.0, 1e-6);
    if (!ds_read_present(&r, "attention.layer_norm_rms_epsilon"))
        ds_note(&c.notes, "`%s.attention.layer_norm_rms_epsilon` is missing: 1e-6, as DeepSeek's models have it",
                c.arch);
    ds_attention(&c)->read(&r, &c);
    read_experts(&r, &c);
    read_rope(&r, &c);
    read_temperature(&r, &c, arch);
    ds_read_product(&r, "shared experts times their width", c.n_expert_shared, c.n_ff_expert);
    ds_read_product(&r, "chosen experts times their width", c.n_expert_used, c.n_ff_expert);
    if (r.status == DS_OK) r.status = ds_keys_check(gguf, c.arch, &c.notes, err);
    if (r.status == DS_OK) *out = c;
    return r.status;
}
