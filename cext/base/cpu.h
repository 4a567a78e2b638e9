/* cpu.h: what this processor can do, asked of the processor and of the operating system's saved state (XGETBV, HWCAP). */
#pragma once

#include <stdbool.h>

/* By the names of the kernel tables. */
typedef struct ds_cpu {
    bool scalar; /* everywhere */
    bool avx2; /* AVX2 + FMA + F16C + BMI2, with YMM state saved by the system */
    bool avxvnni; /* the VEX-coded VNNI of consumer processors */
    bool avx512vnni; /* AVX-512 F, BW, DQ, VL, VNNI with ZMM state saved */
    bool neon; /* ARM: Advanced SIMD with the dot instructions of 8.2 */
    bool i8mm; /* and the matrix ones of 8.6 */
} ds_cpu;

const ds_cpu *ds_cpu_get(void);

/* The kernel table asked for in the environment (DSV2_ISA), or NULL. */
const char *ds_cpu_isa_override(void);
