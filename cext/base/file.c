#define _DEFAULT_SOURCE
#include "base/file.h"

#include <sys/stat.h>

bool ds_file_stamp_get(int fd, ds_file_stamp *out) {
    struct stat info;
    if (fstat(fd, &info) != 0) {
        return false;
    }
#if defined(__APPLE__)
    const struct timespec written = info.st_mtimespec;
#else
    const struct timespec written = info.st_mtim;
#endif
    *out = (ds_file_stamp){info.st_size, written.tv_sec, written.tv_nsec};
    return true;
}

bool ds_file_stamp_equal(const ds_file_stamp *a, const ds_file_stamp *b) {
    return a->size == b->size && a->seconds == b->seconds && a->nanoseconds == b->nanoseconds;
}
