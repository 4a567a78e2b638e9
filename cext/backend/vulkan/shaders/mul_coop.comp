#version 460
/* mul_coop.comp: y = x W^T for many slots a block by cooperative matrices of halves, summed in floats: weights and
 * activations keep 11 bits. Both lie in tiles, as halves.comp and halve_rows.comp leave them, each of one matrix of the
 * device: a subgroup reads its own from memory, the next ones while those before are multiplied, without a word to others.
 * Two by two subgroups compute ROWS by SLOTS. With GATED, y = silu(x W^T) * (x Up^T): rows of tiles are W's and Up's in turns.
 * Names as in product.glsl, but that w are halves, block after block, and x those of all slots; grid (rows / what a tile has
 * of them, slots / SLOTS, blocks): where a block has more slots than the grid, its groups go on. */
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "product.glsl"

layout(local_size_x_id = 0) in; /* four subgroups */
layout(constant_id = 1) const uint M = 16; /* the device's shape: rows, slots, values */
layout(constant_id = 2) const uint N = 16;
layout(constant_id = 3) const uint K = 16;
layout(constant_id = 4) const uint ROWS = 64; /* 64 or 128 */
const uint SLOTS = 64;
#if defined(GATED)
const uint MATRICES = 2;
#else
const uint MATRICES = 1;
#endif
const uint OWN = ROWS / MATRICES; /* rows of y */
const uint DOWN = ROWS / 2 / M, ALONG = SLOTS / 2 / N; /* matrices of a subgroup */
const float GROW = 16.0; /* what halve_rows.comp shrank */

layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Halves { float16_t v[]; };
shared float part[4 * M * N];

#define Sum coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>
#define Rows coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA>
#define Values coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB>

/* Where a subgroup's rows of tiles begin, in halves behind w and x. */
uint64_t w, x;
uint w_at[DOWN], x_at[ALONG];

#define READ(rows, values, tile)                                                                                 \
    [[unroll]] for (uint i = 0; i < DOWN; i++)                                                                   \
        coopMatLoad(rows[i], Halves(w).v, w_at[i] + (tile) * M * K, K, gl_CooperativeMatrixLayoutRowMajor);      \
    [[unroll]] for (uint j = 0; j < ALONG; j++)                                                                  \
        coopMatLoad(values[j], Halves(x).v, x_at[j] + (tile) * N * K, K, gl_CooperativeMatrixLayoutColumnMajor);
#define MULTIPLY(rows, values)                                                                                   \
    [[unroll]] for (uint j = 0; j < ALONG; j++)                                                                  \
        [[unroll]] for (uint i = 0; i < DOWN; i++)                                                               \
            sum[j * DOWN + i] = coopMatMulAdd(rows[i], values[j], sum[j * DOWN + i]);

/* A subgroup waits for its own threads alone: its part of `part` is no other's. */
void subgroup_wait() {
    controlBarrier(gl_ScopeSubgroup, gl_ScopeSubgroup, gl_StorageSemanticsShared, gl_SemanticsAcquireRelease);
}

/* Rows [row, row + n_rows) of y by slots [slot, slot + n_slots), as many of a matrix as there are. */
void store_sum(Sum sum, Block b, uint row, uint n_rows, uint slot, uint n_slots) {
    if (n_rows >= M && n_slots >= N && p.flags == 0) {
        const uint64_t y = b.y + 4 * (uint64_t(b.first + slot) * p.ldy + row);
        coopMatStore(sum, Results(y).v, 0, p.ldy, gl_CooperativeMatrixLayoutColumnMajor);
        return;
    }
    const uint mine = gl_SubgroupID * M * N;
    coopMatStore(sum, part, mine, M, gl_CooperativeMatrixLayoutColumnMajor);
    subgroup_wait();
    for (uint e = gl_SubgroupInvocationID; e < M * N; e += gl_SubgroupSize)
        if (e % M < n_rows && e / M < n_slots) store(b, b.first + slot + e / M, row + e % M, part[mine + e]);
    subgroup_wait();
}

/* How many of n are left from `from` on. */
uint left(uint n, uint from) { return n > from ? n - from : 0; }

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    if (gl_WorkGroupID.y * SLOTS >= b.count) return;
    const uint tiles = whole_k(K) / K, row_tiles = (p.rows + M - 1) / M, slot_tiles = (b.count + N - 1) / N;
    const uint me_down = gl_SubgroupID / 2 * DOWN, me_along = gl_SubgroupID % 2 * ALONG;
    w = p.w + gl_WorkGroupID.z * p.stride_w;
    x = p.x + 2 * (uint64_t(first_tile(b, gl_WorkGroupID.z, N)) * N * whole_k(K));
    [[unroll]] for (uint i = 0; i < DOWN; i++) /* beyond the last row or slot, the last is read again */
        w_at[i] = min(gl_WorkGroupID.x * (ROWS / M) + me_down + i, MATRICES * row_tiles - 1) * tiles * M * K;
    for (uint slot = gl_WorkGroupID.y * SLOTS; slot < b.count; slot += gl_NumWorkGroups.y * SLOTS) {
        [[unroll]] for (uint j = 0; j < ALONG; j++)
            x_at[j] = min(slot / N + me_along + j, slot_tiles - 1) * tiles * N * K;
        Sum sum[ALONG * DOWN];
        [[unroll]] for (uint i = 0; i < ALONG * DOWN; i++) sum[i] = Sum(0.0);
        Rows rows0[DOWN];
        Rows rows1[DOWN];
        Values values0[ALONG];
        Values values1[ALONG];
        READ(rows0, values0, 0)
        for (uint t = 0; t < tiles; t += 2) {
            READ(rows1, values1, t + 1)
            MULTIPLY(rows0, values0)
            READ(rows0, values0, min(t + 2, tiles - 1)) /* without a branch, the products need not wait for it */
            MULTIPLY(rows1, values1)
        }
        [[unroll]] for (uint j = 0; j < ALONG; j++)
            [[unroll]] for (uint i = 0; i < DOWN; i += MATRICES) {
                Sum one = sum[j * DOWN + i];
#if defined(GATED)
                [[unroll]] for (uint e = 0; e < one.length(); e++)
                    one[e] = silu(GROW * one[e]) * (GROW * sum[j * DOWN + i + 1][e]);
#else
                [[unroll]] for (uint e = 0; e < one.length(); e++) one[e] *= GROW;
#endif
                const uint row = gl_WorkGroupID.x * OWN + (me_down + i) / MATRICES * M, at = slot + (me_along + j) * N;
                store_sum(one, b, row, left(p.rows, row), at, left(b.count, at));
            }
    }
}
