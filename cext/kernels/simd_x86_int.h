/* simd_x86_int.h: the integer primitives on x86, for products with coded weights.
 *
 * vi: DS_LANES dwords; in a panel a lane is a weight row and its dword four consecutive values of it.
 * v32, v16, f8: 32 or 16 bytes and 8 floats, whatever the ISA, for products along a row. */
#pragma once

#define DS_HAS_DOTS 1 /* this ISA has the fast products */

/* Index of a shuffle that copies byte `byte` of every dword to all four of its bytes. */
#define X86_COPY_BYTE(byte) _mm_set_epi32((int)(DS_BYTES(12 + (byte))), (int)(DS_BYTES(8 + (byte))), (int)(DS_BYTES(4 + (byte))), (int)(DS_BYTES(byte)))

#if defined(__AVX512F__)

typedef __m512i vi;

DS_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
DS_INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
DS_INLINE vi vi_set(uint32_t x) { return _mm512_set1_epi32((int)x); }
DS_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
DS_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
DS_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
DS_INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
DS_INLINE vi vi_shr(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
DS_INLINE vi vi_shl(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
DS_INLINE vi vi_sar(vi a, int n) { return _mm512_srai_epi32(a, (unsigned)n); } /* keeps the sign */
/* table[b] for each byte b < 16 */
DS_INLINE vi vi_lookup(const int8_t table[16], vi index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), index);
}
/* a, with 16 in byte b of each dword whose bit 4 g + b is set in bits; a's bytes are below 16. */
DS_INLINE vi vi_fifth_bits(vi a, vi bits, int g) {
    const vi copies = _mm512_shuffle_epi8(bits, _mm512_broadcast_i32x4(X86_COPY_BYTE(g / 2)));
    const __mmask64 set = _mm512_test_epi8_mask(copies, vi_set(g % 2 ? 0x80402010u : 0x08040201u));
    return _mm512_mask_add_epi8(a, set, a, vi_set(DS_BYTES(16)));
}
DS_INLINE vf vi_to_float(vi a) { return _mm512_cvtepi32_ps(a); }
DS_INLINE vf vi_low_f16(vi a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); } /* of each dword's low half */
DS_INLINE vi vf_as_int(vf a) { return _mm512_castps_si512(a); }
DS_INLINE vf vi_as_float(vi a) { return _mm512_castsi512_ps(a); }

/* out[i] lane r = dword i of the 16 bytes at rows[r] + at. */
DS_INLINE void vi_columns4(const uint8_t *const rows[DS_LANES], size_t at, vi out[4]) {
    vi a[4];
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[i] + at)));
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)(rows[4 + i] + at)), 1);
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)(rows[8 + i] + at)), 2);
        a[i] = _mm512_inserti32x4(a[i], _mm_loadu_si128((const __m128i *)(rows[12 + i] + at)), 3);
    }
    const vi b = _mm512_unpacklo_epi32(a[0], a[1]), c = _mm512_unpackhi_epi32(a[0], a[1]);
    const vi d = _mm512_unpacklo_epi32(a[2], a[3]), e = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(b, d);
    out[1] = _mm512_unpackhi_epi64(b, d);
    out[2] = _mm512_unpacklo_epi64(c, e);
    out[3] = _mm512_unpackhi_epi64(c, e);
}

#else

typedef __m256i vi;

DS_INLINE vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
DS_INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256(p, a); }
DS_INLINE vi vi_set(uint32_t x) { return _mm256_set1_epi32((int)x); }
DS_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
DS_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
DS_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
DS_INLINE vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
DS_INLINE vi vi_shr(vi a, int n) { return _mm256_srli_epi32(a, n); }
DS_INLINE vi vi_shl(vi a, int n) { return _mm256_slli_epi32(a, n); }
DS_INLINE vi vi_sar(vi a, int n) { return _mm256_srai_epi32(a, n); }
DS_INLINE vi vi_lookup(const int8_t table[16], vi index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), index);
}
DS_INLINE vi vi_fifth_bits(vi a, vi bits, int g) {
    const vi copies = _mm256_shuffle_epi8(bits, _mm256_broadcastsi128_si256(X86_COPY_BYTE(g / 2)));
    const vi mask = vi_set(g % 2 ? 0x80402010u : 0x08040201u);
    const vi set = _mm256_cmpeq_epi8(vi_and(copies, mask), mask);
    return vi_or(a, vi_and(set, vi_set(DS_BYTES(16))));
}
DS_INLINE vf vi_to_float(vi a) { return _mm256_cvtepi32_ps(a); }
DS_INLINE vf vi_low_f16(vi a) {
    const vi halves = _mm256_packus_epi32(vi_and(a, vi_set(0xffff)), _mm256_setzero_si256());
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
}
DS_INLINE vi vf_as_int(vf a) { return _mm256_castps_si256(a); }
DS_INLINE vf vi_as_float(vi a) { return _mm256_castsi256_ps(a); }

DS_INLINE void vi_columns4(const uint8_t *const rows[DS_LANES], size_t at, vi out[4]) {
    vi a[4];
    DS_UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(rows[i] + at)));
        a[i] = _mm256_inserti128_si256(a[i], _mm_loadu_si128((const __m128i *)(rows[4 + i] + at)), 1);
    }
    const vi b = _mm256_unpacklo_epi32(a[0], a[1]), c = _mm256_unpackhi_epi32(a[0], a[1]);
    const vi d = _mm256_unpacklo_epi32(a[2], a[3]), e = _mm256_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm256_unpacklo_epi64(b, d);
    out[1] = _mm256_unpackhi_epi64(b, d);
    out[2] = _mm256_unpacklo_epi64(c, e);
    out[3] = _mm256_unpackhi_epi64(c, e);
}

#endif

/* out[i] lane r = dword i of the 4 DS_LANES bytes at rows[r] + at. */
DS_INLINE void vi_columns(const uint8_t *const rows[DS_LANES], size_t at, vi out[DS_LANES]) {
    vf t[DS_LANES];
    DS_UNROLL
    for (int r = 0; r < DS_LANES; r++) t[r] = vf_load((const float *)(const void *)(rows[r] + at));
    vf_transpose(t);
    DS_UNROLL
    for (int i = 0; i < DS_LANES; i++) out[i] = vf_as_int(t[i]);
}

/* ---- Along a row ---- */

typedef __m256i v32;
typedef __m128i v16;
typedef __m256 f8;

DS_INLINE v32 v32_load(const void *p) { return _mm256_loadu_si256(p); }
DS_INLINE v32 v32_set(int x) { return _mm256_set1_epi8((char)x); }
DS_INLINE v32 v32_zero(void) { return _mm256_setzero_si256(); }
DS_INLINE v32 v32_and(v32 a, v32 b) { return _mm256_and_si256(a, b); }
DS_INLINE v32 v32_or(v32 a, v32 b) { return _mm256_or_si256(a, b); }
/* Each byte's bits n..7 move down; what comes in from the neighbour stays to be masked away. */
DS_INLINE v32 v32_shr(v32 a, int n) { return _mm256_srli_epi16(a, n); }
DS_INLINE v32 v32_shl(v32 a, int n) { return _mm256_slli_epi16(a, n); }
/* The 16 low halves of the bytes at p, then the 16 high halves. */
DS_INLINE v32 v32_nibbles(const void *p) {
    const v32 twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(p));
    return v32_and(_mm256_srlv_epi64(twice, _mm256_set_epi64x(4, 4, 0, 0)), v32_set(15));
}
DS_INLINE v32 v32_lookup(const int8_t table[16], v32 index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), index);
}
/* a, with 16 in each byte i whose bit i of the 32 bits at p is set; a's bytes are below 16. */
DS_INLINE v32 v32_fifth_bits(v32 a, const void *p) {
    uint32_t bits;
    memcpy(&bits, p, sizeof bits);
#if defined(__AVX512VL__)
    return _mm256_mask_add_epi8(a, bits, a, v32_set(16));
#else
    const v32 index = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const v32 mask = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const v32 copies = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), index);
    return v32_or(a, v32_and(_mm256_cmpeq_epi8(v32_and(copies, mask), mask), v32_set(16)));
#endif
}

DS_INLINE f8 f8_set(float x) { return _mm256_set1_ps(x); }
DS_INLINE f8 f8_load(const float *p) { return _mm256_loadu_ps(p); }
DS_INLINE void f8_store(float *p, f8 a) { _mm256_storeu_ps(p, a); }
DS_INLINE f8 f8_add(f8 a, f8 b) { return _mm256_add_ps(a, b); }
DS_INLINE f8 f8_sub(f8 a, f8 b) { return _mm256_sub_ps(a, b); }
DS_INLINE f8 f8_mul(f8 a, f8 b) { return _mm256_mul_ps(a, b); }
DS_INLINE f8 f8_fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }
DS_INLINE float f8_sum(f8 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
DS_INLINE float f32_of_f16(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
/* Eight halves, the first at p and each `step` bytes after the one before. */
DS_INLINE f8 f8_halves(const uint8_t *p, size_t step) {
    uint16_t h[8];
    DS_UNROLL
    for (int i = 0; i < 8; i++) memcpy(&h[i], p + (size_t)i * step, 2);
    return _mm256_cvtph_ps(_mm_setr_epi16((short)h[0], (short)h[1], (short)h[2], (short)h[3], (short)h[4], (short)h[5], (short)h[6], (short)h[7]));
}
/* Eight unsigned, or signed, bytes as floats. */
DS_INLINE f8 f8_bytes(uint64_t bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes))); }
DS_INLINE f8 f8_signed_bytes(uint64_t bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes))); }

/* Products of 4 neighbours summed, 8 sums, as floats. u: unsigned below 128. s: -127..127. */
DS_INLINE __m256i x86_dot(__m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), u, s);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
#endif
}
DS_INLINE f8 v32_dot(v32 u, v32 s) { return _mm256_cvtepi32_ps(x86_dot(u, s)); }
/* w signed, -128..127: |w| times s with w's sign. Two products of 128 * 127 just fit 16 bits. */
DS_INLINE f8 v32_dot_signed(v32 w, v32 s) { return _mm256_cvtepi32_ps(x86_dot(_mm256_abs_epi8(w), _mm256_sign_epi8(s, w))); }
/* The same with the first 16 products times sub-scale 2 j of sc and the others times 2 j + 1; u below 64. */
DS_INLINE f8 v32_dot_scaled(v32 u, v32 s, v16 sc, int j) {
    const v16 index = _mm_set_epi64x((long long)0x0101010101010101 * (2 * j + 1), (long long)0x0101010101010101 * (2 * j));
    const __m256i scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sc, index));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(u, s), scales));
}
DS_INLINE v16 v16_load(const void *p) { return _mm_loadu_si128(p); }
DS_INLINE v16 v16_set(int x) { return _mm_set1_epi8((char)x); }
DS_INLINE v16 v16_and(v16 a, v16 b) { return _mm_and_si128(a, b); }
DS_INLINE v16 v16_high_nibbles(v16 a) { return _mm_and_si128(_mm_srli_epi16(a, 4), _mm_set1_epi8(15)); }
DS_INLINE v16 v16_sub(v16 a, v16 b) { return _mm_sub_epi8(a, b); }
/* Sums of 16 values, two by two: sums[2 i] + sums[2 i + 1], as floats. */
DS_INLINE f8 f8_pair_sums(const int16_t sums[16]) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)sums), _mm256_set1_epi16(1)));
}
/* sums[2 i] * m[2 i] + sums[2 i + 1] * m[2 i + 1] for signed bytes m, as floats. */
DS_INLINE f8 f8_weighted_sums(const int16_t sums[16], v16 m) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)sums), _mm256_cvtepi8_epi16(m)));
}

/* ---- Packing and multiplying in panels ---- */

#define DS_ROW_TOKENS 4 /* up to here a row is decoded for all tokens at once; above it, a panel pays */

/* q[0..32) = x * inverse to nearest even; sums of the two halves. */
DS_INLINE void f32_quantize32(const float *x, float inverse, int8_t *q, int sums[2]) {
    const __m256 s = _mm256_set1_ps(inverse);
    __m256i d[4];
    DS_UNROLL
    for (int i = 0; i < 4; i++) d[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), s));
    const __m256i words = _mm256_packs_epi32(d[0], d[1]), more = _mm256_packs_epi32(d[2], d[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), order);
    _mm256_storeu_si256((__m256i *)q, bytes);
    /* Sums of absolute differences from zero, of the values plus 128. */
    const __m256i sad = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8((char)0x80)), _mm256_setzero_si256());
    const __m128i low = _mm256_castsi256_si128(sad), high = _mm256_extracti128_si256(sad, 1);
    sums[0] = _mm_cvtsi128_si32(_mm_add_epi64(low, _mm_unpackhi_epi64(low, low))) - 16 * 128;
    sums[1] = _mm_cvtsi128_si32(_mm_add_epi64(high, _mm_unpackhi_epi64(high, high))) - 16 * 128;
}
DS_INLINE float f32_max_abs32(const float *x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 max = _mm256_andnot_ps(sign, _mm256_loadu_ps(x));
    DS_UNROLL
    for (int i = 8; i < 32; i += 8) max = _mm256_max_ps(max, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

#define DS_TILE_TOKENS 6
#define DS_SIGNED_AS_UNSIGNED 1 /* panels hold signed codes plus 128: the dot instruction wants unsigned */

DS_INLINE vi x86_dot_add(vi acc, vi u, vi s) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, u, s);
#else
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#endif
}

/* acc[t][v] += dots over n_k4 dwords of k: w is (n_k4, DS_PANEL_ROWS) dwords, of which two vectors of rows are used; a is
 * (n_k4, n_tok) dwords. n_tok and n_k4 are constants. */
DS_INLINE void panel_dot(code_range range, int n_k4, int n_tok, const uint8_t *w, const int8_t *a, vi acc[DS_TILE_TOKENS][2]) {
    DS_UNROLL
    for (int i = 0; i < n_k4; i++) {
        const vi w0 = vi_load(w + (size_t)i * 4 * DS_PANEL_ROWS), w1 = vi_load(w + (size_t)i * 4 * DS_PANEL_ROWS + 4 * DS_LANES);
        DS_UNROLL
        for (int t = 0; t < n_tok; t++) {
            int32_t four;
            memcpy(&four, a + 4 * (i * n_tok + t), sizeof four);
            const vi x = vi_set((uint32_t)four);
            acc[t][0] = x86_dot_add(acc[t][0], w0, x);
            acc[t][1] = x86_dot_add(acc[t][1], w1, x);
        }
    }
}

#else

#define DS_TILE_TOKENS 4
#define DS_SIGNED_AS_UNSIGNED 0

/* Without a dot instruction: products of two neighbours are summed in 16 bits, as many as are sure to fit, and widened. */
DS_INLINE void panel_dot(code_range range, int n_k4, int n_tok, const uint8_t *w, const int8_t *a, vi acc[DS_TILE_TOKENS][2]) {
    const int step = range == CODES_4 ? 8 : range == CODES_5 ? 4 : range == CODES_6 ? 2 : 1;
    const __m256i ones = _mm256_set1_epi16(1);
    DS_UNROLL
    for (int i0 = 0; i0 < n_k4; i0 += step) {
        __m256i words[DS_TILE_TOKENS][2];
        DS_UNROLL
        for (int i = i0; i < i0 + step && i < n_k4; i++) {
            const vi w0 = vi_load(w + (size_t)i * 4 * DS_PANEL_ROWS), w1 = vi_load(w + (size_t)i * 4 * DS_PANEL_ROWS + 4 * DS_LANES);
            DS_UNROLL
            for (int t = 0; t < n_tok; t++) {
                int32_t four;
                memcpy(&four, a + 4 * (i * n_tok + t), sizeof four);
                const vi x = vi_set((uint32_t)four);
                const bool is_signed = range == CODES_SIGNED;
                const vi p0 = is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(w0), _mm256_sign_epi8(x, w0)) : _mm256_maddubs_epi16(w0, x);
                const vi p1 = is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(w1), _mm256_sign_epi8(x, w1)) : _mm256_maddubs_epi16(w1, x);
                words[t][0] = i == i0 ? p0 : _mm256_add_epi16(words[t][0], p0);
                words[t][1] = i == i0 ? p1 : _mm256_add_epi16(words[t][1], p1);
                /* Keeps the compiler from reordering the sums, which would need more registers than there are. */
                __asm__("" : "+x"(words[t][0]), "+x"(words[t][1]));
            }
        }
        DS_UNROLL
        for (int t = 0; t < n_tok; t++)
            DS_UNROLL for (int v = 0; v < 2; v++) acc[t][v] = _mm256_add_epi32(acc[t][v], _mm256_madd_epi16(words[t][v], ones));
    }
}

#endif
