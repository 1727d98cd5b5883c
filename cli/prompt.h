// cli/prompt.h - a prompt in any form, as token ids: a text, a file, or ids that somebody else's
// tokenizer made.
//
// Depends on cli/options.h (read_text) and the API.

typedef struct {
    bool ids;        // --ids: texts are token ids, what is written too
    bool escapes;    // -e: \n, \t, \r, \\ and \xHH in prompts and stop strings
    bool raw;        // --raw: the last newline of a file or of stdin is kept
    bool no_special; // --no-special: <|endoftext|> is text
} PromptForm;

#define RAW_OPTION(value) \
    OPTION_SWITCH("--raw", value, "keep the newline at the end of a prompt from a file or stdin")
#define IDS_OPTION(value) \
    OPTION_SWITCH("--ids", value, \
                  "token ids instead of text, read and written: between spaces, commas or lines")
#define NO_SPECIAL_OPTION(value) \
    OPTION_SWITCH("--no-special", value, "read special tokens such as <|endoftext|> as plain text")

static bool no_bos; // --no-bos

#define NO_BOS_OPTION \
    OPTION_SWITCH("--no-bos", &no_bos, "do not put the tokenizer's begin-of-text before the prompt")

// --- ids

static bool is_separator(char c) { return c && strchr(" \t\r\n,", c); }

// The next id of a text that ends at end, where a NUL stands: 1 and *id, 0 at the end, -1 after
// fail(). text: for the place in errors.
static int next_id(const char *text, const char **at, const char *end, int32_t *id) {
    while (*at < end && is_separator(**at)) (*at)++;
    if (*at == end) return 0;
    char *stop;
    errno = 0;
    long value = strtol(*at, &stop, 10);
    if (stop == *at || errno || (stop < end && !is_separator(*stop)))
        return fail("byte %zu of the input is not part of a token id", (size_t)(*at - text));
    if (value < 0 || value > INT_MAX) return fail("%ld is not a token id", value);
    *id = (int32_t)value;
    *at = stop;
    return 1;
}

static int check_id(const Model *m, int32_t id) {
    if (id < m->config.V) return 0;
    return fail("token id %d: the model knows 0 to %d", (int)id, m->config.V - 1);
}

// Ids between spaces, commas or lines; malloc'd. A NUL follows the text. 0, or -1 after fail().
static int read_ids(const Model *m, const char *text, size_t bytes, int32_t **ids, size_t *n) {
    const char *at = text;
    int32_t id;
    *n = 0;
    *ids = malloc((bytes / 2 + 1) * sizeof **ids);
    if (!*ids) return fail("out of memory: %zu bytes of ids", bytes);
    for (;;) {
        int found = next_id(text, &at, text + bytes, &id);
        if (found == 0) return 0;
        if (found < 0 || check_id(m, id)) break;
        (*ids)[(*n)++] = id;
    }
    free(*ids);
    *ids = NULL;
    return -1;
}

// The value of --tokens, "1,2,3" or "1, 2, 3". 0, or -1 after fail().
static int parse_ids(const Model *m, const char *text, int32_t **ids, size_t *n) {
    for (const char *p = text; *p || p == text; p++) {
        p += strspn(p, " ");
        size_t digits = strspn(p, "0123456789"), n = digits + strspn(p + digits, " ");
        bool last = !p[n];
        if (digits == 0 || (!last && (p[n] != ',' || !p[n + 1])))
            return fail("--tokens needs ids between commas, such as 1,2,3, not '%s'", text);
        p += n;
        if (last) break;
    }
    return read_ids(m, text, strlen(text), ids, n) ? fail_in("--tokens") : 0;
}

// --- text

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if ((c | 32) >= 'a' && (c | 32) <= 'f') return (c | 32) - 'a' + 10;
    return -1;
}

// Replaces \n, \t, \r, \\ and \xHH in a text of *n bytes, followed by a NUL, by what they stand
// for. 0, or -1 after fail().
static int unescape(char *text, size_t *n) {
    size_t to = 0;
    for (size_t i = 0; i < *n; i++) {
        char c = text[i];
        if (c == '\\') {
            char kind = i + 1 < *n ? text[i + 1] : 0;
            int high = kind == 'x' && i + 3 < *n ? hex_digit(text[i + 2]) : -1;
            int low = high >= 0 ? hex_digit(text[i + 3]) : -1;
            if (low >= 0) c = (char)(high * 16 + low);
            else if (kind == 'n') c = '\n';
            else if (kind == 't') c = '\t';
            else if (kind == 'r') c = '\r';
            else if (kind != '\\')
                return fail("-e knows \\n, \\t, \\r, \\\\ and \\xHH, not '%.4s'", text + i);
            i += low >= 0 ? 3 : 1;
        }
        text[to++] = c;
    }
    text[to] = 0;
    *n = to;
    return 0;
}

// A copy with -e applied, malloc'd, *n bytes and a NUL. NULL after fail().
static char *unescaped_copy(const char *text, size_t *n) {
    *n = strlen(text);
    char *copy = malloc(*n + 1);
    if (!copy) {
        fail("out of memory: a text of %zu bytes", *n);
        return NULL;
    }
    memcpy(copy, text, *n + 1);
    if (unescape(copy, n) == 0) return copy;
    free(copy);
    return NULL;
}

// Editors and echo end a file in a newline; a prompt that ended in one would begin a new line.
static void drop_last_newline(char *text, size_t *n) {
    if (*n == 0 || text[*n - 1] != '\n') return;
    (*n)--;
    if (*n && text[*n - 1] == '\r') (*n)--;
    text[*n] = 0;
}

// A prompt from the file path, "-" for stdin; malloc'd. NULL after fail().
static char *read_prompt_file(const PromptForm *how, const char *path, size_t *n) {
    char *text = read_text(path, n);
    if (text && !how->raw && !how->ids) drop_last_newline(text, n);
    return text;
}

// Puts id before ids (n). 0, or -1 after fail().
static int put_before(int32_t id, int32_t **ids, size_t *n) {
    int32_t *longer = realloc(*ids, size_mul(*n + 1, sizeof *longer));
    if (!longer) {
        free(*ids);
        *ids = NULL;
        return fail("out of memory: %zu tokens", *n + 1);
    }
    memmove(longer + 1, longer, (*n)++ * sizeof *longer);
    longer[0] = id;
    *ids = longer;
    return 0;
}

// Text (a NUL follows it) to ids, malloc'd. starts: nothing was read before it, so the tokenizer's
// begin-of-text goes first. 0, or -1 after fail().
static int encode_text(const Model *m, const PromptForm *how, const char *text, size_t bytes,
                       bool starts, int32_t **ids, size_t *n) {
    *ids = NULL;
    *n = 0;
    if (how->ids) return read_ids(m, text, bytes, ids, n);
    const TextPiece piece = {text, bytes, !how->no_special};
    if (bytes && mamba_encode_pieces(m, &piece, 1, ids, n)) return -1;
    const int32_t bos = starts && !no_bos ? mamba_prompt_bos(m) : -1;
    return bos < 0 ? 0 : put_before(bos, ids, n);
}
