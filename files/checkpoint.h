// --- checkpoints: a training run at one moment, from which it goes on bit for bit
// One file, so that everything in it is of one moment: the checkpoint's header, the settings of the
// program that trains, model.bin's header, the tokenizer's blob, the weights, the two moments of
// AdamW, and the states that passes carry on, all float32. Settings and states may have no bytes.

enum { CHECKPOINT_HEADER = 1024, CHECKPOINT_VERSION = 3 };
enum { RUN_TEXT = 768 };          // bytes
enum { SETTINGS_MOST = 1 << 20 }; // bytes

// What a checkpoint keeps for the program that trains. mamba.c itself uses none of it.
typedef struct {
    char text[RUN_TEXT];  // tells runs apart, such as "data a.txt, rate 0.01"; commas between parts
    uint64_t random;      // state of the generator that draws the batches
    double held_loss;     // the last loss on text that is not trained on; NAN: none
    double seconds;       // spent in training
    const char *settings; // any bytes, from which the program can go on; or NULL
    size_t settings_bytes;
} TrainRun;

typedef struct { // what the header says
    TrainRun run;
    uint64_t step, tokenizer_bytes, tensors_bytes, states_bytes;
    uint32_t model_crc, moment_crc, moment2_crc, settings_bytes, settings_crc, states_crc;
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
    {"settings bytes", 76, FIELD_U32, 1, 0, SETTINGS_MOST, AT(settings_bytes)},
    {"settings checksum", 80, FIELD_U32, 1, ANY_U32, AT(settings_crc)},
    {"states checksum", 84, FIELD_U32, 1, ANY_U32, AT(states_crc)},
    {"states bytes", 88, FIELD_U64, 1, ANY_U64, AT(states_bytes)},
    {"run", 128, FIELD_TEXT, RUN_TEXT, ANY_TEXT, AT(run.text)},
};
#undef AT
static const HeaderFormat CHECKPOINT_FORMAT = {{'m', 'a', 'm', 'b', 'a', '.', 't', '\n'},
                                               CHECKPOINT_VERSION,
                                               CHECKPOINT_HEADER,
                                               "a checkpoint",
                                               CHECKPOINT_FIELDS,
                                               NUMBER_OF(CHECKPOINT_FIELDS)};

// Weights, moments and states to the order of bytes in files, or back.
static void swap_training(const Trainer *x) {
    const size_t bytes = x->model->tensors_bytes;
    fix_endian(x->model->weights, bytes, sizeof(float));
    fix_endian(x->moment, bytes, sizeof(float));
    fix_endian(x->moment2, bytes, sizeof(float));
    fix_endian(x->carried.h, carried_floats(x) * sizeof(float), sizeof(float));
}

// The text of run with zeros after it.
static void run_text(char text[RUN_TEXT], const TrainRun *run) {
    memset(text, 0, RUN_TEXT);
    for (int i = 0; i < RUN_TEXT && run->text[i]; i++) text[i] = run->text[i];
}

// Writes weights, moments, states and step of the trainer, and what `run` says. Brings the numbers
// back from a GPU first. 0, or -1 after fail(), an older file untouched.
int mamba_checkpoint_save(Trainer *x, const TrainRun *run, const char *path) {
    const Model *m = x->model;
    const size_t bytes = m->tensors_bytes, states = carried_floats(x) * sizeof(float);
    unsigned char header[CHECKPOINT_HEADER], model[HEADER_BYTES];
    if (run->settings_bytes > SETTINGS_MOST)
        return fail("%s: the settings of the run are longer than %d bytes", path, SETTINGS_MOST);
    if (mamba_trainer_fetch(x, false)) return -1;
    swap_training(x);
    model_header(model, m);
    CheckpointHeader h = {
        .run = *run,
        .step = x->step,
        .tokenizer_bytes = m->tokenizer_bytes,
        .tensors_bytes = bytes,
        .states_bytes = states,
        .model_crc = crc32_of(0, model, HEADER_BYTES),
        .moment_crc = crc32_of(0, x->moment, bytes),
        .moment2_crc = crc32_of(0, x->moment2, bytes),
        .settings_bytes = (uint32_t)run->settings_bytes,
        .settings_crc = crc32_of(0, run->settings, run->settings_bytes),
        .states_crc = crc32_of(0, x->carried.h, states),
    };
    run_text(h.run.text, run);
    header_write(header, &CHECKPOINT_FORMAT, &h);
    const Piece piece[] = {{header, sizeof header}, {run->settings, run->settings_bytes},
                           {model, sizeof model},   {m->tokenizer_blob, m->tokenizer_bytes},
                           {m->weights, bytes},     {x->moment, bytes},
                           {x->moment2, bytes},     {x->carried.h, states}};
    int result = write_pieces(path, piece, NUMBER_OF(piece));
    swap_training(x);
    return result;
}

// Names the first part in which the text of a run differs from that of this run, after `what`.
static int fail_other_run(const char *what, const char *stored, const char *here) {
    char there[RUN_TEXT + 1] = {0}, now[RUN_TEXT + 1] = {0}; // either may fill its array
    size_t from = 0, i = 0;
    memcpy(there, stored, RUN_TEXT);
    memcpy(now, here, RUN_TEXT);
    for (; there[i] && there[i] == now[i]; i++)
        if (there[i] == ',') from = i + 1;
    const char *longer = there[i] ? there + i : now + i; // one may end with a part, the other go on
    if (there[i] + now[i] == ',')
        return fail("%s: %s has%.*s, %s has not", what, there[i] ? "it" : "this one",
                    (int)strcspn(longer + 1, ","), longer + 1, there[i] ? "this one" : "it");
    const char *const clause[] = {there + from, now + from};
    size_t n[] = {strcspn(clause[0], ","), strcspn(clause[1], ",")};
    for (int k = 0; k < 2; k++) { // of two schedules, the names, not their steps
        const char *steps = strstr(clause[k], " over ");
        const size_t name = steps ? (size_t)(steps - clause[k]) : n[k];
        if (name < n[k] && memcmp(clause[0], clause[1], name + 1)) n[k] = name;
    }
    return fail("%s: it has%.*s, this one has%.*s (a run keeps its settings)", what, (int)n[0],
                clause[0], (int)n[1], clause[1]);
}

// Whether the model.bin header `here` is that of m, with the weights of another moment.
static bool same_model(const unsigned char *here, const ModelHeader *stored, const Model *m) {
    unsigned char want[HEADER_BYTES];
    const ModelHeader header = header_of_model(m, stored->tensors_crc);
    header_write(want, &MODEL_FORMAT, &header);
    return !memcmp(want, here, HEADER_BYTES);
}

// The header h of a checkpoint file, and its settings. 0, or -1 after fail().
static int read_checkpoint_header(CheckpointHeader *h, const unsigned char *file, size_t size,
                                  const char *path) {
    if (!header_is(file, size, &CHECKPOINT_FORMAT) ||
        !header_version_fits(file, &CHECKPOINT_FORMAT))
        return fail("%s: not a training checkpoint of this version", path);
    if (!header_is_whole(file, &CHECKPOINT_FORMAT))
        return fail("%s: the checkpoint is damaged", path);
    header_read(h, &CHECKPOINT_FORMAT, file);
    if (h->settings_bytes > SETTINGS_MOST || h->settings_bytes > size - CHECKPOINT_HEADER ||
        crc32_of(0, file + CHECKPOINT_HEADER, h->settings_bytes) != h->settings_crc)
        return fail("%s: the checkpoint is damaged", path);
    h->run.settings_bytes = h->settings_bytes;
    h->run.settings = h->settings_bytes ? (const char *)file + CHECKPOINT_HEADER : NULL;
    return 0;
}

static int check_checkpoint(const Trainer *x, const TrainRun *run, const unsigned char *file,
                            size_t size, const char *path) {
    const size_t bytes = x->model->tensors_bytes, tokenizer_bytes = x->model->tokenizer_bytes,
                 states = carried_floats(x) * sizeof(float);
    CheckpointHeader h;
    ModelHeader stored;
    char text[RUN_TEXT];
    if (read_checkpoint_header(&h, file, size, path)) return -1;
    const unsigned char *model = file + CHECKPOINT_HEADER + h.settings_bytes;
    const unsigned char *weights = model + HEADER_BYTES + tokenizer_bytes;
    run_text(text, run);
    if (memcmp(h.run.text, text, RUN_TEXT)) {
        fail_other_run("the checkpoint is of another run", h.run.text, text);
        return fail_in(path);
    }
    if (h.tokenizer_bytes != tokenizer_bytes || h.tensors_bytes != bytes ||
        h.states_bytes != states ||
        size != CHECKPOINT_HEADER + h.settings_bytes + HEADER_BYTES + tokenizer_bytes + 3 * bytes +
                    states)
        return fail("%s: the checkpoint is truncated or of another model", path);
    header_read(&stored, &MODEL_FORMAT, model);
    if (crc32_of(0, model, HEADER_BYTES) != h.model_crc ||
        crc32_of(0, weights, bytes) != stored.tensors_crc ||
        crc32_of(0, weights + bytes, bytes) != h.moment_crc ||
        crc32_of(0, weights + 2 * bytes, bytes) != h.moment2_crc ||
        crc32_of(0, weights + 3 * bytes, states) != h.states_crc)
        return fail("%s: the checkpoint is damaged", path);
    if (!same_model(model, &stored, x->model))
        return fail("%s: the checkpoint is of another model: sizes, options or tokenizer differ",
                    path);
    if (tokenizer_bytes && memcmp(model + HEADER_BYTES, x->model->tokenizer_blob, tokenizer_bytes))
        return fail("%s: the checkpoint is damaged", path);
    return 0;
}

// Takes weights, moments, states and step from a checkpoint of the same run, and fills in the rest
// of run. run->text must be as it was saved, and the model of the same shape and tokenizer. 0, or
// -1 after fail(): then trainer and run are untouched, unless a GPU failed.
int mamba_checkpoint_load(Trainer *x, TrainRun *run, const char *path) {
    const size_t bytes = x->model->tensors_bytes, states = carried_floats(x) * sizeof(float);
    size_t size = 0;
    bool mapped;
    CheckpointHeader h;
    unsigned char *file = file_map(path, &size, &mapped);
    if (!file) return -1;
    int result = check_checkpoint(x, run, file, size, path);
    if (result == 0) result = read_checkpoint_header(&h, file, size, path);
    if (result == 0) {
        const unsigned char *weights = file + size - 3 * bytes - states;
        h.run.settings = run->settings; // those of this program go on
        h.run.settings_bytes = run->settings_bytes;
        *run = h.run;
        x->step = h.step;
        memcpy(x->model->weights, weights, bytes);
        memcpy(x->moment, weights + bytes, bytes);
        memcpy(x->moment2, weights + 2 * bytes, bytes);
        if (states) memcpy(x->carried.h, weights + 3 * bytes, states);
        swap_training(x);
        refresh_derived(x->model);
        result = mamba_trainer_fetch(x, true);
    }
    file_unmap(file, size, mapped);
    return result;
}

// What a checkpoint says of its run: *step, and all of run, whose settings are malloc'd, maybe of 0
// bytes, for the caller to free. A NUL follows them. Nothing else of the file is checked. 0, or -1
// after fail().
int mamba_checkpoint_peek(TrainRun *run, uint64_t *step, const char *path) {
    size_t size = 0;
    bool mapped;
    CheckpointHeader h;
    unsigned char *file = file_map(path, &size, &mapped);
    if (!file) return -1;
    int result = read_checkpoint_header(&h, file, size, path);
    if (result == 0) {
        char *settings = malloc((size_t)h.settings_bytes + 1);
        if (!settings) result = fail("%s: out of memory: its settings", path);
        else if (h.settings_bytes) memcpy(settings, h.run.settings, h.settings_bytes);
        *run = h.run;
        *step = h.step;
        run->settings = settings;
        if (settings) settings[h.settings_bytes] = 0;
    }
    file_unmap(file, size, mapped);
    return result;
}
