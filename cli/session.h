// cli/session.h - generate without a prompt: an interactive session. The state carries on from turn
// to turn, and each turn can be undone.
//
// Depends on cli/generate.h (generate_turn) and cli/options.h (check_files). On a terminal the line
// is edited by cli/linenoise.

#ifdef MAMBA_POSIX
#include "linenoise/linenoise.h"
#endif

// clang-format off
static const char SESSION_HELP[] =
    "A line is read as it stands, and the model goes on from there; an empty line lets it write "
    "more.\n"
    "  /undo [N]    take the last turn back, or the last N (up to 32)\n"
    "  /reset       forget everything\n"
    "  /read FILE   the text of a file as the next turn\n"
    "  /set NAME X  change a setting, such as /set t 0.7; /set shows all, /set t one\n"
    "  /seed N      begin the random numbers again from N\n"
    "  /status      what was read, the settings\n"
    "  /save FILE   save the state      /load FILE   load one\n"
    "  /help        this text           /quit, /exit leave (so does end of input)\n"
    "Ctrl-J or Alt-Enter begins a new line in a turn; a paste is one turn. Ctrl-C stops the\n"
    "writing, not the session. A line that begins with // is text that begins with /.\n";
// clang-format on

// --- undo

enum { UNDO_MAX = 32 };
typedef struct {
    State *before[UNDO_MAX]; // states before the last turns, oldest first
    int n;
} UndoStack;

// 0, or -1 after fail().
static int undo_push(UndoStack *undo, const Model *m, const State *s) {
    State *copy;
    if (undo->n < UNDO_MAX) {
        copy = mamba_state_new(m);
        if (!copy) return -1;
    } else { // forget the oldest, reuse its memory
        copy = undo->before[0];
        undo->n--;
        memmove(undo->before, undo->before + 1, (size_t)undo->n * sizeof *undo->before);
    }
    mamba_state_copy(m, copy, s);
    undo->before[undo->n++] = copy;
    return 0;
}

static void undo_pop(UndoStack *undo, const Model *m, State *s) {
    if (undo->n == 0) {
        fprintf(stderr, "nothing to undo\n");
        return;
    }
    State *last = undo->before[--undo->n];
    mamba_state_copy(m, s, last);
    mamba_state_free(last);
    fprintf(stderr, "undone: back to %llu tokens\n", (unsigned long long)s->position);
}

typedef struct {
    Session *x;
    GenerateOptions o; // as /set changed them
    UndoStack undo;
    long turns;
    bool terminal, edits; // stdin is a terminal; its lines are edited
} Talk;

// --- a turn

// Reads a text and writes what follows. 0, or -1 after fail() where the session must end.
static int session_turn(Talk *talk, const char *text, size_t bytes) {
    Session *x = talk->x;
    Report report = new_report(&talk->o);
    Prompt p = {.text = text, .bytes = bytes};
    char last = 0;
    if (undo_push(&talk->undo, x->model, x->state)) return -1;
    catch_ends(false);
    int result = encode_prompt(x, &talk->o, &p);
    if (result == 0) result = generate_turn(x, &talk->o, &p, NULL, true, &report, &last);
    free(p.ids);
    report.turn = talk->turns++;
    if (result && ferror(stdout)) return -1;
    if (result) {
        fprintf(stderr, "mamba: %s\n", mamba_error());
        undo_pop(&talk->undo, x->model, x->state);
        return 0;
    }
    if (last != '\n') printf("\n");
    if (flush_stdout()) return -1;
    if (!talk->o.quiet) print_report(x, &report);
    return 0;
}

// --- commands: 0, or -1 after fail()

// text: how many turns; "": one.
static int session_undo(Talk *talk, const char *text) {
    UndoStack *undo = &talk->undo;
    long n = 1;
    const Option option = OPTION_INT("/undo", "N", &n, 1, UNDO_MAX, "");
    if (*text && parse_value(&option, text)) return -1;
    while (n-- > 1 && undo->n > 1) mamba_state_free(undo->before[--undo->n]);
    undo_pop(undo, talk->x->model, talk->x->state);
    return 0;
}

static int session_reset(Talk *talk) {
    if (undo_push(&talk->undo, talk->x->model, talk->x->state)) return -1;
    mamba_state_reset(talk->x->model, talk->x->state);
    fprintf(stderr, "forgotten (/undo brings it back)\n");
    return 0;
}

static int session_save(const Talk *talk, const char *path) {
    const FileUse use[] = {{INPUT, "the model", talk->o.model_path, NULL},
                           {OUTPUT_STATE, "/save", path, NULL}};
    if (!*path) return fail("/save needs a file name");
    if (check_files(use, COUNT(use))) return -1;
    if (mamba_state_save(talk->x->model, talk->x->state, path)) return -1;
    fprintf(stderr, "saved\n");
    return 0;
}

static int session_load(Talk *talk, const char *path) {
    Session *x = talk->x;
    if (!*path) return fail("/load needs a file name");
    State *before = mamba_state_new(x->model); // becomes a turn to undo only if the load succeeds
    if (!before) return -1;
    mamba_state_copy(x->model, before, x->state);
    int result = mamba_state_load(x->model, x->state, path);
    if (result == 0) result = undo_push(&talk->undo, x->model, before);
    if (result == 0)
        fprintf(stderr, "loaded: %llu tokens\n", (unsigned long long)x->state->position);
    mamba_state_free(before);
    return result;
}

// The text of a file as a turn. *ends: the session must end.
static int session_read(Talk *talk, const char *path, bool *ends) {
    size_t bytes = 0;
    if (!*path) return fail("/read needs a file name");
    if (!strcmp(path, "-")) return fail("/read reads a file, not the standard input");
    char *text = read_prompt_file(&talk->o.form, path, &bytes);
    if (!text) return -1;
    int result = session_turn(talk, text, bytes);
    *ends = result != 0;
    free(text);
    return result;
}

static void print_settings(const GenerateOptions *o) {
    fprintf(stderr, "settings  n %ld, t %g, p %g, k %ld, min-p %g, repeat-penalty %g\n", o->n,
            o->temperature, o->top_p, o->top_k, o->min_p, o->repeat_penalty);
}

// "t 0.7": the option -t of the command line gets the value.
static int session_set(GenerateOptions *o, const char *text) {
    const Option options[] = {SAMPLING_OPTIONS(o)};
    const size_t length = strcspn(text, " =");
    const char *value = text + length + strspn(text + length, " =");
    if (*text == 0) return print_settings(o), 0;
    for (int i = 0; i < COUNT(options); i++) {
        const char *name = options[i].name + strspn(options[i].name, "-");
        if (strlen(name) != length || strncmp(name, text, length)) continue;
        if (*value && parse_value(&options[i], value)) return -1;
        if (*value) print_settings(o);
        else if (options[i].kind == OPT_INT)
            fprintf(stderr, "%s %ld\n", name, *(long *)options[i].value);
        else fprintf(stderr, "%s %g\n", name, *(double *)options[i].value);
        return 0;
    }
    return fail("/set knows n, t, p, k, min-p and repeat-penalty, not '%.*s'", (int)length, text);
}

static int session_seed(Talk *talk, const char *text) {
    GenerateOptions *o = &talk->o;
    long seed = 0;
    const Option option = OPTION_INT("/seed", "N", &seed, 0, 9e15, "");
    if (*text && parse_value(&option, text)) return -1;
    if (!*text && o->seed == LONG_MIN) fprintf(stderr, "seed      that of the loaded state\n");
    else if (!*text) fprintf(stderr, "seed      %ld\n", o->seed);
    else {
        o->seed = seed;
        o->clock_seed = false;
        talk->x->state->random = (uint64_t)seed;
    }
    return 0;
}

static int session_status(Talk *talk) {
    const Model *m = talk->x->model;
    const State *s = talk->x->state;
    fprintf(stderr, "model     %s, %zu parameters in %s\n", talk->o.model_path, m->n_params,
            type_name(m->config.type));
    fprintf(stderr, "state     %llu tokens read, %zu bytes; %d turn%s can be undone\n",
            (unsigned long long)s->position, mamba_state_bytes(m), talk->undo.n,
            talk->undo.n == 1 ? "" : "s");
    print_settings(&talk->o);
    if (talk->o.save) fprintf(stderr, "at end    the state is saved to %s\n", talk->o.save);
    return session_seed(talk, "");
}

// A line that begins with "/". Returns true if the session must end; *result is then 0, or -1 after
// fail().
static bool session_command(Talk *talk, const char *line, int *result) {
    static const char *const names[] = {"/undo", "/reset", "/read", "/set",  "/seed", "/status",
                                        "/save", "/load",  "/help", "/quit", "/exit"};
    enum { UNDO, RESET, READ, SET, SEED, STATUS, SAVE, LOAD, HELP, QUIT, EXIT };
    const size_t length = strcspn(line, " ");
    const char *value = line + length + strspn(line + length, " ");
    int which = 0, status = 0;
    bool ends = false;
    while (which < COUNT(names) &&
           (strlen(names[which]) != length || strncmp(line, names[which], length)))
        which++;
    if (which == UNDO) status = session_undo(talk, value);
    else if (which == RESET) status = session_reset(talk);
    else if (which == READ) status = session_read(talk, value, &ends);
    else if (which == SET) status = session_set(&talk->o, value);
    else if (which == SEED) status = session_seed(talk, value);
    else if (which == STATUS) status = session_status(talk);
    else if (which == SAVE) status = session_save(talk, value);
    else if (which == LOAD) status = session_load(talk, value);
    else if (which == HELP) fprintf(stderr, "%s", SESSION_HELP);
    else if (which == QUIT || which == EXIT) return true;
    else fprintf(stderr, "unknown command '%s' (try /help; // begins a text with /)\n", line);
    if (ends) *result = status;
    else if (status) fprintf(stderr, "mamba: %s\n", mamba_error());
    return ends;
}

// --- lines of stdin

// Reads up to the end of a line or of the input. *end gets the byte that ended it. malloc'd, with
// room for a NUL; NULL after fail().
static char *read_bytes(size_t *n, int *end) {
    size_t room = 256;
    char *line = malloc(room);
    *n = 0;
    while (line) {
        *end = getchar();
        if (*end == EOF || *end == '\n') return line;
        if (*n + 2 > room) {
            room *= 2;
            char *larger = realloc(line, room);
            if (!larger) free(line);
            line = larger;
        }
        if (line) line[(*n)++] = (char)*end;
    }
    fail("stdin: out of memory after %zu bytes of a line", *n);
    return NULL;
}

typedef enum { LINE_TEXT, LINE_END, LINE_INTERRUPT, LINE_FAILED } LineResult;

// One line of stdin without its end, malloc'd.
static LineResult read_plain_line(char **line, size_t *length) {
    size_t n;
    int end;
    *line = read_bytes(&n, &end);
    if (!*line) return LINE_FAILED;
    const bool bad = end == EOF && ferror(stdin);
    if (end == EOF && (n == 0 || bad)) {
        int error = errno;
        free(*line);
        *line = NULL;
        clearerr(stdin);
        if (bad && interrupted) return LINE_INTERRUPT;
        return bad ? fail("stdin: %s", strerror(error)), LINE_FAILED : LINE_END;
    }
    if (n && (*line)[n - 1] == '\r') n--;
    (*line)[n] = 0;
    *length = n;
    return LINE_TEXT;
}

// The next line, edited on a terminal. *length is not 0 where Ctrl-C discarded something.
static LineResult read_line(const Talk *talk, char **line, size_t *length) {
    catch_ends(false);
    *length = 0;
#ifdef MAMBA_POSIX
    if (talk->edits) {
        LinenoiseResult result = linenoise("> ", line, length);
        if (result == LINENOISE_LINE && *length) linenoiseHistoryAdd(*line);
        if (result == LINENOISE_FAILED) fail("the terminal cannot be read: %s", strerror(errno));
        return result == LINENOISE_LINE        ? LINE_TEXT
               : result == LINENOISE_END       ? LINE_END
               : result == LINENOISE_INTERRUPT ? LINE_INTERRUPT
                                               : LINE_FAILED;
    }
    struct sigaction action = {.sa_handler = on_end}; // it ends a read; signal() would restart it
    if (talk->terminal || talk->o.save) sigaction(SIGINT, &action, NULL);
    else signal(SIGINT, on_kill);
    if (talk->o.save) sigaction(SIGTERM, &action, NULL);
    if (talk->o.save) sigaction(SIGHUP, &action, NULL);
#endif
    if (talk->terminal || !talk->o.quiet) fprintf(stderr, "> ");
    return read_plain_line(line, length);
}

// --- the session

// What a line asks for. Returns true if the session must end; *result is then 0, or -1 after
// fail().
static bool session_line(Talk *talk, char *line, size_t length, int *result) {
    if (line[0] == '/' && line[1] != '/') return session_command(talk, line, result);
    const size_t skip = line[0] == '/'; // of "//"
    *result = session_turn(talk, line + skip, length - skip);
    return *result != 0;
}

// 0, or -1 after fail().
static int interactive(Session *x, const GenerateOptions *o) {
    Talk talk = {.x = x, .o = *o};
    int result = 0;
    bool ends = false, asked = false;
    talk.o.no_echo = true;
#ifdef MAMBA_POSIX
    talk.terminal = isatty(STDIN_FILENO);
    if (o->save) catch_ends(true); // linenoise, which catches the same, calls these after its own
    talk.edits = linenoiseSupported(STDIN_FILENO, STDERR_FILENO) &&
                 linenoiseOpen(STDIN_FILENO, STDERR_FILENO) == 0;
#endif
    if (!o->quiet) fprintf(stderr, "%s", SESSION_HELP);
    while (!ends && !leaving) {
        char *line = NULL;
        size_t length;
        LineResult read = read_line(&talk, &line, &length);
        if (read == LINE_TEXT) ends = session_line(&talk, line, length, &result);
        else if (read == LINE_INTERRUPT && length == 0) { // one asks, two leave
            ends = asked || !talk.terminal || leaving;
            if (!ends) fprintf(stderr, "Ctrl-C again leaves; so do Ctrl-D and /quit\n");
        } else if (read != LINE_INTERRUPT) ends = true;
        asked = read == LINE_INTERRUPT && length == 0;
        if (read == LINE_FAILED) result = -1;
        free(line);
    }
#ifdef MAMBA_POSIX
    if (talk.edits) linenoiseClose();
#endif
    while (talk.undo.n) mamba_state_free(talk.undo.before[--talk.undo.n]);
    return save_state(x, o) || result ? -1 : 0;
}
