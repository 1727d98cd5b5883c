// State files.

// Random bytes in random places, with and without a valid checksum: refused or loaded, never a
// crash.
static void test_damaged_states(Session *x, unsigned char *file, size_t bytes, const char *path,
                                int count) {
    int refused = 0, loaded = 0;
    State *fresh = mamba_state_new(x->model);
    for (int i = 0; i < count; i++) {
        unsigned char *copy = malloc(bytes + 64);
        size_t n = bytes;
        memcpy(copy, file, bytes);
        memset(copy + bytes, 0, 64);
        if (i % 4 == 0) n = random_u64(&test_random) % (bytes + 64);
        else
            for (int k = 0; k < 1 + i % 3; k++)
                copy[random_u64(&test_random) % (i % 4 == 1 ? bytes : STATE_HEADER)] =
                    (unsigned char)random_u64(&test_random);
        if (i % 2 && n >= STATE_HEADER)
            put_u32(copy + STATE_HEADER - 4, crc32_of(0, copy, STATE_HEADER - 4));
        write_file(path, copy, n);
        if (mamba_state_load(x->model, fresh, path)) refused++;
        else {
            loaded++;
            mamba_step(x->model, x->acts, fresh, 1);
        }
        free(copy);
    }
    mamba_state_free(fresh);
    report(refused > count / 2 && refused + loaded == count, "damaged state files",
           "%d refused, %d harmless", refused, loaded);
}

static void test_state(void) {
    const char *path = scratch("state.bin");
    Session x = test_session("tests/odd.bin", 1), other = test_session("tests/plain.bin", 1);
    Sampling how = {1, 1, 0, 0, 1.1f};
    int32_t ids[100], straight[40], resumed[40];
    for (int t = 0; t < 100; t++) ids[t] = (int32_t)(random_u64(&test_random) % 250);
    x.state->random = 99;
    mamba_prefill(x.model, x.acts, x.state, ids, 100, NULL, NULL);
    State *copy = mamba_state_new(x.model);
    mamba_state_copy(x.model, copy, x.state);
    expect(mamba_state_save(x.model, x.state, path) == 0, "a state is saved");
    for (int i = 0; i < 40; i++) {
        straight[i] = mamba_sample(x.model, x.acts, x.state, &how);
        mamba_step(x.model, x.acts, x.state, straight[i]);
    }
    float *end = copy_floats(x.state->data, x.state->floats);
    mamba_state_reset(x.model, x.state);
    expect(mamba_state_load(x.model, x.state, path) == 0, "a state is loaded");
    for (int way = 0; way < 2; way++) { // loaded, then copied
        for (int i = 0; i < 40; i++) {
            resumed[i] = mamba_sample(x.model, x.acts, x.state, &how);
            mamba_step(x.model, x.acts, x.state, resumed[i]);
        }
        expect(!memcmp(straight, resumed, sizeof straight),
               way ? "same tokens from a copied state" : "same tokens from a loaded state");
        expect(!memcmp(end, x.state->data, x.state->floats * sizeof(float)) &&
                   x.state->position == 140,
               "and the same bits of state");
        mamba_state_copy(x.model, x.state, copy);
    }
    expect(mamba_state_load(other.model, other.state, path) == -1 && strstr(error_text, "shape"),
           "another model's state is refused");
    size_t model_bytes;
    unsigned char *changed = (unsigned char *)read_text("tests/odd.bin", &model_bytes);
    changed[model_bytes - 1] ^= 1; // one weight differs; the checksums are right
    put_u32(changed + 124, crc32_of(0, changed + u64_at(changed + 104),
                                    model_bytes - (size_t)u64_at(changed + 104)));
    put_u32(changed + HEADER_BYTES - 4, crc32_of(0, changed, HEADER_BYTES - 4));
    const char *changed_path = scratch("changed.bin");
    write_file(changed_path, changed, model_bytes);
    Session twin = test_session(changed_path, 1);
    expect(mamba_state_load(twin.model, twin.state, path) == -1 &&
               strstr(error_text, "another model"),
           "so is that of a model of the same shape");
    session_close(&twin);
    free(changed);
    remove(changed_path);
    expect(mamba_state_save(x.model, x.state, "tests/no/such/folder/s.bin") == -1,
           "an unwritable state file is an error");
    expect(mamba_state_load(x.model, x.state, "tests/no-such-file") == -1,
           "a missing state file is an error");
    size_t bytes;
    unsigned char *file = (unsigned char *)read_text(path, &bytes);
    test_damaged_states(&x, file, bytes, path, test_everything ? 10000 : 400);
    remove(path);
    Config shape;
    parse_shape("130m", "bf16", &shape);
    report(STATE_HEADER + 4 * state_floats(&shape) < 3300000, "a 130m state is under 3.3 MB",
           "%zu bytes", STATE_HEADER + 4 * state_floats(&shape));
    free(file);
    free_aligned(end);
    mamba_state_free(copy);
    session_close(&x);
    session_close(&other);
}
