// files/trainer.h: the memory of a training pass, in one allocation.

// Lays out all arrays of x for x->B sequences of x->L tokens.
static void trainer_layout(Trainer *x, Arena *from) {
    const Config *c = &x->model->config;
    const size_t B = (size_t)x->B, T = B * (size_t)x->L, D = (size_t)c->D, E = (size_t)c->E;
    const size_t P = (size_t)(c->R + 2 * c->N), V = (size_t)c->V, layers = (size_t)c->n_layer;
    const size_t NE = (size_t)c->N * E, window = (size_t)(c->K - 1) * E;
    const bool normed = c->flags & FLAG_MIXER_NORM;
    size_t widest = 2 * E > D ? 2 * E : D, loss = V > D ? V : D, packed, packed_loss;
    if (widest < P) widest = P;
    packed = matmul_floats(T, widest);
    packed_loss = matmul_floats(LOSS_ROWS, loss);

    x->work = take(from, layers + 1, sizeof *x->work);
    x->seq = take(from, layers * B, sizeof *x->seq);
    Work shared = {.for_each_layer = true};
    shared.xn = take_floats(from, T * D);
    shared.g = take_floats(from, T * E);
    shared.packed = take_floats(from, packed > packed_loss ? packed : packed_loss);
    float *res = take_floats(from, T * D);
    for (size_t layer = 0; layer <= layers; layer++) {
        Work w = shared;
        w.res = res;
        if (layer < layers) {
            w.next = res = take_floats(from, T * D);
            w.xz = take_floats(from, T * 2 * E);
            w.u = take_floats(from, T * E);
            w.xdb = take_floats(from, T * P);
            w.raw = normed ? take_floats(from, T * P) : w.xdb;
            w.delta = take_floats(from, T * E);
            w.y = take_floats(from, T * E);
        }
        if (x->work) x->work[layer] = w;
    }
    x->h0 = take_floats(from, B * NE);
    x->window0 = take_floats(from, B * window);
    x->h = take_floats(from, layers * B * NE);
    x->window = take_floats(from, layers * B * window);
    x->d_h = take_floats(from, B * NE);
    x->d_window = take_floats(from, B * window);
    for (size_t i = 0; i < layers * B && x->seq; i++)
        x->seq[i] = (LayerState){x->window + i * window, x->h + i * NE};
    x->d_res = take_floats(from, T * D);
    x->d_xn = take_floats(from, T * D);
    x->d_xz = take_floats(from, T * 2 * E);
    x->d_u = take_floats(from, T * E);
    x->d_delta = take_floats(from, T * E);
    x->d_y = take_floats(from, T * E);
    x->d_xdb = take_floats(from, T * P);
    x->d_c = take_floats(from, (size_t)x->L * E);
    x->scale = take_floats(from, T);
    x->losses = take_floats(from, T);
    x->logits = take_floats(from, LOSS_ROWS * V);
    x->scan = take_floats(from, scan_backward_floats(x->B, x->L, c->E, c->N));
}

// The memory that a trainer of m needs beside weights, gradient and moments (each of
// m->tensors_bytes), for passes of B sequences of L tokens.
size_t mamba_trainer_bytes(Model *m, int B, int L) {
    Trainer measure = {.model = m, .B = B, .L = L};
    Arena arena = {NULL, 0};
    trainer_layout(&measure, &arena);
    return arena.used;
}
