// files/tensors.h: the tensors of a model, one after the other: their sizes, the layout in files
// and in memory, the walk over all of them. Depends on the types of mamba.c and on bytes.h.

typedef struct { // one line of the list, as a visitor sees it
    const char *name;
    int layer; // -1: not in a layer
    Init init;
    bool decays; // weight decay applies
} TensorInfo;

enum { LABEL = 40 }; // room for "layer 65535 conv_bias"
static void tensor_label(char label[LABEL], const TensorInfo *info) {
    if (info->layer < 0) snprintf(label, LABEL, "%s", info->name);
    else snprintf(label, LABEL, "layer %d %s", info->layer, info->name);
}

// Q8 and Q4: a matrix is cut into tiles of TILE rows times TILE inputs, the tiles of one panel of
// TILE rows one after the other, the last ones filled up with zeros. A row's 32 weights in a tile
// are scale * code, with a bf16 scale of their own and whole codes: -127..127 or -8..7. So a tile
// is TILE scales, then `bits` times TILE words of 32 bits: word (i,r) holds 32 / bits codes of row
// r, inputs i * 32 / bits and on, the first in the lowest bits. Codes are stored plus 128 or 8, but
// the last of a word in two's complement: masked where it lies and taken as an int32, each is code
// (+ 128 or 8) times a power of two. That is 8.5 and 4.5 bits a weight, in one long stream, with VL
// rows side by side as the vectors want them.
enum { TILE_SCALES = TILE * 2 }; // bytes
static bool is_quantized(Type type) { return type >= Q8; }
static int code_bits(Type type) { return type == Q8 ? 8 : 4; }
static size_t tile_bytes(Type type) { return TILE_SCALES + (size_t)code_bits(type) * TILE * 4; }
static size_t tiles_of(size_t n) { return (n + TILE - 1) / TILE; }

static size_t type_bytes(Type type) { return type == F32 ? 4 : 2; } // not of Q8 and Q4
static size_t tensor_elements(const Tensor *w) {
    return size_mul((size_t)w->rows, (size_t)w->cols);
}
static size_t tensor_bytes(const Tensor *w) {
    if (!is_quantized(w->type)) return size_mul(tensor_elements(w), type_bytes(w->type));
    return size_mul(size_mul(tiles_of((size_t)w->rows), tiles_of((size_t)w->cols)),
                    tile_bytes(w->type));
}
static const float *f32(const Tensor *w) { return w->data; } // NULL for an absent bias

// Numbers as in files to the machine's order of bytes, or back: nothing happens on a little-endian
// machine.
static void fix_tensor_endian(const Tensor *w) {
    unsigned char *data = (unsigned char *)(uintptr_t)w->data;
    size_t bytes = tensor_bytes(w), tile = is_quantized(w->type) ? tile_bytes(w->type) : bytes;
    if (host_is_little_endian()) return;
    if (!is_quantized(w->type)) fix_endian(data, bytes, type_bytes(w->type));
    else
        for (size_t at = 0; at < bytes; at += tile)
            fix_endian(data + at, TILE_SCALES, 2),
                fix_endian(data + at + TILE_SCALES, tile - TILE_SCALES, 4);
}

// Visits every tensor of m in the file's order.
typedef void TensorVisitor(void *context, const TensorInfo *info, Tensor *w);

static void each_tensor(Model *m, TensorVisitor *visit, void *context) {
    const Config *c = &m->config;
#define VISIT(owner, index, name, r, k, t, init, decays, present) \
    if (present) { \
        (owner)->name.rows = (r), (owner)->name.cols = (k), (owner)->name.type = (t); \
        visit(context, &(TensorInfo){#name, index, init, decays}, &(owner)->name); \
    }
#define VISIT_MODEL(name, r, k, t, init, decays, present) \
    VISIT(m, -1, name, r, k, t, init, decays, present)
#define VISIT_LAYER(name, r, k, t, init, decays, present) \
    VISIT(&m->layer[layer], layer, name, r, k, t, init, decays, present)
    TENSORS_FIRST(VISIT_MODEL)
    for (int layer = 0; layer < c->n_layer; layer++) {
        TENSORS_LAYER(VISIT_LAYER)
    }
    TENSORS_LAST(VISIT_MODEL)
#undef VISIT
#undef VISIT_MODEL
#undef VISIT_LAYER
}

typedef struct {
    unsigned char *base; // NULL: only measure
    size_t offset, n_params;
} Layout;

static void layout_tensor(void *context, const TensorInfo *info, Tensor *w) {
    Layout *at = context;
    (void)info;
    at->offset = size_add(at->offset, (ALIGN - at->offset % ALIGN) % ALIGN);
    if (at->base) {
        w->data = at->base + at->offset;
        fix_tensor_endian(w);
    }
    at->offset = size_add(at->offset, tensor_bytes(w));
    at->n_params += tensor_elements(w);
}

// Bytes from the first tensor to the end of the last; SIZE_MAX when the config asks for more than a
// size_t. n_layer may still be a lie here, so nothing of its size is allocated: layers start
// aligned, so each adds what the second one adds.
static size_t config_tensor_bytes(const Config *config) {
    Layer layers[2];
    Model probe = {.config = *config, .layer = layers};
    size_t total[3] = {0};
    for (int n_layer = 1; n_layer <= 2; n_layer++) {
        Layout at = {0};
        probe.config.n_layer = n_layer;
        each_tensor(&probe, layout_tensor, &at);
        total[n_layer] = at.offset;
    }
    if (total[2] == SIZE_MAX) return SIZE_MAX;
    return size_add(total[1], size_mul(total[2] - total[1], (size_t)config->n_layer - 1));
}

// A_neg and conv_t for every layer, from A_log and conv as they are now.
static void refresh_derived(Model *m) {
    const Config *c = &m->config;
    size_t E = (size_t)c->E, per_layer = (size_t)(c->N + c->K) * E;
    for (int layer = 0; layer < c->n_layer; layer++) {
        Layer *w = &m->layer[layer];
        float *A_neg = m->derived + per_layer * (size_t)layer, *conv_t = A_neg + (size_t)c->N * E;
        for (size_t e = 0; e < E; e++) {
            for (int n = 0; n < c->N; n++) A_neg[n * E + e] = -expf(f32(&w->A_log)[e * c->N + n]);
            for (int k = 0; k < c->K; k++) conv_t[k * E + e] = f32(&w->conv)[e * c->K + k];
        }
        w->A_neg = A_neg, w->conv_t = conv_t;
    }
}

// 0, or -1 after fail().
static int make_derived(Model *m) {
    const Config *c = &m->config;
    m->derived = alloc_aligned(size_mul(size_mul((size_t)(c->N + c->K), (size_t)c->E),
                                        size_mul((size_t)c->n_layer, sizeof(float))));
    if (m->derived) refresh_derived(m);
    return m->derived ? 0 : -1;
}

SHARED void mamba_free(Model *m) {
    if (!m) return;
    if (m->tokenizer) tokenizer_close(m->tokenizer);
    memory_free(m->own_blob);
    if (m->file && !m->borrowed) file_unmap(m->file, m->file_bytes, m->mapped);
    free_aligned(m->weights);
    free_aligned(m->derived);
    memory_free(m->layer);
    memory_free(m);
}

// A model of this shape in memory, all weights zero, no tokenizer. NULL after fail().
static Model *blank_model(const Config *config) {
    Model *m = memory_zeroed(1, sizeof *m);
    if (!m) return fail("out of memory"), NULL;
    m->config = *config;
    m->layer = memory_zeroed((size_t)config->n_layer, sizeof *m->layer);
    if (!m->layer) fail("out of memory: %d layers", config->n_layer);
    m->tensors_bytes = config_tensor_bytes(config);
    if (!m->layer) fail("out of memory: %d layers", config->n_layer);
    else m->weights = alloc_aligned(m->tensors_bytes);
    if (!m->weights) {
        mamba_free(m);
        return NULL;
    }
    fit_default_team(); // that fills the weights
    Layout at = {.base = m->weights};
    each_tensor(m, layout_tensor, &at);
    m->n_params = at.n_params;
    if (config->flags & FLAG_TIED) m->head = m->embedding;
    return m;
}
