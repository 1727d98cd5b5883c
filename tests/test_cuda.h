// The GPU against the CPU (make test-cuda; only in a build with the backend): logits, states in
// both directions, gradients, training, generation. Odd shapes are among them. Everything runs
// twice and must give the same bits.

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
    // R = 8: the norm of only two numbers multiplies the rounding of bf16 beyond the tolerance.
    {"8 states, falcon", SHAPE(32, 2, 50, 64, 8, 2, 8, FLAG_MIXER_NORM), {1, 5, 16, 100, 127, 512}},
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
    // Backward of x_proj and convolution in one kernel, in segments of 128 steps.
    {"P 80",
     SHAPE(48, 2, 90, 128, 16, 4, 48, FLAG_TIED | FLAG_CONV_BIAS),
     {3, 1, 64, 2, 1030, 100}},
    {"P 96", SHAPE(32, 1, 64, 64, 16, 4, 64, FLAG_TIED), {513, 1, 17, 2, 600, 65}},
    {"P 128", SHAPE(32, 1, 72, 192, 16, 4, 96, FLAG_CONV_BIAS), {512, 1, 16, 2, 529, 63}},
};

static bool small_card; // tests pretend one, which some special forms of the step do not fit

static Acts *gpu_acts(const Model *m, bool float32) {
    Acts *a = mamba_acts_new(m, 1);
    if (a && mamba_acts_gpu(a, m, float32) == 0) return a;
    give_up("no GPU", error_text);
}

static int32_t *random_ids(size_t n, int V) {
    int32_t *ids = malloc(n * sizeof *ids);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(random_u64(&test_random) % (uint64_t)V);
    return ids;
}

// The logits of all n ids, from state s: (n,V), to be freed.
static float *every_logit(const Model *m, Acts *a, State *s, const int32_t *ids, size_t n) {
    size_t V = (size_t)m->config.V;
    Collected all = {malloc(n * V * sizeof(float)), 0, V};
    if (mamba_prefill(m, a, s, ids, n, collect, &all)) {
        report(false, "prefill", "%s", error_text);
    }
    return all.all;
}

// The logits of n tokens; then in two pieces, one on the GPU and one on the CPU; then again on the
// GPU, for the same bits.
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
    mamba_state_copy(m, copy, g); // copies it from the GPU first
    snprintf(name, sizeof name, "%s, %zu tokens: state h", label, n);
    check_floats(name, copy->h, s->h,
                 (size_t)m->config.n_layer * (size_t)m->config.N * (size_t)m->config.E, tolerance);
    if (m->config.K > 1) {
        snprintf(name, sizeof name, "%s, %zu tokens: state conv", label, n);
        check_floats(name, copy->window, s->window,
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
    FREE(want, got, again);
    mamba_state_free(s);
    mamba_state_free(g);
    mamba_state_free(mixed);
    mamba_state_free(copy);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
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
    Trainer *cpu = mamba_trainer_new(m, B, L, 0, 1),
            *gpu = mamba_trainer_new_gpu(m, B, L, 0, float32);
    float *got = malloc(floats * sizeof(float)), *again = malloc(floats * sizeof(float));
    char name[160];
    if (!gpu) give_up("trainer", error_text);
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
    mamba_trainer_free(cpu);
    mamba_trainer_free(gpu);
    FREE(ids, targets, got, again);
}

// Twenty steps from the same weights on the same batches.
static void check_gpu_training(const Config *c, bool float32, double tolerance) {
    enum { STEPS = 20, B = 3, L = 70 };
    Model *m = mamba_random_model(c, 5), *other = mamba_random_model(c, 5);
    Trainer *cpu = mamba_trainer_new(m, B, L, 0, 1),
            *gpu = mamba_trainer_new_gpu(other, B, L, 0, float32);
    double want[STEPS], norm, want_norm;
    float got[STEPS], worst_norm = 0;
    int32_t *pattern = random_ids(B * L + 1, c->V);
    for (int step = 0; step < STEPS; step++) {
        AdamW how = {3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
        int32_t *ids = random_ids(B * L, c->V), *targets = random_ids(B * L, c->V);
        for (int i = 0; i < B * L; i++) // every second target can be learnt
            if (i % 2) {
                ids[i] = pattern[i];
                targets[i] = pattern[i + 1];
            }
        want[step] = mamba_train_pass(cpu, ids, targets, 1.0f / (B * L), true) / (B * L);
        got[step] = (float)(mamba_train_pass(gpu, ids, targets, 1.0f / (B * L), true) / (B * L));
        if (mamba_train_step(cpu, &how, &want_norm) || mamba_train_step(gpu, &how, &norm)) {
            report(false, "step", "%s", error_text);
        }
        worst_norm = fmaxf(worst_norm, (float)fabs(norm / want_norm - 1));
        FREE(ids, targets);
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
    // A NaN weight stops the next step, and the error names it.
    memset(other->weights, 0, 4);
    ((float *)other->weights)[0] = NAN;
    mamba_trainer_fetch(gpu, true);
    int32_t *ids = calloc(B * L, sizeof *ids);
    mamba_train_pass(gpu, ids, ids, 1, true);
    AdamW how = {3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    expect(mamba_train_step(gpu, &how, &norm) == -1 && strstr(error_text, "not finite"),
           "a NaN stops the step");
    FREE(ids, pattern);
    mamba_trainer_free(cpu);
    mamba_trainer_free(gpu);
    mamba_free(m);
    mamba_free(other);
}

static void check_gpu_generation(const char *path, bool float32) {
    enum { STEPS = 64 };
    Model *m = mamba_load(path);
    if (!m) give_up(path, error_text);
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
    for (int i = 0; i < 3 * STEPS; i++) {
        want[i] = mamba_sample(m, cpu, s, &greedy);
        mamba_step(m, cpu, s, want[i]);
    }
    const int batches[] = {1, 2, 7, 33, 65};
    for (int k = 0; k < COUNT(batches); k++) {
        int S = batches[k], same = 0, total = 0;
        uint64_t random[65] = {0};
        mamba_state_reset(m, g);
        if (mamba_prefill(m, gpu, g, prompt, 20, NULL, NULL)) {
            report(false, "prefill", "%s", error_text);
        }
        GPU->generate_start(gpu->gpu, S, &greedy, random, 20, g->recent, g->n_recent, allowed);
        for (int part = 0; part < 3; part++) {
            if (GPU->generate(gpu->gpu, ids, STEPS)) {
                report(false, "generate", "%s", GPU->error());
            }
            for (int i = 0; i < STEPS; i++)
                for (int q = 0; q < S; q++) {
                    same += ids[i * S + q] == want[part * STEPS + i];
                    total++;
                }
        }
        snprintf(name, sizeof name, "%s: greedy tokens, %d sequences%s", path, S,
                 float32 ? "" : ", bf16");
        if (float32) report(same == total, name, "%d of %d as on the CPU", same, total);
        else
            report(same >= 8 * S, name, "%d of %d as on the CPU (rounding may part ways)", same,
                   total);
        mamba_state_reset(m, g); // the next prefill starts from zero
        gpu->gpu_state = NULL;
        g->newer_on = NULL;
    }
    FREE(prompt, ids, allowed);
    mamba_state_free(s);
    mamba_state_free(g);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// The step of S sequences in bf16. Some shapes have special kernels. All sequences start alike, so
// after 20 greedy tokens all have the same ones. The logits, h and window of the first are those
// that the CPU computes for these tokens.
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
     SHAPE(384, 3, 99, 1049, 4, 3, 24, FLAG_TIED)}, // some blocks have few channels or none
    {"step, few channels", SHAPE(128, 3, 1001, 192, 8, 2, 16, FLAG_MIXER_NORM)},
    {"step, no convolution", SHAPE(1152, 2, 99, 2056, 12, 1, 8, 0)},
    {"step, of the widest", SHAPE(4096, 1, 64, 8192, 16, 4, 256, FLAG_CONV_BIAS | FLAG_MIXER_NORM)},
};

static double narrow_tolerance(Type type) { // float16 has three bits more than bfloat16
    return type == F16 ? 3e-2 / 8 : 3e-2;
}

static void check_gpu_step_of(Type type, const char *label, const Config *shape, int S) {
    enum { STEPS = 20, PROMPT = 9 };
    const double tolerance = narrow_tolerance(type);
    Config c = *shape;
    c.type = type;
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
    if (mamba_prefill(m, gpu, g, prompt, PROMPT, NULL, NULL)) {
        report(false, "prefill", "%s", error_text);
    }
    GPU->generate_start(gpu->gpu, S, &greedy, random, PROMPT, g->recent, g->n_recent, allowed);
    if (GPU->generate(gpu->gpu, ids, STEPS)) {
        report(false, "generate", "%s", GPU->error());
    }
    GPU->get_state(gpu->gpu, S > 1 ? 0 : -1, got->window, got->h, got->logits);
    mamba_state_reset(m, g); // once more
    gpu->gpu_state = NULL;
    g->newer_on = NULL;
    if (mamba_prefill(m, gpu, g, prompt, PROMPT, NULL, NULL)) {
        report(false, "prefill", "%s", error_text);
    }
    GPU->generate_start(gpu->gpu, S, &greedy, random, PROMPT, g->recent, g->n_recent, allowed);
    if (GPU->generate(gpu->gpu, again, STEPS)) {
        report(false, "generate", "%s", GPU->error());
    }
    GPU->get_state(gpu->gpu, S > 1 ? 0 : -1, twice->window, twice->h, twice->logits);
    snprintf(name, sizeof name, "%s, %d sequences: the same bits twice", label, S);
    expect(!memcmp(again, ids, (size_t)(STEPS * S) * sizeof *ids) &&
               !memcmp(twice->h, got->h, layers * (size_t)c.N * sizeof(float)) &&
               !memcmp(twice->logits, got->logits, V * sizeof(float)),
           name);
    if (type == F16) {
        const char *form = GPU->step_form(gpu->gpu);
        const bool four = S <= 16 && c.D % 8 == 0 && c.E % 8 == 0;
        snprintf(name, sizeof name, "%s, %d sequences: form", label, S);
        report(!strcmp(form, four ? "four kernels a layer" : "the library's products"), name, "%s",
               form);
    } else if (!small_card && c.D >= 768 && c.E == 2 * c.D && c.D % 256 == 0 && c.D <= 2560) {
        const char *form = GPU->step_form(gpu->gpu),
                   *fast =
                       S == 1 ? "one kernel for one sequence" : "one kernel for several sequences";
        bool built = strstr(GPU->step_form(NULL), fast);
        snprintf(name, sizeof name, "%s, %d sequences: %s %s", label, S, built ? "by" : "not by",
                 fast);
        report(built == !strcmp(form, fast), name, "%s", form);
    }
    int same = 0;
    for (int i = 0; i < STEPS; i++) {
        for (int q = 0; q < S; q++) same += ids[i * S + q] == ids[i * S];
        mamba_step(m, cpu, s, ids[i * S]);
    }
    snprintf(name, sizeof name, "%s, %d sequences: the same tokens", label, S);
    report(same == STEPS * S, name, "%d of %d", same, STEPS * S);
    snprintf(name, sizeof name, "%s, %d sequences: logits", label, S);
    check_floats(name, got->logits, s->logits, V, tolerance);
    snprintf(name, sizeof name, "%s, %d sequences: h", label, S);
    check_floats(name, got->h, s->h, layers * (size_t)c.N, tolerance);
    snprintf(name, sizeof name, "%s, %d sequences: window", label, S);
    check_floats(name, got->window, s->window, layers * (size_t)(c.K - 1), tolerance);
    FREE(prompt, ids, again, allowed, random);
    gpu->gpu_state = NULL;
    g->newer_on = NULL;
    mamba_state_free(s);
    mamba_state_free(g);
    mamba_state_free(got);
    mamba_state_free(twice);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    mamba_free(m);
}

static void check_gpu_step(const char *label, const Config *shape, int S) {
    check_gpu_step_of(BF16, label, shape, S);
}

// Sequences of different prompts in one step. Each gives the same tokens at any place in the batch.
// The logits and state of the first are those of the CPU.
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
        if (GPU->set_state(gpu->gpu, -1, zero->window, zero->h, zero->logits)) {
            report(false, "state", "%s", GPU->error());
        }
        for (int place = 0; place < S; place++) {
            int q = (place + turns[k]) % S;
            if (GPU->prefill(gpu->gpu, prompt[q], (size_t)(q % 7 + 1), NULL, NULL) ||
                GPU->gather(gpu->gpu, place, S)) {
                report(false, "gather", "%s", GPU->error());
            }
        }
        if (GPU->generate_start(gpu->gpu, S, &greedy, random, 0, zero->recent, 0, allowed) ||
            GPU->generate(gpu->gpu, k ? ids : first, STEPS)) {
            report(false, "generate", "%s", GPU->error());
        }
        GPU->get_state(gpu->gpu, S > 1 ? 0 : -1, got->window, got->h, got->logits);
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
    FREE(ids, first, allowed);
    mamba_state_free(zero);
    mamba_state_free(got);
    mamba_state_free(s);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// Prompts are read one after the other, then continued together: each gives the tokens that it
// gives alone.
static void check_gpu_gathered(const char *path) {
    enum { S = 3, STEPS = 64 };
    const int lengths[S] = {20, 1, 70};
    Model *m = mamba_load(path);
    if (!m) give_up(path, error_text);
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
        if (GPU->set_state(gpu->gpu, -1, zero->window, zero->h, zero->logits) ||
            GPU->prefill(gpu->gpu, prompt[s], (size_t)lengths[s], NULL, NULL) ||
            GPU->generate_start(gpu->gpu, 1, &greedy, random, (uint64_t)lengths[s], zero->recent, 0,
                                allowed) ||
            GPU->generate(gpu->gpu, alone[s], STEPS)) {
            report(false, "alone", "%s", GPU->error());
        }
    }
    for (int round = 0; round < 2; round++) {
        if (GPU->set_state(gpu->gpu, -1, zero->window, zero->h, zero->logits)) {
            report(false, "state", "%s", GPU->error());
        }
        for (int s = 0; s < S; s++)
            if (GPU->prefill(gpu->gpu, prompt[s], (size_t)lengths[s], NULL, NULL) ||
                GPU->gather(gpu->gpu, s, S)) {
                report(false, "gather", "%s", GPU->error());
            }
        expect(GPU->generate_start(gpu->gpu, S + 1, &greedy, random, 0, zero->recent, 0, allowed) ==
                   -1,
               "as many sequences as were gathered, or none");
        if (GPU->generate_start(gpu->gpu, S, &greedy, random, 0, zero->recent, 0, allowed) ||
            GPU->generate(gpu->gpu, together, STEPS)) {
            report(false, "together", "%s", GPU->error());
        }
        for (int i = 0; i < STEPS; i++)
            for (int s = 0; s < S; s++) {
                same += together[i * S + s] == alone[s][i];
                differ += s && alone[s][i] != alone[0][i];
            }
    }
    snprintf(name, sizeof name, "%s: three prompts together as each alone", path);
    report(same == 2 * S * STEPS && differ > STEPS / 4, name, "%d of %d tokens", same,
           2 * S * STEPS);
    for (int s = 0; s < S; s++) free(prompt[s]);
    free(allowed);
    mamba_state_free(zero);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// The sampler: 4096 first tokens of one state, drawn on the GPU and on the CPU, have the same
// distribution.
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
    GPU->set_state(gpu->gpu, -1, g->window, g->h, g->logits);
    GPU->generate_start(gpu->gpu, S, &how, random, g->position, g->recent, g->n_recent, allowed);
    if (GPU->generate(gpu->gpu, ids, 1)) {
        report(false, "generate", "%s", GPU->error());
    }
    bool allowed_only = true;
    for (int i = 0; i < S; i++) {
        allowed_only &= ids[i] >= 0 && allowed[ids[i]];
        gpu_share[ids[i] < 0 ? 0 : ids[i]] += 1.0f / S;
        cpu_share[mamba_sample(m, cpu, s, &how)] += 1.0f / S;
    }
    // Two samples of one distribution: the mean of chi squared is the number of kinds.
    double chi = 0;
    int kinds = 0;
    for (int v = 0; v < V; v++) {
        double a = gpu_share[v] * S, b = cpu_share[v] * S;
        if (a + b > 10) {
            chi += (a - b) * (a - b) / (a + b);
            kinds++;
        }
    }
    bool good = allowed_only && chi < kinds + 5 * sqrt(2.0 * kinds) + 5;
    report(good, name, "chi squared %.1f for %d kinds of tokens", chi, kinds);
    FREE(allowed, random, ids, gpu_share, cpu_share);
    mamba_state_free(g);
    mamba_acts_free(gpu);
}

// The special forms of the step are in code for sm_90 and later, the second only in code for
// sm_90a. The Makefile passes what the code was compiled for, CUDA_CODE: the card alone does not
// tell.
#ifdef CUDA_CODE
static int newest_code(void) { // of the build: 80, 90, ...
    int newest = 0;
    for (const char *at = CUDA_CODE; (at = strstr(at, "sm_")) != NULL; at += 3)
        if (atoi(at + 3) > newest) newest = atoi(at + 3);
    return newest;
}
#endif

static void check_gpu_forms(void) {
#ifdef CUDA_CODE
    const char *forms = GPU->step_form(NULL);
    // A build for several architectures runs the code for this GPU; sm_90a is Hopper's alone.
    const bool several = strstr(CUDA_CODE, "sm_90a") != NULL, one = several || newest_code() >= 90;
    report(one == !!strstr(forms, "one kernel for one sequence") &&
               several == !!strstr(forms, "one kernel for several sequences"),
           "special forms of the step in code for " CUDA_CODE, "%s", *forms ? forms : "none");
#else
    skip("special forms of the step", "built without CUDA_CODE");
#endif
}

// Each form of the scan against scan_plain, the definition. Without repeats time_scan() only
// checks.
static void test_gpu_scan(void) {
    static const struct {
        const char *form;
        int B, E, L, N;
    } shape[] = {
        {"step, and walk of one step", 3, 1536, 1, 16},
        {"step, odd channels", 2, 33, 1, 17},
        {"walk, N 8", 2, 1536, 100, 8},
        {"walk, N 16", 2, 1001, 127, 16},
        {"walk, N 32", 4, 1536, 300, 32},
        {"walk, N 64", 8, 1024, 200, 64},
        {"relay, N 8", 4, 1536, 500, 8},
        {"relay, N 16", 4, 1536, 333, 16},
        {"relay, two channels a lane", 9, 1536, 300, 16},
        {"relay, odd channels", 9, 1501, 300, 16},
        {"tiles", 1, 1536, 1000, 16},
        {"tiles, two channels a lane", 1, 1536, 4500, 16},
        {"tiles, odd", 1, 33, 65, 17},
        {"tiles, one state", 1, 31, 63, 1},
        {"tiles, 40 states", 1, 100, 500, 40},
    };
    char name[160];
    for (int i = 0; i < COUNT(shape); i++)
        for (int float32 = 0; float32 < 2; float32++) {
            double seconds[4] = {0};
            int bad =
                GPU->time_scan(shape[i].B, shape[i].E, shape[i].L, shape[i].N, float32, 0, seconds);
            snprintf(name, sizeof name, "scan, %s, %s", shape[i].form, float32 ? "f32" : "bf16");
            report(!bad && seconds[3] >= 0, name, "off by %.1e %s", seconds[3],
                   bad ? GPU->error() : "");
        }
}

static void test_cuda(void) {
    char name[160];
    test_gpu_scan();
    check_gpu_forms();
    // A measurement leaves 2 GB of numbers in freed memory: a missing initialisation shows.
    double copied, flops, used;
    char gpu_name[256];
    GPU->measure(&copied, &flops, &used, gpu_name);
    for (int i = 0; i < COUNT(GPU_SHAPES); i++) {
        Model *m = mamba_random_model(&GPU_SHAPES[i].config, 11 + (uint64_t)i);
        for (int k = 0; k < 6; k++) {
            int L = GPU_SHAPES[i].lengths[k],
                B = GPU_SHAPES[i].config.E > 2000 ? 3 + k % 2 : 1 + (i + k) % 3;
            int32_t *ids = random_ids((size_t)L, m->config.V);
            check_gpu_logits(GPU_SHAPES[i].name, m, ids, (size_t)L, true, 2e-5);
            free(ids);
            check_gpu_gradients(GPU_SHAPES[i].name, m, B, L, true, 2e-4);
            // D = 1: the norm of one number has a derivative of 0, so only rounding errors are
            // left.
            if (k % 2 || GPU_SHAPES[i].config.D == 1) continue;
            snprintf(name, sizeof name, "%s, bf16", GPU_SHAPES[i].name);
            check_gpu_gradients(name, m, B, L, false, 5e-2);
        }
        mamba_free(m);
    }
    const char *models[] = {"tests/odd.bin", "tests/falcon.bin", "tests/plain.bin",
                            "tests/layernorm.bin", "models/tales.bin"};
    for (int i = 0; i < COUNT(models); i++) {
        Model *m = mamba_load(models[i]);
        int32_t *ids = random_ids(1100, m->config.V);
        check_gpu_logits(models[i], m, ids, 1100, true, 5e-5);
        if (m->config.type == BF16)
            check_gpu_logits("tales, bf16 products", m, ids, 1100, false, 3e-2);
        free(ids);
        mamba_free(m);
        check_gpu_generation(models[i], true);
    }
    check_gpu_generation("models/tales.bin", false);
    for (int four_bits = 0; four_bits < 2; four_bits++) { // the GPU stores them unpacked
        Model *from = mamba_load("models/tales.bin"), *m = mamba_quantize(from, four_bits);
        int32_t *ids = random_ids(300, m->config.V);
        check_gpu_logits(four_bits ? "tales in q4" : "tales in q8", m, ids, 300, true, 5e-5);
        check_gpu_logits(four_bits ? "tales in q4, bf16 products" : "tales in q8, bf16 products", m,
                         ids, 300, false, 3e-2);
        free(ids);
        mamba_free(m);
        mamba_free(from);
    }
    { // from 8,192 rows on, another kernel makes the products
        Config c = SHAPE(512, 2, 60, 1024, 16, 4, 32, FLAG_TIED | FLAG_CONV_BIAS);
        c.type = BF16;
        Model *m = mamba_random_model(&c, 5);
        int32_t *ids = random_ids(16400, c.V);
        check_gpu_logits("bf16, a long text", m, ids, 16400, false, 3e-2);
        free(ids);
        mamba_free(m);
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
