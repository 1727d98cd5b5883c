// generate.cuh - generation: from one sequence, or from several that begin and end at different
// times. Included by mamba_cuda.cu.

// What the steps of some places need. All pointers but the last ones: device memory.
struct Generation {
    DrawArgs draw;          // its arrays belong to this
    Sampling *how;          // (1)
    Sequence *sequences;    // (S)
    unsigned char *allowed; // (V)
    float *parts;           // (K_SPLIT_MAX,S,P): parts of x_proj's sums
    void *memory;           // all of these
    Solo *solo;             // one kernel for one sequence, or NULL
    Wide *wide;             // one kernel for several sequences, or NULL
    char *before;           // what a burst changes, as it was before; NULL: not kept
    cudaGraphExec_t graph;  // a step, or NULL
    Draw captured;          // of graph
    int S;
};

static float *x_proj_parts(const Gpu *g) { return g->at->generation->parts; }

static void generation_free(Generation *n) {
    if (!n) return;
    if (n->graph) cudaGraphExecDestroy(n->graph);
    cudaFree(n->memory), cudaFree(n->before);
    solo_free(n->solo);
    wide_free(n->wide);
    delete n;
}

// Reads the token of each sequence, whose embeddings are in res: states and logits move on.
template <class T> static void read_tokens(Gpu *g) {
    Generation *n = g->at->generation;
    Device *d = &g->device;
    if (n->solo) {
        solo_step(g, n->solo);
    } else if (!n->wide && thin_fits(g, n->S)) {
        if constexpr (sizeof(T) == 2) thin_step<T>(g, n->S);
    } else {
        if (n->wide) wide_step(g, n->wide);
        else network<T>(g, NULL, n->S, 1);
        head_product(g, g->at->logits, acts_of<T>(g).xn, n->S);
    }
    check_launch(d, "step");
}

template <class T> static void queue_step(Gpu *g) {
    draw_tokens(&g->device, g->at->generation->draw, embedding_of<T>(g));
    read_tokens<T>(g);
}

// What a burst changes, and how many bytes: copied before it where a kernel may get stuck.
template <class Each> static void each_changed(Gpu *g, Each each) {
    Places *p = g->at;
    const StateBytes n(&g->config);
    const size_t S = (size_t)p->S;
    each(p->logits, S * n.logits), each(p->generation->sequences, S * sizeof(Sequence));
    if (!p->generation->wide) return; // solo_kernel has a copy of window and h
    each(p->window, S * n.layers * n.window), each(p->h, S * n.layers * n.h);
}
static void keep_changed(Gpu *g, bool back) {
    char *at = g->at->generation->before;
    each_changed(g, [&](void *p, size_t bytes) {
        if (back) copy(&g->device, p, at, bytes, "state");
        else copy(&g->device, at, p, bytes, "state");
        at += (bytes + 255) / 256 * 256;
    });
}

// Memory and the form of the step for the places that run. 0, or -1 with a sentence.
static int generation_open(Gpu *g) {
    const Config *c = &g->config;
    Device *d = &g->device;
    const int S = g->at->S;
    const size_t s = (size_t)S, V = (size_t)c->V, P = (size_t)(c->R + 2 * c->N);
    // In 8 bits the portable step is 5 to 10% slower than the one-kernel steps of bf16, from a
    // copy: worth it only where memory is plenty, and where such steps run at all. One sequence has
    // a kernel that needs no copy.
    Solo plan;
    const bool copies = g->unpacking.bits == 8 && d->hopper && !g->portable_only &&
                        (S > 1 || !solo_packed_fits(g, &plan));
    if (S > THIN_MAX || copies) {
        const int spare = S > THIN_MAX ? 1 : 4;
        if (g->bf16_compute) unpack_for_batches<bf16>(g, spare);
        else unpack_for_batches<float>(g, spare);
    }
    Generation *n = new Generation();
    DrawArgs *a = &n->draw;
    n->S = S;
    a->slices = slices_of(S, c->V);
    const size_t slices = s * (size_t)a->slices;
    if ((c->V + a->slices - 1) / a->slices > SLICE_MOST) {
        delete n;
        return gpu_fail("a vocabulary of %d is too large for sampling on the GPU: %d at the most",
                        c->V, SLICES_MAX * SLICE_MOST);
    }
    for (int measure = 1; measure >= 0; measure--) {
        Arena m = {(char *)n->memory, 0};
        m.take(n->how, 1), m.take(n->sequences, s), m.take(n->allowed, V);
        m.take(n->parts, K_SPLIT_MAX * s * P), m.take(a->scratch, s * V), m.take(a->list, s * V);
        m.take(a->best, slices), m.take(a->kept, slices), m.take(a->counts, s * BINS);
        m.take(a->mass, s * BINS), m.take(a->cut, s), m.take(a->listed, s);
        m.take(a->current, s), m.take(a->tokens, GENERATE_MAX * s);
        if (!measure) break;
        if (!(n->memory = device_alloc(m.used))) {
            delete n;
            return -1;
        }
    }
    clear(d, n->sequences, s * sizeof(Sequence), "sequences");
    a->how = n->how, a->sequences = n->sequences, a->logits = g->at->logits;
    a->allowed = n->allowed, a->res = g->res, a->S = S, a->V = c->V, a->D = c->D;
    n->solo = S > 1 || g->portable_only ? NULL
              : g->unpacking.bits       ? solo_packed_new(g)
                                        : solo_new(g);
    n->wide = S > 1 && !g->portable_only ? wide_new(g, S) : NULL;
    g->at->generation = n;
    if (!n->solo && !n->wide) return 0;
    size_t bytes = 0;
    each_changed(g, [&](void *, size_t b) { bytes += (b + 255) / 256 * 256; });
    // Without the memory for it, a stuck kernel is an error.
    if (cudaMalloc(&n->before, bytes) != cudaSuccess) cudaGetLastError(), n->before = NULL;
    return 0;
}

// The graph of a step with this kind of draw. 0, or -1 with a sentence.
enum { CAPTURE_TRIES = 16 };
static int generation_capture(Gpu *g, Draw draw) {
    Device *d = &g->device;
    Generation *n = g->at->generation;
    if (n->graph && n->captured == draw) return 0;
    if (n->graph) cudaGraphExecDestroy(n->graph);
    n->graph = NULL, n->draw.draw = draw, n->captured = draw;
    if (finish(d)) return -1;
    cudaGraph_t graph = NULL;
    cudaError_t error = cudaSuccess;
    const std::lock_guard<std::mutex> alone(capture_mutex);
    // A capture can still end early by what another thread does, such as loading kernels. It is
    // queued again then.
    for (int tries = 0; tries < CAPTURE_TRIES; tries++) {
        graph = NULL, d->failed = NULL, d->error = cudaSuccess;
        error = cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal);
        if (error != cudaSuccess) break;
        if (g->bf16_compute) queue_step<bf16>(g);
        else if (g->f16_compute) queue_step<f16>(g);
        else queue_step<float>(g);
        error = cudaStreamEndCapture(d->stream, &graph);
        if (error != cudaErrorStreamCaptureInvalidated) break;
        cudaGetLastError();
    }
    if (error == cudaSuccess) error = cudaGraphInstantiate(&n->graph, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (error == cudaSuccess && !d->failed) return 0;
    const char *where = d->failed ? d->failed : "a step";
    if (error == cudaSuccess) error = d->error;
    cudaGetLastError();
    d->failed = NULL, d->error = cudaSuccess;
    return gpu_fail("GPU: capturing %s: %s", where, cudaGetErrorString(error));
}

// How the places that run sample: uploads it, and captures the step for it. 0, or -1 with a
// sentence.
static int generation_sampling(Gpu *g, const Sampling *how, const unsigned char *allowed) {
    Device *d = &g->device;
    if (!g->at->generation && generation_open(g)) return -1;
    Generation *n = g->at->generation;
    copy(d, n->allowed, allowed, (size_t)g->config.V, "allowed");
    copy(d, n->how, how, sizeof *how, "sampling");
    return generation_capture(g, draw_of(how, g->config.V));
}

static Sequence sequence_of(uint64_t random, uint64_t position, const int32_t *recent,
                            int n_recent) {
    Sequence q = {};
    q.position = position, q.random = random, q.n_recent = n_recent;
    memcpy(q.recent, recent, sizeof q.recent);
    return q;
}

// --- several texts

// S places for texts, with zero states; the first `keep` stay as they are. 0, or -1 with a
// sentence.
static int gpu_places(Gpu *g, int S, int keep) {
    Device *d = &g->device;
    device_use(d);
    if (S < 1 || S > g->piece)
        return gpu_fail("%d sequences are too many: %d at the most", S, g->piece);
    if (keep > std::min(S, g->many.S)) return gpu_fail("%d of %d places stay", keep, g->many.S);
    Places places = {}, before = g->many;
    if (keep == 0) places_free(&g->many), before = {};
    if (places_open(g, &places, S)) return -1;
    g->at = &g->many, g->many = places, g->gathered = false;
    if (generation_open(g)) {
        places_free(&g->many);
        g->many = before;
        return -1;
    }
    for (int s = 0; s < keep; s++) place_copy(g, &g->many, s, &before, s);
    if (keep && before.generation)
        copy(d, g->many.generation->sequences, before.generation->sequences,
             (size_t)keep * sizeof(Sequence), "sequences");
    int result = finish(d);
    places_free(&before);
    return result;
}

// A text begins at a place: with the numbers of a prompt that gpu_read_prompts() read, or, -1, of
// the one sequence, and this sampler. recent: the last n_recent tokens as a ring, by position
// modulo RECENT. 0, or -1 with a sentence.
static int gpu_place_begin(Gpu *g, int place, int prompt, uint64_t random, uint64_t position,
                           const int32_t *recent, int n_recent) {
    Device *d = &g->device;
    device_use(d);
    if (place < 0 || !place_of(g, place) || !g->many.generation) return -1;
    if (prompt >= g->texts.prompts.S)
        return gpu_fail("prompt %d of %d", prompt, g->texts.prompts.S);
    const Sequence q = sequence_of(random, position, recent, n_recent);
    place_copy(g, &g->many, place, prompt < 0 ? &g->one : &g->texts.prompts, std::max(prompt, 0));
    copy(d, g->many.generation->sequences + place, &q, sizeof q, "sequences");
    return finish(d);
}

// The sequence at place `from` moves to place `to`. 0, or -1 with a sentence.
static int gpu_place_move(Gpu *g, int to, int from) {
    Device *d = &g->device;
    device_use(d);
    if (to < 0 || from < 0 || !place_of(g, to) || !place_of(g, from)) return -1;
    Sequence *sequences = g->many.generation->sequences;
    place_copy(g, &g->many, to, &g->many, from);
    copy(d, sequences + to, sequences + from, sizeof *sequences, "sequences");
    return 0;
}

// All places sample so from now on, and gpu_generate() runs them. 0, or -1 with a sentence.
static int gpu_places_sampling(Gpu *g, const Sampling *how, const unsigned char *allowed) {
    device_use(&g->device);
    if (!g->many.S) return gpu_fail("there are no places");
    g->at = &g->many;
    if (generation_sampling(g, how, allowed)) return -1;
    return finish(&g->device);
}

// Moves the state and the logits of the one sequence to place s of S, and leaves a zero state for
// another prompt. The next gpu_generate_start() of S sequences continues from those gathered. 0, or
// -1 with a sentence.
static int gpu_gather(Gpu *g, int s, int S) {
    device_use(&g->device);
    if (s < 0 || s >= S) return gpu_fail("place %d of %d sequences", s, S);
    if ((!g->gathered || g->many.S != S) && gpu_places(g, S, 0)) return -1;
    g->gathered = true;
    place_copy(g, &g->many, s, &g->one, 0);
    clear_place(g, &g->one, 0);
    return finish(&g->device);
}

// Prepares the generation of S sequences. They continue from those gathered, or else all from the
// one sequence's state. random (S): the seed of each; recent: the last n_recent tokens as a ring,
// by position modulo RECENT; allowed (V). 0, or -1 with a sentence.
static int gpu_generate_start(Gpu *g, int S, const Sampling *how, const uint64_t *random,
                              uint64_t position, const int32_t *recent, int n_recent,
                              const unsigned char *allowed) {
    Device *d = &g->device;
    device_use(d);
    const bool gathered = g->gathered;
    if (gathered && g->many.S != S)
        return gpu_fail("%d sequences were gathered, not %d", g->many.S, S);
    g->gathered = false;
    g->at = S == 1 && !gathered ? &g->one : &g->many;
    if (S > 1 && !gathered) {
        if (g->many.S != S && gpu_places(g, S, 0)) return -1;
        for (int s = 0; s < S; s++) place_copy(g, &g->many, s, &g->one, 0);
    }
    if (generation_sampling(g, how, allowed)) return -1;
    std::vector<Sequence> sequences((size_t)S);
    for (int s = 0; s < S; s++)
        sequences[(size_t)s] = sequence_of(random[s], position, recent, n_recent);
    copy(d, g->at->generation->sequences, sequences.data(), (size_t)S * sizeof(Sequence),
         "sequences");
    return finish(d);
}

// How the steps of gpu_generate_start are computed, for tests. g NULL: the forms beside the
// portable ones that this build has code for on this GPU, one after the other.
static const char *gpu_step_form(const Gpu *g) {
    if (!g) {
        int version = 0;
        if (code_version(&version) != cudaSuccess || version < 90) return "";
        return code_has_wgmma() ? "one kernel for one sequence, one kernel for several sequences"
                                : "one kernel for one sequence";
    }
    const Generation *n = g->at->generation;
    return !n                   ? "none"
           : n->solo            ? "one kernel for one sequence"
           : n->wide            ? "one kernel for several sequences"
           : thin_fits(g, n->S) ? "four kernels a layer"
                                : "the library's products";
}

// --- bursts of steps

// The one-kernel steps of all handles of the process, one after the other: see exchange.cuh.
static std::mutex one_kernel_lock;

// Queues the steps, fetches the ids, waits. *in_vain: a kernel got stuck, and the ids are no use.
static int run_burst(Gpu *g, int32_t *ids, int steps, uint32_t *in_vain) {
    Generation *n = g->at->generation;
    Device *d = &g->device;
    d->running = n->solo   ? n->solo->args.tiles_head ? "solo_packed_kernel" : "solo_kernel"
                 : n->wide ? "wide_kernel"
                           : "a step";
    check_cuda(d,
               cudaMemset2DAsync(&n->sequences->step, sizeof(Sequence), 0,
                                 sizeof n->sequences->step, (size_t)n->S, d->stream),
               "sequences");
    if (n->solo) solo_prepare(g, n->solo);
    else g->work_of = NULL; // the captured steps overwrite it
    for (int i = 0; i < steps; i++) check_cuda(d, cudaGraphLaunch(n->graph, d->stream), "a step");
    if (n->solo) solo_state(g, n->solo, true);
    copy(d, ids, n->draw.tokens, (size_t)steps * n->S * sizeof *ids, "tokens");
    copy(d, in_vain, d->stuck + STUCK_STEP, sizeof *in_vain, "step");
    int result = finish(d);
    if (result) g->work_of = NULL; // its numbers may not be there
    d->running = NULL;
    return result;
}

// Draws and reads `steps` tokens (at most GENERATE_MAX) for each sequence: ids (steps,S), -1 where
// logits were not finite. Where the blocks of a one-kernel step waited for each other in vain, the
// tokens are drawn again by the portable step, and so are all later ones.
static int gpu_generate(Gpu *g, int32_t *ids, int steps) {
    Generation *n = g->at->generation;
    Device *d = &g->device;
    uint32_t in_vain = 0;
    device_use(d);
    if (!n || !n->graph) return gpu_fail("no generation was started");
    if (steps < 1 || steps > GENERATE_MAX)
        return gpu_fail("%d steps at once: 1 to %d", steps, GENERATE_MAX);
    if (!n->solo && !n->wide) return run_burst(g, ids, steps, &in_vain);
    {
        std::lock_guard<std::mutex> alone(one_kernel_lock);
        if (n->before) keep_changed(g, false);
        if (run_burst(g, ids, steps, &in_vain)) return -1;
        if (!in_vain) return 0;
        clear(d, d->stuck + STUCK_STEP, sizeof in_vain, "step");
        if (n->before) keep_changed(g, true);
        if (finish(d)) return -1;
    }
    const char *kernel = n->solo ? "solo_kernel" : "wide_kernel";
    if (!n->before)
        return gpu_fail("GPU: %s: its blocks waited for each other in vain; another program may "
                        "hold a part of the GPU",
                        kernel);
    g->portable_only = true;
    solo_free(n->solo), wide_free(n->wide);
    n->solo = NULL, n->wide = NULL;
    const Draw draw = n->captured;
    cudaGraphExecDestroy(n->graph);
    n->graph = NULL;
    if (generation_capture(g, draw)) return -1;
    return run_burst(g, ids, steps, &in_vain);
}

// The same at the places, also after prompts were read.
static int gpu_places_generate(Gpu *g, int32_t *ids, int steps) {
    g->at = &g->many;
    return gpu_generate(g, ids, steps);
}

// Queues the portable step of the tokens in g->ids at the S places.
static void step_places(Gpu *g, int S) {
    Device *d = &g->device;
    g->at = &g->many;
    Generation *n = g->at->generation;
    // Without a copy of the state a stuck kernel could not be replaced: the portable step it is.
    Solo *solo = n->solo;
    Wide *wide = n->wide;
    n->solo = NULL, n->wide = NULL;
    if (g->bf16_compute) {
        embed(d, g->res, g->ids, embedding_of<bf16>(g), S);
        read_tokens<bf16>(g);
    } else if (g->f16_compute) {
        embed(d, g->res, g->ids, embedding_of<f16>(g), S);
        read_tokens<f16>(g);
    } else {
        embed(d, g->res, g->ids, embedding_of<float>(g), S);
        read_tokens<float>(g);
    }
    n->solo = solo, n->wide = wide;
}

// Reads one token, ids (S), at each of the places; their logits follow. 0, or -1 with a sentence.
static int gpu_step(Gpu *g, const int32_t *ids, int S) {
    Device *d = &g->device;
    device_use(d);
    if (S != g->many.S) return gpu_fail("a step of %d sequences at %d places", S, g->many.S);
    if (check_tokens(ids, (size_t)S, g->config.V)) return -1;
    g->at = &g->many;
    if (!g->at->generation && generation_open(g)) return -1;
    copy(d, g->ids, ids, (size_t)S * sizeof *ids, "ids");
    step_places(g, S);
    return finish(d);
}

// --- for tests

// Holds multiprocessors until *leave is set, or 10 seconds. came: which blocks are there.
__global__ void busy_kernel(volatile int *leave, volatile int *came) {
    extern __shared__ int nothing[];
    uint64_t start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    if (threadIdx.x == 0) came[blockIdx.x] = 1;
    if (threadIdx.x == 0) do { // one thread: reads of the host's memory are slow
            __nanosleep(100000);
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        } while (!*leave && now - start < 10000000000ull);
    __syncthreads();
    if (threadIdx.x > 1024) nothing[0] = 0;
}

// A pretended property, from the next open on: "processors", "shared" (bytes of a block) and
// "memory" (free, MB), 0: the true ones; "portable": 1: no one-kernel steps. "patience":
// milliseconds that a wait lasts. "busy": another program that holds so many multiprocessors from
// now on; 0: no longer. 0, or -1 with a sentence.
static int gpu_pretend(const char *what, int value) {
    static cudaStream_t stream;
    static int *leave;
    cudaError_t error = cudaSuccess;
    if (!strcmp(what, "processors")) pretended_processors = value;
    else if (!strcmp(what, "shared")) pretended_shared = value;
    else if (!strcmp(what, "portable")) pretended_portable = value != 0;
    else if (!strcmp(what, "memory")) pretended_memory = (size_t)value << 20;
    else if (!strcmp(what, "patience")) {
        const uint32_t limit = value ? (uint32_t)value : 20000;
        error = cudaMemcpyToSymbol(wait_limit, &limit, sizeof limit);
    } else if (!strcmp(what, "busy")) {
        const int most = 1024;
        if (!leave) error = cudaMallocHost((void **)&leave, (1 + most) * sizeof *leave);
        if (error == cudaSuccess && !stream)
            error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        if (error == cudaSuccess) {
            *(volatile int *)leave = 1;
            error = cudaStreamSynchronize(stream);
        }
        int shared = 0;
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
        if (error == cudaSuccess && value) {
            const int blocks = std::min(value, most);
            memset(leave, 0, (1 + most) * sizeof *leave);
            error = allow_shared(busy_kernel, (size_t)shared);
            if (error == cudaSuccess) {
                busy_kernel<<<(unsigned)blocks, 1024, (size_t)shared, stream>>>(leave, leave + 1);
                error = cudaGetLastError();
            }
            // Until all are there, for 3 s at the most: else what they hinder could be first.
            volatile int *came = leave + 1;
            const time_t end = time(NULL) + 3;
            for (int i = 0; i < blocks && error == cudaSuccess;)
                if (came[i]) i++;
                else if (time(NULL) >= end) break;
        }
    } else return gpu_fail("nothing is called %s", what);
    return error == cudaSuccess ? 0 : gpu_fail("GPU: %s: %s", what, cudaGetErrorString(error));
}
