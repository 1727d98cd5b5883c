// State files and checkpoints.

static uint32_t crc_of_file(const char *path) {
    size_t bytes;
    char *text = read_text(path, &bytes);
    if (!text) return 0;
    uint32_t crc = crc32_of(0, text, bytes);
    free(text);
    return crc;
}

// The files of a known state and of a known checkpoint have a known checksum: the formats stay as
// they are.
static void test_formats(void) {
    const char *path = scratch("format.bin");
    Model *m = mamba_load("tests/odd.bin"), *f = mamba_float_copy(m);
    State *s = mamba_state_new(m);
    s->position = 70;
    s->random = 0x123456789abcdef;
    s->n_recent = RECENT;
    for (int i = 0; i < RECENT; i++) s->recent[i] = i * 3;
    s->pending = (Utf8Pending){.bytes = {0xe2, 0x82}, .n = 2};
    for (size_t i = 0; i < s->floats; i++) s->data[i] = (float)i / 64;
    expect(mamba_state_save(m, s, path) == 0 && crc_of_file(path) == 0xa7bb8f5b,
           "the format of a state file");
    Trainer *x = mamba_trainer_new(f, 1, 8, 0, 1);
    for (size_t i = 0; i < f->tensors_bytes / sizeof(float); i++) {
        x->moment[i] = (float)i / 8;
        x->moment2[i] = (float)i / 16;
    }
    x->step = 12;
    TrainRun run = {.text = "a run, of this text", .random = 99, .held_loss = 1.25, .seconds = 2.5};
    expect(mamba_checkpoint_save(x, &run, path) == 0 && crc_of_file(path) == 0x389c4fcc,
           "the format of a checkpoint");
    expect(mamba_save(f, path) == 0 && crc_of_file(path) == 0x7768db1c, "the format of a model");
    remove(path);
    mamba_trainer_free(x);
    mamba_state_free(s);
    mamba_free(f);
    mamba_free(m);
}

// A state file of which one field of the header is changed and the checksum is right again.
static void expect_state_refused(Session *x, const char *path, int offset, uint32_t value,
                                 const char *word) {
    const char *changed = scratch("changed.bin");
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(path, &bytes);
    put_u32(file + offset, value);
    put_u32(file + STATE_HEADER - 4, crc32_of(0, file, STATE_HEADER - 4));
    write_file(changed, file, bytes);
    char name[96];
    snprintf(name, sizeof name, "state field at %d = %u is refused", offset, value);
    bool refused = mamba_state_load(x->model, x->state, changed) == -1;
    report(refused && strstr(error_text, word), name, "%s", refused ? error_text : "loaded");
    free(file);
    remove(changed);
}

static void test_state_fields(Session *x, const char *path) {
    expect_state_refused(x, path, 8, 2, "version 2");
    expect_state_refused(x, path, 12, 511, "version");
    expect_state_refused(x, path, 28, 3, "another shape");
    expect_state_refused(x, path, 40, 5, "recent tokens at position 5");
    expect_state_refused(x, path, 56, 7, "truncated");
    expect_state_refused(x, path, 64, RECENT + 1, "recent tokens");
    expect_state_refused(x, path, 64, RECENT - 1, "recent tokens");
    expect_state_refused(x, path, 68, 100000, "token id 100000");
    expect_state_refused(x, path, 68 + 4 * (RECENT - 1), UINT32_MAX, "token id -1");
    expect_state_refused(x, path, 324, 4, "pending bytes");
    expect_state_refused(x, path, 332, 1, "checksum");
}

static void train_steps(Trainer *x, int steps) {
    const AdamW how = {3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    int32_t ids[24], targets[24];
    double norm;
    for (int step = 0; step < steps; step++) {
        for (int i = 0; i < 24; i++) {
            ids[i] = (int32_t)((x->step * 7 + (uint64_t)i * i) % 30);
            targets[i] = (ids[i] + 1) % 30;
        }
        mamba_train_pass(x, ids, targets, 1.0f / 24, true);
        mamba_train_step(x, &how, &norm);
    }
}

static Trainer *small_trainer(float norm_eps, uint64_t seed) {
    const Config c = {.flags = FLAG_TIED | FLAG_CONV_BIAS,
                      .D = 12,
                      .n_layer = 2,
                      .V = 40,
                      .E = 24,
                      .N = 3,
                      .K = 4,
                      .R = 1,
                      .norm_eps = norm_eps,
                      .bos = -1,
                      .pad = -1,
                      .eos = {-1, -1, -1, -1}};
    Model *m = mamba_random_model(&c, seed);
    mamba_set_tokenizer(m, NULL, 0);
    return mamba_trainer_new(m, 2, 12, 0, 1);
}

static void small_trainer_free(Trainer *x) {
    Model *m = x->model;
    mamba_trainer_free(x);
    mamba_free(m);
}

static bool same_training(const Trainer *x, const Trainer *y) {
    const size_t bytes = x->model->tensors_bytes;
    return x->step == y->step && !memcmp(x->model->weights, y->model->weights, bytes) &&
           !memcmp(x->moment, y->moment, bytes) && !memcmp(x->moment2, y->moment2, bytes);
}

static void test_damaged_checkpoints(Trainer *x, const char *path, int count) {
    const char *changed = scratch("changed.bin");
    Trainer *y = small_trainer(1e-5f, 2), *fresh = small_trainer(1e-5f, 2);
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(path, &bytes);
    int refused = 0;
    for (int i = 0; i < count; i++) {
        const size_t at = random_u64(&test_random) % (i % 2 ? bytes : CHECKPOINT_HEADER + 300);
        const size_t n = i % 10 == 9 ? at : bytes; // every tenth is cut
        file[at] ^= 16;
        write_file(changed, file, n);
        TrainRun run = {.text = "a run"};
        refused += mamba_checkpoint_load(y, &run, changed) == -1 && run.random == 0;
        file[at] ^= 16;
    }
    report(refused == count, "damaged checkpoints", "%d of %d refused", refused, count);
    expect(same_training(y, fresh), "and the trainer stays as it was");
    TrainRun run = {.text = "a run"};
    expect(mamba_checkpoint_load(y, &run, path) == 0 && same_training(x, y),
           "the whole one is loaded");
    free(file);
    remove(changed);
    small_trainer_free(y);
    small_trainer_free(fresh);
}

// States that passes carry on are in the checkpoint.
static void test_carried_checkpoint(void) {
    const char *path = scratch("run.train"), *changed = scratch("changed.bin");
    Trainer *x = small_trainer(1e-5f, 1), *y = small_trainer(1e-5f, 2);
    TrainRun run = {.text = "a run"};
    int32_t ids[25];
    for (int i = 0; i < 25; i++) ids[i] = i * i % 30;
    expect(mamba_trainer_carry(x, 2) == 0 && mamba_trainer_carry(y, 2) == 0, "room to carry");
    for (int place = 0; place < 2; place++)
        mamba_train_pass_on(x, place, ids + place, ids, 1, false);
    expect(mamba_checkpoint_save(x, &run, path) == 0 && mamba_checkpoint_load(y, &run, path) == 0 &&
               same_training(x, y),
           "a checkpoint of carried states");
    for (int place = 0; place < 2; place++)
        expect(mamba_train_pass_on(x, place, ids, ids, 1, false) ==
                   mamba_train_pass_on(y, place, ids, ids, 1, false),
               "and passes go on from them");
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(path, &bytes);
    file[bytes - 5] ^= 16; // in a state
    write_file(changed, file, bytes);
    expect(mamba_checkpoint_load(y, &run, changed) == -1 && strstr(error_text, "damaged"),
           "damaged carried states");
    mamba_trainer_carry(y, 1);
    expect(mamba_checkpoint_load(y, &run, path) == -1 && strstr(error_text, "of another model"),
           "a checkpoint of other places");
    free(file);
    remove(path);
    remove(changed);
    small_trainer_free(x);
    small_trainer_free(y);
}

static void test_checkpoints(void) {
    test_carried_checkpoint();
    const char *path = scratch("run.train");
    Trainer *x = small_trainer(1e-5f, 1), *y = small_trainer(1e-5f, 2);
    Trainer *other = small_trainer(1e-4f, 1);
    TrainRun run = {.text = "data a, rate 1", .random = 5, .held_loss = NAN, .seconds = 3};
    train_steps(x, 3);
    expect(mamba_checkpoint_save(x, &run, path) == 0, "a checkpoint is saved");
    TrainRun again = {.text = "data a, rate 1"};
    expect(mamba_checkpoint_load(y, &again, path) == 0 && same_training(x, y) &&
               again.random == 5 && isnan(again.held_loss) && again.seconds == 3,
           "a checkpoint is loaded");
    train_steps(x, 3);
    train_steps(y, 3);
    expect(same_training(x, y), "training goes on with the same bits");
    TrainRun faster = {.text = "data a, rate 2"};
    expect(mamba_checkpoint_load(y, &faster, path) == -1 &&
               strstr(error_text, "it has rate 1, this one has rate 2"),
           "the checkpoint of another run is refused, and the difference is named");
    expect(mamba_checkpoint_load(other, &again, path) == -1 && strstr(error_text, "another model"),
           "so is that of a model with another epsilon");
    Model *m = mamba_load("tests/odd.bin"), *f = mamba_float_copy(m);
    Trainer *larger = mamba_trainer_new(f, 1, 8, 0, 1);
    expect(mamba_checkpoint_load(larger, &again, path) == -1 && strstr(error_text, "another model"),
           "and that of another shape");
    expect(same_training(x, y), "the trainer stays as it was");
    expect(mamba_checkpoint_load(y, &again, "tests/odd.bin") == -1 &&
               strstr(error_text, "not a training checkpoint"),
           "a model is not a checkpoint");
    TrainRun full = {.text = "a run"};
    expect(mamba_checkpoint_save(x, &full, path) == 0, "another checkpoint is saved");
    test_damaged_checkpoints(x, path, test_everything ? 3000 : 300);
    memset(full.text, 'x', sizeof full.text); // no 0 at the end
    expect(mamba_checkpoint_save(x, &full, path) == 0 && mamba_checkpoint_load(y, &full, path) == 0,
           "a text that fills its room");
    remove(path);
    mamba_trainer_free(larger);
    mamba_free(f);
    mamba_free(m);
    small_trainer_free(x);
    small_trainer_free(y);
    small_trainer_free(other);
}

// Random bytes in random places, with and without a valid checksum: refused or loaded, never a
// crash.
static void test_damaged_states(Session *x, unsigned char *file, size_t bytes, const char *path,
                                int count) {
    int refused = 0, loaded = 0;
    State *fresh = mamba_state_new(x->model);
    for (int i = 0; i < count; i++) {
        unsigned char *copy = malloc(bytes + 64);
        size_t n = bytes;
        memcpy(copy, file, bytes);
        memset(copy + bytes, 0, 64);
        if (i % 4 == 0) n = random_u64(&test_random) % (bytes + 64);
        else
            for (int k = 0; k < 1 + i % 3; k++)
                copy[random_u64(&test_random) % (i % 4 == 1 ? bytes : STATE_HEADER)] =
                    (unsigned char)random_u64(&test_random);
        if (i % 2 && n >= STATE_HEADER)
            put_u32(copy + STATE_HEADER - 4, crc32_of(0, copy, STATE_HEADER - 4));
        write_file(path, copy, n);
        if (mamba_state_load(x->model, fresh, path)) refused++;
        else {
            loaded++;
            mamba_step(x->model, x->acts, fresh, 1);
        }
        free(copy);
    }
    mamba_state_free(fresh);
    report(refused > count / 2 && refused + loaded == count, "damaged state files",
           "%d refused, %d harmless", refused, loaded);
}

static void test_state(void) {
    test_formats();
    test_checkpoints();
    const char *path = scratch("state.bin");
    Session x = test_session("tests/odd.bin", 1), other = test_session("tests/plain.bin", 1);
    Sampling how = {1, 1, 0, 0, 1.1f};
    int32_t ids[100], straight[40], resumed[40];
    for (int t = 0; t < 100; t++) ids[t] = (int32_t)(random_u64(&test_random) % 250);
    x.state->random = 99;
    mamba_prefill(x.model, x.acts, x.state, ids, 100, NULL, NULL);
    State *copy = mamba_state_new(x.model);
    mamba_state_copy(x.model, copy, x.state);
    expect(mamba_state_save(x.model, x.state, path) == 0, "a state is saved");
    for (int i = 0; i < 40; i++) {
        straight[i] = mamba_sample(x.model, x.acts, x.state, &how);
        mamba_step(x.model, x.acts, x.state, straight[i]);
    }
    float *end = copy_floats(x.state->data, x.state->floats);
    mamba_state_reset(x.model, x.state);
    expect(mamba_state_load(x.model, x.state, path) == 0, "a state is loaded");
    for (int way = 0; way < 2; way++) { // loaded, then copied
        for (int i = 0; i < 40; i++) {
            resumed[i] = mamba_sample(x.model, x.acts, x.state, &how);
            mamba_step(x.model, x.acts, x.state, resumed[i]);
        }
        expect(!memcmp(straight, resumed, sizeof straight),
               way ? "same tokens from a copied state" : "same tokens from a loaded state");
        expect(!memcmp(end, x.state->data, x.state->floats * sizeof(float)) &&
                   x.state->position == 140,
               "and the same bits of state");
        mamba_state_copy(x.model, x.state, copy);
    }
    expect(mamba_state_load(other.model, other.state, path) == -1 && strstr(error_text, "shape"),
           "another model's state is refused");
    size_t model_bytes;
    unsigned char *changed = (unsigned char *)read_text("tests/odd.bin", &model_bytes);
    changed[model_bytes - 1] ^= 1; // one weight differs; the checksums are right
    put_u32(changed + 124, crc32_of(0, changed + u64_at(changed + 104),
                                    model_bytes - (size_t)u64_at(changed + 104)));
    put_u32(changed + HEADER_BYTES - 4, crc32_of(0, changed, HEADER_BYTES - 4));
    const char *changed_path = scratch("changed.bin");
    write_file(changed_path, changed, model_bytes);
    Session twin = test_session(changed_path, 1);
    expect(mamba_state_load(twin.model, twin.state, path) == -1 &&
               strstr(error_text, "another model"),
           "so is that of a model of the same shape");
    session_close(&twin);
    free(changed);
    remove(changed_path);
    expect(mamba_state_save(x.model, x.state, "tests/no/such/folder/s.bin") == -1,
           "an unwritable state file is an error");
    expect(mamba_state_load(x.model, x.state, "tests/no-such-file") == -1,
           "a missing state file is an error");
    test_state_fields(&x, path);
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(path, &bytes);
    test_damaged_states(&x, file, bytes, path, test_everything ? 10000 : 400);
    remove(path);
    Config shape;
    parse_shape("130m", "bf16", &shape);
    report(STATE_HEADER + 4 * state_floats(&shape) < 3300000, "a 130m state is under 3.3 MB",
           "%zu bytes", STATE_HEADER + 4 * state_floats(&shape));
    free(file);
    free_aligned(end);
    mamba_state_free(copy);
    session_close(&x);
    session_close(&other);
}
