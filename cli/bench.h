// cli/bench.h - bench: every figure beside the machine's own ceilings, measured in the same
// minutes.
//
// Depends on cli/options.h. Unlike the other commands it looks inside: bench_scan() times the forms
// of the scan (recurrence, scan, scan_in_pieces), the ceilings on a CPU are those of cpu/, and the
// part for a GPU calls GpuBackend.

#ifndef PLAIN
#include "../cpu/ceilings.h"
#else
#define recurrence_plain recurrence
static float read_floats(const float *p, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += p[i];
    return sum;
}

static double multiply_adds(volatile float *sum) {
    enum { ROUNDS = 100000, LENGTH = 1024 };
    float a[LENGTH], b[LENGTH];
    for (int i = 0; i < LENGTH; i++) {
        a[i] = (float)(i % 7);
        b[i] = (float)(i % 7);
    }
    for (int round = 0; round < ROUNDS; round++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int i = 0; i < LENGTH; i++) dot += a[i] * b[i];
        *sum = dot;
        a[round % LENGTH] += 1; // no two rounds are the same
    }
    return (double)ROUNDS * LENGTH;
}
#endif

static volatile float bench_sink; // keeps the compiler from dropping what is only timed

// Bytes a second that `threads` threads read together. Each reads its own part of a buffer that is
// far larger than the caches.
static double read_bandwidth(const float *buffer, size_t floats, int threads) {
    enum { PARTS = 256 };
    const size_t part_floats = floats / PARTS;
    double start = seconds();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < PARTS; part++)
        bench_sink = read_floats(buffer + part_floats * (size_t)part, part_floats);
    return (double)floats * sizeof(float) / (seconds() - start);
}

// Float32 operations a second on data that stays in the cache; a multiply-add counts as two.
static double multiply_rate(int threads) {
    double start = seconds(), done = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : done)
    for (int part = 0; part < threads; part++) done += multiply_adds(&bench_sink);
    return 2 * done / (seconds() - start);
}

COLD
// clang-format off
static const char BENCH_USAGE[] =
    "mamba bench model.bin [options]\n"
    "mamba bench --shape 130m|370m|790m|1.4b|2.8b|D,layers,V [--dtype f32|f16|bf16|q8|q4]\n"
    "mamba bench --scan B,E,L\n"
    "\n"
    "Tokens per second of prefill and decode, and the share of what the machine could do: of its\n"
    "read bandwidth for decode (every weight is read once a token), of its float32 multiply-add\n"
    "rate for prefill; x8: eight sequences that share every read, beside the longer of those two\n"
    "times. --shape makes seeded random weights in memory; --scan times the scan alone, cut over\n"
    "channels only and over channels and time.\n";
// clang-format on

// --- shapes, medians, counts

enum { BENCH_MAX = 101 }; // repeats

static int parse_shape(const char *text, const char *dtype, Config *c) {
    static const struct {
        const char *name;
        int D, n_layer;
    } known[] = {{"130m", 768, 24},
                 {"370m", 1024, 48},
                 {"790m", 1536, 48},
                 {"1.4b", 2048, 48},
                 {"2.8b", 2560, 64}};
    *c = (Config){.flags = FLAG_TIED | FLAG_CONV_BIAS,
                  .V = 50280,
                  .N = 16,
                  .K = 4,
                  .norm_eps = 1e-5f,
                  .bos = -1,
                  .pad = -1,
                  .eos = {-1, -1, -1, -1}};
    for (int i = 0; i < COUNT(known); i++)
        if (!strcmp(text, known[i].name)) {
            c->D = known[i].D;
            c->n_layer = known[i].n_layer;
        }
    char extra;
    if (!c->D && sscanf(text, "%d,%d,%d%c", &c->D, &c->n_layer, &c->V, &extra) != 3)
        return fail("--shape needs 130m, 370m, 790m, 1.4b, 2.8b or D,layers,V, not '%s'", text);
    if (c->D < 1 || c->D > 1 << 19 || c->n_layer < 1 || c->n_layer > 1 << 16 || c->V < 1 ||
        c->V > 1 << 26)
        return fail("--shape %s is out of range", text);
    c->E = 2 * c->D;
    c->R = (c->D + 15) / 16;
    for (int type = 0; type < N_TYPES; type++)
        if (!strcmp(dtype, type_name((Type)type))) {
            c->type = (Type)type;
            return 0;
        }
    return fail("--dtype needs f32, f16, bf16, q8 or q4, not '%s'", dtype);
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Sorts values (n).
static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare_doubles);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

static void draw_ids(int32_t *ids, size_t n, int V, uint64_t seed) {
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)V);
}

// Operations a token in the products of all layers; the head's are not among them.
static double layers_flops(const Config *c) {
    double D = c->D, E = c->E;
    return 2 * c->n_layer * (2 * E * D + E * (c->R + 2.0 * c->N) + E * c->R + E * D);
}

// Bytes of weights that a step reads. Of an embedding that is not the head too it reads one row.
static size_t step_bytes(const Model *m) {
    bool tied = m->config.flags & FLAG_TIED;
    return m->tensors_bytes - (tied ? 0 : tensor_bytes(&m->embedding));
}

// --- a model on the CPU

enum { BENCH_PROMPT = 512, BENCH_DECODE = 16, BENCH_BATCH = 8, PROBE_FLOATS = 1 << 26 };

typedef struct {
    const Model *m;
    Acts *acts;
    State *states[BENCH_BATCH];
    float *probe; // (PROBE_FLOATS) what read_bandwidth reads
    int32_t ids[BENCH_PROMPT];
    int threads;
    double prefill[BENCH_MAX], decode[BENCH_MAX], batch[BENCH_MAX]; // seconds of each round
    double bandwidth[2 * BENCH_MAX], rate[2 * BENCH_MAX];           // two measures a round
} ModelBench;

// 0, or -1 after fail().
static int bench_round(ModelBench *b, int round) {
    const Model *m = b->m;
    State *s = b->states[0];
    int result = 0;
    b->bandwidth[2 * round] = read_bandwidth(b->probe, PROBE_FLOATS, b->threads);
    double start = seconds();
    if (mamba_prefill(m, b->acts, s, b->ids, BENCH_PROMPT, NULL, NULL)) return -1;
    b->prefill[round] = seconds() - start;
    b->rate[2 * round] = multiply_rate(b->threads);
    start = seconds();
    for (int i = 0; i < BENCH_DECODE && result == 0; i++)
        result = mamba_step(m, b->acts, s, b->ids[i]);
    b->decode[round] = seconds() - start;
    start = seconds();
    for (int i = 0; i < BENCH_DECODE && result == 0; i++)
        result = mamba_step_batch(m, b->acts, b->states, b->ids + i, BENCH_BATCH);
    b->batch[round] = seconds() - start;
    b->bandwidth[2 * round + 1] = read_bandwidth(b->probe, PROBE_FLOATS, b->threads);
    b->rate[2 * round + 1] = multiply_rate(b->threads);
    if (result == 0 && s->logits[0] - s->logits[0] != 0)
        return fail("the logits are not finite: these weights cannot be timed honestly");
    return result;
}

static void print_model_bench(ModelBench *b, int repeats) {
    const Model *m = b->m;
    const double flops = layers_flops(&m->config), bytes = (double)step_bytes(m);
    const double head = 2 * (double)m->config.D * m->config.V;
    double bandwidth = median(b->bandwidth, 2 * repeats), rate = median(b->rate, 2 * repeats);
    double prefill = median(b->prefill, repeats) / BENCH_PROMPT; // seconds a token
    double decode = median(b->decode, repeats) / BENCH_DECODE;   // seconds a step
    double batch = median(b->batch, repeats) / BENCH_DECODE;
    double read_time = bytes / bandwidth, product_time = BENCH_BATCH * (flops + head) / rate;
    printf("%zu parameters in %s, %.1f MB of weights, %d thread%s, medians of %d\n", m->n_params,
           type_name(m->config.type), (double)m->tensors_bytes / 1e6, b->threads,
           b->threads > 1 ? "s" : "", repeats);
    printf("machine      %.1f GB/s read, %.1f GFLOP/s float32\n", bandwidth / 1e9, rate / 1e9);
    printf("prefill %d  %10.1f tokens/s  %5.1f%% of the float32 rate\n", BENCH_PROMPT, 1 / prefill,
           100 * flops / rate / prefill);
    printf("decode       %10.1f tokens/s  %5.1f%% of the read bandwidth\n", 1 / decode,
           100 * read_time / decode);
    printf("decode x%-4d %10.1f tokens/s  %5.1f%% of the floor (%s), %.2f times decode\n",
           BENCH_BATCH, BENCH_BATCH / batch, 100 * fmax(read_time, product_time) / batch,
           read_time > product_time ? "bandwidth" : "float32 rate", BENCH_BATCH * decode / batch);
}

static int bench_model(const Model *m, int threads, int repeats) {
    ModelBench *b = calloc(1, sizeof *b);
    if (!b) return fail("out of memory");
    b->m = m;
    b->threads = threads;
    b->probe = alloc_aligned(PROBE_FLOATS * sizeof(float));
    b->acts = mamba_acts_new(m, threads);
    int result = b->probe && b->acts ? 0 : -1;
    for (int i = 0; i < BENCH_BATCH && result == 0; i++) {
        b->states[i] = mamba_state_new(m);
        if (!b->states[i]) result = -1;
    }
    draw_ids(b->ids, BENCH_PROMPT, m->config.V, 1);
    for (size_t i = 0; i < PROBE_FLOATS && b->probe; i++) b->probe[i] = 1;
    if (result == 0) result = bench_round(b, 0); // warms the caches up and is not counted
    for (int round = 0; round < repeats && result == 0; round++) result = bench_round(b, round);
    if (result == 0) print_model_bench(b, repeats);
    for (int i = 0; i < BENCH_BATCH; i++) mamba_state_free(b->states[i]);
    mamba_acts_free(b->acts);
    free_aligned(b->probe);
    free(b);
    return result;
}

// --- the scan alone on the CPU, N = 16: the definition, over channels, over channels and time

typedef struct {
    int B, E, N, L;
    float *u, *delta, *y;  // (B,L,E)
    float *A_neg, *h;      // (N,E)
    float *BC;             // (B,L,2N) B_ssm beside C_ssm
    float *D_skip, *carry; // (E), scan_carry_floats()
} ScanBench;

static int scan_bench_open(ScanBench *x) {
    const size_t BLE = (size_t)x->B * x->L * x->E, NE = (size_t)x->N * x->E;
    const size_t n_BC = (size_t)x->B * x->L * 2 * x->N;
    uint64_t seed = 7;
    x->u = alloc_aligned(BLE * 4);
    x->delta = alloc_aligned(BLE * 4);
    x->y = alloc_aligned(BLE * 4);
    x->A_neg = alloc_aligned(NE * 4);
    x->h = alloc_aligned(NE * 4);
    x->BC = alloc_aligned(n_BC * 4);
    x->D_skip = alloc_aligned((size_t)x->E * 4);
    x->carry = alloc_aligned(scan_carry_floats(x->E, x->N) * 4);
    if (!x->u || !x->delta || !x->y || !x->A_neg || !x->h || !x->BC || !x->D_skip || !x->carry)
        return -1;
    for (size_t i = 0; i < BLE; i++) {
        x->u[i] = (float)random_unit(&seed) - 0.5f;
        x->delta[i] = 0.1f * (float)random_unit(&seed);
    }
    for (size_t i = 0; i < NE; i++) x->A_neg[i] = -(float)(i / (size_t)x->E + 1);
    for (size_t i = 0; i < n_BC; i++) x->BC[i] = (float)random_unit(&seed) - 0.5f;
    return 0;
}

static void scan_bench_close(ScanBench *x) {
    float *all[] = {x->u, x->delta, x->y, x->A_neg, x->h, x->BC, x->D_skip, x->carry};
    for (int i = 0; i < COUNT(all); i++) free_aligned(all[i]);
}

// Called by every thread of a team. pieces of time; 0: the definition.
static void scan_bench_run(const ScanBench *x, int pieces) {
    const size_t LE = (size_t)x->L * x->E, N = (size_t)x->N;
    for (int b = 0; b < x->B; b++) {
        const float *B_ssm = x->BC + (size_t)b * x->L * 2 * N;
        const Scan s = {.u = x->u + b * LE,
                        .delta = x->delta + b * LE,
                        .A_neg = x->A_neg,
                        .B_ssm = B_ssm,
                        .C_ssm = B_ssm + N,
                        .D_skip = x->D_skip,
                        .ld_bc = 2 * N,
                        .B = 1,
                        .L = x->L,
                        .E = x->E,
                        .N = x->N};
        const LayerState seq = {NULL, x->h};
        float *y = x->y + b * LE;
        if (pieces == 0) recurrence_plain(y, x->h, NULL, &s, 0, x->E, 0, x->L);
        else if (pieces == 1) scan(y, &seq, &s, NULL);
        else scan_in_pieces(y, x->h, &s, pieces, x->carry);
    }
}

static int bench_scan(const char *text, int threads, int repeats) {
    ScanBench x = {.N = 16};
    char extra;
    int n = sscanf(text, "%d,%d,%d%c", &x.B, &x.E, &x.L, &extra);
    if (n != 3 || x.B < 1 || x.E < 1 || x.L < 1 || x.E > 1 << 20 ||
        (double)x.B * x.L * ((double)x.E + 2 * x.N) > 1e9)
        return fail("--scan needs B,E,L with B * L * (E + 32) at most 1e9 and E at most 1048576, "
                    "not '%s'",
                    text);
    const int shapes_say = scan_pieces(x.L, x.E);
    const struct {
        const char *name;
        int pieces, threads;
    } way[] = {{"definition, 1 thread", 0, 1},
               {"over channels", 1, threads},
               {"over channels and time", shapes_say > 1 ? shapes_say : SCAN_TASKS / 2, threads}};
    const double cells = (double)x.B * x.L * x.E;
    int result = scan_bench_open(&x);
    for (int k = 0; k < COUNT(way) && result == 0; k++) {
        double time[BENCH_MAX];
        for (int round = 0; round < repeats; round++) {
            double start = seconds();
#pragma omp parallel num_threads(way[k].threads)
            scan_bench_run(&x, way[k].pieces);
            time[round] = seconds() - start;
        }
        double t = median(time, repeats);
        printf("%-24s %9.3f ms  %8.1f million exponentials/s  %6.2f GB/s\n", way[k].name, t * 1e3,
               cells * x.N / t / 1e6, cells * 12 / t / 1e9);
    }
    if (result == 0)
        printf("%d threads; for this shape the model cuts time into %d piece%s\n", threads,
               shapes_say, shapes_say > 1 ? "s" : "");
    scan_bench_close(&x);
    return result;
}

// --- a model on a GPU: prefill by length, generation by batch, a training step, each beside its
// floor

typedef struct {
    const Model *m;
    Acts *a;
    State *s;
    int repeats;
    double copy, flops;        // bytes and operations a second that the GPU reaches
    double peak;               // operations a second, for the model's products
    double bytes, state_bytes; // of the weights that a step reads; of a sequence's state
} GpuBench;

static const Sampling GREEDY = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
static const struct {
    const char *name;
    Sampling how;
} SAMPLED[] = {{"greedy", {.temperature = 0, .top_p = 1, .repeat_penalty = 1}},
               {"-t 0.8 -p 0.95", {.temperature = 0.8f, .top_p = 0.95f, .repeat_penalty = 1}},
               {"-t 1 -p 1", {.temperature = 1, .top_p = 1, .repeat_penalty = 1}},
               {"-k 40", {.temperature = 0.8f, .top_p = 0.95f, .top_k = 40, .repeat_penalty = 1}}};

static int bench_gpu_prefill(const GpuBench *g, int L, int repeats) {
    double time[BENCH_MAX], used = 0;
    char name[256];
    int32_t *ids = malloc((size_t)L * sizeof *ids);
    if (!ids) return fail("out of memory");
    draw_ids(ids, (size_t)L, g->m->config.V, 1);
    int result = 0;
    for (int round = -1; round < repeats && result == 0; round++) {
        double start = seconds();
        result = mamba_prefill(g->m, g->a, g->s, ids, (size_t)L, NULL, NULL);
        time[round < 0 ? 0 : round] = seconds() - start;
    }
    free(ids);
    if (result) return -1;
    if (g->s->logits[0] - g->s->logits[0] != 0) return fail("the logits are not finite");
    if (GPU->measure(NULL, NULL, &used, name)) return gpu_failed();
    double t = median(time, repeats), floor = layers_flops(&g->m->config) * L / g->peak;
    printf("prefill %-8d %10.2f ms  %12.0f tokens/s  %5.1f%% of the products' floor, %.2f GB\n", L,
           t * 1e3, L / t, 100 * floor / t, used / 1e9);
    return 0;
}

// how: named by `name` in the output.
static int bench_gpu_generate(const GpuBench *g, int S, const Sampling *how, const char *name) {
    const size_t V = (size_t)g->m->config.V;
    const int steps = GPU->generate_max;
    double time[BENCH_MAX];
    int32_t recent[RECENT] = {0}, *ids = malloc((size_t)S * steps * sizeof *ids);
    uint64_t *random = calloc((size_t)S, sizeof *random);
    unsigned char *allowed = malloc(V);
    int result = ids && random && allowed ? 0 : fail("out of memory");
    if (result == 0) memset(allowed, 1, V);
    if (result == 0 && GPU->generate_start(g->a->gpu, S, how, random, 1, recent, 1, allowed))
        result = gpu_failed();
    for (int round = -1; round < g->repeats && result == 0; round++) {
        double start = seconds();
        if (GPU->generate(g->a->gpu, ids, steps)) result = gpu_failed();
        time[round < 0 ? 0 : round] = (seconds() - start) / steps;
    }
    if (result == 0 && ids[0] < 0) result = fail("the logits are not finite");
    free(random);
    free(ids);
    free(allowed);
    if (result) return -1;
    double t = median(time, g->repeats), floor = (g->bytes + 2 * S * g->state_bytes) / g->copy;
    printf("generate x%-6d %10.3f ms  %12.0f tokens/s  %5.1f%% of the bytes' floor  %s\n", S,
           t * 1e3, S / t, 100 * floor / t, name);
    return 0;
}

// End to end: S prompts of L random tokens, each its own, are read one after the other from zero
// states. Then `steps` tokens are written for all together. The time includes everything that this
// takes.
typedef struct {
    int S, L, steps;
    int32_t *prompts;       // (S,L)
    int32_t *ids;           // (steps of a call,S)
    uint64_t *random;       // (S)
    unsigned char *allowed; // (V)
    State *zero;
} Dialogues;

static int dialogues_open(Dialogues *d, const Model *m) {
    const size_t S = (size_t)d->S, n = S * (size_t)d->L, V = (size_t)m->config.V;
    d->zero = mamba_state_new(m);
    d->random = calloc(S, sizeof *d->random);
    d->prompts = malloc(n * sizeof *d->prompts);
    d->ids = malloc(S * (size_t)GPU->generate_max * sizeof *d->ids);
    d->allowed = malloc(V);
    if (!d->zero) return -1;
    if (!d->random || !d->prompts || !d->ids || !d->allowed) return fail("out of memory");
    memset(d->allowed, 1, V);
    draw_ids(d->prompts, n, m->config.V, 5);
    return 0;
}

static void dialogues_close(Dialogues *d) {
    mamba_state_free(d->zero);
    free(d->random);
    free(d->prompts);
    free(d->ids);
    free(d->allowed);
}

static int dialogues_set_zero(const Dialogues *d, Gpu *gpu) {
    return GPU->set_state(gpu, -1, d->zero->window, d->zero->h, d->zero->logits) ? gpu_failed() : 0;
}

// 0, or -1 after fail().
static int dialogues_read(const Dialogues *d, Gpu *gpu) {
    for (int s = 0; s < d->S; s++) {
        const int32_t *prompt = d->prompts + (size_t)s * d->L;
        if (GPU->prefill(gpu, prompt, (size_t)d->L, NULL, NULL) || GPU->gather(gpu, s, d->S))
            return gpu_failed();
    }
    return 0;
}

// 0, or -1 after fail().
static int dialogues_write(const Dialogues *d, Gpu *gpu) {
    const int most = GPU->generate_max;
    if (GPU->generate_start(gpu, d->S, &GREEDY, d->random, (uint64_t)d->L, d->zero->recent, 1,
                            d->allowed))
        return gpu_failed();
    for (int done = 0; done < d->steps; done += most)
        if (GPU->generate(gpu, d->ids, d->steps - done < most ? d->steps - done : most))
            return gpu_failed();
    return 0;
}

static int bench_gpu_dialogues(const GpuBench *g, int S, int L, int steps, int repeats) {
    Dialogues d = {.S = S, .L = L, .steps = steps};
    Gpu *gpu = g->a->gpu;
    double time[BENCH_MAX], reading[BENCH_MAX];
    int result = dialogues_open(&d, g->m);
    if (result == 0) result = dialogues_set_zero(&d, gpu);
    for (int round = -1; round < repeats && result == 0; round++) {
        const int k = round < 0 ? 0 : round;
        double start = seconds();
        result = dialogues_read(&d, gpu);
        reading[k] = seconds() - start;
        if (result == 0) result = dialogues_write(&d, gpu);
        time[k] = seconds() - start;
        if (result == 0) result = dialogues_set_zero(&d, gpu);
    }
    for (int s = 0; s < S && result == 0; s++)
        if (d.ids[s] < 0) result = fail("the logits are not finite");
    dialogues_close(&d);
    if (result) return -1;
    double t = median(time, repeats), r = median(reading, repeats);
    printf("prompt %d + %d, x%-3d %9.1f ms  %12.0f tokens/s generated, all counted (%.1f ms of it "
           "reads the prompts)\n",
           L, steps, S, t * 1e3, S * steps / t, r * 1e3);
    return 0;
}

// chunk: so many tokens of each sequence at a time; 0: all.
static int bench_gpu_train(const GpuBench *g, int B, int L, int chunk, int repeats) {
    const AdamW how = {1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    const int T = B * L;
    Config c = g->m->config;
    c.type = F32;
    Model *m = mamba_random_model(&c, 42);
    Trainer *x = m ? mamba_trainer_new_gpu(m, B, L, chunk, backend.float32) : NULL;
    int32_t *ids = malloc((size_t)T * sizeof *ids), *targets = malloc((size_t)T * sizeof *ids);
    double time[BENCH_MAX], norm = 0, sum = 0, used = 0;
    char name[256];
    uint64_t seed = 3;
    int result = x ? 0 : -1;
    if (x && (!ids || !targets)) result = fail("out of memory");
    for (int i = 0; i < T && result == 0; i++) {
        ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)c.V);
        targets[i] = (int32_t)(random_u64(&seed) % (uint64_t)c.V);
    }
    for (int round = chunk ? -1 : -2; round < repeats && result == 0; round++) {
        double start = seconds();
        sum = mamba_train_pass(x, ids, targets, 1.0f / (float)T, true);
        result = mamba_train_step(x, &how, &norm);
        time[round < 0 ? 0 : round] = seconds() - start;
    }
    if (result == 0 && GPU->measure(NULL, NULL, &used, name)) result = gpu_failed();
    if (result == 0) {
        double t = median(time, repeats), floor = 6 * (double)m->n_params * T / g->flops;
        printf("train %dx%-7d %10.2f ms  %12.0f tokens/s  %5.1f%% of 6 operations a weight, %.2f "
               "GB, loss %.3f\n",
               B, L, t * 1e3, T / t, 100 * floor / t, used / 1e9, sum / T);
    }
    mamba_trainer_free(x);
    mamba_free(m);
    free(ids);
    free(targets);
    return result;
}

// only: letters of --only. 0, or -1 after fail().
static int bench_gpu_run(const GpuBench *g, const char *only) {
    const int lengths[] = {512, 2048, 16384, 1 << 20}, batches[] = {1, 8, 64, 256},
              dialogues[] = {1, 8, 64};
    const int repeats = g->repeats;
    int result = 0;
    for (int i = 0; i < COUNT(lengths) && result == 0 && strchr(only, 'p'); i++) {
        bool very_long = lengths[i] > 1 << 16; // small models only, and not too often
        if (very_long && g->m->n_params > 500 * 1000 * 1000) continue;
        result = bench_gpu_prefill(g, lengths[i], very_long && repeats > 3 ? 3 : repeats);
    }
    for (int i = 0; i < COUNT(batches) && result == 0 && strchr(only, 'g'); i++)
        for (int k = 0; k < COUNT(SAMPLED) && result == 0; k++)
            result = bench_gpu_generate(g, batches[i], &SAMPLED[k].how, SAMPLED[k].name);
    for (int i = 0; i < COUNT(dialogues) && result == 0 && strchr(only, 'd'); i++)
        result = bench_gpu_dialogues(g, dialogues[i], 2048, 128, repeats < 3 ? repeats : 3);
    return result;
}

static int bench_gpu(const Model *m, int repeats, const char *only) {
    const Config *c = &m->config;
    const bool quantized = is_quantized(c->type);
    const bool bf16 = (c->type == BF16 || quantized) && !backend.float32;
    const int train[][2] = {{8, 2048}, {1, 16384}}, very_long = 1 << 20, chunk = 1 << 14;
    char name[256];
    double used = 0;
    GpuBench g = {.m = m, .repeats = repeats, .bytes = (double)step_bytes(m)};
    g.state_bytes = 4.0 * (c->N + c->K - 1) * c->n_layer * c->E;
    g.a = mamba_acts_new(m, 1);
    g.s = mamba_state_new(m);
    int result = g.a && g.s ? mamba_acts_gpu(g.a, m, backend.float32) : -1;
    if (result == 0 && GPU->measure(&g.copy, &g.flops, &used, name)) result = gpu_failed();
    if (result == 0) {
        g.peak = bf16 ? g.flops : g.flops / 15; // the float32 units of the same chip, roughly
        printf("%zu parameters in %s on %s: copies %.2f TB/s, bf16 products %.0f TFLOP/s; medians "
               "of %d\n",
               m->n_params, type_name(c->type), name, g.copy / 1e12, g.flops / 1e12, repeats);
        result = bench_gpu_run(&g, only);
    }
    mamba_state_free(g.s); // training needs the memory
    mamba_acts_free(g.a);
    for (int i = 0; i < COUNT(train) && result == 0 && strchr(only, 't'); i++)
        if (bench_gpu_train(&g, train[i][0], train[i][1], 0, repeats < 5 ? repeats : 5))
            printf("train %dx%-7d %s\n", train[i][0], train[i][1], mamba_error());
    if (result == 0 && strchr(only, 'c') &&
        bench_gpu_train(&g, 1, very_long, chunk, repeats < 3 ? repeats : 3))
        printf("train 1x%d in chunks of %d: %s\n", very_long, chunk, mamba_error());
    return result;
}

static int bench_gpu_scan(const char *text, int repeats) {
    int B, E, L;
    char dtype[8] = "bf16", extra;
    double t[4];
    int n = sscanf(text, "%d,%d,%d,%7[a-z0-9]%c", &B, &E, &L, dtype, &extra);
    const bool float32 = !strcmp(dtype, "f32");
    if ((n != 3 && n != 4) || B < 1 || E < 1 || L < 1 || (strcmp(dtype, "bf16") && !float32))
        return fail("--scan needs B,E,L or B,E,L,f32, not '%s'", text);
    if (GPU->time_scan(B, E, L, 16, float32, repeats, t)) return gpu_failed();
    double cells = (double)B * E * L, bytes = cells * 4 * (float32 ? 4 : 2);
    printf("copy of the same bytes %9.4f ms  %6.3f TB/s\n", t[2] * 1e3, bytes / t[2] / 1e12);
    printf("scan forward           %9.4f ms  %6.3f TB/s  %6.2f trillion exponentials/s\n",
           t[0] * 1e3, bytes / t[0] / 1e12, cells * 16 / t[0] / 1e12);
    if (t[1] > 0)
        printf("scan backward          %9.4f ms  %6.3f TB/s  %6.2f trillion exponentials/s\n",
               t[1] * 1e3, 2 * bytes / t[1] / 1e12, cells * 16 / t[1] / 1e12);
    return 0;
}

// --- the command

static int command_bench(int argc, char **argv) {
    const char *shape = NULL, *dtype = "f32", *scan = NULL, *path = NULL, *only = "pgt";
    long threads = mamba_default_threads(), repeats = 7;
    // clang-format off
    const Option options[] = {
        OPTION_TEXT("--shape", "S", &shape, "random weights of this shape instead of a model"),
        OPTION_TEXT("--dtype", "f32|f16|bf16|q8|q4", &dtype, "their storage type"),
        OPTION_TEXT("--scan", "B,E,L", &scan, "time the scan alone: sequences, channels, length"),
        OPTION_TEXT("--only", "LETTERS", &only,
                    "on a GPU: p prefill, g generation, t training, c training on a sequence of "
                    "2^20 tokens in chunks, d 1, 8, 64 prompts of 2048 and 128 more"),
        OPTION_INT("-r", "N", &repeats, 1, BENCH_MAX, "repeats, of which the median is shown"),
        BACKEND_OPTIONS,
        OPTION_INT("-T", "N", &threads, 1, 1024, "threads"),
    };
    // clang-format on
    if (wants_help(argc, argv, options, COUNT(options)))
        return print_help(BENCH_USAGE, options, COUNT(options));
    int n = parse_options(argc, argv, options, COUNT(options), &path, 1);
    if (n < 0) return -1;
    if (n + (shape != NULL) + (scan != NULL) != 1)
        return fail("bench needs one of: a model.bin, --shape, --scan");
    const bool gpu = GPU && !backend.cpu;
    if (scan && gpu) return bench_gpu_scan(scan, (int)repeats);
    if (scan) return bench_scan(scan, (int)threads, (int)repeats);
    Config c;
    if (shape && parse_shape(shape, dtype, &c)) return -1;
    Model *m = shape ? mamba_random_model(&c, 42) : load_model(path);
    if (!m) return -1;
    int result =
        gpu ? bench_gpu(m, (int)repeats, only) : bench_model(m, (int)threads, (int)repeats);
    mamba_free(m);
    return result;
}
COLD_END
