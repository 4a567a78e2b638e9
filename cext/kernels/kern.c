/* kern.c: the kernels, compiled once per ISA (DS_ISA names it): one source, and the primitives of simd_*.h under it. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/kernels.h"

#define DS_INLINE static inline __attribute__((always_inline, unused))
#define DS_UNROLL _Pragma("GCC unroll 32")
#define DS_ALIGNED __attribute__((aligned(64)))
enum { DS_PREFETCH_BYTES = 4096 }; /* ahead of a row being read in order: about the bytes that arrive in one memory latency */

#include "kernels/simd_scalar.h"

#include "kernels/vecmath.h"
#include "kernels/float_ops.h"
#include "kernels/gemm.h"
#include "kernels/attend.h"
#include "kernels/act.h"
#include "kernels/mul_float.h"
#include "kernels/mul_codes.h"
#include "kernels/dequantize.h"

#define DS_JOIN_(a, b) a##b
#define DS_JOIN(a, b) DS_JOIN_(a, b)
#define DS_STRING_(a) #a
#define DS_STRING(a) DS_STRING_(a)

const ds_kernels DS_JOIN(ds_kernels_, DS_ISA) = {
    .isa = DS_STRING(DS_ISA),
    .act_bytes = act_bytes,
    .act_pack = act_pack,
    .mul = {
        [DS_FORMAT_F32] = mul_F32,
        [DS_FORMAT_F16] = mul_F16,
        [DS_FORMAT_BF16] = mul_BF16,
#define ROW(id) [DS_FORMAT_##id] = mul_codes_##id,
        DS_CODED_FORMATS(ROW)
#undef ROW
    },
    .dequantize = {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) [DS_FORMAT_##id] = dequantize_##id,
#include "quant/formats.def"
#undef DS_FORMAT
    },
    .gemm_nt = gemm_nt,
    .gemm_nn_add = gemm_nn_add,
    .attend_f16 = attend_f16,
    .attend_f32 = attend_f32,
    .rms_norm = rms_norm,
    .exp_sum = exp_sum,
    .softmax = softmax,
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
    .f32_to_f16 = f32_to_f16,
    .f16_to_f32 = f16_to_f32,
};
