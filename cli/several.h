// --- several texts at once, --samples and --batch: up to BATCH_MAX sequences share every read of
// the weights. One that ends makes room for the next, so memory does not depend on how many there
// are. Texts are printed in order, each when it and those before it are whole.

enum { TEXTS_MAX = 1024 }; // that are begun and not yet printed

typedef struct {
    const char *text;    // a line of the file, or the prompt of the command line
    size_t bytes, at, n; // its tokens are ids[at..at + n)
} Prompt;

typedef struct {
    State *state;
    Output out;
    size_t number; // of its text
    long written;
} Sequence;

typedef struct {
    Session *x;
    const GenerateOptions *o;
    Prompt *prompt;
    size_t n_prompts, samples, begun, printed; // texts: number = prompt * samples + sample
    int32_t *ids;                              // of all prompts
    State *start; // what every prompt goes on from: zeros or a loaded state
    uint64_t seed;
    Sequence sequence[BATCH_MAX];
    int running, slots;
    Text text[TEXTS_MAX]; // number n at n % TEXTS_MAX
    bool whole[TEXTS_MAX];
    unsigned char *bytes; // one token's
    size_t ended[4];      // texts by why they ended
} Many;
static const char *const ENDED[4] = {"length", "end of text", "stop string", "interrupted"};

// The generator's start for sample s of a prompt: the seed itself for the first, so that it is the
// text of a run without
// --samples; for the others the s-th output of a generator that starts there, far from each other
// on SplitMix64's circle of 2^64.
static uint64_t sample_seed(uint64_t seed, size_t sample) {
    uint64_t at = seed + (uint64_t)(sample - 1) * 0x9E3779B97F4A7C15u;
    return sample ? random_u64(&at) : seed;
}

// Tokens of all prompts, checked before anything is written. text: the file's, in which lines are
// the prompts; or the one prompt.
static int many_prompts(Many *y, const char *text, size_t bytes) {
    const char *batch = y->o->batch;
    char where[256] = "prompt";
    size_t n = 1, room = 0, total = 0;
    if (batch && bytes == 0) return fail("%s: empty: --batch needs one prompt a line", batch);
    for (size_t i = 0; batch && i + 1 < bytes; i++) n += text[i] == '\n';
    y->prompt = calloc(n, sizeof *y->prompt);
    if (!y->prompt) return fail("out of memory: %zu prompts", n);
    y->n_prompts = n;
    for (size_t p = 0, at = 0; p < n; p++) {
        const char *line = text + at, *end = batch ? memchr(line, '\n', bytes - at) : NULL;
        size_t length = end ? (size_t)(end - line) : bytes - at, n_ids = 0;
        at += length + 1;
        if (batch && length && line[length - 1] == '\r') length--;
        if (batch) snprintf(where, sizeof where, "%s line %zu", batch, p + 1);
        int32_t *ids = NULL;
        if (length && mamba_encode(y->x->model, line, length, &ids, &n_ids)) return fail_in(where);
        if (n_ids == 0 && y->x->state->position == 0) { // a new text
            int32_t start = start_token(&y->x->model->config);
            if (start < 0)
                return fail("%s: this model has no end-of-text token to start from: give a prompt",
                            where);
            free(ids);
            if (!(ids = malloc(sizeof *ids))) return fail("out of memory");
            ids[0] = start, n_ids = 1;
        }
        if (total + n_ids > room) {
            int32_t *larger = realloc(y->ids, size_mul(room = (total + n_ids) * 2, sizeof *ids));
            if (!larger) return free(ids), fail("out of memory: %zu tokens of prompts", room);
            y->ids = larger;
        }
        if (n_ids) memcpy(y->ids + total, ids, n_ids * sizeof *ids);
        free(ids);
        y->prompt[p] = (Prompt){line, length, total, n_ids};
        total += n_ids;
    }
    return 0;
}

// Begins the next text in a free place: reads its prompt, unless the text before was another sample
// of the same.
static int many_begin(Many *y, Report *report) {
    const Model *m = y->x->model;
    const Prompt *p = &y->prompt[y->begun / y->samples];
    size_t sample = y->begun % y->samples;
    State *read = y->x->state;
    if (sample == 0) {
        Report one = {0};
        mamba_state_copy(m, read, y->start);
        if (p->n && read_prompt(y->x, y->ids + p->at, p->n, &one)) return -1;
        report->n_read += one.n_read, report->read_seconds += one.read_seconds;
        if (interrupted) return 0;
    }
    Sequence *q = &y->sequence[y->running++];
    Text *text = &y->text[y->begun % TEXTS_MAX];
    mamba_state_copy(m, q->state, read);
    q->state->random = sample_seed(y->seed, sample);
    q->number = y->begun++, q->written = 0;
    q->out.into = text, q->out.held.n = 0;
    unsigned char cut[4]; // as for a single prompt
    size_t n_cut = p->bytes ? utf8_flush(&q->state->pending, cut) : 0;
    return text_add(text, cut, n_cut) || (!y->o->no_echo && text_add(text, p->text, p->bytes)) ? -1
                                                                                               : 0;
}

// Takes in what was drawn for q. Returns 0, 1 + the index in ENDED if its text ends, -1 after
// fail().
static int many_accept(Many *y, Sequence *q, int32_t id) {
    const Model *m = y->x->model;
    if (is_eos(&m->config, id) && !y->o->ignore_eos) return 2;
    int stopped = output_add(&q->out, y->bytes, mamba_decode(m, q->state, id, y->bytes));
    q->written++;
    return stopped < 0 ? -1 : stopped ? 3 : q->written == y->o->n ? 1 : 0;
}

// Ends sequence i's text, gives its place to the last one, and prints what can be printed.
static int many_end(Many *y, int i, int why) {
    Sequence q = y->sequence[i];
    if (why != 3 &&
        output_add(&q.out, y->bytes, mamba_decode(y->x->model, q.state, -1, y->bytes)) < 0)
        return -1;
    if (output_flush(&q.out)) return -1;
    y->ended[why - 1]++;
    y->whole[q.number % TEXTS_MAX] = true;
    y->sequence[i] = y->sequence[--y->running], y->sequence[y->running] = q;
    for (size_t k; y->printed < y->begun && y->whole[k = y->printed % TEXTS_MAX]; y->printed++) {
        Text *text = &y->text[k];
        if (!y->o->null && y->o->batch && y->samples > 1)
            printf("=== line %zu, sample %zu\n", y->printed / y->samples + 1,
                   y->printed % y->samples + 1);
        else if (!y->o->null)
            printf("=== %s %zu\n", y->o->batch ? "line" : "sample", y->printed + 1);
        fwrite(text->bytes, 1, text->n, stdout);
        putchar(y->o->null ? 0 : '\n');
        free(text->bytes);
        *text = (Text){0}, y->whole[k] = false;
    }
    return fflush(stdout) || ferror(stdout) ? fail("stdout: cannot write: %s", strerror(errno)) : 0;
}

static int many_loop(Many *y, Report *report) {
    const Model *m = y->x->model;
    const GenerateOptions *o = y->o;
    const Sampling how = {(float)o->temperature, (float)o->top_p, (int)o->top_k, (float)o->min_p,
                          (float)o->repeat_penalty};
    Acts *a = y->x->acts;
    size_t total = size_mul(y->n_prompts, y->samples);
    for (;;) {
        while (y->running < y->slots && y->begun < total && y->begun - y->printed < TEXTS_MAX &&
               !interrupted)
            if (many_begin(y, report)) return -1;
        if (y->running == 0) return 0;
        int32_t ids[BATCH_MAX];
        State *states[BATCH_MAX];
        const int n = y->running;
        for (int i = 0; i < n; i++) states[i] = y->sequence[i].state;
        if (mamba_sample_batch(m, a, states, &how, ids, n)) return -1;
        for (int i = n - 1; i >= 0; i--) { // backward: the one that takes a place is done with
            int why = interrupted ? 4 : many_accept(y, &y->sequence[i], ids[i]);
            if (!interrupted) report->n_written += why != 2;
            if (why < 0 || (why && many_end(y, i, why))) return -1;
            if (why) ids[i] = ids[y->running];
        }
        for (int i = 0; i < y->running; i++) states[i] = y->sequence[i].state;
        if (y->running && mamba_step_batch(m, a, states, ids, y->running)) return -1;
    }
}

// Every text of --samples or --batch. text: the prompt, or the file's.
static int generate_many(Session *x, const GenerateOptions *o, const char *text, size_t bytes) {
    Report report = {.seed = o->clock_seed && o->temperature > 0 ? o->seed : -1};
    Many *y = calloc(1, sizeof *y);
    if (!y) return fail("out of memory");
    y->x = x, y->o = o, y->samples = (size_t)o->samples, y->seed = x->state->random;
    int result = many_prompts(y, text, bytes);
    size_t total = size_mul(y->n_prompts, y->samples);
    y->slots = total < BATCH_MAX ? (int)total : BATCH_MAX;
    if (result == 0) {
        y->bytes = malloc(x->model->text_room);
        y->start = mamba_state_new(x->model);
        if (!y->bytes) result = fail("out of memory: %d sequences", y->slots);
        if (!y->start) result = -1;
    }
    for (int i = 0; i < y->slots && result == 0; i++) {
        y->sequence[i].out.stop = &o->stop;
        result = (y->sequence[i].state = mamba_state_new(x->model)) ? 0 : -1;
    }
    if (result == 0) {
        mamba_state_copy(x->model, y->start, x->state);
        double start = seconds();
        result = many_loop(y, &report);
        report.write_seconds = seconds() - start - report.read_seconds;
    }
    char ended[160];
    int at = snprintf(ended, sizeof ended, "%zu texts", y->printed), colon = at;
    for (int i = 0; i < 4; i++)
        if (y->ended[i])
            at += snprintf(ended + at, sizeof ended - (size_t)at, "%s %zu %s",
                           at == colon ? ":" : ",", y->ended[i], ENDED[i]);
    report.ended = ended;
    if (result == 0) print_report(x, &report);
    for (int i = 0; i < BATCH_MAX; i++)
        mamba_state_free(y->sequence[i].state), free(y->sequence[i].out.held.bytes);
    for (int i = 0; i < TEXTS_MAX; i++) free(y->text[i].bytes);
    mamba_state_free(y->start);
    free(y->prompt), free(y->ids), free(y->bytes), free(y);
    return result;
}
