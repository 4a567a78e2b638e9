// fill.comp: y = value. The build tries a compiler with it; tests run it first.
#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"

layout(local_size_x_id = 0) in;
layout(push_constant, scalar) uniform Push {
    Floats y; // (n)
    float value;
    uint n;
} p;

void main() {
    const uint i = gl_GlobalInvocationID.x;
    if (i < p.n) p.y.at[i] = p.value;
}
