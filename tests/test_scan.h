// The scan: every form against the recurrence in double precision, written here from the paper.

typedef struct {
    int L, E, N;
    float *u, *delta;  // (L,E)
    float *A_neg, *h;  // (N,E); h: the state before the first step
    float *BC, *skip;  // (L,2N): B_ssm then C_ssm; (E)
    float *carry;      // scratch memory of scan_in_pieces
    double *y, *h_end; // (L,E) and (N,E): the answers, in double precision
    double largest;    // the largest term in a sum of h
} ScanCase;

static ScanCase scan_case(int L, int E, int N) {
    ScanCase s = {.L = L, .E = E, .N = N};
    size_t LE = (size_t)L * E, NE = (size_t)N * E;
    s.u = random_floats(LE, -2, 2);
    s.BC = random_floats((size_t)L * 2 * N, -1, 1);
    s.skip = random_floats((size_t)E, -1, 1);
    s.h = random_floats(NE, -3, 3);
    s.delta = random_floats(LE, 0, 1);
    s.A_neg = random_floats(NE, 0, 1);
    s.carry = random_floats(scan_carry_floats(E, N), 7, 8);
    for (size_t i = 0; i < LE; i++) s.delta[i] = expf(uniform(-7, 0.5f)); // from 0.001 to 1.6
    for (size_t i = 0; i < LE && L % 2 == 0; i += 17)
        s.delta[i] *= 300; // some steps forget everything
    for (size_t i = 0; i < NE; i++) s.A_neg[i] = -expf(uniform(-3, 3));
    s.y = malloc(LE * sizeof *s.y);
    s.h_end = doubles(s.h, NE);
    for (int t = 0; t < L; t++)
        for (int e = 0; e < E; e++) {
            double sum = (double)s.skip[e] * s.u[(size_t)t * E + e],
                   dt = s.delta[(size_t)t * E + e];
            for (int n = 0; n < N; n++) {
                double *h = &s.h_end[(size_t)n * E + e];
                double kept = exp(dt * s.A_neg[(size_t)n * E + e]) * *h,
                       inject = dt * s.BC[(size_t)t * 2 * N + n] * s.u[(size_t)t * E + e];
                *h = kept + inject;
                s.largest = fmax(s.largest, fmax(fabs(kept), fabs(inject)));
                sum += s.BC[(size_t)t * 2 * N + N + n] * *h;
            }
            s.y[(size_t)t * E + e] = sum;
        }
    return s;
}

// A state of one number may be the small difference of larger ones: its error is relative to them.
static double h_tolerance(const ScanCase *s) {
    double cancelled = s->N * s->E == 1 ? s->largest / fabs(s->h_end[0]) : 1;
    return 2e-6 * fmax(1, cancelled);
}

static void scan_case_free(ScanCase *s) {
    FREE_ALIGNED(s->u, s->delta, s->A_neg, s->BC, s->skip);
    FREE_ALIGNED(s->h, s->carry);
    FREE(s->y, s->h_end);
}

static Scan scan_of(const ScanCase *s, int t0, int t1) {
    size_t at = (size_t)t0 * s->E, ld = 2 * (size_t)s->N;
    const float *B = s->BC + t0 * ld;
    return (Scan){s->u + at, s->delta + at, s->A_neg, B,   B + s->N, s->skip, ld,
                  1,         t1 - t0,       s->E,     s->N};
}

// Steps t0 .. t1, cut into `pieces` pieces of time. y (L,E) or NULL; h (N,E) in place.
static void run_scan(float *y, float *h, const ScanCase *s, int t0, int t1, int pieces) {
    Scan part = scan_of(s, t0, t1);
    LayerState seq = {NULL, h};
    float *to = y ? y + (size_t)t0 * s->E : NULL;
    if (pieces > 1) TEAM(scan_in_pieces(to, h, &part, pieces, s->carry))
    else TEAM(scan(to, &seq, &part, NULL))
}

// How a case is computed; from 1 on: in so many pieces of time.
enum { DEFINITION = 0, SINGLE_TOKENS = -1, TWO_CALLS = -2 };

static void check_scan(const ScanCase *s, int way) {
    int L = s->L, E = s->E, N = s->N;
    float *y = random_floats((size_t)L * E, 7, 8), *h = copy_floats(s->h, (size_t)N * E);
    if (way == DEFINITION) {
        Scan all = scan_of(s, 0, L);
        recurrence_plain(y, h, NULL, &all, 0, E, 0, L);
    } else if (way == SINGLE_TOKENS)
        for (int t = 0; t < L; t++) run_scan(y, h, s, t, t + 1, 1);
    else if (way == TWO_CALLS) {
        run_scan(y, h, s, 0, L / 3, 1);
        run_scan(y, h, s, L / 3, L, 1);
    } else run_scan(y, h, s, 0, L, way);
    char name[96];
    if (way > 0) { // h has the same bits where y is not asked for
        float *alone = copy_floats(s->h, (size_t)N * E);
        run_scan(NULL, alone, s, 0, L, way);
        snprintf(name, sizeof name, "scan L %d E %d N %d pieces %d: h without y", L, E, N, way);
        expect(!memcmp(h, alone, (size_t)N * E * sizeof *h), name);
        free_aligned(alone);
    }
    const char *what = way == DEFINITION      ? "the definition"
                       : way == SINGLE_TOKENS ? "scan by single tokens"
                       : way == TWO_CALLS     ? "scan in two calls"
                                              : "scan";
    snprintf(name, sizeof name, "%s L %d E %d N %d pieces %d", what, L, E, N, way);
    check(name, y, s->y, (size_t)L * E, 2e-6);
    strcat(name, ", h");
    check(name, h, s->h_end, (size_t)N * E, h_tolerance(s));
    FREE_ALIGNED(y, h);
}

static void test_scan(void) {
    const int lengths[] = {1, 2, 3, 4, 5, 63, 64, 65, 1000},
              shapes[][2] = {{1, 1}, {7, 16}, {33, 5}, {16, 64}};
    for (int k = 0; k < 9; k++)
        for (int shape = 0; shape < 4; shape++) {
            ScanCase s = scan_case(lengths[k], shapes[shape][0], shapes[shape][1]);
            team = 1 + (k + shape) % 3;
            for (int way = TWO_CALLS; way <= SCAN_TASKS; way += way < 2 ? 1 : 7)
                if (way <= s.L) check_scan(&s, way);
            scan_case_free(&s);
        }
    team = 1;
    // The worked example of the scan in mamba.c. combine() depends on the order: (1/4, 2.5) and
    // then (1/4, 5.5) is 6.125; the other way round it would be 3.875.
    const float ones[4] = {1, 1, 1, 1}, half_life = -logf(2), BC[8] = {1, 1, 2, 1, 3, 1, 4, 1},
                zero = 0;
    float y[4], h = 0, carry[2 * SCAN_TASKS];
    Scan example = {ones, ones, &half_life, BC, BC + 1, &zero, 2, 1, 4, 1, 1};
    TEAM(scan_in_pieces(y, &h, &example, 2, carry))
    const double want[4] = {1, 2.5, 4.25, 6.125};
    check("scan of the worked example", y, want, 4, 1e-6);
    expect(scan_pieces(1 << 20, 1536) == 1 && scan_pieces(4096, 16) > 1 && scan_pieces(31, 16) == 1,
           "time is cut only where channels run out");
}
