// files/prefill_rows.h: what mamba_prefill() does with rows of numbers in place of token ids, and
// with the states of the last norm in place of logits. On the processor only.

typedef void HiddenVisitor(void *context, const float *hidden); // (D)

// Reads L rows of a piece into s, by a team of threads. w->res has the rows where ids is NULL.
static void rows_pass(const Model *m, Acts *a, State *s, const int32_t *ids, int L,
                      HiddenVisitor *hidden, LogitsVisitor *visit, void *context) {
    const Config *c = &m->config;
    const size_t D = (size_t)c->D;
    const int team = pass_team(m, a, L);
    (void)team;
    a->work.ids = ids;
    a->work.state_only = false;
    layer_states(a->seq, m, &s, 1);
#pragma omp parallel num_threads(team)
    {
        float *xn = a->work.xn;
        const float *res = forward(m, &a->work, a->seq, 1, L);
        if (hidden) {
            norm_rows(xn, res, f32(&m->norm_f), f32(&m->norm_f_bias), c->norm_eps, L, c->D, D);
#pragma omp single
            for (int t = 0; t < L; t++) hidden(context, xn + (size_t)t * D);
        }
        if (visit) visit_logits(m, a, s, res, L, visit, context);
        else last_logits(m, a, &s, res, 1, L);
    }
}

static int check_rows(const Model *m, const float *rows, size_t n) {
    const size_t D = (size_t)m->config.D;
    for (size_t i = 0; i < n * D; i++)
        if (rows[i] - rows[i] != 0)
            return fail("number %zu of row %zu is not finite", i % D, i / D);
    return 0;
}

static int read_rows(const Model *m, Acts *a, State *s, const int32_t *ids, const float *rows,
                     size_t n, HiddenVisitor *hidden, LogitsVisitor *visit, void *context) {
    const size_t D = (size_t)m->config.D;
    const int32_t end = m->config.eos[0] >= 0 ? m->config.eos[0] : 0;
    if (a->gpu) return fail("rows and hidden states are for the processor: run with --cpu");
    if (state_fetch(s)) return -1;
    for (size_t done = 0; done < n;) {
        int L = n - done < (size_t)a->piece ? (int)(n - done) : a->piece;
        a->work.selection = a->selection ? a->selection + done : NULL;
        if (rows) memcpy(a->work.res, rows + done * D, (size_t)L * D * sizeof *rows);
        rows_pass(m, a, s, ids ? ids + done : NULL, L, hidden, visit, context);
        for (int t = 0; t < L; t++) state_advance(s, ids ? ids + done + t : &end, 1);
        done += (size_t)L;
    }
    return 0;
}

// mamba_prefill() of n rows (n,D) that take the place of the embeddings: of a time series, of
// another network. To the repeat penalty each row is an end-of-text token, or id 0. 0, or -1 after
// fail(): the state is untouched.
int mamba_prefill_rows(const Model *m, Acts *a, State *s, const float *rows, size_t n,
                       LogitsVisitor *visit, void *context) {
    if (check_rows(m, rows, n)) return -1;
    return read_rows(m, a, s, NULL, rows, n, NULL, visit, context);
}

// mamba_prefill() of n ids, or where ids is NULL of n rows, that hands to hidden the state of the
// last norm (D) at each position: what the head makes the logits of, and what classifiers and
// searches work on. 0, or -1 after fail(): the state is untouched.
int mamba_hidden(const Model *m, Acts *a, State *s, const int32_t *ids, const float *rows, size_t n,
                 HiddenVisitor *hidden, void *context) {
    if (ids ? check_ids(m, ids, n) : check_rows(m, rows, n)) return -1;
    return read_rows(m, a, s, ids, ids ? NULL : rows, n, hidden, NULL, context);
}
