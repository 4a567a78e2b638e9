// latent_few.comp: latent_query.comp and latent_attend.comp for few tokens over rows of 16 or 8 bits: the same of it all, with
// less waiting. Queries are made where they are used. SPLIT threads share two keys, sixteen bytes of each in turn, so that
// they read them in order, for all heads; then a thread has two values of every position. What a thread reads is
// asked for a few pieces ahead, the last again beyond the end. Loops are not unrolled for their own sake (mul_vec.comp).
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#include "common.glsl"
#include "rows.glsl"

layout(local_size_x = 256) in;
layout(constant_id = 0) const uint PAIRS = 1; // of values, of a thread: v / 512, rounded up
layout(push_constant, scalar) uniform Push {
    Tokens tokens;   // (n_tok)
    Floats absorbed; // (n_tok, n_head, rank): of each head W_uk^T q_nope
    Floats q;        // (n_tok, n_head, nope + n_tail)
    Floats angles;   // (n_tok, n_tail)
    Floats to;       // (n_tok, n_head, n_parts, v + 2): acc, m, l
    uint n_head, rank, nope, n_tail, width, head, v, n_parts, at; // head: values of width that are the row's head; at: of the layer in a block
    Layout l;
} p;

layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Quads { uvec4 at; };

const uint THREADS = 256, HEADS = 8, TILE = 64, MOST_WIDTH = 640;
const uint SPLIT = 8, KEYS = THREADS / SPLIT; // a thread's keys are KEYS apart
const uint ASKED = 2, POSITIONS = 8; // pieces of a key, and positions, under way
const uint SHARE = 8; // of a tile, of loops that are unrolled in part
shared vec4 queries[HEADS * MOST_WIDTH / 4];
shared vec4 sums[SPLIT * KEYS * HEADS / 4];
shared float scores[TILE][HEADS]; // then the weights
shared float scales[TILE];
shared float top[HEADS], sum[HEADS], shrink[HEADS];

vec2 shorts(uint two) { return vec2(int(two << 16) >> 16, int(two) >> 16); }

// ---- Queries ----

uint kept_at(uint i) {
#if KIND == 1
    return place16(i);
#else
    return i < p.rank ? place8(i) : p.head + place16(i - p.rank);
#endif
}

void keep(uint h, uint at, float x) {
    at += h * p.width;
    queries[at / 4][at % 4] = x;
}

// Value i of a query behind its first `rank`: the rotary ones, rotated by the token's place; then 0.
float rotary(uint t, uint h, uint i) {
    if (i >= p.n_tail || h >= p.n_head) return 0.0;
    const uint q = (t * p.n_head + h) * (p.nope + p.n_tail) + p.nope, pair = i & ~1u;
    const float c = p.angles.at[t * p.n_tail + pair], s = p.angles.at[t * p.n_tail + pair + 1];
    const float a = p.q.at[q + pair], b = p.q.at[q + pair + 1];
    return i == pair ? a * c - b * s : a * s + b * c;
}

#if KIND == 2
// As rotate.glsl has it, of all heads, in the order that they are kept in.
void rotate_queries() {
    const uint block = p.rank & (~p.rank + 1), pairs = p.rank / 2;
    for (uint half_way = 1; half_way < block; half_way *= 2) {
        barrier();
        for (uint i = gl_LocalInvocationIndex; i < HEADS * pairs; i += THREADS) {
            const uint first = i / pairs * p.width, r = i % pairs, a = r / half_way * 2 * half_way + r % half_way;
            const uint at_a = first + place8(a), at_b = first + place8(a + half_way);
            const float u = queries[at_a / 4][at_a % 4], v = queries[at_b / 4][at_b % 4];
            queries[at_a / 4][at_a % 4] = u + v;
            queries[at_b / 4][at_b % 4] = u - v;
        }
    }
}
#endif

// Those of heads from h0 on, times the scores' scale; of heads behind the last, 0.
void load_queries(uint h0, uint t, float token_scale) {
    const uint me = gl_LocalInvocationIndex, from = (t * p.n_head + h0) * p.rank;
    float scale = token_scale;
#if KIND == 2
    scale /= sqrt(float(p.rank & (~p.rank + 1)));
    for (uint i = me; i < HEADS * p.width / 4; i += THREADS) queries[i] = vec4(0.0);
    barrier();
#endif
    [[dont_unroll]] for (uint i = me; i < p.rank; i += THREADS) {
        const uint at = kept_at(i);
        float x[HEADS];
        [[unroll]] for (uint h = 0; h < HEADS; h++) x[h] = p.absorbed.at[from + min(h, p.n_head - 1 - h0) * p.rank + i];
        [[unroll]] for (uint h = 0; h < HEADS; h++) keep(h, at, h0 + h < p.n_head ? x[h] * scale : 0.0);
    }
#if KIND == 2
    rotate_queries();
    const uint behind = p.n_tail;
#else
    const uint behind = p.width - p.rank;
#endif
    const uint h = me % HEADS;
    [[dont_unroll]] for (uint c = me / HEADS; c < behind; c += THREADS / HEADS)
        keep(h, kept_at(p.rank + c), rotary(t, h0 + h, c) * token_scale);
}

// ---- Scores ----

float score[2][HEADS]; // of a thread's part of its keys

// All heads by four values of the thread's keys.
void multiply4(uint at, vec4 a, vec4 b) {
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        const vec4 q = queries[(h * p.width + at) / 4];
        score[0][h] += dot(q, a);
        score[1][h] += dot(q, b);
    }
}

// All heads by a piece of either key, the values at and behind `at` of the query.
void multiply_piece(uint at, uvec4 a, uvec4 b, bool bytes, vec2 scale) {
    [[dont_unroll]] for (uint w = 0; w < 4; w += 2) {
        const uvec2 two = w == 0 ? a.xy : a.zw, other = w == 0 ? b.xy : b.zw;
        if (bytes) {
            multiply4(at + 4 * w, scale.x * vec4(unpack8(int(two.x))), scale.y * vec4(unpack8(int(other.x))));
            multiply4(at + 4 * w + 4, scale.x * vec4(unpack8(int(two.y))), scale.y * vec4(unpack8(int(other.y))));
        } else {
            multiply4(at + 2 * w, scale.x * vec4(shorts(two.x), shorts(two.y)), scale.y * vec4(shorts(other.x), shorts(other.y)));
        }
    }
}

// By the pieces of a key from `first` on, of which each has so many values. Those of the next rounds are under way.
void multiply_keys(uint64_t first, uint64_t second, uint n, uint at, bool bytes, vec2 scale) {
    const uint lane = gl_LocalInvocationIndex % SPLIT, each = bytes ? 16 : 8;
    uvec4 a[ASKED], b[ASKED];
    [[unroll]] for (uint k = 0; k < ASKED; k++) {
        const uint piece = min(lane + k * SPLIT, n - 1);
        a[k] = Quads(first + 16 * piece).at;
        b[k] = Quads(second + 16 * piece).at;
    }
    [[dont_unroll]] for (uint i = lane; i < n; i += SPLIT) {
        multiply_piece(at + i * each, a[0], b[0], bytes, scale);
        [[unroll]] for (uint k = 1; k < ASKED; k++) a[k - 1] = a[k], b[k - 1] = b[k];
        const uint piece = min(i + ASKED * SPLIT, n - 1);
        a[ASKED - 1] = Quads(first + 16 * piece).at;
        b[ASKED - 1] = Quads(second + 16 * piece).at;
    }
}

// The scores of a tile's first `seen` positions; more are of no meaning. Leaves its scales.
void score_tile(uint64_t block, uint seen) {
    const uint me = gl_LocalInvocationIndex, lane = me % SPLIT, j = me / SPLIT;
    const uint first = min(j, seen - 1), second = min(j + KEYS, seen - 1);
    const uint64_t data = block + p.l.data;
    const vec2 scale = vec2(Floats(block + p.l.scale).at[first], Floats(block + p.l.scale).at[second]);
    [[unroll]] for (uint h = 0; h < HEADS; h++) score[0][h] = score[1][h] = 0.0;
#if KIND == 1
    multiply_keys(data + first * p.l.row_bytes, data + second * p.l.row_bytes, p.width / 8, 0, false, scale);
#else
    const vec2 tail = vec2(Floats(block + p.l.tail_scale).at[first], Floats(block + p.l.tail_scale).at[second]);
    const uint64_t rotary = block + p.l.tail;
    multiply_keys(data + first * p.l.row_bytes, data + second * p.l.row_bytes, p.head / 16, 0, true, scale);
    multiply_keys(rotary + first * p.l.tail_bytes, rotary + second * p.l.tail_bytes, (p.width - p.head) / 8, p.head, false, tail);
#endif
    if (lane == 0) scales[j] = j < seen ? scale.x : 0.0, scales[j + KEYS] = j + KEYS < seen ? scale.y : 0.0;
    [[unroll]] for (uint k = 0; k < 2; k++) {
        barrier();
        [[unroll]] for (uint h = 0; h < HEADS; h += 4)
            sums[(lane * THREADS + j * HEADS + h) / 4] = vec4(score[k][h], score[k][h + 1], score[k][h + 2], score[k][h + 3]);
        barrier();
        float all = 0.0;
        [[unroll]] for (uint s = 0; s < SPLIT; s++) all += sums[(s * THREADS + me) / 4][me % 4];
        scores[k * KEYS + me / HEADS][me % HEADS] = all;
    }
    barrier();
}

// The weights of a tile's positions, by its largest score and those before, in the scores' place; 0 of those not seen.
void soften(uint seen) {
    const uint h = gl_LocalInvocationIndex % HEADS, c = gl_LocalInvocationIndex / HEADS;
    const float before = top[h];
    float most = before, weight[2];
    [[dont_unroll]] for (uint i = 0; i < TILE; i += SHARE)
        [[unroll]] for (uint k = 0; k < SHARE; k++) most = max(most, i + k < seen ? scores[i + k][h] : before);
    [[unroll]] for (uint k = 0; k < 2; k++) {
        const uint i = c + k * KEYS;
        weight[k] = i < seen ? exp(scores[i][h] - most) : 0.0;
    }
    barrier();
    [[unroll]] for (uint k = 0; k < 2; k++) scores[c + k * KEYS][h] = weight[k];
    barrier();
    if (c != 0) return;
    float total = 0.0;
    [[dont_unroll]] for (uint i = 0; i < TILE; i += SHARE)
        [[unroll]] for (uint k = 0; k < SHARE; k++) total += scores[i + k][h];
    shrink[h] = exp(before - most);
    sum[h] = sum[h] * shrink[h] + total;
    top[h] = most;
}

// ---- Values ----

// Values d and d + 1 of row j, without its scale; d is even.
vec2 value2(uint64_t block, uint j, uint d) {
#if KIND == 1
    return shorts(Uints(block + p.l.data + j * p.l.row_bytes + 2 * d).at[0]);
#else
    const uint two = uint(Shorts(block + p.l.data + j * p.l.row_bytes + d).at[0]);
    return vec2(int(two << 24) >> 24, int(two << 16) >> 24);
#endif
}

vec2 acc[HEADS][PAIRS];

void add_values(uint64_t block, uint seen) {
    [[unroll]] for (uint s = 0; s < PAIRS; s++) {
        const uint d = 2 * (gl_LocalInvocationIndex + s * THREADS);
        if (d >= p.v) continue;
        [[unroll]] for (uint h = 0; h < HEADS; h++) acc[h][s] *= shrink[h];
        for (uint i = 0; i < seen; i += POSITIONS) {
            vec2 v[POSITIONS];
            [[unroll]] for (uint k = 0; k < POSITIONS; k++) v[k] = value2(block, min(i + k, seen - 1), d);
            [[unroll]] for (uint k = 0; k < POSITIONS; k++) {
                v[k] *= scales[i + k];
                [[unroll]] for (uint h = 0; h < HEADS; h++) acc[h][s] += scores[i + k][h] * v[k];
            }
        }
    }
}

void main() {
    const uint part = gl_WorkGroupID.x, h0 = gl_WorkGroupID.y * HEADS, t = gl_WorkGroupID.z;
    const Token token = p.tokens.at[t];
    const uint me = gl_LocalInvocationIndex, n_pos = token.pos + 1;
    const uint tiles = (n_pos + TILE - 1) / TILE, each = (tiles + p.n_parts - 1) / p.n_parts;
    const uint end = min(tiles, (part + 1) * each);
    [[unroll]] for (uint h = 0; h < HEADS; h++)
        [[unroll]] for (uint s = 0; s < PAIRS; s++) acc[h][s] = vec2(0.0);
    if (me < HEADS) top[me] = -1.0 / 0.0, sum[me] = 0.0;
    load_queries(h0, t, token.scale);
    for (uint tile = part * each; tile < end; tile++) {
        const uint64_t block = Longs(token.blocks).at[tile] + p.at;
        const uint seen = min(TILE, n_pos - tile * TILE);
        barrier(); // queries are there; the values before were added
        score_tile(block, seen);
        soften(seen);
        barrier();
        add_values(block, seen);
    }
    barrier();
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        if (h0 + h >= p.n_head) break;
        const uint to = ((t * p.n_head + h0 + h) * p.n_parts + part) * (p.v + 2);
        [[unroll]] for (uint s = 0; s < PAIRS; s++) {
            const uint d = 2 * (me + s * THREADS);
            if (d < p.v) p.to.at[to + d] = acc[h][s].x, p.to.at[to + d + 1] = acc[h][s].y;
        }
        if (me == 0) p.to.at[to + p.v] = top[h], p.to.at[to + p.v + 1] = sum[h];
    }
}
