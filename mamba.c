// clang-format off
/* mamba.c - Mamba, the selective state-space language model, in one C file.

   A language model reads tokens and says how likely each token of the vocabulary is to come next.
   Mamba (Gu & Dao 2023, arXiv 2312.00752) does it with a stack of identical layers. Each layer is
   built around a state-space model (SSM): it keeps a state of fixed size, h, and changes it at
   every token. What it keeps and what it takes in depends on the token: the model selects. This
   file reads a trained model, reads a prompt, writes text, and trains a model. One layer, over T
   tokens:

     res (T,D) ----------------------------------------------------------------.
      |                                                                        |
     norm                                                                      |
      | xn (T,D)                                                               |
     in_proj                                                                   |
      |                                                                        |
      |-- x (T,E) -- conv1d -- SiLU -- u (T,E) --.--------.                    |
      |                                          |        |                    |
      |                                        x_proj     |                    |
      |                       .-----------.------.        |                    |
      |                    dt_low (R)  B_ssm (N) |        |                    |
      |                       |           |   C_ssm (N)   |                    |
      |                    dt_proj        |      |        |                    |
      |                    + dt_bias      |      |        |                    |
      |                    softplus       |      |        |                    |
      |                       | delta (E) |      |        |                    |
      |                       '---------- scan, state h (N,E) ---- y (T,E)     |
      |                                   A_log, D_skip           |            |
      |                                                       |                |
      '-- z (T,E) -- SiLU ----------------------------------- * -- g (T,E)     |
                                                                    |          |
                                                                 out_proj ---- + -- res of the
                                                                                    next layer

   Before the first layer, an embedding turns ids into res. After the last one, a norm and the head
   turn res into logits. The same code reads a prompt (one sequence of many tokens), takes a step
   (one token of one or more sequences) and trains (several sequences of many tokens).

   What this file is not: a framework. There is one model, one pass over it in each direction, and
   no graph.

   GLOSSARY. A single capital letter is a size; next to it stands its index. Arrays are row-major,
   with the shape in parentheses. Whatever the weights are stored as, the model computes in float32.
   Some long sums are double: losses, the gradient's norm, the sampler's.
     B  sequences of a pass           index b      D  d_model, width of the residual stream     d
     L  tokens of a sequence                t      E  d_inner, channels of the SSM              e
     T  rows of a pass, B * L               t      N  d_state, states of a channel              n
     V  vocabulary, rows of the embedding   v      K  d_conv, taps of the convolution           k
     O, I  outputs and inputs of a matrix o, i     n_layer  layers, index `layer`
     R  dt_rank: delta comes from two thin matrices, (R,E) and then (E,R), see section 3
     P  = R + 2 N, the width of x_proj's output
     ld_x  distance between rows of x, where they are not side by side
     res (T,D)     residual stream                 xn (T,D)  res after the norm
     xz (T,2E)     in_proj's output [x | z]        u (T,E)   silu(conv(x)), the scan's input
     xdb (T,P)     x_proj's output [dt_low (R) | B_ssm (N) | C_ssm (N)]
     delta (T,E)   softplus(dt_proj(dt_low) + dt_bias): the step size. Large: the token enters the
                   state and the past fades. Near 0: the state stays as it is
     A_log (E,N)   as stored;  A_neg (N,E) = -exp(A_log)
     decay         exp(delta A_neg), the paper's A-bar: what the state keeps
     inject        delta B_ssm u, the paper's B-bar x: what the token adds
     h (N,E)       the SSM state; nothing else is called h. Channels are the inner index, in memory
                   and in saved states: channels side by side fill a vector register
     window (K-1,E)  the convolution's last inputs: x of the K-1 tokens before
     y (T,E)       sum over n of C_ssm h, plus D_skip u        g (T,E)  y silu(z)
     d_x           the gradient of the loss with respect to x. Gradients of weights are added to
                   (+=). Those of activations are set (=), except d_res and d_u, which have two
                   sources
   Structs have short names where they are used: m is a Model, c its Config, p the tensors of a
   Layer; w one Tensor, the Work of a pass, or a Writing; a the Acts (all memory of a pass); s a
   State, or a Scan where the scan is called; k a ScanTask; seq the LayerStates of the sequences;
   tr a Trainer; d what a backward pass writes. In an equation the letters are those of the comment
   above it.
   f32(w) is the data of a float32 tensor, NULL where the model does not have it. fail("...") keeps
   a sentence for mamba_error() and returns -1. An arena is one allocation that holds many arrays.
   COLD ... COLD_END: little time is spent there, so it is compiled at -O1, for a short build.

   CONTENTS (at a first reading, skip what is marked *)
     1  Types: the config, the list of tensors, the model
     2  Plain operations, each with its backward pass: norms, matmul, loss, conv1d, gate
     3  The scan: recurrence, its backward step *, parallel form *, the whole backward pass *
     4  The model: one layer (block), all layers (forward), where it runs *, prefill and step
     5  Learning *: initial weights, loss and backward pass, AdamW
     6  Writing: sampling a token, the loop that writes text
     7  Commands and main
   Where the rest is: cpu/ fast forms of sections 2 and 3 *; files/ reading and writing files *;
   cli/ the commands *; tokenizer.c text to ids and back; mamba_cuda.cu and cuda/ the GPU backend.

   THREADS. A team of threads runs a pass. Every thread calls every operation (but those that say
   "by one thread"), and `omp for` shares the loop among them. A thread owns elements of the output,
   and every sum has one fixed order. So the bits do not depend on the number of threads.

   API. Another program includes this file with MAMBA_NO_MAIN defined, as tests/api_example.c does.
   A function that can fail returns NULL, -1 or NaN and leaves a sentence in mamba_error().
     models     mamba_load  mamba_load_memory  mamba_save  mamba_free  mamba_verify
                mamba_set_tokenizer  mamba_random_model  mamba_float_copy  mamba_quantize
     texts      mamba_encode  mamba_encode_pieces  mamba_prompt_bos  mamba_decode
     chat       mamba_chat  mamba_chat_encode  mamba_chat_turn  mamba_chat_end
     running    mamba_acts_new  mamba_acts_pieces  mamba_acts_gpu  mamba_acts_free
                mamba_default_threads  mamba_has_gpu  mamba_gpu_memory
                mamba_prefill  mamba_prefill_rows  mamba_hidden  mamba_step  mamba_step_batch
                mamba_selection  mamba_watch
     writing    mamba_sample  mamba_sample_batch  mamba_generate
     scoring    mamba_nll  mamba_evaluate  mamba_texts_fit  mamba_texts_at_once  mamba_score_texts
     on a GPU   mamba_places  mamba_places_steps  mamba_places_sampling  mamba_places_write
                mamba_place_begin  mamba_place_begin_prompt  mamba_place_move  mamba_prompts_read
                mamba_state_of_text
     states     mamba_state_new  mamba_state_free  mamba_state_copy  mamba_state_reset
                mamba_state_bytes  mamba_state_save  mamba_state_load  mamba_state_write
                mamba_state_read
     memory     mamba_arena  mamba_arena_used  mamba_release
     training   mamba_trainer_new  mamba_trainer_new_gpu  mamba_trainer_bytes  mamba_trainer_chunk
                mamba_trainer_chunk_gpu  mamba_trainer_resize  mamba_trainer_carry
                mamba_trainer_fetch  mamba_trainer_free  mamba_train_pass  mamba_train_pass_on
                mamba_train_step  mamba_checkpoint_save  mamba_checkpoint_load
                mamba_checkpoint_peek
     ranks      mamba_trainer_ranks and what files/ranks_tcp.h has */
// clang-format on

#include "files/platform.h"

// -------------------------------------------------------------------------------------------------
// 1 Types
// The lists TENSORS_FIRST, _LAYER and _LAST say everything about a tensor. The struct Layer, the
// layout of model.bin, the initial weights, the optimizer and the names in messages are made from
// them. mamba_cuda.cu includes this section and nothing else of this file (MAMBA_TYPES_ONLY).

typedef enum { F32, F16, BF16, Q8, Q4, N_TYPES } Type; // how matrices are stored
enum { TILE = 32 };    // rows and columns of a tile of Q8 and Q4, see files/tensors.h
enum { ALIGN = 64 };   // bytes: where tensors begin in files and arrays in memory
enum { N_MAX = 1024 }; // the largest N
enum { RECENT = 64 };  // tokens that the repeat penalty looks back over
enum { PENDING = 4 };  // most bytes of an unfinished UTF-8 character
enum { FLAG_TIED = 1, FLAG_PROJ_BIAS = 2, FLAG_CONV_BIAS = 4, FLAG_MIXER_NORM = 8 };
enum { FLAG_LAYER_NORM = 16 }; // the norms take the mean away and have a bias
enum { ARCH_MAMBA = 0, ARCH_FALCON_MAMBA = 1 };

typedef struct {
    int arch;  // ARCH_
    int flags; // FLAG_: the head is the embedding; biases; FalconMamba's norms of the selection
    Type type; // of the tensors marked c->type in TENSORS_LAYER
    int D, n_layer, V, E, N, K, R;
    float norm_eps, mixer_eps; // of RMSNorm, and of FalconMamba's norms
    int bos, pad, eos[4];      // token ids, -1: none
} Config;

typedef struct { // (rows, cols), row-major; a vector has one column
    const void *data;
    int rows, cols;
    Type type;
} Tensor;

// clang-format off
typedef enum {
    INIT_ONES, INIT_ZEROS, INIT_NORMAL, INIT_LINEAR, INIT_OUT, INIT_CONV, INIT_DT, INIT_DT_BIAS,
    INIT_A_LOG
} Init; // see initial_value()

//    name       rows           cols   stored   initialised   decays present when
#define TENSORS_FIRST(X) \
    X(embedding, c->V,          c->D,  c->type, INIT_NORMAL,  true,  true)
#define TENSORS_LAYER(X) \
    X(norm,      c->D,          1,     F32,     INIT_ONES,    false, true) \
    X(norm_bias, c->D,          1,     F32,     INIT_ZEROS,   false, c->flags & FLAG_LAYER_NORM) \
    X(in_proj,   2 * c->E,      c->D,  c->type, INIT_LINEAR,  true,  true) \
    X(in_bias,   2 * c->E,      1,     F32,     INIT_ZEROS,   false, c->flags & FLAG_PROJ_BIAS) \
    X(conv,      c->E,          c->K,  F32,     INIT_CONV,    true,  true) \
    X(conv_bias, c->E,          1,     F32,     INIT_CONV,    false, c->flags & FLAG_CONV_BIAS) \
    X(x_proj,    c->R + 2*c->N, c->E,  c->type, INIT_LINEAR,  true,  true) \
    X(dt_proj,   c->E,          c->R,  c->type, INIT_DT,      true,  true) \
    X(dt_bias,   c->E,          1,     F32,     INIT_DT_BIAS, false, true) \
    X(A_log,     c->E,          c->N,  F32,     INIT_A_LOG,   false, true) \
    X(D_skip,    c->E,          1,     F32,     INIT_ONES,    false, true) \
    X(out_proj,  c->D,          c->E,  c->type, INIT_OUT,     true,  true) \
    X(out_bias,  c->D,          1,     F32,     INIT_ZEROS,   false, c->flags & FLAG_PROJ_BIAS)
#define TENSORS_LAST(X) \
    X(norm_f,    c->D,          1,     F32,     INIT_ONES,    false, true) \
    X(norm_f_bias, c->D,        1,     F32,     INIT_ZEROS,   false, c->flags & FLAG_LAYER_NORM) \
    X(head,      c->V,          c->D,  c->type, INIT_LINEAR,  true,  !(c->flags & FLAG_TIED))

// clang-format on

#define DECLARE(name, rows, cols, type, init, decays, present) Tensor name;
typedef struct {
    TENSORS_LAYER(DECLARE)
    const float *A_neg;  // (N,E) derived: -exp(A_log), transposed: channels side by side
    const float *conv_t; // (K,E) derived: conv, transposed likewise
} Layer;

typedef struct Tokenizer Tokenizer;
typedef struct Model {
    Config config;
    Tokenizer *tokenizer; // NULL for random weights
    TENSORS_FIRST(DECLARE)
    Layer *layer; // (n_layer)
    TENSORS_LAST(DECLARE)
    float *derived;   // arena of A_neg and conv_t
    uint32_t id;      // tells models apart: CRC of the header, which holds the CRCs of the rest
    size_t text_room; // most bytes that mamba_decode writes for one token
    uint32_t tensors_crc;
    size_t tensors_offset, tensors_bytes, tokenizer_bytes, n_params;
    const unsigned char *tokenizer_blob; // (tokenizer_bytes) in file, or own_blob
    unsigned char *own_blob;             // NULL: a model from a file, or without a tokenizer
    unsigned char *file;                 // the whole of model.bin, mapped or read
    size_t file_bytes;
    bool mapped, borrowed; // borrowed: file is memory of the caller's
    void *weights; // where weights are allocated instead of mapped: random and trained models
} Model;
#undef DECLARE

typedef struct {   // what one layer remembers of one sequence
    float *window; // (K-1,E) x of the last tokens, the oldest first
    float *h;      // (N,E) the SSM state
} LayerState;

typedef struct {
    float temperature; // 0: the likeliest token
    float top_p;       // keep the likeliest until they reach this share of what top_k kept; 1: all
    int top_k;         // keep this many; 0: all
    float min_p;       // drop what is less likely than this times the likeliest; 0: none
    float repeat_penalty; // divides positive logits of the last RECENT tokens and multiplies
                          // negative ones; 1: none
} Sampling;

typedef struct {
    float rate, beta1, beta2, epsilon;
    float decay; // weight decay, of the tensors marked so in TENSORS_LAYER
    float clip;  // largest norm of the gradient of all weights together; 0: none
} AdamW;

#include "files/gpu_backend.h"

#ifndef MAMBA_TYPES_ONLY
typedef uint16_t half; // the bits of an F16 or BF16 number

#include "files/memory.h"
#include "files/bytes.h"
#include "files/random.h"
#include "files/new_file.h"
COLD
#include "tokenizer.c"
COLD_END
#include "files/tensors.h" // not COLD: the loops of the products call its small functions
COLD
#include "files/header.h"
#ifndef MAMBA_LEVEL
#include "files/model_file.h"
#endif
COLD_END

// -------------------------------------------------------------------------------------------------
// 2 Plain operations
// The leaves of the computation. Each is written down as its definition, the backward pass after
// the forward pass.
// cpu/ has a fast form of those listed in cpu/plain_names.h, under the same name and with the same
// arguments, which runs in their place; small helpers serve only the plain forms. -DPLAIN builds
// without cpu/, and what runs is what stands here. Where both are built, the plain form of NAME is
// called NAME_plain, and tests hold the fast form to it. Functions that are not marked OPERATION,
// such as scan(), block() and forward(), run in every build.

#ifdef PLAIN
#define OPERATION static
#else
#define OPERATION UNUSED static inline // only tests call the plain form
#include "cpu/vectors.h"
#include "cpu/plain_names.h"
#endif

OPERATION float sigmoid(float x) { return 1 / (1 + expf(-x)); }
OPERATION float silu(float x) { return x * sigmoid(x); }
OPERATION float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); } // expf overflows at 88

// out (D) += the sum over t of x (T,D), rows ld apart: the gradient of a bias.
OPERATION void sum_rows(float *out, const float *x, size_t ld, int T, int D) {
#pragma omp for
    for (int d = 0; d < D; d++)
        for (int t = 0; t < T; t++) out[d] += x[t * ld + d];
}

// --- Norms: xn = x_hat weight + bias with x_hat = (x - m) r and r = 1 / sqrt(mean((x - m)^2) +
// eps). LayerNorm takes the mean of x as m; RMSNorm takes 0 and has no bias: only whether bias is
// NULL tells them apart.
OPERATION float norm_factor(const float *x, const float *bias, float eps, int D, float *m) {
    float sum = 0, squares = 0;
    for (int d = 0; d < D && bias; d++) sum += x[d];
    *m = sum / (float)D;
    for (int d = 0; d < D; d++) squares += (x[d] - *m) * (x[d] - *m);
    return 1 / sqrtf(squares / (float)D + eps);
}

// xn, x (T,D), rows ld apart; they may be the same array. weight and bias (D), or NULL: none.
OPERATION void norm_rows(float *xn, const float *x, const float *weight, const float *bias,
                         float eps, int T, int D, size_t ld) {
#pragma omp for
    for (int t = 0; t < T; t++) {
        float m, r = norm_factor(x + t * ld, bias, eps, D, &m);
        for (int d = 0; d < D; d++)
            xn[t * ld + d] =
                (x[t * ld + d] - m) * r * (weight ? weight[d] : 1) + (bias ? bias[d] : 0);
    }
}

typedef struct {              // what norm_rows_backward() writes
    float *d_x;               // (T,D), rows as far apart as those of x
    bool add;                 // d_x += instead of =
    float *d_weight, *d_bias; // (D) +=; NULL: the norm has none
    float *scale;             // (2,T) scratch: r, m
} NormGrad;

// With d_hat = d_xn weight:  d_x = r (d_hat - mean(d_hat) - x_hat mean(d_hat x_hat)), where RMSNorm
// has no mean(d_hat);  d_weight += d_xn x_hat;  d_bias += d_xn. d_x may be d_xn unless d->add.
OPERATION void norm_rows_backward(const NormGrad *d, const float *d_xn, const float *x,
                                  const float *weight, float eps, int T, int D, size_t ld) {
    float *scale = d->scale, *m = d->scale + T;
#pragma omp for
    for (int t = 0; t < T; t++) scale[t] = norm_factor(x + t * ld, d->d_bias, eps, D, &m[t]);
    if (weight) {
#pragma omp for
        for (int i = 0; i < D; i++)
            for (int t = 0; t < T; t++)
                d->d_weight[i] += d_xn[t * ld + i] * (x[t * ld + i] - m[t]) * scale[t];
    }
    if (d->d_bias) sum_rows(d->d_bias, d_xn, ld, T, D);
#pragma omp for
    for (int t = 0; t < T; t++) {
        float r = scale[t], mean_hat_x = 0, mean_hat = 0; // means of d_hat (x - m) and of d_hat
        for (int i = 0; i < D; i++) {
            float d_hat = d_xn[t * ld + i] * (weight ? weight[i] : 1);
            mean_hat_x += d_hat * (x[t * ld + i] - m[t]) / (float)D;
            mean_hat += d->d_bias ? d_hat / (float)D : 0;
        }
        for (int i = 0; i < D; i++) {
            size_t at = t * ld + i;
            float d_hat = d_xn[at] * (weight ? weight[i] : 1);
            float d_x = r * (d_hat - mean_hat - (x[at] - m[t]) * r * r * mean_hat_x);
            d->d_x[at] = d->add ? d->d_x[at] + d_x : d_x;
        }
    }
}

// out = a + b, all (T,D): the residual connection.
OPERATION void add_rows(float *out, const float *a, const float *b, int T, int D) {
#pragma omp for
    for (int t = 0; t < T; t++)
        for (size_t i = (size_t)t * D, end = i + D; i < end; i++) out[i] = a[i] + b[i];
}

// By one thread: the square of the length of x (n).
OPERATION double sum_squares(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

// --- the product with a matrix of weights

OPERATION float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// One weight of a Q8 or Q4 matrix, (code - half the number of codes) times the scale of its row in
// the tile. See files/tensors.h.
OPERATION float tile_weight(const Tensor *w, int row, int column) {
    const int bits = code_bits(w->type), codes = 32 / bits; // codes a word
    const size_t tile = (size_t)(row / TILE) * tiles_of((size_t)w->cols) + (size_t)(column / TILE);
    const unsigned char *at = (const unsigned char *)w->data + tile * tile_bytes(w->type);
    const int r = row % TILE, i = column % TILE;
    uint16_t scale;
    uint32_t word;
    memcpy(&scale, at + r * sizeof scale, sizeof scale);
    memcpy(&word, at + TILE_SCALES + (i / codes * TILE + r) * sizeof word, sizeof word);
    // The last code of a word is stored with its top bit flipped, see files/tensors.h.
    int code = (int)((word ^ 0x80000000u) >> (i % codes * bits) & ((1u << bits) - 1));
    return (float)(code - (1 << (bits - 1))) * float_of((uint32_t)scale << 16);
}

// out (n) = row `row` of w from column `from` on, as float32.
OPERATION void tensor_widen(float *out, const Tensor *w, int row, int from, int n) {
    const size_t at = (size_t)row * (size_t)w->cols + (size_t)from;
    const uint16_t *halves = w->data;
    for (int i = 0; i < n; i++) {
        if (w->type == F32) out[i] = f32(w)[at + i];
        else if (w->type == BF16) out[i] = float_of((uint32_t)halves[at + i] << 16);
        else if (w->type == F16) {
            // times 2^112: the biases of the two exponents differ by 112
            uint32_t bits = halves[at + i];
            float magnitude = float_of((bits & 0x7FFF) << 13) * 0x1p112f;
            out[i] = bits & 0x8000 ? -magnitude : magnitude;
        } else out[i] = tile_weight(w, row, from + i);
    }
}

typedef struct {   // the rows of a product
    int T;         // how many
    bool step;     // one token of each of T sequences: a row's bits must not depend on the others.
                   // Only cpu/ asks
    float *packed; // matmul_floats() of scratch
} Rows;

// Scratch that matmul() needs: none here.
OPERATION size_t matmul_floats(size_t T, size_t widest) { return 0 * T * widest; }

// out (T,O) = x (T,I) W^T + bias: rows of out are ldo apart, those of x ldx. w (O,I) of any storage
// type; bias (O) or NULL. A thread owns columns of out, so every weight is read once.
OPERATION void matmul(float *out, size_t ldo, const float *x, size_t ldx, const Tensor *w,
                      const float *bias, Rows rows) {
    enum { AT_ONCE = 256 }; // inputs
    const int O = w->rows, I = w->cols, T = rows.T;
#pragma omp for
    for (int o = 0; o < O; o++) {
        for (int t = 0; t < T; t++) out[t * ldo + o] = bias ? bias[o] : 0;
        for (int i0 = 0; i0 < I; i0 += AT_ONCE) {
            float weights[AT_ONCE];
            int n = I - i0 < AT_ONCE ? I - i0 : AT_ONCE;
            tensor_widen(weights, w, o, i0, n);
            for (int t = 0; t < T; t++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < n; i++) sum += x[t * ldx + i0 + i] * weights[i];
                out[t * ldo + o] += sum;
            }
        }
    }
}

typedef struct {   // what matmul_backward() writes; NULL: not wanted
    float *d_x;    // (T,I), rows as far apart as those of x
    bool add;      // d_x += instead of =
    float *d_W;    // (O,I) +=
    float *d_bias; // (O) +=
} MatmulGrad;

// out = x W^T + bias:  d_x (T,I) = d_out W;  d_W (O,I) += d_out^T x;  d_bias (O) += the sum over t
// of d_out. w is float32, as it is while training.
OPERATION void matmul_backward(const MatmulGrad *d, const float *d_out, size_t ldo, const float *x,
                               size_t ldx, const Tensor *w, Rows rows) {
    const int O = w->rows, I = w->cols, T = rows.T;
    const float *W = f32(w);
    if (d->d_x) {
#pragma omp for
        for (int t = 0; t < T; t++) {
            float *d_x = d->d_x + t * ldx;
            for (int i = 0; i < I && !d->add; i++) d_x[i] = 0;
            for (int o = 0; o < O; o++)
                for (int i = 0; i < I; i++) d_x[i] += d_out[t * ldo + o] * W[(size_t)o * I + i];
        }
    }
    if (d->d_W) {
#pragma omp for
        for (int o = 0; o < O; o++) {
            float *d_W = d->d_W + (size_t)o * I;
            for (int t = 0; t < T; t++)
                for (int i = 0; i < I; i++) d_W[i] += d_out[t * ldo + o] * x[t * ldx + i];
        }
    }
    if (d->d_bias) sum_rows(d->d_bias, d_out, ldo, T, O);
}

// --- cross-entropy

// log(sum of exp(logits)), by one thread; the highest logit is subtracted, so that exp stays
// finite.
OPERATION double log_sum_exp(const float *logits, int V) {
    float highest = logits[0];
    for (int v = 1; v < V; v++) highest = logits[v] > highest ? logits[v] : highest;
    double sum = 0;
    for (int v = 0; v < V; v++) sum += exp((double)logits[v] - (double)highest);
    return highest + log(sum);
}

// losses (T) = -log p(target), and logits (T,V) become their own gradient, weight * (p - 1 at the
// target, p elsewhere). Both are zero where the target is -1.
OPERATION void cross_entropy(float *losses, float *logits, const int32_t *targets, float weight,
                             int T, int V) {
#pragma omp for
    for (int t = 0; t < T; t++) {
        float *row = logits + (size_t)t * V;
        int32_t target = targets[t];
        double log_sum = log_sum_exp(row, V);
        losses[t] = target < 0 ? 0 : (float)(log_sum - (double)row[target]);
        for (int v = 0; v < V; v++)
            row[v] = target < 0 ? 0 : weight * (float)exp((double)row[v] - log_sum);
        if (target >= 0) row[target] -= weight;
    }
}

// --- conv1d + SiLU: u_t = silu(c_t) with c_t = bias + sum over k of conv[k] x_{t-K+1+k}. Each
// channel is by itself, and the last tap meets the current input: nothing looks ahead. The window
// of a sequence (K-1,E) holds the inputs before t = 0 and becomes the last K-1 inputs.

typedef struct {         // the convolution of a layer over B sequences of L tokens
    const float *xz;     // (B L,2E): its input x is the first half of each row
    const float *conv_t; // (K,E)
    const float *bias;   // (E) or NULL
    int B, L, E, K;
} Conv;

// x of sequence b at step t; before its start, from its window.
static const float *conv_input(const Conv *c, const float *window, int b, int t) {
    if (t < 0) return window + (size_t)(c->K - 1 + t) * c->E;
    return c->xz + ((size_t)b * c->L + t) * 2 * c->E;
}

// Moves every window on by L tokens. j must rise: where L < K-1, a row is copied from a later row
// of the same window, which must still be the old one.
static void conv_shift(const LayerState *seq, const Conv *c) {
#pragma omp for
    for (int b = 0; b < c->B; b++)
        for (int j = 0; j < c->K - 1; j++)
            memmove(seq[b].window + (size_t)j * c->E,
                    conv_input(c, seq[b].window, b, c->L - c->K + 1 + j),
                    (size_t)c->E * sizeof(float));
}

// c_t of one channel, before SiLU.
OPERATION float conv_sum(const Conv *c, const float *window, int b, int t, int e) {
    float sum = c->bias ? c->bias[e] : 0;
    for (int k = 0; k < c->K; k++)
        sum += c->conv_t[(size_t)k * c->E + e] * conv_input(c, window, b, t - c->K + 1 + k)[e];
    return sum;
}

// u (B L,E); the windows of seq (B) move on.
OPERATION void conv1d_silu(float *u, const LayerState *seq, const Conv *c) {
#pragma omp for
    for (int row = 0; row < c->B * c->L; row++)
        for (int e = 0; e < c->E; e++) {
            int b = row / c->L, t = row % c->L;
            u[(size_t)row * c->E + e] = silu(conv_sum(c, seq[b].window, b, t, e));
        }
    conv_shift(seq, c);
}

typedef struct {     // what conv1d_silu_backward() writes
    float *d_xz;     // (B L,2E): the first half of each row =
    float *d_conv;   // (E,K) +=
    float *d_bias;   // (E) +=
    float *d_window; // (B,K-1,E) gradient of the window at the end; becomes that at the start
    float *d_c;      // (L,E) scratch
} ConvGrad;

// u = silu(c), and silu' = s (1 + c (1 - s)) with s = sigmoid(c):  d_c = d_u silu'(c);
// d_x_t = sum over k of conv[k] d_c_{t+K-1-k};  d_conv[k] += sum over t of d_c_t x_{t-K+1+k};
// d_bias += sum of d_c. The last K-1 inputs are also the window at the end, so d_window is added to
// their d_x. c is computed again. window (B,K-1,E): as it was before the pass.
OPERATION void conv1d_silu_backward(const ConvGrad *d, const float *d_u, const float *window,
                                    const Conv *c) {
    const int L = c->L, E = c->E, K = c->K;
#pragma omp for
    for (int e = 0; e < E; e++)
        for (int b = 0; b < c->B; b++) {
            const float *before = window + (size_t)b * (K - 1) * E;
            float *d_window = d->d_window + (size_t)b * (K - 1) * E, *d_c = d->d_c;
            for (int t = 0; t < L; t++) {
                float sum = conv_sum(c, before, b, t, e), s = sigmoid(sum);
                float d_sum = d_u[((size_t)b * L + t) * E + e] * s * (1 + sum * (1 - s));
                d_c[(size_t)t * E + e] = d_sum;
                if (c->bias) d->d_bias[e] += d_sum;
                for (int k = 0; k < K; k++)
                    d->d_conv[(size_t)e * K + k] +=
                        d_sum * conv_input(c, before, b, t - K + 1 + k)[e];
            }
            for (int t = L - 1; t > -K; t--) { // inputs before t = 0 are the window's
                float d_x = t > L - K ? d_window[(size_t)(t - L + K - 1) * E + e] : 0;
                for (int k = 0, later = t + K - 1; k < K; k++, later--)
                    if (later >= 0 && later < L)
                        d_x += c->conv_t[(size_t)k * E + e] * d_c[(size_t)later * E + e];
                if (t >= 0) d->d_xz[((size_t)b * L + t) * 2 * E + e] = d_x;
                else d_window[(size_t)(K - 1 + t) * E + e] = d_x;
            }
        }
}

// --- delta and the gate

// delta = softplus(dt + dt_bias), in place: dt (T,E) is what dt_proj made of dt_low.
OPERATION void softplus_bias(float *delta, const float *dt_bias, Rows rows, int E) {
#pragma omp for
    for (int t = 0; t < rows.T; t++)
        for (int e = 0; e < E; e++) {
            size_t te = (size_t)t * E + e;
            delta[te] = softplus(delta[te] + dt_bias[e]);
        }
}

// softplus' = sigmoid, and sigmoid of the number whose softplus is delta is 1 - e^-delta: d_delta
// becomes d_dt, in place.
OPERATION void softplus_backward(float *d_delta, const float *delta, int T, int E) {
#pragma omp for
    for (int t = 0; t < T; t++)
        for (size_t i = (size_t)t * E, end = i + E; i < end; i++) d_delta[i] *= -expm1f(-delta[i]);
}

// g = y silu(z), (T,E); g may be y. z is the second half of each row of xz (T,2E).
OPERATION void gate(float *g, const float *y, const float *xz, Rows rows, int E) {
#pragma omp barrier // for y: in a step scan() ends without a barrier
#pragma omp for
    for (int t = 0; t < rows.T; t++)
        for (int e = 0; e < E; e++) {
            size_t te = (size_t)t * E + e;
            g[te] = y[te] * silu(xz[((size_t)t * 2 + 1) * E + e]);
        }
}

// g = y silu(z):  d_y = d_g silu(z);  d_z = d_g y silu'(z), into the second half of d_xz. g is
// computed again, for the gradient of out_proj. d_y may be d_g.
OPERATION void gate_backward(float *d_y, float *d_xz, float *g, const float *d_g, const float *y,
                             const float *xz, int T, int E) {
#pragma omp for
    for (int t = 0; t < T; t++)
        for (int e = 0; e < E; e++) {
            size_t te = (size_t)t * E + e, at_z = ((size_t)t * 2 + 1) * E + e;
            float z = xz[at_z], s = sigmoid(z), d_g_te = d_g[te];
            d_xz[at_z] = d_g_te * y[te] * s * (1 + z * (1 - s));
            g[te] = y[te] * z * s;
            d_y[te] = d_g_te * z * s;
        }
}

// -------------------------------------------------------------------------------------------------
// 3 The scan
// The SSM of one channel has a state of N numbers. In continuous time it is h' = A h + B u. Between
// two tokens lies a time delta. Where A is diagonal, as here, every state n is a number by itself,
// and with u held for the time delta the exact solution (zero-order hold) is
//
//     h_t = exp(delta A) h_{t-1} + ((exp(delta A) - 1) / A) B u_t
//
// Mamba keeps the first factor exactly. It replaces the second, which multiplies B u_t, by delta,
// the first term of its series (Euler's method), which is close while delta |A| is small. The
// models were trained with it, so this is the model, for each channel e and each state n:
//
//     h_t = decay_t h_{t-1} + inject_t     decay_t = exp(delta_t A)     inject_t = delta_t B_t u_t
//     y_t = sum over n of C_t h_t + D_skip u_t
//
// with h, decay and inject (t,n,e), A = A_neg (n,e), B = B_ssm and C = C_ssm (t,n), delta and u
// (t,e). In the equations of this section A, B and C are these, not sizes. A is negative, so
// exp(delta A) lies between 0 and 1. Euler's method for A would give the decay 1 + delta A. That is
// below -1 where delta |A| > 2, and h would grow without end. An error in delta B only changes how
// strongly a token enters. That is why A is exact and B need not be.
//
// *Selective* means that delta, B and C are computed from u_t, the input at this token, by x_proj
// and dt_proj in block(). In older SSMs they are constants. delta near 0 skips the token: decay is
// 1 and inject is 0. A large delta forgets the past and takes the token in. B_t says into which of
// the N states a token is written, C_t from which ones it is read. delta has one value per channel,
// so its projection would be a matrix (E,E). It is factored instead: R rows of x_proj, (R,E), give
// dt_low, and dt_proj, (E,R), gives delta. Together that is 2 E R numbers; dt_rank R is usually
// D/16.
//
// The state is (N,E), channels inside, because cpu/ and GPUs handle neighbouring channels side by
// side. It begins as zeros before the first token of a text, and so does the convolution's window.

typedef struct {                // the scan of a layer over B sequences of L tokens, T = B L
    const float *u, *delta;     // (T,E)
    const float *A_neg;         // (N,E)
    const float *B_ssm, *C_ssm; // (T,N), rows ld_bc apart
    const float *D_skip;        // (E)
    size_t ld_bc;
    int B, L, E, N;
} Scan;

// Threads share channels. A task of scan() is SCAN_LANES channels of one sequence, or, where L is
// 1, STEP_LANES.
enum { SCAN_LANES = 16 }; // a cache line
enum { STEP_LANES = 128 };

// The definition; unless PLAIN, cpu/scan.h runs in its place. Channels from e0 up to, not
// including, e1 through the rows from row0 up to row1 of one sequence. h (N,E) is the state before
// them and becomes the state after them. y (T,E) NULL: only the state is wanted. delta_sum (E),
// unless NULL, gets the sum of delta over the rows, for scan_in_pieces().
OPERATION void recurrence(float *y, float *h, float *delta_sum, const Scan *s, int e0, int e1,
                          int row0, int row1) {
    const size_t E = (size_t)s->E;
    for (int e = e0; e < e1 && delta_sum; e++) delta_sum[e] = 0;
    for (int t = row0; t < row1; t++)
        for (int e = e0; e < e1; e++) {
            float delta = s->delta[t * E + e], u = s->u[t * E + e], sum = s->D_skip[e] * u;
            for (int n = 0; n < s->N; n++) {
                float decay = expf(delta * s->A_neg[n * E + e]);
                float inject = delta * s->B_ssm[t * s->ld_bc + n] * u;
                h[n * E + e] = decay * h[n * E + e] + inject;
                sum += s->C_ssm[t * s->ld_bc + n] * h[n * E + e];
            }
            if (y) y[t * E + e] = sum;
            if (delta_sum) delta_sum[e] += delta;
        }
}

// --- the backward pass. Write d_h_t for the gradient of h_t. It has two sources: y_t, and h_{t+1}
// through its decay. So it flows back through time, from the last step to the first:
//
//     d_h_t = C_t d_y_t + decay_{t+1} d_h_{t+1}
//     d_C_t = sum over e of d_y_t h_t              d_B_t = sum over e of d_h_t delta_t u_t
//     d_u_t = D_skip d_y_t + sum over n of d_h_t delta_t B_t
//     d_delta_t = sum over n of d_h_t (decay_t A h_{t-1} + B_t u_t)
//     d_A = sum over t of d_h_t decay_t delta_t h_{t-1}   d_D_skip = sum over t of d_y_t u_t
//
// and d_A_log = d_A A, since A = -exp(A_log). All of this needs every h_t, and none was stored. So
// walk forward once and keep the state at the start of every stretch of 32 steps (SCAN_STRETCH).
// Then, from the last stretch to the first: walk the stretch forward again (recurrence_again), now
// keeping its few states, and walk it backward (recurrence_backward). The price is two more walks
// forward. scan_backward() does this below; here is one step in each direction.

#ifdef PLAIN
enum { SCAN_WIDTH = 16 };  // channels of a task of scan_backward(); cpu/ has its own
enum { SCAN_WIDEST = 16 }; // the largest in the program: `make dist` compiles cpu/ for several
#endif

typedef struct {              // what scan_backward() writes
    float *d_u, *d_delta;     // (T,E) =
    float *d_B_ssm, *d_C_ssm; // (T,N) =, rows ld_bc apart
    float *d_A_log;           // (E,N) +=
    float *d_D_skip;          // (E) +=
    float *d_h;     // (B,N,E) gradient of the states at the end; becomes that at the start
    float *scratch; // scan_backward_floats()
} ScanGrad;

typedef struct { // a task of scan_backward(): the channels e0 .. e0 + width, at most SCAN_WIDTH
    int e0, width;
    float *starts;          // (stretches,N,SCAN_WIDTH) states at the start of each stretch
    float *states, *decays; // (SCAN_STRETCH,N,SCAN_WIDTH) of the stretch in hand
    float *A, *d_A;         // (N,SCAN_WIDTH)
    float *d_h;             // (N,SCAN_WIDTH) gradient of the state
    float d_D_skip[SCAN_WIDEST];
    float *parts; // (T,2N) what these channels add to d_B and d_C
} ScanTask;

// One step forward, on the arrays (N,SCAN_WIDTH) of a task of the backward pass: computes h, the
// state after a row, from `before`, the state before it. Stores the decay unless NULL. h may be
// `before`.
OPERATION void recurrence_again(float *h, float *decay, const float *before, const ScanTask *k,
                                const Scan *s, size_t row) {
    for (int n = 0; n < s->N; n++)
        for (int i = 0; i < k->width; i++) {
            size_t at = (size_t)n * SCAN_WIDTH + i, te = row * s->E + k->e0 + i;
            float decay_t = expf(s->delta[te] * k->A[at]);
            float inject = s->delta[te] * s->u[te] * s->B_ssm[row * s->ld_bc + n];
            h[at] = decay_t * before[at] + inject;
            if (decay) decay[at] = decay_t;
        }
}

// One row back, by the equations above. k->d_h comes in as decay_{t+1} d_h_{t+1} and leaves as
// decay_t d_h_t. h, decay: of this row; before: the state before it.
OPERATION void recurrence_backward(ScanTask *k, const ScanGrad *d, const float *d_y, const Scan *s,
                                   size_t row, const float *h, const float *decay,
                                   const float *before) {
    const float *B = s->B_ssm + row * s->ld_bc, *C = s->C_ssm + row * s->ld_bc;
    float *d_B = k->parts + row * 2 * s->N, *d_C = d_B + s->N;
    memset(d_B, 0, 2 * (size_t)s->N * sizeof *d_B);
    for (int i = 0; i < k->width; i++) {
        size_t e = (size_t)(k->e0 + i), te = row * s->E + e;
        float delta = s->delta[te], u = s->u[te], dy = d_y[te];
        float d_u = s->D_skip[e] * dy, d_delta = 0;
        k->d_D_skip[i] += dy * u;
        for (int n = 0; n < s->N; n++) {
            size_t at = (size_t)n * SCAN_WIDTH + i;
            float d_h = C[n] * dy + k->d_h[at], d_decay = d_h * before[at];
            d_C[n] += dy * h[at];
            d_B[n] += d_h * delta * u;
            d_u += d_h * delta * B[n];
            d_delta += d_decay * decay[at] * k->A[at] + d_h * B[n] * u;
            k->d_A[at] += d_decay * decay[at] * delta;
            k->d_h[at] = decay[at] * d_h;
        }
        d->d_u[te] = d_u;
        d->d_delta[te] = d_delta;
    }
}

// The plain operations end here.
#ifndef PLAIN
#include "cpu/fast_names.h"
#include "cpu/rows.h"
#include "cpu/quantized.h"
#include "cpu/matmul.h"
#include "cpu/scan.h"
#endif
// `make dist` puts cpu/ for several processors into one program. It compiles this file once for
// each of them with MAMBA_LEVEL, up to this line, and once whole.
#if defined(MAMBA_LEVELS) || defined(MAMBA_LEVEL)
#include "cpu/levels.h"
#endif
#ifndef MAMBA_LEVEL

// --- the parallel form. One step is the map h -> a h + b with a = decay and b = inject. Two steps,
// (a1,b1) first, are again such a map:
//
//     (a1,b1) then (a2,b2)  =  (a1 a2, a2 b1 + b2)
//
// Composing maps is associative: the steps may be grouped in any way, as long as their order stays.
// So time can be cut into pieces that are walked at the same time, each from h = 0. Example, with
// a = 1/2 everywhere and b = 1, 2, 3, 4: step by step h is 1, 2.5, 4.25, 6.125. In two pieces at
// once the maps are (1/4, 2.5) and (1/4, 5.5), and combined 1/4 * 2.5 + 5.5 = 6.125. Swapped they
// would give 1/4 * 5.5 + 2.5.
//
// The states of all tokens, (L,N,E), are never in memory: a task walks through time with its (N)
// states of some channels in registers or in the first cache.

// On a CPU only very narrow models use this: a prefill with E <= 32 and L >= 256, never training.
// Wider models have channels enough: threads share those, and nobody walks twice. (A GPU has many
// more threads: cuda/scan_tiles.cuh cuts time for wide models, too.)
enum { SCAN_TASKS = 16 }; // so many keep all threads busy
enum { SCAN_PIECE = 32 }; // tokens of a piece, at least

// How many pieces of time. Each but one is walked twice, so 8 pieces by 8 threads finish in 1/4 of
// the time of one uncut walk; 4 were only 1.2 times as fast on 16 cores, so less than 8 is not
// worth it. The shapes alone decide, never the number of threads or the machine: the bits stay the
// same.
static int scan_pieces(int L, int E) {
    int blocks = (E + SCAN_LANES - 1) / SCAN_LANES, pieces = SCAN_TASKS / blocks;
    if (pieces > L / SCAN_PIECE) pieces = L / SCAN_PIECE;
    return pieces >= 8 ? pieces : 1;
}

static size_t scan_carry_floats(int E, int N) {
    return (size_t)SCAN_TASKS * (size_t)(N + 1) * (size_t)E;
}

typedef struct { // the map h -> a h + b: what one step, or many, do to a state
    float a, b;
} Map;

// First one map, then the other. Associative, not commutative.
static inline Map combine(Map first, Map second) {
    return (Map){first.a * second.a, second.a * first.b + second.b};
}

// One sequence in pieces of time. carry (pieces,N+1,E): of each piece a state (N,E) and the sum of
// delta (E), for a product of decays is the exponential of A times that sum.
static void scan_in_pieces(float *y, float *h, const Scan *s, int pieces, float *carry) {
    const int L = s->L, E = s->E, N = s->N, blocks = (E + SCAN_LANES - 1) / SCAN_LANES;
    const size_t NE = (size_t)N * E, per_piece = NE + E;
    assert(pieces > 1 && pieces <= SCAN_TASKS);
#define PIECE_START(piece) (int)((size_t)L * (piece) / pieces)

    // 1. Every piece but the last from h = 0: its state at the end is b of its map.
#pragma omp for
    for (int task = 0; task < blocks * (pieces - 1); task++) {
        int piece = task / blocks, e0 = task % blocks * SCAN_LANES;
        int e1 = E - e0 < SCAN_LANES ? E : e0 + SCAN_LANES;
        float *b = carry + per_piece * piece;
        for (int n = 0; n < N; n++)
            memset(b + (size_t)n * E + e0, 0, (size_t)(e1 - e0) * sizeof *b);
        recurrence(NULL, b, b + NE, s, e0, e1, PIECE_START(piece), PIECE_START(piece + 1));
    }
    // 2. The maps combined in order of time: carry becomes the state before each piece.
#pragma omp for
    for (int n = 0; n < N; n++)
        for (int e = 0; e < E; e++) {
            size_t ne = (size_t)n * E + e;
            Map before = {1, h[ne]}; // only b is used: the state before the piece
            for (int piece = 0; piece < pieces; piece++) {
                float *state = carry + per_piece * piece, *delta_sum = state + NE, b = state[ne];
                state[ne] = before.b;
                if (piece == pieces - 1) break;
                before = combine(before, (Map){expf(s->A_neg[ne] * delta_sum[e]), b});
            }
        }
    // 3. Every piece again, from the state before it. Without y the last one is enough.
#pragma omp for
    for (int task = y ? 0 : blocks * (pieces - 1); task < blocks * pieces; task++) {
        int piece = task / blocks, e0 = task % blocks * SCAN_LANES;
        int e1 = E - e0 < SCAN_LANES ? E : e0 + SCAN_LANES;
        recurrence(y, carry + per_piece * piece, NULL, s, e0, e1, PIECE_START(piece),
                   PIECE_START(piece + 1));
    }
#undef PIECE_START
#pragma omp single
    memcpy(h, carry + per_piece * (pieces - 1), NE * sizeof *h);
}

// y (T,E), or NULL where only the states are wanted; the states of seq (B) in place. carry:
// scan_carry_floats() of scratch, or NULL: one piece of time.
static void scan(float *y, const LayerState *seq, const Scan *s, float *carry) {
    const int B = s->B, L = s->L, E = s->E, pieces = carry && B == 1 ? scan_pieces(L, E) : 1;
    if (pieces > 1) {
        scan_in_pieces(y, seq->h, s, pieces, carry);
        return;
    }
    const int lanes = L == 1 ? STEP_LANES : SCAN_LANES, blocks = (E + lanes - 1) / lanes;
#pragma omp for schedule(static) nowait // in a step gate() waits
    for (int task = 0; task < B * blocks; task++) {
        int b = task / blocks, e0 = task % blocks * lanes, e1 = E - e0 < lanes ? E : e0 + lanes;
        recurrence(y, seq[b].h, NULL, s, e0, e1, b * L, (b + 1) * L);
    }
    if (L > 1) {
#pragma omp barrier
    }
}

// --- the backward pass as a whole; its equations stand above recurrence_again()
//
// A task is SCAN_WIDTH channels of all sequences. d_B and d_C sum over channels: each task leaves
// its part, and the parts are added in a fixed order. Memory is E N L / SCAN_STRETCH floats for the
// starts of one sequence, 2 E N SCAN_STRETCH for the stretch in hand, and 2 E N B L / SCAN_WIDTH
// for the parts, instead of E N B L.

enum { SCAN_STRETCH = 32 };

static size_t scan_backward_floats(int B, int L, int E, int N) {
    size_t tasks = ((size_t)E + SCAN_WIDTH - 1) / SCAN_WIDTH;
    size_t stretches = ((size_t)L + SCAN_STRETCH - 1) / SCAN_STRETCH;
    size_t per_task = (size_t)N * SCAN_WIDTH * (stretches + 2 * SCAN_STRETCH + 3); // 3: A, d_A, d_h
    return tasks * (per_task + (size_t)B * L * 2 * N);
}

// The arrays of task number `task` in scratch.
static ScanTask scan_task(float *scratch, const Scan *s, int task) {
    const int tasks = (s->E + SCAN_WIDTH - 1) / SCAN_WIDTH, e0 = task * SCAN_WIDTH;
    const size_t stretches = ((size_t)s->L + SCAN_STRETCH - 1) / SCAN_STRETCH;
    const size_t per_state = (size_t)s->N * SCAN_WIDTH,
                 per_task = per_state * (stretches + 2 * SCAN_STRETCH + 3);
    float *starts = scratch + per_task * task, *states = starts + per_state * stretches;
    float *decays = states + per_state * SCAN_STRETCH, *A = decays + per_state * SCAN_STRETCH;
    float *parts = scratch + per_task * tasks + (size_t)task * s->B * s->L * 2 * s->N;
    int width = s->E - e0 < SCAN_WIDTH ? s->E - e0 : SCAN_WIDTH;
    return (ScanTask){.e0 = e0,
                      .width = width,
                      .starts = starts,
                      .states = states,
                      .decays = decays,
                      .A = A,
                      .d_A = A + per_state,
                      .d_h = A + 2 * per_state,
                      .parts = parts};
}

// The task's columns of an array (N,E), as (N,SCAN_WIDTH); missing channels are zero.
static void scan_gather(float *to, const float *from, const ScanTask *k, int N, int E) {
    for (int n = 0; n < N; n++, to += SCAN_WIDTH) {
        memcpy(to, from + (size_t)n * E + k->e0, (size_t)k->width * sizeof *to);
        memset(to + k->width, 0, (size_t)(SCAN_WIDTH - k->width) * sizeof *to);
    }
}

// Sequence b, the channels of one task: d_h (N,E) holds the gradient of the state at the end, then
// at the start.
static void scan_backward_sequence(ScanTask *k, const ScanGrad *d, const float *d_y, const Scan *s,
                                   const float *h0, int b) {
    const int L = s->L, N = s->N, E = s->E, stretches = (L + SCAN_STRETCH - 1) / SCAN_STRETCH;
    const size_t per_state = (size_t)N * SCAN_WIDTH, row = (size_t)b * L;
    float *d_h = d->d_h + (size_t)b * N * E;
    scan_gather(k->starts, h0 + (size_t)b * N * E, k, N, E);
    scan_gather(k->d_h, d_h, k, N, E);
    // starts[j] is made by walking through stretch j-1: its first step reads starts[j-1], the
    // others update it in place.
    for (int t = 0; t < (stretches - 1) * SCAN_STRETCH; t++) {
        float *at = k->starts + per_state * (t / SCAN_STRETCH + 1);
        recurrence_again(at, NULL, t % SCAN_STRETCH ? at : at - per_state, k, s, row + t);
    }
    for (int stretch = stretches - 1; stretch >= 0; stretch--) {
        int t0 = stretch * SCAN_STRETCH, steps = L - t0 < SCAN_STRETCH ? L - t0 : SCAN_STRETCH;
        const float *start = k->starts + per_state * stretch;
        for (int i = 0; i < steps; i++) {
            float *h = k->states + per_state * i, *decay = k->decays + per_state * i;
            recurrence_again(h, decay, i ? h - per_state : start, k, s, row + t0 + i);
        }
        for (int i = steps - 1; i >= 0; i--) {
            const float *h = k->states + per_state * i, *decay = k->decays + per_state * i;
            recurrence_backward(k, d, d_y, s, row + t0 + i, h, decay, i ? h - per_state : start);
        }
    }
    for (int n = 0; n < N; n++)
        memcpy(d_h + (size_t)n * E + k->e0, k->d_h + (size_t)n * SCAN_WIDTH,
               (size_t)k->width * sizeof *d_h);
}

// d_y (T,E); h0 (B,N,E): the states before t = 0.
static void scan_backward(const ScanGrad *d, const float *d_y, const Scan *s, const float *h0) {
    const int N = s->N, E = s->E, T = s->B * s->L, tasks = (E + SCAN_WIDTH - 1) / SCAN_WIDTH;
#pragma omp for
    for (int task = 0; task < tasks; task++) {
        ScanTask k = scan_task(d->scratch, s, task);
        scan_gather(k.A, s->A_neg, &k, N, E);
        memset(k.d_A, 0, (size_t)N * SCAN_WIDTH * sizeof *k.d_A);
        for (int b = 0; b < s->B; b++) scan_backward_sequence(&k, d, d_y, s, h0, b);
        for (int n = 0; n < N; n++)
            for (int i = 0; i < k.width; i++) {
                size_t at = (size_t)n * SCAN_WIDTH + i;
                d->d_A_log[(size_t)(k.e0 + i) * N + n] += k.d_A[at] * k.A[at];
            }
        for (int i = 0; i < k.width; i++) d->d_D_skip[k.e0 + i] += k.d_D_skip[i];
    }
#pragma omp for
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            float d_B = 0, d_C = 0;
            for (int task = 0; task < tasks; task++) {
                const float *part = scan_task(d->scratch, s, task).parts + (size_t)t * 2 * N;
                d_B += part[n];
                d_C += part[N + n];
            }
            d->d_B_ssm[(size_t)t * s->ld_bc + n] = d_B;
            d->d_C_ssm[(size_t)t * s->ld_bc + n] = d_C;
        }
}

// -------------------------------------------------------------------------------------------------
// 4 The model
// block() is one layer, forward() is all of them. Prefill reads a prompt: one sequence, many
// tokens. A step reads one token of one or more sequences. What passes from one to the other, and
// from piece to piece of a long prompt, is State: of each layer h and the window of the
// convolution. Its size does not depend on how much was read. State also has what writing needs:
// the logits after the last token, the last ids, and the random numbers' state.

// What mamba_watch() calls before the scan of each layer of a pass: s has what the layer selected
// for each token, seq (B) the states before the first one.
typedef void LayerWatcher(void *context, int layer, const LayerState *seq, const Scan *s);

// The arrays that a layer writes in a pass over B sequences of L tokens. Prefill and step use one
// Work for all layers. Training has one for each layer, because the backward pass needs what the
// forward pass computed.
typedef struct Work {
    float *res;          // (T,D) residual stream before the layer
    float *next;         // (T,D) after it; in prefill and step the same as res
    float *xn;           // (T,D) res after the norm; at the end of the layer out_proj's output
    float *xz;           // (T,2E) [x | z]
    float *u;            // (T,E)
    float *raw;          // (T,P) x_proj's output before FalconMamba's norms; without them, xdb
    float *xdb;          // (T,P) [dt_low | B_ssm | C_ssm]
    float *delta;        // (T,E)
    float *y;            // (T,E)
    float *g;            // (T,E) may be y
    float *packed;       // matmul_floats() of scratch
    float *carry;        // scan_carry_floats() of scratch; NULL: the scan takes time in one piece
    const int32_t *ids;  // (T) the tokens
    float *selection;    // (T) += the mean of delta over the channels; NULL: not wanted
    int selection_layer; // of this layer; -1: of all layers
    LayerWatcher *watch; // sees every layer of a pass; NULL: none
    void *watch_context;
    bool state_only;     // nobody reads the residual stream after the last layer
    bool for_each_layer; // the Work of the next layer follows; else all layers use this one
} Work;

// res (T,D) = the rows of embedding (V,D) named by ids (T); ids NULL: the first T.
static void embed(float *res, const int32_t *ids, const Tensor *embedding, int T) {
    int D = embedding->cols;
#pragma omp for
    for (int t = 0; t < T; t++)
        tensor_widen(res + (size_t)t * D, embedding, ids ? ids[t] : t, 0, D);
}

// d_embedding (V,D) += the gradients of every place where an id stood. Threads own columns, so that
// places add up in order.
static void embed_backward(float *d_embedding, const float *d_res, const int32_t *ids, int T,
                           int D) {
    enum { COLUMNS = 16 };
#pragma omp for
    for (int d0 = 0; d0 < D; d0 += COLUMNS) {
        int d1 = D - d0 < COLUMNS ? D : d0 + COLUMNS;
        for (int t = 0; t < T; t++) {
            float *to = d_embedding + (size_t)ids[t] * D;
            for (int d = d0; d < d1; d++) to[d] += d_res[(size_t)t * D + d];
        }
    }
}

// out_t += the mean over the channels of delta_t, divided by `parts`
static void add_row_means(float *out, const float *delta, int parts, int T, int E) {
#pragma omp barrier // the fast softplus_bias() does not wait in a step
#pragma omp for
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int e = 0; e < E; e++) sum += (double)delta[(size_t)t * E + e];
        out[t] += (float)(sum / E / parts);
    }
}

#ifdef PLAIN
#define in_proj_of_ids(m, w, in_proj, T, L) false
#else
// in_proj_of_ids(): in a long pass over a small vocabulary the first layer computes the row of xz
// once for each id and copies it to every place of the id. The numbers are the same.
#include "cpu/small_vocabulary.h"
#endif

// One layer over B sequences of L tokens: w->res (T,D) goes in, w->next comes out, and the states
// of seq (B) move on. Called by every thread of a team.
static void block(const Model *m, int layer, Work *w, const LayerState *seq, int B, int L) {
    const Config *c = &m->config;
    const Layer *p = &m->layer[layer];
    const int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N, T = B * L;
    const Rows rows = {T, L == 1, w->packed};
    float *dt_low = w->xdb, *B_ssm = w->xdb + R, *C_ssm = w->xdb + R + N; // columns of xdb (T,P)

    // Sometimes only the state is wanted of the last layer. Then z, C, y and out_proj are left out:
    // the first rows of in_proj make x, the first rows of x_proj make dt_low and B.
    const bool state_only = w->state_only && layer == c->n_layer - 1;
    Tensor in_proj = p->in_proj, x_proj = p->x_proj;
    if (state_only) {
        in_proj.rows = E;
        x_proj.rows = R + N;
    }

    // [x | z] = in_proj(norm(res))
    if (layer > 0 || !in_proj_of_ids(m, w, &in_proj, T, L)) {
        norm_rows(w->xn, w->res, f32(&p->norm), f32(&p->norm_bias), c->norm_eps, T, D, (size_t)D);
        matmul(w->xz, 2 * (size_t)E, w->xn, (size_t)D, &in_proj, f32(&p->in_bias), rows);
    }
    // u = silu(conv(x))
    Conv conv = {w->xz, p->conv_t, f32(&p->conv_bias), B, L, E, K};
    conv1d_silu(w->u, seq, &conv);
    // The selection: delta, B and C are functions of u. (Without FalconMamba's norms raw is xdb.)
    matmul(w->raw, (size_t)P, w->u, (size_t)E, &x_proj, NULL, rows);
    if (c->flags & FLAG_MIXER_NORM) { // FalconMamba: without norms large models became unstable
        norm_rows(dt_low, w->raw, NULL, NULL, c->mixer_eps, T, R, (size_t)P);
        norm_rows(B_ssm, w->raw + R, NULL, NULL, c->mixer_eps, T, N, (size_t)P);
        if (!state_only)
            norm_rows(C_ssm, w->raw + R + N, NULL, NULL, c->mixer_eps, T, N, (size_t)P);
    }
    matmul(w->delta, (size_t)E, dt_low, (size_t)P, &p->dt_proj, NULL, rows);
    softplus_bias(w->delta, f32(&p->dt_bias), rows, E);
    if (w->selection && (w->selection_layer < 0 || w->selection_layer == layer))
        add_row_means(w->selection, w->delta, w->selection_layer < 0 ? c->n_layer : 1, T, E);
    // y = the scan of u; g = y * silu(z)
    Scan s = {w->u, w->delta, p->A_neg, B_ssm, C_ssm, f32(&p->D_skip), (size_t)P, B, L, E, N};
    if (w->watch) {
#pragma omp barrier
#pragma omp single
        w->watch(w->watch_context, layer, seq, &s);
    }
    scan(state_only ? NULL : w->y, seq, &s, w->carry);
    if (state_only) return;
    gate(w->g, w->y, w->xz, rows, E);
    // next = res + out_proj(g); xn is free by now and takes out_proj's output
    matmul(w->xn, (size_t)D, w->g, (size_t)E, &p->out_proj, f32(&p->out_bias), rows);
    add_rows(w->next, w->res, w->xn, T, D);
}

// The model up to its last norm, for prefill (B = 1), step (L = 1) and training: B sequences of L
// tokens w->ids (T), states seq (n_layer,B). Returns the residual stream after all layers (T,D).
static const float *forward(const Model *m, Work *w, const LayerState *seq, int B, int L) {
    if (w->ids) embed(w->res, w->ids, &m->embedding, B * L); // else res has rows of the caller
    for (int layer = 0; layer < m->config.n_layer; layer++) {
        block(m, layer, w, seq + (size_t)layer * B, B, L);
        if (w->for_each_layer) w++; // its res is this one's next
    }
    // One Work: its next is its res, so res is the result. A Work for each layer: there is one more
    // than layers, and w is now that one, of which only res is used.
    return w->res;
}

// --- sequences and what runs them

typedef struct State { // one sequence at one moment; one allocation: the pointers lead into data
    uint64_t position; // tokens read
    uint64_t random;   // state of the sampler's generator
    uint64_t floats;   // how many numbers follow
    int32_t recent[RECENT], n_recent; // the last tokens: token at position p is recent[p % RECENT]
    Utf8Pending pending;              // bytes of a character that is not finished
    struct Acts *newer_on; // whose GPU has newer numbers than are here; NULL: these are the newest
    float *logits;         // (V) after the last token
    float *window;         // (n_layer,K-1,E) the last inputs of the convolutions
    float *h;              // (n_layer,N,E)
    float data[];
} State;

// Tokens that prefill takes at a time, so that memory does not depend on the prompt's length. Many,
// because the weights are read and packed once per piece. Wide models take fewer, so that a piece
// stays within some hundred megabytes.
enum { PIECE_MAX = 512, PIECE_MIN = 32 };
enum { LOGIT_ROWS = 32 }; // positions whose logits exist at a time
enum { BATCH_MAX = 32 };  // sequences of one step

typedef struct Acts { // what one pass at a time over one model needs
    int threads;      // team size
    int piece;        // rows that the arrays of work have room for
    Work work;
    LayerState *seq;   // (n_layer,B) of the sequences of the pass
    float *logits;     // (LOGIT_ROWS,V)
    float *probs;      // (V) the sampler's scratch
    int32_t *order;    // (BATCH_MAX,V) the sampler's scratch
    float *selection;  // (n) of the next prefill, or NULL, see mamba_selection()
    Gpu *gpu;          // NULL: everything runs on the processor
    State *gpu_state;  // the state that the GPU reads into
    State **gpu_batch; // (gpu_batch_n) of the GPU's last step of a batch; NULL: no longer there
    int gpu_batch_n;
    void *arena;
} Acts;

// --- where the model runs *: Acts with a gpu run there. A state's numbers are then newer on the
// GPU until somebody asks for them.

#ifdef MAMBA_CUDA
extern const GpuBackend mamba_gpu;
static const GpuBackend *const GPU = &mamba_gpu;
#else
static const GpuBackend *const GPU = NULL; // then no Acts gets a gpu
#endif

static int gpu_failed(void) { return fail("%s", GPU->error()); }

// The place of s in the GPU's batch; -1: it is the one that prefill reads into.
static int gpu_place(const Acts *a, const State *s) {
    int b = a->gpu_batch_n - 1;
    while (b >= 0 && a->gpu_batch[b] != s) b--;
    return b;
}

// The numbers of s are about to be set here: those on the GPU no longer count.
static void state_detach(State *s) {
    Acts *a = s->newer_on;
    int place = a ? gpu_place(a, s) : -1;
    if (place >= 0) a->gpu_batch[place] = NULL;
    else if (a) a->gpu_state = NULL;
    s->newer_on = NULL;
}

// Brings a state's numbers back from the GPU, where they are newer. 0, or -1 after fail().
static int state_fetch(const State *s) {
    State *to = (State *)(uintptr_t)s; // what s means stays the same
    Acts *a = s->newer_on;
    if (!a) return 0;
    int place = gpu_place(a, s);
    state_detach(to);
    return GPU->get_state(a->gpu, place, to->window, to->h, to->logits) ? gpu_failed() : 0;
}

// From now on the passes of these Acts run on the GPU. float32: its products are float32, whatever
// the weights are stored as. 0, or -1 after fail().
int mamba_acts_gpu(Acts *a, const Model *m, bool float32) {
    if (!GPU) return fail("this build has no GPU backend: make cuda");
    a->gpu = GPU->open(m, float32);
    return a->gpu ? 0 : gpu_failed();
}

COLD
#include "files/acts.h"
#include "files/state.h"
#include "files/state_file.h"
COLD_END

// --- prefill and step

// What to do with the logits (V) of each position in turn.
typedef void LogitsVisitor(void *context, const float *logits);

// Threads for a pass of so many tokens. A small pass runs alone, with the same bits: a team saves
// it little. Beside other programs a team crawls, since a barrier then waits for a time slice. With
// 7.4 M weights, on a quiet machine: a team 1,820 tokens/s, one thread 1,240. On a busy one: a team
// 16, one thread 700 to 1,500.
static int pass_team(const Model *m, const Acts *a, int tokens) {
    return (double)m->n_params * tokens < 16e6 ? 1 : a->threads;
}

// s has read n more tokens.
static void state_advance(State *s, const int32_t *ids, size_t n) {
    for (size_t t = n > RECENT ? n - RECENT : 0; t < n; t++)
        s->recent[(s->position + t) % RECENT] = ids[t];
    s->position += n;
    s->n_recent = s->position < RECENT ? (int32_t)s->position : RECENT;
}

// seq (n_layer,B): where the layers of B states lie.
static void layer_states(LayerState *seq, const Model *m, State *const *s, int B) {
    const Config *c = &m->config;
    const size_t window = (size_t)(c->K - 1) * c->E, NE = (size_t)c->N * c->E;
    for (int layer = 0; layer < c->n_layer; layer++)
        for (int b = 0; b < B; b++)
            seq[(size_t)layer * B + b] =
                (LayerState){s[b]->window + window * layer, s[b]->h + NE * layer};
}

// The logits of every row of res (L,D), LOGIT_ROWS at a time, for visit; the last ones stay in s.
static void visit_logits(const Model *m, Acts *a, State *s, const float *res, int L,
                         LogitsVisitor *visit, void *context) {
    const Config *c = &m->config;
    const size_t D = (size_t)c->D, V = (size_t)c->V;
    float *xn = a->work.xn;
    norm_rows(xn, res, f32(&m->norm_f), f32(&m->norm_f_bias), c->norm_eps, L, c->D, D);
    for (int t = 0; t < L; t += LOGIT_ROWS) {
        int rows = L - t < LOGIT_ROWS ? L - t : LOGIT_ROWS;
        matmul(a->logits, V, xn + (size_t)t * D, D, &m->head, NULL,
               (Rows){rows, false, a->work.packed});
#pragma omp single
        for (int r = 0; r < rows; r++) visit(context, a->logits + (size_t)r * V);
    }
#pragma omp single
    memcpy(s->logits, a->logits + (size_t)((L - 1) % LOGIT_ROWS) * V, V * sizeof(float));
}

// The logits after the last token of each sequence, res (B L,D), into the states.
static void last_logits(const Model *m, Acts *a, State *const *s, const float *res, int B, int L) {
    const Config *c = &m->config;
    const size_t D = (size_t)c->D, V = (size_t)c->V;
    float *logits = B == 1 ? s[0]->logits : a->logits;
    norm_rows(a->work.xn, res + (L - 1) * D, f32(&m->norm_f), f32(&m->norm_f_bias), c->norm_eps, B,
              c->D, L * D);
    matmul(logits, V, a->work.xn, L * D, &m->head, NULL, (Rows){B, true, a->work.packed});
    if (B == 1) return;
#pragma omp for
    for (int b = 0; b < B; b++) memcpy(s[b]->logits, logits + b * V, V * sizeof(float));
}

typedef struct {          // one pass: B sequences of L tokens, B L at most Acts.piece
    State *const *states; // (B)
    const int32_t *ids;   // (B,L)
    int B, L;
    bool more;            // more of the same text follows, and only the states count
    LogitsVisitor *visit; // gets the logits of every position of the one sequence; or NULL
    void *context;
} Reading;

// Reads tokens into states, by a team of threads. The states' logits become those after the last
// token, unless r->more.
static void run_pass(const Model *m, Acts *a, const Reading *r) {
    const int B = r->B, L = r->L, team = pass_team(m, a, B * L);
    (void)team; // not read without OpenMP
    a->work.ids = r->ids;
    a->work.state_only = r->more && !r->visit;
    layer_states(a->seq, m, r->states, B);
#pragma omp parallel num_threads(team)
    {
        const float *res = forward(m, &a->work, a->seq, B, L);
        if (r->visit) visit_logits(m, a, r->states[0], res, L, r->visit, r->context);
        else if (!r->more) last_logits(m, a, r->states, res, B, L);
    }
    for (int b = 0; b < B; b++) state_advance(r->states[b], r->ids + (size_t)b * L, (size_t)L);
}

static int check_ids(const Model *m, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->config.V)
            return fail("token id %d at position %zu is not in the vocabulary of %d", ids[i], i,
                        m->config.V);
    return 0;
}

#include "files/on_gpu.h"

// Reads n tokens into the state: any number, in memory that does not grow with it. Leaves the
// logits after the last one in the state, and hands every position's to visit where that is not
// NULL. 0, or -1 after fail(): the state is untouched, unless a GPU failed.
int mamba_prefill(const Model *m, Acts *a, State *s, const int32_t *ids, size_t n,
                  LogitsVisitor *visit, void *context) {
    if (check_ids(m, ids, n)) return -1;
    if (a->gpu) return prefill_gpu(a, s, ids, n, visit, context);
    if (state_fetch(s)) return -1;
    for (size_t done = 0; done < n;) {
        int L = n - done < (size_t)a->piece ? (int)(n - done) : a->piece;
        a->work.selection = a->selection ? a->selection + done : NULL;
        done += (size_t)L;
        Reading r = {&s, ids + done - L, 1, L, done < n, visit, context};
        run_pass(m, a, &r);
    }
    return 0;
}

// The next prefills on the processor add to means (n), which start as zeros, the mean of delta over
// the channels for each of their n tokens: how far each is let into the state. layer -1: the mean
// of all layers. means NULL: no longer.
void mamba_selection(Acts *a, float *means, int layer) {
    a->selection = means;
    a->work.selection_layer = layer;
}

// Reads ids[b] into s[b], B different states, at most BATCH_MAX; on a GPU any number. Every weight
// is read once for all of them, and each gets the same bits as alone. 0, or -1 after fail(), the
// states untouched.
int mamba_step_batch(const Model *m, Acts *a, State *const *s, const int32_t *ids, int B) {
    if (check_ids(m, ids, (size_t)B)) return -1;
    if (a->gpu) return step_batch_gpu(a, s, ids, B);
    assert(B >= 1 && B <= BATCH_MAX && B <= LOGIT_ROWS && B <= a->piece);
    for (int b = 0; b < B; b++)
        if (state_fetch(s[b])) return -1;
    a->work.selection = NULL;
    run_pass(m, a, &(Reading){.states = s, .ids = ids, .B = B, .L = 1});
    return 0;
}

// Reads one token. 0, or -1 after fail().
int mamba_step(const Model *m, Acts *a, State *s, int32_t id) {
    return a->gpu ? mamba_prefill(m, a, s, &id, 1, NULL, NULL) : mamba_step_batch(m, a, &s, &id, 1);
}

// -log of the probability that logits (V) give to id, in nats; NaN where they are not numbers. For
// a LogitsVisitor, or for the logits of a state.
double mamba_nll(const Model *m, const float *logits, int32_t id) {
    return log_sum_exp(logits, m->config.V) - (double)logits[id];
}

#include "files/evaluate.h"
#include "files/prefill_rows.h"
#include "files/quantizer.h"
COLD
#include "files/verify.h"
COLD_END

// -------------------------------------------------------------------------------------------------
// 5 Learning
// Weights, gradients and the optimizer's two moments are four arrays of one layout, all float32. A
// pass takes B sequences of L tokens. Each layer has a Work that keeps what the forward pass
// computed, but for four things that the backward pass computes again: xn and g (all layers share
// one array of each), the convolution before SiLU, and the states of the scan.
//
// A sequence may be longer than the memory for Works allows: it is then cut into chunks. A later
// chunk depends on an earlier one only through the states at the border between them, h and the
// window of each layer. So the chain rule needs nothing but the gradient of these states, d_h
// and d_window. First the chunks run forward in order, and only the states at their starts are
// kept. Then, from the last chunk to the first, each runs forward again from its start, now
// keeping its Works, and backward, from the d_h and d_window that the chunk after it left. The
// gradient is exact, not cut off at the borders. The price is one more forward pass of all
// chunks but the last. The memory is that of one chunk, and of the states at every start:
// n_layer (N + K - 1) E floats per sequence and chunk, 3 MB for 130M parameters.

static double random_normal(uint64_t *state) { // Box-Muller, one of the pair
    double r = sqrt(-2 * log(1 - random_unit(state)));
    return r * cos(6.283185307179586 * random_unit(state));
}

// As the reference implementation starts: dt_bias so that softplus(dt_bias) is log-uniform in
// [0.001, 0.1]; A = -1 .. -N; out_proj divided by the root of n_layer, so that the variance of the
// residual stream does not grow with the number of layers.
static float initial_value(Init init, int fan_in, int column, int n_layer, uint64_t *random) {
    double uniform = 2 * random_unit(random) - 1, range = 1 / sqrt((double)fan_in);
    if (init == INIT_ONES) return 1;
    if (init == INIT_ZEROS) return 0;
    if (init == INIT_NORMAL) return (float)(0.02 * random_normal(random));
    if (init == INIT_OUT) return (float)(uniform * range / sqrt((double)n_layer));
    if (init == INIT_A_LOG) return logf((float)(column + 1));
    if (init == INIT_DT_BIAS) {
        double dt = exp((uniform + 1) / 2 * log(100)) * 0.001;
        return (float)(dt + log(-expm1(-dt))); // the inverse of softplus
    }
    return (float)(uniform * range); // INIT_LINEAR, INIT_CONV, INIT_DT
}

COLD
#include "files/random_model.h"
COLD_END

// --- loss and backward

enum { LOSS_ROWS = 128 }; // rows of logits that exist at a time

typedef struct Trainer {
    Model *model, *gradient; // gradient: the same tensors, holding d_ of each
    float *moment, *moment2; // AdamW's, in the same layout
    int B, L, threads;       // sequences of a pass, tokens of each
    int chunk;               // of these, so many at a time; 0: all
    int tokens;              // of each sequence in the chunk in hand: T = B * tokens rows
    GpuTrainer *gpu;         // where everything below and the arenas live instead; NULL: here
    bool gpu_newer;          // weights, moments, states on the GPU are newer than those here
    uint64_t step;           // optimizer steps taken
    Work *work;              // (n_layer + 1) what backward needs of each layer; of the last, res
    int32_t *ids, *targets;  // (T) of the chunk in hand
    LayerState *seq;         // (n_layer,B) states of a pass
    float *h0, *window0;     // (chunks,n_layer,B,N,E), (chunks,n_layer,B,K-1,E): the states at the
                             // start of each chunk
    float *h, *window;       // (n_layer,B,N,E), (n_layer,B,K-1,E): where seq points
    float *d_h, *d_window;   // the same shapes: gradients of the states after the chunk in hand
    LayerState carried;      // (places,n_layer,B,..): states that a pass leaves to a later one
    int places;              // of carried, see mamba_trainer_carry(); 0: none
    LayerState end;          // where the states after this pass go; NULL: nowhere
    float *d_res, *d_xn;     // (T,D)
    float *d_xz;             // (T,2E)
    float *d_u, *d_delta;    // (T,E)
    float *d_y;              // (T,E)
    float *d_xdb;            // (T,P)
    float *d_c;              // (L,E) scratch of the convolution
    float *scale;            // (2,T) scratch of the norms
    float *losses;           // (T)
    float *logits;           // (LOSS_ROWS,V), then their gradient
    float *scan;             // scratch of the scan
    void *arena;             // of everything from work on
} Trainer;                   // made by mamba_trainer_new(), see files/trainer.h

COLD
#include "files/ranks_tcp.h"
#include "files/trainer.h"
COLD_END

static float *grad(const Tensor *w) { return (float *)(uintptr_t)w->data; } // NULL: an absent bias

static int chunks_of(const Trainer *tr) {
    return tr->chunk ? (tr->L + tr->chunk - 1) / tr->chunk : 1;
}

// Where the states of a layer at the start of a chunk lie, of all sequences.
static LayerState start_of(const Trainer *tr, int chunk, int layer) {
    const Config *c = &tr->model->config;
    const size_t at = ((size_t)chunk * c->n_layer + layer) * tr->B * c->E;
    return (LayerState){tr->window0 + at * (c->K - 1), tr->h0 + at * c->N};
}

// Copies n floats; a team shares the loop.
static void copy_state(float *to, const float *from, size_t n) {
#pragma omp for
    for (size_t i = 0; i < n; i++) to[i] = from[i];
}

// One chunk forward, from the states at its start. Those at its end become the start of the next,
// or of a later pass.
static const float *chunk_forward(Trainer *tr, int chunk) {
    const Config *c = &tr->model->config;
    const size_t floats = (size_t)c->n_layer * tr->B * c->E, NE = c->N * floats;
    const size_t windows = (c->K - 1) * floats;
    const LayerState start = start_of(tr, chunk, 0);
    copy_state(tr->h, start.h, NE);
    copy_state(tr->window, start.window, windows);
    const float *res = forward(tr->model, tr->work, tr->seq, tr->B, tr->tokens);
    const bool last = chunk + 1 == chunks_of(tr);
    const LayerState next = last ? tr->end : start_of(tr, chunk + 1, 0);
    if (next.h) {
        copy_state(next.h, tr->h, NE);
        copy_state(next.window, tr->window, windows);
    }
    return res;
}

// block() backwards, line by line from its end. d_res: the gradient after the layer, becomes that
// before it. The layer's d_h and d_window: those of the states at the end of the chunk, become
// those at its start.
static void block_backward(Trainer *tr, int layer, int chunk) {
    const Config *c = &tr->model->config;
    const Layer *p = &tr->model->layer[layer], *d = &tr->gradient->layer[layer];
    const Work *w = &tr->work[layer];
    const int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N,
              T = tr->B * tr->tokens;
    const Rows rows = {T, false, w->packed};
    const LayerState start = start_of(tr, chunk, layer);
    float *d_h = tr->d_h + (size_t)layer * tr->B * N * E;
    float *d_window = tr->d_window + (size_t)layer * tr->B * (K - 1) * E;

    // next = res + out_proj(g): d_g (in d_y); then g again, which the weight's gradient needs
    matmul_backward(&(MatmulGrad){.d_x = tr->d_y}, tr->d_res, (size_t)D, NULL, (size_t)E,
                    &p->out_proj, rows);
    gate_backward(tr->d_y, tr->d_xz, w->g, tr->d_y, w->y, w->xz, T, E);
    MatmulGrad d_out = {.d_W = grad(&d->out_proj), .d_bias = grad(&d->out_bias)};
    matmul_backward(&d_out, tr->d_res, (size_t)D, w->g, (size_t)E, &p->out_proj, rows);

    // y = the scan of u
    Scan s = {w->u,  w->delta,   p->A_neg, w->xdb + R, w->xdb + R + N, f32(&p->D_skip), (size_t)P,
              tr->B, tr->tokens, E,        N};
    ScanGrad d_scan = {tr->d_u,         tr->d_delta,      tr->d_xdb + R, tr->d_xdb + R + N,
                       grad(&d->A_log), grad(&d->D_skip), d_h,           tr->scan};
    scan_backward(&d_scan, tr->d_y, &s, start.h);

    // delta = softplus(dt_proj(dt_low) + dt_bias)
    softplus_backward(tr->d_delta, w->delta, T, E);
    sum_rows(grad(&d->dt_bias), tr->d_delta, (size_t)E, T, E);
    MatmulGrad d_dt = {.d_x = tr->d_xdb, .d_W = grad(&d->dt_proj)};
    matmul_backward(&d_dt, tr->d_delta, (size_t)E, w->xdb, (size_t)P, &p->dt_proj, rows);
    for (int part = 0; part < 3 && (c->flags & FLAG_MIXER_NORM); part++) {
        int at = part ? R + (part - 1) * N : 0, n = part ? N : R; // dt_low, B_ssm, C_ssm
        norm_rows_backward(&(NormGrad){.d_x = tr->d_xdb + at, .scale = tr->scale}, tr->d_xdb + at,
                           w->raw + at, NULL, c->mixer_eps, T, n, (size_t)P);
    }
    // xdb = x_proj(u): u's second source
    MatmulGrad d_x_proj = {.d_x = tr->d_u, .add = true, .d_W = grad(&d->x_proj)};
    matmul_backward(&d_x_proj, tr->d_xdb, (size_t)P, w->u, (size_t)E, &p->x_proj, rows);

    // u = silu(conv(x))
    Conv conv = {w->xz, p->conv_t, f32(&p->conv_bias), tr->B, tr->tokens, E, K};
    ConvGrad d_conv = {tr->d_xz, grad(&d->conv), grad(&d->conv_bias), d_window, tr->d_c};
    conv1d_silu_backward(&d_conv, tr->d_u, start.window, &conv);

    // [x | z] = in_proj(norm(res)); xn again
    norm_rows(w->xn, w->res, f32(&p->norm), f32(&p->norm_bias), c->norm_eps, T, D, (size_t)D);
    MatmulGrad d_in = {.d_x = tr->d_xn, .d_W = grad(&d->in_proj), .d_bias = grad(&d->in_bias)};
    matmul_backward(&d_in, tr->d_xz, 2 * (size_t)E, w->xn, (size_t)D, &p->in_proj, rows);
    // The residual goes past the layer unchanged: d_res stays, and the norm's gradient is added.
    NormGrad d_norm = {.d_x = tr->d_res,
                       .add = true,
                       .d_weight = grad(&d->norm),
                       .d_bias = grad(&d->norm_bias),
                       .scale = tr->scale};
    norm_rows_backward(&d_norm, tr->d_xn, w->res, f32(&p->norm), c->norm_eps, T, D, (size_t)D);
}

// The head and the loss, LOSS_ROWS rows at a time, after the last layer's res (T,D): losses (T),
// and, where backward, d_res and the gradients of head and norm_f.
static void loss_pass(Trainer *tr, const float *res, const int32_t *targets, float weight,
                      bool backward) {
    Model *m = tr->model, *d = tr->gradient;
    const int D = m->config.D, V = m->config.V, T = tr->B * tr->tokens;
    const float eps = m->config.norm_eps;
    float *xn_of_all = tr->work->xn; // the layers share it, and it is free here
    norm_rows(xn_of_all, res, f32(&m->norm_f), f32(&m->norm_f_bias), eps, T, D, (size_t)D);
    for (int t = 0; t < T; t += LOSS_ROWS) {
        const Rows rows = {T - t < LOSS_ROWS ? T - t : LOSS_ROWS, false, tr->work->packed};
        const float *xn = xn_of_all + (size_t)t * D;
        matmul(tr->logits, (size_t)V, xn, (size_t)D, &m->head, NULL, rows);
        cross_entropy(tr->losses + t, tr->logits, targets + t, weight, rows.T, V);
        // A tied head is the embedding, and so is its gradient.
        MatmulGrad d_head = {.d_x = tr->d_xn + (size_t)t * D, .d_W = grad(&d->head)};
        if (backward)
            matmul_backward(&d_head, tr->logits, (size_t)V, xn, (size_t)D, &m->head, rows);
    }
    NormGrad d_norm = {.d_x = tr->d_res,
                       .d_weight = grad(&d->norm_f),
                       .d_bias = grad(&d->norm_f_bias),
                       .scale = tr->scale};
    if (backward) norm_rows_backward(&d_norm, tr->d_xn, res, f32(&m->norm_f), eps, T, D, (size_t)D);
}

// One chunk of all sequences: forward only, to know the states at its end; forward and the loss; or
// both and backward. Returns the sum of its losses.
typedef enum { STATES, LOSS, BACKWARD } ChunkPass;
static double chunk_pass(Trainer *tr, int chunk, const int32_t *ids, const int32_t *targets,
                         float weight, ChunkPass kind) {
    const Config *c = &tr->model->config;
    const int t0 = chunk * tr->chunk, rest = tr->L - t0;
    tr->tokens = tr->chunk && rest > tr->chunk ? tr->chunk : rest;
    const int T = tr->B * tr->tokens,
              team = (double)tr->model->n_params * T < 4e6 ? 1 : tr->threads;
    (void)team; // not read without OpenMP
    for (int b = 0; b < tr->B; b++) {
        const size_t from = (size_t)b * tr->L + t0, bytes = (size_t)tr->tokens * sizeof *ids;
        memcpy(tr->ids + (size_t)b * tr->tokens, ids + from, bytes);
        memcpy(tr->targets + (size_t)b * tr->tokens, targets + from, bytes);
    }
#pragma omp parallel num_threads(team)
    {
        const float *res = chunk_forward(tr, chunk);
        if (kind != STATES) loss_pass(tr, res, tr->targets, weight, kind == BACKWARD);
        for (int layer = c->n_layer - 1; layer >= 0 && kind == BACKWARD; layer--)
            block_backward(tr, layer, chunk);
        if (kind == BACKWARD)
            embed_backward(grad(&tr->gradient->embedding), tr->d_res, tr->ids, T, c->D);
    }
    double sum = 0;
    for (int t = 0; t < T && kind != STATES; t++) sum += (double)tr->losses[t];
    return sum;
}

// Adds the gradient of weight * (sum of -log p(target)) to tr->gradient, for ids and targets (B,L),
// all below V; a target of -1 does not count. Returns the sum of the losses, without weight; NaN
// after fail(), where a GPU failed. backward false: the loss only. place -1: the sequences begin,
// with states of zeros. Else they go on from the states that mamba_trainer_carry() keeps at this
// place, and leave there those at their end; no gradient goes back to what was read before this
// pass.
double mamba_train_pass_on(Trainer *tr, int place, const int32_t *ids, const int32_t *targets,
                           float weight, bool backward) {
    const Config *c = &tr->model->config;
    const int chunks = chunks_of(tr);
    double sum = 0;
    if (place >= tr->places) return fail("place %d of %d carried", place, tr->places), NAN;
    tr->gpu_newer |= place >= 0;
    if (tr->gpu && GPU->train_pass(tr->gpu, place, ids, targets, weight, backward, &sum))
        return gpu_failed(), NAN;
    if (tr->gpu) return sum;
    if (!tr->arena) return fail("the trainer has no memory for a pass"), NAN;
    memset(tr->d_h, 0, (size_t)c->n_layer * tr->B * c->N * c->E * sizeof(float));
    memset(tr->d_window, 0, (size_t)c->n_layer * tr->B * (c->K - 1) * c->E * sizeof(float));
    set_start(tr, place);
    for (int chunk = 0; chunk < chunks - 1 && backward; chunk++)
        chunk_pass(tr, chunk, ids, targets, weight, STATES);
    for (int chunk = chunks - 1; chunk >= 0 && backward; chunk--)
        sum += chunk_pass(tr, chunk, ids, targets, weight, BACKWARD);
    for (int chunk = 0; chunk < chunks && !backward; chunk++)
        sum += chunk_pass(tr, chunk, ids, targets, weight, LOSS);
    return sum;
}
double mamba_train_pass(Trainer *tr, const int32_t *ids, const int32_t *targets, float weight,
                        bool backward) {
    return mamba_train_pass_on(tr, -1, ids, targets, weight, backward);
}

// --- AdamW (Loshchilov & Hutter 2019). With g the gradient of a weight w, clipped, at step s:
//
//     m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//     w = w (1 - rate decay) - rate (m / (1 - beta1^s)) / (sqrt(v / (1 - beta2^s)) + epsilon)
//
// The divisors undo the bias of moments that begin as zeros. Vectors and A_log do not decay: see
// the column `decays` of TENSORS_LAYER.

typedef struct {
    const Trainer *tr;
    const AdamW *how;
    double squares;         // of all gradients
    float scale;            // what clipping leaves of them
    double unbias, unbias2; // the divisors of m and v: 1 - beta^step
    const float *base;      // of the weights' arena
    char bad[LABEL];        // first tensor whose gradient is not finite
} AdamWPass;

// Where the elements of w lie in another arena of the same layout.
static float *beside(const AdamWPass *p, const Tensor *w, float *arena) {
    return arena + ((const float *)w->data - p->base);
}

// Adds the squares of w's gradient to the pass.
static void norm_tensor(void *context, const TensorInfo *info, Tensor *w) {
    AdamWPass *p = context;
    double sum = sum_squares(beside(p, w, p->tr->gradient->weights), tensor_elements(w));
    if (!(sum - sum == 0) && !p->bad[0]) tensor_label(p->bad, info); // NaN or infinity
    p->squares += sum;
}

static void adamw_tensor(void *context, const TensorInfo *info, Tensor *w) {
    AdamWPass *p = context;
    const AdamW *how = p->how;
    float *weights = beside(p, w, p->tr->model->weights),
          *gradients = beside(p, w, p->tr->gradient->weights);
    float *moments = beside(p, w, p->tr->moment), *moments2 = beside(p, w, p->tr->moment2);
    float keep = info->decays ? 1 - how->rate * how->decay : 1,
          rate = (float)(how->rate / p->unbias);
    float root = (float)(1 / sqrt(p->unbias2)), scale = p->scale;
    float beta1 = how->beta1, beta2 = how->beta2, epsilon = how->epsilon;
#pragma omp parallel for num_threads(p->tr->threads)
    for (int row = 0; row < w->rows; row++) {
        size_t at = (size_t)row * w->cols;
        float *restrict weight = weights + at, *restrict gradient = gradients + at,
                        *restrict m = moments + at, *restrict v = moments2 + at;
        for (int i = 0; i < w->cols; i++) {
            float d_w = gradient[i] * scale;
            m[i] = beta1 * m[i] + (1 - beta1) * d_w;
            v[i] = beta2 * v[i] + (1 - beta2) * d_w * d_w;
            weight[i] = weight[i] * keep - rate * m[i] / (sqrtf(v[i]) * root + epsilon);
            gradient[i] = 0;
        }
    }
}

// Takes one step, then sets the gradient to zero. *norm gets its length before clipping. 0, or -1
// after fail() with the weights untouched, where a gradient is not finite.
int mamba_train_step(Trainer *tr, const AdamW *how, double *norm) {
    if (tr->gpu) {
        tr->gpu_newer = true;
        if (GPU->train_step(tr->gpu, how, tr->step + 1, norm)) return gpu_failed();
        tr->step++;
        return 0;
    }
    AdamWPass p = {.tr = tr, .how = how, .scale = 1, .base = tr->model->weights};
    each_tensor(tr->model, norm_tensor, &p);
    *norm = sqrt(p.squares);
    if (p.bad[0])
        return fail("step %llu: the gradient of %s is not finite", (unsigned long long)tr->step + 1,
                    p.bad);
    if (how->clip > 0 && *norm > how->clip) p.scale = (float)(how->clip / (*norm + 1e-6));
    tr->step++;
    p.unbias = 1 - pow(how->beta1, (double)tr->step);
    p.unbias2 = 1 - pow(how->beta2, (double)tr->step);
    each_tensor(tr->model, adamw_tensor, &p);
    refresh_derived(tr->model);
    return 0;
}

COLD
#include "files/checkpoint.h"
COLD_END

// -------------------------------------------------------------------------------------------------
// 6 Writing
// In this order: repeat penalty, temperature, top-k, top-p, min-p, then one draw. Ids that the
// tokenizer does not know (the padding of a vocabulary) are never drawn. Candidates leave a heap
// one by one, the likeliest first: no more are sorted than top-k, top-p and min-p look at.

static void heap_down(int32_t *heap, int n, int i, const float *probs) {
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && probs[heap[child + 1]] > probs[heap[child]]) child++;
        if (!(probs[heap[child]] > probs[heap[i]])) return;
        int32_t swap = heap[i];
        heap[i] = heap[child];
        heap[child] = swap;
    }
}

// Moves the likeliest of order[0..n) to its end, keeping the rest a heap.
static void heap_pop(int32_t *order, int n, const float *probs) {
    int32_t best = order[0];
    order[0] = order[n - 1];
    order[n - 1] = best;
    heap_down(order, n - 1, 0, probs);
}

static void penalise_recent(const State *s, float *logits, float penalty) {
    for (int i = 0; i < s->n_recent; i++) {
        bool seen = false; // a token is penalised once, however often it occurs
        for (int j = 0; j < i && !seen; j++) seen = s->recent[j] == s->recent[i];
        float *logit = &logits[s->recent[i]];
        if (!seen) *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
    }
}

// What top-k, top-p and min-p keep of n candidates. On return they lie at the end of order: the
// likeliest is order[n-1], the next order[n-2] ... Returns how many; *kept_sum gets the sum of
// their probs. probs need not add up to 1, so top_p is a share of the sum of what top-k keeps.
static int keep_likeliest(int32_t *order, int n, const float *probs, const Sampling *how,
                          double *kept_sum) {
    const int k = how->top_k > 0 && how->top_k < n ? how->top_k : n;
    int sorted = 0, kept = 0; // of order, from its end
    double sum_of_k = 0, sum = 0;
    for (int i = n / 2 - 1; i >= 0; i--) heap_down(order, n, i, probs);
    for (; k < n && sorted < k; sorted++) { // top-p must know this sum before it starts
        heap_pop(order, n - sorted, probs);
        sum_of_k += probs[order[n - 1 - sorted]];
    }
    for (int i = 0; k == n && i < n; i++) sum_of_k += probs[order[i]];
    while (kept < k && !(kept && sum >= how->top_p * sum_of_k)) {
        if (kept >= sorted) heap_pop(order, n - sorted++, probs);
        float p = probs[order[n - 1 - kept]];
        if (kept && p < how->min_p * probs[order[n - 1]]) break;
        sum += p;
        kept++;
    }
    *kept_sum = sum;
    return kept;
}

// Draws the next token of s. Returns its id, or -1 where none can be drawn, or -2 - v where logit v
// is not finite. logits and order (V) are scratch. Writes nothing but its arguments: threads may
// draw for different states.
static int32_t draw(const Model *m, float *logits, int32_t *order, State *s, const Sampling *how) {
    int V = m->config.V, n = 0;
    float highest = -INFINITY;
    memcpy(logits, s->logits, (size_t)V * sizeof(float));
    for (int v = 0; v < V; v++) // NaN and infinity both make x - x something else than 0
        if (logits[v] - logits[v] != 0) return -2 - v;
    if (how->repeat_penalty != 1) penalise_recent(s, logits, how->repeat_penalty);
    int32_t likeliest = -1;
    for (int v = 0; v < V; v++) {
        if (m->tokenizer && !tokenizer_has(m->tokenizer, v)) continue;
        order[n++] = v;
        if (logits[v] > highest) {
            highest = logits[v];
            likeliest = v;
        }
    }
    if (likeliest < 0 || highest > FLT_MAX) return -1;
    if (how->temperature == 0) return likeliest;
    float *probs = logits; // not normalised: the random number is multiplied by their sum
    double sum = 0;
    for (int i = 0; i < n; i++) {
        probs[order[i]] = expf((logits[order[i]] - highest) / how->temperature);
        sum += probs[order[i]];
    }
    bool all = how->top_p >= 1 && how->min_p <= 0 && (how->top_k <= 0 || how->top_k >= n);
    int kept = all ? n : keep_likeliest(order, n, probs, how, &sum);
    // A point between 0 and the sum: the token in whose interval it falls is drawn.
    double point = random_unit(&s->random) * sum;
    for (int i = n - 1; i > n - kept; i--) {
        point -= probs[order[i]];
        if (point < 0) return order[i];
    }
    return order[n - kept]; // the last of them, also where rounding left a rest
}

static int draw_failed(int32_t id) {
    if (id == -1)
        return fail("no token can be drawn: the tokenizer knows none, or the logits overflow");
    return fail("the logit of token %d is not finite: run `info --verify`", -2 - id);
}

// The next token, drawn from the logits in s with s's random generator; -1 after fail().
int32_t mamba_sample(const Model *m, Acts *a, State *s, const Sampling *how) {
    if (s->position == 0) return fail("nothing to continue: the state has read no token");
    int32_t id = draw(m, a->probs, a->order, s, how);
    return id < 0 ? draw_failed(id) : id;
}

// The next token of each of B different states, at most BATCH_MAX, as mamba_sample draws it: ids
// (B). The logits must be in the states: on a GPU they are there after mamba_prefill() and
// mamba_step_batch(), but not after mamba_generate(). 0, or -1 after fail().
int mamba_sample_batch(const Model *m, Acts *a, State *const *s, const Sampling *how, int32_t *ids,
                       int B) {
    const size_t V = (size_t)m->config.V;
    assert(B >= 1 && B <= BATCH_MAX && B <= LOGIT_ROWS && B <= a->piece);
    for (int b = 0; b < B; b++)
        if (s[b]->position == 0) return fail("nothing to continue: a state has read no token");
    int team = pass_team(m, a, B);
    (void)team; // not read without OpenMP
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (int b = 0; b < B; b++) // a->logits is free: every state has its own logits by now
        ids[b] = draw(m, a->logits + (size_t)b * V, a->order + (size_t)b * V, s[b], how);
    for (int b = 0; b < B; b++)
        if (ids[b] < 0) return draw_failed(ids[b]);
    return 0;
}

// Encodes the pieces of a text as one text. The caller gives *ids back by mamba_release(). Where a
// piece is not `special`, such as what a user wrote in a chat, no special token is found in it. 0,
// or -1 after fail().
int mamba_encode_pieces(const Model *m, const TextPiece *pieces, size_t n_pieces, int32_t **ids,
                        size_t *n) {
    if (!m->tokenizer) return fail("this model has no tokenizer: give token ids");
    return tokenizer_encode(m->tokenizer, pieces, n_pieces, ids, n);
}

// The same of one text, in which special tokens are found.
int mamba_encode(const Model *m, const char *text, size_t bytes, int32_t **ids, size_t *n) {
    return mamba_encode_pieces(m, &(TextPiece){text, bytes, true}, 1, ids, n);
}

// The token that the tokenizer wants before a prompt, or -1. mamba_encode() does not add it.
int32_t mamba_prompt_bos(const Model *m) { return m->tokenizer ? tokenizer_bos(m->tokenizer) : -1; }

// The text that token id adds to what s has written so far: whole UTF-8 characters only; the bytes
// of an unfinished one wait in s, and what cannot become a character turns into U+FFFD. A bytes
// tokenizer's bytes pass as they are. id -1: the end, what still waits. out needs room for
// m->text_room bytes; returns how many it got.
size_t mamba_decode(const Model *m, State *s, int32_t id, unsigned char *out) {
    if (id < 0) return utf8_flush(m->tokenizer, &s->pending, out);
    return m->tokenizer ? tokenizer_decode(m->tokenizer, &s->pending, id, out) : 0;
}

#include "files/chat.h"

// --- the loop that writes text

// What mamba_generate() does with the text (n bytes) that token id adds: whole characters, maybe
// none. id -1: the rest, at the end. Returns true to stop.
typedef bool TextEmitter(void *context, int32_t id, const unsigned char *text, size_t n);

typedef enum { ENDED_BY_LENGTH, ENDED_BY_EOS, ENDED_BY_EMIT } Ended;

typedef struct {
    Sampling sampling;
    long most;       // tokens; below 0: no limit
    bool ignore_eos; // write on after an end-of-text token
    bool goes_on;    // the state is used afterwards, and an unfinished character stays in it
    TextEmitter *emit;
    void *context; // of emit
    Ended ended;   // set: why writing ended
} Writing;

static bool is_eos(const Config *c, int32_t id) {
    for (int i = 0; i < 4; i++)
        if (c->eos[i] == id) return true;
    return false;
}

// Writes on after what s has read: draw a token, emit its text, read it, and again. The last token
// is read too. Where nobody uses the state afterwards, a GPU draws and reads several tokens at a
// time, a burst. Returns how many tokens were written, or -1 after fail().
long mamba_generate(const Model *m, Acts *a, State *s, Writing *w) {
    const bool bursts = a->gpu && !w->goes_on;
    unsigned char *text = memory_get(m->text_room + 1); // a model without a tokenizer has no text
    if (!text) return fail("out of memory: a token of %zu bytes", m->text_room);
    Burst burst = {.left = w->most};
    long written = 0;
    bool failed = false;
    w->ended = ENDED_BY_LENGTH;
    while ((w->most < 0 || written < w->most) && w->ended == ENDED_BY_LENGTH && !failed) {
        int32_t id = bursts ? burst_next(&burst, m, a, s, &w->sampling)
                            : mamba_sample(m, a, s, &w->sampling);
        if (id < 0) failed = true;
        else if (is_eos(&m->config, id) && !w->ignore_eos) w->ended = ENDED_BY_EOS;
        else {
            size_t n = mamba_decode(m, s, id, text);
            if (w->emit(w->context, id, text, n)) w->ended = ENDED_BY_EMIT;
            if (!bursts && mamba_step(m, a, s, id)) failed = true;
            written++;
        }
    }
    if (!failed && !w->goes_on && w->ended != ENDED_BY_EMIT)
        w->emit(w->context, -1, text, mamba_decode(m, s, -1, text));
    memory_free(text);
    return failed ? -1 : written;
}

// -------------------------------------------------------------------------------------------------
// 7 Commands and main

#ifndef MAMBA_NO_MAIN
COLD
#include "cli/help.h"
#include "cli/options.h"
#include "cli/output.h"
#include "cli/prompt.h"
#include "cli/generate.h"
#include "cli/selection.h"
#include "cli/several.h"
#include "cli/session.h"
#include "cli/command_generate.h"
#include "cli/inspect.h"
#include "cli/data.h"
#include "cli/tasks.h"
#include "cli/eval.h"
#include "cli/run_files.h"
#include "cli/train.h"
#include "cli/quantize.h"
COLD_END
#include "cli/bench.h"

COLD
#include "cli/commands.h"

#ifndef TESTING
int main(int argc, char **argv) {
    prepare_process();
    argv = program_arguments(&argc, argv);
    int result = take_level(&argc, argv) ? -1 : run_command(argc, argv);
    if ((fflush(stdout) || ferror(stdout)) && !result)
        result = fail("stdout: cannot write: %s", strerror(errno));
    if (result) fprintf(stderr, "mamba: %s\n", *error_text ? error_text : "out of memory");
    return result ? 1 : 0;
}
#endif
COLD_END
#endif // MAMBA_NO_MAIN
#endif // MAMBA_LEVEL
#endif // MAMBA_TYPES_ONLY
