// Golden files: named tensors that PyTorch and transformers computed (dev/make_golden.py,
// dev/make_train_golden.py). One file is open at a time.

typedef struct {
    char name[64];
    int ndim;
    uint32_t dims[4];
    size_t n;
    float *data;
} Golden;
static Golden golden[640];
static int n_golden;

static void golden_close(void) {
    while (n_golden) free_aligned(golden[--n_golden].data);
}

static float f32_at(const unsigned char *p) {
    uint32_t bits = u32_at(p);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static bool golden_open(const char *path) {
    size_t bytes, at = 8;
    golden_close();
    unsigned char *p = (unsigned char *)read_text(path, &bytes);
    if (!p || bytes < 8 || memcmp(p, "gold", 4)) return free(p), expect(false, path);
    while (at < bytes && n_golden < COUNT(golden)) {
        Golden *g = &golden[n_golden++];
        uint32_t length = u32_at(p + at);
        assert(length < sizeof g->name);
        memset(g, 0, sizeof *g);
        memcpy(g->name, p + at + 4, length);
        at += 4 + length;
        g->ndim = (int)u32_at(p + at);
        assert(g->ndim <= 4);
        at += 4;
        g->n = 1;
        for (int i = 0; i < g->ndim; i++, at += 4) g->n *= g->dims[i] = u32_at(p + at);
        g->data = alloc_aligned(g->n * sizeof(float));
        for (size_t i = 0; i < g->n; i++, at += 4) g->data[i] = f32_at(p + at);
        assert(at <= bytes);
    }
    free(p);
    return at == bytes || expect(false, path); // false: more records than room
}

static const Golden *golden_get(const char *format, ...) {
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    for (int i = 0; i < n_golden; i++)
        if (!strcmp(golden[i].name, name)) return &golden[i];
    return NULL;
}

static int32_t *golden_ids(int *L) {
    const Golden *g = golden_get("ids");
    int32_t *ids = malloc(g->n * sizeof *ids);
    for (size_t i = 0; i < g->n; i++) ids[i] = (int32_t)g->data[i];
    *L = (int)g->n;
    return ids;
}
