// --- checkpoints: a training run at one moment, from which it goes on bit for bit
// One file, so that everything in it is of one moment: the checkpoint's header, model.bin's header,
// the tokenizer's blob, the weights, and the two moments of AdamW, all float32.

enum { CHECKPOINT_HEADER = 1024, CHECKPOINT_VERSION = 1 };
enum { RUN_TEXT = 768 }; // bytes

// What a checkpoint keeps for the program that trains. mamba.c itself uses none of it.
typedef struct {
    char text[RUN_TEXT]; // tells runs apart, such as "data a.txt, rate 0.01"; commas between parts
    uint64_t random;     // state of the generator that draws the batches
    double held_loss;    // the last loss on text that is not trained on; NAN: none
    double seconds;      // spent in training
} TrainRun;

typedef struct { // what the header says
    TrainRun run;
    uint64_t step, tokenizer_bytes, tensors_bytes;
    uint32_t model_crc, moment_crc, moment2_crc;
} CheckpointHeader;

#define AT(member) offsetof(CheckpointHeader, member)
static const Field CHECKPOINT_FIELDS[] = {
    {"step", 16, FIELD_U64, 1, ANY_U64, AT(step)},
    {"random", 24, FIELD_U64, 1, ANY_U64, AT(run.random)},
    {"held-out loss", 32, FIELD_F64, 1, ANY_F64, AT(run.held_loss)},
    {"seconds", 40, FIELD_F64, 1, ANY_F64, AT(run.seconds)},
    {"tokenizer bytes", 48, FIELD_U64, 1, ANY_U64, AT(tokenizer_bytes)},
    {"tensors bytes", 56, FIELD_U64, 1, ANY_U64, AT(tensors_bytes)},
    {"model checksum", 64, FIELD_U32, 1, ANY_U32, AT(model_crc)},
    {"moment checksum", 68, FIELD_U32, 1, ANY_U32, AT(moment_crc)},
    {"second moment checksum", 72, FIELD_U32, 1, ANY_U32, AT(moment2_crc)},
    {"run", 128, FIELD_TEXT, RUN_TEXT, ANY_TEXT, AT(run.text)},
};
#undef AT
static const HeaderFormat CHECKPOINT_FORMAT = {{'m', 'a', 'm', 'b', 'a', '.', 't', '\n'},
                                               CHECKPOINT_VERSION,
                                               CHECKPOINT_HEADER,
                                               "a checkpoint",
                                               CHECKPOINT_FIELDS,
                                               NUMBER_OF(CHECKPOINT_FIELDS)};

// Weights and moments to the order of bytes in files, or back.
static void swap_training(const Trainer *x) {
    const size_t bytes = x->model->tensors_bytes;
    fix_endian(x->model->weights, bytes, sizeof(float));
    fix_endian(x->moment, bytes, sizeof(float));
    fix_endian(x->moment2, bytes, sizeof(float));
}

// The text of run with zeros after it.
static void run_text(char text[RUN_TEXT], const TrainRun *run) {
    memset(text, 0, RUN_TEXT);
    for (int i = 0; i < RUN_TEXT && run->text[i]; i++) text[i] = run->text[i];
}

// Writes weights, moments and step of the trainer, and what `run` says. Brings the numbers back
// from a GPU first. 0, or -1 after fail(), an older file untouched.
int mamba_checkpoint_save(Trainer *x, const TrainRun *run, const char *path) {
    const Model *m = x->model;
    const size_t bytes = m->tensors_bytes;
    unsigned char header[CHECKPOINT_HEADER], model[HEADER_BYTES];
    if (mamba_trainer_fetch(x, false)) return -1;
    swap_training(x);
    model_header(model, m);
    CheckpointHeader h = {
        .run = *run,
        .step = x->step,
        .tokenizer_bytes = m->tokenizer_bytes,
        .tensors_bytes = bytes,
        .model_crc = crc32_of(0, model, HEADER_BYTES),
        .moment_crc = crc32_of(0, x->moment, bytes),
        .moment2_crc = crc32_of(0, x->moment2, bytes),
    };
    run_text(h.run.text, run);
    header_write(header, &CHECKPOINT_FORMAT, &h);
    const Piece piece[] = {
        {header, sizeof header}, {model, sizeof model}, {m->tokenizer_blob, m->tokenizer_bytes},
        {m->weights, bytes},     {x->moment, bytes},    {x->moment2, bytes}};
    int result = write_pieces(path, piece, NUMBER_OF(piece));
    swap_training(x);
    return result;
}

// Names the first part in which the text of the checkpoint's run differs from that of this run.
static int fail_other_run(const char *path, const char *stored, const char *here) {
    char there[RUN_TEXT + 1] = {0}, now[RUN_TEXT + 1] = {0}; // either may fill its array
    size_t from = 0;
    memcpy(there, stored, RUN_TEXT);
    memcpy(now, here, RUN_TEXT);
    for (size_t i = 0; there[i] && there[i] == now[i]; i++)
        if (there[i] == ',') from = i + 1;
    return fail("%s: the checkpoint is of another run: it has%.*s, this one has%.*s", path,
                (int)strcspn(there + from, ","), there + from, (int)strcspn(now + from, ","),
                now + from);
}

// Whether the model.bin header `here` is that of m, with the weights of another moment.
static bool same_model(const unsigned char *here, const ModelHeader *stored, const Model *m) {
    unsigned char want[HEADER_BYTES];
    const ModelHeader header = header_of_model(m, stored->tensors_crc);
    header_write(want, &MODEL_FORMAT, &header);
    return !memcmp(want, here, HEADER_BYTES);
}

static int check_checkpoint(const Trainer *x, const TrainRun *run, const unsigned char *file,
                            size_t size, const char *path) {
    const size_t bytes = x->model->tensors_bytes, tokenizer_bytes = x->model->tokenizer_bytes;
    const unsigned char *model = file + CHECKPOINT_HEADER;
    const unsigned char *weights = model + HEADER_BYTES + tokenizer_bytes;
    CheckpointHeader h;
    ModelHeader stored;
    char text[RUN_TEXT];
    if (!header_is(file, size, &CHECKPOINT_FORMAT) ||
        !header_version_fits(file, &CHECKPOINT_FORMAT))
        return fail("%s: not a training checkpoint of this version", path);
    if (!header_is_whole(file, &CHECKPOINT_FORMAT))
        return fail("%s: the checkpoint is damaged", path);
    header_read(&h, &CHECKPOINT_FORMAT, file);
    run_text(text, run);
    if (memcmp(h.run.text, text, RUN_TEXT)) return fail_other_run(path, h.run.text, text);
    if (h.tokenizer_bytes != tokenizer_bytes || h.tensors_bytes != bytes ||
        size != CHECKPOINT_HEADER + HEADER_BYTES + tokenizer_bytes + 3 * bytes)
        return fail("%s: the checkpoint is truncated or of another model", path);
    header_read(&stored, &MODEL_FORMAT, model);
    if (crc32_of(0, model, HEADER_BYTES) != h.model_crc ||
        crc32_of(0, weights, bytes) != stored.tensors_crc ||
        crc32_of(0, weights + bytes, bytes) != h.moment_crc ||
        crc32_of(0, weights + 2 * bytes, bytes) != h.moment2_crc)
        return fail("%s: the checkpoint is damaged", path);
    if (!same_model(model, &stored, x->model))
        return fail("%s: the checkpoint is of another model: sizes, options or tokenizer differ",
                    path);
    if (tokenizer_bytes && memcmp(model + HEADER_BYTES, x->model->tokenizer_blob, tokenizer_bytes))
        return fail("%s: the checkpoint is damaged", path);
    return 0;
}

// Takes weights, moments and step from a checkpoint of the same run, and fills in the rest of run.
// run->text must be as it was saved, and the model of the same shape and tokenizer. 0, or -1 after
// fail(): then trainer and run are untouched, unless a GPU failed.
int mamba_checkpoint_load(Trainer *x, TrainRun *run, const char *path) {
    const size_t bytes = x->model->tensors_bytes;
    size_t size = 0;
    bool mapped;
    CheckpointHeader h;
    unsigned char *file = file_map(path, &size, &mapped);
    if (!file) return -1;
    int result = check_checkpoint(x, run, file, size, path);
    if (result == 0) {
        const unsigned char *weights = file + size - 3 * bytes;
        header_read(&h, &CHECKPOINT_FORMAT, file);
        *run = h.run;
        x->step = h.step;
        memcpy(x->model->weights, weights, bytes);
        memcpy(x->moment, weights + bytes, bytes);
        memcpy(x->moment2, weights + 2 * bytes, bytes);
        swap_training(x);
        refresh_derived(x->model);
        result = mamba_trainer_fetch(x, true);
    }
    file_unmap(file, size, mapped);
    return result;
}
