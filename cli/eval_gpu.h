// cli/eval_gpu.h - eval on a GPU: several pieces of a text, or sequences of a task, at once.
//
// Included by cli/eval.h.

typedef struct { // (texts,L) each
    int32_t *ids, *targets, *likeliest;
    float *losses;
    ScoreRun run;
} TextScores;

static void scores_close(TextScores *t) {
    free(t->ids);
    free(t->targets);
    free(t->likeliest);
    free(t->losses);
}

// 0, or -1 after fail(); scores_close() in both cases.
static int scores_open(TextScores *t, size_t texts, size_t L) {
    const size_t n = size_mul(size_mul(texts, L), sizeof(int32_t));
    *t = (TextScores){malloc(n), malloc(n), malloc(n), malloc(n), {0}};
    if (t->ids && t->targets && t->likeliest && t->losses) return 0;
    return fail("out of memory: the scores of %zu texts of %zu tokens", texts, L);
}

// The pieces of ids (n) that have something to predict: where each begins, then their tokens, then
// whether they begin with a begin-of-text (count each), malloc'd. NULL after fail().
static size_t *pieces_of(const Model *m, const int32_t *ids, size_t n, const Pieces *how,
                         size_t *count) {
    size_t *at = NULL;
    for (int store = 0; store < 2; store++) {
        size_t i = 0;
        EvalPiece p = {.ends = true};
        for (size_t from = 0; from < n; from = p.at + p.n) {
            p = next_piece(&m->config, ids, n, how, from, p.ends);
            if (p.n < 2) continue;
            if (store) {
                at[i] = p.at;
                at[*count + i] = p.n;
                at[2 * *count + i] = p.bos;
            }
            i++;
        }
        *count = i;
        if (!store) at = malloc(size_mul(3 * i + 1, sizeof *at));
        if (!at) return fail("out of memory: %zu pieces of text", i), NULL;
    }
    return at;
}

// Scores pieces of ids, of which piece b has the n[b] tokens from at[b] on, padded to L; with
// bos[b] the first is the begin-of-text instead. Every other token is predicted. 0, or -1 after
// fail().
static int score_pieces(Likelihood *l, const Session *x, const int32_t *ids, const size_t *at,
                        const size_t *n, const size_t *bos, size_t pieces, size_t L,
                        const Pieces *how) {
    TextScores t = {0};
    if (L > INT_MAX) return fail("a text of %zu tokens: --context cuts it", L);
    int result = scores_open(&t, pieces, L);
    for (size_t i = 0; i < pieces * L && result == 0; i++) {
        const size_t b = i / L, k = i % L;
        t.ids[i] = k == 0 && bos[b] ? how->bos : k < n[b] ? ids[at[b] + k] : 0;
        t.targets[i] = k + 1 < n[b] ? ids[at[b] + k + 1] : -1;
    }
    t.run = (ScoreRun){t.ids, t.targets, (int)pieces, (int)L, 0, false, t.losses, t.likeliest};
    if (result == 0) result = mamba_score_texts(x->acts, &t.run);
    for (size_t b = 0; b < pieces && result == 0; b++) {
        l->bytes += predicted_bytes(x->model, ids + at[b], n[b]);
        l->predicted += n[b] - 1;
        for (size_t k = 0; k + 1 < n[b]; k++) {
            const double nll = (double)t.losses[b * L + k];
            l->sum += nll;
            if (how->each) printf("%.6f\n", nll);
        }
    }
    scores_close(&t);
    return result;
}

// text_likelihood() on a GPU.
static int text_likelihood_gpu(Likelihood *l, const Session *x, const int32_t *ids, size_t n,
                               const Pieces *how) {
    size_t count = 0, L = 0;
    size_t *at = pieces_of(x->model, ids, n, how, &count);
    int result = at ? 0 : -1;
    for (size_t i = 0, now; i < count && result == 0; i += now) {
        const size_t *tokens = at + count + i;
        now = mamba_texts_fit(x->acts, tokens, count - i, &L, TEXTS_SCORED);
        result = score_pieces(l, x, ids, at + i, tokens, tokens + count, now, L, how);
    }
    free(at);
    return result;
}
