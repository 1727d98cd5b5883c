// --- generate

typedef struct {
    const char *model_path, *save, *load;
    long n, top_k, seed, threads;
    double temperature, top_p, min_p, repeat_penalty;
    TextList stop;
    bool ignore_eos, no_echo, clock_seed, show_selection, null;
    long layer, samples;
    const char *batch;
} GenerateOptions;

// The text on its way to stdout: what might be the start of a stop string is held back until it is
// clear that it is not.
typedef struct {
    char *bytes;
    size_t n, room;
} Text;

// 0, or -1 after fail().
static int text_add(Text *to, const void *bytes, size_t n) {
    if (n == 0) return 0; // memcpy may not be given NULL
    if (n > to->room - to->n) {
        size_t room = size_add(to->n, n) > SIZE_MAX / 2 ? SIZE_MAX : (to->n + n) * 2;
        char *larger = realloc(to->bytes, room);
        if (!larger) return fail("out of memory: a text of %zu bytes", size_add(to->n, n));
        to->bytes = larger, to->room = room;
    }
    memcpy(to->bytes + to->n, bytes, n);
    to->n += n;
    return 0;
}

typedef struct {
    const TextList *stop;
    Text held;
    Text *into; // where the text goes instead of stdout, or NULL
} Output;

// Prints n bytes of what is held. 0, or -1 after fail(): without it, -n -1 would write to a full
// disk for ever.
static int output_print(const Output *out, size_t n) {
    if (out->into) return text_add(out->into, out->held.bytes, n);
    if (n) fwrite(out->held.bytes, 1, n, stdout);
    return fflush(stdout) || ferror(stdout) ? fail("stdout: cannot write: %s", strerror(errno)) : 0;
}

static int output_flush(Output *out) {
    size_t n = out->held.n;
    out->held.n = 0;
    return output_print(out, n);
}

// Length of the longest end of text that begins some stop string: the part that cannot be printed
// yet.
static size_t held_back(const TextList *stop, const char *text, size_t n) {
    size_t most = 0;
    for (int i = 0; i < stop->n; i++) {
        size_t length = strlen(stop->item[i]);
        for (size_t k = length - 1 < n ? length - 1 : n; k > most; k--)
            if (!memcmp(text + n - k, stop->item[i], k)) most = k;
    }
    return most;
}

// Adds bytes, prints what is safe. 1: a stop string appeared; it and what follows it are dropped.
// -1 after fail().
static int output_add(Output *out, const unsigned char *bytes, size_t n) {
    Text *held = &out->held;
    if (n == 0) return 0;
    if (text_add(held, bytes, n)) return -1;
    size_t cut = SIZE_MAX;
    for (int i = 0; i < out->stop->n; i++) {
        size_t length = strlen(out->stop->item[i]);
        for (size_t at = 0; at + length <= held->n && at < cut; at++)
            if (!memcmp(held->bytes + at, out->stop->item[i], length)) cut = at;
    }
    size_t keep = cut == SIZE_MAX ? held_back(out->stop, held->bytes, held->n) : 0;
    size_t print = cut == SIZE_MAX ? held->n - keep : cut;
    if (output_print(out, print)) return -1;
    if (keep) memmove(held->bytes, held->bytes + print, keep);
    held->n = keep;
    return cut != SIZE_MAX;
}

typedef struct { // what a command that runs the model needs
    Model *model;
    Acts *acts;
    State *state;
    double load_seconds;
} Session;

static void session_close(Session *x) {
    mamba_state_free(x->state);
    mamba_acts_free(x->acts);
    mamba_free(x->model);
}

static struct {
    bool cpu, float32;
} backend; // where commands run the model
#define BACKEND_OPTIONS \
    {"--cpu",    "",           "run on the processor, also where the build has a GPU backend", \
     OPT_SWITCH, &backend.cpu, 0, \
     0}, \
        {"--float32", \
         "", \
         "on a GPU: float32 products also for bf16 weights and in training", \
         OPT_SWITCH, \
         &backend.float32, \
         0, \
         0}

static int session_open(Session *x, const char *path, long threads) {
    double start = seconds();
    memset(x, 0, sizeof *x);
    x->model = mamba_load(path);
    if (x->model) x->acts = mamba_acts_new(x->model, (int)threads);
    if (x->acts && (!GPU || backend.cpu || mamba_acts_gpu(x->acts, x->model, backend.float32) == 0))
        x->state = mamba_state_new(x->model);
    x->load_seconds = seconds() - start;
    if (x->state) return 0;
    session_close(x);
    return -1;
}

typedef struct {
    size_t n_read, n_written;
    double read_seconds, write_seconds;
    const char *ended; // why writing ended
    long seed;         // that the clock gave, -1: none
} Report;

// The token that an empty text starts from: end of text, which precedes every text in training.
static int32_t start_token(const Config *c) { return c->eos[0] >= 0 ? c->eos[0] : c->bos; }

// Reads ids piece by piece, so that Ctrl-C is heard within one.
static int read_prompt(Session *x, const int32_t *ids, size_t n, Report *report) {
    double start = seconds();
    size_t done = 0;
    while (done < n && !interrupted) {
        size_t most = x->acts->gpu ? 1 << 16 : (size_t)x->acts->piece,
               piece = n - done < most ? n - done : most;
        if (mamba_prefill(x->model, x->acts, x->state, ids + done, piece, NULL, NULL)) return -1;
        done += piece;
    }
    report->n_read = done;
    report->read_seconds = seconds() - start;
    if (done < n) fprintf(stderr, "interrupted after %zu of %zu prompt tokens\n", done, n);
    return 0;
}

// What print_text() needs for each token that mamba_generate() writes.
typedef struct {
    Output out;
    bool stopped, failed;
} Printing;

static bool print_text(void *context, int32_t id, const unsigned char *text, size_t n) {
    Printing *p = context;
    (void)id;
    int found = output_add(&p->out, text, n);
    p->stopped |= found == 1;
    p->failed |= found < 0;
    return found != 0 || interrupted;
}

// Writes up to o->n tokens from the state. goes_on: an unfinished character stays in the state for
// later.
static int write_tokens(Session *x, const GenerateOptions *o, bool goes_on, Report *report) {
    static const char *const ended[] = {"length", "end of text", "interrupted"};
    Printing p = {.out = {.stop = &o->stop}};
    Writing w = {.sampling = {(float)o->temperature, (float)o->top_p, (int)o->top_k,
                              (float)o->min_p, (float)o->repeat_penalty},
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
    if (p.stopped) x->state->pending.n = 0; // part of what follows the stop string
    if (!failed && output_flush(&p.out)) failed = true;
    free(p.out.held.bytes);
    report->write_seconds = seconds() - start;
    return failed ? -1 : 0;
}

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
