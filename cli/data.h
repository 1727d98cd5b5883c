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
        fprintf(stderr, "%s: every second byte is zero: if this is text in UTF-16, convert it\n",
                path);
    if (*bytes >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) {
        fprintf(stderr, "%s: its byte-order mark is left out\n", path);
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
