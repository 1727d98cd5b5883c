// files/verify.h: mamba_load() checks the header and the tokenizer; this checks the weights.

static bool row_is_finite(const Tensor *w, int row) {
    enum { VALUES = 1024 };
    float value[VALUES];
    // F16's infinity and NaN become numbers above 65504, its largest.
    const float highest = w->type == F16 ? 65504 : FLT_MAX;
    for (int from = 0; from < w->cols; from += VALUES) {
        int n = w->cols - from < VALUES ? w->cols - from : VALUES;
        tensor_widen(value, w, row, from, n);
        for (int i = 0; i < n; i++)
            if (!(fabsf(value[i]) <= highest)) return false;
    }
    return true;
}

// context: the label of the first tensor with a value that is not finite; empty: none so far.
static void verify_tensor(void *context, const TensorInfo *info, Tensor *w) {
    char *bad = context;
    for (int row = 0; row < w->rows && !bad[0]; row++)
        if (!row_is_finite(w, row)) tensor_label(bad, info);
}

// Whether every weight is finite and, of a model from a file, every byte fits its checksum. 0, or
// -1 after fail().
int mamba_verify(const Model *m) {
    char bad[LABEL] = "";
    each_tensor((Model *)(uintptr_t)m, verify_tensor, bad);
    if (bad[0]) return fail("%s holds a value that is not finite", bad);
    if (!m->file) return 0;
    swap_model(m); // the checksum is of the bytes as stored
    uint32_t crc = crc32_of(0, tensor_arena(m), m->tensors_bytes);
    swap_model(m);
    if (crc == m->tensors_crc) return 0;
    return fail("the checksum of the tensors does not match: the file is damaged");
}
