/* mul_float.h: products with F32, F16 and BF16 weights; activations are plain float rows. */
#pragma once

enum { FLOAT_DOT_TOKENS = 4 }; /* up to here a dot a row; above it, packing a panel pays */

/* Four sums, because one FMA waits for the one before it; a row is read once, in order. */
DS_INLINE float dot_kind(float_kind kind, int k, const char *w, const float *x) {
    vf acc[4];
    DS_UNROLL
    for (int v = 0; v < 4; v++) acc[v] = vf_set(0.0f);
    int i = 0;
    for (; i + 4 * DS_LANES <= k; i += 4 * DS_LANES) {
        __builtin_prefetch(w + (size_t)i * kind_bytes(kind) + DS_PREFETCH_BYTES);
        DS_UNROLL
        for (int v = 0; v < 4; v++) {
            const int at = i + v * DS_LANES;
            acc[v] = vf_fma(load_kind(kind, w + (size_t)at * kind_bytes(kind)), vf_load(x + at), acc[v]);
        }
    }
    for (; i < k; i += DS_LANES) {
        const int left = k - i < DS_LANES ? k - i : DS_LANES;
        acc[0] = vf_fma(load_kind_n(kind, w + (size_t)i * kind_bytes(kind), left), vf_load_n(x + i, left), acc[0]);
    }
    return vf_sum(vf_add(vf_add(acc[0], acc[1]), vf_add(acc[2], acc[3])));
}

DS_INLINE void mul_kind(float_kind kind, const ds_mul *job) {
    const float *x = job->act;
    const char *w = (const char *)job->w + (size_t)job->row_begin * job->row_bytes;
    const int n_rows = job->row_end - job->row_begin;
    if (job->n_tok > FLOAT_DOT_TOKENS) {
        gemm_nt_kind(kind, job->n_tok, n_rows, job->k, 1.0f, x, (size_t)job->k, w, job->row_bytes,
                     job->y + job->row_begin, job->ldy);
        return;
    }
    for (int r = 0; r < n_rows; r++, w += job->row_bytes)
        for (int t = 0; t < job->n_tok; t++)
            job->y[(size_t)t * job->ldy + (size_t)(job->row_begin + r)] =
                dot_kind(kind, job->k, w, x + (size_t)t * (size_t)job->k);
}

void DS_OF(mul_F32)(const ds_mul *job) { mul_kind(KIND_F32, job); }
void DS_OF(mul_F16)(const ds_mul *job) { mul_kind(KIND_F16, job); }
void DS_OF(mul_BF16)(const ds_mul *job) { mul_kind(KIND_BF16, job); }
