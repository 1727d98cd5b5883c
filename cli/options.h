// ---------------------------------------------------------------------------------------------------------------------
// 12 Command line
// Text goes to stdout, everything about it to stderr. Options are described by a table, which
// parses them, checks their ranges and prints the help with the defaults.

static double seconds(void) {
#ifdef TIME_UTC
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
#else
    return (double)clock() /
           CLOCKS_PER_SEC; // wall-clock time on Windows, where timespec_get may be missing
#endif
}

static const char *type_name(Type type) {
    static const char *const name[N_TYPES] = {"f32", "f16", "bf16", "q8", "q4"};
    return name[type];
}

typedef enum { OPT_SWITCH, OPT_INT, OPT_REAL, OPT_TEXT, OPT_LIST } OptionKind;
enum { LIST_MAX = 16 };
typedef struct {
    int n;
    const char *item[LIST_MAX];
} TextList;

typedef struct {
    const char *name, *argument, *help;
    OptionKind kind;
    void *value; // bool, long, double, const char * or TextList, holding the default
    double lowest, highest;
} Option;

static int parse_value(const Option *o, const char *text) {
    char *end = NULL;
    errno = 0;
    if (o->kind == OPT_TEXT) {
        *(const char **)o->value = text;
    } else if (o->kind == OPT_LIST) {
        TextList *list = o->value;
        if (list->n == LIST_MAX) return fail("%s was given more than %d times", o->name, LIST_MAX);
        if (!*text) return fail("%s needs a text that is not empty", o->name);
        list->item[list->n++] = text;
    } else {
        double x = o->kind == OPT_INT ? (double)strtoll(text, &end, 10) : strtod(text, &end);
        if (end == text || *end || errno == ERANGE || x != x)
            return fail("%s needs %s, not '%s'", o->name,
                        o->kind == OPT_INT ? "a whole number" : "a number", text);
        double highest = o->kind == OPT_INT ? fmin(o->highest, (double)LONG_MAX)
                                            : o->highest; // where long has 32 bits
        if (!(x >= o->lowest && x <= highest))
            return fail("%s %s is out of range: %.10g to %.10g", o->name, text, o->lowest, highest);
        if (o->kind == OPT_INT) *(long *)o->value = strtol(text, NULL, 10);
        else *(double *)o->value = x;
    }
    return 0;
}

// Takes options out of argv[1..argc) and leaves the others, in order, in rest (room for max).
// Returns how many of those there are, -1 after fail(). After `--` nothing is an option; `-` alone
// and numbers such as -1 after a flag never are.
static int parse_options(int argc, char **argv, const Option *options, int n_options,
                         const char **rest, int max) {
    int n_rest = 0;
    bool only_rest = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (!only_rest && !strcmp(arg, "--")) {
            only_rest = true;
        } else if (only_rest || arg[0] != '-' || !arg[1]) {
            if (n_rest == max)
                return fail("one argument too many: '%s' (a prompt with spaces needs quotes)", arg);
            rest[n_rest++] = arg;
        } else {
            const Option *o = NULL;
            for (int k = 0; k < n_options && !o; k++)
                if (!strcmp(arg, options[k].name)) o = &options[k];
            if (!o)
                return fail("unknown option '%s' (put -- before a prompt that starts with a dash)",
                            arg);
            if (o->kind == OPT_SWITCH) *(bool *)o->value = true;
            else if (i + 1 == argc) return fail("%s needs a value: %s", o->name, o->argument);
            else if (parse_value(o, argv[++i])) return -1;
        }
    }
    return n_rest;
}

static void print_help(const char *usage, const Option *options, int n_options) {
    printf("%s", usage);
    if (n_options) printf("\nOptions:\n");
    for (int i = 0; i < n_options; i++) {
        const Option *o = &options[i];
        int width = printf("  %s %s", o->name, o->argument);
        printf("%*s%s", width < 22 ? 22 - width : 1, "", o->help);
        if (o->kind == OPT_INT && *(long *)o->value != LONG_MIN)
            printf(" (default %ld)", *(long *)o->value);
        if (o->kind == OPT_REAL) printf(" (default %g)", *(double *)o->value);
        if (o->kind == OPT_TEXT && *(const char **)o->value)
            printf(" (default %s)", *(const char **)o->value);
        printf("\n");
    }
}

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static bool wants_help(int argc, char **argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return true;
    return false;
}

// --- the files of a command: no output may be an input or another output

// What tells one file from another: its inode, or, where there is no file yet, its folder's inode
// and its name.
typedef struct {
    bool known;
    uint64_t device, inode;
    char name[256];
} FileId;

#ifdef MAMBA_POSIX
// path "-" is stdin. Devices and pipes have no identity: they lose nothing when they are written.
static FileId file_id(const char *path) {
    FileId id = {0};
    struct stat info;
    bool standard = !strcmp(path, "-");
    if ((standard ? fstat(STDIN_FILENO, &info) : stat(path, &info)) == 0) {
        id.known = S_ISREG(info.st_mode);
    } else if (!standard) {
        char *end = follow_links(path), *slash = end ? strrchr(end, '/') : NULL;
        if (!end) return id;
        snprintf(id.name, sizeof id.name, "%s", slash ? slash + 1 : end);
        if (slash) slash[slash == end] = 0; // "/name" is in "/"
        id.known = stat(slash ? end : ".", &info) == 0;
        free(end);
    }
    if (id.known) id.device = (uint64_t)info.st_dev, id.inode = (uint64_t)info.st_ino;
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

// Finds out before hours of work whether path can be written after them.
static int check_writable(const char *path, bool in_place) {
    NewFile w;
#ifdef MAMBA_POSIX
    struct stat info; // opening a pipe would wait for its reader
    if (in_place && !is_replaceable(path) && stat(path, &info) == 0)
        return S_ISDIR(info.st_mode) ? fail("cannot write %s: a directory", path) : 0;
#endif
    if (new_file_open(&w, path, in_place)) return -1;
    new_file_discard(&w);
    return 0;
}

// Every output of a command can be written and is neither an input nor another output. To be
// called before the work begins. 0, or -1 after fail().
static int check_files(const FileUse *use, int n) {
    for (int i = 0; i < n; i++) {
        const FileUse *out = &use[i];
        const char *what = strncmp(out->role, "the ", 4) ? "" : " for -o"; // out.bin.csv
        if (out->kind == INPUT || !out->path) continue;
        if (!*out->path) return fail("%s needs a file name, not an empty text", out->role);
        for (int j = 0; j < n; j++) {
            const FileUse *in = &use[j];
            if (!in->path || (in->kind != INPUT && j >= i) || !same_file(out->path, in->path) ||
                (out->replaces && !strcmp(out->replaces, in->role)))
                continue;
            return fail(in->kind == INPUT ? "%s %s: that is %s; choose another name%s"
                                          : "%s %s: that is also %s; choose another name%s",
                        out->role, out->path, in->role, what);
        }
    }
    for (int i = 0; i < n; i++)
        if (use[i].kind != INPUT && use[i].path &&
            check_writable(use[i].path, use[i].kind == OUTPUT_IN_PLACE))
            return -1;
    return 0;
}

// All that f holds from here on, with a NUL after it; free() it. Closes f. NULL after fail().
static char *read_stream(FILE *f, const char *path, size_t *bytes) {
    size_t room = 1 << 16, n = 0;
    char *text = malloc(room);
    while (text) {
        size_t got = fread(text + n, 1, room - 1 - n, f);
        n += got;
        if (n < room - 1) break; // end of file or error
        char *larger = room > SIZE_MAX / 2 ? NULL : realloc(text, room * 2);
        if (!larger) free(text);
        text = larger, room *= 2;
    }
    bool bad = ferror(f) != 0;
    if (f != stdin) fclose(f);
    if (!text) return fail("%s: out of memory after %zu bytes", path, n), NULL;
    if (bad) {
        free(text);
        return fail("%s: %s", path, strerror(errno)), NULL;
    }
    char *fitted = realloc(text, n + 1); // the text may live beside a million tokens
    if (fitted) text = fitted;
    text[n] = 0;
    *bytes = n;
    return text;
}

// A whole file, or stdin for "-". NULL after fail().
static char *read_text(const char *path, size_t *bytes) {
    FILE *f = !strcmp(path, "-") ? stdin : fopen(path, "rb");
    if (!f) return fail("%s: %s", path, strerror(errno)), NULL;
    return read_stream(f, path, bytes);
}

static double peak_megabytes(void) { // 0 where the platform does not say
#ifdef MAMBA_POSIX
    struct rusage usage;
    if (!getrusage(RUSAGE_SELF, &usage))
#ifdef __APPLE__
        return (double)usage.ru_maxrss / 1e6;
#else
        return (double)usage.ru_maxrss * 1024 / 1e6;
#endif
#endif
    return 0;
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
static void catch_interrupt(void) {
    interrupted = 0;
    signal(SIGINT, on_interrupt);
}

// The same for a read that waits: Ctrl-C ends it, where signal() would let it wait on.
static void catch_interrupt_reading(void) {
    catch_interrupt();
#ifdef MAMBA_POSIX
    struct sigaction action = {.sa_handler = on_interrupt};
    sigaction(SIGINT, &action, NULL);
#endif
}

// At the start of main: temporaries are removed when the process is ended from outside, and the
// standard streams carry bytes.
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
    _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY); // bytes, not lines
#endif
}
