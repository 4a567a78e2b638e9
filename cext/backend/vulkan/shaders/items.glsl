/* items.glsl: what products of few slots are made of: an item of a row of W, which is a unit, of floats four values, by what is
 * kept of x in shared memory, CHUNK values of SLOTS rows at a time; with DOT, x is packed, and read where it is. */

uint64_t x_at[SLOTS];

#if defined(DOT)
#include "factors.glsl"
#else

/* Units, or what of them is read together, lie four floats off the banks of those before. */
shared vec4 kept[SLOTS * (CHUNK / 4 + CHUNK / 32 + CHUNK / 64)];

uint where(uint v) {
#if defined(LAYOUT_K2)
    return v + v / 8 + v / 32 * 2;
#elif defined(LAYOUT_K4)
    return v + v / 16;
#else
    return v + v / 8;
#endif
}

uint input_at(uint s, uint v) { return s * (CHUNK / 4 + CHUNK / 32 + CHUNK / 64) + where(v); }

/* Four values from `at` on, 0 from k on. */
vec4 values4(uint64_t row, uint at) {
    if (ALIGNED) return Vectors(row + 4 * at).v[0];
    Floats f = Floats(row + 4 * at);
    vec4 x = vec4(0.0);
    [[unroll]] for (uint c = 0; c < 4; c++)
        if (at + c < p.k) x[c] = f.v[c];
    return x;
}

#endif

#if CODED

const uint ITEM = 32;

struct Item {
    Codes half_[2];
};

Item item_of(uint64_t row, uint i) { return Item(Codes[2](unpack(row, i, 0), unpack(row, i, 1))); }

#if defined(DOT)
float times(Item w, uint s, uint i, uint from) {
    return multiply(w.half_[0], inputs_of(x_at[s], i, 0, p.k)) + multiply(w.half_[1], inputs_of(x_at[s], i, 1, p.k));
}
#else
/* Item i of a row by the slot's values. */
float times(Item w, uint s, uint i, uint from) {
    float sum = 0.0;
    [[unroll]] for (uint h = 0; h < 2; h++) {
        const uint at = input_at(s, (place(i, h) - from) / 4); /* of sixteen values that lie together */
        vec4 total = vec4(0.0), low = vec4(0.0);
        [[unroll]] for (uint j = 0; j < 4; j++) {
            const vec4 x = kept[at + j];
            total += bytes_to_floats(w.half_[h].q[j]) * x;
            low += x;
        }
        sum += w.half_[h].scale * (total.x + total.y + (total.z + total.w));
#if HAS_LOW
        sum -= w.half_[h].low * (low.x + low.y + (low.z + low.w));
#endif
    }
    return sum;
}
#endif

#else

const uint ITEM = 4;

struct Item {
    vec4 v;
};

Item item_of(uint64_t row, uint i) {
#if defined(FORMAT_F32)
    if (ALIGNED) return Item(Vectors(row + 16 * i).v[0]);
#endif
    if (ALIGNED || 4 * i + 4 <= p.k) return Item(weights4(row, 4 * i));
    vec4 w = vec4(0.0);
    [[unroll]] for (uint c = 0; c < 3; c++)
        if (4 * i + c < p.k) w[c] = weight(row, 4 * i + c);
    return Item(w);
}

float times(Item w, uint s, uint i, uint from) { return dot(w.v, kept[input_at(s, i - from / 4)]); }

#endif
