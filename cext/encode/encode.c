/* encode.c: memory for the encoder, the choice of its compiled loops, and the blocks' bytes. */
#include "encode/encode.h"

#include <stdlib.h>
#include <string.h>

#include "encode/kern.h"
#include "kernels/kernels.h"

#define DS_HAVE_scalar 1
extern const ds_encode_fn ds_encode_scalar;
#if DS_HAVE_avx2
extern const ds_encode_fn ds_encode_avx2;
#endif
#if DS_HAVE_avxvnni
extern const ds_encode_fn ds_encode_avxvnni;
#endif
#if DS_HAVE_avx512vnni
extern const ds_encode_fn ds_encode_avx512vnni;
#endif
#if DS_HAVE_neon
extern const ds_encode_fn ds_encode_neon;
#endif

/* The loops compiled for the ISA that the kernels run on here. */
static ds_encode_fn find_loops(void) {
    const ds_kernels *kern = ds_kernels_find(NULL);
    const char *isa = kern ? kern->isa : "scalar";
#if DS_HAVE_avx2
    if (strcmp(isa, "avx2") == 0) return ds_encode_avx2;
#endif
#if DS_HAVE_avxvnni
    if (strcmp(isa, "avxvnni") == 0) return ds_encode_avxvnni;
#endif
#if DS_HAVE_avx512vnni
    if (strcmp(isa, "avx512vnni") == 0) return ds_encode_avx512vnni;
#endif
#if DS_HAVE_neon
    if (strcmp(isa, "neon") == 0) return ds_encode_neon;
#endif
    (void)isa;
    return ds_encode_scalar;
}

bool ds_encode(ds_format format, const ds_sweep *sweeps, int n_sweeps, const ds_effort *effort, const ds_encode_rows *rows) {
    const size_t n = (size_t)sweeps[0].n, n_rows = (size_t)rows->n_rows, n_blocks = (n + DS_ENCODE_WIDTH - 1) / DS_ENCODE_WIDTH;
    const size_t row_bytes = ds_row_bytes(format, sweeps[0].n), step = ds_row_bytes(format, DS_ENCODE_WIDTH);
    ds_encode_work work = {
        .t = malloc(n_rows * DS_ENCODE_WIDTH * sizeof *work.t),
        .e = calloc(n_rows * n, sizeof *work.e),
        .choices = calloc(n_rows * n_blocks, sizeof *work.choices),
    };
    const bool ok = work.t && work.e && work.choices;
    if (ok) {
        find_loops()(ds_grid_of(format), sweeps, n_sweeps, effort, rows, &work);
        for (size_t r = 0; r < n_rows; r++)
            for (size_t i = 0; i < n_blocks; i++) {
                const size_t left = n - i * DS_ENCODE_WIDTH;
                ds_pack(format, (int)(left < DS_ENCODE_WIDTH ? left : DS_ENCODE_WIDTH), &work.choices[r * n_blocks + i],
                        (char *)rows->out + r * row_bytes + i * step);
            }
    }
    free(work.t);
    free(work.e);
    free(work.choices);
    return ok;
}
