#include "arch/weights.h"

#include <stdlib.h>

#include "arch/attention.h"
#include "arch/binder.h"

/* The experts' gate and up: two tensors, or one in which an expert's gate stands before its up. */
static void bind_gate_up(ds_binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    const int64_t d = c->n_embd, f = c->n_ff_expert, e = c->n_expert;
    const ds_mat both = ds_bind_matrix(b, false, d, 2 * f, e, "blk.%d.ffn_gate_up_exps.weight", il);
    if (!both.data) {
        l->experts.gate = ds_bind_matrix(b, true, d, f, e, "blk.%d.ffn_gate_exps.weight", il);
        l->experts.up = ds_bind_matrix(b, true, d, f, e, "blk.%d.ffn_up_exps.weight", il);
        return;
    }
    l->experts.gate = l->experts.up = both;
    l->experts.gate.rows = l->experts.up.rows = c->n_ff_expert;
    l->experts.up.data += (size_t)f * both.row_bytes;
}

static void bind_attention(ds_binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    l->attn_norm = ds_bind_vector(b, true, c->n_embd, "blk.%d.attn_norm.weight", il);
    ds_attention(c)->bind(b, l, il);
    l->o = ds_bind_matrix(b, true, (int64_t)c->n_head * c->v_dim, c->n_embd, 1, "blk.%d.attn_output.weight", il);
}

static void bind_feed_forward(ds_binder *b, ds_layer *l, int il) {
    const ds_config *c = b->config;
    int64_t d = c->n_embd, f = c->n_ff_expert, e = c->n_expert, shared = (int64_t)c->n_expert_shared * f;
    if (il < c->n_layer_dense) {
        l->gate = ds_bind_matrix(b, true, d, c->n_ff_dense, 1, "blk.%d.ffn_gate.weight", il);
        l->up = ds_bind_matrix(b, true, d, c->n_ff_dense, 1, "blk.%d.ffn_up.weight", il);
        l->down = ds_bind_matrix(b, true, c->n_ff_dense, d, 1, "blk.%d.ffn_down.weight", il);
        return;
    }
    l->router = ds_bind_matrix(b, true, d, e, 1, "blk.%d.ffn_gate_inp.weight", il);
    l->router_bias = ds_bind_vector(b, c->router_bias, e, "blk.%d.exp_probs_b.bias", il);
    bind_gate_up(b, l, il);
    l->experts.down = ds_bind_matrix(b, true, f, d, e, "blk.%d.ffn_down_exps.weight", il);
    if (b->status == DS_OK && ds_format_get(l->experts.gate.format)->act != ds_format_get(l->experts.up.format)->act) {
        b->status =
            ds_fail(b->err, DS_EUNSUPPORTED,
                    "%s: blk.%d: the experts' gate is %s and their up is %s: one float, one quantised", b->source.label,
                    il, ds_format_get(l->experts.gate.format)->name, ds_format_get(l->experts.up.format)->name);
    }
    if (!shared) return;
    l->gate_shared = ds_bind_matrix(b, true, d, shared, 1, "blk.%d.ffn_gate_shexp.weight", il);
    l->up_shared = ds_bind_matrix(b, true, d, shared, 1, "blk.%d.ffn_up_shexp.weight", il);
    l->down_shared = ds_bind_matrix(b, true, shared, d, 1, "blk.%d.ffn_down_shexp.weight", il);
}

static void bind_ends(ds_binder *b) {
    const ds_config *c = b->config;
    ds_weights *w = b->out;
    w->token_embd = ds_bind_matrix(b, true, c->n_embd, c->n_vocab, 1, "token_embd.weight");
    w->output = ds_bind_matrix(b, false, c->n_embd, c->n_vocab, 1, "output.weight");
    if (!w->output.data) w->output = w->token_embd; /* tied: one matrix serves both ends */
    w->output_norm = ds_bind_vector(b, true, c->n_embd, "output_norm.weight");
}

ds_status ds_weights_bind(const ds_config *config, ds_source source, int layer_begin, int layer_end, bool ends,
                          ds_sublayer sublayer, ds_weights *out, ds_error *err) {
    ds_weights w = {.layer_begin = layer_begin, .layer_end = layer_end, .sublayer = sublayer};
    ds_binder b = {config, source, &w, DS_OK, err};
    if (!(w.layers = calloc((size_t)(layer_end - layer_begin), sizeof *w.layers))) {
        return ds_fail(err, DS_ENOMEM, "%s: no memory for %d layers", source.label, layer_end - layer_begin);
    }
    if (ends) bind_ends(&b);
    for (int il = layer_begin; il < layer_end && b.status == DS_OK; il++) {
        if (sublayer != DS_SUBLAYER_FEED_FORWARD) bind_attention(&b, ds_weights_layer(&w, il), il);
        ds_weights_layer(&w, il)->ffn_norm = ds_bind_vector(&b, true, config->n_embd, "blk.%d.ffn_norm.weight", il);
        if (sublayer != DS_SUBLAYER_ATTENTION) bind_feed_forward(&b, ds_weights_layer(&w, il), il);
    }
    if (b.status == DS_OK) *out = w;
    else ds_weights_release(&w);
    return b.status;
}
