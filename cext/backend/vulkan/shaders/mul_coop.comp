#version 460
/* mul_coop.comp: y = x W^T for many slots a block by cooperative matrices of halves, summed in floats: weights and
 * activations keep 11 bits. Four subgroups compute ROWS by SLOTS, half of both each, a unit at a time: while one is
 * multiplied the next is read. With GATED, y = silu(x W^T) * (x Up^T): the tile's rows are half of W's, half of Up's.
 * Names as in product.glsl; grid (rows / what a tile has of them, slots / SLOTS, blocks): where a block has more slots
 * than the grid, its groups go on. */
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
layout(constant_id = 4) const uint ROWS = 64; /* 64 or 128 */
layout(constant_id = 5) const uint THREADS = 128; /* as many as constant 0 says */
const uint SLOTS = 64;
#if defined(GATED)
const uint OWN = ROWS / 2; /* rows of y */
#else
const uint OWN = ROWS;
#endif
const uint STEP = 40 / 4; /* of a row or slot's 32 halves, in fours: 8 more, so that rows begin in other banks */
const uint DOWN = ROWS / 2 / M, ALONG = SLOTS / 2 / N; /* matrices of a subgroup */
const uint W_EACH = (2 * ROWS + THREADS - 1) / THREADS; /* halves of units, and fours of x, that a thread reads */
const uint X_EACH = (8 * SLOTS + THREADS - 1) / THREADS;

/* Halves end at 65504: activations are taken by 1/16, which costs them no bit down to 2^-10. */
const float SHRINK = 0.0625, GROW = 16.0;

shared f16vec4 w_half[ROWS * STEP], x_half[SLOTS * STEP];
shared uint64_t w_at[ROWS], x_at[SLOTS];
shared float part[4 * M * N];

/* What is read of a unit, until the one before is done with: neighbours read what lies together. */
f16vec4 w_next[4 * W_EACH], x_next[X_EACH];

vec4 input4(uint64_t row, uint u, uint j) {
    const uint at = place(u, j / 4) + 4 * (j % 4);
#if !CODED
    if (at + 4 > p.k) {
        vec4 x = vec4(0.0);
        for (uint c = 0; c < 4 && at + c < p.k; c++) x[c] = Floats(row + 4 * (at + c)).v[0];
        return x;
    }
#endif
    return load4(row + 4 * at);
}

void read(uint u) {
    [[unroll]] for (uint e = 0; e < W_EACH; e++) {
        const uint i = min(gl_LocalInvocationIndex + e * THREADS, 2 * ROWS - 1);
        const Weights w = weights_of(w_at[i / 2], u, i % 2, p.k);
        [[unroll]] for (uint j = 0; j < 4; j++) w_next[4 * e + j] = f16vec4(w.v[j]);
    }
    [[unroll]] for (uint e = 0; e < X_EACH; e++) {
        const uint i = min(gl_LocalInvocationIndex + e * THREADS, 8 * SLOTS - 1);
        x_next[e] = f16vec4(SHRINK * input4(x_at[i / 8], u, i % 8));
    }
}

void put() {
    [[unroll]] for (uint e = 0; e < W_EACH; e++) {
        const uint i = gl_LocalInvocationIndex + e * THREADS;
        if (i < 2 * ROWS)
            [[unroll]] for (uint j = 0; j < 4; j++) w_half[i / 2 * STEP + 4 * (i % 2) + j] = w_next[4 * e + j];
    }
    [[unroll]] for (uint e = 0; e < X_EACH; e++) {
        const uint i = gl_LocalInvocationIndex + e * THREADS;
        if (i < 8 * SLOTS) x_half[i / 8 * STEP + i % 8] = x_next[e];
    }
}

/* The first row in the tile of a subgroup's matrix i, and in that of y. */
uint row_of(uint i) {
    const uint part = gl_SubgroupID / 2;
#if defined(GATED)
    return i < DOWN / 2 ? (part * (DOWN / 2) + i) * M : OWN + (part * (DOWN / 2) + i - DOWN / 2) * M;
#else
    return (part * DOWN + i) * M;
#endif
}

#if defined(GATED)
const uint RESULTS = DOWN / 2;
#else
const uint RESULTS = DOWN;
#endif

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    const uint row = gl_WorkGroupID.x * OWN, me = gl_LocalInvocationIndex, n_rows = min(p.rows - row, OWN);
    const uint my_slot = gl_SubgroupID % 2 * (SLOTS / 2), mine = gl_SubgroupID * M * N;
    if (gl_WorkGroupID.y * SLOTS >= b.count) return;
    unpack_begin();
    /* Beyond the last row or slot, the last is taken again. */
    for (uint i = me; i < ROWS; i += THREADS)
        w_at[i] = weight_row(i < OWN ? b.w : b.up, min(row + i % OWN, p.rows - 1));
    for (uint slot = gl_WorkGroupID.y * SLOTS; slot < b.count; slot += gl_NumWorkGroups.y * SLOTS) {
        const uint n_slots = min(b.count - slot, SLOTS), n = n_units(p.k);
        for (uint i = me; i < SLOTS; i += THREADS) x_at[i] = input_row(b, b.first + slot + min(i, n_slots - 1));
        coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator> sum[ALONG * DOWN];
        [[unroll]] for (uint i = 0; i < ALONG * DOWN; i++)
            sum[i] = coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>(0.0);
        barrier();
        read(0);
        for (uint u = 0; u < n; u++) {
            put();
            barrier();
            read(min(u + 1, n - 1)); /* without a branch, the products need not wait for it */
            [[unroll]] for (uint k = 0; k < 32; k += K) {
                coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> w[DOWN];
                [[unroll]] for (uint i = 0; i < DOWN; i++)
                    coopMatLoad(w[i], w_half, row_of(i) * STEP + k / 4, STEP, gl_CooperativeMatrixLayoutRowMajor);
                [[unroll]] for (uint j = 0; j < ALONG; j++) {
                    coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> x;
                    coopMatLoad(x, x_half, (my_slot + j * N) * STEP + k / 4, STEP,
                                gl_CooperativeMatrixLayoutColumnMajor);
                    [[unroll]] for (uint i = 0; i < DOWN; i++)
                        sum[j * DOWN + i] = coopMatMulAdd(w[i], x, sum[j * DOWN + i]);
                }
            }
            barrier();
        }
        [[unroll]] for (uint j = 0; j < ALONG; j++)
            [[unroll]] for (uint i = 0; i < RESULTS; i++) {
#if defined(GATED)
                [[unroll]] for (uint e = 0; e < sum[0].length(); e++)
                    sum[j * DOWN + i][e] = silu(GROW * sum[j * DOWN + i][e]) * sum[j * DOWN + RESULTS + i][e];
#endif
                coopMatStore(sum[j * DOWN + i], part, mine, M, gl_CooperativeMatrixLayoutColumnMajor);
                barrier();
                for (uint e = gl_SubgroupInvocationID; e < M * N; e += gl_SubgroupSize) {
                    const uint in_row = row_of(i) + e % M, in_slot = my_slot + j * N + e / M;
                    if (in_row < n_rows && in_slot < n_slots)
                        store(b, b.first + slot + in_slot, row + in_row, GROW * part[mine + e]);
                }
                barrier();
            }
    }
}
