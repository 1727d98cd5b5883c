// A checkpoint: [choices][the file], of a run that trains a tiny model of bytes. The file is also
// peeked into, which checks the header alone. With CARRY the run carries states.

#include "fuzz.h"

enum { MEND_SUMS = 1, FILL = 2, MEND_LAYOUT = 4, CARRY = 16 };

static Trainer *tiny_trainer(void) {
    Config c = {.type = F32,
                .flags = FLAG_TIED | FLAG_CONV_BIAS,
                .D = 8,
                .n_layer = 1,
                .V = 16,
                .E = 16,
                .N = 2,
                .K = 4,
                .R = 1,
                .norm_eps = 1e-5f,
                .mixer_eps = 1e-6f,
                .bos = -1,
                .pad = -1,
                .eos = {-1, -1, -1, -1}};
    Model *m = mamba_random_model(&c, 1);
    if (!m || mamba_set_tokenizer(m, NULL, 0)) abort();
    return mamba_trainer_new(m, 1, 8, 0, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Trainer *x;
    static char path[64];
    static const int32_t ids[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    static const AdamW how = {0.001f, 0.9f, 0.99f, 1e-8f, 0.01f, 1};
    if (!x) {
        x = tiny_trainer();
        snprintf(path, sizeof path, "/dev/shm/mamba-fuzz-%ld", (long)getpid());
    }
    if (size < 1) return 0;
    const int choices = data[0];
    if (mamba_trainer_carry(x, choices & CARRY ? 1 : 0)) abort();
    const size_t states = carried_floats(x) * sizeof(float);
    const size_t tensors = x->model->tensors_bytes, blob = x->model->tokenizer_bytes;
    size_t bytes = size - 1;
    const size_t whole = CHECKPOINT_HEADER + HEADER_BYTES + blob + 3 * tensors + states;
    unsigned char *file = calloc(1, bytes + whole + 1);
    memcpy(file, data + 1, bytes);
    size_t settings = bytes >= CHECKPOINT_HEADER ? u32_at(file + 76) : 0;
    if (choices & FILL) bytes = settings < bytes ? whole + settings : whole;
    if (choices & MEND_LAYOUT && bytes >= CHECKPOINT_HEADER) {
        put_u64(file + 48, blob);
        put_u64(file + 56, tensors);
        put_u32(file + 8, CHECKPOINT_VERSION);
        put_u64(file + 88, states);
    }
    const size_t at = CHECKPOINT_HEADER + settings;
    if (choices & MEND_SUMS && settings <= SETTINGS_MOST &&
        at + HEADER_BYTES + blob + 3 * tensors + states <= bytes) {
        unsigned char *model = file + at, *weights = model + HEADER_BYTES + blob;
        const ModelHeader h = header_of_model(x->model, crc32_of(0, weights, tensors));
        if (choices & 8) header_write(model, &MODEL_FORMAT, &h);
        if (choices & 8 && blob) memcpy(model + HEADER_BYTES, x->model->tokenizer_blob, blob);
        put_u32(file + 64, crc32_of(0, model, HEADER_BYTES));
        put_u32(file + 68, crc32_of(0, weights + tensors, tensors));
        put_u32(file + 72, crc32_of(0, weights + 2 * tensors, tensors));
        put_u32(file + 84, crc32_of(0, weights + 3 * tensors, states));
        put_u32(file + 80, crc32_of(0, file + CHECKPOINT_HEADER, settings));
    }
    if (choices & MEND_SUMS) mend_header(file, bytes, CHECKPOINT_HEADER);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(file, 1, bytes, f) != bytes || fclose(f)) abort();
    free(file);
    TrainRun run = {.text = "run"}, peeked = {.text = ""};
    uint64_t step = 0;
    int failed = mamba_checkpoint_peek(&peeked, &step, path);
    must_say_why(failed != 0);
    if (!failed && peeked.settings && peeked.settings[peeked.settings_bytes]) abort();
    if (!failed) free((void *)(uintptr_t)peeked.settings);
    failed = mamba_checkpoint_load(x, &run, path);
    must_say_why(failed != 0);
    double norm;
    if (!failed) {
        double loss = mamba_train_pass_on(x, states ? 0 : -1, ids, ids, 1.0f / 8, true);
        (void)loss;
        must_say_why(mamba_train_step(x, &how, &norm) != 0);
        memset(x->gradient->weights, 0, tensors);
    }
    return 0;
}
