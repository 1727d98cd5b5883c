static int n_passed, n_failed, n_skipped;
static bool test_everything;

// ---------------------------------------------------------------------------------------------------------------------
// Comparator

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

#ifdef EMULATED // built for a processor that is emulated: what takes minutes there on a larger
                // model is left to the small ones
enum { LARGER_MODELS = 0 };
#else
enum { LARGER_MODELS = 1 };
#endif

static void skip(const char *name, const char *reason) {
    printf("skip %-46s %s\n", name, reason);
    n_skipped++;
}

static bool expect(bool condition, const char *name) {
    report(condition, name, "");
    return condition;
}

// Largest error relative to the largest magnitude of want; NaN or infinity anywhere counts as
// infinite.
static double error_of(const float *got, const double *want, size_t n, size_t *where) {
    double scale = 0, worst = 0;
    *where = 0;
    for (size_t i = 0; i < n; i++) scale = fmax(scale, fabs(want[i]));
    if (scale == 0) scale = 1;
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)got[i] - want[i]) / scale;
        if (!(error <= worst)) worst = error, *where = i;
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

static uint64_t test_random = 20260101;
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
