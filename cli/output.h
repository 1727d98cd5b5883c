// cli/output.h - text on its way to stdout. A part that may be the start of a stop string is held
// back until it is clear that it is not.
//
// Depends on cli/options.h (TextList).

typedef struct {
    char *bytes;
    size_t n, room;
} Text;

// 0, or -1 after fail().
static int text_add(Text *to, const void *bytes, size_t n) {
    if (n == 0) return 0; // memcpy may not be given NULL
    if (n > to->room - to->n) {
        size_t room = size_add(to->n, n) > SIZE_MAX / 2 ? SIZE_MAX : (to->n + n) * 2;
        char *larger = realloc(to->bytes, room);
        if (!larger) return fail("out of memory: a text of %zu bytes", size_add(to->n, n));
        to->bytes = larger;
        to->room = room;
    }
    memcpy(to->bytes + to->n, bytes, n);
    to->n += n;
    return 0;
}

typedef struct {
    const TextList *stop;
    Text held;
    Text *into; // where the text goes instead of stdout, or NULL
    char last;  // byte that went to stdout
} Output;

// 0, or -1 after fail(). Each write is checked: else -n -1 would write to a full disk for ever.
static int flush_stdout(void) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
    return fail("stdout: cannot write: %s", strerror(errno));
}

// Writes bytes (n) as they are, without looking for stop strings, and does not flush. 0, or -1
// after fail().
static int output_plain(Output *out, const void *bytes, size_t n) {
    if (n == 0) return 0;
    if (out->into) return text_add(out->into, bytes, n);
    fwrite(bytes, 1, n, stdout);
    out->last = ((const char *)bytes)[n - 1];
    return 0;
}

// Prints the first n bytes of what is held. 0, or -1 after fail().
static int output_print(Output *out, size_t n) {
    if (output_plain(out, out->held.bytes, n)) return -1;
    return out->into ? 0 : flush_stdout();
}

// Prints all that is held. 0, or -1 after fail().
static int output_flush(Output *out) {
    size_t n = out->held.n;
    out->held.n = 0;
    return output_print(out, n);
}

// Length of the longest end of text (n) that begins some stop string.
static size_t held_back(const TextList *stop, const char *text, size_t n) {
    size_t most = 0;
    for (int i = 0; i < stop->n; i++) {
        size_t length = strlen(stop->item[i]);
        for (size_t k = length - 1 < n ? length - 1 : n; k > most; k--)
            if (!memcmp(text + n - k, stop->item[i], k)) most = k;
    }
    return most;
}

// Where the first stop string in text (n) begins; SIZE_MAX: there is none.
static size_t find_stop(const TextList *stop, const char *text, size_t n) {
    size_t found = SIZE_MAX;
    for (int i = 0; i < stop->n; i++) {
        size_t length = strlen(stop->item[i]);
        for (size_t at = 0; at + length <= n && at < found; at++)
            if (!memcmp(text + at, stop->item[i], length)) found = at;
    }
    return found;
}

// Adds bytes and prints what no stop string can begin with. Returns 0, or 1 if a stop string
// appeared: it and what follows it are dropped. -1 after fail().
static int output_add(Output *out, const unsigned char *bytes, size_t n) {
    Text *held = &out->held;
    if (n == 0) return 0;
    if (text_add(held, bytes, n)) return -1;
    size_t stop = find_stop(out->stop, held->bytes, held->n);
    bool stopped = stop != SIZE_MAX;
    size_t keep = stopped ? 0 : held_back(out->stop, held->bytes, held->n);
    size_t print = stopped ? stop : held->n - keep;
    if (output_print(out, print)) return -1;
    if (keep) memmove(held->bytes, held->bytes + print, keep);
    held->n = keep;
    return stopped;
}
