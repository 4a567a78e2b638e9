/* rope.c: YaRN rotary angles (Peng et al. 2023, eq. 17 to 19; DeepSeek-V2's modeling file). */
#include <math.h>
#include <stdlib.h>

#include "arch/rope.h"

/* The dimension at which a rotation turns `turns` times within the original context. */
static double correction_dim(const ds_config *c, double turns) {
    return c->rope_dim * log(c->rope_orig_ctx / (turns * 2.0 * M_PI)) / (2.0 * log(c->rope_base));
}

ds_status ds_rope_create(const ds_config *c, ds_rope *out, ds_error *err) {
    int n = c->rope_dim / 2;
    double low = fmax(floor(correction_dim(c, c->rope_beta_fast)), 0.0);
    double high = fmin(ceil(correction_dim(c, c->rope_beta_slow)), c->rope_dim - 1.0);
    float *inv_freq = malloc((size_t)n * sizeof *inv_freq);
    if (!inv_freq) return ds_fail(err, DS_ENOMEM, "no memory for %d rotary frequencies", n);
    if (low == high) high += 0.001;
    for (int i = 0; i < n; i++) {
        double freq = pow(c->rope_base, -2.0 * i / c->rope_dim);
        double ramp = fmin(fmax((i - low) / (high - low), 0.0), 1.0); /* 0: keep, 1: interpolate */
        if (c->rope_factor == 1.0f) ramp = 0.0;
        inv_freq[i] = (float)(freq * (1.0 - ramp) + freq / c->rope_factor * ramp);
    }
    *out = (ds_rope){n, inv_freq, c->rope_attn_factor};
    return DS_OK;
}

void ds_rope_release(ds_rope *rope) {
    free(rope->inv_freq);
    *rope = (ds_rope){0};
}

void ds_rope_angles(const ds_rope *rope, int pos, float *row) {
    for (int i = 0; i < rope->n; i++) {
        double angle = (double)pos * rope->inv_freq[i];
        row[2 * i] = (float)cos(angle) * rope->scale;
        row[2 * i + 1] = (float)sin(angle) * rope->scale;
    }
}

float ds_query_scale(const ds_config *c, int pos) {
    if (c->attn_temp_scale == 0.0f) return c->attn_scale;
    return (float)(c->attn_scale * (1.0 + c->attn_temp_scale * log(1.0 + floor((double)pos / c->attn_temp_length))));
}

void ds_rope_apply(int n, const float *angles, float *x) {
    for (int i = 0; i < n; i++) {
        float c = angles[2 * i], s = angles[2 * i + 1], a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * c - b * s;
        x[2 * i + 1] = a * s + b * c;
    }
}
