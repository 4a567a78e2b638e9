/* latent.c: multi-head latent attention (DeepSeek-V2, section 2.1), as a file has it: one latent of a position serves all
 * heads' keys and values, beside one rotary key. */
#include <stdio.h>
#include <stdlib.h>

#include "arch/attention.h"
#include "arch/binder.h"
#include "arch/reader.h"

/* Head widths: files in the latent form state them as *_mla, older ones as the plain lengths. */
static void read_widths(ds_reader *r, ds_config *c) {
    bool latent = ds_read_present(r, "attention.key_length_mla");
    int qk;
    c->n_head = ds_read_int(r, "attention.head_count", 1, 65536, -1);
    c->n_head_kv = 1; /* one latent for all; what head_count_kv says differs between the forms of files */
    c->q_lora_rank = ds_read_int(r, "attention.q_lora_rank", 0, DS_MAX_WIDTH, 0);
    c->kv_lora_rank = ds_read_int(r, "attention.kv_lora_rank", 1, 65536, -1);
    c->rope_dim = ds_read_int(r, "rope.dimension_count", 2, 65536, -1);
    qk = ds_read_int(r, latent ? "attention.key_length_mla" : "attention.key_length", 3, 65536, -1);
    c->v_dim = ds_read_int(r, latent ? "attention.value_length_mla" : "attention.value_length", 1, 65536, -1);
    c->nope_dim = qk - c->rope_dim;
    if (r->status == DS_OK && (c->nope_dim < 1 || c->rope_dim % 2)) {
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: a head of %d values cannot hold %d rotated ones",
                            ds_gguf_label(r->gguf), qk, c->rope_dim);
    }
    ds_read_product(r, "heads times their query width", c->n_head, ds_qk_dim(c));
    ds_read_product(r, "heads times their value width", c->n_head, c->v_dim);
    ds_read_product(r, "heads times the cached width", c->n_head, ds_latent_width(c));
    ds_read_product(r, "heads times the width of a key and a value", c->n_head, c->nope_dim + c->v_dim);
}

static int cached(const ds_config *c, ds_cache_rows *out) {
    out[0] = (ds_cache_rows){.n = c->kv_lora_rank, .n_tail = c->rope_dim, .count = 1};
    return 1;
}

/* W_uk of a legacy attn_kv_b, transposed to the split form's (kv_lora_rank, nope_dim) per head. The copy is half
 * precision unless the file holds floats: it is 1/60 of the model, and the source is no finer. */
static ds_mat transpose_k_b(ds_binder *b, const ds_mat *kv_b, int head_rows) {
    const ds_config *c = b->config;
    int r = c->kv_lora_rank, d = c->nope_dim;
    bool exact = kv_b->format == DS_FORMAT_F32 || kv_b->format == DS_FORMAT_BF16;
    ds_mat m = {.format = exact ? DS_FORMAT_F32 : DS_FORMAT_F16, .rows = r, .k = d, .n = c->n_head};
    float *row = malloc((size_t)r * sizeof *row);
    unsigned char *data = NULL;
    m.row_bytes = ds_row_bytes(m.format, d);
    m.stride = m.row_bytes * (size_t)r;
    if (row) data = ds_bind_own(b, m.stride * (size_t)m.n);
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

static void bind_kv_b(ds_binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    int head_rows = c->nope_dim + c->v_dim;
    char name[DS_MAX_NAME];
    snprintf(name, sizeof name, "blk.%d.attn_k_b.weight", il);
    if (b->status == DS_OK && b->source.find(b->source.ctx, name)) {
        l->latent.k_b = ds_bind_heads(b, c->nope_dim, c->kv_lora_rank, "attn_k_b", il);
        l->latent.v_b = ds_bind_heads(b, c->kv_lora_rank, c->v_dim, "attn_v_b", il);
        return;
    }
    ds_mat kv_b =
        ds_bind_matrix(b, true, c->kv_lora_rank, (int64_t)c->n_head * head_rows, 1, "blk.%d.attn_kv_b.weight", il);
    if (!kv_b.data) return;
    l->latent.k_b = transpose_k_b(b, &kv_b, head_rows);
    l->latent.v_b = kv_b;
    l->latent.v_b.data += (size_t)c->nope_dim * kv_b.row_bytes;
    l->latent.v_b.rows = c->v_dim;
    l->latent.v_b.n = c->n_head;
    l->latent.v_b.stride = (size_t)head_rows * kv_b.row_bytes;
}

static void bind_layer(ds_binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    int64_t q_rows = (int64_t)c->n_head * ds_qk_dim(c);
    if (c->q_lora_rank) {
        l->latent.q_a = ds_bind_matrix(b, true, c->n_embd, c->q_lora_rank, 1, "blk.%d.attn_q_a.weight", il);
        l->latent.q_a_norm = ds_bind_vector(b, true, c->q_lora_rank, "blk.%d.attn_q_a_norm.weight", il);
        l->q = ds_bind_matrix(b, true, c->q_lora_rank, q_rows, 1, "blk.%d.attn_q_b.weight", il);
    } else {
        l->q = ds_bind_matrix(b, true, c->n_embd, q_rows, 1, "blk.%d.attn_q.weight", il);
    }
    l->latent.kv_a = ds_bind_matrix(b, true, c->n_embd, ds_latent_width(c), 1, "blk.%d.attn_kv_a_mqa.weight", il);
    l->latent.kv_a_norm = ds_bind_vector(b, true, c->kv_lora_rank, "blk.%d.attn_kv_a_norm.weight", il);
    bind_kv_b(b, l, il);
}

const ds_attention_kind DS_LATENT_ATTENTION = {
    .name = "latent", .read = read_widths, .cached = cached, .yarn_log_most = 1e3, .bind = bind_layer};
