// gather.comp: y[i] = x[row[i]].
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"

layout(local_size_x = 128) in;
layout(push_constant, scalar) uniform Push {
    Floats x, y;  // (.., n), (rows, n)
    uint64_t row; // 0, or uint (rows)
    uint n;
} p;

void main() {
    const uint to = gl_WorkGroupID.y, from = p.row == 0 ? to : Uints(p.row).at[to], i = gl_GlobalInvocationID.x;
    if (i < p.n) p.y.at[to * p.n + i] = p.x.at[from * p.n + i];
}
