// cpu/small_vocabulary.h: the first layer where the vocabulary is small. Included by mamba.c before
// block().

// A row of xz in the first layer depends on the token's id alone. Where the pass has at least two
// rows for each id, the row of every id is computed once and copied. w->delta, not in use yet,
// holds the V rows. Returns false where this does not apply, with nothing done.
static bool in_proj_of_ids(const Model *m, Work *w, const Tensor *in_proj, int T, int L) {
    const Config *c = &m->config;
    const Layer *p = &m->layer[0];
    if (!w->ids || L == 1 || c->V < MATMUL_FEW || 2 * c->V > T) return false;
    size_t row = 2 * (size_t)c->E;
    embed(w->xn, NULL, &m->embedding, c->V);
    norm_rows(w->xn, w->xn, f32(&p->norm), f32(&p->norm_bias), c->norm_eps, c->V, c->D,
              (size_t)c->D);
    matmul(w->delta, row, w->xn, (size_t)c->D, in_proj, f32(&p->in_bias),
           (Rows){c->V, false, w->packed});
#pragma omp for
    for (int t = 0; t < T; t++)
        memcpy(w->xz + (size_t)t * row, w->delta + (size_t)w->ids[t] * row,
               (size_t)in_proj->rows * sizeof(float));
    return true;
}
