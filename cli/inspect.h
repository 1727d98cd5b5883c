// cli/inspect.h - commands that look into a model: info, tokenize, logits.
//
// Depends on cli/options.h, cli/prompt.h, the API, the tokenizer's functions and files/bytes.h
// (file_map).

// --- info

static const char INFO_USAGE[] = "mamba info model.bin [--verify]\n"
                                 "\n"
                                 "Shows what is in a model file.\n";

static void print_info(const Model *m, const char *path) {
    const Config *c = &m->config;
    printf("file         %s, %zu bytes, format %d\n", path, m->file_bytes, FILE_VERSION);
    printf("model        %s, %zu parameters in %s\n",
           c->arch == ARCH_MAMBA ? "mamba" : "falcon_mamba", m->n_params, type_name(c->type));
    printf("sizes        d_model %d, n_layer %d, vocab_size %d, d_inner %d, d_state %d, d_conv %d, "
           "dt_rank %d\n",
           c->D, c->n_layer, c->V, c->E, c->N, c->K, c->R);
    printf("options      %s head, %sprojection biases, %sconv bias, %snorm eps %g",
           c->flags & FLAG_TIED ? "tied" : "untied", c->flags & FLAG_PROJ_BIAS ? "" : "no ",
           c->flags & FLAG_CONV_BIAS ? "" : "no ", c->flags & FLAG_LAYER_NORM ? "LayerNorm, " : "",
           c->norm_eps);
    if (c->flags & FLAG_MIXER_NORM) printf(", norms on delta, B and C with eps %g", c->mixer_eps);
    printf("\n");
    if (m->tokenizer)
        printf("tokenizer    %s, %d ids", tokenizer_name(m->tokenizer),
               tokenizer_size(m->tokenizer));
    else printf("tokenizer    none, ids only");
    if (mamba_prompt_bos(m) >= 0) printf(", %d before a prompt", mamba_prompt_bos(m));
    printf("; end-of-text");
    for (int i = 0; i < 4; i++)
        if (c->eos[i] >= 0) printf(" %d", c->eos[i]);
    printf("%s\n", c->eos[0] < 0 ? " none" : "");
    printf("state        %zu bytes a sequence, whatever its length\n", mamba_state_bytes(m));
}

static int command_info(int argc, char **argv) {
    bool verify = false;
    const Option options[] = {
        OPTION_SWITCH("--verify", &verify, "check every byte against its checksum"),
    };
    const char *path;
    if (wants_help(argc, argv, options, COUNT(options)))
        return print_help(INFO_USAGE, options, COUNT(options));
    int n = parse_options(argc, argv, options, COUNT(options), &path, 1);
    if (n < 0) return -1;
    if (n != 1) return fail("info needs a model.bin");
    Model *m = load_model(path);
    if (!m) return -1;
    print_info(m, path);
    int result = verify && mamba_verify(m) ? fail_in(path) : 0;
    if (verify && result == 0)
        printf("checksums    header, tokenizer and tensors match; every weight is finite\n");
    mamba_free(m);
    return result;
}

// --- tokenize

// clang-format off
static const char TOKENIZE_USAGE[] =
    "mamba tokenize model.bin [FILE|-] [--decode]\n"
    "\n"
    "Text to token ids, one a line; with --decode token ids to text. Reads stdin without FILE.\n"
    "Instead of a model, a tokenizer file made by `export.py tokenizer.json tokenizer.bin` will\n"
    "do.\n";
// clang-format on

// Prints the text of one token after the bytes that pending holds. 0, or -1 after fail().
static int print_token(const Tokenizer *t, int id, Utf8Pending *pending) {
    size_t n;
    tokenizer_token(t, id, &n);
    unsigned char *out = malloc(3 * (n + PENDING)); // each byte may become a U+FFFD
    if (!out) return fail("out of memory: a token of %zu bytes", n);
    fwrite(out, 1, tokenizer_decode(t, pending, id, out), stdout);
    free(out);
    return 0;
}

// text: a NUL follows its bytes. 0, or -1 after fail().
static int print_decoded(const Tokenizer *t, const char *text, size_t bytes) {
    Utf8Pending pending = {.at_start = true};
    const char *at = text;
    int32_t id = 0;
    int found;
    while ((found = next_id(text, &at, text + bytes, &id)) > 0) {
        if (!tokenizer_has(t, id))
            return fail("token id %d before byte %zu is not in the tokenizer of %d ids", (int)id,
                        (size_t)(at - text), tokenizer_size(t));
        if (print_token(t, id, &pending)) return -1;
    }
    if (found < 0) return -1;
    unsigned char out[3 * PENDING];
    fwrite(out, 1, utf8_flush(t, &pending, out), stdout);
    return 0;
}

static int print_ids(const Tokenizer *t, const char *text, size_t bytes) {
    int32_t *ids = NULL;
    size_t n = 0;
    if (tokenizer_encode(t, &(TextPiece){text, bytes, true}, 1, &ids, &n)) return -1;
    for (size_t i = 0; i < n; i++) printf("%d\n", (int)ids[i]);
    free(ids);
    return 0;
}

typedef struct {
    bool decode, chats;
    const char *system;
} TokenizeOptions;

// The ids of a conversation: the texts of the user and the model in turn, a NUL between them, up to
// where the model writes on. 0, or -1 after fail().
static int print_chat_ids(const Tokenizer *t, const char *system, const char *text, size_t bytes) {
    const Model reader = {.tokenizer = (Tokenizer *)(uintptr_t)t}, *m = &reader;
    Chat chat;
    size_t n = 1, n_ids = 0;
    int32_t *ids = NULL;
    for (size_t i = 0; i < bytes; i++) n += text[i] == 0;
    TextPiece *texts = calloc(n, sizeof *texts);
    if (!texts) return fail("out of memory: %zu texts", n);
    for (size_t i = 0; i < n; i++) {
        texts[i] = (TextPiece){text, strlen(text), false};
        text += texts[i].bytes + 1;
    }
    int result = mamba_chat(m, &chat);
    if (result == 0) result = mamba_chat_encode(m, &chat, true, system, texts, n, &ids, &n_ids);
    for (size_t i = 0; i < n_ids && result == 0; i++) printf("%d\n", (int)ids[i]);
    free(ids);
    free(texts);
    return result;
}

// path: of the text, "-" for stdin. 0, or -1 after fail().
static int tokenize_file(const Tokenizer *t, const TokenizeOptions *o, const char *path) {
    size_t bytes = 0;
    char *text = read_text(path, &bytes);
    if (!text) return -1;
    int result = o->decode  ? print_decoded(t, text, bytes)
                 : o->chats ? print_chat_ids(t, o->system, text, bytes)
                            : print_ids(t, text, bytes);
    free(text);
    return result ? fail_in(path) : 0;
}

static int command_tokenize(int argc, char **argv) {
    bool mapped = false;
    TokenizeOptions o = {.system = NULL};
    const Option options[] = {
        OPTION_SWITCH("--decode", &o.decode,
                      "token ids (between spaces, commas or line ends) to text"),
        OPTION_SWITCH(
            "--chat", &o.chats,
            "FILE holds messages of the user and replies in turn, a NUL byte between them: "
            "the ids up to the next reply"),
        OPTION_TEXT("--system", "TEXT", &o.system,
                    "with --chat: what the conversation begins with"),
    };
    const char *rest[2] = {NULL, "-"};
    if (wants_help(argc, argv, options, COUNT(options)))
        return print_help(TOKENIZE_USAGE, options, COUNT(options));
    int n = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n < 0) return -1;
    if (n < 1) return fail("tokenize needs a model.bin or a tokenizer file");
    if (o.system && !o.chats) return fail("--system goes with --chat");
    if (o.decode && o.chats) return fail("--decode does not go with --chat");
    if (check_model_first("tokenize ", rest[0], n == 2 ? rest[1] : NULL, false) ||
        check_text_path("tokenize", rest[0], rest[1]))
        return -1;
    size_t bytes = 0;
    unsigned char *file = check_is_file(rest[0]) ? NULL : file_map(rest[0], &bytes, &mapped);
    if (!file) return -1;
    int result = -1;
    if (bytes >= 4 && !memcmp(file, "mtok", 4)) { // a tokenizer file
        Tokenizer *t = tokenizer_open(file, bytes);
        if (t) result = tokenize_file(t, &o, rest[1]);
        else fail_in(rest[0]);
        if (t) tokenizer_close(t);
    } else {
        Model *m = load_model(rest[0]);
        if (m && !m->tokenizer) fail("%s has no tokenizer", rest[0]);
        else if (m) result = tokenize_file(m->tokenizer, &o, rest[1]);
        mamba_free(m);
    }
    file_unmap(file, bytes, mapped);
    return result;
}

// --- logits

// clang-format off
static const char LOGITS_USAGE[] =
    "mamba logits model.bin \"prompt\" [--all] [-o FILE]\n"
    "mamba logits model.bin \"prompt\" --top N [--all]\n"
    "mamba logits model.bin --tokens 1,2,3 [--all] [-o FILE]\n"
    "mamba logits model.bin \"prompt\" --hidden [--all | --pool mean|last] [-o FILE]\n"
    "mamba logits model.bin --embeddings FILE [--hidden] [--all] [-o FILE]\n"
    "\n"
    "The logits after the last token, or after each: V numbers a line, or with -o raw\n"
    "little-endian float32, (L,V). --top N: the N likeliest tokens instead, a line each: id,\n"
    "logit, probability and text. --hidden: the states of the last norm instead, D numbers a\n"
    "line, for searches and classifiers.\n";
// clang-format on

// Prints the `top` likeliest tokens after a text: id, logit, probability and text, between tabs.
static void print_top(const Model *m, const float *logits, int top) {
    float before = INFINITY; // the logit of the last one that was printed, and its id
    int id = -1;
    for (int rank = 0; rank < top && rank < m->config.V; rank++) {
        int best = -1;
        for (int v = 0; v < m->config.V; v++) // of equals, the lower id first
            if ((logits[v] < before || (logits[v] == before && v > id)) &&
                (best < 0 || logits[v] > logits[best]))
                best = v;
        if (best < 0) return; // not numbers
        before = logits[best];
        id = best;
        size_t n = 0;
        const bool known = m->tokenizer && tokenizer_has(m->tokenizer, id);
        const unsigned char *text = known ? tokenizer_token(m->tokenizer, id, &n) : NULL;
        printf("%d\t%.4f\t%.6f\t", id, (double)logits[id], exp(-mamba_nll(m, logits, id)));
        if (utf8_check(text, n) == n) print_visible(text, n, true);
        else // a part of a character
            for (size_t i = 0; i < n; i++) printf("\\x%02x", text[i]);
        printf("\n");
    }
}

typedef struct {
    FILE *raw; // NULL: text
    const Model *m;
    int top;         // tokens a row that are shown instead of its numbers; 0: numbers
    int n;           // numbers of a row
    double *sum;     // of rows, for their mean; NULL: rows are written
    size_t rows, of; // seen, and how many there will be
    bool last_only;
} RowWriter;

static void write_row(void *context, const float *row) {
    RowWriter *w = context;
    w->rows++;
    for (int i = 0; w->sum && i < w->n; i++) w->sum[i] += (double)row[i];
    if (w->sum || (w->last_only && w->rows < w->of)) return;
    if (w->top) {
        if (w->rows > 1) printf("\n"); // of --all
        print_top(w->m, row, w->top);
        return;
    }
    for (int i = 0; i < w->n; i++) {
        float value = row[i];
        fix_endian(&value, sizeof value, sizeof value);
        if (w->raw) fwrite(&value, sizeof value, 1, w->raw);
        else printf("%.9g%c", row[i], i + 1 < w->n ? ' ' : '\n');
    }
}

// The ids (n) of a prompt, "-" for stdin. 0, or -1 after fail().
static int logits_ids(const Model *m, const PromptForm *how, const char *prompt, int32_t **ids,
                      size_t *n) {
    size_t bytes = strlen(prompt);
    char *read = NULL;
    if (!strcmp(prompt, "-")) {
        read = read_prompt_file(how, "-", &bytes);
        if (!read) return -1;
    }
    const char *text = read ? read : prompt;
    int result = encode_text(m, how, text, bytes, true, ids, n) ? fail_in("prompt") : 0;
    free(read);
    return result;
}

typedef struct {
    const int32_t *ids;
    float *rows; // (n,D), where there are no ids
    size_t n;
    bool all, hidden, mean;
    long top;         // 0: all logits
    const char *path; // of the output; NULL: stdout
} LogitsRun;

static int write_rows(Session *x, const LogitsRun *run, RowWriter *w) {
    const Model *m = x->model;
    if (run->hidden)
        return mamba_hidden(m, x->acts, x->state, run->ids, run->rows, run->n, write_row, w);
    LogitsVisitor *visit = run->all ? write_row : NULL;
    int result = run->rows ? mamba_prefill_rows(m, x->acts, x->state, run->rows, run->n, visit, w)
                           : mamba_prefill(m, x->acts, x->state, run->ids, run->n, visit, w);
    if (result == 0 && !run->all) write_row(w, x->state->logits);
    return result;
}

// Reads ids or rows and writes what was asked for. 0, or -1 after fail().
static int run_logits(Session *x, const LogitsRun *run) {
    NewFile file = {.f = NULL};
    if (run->path && new_file_open(&file, run->path, true)) return -1;
    RowWriter w = {.raw = file.f,
                   .m = x->model,
                   .top = (int)run->top,
                   .n = run->hidden ? x->model->config.D : x->model->config.V,
                   .of = run->n,
                   .last_only = run->hidden && !run->all && !run->mean};
    float *mean = run->mean ? malloc((size_t)w.n * sizeof *mean) : NULL;
    double *sum = run->mean ? calloc((size_t)w.n, sizeof *sum) : NULL;
    int result = run->mean && !(mean && sum) ? fail("out of memory: %d numbers", w.n) : 0;
    w.sum = sum;
    if (result == 0) result = write_rows(x, run, &w);
    for (int i = 0; i < w.n && result == 0 && run->mean; i++)
        mean[i] = (float)(sum[i] / (double)run->n);
    w.sum = NULL;
    if (result == 0 && run->mean) write_row(&w, mean);
    free(mean);
    free(sum);
    if (result == 0 && run->path) return new_file_commit(&file);
    new_file_discard(&file);
    return result;
}

// The rows (n,D) of a file of little-endian float32, malloc'd. NULL after fail().
static float *read_rows_file(const char *path, int D, size_t *n) {
    const size_t row = (size_t)D * sizeof(float);
    size_t bytes = 0;
    char *text = read_text(path, &bytes);
    if (!text) return NULL;
    *n = bytes / row;
    if (bytes == 0 || bytes % row) {
        free(text);
        fail("%s: %zu bytes are not whole rows of %d float32 (%zu bytes each)", path, bytes, D,
             row);
        return NULL;
    }
    fix_endian(text, bytes, sizeof(float));
    return (float *)(void *)text; // malloc'd, so aligned
}

static int command_logits(int argc, char **argv) {
    LogitsRun run = {.path = NULL};
    PromptForm how = {0};
    long threads = mamba_default_threads();
    const char *tokens = NULL, *pool = NULL, *embeddings = NULL, *rest[2] = {NULL, NULL};
    const Option options[] = {
        OPTION_TEXT("--tokens", "LIST", &tokens, "token ids between commas, instead of a prompt"),
        OPTION_SWITCH("--ids", &how.ids, "the prompt is token ids, for example from stdin"),
        RAW_OPTION(&how.raw),
        NO_SPECIAL_OPTION(&how.no_special),
        OPTION_SWITCH("--all", &run.all, "after every token, not only the last"),
        OPTION_INT("--top", "N", &run.top, 0, 1 << 26,
                   "show the N likeliest tokens; 0: all logits"),
        OPTION_SWITCH("--hidden", &run.hidden,
                      "the states of the last norm instead of logits; on the processor"),
        OPTION_TEXT("--pool", "mean|last", &pool, "with --hidden: one row, their mean or the last"),
        OPTION_TEXT(
            "--embeddings", "FILE", &embeddings,
            "little-endian float32 rows (L,D) in the place of a prompt's embeddings; on the "
            "processor"),
        OPTION_TEXT("-o", "FILE", &run.path, "write raw float32 instead of text"),
        NO_BOS_OPTION,
        BACKEND_OPTIONS,
        THREADS_OPTION(&threads),
    };
    if (wants_help(argc, argv, options, COUNT(options)))
        return print_help(LOGITS_USAGE, options, COUNT(options));
    int n_rest = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n_rest < 0) return -1;
    if (n_rest != (tokens || embeddings ? 1 : 2) || (tokens && embeddings))
        return fail("logits needs a model.bin and either a prompt, --tokens or --embeddings");
    if (n_rest == 2 && check_model_first("logits ", rest[0], rest[1], true)) return -1;
    if (pool && strcmp(pool, "mean") && strcmp(pool, "last"))
        return fail("--pool needs mean or last, not '%s'", pool);
    if (pool && (!run.hidden || run.all))
        return fail("--pool goes with --hidden, and not with --all");
    if (run.top && (run.hidden || run.path))
        return fail("--top is a text about logits: it does not go with --hidden or -o");
    const bool from_prompt = !tokens && !embeddings;
    const FileUse use[] = {
        {INPUT, "the model", rest[0], NULL},
        {INPUT, "the standard input", from_prompt && !strcmp(rest[1], "-") ? "-" : NULL, NULL},
        {INPUT, "the rows of --embeddings", embeddings, NULL},
        {OUTPUT_PLAIN, "-o", run.path, NULL},
    };
    if (check_files(use, COUNT(use))) return -1;
    Session x;
    if (run.hidden || embeddings) backend.cpu = true;
    if (session_open(&x, rest[0], threads)) return -1;
    int32_t *ids = NULL, start = start_token(&x.model->config);
    run.mean = pool && !strcmp(pool, "mean");
    int result = 0;
    if (embeddings) {
        run.rows = read_rows_file(embeddings, x.model->config.D, &run.n);
        result = run.rows ? 0 : -1;
    } else
        result = tokens ? parse_ids(x.model, tokens, &ids, &run.n)
                        : logits_ids(x.model, &how, rest[1], &ids, &run.n);
    run.ids = ids;
    if (result == 0 && run.n == 0) {
        run.ids = &start;
        run.n = 1;
        if (start < 0) result = fail("an empty prompt, and no end-of-text token to start from");
    }
    if (result == 0) result = run_logits(&x, &run);
    if (result && embeddings) fail_in(embeddings);
    free(run.rows);
    free(ids);
    session_close(&x);
    return result;
}
