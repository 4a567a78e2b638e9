/* check_rows.c: operations on rows of floats, and the float products. */
#include "check.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static float *normals(size_t n, float size) {
    float *x = buffer(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = size * random_normal();
    return x;
}

static float *copied(size_t n, const float *x) {
    float *y = buffer(n * sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
}

/* `units` of the last place of each value, and what underflow may lose. */
static double *units(size_t n, const float *want, double units_each) {
    double *bound = buffer(n * sizeof *bound);
    for (size_t i = 0; i < n; i++) bound[i] = units_each * 2 * U * fabs((double)want[i]) + 4 * FLT_TRUE_MIN;
    return bound;
}

static void check_norm(check *c, int n) {
    const size_t size = (size_t)n;
    const float *x = normals(size, 3.0f), *weight = normals(size, 1.0f);
    float *got = buffer(size * sizeof *got), *want = buffer(size * sizeof *want);
    for (int with = 0; with < 2; with++) {
        c->isa->rms_norm(n, x, with ? weight : NULL, 1e-6f, got);
        c->scalar->rms_norm(n, x, with ? weight : NULL, 1e-6f, want);
        close_floats(c, "rms_norm", size, got, want, units(size, want, 4));
    }
}

/* Sums of n numbers differ by their order; exp by its polynomial, with or without fused operations. */
static void check_exp(check *c, int n) {
    const size_t size = (size_t)n;
    const float *x = normals(size, 20.0f);
    float *got = copied(size, x), *want = copied(size, x);
    const float got_sum = c->isa->exp_sum(n, 40.0f, got), want_sum = c->scalar->exp_sum(n, 40.0f, want);
    close_floats(c, "exp_sum", size, got, want, units(size, want, 3));
    close_floats(c, "exp_sum's sum", 1, &got_sum, &want_sum, units(1, &want_sum, n + 3));
    got = copied(size, x), want = copied(size, x);
    c->isa->softmax(n, got);
    c->scalar->softmax(n, want);
    close_floats(c, "softmax", size, got, want, units(size, want, n + 8));
    const float *up = normals(size, 1.0f);
    c->isa->silu_mul(n, x, up, got);
    c->scalar->silu_mul(n, x, up, want);
    close_floats(c, "silu_mul", size, got, want, units(size, want, 8));
}

static void check_limits_of_exp(check *c) {
    const float x[11] = {-INFINITY, -200.0f, -104.0f, -3e38f, 89.0f, 1000.0f, INFINITY, NAN, -100.0f, -90.0f, 88.7f};
    float *got = copied(11, x), *want = copied(11, x);
    c->isa->exp_sum(11, 0.0f, got);
    c->scalar->exp_sum(11, 0.0f, want);
    same_floats(c, "limits of exp", 8, got, want);
    close_floats(c, "small and large exp", 3, got + 8, want + 8, units(3, want + 8, 3));
}

static void check_add_scaled(check *c, int n) {
    const size_t size = (size_t)n;
    const float *x = normals(size, 1.0f), *y = normals(size, 1.0f);
    float *got = copied(size, y), *want = copied(size, y);
    double *bound = buffer(size * sizeof *bound);
    for (size_t i = 0; i < size; i++) bound[i] = 4 * U * (fabs((double)x[i]) + fabs((double)y[i]));
    c->isa->add_scaled(n, 0.3f, x, got);
    c->scalar->add_scaled(n, 0.3f, x, want);
    close_floats(c, "add_scaled", size, got, want, bound);
}

/* All 65536 halves and bfloat16s. */
static void check_halves(check *c) {
    enum { N = 65536 + 3 };
    static const ds_format FORMATS[2] = {DS_FORMAT_F16, DS_FORMAT_BF16};
    uint16_t *halves = buffer(N * sizeof *halves);
    float *got = buffer(N * sizeof *got), *want = buffer(N * sizeof *want);
    for (int i = 0; i < N; i++) halves[i] = (uint16_t)i;
    for (int i = 0; i < 2; i++) {
        c->isa->dequantize[FORMATS[i]](N, halves, got);
        ds_dequantize_row(FORMATS[i], N, halves, want);
        strcpy(c->what, "all numbers of 16 bits");
        same_floats(c, ds_format_get(FORMATS[i])->name, N, got, want);
    }
}

static void check_gemm(check *c, int m, int n, int k) {
    const size_t lda = (size_t)k + 2, ldb = (size_t)(n > k ? n : k) + 1, ldc = (size_t)n + 3, size = (size_t)m * ldc;
    const size_t n_b = (size_t)(n > k ? n : k) * ldb;
    const float *a = normals((size_t)m * lda, 1.0f), *b = normals(n_b, 1.0f), *start = normals(size, 1.0f);
    double *bound = buffer(size * sizeof *bound);
    for (int add = 0; add < 2; add++) {
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double sum = add ? fabs((double)start[(size_t)i * ldc + (size_t)j]) : 0.0;
                for (int p = 0; p < k; p++)
                    sum += fabs((double)a[(size_t)i * lda + (size_t)p] *
                                (double)(add ? b[(size_t)p * ldb + (size_t)j] : b[(size_t)j * ldb + (size_t)p]));
                bound[(size_t)i * ldc + (size_t)j] = 2 * (k + 8) * U * sum;
            }
        float *got = copied(size, start), *want = copied(size, start);
        for (int which = 0; which < 2; which++) {
            const ds_kernels *table = which ? c->scalar : c->isa;
            float *out = which ? want : got;
            if (add) table->gemm_nn_add(m, n, k, a, lda, b, ldb, out, ldc);
            else table->gemm_nt(m, n, k, 0.125f, a, lda, b, ldb, out, ldc);
        }
        close_floats(c, add ? "gemm_nn_add" : "gemm_nt", size, got, want, bound);
    }
    release();
}

void check_rows(check *c) {
    static const int LENGTHS[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 64, 100, 1408};
    static const int SHAPES[][3] = {{1, 1, 1},     {3, 5, 7},     {16, 33, 64}, {13, 70, 192},
                                    {25, 31, 577}, {1, 128, 200}, {40, 1, 10}};
    for (size_t i = 0; i < sizeof LENGTHS / sizeof *LENGTHS; i++) {
        snprintf(c->what, sizeof c->what, "rows of %d", LENGTHS[i]);
        check_norm(c, LENGTHS[i]);
        check_exp(c, LENGTHS[i]);
        check_add_scaled(c, LENGTHS[i]);
        release();
    }
    check_limits_of_exp(c);
    check_halves(c);
    release();
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
        snprintf(c->what, sizeof c->what, "matrices (%d, %d, %d)", SHAPES[i][0], SHAPES[i][1], SHAPES[i][2]);
        check_gemm(c, SHAPES[i][0], SHAPES[i][1], SHAPES[i][2]);
    }
}
