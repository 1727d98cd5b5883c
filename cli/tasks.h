// cli/tasks.h - [train] the paper's synthetic tasks, induction and copying. Sequences are made
// afresh for every step of training and every sequence of eval --task.
//
// Depends on random_u64 alone.

typedef enum { TASK_NONE, TASK_INDUCTION, TASK_COPYING } Task;
enum { TASK_VOCAB = 16, COPY_TOKENS = 16 };

// name NULL: no task. 0, or -1 after fail().
static int parse_task(const char *name, Task *task) {
    *task = TASK_NONE;
    if (!name) return 0;
    if (!strcmp(name, "induction")) *task = TASK_INDUCTION;
    if (!strcmp(name, "copying")) *task = TASK_COPYING;
    return *task ? 0 : fail("--task needs induction or copying, not '%s'", name);
}

static int task_shortest(Task task) { return task == TASK_COPYING ? 2 * COPY_TOKENS : 4; }

// Ids 0..14 at random. The special id 15 stands once at a random place and again at the very end;
// wanted is the token that followed it the first time.
static void induction_sequence(int32_t *ids, int32_t *targets, size_t L, uint64_t *random) {
    const int32_t special = TASK_VOCAB - 1;
    for (size_t t = 0; t < L; t++) ids[t] = (int32_t)(random_u64(random) % (TASK_VOCAB - 1));
    size_t place = random_u64(random) % (L - 2);
    ids[place] = special;
    ids[L - 1] = special;
    targets[L - 1] = ids[place + 1];
}

// Noise is id 0. 16 data tokens of ids 1..14 stand at random places before the last 16, in their
// order. The last 16 places hold the marker 15; wanted at the i-th marker is the i-th data token.
static void copying_sequence(int32_t *ids, int32_t *targets, size_t L, uint64_t *random) {
    size_t body = L - COPY_TOKENS, left = COPY_TOKENS;
    for (size_t t = 0; t < body; t++) {
        // With probability left / places left a token stands here: all sets of places are equally
        // likely.
        bool data = random_u64(random) % (body - t) < left;
        ids[t] = data ? 1 + (int32_t)(random_u64(random) % (TASK_VOCAB - 2)) : 0;
        if (data) {
            targets[L - left] = ids[t];
            left--;
        }
    }
    for (size_t t = body; t < L; t++) ids[t] = TASK_VOCAB - 1;
}

// One sequence ids (L) and its targets (L): -1 where nothing is wanted. The paper leaves the layout
// open; here L counts all of it.
static void task_sequence(Task task, int32_t *ids, int32_t *targets, size_t L, uint64_t *random) {
    for (size_t t = 0; t < L; t++) targets[t] = -1;
    if (task == TASK_INDUCTION) induction_sequence(ids, targets, L, random);
    else copying_sequence(ids, targets, L, random);
}
