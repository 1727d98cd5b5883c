// cli/prompts_gpu.h - generate --batch on a GPU: prompts are read side by side, as many as there
// are places for their texts.
//
// Included by cli/several.h.

// Reads the prompt of the next text, and with it those of the texts after it that have places.
// Alone, in any length, it goes to the session's state. 0, or -1 after fail().
static int several_read_gpu(Several *all, Report *report) {
    Acts *a = all->x->acts;
    const size_t first = all->begun / all->samples;
    if (first < all->first_ahead + all->n_ahead) return 0;
    size_t n[PROMPTS_AHEAD], L = 0, tokens = 0;
    const int32_t *ids[PROMPTS_AHEAD];
    size_t most = ((size_t)(all->slots - all->running) + all->samples - 1) / all->samples;
    if (most > PROMPTS_AHEAD) most = PROMPTS_AHEAD;
    if (most > all->n_prompts - first) most = all->n_prompts - first;
    if (all->start->position) most = 1; // from a loaded state
    for (size_t b = 0; b < most; b++) {
        n[b] = all->prompt[first + b].n;
        ids[b] = all->prompt[first + b].ids;
    }
    all->first_ahead = first;
    all->n_ahead = 0;
    const size_t B = most > 1 ? mamba_texts_fit(a, n, most, &L, TEXTS_PROMPTS) : 1;
    if (B == 1) return several_read(all, &all->prompt[first], report);
    for (size_t b = 0; b < B; b++) {
        if (!all->ahead[b]) all->ahead[b] = mamba_state_of_text();
        if (!all->ahead[b]) return -1;
        tokens += n[b];
    }
    const double start = seconds();
    if (mamba_prompts_read(a, all->ahead, ids, n, (int)B)) return -1;
    report->n_read += tokens;
    report->read_seconds += seconds() - start;
    all->n_ahead = B;
    return 0;
}

// The text of q, whose prompt is read, begins at the last place. 0, or -1 after fail().
static int several_place_gpu(Several *all, Sequence *q, uint64_t seed) {
    Acts *a = all->x->acts;
    const size_t ahead = all->begun / all->samples - all->first_ahead;
    const int place = all->running - 1;
    const bool alone = ahead >= all->n_ahead;
    State *s = alone ? all->x->state : all->ahead[ahead];
    if (alone ? mamba_place_begin(a, place, s, seed)
              : mamba_place_begin_prompt(a, place, (int)ahead, s, seed))
        return -1;
    q->state->pending = s->pending;
    return 0;
}
