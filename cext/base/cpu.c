/* cpu.c: instruction sets, asked of cpuid or of the system. What the machine does not answer counts as "no". */
#include "base/cpu.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "base/os.h"

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static void detect(ds_cpu *cpu) {
    uint32_t a, b, c, d, b7, c7, d7, a7_1 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return;
    const uint32_t last_subleaf = a;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a7_1 = a;

    const uint64_t state = saved_state();
    const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
    cpu->avx2 = ymm && fma && f16c && (b7 >> 5 & 1) && (b7 >> 8 & 1);
    cpu->avxvnni = cpu->avx2 && (a7_1 >> 4 & 1);
    const bool f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1, vnni = c7 >> 11 & 1;
    cpu->avx512vnni = cpu->avx2 && zmm && f && dq && bw && vl && vnni;
#if DS_AVXVNNI_AS_EVEX
    cpu->avxvnni = cpu->avx512vnni; /* that table is built with AVX-512VL's coding of its instructions */
#endif
}

#elif defined(__aarch64__)

static void detect(ds_cpu *cpu) {
    cpu->neon = ds_os_has_dotprod(); /* all of them have Advanced SIMD */
    cpu->i8mm = cpu->neon && ds_os_has_i8mm();
}

#else
static void detect(ds_cpu *cpu) { (void)cpu; }
#endif

const ds_cpu *ds_cpu_get(void) {
    static ds_cpu found;
    static atomic_int state; /* 0 unasked, 1 being asked, 2 known */
    int expected = 0;
    if (atomic_compare_exchange_strong(&state, &expected, 1)) {
        found.scalar = true;
        detect(&found);
        atomic_store(&state, 2);
    }
    while (atomic_load(&state) != 2) continue; /* another thread asks: microseconds */
    return &found;
}

const char *ds_cpu_isa_override(void) {
    const char *name = getenv("DSV2_ISA");
    return name && *name ? name : NULL;
}
