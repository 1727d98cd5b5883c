// files/memory.h: where memory comes from. By default malloc. mamba_arena() puts an array of the
// caller's in its place, for machines that have no heap. What runs a model calls these functions
// and never malloc; the commands in cli/ use malloc for their own arrays.
//
// The arena is a stack of blocks. Each has a header and a multiple of ARENA_ALIGN bytes:
//
//     | header | bytes ... | header | bytes ... | free ...
//              ^ what memory_get() returns
//
// A block that is freed below others waits until those above it are freed, too. A model, its Acts
// and its states are made once and freed in the end, so little waits.

typedef struct {
    size_t bytes; // of the block, without this header; the lowest bit says that it is freed
    size_t below; // place of the header below, SIZE_MAX: none
} ArenaHeader;
enum { ARENA_ALIGN = 16 };
#define ARENA_HEADER ((sizeof(ArenaHeader) + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN)

static struct {
    unsigned char *base; // aligned; NULL: malloc serves
    size_t bytes;
    size_t used; // bytes, from base on
    size_t last; // place of the last header, SIZE_MAX: none
    size_t peak; // the most that was used
} arena;

// From now on what the models of this process need lies in memory (bytes), which stays the
// caller's. memory NULL: malloc again. What was allocated before is freed where it came from, as
// long as the arena is not moved. One thread at a time may allocate in an arena.
SHARED void mamba_arena(void *memory, size_t bytes) {
    const size_t skip = (ARENA_ALIGN - (uintptr_t)memory % ARENA_ALIGN) % ARENA_ALIGN;
    arena.base = memory && bytes >= skip ? (unsigned char *)memory + skip : NULL;
    arena.bytes = arena.base ? bytes - skip : 0;
    arena.used = 0;
    arena.peak = 0;
    arena.last = SIZE_MAX;
}

// Bytes of the arena that are in use, and the most that ever were.
SHARED size_t mamba_arena_used(size_t *peak) {
    if (peak) *peak = arena.peak;
    return arena.used;
}

static ArenaHeader *arena_header(size_t place) {
    return (ArenaHeader *)(void *)(arena.base + place);
}

static void *arena_get(size_t bytes) {
    const size_t room = arena.bytes - arena.used;
    if (bytes > SIZE_MAX - ARENA_ALIGN) return NULL;
    // An empty block takes room, too: no two blocks begin at one place, and none at the end.
    bytes = bytes ? (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN : ARENA_ALIGN;
    if (room < ARENA_HEADER || bytes > room - ARENA_HEADER) return NULL;
    *arena_header(arena.used) = (ArenaHeader){bytes, arena.last};
    arena.last = arena.used;
    arena.used += ARENA_HEADER + bytes;
    if (arena.used > arena.peak) arena.peak = arena.used;
    return arena.base + arena.last + ARENA_HEADER;
}

static bool in_arena(const void *p) {
    const uintptr_t at = (uintptr_t)p, base = (uintptr_t)arena.base;
    return arena.base && at >= base && at - base < arena.bytes;
}

static void *memory_get(size_t bytes) { return arena.base ? arena_get(bytes) : malloc(bytes); }

static void *memory_zeroed(size_t count, size_t size) {
    if (!arena.base) return calloc(count, size);
    void *p = size && count > SIZE_MAX / size ? NULL : arena_get(count * size);
    return p ? memset(p, 0, count * size) : NULL;
}

static void memory_free(void *p) {
    if (!in_arena(p)) {
        free(p);
        return;
    }
    arena_header((size_t)((unsigned char *)p - arena.base) - ARENA_HEADER)->bytes |= 1;
    while (arena.last != SIZE_MAX && arena_header(arena.last)->bytes & 1) {
        arena.used = arena.last;
        arena.last = arena_header(arena.last)->below;
    }
}

// Gives back what the model allocated for the caller, such as the ids of mamba_encode.
SHARED void mamba_release(void *p) { memory_free(p); }

// As realloc: p NULL begins a block. NULL: there is no room, and p is as it was.
static void *memory_grow(void *p, size_t bytes) {
    if (!arena.base || (p && !in_arena(p))) return realloc(p, bytes);
    size_t old =
        p ? arena_header((size_t)((unsigned char *)p - arena.base) - ARENA_HEADER)->bytes : 0;
    void *grown = arena_get(bytes);
    if (!grown) return NULL;
    if (p) memcpy(grown, p, old < bytes ? old : bytes);
    memory_free(p);
    return grown;
}
