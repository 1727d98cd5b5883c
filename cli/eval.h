// cli/eval.h - eval: the likelihood of a text, or [train] the accuracy on a task.
//
// Depends on cli/options.h (Session), cli/prompt.h, cli/tasks.h and the API.

// clang-format off
static const char EVAL_USAGE[] =
    "mamba eval model.bin FILE|- [--each] [--split eot] [-T N]\n"
    "mamba eval model.bin --task induction|copying [--length L] [--samples S]\n"
    "\n"
    "How well the model predicts a text: every token but the first, each from all tokens before\n"
    "it. Prints the number of tokens, the mean negative log-likelihood in nats, the perplexity,\n"
    "and bits per byte of the predicted text.\n";
// clang-format on

// --- a text

typedef struct {
    const int32_t *ids;
    size_t t, n; // position of the next logits, length
    const Model *m;
    double sum; // of -log p
    bool each;
} Evaluation;

static void evaluate(void *context, const float *logits) {
    Evaluation *ev = context;
    ev->t++;
    if (ev->t == ev->n) return; // nothing follows the last token
    double nll = mamba_nll(ev->m, logits, ev->ids[ev->t]);
    ev->sum += nll;
    if (ev->each) printf("%.6f\n", nll);
}

typedef struct {
    size_t predicted, bytes; // tokens, and the bytes of their text
    double sum;              // of -log p
} Likelihood;

// How a text is cut into pieces, each of which is read from a new state.
typedef struct {
    size_t context; // tokens of a piece; 0: no limit
    bool split;     // a document, up to its end-of-text token, begins a new piece
    bool each;      // print the numbers of each token
    int32_t bos;    // the first of ids, which begins each document of a split text; -1: none does
} Pieces;

typedef struct {
    size_t at, n; // its tokens in the text
    bool bos;     // the first of them is the begin-of-text instead, as a document begins
    bool ends;    // a document ends with it, or the text
} EvalPiece;

// The piece from token `from` of ids (n) on. opens: a document begins there. Its begin-of-text
// takes the place of the last token before; a text has its own already.
static EvalPiece next_piece(const Config *c, const int32_t *ids, size_t n, const Pieces *how,
                            size_t from, bool opens) {
    const size_t bos = opens && how->bos >= 0; // tokens; an end-of-text may be the same id
    EvalPiece p = {from, n - from, bos && from, true};
    if (p.bos) p.at--;
    if (how->split) p.n = bos + document_tokens(c, ids + p.at + bos, n - p.at - bos);
    p.ends = !how->context || p.n <= how->context;
    if (!p.ends) p.n = how->context;
    return p;
}

// The bytes of the text of all but the first of ids (n).
static size_t predicted_bytes(const Model *m, const int32_t *ids, size_t n) {
    const Tokenizer *t = m->tokenizer;
    size_t bytes = 0;
    for (size_t i = 1; i < n && t; i++) {
        size_t length = 0;
        if (tokenizer_has(t, ids[i])) tokenizer_token(t, ids[i], &length);
        bytes += length;
    }
    return bytes;
}

#include "eval_gpu.h"

// Reads ids (n) in pieces. A piece of one token has nothing to predict. The begin-of-text of a
// document overwrites the last token of the one before, which has been read. 0, or -1 after fail().
static int text_likelihood(Likelihood *l, Session *x, int32_t *ids, size_t n, const Pieces *how) {
    Evaluation ev = {.m = x->model, .each = how->each};
    EvalPiece p = {.ends = true};
    if (x->acts->gpu) return text_likelihood_gpu(l, x, ids, n, how);
    for (size_t from = 0; from < n; from = p.at + p.n) {
        p = next_piece(&x->model->config, ids, n, how, from, p.ends);
        if (p.bos) ids[p.at] = how->bos;
        ev.ids = ids + p.at;
        ev.t = 0;
        ev.n = p.n;
        if (ev.n < 2) continue;
        l->bytes += predicted_bytes(x->model, ev.ids, ev.n);
        if (from) mamba_state_reset(x->model, x->state);
        if (mamba_prefill(x->model, x->acts, x->state, ev.ids, ev.n, evaluate, &ev)) return -1;
        l->predicted += ev.n - 1;
    }
    l->sum = ev.sum;
    return 0;
}

static int evaluate_ids(Session *x, int32_t *ids, size_t n, const Pieces *how) {
    Likelihood l = {0};
    const bool each = how->each;
    if (how->split && x->model->config.eos[0] < 0)
        return fail("--split eot: the model has no end-of-text token");
    if (n < 2) return fail("the text has %zu token(s); there is something to predict from 2 on", n);
    double start = seconds();
    if (text_likelihood(&l, x, ids, n, how)) return -1;
    if (l.predicted == 0) return fail("no document has two tokens: there is nothing to predict");
    double nll = l.sum / (double)l.predicted;
    if (nll != nll)
        return fail("the likelihood is not a number: the weights are damaged (try info --verify)");
    FILE *f = each ? stderr : stdout;
    fprintf(f, "tokens         %zu (%zu predicted)\n", n, l.predicted);
    fprintf(f, "mean_nll       %.6f nats/token\n", nll);
    fprintf(f, "perplexity     %.6g\n", exp(nll));
    fprintf(f, "bits_per_byte  %.6f\n", l.bytes ? l.sum / log(2) / (double)l.bytes : 0);
    note("%.1f tokens/s", (double)n / (seconds() - start));
    if (peak_megabytes() > 0) note(" | peak memory %.1f MB", peak_megabytes());
    note("\n");
    return 0;
}

// path: "-" for stdin. 0, or -1 after fail().
static int evaluate_file(Session *x, const PromptForm *how, const char *path, Pieces *pieces) {
    size_t bytes = 0, n = 0;
    int32_t *ids = NULL;
    char *text = read_utf8(path, &bytes);
    if (!text) return -1;
    int result = encode_text(x->model, how, text, bytes, true, &ids, &n);
    pieces->bos = pieces->split && !how->ids && !no_bos ? mamba_prompt_bos(x->model) : -1;
    if (result == 0) result = evaluate_ids(x, ids, n, pieces);
    free(text);
    free(ids);
    return result ? fail_in(path) : 0;
}

// --- [train] a task: accuracy at any length, in memory that does not depend on it, but for the ids

typedef struct {
    const int32_t *targets;
    size_t t, right, wanted;
    int V;
} TaskScore;

static void score_task(void *context, const float *logits) {
    TaskScore *s = context;
    int32_t target = s->targets[s->t];
    s->t++;
    if (target < 0) return;
    int best = 0;
    for (int v = 1; v < s->V; v++)
        if (logits[v] > logits[best]) best = v;
    s->wanted++;
    s->right += best == target;
}

typedef struct {
    Task task;
    size_t L, samples;
    uint64_t seed;
    bool recurrent; // token by token instead of by prefill
} TaskRun;

// Where the sequences of a seed start; training's start elsewhere.
static uint64_t task_random(uint64_t seed) { return seed ^ 0x6576616C75617465u; }

// The last tokens of a sequence, which have all targets.
static size_t task_tail(Task task) { return task == TASK_COPYING ? COPY_TOKENS : 1; }

// What the threads share. Each takes the next sequence and reads the whole of it.
typedef struct {
    const Model *m;
    const TaskRun *run;
    size_t left; // sequences still to be made
    uint64_t random;
    int result;
    char error[ERROR_BYTES]; // mamba_error() of the first thread that failed
} TaskQueue;

typedef struct {
    Acts *acts;
    State *state;
    int32_t *ids, *targets; // (L)
    TaskScore score;
} TaskReader;

// Makes the next sequence, if there is one. One generator makes all in their order, so the result
// does not depend on the number of threads.
static bool next_sequence(TaskQueue *q, TaskReader *r) {
    bool made = false;
#pragma omp critical
    if (q->left && q->result == 0) {
        q->left--;
        task_sequence(q->run->task, r->ids, r->targets, q->run->L, &q->random);
        made = true;
    }
    return made;
}

static int read_tokens(const TaskQueue *q, TaskReader *r, const int32_t *ids, size_t n,
                       bool score) {
    if (!q->run->recurrent)
        return mamba_prefill(q->m, r->acts, r->state, ids, n, score ? score_task : NULL, &r->score);
    for (size_t t = 0; t < n; t++) {
        if (mamba_step(q->m, r->acts, r->state, ids[t])) return -1;
        if (score) score_task(&r->score, r->state->logits);
    }
    return 0;
}

static void read_sequences(TaskQueue *q, TaskReader *r) {
    const size_t tail = task_tail(q->run->task), body = q->run->L - tail;
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

// 0, or -1 after fail(); reader_close in both cases. x: whose Acts and State to use, or NULL for
// new ones, for one thread.
static int reader_open(TaskReader *r, const Model *m, const Session *x, size_t L) {
    r->ids = malloc(size_mul(L, sizeof *r->ids));
    r->targets = malloc(size_mul(L, sizeof *r->targets));
    r->acts = x ? x->acts : mamba_acts_new(m, 1);
    r->state = x ? x->state : mamba_state_new(m);
    r->score = (TaskScore){.targets = r->targets, .V = m->config.V};
    if (!r->acts || !r->state) return -1;
    return r->ids && r->targets ? 0 : fail("out of memory: a sequence of %zu tokens", L);
}

static void reader_close(TaskReader *r, const Session *x) {
    free(r->ids);
    free(r->targets);
    if (!x) mamba_acts_free(r->acts);
    if (!x) mamba_state_free(r->state);
}

// With Wilson's interval.
static void print_accuracy(size_t L, size_t right, size_t wanted, double spent) {
    const double z = 1.96, n = (double)wanted, p = (double)right / n;
    const double shrink = 1 + z * z / n, middle = (p + z * z / (2 * n)) / shrink;
    const double half_width = z / shrink * sqrt(p * (1 - p) / n + z * z / (4 * n * n));
    printf("length %zu  accuracy %.2f%%  (%zu of %zu, 95%% interval %.2f to %.2f%%)  %.1f s\n", L,
           100 * p, right, wanted, 100 * fmax(0, middle - half_width),
           100 * fmin(1, middle + half_width), spent);
}

// On a GPU: as many sequences at once as fit. 0, or -1 after fail().
static int evaluate_task_gpu(const Session *x, const TaskRun *run) {
    const TextsUse use = run->recurrent ? TEXTS_STEPPED : TEXTS_SCORED;
    const int most = run->samples < 4096 ? (int)run->samples : 4096;
    const int B = mamba_texts_at_once(x->acts, most, run->L, use);
    const size_t tail = task_tail(run->task);
    TextScores t;
    size_t right = 0, wanted = 0;
    uint64_t random = task_random(run->seed);
    double start = seconds();
    int result = scores_open(&t, (size_t)B, run->L);
    for (size_t left = run->samples; left && result == 0; left -= (size_t)t.run.B) {
        t.run = (ScoreRun){t.ids,
                           t.targets,
                           left < (size_t)B ? (int)left : B,
                           (int)run->L,
                           (int)(run->L - tail),
                           run->recurrent,
                           t.losses,
                           t.likeliest};
        for (int b = 0; b < t.run.B; b++)
            task_sequence(run->task, t.ids + (size_t)b * run->L, t.targets + (size_t)b * run->L,
                          run->L, &random);
        result = mamba_score_texts(x->acts, &t.run);
        for (size_t i = 0; i < (size_t)t.run.B * run->L && result == 0; i++) {
            wanted += t.targets[i] >= 0;
            right += t.targets[i] >= 0 && t.likeliest[i] == t.targets[i];
        }
    }
    scores_close(&t);
    if (result == 0) print_accuracy(run->L, right, wanted, seconds() - start);
    return result;
}

// Threads read whole sequences side by side, where there are enough for all: they wait at no
// barrier. Otherwise one reader uses the whole team. 0, or -1 after fail().
static int evaluate_task(Session *x, const TaskRun *run) {
    const Model *m = x->model;
    if (m->config.V < TASK_VOCAB)
        return fail("the model has %d ids, the tasks need %d", m->config.V, TASK_VOCAB);
    if (x->acts->gpu) return evaluate_task_gpu(x, run);
    const int threads = x->acts->threads, team = run->samples < (size_t)threads ? 1 : threads;
    TaskQueue queue = {.m = m, .run = run, .left = run->samples, .random = task_random(run->seed)};
    TaskReader *reader = calloc((size_t)team, sizeof *reader);
    size_t right = 0, wanted = 0;
    double start = seconds();
    if (!reader) return fail("out of memory: %d threads", team);
    int result = 0, opened = 0;
    for (; opened < team && result == 0; opened++)
        result = reader_open(&reader[opened], m, opened ? NULL : x, run->L);
    if (result == 0) {
#pragma omp parallel for num_threads(team) schedule(static, 1)
        for (int i = 0; i < team; i++) read_sequences(&queue, &reader[i]);
        if (queue.result) result = fail("%s", queue.error); // maybe of another thread
    }
    for (int i = 0; i < opened; i++) {
        right += reader[i].score.right;
        wanted += reader[i].score.wanted;
        reader_close(&reader[i], i ? NULL : x);
    }
    free(reader);
    if (result == 0) print_accuracy(run->L, right, wanted, seconds() - start);
    return result;
}

// --- the command

typedef struct {
    const char *task_name, *split;
    Task task;
    bool each, recurrent;
    long threads, length, samples, seed, context;
    PromptForm form;
} EvalOptions;

// Options that do not go together. n: arguments beside the options. 0, or -1 after fail().
static int check_eval(const EvalOptions *o, int n) {
    if (n != (o->task ? 1 : 2)) return fail("eval needs a model.bin and a text file, or --task");
    if (o->context == 1) return fail("--context 1 leaves nothing to predict: at least 2");
    if (o->task && o->form.ids) return fail("--ids does not go with --task");
    if (o->task && o->context) return fail("--context does not go with --task");
    if (o->split && strcmp(o->split, "eot")) return fail("--split needs eot, not '%s'", o->split);
    if (o->task && o->split) return fail("--split does not go with --task");
    if (o->recurrent && !o->task) return fail("--recurrent goes with --task");
    if (o->task && o->length < task_shortest(o->task))
        return fail("--length %ld is too short for --task %s: at least %d", o->length, o->task_name,
                    task_shortest(o->task));
    return 0;
}

// How many sequences of a length are read where --samples does not say.
static long default_samples(long length) {
    if (length <= 1 << 14) return 1024;
    return length >= 1 << 18 ? 64 : (1 << 24) / length;
}

static int command_eval(int argc, char **argv) {
    EvalOptions o = {.threads = mamba_default_threads(), .length = 256, .seed = 1};
    // clang-format off
    const Option options[] = {
        OPTION_TEXT("--task", "induction|copying", &o.task_name,
                    "accuracy on one of the tasks instead of a text"),
        OPTION_INT("--length", "L", &o.length, 1, 1 << 30, "tokens a sequence of the task"),
        OPTION_INT("--samples", "S", &o.samples, 0, 1e9,
                   "sequences of the task; 0: 1024 up to 2^14 tokens, then fewer, 64 from 2^18 on"),
        OPTION_INT("-s", "SEED", &o.seed, 0, 9e15,
                   "of the task's sequences, which are never those of training"),
        OPTION_SWITCH("--recurrent", &o.recurrent,
                      "read them token by token, as text is generated, instead of by the scan"),
        OPTION_SWITCH("--each", &o.each,
                      "one negative log-likelihood a line on stdout, from the second token on; "
                      "the summary on stderr"),
        OPTION_SWITCH("--ids", &o.form.ids,
                      "FILE is token ids, between spaces, commas or lines, instead of text"),
        NO_SPECIAL_OPTION(&o.form.no_special),
        OPTION_INT("--context", "N", &o.context, 0, 1 << 30,
                   "cut the text into pieces of N tokens, each from a new state; 0: one piece"),
        OPTION_TEXT("--split", "eot", &o.split,
                    "begin each document, after an end-of-text token, from a new state"),
        NO_BOS_OPTION,
        QUIET_OPTION,
        BACKEND_OPTIONS,
        THREADS_OPTION(&o.threads),
    };
    // clang-format on
    const char *rest[2];
    if (wants_help(argc, argv, options, COUNT(options)))
        return print_help(EVAL_USAGE, options, COUNT(options));
    int n = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n < 0 || parse_task(o.task_name, &o.task) || check_eval(&o, n)) return -1;
    if (!o.task && (check_model_first("eval ", rest[0], rest[1], false) ||
                    check_text_path("eval", rest[0], rest[1])))
        return -1;
    if (o.samples == 0) o.samples = default_samples(o.length);
    const TaskRun run = {o.task, (size_t)o.length, (size_t)o.samples, (uint64_t)o.seed,
                         o.recurrent};
    Pieces pieces = {(size_t)o.context, o.split != NULL, o.each, -1};
    Session x;
    if (session_open(&x, rest[0], o.threads)) return -1;
    int result = o.task ? evaluate_task(&x, &run) : evaluate_file(&x, &o.form, rest[1], &pieces);
    session_close(&x);
    return result;
}
