/* os_apple.c: what macOS tells of its processors, and reads past its cache. */
#if defined(__APPLE__)
#include "base/os.h"

#include <fcntl.h>
#include <sys/sysctl.h>

/* A number that the system knows by name, or 0. */
static int number(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 ? value : 0;
}

bool ds_file_direct(ds_file file, bool on) { return fcntl((int)file, F_NOCACHE, on ? 1 : 0) == 0; }

void ds_file_sparse(ds_file file) { fcntl((int)file, F_RDAHEAD, 0); }

void ds_file_forget(ds_file file, size_t n, int64_t offset) {} /* what came past the cache is not in it */

int ds_os_cores(void) {
    /* The performance cores where the machine tells them apart: a team waits for its slowest member. */
    const int fast = number("hw.perflevel0.physicalcpu"), all = number("hw.physicalcpu");
    return fast > 0 ? fast : all > 0 ? all : 1;
}

bool ds_os_has_dotprod(void) { return number("hw.optional.arm.FEAT_DotProd") != 0; }
bool ds_os_has_i8mm(void) { return number("hw.optional.arm.FEAT_I8MM") != 0; }

#else
typedef int ds_os_apple_is_elsewhere; /* a file of C holds something */
#endif
