// cli/session.h - generate without a prompt: an interactive session. The state carries on from line
// to line, and each line can be undone.
//
// Depends on cli/generate.h (generate_once) and cli/options.h (check_files, Ctrl-C).

// clang-format off
static const char SESSION_HELP[] =
    "A line is read as it stands, and the model goes on from there; an empty line lets it write "
    "more.\n"
    "  /undo        take the last turn back (up to 32)\n"
    "  /reset       forget everything\n"
    "  /save FILE   save the state      /load FILE   load one\n"
    "  /help        this text           /quit        leave (so does end of input)\n"
    "Ctrl-C stops the writing, not the session. A line that begins with // is text that begins "
    "with /.\n";
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

// --- commands: 0, or -1 after fail()

static int session_reset(Session *x, UndoStack *undo) {
    if (undo_push(undo, x->model, x->state)) return -1;
    mamba_state_reset(x->model, x->state);
    fprintf(stderr, "forgotten (/undo brings it back)\n");
    return 0;
}

static int session_save(const Session *x, const char *model_path, const char *path) {
    const FileUse use[] = {{INPUT, "the model", model_path, NULL}, {OUTPUT, "/save", path, NULL}};
    if (check_files(use, COUNT(use)) || mamba_state_save(x->model, x->state, path)) return -1;
    fprintf(stderr, "saved\n");
    return 0;
}

static int session_load(Session *x, UndoStack *undo, const char *path) {
    State *before = mamba_state_new(x->model); // becomes a turn to undo only if the load succeeds
    if (!before) return -1;
    mamba_state_copy(x->model, before, x->state);
    int result = mamba_state_load(x->model, x->state, path);
    if (result == 0) result = undo_push(undo, x->model, before);
    if (result == 0)
        fprintf(stderr, "loaded: %llu tokens\n", (unsigned long long)x->state->position);
    mamba_state_free(before);
    return result;
}

static void session_command(Session *x, const char *model_path, UndoStack *undo, const char *line) {
    int result = 0;
    if (!strcmp(line, "/undo")) undo_pop(undo, x->model, x->state);
    else if (!strcmp(line, "/help")) fprintf(stderr, "%s", SESSION_HELP);
    else if (!strcmp(line, "/reset")) result = session_reset(x, undo);
    else if (!strncmp(line, "/save ", 6)) result = session_save(x, model_path, line + 6);
    else if (!strncmp(line, "/load ", 6)) result = session_load(x, undo, line + 6);
    else fprintf(stderr, "unknown command '%s' (try /help)\n", line);
    if (result) fprintf(stderr, "mamba: %s\n", mamba_error());
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

// One line of stdin without its end, malloc'd. NULL at the end of the input, after Ctrl-C, or, with
// *failed set, after fail().
static char *read_line(size_t *length, bool *failed) {
    size_t n;
    int end;
    char *line = read_bytes(&n, &end);
    *failed = !line;
    if (!line) return NULL;
    if (end == EOF && ferror(stdin) && !interrupted) {
        *failed = true;
        fail("stdin: %s", strerror(errno));
    }
    if (end == EOF && (n == 0 || ferror(stdin))) {
        free(line);
        return NULL;
    }
    if (n && line[n - 1] == '\r') n--;
    line[n] = 0;
    *length = n;
    return line;
}

// --- the session

// Reads a line of text and writes what follows. 0, or -1 after fail() where the session must end.
static int session_turn(Session *x, const GenerateOptions *o, UndoStack *undo, const char *text,
                        size_t bytes) {
    GenerateOptions turn = *o;
    turn.save = NULL;
    turn.no_echo = true;
    if (undo_push(undo, x->model, x->state)) return -1;
    if (generate_once(x, &turn, text, bytes, NULL)) {
        fprintf(stderr, "mamba: %s\n", mamba_error());
        undo_pop(undo, x->model, x->state);
    }
    return 0;
}

// 0, or -1 after fail().
static int interactive(Session *x, const GenerateOptions *o) {
    UndoStack undo = {.n = 0};
    int result = 0;
    bool leaves = false;
    fprintf(stderr, "%s", SESSION_HELP);
    while (result == 0 && !leaves) {
        size_t length = 0;
        bool failed;
        signal(SIGINT, on_kill);
        if (o->save) catch_interrupt_reading(); // Ctrl-C here leaves the session, which saves
        fprintf(stderr, "> ");
        char *line = read_line(&length, &failed);
        leaves = !line || !strcmp(line, "/quit");
        if (failed) result = -1;
        if (!leaves && line[0] == '/' && line[1] != '/') {
            session_command(x, o->model_path, &undo, line);
        } else if (!leaves) {
            size_t skip = line[0] == '/'; // of "//"
            catch_interrupt();
            result = session_turn(x, o, &undo, line + skip, length - skip);
            printf("\n");
            fflush(stdout);
        }
        free(line);
    }
    while (undo.n) mamba_state_free(undo.before[--undo.n]);
    if (o->save && mamba_state_save(x->model, x->state, o->save)) result = -1;
    return result;
}
