/* kernels.h: the numeric contract. One table of pure functions per ISA, all compiled from kern.c.
 *
 * A kernel allocates nothing, starts no thread, logs nothing and knows no layer. Integer block sums are bit-equal on
 * every ISA; float results differ by rounding only. A result does not depend on how rows are split between calls as long
 * as splits fall on multiples of DS_PANEL_ROWS.
 *
 * Shapes are row-major, the last index contiguous. k is the length of a weight row (the input width). */
#pragma once

#include "quant/quant.h"

enum {
    DS_PANEL_ROWS = 32, /* split a matrix's rows on multiples of this */
    DS_ACT_ALIGN = 64,  /* alignment of activation packs, in bytes */
};

/* y[t * ldy + r] = sum_k w[r][k] * x[t][k] for r in [row_begin, row_end), t in [0, n_tok).
 * w points at row 0; act is a pack (act_pack, kind of w's format) of n_tok rows of k values. Writes nothing else. */
typedef struct ds_mul {
    const void *w;       /* (rows, k) in its format */
    size_t row_bytes;    /* distance between rows of w */
    int k;
    int row_begin, row_end;
    const void *act;     /* pack of (n_tok, k) */
    int n_tok;
    float *y;            /* (n_tok, ldy) */
    size_t ldy;
} ds_mul;

/* One block of positions of latent attention for several heads that share one latent cache (MLA, absorbed form):
 * score[h][j] = scale * q[h] . kv[j], then an online softmax update of the running maximum m, sum l and
 * acc[h] = sum_j exp(score - m) * kv[j][0:v_dim]. The caller starts with m = -INFINITY, l = 0, acc = 0. */
typedef struct ds_attend {
    int n_heads, n_pos;
    int qk_dim, v_dim;   /* 576 and 512 in DeepSeek-V2: the values are the first v_dim numbers of a cached row */
    const float *q;      /* (n_heads, qk_dim) */
    const void *kv;      /* (n_pos, qk_dim) in the cache's type */
    float scale;
    float *m, *l;        /* (n_heads) */
    float *acc;          /* (n_heads, v_dim) */
    float *scratch;      /* (n_heads, n_pos) */
} ds_attend;

typedef struct ds_kernels {
    const char *isa; /* "scalar", "avx2", "avxvnni", "avx512vnni", "neon", ... */

    /* Activation packs: n_tok rows of k floats, in the layout this table's products want. */
    size_t (*act_bytes)(ds_act_kind kind, int n_tok, int k);
    /* Pack tokens [tok_begin, tok_end) of the n_tok rows x[rows ? rows[t] : t]; disjoint ranges that start on
     * multiples of DS_PANEL_ROWS may be packed by different threads. k is a multiple of 32 for DS_ACT_Q8, any for F32. */
    void (*act_pack)(ds_act_kind kind, int tok_begin, int tok_end, int n_tok, int k, const float *x /* (?, ldx) */,
                     size_t ldx, const int32_t *rows /* (n_tok) or NULL */, void *act);
    /* Products by weight format. n_tok == 1 is decode: bandwidth-bound, strictly sequential reads. */
    void (*mul[DS_FORMAT_COUNT])(const ds_mul *job);

    /* Decode a row to float (the fast form of ds_dequantize_row). */
    void (*dequantize[DS_FORMAT_COUNT])(int64_t n, const void *blocks, float *y /* (n) */);

    /* Small float products for attention. C = alpha * A B^T, or C += A B. */
    void (*gemm_nt)(int m, int n, int k, float alpha, const float *a /* (m, lda) */, size_t lda,
                    const float *b /* (n, ldb) */, size_t ldb, float *c /* (m, ldc) */, size_t ldc);
    void (*gemm_nn_add)(int m, int n, int k, const float *a /* (m, lda) */, size_t lda, const float *b /* (k, ldb) */,
                        size_t ldb, float *c /* (m, ldc) */, size_t ldc);

    void (*attend_f16)(const ds_attend *job); /* kv rows are IEEE half */
    void (*attend_f32)(const ds_attend *job); /* kv rows are float */

    /* y = x * weight / sqrt(mean(x^2) + eps); y may be x. */
    void (*rms_norm)(int n, const float *x, const float *weight /* (n) or NULL */, float eps, float *y);
    float (*exp_sum)(int n, float max, float *x);                          /* x = exp(x - max) in place; returns their sum */
    void (*softmax)(int n, float *x);                                      /* in place, max subtracted */
    void (*silu_mul)(int n, const float *gate, const float *up, float *y); /* y = gate * sigmoid(gate) * up */
    void (*add_scaled)(int n, float scale, const float *x, float *y);      /* y += scale * x */
    void (*f32_to_f16)(int n, const float *x, uint16_t *y);
    void (*f16_to_f32)(int n, const uint16_t *x, float *y);

    /* Yardsticks for benchmarks: read memory in order (returns the XOR of its dwords, up to a tail), and run the int8 dot
     * instruction on data in L1 (returns the number of multiply-adds). */
    uint32_t (*read_all)(size_t n_bytes, const void *p);
    int64_t (*dot_peak)(int n_rounds);
} ds_kernels;

/* The tables compiled into this build that this machine can run, best first; n is set to their number. */
const ds_kernels *const *ds_kernels_available(int *n);

/* The table named by `isa`, or NULL where the build or the machine lacks it; NULL or "" asks for the best. */
const ds_kernels *ds_kernels_find(const char *isa);
