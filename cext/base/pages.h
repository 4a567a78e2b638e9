/* pages.h: memory by the page. Reads of a model are bound by memory, and every 4 KiB page needs its own address translation;
 * with pages of 2 MiB a core reads a file some 20 % faster, and a cold file comes from disk in larger pieces. */
#pragma once

#include <stddef.h>

/* Map size bytes of an open file read-only, shared with other processes; NULL with errno set where that fails. */
void *ds_pages_map(int fd, size_t size);
/* size zeroed bytes that take memory once they are touched; NULL with errno set where that fails. */
void *ds_pages_new(size_t size);
/* Give back what either returned. */
void ds_pages_release(void *pages, size_t size);
