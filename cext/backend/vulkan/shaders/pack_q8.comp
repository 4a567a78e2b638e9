#version 460
/* pack_q8.comp: rows of floats as int8 with a scale per 32 values, bit-equal to the processor's packs (kernels/act.h):
 * scale = max|x| / 127, q = x (127 / max|x|) to the nearest, ties to even; under 2^-100 a block is zero.
 * Grid (ldx / (4 workgroups' threads), rows): whole rows of ldx floats, a multiple of 32, become ldx bytes and ldx / 32
 * scales each. */
#extension GL_GOOGLE_include_directive : require
#include "product.glsl"

layout(local_size_x_id = 0) in; /* a multiple of 8 */
shared float maxima[256];

layout(buffer_reference, scalar, buffer_reference_align = 4) writeonly buffer Packed { uint v; };

/* a / b of normal positive numbers, rounded to the nearest: a device's own division may be off by two units. */
float divide(float a, float b) {
    const uint ma = floatBitsToUint(a) & 0x7fffffu | 0x800000u, mb = floatBitsToUint(b) & 0x7fffffu | 0x800000u;
    const int exponent = int(floatBitsToUint(a) >> 23) - int(floatBitsToUint(b) >> 23) + (ma < mb ? 126 : 127);
    const uint64_t n = uint64_t(ma) << (ma < mb ? 24 : 23);
    uint q = uint(n / mb);
    const uint rest = uint(n - uint64_t(q) * mb);
    if (2 * rest > mb || (2 * rest == mb && (q & 1u) != 0)) q++;
    return uintBitsToFloat((uint(exponent) << 23) + (q - 0x800000u));
}

void main() {
    const uint i = gl_LocalInvocationIndex, at = 4 * (gl_WorkGroupID.x * gl_WorkGroupSize.x + i),
               row = gl_WorkGroupID.y;
    const bool inside = at < p.ldx;
    const uint64_t first = uint64_t(row) * p.ldx + at;
    const vec4 x = inside ? load4(p.x + 4 * first) : vec4(0.0);
    const vec4 size = abs(x);
    maxima[i] = max(max(size.x, size.y), max(size.z, size.w));
    barrier();
    float most = 0.0;
    for (uint j = i & ~7u; j < (i & ~7u) + 8; j++) most = max(most, maxima[j]);
    if (!inside) return;
    const bool tiny = !(most >= uintBitsToFloat(27u << 23)), huge = floatBitsToUint(most) >= 0x7f800000u;
    const float inverse = tiny || huge ? 0.0 : divide(127.0, most);
    const ivec4 q = tiny || huge ? ivec4(0) : ivec4(roundEven(x * inverse));
    Packed(p.y + first).v = uint(q.x) & 255u | (uint(q.y) & 255u) << 8 | (uint(q.z) & 255u) << 16 | uint(q.w) << 24;
    if (i % 8 == 0) Results(p.x_scale + first / 32 * 4).v[0] = tiny ? 0.0 : huge ? most : divide(most, 127.0);
}
