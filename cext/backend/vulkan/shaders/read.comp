// read.comp: all of a buffer read, in order by all threads together, and the sums of each group kept so that somebody needs it:
// how fast a device reads its memory.
#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
#include "common.glsl"

layout(local_size_x = 256) in;
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Quads { uvec4 at[]; };
layout(push_constant, scalar) uniform Push {
    Quads from;
    Uints to; // (groups)
    uint n;   // quads
} p;

shared uint total;

void main() {
    const uint each = gl_NumWorkGroups.x * gl_WorkGroupSize.x, most = p.n - 1;
    uvec4 sum = uvec4(0);
    if (gl_LocalInvocationIndex == 0) total = 0;
    barrier();
    for (uint i = gl_GlobalInvocationID.x; i < p.n; i += 4 * each) {
        uvec4 own[4];
        [[unroll]] for (uint j = 0; j < 4; j++) own[j] = p.from.at[min(i + j * each, most)];
        [[unroll]] for (uint j = 0; j < 4; j++) sum += i + j * each < p.n ? own[j] : uvec4(0);
    }
    atomicAdd(total, sum.x + sum.y + sum.z + sum.w);
    barrier();
    if (gl_LocalInvocationIndex == 0) p.to.at[gl_WorkGroupID.x] = total;
}
