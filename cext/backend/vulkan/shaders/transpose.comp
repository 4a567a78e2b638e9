#version 460
/* transpose.comp: W transposed, as halves: y[j][i] = W[i][j] of each block, rows of y ldy halves apart. Names as in product.glsl;
 * grid (rows / threads, halves of units, blocks): a thread decodes the same columns of its row as its neighbours. */
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"

layout(local_size_x_id = 0) in;
layout(buffer_reference, scalar, buffer_reference_align = 2) writeonly buffer Halves { float16_t v[]; };

void main() {
    unpack_begin();
    const Block b = block_of(gl_WorkGroupID.z);
    const uint row = gl_GlobalInvocationID.x, u = gl_WorkGroupID.y / 2, h = gl_WorkGroupID.y % 2, at = place(u, h);
    if (row >= p.rows) return;
    vec4 w[4];
    decode(weight_row(b.w, row), u, h, p.k, w);
    for (uint j = 0; j < 16 && at + j < p.k; j++) Halves(b.y).v[(at + j) * p.ldy + row] = float16_t(w[j / 4][j % 4]);
}
