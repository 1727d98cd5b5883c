// cli/options.h - what every command is made of besides its table of options (cli/help.h): the
// check of the files that it names, text input, Ctrl-C, and the session that runs a model.
//
// Depends on cli/help.h, the API of mamba.c, files/bytes.h (fail) and files/new_file.h (NewFile,
// temporaries).
// Text goes to stdout, everything about it to stderr.

// Seconds since some moment. Never the same twice: where the clock stands still, time still passes
// (0.1 microseconds a call), and a speed is a number.
static double seconds(void) {
    static double last;
#if defined(MAMBA_POSIX) && defined(CLOCK_MONOTONIC)
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    double time = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
#elif defined(TIME_UTC) && !defined(_WIN32)
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    double time = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
#elif defined(_WIN32)
    LARGE_INTEGER ticks, rate;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&rate);
    double time = (double)ticks.QuadPart / (double)rate.QuadPart;
#else
    double time = (double)clock() / CLOCKS_PER_SEC;
#endif
    if (time < last + 1e-7) time = last + 1e-7;
    last = time;
    return time;
}

static const char *type_name(Type type) {
    static const char *const name[N_TYPES] = {"f32", "f16", "bf16", "q8", "q4"};
    return name[type];
}

// --- the files of a command: no output may be an input or another output

// What tells one file from another: its inode. A file that does not exist yet is told by the inode
// of its folder and its name.
typedef struct {
    bool known;
    uint64_t device, inode;
    char name[256];
} FileId;

// path "-" is stdin. Devices and pipes get no identity: writing to them destroys nothing.
static FileId file_id(const char *path) {
    FileId id = {0};
    FileInfo info = {0};
    bool is_stdin = !strcmp(path, "-");
    if (is_stdin ? stream_info(0, &info) : file_info(path, &info)) id.known = info.regular;
    else if (!is_stdin) {
        char *end = follow_links(path);
        if (!end) return id;
        char *name = file_name_in(end);
        snprintf(id.name, sizeof id.name, "%s", name);
        *name = 0; // what is left is the folder
        id.known = file_info(*end ? end : ".", &info);
        free(end);
    }
    id.device = info.device;
    id.inode = info.inode;
    return id;
}

static bool same_file(const char *a, const char *b) {
    if (!CAN_TELL_FILES) return !strcmp(a, b);
    FileId one = file_id(a), other = file_id(b);
    bool same_name = !strcmp(one.name, other.name);
#ifdef _WIN32
    same_name = !_stricmp(one.name, other.name);
#endif
    return one.known && other.known && one.device == other.device && one.inode == other.inode &&
           same_name;
}

// What a file holds, by its first bytes. An empty one holds nothing.
typedef enum {
    NOTHING,
    A_MODEL,
    A_STATE,
    A_CHECKPOINT,
    A_LOG,
    A_TOKENIZER,
    SOMETHING,
    UNREADABLE
} Holds;
static const char *const HOLDS_NAME[] = {
    "nothing",        "a model",     "a state",       "a training checkpoint",
    "a training log", "a tokenizer", "something else"};

// UNREADABLE: errno says why.
static Holds file_holds(const char *path) {
    static const char *const magic[] = {MODEL_FORMAT.magic, STATE_FORMAT.magic,
                                        CHECKPOINT_FORMAT.magic, "step,tok", "mtok"};
    char h[8] = {0};
    FileInfo info; // a pipe is not read: its bytes would be lost
    if (file_info(path, &info) && !info.regular) return SOMETHING;
    FILE *f = fopen(path, "rb");
    if (!f) return errno == ENOENT ? NOTHING : UNREADABLE;
    size_t n = fread(h, 1, sizeof h, f);
    const int error = ferror(f) ? errno : 0;
    fclose(f);
    errno = error;
    for (int i = 0; i < COUNT(magic); i++)
        if (!memcmp(h, magic[i], i + A_MODEL == A_TOKENIZER ? 4 : sizeof h))
            return (Holds)(A_MODEL + i);
    return error ? UNREADABLE : n ? SOMETHING : NOTHING;
}

typedef enum {
    INPUT,
    OUTPUT,       // the command itself says what may be replaced
    OUTPUT_MODEL, // replaces a model
    OUTPUT_STATE, // replaces a state
    OUTPUT_LOG,   // replaces a log of training; a device or pipe is allowed
    OUTPUT_PLAIN, // has no header: replaces what has none of ours; a device or pipe is allowed
} FileKind;
typedef struct {
    FileKind kind;
    const char *role;     // as an error names it: "the model", "-o"; "": by its path
    const char *path;     // NULL: not given
    const char *replaces; // an output: the role of the input that it may be
} FileUse;

// Whether path can be written; found out before hours of work. 0, or -1 after fail().
static int check_writable(const char *path, bool in_place) {
    NewFile w;
    FileInfo info; // a pipe is not opened: that would wait for its reader
    bool exists = file_info(path, &info);
    if (!exists && errno != ENOENT) // a name that is too long, for one
        return fail("cannot write %s: %s", path, strerror(errno));
    if (exists && in_place && !is_replaceable(path))
        return info.folder ? fail("cannot write %s: a directory", path) : 0;
    if (new_file_open(&w, path, in_place)) return -1;
    new_file_discard(&w);
    return 0;
}

// The names of checkpoint and log are made from -o, so -o must change.
static const char *other_name(const FileUse *out) {
    return strncmp(out->role, "the ", 4) ? "" : " for -o";
}

// Output use[i] is neither an input nor an output before it. 0, or -1 after fail().
static int check_output(const FileUse *use, int n, int i) {
    const FileUse *out = &use[i];
    const char *what = other_name(out);
    const char *role = out->role, *space = *role ? " " : "";
    if (!*out->path)
        return fail("%s needs a file name, not an empty text", *role ? role : "the output");
    for (int j = 0; j < n; j++) {
        const FileUse *other = &use[j];
        bool allowed = out->replaces && !strcmp(out->replaces, other->role);
        if (!other->path || allowed || (other->kind != INPUT && j >= i)) continue;
        if (!same_file(out->path, other->path)) continue;
        return fail("%s%s%s: that is %s%s; choose another name%s", role, space, out->path,
                    other->kind == INPUT ? "" : "also ", other->role, what);
    }
    return 0;
}

// An output that exists is of the kind that replaces it. 0, or -1 after fail().
static int check_replaced(const FileUse *out) {
    if (out->kind == OUTPUT || !is_replaceable(out->path)) return 0;
    const Holds old = file_holds(out->path);
    const Holds wanted = out->kind == OUTPUT_MODEL   ? A_MODEL
                         : out->kind == OUTPUT_STATE ? A_STATE
                         : out->kind == OUTPUT_LOG   ? A_LOG
                                                     : SOMETHING;
    if (old == NOTHING || old == wanted) return 0;
    if (old == UNREADABLE)
        return fail("cannot write %s: what it holds cannot be read: %s", out->path,
                    strerror(errno));
    return fail("%s%s%s: that holds %s%s%s; choose another name%s, or remove it", out->role,
                *out->role ? " " : "", out->path, HOLDS_NAME[old],
                wanted == SOMETHING ? "" : ", not ", wanted == SOMETHING ? "" : HOLDS_NAME[wanted],
                other_name(out));
}

// Every output of a command can be written, is neither an input nor another output, and replaces
// nothing of another kind. Called before the work begins. 0, or -1 after fail().
static int check_files(const FileUse *use, int n) {
    for (int i = 0; i < n; i++)
        if (use[i].kind != INPUT && use[i].path && check_output(use, n, i)) return -1;
    for (int i = 0; i < n; i++) {
        bool in_place = use[i].kind >= OUTPUT_LOG;
        if (use[i].kind != INPUT && use[i].path &&
            (check_writable(use[i].path, in_place) || check_replaced(&use[i])))
            return -1;
    }
    return 0;
}

// --- the model's file, and what to do with another

// Whether path ends in one of these.
static UNUSED bool has_ending(const char *path, const char *const *ending) {
    size_t n = strlen(path);
    for (; *ending; ending++) {
        size_t length = strlen(*ending);
        if (n > length && !strcmp(path + n - length, *ending)) return true;
    }
    return false;
}

#ifdef MAMBA_POSIX
// A folder's names, one after another, NULL at the end, which closes it. NULL at once: no folder.
typedef DIR *Folder;
static Folder folder_open(const char *path) { return opendir(path); }
static const char *folder_next(Folder folder) {
    const struct dirent *e = folder ? readdir(folder) : NULL;
    if (folder && !e) closedir(folder);
    return e ? e->d_name : NULL;
}
#else
typedef void *Folder; // names are not listed
static Folder folder_open(const char *path) { return (void)path, NULL; }
static const char *folder_next(Folder folder) { return (void)folder, NULL; }
#endif

// A folder is no model: says what to do with what is in it. Returns -1.
static int explain_folder(const char *path) {
    static const char *const weights[] = {".safetensors", "pytorch_model.bin",
                                          ".safetensors.index.json", NULL};
    static const char *const models[] = {".bin", NULL};
    char first[256] = "";
    bool checkpoint = false;
    Folder folder = folder_open(path);
    for (const char *name; (name = folder_next(folder)) != NULL;) {
        checkpoint |= has_ending(name, weights) || !strcmp(name, "config.json");
        bool earlier = !first[0] || strcmp(name, first) < 0;
        if (has_ending(name, models) && earlier) snprintf(first, sizeof first, "%s", name);
    }
    const char *slash = path[strlen(path) - 1] == '/' ? "" : "/";
    if (checkpoint)
        return fail("%s is a folder with a checkpoint: make a model.bin of it with "
                    "`python export.py %s model.bin`",
                    path, path);
    if (first[0])
        return fail("%s is a folder: name a model in it, for example %s%s%s", path, path, slash,
                    first);
    return fail("%s is a folder; a model is a file such as models/story.bin", path);
}

// Finds the model or tokenizer whose name is nearest to path in its folder. Whether there is one.
static bool find_near(char found[256], const char *path) {
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    const size_t start = (size_t)(base - path);
    int best = 3; // edits
    if (strlen(path) >= 200 || strlen(base) < 5) return false;
    snprintf(found, 256, "%.*s", slash ? (int)start : 2, slash ? path : "./");
    Folder folder = folder_open(found);
    for (const char *name; (name = folder_next(folder)) != NULL;) {
        char near[256];
        int n = edits(base, name);
        if (n >= best || name[0] == '.') continue;
        snprintf(near, sizeof near, "%.*s%.40s", (int)start, path, name);
        const Holds holds = file_holds(near);
        if (holds != A_MODEL && holds != A_TOKENIZER) continue;
        best = n;
        memcpy(found, near, sizeof near);
    }
    return best < 3;
}

// What path names where there is no such file. Returns -1.
static int explain_missing(const char *path) {
    static const char *const tries[] = {"models/%s", "%s.bin", "models/%s.bin"};
    const char *slash = strchr(path, '/');
    char name[256];
    for (int i = 0; i < COUNT(tries) && strlen(path) < 200; i++) {
        snprintf(name, sizeof name, tries[i], path);
        FILE *f = fopen(name, "rb");
        if (!f) continue;
        fclose(f);
        return fail("%s: no such file; did you mean %s?", path, name);
    }
    if (find_near(name, path)) return fail("%s: no such file; did you mean %s?", path, name);
    if (slash && slash != path && slash[1] && !strchr(slash + 1, '/') && path[0] != '.' &&
        path[0] != '~' && !strchr(slash, '.'))
        return fail("%s: no such file; if it is a model of the Hugging Face hub, fetch it with "
                    "`python export.py %s model.bin`",
                    path, path);
    return fail("%s: No such file or directory", path);
}

// Whether there is such a file, and no folder. 0, or -1 after fail(), which says what to type
// instead.
static int check_is_file(const char *path) {
    FileInfo info;
    if (!*path) return fail("the name of a file is empty");
    if (!file_info(path, &info))
        return CAN_TELL_FILES && errno == ENOENT ? explain_missing(path) : 0;
    return info.folder ? explain_folder(path) : 0;
}

// Whether path may be a model.bin. 0, or -1 after fail(), which says what to do with a file that is
// something else.
static int check_model_path(const char *path) {
    unsigned char h[16] = {0};
    FileInfo info;
    if (check_is_file(path)) return -1;
    if (CAN_TELL_FILES && (!file_info(path, &info) || !info.regular))
        return 0; // the loader says so
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(h, 1, sizeof h, f) : 0;
    if (f) fclose(f);
    if (n < sizeof h) return 0;
    if (h[8] == '{' && u64_at(h) < 1 << 28)
        return fail("%s is a safetensors file: make a model.bin of its folder with "
                    "`python export.py FOLDER model.bin`",
                    path);
    if (!memcmp(h, "PK\3\4", 4))
        return fail("%s is a PyTorch file: make a model.bin of its folder with "
                    "`python export.py FOLDER model.bin`",
                    path);
    if (!memcmp(h, "GGUF", 4))
        return fail("%s is a GGUF file: make a model.bin of it with `python export.py %s "
                    "model.bin`",
                    path, path);
    if (!memcmp(h, "mtok", 4)) return fail("%s is a tokenizer, not a model.bin", path);
    if (!memcmp(h, STATE_FORMAT.magic, sizeof STATE_FORMAT.magic))
        return fail("%s is a saved state, not a model.bin: give it after --load-state", path);
    if (!memcmp(h, CHECKPOINT_FORMAT.magic, sizeof CHECKPOINT_FORMAT.magic))
        return fail("%s is a training checkpoint, not a model.bin: the model lies beside it, "
                    "without .train",
                    path);
    return 0;
}

// Whether the first of two arguments can be the model and not the second. prompt: the second is a
// text, not a file. 0, or -1 after fail().
static int check_model_first(const char *command, const char *first, const char *second,
                             bool prompt) {
    const Holds holds = second && *first ? file_holds(first) : NOTHING;
    if (!second || (holds != NOTHING && holds != SOMETHING) || file_holds(second) != A_MODEL)
        return 0;
    const char *quote = prompt ? "\"" : "";
    return fail("the model comes first: mamba %s%s %s%s%s", command, second, quote, first, quote);
}

// Whether path can be a text to read. 0, or -1 after fail(), which says how to give a text itself.
static int check_text_path(const char *command, const char *model, const char *path) {
    FileInfo info;
    if (!CAN_TELL_FILES || !strcmp(path, "-") || file_info(path, &info) || errno != ENOENT)
        return 0;
    return fail("%s: no such file; %s reads a file, or a text from stdin: echo \"...\" | mamba %s "
                "%s -",
                path, command, command, model);
}

static const char *volatile running_model; // its path, for on_lost_file()

// mamba_load(), with an answer for what is no model.bin. NULL after fail().
static Model *load_model(const char *path) {
    running_model = path;
    return check_model_path(path) ? NULL : mamba_load(path);
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

static void remove_temporaries(void) {
    for (int i = 0; i < TEMPORARIES; i++) {
        const char *name = temporaries[i];
#ifdef MAMBA_POSIX
        if (name) unlink(name);
#else
        if (name) remove(name);
#endif
    }
}

// Ends the program as the signal does by default, after removing unfinished files.
static void on_kill(int number) {
    remove_temporaries();
    signal(number, SIG_DFL);
    raise(number);
}

// Takes `--cpu-level NAME` out of the arguments of any command: of the sets of instructions that
// the program was compiled for (make dist), the one to use. 0, or -1 after fail().
static UNUSED int take_level(int *argc, char **argv) {
    for (int i = 1; i < *argc && strcmp(argv[i], "--"); i++) {
        if (strcmp(argv[i], "--cpu-level")) continue;
        if (i + 1 == *argc) return fail("--cpu-level needs a value: base, avx2 or avx512");
#ifdef MAMBA_LEVELS
        if (cpu_choose_level(argv[i + 1])) return -1;
#else
        return fail("--cpu-level: this program has one set of instructions (make dist has more)");
#endif
        *argc -= 2;
        for (int k = i; k <= *argc; k++) argv[k] = argv[k + 2]; // the NULL at the end too
        return 0;
    }
    return 0;
}

#if defined(SIGBUS) && defined(MAMBA_POSIX)
// A mapped file has lost its end, or its disk failed: a read of the weights ends here.
static void on_lost_file(int number) {
    const char *const part[] = {"mamba: ", running_model ? running_model : "a file",
                                ": cut short while it was in use, or its disk failed: the run ends "
                                "here. Replace a model with mv, not with cp, while it runs\n"};
    (void)number;
    for (int i = 0; i < COUNT(part); i++)
        if (write(STDERR_FILENO, part[i], strlen(part[i])) < 0) break;
    remove_temporaries();
    _exit(1);
}
#endif

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

// A standard stream that is closed gets the null device, so that no file that is opened later takes
// its place, and progress lines never go into a model. Reads of stdin and writes of stdout fail
// there, with a sentence; what goes to stderr is lost, as was asked for.
static void open_standard_streams(void) {
#ifdef MAMBA_POSIX
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 1 ? O_RDONLY : O_WRONLY) != fd)
            _exit(1); // there is nowhere to say why
#endif
}

static bool quiet; // --quiet of eval and train: errors alone go to stderr
#define QUIET_OPTION \
    OPTION_SWITCH("--quiet", &quiet, "or -q: write errors alone to stderr, no progress")

// printf to stderr, unless quiet.
static void note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (!quiet) vfprintf(stderr, format, args);
    va_end(args);
}

// At the start of main. Signals that end the process remove its temporaries first, and the standard
// streams carry bytes.
static UNUSED void prepare_process(void) {
    open_standard_streams();
    static const int deadly[] = {
        SIGINT,
        SIGTERM,
#ifdef SIGHUP
        SIGHUP,
#endif
    };
    for (int i = 0; i < COUNT(deadly); i++)
        if (signal(deadly[i], on_kill) == SIG_IGN) signal(deadly[i], SIG_IGN); // nohup
#if defined(SIGBUS) && defined(MAMBA_POSIX)
    signal(SIGBUS, on_lost_file);
#endif
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
                  "on a GPU: float32 products also for bf16 and f16 weights and in training")
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
    x->model = load_model(path);
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
