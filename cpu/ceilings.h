// cpu/ceilings.h: what a processor can do at most, for the benchmark: vectors read from memory, and
// the inner loop of cpu/matmul.h. cli/bench.h includes it and has the plain forms.

#pragma once

// The sum of p (n), n a multiple of 4 VL: as fast as memory is read.
static float read_floats(const float *p, size_t n) {
    vec sum[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (size_t i = 0; i + 4 * VL <= n; i += 4 * VL)
        for (int k = 0; k < 4; k++) sum[k] += load(p + i + k * VL);
    return sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]);
}

// micro_kernel() many times on data in the cache. Returns the multiply-adds done; *sum gets a
// number that depends on them.
static double multiply_adds(volatile float *sum) {
    enum { ROUNDS = 4000, DEPTH = 128 };
    float a[DEPTH * MR], b[DEPTH * NR], tile[MR * NR];
    for (int i = 0; i < DEPTH * MR; i++) a[i] = (float)(i % 7);
    for (int i = 0; i < DEPTH * NR; i++) b[i] = (float)(i % 5);
    for (int i = 0; i < ROUNDS; i++) {
        a[i % (DEPTH * MR)] += 1; // no two rounds are the same
        micro_kernel(tile, a, b, DEPTH);
        // A different sum each round: of a fixed one the compiler would compute nothing else.
        *sum = tile[i % (MR * NR)];
    }
    return (double)ROUNDS * DEPTH * MR * NR;
}
