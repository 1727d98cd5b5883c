// A state file: [choices][the file]. The model is tests/odd.bin. A part of the choices fills in
// what another model would have elsewhere, and numbers to the length that is needed.

#include "fuzz.h"

enum { MEND_SUMS = 1, FILL = 2, MEND_MODEL = 4 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Model *m;
    static State *s;
    if (!m) m = must_load("tests/odd.bin");
    if (!s) s = mamba_state_new(m);
    if (size < 1) return 0;
    const int choices = data[0];
    const size_t whole = mamba_state_bytes(m);
    size_t bytes = size - 1;
    unsigned char *file = calloc(1, (bytes > whole ? bytes : whole) + 1);
    memcpy(file, data + 1, bytes);
    if (choices & FILL) bytes = whole;
    if (choices & MEND_MODEL && bytes >= STATE_HEADER) {
        unsigned char *good = malloc(whole);
        mamba_state_write(m, s, good);
        memcpy(file, good, 40);
        memcpy(file + 56, good + 56, 8);
        free(good);
    }
    if (choices & MEND_SUMS && bytes >= STATE_HEADER) {
        put_u32(file + 332, crc32_of(0, file + STATE_HEADER, bytes - STATE_HEADER));
        mend_header(file, bytes, STATE_HEADER);
    }
    unsigned char *exact = exact_copy(file, bytes);
    free(file);
    mamba_state_reset(m, s);
    int failed = mamba_state_read(m, s, exact, bytes);
    must_say_why(failed != 0);
    if (!failed) use_model(m, s, " the");
    free(exact);
    return 0;
}
