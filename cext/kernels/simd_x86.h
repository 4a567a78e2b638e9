/* simd_x86.h: the vector primitives on x86: floats in ymm (AVX2) or zmm (AVX-512) registers; the integer half
 * is simd_x86_int.h. */
#pragma once

#include <immintrin.h>

#if defined(__AVX512F__)

#define DS_LANES 16
#define DS_GEMM_ROWS 12
#define DS_GEMM_VECS 2

typedef __m512 vf;

DS_INLINE __mmask16 x86_first(int n) { return (__mmask16)(0xffffu >> (16 - n)); }

DS_INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
DS_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
DS_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
DS_INLINE vf vf_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(x86_first(n), p); }
DS_INLINE void vf_store_n(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, x86_first(n), a); }
DS_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
DS_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
DS_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
DS_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
DS_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
DS_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
DS_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
DS_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
DS_INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
DS_INLINE vf vf_ldexp(vf a, vf n) { return _mm512_scalef_ps(a, n); }
DS_INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
DS_INLINE float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }

DS_INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
DS_INLINE vf vf_load_f16_n(const uint16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(x86_first(n), p));
}
DS_INLINE vf x86_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
DS_INLINE vf vf_load_bf16(const uint16_t *p) { return x86_bf16(_mm256_loadu_si256((const __m256i *)p)); }
DS_INLINE vf vf_load_bf16_n(const uint16_t *p, int n) { return x86_bf16(_mm256_maskz_loadu_epi16(x86_first(n), p)); }

/* v[i] lane j becomes v[j] lane i: 4x4 within the 128-bit quarters, then the quarters. */
DS_INLINE void vf_transpose(vf v[16]) {
    vf t[16];
    DS_UNROLL
    for (int i = 0; i < 16; i += 4) {
        const vf a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
        const vf c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        const vf a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
        const vf c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88),
                 d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
        v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        v[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
        v[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
        v[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

#else

#define DS_LANES 8
#define DS_GEMM_ROWS 6
#define DS_GEMM_VECS 2

typedef __m256 vf;

/* Eight lanes of ones from p + 8 - n on begin with n ones. */
DS_INLINE __m256i x86_first(int n) {
    static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones + 8 - n));
}

DS_INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
DS_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
DS_INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
DS_INLINE vf vf_load_n(const float *p, int n) { return _mm256_maskload_ps(p, x86_first(n)); }
DS_INLINE void vf_store_n(float *p, vf a, int n) { _mm256_maskstore_ps(p, x86_first(n), a); }
DS_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
DS_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
DS_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
DS_INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
DS_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
DS_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
DS_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
DS_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
DS_INLINE vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* Two factors, 2^(n/2) each and exact, so that results under 2^-126 and over 2^127 come out right. */
DS_INLINE vf vf_ldexp(vf a, vf n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

DS_INLINE float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

DS_INLINE float vf_hmax(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* AVX2 masks no 16-bit loads: the halves past n are left zero by copying. */
DS_INLINE __m128i x86_halves_n(const uint16_t *p, int n) {
    uint16_t h[8] = {0};
    for (int i = 0; i < n; i++) h[i] = p[i];
    return _mm_loadu_si128((const __m128i *)h);
}

DS_INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
DS_INLINE vf vf_load_f16_n(const uint16_t *p, int n) { return _mm256_cvtph_ps(x86_halves_n(p, n)); }
DS_INLINE vf x86_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
DS_INLINE vf vf_load_bf16(const uint16_t *p) { return x86_bf16(_mm_loadu_si128((const __m128i *)p)); }
DS_INLINE vf vf_load_bf16_n(const uint16_t *p, int n) { return x86_bf16(x86_halves_n(p, n)); }

/* v[i] lane j becomes v[j] lane i: 4x4 within the 128-bit halves, then the halves. */
DS_INLINE void vf_transpose(vf v[8]) {
    vf t[8];
    DS_UNROLL
    for (int i = 0; i < 8; i += 4) {
        const vf a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
        const vf c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
        v[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
    }
}

#endif

#include "kernels/simd_x86_int.h"
#include "kernels/simd_x86_grid.h"
#if DS_ROW_CROSSED
#include "kernels/simd_x86_crossed.h"
#include "kernels/simd_x86_woven.h"
#endif
