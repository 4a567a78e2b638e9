// latent_few.comp: latent_attend.comp for few tokens over rows of 16 or 8 bits: the same of it all, with less waiting. A thread
// takes whole keys, sixteen bytes at a time, for some of the heads; then two values of every position for all of them.
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#include "common.glsl"
#include "rows.glsl"

layout(local_size_x = 256) in;
layout(constant_id = 0) const uint PAIRS = 1; // of values, of a thread: v / 512, rounded up
layout(push_constant, scalar) uniform Push {
    Tokens tokens; // (n_tok)
    Floats q;      // (n_tok, n_head, width)
    Floats to;     // (n_tok, n_head, n_parts, v + 2): acc, m, l
    uint n_head, width, head, v, n_parts, at; // head: values of width that are the row's head; at: of the layer in a block
    Layout l;
} p;

layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Quads { uvec4 at; };

const uint THREADS = 256, HEADS = 8, TILE = 64, GROUPS = THREADS / TILE, MINE = HEADS / GROUPS, MOST_WIDTH = 640;
shared float queries[HEADS][MOST_WIDTH];
shared float scores[TILE][HEADS], weights[TILE][HEADS];
shared float scales[TILE], tail_scales[TILE];
shared float top[HEADS], sum[HEADS], shrink[HEADS];

vec2 shorts(uint two) { return vec2(int(two << 16) >> 16, int(two) >> 16); }

// Heads [first, first + MINE) of the queries by eight values of a key.
void multiply8(uint first, uint at, vec4 a, vec4 b, inout float score[MINE]) {
    [[unroll]] for (uint h = 0; h < MINE; h++)
        for (uint i = 0; i < 4; i++) score[h] += queries[first + h][at + i] * a[i] + queries[first + h][at + 4 + i] * b[i];
}

void multiply_shorts(uint first, uint at, uvec4 key, inout float score[MINE]) {
    multiply8(first, at, vec4(shorts(key.x), shorts(key.y)), vec4(shorts(key.z), shorts(key.w)), score);
}

// A key's scores, without their scales.
void score_key(uint64_t block, uint j, uint first, inout float score[MINE], inout float tail[MINE]) {
    const uint64_t key = block + p.l.data + j * p.l.row_bytes;
#if KIND == 1
    for (uint i = 0; i < p.width; i += 8) multiply_shorts(first, i, Quads(key + 2 * i).at, score);
#else
    for (uint i = 0; i < p.head; i += 16) {
        const uvec4 q = Quads(key + i).at;
        multiply8(first, i, vec4(unpack8(int(q.x))), vec4(unpack8(int(q.y))), score);
        multiply8(first, i + 8, vec4(unpack8(int(q.z))), vec4(unpack8(int(q.w))), score);
    }
    const uint64_t rotary = block + p.l.tail + j * p.l.tail_bytes;
    for (uint i = 0; i < p.width - p.head; i += 8) multiply_shorts(first, p.head + i, Quads(rotary + 2 * i).at, tail);
#endif
}

// Values d and d + 1 of row j, without its scale; d is even.
vec2 value2(uint64_t block, uint j, uint d) {
#if KIND == 1
    return shorts(Uints(block + p.l.data + j * p.l.row_bytes + 2 * d).at[0]);
#else
    const uint two = uint(Shorts(block + p.l.data + j * p.l.row_bytes + d).at[0]);
    return vec2(int(two << 24) >> 24, int(two << 16) >> 24);
#endif
}

void load_queries(uint h0, uint n_heads, uint t) {
    for (uint i = gl_LocalInvocationIndex; i < HEADS * p.width; i += THREADS) {
        const uint h = i / p.width, c = i % p.width;
        queries[h][c] = h < n_heads ? p.q.at[(t * p.n_head + h0 + h) * p.width + c] : 0.0;
    }
}

// The weights of a tile's positions, by its largest score and those before.
void soften(uint seen) {
    const uint h = gl_LocalInvocationIndex % HEADS, c = gl_LocalInvocationIndex / HEADS;
    const float before = top[h];
    float most = before;
    for (uint i = 0; i < seen; i++) most = max(most, scores[i][h]);
    for (uint i = c; i < TILE; i += THREADS / HEADS) weights[i][h] = i < seen ? exp(scores[i][h] - most) : 0.0;
    barrier();
    if (c != 0) return;
    float total = 0.0;
    for (uint i = 0; i < seen; i++) total += weights[i][h];
    shrink[h] = exp(before - most);
    sum[h] = sum[h] * shrink[h] + total;
    top[h] = most;
}

void main() {
    const uint part = gl_WorkGroupID.x, h0 = gl_WorkGroupID.y * HEADS, t = gl_WorkGroupID.z;
    const uint me = gl_LocalInvocationIndex, n_heads = min(HEADS, p.n_head - h0), n_pos = p.tokens.at[t].pos + 1;
    const uint tiles = (n_pos + TILE - 1) / TILE, each = (tiles + p.n_parts - 1) / p.n_parts;
    const uint end = min(tiles, (part + 1) * each), j = me % TILE, mine = me / TILE * MINE;
    vec2 acc[HEADS][PAIRS];
    [[unroll]] for (uint h = 0; h < HEADS; h++)
        [[unroll]] for (uint s = 0; s < PAIRS; s++) acc[h][s] = vec2(0.0);
    if (me < HEADS) top[me] = -1.0 / 0.0, sum[me] = 0.0;
    load_queries(h0, n_heads, t);
    for (uint tile = part * each; tile < end; tile++) {
        const uint64_t block = Longs(p.tokens.at[t].blocks).at[tile] + p.at;
        const uint seen = min(TILE, n_pos - tile * TILE);
        float score[MINE], tail[MINE];
        [[unroll]] for (uint h = 0; h < MINE; h++) score[h] = tail[h] = 0.0;
        barrier();
        if (me < seen) {
            scales[me] = Floats(block + p.l.scale).at[me];
#if KIND == 2
            tail_scales[me] = Floats(block + p.l.tail_scale).at[me];
#endif
        }
        if (j < seen) score_key(block, j, mine, score, tail);
        barrier();
        if (j < seen) {
#if KIND == 2
            [[unroll]] for (uint h = 0; h < MINE; h++)
                scores[j][mine + h] = score[h] * scales[j] + tail[h] * tail_scales[j];
#else
            [[unroll]] for (uint h = 0; h < MINE; h++) scores[j][mine + h] = score[h] * scales[j];
#endif
        }
        barrier();
        soften(seen);
        barrier();
        [[unroll]] for (uint s = 0; s < PAIRS; s++) {
            const uint d = 2 * (me + s * THREADS);
            if (d >= p.v) continue;
            [[unroll]] for (uint h = 0; h < HEADS; h++) acc[h][s] *= shrink[h];
            for (uint i = 0; i < seen; i++) {
                const vec2 v = value2(block, i, d) * scales[i];
                [[unroll]] for (uint h = 0; h < HEADS; h++) acc[h][s] += weights[i][h] * v;
            }
        }
    }
    barrier();
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        if (h >= n_heads) break;
        const uint to = ((t * p.n_head + h0 + h) * p.n_parts + part) * (p.v + 2);
        for (uint s = 0; s < PAIRS; s++) {
            const uint d = 2 * (me + s * THREADS);
            if (d < p.v) p.to.at[to + d] = acc[h][s].x, p.to.at[to + d + 1] = acc[h][s].y;
        }
        if (me == 0) p.to.at[to + p.v] = top[h], p.to.at[to + p.v + 1] = sum[h];
    }
}
