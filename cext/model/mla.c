/* mla.c: multi-head latent attention (DeepSeek-V2, section 2.1). Knows no ISA, owns no cache.
 *
 *   c_kv = norm(W_dkv x), k_pe = rope(W_kr x): all that is cached, for all heads together
 *   score_h = (q_nope . W_uk c_kv + q_pe . k_pe) * scale = ((W_uk^T q_nope) . c_kv + q_pe . k_pe) * scale
 *   o_h = W_uv sum_j p_j c_kv_j
 *
 * Few tokens absorb W_uk into q and W_uv into the output and attend over the latent itself; many tokens at once expand
 * keys and values block by block, which is 3.4 times less arithmetic once the expansion is shared by enough queries. */
#include <math.h>
#include <string.h>

#include "model/lane.h"

int ds_attend_parts(const ds_config *config, int n_tok, int n_pos) {
    int head_blocks = (config->n_head + DS_HEAD_BLOCK - 1) / DS_HEAD_BLOCK;
    int64_t tasks = (int64_t)n_tok * head_blocks;
    int wanted = (int)((DS_MAX_PARTS + tasks - 1) / tasks), most = (n_pos + DS_MIN_PART - 1) / DS_MIN_PART;
    return wanted < most ? wanted : most;
}

/* Down-projections, then the query's up-projection; the lane's tokens' c_kv and k_pe go into the cache. */
static void project(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    const ds_mat *first = c->q_lora_rank ? &l->q_a : &l->q;
    float *q_out = c->q_lora_rank ? b->q_a : b->q;
    ds_job jobs[2];
    const ds_act *act;
    ds_lane_norm(lane, c->n_embd, lane->x, l->attn_norm, lane->xn);
    act = ds_lane_pack(lane, ds_kind_of(first) | ds_kind_of(&l->kv_a), c->n_embd, lane->xn, &lane->own->act_x, &b->act_x);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_ATTN_NORM, il, lane->xn, c->n_embd);
    jobs[0] = ds_cpu_job(first, first->data, ds_act_for(act, first), s->n_tok, q_out, (size_t)first->rows);
    jobs[1] = ds_cpu_job(&l->kv_a, l->kv_a.data, ds_act_for(act, &l->kv_a), s->n_tok, b->kv_a, (size_t)ds_kv_width(c));
    ds_cpu_mul(lane->worker, s->kern, jobs, 2);
    ds_barrier(lane->worker);
}

/* Normalise and rotate the lane's latent rows into the cache of their sequences. */
static void store_latent(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    if (lane->solo && lane->worker->ith) return;
    for (int i = 0; i < s->n_spans; i++) {
        const ds_span *span = &s->spans[i];
        int begin = span->first > lane->t0 ? span->first : lane->t0;
        int end = span->first + span->n < lane->t1 ? span->first + span->n : lane->t1;
        for (int t = begin; t < end; t++) {
            float *row = s->scratch->kv_a + (size_t)t * (size_t)ds_kv_width(c);
            s->kern->rms_norm(c->kv_lora_rank, row, l->kv_a_norm, c->rms_eps, row);
            ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)t * (size_t)c->rope_dim, row + c->kv_lora_rank);
            ds_kv_store(span->kv, s->kern, il - s->weights->layer_begin, span->pos + t - span->first, row);
        }
    }
}

static void project_q(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    const ds_act *act;
    ds_job job;
    if (!c->q_lora_rank) return;
    float *normed = lane->solo ? lane->own->q_a : b->q_a; /* a solo worker may not overwrite what the others still read */
    ds_lane_norm(lane, c->q_lora_rank, b->q_a, l->q_a_norm, normed);
    act = ds_lane_pack(lane, ds_kind_of(&l->q), c->q_lora_rank, normed, &lane->own->act_q, &b->act_q);
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_Q_A_NORM, il, normed, c->q_lora_rank);
    job = ds_cpu_job(&l->q, l->q.data, ds_act_for(act, &l->q), s->n_tok, b->q, (size_t)l->q.rows);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
}

/* Absorb: latent_q[t][h] = [W_uk,h^T q_nope | rope(q_pe)], head by head. */
static void absorb(const ds_lane *lane, const ds_layer *l) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    size_t q_row = (size_t)c->n_head * (size_t)ds_qk_dim(c), lat_row = (size_t)c->n_head * (size_t)ds_kv_width(c);
    ds_act_kind kind = ds_format_get(l->k_b.format)->act;
    void *pack = lane->own->act_nope.pack[kind];
    for (size_t h = ds_claim(lane->worker); h < (size_t)c->n_head; h = ds_claim(lane->worker)) {
        float *q = s->scratch->q + h * (size_t)ds_qk_dim(c), *out = s->scratch->latent_q + h * (size_t)ds_kv_width(c);
        s->kern->act_pack(kind, 0, s->n_tok, s->n_tok, c->nope_dim, q, q_row, NULL, pack);
        ds_job job = ds_cpu_job(&l->k_b, ds_mat_block(&l->k_b, (int)h), pack, s->n_tok, out, lat_row);
        s->kern->mul[job.format](&job.mul);
        for (int t = 0; t < s->n_tok; t++) {
            float *pe = out + (size_t)t * lat_row + c->kv_lora_rank;
            memcpy(pe, q + (size_t)t * q_row + c->nope_dim, (size_t)c->rope_dim * sizeof *pe);
            ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)t * (size_t)c->rope_dim, pe);
        }
    }
}

/* The sequence and position of a token, by its place in the step. */
static const ds_span *span_of(const ds_step *s, int t) {
    const ds_span *span = s->spans;
    while (t >= span->first + span->n) span++;
    return span;
}

/* One token, one block of heads, one part of its cached positions: a running softmax into the part's m, l and acc. */
static void attend_part(const ds_lane *lane, int il, int t, int head, int n_heads, int part, int n_parts, size_t slot) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    const ds_span *span = span_of(s, t);
    ds_scratch *b = s->scratch;
    int n_pos = span->pos + t - span->first + 1;
    int begin = (int)((int64_t)n_pos * part / n_parts), end = (int)((int64_t)n_pos * (part + 1) / n_parts);
    ds_attend job = {
        .n_heads = n_heads, .qk_dim = ds_kv_width(c), .v_dim = c->kv_lora_rank, .scale = c->attn_scale,
        .q = b->latent_q + ((size_t)t * (size_t)c->n_head + (size_t)head) * (size_t)ds_kv_width(c),
        .m = b->part_m + slot, .l = b->part_l + slot, .acc = b->part_acc + slot * (size_t)c->kv_lora_rank, .scratch = lane->own->attend,
    };
    for (int h = 0; h < n_heads; h++) job.m[h] = -INFINITY, job.l[h] = 0;
    memset(job.acc, 0, (size_t)n_heads * (size_t)c->kv_lora_rank * sizeof *job.acc);
    for (int pos = begin; pos < end; pos += DS_SCORE_BLOCK) {
        job.n_pos = end - pos < DS_SCORE_BLOCK ? end - pos : DS_SCORE_BLOCK;
        job.kv = ds_kv_row(span->kv, il - s->weights->layer_begin, pos);
        (span->kv->type == DS_KV_F16 ? s->kern->attend_f16 : s->kern->attend_f32)(&job);
    }
}

/* The parts of a (token, head) lie n_head apart: slot = (part * n_tok + t) * n_head + head. */
static void attend(const ds_lane *lane, int il) {
    const ds_step *s = lane->step;
    int n_head = s->config->n_head, blocks = (n_head + DS_HEAD_BLOCK - 1) / DS_HEAD_BLOCK;
    int most = ds_attend_parts(s->config, s->n_tok, 1 << 30);
    size_t n = (size_t)s->n_tok * (size_t)blocks * (size_t)most;
    for (size_t i = ds_claim(lane->worker); i < n; i = ds_claim(lane->worker)) {
        int part = (int)(i % (size_t)most), block = (int)(i / (size_t)most % (size_t)blocks), t = (int)(i / (size_t)most / (size_t)blocks);
        const ds_span *span = span_of(s, t);
        int n_parts = ds_attend_parts(s->config, s->n_tok, span->pos + t - span->first + 1), head = block * DS_HEAD_BLOCK;
        if (part >= n_parts) continue;
        attend_part(lane, il, t, head, n_head - head < DS_HEAD_BLOCK ? n_head - head : DS_HEAD_BLOCK, part, n_parts,
                    ((size_t)part * (size_t)s->n_tok + (size_t)t) * (size_t)n_head + (size_t)head);
    }
}

/* Join the parts of one (token, head) into out (kv_lora_rank). */
static void merge_parts(const ds_step *s, int t, size_t h, float *out) {
    const ds_span *span = span_of(s, t);
    int n_parts = ds_attend_parts(s->config, s->n_tok, span->pos + t - span->first + 1), r = s->config->kv_lora_rank;
    size_t stride = (size_t)s->n_tok * (size_t)s->config->n_head, at = (size_t)t * (size_t)s->config->n_head + h;
    const float *m = s->scratch->part_m + at, *l = s->scratch->part_l + at;
    float top = -INFINITY, sum = 0;
    for (int p = 0; p < n_parts; p++) top = fmaxf(top, m[(size_t)p * stride]);
    for (int p = 0; p < n_parts; p++) sum += l[(size_t)p * stride] * expf(m[(size_t)p * stride] - top);
    memset(out, 0, (size_t)r * sizeof *out);
    for (int p = 0; p < n_parts; p++) {
        const float *acc = s->scratch->part_acc + ((size_t)p * stride + at) * (size_t)r;
        s->kern->add_scaled(r, expf(m[(size_t)p * stride] - top) / sum, acc, out);
    }
}

/* o_h = W_uv,h (latent output), head by head, over the place of its absorbed query. */
static void unabsorb(const ds_lane *lane, const ds_layer *l) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    size_t lat_row = (size_t)c->n_head * (size_t)ds_kv_width(c), out_row = (size_t)c->n_head * (size_t)c->v_dim;
    ds_act_kind kind = ds_format_get(l->v_b.format)->act;
    void *pack = lane->own->act_latent.pack[kind];
    for (size_t h = ds_claim(lane->worker); h < (size_t)c->n_head; h = ds_claim(lane->worker)) {
        float *latent = s->scratch->latent_q + h * (size_t)ds_kv_width(c);
        for (int t = 0; t < s->n_tok; t++) merge_parts(s, t, h, latent + (size_t)t * lat_row);
        s->kern->act_pack(kind, 0, s->n_tok, s->n_tok, c->kv_lora_rank, latent, lat_row, NULL, pack);
        ds_job job = ds_cpu_job(&l->v_b, ds_mat_block(&l->v_b, (int)h), pack, s->n_tok, s->scratch->heads + h * (size_t)c->v_dim, out_row);
        s->kern->mul[job.format](&job.mul);
    }
}

/* Expand one head's keys (n, qk_dim) and values (n, v_dim) at positions pos .. pos + n. */
static void expand(const ds_lane *lane, const ds_span *span, int il, int pos, int n) {
    const ds_config *c = lane->step->config;
    const ds_kernels *kern = lane->step->kern;
    ds_lane_scratch *own = lane->own;
    size_t kv = (size_t)ds_kv_width(c), qk = (size_t)ds_qk_dim(c);
    ds_kv_load(span->kv, kern, il - lane->step->weights->layer_begin, pos, n, own->latent);
    memset(own->k, 0, (size_t)n * qk * sizeof *own->k);
    kern->gemm_nn_add(n, c->nope_dim, c->kv_lora_rank, own->latent, kv, own->k_b, (size_t)c->nope_dim, own->k, qk);
    kern->gemm_nt(n, c->v_dim, c->kv_lora_rank, 1.0f, own->latent, kv, own->v_b, (size_t)c->kv_lora_rank, own->v, (size_t)c->v_dim);
    for (int j = 0; j < n; j++) {
        memcpy(own->k + (size_t)j * qk + c->nope_dim, own->latent + (size_t)j * kv + c->kv_lora_rank, (size_t)c->rope_dim * sizeof *own->k);
    }
}

/* Score n_q queries against the n expanded positions from `pos` and fold them into m, l and acc (causal, online softmax). */
static void score_block(const ds_lane *lane, const float *q, size_t q_row, int q_pos, int n_q, int pos, int n, float *m, float *l, float *acc) {
    const ds_config *c = lane->step->config;
    const ds_kernels *kern = lane->step->kern;
    float *scores = lane->own->scores;
    kern->gemm_nt(n_q, n, ds_qk_dim(c), c->attn_scale, q, q_row, lane->own->k, (size_t)ds_qk_dim(c), scores, DS_POS_BLOCK);
    for (int i = 0; i < n_q; i++) {
        float *row = scores + (size_t)i * DS_POS_BLOCK, *out = acc + (size_t)i * (size_t)c->v_dim, top = m[i], old;
        int visible = q_pos + i - pos + 1 < n ? q_pos + i - pos + 1 : n;
        if (visible <= 0) {
            memset(row, 0, (size_t)n * sizeof *row);
            continue;
        }
        for (int j = 0; j < visible; j++) top = row[j] > top ? row[j] : top;
        old = expf(m[i] - top);
        l[i] = l[i] * old + kern->exp_sum(visible, top, row);
        m[i] = top;
        memset(row + visible, 0, (size_t)(n - visible) * sizeof *row);
        if (old != 1.0f) for (int j = 0; j < c->v_dim; j++) out[j] *= old;
    }
    kern->gemm_nn_add(n_q, c->v_dim, n, scores, DS_POS_BLOCK, lane->own->v, (size_t)c->v_dim, acc, (size_t)c->v_dim);
}

/* All queries of one head of one sequence, keys and values expanded block by block. */
static void attend_head(const ds_lane *lane, const ds_layer *l, const ds_span *span, int il, size_t h) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_lane_scratch *own = lane->own;
    size_t q_row = (size_t)c->n_head * (size_t)ds_qk_dim(c), out_row = (size_t)c->n_head * (size_t)c->v_dim;
    float *q = s->scratch->q + (size_t)span->first * q_row + h * (size_t)ds_qk_dim(c);
    s->kern->dequantize[l->k_b.format]((int64_t)l->k_b.rows * l->k_b.k, ds_mat_block(&l->k_b, (int)h), own->k_b);
    s->kern->dequantize[l->v_b.format]((int64_t)l->v_b.rows * l->v_b.k, ds_mat_block(&l->v_b, (int)h), own->v_b);
    for (int t = 0; t < span->n; t++) {
        ds_rope_apply(c->rope_dim / 2, s->scratch->rope + (size_t)(span->first + t) * (size_t)c->rope_dim, q + (size_t)t * q_row + c->nope_dim);
        own->m[t] = -INFINITY, own->l[t] = 0;
    }
    memset(own->acc, 0, (size_t)span->n * (size_t)c->v_dim * sizeof *own->acc);
    for (int pos = 0; pos < span->pos + span->n; pos += DS_POS_BLOCK) {
        int n = span->pos + span->n - pos < DS_POS_BLOCK ? span->pos + span->n - pos : DS_POS_BLOCK;
        expand(lane, span, il, pos, n);
        for (int t = 0; t < span->n; t += DS_QUERY_BLOCK) {
            int n_q = span->n - t < DS_QUERY_BLOCK ? span->n - t : DS_QUERY_BLOCK;
            if (span->pos + t + n_q <= pos) continue; /* all of these come before the block */
            score_block(lane, q + (size_t)t * q_row, q_row, span->pos + t, n_q, pos, n, own->m + t, own->l + t, own->acc + (size_t)t * (size_t)c->v_dim);
        }
    }
    for (int t = 0; t < span->n; t++) {
        float *out = s->scratch->heads + (size_t)(span->first + t) * out_row + h * (size_t)c->v_dim;
        for (int j = 0; j < c->v_dim; j++) out[j] = own->acc[(size_t)t * (size_t)c->v_dim + (size_t)j] / own->l[t];
    }
}

static void attend_expanded(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    size_t n_head = (size_t)s->config->n_head, n = n_head * (size_t)s->n_spans;
    for (size_t i = ds_claim(lane->worker); i < n; i = ds_claim(lane->worker)) attend_head(lane, l, &s->spans[i / n_head], il, i % n_head);
}

static bool absorbs(const ds_step *s) {
    for (int i = 0; i < s->n_spans; i++) {
        if (s->spans[i].n > DS_ABSORB_MAX) return false;
    }
    return true;
}

/* Output projection of the heads, added to the lane's residual rows. */
static void output(const ds_lane *lane, const ds_layer *l, int il) {
    const ds_step *s = lane->step;
    const ds_config *c = s->config;
    ds_scratch *b = s->scratch;
    const ds_act *act = ds_lane_pack(lane, ds_kind_of(&l->o), c->n_head * c->v_dim, b->heads, &lane->own->act_heads, &b->act_heads);
    ds_job job;
    ds_lane_sync(lane);
    ds_lane_tap(lane, DS_TAP_ATTN_HEADS, il, b->heads, c->n_head * c->v_dim);
    job = ds_cpu_job(&l->o, l->o.data, ds_act_for(act, &l->o), s->n_tok, b->y, (size_t)c->n_embd);
    ds_cpu_mul(lane->worker, s->kern, &job, 1);
    ds_barrier(lane->worker);
    ds_lane_tap(lane, DS_TAP_ATTN_OUT, il, b->y, c->n_embd);
    for (int t = lane->t0; t < lane->t1; t++) s->kern->add_scaled(c->n_embd, 1.0f, b->y + (size_t)t * (size_t)c->n_embd, lane->x + (size_t)t * (size_t)c->n_embd);
    ds_lane_tap(lane, DS_TAP_FFN_INP, il, lane->x, c->n_embd);
}

void ds_mla(const ds_lane *lane, const ds_layer *layer, int il) {
    project(lane, layer, il);
    store_latent(lane, layer, il);
    ds_lane_tap(lane, DS_TAP_KV_A_NORM, il, lane->step->scratch->kv_a, ds_kv_width(lane->step->config));
    project_q(lane, layer, il);
    ds_barrier(lane->worker); /* q is whole and the cache holds this step's rows */
    if (absorbs(lane->step)) {
        absorb(lane, layer);
        ds_barrier(lane->worker);
        attend(lane, il);
        ds_barrier(lane->worker);
        unabsorb(lane, layer);
    } else {
        attend_expanded(lane, layer, il);
    }
    ds_barrier(lane->worker);
    output(lane, layer, il);
}
