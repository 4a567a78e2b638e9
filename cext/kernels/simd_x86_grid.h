/* simd_x86_grid.h: 256 codes of the grid formats from their indices and signs. AVX-512 looks all indices up at once in
 * the packed grids of grids.h, with permutes of 64 words, but for IQ2_S, whose grid is too large; AVX2 has none. Both load the
 * other entries from tables of codes. */
#pragma once

/* 2 n + 1 of the 16 halves n of 8 bytes, low ones first. */
DS_INLINE v16 v16_odd_nibbles(const uint8_t p[8]) {
    const v16 a = _mm_loadl_epi64((const __m128i *)p);
    const v16 twice = _mm_unpacklo_epi8(_mm_add_epi8(a, a), _mm_srli_epi16(a, 3));
    return _mm_or_si128(_mm_and_si128(twice, _mm_set1_epi8(30)), _mm_set1_epi8(1));
}

/* 128 for the nibbles with an odd number of bits: the eighth sign of seven. */
#define X86_ODD_NIBBLES _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0)

#include "kernels/simd_x86_eights.h"
#if defined(__AVX512F__)
#include "kernels/simd_avx512_grid.h"
#else
#include "kernels/grid_loaded.h"
#endif

#include "kernels/grid_tables.h"
