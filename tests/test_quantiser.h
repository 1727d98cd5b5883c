// Quantiser: codes and scales against their definition in double precision; quantised models
// against the float32 models of the same values.

// The sum of squared errors of a group with this scale. Each weight takes its nearest code.
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
            error += group_error(w, n, scale, lowest, highest);
            plain += best;
            if (peak != 0) worst = fmax(worst, fabs(scale) / fabs(peak) * (type == Q8 ? 127 : 6));
        }
    }
    char name[96];
    snprintf(name, sizeof name, "quantize %s %d x %d of %g", type_name(type), rows, cols,
             (double)size);
    bool tiny = size < 1e-36f; // a bf16 scale is subnormal or 0 here
    // A single weight has the whole rounding error of its scale: 2^-8, squared.
    double scale_share = rows * cols == 1 ? 0x1p-16 : 4e-6;
    report(
        bad_codes == 0 &&
            (tiny || (error <= (rows * cols > 1000 ? 1.05 : 1.5) * plain + scale_share * squares &&
                      worst < 1.01)),
        name, "%d wrong codes, error %.3f%% of the weights, %.3f%% by scales that are not rounded",
        bad_codes, 100 * sqrt(error / (squares + 1e-300)), 100 * sqrt(plain / (squares + 1e-300)));
    x[rows * cols - 1] = NAN;
    expect(quantize_tensor(&to, &from) == -1, "a NaN is refused");
    FREE_ALIGNED(x, row, tiles);
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
    mamba_state_free(s);
    mamba_acts_free(a);
    return all.all;
}

static void test_quantized_model(const char *file, bool four_bits) {
    const char *path = scratch("quantized.bin"), *type = four_bits ? "q4" : "q8";
    char name[96];
    const char *argv[] = {"quantize", file, path, type};
    fflush(stderr);
    snprintf(name, sizeof name, "%s is written in %s", file, type);
    if (!expect(command_quantize(4, (char **)(uintptr_t)argv) == 0, name)) return;
    Model *from = mamba_load(file), *held = mamba_quantize(from, four_bits), *m = mamba_load(path),
          *floats = m ? mamba_float_copy(m) : NULL;
    expect(m && floats && held && mamba_verify(m) == 0, "and loads, and every byte is right");
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
        FREE_ALIGNED(got, want, same);
    }
    // info --verify finds a scale that is not a number.
    const unsigned char *tile;
    stored_scale(&held->embedding, 0, 0, &tile);
    ((uint16_t *)(uintptr_t)tile)[0] = 0x7F80;
    expect(mamba_verify(held) &&
               !strcmp(mamba_error(), "embedding holds a value that is not finite"),
           "a scale that is not finite is found");
    mamba_free(from);
    mamba_free(held);
    mamba_free(m);
    mamba_free(floats);
    test_batches(path);
    if (V > 1000) test_threads(path); // the larger model
    else {
        test_splits(path);
        test_damaged_models(path, test_everything ? 3000 : 60);
    }
    argv[1] = path;
    argv[2] = scratch("again.bin");
    expect(command_quantize(4, (char **)(uintptr_t)argv) == -1 && strstr(error_text, "already"),
           "a quantized model is not quantized again");
    remove(path);
}

static void test_quantiser(void) {
    for (int type = Q8; type <= Q4; type++) {
        test_quantize((Type)type, 1, 1, 1);
        test_quantize((Type)type, 3, 31, 1);
        test_quantize((Type)type, 70, 97, 3e-3f);
        test_quantize((Type)type, 33, 64, 1e30f);
        test_quantize((Type)type, 5, 40, 1e-39f);
        test_quantize((Type)type, 2, 33, 1e-44f);
    }
    for (int four_bits = 0; four_bits < 2; four_bits++) {
        test_quantized_model("tests/odd.bin", four_bits);
        test_quantized_model("tests/falcon.bin", four_bits);
        test_quantized_model("tests/layernorm.bin", four_bits);
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
    mamba_free(random);
    mamba_free(wide);
    mamba_free(want);
}
