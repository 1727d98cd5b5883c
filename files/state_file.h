enum { STATE_HEADER = 512, STATE_VERSION = 1 };
static const char STATE_MAGIC[8] = {'m', 'a', 'm', 'b', 'a', '.', 's', '\n'};

static void state_header(unsigned char *h, const Model *m, const State *s, uint32_t data_crc) {
    const Config *c = &m->config;
    const int sizes[] = {c->V, c->n_layer, c->E, c->N, c->K};
    memset(h, 0, STATE_HEADER);
    memcpy(h, STATE_MAGIC, sizeof STATE_MAGIC);
    put_u32(h + 8, STATE_VERSION), put_u32(h + 12, STATE_HEADER);
    for (int i = 0; i < 5; i++) put_u32(h + 16 + 4 * i, (uint32_t)sizes[i]);
    put_u32(h + 36, m->id);
    put_u64(h + 40, s->position), put_u64(h + 48, s->random), put_u64(h + 56, s->floats);
    put_u32(h + 64, (uint32_t)s->n_recent);
    for (int i = 0; i < RECENT; i++) put_u32(h + 68 + 4 * i, (uint32_t)s->recent[i]);
    put_u32(h + 324, (uint32_t)s->pending.n);
    memcpy(h + 328, s->pending.bytes, PENDING);
    put_u32(h + 332, data_crc);
    put_u32(h + STATE_HEADER - 4, crc32_of(0, h, STATE_HEADER - 4));
}

// 0, or -1 after fail(), an older file untouched.
int mamba_state_save(const Model *m, const State *s, const char *path) {
    size_t bytes = s->floats * sizeof(float);
    unsigned char header[STATE_HEADER];
    float *data = malloc(bytes);
    if (!data) return fail("out of memory: saving a state of %zu bytes", bytes);
    if (state_fetch(s)) return free(data), -1;
    memcpy(data, s->data, bytes);
    fix_endian(data, bytes, sizeof(float));
    state_header(header, m, s, crc32_of(0, data, bytes));
    int result = write_pieces(path, (Piece[]){{header, sizeof header}, {data, bytes}}, 2);
    free(data);
    return result;
}

static int read_state(const Model *m, State *s, const unsigned char *h, size_t bytes,
                      const char *path) {
    const Config *c = &m->config;
    const int sizes[] = {c->V, c->n_layer, c->E, c->N, c->K};
    if (bytes < STATE_HEADER || memcmp(h, STATE_MAGIC, sizeof STATE_MAGIC))
        return fail("%s: not a state file", path);
    if (u32_at(h + 8) != STATE_VERSION || u32_at(h + 12) != STATE_HEADER)
        return fail("%s: state version %u, this program reads version %d", path, u32_at(h + 8),
                    STATE_VERSION);
    if (crc32_of(0, h, STATE_HEADER - 4) != u32_at(h + STATE_HEADER - 4))
        return fail("%s: the header's checksum does not match: the state file is damaged", path);
    for (int i = 0; i < 5; i++)
        if (u32_at(h + 16 + 4 * i) != (uint32_t)sizes[i])
            return fail("%s: the state was saved with a model of another shape", path);
    if (u32_at(h + 36) != m->id) return fail("%s: the state was saved with another model", path);
    if (u64_at(h + 56) != s->floats || bytes - STATE_HEADER != s->floats * sizeof(float))
        return fail("%s: %zu bytes where %zu are needed: the state file is truncated or damaged",
                    path, bytes, STATE_HEADER + (size_t)s->floats * sizeof(float));
    if (crc32_of(0, h + STATE_HEADER, bytes - STATE_HEADER) != u32_at(h + 332))
        return fail("%s: the checksum does not match: the state file is damaged", path);
    uint32_t n_recent = u32_at(h + 64), n_pending = u32_at(h + 324);
    bool good = n_recent == (u64_at(h + 40) < RECENT ? u64_at(h + 40) : RECENT) && n_pending <= 3;
    for (uint32_t i = 0; i < RECENT; i++) good = good && u32_at(h + 68 + 4 * i) < (uint32_t)c->V;
    if (!good) return fail("%s: a header field is out of range: the state file is damaged", path);
    state_detach(s);
    s->position = u64_at(h + 40), s->random = u64_at(h + 48), s->n_recent = (int32_t)n_recent;
    for (int i = 0; i < RECENT; i++) s->recent[i] = (int32_t)u32_at(h + 68 + 4 * i);
    s->pending.n = (int)n_pending;
    memcpy(s->pending.bytes, h + 328, PENDING);
    memcpy(s->data, h + STATE_HEADER, bytes - STATE_HEADER);
    fix_endian(s->data, bytes - STATE_HEADER, sizeof(float));
    return 0;
}

// Replaces s by what mamba_state_save wrote with the same model. 0, or -1 after fail(), s
// untouched.
int mamba_state_load(const Model *m, State *s, const char *path) {
    size_t bytes;
    bool mapped;
    unsigned char *data = file_map(path, &bytes, &mapped);
    int result = data ? read_state(m, s, data, bytes, path) : -1;
    if (data) file_unmap(data, bytes, mapped);
    return result;
}
