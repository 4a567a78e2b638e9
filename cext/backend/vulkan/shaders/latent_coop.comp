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
#include "attend.glsl"

layout(local_size_x_id = 0) in; // eight subgroups
layout(constant_id = 1) const uint M = 16; // the device's shape: rows, columns, depth
layout(constant_id = 2) const uint N = 16;
layout(constant_id = 3) const uint K = 16;
layout(constant_id = 4) const uint WIDTH = 576; // of queries: whole shares of depth, 0 behind the row's values
layout(constant_id = 5) const uint V = 512; // values: whole matrices of each subgroup
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Halves { float16_t at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Pairs { uvec2 at; };

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
shared float top[2][ROWS], sum[ROWS];
shared uint seen[ROWS]; // positions that a row sees

// ---- Keys: a thread has fours of one row, LANES apart. All are asked for at once and without a branch, before what came
// before is multiplied, and taken into shared memory behind that. ----

const uint LANES = gl_WorkGroupSize.x / TAKEN, FOURS = KEY - 2, EACH = (FOURS + LANES - 1) / LANES;
uvec2 asked[EACH];
float asked_scale, asked_tail_scale;

uint64_t block_of(uint from) { return Longs(p.tokens.at[0].blocks).at[from / BLOCK] + p.at; }

// Beyond the last position or value, the last is asked for: what it is multiplied by is 0.
void ask_keys(uint64_t block, uint from, uint end) {
    const uint lane = gl_LocalInvocationIndex % LANES, j = min(from + gl_LocalInvocationIndex / LANES, end - 1) % BLOCK;
    const uint64_t data = block + p.l.data + j * p.l.row_bytes;
    asked_scale = Floats(block + p.l.scale).at[j];
#if KIND == 2
    const uint64_t tail = block + p.l.tail + j * p.l.tail_bytes;
    asked_tail_scale = Floats(block + p.l.tail_scale).at[j];
#endif
    [[unroll]] for (uint e = 0; e < EACH; e++) {
        const uint i = min(4 * (lane + e * LANES), p.width - 4);
#if KIND == 1
        asked[e] = Pairs(data + 2 * i).at;
#else
        const bool head = i < p.head;
        const uint64_t at = head ? data + i : tail + 2 * (i - p.head);
        asked[e] = uvec2(Uints(at).at[0], Uints(at + (head ? 0 : 4)).at[0]);
#endif
    }
}

vec4 shorts(uvec2 four) {
    return vec4(int(four.x << 16) >> 16, int(four.x) >> 16, int(four.y << 16) >> 16, int(four.y) >> 16);
}

void take_keys() {
    const uint lane = gl_LocalInvocationIndex % LANES, j = gl_LocalInvocationIndex / LANES;
    [[unroll]] for (uint e = 0; e < EACH; e++) {
        const uint i = lane + e * LANES;
        vec4 four = asked_scale * shorts(asked[e]);
#if KIND == 2
        if (4 * i < p.head) four = asked_scale * vec4(unpack8(int(asked[e].x)));
        else four = asked_tail_scale * shorts(asked[e]);
#endif
        if (i < FOURS) keys[j * KEY + i] = f16vec4(four);
    }
}

// ---- Scores and weights ----

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

// The weights of rows' positions by their largest score and those before, and what rows' sums shrink by. Tops are in turns
// the ones before and the ones to come: a row's threads all find the same.
void weigh(uint from, uint turn) {
    for (uint i = gl_LocalInvocationIndex; i < ROWS * TAKEN; i += gl_WorkGroupSize.x) {
        const uint r = i / TAKEN, j = i % TAKEN;
        const float before = top[turn][r];
        float most = before;
        [[unroll]] for (uint c = 0; c < TAKEN; c++) most = max(most, score[r][c]);
        const float by = before == most ? 1.0 : exp(before - most);
        weights[r * WEIGHT + j] = from + j < seen[r] ? float16_t(exp(score[r][j] - most)) : float16_t(0.0);
        for (uint n = j; n < N; n += TAKEN) sums[r * N + n] = by;
        if (j == 0) top[1 - turn][r] = most;
    }
}

// Sums are of what values are weighted by.
void add_sums() {
    for (uint r = gl_LocalInvocationIndex; r < ROWS; r += gl_WorkGroupSize.x) {
        float total = sum[r] * sums[r * N];
        [[unroll]] for (uint j = 0; j < TAKEN; j++) total += float(weights[r * WEIGHT + j]);
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
        top[0][r] = -1.0 / 0.0;
        sum[r] = 0.0;
        seen[r] = row0 + r < n_rows ? p.tokens.at[(row0 + r) / p.n_head].pos + 1 : 0;
    }
    const uint me = gl_SubgroupID, share = me % SPLIT, row = me / SPLIT % (ROWS / M) * M, column = me / SPLIT / (ROWS / M) * N;
    coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> q[DEEP];
    [[unroll]] for (uint d = 0; d < DEEP; d++)
        coopMatLoad(q[d], Halves(p.queries).at, (row0 + row) * WIDTH + (share * DEEP + d) * K, WIDTH, gl_CooperativeMatrixLayoutRowMajor);
    coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator> acc[(ROWS / M) * MINE];
    [[unroll]] for (uint i = 0; i < (ROWS / M) * MINE; i++)
        acc[i] = coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>(0.0);
    const uint last_from = begin + (max(end, begin + 1) - begin - 1) / TAKEN * TAKEN;
    uint64_t ahead = 0;
    uint turn = 0;
    if (begin < end) {
        ask_keys(block_of(begin), begin, end);
        ahead = block_of(min(begin + TAKEN, last_from));
    }
    for (uint from = begin; from < end; from += TAKEN) {
        barrier();
        take_keys();
        barrier();
        ask_keys(ahead, min(from + TAKEN, last_from), end);
        ahead = block_of(min(from + 2 * TAKEN, last_from));
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
        weigh(from, turn);
        barrier();
        add_sums();
        turn = 1 - turn;
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
        p.to.at[to] = top[turn][r];
        p.to.at[to + 1] = sum[r];
    }
}
