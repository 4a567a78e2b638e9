/* act.h: activation packs. F32 packs are float rows; Q8 packs hold each 32 values as int8 with one float scale, and the sum
 * of every 16 of them, so that a format's offset or minimum stays an exact integer product. */
#pragma once

enum { ACT_BLOCK = 32 };

/* A Q8 pack in row order: the planes one after the other, each token's row padded to whole cache lines. */
typedef struct act_rows {
    int8_t *q;     /* (n_tok, q_stride) */
    float *scale;  /* (n_tok, scale_stride): one per 32 values */
    int16_t *sums; /* (n_tok, sums_stride): of every 16 values */
    size_t q_stride, scale_stride, sums_stride;
    size_t n_bytes;
} act_rows;

DS_INLINE size_t act_round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* Strides and size alone, without a place. */
DS_INLINE act_rows act_rows_layout(int n_tok, int k) {
    act_rows a = {0};
    a.q_stride = act_round_up((size_t)k, 256);
    a.scale_stride = act_round_up((size_t)k / 32, 16);
    a.sums_stride = act_round_up((size_t)k / 16, 32);
    a.n_bytes = (size_t)n_tok * (a.q_stride + a.scale_stride * sizeof *a.scale + a.sums_stride * sizeof *a.sums);
    return a;
}

DS_INLINE act_rows act_rows_at(const void *act, int n_tok, int k) {
    act_rows a = act_rows_layout(n_tok, k);
    a.q = (int8_t *)act;
    a.scale = (float *)(a.q + (size_t)n_tok * a.q_stride);
    a.sums = (int16_t *)(a.scale + (size_t)n_tok * a.scale_stride);
    return a;
}

/* Quantise 32 values: scale = max|x| / 127, q = x / scale to the nearest, ties to even. A block under 2^-100 is zero: its
 * inverse would overflow. The sums are of 16 values each. */
DS_INLINE float act_quantize(const float *x, int8_t *q, int16_t sums[2]) {
    float max = 0.0f;
    for (int i = 0; i < 32; i++) max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    const float inverse = max < 0x1p-100f ? 0.0f : 127.0f / max;
    for (int h = 0; h < 2; h++) {
        int sum = 0;
        for (int i = 16 * h; i < 16 * h + 16; i++) {
            /* Adding 1.5 * 2^23 leaves the rounded integer in the low bits. */
            const float shifted = x[i] * inverse + 0x1.8p23f;
            int32_t bits;
            memcpy(&bits, &shifted, sizeof bits);
            q[i] = (int8_t)(bits - 0x4b400000);
            sum += q[i];
        }
        sums[h] = (int16_t)sum;
    }
    return max < 0x1p-100f ? 0.0f : max / 127.0f;
}

static size_t act_bytes(ds_act_kind kind, int n_tok, int k) {
    const size_t f32_bytes = (size_t)n_tok * (size_t)k * sizeof(float);
    return act_round_up(kind == DS_ACT_F32 ? f32_bytes : act_rows_layout(n_tok, k).n_bytes, DS_ACT_ALIGN);
}

static void act_pack(ds_act_kind kind, int tok_begin, int tok_end, int n_tok, int k, const float *x, size_t ldx,
                     const int32_t *rows, void *act) {
    const act_rows a = act_rows_at(act, n_tok, k);
    for (int t = tok_begin; t < tok_end; t++) {
        const float *row = x + (size_t)(rows ? rows[t] : t) * ldx;
        if (kind == DS_ACT_F32) {
            memcpy((float *)act + (size_t)t * (size_t)k, row, (size_t)k * sizeof *row);
            continue;
        }
        for (int b = 0; b < k / ACT_BLOCK; b++)
            a.scale[(size_t)t * a.scale_stride + (size_t)b] =
                act_quantize(row + 32 * b, a.q + (size_t)t * a.q_stride + 32 * b, a.sums + (size_t)t * a.sums_stride + 2 * b);
    }
}
