// expanded_attend.comp: attention of many tokens of one sequence over keys and values made of the cache's rows for each head,
// by cooperative matrices of halves summed in floats.
//
// A workgroup takes ROWS tokens of a head over positions [begin, begin + count), TAKEN at a time: a subgroup has M tokens, their
// scores, weights and sums, and shares with the others what is read alone. A token's weights are made by LINE threads, which keep
// its largest score and its sum. Where the positions are not the first, or not the last, sums go on from `sums`, or into it.
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "common.glsl"
#include "rows.glsl"

layout(local_size_x_id = 0) in; // SUBGROUPS of the device's
layout(constant_id = 1) const uint M = 16; // the device's shape: rows, columns, depth
layout(constant_id = 2) const uint N = 16;
layout(constant_id = 3) const uint K = 16;
layout(constant_id = 4) const uint WIDTH = 192; // of queries and keys: whole matrices, 0 behind a query's values
layout(constant_id = 5) const uint V = 128; // of values: whole matrices
layout(constant_id = 6) const uint SUBGROUPS = 8;
layout(constant_id = 7) const uint TAKEN = 32; // whole matrices
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Halves { float16_t at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Vectors { vec4 at[2]; };
layout(push_constant, scalar) uniform Push {
    Tokens tokens;    // (n_tok)
    uint64_t queries; // halves (n_tok, n_head, WIDTH)
    uint64_t keys;    // floats (count, n_head, nope)
    uint64_t tails;   // floats (count, n_tail): of all heads' keys
    uint64_t values;  // floats (count, n_head, v)
    Floats sums;      // (whole matrices of tokens, n_head, V)
    Floats tops;      // (n_tok, n_head, 2): what weights are by, their sum
    Floats to;        // (n_tok, n_head, v)
    uint n_tok, n_head, nope, n_tail, v, begin, count;
} p;

const uint ROWS = SUBGROUPS * M, SUBGROUP = gl_WorkGroupSize.x / SUBGROUPS, LINE = SUBGROUP / M, OWN = TAKEN / LINE;
const uint KEY = WIDTH / 8 + 1, VALUE = V / 8 + 1; // of a position in shared memory, in eights: it begins in other banks
const uint WEIGHT = TAKEN + 8;
// Weights are by a score that may lie so much under the largest: sums are made smaller when a row grows by more, which is
// seldom behind the first positions. exp(8) is far within a half.
const float SLACK = 8.0;

shared uvec4 keys[TAKEN * KEY], values[TAKEN * VALUE];
shared float scores[SUBGROUPS * TAKEN * M]; // of each subgroup (TAKEN, M); then what rows shrink by; at the end its sums
shared float16_t weights[SUBGROUPS * M * WEIGHT];

#define Sum coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>

void subgroup_wait() {
    controlBarrier(gl_ScopeSubgroup, gl_ScopeSubgroup, gl_StorageSemanticsShared, gl_SemanticsAcquireRelease);
}

// ---- Keys and values: a thread has eights of one position, LANES apart. All are asked for at once and without a branch, before
// what came before is multiplied, and taken into shared memory behind that. Beyond the last, the last is asked for: what it is
// multiplied by is 0, or is not kept. ----

const uint LANES = gl_WorkGroupSize.x / TAKEN, EIGHTS = WIDTH / 8 + V / 8, EACH = (EIGHTS + LANES - 1) / LANES;
vec4 asked[2 * EACH];

void ask(uint from) {
    const uint lane = gl_LocalInvocationIndex % LANES, j = min(from + gl_LocalInvocationIndex / LANES, p.count - 1);
    const uint at = j * p.n_head + gl_WorkGroupID.x;
    const uint64_t key = p.keys + 4 * uint64_t(at * p.nope), tail = p.tails + 4 * (j * p.n_tail),
                   value = p.values + 4 * uint64_t(at * p.v);
    [[unroll]] for (uint e = 0; e < EACH; e++) {
        const uint i = min(8 * (lane + e * LANES), WIDTH + V - 8);
        const uint64_t of_key = i < p.nope ? key + 4 * i : tail + 4 * min(i - p.nope, p.n_tail - 8);
        const uint64_t eight = i < WIDTH ? of_key : value + 4 * min(i - WIDTH, p.v - 8);
        asked[2 * e] = Vectors(eight).at[0];
        asked[2 * e + 1] = Vectors(eight).at[1];
    }
}

uvec2 packed(vec4 four) { return uvec2(packFloat2x16(f16vec2(four.xy)), packFloat2x16(f16vec2(four.zw))); }

void take() {
    const uint lane = gl_LocalInvocationIndex % LANES, j = gl_LocalInvocationIndex / LANES;
    [[unroll]] for (uint e = 0; e < EACH; e++) {
        const uint i = lane + e * LANES;
        const uvec4 eight = uvec4(packed(asked[2 * e]), packed(asked[2 * e + 1]));
        if (i < WIDTH / 8) keys[j * KEY + i] = eight;
        else if (i < EIGHTS) values[j * VALUE + i - WIDTH / 8] = eight;
    }
}

// ---- Weights ----

float top = -1.0 / 0.0, total = 0.0; // of a thread's token: what weights are by, and of its positions their sum

// The weights of positions from `from` on, of which the thread's token sees those before `seen`; what its sums shrink by.
float weigh(uint from, uint seen) {
    const uint mine = gl_SubgroupID * TAKEN * M, r = gl_SubgroupInvocationID % M, first = gl_SubgroupInvocationID / M;
    float score[OWN], most = -1.0 / 0.0;
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        score[i] = from + i * LINE + first < seen ? scores[mine + (i * LINE + first) * M + r] : -1.0 / 0.0;
        most = max(most, score[i]);
    }
    [[unroll]] for (uint d = M; d < SUBGROUP; d *= 2) most = max(most, subgroupShuffleXor(most, d));
    const float before = top;
    if (most > top + SLACK) top = most;
    const float by = top == before ? 1.0 : exp(before - top);
    total *= by;
    [[unroll]] for (uint i = 0; i < OWN; i++) {
        const float16_t w = from + i * LINE + first < seen ? float16_t(exp(score[i] - top)) : float16_t(0.0);
        weights[(gl_SubgroupID * M + r) * WEIGHT + i * LINE + first] = w;
        total += float(w);
    }
    return by;
}

// Positions from p.begin on that a token sees, or the last one.
uint seen_of(uint t) {
    const uint n_pos = p.tokens.at[min(t, p.n_tok - 1)].pos + 1;
    return n_pos - min(n_pos, p.begin);
}

void main() {
    const uint first = (gl_NumWorkGroups.y - 1 - gl_WorkGroupID.y) * ROWS, h = gl_WorkGroupID.x; // those that see the most first
    const uint me = gl_SubgroupID, r = gl_SubgroupInvocationID % M, line = gl_SubgroupInvocationID / M;
    const uint row = first + me * M, mine = me * TAKEN * M; // the subgroup's first token, its place in `scores`
    const uint n_pos = seen_of(first + ROWS - 1), n = min(n_pos, p.count), last_seen = seen_of(row + M - 1);
    const uint seen = row + r < p.n_tok ? seen_of(row + r) : 0;
    const uint sums_at = (row * p.n_head + h) * V, tops_at = ((row + r) * p.n_head + h) * 2;
    if (n_pos == 0) return; // they are done
    const bool goes_on = n_pos > p.count; // the workgroup's tokens see more than these positions
    coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> q[WIDTH / K];
    [[unroll]] for (uint d = 0; d < WIDTH / K; d++)
        coopMatLoad(q[d], Halves(p.queries).at, (row * p.n_head + h) * WIDTH + d * K, p.n_head * WIDTH, gl_CooperativeMatrixLayoutRowMajor);
    Sum acc[V / N];
    [[unroll]] for (uint j = 0; j < V / N; j++) acc[j] = Sum(0.0);
    if (p.begin > 0) {
        [[unroll]] for (uint j = 0; j < V / N; j++)
            coopMatLoad(acc[j], p.sums.at, sums_at + j * N, p.n_head * V, gl_CooperativeMatrixLayoutRowMajor);
        if (row + r < p.n_tok) {
            top = p.tops.at[tops_at];
            total = line == 0 ? p.tops.at[tops_at + 1] : 0.0;
        }
    }
    ask(0);
    for (uint from = 0; from < n; from += TAKEN) {
        barrier();
        take();
        barrier();
        ask(from + TAKEN);
        const bool here = from < last_seen && row < p.n_tok; // all wait, so that a device may count them together
        if (here) {
            Sum s[TAKEN / N];
            [[unroll]] for (uint c = 0; c < TAKEN / N; c++) s[c] = Sum(0.0);
            [[unroll]] for (uint d = 0; d < WIDTH / K; d++)
                [[unroll]] for (uint c = 0; c < TAKEN / N; c++) {
                    coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> k;
                    coopMatLoad(k, keys, c * N * KEY + d * K / 8, KEY, gl_CooperativeMatrixLayoutColumnMajor);
                    s[c] = coopMatMulAdd(q[d], k, s[c]);
                }
            [[unroll]] for (uint c = 0; c < TAKEN / N; c++)
                coopMatStore(s[c], scores, mine + c * N * M, M, gl_CooperativeMatrixLayoutColumnMajor);
        }
        subgroup_wait();
        float by = 1.0;
        if (here) by = weigh(from, seen);
        const bool shrinks = subgroupMin(by) < 1.0;
        if (shrinks)
            for (uint i = line; i < N; i += LINE) scores[mine + i * M + r] = by; // where the thread itself has read
        subgroup_wait();
        if (shrinks) {
            Sum shrink;
            coopMatLoad(shrink, scores, mine, M, gl_CooperativeMatrixLayoutColumnMajor);
            [[unroll]] for (uint j = 0; j < V / N; j++) acc[j] = acc[j] * shrink;
        }
        if (here)
            [[unroll]] for (uint k = 0; k < TAKEN; k += K) {
                coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> w;
                coopMatLoad(w, weights, me * M * WEIGHT + k, WEIGHT, gl_CooperativeMatrixLayoutRowMajor);
                [[unroll]] for (uint j = 0; j < V / N; j++) {
                    coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> v;
                    coopMatLoad(v, values, k * VALUE + j * N / 8, VALUE, gl_CooperativeMatrixLayoutRowMajor);
                    acc[j] = coopMatMulAdd(w, v, acc[j]);
                }
            }
    }
    [[unroll]] for (uint d = M; d < SUBGROUP; d *= 2) total += subgroupShuffleXor(total, d);
    if (goes_on) {
        [[unroll]] for (uint j = 0; j < V / N; j++)
            coopMatStore(acc[j], p.sums.at, sums_at + j * N, p.n_head * V, gl_CooperativeMatrixLayoutRowMajor);
        if (line == 0 && row + r < p.n_tok) {
            p.tops.at[tops_at] = top;
            p.tops.at[tops_at + 1] = total;
        }
        return;
    }
    [[unroll]] for (uint j = 0; j < V / N; j++) {
        subgroup_wait();
        coopMatStore(acc[j], scores, mine, M, gl_CooperativeMatrixLayoutColumnMajor);
        subgroup_wait();
        for (uint i = line * (N / LINE); i < (line + 1) * (N / LINE); i++) {
            const uint c = j * N + i;
            if (row + r < p.n_tok && c < p.v) p.to.at[((row + r) * p.n_head + h) * p.v + c] = scores[mine + i * M + r] / total;
        }
    }
}
