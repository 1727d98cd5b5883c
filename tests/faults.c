/* faults.c - one call of the system fails. tests/test_faults.py links it into mamba, with
   -Wl,--wrap for each function here. FAULT=N in the environment: the N-th of all their calls fails,
   and the file FAULT_LOG gets its name. FAULT=0: none fails, and the file gets their number at the
   end. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define WRAP(type, name, ...) \
    type __real_##name(__VA_ARGS__); \
    type __wrap_##name(__VA_ARGS__); \
    type __wrap_##name(__VA_ARGS__)

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);

static long calls, wanted = -1;

static void tell(const char *text) {
    const char *path = getenv("FAULT_LOG");
    int fd = path ? __real_open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666) : -1;
    if (fd >= 0 && write(fd, text, strlen(text)) < 0) _exit(99);
}

static void tell_number(void) {
    char text[32];
    snprintf(text, sizeof text, "%ld", calls);
    tell(text);
}

static int fails(const char *name, int why) {
    if (wanted < 0) {
        const char *n = getenv("FAULT");
        wanted = n ? atol(n) : 0;
        if (!wanted) atexit(tell_number);
    }
    if (++calls != wanted) return 0;
    tell(name);
    errno = why;
    return 1;
}

/* A stream remembers that a call failed, as glibc does it. */
static void spoil(FILE *f) { f->_flags |= 0x20; }

WRAP(void *, malloc, size_t n) { return fails("malloc", ENOMEM) ? NULL : __real_malloc(n); }
WRAP(void *, calloc, size_t n, size_t size) {
    return fails("calloc", ENOMEM) ? NULL : __real_calloc(n, size);
}
WRAP(void *, realloc, void *p, size_t n) {
    return fails("realloc", ENOMEM) ? NULL : __real_realloc(p, n);
}
WRAP(void *, mmap, void *p, size_t n, int prot, int flags, int fd, off_t at) {
    return fails("mmap", ENOMEM) ? MAP_FAILED : __real_mmap(p, n, prot, flags, fd, at);
}
int __wrap_open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    int mode = flags & O_CREAT ? va_arg(more, int) : 0;
    va_end(more);
    return fails("open", EMFILE) ? -1 : __real_open(path, flags, mode);
}
WRAP(FILE *, fopen, const char *path, const char *mode) {
    return fails("fopen", EMFILE) ? NULL : __real_fopen(path, mode);
}
WRAP(FILE *, fdopen, int fd, const char *mode) {
    return fails("fdopen", ENOMEM) ? NULL : __real_fdopen(fd, mode);
}
WRAP(size_t, fread, void *to, size_t size, size_t n, FILE *f) {
    if (!fails("fread", EIO)) return __real_fread(to, size, n, f);
    spoil(f);
    return 0;
}
WRAP(size_t, fwrite, const void *from, size_t size, size_t n, FILE *f) {
    if (!fails(f == stderr ? "fwrite stderr" : "fwrite", ENOSPC))
        return __real_fwrite(from, size, n, f);
    spoil(f);
    return 0;
}
WRAP(int, fflush, FILE *f) {
    if (!fails(f == stderr ? "fflush stderr" : "fflush", ENOSPC)) return __real_fflush(f);
    if (f) spoil(f);
    return EOF;
}
WRAP(int, fclose, FILE *f) {
    int reading = (fcntl(fileno(f), F_GETFL) & O_ACCMODE) == O_RDONLY;
    if (!fails(reading ? "fclose of an input" : "fclose", EIO)) return __real_fclose(f);
    __real_fclose(f);
    errno = EIO;
    return EOF;
}
WRAP(int, fsync, int fd) { return fails("fsync", EIO) ? -1 : __real_fsync(fd); }
WRAP(int, rename, const char *from, const char *to) {
    return fails("rename", EACCES) ? -1 : __real_rename(from, to);
}
WRAP(int, fseek, FILE *f, long at, int from) {
    return fails("fseek", EIO) ? -1 : __real_fseek(f, at, from);
}
WRAP(long, ftell, FILE *f) { return fails("ftell", EIO) ? -1 : __real_ftell(f); }
