#version 460
/* halves.comp: W as mul_coop.comp reads it: halves, in tiles of M rows by K values that lie together, a row of tiles behind the
 * other; behind the last row and value there is anything and 0. Rows of tiles of MATRICES matrices take turns, these are of
 * number WHICH. Blocks without slots are left out. Names as in product.glsl; grid (k / 256, rows / M, blocks). */
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint M = 16;
layout(constant_id = 2) const uint K = 16;
layout(constant_id = 3) const uint MATRICES = 1;
layout(constant_id = 4) const uint WHICH = 0;

layout(buffer_reference, scalar, buffer_reference_align = 16) writeonly buffer Packed { uvec4 v; };

uvec2 halves(vec4 v) { return uvec2(packFloat2x16(f16vec2(v.xy)), packFloat2x16(f16vec2(v.zw))); }

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    if (b.count == 0) return;
    unpack_begin();
    const uint row_tiles = (p.rows + M - 1) / M, whole = whole_k(K);
    const uint tile_row = (gl_WorkGroupID.z * row_tiles + gl_WorkGroupID.y) * MATRICES + WHICH;
    const uint64_t to = p.y + 2 * (uint64_t(tile_row) * M * whole);
    for (uint i = gl_LocalInvocationIndex; i < 16 * M; i += gl_WorkGroupSize.x) {
        const uint r = i % M, h = i / M % 2, u = gl_WorkGroupID.x * 8 + i / M / 2, at = place(u, h);
        if (at >= whole) continue;
        vec4 v[4] = {vec4(0.0), vec4(0.0), vec4(0.0), vec4(0.0)};
        if (u < n_units(p.k)) decode(weight_row(b.w, min(gl_WorkGroupID.y * M + r, p.rows - 1)), u, h, p.k, v);
        [[unroll]] for (uint c = 0; c < 2; c++) {
            const uint k = at + 8 * c;
            Packed(to + 2 * ((k / K * M + r) * K + k % K)).v = uvec4(halves(v[2 * c]), halves(v[2 * c + 1]));
        }
    }
}
