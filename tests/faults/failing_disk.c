/* Lets file operations under a folder fail, as those of a full or broken disk do.
 *
 *   gcc -shared -fPIC -O1 -o failing_disk.so failing_disk.c -ldl
 *   LD_PRELOAD=failing_disk.so FAILING_FOLDER=/run FAILING_AT=17 FAILING_ERRNO=28 program
 *
 * Every operation that creates, writes, syncs or renames under FAILING_FOLDER counts, in
 * all threads, or those alone that match FAILING_KIND, such as "write warm/metrics.jsonl"
 * or "rename *" (fnmatch). The one with the number FAILING_AT fails with FAILING_ERRNO, and,
 * if FAILING_FOREVER is set, all operations after it. FAILING_LOG gets a line for each
 * operation, and "failed" before those that fail. A fork that calls failing_disk_begin
 * reads the variables again.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long operations;
static atomic_int broken;
static const char *folder, *kind;
static long failing_at;
static int failing_errno, forever, log_file = -1;

__attribute__((constructor)) void failing_disk_begin(void) {
  const char *log = getenv("FAILING_LOG");
  folder = getenv("FAILING_FOLDER");
  kind = getenv("FAILING_KIND");
  failing_at = getenv("FAILING_AT") ? atol(getenv("FAILING_AT")) : -1;
  failing_errno = getenv("FAILING_ERRNO") ? atoi(getenv("FAILING_ERRNO")) : ENOSPC;
  forever = getenv("FAILING_FOREVER") != NULL;
  operations = broken = 0;
  if (log) log_file = open(log, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
}

static int is_inside(const char *path) {
  return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int fails(const char *operation, const char *path) {
  char line[4200];
  if (!is_inside(path)) return 0;
  path += strlen(folder);
  while (*path == '/') path++;
  snprintf(line, sizeof line, "%s %s", operation, path);
  int now = broken;
  if (!now && (!kind || !fnmatch(kind, line, 0))) {
    now = atomic_fetch_add(&operations, 1) + 1 == failing_at;
    if (now && forever) broken = 1;
  }
  if (log_file >= 0) dprintf(log_file, "%s%s\n", now ? "failed " : "", line);
  if (now) errno = failing_errno;
  return now;
}

static int fails_fd(const char *operation, int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(operation, path);
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, name, const char *, int, ...); \
    va_list more; va_start(more, flags); \
    mode_t mode = va_arg(more, int); va_end(more); \
    if ((flags & O_CREAT) && fails("create", path)) return -1; \
    return real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    REAL(int, name, int, const char *, int, ...); \
    va_list more; va_start(more, flags); \
    mode_t mode = va_arg(more, int); va_end(more); \
    if ((flags & O_CREAT) && fails("create", path)) return -1; \
    return real(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *from, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  return fails_fd("write", fd) ? -1 : real(fd, from, size);
}

ssize_t pwrite(int fd, const void *from, size_t size, off_t at) {
  REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
  return fails_fd("pwrite", fd) ? -1 : real(fd, from, size, at);
}

ssize_t writev(int fd, const struct iovec *from, int count) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  return fails_fd("writev", fd) ? -1 : real(fd, from, count);
}

int fsync(int fd) {
  REAL(int, fsync, int);
  return fails_fd("fsync", fd) ? -1 : real(fd);
}

int fdatasync(int fd) {
  REAL(int, fdatasync, int);
  return fails_fd("fdatasync", fd) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  return fails("rename", to) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  return fails("mkdir", path) ? -1 : real(path, mode);
}
