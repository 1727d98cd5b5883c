// Training on the GPU in chunks of a sequence: loss and gradients beside those of whole sequences,
// on the GPU and on the CPU.
//
// What each part would catch: chunks of 1 and 7 steps, fewer than K - 1 or not dividing a tile, a
// convolution that does not read its window, forgets d_window or takes a wrong slot of either; K =
// 9 the kernel that reads taps in a loop; B > 1 states of another sequence; lengths that no chunk
// divides the shorter last chunk; a state of size N = 64 a second round of 16 states of mail.

// falcon's gradients are ill-conditioned, as in test_chunks().
static double gradient_tolerance(const char *model, bool float32) {
    return !float32 ? 5e-2 : strstr(model, "falcon") ? 1e-3 : 2e-4;
}

// Gradients of the chunked pass in `got`. Fails where its losses are not `want`.
static void chunked_gradient(const char *name, Model *m, int B, int L, int chunk, bool float32,
                             const int32_t *ids, const int32_t *targets, double want,
                             double tolerance, float *got) {
    const float weight = 1.0f / (float)(B * L);
    Trainer *x = mamba_trainer_new_gpu(m, B, L, chunk, float32);
    if (!x) give_up("trainer", error_text);
    double only = mamba_train_pass(x, ids, targets, weight, false);
    double loss = mamba_train_pass(x, ids, targets, weight, true);
    GPU->trainer_get(x->gpu, NULL, NULL, NULL, got);
    report(fabs(loss - want) <= tolerance * want && fabs(only - want) <= tolerance * want, name,
           "losses %.6f and %.6f beside %.6f", loss, only, want);
    mamba_trainer_free(x);
}

static void check_gpu_chunks(const char *model, Model *m, int B, int L, bool float32) {
    const size_t rows = (size_t)B * L, floats = m->tensors_bytes / sizeof(float);
    const int chunks[] = {0, 1, 7, 64, 1000};
    const double tolerance = gradient_tolerance(model, float32);
    int32_t *ids = random_ids(rows, m->config.V), *targets = random_ids(rows, m->config.V);
    float *got = malloc(floats * sizeof *got), *whole = malloc(floats * sizeof *whole);
    char name[160];
    targets[rows / 2] = -1;
    Trainer *cpu = mamba_trainer_new(m, B, L, 0, 1);
    double want = mamba_train_pass(cpu, ids, targets, 1.0f / (float)rows, true);
    for (int k = 0; k < COUNT(chunks) && chunks[k] < L; k++) {
        snprintf(name, sizeof name, "%s, %d x %d in chunks of %d, %s", model, B, L, chunks[k],
                 float32 ? "float32" : "bf16");
        chunked_gradient(name, m, B, L, chunks[k], float32, ids, targets, want,
                         float32 ? 5e-5 : 1e-2, got);
        GpuGradient beside_cpu = {name, got, cpu->gradient->weights, m->weights, tolerance};
        each_tensor(m, check_gpu_gradient, &beside_cpu);
        if (k == 0) memcpy(whole, got, floats * sizeof *whole);
        // In float32 they agree better with each other.
        GpuGradient beside_whole = {name, got, whole, m->weights, float32 ? tolerance / 2 : 5e-2};
        if (k > 0) each_tensor(m, check_gpu_gradient, &beside_whole);
    }
    mamba_trainer_free(cpu);
    FREE(ids, targets, got, whole);
}

static void check_gpu_chunks_of(const char *path, int B, int L, bool float32) {
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    check_gpu_chunks(path, m, B, L, float32);
    mamba_free(m);
    mamba_free(stored);
}

// With little memory a chunk is chosen that fits.
static void check_gpu_chosen_chunk(void) {
    Config c;
    parse_shape("64,2,300", "f32", &c);
    Model *m = mamba_random_model(&c, 3);
    GPU->pretend("memory", 3000);
    const int some = mamba_trainer_chunk_gpu(m, 1, 1 << 20, false);
    const int all = mamba_trainer_chunk_gpu(m, 1, 1000, false);
    GPU->pretend("memory", 0);
    report(some > 1000 && some < 1 << 20 && (some & (some - 1)) == 0 && all == 0,
           "a chunk that fits", "of 2^20 tokens %d, of 1000 %d", some, all);
    mamba_free(m);
}

// Passes that go on from states of earlier ones, beside those of the CPU: losses, gradients, states
// on their way to the host and back.
static void check_gpu_carry(const char *path, int chunk, bool float32) {
    enum { B = 2, L = 37, HALF = B * L };
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored),
          *copy = mamba_float_copy(stored);
    const Windows w = two_windows(B, L, m->config.V);
    const int32_t *ids = w.ids + HALF, *targets = w.targets + HALF; // of the second window
    Trainer *cpu = mamba_trainer_new(m, B, L, 0, 1),
            *gpu = mamba_trainer_new_gpu(copy, B, L, chunk, float32);
    const double tolerance = gradient_tolerance(path, float32), close = float32 ? 5e-5 : 1e-2;
    float *got = malloc(m->tensors_bytes);
    char name[160];
    snprintf(name, sizeof name, "%s carried, chunk %d, %s", path, chunk,
             float32 ? "float32" : "bf16");
    if (!gpu || mamba_trainer_carry(cpu, 2) || mamba_trainer_carry(gpu, 2))
        give_up("trainer", error_text);
    const double want = mamba_train_pass_on(cpu, 0, w.ids, w.targets, 1, false);
    const double begun = mamba_train_pass_on(gpu, 0, w.ids, w.targets, 1, true);
    mamba_train_pass_on(cpu, 1, ids, targets, 1, false); // another place, and none
    mamba_train_pass_on(gpu, 1, ids, targets, 1, false);
    const double fresh = mamba_train_pass(gpu, ids, targets, 1, false);
    mamba_trainer_fetch(gpu, false);
    mamba_trainer_fetch(gpu, true); // clears the gradient
    const double want_on = mamba_train_pass_on(cpu, 0, ids, targets, 1.0f / HALF, true);
    const double on = mamba_train_pass_on(gpu, 0, ids, targets, 1.0f / HALF, true);
    report(fabs(begun - want) <= close * want && fabs(on - want_on) <= close * want_on &&
               fabs(fresh - want_on) > 1e-4 * want_on,
           name, "losses %.6f and %.6f, want %.6f and %.6f, without states %.6f", begun, on, want,
           want_on, fresh);
    GPU->trainer_get(gpu->gpu, NULL, NULL, NULL, got);
    GpuGradient g = {name, got, cpu->gradient->weights, m->weights, tolerance};
    each_tensor(m, check_gpu_gradient, &g);
    mamba_trainer_fetch(gpu, false);
    const size_t h = 2 * pass_floats(cpu, m->config.N),
                 window = 2 * pass_floats(cpu, m->config.K - 1);
    check_floats("h of both places", gpu->carried.h, cpu->carried.h, h, float32 ? 5e-5 : 3e-2);
    check_floats("their windows", gpu->carried.window, cpu->carried.window, window,
                 float32 ? 5e-5 : 3e-2);
    if (mamba_trainer_carry(gpu, 2)) give_up("trainer", error_text);
    const double again = mamba_train_pass_on(gpu, 0, w.ids, w.targets, 1, false);
    report(fabs(again - begun) <= 1e-6 * begun, "and from the beginning", "%.7f beside %.7f", again,
           begun);
    free(got);
    FREE(w.ids, w.targets, w.whole, w.whole_targets, w.masked);
    mamba_trainer_free(cpu);
    mamba_trainer_free(gpu);
    mamba_free(m);
    mamba_free(copy);
    mamba_free(stored);
}

static void test_cuda_chunks(void) {
    const int chunks[] = {0, 1, 10};
    for (int k = 0; k < COUNT(chunks); k++) {
        check_gpu_carry("tests/plain.bin", chunks[k], true);
        check_gpu_carry("tests/odd.bin", chunks[k], true);
        check_gpu_carry("tests/falcon.bin", chunks[k], true);
        check_gpu_carry("tests/plain.bin", chunks[k], false);
    }
    check_gpu_chunks_of("tests/plain.bin", 2, 1100, true);
    check_gpu_chunks_of("tests/odd.bin", 3, 131, true);
    check_gpu_chunks_of("tests/falcon.bin", 2, 70, true);
    check_gpu_chunks_of("tests/layernorm.bin", 1, 200, true);
    check_gpu_chunks_of("tests/plain.bin", 2, 131, false);
    const struct {
        const char *name;
        int K, N, E;
    } shape[] = {{"K 2", 2, 16, 128}, {"K 9, 64 states", 9, 64, 100}, {"K 1", 1, 5, 75}};
    for (int i = 0; i < COUNT(shape); i++) {
        Config c;
        parse_shape("48,2,70", "f32", &c);
        c.K = shape[i].K;
        c.N = shape[i].N;
        c.E = shape[i].E;
        Model *m = mamba_random_model(&c, 4);
        check_gpu_chunks(shape[i].name, m, 2, 130, true);
        check_gpu_chunks(shape[i].name, m, 1, 69, false);
        mamba_free(m);
    }
    { // convolution and x_proj in one kernel, forward and backward
        Config c;
        parse_shape("48,2,70", "f32", &c);
        c.E = 128;
        c.R = 48;
        Model *m = mamba_random_model(&c, 4);
        check_gpu_chunks("P 80", m, 2, 1100, false);
        check_gpu_chunks("P 80", m, 2, 2, false);
        mamba_free(m);
    }
    check_gpu_chosen_chunk();
}
