/* mamba.h - mamba.c as a library, for C and C++: run a model, save states, train. `make lib` makes
   libmamba.a and libmamba.so; link with -lmamba -lm (and -fopenmp with libmamba.a). Where the
   loader does not find libmamba.so: -Wl,-rpath,FOLDER, or link with libmamba.a.

   Failure. A function that returns an int returns 0, or -1 where it fails. One that returns a
   pointer returns NULL where it fails. mamba_error() then says why, for the thread that called.
   Functions without a word about failure cannot fail. Free functions take NULL and do nothing.

   Threads. A model may be used by many threads at once, as long as none changes it. A mamba_acts
   and a mamba_state serve one thread at a time. Each thread makes its own.

   Memory. All pointers that come from this library are freed by the function named beside them.
   Arguments are never kept, except where a comment says so.

   Sizes. B sequences, L tokens, V ids of the vocabulary, D width, E channels, N states of a
   channel, K taps of the convolution. Token ids are 0 to V - 1. Texts are UTF-8 (of a model whose
   tokens are bytes: any bytes), with a length in bytes and without a NUL at the end. Losses are in
   nats. Numbers are float32. */
#ifndef MAMBA_H
#define MAMBA_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#define MAMBA_API __attribute__((visibility("default")))
#else
#define MAMBA_API
#endif

typedef struct mamba_model mamba_model;     /* weights, config, tokenizer */
typedef struct mamba_acts mamba_acts;       /* scratch memory and the threads of a run */
typedef struct mamba_state mamba_state;     /* what one sequence remembers; of fixed size */
typedef struct mamba_trainer mamba_trainer; /* gradient, optimizer and memory of a training */

/* "0.1" */
MAMBA_API const char *mamba_version(void);

/* Why the last call of this thread that failed did so: one sentence, UTF-8, without a newline. Not
   to be freed; it changes with the next failure. */
MAMBA_API const char *mamba_error(void);

/* ---- models */

enum { MAMBA_F32, MAMBA_F16, MAMBA_BF16, MAMBA_Q8, MAMBA_Q4 }; /* how matrices are stored */
enum { MAMBA_TIED = 1, MAMBA_PROJ_BIAS = 2, MAMBA_CONV_BIAS = 4, MAMBA_MIXER_NORM = 8 };

typedef struct mamba_config {
    int arch;        /* 0 Mamba, 1 FalconMamba */
    int flags;       /* MAMBA_TIED: the head is the embedding; biases; FalconMamba's norms */
    int type;        /* MAMBA_F32 ...; of mamba_random_model: MAMBA_F32 to train */
    int D, n_layer;  /* width of the residual stream, layers */
    int V, E, N, K;  /* ids, channels, states of a channel (at most 1024), taps */
    int R;           /* rank of the step size's projection, often D / 16 */
    float norm_eps;  /* of RMSNorm, 1e-5 */
    float mixer_eps; /* of FalconMamba's norms */
    int bos, pad;    /* token ids; -1: none */
    int eos[4];      /* ids that end a text; -1: none */
} mamba_config;

/* The model in the file path (model.bin, of export.py, mamba_save or `mamba train`). Weights of
   large models are read as they are needed: the file must stay as it is while the model lives.
   Freed by mamba_free. */
MAMBA_API mamba_model *mamba_load(const char *path);

/* The same from memory (bytes) that holds a whole model.bin and outlives the model. It begins at a
   multiple of 4 bytes, better of 64. */
MAMBA_API mamba_model *mamba_load_memory(const void *memory, size_t bytes);

/* After the Acts, states and trainers of this model are freed. */
MAMBA_API void mamba_free(mamba_model *m);

/* Sizes and token ids. */
MAMBA_API mamba_config mamba_model_config(const mamba_model *m);
MAMBA_API int mamba_vocabulary(const mamba_model *m);      /* V */
MAMBA_API size_t mamba_parameters(const mamba_model *m);   /* weights */
MAMBA_API size_t mamba_token_room(const mamba_model *m);   /* most bytes of mamba_decode, >= 1 */
MAMBA_API int32_t mamba_start_token(const mamba_model *m); /* before an empty text; -1: none */
MAMBA_API bool mamba_is_end(const mamba_model *m, int32_t id); /* whether id ends a text */

/* Whether every weight is finite and every byte fits the checksums of the file. Reads all. */
MAMBA_API int mamba_verify(const mamba_model *m);

/* Writes model.bin: whole, or not at all, and then an older file stays. Fails without a tokenizer
   and where the disk does. */
MAMBA_API int mamba_save(const mamba_model *m, const char *path);

/* Copies in memory, freed by mamba_free: in 8.5 or 4.5 bits a weight (of a model that is not
   quantized and has finite weights), or in float32, to train. They fail for want of memory. */
MAMBA_API mamba_model *mamba_quantize(const mamba_model *m, bool four_bits);
MAMBA_API mamba_model *mamba_float_copy(const mamba_model *m);

/* ---- text and tokens */

/* Token ids of a text, (*n), freed by mamba_release. Fails where the text is not UTF-8 and where
   the model has no tokenizer. A text of 0 bytes has 0 tokens. */
MAMBA_API int mamba_encode(const mamba_model *m, const char *text, size_t bytes, int32_t **ids,
                           size_t *n);
MAMBA_API void mamba_release(void *ids);

/* The text that token id adds to what s has decoded: whole characters. Bytes of a character that is
   not finished wait in s; bytes that cannot become one turn into U+FFFD. id -1: the end, what still
   waits. out has room for mamba_token_room(m) bytes. Returns how many it got, maybe 0; no NUL. */
MAMBA_API size_t mamba_decode(const mamba_model *m, mamba_state *s, int32_t id, unsigned char *out);

/* ---- chat, of a model with a chat template: what it puts around the texts of a conversation */

/* The token that ends a reply: stop writing there, whether it is read or not. -1: fails, the model
   has no template. */
MAMBA_API int32_t mamba_chat_end(const mamba_model *m);

/* Token ids of what a user says next, (*n), freed by mamba_release: read them by mamba_prefill, and
   write the reply. s: what has read the conversation so far, replies included. Where it has read
   nothing the conversation opens, with the text system (a NUL at its end; NULL: none), which later
   turns do not look at. text (bytes) is never parsed for special tokens. Fails as mamba_encode and
   where the model has no template, or none with a system text. */
MAMBA_API int mamba_chat_turn(const mamba_model *m, const mamba_state *s, const char *system,
                              const char *text, size_t bytes, int32_t **ids, size_t *n);

/* ---- running */

/* Scratch memory for one pass at a time over one model, about 10 to 150 MB. threads 0: the default,
   as many as mamba_default_threads(). No result depends on the number of threads. */
MAMBA_API mamba_acts *mamba_acts_new(const mamba_model *m, int threads);
MAMBA_API void mamba_acts_free(mamba_acts *a);
MAMBA_API int mamba_default_threads(void);

/* Called for each position of a prompt in its order: logits (V) after that token. */
typedef void mamba_logits_visitor(void *context, const float *logits);

/* Reads ids (n), any number, in memory that does not grow with it. Afterwards the state has the
   logits after the last one. visit may be NULL. Fails, with the state untouched, where an id is not
   below V. n 0 reads nothing. */
MAMBA_API int mamba_prefill(const mamba_model *m, mamba_acts *a, mamba_state *s, const int32_t *ids,
                            size_t n, mamba_logits_visitor *visit, void *context);

/* Reads one token; or ids[b] into s[b], B different states, 1 to 32, for the price of hardly more
   than one. Fails as mamba_prefill. */
MAMBA_API int mamba_step(const mamba_model *m, mamba_acts *a, mamba_state *s, int32_t id);
MAMBA_API int mamba_step_batch(const mamba_model *m, mamba_acts *a, mamba_state *const *s,
                               const int32_t *ids, int B);

/* ---- states */

/* The start of a text: nothing is read. Freed by mamba_state_free. Fails for want of memory. */
MAMBA_API mamba_state *mamba_state_new(const mamba_model *m);
MAMBA_API void mamba_state_free(mamba_state *s);
MAMBA_API void mamba_state_reset(const mamba_model *m, mamba_state *s); /* the generator goes on */
MAMBA_API void mamba_state_copy(const mamba_model *m, mamba_state *to, const mamba_state *from);
MAMBA_API const float *mamba_logits(const mamba_state *s); /* (V) after the last token; s owns it */
MAMBA_API uint64_t mamba_position(const mamba_state *s);   /* tokens read */
MAMBA_API void mamba_seed(mamba_state *s, uint64_t seed);  /* of the tokens drawn from now on */

/* A file with all that the sequence remembers, and the generator. mamba_state_load fails for a
   state of another model and for a damaged file, with s untouched. */
MAMBA_API int mamba_state_save(const mamba_model *m, const mamba_state *s, const char *path);
MAMBA_API int mamba_state_load(const mamba_model *m, mamba_state *s, const char *path);
/* The same in memory of mamba_state_bytes(m). */
MAMBA_API size_t mamba_state_bytes(const mamba_model *m);
MAMBA_API int mamba_state_write(const mamba_model *m, const mamba_state *s, unsigned char *to);
MAMBA_API int mamba_state_read(const mamba_model *m, mamba_state *s, const unsigned char *from,
                               size_t bytes);

/* ---- writing */

typedef struct mamba_sampling {
    float temperature;    /* 0: always the likeliest token */
    float top_p;          /* keep the likeliest that together reach this probability; 1: all */
    int top_k;            /* keep this many; 0: all */
    float min_p;          /* drop what is less likely than this times the likeliest; 0: none */
    float repeat_penalty; /* of the last 64 tokens; 1: none */
} mamba_sampling;

/* Those of the command line: temperature 0.8, top_p 0.95, nothing else. */
MAMBA_API mamba_sampling mamba_sampling_defaults(void);

/* The next token, drawn from the state's logits; it is not read yet. how NULL: the defaults. -1:
   nothing was read so far, or a logit is not finite. */
MAMBA_API int32_t mamba_sample(const mamba_model *m, mamba_acts *a, mamba_state *s,
                               const mamba_sampling *how);

/* The text (n bytes, maybe none) that token id adds; id -1: the rest, at the end. Returns true to
   stop. */
typedef bool mamba_emitter(void *context, int32_t id, const unsigned char *text, size_t n);
enum { MAMBA_ENDED_BY_LENGTH, MAMBA_ENDED_BY_EOS, MAMBA_ENDED_BY_EMIT };

typedef struct mamba_writing {
    mamba_sampling sampling;
    long most;           /* tokens; -1: no limit */
    bool ignore_eos;     /* write on after a token that ends a text */
    bool goes_on;        /* the state is used afterwards: an unfinished character stays in it */
    mamba_emitter *emit; /* required */
    void *context;       /* of emit */
    int ended;           /* set: MAMBA_ENDED_BY_ ... */
} mamba_writing;

/* mamba_sampling_defaults(), 256 tokens, everything else 0: set emit. */
MAMBA_API mamba_writing mamba_writing_defaults(void);

/* Writes on after what s has read: draws a token, emits its text, reads it, and again. Returns how
   many tokens were written, or -1. */
MAMBA_API long mamba_generate(const mamba_model *m, mamba_acts *a, mamba_state *s,
                              mamba_writing *w);

/* ---- scoring */

/* -log of the probability that logits (V) give to id, in nats. NaN where they are not finite. */
MAMBA_API double mamba_nll(const mamba_model *m, const float *logits, int32_t id);

/* Reads ids (n) as mamba_prefill does. *nll: the sum of -log p in nats of all but the first, each
   given everything before it. Fails as mamba_prefill. */
MAMBA_API int mamba_evaluate(const mamba_model *m, mamba_acts *a, mamba_state *s,
                             const int32_t *ids, size_t n, double *nll);

/* ---- training */

/* A shape to train: E = 2 D, N = 16, K = 4, R = D / 16 rounded up, tied head, float32, no ids. */
MAMBA_API mamba_config mamba_config_defaults(int D, int n_layer, int V);

/* A model in memory with random weights, ready to train, without a tokenizer. Freed by mamba_free.
   Fails for sizes out of range and for want of memory. */
MAMBA_API mamba_model *mamba_random_model(const mamba_config *config, uint64_t seed);

/* Gives it a tokenizer: a copy of blob (bytes), as export.py writes it; NULL: a token is a byte.
   Fails for a damaged blob, and where it has more ids than the model. */
MAMBA_API int mamba_set_tokenizer(mamba_model *m, const unsigned char *blob, size_t bytes);

typedef struct mamba_adamw {
    float rate, beta1, beta2, epsilon;
    float decay; /* of matrices, not of biases and norms */
    float clip;  /* largest norm of the gradient of all weights together; 0: none */
} mamba_adamw;

/* Those of `mamba train`: rate 3e-3, 0.9, 0.95, 1e-8, decay 0.1, clip 1. */
MAMBA_API mamba_adamw mamba_adamw_defaults(void);

/* Trains m (float32, in memory) in place, with passes of B sequences of L tokens; m outlives it.
   Memory: three times the weights, and mamba_trainer_bytes. chunk: so many tokens of each sequence
   are in memory at a time, with the same gradient up to rounding; 0: all. mamba_trainer_chunk gives
   the largest with which mamba_trainer_bytes is at most so many. threads as in mamba_acts_new. */
MAMBA_API mamba_trainer *mamba_trainer_new(mamba_model *m, int B, int L, int chunk, int threads);
MAMBA_API void mamba_trainer_free(mamba_trainer *x);                /* before its model */
MAMBA_API int mamba_trainer_resize(mamba_trainer *x, int B, int L); /* of the passes from now on */
MAMBA_API size_t mamba_trainer_bytes(mamba_model *m, int B, int L, int chunk);
MAMBA_API int mamba_trainer_chunk(mamba_model *m, int B, int L, double bytes);
MAMBA_API uint64_t mamba_trainer_steps(const mamba_trainer *x); /* taken */

/* Adds to the gradient that of weight times the sum of -log p(targets). ids and targets are (B,L),
   below V; a target of -1 does not count. Each row starts from an empty state. Returns the sum of
   the losses in nats, without weight, or NaN where an id is out of range. A mean loss takes
   1 / (B L) as weight, and several passes before a step are one large batch. backward false: the
   loss alone. */
MAMBA_API double mamba_train_pass(mamba_trainer *x, const int32_t *ids, const int32_t *targets,
                                  float weight, bool backward);

/* For a text that never ends: the trainer keeps the states of B sequences at each of so many places
   (0: none; 0 at first), all empty now. A pass on a place goes on from the states there and leaves
   those at its end; the gradient is cut off at its start. place -1: as mamba_train_pass. A resize
   to another B forgets the places. They fail for want of memory and for a place that is not there.
 */
MAMBA_API int mamba_trainer_carry(mamba_trainer *x, int places);
MAMBA_API double mamba_train_pass_on(mamba_trainer *x, int place, const int32_t *ids,
                                     const int32_t *targets, float weight, bool backward);

/* One step of AdamW against the gradient, which is cleared. *norm gets its length before clipping.
   norm may be NULL. Fails, with the weights untouched, where the gradient is not finite. how NULL:
   the defaults. */
MAMBA_API int mamba_train_step(mamba_trainer *x, const mamba_adamw *how, double *norm);

enum { MAMBA_RUN_TEXT = 768 };
typedef struct mamba_train_run {
    char text[MAMBA_RUN_TEXT]; /* yours: tells runs apart; a checkpoint of another is refused */
    uint64_t random;           /* yours: state of the generator that draws the batches */
    double held_loss;          /* yours: the last loss on text that is not trained on; NAN: none */
    double seconds;            /* yours: spent in training */
} mamba_train_run;

/* All that a training needs to go on bit for bit: weights, moments, step, and run. Load fails, with
   the trainer untouched, for another shape, another run->text and a damaged file. */
MAMBA_API int mamba_checkpoint_save(mamba_trainer *x, const mamba_train_run *run, const char *path);
MAMBA_API int mamba_checkpoint_load(mamba_trainer *x, mamba_train_run *run, const char *path);

#ifdef __cplusplus
}
#endif
#endif
