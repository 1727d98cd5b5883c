// clang-format off
/* test_all.c - the tests of mamba.c. It includes mamba.c and so reaches everything.

   ./tests/test_all [all] [NAME]    a fixed sample, or the whole; only the groups whose name contains NAME

   Each check prints its name, the largest error, the tolerance and where; the last line is `N passed, N failed, N
   skipped`, and the exit status is the verdict. References are not mamba.c's own: formulas in double precision written
   here from the paper's equations, and golden files that transformers and tokenizers computed (dev/make_golden.py,
   dev/make_tok_golden.py). An error is relative to the largest magnitude of the reference tensor, since elementwise
   relative errors are meaningless where values cancel.

   CONTENTS  comparator | vectors | kernels | scan | model: golden, splits, threads | gradients | state |
             loader | quantiser | tokenizer | sampler | command line | cuda */
// clang-format on

#define TESTING
#include "mamba.c"

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

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: every function against the C library in double, over all binades and a dense range

static float apply(vec (*f)(vec), float x) {
    float lane[VL];
    vec v = f(splat(x));
    memcpy(lane, &v, sizeof v);
    for (int i = 1; i < VL; i++)
        if (memcmp(&lane[i], &lane[0], sizeof(float))) return NAN; // lanes must agree
    return lane[0];
}
static vec exp_call(vec x) { return exp_vec(x); }
static vec exp2_call(vec x) { return exp2_negative(x); }
static vec silu_call(vec x) { return silu_vec(x); }
static vec softplus_call(vec x) { return softplus_vec(x); }

static double softplus_double(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
static double silu_double(double x) { return x / (1 + exp(-x)); }

// Worst error in units of the last place of the exact answer.
static void check_function(const char *name, vec (*f)(vec), double (*exact)(double), float lowest,
                           float highest, double ulps) {
    double worst = 0;
    float at = 0;
    long count = 0;
    for (int sign = 0; sign < 2; sign++)
        for (uint32_t bits = 0x20000000; bits < 0x43000000; bits += test_everything ? 97 : 4999) {
            float x;
            uint32_t signed_bits = bits | (uint32_t)sign << 31;
            memcpy(&x, &signed_bits, sizeof x);
            if (x < lowest || x > highest) continue;
            double want = exact((double)x), unit = ldexp(1, ilogb(want) - 23);
            double error = fabs((double)apply(f, x) - want) / unit;
            if (!(error <= worst)) worst = error, at = x;
            count++;
        }
    report(worst <= ulps && count > 10000, name, "error %.2f ulp of %.1f, at x = %.9g, %ld values",
           worst, ulps, (double)at, count);
}

static void test_vectors(void) {
    check_function("exp", exp_call, exp, -86, 88, 1.5);
    check_function("2^x", exp2_call, exp2, -126, 0, 2.5);
    expect(apply(exp2_call, 0) == 1 && apply(exp2_call, -1e-9f) == 1 &&
               isnan(apply(exp2_call, NAN)),
           "2^0 is 1, and a NaN stays NaN");
    check_function("silu", silu_call, silu_double, -80, 100, 3);
    check_function("softplus", softplus_call, softplus_double, -86, 100, 3);
    expect(apply(exp_call, -1000) < 1e-37f && apply(exp_call, -1000) >= 0,
           "exp of very negative is nearly 0");
    expect(apply(exp_call, 0) == 1, "exp(0) is 1");
    expect(isnan(apply(exp_call, NAN)) && isnan(apply(silu_call, NAN)) &&
               isnan(apply(softplus_call, NAN)),
           "NaN stays NaN");
    expect(apply(softplus_call, 89) == 89 && isfinite(apply(softplus_call, 1e30f)),
           "softplus does not overflow");
    expect(apply(silu_call, -1e30f) <= 0 && isfinite(apply(silu_call, -1e30f)),
           "silu does not overflow");
    expect(crc32_of(0, "123456789", 9) == 0xCBF43926u, "CRC-32 check value");
    expect(crc32_of(crc32_of(0, "1234", 4), "56789", 5) == 0xCBF43926u, "CRC-32 in pieces");
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels, each against a double reference, by teams of 1 and 3 threads

#define TEAM(call) \
    _Pragma("omp parallel num_threads(team)") { call; }
static int team = 1;

static void test_rmsnorm(int L, int D, int ld, bool weighted) {
    float *x = random_floats((size_t)L * ld, -3, 3), *w = random_floats((size_t)D, -2, 2),
          *out = random_floats((size_t)L * ld, 0, 1);
    double *want = doubles(out, (size_t)L * ld);
    for (int t = 0; t < L; t++) {
        double squares = 0;
        for (int d = 0; d < D; d++) squares += (double)x[t * ld + d] * x[t * ld + d];
        for (int d = 0; d < D; d++)
            want[t * ld + d] = x[t * ld + d] / sqrt(squares / D + 1e-5) * (weighted ? w[d] : 1);
    }
    TEAM(rmsnorm(out, x, weighted ? w : NULL, 1e-5f, L, D, (size_t)ld))
    check("rmsnorm", out, want, (size_t)L * ld, 1e-6);
    free_aligned(x), free_aligned(w), free_aligned(out), free(want);
}

static double bf16_value(uint16_t bits) {
    int exponent = bits >> 7 & 255, mantissa = bits & 127;
    double x =
        exponent ? ldexp(1 + mantissa / 128.0, exponent - 127) : ldexp(mantissa / 128.0, -126);
    return bits >> 15 ? -x : x;
}

static double stored_scale(const Tensor *w, int row, int column, const unsigned char **tile) {
    size_t tiles = ((size_t)w->cols + 31) / 32, bytes = w->type == Q8 ? 64 + 1024 : 64 + 512;
    *tile = (const unsigned char *)w->data +
            ((size_t)(row / 32) * tiles + (size_t)(column / 32)) * bytes;
    uint16_t scale;
    memcpy(&scale, *tile + row % 32 * 2, 2);
    return bf16_value(scale);
}

static int stored_code(const Tensor *w, int row, int column) {
    const unsigned char *tile;
    int bits = w->type == Q8 ? 8 : 4, codes = 32 / bits, i = column % 32 / codes,
        j = column % codes;
    uint32_t word;
    stored_scale(w, row, column, &tile);
    memcpy(&word, tile + 64 + (i * 32 + row % 32) * 4, 4);
    int code = (int)(word >> (bits * j) & ((1u << bits) - 1)), half = 1 << (bits - 1);
    return j < codes - 1 ? code - half : code >= half ? code - 2 * half : code;
}

static double stored_value(const Tensor *w, int row,
                           int column) { // an own reader of the storage types
    size_t i = (size_t)row * w->cols + column;
    const unsigned char *tile;
    if (w->type == F32) return (double)((const float *)w->data)[i];
    if (w->type == Q8 || w->type == Q4)
        return stored_code(w, row, column) * stored_scale(w, row, column, &tile);
    uint16_t bits = ((const uint16_t *)w->data)[i];
    if (w->type == BF16) return bf16_value(bits);
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double x =
        exponent ? ldexp(1 + mantissa / 1024.0, exponent - 15) : ldexp(mantissa / 1024.0, -14);
    return bits >> 15 ? -x : x;
}

static void test_matmul(Type type, int L, int I, int O, int ldx, bool biased) {
    size_t n = (size_t)I * O;
    Tensor w = {NULL, O, I, type};
    size_t bytes = tensor_bytes(&w),
           scales = is_quantized(type) ? TILE_SCALES : bytes; // of every tile, of all
    uint16_t *bits = alloc_aligned(bytes + 2);
    float *weights = random_floats(n, -1, 1), *x = random_floats((size_t)L * ldx, -1, 1),
          *bias = random_floats((size_t)O, -1, 1);
    float *out = random_floats((size_t)L * O + 8, 7, 8),
          *packed = random_floats((size_t)(L + MR) * I, 7, 8);
    for (size_t i = 0; i < bytes; i++)
        ((unsigned char *)bits)[i] = (unsigned char)random_u64(&test_random);
    for (size_t at = 0; at < bytes; at += is_quantized(type) ? tile_bytes(type) : bytes)
        for (size_t i = at / 2; i < (at + scales) / 2;
             i++) // any bit pattern that is finite, subnormal ones too
            bits[i] = type != F16 ? (uint16_t)((random_u64(&test_random) & 0x807F) |
                                               (110 + random_u64(&test_random) % 17) << 7)
                                  : (uint16_t)(random_u64(&test_random) &
                                               (random_u64(&test_random) % 5 ? 0xBBFF : 0x83FF));
    w.data = type == F32 ? (void *)weights : (void *)bits;
    double *want = malloc(((size_t)L * O + 1) * sizeof *want);
    for (int t = 0; t < L; t++)
        for (int o = 0; o < O; o++) {
            double sum = biased ? bias[o] : 0;
            for (int i = 0; i < I; i++) sum += stored_value(&w, o, i) * x[(size_t)t * ldx + i];
            want[(size_t)t * O + o] = sum;
        }
    float guard = out[(size_t)L * O];
    TEAM(matmul(out, x, (size_t)ldx, &w, biased ? bias : NULL, L, packed))
    char name[96];
    snprintf(name, sizeof name, "matmul %s L %d I %d O %d, team of %d", type_name(type), L, I, O,
             team);
    check(name, out, want, (size_t)L * O,
          I > 1000 ? 5e-6 : 2e-6); // where VL is 1 a dot product has few sums
    if (out[(size_t)L * O] != guard) expect(false, "matmul wrote past its output");
    free(want), free_aligned(bits);
    free_aligned(weights), free_aligned(x), free_aligned(bias), free_aligned(out),
        free_aligned(packed);
}

// Where all of x has one sign the codes' shift, of 128 or 8, is most of a sum: some bits are lost,
// and this is how many.
static void test_positive(Type type) {
    enum { O = 40, I = 768 };
    Tensor w = {NULL, O, I, type};
    float *weights = random_floats(O * I, -1, 1), *x = random_floats(I, 0.5f, 1),
          *out = random_floats(O, 7, 8);
    double want[O] = {0};
    w.data = alloc_aligned(tensor_bytes(&w));
    quantize_tensor(&w, &(Tensor){weights, O, I, F32});
    for (int o = 0; o < O; o++)
        for (int i = 0; i < I; i++) want[o] += stored_value(&w, o, i) * x[i];
    TEAM(matmul(out, x, I, &w, NULL, 1, NULL))
    check(type == Q8 ? "matmul q8, one sign" : "matmul q4, one sign", out, want, O, 2e-6);
    free_aligned(weights), free_aligned(x), free_aligned(out),
        free_aligned((void *)(uintptr_t)w.data);
}

// A row's product has the same bits alone and beside up to 16 others, by any team.
static void test_few_rows(Type type, int I, int O) {
    enum { MOST = 17 };
    size_t n = (size_t)I * O, ldx = (size_t)I + 3;
    float *x = random_floats(MOST * ldx, -1, 1), *weights = random_floats(n, -1, 1),
          *bias = random_floats((size_t)O, -1, 1);
    float *alone = random_floats((size_t)MOST * O, 7, 8),
          *out = random_floats((size_t)MOST * O + 1, 7, 8), guard,
          *packed = random_floats((MOST + FEW) * (size_t)(I + PAIR), 7, 8);
    uint16_t *bits = malloc((n + 1) * 2);
    for (size_t i = 0; i < n; i++)
        bits[i] = (uint16_t)(random_u64(&test_random) & 0xBBFF); // finite in f16 and bf16
    Tensor w = {type == F32 ? (void *)weights : (void *)bits, O, I, type};
    if (is_quantized(type))
        w.data = alloc_aligned(tensor_bytes(&w)),
        quantize_tensor(&w, &(Tensor){weights, O, I, F32});
    team = 1;
    for (int t = 0; t < MOST; t++)
        TEAM(matmul_few(alone + (size_t)t * O, (size_t)O, x + t * ldx, ldx, &w, bias, 1, NULL))
    bool same = true;
    for (team = 1; team <= 3; team++)
        for (int L = 1; L <= MOST; L++) {
            guard = out[(size_t)L * O];
            TEAM(matmul_few(out, (size_t)O, x, ldx, &w, bias, L, packed))
            same = same && !memcmp(out, alone, (size_t)L * O * sizeof *out) &&
                   out[(size_t)L * O] == guard;
        }
    char name[96];
    snprintf(name, sizeof name, "1 to %d rows have each row's bits, %s, I %d O %d", MOST,
             type_name(type), I, O);
    expect(same, name);
    if (is_quantized(type)) free_aligned((void *)(uintptr_t)w.data);
    free(bits), free_aligned(x), free_aligned(weights), free_aligned(bias), free_aligned(alone),
        free_aligned(out);
    free_aligned(packed);
}

static void test_conv(int L, int E, int K, bool biased) {
    size_t rows = (size_t)(K > 1 ? K - 1 : 0);
    float *xz = random_floats((size_t)L * 2 * E, -2, 2), *w = random_floats((size_t)K * E, -1, 1),
          *bias = random_floats((size_t)E, -1, 1);
    float *window = random_floats(rows * E, -2, 2), *window_step = copy_floats(window, rows * E);
    float *u = random_floats((size_t)L * E, 7, 8), *u_step = random_floats((size_t)L * E, 7, 8);
    double *want = malloc(((size_t)L * E + 1) * sizeof *want),
           *last = malloc((rows * E + 1) * sizeof *last);
#define INPUT(t, e) \
    ((t) >= 0 ? (double)xz[(size_t)(t) * 2 * E + (e)] \
              : (double)window[(size_t)(K - 1 + (t)) * E + (e)])
    for (int t = 0; t < L; t++)
        for (int e = 0; e < E; e++) {
            double sum = biased ? bias[e] : 0;
            for (int k = 0; k < K; k++) sum += w[(size_t)k * E + e] * INPUT(t - K + 1 + k, e);
            want[(size_t)t * E + e] = silu_double(sum);
        }
    for (size_t j = 0; j < rows; j++)
        for (int e = 0; e < E; e++) last[j * E + e] = INPUT(L - K + 1 + (int)j, e);
    TEAM(conv1d_silu(u, window, xz, w, biased ? bias : NULL, L, E, K))
    check("conv1d_silu", u, want, (size_t)L * E, 2e-6);
    check("conv1d_silu window", window, last, rows * E, 0);
    for (int t = 0; t < L; t++) {
        TEAM(conv1d_silu_step(u_step + (size_t)t * E, window_step, xz + (size_t)t * 2 * E, w,
                              biased ? bias : NULL, E, K))
    }
    check("conv1d_silu_step", u_step, want, (size_t)L * E, 2e-6);
    check("conv1d_silu_step window", window_step, last, rows * E, 0);
    free(want), free(last);
    free_aligned(xz), free_aligned(w), free_aligned(bias), free_aligned(window),
        free_aligned(window_step), free_aligned(u), free_aligned(u_step);
}

static void test_elementwise(int L, int E) {
    size_t n = (size_t)L * E;
    float *a = random_floats(n, -9, 9), *b = random_floats(2 * n, -9, 9),
          *bias = random_floats((size_t)E, -5, 1);
    float *sum = copy_floats(a, n), *delta = copy_floats(a, n), *g = copy_floats(a, n);
    double *want = doubles(a, n);
    for (size_t i = 0; i < n; i++) want[i] += b[i];
    TEAM(add_to(sum, b, L, E))
    check("add_to", sum, want, n, 1e-7);
    for (size_t i = 0; i < n; i++) want[i] = softplus_double((double)a[i] + bias[i % E]);
    TEAM(softplus_bias(delta, bias, L, E))
    check("softplus_bias", delta, want, n, 1e-6);
    for (size_t i = 0; i < n; i++) want[i] = a[i] * silu_double(b[i / E * 2 * E + E + i % E]);
    TEAM(gate(g, b, L, E))
    check("gate", g, want, n, 1e-6);
    free(want), free_aligned(a), free_aligned(b), free_aligned(bias), free_aligned(sum),
        free_aligned(delta), free_aligned(g);
}

static void test_kernels(void) {
    for (team = 1; team <= 3; team += 2) {
        test_rmsnorm(1, 1, 1, true), test_rmsnorm(5, 37, 41, true), test_rmsnorm(3, 16, 16, false);
        for (int type = 0; type < N_TYPES; type++) {
            test_matmul((Type)type, 1, 33, 7, 40, true),
                test_matmul((Type)type, 3, 16, 5, 16, false);
            test_matmul((Type)type, 4, 1, 1, 1, true),
                test_matmul((Type)type, 13, KC + 3, 2 * NR + 1, KC + 9, true);
            test_matmul((Type)type, 16 * MR + 5, 48, 35 * NR, 48, false);
            test_matmul((Type)type, 9 * MR + 1, 3, NR - 1, 3, true);
            test_matmul((Type)type, 2, X_BLOCK + 33, 34, X_BLOCK + 40, true);
        }
        for (int type = Q8; type <= Q4; type++) test_positive((Type)type);
        for (int K = 1; K <= 5; K++)
            test_conv(1, 7, K, true), test_conv(2, VL + 1, K, false),
                test_conv(19, 2 * VL, K, true);
        test_elementwise(1, 1), test_elementwise(5, 3 * VL + 2);
    }
    for (int type = 0; type < N_TYPES; type++)
        test_few_rows((Type)type, 1, 1), test_few_rows((Type)type, 2 * VL - 1, 9),
            test_few_rows((Type)type, 4 * VL, 2), test_few_rows((Type)type, 6 * VL + 5, 43),
            test_few_rows((Type)type, FEW_L1 / 4 + 1, 8),
            test_few_rows((Type)type, X_BLOCK + 5,
                          2 * TILE + 9); // three panels: two at once and one alone
    team = 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// The scan

typedef struct {
    int L, E, N;
    float *u, *delta, *A_neg, *BC, *skip, *h, *carry;
    double *y, *h_end; // by the paper's equations, in double
    double largest;    // of what was added up to them
} ScanCase;

static ScanCase scan_case(int L, int E, int N) {
    ScanCase s = {.L = L, .E = E, .N = N};
    size_t LE = (size_t)L * E, NE = (size_t)N * E;
    s.u = random_floats(LE, -2, 2), s.BC = random_floats((size_t)L * 2 * N, -1, 1),
    s.skip = random_floats((size_t)E, -1, 1);
    s.h = random_floats(NE, -3, 3), s.delta = random_floats(LE, 0, 1),
    s.A_neg = random_floats(NE, 0, 1);
    s.carry = random_floats(scan_carry_floats(E, N), 7, 8);
    for (size_t i = 0; i < LE; i++)
        s.delta[i] = expf(uniform(-7, 0.5f)); // steps from a thousandth to beyond one
    for (size_t i = 0; i < LE && L % 2 == 0; i += 17)
        s.delta[i] *= 300; // and some that forget everything
    for (size_t i = 0; i < NE; i++) s.A_neg[i] = -expf(uniform(-3, 3));
    s.y = malloc(LE * sizeof *s.y), s.h_end = doubles(s.h, NE);
    for (int t = 0; t < L; t++)
        for (int e = 0; e < E; e++) {
            double sum = (double)s.skip[e] * s.u[(size_t)t * E + e],
                   dt = s.delta[(size_t)t * E + e];
            for (int n = 0; n < N; n++) {
                double *h = &s.h_end[(size_t)n * E + e];
                double kept = exp(dt * s.A_neg[(size_t)n * E + e]) * *h,
                       inject = dt * s.BC[(size_t)t * 2 * N + n] * s.u[(size_t)t * E + e];
                *h = kept + inject, s.largest = fmax(s.largest, fmax(fabs(kept), fabs(inject)));
                sum += s.BC[(size_t)t * 2 * N + N + n] * *h;
            }
            s.y[(size_t)t * E + e] = sum;
        }
    return s;
}

static void scan_case_free(ScanCase *s) {
    free_aligned(s->u), free_aligned(s->delta), free_aligned(s->A_neg), free_aligned(s->BC),
        free_aligned(s->skip);
    free_aligned(s->h), free_aligned(s->carry), free(s->y), free(s->h_end);
}

// way 0: sequential; -1: step by step; else that many pieces; -2: split in two calls with the state
// carried
static void check_scan(const ScanCase *s, int way) {
    int L = s->L, E = s->E, N = s->N, split = way == -2 ? L / 3 : 0;
    size_t ld = 2 * (size_t)N;
    float *y = random_floats((size_t)L * E, 7, 8), *h = copy_floats(s->h, (size_t)N * E);
    const float *B = s->BC, *C = s->BC + N;
    if (way == 0) TEAM(scan_sequential(y, h, s->u, s->delta, s->A_neg, B, C, ld, s->skip, L, E, N))
    else if (way == -1)
        for (int t = 0; t < L; t++) {
            size_t at = (size_t)t * E;
            TEAM(scan_step(y + at, h, s->u + at, s->delta + at, s->A_neg, B + t * ld, C + t * ld,
                           s->skip, E, N))
        }
    else {
        if (split)
            TEAM(scan_parallel(y, h, s->u, s->delta, s->A_neg, B, C, ld, s->skip, split, E, N, 1,
                               s->carry))
        size_t at = (size_t)split * E;
        TEAM(scan_parallel(y + at, h, s->u + at, s->delta + at, s->A_neg, B + split * ld,
                           C + split * ld, ld, s->skip, L - split, E, N, way > 0 ? way : 1,
                           s->carry))
    }
    char name[96];
    if (way > 0) { // without y: the same bits of h
        float *alone = copy_floats(s->h, (size_t)N * E);
        TEAM(scan_parallel(NULL, alone, s->u, s->delta, s->A_neg, B, C, ld, s->skip, L, E, N, way,
                           s->carry))
        snprintf(name, sizeof name, "scan_parallel L %d E %d N %d pieces %d: h without y", L, E, N,
                 way);
        expect(!memcmp(h, alone, (size_t)N * E * sizeof *h), name);
        free_aligned(alone);
    }
    const char *what = way == 0    ? "scan_sequential"
                       : way == -1 ? "scan_step"
                       : way == -2 ? "scan_parallel split"
                                   : "scan_parallel";
    snprintf(name, sizeof name, "%s L %d E %d N %d pieces %d", what, L, E, N, way);
    check(name, y, s->y, (size_t)L * E, 2e-6);
    strcat(name, ", h");
    double left = N * E == 1 ? s->largest / fabs(s->h_end[0])
                             : 1; // one number alone may be what larger ones left
    check(name, h, s->h_end, (size_t)N * E, 2e-6 * fmax(1, left));
    free_aligned(y), free_aligned(h);
}

static void test_scan(void) {
    const int lengths[] = {1, 2, 3, 4, 5, 63, 64, 65, 1000},
              shapes[][2] = {{1, 1}, {7, 16}, {33, 5}, {16, 64}};
    for (int k = 0; k < 9; k++)
        for (int shape = 0; shape < 4; shape++) {
            ScanCase s = scan_case(lengths[k], shapes[shape][0], shapes[shape][1]);
            team = 1 + (k + shape) % 3;
            for (int way = -2; way <= SCAN_TASKS; way += way < 2 ? 1 : 7)
                if (way <= s.L) check_scan(&s, way);
            scan_case_free(&s);
        }
    team = 1;
    // The operator where order matters: (1/4, 2.5) then (1/4, 5.5) is 6.125 (see section 6), the
    // other way round 3.875.
    const float ones[4] = {1, 1, 1, 1}, half_life = -logf(2), BC[8] = {1, 1, 2, 1, 3, 1, 4, 1},
                zero = 0;
    float y[4], h = 0, carry[2 * SCAN_TASKS];
    TEAM(scan_parallel(y, &h, ones, ones, &half_life, BC, BC + 1, 2, &zero, 4, 1, 1, 2, carry))
    const double want[4] = {1, 2.5, 4.25, 6.125};
    check("scan of the worked example", y, want, 4, 1e-6);
    expect(scan_pieces(1 << 20, 1536) == 1 && scan_pieces(4096, 16) > 1 && scan_pieces(31, 16) == 1,
           "time is cut only where channels run out");
}

// ---------------------------------------------------------------------------------------------------------------------
// Model: against transformers, and against itself in pieces

typedef struct {
    char name[64];
    int ndim;
    uint32_t dims[4];
    size_t n;
    float *data;
} Golden;
static Golden golden[640];
static int n_golden;

static void golden_close(void) {
    while (n_golden) free_aligned(golden[--n_golden].data);
}

static bool golden_open(const char *path) {
    size_t bytes, at = 8;
    golden_close();
    unsigned char *p = (unsigned char *)read_text(path, &bytes);
    if (!p || bytes < 8 || memcmp(p, "gold", 4)) return free(p), expect(false, path);
    while (at < bytes && n_golden < COUNT(golden)) {
        Golden *g = &golden[n_golden++];
        uint32_t length = u32_at(p + at);
        assert(length < sizeof g->name);
        memset(g, 0, sizeof *g);
        memcpy(g->name, p + at + 4, length);
        at += 4 + length;
        g->ndim = (int)u32_at(p + at);
        assert(g->ndim <= 4);
        at += 4;
        g->n = 1;
        for (int i = 0; i < g->ndim; i++, at += 4) g->n *= g->dims[i] = u32_at(p + at);
        g->data = alloc_aligned(g->n * sizeof(float));
        for (size_t i = 0; i < g->n; i++, at += 4) g->data[i] = f32_at(p + at);
        assert(at <= bytes);
    }
    free(p);
    return at == bytes || expect(false, path); // else there are more records than room
}

static const Golden *golden_get(const char *format, ...) {
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    for (int i = 0; i < n_golden; i++)
        if (!strcmp(golden[i].name, name)) return &golden[i];
    return NULL;
}

static int32_t *golden_ids(int *L) {
    const Golden *g = golden_get("ids");
    int32_t *ids = malloc(g->n * sizeof *ids);
    for (size_t i = 0; i < g->n; i++) ids[i] = (int32_t)g->data[i];
    *L = (int)g->n;
    return ids;
}

static Session test_session(const char *path, int threads) {
    Session x;
    if (session_open(&x, path, threads)) {
        printf("FAIL cannot open %s: %s\n", path, error_text);
        exit(1);
    }
    return x;
}

typedef struct {
    float *all;
    size_t n, V;
} Collected;
static void collect(void *context, const float *logits) {
    Collected *c = context;
    memcpy(c->all + c->n++ * c->V, logits, c->V * sizeof(float));
}

// Stage by stage: the first stage that differs names the wrong kernel, which the logits alone would
// not.
static void check_stages(const char *model, Session *x, const int32_t *ids, int L) {
    const Model *m = x->model;
    const Config *c = &m->config;
    Acts *a = x->acts;
    size_t E = (size_t)c->E, N = (size_t)c->N, K = (size_t)c->K;
    char name[96];
    const Golden *g;
#define STAGE(what, got, elements) \
    if ((g = golden_get("layer%d." what, layer))) { \
        assert(g->n <= (size_t)(elements) && \
               g->n / g->dims[0] == (size_t)(elements) / (size_t)L); /* its first tokens */ \
        snprintf(name, sizeof name, "%s layer %d %s", model, layer, what); \
        check_floats(name, got, g->data, g->n, 1e-5); \
    }
    TEAM(embed(a->res, ids, &m->embedding, L))
    for (int layer = 0; layer < c->n_layer; layer++) {
        TEAM(block(m, layer, x->state, a, layer ? NULL : ids, false, L))
        STAGE("xz", a->xz, L * 2 * E)
        STAGE("u", a->u, L * E)
        if (!(c->flags & FLAG_MIXER_NORM))
            STAGE("dt_BC", a->xdb, L * (c->R + 2 * N)) // ours are normed in place
        STAGE("g", a->y, L * E)
        STAGE("out", a->xn, (size_t)L * c->D)
        STAGE("res", a->res, (size_t)L * c->D)
        if ((g = golden_get("layer%d.dt", layer))) {
            double *want = doubles(g->data, g->n);
            for (size_t i = 0; i < g->n; i++) want[i] = softplus_double(want[i]);
            snprintf(name, sizeof name, "%s layer %d delta", model, layer);
            check(name, a->delta, want, g->n, 1e-5);
            free(want);
        }
        if ((g = golden_get("layer%d.h", layer))) { // transformers keeps (E,N)
            float *h = alloc_aligned(g->n * sizeof *h);
            for (size_t e = 0; e < E; e++)
                for (size_t n = 0; n < N; n++)
                    h[e * N + n] = x->state->h[((size_t)layer * N + n) * E + e];
            snprintf(name, sizeof name, "%s layer %d final h", model, layer);
            check_floats(name, h, g->data, g->n, 1e-5);
            free_aligned(h);
        }
        if ((g = golden_get("layer%d.conv_window", layer)) &&
            K > 1) { // (E,K) there, the last K inputs
            float *got = alloc_aligned(E * K * sizeof *got),
                  *want = alloc_aligned(E * K * sizeof *want);
            for (size_t e = 0; e < E; e++)
                for (size_t k = 1; k < K; k++) {
                    got[e * K + k] = x->state->conv[((size_t)layer * (K - 1) + k - 1) * E + e];
                    want[e * K + k] = g->data[e * K + k];
                }
            snprintf(name, sizeof name, "%s layer %d final conv window", model, layer);
            check_floats(name, got, want, E * K, 1e-5);
            free_aligned(got), free_aligned(want);
        }
    }
    mamba_state_reset(m, x->state);
}

static void test_golden_model(const char *model, const char *file) {
    char path[96], name[96];
    snprintf(path, sizeof path, "tests/%s.gold", model);
    if (!golden_open(path)) return;
    Session x = test_session(file, 2);
    int L;
    int32_t *ids = golden_ids(&L);
    const Golden *want = golden_get("logits");
    size_t V = (size_t)x.model->config.V;
    assert(want && want->n == L * V);
    check_stages(model, &x, ids, L);
    Collected all = {alloc_aligned(want->n * sizeof(float)), 0, V};
    mamba_prefill(x.model, x.acts, x.state, ids, (size_t)L, collect, &all);
    snprintf(name, sizeof name, "%s logits, prefill, every position", model);
    check_floats(name, all.all, want->data, want->n, 1e-5);
    mamba_state_reset(x.model, x.state);
    for (int t = 0; t < L; t++) {
        mamba_step(x.model, x.acts, x.state, ids[t]);
        memcpy(all.all + (size_t)t * V, x.state->logits, V * sizeof(float));
    }
    snprintf(name, sizeof name, "%s logits, step, every position", model);
    check_floats(name, all.all, want->data, want->n, 1e-5);
    free_aligned(all.all);
    free(ids);
    session_close(&x);
    golden_close();
}

static float *random_state(
    Session *x) { // the session's state filled with plausible values; returns a copy of them
    State *s = x->state;
    size_t V = (size_t)x->model->config.V, n = s->floats - V;
    for (size_t i = 0; i < n; i++) s->conv[i] = uniform(-1, 1);
    return copy_floats(s->data, s->floats);
}

// From a random initial state: prefill whole, step by step, and in two parts, at awkward lengths.
static void test_splits(const char *file) {
    Session x = test_session(file, 2);
    const Config *c = &x.model->config;
    // Q8 and Q4: the step's sums run in another order than the blocked product's, from minus the
    // codes' shift on.
    double tolerance = is_quantized(c->type) ? 5e-5 : 1e-5;
    const int lengths[] = {1, 2, c->K - 1, c->K, c->K + 1, 63, 64, 65, 1000};
    size_t V = (size_t)c->V;
    for (int k = 0; k < 9; k++) {
        int L = lengths[k];
        if (L < 1 || (L == 1000 && c->D > 100 && !test_everything)) continue;
        int32_t *ids = malloc((size_t)L * sizeof *ids);
        for (int t = 0; t < L; t++) ids[t] = (int32_t)(random_u64(&test_random) % V);
        mamba_state_reset(x.model, x.state);
        float *start = random_state(&x), *whole,
              *logits = alloc_aligned((size_t)L * V * sizeof *logits);
        Collected all = {logits, 0, V};
        mamba_prefill(x.model, x.acts, x.state, ids, (size_t)L, collect, &all);
        whole = copy_floats(x.state->data, x.state->floats);
        double worst = 0, worst_logits = 0;
        size_t where, conv_h = (size_t)x.state->floats - V;
        double *want = doubles(whole, x.state->floats),
               *want_logits = doubles(logits, (size_t)L * V);
        bool every_cut = L <= 65 && (c->D < 100 || L < 10 || test_everything);
        int splits = every_cut ? L : 5;
        for (int i = 0; i <= splits;
             i++) { // i = 0 is step by step, others cut once, at the end too
            int cut = every_cut ? i : (int)((int64_t)i * L / splits) - 1;
            memcpy(x.state->data, start, x.state->floats * sizeof(float));
            if (i == 0)
                for (int t = 0; t < L; t++) {
                    mamba_step(x.model, x.acts, x.state, ids[t]);
                    worst_logits =
                        fmax(worst_logits,
                             error_of(x.state->logits, want_logits + (size_t)t * V, V, &where));
                }
            else {
                mamba_prefill(x.model, x.acts, x.state, ids, (size_t)cut, NULL, NULL);
                mamba_prefill(x.model, x.acts, x.state, ids + cut, (size_t)(L - cut), NULL, NULL);
            }
            worst = fmax(worst, error_of(x.state->data + V, want + V, conv_h, &where));
            worst_logits = fmax(worst_logits, error_of(x.state->logits, want, V, &where));
        }
        char name[96];
        snprintf(name, sizeof name, "%s L %d: step and %d splits = prefill", file, L, splits);
        report(worst <= tolerance && worst_logits <= tolerance, name,
               "state error %.2e, logits error %.2e of %.0e", worst, worst_logits, tolerance);
        free(ids), free(want), free(want_logits);
        free_aligned(start), free_aligned(whole), free_aligned(logits);
    }
    session_close(&x);
}

// What forward leaves out (outputs of the last layer that nobody reads, rows of in_proj that are
// equal) changes no bit of the state or the logits: every layer in full, one after the other,
// against mamba_prefill, in pieces around the chunk's edges.
static void test_left_out(const Model *m, const char *name) {
    const Config *c = &m->config;
    const int pieces[] = {1, 2, 33, 64, 512}, beyond[] = {-1, 0, 1, 70};
    Acts *a = mamba_acts_new(m, 2);
    State *got = mamba_state_new(m), *want = mamba_state_new(m);
    int32_t ids[1100];
    int room = a->piece, bad = 0, count = 0;
    for (int i = 0; i < 1100; i++) ids[i] = (int32_t)(random_u64(&test_random) % (uint64_t)c->V);
    for (int p = 0; p < 5; p++)
        for (int k = 0; k < 4; k++)
            for (int whole = 1; whole <= 2; whole++) {
                int n = whole * pieces[p] + beyond[k];
                if (n < 1 || pieces[p] > room || (c->D > 100 && p < 3)) continue;
                a->piece = pieces[p];
                for (size_t i = 0; i < got->floats; i++)
                    got->data[i] = want->data[i] = uniform(-1, 1);
                mamba_prefill(m, a, got, ids, (size_t)n, NULL, NULL);
                for (int t = 0, L; t < n; t += L) {
                    L = n - t < a->piece ? n - t : a->piece;
                    TEAM(embed(a->res, ids + t, &m->embedding, L))
                    for (int layer = 0; layer < c->n_layer; layer++)
                        TEAM(block(m, layer, want, a, NULL, false, L))
                    TEAM(rmsnorm(a->xn, a->res + (size_t)(L - 1) * c->D, f32(&m->norm_f),
                                 c->norm_eps, 1, c->D, (size_t)c->D))
                    TEAM(matmul(want->logits, a->xn, (size_t)c->D, &m->head, NULL, 1, a->packed))
                }
                bad += memcmp(got->data, want->data, got->floats * sizeof(float)) != 0, count++;
            }
    a->piece = room;
    report(bad == 0 && count > 0, name, "what is left out changes no bit: %d of %d lengths differ",
           bad, count);
    mamba_acts_free(a), mamba_state_free(got), mamba_state_free(want);
}

// Small vocabularies, where in_proj is computed by id: below, at and above what makes it pay.
static void test_left_out_small(void) {
    const int shape[][7] = {
        // D, n_layer, V, N, K, R, flags
        {24, 1, 16, 16, 4, 2, FLAG_TIED | FLAG_CONV_BIAS},
        {35, 2, 5, 5, 3, 3, FLAG_PROJ_BIAS | FLAG_CONV_BIAS},
        {16, 2, 2, 16, 4, 1, 0},
        {24, 2, 32, 8, 1, 2, FLAG_TIED | FLAG_MIXER_NORM},
        {8, 1, 256, 3, 4, 1, FLAG_PROJ_BIAS | FLAG_MIXER_NORM | FLAG_CONV_BIAS}};
    for (int i = 0; i < 5; i++) {
        const int *s = shape[i];
        Config c = {.arch = s[6] & FLAG_MIXER_NORM ? 1 : 0,
                    .flags = s[6],
                    .D = s[0],
                    .n_layer = s[1],
                    .V = s[2],
                    .E = 2 * s[0] + (i == 1),
                    .N = s[3],
                    .K = s[4],
                    .R = s[5],
                    .norm_eps = 1e-5f,
                    .mixer_eps = 1e-5f};
        Model *m = mamba_random_model(&c, 7);
        for (int layer = 0; layer < c.n_layer && c.flags & FLAG_PROJ_BIAS; layer++) {
            float *in = (float *)(uintptr_t)m->layer[layer].in_bias.data;
            float *out = (float *)(uintptr_t)m->layer[layer].out_bias.data;
            for (int e = 0; e < 2 * c.E; e++) in[e] = uniform(-1, 1);
            for (int d = 0; d < c.D; d++) out[d] = uniform(-1, 1);
        }
        char name[64];
        snprintf(name, sizeof name, "D %d E %d V %d layers %d flags %d", c.D, c.E, c.V, c.n_layer,
                 c.flags);
        test_left_out(m, name);
        mamba_free(m);
    }
}

static void test_threads(const char *file) {
    int32_t ids[700];
    for (int t = 0; t < 700; t++) ids[t] = (int32_t)(random_u64(&test_random) % 256);
    float *first = NULL;
    for (int threads = 1; threads <= 8; threads += threads == 1 ? 1 : 3) { // 1, 2, 5, 8
        Session x = test_session(file, threads);
        x.acts->threads = threads;
        mamba_prefill(x.model, x.acts, x.state, ids, 700, NULL, NULL);
        for (int t = 0; t < 5; t++) mamba_step(x.model, x.acts, x.state, ids[t]);
        size_t floats = x.state->floats;
        if (!first) first = copy_floats(x.state->data, floats);
        char name[96];
        snprintf(name, sizeof name, "%s: same bits by %d threads", file, threads);
        expect(!memcmp(first, x.state->data, floats * sizeof(float)), name);
        session_close(&x);
    }
    free_aligned(first);
}

// Sequences in one step have the bits that each has alone: 1 to 17 of them and BATCH_MAX, by teams
// of 1, 2 and 3.
static void test_batches(const char *file) {
    enum { STEPS = 3 };
    Session x = test_session(file, 1);
    State *alone[BATCH_MAX], *s[BATCH_MAX];
    int32_t ids[STEPS][BATCH_MAX];
    size_t bytes = x.state->floats * sizeof(float);
    bool same = true;
    for (int i = 0; i < BATCH_MAX; i++) {
        alone[i] = mamba_state_new(x.model), s[i] = mamba_state_new(x.model);
        for (int t = 0; t < i % 5; t++)
            mamba_step(x.model, x.acts, alone[i], (i * 7 + t) % 250); // states of their own
    }
    for (int t = 0; t < STEPS; t++)
        for (int i = 0; i < BATCH_MAX; i++) ids[t][i] = (int32_t)(random_u64(&test_random) % 256);
    State *before[BATCH_MAX];
    for (int i = 0; i < BATCH_MAX; i++) {
        before[i] = mamba_state_new(x.model), mamba_state_copy(x.model, before[i], alone[i]);
        for (int t = 0; t < STEPS; t++) mamba_step(x.model, x.acts, alone[i], ids[t][i]);
    }
    for (int threads = 1; threads <= 3; threads++)
        for (int S = 1; S <= BATCH_MAX; S += S == 17 ? BATCH_MAX - 17 : 1) {
            x.acts->threads = threads;
            for (int i = 0; i < S; i++) mamba_state_copy(x.model, s[i], before[i]);
            for (int t = 0; t < STEPS; t++) mamba_step_batch(x.model, x.acts, s, ids[t], S);
            for (int i = 0; i < S; i++)
                same = same && !memcmp(s[i]->data, alone[i]->data, bytes) &&
                       s[i]->position == alone[i]->position &&
                       !memcmp(s[i]->recent, alone[i]->recent, sizeof s[i]->recent);
        }
    char name[96];
    snprintf(name, sizeof name, "%s: sequences in a batch have the bits they have alone", file);
    expect(same, name);
    ids[0][1] = x.model->config.V;
    mamba_state_copy(x.model, s[0], before[0]);
    expect(mamba_step_batch(x.model, x.acts, s, ids[0], 2) == -1 &&
               s[0]->position == before[0]->position && !memcmp(s[0]->data, before[0]->data, bytes),
           "an id beyond the vocabulary leaves every state as it was");
    for (int i = 0; i < BATCH_MAX; i++)
        mamba_state_free(alone[i]), mamba_state_free(s[i]), mamba_state_free(before[i]);
    session_close(&x);
}

static void test_model(void) {
    test_batches("tests/odd.bin"), test_batches("tests/falcon.bin"),
        test_batches("tests/plain.bin");
    if (LARGER_MODELS) test_batches("models/tales.bin");
    else skip("the tales model in batches, left-out work, quantized", "emulated");
    test_golden_model("odd", "tests/odd.bin");
    test_golden_model("falcon", "tests/falcon.bin");
    test_golden_model("plain", "tests/plain.bin");
    test_golden_model("tales", "models/tales.bin");
    test_splits("tests/odd.bin"), test_splits("tests/falcon.bin"), test_splits("tests/plain.bin"),
        test_splits("models/tales.bin");
    test_threads("tests/odd.bin"), test_threads("tests/falcon.bin"),
        test_threads("models/tales.bin");
    const char *files[] = {"tests/odd.bin", "tests/falcon.bin", "tests/plain.bin",
                           "models/tales.bin"};
    for (int i = 0; i < 3 + LARGER_MODELS; i++) {
        Session x = test_session(files[i], 1);
        test_left_out(x.model, files[i]);
        session_close(&x);
    }
    test_left_out_small();
    Session x = test_session("tests/odd.bin", 1);
    const int32_t bad[2][2] = {{1, 259}, {1, -1}};
    uint64_t before = x.state->position;
    expect(mamba_prefill(x.model, x.acts, x.state, bad[0], 2, NULL, NULL) == -1 &&
               x.state->position == before,
           "an id beyond the vocabulary is refused");
    expect(mamba_prefill(x.model, x.acts, x.state, bad[1], 2, NULL, NULL) == -1,
           "a negative id is refused");
    session_close(&x);
}

// ---------------------------------------------------------------------------------------------------------------------
// State

static bool write_file(const char *path, const unsigned char *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    bool good = f && fwrite(bytes, 1, n, f) == n;
    return f && fclose(f) == 0 && good;
}

// Any value in any byte, with the checksum mended or not: refused, or loaded; never a crash.
static void test_damaged_states(Session *x, unsigned char *file, size_t bytes, const char *path,
                                int count) {
    int refused = 0, loaded = 0;
    State *fresh = mamba_state_new(x->model);
    for (int i = 0; i < count; i++) {
        unsigned char *copy = malloc(bytes + 64);
        size_t n = bytes;
        memcpy(copy, file, bytes);
        memset(copy + bytes, 0, 64);
        if (i % 4 == 0) n = random_u64(&test_random) % (bytes + 64);
        else
            for (int k = 0; k < 1 + i % 3; k++)
                copy[random_u64(&test_random) % (i % 4 == 1 ? bytes : STATE_HEADER)] =
                    (unsigned char)random_u64(&test_random);
        if (i % 2 && n >= STATE_HEADER)
            put_u32(copy + STATE_HEADER - 4, crc32_of(0, copy, STATE_HEADER - 4));
        write_file(path, copy, n);
        if (mamba_state_load(x->model, fresh, path)) refused++;
        else loaded++, mamba_step(x->model, x->acts, fresh, 1);
        free(copy);
    }
    mamba_state_free(fresh);
    report(refused > count / 2 && refused + loaded == count, "damaged state files",
           "%d refused, %d harmless", refused, loaded);
}

static void test_state(void) {
    const char *path = "tests/state.tmp.bin";
    Session x = test_session("tests/odd.bin", 1), other = test_session("tests/plain.bin", 1);
    Sampling how = {1, 1, 0, 0, 1.1f};
    int32_t ids[100], straight[40], resumed[40];
    for (int t = 0; t < 100; t++) ids[t] = (int32_t)(random_u64(&test_random) % 250);
    x.state->random = 99;
    mamba_prefill(x.model, x.acts, x.state, ids, 100, NULL, NULL);
    State *copy = mamba_state_new(x.model);
    mamba_state_copy(x.model, copy, x.state);
    expect(mamba_state_save(x.model, x.state, path) == 0, "a state is saved");
    for (int i = 0; i < 40; i++)
        straight[i] = mamba_sample(x.model, x.acts, x.state, &how),
        mamba_step(x.model, x.acts, x.state, straight[i]);
    float *end = copy_floats(x.state->data, x.state->floats);
    mamba_state_reset(x.model, x.state);
    expect(mamba_state_load(x.model, x.state, path) == 0, "a state is loaded");
    for (int way = 0; way < 2; way++) { // loaded, then copied
        for (int i = 0; i < 40; i++)
            resumed[i] = mamba_sample(x.model, x.acts, x.state, &how),
            mamba_step(x.model, x.acts, x.state, resumed[i]);
        expect(!memcmp(straight, resumed, sizeof straight),
               way ? "same tokens from a copied state" : "same tokens from a loaded state");
        expect(!memcmp(end, x.state->data, x.state->floats * sizeof(float)) &&
                   x.state->position == 140,
               "and the same bits of state");
        mamba_state_copy(x.model, x.state, copy);
    }
    expect(mamba_state_load(other.model, other.state, path) == -1 && strstr(error_text, "shape"),
           "another model's state is refused");
    size_t model_bytes;
    unsigned char *changed = (unsigned char *)read_text("tests/odd.bin", &model_bytes);
    changed[model_bytes - 1] ^= 1; // the same shape, one weight changed, checksums mended
    put_u32(changed + 124, crc32_of(0, changed + u64_at(changed + 104),
                                    model_bytes - (size_t)u64_at(changed + 104)));
    put_u32(changed + HEADER_BYTES - 4, crc32_of(0, changed, HEADER_BYTES - 4));
    write_file("tests/changed.tmp.bin", changed, model_bytes);
    Session twin = test_session("tests/changed.tmp.bin", 1);
    expect(mamba_state_load(twin.model, twin.state, path) == -1 &&
               strstr(error_text, "another model"),
           "so is that of a model of the same shape");
    session_close(&twin);
    free(changed);
    remove("tests/changed.tmp.bin");
    expect(mamba_state_save(x.model, x.state, "tests/no/such/folder/s.bin") == -1,
           "an unwritable state file is an error");
    expect(mamba_state_load(x.model, x.state, "tests/no-such-file") == -1,
           "a missing state file is an error");
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(path, &bytes);
    test_damaged_states(&x, file, bytes, path, test_everything ? 10000 : 400);
    remove(path);
    Config shape;
    parse_shape("130m", "bf16", &shape);
    report(STATE_HEADER + 4 * state_floats(&shape) < 3300000, "a 130m state is under 3.3 MB",
           "%zu bytes", STATE_HEADER + 4 * state_floats(&shape));
    free(file);
    free_aligned(end);
    mamba_state_free(copy);
    session_close(&x), session_close(&other);
}

// ---------------------------------------------------------------------------------------------------------------------
// Loader: whatever is in the file, an error or a model, never a crash, a hang or a huge allocation

static const uint32_t nasty[] = {0,
                                 1,
                                 2,
                                 3,
                                 255,
                                 256,
                                 257,
                                 1024,
                                 65535,
                                 65536,
                                 1u << 20,
                                 (1u << 20) + 1,
                                 1u << 26,
                                 1u << 30,
                                 INT32_MAX,
                                 1u << 31,
                                 UINT32_MAX - 1,
                                 UINT32_MAX};

static void mend_checksums(unsigned char *file, size_t bytes) {
    if (bytes < HEADER_BYTES) return;
    uint64_t tokenizer = u64_at(file + 96);
    if (tokenizer <= bytes - HEADER_BYTES)
        put_u32(file + 120, crc32_of(0, file + HEADER_BYTES, (size_t)tokenizer));
    put_u32(file + HEADER_BYTES - 4, crc32_of(0, file, HEADER_BYTES - 4));
}

static void damage(unsigned char *file, size_t *bytes, size_t tensors_offset, int i) {
    uint64_t r = random_u64(&test_random), field = 8 + 4 * (random_u64(&test_random) % 61);
    switch (i % 6) {
    case 0:
        *bytes = r % (*bytes + 1);
        break; // cut anywhere
    case 1:
        put_u32(file + field, nasty[r % COUNT(nasty)]);
        break; // a header field
    case 2:
        put_u32(file + field, u32_at(file + field) + (uint32_t)(r % 65) - 32);
        break; // a little off
    case 3:
        put_u32(file + HEADER_BYTES + r % (tensors_offset - HEADER_BYTES), nasty[r >> 32 & 15]);
        break;
    case 4:
        file[HEADER_BYTES + r % (tensors_offset - HEADER_BYTES)] ^=
            (unsigned char)(1 << (r >> 60 & 7));
        break;
    case 5:
        file[tensors_offset + r % (*bytes - tensors_offset)] = (unsigned char)(r >> 56);
        break; // a weight
    }
    if (i % 12 < 9) mend_checksums(file, *bytes); // else the checksum is what catches it
}

// What a user would do with the file: read a prompt, write some tokens, decode them.
static int use_model(const char *path) {
    Session x;
    if (session_open(&x, path, 1)) return -1;
    Sampling how = {0.8f, 0.95f, 40, 0, 1};
    int32_t *ids = NULL, id = 0;
    size_t n = 0;
    unsigned char *text = malloc(x.model->text_room);
    int result = mamba_encode(x.model, "Once upon a time", 16, &ids, &n);
    if (result == 0) result = mamba_prefill(x.model, x.acts, x.state, ids, n, NULL, NULL);
    for (int i = 0; i < 3 && result == 0 && n; i++) {
        id = mamba_sample(x.model, x.acts, x.state, &how);
        result = id < 0 ? -1 : mamba_step(x.model, x.acts, x.state, id);
        if (result == 0) assert(mamba_decode(x.model, x.state, id, text) <= x.model->text_room);
    }
    free(ids), free(text);
    session_close(&x);
    return result;
}

static void test_damaged_models(const char *model, int count) {
    const char *path = "tests/damaged.tmp.bin";
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(model, &bytes), *copy = malloc(bytes + 64);
    int refused = 0, used = 0;
    for (int i = 0; i < count; i++) {
        size_t n = bytes;
        memcpy(copy, file, bytes);
        damage(copy, &n, (size_t)u64_at(file + 104), i);
        write_file(path, copy, n);
        error_text[0] = 0;
        if (use_model(path) == 0) used++;
        else if (error_text[0]) refused++;
    }
    char name[96];
    snprintf(name, sizeof name, "%d damaged copies of %s", count, model);
    report(refused + used == count && refused > count / 3, name,
           "%d refused with a message, %d harmless", refused, used);
    free(file), free(copy);
    remove(path);
}

static void expect_refused(const char *model, int offset, uint32_t value, const char *word) {
    const char *path = "tests/damaged.tmp.bin";
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(model, &bytes);
    put_u32(file + offset, value);
    mend_checksums(file, bytes);
    write_file(path, file, bytes);
    Model *m = mamba_load(path);
    char name[96];
    snprintf(name, sizeof name, "header field at %d = %u is refused", offset, value);
    report(!m && strstr(error_text, word), name, "%s", m ? "loaded" : error_text);
    mamba_free(m);
    free(file);
    remove(path);
}

static void test_loader(void) {
    const char *odd = "tests/odd.bin";
    expect(!mamba_load("tests/no-such-file") && strstr(error_text, "no-such-file"),
           "a missing file is named");
    expect(!mamba_load("tests"), "a folder is not a model");
    expect(!mamba_load("mamba.c") && strstr(error_text, "not a model.bin"),
           "a text file is not a model");
    expect_refused(odd, 0, 1, "not a model"), expect_refused(odd, 8, 2, "version"),
        expect_refused(odd, 20, 9, "weight type"), expect_refused(odd, 20, Q8, "truncated");
    expect_refused(odd, 28, 0, "d_model"), expect_refused(odd, 32, 0, "n_layer"),
        expect_refused(odd, 32, 60000, "truncated");
    expect_refused(odd, 36, UINT32_MAX, "vocab_size"), expect_refused(odd, 44, 100000, "d_state"),
        expect_refused(odd, 56, 0x7FC00000, "norm_eps");
    expect_refused(odd, 68, 100000, "pad"), expect_refused(odd, 72, 259, "eos"),
        expect_refused(odd, 96, 1u << 30, "outside");
    int count = test_everything ? 10000 : 300;
    test_damaged_models("tests/odd.bin", count), test_damaged_models("tests/falcon.bin", count);
    test_damaged_models("models/tales.bin", test_everything ? 600 : 40);
    Config huge = {.type = F32,
                   .D = 1 << 20,
                   .n_layer = 1 << 16,
                   .V = 1 << 26,
                   .E = 1 << 20,
                   .N = N_MAX,
                   .K = 1 << 12,
                   .R = 1 << 20};
    expect(config_tensor_bytes(&huge) > (size_t)1 << 40 || sizeof(size_t) < 8,
           "sizes of a huge config do not wrap");
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantiser: codes and scales against their definition in double, models against what their weights
// stand for in float32

// Sum of squared errors of a group with this scale, each weight by its nearest code.
static double group_error(const float *w, int n, double scale, int lowest, int highest) {
    double sum = 0;
    for (int k = 0; k < n; k++) {
        double code = scale == 0 ? 0 : fmin(fmax(nearbyint(w[k] / scale), lowest), highest),
               off = w[k] - code * scale;
        sum += off * off;
    }
    return sum;
}

static void test_quantize(Type type, int rows, int cols, float size) {
    float *x = random_floats((size_t)rows * cols, -size, size);
    Tensor from = {x, rows, cols, F32}, to = {NULL, rows, cols, type};
    unsigned char *tiles = alloc_aligned(tensor_bytes(&to)), *tile;
    int lowest = type == Q8 ? -127 : -8, highest = type == Q8 ? 127 : 7, bad_codes = 0;
    for (int i = 0; i < rows * cols; i += 7) x[i] *= uniform(0, 1) * uniform(0, 1);
    for (int i = 0; i < cols && i < 32; i++) x[i] = rows > 1 ? 0 : x[i]; // a group of zeros
    to.data = tiles;
    expect(quantize_tensor(&to, &from) == 0, "finite weights are quantized");
    double worst = 0, error = 0, squares = 0, plain = 0;
    float *row = random_floats((size_t)cols, 7, 8);
    for (int r = 0; r < rows; r++) {
        tensor_widen(row, &to, r, 0, cols);
        for (int k0 = 0; k0 < cols; k0 += 32) {
            int n = cols - k0 < 32 ? cols - k0 : 32;
            double scale = stored_scale(&to, r, k0, (const unsigned char **)&tile), peak = 0,
                   best = INFINITY;
            const float *w = x + (size_t)r * cols + k0;
            for (int k = 0; k < n; k++) {
                double want = scale == 0 ? 0 : fmin(fmax(nearbyint(w[k] / scale), lowest), highest);
                bad_codes += fabs(stored_code(&to, r, k0 + k) - want) > 0.5 ||
                             (double)row[k0 + k] != want * scale;
                if (fabs((double)w[k]) > fabs(peak)) peak = w[k];
                squares += (double)w[k] * w[k];
            }
            for (int i = 24; i <= 34 && type == Q4; i++) // divisors 6 to 8.5, scales not rounded
                best = fmin(best, fmin(group_error(w, n, peak / i * 4, -8, 7),
                                       group_error(w, n, -peak / i * 4, -8, 7)));
            if (type == Q8) best = group_error(w, n, peak / 127, -127, 127);
            error += group_error(w, n, scale, lowest, highest), plain += best;
            if (peak != 0) worst = fmax(worst, fabs(scale) / fabs(peak) * (type == Q8 ? 127 : 6));
        }
    }
    char name[96];
    snprintf(name, sizeof name, "quantize %s %d x %d of %g", type_name(type), rows, cols,
             (double)size);
    bool tiny = size < 1e-36f; // there a bf16 scale has few digits left, or none
    double scale_share = rows * cols == 1
                             ? 0x1p-16
                             : 4e-6; // a lone weight has all of its scale's rounding, 2^-8, squared
    report(
        bad_codes == 0 &&
            (tiny || (error <= (rows * cols > 1000 ? 1.05 : 1.5) * plain + scale_share * squares &&
                      worst < 1.01)),
        name, "%d wrong codes, error %.3f%% of the weights, %.3f%% by scales that are not rounded",
        bad_codes, 100 * sqrt(error / (squares + 1e-300)), 100 * sqrt(plain / (squares + 1e-300)));
    x[rows * cols - 1] = NAN;
    expect(quantize_tensor(&to, &from) == -1, "a NaN is refused");
    free_aligned(x), free_aligned(row), free_aligned(tiles);
}

static float *all_logits(Model *m, int threads, const int32_t *ids, int L, bool step) {
    Acts *a = mamba_acts_new(m, threads);
    State *s = mamba_state_new(m);
    size_t V = (size_t)m->config.V;
    Collected all = {alloc_aligned((size_t)L * V * sizeof(float)), 0, V};
    if (!step) mamba_prefill(m, a, s, ids, (size_t)L, collect, &all);
    for (int t = 0; t < L && step; t++) {
        mamba_step(m, a, s, ids[t]);
        memcpy(all.all + (size_t)t * V, s->logits, V * sizeof(float));
    }
    mamba_state_free(s), mamba_acts_free(a);
    return all.all;
}

static void test_quantized_model(const char *file, bool four_bits) {
    const char *path = "tests/quantized.tmp.bin", *type = four_bits ? "q4" : "q8";
    char name[96];
    const char *argv[] = {"quantize", file, path, type};
    fflush(stderr);
    snprintf(name, sizeof name, "%s is written in %s", file, type);
    if (!expect(command_quantize(4, (char **)(uintptr_t)argv) == 0, name)) return;
    Model *from = mamba_load(file), *held = mamba_quantize(from, four_bits), *m = mamba_load(path),
          *floats = m ? mamba_float_copy(m) : NULL;
    expect(m && floats && held && verify(m, path) == 0, "and loads, and every byte is right");
    size_t V = (size_t)m->config.V;
    int32_t ids[70];
    for (int t = 0; t < 70; t++) ids[t] = (int32_t)(random_u64(&test_random) % V);
    for (int step = 0; step < 2; step++) {
        float *got = all_logits(m, 2, ids, 70, step), *want = all_logits(floats, 2, ids, 70, step),
              *same = all_logits(held, 1, ids, 70, step);
        snprintf(name, sizeof name, "%s in %s = its values in f32, %s", file, type,
                 step ? "step" : "prefill");
        check_floats(name, got, want, 70 * V, 2e-5);
        expect(!memcmp(got, same, 70 * V * sizeof(float)),
               "from a file or in memory, by 1 or 2 threads: the same bits");
        free_aligned(got), free_aligned(want), free_aligned(same);
    }
    const unsigned char *tile; // a scale that is not a number is found by info --verify
    stored_scale(&held->embedding, 0, 0, &tile);
    ((uint16_t *)(uintptr_t)tile)[0] = 0x7F80;
    Verdict verdict = {{0}};
    each_tensor(held, verify_tensor, &verdict);
    expect(!strcmp(verdict.bad, "embedding"), "a scale that is not finite is found");
    mamba_free(from), mamba_free(held), mamba_free(m), mamba_free(floats);
    test_batches(path);
    if (V > 1000) test_threads(path); // the larger model
    else test_splits(path), test_damaged_models(path, test_everything ? 3000 : 60);
    argv[1] = path, argv[2] = "tests/again.tmp.bin";
    expect(command_quantize(4, (char **)(uintptr_t)argv) == -1 && strstr(error_text, "already"),
           "a quantized model is not quantized again");
    remove(path);
}

static void test_quantiser(void) {
    for (int type = Q8; type <= Q4; type++) {
        test_quantize((Type)type, 1, 1, 1), test_quantize((Type)type, 3, 31, 1),
            test_quantize((Type)type, 70, 97, 3e-3f);
        test_quantize((Type)type, 33, 64, 1e30f), test_quantize((Type)type, 5, 40, 1e-39f),
            test_quantize((Type)type, 2, 33, 1e-44f);
    }
    for (int four_bits = 0; four_bits < 2; four_bits++) {
        test_quantized_model("tests/odd.bin", four_bits),
            test_quantized_model("tests/falcon.bin", four_bits);
        if (LARGER_MODELS) test_quantized_model("models/tales.bin", four_bits);
    }
    Config c;
    parse_shape("37,1,50", "q4", &c);
    Model *random = mamba_random_model(&c, 5), *wide;
    c.type = F32;
    wide = mamba_random_model(&c, 5);
    Model *want = mamba_quantize(wide, true);
    expect(!memcmp(random->weights, want->weights, want->tensors_bytes),
           "random weights in q4 are the quantized f32 ones");
    mamba_free(random), mamba_free(wide), mamba_free(want);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients: every parameter's and those of initial states against PyTorch in float64; the scan's
// and the conv's also by central differences

typedef struct {
    const char *model;
    int n;
} GradientCheck;

static void check_gradient(void *context, const TensorInfo *info, Tensor *w) {
    GradientCheck *c = context;
    char name[96];
    const Golden *g = info->layer < 0 ? golden_get("grad.%s", info->name)
                                      : golden_get("grad.layer%d.%s", info->layer, info->name);
    snprintf(name, sizeof name, "%s gradient of %s %d", c->model, info->name, info->layer);
    if (!g || g->n != tensor_elements(w)) expect(false, name);
    else check_floats(name, w->data, g->data, g->n, 1e-4);
    c->n++;
}

static void test_model_gradients(const char *model) {
    char path[64];
    snprintf(path, sizeof path, "tests/%s.gold", model);
    if (!golden_open(path)) return;
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    int L;
    int32_t *ids = golden_ids(&L);
    for (int way = 0; way < 2; way++) { // one sequence; two equal ones, each half the weight
        int B = 1 + way;
        Trainer *x = mamba_trainer_new(m, B, L - 1, 2);
        int32_t *in = malloc(sizeof *in * (size_t)B * (L - 1)),
                *targets = malloc(sizeof *in * (size_t)B * (L - 1));
        for (int i = 0; i < B * (L - 1); i++)
            in[i] = ids[i % (L - 1)], targets[i] = ids[i % (L - 1) + 1];
        double loss = mamba_train_pass(x, in, targets, 1.0f / (float)(B * (L - 1)), true) /
                      (B * (L - 1)),
               want = (double)golden_get("loss")->data[0];
        GradientCheck c = {model, 0};
        report(fabs(loss - want) <= 1e-5 * want, "loss", "%.7f, want %.7f", loss, want);
        each_tensor(x->gradient, check_gradient, &c);
        mamba_trainer_free(x);
        free(in), free(targets);
    }
    free(ids);
    mamba_free(m), mamba_free(stored);
    golden_close();
}

// Gradients at other lengths, from nothing and from states: passes whose goldens
// dev/make_train_golden.py describes.
typedef struct {
    char label[64], prefix[24]; // of the golden's names
    const int32_t *ids;         // (rows) of the pass
    int rows, n;
    bool layers_only;
    double worst;
    char where[LABEL];
} PassCheck;

static void compare_with(PassCheck *c, const char *name, const float *got, const float *want,
                         size_t n) {
    size_t where;
    double *d = doubles(want, n), error = error_of(got, d, n, &where);
    if (!(error <= c->worst)) c->worst = error, snprintf(c->where, sizeof c->where, "%s", name);
    c->n++;
    free(d);
}

// The golden holds all of the tensor, or a sample; of the embedding then only the rows of the
// pass's ids.
static void compare_sample(void *context, const TensorInfo *info, Tensor *w) {
    PassCheck *c = context;
    char name[LABEL];
    const float *x = w->data;
    size_t n = tensor_elements(w), D = (size_t)w->cols;
    if (info->layer < 0) snprintf(name, sizeof name, "%s", info->name);
    else snprintf(name, sizeof name, "layer%d.%s", info->layer, info->name);
    if (c->layers_only && info->layer < 0 && strcmp(name, "embedding")) return;
    const Golden *g = golden_get("%s%s", c->prefix, name);
    if (!g) {
        c->worst = INFINITY, snprintf(c->where, sizeof c->where, "the golden: no %.20s", name);
        return;
    }
    bool gathered = g->n != n && !strcmp(name, "embedding");
    if (gathered) n = c->rows * D;
    float *got = alloc_aligned(g->n * sizeof *got);
    for (size_t k = 0; k < g->n; k++) {
        size_t i = k * n / g->n;
        got[k] = gathered ? x[(size_t)c->ids[i / D] * D + i % D] : x[i];
    }
    compare_with(c, name, got, g->data, g->n);
    free_aligned(got);
}

static void report_pass(const PassCheck *c) {
    report(c->worst <= 1e-4, c->label, "%d gradients, error %.2e of 1e-04 in %s", c->n, c->worst,
           c->where);
}

static int32_t *pass_rows(int B, int L, int from) { // ids, or with from = 1 targets, of B sequences
    const Golden *text = golden_get("text");
    int32_t *ids = malloc(sizeof *ids * (size_t)B * L);
    for (int i = 0; i < B * L; i++)
        ids[i] = (int32_t)text->data[i / L * text->dims[1] + i % L + from];
    return ids;
}

static void test_pass(const char *model, Model *m, int B, int L) {
    int32_t *ids = pass_rows(B, L, 0), *targets = pass_rows(B, L, 1);
    PassCheck c = {.ids = ids, .rows = B * L};
    Trainer *x = mamba_trainer_new(m, B, L, 2);
    float loss = (float)(mamba_train_pass(x, ids, targets, 1.0f / (float)(B * L), true) / (B * L));
    snprintf(c.label, sizeof c.label, "%s L %d B %d", model, L, B);
    snprintf(c.prefix, sizeof c.prefix, "L%d.", L);
    compare_with(&c, "loss", &loss, golden_get("L%d.loss", L)->data, 1);
    each_tensor(x->gradient, compare_sample, &c);
    report_pass(&c);
    mamba_trainer_free(x);
    free(ids), free(targets);
}

// The layers alone, as mamba_train_pass calls them, but from random states and with a gradient of
// the states at the end.
static void test_pass_from_states(const char *model, Model *m, int B, int L) {
    const Config *config = &m->config;
    size_t D = (size_t)config->D, NE = (size_t)config->N * config->E,
           KE = (size_t)(config->K - 1) * config->E;
    int32_t *ids = pass_rows(B, L, 0);
    int n_layer = config->n_layer;
    PassCheck c = {.ids = ids, .rows = B * L, .layers_only = true};
    Trainer *x = mamba_trainer_new(m, B, L, 2);
    snprintf(c.label, sizeof c.label, "%s L %d B %d from states", model, L, B);
    snprintf(c.prefix, sizeof c.prefix, "L%d.states.", L);
    const Golden *h0 = golden_get("h0"), *d_h = golden_get("d_h"), *window0 = golden_get("window0"),
                 *d_res = golden_get("d_res"), *d_h0 = golden_get("%sh0", c.prefix),
                 *d_window0 = golden_get("%swindow0", c.prefix);
    float *got_h = alloc_aligned(d_h0->n * sizeof(float)),
          *got_window = alloc_aligned(d_window0->n * sizeof(float));
    assert(d_h0->n == B * n_layer * NE && d_window0->n == B * n_layer * KE);
#define PART(array, b, layer, size) \
    ((array) + ((size_t)(b) * n_layer + (layer)) * (size)) // of (B, n_layer, size)
    TEAM(embed(x->saved[0].res, ids, &m->embedding, B * L))
    for (int i = 0; i < 2 * n_layer; i++) { // the layers forward, then backward
        bool forward = i < n_layer;
        int layer = forward ? i : 2 * n_layer - 1 - i;
        for (int b = 0; b < B; b++) {
            memcpy(x->h0 + b * NE, PART(h0->data, b, layer, NE), NE * sizeof(float));
            memcpy(x->window0 + b * KE, PART(window0->data, b, layer, KE), KE * sizeof(float));
            memcpy(x->d_h + b * NE, PART(d_h->data, b, layer, NE), NE * sizeof(float));
            if (i == n_layer)
                memcpy(x->d_res + b * L * D, d_res->data + b * d_res->dims[1] * D,
                       (size_t)L * D * sizeof(float));
        }
        if (forward) TEAM(block_train(x, layer))
        else TEAM(block_backward(x, layer))
        for (int b = 0; b < B && !forward; b++) {
            memcpy(PART(got_h, b, layer, NE), x->d_h + b * NE, NE * sizeof(float));
            memcpy(PART(got_window, b, layer, KE), x->d_window + b * KE, KE * sizeof(float));
        }
    }
#undef PART
    TEAM(embed_backward(grad(&x->gradient->embedding), x->d_res, ids, B * L, config->D))
    each_tensor(x->gradient, compare_sample, &c);
    compare_with(&c, "h0", got_h, d_h0->data, d_h0->n);
    compare_with(&c, "window0", got_window, d_window0->data, d_window0->n);
    report_pass(&c);
    mamba_trainer_free(x);
    free(ids), free_aligned(got_h), free_aligned(got_window);
}

static void test_passes(const char *model) {
    char path[64];
    snprintf(path, sizeof path, "tests/%s-train.gold", model);
    if (!golden_open(path)) return;
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    const Golden *passes = golden_get("passes");
    for (size_t i = 0; i < passes->dims[0]; i++) {
        const float *pass = passes->data + 3 * i; // L, B from nothing, B from states
        team = 1 + (int)i % 3;
        test_pass(model, m, (int)pass[1], (int)pass[0]);
        test_pass_from_states(model, m, (int)pass[2], (int)pass[0]);
    }
    team = 1;
    mamba_free(m), mamba_free(stored);
    golden_close();
}

// Central differences: d is the gradient that is checked, x the doubles it belongs to, loss what
// they are plugged into. A sample of elements; errors relative to the largest gradient in it.
static void check_differences(const char *name, const float *d, double *x, size_t n,
                              double (*loss)(void *), void *context) {
    size_t picked = n < 60 ? n : 60;
    float *got = alloc_aligned((picked + 1) * sizeof *got);
    double *want = calloc(picked + 1, sizeof *want);
    for (size_t k = 0; k < picked; k++) {
        size_t i = picked == n ? k : random_u64(&test_random) % n;
        double old = x[i], step = 1e-5 * fmax(1, fabs(old)), up, down;
        x[i] = old + step, up = loss(context);
        x[i] = old - step, down = loss(context);
        x[i] = old;
        got[k] = d[i], want[k] = (up - down) / (2 * step);
    }
    check(name, got, want, picked, 1e-4);
    free_aligned(got), free(want);
}

typedef struct { // doubles of everything the scan reads, and the weights of the scalar that it is
                 // turned into
    int B, L, E, N;
    double *u, *delta, *A_log, *BC, *D, *h, *w_y, *w_h;
} ScanLoss;

static double scan_loss(void *context) {
    const ScanLoss *s = context;
    size_t N = (size_t)s->N, E = (size_t)s->E;
    double loss = 0, *h = malloc(N * E * sizeof *h);
    for (int b = 0; b < s->B; b++) {
        memcpy(h, s->h + b * N * E, N * E * sizeof *h);
        for (int t = 0; t < s->L; t++)
            for (size_t e = 0, row = (size_t)b * s->L + t; e < E; e++) {
                double dt = s->delta[row * E + e], u = s->u[row * E + e], y = s->D[e] * u;
                for (size_t n = 0; n < N; n++) {
                    h[n * E + e] = exp(-dt * exp(s->A_log[e * N + n])) * h[n * E + e] +
                                   dt * s->BC[row * 2 * N + n] * u;
                    y += s->BC[row * 2 * N + N + n] * h[n * E + e];
                }
                loss += s->w_y[row * E + e] * y;
            }
        for (size_t i = 0; i < N * E; i++) loss += s->w_h[b * N * E + i] * h[i];
    }
    free(h);
    return loss;
}

static void test_scan_backward(int B, int L, int E, int N) {
    size_t BLE = (size_t)B * L * E, NE = (size_t)N * E, BNE = B * NE, bc = (size_t)B * L * 2 * N;
    float *u = random_floats(BLE, -1, 1), *delta = random_floats(BLE, 0.01f, 0.6f),
          *A_log = random_floats(NE, -2, 1), *BC = random_floats(bc, -1, 1);
    float *D = random_floats((size_t)E, -1, 1), *h = random_floats(BNE, -1, 1),
          *w_y = random_floats(BLE, -1, 1), *d_h = random_floats(BNE, -1, 1);
    float *d_u = random_floats(BLE, 7, 8), *d_delta = random_floats(BLE, 7, 8),
          *d_BC = random_floats(bc, 7, 8), *d_A = random_floats(NE, 0, 0);
    float *d_D = random_floats((size_t)E, 0, 0), *A_neg = random_floats(NE, 0, 0),
          *scratch = random_floats(scan_backward_floats(B, L, E, N), 7, 8);
    for (int e = 0; e < E; e++)
        for (int n = 0; n < N; n++) A_neg[n * E + e] = -expf(A_log[e * N + n]);
    ScanLoss s = {B,
                  L,
                  E,
                  N,
                  doubles(u, BLE),
                  doubles(delta, BLE),
                  doubles(A_log, NE),
                  doubles(BC, bc),
                  doubles(D, (size_t)E),
                  doubles(h, BNE),
                  doubles(w_y, BLE),
                  doubles(d_h, BNE)};
    TEAM(scan_backward(d_u, d_delta, d_BC, d_BC + N, d_A, d_D, d_h, w_y, u, delta, A_neg, BC,
                       BC + N, 2 * (size_t)N, D, h, B, L, E, N, scratch))
    char name[8][80];
    const char *what[] = {"u", "delta", "A_log", "B and C", "D", "h"};
    for (int i = 0; i < 6; i++)
        snprintf(name[i], sizeof name[i], "scan_backward B %d L %d E %d N %d: d_%s", B, L, E, N,
                 what[i]);
    check_differences(name[0], d_u, s.u, BLE, scan_loss, &s),
        check_differences(name[1], d_delta, s.delta, BLE, scan_loss, &s);
    check_differences(name[2], d_A, s.A_log, NE, scan_loss, &s),
        check_differences(name[3], d_BC, s.BC, bc, scan_loss, &s);
    check_differences(name[4], d_D, s.D, (size_t)E, scan_loss, &s),
        check_differences(name[5], d_h, s.h, BNE, scan_loss, &s);
    free(s.u), free(s.delta), free(s.A_log), free(s.BC), free(s.D), free(s.h), free(s.w_y),
        free(s.w_h);
    free_aligned(u), free_aligned(delta), free_aligned(A_log), free_aligned(BC), free_aligned(D),
        free_aligned(h), free_aligned(w_y), free_aligned(d_h);
    free_aligned(d_u), free_aligned(d_delta), free_aligned(d_BC), free_aligned(d_A),
        free_aligned(d_D), free_aligned(A_neg), free_aligned(scratch);
}

typedef struct {
    int L, E, K;
    double *x, *window, *conv, *bias, *w_u; // x (L,E)
} ConvLoss;

static double conv_loss(void *context) {
    const ConvLoss *s = context;
    double loss = 0;
    for (int t = 0; t < s->L; t++)
        for (int e = 0; e < s->E; e++) {
            double sum = s->bias[e];
            for (int k = 0; k < s->K; k++) {
                int from = t - s->K + 1 + k;
                sum +=
                    s->conv[e * s->K + k] *
                    (from >= 0 ? s->x[from * s->E + e] : s->window[(s->K - 1 + from) * s->E + e]);
            }
            loss += s->w_u[t * s->E + e] * silu_double(sum);
        }
    return loss;
}

static void test_conv_backward(int L, int E, int K) {
    size_t LE = (size_t)L * E, KE = (size_t)K * E;
    float *xz = random_floats(2 * LE, -1, 1), *x = random_floats(LE, 0, 0),
          *window = random_floats(KE, -1, 1), *conv = random_floats(KE, -1, 1);
    float *conv_t = random_floats(KE, 0, 0), *bias = random_floats((size_t)E, -1, 1),
          *w_u = random_floats(LE, -1, 1), *d_xz = random_floats(2 * LE, 7, 8);
    float *d_x = random_floats(LE, 0, 0), *d_conv = random_floats(KE, 0, 0),
          *d_bias = random_floats((size_t)E, 0, 0), *d_window = random_floats(KE, 7, 8),
          *d_c = random_floats(LE, 7, 8);
    for (int e = 0; e < E; e++)
        for (int k = 0; k < K; k++) conv_t[k * E + e] = conv[e * K + k];
    for (int t = 0; t < L; t++)
        memcpy(x + (size_t)t * E, xz + (size_t)t * 2 * E, (size_t)E * sizeof *x);
    TEAM(conv1d_silu_backward(d_xz, d_conv, d_bias, d_window, w_u, xz, window, conv_t, bias, L, E,
                              K, d_c))
    for (int t = 0; t < L; t++)
        memcpy(d_x + (size_t)t * E, d_xz + (size_t)t * 2 * E, (size_t)E * sizeof *x);
    ConvLoss s = {L,
                  E,
                  K,
                  doubles(x, LE),
                  doubles(window, KE),
                  doubles(conv, KE),
                  doubles(bias, (size_t)E),
                  doubles(w_u, LE)};
    check_differences("conv1d_silu_backward: d_x", d_x, s.x, LE, conv_loss, &s),
        check_differences("conv1d_silu_backward: d_conv", d_conv, s.conv, KE, conv_loss, &s);
    check_differences("conv1d_silu_backward: d_bias", d_bias, s.bias, (size_t)E, conv_loss, &s);
    if (K > 1)
        check_differences("conv1d_silu_backward: d_window", d_window, s.window, (size_t)(K - 1) * E,
                          conv_loss, &s);
    free(s.x), free(s.window), free(s.conv), free(s.bias), free(s.w_u);
    free_aligned(xz), free_aligned(x), free_aligned(window), free_aligned(conv),
        free_aligned(conv_t), free_aligned(bias), free_aligned(w_u), free_aligned(d_xz);
    free_aligned(d_x), free_aligned(d_conv), free_aligned(d_bias), free_aligned(d_window),
        free_aligned(d_c);
}

// Ten steps of AdamW with clipping, against PyTorch's on the same batches
// (dev/make_train_golden.py).
static void check_final(void *context, const TensorInfo *info, Tensor *w) {
    GradientCheck *c = context;
    char name[96];
    const Golden *g = info->layer < 0 ? golden_get("final.%s", info->name)
                                      : golden_get("final.layer%d.%s", info->layer, info->name);
    snprintf(name, sizeof name, "%s after 10 steps: %s %d", c->model, info->name, info->layer);
    if (!g || g->n != tensor_elements(w)) expect(false, name);
    else check_floats(name, w->data, g->data, g->n, 2e-4);
}

static void test_adamw(const char *model) {
    char path[64], name[96];
    snprintf(path, sizeof path, "tests/%s-train.gold", model);
    if (!golden_open(path)) return;
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    const Golden *ids = golden_get("ids"), *losses = golden_get("losses"),
                 *norms = golden_get("norms");
    int steps = (int)ids->dims[0], B = (int)ids->dims[1], L = (int)ids->dims[2] - 1;
    Trainer *x = mamba_trainer_new(m, B, L, 2);
    int32_t *in = malloc(sizeof *in * (size_t)B * L), *targets = malloc(sizeof *in * (size_t)B * L);
    float *got = alloc_aligned(sizeof *got * (size_t)steps),
          *got_norms = alloc_aligned(sizeof *got * (size_t)steps);
    for (int step = 0; step < steps; step++) {
        for (int i = 0; i < B * L; i++) {
            size_t at = ((size_t)step * B + i / L) * (L + 1) + i % L;
            in[i] = (int32_t)ids->data[at], targets[i] = (int32_t)ids->data[at + 1];
        }
        double norm = 0;
        got[step] =
            (float)(mamba_train_pass(x, in, targets, 1.0f / (float)(B * L), true) / (B * L));
        expect(mamba_train_step(x, &(AdamW){3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1}, &norm) == 0,
               "a step");
        got_norms[step] = (float)norm;
    }
    snprintf(name, sizeof name, "%s: ten losses of AdamW", model);
    check_floats(name, got, losses->data, losses->n, 1e-4);
    snprintf(name, sizeof name, "%s: ten norms of the gradient", model);
    check_floats(name, got_norms, norms->data, norms->n,
                 3e-4); // falcon's move by 4e-5 when its weights move by 1e-7
    GradientCheck c = {model, 0};
    each_tensor(m, check_final, &c);
    mamba_trainer_free(x);
    free(in), free(targets), free_aligned(got), free_aligned(got_norms);
    mamba_free(m), mamba_free(stored);
    golden_close();
}

// Fresh weights: what the reference's own initialisation promises.
static void test_initialisation(void) {
    Config c;
    parse_shape("64,2,300", "f32", &c);
    Model *m = mamba_random_model(&c, 3), *again = mamba_random_model(&c, 3),
          *other = mamba_random_model(&c, 4);
    double lowest = 1, highest = 0, mean = 0, square = 0;
    bool A_good = true, D_good = true;
    for (int layer = 0; layer < 2; layer++)
        for (int e = 0; e < c.E; e++) {
            double dt = softplus_double((double)f32(&m->layer[layer].dt_bias)[e]);
            lowest = fmin(lowest, dt), highest = fmax(highest, dt);
            D_good &= f32(&m->layer[layer].D_skip)[e] == 1;
            for (int n = 0; n < c.N; n++)
                A_good &=
                    fabs(exp((double)f32(&m->layer[layer].A_log)[e * c.N + n]) - (n + 1)) < 1e-4;
        }
    for (size_t i = 0; i < 300 * 64; i++)
        mean += f32(&m->embedding)[i],
            square += (double)f32(&m->embedding)[i] * f32(&m->embedding)[i];
    report(lowest >= 0.00099 && highest <= 0.1001 && lowest < 0.0015 && highest > 0.07,
           "softplus(dt_bias) spans [0.001, 0.1]", "%.5f to %.5f", lowest, highest);
    expect(A_good && D_good, "A is -1 to -N and D is 1");
    report(fabs(sqrt(square / 19200) - 0.02) < 0.0006 && fabs(mean / 19200) < 0.0006,
           "embedding's deviation is 0.02", "%.5f", sqrt(square / 19200));
    expect(!memcmp(m->weights, again->weights, m->tensors_bytes) &&
               memcmp(m->weights, other->weights, m->tensors_bytes),
           "the seed fixes the weights");
    mamba_free(m), mamba_free(again), mamba_free(other);
}

static void
test_masked_loss(void) { // masked rows add nothing, neither to the loss nor to a gradient
    Config c;
    parse_shape("16,1,20", "f32", &c);
    Model *m = mamba_random_model(&c, 1);
    Trainer *x = mamba_trainer_new(m, 1, 6, 1);
    const int32_t ids[6] = {1, 2, 3, 4, 5, 6}, masked[6] = {-1, -1, -1, -1, -1, -1},
                  one[6] = {-1, -1, 7, -1, -1, -1};
    double none = mamba_train_pass(x, ids, masked, 1, true), norm = 1, single;
    AdamWPass p = {.x = x, .base = m->weights};
    each_tensor(m, norm_tensor, &p);
    norm = p.squares;
    single = mamba_train_pass(x, ids, one, 1, false);
    State *s = mamba_state_new(m);
    Acts *a = mamba_acts_new(m, 1);
    mamba_prefill(m, a, s, ids, 3, NULL, NULL);
    double want = log_sum_exp(s->logits, 20) - s->logits[7];
    report(none == 0 && norm == 0 && fabs(single - want) < 1e-5, "masked positions do not count",
           "%.6f, want %.6f", single, want);
    ((float *)(uintptr_t)m->layer[0].conv.data)[0] = NAN;
    refresh_derived(m);
    mamba_train_pass(x, ids, one, 1, true);
    float before = f32(&m->embedding)[0];
    expect(mamba_train_step(x, &(AdamW){1, 0.9f, 0.95f, 1e-8f, 0, 1}, &norm) == -1 &&
               strstr(error_text, "not finite") && f32(&m->embedding)[0] == before,
           "a NaN stops the run, names a tensor, and leaves the weights");
    mamba_state_free(s), mamba_acts_free(a), mamba_trainer_free(x), mamba_free(m);
}

static void test_gradients(void) {
    for (team = 1; team <= 3; team += 2) {
        test_scan_backward(1, 1, 1, 1), test_scan_backward(2, SCAN_CHUNK + 1, 5, 3),
            test_scan_backward(1, 3 * SCAN_CHUNK, SCAN_WIDTH + 3, 4);
        test_scan_backward(3, 2 * SCAN_CHUNK - 1, 2 * SCAN_WIDTH, 2);
        test_conv_backward(1, 3, 4), test_conv_backward(2, VL + 1, 4),
            test_conv_backward(17, 2 * VL, 1), test_conv_backward(9, 5, 3);
    }
    team = 1;
    test_adamw("plain"), test_adamw("odd"), test_adamw("falcon");
    test_initialisation(), test_masked_loss();
    test_model_gradients("plain"), test_model_gradients("odd"), test_model_gradients("falcon");
    test_passes("plain"), test_passes("odd"), test_passes("falcon");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokenizer: tests/tokenizer.cases holds small tokenizers, texts with the ids of the `tokenizers`
// library, and lists of ids with its text (dev/make_tok_golden.py). tests/test_tokenizer.py
// compares 100,000 strings where the library is there.

static bool decodes_to(const Tokenizer *t, const unsigned char *ids, uint32_t n_ids,
                       const unsigned char *text, size_t n) {
    Utf8Pending pending = {.n = 0};
    unsigned char out[4096]; // the cases are short: 12 tokens of at most 100 bytes
    size_t n_out = 0, bytes;
    for (uint32_t i = 0; i < n_ids; i++) {
        const unsigned char *token = tokenizer_token(t, (int)u32_at(ids + 4 * (size_t)i), &bytes);
        if (n_out + 3 * (bytes + 8) > sizeof out) return false;
        n_out += utf8_push(&pending, token, bytes, out + n_out);
    }
    n_out += utf8_flush(&pending, out + n_out);
    return n_out == n && memcmp(out, text, n) == 0;
}

// However the bytes arrive, what has been put out is whole characters, and all of it is what one
// piece would have given.
static void test_streaming(void) {
    static const unsigned char text[] =
        "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x90\x8D!"
        "\xE2\x82\xF0\x9F\x90\xFFz\xED\xA0\x80\xC0\xAF\xF4\x90\x80\x80\xE2";
    unsigned char whole[200], part[200];
    Utf8Pending pending = {.n = 0};
    size_t n = sizeof text - 1, n_whole = utf8_push(&pending, text, n, whole);
    n_whole += utf8_flush(&pending, whole + n_whole);
    bool same = true, valid = true;
    for (size_t piece = 1; piece <= n; piece++) {
        size_t n_part = 0;
        for (size_t at = 0; at < n; at += piece) {
            size_t more =
                utf8_push(&pending, text + at, n - at < piece ? n - at : piece, part + n_part);
            valid &= utf8_check(part + n_part, more) == more;
            n_part += more;
        }
        n_part += utf8_flush(&pending, part + n_part);
        same &= n_part == n_whole && !memcmp(part, whole, n_whole);
    }
    expect(same, "text in pieces of any size is the same text");
    expect(valid, "no piece cuts a character");
}

// A megabyte that is one word is no harder than other text: these would take minutes if anything
// were quadratic.
static void test_long_words(void) {
    const char *const unit[] = {"a",  " ",   "\xF0\x9F\x98\x80", "\xCC\x81", "e\xCC\x81", "7", "!",
                                "\n", "the", "etaoinshrdlu"};
    Session x = test_session("models/tales.bin", 1);
    char *text = malloc(1 << 20);
    for (int i = 0; i < COUNT(unit); i++) {
        size_t length = strlen(unit[i]), n = 0;
        int32_t *ids = NULL;
        for (size_t at = 0; at < 1 << 20; at++) text[at] = unit[i][at % length];
        double start = seconds();
        int result = mamba_encode(x.model, text, (1 << 20) / length * length, &ids, &n);
        char name[64];
        snprintf(name, sizeof name, "1 MB of one unit, kind %d", i);
        report(result == 0 && n > 1000 && seconds() - start < 60, name, "%zu ids, %.2f s", n,
               seconds() - start);
        free(ids);
    }
    free(text);
    session_close(&x);
}

static void test_tokenizer(void) {
    size_t size = 0, at = 8;
    unsigned char *file = (unsigned char *)read_text("tests/tokenizer.cases", &size);
    int n_tokenizers = 0, n_cut = 0, n_encoded = 0, n_decoded = 0, n_wrong = 0;
    Tokenizer *t = NULL;
    if (!expect(file && size > 8 && memcmp(file, "mtcs\1\0\0\0", 8) == 0, "tests/tokenizer.cases"))
        return free(file);
    while (at + 8 <= size) {
        long where = (long)at;
        uint32_t type = u32_at(file + at), n = u32_at(file + at + 4);
        const unsigned char *text = file + at + 8, *ids = text + n + 4;
        at += 8 + n;
        if (type == 1) {
            if (t) tokenizer_close(t);
            t = tokenizer_open(text, n);
            if (!t) {
                expect(false, error_text);
                break;
            }
            n_tokenizers++;
            for (size_t cut = 0; cut < n;
                 cut += n / 61 + 1, n_cut++) // whatever is cut off is noticed
                if (tokenizer_open(text, cut))
                    n_wrong++, printf("     the tokenizer at %ld opens when cut to %zu bytes\n",
                                      where, cut);
            continue;
        }
        uint32_t n_ids = u32_at(file + at);
        at += 4 + 4 * (size_t)n_ids;
        if (type == 3) {
            n_decoded++;
            if (!decodes_to(t, ids, n_ids, text, n))
                n_wrong++, printf("     wrong text for the ids at %ld\n", where);
            continue;
        }
        int32_t *got = NULL;
        size_t n_got = 0;
        bool same = tokenizer_encode(t, (const char *)text, n, &got, &n_got) == 0 && n_got == n_ids;
        for (size_t i = 0; same && i < n_got; i++) same = (uint32_t)got[i] == u32_at(ids + 4 * i);
        n_encoded++;
        if (!same) n_wrong++, printf("     wrong ids for the text at %ld\n", where);
        free(got);
    }
    if (t) tokenizer_close(t);
    report(n_wrong == 0 && n_tokenizers >= 9 && n_encoded > 200 && n_decoded > 50,
           "the library's ids and texts",
           "%d tokenizers: %d texts, %d lists of ids, %d cut files, %d wrong", n_tokenizers,
           n_encoded, n_decoded, n_cut, n_wrong);
    free(file);
    test_streaming();
    test_long_words();
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampler: each setting does what its help says, and draws follow the probabilities

static void set_logits(Session *x, float (*f)(int)) {
    for (int v = 0; v < x->model->config.V; v++) x->state->logits[v] = f(v);
}
static float four_likely(int v) {
    return v == 10 ? logf(4) : v == 20 ? logf(3) : v == 30 ? logf(2) : v == 40 ? 0 : -100;
}
static float padding_likely(int v) { return v >= 256 ? 50 : v == 65 ? 1 : 0; }
static float not_finite(int v) { return v == 7 ? NAN : 0; }
static float flat(int v) { return (float)(v % 3) * 0.001f; }

static void check_draws(Session *x, const char *name, Sampling how, double p10, double p20,
                        double p30, double p40) {
    enum { DRAWS = 40000 };
    const double want[4] = {p10, p20, p30, p40};
    long count[4] = {0}, others = 0;
    for (int i = 0; i < DRAWS; i++) {
        int32_t id = mamba_sample(x->model, x->acts, x->state, &how);
        if (id % 10 == 0 && id >= 10 && id <= 40) count[id / 10 - 1]++;
        else others++;
    }
    double worst = 0; // in standard deviations
    for (int i = 0; i < 4; i++)
        worst = fmax(worst, fabs(count[i] - DRAWS * want[i]) /
                                fmax(1e-9, sqrt(DRAWS * want[i] * (1 - want[i])) +
                                               (want[i] == 0 || want[i] == 1 ? 1e-3 : 0)));
    report(worst < 4.5 && others == 0, name,
           "%ld %ld %ld %ld of %d draws, %.1f standard deviations off", count[0], count[1],
           count[2], count[3], DRAWS, worst);
}

static void test_sampler(void) {
    Session x = test_session("tests/odd.bin", 1); // 259 ids, of which the tokenizer knows 256
    x.state->position = 1, x.state->random = 5;
    Sampling greedy = {0, 1, 0, 0, 1}, all = {1, 1, 0, 0, 1}, one = {1, 1, 1, 0, 1};
    set_logits(&x, four_likely);
    expect(mamba_sample(x.model, x.acts, x.state, &greedy) == 10,
           "temperature 0 takes the likeliest");
    expect(mamba_sample(x.model, x.acts, x.state, &one) == 10, "top-k 1 takes the likeliest");
    check_draws(&x, "plain draws", all, .4, .3, .2, .1);
    check_draws(&x, "temperature 0.5 squares the odds", (Sampling){0.5f, 1, 0, 0, 1}, 16 / 30.,
                9 / 30., 4 / 30., 1 / 30.);
    check_draws(&x, "top-k 2", (Sampling){1, 1, 2, 0, 1}, 4 / 7., 3 / 7., 0, 0);
    check_draws(&x, "top-p 0.65 keeps the two that reach it", (Sampling){1, 0.65f, 0, 0, 1}, 4 / 7.,
                3 / 7., 0, 0);
    check_draws(&x, "top-p 0.75 keeps three", (Sampling){1, 0.75f, 0, 0, 1}, 4 / 9., 3 / 9., 2 / 9.,
                0);
    check_draws(&x, "top-p 0 keeps the likeliest", (Sampling){1, 0, 0, 0, 1}, 1, 0, 0, 0);
    check_draws(&x, "top-p is of what top-k left", (Sampling){1, 0.5f, 2, 0, 1}, 1, 0, 0, 0);
    check_draws(&x, "min-p 0.45 keeps three", (Sampling){1, 1, 0, 0.45f, 1}, 4 / 9., 3 / 9., 2 / 9.,
                0);
    x.state->recent[0] = 10, x.state->recent[1] = 10,
    x.state->n_recent = 2; // once penalised, though it occurs twice
    check_draws(&x, "repeat penalty 2 halves the logit", (Sampling){1, 1, 0, 0, 2}, 2 / 8., 3 / 8.,
                2 / 8., 1 / 8.);
    x.state->n_recent = 0;
    set_logits(&x, padding_likely);
    bool padded = false;
    for (int i = 0; i < 2000; i++) padded |= mamba_sample(x.model, x.acts, x.state, &all) >= 256;
    expect(!padded && mamba_sample(x.model, x.acts, x.state, &greedy) == 65,
           "ids without a token are never drawn");
    set_logits(&x, flat);
    uint64_t before = x.state->random;
    int32_t first = mamba_sample(x.model, x.acts, x.state, &all);
    x.state->random = before;
    expect(mamba_sample(x.model, x.acts, x.state, &all) == first,
           "the same seed draws the same token");
    bool ordered = true; // the heap against a plain sort, on logits with many ties
    double mass;
    int n = 256, kept;
    for (int i = 0; i < n; i++)
        x.acts->order[i] = i, x.acts->probs[i] = (float)(random_u64(&test_random) % 50);
    kept = keep_likeliest(x.acts->order, n, x.acts->probs, &(Sampling){1, 0.9f, 100, 0, 1}, &mass);
    for (int i = 1; i < kept; i++)
        ordered &= x.acts->probs[x.acts->order[n - i]] >= x.acts->probs[x.acts->order[n - 1 - i]];
    for (int i = 0; i < n - kept; i++)
        ordered &= x.acts->probs[x.acts->order[i]] <= x.acts->probs[x.acts->order[n - kept]];
    expect(ordered && kept > 1 && kept <= 100, "candidates leave the heap in order");
    set_logits(&x, not_finite);
    expect(mamba_sample(x.model, x.acts, x.state, &all) == -1 && strstr(error_text, "token 7"),
           "a NaN logit is an error that names it");
    mamba_state_reset(x.model, x.state);
    expect(mamba_sample(x.model, x.acts, x.state, &all) == -1,
           "sampling before reading anything is an error");
    session_close(&x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Command line: every malformed one is an error that names the thing. (tests/test_cli.sh looks at
// the output.)

static void expect_error(const char *word, int argc, const char *const *argv) {
    char name[160] = "mamba";
    for (int i = 1; i < argc; i++)
        snprintf(name + strlen(name), sizeof name - strlen(name), " %.40s", argv[i]);
    error_text[0] = 0;
    int result = run_command(argc, (char **)(uintptr_t)argv);
    report(result == -1 && strstr(error_text, word), name, "%s", error_text);
}
#define ERROR_IN(word, ...) \
    expect_error(word, COUNT(((const char *[]){"mamba", __VA_ARGS__})), \
                 (const char *[]){"mamba", __VA_ARGS__})

static void test_command_line(void) {
    const char *m = "tests/odd.bin";
    ERROR_IN("--nope", m, "x", "--nope"), ERROR_IN("-n", m, "x", "-n"),
        ERROR_IN("-n", m, "x", "-n", "ten"), ERROR_IN("-n", m, "x", "-n", "1e3");
    ERROR_IN("-n", m, "x", "-n", "-2"), ERROR_IN("-n", m, "x", "-n", ""),
        ERROR_IN("-n", m, "x", "-n", "99999999999999999999");
    ERROR_IN("-t", m, "x", "-t", "nan"), ERROR_IN("-t", m, "x", "-t", "-1"),
        ERROR_IN("-t", m, "x", "-t", "1x"), ERROR_IN("-p", m, "x", "-p", "1.5");
    ERROR_IN("-k", m, "x", "-k", "-1"), ERROR_IN("--min-p", m, "x", "--min-p", "2"),
        ERROR_IN("--repeat-penalty", m, "x", "--repeat-penalty", "0");
    ERROR_IN("-T", m, "x", "-T", "0"), ERROR_IN("-s", m, "x", "-s", "-5"),
        ERROR_IN("--stop", m, "x", "--stop", ""), ERROR_IN("too many", m, "x", "y");
    ERROR_IN("--samples", m, "x", "--samples", "0"),
        ERROR_IN("--samples", m, "x", "--samples", "1000000000000"),
        ERROR_IN("needs a prompt", m, "--samples", "2"),
        ERROR_IN("one too many", m, "x", "--batch", "tests/test_cli.sh");
    ERROR_IN("no-such-prompts", m, "--batch", "tests/no-such-prompts"),
        ERROR_IN("empty", m, "--batch", "/dev/null");
    ERROR_IN("--save-state", m, "x", "--samples", "2", "--save-state", "tests/never"),
        ERROR_IN("--show-selection", m, "x", "--samples", "2", "--show-selection"),
        ERROR_IN("-n 0", m, "x", "--samples", "2", "-n", "0"), ERROR_IN("--null", m, "x", "--null"),
        ERROR_IN("line 2", "models/tales.bin", "--batch", "models/tales.bin");
    ERROR_IN("no-such-file", m, "x", "--load-state", "tests/no-such-file"),
        ERROR_IN("no-such-model", "no-such-model", "x");
    ERROR_IN("model.bin", "info"), ERROR_IN("one argument too many", "info", m, m),
        ERROR_IN("--each", "info", m, "--each");
    ERROR_IN("no-such-text", "eval", m, "tests/no-such-text"), ERROR_IN("eval needs", "eval", m),
        ERROR_IN("tokenize needs", "tokenize");
    ERROR_IN("--tokens", "logits", m, "--tokens", "1,,2"),
        ERROR_IN("--tokens", "logits", m, "--tokens", "1,2,"),
        ERROR_IN("--tokens", "logits", m, "--tokens", "x");
    ERROR_IN("259", "logits", m, "--tokens", "259"), ERROR_IN("either", "logits", m),
        ERROR_IN("either", "logits", m, "x", "--tokens", "1");
    ERROR_IN("no/such", "logits", m, "x", "-o", "no/such/folder"), ERROR_IN("one of", "bench"),
        ERROR_IN("--shape", "bench", "--shape", "131m");
    ERROR_IN("--dtype", "bench", "--shape", "8,1,9", "--dtype", "f8"),
        ERROR_IN("--scan", "bench", "--scan", "1,2"),
        ERROR_IN("out of range", "bench", "--shape", "0,1,1");
    ERROR_IN("byte 0", "models/tales.bin", "\xff"),
        ERROR_IN("byte 3", "models/tales.bin", "abc\xed\xa0\x80"),
        ERROR_IN("byte 1", "models/tales.bin", "a\xc3");
}

// ---------------------------------------------------------------------------------------------------------------------
// The GPU against the processor (make test-cuda; only in a build with the backend): logits, states
// in both directions, gradients, training, generation, on odd shapes, everything twice for its bits

#ifdef MAMBA_CUDA
static const struct {
    const char *name;
    Config config;
    int lengths[6];
} GPU_SHAPES[] = {
#define SHAPE(d, layers, v, e, n, k, r, bits) \
    {.type = F32, \
     .flags = bits, \
     .D = d, \
     .n_layer = layers, \
     .V = v, \
     .E = e, \
     .N = n, \
     .K = k, \
     .R = r, \
     .norm_eps = 1e-5f, \
     .mixer_eps = 1e-6f, \
     .bos = -1, \
     .pad = -1, \
     .eos = {-1, -1, -1, -1}}
    {"usual",
     SHAPE(64, 2, 100, 128, 16, 4, 4, FLAG_TIED | FLAG_CONV_BIAS),
     {1, 2, 63, 64, 65, 300}},
    {"odd", SHAPE(37, 2, 131, 75, 5, 3, 3, FLAG_CONV_BIAS), {1, 2, 31, 33, 129, 257}},
    {"biases, wide state",
     SHAPE(48, 1, 70, 96, 64, 4, 3, FLAG_TIED | FLAG_CONV_BIAS | FLAG_PROJ_BIAS),
     {1, 3, 17, 64, 128, 130}},
    {"8 states, falcon", SHAPE(32, 2, 50, 64, 8, 2, 2, FLAG_MIXER_NORM), {1, 5, 16, 100, 127, 512}},
    {"one channel", SHAPE(1, 1, 3, 1, 1, 1, 1, FLAG_TIED), {1, 2, 3, 64, 65, 200}},
    {"many channels",
     SHAPE(24, 1, 30, 2200, 16, 4, 3, FLAG_TIED | FLAG_CONV_BIAS),
     {130, 200, 129, 257, 320, 150}},
    {"many channels, 8 states",
     SHAPE(24, 1, 30, 2177, 8, 4, 3, FLAG_TIED | FLAG_CONV_BIAS),
     {130, 200, 129, 257, 320, 150}},
    {"17 states, long conv",
     SHAPE(40, 1, 40, 200, 17, 9, 5, FLAG_TIED | FLAG_CONV_BIAS),
     {1, 4, 8, 9, 100, 321}},
};

static Acts *gpu_acts(const Model *m, bool float32) {
    Acts *a = mamba_acts_new(m, 1);
    if (a && mamba_acts_gpu(a, m, float32) == 0) return a;
    printf("FAIL no GPU: %s\n", error_text);
    exit(1);
}

static int32_t *random_ids(size_t n, int V) {
    int32_t *ids = malloc(n * sizeof *ids);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(random_u64(&test_random) % (uint64_t)V);
    return ids;
}

// Every logit of n ids, from state s: (n,V), malloc'd.
static float *every_logit(const Model *m, Acts *a, State *s, const int32_t *ids, size_t n) {
    size_t V = (size_t)m->config.V;
    Collected all = {malloc(n * V * sizeof(float)), 0, V};
    if (mamba_prefill(m, a, s, ids, n, collect, &all))
        printf("FAIL prefill: %s\n", error_text), n_failed++;
    return all.all;
}

// Logits of n tokens read in two pieces, the second of them possibly on the other side; and once
// more for the same bits.
static void check_gpu_logits(const char *label, const Model *m, const int32_t *ids, size_t n,
                             bool float32, double tolerance) {
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, float32);
    State *s = mamba_state_new(m), *g = mamba_state_new(m), *mixed = mamba_state_new(m);
    size_t V = (size_t)m->config.V, cut = n / 3;
    char name[160];
    float *want = every_logit(m, cpu, s, ids, n), *got = every_logit(m, gpu, g, ids, n);
    snprintf(name, sizeof name, "%s, %zu tokens: logits", label, n);
    check_floats(name, got, want, n * V, tolerance);
    State *copy = mamba_state_new(m);
    mamba_state_copy(m, copy, g); // fetches
    snprintf(name, sizeof name, "%s, %zu tokens: state h", label, n);
    check_floats(name, copy->h, s->h,
                 (size_t)m->config.n_layer * (size_t)m->config.N * (size_t)m->config.E, tolerance);
    if (m->config.K > 1) {
        snprintf(name, sizeof name, "%s, %zu tokens: state conv", label, n);
        check_floats(name, copy->conv, s->conv,
                     (size_t)m->config.n_layer * (size_t)(m->config.K - 1) * (size_t)m->config.E,
                     tolerance);
    }
    for (int gpu_first = 0; gpu_first < 2; gpu_first++) {
        mamba_state_reset(m, mixed);
        if (cut) mamba_prefill(m, gpu_first ? gpu : cpu, mixed, ids, cut, NULL, NULL);
        for (size_t t = cut; t < n && t < cut + 3; t++)
            mamba_step(m, gpu_first ? cpu : gpu, mixed, ids[t]);
        if (cut + 3 < n) mamba_prefill(m, gpu, mixed, ids + cut + 3, n - cut - 3, NULL, NULL);
        snprintf(name, sizeof name, "%s, %zu tokens: %s first, then the other", label, n,
                 gpu_first ? "GPU" : "CPU");
        check_floats(name, mixed->logits, want + (n - 1) * V, V, tolerance);
    }
    mamba_state_reset(m, g);
    float *again = every_logit(m, gpu, g, ids, n);
    snprintf(name, sizeof name, "%s, %zu tokens: the same bits twice", label, n);
    expect(!memcmp(again, got, n * V * sizeof(float)), name);
    free(want), free(got), free(again);
    mamba_state_free(s), mamba_state_free(g), mamba_state_free(mixed), mamba_state_free(copy);
    mamba_acts_free(cpu), mamba_acts_free(gpu);
}

typedef struct {
    const char *label;
    const float *got, *want, *base;
    double tolerance;
} GpuGradient;

static void check_gpu_gradient(void *context, const TensorInfo *info, Tensor *w) {
    GpuGradient *g = context;
    char name[160], tensor[LABEL];
    size_t at = (size_t)((const float *)w->data - g->base), n = tensor_elements(w);
    tensor_label(tensor, info);
    snprintf(name, sizeof name, "%s: d_ %s", g->label, tensor);
    check_floats(name, g->got + at, g->want + at, n, g->tolerance);
}

static void check_gpu_gradients(const char *label, Model *m, int B, int L, bool float32,
                                double tolerance) {
    size_t rows = (size_t)B * (size_t)L, floats = m->tensors_bytes / sizeof(float);
    int32_t *ids = random_ids(rows, m->config.V), *targets = random_ids(rows, m->config.V);
    if (rows > 2) targets[rows / 2] = -1;
    Trainer *cpu = mamba_trainer_new(m, B, L, 1), *gpu = mamba_trainer_new_gpu(m, B, L, float32);
    float *got = malloc(floats * sizeof(float)), *again = malloc(floats * sizeof(float));
    char name[160];
    if (!gpu) printf("FAIL trainer: %s\n", error_text), exit(1);
    double want_loss = mamba_train_pass(cpu, ids, targets, 1.0f / (float)rows, true) / (double)rows;
    float loss =
        (float)(mamba_train_pass(gpu, ids, targets, 1.0f / (float)rows, true) / (double)rows);
    GPU->trainer_get(gpu->gpu, NULL, NULL, NULL, got);
    snprintf(name, sizeof name, "%s, %d x %d: loss", label, B, L);
    check(name, &loss, &want_loss, 1, tolerance);
    snprintf(name, sizeof name, "%s, %d x %d", label, B, L);
    GpuGradient g = {name, got, cpu->gradient->weights, m->weights, tolerance};
    each_tensor(m, check_gpu_gradient, &g);
    mamba_trainer_fetch(gpu, true); // clears the gradient
    mamba_train_pass(gpu, ids, targets, 1.0f / (float)rows, true);
    GPU->trainer_get(gpu->gpu, NULL, NULL, NULL, again);
    snprintf(name, sizeof name, "%s, %d x %d: the same gradient bits twice", label, B, L);
    expect(!memcmp(got, again, floats * sizeof(float)), name);
    mamba_trainer_free(cpu), mamba_trainer_free(gpu);
    free(ids), free(targets), free(got), free(again);
}

// Twenty steps from the same weights on the same batches.
static void check_gpu_training(const Config *c, bool float32, double tolerance) {
    enum { STEPS = 20, B = 3, L = 70 };
    Model *m = mamba_random_model(c, 5), *other = mamba_random_model(c, 5);
    Trainer *cpu = mamba_trainer_new(m, B, L, 1),
            *gpu = mamba_trainer_new_gpu(other, B, L, float32);
    double want[STEPS], norm, want_norm;
    float got[STEPS], worst_norm = 0;
    int32_t *pattern = random_ids(B * L + 1, c->V);
    for (int step = 0; step < STEPS; step++) {
        AdamW how = {3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
        int32_t *ids = random_ids(B * L, c->V), *targets = random_ids(B * L, c->V);
        for (int i = 0; i < B * L; i++) // half of it can be learnt
            if (i % 2) ids[i] = pattern[i], targets[i] = pattern[i + 1];
        want[step] = mamba_train_pass(cpu, ids, targets, 1.0f / (B * L), true) / (B * L);
        got[step] = (float)(mamba_train_pass(gpu, ids, targets, 1.0f / (B * L), true) / (B * L));
        if (mamba_train_step(cpu, &how, &want_norm) || mamba_train_step(gpu, &how, &norm))
            printf("FAIL step: %s\n", error_text), n_failed++;
        worst_norm = fmaxf(worst_norm, (float)fabs(norm / want_norm - 1));
        free(ids), free(targets);
    }
    check(float32 ? "twenty losses, float32" : "twenty losses, bf16", got, want, STEPS, tolerance);
    double zero = 0;
    check(float32 ? "their norms, float32" : "their norms, bf16", &worst_norm, &zero, 1,
          30 * tolerance);
    expect(want[STEPS - 1] < want[0] - 0.3, "and the loss has fallen");
    mamba_trainer_fetch(gpu, false);
    if (float32)
        check_floats("weights after twenty steps", other->weights, m->weights, m->tensors_bytes / 4,
                     20 * tolerance);
    memset(other->weights, 0, 4); // still usable: a NaN weight stops the next step by name
    ((float *)other->weights)[0] = NAN, mamba_trainer_fetch(gpu, true);
    int32_t *ids = calloc(B * L, sizeof *ids);
    mamba_train_pass(gpu, ids, ids, 1, true);
    AdamW how = {3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    expect(mamba_train_step(gpu, &how, &norm) == -1 && strstr(error_text, "not finite"),
           "a NaN stops the step");
    free(ids), free(pattern);
    mamba_trainer_free(cpu), mamba_trainer_free(gpu);
    mamba_free(m), mamba_free(other);
}

static void check_gpu_generation(const char *path, bool float32) {
    enum { STEPS = 64 };
    Model *m = mamba_load(path);
    if (!m) printf("FAIL %s\n", error_text), exit(1);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, float32);
    State *s = mamba_state_new(m), *g = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int V = m->config.V;
    int32_t *prompt = random_ids(20, V < 200 ? V : 200), *ids = malloc(STEPS * 65 * sizeof *ids),
            want[3 * STEPS];
    unsigned char *allowed = malloc((size_t)V);
    char name[160];
    for (int v = 0; v < V; v++) allowed[v] = !m->tokenizer || tokenizer_has(m->tokenizer, v);
    mamba_prefill(m, cpu, s, prompt, 20, NULL, NULL);
    for (int i = 0; i < 3 * STEPS; i++)
        want[i] = mamba_sample(m, cpu, s, &greedy), mamba_step(m, cpu, s, want[i]);
    const int batches[] = {1, 2, 7, 33, 65};
    for (int k = 0; k < COUNT(batches); k++) {
        int S = batches[k], same = 0, total = 0;
        uint64_t random[65] = {0};
        mamba_state_reset(m, g);
        if (mamba_prefill(m, gpu, g, prompt, 20, NULL, NULL))
            printf("FAIL prefill %s\n", error_text), n_failed++;
        GPU->generate_start(gpu->gpu, S, &greedy, random, 20, g->recent, g->n_recent, allowed);
        for (int part = 0; part < 3; part++) {
            if (GPU->generate(gpu->gpu, ids, STEPS))
                printf("FAIL generate %s\n", GPU->error()), n_failed++;
            for (int i = 0; i < STEPS; i++)
                for (int q = 0; q < S; q++)
                    same += ids[i * S + q] == want[part * STEPS + i], total++;
        }
        snprintf(name, sizeof name, "%s: greedy tokens, %d sequences%s", path, S,
                 float32 ? "" : ", bf16");
        if (float32) report(same == total, name, "%d of %d as on the CPU", same, total);
        else
            report(same >= 8 * S, name, "%d of %d as on the CPU (rounding may part ways)", same,
                   total);
        mamba_state_reset(m, g); // the next prefill sets a fresh state
        gpu->held = NULL, g->ahead = NULL;
    }
    free(prompt), free(ids), free(allowed);
    mamba_state_free(s), mamba_state_free(g);
    mamba_acts_free(cpu), mamba_acts_free(gpu), mamba_free(m);
}

// The step of S sequences in bf16, kernels of its own where shapes allow: after 20 greedy tokens
// every sequence has the same ones, and the first one's logits, h and window are those of the CPU
// for these tokens.
static const struct {
    const char *name;
    Config config;
} STEP_SHAPES[] = {
    {"step", SHAPE(64, 3, 100, 128, 16, 4, 8, FLAG_TIED | FLAG_CONV_BIAS)},
    {"step, 8 states, falcon", SHAPE(96, 2, 333, 192, 8, 2, 16, FLAG_MIXER_NORM)},
    {"step, 1048 channels", SHAPE(40, 2, 77, 1048, 4, 3, 24, FLAG_TIED)},
    {"step, of the 130M model's width",
     SHAPE(768, 2, 1000, 1536, 16, 4, 48, FLAG_TIED | FLAG_CONV_BIAS)},
    {"step, of the 2.8B model's width", SHAPE(2560, 1, 301, 5120, 16, 4, 160, FLAG_CONV_BIAS)},
    {"step, width 1024, 8 states, two taps", SHAPE(1024, 2, 211, 2048, 8, 2, 40, FLAG_TIED)},
    {"step, width 1536, 12 states, no convolution",
     SHAPE(1536, 2, 99, 3072, 12, 1, 96, FLAG_CONV_BIAS)},
    {"step, width 2048, 4 states, three taps", SHAPE(2048, 2, 130, 4096, 4, 3, 128, 0)},
    {"step, odd", SHAPE(36, 2, 90, 75, 5, 3, 3, FLAG_CONV_BIAS)},
    {"step, a channel without neighbours",
     SHAPE(384, 3, 99, 1049, 4, 3, 24, FLAG_TIED)}, // blocks with few channels or none
    {"step, few channels", SHAPE(128, 3, 1001, 192, 8, 2, 16, FLAG_MIXER_NORM)},
    {"step, no convolution", SHAPE(1152, 2, 99, 2056, 12, 1, 8, 0)},
    {"step, of the widest", SHAPE(4096, 1, 64, 8192, 16, 4, 256, FLAG_CONV_BIAS | FLAG_MIXER_NORM)},
};

static void check_gpu_step(const char *label, const Config *shape, int S) {
    enum { STEPS = 20, PROMPT = 9 };
    Config c = *shape;
    c.type = BF16;
    Model *m = mamba_random_model(&c, 21);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, false);
    State *s = mamba_state_new(m), *g = mamba_state_new(m), *got = mamba_state_new(m),
          *twice = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    size_t V = (size_t)c.V, layers = (size_t)c.n_layer * (size_t)c.E;
    int32_t *prompt = random_ids(PROMPT, c.V), *ids = malloc((size_t)(STEPS * S) * sizeof *ids),
            *again = malloc((size_t)(STEPS * S) * sizeof *ids);
    unsigned char *allowed = malloc(V);
    uint64_t *random = calloc((size_t)S, sizeof *random);
    char name[160];
    memset(allowed, 1, V);
    mamba_prefill(m, cpu, s, prompt, PROMPT, NULL, NULL);
    if (mamba_prefill(m, gpu, g, prompt, PROMPT, NULL, NULL))
        printf("FAIL prefill %s\n", error_text), n_failed++;
    GPU->generate_start(gpu->gpu, S, &greedy, random, PROMPT, g->recent, g->n_recent, allowed);
    if (GPU->generate(gpu->gpu, ids, STEPS)) printf("FAIL generate %s\n", GPU->error()), n_failed++;
    GPU->get_state(gpu->gpu, got->conv, got->h, got->logits);
    mamba_state_reset(m, g); // all of it again
    gpu->held = NULL, g->ahead = NULL;
    if (mamba_prefill(m, gpu, g, prompt, PROMPT, NULL, NULL))
        printf("FAIL prefill %s\n", error_text), n_failed++;
    GPU->generate_start(gpu->gpu, S, &greedy, random, PROMPT, g->recent, g->n_recent, allowed);
    if (GPU->generate(gpu->gpu, again, STEPS))
        printf("FAIL generate %s\n", GPU->error()), n_failed++;
    GPU->get_state(gpu->gpu, twice->conv, twice->h, twice->logits);
    snprintf(name, sizeof name, "%s, %d sequences: the same bits twice", label, S);
    expect(!memcmp(again, ids, (size_t)(STEPS * S) * sizeof *ids) &&
               !memcmp(twice->h, got->h, layers * (size_t)c.N * sizeof(float)) &&
               !memcmp(twice->logits, got->logits, V * sizeof(float)),
           name);
    static char gpu_name[256];
    double copied, flops,
        used; // measured once: it leaves 2 GB of other numbers in the memory that later models get
    if (!*gpu_name) GPU->measure(&copied, &flops, &used, gpu_name);
    if (c.D >= 768 && c.E == 2 * c.D && c.D % 256 == 0 && c.D <= 2560 &&
        (strstr(gpu_name, "H100") || strstr(gpu_name, "H200"))) {
        const char *form = GPU->step_form(gpu->gpu),
                   *wanted = S == 1 ? "one kernel for one sequence" : "one kernel";
        snprintf(name, sizeof name, "%s, %d sequences: by %s", label, S, wanted);
        report(!strcmp(form, wanted), name, "%s", form);
    }
    int same = 0;
    for (int i = 0; i < STEPS; i++) {
        for (int q = 0; q < S; q++) same += ids[i * S + q] == ids[i * S];
        mamba_step(m, cpu, s, ids[i * S]);
    }
    snprintf(name, sizeof name, "%s, %d sequences: the same tokens", label, S);
    report(same == STEPS * S, name, "%d of %d", same, STEPS * S);
    snprintf(name, sizeof name, "%s, %d sequences: logits", label, S);
    check_floats(name, got->logits, s->logits, V, 3e-2);
    snprintf(name, sizeof name, "%s, %d sequences: h", label, S);
    check_floats(name, got->h, s->h, layers * (size_t)c.N, 3e-2);
    snprintf(name, sizeof name, "%s, %d sequences: window", label, S);
    check_floats(name, got->conv, s->conv, layers * (size_t)(c.K - 1), 3e-2);
    free(prompt), free(ids), free(again), free(allowed), free(random);
    mamba_state_free(s), mamba_state_free(g), mamba_state_free(got), mamba_state_free(twice);
    gpu->held = NULL, g->ahead = NULL;
    mamba_acts_free(cpu), mamba_acts_free(gpu), mamba_free(m);
}

// Sequences of different prompts in one step: each says the same wherever among the others it is,
// and the first one's logits and state are those of the CPU.
static void check_gpu_places(void) {
    enum { S = 45, STEPS = 16 };
    Config c = SHAPE(768, 3, 1500, 1536, 16, 4, 48, FLAG_TIED | FLAG_CONV_BIAS);
    c.type = BF16;
    Model *m = mamba_random_model(&c, 33);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, false);
    State *zero = mamba_state_new(m), *got = mamba_state_new(m), *s = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    const int turns[] = {0, 1, 19};
    int V = c.V, same = 0, alike = 0;
    int32_t *prompt[S], *ids = malloc(sizeof(int32_t) * STEPS * S),
                        *first = malloc(sizeof(int32_t) * STEPS * S);
    uint64_t random[S] = {0};
    unsigned char *allowed = malloc((size_t)V);
    char name[160];
    memset(allowed, 1, (size_t)V);
    for (int q = 0; q < S; q++) prompt[q] = random_ids((size_t)(q % 7 + 1), V);
    for (int k = 0; k < COUNT(turns); k++) {
        if (GPU->set_state(gpu->gpu, zero->conv, zero->h, zero->logits))
            printf("FAIL state: %s\n", GPU->error()), n_failed++;
        for (int place = 0; place < S; place++) {
            int q = (place + turns[k]) % S;
            if (GPU->prefill(gpu->gpu, prompt[q], (size_t)(q % 7 + 1), NULL, NULL) ||
                GPU->gather(gpu->gpu, place, S))
                printf("FAIL gather: %s\n", GPU->error()), n_failed++;
        }
        if (GPU->generate_start(gpu->gpu, S, &greedy, random, 0, zero->recent, 0, allowed) ||
            GPU->generate(gpu->gpu, k ? ids : first, STEPS))
            printf("FAIL generate: %s\n", GPU->error()), n_failed++;
        GPU->get_state(gpu->gpu, got->conv, got->h, got->logits);
        for (int i = 0; i < STEPS * S && k; i++)
            same += ids[i] == first[i / S * S + (i % S + turns[k]) % S];
        mamba_state_reset(m, s);
        mamba_prefill(m, cpu, s, prompt[turns[k]], (size_t)(turns[k] % 7 + 1), NULL, NULL);
        for (int i = 0; i < STEPS; i++) mamba_step(m, cpu, s, (k ? ids : first)[i * S]);
        snprintf(name, sizeof name, "45 prompts, the first is number %d: logits", turns[k]);
        check_floats(name, got->logits, s->logits, (size_t)V, 3e-2);
        snprintf(name, sizeof name, "45 prompts, the first is number %d: h", turns[k]);
        check_floats(name, got->h, s->h, (size_t)c.n_layer * (size_t)c.E * (size_t)c.N, 3e-2);
    }
    report(same == (COUNT(turns) - 1) * STEPS * S, "45 prompts: the same tokens in any place",
           "%d of %d", same, (COUNT(turns) - 1) * STEPS * S);
    for (int q = 1; q < S; q++) alike += first[(STEPS - 1) * S + q] == first[(STEPS - 1) * S];
    report(alike < S - 1, "45 prompts: not all say the same", "%d of %d do", alike, S - 1);
    for (int q = 0; q < S; q++) free(prompt[q]);
    free(ids), free(first), free(allowed);
    mamba_state_free(zero), mamba_state_free(got), mamba_state_free(s);
    mamba_acts_free(cpu), mamba_acts_free(gpu), mamba_free(m);
}

// Prompts read one after the other and generated from together say what each says alone.
static void check_gpu_gathered(const char *path) {
    enum { S = 3, STEPS = 64 };
    const int lengths[S] = {20, 1, 70};
    Model *m = mamba_load(path);
    if (!m) printf("FAIL %s\n", error_text), exit(1);
    Acts *gpu = gpu_acts(m, true);
    State *zero = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int V = m->config.V, same = 0, differ = 0;
    int32_t *prompt[S], alone[S][STEPS], together[STEPS * S];
    uint64_t random[S] = {0};
    unsigned char *allowed = malloc((size_t)V);
    char name[160];
    for (int v = 0; v < V; v++) allowed[v] = !m->tokenizer || tokenizer_has(m->tokenizer, v);
    for (int s = 0; s < S; s++) {
        prompt[s] = random_ids((size_t)lengths[s], V < 200 ? V : 200);
        if (GPU->set_state(gpu->gpu, zero->conv, zero->h, zero->logits) ||
            GPU->prefill(gpu->gpu, prompt[s], (size_t)lengths[s], NULL, NULL) ||
            GPU->generate_start(gpu->gpu, 1, &greedy, random, (uint64_t)lengths[s], zero->recent, 0,
                                allowed) ||
            GPU->generate(gpu->gpu, alone[s], STEPS))
            printf("FAIL alone: %s\n", GPU->error()), n_failed++;
    }
    for (int round = 0; round < 2; round++) {
        if (GPU->set_state(gpu->gpu, zero->conv, zero->h, zero->logits))
            printf("FAIL state: %s\n", GPU->error()), n_failed++;
        for (int s = 0; s < S; s++)
            if (GPU->prefill(gpu->gpu, prompt[s], (size_t)lengths[s], NULL, NULL) ||
                GPU->gather(gpu->gpu, s, S))
                printf("FAIL gather: %s\n", GPU->error()), n_failed++;
        expect(GPU->generate_start(gpu->gpu, S + 1, &greedy, random, 0, zero->recent, 0, allowed) ==
                   -1,
               "as many sequences as were gathered, or none");
        if (GPU->generate_start(gpu->gpu, S, &greedy, random, 0, zero->recent, 0, allowed) ||
            GPU->generate(gpu->gpu, together, STEPS))
            printf("FAIL together: %s\n", GPU->error()), n_failed++;
        for (int i = 0; i < STEPS; i++)
            for (int s = 0; s < S; s++)
                same += together[i * S + s] == alone[s][i],
                    differ += s && alone[s][i] != alone[0][i]; // or the test would see nothing
    }
    snprintf(name, sizeof name, "%s: three prompts together as each alone", path);
    report(same == 2 * S * STEPS && differ > STEPS / 4, name, "%d of %d tokens", same,
           2 * S * STEPS);
    for (int s = 0; s < S; s++) free(prompt[s]);
    free(allowed);
    mamba_state_free(zero), mamba_acts_free(gpu), mamba_free(m);
}

// The sampler's draws against the probabilities that mamba.c's own rules leave: 4096 first tokens
// of one state.
static void check_gpu_draws(const char *name, const Model *m, Acts *cpu, State *s, Sampling how) {
    enum { S = 4096 };
    Acts *gpu = gpu_acts(m, true);
    State *g = mamba_state_new(m);
    int V = m->config.V;
    unsigned char *allowed = malloc((size_t)V);
    uint64_t *random = malloc(S * sizeof *random);
    int32_t *ids = malloc(S * sizeof *ids);
    float *gpu_share = calloc((size_t)V, sizeof(float)),
          *cpu_share = calloc((size_t)V, sizeof(float));
    for (int v = 0; v < V; v++) allowed[v] = !m->tokenizer || tokenizer_has(m->tokenizer, v);
    for (int i = 0; i < S; i++) random[i] = random_u64(&test_random);
    mamba_state_copy(m, g, s);
    GPU->set_state(gpu->gpu, g->conv, g->h, g->logits);
    GPU->generate_start(gpu->gpu, S, &how, random, g->position, g->recent, g->n_recent, allowed);
    if (GPU->generate(gpu->gpu, ids, 1)) printf("FAIL generate %s\n", GPU->error()), n_failed++;
    bool allowed_only = true;
    for (int i = 0; i < S; i++) {
        allowed_only &= ids[i] >= 0 && allowed[ids[i]];
        gpu_share[ids[i] < 0 ? 0 : ids[i]] += 1.0f / S;
        cpu_share[mamba_sample(m, cpu, s, &how)] += 1.0f / S;
    }
    double chi = 0; // two samples of one distribution: mean as many as there are kinds
    int kinds = 0;
    for (int v = 0; v < V; v++) {
        double a = gpu_share[v] * S, b = cpu_share[v] * S;
        if (a + b > 10) chi += (a - b) * (a - b) / (a + b), kinds++;
    }
    bool good = allowed_only && chi < kinds + 5 * sqrt(2.0 * kinds) + 5;
    report(good, name, "chi squared %.1f for %d kinds of tokens", chi, kinds);
    free(allowed), free(random), free(ids), free(gpu_share), free(cpu_share);
    mamba_state_free(g), mamba_acts_free(gpu);
}

static void test_cuda(void) {
    char name[160];
    for (int i = 0; i < COUNT(GPU_SHAPES); i++) {
        Model *m = mamba_random_model(&GPU_SHAPES[i].config, 11 + (uint64_t)i);
        for (int k = 0; k < 6; k++) {
            int L = GPU_SHAPES[i].lengths[k],
                B = GPU_SHAPES[i].config.E > 2000 ? 3 + k % 2 : 1 + (i + k) % 3;
            int32_t *ids = random_ids((size_t)L, m->config.V);
            check_gpu_logits(GPU_SHAPES[i].name, m, ids, (size_t)L, true, 2e-5);
            free(ids);
            check_gpu_gradients(GPU_SHAPES[i].name, m, B, L, true, 2e-4);
            if (k % 2 || GPU_SHAPES[i].config.D == 1)
                continue; // a norm of one number has a derivative of 0: only rounding is left
            snprintf(name, sizeof name, "%s, bf16", GPU_SHAPES[i].name);
            check_gpu_gradients(name, m, B, L, false, 5e-2);
        }
        mamba_free(m);
    }
    const char *models[] = {"tests/odd.bin", "tests/falcon.bin", "tests/plain.bin",
                            "models/tales.bin"};
    for (int i = 0; i < COUNT(models); i++) {
        Model *m = mamba_load(models[i]);
        int32_t *ids = random_ids(1100, m->config.V);
        check_gpu_logits(models[i], m, ids, 1100, true, 5e-5);
        if (m->config.type == BF16)
            check_gpu_logits("tales, bf16 products", m, ids, 1100, false, 3e-2);
        free(ids), mamba_free(m);
        check_gpu_generation(models[i], true);
    }
    check_gpu_generation("models/tales.bin", false);
    for (int four_bits = 0; four_bits < 2; four_bits++) { // unpacked at upload
        Model *from = mamba_load("models/tales.bin"), *m = mamba_quantize(from, four_bits);
        int32_t *ids = random_ids(300, m->config.V);
        check_gpu_logits(four_bits ? "tales in q4" : "tales in q8", m, ids, 300, true, 5e-5);
        check_gpu_logits(four_bits ? "tales in q4, bf16 products" : "tales in q8, bf16 products", m,
                         ids, 300, false, 3e-2);
        free(ids), mamba_free(m), mamba_free(from);
    }
    { // products of 8,192 rows and more are others than those of few
        Config c = SHAPE(512, 2, 60, 1024, 16, 4, 32, FLAG_TIED | FLAG_CONV_BIAS);
        c.type = BF16;
        Model *m = mamba_random_model(&c, 5);
        int32_t *ids = random_ids(16400, c.V);
        check_gpu_logits("bf16, a long text", m, ids, 16400, false, 3e-2);
        free(ids), mamba_free(m);
    }
    for (int i = 0; i < COUNT(STEP_SHAPES); i++) {
        const int sequences[] = {1, 2, 3, 16, 17, 47, 64};
        for (int k = 0; k < COUNT(sequences) && (k == 0 || STEP_SHAPES[i].config.D < 4096); k++)
            check_gpu_step(STEP_SHAPES[i].name, &STEP_SHAPES[i].config, sequences[k]);
    }
    check_gpu_places();
    check_gpu_gathered("models/tales.bin");
    check_gpu_training(&GPU_SHAPES[0].config, true, 1e-4);
    check_gpu_training(&GPU_SHAPES[0].config, false, 1e-2);
    check_gpu_training(&GPU_SHAPES[1].config, true, 1e-4);
    Session x = test_session("models/tales.bin", 1);
    int32_t *ids = NULL;
    size_t n = 0;
    mamba_encode(x.model, "Once upon a time there was a", 28, &ids, &n);
    mamba_prefill(x.model, x.acts, x.state, ids, n, NULL, NULL);
    check_gpu_draws("GPU draws, temperature 1", x.model, x.acts, x.state,
                    (Sampling){1, 1, 0, 0, 1});
    check_gpu_draws("GPU draws, temperature 0.7", x.model, x.acts, x.state,
                    (Sampling){0.7f, 1, 0, 0, 1});
    check_gpu_draws("GPU draws, top-k 20", x.model, x.acts, x.state, (Sampling){1, 1, 20, 0, 1});
    check_gpu_draws("GPU draws, top-p 0.8", x.model, x.acts, x.state, (Sampling){1, 0.8f, 0, 0, 1});
    check_gpu_draws("GPU draws, top-k 40, top-p 0.9, temperature 1.3", x.model, x.acts, x.state,
                    (Sampling){1.3f, 0.9f, 40, 0, 1});
    check_gpu_draws("GPU draws, min-p 0.05", x.model, x.acts, x.state,
                    (Sampling){1, 1, 0, 0.05f, 1});
    check_gpu_draws("GPU draws, repeat penalty 1.5", x.model, x.acts, x.state,
                    (Sampling){1, 1, 0, 0, 1.5f});
    free(ids);
    session_close(&x);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------

int main(int argc, char **argv) {
    const struct {
        const char *name;
        void (*run)(void);
    } group[] = {
        {"vectors", test_vectors},
        {"kernels", test_kernels},
        {"scan", test_scan},
        {"model", test_model},
        {"gradients", test_gradients},
        {"state", test_state},
        {"loader", test_loader},
        {"quantiser", test_quantiser},
        {"tokenizer", test_tokenizer},
        {"sampler", test_sampler},
        {"command line", test_command_line},
#ifdef MAMBA_CUDA
        {"cuda", test_cuda},
#endif
    };
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "all")) test_everything = true;
        else only = argv[i];
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    backend.cpu = true; // the groups other than cuda
    for (int i = 0; i < COUNT(group); i++) {
        if (only && !strstr(group[i].name, only)) continue;
        double start = seconds();
        group[i].run();
        printf("---- %s, %.1f s\n", group[i].name, seconds() - start);
    }
    if (sizeof(size_t) < 8) skip("files over 4 GB", "needs a 64-bit size_t");
    printf("%d passed, %d failed, %d skipped\n", n_passed, n_failed, n_skipped);
    return n_failed || !n_passed;
}
