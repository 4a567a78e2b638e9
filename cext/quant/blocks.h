/* blocks.h: the block layouts of the tensor formats, as they lie in a GGUF file. Packed, because a row of a mapped file
 * keeps no alignment beyond a byte; sizes are tied to formats.def below. Halves are IEEE binary16 bits. */
#pragma once

#include <assert.h>
#include <stdint.h>

/* A layout a line: clang-format would break them. */
/* clang-format off */

#define DS_PACKED struct __attribute__((packed))

typedef DS_PACKED { float x; } ds_block_F32;
typedef DS_PACKED { uint16_t x; } ds_block_F16;
typedef DS_PACKED { uint16_t x; } ds_block_BF16;

/* 32 values of 4 or 5 bits: byte i of qs holds value i in its low half and value 16 + i in its high half; bit i of qh is
 * value i's fifth bit. w = d (q - 8), d (q - 16), or d q + m. */
typedef DS_PACKED { uint16_t d; uint8_t qs[16]; } ds_block_Q4_0;
typedef DS_PACKED { uint16_t d, m; uint8_t qs[16]; } ds_block_Q4_1;
typedef DS_PACKED { uint16_t d; uint8_t qh[4], qs[16]; } ds_block_Q5_0;
typedef DS_PACKED { uint16_t d, m; uint8_t qh[4], qs[16]; } ds_block_Q5_1;

/* 32 values of 8 bits: w = d q. */
typedef DS_PACKED { uint16_t d; int8_t qs[32]; } ds_block_Q8_0;

/* 16 sub-blocks of 16 values of 2 bits: w = d sc q - dmin m, sc and m the halves of a byte of scales. A byte of qs holds
 * values 32 apart: bits 2j..2j+1 of byte 32h + l are value 128h + 32j + l. */
typedef DS_PACKED { uint8_t scales[16], qs[64]; uint16_t d, dmin; } ds_block_Q2_K;

/* 16 sub-blocks of 16 values of 3 bits: w = d (sc - 32) (q - 4). qs as in Q2_K; bit j of hmask[l] is the third bit of
 * value 32j + l; the 16 scales of 6 bits are packed in 12 bytes (ds_scales_q3_k). */
typedef DS_PACKED { uint8_t hmask[32], qs[64], scales[12]; uint16_t d; } ds_block_Q3_K;

/* 8 sub-blocks of 32 values of 4 or 5 bits: w = d sc q - dmin m, sc and m of 6 bits packed in 12 bytes (ds_scales_k4).
 * Byte 32g + l of qs holds values 64g + l (low half) and 64g + 32 + l; bit j of qh[l] is the fifth bit of 32j + l. */
typedef DS_PACKED { uint16_t d, dmin; uint8_t scales[12], qs[128]; } ds_block_Q4_K;
typedef DS_PACKED { uint16_t d, dmin; uint8_t scales[12], qh[32], qs[128]; } ds_block_Q5_K;

/* 16 sub-blocks of 16 values of 6 bits: w = d sc (q - 32). Of half h: the low four bits of value 128h + 32j + l are the low
 * (j < 2) or high half of ql[64h + 32 (j % 2) + l], its high two are bits 2j..2j+1 of qh[32h + l]. */
typedef DS_PACKED { uint8_t ql[128], qh[64]; int8_t scales[16]; uint16_t d; } ds_block_Q6_K;

/* Values of 4 bits that index ds_iq4_values: qs as in Q4_0. NL: 32 values, w = d v. XS: 8 sub-blocks of 32, w = d (sc - 32) v,
 * the low four bits of the 6-bit scales in scales_l, the high two in scales_h. */
typedef DS_PACKED { uint16_t d; uint8_t qs[16]; } ds_block_IQ4_NL;
typedef DS_PACKED { uint16_t d, scales_h; uint8_t scales_l[4], qs[128]; } ds_block_IQ4_XS;

/* Entries of a grid (grids.h) with signs: w = d (2 sc + 1) v / 8 in IQ2, / 4 in IQ3_XXS, / 1 in IQ3_S; sc of 4 bits.
 * XXS: of each 32 values, four times 7 sign bits and sc in the top of a dword (tail); the eighth value's sign makes their
 * number even. XS: an index of 9 bits and 7 sign bits in a word of qs, two sc for each 32 values in a byte, low half first.
 * S: a byte of signs for each 8 values; the upper bits of indices in qh, lowest first, a byte of it for each 32 values. */
typedef DS_PACKED { uint16_t d; DS_PACKED { uint8_t qs[4]; uint32_t tail; } sub[8]; } ds_block_IQ2_XXS;
typedef DS_PACKED { uint16_t d, qs[32]; uint8_t scales[8]; } ds_block_IQ2_XS;
typedef DS_PACKED { uint16_t d; uint8_t qs[32], signs[32], qh[8], scales[8]; } ds_block_IQ2_S;
typedef DS_PACKED { uint16_t d; uint8_t qs[64]; uint32_t tail[8]; } ds_block_IQ3_XXS;
typedef DS_PACKED { uint16_t d; uint8_t qs[64], qh[8], signs[32], scales[4]; } ds_block_IQ3_S;

#define DS_FORMAT(id, name, gguf, elements, bytes, act) \
    static_assert(sizeof(ds_block_##id) == (bytes), name ": the block struct differs from formats.def");
#include "quant/formats.def"
#undef DS_FORMAT

/* Values in a block, as constants: DS_ELEMENTS_Q4_K. */
enum {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) DS_ELEMENTS_##id = (elements),
#include "quant/formats.def"
#undef DS_FORMAT
};
