// files/platform.h: the headers of the system, and what compilers call differently. The first
// include of every build.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE // mmap, getrusage, fileno, fsync under any -std
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64 // files over 2 GB on 32-bit machines
#endif
#include <assert.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#define MAMBA_POSIX 1
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN // of windows.h only what is needed; the rest takes names such as INPUT
#define NOGDI
#define NOMINMAX
#define NOUSER
#include <windows.h>
#undef far
#undef near
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
__declspec(dllimport) wchar_t **__stdcall CommandLineToArgvW(const wchar_t *, int *); // shell32
#ifdef _MSC_VER
#pragma comment(lib, "shell32")
#endif
#endif
#ifdef _OPENMP
#include <omp.h>
#ifdef MAMBA_POSIX
#include <pthread.h>
#endif
#elif defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunknown-pragmas" // without OpenMP its pragmas mean nothing
#endif

#define MAMBA_VERSION "0.1"

#ifdef __GNUC__
#define UNUSED __attribute__((unused))
#else
#define UNUSED
#endif

// SHARED: a function that other files of C may call. Files that are also part of a level (see
// cpu/levels.h), which would define it a second time, say so.
#ifdef MAMBA_LEVEL
#define SHARED UNUSED static
#else
#define SHARED
#endif

// COLD to COLD_END: code that takes little time. gcc compiles it at -O1, which cuts the build time
// by a third. What a hot loop calls must not stand there: gcc does not inline it into code at -O3.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#define COLD _Pragma("GCC push_options") _Pragma("GCC optimize (\"O1\")")
#define COLD_END _Pragma("GCC pop_options")
#else
#define COLD
#define COLD_END
#endif
