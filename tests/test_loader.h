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

static void test_loader(void) {
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
    test_damaged_models("models/tales.bin", test_everything ? 600 : 40);
    Config huge = {.type = F32,
                   .D = 1 << 20,
                   .n_layer = 1 << 16,
                   .V = 1 << 26,
                   .E = 1 << 20,
                   .N = N_MAX,
                   .K = 1 << 12,
                   .R = 1 << 20};
    expect(config_tensor_bytes(&huge) > (size_t)1 << 40 || sizeof(size_t) < 8,
           "sizes of a huge config do not wrap");
}
