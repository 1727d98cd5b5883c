// The GPU, several texts and the sampler (make test-cuda): places at which texts begin and end, a
// batch of states, the rules of sampling on large vocabularies, kernels that get stuck, bad input,
// and the choices of smaller GPUs.

// --- the sampler's rules

typedef struct {
    float logit;
    int32_t id;
} Ranked;

static int by_logit(const void *a, const void *b) {
    const Ranked *x = a, *y = b;
    return x->logit < y->logit ? 1 : x->logit > y->logit ? -1 : x->id - y->id;
}

// Draws from given logits (V), 256 texts at once, against the definition in double precision: only
// tokens that the rules keep, in 20 groups of about equal probability.
static void check_gpu_rules(const char *label, const Model *m, Acts *gpu, const float *logits,
                            Sampling how) {
    enum { S = 256, ROUNDS = 8, GROUPS = 20 };
    const int V = m->config.V;
    Ranked *rank = malloc((size_t)V * sizeof *rank);
    int *group = malloc((size_t)V * sizeof *group);
    double *weight = malloc((size_t)V * sizeof *weight), whole = 0, sum = 0, share[GROUPS] = {0};
    double drawn[GROUPS] = {0}, chi = 0;
    float *numbers = calloc((size_t)m->config.n_layer * (size_t)m->config.E *
                                (size_t)(m->config.N + m->config.K),
                            sizeof(float));
    unsigned char *allowed = malloc((size_t)V);
    int32_t ids[S], recent[RECENT] = {0};
    uint64_t random[S];
    int kept = 0, bad = 0, kinds = 0;
    for (int v = 0; v < V; v++) {
        allowed[v] = v % 97 != 5;
        rank[v] = (Ranked){allowed[v] ? logits[v] : -INFINITY, v};
        group[v] = -1;
    }
    qsort(rank, (size_t)V, sizeof *rank, by_logit);
    const int limit = how.top_k > 0 && how.top_k < V ? how.top_k : V;
    for (int i = 0; i < limit; i++) {
        weight[i] = exp(((double)rank[i].logit - (double)rank[0].logit) / how.temperature);
        whole += weight[i];
    }
    // As mamba.c's keep_likeliest; the last token may be off by a rounding error.
    for (; kept < limit && rank[kept].logit > -INFINITY; kept++) {
        if (kept && sum >= (how.top_p < 1 ? how.top_p * whole * (1 + 1e-6) : INFINITY)) break;
        if (kept && weight[kept] < how.min_p * (1 - 1e-5)) break;
        sum += weight[kept];
    }
    double before = 0;
    for (int i = 0; i < kept; i++) {
        int g = (int)(before / sum * GROUPS);
        group[rank[i].id] = g < GROUPS ? g : GROUPS - 1;
        share[group[rank[i].id]] += weight[i] / sum;
        before += weight[i];
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int s = 0; s < S; s++) random[s] = random_u64(&test_random);
        if (GPU->set_state(gpu->gpu, -1, numbers, numbers, logits) ||
            GPU->generate_start(gpu->gpu, S, &how, random, 1, recent, 0, allowed) ||
            GPU->generate(gpu->gpu, ids, 1)) {
            report(false, label, "%s", GPU->error());
            break;
        }
        for (int s = 0; s < S; s++) {
            int g = ids[s] < 0 ? -1 : group[ids[s]];
            if (g < 0) bad++;
            else drawn[g]++;
        }
    }
    for (int g = 0; g < GROUPS; g++) {
        double want = share[g] * S * ROUNDS;
        if (want < 5) continue;
        chi += (drawn[g] - want) * (drawn[g] - want) / want;
        kinds++;
    }
    report(bad == 0 && chi < kinds + 5 * sqrt(2.0 * kinds) + 5, label,
           "%d kept, %d drawn that are not, chi squared %.1f for %d groups", kept, bad, chi, kinds);
    FREE(rank, group, weight, numbers, allowed);
}

static void check_gpu_vocabulary(int V, double spread) {
    static const struct {
        const char *name;
        Sampling how;
    } rule[] = {
        {"-t 1 -p 1", {.temperature = 1, .top_p = 1, .repeat_penalty = 1}},
        {"-t 0.8 -p 0.95", {.temperature = 0.8f, .top_p = 0.95f, .repeat_penalty = 1}},
        {"-p 0.5", {.temperature = 1, .top_p = 0.5f, .repeat_penalty = 1}},
        {"-p 0", {.temperature = 1, .top_p = 0, .repeat_penalty = 1}},
        {"-k 40", {.temperature = 1, .top_p = 1, .top_k = 40, .repeat_penalty = 1}},
        {"-k 1", {.temperature = 1, .top_p = 1, .top_k = 1, .repeat_penalty = 1}},
        {"-k 40 -p 0.9", {.temperature = 0.7f, .top_p = 0.9f, .top_k = 40, .repeat_penalty = 1}},
        {"-k 900 -p 0.6", {.temperature = 1.3f, .top_p = 0.6f, .top_k = 900, .repeat_penalty = 1}},
        {"-k 5000 --min-p 0.02",
         {.temperature = 1, .top_p = 1, .top_k = 5000, .min_p = 0.02f, .repeat_penalty = 1}},
        {"--min-p 0.05", {.temperature = 1, .top_p = 1, .min_p = 0.05f, .repeat_penalty = 1}},
        {"-t 0.0001", {.temperature = 0.0001f, .top_p = 1, .repeat_penalty = 1}},
        {"-t 100 -p 0.99", {.temperature = 100, .top_p = 0.99f, .repeat_penalty = 1}},
    };
    Config c = SHAPE(8, 1, 100, 16, 4, 2, 1, FLAG_TIED);
    char name[160];
    c.V = V;
    Model *m = mamba_random_model(&c, 3);
    Acts *gpu = gpu_acts(m, true);
    float *logits = malloc((size_t)V * sizeof *logits);
    for (int v = 0; v < V; v++) { // about normal
        double x = 0;
        for (int i = 0; i < 12; i++) x += (double)random_unit(&test_random);
        logits[v] = (float)(spread * (x - 6)) - 50;
    }
    for (int i = 0; i < COUNT(rule); i++) {
        snprintf(name, sizeof name, "GPU draws, %d tokens, spread %g, %s", V, spread, rule[i].name);
        check_gpu_rules(name, m, gpu, logits, rule[i].how);
    }
    for (int v = 0; v < V; v++) logits[v] = 1; // all equal: any may be drawn
    snprintf(name, sizeof name, "GPU draws, %d equal tokens", V);
    check_gpu_rules(name, m, gpu, logits, (Sampling){1, 1, 0, 0, 1});
    free(logits);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// --- texts that begin and end at different times

// Every text gives the tokens that it gives alone, whatever runs beside it and wherever it moves.
static void check_gpu_texts(const Sampling *how, const char *label) {
    enum { TEXTS = 7, PLACES = 3, STEPS = 24, BURST = 8 };
    Model *m = mamba_load("models/tales.bin");
    if (!m) give_up("tales", error_text);
    Acts *gpu = gpu_acts(m, true);
    State *s = mamba_state_new(m);
    int32_t *prompt[TEXTS], alone[TEXTS][STEPS], ids[BURST * PLACES];
    int text[PLACES], done[TEXTS] = {0}, running = 0, begun = 0, same = 0;
    bool bad = false;
    for (int k = 0; k < TEXTS; k++) {
        prompt[k] = random_ids((size_t)(3 + 5 * k), m->config.V < 200 ? m->config.V : 200);
        mamba_state_reset(m, s);
        bad |= mamba_prefill(m, gpu, s, prompt[k], (size_t)(3 + 5 * k), NULL, NULL) ||
               mamba_places(gpu, 1, 0) || mamba_places_sampling(m, gpu, how) ||
               mamba_place_begin(gpu, 0, s, 77 + (uint64_t)k) ||
               mamba_places_write(gpu, alone[k], STEPS);
    }
    bad |= mamba_places(gpu, PLACES, 0) || mamba_places_sampling(m, gpu, how);
    while (!bad && (running || begun < TEXTS)) {
        while (running < PLACES && begun < TEXTS) {
            mamba_state_reset(m, s);
            bad |= mamba_prefill(m, gpu, s, prompt[begun], (size_t)(3 + 5 * begun), NULL, NULL) ||
                   mamba_place_begin(gpu, running, s, 77 + (uint64_t)begun);
            text[running++] = begun++;
        }
        if (begun == TEXTS && running == 1) // the last one goes on alone
            bad |= mamba_places(gpu, 1, 1) || mamba_places_sampling(m, gpu, how);
        const int stride = begun == TEXTS && running == 1 ? 1 : PLACES;
        bad |= mamba_places_write(gpu, ids, BURST) != 0;
        for (int i = running - 1; i >= 0 && !bad; i--) {
            const int k = text[i];
            for (int t = 0; t < BURST; t++) same += ids[t * stride + i] == alone[k][done[k] + t];
            done[k] += BURST;
            // Texts end after 8, 16 or 24 tokens.
            if (done[k] < (1 + k % 3) * BURST) continue;
            running--;
            text[i] = text[running];
            if (i < running) bad |= mamba_place_move(gpu, i, running) != 0;
        }
    }
    int total = 0;
    for (int k = 0; k < TEXTS; k++) total += (1 + k % 3) * BURST;
    report(!bad && same == total, label, "%d of %d tokens as alone%s%s", same, total,
           bad ? ": " : "", bad ? error_text : "");
    for (int k = 0; k < TEXTS; k++) free(prompt[k]);
    mamba_state_free(s);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// mamba_step_batch on the GPU: more states than the processor's BATCH_MAX, in changing company, as
// each alone on the processor.
static void check_gpu_step_batch(void) {
    enum { B = 40, STEPS = 5 };
    Model *m = mamba_load("tests/odd.bin");
    if (!m) give_up("odd", error_text);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, true);
    State *want[B], *got[B], *some[B];
    const size_t V = (size_t)m->config.V;
    int32_t ids[B];
    bool bad = false;
    for (int b = 0; b < B; b++) {
        want[b] = mamba_state_new(m);
        got[b] = mamba_state_new(m);
    }
    for (int t = 0; t < STEPS && !bad; t++) {
        const int n = t == 2 ? B / 2 : B, first = t == 3 ? 1 : 0; // others stay behind
        for (int b = 0; b < n - first; b++) {
            ids[b] = (int32_t)(random_u64(&test_random) % V);
            some[b] = got[first + b];
            bad |= mamba_step(m, cpu, want[first + b], ids[b]) != 0;
        }
        bad |= mamba_step_batch(m, gpu, some, ids, n - first) != 0;
        if (t == 1) { // one of them reads on alone
            bad |= mamba_step(m, gpu, got[7], 3) || mamba_step(m, cpu, want[7], 3);
        }
    }
    report(!bad, "a batch of states on the GPU", "%s", bad ? error_text : "40 states");
    float *all = malloc(B * V * sizeof *all), *expected = malloc(B * V * sizeof *all);
    const size_t numbers = (size_t)m->config.n_layer * (size_t)m->config.N * (size_t)m->config.E;
    for (int b = 0; b < B; b++) {
        memcpy(all + (size_t)b * V, got[b]->logits, V * sizeof *all);
        memcpy(expected + (size_t)b * V, want[b]->logits, V * sizeof *all);
    }
    check_floats("a batch of states on the GPU: logits", all, expected, B * V, 1e-4);
    State *copy = mamba_state_new(m);
    mamba_state_copy(m, copy, got[B - 1]); // fetches it
    check_floats("a batch of states on the GPU: h", copy->h, want[B - 1]->h, numbers, 1e-4);
    FREE(all, expected);
    mamba_state_free(copy);
    for (int b = 0; b < B; b++) {
        mamba_state_free(want[b]);
        mamba_state_free(got[b]);
    }
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// --- matrices in 8 and 4 bits

// A step of S sequences reads them as they are. All sequences start alike.
static void check_gpu_packed(const char *label, const Config *shape, bool four_bits, int S) {
    enum { STEPS = 6, PROMPT = 5 };
    Config c = *shape;
    c.type = BF16;
    Model *from = mamba_random_model(&c, 31), *m = mamba_quantize(from, four_bits);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, false);
    State *s = mamba_state_new(m), *got = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int32_t *prompt = random_ids(PROMPT, c.V), ids[STEPS * 40], recent[RECENT] = {0};
    uint64_t random[40] = {0};
    unsigned char *allowed = malloc((size_t)c.V);
    char name[160];
    int same = 0;
    memset(allowed, 1, (size_t)c.V);
    if (GPU->set_state(gpu->gpu, -1, s->window, s->h, s->logits) ||
        GPU->prefill(gpu->gpu, prompt, PROMPT, NULL, NULL) ||
        GPU->generate_start(gpu->gpu, S, &greedy, random, PROMPT, recent, 0, allowed) ||
        GPU->generate(gpu->gpu, ids, STEPS) ||
        GPU->get_state(gpu->gpu, S > 1 ? 0 : -1, got->window, got->h, got->logits))
        report(false, label, "%s", GPU->error());
    for (int i = 0; i < STEPS * S; i++) same += ids[i] == ids[i / S * S];
    mamba_prefill(m, cpu, s, prompt, PROMPT, NULL, NULL);
    for (int i = 0; i < STEPS; i++) mamba_step(m, cpu, s, ids[i * S]);
    snprintf(name, sizeof name, "%s, %d bits, %d sequences: all alike", label, four_bits ? 4 : 8,
             S);
    report(same == STEPS * S, name, "%d of %d tokens", same, STEPS * S);
    snprintf(name, sizeof name, "%s, %d bits, %d sequences: logits", label, four_bits ? 4 : 8, S);
    check_floats(name, got->logits, s->logits, (size_t)c.V, 3e-2);
    snprintf(name, sizeof name, "%s, %d bits, %d sequences: h", label, four_bits ? 4 : 8, S);
    check_floats(name, got->h, s->h, (size_t)c.n_layer * (size_t)c.E * (size_t)c.N, 3e-2);
    FREE(prompt, allowed);
    mamba_state_free(s);
    mamba_state_free(got);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    mamba_free(m);
    mamba_free(from);
}

// One sequence by the one kernel of step_one_packed.cuh, twice, then by the portable step: from the
// processor's state each, so that only the steps differ.
static void check_gpu_packed_one(const char *label, const Config *shape, bool four_bits) {
    enum { STEPS = 6, PROMPT = 5 };
    Config c = *shape;
    c.type = BF16;
    Model *from = mamba_random_model(&c, 32), *m = mamba_quantize(from, four_bits);
    Acts *cpu = mamba_acts_new(m, 1);
    State *s = mamba_state_new(m), *got[3];
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    const size_t V = (size_t)c.V, h = (size_t)c.n_layer * (size_t)c.E * (size_t)c.N,
                 window = (size_t)c.n_layer * (size_t)c.E * (size_t)(c.K - 1);
    int32_t *prompt = random_ids(PROMPT, c.V), ids[3][STEPS] = {{0}}, recent[RECENT] = {0};
    uint64_t random[1] = {0};
    unsigned char *allowed = malloc(V);
    char name[160];
    memset(allowed, 1, V);
    for (int form = 0; form < 3; form++) {
        const bool portable = form == 2;
        GPU->pretend("portable", portable);
        Acts *gpu = gpu_acts(m, false);
        GPU->pretend("portable", 0);
        got[form] = mamba_state_new(m);
        State *x = got[form];
        mamba_state_reset(m, s);
        mamba_prefill(m, cpu, s, prompt, PROMPT, NULL, NULL);
        if (GPU->set_state(gpu->gpu, -1, s->window, s->h, s->logits) ||
            GPU->generate_start(gpu->gpu, 1, &greedy, random, PROMPT, recent, 0, allowed) ||
            GPU->generate(gpu->gpu, ids[form], STEPS) ||
            GPU->get_state(gpu->gpu, -1, x->window, x->h, x->logits))
            report(false, label, "%s", GPU->error());
        const char *one = "one kernel for one sequence",
                   *want = !portable && strstr(GPU->step_form(NULL), one) ? one
                                                                          : "four kernels a layer",
                   *is = GPU->step_form(gpu->gpu);
        snprintf(name, sizeof name, "%s, %d bits: by %s", label, four_bits ? 4 : 8, want);
        report(!strcmp(is, want), name, "%s", is);
        mamba_acts_free(gpu);
        if (form == 1) {
            snprintf(name, sizeof name, "%s, %d bits: the same bits twice", label,
                     four_bits ? 4 : 8);
            expect(!memcmp(ids[0], ids[1], sizeof ids[0]) &&
                       !memcmp(got[0]->h, x->h, h * sizeof(float)) &&
                       !memcmp(got[0]->logits, x->logits, V * sizeof(float)),
                   name);
            continue;
        }
        for (int i = 0; i < STEPS; i++) mamba_step(m, cpu, s, ids[form][i]);
        // Of the one kernel's numbers only dt_proj's weights are rounded to bf16.
        const double tolerance = strcmp(is, one) ? 3e-2 : 1e-2;
        snprintf(name, sizeof name, "%s, %d bits, %s: logits", label, four_bits ? 4 : 8, is);
        check_floats(name, x->logits, s->logits, V, tolerance);
        snprintf(name, sizeof name, "%s, %d bits, %s: h", label, four_bits ? 4 : 8, is);
        check_floats(name, x->h, s->h, h, tolerance);
        snprintf(name, sizeof name, "%s, %d bits, %s: window", label, four_bits ? 4 : 8, is);
        check_floats(name, x->window, s->window, window, tolerance);
    }
    for (int form = 0; form < 3; form++) mamba_state_free(got[form]);
    FREE(prompt, allowed);
    mamba_state_free(s);
    mamba_acts_free(cpu);
    mamba_free(m);
    mamba_free(from);
}

// A prompt, then bursts of one text with steps of several texts between them: where they leave
// their numbers, the one kernel of one text has its own. The text must be as if it were alone.
static void check_gpu_turns(Type type) {
    enum { STEPS = 5, PROMPT = 30, TURNS = 4, S = 4 };
    Config c = SHAPE(768, 2, 320, 1536, 16, 4, 48, FLAG_TIED | FLAG_CONV_BIAS);
    c.type = BF16;
    Model *from = mamba_random_model(&c, 34), *m = type == BF16 ? from : mamba_quantize(from, true);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, false);
    State *s = mamba_state_new(m), *got = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int32_t *prompt = random_ids(PROMPT, c.V), ids[STEPS], others[STEPS * S], recent[RECENT] = {0};
    uint64_t random[1] = {0};
    unsigned char allowed[320];
    char name[160];
    memset(allowed, 1, sizeof allowed);
    bool bad = GPU->set_state(gpu->gpu, -1, s->window, s->h, s->logits) ||
               GPU->prefill(gpu->gpu, prompt, PROMPT, NULL, NULL) || GPU->places(gpu->gpu, S, 0);
    for (int i = 0; i < S && !bad; i++)
        bad = GPU->place_begin(gpu->gpu, i, -1, 0, PROMPT, recent, 0) != 0;
    mamba_prefill(m, cpu, s, prompt, PROMPT, NULL, NULL);
    for (int turn = 0; turn < TURNS && !bad; turn++) {
        bad = GPU->generate_start(gpu->gpu, 1, &greedy, random, PROMPT, recent, 0, allowed) ||
              GPU->generate(gpu->gpu, ids, STEPS) ||
              GPU->places_sampling(gpu->gpu, &greedy, allowed) ||
              GPU->places_generate(gpu->gpu, others, STEPS);
        for (int i = 0; i < STEPS && !bad; i++) mamba_step(m, cpu, s, ids[i]);
    }
    if (bad || GPU->get_state(gpu->gpu, -1, got->window, got->h, got->logits))
        report(false, "turns", "%s", GPU->error());
    const char *label = type == BF16 ? "bf16" : "4 bits";
    snprintf(name, sizeof name, "a text beside others, %s: logits", label);
    check_floats(name, got->logits, s->logits, (size_t)c.V, 3e-2);
    snprintf(name, sizeof name, "a text beside others, %s: h", label);
    check_floats(name, got->h, s->h, (size_t)c.n_layer * (size_t)c.E * (size_t)c.N, 3e-2);
    FREE(prompt);
    mamba_state_free(s);
    mamba_state_free(got);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    if (m != from) mamba_free(m);
    mamba_free(from);
}

static void test_cuda_packed_one(void) {
    static const struct {
        const char *name;
        Config config;
    } shape[] = {
        {"width 768", SHAPE(768, 3, 1003, 1536, 16, 4, 48, FLAG_TIED | FLAG_CONV_BIAS)},
        {"width 768, falcon", SHAPE(768, 2, 320, 1568, 16, 4, 64, FLAG_MIXER_NORM)},
        {"width 1024, 8 states, two taps", SHAPE(1024, 2, 211, 2048, 8, 2, 40, FLAG_TIED)},
        {"width 1536, no convolution", SHAPE(1536, 2, 99, 3072, 12, 1, 96, FLAG_CONV_BIAS)},
        {"width 2048, three taps", SHAPE(2048, 2, 130, 4096, 4, 3, 128, 0)},
        {"width 2560", SHAPE(2560, 2, 5001, 5120, 16, 4, 160, FLAG_CONV_BIAS)},
        {"width 4096, falcon",
         SHAPE(4096, 1, 640, 8192, 16, 4, 256, FLAG_CONV_BIAS | FLAG_MIXER_NORM)},
    };
    for (int i = 0; i < COUNT(shape); i++)
        for (int four_bits = 0; four_bits < 2; four_bits++)
            check_gpu_packed_one(shape[i].name, &shape[i].config, four_bits);
}

static void test_cuda_turns(void) {
    check_gpu_turns(BF16);
    check_gpu_turns(Q4);
}

typedef struct {
    const Model *m;
    const int32_t *ids;
    size_t t, n;
    double sum;
} MeanNll;
static void add_nll(void *context, const float *logits) {
    MeanNll *x = context;
    if (++x->t < x->n) x->sum += mamba_nll(x->m, logits, x->ids[x->t]);
}

// The mean likelihood of a text, bf16 products: the processor's within 1e-3.
static void check_gpu_nll(bool four_bits) {
    Model *from = mamba_load("models/tales.bin"), *m = mamba_quantize(from, four_bits);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, false);
    State *s = mamba_state_new(m), *g = mamba_state_new(m);
    enum { TOKENS = 1500 };
    const Sampling how = {.temperature = 1, .top_p = 1, .repeat_penalty = 1};
    int32_t ids[TOKENS] = {1};
    const size_t n = TOKENS;
    for (int i = 1; i < TOKENS; i++) { // a text of the model's kind: its own
        mamba_step(m, cpu, s, ids[i - 1]);
        ids[i] = mamba_sample(m, cpu, s, &how);
    }
    mamba_state_reset(m, s);
    MeanNll want = {m, ids, 0, n, 0}, got = want;
    mamba_prefill(m, cpu, s, ids, n, add_nll, &want);
    if (mamba_prefill(m, gpu, g, ids, n, add_nll, &got)) report(false, "nll", "%s", error_text);
    double a = want.sum / (double)(n - 1), b = got.sum / (double)(n - 1);
    report(fabs(a - b) < 1e-3, four_bits ? "mean NLL in 4 bits" : "mean NLL in 8 bits",
           "%.5f, on the processor %.5f, %zu tokens", b, a, n);
    mamba_state_free(s);
    mamba_state_free(g);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    mamba_free(m);
    mamba_free(from);
}

static void test_cuda_packed(void) {
    static const int sequences[] = {1, 3, 16, 17, 40};
    for (int little = 0; little < 2; little++) { // memory: no dense copy is made
        GPU->pretend("memory", little ? 1000 : 0);
        for (int k = 0; k < 9; k++)
            for (int four_bits = 0; four_bits < 2; four_bits++)
                check_gpu_packed(STEP_SHAPES[k].name, &STEP_SHAPES[k].config, four_bits,
                                 sequences[k % COUNT(sequences)]);
        for (int k = 0; k < COUNT(sequences); k++)
            for (int four_bits = 0; four_bits < 2; four_bits++)
                check_gpu_packed(STEP_SHAPES[3].name, &STEP_SHAPES[3].config, four_bits,
                                 sequences[k]);
    }
    GPU->pretend("memory", 0);
    Config head = SHAPE(64, 1, 20011, 128, 16, 4, 4, FLAG_CONV_BIAS); // unpacked in parts
    check_gpu_packed("a large head", &head, true, 1);
    check_gpu_packed("a large head", &head, false, 20);
    check_gpu_nll(false);
    check_gpu_nll(true);
}

// --- faults

// Another program holds a part of the GPU, so that not all blocks of a one-kernel step can run: the
// step must end, and the portable one must give the tokens. Their logits are the processor's.
static void check_gpu_stuck(int S) {
    enum { STEPS = 6, PROMPT = 5 };
    Config c = SHAPE(768, 2, 300, 1536, 16, 4, 48, FLAG_TIED | FLAG_CONV_BIAS);
    c.type = BF16;
    Model *m = mamba_random_model(&c, 4);
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, false);
    State *s = mamba_state_new(m), *got = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int32_t *prompt = random_ids(PROMPT, c.V), ids[STEPS * 8], recent[RECENT] = {0};
    uint64_t random[8] = {0};
    unsigned char allowed[300];
    char name[160], before[80];
    memset(allowed, 1, sizeof allowed);
    const int place = S > 1 ? 0 : -1;
    bool bad = GPU->set_state(gpu->gpu, -1, s->window, s->h, s->logits) ||
               GPU->prefill(gpu->gpu, prompt, PROMPT, NULL, NULL) ||
               GPU->generate_start(gpu->gpu, S, &greedy, random, PROMPT, recent, 0, allowed);
    snprintf(before, sizeof before, "%s", GPU->step_form(gpu->gpu));
    const bool special = strstr(before, "one kernel") != NULL;
    if (special) {
        bad = bad || GPU->pretend("patience", 200) || GPU->pretend("busy", 40);
        bad = bad || GPU->generate(gpu->gpu, ids, STEPS);
        bad = bad || GPU->pretend("busy", 0) || GPU->pretend("patience", 0);
        bad = bad || GPU->get_state(gpu->gpu, place, got->window, got->h, got->logits);
        const char *after = GPU->step_form(gpu->gpu);
        snprintf(name, sizeof name, "a busy GPU, %d sequences: %s got stuck", S, before);
        report(!bad && !strstr(after, "one kernel"), name, "now %s%s", after,
               bad ? GPU->error() : "");
        mamba_prefill(m, cpu, s, prompt, PROMPT, NULL, NULL);
        for (int i = 0; i < STEPS && !bad; i++) mamba_step(m, cpu, s, ids[i * S]);
        snprintf(name, sizeof name, "a busy GPU, %d sequences: logits", S);
        check_floats(name, got->logits, s->logits, (size_t)c.V, 3e-2);
        snprintf(name, sizeof name, "a busy GPU, %d sequences: h", S);
        check_floats(name, got->h, s->h, (size_t)c.n_layer * (size_t)c.E * (size_t)c.N, 3e-2);
    } else skip("a busy GPU", "no step in one kernel in this build");
    free(prompt);
    mamba_state_free(s);
    mamba_state_free(got);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// What a caller can get wrong is an error with a sentence, and nothing is lost by it.
static void check_gpu_bad_calls(void) {
    const Config *c = &GPU_SHAPES[0].config;
    Model *m = mamba_random_model(c, 9);
    Acts *gpu = gpu_acts(m, true);
    int32_t ids[3] = {1, c->V, 2}, out[65 * 2], targets[3] = {0, -2, 0}, recent[RECENT] = {0};
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    uint64_t random[2] = {0};
    unsigned char allowed[100];
    double sum = 0;
    memset(allowed, 1, sizeof allowed);
    expect(GPU->prefill(gpu->gpu, ids, 3, NULL, NULL) == -1 &&
               strstr(GPU->error(), "token id 100 at position 1"),
           "GPU prefill: an id outside the vocabulary");
    ids[1] = 3;
    expect(GPU->generate(gpu->gpu, out, 1) == -1 && strstr(GPU->error(), "no generation"),
           "GPU generate: not started");
    expect(GPU->prefill(gpu->gpu, ids, 3, NULL, NULL) == 0 &&
               GPU->generate_start(gpu->gpu, 2, &greedy, random, 3, recent, 0, allowed) == 0 &&
               GPU->generate(gpu->gpu, out, 65) == -1 && strstr(GPU->error(), "65 steps") &&
               GPU->generate(gpu->gpu, out, 64) == 0,
           "GPU generate: too many steps at once");
    expect(GPU->places(gpu->gpu, 1 << 20, 0) == -1 && strstr(GPU->error(), "too many"),
           "GPU places: more than fit");
    expect(GPU->place_begin(gpu->gpu, 5, -1, 0, 1, recent, 0) == -1 && *GPU->error(),
           "GPU places: one that is not there");
    Trainer *x = mamba_trainer_new_gpu(m, 1, 3, 0, true);
    expect(x && GPU->train_pass(x->gpu, -1, ids, targets, 1, 1, &sum) == -1 &&
               strstr(GPU->error(), "token id -2"),
           "GPU training: a target outside the vocabulary");
    mamba_trainer_free(x);
    mamba_acts_free(gpu);
    mamba_free(m);
}

// More sequences than a dimension of the grid but the first takes, 65,535.
static void check_gpu_many_sequences(void) {
    Config c = SHAPE(4, 1, 5, 8, 2, 4, 1, FLAG_TIED | FLAG_CONV_BIAS);
    Model *m = mamba_random_model(&c, 6);
    double seconds[4] = {0};
    check_gpu_gradients("70,000 sequences", m, 70000, 3, true, 2e-3);
    report(!GPU->time_scan(70000, 33, 1, 4, 0, 0, seconds), "scan, 70,000 sequences of a token",
           "off by %.1e", seconds[3]);
    mamba_free(m);
}

// Little memory: prompts are read in smaller pieces, with the same logits; with less, a sentence
// says what would fit.
static void check_gpu_memory(void) {
    Model *m = mamba_load("models/tales.bin");
    int32_t *ids = random_ids(2500, m->config.V);
    GPU->pretend("memory", 48);
    check_gpu_logits("48 MB of memory", m, ids, 2500, true, 5e-5);
    GPU->pretend("memory", 5);
    Acts *a = mamba_acts_new(m, 1);
    report(mamba_acts_gpu(a, m, true) && strstr(error_text, "MB are needed") &&
               strstr(error_text, "in 4 bits"),
           "5 MB of memory", "%s", error_text);
    GPU->pretend("memory", 0);
    mamba_acts_free(a);
    free(ids);
    mamba_free(m);
}

// --- smaller GPUs

// The choices of GPUs with fewer multiprocessors and with 100 kB of shared memory.
static void check_gpu_small_cards(void) {
    static const struct {
        int processors, shared;
    } card[] = {{24, 101376}, {46, 101376}, {84, 101376}, {108, 166912}};
    char name[160];
    for (int i = 0; i < COUNT(card); i++) {
        small_card = true;
        GPU->pretend("processors", card[i].processors);
        GPU->pretend("shared", card[i].shared);
        printf("# as on a GPU of %d multiprocessors, %d bytes of shared memory a block\n",
               card[i].processors, card[i].shared);
        test_gpu_scan();
        for (int k = 0; k < COUNT(GPU_SHAPES); k++) {
            Model *m = mamba_random_model(&GPU_SHAPES[k].config, 11 + (uint64_t)k);
            int L = GPU_SHAPES[k].lengths[3 + (i + k) % 3];
            int32_t *ids = random_ids((size_t)L, m->config.V);
            check_gpu_logits(GPU_SHAPES[k].name, m, ids, (size_t)L, true, 2e-5);
            check_gpu_gradients(GPU_SHAPES[k].name, m, 2, L, true, 2e-4);
            snprintf(name, sizeof name, "%s, bf16", GPU_SHAPES[k].name);
            // Precision is tested elsewhere.
            if (GPU_SHAPES[k].config.D > 1) check_gpu_gradients(name, m, 2, L, false, 2e-1);
            free(ids);
            mamba_free(m);
        }
        static const int sequences[] = {1, 5, 33};
        for (int k = 0; k < 5; k++)
            check_gpu_step(STEP_SHAPES[k].name, &STEP_SHAPES[k].config, sequences[(i + k) % 3]);
    }
    GPU->pretend("processors", 0);
    GPU->pretend("shared", 0);
    small_card = false;
}

static void test_cuda_texts(void) {
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    const Sampling usual = {.temperature = 0.8f, .top_p = 0.95f, .repeat_penalty = 1.1f};
    check_gpu_texts(&greedy, "texts that come and go, greedy");
    check_gpu_texts(&usual, "texts that come and go, sampled");
    check_gpu_step_batch();
    check_gpu_vocabulary(50280, 0.7);
    check_gpu_vocabulary(50280, 3);
    check_gpu_vocabulary(262144, 2);
    check_gpu_vocabulary(333, 1);
}

static void test_cuda_faults(void) {
    check_gpu_bad_calls();
    check_gpu_stuck(1);
    check_gpu_stuck(8);
    check_gpu_many_sequences();
    check_gpu_memory();
}

static void test_cuda_small_cards(void) { check_gpu_small_cards(); }
