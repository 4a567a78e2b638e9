#version 460
/* get_rows.comp: rows of W as floats: y[i] = W[slot_row[i]], bit-equal to ds_dequantize_row. Names as in product.glsl;
 * grid (k / GATHER_VALUES, rows of y, 1). */
#extension GL_GOOGLE_include_directive : require
#include "product.glsl"
#define EXACT precise /* a product and a difference, each rounded */
#include "unpack.glsl"

layout(local_size_x_id = 0) in;
const uint GATHER_VALUES = 2048; /* of a workgroup (the same in product.c) */

void main() {
    unpack_begin();
    const uint slot = gl_WorkGroupID.y, row = p.slot_row == 0 ? slot : Dwords(p.slot_row).v[slot];
    const uint begin = gl_WorkGroupID.x * (GATHER_VALUES / 16), end = min(begin + GATHER_VALUES / 16, 2 * n_units(p.k));
    for (uint i = begin + gl_LocalInvocationIndex; i < end; i += gl_WorkGroupSize.x) {
        const uint u = i / 2, h = i % 2, at = place(u, h);
        vec4 w[4];
        decode(weight_row(p.w, row), u, h, p.k, w);
        Results y = Results(p.y + 4 * (uint64_t(slot) * p.ldy + at));
        for (uint j = 0; j < 16 && at + j < p.k; j++) y.v[j] = w[j / 4][j % 4];
    }
}
