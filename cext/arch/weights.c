#include "arch/weights.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguf/types.h"

/* A list of blocks that the weights own; released together. */
typedef struct ds_owned {
    struct ds_owned *next;
    _Alignas(64) unsigned char data[];
} ds_owned;

typedef struct binder {
    const ds_config *config;
    ds_source source;
    ds_weights *out;
    ds_status status; /* the first failure sticks */
    ds_error *err;
} binder;

static void *own(binder *b, size_t size) {
    ds_owned *block;
    if (size > SIZE_MAX / 2 || !(block = aligned_alloc(64, (sizeof *block + size + 63) / 64 * 64))) {
        b->status = ds_fail(b->err, DS_ENOMEM, "%s: no memory for %zu bytes of weights", b->source.label, size);
        return NULL;
    }
    block->next = b->out->owned;
    b->out->owned = block;
    b->out->owned_bytes += size;
    return block->data;
}

/* What can be done about a type that ggml itself does not have. */
static const char *unknown_type_hint(uint32_t type) {
    if (type >= 31 && type <= 33)
        return "an old repacking of Q4_0 for one processor: take the model's file of another type, Q4_0";
    if (type >= 36 && type <= 38)
        return "an old repacking of IQ4_NL for one processor: take the model's file of another type, IQ4_NL";
    if (type >= 97 && type <= 399)
        return "such types are ik_llama.cpp's and run there alone: take the model's file of another type, Q4_K_M say";
    return "take the model's file of another type, Q4_K_M say";
}

static ds_status fail_type(binder *b, const ds_tensor *t, const char *name) {
    ds_gguf_tensor_type type;
    if (!ds_gguf_tensor_type_get(t->gguf_type, &type)) {
        b->status = ds_fail(b->err, DS_EUNSUPPORTED, "%s: tensor `%s` is of unknown type %u", b->source.label, name,
                            t->gguf_type);
        return ds_hint(b->err, unknown_type_hint(t->gguf_type));
    }
    b->status = ds_fail(b->err, DS_EUNSUPPORTED, "%s: tensor `%s` is of type %s (%u), which this build cannot run",
                        b->source.label, name, type.name, t->gguf_type);
    return ds_hint(b->err, "take the model's file of another type (from IQ2_XXS and Q2_K up all run), or run this one "
                           "with llama.cpp");
}

static const ds_tensor *find(binder *b, bool required, const char *name) {
    const ds_tensor *t = b->status == DS_OK ? b->source.find(b->source.ctx, name) : NULL;
    if (!t && required && b->status == DS_OK) {
        b->status = ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` is missing", b->source.label, name);
        ds_hint(b->err, "the file holds a part of a model, or its keys are another model's: take another file of it");
    }
    if (t && t->format == DS_FORMAT_COUNT) return fail_type(b, t, name), NULL;
    return t;
}

/* The tensor's bytes as n matrices (rows, k). */
static ds_mat matrix_of(binder *b, const ds_tensor *t, int64_t k, int64_t rows, int64_t n) {
    const ds_format_info *format = ds_format_get(t->format);
    ds_mat m = {.format = t->format, .k = (int)k, .rows = (int)rows, .n = (int)n};
    if (format->block_elements == 1 && (uintptr_t)t->data % format->block_bytes) {
        b->status =
            ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` is not aligned to its values", b->source.label, t->name);
        return (ds_mat){0};
    }
    m.row_bytes = ds_row_bytes(t->format, k);
    m.data = t->data;
    m.stride = m.row_bytes * (size_t)rows;
    return m;
}

static bool has_shape(const ds_tensor *t, int64_t k, int64_t rows, int64_t n) {
    return t->ne[0] == k && t->ne[1] == rows && t->ne[2] == n && t->ne[3] == 1;
}

/* The tensor named by the format, checked to be ne[0] = k, ne[1] = rows, ne[2] = n; data NULL where absent or refused. */
static ds_mat matrix(binder *b, bool required, int64_t k, int64_t rows, int64_t n, const char *format, ...) {
    char name[DS_MAX_NAME];
    const ds_tensor *t;
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    if (!(t = find(b, required, name))) return (ds_mat){0};
    if (has_shape(t, k, rows, n)) return matrix_of(b, t, k, rows, n);
    b->status = ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` is %lld x %lld x %lld, expected %lld x %lld x %lld",
                        b->source.label, name, (long long)t->ne[0], (long long)t->ne[1], (long long)t->ne[2],
                        (long long)k, (long long)rows, (long long)n);
    return (ds_mat){0};
}

/* The same of all heads, where ik_llama.cpp's files have the heads' rows one after the other in two dimensions. */
static ds_mat matrix_of_heads(binder *b, int64_t k, int64_t rows, const char *part, int il) {
    const int64_t n = b->config->n_head;
    char name[DS_MAX_NAME];
    snprintf(name, sizeof name, "blk.%d.%s.weight", il, part);
    const ds_tensor *t = find(b, false, name);
    if (t && has_shape(t, k, rows * n, 1)) return matrix_of(b, t, k, rows, n);
    return matrix(b, true, k, rows, n, "%s", name);
}

/* Norms and biases reach every value after them: one that is no number leaves no logit that is one. */
static void check_finite(binder *b, const char *name, const float *x, int64_t n) {
    int64_t n_bad = 0, first = 0;
    for (int64_t i = n - 1; i >= 0; i--) {
        if (!isfinite(x[i])) n_bad++, first = i;
    }
    if (!n_bad) return;
    b->status =
        ds_fail(b->err, DS_EFORMAT, "%s: %lld of tensor `%s`'s %lld values are no finite numbers, value %lld the first",
                b->source.label, (long long)n_bad, name, (long long)n, (long long)first);
    ds_hint(b->err,
            "the file is damaged, or was made of a damaged model: compare its sha256 with its source's, download "
            "or quantize it again");
}

/* A vector decoded to float; NULL where absent or refused. */
static const float *vector(binder *b, bool required, int64_t n, const char *format, ...) {
    char name[DS_MAX_NAME];
    const ds_tensor *t;
    float *data;
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    if (!(t = find(b, required, name))) return NULL;
    if (t->ne[0] != n || t->ne[1] != 1 || t->ne[2] != 1 || t->ne[3] != 1) {
        b->status = ds_fail(b->err, DS_EFORMAT, "%s: tensor `%s` has %lld x %lld values, expected %lld",
                            b->source.label, name, (long long)t->ne[0], (long long)t->ne[1], (long long)n);
        return NULL;
    }
    if (!(data = own(b, (size_t)n * sizeof *data))) return NULL;
    ds_dequantize_row(t->format, n, t->data, data);
    check_finite(b, name, data, n);
    return data;
}

/* W_uk of a legacy attn_kv_b, transposed to the split form's (kv_lora_rank, nope_dim) per head. The copy is half
 * precision unless the file holds floats: it is 1/60 of the model, and the source is no finer. */
static ds_mat transpose_k_b(binder *b, const ds_mat *kv_b, int head_rows) {
    const ds_config *c = b->config;
    int r = c->kv_lora_rank, d = c->nope_dim;
    bool exact = kv_b->format == DS_FORMAT_F32 || kv_b->format == DS_FORMAT_BF16;
    ds_mat m = {.format = exact ? DS_FORMAT_F32 : DS_FORMAT_F16, .rows = r, .k = d, .n = c->n_head};
    float *row = malloc((size_t)r * sizeof *row);
    unsigned char *data = NULL;
    m.row_bytes = ds_row_bytes(m.format, d);
    m.stride = m.row_bytes * (size_t)r;
    if (row) data = own(b, m.stride * (size_t)m.n);
    if (!row && b->status == DS_OK)
        b->status = ds_fail(b->err, DS_ENOMEM, "%s: no memory to transpose attn_kv_b", b->source.label);
    for (int64_t i = 0; data && i < (int64_t)c->n_head * d; i++) {
        int64_t head = i / d, j = i % d;
        unsigned char *out = data + (size_t)head * m.stride;
        ds_dequantize_row(kv_b->format, r, kv_b->data + (size_t)(head * head_rows + j) * kv_b->row_bytes, row);
        for (int64_t l = 0; l < r; l++) {
            if (exact) ((float *)out)[l * d + j] = row[l];
            else ((uint16_t *)out)[l * d + j] = ds_f32_to_f16(row[l]);
        }
    }
    free(row);
    m.data = data;
    return m;
}

static void bind_kv_b(binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    int head_rows = c->nope_dim + c->v_dim;
    char name[DS_MAX_NAME];
    snprintf(name, sizeof name, "blk.%d.attn_k_b.weight", il);
    if (b->status == DS_OK && b->source.find(b->source.ctx, name)) {
        l->k_b = matrix_of_heads(b, c->nope_dim, c->kv_lora_rank, "attn_k_b", il);
        l->v_b = matrix_of_heads(b, c->kv_lora_rank, c->v_dim, "attn_v_b", il);
        return;
    }
    ds_mat kv_b = matrix(b, true, c->kv_lora_rank, (int64_t)c->n_head * head_rows, 1, "blk.%d.attn_kv_b.weight", il);
    if (!kv_b.data) return;
    l->k_b = transpose_k_b(b, &kv_b, head_rows);
    l->v_b = kv_b;
    l->v_b.data += (size_t)c->nope_dim * kv_b.row_bytes;
    l->v_b.rows = c->v_dim;
    l->v_b.n = c->n_head;
    l->v_b.stride = (size_t)head_rows * kv_b.row_bytes;
}

static void bind_attention(binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    int64_t q_rows = (int64_t)c->n_head * ds_qk_dim(c);
    l->attn_norm = vector(b, true, c->n_embd, "blk.%d.attn_norm.weight", il);
    if (c->q_lora_rank) {
        l->q_a = matrix(b, true, c->n_embd, c->q_lora_rank, 1, "blk.%d.attn_q_a.weight", il);
        l->q_a_norm = vector(b, true, c->q_lora_rank, "blk.%d.attn_q_a_norm.weight", il);
        l->q = matrix(b, true, c->q_lora_rank, q_rows, 1, "blk.%d.attn_q_b.weight", il);
    } else {
        l->q = matrix(b, true, c->n_embd, q_rows, 1, "blk.%d.attn_q.weight", il);
    }
    l->kv_a = matrix(b, true, c->n_embd, ds_kv_width(c), 1, "blk.%d.attn_kv_a_mqa.weight", il);
    l->kv_a_norm = vector(b, true, c->kv_lora_rank, "blk.%d.attn_kv_a_norm.weight", il);
    bind_kv_b(b, l, il);
    l->o = matrix(b, true, (int64_t)c->n_head * c->v_dim, c->n_embd, 1, "blk.%d.attn_output.weight", il);
}

static void bind_feed_forward(binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    int64_t d = c->n_embd, f = c->n_ff_expert, e = c->n_expert, shared = (int64_t)c->n_expert_shared * f;
    if (il < c->n_layer_dense) {
        l->gate = matrix(b, true, d, c->n_ff_dense, 1, "blk.%d.ffn_gate.weight", il);
        l->up = matrix(b, true, d, c->n_ff_dense, 1, "blk.%d.ffn_up.weight", il);
        l->down = matrix(b, true, c->n_ff_dense, d, 1, "blk.%d.ffn_down.weight", il);
        return;
    }
    l->router = matrix(b, true, d, e, 1, "blk.%d.ffn_gate_inp.weight", il);
    l->router_bias = vector(b, c->router_bias, e, "blk.%d.exp_probs_b.bias", il);
    l->experts.gate = matrix(b, true, d, f, e, "blk.%d.ffn_gate_exps.weight", il);
    l->experts.up = matrix(b, true, d, f, e, "blk.%d.ffn_up_exps.weight", il);
    l->experts.down = matrix(b, true, f, d, e, "blk.%d.ffn_down_exps.weight", il);
    if (b->status == DS_OK && ds_format_get(l->experts.gate.format)->act != ds_format_get(l->experts.up.format)->act) {
        b->status =
            ds_fail(b->err, DS_EUNSUPPORTED,
                    "%s: blk.%d: the experts' gate is %s and their up is %s: one float, one quantised", b->source.label,
                    il, ds_format_get(l->experts.gate.format)->name, ds_format_get(l->experts.up.format)->name);
    }
    if (!shared) return;
    l->gate_shared = matrix(b, true, d, shared, 1, "blk.%d.ffn_gate_shexp.weight", il);
    l->up_shared = matrix(b, true, d, shared, 1, "blk.%d.ffn_up_shexp.weight", il);
    l->down_shared = matrix(b, true, shared, d, 1, "blk.%d.ffn_down_shexp.weight", il);
}

static void bind_ends(binder *b) {
    const ds_config *c = b->config;
    ds_weights *w = b->out;
    w->token_embd = matrix(b, true, c->n_embd, c->n_vocab, 1, "token_embd.weight");
    w->output = matrix(b, false, c->n_embd, c->n_vocab, 1, "output.weight");
    if (!w->output.data) w->output = w->token_embd; /* tied: one matrix serves both ends */
    w->output_norm = vector(b, true, c->n_embd, "output_norm.weight");
}

ds_status ds_weights_bind(const ds_config *config, ds_source source, int layer_begin, int layer_end, bool ends,
                          ds_sublayer sublayer, ds_weights *out, ds_error *err) {
    ds_weights w = {.layer_begin = layer_begin, .layer_end = layer_end, .sublayer = sublayer};
    binder b = {config, source, &w, DS_OK, err};
    if (!(w.layers = calloc((size_t)(layer_end - layer_begin), sizeof *w.layers))) {
        return ds_fail(err, DS_ENOMEM, "%s: no memory for %d layers", source.label, layer_end - layer_begin);
    }
    if (ends) bind_ends(&b);
    for (int il = layer_begin; il < layer_end && b.status == DS_OK; il++) {
        if (sublayer != DS_SUBLAYER_FEED_FORWARD) bind_attention(&b, ds_weights_layer(&w, il), il);
        ds_weights_layer(&w, il)->ffn_norm = vector(&b, true, config->n_embd, "blk.%d.ffn_norm.weight", il);
        if (sublayer != DS_SUBLAYER_ATTENTION) bind_feed_forward(&b, ds_weights_layer(&w, il), il);
    }
    if (b.status == DS_OK) *out = w;
    else ds_weights_release(&w);
    return b.status;
}

void ds_weights_release(ds_weights *weights) {
    for (ds_owned *block = weights->owned, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(weights->layers);
    *weights = (ds_weights){0};
}
