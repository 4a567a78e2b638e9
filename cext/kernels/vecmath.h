/* vecmath.h: elementary functions on vectors of floats, and how to run them over rows. */
#pragma once

/* e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln(2)/2, e^r by a minimax polynomial (3e-9), times 2^n.
 * Under -104 the result is 0, over 89 infinity; NaN stays NaN. */
DS_INLINE vf vf_exp(vf x) {
    /* Written so that a NaN in x is returned by both clamps. */
    x = vf_max(vf_set(-104.0f), x);
    x = vf_min(vf_set(89.0f), x);
    const vf n = vf_round(vf_mul(x, vf_set(0x1.715476p+0f))); /* 1 / ln 2 */
    /* ln 2 in two parts, the first with enough zero bits at its end that n times it is exact. */
    vf r = vf_fnma(n, vf_set(0x1.62ep-1f), x);
    r = vf_fnma(n, vf_set(0x1.0bfbe8p-15f), r);
    /* (e^r - 1 - r) / r^2 */
    vf p = vf_set(0x1.6a2434p-10f);
    p = vf_fma(p, r, vf_set(0x1.1239e2p-7f));
    p = vf_fma(p, r, vf_set(0x1.5558f2p-5f));
    p = vf_fma(p, r, vf_set(0x1.555492p-3f));
    p = vf_fma(p, r, vf_set(0x1.fffffcp-2f));
    const vf e = vf_add(vf_fma(vf_mul(r, r), p, r), vf_set(1.0f));
    return vf_ldexp(e, n);
}

/* 2^x for x <= 0, to about 1.5 ulp: x = n + r with |r| <= 1/2, which is exact, and 2^r by a minimax polynomial (1e-7). Under
 * -150 the result is 0; NaN stays NaN. */
DS_INLINE vf vf_exp2(vf x) {
    x = vf_max(vf_set(-150.0f), x);
    const vf n = vf_round(x), r = vf_sub(x, n);
    vf p = vf_set(0x1.5bba5cp-10f);
    p = vf_fma(p, r, vf_set(0x1.3cea86p-7f));
    p = vf_fma(p, r, vf_set(0x1.c6b752p-5f));
    p = vf_fma(p, r, vf_set(0x1.ebf9bcp-3f));
    p = vf_fma(p, r, vf_set(0x1.62e42ap-1f));
    return vf_ldexp(vf_fma(p, r, vf_set(1.0f)), n);
}

/* Run `full` for each whole vector and `tail` for the rest, where i is the index and n - i the number left over. */
#define DS_FOR_LANES(i, n, full, tail)               \
    do {                                             \
        int i = 0;                                   \
        for (; i + DS_LANES <= (n); i += DS_LANES) { \
            full                                     \
        }                                            \
        if (i < (n)) {                               \
            tail                                     \
        }                                            \
    } while (0)

DS_INLINE void scale_row(int n, float scale, float *x) {
    const vf s = vf_set(scale);
    DS_FOR_LANES(
        i, n, { vf_store(x + i, vf_mul(vf_load(x + i), s)); },
        { vf_store_n(x + i, vf_mul(vf_load_n(x + i, n - i), s), n - i); });
}
