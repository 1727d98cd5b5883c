/* train_example.c - training inside another program: compile with -DMAMBA_NO_MAIN. A small model
   learns a rhyme byte by byte, is saved with a checkpoint, goes on from it, and is quantised. */
#include "../mamba.c"

enum { B = 4, L = 32 }; // sequences of a step, tokens of a sequence
static const char RHYME[] = "One fish, two fish, red fish, blue fish. Old fish, new fish. ";
static int n_passed, n_failed;

static void check(bool good, const char *what) {
    printf("%s %s%s%s\n", good ? "ok  " : "FAIL", what, good ? "" : ": ",
           good ? "" : mamba_error());
    if (good) n_passed++;
    else n_failed++;
}

// Trains n steps, each on windows of the rhyme that begin anywhere. The loss of the last step in
// nats a token; NaN after an error. run->random says which windows are next.
static double train(Trainer *x, TrainRun *run, const int32_t *text, size_t n_text, int n) {
    const AdamW how = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    int32_t ids[B * L], targets[B * L];
    double loss = NAN, norm;
    for (int step = 0; step < n; step++) {
        for (int i = 0; i < B * L; i++) {
            if (i % L == 0) run->random = run->random * 6364136223846793005u + 1;
            const size_t at = (size_t)(run->random >> 33) + i % L;
            ids[i] = text[at % n_text];
            targets[i] = text[(at + 1) % n_text];
        }
        loss = mamba_train_pass(x, ids, targets, 1.0f / (B * L), true) / (B * L);
        if (mamba_train_step(x, &how, &norm)) return NAN;
    }
    return loss;
}

// The sum of the losses over the rhyme, read from the start; NaN after an error.
static double score(const Model *m, const int32_t *text, size_t n) {
    double nll = NAN;
    Acts *a = mamba_acts_new(m, 1);
    State *s = mamba_state_new(m);
    if (!a || !s || mamba_evaluate(m, a, s, text, n, &nll)) nll = NAN;
    mamba_state_free(s);
    mamba_acts_free(a);
    return nll;
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "train_example.bin";
    const Config shape = {.type = F32,
                          .flags = FLAG_TIED | FLAG_CONV_BIAS,
                          .D = 32,
                          .n_layer = 2,
                          .V = 256,
                          .E = 64,
                          .N = 8,
                          .K = 4,
                          .R = 2,
                          .norm_eps = 1e-5f,
                          .bos = -1,
                          .pad = -1,
                          .eos = {-1, -1, -1, -1}};
    // A tokenizer of NULL: a token is a byte.
    Model *m = mamba_random_model(&shape, 1), *other = mamba_random_model(&shape, 2);
    if (!m || !other || mamba_set_tokenizer(m, NULL, 0) || mamba_set_tokenizer(other, NULL, 0)) {
        fprintf(stderr, "%s\n", mamba_error());
        return 1;
    }
    int32_t *text = NULL;
    size_t n = 0;
    check(mamba_encode(m, RHYME, strlen(RHYME), &text, &n) == 0, "the text becomes tokens");
    Trainer *x = mamba_trainer_new(m, B, L, 0, 0), *y = mamba_trainer_new(other, B, L, 0, 0);
    TrainRun run = {.text = "rhyme, rate 0.01", .random = 1, .held_loss = NAN};
    const double before = train(x, &run, text, n, 1), after = train(x, &run, text, n, 29);
    printf("loss %.3f after 1 step, %.3f after 30\n", before, after);
    check(after < before - 1, "the loss falls");

    check(mamba_checkpoint_save(x, &run, path) == 0, "the checkpoint is saved");
    TrainRun again = {.text = "rhyme, rate 0.01"}; // a text that differs would be refused
    check(mamba_checkpoint_load(y, &again, path) == 0 && y->step == 30, "and loaded");
    check(train(x, &run, text, n, 5) == train(y, &again, text, n, 5), "both runs go on as one");

    check(mamba_save(m, path) == 0, "the model is saved");
    Model *loaded = mamba_load(path), *small = mamba_quantize(m, false);
    const double nll = score(m, text, n);
    check(loaded && score(loaded, text, n) == nll, "and loaded, with the same losses");
    check(small && mamba_save(small, path) == 0, "a copy in 8.5 bits a weight is saved");
    check(small && fabs(score(small, text, n) - nll) < 0.1 * nll, "and its losses are close");
    remove(path);
    free(text);
    mamba_trainer_free(x); // before its model
    mamba_trainer_free(y);
    Model *models[] = {m, other, loaded, small};
    for (int i = 0; i < 4; i++) mamba_free(models[i]);
    printf("%d passed, %d failed, 0 skipped\n", n_passed, n_failed);
    return n_failed != 0;
}
