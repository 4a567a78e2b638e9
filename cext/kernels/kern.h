/* kern.h: what the units of a table share. Three are compiled once per ISA (DS_ISA names it): kern.c, products.c,
 * attention.c; one source, and the primitives of simd_*.h under it. */
#pragma once

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/kernels.h"
#include "quant/codes.h"

#define DS_INLINE static inline __attribute__((always_inline, unused))
#define DS_UNROLL _Pragma("GCC unroll 32")
#define DS_ALIGNED __attribute__((aligned(64)))
/* Ahead of a row being read in order: about the bytes that arrive in one memory latency. */
enum { DS_PREFETCH_BYTES = 4096 };

/* A 32-bit pattern of four bytes alike. */
#define DS_BYTES(x) (0x01010101u * (uint32_t)(x))

/* How far weight codes reach: it decides how many products fit 16 bits where there is no 32-bit dot instruction. */
typedef enum code_range {
    CODES_4,      /* 0..15 */
    CODES_5,      /* 0..31 */
    CODES_6,      /* 0..63 */
    CODES_7,      /* 0..127 */
    CODES_SIGNED, /* -128..127 */
} code_range;

#define DS_JOIN_(a, b, c) a##b##c
#define DS_JOIN(a, b, c) DS_JOIN_(a, b, c)
#define DS_STRING_(a) #a
#define DS_STRING(a) DS_STRING_(a)

/* The name of a function that one unit defines and the table in another holds: ds_avx2_attend. */
#define DS_OF(name) DS_JOIN(ds_, DS_ISA, _##name)
#define DS_TYPE_OF(member) __typeof__(*((const ds_kernels *)0)->member)
DS_TYPE_OF(act_bytes) DS_OF(act_bytes);
DS_TYPE_OF(act_pack) DS_OF(act_pack);
#define DS_FORMAT(id, name, gguf, elements, bytes, act) DS_TYPE_OF(mul[0]) DS_OF(mul_##id);
#include "quant/formats.def"
#undef DS_FORMAT
DS_TYPE_OF(rotate) DS_OF(rotate);
DS_TYPE_OF(rows_put) DS_OF(rows_put);
DS_TYPE_OF(query_put) DS_OF(query_put);
DS_TYPE_OF(attend) DS_OF(attend);
DS_TYPE_OF(expand_weights) DS_OF(expand_weights);
DS_TYPE_OF(expand) DS_OF(expand);
DS_TYPE_OF(read_all) DS_OF(read_all);
DS_TYPE_OF(dot_peak) DS_OF(dot_peak);
DS_TYPE_OF(chain) DS_OF(chain);

#include "kernels/act_layout.h"
#if DS_ISA_scalar
#include "kernels/simd_scalar.h"
#include "kernels/simd_scalar_dots.h"
#elif defined(__x86_64__)
#include "kernels/simd_x86.h"
#include "kernels/simd_x86_dots.h"
#elif defined(__aarch64__)
#include "kernels/simd_neon.h"
#include "kernels/simd_neon_dots.h"
#endif

#include "kernels/vecmath.h"
