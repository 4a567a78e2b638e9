/* simd_neon_mm.h: products with panels on ARM's matrix instruction (i8mm). It multiplies two rows of weights by two
 * tokens, eight values of each: vector 2 p + h of row vector v holds rows 4 v + 2 h and the one after it, each by
 * tokens 2 p and 2 p + 1. Past an odd number of tokens the last pair's second half is whatever lies there, and is never
 * used. */
#pragma once

#define DS_TILE_PAIRS 1
#define DS_TILE_TOKENS 6

DS_INLINE int tile_vecs(int n_tok) { return (n_tok + 1) / 2 * 2; }
DS_INLINE vf tile_rows(const float *rows, int t, int v) {
    const vf four = vf_load(rows + v * DS_LANES);
    return t % 2 ? vzip2q_f32(four, four) : vzip1q_f32(four, four);
}
DS_INLINE uint64x2_t neon_two_tokens(const void *tokens, int t) {
    uint64_t two;
    memcpy(&two, (const char *)tokens + t / 2 * 8, sizeof two);
    return vdupq_n_u64(two);
}
DS_INLINE vf tile_tokens(const float *tokens, int t) { return vreinterpretq_f32_u64(neon_two_tokens(tokens, t)); }
DS_INLINE vi tile_ints(const int32_t *tokens, int t) { return vreinterpretq_u32_u64(neon_two_tokens(tokens, t)); }
DS_INLINE vi tile_ints2(const int32_t *a, const int32_t *b, int t) { return vi_add(tile_ints(a, t), tile_ints(b, t)); }
/* Eight values of a token side by side. */
DS_INLINE size_t tile_dword(size_t d, size_t n, size_t token) { return 8 * (d / 2 * n + token) + d % 2 * 4; }
/* And of a row: rows 2 i and 2 i + 1 of four in vector i of two dwords' vectors. */
DS_INLINE void tile_weights(int n_k4, uint8_t (*q)[DS_PANEL_ROWS][4]) {
    for (int k4 = 0; k4 < n_k4; k4 += 2) DS_UNROLL
    for (int row = 0; row < DS_PANEL_ROWS; row += DS_LANES) {
        const vi a = vi_load(q[k4][row]), b = vi_load(q[k4 + 1][row]);
        vi_store(q[k4][row], vzip1q_u32(a, b));
        vi_store(q[k4 + 1][row], vzip2q_u32(a, b));
    }
}
DS_INLINE const float *tile_line(const float *sums, int t, float line[DS_PANEL_ROWS]) {
    const float *pair = sums + t / 2 * 2 * DS_PANEL_ROWS;
    for (int row = 0; row < DS_PANEL_ROWS; row += DS_LANES) {
        const vf a = vf_load(pair + row), b = vf_load(pair + DS_PANEL_ROWS + row);
        vf_store(line + row, t % 2 ? vuzp2q_f32(a, b) : vuzp1q_f32(a, b));
    }
    return line;
}

/* acc[2 p + h][v] += dots over n_k4 dwords of k. n_tok and n_k4 are constants. */
DS_INLINE void panel_dot(code_range range, int n_k4, int n_tok, const uint8_t *w, const int8_t *a,
                         vi acc[DS_TILE_TOKENS][2]) {
    DS_UNROLL
    for (int i = 0; i < n_k4; i += 2) {
        const int8_t *rows = (const int8_t *)w + (size_t)i * 4 * DS_PANEL_ROWS, *tokens = a + 4 * i * n_tok;
        int8x16_t x[DS_TILE_TOKENS / 2];
        DS_UNROLL
        for (int t = 0; t < n_tok; t += 2) x[t / 2] = vld1q_s8(tokens + 8 * t);
        DS_UNROLL
        for (int h = 0; h < 2; h++) {
            const int8x16_t w0 = vld1q_s8(rows + h * 4 * DS_PANEL_ROWS),
                            w1 = vld1q_s8(rows + h * 4 * DS_PANEL_ROWS + 16);
            DS_UNROLL
            for (int t = h; t < tile_vecs(n_tok); t += 2) {
                acc[t][0] = vreinterpretq_u32_s32(vmmlaq_s32(vreinterpretq_s32_u32(acc[t][0]), w0, x[t / 2]));
                acc[t][1] = vreinterpretq_u32_s32(vmmlaq_s32(vreinterpretq_s32_u32(acc[t][1]), w1, x[t / 2]));
            }
        }
    }
}
