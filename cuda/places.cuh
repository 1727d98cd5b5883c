// places.cuh - states of one sequence and of several, side by side. Included by mamba_cuda.cu.
//
// Gpu.one reads prompts. Gpu.many has the places of several texts: one that begins is a copy of
// `one`, made on the device, so a prompt that many texts share is read once.

struct StateBytes { // of one sequence: window and h of one layer, logits
    size_t window, h, logits, layers;
    StateBytes(const Config *c)
        : window((size_t)(c->K - 1) * c->E * sizeof(float)), h((size_t)c->N * c->E * sizeof(float)),
          logits((size_t)c->V * sizeof(float)), layers((size_t)c->n_layer) {}
    size_t all() const { return layers * (window + h) + logits; }
};

static void places_free(Places *p) {
    cudaFree(p->window), cudaFree(p->h), cudaFree(p->logits);
    generation_free(p->generation);
    *p = {};
}

// S places with zero states, instead of what p has. 0, or -1 with a sentence.
static int places_open(Gpu *g, Places *p, int S) {
    const StateBytes n(&g->config);
    Device *d = &g->device;
    places_free(p);
    const size_t s = (size_t)S;
    p->window = (float *)device_alloc(n.layers * s * n.window);
    if (p->window) p->h = (float *)device_alloc(n.layers * s * n.h);
    if (p->h) p->logits = (float *)device_alloc(s * n.logits);
    if (!p->logits) return places_free(p), -1;
    p->S = S;
    clear(d, p->window, n.layers * s * n.window, "state");
    clear(d, p->h, n.layers * s * n.h, "state");
    clear(d, p->logits, s * n.logits, "state");
    return 0;
}

// Place `to_s` of `to` gets the numbers of place from_s of `from`, or zeros where from is NULL.
static void place_copy(Gpu *g, Places *to, int to_s, const Places *from, int from_s) {
    const StateBytes n(&g->config);
    Device *d = &g->device;
    auto rows = [&](float *a, const float *b, size_t bytes) {
        char *there = (char *)a + to_s * bytes;
        if (from)
            copy_rows(d, there, to->S * bytes, (const char *)b + from_s * bytes, from->S * bytes,
                      bytes, n.layers, "state");
        else if (bytes)
            check_cuda(d, cudaMemset2DAsync(there, to->S * bytes, 0, bytes, n.layers, d->stream),
                       "state");
    };
    rows(to->window, from ? from->window : NULL, n.window);
    rows(to->h, from ? from->h : NULL, n.h);
    char *logits = (char *)to->logits + to_s * n.logits;
    if (from) copy(d, logits, (const char *)from->logits + from_s * n.logits, n.logits, "state");
    else clear(d, logits, n.logits, "state");
}

static void clear_place(Gpu *g, Places *p, int s) { place_copy(g, p, s, NULL, 0); }

// place -1: the one sequence. NULL with a sentence.
static Places *place_of(Gpu *g, int place) {
    if (place < 0) return &g->one;
    if (place < g->many.S) return &g->many;
    gpu_fail("place %d of %d sequences", place, g->many.S);
    return NULL;
}

// The state of a place (-1: the one sequence) from host arrays window (n_layer,K-1,E), h
// (n_layer,N,E), logits (V). 0, or -1 with a sentence.
static int gpu_set_state(Gpu *g, int place, const float *window, const float *h,
                         const float *logits) {
    const StateBytes n(&g->config);
    Device *d = &g->device;
    device_use(d);
    Places *p = place_of(g, place);
    if (!p) return -1;
    const size_t s = (size_t)std::max(place, 0);
    copy_rows(d, (char *)p->window + s * n.window, p->S * n.window, window, n.window, n.window,
              n.layers, "state");
    copy_rows(d, (char *)p->h + s * n.h, p->S * n.h, h, n.h, n.h, n.layers, "state");
    copy(d, (char *)p->logits + s * n.logits, logits, n.logits, "state");
    return finish(d);
}

// The same to host arrays. NULL: not wanted.
static int gpu_get_state(Gpu *g, int place, float *window, float *h, float *logits) {
    const StateBytes n(&g->config);
    Device *d = &g->device;
    device_use(d);
    Places *p = place_of(g, place);
    if (!p) return -1;
    const size_t s = (size_t)std::max(place, 0);
    if (window)
        copy_rows(d, window, n.window, (char *)p->window + s * n.window, p->S * n.window, n.window,
                  n.layers, "state");
    if (h) copy_rows(d, h, n.h, (char *)p->h + s * n.h, p->S * n.h, n.h, n.layers, "state");
    if (logits) copy(d, logits, (char *)p->logits + s * n.logits, n.logits, "state");
    return finish(d);
}
