/* rope.h: the rotary angles of a model's positions. */
#pragma once

#include "arch/config.h"

typedef struct ds_rope {
    int n;                 /* rope_dim / 2 */
    float *inv_freq;       /* (n) YaRN-blended */
    float scale;           /* of cos and sin */
} ds_rope;

ds_status ds_rope_create(const ds_config *config, ds_rope *out, ds_error *err);
void ds_rope_release(ds_rope *rope);
/* cos, sin pairs of a position into row (2 n). */
void ds_rope_angles(const ds_rope *rope, int pos, float *row);
/* What q . k is multiplied by for a query at pos. */
float ds_query_scale(const ds_config *config, int pos);
/* Rotate adjacent pairs of x (2 n) by a row of angles. */
void ds_rope_apply(int n, const float *angles, float *x);
