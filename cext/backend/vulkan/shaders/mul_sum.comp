#version 460
/* mul_sum.comp: y += others + sum over blocks z of weight_z x_z W_z^T: the experts of one token, summed with what their layer has
 * beside them, each block of one row. LANES threads share a row; a thread has an item of each of six blocks under way before
 * x is asked for. Names as in product.glsl, with `up` the weights (blocks), `x_scale` 0 or the others (rows), n_slots the
 * blocks; grid (rows, 1, 1). */
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint LANES = 32; /* a power of two that the workgroup's threads are a multiple of */
layout(constant_id = 2) const uint CHUNK = 2048; /* a multiple of 256 */
layout(constant_id = 3) const bool ALIGNED = false; /* as in mul_vec.comp */

const uint SLOTS = 3, TOGETHER = 2 * SLOTS; /* blocks whose x is kept, and whose items are asked for, at a time */
const uint THREADS = gl_WorkGroupSize.x, PASS = THREADS / LANES;

shared float partial[THREADS];

#include "items.glsl"

uint me;
uint64_t w_at[TOGETHER];
float share[TOGETHER];
Item items[TOGETHER];

/* Blocks [z, z + TOGETHER): where the thread's row of each is; beyond the last, the last is taken again. */
void find_blocks(uint z, uint row) {
    [[unroll]] for (uint j = 0; j < TOGETHER; j++) {
        const uint block = min(z + j, p.n_slots - 1);
        const Group g = Groups(p.groups).v[block];
        w_at[j] = weight_row(g.w, row);
        share[j] = Floats(p.up).v[block];
    }
}

/* Values [from, from + CHUNK) of SLOTS blocks' x. */
void keep_inputs(uint z, uint from) {
    const uint n = (min(p.k - from, CHUNK) + 3) / 4;
    barrier(); /* the ones before were read */
    for (uint v = me; v < n; v += THREADS) {
        vec4 x[SLOTS];
        [[unroll]] for (uint s = 0; s < SLOTS; s++)
            x[s] = values4(p.x + 4 * (uint64_t(min(z + s, p.n_slots - 1)) * p.ldx), from + 4 * v);
        [[unroll]] for (uint s = 0; s < SLOTS; s++) kept[input_at(s, v)] = x[s];
    }
    barrier();
}

float sum_of_row(uint row, uint lane) {
    const uint n_items = (p.k + ITEM - 1) / ITEM;
    float sum = 0.0;
    for (uint z = 0; z < p.n_slots; z += TOGETHER) {
        find_blocks(z, row);
        for (uint from = 0; from < n_items; from += CHUNK / ITEM) {
            const uint end = min(from + CHUNK / ITEM, n_items), first = from + lane;
            [[unroll]] for (uint j = 0; j < TOGETHER; j++) items[j] = item_of(w_at[j], min(first, end - 1));
            [[unroll]] for (uint half_ = 0; half_ < 2; half_++) {
                keep_inputs(z + half_ * SLOTS, from * ITEM);
                [[unroll]] for (uint s = 0; s < SLOTS; s++) {
                    const uint j = half_ * SLOTS + s;
                    float own = times(items[j], s, min(first, end - 1), from * ITEM);
                    if (first >= end) own = 0.0;
                    for (uint i = first + LANES; i < end; i += LANES) own += times(item_of(w_at[j], i), s, i, from * ITEM);
                    if (z + j < p.n_slots) sum += share[j] * own;
                }
            }
        }
    }
    return sum;
}

void main() {
    const uint lanes = subgroupMax(gl_SubgroupInvocationID) + 1; /* gl_SubgroupSize may be more than there are */
    me = gl_SubgroupID * lanes + gl_SubgroupInvocationID;
    const uint lane = me % LANES, row = gl_WorkGroupID.x * PASS;
    const uint64_t y_at = p.y + 4 * uint64_t(min(row + me, p.rows - 1));
    float y = 0.0;
    if (me < PASS) y = Results(y_at).v[0] + (p.x_scale == 0 ? 0.0 : Floats(p.x_scale).v[min(row + me, p.rows - 1)]);
    unpack_begin();
    const float own = sum_of_row(min(row + me / LANES, p.rows - 1), lane);
    const bool whole = LANES % lanes == 0; /* subgroups to a row */
    const uint pieces = whole ? LANES / lanes : LANES, piece = whole ? lane / lanes : lane;
    const float sum = whole ? subgroupAdd(own) : own;
    if (!whole || subgroupElect()) partial[piece * PASS + me / LANES] = sum;
    barrier();
    if (me >= PASS || row + me >= p.rows) return;
    for (uint i = 0; i < pieces; i++) y += partial[i * PASS + me];
    Results(y_at).v[0] = y;
}
