// --- [train] the paper's synthetic tasks, made afresh for every step

typedef enum { TASK_NONE, TASK_INDUCTION, TASK_COPYING } Task;
enum { TASK_VOCAB = 16, COPY_TOKENS = 16 };

static int parse_task(const char *name, Task *task) {
    *task = !name                        ? TASK_NONE
            : !strcmp(name, "induction") ? TASK_INDUCTION
            : !strcmp(name, "copying")   ? TASK_COPYING
                                         : TASK_NONE;
    return name && *task == TASK_NONE ? fail("--task needs induction or copying, not '%s'", name)
                                      : 0;
}

static int task_shortest(Task task) { return task == TASK_COPYING ? 2 * COPY_TOKENS : 4; }

// One sequence of L tokens and, where something is to be predicted, its targets (-1 elsewhere). The
// paper leaves the layout open:
//   induction: ids 0..14 at random; the special id 15 stands once at a random place and again at
//   the very end, where the token that followed it the first time is wanted. copying: noise is id
//   0; 16 data tokens of ids 1..14 stand at random places, in their order, before the last 16
//   places, which hold the marker 15; at the i-th marker the i-th data token is wanted. L counts
//   all of it.
static void task_sequence(Task task, int32_t *ids, int32_t *targets, size_t L, uint64_t *random) {
    for (size_t t = 0; t < L; t++) targets[t] = -1;
    if (task == TASK_INDUCTION) {
        for (size_t t = 0; t < L; t++) ids[t] = (int32_t)(random_u64(random) % (TASK_VOCAB - 1));
        size_t place = random_u64(random) % (L - 2);
        ids[place] = ids[L - 1] = TASK_VOCAB - 1;
        targets[L - 1] = ids[place + 1];
        return;
    }
    size_t body = L - COPY_TOKENS, left = COPY_TOKENS;
    for (size_t t = 0; t < body; t++) { // each set of places is equally likely: take this one with
                                        // probability left / places
        bool data = random_u64(random) % (body - t) < left;
        ids[t] = data ? 1 + (int32_t)(random_u64(random) % (TASK_VOCAB - 2)) : 0;
        if (data) targets[L - left--] = ids[t];
    }
    for (size_t t = body; t < L; t++) ids[t] = TASK_VOCAB - 1;
}

// --- eval

static const char EVAL_USAGE[] =
    "mamba eval model.bin FILE|- [--each] [-T N]\n"
    "mamba eval model.bin --task induction|copying [--length L] [--samples S]\n\n"
    "How well the model predicts a text: every token but the first, each from all tokens before "
    "it. Prints the number "
    "of\n"
    "tokens, the mean negative log-likelihood in nats, the perplexity, and bits per byte of the "
    "predicted text.\n";

typedef struct {
    const int32_t *ids;
    size_t t, n; // position of the next logits, length
    const Model *m;
    double sum;
    bool each;
} Evaluation;

static void evaluate(void *context, const float *logits) {
    Evaluation *ev = context;
    if (++ev->t == ev->n) return; // nothing follows the last token
    double nll = mamba_nll(ev->m, logits, ev->ids[ev->t]);
    ev->sum += nll;
    if (ev->each) printf("%.6f\n", nll);
}

// With `context` tokens at a time, each from a new state, or all in one.
static int evaluate_ids(Session *x, const int32_t *ids, size_t n, size_t context, bool each) {
    if (n < 2) return fail("the text has %zu token(s); there is something to predict from 2 on", n);
    Evaluation ev = {.m = x->model, .each = each};
    size_t bytes = 0, length = 0, predicted = 0;
    double start = seconds();
    for (size_t from = 0; n - from > 1;
         from += ev.n) { // a last token alone has nothing to be predicted from
        ev.ids = ids + from, ev.t = 0, ev.n = context && context < n - from ? context : n - from;
        for (size_t i = 1; i < ev.n; i++)
            tokenizer_token(x->model->tokenizer, ev.ids[i], &length), bytes += length;
        if (from) mamba_state_reset(x->model, x->state);
        if (mamba_prefill(x->model, x->acts, x->state, ev.ids, ev.n, evaluate, &ev)) return -1;
        predicted += ev.n - 1;
    }
    double nll = ev.sum / (double)predicted;
    if (nll != nll)
        return fail("the likelihood is not a number: the weights are damaged (try info --verify)");
    FILE *f = each ? stderr : stdout;
    fprintf(f, "tokens         %zu (%zu predicted)\n", n, predicted);
    fprintf(f, "mean_nll       %.6f nats/token\n", nll);
    fprintf(f, "perplexity     %.6g\n", exp(nll));
    fprintf(f, "bits_per_byte  %.6f\n", bytes ? ev.sum / log(2) / (double)bytes : 0);
    fprintf(stderr, "%.1f tokens/s", (double)n / (seconds() - start));
    if (peak_megabytes() > 0) fprintf(stderr, " | peak memory %.1f MB", peak_megabytes());
    fprintf(stderr, "\n");
    return 0;
}

// --- [train] eval --task: accuracy at any length, in memory that does not depend on it (token ids
// aside)

typedef struct {
    const int32_t *targets;
    size_t t, right, wanted;
    int V;
} TaskScore;

static void score_task(void *context, const float *logits) {
    TaskScore *s = context;
    int32_t target = s->targets[s->t++];
    if (target < 0) return;
    int best = 0;
    for (int v = 1; v < s->V; v++)
        if (logits[v] > logits[best]) best = v;
    s->wanted++, s->right += best == target;
}

typedef struct { // what the threads of eval --task share: each takes the next sequence and reads
                 // the whole of it
    const Model *m;
    Task task;
    size_t L, left; // sequences still to be made
    uint64_t random;
    int result;
    bool recurrent;          // token by token instead of by prefill
    char error[ERROR_BYTES]; // mamba_error() of the first thread that failed
} TaskQueue;

typedef struct {
    Acts *acts;
    State *state;
    int32_t *ids, *targets;
    TaskScore score;
} TaskReader;

static bool
next_sequence(TaskQueue *q,
              TaskReader *r) { // in the order of one generator, so that threads change nothing
    bool one = false;
#pragma omp critical
    if (q->left && q->result == 0) {
        q->left--, one = true;
        task_sequence(q->task, r->ids, r->targets, q->L, &q->random);
    }
    return one;
}

static int read_tokens(const TaskQueue *q, TaskReader *r, const int32_t *ids, size_t n,
                       bool score) {
    if (!q->recurrent)
        return mamba_prefill(q->m, r->acts, r->state, ids, n, score ? score_task : NULL, &r->score);
    for (size_t t = 0; t < n; t++) {
        if (mamba_step(q->m, r->acts, r->state, ids[t])) return -1;
        if (score) score_task(&r->score, r->state->logits);
    }
    return 0;
}

static void read_sequences(TaskQueue *q, TaskReader *r) {
    size_t tail = q->task == TASK_COPYING ? COPY_TOKENS : 1,
           body = q->L - tail; // only the tail has targets
    while (next_sequence(q, r)) {
        mamba_state_reset(q->m, r->state);
        r->score.t = body;
        if (read_tokens(q, r, r->ids, body, false) ||
            read_tokens(q, r, r->ids + body, tail, true)) {
#pragma omp critical
            {
                if (q->result == 0) snprintf(q->error, sizeof q->error, "%s", mamba_error());
                q->result = -1;
            }
        }
    }
}

// Whole sequences side by side, where there are enough for all threads: no barrier is waited at.
static int evaluate_task(Session *x, Task task, size_t L, size_t samples, uint64_t seed,
                         bool recurrent) {
    const Model *m = x->model;
    if (m->config.V < TASK_VOCAB)
        return fail("the model has %d ids, the tasks need %d", m->config.V, TASK_VOCAB);
    int team = x->acts->gpu || samples < (size_t)x->acts->threads ? 1 : x->acts->threads;
    TaskQueue queue = {.m = m,
                       .task = task,
                       .L = L,
                       .left = samples,
                       .random = seed ^ 0x6576616C75617465u, // training's starts elsewhere
                       .recurrent = recurrent};
    TaskReader *reader = calloc((size_t)team, sizeof *reader);
    TaskScore score = {0};
    double start = seconds();
    int result = reader ? 0 : fail("out of memory: %d threads", team);
    for (int i = 0; i < team && result == 0; i++) {
        TaskReader *r = &reader[i];
        r->ids = malloc(L * sizeof *r->ids), r->targets = malloc(L * sizeof *r->targets);
        r->acts = i ? mamba_acts_new(m, 1) : x->acts, r->state = i ? mamba_state_new(m) : x->state;
        r->score = (TaskScore){.targets = r->targets, .V = m->config.V};
        if (!r->acts || !r->state) result = -1;
        else if (!r->ids || !r->targets)
            result = fail("out of memory: %d sequences of %zu tokens", team, L);
    }
    if (result == 0) {
#pragma omp parallel for num_threads(team) schedule(static, 1)
        for (int i = 0; i < team; i++) read_sequences(&queue, &reader[i]);
        if (queue.result) result = fail("%s", queue.error); // also where another thread failed
    }
    for (int i = 0; i < team && reader; i++) {
        TaskReader *r = &reader[i];
        score.right += r->score.right, score.wanted += r->score.wanted;
        free(r->ids), free(r->targets);
        if (i) mamba_acts_free(r->acts), mamba_state_free(r->state);
    }
    free(reader);
    if (result == 0) { // Wilson's interval
        double n = (double)score.wanted, p = (double)score.right / n, z = 1.96,
               middle = (p + z * z / (2 * n)) / (1 + z * z / n);
        double half_width = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n));
        printf("length %zu  accuracy %.2f%%  (%zu of %zu, 95%% interval %.2f to %.2f%%)  %.1f s\n",
               L, 100 * p, score.right, score.wanted, 100 * fmax(0, middle - half_width),
               100 * fmin(1, middle + half_width), seconds() - start);
    }
    return result;
}

static int command_eval(int argc, char **argv) {
    bool each = false, recurrent = false;
    long threads = default_threads(), length = 256, samples = 0, seed = 1, context = 0;
    const char *task_name = NULL;
    const Option options[] = {
        {"--task", "T", "accuracy on induction or copying instead of a text", OPT_TEXT, &task_name,
         0, 0},
        {"--length", "L", "tokens a sequence of the task", OPT_INT, &length, 1, 1 << 30},
        {"--samples", "S",
         "sequences of the task; 0: 1024 up to 2^14 tokens, then fewer, 64 from 2^18 on", OPT_INT,
         &samples, 0, 1e9},
        {"-s", "SEED", "of the task's sequences, which are never those of training", OPT_INT, &seed,
         0, 9e15},
        {"--recurrent", "",
         "read them token by token, as text is generated, instead of by the scan", OPT_SWITCH,
         &recurrent, 0, 0},
        {"--each", "",
         "one negative log-likelihood a line on stdout, from the second token on; the summary on "
         "stderr",
         OPT_SWITCH, &each, 0, 0},
        {"--context", "N",
         "cut the text into pieces of N tokens, each from a new state; 0: one piece", OPT_INT,
         &context, 0, 1 << 30},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &threads, 1, 1024},
    };
    const char *rest[2];
    if (wants_help(argc, argv)) return print_help(EVAL_USAGE, options, COUNT(options)), 0;
    int n_rest = parse_options(argc, argv, options, COUNT(options), rest, 2);
    Task task;
    if (n_rest < 0 || parse_task(task_name, &task)) return -1;
    if (n_rest != (task ? 1 : 2)) return fail("eval needs a model.bin and a text file, or --task");
    if (context == 1) return fail("--context 1 leaves nothing to predict: at least 2");
    if (task && context) return fail("--context does not go with --task");
    if (recurrent && !task) return fail("--recurrent goes with --task");
    if (task && length < task_shortest(task))
        return fail("--length %ld is too short for --task %s: at least %d", length, task_name,
                    task_shortest(task));
    Session x;
    if (session_open(&x, rest[0], threads)) return -1;
    if (task) {
        if (samples == 0)
            samples = length <= 1 << 14 ? 1024 : length >= 1 << 18 ? 64 : (1 << 24) / length;
        int result =
            evaluate_task(&x, task, (size_t)length, (size_t)samples, (uint64_t)seed, recurrent);
        session_close(&x);
        return result;
    }
    size_t bytes, n = 0;
    int32_t *ids = NULL;
    char *text = read_text(rest[1], &bytes);
    int result = text ? 0 : -1;
    if (text && (mamba_encode(x.model, text, bytes, &ids, &n) ||
                 evaluate_ids(&x, ids, n, (size_t)context, each)))
        result = fail_in(rest[1]);
    free(text);
    free(ids);
    session_close(&x);
    return result;
}
