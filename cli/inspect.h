// --- info

static const char INFO_USAGE[] =
    "mamba info model.bin [--verify]\n\nShows what is in a model file.\n";

static int verify(const Model *m, const char *path) { return mamba_verify(m) ? fail_in(path) : 0; }

static int command_info(int argc, char **argv) {
    bool check = false;
    const Option options[] = {
        {"--verify", "", "check every byte against its checksum", OPT_SWITCH, &check, 0, 0}};
    const char *path;
    if (wants_help(argc, argv)) return print_help(INFO_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), &path, 1);
    if (n != 1) return n < 0 ? -1 : fail("info needs a model.bin");
    Model *m = mamba_load(path);
    if (!m) return -1;
    const Config *c = &m->config;
    printf("file         %s, %zu bytes, format %d\n", path, m->file_bytes, FILE_VERSION);
    printf("model        %s, %zu parameters in %s\n",
           c->arch == ARCH_MAMBA ? "mamba" : "falcon_mamba", m->n_params, type_name(c->type));
    printf("sizes        d_model %d, n_layer %d, vocab_size %d, d_inner %d, d_state %d, d_conv %d, "
           "dt_rank %d\n",
           c->D, c->n_layer, c->V, c->E, c->N, c->K, c->R);
    printf("options      %s head, %sprojection biases, %sconv bias, norm eps %g",
           c->flags & FLAG_TIED ? "tied" : "untied", c->flags & FLAG_PROJ_BIAS ? "" : "no ",
           c->flags & FLAG_CONV_BIAS ? "" : "no ", c->norm_eps);
    if (c->flags & FLAG_MIXER_NORM) printf(", norms on delta, B and C with eps %g", c->mixer_eps);
    printf("\ntokenizer    %s, %d ids",
           tokenizer_is_bytes(m->tokenizer) ? "bytes" : "byte-level BPE",
           tokenizer_size(m->tokenizer));
    printf("; end-of-text");
    for (int i = 0; i < 4; i++)
        if (c->eos[i] >= 0) printf(" %d", c->eos[i]);
    printf("%s\n", c->eos[0] < 0 ? " none" : "");
    printf("state        %zu bytes a sequence, whatever its length\n", mamba_state_bytes(m));
    int result = check ? verify(m, path) : 0;
    if (check && result == 0)
        printf("checksums    header, tokenizer and tensors match; every weight is finite\n");
    mamba_free(m);
    return result;
}

// --- tokenize

static const char TOKENIZE_USAGE[] =
    "mamba tokenize model.bin [FILE|-] [--decode]\n\n"
    "Text to token ids, one a line; with --decode token ids to text. Reads stdin without FILE. "
    "Instead of a model, a\n"
    "tokenizer file made by `export.py tokenizer.json tokenizer.bin` will do.\n";

static int print_decoded(const Tokenizer *t, const char *text, size_t bytes) {
    Utf8Pending pending = {.n = 0};
    const char *p = text, *end = text + bytes;
    for (;;) {
        while (p < end && strchr(" \t\r\n,", *p) && *p) p++;
        if (p == end) break;
        char *stop;
        errno = 0;
        long id = strtol(p, &stop, 10);
        if (stop == p || errno || (stop < end && (!*stop || !strchr(" \t\r\n,", *stop))))
            return fail("byte %zu of the input is not part of a token id", (size_t)(p - text));
        if (id < 0 || id > INT_MAX || !tokenizer_has(t, (int)id))
            return fail("token id %ld at byte %zu is not in the tokenizer of %d ids", id,
                        (size_t)(p - text), tokenizer_size(t));
        size_t n;
        const unsigned char *token = tokenizer_token(t, (int)id, &n);
        unsigned char *out = malloc(3 * (n + 4));
        if (!out) return fail("out of memory: a token of %zu bytes", n);
        if (tokenizer_is_bytes(t)) fwrite(token, 1, n, stdout);
        else fwrite(out, 1, utf8_push(&pending, token, n, out), stdout);
        free(out);
        p = stop;
    }
    unsigned char out[16];
    fwrite(out, 1, utf8_flush(&pending, out), stdout);
    return 0;
}

static int print_ids(const Tokenizer *t, const char *text, size_t bytes) {
    int32_t *ids = NULL;
    size_t n = 0;
    if (tokenizer_encode(t, text, bytes, &ids, &n)) return -1;
    for (size_t i = 0; i < n; i++) printf("%d\n", (int)ids[i]);
    free(ids);
    return 0;
}

static int command_tokenize(int argc, char **argv) {
    bool decode = false, mapped = false;
    const Option options[] = {{"--decode", "",
                               "token ids (between spaces, commas or line ends) to text",
                               OPT_SWITCH, &decode, 0, 0}};
    const char *rest[2] = {NULL, "-"};
    if (wants_help(argc, argv)) return print_help(TOKENIZE_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n < 1) return n < 0 ? -1 : fail("tokenize needs a model.bin or a tokenizer file");
    Model *m = NULL;
    Tokenizer *alone = NULL;
    size_t file_bytes = 0, bytes = 0;
    unsigned char *file = file_map(rest[0], &file_bytes, &mapped);
    int result = file ? 0 : -1;
    if (file && file_bytes >= 4 && !memcmp(file, "mtok", 4))
        result = (alone = tokenizer_open(file, file_bytes)) ? 0 : fail_in(rest[0]);
    else if (file) result = (m = mamba_load(rest[0])) ? 0 : -1;
    char *text = result ? NULL : read_text(rest[1], &bytes);
    const Tokenizer *t = m ? m->tokenizer : alone;
    if (!text) result = -1;
    else if ((result = decode ? print_decoded(t, text, bytes) : print_ids(t, text, bytes)))
        fail_in(rest[1]);
    free(text);
    if (alone) tokenizer_close(alone);
    if (file) file_unmap(file, file_bytes, mapped);
    mamba_free(m);
    return result;
}

// --- logits

static const char LOGITS_USAGE[] = "mamba logits model.bin \"prompt\" [--all] [-o FILE]\n"
                                   "mamba logits model.bin --tokens 1,2,3 [--all] [-o FILE]\n\n"
                                   "The logits after the last token, or after each: V numbers a "
                                   "line, or with -o raw little-endian float32, (L,V).\n";

typedef struct {
    FILE *raw; // NULL: text
    int V;
} LogitsWriter;

static void write_logits(void *context, const float *logits) {
    const LogitsWriter *w = context;
    for (int v = 0; v < w->V; v++) {
        float value = logits[v];
        fix_endian(&value, sizeof value, sizeof value);
        if (w->raw) fwrite(&value, sizeof value, 1, w->raw);
        else printf("%.9g%c", logits[v], v + 1 < w->V ? ' ' : '\n');
    }
}

// "1,2,3" to ids. 0, or -1 after fail().
static int parse_ids(const char *text, int32_t **ids, size_t *n) {
    *n = 0;
    *ids = malloc((strlen(text) / 2 + 1) * sizeof **ids);
    if (!*ids) return fail("out of memory: --tokens");
    for (const char *p = text;; p++) {
        char *end;
        errno = 0;
        long id = strtol(p, &end, 10);
        if (end == p || errno || id < 0 || id > INT_MAX || (*end && *end != ','))
            return fail("--tokens needs ids between commas, such as 1,2,3, not '%s'", text);
        (*ids)[(*n)++] = (int32_t)id;
        if (!*end) return 0;
        p = end;
    }
}

static int command_logits(int argc, char **argv) {
    bool all = false;
    long threads = default_threads();
    const char *tokens = NULL, *path = NULL, *rest[2];
    const Option options[] = {
        {"--tokens", "LIST", "token ids between commas, instead of a prompt", OPT_TEXT, &tokens, 0,
         0},
        {"--all", "", "after every token, not only the last", OPT_SWITCH, &all, 0, 0},
        {"-o", "FILE", "write raw float32 instead of text", OPT_TEXT, &path, 0, 0},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &threads, 1, 1024},
    };
    if (wants_help(argc, argv)) return print_help(LOGITS_USAGE, options, COUNT(options)), 0;
    int n_rest = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n_rest < 0) return -1;
    if (n_rest != (tokens ? 1 : 2))
        return fail("logits needs a model.bin and either a prompt or --tokens");
    const FileUse use[] = {
        {INPUT, "the model", rest[0], NULL},
        {INPUT, "the standard input", !tokens && !strcmp(rest[1], "-") ? "-" : NULL, NULL},
        {OUTPUT_IN_PLACE, "-o", path, NULL},
    };
    if (check_files(use, COUNT(use))) return -1;
    Session x;
    if (session_open(&x, rest[0], threads)) return -1;
    int32_t *ids = NULL, start = start_token(&x.model->config);
    size_t n = 0, bytes = tokens ? 0 : strlen(rest[1]);
    char *text = !tokens && !strcmp(rest[1], "-") ? read_text("-", &bytes) : NULL;
    int result = tokens ? parse_ids(tokens, &ids, &n) : 0;
    if (!tokens && !strcmp(rest[1], "-") && !text) result = -1;
    if (!tokens && result == 0 && mamba_encode(x.model, text ? text : rest[1], bytes, &ids, &n))
        result = fail_in("prompt");
    if (result == 0 && n == 0 && start < 0)
        result = fail("an empty prompt, and no end-of-text token to start from");
    LogitsWriter writer = {.V = x.model->config.V};
    NewFile file = {.f = NULL};
    if (result == 0 && path) result = new_file_open(&file, path, true);
    writer.raw = file.f;
    if (result == 0)
        result = mamba_prefill(x.model, x.acts, x.state, n ? ids : &start, n ? n : 1,
                               all ? write_logits : NULL, &writer);
    if (result == 0 && !all) write_logits(&writer, x.state->logits);
    if (result == 0 && path) result = new_file_commit(&file);
    else new_file_discard(&file);
    free(text);
    free(ids);
    session_close(&x);
    return result;
}
