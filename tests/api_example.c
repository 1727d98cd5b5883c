/* api_example.c - mamba.c inside another program: compile with -DMAMBA_NO_MAIN. Writes the 20
   likeliest tokens, rolls the state back, writes them again, and succeeds if both are the same. */
#include "../mamba.c"

static int write_twenty(const Model *m, Acts *a, State *s, int32_t ids[20]) {
    int n = 0;
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    unsigned char *text = malloc(m->text_room);
    for (int i = 0; i < 20 && text; i++) {
        ids[i] = mamba_sample(m, a, s, &greedy);
        if (ids[i] < 0 || mamba_step(m, a, s, ids[i])) break;
        fwrite(text, 1, mamba_decode(m, s, ids[i], text), stdout);
        n++;
    }
    printf("\n");
    free(text);
    return n == 20 ? 0 : -1;
}

int main(int argc, char **argv) {
    const char *prompt = "Once upon a time";
    Model *m = mamba_load(argc > 1 ? argv[1] : "models/tales.bin");
    Acts *a = m ? mamba_acts_new(m, 0) : NULL;
    State *s = a ? mamba_state_new(m) : NULL, *before = s ? mamba_state_new(m) : NULL;
    int32_t *prompt_ids = NULL, first[20], second[20];
    size_t n = 0;
    int bad = !before || mamba_encode(m, prompt, strlen(prompt), &prompt_ids, &n) ||
              mamba_prefill(m, a, s, prompt_ids, n, NULL, NULL);
    if (!bad) mamba_state_copy(m, before, s);
    bad = bad || write_twenty(m, a, s, first);
    if (!bad) mamba_state_copy(m, s, before);
    bad = bad || write_twenty(m, a, s, second);
    if (bad) fprintf(stderr, "%s\n", mamba_error());
    else bad = memcmp(first, second, sizeof first) != 0;
    free(prompt_ids);
    mamba_state_free(before);
    mamba_state_free(s);
    mamba_acts_free(a);
    mamba_free(m);
    printf("%d passed, %d failed, 0 skipped\n", !bad, bad);
    return bad;
}
