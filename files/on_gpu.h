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
    state_advance(s, ids, n);
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
        state_advance(s[b], ids + b, 1);
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
    return GPU->place_begin(a->gpu, place, -1, random, s->position, s->recent, s->n_recent)
               ? gpu_failed()
               : 0;
}

// The same from prompt number `prompt` of mamba_prompts_read(), of which s is the state of the
// text.
int mamba_place_begin_prompt(Acts *a, int place, int prompt, const State *s, uint64_t random) {
    return GPU->place_begin(a->gpu, place, prompt, random, s->position, s->recent, s->n_recent)
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
    long left; // tokens that the text may still get; -1: no limit
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
    if (b->left >= 0 && b->n > b->left) b->n = (int)b->left;
    if (b->left >= 0) b->left -= b->n;
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

// --- texts that are read side by side, each from its start

// How many texts of up to L tokens, at most S, can be read at once for this use; memory for them is
// taken. At least 1.
int mamba_texts_at_once(Acts *a, int S, size_t L, TextsUse use) {
    if (use == TEXTS_STEPPED && batch_leave(a)) return 1;
    return GPU->texts(a->gpu, S, L < INT_MAX ? (int)L : INT_MAX, use);
}

// How many of the next texts, which have n (count) tokens, are read at once, the shorter ones
// padded to *L. As many as fit; of more than 2,048 tokens at most half is padding. At least 1.
size_t mamba_texts_fit(Acts *a, const size_t *n, size_t count, size_t *L, TextsUse use) {
    const int most = count < 4096 ? (int)count : 4096;
    size_t texts = 1, tokens = n[0], room = (size_t)mamba_texts_at_once(a, most, n[0], use);
    *L = n[0];
    for (; texts < room; texts++) {
        const size_t longest = n[texts] > *L ? n[texts] : *L, rows = (texts + 1) * longest;
        if (longest > *L) room = (size_t)mamba_texts_at_once(a, most, longest, use);
        tokens += n[texts];
        if (texts >= room || n[texts] == 0 || (rows > 2048 && rows > 2 * tokens)) break;
        *L = longest;
    }
    return texts;
}

// Scores texts, at most as many as mamba_texts_at_once() says, each from its start. 0, or -1 after
// fail().
int mamba_score_texts(Acts *a, const ScoreRun *run) {
    if (a->gpu_state && state_fetch(a->gpu_state)) return -1; // its place is needed
    if (run->steps && batch_leave(a)) return -1;
    return GPU->score(a->gpu, run) ? gpu_failed() : 0;
}

// Reads B prompts, prompt b of ids[b] (n[b]), n[b] > 0, from their start, at most as many as
// mamba_texts_at_once() says. Their numbers stay on the GPU until others are read. s[b], a
// mamba_state_of_text(), gets the rest. 0, or -1 after fail().
int mamba_prompts_read(Acts *a, State *const *s, const int32_t *const *ids, const size_t *n,
                       int B) {
    size_t L = 0;
    for (int b = 0; b < B; b++)
        if (n[b] > L) L = n[b];
    int32_t *rows = memory_zeroed(size_mul((size_t)B, L), sizeof *rows);
    int32_t *lengths = memory_zeroed((size_t)B, sizeof *lengths);
    int result = rows && lengths ? 0 : fail("out of memory: %d prompts", B);
    for (int b = 0; b < B && result == 0; b++) {
        memcpy(rows + (size_t)b * L, ids[b], n[b] * sizeof *rows);
        lengths[b] = (int32_t)n[b];
    }
    if (result == 0 && GPU->read_prompts(a->gpu, rows, lengths, B, (int)L)) result = gpu_failed();
    for (int b = 0; b < B && result == 0; b++) {
        *s[b] = (State){0};
        state_advance(s[b], ids[b], n[b]);
    }
    memory_free(rows);
    memory_free(lengths);
    return result;
}

// A state without numbers: mamba_decode() keeps an unfinished character in it. NULL after fail().
State *mamba_state_of_text(void) { return alloc_aligned(sizeof(State)); }
