/* lanes.h: rows side by side, one in each lane of a vector. Every sum of a row runs along its columns in its own lane, in
 * an order that neither the other rows nor the width of the vectors changes. */
#pragma once

#include <stddef.h>
#include <string.h>

#define DS_INLINE static inline __attribute__((always_inline, unused))

#if defined __AVX512F__
enum { LANES = 16 };
#elif defined __AVX__
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int mask __attribute__((vector_size(4 * LANES))); /* all ones where something holds */

enum { WIDTH = DS_ENCODE_WIDTH, TILE = 8 /* columns whose sums are in registers together */ };

/* a where m holds, else b. */
DS_INLINE lanes pick(mask m, lanes a, lanes b) { return (lanes)((m & (mask)a) | (~m & (mask)b)); }

DS_INLINE lanes splat(float x) { return (lanes){0} + x; }

DS_INLINE lanes larger(lanes a, lanes b) { return pick(a > b, a, b); }

DS_INLINE lanes smaller(lanes a, lanes b) { return pick(a < b, a, b); }

DS_INLINE lanes size_of(lanes x) { return (lanes)((mask)x & 0x7fffffff); }

/* Bit l where m holds in lane l. */
DS_INLINE unsigned bits_of(mask m) {
    static const int place[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                  1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    int lane[LANES], bits = 0;
    memcpy(lane, &m, sizeof lane);
    for (int l = 0; l < LANES; l++) bits |= lane[l] & place[l];
    return (unsigned)bits;
}

DS_INLINE bool any(mask m) { return bits_of(m) != 0; }

#define TINY 1e-30f /* the smallest sum that may be divided by */

/* 1 / x, 0 where that is too large. */
DS_INLINE lanes inverse(lanes x) {
    const mask usable = size_of(x) > TINY;
    return pick(usable, 1.0f / pick(usable, x, splat(1.0f)), splat(0.0f));
}

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it leaves no fraction, halves to even, of |x| < 2^22 */

/* The nearest integer within bounds, halves to even; NaN gives low. */
DS_INLINE lanes nearest_in(lanes x, float low, float high) {
    return (smaller(larger(x, splat(low)), splat(high)) + ROUND) - ROUND;
}

/* As halves round it. */
DS_INLINE lanes half(lanes x) {
    for (int l = 0; l < LANES; l++) x[l] = ds_f16_to_f32(ds_f32_to_f16(x[l]));
    return x;
}

/* sum[c] += x[k] m[k][c] for k < n and c < TILE. */
DS_INLINE void add_products(int n, const lanes *restrict x, const float (*restrict m)[TILE], lanes *restrict sum) {
    lanes s[TILE];
    for (int c = 0; c < TILE; c++) s[c] = sum[c];
    for (int k = 0; k < n; k++)
        for (int c = 0; c < TILE; c++) s[c] += x[k] * m[k][c];
    for (int c = 0; c < TILE; c++) sum[c] = s[c];
}

/* n columns of LANES rows, `stride` apart, side by side; rows from `n_rows` on are zeros. */
DS_INLINE void rows_to_lanes(int n, int n_rows, const float *restrict rows, size_t stride, lanes *restrict x) {
    float *out = (float *)x;
    if (n_rows < LANES) memset(x, 0, (size_t)n * sizeof *x);
    for (int k = 0; k < n; k += 16)
        for (int l = 0; l < n_rows; l++)
            for (int i = 0; i < 16; i++) out[(k + i) * LANES + l] = rows[(size_t)l * stride + (size_t)(k + i)];
}

DS_INLINE void lanes_to_rows(int n, int n_rows, const lanes *restrict x, float *restrict rows, size_t stride) {
    const float *in = (const float *)x;
    for (int k = 0; k < n; k += 16)
        for (int l = 0; l < n_rows; l++)
            for (int i = 0; i < 16; i++) rows[(size_t)l * stride + (size_t)(k + i)] = in[(k + i) * LANES + l];
}
