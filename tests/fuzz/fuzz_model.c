// A model.bin: [choices][header, tokenizer, maybe tensors]. Usually the tensors are left to this
// file, which appends as many bytes as the header asks for, and the input stays small.

#include "fuzz.h"

enum { MEND_SUMS = 1, APPEND = 2, MEND_LAYOUT = 4, ODD_WEIGHTS = 8, FOUR_BITS = 16, QUANTISE = 32 };
enum { MOST = 200000 }; // bytes of tensors: larger ones are not run

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    const int choices = data[0];
    size_t bytes = size - 1, tensors = 0;
    unsigned char head[HEADER_BYTES] = {0};
    memcpy(head, data + 1, bytes < HEADER_BYTES ? bytes : HEADER_BYTES);
    ModelHeader header;
    header_read(&header, &MODEL_FORMAT, head);
    if (choices & APPEND && bytes >= HEADER_BYTES && header.type < N_TYPES) {
        header.config.type = (Type)header.type;
        if (check_config("", &header) == 0) tensors = config_tensor_bytes(&header.config);
        error_text[0] = 0;
        if (tensors > MOST) return 0;
    }
    const size_t padded = choices & APPEND ? (bytes + ALIGN - 1) / ALIGN * ALIGN : bytes;
    unsigned char *file = NULL;
    if (posix_memalign((void **)&file, ALIGN, padded + tensors + 1)) return 0;
    memset(file, 0, padded + tensors);
    memcpy(file, data + 1, bytes);
    uint64_t random = bytes;
    for (size_t i = 0; i + 4 <= tensors; i += 4) { // small floats, or anything
        uint32_t word = (uint32_t)random_u64(&random);
        float small = (float)(word >> 8) / 16777216.0f - 0.5f;
        if (!(choices & ODD_WEIGHTS)) memcpy(&word, &small, 4);
        put_u32(file + padded + i, word);
    }
    if (choices & MEND_LAYOUT && bytes >= HEADER_BYTES) {
        put_u64(file + 88, HEADER_BYTES);
        put_u64(file + 96, bytes - HEADER_BYTES);
        put_u64(file + 104, padded);
        put_u64(file + 112, tensors);
    }
    bytes = padded + tensors;
    if (choices & MEND_SUMS && bytes >= HEADER_BYTES) {
        uint64_t blob = u64_at(file + 96), at = u64_at(file + 104);
        if (blob <= bytes - HEADER_BYTES)
            put_u32(file + 120, crc32_of(0, file + HEADER_BYTES, (size_t)blob));
        if (at <= bytes) put_u32(file + 124, crc32_of(0, file + at, bytes - (size_t)at));
        mend_header(file, bytes, HEADER_BYTES);
    }
    Model *m = mamba_load_memory(file, bytes);
    must_say_why(!m);
    if (m) {
        must_say_why(mamba_verify(m) != 0);
        State *s = m->n_params < MOST ? mamba_state_new(m) : NULL;
        if (s) use_model(m, s, "Once upon a time");
        const bool quantise = s && choices & QUANTISE;
        Model *small = quantise ? mamba_quantize(m, choices & FOUR_BITS) : NULL;
        if (quantise) must_say_why(!small);
        if (small) {
            mamba_state_reset(small, s);
            use_model(small, s, "Die M\xc3\xbctze");
        }
        mamba_free(small);
        mamba_state_free(s);
    }
    mamba_free(m);
    free(file);
    return 0;
}
