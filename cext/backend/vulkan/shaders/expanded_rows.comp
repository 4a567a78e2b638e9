// expanded_rows.comp: rows of the cache as floats, in the order of the model: what keys and values are made of. A position a
// workgroup. KIND is the cache's.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "reduce.glsl"
#include "rows.glsl"

layout(local_size_x = 128) in;
layout(constant_id = 0) const uint ROW = MAX_ROW; // values of a row: no more is shared, so that many groups fit a processor
layout(push_constant, scalar) uniform Push {
    Tokens tokens; // of one sequence
    Floats latent; // (n_pos, rank)
    Floats tails;  // (n_pos, n_tail)
    uint rank, n_tail, first, at; // first: position; at: of the layer in a block
    Layout l;
} p;

shared float row[ROW];
#include "rotate.glsl"

void main() {
    const uint i = gl_WorkGroupID.x, pos = p.first + i, j = pos % 64;
    const uint64_t block = Longs(p.tokens.at[0].blocks).at[pos / 64] + p.at, data = block + p.l.data + j * p.l.row_bytes;
    const float scale = Floats(block + p.l.scale).at[j];
#if KIND == 1
    for (uint c = gl_LocalInvocationIndex; c < p.rank; c += THREADS)
        p.latent.at[i * p.rank + c] = scale * float(Shorts(data).at[place16(c)]);
    for (uint c = gl_LocalInvocationIndex; c < p.n_tail; c += THREADS)
        p.tails.at[i * p.n_tail + c] = scale * float(Shorts(data).at[place16(p.rank + c)]);
#else
    const uint64_t tail = block + p.l.tail + j * p.l.tail_bytes;
    const float tail_scale = Floats(block + p.l.tail_scale).at[j];
    for (uint c = gl_LocalInvocationIndex; c < p.rank; c += THREADS) row[c] = scale * float(Bytes(data).at[place8(c)]);
    for (uint c = gl_LocalInvocationIndex; c < p.n_tail; c += THREADS)
        p.tails.at[i * p.n_tail + c] = tail_scale * float(Shorts(tail).at[place16(c)]);
    rotate_row(p.rank);
    for (uint c = gl_LocalInvocationIndex; c < p.rank; c += THREADS) p.latent.at[i * p.rank + c] = row[c];
#endif
}
