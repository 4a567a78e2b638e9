/* simd_neon.h: the vector primitives on ARM: floats in the 128-bit registers of Advanced SIMD; the integer half is
 * simd_neon_int.h. */
#pragma once

#include <arm_neon.h>

#define DS_LANES 4
#define DS_GEMM_ROWS 6
#define DS_GEMM_VECS 4

typedef float32x4_t vf;

DS_INLINE vf vf_set(float x) { return vdupq_n_f32(x); }
DS_INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
DS_INLINE void vf_store(float *p, vf a) { vst1q_f32(p, a); }
DS_INLINE vf vf_load_n(const float *p, int n) {
    float x[4] = {0};
    for (int i = 0; i < n; i++) x[i] = p[i];
    return vld1q_f32(x);
}
DS_INLINE void vf_store_n(float *p, vf a, int n) {
    float x[4];
    vst1q_f32(x, a);
    for (int i = 0; i < n; i++) p[i] = x[i];
}
DS_INLINE vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
DS_INLINE vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
DS_INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
DS_INLINE vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
DS_INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
DS_INLINE vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
/* Not vmaxq: where either is NaN it gives NaN, and these give b. */
DS_INLINE vf vf_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
DS_INLINE vf vf_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
DS_INLINE vf vf_round(vf a) { return vrndnq_f32(a); }

/* Two factors, 2^(n/2) each and exact, so that results under 2^-126 and over 2^127 come out right. */
DS_INLINE vf vf_ldexp(vf a, vf n) {
    const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
    const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
    const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
    return vmulq_f32(vmulq_f32(a, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
}

DS_INLINE float vf_sum(vf a) { return vaddvq_f32(a); }
DS_INLINE float vf_hmax(vf a) { return vmaxnmvq_f32(a); }

DS_INLINE vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
DS_INLINE vf neon_bf16(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
DS_INLINE vf vf_load_bf16(const uint16_t *p) { return neon_bf16(vld1_u16(p)); }
DS_INLINE uint16x4_t neon_halves_n(const uint16_t *p, int n) {
    uint16_t h[4] = {0};
    for (int i = 0; i < n; i++) h[i] = p[i];
    return vld1_u16(h);
}
DS_INLINE vf vf_load_f16_n(const uint16_t *p, int n) { return vcvt_f32_f16(vreinterpret_f16_u16(neon_halves_n(p, n))); }
DS_INLINE vf vf_load_bf16_n(const uint16_t *p, int n) { return neon_bf16(neon_halves_n(p, n)); }

/* v[i] lane j becomes v[j] lane i. */
DS_INLINE void vf_transpose(vf v[4]) {
    const float32x4_t a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]);
    const float32x4_t c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
    v[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    v[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    v[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    v[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

#include "kernels/simd_neon_int.h"
#include "kernels/simd_neon_grid.h"
