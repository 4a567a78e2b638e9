/* float_ops.h: operations on single rows of floats: norms, softmax, activation, conversion. */
#pragma once

/* The sum of squares in double: neither overflow nor lost small values at any width. */
static double sum_of_squares(int n, const float *x) {
    double s[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) s[j] += (double)x[i + j] * (double)x[i + j];
    for (; i < n; i++) s[i % 8] += (double)x[i] * (double)x[i];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

static void rms_norm(int n, const float *x, const float *weight, float eps, float *y) {
    const vf scale = vf_set((float)(1.0 / sqrt(sum_of_squares(n, x) / n + (double)eps)));
    if (weight) {
        DS_FOR_LANES(
            i, n, { vf_store(y + i, vf_mul(vf_mul(vf_load(x + i), scale), vf_load(weight + i))); },
            {
                vf_store_n(y + i, vf_mul(vf_mul(vf_load_n(x + i, n - i), scale), vf_load_n(weight + i, n - i)), n - i);
            });
    } else {
        DS_FOR_LANES(
            i, n, { vf_store(y + i, vf_mul(vf_load(x + i), scale)); },
            { vf_store_n(y + i, vf_mul(vf_load_n(x + i, n - i), scale), n - i); });
    }
}

static float row_max(int n, const float *x) {
    vf max = vf_set(-INFINITY);
    float tail_max = -INFINITY;
    DS_FOR_LANES(
        i, n, { max = vf_max(vf_load(x + i), max); },
        {
            for (int j = i; j < n; j++) tail_max = x[j] > tail_max ? x[j] : tail_max;
        });
    const float lanes_max = vf_hmax(max);
    return lanes_max > tail_max ? lanes_max : tail_max;
}

/* x = exp(x - max), and the sum of it. Lanes past the end hold exp(0 - max) and are not counted. */
static float exp_sum(int n, float max, float *x) {
    const vf shift = vf_set(max);
    vf sum = vf_set(0.0f);
    float tail_sum = 0.0f;
    DS_FOR_LANES(
        i, n,
        {
            const vf e = vf_exp(vf_sub(vf_load(x + i), shift));
            vf_store(x + i, e);
            sum = vf_add(sum, e);
        },
        {
            vf_store_n(x + i, vf_exp(vf_sub(vf_load_n(x + i, n - i), shift)), n - i);
            for (int j = i; j < n; j++) tail_sum += x[j];
        });
    return vf_sum(sum) + tail_sum;
}

static void softmax(int n, float *x) {
    const float sum = exp_sum(n, row_max(n, x), x);
    scale_row(n, 1.0f / sum, x);
}

/* gate / (1 + e^-gate) * up */
DS_INLINE vf silu_mul_lanes(vf gate, vf up) {
    const vf one = vf_set(1.0f);
    const vf e = vf_exp(vf_sub(vf_set(0.0f), gate));
    return vf_mul(vf_div(gate, vf_add(one, e)), up);
}

static void silu_mul(int n, const float *gate, const float *up, float *y) {
    DS_FOR_LANES(
        i, n, { vf_store(y + i, silu_mul_lanes(vf_load(gate + i), vf_load(up + i))); },
        { vf_store_n(y + i, silu_mul_lanes(vf_load_n(gate + i, n - i), vf_load_n(up + i, n - i)), n - i); });
}

static void add_scaled(int n, float scale, const float *x, float *y) {
    const vf s = vf_set(scale);
    DS_FOR_LANES(
        i, n, { vf_store(y + i, vf_fma(s, vf_load(x + i), vf_load(y + i))); },
        { vf_store_n(y + i, vf_fma(s, vf_load_n(x + i, n - i), vf_load_n(y + i, n - i)), n - i); });
}

static void f16_to_f32(int n, const uint16_t *x, float *y) {
    DS_FOR_LANES(
        i, n, { vf_store(y + i, vf_load_f16(x + i)); }, { vf_store_n(y + i, vf_load_f16_n(x + i, n - i), n - i); });
}

static void bf16_to_f32(int n, const uint16_t *x, float *y) {
    DS_FOR_LANES(
        i, n, { vf_store(y + i, vf_load_bf16(x + i)); }, { vf_store_n(y + i, vf_load_bf16_n(x + i, n - i), n - i); });
}
