// files/random_model.h: a model of initial weights, a tile at a time. initial_value() in mamba.c
// says what each weight is.

typedef struct {
    uint64_t seed;
    const Config *config;
} InitContext;

// Each row has a random stream of its own, so that threads can share rows. Streams of neighbouring
// seeds are shifted copies of each other, so the seed is hashed once more.
static void init_tensor(void *context, const TensorInfo *info, Tensor *w) {
    InitContext *c = context;
    const uint64_t seed = random_u64(&c->seed);
    const int fan_in = info->init == INIT_CONV ? c->config->K : w->cols; // also of the conv's bias
#pragma omp parallel for
    for (int r0 = 0; r0 < w->rows; r0 += TILE) {
        const int rows = w->rows - r0 < TILE ? w->rows - r0 : TILE;
        uint64_t random[TILE];
        for (int r = 0; r < rows; r++) {
            uint64_t at = seed ^ (uint64_t)(r0 + r);
            random[r] = random_u64(&at);
        }
        for (int k0 = 0; k0 < w->cols; k0 += TILE) {
            const int columns = w->cols - k0 < TILE ? w->cols - k0 : TILE;
            float value[TILE][TILE] = {{0}}; // value[k][r], as quantize_tile() takes it
            for (int r = 0; r < rows; r++)
                for (int k = 0; k < columns; k++)
                    value[k][r] =
                        initial_value(info->init, fan_in, k0 + k, c->config->n_layer, &random[r]);
            store_tile(w, r0, k0, value);
        }
    }
}

Model *mamba_random_model(const Config *config, uint64_t seed) {
    Model *m = blank_model(config);
    if (!m) return NULL;
    InitContext init = {seed, &m->config};
    each_tensor(m, init_tensor, &init);
    if (make_derived(m) == 0) return m;
    mamba_free(m);
    return NULL;
}
