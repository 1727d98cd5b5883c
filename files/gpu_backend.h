// files/gpu_backend.h: all that mamba.c knows of a GPU. It is part of section 1 of mamba.c, the
// part that mamba_cuda.cu includes too.

#include "ranks.h"

// What a GPU backend offers; mamba_cuda.cu has the only one, and says there what each function
// does. -1 or NULL: error() knows why.
typedef struct Gpu Gpu;
typedef struct GpuTrainer GpuTrainer;
typedef enum { TEXTS_SCORED, TEXTS_STEPPED, TEXTS_PROMPTS } TextsUse;
typedef struct {                  // B texts of L tokens, side by side, each from its start
    const int32_t *ids, *targets; // (B,L); target -1: no score
    int B, L, first;              // only from token `first` of each on there are targets
    bool steps;                   // token by token
    float *losses;                // (B,L) -log p(target); anything where there is none
    int32_t *likeliest;           // (B,L) the id of the highest logit; the same
} ScoreRun;
typedef struct GpuBackend {
    // The model on the GPU, and the state of the sequence that it reads and writes.
    const char *(*error)(void);
    Gpu *(*open)(const Model *m, int float32);
    void (*close)(Gpu *g);
    int (*set_state)(Gpu *g, int place, const float *window, const float *h, const float *logits);
    int (*get_state)(Gpu *g, int place, float *window, float *h, float *logits);
    int (*prefill)(Gpu *g, const int32_t *ids, size_t n, void (*visit)(void *, const float *),
                   void *context);

    // Steps of S sequences that begin and end together.
    int (*gather)(Gpu *g, int s, int S);
    int (*generate_start)(Gpu *g, int S, const Sampling *how, const uint64_t *random,
                          uint64_t position, const int32_t *recent, int n_recent,
                          const unsigned char *allowed);
    int (*generate)(Gpu *g, int32_t *ids, int steps);
    int generate_max; // steps of one call

    // Places: texts begin, end and move on their own.
    int (*places)(Gpu *g, int S, int keep);
    int (*place_begin)(Gpu *g, int place, int prompt, uint64_t random, uint64_t position,
                       const int32_t *recent, int n_recent);
    int (*place_move)(Gpu *g, int to, int from);
    int (*places_sampling)(Gpu *g, const Sampling *how, const unsigned char *allowed);
    int (*places_generate)(Gpu *g, int32_t *ids, int steps);
    int (*step)(Gpu *g, const int32_t *ids, int S);

    // Many texts from their start.
    int (*texts)(Gpu *g, int S, int L, TextsUse use);
    int (*score)(Gpu *g, const ScoreRun *run);
    int (*read_prompts)(Gpu *g, const int32_t *ids, const int32_t *lengths, int B, int L);

    // Training.
    GpuTrainer *(*trainer_open)(const Model *m, int B, int L, int chunk, int float32);
    void (*trainer_close)(GpuTrainer *x);
    int (*trainer_resize)(GpuTrainer *x, int B, int L);
    int (*trainer_set)(GpuTrainer *x, const float *weights, const float *moment,
                       const float *moment2);
    int (*trainer_get)(GpuTrainer *x, float *weights, float *moment, float *moment2,
                       float *gradient);
    int (*trainer_chunk)(const Model *m, int B, int L, int float32);
    int (*trainer_carry)(GpuTrainer *x, int places);
    int (*trainer_states)(GpuTrainer *x, float *states, int store);
    int (*train_pass)(GpuTrainer *x, int place, const int32_t *ids, const int32_t *targets,
                      float weight, int backward, double *sum);
    int (*train_step)(GpuTrainer *x, const AdamW *how, uint64_t step, double *norm);
    int (*ranks)(Ranks *r); // NULL: a build without NCCL

    // For bench and for the tests.
    int (*measure)(double *copy_bytes, double *flops, double *used_bytes, char name[256]);
    int (*time_scan)(int B, int E, int L, int N, int float32, int repeats, double seconds[4]);
    const char *(*step_form)(const Gpu *g);
    int (*pretend)(const char *what, int value);
} GpuBackend;
