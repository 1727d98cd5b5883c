// -------------------------------------------------------------------------------------------------
// 9 Quantiser
// Q8 and Q4 from wider weights, a tile at a time; mamba.c describes a tile beside tile_bytes(). The
// scale of a row in a tile is its largest weight divided by a divisor. Q8 always takes 127. Q4
// tries 22 divisors and takes the one with the smallest sum of squared errors: for normally
// distributed weights the error is 8.1% instead of 9.7%.
// export.py writes the same bytes, because nothing here depends on how a machine rounds: a scale is
// rounded before it divides, weight - code * scale is exact, and so is its square.

static float round_bf16(float x) { // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The code of weight w: w / scale to the nearest whole number, ties to even, by the constant that
// exp_vec rounds with.
static inline float code_of(float w, float scale, Type type) {
    float code = w / (scale == 0 ? 1 : scale) + 12582912.0f;
    code -= 12582912.0f;
    float lowest = type == Q8 ? -127 : -8, highest = type == Q8 ? 127 : 7;
    return code < lowest ? lowest : code > highest ? highest : code;
}

// For each row r the scale of w[.][r] over a divisor, where that makes a smaller error than the
// best one before.
static void try_divisor(float scale[TILE], double error[TILE], float w[TILE][TILE],
                        const float peak[TILE], float divisor, Type type) {
    float tried[TILE];
    double sum[TILE] = {0};
    for (int r = 0; r < TILE; r++) tried[r] = round_bf16(peak[r] / divisor);
    for (int k = 0; k < TILE; k++)
        for (int r = 0; r < TILE; r++) {
            float off = w[k][r] - code_of(w[k][r], tried[r], type) * tried[r];
            sum[r] += (double)off * (double)off;
        }
    for (int r = 0; r < TILE; r++)
        if (sum[r] < error[r]) {
            error[r] = sum[r];
            scale[r] = tried[r];
        }
}

// tile = w, where w[k][r] is input k of row r; all finite.
static void quantize_tile(unsigned char *tile, float w[TILE][TILE], Type type) {
    int bits = code_bits(type);
    float peak[TILE] = {0}, scale[TILE] = {0};
    double error[TILE];
    for (int r = 0; r < TILE; r++) error[r] = INFINITY;
    for (int k = 0; k < TILE; k++)
        for (int r = 0; r < TILE; r++)
            if (fabsf(w[k][r]) > fabsf(peak[r])) peak[r] = w[k][r];
    if (type == Q8) try_divisor(scale, error, w, peak, 127, type);
    else
        for (int quarters = 24; quarters <= 34; quarters++)
            for (int sign = -1; sign <= 1; sign += 2)
                try_divisor(scale, error, w, peak, (float)(sign * quarters) / 4, type);
    for (int r = 0; r < TILE; r++) {
        float s = scale[r] == 0 ? 0 : scale[r]; // not -0
        uint32_t word[TILE] = {0}, scale_bits;
        memcpy(&scale_bits, &s, sizeof scale_bits);
        half upper = (half)(scale_bits >> 16);
        memcpy(tile + (size_t)r * sizeof upper, &upper, sizeof upper);
        for (int k = 0; k < TILE; k++) {
            int code = (int)code_of(w[k][r], s, type) + (1 << (bits - 1));
            word[k / (32 / bits)] |= (uint32_t)code << (k % (32 / bits) * bits);
        }
        for (int i = 0; i < bits; i++) {
            word[i] ^= 0x80000000u; // the last code's highest bit: two's complement
            memcpy(tile + TILE_SCALES + (size_t)(i * TILE + r) * 4, &word[i], 4);
        }
    }
}

// Fills the tiles of a Q8 or Q4 tensor; 0, or -1 where a weight is not finite.
static int quantize_tensor(const Tensor *to, const Tensor *from) {
    size_t tiles = tiles_of((size_t)to->cols);
    int bad = 0;
#pragma omp parallel for reduction(| : bad)
    for (int r0 = 0; r0 < to->rows; r0 += TILE)
        for (int k0 = 0; k0 < to->cols; k0 += TILE) {
            float w[TILE][TILE] = {{0}}, row[TILE];
            int n = to->cols - k0 < TILE ? to->cols - k0 : TILE;
            for (int r = 0; r < TILE && r0 + r < to->rows; r++) {
                tensor_widen(row, from, r0 + r, k0, n);
                for (int k = 0; k < n; k++) {
                    w[k][r] = row[k];
                    bad |= !(fabsf(row[k]) <= FLT_MAX);
                }
            }
            if (!bad)
                quantize_tile((unsigned char *)(uintptr_t)to->data +
                                  ((size_t)(r0 / TILE) * tiles + (size_t)(k0 / TILE)) *
                                      tile_bytes(to->type),
                              w, to->type);
        }
    return bad ? -1 : 0;
}

typedef struct { // the tensors of a model in the file's order
    Tensor **list;
    TensorInfo *info;
    int n;
} TensorList;

static void list_tensor(void *context, const TensorInfo *info, Tensor *w) {
    TensorList *all = context;
    all->info[all->n] = *info;
    all->list[all->n] = w;
    all->n++;
}

static int list_tensors(TensorList *all, Model *m) {
    size_t room = 16 + 16 * (size_t)m->config.n_layer;
    *all = (TensorList){malloc(room * sizeof *all->list), malloc(room * sizeof *all->info), 0};
    if (!all->list || !all->info) return fail("out of memory: a list of %zu tensors", room);
    each_tensor(m, list_tensor, all);
    return 0;
}

static int copy_tensor(const Tensor *to, const Tensor *from, const TensorInfo *info) {
    char label[LABEL];
    if (!is_quantized(to->type))
        for (int row = 0; row < to->rows; row++)
            tensor_widen((float *)(uintptr_t)to->data + (size_t)row * (size_t)to->cols, from, row,
                         0, from->cols);
    else if (quantize_tensor(to, from)) {
        tensor_label(label, info);
        return fail("%s holds a value that is not finite", label);
    }
    return 0;
}

// A copy of a model in memory of its own, with its tokenizer and matrices in F32, Q8 or Q4. NULL
// after fail().
static Model *copy_as(const Model *from, Type type) {
    Config config = from->config;
    config.type = type;
    Model *to = blank_model(&config);
    TensorList source = {NULL, NULL, 0}, target = {NULL, NULL, 0};
    int result = to ? list_tensors(&source, (Model *)(uintptr_t)from) : -1;
    if (result == 0) result = list_tensors(&target, to);
    for (int i = 0; i < source.n && result == 0; i++)
        result = copy_tensor(target.list[i], source.list[i], &source.info[i]);
    free(source.list);
    free(source.info);
    free(target.list);
    free(target.info);
    if (result == 0 && from->tokenizer)
        result = mamba_set_tokenizer(to, from->tokenizer_blob, from->tokenizer_bytes);
    if (result == 0 && make_derived(to) == 0) return to;
    mamba_free(to);
    return NULL;
}

// A copy with all weights in float32, ready to be trained. NULL after fail().
Model *mamba_float_copy(const Model *from) { return copy_as(from, F32); }

// A copy with matrices in 8.5 bits a weight, or 4.5: what the recurrence touches stays float32.
// NULL after fail().
Model *mamba_quantize(const Model *from, bool four_bits) {
    return copy_as(from, four_bits ? Q4 : Q8);
}

// value, of float32, in a storage type that is not quantised. f16: only in its normal range.
static void narrow(void *to, size_t i, float value, Type type) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (type == F32) ((float *)to)[i] = value;
    else if (type == BF16) ((half *)to)[i] = (half)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    else
        ((half *)to)[i] =
            (half)((bits >> 16 & 0x8000) |
                   (fabsf(value) < 0x1p-14f ? 0 : ((bits & 0x7FFFFFFF) - 0x38000000) >> 13));
}

// Stores the weights value[k][r] at rows r0 + r and columns k0 + k of w, of any storage type; r0
// and k0 are multiples of TILE.
static void store_tile(const Tensor *w, int r0, int k0, float value[TILE][TILE]) {
    unsigned char *data = (unsigned char *)(uintptr_t)w->data;
    if (is_quantized(w->type)) {
        size_t tile = (size_t)(r0 / TILE) * tiles_of((size_t)w->cols) + (size_t)(k0 / TILE);
        quantize_tile(data + tile * tile_bytes(w->type), value, w->type);
        return;
    }
    for (int r = 0; r < TILE && r0 + r < w->rows; r++)
        for (int k = 0; k < TILE && k0 + k < w->cols; k++)
            narrow(data, (size_t)(r0 + r) * (size_t)w->cols + (size_t)(k0 + k), value[k][r],
                   w->type);
}
