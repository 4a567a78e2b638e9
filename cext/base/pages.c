#define _DEFAULT_SOURCE
#include "base/pages.h"

#include <sys/mman.h>

enum { HUGE_PAGE = 2 << 20 };

/* Ask for huge pages; a kernel or file system without them refuses, which costs nothing. */
static void *advised(void *pages, size_t size) {
    if (pages == MAP_FAILED) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (size >= HUGE_PAGE) {
        madvise(pages, size, MADV_HUGEPAGE);
    }
#endif
    return pages;
}

void *ds_pages_map(int fd, size_t size) { return advised(mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0), size); }

void *ds_pages_new(size_t size) {
    return advised(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), size);
}

void ds_pages_release(void *pages, size_t size) {
    if (pages) {
        munmap(pages, size);
    }
}
