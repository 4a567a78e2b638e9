#version 460
/* halve_rows.comp: x as mul_coop.comp reads it: halves of a 16th of its values, in tiles of N slots by K values, a row of tiles
 * behind the other, blocks behind each other; behind the last slot and value there is 0. Halves end at 65504: by a 16th, values
 * keep their bits down to 2^-10. Names as in product.glsl; grid (k / 256, slots / N, blocks): where a block has more slots
 * than the grid, its groups go on. */
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "product.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint N = 16;
layout(constant_id = 2) const uint K = 16;
layout(constant_id = 3) const bool ALIGNED = false; /* x lies at multiples of 16 bytes, and k is one of 4 */
const float SHRINK = 0.0625;

layout(buffer_reference, scalar, buffer_reference_align = 8) writeonly buffer Packed { f16vec4 v; };

/* Values [at, at + 4) of a slot, 0 from k on. */
vec4 input4(uint64_t row, uint at) {
    if (ALIGNED && at < p.k) return Vectors(row + 4 * at).v[0];
    vec4 x = vec4(0.0);
    [[unroll]] for (uint c = 0; c < 4; c++)
        if (at + c < p.k) x[c] = Floats(row + 4 * (at + c)).v[0];
    return x;
}

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    const uint whole = whole_k(K), first = first_tile(b, gl_WorkGroupID.z, N);
    for (uint t = gl_WorkGroupID.y; t * N < b.count; t += gl_NumWorkGroups.y)
        for (uint i = gl_LocalInvocationIndex; i < 64 * N; i += gl_WorkGroupSize.x) {
            const uint s = i / 64, at = gl_WorkGroupID.x * 256 + i % 64 * 4;
            if (at >= whole) continue;
            vec4 x = vec4(0.0);
            if (t * N + s < b.count) x = input4(slot_input(b, b.first + t * N + s), at);
            const uint64_t to = p.y + 2 * (uint64_t(first + t) * N * whole + (at / K * N + s) * K + at % K);
            Packed(to).v = f16vec4(SHRINK * x);
        }
}
