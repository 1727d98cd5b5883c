// cli/several_gpu.h - generate --samples and --batch on a GPU: the texts are written at places of
// the GPU, some steps at a time. Sequence i of Several is at place i.
//
// Included by cli/several.h.

enum { PLACES_USUAL = 256 }; // more of them gain little: the weights are read seldom enough
enum { STEPS_AT_ONCE = 32 }; // a text that ends makes room after so many

// As many places as there are texts, up to PLACES_USUAL and to what memory holds, and the samplers.
// 0, or -1 after fail().
static int several_open_gpu(Several *all) {
    const Model *m = all->x->model;
    const Sampling how = sampling_of(all->o);
    Acts *a = all->x->acts;
    all->slots = all->total < PLACES_USUAL ? (int)all->total : PLACES_USUAL;
    while (mamba_places(a, all->slots, 0)) {
        if (all->slots == 1) return -1;
        all->slots = (all->slots + 1) / 2;
    }
    return mamba_places_sampling(m, a, &how);
}

// The last texts are fewer than the places: half of the places is enough. 0, or -1 after fail().
static int several_shrink_gpu(Several *all) {
    const Sampling how = sampling_of(all->o);
    if (all->begun < all->total || all->running == 0 || 2 * all->running > all->slots) return 0;
    all->slots = all->running;
    if (mamba_places(all->x->acts, all->slots, all->running)) return -1;
    return mamba_places_sampling(all->x->model, all->x->acts, &how);
}

// Takes in the tokens of sequence i, which are stride apart; places: how many run. 0, or -1 after
// fail().
static int several_accept_gpu(Several *all, int i, const int32_t *ids, int steps, int stride,
                              Report *report) {
    int why = GOES_ON;
    for (int t = 0; t < steps && why == GOES_ON; t++) {
        const int32_t id = ids[(size_t)t * (size_t)stride];
        if (id < 0) return fail("a logit is not finite: run `info --verify`");
        why = several_accept(all, &all->sequence[i], id);
        if (why < 0) return -1;
        report->n_written += why != END_OF_TEXT && why != INTERRUPTED;
    }
    if (why == GOES_ON) return 0;
    if (several_end(all, i, (Ending)why)) return -1;
    return i < all->running ? mamba_place_move(all->x->acts, i, all->running) : 0;
}

// The most tokens that a running text still needs.
static int several_steps(const Several *all) {
    const int most = mamba_places_steps() < STEPS_AT_ONCE ? mamba_places_steps() : STEPS_AT_ONCE;
    long needed = 0;
    for (int i = 0; i < all->running; i++) {
        long left = all->o->n < 0 ? most : all->o->n - all->sequence[i].written;
        if (left > needed) needed = left;
    }
    return needed < most ? (int)needed : most;
}

static int several_loop_gpu(Several *all, Report *report) {
    int32_t *ids = malloc((size_t)all->slots * STEPS_AT_ONCE * sizeof *ids);
    int result = ids ? 0 : fail("out of memory: %d sequences", all->slots);
    while (result == 0) {
        result = several_fill(all, report);
        if (result || all->running == 0) break;
        result = several_shrink_gpu(all);
        const int steps = several_steps(all), slots = all->slots;
        if (result == 0) result = mamba_places_write(all->x->acts, ids, steps);
        // Iterate backwards: several_end() moves the last sequence, already seen, into slot i.
        for (int i = all->running - 1; i >= 0 && result == 0; i--)
            result = several_accept_gpu(all, i, ids + i, steps, slots, report);
    }
    free(ids);
    return result;
}
