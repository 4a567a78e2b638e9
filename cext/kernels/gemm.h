/* gemm.h: float matrix products in the BLIS shape: a panel of B (GEMM_K deep, DS_GEMM_VECS vectors wide) is packed into
 * cache once and every row of A runs over it, DS_GEMM_ROWS rows at a time, the sums in registers. */
#pragma once

enum {
    GEMM_COLS = DS_GEMM_VECS * DS_LANES, /* columns of a panel */
    GEMM_K = 192, /* depth of a panel: 24 KB at 32 columns, and a divisor of 192 and 576 */
};

/* How the numbers of B lie in memory. */
typedef enum float_kind { KIND_F32, KIND_F16, KIND_BF16 } float_kind;

DS_INLINE size_t kind_bytes(float_kind kind) { return kind == KIND_F32 ? 4 : 2; }

DS_INLINE vf load_kind(float_kind kind, const void *p) {
    if (kind == KIND_F16) return vf_load_f16(p);
    if (kind == KIND_BF16) return vf_load_bf16(p);
    return vf_load(p);
}

DS_INLINE vf load_kind_n(float_kind kind, const void *p, int n) {
    if (kind == KIND_F16) return vf_load_f16_n(p, n);
    if (kind == KIND_BF16) return vf_load_bf16_n(p, n);
    return vf_load_n(p, n);
}

/* What becomes of a tile of sums: C = alpha sum, or C += alpha sum. */
typedef struct gemm_out {
    float alpha;
    bool add;
    float *c; /* (rows, ldc) */
    size_t ldc;
    int n_cols; /* of GEMM_COLS, those to write */
} gemm_out;

DS_INLINE void gemm_store(const gemm_out *out, int row, vf acc[DS_GEMM_VECS]) {
    float *c = out->c + (size_t)row * out->ldc;
    const vf alpha = vf_set(out->alpha);
    DS_UNROLL
    for (int v = 0; v < DS_GEMM_VECS; v++, c += DS_LANES) {
        const int left = out->n_cols - v * DS_LANES;
        if (left >= DS_LANES) {
            vf_store(c, out->add ? vf_fma(alpha, acc[v], vf_load(c)) : vf_mul(alpha, acc[v]));
        } else if (left > 0) {
            vf_store_n(c, out->add ? vf_fma(alpha, acc[v], vf_load_n(c, left)) : vf_mul(alpha, acc[v]), left);
        }
    }
}

/* rows (a constant) of A against one panel. */
DS_INLINE void gemm_tile(int rows, int k, const float *a, size_t lda, const float *panel, const gemm_out *out,
                         int row0) {
    vf acc[DS_GEMM_ROWS][DS_GEMM_VECS];
    DS_UNROLL
    for (int i = 0; i < rows; i++) DS_UNROLL for (int v = 0; v < DS_GEMM_VECS; v++) acc[i][v] = vf_set(0.0f);
    for (int p = 0; p < k; p++, panel += GEMM_COLS) {
        vf b[DS_GEMM_VECS];
        DS_UNROLL
        for (int v = 0; v < DS_GEMM_VECS; v++) b[v] = vf_load(panel + v * DS_LANES);
        DS_UNROLL
        for (int i = 0; i < rows; i++) {
            const vf x = vf_set(a[(size_t)i * lda + (size_t)p]);
            DS_UNROLL
            for (int v = 0; v < DS_GEMM_VECS; v++) acc[i][v] = vf_fma(x, b[v], acc[i][v]);
        }
    }
    DS_UNROLL
    for (int i = 0; i < rows; i++) gemm_store(out, row0 + i, acc[i]);
}

/* All m rows of A against one panel: whole tiles, then the remainder in powers of two. */
static void gemm_panel(int m, int k, const float *a, size_t lda, const float *panel, const gemm_out *out) {
    int i = 0;
    for (; i + DS_GEMM_ROWS <= m; i += DS_GEMM_ROWS)
        gemm_tile(DS_GEMM_ROWS, k, a + (size_t)i * lda, lda, panel, out, i);
    for (; i + 4 <= m; i += 4) gemm_tile(4, k, a + (size_t)i * lda, lda, panel, out, i);
    if (i + 2 <= m) gemm_tile(2, k, a + (size_t)i * lda, lda, panel, out, i), i += 2;
    if (i < m) gemm_tile(1, k, a + (size_t)i * lda, lda, panel, out, i);
}

/* panel[p][j] = B[j][p] for p < k and j < n_cols rows of B, zero for the other columns. */
DS_INLINE void gemm_pack_rows(float_kind kind, int n_cols, int k, const char *b, size_t row_bytes, float *panel) {
    for (int j0 = 0; j0 < GEMM_COLS; j0 += DS_LANES) {
        for (int p0 = 0; p0 < k; p0 += DS_LANES) {
            const int depth = k - p0 < DS_LANES ? k - p0 : DS_LANES;
            vf tile[DS_LANES];
            DS_UNROLL
            for (int j = 0; j < DS_LANES; j++) {
                const char *row = b + (size_t)(j0 + j) * row_bytes + (size_t)p0 * kind_bytes(kind);
                if (j0 + j >= n_cols) tile[j] = vf_set(0.0f);
                else if (depth == DS_LANES) tile[j] = load_kind(kind, row);
                else tile[j] = load_kind_n(kind, row, depth);
            }
            vf_transpose(tile);
            DS_UNROLL
            for (int p = 0; p < DS_LANES; p++)
                if (p < depth) vf_store(panel + (size_t)(p0 + p) * GEMM_COLS + j0, tile[p]);
        }
    }
}

/* panel[p][j] = B[p][j] for p < k and j < n_cols columns of B, zero for the other columns. */
DS_INLINE void gemm_pack_cols(float_kind kind, int n_cols, int k, const char *b, size_t row_bytes, float *panel) {
    for (int p = 0; p < k; p++, b += row_bytes, panel += GEMM_COLS) {
        DS_UNROLL
        for (int j = 0; j < GEMM_COLS; j += DS_LANES) {
            const char *at = b + (size_t)j * kind_bytes(kind);
            const int left = n_cols - j;
            vf_store(panel + j, left >= DS_LANES ? load_kind(kind, at)
                                : left > 0       ? load_kind_n(kind, at, left)
                                                 : vf_set(0.0f));
        }
    }
}

/* C (m, n) = alpha A (m, k) B^T, B (n, k) of a kind, its rows row_bytes apart. */
DS_INLINE void gemm_nt_kind(float_kind kind, int m, int n, int k, float alpha, const float *a, size_t lda,
                            const void *b, size_t row_bytes, float *c, size_t ldc) {
    DS_ALIGNED float panel[GEMM_K * GEMM_COLS];
    for (int j = 0; j < n; j += GEMM_COLS) {
        const int n_cols = n - j < GEMM_COLS ? n - j : GEMM_COLS;
        for (int p = 0; p < k; p += GEMM_K) {
            const int depth = k - p < GEMM_K ? k - p : GEMM_K;
            const gemm_out out = {.alpha = alpha, .add = p > 0, .c = c + j, .ldc = ldc, .n_cols = n_cols};
            gemm_pack_rows(kind, n_cols, depth, (const char *)b + (size_t)j * row_bytes + (size_t)p * kind_bytes(kind),
                           row_bytes, panel);
            gemm_panel(m, depth, a + p, lda, panel, &out);
        }
    }
}

/* C (m, n) += A (m, k) B, B (k, n) of a kind, its rows row_bytes apart. */
DS_INLINE void gemm_nn_add_kind(float_kind kind, int m, int n, int k, const float *a, size_t lda, const void *b,
                                size_t row_bytes, float *c, size_t ldc) {
    DS_ALIGNED float panel[GEMM_K * GEMM_COLS];
    for (int j = 0; j < n; j += GEMM_COLS) {
        const int n_cols = n - j < GEMM_COLS ? n - j : GEMM_COLS;
        for (int p = 0; p < k; p += GEMM_K) {
            const int depth = k - p < GEMM_K ? k - p : GEMM_K;
            const gemm_out out = {.alpha = 1.0f, .add = true, .c = c + j, .ldc = ldc, .n_cols = n_cols};
            gemm_pack_cols(kind, n_cols, depth, (const char *)b + (size_t)p * row_bytes + (size_t)j * kind_bytes(kind),
                           row_bytes, panel);
            gemm_panel(m, depth, a + p, lda, panel, &out);
        }
    }
}

static void gemm_nt(int m, int n, int k, float alpha, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                    size_t ldc) {
    gemm_nt_kind(KIND_F32, m, n, k, alpha, a, lda, b, ldb * sizeof *b, c, ldc);
}

static void gemm_nn_add(int m, int n, int k, const float *a, size_t lda, const float *b, size_t ldb, float *c,
                        size_t ldc) {
    gemm_nn_add_kind(KIND_F32, m, n, k, a, lda, b, ldb * sizeof *b, c, ldc);
}
