// cli/options.h - what every command is made of: a table of options with its help, the check of
// the files that a command names, text input, Ctrl-C, and the session that runs a model.
//
// Depends on the API of mamba.c, files/bytes.h (fail) and files/new_file.h (NewFile, temporaries).
// Text goes to stdout, everything about it to stderr.

static double seconds(void) {
#ifdef TIME_UTC
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
#else
    // Windows, where timespec_get may be missing: clock() is wall-clock time there.
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

static const char *type_name(Type type) {
    static const char *const name[N_TYPES] = {"f32", "f16", "bf16", "q8", "q4"};
    return name[type];
}

// --- options: a table describes them; it parses, checks ranges and prints the help

typedef enum { OPT_SWITCH, OPT_INT, OPT_REAL, OPT_TEXT, OPT_LIST } OptionKind;
enum { LIST_MAX = 16 };
typedef struct {
    int n;
    const char *item[LIST_MAX];
} TextList;

typedef struct {
    const char *name, *argument, *help;
    OptionKind kind;
    void *value; // bool, long, double, const char * or TextList; holds the default
    double lowest, highest;
} Option;

// Rows of an option table. The value comes first, the help last.
#define OPTION_SWITCH(name, value, help) {name, "", help, OPT_SWITCH, value, 0, 0}
#define OPTION_INT(name, argument, value, lowest, highest, help) \
    {name, argument, help, OPT_INT, value, lowest, highest}
#define OPTION_REAL(name, argument, value, lowest, highest, help) \
    {name, argument, help, OPT_REAL, value, lowest, highest}
#define OPTION_TEXT(name, argument, value, help) {name, argument, help, OPT_TEXT, value, 0, 0}
#define OPTION_LIST(name, argument, value, help) {name, argument, help, OPT_LIST, value, 0, 0}

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static int parse_number(const Option *o, const char *text) {
    const bool whole = o->kind == OPT_INT;
    char *end = NULL;
    errno = 0;
    double x = whole ? (double)strtoll(text, &end, 10) : strtod(text, &end);
    if (end == text || *end || errno == ERANGE || x != x)
        return fail("%s needs %s, not '%s'", o->name, whole ? "a whole number" : "a number", text);
    double highest = whole ? fmin(o->highest, (double)LONG_MAX) : o->highest; // long of 32 bits
    if (!(x >= o->lowest && x <= highest))
        return fail("%s %s is out of range: %.10g to %.10g", o->name, text, o->lowest, highest);
    if (whole) *(long *)o->value = strtol(text, NULL, 10);
    else *(double *)o->value = x;
    return 0;
}

static int parse_list_item(const Option *o, const char *text) {
    TextList *list = o->value;
    if (list->n == LIST_MAX) return fail("%s was given more than %d times", o->name, LIST_MAX);
    if (!*text) return fail("%s needs a text that is not empty", o->name);
    list->item[list->n++] = text;
    return 0;
}

static int parse_value(const Option *o, const char *text) {
    if (o->kind == OPT_LIST) return parse_list_item(o, text);
    if (o->kind != OPT_TEXT) return parse_number(o, text);
    *(const char **)o->value = text;
    return 0;
}

static const Option *find_option(const char *name, const Option *options, int n_options) {
    for (int i = 0; i < n_options; i++)
        if (!strcmp(name, options[i].name)) return &options[i];
    return NULL;
}

// Parses the options in argv[1..argc). The other arguments go, in order, into rest (room for max).
// Returns how many those are, or -1 after fail(). After `--` nothing is an option. `-` alone is
// never an option, nor is a number such as -1 that follows an option.
static int parse_options(int argc, char **argv, const Option *options, int n_options,
                         const char **rest, int max) {
    int n_rest = 0;
    bool only_rest = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (!only_rest && !strcmp(arg, "--")) {
            only_rest = true;
            continue;
        }
        if (only_rest || arg[0] != '-' || !arg[1]) {
            if (n_rest == max)
                return fail("one argument too many: '%s' (a prompt with spaces needs quotes)", arg);
            rest[n_rest++] = arg;
            continue;
        }
        const Option *o = find_option(arg, options, n_options);
        if (!o)
            return fail("unknown option '%s' (put -- before a prompt that starts with a dash)",
                        arg);
        if (o->kind == OPT_SWITCH) {
            *(bool *)o->value = true;
            continue;
        }
        i++;
        if (i == argc) return fail("%s needs a value: %s", o->name, o->argument);
        if (parse_value(o, argv[i])) return -1;
    }
    return n_rest;
}

static bool wants_help(int argc, char **argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return true;
    return false;
}

enum { HELP_COLUMN = 22, HELP_WIDTH = 100 };

// Prints a word of a help text after a space, or on a new line where it does not fit. Returns the
// column after it.
static int print_word(const char *word, int length, int column) {
    if (column + 1 + length > HELP_WIDTH) {
        printf("\n%*s", HELP_COLUMN - 1, "");
        column = HELP_COLUMN - 1;
    }
    printf(" %.*s", length, word);
    return column + 1 + length;
}

static void default_text(char text[64], const Option *o) {
    text[0] = 0;
    if (o->kind == OPT_INT && *(long *)o->value != LONG_MIN)
        snprintf(text, 64, "(default %ld)", *(long *)o->value);
    if (o->kind == OPT_REAL) snprintf(text, 64, "(default %g)", *(double *)o->value);
    if (o->kind == OPT_TEXT && *(const char **)o->value)
        snprintf(text, 64, "(default %s)", *(const char **)o->value);
}

// Returns 0, the result of a command that shows its help.
static int print_help(const char *usage, const Option *options, int n_options) {
    printf("%s", usage);
    if (n_options) printf("\nOptions:\n");
    for (int i = 0; i < n_options; i++) {
        const Option *o = &options[i];
        char value[64];
        int column = printf("  %s %s", o->name, o->argument);
        if (column < HELP_COLUMN - 1) column += printf("%*s", HELP_COLUMN - 1 - column, "");
        for (const char *word = o->help; *word;) {
            size_t length = strcspn(word, " ");
            column = print_word(word, (int)length, column);
            word += length;
            word += strspn(word, " ");
        }
        default_text(value, o);
        if (value[0]) print_word(value, (int)strlen(value), column);
        printf("\n");
    }
    return 0;
}

// --- the files of a command: no output may be an input or another output

// What tells one file from another: its inode. A file that does not exist yet is told by the inode
// of its folder and its name.
typedef struct {
    bool known;
    uint64_t device, inode;
    char name[256];
} FileId;

#ifdef MAMBA_POSIX
// path "-" is stdin. Devices and pipes get no identity: writing to them destroys nothing.
static FileId file_id(const char *path) {
    FileId id = {0};
    struct stat info;
    bool is_stdin = !strcmp(path, "-");
    if ((is_stdin ? fstat(STDIN_FILENO, &info) : stat(path, &info)) == 0) {
        id.known = S_ISREG(info.st_mode);
    } else if (!is_stdin) {
        char *end = follow_links(path);
        if (!end) return id;
        char *slash = strrchr(end, '/');
        snprintf(id.name, sizeof id.name, "%s", slash ? slash + 1 : end);
        if (slash) slash[slash == end] = 0; // "/name" is in "/"
        id.known = stat(slash ? end : ".", &info) == 0;
        free(end);
    }
    if (!id.known) return id;
    id.device = (uint64_t)info.st_dev;
    id.inode = (uint64_t)info.st_ino;
    return id;
}

static bool same_file(const char *a, const char *b) {
    FileId one = file_id(a), other = file_id(b);
    return one.known && other.known && one.device == other.device && one.inode == other.inode &&
           !strcmp(one.name, other.name);
}
#else
static bool same_file(const char *a, const char *b) {
#ifdef _WIN32
    char one[_MAX_PATH], other[_MAX_PATH];
    if (_fullpath(one, a, sizeof one) && _fullpath(other, b, sizeof other))
        return !_stricmp(one, other);
#endif
    return !strcmp(a, b);
}
#endif

typedef enum { INPUT, OUTPUT, OUTPUT_IN_PLACE } FileKind; // in place: a device or pipe is allowed
typedef struct {
    FileKind kind;
    const char *role;     // as an error names it: "the model", "-o"
    const char *path;     // NULL: not given
    const char *replaces; // an output: the role of the input that it may be
} FileUse;

// Whether path can be written; found out before hours of work. 0, or -1 after fail().
static int check_writable(const char *path, bool in_place) {
    NewFile w;
#ifdef MAMBA_POSIX
    struct stat info; // a pipe is not opened: that would wait for its reader
    if (in_place && !is_replaceable(path) && stat(path, &info) == 0)
        return S_ISDIR(info.st_mode) ? fail("cannot write %s: a directory", path) : 0;
#endif
    if (new_file_open(&w, path, in_place)) return -1;
    new_file_discard(&w);
    return 0;
}

// Output use[i] is neither an input nor an output before it. 0, or -1 after fail().
static int check_output(const FileUse *use, int n, int i) {
    const FileUse *out = &use[i];
    // The names of checkpoint and log are made from -o, so -o must change.
    const char *what = strncmp(out->role, "the ", 4) ? "" : " for -o";
    if (!*out->path) return fail("%s needs a file name, not an empty text", out->role);
    for (int j = 0; j < n; j++) {
        const FileUse *other = &use[j];
        bool allowed = out->replaces && !strcmp(out->replaces, other->role);
        if (!other->path || allowed || (other->kind != INPUT && j >= i)) continue;
        if (!same_file(out->path, other->path)) continue;
        return fail("%s %s: that is %s%s; choose another name%s", out->role, out->path,
                    other->kind == INPUT ? "" : "also ", other->role, what);
    }
    return 0;
}

// Every output of a command can be written and is neither an input nor another output. Called
// before the work begins. 0, or -1 after fail().
static int check_files(const FileUse *use, int n) {
    for (int i = 0; i < n; i++)
        if (use[i].kind != INPUT && use[i].path && check_output(use, n, i)) return -1;
    for (int i = 0; i < n; i++) {
        bool in_place = use[i].kind == OUTPUT_IN_PLACE;
        if (use[i].kind != INPUT && use[i].path && check_writable(use[i].path, in_place)) return -1;
    }
    return 0;
}

// --- text input

// The rest of f with a NUL after it, malloc'd. Closes f, unless it is stdin. NULL after fail().
static char *read_stream(FILE *f, const char *path, size_t *bytes) {
    size_t room = 1 << 16, n = 0;
    char *text = malloc(room);
    while (text) {
        n += fread(text + n, 1, room - 1 - n, f);
        if (n < room - 1) break; // end of file or error
        char *larger = room > SIZE_MAX / 2 ? NULL : realloc(text, room * 2);
        if (!larger) free(text);
        text = larger;
        room *= 2;
    }
    bool bad = ferror(f) != 0;
    if (f != stdin) fclose(f);
    if (!text) {
        fail("%s: out of memory after %zu bytes", path, n);
        return NULL;
    }
    if (bad) {
        free(text);
        fail("%s: %s", path, strerror(errno));
        return NULL;
    }
    char *fitted = realloc(text, n + 1); // a million tokens may need memory beside the text
    if (fitted) text = fitted;
    text[n] = 0;
    *bytes = n;
    return text;
}

// A whole file, or stdin for "-", malloc'd. NULL after fail().
static char *read_text(const char *path, size_t *bytes) {
    FILE *f = !strcmp(path, "-") ? stdin : fopen(path, "rb");
    if (f) return read_stream(f, path, bytes);
    fail("%s: %s", path, strerror(errno));
    return NULL;
}

// --- the process: memory and signals

static double peak_megabytes(void) { // 0 where the platform does not say
#ifdef MAMBA_POSIX
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage)) return 0;
#ifdef __APPLE__
    return (double)usage.ru_maxrss / 1e6;
#else
    return (double)usage.ru_maxrss * 1024 / 1e6;
#endif
#else
    return 0;
#endif
}

// Ends the program as the signal does by default, after removing unfinished files.
static void on_kill(int number) {
    for (int i = 0; i < TEMPORARIES; i++) {
        const char *name = temporaries[i];
#ifdef MAMBA_POSIX
        if (name) unlink(name);
#else
        if (name) remove(name);
#endif
    }
    signal(number, SIG_DFL);
    raise(number);
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number) {
    interrupted = 1;
    signal(number, on_kill); // a second Ctrl-C ends the program at once
}

// From here on Ctrl-C sets `interrupted`.
static void catch_interrupt(void) {
    interrupted = 0;
    signal(SIGINT, on_interrupt);
}

// At the start of main. Signals that end the process remove its temporaries first, and the standard
// streams carry bytes.
static UNUSED void prepare_process(void) {
    static const int deadly[] = {
        SIGINT,
        SIGTERM,
#ifdef SIGHUP
        SIGHUP,
#endif
    };
    for (int i = 0; i < COUNT(deadly); i++)
        if (signal(deadly[i], on_kill) == SIG_IGN) signal(deadly[i], SIG_IGN); // nohup
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a file beyond `ulimit -f` is a failed write, which gets a sentence
#endif
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
}

// --- the session: a loaded model and what it needs to run

static struct {
    bool cpu, float32;
} backend; // where commands run the model

// clang-format off
#define BACKEND_OPTIONS \
    OPTION_SWITCH("--cpu", &backend.cpu, \
                  "run on the processor, also where the build has a GPU backend"), \
    OPTION_SWITCH("--float32", &backend.float32, \
                  "on a GPU: float32 products also for bf16 weights and in training")
#define THREADS_OPTION(value) \
    OPTION_INT("-T", "N", value, 1, 1024, "threads; the result does not depend on it")
// clang-format on

typedef struct {
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

// 0, or -1 after fail().
static int session_open(Session *x, const char *path, long threads) {
    double start = seconds();
    memset(x, 0, sizeof *x);
    x->model = mamba_load(path);
    if (x->model) x->acts = mamba_acts_new(x->model, (int)threads);
    bool gpu = x->acts && mamba_has_gpu() && !backend.cpu;
    bool bad = !x->acts || (gpu && mamba_acts_gpu(x->acts, x->model, backend.float32));
    if (!bad) x->state = mamba_state_new(x->model);
    x->load_seconds = seconds() - start;
    if (x->state) return 0;
    session_close(x);
    return -1;
}

// The token that an empty text starts from: end of text, which precedes every text in training.
// -1: none.
static int32_t start_token(const Config *c) { return c->eos[0] >= 0 ? c->eos[0] : c->bos; }
