#include "backend/vulkan/weights.h"

#include <stdlib.h>
#include <string.h>

#include "backend/vulkan/product.h"

/* The pieces are walked twice in the same order: once for the sizes of the chunks that they are laid into, once to copy. */
typedef struct loader {
    ds_gpu *gpu;
    const ds_facts *facts;
    int number;
    ds_gpu_weights *w;
    uint64_t *sizes; /* (n_chunks) */
    int n_chunks, at; /* the chunk being filled */
    uint64_t used; /* of it */
    bool copying;
    ds_status status; /* of the first failure */
    ds_error *err;
} loader;

static void next_chunk(loader *l) {
    if (l->copying) {
        l->at++;
        l->used = 0;
        return;
    }
    uint64_t *more = realloc(l->sizes, (size_t)(l->n_chunks + 1) * sizeof *more);
    if (!more) {
        l->status = ds_fail(l->err, DS_ENOMEM, "no memory for a list of video memory");
        return;
    }
    l->sizes = more;
    l->sizes[l->n_chunks] = 0;
    l->at = l->n_chunks++;
    l->used = 0;
}

/* One piece; *address is set when it is copied. */
static void piece(loader *l, const void *data, uint64_t bytes, uint64_t *address) {
    const uint64_t room = ds_gpu_padded(bytes);
    if (l->status != DS_OK || !data || !bytes) return;
    if (room > DS_GPU_CHUNK) {
        l->status =
            ds_fail(l->err, DS_EUNSUPPORTED, "%s: a matrix of %.2f GiB, and no allocation is larger than %d GiB",
                    ds_gpu_told(l->gpu)->name, (double)bytes / (1 << 30), DS_GPU_CHUNK >> 30);
        ds_hint(l->err, "leave that part of the model on the processor");
        return;
    }
    if (l->at < 0 || l->used + room > DS_GPU_CHUNK) next_chunk(l);
    if (l->status != DS_OK) return;
    if (l->copying) {
        const ds_gpu_buffer *to = &l->w->chunks[l->at];
        *address = to->address + l->used;
        l->status = ds_gpu_write(l->gpu, to, l->used, data, bytes, l->err);
    } else {
        l->sizes[l->at] += room;
    }
    l->used += room;
}

static void matrix(loader *l, const ds_mat *m, uint64_t *address) {
    if (m->data) piece(l, m->data, (uint64_t)(m->n - 1) * m->stride + (uint64_t)m->rows * m->row_bytes, address);
}

static void vector(loader *l, const float *v, int n, uint64_t *address) {
    if (v) piece(l, v, (uint64_t)n * sizeof *v, address);
}

static void attention(loader *l, int il) {
    const ds_config *c = l->facts->config;
    const ds_layer *from = ds_weights_layer(l->facts->weights, il);
    ds_gpu_layer *to = &l->w->layers[il - l->facts->weights->layer_begin];
    vector(l, from->attn_norm, c->n_embd, &to->attn_norm);
    vector(l, from->latent.q_a_norm, c->q_lora_rank, &to->q_a_norm);
    vector(l, from->latent.kv_a_norm, c->kv_lora_rank, &to->kv_a_norm);
    matrix(l, &from->q, &to->q);
    matrix(l, &from->o, &to->o);
    if (c->q_lora_rank) matrix(l, &from->latent.q_a, &to->q_a);
    matrix(l, &from->latent.kv_a, &to->kv_a);
    matrix(l, &from->latent.k_b, &to->k_b);
    matrix(l, &from->latent.v_b, &to->v_b);
}

static void feed_forward(loader *l, int il) {
    const ds_config *c = l->facts->config;
    const ds_layer *from = ds_weights_layer(l->facts->weights, il);
    ds_gpu_layer *to = &l->w->layers[il - l->facts->weights->layer_begin];
    vector(l, from->ffn_norm, c->n_embd, &to->ffn_norm);
    if (il < c->n_layer_dense) {
        matrix(l, &from->gate, &to->gate);
        matrix(l, &from->up, &to->up);
        matrix(l, &from->down, &to->down);
        return;
    }
    matrix(l, &from->router, &to->router);
    vector(l, from->router_bias, c->n_expert, &to->router_bias);
    matrix(l, &from->gate_shared, &to->gate_shared);
    matrix(l, &from->up_shared, &to->up_shared);
    matrix(l, &from->down_shared, &to->down_shared);
}

static void experts(loader *l, int il) {
    const ds_config *c = l->facts->config;
    const ds_weights *weights = l->facts->weights;
    ds_gpu_layer *to = &l->w->layers[il - weights->layer_begin];
    const uint8_t *place = ds_residency_place(l->facts->residency, il);
    to->expert = l->w->experts + (size_t)(il - weights->layer_begin) * (size_t)c->n_expert;
    for (int e = 0; e < c->n_expert; e++) {
        if (place[e] != l->number) continue;
        const ds_expert x = ds_residency_bound(weights, il, e);
        matrix(l, &x.gate, &to->expert[e].gate);
        matrix(l, &x.up, &to->expert[e].up);
        matrix(l, &x.down, &to->expert[e].down);
    }
    piece(l, to->expert, (uint64_t)c->n_expert * sizeof *to->expert, &to->experts);
}

static void walk(loader *l) {
    uint16_t grids[DS_GPU_TABLES_BYTES / 2];
    const ds_weights *weights = l->facts->weights;
    const ds_places *places = l->facts->places;
    ds_gpu_tables(grids);
    piece(l, grids, sizeof grids, &l->w->tables);
    for (int il = weights->layer_begin; il < weights->layer_end && l->status == DS_OK; il++) {
        const int i = il - weights->layer_begin;
        if (places->attention[i] == l->number) attention(l, il);
        if (places->feed_forward[i] == l->number) feed_forward(l, il);
        if (il >= l->facts->config->n_layer_dense) experts(l, il);
    }
    if (places->ends != l->number) return;
    vector(l, weights->output_norm, l->facts->config->n_embd, &l->w->output_norm);
    matrix(l, &weights->output, &l->w->output);
}

static ds_status load(loader *l, uint64_t limit) {
    ds_gpu_weights *w = l->w;
    ds_status st = DS_OK;
    walk(l);
    if (l->status != DS_OK) return l->status;
    for (int i = 0; i < l->n_chunks; i++) w->bytes += l->sizes[i];
    if (limit && w->bytes > limit)
        return ds_fail(l->err, DS_ENOMEM, "%s: its part of the weights takes %.1f MiB, and it was given %.1f MiB",
                       ds_gpu_told(l->gpu)->name, (double)w->bytes / (1 << 20), (double)limit / (1 << 20));
    if (!(w->chunks = calloc((size_t)l->n_chunks + 1, sizeof *w->chunks)))
        return ds_fail(l->err, DS_ENOMEM, "no memory for a list of video memory");
    for (; w->n_chunks < l->n_chunks && st == DS_OK; w->n_chunks += st == DS_OK)
        st = ds_gpu_buffer_new(l->gpu, l->sizes[w->n_chunks], DS_GPU_OWN, &w->chunks[w->n_chunks], l->err);
    if (st != DS_OK) return st;
    l->copying = true, l->at = -1, l->used = 0;
    walk(l);
    return l->status;
}

ds_status ds_gpu_weights_load(ds_gpu *gpu, const ds_facts *facts, int number, uint64_t limit, ds_gpu_weights *out,
                              ds_error *err) {
    const size_t n_layer = (size_t)(facts->weights->layer_end - facts->weights->layer_begin);
    ds_gpu_weights w = {.layers = calloc(n_layer + 1, sizeof *w.layers),
                        .experts = calloc(n_layer * (size_t)facts->config->n_expert + 1, sizeof *w.experts)};
    loader l = {.gpu = gpu, .facts = facts, .number = number, .w = &w, .at = -1, .err = err};
    ds_status st = w.layers && w.experts ? load(&l, limit) : ds_fail(err, DS_ENOMEM, "no memory for a list of weights");
    free(l.sizes);
    if (st == DS_OK) *out = w;
    else ds_gpu_weights_release(gpu, &w);
    return st;
}

void ds_gpu_weights_release(ds_gpu *gpu, ds_gpu_weights *w) {
    for (int i = 0; i < w->n_chunks; i++) ds_gpu_buffer_release(gpu, &w->chunks[i]);
    free(w->chunks);
    free(w->layers);
    free(w->experts);
    *w = (ds_gpu_weights){0};
}
