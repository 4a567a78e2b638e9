// latent_store.comp: a token's latent, normalised, and its rotary key, rotated, as a row of the cache: to its block here,
// and to where the host takes it from, a row of KIND. A token a workgroup.
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_EXT_control_flow_attributes : require
#include "common.glsl"
#include "reduce.glsl"
#include "rows.glsl"

layout(local_size_x = 128) in;
layout(push_constant, scalar) uniform Push {
    Tokens tokens;  // (n_tok)
    Floats kv_a;    // (n_tok, rank + n_tail)
    Floats w;       // (rank)
    Floats angles;  // (n_tok, n_tail): cos, sin pairs
    uint64_t out_;  // (n_tok, out_bytes): data, tail, scale, tail_scale, sum
    uint rank, n_tail, out_bytes, at; // at: of the layer in a block, in bytes
    float eps;
    Layout l;
} p;

shared float row[MAX_ROW];
#include "rotate.glsl"

float inverse_of(float scale) { return scale == 0.0 ? 0.0 : 1.0 / scale; }

// The scale at which values of this maximum and sum of squares become int16.
float scale16(float most, float squares) {
    const float scale = max(most / 32700.0, sqrt(squares) / 46300.0);
    return scale < 7.888609e-31 ? 0.0 : scale;
}

// What is known of a row before it is normalised, of the whole workgroup once it is joined: sums of squares of the latent, of
// it by its weights and of the rotary key, and the maxima of the latter two.
struct Found {
    float squares, head, tail, most_head, most_tail;
};
shared Found found[THREADS]; // of a subgroup

Found joined(Found f) {
    f.squares = subgroupAdd(f.squares);
    f.head = subgroupAdd(f.head);
    f.tail = subgroupAdd(f.tail);
    f.most_head = subgroupMax(f.most_head);
    f.most_tail = subgroupMax(f.most_tail);
    if (subgroupElect()) found[gl_SubgroupID] = f;
    barrier();
    f = found[0];
    for (uint i = 1; i < gl_NumSubgroups; i++) {
        const Found g = found[i];
        f.squares += g.squares;
        f.head += g.head;
        f.tail += g.tail;
        f.most_head = max(f.most_head, g.most_head);
        f.most_tail = max(f.most_tail, g.most_tail);
    }
    return f;
}

// The latent by its weights and the rotary key, rotated, into row[].
Found load_row(uint t, uint width) {
    const uint first = gl_LocalInvocationIndex;
    Found f = Found(0.0, 0.0, 0.0, 0.0, 0.0);
    for (uint i = first; i < p.n_tail / 2; i += THREADS) {
        const float c = p.angles.at[t * p.n_tail + 2 * i], s = p.angles.at[t * p.n_tail + 2 * i + 1];
        const float a = p.kv_a.at[t * width + p.rank + 2 * i], b = p.kv_a.at[t * width + p.rank + 2 * i + 1];
        const float x = a * c - b * s, y = a * s + b * c;
        row[p.rank + 2 * i] = x;
        row[p.rank + 2 * i + 1] = y;
        f.tail += x * x + y * y;
        f.most_tail = max(f.most_tail, max(abs(x), abs(y)));
    }
    for (uint from = first; from < p.rank; from += 4 * THREADS) {
        float v[4], w[4];
        [[unroll]] for (uint k = 0; k < 4; k++) {
            const uint i = from + k * THREADS;
            v[k] = i < p.rank ? p.kv_a.at[t * width + i] : 0.0;
            w[k] = i < p.rank ? p.w.at[i] : 0.0;
        }
        [[unroll]] for (uint k = 0; k < 4; k++) {
            const float x = v[k] * w[k];
            f.squares += v[k] * v[k];
            f.head += x * x;
            f.most_head = max(f.most_head, abs(x));
            if (from + k * THREADS < p.rank) row[from + k * THREADS] = x;
        }
    }
    return f;
}

void put16(uint64_t a, uint64_t b, uint from, uint n, float scale) {
    const float inverse = inverse_of(scale);
    for (uint i = gl_LocalInvocationIndex; i < pad64(n); i += THREADS) {
        const int16_t v = int16_t(i < n ? int(roundEven(row[from + i] * inverse)) : 0);
        Shorts(a).at[place16(i)] = v;
        Shorts(b).at[place16(i)] = v;
    }
}

void main() {
    const uint t = gl_WorkGroupID.x, first = gl_LocalInvocationIndex, width = p.rank + p.n_tail;
    const uint pos = p.tokens.at[t].pos % 64;
    const uint64_t block = Longs(p.tokens.at[t].blocks).at[p.tokens.at[t].pos / 64] + p.at;
    const uint64_t to = p.out_ + uint64_t(t) * p.out_bytes;
    const Found f = joined(load_row(t, width));
    const float scale = 1.0 / sqrt(f.squares / float(p.rank) + p.eps);
    for (uint i = first; i < p.rank; i += THREADS) row[i] *= scale; // a thread's own
    barrier();
    const uint64_t data = block + p.l.data + uint64_t(pos) * p.l.row_bytes;
    const uint64_t scales = to + p.l.row_bytes + p.l.tail_bytes;
#if KIND == 0
    for (uint i = first; i < width; i += THREADS) Floats(data).at[i] = Floats(to).at[i] = row[i];
#elif KIND == 1
    const float s = scale16(max(scale * f.most_head, f.most_tail), scale * scale * f.head + f.tail);
    put16(data, to, 0, width, s);
    if (first == 0) Floats(block + p.l.scale).at[pos] = Floats(scales).at[0] = s;
#else
    rotate_row(p.rank);
    float most = 0;
    for (uint i = first; i < p.rank; i += THREADS) most = max(most, abs(row[i]));
    most = group_max(most);
    const float s8 = most < 7.888609e-31 ? 0.0 : most / 127.0, inverse = inverse_of(s8);
    float sum = 0;
    for (uint i = first; i < pad64(p.rank); i += THREADS) {
        const int8_t v = int8_t(i < p.rank ? int(roundEven(row[i] * inverse)) : 0);
        Bytes(data).at[place8(i)] = v;
        Bytes(to).at[place8(i)] = v;
        sum += float(v);
    }
    sum = group_sum(sum);
    const float s16 = scale16(f.most_tail, f.tail);
    put16(block + p.l.tail + uint64_t(pos) * p.l.tail_bytes, to + p.l.row_bytes, p.rank, p.n_tail, s16);
    if (first != 0) return;
    Floats(block + p.l.scale).at[pos] = Floats(scales).at[0] = s8;
    Floats(block + p.l.tail_scale).at[pos] = Floats(scales).at[1] = s16;
    Ints(block + p.l.sum).at[pos] = Ints(scales).at[2] = int(sum);
#endif
}
