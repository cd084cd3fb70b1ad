/* Counts what a process does to files, and kills it before the n-th operation. Loaded by LD_PRELOAD; armed from Python. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long count, last; /* last: 0 is never */

void faults_arm(long n) { count = 0, last = n; }
long faults_count(void) { return count; }

static void step(void) {
    if (atomic_fetch_add(&count, 1) + 1 == last) kill(getpid(), SIGKILL);
}
static int regular(int fd) {
    struct stat found;
    return !fstat(fd, &found) && S_ISREG(found.st_mode);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = dlsym(RTLD_NEXT, #name);
#define PLAIN(type, name, params, args) type name params { REAL(name) step(); return real args; }
#define ON_FILE(type, name, params, args) type name params { REAL(name) if (regular(fd)) step(); return real args; }
#define OPEN(name, params, ...) \
    int name params { \
        REAL(name) \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) step(); \
        return real(__VA_ARGS__, flags, mode); \
    }

OPEN(open, (const char *path, int flags, ...), path)
OPEN(open64, (const char *path, int flags, ...), path)
OPEN(openat, (int at, const char *path, int flags, ...), at, path)
OPEN(openat64, (int at, const char *path, int flags, ...), at, path)
ON_FILE(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
ON_FILE(ssize_t, writev, (int fd, const struct iovec *data, int n), (fd, data, n))
ON_FILE(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
ON_FILE(int, fsync, (int fd), (fd))
ON_FILE(int, ftruncate64, (int fd, off64_t n), (fd, n))
PLAIN(int, rename, (const char *a, const char *b), (a, b))
PLAIN(int, renameat, (int i, const char *a, int j, const char *b), (i, a, j, b))
PLAIN(int, renameat2, (int i, const char *a, int j, const char *b, unsigned f), (i, a, j, b, f))
PLAIN(int, unlink, (const char *a), (a))
PLAIN(int, unlinkat, (int i, const char *a, int f), (i, a, f))
PLAIN(int, rmdir, (const char *a), (a))
PLAIN(int, mkdir, (const char *a, mode_t m), (a, m))
PLAIN(int, link, (const char *a, const char *b), (a, b))
PLAIN(int, linkat, (int i, const char *a, int j, const char *b, int f), (i, a, j, b, f))
