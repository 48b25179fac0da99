/* LD_PRELOAD: a call of the C library that fails, for tests/tools/faults.py.

   FAULT_CALL   pread pwrite write fsync fdatasync fallocate rename malloc
   FAULT_PATH   a part of the file's path
   FAULT_SKIP   so many such calls are let through; FAULT_TIMES so many then fail (0: all)
   FAULT_ERRNO  what they say, or 0: they do half of what was asked
   FAULT_BYTES  malloc only: of at least so many bytes
   FAULT_LOG    gets a byte for each call that failed */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
static atomic_long seen;
static long number(const char *name) { const char *s = getenv(name); return s ? atol(s) : 0; }

static int matches(const char *call) {
    const char *s = getenv("FAULT_CALL");
    return s && strcmp(s, call) == 0;
}

static int fires(void) {
    long n = atomic_fetch_add(&seen, 1), skip = number("FAULT_SKIP"), times = number("FAULT_TIMES");
    if (n < skip || (times && n >= skip + times)) return 0;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, getenv("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd >= 0) { syscall(SYS_write, fd, "x", 1); syscall(SYS_close, fd); }
    return 1;
}

static int path_matches(const char *path) {
    const char *part = getenv("FAULT_PATH");
    return !part || strstr(path, part) != NULL;
}

static int hit(const char *call, int fd) {
    if (!matches(call)) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return path_matches(path) && fires();
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL_OR_HALVE(count) \
    do { long e = number("FAULT_ERRNO"); if (e) { errno = (int)e; return -1; } if ((count) > 1) (count) /= 2; } while (0)
#define FAIL() do { errno = (int)number("FAULT_ERRNO"); return -1; } while (0)

static ssize_t vector(const struct iovec *iov, struct iovec *one) {
    *one = iov[0];
    long e = number("FAULT_ERRNO");
    if (e) { errno = (int)e; return -1; }
    if (one->iov_len > 1) one->iov_len /= 2;
    return 0;
}

#define PREADV(name) \
    ssize_t name(int fd, const struct iovec *iov, int n, off_t at) { \
        REAL(name); struct iovec one; \
        if (hit("pread", fd)) return vector(iov, &one) ? -1 : real(fd, &one, 1, at); \
        return real(fd, iov, n, at); }
#define PREAD(name) \
    ssize_t name(int fd, void *p, size_t n, off_t at) { REAL(name); if (hit("pread", fd)) FAIL_OR_HALVE(n); return real(fd, p, n, at); }
#define PWRITE(name) \
    ssize_t name(int fd, const void *p, size_t n, off_t at) { REAL(name); if (hit("pwrite", fd)) FAIL_OR_HALVE(n); return real(fd, p, n, at); }
#define FALLOCATE(name) \
    int name(int fd, int mode, off_t at, off_t n) { REAL(name); if (hit("fallocate", fd)) FAIL(); return real(fd, mode, at, n); }
#define PREADV2(name) \
    ssize_t name(int fd, const struct iovec *iov, int n, off_t at, int flags) { \
        REAL(name); struct iovec one; \
        if (hit("pread", fd)) return vector(iov, &one) ? -1 : real(fd, &one, 1, at, flags); \
        return real(fd, iov, n, at, flags); }
PREADV(preadv) PREADV(preadv64) PREADV2(preadv2) PREADV2(preadv64v2)
PREAD(pread) PREAD(pread64) PWRITE(pwrite) PWRITE(pwrite64)
FALLOCATE(fallocate) FALLOCATE(fallocate64)
ssize_t write(int fd, const void *p, size_t n) { REAL(write); if (hit("write", fd)) FAIL_OR_HALVE(n); return real(fd, p, n); }
int fsync(int fd) { REAL(fsync); if (hit("fsync", fd)) FAIL(); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); if (hit("fdatasync", fd)) FAIL(); return real(fd); }
int rename(const char *a, const char *b) { REAL(rename); if (matches("rename") && path_matches(b) && fires()) FAIL(); return real(a, b); }
int renameat(int from, const char *a, int to, const char *b) {
    REAL(renameat);
    if (matches("rename") && path_matches(b) && fires()) FAIL();
    return real(from, a, to, b); }
void *malloc(size_t n) {
    if (n >= 65536 && matches("malloc") && n >= (size_t)number("FAULT_BYTES") && fires()) { errno = ENOMEM; return NULL; }
    return __libc_malloc(n);
}
