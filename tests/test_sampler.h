// Sampler: each setting does what its help says, and draws follow the probabilities.

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
    enum { DRAWS = LARGER_MODELS ? 40000 : 8000 };
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
    Session x = test_session("tests/odd.bin", 1); // 259 ids; the tokenizer has 256
    x.state->position = 1;
    x.state->random = 5;
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
    x.state->recent[0] = 10;
    x.state->recent[1] = 10;
    x.state->n_recent = 2; // twice in the list: penalised once
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
    // Candidates come from a heap in order, also where many logits are equal.
    bool ordered = true;
    double mass;
    int n = 256, kept;
    for (int i = 0; i < n; i++) {
        x.acts->order[i] = i;
        x.acts->probs[i] = (float)(random_u64(&test_random) % 50);
    }
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
