// files/trainer.h: a Trainer made, resized, freed; the memory of a training pass in one allocation.

// Lays out all arrays of tr for tr->B sequences of tr->L tokens.
static void trainer_layout(Trainer *tr, Arena *from) {
    const Config *c = &tr->model->config;
    const int steps = tr->chunk && tr->chunk < tr->L ? tr->chunk : tr->L;
    const size_t B = (size_t)tr->B, T = B * (size_t)steps, D = (size_t)c->D, E = (size_t)c->E;
    const size_t starts = ((size_t)tr->L + steps - 1) / steps;
    const size_t P = (size_t)(c->R + 2 * c->N), V = (size_t)c->V, layers = (size_t)c->n_layer;
    const size_t NE = (size_t)c->N * E, window = (size_t)(c->K - 1) * E;
    const bool normed = c->flags & FLAG_MIXER_NORM;
    size_t widest = 2 * E > D ? 2 * E : D, loss = V > D ? V : D, packed, packed_loss;
    if (widest < P) widest = P;
    // Rows are counted in int, and no size below wraps.
    const double rows = (double)B * steps, states = (double)layers * B * (double)(NE + window);
    if (rows > INT_MAX || fmax(rows * (double)widest, states) * 64 > (double)SIZE_MAX) {
        from->used = SIZE_MAX;
        return;
    }
    packed = matmul_floats(T, widest);
    packed_loss = matmul_floats(LOSS_ROWS, loss);

    tr->work = take(from, layers + 1, sizeof *tr->work);
    tr->seq = take(from, layers * B, sizeof *tr->seq);
    Work shared = {.for_each_layer = true};
    shared.xn = take_floats(from, T * D);
    shared.g = take_floats(from, T * E);
    shared.packed = take_floats(from, packed > packed_loss ? packed : packed_loss);
    float *res = take_floats(from, T * D);
    for (size_t layer = 0; layer <= layers; layer++) {
        Work w = shared;
        w.res = res;
        if (layer < layers) {
            w.next = res = take_floats(from, T * D);
            w.xz = take_floats(from, T * 2 * E);
            w.u = take_floats(from, T * E);
            w.xdb = take_floats(from, T * P);
            w.raw = normed ? take_floats(from, T * P) : w.xdb;
            w.delta = take_floats(from, T * E);
            w.y = take_floats(from, T * E);
        }
        if (tr->work) tr->work[layer] = w;
    }
    tr->ids = take(from, T, sizeof *tr->ids);
    tr->targets = take(from, T, sizeof *tr->targets);
    for (size_t layer = 0; layer < layers && tr->work; layer++) tr->work[layer].ids = tr->ids;
    tr->h0 = take_floats(from, size_mul(starts, layers * B * NE));
    tr->window0 = take_floats(from, size_mul(starts, layers * B * window));
    tr->h = take_floats(from, layers * B * NE);
    tr->window = take_floats(from, layers * B * window);
    tr->d_h = take_floats(from, layers * B * NE);
    tr->d_window = take_floats(from, layers * B * window);
    for (size_t i = 0; i < layers * B && tr->seq; i++)
        tr->seq[i] = (LayerState){tr->window + i * window, tr->h + i * NE};
    tr->d_res = take_floats(from, T * D);
    tr->d_xn = take_floats(from, T * D);
    tr->d_xz = take_floats(from, T * 2 * E);
    tr->d_u = take_floats(from, T * E);
    tr->d_delta = take_floats(from, T * E);
    tr->d_y = take_floats(from, T * E);
    tr->d_xdb = take_floats(from, T * P);
    tr->d_c = take_floats(from, (size_t)steps * E);
    tr->scale = take_floats(from, 2 * T);
    tr->losses = take_floats(from, T);
    tr->logits = take_floats(from, LOSS_ROWS * V);
    tr->scan = take_floats(from, scan_backward_floats(tr->B, steps, c->E, c->N));
}

// The memory that a trainer of m needs beside weights, gradient and moments (each of
// m->tensors_bytes), for passes of B sequences of L tokens in chunks of so many (0: whole).
size_t mamba_trainer_bytes(Model *m, int B, int L, int chunk) {
    Trainer measure = {.model = m, .B = B, .L = L, .chunk = chunk};
    Arena arena = {NULL, 0};
    trainer_layout(&measure, &arena);
    return arena.used;
}

// The largest chunk, a power of two, with which a trainer needs at most so many bytes beside
// weights, gradient and moments; 0 where all L tokens fit at once. Where none fits: the one that
// needs least, for short chunks need more room for the states at their starts.
int mamba_trainer_chunk(Model *m, int B, int L, double bytes) {
    int chunk = 1;
    if ((double)mamba_trainer_bytes(m, B, L, 0) <= bytes) return 0;
    while (chunk < L / 2) chunk *= 2;
    while (chunk > 1 && (double)mamba_trainer_bytes(m, B, L, chunk) > bytes &&
           mamba_trainer_bytes(m, B, L, chunk / 2) < mamba_trainer_bytes(m, B, L, chunk))
        chunk /= 2;
    return chunk;
}

// Floats of the states of all layers and sequences, of a state of n rows of E: N of h, K-1 of the
// window.
static size_t pass_floats(const Trainer *tr, int n) {
    return (size_t)tr->model->config.n_layer * tr->B * n * tr->model->config.E;
}
static size_t carried_floats(const Trainer *tr) {
    const Config *c = &tr->model->config;
    return size_mul((size_t)tr->places, pass_floats(tr, c->N + c->K - 1));
}
static LayerState carried_at(const Trainer *tr, int place) {
    const Config *c = &tr->model->config;
    return (LayerState){tr->carried.window + place * pass_floats(tr, c->K - 1),
                        tr->carried.h + place * pass_floats(tr, c->N)};
}

// Passes of mamba_train_pass_on have so many places to go on from, each of B sequences; all are at
// their beginning. 0, or -1 after fail().
int mamba_trainer_carry(Trainer *tr, int places) {
    if (places < 0) return fail("%d places to carry states", places);
    if (places != tr->places) {
        free_aligned(tr->carried.h);
        tr->places = places;
        tr->carried.h = places ? alloc_aligned(size_mul(carried_floats(tr), sizeof(float))) : NULL;
        if (places && !tr->carried.h) tr->places = 0;
        if (places && !tr->carried.h) return -1;
    }
    if (places) {
        tr->carried.window = tr->carried.h + places * pass_floats(tr, tr->model->config.N);
        memset(tr->carried.h, 0, carried_floats(tr) * sizeof(float));
    }
    return tr->gpu && GPU->trainer_carry(tr->gpu, places) ? gpu_failed() : 0;
}

// The first chunk starts from the states at this place; below 0: from zeros.
static void set_start(Trainer *tr, int place) {
    const size_t h = pass_floats(tr, tr->model->config.N),
                 window = pass_floats(tr, tr->model->config.K - 1);
    const LayerState none = {NULL, NULL}, from = place < 0 ? none : carried_at(tr, place);
    if (from.h) memcpy(tr->h0, from.h, h * sizeof(float));
    else memset(tr->h0, 0, h * sizeof(float));
    if (from.h) memcpy(tr->window0, from.window, window * sizeof(float));
    else memset(tr->window0, 0, window * sizeof(float));
    tr->end = from;
}

void mamba_trainer_free(Trainer *tr) {
    if (!tr) return;
    free_aligned(tr->carried.h);
    if (tr->gpu) GPU->trainer_close(tr->gpu);
    mamba_free(tr->gradient);
    free_aligned(tr->moment);
    free_aligned(tr->moment2);
    free_aligned(tr->arena);
    memory_free(tr);
}

// Passes from now on have B sequences of L tokens. With another B, nothing is carried from those
// before. 0, or -1 after fail().
int mamba_trainer_resize(Trainer *tr, int B, int L) {
    if (B < 1 || L < 1) return fail("a training pass of %d sequences of %d tokens", B, L);
    if (B != tr->B) tr->places = 0;
    tr->B = B;
    tr->L = L;
    if (tr->gpu) return GPU->trainer_resize(tr->gpu, B, L) ? gpu_failed() : 0;
    Arena arena = {NULL, 0};
    trainer_layout(tr, &arena);
    free_aligned(tr->arena);
    tr->arena = alloc_aligned(arena.used);
    if (!tr->arena) return -1;
    arena = (Arena){tr->arena, 0};
    trainer_layout(tr, &arena);
    return 0;
}

// The largest chunk, a power of two, with which a trainer on the GPU fits into its free memory; 0
// where whole sequences do.
int mamba_trainer_chunk_gpu(const Model *m, int B, int L, bool float32) {
    return GPU ? GPU->trainer_chunk(m, B, L, float32) : 0;
}

// As mamba_trainer_new, on the GPU, with bf16 products unless float32: m's weights and the moments
// here are then old until mamba_trainer_fetch. NULL after fail().
Trainer *mamba_trainer_new_gpu(Model *m, int B, int L, int chunk, bool float32) {
    if (!GPU) return fail("this build has no GPU backend: make cuda"), NULL;
    Trainer *tr = memory_zeroed(1, sizeof *tr);
    if (!tr) return fail("out of memory"), NULL;
    *tr = (Trainer){.model = m, .B = B, .L = L, .chunk = chunk, .threads = 1};
    tr->moment = alloc_aligned(m->tensors_bytes);
    tr->moment2 = alloc_aligned(m->tensors_bytes);
    if (tr->moment && tr->moment2) {
        tr->gpu = GPU->trainer_open(m, B, L, chunk, float32);
        if (tr->gpu) return tr;
        gpu_failed();
    }
    mamba_trainer_free(tr);
    return NULL;
}

// Weights, moments and carried states from the GPU to the host, or, store: the other way. Nothing
// to do without one. 0, or -1 after fail().
int mamba_trainer_fetch(Trainer *tr, bool store) {
    if (!tr->gpu || (!store && !tr->gpu_newer)) return 0;
    float *weights = tr->model->weights;
    int bad = store ? GPU->trainer_set(tr->gpu, weights, tr->moment, tr->moment2)
                    : GPU->trainer_get(tr->gpu, weights, tr->moment, tr->moment2, NULL);
    if (bad || (tr->places && GPU->trainer_states(tr->gpu, tr->carried.h, store)))
        return gpu_failed();
    tr->gpu_newer = false;
    if (!store) refresh_derived(tr->model);
    return 0;
}

// Trains m (float32, in memory) in place, B sequences of L tokens a pass. chunk: so many tokens of
// each sequence are in memory at a time, with the same gradient up to rounding; 0: all. NULL after
// fail().
Trainer *mamba_trainer_new(Model *m, int B, int L, int chunk, int threads) {
    if (chunk < 0) return fail("a training pass in chunks of %d tokens", chunk), NULL;
    Trainer *tr = memory_zeroed(1, sizeof *tr);
    if (!tr) return fail("out of memory"), NULL;
    threads = possible_threads(threads > 0 ? threads : mamba_default_threads());
    *tr = (Trainer){.model = m, .chunk = chunk, .threads = threads};
    tr->gradient = blank_model(&m->config);
    tr->moment = alloc_aligned(m->tensors_bytes);
    tr->moment2 = alloc_aligned(m->tensors_bytes);
    if (tr->gradient && tr->moment && tr->moment2 && mamba_trainer_resize(tr, B, L) == 0) return tr;
    mamba_trainer_free(tr);
    return NULL;
}

// The processes of which this one is a rank; a build without NCCL and --cpu train alone. Before
// anything else is asked of the GPU. 0, or -1 after fail().
int mamba_trainer_ranks(Ranks *r, bool alone) {
    *r = (Ranks){.size = 1, .local = -1};
    if (alone || !GPU || !GPU->ranks) return 0;
    if (mamba_ranks_open(r)) return -1;
    if (!r->by || GPU->ranks(r) == 0) return 0;
    mamba_ranks_close(r, false);
    return gpu_failed();
}
