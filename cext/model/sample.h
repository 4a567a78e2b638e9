/* sample.h: from logits to a token. Owns its random state and the window of recent tokens; knows no model. */
#pragma once

#include <stdint.h>

#include "base/status.h"

typedef struct ds_sampler ds_sampler;

typedef struct ds_sampler_options {
    float temperature;    /* 0 is greedy */
    int top_k;            /* 0 is off */
    float top_p;          /* 1 is off; 0 < top_p <= 1 */
    float min_p;          /* 0 is off; relative to the likeliest */
    float repeat_penalty; /* 1 is off; > 0. Positive logits of recent tokens are divided by it, negative multiplied */
    int repeat_last_n;    /* how many recent tokens it looks at */
    uint64_t seed;
} ds_sampler_options;

/* Create checks the options (DS_EINVAL names the option and its range). destroy takes NULL too. */
ds_status ds_sampler_create(const ds_sampler_options *options, ds_sampler **out, ds_error *err);
void ds_sampler_destroy(ds_sampler *sampler);

/* Draw from logits (n_vocab), unchanged; the token is accepted too. NaN logits are never drawn; if all are NaN or -inf, fails. */
ds_status ds_sampler_sample(ds_sampler *sampler, const float *logits, int n_vocab, int32_t *token, ds_error *err);
void ds_sampler_accept(ds_sampler *sampler, int32_t token);

/* What the last token was drawn from, in no order, each with its weight (the best one's is 1): writes at most capacity of
 * them and returns how many there are. 0 before the first draw. */
int ds_sampler_kept(const ds_sampler *sampler, int32_t *tokens, double *weights, int capacity);
