// cli/generate.h - one text: the prompt is read, then tokens are drawn, printed and read.
//
// Depends on cli/options.h (Session, Ctrl-C), cli/output.h and mamba_generate().

typedef struct {
    const char *model_path, *save, *load, *batch;
    long n, top_k, seed, threads, layer, samples;
    double temperature, top_p, min_p, repeat_penalty;
    TextList stop;
    bool ignore_eos, no_echo, show_selection, null;
    bool clock_seed; // the clock gave the seed, not the user
} GenerateOptions;

static Sampling sampling_of(const GenerateOptions *o) {
    return (Sampling){.temperature = (float)o->temperature,
                      .top_p = (float)o->top_p,
                      .top_k = (int)o->top_k,
                      .min_p = (float)o->min_p,
                      .repeat_penalty = (float)o->repeat_penalty};
}

// --- the line about a run on stderr

typedef struct {
    size_t n_read, n_written;
    double read_seconds, write_seconds;
    const char *ended; // why writing ended
    long seed;         // that the clock gave; -1: none
} Report;

static void print_report(const Session *x, const Report *r) {
    fprintf(stderr, "load %.3f s", x->load_seconds);
    if (r->seed >= 0) fprintf(stderr, " | seed %ld", r->seed);
    if (r->n_read)
        fprintf(stderr, " | prefill %zu tokens, %.1f tokens/s", r->n_read,
                (double)r->n_read / r->read_seconds);
    if (r->n_written)
        fprintf(stderr, " | decode %zu tokens, %.1f tokens/s (%s)", r->n_written,
                (double)r->n_written / r->write_seconds, r->ended);
    if (peak_megabytes() > 0) fprintf(stderr, " | peak memory %.1f MB", peak_megabytes());
    fprintf(stderr, "\n");
}

// --- reading

// Reads ids piece by piece, so that Ctrl-C takes effect after a piece. 0, or -1 after fail().
static int read_prompt(Session *x, const int32_t *ids, size_t n, Report *report) {
    const size_t most = x->acts->gpu ? 1 << 16 : (size_t)x->acts->piece;
    double start = seconds();
    size_t done = 0;
    while (done < n && !interrupted) {
        size_t piece = n - done < most ? n - done : most;
        if (mamba_prefill(x->model, x->acts, x->state, ids + done, piece, NULL, NULL)) return -1;
        done += piece;
    }
    report->n_read = done;
    report->read_seconds = seconds() - start;
    if (done < n) fprintf(stderr, "interrupted after %zu of %zu prompt tokens\n", done, n);
    return 0;
}

// --- writing

typedef struct { // what print_text() knows and tells
    Output out;
    bool stopped, failed;
} Printing;

// For mamba_generate(): prints what a token adds. Returns true to end the text.
static bool print_text(void *context, int32_t id, const unsigned char *text, size_t n) {
    Printing *p = context;
    (void)id;
    int found = output_add(&p->out, text, n);
    p->stopped |= found == 1;
    p->failed |= found < 0;
    return found != 0 || interrupted;
}

// Writes up to o->n tokens after what the state has read. goes_on: an unfinished character stays in
// the state, for the run that goes on with it. 0, or -1 after fail().
static int write_tokens(Session *x, const GenerateOptions *o, bool goes_on, Report *report) {
    static const char *const ended[] = {"length", "end of text", "interrupted"}; // as in Ended
    Printing p = {.out = {.stop = &o->stop}};
    Writing w = {.sampling = sampling_of(o),
                 .most = interrupted ? 0 : o->n,
                 .ignore_eos = o->ignore_eos,
                 .goes_on = goes_on,
                 .emit = print_text,
                 .context = &p};
    double start = seconds();
    long written = mamba_generate(x->model, x->acts, x->state, &w);
    bool failed = written < 0 || p.failed;
    report->ended = p.stopped ? "stop string" : interrupted ? "interrupted" : ended[w.ended];
    report->n_written = written > 0 ? (size_t)written : 0;
    if (p.stopped) x->state->pending.n = 0; // it belongs to what follows the stop string
    if (!failed && output_flush(&p.out)) failed = true;
    free(p.out.held.bytes);
    report->write_seconds = seconds() - start;
    return failed ? -1 : 0;
}

// --- one text

// Prints the prompt, unless nothing will be written or o says not to.
static void echo_prompt(Session *x, const GenerateOptions *o, const char *text, size_t bytes) {
    if (bytes) { // a new text: a character that the loaded state left unfinished ends here
        unsigned char cut[3 * PENDING];
        size_t n = mamba_decode(x->model, x->state, -1, cut);
        if (o->n != 0) fwrite(cut, 1, n, stdout);
        if (o->n != 0 && !o->no_echo) fwrite(text, 1, bytes, stdout);
    }
    if (o->n != 0) fflush(stdout);
}

// One prompt: prints it, reads it, writes, saves. owned: malloc'd memory that holds the text, or
// NULL; it is freed. 0, or -1 after fail().
static int generate_once(Session *x, const GenerateOptions *o, const char *text, size_t bytes,
                         char *owned) {
    Report report = {.seed = o->clock_seed && o->temperature > 0 && o->n ? o->seed : -1};
    int32_t *ids = NULL, start = start_token(&x->model->config);
    size_t n = 0;
    const bool begins = x->state->position == 0;
    int result = encode_prompt(x->model, text, bytes, begins, &ids, &n) ? fail_in("prompt") : 0;
    bool starts = n == 0 && begins;
    if (begins && bytes == 0) x->state->pending.at_start = true; // no space before the first word
    if (result == 0 && starts && start < 0)
        result = fail("this model has no end-of-text token to start from: give a prompt");
    if (result == 0) echo_prompt(x, o, text, bytes);
    free(owned); // a long prompt does not stay in memory beside its tokens
    if (result == 0 && starts) result = read_prompt(x, &start, 1, &report);
    else if (result == 0 && n) result = read_prompt(x, ids, n, &report);
    free(ids);
    if (result) return -1;
    if (!interrupted) result = write_tokens(x, o, o->save != NULL, &report);
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
