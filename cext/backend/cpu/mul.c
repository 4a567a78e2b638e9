#include "backend/cpu/mul.h"

enum {
    MIN_PIECE_COST =
        64 << 10, /* a claim costs a shared cache line: not worth it for less than some microseconds of work */
    PIECES_PER_WORKER = 12,    /* enough that a worker which loses its core for a while does not hold up the rest */
    PREFILL_COST_SHIFT = 4,    /* a byte read from memory costs about as much as 16 multiply-adds from cache */
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

/* Panels of a piece of this job when pieces should cost about `target`. */
static int piece_panels(const ds_mul *mul, size_t target) {
    size_t panels = target / (panel_cost(mul) + 1);
    return panels<1 ? 1 : panels>(size_t) n_panels(mul) ? n_panels(mul) : (int)panels;
}

void ds_cpu_mul(const ds_worker *worker, const ds_kernels *kern, const ds_job *jobs, int n_jobs) {
    size_t total = 0, target, claimed, base = 0;
    for (int j = 0; j < n_jobs; j++) total += panel_cost(&jobs[j].mul) * (size_t)n_panels(&jobs[j].mul);
    target = total / ((size_t)worker->nth * PIECES_PER_WORKER);
    if (target < MIN_PIECE_COST) target = MIN_PIECE_COST;
    if (worker->nth == 1) target = total + 1;
    claimed = ds_claim(worker);
    for (int j = 0; j < n_jobs; j++) { /* claims only grow, so one walk over the jobs serves them all */
        int panels = n_panels(&jobs[j].mul), step = piece_panels(&jobs[j].mul, target);
        size_t pieces = (size_t)((panels + step - 1) / step);
        for (; claimed < base + pieces; claimed = ds_claim(worker)) {
            ds_mul piece = jobs[j].mul;
            piece.row_begin = (int)(claimed - base) * step * DS_PANEL_ROWS;
            if (piece.row_begin + step * DS_PANEL_ROWS < piece.row_end)
                piece.row_end = piece.row_begin + step * DS_PANEL_ROWS;
            kern->mul[jobs[j].format](&piece);
        }
        base += pieces;
    }
}
