#version 460
/* mul_mat.comp: y = x W^T for many slots a block. A workgroup of 128 computes TILE_ROWS rows by TILE_SLOTS slots, a
 * unit at a time, which it decodes into shared memory. Names as in product.glsl; grid (rows / TILE_ROWS, slots /
 * TILE_SLOTS, blocks): where a block has more slots than the grid, its groups go on. With DOT, x is packed
 * (pack_q8.comp). */
#extension GL_GOOGLE_include_directive : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"
#include "factors.glsl"
#include "tile.glsl"

layout(local_size_x_id = 0) in; /* 128 */

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    const uint row = gl_WorkGroupID.x * TILE_ROWS, n_rows = min(p.rows - row, TILE_ROWS);
    if (gl_WorkGroupID.y * TILE_SLOTS >= b.count) return;
    unpack_begin();
    /* What a thread puts there: half h of row or slot i. Beyond the last, the last is taken again. */
    const uint i = gl_LocalInvocationIndex % 64, h = gl_LocalInvocationIndex / 64;
    const uint64_t w = weight_row(b.w, min(row + i, p.rows - 1));
    const uint lane_slots = gl_LocalInvocationIndex % LANE_SLOTS, lane_rows = gl_LocalInvocationIndex / LANE_SLOTS;
    for (uint slot = gl_WorkGroupID.y * TILE_SLOTS; slot < b.count; slot += gl_NumWorkGroups.y * TILE_SLOTS) {
        const uint64_t x = input_row(b, b.first + min(slot + i, b.count - 1));
        vec4 sum[SUM_ROWS]; /* by slots */
        [[unroll]] for (uint r = 0; r < SUM_ROWS; r++) sum[r] = vec4(0.0);
        for (uint u = 0; u < n_units(p.k); u++) {
            tile_put_weights(h, i, weights_of(w, u, h, p.k));
            tile_put_inputs(h, i, inputs_of(x, u, h, p.k));
            barrier();
            tile_sum(lane_rows, lane_slots, sum);
            barrier();
        }
        const uint n_slots = min(b.count - slot, TILE_SLOTS);
        [[unroll]] for (uint s = 0; s < SUM_SLOTS; s++)
            [[unroll]] for (uint r = 0; r < SUM_ROWS; r++) {
                const uint in_slot = tile_slot(lane_slots, s), in_row = SUM_ROWS * lane_rows + r;
                if (in_slot < n_slots && in_row < n_rows) store(b, b.first + slot + in_slot, row + in_row, sum[r][s]);
            }
    }
}
