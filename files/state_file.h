// --- state files
// The header (STATE_HEADER bytes), then the numbers of State.data.

enum { STATE_HEADER = 512, STATE_VERSION = 1 };

typedef struct { // what the header says
    uint32_t V, n_layer, E, N, K, model_id;
    uint64_t position, random, floats;
    uint32_t n_recent, n_pending;
    int32_t recent[RECENT];
    unsigned char pending[PENDING];
    uint32_t data_crc;
} StateHeader;

#define AT(member) offsetof(StateHeader, member)
static const Field STATE_FIELDS[] = {
    {"vocab_size", 16, FIELD_U32, 1, ANY_U32, AT(V)},
    {"n_layer", 20, FIELD_U32, 1, ANY_U32, AT(n_layer)},
    {"d_inner", 24, FIELD_U32, 1, ANY_U32, AT(E)},
    {"d_state", 28, FIELD_U32, 1, ANY_U32, AT(N)},
    {"d_conv", 32, FIELD_U32, 1, ANY_U32, AT(K)},
    {"model id", 36, FIELD_U32, 1, ANY_U32, AT(model_id)},
    {"position", 40, FIELD_U64, 1, ANY_U64, AT(position)},
    {"random", 48, FIELD_U64, 1, ANY_U64, AT(random)},
    {"floats", 56, FIELD_U64, 1, ANY_U64, AT(floats)},
    {"recent tokens", 64, FIELD_U32, 1, 0, RECENT, AT(n_recent)},
    {"recent", 68, FIELD_ID, RECENT, 0, 0, AT(recent)},
    {"pending bytes", 324, FIELD_U32, 1, 0, PENDING - 1, AT(n_pending)},
    {"pending", 328, FIELD_TEXT, PENDING, ANY_TEXT, AT(pending)},
    {"data checksum", 332, FIELD_U32, 1, ANY_U32, AT(data_crc)},
};
#undef AT
static const HeaderFormat STATE_FORMAT = {{'m', 'a', 'm', 'b', 'a', '.', 's', '\n'},
                                          STATE_VERSION,
                                          STATE_HEADER,
                                          "a state file",
                                          STATE_FIELDS,
                                          NUMBER_OF(STATE_FIELDS)};

static StateHeader header_of_state(const Model *m, const State *s, uint32_t data_crc) {
    const Config *c = &m->config;
    StateHeader h = {
        .V = (uint32_t)c->V,
        .n_layer = (uint32_t)c->n_layer,
        .E = (uint32_t)c->E,
        .N = (uint32_t)c->N,
        .K = (uint32_t)c->K,
        .model_id = m->id,
        .position = s->position,
        .random = s->random,
        .floats = s->floats,
        .n_recent = (uint32_t)s->n_recent,
        .n_pending = (uint32_t)s->pending.n,
        .data_crc = data_crc,
    };
    memcpy(h.recent, s->recent, sizeof h.recent);
    memcpy(h.pending, s->pending.bytes, sizeof h.pending);
    return h;
}

// Bytes of a saved state, whatever the length of the text that it has read.
size_t mamba_state_bytes(const Model *m) {
    return size_add(STATE_HEADER, size_mul(state_floats(&m->config), sizeof(float)));
}

// Writes what mamba_state_save() puts into a file to `to` (mamba_state_bytes). 0, or -1 after
// fail().
int mamba_state_write(const Model *m, const State *s, unsigned char *to) {
    const size_t bytes = s->floats * sizeof(float);
    if (state_fetch(s)) return -1;
    memcpy(to + STATE_HEADER, s->data, bytes);
    fix_endian(to + STATE_HEADER, bytes, sizeof(float));
    const StateHeader h = header_of_state(m, s, crc32_of(0, to + STATE_HEADER, bytes));
    header_write(to, &STATE_FORMAT, &h);
    return 0;
}

// Writes the state: all that the sequence remembers, and the sampler's generator. It can be loaded
// with the same model.bin only. 0, or -1 after fail(), an older file untouched.
int mamba_state_save(const Model *m, const State *s, const char *path) {
    const size_t bytes = mamba_state_bytes(m);
    unsigned char *file = memory_get(bytes);
    if (!file) return fail("out of memory: saving a state of %zu bytes", bytes);
    int result = mamba_state_write(m, s, file);
    if (result == 0) result = write_pieces(path, (Piece[]){{file, bytes}}, 1);
    memory_free(file);
    return result;
}

// Whether the file holds a state of this model. s: any state of the model.
static int check_state(const Model *m, const State *s, const unsigned char *file, size_t bytes,
                       const char *path) {
    const StateHeader want = header_of_state(m, s, 0);
    StateHeader h;
    if (!header_is(file, bytes, &STATE_FORMAT)) return fail("%s: not a state file", path);
    if (!header_version_fits(file, &STATE_FORMAT))
        return fail("%s: state version %u, this program reads version %d", path, u32_at(file + 8),
                    STATE_VERSION);
    if (!header_is_whole(file, &STATE_FORMAT))
        return fail("%s: the header's checksum does not match: the state file is damaged", path);
    header_read(&h, &STATE_FORMAT, file);
    if (h.V != want.V || h.n_layer != want.n_layer || h.E != want.E || h.N != want.N ||
        h.K != want.K)
        return fail("%s: the state was saved with a model of another shape", path);
    if (h.model_id != want.model_id)
        return fail("%s: the state was saved with another model", path);
    if (h.floats != want.floats || bytes - STATE_HEADER != want.floats * sizeof(float))
        return fail("%s: %zu bytes where %zu are needed: the state file is truncated or damaged",
                    path, bytes, STATE_HEADER + (size_t)want.floats * sizeof(float));
    if (crc32_of(0, file + STATE_HEADER, bytes - STATE_HEADER) != h.data_crc)
        return fail("%s: the checksum does not match: the state file is damaged", path);
    if (header_check(path, &STATE_FORMAT, &h, m->config.V)) return -1;
    if (h.n_recent != (h.position < RECENT ? h.position : RECENT))
        return fail("%s: %u recent tokens at position %llu: the state file is damaged", path,
                    h.n_recent, (unsigned long long)h.position);
    return 0;
}

static int read_state(const Model *m, State *s, const unsigned char *file, size_t bytes,
                      const char *path) {
    StateHeader h;
    if (check_state(m, s, file, bytes, path)) return -1;
    header_read(&h, &STATE_FORMAT, file);
    state_detach(s);
    s->position = h.position;
    s->random = h.random;
    s->n_recent = (int32_t)h.n_recent;
    s->pending.n = (int)h.n_pending;
    memcpy(s->recent, h.recent, sizeof h.recent);
    memcpy(s->pending.bytes, h.pending, sizeof h.pending);
    memcpy(s->data, file + STATE_HEADER, bytes - STATE_HEADER);
    fix_endian(s->data, bytes - STATE_HEADER, sizeof(float));
    return 0;
}

// s becomes what a file of mamba_state_save says, in memory or on the disk. 0, or -1 after fail(),
// s untouched.
int mamba_state_read(const Model *m, State *s, const unsigned char *file, size_t bytes) {
    return read_state(m, s, file, bytes, "the state in memory");
}
int mamba_state_load(const Model *m, State *s, const char *path) {
    size_t bytes;
    bool mapped;
    unsigned char *file = file_map(path, &bytes, &mapped);
    if (!file) return -1;
    int result = read_state(m, s, file, bytes, path);
    file_unmap(file, bytes, mapped);
    return result;
}
