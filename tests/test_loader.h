// Loader: any file gives an error or a model, never a crash, a hang or a huge allocation.

// Values that overflow something or lie just outside a range.
// clang-format off
static const uint32_t nasty[] = {
    0, 1, 2, 3, 255, 256, 257, 1024, 65535, 65536, 1u << 20, (1u << 20) + 1, 1u << 26, 1u << 30,
    INT32_MAX, 1u << 31, UINT32_MAX - 1, UINT32_MAX};
// clang-format on

static void mend_checksums(unsigned char *file, size_t bytes) {
    if (bytes < HEADER_BYTES) return;
    uint64_t tokenizer = u64_at(file + 96);
    if (tokenizer <= bytes - HEADER_BYTES)
        put_u32(file + 120, crc32_of(0, file + HEADER_BYTES, (size_t)tokenizer));
    put_u32(file + HEADER_BYTES - 4, crc32_of(0, file, HEADER_BYTES - 4));
}

static void damage(unsigned char *file, size_t *bytes, size_t tensors_offset, int i) {
    uint64_t r = random_u64(&test_random), field = 8 + 4 * (random_u64(&test_random) % 61);
    switch (i % 6) {
    case 0: // cut anywhere
        *bytes = r % (*bytes + 1);
        break;
    case 1: // a header field
        put_u32(file + field, nasty[r % COUNT(nasty)]);
        break;
    case 2: // a header field, by a little
        put_u32(file + field, u32_at(file + field) + (uint32_t)(r % 65) - 32);
        break;
    case 3: // a word of the tokenizer or of the tensor list
        put_u32(file + HEADER_BYTES + r % (tensors_offset - HEADER_BYTES), nasty[r >> 32 & 15]);
        break;
    case 4: // a bit there
        file[HEADER_BYTES + r % (tensors_offset - HEADER_BYTES)] ^=
            (unsigned char)(1 << (r >> 60 & 7));
        break;
    case 5: // a weight
        file[tensors_offset + r % (*bytes - tensors_offset)] = (unsigned char)(r >> 56);
        break;
    }
    if (i % 12 < 9) mend_checksums(file, *bytes); // else the checksum refuses it
}

// What a user does with a model: read a prompt, draw some tokens, decode them.
static int use_model(const char *path) {
    Session x;
    if (session_open(&x, path, 1)) return -1;
    Sampling how = {0.8f, 0.95f, 40, 0, 1};
    int32_t *ids = NULL, id = 0;
    size_t n = 0;
    unsigned char *text = malloc(x.model->text_room);
    int result = mamba_encode(x.model, "Once upon a time", 16, &ids, &n);
    if (result == 0) result = mamba_prefill(x.model, x.acts, x.state, ids, n, NULL, NULL);
    for (int i = 0; i < 3 && result == 0 && n; i++) {
        id = mamba_sample(x.model, x.acts, x.state, &how);
        result = id < 0 ? -1 : mamba_step(x.model, x.acts, x.state, id);
        if (result == 0) assert(mamba_decode(x.model, x.state, id, text) <= x.model->text_room);
    }
    FREE(ids, text);
    session_close(&x);
    return result;
}

static void test_damaged_models(const char *model, int count) {
    const char *path = scratch("damaged.bin");
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(model, &bytes), *copy = malloc(bytes + 64);
    int refused = 0, used = 0;
    for (int i = 0; i < count; i++) {
        size_t n = bytes;
        memcpy(copy, file, bytes);
        damage(copy, &n, (size_t)u64_at(file + 104), i);
        write_file(path, copy, n);
        error_text[0] = 0;
        if (use_model(path) == 0) used++;
        else if (error_text[0]) refused++;
    }
    char name[96];
    snprintf(name, sizeof name, "%d damaged copies of %s", count, model);
    report(refused + used == count && refused > count / 3, name,
           "%d refused with a message, %d harmless", refused, used);
    FREE(file, copy);
    remove(path);
}

static void expect_refused(const char *model, int offset, uint32_t value, const char *word) {
    const char *path = scratch("damaged.bin");
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(model, &bytes);
    put_u32(file + offset, value);
    mend_checksums(file, bytes);
    write_file(path, file, bytes);
    Model *m = mamba_load(path);
    char name[96];
    snprintf(name, sizeof name, "header field at %d = %u is refused", offset, value);
    report(!m && strstr(error_text, word), name, "%s", m ? "loaded" : error_text);
    mamba_free(m);
    free(file);
    remove(path);
}

static bool same_files(const char *one, const char *other) {
    size_t bytes[2];
    char *a = read_text(one, &bytes[0]), *b = read_text(other, &bytes[1]);
    bool same = a && b && bytes[0] == bytes[1] && !memcmp(a, b, bytes[0]);
    FREE(a, b);
    return same;
}

// Whatever is loaded is saved as it was, and a model in memory as it will be loaded.
static void test_save(void) {
    const char *models[] = {"tests/odd.bin", "tests/plain.bin", "tests/falcon.bin",
                            "tests/layernorm.bin", "models/tales.bin"};
    const char *path = scratch("saved.bin");
    char name[96];
    for (int i = 0; i < COUNT(models); i++) {
        Model *m = mamba_load(models[i]);
        snprintf(name, sizeof name, "%s is saved as it was", models[i]);
        expect(mamba_save(m, path) == 0 && same_files(models[i], path), name);
        for (int type = F32; type <= Q4; type += type == F32 ? Q8 - F32 : 1) {
            Model *copy = type == F32 ? mamba_float_copy(m) : mamba_quantize(m, type == Q4);
            bool good = copy && mamba_save(copy, path) == 0;
            Model *again = good ? mamba_load(path) : NULL;
            good =
                again && again->config.type == (Type)type && mamba_verify(again) == 0 &&
                again->tensors_bytes == copy->tensors_bytes &&
                !memcmp(copy->weights, again->file + again->tensors_offset, copy->tensors_bytes) &&
                again->text_room == m->text_room &&
                tokenizer_size(copy->tokenizer) == tokenizer_size(m->tokenizer);
            snprintf(name, sizeof name, "and a copy in %s", type_name((Type)type));
            expect(good, name);
            mamba_free(again);
            mamba_free(copy);
        }
        mamba_free(m);
    }
    Config c;
    parse_shape("16,1,50", "f32", &c);
    c.bos = c.pad = -1;
    for (int i = 0; i < 4; i++) c.eos[i] = -1;
    Model *random = mamba_random_model(&c, 3);
    remove(path);
    expect(mamba_save(random, path) == 0, "a model without a tokenizer is saved");
    Model *ids_only = mamba_load(path);
    int32_t *no_ids = NULL;
    size_t n_no_ids = 0;
    expect(ids_only && !ids_only->tokenizer && mamba_verify(ids_only) == 0 &&
               mamba_encode(ids_only, "a", 1, &no_ids, &n_no_ids) == -1 &&
               strstr(error_text, "no tokenizer"),
           "and loaded; its texts are ids only");
    mamba_free(ids_only);
    remove(path);
    expect(mamba_set_tokenizer(random, (const unsigned char *)"mtok", 4) == -1 &&
               !random->tokenizer,
           "a damaged tokenizer is refused");
    expect(mamba_set_tokenizer(random, NULL, 0) == 0 && mamba_save(random, path) == 0,
           "a random model of bytes is saved");
    Model *again = mamba_load(path), *tales = mamba_load("models/tales.bin");
    expect(again && tokenizer_is_bytes(again->tokenizer) &&
               tokenizer_size(again->tokenizer) == (c.V < 256 ? c.V : 256) &&
               !memcmp(random->weights, again->file + again->tensors_offset, random->tensors_bytes),
           "and loaded");
    expect(mamba_set_tokenizer(tales, NULL, 0) == -1, "a loaded model keeps its tokenizer");
    expect(mamba_set_tokenizer(random, tales->tokenizer_blob, tales->tokenizer_bytes) ==
               (tokenizer_size(tales->tokenizer) > c.V ? -1 : 0),
           "a tokenizer larger than the model is refused");
    expect(tokenizer_size(random->tokenizer) <= c.V, "and the old one stays");
    ((float *)random->weights)[5] = NAN;
    expect(mamba_verify(random) == -1 && strstr(error_text, "embedding"), "a NaN is found");
    remove(path);
    mamba_free(random);
    mamba_free(again);
    mamba_free(tales);
}

// Two threads fail at the same time; each reads the reason of its own failure.
static void test_errors_of_threads(void) {
#ifdef _OPENMP
    bool own[2] = {false, false};
    int threads = 1;
#pragma omp parallel num_threads(2)
    {
        const int i = omp_get_thread_num();
        const char *path = i ? "tests/no-file-of-1" : "tests/no-file-of-0";
        Model *m = mamba_load(path);
#pragma omp single
        threads = omp_get_num_threads(); // the barrier here: both have failed
        own[i] = !m && strstr(mamba_error(), path);
    }
    if (threads < 2) skip("an error message for each thread", "only one thread");
    else expect(own[0] && own[1], "an error message for each thread");
#else
    skip("an error message for each thread", "no OpenMP");
#endif
}

// A thread of `eval --task` fails: the caller reads why.
static void test_error_of_a_team(void) {
#ifdef _OPENMP
    Model *m = mamba_load("models/induction.bin");
    Acts *acts[2] = {mamba_acts_new(m, 1), mamba_acts_new(m, 1)};
    const TaskRun run = {.task = TASK_INDUCTION, .L = 8, .samples = 1};
    TaskQueue queue = {.m = m, .run = &run, .left = 1};
    int32_t ids[2][8], targets[2][8];
    const int V = m->config.V;
    m->config.V = 2; // so that no task can be read
    error_text[0] = 0;
#pragma omp parallel num_threads(2)
    if (omp_get_thread_num() == omp_get_num_threads() - 1) {
        const int i = omp_get_thread_num();
        State *s = mamba_state_new(m);
        TaskReader r = {.acts = acts[i], .state = s, .ids = ids[i], .targets = targets[i]};
        r.score = (TaskScore){.targets = targets[i], .V = 2};
        read_sequences(&queue, &r);
        mamba_state_free(s);
    }
    expect(queue.result == -1 && strstr(queue.error, "vocabulary of 2"),
           "the error of a thread of eval --task is kept");
    m->config.V = V;
    mamba_acts_free(acts[0]);
    mamba_acts_free(acts[1]);
    mamba_free(m);
#else
    skip("the error of a thread of eval --task", "no OpenMP");
#endif
}

// mamba_evaluate() is the sum of the losses of each step.
static void test_evaluate(void) {
    Session x = test_session("tests/odd.bin", 1);
    int32_t ids[90];
    double nll = -1, want = 0;
    for (int t = 0; t < 90; t++) ids[t] = (int32_t)(random_u64(&test_random) % 250);
    for (int t = 0; t < 89; t++) {
        mamba_step(x.model, x.acts, x.state, ids[t]);
        want += mamba_nll(x.model, x.state->logits, ids[t + 1]);
    }
    mamba_state_reset(x.model, x.state);
    expect(mamba_evaluate(x.model, x.acts, x.state, ids, 90, &nll) == 0 &&
               fabs(nll - want) <= 1e-5 * want && x.state->position == 90,
           "mamba_evaluate sums the losses of the steps");
    expect(mamba_evaluate(x.model, x.acts, x.state, ids, 1, &nll) == 0 && nll == 0 &&
               mamba_evaluate(x.model, x.acts, x.state, NULL, 0, &nll) == 0 && nll == 0,
           "nothing is predicted of one token or none");
    ids[0] = -1;
    expect(mamba_evaluate(x.model, x.acts, x.state, ids, 2, &nll) == -1,
           "an id outside the vocabulary is refused");
    session_close(&x);
}

static void test_loader(void) {
    test_save();
    test_errors_of_threads();
    test_error_of_a_team();
    test_evaluate();
    const char *odd = "tests/odd.bin";
    expect(!mamba_load("tests/no-such-file") && strstr(error_text, "no-such-file"),
           "a missing file is named");
    expect(!mamba_load("tests"), "a folder is not a model");
    expect(!mamba_load("mamba.c") && strstr(error_text, "not a model.bin"),
           "a text file is not a model");
    expect_refused(odd, 0, 1, "not a model");
    expect_refused(odd, 8, 2, "version");
    expect_refused(odd, 20, 9, "weight type");
    expect_refused(odd, 20, Q8, "truncated");
    expect_refused(odd, 24, 32, "flags");
    expect_refused(odd, 24, FLAG_LAYER_NORM, "truncated");
    expect_refused(odd, 28, 0, "d_model");
    expect_refused(odd, 32, 0, "n_layer");
    expect_refused(odd, 32, 60000, "truncated");
    expect_refused(odd, 36, UINT32_MAX, "vocab_size");
    expect_refused(odd, 44, 100000, "d_state");
    expect_refused(odd, 56, 0x7FC00000, "norm_eps");
    expect_refused(odd, 68, 100000, "pad");
    expect_refused(odd, 72, 259, "eos");
    expect_refused(odd, 96, 1u << 30, "outside");
    int count = test_everything ? 10000 : 300;
    test_damaged_models("tests/odd.bin", count);
    test_damaged_models("tests/falcon.bin", count);
    test_damaged_models("tests/layernorm.bin", count / 3);
    test_damaged_models("models/tales.bin", test_everything ? 600 : 40);
    Config huge = {.type = F32,
                   .D = 1 << 20,
                   .n_layer = 1 << 16,
                   .V = 1 << 26,
                   .E = 1 << 20,
                   .N = N_MAX,
                   .K = 1 << 12,
                   .R = 1 << 20};
    expect(config_tensor_bytes(&huge) >> 20 > 1 << 20 || sizeof(size_t) < 8,
           "sizes of a huge config do not wrap");
}
