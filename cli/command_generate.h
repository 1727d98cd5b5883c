// cli/command_generate.h - the command without a name: its options, and which of generate_once,
// generate_several, interactive and show_selection does the work.
//
// Depends on cli/selection.h, cli/generate.h, cli/several.h and cli/session.h.

// clang-format off
static const char GENERATE_USAGE[] =
    "mamba model.bin \"prompt\" [options]   go on with a text; prompt - reads it from stdin,\n"
    "                                     \"\" starts a new text\n"
    "mamba model.bin [options]            interactive session, the state carries on from line\n"
    "                                     to line; --chat: a conversation\n"
    "mamba help                           the other commands\n";
// clang-format on

enum { HELPED = -2 };

// Parses the options of generate. Returns how many arguments are left for rest (room for 2), -1
// after fail(), HELPED if the help was asked for.
static int generate_options(GenerateOptions *o, int argc, char **argv, const char **rest) {
    // clang-format off
    const Option options[] = {
        OPTION_SWITCH("--chat", &o->chats,
                      "the prompt is a message: write the reply, by the model's chat template"),
        OPTION_TEXT("--system", "TEXT", &o->system,
                    "with --chat: what the conversation begins with"),
        OPTION_TEXT("-f", "FILE", &o->file,
                    "the prompt is in FILE; the newline at its end is left out"),
        RAW_OPTION(&o->form.raw),
        OPTION_SWITCH("-e", &o->form.escapes,
                      "\\n, \\t, \\r, \\\\ and \\xHH in the prompt, --batch and --stop stand for "
                      "newline, tab, ..."),
        OPTION_TEXT("--tokens", "LIST", &o->tokens,
                    "token ids between commas, instead of a prompt"),
        IDS_OPTION(&o->form.ids),
        NO_SPECIAL_OPTION(&o->form.no_special),
        SAMPLING_OPTIONS(o),
        OPTION_INT("-s", "SEED", &o->seed, 0, 9e15,
                   "random seed; by default the clock, or the loaded state's generator"),
        OPTION_LIST("--stop", "STRING", &o->stop,
                    "end before this text would be written; up to 16 times"),
        OPTION_SWITCH("--ignore-eos", &o->ignore_eos, "write on after end-of-text"),
        OPTION_SWITCH("--no-echo", &o->no_echo, "do not repeat the prompt on stdout"),
        OPTION_SWITCH("--show-selection", &o->show_selection,
                      "write nothing: show the prompt, each token by the mean of its "
                      "step size delta"),
        OPTION_INT("--layer", "N", &o->layer, -1, 65535,
                   "the layer whose delta is shown, from 0; -1: the mean of all"),
        OPTION_INT("--samples", "S", &o->samples, 1, 1e9,
                   "write S texts from the prompt (or each of --batch), 32 at once, on "
                   "a GPU 256"),
        OPTION_TEXT("--batch", "FILE", &o->batch,
                    "write a text from each line of FILE, - for stdin, 32 at "
                    "once, on a GPU 256"),
        OPTION_SWITCH("--quiet", &o->quiet,
                      "or -q: write errors alone to stderr, no timing, no progress"),
        OPTION_SWITCH("--null", &o->null,
                      "no headings between several texts: a NUL byte after each"),
        NO_BOS_OPTION,
        BACKEND_OPTIONS,
        THREADS_OPTION(&o->threads),
        OPTION_TEXT("--save-state", "FILE", &o->save,
                    "save the state at the end, also after Ctrl-C"),
        OPTION_TEXT("--load-state", "FILE", &o->load, "start from a saved state"),
    };
    // clang-format on
    if (wants_help(argc, argv, options, COUNT(options))) {
        print_help(GENERATE_USAGE, options, COUNT(options));
        return HELPED;
    }
    return parse_options(argc, argv, options, COUNT(options), rest, 2);
}

static bool can_read(const char *path) {
    FILE *f = *path ? fopen(path, "rb") : NULL;
    if (f) fclose(f);
    return f != NULL;
}

// Whether the first argument can be a model and not the prompt. rest: model and prompt, n of them.
// 0, or -1 after fail().
static int check_first(const char *const *rest, int n) {
    const char *first = n ? rest[0] : NULL;
    if (n == 2 && check_model_first("", first, rest[1], true)) return -1;
    if (!first || can_read(first)) return 0;
    if (!*first || strchr(first, ' ') || strchr(first, '\n'))
        return fail("the model comes before the prompt: mamba models/story.bin \"%s\"", first);
    return 0;
}

// Options that do not go together. rest: model and prompt, n of them. 0, or -1 after fail().
static int check_generate(const GenerateOptions *o, const char *const *rest, int n, bool several) {
    const char *option = o->batch ? "--batch" : "--samples";
    const char *prompt[] = {n == 2 ? "the prompt" : NULL, o->file ? "-f" : NULL,
                            o->tokens ? "--tokens" : NULL, o->batch ? "--batch" : NULL};
    const char *first = NULL;
    if (n == 0) return fail("a model.bin is needed: mamba models/story.bin \"Once upon a time\"");
    if (o->batch && n == 2)
        return fail("--batch takes the prompts from %s: '%s' is one too many", o->batch, rest[1]);
    for (int i = 0; i < COUNT(prompt); i++) {
        if (first && prompt[i])
            return fail("%s and %s: one prompt is needed, not two", first, prompt[i]);
        if (prompt[i]) first = prompt[i];
    }
    if (o->show_selection && !first) return fail("--show-selection needs a prompt");
    if (o->samples > 1 && !first) return fail("--samples needs a prompt");
    if (several && o->show_selection)
        return fail("--show-selection shows one prompt: it does not go with %s", option);
    if (several && o->save)
        return fail("--save-state keeps one text's state: it does not go with %s", option);
    if (several && o->n == 0) return fail("-n 0 writes nothing: it does not go with %s", option);
    if (o->null && !several)
        return fail("--null ends each of several texts: it needs --samples or --batch");
    if (o->system && !o->chats) return fail("--system goes with --chat");
    if (o->chats && (o->show_selection || o->tokens || o->form.ids))
        return fail(
            "--chat is about texts: it does not go with --show-selection, --tokens or --ids");
    if (o->form.ids && o->stop.n) return fail("--stop is a text: it does not go with --ids");
    return 0;
}

// Copies of what -e changes in the command line. 0, or -1 after fail().
static int unescape_stops(GenerateOptions *o) {
    for (int i = 0; i < o->stop.n && o->form.escapes; i++) {
        size_t n;
        o->stop_copy[i] = unescaped_copy(o->stop.item[i], &n);
        if (!o->stop_copy[i]) return fail_in("--stop");
        if (n != strlen(o->stop_copy[i])) return fail("--stop cannot hold \\x00");
        fail("--stop needs a text that is not empty");
        o->stop.item[i] = o->stop_copy[i];
    }
    return 0;
}

// The state that the text begins with, and the generator's start. 0, or -1 after fail().
static int generate_start(Session *x, GenerateOptions *o) {
    if (o->load && mamba_state_load(x->model, x->state, o->load)) return -1;
    if (o->seed == LONG_MIN && o->load) return 0; // the state's own generator goes on
    if (o->seed == LONG_MIN) {
        o->seed = (long)time(NULL);
        o->clock_seed = true;
    }
    x->state->random = (uint64_t)o->seed;
    return 0;
}

// prompt: the text, "-" for stdin; NULL with -f, --tokens or --batch. 0, or -1 after fail().
static int generate_texts(Session *x, const GenerateOptions *o, const char *prompt, bool several) {
    const PromptForm *how = &o->form;
    const char *path = o->batch ? o->batch : o->file;
    size_t bytes = prompt ? strlen(prompt) : 0;
    char *read = NULL;
    if (prompt && !strcmp(prompt, "-")) path = "-";
    if (path) { // Ctrl-C still ends the program here
        read = o->batch ? read_text(path, &bytes) : read_prompt_file(how, path, &bytes);
        if (!read) return -1;
    } else if (prompt && how->escapes) {
        read = unescaped_copy(prompt, &bytes);
        if (!read) return fail_in("prompt");
    }
    const char *text = read ? read : prompt;
    catch_ends(o->save != NULL);
    if (!several && !o->show_selection) return generate_once(x, o, text, bytes, read);
    int result =
        several ? generate_several(x, o, text, read, bytes) : show_selection(x, o, text, bytes);
    free(read);
    return result;
}

static int generate_run(GenerateOptions *o, const char *prompt, bool several, bool talks) {
    Session x;
    if (unescape_stops(o) || session_open(&x, o->model_path, o->threads)) return -1;
    if (!x.model->tokenizer) o->form.ids = true;
    int result = o->chats ? mamba_chat(x.model, &o->chat) : 0;
    if (result == 0) result = generate_start(&x, o);
    if (result == 0) result = talks ? interactive(&x, o) : generate_texts(&x, o, prompt, several);
    session_close(&x);
    return result;
}

static int command_generate(int argc, char **argv) {
    const char *rest[2] = {NULL, NULL};
    GenerateOptions o = {.n = 256,
                         .seed = LONG_MIN,
                         .temperature = 0.8,
                         .top_p = 0.95,
                         .repeat_penalty = 1,
                         .layer = -1,
                         .samples = 1,
                         .threads = mamba_default_threads()};
    int n = generate_options(&o, argc, argv, rest);
    if (n < 0) return n == HELPED ? 0 : -1;
    if (check_first(rest, n)) return -1;
    if (o.show_selection) backend.cpu = true; // a GPU does not tell delta
    const bool several = o.batch || o.samples > 1;
    if (check_generate(&o, rest, n, several)) return -1;
    const bool talks = n == 1 && !o.batch && !o.file && !o.tokens;
    o.model_path = rest[0];
    const FileUse use[] = {
        {INPUT, "the model", o.model_path, NULL},
        {INPUT, "the state of --load-state", o.load, NULL},
        {INPUT, "the prompt of -f", o.file, NULL},
        {INPUT, "the standard input", talks || (n == 2 && !strcmp(rest[1], "-")) ? "-" : NULL,
         NULL},
        {OUTPUT_STATE, "--save-state", o.save, "the state of --load-state"},
    };
    if (check_files(use, COUNT(use))) return -1;
    int result = generate_run(&o, rest[1], several, talks);
    for (int i = 0; i < LIST_MAX; i++) free(o.stop_copy[i]);
    return result;
}
