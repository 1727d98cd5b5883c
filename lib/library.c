// lib/library.c - mamba.c behind lib/mamba.h: the one source file of libmamba.a and libmamba.so.
//
// The names of opaque types are those of mamba.h while mamba.c is compiled, so the compiler
// compares every declaration with its definition. Structs that a program fills in are mamba.h's
// own, so that they can stay as they are while mamba.c changes; the functions that take one are
// wrapped here.

#define _GNU_SOURCE // as files/platform.h, before the first system header
#include "mamba.h"

#define MAMBA_NO_MAIN
#define Model mamba_model
#define Acts mamba_acts
#define State mamba_state
#define Trainer mamba_trainer
#define mamba_sample mamba_core_sample
#define mamba_step_batch mamba_core_step_batch
#define mamba_generate mamba_core_generate
#define mamba_random_model mamba_core_random_model
#define mamba_train_pass mamba_core_train_pass
#define mamba_train_pass_on mamba_core_train_pass_on
#define mamba_train_step mamba_core_train_step
#define mamba_checkpoint_save mamba_core_checkpoint_save
#define mamba_checkpoint_load mamba_core_checkpoint_load
#include "../mamba.c"
#undef mamba_sample
#undef mamba_step_batch
#undef mamba_generate
#undef mamba_random_model
#undef mamba_train_pass
#undef mamba_train_pass_on
#undef mamba_train_step
#undef mamba_checkpoint_save
#undef mamba_checkpoint_load

_Static_assert((int)F32 == MAMBA_F32 && (int)F16 == MAMBA_F16 && (int)BF16 == MAMBA_BF16 &&
                   (int)Q8 == MAMBA_Q8 && (int)Q4 == MAMBA_Q4,
               "types");
_Static_assert((int)FLAG_TIED == MAMBA_TIED && (int)FLAG_PROJ_BIAS == MAMBA_PROJ_BIAS &&
                   (int)FLAG_CONV_BIAS == MAMBA_CONV_BIAS &&
                   (int)FLAG_MIXER_NORM == MAMBA_MIXER_NORM,
               "flags");
_Static_assert((int)ENDED_BY_LENGTH == MAMBA_ENDED_BY_LENGTH &&
                   (int)ENDED_BY_EOS == MAMBA_ENDED_BY_EOS &&
                   (int)ENDED_BY_EMIT == MAMBA_ENDED_BY_EMIT,
               "endings");
_Static_assert((int)RUN_TEXT == MAMBA_RUN_TEXT, "the text of a run");

const char *mamba_version(void) { return MAMBA_VERSION; }

// --- models

mamba_config mamba_model_config(const mamba_model *m) {
    const Config *c = &m->config;
    mamba_config to = {.arch = c->arch,
                       .flags = c->flags,
                       .type = (int)c->type,
                       .D = c->D,
                       .n_layer = c->n_layer,
                       .V = c->V,
                       .E = c->E,
                       .N = c->N,
                       .K = c->K,
                       .R = c->R,
                       .norm_eps = c->norm_eps,
                       .mixer_eps = c->mixer_eps,
                       .bos = c->bos,
                       .pad = c->pad};
    memcpy(to.eos, c->eos, sizeof to.eos);
    return to;
}

int mamba_vocabulary(const mamba_model *m) { return m->config.V; }
size_t mamba_parameters(const mamba_model *m) { return m->n_params; }
size_t mamba_token_room(const mamba_model *m) { return m->text_room ? m->text_room : 1; }
int32_t mamba_start_token(const mamba_model *m) {
    return m->config.eos[0] >= 0 ? m->config.eos[0] : m->config.bos;
}
bool mamba_is_end(const mamba_model *m, int32_t id) { return id >= 0 && is_eos(&m->config, id); }

// --- states

const float *mamba_logits(const mamba_state *s) { return s->logits; }
uint64_t mamba_position(const mamba_state *s) { return s->position; }
void mamba_seed(mamba_state *s, uint64_t seed) { s->random = seed; }

int mamba_step_batch(const mamba_model *m, mamba_acts *a, mamba_state *const *s, const int32_t *ids,
                     int B) {
    if (B < 1 || B > BATCH_MAX) return fail("%d sequences in a step: 1 to %d", B, BATCH_MAX);
    return mamba_core_step_batch(m, a, s, ids, B);
}

// --- writing

mamba_sampling mamba_sampling_defaults(void) {
    return (mamba_sampling){.temperature = 0.8f, .top_p = 0.95f, .repeat_penalty = 1};
}

static Sampling sampling_of(const mamba_sampling *how) {
    const mamba_sampling defaults = mamba_sampling_defaults();
    if (!how) how = &defaults;
    return (Sampling){.temperature = how->temperature,
                      .top_p = how->top_p,
                      .top_k = how->top_k,
                      .min_p = how->min_p,
                      .repeat_penalty = how->repeat_penalty};
}

int32_t mamba_sample(const mamba_model *m, mamba_acts *a, mamba_state *s,
                     const mamba_sampling *how) {
    const Sampling sampling = sampling_of(how);
    return mamba_core_sample(m, a, s, &sampling);
}

mamba_writing mamba_writing_defaults(void) {
    return (mamba_writing){.sampling = mamba_sampling_defaults(), .most = 256};
}

long mamba_generate(const mamba_model *m, mamba_acts *a, mamba_state *s, mamba_writing *w) {
    Writing writing = {.sampling = sampling_of(&w->sampling),
                       .most = w->most,
                       .ignore_eos = w->ignore_eos,
                       .goes_on = w->goes_on,
                       .emit = w->emit,
                       .context = w->context};
    if (!w->emit) return fail("mamba_generate needs a function `emit` that takes the text");
    long written = mamba_core_generate(m, a, s, &writing);
    w->ended = (int)writing.ended;
    return written;
}

// --- training

mamba_config mamba_config_defaults(int D, int n_layer, int V) {
    return (mamba_config){.flags = MAMBA_TIED | MAMBA_CONV_BIAS,
                          .type = MAMBA_F32,
                          .D = D,
                          .n_layer = n_layer,
                          .V = V,
                          .E = 2 * D,
                          .N = 16,
                          .K = 4,
                          .R = (D + 15) / 16,
                          .norm_eps = 1e-5f,
                          .bos = -1,
                          .pad = -1,
                          .eos = {-1, -1, -1, -1}};
}

// 0, or -1 after fail(): value is not one of 1 to highest.
static int check_size(const char *name, int value, int highest) {
    if (value >= 1 && value <= highest) return 0;
    return fail("%s is %d, not 1 to %d", name, value, highest);
}

mamba_model *mamba_random_model(const mamba_config *from, uint64_t seed) {
    Config c = {.arch = from->arch,
                .flags = from->flags,
                .type = (Type)from->type,
                .D = from->D,
                .n_layer = from->n_layer,
                .V = from->V,
                .E = from->E,
                .N = from->N,
                .K = from->K,
                .R = from->R,
                .norm_eps = from->norm_eps,
                .mixer_eps = from->mixer_eps,
                .bos = from->bos,
                .pad = from->pad};
    memcpy(c.eos, from->eos, sizeof c.eos);
    if (check_size("D", c.D, 1 << 20) || check_size("n_layer", c.n_layer, 1 << 16) ||
        check_size("V", c.V, 1 << 26) || check_size("E", c.E, 1 << 20) ||
        check_size("N", c.N, N_MAX) || check_size("K", c.K, 1 << 12) ||
        check_size("R", c.R, 1 << 20) || check_size("type + 1", from->type + 1, N_TYPES))
        return NULL;
    return mamba_core_random_model(&c, seed);
}

mamba_adamw mamba_adamw_defaults(void) {
    return (mamba_adamw){
        .rate = 3e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .epsilon = 1e-8f, .decay = 0.1f, .clip = 1};
}

uint64_t mamba_trainer_steps(const mamba_trainer *x) { return x->step; }

double mamba_train_pass_on(mamba_trainer *x, int place, const int32_t *ids, const int32_t *targets,
                           float weight, bool backward) {
    const size_t n = (size_t)x->B * (size_t)x->L;
    if (check_ids(x->model, ids, n)) return NAN;
    for (size_t i = 0; i < n; i++)
        if (targets[i] != -1 && check_ids(x->model, targets + i, 1)) return NAN;
    return mamba_core_train_pass_on(x, place, ids, targets, weight, backward);
}
double mamba_train_pass(mamba_trainer *x, const int32_t *ids, const int32_t *targets, float weight,
                        bool backward) {
    return mamba_train_pass_on(x, -1, ids, targets, weight, backward);
}

int mamba_train_step(mamba_trainer *x, const mamba_adamw *from, double *norm) {
    const mamba_adamw defaults = mamba_adamw_defaults();
    double unused;
    if (!from) from = &defaults;
    const AdamW how = {.rate = from->rate,
                       .beta1 = from->beta1,
                       .beta2 = from->beta2,
                       .epsilon = from->epsilon,
                       .decay = from->decay,
                       .clip = from->clip};
    return mamba_core_train_step(x, &how, norm ? norm : &unused);
}

int mamba_checkpoint_save(mamba_trainer *x, const mamba_train_run *from, const char *path) {
    TrainRun run = {.random = from->random, .held_loss = from->held_loss, .seconds = from->seconds};
    memcpy(run.text, from->text, sizeof run.text);
    return mamba_core_checkpoint_save(x, &run, path);
}

int mamba_checkpoint_load(mamba_trainer *x, mamba_train_run *to, const char *path) {
    TrainRun run = {.random = to->random, .held_loss = to->held_loss, .seconds = to->seconds};
    memcpy(run.text, to->text, sizeof run.text);
    if (mamba_core_checkpoint_load(x, &run, path)) return -1;
    memcpy(to->text, run.text, sizeof to->text);
    to->random = run.random;
    to->held_loss = run.held_loss;
    to->seconds = run.seconds;
    return 0;
}
