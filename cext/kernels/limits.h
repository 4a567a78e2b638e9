/* limits.h: what the machine can do at most, measured with this ISA's instructions: the yardsticks of benchmarks. */
#pragma once

#if DS_HAS_DOTS

/* XOR of all bytes at p, read once in order. */
uint32_t DS_OF(read_all)(size_t n_bytes, const void *p) {
    const char *at = p;
    vi x[8];
    DS_UNROLL
    for (int v = 0; v < 8; v++) x[v] = vi_set(0);
    for (size_t i = 0; i + sizeof x <= n_bytes; i += sizeof x) {
        DS_UNROLL
        for (size_t line = 0; line < sizeof x; line += 64) __builtin_prefetch(at + i + DS_PREFETCH_BYTES + line);
        DS_UNROLL
        for (size_t v = 0; v < 8; v++) x[v] = vi_xor(x[v], vi_load(at + i + v * sizeof(vi)));
    }
    vi all = x[0];
    for (int v = 1; v < 8; v++) all = vi_xor(all, x[v]);
    uint32_t lanes[DS_LANES], sum = 0;
    vi_store(lanes, all);
    for (int i = 0; i < DS_LANES; i++) sum ^= lanes[i];
    return sum;
}

/* The inner loop of panels and nothing else, on data in L1. Returns the number of multiply-adds. */
int64_t DS_OF(dot_peak)(int n_rounds) {
    DS_ALIGNED uint8_t w[8][DS_PANEL_ROWS][4];
    DS_ALIGNED int8_t x[8 * DS_TILE_TOKENS * 4];
    memset(w, 1, sizeof w);
    memset(x, 1, sizeof x);
    vi acc[DS_TILE_TOKENS][2];
    DS_UNROLL
    for (int t = 0; t < DS_TILE_TOKENS; t++) acc[t][0] = acc[t][1] = vi_set(0);
    for (int i = 0; i < n_rounds; i++) {
        __asm__ volatile("" ::: "memory"); /* the data may have changed: load it again */
        panel_dot(CODES_4, 8, DS_TILE_TOKENS, w[0][0], x, acc);
    }
    vi all = acc[0][0];
    for (int t = 0; t < DS_TILE_TOKENS; t++) all = vi_xor(vi_xor(all, acc[t][0]), acc[t][1]);
    vi_store(w, all);
    __asm__ volatile("" ::"r"(w) : "memory");
    return (int64_t)n_rounds * 8 * DS_TILE_TOKENS * 2 * DS_LANES * 4;
}

#else

uint32_t DS_OF(read_all)(size_t n_bytes, const void *p) {
    uint32_t sum = 0, x;
    for (size_t i = 0; i + sizeof x <= n_bytes; i += sizeof x) {
        memcpy(&x, (const char *)p + i, sizeof x);
        sum ^= x;
    }
    return sum;
}

int64_t DS_OF(dot_peak)(int n_rounds) {
    int8_t q[256], x[256];
    int32_t sum = 0;
    memset(q, 1, sizeof q);
    memset(x, 1, sizeof x);
    for (int i = 0; i < n_rounds; i++) {
        __asm__ volatile("" ::: "memory");
        for (int j = 0; j < 256; j += 16) sum += dot16(q + j, x + j);
    }
    __asm__ volatile("" ::"r"(sum));
    return (int64_t)n_rounds * 256;
}

#endif

/* Dependent operations of one cycle each, n_rounds of them: the clock. Returns their number. */
int64_t DS_OF(chain)(int n_rounds) {
    uint64_t x = 1, y = 3;
    __asm__("" : "+r"(y)); /* unknown to the compiler; and an addition of a constant takes no time on some processors */
    for (int i = 0; i < n_rounds; i += 16) {
        DS_UNROLL
        for (int j = 0; j < 16; j++) {
            x ^= y;
            __asm__ volatile("" : "+r"(x));
        }
    }
    return ((int64_t)n_rounds + 15) / 16 * 16;
}
