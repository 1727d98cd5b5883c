// files/on_gpu.h: states of which a GPU has newer numbers than this memory, and texts that are
// written there, one or several side by side. One state is read into by prefill (Acts.gpu_state),
// several by steps of a batch (Acts.gpu_batch).

// The states of the batch get their numbers back; the places are free. 0, or -1 after fail().
static int batch_leave(Acts *a) {
    int result = 0;
    for (int b = 0; b < a->gpu_batch_n; b++)
        if (a->gpu_batch[b] && state_fetch(a->gpu_batch[b])) result = -1;
    memory_free(a->gpu_batch);
    a->gpu_batch = NULL;
    a->gpu_batch_n = 0;
    return result;
}

// The numbers of s become those of the GPU's one sequence. 0, or -1 after fail().
static int state_to_gpu(Acts *a, State *s) {
    if (a->gpu_state == s) return 0;
    if ((a->gpu_state && state_fetch(a->gpu_state)) || state_fetch(s)) return -1;
    if (GPU->set_state(a->gpu, -1, s->window, s->h, s->logits)) return gpu_failed();
    a->gpu_state = s;
    s->newer_on = a;
    return 0;
}

// mamba_prefill where a has a GPU: the state goes there once, and stays while the same one is read
// into.
static int prefill_gpu(Acts *a, State *s, const int32_t *ids, size_t n, LogitsVisitor *visit,
                       void *context) {
    if (n == 0) return 0;
    if (state_to_gpu(a, s)) return -1;
    if (GPU->prefill(a->gpu, ids, n, visit, context) ||
        GPU->get_state(a->gpu, -1, NULL, NULL, s->logits))
        return gpu_failed();
    state_read(s, ids, n);
    return 0;
}

// The states s (B) take the places of a batch on the GPU. 0, or -1 after fail().
static int batch_enter(Acts *a, State *const *s, int B) {
    if (batch_leave(a)) return -1;
    for (int b = 0; b < B; b++)
        if (state_fetch(s[b])) return -1;
    a->gpu_batch = memory_zeroed((size_t)B, sizeof *a->gpu_batch);
    if (!a->gpu_batch) return fail("out of memory: %d sequences", B);
    if (GPU->places(a->gpu, B, 0)) return gpu_failed();
    for (int b = 0; b < B; b++) {
        if (GPU->set_state(a->gpu, b, s[b]->window, s[b]->h, s[b]->logits)) return gpu_failed();
        a->gpu_batch[b] = s[b];
        a->gpu_batch_n = b + 1;
        s[b]->newer_on = a;
    }
    return 0;
}

// mamba_step_batch where a has a GPU: the states go there once, and stay while the same ones are
// stepped. The logits come back each time.
static int step_batch_gpu(Acts *a, State *const *s, const int32_t *ids, int B) {
    bool there = a->gpu_batch_n == B;
    for (int b = 0; b < B && there; b++) there = a->gpu_batch[b] == s[b];
    if (!there && batch_enter(a, s, B)) return -1;
    if (GPU->step(a->gpu, ids, B)) return gpu_failed();
    for (int b = 0; b < B; b++) {
        state_read(s[b], ids + b, 1);
        if (GPU->get_state(a->gpu, b, NULL, NULL, s[b]->logits)) return gpu_failed();
    }
    return 0;
}

// --- texts that are written side by side on a GPU, each with its own generator

// Places for S texts; those in the first `keep` go on. 0, or -1 after fail(), which names the
// memory that is missing.
int mamba_places(Acts *a, int S, int keep) {
    if (batch_leave(a)) return -1;
    return GPU->places(a->gpu, S, keep) ? gpu_failed() : 0;
}

// At a place a text begins that goes on from s, whose numbers are copied; random starts its
// generator. 0, or -1 after fail().
int mamba_place_begin(Acts *a, int place, State *s, uint64_t random) {
    if (state_to_gpu(a, s)) return -1;
    return GPU->place_begin(a->gpu, place, random, s->position, s->recent, s->n_recent)
               ? gpu_failed()
               : 0;
}

// The text at place `from` goes on at place `to`. 0, or -1 after fail().
int mamba_place_move(Acts *a, int to, int from) {
    return GPU->place_move(a->gpu, to, from) ? gpu_failed() : 0;
}

// Which ids may be drawn (V), for the caller to free; NULL after fail().
static unsigned char *allowed_ids(const Model *m) {
    unsigned char *allowed = memory_get((size_t)m->config.V);
    if (!allowed) return fail("out of memory: %d tokens", m->config.V), NULL;
    for (int v = 0; v < m->config.V; v++)
        allowed[v] = !m->tokenizer || tokenizer_has(m->tokenizer, v);
    return allowed;
}

// On a GPU, tokens are drawn and read some at a time: a launch for each would take longer than a
// step. Where the text ends within them, the state has read too far.
typedef struct {
    int32_t ids[64];
    int at, n;
} Burst;

static int32_t burst_next(Burst *b, const Model *m, Acts *a, State *s, const Sampling *how) {
    if (b->at < b->n) return b->ids[b->at++];
    if (b->n == 0) {
        if (state_to_gpu(a, s)) return -1;
        unsigned char *allowed = allowed_ids(m);
        if (!allowed) return -1;
        int failed = GPU->generate_start(a->gpu, 1, how, &s->random, s->position, s->recent,
                                         s->n_recent, allowed);
        memory_free(allowed);
        if (failed) return gpu_failed();
    }
    b->n = b->n == 0 ? 4 : b->n < 64 ? 4 * b->n : 64; // few at first, so that text appears soon
    b->at = 0;
    if (GPU->generate(a->gpu, b->ids, b->n)) return gpu_failed();
    for (int i = 0; i < b->n; i++)
        if (b->ids[i] < 0) return fail("a logit is not finite: run `info --verify`");
    return b->ids[b->at++];
}

// All places sample so. After mamba_places(). 0, or -1 after fail().
int mamba_places_sampling(const Model *m, Acts *a, const Sampling *how) {
    unsigned char *allowed = allowed_ids(m);
    if (!allowed) return -1;
    int failed = GPU->places_sampling(a->gpu, how, allowed);
    memory_free(allowed);
    return failed ? gpu_failed() : 0;
}

// Writes `steps` tokens, at most mamba_places_steps(), at every place: ids (steps,S), -1 where a
// logit was not finite. 0, or -1 after fail().
int mamba_places_write(Acts *a, int32_t *ids, int steps) {
    return GPU->places_generate(a->gpu, ids, steps) ? gpu_failed() : 0;
}
int mamba_places_steps(void) { return GPU->generate_max; }

// A state without numbers: mamba_decode() keeps an unfinished character in it. NULL after fail().
State *mamba_state_of_text(void) { return alloc_aligned(sizeof(State)); }
