/* soak_gpu.c - prompts, batches, scores and training on one GPU by several threads at once, for
   some time. Every result must be what the same work gave alone (tests/soak_gpu.sh).

   tests/soak_gpu FILE              does each kind of work once, alone, and writes the results
   tests/soak_gpu FILE SECONDS N    does them in random order by N threads, and compares

   make tests/soak_gpu CUDA=1 builds it. Prints what each thread did; the exit status is 0 if all
   results were equal. */

#define MAMBA_NO_MAIN
#include "../mamba.c"

#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#define COUNT(a) (int)(sizeof(a) / sizeof *(a))

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Says where the program was, as addresses for addr2line -f -e tests/soak_gpu.
static void crashed(int number) {
    void *at[64];
    dprintf(2, "soak: process %ld: signal %d\n", (long)getpid(), number);
    backtrace_symbols_fd(at, backtrace(at, COUNT(at)), 2);
    _exit(128 + number);
}

enum { RESULTS = 64 }; // of one piece of work: a hash for each text, or of all losses

typedef enum { PROMPT, BATCH, SCORES, TRAINING } JobKind;
static const char *const KIND_NAME[] = {"prompts", "batches", "scores", "trainings"};

static const struct Job {
    JobKind kind;
    int n;      // tokens of the prompt, texts of the batch, texts to score, sequences to train on
    bool small; // of the two models
} JOBS[] = {
    {PROMPT, 1, false}, {PROMPT, 300, false}, {PROMPT, 3000, false}, {PROMPT, 20000, true},
    {BATCH, 2, false},  {BATCH, 8, false},    {BATCH, 33, false},    {BATCH, 64, true},
    {SCORES, 4, false}, {TRAINING, 3, true},  {TRAINING, 8, true},
};

static Model *model_of(bool small) {
    Config c = {.type = small ? F32 : BF16,
                .flags = FLAG_TIED | FLAG_CONV_BIAS,
                .D = small ? 128 : 768,
                .n_layer = small ? 3 : 8,
                .V = small ? 300 : 5000,
                .E = small ? 256 : 1536,
                .N = 16,
                .K = 4,
                .R = small ? 8 : 48,
                .norm_eps = 1e-5f,
                .mixer_eps = 1e-6f,
                .bos = -1,
                .pad = -1,
                .eos = {-1, -1, -1, -1}};
    return mamba_random_model(&c, 42);
}

typedef struct {
    Model *m[2];
    Acts *a[2]; // or NULL
    State *s[2];
} Worker;

static bool worker_open(Worker *w) {
    for (int i = 0; i < 2; i++) {
        w->m[i] = model_of(i);
        w->s[i] = w->m[i] ? mamba_state_new(w->m[i]) : NULL;
        w->a[i] = NULL;
        if (!w->s[i]) return false;
    }
    return true;
}

// The GPU's copy of a model, opened where it is not. NULL after fail().
static Acts *worker_gpu(Worker *w, int i) {
    if (!w->a[i]) w->a[i] = mamba_acts_new(w->m[i], 1);
    if (w->a[i] && (w->a[i]->gpu || mamba_acts_gpu(w->a[i], w->m[i], false) == 0)) return w->a[i];
    return NULL;
}

static void worker_close_gpu(Worker *w) {
    for (int i = 0; i < 2; i++) {
        mamba_state_reset(w->m[i], w->s[i]);
        mamba_acts_free(w->a[i]);
        w->a[i] = NULL;
    }
}

static uint64_t hash(uint64_t h, const void *bytes, size_t n) { // FNV-1a
    for (size_t i = 0; i < n; i++) h = (h ^ ((const unsigned char *)bytes)[i]) * 0x100000001B3u;
    return h;
}
static const uint64_t HASH_START = 0xCBF29CE484222325u;

static int32_t *some_ids(size_t n, int V, uint64_t seed) {
    int32_t *ids = malloc(n * sizeof *ids);
    for (size_t i = 0; i < n && ids; i++) ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)V);
    return ids;
}

// S texts after prompts, of n tokens or of some: 96 tokens each, sampled. 0, or -1.
static int write_texts(Worker *w, const struct Job *job, int S, uint64_t *result) {
    enum { STEPS = 32, BURSTS = 3 };
    const Model *m = w->m[job->small];
    Acts *a = worker_gpu(w, job->small);
    State *s = w->s[job->small];
    const Sampling how = {.temperature = 0.8f, .top_p = 0.95f, .repeat_penalty = 1.1f};
    int32_t *ids = malloc((size_t)(S * STEPS) * sizeof *ids);
    int bad = !a || !ids || mamba_places(a, S, 0) || mamba_places_sampling(m, a, &how);
    for (int i = 0; i < S && !bad; i++) {
        const size_t n = S == 1 ? (size_t)job->n : (size_t)(1 + i % 9);
        int32_t *prompt = some_ids(n, m->config.V, 100 + (uint64_t)i);
        mamba_state_reset(m, s);
        bad = mamba_prefill(m, a, s, prompt, n, NULL, NULL) ||
              mamba_place_begin(a, i, s, 7 + (uint64_t)i);
        result[i] = HASH_START;
        free(prompt);
    }
    for (int burst = 0; burst < BURSTS && !bad; burst++) {
        bad = mamba_places_write(a, ids, STEPS);
        for (int t = 0; t < STEPS && !bad; t++)
            for (int i = 0; i < S; i++) result[i] = hash(result[i], &ids[t * S + i], sizeof *ids);
    }
    free(ids);
    return bad ? -1 : 0;
}

static int score_some(Worker *w, const struct Job *job, uint64_t *result) {
    enum { L = 150 };
    const Model *m = w->m[job->small];
    Acts *a = worker_gpu(w, job->small);
    const size_t n = (size_t)job->n * L;
    int32_t *ids = some_ids(n, m->config.V, 5), *targets = some_ids(n, m->config.V, 6),
            *likeliest = malloc(n * sizeof *likeliest);
    float *losses = malloc(n * sizeof *losses);
    const ScoreRun run = {ids, targets, job->n, L, 0, false, losses, likeliest};
    int bad = !a || mamba_texts_at_once(a, job->n, L, TEXTS_SCORED) < job->n ||
              mamba_score_texts(a, &run);
    if (!bad) result[0] = hash(HASH_START, losses, n * sizeof *losses);
    if (!bad) result[1] = hash(HASH_START, likeliest, n * sizeof *likeliest);
    free(ids);
    free(targets);
    free(likeliest);
    free(losses);
    return bad ? -1 : 0;
}

static int train_some(Worker *w, const struct Job *job, uint64_t *result) {
    enum { L = 200, STEPS = 5 };
    Model *m = w->m[job->small];
    const size_t n = (size_t)job->n * L;
    const AdamW how = {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    int32_t *ids = some_ids(n, m->config.V, 8), *targets = some_ids(n, m->config.V, 9);
    Trainer *x = mamba_trainer_new_gpu(m, job->n, L, 0, false);
    int bad = !x;
    result[0] = HASH_START;
    for (int step = 0; step < STEPS && !bad; step++) {
        double norm = 0, loss = mamba_train_pass(x, ids, targets, 1.0f / (float)n, true);
        bad = mamba_train_step(x, &how, &norm);
        result[0] = hash(hash(result[0], &loss, sizeof loss), &norm, sizeof norm);
    }
    if (x) x->gpu_newer = false; // the model here stays as it is
    mamba_trainer_free(x);
    free(ids);
    free(targets);
    return bad ? -1 : 0;
}

static int do_job(Worker *w, const struct Job *job, uint64_t result[RESULTS]) {
    memset(result, 0, RESULTS * sizeof *result);
    if (job->kind == PROMPT) return write_texts(w, job, 1, result);
    if (job->kind == BATCH) return write_texts(w, job, job->n, result);
    return job->kind == SCORES ? score_some(w, job, result) : train_some(w, job, result);
}

static uint64_t want[COUNT(JOBS)][RESULTS];

static int write_results(const char *path) {
    Worker w;
    FILE *f = worker_open(&w) ? fopen(path, "wb") : NULL;
    if (!f) return fprintf(stderr, "soak: %s: cannot be written\n", path), 1;
    for (int i = 0; i < COUNT(JOBS); i++) {
        uint64_t again[RESULTS];
        if (do_job(&w, &JOBS[i], want[i]) || do_job(&w, &JOBS[i], again))
            return fprintf(stderr, "soak: job %d: %s\n", i, mamba_error()), 1;
        if (memcmp(again, want[i], sizeof again))
            return fprintf(stderr, "soak: job %d differs when done twice\n", i), 1;
    }
    bool good = fwrite(want, sizeof want, 1, f) == 1;
    return fclose(f) || !good;
}

typedef struct {
    pthread_t thread;
    int number;
    double until;
    long done[4], texts, differ, failed;
} Soak;

static void *soak(void *context) {
    Soak *k = context;
    Worker w;
    // Each thread of each process has its own, so that different work meets.
    uint64_t random = (uint64_t)k->number * 1000 + (uint64_t)time(NULL) + (uint64_t)getpid() * 7919,
             got[RESULTS];
    if (!worker_open(&w)) return k->failed = 1, (void *)NULL;
    for (long round = 1; seconds() < k->until && k->failed == 0; round++) {
        const int i = (int)(random_u64(&random) % COUNT(JOBS));
        if (do_job(&w, &JOBS[i], got)) {
            fprintf(stderr, "soak: thread %d, job %d: %s\n", k->number, i, mamba_error());
            k->failed++;
        }
        for (int t = 0; t < RESULTS && k->failed == 0; t++) {
            k->texts += want[i][t] != 0;
            if (got[t] == want[i][t]) continue;
            if (k->differ++ < 5)
                fprintf(stderr, "soak: thread %d, job %d, text %d differs\n", k->number, i, t);
        }
        k->done[JOBS[i].kind]++;
        // Opens again, while others are at work: that is where threads meet in the driver.
        if (round % 4 == 0) worker_close_gpu(&w);
    }
    worker_close_gpu(&w);
    return NULL;
}

int main(int argc, char **argv) {
    Soak k[16] = {0};
    if (argc < 2) return fprintf(stderr, "soak_gpu FILE [SECONDS THREADS]\n"), 2;
    if (argc < 4) return write_results(argv[1]);
    FILE *f = fopen(argv[1], "rb");
    if (!f || fread(want, sizeof want, 1, f) != 1)
        return fprintf(stderr, "soak: %s: cannot be read\n", argv[1]), 1;
    fclose(f);
    for (int i = 0; i < 4; i++) signal((int[]){SIGSEGV, SIGBUS, SIGABRT, SIGFPE}[i], crashed);
    setvbuf(stdout, NULL, _IOLBF, 0); // a crash at the end takes no line away
    const int threads = atoi(argv[3]) < 16 ? atoi(argv[3]) : 16;
    long bad = 0, all = 0;
    for (int i = 0; i < threads; i++) {
        k[i].number = i;
        k[i].until = seconds() + atof(argv[2]);
        if (pthread_create(&k[i].thread, NULL, soak, &k[i])) return 1;
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(k[i].thread, NULL);
        printf("process %ld, thread %d:", (long)getpid(), i);
        for (int kind = 0; kind < 4; kind++) printf(" %ld %s,", k[i].done[kind], KIND_NAME[kind]);
        printf(" %ld results, %ld differ, %ld failed\n", k[i].texts, k[i].differ, k[i].failed);
        bad += k[i].differ + k[i].failed;
        all += k[i].texts;
    }
    return bad || !all;
}
