#version 460
/* mul_sum.comp: y += others + sum over blocks z of weight_z x_z W_z^T: the experts of one token, summed with what their layer has
 * beside them, each block of one row. LANES threads share a row and go from block to block; an item is asked for before x
 * is. Names as in product.glsl, with `up` the weights (blocks), `x_scale` 0 or the others (rows), n_slots the blocks; grid
 * (rows, 1, 1). */
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

const uint SLOTS = 1; /* blocks whose x is kept at a time */
const uint THREADS = gl_WorkGroupSize.x, PASS = THREADS / LANES;

shared float partial[THREADS];

#include "items.glsl"

uint me;

/* Values [from, from + CHUNK) of block z's x. */
void keep_inputs(uint z, uint from) {
    const uint n = (min(p.k - from, CHUNK) + 3) / 4;
    const uint64_t x = p.x + 4 * (uint64_t(z) * p.ldx);
    barrier(); /* the ones before were read */
    for (uint v = me; v < n; v += THREADS) kept[input_at(0, v)] = values4(x, from + 4 * v);
    barrier();
}

/* A thread's part of the row by all blocks. */
float sum_of_row(uint row, uint lane) {
    const uint n_items = (p.k + ITEM - 1) / ITEM;
    float sum = 0.0;
    [[dont_unroll]] for (uint z = 0; z < p.n_slots; z++) {
        const uint64_t w = weight_row(Groups(p.groups).v[z].w, row);
        float own = 0.0;
        [[dont_unroll]] for (uint from = 0; from < n_items; from += CHUNK / ITEM) {
            const uint end = min(from + CHUNK / ITEM, n_items);
            [[dont_unroll]] for (uint begin = from; begin < end; begin += LANES) { /* the same for all threads: barriers */
                const uint i = begin + lane, at = min(i, end - 1);
                const Item item = item_of(w, at);
                if (begin == from) keep_inputs(z, from * ITEM);
                const float product = times(item, 0, at, from * ITEM);
                own += i < end ? product : 0.0;
            }
        }
        sum += Floats(p.up).v[z] * own;
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
