/* vec.h: the loops that encoding spends its time in. Columns side by side, sums one after the other: whatever the vector
 * width, a row's result is the same. */
#pragma once

#include <string.h>

#define DS_INLINE static inline __attribute__((always_inline, unused))

enum { WIDTH = DS_ENCODE_WIDTH };

/* y += a x; n is a multiple of 16. */
DS_INLINE void axpy(int n, float a, const float *restrict x, float *restrict y) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

/* y += a[0] x[0] + ... + a[3] x[3]: one pass over y for four rows `stride` apart. */
DS_INLINE void axpy4(int n, const float a[4], const float *restrict x, size_t stride, float *restrict y) {
    const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
    for (int i = 0; i < n; i++) y[i] = y[i] + a0 * x[i] + a1 * x[stride + i] + (a2 * x[2 * stride + i] + a3 * x[3 * stride + i]);
}

/* The same for four rows of y, WIDTH apart, and of a, `step` apart: x is loaded once for all. Bit for bit axpy4's. */
DS_INLINE void axpy4_rows4(int n, const float *a, size_t step, const float *restrict x, size_t stride, float *restrict y) {
    for (int i = 0; i < n; i++) {
        const float x0 = x[i], x1 = x[stride + i], x2 = x[2 * stride + i], x3 = x[3 * stride + i];
        for (int r = 0; r < 4; r++) {
            const float *ar = a + (size_t)r * step;
            y[r * WIDTH + i] = y[r * WIDTH + i] + ar[0] * x0 + ar[1] * x1 + (ar[2] * x2 + ar[3] * x3);
        }
    }
}

/* Sum of x y in 16 interleaved parts. */
DS_INLINE float dot(int n, const float *restrict x, const float *restrict y) {
    float part[16] = {0};
    for (int i = 0; i < n; i += 16)
        for (int l = 0; l < 16; l++) part[l] += x[i + l] * y[i + l];
    for (int step = 8; step; step /= 2)
        for (int l = 0; l < step; l++) part[l] += part[l + step];
    return part[0];
}

/* Sum of x, in the same parts. */
DS_INLINE float total(int n, const float *x) {
    float part[16] = {0};
    for (int i = 0; i < n; i += 16)
        for (int l = 0; l < 16; l++) part[l] += x[i + l];
    for (int step = 8; step; step /= 2)
        for (int l = 0; l < step; l++) part[l] += part[l + step];
    return part[0];
}

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it leaves no fraction, halves to even, of |x| < 2^22 */

/* The nearest integer, halves to even, for |x| < 2^22. */
DS_INLINE int nearest(float x) {
    const float shifted = x + ROUND;
    int bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x7fffff) - 0x400000;
}

DS_INLINE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

/* The nearest integer within bounds, for any x; NaN gives low. */
DS_INLINE int nearest_in(float x, int low, int high) {
    if (!(x > (float)low)) return low;
    return x >= (float)high ? high : nearest(x);
}

DS_INLINE float half(float x) { return ds_f16_to_f32(ds_f32_to_f16(x)); }
