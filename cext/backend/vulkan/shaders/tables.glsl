/* tables.glsl: the code books of the IQ formats (quant/grids.h), copied into shared memory by each workgroup: entries
 * of neighbours' units lie all over them. */

#if defined(FORMAT_IQ4_NL) || defined(FORMAT_IQ4_XS)

shared uint iq4_value[16];

void unpack_begin() {
    const int values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    if (gl_LocalInvocationIndex < 16) iq4_value[gl_LocalInvocationIndex] = uint(values[gl_LocalInvocationIndex]) & 255u;
    barrier();
}

uvec4 iq4_values(uvec4 q) {
    uvec4 v;
    [[unroll]] for (uint i = 0; i < 4; i++)
        v[i] = iq4_value[q[i] & 15u] | iq4_value[q[i] >> 8 & 15u] << 8 | iq4_value[q[i] >> 16 & 15u] << 16 |
               iq4_value[q[i] >> 24] << 24;
    return v;
}

#elif defined(FORMAT_IQ2_XXS) || defined(FORMAT_IQ2_XS) || defined(FORMAT_IQ2_S) || defined(FORMAT_IQ3_XXS) || \
    defined(FORMAT_IQ3_S)

/* Entries of 16 bits, two a dword; where each grid starts in the product's tables (ds_gpu_tables of product.h). */
#if defined(FORMAT_IQ2_XXS)
#define GRID_FIRST 0
#define GRID_ENTRIES 256
#elif defined(FORMAT_IQ2_XS)
#define GRID_FIRST 256
#define GRID_ENTRIES 512
#elif defined(FORMAT_IQ2_S)
#define GRID_FIRST 768
#define GRID_ENTRIES 1024
#elif defined(FORMAT_IQ3_XXS)
#define GRID_FIRST 1792
#define GRID_ENTRIES 256
#else
#define GRID_FIRST 2048
#define GRID_ENTRIES 512
#endif

shared uint grid_pair[GRID_ENTRIES / 2];

void unpack_begin() {
    for (uint i = gl_LocalInvocationIndex; i < GRID_ENTRIES / 2; i += gl_WorkGroupSize.x)
        grid_pair[i] = Dwords(p.tables).v[GRID_FIRST / 2 + i];
    barrier();
}

uint grid_entry(uint i) { return grid_pair[i / 2] >> 16 * (i % 2) & 0xffffu; }

/* The 8 signs that 7 bits stand for: the last makes their number even. */
uint signs_7(uint seven) { return seven | (uint(bitCount(seven)) & 1u) << 7; }

/* Eight values: places of two bits, those of even values from bit 0 up, of odd ones from bit 8; 8, 25, 43. */
uvec2 grid8(uint i, uint signs) {
    const uint e = grid_entry(i);
    uvec2 q = uvec2(e & 0x303u | (e >> 2 & 0x303u) << 16, e >> 4 & 0x303u | (e >> 6 & 0x303u) << 16);
    q = 0x08080808u + q * 17u + (q >> 1 & 0x01010101u);
    return uvec2(negate_bytes(q.x, spread_bits(signs)), negate_bytes(q.y, spread_bits(signs >> 4)));
}

/* Four values: places of three bits; 4, 12, .. 52, 62 (XXS), or 1, 3, .. 15 (S). */
uint grid4(uint i, uint signs) {
    const uint e = grid_entry(i);
    uint q = e & 0x707u | (e >> 3 & 0x707u) << 16;
#if defined(FORMAT_IQ3_XXS)
    q = 0x04040404u + q * 8u + 2u * (q & q >> 1 & q >> 2 & 0x01010101u);
#else
    q = 0x01010101u + q * 2u;
#endif
    return negate_bytes(q, spread_bits(signs));
}

#else

void unpack_begin() {}

#endif
