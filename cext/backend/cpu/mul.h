/* mul.h: matrix products on the CPU, run by all workers of a phase together. Knows matrices and packs, no layer. */
#pragma once

#include "base/pool.h"
#include "kernels/kernels.h"
#include "quant/mat.h"

/* One whole product: y (n_tok, ldy) = x (n_tok, k) w^T; the rows' range is set when the work is cut. */
typedef struct ds_job {
    ds_format format;
    ds_mul mul;
} ds_job;

/* The product with one block (a head, an expert) of m; act is the pack of the kind that m's format takes. */
ds_job ds_cpu_job(const ds_mat *m, const void *block, const void *act, int n_tok, float *y, size_t ldy);

/* Run all jobs on all workers: the rows are cut into pieces of equal cost (bytes and arithmetic), whatever matrix they
 * belong to, and claimed one by one. The caller ends the phase with a barrier; it has no other ds_claim in the phase. */
void ds_cpu_mul(const ds_worker *worker, const ds_kernels *kern, const ds_job *jobs, int n_jobs);
