// Models and states in memory, small pieces, the caller's arena, and what mamba_watch() shows.

// Logits of every golden token by a model in memory, in pieces of so many tokens, with all that it
// needs in the arena, if there is one. 0, or -1 after fail().
static int run_in_memory(Collected *all, const unsigned char *file, size_t bytes, int piece,
                         const int32_t *ids, int L) {
    Model *m = mamba_load_memory(file, bytes);
    Acts *a = m ? mamba_acts_pieces(m, 1, piece) : NULL;
    State *s = a ? mamba_state_new(m) : NULL;
    int32_t *read = NULL;
    size_t n = 0;
    unsigned char text[64];
    // Reading a text and writing one are part of it.
    int result = s ? mamba_encode(m, "\001\002\003", 3, &read, &n) : -1;
    mamba_release(read);
    all->n = 0;
    if (result == 0) result = mamba_prefill(m, a, s, ids, (size_t)L, collect, all);
    if (result == 0) mamba_decode(m, s, ids[0], text);
    mamba_state_free(s);
    mamba_acts_free(a);
    mamba_free(m);
    return result;
}

// Every size of an arena up to the one that is enough gives a sentence, and leaves nothing behind.
static void test_arena_sizes(Collected *all, const unsigned char *file, size_t bytes,
                             const int32_t *ids, int L) {
    const size_t room = 400000;
    unsigned char *memory = malloc(room);
    size_t enough = 0, peak = 0;
    int refused = 0;
    bool clean = true, sentence = true;
    mamba_arena(memory, room);
    expect(run_in_memory(all, file, bytes, 1, ids, L) == 0, "a model in an arena");
    expect(mamba_arena_used(&enough) == 0, "the arena is empty after it");
    size_t copied = host_is_little_endian() ? 0 : bytes; // else the model is used where it lies
    report(enough - copied < 64 * 1024, "tests/plain.bin needs less than 64 kB", "%zu bytes",
           enough);
    for (size_t size = 0; size < enough + 64; size += size < enough - 64 ? 331 : 16) {
        mamba_arena(memory + 3, size); // from an odd place, too
        fail("no sentence");
        if (run_in_memory(all, file, bytes, 1, ids, L) == 0) continue;
        refused++;
        sentence = sentence && strstr(error_text, "memory");
        clean = clean && mamba_arena_used(&peak) == 0 && peak <= size;
    }
    mamba_arena(NULL, 0);
    report(refused > 100 && sentence, "a smaller arena is refused in a sentence", "%d sizes",
           refused);
    expect(clean, "what was refused leaves nothing in the arena");
    free(memory);
}

// Blocks of an arena: freed in any order, grown, the same bytes in them.
static void test_arena_blocks(void) {
    unsigned char memory[4096];
    unsigned char *block[8] = {NULL};
    size_t size[8] = {0}, used = 0;
    bool good = true;
    mamba_arena(memory, sizeof memory);
    for (int i = 0; i < 20000 && good; i++) {
        uint64_t r = random_u64(&test_random);
        int k = (int)(r % 8), fill = 16 * k + 5;
        size_t bytes = r >> 8 & 511, kept = size[k] < bytes ? size[k] : bytes;
        if (r >> 32 & 1) {
            memory_free(block[k]);
            block[k] = NULL;
            size[k] = 0;
        } else {
            unsigned char *grown = memory_grow(block[k], bytes);
            if (grown) {
                for (size_t j = 0; j < kept; j++) good = good && grown[j] == fill;
                memset(grown, fill, bytes);
                block[k] = grown;
                size[k] = bytes;
                good = good && (uintptr_t)grown % ARENA_ALIGN == 0 && in_arena(grown) &&
                       grown + bytes <= memory + sizeof memory;
            }
        }
        for (int j = 0; j < 8; j++)
            for (size_t b = 0; b < size[j]; b++) good = good && block[j][b] == 16 * j + 5;
    }
    for (int k = 0; k < 8; k++) memory_free(block[k]);
    used = mamba_arena_used(NULL);
    expect(good, "20,000 random calls keep the arena's blocks whole");
    expect(used == 0, "the arena is empty when all blocks are freed");
    volatile size_t huge = SIZE_MAX; // the compiler knows nothing of it
    expect(!memory_get(huge) && !memory_get(huge - 16) && !memory_zeroed(huge, 8) && memory_get(16),
           "an arena refuses sizes that overflow");
    mamba_arena(NULL, 0);
}

static void test_in_memory(const char *name, const char *path) {
    char gold[96], what[96];
    snprintf(gold, sizeof gold, "tests/%s.gold", name);
    if (!golden_open(gold)) return;
    size_t bytes, L_size;
    int L;
    unsigned char *file = (unsigned char *)read_text(path, &bytes);
    unsigned char *aligned = alloc_aligned(bytes + 4);
    memcpy(aligned, file, bytes);
    int32_t *ids = golden_ids(&L);
    const Golden *want = golden_get("logits");
    L_size = (size_t)L;
    Collected all = {alloc_aligned(want->n * sizeof(float)), 0, want->n / L_size};
    const int pieces[] = {0, 1, 2, 7, 31, 33};
    for (int i = 0; i < COUNT(pieces); i++) {
        snprintf(what, sizeof what, "%s in memory, pieces of %d", name, pieces[i]);
        if (run_in_memory(&all, aligned, bytes, pieces[i], ids, L)) expect(false, error_text);
        else check_floats(what, all.all, want->data, want->n, 1e-5);
    }
    expect(!memcmp(aligned, file, bytes), "the caller's memory is as it was");
    if (!strcmp(name, "plain")) test_arena_sizes(&all, aligned, bytes, ids, L);
    memmove(aligned + 2, aligned, bytes);
    expect(!mamba_load_memory(aligned + 2, bytes) && strstr(error_text, "multiple of 4"),
           "a model at an odd address is refused");
    memmove(aligned, aligned + 2, bytes);
    bool refused = true; // the file's checks are those of mamba_load(): test_loader.h
    for (size_t n = 0; n < bytes; n += 97) {
        Model *m = mamba_load_memory(aligned, n);
        refused = refused && !m && strstr(error_text, "the model in memory");
        mamba_free(m);
    }
    expect(refused, "a part of a model in memory is refused by name");
    free(file);
    free(ids);
    FREE_ALIGNED(all.all, aligned);
    golden_close();
}

// A state through memory is the same as through a file, and damage is found.
static void test_state_in_memory(void) {
    Session x = test_session("tests/odd.bin", 1);
    const int32_t ids[] = {1, 2, 3, 4, 5};
    const char *path = scratch("format.bin");
    const size_t bytes = mamba_state_bytes(x.model);
    size_t file_bytes = 0;
    unsigned char *to = malloc(bytes);
    State *back = mamba_state_new(x.model);
    mamba_prefill(x.model, x.acts, x.state, ids, 5, NULL, NULL);
    mamba_state_save(x.model, x.state, path);
    unsigned char *file = (unsigned char *)read_text(path, &file_bytes);
    expect(mamba_state_write(x.model, x.state, to) == 0 && file_bytes == bytes &&
               !memcmp(to, file, bytes),
           "a state in memory is what the file holds");
    expect(mamba_state_read(x.model, back, to, bytes) == 0 && back->position == 5 &&
               !memcmp(back->data, x.state->data, back->floats * sizeof(float)),
           "a state comes back from memory");
    to[bytes - 1] ^= 1;
    expect(mamba_state_read(x.model, back, to, bytes) && strstr(error_text, "the state in memory"),
           "a damaged state in memory is refused by name");
    remove(path);
    FREE(to, file);
    mamba_state_free(back);
    session_close(&x);
}

// --- mamba_watch()

typedef struct {
    const Model *m;
    double *h;    // (n_layer,N,E) what the state must be after the pass
    float *means; // (n_layer,T) of delta
    int T, at, layers;
} Watched;

// The recurrence in double precision, from what the watcher is shown.
static void watch_layer(void *context, int layer, const LayerState *seq, const Scan *s) {
    Watched *w = context;
    const size_t NE = (size_t)s->N * s->E;
    double *h = w->h + NE * (size_t)layer;
    w->layers++;
    for (size_t i = 0; i < NE; i++) h[i] = (double)seq->h[i];
    for (int t = 0; t < s->L; t++) {
        double sum = 0;
        for (int e = 0; e < s->E; e++) {
            size_t te = (size_t)t * s->E + e;
            double delta = (double)s->delta[te], u = (double)s->u[te];
            sum += delta;
            for (int n = 0; n < s->N; n++) {
                size_t ne = (size_t)n * s->E + e;
                double A = -exp((double)f32(&w->m->layer[layer].A_log)[e * s->N + n]);
                double B = (double)s->B_ssm[(size_t)t * s->ld_bc + n];
                h[ne] = exp(delta * A) * h[ne] + delta * B * u;
            }
        }
        w->means[layer * w->T + w->at + t] = (float)(sum / s->E);
    }
    if (layer == w->m->config.n_layer - 1) w->at += s->L;
}

static void test_watch(const char *path) {
    Session x = test_session(path, MOST_THREADS);
    const Model *m = x.model;
    const Config *c = &m->config;
    enum { T = 40 };
    const size_t NE = (size_t)c->N * c->E, layers = (size_t)c->n_layer;
    float means[T] = {0};
    int32_t ids[T];
    char name[96];
    Watched w = {.m = m, .T = T};
    w.h = malloc(layers * NE * sizeof *w.h);
    w.means = alloc_aligned(layers * T * sizeof *w.means);
    for (int t = 0; t < T; t++) ids[t] = (int32_t)(random_u64(&test_random) % (uint64_t)c->V);
    mamba_watch(x.acts, watch_layer, &w);
    for (int layer = 0; layer < c->n_layer; layer++) {
        memset(means, 0, sizeof means);
        mamba_state_reset(m, x.state);
        mamba_selection(x.acts, means, layer);
        w.at = w.layers = 0;
        mamba_prefill(m, x.acts, x.state, ids, T - 1, NULL, NULL);
        mamba_selection(x.acts, NULL, -1);
        mamba_step(m, x.acts, x.state, ids[T - 1]);
        snprintf(name, sizeof name, "%s layer %d: delta watched", path, layer);
        check_floats(name, w.means + layer * T, means, T - 1, 1e-6);
        snprintf(name, sizeof name, "%s layer %d: h after the step", path, layer);
        check(name, x.state->h + NE * (size_t)layer, w.h + NE * (size_t)layer, NE, 1e-5);
    }
    expect(w.layers == 2 * c->n_layer && w.at == T, "each layer is watched once a pass");
    mamba_watch(x.acts, NULL, NULL);
    w.layers = 0;
    mamba_step(m, x.acts, x.state, ids[0]);
    expect(w.layers == 0, "nobody watches any longer");
    free(w.h);
    free_aligned(w.means);
    session_close(&x);
}

static void test_memory(void) {
    test_arena_blocks();
    test_in_memory("plain", "tests/plain.bin");
    test_in_memory("odd", "tests/odd.bin");
    test_in_memory("falcon", "tests/falcon.bin");
    test_state_in_memory();
    test_watch("tests/plain.bin");
    test_watch("tests/falcon.bin");
}
