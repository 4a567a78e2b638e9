#version 460
/* mul_few.comp: y = x W^T of few rows of floats, a router's, for many slots: 64 rows by SLOTS slots a workgroup, whose threads
 * share out the values of a row. Tiles of mul_mat.comp would be so few that a large device waits for memory. Names as in
 * product.glsl; grid (rows / 64, slots / SLOTS, blocks). */
#extension GL_GOOGLE_include_directive : require
#include "product.glsl"

layout(local_size_x_id = 0) in; /* 256 */
layout(constant_id = 1) const bool ALIGNED = false; /* w and x lie at multiples of 16 bytes, and k is one of 4 */
const uint ROWS = 64, SLOTS = 4, SHARES = 4, CHUNK = 1024; /* values of a slot that are kept */

shared vec4 kept[CHUNK]; /* by value, then slot */
shared vec4 sums[SHARES][ROWS];

/* Values [at, at + 4) of a row, 0 from k on. */
vec4 four(uint64_t row, uint at) {
    if (ALIGNED && at < p.k) return Vectors(row + 4 * at).v[0];
    vec4 v = vec4(0.0);
    [[unroll]] for (uint c = 0; c < 4; c++)
        if (at + c < p.k) v[c] = Floats(row + 4 * (at + c)).v[0];
    return v;
}

void keep(Block b, uint slot, uint from) {
    uint64_t x[SLOTS];
    [[unroll]] for (uint s = 0; s < SLOTS; s++) x[s] = slot_input(b, b.first + min(slot + s, b.count - 1));
    for (uint i = gl_LocalInvocationIndex; i < CHUNK && from + i < p.k; i += gl_WorkGroupSize.x) {
        vec4 v;
        [[unroll]] for (uint s = 0; s < SLOTS; s++) v[s] = Floats(x[s] + 4 * (from + i)).v[0];
        kept[i] = v;
    }
}

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    const uint slot = gl_WorkGroupID.y * SLOTS, share = gl_LocalInvocationIndex / ROWS;
    const uint row = gl_WorkGroupID.x * ROWS + gl_LocalInvocationIndex % ROWS;
    if (slot >= b.count) return;
    const uint64_t w = weight_row(b.w, min(row, p.rows - 1));
    vec4 sum = vec4(0.0);
    for (uint from = 0; from < p.k; from += CHUNK) {
        barrier();
        keep(b, slot, from);
        barrier();
        const uint begin = share * (CHUNK / SHARES);
        for (uint i = begin; i < begin + CHUNK / SHARES && from + i < p.k; i += 16) {
            vec4 v[4];
            [[unroll]] for (uint j = 0; j < 4; j++) v[j] = four(w, from + i + 4 * j);
            [[unroll]] for (uint j = 0; j < 16; j++)
                if (from + i + j < p.k) sum += v[j / 4][j % 4] * kept[i + j];
        }
    }
    sums[share][gl_LocalInvocationIndex % ROWS] = sum;
    barrier();
    if (share != 0 || row >= p.rows) return;
    [[unroll]] for (uint i = 1; i < SHARES; i++) sum += sums[i][gl_LocalInvocationIndex];
    for (uint s = 0; s < SLOTS && slot + s < b.count; s++) store(b, b.first + slot + s, row, sum[s]);
}
