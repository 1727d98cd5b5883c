enum { HEADER_BYTES = 256, FILE_VERSION = 1 };

// --- model.bin
// In the file's order: the header (HEADER_BYTES), the tokenizer's blob, zeros up to the next
// multiple of ALIGN, and the tensors of TENSORS, each of which begins at a multiple of ALIGN.

typedef struct { // what the header says
    Config config;
    uint32_t type;                     // config.type
    uint64_t tokenizer_at, tensors_at; // offsets in the file
    uint64_t tokenizer_bytes, tensors_bytes;
    uint32_t tokenizer_crc, tensors_crc;
} ModelHeader;

#define AT(member) offsetof(ModelHeader, member)
static const Field MODEL_FIELDS[] = {
    {"arch", 16, FIELD_U32, 1, 0, 1, AT(config.arch)},
    {"type", 20, FIELD_U32, 1, ANY_U32, AT(type)},
    {"flags", 24, FIELD_U32, 1, 0, 31, AT(config.flags)},
    {"d_model", 28, FIELD_U32, 1, 1, 1 << 20, AT(config.D)},
    {"n_layer", 32, FIELD_U32, 1, 1, 1 << 16, AT(config.n_layer)},
    {"vocab_size", 36, FIELD_U32, 1, 1, 1 << 26, AT(config.V)},
    {"d_inner", 40, FIELD_U32, 1, 1, 1 << 20, AT(config.E)},
    {"d_state", 44, FIELD_U32, 1, 1, N_MAX, AT(config.N)},
    {"d_conv", 48, FIELD_U32, 1, 1, 1 << 12, AT(config.K)},
    {"dt_rank", 52, FIELD_U32, 1, 1, 1 << 20, AT(config.R)},
    {"norm_eps", 56, FIELD_F32, 1, 0, 1, AT(config.norm_eps)},
    {"mixer_eps", 60, FIELD_F32, 1, 0, 1, AT(config.mixer_eps)},
    {"bos", 64, FIELD_ID, 1, -1, 0, AT(config.bos)},
    {"pad", 68, FIELD_ID, 1, -1, 0, AT(config.pad)},
    {"eos", 72, FIELD_ID, 4, -1, 0, AT(config.eos)},
    {"tokenizer offset", 88, FIELD_U64, 1, ANY_U64, AT(tokenizer_at)},
    {"tokenizer bytes", 96, FIELD_U64, 1, ANY_U64, AT(tokenizer_bytes)},
    {"tensors offset", 104, FIELD_U64, 1, ANY_U64, AT(tensors_at)},
    {"tensors bytes", 112, FIELD_U64, 1, ANY_U64, AT(tensors_bytes)},
    {"tokenizer checksum", 120, FIELD_U32, 1, ANY_U32, AT(tokenizer_crc)},
    {"tensors checksum", 124, FIELD_U32, 1, ANY_U32, AT(tensors_crc)},
};
#undef AT
static const HeaderFormat MODEL_FORMAT = {{'m', 'a', 'm', 'b', 'a', '.', 'c', '\n'},
                                          FILE_VERSION,
                                          HEADER_BYTES,
                                          "a model.bin",
                                          MODEL_FIELDS,
                                          NUMBER_OF(MODEL_FIELDS)};

// --- load

static int check_config(const char *path, ModelHeader *header) {
    if (header->type >= N_TYPES)
        return fail("%s: weight type %u is not known to this version (0 f32, 1 f16, 2 bf16, 3 q8, "
                    "4 q4)",
                    path, header->type);
    header->config.type = (Type)header->type;
    return header_check(path, &MODEL_FORMAT, header, header->config.V);
}

// Whether tokenizer and tensors fill the file of so many bytes.
static int check_layout(const char *path, const ModelHeader *header, size_t file_bytes) {
    const uint64_t offset = header->tensors_at, bytes = header->tensors_bytes;
    const uint64_t tokenizer_bytes = header->tokenizer_bytes, size = file_bytes;
    if (offset > size || bytes > size - offset || offset < HEADER_BYTES ||
        header->tokenizer_at != HEADER_BYTES || tokenizer_bytes > offset - HEADER_BYTES ||
        offset % ALIGN || offset - HEADER_BYTES - tokenizer_bytes >= ALIGN)
        return fail("%s: tokenizer or tensors lie outside the file of %zu bytes: it is truncated "
                    "or damaged",
                    path, file_bytes);
    size_t needed = config_tensor_bytes(&header->config);
    if (bytes != size - offset || bytes != needed)
        return fail("%s: the header's config needs %zu bytes of tensors, the file has %zu: it is "
                    "truncated or damaged",
                    path, needed, (size_t)(size - offset));
    return 0;
}

// The checksums of header and tokenizer. That of the tensors is left to mamba_verify(): a large
// model would be read as a whole.
static int check_sums(const char *path, const ModelHeader *header, const unsigned char *file) {
    const size_t tokenizer_end = HEADER_BYTES + (size_t)header->tokenizer_bytes;
    if (!header_is_whole(file, &MODEL_FORMAT))
        return fail("%s: the header's checksum does not match: the file is damaged", path);
    if (crc32_of(0, file + HEADER_BYTES, tokenizer_end - HEADER_BYTES) != header->tokenizer_crc)
        return fail("%s: the tokenizer's checksum does not match: the file is damaged", path);
    for (size_t i = tokenizer_end; i < header->tensors_at; i++) // no checksum covers these bytes
        if (file[i])
            return fail("%s: byte %zu between tokenizer and tensors is not zero: the file is "
                        "damaged",
                        path, i);
    return 0;
}

static int read_header(Model *m, const char *path) {
    const unsigned char *h = m->file;
    ModelHeader header;
    if (!header_is(h, m->file_bytes, &MODEL_FORMAT))
        return fail("%s: not a model.bin (make one with export.py)", path);
    if (!header_version_fits(h, &MODEL_FORMAT))
        return fail("%s: format version %u with a header of %u bytes, this program reads version "
                    "%d with %d",
                    path, u32_at(h + 8), u32_at(h + 12), FILE_VERSION, HEADER_BYTES);
    header_read(&header, &MODEL_FORMAT, h);
    if (check_config(path, &header) || check_layout(path, &header, m->file_bytes) ||
        check_sums(path, &header, h))
        return -1;
    m->config = header.config;
    m->tokenizer_bytes = (size_t)header.tokenizer_bytes;
    m->tensors_offset = (size_t)header.tensors_at;
    m->tensors_bytes = (size_t)header.tensors_bytes;
    m->tensors_crc = header.tensors_crc;
    // The stored checksum: that of the header with its own checksum is the same for all models.
    m->id = header_crc(h, &MODEL_FORMAT);
    return 0;
}

// The tokenizer of m becomes that of blob, which must outlive m. 0, or -1 after fail().
static int open_tokenizer(Model *m, const unsigned char *blob, size_t bytes) {
    Tokenizer *t = tokenizer_open(blob, bytes);
    if (!t) return -1;
    if (tokenizer_size(t) > m->config.V) {
        fail("the tokenizer has %d ids, the model only %d", tokenizer_size(t), m->config.V);
        tokenizer_close(t);
        return -1;
    }
    if (m->tokenizer) tokenizer_close(m->tokenizer);
    m->tokenizer = t;
    m->tokenizer_blob = blob;
    m->tokenizer_bytes = bytes;
    m->text_room = 0;
    for (int id = 0; id < tokenizer_size(t); id++) {
        size_t token_bytes = 0;
        tokenizer_token(t, id, &token_bytes);
        const size_t room = 3 * (token_bytes + PENDING); // each byte may become a U+FFFD
        if (room > m->text_room) m->text_room = room;
    }
    return 0;
}

// path: what errors call the model in m->file.
static int open_model(Model *m, const char *path) {
    if (read_header(m, path)) return -1;
    if (m->tokenizer_bytes > 0 && // 0: a model of ids
        open_tokenizer(m, m->file + HEADER_BYTES, m->tokenizer_bytes))
        return fail_in(path);
    m->layer = memory_zeroed((size_t)m->config.n_layer, sizeof *m->layer);
    if (!m->layer) return fail("out of memory: %d layers", m->config.n_layer);
    Layout at = {.base = m->file, .offset = m->tensors_offset};
    each_tensor(m, layout_tensor, &at);
    assert(at.offset == m->file_bytes);
    m->n_params = at.n_params;
    if (m->config.flags & FLAG_TIED) m->head = m->embedding;
    return make_derived(m);
}

// The model in the file path, ready to run. Its weights are read from the disk as they are needed.
// NULL after fail().
Model *mamba_load(const char *path) {
    Model *m = memory_zeroed(1, sizeof *m);
    if (!m) {
        fail("out of memory: a model");
        return NULL;
    }
    m->file = file_map(path, &m->file_bytes, &m->mapped);
    if (!m->file || open_model(m, path)) {
        mamba_free(m);
        return NULL;
    }
    return m;
}

// The model in memory that holds a whole model.bin, for example an array in flash. Nothing is
// copied: the memory stays the caller's, and outlives the model. It begins at a multiple of 4
// bytes, better of ALIGN. A big-endian machine must turn the numbers, and so takes a copy. NULL
// after fail().
Model *mamba_load_memory(const void *memory, size_t bytes) {
    const char *name = "the model in memory";
    Model *m = memory_zeroed(1, sizeof *m);
    if (!m) {
        fail("out of memory: a model");
        return NULL;
    }
    m->file_bytes = bytes;
    m->borrowed = host_is_little_endian();
    m->file = m->borrowed ? (unsigned char *)(uintptr_t)memory : alloc_aligned(bytes);
    if (m->file && !m->borrowed) memcpy(m->file, memory, bytes);
    bool bad = !m->file;
    if (!bad && (uintptr_t)memory % 4)
        bad = fail("%s does not begin at a multiple of 4 bytes", name) != 0;
    if (bad || open_model(m, name)) {
        mamba_free(m);
        return NULL;
    }
    return m;
}

// --- save

// The blob of a tokenizer whose n_ids tokens are the bytes 0, 1, 2 ...
enum { BYTES_BLOB = 32 };
static void bytes_blob(unsigned char blob[BYTES_BLOB], int n_ids) {
    memset(blob, 0, BYTES_BLOB);
    memcpy(blob, "mtok", 4);
    put_u32(blob + 4, 1);
    put_u32(blob + 20, (uint32_t)n_ids);
}

// Gives a model in memory a tokenizer: a copy of blob, which export.py writes and tokenizer.c
// describes. blob NULL: each token is a byte. Not for a loaded model, which has one. 0, or -1 after
// fail(), the model unchanged.
int mamba_set_tokenizer(Model *m, const unsigned char *blob, size_t bytes) {
    unsigned char small[BYTES_BLOB];
    if (m->file) return fail("a model from a file keeps the file's tokenizer: copy the model");
    if (!blob) {
        bytes_blob(small, m->config.V < 256 ? m->config.V : 256);
        blob = small;
        bytes = sizeof small;
    }
    unsigned char *old = m->own_blob, *copy = memory_get(bytes ? bytes : 1);
    if (!copy) return fail("out of memory: a tokenizer of %zu bytes", bytes);
    memcpy(copy, blob, bytes);
    if (open_tokenizer(m, copy, bytes)) {
        memory_free(copy);
        return -1;
    }
    m->own_blob = copy;
    memory_free(old);
    return 0;
}

// Numbers in memory to the order of bytes in files, or back. A little-endian machine needs nothing.
static void swap_tensor(void *context, const TensorInfo *info, Tensor *w) {
    (void)context;
    (void)info;
    fix_tensor_endian(w);
}
static void swap_model(const Model *m) {
    if (!host_is_little_endian()) each_tensor((Model *)(uintptr_t)m, swap_tensor, NULL);
}

static unsigned char *tensor_arena(const Model *m) {
    return m->weights ? m->weights : m->file + m->tensors_offset;
}

// What the header of a file with this model says.
static ModelHeader header_of_model(const Model *m, uint32_t tensors_crc) {
    const size_t tokenizer_bytes = m->tokenizer_bytes;
    return (ModelHeader){
        .config = m->config,
        .type = (uint32_t)m->config.type,
        .tokenizer_at = HEADER_BYTES,
        .tokenizer_bytes = tokenizer_bytes,
        .tensors_at = (HEADER_BYTES + tokenizer_bytes + ALIGN - 1) / ALIGN * ALIGN,
        .tensors_bytes = m->tensors_bytes,
        .tokenizer_crc = crc32_of(0, m->tokenizer_blob, tokenizer_bytes),
        .tensors_crc = tensors_crc,
    };
}

// The same as h (HEADER_BYTES). The weights must be in the file's order of bytes.
static void model_header(unsigned char *h, const Model *m) {
    const ModelHeader header = header_of_model(m, crc32_of(0, tensor_arena(m), m->tensors_bytes));
    header_write(h, &MODEL_FORMAT, &header);
}

// Writes a model.bin with the model's tokenizer, if it has one: of a loaded, random, copied,
// quantized or trained model. While a GPU trains m, mamba_trainer_fetch() comes first. 0, or -1
// after fail(), an older file untouched.
int mamba_save(const Model *m, const char *path) {
    static const unsigned char zeros[ALIGN];
    unsigned char header[HEADER_BYTES];
    swap_model(m);
    model_header(header, m);
    const Piece piece[] = {{header, HEADER_BYTES},
                           {m->tokenizer_blob, m->tokenizer_bytes},
                           {zeros, (ALIGN - m->tokenizer_bytes % ALIGN) % ALIGN},
                           {tensor_arena(m), m->tensors_bytes}};
    int result = write_pieces(path, piece, 4);
    swap_model(m);
    return result;
}
