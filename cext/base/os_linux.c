/* os_linux.c: what Linux has of its own: sleeping on a word, reads past the page cache, affinity masks, and the quotas of control groups. A question
 * that the machine does not answer counts as "no limit". */
#if defined(__linux__)
#define _GNU_SOURCE
#include "base/os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

void ds_word_sleep(_Atomic uint32_t *word, uint32_t old) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
}

void ds_word_wake(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0); }

bool ds_file_direct(ds_file file, bool on) {
    const int flags = fcntl((int)file, F_GETFL);
    return flags >= 0 && fcntl((int)file, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

/* A copy in memory of our own, aligned as huge pages are, that then takes the mapping's place: who reads while that happens
 * waits in the page fault. */
bool ds_pages_settle(ds_file file, void *pages, size_t size, int64_t offset) {
    const size_t room = size + DS_HUGE_PAGE;
    char *all = ds_pages_new(room);
    if (!all) return false;
    char *copy = all + (DS_HUGE_PAGE - (uintptr_t)all % DS_HUGE_PAGE) % DS_HUGE_PAGE;
    const int64_t got = ds_file_read(file, copy, size, offset);
    bool ok = got == (int64_t)size && mprotect(copy, size, PROT_READ) == 0;
    ok = ok && mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, pages) != MAP_FAILED;
    const int why = got >= 0 && got < (int64_t)size ? EIO : errno;
    if (ok && copy > all) munmap(all, (size_t)(copy - all));
    if (ok) munmap(copy + size, room - size - (size_t)(copy - all));
    else munmap(all, room);
    errno = why;
    return ok;
}

#if defined(__aarch64__)
/* Bits of the arm64 kernel interface: ASIMD 1 and ASIMDDP 20 of HWCAP, I8MM 13 of HWCAP2. */
bool ds_os_has_dotprod(void) {
    const unsigned long hwcap = getauxval(AT_HWCAP);
    return (hwcap >> 1 & 1) && (hwcap >> 20 & 1);
}
bool ds_os_has_i8mm(void) { return getauxval(AT_HWCAP2) >> 13 & 1; }
#else
bool ds_os_has_dotprod(void) { return false; }
bool ds_os_has_i8mm(void) { return false; }
#endif

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
        return ds_os_processors();
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

int ds_os_cores(void) {
    const int cores = affine_cores();
    const double quota = cgroup_cores();
    if (quota < 0 || quota >= cores) return cores;
    /* Rounded down: a team that overruns its quota is stopped as a whole until the next period. */
    return quota < 1.0 ? 1 : (int)quota;
}

#else
typedef int ds_os_linux_is_elsewhere; /* a file of C holds something */
#endif
