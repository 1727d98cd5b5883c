// open.cuh - the model on the device: what memory it takes, and the first pass. Included by
// mamba_cuda.cu.
//
// Before anything is taken, what is needed is added up. Where the memory is short, prompts are read
// in smaller pieces; where the smallest is too large, an error says what would fit.

enum { PIECE_LEAST = 256 };   // tokens
enum { PIECE_PACKED = 2048 }; // of quantised models, where memory is not short

// CUDA keeps a stack for all threads that fit on the GPU, by default of 1,024 bytes: 277 MB of an
// H100. Where a kernel is known to need more, CUDA takes it by itself, and of all kernels here it
// is known.
static void small_stacks(void) {
    size_t bytes = 0;
    cudaError_t error = cudaDeviceGetLimit(&bytes, cudaLimitStackSize);
    if (error == cudaSuccess && bytes == 1024) error = cudaDeviceSetLimit(cudaLimitStackSize, 128);
    if (error != cudaSuccess) cudaGetLastError(); // more memory than needed, no more
}

// The tokens of a piece and the rows of logits: those of a large GPU, or fewer. Quantised models
// are for small ones; but a matrix is unpacked for each piece, so a piece must not be short. 0, or
// -1 with a sentence.
template <class T> static int fit_pieces(Gpu *g, const Model *m) {
    const Config *c = &g->config;
    const StateBytes state(c);
    const size_t row = (size_t)c->D * 8 + (size_t)c->E * 24,
                 budget = c->type >= Q8 ? (size_t)128 << 20 : (size_t)3 << 30, // of activations
        most = budget / row / 64 * 64, weights = lay_out_weights<T>(g, m, NULL),
                 // The sampler of one text; the library's own memory is in use already.
        others = state.all() + 16 * (size_t)c->V + ((size_t)8 << 20);
    size_t total = 0, free_bytes = free_memory(&total), needed;
    const size_t least = (size_t)(c->type >= Q8 ? (int)PIECE_PACKED : (int)PIECE_LEAST);
    g->piece = (int)std::min((size_t)GPU_PIECE, std::max(least, most));
    g->logit_rows = std::max(1, std::min(c->type >= Q8 ? 128 : 1024, GPU_LOGIT_FLOATS / c->V));
    g->solo_bytes = solo_packed_bytes(g);
    for (;;) {
        needed = weights + lay_out_acts<T>(g, NULL) + others;
        if (needed <= free_bytes || (g->piece == PIECE_LEAST && g->logit_rows == 1)) break;
        g->piece = std::max((int)PIECE_LEAST, g->piece / 2);
        g->logit_rows = std::max(1, g->logit_rows / 2);
    }
    if (needed <= free_bytes) return 0;
    const double params = (double)m->n_params * 1e-6;
    return gpu_fail("GPU memory: %.0f MB are needed (%.0f of weights), %.0f of %.0f MB are free; "
                    "in 4 bits (mamba quantize) the weights are about %.0f MB; --cpu runs on the "
                    "processor",
                    (double)needed * 1e-6, (double)weights * 1e-6, (double)free_bytes * 1e-6,
                    (double)total * 1e-6, params * 0.57);
}

// The first pass of a program loads the library's kernels and ours, 0.1 s. It is made here, on
// numbers that nobody uses, while another thread copies the weights. Token 0, of which a prompt and
// a step; the states become zeros again.
template <class T> static void first_pass(Gpu *g) {
    Device *d = &g->device;
    const int lengths[] = {1, std::min(20, g->piece), std::min(300, g->piece)};
    clear(d, g->ids, (size_t)g->piece * sizeof *g->ids, "ids");
    for (int L : lengths) {
        network<T>(g, g->ids, 1, L);
        head_product(g, g->one.logits, acts_of<T>(g).xn, 1);
    }
    clear_place(g, &g->one, 0);
}

template <class T> static int open_model(Gpu *g, const Model *m) {
    Device *d = &g->device;
    if (fit_pieces<T>(g, m)) return -1;
    char *weights = (char *)gpu_take(g, lay_out_weights<T>(g, m, NULL)),
         *arena = weights ? (char *)gpu_take(g, lay_out_acts<T>(g, NULL)) : NULL;
    if (!arena || places_open(g, &g->one, 1)) return -1;
    lay_out_weights<T>(g, m, weights), lay_out_acts<T>(g, arena);
    if (finish(d)) return -1;
    cudaError_t copied = cudaSuccess;
    std::thread copying([&] { // on a stream of its own: it waits for nothing of the first pass
        cudaStream_t stream;
        cudaSetDevice(d->device);
        copied = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        if (copied != cudaSuccess) return;
        for (const Run &run : g->runs)
            if (copied == cudaSuccess)
                copied =
                    cudaMemcpyAsync(run.to, run.from, run.bytes, cudaMemcpyHostToDevice, stream);
        cudaError_t arrived = cudaStreamSynchronize(stream);
        if (copied == cudaSuccess) copied = arrived;
        cudaStreamDestroy(stream);
    });
    first_pass<T>(g);
    int result = finish_scans(d);
    copying.join();
    check_cuda(d, copied, "weights");
    return convert_weights<T>(g) ? -1 : result;
}

// The model on the GPU; float32: compute so whatever the weights are stored as. Zero states. NULL
// with a sentence.
static Gpu *gpu_open(const Model *m, int float32) {
    Gpu *g = new Gpu();
    const Config *c = &m->config;
    g->at = &g->one;
    g->config = *c;
    g->portable_only = pretended_portable || getenv("MAMBA_PORTABLE");
    g->bf16_compute = (c->type == BF16 || c->type == Q8 || c->type == Q4) && !float32;
    g->f16_compute = c->type == F16 && !float32;
    if (device_open(&g->device) == 0) {
        small_stacks();
        // Parts of a sum must not be added in float16.
        if (g->f16_compute)
            check_blas(
                &g->device,
                cublasSetMathMode(g->device.blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION),
                "cuBLAS");
        if ((g->bf16_compute  ? open_model<bf16>(g, m)
             : g->f16_compute ? open_model<f16>(g, m)
                              : open_model<float>(g, m)) == 0)
            return g;
    }
    gpu_close(g);
    return NULL;
}
