// What every group of tests shares: the report of a check, the comparison with a reference, random
// numbers, teams of threads.

static int n_passed, n_failed, n_skipped;
static bool test_everything;

// Runs a function of mamba.c that expects to be called by a whole team, on `team` threads.
#define TEAM(call) \
    _Pragma("omp parallel num_threads(team)") { call; }
static int team = 1;

// FREE(a, b, ...) and FREE_ALIGNED(a, b, ...) free every pointer of the list.
static void free_each(void (*release)(void *), void *const *p, size_t n) {
    for (size_t i = 0; i < n; i++) release(p[i]);
}
#define FREE_LIST(release, ...) \
    free_each(release, (void *[]){__VA_ARGS__}, sizeof((void *[]){__VA_ARGS__}) / sizeof(void *))
#define FREE(...) FREE_LIST(free, __VA_ARGS__)
#define FREE_ALIGNED(...) FREE_LIST(free_aligned, __VA_ARGS__)

#ifdef PLAIN // the sizes of cpu/ that shapes of tests are chosen around
enum { VL = 16, NR = 32, MR = 12, KC = 512, X_BLOCK = 4096, FEW_L1 = 6144 };
#endif

// Prints one line for a check and counts it.
static void report(bool good, const char *name, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s %-46s ", good ? "ok  " : "FAIL", name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    if (good) n_passed++;
    else n_failed++;
}

// For a failure without which the rest of the group means nothing.
static _Noreturn void give_up(const char *what, const char *message) {
    printf("FAIL %s: %s\n", what, message);
    exit(1);
}

// -DSMALL: for builds in which all takes ten times as long (emulated processors, sanitizers). The
// larger model and some lengths are left out. The small models run the same code, and the kernels
// are tested at all sizes.
#ifdef SMALL
enum { LARGER_MODELS = 0, EVERY_CUT_TO = 10 };
#else
enum { LARGER_MODELS = 1, EVERY_CUT_TO = 65 };
#endif

// Without OpenMP every team has one thread: a larger one would be the same test again.
#ifdef _OPENMP
enum { MOST_THREADS = 3 };
#else
enum { MOST_THREADS = 1 };
#endif

static void skip(const char *name, const char *reason) {
    printf("skip %-46s %s\n", name, reason);
    n_skipped++;
}

static bool expect(bool condition, const char *name) {
    report(condition, name, "");
    return condition;
}

// The largest error relative to the largest magnitude of want. A NaN or an infinity makes it
// infinite.
static double error_of(const float *got, const double *want, size_t n, size_t *where) {
    double scale = 0, worst = 0;
    *where = 0;
    for (size_t i = 0; i < n; i++) scale = fmax(scale, fabs(want[i]));
    if (scale == 0) scale = 1;
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)got[i] - want[i]) / scale;
        if (!(error <= worst)) {
            worst = error;
            *where = i;
        }
        if (!(error < INFINITY)) return INFINITY;
    }
    return worst;
}

static bool check(const char *name, const float *got, const double *want, size_t n,
                  double tolerance) {
    size_t where;
    double error = error_of(got, want, n, &where);
    bool good = error <= tolerance;
    report(good, name, "error %.2e of %.0e%s", error, tolerance, n ? "" : " (nothing compared)");
    if (!good && n)
        printf("     at %zu of %zu: got %.9g, want %.9g\n", where, n, (double)got[where],
               want[where]);
    return good;
}

static double *doubles(const float *x, size_t n) {
    double *d = malloc((n + 1) * sizeof *d);
    for (size_t i = 0; i < n; i++) d[i] = (double)x[i];
    return d;
}

static bool check_floats(const char *name, const float *got, const float *want, size_t n,
                         double tolerance) {
    double *d = doubles(want, n);
    bool good = check(name, got, d, n, tolerance);
    free(d);
    return good;
}

// Definitions in double precision.
static double softplus_double(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
static double silu_double(double x) { return x / (1 + exp(-x)); }

// Random numbers. Each group starts from the same seed, so it does the same alone and among others.
#ifndef TEST_SEED
#define TEST_SEED 20260101
#endif
static uint64_t test_random; // main() sets it before each group
static float uniform(float lowest, float highest) {
    return lowest + (highest - lowest) * (float)random_unit(&test_random);
}
static float *random_floats(size_t n, float lowest, float highest) {
    float *x = alloc_aligned((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = uniform(lowest, highest);
    return x;
}
static float *copy_floats(const float *x, size_t n) {
    float *copy = alloc_aligned((n + 1) * sizeof *copy);
    memcpy(copy, x, n * sizeof *copy);
    return copy;
}

// The path of a temporary file, in a folder of this run: two runs at once do not share files. The
// folder goes when the program ends. It lies in memory where that is possible: thousands of damaged
// files take a minute on a disk. Each name has a buffer of its own, so two paths can be in use.
static char scratch_folder[256];
static char scratch_files[8][288];

static void scratch_remove(void) {
    for (int i = 0; i < COUNT(scratch_files) && *scratch_files[i]; i++) remove(scratch_files[i]);
    remove(scratch_folder);
}

static void scratch_open(void) {
    const char *parents[] = {getenv("TMPDIR"), "/dev/shm", "/tmp", "tests"};
    for (int i = 0; i < COUNT(parents); i++) {
        if (!parents[i] || !*parents[i]) continue;
        snprintf(scratch_folder, sizeof scratch_folder, "%s/mamba-test-XXXXXX", parents[i]);
        if (!mkdtemp(scratch_folder)) continue;
        atexit(scratch_remove);
        return;
    }
    give_up("no folder for temporary files", strerror(errno));
}

static const char *scratch(const char *name) {
    if (!*scratch_files[0]) scratch_open();
    char path[288];
    snprintf(path, sizeof path, "%s/%s", scratch_folder, name);
    int i = 0;
    while (i < COUNT(scratch_files) - 1 && *scratch_files[i] && strcmp(scratch_files[i], path)) i++;
    assert(!*scratch_files[i] || !strcmp(scratch_files[i], path));
    return strcpy(scratch_files[i], path);
}

static bool write_file(const char *path, const unsigned char *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    bool good = f && fwrite(bytes, 1, n, f) == n;
    return f && fclose(f) == 0 && good;
}

static Session test_session(const char *path, int threads) {
    Session x;
    if (session_open(&x, path, threads)) give_up(path, error_text);
    return x;
}
