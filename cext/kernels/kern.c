/* kern.c: the table of one ISA, and the kernels on floats. */
#include "kernels/kern.h"

#include "kernels/float_ops.h"
#include "kernels/gemm.h"
#include "kernels/mul_float.h"
#include "kernels/dequantize.h"

const ds_kernels DS_JOIN(ds_kernels_, DS_ISA, ) = {
    .isa = DS_STRING(DS_ISA),
    .act_bytes = DS_OF(act_bytes),
    .act_pack = DS_OF(act_pack),
    .mul =
        {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) [DS_FORMAT_##id] = DS_OF(mul_##id),
#include "quant/formats.def"
#undef DS_FORMAT
        },
    .dequantize =
        {
#define DS_FORMAT(id, name, gguf, elements, bytes, act) [DS_FORMAT_##id] = dequantize_##id,
#include "quant/formats.def"
#undef DS_FORMAT
        },
    .gemm_nt = gemm_nt,
    .gemm_nn_add = gemm_nn_add,
    .rotate = DS_OF(rotate),
    .rows_put = DS_OF(rows_put),
    .query_put = DS_OF(query_put),
    .attend = DS_OF(attend),
    .expand_weights = DS_OF(expand_weights),
    .expand = DS_OF(expand),
    .rms_norm = rms_norm,
    .exp_sum = exp_sum,
    .softmax = softmax,
    .silu_mul = silu_mul,
    .add_scaled = add_scaled,
    .read_all = DS_OF(read_all),
    .dot_peak = DS_OF(dot_peak),
    .chain = DS_OF(chain),
};
