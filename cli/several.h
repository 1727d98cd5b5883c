// cli/several.h - generate --samples and --batch: up to BATCH_MAX sequences share every read of the
// weights. Where one ends, the next text begins, so memory does not depend on how many there are.
// Texts are printed in order, each once it and all before it have ended.
//
// Depends on cli/generate.h (options, read_prompt, Report) and cli/output.h.

enum { TEXTS_MAX = 1024 }; // texts that have begun and are not printed yet

typedef enum { GOES_ON, LENGTH, END_OF_TEXT, STOP_STRING, INTERRUPTED, N_ENDINGS } Ending;
static const char *const ENDING_NAME[N_ENDINGS] = {
    [LENGTH] = "length",
    [END_OF_TEXT] = "end of text",
    [STOP_STRING] = "stop string",
    [INTERRUPTED] = "interrupted",
};

typedef struct {
    const char *text; // a line of the file, or the prompt of the command line
    size_t bytes;
    size_t at, n; // its tokens are ids[at..at + n)
} Prompt;

typedef struct {
    State *state;
    Output out;
    size_t number; // of its text
    long written;  // tokens
} Sequence;

// Text number k is sample k % samples of prompt k / samples.
typedef struct {
    Session *x;
    const GenerateOptions *o;
    Prompt *prompt;
    size_t n_prompts, samples, total; // total: of all texts
    int32_t *ids;                     // of all prompts
    size_t n_ids, room;
    State *start; // where every prompt begins: zeros or a loaded state
    uint64_t seed;
    Sequence sequence[BATCH_MAX]; // the first `running` are being written
    int running, slots;
    size_t begun, printed; // texts
    Text text[TEXTS_MAX];  // of text k at k % TEXTS_MAX
    bool whole[TEXTS_MAX]; // it has ended
    unsigned char *bytes;  // room for one token's text
    size_t ended[N_ENDINGS];
} Several;

// The generator's start for a sample of a prompt. Sample 0 uses the seed itself, so that its text
// is that of a run without --samples. Sample s uses the s-th output of a generator that starts at
// the seed: these lie far from each other on SplitMix64's circle of 2^64.
static uint64_t sample_seed(uint64_t seed, size_t sample) {
    if (sample == 0) return seed;
    uint64_t at = seed + (uint64_t)(sample - 1) * 0x9E3779B97F4A7C15u;
    return random_u64(&at);
}

// --- prompts

// where: names the prompt in errors. 0, or -1 after fail().
static int several_add_prompt(Several *all, const char *where, const char *text, size_t bytes) {
    const Model *m = all->x->model;
    int32_t *ids = NULL, start = start_token(&m->config);
    size_t n = 0;
    const bool begins = all->x->state->position == 0;
    if (encode_prompt(m, text, bytes, begins, &ids, &n)) return fail_in(where);
    const bool starts = n == 0 && begins;
    if (starts && start < 0) {
        free(ids);
        return fail("%s: this model has no end-of-text token to start from: give a prompt", where);
    }
    if (starts) n = 1;
    if (all->n_ids + n > all->room) {
        size_t room = (all->n_ids + n) * 2;
        int32_t *larger = realloc(all->ids, size_mul(room, sizeof *larger));
        if (!larger) {
            free(ids);
            return fail("out of memory: %zu tokens of prompts", room);
        }
        all->ids = larger;
        all->room = room;
    }
    if (n) memcpy(all->ids + all->n_ids, starts ? &start : ids, n * sizeof *ids);
    free(ids);
    all->prompt[all->n_prompts++] = (Prompt){text, bytes, all->n_ids, n};
    all->n_ids += n;
    return 0;
}

// Encodes every prompt before anything is written. text: the file of --batch, a prompt a line; or
// the one prompt. 0, or -1 after fail().
static int several_prompts(Several *all, const char *text, size_t bytes) {
    const char *batch = all->o->batch;
    size_t n = 1;
    if (batch && bytes == 0) return fail("%s: empty: --batch needs one prompt a line", batch);
    for (size_t i = 0; batch && i + 1 < bytes; i++) n += text[i] == '\n';
    all->prompt = calloc(n, sizeof *all->prompt);
    if (!all->prompt) return fail("out of memory: %zu prompts", n);
    if (!batch) return several_add_prompt(all, "prompt", text, bytes);
    for (size_t i = 0, at = 0; i < n; i++) {
        char where[256];
        const char *line = text + at, *end = memchr(line, '\n', bytes - at);
        size_t length = end ? (size_t)(end - line) : bytes - at;
        at += length + 1;
        if (length && line[length - 1] == '\r') length--;
        snprintf(where, sizeof where, "%s line %zu", batch, i + 1);
        if (several_add_prompt(all, where, line, length)) return -1;
    }
    return 0;
}

// --- one text from its begin to its end

// Begins the next text in a free slot. The session's state holds what follows the prompt: it is
// read for the prompt's first sample and copied for each. 0, or -1 after fail().
static int several_begin(Several *all, Report *report) {
    const Model *m = all->x->model;
    const Prompt *p = &all->prompt[all->begun / all->samples];
    const size_t sample = all->begun % all->samples;
    State *read = all->x->state;
    if (sample == 0) {
        Report one = {0};
        mamba_state_copy(m, read, all->start);
        if (p->n && read_prompt(all->x, all->ids + p->at, p->n, &one)) return -1;
        report->n_read += one.n_read;
        report->read_seconds += one.read_seconds;
        if (interrupted) return 0;
    }
    Sequence *q = &all->sequence[all->running++];
    Text *text = &all->text[all->begun % TEXTS_MAX];
    mamba_state_copy(m, q->state, read);
    q->state->random = sample_seed(all->seed, sample);
    q->number = all->begun++;
    q->written = 0;
    q->out.into = text;
    q->out.held.n = 0;
    if (p->bytes == 0) return 0;
    // A new text: a character that the loaded state left unfinished ends here.
    if (text_add(text, all->bytes, mamba_decode(m, q->state, -1, all->bytes))) return -1;
    return all->o->no_echo ? 0 : text_add(text, p->text, p->bytes);
}

// Takes in the token that was drawn for q. An Ending, or -1 after fail().
static int several_accept(Several *all, Sequence *q, int32_t id) {
    const Model *m = all->x->model;
    if (interrupted) return INTERRUPTED;
    if (is_eos(&m->config, id) && !all->o->ignore_eos) return END_OF_TEXT;
    int stopped = output_add(&q->out, all->bytes, mamba_decode(m, q->state, id, all->bytes));
    q->written++;
    if (stopped) return stopped < 0 ? -1 : STOP_STRING;
    return q->written == all->o->n ? LENGTH : GOES_ON;
}

// Prints the texts that have ended, up to the first that has not. 0, or -1 after fail().
static int several_print(Several *all) {
    const GenerateOptions *o = all->o;
    for (; all->printed < all->begun; all->printed++) {
        size_t at = all->printed % TEXTS_MAX, line = all->printed / all->samples + 1;
        Text *text = &all->text[at];
        if (!all->whole[at]) break;
        if (!o->null && o->batch && all->samples > 1)
            printf("=== line %zu, sample %zu\n", line, all->printed % all->samples + 1);
        else if (!o->null) printf("=== %s %zu\n", o->batch ? "line" : "sample", all->printed + 1);
        fwrite(text->bytes, 1, text->n, stdout);
        putchar(o->null ? 0 : '\n');
        free(text->bytes);
        *text = (Text){0};
        all->whole[at] = false;
    }
    return flush_stdout();
}

// Ends the text of sequence i, moves the last running sequence into slot i, and prints what can be
// printed. 0, or -1 after fail().
static int several_end(Several *all, int i, Ending why) {
    Sequence q = all->sequence[i];
    if (why != STOP_STRING) {
        size_t n = mamba_decode(all->x->model, q.state, -1, all->bytes);
        if (output_add(&q.out, all->bytes, n) < 0) return -1;
    }
    if (output_flush(&q.out)) return -1;
    all->ended[why]++;
    all->whole[q.number % TEXTS_MAX] = true;
    all->running--;
    all->sequence[i] = all->sequence[all->running];
    all->sequence[all->running] = q; // keeps its state and its memory
    return several_print(all);
}

// --- all texts

// Fills free slots with new texts. 0, or -1 after fail().
static int several_fill(Several *all, Report *report) {
    while (all->running < all->slots && all->begun < all->total &&
           all->begun - all->printed < TEXTS_MAX && !interrupted)
        if (several_begin(all, report)) return -1;
    return 0;
}

static int several_loop(Several *all, Report *report) {
    const Model *m = all->x->model;
    const Sampling how = sampling_of(all->o);
    Acts *a = all->x->acts;
    for (;;) {
        int32_t ids[BATCH_MAX];
        State *states[BATCH_MAX];
        if (several_fill(all, report)) return -1;
        if (all->running == 0) return 0;
        for (int i = 0; i < all->running; i++) states[i] = all->sequence[i].state;
        if (mamba_sample_batch(m, a, states, &how, ids, all->running)) return -1;
        // Iterate backwards: several_end() moves the last sequence, already seen, into slot i.
        for (int i = all->running - 1; i >= 0; i--) {
            int why = several_accept(all, &all->sequence[i], ids[i]);
            if (why < 0) return -1;
            report->n_written += why != END_OF_TEXT && why != INTERRUPTED;
            if (why == GOES_ON) continue;
            if (several_end(all, i, (Ending)why)) return -1;
            ids[i] = ids[all->running];
        }
        for (int i = 0; i < all->running; i++) states[i] = all->sequence[i].state;
        if (all->running && mamba_step_batch(m, a, states, ids, all->running)) return -1;
    }
}

// Memory for the sequences, and the state that every prompt begins with. 0, or -1 after fail().
static int several_open(Several *all) {
    const Model *m = all->x->model;
    all->total = size_mul(all->n_prompts, all->samples);
    all->slots = all->total < BATCH_MAX ? (int)all->total : BATCH_MAX;
    all->bytes = malloc(m->text_room);
    if (!all->bytes) return fail("out of memory: %d sequences", all->slots);
    all->start = mamba_state_new(m);
    if (!all->start) return -1;
    mamba_state_copy(m, all->start, all->x->state);
    for (int i = 0; i < all->slots; i++) {
        all->sequence[i].out.stop = &all->o->stop;
        all->sequence[i].state = mamba_state_new(m);
        if (!all->sequence[i].state) return -1;
    }
    return 0;
}

static void several_close(Several *all) {
    for (int i = 0; i < BATCH_MAX; i++) {
        mamba_state_free(all->sequence[i].state);
        free(all->sequence[i].out.held.bytes);
    }
    for (int i = 0; i < TEXTS_MAX; i++) free(all->text[i].bytes);
    mamba_state_free(all->start);
    free(all->prompt);
    free(all->ids);
    free(all->bytes);
    free(all);
}

// "5 texts: 3 length, 2 stop string"
static void endings_text(char *text, size_t room, const Several *all) {
    int at = snprintf(text, room, "%zu texts", all->printed);
    const char *separator = ":";
    for (int why = LENGTH; why < N_ENDINGS; why++) {
        if (!all->ended[why]) continue;
        at += snprintf(text + at, room - (size_t)at, "%s %zu %s", separator, all->ended[why],
                       ENDING_NAME[why]);
        separator = ",";
    }
}

// Writes every text of --samples or --batch. text: the file of --batch, or the prompt. 0, or -1
// after fail().
static int generate_several(Session *x, const GenerateOptions *o, const char *text, size_t bytes) {
    Report report = {.seed = o->clock_seed && o->temperature > 0 ? o->seed : -1};
    char ended[160];
    Several *all = calloc(1, sizeof *all);
    if (!all) return fail("out of memory");
    all->x = x;
    all->o = o;
    all->samples = (size_t)o->samples;
    all->seed = x->state->random;
    int result = several_prompts(all, text, bytes);
    if (result == 0) result = several_open(all);
    if (result == 0) {
        double start = seconds();
        result = several_loop(all, &report);
        report.write_seconds = seconds() - start - report.read_seconds;
    }
    endings_text(ended, sizeof ended, all);
    report.ended = ended;
    if (result == 0) print_report(x, &report);
    several_close(all);
    return result;
}
