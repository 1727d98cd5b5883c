// cli/generate.h - one text: the prompt is read, then tokens are drawn, printed and read.
//
// Depends on cli/options.h (Session), cli/prompt.h, cli/output.h, mamba_generate() and
// files/chat.h.

typedef struct {
    const char *model_path, *save, *load, *batch, *file, *tokens;
    long n, top_k, seed, threads, layer, samples;
    double temperature, top_p, min_p, repeat_penalty;
    TextList stop;
    char *stop_copy[LIST_MAX]; // of -e; NULL: none
    PromptForm form;
    const char *system; // --system
    Chat chat;          // of the model, with --chat
    bool chats, ignore_eos, no_echo, show_selection, null, quiet;
    bool clock_seed; // the clock gave the seed, not the user
} GenerateOptions;

// What a session can change with /set.
// clang-format off
#define SAMPLING_OPTIONS(o) \
    OPTION_INT("-n", "N", &(o)->n, -1, 1e15, \
               "tokens to write; -1: no limit, 0: only read the prompt"), \
    OPTION_REAL("-t", "X", &(o)->temperature, 0, 100, \
                "temperature; 0: always the likeliest token"), \
    OPTION_REAL("-p", "X", &(o)->top_p, 0, 1, \
                "top-p: sample from the likeliest tokens that reach this probability"), \
    OPTION_INT("-k", "K", &(o)->top_k, 0, 1e9, \
               "top-k: sample from the K likeliest tokens; 0: all"), \
    OPTION_REAL("--min-p", "X", &(o)->min_p, 0, 1, \
                "drop tokens less likely than X times the likeliest"), \
    OPTION_REAL("--repeat-penalty", "X", &(o)->repeat_penalty, 0.01, 100, \
                "weaken the last 64 tokens; 1: off")
// clang-format on

static Sampling sampling_of(const GenerateOptions *o) {
    return (Sampling){.temperature = (float)o->temperature,
                      .top_p = (float)o->top_p,
                      .top_k = (int)o->top_k,
                      .min_p = (float)o->min_p,
                      .repeat_penalty = (float)o->repeat_penalty};
}

// --- signals of a run that must not end before its state is saved

static volatile sig_atomic_t leaving; // SIGTERM or SIGHUP came: save and leave

static void on_end(int number) {
    interrupted = 1;
    if (number != SIGINT) leaving = 1;
    signal(number, on_end); // some systems reset it
}

// From here on Ctrl-C sets `interrupted` and never ends the program by itself. saves: so do the
// other signals that end programs, and a closed pipe is a failed write.
static void catch_ends(bool saves) {
    interrupted = 0;
    signal(SIGINT, on_end);
    if (!saves) return;
    signal(SIGTERM, on_end);
#ifdef MAMBA_POSIX
    if (signal(SIGHUP, on_end) == SIG_IGN) signal(SIGHUP, SIG_IGN); // nohup
    signal(SIGPIPE, SIG_IGN);
#endif
}

// --- the line about a run on stderr

typedef struct {
    size_t n_read, n_written;
    double read_seconds, write_seconds;
    const char *ended; // why writing ended
    long seed;         // that the clock gave; -1: none
    long turn;         // of a session, from 0
} Report;

// The turns of a session after the first leave out what stays the same.
static void print_report(const Session *x, const Report *r) {
    char text[400];
    int n = 0;
    const int room = sizeof text;
    if (r->turn == 0) n += snprintf(text + n, room - n, " | load %.3f s", x->load_seconds);
    if (r->turn == 0 && r->seed >= 0) n += snprintf(text + n, room - n, " | seed %ld", r->seed);
    if (r->n_read)
        n += snprintf(text + n, room - n, " | prefill %zu tokens, %.1f tokens/s", r->n_read,
                      (double)r->n_read / r->read_seconds);
    if (r->n_written)
        n += snprintf(text + n, room - n, " | decode %zu tokens, %.1f tokens/s (%s)", r->n_written,
                      (double)r->n_written / r->write_seconds, r->ended);
    if (r->turn == 0 && peak_megabytes() > 0)
        n += snprintf(text + n, room - n, " | peak memory %.1f MB", peak_megabytes());
    if (n) fprintf(stderr, "%s\n", text + 3);
}

// Ends the line of a text that did not end in a newline, where something follows on the screen:
// on a terminal, and where stderr goes to the same place as stdout. In a file the text stays exact.
static void end_line(char last) {
    if (last == '\n') return;
#ifdef MAMBA_POSIX
    struct stat out, err;
    if (isatty(STDOUT_FILENO)) {
        printf("\n");
        fflush(stdout);
    } else if (fstat(STDOUT_FILENO, &out) == 0 && fstat(STDERR_FILENO, &err) == 0 &&
               out.st_dev == err.st_dev && out.st_ino == err.st_ino)
        fprintf(stderr, "\n");
#endif
}

// --- reading

enum { PROGRESS_WIDTH = 76 };

// A line about a prompt that takes more than two seconds: on a terminal in place, else a new one
// each 30 seconds. *next: when the next is due, in seconds from the start.
static void show_progress(size_t done, size_t n, double spent, double *next) {
    char line[PROGRESS_WIDTH + 1];
    bool terminal = false;
#ifdef MAMBA_POSIX
    terminal = isatty(STDERR_FILENO);
#endif
    if (spent < *next || done == n) return;
    double rate = (double)done / spent;
    snprintf(line, sizeof line, "prompt: %zu of %zu tokens, %.0f tokens/s, %.0f s left", done, n,
             rate, (double)(n - done) / rate);
    if (terminal) fprintf(stderr, "\r%-*s", PROGRESS_WIDTH, line);
    else fprintf(stderr, "%s\n", line);
    *next = spent + (terminal ? 0.2 : 30);
}

static void clear_progress(double next) {
#ifdef MAMBA_POSIX
    if (next > 2 && isatty(STDERR_FILENO)) fprintf(stderr, "\r%*s\r", PROGRESS_WIDTH, "");
#endif
    (void)next;
}

// Weights times tokens of a piece on a processor, at the most: a few seconds. Models below 800 M
// never come there.
#define PIECE_PRODUCTS 4e11

// Reads ids piece by piece, so that progress shows, and Ctrl-C takes effect, after a piece. 0, or
// -1 after fail().
static int read_prompt(Session *x, const int32_t *ids, size_t n, bool quiet, Report *report) {
    const double few = 1 + PIECE_PRODUCTS / (double)x->model->n_params;
    size_t most = x->acts->gpu ? 1 << 16 : (size_t)x->acts->piece;
    if (!x->acts->gpu && few < (double)most) most = (size_t)few;
    double start = seconds(), next = 2;
    size_t done = 0;
    while (done < n && !interrupted) {
        size_t piece = n - done < most ? n - done : most;
        if (mamba_prefill(x->model, x->acts, x->state, ids + done, piece, NULL, NULL)) return -1;
        done += piece;
        if (!quiet) show_progress(done, n, seconds() - start, &next);
    }
    clear_progress(next);
    report->n_read += done;
    report->read_seconds += seconds() - start;
    if (done < n) fprintf(stderr, "interrupted after %zu of %zu prompt tokens\n", done, n);
    return 0;
}

// --- writing

typedef struct { // what print_text() knows and tells
    Output out;
    int32_t end; // of a reply; -1: none
    bool ids, stopped, failed, replied;
} Printing;

// For mamba_generate(): prints what a token adds, or its id. Returns true to end the text.
static bool print_text(void *context, int32_t id, const unsigned char *text, size_t n) {
    Printing *p = context;
    char number[16];
    if (id >= 0 && id == p->end) return p->replied = true;
    if (p->ids) n = id < 0 ? 0 : (size_t)snprintf(number, sizeof number, "%d\n", (int)id);
    int found = output_add(&p->out, p->ids ? (const unsigned char *)number : text, n);
    p->stopped |= found == 1;
    p->failed |= found < 0;
    return found != 0 || interrupted;
}

// Writes up to o->n tokens after what the state has read. goes_on: an unfinished character stays in
// the state, for the run that goes on with it. *last: the last byte written, if any. 0, or -1 after
// fail().
static int write_tokens(Session *x, const GenerateOptions *o, bool goes_on, Report *report,
                        char *last) {
    static const char *const ended[] = {"length", "end of text", "interrupted"}; // as in Ended
    Printing p = {.out = {.stop = &o->stop, .last = *last},
                  .ids = o->form.ids,
                  .end = o->chats ? o->chat.end : -1};
    Writing w = {.sampling = sampling_of(o),
                 .most = interrupted ? 0 : o->n,
                 .ignore_eos = o->ignore_eos,
                 .goes_on = goes_on,
                 .emit = print_text,
                 .context = &p};
    double start = seconds();
    long written = mamba_generate(x->model, x->acts, x->state, &w);
    bool failed = written < 0 || p.failed;
    report->ended = p.stopped     ? "stop string"
                    : p.replied   ? "end of text"
                    : interrupted ? "interrupted"
                                  : ended[w.ended];
    report->n_written = written > 0 ? (size_t)written : 0;
    if (p.stopped) x->state->pending.n = 0; // it belongs to what follows the stop string
    if (!failed && output_flush(&p.out)) failed = true;
    free(p.out.held.bytes);
    *last = p.out.last;
    report->write_seconds = seconds() - start;
    return failed ? -1 : 0;
}

// --- one text

typedef struct {
    const char *text; // (bytes), a NUL follows; NULL with --tokens
    size_t bytes;
    int32_t *ids; // (n), malloc'd
    size_t n;
    bool opens;  // nothing was read before it
    bool silent; // the ids are not the user's: the token that an empty text starts from
} Prompt;

// The ids of a user's turn, from the end of the reply before it to where the reply begins. An empty
// one lets an unfinished reply go on. 0, or -1 after fail().
static int encode_chat(const Session *x, const GenerateOptions *o, Prompt *p) {
    const bool ended = last_token(x->state) == o->chat.end;
    p->silent = true;
    if (p->bytes == 0 && (p->opens || ended))
        return fail("there is no reply to go on with: write something");
    if (p->bytes == 0) return 0;
    return mamba_chat_turn(x->model, x->state, o->system, p->text, p->bytes, &p->ids, &p->n);
}

// The ids of a prompt. 0, or -1 after fail().
static int encode_prompt(const Session *x, const GenerateOptions *o, Prompt *p) {
    const Model *m = x->model;
    const int32_t start = start_token(&m->config);
    p->opens = x->state->position == 0;
    if (o->chats) return encode_chat(x, o, p);
    if (o->tokens ? parse_ids(m, o->tokens, &p->ids, &p->n)
                  : encode_text(m, &o->form, p->text, p->bytes, p->opens, &p->ids, &p->n))
        return -1;
    p->silent = p->opens && p->bytes == 0 && !o->tokens;
    if (p->n || !p->opens) return 0;
    if (start < 0) return fail("this model has no end-of-text token to start from: give a prompt");
    p->silent = true;
    return put_before(start, &p->ids, &p->n);
}

// What a token is written as: its text, or its id and a newline. out needs m->text_room bytes, and
// 16. Returns how many it got.
static size_t token_text(const Model *m, State *s, int32_t id, bool as_id, unsigned char *out) {
    if (!as_id) return mamba_decode(m, s, id, out);
    return id < 0 ? 0 : (size_t)snprintf((char *)out, 16, "%d\n", (int)id);
}

// Writes a prompt as what follows it: as text or as ids, whatever it came as. s may hold an
// unfinished character of the text before, which ends here. 0, or -1 after fail().
static int echo_prompt(const Model *m, State *s, const GenerateOptions *o, const Prompt *p,
                       Output *to) {
    const bool as_ids = o->form.ids;
    if (p->n == 0) return 0; // the text goes on
    if (p->opens && (p->silent || o->tokens))
        s->pending.at_start = true; // no space before the text
    if (p->silent) return 0;
    unsigned char *token = malloc(m->text_room + 16);
    if (!token) return fail("out of memory: a token of %zu bytes", m->text_room);
    int result = output_plain(to, token, token_text(m, s, -1, as_ids, token));
    if (result == 0 && !o->no_echo && !as_ids && !o->tokens)
        result = output_plain(to, p->text, p->bytes);
    else
        for (size_t i = 0; i < p->n && result == 0 && !o->no_echo; i++)
            result = output_plain(to, token, token_text(m, s, p->ids[i], as_ids, token));
    free(token);
    return result;
}

// Saves the state where o says so. 0, or -1 after fail().
static int save_state(Session *x, const GenerateOptions *o) {
    if (!o->save) return 0;
    if (mamba_state_save(x->model, x->state, o->save)) return -1;
    if (!o->quiet)
        fprintf(stderr, "state after %llu tokens saved to %s\n",
                (unsigned long long)x->state->position, o->save);
    return 0;
}

// Prints a prompt, reads it and writes what follows. owned: malloc'd memory that holds its text, or
// NULL; it is freed. goes_on, *last: as in write_tokens(). 0, or -1 after fail().
static int generate_turn(Session *x, const GenerateOptions *o, const Prompt *p, char *owned,
                         bool goes_on, Report *report, char *last) {
    Output echo = {.last = *last};
    int echoed = o->n ? echo_prompt(x->model, x->state, o, p, &echo) : 0;
    if (o->n && echoed == 0) echoed = flush_stdout();
    *last = echo.last;
    free(owned); // a long prompt does not stay in memory beside its tokens
    if (echoed && !o->save) return -1;
    if (read_prompt(x, p->ids, p->n, o->quiet, report)) return -1;
    if (echoed || interrupted) return echoed;
    return write_tokens(x, o, goes_on, report, last);
}

static Report new_report(const GenerateOptions *o) {
    return (Report){.seed = o->clock_seed && o->temperature > 0 && o->n ? o->seed : -1};
}

// One prompt: prints it, reads it, writes, saves. owned: malloc'd memory that holds the text, or
// NULL; it is freed. 0, or -1 after fail().
static int generate_once(Session *x, const GenerateOptions *o, const char *text, size_t bytes,
                         char *owned) {
    Report report = new_report(o);
    Prompt p = {.text = text, .bytes = bytes};
    char last = '\n';
    int result = encode_prompt(x, o, &p) ? fail_in("prompt") : 0;
    if (result) free(owned);
    else result = generate_turn(x, o, &p, owned, o->save != NULL, &report, &last);
    free(p.ids);
    if (result && !ferror(stdout)) return -1;
    end_line(last);
    if (!o->quiet) print_report(x, &report);
    return save_state(x, o) || result ? -1 : 0; // also where nobody reads the text any more
}
