/* machine.c: another machine's processors for the process that preloads this. /sys and /proc/self/cgroup lie under
 * MACHINE_ROOT, and the affinity mask holds the processors of MACHINE_CPUS ("0,2,3"). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

FILE *fopen(const char *path, const char *mode) {
    FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, "fopen");
    const char *root = getenv("MACHINE_ROOT");
    char moved[4096];
    if (!root || (strncmp(path, "/sys/", 5) != 0 && strcmp(path, "/proc/self/cgroup") != 0)) return real(path, mode);
    snprintf(moved, sizeof moved, "%s%s", root, path);
    return real(moved, mode);
}

int sched_getaffinity(pid_t pid, size_t size, cpu_set_t *mask) {
    (void)pid;
    memset(mask, 0, size);
    const char *at = getenv("MACHINE_CPUS");
    while (at && *at) {
        char *end;
        CPU_SET_S((int)strtol(at, &end, 10), size, mask);
        at = *end == ',' ? end + 1 : end;
    }
    return 0;
}
