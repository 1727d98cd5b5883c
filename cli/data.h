// cli/data.h - texts that are learnt or scored: read, and told from files that are no UTF-8.
//
// Depends on cli/options.h (read_text).

// Whether text in UTF-16 begins with a byte-order mark: what follows has pairs of surrogates only,
// and some character below 128, such as a space or a line end.
static bool is_utf16(const unsigned char *text, size_t bytes) {
    const bool big = bytes >= 2 && text[0] == 0xFE && text[1] == 0xFF;
    if (!big && !(bytes >= 2 && text[0] == 0xFF && text[1] == 0xFE)) return false;
    bool ascii = false, high = false;
    for (size_t i = 2; i + 1 < bytes && i < 1 << 16; i += 2) {
        const unsigned unit = big ? text[i] * 256u + text[i + 1] : text[i + 1] * 256u + text[i];
        const bool low = unit >= 0xDC00 && unit < 0xE000;
        if (low != high) return false;
        high = unit >= 0xD800 && unit < 0xDC00;
        ascii = ascii || (unit && unit < 128);
    }
    return ascii;
}

// Without a mark: of the first bytes, nearly all at even or nearly all at odd places are zero.
static bool has_alternate_zeros(const unsigned char *text, size_t bytes) {
    size_t zeros[2] = {0}, n = bytes < 4096 ? bytes / 2 : 2048;
    for (size_t i = 0; i < 2 * n; i++) zeros[i % 2] += text[i] == 0;
    return n >= 8 && ((zeros[0] > n * 9 / 10 && !zeros[1]) || (zeros[1] > n * 9 / 10 && !zeros[0]));
}

// A whole file as read_text() reads it, without the byte-order mark that some editors put before
// UTF-8; a line on stderr says so. Text in UTF-16 is refused. NULL after fail().
static char *read_utf8(const char *path, size_t *bytes) {
    char *text = read_text(path, bytes);
    if (!text) return NULL;
    if (is_utf16((unsigned char *)text, *bytes)) {
        free(text);
        fail("%.200s: the text is in UTF-16, and models read UTF-8: `iconv -f UTF-16 -t UTF-8 "
             "%.200s` converts it",
             path, path);
        return NULL;
    }
    if (has_alternate_zeros((unsigned char *)text, *bytes))
        note("%s: every second byte is zero: if this is text in UTF-16, convert it\n", path);
    if (*bytes >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) {
        note("%s: its byte-order mark is left out\n", path);
        *bytes -= 3;
        memmove(text, text + 3, *bytes + 1); // with the NUL
    }
    return text;
}

// --- documents

// Tokens of the document at the start of ids (n), with its end-of-text token.
static size_t document_tokens(const Config *c, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (int k = 0; k < 4; k++)
            if (c->eos[k] >= 0 && ids[i] == c->eos[k]) return i + 1;
    return n;
}

// A row of training: the targets data[from .. from + n) and, one before each, what is read. A
// document, or a piece of one.
typedef struct {
    size_t from, document; // document: where its document begins
    int n;
} DataRow;

typedef struct {
    DataRow *row;
    size_t n, room, documents, without; // without: documents in which mask_until does not occur
    bool *counts;                       // of the data: whether a token is a target; NULL: each is
    int32_t bos; // is read before each document, whose first token then is a target too; -1: none
} DataRows;

static void rows_free(DataRows *rows) {
    free(rows->row);
    free(rows->counts);
}

// counts (n): whether a token begins after the first `until` in the text of the document.
static int mark_after(bool *counts, const Tokenizer *t, const int32_t *ids, size_t n,
                      const char *until, bool *found) {
    Text text = {NULL, 0, 0};
    const size_t length = strlen(until);
    int result = 0;
    for (size_t i = 0; i < n && result == 0; i++) {
        size_t bytes = 0;
        const unsigned char *token = tokenizer_token(t, ids[i], &bytes);
        counts[i] = *found; // it begins where the text so far ends
        result = text_add(&text, token, bytes);
        for (size_t at = text.n > bytes + length ? text.n - bytes - length : 0;
             !*found && result == 0 && at + length <= text.n; at++)
            *found = !memcmp(text.bytes + at, until, length);
    }
    free(text.bytes);
    return result;
}

// Adds the rows, of at most L tokens, of the documents of data[from .. end). A row without a target
// that counts is left out. 0, or -1 after fail().
static int add_rows_of(DataRows *rows, const Model *m, const int32_t *data, size_t from, size_t end,
                       int L, const char *until) {
    for (size_t n; from < end; from += n) {
        bool found = false;
        n = document_tokens(&m->config, data + from, end - from);
        if (until && mark_after(rows->counts + from, m->tokenizer, data + from, n, until, &found))
            return -1;
        rows->documents++;
        rows->without += until && !found;
        for (size_t at = rows->bos < 0; at < n; at += (size_t)L) {
            DataRow row = {from + at, from, n - at < (size_t)L ? (int)(n - at) : L};
            bool any = !until;
            for (int i = 0; i < row.n && !any; i++) any = rows->counts[row.from + (size_t)i];
            if (!any) continue;
            if (rows->n == rows->room) {
                const size_t room = rows->room ? 2 * rows->room : 1024;
                DataRow *larger = realloc(rows->row, room * sizeof *larger);
                if (!larger) return fail("out of memory: %zu rows", room);
                rows->row = larger;
                rows->room = room;
            }
            rows->row[rows->n++] = row;
        }
    }
    return 0;
}

// ids and targets (L): the row, then targets that do not count.
static void fill_row(int32_t *ids, int32_t *targets, const int32_t *data, const DataRows *rows,
                     size_t index, int L) {
    const DataRow *row = &rows->row[index];
    for (int i = 0; i < L; i++) {
        const size_t at = row->from + (size_t)i;
        const bool in = i < row->n;
        ids[i] = !in ? 0 : at == row->document ? rows->bos : data[at - 1];
        targets[i] = in && (!rows->counts || rows->counts[at]) ? data[at] : -1;
    }
}
