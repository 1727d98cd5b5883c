// cli/several.h - generate --samples and --batch: up to BATCH_MAX sequences share every read of the
// weights (on a GPU up to PLACES_USUAL). Where one ends, the next text begins, so memory does not
// depend on how many there are. Texts are printed in order, each once it and all before it have
// ended.
//
// Depends on cli/generate.h (options, prompts, Report) and cli/output.h.

enum { TEXTS_MAX = 1024 };    // texts that have begun and are not printed yet
enum { PROMPTS_AHEAD = 256 }; // prompts that a GPU reads at once, at the most

typedef enum { GOES_ON, LENGTH, END_OF_TEXT, STOP_STRING, INTERRUPTED, N_ENDINGS } Ending;
static const char *const ENDING_NAME[N_ENDINGS] = {
    [LENGTH] = "length",
    [END_OF_TEXT] = "end of text",
    [STOP_STRING] = "stop string",
    [INTERRUPTED] = "interrupted",
};

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
    size_t *line;                     // of each prompt in the file of --batch, from 1
    size_t n_prompts, samples, total; // total: of all texts
    State *start;                     // where every prompt begins: zeros or a loaded state
    uint64_t seed;
    State *ahead[PROMPTS_AHEAD]; // GPU: of the prompts that were read at once, see prompts_gpu.h
    size_t first_ahead, n_ahead; // their numbers: first_ahead on
    Sequence *sequence;          // (slots) the first `running` are being written
    int running, slots, opened;  // opened: sequences that are allocated
    size_t begun, printed;       // texts
    Text text[TEXTS_MAX];        // of text k at k % TEXTS_MAX
    bool whole[TEXTS_MAX];       // it has ended
    unsigned char *bytes;        // room for one token's text
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
    Prompt *p = &all->prompt[all->n_prompts++];
    *p = (Prompt){.text = text, .bytes = bytes};
    return encode_prompt(all->x, all->o, p) ? fail_in(where) : 0;
}

static bool is_blank(const char *line, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (!strchr(" \t\r", line[i]) || !line[i]) return false;
    return true;
}

// Adds the prompt of a line of --batch; a blank line has none. 0, or -1 after fail().
static int several_add_line(Several *all, char *text, size_t length, size_t number) {
    char where[256];
    if (length && text[length - 1] == '\r') length--;
    if (is_blank(text, length)) return 0;
    snprintf(where, sizeof where, "%.200s line %zu", all->o->batch, number);
    text[length] = 0;
    if (all->o->form.escapes && unescape(text, &length)) return fail_in(where);
    all->line[all->n_prompts] = number;
    return several_add_prompt(all, where, text, length);
}

// Encodes every prompt before anything is written. text: the file of --batch, a prompt a line, in
// which line ends become NULs; or the one prompt. 0, or -1 after fail().
static int several_prompts(Several *all, const char *text, char *file, size_t bytes) {
    const char *batch = all->o->batch;
    size_t n = 1;
    for (size_t i = 0; batch && i + 1 < bytes; i++) n += file[i] == '\n';
    all->prompt = calloc(n, sizeof *all->prompt);
    all->line = calloc(n, sizeof *all->line);
    if (!all->prompt || !all->line) return fail("out of memory: %zu prompts", n);
    if (!batch) return several_add_prompt(all, "prompt", text, bytes);
    for (size_t i = 0, at = 0; i < n && at < bytes; i++) {
        const char *end = memchr(file + at, '\n', bytes - at);
        size_t length = end ? (size_t)(end - file) - at : bytes - at;
        if (several_add_line(all, file + at, length, i + 1)) return -1;
        at += length + 1;
    }
    if (all->n_prompts) return 0;
    return fail("%s: %s: --batch needs one prompt a line", batch,
                bytes ? "only blank lines" : "empty");
}

// --- one text from its begin to its end

// Reads a prompt into the session's state. 0, or -1 after fail().
static int several_read(Several *all, const Prompt *p, Report *report) {
    Report one = {0};
    mamba_state_copy(all->x->model, all->x->state, all->start);
    if (read_prompt(all->x, p->ids, p->n, all->o->quiet, &one)) return -1;
    report->n_read += one.n_read;
    report->read_seconds += one.read_seconds;
    return 0;
}

#include "prompts_gpu.h"

// Begins the next text in a free slot. The session's state holds what follows the prompt: it is
// read for the prompt's first sample and copied for each. 0, or -1 after fail().
static int several_begin(Several *all, Report *report) {
    const Model *m = all->x->model;
    const Prompt *p = &all->prompt[all->begun / all->samples];
    const size_t sample = all->begun % all->samples;
    const bool gpu = all->x->acts->gpu;
    if (sample == 0) {
        if (gpu ? several_read_gpu(all, report) : several_read(all, p, report)) return -1;
        if (interrupted) return 0;
    }
    Sequence *q = &all->sequence[all->running++];
    Text *text = &all->text[all->begun % TEXTS_MAX];
    const uint64_t seed = sample_seed(all->seed, sample);
    if (gpu) {
        if (several_place_gpu(all, q, seed)) return -1;
    } else {
        mamba_state_copy(m, q->state, all->x->state);
        q->state->random = seed;
    }
    q->number = all->begun++;
    q->written = 0;
    q->out.into = text;
    q->out.held.n = 0;
    return echo_prompt(m, q->state, all->o, p, &q->out);
}

// Takes in the token that was drawn for q. An Ending, or -1 after fail().
static int several_accept(Several *all, Sequence *q, int32_t id) {
    const Model *m = all->x->model;
    if (interrupted) return INTERRUPTED;
    if (is_eos(&m->config, id) && !all->o->ignore_eos) return END_OF_TEXT;
    if (all->o->chats && id == all->o->chat.end) return END_OF_TEXT;
    size_t n = token_text(m, q->state, id, all->o->form.ids, all->bytes);
    int stopped = output_add(&q->out, all->bytes, n);
    q->written++;
    if (stopped) return stopped < 0 ? -1 : STOP_STRING;
    return q->written == all->o->n ? LENGTH : GOES_ON;
}

// Prints the texts that have ended, up to the first that has not. 0, or -1 after fail().
static int several_print(Several *all) {
    const GenerateOptions *o = all->o;
    for (; all->printed < all->begun; all->printed++) {
        size_t at = all->printed % TEXTS_MAX, line = all->line[all->printed / all->samples];
        Text *text = &all->text[at];
        if (!all->whole[at]) break;
        if (!o->null && o->batch && all->samples > 1)
            printf("=== line %zu, sample %zu\n", line, all->printed % all->samples + 1);
        else if (!o->null && o->batch) printf("=== line %zu\n", line);
        else if (!o->null) printf("=== sample %zu\n", all->printed + 1);
        fwrite(text->bytes, 1, text->n, stdout);
        if (o->null) putchar(0);
        else if (!o->form.ids) putchar('\n'); // ids have each a line
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
        size_t n = token_text(all->x->model, q.state, -1, all->o->form.ids, all->bytes);
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

#include "several_gpu.h"

// Memory for the sequences, and the state that every prompt begins with. 0, or -1 after fail().
static int several_open(Several *all) {
    const Model *m = all->x->model;
    all->total = size_mul(all->n_prompts, all->samples);
    const bool gpu = all->x->acts->gpu;
    all->slots = all->total < BATCH_MAX ? (int)all->total : BATCH_MAX;
    if (gpu && several_open_gpu(all)) return -1;
    all->sequence = calloc((size_t)all->slots, sizeof *all->sequence);
    all->opened = all->sequence ? all->slots : 0;
    all->bytes = malloc(m->text_room + 16);
    if (!all->bytes || !all->sequence) return fail("out of memory: %d sequences", all->slots);
    all->start = mamba_state_new(m);
    if (!all->start) return -1;
    mamba_state_copy(m, all->start, all->x->state);
    for (int i = 0; i < all->slots; i++) {
        all->sequence[i].out.stop = &all->o->stop;
        all->sequence[i].state = gpu ? mamba_state_of_text() : mamba_state_new(m);
        if (!all->sequence[i].state) return -1;
    }
    return 0;
}

static void several_close(Several *all) {
    for (int i = 0; i < all->opened; i++) {
        mamba_state_free(all->sequence[i].state);
        free(all->sequence[i].out.held.bytes);
    }
    free(all->sequence);
    for (int i = 0; i < PROMPTS_AHEAD; i++) mamba_state_free(all->ahead[i]);
    for (int i = 0; i < TEXTS_MAX; i++) free(all->text[i].bytes);
    mamba_state_free(all->start);
    for (size_t i = 0; i < all->n_prompts; i++) free(all->prompt[i].ids);
    free(all->prompt);
    free(all->line);
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

// Writes every text of --samples or --batch. file: that of --batch, whose line ends become NULs;
// else text is the prompt. 0, or -1 after fail().
static int generate_several(Session *x, const GenerateOptions *o, const char *text, char *file,
                            size_t bytes) {
    Report report = new_report(o);
    char ended[160];
    Several *all = calloc(1, sizeof *all);
    if (!all) return fail("out of memory");
    all->x = x;
    all->o = o;
    all->samples = (size_t)o->samples;
    all->seed = x->state->random;
    int result = several_prompts(all, text, file, bytes);
    if (result == 0) result = several_open(all);
    if (result == 0) {
        double start = seconds();
        result = x->acts->gpu ? several_loop_gpu(all, &report) : several_loop(all, &report);
        report.write_seconds = seconds() - start - report.read_seconds;
    }
    endings_text(ended, sizeof ended, all);
    report.ended = ended;
    if (result == 0 && !o->quiet) print_report(x, &report);
    several_close(all);
    return result;
}
