// --- show-selection: the text, each token in the colour of its mean delta: how far the model lets
// it into its state

static const int HEAT[] = {234, 237, 240, 60,  61,
                           97,  133, 169, 205, 211}; // of the 256 terminal colours, dark to bright

static void print_selected(const Model *m, int32_t id, float delta, double lowest, double highest,
                           bool colours) {
    size_t bytes = 0;
    bool known = m->tokenizer && tokenizer_has(m->tokenizer, id);
    const unsigned char *text = known ? tokenizer_token(m->tokenizer, id, &bytes) : NULL;
    double along =
        highest > lowest ? (log(fmax((double)delta, 1e-30)) - lowest) / (highest - lowest) : 0.5;
    int shade = (int)fmin(along * COUNT(HEAT), COUNT(HEAT) - 1);
    if (colours) printf("\033[48;5;%d;38;5;%dm", HEAT[shade], shade < 6 ? 255 : 16);
    else printf("%d\t%.6g\t", id, (double)delta);
    for (size_t i = 0; i < bytes; i++) { // control characters are shown, not obeyed
        if (text[i] == '\n') printf("\\n");
        else if (text[i] == '\\' && !colours) printf("\\\\");
        else if (text[i] < ' ' || text[i] == 127) printf("\\x%02x", text[i]);
        else putchar(text[i]);
    }
    if (colours) printf("\033[0m%s", bytes && text[bytes - 1] == '\n' ? "\n" : "");
    else printf("\n");
}

// Reads ids and prints each by its delta: coloured on a terminal, else a line of id, delta, text.
static int show_selection(Session *x, const int32_t *ids, size_t n, long layer) {
    const Model *m = x->model;
    double lowest = INFINITY, highest = -INFINITY; // logarithms
    bool colours = false;
#ifdef MAMBA_POSIX
    colours = isatty(STDOUT_FILENO);
#endif
    if (layer >= m->config.n_layer)
        return fail("--layer %ld: the model has layers 0 to %d", layer, m->config.n_layer - 1);
    if (n == 0) return fail("--show-selection needs a prompt");
    float *delta = calloc(n, sizeof *delta);
    if (!delta) return fail("out of memory: %zu tokens", n);
    mamba_selection(x->acts, delta, (int)layer);
    int result = mamba_prefill(m, x->acts, x->state, ids, n, NULL, NULL);
    mamba_selection(x->acts, NULL, -1);
    for (size_t t = 0; t < n; t++) {
        double log_delta = log(fmax((double)delta[t], 1e-30));
        lowest = fmin(lowest, log_delta), highest = fmax(highest, log_delta);
    }
    for (size_t t = 0; t < n && result == 0; t++)
        print_selected(m, ids[t], delta[t], lowest, highest, colours);
    if (result == 0 && colours) {
        printf("\nmean delta %s: %.3g ", layer < 0 ? "of all layers" : "of the layer", exp(lowest));
        for (int i = 0; i < COUNT(HEAT); i++) printf("\033[48;5;%dm  ", HEAT[i]);
        printf("\033[0m %.3g, logarithmic\n", exp(highest));
    }
    free(delta);
    return result;
}

