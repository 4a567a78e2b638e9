/* simd_avx2_loads.h: entries of a grid loaded one by one. */
#pragma once

/* 32 indices in eight qwords, in the block itself where they are whole there: the e-th of qword b is that of values
 * 32 b + 8 e to 32 b + 8 e + 7. */
typedef struct grid_index {
    const void *qwords; /* NULL: made */
    int bits, first, mask; /* from one index to the next; where the first begins; of an index */
    __m256i a, b; /* made: four qwords each */
} grid_index;

DS_INLINE grid_index x86_index(__m256i a, __m256i b) {
    return (grid_index){.bits = 16, .mask = 0xffff, .a = a, .b = b};
}
/* Each of 4 bytes in four words. */
DS_INLINE __m256i x86_fours(const uint8_t bytes[4]) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    const __m256i order = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);
    return _mm256_shuffle_epi8(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), order);
}
/* a, with `mask` of words that are copies of bytes times `factors`. */
DS_INLINE __m256i x86_with_high(__m256i a, const uint8_t bytes[4], int64_t factors, int mask) {
    const __m256i moved = _mm256_mullo_epi16(x86_fours(bytes), _mm256_set1_epi64x(factors));
    return _mm256_or_si256(a, _mm256_and_si256(moved, _mm256_set1_epi16((short)mask)));
}

/* The first four bytes of every eight. */
DS_INLINE grid_index grid_index_fours(const void *p) { return (grid_index){.qwords = p, .bits = 8, .mask = 255}; }
/* The low nine bits of words. */
DS_INLINE grid_index grid_index_nines(const void *p) { return (grid_index){.qwords = p, .bits = 16, .mask = 511}; }
/* Bytes, with bits 8 and 9 from pairs of bits. */
DS_INLINE __m256i x86_bytes16(const uint8_t *p) { return _mm256_cvtepu8_epi16(v16_load(p)); }
DS_INLINE grid_index grid_index_tens(const uint8_t low[32], const uint8_t pairs[8]) {
    const int64_t factors = 0x0004001000400100;
    return x86_index(x86_with_high(x86_bytes16(low), pairs, factors, 0x300),
                     x86_with_high(x86_bytes16(low + 16), pairs + 4, factors, 0x300));
}
/* The even or the odd ones of 64 bytes. */
DS_INLINE grid_index grid_index_seconds(const void *p, bool odd) {
    return (grid_index){.qwords = p, .bits = 16, .first = odd ? 8 : 0, .mask = 255};
}
/* The same with bit 8 from 64 bits. */
DS_INLINE __m256i x86_seconds(const void *p, bool odd) {
    return odd ? _mm256_srli_epi16(x86_load(p), 8) : _mm256_and_si256(x86_load(p), _mm256_set1_epi16(255));
}
DS_INLINE grid_index grid_index_seconds_nine(const void *p, const uint8_t bits[8], bool odd) {
    const int64_t factors = odd ? 0x0002000800200080 : 0x0004001000400100;
    return x86_index(x86_with_high(x86_seconds(p, odd), bits, factors, 0x100),
                     x86_with_high(x86_seconds((const char *)p + 32, odd), bits + 4, factors, 0x100));
}

/* Indices in memory, so that qwords are loaded. */
typedef struct grid_places {
    const void *qwords;
    int bits, first, mask;
    DS_ALIGNED __m256i made[2];
} grid_places;

DS_INLINE void x86_put_index(grid_places *places, const grid_index *index) {
    places->bits = index->bits;
    places->first = index->first;
    places->mask = index->mask;
    places->qwords = index->qwords;
    if (index->qwords) return;
    _mm256_store_si256(&places->made[0], index->a);
    _mm256_store_si256(&places->made[1], index->b);
    places->qwords = x86_memory(places->made);
}
/* Index e of block b, by a load of its own. */
DS_INLINE size_t x86_index_load(const grid_places *places, int b, int e) {
    const uint8_t *at = (const uint8_t *)places->qwords + 8 * b + places->bits / 8 * e;
    uint16_t word;
    if (places->bits == 8) return *at;
    memcpy(&word, at, sizeof word);
    return word & (unsigned)places->mask;
}
/* The same out of a general register: where there are twice as many, loads are what is scarce. */
DS_INLINE size_t x86_index_at(const grid_places *places, int b, int e) {
    uint64_t qword;
    memcpy(&qword, (const char *)places->qwords + 8 * b, sizeof qword);
    return qword >> (places->first + places->bits * e) & (unsigned)places->mask;
}

/* 32 codes: entry e of blocks 4 half to 4 half + 3. A value in all lanes is a load alone, and blends run where shuffles
 * cannot. */
DS_INLINE __m256i x86_blend4(const __m256i q[4]) {
    return _mm256_blend_epi32(_mm256_blend_epi32(q[0], q[1], 0x0c), _mm256_blend_epi32(q[2], q[3], 0xc0), 0xf0);
}
DS_INLINE __m256i x86_entries8(const grid8_entry *grid, const grid_places *index, int e, int half) {
    __m256i q[4];
    DS_UNROLL
    for (int b = 0; b < 4; b++) q[b] = _mm256_set1_epi64x((long long)grid[x86_index_load(index, 4 * half + b, e)]);
    return x86_blend4(q);
}
DS_INLINE __m256i x86_entries4(const grid4_entry *grid, const grid_places index[2], int e, int half) {
    __m256i q[4];
    DS_UNROLL
    for (int b = 0; b < 4; b++) {
        const __m256i even = _mm256_set1_epi32((int)grid[x86_index_at(&index[0], 4 * half + b, e)]);
        q[b] = _mm256_blend_epi32(even, _mm256_set1_epi32((int)grid[x86_index_at(&index[1], 4 * half + b, e)]), 0xaa);
    }
    return x86_blend4(q);
}
