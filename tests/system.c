// A library for LD_PRELOAD (glibc): the n-th call of one kind fails, every other one works.
//   cc -O1 -fPIC -shared tests/system.c -o system.so -ldl
//   FAULT=KIND:N LD_PRELOAD=./system.so ./mamba ...
//   FAULT_COUNT=FILE: appends how many calls of each kind were made
//   FAULT_CLOCK=1: the clock stands still
// Kinds: write, a write to the system; thread, the start of one. tests/faults.c lets allocations
// and the calls of stdio fail.
//
// A stream that is opened for writing, and stdout, becomes one whose writes go through this file,
// so that the writes of printf and of a full buffer are counted.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { WRITE, THREAD, KINDS };
static const char *const NAME[KINDS] = {"write", "thread"};
static long count[KINDS], fault_at;
static int fault_kind = -1, ready;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// Counts a call of this kind; whether it is the one that fails.
static int fails(int kind, int why) {
    if (!ready) return 0;
    long n = __atomic_add_fetch(&count[kind], 1, __ATOMIC_RELAXED);
    if (kind != fault_kind || n != fault_at) return 0;
    errno = why;
    return 1;
}

// Only calls from the program itself: OpenMP ends a program that gets no thread for OpenMP.
#define OURS() \
    ((char *)__builtin_return_address(0) >= program_start && \
     (char *)__builtin_return_address(0) < program_end)
static char *program_start, *program_end;

// --- streams

typedef struct {
    int fd;
    FILE *f;
} Stream;
enum { STREAMS = 64 };
static Stream stream[STREAMS];

static ssize_t stream_write(void *cookie, const char *bytes, size_t n) {
    Stream *s = cookie;
    if (fails(WRITE, ENOSPC)) return 0;
    ssize_t done = write(s->fd, bytes, n);
    return done < 0 ? 0 : done;
}
static int stream_close(void *cookie) {
    Stream *s = cookie;
    int bad = close(s->fd);
    s->f = NULL;
    return bad;
}
static int stream_seek(void *cookie, off64_t *offset, int from) {
    off64_t at = lseek64(((Stream *)cookie)->fd, *offset, from);
    if (at < 0) return -1;
    *offset = at;
    return 0;
}
static FILE *stream_open(int fd, const char *mode) {
    const cookie_io_functions_t how = {NULL, stream_write, stream_seek, stream_close};
    for (int i = 0; i < STREAMS; i++)
        if (!stream[i].f) {
            stream[i].fd = fd;
            int was = ready;
            ready = 0; // what the C library allocates for itself
            stream[i].f = fopencookie(&stream[i], mode, how);
            ready = was;
            return stream[i].f;
        }
    return NULL;
}
FILE *fdopen(int fd, const char *mode) {
    return *mode == 'r' ? REAL(fdopen)(fd, mode) : stream_open(fd, mode);
}
FILE *fopen(const char *path, const char *mode) {
    if (*mode == 'r') return REAL(fopen)(path, mode);
    int fd = REAL(open)(path, O_WRONLY | O_CREAT | (*mode == 'a' ? O_APPEND : O_TRUNC), 0666);
    return fd < 0 ? NULL : stream_open(fd, mode);
}
FILE *fopen64(const char *path, const char *mode) { return fopen(path, mode); }
int fileno(FILE *f) {
    for (int i = 0; i < STREAMS; i++)
        if (stream[i].f == f) return stream[i].fd;
    return REAL(fileno)(f);
}
// --- the system

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!getenv("FAULT_CLOCK")) return REAL(clock_gettime)(clock, now);
    *now = (struct timespec){1000, 0};
    return 0;
}
int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with) {
    if (OURS() && fails(THREAD, EAGAIN)) return EAGAIN;
    return REAL(pthread_create)(thread, how, run, with);
}

// --- start and end

static void report(void) {
    const char *path = getenv("FAULT_COUNT");
    char line[512];
    int n = 0;
    ready = 0;
    if (!path) return;
    for (int k = 0; k < KINDS; k++)
        n += snprintf(line + n, sizeof line - (size_t)n, "%s %ld\n", NAME[k], count[k]);
    int fd = REAL(open)(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd >= 0 && write(fd, line, (size_t)n) == n) close(fd);
}
__attribute__((constructor)) static void start(void) {
    const char *fault = getenv("FAULT");
    for (int k = 0; k < KINDS && fault; k++) {
        size_t n = strlen(NAME[k]);
        if (strncmp(fault, NAME[k], n) || fault[n] != ':') continue;
        fault_kind = k;
        fault_at = atol(fault + n + 1);
    }
    // The program's code: the parts of the first file in the list of mappings.
    FILE *maps = REAL(fopen)("/proc/self/maps", "r");
    char line[512], first[256] = "", name[256];
    unsigned long from, to;
    while (maps && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %*s %*s %*s %*s %255s", &from, &to, name) != 3) continue;
        if (!*first) strcpy(first, name);
        if (strcmp(first, name)) break;
        if (!program_start) program_start = (char *)from;
        program_end = (char *)to;
    }
    if (maps) REAL(fclose)(maps);
    FILE *out = stream_open(dup(1), "w");
    if (out) stdout = out;
    atexit(report);
    ready = 1;
}
