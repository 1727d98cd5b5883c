// -------------------------------------------------------------------------------------------------
// 1 Errors, checked sizes, bytes
// A function that fails says why with fail() and returns; only main exits. Sizes from a file
// saturate instead of wrapping, so one comparison with the file's length catches every overflow.
// Numbers are read byte by byte: any machine reads the same little-endian file.

#include "system.h"

// A variable that every thread has one of. Some compilers (tcc) have no such variables, and no
// threads.
#ifndef PER_THREAD
#if defined(_MSC_VER)
#define PER_THREAD __declspec(thread)
#elif defined(__TINYC__) || (!defined(__GNUC__) && __STDC_VERSION__ < 201112L)
#define PER_THREAD
#else
#define PER_THREAD _Thread_local
#endif
#endif

enum { ERROR_BYTES = 1024 };
static PER_THREAD char error_text[ERROR_BYTES];

static bool is_utf8_tail(char c) { return ((unsigned char)c & 0xC0) == 0x80; }

// Copies text to `to` (room bytes). Of a long text the middle is left out: a path of thousands of
// bytes in a sentence hides neither its beginning nor the reason at its end.
static void copy_shortened(char *to, size_t room, const char *text) {
    static const char DOTS[] = "[...]";
    size_t n = strlen(text), dots = sizeof DOTS - 1, head = (room - dots) / 3;
    if (n < room) {
        memcpy(to, text, n + 1);
        return;
    }
    size_t tail = n - (room - 1 - dots - head);
    while (head && is_utf8_tail(text[head])) head--; // whole characters
    while (is_utf8_tail(text[tail])) tail++;
    memcpy(to, text, head);
    memcpy(to + head, DOTS, dots);
    memcpy(to + head + dots, text + tail, n - tail + 1);
}

// Returns -1, so that a function can fail and return in one statement.
static int fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    char *whole = n < ERROR_BYTES ? NULL : malloc((size_t)n + 1);
    if (!whole) return -1;
    va_start(args, format);
    vsnprintf(whole, (size_t)n + 1, format, args);
    va_end(args);
    copy_shortened(error_text, sizeof error_text, whole);
    free(whole);
    return -1;
}

// The last error again, with the name of the file or argument that it came from before it.
static int fail_in(const char *where) {
    char why[2 * ERROR_BYTES / 3], name[ERROR_BYTES / 4];
    copy_shortened(why, sizeof why, error_text);
    copy_shortened(name, sizeof name, where);
    return fail("%s: %s", name, why);
}

// Why the last call of this thread failed: one sentence, no newline. Where a thread of a team
// fails, its text must be copied to the thread that started the team.
SHARED const char *mamba_error(void) { return error_text; }

static size_t size_mul(size_t a, size_t b) { return a && b > SIZE_MAX / a ? SIZE_MAX : a * b; }
static size_t size_add(size_t a, size_t b) { return b > SIZE_MAX - a ? SIZE_MAX : a + b; }

// Zeroed memory aligned for vectors and cache lines; NULL after fail(). Freed by free_aligned().
static void *alloc_aligned(size_t bytes) {
    const size_t align = 64;
    char *base = bytes > SIZE_MAX - 2 * align ? NULL : memory_zeroed(1, bytes + 2 * align);
    if (!base) {
        fail("out of memory: could not get %zu bytes", bytes);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    // Large arrays on pages of 2 MB: from 4 kB pages weights stream a quarter slower and more
    // (doc/SPEED.md).
    if (bytes >= (size_t)8 << 20)
        madvise(base + (4096 - (uintptr_t)base % 4096), bytes - 4096, MADV_HUGEPAGE);
#endif
    char *p =
        base + align - ((uintptr_t)base % align) + align; // room for the base pointer just below
    memcpy(p - sizeof base, &base, sizeof base);
    return p;
}

static void free_aligned(void *p) {
    char *base;
    if (!p) return;
    memcpy(&base, (char *)p - sizeof base, sizeof base);
    memory_free(base);
}

static uint32_t u32_at(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint64_t u64_at(const unsigned char *p) { return u32_at(p) | (uint64_t)u32_at(p + 4) << 32; }
static void put_u32(unsigned char *p, uint32_t value) {
    for (int i = 0; i < 4; i++) p[i] = (unsigned char)(value >> (8 * i));
}
static void put_u64(unsigned char *p, uint64_t value) {
    put_u32(p, (uint32_t)value);
    put_u32(p + 4, (uint32_t)(value >> 32));
}

static bool host_is_little_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 1;
}

// Reverses the bytes of every `width`-byte element on a big-endian host; nothing on a little-endian
// one.
static void fix_endian(void *data, size_t bytes, size_t width) {
    if (host_is_little_endian()) return;
    unsigned char *p = data;
    for (size_t i = 0; i + width <= bytes; i += width)
        for (size_t lo = 0, hi = width - 1; lo < hi; lo++, hi--) {
            unsigned char swap = p[i + lo];
            p[i + lo] = p[i + hi];
            p[i + hi] = swap;
        }
}

// CRC-32 (polynomial 0xEDB88320, zlib's), eight bytes a step: start with crc = 0 and feed pieces in
// order.
static uint32_t crc32_of(uint32_t crc, const void *data, size_t bytes) {
    static PER_THREAD uint32_t table[8][256]; // two threads may make it at one time
    if (!table[7][255]) { // row 0 is the bytewise table, row k is row 0 applied k more times
        for (int i = 0; i < 256; i++) {
            uint32_t c = (uint32_t)i;
            for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
            table[0][i] = c;
        }
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++)
                table[k][i] = table[0][table[k - 1][i] & 255] ^ (table[k - 1][i] >> 8);
    }
    const unsigned char *p = data;
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint32_t lo = crc ^ u32_at(p), hi = u32_at(p + 4);
        crc = table[7][lo & 255] ^ table[6][lo >> 8 & 255] ^ table[5][lo >> 16 & 255] ^
              table[4][lo >> 24] ^ table[3][hi & 255] ^ table[2][hi >> 8 & 255] ^
              table[1][hi >> 16 & 255] ^ table[0][hi >> 24];
    }
    for (; bytes; bytes--) crc = table[0][(crc ^ *p++) & 255] ^ (crc >> 8);
    return ~crc;
}

// Files up to this size are read, and may then be overwritten while they are used. Larger ones are
// mapped: that takes no time and no memory, but the file must stay as it is.
enum { READ_WHOLE = 32 << 20 };

// A file in memory: read, or mapped, read-only, where it is large and the platform can (big-endian
// hosts cannot: they swap it in place). An arena has no room to waste: there small files are mapped
// too.
static unsigned char *file_map(const char *path, size_t *bytes, bool *mapped) {
    FileInfo info = {.regular = true};
    *mapped = false;
    if (file_info(path, &info) && !info.regular) { // a FIFO without a writer would wait
        fail("%s: not a regular file", path);
        return NULL;
    }
    void *map = host_is_little_endian() ? map_file(path, bytes) : NULL;
    if (map && (*bytes > READ_WHOLE || arena.base)) {
        *mapped = true;
        return map;
    }
    if (map) unmap_file(map, *bytes);
    FILE *f = fopen(path, "rb");
    if (!f) {
        fail("%s: %s", path, strerror(errno));
        return NULL;
    }
    unsigned char *data = NULL;
    int64_t length = stream_length(f);
    if (length < 0) fail("%s: cannot find its length", path);
    else if ((uint64_t)length > SIZE_MAX / 2)
        fail("%s: %lld bytes are more than this machine can address", path, (long long)length);
    else if ((data = alloc_aligned((size_t)length))) {
        if (fread(data, 1, (size_t)length, f) != (size_t)length) {
            fail("%s: read error", path);
            free_aligned(data);
            data = NULL;
        }
        *bytes = (size_t)length;
    }
    fclose(f);
    return data;
}

static void file_unmap(unsigned char *data, size_t bytes, bool mapped) {
    if (mapped) unmap_file(data, bytes);
    else free_aligned(data);
}
