// norm.comp: y = x / rms(x) * w, a row a workgroup.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "reduce.glsl"

layout(local_size_x = 128) in;
layout(push_constant, scalar) uniform Push {
    Floats x;     // (.., ldx)
    Floats w;     // (n)
    Floats y;     // (rows, ldy)
    uint64_t row; // 0, or uint (rows): which of x
    uint n, ldx, ldy;
    float eps;
} p;

void main() {
    const uint to = gl_WorkGroupID.x, from = p.row == 0 ? to : Uints(p.row).at[to];
    float squares = 0;
    for (uint i = gl_LocalInvocationIndex; i < p.n; i += THREADS) {
        const float v = p.x.at[from * p.ldx + i];
        squares += v * v;
    }
    const float scale = 1.0 / sqrt(group_sum(squares) / float(p.n) + p.eps);
    for (uint i = gl_LocalInvocationIndex; i < p.n; i += THREADS)
        p.y.at[to * p.ldy + i] = p.x.at[from * p.ldx + i] * scale * p.w.at[i];
}
