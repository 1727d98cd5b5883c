// Tokenizer: tests/tokenizer.cases holds small tokenizers, texts with the ids that the `tokenizers`
// library gives them, and lists of ids with its texts (dev/make_tok_golden.py). Where the library
// is installed, tests/test_tokenizer.py compares 100,000 more strings.

static bool decodes_to(const Tokenizer *t, const unsigned char *ids, uint32_t n_ids,
                       const unsigned char *text, size_t n) {
    Utf8Pending pending = {.at_start = true};
    unsigned char out[4096]; // the cases are short: 12 tokens of at most 100 bytes
    size_t n_out = 0, bytes;
    for (uint32_t i = 0; i < n_ids; i++) {
        const int id = (int)u32_at(ids + 4 * (size_t)i);
        tokenizer_token(t, id, &bytes);
        if (n_out + 3 * (bytes + 8) > sizeof out) return false;
        n_out += tokenizer_decode(t, &pending, id, out + n_out);
    }
    n_out += utf8_flush(t, &pending, out + n_out);
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
    n_whole += utf8_flush(NULL, &pending, whole + n_whole);
    bool same = true, valid = true;
    for (size_t piece = 1; piece <= n; piece++) {
        size_t n_part = 0;
        for (size_t at = 0; at < n; at += piece) {
            size_t more =
                utf8_push(&pending, text + at, n - at < piece ? n - at : piece, part + n_part);
            valid &= utf8_check(part + n_part, more) == more;
            n_part += more;
        }
        n_part += utf8_flush(NULL, &pending, part + n_part);
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

// Ids of text in pieces: cut anywhere, the ids are those of the whole; a special token is found in
// a template, across its pieces, and never in what a user wrote, whole or in part.
static void test_pieces(void) {
    Session x = test_session("models/tales.bin", 1);
    static const char text[] = "Once upon<|endoftext|> a  time, he\xC3\xA9llo";
    static const char end[] = "<|endoftext|>";
    const size_t bytes = sizeof text - 1, n_end = sizeof end - 1;
    const TextPiece cases[][3] = {
        {{"a", 1, false}, {end, n_end, true}, {"b", 1, false}},      // a template's
        {{"a<|end", 6, true}, {"oftext|>", 8, true}, {"", 0, true}}, // of two pieces
        {{"a", 1, true}, {end, n_end, false}, {"b", 1, true}},       // a user's
        {{"a<|end", 6, true}, {"oftext|>", 8, false}, {"b", 1, true}},
        {{"a<|end", 6, false}, {"oftext|>", 8, true}, {"b", 1, true}},
        {{"<|endoftext|", 12, false}, {">", 1, true}, {end, n_end, true}},
    };
    static const int specials[] = {1, 1, 0, 0, 0, 1};
    int32_t *whole = NULL, *ids = NULL;
    size_t n_whole = 0, n = 0;
    bool same = mamba_encode(x.model, text, bytes, &whole, &n_whole) == 0;
    const int32_t special = x.model->config.eos[0];
    for (size_t cut = 0; same && cut <= bytes; cut++) {
        const TextPiece piece[] = {{text, cut, true}, {text + cut, bytes - cut, true}};
        same = mamba_encode_pieces(x.model, piece, 2, &ids, &n) == 0 && n == n_whole &&
               !memcmp(ids, whole, n * sizeof *ids);
        memory_free(ids);
    }
    memory_free(whole);
    expect(same, "pieces of a text give the ids of the text");
    same = true;
    for (int i = 0; same && i < COUNT(cases); i++) {
        int found = 0;
        same = mamba_encode_pieces(x.model, cases[i], 3, &ids, &n) == 0;
        for (size_t k = 0; same && k < n; k++) found += ids[k] == special;
        same &= found == specials[i];
        memory_free(ids);
    }
    expect(same, "a user's text has no special token");
    expect(mamba_encode_pieces(x.model, NULL, 0, &ids, &n) == 0 && n == 0, "no pieces, no ids");
    memory_free(ids);
    session_close(&x);
}

// Opens damaged copies of a tokenizer: one word changed. What opens must encode and decode.
// Returns how many were refused with a message.
static int open_damaged(const unsigned char *blob, size_t bytes, uint64_t *random) {
    static const char text[] = "The <s> \xE2\x96\x81 don't 1234 \n\n <0x41>\xF0\x9F\x98\x80 ATCG";
    static const uint32_t values[] = {0, 1, 2, 255, 0x7FFFFFFF, 0x80000001, 0x40000001, UINT32_MAX};
    unsigned char *copy = malloc(bytes), out[8192];
    int refused = 0;
    for (int k = 0; k < 60; k++) {
        size_t n_ids = 0, at = random_u64(random) % (k < 30 && bytes > 64 ? 61 : bytes - 3);
        memcpy(copy, blob, bytes);
        put_u32(copy + at, values[random_u64(random) % COUNT(values)]);
        error_text[0] = 0;
        Tokenizer *t = tokenizer_open(copy, bytes);
        const TextPiece piece = {text, sizeof text - 1, true};
        int32_t *ids = NULL;
        if (!t) refused += error_text[0] != 0;
        else if (tokenizer_encode(t, &piece, 1, &ids, &n_ids) == 0) {
            Utf8Pending pending = {.at_start = true};
            for (size_t i = 0; i < n_ids; i++) {
                size_t n;
                tokenizer_token(t, ids[i], &n);
                if (3 * (n + 4) < sizeof out) tokenizer_decode(t, &pending, ids[i], out);
            }
        }
        memory_free(ids);
        tokenizer_close(t);
    }
    free(copy);
    return refused;
}

static void test_tokenizer(void) {
    size_t size = 0, at = 8;
    unsigned char *file = (unsigned char *)read_text("tests/tokenizer.cases", &size);
    int n_tokenizers = 0, n_cut = 0, n_encoded = 0, n_decoded = 0, n_wrong = 0, n_refused = 0;
    uint64_t random = 5;
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
            n_refused += open_damaged(text, n, &random);
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
        const TextPiece piece = {(const char *)text, n, true};
        bool same = tokenizer_encode(t, &piece, 1, &got, &n_got) == 0 && n_got == n_ids;
        for (size_t i = 0; same && i < n_got; i++) same = (uint32_t)got[i] == u32_at(ids + 4 * i);
        n_encoded++;
        if (!same) {
            n_wrong++;
            printf("     wrong ids for the text at %ld\n", where);
        }
        free(got);
    }
    if (t) tokenizer_close(t);
    report(n_wrong == 0 && n_tokenizers >= 36 && n_encoded > 900 && n_decoded > 200,
           "the library's ids and texts",
           "%d tokenizers: %d texts, %d lists of ids, %d cut files, %d wrong", n_tokenizers,
           n_encoded, n_decoded, n_cut, n_wrong);
    report(n_refused > 15 * n_tokenizers, "damaged tokenizers",
           "%d of %d refused with a message, the others run", n_refused, 60 * n_tokenizers);
    free(file);
    test_streaming();
    test_pieces();
    test_long_words();
}
