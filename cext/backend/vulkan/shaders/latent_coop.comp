// latent_coop.comp: latent_attend.comp for many tokens of one sequence, by cooperative matrices of halves summed in floats:
// queries, the cache's rows with their scales and the weights keep 11 bits each. KIND is the cache's.
//
// A workgroup of eight subgroups takes ROWS rows of queries (a head of a token each) over a part of the positions, TAKEN at a
// time: subgroups share out the scores' matrices, and what each sums over, among themselves, then the values' columns.
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "common.glsl"
#include "rows.glsl"

layout(local_size_x_id = 0) in; // eight subgroups
layout(constant_id = 1) const uint M = 16; // the device's shape: rows, columns, depth
layout(constant_id = 2) const uint N = 16;
layout(constant_id = 3) const uint K = 16;
layout(constant_id = 4) const uint WIDTH = 576; // of queries: whole shares of depth, 0 behind the row's values
layout(constant_id = 5) const uint V = 512; // values: whole matrices of each subgroup
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Halves { float16_t at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Shorts4 { i16vec4 at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Bytes4 { i8vec4 at[]; };
layout(push_constant, scalar) uniform Push {
    Tokens tokens; // (n_tok), of one sequence
    Halves q;      // (n_tok, n_head, WIDTH), to whole ROWS
    Floats to;     // (n_tok, n_head, n_parts, v + 2): acc, m, l
    uint n_head, n_tok, width, head, v, n_parts, at; // as in latent_attend.comp
    Layout l;
} p;

const uint SUBGROUPS = 8, ROWS = 32, TAKEN = 16, BLOCK = 64; // positions of a block
const uint SPLIT = SUBGROUPS * M * N / (ROWS * TAKEN); // subgroups that share one matrix of scores
const uint DEEP = WIDTH / (K * SPLIT); // matrices of a subgroup's share
const uint MINE = V / (SUBGROUPS * N); // matrices of a subgroup's columns
const uint KEY = ((WIDTH > V ? WIDTH : V) + 8) / 4; // of a row in shared memory, in fours: it begins in other banks
const uint WEIGHT = TAKEN + 8;

shared f16vec4 keys[TAKEN * KEY];
shared float sums[SUBGROUPS * M * N]; // of scores by share; then what rows shrink by, in each column; at the end values
shared float score[ROWS][TAKEN + 1];
shared float16_t weights[ROWS * WEIGHT];
shared float top[ROWS], sum[ROWS], factor[ROWS];
shared uint seen[ROWS]; // positions that a row sees

f16vec4 key(uint64_t block, uint j, uint i) {
    if (i >= p.width) return f16vec4(0.0);
#if KIND == 1
    const float scale = Floats(block + p.l.scale).at[j];
    return f16vec4(scale * vec4(Shorts4(block + p.l.data + j * p.l.row_bytes + 2 * i).at[0]));
#else
    if (i < p.head) {
        const float scale = Floats(block + p.l.scale).at[j];
        return f16vec4(scale * vec4(Bytes4(block + p.l.data + j * p.l.row_bytes + i).at[0]));
    }
    const float scale = Floats(block + p.l.tail_scale).at[j];
    return f16vec4(scale * vec4(Shorts4(block + p.l.tail + j * p.l.tail_bytes + 2 * (i - p.head)).at[0]));
#endif
}

void take_keys(uint from, uint end) {
    const uint64_t block = Longs(p.tokens.at[0].blocks).at[from / BLOCK] + p.at;
    for (uint i = gl_LocalInvocationIndex; i < TAKEN * (KEY - 2); i += gl_WorkGroupSize.x) {
        const uint j = i / (KEY - 2), c = i % (KEY - 2);
        keys[j * KEY + c] = from + j < end ? key(block, from % BLOCK + j, 4 * c) : f16vec4(0.0);
    }
}

// What the shares of depth give, together: the score of a row and a position.
float joined(uint r, uint j) {
    const uint first = (j / N * (ROWS / M) + r / M) * SPLIT;
    float s = 0.0;
    [[unroll]] for (uint i = 0; i < SPLIT; i++) s += sums[((first + i) * M + r % M) * N + j % N];
    return s;
}

void join_scores(uint from) {
    for (uint i = gl_LocalInvocationIndex; i < ROWS * TAKEN; i += gl_WorkGroupSize.x) {
        const uint r = i / TAKEN, j = i % TAKEN;
        score[r][j] = from + j < seen[r] ? joined(r, j) : -1.0 / 0.0;
    }
}

void raise_tops() {
    for (uint r = gl_LocalInvocationIndex; r < ROWS; r += gl_WorkGroupSize.x) {
        float most = top[r];
        [[unroll]] for (uint j = 0; j < TAKEN; j++) most = max(most, score[r][j]);
        factor[r] = top[r] == most ? 1.0 : exp(top[r] - most);
        top[r] = most;
    }
}

void weigh(uint from) {
    for (uint i = gl_LocalInvocationIndex; i < ROWS * TAKEN; i += gl_WorkGroupSize.x) {
        const uint r = i / TAKEN, j = i % TAKEN;
        const float16_t w = from + j < seen[r] ? float16_t(exp(score[r][j] - top[r])) : float16_t(0.0);
        weights[r * WEIGHT + j] = w;
        score[r][j] = float(w); // sums are of what values are weighted by
    }
    for (uint i = gl_LocalInvocationIndex; i < ROWS * N; i += gl_WorkGroupSize.x) sums[i] = factor[i / N];
}

void add_sums() {
    for (uint r = gl_LocalInvocationIndex; r < ROWS; r += gl_WorkGroupSize.x) {
        float total = sum[r] * factor[r];
        [[unroll]] for (uint j = 0; j < TAKEN; j++) total += score[r][j];
        sum[r] = total;
    }
}

void main() {
    const uint row0 = (gl_NumWorkGroups.x - 1 - gl_WorkGroupID.x) * ROWS; // those that see the most first
    const uint n_rows = p.n_tok * p.n_head, last = (min(row0 + ROWS, n_rows) - 1) / p.n_head;
    const uint n_pos = p.tokens.at[last].pos + 1, pieces = (n_pos + TAKEN - 1) / TAKEN;
    const uint each = (pieces + p.n_parts - 1) / p.n_parts;
    const uint begin = gl_WorkGroupID.y * each * TAKEN, end = min(n_pos, begin + each * TAKEN);
    for (uint r = gl_LocalInvocationIndex; r < ROWS; r += gl_WorkGroupSize.x) {
        top[r] = -1.0 / 0.0;
        sum[r] = 0.0;
        seen[r] = row0 + r < n_rows ? p.tokens.at[(row0 + r) / p.n_head].pos + 1 : 0;
    }
    const uint me = gl_SubgroupID, share = me % SPLIT, row = me / SPLIT % (ROWS / M) * M, column = me / SPLIT / (ROWS / M) * N;
    coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> q[DEEP];
    [[unroll]] for (uint d = 0; d < DEEP; d++)
        coopMatLoad(q[d], p.q.at, (row0 + row) * WIDTH + (share * DEEP + d) * K, WIDTH, gl_CooperativeMatrixLayoutRowMajor);
    coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator> acc[(ROWS / M) * MINE];
    [[unroll]] for (uint i = 0; i < (ROWS / M) * MINE; i++)
        acc[i] = coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>(0.0);
    for (uint from = begin; from < end; from += TAKEN) {
        barrier();
        take_keys(from, end);
        barrier();
        coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator> s =
            coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>(0.0);
        [[unroll]] for (uint d = 0; d < DEEP; d++) {
            coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> k;
            coopMatLoad(k, keys, column * KEY + (share * DEEP + d) * K / 4, KEY, gl_CooperativeMatrixLayoutColumnMajor);
            s = coopMatMulAdd(q[d], k, s);
        }
        coopMatStore(s, sums, me * M * N, N, gl_CooperativeMatrixLayoutRowMajor);
        barrier();
        join_scores(from);
        barrier();
        raise_tops();
        barrier();
        weigh(from);
        barrier();
        add_sums();
        [[unroll]] for (uint i = 0; i < ROWS / M; i++) {
            coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator> by;
            coopMatLoad(by, sums, i * M * N, N, gl_CooperativeMatrixLayoutRowMajor);
            [[unroll]] for (uint j = 0; j < MINE; j++) acc[i * MINE + j] = acc[i * MINE + j] * by;
        }
        [[unroll]] for (uint k = 0; k < TAKEN; k += K)
            [[unroll]] for (uint i = 0; i < ROWS / M; i++) {
                coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> w;
                coopMatLoad(w, weights, i * M * WEIGHT + k, WEIGHT, gl_CooperativeMatrixLayoutRowMajor);
                [[unroll]] for (uint j = 0; j < MINE; j++) {
                    coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> v;
                    coopMatLoad(v, keys, k * KEY + (me * MINE + j) * N / 4, KEY, gl_CooperativeMatrixLayoutRowMajor);
                    acc[i * MINE + j] = coopMatMulAdd(w, v, acc[i * MINE + j]);
                }
            }
    }
    barrier();
    [[unroll]] for (uint i = 0; i < ROWS / M; i++)
        [[unroll]] for (uint j = 0; j < MINE; j++) {
            coopMatStore(acc[i * MINE + j], sums, me * M * N, N, gl_CooperativeMatrixLayoutRowMajor);
            barrier();
            for (uint e = gl_SubgroupInvocationID; e < M * N; e += gl_SubgroupSize) {
                const uint r = row0 + i * M + e / N, c = (me * MINE + j) * N + e % N;
                if (r < n_rows && c < p.v)
                    p.to.at[(r * p.n_parts + gl_WorkGroupID.y) * (p.v + 2) + c] = sums[me * M * N + e];
            }
            barrier();
        }
    for (uint r = gl_LocalInvocationIndex; r < ROWS && row0 + r < n_rows; r += gl_WorkGroupSize.x) {
        const uint to = ((row0 + r) * p.n_parts + gl_WorkGroupID.y) * (p.v + 2) + p.v;
        p.to.at[to] = top[r];
        p.to.at[to + 1] = sum[r];
    }
}
