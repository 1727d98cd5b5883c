// --- [train] train

typedef struct {
    const char *out, *from, *tokenizer, *task_name, *log, *schedule, *held_out_data;
    TextList data;
    long d_model, layers, d_state, d_conv, expand, steps, batch, accumulate, length, grow_from,
        warmup, seed, save_every, eval_every, threads;
    double rate, min_rate, decay, clip, beta2, held_out;
    bool resume, log_given; // --log, or the name made from -o
} TrainOptions;

enum { SETTINGS = 768 }; // bytes of the text that tells runs apart

typedef struct {
    const TrainOptions *o;
    Task task;
    Model *source; // --from or --tokenizer model: lends its tokenizer
    Model *model;
    Trainer *trainer;
    unsigned char *tokenizer; // blob that goes into the file
    size_t tokenizer_bytes;
    int32_t *data; // all tokens; the last n_held are held out
    size_t n_data, n_held;
    int32_t *ids, *targets; // of one pass
    uint64_t random;
    double held_loss, seconds; // last held-out loss; time spent in earlier runs
    char settings[SETTINGS];   // what must be the same when a run goes on
} Training;

enum { CHECKPOINT_HEADER = 1024, CHECKPOINT_VERSION = 1 };
static const char CHECKPOINT_MAGIC[8] = {'m', 'a', 'm', 'b', 'a', '.', 't', '\n'};

// The 256 bytes before a model's tokenizer and tensors.
static int save_checkpoint(const Training *t, const char *path, double spent) {
    unsigned char h[CHECKPOINT_HEADER] = {0}, model[HEADER_BYTES];
    const Trainer *x = t->trainer;
    size_t bytes = t->model->tensors_bytes;
    uint64_t held, time_bits;
    memcpy(&held, &t->held_loss, 8), memcpy(&time_bits, &spent, 8);
    memcpy(h, CHECKPOINT_MAGIC, sizeof CHECKPOINT_MAGIC);
    put_u32(h + 8, CHECKPOINT_VERSION), put_u32(h + 12, CHECKPOINT_HEADER);
    put_u64(h + 16, x->step), put_u64(h + 24, t->random), put_u64(h + 32, held),
        put_u64(h + 40, time_bits), put_u64(h + 48, t->tokenizer_bytes);
    put_u64(h + 56, bytes);
    memcpy(h + 128, t->settings, sizeof t->settings);
    model_header(model, t->model, t->tokenizer, t->tokenizer_bytes);
    put_u32(h + 64, crc32_of(0, model, HEADER_BYTES)),
        put_u32(h + 68, crc32_of(0, x->moment, bytes)),
        put_u32(h + 72, crc32_of(0, x->moment2, bytes));
    put_u32(h + CHECKPOINT_HEADER - 4, crc32_of(0, h, CHECKPOINT_HEADER - 4));
    const Piece piece[] = {{h, sizeof h},
                           {model, HEADER_BYTES},
                           {t->tokenizer, t->tokenizer_bytes},
                           {t->model->weights, bytes},
                           {x->moment, bytes},
                           {x->moment2, bytes}};
    return write_pieces(path, piece, 6);
}

// Numbers in memory to the order of bytes in files, or back: nothing happens on a little-endian
// machine.
static void swap_training(const Training *t) {
    size_t bytes = t->model->tensors_bytes;
    fix_endian(t->model->weights, bytes, 4), fix_endian(t->trainer->moment, bytes, 4),
        fix_endian(t->trainer->moment2, bytes, 4);
}

// Names the first setting in which a checkpoint differs from this run.
static int fail_other_run(const char *path, const unsigned char *stored, const char *here) {
    char there[SETTINGS + 1] = {0}; // a crafted file need not end its text
    size_t from = 0;
    memcpy(there, stored, SETTINGS);
    for (size_t i = 0; there[i] && there[i] == here[i]; i++)
        if (there[i] == ',') from = i + 1;
    return fail("%s: the checkpoint is of another run: it has%.*s, this one has%.*s", path,
                (int)strcspn(there + from, ","), there + from, (int)strcspn(here + from, ","),
                here + from);
}

// Takes up weights, moments, step and generator from a checkpoint of the same run. 0, or -1 after
// fail().
static int load_checkpoint(Training *t, const char *path) {
    size_t size = 0, bytes = t->model->tensors_bytes;
    bool mapped;
    unsigned char *h = file_map(path, &size, &mapped);
    Trainer *x = t->trainer;
    int result = h ? 0 : -1;
    if (result == 0 && (size < CHECKPOINT_HEADER || memcmp(h, CHECKPOINT_MAGIC, 8) ||
                        u32_at(h + 8) != CHECKPOINT_VERSION))
        result = fail("%s: not a training checkpoint of this version", path);
    else if (result == 0 &&
             crc32_of(0, h, CHECKPOINT_HEADER - 4) != u32_at(h + CHECKPOINT_HEADER - 4))
        result = fail("%s: the checkpoint is damaged", path);
    else if (result == 0 && memcmp(h + 128, t->settings, sizeof t->settings))
        result = fail_other_run(path, h + 128, t->settings);
    else if (result == 0 &&
             (u64_at(h + 48) != t->tokenizer_bytes || u64_at(h + 56) != bytes ||
              size != CHECKPOINT_HEADER + HEADER_BYTES + t->tokenizer_bytes + 3 * bytes))
        result = fail("%s: the checkpoint is truncated or of another model", path);
    if (result == 0) {
        const unsigned char *model = h + CHECKPOINT_HEADER,
                            *weights = model + HEADER_BYTES + t->tokenizer_bytes;
        if (crc32_of(0, model, HEADER_BYTES) != u32_at(h + 64) ||
            crc32_of(0, weights, bytes) != u32_at(model + 124) ||
            crc32_of(0, weights + bytes, bytes) != u32_at(h + 68) ||
            crc32_of(0, weights + 2 * bytes, bytes) != u32_at(h + 72))
            result = fail("%s: the checkpoint is damaged", path);
        else {
            uint64_t held = u64_at(h + 32), time_bits = u64_at(h + 40);
            memcpy(t->model->weights, weights, bytes), memcpy(x->moment, weights + bytes, bytes),
                memcpy(x->moment2, weights + 2 * bytes, bytes);
            memcpy(&t->held_loss, &held, 8), memcpy(&t->seconds, &time_bits, 8);
            x->step = u64_at(h + 16), t->random = u64_at(h + 24);
            swap_training(t);
            refresh_derived(t->model);
            result = mamba_trainer_fetch(x, true);
        }
    }
    if (h) file_unmap(h, size, mapped);
    return result;
}

// One pass' sequences: fresh ones of a task, or random windows of the training text.
static void draw_batch(Training *t, int32_t *ids, int32_t *targets, int B, int L) {
    for (int b = 0; b < B; b++, ids += L, targets += L) {
        if (t->task) {
            task_sequence(t->task, ids, targets, (size_t)L, &t->random);
            continue;
        }
        size_t start = random_u64(&t->random) % (t->n_data - t->n_held - (size_t)L);
        memcpy(ids, t->data + start, (size_t)L * sizeof *ids);
        memcpy(targets, t->data + start + 1, (size_t)L * sizeof *ids);
    }
}

// Tokens a sequence at the step after `step`: with --grow-from short ones first, twice as long in
// each of equal parts of the run.
static int stage_length(const TrainOptions *o, uint64_t step) {
    int stages = 1, stage;
    for (long L = o->grow_from; L && L < o->length; L *= 2) stages++;
    stage = (int)(step * (uint64_t)stages / (uint64_t)o->steps);
    return (int)(o->length >> (stage < stages ? stages - 1 - stage : 0));
}

// Mean loss over windows spread evenly over the held-out text; a task's: over sequences of a
// generator of their own.
static double held_out_loss(Training *t) {
    Trainer *x = t->trainer;
    int L = x->L, B = x->B, passes = (32 + B - 1) / B;
    size_t counted = 0;
    double sum = 0;
    Training other = *t;
    other.random = (uint64_t)t->o->seed ^ 0x68656C64206F7574u;
    if (!t->task && t->n_held < (size_t)L + 1) return NAN;
    for (int pass = 0; pass < passes; pass++) {
        if (t->task) draw_batch(&other, t->ids, t->targets, B, L);
        else
            for (int b = 0; b < B; b++) {
                size_t start =
                    t->n_data - t->n_held +
                    (t->n_held - (size_t)L - 1) * (size_t)(pass * B + b) / (size_t)(passes * B);
                memcpy(t->ids + (size_t)b * L, t->data + start, (size_t)L * sizeof *t->ids);
                memcpy(t->targets + (size_t)b * L, t->data + start + 1, (size_t)L * sizeof *t->ids);
            }
        for (int i = 0; i < B * L; i++) counted += t->targets[i] >= 0;
        sum += mamba_train_pass(x, t->ids, t->targets, 0, false);
    }
    return sum / (double)counted;
}

static double learning_rate(const TrainOptions *o, uint64_t step) { // of step 1, 2, ...
    if (step <= (uint64_t)o->warmup) return o->rate * (double)step / (double)o->warmup;
    if (!strcmp(o->schedule, "constant")) return o->rate;
    if (!strcmp(o->schedule,
                "wsd")) { // warm-up, stable, decay: a straight line down over the last fifth
        double left = 5 * (1 - (double)step / (double)o->steps);
        return o->min_rate + (o->rate - o->min_rate) * fmin(left, 1);
    }
    double along = (double)(step - (uint64_t)o->warmup) /
                   (double)(o->steps > o->warmup ? o->steps - o->warmup : 1);
    return o->min_rate +
           (o->rate - o->min_rate) * 0.5 * (1 + cos(3.141592653589793 * fmin(along, 1)));
}

// The CSV log of a run. When it cannot be written, training goes on and the run fails at its end.
typedef struct {
    const char *path;
    FILE *f;   // NULL: lost
    int error; // errno of what lost it
} TrainLog;

static void log_lost(TrainLog *log, int error) {
    log->error = error ? error : EIO;
    fprintf(stderr, "\nmamba: %s: %s: training goes on without the log\n", log->path,
            strerror(log->error));
}

// After each line: what is not in the file yet would be missing after a kill.
static void log_flush(TrainLog *log) {
    errno = 0;
    if (!log->f || (!fflush(log->f) && !ferror(log->f))) return;
    log_lost(log, errno);
    fclose(log->f);
    log->f = NULL;
}

static void log_close(TrainLog *log) {
    if (log->f && fclose(log->f)) log_lost(log, errno);
    log->f = NULL;
}

// The old log, or NULL if there is none to be read (*failed: after fail()).
static char *read_log(const char *path, bool *failed) {
    size_t bytes;
    *failed = false;
    if (!is_replaceable(path)) return NULL;
    FILE *f = fopen(path, "rb");
    if (!f && errno == ENOENT) return NULL;
    if (!f) fail("%s: %s", path, strerror(errno));
    char *text = f ? read_stream(f, path, &bytes) : NULL;
    *failed = !text;
    return text;
}

// Begins the log, or goes on with the old one after `step`: its later lines go, because the resumed
// run writes them again. The old log is whole until the new one is. 0, or -1 after fail().
static int log_open(TrainLog *log, const char *path, uint64_t step) {
    NewFile w;
    bool failed = false;
    char *old = step ? read_log(path, &failed) : NULL;
    *log = (TrainLog){.path = path};
    if (failed || new_file_open(&w, path, true)) return free(old), -1;
    if (!old || !strchr(old, '\n'))
        fprintf(w.f, "step,tokens,seconds,loss,held_out,learning_rate,gradient_norm,"
                     "tokens_per_second\n");
    for (char *line = old; line && *line;) {
        char *end = strchr(line, '\n');
        size_t n = end ? (size_t)(end + 1 - line) : 0; // an unfinished line is dropped
        if (n && (line == old || strtoull(line, NULL, 10) <= step)) fwrite(line, 1, n, w.f);
        line = n ? line + n : NULL;
    }
    free(old);
    if (!w.temporary) {
        log->f = w.f; // a device or a pipe stays open
        log_flush(log);
        return 0;
    }
    if (new_file_commit(&w)) return -1;
    log->f = fopen(path, "ab");
    return log->f ? 0 : fail("cannot write %s: %s", path, strerror(errno));
}

// The model is saved also when the checkpoint, three times as large, is not.
static int save_all(const Training *t, const char *checkpoint, double spent) {
    if (mamba_trainer_fetch(t->trainer, false)) return -1;
    swap_training(t);
    int bad = save_checkpoint(t, checkpoint, spent);
    bad |= save_model(t->model, t->tokenizer, t->tokenizer_bytes, t->o->out);
    swap_training(t);
    return bad ? -1 : 0;
}

static int train_loop(Training *t, const char *checkpoint) {
    const TrainOptions *o = t->o;
    Trainer *x = t->trainer;
    int rows = x->B * x->L, result = 0;
    double begun = seconds(), shown = 0, norm = 0, loss = 0;
    uint64_t first = x->step;
    TrainLog log;
    if (log_open(&log, o->log, x->step)) return -1;
    catch_interrupt();
    while (x->step < (uint64_t)o->steps && !interrupted && result == 0) {
        uint64_t before = t->random;
        size_t counted = 0;
        double sum = 0;
        int L = stage_length(o, x->step);
        if (L != x->L && (result = mamba_trainer_resize(x, rows / L, L))) break;
        for (int pass = 0; pass < o->accumulate;
             pass++) { // what counts is known once all are drawn: draw twice
            draw_batch(t, t->ids, t->targets, x->B, x->L);
            for (int i = 0; i < rows; i++) counted += t->targets[i] >= 0;
        }
        t->random = before;
        for (int pass = 0; pass < o->accumulate; pass++) {
            draw_batch(t, t->ids, t->targets, x->B, x->L);
            sum += mamba_train_pass(x, t->ids, t->targets, 1.0f / (float)counted, true);
        }
        loss = sum / (double)counted;
        AdamW how = {(float)learning_rate(o, x->step + 1),
                     0.9f,
                     (float)o->beta2,
                     1e-8f,
                     (float)o->decay,
                     (float)o->clip};
        if ((result = mamba_train_step(x, &how, &norm))) {
            t->random = before;
            break;
        }
        bool last = x->step == (uint64_t)o->steps,
             evaluate_now = last || x->step % (uint64_t)o->eval_every == 0;
        if (evaluate_now) t->held_loss = held_out_loss(t);
        double spent = seconds() - begun,
               speed = (double)(x->step - first) * rows * o->accumulate / spent;
        char held[32] = "";
        if (evaluate_now && t->held_loss == t->held_loss)
            snprintf(held, sizeof held, "%.6f", t->held_loss);
        if (log.f)
            fprintf(log.f, "%llu,%.0f,%.3f,%.6f,%s,%.6g,%.4f,%.1f\n", (unsigned long long)x->step,
                    (double)x->step * rows * o->accumulate, t->seconds + spent, loss, held,
                    (double)how.rate, norm, speed);
        log_flush(&log);
        if (spent - shown > 1 || evaluate_now) {
            shown = spent;
            fprintf(stderr, "step %llu/%ld  loss %.4f", (unsigned long long)x->step, o->steps,
                    loss);
            if (t->held_loss == t->held_loss) fprintf(stderr, "  held-out %.4f", t->held_loss);
            fprintf(stderr, "  %.0f tokens/s  %.0f s left%s", speed,
                    spent / (double)(x->step - first) * (double)((uint64_t)o->steps - x->step),
                    evaluate_now ? "\n" : "   \r");
        }
        if (!last && x->step % (uint64_t)o->save_every == 0)
            result = save_all(t, checkpoint, t->seconds + spent);
    }
    log_close(&log);
    if (result == 0) result = save_all(t, checkpoint, t->seconds + seconds() - begun);
    if (result == 0 && interrupted)
        fprintf(stderr,
                "\ninterrupted after step %llu and saved: the same command with --resume goes on\n",
                (unsigned long long)x->step);
    if (result == 0 && log.error)
        result = fail("%s: %s: the log is not complete; %s and %s are saved and whole", o->log,
                      strerror(log.error), o->out, checkpoint);
    return result;
}

// Adds the text of a file to the data, as tokens. 0, or -1 after fail().
static int append_tokens(Training *t, const Tokenizer *tokenizer, const char *path) {
    size_t bytes, n = 0;
    int32_t *ids = NULL, *all;
    char *text = read_text(path, &bytes);
    if (!text) return -1;
    int bad = tokenizer_encode(tokenizer, text, bytes, &ids, &n);
    free(text);
    if (bad) return fail_in(path);
    if (!(all = realloc(t->data, (t->n_data + n + 1) * sizeof *all)))
        return free(ids), fail("out of memory: %zu tokens", t->n_data + n);
    t->data = all;
    memcpy(all + t->n_data, ids, n * sizeof *all);
    t->n_data += n;
    free(ids);
    return 0;
}

// All --data files one after another, then what is held out: the end of that, or a file of its own.
static int read_data(Training *t, const Tokenizer *tokenizer) {
    const TrainOptions *o = t->o;
    for (int i = 0; i < o->data.n; i++)
        if (append_tokens(t, tokenizer, o->data.item[i])) return -1;
    t->n_held = (size_t)((double)t->n_data * o->held_out);
    if (o->held_out_data) {
        size_t before = t->n_data;
        if (append_tokens(t, tokenizer, o->held_out_data)) return -1;
        t->n_held = t->n_data - before;
        if (t->n_held < (size_t)o->length + 1)
            return fail("--held-out-data %s has %zu tokens, one window needs %ld: a longer file or "
                        "a smaller --length",
                        o->held_out_data, t->n_held, o->length + 1);
    }
    if (t->n_data - t->n_held < (size_t)o->length + 2)
        return fail("the data has %zu tokens to train on, one window needs %ld: more --data or a "
                    "smaller --length",
                    t->n_data - t->n_held, o->length + 2);
    return 0;
}

static void bytes_blob(unsigned char blob[32], uint32_t n_ids) {
    memset(blob, 0, 32);
    memcpy(blob, "mtok", 4);
    put_u32(blob + 4, 1), put_u32(blob + 20, n_ids);
}

// The tokenizer's bytes, from --from, or as --tokenizer says. 0, or -1 after fail().
static int train_tokenizer(Training *t, Tokenizer **tokenizer) {
    const TrainOptions *o = t->o;
    unsigned char small[32], *file = NULL;
    size_t bytes = sizeof small;
    bool mapped = false;
    bytes_blob(small, t->task ? TASK_VOCAB : 256);
    const unsigned char *blob = small;
    if (t->source) blob = t->source->file + HEADER_BYTES, bytes = t->source->tokenizer_bytes;
    else if (!t->task && strcmp(o->tokenizer, "bytes")) {
        if (!(file = file_map(o->tokenizer, &bytes, &mapped))) return -1;
        size_t size = bytes;
        blob = file;
        if (size >= 4 && memcmp(file, "mtok", 4)) { // a model.bin: its tokenizer
            file_unmap(file, size, mapped), file = NULL;
            if (!(t->source = mamba_load(o->tokenizer))) return -1;
            blob = t->source->file + HEADER_BYTES, bytes = t->source->tokenizer_bytes;
        }
    }
    t->tokenizer = malloc(bytes);
    t->tokenizer_bytes = bytes;
    if (t->tokenizer) memcpy(t->tokenizer, blob, bytes);
    if (file) file_unmap(file, bytes, mapped);
    if (!t->tokenizer) return fail("out of memory: tokenizer");
    *tokenizer = tokenizer_open(t->tokenizer, bytes);
    return *tokenizer ? 0 : fail_in(o->tokenizer);
}

static int train_model(Training *t, const Tokenizer *tokenizer) {
    const TrainOptions *o = t->o;
    if (o->from) {
        if (tokenizer_size(tokenizer) > t->source->config.V)
            return fail("%s: the tokenizer has more ids than the model", o->from);
        t->model = mamba_float_copy(t->source);
        return t->model ? 0 : -1;
    }
    Config c = {.type = F32,
                .flags = FLAG_TIED | FLAG_CONV_BIAS,
                .D = (int)o->d_model,
                .n_layer = (int)o->layers,
                .V = tokenizer_size(tokenizer),
                .E = (int)(o->d_model * o->expand),
                .N = (int)o->d_state,
                .K = (int)o->d_conv,
                .norm_eps = 1e-5f,
                .bos = -1,
                .pad = -1};
    c.R = (c.D + 15) / 16;
    for (int i = 0; i < 4; i++) c.eos[i] = -1;
    int32_t *eos = NULL;
    size_t n = 0;
    if (!tokenizer_is_bytes(tokenizer) &&
        tokenizer_encode(tokenizer, "<|endoftext|>", 13, &eos, &n) == 0 && n == 1)
        c.eos[0] = c.bos = eos[0];
    free(eos);
    t->model = mamba_random_model(&c, (uint64_t)o->seed);
    return t->model ? 0 : -1;
}

static int check_train_files(const TrainOptions *o, const char *checkpoint) {
    FileUse use[6 + LIST_MAX] = {
        {INPUT, "the text of --held-out-data", o->held_out_data, NULL},
        {INPUT, "the model of --from", o->from, NULL},
        {INPUT, "the file of --tokenizer", strcmp(o->tokenizer, "bytes") ? o->tokenizer : NULL,
         NULL},
        {OUTPUT, "-o", o->out, "the model of --from"},
        {OUTPUT, "the checkpoint", checkpoint, NULL},
        {OUTPUT_IN_PLACE, o->log_given ? "--log" : "the log", o->log, NULL},
    };
    for (int i = 0; i < o->data.n; i++)
        use[6 + i] = (FileUse){INPUT, "the text of --data", o->data.item[i], NULL};
    return check_files(use, 6 + o->data.n);
}

static int train_run(Training *t) {
    const TrainOptions *o = t->o;
    Tokenizer *tokenizer = NULL;
    char *checkpoint = malloc(strlen(o->out) + 8);
    if (!checkpoint) return fail("out of memory");
    sprintf(checkpoint, "%s.train", o->out);
    int result = parse_task(o->task_name, &t->task);
    if (result == 0) result = check_train_files(o, checkpoint);
    if (result == 0 && o->from && !(t->source = mamba_load(o->from))) result = -1;
    if (result == 0) result = train_tokenizer(t, &tokenizer);
    if (result == 0 && !t->task) result = read_data(t, tokenizer);
    if (result == 0) result = train_model(t, tokenizer);
    if (result == 0) {
        int L = stage_length(o, 0),
            B = (int)(o->batch / o->accumulate * o->length /
                      L); // the shortest need the most memory
        const Config *c = &t->model->config;
        snprintf(t->settings, sizeof t->settings,
                 " task %s, data %zu tokens (checksum %08x), held out %zu, d_model %d, layers %d, "
                 "d_state %d, d_conv "
                 "%d, d_inner %d, vocabulary %d, batch %ld, accumulate %ld, length %ld, seed %ld, "
                 "lr %.9g, schedule "
                 "%s over %ld steps, warm-up %ld, min lr %.9g, decay %.9g, clip %.9g, beta2 %.9g, "
                 "grow from %ld",
                 o->task_name ? o->task_name : "none", t->n_data,
                 crc32_of(0, t->data, t->n_data * sizeof *t->data), t->n_held, c->D, c->n_layer,
                 c->N, c->K, c->E, c->V, o->batch, o->accumulate, o->length, o->seed, o->rate,
                 o->schedule, strcmp(o->schedule, "constant") || o->grow_from ? o->steps : 0L,
                 o->warmup, o->min_rate, o->decay, o->clip, o->beta2, o->grow_from);
        Trainer measure = {.model = t->model, .B = B, .L = L};
        Arena arena = {NULL, 0};
        trainer_layout(&measure, &arena);
        double activations = (double)arena.used, weights = (double)t->model->tensors_bytes;
        bool gpu = GPU && !backend.cpu;
        if (!gpu)
            fprintf(stderr,
                    "%zu parameters; memory: weights %.1f MB, gradients %.1f MB, optimizer %.1f "
                    "MB, activations of %d x %d "
                    "tokens %.1f MB\n",
                    t->model->n_params, weights / 1e6, weights / 1e6, 2 * weights / 1e6, B, L,
                    activations / 1e6);
        t->trainer = gpu ? mamba_trainer_new_gpu(t->model, B, L, backend.float32)
                         : mamba_trainer_new(t->model, B, L, (int)o->threads);
        double used;
        char name[256];
        if (gpu && t->trainer && GPU->measure(NULL, NULL, &used, name) == 0)
            fprintf(stderr, "%zu parameters; %s, %.2f GB in use, %s products\n", t->model->n_params,
                    name, used / 1e9, backend.float32 ? "float32" : "bf16");
        t->ids = malloc((size_t)B * L * sizeof *t->ids),
        t->targets = malloc((size_t)B * L * sizeof *t->ids);
        if (!t->trainer) result = -1;
        else if (!t->ids || !t->targets) result = fail("out of memory: a batch");
    }
    uint64_t seed =
        (uint64_t)o->seed; // hashed: multiples of the generator's increment are one stream, shifted
    t->random = random_u64(&seed);
    t->held_loss = NAN;
    if (result == 0 && !t->task && t->n_held < (size_t)o->length + 1)
        fprintf(stderr,
                "no held-out losses: the held-out part has %zu tokens, one window needs %ld\n",
                t->n_held, o->length + 1);
    if (result == 0 && o->resume) result = load_checkpoint(t, checkpoint);
    if (result == 0) result = train_loop(t, checkpoint);
    if (result == 0) fprintf(stderr, "wrote %s and %s\n", o->out, checkpoint);
    if (tokenizer) tokenizer_close(tokenizer);
    mamba_trainer_free(t->trainer);
    mamba_free(t->model), mamba_free(t->source);
    free(t->tokenizer), free(t->data), free(t->ids), free(t->targets), free(checkpoint);
    return result;
}

static const char TRAIN_USAGE[] =
    "mamba train -o out.bin --data FILE [--data FILE ...] [options]\n"
    "mamba train -o out.bin --task induction|copying [options]\n"
    "mamba train -o out.bin --from model.bin --data FILE [options]\n\n"
    "Trains a model on text of your own, on one of the paper's synthetic tasks, or fine-tunes one. "
    "Writes out.bin, a "
    "model like any\n"
    "other (float32), out.bin.train, from which --resume goes on bit for bit, and a CSV log. "
    "Ctrl-C saves and "
    "leaves.\n";

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
    o.threads = default_threads();
    const Option options[] = {
        {"-o", "FILE", "the model to write", OPT_TEXT, &o.out, 0, 0},
        {"--data", "FILE", "text to learn; up to 16 files", OPT_LIST, &o.data, 0, 0},
        {"--tokenizer", "T", "bytes, a model.bin whose vocabulary to use, or a tokenizer file",
         OPT_TEXT, &o.tokenizer, 0, 0},
        {"--task", "T", "induction or copying instead of data", OPT_TEXT, &o.task_name, 0, 0},
        {"--from", "FILE", "start from this model (sizes and tokenizer are its own)", OPT_TEXT,
         &o.from, 0, 0},
        {"--resume", "", "go on from out.bin.train", OPT_SWITCH, &o.resume, 0, 0},
        {"--d-model", "N", "width", OPT_INT, &o.d_model, 1, 16384},
        {"--layers", "N", "blocks", OPT_INT, &o.layers, 1, 1024},
        {"--d-state", "N", "states a channel", OPT_INT, &o.d_state, 1, N_MAX},
        {"--d-conv", "N", "taps of the convolution", OPT_INT, &o.d_conv, 1, 64},
        {"--expand", "N", "channels of the SSM, in multiples of the width", OPT_INT, &o.expand, 1,
         16},
        {"--steps", "N", "optimizer steps", OPT_INT, &o.steps, 1, 1e9},
        {"--batch", "N", "sequences a step", OPT_INT, &o.batch, 1, 65536},
        {"--accumulate", "N", "passes that a step is divided into, for less memory", OPT_INT,
         &o.accumulate, 1, 65536},
        {"--length", "N", "tokens a sequence", OPT_INT, &o.length, 1, 1 << 24},
        {"--grow-from", "N",
         "start with sequences of N tokens, --length / N times as many, and double them on the "
         "way; 0: off",
         OPT_INT, &o.grow_from, 0, 1 << 24},
        {"--lr", "X", "peak learning rate", OPT_REAL, &o.rate, 0, 10},
        {"--min-lr", "X", "learning rate at the end", OPT_REAL, &o.min_rate, 0, 10},
        {"--schedule", "S",
         "after the warm-up: cosine, constant, or wsd, constant and in the last fifth a line down",
         OPT_TEXT, &o.schedule, 0, 0},
        {"--warmup", "N", "steps of linear warm-up", OPT_INT, &o.warmup, 0, 1e9},
        {"--decay", "X", "weight decay of matrices", OPT_REAL, &o.decay, 0, 10},
        {"--clip", "X", "largest norm of the gradient; 0: off", OPT_REAL, &o.clip, 0, 1e9},
        {"--beta2", "X", "of AdamW", OPT_REAL, &o.beta2, 0, 0.999999},
        {"--held-out", "X", "share of the data, at its end, that is never trained on", OPT_REAL,
         &o.held_out, 0, 0.9},
        {"--held-out-data", "FILE", "text to hold out instead: all of --data is trained on",
         OPT_TEXT, &o.held_out_data, 0, 0},
        {"--eval-every", "N", "steps between held-out losses", OPT_INT, &o.eval_every, 1, 1e9},
        {"--save-every", "N", "steps between checkpoints", OPT_INT, &o.save_every, 1, 1e9},
        {"--log", "FILE", "CSV log; by default out.bin.csv", OPT_TEXT, &o.log, 0, 0},
        {"-s", "SEED", "fixes everything", OPT_INT, &o.seed, 0, 9e15},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &o.threads, 1, 1024},
    };
    const char *rest[1];
    if (wants_help(argc, argv)) return print_help(TRAIN_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), rest, 0);
    if (n < 0) return -1;
    if (!o.out) return fail("train needs -o FILE, the model to write");
    if ((o.data.n > 0) == (o.task_name != NULL)) return fail("train needs either --data or --task");
    if (o.held_out_data && (o.task_name || o.held_out != 0.1))
        return fail("--held-out-data does not go with %s", o.task_name ? "--task" : "--held-out");
    for (int i = 0; o.held_out_data && i < o.data.n; i++)
        if (!strcmp(o.held_out_data, o.data.item[i]) || same_file(o.held_out_data, o.data.item[i]))
            return fail("--held-out-data %s is trained on: it is --data too", o.held_out_data);
    if (o.batch % o.accumulate)
        return fail("--batch %ld is not a multiple of --accumulate %ld", o.batch, o.accumulate);
    if ((double)(o.batch / o.accumulate) * (double)o.length > 1 << 28)
        return fail("--batch and --length make a pass of more than %d tokens: raise --accumulate",
                    1 << 28);
    long grown = o.grow_from;
    while (grown && grown < o.length) grown *= 2;
    if (grown && grown != o.length)
        return fail("--length %ld is not --grow-from %ld doubled some times", o.length,
                    o.grow_from);
    if (strcmp(o.schedule, "cosine") && strcmp(o.schedule, "constant") && strcmp(o.schedule, "wsd"))
        return fail("--schedule needs cosine, constant or wsd, not '%s'", o.schedule);
    Task task;
    if (parse_task(o.task_name, &task)) return -1;
    long shortest = o.grow_from ? o.grow_from : o.length;
    if (task && shortest < task_shortest(task))
        return fail("%s %ld is too short for --task %s: at least %d",
                    o.grow_from ? "--grow-from" : "--length", shortest, o.task_name,
                    task_shortest(task));
    if (task && o.from) return fail("--from does not go with --task");
    o.log_given = o.log != NULL;
    char *log = o.log ? NULL : malloc(strlen(o.out) + 5);
    if (log) sprintf(log, "%s.csv", o.out), o.log = log;
    Training t = {.o = &o};
    int result = o.log ? train_run(&t) : fail("out of memory");
    free(log);
    return result;
}

