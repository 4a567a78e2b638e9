#version 460
/* mul_coop.comp: y = x W^T for many slots a block by cooperative matrices of halves, summed in floats: weights and
 * activations keep 11 bits. TALL by two subgroups compute ROWS by SLOTS, a share of both each, a unit at a time: the
 * next one is asked for before a unit is multiplied, and decoded behind that into the other half of shared memory, so that
 * a step has one round to memory and one barrier. With GATED, y = silu(x W^T) * (x Up^T): the tile's rows are half of W's, half of
 * Up's. Names as in product.glsl; grid (rows / what a tile has of them, slots / SLOTS, blocks): where a block has more
 * slots than the grid, its groups go on. */
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "product.glsl"
#define EXACT
#include "unpack.glsl"

layout(local_size_x_id = 0) in; /* TALL by two subgroups */
layout(constant_id = 1) const uint M = 16; /* the device's shape: rows, slots, values */
layout(constant_id = 2) const uint N = 16;
layout(constant_id = 3) const uint K = 16;
layout(constant_id = 4) const uint ROWS = 64; /* 64 or 128 */
layout(constant_id = 5) const uint THREADS = 128; /* as many as constant 0 says: 16 or more */
layout(constant_id = 6) const bool ALIGNED = false; /* x lies at multiples of 16 bytes, and k is one of 4 */
layout(constant_id = 7) const uint TALL = 2; /* 2 or 4 */
const uint SLOTS = 64;
#if defined(GATED)
const uint OWN = ROWS / 2; /* rows of y */
#else
const uint OWN = ROWS;
#endif
const uint STEP = 40 / 4; /* of a row or slot's 32 halves, in fours: 8 more, so that rows begin in other banks */
const uint DOWN = ROWS / TALL / M, ALONG = SLOTS / 2 / N; /* matrices of a subgroup */
const uint W_EACH = (2 * ROWS + THREADS - 1) / THREADS; /* halves of units, and fours of x, that a thread reads */
const uint X_EACH = (8 * SLOTS + THREADS - 1) / THREADS;

/* Halves end at 65504: activations are taken by 1/16, which costs them no bit down to 2^-10. */
const float SHRINK = 0.0625, GROW = 16.0;

shared f16vec4 w_half[2 * ROWS * STEP], x_half[2 * SLOTS * STEP]; /* of a unit, and of the next */
shared float part[2 * TALL * M * N];

/* ---- What a thread reads: neighbours read what lies together, the same rows and slots all along ---- */

#if CODED
#define Taken Codes
Taken take(uint64_t row, uint u, uint h) { return unpack(row, u, h); }
vec4 taken4(Taken t, uint j) { return decoded(t, j); }
#else
struct Taken {
    vec4 v[4];
};
Taken take(uint64_t row, uint u, uint h) {
    Taken t;
    decode(row, u, h, p.k, t.v);
    return t;
}
vec4 taken4(Taken t, uint j) { return t.v[j]; }
#endif

uint64_t w_at[W_EACH], x_at[X_EACH];
Taken w_next[W_EACH];
vec4 x_next[X_EACH];

/* Beyond the last row, slot or thread's piece, the last is taken again. */
void find_rows(Block b, uint row) {
    [[unroll]] for (uint e = 0; e < W_EACH; e++) {
        const uint i = min(gl_LocalInvocationIndex + e * THREADS, 2 * ROWS - 1) / 2;
        w_at[e] = weight_row(i < OWN ? b.w : b.up, min(row + i % OWN, p.rows - 1));
    }
}

void find_slots(Block b, uint slot, uint n_slots) {
    [[unroll]] for (uint e = 0; e < X_EACH; e++) {
        const uint i = min(gl_LocalInvocationIndex + e * THREADS, 8 * SLOTS - 1) / 8;
        x_at[e] = slot_input(b, b.first + slot + min(i, n_slots - 1));
    }
}

/* Values [at, at + 4) of a row of x, 0 from k on; no branch, so that a thread's loads are under way together. */
vec4 input4(uint64_t row, uint at) {
    if (ALIGNED) {
#if CODED
        return Vectors(row + 4 * at).v[0];
#else
        const vec4 x = Vectors(row + 4 * min(at, p.k - 4)).v[0];
        return at < p.k ? x : vec4(0.0);
#endif
    }
    vec4 x;
    [[unroll]] for (uint c = 0; c < 4; c++) {
        const float own = Floats(row + 4 * min(at + c, p.k - 1)).v[0];
        x[c] = at + c < p.k ? own : 0.0;
    }
    return x;
}

void read(uint u) {
    const uint h = gl_LocalInvocationIndex % 2, j = gl_LocalInvocationIndex % 8;
    const uint at = place(u, j / 4) + 4 * (j % 4);
    [[unroll]] for (uint e = 0; e < X_EACH; e++) x_next[e] = input4(x_at[e], at);
    [[unroll]] for (uint e = 0; e < W_EACH; e++) w_next[e] = take(w_at[e], u, h);
}

void put(uint room) {
    [[unroll]] for (uint e = 0; e < X_EACH; e++) {
        const uint i = gl_LocalInvocationIndex + e * THREADS;
        if (8 * SLOTS % THREADS != 0 && i >= 8 * SLOTS) break;
        x_half[(room * SLOTS + i / 8) * STEP + i % 8] = f16vec4(SHRINK * x_next[e]);
    }
    [[unroll]] for (uint e = 0; e < W_EACH; e++) {
        const uint i = gl_LocalInvocationIndex + e * THREADS;
        if (2 * ROWS % THREADS != 0 && i >= 2 * ROWS) break;
        [[unroll]] for (uint j = 0; j < 4; j++)
            w_half[(room * ROWS + i / 2) * STEP + 4 * (i % 2) + j] = f16vec4(taken4(w_next[e], j));
    }
}

/* ---- What a subgroup multiplies ---- */

#define Sum coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>

/* The first row in the tile of a subgroup's matrix i, and in that of y; the first slot of its matrix j. */
uint row_of(uint i) {
    const uint half_ = gl_SubgroupID / 2;
#if defined(GATED)
    return i < DOWN / 2 ? (half_ * (DOWN / 2) + i) * M : OWN + (half_ * (DOWN / 2) + i - DOWN / 2) * M;
#else
    return (half_ * DOWN + i) * M;
#endif
}

uint slot_of(uint j) { return gl_SubgroupID % 2 * (SLOTS / 2) + j * N; }

#if defined(GATED)
const uint RESULTS = DOWN / 2;
#else
const uint RESULTS = DOWN;
#endif

/* A subgroup waits for its own threads alone: its part of `part` is no other's. */
void subgroup_wait() {
    controlBarrier(gl_ScopeSubgroup, gl_ScopeSubgroup, gl_StorageSemanticsShared, gl_SemanticsAcquireRelease);
}

/* A matrix at (in_row, in_slot) of the tile at (row, slot), of which n_rows and n_slots are there. */
void store_sum(Sum sum, Block b, uint row, uint in_row, uint n_rows, uint slot, uint in_slot, uint n_slots) {
    const uint mine = gl_SubgroupID * M * N;
    coopMatStore(sum, part, mine, M, gl_CooperativeMatrixLayoutColumnMajor);
    subgroup_wait();
    for (uint e = gl_SubgroupInvocationID; e < M * N; e += gl_SubgroupSize) {
        const uint r = in_row + e % M, s = in_slot + e / M;
        if (r < n_rows && s < n_slots) store(b, b.first + slot + s, row + r, GROW * part[mine + e]);
    }
    subgroup_wait();
}

void main() {
    const Block b = block_of(gl_WorkGroupID.z);
    const uint row = gl_WorkGroupID.x * OWN, n_rows = min(p.rows - row, OWN), n = n_units(p.k);
    if (gl_WorkGroupID.y * SLOTS >= b.count) return;
    unpack_begin();
    find_rows(b, row);
    for (uint slot = gl_WorkGroupID.y * SLOTS; slot < b.count; slot += gl_NumWorkGroups.y * SLOTS) {
        const uint n_slots = min(b.count - slot, SLOTS);
        Sum sum[ALONG * DOWN];
        [[unroll]] for (uint i = 0; i < ALONG * DOWN; i++) sum[i] = Sum(0.0);
        find_slots(b, slot, n_slots);
        read(0);
        put(0);
        barrier();
        for (uint u = 0; u < n; u++) {
            const uint w_from = u % 2 * ROWS, x_from = u % 2 * SLOTS;
            read(min(u + 1, n - 1)); /* without a branch, the products need not wait for it */
            [[unroll]] for (uint k = 0; k < 32; k += K) {
                coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> w[DOWN];
                [[unroll]] for (uint i = 0; i < DOWN; i++)
                    coopMatLoad(w[i], w_half, (w_from + row_of(i)) * STEP + k / 4, STEP,
                                gl_CooperativeMatrixLayoutRowMajor);
                [[unroll]] for (uint j = 0; j < ALONG; j++) {
                    coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> x;
                    coopMatLoad(x, x_half, (x_from + slot_of(j)) * STEP + k / 4, STEP,
                                gl_CooperativeMatrixLayoutColumnMajor);
                    [[unroll]] for (uint i = 0; i < DOWN; i++)
                        sum[j * DOWN + i] = coopMatMulAdd(w[i], x, sum[j * DOWN + i]);
                }
            }
            put((u + 1) % 2);
            barrier();
        }
        [[unroll]] for (uint j = 0; j < ALONG; j++)
            [[unroll]] for (uint i = 0; i < RESULTS; i++) {
#if defined(GATED)
                [[unroll]] for (uint e = 0; e < sum[0].length(); e++)
                    sum[j * DOWN + i][e] = silu(GROW * sum[j * DOWN + i][e]) * sum[j * DOWN + RESULTS + i][e];
#endif
                store_sum(sum[j * DOWN + i], b, row, row_of(i), n_rows, slot, slot_of(j), n_slots);
            }
    }
}
