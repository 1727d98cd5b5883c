// train.cuh - [train] a pass, its backward, AdamW. Included by mamba_cuda.cu.
//
// Weights, gradients and the two moments are four arenas of float, laid out as the file is.
// Matrices are read through a copy in T, made again after every step. What the backward of a block
// needs of its forward is kept; of h, the state before every SCAN_SAVE-th step.
//
// A long sequence is cut into chunks, all sequences of the pass at the same steps. mamba.c, section
// 5, says why the gradient stays exact. Everything kept is that of one chunk, but for the states at
// the starts of all chunks.

struct AdamStep;
// Several cards that train one model: cuda/ranks.cuh, in builds that have it.
struct Cards {
    virtual ~Cards() {}
    virtual size_t own_floats() const = 0;     // of this card's part of the arenas that are split
    virtual void *small_tensor(size_t i) = 0;  // place of tensor i, no matrix, bf16_compute
    virtual float *gradient(size_t at) = 0;    // where backward adds that of `at` in the arena
    virtual void begin() = 0;                  // a backward pass begins
    virtual void ready(int layer) = 0;         // gradients of this layer and after it are complete;
                                               // -1: all
    virtual int norm(float clip, float *) = 0; // as gradient_norm(), of the sum over all cards
    virtual int tensor_norm(size_t i, float *) = 0; // the same of tensor i, without clipping
    virtual int update(const AdamStep &how) = 0;
    virtual int set(const float *weights, const float *moment, const float *moment2) = 0;
    virtual int get(float *weights, float *moment, float *moment2) = 0;
};

struct GpuTrainer {
    Device device;
    Cards *cards; // NULL: this card alone. Else weights (where T is bf16), gradient and moments are
                  // a part
    Config config;
    bool bf16_compute;     // T is bf16, else float
    int B, L;              // sequences of a pass, tokens of each
    int chunk;             // of these, so many at a time; 0: all
    int steps;             // tokens of each sequence in the chunk in hand
    size_t floats;         // of an arena
    float *weights;        // (floats)
    float *gradient;       // (floats)
    float *moment;         // (floats)
    float *moment2;        // (floats)
    void *compute;         // (floats) T; the weights themselves where T is float
    unsigned char *decays; // (floats / 16): weight decay applies
    Weights w, d;          // pointers into compute or weights, into gradient
    std::vector<TensorPlace> places;
    std::vector<void *> memory;         // all but the arena
    char *arena;                        // what follows; L in a shape: the steps of a chunk
    std::vector<float *> res;           // n_layer + 1 of (B*L,D)
    std::vector<BlockActs<float>> acts; // n_layer; their pointers are T's
    ScanMail mail;
    // States of sequences in chunks, h (n_layer,B,N,E) and window (n_layer,B,K-1,E): at the start
    // of each chunk; as the chunk in hand moves them on; and their gradients after that chunk,
    // [turn], and at its start, [!turn]: the convolution cannot replace one by the other in place.
    float *h_start, *window_start, *h, *window, *d_h[2], *d_window[2];
    int turn;
    // States that passes leave to later ones: h (carries,n_layer,B,N,E), then window. place: where
    // this pass goes on from, -1: it begins.
    float *carried;
    int carries, place;
    float *d_res;                   // (B*L,D)
    void *d_o;                      // (B*L,D)  d_res in T
    void *d_xz, *d_u, *d_xdb;       // (B*L,2E), (B*L,E), (B*L,P) in T
    void *d_delta, *d_g, *d_xn;     // (B*L,E), (B*L,E), (B*L,D) in T
    void *xn;                       // (B*L,D) in T, the norm of the last layer's output
    float *logits;                  // (logit_rows,V)
    void *d_logits;                 // (loss_rows,V) in T
    int logit_rows, loss_rows;      // that exist at a time
    float *losses;                  // (B*L)
    double *sum;                    // of the losses
    float *partial;                 // sums of parts of the rows, for several uses
    float *norms;                   // (NORM_PARTS + 2), see squares_kernel
    int32_t *ids, *targets, *order; // (B*L)
    int32_t *start, *token, *first; // see embed_backward
    char *scan;                     // workspace of the backward scan
};

static Cards *(*cards_open)(GpuTrainer *, const Model *); // NULL with a sentence; NULL: one card
static int cards_number = 1;

enum { NORM_PARTS = 1024 };

// Squares of x in NORM_PARTS parts, then their sum: norm[0] = its root, norm[1] = the factor that
// clipping leaves.
__global__ void squares_kernel(float *parts, const float *x, size_t n) {
    __shared__ float scratch[33];
    float sum = 0;
    const size_t from = (size_t)blockIdx.x * blockDim.x + threadIdx.x,
                 step = (size_t)gridDim.x * blockDim.x, fours = (uintptr_t)x % 16 ? 0 : n / 4;
#pragma unroll 4
    for (size_t i = from; i < fours; i += step) {
        const Group<float, 4> four = ((const Group<float, 4> *)x)[i];
#pragma unroll
        for (int k = 0; k < 4; k++) sum += four.v[k] * four.v[k];
    }
    for (size_t i = 4 * fours + from; i < n; i += step) sum += x[i] * x[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
__global__ void norm_kernel(float *norm, const float *parts, int n, float clip) {
    __shared__ float scratch[33];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        norm[0] = sqrtf(sum);
        norm[1] = clip > 0 && norm[0] > clip ? clip / (norm[0] + 1e-6f) : 1;
    }
}

// AdamW on all weights at once. The gradient is cleared. Nothing happens if its norm is not finite.
struct AdamStep {
    const float *norm;                 // [0] the gradient's length, [1] what clipping leaves of it
    float rate, beta1, beta2, epsilon; // rate: over 1 - beta1^step
    float keep, root;                  // 1 - rate decay; 1 / sqrt(1 - beta2^step)
};
template <class T>
__global__ void adamw_kernel(float *weights, T *compute, float *__restrict__ gradient,
                             float *__restrict__ moment, float *__restrict__ moment2,
                             const unsigned char *__restrict__ decays, size_t n, AdamStep how) {
    const float *norm = how.norm;
    if (!(norm[0] - norm[0] == 0)) return;
    const float scale = norm[1];
    auto update = [&](float &g, float &m, float &v, float &w, bool decay) {
        g *= scale;
        m = how.beta1 * m + (1 - how.beta1) * g;
        v = how.beta2 * v + (1 - how.beta2) * g * g;
        w = w * (decay ? how.keep : 1.0f) - how.rate * m / (sqrtf(v) * how.root + how.epsilon);
        g = 0;
    };
    typedef Group<float, 4> Four;
    const size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x,
                 threads = (size_t)gridDim.x * blockDim.x;
    const bool copies = (void *)compute != (void *)weights;
    const uintptr_t bases = (uintptr_t)weights | (uintptr_t)gradient | (uintptr_t)moment |
                            (uintptr_t)moment2 | (uintptr_t)compute * (4 / sizeof(T)); // 4 of T

    const size_t fours = bases % 16 == 0 ? n / 4 * 4 : 0;
    for (size_t i = 4 * first; i < fours; i += 4 * threads) {
        Four g = *(Four *)(gradient + i), m = *(Four *)(moment + i), v = *(Four *)(moment2 + i),
             w = *(Four *)(weights + i);
        Group<T, 4> in_T;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            update(g.v[k], m.v[k], v.v[k], w.v[k], decays[i / 16]);
            put(&in_T.v[k], w.v[k]);
        }
        *(Four *)(gradient + i) = g, *(Four *)(moment + i) = m, *(Four *)(moment2 + i) = v;
        *(Four *)(weights + i) = w;
        if (copies) *(Group<T, 4> *)(compute + i) = in_T;
    }
    for (size_t i = fours + first; i < n; i += threads) {
        update(gradient[i], moment[i], moment2[i], weights[i], decays[i / 16]);
        if (copies) put(compute + i, weights[i]);
    }
}

// Steps of a chunk, the last may be shorter; chunks of a pass.
static int chunk_steps(const GpuTrainer *x) {
    return x->chunk && x->chunk < x->L ? x->chunk : x->L;
}
static int chunks_of(const GpuTrainer *x) { return (x->L - 1) / chunk_steps(x) + 1; }

// Whether passes have states at their ends, apart from those that begin and end with nothing.
static bool has_states(const GpuTrainer *x) { return chunks_of(x) > 1 || x->carries; }

// Floats of h and of window, of all sequences of the pass: of one layer, or of so many.
static size_t h_floats(const GpuTrainer *x, int layers) {
    return (size_t)layers * x->B * x->config.N * x->config.E;
}
static size_t window_floats(const GpuTrainer *x, int layers) {
    return (size_t)layers * x->B * (x->config.K - 1) * x->config.E;
}

// Rows of logits, in float32, that are computed at a time, and rows of their gradient: more of
// these, for the gradient of the head's weights is read and written each time.
enum { LOGIT_ROWS = 2048, LOSS_ROWS = 4096 };

template <class T> static size_t lay_out_trainer(GpuTrainer *x, char *base) {
    const Config *c = &x->config;
    const int L = chunk_steps(x);
    size_t M = (size_t)x->B * L, D = (size_t)c->D, E = (size_t)c->E, P = (size_t)(c->R + 2 * c->N),
           V = (size_t)c->V, N = (size_t)c->N, t = sizeof(T),
           saves = (size_t)x->B * ((L + SCAN_SAVE - 1) / SCAN_SAVE);
    Arena a = {base, 0};
    BlockActs<float> shared;
    x->res.resize((size_t)c->n_layer + 1), x->acts.resize((size_t)c->n_layer);
    a.take(x->xn, M * D, t);
    shared.mail = &x->mail, x->mail = {};
    a.take(x->mail.words, x->mail.bytes = scan_forward_workspace(x->B, c->E, c->N), 1);
    for (int layer = 0; layer <= c->n_layer; layer++) {
        a.take(x->res[(size_t)layer], M * D);
        if (layer == c->n_layer) break;
        BlockActs<float> *b = &x->acts[(size_t)layer];
        *b = shared;
        a.take(b->xn, M * D, t);
        a.take(b->xz, M * 2 * E, t), a.take(b->u, M * E, t), a.take(b->xdb, M * P, t);
        b->raw = NULL;
        if (c->flags & FLAG_MIXER_NORM) a.take(b->raw, M * P, t);
        a.take(b->delta, M * E, t), a.take(b->g, M * E, t), a.take(b->h_starts, saves * N * E);
    }
    if (has_states(x)) {
        const size_t h = h_floats(x, c->n_layer), window = window_floats(x, c->n_layer),
                     chunks = (size_t)chunks_of(x);
        a.take(x->h_start, chunks * h), a.take(x->window_start, chunks * window);
        a.take(x->h, h), a.take(x->window, window);
        for (int i = 0; i < 2; i++) a.take(x->d_h[i], h), a.take(x->d_window[i], window);
    }
    size_t conv_tiles = (size_t)x->B * ((L + CONV_BACK - 1) / CONV_BACK),
           partial = conv_tiles * (size_t)(c->K + 1) * E;
    partial += sum_rows_floats(conv_tiles, (size_t)(c->K + 1) * E);
    partial = std::max(partial, sum_rows_floats(M, std::max(2 * E, D)));
    const size_t norm_rows = (size_t)norm_blocks(&x->device) * NORM_WARPS;
    partial = std::max(partial, norm_rows * D + sum_rows_floats(norm_rows, D));
    partial = std::max(partial, conv_back_floats(&x->device, x->B, L, c->E, (int)P));
    size_t pieces = M / EMBED_PIECE + std::min(M, V) + 1;
    partial = std::max(partial, pieces * D);
    x->loss_rows = (int)std::max(
        (size_t)2, std::min(std::min((size_t)LOSS_ROWS, M), (size_t)((size_t)1 << 28) / V));
    x->logit_rows = std::min(x->loss_rows, (int)LOGIT_ROWS);
    a.take(x->d_res, M * D), a.take(x->losses, M), a.take(x->d_o, M * D, t),
        a.take(x->d_xn, M * D, t);
    a.take(x->partial, partial), a.take(x->norms, NORM_PARTS + 2), a.take(x->sum, 1);
    a.take(x->ids, M), a.take(x->targets, M), a.take(x->order, M), a.take(x->start, pieces + 1),
        a.take(x->token, pieces);
    a.take(x->first, pieces + 1);
    Arena loss = a; // logits are done with before the blocks' backward begins: one place for both
    loss.take(x->logits, (size_t)x->logit_rows * V);
    loss.take(x->d_logits, (size_t)x->loss_rows * V, t);
    a.take(x->d_xz, M * 2 * E, t), a.take(x->d_u, M * E, t), a.take(x->d_xdb, M * P, t);
    a.take(x->d_delta, M * E, t), a.take(x->d_g, M * E, t);
    a.take(x->scan, scan_backward_workspace(x->B, L, c->E, c->N), 1);
    return std::max(a.used, loss.used);
}

static size_t trainer_bytes(GpuTrainer *x) {
    return x->bf16_compute ? lay_out_trainer<bf16>(x, NULL) : lay_out_trainer<float>(x, NULL);
}

// Passes from now on have B sequences of L tokens; with another B, nothing is carried on. 0, or -1
// with a sentence.
static int gpu_trainer_resize(GpuTrainer *x, int B, int L) {
    device_use(&x->device);
    if (finish(&x->device)) return -1;
    if (B != x->B) cudaFree(x->carried), x->carried = NULL, x->carries = 0;
    cudaFree(x->arena);
    x->arena = NULL;
    x->B = B, x->L = L;
    if (!(x->arena = (char *)device_alloc(trainer_bytes(x)))) return -1;
    if (x->bf16_compute) lay_out_trainer<bf16>(x, x->arena);
    else lay_out_trainer<float>(x, x->arena);
    return 0;
}

static size_t carried_bytes(const GpuTrainer *x) {
    const int states = x->carries * x->config.n_layer;
    return (h_floats(x, states) + window_floats(x, states)) * sizeof(float);
}

// As mamba_trainer_carry: so many places, all at their beginning. 0, or -1 with a sentence.
static int gpu_trainer_carry(GpuTrainer *x, int places) {
    device_use(&x->device);
    if (places != x->carries) {
        if (finish(&x->device)) return -1;
        cudaFree(x->carried);
        x->carries = places;
        x->carried = (float *)device_alloc(carried_bytes(x));
        if (!x->carried) x->carries = 0;
        if (!x->carried || gpu_trainer_resize(x, x->B, x->L)) return -1;
    }
    clear(&x->device, x->carried, carried_bytes(x), "states");
    return finish(&x->device);
}

// The carried states, in the order of `carried`, to the host, or, store: from there. 0, or -1 with
// a sentence.
static int gpu_trainer_states(GpuTrainer *x, float *states, int store) {
    device_use(&x->device);
    copy(&x->device, store ? x->carried : states, store ? states : x->carried, carried_bytes(x),
         "states");
    return finish(&x->device);
}

static void gpu_trainer_close(GpuTrainer *x) {
    if (!x) return;
    device_use(&x->device);
    delete x->cards; // first: nothing here may wait for other cards
    if (x->device.stream) cudaStreamSynchronize(x->device.stream);
    for (void *p : x->memory) cudaFree(p);
    cudaFree(x->carried);
    cudaFree(x->arena);
    device_close(&x->device);
    delete x;
}

static void derive_all(GpuTrainer *x) {
    for (const LayerWeights &w : x->w.layer) derive(&x->device, &x->config, &w);
}

// Weights and both moments (NULL: zeros) from host arenas of the model's layout. 0, or -1 with a
// sentence.
static int gpu_trainer_set(GpuTrainer *x, const float *weights, const float *moment,
                           const float *moment2) {
    size_t bytes = x->floats * sizeof(float);
    Device *d = &x->device;
    device_use(d);
    if (x->cards) return x->cards->set(weights, moment, moment2);
    copy(d, x->weights, weights, bytes, "weights");
    if (moment) copy(d, x->moment, moment, bytes, "moments");
    else clear(d, x->moment, bytes, "moments");
    if (moment2) copy(d, x->moment2, moment2, bytes, "moments");
    else clear(d, x->moment2, bytes, "moments");
    clear(d, x->gradient, bytes, "gradient");
    if (x->bf16_compute) convert(&x->device, (bf16 *)x->compute, x->weights, x->floats);
    derive_all(x);
    return finish(&x->device);
}

// The same back to the host, and the gradient. NULL: not wanted.
static int gpu_trainer_get(GpuTrainer *x, float *weights, float *moment, float *moment2,
                           float *gradient) {
    size_t bytes = x->floats * sizeof(float);
    Device *d = &x->device;
    device_use(d);
    if (x->cards) return x->cards->get(weights, moment, moment2);
    if (weights) copy(d, weights, x->weights, bytes, "weights");
    if (moment) copy(d, moment, x->moment, bytes, "moments");
    if (moment2) copy(d, moment2, x->moment2, bytes, "moments");
    if (gradient) copy(d, gradient, x->gradient, bytes, "gradient");
    return finish(&x->device);
}

// The largest chunk, a power of two, with which a trainer fits into the free memory of the GPU; 0
// where whole sequences do. Where none fits: the one that needs least.
static int gpu_trainer_chunk(const Model *m, int B, int L, int float32) {
    GpuTrainer x = {};
    const Config *c = &m->config;
    size_t total = 0, free_bytes = free_memory(&total);
    x.config = *c, x.bf16_compute = !float32, x.B = B, x.L = L;
    // Weights, gradient and moments; the copy in bf16; what is derived; and what cuBLAS and the
    // kernels take for themselves. Of several cards the buffers of gradients.
    const size_t all = m->tensors_bytes, part = all / (size_t)cards_number,
                 embedding = (size_t)c->V * c->D * sizeof(float),
                 heads = c->flags & FLAG_TIED ? 0 : embedding,
                 buffers = embedding + 2 * std::max((all - embedding) / c->n_layer, heads),
                 fixed = (float32 ? all + 3 * part : all / 2 + 4 * part) +
                         (cards_open ? buffers : 0) + all / 64 +
                         (size_t)c->n_layer * c->E * (size_t)(c->N + c->K) * sizeof(float) +
                         CUBLAS_WORKSPACE + total / 32;
    auto bytes = [&](int chunk) {
        x.chunk = chunk;
        return trainer_bytes(&x);
    };
    const size_t room = free_bytes > fixed ? free_bytes - fixed : 0;
    if (bytes(0) <= room) return 0;
    int chunk = 1;
    while (chunk < L / 2) chunk *= 2;
    while (chunk > 1 && bytes(chunk) > room && bytes(chunk / 2) < bytes(chunk)) chunk /= 2;
    return chunk;
}

// A trainer of m's shape (its weights must be float32 and of one arena), B sequences of L tokens a
// pass, of each so many at a time (0: all); float32: products in float32 instead of bf16. NULL with
// a sentence.
static GpuTrainer *gpu_trainer_open(const Model *m, int B, int L, int chunk, int float32) {
    GpuTrainer *x = new GpuTrainer();
    const Config *c = &m->config;
    x->config = *c, x->bf16_compute = !float32, x->chunk = chunk;
    x->floats = m->tensors_bytes / sizeof(float);
    size_t bytes = m->tensors_bytes, flags = x->floats / 16 + 1;
    bool good = c->K <= 16 && device_open(&x->device) == 0;
    if (c->K > 16)
        gpu_fail("training on the GPU needs d_conv of 16 or less, not %d: --cpu trains any", c->K);
    if (good && cards_open) good = (x->cards = cards_open(x, m)) != NULL;
    const size_t own = x->cards ? x->cards->own_floats() * sizeof(float) : bytes;
    auto take = [&](size_t n) -> void * {
        void *p = good ? device_alloc(n) : NULL;
        if (p) x->memory.push_back(p);
        else good = false;
        return p;
    };
    x->weights = (float *)take(x->bf16_compute ? own : bytes), x->gradient = (float *)take(own),
    x->moment = (float *)take(own);
    x->moment2 = (float *)take(own), x->decays = (unsigned char *)take(flags);
    x->compute = x->bf16_compute ? take(bytes / 2) : x->weights;
    float *derived =
        (float *)take((size_t)c->n_layer * c->E * (size_t)(c->N + c->K) * sizeof(float));
    if (!good) return gpu_trainer_close(x), (GpuTrainer *)NULL;
    const float *host = (const float *)m->embedding.data;
    std::vector<unsigned char> decays(flags, 0);
    std::vector<TensorPlace> gradients = tensor_places(m, &x->d);
    x->places = tensor_places(m, &x->w);
    for (size_t i = 0; i < x->places.size(); i++) {
        const TensorPlace &p = x->places[i];
        size_t at = (size_t)((const float *)p.host->data - host),
               n = (size_t)p.host->rows * (size_t)p.host->cols;
        *gradients[i].device = x->cards ? x->cards->gradient(at) : x->gradient + at;
        *p.device = p.matrix && x->bf16_compute   ? (void *)((bf16 *)x->compute + at)
                    : x->cards && x->bf16_compute ? x->cards->small_tensor(i)
                                                  : (void *)(x->weights + at);
        for (size_t k = at / 16; k < (at + n + 15) / 16; k++) decays[k] = p.decays;
    }
    if (c->flags & FLAG_TIED) x->w.head = x->w.embedding, x->d.head = x->d.embedding;
    for (LayerWeights &w : x->w.layer) {
        w.A_neg = derived, w.conv_t = derived + (size_t)c->E * c->N;
        derived += (size_t)c->E * (size_t)(c->N + c->K);
    }
    copy(&x->device, x->decays, decays.data(), flags, "weights");
    if (gpu_trainer_resize(x, B, L) == 0 &&
        gpu_trainer_set(x, (const float *)m->weights, NULL, NULL) == 0)
        return x;
    gpu_trainer_close(x);
    return NULL;
}

template <class T> static BlockActs<T> trainer_acts(const GpuTrainer *x, int layer) {
    const BlockActs<float> &a = x->acts[(size_t)layer];
    return {(T *)a.xn,    (T *)a.xz, (T *)a.u,   (T *)a.xdb, (T *)a.raw,
            (T *)a.delta, (T *)a.g,  a.h_starts, a.mail,     {}};
}

template <class T, class In, class Out> struct NormBack {
    Rows<Out> d_x;   // added to where ADD, whose rows have no gaps
    T *copy;         // (rows,cols) d_x in T, or NULL
    float *d_weight; // (cols), added to, or NULL
    float *d_bias;   // the same; NULL: RMSNorm
    Rows<T> d_out;   // of d_x's stride where not ADD
    Rows<const In> in;
    const float *weight; // (cols) or NULL
    float eps;
    int rows, cols;
    float *partial; // scratch
};
template <bool ADD, class T, class In, class Out>
static void norm_rows_backward(Device *d, const NormBack<T, In, Out> &p) {
    unsigned blocks = std::min(norm_blocks(d), blocks_for((size_t)p.rows, NORM_WARPS));
    const bool in_memory = p.d_bias || p.cols > 1024; // a warp's share of d_weight
    auto kernel = p.d_bias         ? norm_backward_kernel<T, In, Out, ADD, 0, true>
                  : p.cols <= 256  ? norm_backward_kernel<T, In, Out, ADD, 8>
                  : p.cols <= 768  ? norm_backward_kernel<T, In, Out, ADD, 24>
                  : p.cols <= 1024 ? norm_backward_kernel<T, In, Out, ADD, 32>
                                   : norm_backward_kernel<T, In, Out, ADD, 0>;
    launch_dependent(d, kernel, blocks, 32 * NORM_WARPS, 0, p.d_x.p, p.copy,
                     p.d_weight ? p.partial : NULL, p.d_out.p, p.d_out.ld, p.in.p, p.in.ld,
                     p.weight, p.eps, p.rows, p.cols);
    check_launch(d, "norm_rows_backward");
    if (p.d_weight)
        sum_parts(d, p.d_weight, NULL, p.partial, (int)blocks * (in_memory ? NORM_WARPS : 1),
                  p.cols, p.cols, 1);
    sum_rows(d, p.d_bias, p.d_out.p, p.d_out.ld, p.rows, p.cols, p.partial);
}

template <class T>
static void conv1d_silu_backward(GpuTrainer *x, T *d_xz, float *d_conv, float *d_bias, const T *d_u,
                                 const T *xz, const LayerWeights *w, const ConvEnds &ends) {
    Device *d = &x->device;
    int E = x->config.E, K = x->config.K, tiles = x->B * ((x->steps + CONV_BACK - 1) / CONV_BACK);
    int V = E % 2 == 0 && K <= 4 ? 2 : 1;
    dim3 grid((unsigned)tiles * blocks_for((size_t)E / V, 128));
    auto kernel = K > 4    ? conv1d_silu_backward_kernel<T, 16, 1, false>
                  : V == 2 ? conv1d_silu_backward_kernel<T, 4, 2, false>
                           : conv1d_silu_backward_kernel<T, 4, 1, false>;
    if (ends.d_before)
        kernel = K > 4    ? conv1d_silu_backward_kernel<T, 16, 1, true>
                 : V == 2 ? conv1d_silu_backward_kernel<T, 4, 2, true>
                          : conv1d_silu_backward_kernel<T, 4, 1, true>;
    kernel<<<grid, 128, 0, d->stream>>>(d_xz, x->partial, d_u, xz, w->conv_t,
                                        (const float *)w->conv_bias, ends, x->steps, E, K);
    check_launch(d, "conv1d_silu_backward");
    sum_parts(d, d_conv, d_bias, x->partial, tiles, (K + 1) * E, E, K);
}

// Turns d_res, the gradient after the layer, and d_o, the same in T, into those before it, and adds
// to the gradients of the weights. The order is that of block(), backwards. Of sequences in chunks,
// the layer's d_h and d_window after the chunk become those at its start.
template <class T> static void block_backward(GpuTrainer *x, int layer, int chunk) {
    Device *d = &x->device;
    const Config *c = &x->config;
    const LayerWeights *w = &x->w.layer[(size_t)layer], *dw = &x->d.layer[(size_t)layer];
    BlockActs<T> a = trainer_acts<T>(x, layer);
    const float *res = x->res[(size_t)layer];
    int D = c->D, E = c->E, N = c->N, R = c->R, P = R + 2 * N, rows = x->B * x->steps;
    size_t lE = (size_t)E, lP = (size_t)P, lD = (size_t)D, at_h = h_floats(x, layer),
           at_window = window_floats(x, layer);
    const bool states = has_states(x);
    T *d_o = (T *)x->d_o, *d_xz = (T *)x->d_xz, *d_u = (T *)x->d_u, *d_xdb = (T *)x->d_xdb,
      *d_delta = (T *)x->d_delta, *d_g = (T *)x->d_g, *d_xn = (T *)x->d_xn;
    sum_rows(d, (float *)dw->out_bias, x->d_res, lD, rows, D, x->partial);
    matmul_d_x(d, Rows(d_g, lE), Rows(d_o, lD), (const T *)w->out_proj, rows, D, E);
    matmul_d_W(d, (float *)dw->out_proj, Rows(d_o, lD), Rows(a.g, lE), rows, D, E);
    ScanArgs<T> scan = scan_args(c, w, a, x->B, x->steps);
    ScanBackArgs<T> back = scan_back_args(scan, a.h_starts, (const T *)d_g, E, x->scan);
    back.d_delta_raw = d_delta, back.d_u = d_u, back.d_z = d_xz + E, back.d_B_ssm = d_xdb + R,
    back.d_C_ssm = d_xdb + R + N;
    back.d_A_log = (float *)dw->A_log, back.d_D_skip = (float *)dw->D_skip,
    back.d_dt_bias = (float *)dw->dt_bias;
    back.ld_d_delta = E, back.ld_d_u = E, back.ld_d_z = 2 * E, back.ld_d_B = P, back.ld_d_C = P;
    if (states) back.d_h_final = x->d_h[x->turn] + at_h, back.d_h0 = x->d_h[!x->turn] + at_h;
    check_cuda(d, scan_backward(d, back), "backward scan");
    matmul_d_x(d, Rows(d_xdb, lP), Rows(d_delta, lE), (const T *)w->dt_proj, rows, E, R);
    matmul_d_W(d, (float *)dw->dt_proj, Rows(d_delta, lE), Rows(a.xdb, lP), rows, E, R);
    if (c->flags & FLAG_MIXER_NORM)
        for (int part = 0; part < 3; part++) {
            MixerPart m = mixer_part(part, R, N);
            norm_rows_backward<false, T, T, T>(d, {{d_xdb + m.at, lP},
                                                   NULL,
                                                   NULL,
                                                   NULL,
                                                   {d_xdb + m.at, lP},
                                                   {a.raw + m.at, lP},
                                                   NULL,
                                                   c->mixer_eps,
                                                   rows,
                                                   m.n,
                                                   x->partial});
        }
    ConvEnds ends = {};
    if (states)
        ends = {x->window_start + window_floats(x, chunk * c->n_layer) + at_window,
                x->d_window[x->turn] + at_window, x->d_window[!x->turn] + at_window};
    if (std::is_same<T, bf16>::value && conv_back_serves(E, P, c->K)) {
        ConvBack conv = {};
        conv.d_x = (bf16 *)d_xz, conv.d_u = (const bf16 *)d_u, conv.x = (const bf16 *)a.xz;
        conv.d_xdb = (const bf16 *)d_xdb, conv.W = (const bf16 *)w->x_proj;
        conv.conv_t = w->conv_t, conv.bias = (const float *)w->conv_bias, conv.ends = ends;
        conv.ld = 2 * E, conv.L = x->steps, conv.E = E;
        conv.segment = conv_back_segment(d, x->B, x->steps, E);
        conv.segments = (x->steps + conv.segment - 1) / conv.segment;
        const int parts = x->B * conv.segments;
        float *d_W = x->partial + (size_t)parts * (BACK_TAPS + 1) * E;
        conv.d_taps = x->partial, conv.d_W = d_W;
        conv_back(d, conv, x->B, P);
        sum_parts(d, (float *)dw->conv, (float *)dw->conv_bias, x->partial, parts,
                  (BACK_TAPS + 1) * E, E, BACK_TAPS);
        sum_parts(d, (float *)dw->x_proj, NULL, d_W, parts, P * E, P * E, 1);
    } else {
        matmul_d_x(d, Rows(d_u, lE), Rows(d_xdb, lP), (const T *)w->x_proj, rows, P, E, true);
        matmul_d_W(d, (float *)dw->x_proj, Rows(d_xdb, lP), Rows(a.u, lE), rows, P, E);
        conv1d_silu_backward(x, d_xz, (float *)dw->conv, (float *)dw->conv_bias, d_u, a.xz, w,
                             ends);
    }
    sum_rows(d, (float *)dw->in_bias, d_xz, 2 * lE, rows, 2 * E, x->partial);
    matmul_d_x(d, Rows(d_xn, lD), Rows(d_xz, 2 * lE), (const T *)w->in_proj, rows, 2 * E, D);
    matmul_d_W(d, (float *)dw->in_proj, Rows(d_xz, 2 * lE), Rows(a.xn, lD), rows, 2 * E, D);
    norm_rows_backward<true, T, float, float>(d, {{x->d_res, lD},
                                                  d_o,
                                                  (float *)dw->norm,
                                                  (float *)dw->norm_bias,
                                                  {d_xn, lD},
                                                  {res, lD},
                                                  (const float *)w->norm,
                                                  c->norm_eps,
                                                  rows,
                                                  D,
                                                  x->partial});
}

// Adds the gradient of the embedding. The host orders the rows by token; it has the ids.
static void embed_backward(GpuTrainer *x, const int32_t *ids) {
    Device *d = &x->device;
    int rows = x->B * x->steps, V = x->config.V, D = x->config.D;
    std::vector<int32_t> count((size_t)V + 1, 0), order((size_t)rows), start, token, first;
    for (int r = 0; r < rows; r++) count[(size_t)ids[r] + 1]++;
    for (int v = 0; v < V; v++) {
        int n = count[(size_t)v + 1], at = count[(size_t)v];
        if (n) token.push_back(v), first.push_back((int32_t)start.size());
        for (int i = 0; i < n; i += EMBED_PIECE) start.push_back(at + i);
        count[(size_t)v + 1] += at;
    }
    first.push_back((int32_t)start.size()), start.push_back(rows);
    for (int r = 0; r < rows; r++) order[(size_t)count[(size_t)ids[r]]++] = r;
    auto upload =
        [&](int32_t *to,
            const std::vector<int32_t> &from) { // from pageable memory: copied before it returns
            copy(d, to, from.data(), from.size() * sizeof(int32_t), "embed_backward");
        };
    upload(x->order, order), upload(x->start, start), upload(x->token, token),
        upload(x->first, first);
    embed_pieces_kernel<<<(unsigned)start.size() - 1, 128, 0, d->stream>>>(x->partial, x->d_res,
                                                                           x->order, x->start, D);
    embed_add_kernel<<<(unsigned)token.size(), 128, 0, d->stream>>>(
        (float *)x->d.embedding, x->partial, x->token, x->first, D);
    check_launch(d, "embed_backward");
}

// Of the place that this pass goes on from.
static float *carried_h(const GpuTrainer *x) {
    return x->carried + h_floats(x, x->place * x->config.n_layer);
}
static float *carried_window(const GpuTrainer *x) {
    const int layers = x->config.n_layer;
    return x->carried + h_floats(x, x->carries * layers) + window_floats(x, x->place * layers);
}

// What a pass over a chunk is for: the states at its end; the loss and those; or loss and
// gradients.
enum ChunkPass { STATES, LOSS, BACKWARD };

// The layers of a chunk, from the states at its start. Those at its end become the start of the
// next, or of a later pass.
template <class T> static void chunk_forward(GpuTrainer *x, int chunk, ChunkPass kind) {
    Device *d = &x->device;
    const Config *c = &x->config;
    const bool states = has_states(x), last = chunk + 1 == chunks_of(x);
    const size_t h = h_floats(x, c->n_layer), window = window_floats(x, c->n_layer);
    auto copy_states = [&](float *h_to, float *window_to, const float *h_from,
                           const float *window_from) {
        copy(d, h_to, h_from, h * sizeof(float), "states");
        copy(d, window_to, window_from, window * sizeof(float), "states");
    };
    if (states)
        copy_states(x->h, x->window, x->h_start + chunk * h, x->window_start + chunk * window);
    embed(d, x->res[0], x->ids, EmbeddingOf<T>{x->w.embedding, c->D, 0}, x->B * x->steps);
    for (int layer = 0; layer < c->n_layer; layer++) {
        BlockActs<T> acts = trainer_acts<T>(x, layer);
        if (kind != BACKWARD) acts.h_starts = NULL;
        block(d, c, &x->w.layer[(size_t)layer], acts,
              {x->res[(size_t)layer + 1], x->res[(size_t)layer], x->B, x->steps,
               states ? x->window + window_floats(x, layer) : NULL,
               states ? x->h + h_floats(x, layer) : NULL, true});
    }
    const size_t next = (size_t)chunk + 1;
    if (kind != BACKWARD && !last)
        copy_states(x->h_start + next * h, x->window_start + next * window, x->h, x->window);
    if (last && x->place >= 0) copy_states(carried_h(x), carried_window(x), x->h, x->window);
}

// Logits of n rows of the normed xn, their losses, and, where d_logits is given, their gradient.
template <class T>
static void logits_loss(GpuTrainer *x, T *d_logits, const T *xn, int t, int n, float weight) {
    Device *d = &x->device;
    const int D = x->config.D, V = x->config.V;
    matmul(d, Rows(x->logits, (size_t)V), Rows((T *)xn + (size_t)t * D, (size_t)D),
           (const T *)x->w.head, n, V, D);
    cross_entropy(d, x->losses + t, d_logits, x->logits, x->targets + t, weight, n, V);
}

// The head and the loss after the last layer; where backward, d_res, d_o, and the gradients of head
// and norm_f.
template <class T> static void chunk_loss(GpuTrainer *x, float weight, bool backward) {
    Device *d = &x->device;
    const Config *c = &x->config;
    int rows = x->B * x->steps, D = c->D, V = c->V;
    size_t lD = (size_t)D, lV = (size_t)V;
    const float *last = x->res[(size_t)c->n_layer];
    T *xn = (T *)x->xn, *d_xn = (T *)x->d_xn, *d_logits = (T *)x->d_logits;
    norm_rows(d, Rows(xn, lD), Rows(last, lD), x->w.norm_f, x->w.norm_f_bias, c->norm_eps, rows, D);
    for (int t = 0; t < rows; t += x->loss_rows) {
        const int n = std::min(x->loss_rows, rows - t);
        for (int i = 0; i < n; i += x->logit_rows)
            logits_loss(x, backward ? d_logits + (size_t)i * V : NULL, xn, t + i,
                        std::min(x->logit_rows, n - i), weight);
        if (!backward) continue;
        matmul_d_x(d, Rows(d_xn + (size_t)t * D, lD), Rows(d_logits, lV), (const T *)x->w.head, n,
                   V, D);
        matmul_d_W(d, (float *)x->d.head, Rows(d_logits, lV), Rows(xn + (size_t)t * D, lD), n, V,
                   D);
    }
    sum_losses_kernel<<<1, 256, 0, d->stream>>>(x->sum, x->losses, rows);
    check_launch(d, "cross_entropy");
    if (backward)
        norm_rows_backward<false, T, float, float>(d, {{x->d_res, lD},
                                                       (T *)x->d_o,
                                                       (float *)x->d.norm_f,
                                                       (float *)x->d.norm_f_bias,
                                                       {d_xn, lD},
                                                       {last, lD},
                                                       (const float *)x->w.norm_f,
                                                       c->norm_eps,
                                                       rows,
                                                       D,
                                                       x->partial});
}

// One chunk of all sequences, as chunk_pass() of mamba.c.
template <class T>
static void chunk_pass(GpuTrainer *x, int chunk, const int32_t *ids, const int32_t *targets,
                       float weight, ChunkPass kind) {
    Device *d = &x->device;
    const size_t t0 = (size_t)chunk * chunk_steps(x), L = (size_t)x->L;
    x->steps = (int)std::min((size_t)chunk_steps(x), L - t0);
    const size_t steps = (size_t)x->steps, rows = x->B * steps, bytes = rows * sizeof *ids;
    std::vector<int32_t> chunk_ids(rows), chunk_targets(rows);
    for (size_t b = 0; b < (size_t)x->B; b++) {
        memcpy(&chunk_ids[b * steps], ids + b * L + t0, steps * sizeof *ids);
        memcpy(&chunk_targets[b * steps], targets + b * L + t0, steps * sizeof *ids);
    }
    copy(d, x->ids, chunk_ids.data(), bytes, "ids"); // pageable: copied before it returns
    copy(d, x->targets, chunk_targets.data(), bytes, "ids");
    chunk_forward<T>(x, chunk, kind);
    if (kind == STATES) return;
    Cards *cards = kind == BACKWARD ? x->cards : NULL;
    if (cards) cards->begin();
    chunk_loss<T>(x, weight, kind == BACKWARD);
    if (kind == LOSS) return;
    if (cards) cards->ready(x->config.n_layer);
    for (int layer = x->config.n_layer - 1; layer >= 0; layer--) {
        block_backward<T>(x, layer, chunk);
        if (cards) cards->ready(layer);
    }
    embed_backward(x, chunk_ids.data());
    if (cards) cards->ready(-1);
    x->turn = !x->turn;
}

template <class T>
static int train_pass(GpuTrainer *x, const int32_t *ids, const int32_t *targets, float weight,
                      bool backward, double *sum) {
    Device *d = &x->device;
    const int chunks = chunks_of(x);
    const size_t h = h_floats(x, x->config.n_layer) * sizeof(float),
                 window = window_floats(x, x->config.n_layer) * sizeof(float);
    clear(d, x->sum, sizeof *x->sum, "losses");
    if (x->place >= 0) {
        copy(d, x->h_start, carried_h(x), h, "states");
        copy(d, x->window_start, carried_window(x), window, "states");
    } else if (has_states(x)) {
        clear(d, x->h_start, h, "states");
        clear(d, x->window_start, window, "states");
    }
    if (has_states(x)) { // nothing follows the last chunk
        clear(d, x->d_h[x->turn], h, "states");
        clear(d, x->d_window[x->turn], window, "states");
    }
    for (int chunk = 0; chunk < chunks - 1 && backward; chunk++)
        chunk_pass<T>(x, chunk, ids, targets, weight, STATES);
    for (int chunk = chunks - 1; chunk >= 0 && backward; chunk--)
        chunk_pass<T>(x, chunk, ids, targets, weight, BACKWARD);
    for (int chunk = 0; chunk < chunks && !backward; chunk++)
        chunk_pass<T>(x, chunk, ids, targets, weight, LOSS);
    copy(d, sum, x->sum, sizeof *sum, "losses");
    return finish_scans(d);
}

// As mamba_train_pass_on: *sum gets the sum of the losses. 0, or -1 with a sentence.
static int gpu_train_pass(GpuTrainer *x, int place, const int32_t *ids, const int32_t *targets,
                          float weight, int backward, double *sum) {
    const size_t tokens = (size_t)x->B * x->L;
    device_use(&x->device);
    if (!x->arena) return gpu_fail("the trainer has no memory for a pass");
    if (check_tokens(ids, tokens, x->config.V) || check_tokens(targets, tokens, x->config.V, true))
        return -1;
    x->place = place;
    return x->bf16_compute ? train_pass<bf16>(x, ids, targets, weight, backward != 0, sum)
                           : train_pass<float>(x, ids, targets, weight, backward != 0, sum);
}

// norms[0] on the device: the length of n numbers; norms[1]: what clipping leaves.
static void queue_norm(GpuTrainer *x, const float *from, size_t n, float clip) {
    Device *d = &x->device;
    squares_kernel<<<NORM_PARTS, 256, 0, d->stream>>>(x->norms + 2, from, n);
    norm_kernel<<<1, 1024, 0, d->stream>>>(x->norms, x->norms + 2, NORM_PARTS, clip);
    check_launch(d, "norm");
}

// *norm: norms[0], after everything that is queued. 0, or -1 with a sentence.
static int fetch_norm(GpuTrainer *x, float *norm) {
    copy(&x->device, norm, x->norms, sizeof *norm, "norm");
    return finish(&x->device);
}

// *norm: the length of n numbers; norms[1] on the device: what clipping leaves. 0, or -1 with a
// sentence.
static int gradient_norm(GpuTrainer *x, const float *from, size_t n, float clip, float *norm) {
    queue_norm(x, from, n, clip);
    return fetch_norm(x, norm);
}

// After a step that found a gradient that is not finite: -1 with the name of its first tensor.
static int name_not_finite(GpuTrainer *x, uint64_t step) {
    const float *host = (const float *)x->places[0].host->data;
    for (size_t i = 0; i < x->places.size(); i++) {
        const TensorPlace &p = x->places[i];
        size_t n = (size_t)p.host->rows * (size_t)p.host->cols;
        float part = 0;
        const float *from = x->gradient + ((const float *)p.host->data - host);
        if (x->cards ? x->cards->tensor_norm(i, &part) : gradient_norm(x, from, n, 0, &part))
            return -1;
        if (part - part == 0) continue;
        if (p.layer < 0)
            return gpu_fail("step %llu: the gradient of %s is not finite", (unsigned long long)step,
                            p.name);
        return gpu_fail("step %llu: the gradient of layer %d %s is not finite",
                        (unsigned long long)step, p.layer, p.name);
    }
    return gpu_fail("step %llu: the norm of the gradient overflows", (unsigned long long)step);
}

// As mamba_train_step, for step number `step` (from 1): *norm gets the gradient's length. 0, or -1
// with the name of the first tensor whose gradient is not finite, the weights untouched. AdamW is
// queued before the norm is known here; its kernel looks at the norm itself.
static int gpu_train_step(GpuTrainer *x, const AdamW *how, uint64_t step, double *norm) {
    Device *d = &x->device;
    float length = 0;
    device_use(d);
    if (!x->arena) return gpu_fail("the trainer has no memory for a pass");
    if (x->cards) {
        if (x->cards->norm(how->clip, &length)) return -1;
        *norm = length;
        if (!(length - length == 0)) return name_not_finite(x, step);
    } else queue_norm(x, x->gradient, x->floats, how->clip);
    double unbias = 1 - pow(how->beta1, (double)step), unbias2 = 1 - pow(how->beta2, (double)step);
    float rate = (float)(how->rate / unbias), root = (float)(1 / sqrt(unbias2)),
          keep = 1 - how->rate * how->decay;
    unsigned blocks = (unsigned)d->processors * 8;
    const AdamStep step_now = {x->norms, rate, how->beta1, how->beta2, how->epsilon, keep, root};
    if (x->cards) return x->cards->update(step_now);
    if (x->bf16_compute)
        adamw_kernel<<<blocks, 256, 0, d->stream>>>(x->weights, (bf16 *)x->compute, x->gradient,
                                                    x->moment, x->moment2, x->decays, x->floats,
                                                    step_now);
    else
        adamw_kernel<<<blocks, 256, 0, d->stream>>>(x->weights, x->weights, x->gradient, x->moment,
                                                    x->moment2, x->decays, x->floats, step_now);
    check_launch(d, "adamw");
    derive_all(x);
    if (fetch_norm(x, &length)) return -1;
    *norm = length;
    return *norm - *norm == 0 ? 0 : name_not_finite(x, step);
}
