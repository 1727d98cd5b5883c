// Gradients: of every parameter and of the initial states, against PyTorch in float64. Those of the
// scan, of the convolution and of the norms also against central differences.

typedef struct {
    const char *model;
    int n;
} GradientCheck;

static void check_gradient(void *context, const TensorInfo *info, Tensor *w) {
    GradientCheck *c = context;
    char name[96];
    const Golden *g = info->layer < 0 ? golden_get("grad.%s", info->name)
                                      : golden_get("grad.layer%d.%s", info->layer, info->name);
    snprintf(name, sizeof name, "%s gradient of %s %d", c->model, info->name, info->layer);
    if (!g || g->n != tensor_elements(w)) expect(false, name);
    else check_floats(name, w->data, g->data, g->n, 1e-4);
    c->n++;
}

static void test_model_gradients(const char *model) {
    char path[64];
    snprintf(path, sizeof path, "tests/%s.gold", model);
    if (!golden_open(path)) return;
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    int L;
    int32_t *ids = golden_ids(&L);
    for (int way = 0; way < 2; way++) { // one sequence; two equal ones, each half the weight
        int B = 1 + way;
        Trainer *x = mamba_trainer_new(m, B, L - 1, 0, 2);
        int32_t *in = malloc(sizeof *in * (size_t)B * (L - 1)),
                *targets = malloc(sizeof *in * (size_t)B * (L - 1));
        for (int i = 0; i < B * (L - 1); i++) {
            in[i] = ids[i % (L - 1)];
            targets[i] = ids[i % (L - 1) + 1];
        }
        double loss = mamba_train_pass(x, in, targets, 1.0f / (float)(B * (L - 1)), true) /
                      (B * (L - 1)),
               want = (double)golden_get("loss")->data[0];
        GradientCheck c = {model, 0};
        report(fabs(loss - want) <= 1e-5 * want, "loss", "%.7f, want %.7f", loss, want);
        each_tensor(x->gradient, check_gradient, &c);
        mamba_trainer_free(x);
        FREE(in, targets);
    }
    free(ids);
    mamba_free(m);
    mamba_free(stored);
    golden_close();
}

// Gradients at other lengths, from zero states and from given ones. dev/make_train_golden.py
// describes the golden files of these passes.
typedef struct {
    char label[64], prefix[24]; // prefix: of the names in the golden file
    const int32_t *ids;         // (rows)
    int rows, n;
    bool layers_only;
    double worst;
    char where[LABEL];
} PassCheck;

static void compare_with(PassCheck *c, const char *name, const float *got, const float *want,
                         size_t n) {
    size_t where;
    double *d = doubles(want, n), error = error_of(got, d, n, &where);
    if (!(error <= c->worst)) {
        c->worst = error;
        snprintf(c->where, sizeof c->where, "%s", name);
    }
    c->n++;
    free(d);
}

// The golden file holds the whole tensor or a sample of it. A sample of the embedding has only rows
// of the ids in this pass.
static void compare_sample(void *context, const TensorInfo *info, Tensor *w) {
    PassCheck *c = context;
    char name[LABEL];
    const float *x = w->data;
    size_t n = tensor_elements(w), D = (size_t)w->cols;
    if (info->layer < 0) snprintf(name, sizeof name, "%s", info->name);
    else snprintf(name, sizeof name, "layer%d.%s", info->layer, info->name);
    if (c->layers_only && info->layer < 0 && strcmp(name, "embedding")) return;
    const Golden *g = golden_get("%s%s", c->prefix, name);
    if (!g) {
        c->worst = INFINITY;
        snprintf(c->where, sizeof c->where, "the golden: no %.20s", name);
        return;
    }
    bool gathered = g->n != n && !strcmp(name, "embedding");
    if (gathered) n = c->rows * D;
    float *got = alloc_aligned(g->n * sizeof *got);
    for (size_t k = 0; k < g->n; k++) {
        size_t i = k * n / g->n;
        got[k] = gathered ? x[(size_t)c->ids[i / D] * D + i % D] : x[i];
    }
    compare_with(c, name, got, g->data, g->n);
    free_aligned(got);
}

static void report_pass(const PassCheck *c) {
    report(c->worst <= 1e-4, c->label, "%d gradients, error %.2e of 1e-04 in %s", c->n, c->worst,
           c->where);
}

// The ids of B sequences; with from = 1 their targets.
static int32_t *pass_rows(int B, int L, int from) {
    const Golden *text = golden_get("text");
    int32_t *ids = malloc(sizeof *ids * (size_t)B * L);
    for (int i = 0; i < B * L; i++)
        ids[i] = (int32_t)text->data[i / L * text->dims[1] + i % L + from];
    return ids;
}

// chunk 0: whole sequences.
static void test_pass(const char *model, Model *m, int B, int L, int chunk) {
    int32_t *ids = pass_rows(B, L, 0), *targets = pass_rows(B, L, 1);
    PassCheck c = {.ids = ids, .rows = B * L};
    Trainer *x = mamba_trainer_new(m, B, L, chunk, 2);
    float loss = (float)(mamba_train_pass(x, ids, targets, 1.0f / (float)(B * L), true) / (B * L));
    snprintf(c.label, sizeof c.label, "%s L %d B %d chunk %d", model, L, B, chunk);
    snprintf(c.prefix, sizeof c.prefix, "L%d.", L);
    compare_with(&c, "loss", &loss, golden_get("L%d.loss", L)->data, 1);
    each_tensor(x->gradient, compare_sample, &c);
    report_pass(&c);
    mamba_trainer_free(x);
    FREE(ids, targets);
}

// The layers alone, as mamba_train_pass calls them, but from random initial states and with a
// gradient of the final states.
static void test_pass_from_states(const char *model, Model *m, int B, int L) {
    const Config *config = &m->config;
    size_t D = (size_t)config->D, NE = (size_t)config->N * config->E,
           KE = (size_t)(config->K - 1) * config->E;
    int32_t *ids = pass_rows(B, L, 0);
    int n_layer = config->n_layer;
    PassCheck c = {.ids = ids, .rows = B * L, .layers_only = true};
    Trainer *x = mamba_trainer_new(m, B, L, 0, 2);
    snprintf(c.label, sizeof c.label, "%s L %d B %d from states", model, L, B);
    snprintf(c.prefix, sizeof c.prefix, "L%d.states.", L);
    const Golden *h0 = golden_get("h0"), *d_h = golden_get("d_h"), *window0 = golden_get("window0"),
                 *d_res = golden_get("d_res"), *d_h0 = golden_get("%sh0", c.prefix),
                 *d_window0 = golden_get("%swindow0", c.prefix);
    float *got_h = alloc_aligned(d_h0->n * sizeof(float)),
          *got_window = alloc_aligned(d_window0->n * sizeof(float));
    assert(d_h0->n == B * n_layer * NE && d_window0->n == B * n_layer * KE);
#define PART(array, b, layer, size) \
    ((array) + ((size_t)(b) * n_layer + (layer)) * (size)) // of (B, n_layer, size)
    x->tokens = L;
    TEAM(embed(x->work[0].res, ids, &m->embedding, B * L))
    for (int i = 0; i < 2 * n_layer; i++) { // the layers forward, then backward
        bool forward = i < n_layer;
        int layer = forward ? i : 2 * n_layer - 1 - i;
        for (int b = 0; b < B; b++) {
            int at = layer * B + b;
            LayerState seq = x->seq[at];
            memcpy(x->h0 + at * NE, PART(h0->data, b, layer, NE), NE * sizeof(float));
            memcpy(x->window0 + at * KE, PART(window0->data, b, layer, KE), KE * sizeof(float));
            memcpy(seq.h, x->h0 + at * NE, NE * sizeof(float));
            memcpy(seq.window, x->window0 + at * KE, KE * sizeof(float));
            if (!forward)
                memcpy(x->d_h + at * NE, PART(d_h->data, b, layer, NE), NE * sizeof(float));
            if (i == n_layer)
                memcpy(x->d_res + b * L * D, d_res->data + b * d_res->dims[1] * D,
                       (size_t)L * D * sizeof(float));
        }
        if (forward) TEAM(block(m, layer, &x->work[layer], x->seq + layer * B, B, L))
        else TEAM(block_backward(x, layer, 0))
        for (int b = 0; b < B && !forward; b++) {
            int at = layer * B + b;
            memcpy(PART(got_h, b, layer, NE), x->d_h + at * NE, NE * sizeof(float));
            memcpy(PART(got_window, b, layer, KE), x->d_window + at * KE, KE * sizeof(float));
        }
    }
#undef PART
    TEAM(embed_backward(grad(&x->gradient->embedding), x->d_res, ids, B * L, config->D))
    each_tensor(x->gradient, compare_sample, &c);
    compare_with(&c, "h0", got_h, d_h0->data, d_h0->n);
    compare_with(&c, "window0", got_window, d_window0->data, d_window0->n);
    report_pass(&c);
    mamba_trainer_free(x);
    free(ids);
    FREE_ALIGNED(got_h, got_window);
}

static void test_passes(const char *model) {
    char path[64];
    snprintf(path, sizeof path, "tests/%s-train.gold", model);
    if (!golden_open(path)) return;
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    const Golden *passes = golden_get("passes");
    for (size_t i = 0; i < passes->dims[0]; i++) {
        const float *pass = passes->data + 3 * i; // L, B from nothing, B from states
        team = 1 + (int)i % 3;
        const int chunks[] = {0, 1, 7, 64};
        for (int k = 0; k < COUNT(chunks) && (k == 0 || chunks[k] < (int)pass[0]); k++)
            test_pass(model, m, (int)pass[1], (int)pass[0], chunks[k]);
        test_pass_from_states(model, m, (int)pass[2], (int)pass[0]);
    }
    team = 1;
    mamba_free(m);
    mamba_free(stored);
    golden_close();
}

// Every gradient of a long sequence in chunks, beside that of the whole sequence.
typedef struct {
    const float *whole, *base;
    double worst;
    char where[LABEL];
} ChunkCheck;

static void compare_chunked(void *context, const TensorInfo *info, Tensor *w) {
    ChunkCheck *c = context;
    const float *got = w->data, *want = c->whole + (got - c->base);
    double largest = 0, error = 0;
    for (size_t i = 0; i < tensor_elements(w); i++) {
        largest = fmax(largest, fabs((double)want[i]));
        error = fmax(error, fabs((double)got[i] - (double)want[i]));
    }
    if (error <= c->worst * largest) return;
    c->worst = error / largest;
    tensor_label(c->where, info);
}

static void test_chunks(const char *model) {
#ifdef SMALL // sanitizers and emulated processors
    enum { B = 2, L = 130 };
#else
    enum { B = 2, L = 1100 };
#endif
    char path[64];
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    int32_t *ids = malloc(2 * B * L * sizeof *ids), *targets = ids + B * L;
    for (int i = 0; i < 2 * B * L; i++)
        ids[i] = (int32_t)(random_u64(&test_random) % (uint64_t)m->config.V);
    Trainer *whole = mamba_trainer_new(m, B, L, 0, 2);
    double want = mamba_train_pass(whole, ids, targets, 1.0f / (B * L), true);
    const int chunks[] = {1, 7, 64, 1000};
    for (int k = 0; k < COUNT(chunks); k++) {
        Trainer *x = mamba_trainer_new(m, B, L, chunks[k], 2);
        double loss = mamba_train_pass(x, ids, targets, 1.0f / (B * L), true);
        double only = mamba_train_pass(x, ids, targets, 1.0f / (B * L), false);
        ChunkCheck c = {.whole = whole->gradient->weights, .base = x->gradient->weights};
        each_tensor(x->gradient, compare_chunked, &c);
        // falcon's gradients are ill-conditioned: those of a whole pass are 3e-5 from float64's.
        const double most = strcmp(model, "falcon") ? 1e-5 : 1e-4;
        report(c.worst <= most && fabs(loss - want) <= 1e-6 * want &&
                   fabs(only - want) <= 1e-6 * want,
               "a chunked pass has the gradient of the whole",
               "%s, chunk %d of %d: error %.2e of %.0e in %s, loss %.6f and %.6f beside %.6f",
               model, chunks[k], L, c.worst, most, c.where, loss, only, want);
        mamba_trainer_free(x);
    }
    const double all = (double)mamba_trainer_bytes(m, 1, 1 << 16, 0);
    const double some = (double)mamba_trainer_bytes(m, 1, 1 << 16, 1024);
    const int chunk = mamba_trainer_chunk(m, 1, 1 << 16, some);
    report(some < all / 10 && chunk == 1024 && mamba_trainer_chunk(m, 1, 1 << 16, all) == 0,
           "chunks take less memory",
           "%s: 65,536 tokens take %.1f MB, in chunks of 1024 %.1f MB; for that much: chunk %d",
           model, all / 1e6, some / 1e6, chunk);
    mamba_trainer_free(whole);
    mamba_free(m);
    mamba_free(stored);
    free(ids);
}

// Passes that go on from the states of earlier ones: ids (B,2 L) in two windows of L.
typedef struct {
    int B, L;
    int32_t *ids, *targets;         // (2,B,L): window by window
    int32_t *whole, *whole_targets; // (B,2 L)
    int32_t *masked;                // (B,2 L): whole_targets of the second window alone
} Windows;

static Windows two_windows(int B, int L, int V) {
    const size_t n = 2 * (size_t)B * L;
    Windows w = {B, L, NULL, NULL, NULL, NULL, NULL};
    for (int32_t **p = &w.ids; p <= &w.masked; p++) *p = malloc(n * sizeof **p);
    for (size_t i = 0; i < n; i++) {
        const size_t b = i / (2 * L), t = i % (2 * L), at = (t / L * B + b) * L + t % L;
        w.whole[i] = w.ids[at] = (int32_t)(random_u64(&test_random) % (uint64_t)V);
        w.whole_targets[i] = w.targets[at] = (int32_t)(random_u64(&test_random) % (uint64_t)V);
        w.masked[i] = t < (size_t)L ? -1 : w.whole_targets[i];
    }
    return w;
}

// What the loss of the second window is made of, of whole sequences: the gradient without what goes
// back over the border. Of two chunks, that is the second one's backward pass alone.
static double cut_gradient(Trainer *x, const Windows *w, float weight) {
    set_start(x, -1);
    memset(x->d_h, 0, pass_floats(x, x->model->config.N) * sizeof(float));
    memset(x->d_window, 0, pass_floats(x, x->model->config.K - 1) * sizeof(float));
    chunk_pass(x, 0, w->whole, w->masked, weight, STATES);
    return chunk_pass(x, 1, w->whole, w->masked, weight, BACKWARD);
}

static void test_carry(const char *model) {
    enum { B = 2, L = 37 };
    char path[64];
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    const size_t bytes = m->tensors_bytes;
    const Windows w = two_windows(B, L, m->config.V);
    const float weight = 1.0f / (B * L);
    Trainer *plain = mamba_trainer_new(m, B, L, 0, 2), *cut = mamba_trainer_new(m, B, 2 * L, L, 2);
    const double first = mamba_train_pass(plain, w.ids, w.targets, weight, true);
    const double second = cut_gradient(cut, &w, weight);
    const double joined = mamba_train_pass(cut, w.whole, w.whole_targets, weight, false);
    const int chunks[] = {0, 1, 10};
    for (int k = 0; k < COUNT(chunks); k++) {
        Trainer *x = mamba_trainer_new(m, B, L, chunks[k], 2);
        // The second place reads the windows in the other order, between those of the first.
        expect(mamba_trainer_carry(x, 2) == 0, "room to carry");
        double one = mamba_train_pass_on(x, 0, w.ids, w.targets, weight, true);
        ChunkCheck begin = {.whole = plain->gradient->weights, .base = x->gradient->weights};
        each_tensor(x->gradient, compare_chunked, &begin);
        bool same = chunks[k] || !memcmp(x->gradient->weights, plain->gradient->weights, bytes);
        mamba_train_pass_on(x, 1, w.ids + B * L, w.targets + B * L, weight, false);
        memset(x->gradient->weights, 0, bytes);
        double two = mamba_train_pass_on(x, 0, w.ids + B * L, w.targets + B * L, weight, true);
        ChunkCheck on = {.whole = cut->gradient->weights, .base = x->gradient->weights};
        each_tensor(x->gradient, compare_chunked, &on);
        const double most = strcmp(model, "falcon") ? 3e-5 : 1e-4;
        report(same && begin.worst <= most && on.worst <= most && fabs(one - first) <= 1e-6 * first,
               "a carried pass, its gradient cut at the border",
               "%s, chunk %d: begins %.1e in %s, goes on %.1e in %s", model, chunks[k], begin.worst,
               begin.where, on.worst, on.where);
        report(fabs(two - second) <= 1e-6 * second && fabs(one + two - joined) <= 1e-6 * joined,
               "its loss is that of the joined text",
               "%s: %.6f and %.6f, want %.6f and %.6f in all", model, one, two, second, joined);
        // Back to the beginning; a pass at no place neither reads nor writes the states.
        expect(mamba_trainer_carry(x, 2) == 0 &&
                   mamba_train_pass_on(x, 0, w.ids, w.targets, weight, false) == one,
               "carried states begin again");
        const double other = mamba_train_pass(x, w.ids + B * L, w.targets + B * L, weight, false);
        const double again =
            mamba_train_pass_on(x, 0, w.ids + B * L, w.targets + B * L, weight, false);
        report(again == two && other != two, "other passes leave them alone", "%.6f, %.6f, %.6f",
               again, two, other);
        expect(isnan(mamba_train_pass_on(x, 2, w.ids, w.targets, weight, false)) &&
                   strstr(error_text, "place 2 of 2"),
               "a place that does not exist");
        mamba_trainer_free(x);
    }
    mamba_trainer_free(plain);
    mamba_trainer_free(cut);
    FREE(w.ids, w.targets, w.whole, w.whole_targets, w.masked);
    mamba_free(m);
    mamba_free(stored);
}

// Central differences. d: the gradient under test; x: the variables, which loss(context) reads. A
// sample of elements is compared. Errors are relative to the largest gradient in the sample.
static void check_differences(const char *name, const float *d, double *x, size_t n,
                              double (*loss)(void *), void *context) {
    size_t picked = n < 60 ? n : 60;
    float *got = alloc_aligned((picked + 1) * sizeof *got);
    double *want = calloc(picked + 1, sizeof *want);
    for (size_t k = 0; k < picked; k++) {
        size_t i = picked == n ? k : random_u64(&test_random) % n;
        double old = x[i], step = 1e-5 * fmax(1, fabs(old)), up, down;
        x[i] = old + step;
        up = loss(context);
        x[i] = old - step;
        down = loss(context);
        x[i] = old;
        got[k] = d[i];
        want[k] = (up - down) / (2 * step);
    }
    check(name, got, want, picked, 1e-4);
    free_aligned(got);
    free(want);
}

// Everything the scan reads, in double precision. w_y and w_h turn its outputs into one number.
typedef struct {
    int B, L, E, N;
    double *u, *delta, *A_log, *BC, *D, *h, *w_y, *w_h;
} ScanLoss;

static double scan_loss(void *context) {
    const ScanLoss *s = context;
    size_t N = (size_t)s->N, E = (size_t)s->E;
    double loss = 0, *h = malloc(N * E * sizeof *h);
    for (int b = 0; b < s->B; b++) {
        memcpy(h, s->h + b * N * E, N * E * sizeof *h);
        for (int t = 0; t < s->L; t++)
            for (size_t e = 0, row = (size_t)b * s->L + t; e < E; e++) {
                double dt = s->delta[row * E + e], u = s->u[row * E + e], y = s->D[e] * u;
                for (size_t n = 0; n < N; n++) {
                    h[n * E + e] = exp(-dt * exp(s->A_log[e * N + n])) * h[n * E + e] +
                                   dt * s->BC[row * 2 * N + n] * u;
                    y += s->BC[row * 2 * N + N + n] * h[n * E + e];
                }
                loss += s->w_y[row * E + e] * y;
            }
        for (size_t i = 0; i < N * E; i++) loss += s->w_h[b * N * E + i] * h[i];
    }
    free(h);
    return loss;
}

static void test_scan_backward(int B, int L, int E, int N) {
    size_t BLE = (size_t)B * L * E, NE = (size_t)N * E, BNE = B * NE, bc = (size_t)B * L * 2 * N;
    float *u = random_floats(BLE, -1, 1), *delta = random_floats(BLE, 0.01f, 0.6f),
          *A_log = random_floats(NE, -2, 1), *BC = random_floats(bc, -1, 1);
    float *D = random_floats((size_t)E, -1, 1), *h = random_floats(BNE, -1, 1),
          *w_y = random_floats(BLE, -1, 1), *d_h = random_floats(BNE, -1, 1);
    float *d_u = random_floats(BLE, 7, 8), *d_delta = random_floats(BLE, 7, 8),
          *d_BC = random_floats(bc, 7, 8), *d_A = random_floats(NE, 0, 0);
    float *d_D = random_floats((size_t)E, 0, 0), *A_neg = random_floats(NE, 0, 0),
          *scratch = random_floats(scan_backward_floats(B, L, E, N), 7, 8);
    for (int e = 0; e < E; e++)
        for (int n = 0; n < N; n++) A_neg[n * E + e] = -expf(A_log[e * N + n]);
    ScanLoss s = {B,
                  L,
                  E,
                  N,
                  doubles(u, BLE),
                  doubles(delta, BLE),
                  doubles(A_log, NE),
                  doubles(BC, bc),
                  doubles(D, (size_t)E),
                  doubles(h, BNE),
                  doubles(w_y, BLE),
                  doubles(d_h, BNE)};
    ScanGrad d = {d_u, d_delta, d_BC, d_BC + N, d_A, d_D, d_h, scratch};
    Scan scan = {u, delta, A_neg, BC, BC + N, D, 2 * (size_t)N, B, L, E, N};
    TEAM(scan_backward(&d, w_y, &scan, h))
    char name[8][80];
    const char *what[] = {"u", "delta", "A_log", "B and C", "D", "h"};
    for (int i = 0; i < 6; i++)
        snprintf(name[i], sizeof name[i], "scan_backward B %d L %d E %d N %d: d_%s", B, L, E, N,
                 what[i]);
    check_differences(name[0], d_u, s.u, BLE, scan_loss, &s);
    check_differences(name[1], d_delta, s.delta, BLE, scan_loss, &s);
    check_differences(name[2], d_A, s.A_log, NE, scan_loss, &s);
    check_differences(name[3], d_BC, s.BC, bc, scan_loss, &s);
    check_differences(name[4], d_D, s.D, (size_t)E, scan_loss, &s);
    check_differences(name[5], d_h, s.h, BNE, scan_loss, &s);
    FREE(s.u, s.delta, s.A_log, s.BC, s.D, s.h, s.w_y, s.w_h);
    FREE_ALIGNED(u, delta, A_log, BC, D, h, w_y, d_h);
    FREE_ALIGNED(d_u, d_delta, d_BC, d_A, d_D, A_neg, scratch);
}

typedef struct {
    int L, E, K;
    double *x, *window, *conv, *bias; // (L,E) (K-1,E) (E,K) (E)
    double *w_u, *w_window;           // (L,E) (K-1,E) weights of u and of the window at the end
} ConvLoss;

static double conv_loss(void *context) {
    const ConvLoss *s = context;
    double loss = 0;
    for (int t = 0; t < s->L; t++)
        for (int e = 0; e < s->E; e++) {
            double sum = s->bias[e];
            for (int k = 0; k < s->K; k++) {
                int from = t - s->K + 1 + k;
                sum +=
                    s->conv[e * s->K + k] *
                    (from >= 0 ? s->x[from * s->E + e] : s->window[(s->K - 1 + from) * s->E + e]);
            }
            loss += s->w_u[t * s->E + e] * silu_double(sum);
        }
    for (int j = 0; j < s->K - 1; j++)
        for (int e = 0; e < s->E; e++) {
            int t = s->L - s->K + 1 + j; // row j of the window at the end
            double now = t >= 0 ? s->x[t * s->E + e] : s->window[(s->K - 1 + t) * s->E + e];
            loss += s->w_window[j * s->E + e] * now;
        }
    return loss;
}

// The norms against central differences, in double precision, of the sum of d_xn xn.
typedef struct {
    int T, D, ld;
    bool weighted, biased;
    float *d_xn;
    double *x, *weight, *bias;
} NormPoint;

static double norm_objective(const NormPoint *p) {
    double sum = 0;
    for (int t = 0; t < p->T; t++) {
        const double *x = p->x + t * p->ld;
        double mean = 0, squares = 0;
        for (int d = 0; d < p->D && p->biased; d++) mean += x[d] / p->D;
        for (int d = 0; d < p->D; d++) squares += (x[d] - mean) * (x[d] - mean);
        for (int d = 0; d < p->D; d++) {
            double xn =
                (x[d] - mean) / sqrt(squares / p->D + 1e-3) * (p->weighted ? p->weight[d] : 1);
            sum += (double)p->d_xn[t * p->ld + d] * (xn + (p->biased ? p->bias[d] : 0));
        }
    }
    return sum;
}

static double norm_difference(const NormPoint *p, double *at) {
    const double step = 1e-5, before = *at;
    *at = before + step;
    double above = norm_objective(p);
    *at = before - step;
    double below = norm_objective(p);
    *at = before;
    return (above - below) / (2 * step);
}

static void test_norm_backward(int T, int D, bool weighted, bool biased) {
    const int ld = D + 2;
    const size_t n = (size_t)T * ld;
    float *x = random_floats(n, -1, 3), *w = random_floats((size_t)D, -2, 2),
          *bias = random_floats((size_t)D, -1, 1), *d_xn = random_floats(n, -1, 1),
          *d_x = random_floats(n, -1, 1), *d_w = random_floats((size_t)D, -1, 1),
          *d_bias = random_floats((size_t)D, -1, 1), *scale = random_floats(2 * (size_t)T, 0, 1);
    NormPoint p = {T,
                   D,
                   ld,
                   weighted,
                   biased,
                   d_xn,
                   doubles(x, n),
                   doubles(w, (size_t)D),
                   doubles(bias, (size_t)D)};
    double *want_x = doubles(d_x, n), *want_w = doubles(d_w, (size_t)D),
           *want_bias = doubles(d_bias, (size_t)D);
    for (int t = 0; t < T; t++) // all are added to what is there
        for (int d = 0; d < D; d++) want_x[t * ld + d] += norm_difference(&p, &p.x[t * ld + d]);
    for (int d = 0; d < D && weighted; d++) want_w[d] += norm_difference(&p, &p.weight[d]);
    for (int d = 0; d < D && biased; d++) want_bias[d] += norm_difference(&p, &p.bias[d]);
    NormGrad grad = {d_x, true, d_w, biased ? d_bias : NULL, scale};
    TEAM(norm_rows_backward(&grad, d_xn, x, weighted ? w : NULL, 1e-3f, T, D, (size_t)ld))
    check(biased ? "LayerNorm backward, d_x" : "RMSNorm backward, d_x", d_x, want_x, n, 2e-6);
    check("its d_weight", d_w, want_w, (size_t)D, 2e-6);
    check("its d_bias", d_bias, want_bias, (size_t)D, 2e-6);
    FREE_ALIGNED(x, w, bias, d_xn, d_x, d_w, d_bias, scale);
    FREE(p.x, p.weight, p.bias, want_x, want_w, want_bias);
}

static void test_conv_backward(int L, int E, int K) {
    size_t LE = (size_t)L * E, KE = (size_t)K * E;
    float *xz = random_floats(2 * LE, -1, 1), *x = random_floats(LE, 0, 0),
          *window = random_floats(KE, -1, 1), *conv = random_floats(KE, -1, 1);
    float *conv_t = random_floats(KE, 0, 0), *bias = random_floats((size_t)E, -1, 1),
          *w_u = random_floats(LE, -1, 1), *d_xz = random_floats(2 * LE, 7, 8);
    float *d_x = random_floats(LE, 0, 0), *d_conv = random_floats(KE, 0, 0),
          *d_bias = random_floats((size_t)E, 0, 0), *d_window = random_floats(KE, -1, 1),
          *d_c = random_floats(LE, 7, 8);
    for (int e = 0; e < E; e++)
        for (int k = 0; k < K; k++) conv_t[k * E + e] = conv[e * K + k];
    for (int t = 0; t < L; t++)
        memcpy(x + (size_t)t * E, xz + (size_t)t * 2 * E, (size_t)E * sizeof *x);
    ConvGrad d = {d_xz, d_conv, d_bias, d_window, d_c};
    Conv c = {xz, conv_t, bias, 1, L, E, K};
    double *w_window = doubles(d_window, KE);
    TEAM(conv1d_silu_backward(&d, w_u, window, &c))
    for (int t = 0; t < L; t++)
        memcpy(d_x + (size_t)t * E, d_xz + (size_t)t * 2 * E, (size_t)E * sizeof *x);
    ConvLoss s = {L,
                  E,
                  K,
                  doubles(x, LE),
                  doubles(window, KE),
                  doubles(conv, KE),
                  doubles(bias, (size_t)E),
                  doubles(w_u, LE),
                  w_window};
    check_differences("conv1d_silu_backward: d_x", d_x, s.x, LE, conv_loss, &s);
    check_differences("conv1d_silu_backward: d_conv", d_conv, s.conv, KE, conv_loss, &s);
    check_differences("conv1d_silu_backward: d_bias", d_bias, s.bias, (size_t)E, conv_loss, &s);
    if (K > 1)
        check_differences("conv1d_silu_backward: d_window", d_window, s.window, (size_t)(K - 1) * E,
                          conv_loss, &s);
    FREE(s.x, s.window, s.conv, s.bias, s.w_u, w_window);
    FREE_ALIGNED(xz, x, window, conv, conv_t, bias, w_u, d_xz);
    FREE_ALIGNED(d_x, d_conv, d_bias, d_window, d_c);
}

// Ten steps of AdamW with clipping, against those of PyTorch on the same batches.
static void check_final(void *context, const TensorInfo *info, Tensor *w) {
    GradientCheck *c = context;
    char name[96];
    const Golden *g = info->layer < 0 ? golden_get("final.%s", info->name)
                                      : golden_get("final.layer%d.%s", info->layer, info->name);
    snprintf(name, sizeof name, "%s after 10 steps: %s %d", c->model, info->name, info->layer);
    if (!g || g->n != tensor_elements(w)) expect(false, name);
    else check_floats(name, w->data, g->data, g->n, 2e-4);
}

static void test_adamw(const char *model) {
    char path[64], name[96];
    snprintf(path, sizeof path, "tests/%s-train.gold", model);
    if (!golden_open(path)) return;
    snprintf(path, sizeof path, "tests/%s.bin", model);
    Model *stored = mamba_load(path), *m = mamba_float_copy(stored);
    const Golden *ids = golden_get("ids"), *losses = golden_get("losses"),
                 *norms = golden_get("norms");
    int steps = (int)ids->dims[0], B = (int)ids->dims[1], L = (int)ids->dims[2] - 1;
    Trainer *x = mamba_trainer_new(m, B, L, 0, 2);
    int32_t *in = malloc(sizeof *in * (size_t)B * L), *targets = malloc(sizeof *in * (size_t)B * L);
    float *got = alloc_aligned(sizeof *got * (size_t)steps),
          *got_norms = alloc_aligned(sizeof *got * (size_t)steps);
    for (int step = 0; step < steps; step++) {
        for (int i = 0; i < B * L; i++) {
            size_t at = ((size_t)step * B + i / L) * (L + 1) + i % L;
            in[i] = (int32_t)ids->data[at];
            targets[i] = (int32_t)ids->data[at + 1];
        }
        double norm = 0;
        got[step] =
            (float)(mamba_train_pass(x, in, targets, 1.0f / (float)(B * L), true) / (B * L));
        expect(mamba_train_step(x, &(AdamW){3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1}, &norm) == 0,
               "a step");
        got_norms[step] = (float)norm;
    }
    snprintf(name, sizeof name, "%s: ten losses of AdamW", model);
    check_floats(name, got, losses->data, losses->n, 1e-4);
    snprintf(name, sizeof name, "%s: ten norms of the gradient", model);
    // The norms of falcon change by 4e-5 when its weights change by 1e-7.
    check_floats(name, got_norms, norms->data, norms->n, 3e-4);
    GradientCheck c = {model, 0};
    each_tensor(m, check_final, &c);
    mamba_trainer_free(x);
    FREE(in, targets);
    FREE_ALIGNED(got, got_norms);
    mamba_free(m);
    mamba_free(stored);
    golden_close();
}

// Initial weights have the distribution that the reference implementation gives them.
static void test_initialisation(void) {
    Config c;
    parse_shape("64,2,300", "f32", &c);
    Model *m = mamba_random_model(&c, 3), *again = mamba_random_model(&c, 3),
          *other = mamba_random_model(&c, 4);
    double lowest = 1, highest = 0, mean = 0, square = 0;
    bool A_good = true, D_good = true;
    for (int layer = 0; layer < 2; layer++)
        for (int e = 0; e < c.E; e++) {
            double dt = softplus_double((double)f32(&m->layer[layer].dt_bias)[e]);
            lowest = fmin(lowest, dt);
            highest = fmax(highest, dt);
            D_good &= f32(&m->layer[layer].D_skip)[e] == 1;
            for (int n = 0; n < c.N; n++)
                A_good &=
                    fabs(exp((double)f32(&m->layer[layer].A_log)[e * c.N + n]) - (n + 1)) < 1e-4;
        }
    for (size_t i = 0; i < 300 * 64; i++) {
        mean += f32(&m->embedding)[i];
        square += (double)f32(&m->embedding)[i] * f32(&m->embedding)[i];
    }
    report(lowest >= 0.00099 && highest <= 0.1001 && lowest < 0.0015 && highest > 0.07,
           "softplus(dt_bias) spans [0.001, 0.1]", "%.5f to %.5f", lowest, highest);
    expect(A_good && D_good, "A is -1 to -N and D is 1");
    report(fabs(sqrt(square / 19200) - 0.02) < 0.0006 && fabs(mean / 19200) < 0.0006,
           "embedding's deviation is 0.02", "%.5f", sqrt(square / 19200));
    expect(!memcmp(m->weights, again->weights, m->tensors_bytes) &&
               memcmp(m->weights, other->weights, m->tensors_bytes),
           "the seed fixes the weights");
    mamba_free(m);
    mamba_free(again);
    mamba_free(other);
}

// Masked rows add nothing to the loss or to a gradient.
static void test_masked_loss(void) {
    Config c;
    parse_shape("16,1,20", "f32", &c);
    Model *m = mamba_random_model(&c, 1);
    Trainer *x = mamba_trainer_new(m, 1, 6, 0, 1);
    const int32_t ids[6] = {1, 2, 3, 4, 5, 6}, masked[6] = {-1, -1, -1, -1, -1, -1},
                  one[6] = {-1, -1, 7, -1, -1, -1};
    double none = mamba_train_pass(x, ids, masked, 1, true), norm = 1, single;
    AdamWPass p = {.tr = x, .base = m->weights};
    each_tensor(m, norm_tensor, &p);
    norm = p.squares;
    single = mamba_train_pass(x, ids, one, 1, false);
    State *s = mamba_state_new(m);
    Acts *a = mamba_acts_new(m, 1);
    mamba_prefill(m, a, s, ids, 3, NULL, NULL);
    double want = log_sum_exp(s->logits, 20) - s->logits[7];
    report(none == 0 && norm == 0 && fabs(single - want) < 1e-5, "masked positions do not count",
           "%.6f, want %.6f", single, want);
    ((float *)(uintptr_t)m->layer[0].conv.data)[0] = NAN;
    refresh_derived(m);
    mamba_train_pass(x, ids, one, 1, true);
    float before = f32(&m->embedding)[0];
    expect(mamba_train_step(x, &(AdamW){1, 0.9f, 0.95f, 1e-8f, 0, 1}, &norm) == -1 &&
               strstr(error_text, "not finite") && f32(&m->embedding)[0] == before,
           "a NaN stops the run, names a tensor, and leaves the weights");
    mamba_state_free(s);
    mamba_acts_free(a);
    mamba_trainer_free(x);
    mamba_free(m);
}

// Sizes that no pass can have are refused, and a trainer without memory for a pass says so.
static void test_trainer_sizes(void) {
    Model *stored = mamba_load("tests/plain.bin"), *m = mamba_float_copy(stored);
    const int32_t ids[] = {1, 2, 3}, next[] = {2, 3, 4};
    expect(!mamba_trainer_new(m, 0, 3, 0, 1) && strstr(error_text, "0 sequences"),
           "a trainer of no sequences is refused");
    expect(!mamba_trainer_new(m, 1, 0, 0, 1) && strstr(error_text, "0 tokens"),
           "a trainer of no tokens is refused");
    expect(!mamba_trainer_new(m, 1, 3, -1, 1) && strstr(error_text, "chunks of -1"),
           "chunks below 0 are refused");
    Trainer *x = mamba_trainer_new(m, 1, 3, 0, 1);
    const double loss = mamba_train_pass(x, ids, next, 1, false);
    expect(mamba_trainer_resize(x, -1, 3) == -1 && mamba_trainer_resize(x, 1, 0) == -1 &&
               mamba_train_pass(x, ids, next, 1, false) == loss,
           "a resize to such sizes is refused and changes nothing");
    expect(mamba_trainer_resize(x, 1 << 20, 1 << 30) == -1 &&
               isnan(mamba_train_pass(x, ids, next, 1, false)) && strstr(error_text, "no memory"),
           "a pass without memory is a sentence");
    expect(mamba_trainer_resize(x, 1, 3) == 0 && mamba_train_pass(x, ids, next, 1, false) == loss,
           "and a size that fits mends it");
    mamba_trainer_free(x);
    mamba_free(m);
    mamba_free(stored);
}

static void test_gradients(void) {
    for (team = 1; team <= MOST_THREADS; team += 2) {
        test_scan_backward(1, 1, 1, 1);
        test_scan_backward(2, SCAN_STRETCH + 1, 5, 3);
        test_scan_backward(1, 3 * SCAN_STRETCH, SCAN_WIDTH + 3, 4);
        test_scan_backward(3, 2 * SCAN_STRETCH - 1, 2 * SCAN_WIDTH, 2);
        test_conv_backward(1, 3, 4);
        test_conv_backward(2, VL + 1, 4);
        test_conv_backward(17, 2 * VL, 1);
        test_conv_backward(9, 5, 3);
    }
    team = 1;
    test_adamw("plain");
    test_adamw("odd");
    test_adamw("falcon");
    test_adamw("layernorm");
    test_initialisation();
    test_masked_loss();
    test_trainer_sizes();
    test_model_gradients("plain");
    test_model_gradients("odd");
    test_model_gradients("falcon");
    test_model_gradients("layernorm");
    test_chunks("plain");
    test_chunks("odd");
    test_chunks("falcon");
    test_chunks("layernorm");
    test_carry("plain");
    test_carry("odd");
    test_carry("falcon");
    test_carry("layernorm");
    test_passes("plain");
    test_passes("odd");
    test_passes("falcon");
    test_passes("layernorm");
    for (team = 3; team > 0; team -= 2)
        for (int kind = 0; kind < 4; kind++) {
            test_norm_backward(3, 2 * VL + 5, kind & 1, kind & 2);
            test_norm_backward(1, VL, kind & 1, kind & 2);
        }
    team = 1;
}
