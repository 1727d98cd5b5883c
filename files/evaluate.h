// files/evaluate.h: the loss of a model on a text.

typedef struct {
    const Model *m;
    const int32_t *next; // the token after the position of the next logits
    size_t left;         // tokens from next on
    double sum;
} NllSum;

static void evaluate_position(void *context, const float *logits) {
    NllSum *e = context;
    if (e->left == 0) return; // nothing follows the last token
    e->sum += mamba_nll(e->m, logits, *e->next);
    e->next++;
    e->left--;
}

// Reads n tokens into the state as mamba_prefill does. *nll: the sum of -log p, in nats, of all but
// the first of them, each given everything before it. 0, or -1 after fail().
int mamba_evaluate(const Model *m, Acts *a, State *s, const int32_t *ids, size_t n, double *nll) {
    NllSum e = {.m = m, .next = n ? ids + 1 : ids, .left = n ? n - 1 : 0};
    if (mamba_prefill(m, a, s, ids, n, evaluate_position, &e)) return -1;
    *nll = e.sum;
    return 0;
}
