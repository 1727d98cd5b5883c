// files/acts.h: the memory of a pass, Acts, in one allocation.

// Default number of threads: the processors there are, but half of many, since those are often two
// to a core.
int mamba_default_threads(void) {
#ifdef _OPENMP
    int n = omp_get_num_procs();
    return n <= 8 ? n : n <= 16 ? 8 : n <= 64 ? n / 2 : 32;
#else
    return 1;
#endif
}

// An arena is laid out twice by the same code: base NULL only measures, then it hands out pointers.
typedef struct {
    char *base;
    size_t used; // bytes, saturating
} Arena;

static void *take(Arena *from, size_t count, size_t size) {
    void *p = from->base ? from->base + from->used : NULL;
    size_t bytes = size_mul(count, size);
    from->used = size_add(
        from->used, bytes > SIZE_MAX - ALIGN ? SIZE_MAX : (bytes + ALIGN - 1) / ALIGN * ALIGN);
    return p;
}
static float *take_floats(Arena *from, size_t n) { return take(from, n, sizeof(float)); }

static size_t activation_row_floats(const Config *c) { // floats a token in a Work, without scratch
    return 2 * (size_t)c->D + 5 * (size_t)c->E + (size_t)(c->R + 2 * c->N);
}

static void acts_layout(Acts *a, const Config *c, Arena *from) {
    const size_t D = (size_t)c->D, E = (size_t)c->E, P = (size_t)(c->R + 2 * c->N);
    const size_t V = (size_t)c->V, R = (size_t)c->R, T = (size_t)a->piece;
    Work *w = &a->work;
    w->res = take_floats(from, T * D);
    w->next = w->res;
    w->xn = take_floats(from, T * D);
    w->xz = take_floats(from, T * 2 * E);
    w->u = take_floats(from, T * E);
    w->xdb = take_floats(from, T * P);
    w->raw = w->xdb;
    w->delta = take_floats(from, T * E);
    w->y = take_floats(from, T * E);
    w->g = w->y;
    w->packed = take_floats(from, matmul_floats(T, E > D ? (E > R ? E : R) : D > R ? D : R));
    w->carry = NULL; // a short piece is never cut
    if (scan_pieces(a->piece, c->E) > 1)
        w->carry = take_floats(from, scan_carry_floats(c->E, c->N));
    a->logits = take_floats(from, size_mul(T < LOGIT_ROWS ? T : LOGIT_ROWS, V));
    a->probs = take_floats(from, V);
    const size_t batch = T < BATCH_MAX ? T : BATCH_MAX;
    a->order = take(from, size_mul(batch, V), sizeof *a->order);
    a->seq = take(from, (size_t)c->n_layer * batch, sizeof *a->seq);
}

// Scratch for one pass at a time over one model; threads 0 = default. piece: how many tokens of a
// prompt are read at a time, and the most sequences of a batch. 1 takes the least memory, 0 is the
// default, PIECE_MIN to PIECE_MAX by the model's width. NULL after fail().
Acts *mamba_acts_pieces(const Model *m, int threads, int piece) {
    size_t usual = ((size_t)1 << 25) / activation_row_floats(&m->config); // 128 MB
    if (usual > PIECE_MAX) usual = PIECE_MAX;
    if (usual < PIECE_MIN) usual = PIECE_MIN;
    Acts *a = memory_zeroed(1, sizeof *a);
    if (!a) return fail("out of memory"), NULL;
    a->threads = threads > 0 ? threads : mamba_default_threads();
    a->piece = piece > 0 ? piece : (int)usual;
    Arena arena = {NULL, 0};
    acts_layout(a, &m->config, &arena);
    a->arena = alloc_aligned(arena.used);
    if (!a->arena) {
        memory_free(a);
        return NULL;
    }
    a->threads = possible_threads(a->threads);
    arena = (Arena){a->arena, 0};
    acts_layout(a, &m->config, &arena);
    return a;
}

Acts *mamba_acts_new(const Model *m, int threads) { return mamba_acts_pieces(m, threads, 0); }

void mamba_acts_free(Acts *a) {
    if (!a) return;
    if (a->gpu_state) state_fetch(a->gpu_state);
    for (int b = 0; b < a->gpu_batch_n; b++)
        if (a->gpu_batch[b]) state_fetch(a->gpu_batch[b]);
    memory_free(a->gpu_batch);
    if (a->gpu) GPU->close(a->gpu);
    free_aligned(a->arena);
    memory_free(a);
}

// The next passes on the processor call watch once for each layer: mamba_prefill for each piece of
// the prompt, mamba_step for the token. NULL: no longer.
void mamba_watch(Acts *a, LayerWatcher *watch, void *context) {
    a->work.watch = watch;
    a->work.watch_context = context;
}

// Whether this build has a GPU backend.
bool mamba_has_gpu(void) { return GPU != NULL; }

// The name of the GPU, and the bytes of its memory that are in use. 0, or -1 after fail().
int mamba_gpu_memory(char name[256], double *used_bytes) {
    if (!GPU) return fail("this build has no GPU backend: make cuda");
    return GPU->measure(NULL, NULL, used_bytes, name) ? gpu_failed() : 0;
}
