// Command line: every wrong one is an error that names the thing. tests/test_cli.sh tests the
// output.

static void expect_error(const char *word, int argc, const char *const *argv) {
    char name[160] = "mamba";
    for (int i = 1; i < argc; i++)
        snprintf(name + strlen(name), sizeof name - strlen(name), " %.40s", argv[i]);
    error_text[0] = 0;
    int result = run_command(argc, (char **)(uintptr_t)argv);
    report(result == -1 && strstr(error_text, word), name, "%s", error_text);
}
#define ERROR_IN(word, ...) \
    expect_error(word, COUNT(((const char *[]){"mamba", __VA_ARGS__})), \
                 (const char *[]){"mamba", __VA_ARGS__})

// A held-out loss of sequences of a million tokens must not cost as much as 32 training steps.
static void test_held_out_passes(void) {
    const int want[][3] = {{16, 256, 2},    {1, 256, 32},    {24, 16384, 2},   {64, 16384, 1},
                           {1, 16384, 32},  {1, 32768, 16},  {1, 65537, 7},    {3, 65536, 3},
                           {1, 1 << 19, 1}, {1, 1 << 20, 1}, {64, 1 << 20, 1}, {1, 1 << 24, 1}};
    int wrong = 0;
    for (int i = 0; i < COUNT(want); i++)
        wrong += held_out_passes(want[i][0], want[i][1]) != want[i][2];
    report(wrong == 0, "passes of a held-out loss", "%d of %d differ", wrong, COUNT(want));
}

// train --noise X: of the tokens read, the share X is drawn anew, each id of the vocabulary as
// often; those to be predicted stay. Held to the binomial distribution: 5 standard deviations.
static void test_noise(double share) {
    enum { TOKENS = 100000, IDS = 40 };
    static int32_t data[TOKENS + 3], ids[TOKENS], targets[TOKENS];
    for (int i = 0; i < TOKENS + 3; i++) data[i] = 7;
    TrainOptions o = {.noise = share};
    Model model = {.config.V = IDS};
    Trainer trainer = {.B = 4, .L = TOKENS / 4};
    Training t = {.o = &o, .model = &model, .trainer = &trainer, .data = data, .ids = ids};
    t.targets = targets;
    t.n_data = TOKENS + 3;
    t.ranks.size = 1;
    t.run.random = 1;
    next_batch(&t, 0);
    double seen[IDS] = {0}, worst = 0;
    int wrong = 0;
    for (int i = 0; i < TOKENS; i++) wrong += targets[i] != 7 || ids[i] < 0 || ids[i] >= IDS;
    for (int i = 0; i < TOKENS && !wrong; i++) seen[ids[i]]++;
    for (int id = 0; id < IDS; id++) {
        const double p = share / IDS + (id == 7 ? 1 - share : 0);
        const double deviation = sqrt(TOKENS * p * (1 - p));
        worst = fmax(worst, fabs(seen[id] - TOKENS * p) / fmax(deviation, 1e-9));
    }
    report(!wrong && worst < 5, "train --noise",
           "%g: %d of %d tokens wrong, worst count %.2f sigma", share, wrong, TOKENS, worst);
}

static void test_command_line(void) {
    test_held_out_passes();
    const double shares[] = {0, 0.05, 0.5, 1};
    for (int i = 0; i < COUNT(shares); i++) test_noise(shares[i]);
    const char *m = "tests/odd.bin";
    ERROR_IN("--nope", m, "x", "--nope");
    ERROR_IN("-n", m, "x", "-n");
    ERROR_IN("-n", m, "x", "-n", "ten");
    ERROR_IN("-n", m, "x", "-n", "1e3");
    ERROR_IN("-n", m, "x", "-n", "-2");
    ERROR_IN("-n", m, "x", "-n", "");
    ERROR_IN("-n", m, "x", "-n", "99999999999999999999");
    ERROR_IN("-t", m, "x", "-t", "nan");
    ERROR_IN("-t", m, "x", "-t", "-1");
    ERROR_IN("-t", m, "x", "-t", "1x");
    ERROR_IN("-p", m, "x", "-p", "1.5");
    ERROR_IN("-k", m, "x", "-k", "-1");
    ERROR_IN("--min-p", m, "x", "--min-p", "2");
    ERROR_IN("--repeat-penalty", m, "x", "--repeat-penalty", "0");
    ERROR_IN("-T", m, "x", "-T", "0");
    ERROR_IN("-s", m, "x", "-s", "-5");
    ERROR_IN("--stop", m, "x", "--stop", "");
    ERROR_IN("too many", m, "x", "y");
    ERROR_IN("--samples", m, "x", "--samples", "0");
    ERROR_IN("--samples", m, "x", "--samples", "1000000000000");
    ERROR_IN("needs a prompt", m, "--samples", "2");
    ERROR_IN("one too many", m, "x", "--batch", "tests/test_cli.sh");
    ERROR_IN("no-such-prompts", m, "--batch", "tests/no-such-prompts");
    ERROR_IN("empty", m, "--batch", "/dev/null");
    ERROR_IN("--save-state", m, "x", "--samples", "2", "--save-state", "tests/never");
    ERROR_IN("--show-selection", m, "x", "--samples", "2", "--show-selection");
    ERROR_IN("-n 0", m, "x", "--samples", "2", "-n", "0");
    ERROR_IN("--null", m, "x", "--null");
    ERROR_IN("line 2", "models/tales.bin", "--batch", "models/tales.bin");
    ERROR_IN("no-such-file", m, "x", "--load-state", "tests/no-such-file");
    ERROR_IN("no-such-model", "no-such-model", "x");
    ERROR_IN("model.bin", "info");
    ERROR_IN("one argument too many", "info", m, m);
    ERROR_IN("--each", "info", m, "--each");
    ERROR_IN("no-such-text", "eval", m, "tests/no-such-text");
    ERROR_IN("eval needs", "eval", m);
    ERROR_IN("tokenize needs", "tokenize");
    ERROR_IN("--tokens", "logits", m, "--tokens", "1,,2");
    ERROR_IN("--tokens", "logits", m, "--tokens", "1,2,");
    ERROR_IN("--tokens", "logits", m, "--tokens", "x");
    ERROR_IN("259", "logits", m, "--tokens", "259");
    ERROR_IN("either", "logits", m);
    ERROR_IN("either", "logits", m, "x", "--tokens", "1");
    ERROR_IN("no/such", "logits", m, "x", "-o", "no/such/folder");
    ERROR_IN("one of", "bench");
    ERROR_IN("--shape", "bench", "--shape", "131m");
    ERROR_IN("--dtype", "bench", "--shape", "8,1,9", "--dtype", "f8");
    ERROR_IN("--scan", "bench", "--scan", "1,2");
    ERROR_IN("out of range", "bench", "--shape", "0,1,1");
    ERROR_IN("byte 0", "models/tales.bin", "\xff");
    ERROR_IN("byte 3", "models/tales.bin", "abc\xed\xa0\x80");
    ERROR_IN("byte 1", "models/tales.bin", "a\xc3");
}
