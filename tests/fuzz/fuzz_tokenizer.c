// A tokenizer: [2 bytes: length of the blob][blob][text]. The text becomes ids, and the ids text.

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    size_t length = data[0] | (size_t)data[1] << 8;
    if (length > size - 2) length = size - 2;
    const size_t n_text = size - 2 - length;
    unsigned char *blob = exact_copy(data + 2, length),
                  *text = exact_copy(data + 2 + length, n_text);
    Model m = {.config = {.V = INT32_MAX}};
    static State s;
    memset(&s, 0, sizeof s);
    int failed = open_tokenizer(&m, blob, length);
    must_say_why(failed != 0);
    int32_t *ids = NULL;
    size_t n = 0;
    if (!failed) {
        unsigned char *out = malloc(m.text_room + 1);
        failed = mamba_encode(&m, (const char *)text, n_text, &ids, &n);
        must_say_why(failed != 0);
        for (size_t i = 0; i < n && !failed; i++) {
            if (ids[i] < 0 || ids[i] >= tokenizer_size(m.tokenizer)) abort();
            if (mamba_decode(&m, &s, ids[i], out) > m.text_room) abort();
        }
        if (mamba_decode(&m, &s, -1, out) > m.text_room + 1) abort();
        for (int id = 0; id < tokenizer_size(m.tokenizer) && id < 5000; id++)
            if (mamba_decode(&m, &s, id, out) > m.text_room) abort();
        free(out);
        mamba_release(ids);
        tokenizer_close(m.tokenizer);
    }
    free(text);
    free(blob);
    return 0;
}
