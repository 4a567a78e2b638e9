/* kern.c: the kernels, compiled once per ISA (DS_ISA names it): one source, and the primitives of simd_*.h under it. */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/kernels.h"
#include "quant/codes.h"

#define DS_INLINE static inline __attribute__((always_inline, unused))
#define DS_UNROLL _Pragma("GCC unroll 32")
#define DS_ALIGNED __attribute__((aligned(64)))
enum { DS_PREFETCH_BYTES = 4096 }; /* ahead of a row being read in order: about the bytes that arrive in one memory latency */

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

#include "kernels/act_layout.h"
#if DS_ISA_scalar
#include "kernels/simd_scalar.h"
#include "kernels/simd_scalar_dots.h"
#elif defined(__x86_64__)
#include "kernels/simd_x86.h"
#include "kernels/simd_x86_dots.h"
#endif

#include "kernels/vecmath.h"
#include "kernels/float_ops.h"
#include "kernels/gemm.h"
#include "kernels/attend_rows.h"
#include "kernels/attend.h"
#include "kernels/expand.h"
#include "kernels/act.h"
#include "kernels/mul_float.h"
#include "kernels/dequantize.h"

#if DS_HAS_DOTS
/* The values of IQ4 codes, plus DS_CODE_BIAS (as bytes). */
#define IQ4(value) (int8_t)(((value) + DS_CODE_BIAS + 128) % 256 - 128)
static const int8_t iq4_codes[16] = {IQ4(-127), IQ4(-104), IQ4(-83), IQ4(-65), IQ4(-49), IQ4(-35), IQ4(-22), IQ4(-10),
                                     IQ4(1),    IQ4(13),   IQ4(25),  IQ4(38),  IQ4(53),  IQ4(69),  IQ4(89),  IQ4(113)};
#include "kernels/mul_rows.h"
#include "kernels/unpack.h"
#include "kernels/mul_panels.h"
#define MUL_CODED(id)                                          \
    static void mul_##id(const ds_mul *job) {                  \
        if (job->n_tok <= DS_ROW_TOKENS) mul_rows_##id(job);   \
        else mul_panels_##id(job);                             \
    }
DS_CODED_FORMATS(MUL_CODED)
#else
#include "kernels/mul_codes.h"
#endif

#include "kernels/limits.h"

#define DS_JOIN_(a, b) a##b
#define DS_JOIN(a, b) DS_JOIN_(a, b)
#define DS_STRING_(a) #a
#define DS_STRING(a) DS_STRING_(a)

const ds_kernels DS_JOIN(ds_kernels_, DS_ISA) = {
    .isa = DS_STRING(DS_ISA),
    .act_bytes = act_bytes,
    .act_pack = act_pack,
    .mul = {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) [DS_FORMAT_##id] = mul_##id,
#include "quant/formats.def"
#undef DS_FORMAT
    },
    .dequantize = {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) [DS_FORMAT_##id] = dequantize_##id,
#include "quant/formats.def"
#undef DS_FORMAT
    },
    .gemm_nt = gemm_nt,
    .gemm_nn_add = gemm_nn_add,
    .rotate = rotate,
    .rows_put = rows_put,
    .query_put = query_put,
    .attend = attend,
    .expand_weights = expand_weights,
    .expand = expand,
    .rms_norm = rms_norm,
    .exp_sum = exp_sum,
    .softmax = softmax,
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
    .f32_to_f16 = f32_to_f16,
    .f16_to_f32 = f16_to_f32,
    .read_all = read_all,
    .dot_peak = dot_peak,
};
