/* cpu.c: instruction sets and core counts. Asks cpuid, the kernel's auxiliary vector, sysfs and cgroup files; a question
 * that the machine does not answer counts as "no" for an instruction set and as "no limit" for a quota. */
#define _GNU_SOURCE
#include "base/cpu.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

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

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static void detect(ds_cpu *cpu) {
    /* Bits of the arm64 kernel interface: ASIMD 1 and ASIMDDP 20 of HWCAP, I8MM 13 of HWCAP2. */
    const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
    cpu->neon = (hwcap >> 1 & 1) && (hwcap >> 20 & 1);
    cpu->i8mm = cpu->neon && (hwcap2 >> 13 & 1);
}

#elif defined(__aarch64__) && defined(__APPLE__)
static bool sysctl_flag(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value;
}

static void detect(ds_cpu *cpu) {
    cpu->neon = sysctl_flag("hw.optional.arm.FEAT_DotProd"); /* all of them have Advanced SIMD */
    cpu->i8mm = cpu->neon && sysctl_flag("hw.optional.arm.FEAT_I8MM");
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

long ds_process_id(void) { return (long)getpid(); }

const char *ds_cpu_isa_override(void) {
    const char *name = getenv("DSV2_ISA");
    return name && *name ? name : NULL;
}

#if defined(__linux__)

/* First line of a small file without its newline; false where it cannot be read. */
static bool read_line(const char *path, char *line, size_t size) {
    FILE *file = fopen(path, "re");
    if (!file) return false;
    const bool ok = fgets(line, (int)size, file) != NULL;
    fclose(file);
    if (ok) line[strcspn(line, "\n")] = '\0';
    return ok;
}

/* How fast a processor is beside the others, where the system tells: ARM's large and small cores. */
static long capacity(int cpu) {
    char path[96], line[32];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpu_capacity", cpu);
    return read_line(path, line, sizeof line) ? strtol(line, NULL, 10) : 0;
}

/* Physical cores among the processors of the affinity mask: a processor counts if no lower one in the mask shares its core,
 * and if it is at least half as fast as the fastest, because a team waits for its slowest member. */
static int affine_cores(void) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) {
        const long online = sysconf(_SC_NPROCESSORS_ONLN);
        return online > 0 ? (int)online : 1;
    }
    int cores = 0;
    long fastest = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        const long speed = CPU_ISSET(cpu, &mask) ? capacity(cpu) : 0;
        if (speed > fastest) fastest = speed;
    }
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &mask) || 2 * capacity(cpu) < fastest) continue;
        char path[96], siblings[256];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        bool first = true;
        if (read_line(path, siblings, sizeof siblings)) {
            /* "0,64" or "0-1": the ranges of the processors of one core */
            for (char *at = siblings; *at && first;) {
                const long low = strtol(at, &at, 10);
                const long high = *at == '-' ? strtol(at + 1, &at, 10) : low;
                for (long other = low; other <= high && other < cpu; other++)
                    if (other >= 0 && CPU_ISSET((int)other, &mask)) first = false;
                if (*at != ',') break;
                at++;
            }
        }
        cores += first;
    }
    return cores > 0 ? cores : 1;
}

/* Cores that a quota file allows, or a negative number where it sets no limit. v2: "200000 100000" or "max 100000". */
static double quota_v2(const char *dir) {
    char path[1200], line[128];
    double quota, period;
    snprintf(path, sizeof path, "%s/cpu.max", dir);
    if (!read_line(path, line, sizeof line) || sscanf(line, "%lf %lf", &quota, &period) != 2) return -1.0;
    return period > 0 ? quota / period : -1.0;
}

static double quota_v1(const char *dir) {
    char path[1200], line[64];
    snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", dir);
    if (!read_line(path, line, sizeof line)) return -1.0;
    const double quota = strtod(line, NULL);
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", dir);
    if (quota <= 0 || !read_line(path, line, sizeof line)) return -1.0;
    const double period = strtod(line, NULL);
    return period > 0 ? quota / period : -1.0;
}

/* The smallest quota of a group and all groups above it. A container may see its own group as the root: directories that
 * are not there set no limit. */
static double quota_upwards(const char *root, const char *group, double (*quota)(const char *dir)) {
    char dir[1100];
    snprintf(dir, sizeof dir, "%s%s", root, group);
    double least = -1.0;
    for (;;) {
        const double cores = quota(dir);
        if (cores > 0 && (least < 0 || cores < least)) least = cores;
        char *slash = strrchr(dir, '/');
        if (!slash || strlen(dir) <= strlen(root)) return least;
        *slash = '\0';
    }
}

static double cgroup_cores(void) {
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file) return -1.0;
    double least = -1.0;
    char line[1024];
    while (fgets(line, sizeof line, file)) {
        /* "0::/user.slice" (v2) or "4:cpu,cpuacct:/docker/..." (v1) */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = '\0';
        controllers++;
        double cores = -1.0;
        if (*controllers == '\0') {
            cores = quota_upwards("/sys/fs/cgroup", group, quota_v2);
        } else if (strcmp(controllers, "cpu") == 0 || strncmp(controllers, "cpu,", 4) == 0 ||
                   strstr(controllers, ",cpu,")) {
            cores = quota_upwards("/sys/fs/cgroup/cpu", group, quota_v1);
        }
        if (cores > 0 && (least < 0 || cores < least)) least = cores;
    }
    fclose(file);
    return least;
}

int ds_cpu_default_threads(void) {
    const int cores = affine_cores();
    const double quota = cgroup_cores();
    if (quota < 0 || quota >= cores) return cores;
    /* Rounded down: a team that overruns its quota is stopped as a whole until the next period. */
    return quota < 1.0 ? 1 : (int)quota;
}

#elif defined(__APPLE__)

int ds_cpu_default_threads(void) {
    /* The performance cores where the machine tells them apart: a team waits for its slowest member. */
    const char *const names[] = {"hw.perflevel0.physicalcpu", "hw.physicalcpu"};
    for (int i = 0; i < 2; i++) {
        int cores = 0;
        size_t size = sizeof cores;
        if (sysctlbyname(names[i], &cores, &size, NULL, 0) == 0 && cores > 0) return cores;
    }
    return 1;
}

#else

int ds_cpu_default_threads(void) {
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

#endif
