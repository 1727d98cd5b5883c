// --- interactive session

enum { UNDO_MAX = 32 };
typedef struct {
    State *before[UNDO_MAX]; // states before the last turns, oldest first
    int n;
} UndoStack;

static int undo_push(UndoStack *undo, const Model *m, const State *s) {
    State *copy;
    if (undo->n == UNDO_MAX) { // forget the oldest, reuse its memory
        copy = undo->before[0];
        memmove(undo->before, undo->before + 1, (UNDO_MAX - 1) * sizeof *undo->before);
        undo->n--;
    } else if (!(copy = mamba_state_new(m))) {
        return -1;
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

static const char SESSION_HELP[] =
    "A line is read as it stands, and the model goes on from there; an empty line lets it write "
    "more.\n"
    "  /undo        take the last turn back (up to 32)\n"
    "  /reset       forget everything\n"
    "  /save FILE   save the state      /load FILE   load one\n"
    "  /help        this text           /quit        leave (so does end of input)\n"
    "Ctrl-C stops the writing, not the session. A line that begins with // is text that begins "
    "with /.\n";

static void session_command(Session *x, const char *model_path, UndoStack *undo, const char *line) {
    const Model *m = x->model;
    if (!strcmp(line, "/undo")) undo_pop(undo, m, x->state);
    else if (!strcmp(line, "/help")) fprintf(stderr, "%s", SESSION_HELP);
    else if (!strcmp(line, "/reset")) {
        if (undo_push(undo, m, x->state)) fprintf(stderr, "mamba: %s\n", error_text);
        else mamba_state_reset(m, x->state), fprintf(stderr, "forgotten (/undo brings it back)\n");
    } else if (!strncmp(line, "/save ", 6)) {
        const FileUse use[] = {{INPUT, "the model", model_path, NULL},
                               {OUTPUT, "/save", line + 6, NULL}};
        if (check_files(use, COUNT(use)) || mamba_state_save(m, x->state, line + 6))
            fprintf(stderr, "mamba: %s\n", error_text);
        else fprintf(stderr, "saved\n");
    } else if (!strncmp(line, "/load ", 6)) {
        State *before = mamba_state_new(m); // a turn to undo only if the load succeeds
        if (before) mamba_state_copy(m, before, x->state);
        if (!before || mamba_state_load(m, x->state, line + 6) || undo_push(undo, m, before))
            fprintf(stderr, "mamba: %s\n", error_text);
        else fprintf(stderr, "loaded: %llu tokens\n", (unsigned long long)x->state->position);
        mamba_state_free(before);
    } else fprintf(stderr, "unknown command '%s' (try /help)\n", line);
}

// One line of stdin without its end; NULL at end of input (*failed: after fail()). Ctrl-C ends the
// input too.
static char *read_line(size_t *length, bool *failed) {
    size_t room = 256, n = 0;
    *failed = false;
    char *line = malloc(room);
    int byte = EOF;
    while (line && (byte = getchar()) != EOF && byte != '\n') {
        if (n + 2 > room) {
            char *larger = realloc(line, room *= 2);
            if (!larger) free(line);
            line = larger;
        }
        if (line) line[n++] = (char)byte;
    }
    if (!line)
        return *failed = true, fail("stdin: out of memory after %zu bytes of a line", n), NULL;
    if (byte == EOF && ferror(stdin) && !interrupted)
        *failed = true, fail("stdin: %s", strerror(errno));
    if (byte == EOF && (n == 0 || ferror(stdin))) {
        free(line);
        return NULL;
    }
    if (n && line[n - 1] == '\r') n--;
    line[n] = 0;
    *length = n;
    return line;
}

static int interactive(Session *x, const GenerateOptions *o) {
    UndoStack undo = {.n = 0};
    int result = 0;
    fprintf(stderr, "%s", SESSION_HELP);
    for (char *line; result == 0; free(line)) {
        size_t length;
        bool failed;
        signal(SIGINT, on_kill);
        if (o->save) catch_interrupt_reading(); // Ctrl-C here leaves, and what there is gets saved
        fprintf(stderr, "> ");
        line = read_line(&length, &failed);
        if (!line || !strcmp(line, "/quit")) {
            free(line);
            if (failed) result = -1;
            break;
        }
        const char *text = line[0] == '/' && line[1] == '/' ? line + 1 : line;
        if (line[0] == '/' && line[1] != '/') {
            session_command(x, o->model_path, &undo, line);
            continue;
        }
        catch_interrupt();
        GenerateOptions turn = *o;
        turn.save = NULL, turn.no_echo = true;
        if (undo_push(&undo, x->model, x->state)) result = -1;
        else if (generate_once(x, &turn, text, length - (size_t)(text - line), NULL)) {
            fprintf(stderr, "mamba: %s\n", error_text);
            undo_pop(&undo, x->model, x->state);
        }
        printf("\n");
        fflush(stdout);
    }
    while (undo.n) mamba_state_free(undo.before[--undo.n]);
    if (o->save && mamba_state_save(x->model, x->state, o->save)) result = -1;
    return result;
}

