/* plain.c: plain multi-head attention, as a file has it (DeepSeekMoE, architecture `deepseek`; Llama's attention): keys and
 * values per head, or per group of heads, every value of a key with its position. */
#include "arch/attention.h"
#include "arch/binder.h"
#include "arch/reader.h"

static void read_widths(ds_reader *r, ds_config *c) {
    c->n_head = ds_read_int(r, "attention.head_count", 1, 65536, -1);
    if (r->status != DS_OK) return;
    const int head = c->n_embd / c->n_head ? c->n_embd / c->n_head : 1;
    c->n_head_kv = ds_read_int(r, "attention.head_count_kv", 1, c->n_head, c->n_head);
    const int qk = ds_read_int(r, "attention.key_length", 2, 65536, head);
    c->v_dim = ds_read_int(r, "attention.value_length", 1, 65536, head);
    c->rope_dim = ds_read_int(r, "rope.dimension_count", 2, 65536, qk);
    if (r->status != DS_OK) return;
    if (c->rope_dim != qk || qk % 2)
        r->status =
            ds_fail(r->err, DS_EUNSUPPORTED, "%s: %d of a key's %d values are rotated, expected all of an even number",
                    ds_gguf_label(r->gguf), c->rope_dim, qk);
    else if (c->n_head % c->n_head_kv)
        r->status = ds_fail(r->err, DS_EFORMAT, "%s: %d heads cannot share %d heads of keys and values evenly",
                            ds_gguf_label(r->gguf), c->n_head, c->n_head_kv);
    ds_read_product(r, "heads times their query width", c->n_head, ds_qk_dim(c));
    ds_read_product(r, "heads times their value width", c->n_head, c->v_dim);
}

static int cached(const ds_config *c, ds_cache_rows *out) {
    out[0] = (ds_cache_rows){.n = ds_qk_dim(c), .count = c->n_head_kv};
    out[1] = (ds_cache_rows){.n = c->v_dim, .count = c->n_head_kv};
    return 2;
}

/* Rows [first, first + n) of a matrix, as one of its own. */
static ds_mat rows_of(const ds_mat *m, int64_t first, int64_t n) {
    ds_mat part = *m;
    part.data += (size_t)first * m->row_bytes;
    part.rows = n;
    part.stride = (size_t)n * m->row_bytes;
    return part;
}

/* Queries, keys and values are three matrices, or in some files one. */
static void bind_layer(ds_binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    const int64_t q = (int64_t)c->n_head * ds_qk_dim(c), k = (int64_t)c->n_head_kv * ds_qk_dim(c),
                  v = (int64_t)c->n_head_kv * c->v_dim;
    const ds_mat all = ds_bind_matrix(b, false, c->n_embd, q + k + v, 1, "blk.%d.attn_qkv.weight", il);
    if (all.data) {
        l->q = rows_of(&all, 0, q);
        l->plain.k = rows_of(&all, q, k);
        l->plain.v = rows_of(&all, q + k, v);
        return;
    }
    l->q = ds_bind_matrix(b, true, c->n_embd, q, 1, "blk.%d.attn_q.weight", il);
    l->plain.k = ds_bind_matrix(b, true, c->n_embd, k, 1, "blk.%d.attn_k.weight", il);
    l->plain.v = ds_bind_matrix(b, true, c->n_embd, v, 1, "blk.%d.attn_v.weight", il);
}

const ds_attention_kind DS_PLAIN_ATTENTION = {
    .name = "plain", .read = read_widths, .cached = cached, .bind = bind_layer};
