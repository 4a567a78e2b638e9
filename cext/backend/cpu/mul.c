#include "backend/cpu/mul.h"

enum {
    /* A claim costs a shared cache line: not worth it for less than some microseconds of work. */
    MIN_PIECE_COST = 8 << 10,
    MAX_LAST_COST = 64 << 10, /* of the last pieces; smaller where each worker would have few of them */
    LAST_PER_WORKER = 8,
    PREFILL_COST_SHIFT = 4, /* a byte read from memory costs about as much as 16 multiply-adds from cache */
};

ds_job ds_cpu_job(const ds_mat *m, const void *block, const void *act, int n_tok, float *y, size_t ldy) {
    return (ds_job){m->format,
                    {.w = block,
                     .row_bytes = m->row_bytes,
                     .k = m->k,
                     .row_end = m->rows,
                     .act = act,
                     .n_tok = n_tok,
                     .y = y,
                     .ldy = ldy}};
}

/* What a panel of rows costs, in bytes read or their equivalent in arithmetic. */
static size_t panel_cost(const ds_mul *mul) {
    return DS_PANEL_ROWS * (mul->row_bytes + (((size_t)mul->k * (size_t)mul->n_tok) >> PREFILL_COST_SHIFT));
}

static int n_panels(const ds_mul *mul) { return (mul->row_end + DS_PANEL_ROWS - 1) / DS_PANEL_ROWS; }

static size_t job_cost(const ds_mul *mul) { return panel_cost(mul) * (size_t)n_panels(mul); }

static size_t clamp(size_t x, size_t low, size_t high) { return x < low ? low : x > high ? high : x; }

/* Where piece c begins in work that costs `total`. A round of pieces, one for each worker, is half of what is left: large
 * ones first, for where a piece begins memory is read slowly; small ones last, for a phase waits for all of them. */
static size_t piece_begin(size_t total, size_t n_workers, size_t c) {
    if (n_workers == 1) return c ? total : 0;
    const size_t least = clamp(total / (LAST_PER_WORKER * n_workers), MIN_PIECE_COST, MAX_LAST_COST);
    size_t left = total, size;
    for (; (size = left / (2 * n_workers)) > least && c >= n_workers; c -= n_workers) left -= size * n_workers;
    if (size < least) size = least;
    return c > left / size ? total : total - left + c * size;
}

/* The job's panels that begin within [begin, end) of its cost. */
static void run_panels(const ds_kernels *kern, const ds_job *job, size_t begin, size_t end) {
    const size_t cost = panel_cost(&job->mul);
    const int first = (int)((begin + cost - 1) / cost), past = (int)((end + cost - 1) / cost);
    if (first == past) return;
    ds_mul piece = job->mul;
    piece.row_begin = first * DS_PANEL_ROWS;
    if (past < n_panels(&job->mul)) piece.row_end = past * DS_PANEL_ROWS;
    kern->mul[job->format](&piece);
}

void ds_cpu_mul(const ds_worker *worker, const ds_kernels *kern, const ds_job *jobs, int n_jobs) {
    const size_t n_workers = (size_t)worker->nth;
    size_t total = 0, begin, base = 0;
    for (int j = 0; j < n_jobs; j++) total += job_cost(&jobs[j].mul);
    for (size_t c = ds_claim(worker); (begin = piece_begin(total, n_workers, c)) < total; c = ds_claim(worker)) {
        const size_t end = piece_begin(total, n_workers, c + 1);
        for (; base + job_cost(&jobs->mul) <= begin; jobs++, n_jobs--) base += job_cost(&jobs->mul);
        size_t at = base; /* claims only grow, so one walk over the jobs serves them all */
        for (int j = 0; j < n_jobs && at < end; j++) {
            const size_t cost = job_cost(&jobs[j].mul);
            run_panels(kern, &jobs[j], at < begin ? begin - at : 0, end - at < cost ? end - at : cost);
            at += cost;
        }
    }
}
