// norm.comp: y = x / rms(x) * w, a row a workgroup. Values and weights are asked for at once, and kept till the sum is there.
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_EXT_control_flow_attributes : require
#include "common.glsl"

layout(local_size_x = 256) in;
layout(push_constant, scalar) uniform Push {
    Floats x;     // (.., ldx)
    Floats w;     // (n)
    Floats y;     // (rows, ldy)
    uint64_t row; // 0, or uint (rows): which of x
    uint n, ldx, ldy;
    float eps;
} p;

const uint THREADS = 256, KEPT = 8; // values of a thread that it keeps; of longer rows it reads the others twice
shared float squares_of[THREADS]; // of a subgroup

void main() {
    const uint to = gl_WorkGroupID.x, from = p.row == 0 ? to : Uints(p.row).at[to], me = gl_LocalInvocationIndex;
    float x[KEPT], w[KEPT], squares = 0.0;
    [[unroll]] for (uint k = 0; k < KEPT; k++) {
        const uint i = me + k * THREADS;
        x[k] = i < p.n ? p.x.at[from * p.ldx + i] : 0.0;
        w[k] = i < p.n ? p.w.at[i] : 0.0;
    }
    [[unroll]] for (uint k = 0; k < KEPT; k++) squares += x[k] * x[k];
    for (uint i = me + KEPT * THREADS; i < p.n; i += THREADS) {
        const float v = p.x.at[from * p.ldx + i];
        squares += v * v;
    }
    squares = subgroupAdd(squares);
    if (subgroupElect()) squares_of[gl_SubgroupID] = squares;
    barrier();
    float sum = 0.0;
    for (uint i = 0; i < gl_NumSubgroups; i++) sum += squares_of[i];
    const float scale = 1.0 / sqrt(sum / float(p.n) + p.eps);
    [[unroll]] for (uint k = 0; k < KEPT; k++) {
        const uint i = me + k * THREADS;
        if (i < p.n) p.y.at[to * p.ldy + i] = x[k] * scale * w[k];
    }
    for (uint i = me + KEPT * THREADS; i < p.n; i += THREADS)
        p.y.at[to * p.ldy + i] = p.x.at[from * p.ldx + i] * scale * p.w.at[i];
}
