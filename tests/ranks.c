// ranks.c - a process of tests/test_ranks.sh: a rank that computes nothing. It meets the others,
// takes rank 0's id, and goes through steps: 10 ms, then a sum over all ranks, which it checks.
//   ranks STEPS [HANG]   HANG: at that step it waits for ever, as a process whose GPU does
#define MAMBA_NO_MAIN
#include "../mamba.c"

static int steps_of(Ranks *r, int steps, int hang) {
    char id[128];
    for (int i = 0; i < (int)sizeof id; i++) id[i] = r->rank ? 0 : (char)(i * 7 + 1);
    if (mamba_ranks_share(r, id, sizeof id)) return -1;
    for (int i = 0; i < (int)sizeof id; i++)
        if (id[i] != (char)(i * 7 + 1)) return fail("the id differs at byte %d", i);
    mamba_ranks_files(r, false);
    for (int step = 0; step < steps; step++) {
        const double other = 0.1 * (r->size - 1); // 0 + 0.1 + 0.2 ..., added in this order
        double sum[2] = {0.1 * r->rank, step == steps - 1 && r->rank == r->size - 1}, want = 0;
        while (step == hang) ranks_sleep(1);
        ranks_sleep(0.01);
        for (int i = 0; i < r->size; i++) want += 0.1 * i;
        if (mamba_ranks_sum(r, sum, 2)) return -1;
        if (sum[0] != want && r->size > 1)
            return fail("step %d: the sum is %.17g, not %.17g (%g)", step, sum[0], want, other);
        if ((sum[1] != 0) != (step == steps - 1) && r->size > 1) return fail("step %d: stop", step);
    }
    return 0;
}

int main(int argc, char **argv) {
    Ranks r;
    if (mamba_ranks_open(&r)) {
        fprintf(stderr, "mamba: %s\n", error_text);
        return 1;
    }
    int result = steps_of(&r, atoi(argv[1]), argc > 2 ? atoi(argv[2]) : -1);
    if (result) fprintf(stderr, "mamba: %s\n", error_text);
    else
        printf("rank %d of %d by %s at %s:%s\n", r.rank, r.size, r.by ? r.by : "nobody", r.host,
               r.port);
    mamba_ranks_close(&r, result == 0);
    return result ? 1 : 0;
}
