enum { HEADER_BYTES = 256, FILE_VERSION = 1 };
static const char MODEL_MAGIC[8] = {'m', 'a', 'm', 'b', 'a', '.', 'c', '\n'};

static int check_token_id(const char *path, const char *name, int32_t id, int V) {
    if (id >= -1 && id < V) return 0;
    return fail("%s: %s token id %d is not in the vocabulary of %d", path, name, id, V);
}

// Header bytes -> config. Each field by itself; how they fit the file is mamba_load's business.
static int read_config(const char *path, const unsigned char *h, Config *c) {
    const struct {
        const char *name;
        int offset;
        uint32_t lowest, highest;
        int *value;
    } field[] = {
        {"arch", 16, 0, 1, &c->arch},          {"flags", 24, 0, 15, &c->flags},
        {"d_model", 28, 1, 1 << 20, &c->D},    {"n_layer", 32, 1, 1 << 16, &c->n_layer},
        {"vocab_size", 36, 1, 1 << 26, &c->V}, {"d_inner", 40, 1, 1 << 20, &c->E},
        {"d_state", 44, 1, N_MAX, &c->N},      {"d_conv", 48, 1, 1 << 12, &c->K},
        {"dt_rank", 52, 1, 1 << 20, &c->R},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        uint32_t value = u32_at(h + field[i].offset);
        if (value < field[i].lowest || value > field[i].highest)
            return fail(
                "%s: header field %s is %u, outside %u..%u: the file is damaged or not a model.bin",
                path, field[i].name, value, field[i].lowest, field[i].highest);
        *field[i].value = (int)value;
    }
    if (u32_at(h + 20) >= N_TYPES)
        return fail(
            "%s: weight type %u is not known to this version (0 f32, 1 f16, 2 bf16, 3 q8, 4 q4)",
            path, u32_at(h + 20));
    c->type = (Type)u32_at(h + 20);
    c->norm_eps = f32_at(h + 56), c->mixer_eps = f32_at(h + 60);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1))
        return fail("%s: header field norm_eps is not in [0, 1)", path);
    if (!(c->mixer_eps >= 0 && c->mixer_eps < 1))
        return fail("%s: header field mixer_eps is not in [0, 1)", path);
    c->bos = (int32_t)u32_at(h + 64), c->pad = (int32_t)u32_at(h + 68);
    if (check_token_id(path, "bos", c->bos, c->V) || check_token_id(path, "pad", c->pad, c->V))
        return -1;
    for (int i = 0; i < 4; i++) {
        c->eos[i] = (int32_t)u32_at(h + 72 + 4 * i);
        if (check_token_id(path, "eos", c->eos[i], c->V)) return -1;
    }
    return 0;
}

static int read_header(Model *m, const char *path) {
    const unsigned char *h = m->file;
    if (m->file_bytes < HEADER_BYTES || memcmp(h, MODEL_MAGIC, sizeof MODEL_MAGIC))
        return fail("%s: not a model.bin (make one with export.py)", path);
    if (u32_at(h + 8) != FILE_VERSION || u32_at(h + 12) != HEADER_BYTES)
        return fail("%s: format version %u with a header of %u bytes, this program reads version "
                    "%d with %d",
                    path, u32_at(h + 8), u32_at(h + 12), FILE_VERSION, HEADER_BYTES);
    if (read_config(path, h, &m->config)) return -1;
    uint64_t tok_offset = u64_at(h + 88), tok_bytes = u64_at(h + 96), offset = u64_at(h + 104),
             bytes = u64_at(h + 112);
    uint64_t size = m->file_bytes;
    if (offset > size || bytes > size - offset || offset < HEADER_BYTES ||
        tok_offset != HEADER_BYTES || tok_bytes > offset - HEADER_BYTES || offset % ALIGN ||
        offset - HEADER_BYTES - tok_bytes >= ALIGN)
        return fail("%s: tokenizer or tensors lie outside the file of %zu bytes: it is truncated "
                    "or damaged",
                    path, m->file_bytes);
    size_t needed = config_tensor_bytes(&m->config);
    if (bytes != size - offset || bytes != needed)
        return fail("%s: the header's config needs %zu bytes of tensors, the file has %zu: it is "
                    "truncated or damaged",
                    path, needed, (size_t)(size - offset));
    if (crc32_of(0, h, HEADER_BYTES - 4) != u32_at(h + HEADER_BYTES - 4))
        return fail("%s: the header's checksum does not match: the file is damaged", path);
    if (crc32_of(0, h + tok_offset, (size_t)tok_bytes) != u32_at(h + 120))
        return fail("%s: the tokenizer's checksum does not match: the file is damaged", path);
    for (uint64_t i = tok_offset + tok_bytes; i < offset;
         i++) // the only bytes that no checksum covers
        if (h[i])
            return fail(
                "%s: byte %llu between tokenizer and tensors is not zero: the file is damaged",
                path, (unsigned long long)i);
    m->tokenizer_bytes = (size_t)tok_bytes, m->tensors_offset = (size_t)offset,
    m->tensors_bytes = (size_t)bytes;
    m->tensors_crc = u32_at(h + 124);
    m->id = u32_at(h + HEADER_BYTES -
                   4); // not the CRC of all 256: that of bytes and their own CRC is a constant
    return 0;
}

static int open_model(Model *m, const char *path) {
    m->file = file_map(path, &m->file_bytes, &m->mapped);
    if (!m->file || read_header(m, path)) return -1;
    m->tokenizer = tokenizer_open(m->file + HEADER_BYTES, m->tokenizer_bytes);
    if (!m->tokenizer) return fail_in(path);
    if (tokenizer_size(m->tokenizer) > m->config.V)
        return fail("%s: the tokenizer has %d ids, the model only %d", path,
                    tokenizer_size(m->tokenizer), m->config.V);
    for (int id = 0; id < tokenizer_size(m->tokenizer); id++) {
        size_t bytes = 0, room;
        tokenizer_token(m->tokenizer, id, &bytes);
        if ((room = 3 * (bytes + PENDING)) > m->text_room)
            m->text_room = room; // each byte may become a U+FFFD
    }
    m->layer = calloc((size_t)m->config.n_layer, sizeof *m->layer);
    if (!m->layer) return fail("out of memory: %d layers", m->config.n_layer);
    Layout at = {.base = m->file, .offset = m->tensors_offset};
    each_tensor(m, layout_tensor, &at);
    assert(at.offset == m->file_bytes);
    m->n_params = at.n_params;
    if (m->config.flags & FLAG_TIED) m->head = m->embedding;
    return make_derived(m);
}

// A model.bin, ready to run; NULL after fail().
Model *mamba_load(const char *path) {
    Model *m = calloc(1, sizeof *m);
    if (!m) return fail("out of memory"), NULL;
    if (open_model(m, path)) {
        mamba_free(m);
        return NULL;
    }
    return m;
}

static void model_header(unsigned char *h, const Model *m, const unsigned char *tokenizer,
                         size_t tokenizer_bytes) {
    const Config *c = &m->config;
    const int sizes[] = {c->D, c->n_layer, c->V, c->E, c->N, c->K, c->R},
              ids[] = {c->bos, c->pad, c->eos[0], c->eos[1], c->eos[2], c->eos[3]};
    size_t offset = (HEADER_BYTES + tokenizer_bytes + ALIGN - 1) / ALIGN * ALIGN;
    uint32_t bits[2];
    memset(h, 0, HEADER_BYTES);
    memcpy(h, MODEL_MAGIC, sizeof MODEL_MAGIC);
    put_u32(h + 8, FILE_VERSION), put_u32(h + 12, HEADER_BYTES), put_u32(h + 16, (uint32_t)c->arch),
        put_u32(h + 20, (uint32_t)c->type);
    put_u32(h + 24, (uint32_t)c->flags);
    for (int i = 0; i < 7; i++) put_u32(h + 28 + 4 * i, (uint32_t)sizes[i]);
    memcpy(bits, &c->norm_eps, 4), memcpy(bits + 1, &c->mixer_eps, 4);
    put_u32(h + 56, bits[0]), put_u32(h + 60, bits[1]);
    for (int i = 0; i < 6; i++) put_u32(h + 64 + 4 * i, (uint32_t)ids[i]);
    put_u64(h + 88, HEADER_BYTES), put_u64(h + 96, tokenizer_bytes), put_u64(h + 104, offset),
        put_u64(h + 112, m->tensors_bytes);
    put_u32(h + 120, crc32_of(0, tokenizer, tokenizer_bytes)),
        put_u32(h + 124, crc32_of(0, m->weights, m->tensors_bytes));
    put_u32(h + HEADER_BYTES - 4, crc32_of(0, h, HEADER_BYTES - 4));
}

static const unsigned char ZEROS[ALIGN];

// A model.bin from weights in memory, which must be little-endian at the time.
static int save_model(const Model *m, const unsigned char *tokenizer, size_t tokenizer_bytes,
                      const char *path) {
    unsigned char header[HEADER_BYTES];
    model_header(header, m, tokenizer, tokenizer_bytes);
    const Piece piece[] = {{header, HEADER_BYTES},
                           {tokenizer, tokenizer_bytes},
                           {ZEROS, (ALIGN - tokenizer_bytes % ALIGN) % ALIGN},
                           {m->weights, m->tensors_bytes}};
    return write_pieces(path, piece, 4);
}

// A checkpoint is one file, so that it is of one moment: header, model.bin's header and tokenizer,
// weights, both moments.
