// The model: against transformers, and against itself (in pieces, by steps, in batches, by teams).

typedef struct {
    float *all;
    size_t n, V;
} Collected;
static void collect(void *context, const float *logits) {
    Collected *c = context;
    memcpy(c->all + c->n++ * c->V, logits, c->V * sizeof(float));
}

// Stage by stage: the first stage that differs names the wrong kernel. The logits alone would not.
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
    Work *w = &a->work;
    w->ids = ids;
    w->state_only = false;
    layer_states(a->seq, m, &x->state, 1);
    TEAM(embed(w->res, ids, &m->embedding, L))
    for (int layer = 0; layer < c->n_layer; layer++) {
        TEAM(block(m, layer, w, a->seq + layer, 1, L))
        STAGE("xz", w->xz, L * 2 * E)
        STAGE("u", w->u, L * E)
        if (!(c->flags & FLAG_MIXER_NORM))
            STAGE("dt_BC", w->xdb, L * (c->R + 2 * N)) // mamba.c norms them in place
        STAGE("g", w->y, L * E)
        STAGE("out", w->xn, (size_t)L * c->D)
        STAGE("res", w->res, (size_t)L * c->D)
        if ((g = golden_get("layer%d.dt", layer))) {
            double *want = doubles(g->data, g->n);
            for (size_t i = 0; i < g->n; i++) want[i] = softplus_double(want[i]);
            snprintf(name, sizeof name, "%s layer %d delta", model, layer);
            check(name, w->delta, want, g->n, 1e-5);
            free(want);
        }
        if ((g = golden_get("layer%d.h", layer))) { // transformers stores (E,N)
            float *h = alloc_aligned(g->n * sizeof *h);
            for (size_t e = 0; e < E; e++)
                for (size_t n = 0; n < N; n++)
                    h[e * N + n] = x->state->h[((size_t)layer * N + n) * E + e];
            snprintf(name, sizeof name, "%s layer %d final h", model, layer);
            check_floats(name, h, g->data, g->n, 1e-5);
            free_aligned(h);
        }
        // transformers stores the last K inputs, (E,K)
        if ((g = golden_get("layer%d.conv_window", layer)) && K > 1) {
            float *got = alloc_aligned(E * K * sizeof *got),
                  *want = alloc_aligned(E * K * sizeof *want);
            for (size_t e = 0; e < E; e++)
                for (size_t k = 1; k < K; k++) {
                    got[e * K + k] = x->state->window[((size_t)layer * (K - 1) + k - 1) * E + e];
                    want[e * K + k] = g->data[e * K + k];
                }
            snprintf(name, sizeof name, "%s layer %d final conv window", model, layer);
            check_floats(name, got, want, E * K, 1e-5);
            FREE_ALIGNED(got, want);
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

// Fills the session's state with plausible values, and returns a copy of them.
static float *random_state(Session *x) {
    State *s = x->state;
    size_t V = (size_t)x->model->config.V, n = s->floats - V;
    for (size_t i = 0; i < n; i++) s->window[i] = uniform(-1, 1);
    return copy_floats(s->data, s->floats);
}

// From a random initial state: prefill as a whole, step by step, and in two parts.
static void test_splits(const char *file) {
    Session x = test_session(file, 2);
    const Config *c = &x.model->config;
    // Q8 and Q4: the step adds in another order than the blocked product. It starts from the codes'
    // offset.
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
        bool every_cut = L <= EVERY_CUT_TO && (c->D < 100 || L < 10 || test_everything);
        int splits = every_cut ? L : 5;
        for (int i = 0; i <= splits; i++) { // 0: step by step; others: one cut, also at the end
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
        FREE(ids, want, want_logits);
        FREE_ALIGNED(start, whole, logits);
    }
    session_close(&x);
}

// mamba_prefill leaves out work: outputs of the last layer that nobody reads, and equal rows of
// in_proj. This changes no bit of the state or of the logits: it is compared with every layer in
// full, one after the other, at lengths around the edges of a piece.
static void test_left_out(const Model *m, const char *name) {
    const Config *c = &m->config;
    const int pieces[] = {1, 2, 33, 64, 512}, beyond[] = {-1, 0, 1, 70};
    Acts *a = mamba_acts_new(m, 2);
    State *got = mamba_state_new(m), *want = mamba_state_new(m);
    Work *w = &a->work;
    int32_t ids[1100];
    int room = a->piece, bad = 0, count = 0;
    for (int i = 0; i < 1100; i++) ids[i] = (int32_t)(random_u64(&test_random) % (uint64_t)c->V);
    for (int p = 0; p < 4 + LARGER_MODELS; p++)
        for (int k = 0; k < 4; k++)
            for (int whole = 1; whole <= 2; whole++) {
                int n = whole * pieces[p] + beyond[k];
                if (n < 1 || pieces[p] > room || (c->D > 100 && p < 3)) continue;
                a->piece = pieces[p];
                for (size_t i = 0; i < got->floats; i++)
                    got->data[i] = want->data[i] = uniform(-1, 1);
                mamba_prefill(m, a, got, ids, (size_t)n, NULL, NULL);
                layer_states(a->seq, m, &want, 1);
                w->ids = NULL; // every token's in_proj by itself
                w->state_only = false;
                for (int t = 0, L; t < n; t += L) {
                    L = n - t < a->piece ? n - t : a->piece;
                    TEAM(embed(w->res, ids + t, &m->embedding, L))
                    for (int layer = 0; layer < c->n_layer; layer++)
                        TEAM(block(m, layer, w, a->seq + layer, 1, L))
                    TEAM(last_logits(m, a, &want, w->res, 1, L))
                }
                bad += memcmp(got->data, want->data, got->floats * sizeof(float)) != 0;
                count++;
            }
    a->piece = room;
    report(bad == 0 && count > 0, name, "what is left out changes no bit: %d of %d lengths differ",
           bad, count);
    mamba_acts_free(a);
    mamba_state_free(got);
    mamba_state_free(want);
}

// Small vocabularies, where in_proj is computed once per id: below, at and above the size from
// which this pays.
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
#ifndef _OPENMP
    skip(file, "the same bits by any number of threads: built without OpenMP");
    return;
#endif
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

// In a step of several sequences each has the bits that it has alone: 1 to 17 sequences and
// BATCH_MAX, on teams of 1, 2 and 3.
static void test_batches(const char *file) {
    enum { STEPS = 3 };
    Session x = test_session(file, 1);
    State *alone[BATCH_MAX], *s[BATCH_MAX];
    int32_t ids[STEPS][BATCH_MAX];
    size_t bytes = x.state->floats * sizeof(float);
    bool same = true;
    for (int i = 0; i < BATCH_MAX; i++) {
        alone[i] = mamba_state_new(x.model);
        s[i] = mamba_state_new(x.model);
        for (int t = 0; t < i % 5; t++)
            mamba_step(x.model, x.acts, alone[i], (i * 7 + t) % 250); // a different state each
    }
    for (int t = 0; t < STEPS; t++)
        for (int i = 0; i < BATCH_MAX; i++) ids[t][i] = (int32_t)(random_u64(&test_random) % 256);
    State *before[BATCH_MAX];
    for (int i = 0; i < BATCH_MAX; i++) {
        before[i] = mamba_state_new(x.model);
        mamba_state_copy(x.model, before[i], alone[i]);
        for (int t = 0; t < STEPS; t++) mamba_step(x.model, x.acts, alone[i], ids[t][i]);
    }
    for (int threads = 1; threads <= MOST_THREADS; threads++)
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
    for (int i = 0; i < BATCH_MAX; i++) {
        mamba_state_free(alone[i]);
        mamba_state_free(s[i]);
        mamba_state_free(before[i]);
    }
    session_close(&x);
}

// The states of the last norm, from ids and from rows, against transformers; the logits of rows
// that are the embeddings of ids against those of the ids.
static void test_hidden(const char *model, const char *file) {
    char path[96], name[96];
    snprintf(path, sizeof path, "tests/%s.gold", model);
    if (!golden_open(path)) return;
    Session x = test_session(file, 2);
    const Model *m = x.model;
    int L;
    int32_t *ids = golden_ids(&L);
    const size_t D = (size_t)m->config.D, V = (size_t)m->config.V;
    const Golden *want = golden_get("xn_f"), *logits = golden_get("logits");
    float *rows = alloc_aligned((size_t)L * D * sizeof *rows);
    TEAM(embed(rows, ids, &m->embedding, L))
    for (int by_rows = 0; by_rows < 2; by_rows++) {
        Collected all = {alloc_aligned((size_t)L * D * sizeof(float)), 0, D};
        mamba_state_reset(m, x.state);
        bool good = mamba_hidden(m, x.acts, x.state, by_rows ? NULL : ids, rows, (size_t)L, collect,
                                 &all) == 0;
        snprintf(name, sizeof name, "%s hidden states of %s", model, by_rows ? "rows" : "ids");
        good = check_floats(name, all.all, want->data, want->n, 1e-5) && good;
        check_floats("and the logits after them", x.state->logits, logits->data + (L - 1) * V, V,
                     1e-5);
        expect(good && all.n == (size_t)L && x.state->position == (uint64_t)L, "all are read");
        free_aligned(all.all);
    }
    Collected all = {alloc_aligned(logits->n * sizeof(float)), 0, V};
    mamba_state_reset(m, x.state);
    mamba_prefill_rows(m, x.acts, x.state, rows, (size_t)L / 2, collect, &all);
    mamba_prefill_rows(m, x.acts, x.state, rows + (size_t)L / 2 * D, (size_t)L - (size_t)L / 2,
                       collect, &all);
    snprintf(name, sizeof name, "%s logits of rows, in two parts", model);
    check_floats(name, all.all, logits->data, logits->n, 1e-5);
    rows[D] = NAN;
    expect(mamba_prefill_rows(m, x.acts, x.state, rows, 2, NULL, NULL) == -1 &&
               strstr(error_text, "number 0 of row 1") && x.state->position == (uint64_t)L,
           "a row that is not finite is refused");
    FREE_ALIGNED(all.all, rows);
    free(ids);
    session_close(&x);
    golden_close();
}

static void test_model(void) {
    test_batches("tests/odd.bin");
    test_batches("tests/falcon.bin");
    test_batches("tests/plain.bin");
    test_batches("tests/layernorm.bin");
    if (LARGER_MODELS) test_batches("models/tales.bin");
    else skip("the tales model in pieces, batches, by threads, quantised", "-DSMALL");
    test_golden_model("odd", "tests/odd.bin");
    test_golden_model("falcon", "tests/falcon.bin");
    test_golden_model("plain", "tests/plain.bin");
    test_golden_model("layernorm", "tests/layernorm.bin");
    test_golden_model("tales", "models/tales.bin");
    test_hidden("odd", "tests/odd.bin");
    test_hidden("falcon", "tests/falcon.bin");
    test_hidden("layernorm", "tests/layernorm.bin");
    test_splits("tests/odd.bin");
    test_splits("tests/falcon.bin");
    test_splits("tests/plain.bin");
    test_splits("tests/layernorm.bin");
    if (LARGER_MODELS) test_splits("models/tales.bin");
    test_threads("tests/odd.bin");
    test_threads("tests/falcon.bin");
    test_threads("tests/layernorm.bin");
    if (LARGER_MODELS) test_threads("models/tales.bin");
    const char *files[] = {"tests/odd.bin", "tests/falcon.bin", "tests/plain.bin",
                           "tests/layernorm.bin", "models/tales.bin"};
    for (int i = 0; i < 4 + LARGER_MODELS; i++) {
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
