/* check_products.c: decoding and products of every format, on random weights and ragged sizes. */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quant/blocks.h"
#include "quant/codes.h"

enum { NO_HALF = -1, MAX_OFFSET = 64 /* codes may carry this much more while they are summed */ };

/* Where the halves of a coded block lie, and a scale that makes all its weights whole numbers. */
typedef struct coded {
    ds_format format;
    int d_at, min_at;
    float whole;
} coded;

#define D(id, of_one) {DS_FORMAT_##id, offsetof(ds_block_##id, d), NO_HALF, of_one}
#define DM(id, min) {DS_FORMAT_##id, offsetof(ds_block_##id, d), offsetof(ds_block_##id, min), 1.0f}
static const coded CODED[] = {
    D(Q4_0, 1),    DM(Q4_1, m),    D(Q5_0, 1),     DM(Q5_1, m),   D(Q8_0, 1),   DM(Q2_K, dmin),
    D(Q3_K, 1),    DM(Q4_K, dmin), DM(Q5_K, dmin), D(Q6_K, 1),    D(IQ4_NL, 1), D(IQ4_XS, 1),
    D(IQ2_XXS, 8), D(IQ2_XS, 8),   D(IQ2_S, 8),    D(IQ3_XXS, 4), D(IQ3_S, 1),
};
enum { N_CODED = sizeof CODED / sizeof *CODED };

typedef struct weights {
    int n_rows, k;
    size_t row_bytes;
    uint8_t *rows;
    float *magnitude; /* (n_rows, k): |scale| (|q| + MAX_OFFSET) + |min|, or |w| */
} weights;

static void put_half(uint8_t *at, float x) {
    const uint16_t h = ds_f32_to_f16(x);
    memcpy(at, &h, sizeof h);
}

static void set_magnitudes(ds_format format, weights *w) {
    const int elements = (int)ds_format_get(format)->block_elements;
    for (int r = 0; r < w->n_rows; r++) {
        const uint8_t *block = w->rows + (size_t)r * w->row_bytes;
        for (int i = 0; i < w->k; i += elements, block += ds_format_get(format)->block_bytes) {
            ds_codes codes;
            float *out = w->magnitude + (size_t)r * (size_t)w->k + i;
            switch (format) {
#define CODES(id)                                   \
    case DS_FORMAT_##id:                            \
        ds_codes_##id((const void *)block, &codes); \
        break;
                DS_CODED_FORMATS(CODES)
            default:
                break;
            }
            for (int j = 0; j < elements; j++)
                out[j] = fabsf(codes.scale[j / 16]) * (float)(abs(codes.q[j]) + MAX_OFFSET) + fabsf(codes.min[j / 16]);
        }
    }
}

static weights weights_of(ds_format format, int n_rows, int k) {
    weights w = {.n_rows = n_rows, .k = k, .row_bytes = ds_row_bytes(format, k)};
    w.rows = buffer((size_t)n_rows * w.row_bytes);
    w.magnitude = buffer((size_t)n_rows * (size_t)k * sizeof(float));
    return w;
}

static weights random_coded(const coded *f, int n_rows, int k, bool whole) {
    weights w = weights_of(f->format, n_rows, k);
    const size_t block_bytes = ds_format_get(f->format)->block_bytes;
    for (size_t i = 0; i < (size_t)n_rows * w.row_bytes; i++) w.rows[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < (size_t)n_rows * w.row_bytes; i += block_bytes) {
        put_half(w.rows + i + f->d_at, whole ? f->whole : 0.01f * random_normal());
        if (f->min_at != NO_HALF) put_half(w.rows + i + f->min_at, whole ? 1.0f : 0.01f * random_normal());
    }
    set_magnitudes(f->format, &w);
    return w;
}

static weights random_floats(ds_format format, int n_rows, int k) {
    weights w = weights_of(format, n_rows, k);
    for (size_t i = 0; i < (size_t)n_rows * (size_t)k; i++) {
        const float x = random_normal();
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        if (format == DS_FORMAT_F32) memcpy(w.rows + 4 * i, &x, 4);
        else if (format == DS_FORMAT_F16) put_half(w.rows + 2 * i, x);
        else memcpy(w.rows + 2 * i, (const char *)&bits + 2, 2);
        w.magnitude[i] = fabsf(x) * 1.01f;
    }
    return w;
}

/* Activations (n_tok, k). Whole: each 32 values have a scale of 1, and but for a few tokens with extremes sums stay
 * exact. */
static float *random_activations(int n_tok, int k, bool whole) {
    float *x = buffer((size_t)n_tok * (size_t)k * sizeof *x);
    for (int i = 0; i < n_tok * k; i++)
        x[i] = whole ? (float)(i % 32 ? random_int(-1, 1) : 127) : random_normal() * (i % 97 ? 1.0f : 50.0f);
    return x;
}

static void *pack(const ds_kernels *table, ds_act_kind kind, int n_tok, int k, const float *x) {
    void *act = buffer(table->act_bytes(kind, n_tok, k));
    table->act_pack(kind, 0, n_tok, n_tok, k, x, (size_t)k, NULL, act);
    return act;
}

static void multiply(const ds_kernels *table, ds_format format, const weights *w, int begin, int end, int n_tok,
                     const void *act, float *y) {
    const ds_mul job = {.w = w->rows,
                        .row_bytes = w->row_bytes,
                        .k = w->k,
                        .row_begin = begin,
                        .row_end = end,
                        .act = act,
                        .n_tok = n_tok,
                        .y = y,
                        .ldy = (size_t)w->n_rows};
    table->mul[format](&job);
}

/* What float sums of the two tables may differ by: (operations in sequence) u times the sum of magnitudes, for each. */
static void product_bounds(const weights *w, int n_tok, const float *x, bool is_coded, double *bound) {
    for (int t = 0; t < n_tok; t++)
        for (int r = 0; r < w->n_rows; r++) {
            double sum = 0.0;
            for (int i = 0; i < w->k; i++) {
                const double size = fabs((double)x[(size_t)t * (size_t)w->k + i]);
                sum += (is_coded ? size * (1 + 1.0 / 127) + 1e-6 : size) * w->magnitude[(size_t)r * (size_t)w->k + i];
            }
            bound[t * w->n_rows + r] = 2 * (is_coded ? w->k / 16 + 12 : w->k + 2) * U * sum;
        }
}

static void check_product(check *c, ds_format format, const weights *w, int n_tok, bool whole) {
    const bool is_coded = ds_format_get(format)->act == DS_ACT_Q8;
    const size_t n = (size_t)n_tok * (size_t)w->n_rows;
    const float *x = random_activations(n_tok, w->k, whole);
    const void *act = pack(c->isa, ds_format_get(format)->act, n_tok, w->k, x);
    float *got = buffer(n * sizeof *got), *parts = buffer(n * sizeof *parts), *want = buffer(n * sizeof *want);
    multiply(c->isa, format, w, 0, w->n_rows, n_tok, act, got);
    for (int begin = 0; begin < w->n_rows; begin += DS_PANEL_ROWS)
        multiply(c->isa, format, w, begin, begin + DS_PANEL_ROWS < w->n_rows ? begin + DS_PANEL_ROWS : w->n_rows, n_tok,
                 act, parts);
    same_floats(c, "rows in pieces", n, parts, got);
    multiply(c->scalar, format, w, 0, w->n_rows, n_tok, pack(c->scalar, ds_format_get(format)->act, n_tok, w->k, x),
             want);
    if (whole) {
        same_floats(c, "whole numbers", n, got, want);
        return;
    }
    double *bound = buffer(n * sizeof *bound);
    product_bounds(w, n_tok, x, is_coded, bound);
    close_floats(c, "random numbers", n, got, want, bound);
}

static void check_decoder(check *c, ds_format format, const weights *w) {
    const size_t n = (size_t)w->n_rows * (size_t)w->k;
    float *got = buffer(n * sizeof *got), *want = buffer(n * sizeof *want);
    c->isa->dequantize[format]((int64_t)n, w->rows, got);
    ds_dequantize_row(format, (int64_t)n, w->rows, want);
    same_floats(c, "decoded", n, got, want);
}

static void check_format(check *c, ds_format format, const coded *f) {
    static const int TOKENS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 35}, ROWS[] = {1, 7, 33, 70};
    static const int WIDTHS[3][2] = {{1, 250}, {32, 352}, {256, 2304}};
    const int elements = (int)ds_format_get(format)->block_elements, kind = elements == 1 ? 0 : elements == 32 ? 1 : 2;
    for (int i = 0; i < 2; i++)
        for (size_t r = 0; r < sizeof ROWS / sizeof *ROWS; r++) {
            const int k = WIDTHS[kind][i];
            const weights w = f ? random_coded(f, ROWS[r], k, false) : random_floats(format, ROWS[r], k);
            snprintf(c->what, sizeof c->what, "%s (%d, %d)", ds_format_get(format)->name, ROWS[r], k);
            check_decoder(c, format, &w);
            for (size_t t = r % 2; t < sizeof TOKENS / sizeof *TOKENS; t += 2)
                check_product(c, format, &w, TOKENS[t], false);
            release();
        }
    for (size_t t = 0; f && t < sizeof TOKENS / sizeof *TOKENS; t++) {
        const weights w = random_coded(f, 37, 256, true);
        snprintf(c->what, sizeof c->what, "%s (37, 256), %d tokens", ds_format_get(format)->name, TOKENS[t]);
        check_product(c, format, &w, TOKENS[t], true);
        release();
    }
}

static void check_limits(check *c) {
    const size_t n = 4096 + 28;
    uint32_t *words = buffer(n * sizeof *words);
    for (size_t i = 0; i < n; i++) words[i] = random_bits();
    strcpy(c->what, "yardsticks");
    /* A whole number of every table's steps: what is left over may be passed over. */
    const uint32_t got = c->isa->read_all(4096 * sizeof *words, words),
                   want = c->scalar->read_all(4096 * sizeof *words, words);
    same_bytes(c, "read_all", sizeof got, &got, &want);
    const bool counts = c->isa->dot_peak(3) > 0, yes = true;
    same_bytes(c, "dot_peak", sizeof counts, &counts, &yes);
    const int64_t cycles = c->isa->chain(17), whole = 32;
    same_bytes(c, "chain", sizeof cycles, &cycles, &whole);
    release();
}

void check_products(check *c) {
    for (int i = 0; i < N_CODED; i++) check_format(c, CODED[i].format, &CODED[i]);
    check_format(c, DS_FORMAT_F32, NULL);
    check_format(c, DS_FORMAT_F16, NULL);
    check_format(c, DS_FORMAT_BF16, NULL);
    check_limits(c);
}
