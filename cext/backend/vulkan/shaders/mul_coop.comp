#version 460
/* mul_coop.comp: y = x W^T for many slots a block by cooperative matrices of halves, summed in floats: weights and
 * activations keep 11 bits. Four subgroups compute TILE by TILE, 32 by 32 each. Names as in product.glsl; grid (rows /
 * TILE, slots / TILE, blocks). */
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"
#include "factors.glsl"

layout(local_size_x_id = 0) in; /* four subgroups */
layout(constant_id = 1) const uint M = 16; /* the device's shape: rows, slots, values */
layout(constant_id = 2) const uint N = 16;
layout(constant_id = 3) const uint K = 16;
const uint TILE = 64, PART = 32; /* of a workgroup, of a subgroup */
const uint STEP = 40 / 4; /* of a row or slot's 32 halves, in fours: 8 more, so that rows begin in other banks */

/* Halves end at 65504: activations are taken by 1/16, which costs them no bit down to 2^-10. */
const float SHRINK = 0.0625, GROW = 16.0;

shared f16vec4 w_half[TILE * STEP], x_half[TILE * STEP];
shared uint64_t w_at[TILE], x_at[TILE];
shared float part[4 * M * N];

void put_weights(uint i, uint h, uint u) {
    const Weights w = weights_of(w_at[i], u, h, p.k);
    [[unroll]] for (uint j = 0; j < 4; j++) w_half[i * STEP + 4 * h + j] = f16vec4(w.v[j]);
}

void put_inputs(uint i, uint h, uint u) {
    const Inputs x = inputs_of(x_at[i], u, h, p.k);
    [[unroll]] for (uint j = 0; j < 4; j++) x_half[i * STEP + 4 * h + j] = f16vec4(SHRINK * x.v[j]);
}

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    const uint slot = gl_WorkGroupID.y * TILE, row = gl_WorkGroupID.x * TILE;
    if (slot >= b.count) return;
    /* Beyond the last row or slot, the last is taken again. */
    for (uint i = gl_LocalInvocationIndex; i < TILE; i += gl_WorkGroupSize.x) {
        w_at[i] = weight_row(b.w, min(row + i, p.rows - 1));
        x_at[i] = input_row(b, b.first + min(slot + i, b.count - 1));
    }
    unpack_begin();
    barrier();
    const uint my_row = gl_SubgroupID / 2 * PART, my_slot = gl_SubgroupID % 2 * PART;
    coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator> sum[(PART / M) * (PART / N)];
    [[unroll]] for (uint i = 0; i < (PART / M) * (PART / N); i++)
        sum[i] = coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>(0.0);
    for (uint u = 0; u < n_units(p.k); u++) {
        for (uint i = gl_LocalInvocationIndex; i < 2 * TILE; i += gl_WorkGroupSize.x) {
            put_weights(i % TILE, i / TILE, u);
            put_inputs(i % TILE, i / TILE, u);
        }
        barrier();
        [[unroll]] for (uint k = 0; k < 32; k += K) {
            coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> w[PART / M];
            [[unroll]] for (uint i = 0; i < PART / M; i++)
                coopMatLoad(w[i], w_half, (my_row + i * M) * STEP + k / 4, STEP, gl_CooperativeMatrixLayoutRowMajor);
            [[unroll]] for (uint j = 0; j < PART / N; j++) {
                coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> x;
                coopMatLoad(x, x_half, (my_slot + j * N) * STEP + k / 4, STEP, gl_CooperativeMatrixLayoutColumnMajor);
                [[unroll]] for (uint i = 0; i < PART / M; i++)
                    sum[j * (PART / M) + i] = coopMatMulAdd(w[i], x, sum[j * (PART / M) + i]);
            }
        }
        barrier();
    }
    const uint n_slots = min(b.count - slot, TILE), n_rows = min(p.rows - row, TILE), mine = gl_SubgroupID * M * N;
    [[unroll]] for (uint j = 0; j < PART / N; j++)
        [[unroll]] for (uint i = 0; i < PART / M; i++) {
            coopMatStore(sum[j * (PART / M) + i], part, mine, M, gl_CooperativeMatrixLayoutColumnMajor);
            barrier();
            for (uint e = gl_SubgroupInvocationID; e < M * N; e += gl_SubgroupSize) {
                const uint in_row = my_row + i * M + e % M, in_slot = my_slot + j * N + e / M;
                if (in_row < n_rows && in_slot < n_slots)
                    store(b, b.first + slot + in_slot, row + in_row, GROW * part[mine + e]);
            }
            barrier();
        }
}
