// Tokenizer: tests/tokenizer.cases holds small tokenizers, texts with the ids that the `tokenizers`
// library gives them, and lists of ids with its texts (dev/make_tok_golden.py). Where the library
// is installed, tests/test_tokenizer.py compares 100,000 more strings.

static bool decodes_to(const Tokenizer *t, const unsigned char *ids, uint32_t n_ids,
                       const unsigned char *text, size_t n) {
    Utf8Pending pending = {.n = 0};
    unsigned char out[4096]; // the cases are short: 12 tokens of at most 100 bytes
    size_t n_out = 0, bytes;
    for (uint32_t i = 0; i < n_ids; i++) {
        const unsigned char *token = tokenizer_token(t, (int)u32_at(ids + 4 * (size_t)i), &bytes);
        if (n_out + 3 * (bytes + 8) > sizeof out) return false;
        n_out += utf8_push(&pending, token, bytes, out + n_out);
    }
    n_out += utf8_flush(&pending, out + n_out);
    return n_out == n && memcmp(out, text, n) == 0;
}

// Bytes arrive in pieces of any size. Every output is whole characters, and all outputs together
// are those of one single piece.
static void test_streaming(void) {
    static const unsigned char text[] =
        "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x90\x8D!"
        "\xE2\x82\xF0\x9F\x90\xFFz\xED\xA0\x80\xC0\xAF\xF4\x90\x80\x80\xE2";
    unsigned char whole[200], part[200];
    Utf8Pending pending = {.n = 0};
    size_t n = sizeof text - 1, n_whole = utf8_push(&pending, text, n, whole);
    n_whole += utf8_flush(&pending, whole + n_whole);
    bool same = true, valid = true;
    for (size_t piece = 1; piece <= n; piece++) {
        size_t n_part = 0;
        for (size_t at = 0; at < n; at += piece) {
            size_t more =
                utf8_push(&pending, text + at, n - at < piece ? n - at : piece, part + n_part);
            valid &= utf8_check(part + n_part, more) == more;
            n_part += more;
        }
        n_part += utf8_flush(&pending, part + n_part);
        same &= n_part == n_whole && !memcmp(part, whole, n_whole);
    }
    expect(same, "text in pieces of any size is the same text");
    expect(valid, "no piece cuts a character");
}

// One word of a megabyte takes no longer than other text. A quadratic algorithm would take minutes.
static void test_long_words(void) {
    const char *const unit[] = {"a",  " ",   "\xF0\x9F\x98\x80", "\xCC\x81", "e\xCC\x81", "7", "!",
                                "\n", "the", "etaoinshrdlu"};
    Session x = test_session("models/tales.bin", 1);
    char *text = malloc(1 << 20);
    for (int i = 0; i < COUNT(unit); i++) {
        size_t length = strlen(unit[i]), n = 0;
        int32_t *ids = NULL;
        for (size_t at = 0; at < 1 << 20; at++) text[at] = unit[i][at % length];
        double start = seconds();
        int result = mamba_encode(x.model, text, (1 << 20) / length * length, &ids, &n);
        char name[64];
        snprintf(name, sizeof name, "1 MB of one unit, kind %d", i);
        report(result == 0 && n > 1000 && seconds() - start < 60, name, "%zu ids, %.2f s", n,
               seconds() - start);
        free(ids);
    }
    free(text);
    session_close(&x);
}

static void test_tokenizer(void) {
    size_t size = 0, at = 8;
    unsigned char *file = (unsigned char *)read_text("tests/tokenizer.cases", &size);
    int n_tokenizers = 0, n_cut = 0, n_encoded = 0, n_decoded = 0, n_wrong = 0;
    Tokenizer *t = NULL;
    if (!expect(file && size > 8 && memcmp(file, "mtcs\1\0\0\0", 8) == 0, "tests/tokenizer.cases"))
        return free(file);
    while (at + 8 <= size) {
        long where = (long)at;
        uint32_t type = u32_at(file + at), n = u32_at(file + at + 4);
        const unsigned char *text = file + at + 8, *ids = text + n + 4;
        at += 8 + n;
        if (type == 1) {
            if (t) tokenizer_close(t);
            t = tokenizer_open(text, n);
            if (!t) {
                expect(false, error_text);
                break;
            }
            n_tokenizers++;
            for (size_t cut = 0; cut < n;
                 cut += n / 61 + 1, n_cut++) // whatever is cut off is noticed
                if (tokenizer_open(text, cut)) {
                    n_wrong++;
                    printf("     the tokenizer at %ld opens when cut to %zu bytes\n", where, cut);
                }
            continue;
        }
        uint32_t n_ids = u32_at(file + at);
        at += 4 + 4 * (size_t)n_ids;
        if (type == 3) {
            n_decoded++;
            if (!decodes_to(t, ids, n_ids, text, n)) {
                n_wrong++;
                printf("     wrong text for the ids at %ld\n", where);
            }
            continue;
        }
        int32_t *got = NULL;
        size_t n_got = 0;
        bool same = tokenizer_encode(t, (const char *)text, n, &got, &n_got) == 0 && n_got == n_ids;
        for (size_t i = 0; same && i < n_got; i++) same = (uint32_t)got[i] == u32_at(ids + 4 * i);
        n_encoded++;
        if (!same) {
            n_wrong++;
            printf("     wrong ids for the text at %ld\n", where);
        }
        free(got);
    }
    if (t) tokenizer_close(t);
    report(n_wrong == 0 && n_tokenizers >= 9 && n_encoded > 200 && n_decoded > 50,
           "the library's ids and texts",
           "%d tokenizers: %d texts, %d lists of ids, %d cut files, %d wrong", n_tokenizers,
           n_encoded, n_decoded, n_cut, n_wrong);
    free(file);
    test_streaming();
    test_long_words();
}
