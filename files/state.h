// files/state.h: states in memory: make, free, copy, reset. Files of states are in state_file.h.

static size_t state_floats(const Config *c) {
    return size_add((size_t)c->V,
                    size_mul((size_t)c->n_layer * (size_t)(c->N + c->K - 1), (size_t)c->E));
}

void mamba_state_free(State *s) {
    if (s) state_detach(s);
    free_aligned(s);
}

static void state_point(State *s, const Config *c) {
    s->logits = s->data;
    s->window = s->logits + c->V;
    s->h = s->window + (size_t)c->n_layer * (size_t)(c->K - 1) * (size_t)c->E;
}

// The start of a text: all zeros, nothing read. NULL after fail().
State *mamba_state_new(const Model *m) {
    size_t floats = state_floats(&m->config);
    State *s = alloc_aligned(size_add(sizeof *s, size_mul(floats, sizeof(float))));
    if (!s) return NULL;
    s->floats = floats;
    state_point(s, &m->config);
    return s;
}

// to becomes equal to from; both states of the same model.
void mamba_state_copy(const Model *m, State *to, const State *from) {
    assert(to->floats == from->floats);
    state_detach(to);
    state_fetch(from);
    memcpy(to, from, sizeof *to + from->floats * sizeof(float));
    state_point(to, &m->config);
}

// Back to the start of a text; the random generator goes on.
void mamba_state_reset(const Model *m, State *s) {
    uint64_t random = s->random, floats = s->floats;
    state_detach(s);
    memset(s, 0, sizeof *s + floats * sizeof(float));
    s->random = random, s->floats = floats;
    state_point(s, &m->config);
}
