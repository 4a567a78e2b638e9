// expanded_query.comp: queries as they are, q_pe rotated, times the scores' scale, in halves. A head of a token a workgroup.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "rows.glsl"

layout(local_size_x = 64) in;
layout(buffer_reference, scalar, buffer_reference_align = 2) writeonly buffer Halves { float16_t at[]; };
layout(push_constant, scalar) uniform Push {
    Tokens tokens; // (n_tok)
    Floats q;      // (n_tok, n_head, nope + n_tail)
    Floats angles; // (n_tok, n_tail)
    Halves to;     // (n_tok, n_head, width), 0 behind a row's values
    uint nope, n_tail, width;
} p;

void main() {
    const uint t = gl_WorkGroupID.y, at = t * gl_NumWorkGroups.x + gl_WorkGroupID.x, all = p.nope + p.n_tail;
    const uint from = at * all, to = at * p.width;
    const float scale = p.tokens.at[t].scale;
    for (uint i = gl_LocalInvocationIndex; i < p.width; i += 64)
        if (i < p.nope || i >= all) p.to.at[to + i] = float16_t(i < p.nope ? p.q.at[from + i] * scale : 0.0);
    for (uint i = gl_LocalInvocationIndex; i < p.n_tail / 2; i += 64) {
        const float c = p.angles.at[t * p.n_tail + 2 * i], s = p.angles.at[t * p.n_tail + 2 * i + 1];
        const float a = p.q.at[from + p.nope + 2 * i] * scale, b = p.q.at[from + p.nope + 2 * i + 1] * scale;
        p.to.at[to + p.nope + 2 * i] = float16_t(a * c - b * s);
        p.to.at[to + p.nope + 2 * i + 1] = float16_t(a * s + b * c);
    }
}
