// The GPU, texts that are read side by side from their start (make test-cuda): scores and the
// likeliest ids of eval, and the states of prompts, against the processor's, each text alone. Texts
// have different lengths, so the shorter ones are padded.

typedef struct {
    const Model *m;
    const int32_t *targets;
    float *losses;
    int32_t *likeliest;
    size_t t;
} AloneScores;

static void score_alone(void *context, const float *logits) {
    AloneScores *s = context;
    const size_t t = s->t++;
    int best = 0;
    if (s->targets[t] < 0) return;
    for (int v = 1; v < s->m->config.V; v++)
        if (logits[v] > logits[best]) best = v;
    s->losses[t] = (float)mamba_nll(s->m, logits, s->targets[t]);
    s->likeliest[t] = best;
}

// B texts of n (B) tokens, scored from token `first` on.
static void check_gpu_scores(const char *label, const Model *m, const size_t *n, int B, int first,
                             bool steps, bool float32, double tolerance) {
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, float32);
    State *s = mamba_state_new(m);
    size_t L = 0, wanted = 0, same = 0;
    char name[200];
    for (int b = 0; b < B; b++) L = n[b] > L ? n[b] : L;
    const size_t all = (size_t)B * L;
    int32_t *ids = random_ids(all, m->config.V), *targets = malloc(all * sizeof *targets),
            *likeliest = malloc(all * sizeof *likeliest), *best = malloc(all * sizeof *best);
    float *losses = malloc(all * sizeof *losses), *want = calloc(all, sizeof *want);
    for (size_t i = 0; i < all; i++) {
        const size_t b = i / L, t = i % L;
        targets[i] = t + 1 < n[b] && t >= (size_t)first ? ids[i + 1] : -1;
        wanted += targets[i] >= 0;
    }
    const ScoreRun run = {ids, targets, B, (int)L, first, steps, losses, likeliest};
    const TextsUse use = steps ? TEXTS_STEPPED : TEXTS_SCORED;
    snprintf(name, sizeof name, "%s, %d texts of up to %zu tokens%s", label, B, L,
             steps ? ", step by step" : "");
    if (mamba_texts_at_once(gpu, B, L, use) < B || mamba_score_texts(gpu, &run))
        report(false, name, "%s %s", error_text, GPU->error());
    for (int b = 0; b < B; b++) {
        AloneScores alone = {m, targets + (size_t)b * L, want + (size_t)b * L, best + (size_t)b * L,
                             0};
        mamba_state_reset(m, s);
        mamba_prefill(m, cpu, s, ids + (size_t)b * L, n[b], score_alone, &alone);
    }
    for (size_t i = 0; i < all; i++) {
        if (targets[i] < 0) losses[i] = 0;
        else same += likeliest[i] == best[i];
    }
    check_floats(name, losses, want, all, tolerance);
    // Equal but for rounding where two logits are.
    const size_t may_differ = float32 ? wanted / 200 : wanted / 10 + 2;
    report(wanted && same + may_differ >= wanted, name, "%zu of %zu likeliest ids", same, wanted);
    FREE(ids, targets, likeliest, best, losses, want);
    mamba_state_free(s);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
}

// The states after prompts that were read side by side, at the places of their texts.
static void check_gpu_prompts(const char *label, const Model *m, const size_t *n, int B,
                              bool float32, double tolerance) {
    Acts *cpu = mamba_acts_new(m, 1), *gpu = gpu_acts(m, float32);
    State *s = mamba_state_new(m), *got = mamba_state_new(m), *text[16];
    const size_t layers = (size_t)m->config.n_layer * (size_t)m->config.E;
    const int32_t *ids[16];
    int32_t *prompt[16];
    size_t L = 0;
    char name[200];
    bool bad = false;
    for (int b = 0; b < B; b++) {
        prompt[b] = random_ids(n[b], m->config.V);
        ids[b] = prompt[b];
        text[b] = mamba_state_of_text();
        L = n[b] > L ? n[b] : L;
    }
    for (int round = 0; round < 2; round++) // the second time beside numbers of the first
        bad |= mamba_places(gpu, B, 0) || mamba_texts_at_once(gpu, B, L, TEXTS_PROMPTS) < B ||
               mamba_prompts_read(gpu, text, ids, n, B);
    for (int b = 0; b < B && !bad; b++) {
        const int place = B - 1 - b;
        bad |= mamba_place_begin_prompt(gpu, place, b, text[b], 1) ||
               GPU->get_state(gpu->gpu, place, got->window, got->h, got->logits);
        mamba_state_reset(m, s);
        mamba_prefill(m, cpu, s, prompt[b], n[b], NULL, NULL);
        snprintf(name, sizeof name, "%s, prompt of %zu beside others: logits", label, n[b]);
        check_floats(name, got->logits, s->logits, (size_t)m->config.V, tolerance);
        snprintf(name, sizeof name, "%s, prompt of %zu beside others: h", label, n[b]);
        check_floats(name, got->h, s->h, layers * (size_t)m->config.N, tolerance);
        snprintf(name, sizeof name, "%s, prompt of %zu beside others: window", label, n[b]);
        check_floats(name, got->window, s->window, layers * (size_t)(m->config.K - 1), tolerance);
        bad |= text[b]->position != n[b] || text[b]->n_recent != s->n_recent ||
               memcmp(text[b]->recent, s->recent, sizeof s->recent) != 0;
    }
    snprintf(name, sizeof name, "%s, %d prompts at once", label, B);
    report(!bad, name, "%s", bad ? error_text : "");
    for (int b = 0; b < B; b++) {
        free(prompt[b]);
        mamba_state_free(text[b]);
    }
    mamba_state_free(s);
    mamba_state_free(got);
    mamba_acts_free(cpu);
    mamba_acts_free(gpu);
}

// A file in float16: products in float16, against the processor's in float32. An activation that
// float16 cannot hold ends in an error, not in a wrong text.
static void test_cuda_f16(void) {
    static const int sequences[] = {1, 3, 16, 17, 40};
    static const size_t mixed[] = {70, 3, 129, 64, 2};
    const double tolerance = narrow_tolerance(F16);
    char name[80];
    for (int i = 0; i < COUNT(GPU_SHAPES); i++) {
        Config c = GPU_SHAPES[i].config;
        if (c.D == 1) continue; // the norm of one number: only rounding
        c.type = F16;
        Model *m = mamba_random_model(&c, 11 + (uint64_t)i);
        int32_t *ids = random_ids(320, c.V);
        snprintf(name, sizeof name, "%s, f16", GPU_SHAPES[i].name);
        check_gpu_logits(name, m, ids, 320, false, tolerance);
        check_gpu_scores(name, m, mixed, COUNT(mixed), 0, false, false, tolerance);
        check_gpu_prompts(name, m, mixed, COUNT(mixed), false, tolerance);
        snprintf(name, sizeof name, "%s, f16, float32 products", GPU_SHAPES[i].name);
        check_gpu_logits(name, m, ids, 100, true, 5e-5);
        free(ids);
        mamba_free(m);
    }
    for (int i = 0; i < COUNT(STEP_SHAPES); i++) {
        if (STEP_SHAPES[i].config.D >= 4096) continue;
        snprintf(name, sizeof name, "%s, f16", STEP_SHAPES[i].name);
        check_gpu_step_of(F16, name, &STEP_SHAPES[i].config, sequences[i % COUNT(sequences)]);
        check_gpu_step_of(F16, name, &STEP_SHAPES[i].config, 1);
    }
    Config c = GPU_SHAPES[0].config;
    c.type = F16;
    Model *m = mamba_random_model(&c, 3);
    for (size_t i = 0; i < tensor_elements(&m->layer[0].in_proj); i++)
        ((uint16_t *)(uintptr_t)m->layer[0].in_proj.data)[i] = 0x7bff; // 65504, the largest
    Acts *gpu = gpu_acts(m, false);
    State *s = mamba_state_new(m);
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int32_t ids[5] = {1, 2, 3, 4, 5};
    bool finite = true;
    bool bad = mamba_prefill(m, gpu, s, ids, 5, NULL, NULL) != 0;
    for (int v = 0; v < c.V && !bad; v++) finite &= s->logits[v] - s->logits[v] == 0;
    bad |= mamba_places(gpu, 1, 0) || mamba_places_sampling(m, gpu, &greedy) ||
           mamba_place_begin(gpu, 0, s, 1) || mamba_places_write(gpu, ids, 1);
    report(!bad && (finite ? ids[0] >= 0 : ids[0] == -1), "f16, numbers beyond its range",
           "logits are %s, the id is %d", finite ? "finite" : "not finite", ids[0]);
    mamba_state_free(s);
    mamba_acts_free(gpu);
    mamba_free(m);
}

static void test_cuda_eval(void) {
    static const size_t mixed[] = {70, 3, 129, 64, 2, 200, 17, 128}, short_ones[] = {1, 2, 1, 3, 5},
                        single[] = {1, 1, 1}, long_one[] = {700};
    const char *models[] = {"tests/odd.bin", "tests/falcon.bin", "tests/plain.bin",
                            "tests/layernorm.bin", "models/tales.bin"};
    for (int i = 0; i < COUNT(GPU_SHAPES); i++) {
        Model *m = mamba_random_model(&GPU_SHAPES[i].config, 11 + (uint64_t)i);
        check_gpu_scores(GPU_SHAPES[i].name, m, mixed, COUNT(mixed), 0, false, true, 5e-5);
        check_gpu_scores(GPU_SHAPES[i].name, m, mixed, COUNT(mixed), 0, true, true, 5e-5);
        check_gpu_prompts(GPU_SHAPES[i].name, m, mixed, COUNT(mixed), true, 5e-5);
        check_gpu_prompts(GPU_SHAPES[i].name, m, short_ones, COUNT(short_ones), true, 5e-5);
        mamba_free(m);
    }
    for (int i = 0; i < COUNT(models); i++) {
        Model *m = mamba_load(models[i]);
        check_gpu_scores(models[i], m, mixed, COUNT(mixed), 0, false, true, 5e-5);
        check_gpu_prompts(models[i], m, mixed, COUNT(mixed), true, 5e-5);
        check_gpu_prompts(models[i], m, single, COUNT(single), true, 5e-5);
        mamba_free(m);
    }
    Model *tales = mamba_load("models/tales.bin");
    check_gpu_scores("tales, bf16", tales, mixed, COUNT(mixed), 0, false, false, 3e-2);
    check_gpu_scores("tales, the last tokens", tales, mixed + 2, 1, 100, false, true, 5e-5);
    check_gpu_scores("tales, the last tokens", tales, mixed, COUNT(mixed), 120, false, true, 5e-5);
    check_gpu_scores("tales, the last tokens", tales, mixed, COUNT(mixed), 120, true, false, 3e-2);
    check_gpu_prompts("tales, bf16", tales, mixed, COUNT(mixed), false, 3e-2);
    Model *packed = mamba_quantize(tales, true);
    check_gpu_scores("tales in q4", packed, mixed, COUNT(mixed), 0, false, false, 3e-2);
    check_gpu_prompts("tales in q4", packed, mixed, COUNT(mixed), false, 3e-2);
    GPU->pretend("memory", 48); // a text in several pieces
    check_gpu_scores("48 MB of memory", tales, long_one, 1, 0, false, true, 5e-5);
    check_gpu_scores("48 MB of memory", tales, long_one, 1, 600, false, true, 5e-5);
    GPU->pretend("memory", 0);
    Acts *a = gpu_acts(tales, true);
    int32_t ids[2] = {1, tales->config.V}, lengths[2] = {1, 3};
    expect(GPU->read_prompts(a->gpu, ids, lengths, 2, 1) == -1 && *GPU->error(),
           "GPU prompts: more than there is memory for");
    expect(mamba_texts_at_once(a, 2, 1, TEXTS_PROMPTS) == 2 &&
               GPU->read_prompts(a->gpu, ids, lengths, 2, 1) == -1 &&
               strstr(GPU->error(), "prompt 1 has 3 tokens"),
           "GPU prompts: a length that is none");
    lengths[1] = 1;
    expect(GPU->read_prompts(a->gpu, ids, lengths, 2, 1) == -1 && strstr(GPU->error(), "token id"),
           "GPU prompts: an id outside the vocabulary");
    mamba_acts_free(a);
    mamba_free(packed);
    mamba_free(tales);
}
