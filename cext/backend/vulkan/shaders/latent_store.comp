// latent_store.comp: a token's latent, normalised, and its rotary key, rotated, as a row of the cache: to its block here,
// and to where the host takes it from. A token a workgroup.
#version 460
#extension GL_GOOGLE_include_directive : require
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
    uint kind, rank, n_tail, out_bytes, at; // at: of the layer in a block, in bytes
    float eps;
    Layout l;
} p;

shared float row[MAX_ROW];
#include "rotate.glsl"

float inverse_of(float scale) { return scale == 0.0 ? 0.0 : 1.0 / scale; }

// The scale at which values [from, from + n) of the row become int16.
float scale16(uint from, uint n) {
    float most = 0, squares = 0;
    for (uint i = gl_LocalInvocationIndex; i < n; i += THREADS) {
        const float v = row[from + i];
        most = max(most, abs(v));
        squares += v * v;
    }
    const float scale = max(group_max(most) / 32700.0, sqrt(group_sum(squares)) / 46300.0);
    return scale < 7.888609e-31 ? 0.0 : scale;
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
    float squares = 0;
    for (uint i = first; i < p.rank; i += THREADS) {
        const float v = p.kv_a.at[t * width + i];
        squares += v * v;
    }
    const float scale = 1.0 / sqrt(group_sum(squares) / float(p.rank) + p.eps);
    for (uint i = first; i < p.rank; i += THREADS) row[i] = p.kv_a.at[t * width + i] * scale * p.w.at[i];
    for (uint i = first; i < p.n_tail / 2; i += THREADS) {
        const float c = p.angles.at[t * p.n_tail + 2 * i], s = p.angles.at[t * p.n_tail + 2 * i + 1];
        const float a = p.kv_a.at[t * width + p.rank + 2 * i], b = p.kv_a.at[t * width + p.rank + 2 * i + 1];
        row[p.rank + 2 * i] = a * c - b * s;
        row[p.rank + 2 * i + 1] = a * s + b * c;
    }
    barrier();
    const uint64_t data = block + p.l.data + uint64_t(pos) * p.l.row_bytes;
    const uint64_t scales = to + p.l.row_bytes + p.l.tail_bytes;
    if (p.kind == ROWS_F32) {
        for (uint i = first; i < width; i += THREADS) Floats(data).at[i] = Floats(to).at[i] = row[i];
        return;
    }
    if (p.kind == ROWS_I16) {
        const float s = scale16(0, width);
        put16(data, to, 0, width, s);
        if (first == 0) Floats(block + p.l.scale).at[pos] = Floats(scales).at[0] = s;
        return;
    }
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
    const float s16 = scale16(p.rank, p.n_tail);
    put16(block + p.l.tail + uint64_t(pos) * p.l.tail_bytes, to + p.l.row_bytes, p.rank, p.n_tail, s16);
    if (first != 0) return;
    Floats(block + p.l.scale).at[pos] = Floats(scales).at[0] = s8;
    Floats(block + p.l.tail_scale).at[pos] = Floats(scales).at[1] = s16;
    Ints(block + p.l.sum).at[pos] = Ints(scales).at[2] = int(sum);
}
