#version 460
/* mul_vec.comp: y = x W^T for few slots a block. A subgroup takes ROWS rows, its lanes their units in turn, so that it
 * reads them in order, once for SLOTS slots. Names as in product.glsl; grid (rows / GROUP_ROWS, slots / SLOTS,
 * blocks). With GATED, y = silu(x W^T) * (x Up^T); with DOT, x is packed (pack_q8.comp). */
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"
#include "factors.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint ROWS = 2;
layout(constant_id = 2) const uint SLOTS = 1;
layout(constant_id = 3) const uint GROUP_ROWS = 8; /* of a workgroup */

#if defined(GATED)
const uint N_MATRICES = 2;
#else
const uint N_MATRICES = 1;
#endif

/* Units that a subgroup takes at a time: gl_SubgroupSize is what a device may have, and of some more than it has. */
uint lanes;

/* Rows [row, row + ROWS) of the block by slots [slot, slot + SLOTS). Beyond the last, the last is taken again. */
void rows_by_slots(Block b, uint row, uint slot) {
    float sum[N_MATRICES * ROWS * SLOTS];
    [[unroll]] for (uint i = 0; i < N_MATRICES * ROWS * SLOTS; i++) sum[i] = 0.0;
    const uint last_row = p.rows - 1, last_slot = b.first + b.count - 1;
    uint64_t w_at[N_MATRICES * ROWS], x_at[SLOTS];
    [[unroll]] for (uint r = 0; r < ROWS; r++) {
        w_at[r] = weight_row(b.w, min(row + r, last_row));
#if defined(GATED)
        w_at[ROWS + r] = weight_row(b.up, min(row + r, last_row));
#endif
    }
    [[unroll]] for (uint s = 0; s < SLOTS; s++) x_at[s] = input_row(b, min(slot + s, last_slot));
    for (uint u = gl_SubgroupInvocationID; u < n_units(p.k); u += lanes) {
        [[unroll]] for (uint h = 0; h < 2; h++) {
            Weights w[N_MATRICES * ROWS];
            [[unroll]] for (uint r = 0; r < N_MATRICES * ROWS; r++) w[r] = weights_of(w_at[r], u, h, p.k);
            [[unroll]] for (uint s = 0; s < SLOTS; s++) {
                const Inputs x = inputs_of(x_at[s], u, h, p.k);
                [[unroll]] for (uint r = 0; r < N_MATRICES * ROWS; r++) sum[r * SLOTS + s] += multiply(w[r], x);
            }
        }
    }
    [[unroll]] for (uint i = 0; i < N_MATRICES * ROWS * SLOTS; i++) sum[i] = subgroupAdd(sum[i]);
    if (!subgroupElect()) return;
    [[unroll]] for (uint r = 0; r < ROWS; r++)
        [[unroll]] for (uint s = 0; s < SLOTS; s++) {
            if (row + r > last_row || slot + s > last_slot) continue;
#if defined(GATED)
            store(b, slot + s, row + r, silu(sum[r * SLOTS + s]) * sum[(ROWS + r) * SLOTS + s]);
#else
            store(b, slot + s, row + r, sum[r * SLOTS + s]);
#endif
        }
}

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    if (gl_WorkGroupID.y * SLOTS >= b.count) return;
    lanes = subgroupMax(gl_SubgroupInvocationID) + 1;
    unpack_begin();
    const uint begin = gl_WorkGroupID.x * GROUP_ROWS, end = min(begin + GROUP_ROWS, p.rows);
    for (uint row = begin + gl_SubgroupID * ROWS; row < end; row += gl_NumSubgroups * ROWS)
        rows_by_slots(b, row, b.first + gl_WorkGroupID.y * SLOTS);
}
