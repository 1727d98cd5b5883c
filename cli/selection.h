// cli/selection.h - generate --show-selection: the prompt, each token in the colour of its mean
// delta, which is how far the model lets the token into its state.
//
// Depends on cli/generate.h (Prompt), cli/options.h (Session) and on mamba_selection().

// Of the 256 terminal colours, pale to dark: pale, the token hardly enters the state.
// dev/selection.py has the same colours and the same scale.
static const int HEAT[] = {255, 153, 111, 68, 26, 19, 17};
enum { FIRST_DARK = 4 }; // from this index of HEAT on, text is white instead of black

typedef struct {
    double lowest, highest; // log(delta) at the ends of the scale
    bool colours;
} Scale;

// The scale spans a factor of 2 at least: tokens that differ by less look nearly the same.
static void widen_scale(Scale *scale) {
    const double least = 0.6931471805599453, lacks = least - (scale->highest - scale->lowest);
    if (lacks <= 0) return;
    scale->lowest -= lacks / 2;
    scale->highest += lacks / 2;
}

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
    double along = (log_delta(delta) - scale->lowest) / (scale->highest - scale->lowest);
    int shade = (int)fmin(along * COUNT(HEAT), COUNT(HEAT) - 1);
    printf("\033[48;5;%d;38;5;%dm", HEAT[shade], shade < FIRST_DARK ? 16 : 255);
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
    const char *no_colour = getenv("NO_COLOR"); // no-color.org: set and not empty
    scale.colours = isatty(STDOUT_FILENO) && !(no_colour && *no_colour);
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
    widen_scale(&scale);
    if (result == 0) {
        for (size_t t = 0; t < n; t++) print_selected(m, ids[t], delta[t], &scale);
        if (scale.colours) print_legend(&scale, layer < 0);
    }
    free(delta);
    return result;
}

// o->layer -1: the mean of all. 0, or -1 after fail().
static int show_selection(Session *x, const GenerateOptions *o, const char *text, size_t bytes) {
    Prompt p = {.text = text, .bytes = bytes};
    int result = encode_prompt(x, o, &p) ? fail_in("prompt") : 0;
    if (result == 0) result = show_selected(x, p.ids, p.n, o->layer);
    free(p.ids);
    return result;
}
