/* mamba_web.c - mamba.c in WebAssembly, for web/worker.js. `make web` compiles it with emscripten.

   The worker keeps the texts and says what to do; here are its verbs. A pointer is a number to
   JavaScript, a place in the module's memory. A function that can fail returns 0 or -1, and
   web_error() says why. There is one model at a time, and one thread. */
#define MAMBA_NO_MAIN
#include "../mamba.c"

#define EXPORT(name) __attribute__((export_name(#name))) name

static Model *model;
static Acts *acts;
static unsigned char *model_bytes; // the model.bin that model lies in
static unsigned char *text;        // (text_room) what web_decode() wrote

const char *EXPORT(web_error)(void) { return mamba_error(); }
void *EXPORT(web_alloc)(size_t bytes) { return alloc_aligned(bytes); }
void EXPORT(web_free)(void *p) { free_aligned(p); }
void EXPORT(web_release)(void *p) { mamba_release(p); }

void EXPORT(web_close)(void) {
    mamba_acts_free(acts);
    mamba_free(model);
    free_aligned(model_bytes);
    free(text);
    acts = NULL;
    model = NULL;
    model_bytes = text = NULL;
}

// The model.bin at file, from web_alloc(), becomes the model; its memory is this program's then.
// The states of the model before must be freed already.
int EXPORT(web_open)(unsigned char *file, size_t bytes) {
    web_close();
    model_bytes = file;
    model = mamba_load_memory(file, bytes);
    if (model) acts = mamba_acts_new(model, 1);
    if (acts) text = malloc(model->text_room + 1);
    if (text) return 0;
    if (acts) fail("out of memory: a token's text");
    web_close();
    return -1;
}

// Numbers about the model, in the order that worker.js names them.
double EXPORT(web_number)(int which) {
    const Config *c = &model->config;
    const double number[] = {c->n_layer,
                             c->D,
                             c->E,
                             c->N,
                             c->K,
                             c->R,
                             c->V,
                             (double)model->n_params,
                             c->type,
                             (double)mamba_state_bytes(model),
                             c->eos[0] >= 0 ? c->eos[0] : c->bos};
    return which < (int)(sizeof number / sizeof *number) ? number[which] : -1;
}

// --- states

State *EXPORT(web_state_new)(void) { return mamba_state_new(model); }
void EXPORT(web_state_free)(State *s) { mamba_state_free(s); }
void EXPORT(web_state_copy)(State *to, const State *from) { mamba_state_copy(model, to, from); }
void EXPORT(web_state_seed)(State *s, uint32_t seed) { s->random = seed; }
double EXPORT(web_state_position)(const State *s) { return (double)s->position; }
int EXPORT(web_state_write)(const State *s, unsigned char *to) {
    return mamba_state_write(model, s, to);
}
int EXPORT(web_state_read)(State *s, const unsigned char *file, size_t bytes) {
    return mamba_state_read(model, s, file, bytes);
}

// --- texts

// The ids of a text; *n is their number. NULL: web_error() says why. Freed by web_release().
int32_t *EXPORT(web_encode)(const char *bytes, size_t length, size_t *n) {
    int32_t *ids = NULL;
    return mamba_encode(model, bytes, length, &ids, n) ? NULL : ids;
}

// What id adds to the text that s has written: so many bytes at web_text(). id -1: the rest.
size_t EXPORT(web_decode)(State *s, int32_t id) { return mamba_decode(model, s, id, text); }
const unsigned char *EXPORT(web_text)(void) { return text; }

int EXPORT(web_is_end)(int32_t id) { return is_eos(&model->config, id); }

// The next token, or -1: web_error() says why.
int32_t EXPORT(web_sample)(State *s, float temperature, float top_p, int top_k, float min_p,
                           float repeat_penalty) {
    const Sampling how = {temperature, top_p, top_k, min_p, repeat_penalty};
    return mamba_sample(model, acts, s, &how);
}

// --- reading, watched

typedef struct {
    float *means;  // (n_layer + 1,n) of delta: of all layers, then of each
    int n, at;     // tokens of all, tokens read before this piece
    float *record; // (n,RECORD + 4N) of one channel, see web_channel(); NULL: not wanted
    float *deltas; // (E) of the last token and the layer
    int layer, channel;
} Watch;

// Added up as --show-selection does it.
static void watch_means(Watch *w, int layer, const Scan *s) {
    for (int t = 0; t < s->L; t++) {
        double sum = 0;
        for (int e = 0; e < s->E; e++) sum += (double)s->delta[(size_t)t * s->E + e];
        w->means[w->at + t] += (float)(sum / s->E / model->config.n_layer);
        w->means[(layer + 1) * w->n + w->at + t] = (float)(sum / s->E);
    }
}

enum { RECORD = 4 }; // delta, u, y and the state's share of y

// The recurrence of one channel, written down at every token.
static void watch_channel(Watch *w, const LayerState *seq, const Scan *s) {
    const int E = s->E, N = s->N, e = w->channel;
    float h[N_MAX];
    for (int n = 0; n < N; n++) h[n] = seq->h[(size_t)n * E + e];
    for (int t = 0; t < s->L; t++) {
        float *to = w->record + (size_t)(w->at + t) * (RECORD + 4 * N);
        float *before = to + RECORD, *decay = before + N, *inject = decay + N, *after = inject + N,
              sum = 0;
        const float *B = s->B_ssm + t * s->ld_bc, *C = s->C_ssm + t * s->ld_bc;
        const float delta = s->delta[(size_t)t * E + e], u = s->u[(size_t)t * E + e];
        for (int n = 0; n < N; n++) {
            before[n] = h[n];
            decay[n] = expf(delta * s->A_neg[(size_t)n * E + e]);
            inject[n] = delta * B[n] * u;
            after[n] = h[n] = decay[n] * h[n] + inject[n];
            sum += C[n] * h[n];
        }
        to[0] = delta;
        to[1] = u;
        to[2] = sum + s->D_skip[e] * u;
        to[3] = sum;
    }
    memcpy(w->deltas, s->delta + (size_t)(s->L - 1) * E, (size_t)E * sizeof(float));
}

static void watch_layer(void *context, int layer, const LayerState *seq, const Scan *s) {
    Watch *w = context;
    if (w->means) watch_means(w, layer, s);
    if (w->record && layer == w->layer) watch_channel(w, seq, s);
    if (layer == model->config.n_layer - 1) w->at += s->L;
}

static int read_watched(State *s, const int32_t *ids, int n, Watch *w) {
    mamba_watch(acts, watch_layer, w);
    int result = n == 1 ? mamba_step(model, acts, s, *ids)
                        : mamba_prefill(model, acts, s, ids, (size_t)n, NULL, NULL);
    mamba_watch(acts, NULL, NULL);
    return result;
}

// Reads n tokens. means (n_layer + 1,n): the mean of delta over the channels, of all layers and of
// each.
int EXPORT(web_read)(State *s, const int32_t *ids, int n, float *means) {
    memset(means, 0, (size_t)(model->config.n_layer + 1) * (size_t)n * sizeof *means);
    return read_watched(s, ids, n, &(Watch){.means = means, .n = n});
}

// Reads n tokens, and records of one channel of a layer, for each token: delta, u, y, the part of
// y that comes from the state, then (N) numbers each of h before the token, decay, inject and h
// after it. deltas (E): those of all channels at the last token.
int EXPORT(web_channel)(State *s, const int32_t *ids, int n, int layer, int channel, float *record,
                        float *deltas) {
    Watch w = {.record = record, .n = n, .deltas = deltas, .layer = layer, .channel = channel};
    return read_watched(s, ids, n, &w);
}

// The likeliest next token.
int32_t EXPORT(web_likeliest)(const State *s) {
    int32_t best = 0;
    for (int v = 1; v < model->config.V; v++)
        if (s->logits[v] > s->logits[best]) best = v;
    return best;
}
