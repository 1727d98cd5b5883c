// One prompt: echo it (unless told otherwise), read it, write, save. owned: malloc'd memory that
// holds the text, or NULL; freed.
static int generate_once(Session *x, const GenerateOptions *o, const char *text, size_t bytes,
                         char *owned) {
    Report report = {.seed = o->clock_seed && o->temperature > 0 && o->n ? o->seed : -1};
    int32_t *ids = NULL, start = start_token(&x->model->config);
    size_t n = 0;
    int result = bytes && mamba_encode(x->model, text, bytes, &ids, &n) ? fail_in("prompt") : 0;
    if (result == 0 && n == 0 && x->state->position == 0 && start < 0 && !o->show_selection)
        result = fail("this model has no end-of-text token to start from: give a prompt");
    if (result == 0 && o->n != 0 && !o->show_selection) {
        unsigned char cut[4]; // a character that the loaded state left unfinished ends where a new
                              // text begins
        size_t n_cut = bytes ? utf8_flush(&x->state->pending, cut) : 0;
        fwrite(cut, 1, n_cut, stdout);
        if (!o->no_echo && bytes) fwrite(text, 1, bytes, stdout);
        fflush(stdout);
    } else if (bytes) {
        x->state->pending.n = 0;
    }
    free(owned); // a long prompt does not stay in memory beside its tokens
    if (o->show_selection) {
        if (result == 0) result = show_selection(x, ids, n, o->layer);
        free(ids);
        return result;
    }
    if (result == 0 && n) result = read_prompt(x, ids, n, &report);
    else if (result == 0 && x->state->position == 0) result = read_prompt(x, &start, 1, &report);
    free(ids);
    if (result) return -1;
    result = interrupted ? 0 : write_tokens(x, o, o->save != NULL, &report);
#ifdef MAMBA_POSIX
    if (o->n != 0 && isatty(STDOUT_FILENO)) printf("\n");
#endif
    if (o->save && mamba_state_save(x->model, x->state, o->save)) result = -1;
    print_report(x, &report);
    if (o->save && !result)
        fprintf(stderr, "state after %llu tokens saved to %s\n",
                (unsigned long long)x->state->position, o->save);
    return result;
}

#include "session.h"

static const char GENERATE_USAGE[] =
    "mamba.c " MAMBA_VERSION ": the Mamba language model in one C file\n\n"
    "  mamba model.bin \"prompt\" [options]   go on with a text; prompt - reads it from stdin, "
    "\"\" starts a new text\n"
    "  mamba model.bin [options]            interactive session, the state carries on from line to "
    "line\n"
    "  mamba info | tokenize | eval | logits | train | bench --help\n";

static int command_generate(int argc, char **argv) {
    GenerateOptions o = {.n = 256,
                         .seed = LONG_MIN,
                         .temperature = 0.8,
                         .top_p = 0.95,
                         .repeat_penalty = 1,
                         .layer = -1,
                         .samples = 1};
    o.threads = default_threads();
    const Option options[] = {
        {"-n", "N", "tokens to write; -1: no limit, 0: only read the prompt", OPT_INT, &o.n, -1,
         1e15},
        {"-t", "X", "temperature; 0: always the likeliest token", OPT_REAL, &o.temperature, 0, 100},
        {"-p", "X", "top-p: sample from the likeliest tokens that reach this probability", OPT_REAL,
         &o.top_p, 0, 1},
        {"-k", "K", "top-k: sample from the K likeliest tokens; 0: all", OPT_INT, &o.top_k, 0, 1e9},
        {"--min-p", "X", "drop tokens less likely than X times the likeliest", OPT_REAL, &o.min_p,
         0, 1},
        {"--repeat-penalty", "X", "weaken the last 64 tokens; 1: off", OPT_REAL, &o.repeat_penalty,
         0.01, 100},
        {"-s", "SEED", "random seed; by default the clock, or the loaded state's generator",
         OPT_INT, &o.seed, 0, 9e15},
        {"--stop", "STRING", "end before this text would be written; up to 16 times", OPT_LIST,
         &o.stop, 0, 0},
        {"--ignore-eos", "", "write on after end-of-text", OPT_SWITCH, &o.ignore_eos, 0, 0},
        {"--no-echo", "", "do not repeat the prompt on stdout", OPT_SWITCH, &o.no_echo, 0, 0},
        {"--show-selection", "",
         "write nothing: show the prompt, each token by the mean of its step size delta",
         OPT_SWITCH, &o.show_selection, 0, 0},
        {"--layer", "N", "the layer whose delta is shown, from 0; -1: the mean of all", OPT_INT,
         &o.layer, -1, 65535},
        {"--samples", "S", "write S texts from the prompt (or each of --batch), 32 at once",
         OPT_INT, &o.samples, 1, 1e9},
        {"--batch", "FILE", "write a text from each line of FILE, - for stdin, 32 at once",
         OPT_TEXT, &o.batch, 0, 0},
        {"--null", "", "no headings between several texts: a NUL byte after each", OPT_SWITCH,
         &o.null, 0, 0},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &o.threads, 1, 1024},
        {"--save-state", "FILE", "save the state at the end, also after Ctrl-C", OPT_TEXT, &o.save,
         0, 0},
        {"--load-state", "FILE", "start from a saved state", OPT_TEXT, &o.load, 0, 0},
    };
    const char *rest[2];
    if (argc < 2 || wants_help(argc, argv)) {
        print_help(GENERATE_USAGE, options, COUNT(options));
        return argc < 2 ? fail("a model.bin is needed, for example: mamba models/tales.bin \"Once "
                               "upon a time\"")
                        : 0;
    }
    int n = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n < 0) return -1;
    if (n == 0) return fail("a model.bin is needed");
    if (o.show_selection && n == 1) return fail("--show-selection needs a prompt");
    if (o.show_selection) backend.cpu = true; // delta is seen there
    bool many = o.batch || o.samples > 1;
    const char *option = o.batch ? "--batch" : "--samples";
    if (o.batch && n == 2)
        return fail("--batch takes the prompts from %s: '%s' is one too many", o.batch, rest[1]);
    if (o.samples > 1 && !o.batch && n == 1) return fail("--samples needs a prompt");
    if (many && o.show_selection)
        return fail("--show-selection shows one prompt: it does not go with %s", option);
    if (many && o.save)
        return fail("--save-state keeps one text's state: it does not go with %s", option);
    if (many && o.n == 0) return fail("-n 0 writes nothing: it does not go with %s", option);
    if (o.null && !many)
        return fail("--null ends each of several texts: it needs --samples or --batch");
    if (many && GPU && !backend.cpu) return fail("%s runs on the processor: add --cpu", option);
    bool reads_stdin = !o.batch && (n == 1 || !strcmp(rest[1], "-"));
    const FileUse use[] = {
        {INPUT, "the model", o.model_path = rest[0], NULL},
        {INPUT, "the state of --load-state", o.load, NULL},
        {INPUT, "the standard input", reads_stdin ? "-" : NULL, NULL},
        {OUTPUT, "--save-state", o.save, "the state of --load-state"},
    };
    if (check_files(use, COUNT(use))) return -1;
    Session x;
    if (session_open(&x, rest[0], o.threads)) return -1;
    int result = o.load ? mamba_state_load(x.model, x.state, o.load) : 0;
    if (result == 0 && (o.seed != LONG_MIN || !o.load)) {
        if (o.seed == LONG_MIN) o.seed = (long)time(NULL), o.clock_seed = true;
        x.state->random = (uint64_t)o.seed;
    }
    if (result == 0 && n == 1 && !o.batch) result = interactive(&x, &o);
    else if (result == 0) {
        const char *prompt = o.batch ? "" : rest[1], *path = o.batch                ? o.batch
                                                             : !strcmp(prompt, "-") ? "-"
                                                                                    : NULL;
        size_t bytes = strlen(prompt);
        char *text = path ? read_text(path, &bytes) : NULL; // Ctrl-C still ends the program here
        catch_interrupt();
        if (path && !text) result = -1;
        else if (many) result = generate_many(&x, &o, text ? text : prompt, bytes), free(text);
        else result = generate_once(&x, &o, text ? text : prompt, bytes, text);
    }
    session_close(&x);
    return result;
}

