/* dispatch.c: which of the compiled tables this machine can run. */
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "base/cpu.h"
#include "kernels/isas.h"
#include "kernels/kernels.h"

enum { MAX_TABLES = 8 };

#define DECLARE(isa) extern const ds_kernels ds_kernels_##isa;
DS_ISAS(DECLARE)

/* The best first. */
static int list_tables(const ds_kernels *tables[MAX_TABLES]) {
    const ds_cpu *cpu = ds_cpu_get();
    int n = 0;
#define LIST(isa) \
    if (cpu->isa) tables[n++] = &ds_kernels_##isa;
    DS_ISAS(LIST)
    return n;
}

const ds_kernels *const *ds_kernels_available(int *n) {
    static const ds_kernels *tables[MAX_TABLES];
    static int n_tables;
    static atomic_int state; /* 0 unlisted, 1 being listed, 2 known */
    int expected = 0;
    if (atomic_compare_exchange_strong(&state, &expected, 1)) {
        n_tables = list_tables(tables);
        atomic_store(&state, 2);
    }
    while (atomic_load(&state) != 2) continue; /* another thread lists them: microseconds */
    *n = n_tables;
    return tables;
}

const ds_kernels *ds_kernels_find(const char *isa) {
    int n;
    const ds_kernels *const *tables = ds_kernels_available(&n);
    if (!isa || !*isa) isa = ds_cpu_isa_override();
    if (!isa) return tables[0];
    for (int i = 0; i < n; i++)
        if (strcmp(tables[i]->isa, isa) == 0) return tables[i];
    return NULL;
}
