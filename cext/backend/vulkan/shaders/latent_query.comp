// latent_query.comp: queries over the cache: of each head W_uk^T q_nope and q_pe, rotated by their places, times the scores'
// scale, in the order that the cache keeps values in; with HALVES as such, for cooperative matrices. A head of a token a
// workgroup.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "reduce.glsl"
#include "rows.glsl"
#if defined(HALVES)
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#define Value float16_t
layout(buffer_reference, scalar, buffer_reference_align = 2) writeonly buffer Halves { float16_t at[]; };
#define Queries Halves
#else
#define Value float
#define Queries Floats
#endif

layout(local_size_x = 128) in;
layout(constant_id = 0) const uint ROW = MAX_ROW; // values of a row: no more is shared, so that many groups fit a processor
layout(push_constant, scalar) uniform Push {
    Tokens tokens;   // (n_tok)
    Floats absorbed; // (n_tok, n_head, rank)
    Floats q;        // (n_tok, n_head, nope + n_tail)
    Floats angles;   // (n_tok, n_tail)
    Queries to;      // (n_tok, n_head, width), 0 behind a row's values
    uint kind, rank, nope, n_tail, width;
} p;

shared float row[ROW];
#include "rotate.glsl"

void main() {
    const uint h = gl_WorkGroupID.x, t = gl_WorkGroupID.y, at = t * gl_NumWorkGroups.x + h;
    const uint first = gl_LocalInvocationIndex, q_at = at * (p.nope + p.n_tail) + p.nope;
    const float scale = p.tokens.at[t].scale;
    for (uint i = first; i < p.rank; i += THREADS) row[i] = p.absorbed.at[at * p.rank + i] * scale;
    for (uint i = first; i < p.n_tail / 2; i += THREADS) {
        const float c = p.angles.at[t * p.n_tail + 2 * i], s = p.angles.at[t * p.n_tail + 2 * i + 1];
        const float a = p.q.at[q_at + 2 * i] * scale, b = p.q.at[q_at + 2 * i + 1] * scale;
        row[p.rank + 2 * i] = a * c - b * s;
        row[p.rank + 2 * i + 1] = a * s + b * c;
    }
    barrier();
    const uint all = p.rank + p.n_tail, out_at = at * p.width, head = pad64(p.rank), kept = head + pad64(p.n_tail);
    if (p.kind == ROWS_F32) {
        for (uint i = first; i < p.width; i += THREADS) p.to.at[out_at + i] = Value(i < all ? row[i] : 0.0);
    } else if (p.kind == ROWS_I16) {
        for (uint i = first; i < p.width; i += THREADS) p.to.at[out_at + place16(i)] = Value(i < all ? row[i] : 0.0);
    } else {
        rotate_row(p.rank);
        for (uint i = first; i < head; i += THREADS)
            p.to.at[out_at + place8(i)] = Value(i < p.rank ? row[i] : 0.0);
        for (uint i = first; i < pad64(p.n_tail); i += THREADS)
            p.to.at[out_at + head + place16(i)] = Value(i < p.n_tail ? row[p.rank + i] : 0.0);
        for (uint i = kept + first; i < p.width; i += THREADS) p.to.at[out_at + i] = Value(0.0);
    }
}
