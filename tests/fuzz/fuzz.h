// What the fuzzing targets share. A target is a function LLVMFuzzerTestOneInput (libFuzzer). Inputs
// are a file, or what makes one, after a few bytes of choices. Checksums are mended here, so that
// the fuzzer meets the code behind them.
//
//   make fuzz [FUZZ_SECONDS=60]      each target, with the seeds that tests/fuzz/seeds.py writes

#define TESTING
#include "../../mamba.c"

static void mend_header(unsigned char *h, size_t bytes, size_t header_bytes) {
    if (bytes >= header_bytes) put_u32(h + header_bytes - 4, crc32_of(0, h, header_bytes - 4));
}

// A copy of exactly so many bytes, so that a sanitizer sees every step beyond it.
static unsigned char *exact_copy(const unsigned char *data, size_t bytes) {
    unsigned char *copy = malloc(bytes + !bytes);
    if (copy && bytes) memcpy(copy, data, bytes);
    return copy;
}

// A failure must say why.
static void must_say_why(bool failed) {
    if (failed && !*mamba_error()) abort();
    error_text[0] = 0;
}

static Model *must_load(const char *path) {
    Model *m = mamba_load(path);
    if (!m) fprintf(stderr, "%s (run this in the root of the repository)\n", mamba_error());
    if (!m) exit(1);
    return m;
}

// What a user does with a model and a state: read, draw, decode, save.
static void use_model(const Model *m, State *s, const char *prompt) {
    const Sampling how = {0.8f, 0.95f, 40, 0.01f, 1.1f};
    Acts *a = mamba_acts_pieces(m, 1, 8);
    unsigned char *text = malloc(m->text_room + 1);
    int32_t *ids = NULL, id;
    size_t n = 0;
    bool bad = !a || !text;
    if (!bad) bad = mamba_encode(m, prompt, strlen(prompt), &ids, &n) != 0;
    if (!bad && n) bad = mamba_prefill(m, a, s, ids, n < 20 ? n : 20, NULL, NULL) != 0;
    for (int i = 0; i < 3 && !bad; i++) {
        id = mamba_sample(m, a, s, &how);
        bad = id < 0 || mamba_step(m, a, s, id);
        if (!bad && mamba_decode(m, s, id, text) > m->text_room) abort();
    }
    if (!bad && mamba_decode(m, s, -1, text) > m->text_room + 1) abort();
    must_say_why(bad);
    mamba_release(ids);
    free(text);
    mamba_acts_free(a);
}
