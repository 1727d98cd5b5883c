// texts.cuh - several texts from their start, side by side: scored, or read as prompts. Included by
// mamba_cuda.cu.
//
// B texts are rows of L tokens (padding.cuh): a pass of B L rows fills the GPU, where a text after
// the other would leave it idle. How many fit follows from the rows that the activations have, and
// from the memory for their states.

enum { TEXTS_STEPS = 256 }; // read token by token at once: more gain little

// Memory for S texts: the mailbox of their scan, and for prompts their states. Not more than a
// quarter of what is free: the places of texts that are being written need the rest. 0, or -1 with
// a sentence.
static int texts_open(Gpu *g, int S, bool prompts) {
    Texts *x = &g->texts;
    const Config *c = &g->config;
    const int N = c->N, tiled = 48 * g->device.processors / c->E + 2;
    // Of the usual numbers of states, only few channels go by mail: see scan_forward().
    const bool usual = N == 8 || N == 16 || N == 32 || N == 64;
    size_t total = 0;
    if (S > x->S) {
        cudaFree(x->mail.words);
        x->mail = {}, x->S = 0;
        const size_t bytes = scan_forward_workspace(usual ? std::min(S, tiled) : S, c->E, N);
        if (bytes > free_memory(&total) / 4) return gpu_fail("GPU memory: %d texts", S);
        uint64_t *words = (uint64_t *)device_alloc(bytes);
        if (!words) return -1;
        x->mail.words = words, x->mail.bytes = bytes, x->S = S;
    }
    if (!prompts || S <= x->prompts.S) return 0;
    places_free(&x->prompts);
    if ((size_t)S * StateBytes(c).all() > free_memory(&total) / 4)
        return gpu_fail("GPU memory: the states of %d texts", S);
    return places_open(g, &x->prompts, S);
}

static void texts_free(Texts *x) {
    cudaFree(x->mail.words);
    places_free(&x->prompts);
}

// How many texts of up to L tokens, S at the most, gpu_score() or gpu_read_prompts() takes at once.
// Memory is taken for them.
static int gpu_texts(Gpu *g, int S, int L, TextsUse use) {
    device_use(&g->device);
    if (use == TEXTS_STEPPED) {
        S = std::min(S, std::min((int)TEXTS_STEPS, g->piece));
        while (S > 1 && gpu_places(g, S, 0)) S = (S + 1) / 2;
        return S;
    }
    S = std::min(S, g->piece / std::max(1, L));
    while (S > 1 && texts_open(g, S, use == TEXTS_PROMPTS)) S /= 2;
    return std::max(1, S);
}

// network() for B texts of L tokens from their start, whose ids are on the device. lengths (B), on
// the device: states of texts that end there go to the places that run; NULL: no states.
template <class T> static void network_of_texts(Gpu *g, const int32_t *lengths, int B, int L) {
    Device *d = &g->device;
    const Config *c = &g->config;
    BlockActs<T> a = acts_of<T>(g);
    a.mail = &g->texts.mail;
    embed(d, g->res, g->ids, embedding_of<T>(g), B * L);
    for (int layer = 0; layer < c->n_layer; layer++)
        block(d, c, &g->w.layer[(size_t)layer], a,
              {g->res, g->res, B, L, lengths ? window_of(g, layer) : NULL,
               lengths ? h_of(g, layer) : NULL, false, lengths});
    norm_rows(d, Rows(a.xn, c->D), Rows(g->res, c->D), g->w.norm_f, g->w.norm_f_bias, c->norm_eps,
              B * L, c->D);
}

// --- scores

// Of each row of logits: losses = -log p(target), likeliest = the id of the highest logit, of equal
// ones the first. Nothing where the target is -1.
enum { SCORE_THREADS = 256 };
__global__ void __launch_bounds__(SCORE_THREADS)
    score_kernel(float *losses, int32_t *likeliest, const float *__restrict__ logits,
                 const int32_t *__restrict__ targets, int V) {
    __shared__ float scratch[33], values[32];
    __shared__ int indices[32];
    const float *x = logits + (size_t)blockIdx.x * V;
    const int target = targets[blockIdx.x];
    if (target < 0) return;
    float highest = -INFINITY, sum = 0;
    int best = V;
#pragma unroll 4
    for (int v = threadIdx.x; v < V; v += SCORE_THREADS) {
        const float xv = x[v];
        if (xv > highest) sum *= __expf(highest - xv), highest = xv, best = v;
        sum += __expf(xv - highest);
    }
    float top = highest;
    block_argmax(&top, &best, values, indices);
    // A thread without a number has a sum of 0; one with a NaN makes all NaN.
    sum = block_sum(sum == 0 ? 0 : sum * __expf(highest - top), scratch);
    if (threadIdx.x) return;
    losses[blockIdx.x] = (float)((double)top - (double)x[target] + log((double)sum));
    likeliest[blockIdx.x] = best;
}

// Scores rows from `from` on of the normed residual stream.
template <class T> static void score_rows(Gpu *g, int from, int n) {
    const T *xn = acts_of<T>(g).xn;
    for (int t = from; t < from + n; t += g->logit_rows) {
        const int rows = std::min(g->logit_rows, from + n - t);
        head_product(g, g->logits, xn + (size_t)t * g->config.D, rows);
        score_kernel<<<(unsigned)rows, SCORE_THREADS, 0, g->device.stream>>>(
            g->losses + t, g->likeliest + t, g->logits, g->targets + t, g->config.V);
        check_launch(&g->device, "scores");
    }
}

// A text alone is read in pieces, and may have any length.
template <class T> static int score(Gpu *g, const ScoreRun &run) {
    Device *d = &g->device;
    const size_t B = (size_t)run.B, L = (size_t)run.L;
    const size_t piece = B == 1 ? std::min(L, (size_t)g->piece) : L;
    g->at = &g->one;
    if (B == 1) clear_place(g, &g->one, 0);
    for (size_t done = 0; done < L; done += piece) {
        const size_t n = std::min(piece, L - done), bytes = B * n * sizeof(int32_t);
        copy(d, g->ids, run.ids + done, bytes, "ids");
        copy(d, g->targets, run.targets + done, bytes, "ids");
        clear(d, g->losses, bytes, "scores"), clear(d, g->likeliest, bytes, "scores");
        if (B == 1) network<T>(g, g->ids, 1, (int)n);
        else network_of_texts<T>(g, NULL, (int)B, (int)L);
        // Tokens of each text that nobody asks for.
        const size_t skip = std::min(n, (size_t)run.first - std::min(done, (size_t)run.first));
        if (skip == 0) score_rows<T>(g, 0, (int)(B * n));
        else
            for (size_t b = 0; b < B; b++) score_rows<T>(g, (int)(b * n + skip), (int)(n - skip));
        copy(d, run.losses + done, g->losses, bytes, "scores");
        copy(d, run.likeliest + done, g->likeliest, bytes, "scores");
    }
    return finish_scans(d);
}

// Token by token, as text is generated.
static int score_steps(Gpu *g, const ScoreRun &run) {
    Device *d = &g->device;
    const size_t B = (size_t)run.B, L = (size_t)run.L, bytes = B * sizeof(int32_t);
    std::vector<int32_t> ids(B), targets(B), likeliest(B);
    std::vector<float> losses(B);
    if (gpu_places(g, run.B, 0)) return -1; // zero states
    for (size_t t = 0; t < L; t++) {
        for (size_t b = 0; b < B; b++)
            ids[b] = run.ids[b * L + t], targets[b] = run.targets[b * L + t];
        copy(d, g->ids, ids.data(), bytes, "ids"); // from pageable memory: read before it returns
        step_places(g, run.B);
        if (t < (size_t)run.first) continue;
        copy(d, g->targets, targets.data(), bytes, "ids");
        clear(d, g->losses, bytes, "scores"), clear(d, g->likeliest, bytes, "scores");
        score_kernel<<<(unsigned)B, SCORE_THREADS, 0, d->stream>>>(
            g->losses, g->likeliest, g->many.logits, g->targets, g->config.V);
        check_launch(d, "scores");
        copy(d, losses.data(), g->losses, bytes, "scores");
        copy(d, likeliest.data(), g->likeliest, bytes, "scores");
        if (finish(d)) return -1;
        for (size_t b = 0; b < B; b++)
            run.losses[b * L + t] = losses[b], run.likeliest[b * L + t] = likeliest[b];
    }
    return finish(d);
}

// Reads B texts of L tokens from their start; B: at most what gpu_texts() says. The state of the
// one sequence is lost, with steps also the places. 0, or -1 with a sentence.
static int gpu_score(Gpu *g, const ScoreRun *run) {
    const size_t tokens = (size_t)run->B * (size_t)run->L;
    device_use(&g->device);
    if (run->B < 1 || run->L < 1 || run->first < 0 || run->first > run->L ||
        (run->B > 1 && !run->steps && (run->B > g->texts.S || tokens > (size_t)g->piece)))
        return gpu_fail("%d texts of %d tokens are too many at once", run->B, run->L);
    if (check_tokens(run->ids, tokens, g->config.V) ||
        check_tokens(run->targets, tokens, g->config.V, true))
        return -1;
    if (run->steps) return score_steps(g, *run);
    return g->bf16_compute  ? score<bf16>(g, *run)
           : g->f16_compute ? score<f16>(g, *run)
                            : score<float>(g, *run);
}

// --- prompts

template <class T>
static int read_prompts(Gpu *g, const int32_t *ids, const int32_t *lengths, int B, int L) {
    Device *d = &g->device;
    const size_t D = (size_t)g->config.D, bytes = (size_t)B * sizeof(int32_t);
    T *xn = acts_of<T>(g).xn;
    copy(d, g->ids, ids, bytes * (size_t)L, "ids");
    copy(d, g->targets, lengths, bytes, "ids");
    g->at = &g->texts.prompts;
    network_of_texts<T>(g, g->targets, B, L);
    // The last row of each text goes to the front. No row goes to one that a later copy reads.
    for (size_t b = 0; b < (size_t)B; b++) {
        const size_t last = b * (size_t)L + (size_t)lengths[b] - 1;
        if (last != b) copy(d, xn + b * D, xn + last * D, D * sizeof(T), "prompts");
    }
    head_product(g, g->texts.prompts.logits, xn, B);
    return finish_scans(d);
}

// Reads B prompts, ids (B,L), of which lengths (B) tokens count, from their start; B: at most what
// gpu_texts() says. Their states stay for gpu_place_begin() until other prompts are read. 0, or -1
// with a sentence.
static int gpu_read_prompts(Gpu *g, const int32_t *ids, const int32_t *lengths, int B, int L) {
    const size_t tokens = (size_t)B * (size_t)L;
    Places *before = g->at;
    device_use(&g->device);
    if (B < 1 || L < 1 || B > g->texts.S || B > g->texts.prompts.S || tokens > (size_t)g->piece)
        return gpu_fail("%d prompts of %d tokens are too many at once", B, L);
    for (int b = 0; b < B; b++)
        if (lengths[b] < 1 || lengths[b] > L)
            return gpu_fail("prompt %d has %d tokens: 1 to %d", b, lengths[b], L);
    if (check_tokens(ids, tokens, g->config.V)) return -1;
    int result = g->bf16_compute  ? read_prompts<bf16>(g, ids, lengths, B, L)
                 : g->f16_compute ? read_prompts<f16>(g, ids, lengths, B, L)
                                  : read_prompts<float>(g, ids, lengths, B, L);
    g->at = before;
    return result;
}
