/* attend.h: absorbed latent attention over a block of cached positions: one matrix product for the scores of all heads, an
 * online softmax, one for the values; every cached row is converted once and used by all heads. */
#pragma once

DS_INLINE void attend_kind(float_kind kind, const ds_attend *job) {
    const int n_heads = job->n_heads, n_pos = job->n_pos;
    if (n_pos == 0) return;
    const size_t row_bytes = (size_t)job->qk_dim * kind_bytes(kind);
    gemm_nt_kind(kind, n_heads, n_pos, job->qk_dim, job->scale, job->q, (size_t)job->qk_dim, job->kv, row_bytes, job->scratch,
                 (size_t)n_pos);
    for (int h = 0; h < n_heads; h++) {
        float *scores = job->scratch + (size_t)h * (size_t)n_pos;
        const float block_max = row_max(n_pos, scores);
        if (block_max > job->m[h]) {
            const float shrink = expf(job->m[h] - block_max); /* 0 the first time, from -infinity */
            job->l[h] *= shrink;
            scale_row(job->v_dim, shrink, job->acc + (size_t)h * (size_t)job->v_dim);
            job->m[h] = block_max;
        }
        job->l[h] += exp_sum(n_pos, job->m[h], scores);
    }
    gemm_nn_add_kind(kind, n_heads, job->v_dim, n_pos, job->scratch, (size_t)n_pos, job->kv, row_bytes, job->acc,
                     (size_t)job->v_dim);
}

static void attend_f16(const ds_attend *job) { attend_kind(KIND_F16, job); }
static void attend_f32(const ds_attend *job) { attend_kind(KIND_F32, job); }
