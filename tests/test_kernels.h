// Operations of the forward pass, each against a reference in double precision, on teams of 1 and
// 3 threads.

static void test_norm(int L, int D, int ld, bool weighted, bool biased) {
    float *x = random_floats((size_t)L * ld, -1, 5), *w = random_floats((size_t)D, -2, 2),
          *bias = random_floats((size_t)D, -2, 2), *out = random_floats((size_t)L * ld, 0, 1);
    double *want = doubles(out, (size_t)L * ld);
    for (int t = 0; t < L; t++) {
        double mean = 0, squares = 0;
        for (int d = 0; d < D && biased; d++) mean += (double)x[t * ld + d] / D;
        for (int d = 0; d < D; d++) squares += (x[t * ld + d] - mean) * (x[t * ld + d] - mean);
        for (int d = 0; d < D; d++)
            want[t * ld + d] =
                (x[t * ld + d] - mean) / sqrt(squares / D + 1e-5) * (weighted ? w[d] : 1) +
                (biased ? bias[d] : 0);
    }
    TEAM(norm_rows(out, x, weighted ? w : NULL, biased ? bias : NULL, 1e-5f, L, D, (size_t)ld))
    check(biased ? "LayerNorm" : "RMSNorm", out, want, (size_t)L * ld, 1e-6);
    FREE_ALIGNED(x, w, bias, out);
    free(want);
}

static double bf16_value(uint16_t bits) {
    int exponent = bits >> 7 & 255, mantissa = bits & 127;
    double x =
        exponent ? ldexp(1 + mantissa / 128.0, exponent - 127) : ldexp(mantissa / 128.0, -126);
    return bits >> 15 ? -x : x;
}

// Q8 and Q4: the scale of a row's 32 weights in a tile, and this tile.
static double stored_scale(const Tensor *w, int row, int column, const unsigned char **tile) {
    size_t tiles = ((size_t)w->cols + 31) / 32, bytes = w->type == Q8 ? 64 + 1024 : 64 + 512;
    *tile = (const unsigned char *)w->data +
            ((size_t)(row / 32) * tiles + (size_t)(column / 32)) * bytes;
    uint16_t scale;
    memcpy(&scale, *tile + row % 32 * 2, 2);
    return bf16_value(scale);
}

// Q8 and Q4: one code. The last code of a word is in two's complement, the others have an offset.
static int stored_code(const Tensor *w, int row, int column) {
    const unsigned char *tile;
    int bits = w->type == Q8 ? 8 : 4, codes = 32 / bits, i = column % 32 / codes,
        j = column % codes;
    uint32_t word;
    stored_scale(w, row, column, &tile);
    memcpy(&word, tile + 64 + (i * 32 + row % 32) * 4, 4);
    int code = (int)(word >> (bits * j) & ((1u << bits) - 1)), offset = 1 << (bits - 1);
    return j < codes - 1 ? code - offset : code >= offset ? code - 2 * offset : code;
}

// One weight of any storage type. This is a second reader, written from the definition of the
// format in the README.
static double stored_value(const Tensor *w, int row, int column) {
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

static uint16_t random_bf16(void) {
    uint64_t sign_mantissa = random_u64(&test_random) & 0x807F;
    return (uint16_t)(sign_mantissa | (110 + random_u64(&test_random) % 17) << 7);
}
static uint16_t random_f16(void) { // one in five is subnormal
    uint64_t bits = random_u64(&test_random);
    return (uint16_t)(bits & (random_u64(&test_random) % 5 ? 0xBBFF : 0x83FF));
}

// matmul of random weights: any bit pattern that is a finite number, subnormal ones too.
static void test_matmul(Type type, int L, int I, int O, int ldx, bool biased) {
    size_t n = (size_t)I * O;
    Tensor w = {NULL, O, I, type};
    size_t bytes = tensor_bytes(&w);
    // What must be finite: the scales at the start of each tile, or all numbers.
    size_t stride = is_quantized(type) ? tile_bytes(type) : bytes;
    size_t finite = is_quantized(type) ? TILE_SCALES : bytes;
    uint16_t *bits = alloc_aligned(bytes + 2);
    float *weights = random_floats(n, -1, 1), *x = random_floats((size_t)L * ldx, -1, 1),
          *bias = random_floats((size_t)O, -1, 1);
    float *out = random_floats((size_t)L * O + 8, 7, 8),
          *packed = random_floats(matmul_floats((size_t)L, (size_t)I), 7, 8);
    for (size_t i = 0; i < bytes; i++)
        ((unsigned char *)bits)[i] = (unsigned char)random_u64(&test_random);
    for (size_t at = 0; at < bytes; at += stride)
        for (size_t i = at / 2; i < (at + finite) / 2; i++)
            bits[i] = type == F16 ? random_f16() : random_bf16();
    w.data = type == F32 ? (void *)weights : (void *)bits;
    double *want = malloc(((size_t)L * O + 1) * sizeof *want);
    for (int t = 0; t < L; t++)
        for (int o = 0; o < O; o++) {
            double sum = biased ? bias[o] : 0;
            for (int i = 0; i < I; i++) sum += stored_value(&w, o, i) * x[(size_t)t * ldx + i];
            want[(size_t)t * O + o] = sum;
        }
    float guard = out[(size_t)L * O];
    TEAM(matmul(out, (size_t)O, x, (size_t)ldx, &w, biased ? bias : NULL, (Rows){L, false, packed}))
    char name[96];
    snprintf(name, sizeof name, "matmul %s L %d I %d O %d, team of %d", type_name(type), L, I, O,
             team);
    // With VL = 1 a long dot product has few partial sums, so its error is larger.
    check(name, out, want, (size_t)L * O, I > 1000 ? 5e-6 : 2e-6);
    if (out[(size_t)L * O] != guard) expect(false, "matmul wrote past its output");
    free(want);
    free_aligned(bits);
    FREE_ALIGNED(weights, x, bias, out, packed);
}

// x of one sign. The codes are stored with an offset of 128 or 8, and the offset's part of the sum
// is larger than the sum. So some bits are lost; the tolerance says how many.
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
    TEAM(matmul(out, O, x, I, &w, NULL, (Rows){1, true, NULL}))
    check(type == Q8 ? "matmul q8, one sign" : "matmul q4, one sign", out, want, O, 2e-6);
    FREE_ALIGNED(weights, x, out, (void *)(uintptr_t)w.data);
}

// The product of a row has the same bits alone and beside up to 16 other rows, on any team.
static void test_few_rows(Type type, int I, int O) {
    enum { MOST = 17 };
    size_t n = (size_t)I * O, ldx = (size_t)I + 3;
    float *x = random_floats(MOST * ldx, -1, 1), *weights = random_floats(n, -1, 1),
          *bias = random_floats((size_t)O, -1, 1);
    float *alone = random_floats((size_t)MOST * O, 7, 8),
          *out = random_floats((size_t)MOST * O + 1, 7, 8), guard,
          *packed = random_floats(matmul_floats(MOST, (size_t)I), 7, 8);
    uint16_t *bits = malloc((n + 1) * 2);
    for (size_t i = 0; i < n; i++)
        bits[i] = (uint16_t)(random_u64(&test_random) & 0xBBFF); // finite in f16 and bf16
    Tensor w = {type == F32 ? (void *)weights : (void *)bits, O, I, type};
    if (is_quantized(type)) {
        w.data = alloc_aligned(tensor_bytes(&w));
        quantize_tensor(&w, &(Tensor){weights, O, I, F32});
    }
    team = 1;
    for (int t = 0; t < MOST; t++)
        TEAM(matmul(alone + (size_t)t * O, (size_t)O, x + t * ldx, ldx, &w, bias,
                    (Rows){1, true, NULL}))
    bool same = true;
    for (team = 1; team <= MOST_THREADS; team++)
        for (int L = 1; L <= MOST; L++) {
            guard = out[(size_t)L * O];
            TEAM(matmul(out, (size_t)O, x, ldx, &w, bias, (Rows){L, true, packed}))
            same = same && !memcmp(out, alone, (size_t)L * O * sizeof *out) &&
                   out[(size_t)L * O] == guard;
        }
    char name[96];
    snprintf(name, sizeof name, "1 to %d rows have each row's bits, %s, I %d O %d", MOST,
             type_name(type), I, O);
    expect(same, name);
    if (is_quantized(type)) free_aligned((void *)(uintptr_t)w.data);
    free(bits);
    FREE_ALIGNED(x, weights, bias, alone, out);
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
    Conv conv = {xz, w, biased ? bias : NULL, 1, L, E, K};
    LayerState seq = {window, NULL}, seq_step = {window_step, NULL};
    TEAM(conv1d_silu(u, &seq, &conv))
    check("conv1d_silu", u, want, (size_t)L * E, 2e-6);
    check("conv1d_silu window", window, last, rows * E, 0);
    for (int t = 0; t < L; t++) {
        Conv token = {xz + (size_t)t * 2 * E, w, biased ? bias : NULL, 1, 1, E, K};
        TEAM(conv1d_silu(u_step + (size_t)t * E, &seq_step, &token))
    }
    check("conv1d_silu by single tokens", u_step, want, (size_t)L * E, 2e-6);
    check("conv1d_silu by single tokens: window", window_step, last, rows * E, 0);
    FREE(want, last);
    FREE_ALIGNED(xz, w, bias, window, window_step, u, u_step);
}

static void test_elementwise(int L, int E) {
    size_t n = (size_t)L * E;
    float *a = random_floats(n, -9, 9), *b = random_floats(2 * n, -9, 9),
          *bias = random_floats((size_t)E, -5, 1);
    float *sum = copy_floats(a, n), *delta = copy_floats(a, n), *g = copy_floats(a, n),
          *in_step = copy_floats(a, n), *g_step = copy_floats(a, n);
    double *want = doubles(a, n);
    for (size_t i = 0; i < n; i++) want[i] += b[i];
    TEAM(add_rows(sum, sum, b, L, E))
    check("add_rows", sum, want, n, 1e-7);
    for (size_t i = 0; i < n; i++) want[i] = softplus_double((double)a[i] + bias[i % E]);
    TEAM(softplus_bias(delta, bias, (Rows){L, false, NULL}, E))
    check("softplus_bias", delta, want, n, 1e-6);
    TEAM(softplus_bias(in_step, bias, (Rows){L, true, NULL}, E))
    check("softplus_bias of a step", in_step, want, n, 1e-6);
    for (size_t i = 0; i < n; i++) want[i] = a[i] * silu_double(b[i / E * 2 * E + E + i % E]);
    TEAM(gate(g, g, b, (Rows){L, false, NULL}, E))
    check("gate", g, want, n, 1e-6);
    TEAM(gate(g_step, a, b, (Rows){L, true, NULL}, E))
    check("gate of a step", g_step, want, n, 1e-6);
    free(want);
    FREE_ALIGNED(a, b, bias, sum, delta, g, in_step, g_step);
}

static void test_kernels(void) {
    for (team = 1; team <= MOST_THREADS; team += 2) {
        test_norm(1, 1, 1, true, false);
        test_norm(5, 37, 41, true, false);
        test_norm(3, 16, 16, false, false);
        test_norm(5, 37, 41, true, true);
        test_norm(2, 16, 16, true, true);
        test_norm(3, 50, 50, false, true);
        for (int type = 0; type < N_TYPES; type++) {
            test_matmul((Type)type, 1, 33, 7, 40, true);
            test_matmul((Type)type, 3, 16, 5, 16, false);
            test_matmul((Type)type, 4, 1, 1, 1, true);
            test_matmul((Type)type, 13, KC + 3, 2 * NR + 1, KC + 9, true);
            test_matmul((Type)type, 16 * MR + 5, 48, 35 * NR, 48, false);
            test_matmul((Type)type, 9 * MR + 1, 3, NR - 1, 3, true);
            test_matmul((Type)type, 2, X_BLOCK + 33, 34, X_BLOCK + 40, true);
        }
        for (int type = Q8; type <= Q4; type++) test_positive((Type)type);
        for (int K = 1; K <= 5; K++) {
            test_conv(1, 7, K, true);
            test_conv(2, VL + 1, K, false);
            test_conv(19, 2 * VL, K, true);
        }
        test_elementwise(1, 1);
        test_elementwise(5, 3 * VL + 2);
        test_elementwise(3, 2 * STEP_LANES + 5);
    }
    for (int type = 0; type < N_TYPES; type++) {
        test_few_rows((Type)type, 1, 1);
        test_few_rows((Type)type, 2 * VL - 1, 9);
        test_few_rows((Type)type, 4 * VL, 2);
        test_few_rows((Type)type, 6 * VL + 5, 43);
        test_few_rows((Type)type, FEW_L1 / 4 + 1, 8);
        test_few_rows((Type)type, X_BLOCK + 5, 2 * TILE + 9);
    }
    team = 1;
}
