/* gpu_stub.c - ./mamba with a GPU backend that computes on the processor, for tests of what the
   command line does with a GPU, on machines without one: tests/test_gpu_stub.sh. It is slow, and
   has no training. Few texts fit at once, so that they are read in groups.

   cc -O2 -I. tests/gpu_stub.c -o gpu_stub -lm */

#define MAMBA_CUDA
#include "mamba.c"

enum { STUB_PLACES = 300, STUB_TOKENS = 1000 }; // at the most; of texts that are read at once

struct Gpu {
    Model m;
    Acts *a;
    State *one, *many[STUB_PLACES], *prompt[STUB_PLACES];
    Sampling how;
    int S;
};
static struct {
    int groups, most; // groups of texts that were read at once, texts of the largest
} stub;

static Gpu *stub_open(const Model *m, int float32) {
    (void)float32;
    Gpu *g = memory_zeroed(1, sizeof *g);
    g->m = *m;
    g->a = mamba_acts_new(m, 1);
    g->one = mamba_state_new(m);
    return g;
}
static void stub_close(Gpu *g) {
    fprintf(stderr, "stub: %d groups, at most %d texts\n", stub.groups, stub.most);
    mamba_acts_free(g->a);
    mamba_state_free(g->one);
    for (int i = 0; i < STUB_PLACES; i++) {
        mamba_state_free(g->many[i]);
        mamba_state_free(g->prompt[i]);
    }
    memory_free(g);
}

static State *stub_state(Gpu *g, int place) { return place < 0 ? g->one : g->many[place]; }
// The sizes of window and h, in floats.
static size_t stub_window(const Gpu *g) {
    return (size_t)g->m.config.n_layer * (size_t)(g->m.config.K - 1) * (size_t)g->m.config.E;
}
static size_t stub_h(const Gpu *g) {
    return (size_t)g->m.config.n_layer * (size_t)g->m.config.N * (size_t)g->m.config.E;
}
static int stub_set_state(Gpu *g, int place, const float *window, const float *h,
                          const float *logits) {
    State *s = stub_state(g, place);
    memcpy(s->window, window, stub_window(g) * sizeof *window);
    memcpy(s->h, h, stub_h(g) * sizeof *h);
    memcpy(s->logits, logits, (size_t)g->m.config.V * sizeof *logits);
    return 0;
}
static int stub_get_state(Gpu *g, int place, float *window, float *h, float *logits) {
    const State *s = stub_state(g, place);
    if (window) memcpy(window, s->window, stub_window(g) * sizeof *window);
    if (h) memcpy(h, s->h, stub_h(g) * sizeof *h);
    if (logits) memcpy(logits, s->logits, (size_t)g->m.config.V * sizeof *logits);
    return 0;
}
static int stub_prefill(Gpu *g, const int32_t *ids, size_t n, LogitsVisitor *visit, void *context) {
    return mamba_prefill(&g->m, g->a, g->one, ids, n, visit, context);
}

// --- places

static int stub_places(Gpu *g, int S, int keep) {
    if (S > STUB_PLACES) return fail("the stub has %d places", STUB_PLACES);
    for (int s = keep; s < S; s++) {
        if (!g->many[s]) g->many[s] = mamba_state_new(&g->m);
        mamba_state_reset(&g->m, g->many[s]);
    }
    g->S = S;
    return 0;
}
static void stub_sampler(State *s, uint64_t random, uint64_t position, const int32_t *recent,
                         int n_recent) {
    s->random = random;
    s->position = position;
    s->n_recent = n_recent;
    memcpy(s->recent, recent, sizeof s->recent);
}
static int stub_place_begin(Gpu *g, int place, int prompt, uint64_t random, uint64_t position,
                            const int32_t *recent, int n_recent) {
    mamba_state_copy(&g->m, g->many[place], prompt < 0 ? g->one : g->prompt[prompt]);
    stub_sampler(g->many[place], random, position, recent, n_recent);
    return 0;
}
static int stub_place_move(Gpu *g, int to, int from) {
    mamba_state_copy(&g->m, g->many[to], g->many[from]);
    return 0;
}
static int stub_sampling(Gpu *g, const Sampling *how, const unsigned char *allowed) {
    (void)allowed;
    g->how = *how;
    return 0;
}
static int stub_draw(Gpu *g, State *s, int32_t *id) {
    *id = mamba_sample(&g->m, g->a, s, &g->how);
    return *id < 0 ? -1 : mamba_step(&g->m, g->a, s, *id);
}
static int stub_places_generate(Gpu *g, int32_t *ids, int steps) {
    for (int i = 0; i < steps * g->S; i++)
        if (stub_draw(g, g->many[i % g->S], ids + i)) return -1;
    return 0;
}
static int stub_generate_start(Gpu *g, int S, const Sampling *how, const uint64_t *random,
                               uint64_t position, const int32_t *recent, int n_recent,
                               const unsigned char *allowed) {
    assert(S == 1);
    stub_sampler(g->one, random[0], position, recent, n_recent);
    return stub_sampling(g, how, allowed);
}
static int stub_generate(Gpu *g, int32_t *ids, int steps) {
    for (int i = 0; i < steps; i++)
        if (stub_draw(g, g->one, ids + i)) return -1;
    return 0;
}

// --- several texts from their start

static int stub_texts(Gpu *g, int S, int L, TextsUse use) {
    (void)g;
    (void)use;
    const int most = STUB_TOKENS / (L > 0 ? L : 1);
    return most < 1 ? 1 : S < most ? S : most;
}
static void stub_count(int texts) {
    stub.groups++;
    if (texts > stub.most) stub.most = texts;
}

typedef struct {
    const ScoreRun *run;
    const Model *m;
    size_t at;
} StubScores;
static void stub_visit(void *context, const float *logits) {
    StubScores *s = context;
    const size_t at = s->at++;
    const int32_t target = s->run->targets[at];
    s->run->losses[at] = target < 0 ? NAN : (float)mamba_nll(s->m, logits, target);
    s->run->likeliest[at] = 0;
    for (int v = 1; v < s->m->config.V; v++)
        if (logits[v] > logits[s->run->likeliest[at]]) s->run->likeliest[at] = v;
}
static int stub_score(Gpu *g, const ScoreRun *run) {
    StubScores s = {run, &g->m, 0};
    const size_t L = (size_t)run->L;
    stub_count(run->B);
    for (size_t b = 0; b < (size_t)run->B; b++) {
        mamba_state_reset(&g->m, g->one);
        if (mamba_prefill(&g->m, g->a, g->one, run->ids + b * L, L, stub_visit, &s)) return -1;
    }
    return 0;
}
static int stub_read_prompts(Gpu *g, const int32_t *ids, const int32_t *lengths, int B, int L) {
    stub_count(B);
    for (int b = 0; b < B; b++) {
        if (!g->prompt[b]) g->prompt[b] = mamba_state_new(&g->m);
        mamba_state_reset(&g->m, g->prompt[b]);
        if (mamba_prefill(&g->m, g->a, g->prompt[b], ids + (size_t)b * (size_t)L,
                          (size_t)lengths[b], NULL, NULL))
            return -1;
    }
    return 0;
}

const GpuBackend mamba_gpu = {.error = mamba_error,
                              .open = stub_open,
                              .close = stub_close,
                              .set_state = stub_set_state,
                              .get_state = stub_get_state,
                              .prefill = stub_prefill,
                              .generate_start = stub_generate_start,
                              .generate = stub_generate,
                              .generate_max = 64,
                              .places = stub_places,
                              .place_begin = stub_place_begin,
                              .place_move = stub_place_move,
                              .places_sampling = stub_sampling,
                              .places_generate = stub_places_generate,
                              .texts = stub_texts,
                              .score = stub_score,
                              .read_prompts = stub_read_prompts};
