/* simd_scalar.h: the vector primitives with one lane, in plain C: the reference table that runs everywhere. */
#pragma once

#include <math.h>
#include <string.h>

#define DS_LANES 1
#define DS_GEMM_ROWS 4
#define DS_GEMM_VECS 4

typedef float vf;

DS_INLINE vf vf_set(float x) { return x; }
DS_INLINE vf vf_load(const float *p) { return *p; }
DS_INLINE void vf_store(float *p, vf a) { *p = a; }
/* The first n lanes, 0 < n <= DS_LANES; lanes past them load as zero and are not stored. */
DS_INLINE vf vf_load_n(const float *p, int n) { return *p; }
DS_INLINE void vf_store_n(float *p, vf a, int n) { *p = a; }
DS_INLINE vf vf_add(vf a, vf b) { return a + b; }
DS_INLINE vf vf_sub(vf a, vf b) { return a - b; }
DS_INLINE vf vf_mul(vf a, vf b) { return a * b; }
DS_INLINE vf vf_div(vf a, vf b) { return a / b; }
DS_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }   /* a b + c */
DS_INLINE vf vf_fnma(vf a, vf b, vf c) { return c - a * b; }  /* c - a b */
DS_INLINE vf vf_max(vf a, vf b) { return a > b ? a : b; }     /* b where either is NaN */
DS_INLINE vf vf_min(vf a, vf b) { return a < b ? a : b; }
DS_INLINE vf vf_abs(vf a) { return fabsf(a); }
DS_INLINE float vf_sum(vf a) { return a; }
DS_INLINE float vf_hmax(vf a) { return a; }

/* To the nearest integer, ties to even, for |a| < 2^22. */
DS_INLINE vf vf_round(vf a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
/* a * 2^n for an integral n in [-250, 250], rounded once at the end: two exact factors, so that subnormals come out right.
 * Where n is NaN so is a, and C leaves the conversion of a NaN undefined. */
DS_INLINE vf vf_ldexp(vf a, vf n) { return n == n ? ldexpf(a, (int)n) : a; }

DS_INLINE vf vf_load_f16(const uint16_t *p) { return ds_f16_to_f32(*p); }
DS_INLINE vf vf_load_f16_n(const uint16_t *p, int n) { return ds_f16_to_f32(*p); }
DS_INLINE vf vf_load_bf16(const uint16_t *p) { return ds_bf16_to_f32(*p); }
DS_INLINE vf vf_load_bf16_n(const uint16_t *p, int n) { return ds_bf16_to_f32(*p); }
/* v[i] lane j becomes v[j] lane i. */
DS_INLINE void vf_transpose(vf v[DS_LANES]) {}

/* Q8 packs are in row order for any number of tokens, and products go through the plain decoders. */
#define DS_ROW_TOKENS INT32_MAX
#define DS_TILE_TOKENS 1

DS_INLINE float f32_max_abs32(const float *x) {
    float max = 0.0f;
    for (int i = 0; i < 32; i++) max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    return max;
}

/* q[0..32) = x * inverse to nearest even; sums of the two halves. */
DS_INLINE void f32_quantize32(const float *x, float inverse, int8_t *q, int sums[2]) {
    for (int h = 0; h < 2; h++) {
        sums[h] = 0;
        for (int i = 16 * h; i < 16 * h + 16; i++) {
            /* Adding 1.5 * 2^23 leaves the rounded integer in the low bits. */
            const float shifted = x[i] * inverse + 0x1.8p23f;
            int32_t bits;
            memcpy(&bits, &shifted, sizeof bits);
            q[i] = (int8_t)(bits - 0x4b400000);
            sums[h] += q[i];
        }
    }
}
