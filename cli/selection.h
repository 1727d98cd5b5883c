// cli/selection.h - generate --show-selection: the prompt, each token in the colour of its mean
// delta, which is how far the model lets the token into its state.
//
// Depends on cli/options.h (Session) and on mamba_selection().

// Of the 256 terminal colours, dark to bright.
static const int HEAT[] = {234, 237, 240, 60, 61, 97, 133, 169, 205, 211};
enum { FIRST_BRIGHT = 6 }; // from this index of HEAT on, text is black instead of white

typedef struct {
    double lowest, highest; // log(delta) of all tokens
    bool colours;
} Scale;

static double log_delta(float delta) { return log(fmax((double)delta, 1e-30)); }

// Prints bytes (n) with control characters shown, not obeyed.
static void print_visible(const unsigned char *bytes, size_t n, bool escape_backslash) {
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] == '\n') printf("\\n");
        else if (bytes[i] == '\\' && escape_backslash) printf("\\\\");
        else if (bytes[i] < ' ' || bytes[i] == 127) printf("\\x%02x", bytes[i]);
        else putchar(bytes[i]);
    }
}

static void print_selected(const Model *m, int32_t id, float delta, const Scale *scale) {
    size_t n = 0;
    bool known = m->tokenizer && tokenizer_has(m->tokenizer, id);
    const unsigned char *text = known ? tokenizer_token(m->tokenizer, id, &n) : NULL;
    if (!scale->colours) {
        printf("%d\t%.6g\t", id, (double)delta);
        print_visible(text, n, true);
        printf("\n");
        return;
    }
    double range = scale->highest - scale->lowest;
    double along = range > 0 ? (log_delta(delta) - scale->lowest) / range : 0.5;
    int shade = (int)fmin(along * COUNT(HEAT), COUNT(HEAT) - 1);
    printf("\033[48;5;%d;38;5;%dm", HEAT[shade], shade < FIRST_BRIGHT ? 255 : 16);
    print_visible(text, n, false);
    printf("\033[0m%s", n && text[n - 1] == '\n' ? "\n" : "");
}

static void print_legend(const Scale *scale, bool all_layers) {
    printf("\nmean delta %s: %.3g ", all_layers ? "of all layers" : "of the layer",
           exp(scale->lowest));
    for (int i = 0; i < COUNT(HEAT); i++) printf("\033[48;5;%dm  ", HEAT[i]);
    printf("\033[0m %.3g, logarithmic\n", exp(scale->highest));
}

// Reads ids (n). On a terminal it prints them coloured, else a line of id, delta and text for each.
static int show_selected(Session *x, const int32_t *ids, size_t n, long layer) {
    const Model *m = x->model;
    Scale scale = {INFINITY, -INFINITY, false};
#ifdef MAMBA_POSIX
    scale.colours = isatty(STDOUT_FILENO);
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
        scale.lowest = fmin(scale.lowest, log_delta(delta[t]));
        scale.highest = fmax(scale.highest, log_delta(delta[t]));
    }
    if (result == 0) {
        for (size_t t = 0; t < n; t++) print_selected(m, ids[t], delta[t], &scale);
        if (scale.colours) print_legend(&scale, layer < 0);
    }
    free(delta);
    return result;
}

// layer -1: the mean of all. 0, or -1 after fail().
static int show_selection(Session *x, const char *text, size_t bytes, long layer) {
    int32_t *ids = NULL;
    size_t n = 0;
    if (encode_prompt(x->model, text, bytes, x->state->position == 0, &ids, &n))
        return fail_in("prompt");
    int result = show_selected(x, ids, n, layer);
    free(ids);
    return result;
}
