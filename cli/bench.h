// --- bench: every figure beside the machine's own ceilings, measured in the same minutes

static const char BENCH_USAGE[] =
    "mamba bench model.bin | --shape 130m|370m|790m|1.4b|2.8b|D,layers,V [--dtype "
    "f32|f16|bf16|q8|q4]\n"
    "mamba bench --scan B,E,L\n\n"
    "Tokens per second of prefill and decode, and the share of what the machine could do: of its "
    "read bandwidth for\n"
    "decode (every weight is read once a token), of its float32 multiply-add rate for prefill; x8: "
    "eight sequences "
    "that\n"
    "share every read, beside the longer of those two times. --shape makes seeded "
    "random\n"
    "weights in memory; --scan times the scan alone, cut over channels only and over channels and "
    "time.\n";

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
        if (!strcmp(text, known[i].name)) c->D = known[i].D, c->n_layer = known[i].n_layer;
    char extra;
    if (!c->D && sscanf(text, "%d,%d,%d%c", &c->D, &c->n_layer, &c->V, &extra) != 3)
        return fail("--shape needs 130m, 370m, 790m, 1.4b, 2.8b or D,layers,V, not '%s'", text);
    if (c->D < 1 || c->D > 1 << 19 || c->n_layer < 1 || c->n_layer > 1 << 16 || c->V < 1 ||
        c->V > 1 << 26)
        return fail("--shape %s is out of range", text);
    c->E = 2 * c->D, c->R = (c->D + 15) / 16;
    for (int type = 0; type < N_TYPES; type++)
        if (!strcmp(dtype, type_name((Type)type))) return c->type = (Type)type, 0;
    return fail("--dtype needs f32, f16, bf16, q8 or q4, not '%s'", dtype);
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare_doubles);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

static volatile float bench_sink; // keeps the compiler from dropping what is only timed

#ifndef PLAIN
#include "../cpu/ceilings.h"
#else
static double read_bandwidth(const float *buffer, size_t floats, int threads) {
    double start = seconds();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < 256; part++) {
        const float *p = buffer + floats / 256 * (size_t)part;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < floats / 256; i++) sum += p[i];
        bench_sink = sum;
    }
    return (double)floats * sizeof(float) / (seconds() - start);
}

static double multiply_rate(int threads) {
    enum { ROUNDS = 100000, LENGTH = 1024 };
    double start = seconds();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        float a[LENGTH], b[LENGTH];
        for (int i = 0; i < LENGTH; i++) a[i] = b[i] = (float)(i % 7);
        for (int round = 0; round < ROUNDS; round++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < LENGTH; i++) sum += a[i] * b[i];
            bench_sink = sum;
            a[round % LENGTH] += 1; // no two rounds are the same
        }
    }
    return 2.0 * ROUNDS * LENGTH * threads / (seconds() - start);
}
#define recurrence_plain recurrence
#endif

COLD
enum { BENCH_PROMPT = 512, BENCH_DECODE = 16, BENCH_BATCH = 8, BENCH_MAX = 101 };

static int bench_model(const Model *m, int threads, int repeats) {
    const Config *c = &m->config;
    double prefill[BENCH_MAX], decode[BENCH_MAX], batch[BENCH_MAX], bandwidth[2 * BENCH_MAX],
        rate[2 * BENCH_MAX];
    int32_t ids[BENCH_PROMPT];
    uint64_t seed = 1;
    size_t probe_floats = (size_t)1 << 26, embedding = tensor_bytes(&m->embedding);
    size_t decode_bytes = m->tensors_bytes - (c->flags & FLAG_TIED ? 0 : embedding);
    double D = c->D, E = c->E,
           prefill_flops =
               2 * c->n_layer * (2 * E * D + E * (c->R + 2.0 * c->N) + E * c->R + E * D);
    float *probe = alloc_aligned(probe_floats * sizeof(float));
    Acts *acts = mamba_acts_new(m, threads);
    State *states[BENCH_BATCH] = {NULL}, *s = states[0] = mamba_state_new(m);
    int result = probe && acts && s ? 0 : -1;
    for (int i = 1; i < BENCH_BATCH && result == 0; i++)
        result = (states[i] = mamba_state_new(m)) ? 0 : -1;
    for (int i = 0; i < BENCH_PROMPT; i++) ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)c->V);
    for (size_t i = 0; i < probe_floats && probe; i++) probe[i] = 1;
    for (int round = -1; round < repeats && result == 0;
         round++) { // round -1 warms caches up and is not counted
        int k = round < 0 ? 0 : round;
        bandwidth[2 * k] = read_bandwidth(probe, probe_floats, threads);
        double start = seconds();
        result = mamba_prefill(m, acts, s, ids, BENCH_PROMPT, NULL, NULL);
        prefill[k] = seconds() - start;
        rate[2 * k] = multiply_rate(threads);
        start = seconds();
        for (int i = 0; i < BENCH_DECODE && result == 0; i++)
            result = mamba_step(m, acts, s, ids[i]);
        decode[k] = seconds() - start;
        start = seconds();
        for (int i = 0; i < BENCH_DECODE && result == 0; i++)
            result = mamba_step_batch(m, acts, states, ids + i, BENCH_BATCH);
        batch[k] = seconds() - start;
        bandwidth[2 * k + 1] = read_bandwidth(probe, probe_floats, threads);
        rate[2 * k + 1] = multiply_rate(threads);
        if (s->logits[0] - s->logits[0] != 0)
            result = fail("the logits are not finite: these weights cannot be timed honestly");
    }
    if (result == 0) {
        double read_time = median(prefill, repeats),
               write_time = median(decode, repeats) / BENCH_DECODE;
        double gb = median(bandwidth, 2 * repeats) / 1e9, gflops = median(rate, 2 * repeats) / 1e9;
        printf("%zu parameters in %s, %.1f MB of weights, %d thread%s, medians of %d\n",
               m->n_params, type_name(c->type), (double)m->tensors_bytes / 1e6, threads,
               threads > 1 ? "s" : "", repeats);
        printf("machine      %.1f GB/s read, %.1f GFLOP/s float32\n", gb, gflops);
        printf("prefill %d  %10.1f tokens/s  %5.1f%% of the float32 rate\n", BENCH_PROMPT,
               BENCH_PROMPT / read_time,
               100 * prefill_flops * BENCH_PROMPT / read_time / gflops / 1e9);
        printf("decode       %10.1f tokens/s  %5.1f%% of the read bandwidth\n", 1 / write_time,
               100 * (double)decode_bytes / write_time / gb / 1e9);
        double batch_time = median(batch, repeats) / BENCH_DECODE,
               batch_flops = BENCH_BATCH * (prefill_flops + 2 * D * c->V);
        double floor = fmax((double)decode_bytes / gb, batch_flops / gflops) / 1e9;
        printf("decode x%-4d %10.1f tokens/s  %5.1f%% of the floor (%s), %.2f times decode\n",
               BENCH_BATCH, BENCH_BATCH / batch_time, 100 * floor / batch_time,
               (double)decode_bytes / gb > batch_flops / gflops ? "bandwidth" : "float32 rate",
               BENCH_BATCH * write_time / batch_time);
    }
    for (int i = 0; i < BENCH_BATCH; i++) mamba_state_free(states[i]);
    mamba_acts_free(acts);
    free_aligned(probe);
    return result;
}

// The scan alone, N = 16: by the definition, over channels, and over channels and time.
static int bench_scan(const char *text, int threads, int repeats) {
    int B, E, L, N = 16;
    char extra;
    if (sscanf(text, "%d,%d,%d%c", &B, &E, &L, &extra) != 3 || B < 1 || E < 1 || L < 1 ||
        (double)B * L * ((double)E + 2 * N) > 1e9 || E > 1 << 20)
        return fail(
            "--scan needs B,E,L with B * L * (E + 32) at most 1e9 and E at most 1048576, not '%s'",
            text);
    size_t BLE = (size_t)B * E * L, NE = (size_t)N * E;
    float *u = alloc_aligned(BLE * 4), *delta = alloc_aligned(BLE * 4), *y = alloc_aligned(BLE * 4),
          *A_neg = alloc_aligned(NE * 4);
    float *BC = alloc_aligned((size_t)B * L * 2 * N * 4), *h = alloc_aligned(NE * 4),
          *skip = alloc_aligned((size_t)E * 4);
    float *carry = alloc_aligned(scan_carry_floats(E, N) * 4);
    int result = u && delta && y && A_neg && BC && h && skip && carry ? 0 : -1;
    uint64_t seed = 7;
    if (result == 0) {
        for (size_t i = 0; i < BLE; i++)
            u[i] = (float)random_unit(&seed) - 0.5f, delta[i] = 0.1f * (float)random_unit(&seed);
        for (size_t i = 0; i < NE; i++) A_neg[i] = -(float)(i / (size_t)E + 1);
        for (size_t i = 0; i < (size_t)B * L * 2 * N; i++) BC[i] = (float)random_unit(&seed) - 0.5f;
        int shapes_say = scan_pieces(L, E),
            time_pieces = shapes_say > 1 ? shapes_say : SCAN_TASKS / 2;
        const struct {
            const char *name;
            int pieces;
        } way[] = {{"definition, 1 thread", 0},
                   {"over channels", 1},
                   {"over channels and time", time_pieces}};
        for (int k = 0; k < 3; k++) {
            double time[BENCH_MAX];
            for (int round = 0; round < repeats; round++) {
                double start = seconds();
#pragma omp parallel num_threads(way[k].pieces ? threads : 1)
                for (int b = 0; b < B; b++) {
                    size_t at = (size_t)b * L * E;
                    const float *B_ssm = BC + (size_t)b * L * 2 * N;
                    Scan one = {u + at,        delta + at, A_neg, B_ssm, B_ssm + N, skip,
                                2 * (size_t)N, 1,          L,     E,     N};
                    LayerState seq = {NULL, h};
                    if (way[k].pieces == 0) recurrence_plain(y + at, h, NULL, &one, 0, E, 0, L);
                    else if (way[k].pieces == 1) scan(y + at, &seq, &one, NULL);
                    else scan_in_pieces(y + at, h, &one, way[k].pieces, carry);
                }
                time[round] = seconds() - start;
            }
            double t = median(time, repeats);
            printf("%-24s %9.3f ms  %8.1f million exponentials/s  %6.2f GB/s\n", way[k].name,
                   t * 1e3, (double)BLE * N / t / 1e6, (double)BLE * 12 / t / 1e9);
        }
        printf("%d threads; for this shape the model cuts time into %d piece%s\n", threads,
               shapes_say, shapes_say > 1 ? "s" : "");
    }
    free_aligned(u), free_aligned(delta), free_aligned(y), free_aligned(A_neg), free_aligned(BC),
        free_aligned(h);
    free_aligned(skip), free_aligned(carry);
    return result;
}

// --- bench on a GPU: prefill by length, generation by batch, a training step, each beside its
// floor

static int bench_gpu_prefill(const Model *m, Acts *a, State *s, int L, int repeats,
                             double flops_token, double peak) {
    double time[BENCH_MAX];
    int32_t *ids = malloc((size_t)L * sizeof *ids);
    uint64_t seed = 1;
    if (!ids) return fail("out of memory");
    for (int i = 0; i < L; i++) ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)m->config.V);
    int result = 0;
    for (int round = -1; round < repeats && result == 0; round++) {
        double start = seconds();
        result = mamba_prefill(m, a, s, ids, (size_t)L, NULL, NULL);
        time[round < 0 ? 0 : round] = seconds() - start;
    }
    free(ids);
    if (result == 0 && s->logits[0] - s->logits[0] != 0) result = fail("the logits are not finite");
    if (result) return -1;
    double t = median(time, repeats), used = 0;
    char name[256];
    if (GPU->measure(NULL, NULL, &used, name)) return gpu_failed();
    printf("prefill %-8d %10.2f ms  %12.0f tokens/s  %5.1f%% of the products' floor, %.2f GB\n", L,
           t * 1e3, L / t, 100 * flops_token * L / peak / t, used / 1e9);
    return 0;
}

static int bench_gpu_generate(const Model *m, Acts *a, int S, int repeats, double bytes,
                              double state_bytes, double copy) {
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int steps = GPU->generate_max, result = -1;
    double time[BENCH_MAX];
    uint64_t *random = calloc((size_t)S, sizeof *random);
    int32_t recent[RECENT] = {0}, *ids = malloc((size_t)S * steps * sizeof *ids);
    unsigned char *allowed = malloc((size_t)m->config.V);
    if (random && ids && allowed) {
        memset(allowed, 1, (size_t)m->config.V);
        result = GPU->generate_start(a->gpu, S, &greedy, random, 1, recent, 1, allowed)
                     ? gpu_failed()
                     : 0;
        for (int round = -1; round < repeats && result == 0; round++) {
            double start = seconds();
            if (GPU->generate(a->gpu, ids, steps)) result = gpu_failed();
            time[round < 0 ? 0 : round] = (seconds() - start) / steps;
        }
        if (result == 0 && ids[0] < 0) result = fail("the logits are not finite");
    }
    free(random), free(ids), free(allowed);
    if (result) return -1;
    double t = median(time, repeats);
    printf("generate x%-6d %10.3f ms  %12.0f tokens/s  %5.1f%% of the bytes' floor\n", S, t * 1e3,
           S / t, 100 * (bytes + 2 * S * state_bytes) / copy / t);
    return 0;
}

// End to end: S prompts of L random tokens, each its own, read one after the other from zero
// states, then `steps` tokens for all together. Everything that this takes is in the time.
static int bench_gpu_dialogues(const Model *m, Acts *a, int S, int L, int steps, int repeats) {
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int V = m->config.V, most = GPU->generate_max, result = -1;
    double time[BENCH_MAX], reading[BENCH_MAX];
    State *zero = mamba_state_new(m);
    uint64_t *random = calloc((size_t)S, sizeof *random), seed = 5;
    int32_t *prompts = malloc((size_t)S * L * sizeof *prompts),
            *ids = malloc((size_t)S * most * sizeof *ids);
    unsigned char *allowed = malloc((size_t)V);
    if (zero && random && prompts && ids && allowed) {
        memset(allowed, 1, (size_t)V);
        for (size_t i = 0; i < (size_t)S * L; i++)
            prompts[i] = (int32_t)(random_u64(&seed) % (uint64_t)V);
        result = GPU->set_state(a->gpu, zero->conv, zero->h, zero->logits);
        for (int round = -1; round < repeats && result == 0; round++) {
            double start = seconds(), read = 0;
            for (int s = 0; s < S && result == 0; s++)
                if (GPU->prefill(a->gpu, prompts + (size_t)s * L, (size_t)L, NULL, NULL) ||
                    GPU->gather(a->gpu, s, S))
                    result = -1;
            read = seconds() - start;
            if (result == 0)
                result = GPU->generate_start(a->gpu, S, &greedy, random, (uint64_t)L, zero->recent,
                                             1, allowed);
            for (int done = 0; done < steps && result == 0; done += most)
                result = GPU->generate(a->gpu, ids, steps - done < most ? steps - done : most);
            time[round < 0 ? 0 : round] = seconds() - start, reading[round < 0 ? 0 : round] = read;
            if (result == 0) result = GPU->set_state(a->gpu, zero->conv, zero->h, zero->logits);
        }
        if (result) result = gpu_failed();
        for (int s = 0; s < S && result == 0; s++)
            if (ids[s] < 0) result = fail("the logits are not finite");
    }
    mamba_state_free(zero);
    free(random), free(prompts), free(ids), free(allowed);
    if (result) return -1;
    double t = median(time, repeats), r = median(reading, repeats);
    printf("prompt %d + %d, x%-3d %9.1f ms  %12.0f tokens/s generated, all counted (%.1f ms of it "
           "reads the prompts)\n",
           L, steps, S, t * 1e3, S * steps / t, r * 1e3);
    return 0;
}

static int bench_gpu_train(const Config *shape, int B, int L, int repeats, double peak) {
    Config c = *shape;
    c.type = F32;
    Model *m = mamba_random_model(&c, 42);
    Trainer *x = m ? mamba_trainer_new_gpu(m, B, L, backend.float32) : NULL;
    int32_t *ids = malloc((size_t)B * L * sizeof *ids),
            *targets = malloc((size_t)B * L * sizeof *ids);
    const AdamW how = {1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    double time[BENCH_MAX], norm = 0, sum = 0, used = 0;
    char name[256];
    uint64_t seed = 3;
    int result = x && ids && targets ? 0 : -1;
    for (int i = 0; i < B * L && result == 0; i++)
        ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)c.V),
        targets[i] = (int32_t)(random_u64(&seed) % (uint64_t)c.V);
    for (int round = -2; round < repeats && result == 0; round++) {
        double start = seconds();
        sum = mamba_train_pass(x, ids, targets, 1.0f / (float)(B * L), true);
        result = mamba_train_step(x, &how, &norm);
        time[round < 0 ? 0 : round] = seconds() - start;
    }
    if (result == 0) {
        double t = median(time, repeats), tokens = (double)B * L;
        GPU->measure(NULL, NULL, &used, name);
        printf("train %dx%-7d %10.2f ms  %12.0f tokens/s  %5.1f%% of 6 operations a weight, %.2f "
               "GB, loss %.3f\n",
               B, L, t * 1e3, tokens / t, 100 * 6 * (double)m->n_params * tokens / peak / t,
               used / 1e9, sum / tokens);
    }
    mamba_trainer_free(x);
    mamba_free(m);
    free(ids), free(targets);
    return result;
}

static int bench_gpu(const Model *m, int repeats, const char *only) {
    const Config *c = &m->config;
    const int lengths[] = {512, 2048, 16384, 1 << 20}, batches[] = {1, 8, 64, 256},
              dialogues[] = {1, 8, 64}, train[][2] = {{8, 2048}, {1, 16384}};
    double copy = 0, flops = 0, used = 0, D = c->D, E = c->E;
    double flops_token = 2 * c->n_layer * (2 * E * D + E * (c->R + 2.0 * c->N) + E * c->R + E * D);
    double state_bytes = 4.0 * (c->N + c->K - 1) * c->n_layer * E,
           bytes = (double)m->tensors_bytes -
                   (c->flags & FLAG_TIED ? 0 : (double)tensor_bytes(&m->embedding));
    if (is_quantized(c->type))
        bytes = (double)m->n_params * (backend.float32 ? 4 : 2); // there they are unpacked
    char name[256];
    Acts *a = mamba_acts_new(m, 1);
    State *s = mamba_state_new(m);
    int result = a && s ? mamba_acts_gpu(a, m, backend.float32) : -1;
    if (result == 0 && GPU->measure(&copy, &flops, &used, name)) result = gpu_failed();
    if (result == 0) {
        double peak = (c->type == BF16 || is_quantized(c->type)) && !backend.float32
                          ? flops
                          : flops / 15; // float32 units of the same chip, roughly
        printf("%zu parameters in %s on %s: copies %.2f TB/s, bf16 products %.0f TFLOP/s; medians "
               "of %d\n",
               m->n_params, type_name(c->type), name, copy / 1e12, flops / 1e12, repeats);
        for (int i = 0; i < COUNT(lengths) && result == 0 && strchr(only, 'p'); i++) {
            bool very_long = lengths[i] > 1 << 16; // small models only, and not too often
            if (very_long && m->n_params > 500 * 1000 * 1000) continue;
            result = bench_gpu_prefill(m, a, s, lengths[i], very_long && repeats > 3 ? 3 : repeats,
                                       flops_token, peak);
        }
        for (int i = 0; i < COUNT(batches) && result == 0 && strchr(only, 'g'); i++)
            result = bench_gpu_generate(m, a, batches[i], repeats, bytes, state_bytes, copy);
        for (int i = 0; i < COUNT(dialogues) && result == 0 && strchr(only, 'd'); i++)
            result = bench_gpu_dialogues(m, a, dialogues[i], 2048, 128, repeats < 3 ? repeats : 3);
    }
    mamba_state_free(s);
    mamba_acts_free(a);
    for (int i = 0; i < COUNT(train) && result == 0 && strchr(only, 't'); i++)
        if (bench_gpu_train(c, train[i][0], train[i][1], repeats < 5 ? repeats : 5, flops))
            printf("train %dx%-7d %s\n", train[i][0], train[i][1], error_text);
    return result;
}

static int bench_gpu_scan(const char *text, int repeats) {
    int B, E, L;
    char dtype[8] = "bf16", extra;
    double t[4];
    int n = sscanf(text, "%d,%d,%d,%7[a-z0-9]%c", &B, &E, &L, dtype, &extra);
    if ((n != 3 && n != 4) || B < 1 || E < 1 || L < 1 ||
        (strcmp(dtype, "bf16") && strcmp(dtype, "f32")))
        return fail("--scan needs B,E,L or B,E,L,f32, not '%s'", text);
    if (GPU->time_scan(B, E, L, 16, !strcmp(dtype, "f32"), repeats, t)) return gpu_failed();
    double cells = (double)B * E * L, width = !strcmp(dtype, "f32") ? 4 : 2,
           bytes = cells * 4 * width;
    printf("copy of the same bytes %9.4f ms  %6.3f TB/s\n", t[2] * 1e3, bytes / t[2] / 1e12);
    printf("scan forward           %9.4f ms  %6.3f TB/s  %6.2f trillion exponentials/s\n",
           t[0] * 1e3, bytes / t[0] / 1e12, cells * 16 / t[0] / 1e12);
    if (t[1] > 0)
        printf("scan backward          %9.4f ms  %6.3f TB/s  %6.2f trillion exponentials/s\n",
               t[1] * 1e3, 2 * bytes / t[1] / 1e12, cells * 16 / t[1] / 1e12);
    return 0;
}

static int command_bench(int argc, char **argv) {
    const char *shape = NULL, *dtype = "f32", *scan = NULL, *path = NULL, *only = "pgt";
    long threads = default_threads(), repeats = 7;
    const Option options[] = {
        {"--shape", "S", "random weights of this shape instead of a model", OPT_TEXT, &shape, 0, 0},
        {"--dtype", "T", "their storage type", OPT_TEXT, &dtype, 0, 0},
        {"--scan", "B,E,L", "time the scan alone: sequences, channels, length", OPT_TEXT, &scan, 0,
         0},
        {"--only", "LETTERS",
         "on a GPU: p prefill, g generation, t training, d 1, 8, 64 prompts of 2048 and 128 more",
         OPT_TEXT, &only, 0, 0},
        {"-r", "N", "repeats, of which the median is shown", OPT_INT, &repeats, 1, BENCH_MAX},
        BACKEND_OPTIONS,
        {"-T", "N", "threads", OPT_INT, &threads, 1, 1024},
    };
    if (wants_help(argc, argv)) return print_help(BENCH_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), &path, 1);
    if (n < 0) return -1;
    if (n + (shape != NULL) + (scan != NULL) != 1)
        return fail("bench needs one of: a model.bin, --shape, --scan");
    bool gpu = GPU && !backend.cpu;
    if (scan)
        return gpu ? bench_gpu_scan(scan, (int)repeats)
                   : bench_scan(scan, (int)threads, (int)repeats);
    Config c;
    if (shape && parse_shape(shape, dtype, &c)) return -1;
    Model *m = shape ? mamba_random_model(&c, 42) : mamba_load(path);
    int result = !m    ? -1
                 : gpu ? bench_gpu(m, (int)repeats, only)
                       : bench_model(m, (int)threads, (int)repeats);
    mamba_free(m);
    return result;
}

