// cpu/ceilings.h: what this machine can do at most, for the benchmark: the rate at which vectors
// are read from memory, and the rate of the inner loop of cpu/matmul.h. It replaces the plain
// read_bandwidth and multiply_rate of cli/bench.h, which includes it.

// Bytes per second that `threads` threads read together. Each reads its own part of a buffer that
// is far larger than the caches.
static double read_bandwidth(const float *buffer, size_t floats, int threads) {
    double start = seconds();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < 256; part++) {
        const float *p = buffer + floats / 256 * (size_t)part;
        vec sum[4] = {splat(0), splat(0), splat(0), splat(0)};
        for (size_t i = 0; i + 4 * VL <= floats / 256; i += 4 * VL)
            for (int k = 0; k < 4; k++) sum[k] += load(p + i + k * VL);
        bench_sink = sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]);
    }
    return (double)floats * sizeof(float) / (seconds() - start);
}

// Operations per second of micro_kernel() on data in the cache; a multiply-add counts as two.
static double multiply_rate(int threads) {
    enum { ROUNDS = 4000, DEPTH = 128 };
    double start = seconds();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        float a[DEPTH * MR], b[DEPTH * NR], tile[MR * NR];
        for (int i = 0; i < DEPTH * MR; i++) a[i] = (float)(i % 7);
        for (int i = 0; i < DEPTH * NR; i++) b[i] = (float)(i % 5);
        for (int i = 0; i < ROUNDS; i++) {
            a[i % (DEPTH * MR)] += 1; // no two rounds are the same
            micro_kernel(tile, a, b, DEPTH);
            // A different sum each round: of a fixed one the compiler would compute nothing else.
            bench_sink = tile[i % (MR * NR)];
        }
    }
    return 2.0 * ROUNDS * DEPTH * MR * NR * threads / (seconds() - start);
}
