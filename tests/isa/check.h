/* check.h: what the parts of isa_check share: random numbers, buffers that end where memory does, and comparisons. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

#define U 0x1p-24 /* unit roundoff of a float */

/* The table under test and the one it is compared with; what is being compared, for messages. */
typedef struct check {
    const ds_kernels *isa, *scalar;
    char what[96];
    int n_compared, n_wrong;
} check;

/* Zeroed memory whose last byte (rounded up to 64) is followed by a page that cannot be touched. Never freed: the
 * program is short, and `release` gives back all at once. */
void *buffer(size_t bytes);
void release(void);

uint32_t random_bits(void);
float random_normal(void); /* mean 0, deviation 1 */
int random_int(int low, int high); /* both included */

/* The same bits, or both NaN. */
void same_floats(check *c, const char *name, size_t n, const float *got, const float *want);
void same_bytes(check *c, const char *name, size_t n, const void *got, const void *want);
/* |got - want| <= bound, one bound a value. */
void close_floats(check *c, const char *name, size_t n, const float *got, const float *want, const double *bound);

void check_products(check *c);
void check_rows(check *c);
void check_attention(check *c);
