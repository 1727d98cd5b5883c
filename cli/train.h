// cli/train.h - train: a model from text, from a task, or from another model.
//
// Depends on cli/options.h, cli/run_files.h, cli/tasks.h and the API.

typedef struct { // of the command line; TRAIN_USAGE and the table of options say what each is
    const char *out, *from, *tokenizer, *task_name, *log, *schedule, *held_out_data;
    TextList data;
    long d_model, layers, d_state, d_conv, expand, steps, batch, accumulate, length, grow_from,
        chunk, warmup, seed, save_every, eval_every, threads;
    double rate, min_rate, decay, clip, beta2, noise, held_out;
    const char *mask_until;
    bool documents, carry;
    bool ids;                      // --data is token ids
    bool resume, force, log_given; // --log, or the name made from -o
    Text settings;                 // all options as words, each with a NUL after it
    long planned;                  // --steps as the run began with it
} TrainOptions;

typedef struct {
    const TrainOptions *o;
    Task task;
    Model *model;
    Trainer *trainer;
    int32_t *data; // all tokens; the last n_held are held out
    size_t n_data, n_held;
    size_t file_end[LIST_MAX + 1]; // where the text of each file ends in data
    DataRows rows;                 // of --documents: the last n_held_rows are held out
    size_t n_held_rows;
    int32_t *ids, *targets; // (B,L) of a pass
    TrainRun run;           // what a checkpoint keeps of this run; seconds: those of earlier runs
    const char *checkpoint; // its path
    RunLock lock;
} Training;

// ids and targets (B,L) of a pass: new sequences of the task, or random windows of the text.
static void draw_batch(Training *t, int32_t *ids, int32_t *targets, int B, int L) {
    for (int b = 0; b < B; b++, ids += L, targets += L) {
        if (t->task) {
            task_sequence(t->task, ids, targets, (size_t)L, &t->run.random);
            continue;
        }
        if (t->o->documents) {
            const size_t row = random_u64(&t->run.random) % (t->rows.n - t->n_held_rows);
            fill_row(ids, targets, t->data, &t->rows, row, L);
            continue;
        }
        size_t start = random_u64(&t->run.random) % (t->n_data - t->n_held - (size_t)L);
        memcpy(ids, t->data + start, (size_t)L * sizeof *ids);
        memcpy(targets, t->data + start + 1, (size_t)L * sizeof *ids);
    }
}

// --carry: the text is cut into equal stretches, one for each sequence of a step. Each sequence
// walks along its own, a window a step, and begins again at its end. This is how many targets a
// stretch has, and how many windows: of the last one, what lies beyond the stretch does not count.
static size_t stretch_tokens(const Training *t) {
    return (t->n_data - t->n_held - 1) / (size_t)t->o->batch;
}
static uint64_t stretch_windows(const Training *t) {
    return (stretch_tokens(t) - 1) / (size_t)t->o->length + 1;
}

// ids and targets of pass number `pass` of the next step, which goes on from place `pass`. Where
// the walk is depends on the number of the step alone, so a resumed run knows it.
static void carried_batch(Training *t, int pass) {
    const int B = t->trainer->B, L = t->trainer->L;
    const size_t stretch = stretch_tokens(t),
                 at = (size_t)(t->trainer->step % stretch_windows(t)) * (size_t)L;
    const size_t n = stretch - at < (size_t)L ? stretch - at : (size_t)L;
    for (int b = 0; b < B; b++) {
        const int32_t *window = t->data + stretch * (size_t)(pass * B + b) + at;
        int32_t *ids = t->ids + (size_t)b * L, *targets = t->targets + (size_t)b * L;
        memcpy(ids, window, n * sizeof *ids);
        memcpy(targets, window + 1, n * sizeof *targets);
        for (size_t i = n; i < (size_t)L; i++) ids[i] = 0;
        for (size_t i = n; i < (size_t)L; i++) targets[i] = -1;
    }
}

// --noise: of n ids, the share X becomes tokens drawn from the whole vocabulary, the right one
// among them. The targets stay: what is learnt is the text, read through errors, so that a text
// that comes again does not look the same.
static void add_noise(Training *t, int32_t *ids, size_t n) {
    const uint64_t V = (uint64_t)t->model->config.V;
    for (size_t i = 0; i < n; i++)
        if (random_unit(&t->run.random) < t->o->noise)
            ids[i] = (int32_t)(random_u64(&t->run.random) % V);
}

static void next_batch(Training *t, int pass) {
    const int B = t->trainer->B, L = t->trainer->L;
    if (t->o->carry) carried_batch(t, pass);
    else draw_batch(t, t->ids, t->targets, B, L);
    if (t->o->noise > 0) add_noise(t, t->ids, (size_t)B * (size_t)L);
}

// The length of the sequences after `step` steps. --grow-from divides the run into equal parts; the
// length doubles from part to part.
static int stage_length(const TrainOptions *o, uint64_t step) {
    int stages = 1;
    for (long L = o->grow_from; L && L < o->length; L *= 2) stages++;
    int stage = (int)(step * (uint64_t)stages / (uint64_t)o->steps);
    return (int)(o->length >> (stage < stages ? stages - 1 - stage : 0));
}

// ids and targets (B,L) of one of `passes` passes over the held-out text. The windows of all passes
// are spread evenly over the text. A text that is shorter than a window does not fill it: the other
// targets do not count.
static void held_out_batch(Training *t, int pass, int passes, int B, int L) {
    const size_t rows = t->n_held_rows;
    for (int b = 0; b < B && rows; b++)
        fill_row(t->ids + (size_t)b * L, t->targets + (size_t)b * L, t->data, &t->rows,
                 t->rows.n - rows + rows * (size_t)(pass * B + b) / (size_t)(passes * B), L);
    if (t->o->documents) return;
    const int32_t *text = t->data + t->n_data - t->n_held;
    const size_t n = t->n_held > (size_t)L ? (size_t)L : t->n_held - 1, last = t->n_held - n - 1;
    for (int b = 0; b < B; b++) {
        const int32_t *window = text + last * (size_t)(pass * B + b) / (size_t)(passes * B);
        int32_t *ids = t->ids + (size_t)b * L, *targets = t->targets + (size_t)b * L;
        memcpy(ids, window, n * sizeof *ids);
        memcpy(targets, window + 1, n * sizeof *targets);
        for (size_t i = n; i < (size_t)L; i++) ids[i] = 0;
        for (size_t i = n; i < (size_t)L; i++) targets[i] = -1;
    }
}

// How many passes of B sequences of L tokens a held-out loss reads: at least 32 sequences, but of
// long ones no more than what 32 of 16,384 tokens hold, or one.
static int held_out_passes(int B, int L) {
    const int most = 32 * 16384, fit = L < most ? most / L : 1, wanted = fit < 32 ? fit : 32;
    return (wanted - 1) / B + 1;
}

// The mean loss over windows of the held-out text, or over a task's sequences from a generator of
// their own. NAN: nothing is held out.
static double held_out_loss(Training *t) {
    Trainer *x = t->trainer;
    const int L = x->L, B = x->B, passes = held_out_passes(B, L);
    size_t counted = 0;
    double sum = 0;
    Training other = *t;
    other.run.random = (uint64_t)t->o->seed ^ 0x68656C64206F7574u;
    if (!t->task && (t->o->documents ? t->n_held_rows < 1 : t->n_held < 2)) return NAN;
    for (int pass = 0; pass < passes; pass++) {
        if (t->task) draw_batch(&other, t->ids, t->targets, B, L);
        else held_out_batch(t, pass, passes, B, L);
        for (int i = 0; i < B * L; i++) counted += t->targets[i] >= 0;
        sum += mamba_train_pass(x, t->ids, t->targets, 0, false);
    }
    return sum / (double)counted;
}

static double learning_rate(const TrainOptions *o, uint64_t step) { // of step 1, 2, ...
    if (step <= (uint64_t)o->warmup) return o->rate * (double)step / (double)o->warmup;
    if (!strcmp(o->schedule, "constant")) return o->rate;
    if (!strcmp(o->schedule, "wsd")) { // constant, then in the last fifth a straight line down
        double left = 5 * (1 - (double)step / (double)o->steps);
        return o->min_rate + (o->rate - o->min_rate) * fmin(left, 1);
    }
    double along = (double)(step - (uint64_t)o->warmup) /
                   (double)(o->steps > o->warmup ? o->steps - o->warmup : 1);
    return o->min_rate +
           (o->rate - o->min_rate) * 0.5 * (1 + cos(3.141592653589793 * fmin(along, 1)));
}

// The model is saved also when the checkpoint, three times as large, is not. spent: seconds of this
// process.
static int save_all(const Training *t, double spent) {
    TrainRun run = t->run;
    run.seconds += spent;
    if (mamba_trainer_fetch(t->trainer, false)) return -1; // then the weights here are old
    int bad = mamba_checkpoint_save(t->trainer, &run, t->checkpoint);
    bad |= mamba_save(t->model, t->o->out);
    return bad ? -1 : 0;
}

typedef struct { // what is told about a step
    float rate;
    double loss, norm;   // mean of the targets' losses; the gradient's length before clipping
    double spent, speed; // seconds and tokens/s of this process
    bool evaluated;      // the held-out loss is of this step
} Step;

// One optimizer step. A weight of 1 / counted for each target makes the loss a mean. How many
// targets count is known once all passes are drawn, so all are drawn twice. With --carry each pass
// has states of its own, which start from zeros with the stretches. 0, or -1 after fail().
static int train_step(Training *t, Step *step) {
    const TrainOptions *o = t->o;
    Trainer *x = t->trainer;
    const int rows = x->B * x->L, L = stage_length(o, x->step);
    const uint64_t before = t->run.random;
    size_t counted = 0;
    double sum = 0;
    if (L != x->L && mamba_trainer_resize(x, rows / L, L)) return -1;
    if (o->carry && x->step % stretch_windows(t) == 0 && mamba_trainer_carry(x, (int)o->accumulate))
        return -1;
    for (int pass = 0; pass < o->accumulate; pass++) {
        next_batch(t, pass);
        for (int i = 0; i < rows; i++) counted += t->targets[i] >= 0;
    }
    t->run.random = before;
    for (int pass = 0; pass < o->accumulate; pass++) {
        next_batch(t, pass);
        sum += mamba_train_pass_on(x, o->carry ? pass : -1, t->ids, t->targets,
                                   1.0f / (float)counted, true);
    }
    const AdamW how = {.rate = (float)learning_rate(o, x->step + 1),
                       .beta1 = 0.9f,
                       .beta2 = (float)o->beta2,
                       .epsilon = 1e-8f,
                       .decay = (float)o->decay,
                       .clip = (float)o->clip};
    step->rate = how.rate;
    step->loss = sum / (double)counted;
    int result = mamba_train_step(x, &how, &step->norm);
    if (result) t->run.random = before;
    return result;
}

static double tokens_a_step(const Training *t) {
    return (double)t->trainer->B * t->trainer->L * (double)t->o->accumulate;
}

static void log_step(TrainLog *log, const Training *t, const Step *step) {
    char held[32] = "";
    if (step->evaluated && !isnan(t->run.held_loss))
        snprintf(held, sizeof held, "%.6f", t->run.held_loss);
    if (log->f)
        fprintf(log->f, "%llu,%.0f,%.3f,%.6f,%s,%.6g,%.4f,%.1f\n",
                (unsigned long long)t->trainer->step, (double)t->trainer->step * tokens_a_step(t),
                t->run.seconds + step->spent, step->loss, held, (double)step->rate, step->norm,
                step->speed);
    log_flush(log);
}

static void show_step(const Training *t, const Step *step) {
    const uint64_t now = t->trainer->step;
    const double left = (double)((uint64_t)t->o->steps - now) * tokens_a_step(t) / step->speed;
    note("step %llu/%ld  loss %.4f", (unsigned long long)now, t->o->steps, step->loss);
    if (step->evaluated && !isnan(t->run.held_loss)) note("  held-out %.4f", t->run.held_loss);
    note("  %.0f tokens/s  %.0f s left%s", step->speed, left, step->evaluated ? "\n" : "   \r");
}

static int train_loop(Training *t) {
    const TrainOptions *o = t->o;
    Trainer *x = t->trainer;
    const double begun = seconds();
    const uint64_t first = x->step;
    double shown = 0;
    int result = 0;
    TrainLog log;
    if (log_open(&log, o->log, x->step)) return -1;
    catch_interrupt();
    while (x->step < (uint64_t)o->steps && !interrupted && result == 0) {
        Step step = {0};
        result = train_step(t, &step);
        if (result) break;
        const bool last = x->step == (uint64_t)o->steps;
        step.evaluated = last || x->step % (uint64_t)o->eval_every == 0;
        if (step.evaluated) t->run.held_loss = held_out_loss(t);
        step.spent = seconds() - begun;
        step.speed = (double)(x->step - first) * tokens_a_step(t) / step.spent;
        log_step(&log, t, &step);
        if (step.spent - shown > 1 || step.evaluated) {
            shown = step.spent;
            show_step(t, &step);
        }
        if (!last && x->step % (uint64_t)o->save_every == 0) result = save_all(t, step.spent);
    }
    log_close(&log);
    if (result == 0) result = save_all(t, seconds() - begun);
    if (result == 0 && interrupted)
        note("\ninterrupted after step %llu and saved: `mamba train -o %s --resume` goes on\n",
             (unsigned long long)x->step, o->out);
    if (result == 0 && log.error)
        result = fail("%s: %s: the log is not complete; %s and %s are saved and whole", o->log,
                      strerror(log.error), o->out, t->checkpoint);
    return result;
}

// --- the model and the data of a run

// Adds the text of a file to the data, as tokens. 0, or -1 after fail().
static int append_tokens(Training *t, const char *path) {
    size_t bytes, n = 0;
    int32_t *ids = NULL;
    char *text = read_utf8(path, &bytes);
    if (!text) return -1;
    int bad = t->o->ids ? read_ids(t->model, text, bytes, &ids, &n)
                        : mamba_encode(t->model, text, bytes, &ids, &n);
    free(text);
    if (bad) return fail_in(path);
    int32_t *all = realloc(t->data, (t->n_data + n + 1) * sizeof *all);
    if (!all) {
        free(ids);
        return fail("out of memory: %zu tokens", t->n_data + n);
    }
    t->data = all;
    memcpy(all + t->n_data, ids, n * sizeof *all);
    t->n_data += n;
    free(ids);
    return 0;
}

// The rows of --documents. A document that reaches into what is held out is trained on. 0, or -1
// after fail().
static int make_rows(Training *t) {
    const TrainOptions *o = t->o;
    const size_t learnt = t->n_data - t->n_held;
    t->rows.bos = o->ids ? -1 : mamba_prompt_bos(t->model); // as eval --split eot has it
    if (o->mask_until) {
        t->rows.counts = calloc(t->n_data, sizeof *t->rows.counts);
        if (!t->rows.counts) return fail("out of memory: %zu tokens", t->n_data);
    }
    t->file_end[o->data.n] = t->n_data; // of --held-out-data, or again of the last one
    for (int i = 0; i <= o->data.n; i++)
        if (add_rows_of(&t->rows, t->model, t->data, i ? t->file_end[i - 1] : 0, t->file_end[i],
                        (int)o->length, o->mask_until))
            return -1;
    note("%zu documents, %zu rows of at most %ld tokens", t->rows.documents, t->rows.n, o->length);
    if (t->rows.without)
        note("; --mask-until does not occur in %zu documents, which are left out", t->rows.without);
    note("\n");
    size_t from = t->rows.n;
    while (from > 0 && t->rows.row[from - 1].document >= learnt) from--;
    t->n_held_rows = t->rows.n - from;
    if (from > 0) return 0;
    if (t->rows.n == 0 && t->rows.without)
        return fail("--mask-until: '%.100s' occurs in no document, or at its end", o->mask_until);
    return fail("the data has no document to train on: more --data, a smaller --held-out, or "
                "--held-out-data");
}

// All --data files one after another, then what is held out: the end of that, or a file of its own.
static int read_data(Training *t) {
    const TrainOptions *o = t->o;
    for (int i = 0; i < o->data.n; i++)
        if (append_tokens(t, o->data.item[i])) return -1;
        else t->file_end[i] = t->n_data;
    t->n_held = (size_t)((double)t->n_data * o->held_out);
    if (o->held_out_data) {
        size_t before = t->n_data;
        if (append_tokens(t, o->held_out_data)) return -1;
        t->n_held = t->n_data - before;
        if (!o->documents && t->n_held < (size_t)o->length + 1)
            return fail("--held-out-data %s has %zu tokens, one window needs %ld: a longer file or "
                        "a smaller --length",
                        o->held_out_data, t->n_held, o->length + 1);
    }
    if (o->documents) return make_rows(t);
    if (t->n_data - t->n_held < (size_t)o->length + 2)
        return fail("the data has %zu tokens to train on, one window needs %ld: more --data, a "
                    "smaller --length, or --held-out-data instead of a part of it",
                    t->n_data - t->n_held, o->length + 2);
    if (o->carry && stretch_tokens(t) < (size_t)o->length)
        return fail(
            "--carry: of %zu tokens to train on, each of %ld sequences gets %zu, fewer than "
            "--length %ld: more --data, a smaller --batch or --length",
            t->n_data - t->n_held, o->batch, stretch_tokens(t), o->length);
    if (o->carry)
        note("each of %ld sequences walks along %zu tokens in %llu steps\n", o->batch,
             stretch_tokens(t), (unsigned long long)stretch_windows(t));
    return 0;
}

// The vocabulary of a new model: bytes, a tokenizer file, or the tokenizer of a model.bin.
typedef struct {
    int V;
    const unsigned char *blob; // NULL: bytes
    size_t bytes;
    Model *model;        // whose blob it is, or NULL
    unsigned char *file; // whose blob it is, or NULL
    size_t file_bytes;
    bool mapped;
} Vocabulary;

static int open_vocabulary(Vocabulary *v, const TrainOptions *o) {
    *v = (Vocabulary){.V = o->task_name ? TASK_VOCAB : 256};
    if (o->task_name || !strcmp(o->tokenizer, "bytes")) return 0;
    if (check_is_file(o->tokenizer)) return -1;
    v->file = file_map(o->tokenizer, &v->file_bytes, &v->mapped);
    if (!v->file) return -1;
    if (v->file_bytes >= 4 && memcmp(v->file, "mtok", 4)) {
        v->model = load_model(o->tokenizer);
        if (!v->model) return -1;
        if (!v->model->tokenizer) return fail("%s has no tokenizer", o->tokenizer);
        v->V = tokenizer_size(v->model->tokenizer);
        v->blob = v->model->tokenizer_blob;
        v->bytes = v->model->tokenizer_bytes;
        return 0;
    }
    Tokenizer *tokenizer = tokenizer_open(v->file, v->file_bytes);
    if (!tokenizer) return fail_in(o->tokenizer);
    v->V = tokenizer_size(tokenizer);
    v->blob = v->file;
    v->bytes = v->file_bytes;
    tokenizer_close(tokenizer);
    return 0;
}

static void close_vocabulary(Vocabulary *v) {
    mamba_free(v->model);
    if (v->file) file_unmap(v->file, v->file_bytes, v->mapped);
}

// A model of random weights with this vocabulary. NULL after fail().
static Model *new_model(const TrainOptions *o, const Vocabulary *v) {
    Config c = {.type = F32,
                .flags = FLAG_TIED | FLAG_CONV_BIAS,
                .D = (int)o->d_model,
                .n_layer = (int)o->layers,
                .V = v->V,
                .E = (int)(o->d_model * o->expand),
                .N = (int)o->d_state,
                .K = (int)o->d_conv,
                .R = ((int)o->d_model + 15) / 16,
                .norm_eps = 1e-5f,
                .bos = -1,
                .pad = -1,
                .eos = {-1, -1, -1, -1}};
    Model *m = mamba_random_model(&c, (uint64_t)o->seed);
    if (!m) return NULL;
    int32_t *eos = NULL;
    size_t n = 0;
    int bad = mamba_set_tokenizer(m, v->blob, v->bytes);
    if (!bad && v->blob && !tokenizer_is_bytes(m->tokenizer) &&
        mamba_encode(m, "<|endoftext|>", 13, &eos, &n) == 0 && n == 1 &&
        eos[0] != tokenizer_unknown(m->tokenizer)) {
        m->config.bos = eos[0];
        m->config.eos[0] = eos[0];
    }
    free(eos);
    if (!bad) return m;
    mamba_free(m);
    return NULL;
}

// The model to train: a copy of that of --from, or a new one. 0, or -1 after fail().
static int open_train_model(Training *t) {
    const TrainOptions *o = t->o;
    if (o->from) {
        Model *source = load_model(o->from);
        if (source) t->model = mamba_float_copy(source);
        mamba_free(source);
        return t->model ? 0 : -1;
    }
    Vocabulary vocabulary;
    if (open_vocabulary(&vocabulary, o) == 0) t->model = new_model(o, &vocabulary);
    close_vocabulary(&vocabulary);
    return t->model ? 0 : -1;
}

static int check_train_files(const TrainOptions *o, const char *checkpoint) {
    FileUse use[6 + LIST_MAX] = {
        {INPUT, "the text of --held-out-data", o->held_out_data, NULL},
        {INPUT, "the model of --from", o->from, NULL},
        {INPUT, "the file of --tokenizer", strcmp(o->tokenizer, "bytes") ? o->tokenizer : NULL,
         NULL},
        {o->resume ? OUTPUT_MODEL : OUTPUT, "-o", o->out, "the model of --from"},
        {OUTPUT, "the checkpoint", checkpoint, NULL},
        {OUTPUT_LOG, o->log_given ? "--log" : "the log", o->log, NULL},
    };
    for (int i = 0; i < o->data.n; i++)
        use[6 + i] = (FileUse){INPUT, "the text of --data", o->data.item[i], NULL};
    return check_files(use, 6 + o->data.n);
}

// The text by which a checkpoint knows its run of so many steps: all that a resumed run must have
// in common.
static void describe_run(Training *t, long steps) {
    const TrainOptions *o = t->o;
    const Config *c = &t->model->config;
    const bool planned = strcmp(o->schedule, "constant") || o->grow_from; // by the last step
    snprintf(t->run.text, sizeof t->run.text,
             " task %s, data %zu tokens (checksum %08x), held out %zu, d_model %d, layers %d, "
             "d_state %d, d_conv %d, d_inner %d, vocabulary %d, batch %ld, accumulate %ld, "
             "length %ld, seed %ld, lr %.9g, schedule %s over %ld steps, warm-up %ld, "
             "min lr %.9g, decay %.9g, clip %.9g, beta2 %.9g, grow from %ld",
             o->task_name ? o->task_name : "none", t->n_data,
             crc32_of(0, t->data, t->n_data * sizeof *t->data), t->n_held, c->D, c->n_layer, c->N,
             c->K, c->E, c->V, o->batch, o->accumulate, o->length, o->seed, o->rate, o->schedule,
             planned ? steps : 0L, o->warmup, o->min_rate, o->decay, o->clip, o->beta2,
             o->grow_from);
    const size_t n = strlen(t->run.text);
    if (o->documents)
        snprintf(t->run.text + n, sizeof t->run.text - n,
                 ", documents %zu in %zu rows (mask %08x)%s", t->rows.documents, t->rows.n,
                 crc32_of(0, o->mask_until, o->mask_until ? strlen(o->mask_until) : 0),
                 t->rows.bos < 0 ? "" : " after a begin-of-text");
    if (o->carry) snprintf(t->run.text + n, sizeof t->run.text - n, ", carry");
    const size_t end = strlen(t->run.text);
    if (o->noise > 0)
        snprintf(t->run.text + end, sizeof t->run.text - end, ", noise %.9g", o->noise);
}

// Bytes of memory that the machine has; 0: unknown.
static double physical_memory(void) {
#ifdef _SC_PHYS_PAGES
    return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
#else
    return 0;
#endif
}

// The trainer, the arrays of a batch, and a line about the memory that they take.
static int open_trainer(Training *t) {
    const TrainOptions *o = t->o;
    // A pass has as many rows at any length; short sequences need the most memory.
    const int L = stage_length(o, 0), B = (int)(o->batch / o->accumulate * o->length / L);
    const bool gpu = mamba_has_gpu() && !backend.cpu;
    const double weights = (double)t->model->tensors_bytes / 1e6;
    const double left = physical_memory() * 0.75 - 4e6 * weights;
    int chunk = (int)o->chunk;
    if (!chunk && !gpu && left > 0) chunk = mamba_trainer_chunk(t->model, B, L, left);
    if (!chunk && gpu) chunk = mamba_trainer_chunk_gpu(t->model, B, L, backend.float32);
    if (chunk && chunk < o->length)
        note("sequences of %d tokens in chunks of %d: exact gradients, one more pass "
             "forward\n",
             (int)o->length, chunk);
    if (!gpu)
        note("%zu parameters; memory: weights %.1f MB, gradients %.1f MB, optimizer %.1f MB, "
             "activations of %d x %d tokens %.1f MB\n",
             t->model->n_params, weights, weights, 2 * weights, B, L,
             (double)mamba_trainer_bytes(t->model, B, L, chunk) / 1e6);
    t->trainer = gpu ? mamba_trainer_new_gpu(t->model, B, L, chunk, backend.float32)
                     : mamba_trainer_new(t->model, B, L, chunk, (int)o->threads);
    if (!t->trainer) return -1;
    double used = 0;
    char name[256];
    if (gpu && mamba_gpu_memory(name, &used) == 0)
        note("%zu parameters; %s, %.2f GB in use, %s products\n", t->model->n_params, name,
             used / 1e9, backend.float32 ? "float32" : "bf16");
    if (o->carry && mamba_trainer_carry(t->trainer, (int)o->accumulate)) return -1;
    t->ids = malloc((size_t)B * (size_t)L * sizeof *t->ids);
    t->targets = malloc((size_t)B * (size_t)L * sizeof *t->targets);
    return t->ids && t->targets ? 0 : fail("out of memory: a batch");
}

// Whether the last step of the run can be another one: nothing that came before depends on it.
static bool can_go_on(const TrainOptions *o) {
    return !o->grow_from && strcmp(o->schedule, "cosine");
}

// Goes on from the checkpoint, maybe to another last step than the run began with. 0, or -1 after
// fail().
static int resume_run(Training *t) {
    const TrainOptions *o = t->o;
    if (mamba_checkpoint_load(t->trainer, &t->run, t->checkpoint)) return -1;
    const uint64_t step = t->trainer->step;
    const unsigned long long done = (unsigned long long)step;
    if ((uint64_t)o->steps < step)
        return fail("%s has taken %llu steps: --steps %ld is less", t->checkpoint, done, o->steps);
    if ((uint64_t)o->steps == step)
        note("the run is finished, after %llu steps; %s%s%s\n", done,
             can_go_on(o) ? "--steps MORE makes it longer" : "--from ", can_go_on(o) ? "" : o->out,
             can_go_on(o) ? "" : " -o NEW trains its model on");
    if (o->steps == o->planned) return 0;
    TrainOptions before = *o;
    before.steps = o->planned;
    if (!strcmp(o->schedule, "wsd") && learning_rate(&before, step) < learning_rate(o, step + 1))
        note("the learning rate, %.3g after step %llu, goes back up to %.3g\n",
             learning_rate(&before, step), done, learning_rate(o, step + 1));
    describe_run(t, o->steps);
    return 0;
}

static int train_stages(Training *t) {
    const TrainOptions *o = t->o;
    if (parse_task(o->task_name, &t->task) || check_train_files(o, t->checkpoint) ||
        run_lock_take(&t->lock, o->out) ||
        (!o->resume && !o->force && check_new_run(o->out, t->checkpoint, o->from)) ||
        open_train_model(t) || (!t->task && read_data(t)))
        return -1;
    describe_run(t, o->planned);
    if (open_trainer(t)) return -1;
    // Hashed, because the streams of neighbouring seeds are one stream, shifted.
    uint64_t seed = (uint64_t)o->seed;
    t->run.random = random_u64(&seed);
    t->run.held_loss = NAN;
    if (!t->task && !o->documents && o->held_out > 0 && t->n_held < (size_t)o->length + 1)
        note("%s: the held-out part has %zu tokens, a window %ld; a smaller --length or "
             "--held-out-data FILE mends that\n",
             t->n_held < 2 ? "no held-out losses" : "held-out losses of few tokens", t->n_held,
             o->length);
    t->run.settings = o->settings.bytes;
    t->run.settings_bytes = o->settings.n;
    if (o->resume && resume_run(t)) return -1;
    if (train_loop(t)) return -1;
    note("wrote %s, %s and %s\n", o->out, t->checkpoint, o->log);
    return 0;
}

static int train_run(const TrainOptions *o, const char *checkpoint) {
    Training t = {.o = o, .checkpoint = checkpoint};
    int result = train_stages(&t);
    run_lock_release(&t.lock);
    mamba_trainer_free(t.trainer);
    mamba_free(t.model);
    free(t.data);
    rows_free(&t.rows);
    free(t.ids);
    free(t.targets);
    return result;
}

// clang-format off
static const char TRAIN_USAGE[] =
    "mamba train -o out.bin --data FILE [--data FILE ...] [options]\n"
    "mamba train -o out.bin --task induction|copying [options]\n"
    "mamba train -o out.bin --from model.bin --data FILE [options]\n"
    "\n"
    "Trains a model on text of your own, on one of the paper's synthetic tasks, or fine-tunes\n"
    "one. Writes out.bin, a model like any other (float32), out.bin.train, from which --resume\n"
    "goes on bit for bit, and the log out.bin.csv. While it runs, out.bin.lock keeps other runs\n"
    "away. Ctrl-C saves and leaves.\n"
    "\n"
    "mamba train -o out.bin --resume                goes on: the settings are in out.bin.train\n"
    "mamba train -o out.bin --resume --steps MORE   to MORE steps in all, beyond those planned,\n"
    "                                               where --schedule is constant or wsd\n";
// clang-format on

// Whether the run can have another last step than it began with. 0, or -1 after fail().
static int check_more_steps(const TrainOptions *o) {
    if (o->steps == o->planned) return 0;
    if (o->grow_from)
        return fail("--steps %ld: --grow-from divides the run into parts by its %ld steps; "
                    "--from %s -o NEW trains the model on",
                    o->steps, o->planned, o->out);
    if (!strcmp(o->schedule, "cosine"))
        return fail("--steps %ld: the cosine schedule of this run ends at step %ld, where its rate "
                    "is %g; --from %s -o NEW --lr X trains the model on, and a run of --schedule "
                    "wsd or constant can be made longer",
                    o->steps, o->planned, o->min_rate, o->out);
    return 0;
}

// Options that do not fit together. 0, or -1 after fail().
static int check_train_options(const TrainOptions *o) {
    if ((o->data.n > 0) == (o->task_name != NULL))
        return fail("train needs either --data or --task");
    if (o->held_out_data && (o->task_name || o->held_out != 0.1))
        return fail("--held-out-data does not go with %s", o->task_name ? "--task" : "--held-out");
    for (int i = 0; o->held_out_data && i < o->data.n; i++)
        if (!strcmp(o->held_out_data, o->data.item[i]) ||
            same_file(o->held_out_data, o->data.item[i]))
            return fail("--held-out-data %s is trained on: it is --data too", o->held_out_data);
    if (o->batch % o->accumulate)
        return fail("--batch %ld is not a multiple of --accumulate %ld", o->batch, o->accumulate);
    if ((double)(o->batch / o->accumulate) * (double)o->length > 1 << 28)
        return fail("--batch and --length make a pass of more than %d tokens: raise --accumulate",
                    1 << 28);
    long grown = o->grow_from;
    while (grown && grown < o->length) grown *= 2;
    if (grown && grown != o->length)
        return fail("--length %ld is not --grow-from %ld doubled some times", o->length,
                    o->grow_from);
    if (strcmp(o->schedule, "cosine") && strcmp(o->schedule, "constant") &&
        strcmp(o->schedule, "wsd"))
        return fail("--schedule needs cosine, constant or wsd, not '%s'", o->schedule);
    Task task;
    if (parse_task(o->task_name, &task)) return -1;
    long shortest = o->grow_from ? o->grow_from : o->length;
    if (task && shortest < task_shortest(task))
        return fail("%s %ld is too short for --task %s: at least %d",
                    o->grow_from ? "--grow-from" : "--length", shortest, o->task_name,
                    task_shortest(task));
    if (o->documents && (task || o->grow_from))
        return fail("--documents does not go with %s", task ? "--task" : "--grow-from");
    if (o->carry && (task || o->documents || o->grow_from))
        return fail("--carry does not go with %s", task           ? "--task"
                                                   : o->documents ? "--documents"
                                                                  : "--grow-from");
    if (o->mask_until && (!o->documents || !*o->mask_until))
        return fail(o->documents ? "--mask-until needs a text that is not empty"
                                 : "--mask-until goes with --documents");
    if (task && o->from) return fail("--from does not go with --task");
    return check_more_steps(o);
}

// --- the settings of a run: its command line, which the checkpoint keeps

// Options that are of one process, not of the run.
static bool is_kept(const Option *o) {
    static const char *const not_kept[] = {"-o", "--resume", "--force", "-T", "--quiet"};
    for (int i = 0; i < COUNT(not_kept); i++)
        if (!strcmp(o->name, not_kept[i])) return false;
    return true;
}

static int add_word(Text *to, const char *word) { return text_add(to, word, strlen(word) + 1); }

// All options with their values, defaults too: a later version may have others. 0, or -1 after
// fail().
static int collect_settings(Text *to, const Option *options, int n) {
    int bad = 0;
    for (const Option *o = options; o < options + n; o++) {
        char number[64] = "";
        if (!is_kept(o)) continue;
        if (o->kind == OPT_INT) snprintf(number, sizeof number, "%ld", *(long *)o->value);
        if (o->kind == OPT_REAL) snprintf(number, sizeof number, "%.17g", *(double *)o->value);
        const char *value = o->kind == OPT_TEXT ? *(const char **)o->value : number;
        if (o->kind == OPT_LIST)
            for (int i = 0; i < ((TextList *)o->value)->n; i++)
                bad |= add_word(to, o->name) | add_word(to, ((TextList *)o->value)->item[i]);
        else if (o->kind == OPT_SWITCH) bad |= *(bool *)o->value ? add_word(to, o->name) : 0;
        else if (value) bad |= add_word(to, o->name) | add_word(to, value);
    }
    return bad ? -1 : 0;
}

// Sets options by settings (bytes, a NUL after each word), which must outlive them. 0, or -1 after
// fail().
static int apply_settings(const TrainRun *run, const Option *options, int n) {
    int words = 1, result = -1;
    for (size_t i = 0; i < run->settings_bytes; i++) words += run->settings[i] == 0;
    char **argv = calloc((size_t)words + 1, sizeof *argv);
    if (!argv) return fail("out of memory: %d settings", words);
    size_t at = 0;
    for (int i = 1; i < words; i++, at += strlen(run->settings + at) + 1)
        argv[i] = (char *)(uintptr_t)(run->settings + at);
    result = parse_options(words, argv, options, n, NULL, 0) < 0 ? -1 : 0;
    free(argv);
    return result;
}

// path with an ending, malloc'd. NULL after fail().
static char *name_beside(const char *path, const char *ending) {
    const size_t room = strlen(path) + strlen(ending) + 1;
    char *name = malloc(room);
    if (name) snprintf(name, room, "%s%s", path, ending);
    else fail("out of memory: the name of %s", path);
    return name;
}

// Whether -o names a model, and with --resume one whose run there is. 0, or -1 after fail().
static int check_run_name(const TrainOptions *o, const char *checkpoint) {
    const size_t n = strlen(o->out), end = sizeof ".train" - 1;
    if (n > end && !strcmp(o->out + n - end, ".train") && file_holds(o->out) == A_CHECKPOINT)
        return fail("-o %s is the checkpoint; the model's name has no .train: -o %.*s%s", o->out,
                    (int)(n - end), o->out, o->resume ? " --resume" : "");
    if (o->resume && file_holds(checkpoint) == NOTHING)
        return fail("there is no run to resume: %s does not exist, or is empty", checkpoint);
    return 0;
}

static int command_train(int argc, char **argv) {
    TrainOptions o = {.tokenizer = "bytes",
                      .schedule = "cosine",
                      .d_model = 128,
                      .layers = 4,
                      .d_state = 16,
                      .d_conv = 4,
                      .expand = 2,
                      .steps = 1000,
                      .batch = 16,
                      .accumulate = 1,
                      .length = 256,
                      .warmup = 100,
                      .seed = 1,
                      .save_every = 500,
                      .eval_every = 100,
                      .rate = 3e-3,
                      .min_rate = 1e-5,
                      .decay = 0.1,
                      .clip = 1,
                      .beta2 = 0.95,
                      .held_out = 0.1};
    o.threads = mamba_default_threads();
    // clang-format off
    const Option options[] = {
        OPTION_TEXT("-o", "FILE", &o.out, "the model to write"),
        OPTION_LIST("--data", "FILE", &o.data, "text to learn; up to 16 files"),
        OPTION_SWITCH("--ids", &o.ids,
                      "--data and --held-out-data are token ids, between spaces, commas or lines"),
        OPTION_TEXT("--tokenizer", "T", &o.tokenizer,
                    "bytes, a model.bin whose vocabulary to use, or a tokenizer file"),
        OPTION_TEXT("--task", "induction|copying", &o.task_name,
                    "one of the paper's tasks instead of data"),
        OPTION_TEXT("--from", "FILE", &o.from,
                    "start from this model (sizes and tokenizer are its own)"),
        OPTION_SWITCH("--resume", &o.resume,
                      "go on from out.bin.train with its settings; of what shapes the run only "
                      "--steps can be another"),
        OPTION_SWITCH("--force", &o.force, "replace another model or run of this name"),
        OPTION_INT("--d-model", "N", &o.d_model, 1, 16384, "width"),
        OPTION_INT("--layers", "N", &o.layers, 1, 1024, "blocks"),
        OPTION_INT("--d-state", "N", &o.d_state, 1, N_MAX, "states a channel"),
        OPTION_INT("--d-conv", "N", &o.d_conv, 1, 64, "taps of the convolution"),
        OPTION_INT("--expand", "N", &o.expand, 1, 16,
                   "channels of the SSM, in multiples of the width"),
        OPTION_INT("--steps", "N", &o.steps, 1, 1e9, "optimizer steps in all"),
        OPTION_INT("--batch", "N", &o.batch, 1, 65536, "sequences a step"),
        OPTION_INT("--accumulate", "N", &o.accumulate, 1, 65536,
                   "passes that a step is divided into, for less memory"),
        OPTION_INT("--length", "N", &o.length, 1, 1 << 24, "tokens a sequence"),
        OPTION_INT("--chunk", "N", &o.chunk, 0, 1 << 24,
                   "tokens of a sequence in memory at a time; gradients stay exact, at the "
                   "price of one more pass forward; 0: as many as the memory holds"),
        OPTION_SWITCH("--carry", &o.carry,
                      "walk through the text window by window: the state goes on, the gradient "
                      "is cut off at the borders; instead of random windows"),
        OPTION_INT("--grow-from", "N", &o.grow_from, 0, 1 << 24,
                   "start with sequences of N tokens, --length / N times as many, and double "
                   "them on the way; 0: off"),
        OPTION_REAL("--lr", "X", &o.rate, 0, 10, "peak learning rate"),
        OPTION_REAL("--min-lr", "X", &o.min_rate, 0, 10, "learning rate at the end"),
        OPTION_TEXT("--schedule", "cosine|constant|wsd", &o.schedule,
                    "after the warm-up; wsd: constant and in the last fifth a line down"),
        OPTION_INT("--warmup", "N", &o.warmup, 0, 1e9, "steps of linear warm-up"),
        OPTION_REAL("--decay", "X", &o.decay, 0, 10, "weight decay of matrices"),
        OPTION_REAL("--clip", "X", &o.clip, 0, 1e9, "largest norm of the gradient; 0: off"),
        OPTION_REAL("--beta2", "X", &o.beta2, 0, 0.999999, "of AdamW"),
        OPTION_REAL("--noise", "X", &o.noise, 0, 1,
                    "share of the tokens read that become random ones; those to be predicted "
                    "stay; 0: off"),
        OPTION_REAL("--held-out", "X", &o.held_out, 0, 0.9,
                    "share of the data, at its end, that is never trained on"),
        OPTION_TEXT("--held-out-data", "FILE", &o.held_out_data,
                    "text to hold out instead: all of --data is trained on"),
        OPTION_SWITCH("--documents", &o.documents,
                      "a row is a document, or a piece of one, from a new state; they end with "
                      "an end-of-text token or their file"),
        OPTION_TEXT("--mask-until", "STRING", &o.mask_until,
                    "with --documents: of each, learn only what follows the first STRING"),
        OPTION_INT("--eval-every", "N", &o.eval_every, 1, 1e9,
                   "steps between held-out losses, of 32 windows, or fewer where they are long"),
        OPTION_INT("--save-every", "N", &o.save_every, 1, 1e9, "steps between checkpoints"),
        OPTION_TEXT("--log", "FILE", &o.log, "CSV log; by default out.bin.csv"),
        OPTION_INT("-s", "SEED", &o.seed, 0, 9e15, "fixes everything"),
        QUIET_OPTION,
        BACKEND_OPTIONS,
        THREADS_OPTION(&o.threads),
    };
    // clang-format on
    const TrainOptions defaults = o;
    TrainRun old = {.settings = NULL};
    const char *rest[1];
    if (wants_help(argc, argv, options, COUNT(options)))
        return print_help(TRAIN_USAGE, options, COUNT(options));
    if (parse_options(argc, argv, options, COUNT(options), rest, 0) < 0) return -1;
    char *checkpoint = o.out ? name_beside(o.out, ".train") : NULL;
    char *log = o.out ? name_beside(o.out, ".csv") : NULL;
    int result = !o.out ? fail("train needs -o FILE, the model to write") : -!(checkpoint && log);
    o.planned = o.steps;
    if (result == 0) result = check_run_name(&o, checkpoint);
    if (result == 0 && o.resume) {
        const TextList data = o.data;
        uint64_t step;
        result = mamba_checkpoint_peek(&old, &step, checkpoint);
        if (result == 0 && old.settings_bytes) {
            o = defaults;
            result = apply_settings(&old, options, COUNT(options)) ? fail_in(checkpoint) : 0;
            o.planned = o.steps;
            if (data.n) o.data.n = 0;
            if (result == 0) result = parse_options(argc, argv, options, COUNT(options), rest, 0);
        }
    }
    if (result == 0) result = check_train_options(&o);
    if (result == 0) result = collect_settings(&o.settings, options, COUNT(options));
    o.log_given = o.log != NULL;
    if (!o.log) o.log = log;
    if (result == 0) result = train_run(&o, checkpoint);
    free((char *)(uintptr_t)old.settings);
    free(o.settings.bytes);
    free(checkpoint);
    free(log);
    return result;
}
