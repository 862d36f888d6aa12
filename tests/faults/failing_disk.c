/* Lets file operations under a folder fail, as those of a full or broken disk do.
 *
 *   gcc -shared -fPIC -O1 -o failing_disk.so failing_disk.c -ldl
 *   LD_PRELOAD=failing_disk.so FAILING_FOLDER=/run FAILING_AT=17 FAILING_ERRNO=28 program
 *
 * Every operation that creates, writes, syncs or renames under FAILING_FOLDER counts, in
 * all threads. The one with the number FAILING_AT fails with FAILING_ERRNO, and, if
 * FAILING_FOREVER is set, all later ones. The count at the end goes to FAILING_COUNT.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long operations;
static const char *folder, *counted;
static long failing_at;
static int failing_errno, forever;

__attribute__((constructor)) static void begin(void) {
  folder = getenv("FAILING_FOLDER");
  counted = getenv("FAILING_COUNT");
  failing_at = getenv("FAILING_AT") ? atol(getenv("FAILING_AT")) : -1;
  failing_errno = getenv("FAILING_ERRNO") ? atoi(getenv("FAILING_ERRNO")) : ENOSPC;
  forever = getenv("FAILING_FOREVER") != NULL;
}

__attribute__((destructor)) static void end(void) {
  if (!counted) return;
  FILE *out = fopen(counted, "w");
  if (out) fprintf(out, "%ld\n", atomic_load(&operations)), fclose(out);
}

static int is_inside(const char *path) {
  return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_inside_fd(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_inside(path);
}

static int fails(void) {
  long number = atomic_fetch_add(&operations, 1) + 1;
  if (failing_at < 0 || number < failing_at) return 0;
  if (number > failing_at && !forever) return 0;
  errno = failing_errno;
  return 1;
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, name, const char *, int, ...); \
    va_list more; va_start(more, flags); \
    mode_t mode = va_arg(more, int); va_end(more); \
    if ((flags & O_CREAT) && is_inside(path) && fails()) return -1; \
    return real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    REAL(int, name, int, const char *, int, ...); \
    va_list more; va_start(more, flags); \
    mode_t mode = va_arg(more, int); va_end(more); \
    if ((flags & O_CREAT) && is_inside(path) && fails()) return -1; \
    return real(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *from, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  return is_inside_fd(fd) && fails() ? -1 : real(fd, from, size);
}

ssize_t pwrite(int fd, const void *from, size_t size, off_t at) {
  REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
  return is_inside_fd(fd) && fails() ? -1 : real(fd, from, size, at);
}

ssize_t writev(int fd, const struct iovec *from, int count) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  return is_inside_fd(fd) && fails() ? -1 : real(fd, from, count);
}

int fsync(int fd) {
  REAL(int, fsync, int);
  return is_inside_fd(fd) && fails() ? -1 : real(fd);
}

int fdatasync(int fd) {
  REAL(int, fdatasync, int);
  return is_inside_fd(fd) && fails() ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  return is_inside(to) && fails() ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  return is_inside(path) && fails() ? -1 : real(path, mode);
}
