/* unpack.glsl: the tensor formats, one unpacking each, for every shader that reads weights. FORMAT_<ID> names the
 * format.
 *
 * A row is taken in units of 32 values, each in two halves of 16 that lie together: values [place(u, h), place(u, h) +
 * 16). Coded formats give a half as signed bytes, a scale and a low: w = scale * q - low, as quant/codes.h has them,
 * rounded as there. Rows of formats whose blocks are an odd number of halves start at multiples of 2 bytes: dwords are
 * put together from the aligned ones around them, never from beyond the dword that a row's last byte lies in. */

/* clang-format off */
#if defined(FORMAT_F32) || defined(FORMAT_F16) || defined(FORMAT_BF16)
#define CODED 0
#else
#define CODED 1
#endif
#if defined(FORMAT_Q4_0) || defined(FORMAT_IQ4_NL)
#define BLOCK_BYTES 18
#elif defined(FORMAT_Q4_1)
#define BLOCK_BYTES 20
#elif defined(FORMAT_Q5_0)
#define BLOCK_BYTES 22
#elif defined(FORMAT_Q5_1)
#define BLOCK_BYTES 24
#elif defined(FORMAT_Q8_0)
#define BLOCK_BYTES 34
#elif defined(FORMAT_Q2_K)
#define BLOCK_BYTES 84
#elif defined(FORMAT_Q3_K) || defined(FORMAT_IQ3_S)
#define BLOCK_BYTES 110
#elif defined(FORMAT_Q4_K)
#define BLOCK_BYTES 144
#elif defined(FORMAT_Q5_K)
#define BLOCK_BYTES 176
#elif defined(FORMAT_Q6_K)
#define BLOCK_BYTES 210
#elif defined(FORMAT_IQ4_XS)
#define BLOCK_BYTES 136
#elif defined(FORMAT_IQ2_XXS)
#define BLOCK_BYTES 66
#elif defined(FORMAT_IQ2_XS)
#define BLOCK_BYTES 74
#elif defined(FORMAT_IQ2_S)
#define BLOCK_BYTES 82
#elif defined(FORMAT_IQ3_XXS)
#define BLOCK_BYTES 98
#elif !CODED
#define BLOCK_BYTES 0
#else
#error no FORMAT_<ID>
#endif
/* clang-format on */

#if defined(FORMAT_Q4_1) || defined(FORMAT_Q5_1) || defined(FORMAT_Q2_K) || defined(FORMAT_Q4_K) || defined(FORMAT_Q5_K)
#define HAS_LOW 1
#else
#define HAS_LOW 0
#endif

#if BLOCK_BYTES % 4 == 2
#define ALIGN 2
#elif BLOCK_BYTES % 16 != 0
#define ALIGN 4
#else
#define ALIGN 16
#endif

#if defined(FORMAT_Q2_K) || defined(FORMAT_Q3_K) || defined(FORMAT_Q6_K)
#define LAYOUT_K2 /* four groups of two bits a byte, 32 values apart */
#elif defined(FORMAT_Q4_K) || defined(FORMAT_Q5_K)
#define LAYOUT_K4 /* the halves of a byte are 32 values apart */
#endif

/* ---- Bits ---- */

/* IEEE half, subnormal ones too: the device's own conversion may take those for zero. */
float half_to_float(uint h) {
    const uint m = h & 0x7fffu;
    const bool tiny = m < 0x400u;
    const uint exponent = tiny ? 113u : m < 0x7c00u ? 112u : 224u;
    const float f = uintBitsToFloat((m << 13) + (exponent << 23)) - (tiny ? 6.103515625e-05 : 0.0);
    return uintBitsToFloat(floatBitsToUint(f) | (h & 0x8000u) << 16);
}

/* The four lowest bits, each in a byte of its own. */
uint spread_bits(uint bits) { return ((bits & 15u) * 0x00204081u) & 0x01010101u; }

/* Bytes of at most 127, each less n. */
uvec4 bytes_less(uvec4 q, uint n) { return ((q | 0x80808080u) - n * 0x01010101u) ^ 0x80808080u; }

/* Bytes with a 1 in `negative` change their sign; none is 0. */
uint negate_bytes(uint q, uint negative) { return (q ^ negative * 255u) + negative; }

vec4 bytes_to_floats(uint q) { return vec4(unpack8(int(q))); }

/* ---- Memory: `at` is the address of a block ---- */

uint dword(uint64_t at, uint offset) {
#if ALIGN == 2
    /* No branch: loads of several blocks are under way at once. Addresses are common ones and constants. */
    const uint odd = uint(at) >> 1 & 1u, shifted = (odd ^ offset / 2) & 1u;
    Dwords d = Dwords((at & ~uint64_t(3)) + (offset & ~3u) + 4 * (odd & offset / 2 & 1u));
    const uint low = d.v[0], high = d.v[shifted];
    return shifted == 0 ? low : low >> 16 | high << 16;
#else
    return Dwords(at + offset).v[0];
#endif
}

/* A half or a byte. */
uint word(uint64_t at, uint offset) {
    at += offset;
    return Dwords(at & ~uint64_t(3)).v[0] >> 8 * (uint(at) & 2u) & 0xffffu;
}

uint byte(uint64_t at, uint offset) {
    at += offset;
    return Dwords(at & ~uint64_t(3)).v[0] >> 8 * (uint(at) & 3u) & 0xffu;
}

uvec4 quad(uint64_t at, uint offset) {
#if ALIGN == 16
    return Quads(at + offset).v[0];
#elif ALIGN == 4
    Dwords d = Dwords(at + offset);
    return uvec4(d.v[0], d.v[1], d.v[2], d.v[3]);
#else
    const uint odd = uint(at) >> 1 & 1u, shifted = (odd ^ offset / 2) & 1u;
    Dwords d = Dwords((at & ~uint64_t(3)) + (offset & ~3u) + 4 * (odd & offset / 2 & 1u));
    const uvec4 low = uvec4(d.v[0], d.v[1], d.v[2], d.v[3]);
    const uint last = d.v[3 + shifted];
    return shifted == 0 ? low : low >> 16 | uvec4(low.yzw, last) << 16;
#endif
}

float scale_at(uint64_t at, uint offset) { return half_to_float(word(at, offset)); }

/* ---- Grids and values, in shared memory from unpack_begin on ---- */

#include "tables.glsl"

/* ---- Formats ---- */

/* The first value of half h of unit u. */
uint place(uint u, uint h) {
#if defined(LAYOUT_K2)
    return u / 4 * 128 + u / 2 % 2 * 32 + u % 2 * 16 + 64 * h;
#elif defined(LAYOUT_K4)
    return u / 2 * 64 + u % 2 * 16 + 32 * h;
#else
    return 32 * u + 16 * h;
#endif
}

/* How many units a row of k values has. */
uint n_units(uint k) { return (k + 31) / 32; }

#if CODED

struct Codes {
    uvec4 q; /* 16 signed bytes */
    float scale, low;
};

/* Half h of unit u of a block of 32 values. */
#if defined(FORMAT_Q4_0)
Codes unpack_block(uint64_t at, uint u, uint h) {
    return Codes(bytes_less(quad(at, 2) >> 4 * h & 0x0f0f0f0fu, 8), scale_at(at, 0), 0.0);
}
#elif defined(FORMAT_Q4_1)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint head = dword(at, 0);
    return Codes(quad(at, 4) >> 4 * h & 0x0f0f0f0fu, half_to_float(head & 0xffffu), -half_to_float(head >> 16));
}
#elif defined(FORMAT_Q5_0) || defined(FORMAT_Q5_1)
uvec4 fifth_bits(uint qh, uint h) {
    qh >>= 16 * h;
    return uvec4(spread_bits(qh), spread_bits(qh >> 4), spread_bits(qh >> 8), spread_bits(qh >> 12)) << 4;
}
Codes unpack_block(uint64_t at, uint u, uint h) {
#if defined(FORMAT_Q5_0)
    const uvec4 q = quad(at, 6) >> 4 * h & 0x0f0f0f0fu | fifth_bits(dword(at, 2), h);
    return Codes(bytes_less(q, 16), scale_at(at, 0), 0.0);
#else
    const uint head = dword(at, 0);
    const uvec4 q = quad(at, 8) >> 4 * h & 0x0f0f0f0fu | fifth_bits(dword(at, 4), h);
    return Codes(q, half_to_float(head & 0xffffu), -half_to_float(head >> 16));
#endif
}
#elif defined(FORMAT_Q8_0)
Codes unpack_block(uint64_t at, uint u, uint h) { return Codes(quad(at, 2 + 16 * h), scale_at(at, 0), 0.0); }
#elif defined(FORMAT_IQ4_NL)
Codes unpack_block(uint64_t at, uint u, uint h) {
    return Codes(iq4_values(quad(at, 2) >> 4 * h & 0x0f0f0f0fu), scale_at(at, 0), 0.0);
}

/* Half h of unit u of a block of 256. */
#elif defined(FORMAT_Q2_K)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint j = u / 2 % 2 + 2 * h, sub = u / 4 * 8 + 2 * j + u % 2, halves = dword(at, 80), scales = byte(at, sub);
    const uvec4 q = quad(at, 16 + u / 4 * 32 + u % 2 * 16) >> 2 * j & 0x03030303u;
    return Codes(q, half_to_float(halves & 0xffffu) * float(scales & 15u),
                 half_to_float(halves >> 16) * float(scales >> 4));
}
#elif defined(FORMAT_Q3_K)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint j = u / 2 % 2 + 2 * h, sub = u / 4 * 8 + 2 * j + u % 2;
    const uvec4 low = quad(at, 32 + u / 4 * 32 + u % 2 * 16) >> 2 * j & 0x03030303u;
    const uvec4 high = quad(at, u % 2 * 16) >> u / 4 * 4 + j & 0x01010101u;
    const uint sc = byte(at, 96 + sub % 8) >> sub / 8 * 4 & 15u | (byte(at, 104 + sub % 4) >> 2 * (sub / 4) & 3u) << 4;
    return Codes(bytes_less(low | high << 2, 4), scale_at(at, 108) * float(int(sc) - 32), 0.0);
}
#elif defined(FORMAT_Q4_K) || defined(FORMAT_Q5_K)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uvec4 head = quad(at, 0); /* d, dmin, 12 bytes of scales */
    const uint sub = u / 2 * 2 + h, shift = 8 * (sub % 4);
    const uint a = head.y >> shift & 255u, b = head.z >> shift & 255u, c = head.w >> shift & 255u;
    const uint sc = sub < 4 ? a & 63u : c & 15u | a >> 6 << 4;
    const uint m = sub < 4 ? b & 63u : c >> 4 | b >> 6 << 4;
#if defined(FORMAT_Q4_K)
    const uvec4 q = quad(at, 16 + 16 * u) >> 4 * h & 0x0f0f0f0fu;
#else
    const uvec4 high = quad(at, 16 + u % 2 * 16) >> sub & 0x01010101u;
    const uvec4 q = quad(at, 48 + 16 * u) >> 4 * h & 0x0f0f0f0fu | high << 4;
#endif
    return Codes(q, half_to_float(head.x & 0xffffu) * float(sc), half_to_float(head.x >> 16) * float(m));
}
#elif defined(FORMAT_Q6_K)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint j = u / 2 % 2 + 2 * h, sub = u / 4 * 8 + 2 * j + u % 2;
    const uvec4 low = quad(at, u / 4 * 64 + u / 2 % 2 * 32 + u % 2 * 16) >> 4 * h & 0x0f0f0f0fu;
    const uvec4 high = quad(at, 128 + u / 4 * 32 + u % 2 * 16) >> 2 * j & 0x03030303u;
    const int sc = bitfieldExtract(int(byte(at, 192 + sub)), 0, 8);
    return Codes(bytes_less(low | high << 4, 32), scale_at(at, 208) * float(sc), 0.0);
}
#elif defined(FORMAT_IQ4_XS)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint head = dword(at, 0);
    const uint sc = byte(at, 4 + u / 2) >> u % 2 * 4 & 15u | (head >> 16 + 2 * u & 3u) << 4;
    return Codes(iq4_values(quad(at, 8 + 16 * u) >> 4 * h & 0x0f0f0f0fu),
                 half_to_float(head & 0xffffu) * float(int(sc) - 32), 0.0);
}
#elif defined(FORMAT_IQ2_XXS)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint indices = dword(at, 2 + 8 * u) >> 16 * h, tail = dword(at, 6 + 8 * u), signs = tail >> 14 * h;
    const uvec2 a = grid8(indices & 255u, signs_7(signs & 127u)),
                b = grid8(indices >> 8 & 255u, signs_7(signs >> 7 & 127u));
    return Codes(uvec4(a, b), scale_at(at, 0) * 0.125 * float(2 * (tail >> 28) + 1), 0.0);
}
#elif defined(FORMAT_IQ2_XS)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint pair = dword(at, 2 + 8 * u + 4 * h), sc = byte(at, 66 + u) >> 4 * h & 15u;
    const uvec2 a = grid8(pair & 511u, signs_7(pair >> 9 & 127u)), b = grid8(pair >> 16 & 511u, signs_7(pair >> 25));
    return Codes(uvec4(a, b), scale_at(at, 0) * 0.125 * float(2 * sc + 1), 0.0);
}
#elif defined(FORMAT_IQ2_S)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint indices = word(at, 2 + 4 * u + 2 * h), signs = word(at, 34 + 4 * u + 2 * h);
    const uint high = byte(at, 66 + u) >> 4 * h, sc = byte(at, 74 + u) >> 4 * h & 15u;
    const uvec2 a = grid8(indices & 255u | (high & 3u) << 8, signs & 255u);
    const uvec2 b = grid8(indices >> 8 | (high >> 2 & 3u) << 8, signs >> 8);
    return Codes(uvec4(a, b), scale_at(at, 0) * 0.125 * float(2 * sc + 1), 0.0);
}
#elif defined(FORMAT_IQ3_XXS)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint indices = dword(at, 2 + 8 * u + 4 * h), tail = dword(at, 66 + 4 * u);
    const uint a = signs_7(tail >> 14 * h & 127u), b = signs_7(tail >> 14 * h + 7 & 127u);
    const uvec4 q = uvec4(grid4(indices & 255u, a), grid4(indices >> 8 & 255u, a >> 4), grid4(indices >> 16 & 255u, b),
                          grid4(indices >> 24, b >> 4));
    return Codes(q, scale_at(at, 0) * 0.25 * float(2 * (tail >> 28) + 1), 0.0);
}
#elif defined(FORMAT_IQ3_S)
Codes unpack_block(uint64_t at, uint u, uint h) {
    const uint indices = dword(at, 2 + 8 * u + 4 * h), signs = word(at, 74 + 4 * u + 2 * h);
    const uint high = byte(at, 66 + u) >> 4 * h, sc = byte(at, 106 + u / 2) >> u % 2 * 4 & 15u;
    const uvec4 q = uvec4(grid4(indices & 255u | (high & 1u) << 8, signs),
                          grid4(indices >> 8 & 255u | (high >> 1 & 1u) << 8, signs >> 4),
                          grid4(indices >> 16 & 255u | (high >> 2 & 1u) << 8, signs >> 8),
                          grid4(indices >> 24 | (high >> 3 & 1u) << 8, signs >> 12));
    return Codes(q, scale_at(at, 0) * float(2 * sc + 1), 0.0);
}
#endif

Codes unpack(uint64_t row, uint u, uint h) {
#if BLOCK_BYTES < 40
    return unpack_block(row + u * BLOCK_BYTES, 0, h);
#else
    return unpack_block(row + u / 8 * BLOCK_BYTES, u % 8, h);
#endif
}

/* Weights 4 i to 4 i + 4 of sixteen. */
vec4 decoded(Codes c, uint i) {
    EXACT vec4 product = c.scale * bytes_to_floats(c.q[i]);
    EXACT vec4 value = product - c.low;
    return value;
}

/* Sixteen weights. */
void decode(uint64_t row, uint u, uint h, uint k, out vec4 w[4]) {
    const Codes c = unpack(row, u, h);
    [[unroll]] for (uint i = 0; i < 4; i++) w[i] = decoded(c, i);
}

#else

float weight(uint64_t row, uint i) {
#if defined(FORMAT_F32)
    return Floats(row + 4 * i).v[0];
#elif defined(FORMAT_F16)
    return half_to_float(word(row, 2 * i));
#else
    return uintBitsToFloat(word(row, 2 * i) << 16);
#endif
}

/* Four weights, where the row starts at a multiple of their size. */
vec4 weights4(uint64_t row, uint i) {
#if defined(FORMAT_F32)
    return load4(row + 4 * i);
#else
    uvec2 d;
    const uint64_t at = row + 2 * i;
    Dwords aligned = Dwords(at & ~uint64_t(3));
    d = uvec2(aligned.v[0], aligned.v[1]);
    if ((uint(at) & 2u) != 0) d = d >> 16 | uvec2(d.y, aligned.v[2]) << 16;
#if defined(FORMAT_F16)
    return vec4(half_to_float(d.x & 0xffffu), half_to_float(d.x >> 16), half_to_float(d.y & 0xffffu),
                half_to_float(d.y >> 16));
#else
    return uintBitsToFloat(uvec4(d.x << 16, d.x & 0xffff0000u, d.y << 16, d.y & 0xffff0000u));
#endif
#endif
}

/* Sixteen weights, 0 from value k on: rows of floats may end within a unit. */
void decode(uint64_t row, uint u, uint h, uint k, out vec4 w[4]) {
    const uint at = place(u, h);
    [[unroll]] for (uint i = 0; i < 4; i++) {
        const uint j = at + 4 * i;
        if (j + 4 <= k) w[i] = weights4(row, j);
        else {
            w[i] = vec4(0.0);
            for (uint c = 0; c < 4 && j + c < k; c++) w[i][c] = weight(row, j + c);
        }
    }
}

#endif

/* Sixteen values of a row of floats, those that belong to half h of unit u; 0 from value k on. */
void activations(uint64_t row, uint u, uint h, uint k, out vec4 x[4]) {
    const uint at = place(u, h);
    row += 4 * at;
    [[unroll]] for (uint i = 0; i < 4; i++) {
#if !CODED
        if (at + 4 * i + 4 > k) {
            x[i] = vec4(0.0);
            for (uint c = 0; c < 4 && at + 4 * i + c < k; c++) x[i][c] = Floats(row + 4 * (4 * i + c)).v[0];
            continue;
        }
#endif
        x[i] = load4(row + 16 * i);
    }
}
