// Every fast operation of cpu/ against its definition, the plain form of the same name in mamba.c,
// on shapes that end inside a vector, on teams of 1 and 3 threads. A build with -DPLAIN has only
// one form, and nothing to compare.

#ifdef PLAIN
static void test_plain(void) { skip("fast against plain", "a build with -DPLAIN has one form"); }
#else

// Both names of an operation must be there and mean different functions. If a name of
// cpu/plain_names.h were missing in cpu/fast_names.h, the plain form would run under both names.
static void check_two_forms(void) {
    typedef void (*Function)(void);
#define FORMS(name) {#name, (Function)name, (Function)name##_plain}
    const struct {
        const char *name;
        Function fast, plain;
    } form[] = {
        FORMS(tensor_widen),
        FORMS(norm_rows),
        FORMS(norm_rows_backward),
        FORMS(add_rows),
        FORMS(sum_rows),
        FORMS(sum_squares),
        FORMS(matmul_floats),
        FORMS(matmul),
        FORMS(matmul_backward),
        FORMS(log_sum_exp),
        FORMS(cross_entropy),
        FORMS(conv1d_silu),
        FORMS(conv1d_silu_backward),
        FORMS(softplus_bias),
        FORMS(softplus_backward),
        FORMS(gate),
        FORMS(gate_backward),
        FORMS(recurrence),
        FORMS(recurrence_again),
        FORMS(recurrence_backward),
    };
#undef FORMS
    const char *same = "";
    for (int i = 0; i < COUNT(form); i++)
        if (form[i].fast == form[i].plain) same = form[i].name;
    report(!*same, "every name means its fast form", "%s", same);
}

// Two equal sets of outputs: the plain form writes one, the fast form the other.
typedef struct {
    float *plain, *fast;
    size_t n;
} Both;

static Both both(size_t n, float lowest, float highest) {
    float *x = random_floats(n, lowest, highest);
    return (Both){x, copy_floats(x, n), n};
}

static void compare(const char *name, Both *b, double tolerance) {
    check_floats(name, b->fast, b->plain, b->n, tolerance);
    FREE_ALIGNED(b->plain, b->fast);
}

static void compare_norms(int T, int D, bool weighted, bool biased) {
    size_t ld = (size_t)D + 3, n = (size_t)T * ld;
    float *x = random_floats(n, -1, 3), *d_xn = random_floats(n, -1, 1),
          *weight = random_floats((size_t)D, -2, 2), *w = weighted ? weight : NULL,
          *bias = random_floats((size_t)D, -2, 2), *with = biased ? bias : NULL;
    float *scale = random_floats(2 * (size_t)T, 7, 8);
    Both xn = both(n, 7, 8), d_x = both(n, -1, 1), d_w = both((size_t)D, -1, 1),
         d_bias = both((size_t)D, -1, 1);
    TEAM(norm_rows_plain(xn.plain, x, w, with, 1e-5f, T, D, ld))
    TEAM(norm_rows(xn.fast, x, w, with, 1e-5f, T, D, ld))
    compare("norm_rows, fast and plain", &xn, 1e-6);
    for (int add = 0; add < 2; add++) {
        NormGrad plain = {d_x.plain, add, d_w.plain, biased ? d_bias.plain : NULL, scale},
                 fast = {d_x.fast, add, d_w.fast, biased ? d_bias.fast : NULL, scale};
        TEAM(norm_rows_backward_plain(&plain, d_xn, x, w, 1e-5f, T, D, ld))
        TEAM(norm_rows_backward(&fast, d_xn, x, w, 1e-5f, T, D, ld))
    }
    // The gradient of a LayerNorm of one number is 0: what both forms have is rounding.
    if (!biased || D > 1) compare("norm_rows_backward, fast and plain: d_x", &d_x, 2e-6);
    else FREE_ALIGNED(d_x.plain, d_x.fast);
    compare("norm_rows_backward, fast and plain: d_weight", &d_w, 2e-6);
    compare("norm_rows_backward, fast and plain: d_bias", &d_bias, 2e-6);
    FREE_ALIGNED(bias);
    FREE_ALIGNED(x, d_xn, weight, scale);
}

static void compare_rows(int T, int D) {
    size_t n = (size_t)T * D;
    float *a = random_floats(n, -2, 2), *b = random_floats(n, -2, 2);
    Both sum = both(n, 7, 8), total = both((size_t)D, -1, 1);
    TEAM(add_rows_plain(sum.plain, a, b, T, D))
    TEAM(add_rows(sum.fast, a, b, T, D))
    compare("add_rows, fast and plain", &sum, 0);
    TEAM(sum_rows_plain(total.plain, a, (size_t)D, T, D))
    TEAM(sum_rows(total.fast, a, (size_t)D, T, D))
    compare("sum_rows, fast and plain", &total, 1e-6);
    float squares = (float)sum_squares(a, n);
    double want = sum_squares_plain(a, n);
    check("sum_squares, fast and plain", &squares, &want, 1, 1e-6);
    FREE_ALIGNED(a, b);
}

static void compare_matmul(Type type, int T, int I, int O, bool step) {
    float *weights = random_floats((size_t)I * O, -1, 1), *x = random_floats((size_t)T * I, -1, 1),
          *bias = random_floats((size_t)O, -1, 1),
          *packed = random_floats(matmul_floats((size_t)T, (size_t)(I > O ? I : O)), 7, 8);
    Tensor from = {weights, O, I, F32}, w = {NULL, O, I, type};
    void *stored = alloc_aligned(tensor_bytes(&w));
    w.data = stored;
    if (is_quantized(type)) quantize_tensor(&w, &from);
    else
        for (size_t i = 0; i < (size_t)I * O; i++) narrow(stored, i, weights[i], type);
    Both out = both((size_t)T * O, 7, 8), row = both((size_t)I, 7, 8);
    const Rows rows = {T, step, packed};
    char name[96];
    TEAM(matmul_plain(out.plain, (size_t)O, x, (size_t)I, &w, bias, rows))
    TEAM(matmul(out.fast, (size_t)O, x, (size_t)I, &w, bias, rows))
    snprintf(name, sizeof name, "matmul %s T %d I %d O %d, fast and plain", type_name(type), T, I,
             O);
    compare(name, &out, 3e-6);
    tensor_widen_plain(row.plain, &w, O - 1, 0, I);
    tensor_widen(row.fast, &w, O - 1, 0, I);
    compare("tensor_widen, fast and plain", &row, 0);
    FREE_ALIGNED(weights, x, bias, packed, stored);
}

static void compare_matmul_backward(int T, int I, int O) {
    float *weights = random_floats((size_t)I * O, -1, 1), *x = random_floats((size_t)T * I, -1, 1),
          *d_out = random_floats((size_t)T * O, -1, 1);
    size_t widest = (size_t)(I > O ? I : O);
    float *packed = random_floats(matmul_floats((size_t)T, widest), 7, 8);
    Tensor w = {weights, O, I, F32};
    const Rows rows = {T, false, packed};
    Both d_x = both((size_t)T * I, 7, 8), d_W = both((size_t)I * O, -1, 1),
         d_bias = both((size_t)O, -1, 1);
    for (int add = 0; add < 2; add++) {
        MatmulGrad plain = {d_x.plain, add, d_W.plain, d_bias.plain};
        MatmulGrad fast = {d_x.fast, add, d_W.fast, d_bias.fast};
        TEAM(matmul_backward_plain(&plain, d_out, (size_t)O, x, (size_t)I, &w, rows))
        TEAM(matmul_backward(&fast, d_out, (size_t)O, x, (size_t)I, &w, rows))
    }
    compare("matmul_backward, fast and plain: d_x", &d_x, 3e-6);
    compare("matmul_backward, fast and plain: d_W", &d_W, 3e-6);
    compare("matmul_backward, fast and plain: d_bias", &d_bias, 1e-6);
    FREE_ALIGNED(weights, x, d_out, packed);
}

static void compare_loss(int T, int V) {
    int32_t targets[8] = {0, -1, V - 1, V / 2, 0, V / 3, -1, 0};
    Both logits = both((size_t)T * V, -9, 9), losses = both((size_t)T, 7, 8);
    float log_sum = (float)log_sum_exp(logits.fast, V);
    double want = log_sum_exp_plain(logits.fast, V);
    check("log_sum_exp, fast and plain", &log_sum, &want, 1, 1e-6);
    TEAM(cross_entropy_plain(losses.plain, logits.plain, targets, 0.5f, T, V))
    TEAM(cross_entropy(losses.fast, logits.fast, targets, 0.5f, T, V))
    // Where the target's p is near 1, loss and gradient are small differences of larger numbers. So
    // the larger numbers are compared: up to 9 (the logits), and the weight 0.5.
    for (int t = 0; t < T; t++) {
        if (targets[t] < 0) continue;
        losses.plain[t] += 9;
        losses.fast[t] += 9;
        logits.plain[(size_t)t * V + targets[t]] += 0.5f;
        logits.fast[(size_t)t * V + targets[t]] += 0.5f;
    }
    compare("cross_entropy, fast and plain: losses", &losses, 1e-6);
    compare("cross_entropy, fast and plain: gradient", &logits, 4e-6);
}

static void compare_conv(int B, int L, int E, int K, bool biased) {
    size_t BLE = (size_t)B * L * E, KE = (size_t)K * E, window = (size_t)(K - 1) * E;
    float *xz = random_floats(2 * BLE, -2, 2), *conv_t = random_floats(KE, -1, 1),
          *bias = random_floats((size_t)E, -1, 1), *before = random_floats(B * window, -2, 2);
    Conv c = {xz, conv_t, biased ? bias : NULL, B, L, E, K};
    Both u = both(BLE, 7, 8),
         windows = {copy_floats(before, B * window), copy_floats(before, B * window), B * window};
    LayerState plain_seq[4], fast_seq[4];
    for (int b = 0; b < B; b++) {
        plain_seq[b] = (LayerState){windows.plain + b * window, NULL};
        fast_seq[b] = (LayerState){windows.fast + b * window, NULL};
    }
    TEAM(conv1d_silu_plain(u.plain, plain_seq, &c))
    TEAM(conv1d_silu(u.fast, fast_seq, &c))
    compare("conv1d_silu, fast and plain", &u, 1e-6);
    compare("conv1d_silu, fast and plain: window", &windows, 0);

    float *d_u = random_floats(BLE, -1, 1), *d_c = random_floats((size_t)L * E, 7, 8);
    Both d_xz = both(2 * BLE, 7, 8), d_conv = both(KE, -1, 1), d_bias = both((size_t)E, -1, 1),
         d_window = both(B * window, 7, 8);
    ConvGrad plain = {d_xz.plain, d_conv.plain, d_bias.plain, d_window.plain, d_c};
    ConvGrad fast = {d_xz.fast, d_conv.fast, d_bias.fast, d_window.fast, d_c};
    TEAM(conv1d_silu_backward_plain(&plain, d_u, before, &c))
    TEAM(conv1d_silu_backward(&fast, d_u, before, &c))
    compare("conv1d_silu_backward, fast and plain: d_x", &d_xz, 1e-6);
    compare("conv1d_silu_backward, fast and plain: d_conv", &d_conv, 2e-6);
    compare("conv1d_silu_backward, fast and plain: d_bias", &d_bias, 2e-6);
    if (window) compare("conv1d_silu_backward, fast and plain: d_window", &d_window, 1e-6);
    else FREE_ALIGNED(d_window.plain, d_window.fast);
    FREE_ALIGNED(xz, conv_t, bias, before, d_u, d_c);
}

static void compare_elementwise(int T, int E, bool step) {
    size_t n = (size_t)T * E;
    float *bias = random_floats((size_t)E, -5, 1), *xz = random_floats(2 * n, -9, 9),
          *y = random_floats(n, -3, 3), *d_g = random_floats(n, -1, 1);
    const Rows rows = {T, step, NULL};
    Both delta = both(n, -9, 9), d_delta = both(n, -1, 1), g = both(n, 7, 8), d_y = both(n, 7, 8),
         d_xz = both(2 * n, 7, 8);
    TEAM(softplus_bias_plain(delta.plain, bias, rows, E))
    TEAM(softplus_bias(delta.fast, bias, rows, E))
    TEAM(softplus_backward_plain(d_delta.plain, delta.plain, T, E))
    TEAM(softplus_backward(d_delta.fast, delta.plain, T, E))
    compare("softplus_bias, fast and plain", &delta, 1e-6);
    compare("softplus_backward, fast and plain", &d_delta, 1e-6);
    TEAM(gate_plain(g.plain, y, xz, rows, E))
    TEAM(gate(g.fast, y, xz, rows, E))
    compare("gate, fast and plain", &g, 1e-6);
    g = both(n, 7, 8);
    TEAM(gate_backward_plain(d_y.plain, d_xz.plain, g.plain, d_g, y, xz, T, E))
    TEAM(gate_backward(d_y.fast, d_xz.fast, g.fast, d_g, y, xz, T, E))
    compare("gate_backward, fast and plain: d_y", &d_y, 1e-6);
    compare("gate_backward, fast and plain: d_xz", &d_xz, 1e-6);
    compare("gate_backward, fast and plain: g", &g, 1e-6);
    FREE_ALIGNED(bias, xz, y, d_g);
}

static void compare_recurrence(int L, int E, int N) {
    ScanCase k = scan_case(L, E, N);
    Scan s = scan_of(&k, 0, L);
    Both y = both((size_t)L * E, 7, 8), elapsed = both((size_t)E, 7, 8);
    Both h = {copy_floats(k.h, (size_t)N * E), copy_floats(k.h, (size_t)N * E), (size_t)N * E};
    Both alone = {copy_floats(k.h, (size_t)N * E), copy_floats(k.h, (size_t)N * E), (size_t)N * E};
    recurrence_plain(y.plain, h.plain, NULL, &s, 0, E, 0, L);
    recurrence(y.fast, h.fast, NULL, &s, 0, E, 0, L);
    recurrence_plain(NULL, alone.plain, elapsed.plain, &s, 0, E, 0, L);
    recurrence(NULL, alone.fast, elapsed.fast, &s, 0, E, 0, L);
    compare("recurrence, fast and plain: y", &y, 2e-6);
    const double tolerance = h_tolerance(&k);
    compare("recurrence, fast and plain: h", &h, tolerance);
    compare("recurrence, fast and plain: h without y", &alone, tolerance);
    compare("recurrence, fast and plain: elapsed", &elapsed, 1e-6);
    scan_case_free(&k);
}

// One row of the backward scan: its forward step again, then its backward step.
static void compare_recurrence_backward(int width, int N) {
    size_t step = (size_t)N * SCAN_WIDTH, e = (size_t)width;
    float *u = random_floats(e, -1, 1), *delta = random_floats(e, 0.01f, 0.6f),
          *BC = random_floats(2 * (size_t)N, -1, 1), *D = random_floats(e, -1, 1),
          *d_y = random_floats(e, -1, 1), *A = random_floats(step, -2, 0),
          *before = random_floats(step, -1, 1);
    Scan s = {u, delta, NULL, BC, BC + N, D, 2 * (size_t)N, 1, 1, width, N};
    Both h = both(step, 0, 0), decay = both(step, 0, 0), g = both(step, -1, 1),
         d_A = both(step, -1, 1), parts = both(2 * (size_t)N, 7, 8), d_u = both(e, 7, 8),
         d_delta = both(e, 7, 8);
    for (int form = 0; form < 2; form++) {
#define OF(b) (form ? (b).fast : (b).plain)
        ScanTask k = {.width = width, .A = A, .d_A = OF(d_A), .d_h = OF(g), .parts = OF(parts)};
        ScanGrad d = {.d_u = OF(d_u), .d_delta = OF(d_delta)};
        (form ? recurrence_again : recurrence_again_plain)(OF(h), OF(decay), before, &k, &s, 0);
        (form ? recurrence_backward : recurrence_backward_plain)(&k, &d, d_y, &s, 0, OF(h),
                                                                 OF(decay), before);
#undef OF
    }
    for (int n = 0; n < N; n++) // the plain form leaves channels beyond the width alone
        for (int i = width; i < SCAN_WIDTH; i++) {
            size_t at = (size_t)n * SCAN_WIDTH + i;
            h.fast[at] = h.plain[at];
            decay.fast[at] = decay.plain[at];
            g.fast[at] = g.plain[at];
            d_A.fast[at] = d_A.plain[at];
        }
    compare("recurrence_again, fast and plain: h", &h, 1e-6);
    compare("recurrence_again, fast and plain: decay", &decay, 1e-6);
    compare("recurrence_backward, fast and plain: g", &g, 1e-6);
    compare("recurrence_backward, fast and plain: d_A", &d_A, 1e-6);
    compare("recurrence_backward, fast and plain: d_B, d_C", &parts, 2e-6);
    compare("recurrence_backward, fast and plain: d_u", &d_u, 1e-6);
    compare("recurrence_backward, fast and plain: d_delta", &d_delta, 2e-6);
    FREE_ALIGNED(u, delta, BC, D, d_y, A, before);
}

static void test_plain(void) {
    check_two_forms();
    for (team = 1; team <= MOST_THREADS; team += 2) {
        compare_norms(1, 1, true, false);
        compare_norms(1, 1, true, true);
        compare_norms(5, 2 * VL + 3, true, false);
        compare_norms(5, 2 * VL + 3, true, true);
        compare_norms(3, VL, false, false);
        compare_norms(3, VL, false, true);
        compare_rows(1, 1);
        compare_rows(4, 3 * VL + 1);
        for (int type = 0; type < N_TYPES; type++) {
            compare_matmul((Type)type, 1, 3 * VL + 1, 37, true);
            compare_matmul((Type)type, 7, 2 * VL, 2 * VL + 5, true);
            compare_matmul((Type)type, 21, 3 * VL + 2, 37, false);
            compare_matmul((Type)type, 13, 600, 70, false);
        }
        compare_matmul_backward(1, 3, 2);
        compare_matmul_backward(21, 3 * VL + 2, 2 * VL + 5);
        compare_loss(8, 64 * VL + 5);
        compare_loss(8, 3); // of several rows: one alone may be the small difference of two logits
        compare_conv(1, 1, 7, 4, true);
        compare_conv(3, 1, 2 * VL + 3, 3, false);
        compare_conv(2, 9, 2 * VL + 3, 4, true);
        compare_conv(1, 2, VL, 1, false);
        compare_elementwise(1, 1, true);
        compare_elementwise(3, 2 * STEP_LANES + 5, true);
        compare_elementwise(5, 3 * VL + 2, false);
    }
    team = 1;
    compare_recurrence(1, 7, 16);
    compare_recurrence(33, 2 * VL + 3, 5);
    compare_recurrence(64, 1, 1);
    compare_recurrence_backward(1, 1);
    compare_recurrence_backward(SCAN_WIDTH - 1, 5);
    compare_recurrence_backward(SCAN_WIDTH, 16);
}
#endif
