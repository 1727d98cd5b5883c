/* library_threads.c - a program around libmamba, in C and in C++, of two source files: with -DOTHER
   it is the second one. Two models write in two threads, each the text that it writes alone; each
   thread has its own error; a model is trained, saved and loaded. */
#include "../lib/mamba.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT = 4096 };
typedef struct {
    const char *path, *missing; /* a model that there is, one that there is not */
    char text[TEXT], error[256];
    size_t n;
    int result;
} Job;

#ifdef __cplusplus
extern "C" {
#endif
void *write_text(void *job);
#ifdef __cplusplus
}
#endif

#ifdef OTHER
static bool keep(void *context, int32_t id, const unsigned char *text, size_t n) {
    Job *job = (Job *)context;
    (void)id;
    if (n > TEXT - job->n) n = TEXT - job->n;
    memcpy(job->text + job->n, text, n);
    job->n += n;
    return false;
}

void *write_text(void *context) {
    Job *job = (Job *)context;
    mamba_model *m = mamba_load(job->path);
    mamba_acts *a = m ? mamba_acts_new(m, 2) : NULL;
    mamba_state *s = a ? mamba_state_new(m) : NULL;
    mamba_writing how = mamba_writing_defaults();
    int32_t *ids = NULL;
    size_t n = 0;
    how.emit = keep;
    how.context = job;
    how.most = 100;
    job->n = 0;
    job->result = !s || mamba_encode(m, "Once upon", 9, &ids, &n) ||
                  mamba_prefill(m, a, s, ids, n, NULL, NULL) ||
                  mamba_generate(m, a, s, &how) != 100 || mamba_position(s) != n + 100;
    if (mamba_load(job->missing)) job->result = 1;
    snprintf(job->error, sizeof job->error, "%s", mamba_error());
    mamba_release(ids);
    mamba_state_free(s);
    mamba_acts_free(a);
    mamba_free(m);
    return NULL;
}
#else
static int n_passed, n_failed;
static void check(bool good, const char *what) {
    printf("%s %s%s%s\n", good ? "ok  " : "FAIL", what, good ? "" : ": ",
           good ? "" : mamba_error());
    if (good) n_passed++;
    else n_failed++;
}

static void threads(void) {
    Job alone[2], both[2];
    pthread_t thread[2];
    memset(alone, 0, sizeof alone);
    alone[0].path = "models/story.bin";
    alone[1].path = "models/tales.bin";
    alone[0].missing = "no/such/first";
    alone[1].missing = "no/such/second";
    memcpy(both, alone, sizeof both);
    for (int i = 0; i < 2; i++) write_text(&alone[i]);
    for (int i = 0; i < 2; i++) pthread_create(&thread[i], NULL, write_text, &both[i]);
    for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < 2; i++) {
        check(!alone[i].result && !both[i].result && alone[i].n > 100, alone[i].path);
        check(alone[i].n == both[i].n && !memcmp(alone[i].text, both[i].text, alone[i].n),
              "the same text as alone");
        check(strstr(both[i].error, both[i].missing) != NULL, "an error of its own");
    }
}

static void training(const char *path) {
    enum { B = 2, L = 16 };
    const char *rhyme = "One fish, two fish, red fish, blue fish. ";
    const mamba_config shape = mamba_config_defaults(16, 1, 256);
    mamba_config bad = shape;
    mamba_model *m = mamba_random_model(&shape, 1);
    int32_t *text = NULL, ids[B * L], targets[B * L];
    size_t n = 0;
    double first = 0, last = 0, norm = 0;
    bad.N = 5000;
    check(!mamba_random_model(&bad, 1) && strstr(mamba_error(), "N is 5000"), "a size is checked");
    check(m && !mamba_set_tokenizer(m, NULL, 0), "a new model of bytes");
    check(m && !mamba_encode(m, rhyme, strlen(rhyme), &text, &n) && n == strlen(rhyme), "encode");
    mamba_trainer *x = m ? mamba_trainer_new(m, B, L, 0, 1) : NULL;
    for (int step = 0; x && step < 30; step++) {
        for (int i = 0; i < B * L; i++) {
            ids[i] = text[((size_t)(i + 7 * step)) % n];
            targets[i] = text[((size_t)(i + 7 * step + 1)) % n];
        }
        last = mamba_train_pass(x, ids, targets, 1.0f / (B * L), true) / (B * L);
        if (step == 0) first = last;
        if (mamba_train_step(x, NULL, &norm)) break;
    }
    check(x && mamba_trainer_steps(x) == 30 && last < first - 0.5 && norm > 0, "the loss falls");
    const double whole = x ? mamba_train_pass(x, ids, targets, 1, false) : 0;
    const bool carries = x && !mamba_trainer_carry(x, 1) &&
                         mamba_train_pass_on(x, 0, ids, targets, 1, false) == whole &&
                         mamba_train_pass_on(x, 0, ids, targets, 1, false) != whole;
    check(carries, "a pass goes on from the states before it");
    check(x && isnan(mamba_train_pass_on(x, 1, ids, targets, 1, false)) &&
              strstr(mamba_error(), "place 1"),
          "a place that is not there");
    ids[3] = 256;
    check(x && isnan(mamba_train_pass(x, ids, targets, 1, false)), "an id out of range");
    check(m && !mamba_save(m, path), "save");
    mamba_model *again = mamba_load(path);
    check(again && mamba_vocabulary(again) == 256 && mamba_model_config(again).D == 16 &&
              mamba_parameters(again) == mamba_parameters(m) && mamba_token_room(again) >= 1 &&
              mamba_start_token(again) == -1 && !mamba_is_end(again, -1),
          "load");
    check(again && !mamba_verify(again), "verify");
    remove(path);
    mamba_release(text);
    mamba_trainer_free(x);
    mamba_free(again);
    mamba_free(m);
}

/* A tokenizer of seven words by hand, the first one special, with a chat template. */
typedef struct {
    unsigned char bytes[512];
    size_t n;
} Blob;
static void add_u32(Blob *b, uint32_t value) {
    for (int i = 0; i < 4; i++) b->bytes[b->n++] = (unsigned char)(value >> 8 * i);
}
static void add_text(Blob *b, const char *text) {
    add_u32(b, (uint32_t)strlen(text));
    memcpy(b->bytes + b->n, text, strlen(text));
    b->n += strlen(text);
}
enum { END, UNKNOWN, SYSTEM, USER, BOT, HI, YES, WORDS };

static void chat_blob(Blob *b) {
    static const char *const words[WORDS] = {"<end>", "<unk>", "sys", "user", "bot", "hi", "yes"};
    static const char *const around[] = {"user ", "sys ", " user ", " bot ", "<end> user ", "-"};
    const uint32_t header[] = {2, 3, 0x1000, 9, WORDS, 0, 1, 0xFFFFFFFF, UNKNOWN, 0, 0, 0, 0, 0, 0};
    memcpy(b->bytes, "mtok", 4);
    b->n = 4;
    for (int i = 0; i < 15; i++) add_u32(b, header[i]);
    for (int i = 0; i < WORDS; i++) add_text(b, words[i]);
    add_u32(b, END);
    add_u32(b, 1); /* special */
    add_text(b, words[END]);
    size_t start = b->n;
    add_u32(b, 0);
    for (int i = 0; i < 6; i++) add_text(b, around[i]);
    add_u32(b, (uint32_t)(b->n - start));
    memcpy(b->bytes + b->n, "chat", 4);
    b->n += 4;
    b->bytes[40] = (unsigned char)(b->n - start); /* bytes at the end that only chat reads */
}

/* The user says text; the ids are then read. */
static void turn(const mamba_model *m, mamba_acts *a, mamba_state *s, const char *system,
                 const char *text, const int32_t *want, size_t n_want, const char *what) {
    int32_t *ids = NULL;
    size_t n = 0;
    check(!mamba_chat_turn(m, s, system, text, strlen(text), &ids, &n) && n == n_want &&
              !memcmp(ids, want, n * sizeof *ids) && !mamba_prefill(m, a, s, ids, n, NULL, NULL),
          what);
    mamba_release(ids);
}

static void chat(void) {
    static const int32_t first[] = {SYSTEM, YES, USER, HI, BOT}, next[] = {END, USER, YES, BOT},
                         plain[] = {USER, HI, BOT};
    const mamba_config shape = mamba_config_defaults(16, 1, WORDS);
    mamba_model *m = mamba_random_model(&shape, 1);
    mamba_acts *a = m ? mamba_acts_new(m, 1) : NULL;
    mamba_state *s = a ? mamba_state_new(m) : NULL;
    int32_t *ids = NULL;
    size_t n = 0;
    Blob blob;
    chat_blob(&blob);
    check(s && mamba_chat_end(m) == -1 && strstr(mamba_error(), "no chat template"),
          "no chat template: no end of a reply");
    check(s && mamba_chat_turn(m, s, NULL, "hi", 2, &ids, &n), "no turn either");
    check(s && !mamba_set_tokenizer(m, blob.bytes, blob.n) && mamba_chat_end(m) == END,
          "a chat template");
    if (s) {
        turn(m, a, s, "yes", "hi", first, 5, "a conversation opens");
        check(!mamba_step(m, a, s, HI), "a reply, cut short");
        turn(m, a, s, "yes", "yes", next, 4, "its end comes before the next turn");
        check(!mamba_step(m, a, s, HI) && !mamba_step(m, a, s, END), "a reply with its end");
        turn(m, a, s, NULL, "yes", next + 1, 3, "which is not read twice");
        mamba_state_reset(m, s);
        turn(m, a, s, NULL, "hi", plain, 3, "without a system text");
    }
    mamba_state_free(s);
    mamba_acts_free(a);
    mamba_free(m);
}

int main(int argc, char **argv) {
    chat();
    threads();
    training(argc > 1 ? argv[1] : "library_threads.bin");
    printf("%d passed, %d failed, 0 skipped\n", n_passed, n_failed);
    return n_failed != 0;
}
#endif
