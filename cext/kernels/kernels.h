/* kernels.h: the numeric contract. One table of pure functions per ISA, all compiled from one source (kern.h).
 *
 * A kernel allocates nothing, starts no thread, logs nothing and knows no layer. Integer block sums are bit-equal on
 * every ISA; float results differ by rounding only. A result does not depend on how rows are split between calls as long
 * as splits fall on multiples of DS_PANEL_ROWS.
 *
 * Shapes are row-major, the last index contiguous. k is the length of a weight row (the input width). */
#pragma once

#include "kernels/attention.h"
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

    /* Latent attention (attention.h). rotate is its own inverse; rows_put and query_put overwrite x. */
    void (*rotate)(int n, float *x);
    void (*rows_put)(const ds_rows *rows, int i, int n, int n_tail, float *x /* (n + n_tail) */);
    void (*query_put)(ds_row_kind kind, int i, int n_rows, int n, int n_tail, float *x /* (n + n_tail) */, float scale,
                      void *pack);
    void (*attend)(const ds_attend *job);
    void (*expand_weights)(const ds_expand_weights *job);
    void (*expand)(const ds_expand *job);

    /* y = x * weight / sqrt(mean(x^2) + eps); y may be x. */
    void (*rms_norm)(int n, const float *x, const float *weight /* (n) or NULL */, float eps, float *y);
    float (*exp_sum)(int n, float max, float *x); /* x = exp(x - max) in place; returns their sum */
    void (*softmax)(int n, float *x); /* in place, max subtracted */
    void (*silu_mul)(int n, const float *gate, const float *up, float *y); /* y = gate * sigmoid(gate) * up */
    void (*add_scaled)(int n, float scale, const float *x, float *y); /* y += scale * x */

    /* Yardsticks for benchmarks: read memory in order (returns the XOR of its dwords, up to a tail), run the int8 dot
     * instruction on data in L1 (returns the number of multiply-adds), and wait for cycles (returns their number). */
    uint32_t (*read_all)(size_t n_bytes, const void *p);
    int64_t (*dot_peak)(int n_rounds);
    int64_t (*chain)(int n_rounds);
} ds_kernels;

/* The tables compiled into this build that this machine can run, best first; n is set to their number. */
const ds_kernels *const *ds_kernels_available(int *n);

/* The table named by `isa`, or NULL where the build or the machine lacks it; NULL or "" asks for the best. */
const ds_kernels *ds_kernels_find(const char *isa);
