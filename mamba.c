// clang-format off
/* mamba.c - Mamba, the selective state-space language model, in one C file.

   What it is: load a trained Mamba (Gu & Dao 2023, arXiv 2312.00752), read a prompt with matrix products and a
   parallel scan, write text with a recurrence whose time and memory per token never grow. Everything between the
   file and the next token is here; the tokenizer is in tokenizer.c. `cc -O2 mamba.c -lm` is a complete build.
   What it is not: a framework. There is one model, one pass over it in each direction, and no graph.

   GLOSSARY. A capital letter is a size, its lower-case letter the index over it. Arrays are row-major, the shape is
   in parentheses, and everything computed is float32 whatever the weights are stored as.
     L  sequence length, index t      D  d_model, width of the residual stream     E  d_inner, channels of the SSM
     N  d_state, states a channel     K  d_conv, taps of the convolution           R  dt_rank, rank of delta's input
     P  = R + 2N                      V  vocabulary, rows of the embedding         n_layer, index `layer`
     res (L,D)   residual stream              xn (L,D)     res after RMSNorm
     xz (L,2E)   in_proj's output: [x | z], x goes into the SSM, z is the gate
     u (L,E)     silu(conv(x)), the SSM's input
     xdb (L,P)   x_proj's output: [dt_low (R) | B_ssm (N) | C_ssm (N)], the selection: all three depend on the token
     delta (L,E) softplus(dt_proj(dt_low) + dt_bias), the step size: how far this token is let into the state
     A_log (E,N) as stored;  A_neg = -exp(A_log), kept as (N,E)
     decay       exp(delta * A_neg), the paper's A-bar: what the state keeps
     inject      delta * B_ssm * u, the paper's B-bar x: what the token adds
     h (N,E)     the SSM state, and nothing else is called h. Channels are innermost, in memory and in files, because
                 VL channels side by side fill one vector register and no sum across lanes is ever needed
     B  sequences of a training pass, T = B L its rows; in scan code A, B, C are the arrays of one step
     O, I  outputs and inputs of a matrix
     y (L,E)     sum over n of C_ssm h, plus D_skip u        g (L,E)  y * silu(z)

   CONTENTS ([train]: skip it at a first reading)
     1 errors, checked sizes, bytes      7 model: block, prefill, step of one and of several sequences
     2 vectors: VL floats at a time      8 state: save, load, copy
     3 config, model.bin, TENSORS        9 quantiser: q8 and q4
     4 load                             10 [train] initialisation, loss and backward, AdamW
     5 kernels: embedding, rmsnorm,     11 sampling
       matmul, conv1d + silu, gate      12 command line: generate, several texts, interactive, info,
                                           tokenize, tasks, eval, logits, train, quantize, bench
     6 the scan: definition, parallel,
       step, [train] backward

   GRADIENTS. A gradient is d_ and the name of what it belongs to. Those of weights are added to (+=), those of activations are
   set (=), except into the residual stream and into d_u, which has two sources. A backward kernel stands after its forward
   and quotes it.

   THREADS. A kernel is called by every thread of a team and shares its loop by `omp for`; the team is opened once a
   piece of text in forward, once a pass in mamba_train_pass. A thread owns output elements and every sum has one fixed order, so the
   bits do not depend on the number of threads. Without OpenMP the pragmas vanish and the code is the same.

   API (#include this file with MAMBA_NO_MAIN defined, as tests/api_example.c does): mamba_error, mamba_load, mamba_free, mamba_acts_new,
   mamba_acts_free, mamba_state_new, mamba_state_copy, mamba_state_reset, mamba_state_save, mamba_state_load,
   mamba_state_free, mamba_encode, mamba_decode, mamba_prefill, mamba_step, mamba_step_batch, mamba_sample; to train (saving is the command line's), mamba_random_model or
   mamba_float_copy, mamba_trainer_new, mamba_train_pass, mamba_train_step, mamba_trainer_free. Functions that can fail
   return NULL or -1 and leave a sentence in mamba_error(). */
// clang-format on

#ifndef _GNU_SOURCE
#define _GNU_SOURCE // mmap, getrusage, fileno, fsync under any -std
#endif
#include <assert.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#define MAMBA_POSIX 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define MAMBA_VERSION "0.1"

#ifdef __GNUC__
#define UNUSED __attribute__((unused))
#else
#define UNUSED
#endif

// Between COLD and its END, what runs once or waits for a disk: gcc takes a third of the build's
// time to make that fast, in vain.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#define COLD _Pragma("GCC push_options") _Pragma("GCC optimize (\"O1\")")
#define COLD_END _Pragma("GCC pop_options")
#else
#define COLD
#define COLD_END
#endif

#ifndef MAMBA_TYPES_ONLY // mamba_cuda.cu includes only the types of section 3
// ---------------------------------------------------------------------------------------------------------------------
// 1 Errors, checked sizes, bytes
// A failing function says why with fail() and returns; only main exits. Sizes that come from a file
// saturate instead of wrapping, so one comparison with the file's length catches every overflow.
// Files are read byte by byte: any machine reads the same little-endian file.

static char error_text[512];

static int fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    return -1;
}

// The last error again, with the name of the file or argument that it came from before it.
static int fail_in(const char *where) {
    char why[sizeof error_text];
    memcpy(why, error_text, sizeof why);
    return fail("%.200s: %.300s", where, why);
}

// Why the last call failed: one sentence, no newline.
const char *mamba_error(void) { return error_text; }

static size_t size_mul(size_t a, size_t b) { return a && b > SIZE_MAX / a ? SIZE_MAX : a * b; }
static size_t size_add(size_t a, size_t b) { return b > SIZE_MAX - a ? SIZE_MAX : a + b; }

// Zeroed memory aligned for vectors and cache lines; NULL after fail(). Freed by free_aligned().
static void *alloc_aligned(size_t bytes) {
    const size_t align = 64;
    char *base = bytes > SIZE_MAX - 2 * align ? NULL : calloc(1, bytes + 2 * align);
    if (!base) {
        fail("out of memory: could not get %zu bytes", bytes);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    // Large arrays on pages of 2 MB: from 4 kB pages weights stream a quarter slower and more
    // (doc/SPEED.md).
    if (bytes >= (size_t)8 << 20)
        madvise(base + (4096 - (uintptr_t)base % 4096), bytes - 4096, MADV_HUGEPAGE);
#endif
    char *p =
        base + align - ((uintptr_t)base % align) + align; // room for the base pointer just below
    memcpy(p - sizeof base, &base, sizeof base);
    return p;
}

static void free_aligned(void *p) {
    char *base;
    if (!p) return;
    memcpy(&base, (char *)p - sizeof base, sizeof base);
    free(base);
}

static uint32_t u32_at(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint64_t u64_at(const unsigned char *p) { return u32_at(p) | (uint64_t)u32_at(p + 4) << 32; }
static float f32_at(const unsigned char *p) {
    uint32_t bits = u32_at(p);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static void put_u32(unsigned char *p, uint32_t value) {
    for (int i = 0; i < 4; i++) p[i] = (unsigned char)(value >> (8 * i));
}
static void put_u64(unsigned char *p, uint64_t value) {
    put_u32(p, (uint32_t)value);
    put_u32(p + 4, (uint32_t)(value >> 32));
}

static bool host_is_little_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 1;
}

// Reverses the bytes of every `width`-byte element on a big-endian host; nothing on a little-endian
// one.
static void fix_endian(void *data, size_t bytes, size_t width) {
    if (host_is_little_endian()) return;
    unsigned char *p = data;
    for (size_t i = 0; i + width <= bytes; i += width)
        for (size_t lo = 0, hi = width - 1; lo < hi; lo++, hi--) {
            unsigned char swap = p[i + lo];
            p[i + lo] = p[i + hi];
            p[i + hi] = swap;
        }
}

// CRC-32 (polynomial 0xEDB88320, zlib's), eight bytes a step: start with crc = 0 and feed pieces in
// order.
static uint32_t crc32_of(uint32_t crc, const void *data, size_t bytes) {
    static uint32_t table[8][256];
    if (!table[7][255]) { // row 0 is the bytewise table, row k is row 0 applied k more times
        for (int i = 0; i < 256; i++) {
            uint32_t c = (uint32_t)i;
            for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
            table[0][i] = c;
        }
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++)
                table[k][i] = table[0][table[k - 1][i] & 255] ^ (table[k - 1][i] >> 8);
    }
    const unsigned char *p = data;
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint32_t lo = crc ^ u32_at(p), hi = u32_at(p + 4);
        crc = table[7][lo & 255] ^ table[6][lo >> 8 & 255] ^ table[5][lo >> 16 & 255] ^
              table[4][lo >> 24] ^ table[3][hi & 255] ^ table[2][hi >> 8 & 255] ^
              table[1][hi >> 16 & 255] ^ table[0][hi >> 24];
    }
    for (; bytes; bytes--) crc = table[0][(crc ^ *p++) & 255] ^ (crc >> 8);
    return ~crc;
}

// SplitMix64 (Steele, Lea & Flood 2014): one 64-bit word of state, the same stream on every
// machine.
static uint64_t random_u64(uint64_t *state) {
    uint64_t x = *state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
static double random_unit(uint64_t *state) {
    return (double)(random_u64(state) >> 11) * 0x1p-53;
} // [0, 1)

COLD
#include "tokenizer.c"
COLD_END

#endif // MAMBA_TYPES_ONLY

// ---------------------------------------------------------------------------------------------------------------------
// 3 Config, model.bin, TENSORS
// One list says everything about a tensor; the struct, the file's layout and the initialisation are
// made from it. The format is described field by field in the README.

typedef enum { F32, F16, BF16, Q8, Q4, N_TYPES } Type; // how matrices are stored
enum { TILE = 32 };    // rows and inputs of a tile of Q8 and Q4, see below
typedef uint16_t half; // the bits of an F16 or BF16 number

typedef struct Tokenizer Tokenizer;
enum { RECENT = 64 }; // tokens that the repeat penalty looks back over
enum { FLAG_TIED = 1, FLAG_PROJ_BIAS = 2, FLAG_CONV_BIAS = 4, FLAG_MIXER_NORM = 8 };
enum { ARCH_MAMBA = 0, ARCH_FALCON_MAMBA = 1 };
enum { HEADER_BYTES = 256, FILE_VERSION = 1, ALIGN = 64, N_MAX = 1024, PENDING = 4 };
static const char MODEL_MAGIC[8] = {'m', 'a', 'm', 'b', 'a', '.', 'c', '\n'};

typedef struct {
    int arch, flags;
    Type type;
    int D, n_layer, V, E, N, K, R;
    float norm_eps, mixer_eps;
    int bos, pad, eos[4]; // token ids, -1 = none
} Config;

typedef struct { // (rows, cols), row-major; a vector has one column
    const void *data;
    int rows, cols;
    Type type;
} Tensor;

// clang-format off
typedef enum { INIT_ONES, INIT_ZEROS, INIT_NORMAL, INIT_LINEAR, INIT_OUT, INIT_CONV, INIT_DT, INIT_DT_BIAS, INIT_A_LOG } Init;

//    name       rows           cols   stored   initialised   decays present when
#define TENSORS_FIRST(X) \
    X(embedding, c->V,          c->D,  c->type, INIT_NORMAL,  true,  true)
#define TENSORS_LAYER(X) \
    X(norm,      c->D,          1,     F32,     INIT_ONES,    false, true) \
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
    X(head,      c->V,          c->D,  c->type, INIT_LINEAR,  true,  !(c->flags & FLAG_TIED))

// clang-format on

#define DECLARE(name, rows, cols, type, init, decays, present) Tensor name;
typedef struct {
    TENSORS_LAYER(DECLARE)
    const float *A_neg;  // (N,E) derived: -exp(A_log), transposed
    const float *conv_t; // (K,E) derived: conv, transposed
} Layer;

typedef struct Model {
    Config config;
    Tokenizer *tokenizer; // NULL for random weights
    TENSORS_FIRST(DECLARE)
    Layer *layer;
    TENSORS_LAST(DECLARE)
    float *derived;   // arena of A_neg and conv_t
    uint32_t id;      // tells models apart: checksum of the header, which holds those of the rest
    size_t text_room; // most bytes that mamba_decode writes for one token
    uint32_t tensors_crc;
    size_t tensors_offset, tensors_bytes, tokenizer_bytes, n_params;
    unsigned char *file; // the whole of model.bin, mapped or read
    size_t file_bytes;
    bool mapped;
    void *weights; // allocated instead of mapped: random weights
} Model;
#undef DECLARE

typedef struct {
    float temperature;    // 0: the likeliest token
    float top_p;          // keep the likeliest that together reach this probability; 1: all
    int top_k;            // keep this many; 0: all
    float min_p;          // drop what is less likely than this times the likeliest; 0: none
    float repeat_penalty; // divides positive and multiplies negative logits of the last RECENT
                          // tokens; 1: none
} Sampling;

typedef struct {
    float rate, beta1, beta2, epsilon, decay,
        clip; // clip: largest norm of the gradient of all weights together; 0: none
} AdamW;

// What a GPU backend offers; mamba_cuda.cu has the only one, and says there what each function
// does. -1 or NULL: error() knows why.
typedef struct Gpu Gpu;
typedef struct GpuTrainer GpuTrainer;
typedef struct GpuBackend {
    const char *(*error)(void);
    Gpu *(*open)(const Model *m, int float32);
    void (*close)(Gpu *g);
    int (*set_state)(Gpu *g, const float *window, const float *h, const float *logits);
    int (*get_state)(Gpu *g, float *window, float *h, float *logits);
    int (*prefill)(Gpu *g, const int32_t *ids, size_t n, void (*visit)(void *, const float *),
                   void *context);
    int (*gather)(Gpu *g, int s, int S);
    int (*generate_start)(Gpu *g, int S, const Sampling *how, const uint64_t *random,
                          uint64_t position, const int32_t *recent, int n_recent,
                          const unsigned char *allowed);
    int (*generate)(Gpu *g, int32_t *ids, int steps);
    int generate_max; // steps of one call
    GpuTrainer *(*trainer_open)(const Model *m, int B, int L, int float32);
    void (*trainer_close)(GpuTrainer *x);
    int (*trainer_resize)(GpuTrainer *x, int B, int L);
    int (*trainer_set)(GpuTrainer *x, const float *weights, const float *moment,
                       const float *moment2);
    int (*trainer_get)(GpuTrainer *x, float *weights, float *moment, float *moment2,
                       float *gradient);
    int (*train_pass)(GpuTrainer *x, const int32_t *ids, const int32_t *targets, float weight,
                      int backward, double *sum);
    int (*train_step)(GpuTrainer *x, const AdamW *how, uint64_t step, double *norm);
    int (*measure)(double *copy_bytes, double *flops, double *used_bytes, char name[256]);
    int (*time_scan)(int B, int E, int L, int N, int float32, int repeats, double seconds[4]);
    const char *(*step_form)(const Gpu *g);
} GpuBackend;

#ifndef MAMBA_TYPES_ONLY
typedef struct { // one line of the list, as a visitor sees it
    const char *name;
    int layer; // -1: not in a layer
    Init init;
    bool decays; // weight decay applies
} TensorInfo;

enum { LABEL = 40 }; // room for "layer 65535 conv_bias"
static void tensor_label(char label[LABEL], const TensorInfo *info) {
    if (info->layer < 0) snprintf(label, LABEL, "%s", info->name);
    else snprintf(label, LABEL, "layer %d %s", info->layer, info->name);
}

// Q8 and Q4: a matrix is cut into tiles of TILE rows times TILE inputs, the tiles of one panel of
// TILE rows one after the other, the last ones filled up with zeros. A row's 32 weights in a tile
// are scale * code, with a bf16 scale of their own and whole codes: -127..127 or -8..7. So a tile
// is TILE scales, then `bits` times TILE words of 32 bits: word (i,r) holds 32 / bits codes of row
// r, inputs i * 32 / bits and on, the first in the lowest bits. Codes are stored plus 128 or 8, but
// the last of a word in two's complement: masked where it lies and taken as an int32, each is code
// (+ 128 or 8) times a power of two. That is 8.5 and 4.5 bits a weight, in one long stream, with VL
// rows side by side as the vectors want them.
enum { TILE_SCALES = TILE * 2 }; // bytes
static bool is_quantized(Type type) { return type >= Q8; }
static int code_bits(Type type) { return type == Q8 ? 8 : 4; }
static size_t tile_bytes(Type type) { return TILE_SCALES + (size_t)code_bits(type) * TILE * 4; }
static size_t tiles_of(size_t n) { return (n + TILE - 1) / TILE; }

static size_t type_bytes(Type type) { return type == F32 ? 4 : 2; } // not of Q8 and Q4
static size_t tensor_elements(const Tensor *w) {
    return size_mul((size_t)w->rows, (size_t)w->cols);
}
static size_t tensor_bytes(const Tensor *w) {
    if (!is_quantized(w->type)) return size_mul(tensor_elements(w), type_bytes(w->type));
    return size_mul(size_mul(tiles_of((size_t)w->rows), tiles_of((size_t)w->cols)),
                    tile_bytes(w->type));
}
static const float *f32(const Tensor *w) { return w->data; } // NULL for an absent bias

// Numbers as in files to the machine's order of bytes, or back: nothing happens on a little-endian
// machine.
static void fix_tensor_endian(const Tensor *w) {
    unsigned char *data = (unsigned char *)(uintptr_t)w->data;
    size_t bytes = tensor_bytes(w), tile = is_quantized(w->type) ? tile_bytes(w->type) : bytes;
    if (host_is_little_endian()) return;
    if (!is_quantized(w->type)) fix_endian(data, bytes, type_bytes(w->type));
    else
        for (size_t at = 0; at < bytes; at += tile)
            fix_endian(data + at, TILE_SCALES, 2),
                fix_endian(data + at + TILE_SCALES, tile - TILE_SCALES, 4);
}

// Visits every tensor of m in the file's order.
typedef void TensorVisitor(void *context, const TensorInfo *info, Tensor *w);

static void each_tensor(Model *m, TensorVisitor *visit, void *context) {
    const Config *c = &m->config;
#define VISIT(owner, index, name, r, k, t, init, decays, present) \
    if (present) { \
        (owner)->name.rows = (r), (owner)->name.cols = (k), (owner)->name.type = (t); \
        visit(context, &(TensorInfo){#name, index, init, decays}, &(owner)->name); \
    }
#define VISIT_MODEL(name, r, k, t, init, decays, present) \
    VISIT(m, -1, name, r, k, t, init, decays, present)
#define VISIT_LAYER(name, r, k, t, init, decays, present) \
    VISIT(&m->layer[layer], layer, name, r, k, t, init, decays, present)
    TENSORS_FIRST(VISIT_MODEL)
    for (int layer = 0; layer < c->n_layer; layer++) {
        TENSORS_LAYER(VISIT_LAYER)
    }
    TENSORS_LAST(VISIT_MODEL)
#undef VISIT
#undef VISIT_MODEL
#undef VISIT_LAYER
}

typedef struct {
    unsigned char *base; // NULL: only measure
    size_t offset, n_params;
} Layout;

static void layout_tensor(void *context, const TensorInfo *info, Tensor *w) {
    Layout *at = context;
    (void)info;
    at->offset = size_add(at->offset, (ALIGN - at->offset % ALIGN) % ALIGN);
    if (at->base) {
        w->data = at->base + at->offset;
        fix_tensor_endian(w);
    }
    at->offset = size_add(at->offset, tensor_bytes(w));
    at->n_params += tensor_elements(w);
}

// Bytes from the first tensor to the end of the last; SIZE_MAX when the config asks for more than a
// size_t. n_layer may still be a lie here, so nothing of its size is allocated: layers start
// aligned, so each adds what the second one adds.
static size_t config_tensor_bytes(const Config *config) {
    Layer layers[2];
    Model probe = {.config = *config, .layer = layers};
    size_t total[3] = {0};
    for (int n_layer = 1; n_layer <= 2; n_layer++) {
        Layout at = {0};
        probe.config.n_layer = n_layer;
        each_tensor(&probe, layout_tensor, &at);
        total[n_layer] = at.offset;
    }
    if (total[2] == SIZE_MAX) return SIZE_MAX;
    return size_add(total[1], size_mul(total[2] - total[1], (size_t)config->n_layer - 1));
}

// A_neg and conv_t for every layer, from A_log and conv as they are now.
static void refresh_derived(Model *m) {
    const Config *c = &m->config;
    size_t E = (size_t)c->E, per_layer = (size_t)(c->N + c->K) * E;
    for (int layer = 0; layer < c->n_layer; layer++) {
        Layer *w = &m->layer[layer];
        float *A_neg = m->derived + per_layer * (size_t)layer, *conv_t = A_neg + (size_t)c->N * E;
        for (size_t e = 0; e < E; e++) {
            for (int n = 0; n < c->N; n++) A_neg[n * E + e] = -expf(f32(&w->A_log)[e * c->N + n]);
            for (int k = 0; k < c->K; k++) conv_t[k * E + e] = f32(&w->conv)[e * c->K + k];
        }
        w->A_neg = A_neg, w->conv_t = conv_t;
    }
}

// 0, or -1 after fail().
static int make_derived(Model *m) {
    const Config *c = &m->config;
    m->derived = alloc_aligned(size_mul(size_mul((size_t)(c->N + c->K), (size_t)c->E),
                                        size_mul((size_t)c->n_layer, sizeof(float))));
    if (m->derived) refresh_derived(m);
    return m->derived ? 0 : -1;
}

COLD
// ---------------------------------------------------------------------------------------------------------------------
// 4 Load
// The header is believed only as far as the file's length bears it out: every field has a
// range, and the bytes that the config asks for must be the bytes that are there, before any
// pointer is made.

// A file in memory: mapped, read-only, where the platform can; else read (big-endian hosts too,
// which swap it in place).
static unsigned char *file_map(const char *path, size_t *bytes, bool *mapped) {
    *mapped = false;
#ifdef MAMBA_POSIX
    int fd = open(path, O_RDONLY | O_NONBLOCK); // a FIFO without a writer would wait here
    struct stat info;
    if (fd < 0) return fail("%s: %s", path, strerror(errno)), NULL;
    if (fstat(fd, &info) || !S_ISREG(info.st_mode)) {
        close(fd);
        return fail("%s: not a regular file", path), NULL;
    }
    *bytes = (size_t)info.st_size;
    bool fits = *bytes > 0 && (uintmax_t)info.st_size <= SIZE_MAX / 2;
    if (fits && host_is_little_endian()) {
        void *p = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p != MAP_FAILED) {
            close(fd);
            *mapped = true;
            return p;
        }
    }
    close(fd);
#endif
    FILE *f = fopen(path, "rb");
    if (!f) return fail("%s: %s", path, strerror(errno)), NULL;
    unsigned char *data = NULL;
    long length = fseek(f, 0, SEEK_END) ? -1 : ftell(f);
    if (length < 0) fail("%s: cannot find its length", path);
    else if ((data = alloc_aligned((size_t)length))) {
        rewind(f);
        if (fread(data, 1, (size_t)length, f) != (size_t)length) {
            fail("%s: read error", path);
            free_aligned(data);
            data = NULL;
        }
        *bytes = (size_t)length;
    }
    fclose(f);
    return data;
}

static void file_unmap(unsigned char *data, size_t bytes, bool mapped) {
#ifdef MAMBA_POSIX
    if (mapped) {
        munmap(data, bytes);
        return;
    }
#endif
    (void)bytes, (void)mapped;
    free_aligned(data);
}

static int check_token_id(const char *path, const char *name, int32_t id, int V) {
    if (id >= -1 && id < V) return 0;
    return fail("%s: %s token id %d is not in the vocabulary of %d", path, name, id, V);
}

// Header bytes -> config. Each field by itself; how they fit the file is mamba_load's business.
static int read_config(const char *path, const unsigned char *h, Config *c) {
    const struct {
        const char *name;
        int offset;
        uint32_t lowest, highest;
        int *value;
    } field[] = {
        {"arch", 16, 0, 1, &c->arch},          {"flags", 24, 0, 15, &c->flags},
        {"d_model", 28, 1, 1 << 20, &c->D},    {"n_layer", 32, 1, 1 << 16, &c->n_layer},
        {"vocab_size", 36, 1, 1 << 26, &c->V}, {"d_inner", 40, 1, 1 << 20, &c->E},
        {"d_state", 44, 1, N_MAX, &c->N},      {"d_conv", 48, 1, 1 << 12, &c->K},
        {"dt_rank", 52, 1, 1 << 20, &c->R},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        uint32_t value = u32_at(h + field[i].offset);
        if (value < field[i].lowest || value > field[i].highest)
            return fail(
                "%s: header field %s is %u, outside %u..%u: the file is damaged or not a model.bin",
                path, field[i].name, value, field[i].lowest, field[i].highest);
        *field[i].value = (int)value;
    }
    if (u32_at(h + 20) >= N_TYPES)
        return fail(
            "%s: weight type %u is not known to this version (0 f32, 1 f16, 2 bf16, 3 q8, 4 q4)",
            path, u32_at(h + 20));
    c->type = (Type)u32_at(h + 20);
    c->norm_eps = f32_at(h + 56), c->mixer_eps = f32_at(h + 60);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1))
        return fail("%s: header field norm_eps is not in [0, 1)", path);
    if (!(c->mixer_eps >= 0 && c->mixer_eps < 1))
        return fail("%s: header field mixer_eps is not in [0, 1)", path);
    c->bos = (int32_t)u32_at(h + 64), c->pad = (int32_t)u32_at(h + 68);
    if (check_token_id(path, "bos", c->bos, c->V) || check_token_id(path, "pad", c->pad, c->V))
        return -1;
    for (int i = 0; i < 4; i++) {
        c->eos[i] = (int32_t)u32_at(h + 72 + 4 * i);
        if (check_token_id(path, "eos", c->eos[i], c->V)) return -1;
    }
    return 0;
}

static int read_header(Model *m, const char *path) {
    const unsigned char *h = m->file;
    if (m->file_bytes < HEADER_BYTES || memcmp(h, MODEL_MAGIC, sizeof MODEL_MAGIC))
        return fail("%s: not a model.bin (make one with export.py)", path);
    if (u32_at(h + 8) != FILE_VERSION || u32_at(h + 12) != HEADER_BYTES)
        return fail("%s: format version %u with a header of %u bytes, this program reads version "
                    "%d with %d",
                    path, u32_at(h + 8), u32_at(h + 12), FILE_VERSION, HEADER_BYTES);
    if (read_config(path, h, &m->config)) return -1;
    uint64_t tok_offset = u64_at(h + 88), tok_bytes = u64_at(h + 96), offset = u64_at(h + 104),
             bytes = u64_at(h + 112);
    uint64_t size = m->file_bytes;
    if (offset > size || bytes > size - offset || offset < HEADER_BYTES ||
        tok_offset != HEADER_BYTES || tok_bytes > offset - HEADER_BYTES || offset % ALIGN ||
        offset - HEADER_BYTES - tok_bytes >= ALIGN)
        return fail("%s: tokenizer or tensors lie outside the file of %zu bytes: it is truncated "
                    "or damaged",
                    path, m->file_bytes);
    size_t needed = config_tensor_bytes(&m->config);
    if (bytes != size - offset || bytes != needed)
        return fail("%s: the header's config needs %zu bytes of tensors, the file has %zu: it is "
                    "truncated or damaged",
                    path, needed, (size_t)(size - offset));
    if (crc32_of(0, h, HEADER_BYTES - 4) != u32_at(h + HEADER_BYTES - 4))
        return fail("%s: the header's checksum does not match: the file is damaged", path);
    if (crc32_of(0, h + tok_offset, (size_t)tok_bytes) != u32_at(h + 120))
        return fail("%s: the tokenizer's checksum does not match: the file is damaged", path);
    for (uint64_t i = tok_offset + tok_bytes; i < offset;
         i++) // the only bytes that no checksum covers
        if (h[i])
            return fail(
                "%s: byte %llu between tokenizer and tensors is not zero: the file is damaged",
                path, (unsigned long long)i);
    m->tokenizer_bytes = (size_t)tok_bytes, m->tensors_offset = (size_t)offset,
    m->tensors_bytes = (size_t)bytes;
    m->tensors_crc = u32_at(h + 124);
    m->id = u32_at(h + HEADER_BYTES -
                   4); // not the CRC of all 256: that of bytes and their own CRC is a constant
    return 0;
}

void mamba_free(Model *m) {
    if (!m) return;
    if (m->tokenizer) tokenizer_close(m->tokenizer);
    if (m->file) file_unmap(m->file, m->file_bytes, m->mapped);
    free_aligned(m->weights);
    free_aligned(m->derived);
    free(m->layer);
    free(m);
}

static int open_model(Model *m, const char *path) {
    m->file = file_map(path, &m->file_bytes, &m->mapped);
    if (!m->file || read_header(m, path)) return -1;
    m->tokenizer = tokenizer_open(m->file + HEADER_BYTES, m->tokenizer_bytes);
    if (!m->tokenizer) return fail_in(path);
    if (tokenizer_size(m->tokenizer) > m->config.V)
        return fail("%s: the tokenizer has %d ids, the model only %d", path,
                    tokenizer_size(m->tokenizer), m->config.V);
    for (int id = 0; id < tokenizer_size(m->tokenizer); id++) {
        size_t bytes = 0, room;
        tokenizer_token(m->tokenizer, id, &bytes);
        if ((room = 3 * (bytes + PENDING)) > m->text_room)
            m->text_room = room; // each byte may become a U+FFFD
    }
    m->layer = calloc((size_t)m->config.n_layer, sizeof *m->layer);
    if (!m->layer) return fail("out of memory: %d layers", m->config.n_layer);
    Layout at = {.base = m->file, .offset = m->tensors_offset};
    each_tensor(m, layout_tensor, &at);
    assert(at.offset == m->file_bytes);
    m->n_params = at.n_params;
    if (m->config.flags & FLAG_TIED) m->head = m->embedding;
    return make_derived(m);
}

// A model.bin, ready to run; NULL after fail().
Model *mamba_load(const char *path) {
    Model *m = calloc(1, sizeof *m);
    if (!m) return fail("out of memory"), NULL;
    if (open_model(m, path)) {
        mamba_free(m);
        return NULL;
    }
    return m;
}

// A model of this shape in memory, all weights zero, no tokenizer. NULL after fail().
static Model *blank_model(const Config *config) {
    Model *m = calloc(1, sizeof *m);
    if (!m) return fail("out of memory"), NULL;
    m->config = *config;
    m->layer = calloc((size_t)config->n_layer, sizeof *m->layer);
    m->tensors_bytes = config_tensor_bytes(config);
    m->weights = m->layer ? alloc_aligned(m->tensors_bytes) : NULL;
    if (!m->weights) {
        mamba_free(m);
        return NULL;
    }
    Layout at = {.base = m->weights};
    each_tensor(m, layout_tensor, &at);
    m->n_params = at.n_params;
    if (config->flags & FLAG_TIED) m->head = m->embedding;
    return m;
}

COLD_END
// ---------------------------------------------------------------------------------------------------------------------
// Sequences, activations, training: what a pass works with

typedef struct {   // what one layer remembers of one sequence
    float *window; // (K-1,E) the last inputs of the convolution
    float *h;      // (N,E) the SSM state
} LayerState;

typedef struct State { // one sequence at one moment; a single allocation, made of plain numbers
    uint64_t position; // tokens read
    uint64_t random;   // state of the sampler's generator
    uint64_t floats;   // how many numbers follow
    int32_t recent[RECENT], n_recent;
    Utf8Pending pending;
    struct Acts
        *newer_on; // whose GPU has newer conv and h than are here; NULL: these are the newest
    float *logits; // (V) after the last token
    float *conv;   // (n_layer,K-1,E)
    float *h;      // (n_layer,N,E)
    float data[];
} State;

// The arrays that a layer writes in a pass over B sequences of L tokens: T = B L rows, one sequence
// after the other. Prefill and step use one Work for all layers. Training has one a layer, because
// the backward pass needs what the forward pass computed.
typedef struct Work {
    float *res;          // (T,D) residual stream before the layer
    float *next;         // (T,D) after it; may be res
    float *xn;           // (T,D) res after RMSNorm; at the end of the layer out_proj's output
    float *xz;           // (T,2E) in_proj's output: [x | z]
    float *u;            // (T,E) silu(conv(x))
    float *raw;          // (T,P) x_proj's output before FalconMamba's norms; may be xdb
    float *xdb;          // (T,P) [dt_low | B_ssm | C_ssm]
    float *delta;        // (T,E)
    float *y;            // (T,E) the scan's output
    float *g;            // (T,E) y silu(z); may be y
    float *packed;       // matmul_floats() of scratch
    float *carry;        // scan_carry_floats() of scratch; NULL: the scan takes time in one piece
    const int32_t *ids;  // (T) the tokens
    float *selection;    // (T) or NULL: gets the mean of delta over the channels
    int selection_layer; // of this layer; -1: of all layers
    bool state_only;     // nobody reads the residual stream after the last layer
    bool one_each;       // the next layer's Work follows; else all layers use this one
} Work;

// Tokens that prefill takes at a time, so that memory does not depend on the prompt's length. Many,
// because the weights are read and packed once a piece. Wide models take fewer, so that a piece
// stays within some hundred megabytes.
enum { PIECE_MAX = 512, PIECE_MIN = 32 };
enum { LOGIT_ROWS = 32 }; // positions whose logits exist at a time
enum { BATCH_MAX = 32 };  // sequences of one step

typedef struct Acts { // what one pass at a time over one model needs
    int threads;      // team size
    int piece;        // rows that the arrays of work have room for
    Work work;
    LayerState *seq;  // (n_layer,B) of the sequences of the pass
    float *logits;    // (LOGIT_ROWS,V)
    float *probs;     // (V) the sampler's scratch
    int32_t *order;   // (V) the sampler's scratch
    float *selection; // (n) of the next prefill, or NULL, see mamba_selection()
    Gpu *gpu;         // NULL: everything runs on the processor
    State *gpu_state; // the state that the GPU holds
    void *arena;
} Acts;

// --- arguments that belong together, for operations and their backward passes

enum { MATMUL_FEW = 4 }; // below so many rows cpu/ packs nothing: that costs more than it saves

typedef struct {   // the rows of a product
    int T;         // how many
    bool step;     // one token of each of T sequences: a row's bits must not depend on the others
    float *packed; // matmul_floats() of scratch
} Rows;

typedef struct {     // what rmsnorm_backward() writes
    float *d_x;      // (T,D), rows as far apart as those of x
    bool add;        // d_x += instead of =
    float *d_weight; // (D) +=; not used where the norm has no weight
    float *scale;    // (T) scratch
} NormGrad;

typedef struct {   // what matmul_backward() writes; NULL: not wanted
    float *d_x;    // (T,I), rows as far apart as those of x
    bool add;      // d_x += instead of =
    float *d_W;    // (O,I) +=
    float *d_bias; // (O) +=
} MatmulGrad;

typedef struct {         // the convolution of a layer over B sequences of L tokens
    const float *xz;     // (B L,2E): its input x is the first half of each row
    const float *conv_t; // (K,E)
    const float *bias;   // (E) or NULL
    int B, L, E, K;
} Conv;

typedef struct {     // what conv1d_silu_backward() writes
    float *d_xz;     // (B L,2E): the first half of each row =
    float *d_conv;   // (E,K) +=
    float *d_bias;   // (E) +=
    float *d_window; // (B,K-1,E) =
    float *d_c;      // (L,E) scratch
} ConvGrad;

typedef struct {                // the scan of a layer over B sequences of L tokens, T = B L
    const float *u, *delta;     // (T,E)
    const float *A_neg;         // (N,E)
    const float *B_ssm, *C_ssm; // (T,N), rows ld_bc apart
    const float *D_skip;        // (E)
    size_t ld_bc;
    int B, L, E, N;
} Scan;

typedef struct {              // what scan_backward() writes
    float *d_u, *d_delta;     // (T,E) =
    float *d_B_ssm, *d_C_ssm; // (T,N) =, rows ld_bc apart
    float *d_A_log;           // (E,N) +=
    float *d_D_skip;          // (E) +=
    float *d_h;     // (B,N,E) gradient of the states at the end; becomes that at the start
    float *scratch; // scan_backward_floats()
} ScanGrad;

#ifdef PLAIN
enum { SCAN_WIDTH = 16 }; // channels of a task of scan_backward()
#else
#include "cpu/vectors.h" // SCAN_WIDTH for this processor, and the words that cpu/ is written in
#endif
enum { SCAN_LANES = 16 };  // channels of a task of the scan: a cache line
enum { STEP_LANES = 128 }; // channels of a task where each sequence has one token
enum { SCAN_CHUNK = 32 };  // steps between stored states in scan_backward()

typedef struct { // a task of the backward scan: the channels e0 .. e0 + width
    int e0, width;
    float *starts;          // (chunks,N,SCAN_WIDTH) states at the start of each chunk
    float *states, *decays; // (SCAN_CHUNK,N,SCAN_WIDTH) of the chunk in hand
    float *A, *d_A;         // (N,SCAN_WIDTH)
    float *g;               // (N,SCAN_WIDTH) gradient of the state
    float d_D[SCAN_WIDTH];
    float *parts; // (T,2N) what these channels add to d_B and d_C
} ScanBlock;

// ---------------------------------------------------------------------------------------------------------------------
// 3 Plain operations
// The leaves of the computation, each in its definition, the backward pass after the forward. Every
// thread of a team calls them, and `omp for` shares the loop. Without OpenMP the pragmas mean
// nothing and the code is the same.
// cpu/ holds a fast form of each under the same name, which runs in their place. A build with
// -DPLAIN leaves cpu/ out. Where both are built, the plain form of NAME is called NAME_plain, and
// tests hold the fast form to it.

#ifdef PLAIN
#define OPERATION static
#else
#define OPERATION UNUSED static inline // only tests call them
#include "cpu/plain_names.h"
#endif

OPERATION float sigmoid(float x) { return 1 / (1 + expf(-x)); }
OPERATION float silu(float x) { return x * sigmoid(x); }
OPERATION float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); } // expf ends at 88

// --- RMSNorm: xn = x r weight with r = 1 / sqrt(mean(x^2) + eps)

OPERATION float rms_factor(const float *x, float eps, int D) {
    float squares = 0;
    for (int d = 0; d < D; d++) squares += x[d] * x[d];
    return 1 / sqrtf(squares / (float)D + eps);
}

// xn, x (T,D), rows ld apart; they may be the same array. weight (D), or NULL: none.
OPERATION void rmsnorm(float *xn, const float *x, const float *weight, float eps, int T, int D,
                       size_t ld) {
#pragma omp for
    for (int t = 0; t < T; t++) {
        float r = rms_factor(x + t * ld, eps, D);
        for (int d = 0; d < D; d++) xn[t * ld + d] = x[t * ld + d] * r * (weight ? weight[d] : 1);
    }
}

// xn = x r weight:  d_x = r (d_xn weight - x r^2 mean(d_xn weight x));  d_weight += d_xn x r,
// summed over t. d_x and d_xn may be the same array unless d->add.
OPERATION void rmsnorm_backward(const NormGrad *d, const float *d_xn, const float *x,
                                const float *weight, float eps, int T, int D, size_t ld) {
#pragma omp for
    for (int t = 0; t < T; t++) d->scale[t] = rms_factor(x + t * ld, eps, D);
    if (weight) {
#pragma omp for
        for (int i = 0; i < D; i++)
            for (int t = 0; t < T; t++)
                d->d_weight[i] += d_xn[t * ld + i] * x[t * ld + i] * d->scale[t];
    }
#pragma omp for
    for (int t = 0; t < T; t++) {
        float r = d->scale[t], mean = 0;
        for (int i = 0; i < D; i++)
            mean += d_xn[t * ld + i] * (weight ? weight[i] : 1) * x[t * ld + i] / (float)D;
        for (int i = 0; i < D; i++) {
            size_t at = t * ld + i;
            float d_x = r * (d_xn[at] * (weight ? weight[i] : 1) - x[at] * r * r * mean);
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

// out (D) += the sum over t of x (T,D), rows ld apart: the gradient of what is added to every row.
OPERATION void sum_rows(float *out, const float *x, size_t ld, int T, int D) {
#pragma omp for
    for (int d = 0; d < D; d++)
        for (int t = 0; t < T; t++) out[d] += x[t * ld + d];
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

// One weight of a Q8 or Q4 matrix: its code times its scale. See the layout of tiles above.
OPERATION float tile_weight(const Tensor *w, int row, int column) {
    const int bits = code_bits(w->type), codes = 32 / bits; // codes a word
    const size_t tile = (size_t)(row / TILE) * tiles_of((size_t)w->cols) + (size_t)(column / TILE);
    const unsigned char *at = (const unsigned char *)w->data + tile * tile_bytes(w->type);
    const int r = row % TILE, i = column % TILE;
    uint16_t scale;
    uint32_t word;
    memcpy(&scale, at + r * sizeof scale, sizeof scale);
    memcpy(&word, at + TILE_SCALES + (i / codes * TILE + r) * sizeof word, sizeof word);
    // The last code of a word is in two's complement; with its sign bit turned it is like the rest.
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
        else if (w->type ==
                 F16) { // multiplied by 2^112: the biases of the exponents differ by that
            uint32_t half = halves[at + i], sign = (half & 0x8000) << 16;
            float magnitude = float_of((half & 0x7FFF) << 13) * 0x1p112f;
            out[i] = sign ? -magnitude : magnitude;
        } else out[i] = tile_weight(w, row, from + i);
    }
}

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

// log(sum of exp(logits)), by one thread; the highest logit is taken out, so that exp stays finite.
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

// x of sequence b at step t; before its start, from its window.
static const float *conv_input(const Conv *c, const float *window, int b, int t) {
    if (t < 0) return window + (size_t)(c->K - 1 + t) * c->E;
    return c->xz + ((size_t)b * c->L + t) * 2 * c->E;
}

// Forward in j: a piece shorter than the window only moves rows down.
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

// u = silu(c), and silu' = s (1 + c (1 - s)) with s = sigmoid(c):  d_c = d_u silu'(c);
// d_x_t = sum over k of conv[k] d_c_{t+K-1-k};  d_conv[k] += sum over t of d_c_t x_{t-K+1+k};
// d_bias += sum of d_c. c is computed again. window (B,K-1,E): as it was before the pass.
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
            for (int t = 1 - K; t < L; t++) { // inputs before t = 0 are the window's
                float d_x = 0;
                for (int k = 0, later = t + K - 1; k < K; k++, later--)
                    if (later >= 0 && later < L)
                        d_x += c->conv_t[(size_t)k * E + e] * d_c[(size_t)later * E + e];
                if (t >= 0) d->d_xz[((size_t)b * L + t) * 2 * E + e] = d_x;
                else d_window[(size_t)(K - 1 + t) * E + e] = d_x;
            }
        }
}

// --- delta and the gate

// delta = softplus(dt + dt_bias), in place.
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
#pragma omp barrier // scan() may not have waited for all threads
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

// ---------------------------------------------------------------------------------------------------------------------
// 6 The scan
// A continuous system h' = A h + B u, sampled with a step delta. Where A is diagonal, holding the
// input for the step gives exactly  h_t = exp(delta A) h_{t-1} + (exp(delta A) - 1)/A B u_t.  Mamba
// keeps the first factor and replaces the second by its first-order value delta B (as delta -> 0
// they agree; the model trains with it, so it is the model):
//
//     h_t = decay_t h_{t-1} + inject_t        decay_t = exp(delta_t A)    inject_t = delta_t B_t
//     u_t y_t = C_t h_t + D u_t
//
// for each channel e and state n by itself; only the sum in y mixes states. What is *selective*:
// delta, B and C come from the token. delta near 0 skips the token (decay 1, inject 0), a large
// delta forgets the past and takes the token in.
//
// One step is the map h -> a h + b. Two steps, (a1,b1) first, are again such a map:
//
//     (a1, b1) * (a2, b2) = (a1 a2, a2 b1 + b2)
//
// and composing maps is associative, so the prefix products over time can be taken in any grouping:
// a parallel scan. Example, from h = 0, a = 1/2 1/2 1/2 1/2 and b = 1 2 3 4:  h =
// 1, 2.5, 4.25, 6.125.  In two halves at once: (1/4, 2.5) and (1/4, 5.5); joined: 1/4 * 2.5 + 5.5
// = 6.125. The order matters: swapped they give 1/4 * 5.5 + 2.5.
//
// The expanded (L,E,N) states never exist in memory: h lives in registers or L1 while a block of
// channels walks through time. Shapes below: y, u, delta (L,E); A_neg, h (N,E); B_ssm, C_ssm rows
// of N, ld_bc apart; D_skip (E). h is the state before t = 0 on entry and after the last token on
// return.

// The definition: channels e0 .. e1 through the rows row0 .. row1 of one sequence. h (N,E) is the
// state before them and becomes the state after them. y (T,E) NULL: only the state is wanted.
// elapsed (E), unless NULL, gets the sum of delta.
OPERATION void recurrence(float *y, float *h, float *elapsed, const Scan *s, int e0, int e1,
                          int row0, int row1) {
    const size_t E = (size_t)s->E;
    for (int e = e0; e < e1 && elapsed; e++) elapsed[e] = 0;
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
            if (elapsed) elapsed[e] += delta;
        }
}

// For the backward pass, which works on arrays (N,SCAN_WIDTH) of its task's channels: the state h
// after a row from the state before it, and its decay unless NULL. h may be `before`.
OPERATION void recurrence_again(float *h, float *decay, const float *before, const ScanBlock *k,
                                const Scan *s, size_t row) {
    for (int n = 0; n < s->N; n++)
        for (int i = 0; i < k->width; i++) {
            size_t at = (size_t)n * SCAN_WIDTH + i, te = row * s->E + k->e0 + i;
            float a = expf(s->delta[te] * k->A[at]);
            float inject = s->delta[te] * s->u[te] * s->B_ssm[row * s->ld_bc + n];
            h[at] = a * before[at] + inject;
            if (decay) decay[at] = a;
        }
}

// One row back, by the equations below. k->g comes in as decay_{t+1} g_{t+1} and leaves as
// decay_t g_t. h, decay: of this row; before: the state before it.
OPERATION void recurrence_backward(ScanBlock *k, const ScanGrad *d, const float *d_y, const Scan *s,
                                   size_t row, const float *h, const float *decay,
                                   const float *before) {
    const float *B = s->B_ssm + row * s->ld_bc, *C = s->C_ssm + row * s->ld_bc;
    float *d_B = k->parts + row * 2 * s->N, *d_C = d_B + s->N;
    memset(d_B, 0, 2 * (size_t)s->N * sizeof *d_B);
    for (int i = 0; i < k->width; i++) {
        size_t e = (size_t)(k->e0 + i), te = row * s->E + e;
        float delta = s->delta[te], u = s->u[te], dy = d_y[te];
        float d_u = s->D_skip[e] * dy, d_delta = 0;
        k->d_D[i] += dy * u;
        for (int n = 0; n < s->N; n++) {
            size_t at = (size_t)n * SCAN_WIDTH + i;
            float g = C[n] * dy + k->g[at], d_decay = g * before[at];
            d_C[n] += dy * h[at];
            d_B[n] += g * delta * u;
            d_u += g * delta * B[n];
            d_delta += d_decay * decay[at] * k->A[at] + g * B[n] * u;
            k->d_A[at] += d_decay * decay[at] * delta;
            k->g[at] = decay[at] * g;
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

// Time is cut into pieces only where channels run out: E / SCAN_LANES blocks of channels for
// SCAN_TASKS threads. Cutting makes every piece but one walk twice. The shapes alone decide, never
// the number of threads or the machine, so the bits stay the same. With c pieces a thread walks 2/c
// of the time; 4 pieces gained only 1.2 times on 16 cores.
enum { SCAN_TASKS = 16, SCAN_PIECE = 32 };
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
            Map before = {1, h[ne]};
            for (int piece = 0; piece < pieces; piece++) {
                float *state = carry + per_piece * piece, *elapsed = state + NE, b = state[ne];
                state[ne] = before.b;
                if (piece == pieces - 1) break;
                before = combine(before, (Map){expf(s->A_neg[ne] * elapsed[e]), b});
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
#pragma omp for schedule(static) nowait // the gate comes next
    for (int task = 0; task < B * blocks; task++) {
        int b = task / blocks, e0 = task % blocks * lanes, e1 = E - e0 < lanes ? E : e0 + lanes;
        recurrence(y, seq[b].h, NULL, s, e0, e1, b * L, (b + 1) * L);
    }
    if (L > 1) {
#pragma omp barrier
    }
}

// --- backward. With g_t the gradient of h_t, which flows back through time:
//
//     g_t = C_t d_y_t + decay_{t+1} g_{t+1}
//     d_C_t = sum over e of d_y_t h_t          d_B_t = sum over e of g_t delta_t u_t
//     d_u_t = D d_y_t + sum over n of g_t delta_t B_t                  d_D = sum over t of d_y_t
//     u_t d_delta_t = sum over n of g_t (decay_t A h_{t-1} + B_t u_t) d_A = sum over t of g_t
//     decay_t delta_t h_{t-1}
//
// and d_A_log = d_A A, since A = -exp(A_log). All of this needs every h_t, and none was stored. So:
// walk forward once and keep the state at the start of every SCAN_CHUNK steps. Then, from the last
// chunk to the first: walk the chunk again, now keeping its few states, and walk it backward.
// Memory is O(E N L / SCAN_CHUNK) instead of O(E N L), for two more forward walks.
//
// A task is SCAN_WIDTH channels of all sequences. d_B and d_C sum over channels: each task leaves
// its part, and the parts are added in a fixed order.

static size_t scan_backward_floats(int B, int L, int E, int N) {
    size_t tasks = ((size_t)E + SCAN_WIDTH - 1) / SCAN_WIDTH;
    size_t chunks = ((size_t)L + SCAN_CHUNK - 1) / SCAN_CHUNK;
    return tasks * ((size_t)N * SCAN_WIDTH * (chunks + 2 * SCAN_CHUNK + 3) + (size_t)B * L * 2 * N);
}

// The arrays of task number `task` in scratch.
static ScanBlock scan_block(float *scratch, const Scan *s, int task) {
    const int tasks = (s->E + SCAN_WIDTH - 1) / SCAN_WIDTH, e0 = task * SCAN_WIDTH;
    const size_t chunks = ((size_t)s->L + SCAN_CHUNK - 1) / SCAN_CHUNK;
    const size_t step = (size_t)s->N * SCAN_WIDTH, per_task = step * (chunks + 2 * SCAN_CHUNK + 3);
    float *starts = scratch + per_task * task, *states = starts + step * chunks;
    float *decays = states + step * SCAN_CHUNK, *A = decays + step * SCAN_CHUNK;
    float *parts = scratch + per_task * tasks + (size_t)task * s->B * s->L * 2 * s->N;
    int width = s->E - e0 < SCAN_WIDTH ? s->E - e0 : SCAN_WIDTH;
    return (ScanBlock){.e0 = e0,
                       .width = width,
                       .starts = starts,
                       .states = states,
                       .decays = decays,
                       .A = A,
                       .d_A = A + step,
                       .g = A + 2 * step,
                       .parts = parts};
}

// The block's columns of an array (N,E), as (N,SCAN_WIDTH); missing channels are zero.
static void scan_gather(float *to, const float *from, const ScanBlock *k, int N, int E) {
    for (int n = 0; n < N; n++, to += SCAN_WIDTH) {
        memcpy(to, from + (size_t)n * E + k->e0, (size_t)k->width * sizeof *to);
        memset(to + k->width, 0, (size_t)(SCAN_WIDTH - k->width) * sizeof *to);
    }
}

// Sequence b of one block: d_h (N,E) holds the gradient of the state at the end, then at the start.
static void scan_backward_sequence(ScanBlock *k, const ScanGrad *d, const float *d_y, const Scan *s,
                                   const float *h0, int b) {
    const int L = s->L, N = s->N, E = s->E, chunks = (L + SCAN_CHUNK - 1) / SCAN_CHUNK;
    const size_t step = (size_t)N * SCAN_WIDTH, row = (size_t)b * L;
    float *d_h = d->d_h + (size_t)b * N * E;
    scan_gather(k->starts, h0 + (size_t)b * N * E, k, N, E);
    scan_gather(k->g, d_h, k, N, E);
    for (int t = 0; t < (chunks - 1) * SCAN_CHUNK; t++) { // in place; copied where a chunk starts
        float *at = k->starts + step * (t / SCAN_CHUNK + 1);
        recurrence_again(at, NULL, t % SCAN_CHUNK ? at : at - step, k, s, row + t);
    }
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        int t0 = chunk * SCAN_CHUNK, steps = L - t0 < SCAN_CHUNK ? L - t0 : SCAN_CHUNK;
        const float *start = k->starts + step * chunk;
        for (int i = 0; i < steps; i++) {
            float *h = k->states + step * i, *decay = k->decays + step * i;
            recurrence_again(h, decay, i ? h - step : start, k, s, row + t0 + i);
        }
        for (int i = steps - 1; i >= 0; i--) {
            const float *h = k->states + step * i, *decay = k->decays + step * i;
            recurrence_backward(k, d, d_y, s, row + t0 + i, h, decay, i ? h - step : start);
        }
    }
    for (int n = 0; n < N; n++)
        memcpy(d_h + (size_t)n * E + k->e0, k->g + (size_t)n * SCAN_WIDTH,
               (size_t)k->width * sizeof *d_h);
}

// d_y (T,E); h0 (B,N,E): the states before t = 0.
static void scan_backward(const ScanGrad *d, const float *d_y, const Scan *s, const float *h0) {
    const int N = s->N, E = s->E, T = s->B * s->L, tasks = (E + SCAN_WIDTH - 1) / SCAN_WIDTH;
#pragma omp for
    for (int task = 0; task < tasks; task++) {
        ScanBlock k = scan_block(d->scratch, s, task);
        scan_gather(k.A, s->A_neg, &k, N, E);
        memset(k.d_A, 0, (size_t)N * SCAN_WIDTH * sizeof *k.d_A);
        for (int b = 0; b < s->B; b++) scan_backward_sequence(&k, d, d_y, s, h0, b);
        for (int n = 0; n < N; n++)
            for (int i = 0; i < k.width; i++) {
                size_t at = (size_t)n * SCAN_WIDTH + i;
                d->d_A_log[(size_t)(k.e0 + i) * N + n] += k.d_A[at] * k.A[at];
            }
        for (int i = 0; i < k.width; i++) d->d_D_skip[k.e0 + i] += k.d_D[i];
    }
#pragma omp for
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            float d_B = 0, d_C = 0;
            for (int task = 0; task < tasks; task++) {
                const float *part = scan_block(d->scratch, s, task).parts + (size_t)t * 2 * N;
                d_B += part[n];
                d_C += part[N + n];
            }
            d->d_B_ssm[(size_t)t * s->ld_bc + n] = d_B;
            d->d_C_ssm[(size_t)t * s->ld_bc + n] = d_C;
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 Model: block, prefill, step
// Three arenas: the weights (mapped), the activations of one piece of text (Acts), and the state,
// which is all that a sequence remembers.

// --- where the model runs: Acts with a gpu run there. A state's numbers are then newer on the GPU
// until somebody asks for them.

#ifdef MAMBA_CUDA
extern const GpuBackend mamba_gpu;
static const GpuBackend *const GPU = &mamba_gpu;
#else
static const GpuBackend *const GPU = NULL; // then no Acts gets a gpu
#endif

static int gpu_failed(void) { return fail("%s", GPU->error()); }

// Brings a state's numbers back from the GPU, where they are newer. 0, or -1 after fail().
static int state_fetch(const State *s) {
    State *to = (State *)(uintptr_t)s; // what s means stays the same
    Acts *a = s->newer_on;
    to->newer_on = NULL;
    return a && GPU->get_state(a->gpu, to->conv, to->h, to->logits) ? gpu_failed() : 0;
}

// The numbers of s are about to be set here: those on the GPU no longer count.
static void state_detach(State *s) {
    if (s->newer_on) s->newer_on->gpu_state = NULL;
    s->newer_on = NULL;
}

// Default number of threads: the processors there are, but half of many, since those are often two
// to a core.
static int default_threads(void) {
#ifdef _OPENMP
    int n = omp_get_num_procs();
    return n <= 8 ? n : n <= 16 ? 8 : n <= 64 ? n / 2 : 32;
#else
    return 1;
#endif
}

// An arena is laid out twice by the same code: base NULL only measures, then it hands out pointers.
typedef struct {
    char *base;
    size_t used; // bytes, saturating
} Arena;

static void *take(Arena *from, size_t count, size_t size) {
    void *p = from->base ? from->base + from->used : NULL;
    size_t bytes = size_mul(count, size);
    from->used = size_add(
        from->used, bytes > SIZE_MAX - ALIGN ? SIZE_MAX : (bytes + ALIGN - 1) / ALIGN * ALIGN);
    return p;
}
static float *take_floats(Arena *from, size_t n) { return take(from, n, sizeof(float)); }

static size_t activation_row_floats(const Config *c) { // floats a token in a Work, without scratch
    return 2 * (size_t)c->D + 5 * (size_t)c->E + (size_t)(c->R + 2 * c->N);
}

static void acts_layout(Acts *a, const Config *c, Arena *from) {
    const size_t D = (size_t)c->D, E = (size_t)c->E, P = (size_t)(c->R + 2 * c->N);
    const size_t V = (size_t)c->V, R = (size_t)c->R, T = (size_t)a->piece;
    Work *w = &a->work;
    w->res = w->next = take_floats(from, T * D);
    w->xn = take_floats(from, T * D);
    w->xz = take_floats(from, T * 2 * E);
    w->u = take_floats(from, T * E);
    w->raw = w->xdb = take_floats(from, T * P);
    w->delta = take_floats(from, T * E);
    w->y = w->g = take_floats(from, T * E);
    w->packed = take_floats(from, matmul_floats(T, E > D ? (E > R ? E : R) : D > R ? D : R));
    w->carry = take_floats(from, scan_carry_floats(c->E, c->N));
    a->logits = take_floats(from, size_mul(LOGIT_ROWS, V));
    a->probs = take_floats(from, V);
    a->order = take(from, V, sizeof *a->order);
    a->seq = take(from, (size_t)c->n_layer * BATCH_MAX, sizeof *a->seq);
}

// Scratch for one pass at a time over one model; threads 0 = default. NULL after fail().
Acts *mamba_acts_new(const Model *m, int threads) {
    size_t piece = ((size_t)1 << 25) / activation_row_floats(&m->config); // 128 MB at the most,
    piece = piece > PIECE_MAX ? PIECE_MAX : piece < PIECE_MIN ? PIECE_MIN : piece; // or PIECE_MIN
    Acts *a = calloc(1, sizeof *a);
    if (!a) return fail("out of memory"), NULL;
    a->threads = threads > 0 ? threads : default_threads();
    a->piece = (int)piece;
    Arena arena = {NULL, 0};
    acts_layout(a, &m->config, &arena);
    arena = (Arena){a->arena = alloc_aligned(arena.used), 0};
    if (!a->arena) return free(a), NULL;
    acts_layout(a, &m->config, &arena);
    return a;
}

void mamba_acts_free(Acts *a) {
    if (!a) return;
    if (a->gpu_state && a->gpu_state->newer_on == a) state_fetch(a->gpu_state);
    if (a->gpu) GPU->close(a->gpu);
    free_aligned(a->arena);
    free(a);
}

// From now on the passes of a run on the GPU, float32: with float32 products for bf16 weights too.
// 0, or -1 after fail().
int mamba_acts_gpu(Acts *a, const Model *m, bool float32) {
    if (!GPU) return fail("this build has no GPU backend: make cuda");
    a->gpu = GPU->open(m, float32);
    return a->gpu ? 0 : gpu_failed();
}

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
#pragma omp barrier // softplus_bias() may not have waited
#pragma omp for
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int e = 0; e < E; e++) sum += (double)delta[(size_t)t * E + e];
        out[t] += (float)(sum / E / parts);
    }
}

// xz of the first layer where the vocabulary is small: a token's row depends on its id alone, so
// every id's row is computed once and copied. w->delta, not in use yet, holds the V rows.
static void in_proj_of_ids(const Model *m, Work *w, const Tensor *in_proj, int T) {
    const Config *c = &m->config;
    const Layer *p = &m->layer[0];
    size_t row = 2 * (size_t)c->E;
    embed(w->xn, NULL, &m->embedding, c->V);
    rmsnorm(w->xn, w->xn, f32(&p->norm), c->norm_eps, c->V, c->D, (size_t)c->D);
    matmul(w->delta, row, w->xn, (size_t)c->D, in_proj, f32(&p->in_bias),
           (Rows){c->V, false, w->packed});
#pragma omp for
    for (int t = 0; t < T; t++)
        memcpy(w->xz + (size_t)t * row, w->delta + (size_t)w->ids[t] * row,
               (size_t)in_proj->rows * sizeof(float));
}

// One layer over B sequences of L tokens: w->res (T,D) goes in, w->next comes out, and the states
// of seq (B) move on. Called by every thread of a team.
static void block(const Model *m, int layer, Work *w, const LayerState *seq, int B, int L) {
    const Config *c = &m->config;
    const Layer *p = &m->layer[layer];
    const int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N, T = B * L;
    const Rows rows = {T, L == 1, w->packed};
    float *dt_low = w->xdb, *B_ssm = w->xdb + R, *C_ssm = w->xdb + R + N; // columns of xdb (T,P)

    // After the last layer only the state may be wanted. Then z, C, y and out_proj are left out:
    // x is the first rows of in_proj, dt_low and B those of x_proj.
    const bool state_only = w->state_only && layer == c->n_layer - 1;
    Tensor in_proj = p->in_proj, x_proj = p->x_proj;
    if (state_only) in_proj.rows = E, x_proj.rows = R + N;

    // [x | z] = in_proj(rmsnorm(res))
    if (layer == 0 && w->ids && L > 1 && MATMUL_FEW <= c->V && 2 * c->V <= T)
        in_proj_of_ids(m, w, &in_proj, T);
    else {
        rmsnorm(w->xn, w->res, f32(&p->norm), c->norm_eps, T, D, (size_t)D);
        matmul(w->xz, 2 * (size_t)E, w->xn, (size_t)D, &in_proj, f32(&p->in_bias), rows);
    }
    // u = silu(conv(x))
    Conv conv = {w->xz, p->conv_t, f32(&p->conv_bias), B, L, E, K};
    conv1d_silu(w->u, seq, &conv);
    // The selection: delta, B and C are functions of the token.
    matmul(w->raw, (size_t)P, w->u, (size_t)E, &x_proj, NULL, rows);
    if (c->flags & FLAG_MIXER_NORM) { // FalconMamba: without norms large models became unstable
        rmsnorm(dt_low, w->raw, NULL, c->mixer_eps, T, R, (size_t)P);
        rmsnorm(B_ssm, w->raw + R, NULL, c->mixer_eps, T, N, (size_t)P);
        if (!state_only) rmsnorm(C_ssm, w->raw + R + N, NULL, c->mixer_eps, T, N, (size_t)P);
    }
    matmul(w->delta, (size_t)E, dt_low, (size_t)P, &p->dt_proj, NULL, rows);
    softplus_bias(w->delta, f32(&p->dt_bias), rows, E);
    if (w->selection && (w->selection_layer < 0 || w->selection_layer == layer))
        add_row_means(w->selection, w->delta, w->selection_layer < 0 ? c->n_layer : 1, T, E);
    // y = the scan of u; g = y * silu(z)
    Scan s = {w->u, w->delta, p->A_neg, B_ssm, C_ssm, f32(&p->D_skip), (size_t)P, B, L, E, N};
    scan(state_only ? NULL : w->y, seq, &s, w->carry);
    if (state_only) return;
    gate(w->g, w->y, w->xz, rows, E);
    // next = res + out_proj(g)
    matmul(w->xn, (size_t)D, w->g, (size_t)E, &p->out_proj, f32(&p->out_bias), rows);
    add_rows(w->next, w->res, w->xn, T, D);
}

// The model up to its last norm, for prefill (B = 1), step (L = 1) and training: B sequences of L
// tokens w->ids (T), states seq (n_layer,B). Returns the residual stream (T,D).
static const float *forward(const Model *m, Work *w, const LayerState *seq, int B, int L) {
    embed(w->res, w->ids, &m->embedding, B * L);
    for (int layer = 0; layer < m->config.n_layer; layer++) {
        block(m, layer, w, seq + (size_t)layer * B, B, L);
        if (w->one_each) w++;
    }
    return w->res;
}

// What to do with the logits (V) of each position in turn.
typedef void LogitsVisitor(void *context, const float *logits);

// Threads for a pass of so many tokens. A small pass runs alone, with the same bits: a team saves
// it little. Beside other programs a team crawls, since a barrier then waits for a time slice
// (story.bin beside a busy test run: 16 tokens/s by a team, 700 to 1,500 alone; on a quiet machine
// 1,820 and 1,240).
static int pass_team(const Model *m, const Acts *a, int tokens) {
    return (double)m->n_params * tokens < 16e6 ? 1 : a->threads;
}

// s has read n more tokens.
static void state_read(State *s, const int32_t *ids, size_t n) {
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
                (LayerState){s[b]->conv + window * layer, s[b]->h + NE * layer};
}

// The logits of every row of res (L,D), LOGIT_ROWS at a time, for visit; the last ones stay in s.
static void visit_logits(const Model *m, Acts *a, State *s, const float *res, int L,
                         LogitsVisitor *visit, void *context) {
    const Config *c = &m->config;
    const size_t D = (size_t)c->D, V = (size_t)c->V;
    float *xn = a->work.xn;
    rmsnorm(xn, res, f32(&m->norm_f), c->norm_eps, L, c->D, D);
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
    rmsnorm(a->work.xn, res + (L - 1) * D, f32(&m->norm_f), c->norm_eps, B, c->D, L * D);
    matmul(logits, V, a->work.xn, L * D, &m->head, NULL, (Rows){B, true, a->work.packed});
    if (B == 1) return;
#pragma omp for
    for (int b = 0; b < B; b++) memcpy(s[b]->logits, logits + b * V, V * sizeof(float));
}

// One pass by a team of threads: B sequences of L tokens ids (B,L), at most a->piece in all. The
// states' logits become those after the last token, unless more of the text follows and nobody
// wants to see them.
static void pass(const Model *m, Acts *a, State *const *s, const int32_t *ids, int B, int L,
                 bool more, LogitsVisitor *visit, void *context) {
    int team = pass_team(m, a, B * L);
    (void)team;
    a->work.ids = ids;
    a->work.state_only = more && !visit;
    layer_states(a->seq, m, s, B);
#pragma omp parallel num_threads(team)
    {
        const float *res = forward(m, &a->work, a->seq, B, L);
        if (visit) visit_logits(m, a, s[0], res, L, visit, context);
        else if (!more) last_logits(m, a, s, res, B, L);
    }
    for (int b = 0; b < B; b++) state_read(s[b], ids + (size_t)b * L, (size_t)L);
}

static int check_ids(const Model *m, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->config.V)
            return fail("token id %d at position %zu is not in the vocabulary of %d", ids[i], i,
                        m->config.V);
    return 0;
}

// mamba_prefill where a has a GPU: the state goes there once, and stays while the same one is read
// into.
static int prefill_gpu(Acts *a, State *s, const int32_t *ids, size_t n, LogitsVisitor *visit,
                       void *context) {
    if (n == 0) return 0;
    State *there = a->gpu_state;
    if (there != s || s->newer_on != a) {
        if (there && there != s && there->newer_on == a && state_fetch(there)) return -1;
        if (state_fetch(s) || GPU->set_state(a->gpu, s->conv, s->h, s->logits)) return gpu_failed();
        a->gpu_state = s;
    }
    s->newer_on = a;
    if (GPU->prefill(a->gpu, ids, n, visit, context) ||
        GPU->get_state(a->gpu, NULL, NULL, s->logits))
        return gpu_failed();
    state_read(s, ids, n);
    return 0;
}

// Reads n tokens into the state: any number, in memory that does not grow with it. Leaves the
// logits after the last one in the state, and hands every position's to visit where that is not
// NULL. 0, or -1 after fail(), the state untouched.
int mamba_prefill(const Model *m, Acts *a, State *s, const int32_t *ids, size_t n,
                  LogitsVisitor *visit, void *context) {
    if (check_ids(m, ids, n)) return -1;
    if (a->gpu) return prefill_gpu(a, s, ids, n, visit, context);
    if (state_fetch(s)) return -1;
    for (size_t done = 0; done < n;) {
        int L = n - done < (size_t)a->piece ? (int)(n - done) : a->piece;
        a->work.selection = a->selection ? a->selection + done : NULL;
        done += (size_t)L;
        pass(m, a, &s, ids + done - L, 1, L, done < n, visit, context);
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

// Reads ids[b] into s[b], B different states, at most BATCH_MAX. Every weight is read once for all
// of them, and each gets the same bits as alone. 0, or -1 after fail(), the states untouched.
int mamba_step_batch(const Model *m, Acts *a, State *const *s, const int32_t *ids, int B) {
    assert(B >= 1 && B <= BATCH_MAX && B <= LOGIT_ROWS && B <= a->piece);
    if (check_ids(m, ids, (size_t)B)) return -1;
    for (int b = 0; b < B; b++)
        if (state_fetch(s[b])) return -1;
    a->work.selection = NULL;
    pass(m, a, s, ids, B, 1, false, NULL, NULL);
    return 0;
}

// Reads one token: the recurrence. 0, or -1 after fail().
int mamba_step(const Model *m, Acts *a, State *s, int32_t id) {
    return a->gpu ? mamba_prefill(m, a, s, &id, 1, NULL, NULL) : mamba_step_batch(m, a, &s, &id, 1);
}

COLD
// ---------------------------------------------------------------------------------------------------------------------
// 8 State: save, load, copy
// A sequence's whole past in some megabytes, whatever its length. The file: 512 bytes of
// little-endian header, then the numbers of State.data; the README has the fields.

enum { STATE_HEADER = 512, STATE_VERSION = 1 };
static const char STATE_MAGIC[8] = {'m', 'a', 'm', 'b', 'a', '.', 's', '\n'};

static size_t state_floats(const Config *c) {
    return size_add((size_t)c->V,
                    size_mul((size_t)c->n_layer * (size_t)(c->N + c->K - 1), (size_t)c->E));
}

void mamba_state_free(State *s) {
    if (s) state_detach(s);
    free_aligned(s);
}

static void state_point(State *s, const Config *c) {
    s->logits = s->data;
    s->conv = s->logits + c->V;
    s->h = s->conv + (size_t)c->n_layer * (size_t)(c->K - 1) * (size_t)c->E;
}

// The start of a text: all zeros, nothing read. NULL after fail().
State *mamba_state_new(const Model *m) {
    size_t floats = state_floats(&m->config);
    State *s = alloc_aligned(size_add(sizeof *s, size_mul(floats, sizeof(float))));
    if (!s) return NULL;
    s->floats = floats;
    state_point(s, &m->config);
    return s;
}

// to becomes equal to from; both states of the same model.
void mamba_state_copy(const Model *m, State *to, const State *from) {
    assert(to->floats == from->floats);
    state_detach(to);
    state_fetch(from);
    memcpy(to, from, sizeof *to + from->floats * sizeof(float));
    state_point(to, &m->config);
}

// Back to the start of a text; the random generator goes on.
void mamba_state_reset(const Model *m, State *s) {
    uint64_t random = s->random, floats = s->floats;
    state_detach(s);
    memset(s, 0, sizeof *s + floats * sizeof(float));
    s->random = random, s->floats = floats;
    state_point(s, &m->config);
}

static void state_header(unsigned char *h, const Model *m, const State *s, uint32_t data_crc) {
    const Config *c = &m->config;
    const int sizes[] = {c->V, c->n_layer, c->E, c->N, c->K};
    memset(h, 0, STATE_HEADER);
    memcpy(h, STATE_MAGIC, sizeof STATE_MAGIC);
    put_u32(h + 8, STATE_VERSION), put_u32(h + 12, STATE_HEADER);
    for (int i = 0; i < 5; i++) put_u32(h + 16 + 4 * i, (uint32_t)sizes[i]);
    put_u32(h + 36, m->id);
    put_u64(h + 40, s->position), put_u64(h + 48, s->random), put_u64(h + 56, s->floats);
    put_u32(h + 64, (uint32_t)s->n_recent);
    for (int i = 0; i < RECENT; i++) put_u32(h + 68 + 4 * i, (uint32_t)s->recent[i]);
    put_u32(h + 324, (uint32_t)s->pending.n);
    memcpy(h + 328, s->pending.bytes, PENDING);
    put_u32(h + 332, data_crc);
    put_u32(h + STATE_HEADER - 4, crc32_of(0, h, STATE_HEADER - 4));
}

// --- files that are written whole or not at all
// A NewFile is written under a temporary name in the folder of its target, then renamed to the
// target. At every moment the target is the old file or the whole new one. The temporary has a
// random name and is created exclusively: no other file is opened, and two programs that write the
// same target do not meet. A target that is a link stays a link: the file that it names is
// replaced, as if the link had been opened for writing. The mode of an existing target is kept.

typedef struct {
    const char *path; // as the caller gave it; lives until commit or discard
    char *target;     // path with its links followed
    char *temporary;  // NULL: the file is not replaced but written in place (a device, a pipe)
    FILE *f;
} NewFile;

enum { TEMPORARIES = 8 };
// The names of temporaries that exist now: main's signal handler removes them.
static char *volatile temporaries[TEMPORARIES];

static void exchange_temporary(char *from, char *to) {
#pragma omp critical(new_files)
    for (int i = 0; i < TEMPORARIES; i++)
        if (temporaries[i] == from) {
            temporaries[i] = to;
            break;
        }
}

// Closes f, after everything has reached the disk if sync is set: 0, or -1 with errno set.
static int close_file(FILE *f, bool sync) {
    errno = 0;
    int bad = fflush(f) || ferror(f);
#ifdef MAMBA_POSIX
    bad = bad || (sync && fsync(fileno(f)));
#endif
    (void)sync;
    int why = errno;
    if (fclose(f) && !bad) return -1;
    errno = why ? why : EIO; // an earlier write failed and its reason is no longer known
    return bad ? -1 : 0;
}

// Puts a finished file in another's place at once: 0, or -1 with errno set.
static int replace_file(const char *from, const char *to) {
#ifdef _WIN32
    remove(to); // where rename does not replace
#endif
    return rename(from, to);
}

// Whether path is nothing yet, or a regular file that this program does not have as its stdout or
// stderr. Rename would put a new file in the place of /dev/null too, and `-o /dev/stdout > file`
// would lose what is printed.
static bool is_replaceable(const char *path) {
#ifdef MAMBA_POSIX
    struct stat info, own;
    if (stat(path, &info)) return true;
    for (int fd = 1; fd <= 2; fd++)
        if (fstat(fd, &own) == 0 && own.st_dev == info.st_dev && own.st_ino == info.st_ino)
            return false;
    return S_ISREG(info.st_mode);
#else
    return path != NULL;
#endif
}

// The name of the file that path leads to, malloc'd; the file need not exist. NULL after fail().
static char *follow_links(const char *path) {
    char *name = malloc(strlen(path) + 1);
    if (!name) return fail("out of memory: the name of %s", path), NULL;
    strcpy(name, path);
#ifdef MAMBA_POSIX
    char to[4096];
    ssize_t n;
    for (int links = 0; (n = readlink(name, to, sizeof to)) >= 0; links++) {
        char *slash = strrchr(name, '/');
        size_t folder = slash && to[0] != '/' ? (size_t)(slash + 1 - name) : 0;
        char *next = malloc(folder + (size_t)n + 1);
        bool bad = !next || links == 40 || n == (ssize_t)sizeof to;
        if (bad) fail("cannot write %s: its links do not lead to a file", path);
        else {
            memcpy(next, name, folder);
            memcpy(next + folder, to, (size_t)n);
            next[folder + (size_t)n] = 0;
        }
        free(name);
        name = next;
        if (bad) return free(name), NULL;
    }
#endif
    return name;
}

// A name beside target, such as out.bin.1f0c93aa.tmp, malloc'd; another one for each attempt. NULL
// after fail().
static char *temporary_name(const char *target, int attempt) {
    size_t end = strlen(target), base = end, room = end + 16;
    while (base && target[base - 1] != '/' && target[base - 1] != '\\') base--;
    if (end - base >
        200) // a file's name has at most 255 bytes; UTF-8 is not cut within a character
        for (end = base + 200; end > base && ((unsigned char)target[end] & 0xC0) == 0x80;) end--;
    char *name = malloc(room);
    uint64_t random = (uint64_t)time(NULL);
    random = random_u64(&random) ^ (uint64_t)clock() ^ (uint64_t)attempt << 32;
    random = random_u64(&random) ^ (uint64_t)(uintptr_t)&random;
#ifdef MAMBA_POSIX
    random = random_u64(&random) ^ (uint64_t)getpid();
#endif
    if (!name) return fail("out of memory: the name of %s", target), NULL;
    snprintf(name, room, "%.*s.%08x.tmp", (int)end, target, (unsigned)(random_u64(&random) >> 32));
    return name;
}

// A file that did not exist, open for writing: NULL with errno set, EEXIST if there was one.
static FILE *create_file(const char *name, unsigned mode) {
#ifdef MAMBA_POSIX
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL, (mode_t)mode);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (fd >= 0 && !f) close(fd), unlink(name);
    return f;
#else
    (void)mode;
    return fopen(name, "wbx");
#endif
}

// Closes and removes what was written; the target stays as it was.
static void new_file_discard(NewFile *w) {
    if (w->f) fclose(w->f);
    if (w->f && w->temporary) remove(w->temporary);
    if (w->f && w->temporary) exchange_temporary(w->temporary, NULL);
    free(w->temporary), free(w->target);
    memset(w, 0, sizeof *w);
}

#ifdef MAMBA_POSIX
// Gives fd the mode of the file that it will replace, and its owner where that is allowed. Without
// the group, the group's rights go too: they were not given to another group.
static void keep_mode(int fd, const struct stat *old) {
    struct stat now;
    mode_t mode = old->st_mode & 0777;
    if (fstat(fd, &now)) return;
    if ((now.st_uid != old->st_uid || now.st_gid != old->st_gid) &&
        fchown(fd, old->st_uid, old->st_gid) && fchown(fd, (uid_t)-1, old->st_gid) &&
        now.st_gid != old->st_gid)
        mode &= ~(mode_t)070;
    fchmod(fd, mode); // fails on file systems without modes, which lose nothing
}
#endif

// Opens w->f to write what path will hold. in_place: a device or a pipe is allowed too, and is
// appended to as it is. 0, or -1 after fail().
static int new_file_open(NewFile *w, const char *path, bool in_place) {
    unsigned mode = 0666;
    memset(w, 0, sizeof *w);
    w->path = path;
    if (!is_replaceable(path)) {
        if (!in_place)
            return fail("cannot write %s: not a regular file, or this program's stdout", path);
        w->f = fopen(path, "ab");
        return w->f ? 0 : fail("cannot write %s: %s", path, strerror(errno));
    }
    if (!(w->target = follow_links(path))) return -1;
#ifdef MAMBA_POSIX
    struct stat old;
    bool exists = stat(w->target, &old) == 0;
    if (exists) mode = old.st_mode & 0777;
#endif
    for (int attempt = 0; attempt < 100 && !w->f; attempt++) {
        free(w->temporary);
        if (!(w->temporary = temporary_name(w->target, attempt))) break;
        if (!(w->f = create_file(w->temporary, mode))) {
            fail("cannot write %s: %s", path, strerror(errno));
            if (errno != EEXIST) break;
        }
    }
    if (!w->f) return new_file_discard(w), -1;
    exchange_temporary(NULL, w->temporary);
#ifdef MAMBA_POSIX
    if (exists) keep_mode(fileno(w->f), &old);
#endif
    return 0;
}

// Finishes the file and puts it in the target's place. 0, or -1 after fail(): the target stays as
// it was.
static int new_file_commit(NewFile *w) {
    FILE *f = w->f;
    bool bad = close_file(f, w->temporary != NULL) != 0;
    if (!bad && w->temporary) bad = replace_file(w->temporary, w->target) != 0;
    if (bad) fail("cannot write %s: %s", w->path, strerror(errno));
    if (bad && w->temporary) remove(w->temporary);
    if (w->temporary) exchange_temporary(w->temporary, NULL);
    w->f = NULL;
    new_file_discard(w);
    return bad ? -1 : 0;
}

typedef struct { // of a file
    const void *data;
    size_t bytes;
} Piece;

// A whole file from its pieces. 0, or -1 after fail(), an older file untouched.
static int write_pieces(const char *path, const Piece *piece, int n) {
    NewFile w;
    if (new_file_open(&w, path, false)) return -1;
    for (int i = 0; i < n; i++)
        if (fwrite(piece[i].data, 1, piece[i].bytes, w.f) != piece[i].bytes) {
            fail("cannot write %s: %s", path, strerror(errno));
            return new_file_discard(&w), -1;
        }
    return new_file_commit(&w);
}

// 0, or -1 after fail(), an older file untouched.
int mamba_state_save(const Model *m, const State *s, const char *path) {
    size_t bytes = s->floats * sizeof(float);
    unsigned char header[STATE_HEADER];
    float *data = malloc(bytes);
    if (!data) return fail("out of memory: saving a state of %zu bytes", bytes);
    if (state_fetch(s)) return free(data), -1;
    memcpy(data, s->data, bytes);
    fix_endian(data, bytes, sizeof(float));
    state_header(header, m, s, crc32_of(0, data, bytes));
    int result = write_pieces(path, (Piece[]){{header, sizeof header}, {data, bytes}}, 2);
    free(data);
    return result;
}

static int read_state(const Model *m, State *s, const unsigned char *h, size_t bytes,
                      const char *path) {
    const Config *c = &m->config;
    const int sizes[] = {c->V, c->n_layer, c->E, c->N, c->K};
    if (bytes < STATE_HEADER || memcmp(h, STATE_MAGIC, sizeof STATE_MAGIC))
        return fail("%s: not a state file", path);
    if (u32_at(h + 8) != STATE_VERSION || u32_at(h + 12) != STATE_HEADER)
        return fail("%s: state version %u, this program reads version %d", path, u32_at(h + 8),
                    STATE_VERSION);
    if (crc32_of(0, h, STATE_HEADER - 4) != u32_at(h + STATE_HEADER - 4))
        return fail("%s: the header's checksum does not match: the state file is damaged", path);
    for (int i = 0; i < 5; i++)
        if (u32_at(h + 16 + 4 * i) != (uint32_t)sizes[i])
            return fail("%s: the state was saved with a model of another shape", path);
    if (u32_at(h + 36) != m->id) return fail("%s: the state was saved with another model", path);
    if (u64_at(h + 56) != s->floats || bytes - STATE_HEADER != s->floats * sizeof(float))
        return fail("%s: %zu bytes where %zu are needed: the state file is truncated or damaged",
                    path, bytes, STATE_HEADER + (size_t)s->floats * sizeof(float));
    if (crc32_of(0, h + STATE_HEADER, bytes - STATE_HEADER) != u32_at(h + 332))
        return fail("%s: the checksum does not match: the state file is damaged", path);
    uint32_t n_recent = u32_at(h + 64), n_pending = u32_at(h + 324);
    bool good = n_recent == (u64_at(h + 40) < RECENT ? u64_at(h + 40) : RECENT) && n_pending <= 3;
    for (uint32_t i = 0; i < RECENT; i++) good = good && u32_at(h + 68 + 4 * i) < (uint32_t)c->V;
    if (!good) return fail("%s: a header field is out of range: the state file is damaged", path);
    state_detach(s);
    s->position = u64_at(h + 40), s->random = u64_at(h + 48), s->n_recent = (int32_t)n_recent;
    for (int i = 0; i < RECENT; i++) s->recent[i] = (int32_t)u32_at(h + 68 + 4 * i);
    s->pending.n = (int)n_pending;
    memcpy(s->pending.bytes, h + 328, PENDING);
    memcpy(s->data, h + STATE_HEADER, bytes - STATE_HEADER);
    fix_endian(s->data, bytes - STATE_HEADER, sizeof(float));
    return 0;
}

// Replaces s by what mamba_state_save wrote with the same model. 0, or -1 after fail(), s
// untouched.
int mamba_state_load(const Model *m, State *s, const char *path) {
    size_t bytes;
    bool mapped;
    unsigned char *data = file_map(path, &bytes, &mapped);
    int result = data ? read_state(m, s, data, bytes, path) : -1;
    if (data) file_unmap(data, bytes, mapped);
    return result;
}

COLD_END
// ---------------------------------------------------------------------------------------------------------------------
// 9 Quantiser
// Q8 and Q4 from wider weights, a tile at a time (section 3 says what that is). A row's scale in a
// tile is its largest weight over one of some divisors: 127 for Q8; for Q4 the one of 22 whose
// codes leave the smallest sum of squared errors, which takes that error from 9.7 to 8.1% of the
// weights (normally distributed ones). What would round otherwise elsewhere is avoided, so that
// export.py writes the same bytes: a scale is rounded before it divides, weight - code * scale is
// exact, and so is its square.

static float round_bf16(float x) { // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The code of weight w: w / scale to the nearest whole number, ties to even, by the constant that
// exp_vec rounds with.
static inline float code_of(float w, float scale, Type type) {
    float code = w / (scale == 0 ? 1 : scale) + 12582912.0f;
    code -= 12582912.0f;
    float lowest = type == Q8 ? -127 : -8, highest = type == Q8 ? 127 : 7;
    return code < lowest ? lowest : code > highest ? highest : code;
}

// For each row r the scale of w[.][r] over a divisor, where that makes a smaller error than the
// best one before.
static void try_divisor(float scale[TILE], double error[TILE], const float w[TILE][TILE],
                        const float peak[TILE], float divisor, Type type) {
    float tried[TILE];
    double sum[TILE] = {0};
    for (int r = 0; r < TILE; r++) tried[r] = round_bf16(peak[r] / divisor);
    for (int k = 0; k < TILE; k++)
        for (int r = 0; r < TILE; r++) {
            float off = w[k][r] - code_of(w[k][r], tried[r], type) * tried[r];
            sum[r] += (double)off * (double)off;
        }
    for (int r = 0; r < TILE; r++)
        if (sum[r] < error[r]) error[r] = sum[r], scale[r] = tried[r];
}

// tile = w, where w[k][r] is input k of row r; all finite.
static void quantize_tile(unsigned char *tile, const float w[TILE][TILE], Type type) {
    int bits = code_bits(type);
    float peak[TILE] = {0}, scale[TILE] = {0};
    double error[TILE];
    for (int r = 0; r < TILE; r++) error[r] = INFINITY;
    for (int k = 0; k < TILE; k++)
        for (int r = 0; r < TILE; r++)
            if (fabsf(w[k][r]) > fabsf(peak[r])) peak[r] = w[k][r];
    if (type == Q8) try_divisor(scale, error, w, peak, 127, type);
    else
        for (int quarters = 24; quarters <= 34; quarters++)
            for (int sign = -1; sign <= 1; sign += 2)
                try_divisor(scale, error, w, peak, (float)(sign * quarters) / 4, type);
    for (int r = 0; r < TILE; r++) {
        float s = scale[r] == 0 ? 0 : scale[r]; // not -0
        uint32_t word[TILE] = {0}, scale_bits;
        memcpy(&scale_bits, &s, sizeof scale_bits);
        half upper = (half)(scale_bits >> 16);
        memcpy(tile + (size_t)r * sizeof upper, &upper, sizeof upper);
        for (int k = 0; k < TILE; k++) {
            int code = (int)code_of(w[k][r], s, type) + (1 << (bits - 1));
            word[k / (32 / bits)] |= (uint32_t)code << (k % (32 / bits) * bits);
        }
        for (int i = 0; i < bits; i++) {
            word[i] ^= 0x80000000u; // the last code's highest bit: two's complement
            memcpy(tile + TILE_SCALES + (size_t)(i * TILE + r) * 4, &word[i], 4);
        }
    }
}

// Fills the tiles of a Q8 or Q4 tensor; 0, or -1 where a weight is not finite.
static int quantize_tensor(const Tensor *to, const Tensor *from) {
    size_t tiles = tiles_of((size_t)to->cols);
    int bad = 0;
#pragma omp parallel for reduction(| : bad)
    for (int r0 = 0; r0 < to->rows; r0 += TILE)
        for (int k0 = 0; k0 < to->cols; k0 += TILE) {
            float w[TILE][TILE] = {{0}}, row[TILE];
            int n = to->cols - k0 < TILE ? to->cols - k0 : TILE;
            for (int r = 0; r < TILE && r0 + r < to->rows; r++) {
                tensor_widen(row, from, r0 + r, k0, n);
                for (int k = 0; k < n; k++) w[k][r] = row[k], bad |= !(fabsf(row[k]) <= FLT_MAX);
            }
            if (!bad)
                quantize_tile((unsigned char *)(uintptr_t)to->data +
                                  ((size_t)(r0 / TILE) * tiles + (size_t)(k0 / TILE)) *
                                      tile_bytes(to->type),
                              w, to->type);
        }
    return bad ? -1 : 0;
}

typedef struct { // the tensors of a model in the file's order
    Tensor **list;
    TensorInfo *info;
    int n;
} TensorList;

static void list_tensor(void *context, const TensorInfo *info, Tensor *w) {
    TensorList *all = context;
    all->info[all->n] = *info, all->list[all->n++] = w;
}

static int list_tensors(TensorList *all, Model *m) {
    size_t room = 16 + 16 * (size_t)m->config.n_layer;
    *all = (TensorList){malloc(room * sizeof *all->list), malloc(room * sizeof *all->info), 0};
    if (!all->list || !all->info) return fail("out of memory: a list of %zu tensors", room);
    each_tensor(m, list_tensor, all);
    return 0;
}

static int copy_tensor(const Tensor *to, const Tensor *from, const TensorInfo *info) {
    char label[LABEL];
    if (!is_quantized(to->type))
        for (int row = 0; row < to->rows; row++)
            tensor_widen((float *)(uintptr_t)to->data + (size_t)row * (size_t)to->cols, from, row,
                         0, from->cols);
    else if (quantize_tensor(to, from)) {
        tensor_label(label, info);
        return fail("%s holds a value that is not finite", label);
    }
    return 0;
}

// A copy of a model in memory of its own with matrices in F32, Q8 or Q4. NULL after fail().
static Model *copy_as(Model *from, Type type) {
    Config config = from->config;
    config.type = type;
    Model *to = blank_model(&config);
    TensorList source = {NULL, NULL, 0}, target = {NULL, NULL, 0};
    int result = to && list_tensors(&source, from) == 0 ? list_tensors(&target, to) : -1;
    for (int i = 0; i < source.n && result == 0; i++)
        result = copy_tensor(target.list[i], source.list[i], &source.info[i]);
    free(source.list), free(source.info), free(target.list), free(target.info);
    if (result == 0 && make_derived(to) == 0) return to;
    mamba_free(to);
    return NULL;
}

// Their tokenizer stays with the original, which must outlive them. The float32 copy is ready to be
// trained.
Model *mamba_float_copy(Model *from) { return copy_as(from, F32); }
Model *mamba_quantize(Model *from, bool four_bits) { return copy_as(from, four_bits ? Q4 : Q8); }

// ---------------------------------------------------------------------------------------------------------------------
// 10 [train] Training: initialisation, loss and backward of the model, AdamW
// Weights, gradients and the optimizer's two moments are four arenas of one layout, all float32. A
// pass takes B sequences of L tokens, B * L rows; what a block's backward needs of its forward is
// kept (Saved), everything else is computed again.

typedef struct {
    uint64_t seed;
    const Config *config;
} InitContext;

static void narrow(void *to, size_t i, float value,
                   Type type) { // float32 to storage; f16 only in its normal range
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (type == F32) ((float *)to)[i] = value;
    else if (type == BF16) ((half *)to)[i] = (half)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    else
        ((half *)to)[i] =
            (half)((bits >> 16 & 0x8000) |
                   (fabsf(value) < 0x1p-14f ? 0 : ((bits & 0x7FFFFFFF) - 0x38000000) >> 13));
}

static double random_normal(uint64_t *state) { // Box-Muller, one of the pair
    double r = sqrt(-2 * log(1 - random_unit(state)));
    return r * cos(6.283185307179586 * random_unit(state));
}

// As the reference implementation starts: dt_bias so that softplus(dt_bias) is log-uniform in
// [0.001, 0.1], never below 1e-4; A = -1 .. -N; out_proj smaller with depth, so that the residual
// stream's variance does not grow with it.
static float initial_value(Init init, int fan_in, int column, int n_layer, uint64_t *random) {
    double uniform = 2 * random_unit(random) - 1, range = 1 / sqrt((double)fan_in);
    if (init == INIT_ONES) return 1;
    if (init == INIT_ZEROS) return 0;
    if (init == INIT_NORMAL) return (float)(0.02 * random_normal(random));
    if (init == INIT_OUT) return (float)(uniform * range / sqrt((double)n_layer));
    if (init == INIT_A_LOG) return logf((float)(column + 1));
    if (init == INIT_DT_BIAS) {
        double dt = fmax(exp((uniform + 1) / 2 * log(100)) * 0.001, 1e-4);
        return (float)(dt + log(-expm1(-dt))); // the inverse of softplus
    }
    return (float)(uniform * range); // INIT_LINEAR, INIT_CONV, INIT_DT
}

// The same numbers as below, TILE rows at a time.
static void init_tiles(const Tensor *w, uint64_t seed, Init init, int fan_in, int n_layer) {
    size_t tiles = tiles_of((size_t)w->cols);
#pragma omp parallel for
    for (int r0 = 0; r0 < w->rows; r0 += TILE) {
        uint64_t random[TILE];
        for (int r = 0; r < TILE; r++) {
            uint64_t at = seed ^ (uint64_t)(r0 + r);
            random[r] = random_u64(&at);
        }
        for (int k0 = 0; k0 < w->cols; k0 += TILE) {
            float value[TILE][TILE] = {{0}};
            for (int r = 0; r < TILE && r0 + r < w->rows; r++)
                for (int k = 0; k < TILE && k0 + k < w->cols; k++)
                    value[k][r] = initial_value(init, fan_in, k0 + k, n_layer, &random[r]);
            quantize_tile((unsigned char *)(uintptr_t)w->data +
                              ((size_t)(r0 / TILE) * tiles + (size_t)(k0 / TILE)) *
                                  tile_bytes(w->type),
                          value, w->type);
        }
    }
}

static void init_tensor(void *context, const TensorInfo *info, Tensor *w) {
    InitContext *c = context;
    uint64_t seed = random_u64(
        &c->seed); // each row has a stream of its own, so that rows can be shared among threads
    int fan_in =
        info->init == INIT_CONV ? c->config->K : w->cols; // the conv's bias has the conv's fan-in
#pragma omp parallel for
    for (int row = 0; row < w->rows; row++) {
        uint64_t at = seed ^ (uint64_t)row,
                 random =
                     random_u64(&at); // hashed: neighbouring states are shifted copies of a stream
        for (int i = 0; i < w->cols && !is_quantized(w->type); i++)
            narrow((void *)(uintptr_t)w->data, (size_t)row * (size_t)w->cols + (size_t)i,
                   initial_value(info->init, fan_in, i, c->config->n_layer, &random), w->type);
    }
    if (is_quantized(w->type)) init_tiles(w, seed, info->init, fan_in, c->config->n_layer);
}

Model *mamba_random_model(const Config *config, uint64_t seed) {
    Model *m = blank_model(config);
    if (!m) return NULL;
    InitContext init = {seed, &m->config};
    each_tensor(m, init_tensor, &init);
    if (make_derived(m) == 0) return m;
    mamba_free(m);
    return NULL;
}

// --- loss and backward

enum { LOSS_ROWS = 128 }; // rows of logits that exist at a time

typedef struct Trainer {
    Model *model, *gradient; // gradient: the same tensors, holding d_ of each
    float *moment, *moment2; // AdamW's, in the same layout
    int B, L, threads;       // a pass has T = B L rows
    GpuTrainer *gpu;         // where everything below and the arenas live instead; NULL: here
    uint64_t step;           // optimizer steps taken
    Work *work;              // (n_layer + 1) what backward needs of each layer; of the last, res
    LayerState *seq;         // (n_layer,B) states of a pass
    float *h0, *window0;     // (B,N,E), (B,K-1,E) before the first token, in all layers; zeros
    float *h, *window;       // (n_layer,B,N,E), (n_layer,B,K-1,E): where seq points
    float *d_h, *d_window;   // (B,N,E), (B,K-1,E) of the layer in hand
    float *d_res, *d_xn;     // (T,D)
    float *d_xz;             // (T,2E)
    float *d_u, *d_delta;    // (T,E)
    float *d_y;              // (T,E)
    float *d_xdb;            // (T,P)
    float *d_c;              // (L,E) scratch of the convolution
    float *scale;            // (T) scratch of the norms
    float *losses;           // (T)
    float *logits;           // (LOSS_ROWS,V), then their gradient
    float *scan;             // scratch of the scan
    void *arena;             // of everything from work on
} Trainer;

static void trainer_layout(Trainer *x, Arena *from) {
    const Config *c = &x->model->config;
    const size_t B = (size_t)x->B, T = B * (size_t)x->L, D = (size_t)c->D, E = (size_t)c->E;
    const size_t P = (size_t)(c->R + 2 * c->N), V = (size_t)c->V, layers = (size_t)c->n_layer;
    const size_t NE = (size_t)c->N * E, window = (size_t)(c->K - 1) * E;
    const bool normed = c->flags & FLAG_MIXER_NORM;
    size_t widest = 2 * E > D ? 2 * E : D, loss = V > D ? V : D, packed, packed_loss;
    if (widest < P) widest = P;
    packed = matmul_floats(T, widest);
    packed_loss = matmul_floats(LOSS_ROWS, loss);

    x->work = take(from, layers + 1, sizeof *x->work);
    x->seq = take(from, layers * B, sizeof *x->seq);
    Work shared = {.one_each = true};
    shared.xn = take_floats(from, T * D);
    shared.g = take_floats(from, T * E);
    shared.packed = take_floats(from, packed > packed_loss ? packed : packed_loss);
    float *res = take_floats(from, T * D);
    for (size_t layer = 0; layer <= layers; layer++) {
        Work w = shared;
        w.res = res;
        if (layer < layers) {
            w.next = res = take_floats(from, T * D);
            w.xz = take_floats(from, T * 2 * E);
            w.u = take_floats(from, T * E);
            w.xdb = take_floats(from, T * P);
            w.raw = normed ? take_floats(from, T * P) : w.xdb;
            w.delta = take_floats(from, T * E);
            w.y = take_floats(from, T * E);
        }
        if (x->work) x->work[layer] = w;
    }
    x->h0 = take_floats(from, B * NE);
    x->window0 = take_floats(from, B * window);
    x->h = take_floats(from, layers * B * NE);
    x->window = take_floats(from, layers * B * window);
    x->d_h = take_floats(from, B * NE);
    x->d_window = take_floats(from, B * window);
    for (size_t i = 0; i < layers * B && x->seq; i++)
        x->seq[i] = (LayerState){x->window + i * window, x->h + i * NE};
    x->d_res = take_floats(from, T * D);
    x->d_xn = take_floats(from, T * D);
    x->d_xz = take_floats(from, T * 2 * E);
    x->d_u = take_floats(from, T * E);
    x->d_delta = take_floats(from, T * E);
    x->d_y = take_floats(from, T * E);
    x->d_xdb = take_floats(from, T * P);
    x->d_c = take_floats(from, (size_t)x->L * E);
    x->scale = take_floats(from, T);
    x->losses = take_floats(from, T);
    x->logits = take_floats(from, LOSS_ROWS * V);
    x->scan = take_floats(from, scan_backward_floats(x->B, x->L, c->E, c->N));
}

void mamba_trainer_free(Trainer *x) {
    if (!x) return;
    if (x->gpu) GPU->trainer_close(x->gpu);
    mamba_free(x->gradient);
    free_aligned(x->moment);
    free_aligned(x->moment2);
    free_aligned(x->arena);
    free(x);
}

// Passes from now on have B sequences of L tokens. 0, or -1 after fail().
int mamba_trainer_resize(Trainer *x, int B, int L) {
    x->B = B, x->L = L;
    if (x->gpu) return GPU->trainer_resize(x->gpu, B, L) ? gpu_failed() : 0;
    Arena arena = {NULL, 0};
    trainer_layout(x, &arena);
    free_aligned(x->arena);
    x->arena = alloc_aligned(arena.used);
    if (!x->arena) return -1;
    arena = (Arena){x->arena, 0};
    trainer_layout(x, &arena);
    return 0;
}

// The same on the GPU, with bf16 products unless float32: m's weights and the moments here are then
// old until mamba_trainer_fetch. NULL after fail().
Trainer *mamba_trainer_new_gpu(Model *m, int B, int L, bool float32) {
    if (!GPU) return fail("this build has no GPU backend: make cuda"), NULL;
    Trainer *x = calloc(1, sizeof *x);
    if (!x) return fail("out of memory"), NULL;
    *x = (Trainer){.model = m, .B = B, .L = L, .threads = 1};
    x->moment = alloc_aligned(m->tensors_bytes);
    x->moment2 = alloc_aligned(m->tensors_bytes);
    if (x->moment && x->moment2) {
        x->gpu = GPU->trainer_open(m, B, L, float32);
        if (x->gpu) return x;
        gpu_failed();
    }
    mamba_trainer_free(x);
    return NULL;
}

// Weights and moments from the GPU to the host, or, store: the other way. Nothing to do without
// one. 0, or -1 after fail().
int mamba_trainer_fetch(Trainer *x, bool store) {
    if (!x->gpu) return 0;
    float *weights = x->model->weights;
    if (store) return GPU->trainer_set(x->gpu, weights, x->moment, x->moment2) ? gpu_failed() : 0;
    if (GPU->trainer_get(x->gpu, weights, x->moment, x->moment2, NULL)) return gpu_failed();
    refresh_derived(x->model);
    return 0;
}

// Trains m (float32, in memory) in place, B sequences of L tokens a pass. NULL after fail().
Trainer *mamba_trainer_new(Model *m, int B, int L, int threads) {
    Trainer *x = calloc(1, sizeof *x);
    if (!x) return fail("out of memory"), NULL;
    *x = (Trainer){.model = m, .threads = threads > 0 ? threads : default_threads()};
    x->gradient = blank_model(&m->config);
    x->moment = alloc_aligned(m->tensors_bytes);
    x->moment2 = alloc_aligned(m->tensors_bytes);
    if (x->gradient && x->moment && x->moment2 && mamba_trainer_resize(x, B, L) == 0) return x;
    mamba_trainer_free(x);
    return NULL;
}

static float *grad(const Tensor *w) { return (float *)(uintptr_t)w->data; } // NULL: an absent bias

// The states of all layers before the first token.
static void trainer_start(Trainer *x) {
    const Config *c = &x->model->config;
    const size_t NE = (size_t)c->N * c->E, window = (size_t)(c->K - 1) * c->E;
#pragma omp for
    for (int i = 0; i < c->n_layer * x->B; i++) {
        int b = i % x->B;
        memcpy(x->seq[i].h, x->h0 + b * NE, NE * sizeof(float));
        memcpy(x->seq[i].window, x->window0 + b * window, window * sizeof(float));
    }
}

// block() backwards, line by line from its end. d_res: the gradient after the layer, becomes that
// before it. d_h: that of the states after it, becomes that of h0. d_window gets that of window0.
static void block_backward(Trainer *x, int layer) {
    const Config *c = &x->model->config;
    const Layer *p = &x->model->layer[layer], *d = &x->gradient->layer[layer];
    const Work *w = &x->work[layer];
    const int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N, T = x->B * x->L;
    const Rows rows = {T, false, w->packed};

    // next = res + out_proj(g): d_g (in d_y); then g again, which the weight's gradient needs
    matmul_backward(&(MatmulGrad){.d_x = x->d_y}, x->d_res, (size_t)D, NULL, (size_t)E,
                    &p->out_proj, rows);
    gate_backward(x->d_y, x->d_xz, w->g, x->d_y, w->y, w->xz, T, E);
    MatmulGrad d_out = {.d_W = grad(&d->out_proj), .d_bias = grad(&d->out_bias)};
    matmul_backward(&d_out, x->d_res, (size_t)D, w->g, (size_t)E, &p->out_proj, rows);

    Scan s = {w->u, w->delta, p->A_neg, w->xdb + R, w->xdb + R + N, f32(&p->D_skip), (size_t)P,
              x->B, x->L,     E,        N};
    ScanGrad d_scan = {x->d_u,          x->d_delta,       x->d_xdb + R, x->d_xdb + R + N,
                       grad(&d->A_log), grad(&d->D_skip), x->d_h,       x->scan};
    scan_backward(&d_scan, x->d_y, &s, x->h0);

    softplus_backward(x->d_delta, w->delta, T, E);
    sum_rows(grad(&d->dt_bias), x->d_delta, (size_t)E, T, E);
    MatmulGrad d_dt = {.d_x = x->d_xdb, .d_W = grad(&d->dt_proj)};
    matmul_backward(&d_dt, x->d_delta, (size_t)E, w->xdb, (size_t)P, &p->dt_proj, rows);
    for (int part = 0; part < 3 && (c->flags & FLAG_MIXER_NORM); part++) {
        int at = part ? R + (part - 1) * N : 0, n = part ? N : R; // dt_low, B_ssm, C_ssm
        rmsnorm_backward(&(NormGrad){.d_x = x->d_xdb + at, .scale = x->scale}, x->d_xdb + at,
                         w->raw + at, NULL, c->mixer_eps, T, n, (size_t)P);
    }
    MatmulGrad d_x_proj = {.d_x = x->d_u, .add = true, .d_W = grad(&d->x_proj)};
    matmul_backward(&d_x_proj, x->d_xdb, (size_t)P, w->u, (size_t)E, &p->x_proj, rows);

    Conv conv = {w->xz, p->conv_t, f32(&p->conv_bias), x->B, x->L, E, K};
    ConvGrad d_conv = {x->d_xz, grad(&d->conv), grad(&d->conv_bias), x->d_window, x->d_c};
    conv1d_silu_backward(&d_conv, x->d_u, x->window0, &conv);

    rmsnorm(w->xn, w->res, f32(&p->norm), c->norm_eps, T, D, (size_t)D); // again
    MatmulGrad d_in = {.d_x = x->d_xn, .d_W = grad(&d->in_proj), .d_bias = grad(&d->in_bias)};
    matmul_backward(&d_in, x->d_xz, 2 * (size_t)E, w->xn, (size_t)D, &p->in_proj, rows);
    NormGrad d_norm = {x->d_res, true, grad(&d->norm), x->scale};
    rmsnorm_backward(&d_norm, x->d_xn, w->res, f32(&p->norm), c->norm_eps, T, D, (size_t)D);
}

// The head and the loss, LOSS_ROWS rows at a time, after the last layer's res (T,D): losses (T),
// and, where backward, d_res and the gradients of head and norm_f.
static void loss_pass(Trainer *x, const float *res, const int32_t *targets, float weight,
                      bool backward) {
    Model *m = x->model, *d = x->gradient;
    const int D = m->config.D, V = m->config.V, T = x->B * x->L;
    const float eps = m->config.norm_eps;
    float *xn_of_all = x->work->xn;
    rmsnorm(xn_of_all, res, f32(&m->norm_f), eps, T, D, (size_t)D);
    for (int t = 0; t < T; t += LOSS_ROWS) {
        const Rows rows = {T - t < LOSS_ROWS ? T - t : LOSS_ROWS, false, x->work->packed};
        const float *xn = xn_of_all + (size_t)t * D;
        matmul(x->logits, (size_t)V, xn, (size_t)D, &m->head, NULL, rows);
        cross_entropy(x->losses + t, x->logits, targets + t, weight, rows.T, V);
        MatmulGrad d_head = {.d_x = x->d_xn + (size_t)t * D, .d_W = grad(&d->head)};
        if (backward) matmul_backward(&d_head, x->logits, (size_t)V, xn, (size_t)D, &m->head, rows);
    }
    NormGrad d_norm = {x->d_res, false, grad(&d->norm_f), x->scale};
    if (backward) rmsnorm_backward(&d_norm, x->d_xn, res, f32(&m->norm_f), eps, T, D, (size_t)D);
}

// Adds to the gradient that of weight * the sum of -log p(targets), for B L rows of ids; targets
// of -1 do not count. Returns the sum of the losses (without weight); NaN where a GPU failed, after
// fail(). backward false: the loss only. ids and targets must be below V.
double mamba_train_pass(Trainer *x, const int32_t *ids, const int32_t *targets, float weight,
                        bool backward) {
    const Config *c = &x->model->config;
    const int T = x->B * x->L;
    double sum = 0;
    if (x->gpu)
        return GPU->train_pass(x->gpu, ids, targets, weight, backward, &sum) ? (gpu_failed(), NAN)
                                                                             : sum;
    int team = (double)x->model->n_params * T < 4e6 ? 1 : x->threads;
    (void)team;
    for (int layer = 0; layer < c->n_layer; layer++) x->work[layer].ids = ids;
#pragma omp parallel num_threads(team)
    {
        trainer_start(x);
        const float *res = forward(x->model, x->work, x->seq, x->B, x->L);
        loss_pass(x, res, targets, weight, backward);
        for (int layer = c->n_layer - 1; layer >= 0 && backward; layer--) {
#pragma omp single
            memset(x->d_h, 0, (size_t)x->B * c->N * c->E * sizeof(float)); // nothing comes after
            block_backward(x, layer);
        }
        if (backward) embed_backward(grad(&x->gradient->embedding), x->d_res, ids, T, c->D);
    }
    for (int t = 0; t < T; t++) sum += (double)x->losses[t];
    return sum;
}

// --- AdamW (Loshchilov & Hutter 2019)

typedef struct {
    const Trainer *x;
    const AdamW *how;
    double squares;         // of all gradients
    float scale;            // what clipping leaves of them
    double unbias, unbias2; // 1 - beta^step
    const float *base;      // of the weights' arena
    char bad[LABEL];        // first tensor whose gradient is not finite
} AdamWPass;

static float *beside(const AdamWPass *p, const Tensor *w, float *arena) {
    return arena + ((const float *)w->data - p->base);
}

static void norm_tensor(void *context, const TensorInfo *info, Tensor *w) {
    AdamWPass *p = context;
    double sum = sum_squares(beside(p, w, p->x->gradient->weights), tensor_elements(w));
    if (!(sum - sum == 0) && !p->bad[0]) tensor_label(p->bad, info);
    p->squares += sum;
}

static void adamw_tensor(void *context, const TensorInfo *info, Tensor *w) {
    AdamWPass *p = context;
    const AdamW *how = p->how;
    float *weights = beside(p, w, p->x->model->weights),
          *gradients = beside(p, w, p->x->gradient->weights);
    float *moments = beside(p, w, p->x->moment), *moments2 = beside(p, w, p->x->moment2);
    float keep = info->decays ? 1 - how->rate * how->decay : 1,
          rate = (float)(how->rate / p->unbias);
    float root = (float)(1 / sqrt(p->unbias2)), scale = p->scale;
    float beta1 = how->beta1, beta2 = how->beta2, epsilon = how->epsilon;
#pragma omp parallel for num_threads(p->x->threads)
    for (int row = 0; row < w->rows; row++) {
        size_t at = (size_t)row * w->cols;
        float *restrict weight = weights + at, *restrict g = gradients + at,
                        *restrict m = moments + at, *restrict v = moments2 + at;
        for (int i = 0; i < w->cols; i++) {
            float gi = g[i] * scale;
            m[i] = beta1 * m[i] + (1 - beta1) * gi;
            v[i] = beta2 * v[i] + (1 - beta2) * gi * gi;
            weight[i] = weight[i] * keep - rate * m[i] / (sqrtf(v[i]) * root + epsilon);
            g[i] = 0;
        }
    }
}

// One step along the gradient, which is cleared. *norm gets its length before clipping. 0, or -1
// after fail() with the weights untouched, where a gradient is not finite.
int mamba_train_step(Trainer *x, const AdamW *how, double *norm) {
    if (x->gpu) {
        if (GPU->train_step(x->gpu, how, x->step + 1, norm)) return gpu_failed();
        return x->step++, 0;
    }
    AdamWPass p = {.x = x, .how = how, .scale = 1, .base = x->model->weights};
    each_tensor(x->model, norm_tensor, &p);
    *norm = sqrt(p.squares);
    if (p.bad[0])
        return fail("step %llu: the gradient of %s is not finite", (unsigned long long)x->step + 1,
                    p.bad);
    if (how->clip > 0 && *norm > how->clip) p.scale = (float)(how->clip / (*norm + 1e-6));
    x->step++;
    p.unbias = 1 - pow(how->beta1, (double)x->step),
    p.unbias2 = 1 - pow(how->beta2, (double)x->step);
    each_tensor(x->model, adamw_tensor, &p);
    if (x->model->config.flags & FLAG_TIED) x->model->head = x->model->embedding;
    refresh_derived(x->model);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// 11 Sampling
// In this order: repeat penalty, temperature, top-k, top-p, min-p, then one draw. Ids that the
// tokenizer does not know (the padding of a vocabulary) are never drawn. Candidates leave a heap
// one by one, the likeliest first, so nothing is sorted that will not be used.

static void heap_down(int32_t *heap, int n, int i, const float *probs) {
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && probs[heap[child + 1]] > probs[heap[child]]) child++;
        if (!(probs[heap[child]] > probs[heap[i]])) return;
        int32_t swap = heap[i];
        heap[i] = heap[child], heap[child] = swap;
    }
}

// Moves the likeliest of order[0..n) to its end, keeping the rest a heap.
static void heap_pop(int32_t *order, int n, const float *probs) {
    int32_t best = order[0];
    order[0] = order[n - 1], order[n - 1] = best;
    heap_down(order, n - 1, 0, probs);
}

static void penalise_recent(const State *s, float *logits, float penalty) {
    for (int i = 0; i < s->n_recent; i++) {
        bool seen = false; // a token is penalised once, however often it occurs
        for (int j = 0; j < i && !seen; j++) seen = s->recent[j] == s->recent[i];
        float *x = &logits[s->recent[i]];
        if (!seen) *x = *x > 0 ? *x / penalty : *x * penalty;
    }
}

// Candidates by probability: order[n-1] the likeliest, order[n-2] the next ... Returns how many are
// kept.
static int keep_likeliest(int32_t *order, int n, const float *probs, const Sampling *how,
                          double *mass) {
    for (int i = n / 2 - 1; i >= 0; i--) heap_down(order, n, i, probs);
    int limit = how->top_k > 0 && how->top_k < n ? how->top_k : n, popped = 0, kept = 0;
    double whole = 0, sum = 0;
    if (limit < n)
        for (; popped < limit; popped++)
            heap_pop(order, n - popped, probs), whole += probs[order[n - 1 - popped]];
    else
        for (int i = 0; i < n; i++) whole += probs[order[i]];
    while (kept < limit && !(kept && sum >= how->top_p * whole)) {
        if (kept >= popped) heap_pop(order, n - popped, probs), popped++;
        float p = probs[order[n - 1 - kept]];
        if (kept && p < how->min_p * probs[order[n - 1]]) break;
        sum += p, kept++;
    }
    *mass = sum;
    return kept;
}

// The next token of s by the scratch arrays logits and order (V): an id, or -1 where none can be
// drawn, or -2 - v where logit v is not finite. Writes nothing but its arguments: threads may draw
// for different states.
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
        if (logits[v] > highest) highest = logits[v], likeliest = v;
    }
    if (likeliest < 0 || highest > FLT_MAX) return -1;
    if (how->temperature == 0) return likeliest;
    double whole = 0;
    for (int i = 0; i < n; i++) { // softmax without its denominator, which the draw divides out
        float *x = &logits[order[i]];
        whole += *x = expf((*x - highest) / how->temperature);
    }
    bool all = how->top_p >= 1 && how->min_p <= 0 && (how->top_k <= 0 || how->top_k >= n);
    int kept = all ? n : keep_likeliest(order, n, logits, how, &whole);
    double point = random_unit(&s->random) * whole;
    for (int i = n - 1; i > n - kept; i--) {
        point -= logits[order[i]];
        if (point < 0) return order[i];
    }
    return order[n - kept];
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

// Text to token ids, malloc'd, for the caller to free. 0, or -1 after fail().
int mamba_encode(const Model *m, const char *text, size_t bytes, int32_t **ids, size_t *n) {
    if (!m->tokenizer) return fail("this model has no tokenizer");
    return tokenizer_encode(m->tokenizer, text, bytes, ids, n);
}

// The text that token id adds to what s has written so far: whole UTF-8 characters only; the bytes
// of an unfinished one wait in s, and what cannot become a character turns into U+FFFD. A bytes
// tokenizer's bytes pass as they are. id -1: the end, what still waits. out needs room for
// m->text_room bytes; returns how many it got.
size_t mamba_decode(const Model *m, State *s, int32_t id, unsigned char *out) {
    size_t bytes = 0;
    if (id < 0) return utf8_flush(&s->pending, out);
    if (!m->tokenizer || !tokenizer_has(m->tokenizer, id)) return 0;
    const unsigned char *token = tokenizer_token(m->tokenizer, id, &bytes);
    if (!tokenizer_is_bytes(m->tokenizer)) return utf8_push(&s->pending, token, bytes, out);
    memcpy(out, token, bytes);
    return bytes;
}

#ifndef MAMBA_NO_MAIN
COLD
// ---------------------------------------------------------------------------------------------------------------------
// 12 Command line
// Text goes to stdout, everything about it to stderr. Options are described by a table, which
// parses them, checks their ranges and prints the help with the defaults.

static double seconds(void) {
#ifdef TIME_UTC
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
#else
    return (double)clock() /
           CLOCKS_PER_SEC; // wall-clock time on Windows, where timespec_get may be missing
#endif
}

static const char *type_name(Type type) {
    static const char *const name[N_TYPES] = {"f32", "f16", "bf16", "q8", "q4"};
    return name[type];
}

typedef enum { OPT_SWITCH, OPT_INT, OPT_REAL, OPT_TEXT, OPT_LIST } OptionKind;
enum { LIST_MAX = 16 };
typedef struct {
    int n;
    const char *item[LIST_MAX];
} TextList;

typedef struct {
    const char *name, *argument, *help;
    OptionKind kind;
    void *value; // bool, long, double, const char * or TextList, holding the default
    double lowest, highest;
} Option;

static int parse_value(const Option *o, const char *text) {
    char *end = NULL;
    errno = 0;
    if (o->kind == OPT_TEXT) {
        *(const char **)o->value = text;
    } else if (o->kind == OPT_LIST) {
        TextList *list = o->value;
        if (list->n == LIST_MAX) return fail("%s was given more than %d times", o->name, LIST_MAX);
        if (!*text) return fail("%s needs a text that is not empty", o->name);
        list->item[list->n++] = text;
    } else {
        double x = o->kind == OPT_INT ? (double)strtoll(text, &end, 10) : strtod(text, &end);
        if (end == text || *end || errno == ERANGE || x != x)
            return fail("%s needs %s, not '%s'", o->name,
                        o->kind == OPT_INT ? "a whole number" : "a number", text);
        double highest = o->kind == OPT_INT ? fmin(o->highest, (double)LONG_MAX)
                                            : o->highest; // where long has 32 bits
        if (!(x >= o->lowest && x <= highest))
            return fail("%s %s is out of range: %.10g to %.10g", o->name, text, o->lowest, highest);
        if (o->kind == OPT_INT) *(long *)o->value = strtol(text, NULL, 10);
        else *(double *)o->value = x;
    }
    return 0;
}

// Takes options out of argv[1..argc) and leaves the others, in order, in rest (room for max).
// Returns how many of those there are, -1 after fail(). After `--` nothing is an option; `-` alone
// and numbers such as -1 after a flag never are.
static int parse_options(int argc, char **argv, const Option *options, int n_options,
                         const char **rest, int max) {
    int n_rest = 0;
    bool only_rest = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (!only_rest && !strcmp(arg, "--")) {
            only_rest = true;
        } else if (only_rest || arg[0] != '-' || !arg[1]) {
            if (n_rest == max)
                return fail("one argument too many: '%s' (a prompt with spaces needs quotes)", arg);
            rest[n_rest++] = arg;
        } else {
            const Option *o = NULL;
            for (int k = 0; k < n_options && !o; k++)
                if (!strcmp(arg, options[k].name)) o = &options[k];
            if (!o)
                return fail("unknown option '%s' (put -- before a prompt that starts with a dash)",
                            arg);
            if (o->kind == OPT_SWITCH) *(bool *)o->value = true;
            else if (i + 1 == argc) return fail("%s needs a value: %s", o->name, o->argument);
            else if (parse_value(o, argv[++i])) return -1;
        }
    }
    return n_rest;
}

static void print_help(const char *usage, const Option *options, int n_options) {
    printf("%s", usage);
    if (n_options) printf("\nOptions:\n");
    for (int i = 0; i < n_options; i++) {
        const Option *o = &options[i];
        int width = printf("  %s %s", o->name, o->argument);
        printf("%*s%s", width < 22 ? 22 - width : 1, "", o->help);
        if (o->kind == OPT_INT && *(long *)o->value != LONG_MIN)
            printf(" (default %ld)", *(long *)o->value);
        if (o->kind == OPT_REAL) printf(" (default %g)", *(double *)o->value);
        if (o->kind == OPT_TEXT && *(const char **)o->value)
            printf(" (default %s)", *(const char **)o->value);
        printf("\n");
    }
}

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static bool wants_help(int argc, char **argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return true;
    return false;
}

// --- the files of a command: no output may be an input or another output

// What tells one file from another: its inode, or, where there is no file yet, its folder's inode
// and its name.
typedef struct {
    bool known;
    uint64_t device, inode;
    char name[256];
} FileId;

#ifdef MAMBA_POSIX
// path "-" is stdin. Devices and pipes have no identity: they lose nothing when they are written.
static FileId file_id(const char *path) {
    FileId id = {0};
    struct stat info;
    bool standard = !strcmp(path, "-");
    if ((standard ? fstat(STDIN_FILENO, &info) : stat(path, &info)) == 0) {
        id.known = S_ISREG(info.st_mode);
    } else if (!standard) {
        char *end = follow_links(path), *slash = end ? strrchr(end, '/') : NULL;
        if (!end) return id;
        snprintf(id.name, sizeof id.name, "%s", slash ? slash + 1 : end);
        if (slash) slash[slash == end] = 0; // "/name" is in "/"
        id.known = stat(slash ? end : ".", &info) == 0;
        free(end);
    }
    if (id.known) id.device = (uint64_t)info.st_dev, id.inode = (uint64_t)info.st_ino;
    return id;
}

static bool same_file(const char *a, const char *b) {
    FileId one = file_id(a), other = file_id(b);
    return one.known && other.known && one.device == other.device && one.inode == other.inode &&
           !strcmp(one.name, other.name);
}
#else
static bool same_file(const char *a, const char *b) {
#ifdef _WIN32
    char one[_MAX_PATH], other[_MAX_PATH];
    if (_fullpath(one, a, sizeof one) && _fullpath(other, b, sizeof other))
        return !_stricmp(one, other);
#endif
    return !strcmp(a, b);
}
#endif

typedef enum { INPUT, OUTPUT, OUTPUT_IN_PLACE } FileKind; // in place: a device or pipe is allowed
typedef struct {
    FileKind kind;
    const char *role;     // as an error names it: "the model", "-o"
    const char *path;     // NULL: not given
    const char *replaces; // an output: the role of the input that it may be
} FileUse;

// Finds out before hours of work whether path can be written after them.
static int check_writable(const char *path, bool in_place) {
    NewFile w;
#ifdef MAMBA_POSIX
    struct stat info; // opening a pipe would wait for its reader
    if (in_place && !is_replaceable(path) && stat(path, &info) == 0)
        return S_ISDIR(info.st_mode) ? fail("cannot write %s: a directory", path) : 0;
#endif
    if (new_file_open(&w, path, in_place)) return -1;
    new_file_discard(&w);
    return 0;
}

// Every output of a command can be written and is neither an input nor another output. To be
// called before the work begins. 0, or -1 after fail().
static int check_files(const FileUse *use, int n) {
    for (int i = 0; i < n; i++) {
        const FileUse *out = &use[i];
        const char *what = strncmp(out->role, "the ", 4) ? "" : " for -o"; // out.bin.csv
        if (out->kind == INPUT || !out->path) continue;
        if (!*out->path) return fail("%s needs a file name, not an empty text", out->role);
        for (int j = 0; j < n; j++) {
            const FileUse *in = &use[j];
            if (!in->path || (in->kind != INPUT && j >= i) || !same_file(out->path, in->path) ||
                (out->replaces && !strcmp(out->replaces, in->role)))
                continue;
            return fail(in->kind == INPUT ? "%s %s: that is %s; choose another name%s"
                                          : "%s %s: that is also %s; choose another name%s",
                        out->role, out->path, in->role, what);
        }
    }
    for (int i = 0; i < n; i++)
        if (use[i].kind != INPUT && use[i].path &&
            check_writable(use[i].path, use[i].kind == OUTPUT_IN_PLACE))
            return -1;
    return 0;
}

// All that f holds from here on, with a NUL after it; free() it. Closes f. NULL after fail().
static char *read_stream(FILE *f, const char *path, size_t *bytes) {
    size_t room = 1 << 16, n = 0;
    char *text = malloc(room);
    while (text) {
        size_t got = fread(text + n, 1, room - 1 - n, f);
        n += got;
        if (n < room - 1) break; // end of file or error
        char *larger = room > SIZE_MAX / 2 ? NULL : realloc(text, room * 2);
        if (!larger) free(text);
        text = larger, room *= 2;
    }
    bool bad = ferror(f) != 0;
    if (f != stdin) fclose(f);
    if (!text) return fail("%s: out of memory after %zu bytes", path, n), NULL;
    if (bad) {
        free(text);
        return fail("%s: %s", path, strerror(errno)), NULL;
    }
    char *fitted = realloc(text, n + 1); // the text may live beside a million tokens
    if (fitted) text = fitted;
    text[n] = 0;
    *bytes = n;
    return text;
}

// A whole file, or stdin for "-". NULL after fail().
static char *read_text(const char *path, size_t *bytes) {
    FILE *f = !strcmp(path, "-") ? stdin : fopen(path, "rb");
    if (!f) return fail("%s: %s", path, strerror(errno)), NULL;
    return read_stream(f, path, bytes);
}

static double peak_megabytes(void) { // 0 where the platform does not say
#ifdef MAMBA_POSIX
    struct rusage usage;
    if (!getrusage(RUSAGE_SELF, &usage))
#ifdef __APPLE__
        return (double)usage.ru_maxrss / 1e6;
#else
        return (double)usage.ru_maxrss * 1024 / 1e6;
#endif
#endif
    return 0;
}

// Ends the program as the signal does by default, after removing unfinished files.
static void on_kill(int number) {
    for (int i = 0; i < TEMPORARIES; i++) {
        const char *name = temporaries[i];
#ifdef MAMBA_POSIX
        if (name) unlink(name);
#else
        if (name) remove(name);
#endif
    }
    signal(number, SIG_DFL);
    raise(number);
}

static volatile sig_atomic_t interrupted;
static void on_interrupt(int number) {
    interrupted = 1;
    signal(number, on_kill); // a second Ctrl-C ends the program at once
}
static void catch_interrupt(void) {
    interrupted = 0;
    signal(SIGINT, on_interrupt);
}

// The same for a read that waits: Ctrl-C ends it, where signal() would let it wait on.
static void catch_interrupt_reading(void) {
    catch_interrupt();
#ifdef MAMBA_POSIX
    struct sigaction action = {.sa_handler = on_interrupt};
    sigaction(SIGINT, &action, NULL);
#endif
}

// --- generate

typedef struct {
    const char *model_path, *save, *load;
    long n, top_k, seed, threads;
    double temperature, top_p, min_p, repeat_penalty;
    TextList stop;
    bool ignore_eos, no_echo, clock_seed, show_selection, null;
    long layer, samples;
    const char *batch;
} GenerateOptions;

// The text on its way to stdout: what might be the start of a stop string is held back until it is
// clear that it is not.
typedef struct {
    char *bytes;
    size_t n, room;
} Text;

// 0, or -1 after fail().
static int text_add(Text *to, const void *bytes, size_t n) {
    if (n == 0) return 0; // memcpy may not be given NULL
    if (n > to->room - to->n) {
        size_t room = size_add(to->n, n) > SIZE_MAX / 2 ? SIZE_MAX : (to->n + n) * 2;
        char *larger = realloc(to->bytes, room);
        if (!larger) return fail("out of memory: a text of %zu bytes", size_add(to->n, n));
        to->bytes = larger, to->room = room;
    }
    memcpy(to->bytes + to->n, bytes, n);
    to->n += n;
    return 0;
}

typedef struct {
    const TextList *stop;
    Text held;
    Text *into; // where the text goes instead of stdout, or NULL
} Output;

// Prints n bytes of what is held. 0, or -1 after fail(): without it, -n -1 would write to a full
// disk for ever.
static int output_print(const Output *out, size_t n) {
    if (out->into) return text_add(out->into, out->held.bytes, n);
    if (n) fwrite(out->held.bytes, 1, n, stdout);
    return fflush(stdout) || ferror(stdout) ? fail("stdout: cannot write: %s", strerror(errno)) : 0;
}

static int output_flush(Output *out) {
    size_t n = out->held.n;
    out->held.n = 0;
    return output_print(out, n);
}

// Length of the longest end of text that begins some stop string: the part that cannot be printed
// yet.
static size_t held_back(const TextList *stop, const char *text, size_t n) {
    size_t most = 0;
    for (int i = 0; i < stop->n; i++) {
        size_t length = strlen(stop->item[i]);
        for (size_t k = length - 1 < n ? length - 1 : n; k > most; k--)
            if (!memcmp(text + n - k, stop->item[i], k)) most = k;
    }
    return most;
}

// Adds bytes, prints what is safe. 1: a stop string appeared; it and what follows it are dropped.
// -1 after fail().
static int output_add(Output *out, const unsigned char *bytes, size_t n) {
    Text *held = &out->held;
    if (n == 0) return 0;
    if (text_add(held, bytes, n)) return -1;
    size_t cut = SIZE_MAX;
    for (int i = 0; i < out->stop->n; i++) {
        size_t length = strlen(out->stop->item[i]);
        for (size_t at = 0; at + length <= held->n && at < cut; at++)
            if (!memcmp(held->bytes + at, out->stop->item[i], length)) cut = at;
    }
    size_t keep = cut == SIZE_MAX ? held_back(out->stop, held->bytes, held->n) : 0;
    size_t print = cut == SIZE_MAX ? held->n - keep : cut;
    if (output_print(out, print)) return -1;
    if (keep) memmove(held->bytes, held->bytes + print, keep);
    held->n = keep;
    return cut != SIZE_MAX;
}

typedef struct { // what a command that runs the model needs
    Model *model;
    Acts *acts;
    State *state;
    double load_seconds;
} Session;

static void session_close(Session *x) {
    mamba_state_free(x->state);
    mamba_acts_free(x->acts);
    mamba_free(x->model);
}

static struct {
    bool cpu, float32;
} backend; // where commands run the model
#define BACKEND_OPTIONS \
    {"--cpu",    "",           "run on the processor, also where the build has a GPU backend", \
     OPT_SWITCH, &backend.cpu, 0, \
     0}, \
        {"--float32", \
         "", \
         "on a GPU: float32 products also for bf16 weights and in training", \
         OPT_SWITCH, \
         &backend.float32, \
         0, \
         0}

static int session_open(Session *x, const char *path, long threads) {
    double start = seconds();
    memset(x, 0, sizeof *x);
    x->model = mamba_load(path);
    if (x->model) x->acts = mamba_acts_new(x->model, (int)threads);
    if (x->acts && (!GPU || backend.cpu || mamba_acts_gpu(x->acts, x->model, backend.float32) == 0))
        x->state = mamba_state_new(x->model);
    x->load_seconds = seconds() - start;
    if (x->state) return 0;
    session_close(x);
    return -1;
}

typedef struct {
    size_t n_read, n_written;
    double read_seconds, write_seconds;
    const char *ended; // why writing ended
    long seed;         // that the clock gave, -1: none
} Report;

static bool is_eos(const Config *c, int32_t id) {
    for (int i = 0; i < 4; i++)
        if (c->eos[i] == id) return true;
    return false;
}

// The token that an empty text starts from: end of text, which precedes every text in training.
static int32_t start_token(const Config *c) { return c->eos[0] >= 0 ? c->eos[0] : c->bos; }

// Reads ids piece by piece, so that Ctrl-C is heard within one.
static int read_prompt(Session *x, const int32_t *ids, size_t n, Report *report) {
    double start = seconds();
    size_t done = 0;
    while (done < n && !interrupted) {
        size_t most = x->acts->gpu ? 1 << 16 : (size_t)x->acts->piece,
               piece = n - done < most ? n - done : most;
        if (mamba_prefill(x->model, x->acts, x->state, ids + done, piece, NULL, NULL)) return -1;
        done += piece;
    }
    report->n_read = done;
    report->read_seconds = seconds() - start;
    if (done < n) fprintf(stderr, "interrupted after %zu of %zu prompt tokens\n", done, n);
    return 0;
}

// The next tokens, drawn and read on the GPU some at a time, since a launch for each would take
// longer than a step. Where text ends within them, the state is too far: only for a state that
// nobody wants afterwards. Returns the next id, -1 after fail().
typedef struct {
    int32_t ids[64];
    int at, n;
} Burst;

static int32_t burst_next(Burst *b, Session *x, const Sampling *how) {
    const Model *m = x->model;
    State *s = x->state;
    if (b->at < b->n) return b->ids[b->at++];
    if (b->n == 0) {
        unsigned char *allowed = malloc((size_t)m->config.V);
        if (!allowed) return fail("out of memory");
        for (int v = 0; v < m->config.V; v++)
            allowed[v] = !m->tokenizer || tokenizer_has(m->tokenizer, v);
        int bad = GPU->generate_start(x->acts->gpu, 1, how, &s->random, s->position, s->recent,
                                      s->n_recent, allowed);
        free(allowed);
        if (bad) return gpu_failed();
    }
    b->n = b->n ? 32 : 4; // the first ones soon
    b->at = 0;
    if (GPU->generate(x->acts->gpu, b->ids, b->n)) return gpu_failed();
    for (int i = 0; i < b->n; i++)
        if (b->ids[i] < 0) return fail("a logit is not finite: run `info --verify`");
    return b->ids[b->at++];
}

// Writes up to o->n tokens from the state. keep_pending: an unfinished character stays in the state
// for later.
static int write_tokens(Session *x, const GenerateOptions *o, bool keep_pending, Report *report) {
    const Sampling how = {(float)o->temperature, (float)o->top_p, (int)o->top_k, (float)o->min_p,
                          (float)o->repeat_penalty};
    Output out = {.stop = &o->stop};
    unsigned char *text = malloc(x->model->text_room);
    if (!text) return fail("out of memory: a token of %zu bytes", x->model->text_room);
    int result = 0;
    double start = seconds();
    Burst burst = {.n = 0};
    bool bursts = x->acts->gpu && !keep_pending;
    report->ended = "length";
    for (long i = 0; (o->n < 0 || i < o->n) && result == 0; i++) {
        int32_t id = interrupted ? -1
                     : bursts    ? burst_next(&burst, x, &how)
                                 : mamba_sample(x->model, x->acts, x->state, &how);
        if (id < 0 || (is_eos(&x->model->config, id) && !o->ignore_eos)) {
            result = id < 0 && !interrupted ? -1 : 0;
            report->ended = interrupted ? "interrupted" : "end of text";
            break;
        }
        result = output_add(&out, text, mamba_decode(x->model, x->state, id, text));
        if (result == 1) report->ended = "stop string";
        if (!bursts && mamba_step(x->model, x->acts, x->state, id)) result = -1;
        report->n_written++;
    }
    if (!keep_pending && result == 0)
        result = output_add(&out, text, mamba_decode(x->model, x->state, -1, text));
    if (result == 1) x->state->pending.n = 0; // part of what follows the stop string
    if (result >= 0 && output_flush(&out)) result = -1;
    free(out.held.bytes);
    free(text);
    report->write_seconds = seconds() - start;
    return result < 0 ? -1 : 0;
}

static void print_report(const Session *x, const Report *r) {
    fprintf(stderr, "load %.3f s", x->load_seconds);
    if (r->seed >= 0) fprintf(stderr, " | seed %ld", r->seed);
    if (r->n_read)
        fprintf(stderr, " | prefill %zu tokens, %.1f tokens/s", r->n_read,
                (double)r->n_read / r->read_seconds);
    if (r->n_written)
        fprintf(stderr, " | decode %zu tokens, %.1f tokens/s (%s)", r->n_written,
                (double)r->n_written / r->write_seconds, r->ended);
    if (peak_megabytes() > 0) fprintf(stderr, " | peak memory %.1f MB", peak_megabytes());
    fprintf(stderr, "\n");
}

// --- show-selection: the text, each token in the colour of its mean delta: how far the model lets
// it into its state

static const int HEAT[] = {234, 237, 240, 60,  61,
                           97,  133, 169, 205, 211}; // of the 256 terminal colours, dark to bright

static void print_selected(const Model *m, int32_t id, float delta, double lowest, double highest,
                           bool colours) {
    size_t bytes = 0;
    bool known = m->tokenizer && tokenizer_has(m->tokenizer, id);
    const unsigned char *text = known ? tokenizer_token(m->tokenizer, id, &bytes) : NULL;
    double along =
        highest > lowest ? (log(fmax((double)delta, 1e-30)) - lowest) / (highest - lowest) : 0.5;
    int shade = (int)fmin(along * COUNT(HEAT), COUNT(HEAT) - 1);
    if (colours) printf("\033[48;5;%d;38;5;%dm", HEAT[shade], shade < 6 ? 255 : 16);
    else printf("%d\t%.6g\t", id, (double)delta);
    for (size_t i = 0; i < bytes; i++) { // control characters are shown, not obeyed
        if (text[i] == '\n') printf("\\n");
        else if (text[i] == '\\' && !colours) printf("\\\\");
        else if (text[i] < ' ' || text[i] == 127) printf("\\x%02x", text[i]);
        else putchar(text[i]);
    }
    if (colours) printf("\033[0m%s", bytes && text[bytes - 1] == '\n' ? "\n" : "");
    else printf("\n");
}

// Reads ids and prints each by its delta: coloured on a terminal, else a line of id, delta, text.
static int show_selection(Session *x, const int32_t *ids, size_t n, long layer) {
    const Model *m = x->model;
    double lowest = INFINITY, highest = -INFINITY; // logarithms
    bool colours = false;
#ifdef MAMBA_POSIX
    colours = isatty(STDOUT_FILENO);
#endif
    if (layer >= m->config.n_layer)
        return fail("--layer %ld: the model has layers 0 to %d", layer, m->config.n_layer - 1);
    if (n == 0) return fail("--show-selection needs a prompt");
    float *delta = calloc(n, sizeof *delta);
    if (!delta) return fail("out of memory: %zu tokens", n);
    mamba_selection(x->acts, delta, (int)layer);
    int result = mamba_prefill(m, x->acts, x->state, ids, n, NULL, NULL);
    mamba_selection(x->acts, NULL, -1);
    for (size_t t = 0; t < n; t++) {
        double log_delta = log(fmax((double)delta[t], 1e-30));
        lowest = fmin(lowest, log_delta), highest = fmax(highest, log_delta);
    }
    for (size_t t = 0; t < n && result == 0; t++)
        print_selected(m, ids[t], delta[t], lowest, highest, colours);
    if (result == 0 && colours) {
        printf("\nmean delta %s: %.3g ", layer < 0 ? "of all layers" : "of the layer", exp(lowest));
        for (int i = 0; i < COUNT(HEAT); i++) printf("\033[48;5;%dm  ", HEAT[i]);
        printf("\033[0m %.3g, logarithmic\n", exp(highest));
    }
    free(delta);
    return result;
}

// One prompt: echo it (unless told otherwise), read it, write, save. owned: malloc'd memory that
// holds the text, or NULL; freed.
static int generate_once(Session *x, const GenerateOptions *o, const char *text, size_t bytes,
                         char *owned) {
    Report report = {.seed = o->clock_seed && o->temperature > 0 && o->n ? o->seed : -1};
    int32_t *ids = NULL, start = start_token(&x->model->config);
    size_t n = 0;
    int result = bytes && mamba_encode(x->model, text, bytes, &ids, &n) ? fail_in("prompt") : 0;
    if (result == 0 && n == 0 && x->state->position == 0 && start < 0 && !o->show_selection)
        result = fail("this model has no end-of-text token to start from: give a prompt");
    if (result == 0 && o->n != 0 && !o->show_selection) {
        unsigned char cut[4]; // a character that the loaded state left unfinished ends where a new
                              // text begins
        size_t n_cut = bytes ? utf8_flush(&x->state->pending, cut) : 0;
        fwrite(cut, 1, n_cut, stdout);
        if (!o->no_echo && bytes) fwrite(text, 1, bytes, stdout);
        fflush(stdout);
    } else if (bytes) {
        x->state->pending.n = 0;
    }
    free(owned); // a long prompt does not stay in memory beside its tokens
    if (o->show_selection) {
        if (result == 0) result = show_selection(x, ids, n, o->layer);
        free(ids);
        return result;
    }
    if (result == 0 && n) result = read_prompt(x, ids, n, &report);
    else if (result == 0 && x->state->position == 0) result = read_prompt(x, &start, 1, &report);
    free(ids);
    if (result) return -1;
    result = interrupted ? 0 : write_tokens(x, o, o->save != NULL, &report);
#ifdef MAMBA_POSIX
    if (o->n != 0 && isatty(STDOUT_FILENO)) printf("\n");
#endif
    if (o->save && mamba_state_save(x->model, x->state, o->save)) result = -1;
    print_report(x, &report);
    if (o->save && !result)
        fprintf(stderr, "state after %llu tokens saved to %s\n",
                (unsigned long long)x->state->position, o->save);
    return result;
}

// --- several texts at once, --samples and --batch: up to BATCH_MAX sequences share every read of
// the weights. One that ends makes room for the next, so memory does not depend on how many there
// are. Texts are printed in order, each when it and those before it are whole.

enum { TEXTS_MAX = 1024 }; // that are begun and not yet printed

typedef struct {
    const char *text;    // a line of the file, or the prompt of the command line
    size_t bytes, at, n; // its tokens are ids[at..at + n)
} Prompt;

typedef struct {
    State *state;
    Output out;
    size_t number; // of its text
    long written;
} Sequence;

typedef struct {
    Session *x;
    const GenerateOptions *o;
    Prompt *prompt;
    size_t n_prompts, samples, begun, printed; // texts: number = prompt * samples + sample
    int32_t *ids, *order; // of all prompts; the sampler's scratch, (BATCH_MAX,V)
    State *start;         // what every prompt goes on from: zeros or a loaded state
    uint64_t seed;
    Sequence sequence[BATCH_MAX];
    int running, slots;
    Text text[TEXTS_MAX]; // number n at n % TEXTS_MAX
    bool whole[TEXTS_MAX];
    unsigned char *bytes; // one token's
    size_t ended[4];      // texts by why they ended
} Many;
static const char *const ENDED[4] = {"length", "end of text", "stop string", "interrupted"};

// The generator's start for sample s of a prompt: the seed itself for the first, so that it is the
// text of a run without
// --samples; for the others the s-th output of a generator that starts there, far from each other
// on SplitMix64's circle of 2^64.
static uint64_t sample_seed(uint64_t seed, size_t sample) {
    uint64_t at = seed + (uint64_t)(sample - 1) * 0x9E3779B97F4A7C15u;
    return sample ? random_u64(&at) : seed;
}

// Tokens of all prompts, checked before anything is written. text: the file's, in which lines are
// the prompts; or the one prompt.
static int many_prompts(Many *y, const char *text, size_t bytes) {
    const char *batch = y->o->batch;
    char where[256] = "prompt";
    size_t n = 1, room = 0, total = 0;
    if (batch && bytes == 0) return fail("%s: empty: --batch needs one prompt a line", batch);
    for (size_t i = 0; batch && i + 1 < bytes; i++) n += text[i] == '\n';
    y->prompt = calloc(n, sizeof *y->prompt);
    if (!y->prompt) return fail("out of memory: %zu prompts", n);
    y->n_prompts = n;
    for (size_t p = 0, at = 0; p < n; p++) {
        const char *line = text + at, *end = batch ? memchr(line, '\n', bytes - at) : NULL;
        size_t length = end ? (size_t)(end - line) : bytes - at, n_ids = 0;
        at += length + 1;
        if (batch && length && line[length - 1] == '\r') length--;
        if (batch) snprintf(where, sizeof where, "%s line %zu", batch, p + 1);
        int32_t *ids = NULL;
        if (length && mamba_encode(y->x->model, line, length, &ids, &n_ids)) return fail_in(where);
        if (n_ids == 0 && y->x->state->position == 0) { // a new text
            int32_t start = start_token(&y->x->model->config);
            if (start < 0)
                return fail("%s: this model has no end-of-text token to start from: give a prompt",
                            where);
            free(ids);
            if (!(ids = malloc(sizeof *ids))) return fail("out of memory");
            ids[0] = start, n_ids = 1;
        }
        if (total + n_ids > room) {
            int32_t *larger = realloc(y->ids, size_mul(room = (total + n_ids) * 2, sizeof *ids));
            if (!larger) return free(ids), fail("out of memory: %zu tokens of prompts", room);
            y->ids = larger;
        }
        if (n_ids) memcpy(y->ids + total, ids, n_ids * sizeof *ids);
        free(ids);
        y->prompt[p] = (Prompt){line, length, total, n_ids};
        total += n_ids;
    }
    return 0;
}

// Begins the next text in a free place: reads its prompt, unless the text before was another sample
// of the same.
static int many_begin(Many *y, Report *report) {
    const Model *m = y->x->model;
    const Prompt *p = &y->prompt[y->begun / y->samples];
    size_t sample = y->begun % y->samples;
    State *read = y->x->state;
    if (sample == 0) {
        Report one = {0};
        mamba_state_copy(m, read, y->start);
        if (p->n && read_prompt(y->x, y->ids + p->at, p->n, &one)) return -1;
        report->n_read += one.n_read, report->read_seconds += one.read_seconds;
        if (interrupted) return 0;
    }
    Sequence *q = &y->sequence[y->running++];
    Text *text = &y->text[y->begun % TEXTS_MAX];
    mamba_state_copy(m, q->state, read);
    q->state->random = sample_seed(y->seed, sample);
    q->number = y->begun++, q->written = 0;
    q->out.into = text, q->out.held.n = 0;
    unsigned char cut[4]; // as for a single prompt
    size_t n_cut = p->bytes ? utf8_flush(&q->state->pending, cut) : 0;
    return text_add(text, cut, n_cut) || (!y->o->no_echo && text_add(text, p->text, p->bytes)) ? -1
                                                                                               : 0;
}

// Takes in what was drawn for q. Returns 0, 1 + the index in ENDED if its text ends, -1 after
// fail().
static int many_accept(Many *y, Sequence *q, int32_t id) {
    const Model *m = y->x->model;
    if (id < 0) return draw_failed(id);
    if (is_eos(&m->config, id) && !y->o->ignore_eos) return 2;
    int stopped = output_add(&q->out, y->bytes, mamba_decode(m, q->state, id, y->bytes));
    q->written++;
    return stopped < 0 ? -1 : stopped ? 3 : q->written == y->o->n ? 1 : 0;
}

// Ends sequence i's text, gives its place to the last one, and prints what can be printed.
static int many_end(Many *y, int i, int why) {
    Sequence q = y->sequence[i];
    if (why != 3 &&
        output_add(&q.out, y->bytes, mamba_decode(y->x->model, q.state, -1, y->bytes)) < 0)
        return -1;
    if (output_flush(&q.out)) return -1;
    y->ended[why - 1]++;
    y->whole[q.number % TEXTS_MAX] = true;
    y->sequence[i] = y->sequence[--y->running], y->sequence[y->running] = q;
    for (size_t k; y->printed < y->begun && y->whole[k = y->printed % TEXTS_MAX]; y->printed++) {
        Text *text = &y->text[k];
        if (!y->o->null && y->o->batch && y->samples > 1)
            printf("=== line %zu, sample %zu\n", y->printed / y->samples + 1,
                   y->printed % y->samples + 1);
        else if (!y->o->null)
            printf("=== %s %zu\n", y->o->batch ? "line" : "sample", y->printed + 1);
        fwrite(text->bytes, 1, text->n, stdout);
        putchar(y->o->null ? 0 : '\n');
        free(text->bytes);
        *text = (Text){0}, y->whole[k] = false;
    }
    return fflush(stdout) || ferror(stdout) ? fail("stdout: cannot write: %s", strerror(errno)) : 0;
}

static int many_loop(Many *y, Report *report) {
    const Model *m = y->x->model;
    const GenerateOptions *o = y->o;
    const Sampling how = {(float)o->temperature, (float)o->top_p, (int)o->top_k, (float)o->min_p,
                          (float)o->repeat_penalty};
    Acts *a = y->x->acts;
    size_t total = size_mul(y->n_prompts, y->samples), V = (size_t)m->config.V;
    for (;;) {
        while (y->running < y->slots && y->begun < total && y->begun - y->printed < TEXTS_MAX &&
               !interrupted)
            if (many_begin(y, report)) return -1;
        if (y->running == 0) return 0;
        int32_t ids[BATCH_MAX];
        State *states[BATCH_MAX];
        int team = pass_team(m, a, y->running), n = y->running;
        (void)team;
#pragma omp parallel for num_threads(team) schedule(dynamic)
        for (int i = 0; i < n; i++) // a->logits is free: every state has its own by now
            ids[i] = draw(m, a->logits + (size_t)i * V, y->order + (size_t)i * V,
                          y->sequence[i].state, &how);
        for (int i = n - 1; i >= 0; i--) { // backward: the one that takes a place is done with
            int why = interrupted ? 4 : many_accept(y, &y->sequence[i], ids[i]);
            if (!interrupted) report->n_written += why != 2;
            if (why < 0 || (why && many_end(y, i, why))) return -1;
            if (why) ids[i] = ids[y->running];
        }
        for (int i = 0; i < y->running; i++) states[i] = y->sequence[i].state;
        if (y->running && mamba_step_batch(m, a, states, ids, y->running)) return -1;
    }
}

// Every text of --samples or --batch. text: the prompt, or the file's.
static int generate_many(Session *x, const GenerateOptions *o, const char *text, size_t bytes) {
    Report report = {.seed = o->clock_seed && o->temperature > 0 ? o->seed : -1};
    Many *y = calloc(1, sizeof *y);
    if (!y) return fail("out of memory");
    y->x = x, y->o = o, y->samples = (size_t)o->samples, y->seed = x->state->random;
    int result = many_prompts(y, text, bytes);
    size_t total = size_mul(y->n_prompts, y->samples);
    y->slots = total < BATCH_MAX ? (int)total : BATCH_MAX;
    if (result == 0) {
        y->order = malloc(
            size_mul(size_mul((size_t)y->slots, (size_t)x->model->config.V), sizeof *y->order));
        y->bytes = malloc(x->model->text_room);
        y->start = mamba_state_new(x->model);
        if (!y->order || !y->bytes) result = fail("out of memory: %d sequences", y->slots);
        if (!y->start) result = -1;
    }
    for (int i = 0; i < y->slots && result == 0; i++) {
        y->sequence[i].out.stop = &o->stop;
        result = (y->sequence[i].state = mamba_state_new(x->model)) ? 0 : -1;
    }
    if (result == 0) {
        mamba_state_copy(x->model, y->start, x->state);
        double start = seconds();
        result = many_loop(y, &report);
        report.write_seconds = seconds() - start - report.read_seconds;
    }
    char ended[160];
    int at = snprintf(ended, sizeof ended, "%zu texts", y->printed), colon = at;
    for (int i = 0; i < 4; i++)
        if (y->ended[i])
            at += snprintf(ended + at, sizeof ended - (size_t)at, "%s %zu %s",
                           at == colon ? ":" : ",", y->ended[i], ENDED[i]);
    report.ended = ended;
    if (result == 0) print_report(x, &report);
    for (int i = 0; i < BATCH_MAX; i++)
        mamba_state_free(y->sequence[i].state), free(y->sequence[i].out.held.bytes);
    for (int i = 0; i < TEXTS_MAX; i++) free(y->text[i].bytes);
    mamba_state_free(y->start);
    free(y->prompt), free(y->ids), free(y->order), free(y->bytes), free(y);
    return result;
}

// --- interactive session

enum { UNDO_MAX = 32 };
typedef struct {
    State *before[UNDO_MAX]; // states before the last turns, oldest first
    int n;
} UndoStack;

static int undo_push(UndoStack *undo, const Model *m, const State *s) {
    State *copy;
    if (undo->n == UNDO_MAX) { // forget the oldest, reuse its memory
        copy = undo->before[0];
        memmove(undo->before, undo->before + 1, (UNDO_MAX - 1) * sizeof *undo->before);
        undo->n--;
    } else if (!(copy = mamba_state_new(m))) {
        return -1;
    }
    mamba_state_copy(m, copy, s);
    undo->before[undo->n++] = copy;
    return 0;
}

static void undo_pop(UndoStack *undo, const Model *m, State *s) {
    if (undo->n == 0) {
        fprintf(stderr, "nothing to undo\n");
        return;
    }
    State *last = undo->before[--undo->n];
    mamba_state_copy(m, s, last);
    mamba_state_free(last);
    fprintf(stderr, "undone: back to %llu tokens\n", (unsigned long long)s->position);
}

static const char SESSION_HELP[] =
    "A line is read as it stands, and the model goes on from there; an empty line lets it write "
    "more.\n"
    "  /undo        take the last turn back (up to 32)\n"
    "  /reset       forget everything\n"
    "  /save FILE   save the state      /load FILE   load one\n"
    "  /help        this text           /quit        leave (so does end of input)\n"
    "Ctrl-C stops the writing, not the session. A line that begins with // is text that begins "
    "with /.\n";

static void session_command(Session *x, const char *model_path, UndoStack *undo, const char *line) {
    const Model *m = x->model;
    if (!strcmp(line, "/undo")) undo_pop(undo, m, x->state);
    else if (!strcmp(line, "/help")) fprintf(stderr, "%s", SESSION_HELP);
    else if (!strcmp(line, "/reset")) {
        if (undo_push(undo, m, x->state)) fprintf(stderr, "mamba: %s\n", error_text);
        else mamba_state_reset(m, x->state), fprintf(stderr, "forgotten (/undo brings it back)\n");
    } else if (!strncmp(line, "/save ", 6)) {
        const FileUse use[] = {{INPUT, "the model", model_path, NULL},
                               {OUTPUT, "/save", line + 6, NULL}};
        if (check_files(use, COUNT(use)) || mamba_state_save(m, x->state, line + 6))
            fprintf(stderr, "mamba: %s\n", error_text);
        else fprintf(stderr, "saved\n");
    } else if (!strncmp(line, "/load ", 6)) {
        State *before = mamba_state_new(m); // a turn to undo only if the load succeeds
        if (before) mamba_state_copy(m, before, x->state);
        if (!before || mamba_state_load(m, x->state, line + 6) || undo_push(undo, m, before))
            fprintf(stderr, "mamba: %s\n", error_text);
        else fprintf(stderr, "loaded: %llu tokens\n", (unsigned long long)x->state->position);
        mamba_state_free(before);
    } else fprintf(stderr, "unknown command '%s' (try /help)\n", line);
}

// One line of stdin without its end; NULL at end of input (*failed: after fail()). Ctrl-C ends the
// input too.
static char *read_line(size_t *length, bool *failed) {
    size_t room = 256, n = 0;
    *failed = false;
    char *line = malloc(room);
    int byte = EOF;
    while (line && (byte = getchar()) != EOF && byte != '\n') {
        if (n + 2 > room) {
            char *larger = realloc(line, room *= 2);
            if (!larger) free(line);
            line = larger;
        }
        if (line) line[n++] = (char)byte;
    }
    if (!line)
        return *failed = true, fail("stdin: out of memory after %zu bytes of a line", n), NULL;
    if (byte == EOF && ferror(stdin) && !interrupted)
        *failed = true, fail("stdin: %s", strerror(errno));
    if (byte == EOF && (n == 0 || ferror(stdin))) {
        free(line);
        return NULL;
    }
    if (n && line[n - 1] == '\r') n--;
    line[n] = 0;
    *length = n;
    return line;
}

static int interactive(Session *x, const GenerateOptions *o) {
    UndoStack undo = {.n = 0};
    int result = 0;
    fprintf(stderr, "%s", SESSION_HELP);
    for (char *line; result == 0; free(line)) {
        size_t length;
        bool failed;
        signal(SIGINT, on_kill);
        if (o->save) catch_interrupt_reading(); // Ctrl-C here leaves, and what there is gets saved
        fprintf(stderr, "> ");
        line = read_line(&length, &failed);
        if (!line || !strcmp(line, "/quit")) {
            free(line);
            if (failed) result = -1;
            break;
        }
        const char *text = line[0] == '/' && line[1] == '/' ? line + 1 : line;
        if (line[0] == '/' && line[1] != '/') {
            session_command(x, o->model_path, &undo, line);
            continue;
        }
        catch_interrupt();
        GenerateOptions turn = *o;
        turn.save = NULL, turn.no_echo = true;
        if (undo_push(&undo, x->model, x->state)) result = -1;
        else if (generate_once(x, &turn, text, length - (size_t)(text - line), NULL)) {
            fprintf(stderr, "mamba: %s\n", error_text);
            undo_pop(&undo, x->model, x->state);
        }
        printf("\n");
        fflush(stdout);
    }
    while (undo.n) mamba_state_free(undo.before[--undo.n]);
    if (o->save && mamba_state_save(x->model, x->state, o->save)) result = -1;
    return result;
}

static const char GENERATE_USAGE[] =
    "mamba.c " MAMBA_VERSION ": the Mamba language model in one C file\n\n"
    "  mamba model.bin \"prompt\" [options]   go on with a text; prompt - reads it from stdin, "
    "\"\" starts a new text\n"
    "  mamba model.bin [options]            interactive session, the state carries on from line to "
    "line\n"
    "  mamba info | tokenize | eval | logits | train | bench --help\n";

static int command_generate(int argc, char **argv) {
    GenerateOptions o = {.n = 256,
                         .seed = LONG_MIN,
                         .temperature = 0.8,
                         .top_p = 0.95,
                         .repeat_penalty = 1,
                         .layer = -1,
                         .samples = 1};
    o.threads = default_threads();
    const Option options[] = {
        {"-n", "N", "tokens to write; -1: no limit, 0: only read the prompt", OPT_INT, &o.n, -1,
         1e15},
        {"-t", "X", "temperature; 0: always the likeliest token", OPT_REAL, &o.temperature, 0, 100},
        {"-p", "X", "top-p: sample from the likeliest tokens that reach this probability", OPT_REAL,
         &o.top_p, 0, 1},
        {"-k", "K", "top-k: sample from the K likeliest tokens; 0: all", OPT_INT, &o.top_k, 0, 1e9},
        {"--min-p", "X", "drop tokens less likely than X times the likeliest", OPT_REAL, &o.min_p,
         0, 1},
        {"--repeat-penalty", "X", "weaken the last 64 tokens; 1: off", OPT_REAL, &o.repeat_penalty,
         0.01, 100},
        {"-s", "SEED", "random seed; by default the clock, or the loaded state's generator",
         OPT_INT, &o.seed, 0, 9e15},
        {"--stop", "STRING", "end before this text would be written; up to 16 times", OPT_LIST,
         &o.stop, 0, 0},
        {"--ignore-eos", "", "write on after end-of-text", OPT_SWITCH, &o.ignore_eos, 0, 0},
        {"--no-echo", "", "do not repeat the prompt on stdout", OPT_SWITCH, &o.no_echo, 0, 0},
        {"--show-selection", "",
         "write nothing: show the prompt, each token by the mean of its step size delta",
         OPT_SWITCH, &o.show_selection, 0, 0},
        {"--layer", "N", "the layer whose delta is shown, from 0; -1: the mean of all", OPT_INT,
         &o.layer, -1, 65535},
        {"--samples", "S", "write S texts from the prompt (or each of --batch), 32 at once",
         OPT_INT, &o.samples, 1, 1e9},
        {"--batch", "FILE", "write a text from each line of FILE, - for stdin, 32 at once",
         OPT_TEXT, &o.batch, 0, 0},
        {"--null", "", "no headings between several texts: a NUL byte after each", OPT_SWITCH,
         &o.null, 0, 0},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &o.threads, 1, 1024},
        {"--save-state", "FILE", "save the state at the end, also after Ctrl-C", OPT_TEXT, &o.save,
         0, 0},
        {"--load-state", "FILE", "start from a saved state", OPT_TEXT, &o.load, 0, 0},
    };
    const char *rest[2];
    if (argc < 2 || wants_help(argc, argv)) {
        print_help(GENERATE_USAGE, options, COUNT(options));
        return argc < 2 ? fail("a model.bin is needed, for example: mamba models/tales.bin \"Once "
                               "upon a time\"")
                        : 0;
    }
    int n = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n < 0) return -1;
    if (n == 0) return fail("a model.bin is needed");
    if (o.show_selection && n == 1) return fail("--show-selection needs a prompt");
    if (o.show_selection) backend.cpu = true; // delta is seen there
    bool many = o.batch || o.samples > 1;
    const char *option = o.batch ? "--batch" : "--samples";
    if (o.batch && n == 2)
        return fail("--batch takes the prompts from %s: '%s' is one too many", o.batch, rest[1]);
    if (o.samples > 1 && !o.batch && n == 1) return fail("--samples needs a prompt");
    if (many && o.show_selection)
        return fail("--show-selection shows one prompt: it does not go with %s", option);
    if (many && o.save)
        return fail("--save-state keeps one text's state: it does not go with %s", option);
    if (many && o.n == 0) return fail("-n 0 writes nothing: it does not go with %s", option);
    if (o.null && !many)
        return fail("--null ends each of several texts: it needs --samples or --batch");
    if (many && GPU && !backend.cpu) return fail("%s runs on the processor: add --cpu", option);
    bool reads_stdin = !o.batch && (n == 1 || !strcmp(rest[1], "-"));
    const FileUse use[] = {
        {INPUT, "the model", o.model_path = rest[0], NULL},
        {INPUT, "the state of --load-state", o.load, NULL},
        {INPUT, "the standard input", reads_stdin ? "-" : NULL, NULL},
        {OUTPUT, "--save-state", o.save, "the state of --load-state"},
    };
    if (check_files(use, COUNT(use))) return -1;
    Session x;
    if (session_open(&x, rest[0], o.threads)) return -1;
    int result = o.load ? mamba_state_load(x.model, x.state, o.load) : 0;
    if (result == 0 && (o.seed != LONG_MIN || !o.load)) {
        if (o.seed == LONG_MIN) o.seed = (long)time(NULL), o.clock_seed = true;
        x.state->random = (uint64_t)o.seed;
    }
    if (result == 0 && n == 1 && !o.batch) result = interactive(&x, &o);
    else if (result == 0) {
        const char *prompt = o.batch ? "" : rest[1], *path = o.batch                ? o.batch
                                                             : !strcmp(prompt, "-") ? "-"
                                                                                    : NULL;
        size_t bytes = strlen(prompt);
        char *text = path ? read_text(path, &bytes) : NULL; // Ctrl-C still ends the program here
        catch_interrupt();
        if (path && !text) result = -1;
        else if (many) result = generate_many(&x, &o, text ? text : prompt, bytes), free(text);
        else result = generate_once(&x, &o, text ? text : prompt, bytes, text);
    }
    session_close(&x);
    return result;
}

// --- info

static const char INFO_USAGE[] =
    "mamba info model.bin [--verify]\n\nShows what is in a model file.\n";

typedef struct {
    char bad[LABEL]; // the first tensor with a value that is not finite
} Verdict;

static void verify_tensor(void *context, const TensorInfo *info, Tensor *w) {
    Verdict *verdict = context;
    float row[1024];
    for (int r = 0; r < w->rows && !verdict->bad[0]; r++)
        for (int from = 0; from < w->cols && !verdict->bad[0]; from += 1024) {
            int n = w->cols - from < 1024 ? w->cols - from : 1024;
            tensor_widen(row, w, r, from, n);
            for (int i = 0; i < n && !verdict->bad[0]; i++)
                if (row[i] - row[i] != 0 ||
                    (w->type == F16 &&
                     fabsf(row[i]) > 65504)) { // f16's infinity and NaN widen to more
                    tensor_label(verdict->bad, info);
                }
        }
}

static void swap_tensor(void *context, const TensorInfo *info,
                        Tensor *w) { // does nothing on a little-endian machine
    (void)context, (void)info;
    fix_tensor_endian(w);
}

// Every byte against its checksum, every weight finite: 0, or -1 after fail().
static int verify(Model *m, const char *path) {
    Verdict verdict = {{0}};
    each_tensor(m, verify_tensor, &verdict);
    if (verdict.bad[0]) return fail("%s: %s holds a value that is not finite", path, verdict.bad);
    each_tensor(m, swap_tensor, NULL); // the checksum is of the bytes as stored
    uint32_t crc = crc32_of(0, m->file + m->tensors_offset, m->tensors_bytes);
    each_tensor(m, swap_tensor, NULL);
    if (crc != m->tensors_crc)
        return fail("%s: the checksum of the tensors does not match: the file is damaged", path);
    return 0;
}

static int command_info(int argc, char **argv) {
    bool check = false;
    const Option options[] = {
        {"--verify", "", "check every byte against its checksum", OPT_SWITCH, &check, 0, 0}};
    const char *path;
    if (wants_help(argc, argv)) return print_help(INFO_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), &path, 1);
    if (n != 1) return n < 0 ? -1 : fail("info needs a model.bin");
    Model *m = mamba_load(path);
    if (!m) return -1;
    const Config *c = &m->config;
    printf("file         %s, %zu bytes, format %d\n", path, m->file_bytes, FILE_VERSION);
    printf("model        %s, %zu parameters in %s\n",
           c->arch == ARCH_MAMBA ? "mamba" : "falcon_mamba", m->n_params, type_name(c->type));
    printf("sizes        d_model %d, n_layer %d, vocab_size %d, d_inner %d, d_state %d, d_conv %d, "
           "dt_rank %d\n",
           c->D, c->n_layer, c->V, c->E, c->N, c->K, c->R);
    printf("options      %s head, %sprojection biases, %sconv bias, norm eps %g",
           c->flags & FLAG_TIED ? "tied" : "untied", c->flags & FLAG_PROJ_BIAS ? "" : "no ",
           c->flags & FLAG_CONV_BIAS ? "" : "no ", c->norm_eps);
    if (c->flags & FLAG_MIXER_NORM) printf(", norms on delta, B and C with eps %g", c->mixer_eps);
    printf("\ntokenizer    %s, %d ids",
           tokenizer_is_bytes(m->tokenizer) ? "bytes" : "byte-level BPE",
           tokenizer_size(m->tokenizer));
    printf("; end-of-text");
    for (int i = 0; i < 4; i++)
        if (c->eos[i] >= 0) printf(" %d", c->eos[i]);
    printf("%s\n", c->eos[0] < 0 ? " none" : "");
    printf("state        %zu bytes a sequence, whatever its length\n",
           STATE_HEADER + state_floats(c) * sizeof(float));
    int result = check ? verify(m, path) : 0;
    if (check && result == 0)
        printf("checksums    header, tokenizer and tensors match; every weight is finite\n");
    mamba_free(m);
    return result;
}

// --- tokenize

static const char TOKENIZE_USAGE[] =
    "mamba tokenize model.bin [FILE|-] [--decode]\n\n"
    "Text to token ids, one a line; with --decode token ids to text. Reads stdin without FILE. "
    "Instead of a model, a\n"
    "tokenizer file made by `export.py tokenizer.json tokenizer.bin` will do.\n";

static int print_decoded(const Tokenizer *t, const char *text, size_t bytes) {
    Utf8Pending pending = {.n = 0};
    const char *p = text, *end = text + bytes;
    for (;;) {
        while (p < end && strchr(" \t\r\n,", *p) && *p) p++;
        if (p == end) break;
        char *stop;
        errno = 0;
        long id = strtol(p, &stop, 10);
        if (stop == p || errno || (stop < end && (!*stop || !strchr(" \t\r\n,", *stop))))
            return fail("byte %zu of the input is not part of a token id", (size_t)(p - text));
        if (id < 0 || id > INT_MAX || !tokenizer_has(t, (int)id))
            return fail("token id %ld at byte %zu is not in the tokenizer of %d ids", id,
                        (size_t)(p - text), tokenizer_size(t));
        size_t n;
        const unsigned char *token = tokenizer_token(t, (int)id, &n);
        unsigned char *out = malloc(3 * (n + 4));
        if (!out) return fail("out of memory: a token of %zu bytes", n);
        if (tokenizer_is_bytes(t)) fwrite(token, 1, n, stdout);
        else fwrite(out, 1, utf8_push(&pending, token, n, out), stdout);
        free(out);
        p = stop;
    }
    unsigned char out[16];
    fwrite(out, 1, utf8_flush(&pending, out), stdout);
    return 0;
}

static int print_ids(const Tokenizer *t, const char *text, size_t bytes) {
    int32_t *ids = NULL;
    size_t n = 0;
    if (tokenizer_encode(t, text, bytes, &ids, &n)) return -1;
    for (size_t i = 0; i < n; i++) printf("%d\n", (int)ids[i]);
    free(ids);
    return 0;
}

static int command_tokenize(int argc, char **argv) {
    bool decode = false, mapped = false;
    const Option options[] = {{"--decode", "",
                               "token ids (between spaces, commas or line ends) to text",
                               OPT_SWITCH, &decode, 0, 0}};
    const char *rest[2] = {NULL, "-"};
    if (wants_help(argc, argv)) return print_help(TOKENIZE_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n < 1) return n < 0 ? -1 : fail("tokenize needs a model.bin or a tokenizer file");
    Model *m = NULL;
    Tokenizer *alone = NULL;
    size_t file_bytes = 0, bytes = 0;
    unsigned char *file = file_map(rest[0], &file_bytes, &mapped);
    int result = file ? 0 : -1;
    if (file && file_bytes >= 4 && !memcmp(file, "mtok", 4))
        result = (alone = tokenizer_open(file, file_bytes)) ? 0 : fail_in(rest[0]);
    else if (file) result = (m = mamba_load(rest[0])) ? 0 : -1;
    char *text = result ? NULL : read_text(rest[1], &bytes);
    const Tokenizer *t = m ? m->tokenizer : alone;
    if (!text) result = -1;
    else if ((result = decode ? print_decoded(t, text, bytes) : print_ids(t, text, bytes)))
        fail_in(rest[1]);
    free(text);
    if (alone) tokenizer_close(alone);
    if (file) file_unmap(file, file_bytes, mapped);
    mamba_free(m);
    return result;
}

// --- [train] the paper's synthetic tasks, made afresh for every step

typedef enum { TASK_NONE, TASK_INDUCTION, TASK_COPYING } Task;
enum { TASK_VOCAB = 16, COPY_TOKENS = 16 };

static int parse_task(const char *name, Task *task) {
    *task = !name                        ? TASK_NONE
            : !strcmp(name, "induction") ? TASK_INDUCTION
            : !strcmp(name, "copying")   ? TASK_COPYING
                                         : TASK_NONE;
    return name && *task == TASK_NONE ? fail("--task needs induction or copying, not '%s'", name)
                                      : 0;
}

static int task_shortest(Task task) { return task == TASK_COPYING ? 2 * COPY_TOKENS : 4; }

// One sequence of L tokens and, where something is to be predicted, its targets (-1 elsewhere). The
// paper leaves the layout open:
//   induction: ids 0..14 at random; the special id 15 stands once at a random place and again at
//   the very end, where the token that followed it the first time is wanted. copying: noise is id
//   0; 16 data tokens of ids 1..14 stand at random places, in their order, before the last 16
//   places, which hold the marker 15; at the i-th marker the i-th data token is wanted. L counts
//   all of it.
static void task_sequence(Task task, int32_t *ids, int32_t *targets, size_t L, uint64_t *random) {
    for (size_t t = 0; t < L; t++) targets[t] = -1;
    if (task == TASK_INDUCTION) {
        for (size_t t = 0; t < L; t++) ids[t] = (int32_t)(random_u64(random) % (TASK_VOCAB - 1));
        size_t place = random_u64(random) % (L - 2);
        ids[place] = ids[L - 1] = TASK_VOCAB - 1;
        targets[L - 1] = ids[place + 1];
        return;
    }
    size_t body = L - COPY_TOKENS, left = COPY_TOKENS;
    for (size_t t = 0; t < body; t++) { // each set of places is equally likely: take this one with
                                        // probability left / places
        bool data = random_u64(random) % (body - t) < left;
        ids[t] = data ? 1 + (int32_t)(random_u64(random) % (TASK_VOCAB - 2)) : 0;
        if (data) targets[L - left--] = ids[t];
    }
    for (size_t t = body; t < L; t++) ids[t] = TASK_VOCAB - 1;
}

// --- eval

static const char EVAL_USAGE[] =
    "mamba eval model.bin FILE|- [--each] [-T N]\n"
    "mamba eval model.bin --task induction|copying [--length L] [--samples S]\n\n"
    "How well the model predicts a text: every token but the first, each from all tokens before "
    "it. Prints the number "
    "of\n"
    "tokens, the mean negative log-likelihood in nats, the perplexity, and bits per byte of the "
    "predicted text.\n";

typedef struct {
    const int32_t *ids;
    size_t t, n; // position of the next logits, length
    int V;
    double sum;
    bool each;
} Evaluation;

static void evaluate(void *context, const float *logits) {
    Evaluation *ev = context;
    if (++ev->t == ev->n) return; // nothing follows the last token
    double nll = log_sum_exp(logits, ev->V) - (double)logits[ev->ids[ev->t]];
    ev->sum += nll;
    if (ev->each) printf("%.6f\n", nll);
}

// With `context` tokens at a time, each from a new state, or all in one.
static int evaluate_ids(Session *x, const int32_t *ids, size_t n, size_t context, bool each) {
    if (n < 2) return fail("the text has %zu token(s); there is something to predict from 2 on", n);
    Evaluation ev = {.V = x->model->config.V, .each = each};
    size_t bytes = 0, length = 0, predicted = 0;
    double start = seconds();
    for (size_t from = 0; n - from > 1;
         from += ev.n) { // a last token alone has nothing to be predicted from
        ev.ids = ids + from, ev.t = 0, ev.n = context && context < n - from ? context : n - from;
        for (size_t i = 1; i < ev.n; i++)
            tokenizer_token(x->model->tokenizer, ev.ids[i], &length), bytes += length;
        if (from) mamba_state_reset(x->model, x->state);
        if (mamba_prefill(x->model, x->acts, x->state, ev.ids, ev.n, evaluate, &ev)) return -1;
        predicted += ev.n - 1;
    }
    double nll = ev.sum / (double)predicted;
    if (nll != nll)
        return fail("the likelihood is not a number: the weights are damaged (try info --verify)");
    FILE *f = each ? stderr : stdout;
    fprintf(f, "tokens         %zu (%zu predicted)\n", n, predicted);
    fprintf(f, "mean_nll       %.6f nats/token\n", nll);
    fprintf(f, "perplexity     %.6g\n", exp(nll));
    fprintf(f, "bits_per_byte  %.6f\n", bytes ? ev.sum / log(2) / (double)bytes : 0);
    fprintf(stderr, "%.1f tokens/s", (double)n / (seconds() - start));
    if (peak_megabytes() > 0) fprintf(stderr, " | peak memory %.1f MB", peak_megabytes());
    fprintf(stderr, "\n");
    return 0;
}

// --- [train] eval --task: accuracy at any length, in memory that does not depend on it (token ids
// aside)

typedef struct {
    const int32_t *targets;
    size_t t, right, wanted;
    int V;
} TaskScore;

static void score_task(void *context, const float *logits) {
    TaskScore *s = context;
    int32_t target = s->targets[s->t++];
    if (target < 0) return;
    int best = 0;
    for (int v = 1; v < s->V; v++)
        if (logits[v] > logits[best]) best = v;
    s->wanted++, s->right += best == target;
}

typedef struct { // what the threads of eval --task share: each takes the next sequence and reads
                 // the whole of it
    const Model *m;
    Task task;
    size_t L, left; // sequences still to be made
    uint64_t random;
    int result;
    bool recurrent; // token by token instead of by prefill
} TaskQueue;

typedef struct {
    Acts *acts;
    State *state;
    int32_t *ids, *targets;
    TaskScore score;
} TaskReader;

static bool
next_sequence(TaskQueue *q,
              TaskReader *r) { // in the order of one generator, so that threads change nothing
    bool one = false;
#pragma omp critical
    if (q->left && q->result == 0) {
        q->left--, one = true;
        task_sequence(q->task, r->ids, r->targets, q->L, &q->random);
    }
    return one;
}

static int read_tokens(const TaskQueue *q, TaskReader *r, const int32_t *ids, size_t n,
                       bool score) {
    if (!q->recurrent)
        return mamba_prefill(q->m, r->acts, r->state, ids, n, score ? score_task : NULL, &r->score);
    for (size_t t = 0; t < n; t++) {
        if (mamba_step(q->m, r->acts, r->state, ids[t])) return -1;
        if (score) score_task(&r->score, r->state->logits);
    }
    return 0;
}

static void read_sequences(TaskQueue *q, TaskReader *r) {
    size_t tail = q->task == TASK_COPYING ? COPY_TOKENS : 1,
           body = q->L - tail; // only the tail has targets
    while (next_sequence(q, r)) {
        mamba_state_reset(q->m, r->state);
        r->score.t = body;
        if (read_tokens(q, r, r->ids, body, false) ||
            read_tokens(q, r, r->ids + body, tail, true)) {
#pragma omp critical
            q->result = -1;
        }
    }
}

// Whole sequences side by side, where there are enough for all threads: no barrier is waited at.
static int evaluate_task(Session *x, Task task, size_t L, size_t samples, uint64_t seed,
                         bool recurrent) {
    const Model *m = x->model;
    if (m->config.V < TASK_VOCAB)
        return fail("the model has %d ids, the tasks need %d", m->config.V, TASK_VOCAB);
    int team = x->acts->gpu || samples < (size_t)x->acts->threads ? 1 : x->acts->threads;
    TaskQueue queue = {m, task,     L, samples, seed ^ 0x6576616C75617465u,
                       0, recurrent}; // training's generator starts elsewhere
    TaskReader *reader = calloc((size_t)team, sizeof *reader);
    TaskScore score = {0};
    double start = seconds();
    int result = reader ? 0 : fail("out of memory: %d threads", team);
    for (int i = 0; i < team && result == 0; i++) {
        TaskReader *r = &reader[i];
        r->ids = malloc(L * sizeof *r->ids), r->targets = malloc(L * sizeof *r->targets);
        r->acts = i ? mamba_acts_new(m, 1) : x->acts, r->state = i ? mamba_state_new(m) : x->state;
        r->score = (TaskScore){.targets = r->targets, .V = m->config.V};
        if (!r->acts || !r->state) result = -1;
        else if (!r->ids || !r->targets)
            result = fail("out of memory: %d sequences of %zu tokens", team, L);
    }
    if (result == 0) {
#pragma omp parallel for num_threads(team) schedule(static, 1)
        for (int i = 0; i < team; i++) read_sequences(&queue, &reader[i]);
        result = queue.result;
    }
    for (int i = 0; i < team && reader; i++) {
        TaskReader *r = &reader[i];
        score.right += r->score.right, score.wanted += r->score.wanted;
        free(r->ids), free(r->targets);
        if (i) mamba_acts_free(r->acts), mamba_state_free(r->state);
    }
    free(reader);
    if (result == 0) { // Wilson's interval
        double n = (double)score.wanted, p = (double)score.right / n, z = 1.96,
               middle = (p + z * z / (2 * n)) / (1 + z * z / n);
        double half_width = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n));
        printf("length %zu  accuracy %.2f%%  (%zu of %zu, 95%% interval %.2f to %.2f%%)  %.1f s\n",
               L, 100 * p, score.right, score.wanted, 100 * fmax(0, middle - half_width),
               100 * fmin(1, middle + half_width), seconds() - start);
    }
    return result;
}

static int command_eval(int argc, char **argv) {
    bool each = false, recurrent = false;
    long threads = default_threads(), length = 256, samples = 0, seed = 1, context = 0;
    const char *task_name = NULL;
    const Option options[] = {
        {"--task", "T", "accuracy on induction or copying instead of a text", OPT_TEXT, &task_name,
         0, 0},
        {"--length", "L", "tokens a sequence of the task", OPT_INT, &length, 1, 1 << 30},
        {"--samples", "S",
         "sequences of the task; 0: 1024 up to 2^14 tokens, then fewer, 64 from 2^18 on", OPT_INT,
         &samples, 0, 1e9},
        {"-s", "SEED", "of the task's sequences, which are never those of training", OPT_INT, &seed,
         0, 9e15},
        {"--recurrent", "",
         "read them token by token, as text is generated, instead of by the scan", OPT_SWITCH,
         &recurrent, 0, 0},
        {"--each", "",
         "one negative log-likelihood a line on stdout, from the second token on; the summary on "
         "stderr",
         OPT_SWITCH, &each, 0, 0},
        {"--context", "N",
         "cut the text into pieces of N tokens, each from a new state; 0: one piece", OPT_INT,
         &context, 0, 1 << 30},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &threads, 1, 1024},
    };
    const char *rest[2];
    if (wants_help(argc, argv)) return print_help(EVAL_USAGE, options, COUNT(options)), 0;
    int n_rest = parse_options(argc, argv, options, COUNT(options), rest, 2);
    Task task;
    if (n_rest < 0 || parse_task(task_name, &task)) return -1;
    if (n_rest != (task ? 1 : 2)) return fail("eval needs a model.bin and a text file, or --task");
    if (context == 1) return fail("--context 1 leaves nothing to predict: at least 2");
    if (task && context) return fail("--context does not go with --task");
    if (recurrent && !task) return fail("--recurrent goes with --task");
    if (task && length < task_shortest(task))
        return fail("--length %ld is too short for --task %s: at least %d", length, task_name,
                    task_shortest(task));
    Session x;
    if (session_open(&x, rest[0], threads)) return -1;
    if (task) {
        if (samples == 0)
            samples = length <= 1 << 14 ? 1024 : length >= 1 << 18 ? 64 : (1 << 24) / length;
        int result =
            evaluate_task(&x, task, (size_t)length, (size_t)samples, (uint64_t)seed, recurrent);
        session_close(&x);
        return result;
    }
    size_t bytes, n = 0;
    int32_t *ids = NULL;
    char *text = read_text(rest[1], &bytes);
    int result = text ? 0 : -1;
    if (text && (mamba_encode(x.model, text, bytes, &ids, &n) ||
                 evaluate_ids(&x, ids, n, (size_t)context, each)))
        result = fail_in(rest[1]);
    free(text);
    free(ids);
    session_close(&x);
    return result;
}

// --- logits

static const char LOGITS_USAGE[] = "mamba logits model.bin \"prompt\" [--all] [-o FILE]\n"
                                   "mamba logits model.bin --tokens 1,2,3 [--all] [-o FILE]\n\n"
                                   "The logits after the last token, or after each: V numbers a "
                                   "line, or with -o raw little-endian float32, (L,V).\n";

typedef struct {
    FILE *raw; // NULL: text
    int V;
} LogitsWriter;

static void write_logits(void *context, const float *logits) {
    const LogitsWriter *w = context;
    for (int v = 0; v < w->V; v++) {
        float value = logits[v];
        fix_endian(&value, sizeof value, sizeof value);
        if (w->raw) fwrite(&value, sizeof value, 1, w->raw);
        else printf("%.9g%c", logits[v], v + 1 < w->V ? ' ' : '\n');
    }
}

// "1,2,3" to ids. 0, or -1 after fail().
static int parse_ids(const char *text, int32_t **ids, size_t *n) {
    *n = 0;
    *ids = malloc((strlen(text) / 2 + 1) * sizeof **ids);
    if (!*ids) return fail("out of memory: --tokens");
    for (const char *p = text;; p++) {
        char *end;
        errno = 0;
        long id = strtol(p, &end, 10);
        if (end == p || errno || id < 0 || id > INT_MAX || (*end && *end != ','))
            return fail("--tokens needs ids between commas, such as 1,2,3, not '%s'", text);
        (*ids)[(*n)++] = (int32_t)id;
        if (!*end) return 0;
        p = end;
    }
}

static int command_logits(int argc, char **argv) {
    bool all = false;
    long threads = default_threads();
    const char *tokens = NULL, *path = NULL, *rest[2];
    const Option options[] = {
        {"--tokens", "LIST", "token ids between commas, instead of a prompt", OPT_TEXT, &tokens, 0,
         0},
        {"--all", "", "after every token, not only the last", OPT_SWITCH, &all, 0, 0},
        {"-o", "FILE", "write raw float32 instead of text", OPT_TEXT, &path, 0, 0},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &threads, 1, 1024},
    };
    if (wants_help(argc, argv)) return print_help(LOGITS_USAGE, options, COUNT(options)), 0;
    int n_rest = parse_options(argc, argv, options, COUNT(options), rest, 2);
    if (n_rest < 0) return -1;
    if (n_rest != (tokens ? 1 : 2))
        return fail("logits needs a model.bin and either a prompt or --tokens");
    const FileUse use[] = {
        {INPUT, "the model", rest[0], NULL},
        {INPUT, "the standard input", !tokens && !strcmp(rest[1], "-") ? "-" : NULL, NULL},
        {OUTPUT_IN_PLACE, "-o", path, NULL},
    };
    if (check_files(use, COUNT(use))) return -1;
    Session x;
    if (session_open(&x, rest[0], threads)) return -1;
    int32_t *ids = NULL, start = start_token(&x.model->config);
    size_t n = 0, bytes = tokens ? 0 : strlen(rest[1]);
    char *text = !tokens && !strcmp(rest[1], "-") ? read_text("-", &bytes) : NULL;
    int result = tokens ? parse_ids(tokens, &ids, &n) : 0;
    if (!tokens && !strcmp(rest[1], "-") && !text) result = -1;
    if (!tokens && result == 0 && mamba_encode(x.model, text ? text : rest[1], bytes, &ids, &n))
        result = fail_in("prompt");
    if (result == 0 && n == 0 && start < 0)
        result = fail("an empty prompt, and no end-of-text token to start from");
    LogitsWriter writer = {.V = x.model->config.V};
    if (result == 0 && check_ids(x.model, n ? ids : &start, n ? n : 1)) result = -1;
    NewFile file = {.f = NULL};
    if (result == 0 && path) result = new_file_open(&file, path, true);
    writer.raw = file.f;
    if (result == 0)
        result = mamba_prefill(x.model, x.acts, x.state, n ? ids : &start, n ? n : 1,
                               all ? write_logits : NULL, &writer);
    if (result == 0 && !all) write_logits(&writer, x.state->logits);
    if (result == 0 && path) result = new_file_commit(&file);
    else new_file_discard(&file);
    free(text);
    free(ids);
    session_close(&x);
    return result;
}

// --- [train] train

typedef struct {
    const char *out, *from, *tokenizer, *task_name, *log, *schedule, *held_out_data;
    TextList data;
    long d_model, layers, d_state, d_conv, expand, steps, batch, accumulate, length, grow_from,
        warmup, seed, save_every, eval_every, threads;
    double rate, min_rate, decay, clip, beta2, held_out;
    bool resume, log_given; // --log, or the name made from -o
} TrainOptions;

enum { SETTINGS = 768 }; // bytes of the text that tells runs apart

typedef struct {
    const TrainOptions *o;
    Task task;
    Model *source; // --from or --tokenizer model: lends its tokenizer
    Model *model;
    Trainer *trainer;
    unsigned char *tokenizer; // blob that goes into the file
    size_t tokenizer_bytes;
    int32_t *data; // all tokens; the last n_held are held out
    size_t n_data, n_held;
    int32_t *ids, *targets; // of one pass
    uint64_t random;
    double held_loss, seconds; // last held-out loss; time spent in earlier runs
    char settings[SETTINGS];   // what must be the same when a run goes on
} Training;

enum { CHECKPOINT_HEADER = 1024, CHECKPOINT_VERSION = 1 };
static const char CHECKPOINT_MAGIC[8] = {'m', 'a', 'm', 'b', 'a', '.', 't', '\n'};

// The 256 bytes before a model's tokenizer and tensors.
static void model_header(unsigned char *h, const Model *m, const unsigned char *tokenizer,
                         size_t tokenizer_bytes) {
    const Config *c = &m->config;
    const int sizes[] = {c->D, c->n_layer, c->V, c->E, c->N, c->K, c->R},
              ids[] = {c->bos, c->pad, c->eos[0], c->eos[1], c->eos[2], c->eos[3]};
    size_t offset = (HEADER_BYTES + tokenizer_bytes + ALIGN - 1) / ALIGN * ALIGN;
    uint32_t bits[2];
    memset(h, 0, HEADER_BYTES);
    memcpy(h, MODEL_MAGIC, sizeof MODEL_MAGIC);
    put_u32(h + 8, FILE_VERSION), put_u32(h + 12, HEADER_BYTES), put_u32(h + 16, (uint32_t)c->arch),
        put_u32(h + 20, (uint32_t)c->type);
    put_u32(h + 24, (uint32_t)c->flags);
    for (int i = 0; i < 7; i++) put_u32(h + 28 + 4 * i, (uint32_t)sizes[i]);
    memcpy(bits, &c->norm_eps, 4), memcpy(bits + 1, &c->mixer_eps, 4);
    put_u32(h + 56, bits[0]), put_u32(h + 60, bits[1]);
    for (int i = 0; i < 6; i++) put_u32(h + 64 + 4 * i, (uint32_t)ids[i]);
    put_u64(h + 88, HEADER_BYTES), put_u64(h + 96, tokenizer_bytes), put_u64(h + 104, offset),
        put_u64(h + 112, m->tensors_bytes);
    put_u32(h + 120, crc32_of(0, tokenizer, tokenizer_bytes)),
        put_u32(h + 124, crc32_of(0, m->weights, m->tensors_bytes));
    put_u32(h + HEADER_BYTES - 4, crc32_of(0, h, HEADER_BYTES - 4));
}

static const unsigned char ZEROS[ALIGN];

// A model.bin from weights in memory, which must be little-endian at the time.
static int save_model(const Model *m, const unsigned char *tokenizer, size_t tokenizer_bytes,
                      const char *path) {
    unsigned char header[HEADER_BYTES];
    model_header(header, m, tokenizer, tokenizer_bytes);
    const Piece piece[] = {{header, HEADER_BYTES},
                           {tokenizer, tokenizer_bytes},
                           {ZEROS, (ALIGN - tokenizer_bytes % ALIGN) % ALIGN},
                           {m->weights, m->tensors_bytes}};
    return write_pieces(path, piece, 4);
}

// A checkpoint is one file, so that it is of one moment: header, model.bin's header and tokenizer,
// weights, both moments.
static int save_checkpoint(const Training *t, const char *path, double spent) {
    unsigned char h[CHECKPOINT_HEADER] = {0}, model[HEADER_BYTES];
    const Trainer *x = t->trainer;
    size_t bytes = t->model->tensors_bytes;
    uint64_t held, time_bits;
    memcpy(&held, &t->held_loss, 8), memcpy(&time_bits, &spent, 8);
    memcpy(h, CHECKPOINT_MAGIC, sizeof CHECKPOINT_MAGIC);
    put_u32(h + 8, CHECKPOINT_VERSION), put_u32(h + 12, CHECKPOINT_HEADER);
    put_u64(h + 16, x->step), put_u64(h + 24, t->random), put_u64(h + 32, held),
        put_u64(h + 40, time_bits), put_u64(h + 48, t->tokenizer_bytes);
    put_u64(h + 56, bytes);
    memcpy(h + 128, t->settings, sizeof t->settings);
    model_header(model, t->model, t->tokenizer, t->tokenizer_bytes);
    put_u32(h + 64, crc32_of(0, model, HEADER_BYTES)),
        put_u32(h + 68, crc32_of(0, x->moment, bytes)),
        put_u32(h + 72, crc32_of(0, x->moment2, bytes));
    put_u32(h + CHECKPOINT_HEADER - 4, crc32_of(0, h, CHECKPOINT_HEADER - 4));
    const Piece piece[] = {{h, sizeof h},
                           {model, HEADER_BYTES},
                           {t->tokenizer, t->tokenizer_bytes},
                           {t->model->weights, bytes},
                           {x->moment, bytes},
                           {x->moment2, bytes}};
    return write_pieces(path, piece, 6);
}

// Numbers in memory to the order of bytes in files, or back: nothing happens on a little-endian
// machine.
static void swap_training(const Training *t) {
    size_t bytes = t->model->tensors_bytes;
    fix_endian(t->model->weights, bytes, 4), fix_endian(t->trainer->moment, bytes, 4),
        fix_endian(t->trainer->moment2, bytes, 4);
}

// Names the first setting in which a checkpoint differs from this run.
static int fail_other_run(const char *path, const unsigned char *stored, const char *here) {
    char there[SETTINGS + 1] = {0}; // a crafted file need not end its text
    size_t from = 0;
    memcpy(there, stored, SETTINGS);
    for (size_t i = 0; there[i] && there[i] == here[i]; i++)
        if (there[i] == ',') from = i + 1;
    return fail("%s: the checkpoint is of another run: it has%.*s, this one has%.*s", path,
                (int)strcspn(there + from, ","), there + from, (int)strcspn(here + from, ","),
                here + from);
}

// Takes up weights, moments, step and generator from a checkpoint of the same run. 0, or -1 after
// fail().
static int load_checkpoint(Training *t, const char *path) {
    size_t size = 0, bytes = t->model->tensors_bytes;
    bool mapped;
    unsigned char *h = file_map(path, &size, &mapped);
    Trainer *x = t->trainer;
    int result = h ? 0 : -1;
    if (result == 0 && (size < CHECKPOINT_HEADER || memcmp(h, CHECKPOINT_MAGIC, 8) ||
                        u32_at(h + 8) != CHECKPOINT_VERSION))
        result = fail("%s: not a training checkpoint of this version", path);
    else if (result == 0 &&
             crc32_of(0, h, CHECKPOINT_HEADER - 4) != u32_at(h + CHECKPOINT_HEADER - 4))
        result = fail("%s: the checkpoint is damaged", path);
    else if (result == 0 && memcmp(h + 128, t->settings, sizeof t->settings))
        result = fail_other_run(path, h + 128, t->settings);
    else if (result == 0 &&
             (u64_at(h + 48) != t->tokenizer_bytes || u64_at(h + 56) != bytes ||
              size != CHECKPOINT_HEADER + HEADER_BYTES + t->tokenizer_bytes + 3 * bytes))
        result = fail("%s: the checkpoint is truncated or of another model", path);
    if (result == 0) {
        const unsigned char *model = h + CHECKPOINT_HEADER,
                            *weights = model + HEADER_BYTES + t->tokenizer_bytes;
        if (crc32_of(0, model, HEADER_BYTES) != u32_at(h + 64) ||
            crc32_of(0, weights, bytes) != u32_at(model + 124) ||
            crc32_of(0, weights + bytes, bytes) != u32_at(h + 68) ||
            crc32_of(0, weights + 2 * bytes, bytes) != u32_at(h + 72))
            result = fail("%s: the checkpoint is damaged", path);
        else {
            uint64_t held = u64_at(h + 32), time_bits = u64_at(h + 40);
            memcpy(t->model->weights, weights, bytes), memcpy(x->moment, weights + bytes, bytes),
                memcpy(x->moment2, weights + 2 * bytes, bytes);
            memcpy(&t->held_loss, &held, 8), memcpy(&t->seconds, &time_bits, 8);
            x->step = u64_at(h + 16), t->random = u64_at(h + 24);
            swap_training(t);
            refresh_derived(t->model);
            result = mamba_trainer_fetch(x, true);
        }
    }
    if (h) file_unmap(h, size, mapped);
    return result;
}

// One pass' sequences: fresh ones of a task, or random windows of the training text.
static void draw_batch(Training *t, int32_t *ids, int32_t *targets, int B, int L) {
    for (int b = 0; b < B; b++, ids += L, targets += L) {
        if (t->task) {
            task_sequence(t->task, ids, targets, (size_t)L, &t->random);
            continue;
        }
        size_t start = random_u64(&t->random) % (t->n_data - t->n_held - (size_t)L);
        memcpy(ids, t->data + start, (size_t)L * sizeof *ids);
        memcpy(targets, t->data + start + 1, (size_t)L * sizeof *ids);
    }
}

// Tokens a sequence at the step after `step`: with --grow-from short ones first, twice as long in
// each of equal parts of the run.
static int stage_length(const TrainOptions *o, uint64_t step) {
    int stages = 1, stage;
    for (long L = o->grow_from; L && L < o->length; L *= 2) stages++;
    stage = (int)(step * (uint64_t)stages / (uint64_t)o->steps);
    return (int)(o->length >> (stage < stages ? stages - 1 - stage : 0));
}

// Mean loss over windows spread evenly over the held-out text; a task's: over sequences of a
// generator of their own.
static double held_out_loss(Training *t) {
    Trainer *x = t->trainer;
    int L = x->L, B = x->B, passes = (32 + B - 1) / B;
    size_t counted = 0;
    double sum = 0;
    Training other = *t;
    other.random = (uint64_t)t->o->seed ^ 0x68656C64206F7574u;
    if (!t->task && t->n_held < (size_t)L + 1) return NAN;
    for (int pass = 0; pass < passes; pass++) {
        if (t->task) draw_batch(&other, t->ids, t->targets, B, L);
        else
            for (int b = 0; b < B; b++) {
                size_t start =
                    t->n_data - t->n_held +
                    (t->n_held - (size_t)L - 1) * (size_t)(pass * B + b) / (size_t)(passes * B);
                memcpy(t->ids + (size_t)b * L, t->data + start, (size_t)L * sizeof *t->ids);
                memcpy(t->targets + (size_t)b * L, t->data + start + 1, (size_t)L * sizeof *t->ids);
            }
        for (int i = 0; i < B * L; i++) counted += t->targets[i] >= 0;
        sum += mamba_train_pass(x, t->ids, t->targets, 0, false);
    }
    return sum / (double)counted;
}

static double learning_rate(const TrainOptions *o, uint64_t step) { // of step 1, 2, ...
    if (step <= (uint64_t)o->warmup) return o->rate * (double)step / (double)o->warmup;
    if (!strcmp(o->schedule, "constant")) return o->rate;
    if (!strcmp(o->schedule,
                "wsd")) { // warm-up, stable, decay: a straight line down over the last fifth
        double left = 5 * (1 - (double)step / (double)o->steps);
        return o->min_rate + (o->rate - o->min_rate) * fmin(left, 1);
    }
    double along = (double)(step - (uint64_t)o->warmup) /
                   (double)(o->steps > o->warmup ? o->steps - o->warmup : 1);
    return o->min_rate +
           (o->rate - o->min_rate) * 0.5 * (1 + cos(3.141592653589793 * fmin(along, 1)));
}

// The CSV log of a run. When it cannot be written, training goes on and the run fails at its end.
typedef struct {
    const char *path;
    FILE *f;   // NULL: lost
    int error; // errno of what lost it
} TrainLog;

static void log_lost(TrainLog *log, int error) {
    log->error = error ? error : EIO;
    fprintf(stderr, "\nmamba: %s: %s: training goes on without the log\n", log->path,
            strerror(log->error));
}

// After each line: what is not in the file yet would be missing after a kill.
static void log_flush(TrainLog *log) {
    errno = 0;
    if (!log->f || (!fflush(log->f) && !ferror(log->f))) return;
    log_lost(log, errno);
    fclose(log->f);
    log->f = NULL;
}

static void log_close(TrainLog *log) {
    if (log->f && fclose(log->f)) log_lost(log, errno);
    log->f = NULL;
}

// The old log, or NULL if there is none to be read (*failed: after fail()).
static char *read_log(const char *path, bool *failed) {
    size_t bytes;
    *failed = false;
    if (!is_replaceable(path)) return NULL;
    FILE *f = fopen(path, "rb");
    if (!f && errno == ENOENT) return NULL;
    if (!f) fail("%s: %s", path, strerror(errno));
    char *text = f ? read_stream(f, path, &bytes) : NULL;
    *failed = !text;
    return text;
}

// Begins the log, or goes on with the old one after `step`: its later lines go, because the resumed
// run writes them again. The old log is whole until the new one is. 0, or -1 after fail().
static int log_open(TrainLog *log, const char *path, uint64_t step) {
    NewFile w;
    bool failed = false;
    char *old = step ? read_log(path, &failed) : NULL;
    *log = (TrainLog){.path = path};
    if (failed || new_file_open(&w, path, true)) return free(old), -1;
    if (!old || !strchr(old, '\n'))
        fprintf(w.f, "step,tokens,seconds,loss,held_out,learning_rate,gradient_norm,"
                     "tokens_per_second\n");
    for (char *line = old; line && *line;) {
        char *end = strchr(line, '\n');
        size_t n = end ? (size_t)(end + 1 - line) : 0; // an unfinished line is dropped
        if (n && (line == old || strtoull(line, NULL, 10) <= step)) fwrite(line, 1, n, w.f);
        line = n ? line + n : NULL;
    }
    free(old);
    if (!w.temporary) {
        log->f = w.f; // a device or a pipe stays open
        log_flush(log);
        return 0;
    }
    if (new_file_commit(&w)) return -1;
    log->f = fopen(path, "ab");
    return log->f ? 0 : fail("cannot write %s: %s", path, strerror(errno));
}

// The model is saved also when the checkpoint, three times as large, is not.
static int save_all(const Training *t, const char *checkpoint, double spent) {
    if (mamba_trainer_fetch(t->trainer, false)) return -1;
    swap_training(t);
    int bad = save_checkpoint(t, checkpoint, spent);
    bad |= save_model(t->model, t->tokenizer, t->tokenizer_bytes, t->o->out);
    swap_training(t);
    return bad ? -1 : 0;
}

static int train_loop(Training *t, const char *checkpoint) {
    const TrainOptions *o = t->o;
    Trainer *x = t->trainer;
    int rows = x->B * x->L, result = 0;
    double begun = seconds(), shown = 0, norm = 0, loss = 0;
    uint64_t first = x->step;
    TrainLog log;
    if (log_open(&log, o->log, x->step)) return -1;
    catch_interrupt();
    while (x->step < (uint64_t)o->steps && !interrupted && result == 0) {
        uint64_t before = t->random;
        size_t counted = 0;
        double sum = 0;
        int L = stage_length(o, x->step);
        if (L != x->L && (result = mamba_trainer_resize(x, rows / L, L))) break;
        for (int pass = 0; pass < o->accumulate;
             pass++) { // what counts is known once all are drawn: draw twice
            draw_batch(t, t->ids, t->targets, x->B, x->L);
            for (int i = 0; i < rows; i++) counted += t->targets[i] >= 0;
        }
        t->random = before;
        for (int pass = 0; pass < o->accumulate; pass++) {
            draw_batch(t, t->ids, t->targets, x->B, x->L);
            sum += mamba_train_pass(x, t->ids, t->targets, 1.0f / (float)counted, true);
        }
        loss = sum / (double)counted;
        AdamW how = {(float)learning_rate(o, x->step + 1),
                     0.9f,
                     (float)o->beta2,
                     1e-8f,
                     (float)o->decay,
                     (float)o->clip};
        if ((result = mamba_train_step(x, &how, &norm))) {
            t->random = before;
            break;
        }
        bool last = x->step == (uint64_t)o->steps,
             evaluate_now = last || x->step % (uint64_t)o->eval_every == 0;
        if (evaluate_now) t->held_loss = held_out_loss(t);
        double spent = seconds() - begun,
               speed = (double)(x->step - first) * rows * o->accumulate / spent;
        char held[32] = "";
        if (evaluate_now && t->held_loss == t->held_loss)
            snprintf(held, sizeof held, "%.6f", t->held_loss);
        if (log.f)
            fprintf(log.f, "%llu,%.0f,%.3f,%.6f,%s,%.6g,%.4f,%.1f\n", (unsigned long long)x->step,
                    (double)x->step * rows * o->accumulate, t->seconds + spent, loss, held,
                    (double)how.rate, norm, speed);
        log_flush(&log);
        if (spent - shown > 1 || evaluate_now) {
            shown = spent;
            fprintf(stderr, "step %llu/%ld  loss %.4f", (unsigned long long)x->step, o->steps,
                    loss);
            if (t->held_loss == t->held_loss) fprintf(stderr, "  held-out %.4f", t->held_loss);
            fprintf(stderr, "  %.0f tokens/s  %.0f s left%s", speed,
                    spent / (double)(x->step - first) * (double)((uint64_t)o->steps - x->step),
                    evaluate_now ? "\n" : "   \r");
        }
        if (!last && x->step % (uint64_t)o->save_every == 0)
            result = save_all(t, checkpoint, t->seconds + spent);
    }
    log_close(&log);
    if (result == 0) result = save_all(t, checkpoint, t->seconds + seconds() - begun);
    if (result == 0 && interrupted)
        fprintf(stderr,
                "\ninterrupted after step %llu and saved: the same command with --resume goes on\n",
                (unsigned long long)x->step);
    if (result == 0 && log.error)
        result = fail("%s: %s: the log is not complete; %s and %s are saved and whole", o->log,
                      strerror(log.error), o->out, checkpoint);
    return result;
}

// Adds the text of a file to the data, as tokens. 0, or -1 after fail().
static int append_tokens(Training *t, const Tokenizer *tokenizer, const char *path) {
    size_t bytes, n = 0;
    int32_t *ids = NULL, *all;
    char *text = read_text(path, &bytes);
    if (!text) return -1;
    int bad = tokenizer_encode(tokenizer, text, bytes, &ids, &n);
    free(text);
    if (bad) return fail_in(path);
    if (!(all = realloc(t->data, (t->n_data + n + 1) * sizeof *all)))
        return free(ids), fail("out of memory: %zu tokens", t->n_data + n);
    t->data = all;
    memcpy(all + t->n_data, ids, n * sizeof *all);
    t->n_data += n;
    free(ids);
    return 0;
}

// All --data files one after another, then what is held out: the end of that, or a file of its own.
static int read_data(Training *t, const Tokenizer *tokenizer) {
    const TrainOptions *o = t->o;
    for (int i = 0; i < o->data.n; i++)
        if (append_tokens(t, tokenizer, o->data.item[i])) return -1;
    t->n_held = (size_t)((double)t->n_data * o->held_out);
    if (o->held_out_data) {
        size_t before = t->n_data;
        if (append_tokens(t, tokenizer, o->held_out_data)) return -1;
        t->n_held = t->n_data - before;
        if (t->n_held < (size_t)o->length + 1)
            return fail("--held-out-data %s has %zu tokens, one window needs %ld: a longer file or "
                        "a smaller --length",
                        o->held_out_data, t->n_held, o->length + 1);
    }
    if (t->n_data - t->n_held < (size_t)o->length + 2)
        return fail("the data has %zu tokens to train on, one window needs %ld: more --data or a "
                    "smaller --length",
                    t->n_data - t->n_held, o->length + 2);
    return 0;
}

static void bytes_blob(unsigned char blob[32], uint32_t n_ids) {
    memset(blob, 0, 32);
    memcpy(blob, "mtok", 4);
    put_u32(blob + 4, 1), put_u32(blob + 20, n_ids);
}

// The tokenizer's bytes, from --from, or as --tokenizer says. 0, or -1 after fail().
static int train_tokenizer(Training *t, Tokenizer **tokenizer) {
    const TrainOptions *o = t->o;
    unsigned char small[32], *file = NULL;
    size_t bytes = sizeof small;
    bool mapped = false;
    bytes_blob(small, t->task ? TASK_VOCAB : 256);
    const unsigned char *blob = small;
    if (t->source) blob = t->source->file + HEADER_BYTES, bytes = t->source->tokenizer_bytes;
    else if (!t->task && strcmp(o->tokenizer, "bytes")) {
        if (!(file = file_map(o->tokenizer, &bytes, &mapped))) return -1;
        size_t size = bytes;
        blob = file;
        if (size >= 4 && memcmp(file, "mtok", 4)) { // a model.bin: its tokenizer
            file_unmap(file, size, mapped), file = NULL;
            if (!(t->source = mamba_load(o->tokenizer))) return -1;
            blob = t->source->file + HEADER_BYTES, bytes = t->source->tokenizer_bytes;
        }
    }
    t->tokenizer = malloc(bytes);
    t->tokenizer_bytes = bytes;
    if (t->tokenizer) memcpy(t->tokenizer, blob, bytes);
    if (file) file_unmap(file, bytes, mapped);
    if (!t->tokenizer) return fail("out of memory: tokenizer");
    *tokenizer = tokenizer_open(t->tokenizer, bytes);
    return *tokenizer ? 0 : fail_in(o->tokenizer);
}

static int train_model(Training *t, const Tokenizer *tokenizer) {
    const TrainOptions *o = t->o;
    if (o->from) {
        if (tokenizer_size(tokenizer) > t->source->config.V)
            return fail("%s: the tokenizer has more ids than the model", o->from);
        t->model = mamba_float_copy(t->source);
        return t->model ? 0 : -1;
    }
    Config c = {.type = F32,
                .flags = FLAG_TIED | FLAG_CONV_BIAS,
                .D = (int)o->d_model,
                .n_layer = (int)o->layers,
                .V = tokenizer_size(tokenizer),
                .E = (int)(o->d_model * o->expand),
                .N = (int)o->d_state,
                .K = (int)o->d_conv,
                .norm_eps = 1e-5f,
                .bos = -1,
                .pad = -1};
    c.R = (c.D + 15) / 16;
    for (int i = 0; i < 4; i++) c.eos[i] = -1;
    int32_t *eos = NULL;
    size_t n = 0;
    if (!tokenizer_is_bytes(tokenizer) &&
        tokenizer_encode(tokenizer, "<|endoftext|>", 13, &eos, &n) == 0 && n == 1)
        c.eos[0] = c.bos = eos[0];
    free(eos);
    t->model = mamba_random_model(&c, (uint64_t)o->seed);
    return t->model ? 0 : -1;
}

static int check_train_files(const TrainOptions *o, const char *checkpoint) {
    FileUse use[6 + LIST_MAX] = {
        {INPUT, "the text of --held-out-data", o->held_out_data, NULL},
        {INPUT, "the model of --from", o->from, NULL},
        {INPUT, "the file of --tokenizer", strcmp(o->tokenizer, "bytes") ? o->tokenizer : NULL,
         NULL},
        {OUTPUT, "-o", o->out, "the model of --from"},
        {OUTPUT, "the checkpoint", checkpoint, NULL},
        {OUTPUT_IN_PLACE, o->log_given ? "--log" : "the log", o->log, NULL},
    };
    for (int i = 0; i < o->data.n; i++)
        use[6 + i] = (FileUse){INPUT, "the text of --data", o->data.item[i], NULL};
    return check_files(use, 6 + o->data.n);
}

static int train_run(Training *t) {
    const TrainOptions *o = t->o;
    Tokenizer *tokenizer = NULL;
    char *checkpoint = malloc(strlen(o->out) + 8);
    if (!checkpoint) return fail("out of memory");
    sprintf(checkpoint, "%s.train", o->out);
    int result = parse_task(o->task_name, &t->task);
    if (result == 0) result = check_train_files(o, checkpoint);
    if (result == 0 && o->from && !(t->source = mamba_load(o->from))) result = -1;
    if (result == 0) result = train_tokenizer(t, &tokenizer);
    if (result == 0 && !t->task) result = read_data(t, tokenizer);
    if (result == 0) result = train_model(t, tokenizer);
    if (result == 0) {
        int L = stage_length(o, 0),
            B = (int)(o->batch / o->accumulate * o->length /
                      L); // the shortest need the most memory
        const Config *c = &t->model->config;
        snprintf(t->settings, sizeof t->settings,
                 " task %s, data %zu tokens (checksum %08x), held out %zu, d_model %d, layers %d, "
                 "d_state %d, d_conv "
                 "%d, d_inner %d, vocabulary %d, batch %ld, accumulate %ld, length %ld, seed %ld, "
                 "lr %.9g, schedule "
                 "%s over %ld steps, warm-up %ld, min lr %.9g, decay %.9g, clip %.9g, beta2 %.9g, "
                 "grow from %ld",
                 o->task_name ? o->task_name : "none", t->n_data,
                 crc32_of(0, t->data, t->n_data * sizeof *t->data), t->n_held, c->D, c->n_layer,
                 c->N, c->K, c->E, c->V, o->batch, o->accumulate, o->length, o->seed, o->rate,
                 o->schedule, strcmp(o->schedule, "constant") || o->grow_from ? o->steps : 0L,
                 o->warmup, o->min_rate, o->decay, o->clip, o->beta2, o->grow_from);
        Trainer measure = {.model = t->model, .B = B, .L = L};
        Arena arena = {NULL, 0};
        trainer_layout(&measure, &arena);
        double activations = (double)arena.used, weights = (double)t->model->tensors_bytes;
        bool gpu = GPU && !backend.cpu;
        if (!gpu)
            fprintf(stderr,
                    "%zu parameters; memory: weights %.1f MB, gradients %.1f MB, optimizer %.1f "
                    "MB, activations of %d x %d "
                    "tokens %.1f MB\n",
                    t->model->n_params, weights / 1e6, weights / 1e6, 2 * weights / 1e6, B, L,
                    activations / 1e6);
        t->trainer = gpu ? mamba_trainer_new_gpu(t->model, B, L, backend.float32)
                         : mamba_trainer_new(t->model, B, L, (int)o->threads);
        double used;
        char name[256];
        if (gpu && t->trainer && GPU->measure(NULL, NULL, &used, name) == 0)
            fprintf(stderr, "%zu parameters; %s, %.2f GB in use, %s products\n", t->model->n_params,
                    name, used / 1e9, backend.float32 ? "float32" : "bf16");
        t->ids = malloc((size_t)B * L * sizeof *t->ids),
        t->targets = malloc((size_t)B * L * sizeof *t->ids);
        if (!t->trainer) result = -1;
        else if (!t->ids || !t->targets) result = fail("out of memory: a batch");
    }
    uint64_t seed =
        (uint64_t)o->seed; // hashed: multiples of the generator's increment are one stream, shifted
    t->random = random_u64(&seed);
    t->held_loss = NAN;
    if (result == 0 && !t->task && t->n_held < (size_t)o->length + 1)
        fprintf(stderr,
                "no held-out losses: the held-out part has %zu tokens, one window needs %ld\n",
                t->n_held, o->length + 1);
    if (result == 0 && o->resume) result = load_checkpoint(t, checkpoint);
    if (result == 0) result = train_loop(t, checkpoint);
    if (result == 0) fprintf(stderr, "wrote %s and %s\n", o->out, checkpoint);
    if (tokenizer) tokenizer_close(tokenizer);
    mamba_trainer_free(t->trainer);
    mamba_free(t->model), mamba_free(t->source);
    free(t->tokenizer), free(t->data), free(t->ids), free(t->targets), free(checkpoint);
    return result;
}

static const char TRAIN_USAGE[] =
    "mamba train -o out.bin --data FILE [--data FILE ...] [options]\n"
    "mamba train -o out.bin --task induction|copying [options]\n"
    "mamba train -o out.bin --from model.bin --data FILE [options]\n\n"
    "Trains a model on text of your own, on one of the paper's synthetic tasks, or fine-tunes one. "
    "Writes out.bin, a "
    "model like any\n"
    "other (float32), out.bin.train, from which --resume goes on bit for bit, and a CSV log. "
    "Ctrl-C saves and "
    "leaves.\n";

static int command_train(int argc, char **argv) {
    TrainOptions o = {.tokenizer = "bytes",
                      .schedule = "cosine",
                      .d_model = 128,
                      .layers = 4,
                      .d_state = 16,
                      .d_conv = 4,
                      .expand = 2,
                      .steps = 1000,
                      .batch = 16,
                      .accumulate = 1,
                      .length = 256,
                      .warmup = 100,
                      .seed = 1,
                      .save_every = 500,
                      .eval_every = 100,
                      .rate = 3e-3,
                      .min_rate = 1e-5,
                      .decay = 0.1,
                      .clip = 1,
                      .beta2 = 0.95,
                      .held_out = 0.1};
    o.threads = default_threads();
    const Option options[] = {
        {"-o", "FILE", "the model to write", OPT_TEXT, &o.out, 0, 0},
        {"--data", "FILE", "text to learn; up to 16 files", OPT_LIST, &o.data, 0, 0},
        {"--tokenizer", "T", "bytes, a model.bin whose vocabulary to use, or a tokenizer file",
         OPT_TEXT, &o.tokenizer, 0, 0},
        {"--task", "T", "induction or copying instead of data", OPT_TEXT, &o.task_name, 0, 0},
        {"--from", "FILE", "start from this model (sizes and tokenizer are its own)", OPT_TEXT,
         &o.from, 0, 0},
        {"--resume", "", "go on from out.bin.train", OPT_SWITCH, &o.resume, 0, 0},
        {"--d-model", "N", "width", OPT_INT, &o.d_model, 1, 16384},
        {"--layers", "N", "blocks", OPT_INT, &o.layers, 1, 1024},
        {"--d-state", "N", "states a channel", OPT_INT, &o.d_state, 1, N_MAX},
        {"--d-conv", "N", "taps of the convolution", OPT_INT, &o.d_conv, 1, 64},
        {"--expand", "N", "channels of the SSM, in multiples of the width", OPT_INT, &o.expand, 1,
         16},
        {"--steps", "N", "optimizer steps", OPT_INT, &o.steps, 1, 1e9},
        {"--batch", "N", "sequences a step", OPT_INT, &o.batch, 1, 65536},
        {"--accumulate", "N", "passes that a step is divided into, for less memory", OPT_INT,
         &o.accumulate, 1, 65536},
        {"--length", "N", "tokens a sequence", OPT_INT, &o.length, 1, 1 << 24},
        {"--grow-from", "N",
         "start with sequences of N tokens, --length / N times as many, and double them on the "
         "way; 0: off",
         OPT_INT, &o.grow_from, 0, 1 << 24},
        {"--lr", "X", "peak learning rate", OPT_REAL, &o.rate, 0, 10},
        {"--min-lr", "X", "learning rate at the end", OPT_REAL, &o.min_rate, 0, 10},
        {"--schedule", "S",
         "after the warm-up: cosine, constant, or wsd, constant and in the last fifth a line down",
         OPT_TEXT, &o.schedule, 0, 0},
        {"--warmup", "N", "steps of linear warm-up", OPT_INT, &o.warmup, 0, 1e9},
        {"--decay", "X", "weight decay of matrices", OPT_REAL, &o.decay, 0, 10},
        {"--clip", "X", "largest norm of the gradient; 0: off", OPT_REAL, &o.clip, 0, 1e9},
        {"--beta2", "X", "of AdamW", OPT_REAL, &o.beta2, 0, 0.999999},
        {"--held-out", "X", "share of the data, at its end, that is never trained on", OPT_REAL,
         &o.held_out, 0, 0.9},
        {"--held-out-data", "FILE", "text to hold out instead: all of --data is trained on",
         OPT_TEXT, &o.held_out_data, 0, 0},
        {"--eval-every", "N", "steps between held-out losses", OPT_INT, &o.eval_every, 1, 1e9},
        {"--save-every", "N", "steps between checkpoints", OPT_INT, &o.save_every, 1, 1e9},
        {"--log", "FILE", "CSV log; by default out.bin.csv", OPT_TEXT, &o.log, 0, 0},
        {"-s", "SEED", "fixes everything", OPT_INT, &o.seed, 0, 9e15},
        BACKEND_OPTIONS,
        {"-T", "N", "threads; the result does not depend on it", OPT_INT, &o.threads, 1, 1024},
    };
    const char *rest[1];
    if (wants_help(argc, argv)) return print_help(TRAIN_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), rest, 0);
    if (n < 0) return -1;
    if (!o.out) return fail("train needs -o FILE, the model to write");
    if ((o.data.n > 0) == (o.task_name != NULL)) return fail("train needs either --data or --task");
    if (o.held_out_data && (o.task_name || o.held_out != 0.1))
        return fail("--held-out-data does not go with %s", o.task_name ? "--task" : "--held-out");
    for (int i = 0; o.held_out_data && i < o.data.n; i++)
        if (!strcmp(o.held_out_data, o.data.item[i]) || same_file(o.held_out_data, o.data.item[i]))
            return fail("--held-out-data %s is trained on: it is --data too", o.held_out_data);
    if (o.batch % o.accumulate)
        return fail("--batch %ld is not a multiple of --accumulate %ld", o.batch, o.accumulate);
    if ((double)(o.batch / o.accumulate) * (double)o.length > 1 << 28)
        return fail("--batch and --length make a pass of more than %d tokens: raise --accumulate",
                    1 << 28);
    long grown = o.grow_from;
    while (grown && grown < o.length) grown *= 2;
    if (grown && grown != o.length)
        return fail("--length %ld is not --grow-from %ld doubled some times", o.length,
                    o.grow_from);
    if (strcmp(o.schedule, "cosine") && strcmp(o.schedule, "constant") && strcmp(o.schedule, "wsd"))
        return fail("--schedule needs cosine, constant or wsd, not '%s'", o.schedule);
    Task task;
    if (parse_task(o.task_name, &task)) return -1;
    long shortest = o.grow_from ? o.grow_from : o.length;
    if (task && shortest < task_shortest(task))
        return fail("%s %ld is too short for --task %s: at least %d",
                    o.grow_from ? "--grow-from" : "--length", shortest, o.task_name,
                    task_shortest(task));
    if (task && o.from) return fail("--from does not go with --task");
    o.log_given = o.log != NULL;
    char *log = o.log ? NULL : malloc(strlen(o.out) + 5);
    if (log) sprintf(log, "%s.csv", o.out), o.log = log;
    Training t = {.o = &o};
    int result = o.log ? train_run(&t) : fail("out of memory");
    free(log);
    return result;
}

// --- quantize

static const char QUANTIZE_USAGE[] =
    "mamba quantize in.bin out.bin q8|q4\n\n"
    "Writes a model with its matrices in 8.5 or 4.5 bits a weight (32 weights of a "
    "row share a scale); what the recurrence\n"
    "touches stays float32. in.bin holds f32, f16 or bf16 and is not changed.\n";

static int command_quantize(int argc, char **argv) {
    const char *rest[3];
    if (wants_help(argc, argv)) return print_help(QUANTIZE_USAGE, NULL, 0), 0;
    int n = parse_options(argc, argv, NULL, 0, rest, 3);
    if (n != 3) return n < 0 ? -1 : fail("quantize needs in.bin, out.bin and q8 or q4");
    bool four_bits = !strcmp(rest[2], "q4");
    if (!four_bits && strcmp(rest[2], "q8"))
        return fail("quantize needs q8 or q4 at the end, not '%s'", rest[2]);
    const FileUse use[] = {{INPUT, "the model", rest[0], NULL}, {OUTPUT, "out.bin", rest[1], NULL}};
    if (check_files(use, COUNT(use))) return -1;
    Model *m = mamba_load(rest[0]), *quantized = NULL;
    int result = m ? 0 : -1;
    if (result == 0 && is_quantized(m->config.type))
        result = fail("%s is in %s already: quantize the model that it was made from", rest[0],
                      type_name(m->config.type));
    if (result == 0) result = verify(m, rest[0]); // or damage would be given a valid checksum
    if (result == 0) result = (quantized = mamba_quantize(m, four_bits)) ? 0 : fail_in(rest[0]);
    if (result == 0) {
        each_tensor(quantized, swap_tensor, NULL);
        result = save_model(quantized, m->file + HEADER_BYTES, m->tokenizer_bytes, rest[1]);
    }
    if (result == 0)
        fprintf(stderr, "wrote %s: %.1f MB of weights in %s, from %.1f in %s\n", rest[1],
                (double)quantized->tensors_bytes / 1e6, rest[2], (double)m->tensors_bytes / 1e6,
                type_name(m->config.type));
    mamba_free(quantized);
    mamba_free(m);
    return result;
}

COLD_END
// --- bench: every figure beside the machine's own ceilings, measured in the same minutes

static const char BENCH_USAGE[] =
    "mamba bench model.bin | --shape 130m|370m|790m|1.4b|2.8b|D,layers,V [--dtype "
    "f32|f16|bf16|q8|q4]\n"
    "mamba bench --scan B,E,L\n\n"
    "Tokens per second of prefill and decode, and the share of what the machine could do: of its "
    "read bandwidth for\n"
    "decode (every weight is read once a token), of its float32 multiply-add rate for prefill; x8: "
    "eight sequences "
    "that\n"
    "share every read, beside the longer of those two times. --shape makes seeded "
    "random\n"
    "weights in memory; --scan times the scan alone, cut over channels only and over channels and "
    "time.\n";

static int parse_shape(const char *text, const char *dtype, Config *c) {
    static const struct {
        const char *name;
        int D, n_layer;
    } known[] = {{"130m", 768, 24},
                 {"370m", 1024, 48},
                 {"790m", 1536, 48},
                 {"1.4b", 2048, 48},
                 {"2.8b", 2560, 64}};
    *c = (Config){.flags = FLAG_TIED | FLAG_CONV_BIAS,
                  .V = 50280,
                  .N = 16,
                  .K = 4,
                  .norm_eps = 1e-5f,
                  .bos = -1,
                  .pad = -1,
                  .eos = {-1, -1, -1, -1}};
    for (int i = 0; i < COUNT(known); i++)
        if (!strcmp(text, known[i].name)) c->D = known[i].D, c->n_layer = known[i].n_layer;
    char extra;
    if (!c->D && sscanf(text, "%d,%d,%d%c", &c->D, &c->n_layer, &c->V, &extra) != 3)
        return fail("--shape needs 130m, 370m, 790m, 1.4b, 2.8b or D,layers,V, not '%s'", text);
    if (c->D < 1 || c->D > 1 << 19 || c->n_layer < 1 || c->n_layer > 1 << 16 || c->V < 1 ||
        c->V > 1 << 26)
        return fail("--shape %s is out of range", text);
    c->E = 2 * c->D, c->R = (c->D + 15) / 16;
    for (int type = 0; type < N_TYPES; type++)
        if (!strcmp(dtype, type_name((Type)type))) return c->type = (Type)type, 0;
    return fail("--dtype needs f32, f16, bf16, q8 or q4, not '%s'", dtype);
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare_doubles);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

static volatile float bench_sink; // keeps the compiler from dropping what is only timed

#ifndef PLAIN
#include "cpu/ceilings.h"
#else
static double read_bandwidth(const float *buffer, size_t floats, int threads) {
    double start = seconds();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < 256; part++) {
        const float *p = buffer + floats / 256 * (size_t)part;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < floats / 256; i++) sum += p[i];
        bench_sink = sum;
    }
    return (double)floats * sizeof(float) / (seconds() - start);
}

static double multiply_rate(int threads) {
    enum { ROUNDS = 100000, LENGTH = 1024 };
    double start = seconds();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        float a[LENGTH], b[LENGTH];
        for (int i = 0; i < LENGTH; i++) a[i] = b[i] = (float)(i % 7);
        for (int round = 0; round < ROUNDS; round++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < LENGTH; i++) sum += a[i] * b[i];
            bench_sink = sum;
            a[round % LENGTH] += 1; // no two rounds are the same
        }
    }
    return 2.0 * ROUNDS * LENGTH * threads / (seconds() - start);
}
#define recurrence_plain recurrence
#endif

COLD
enum { BENCH_PROMPT = 512, BENCH_DECODE = 16, BENCH_BATCH = 8, BENCH_MAX = 101 };

static int bench_model(const Model *m, int threads, int repeats) {
    const Config *c = &m->config;
    double prefill[BENCH_MAX], decode[BENCH_MAX], batch[BENCH_MAX], bandwidth[2 * BENCH_MAX],
        rate[2 * BENCH_MAX];
    int32_t ids[BENCH_PROMPT];
    uint64_t seed = 1;
    size_t probe_floats = (size_t)1 << 26, embedding = tensor_bytes(&m->embedding);
    size_t decode_bytes = m->tensors_bytes - (c->flags & FLAG_TIED ? 0 : embedding);
    double D = c->D, E = c->E,
           prefill_flops =
               2 * c->n_layer * (2 * E * D + E * (c->R + 2.0 * c->N) + E * c->R + E * D);
    float *probe = alloc_aligned(probe_floats * sizeof(float));
    Acts *acts = mamba_acts_new(m, threads);
    State *states[BENCH_BATCH] = {NULL}, *s = states[0] = mamba_state_new(m);
    int result = probe && acts && s ? 0 : -1;
    for (int i = 1; i < BENCH_BATCH && result == 0; i++)
        result = (states[i] = mamba_state_new(m)) ? 0 : -1;
    for (int i = 0; i < BENCH_PROMPT; i++) ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)c->V);
    for (size_t i = 0; i < probe_floats && probe; i++) probe[i] = 1;
    for (int round = -1; round < repeats && result == 0;
         round++) { // round -1 warms caches up and is not counted
        int k = round < 0 ? 0 : round;
        bandwidth[2 * k] = read_bandwidth(probe, probe_floats, threads);
        double start = seconds();
        result = mamba_prefill(m, acts, s, ids, BENCH_PROMPT, NULL, NULL);
        prefill[k] = seconds() - start;
        rate[2 * k] = multiply_rate(threads);
        start = seconds();
        for (int i = 0; i < BENCH_DECODE && result == 0; i++)
            result = mamba_step(m, acts, s, ids[i]);
        decode[k] = seconds() - start;
        start = seconds();
        for (int i = 0; i < BENCH_DECODE && result == 0; i++)
            result = mamba_step_batch(m, acts, states, ids + i, BENCH_BATCH);
        batch[k] = seconds() - start;
        bandwidth[2 * k + 1] = read_bandwidth(probe, probe_floats, threads);
        rate[2 * k + 1] = multiply_rate(threads);
        if (s->logits[0] - s->logits[0] != 0)
            result = fail("the logits are not finite: these weights cannot be timed honestly");
    }
    if (result == 0) {
        double read_time = median(prefill, repeats),
               write_time = median(decode, repeats) / BENCH_DECODE;
        double gb = median(bandwidth, 2 * repeats) / 1e9, gflops = median(rate, 2 * repeats) / 1e9;
        printf("%zu parameters in %s, %.1f MB of weights, %d thread%s, medians of %d\n",
               m->n_params, type_name(c->type), (double)m->tensors_bytes / 1e6, threads,
               threads > 1 ? "s" : "", repeats);
        printf("machine      %.1f GB/s read, %.1f GFLOP/s float32\n", gb, gflops);
        printf("prefill %d  %10.1f tokens/s  %5.1f%% of the float32 rate\n", BENCH_PROMPT,
               BENCH_PROMPT / read_time,
               100 * prefill_flops * BENCH_PROMPT / read_time / gflops / 1e9);
        printf("decode       %10.1f tokens/s  %5.1f%% of the read bandwidth\n", 1 / write_time,
               100 * (double)decode_bytes / write_time / gb / 1e9);
        double batch_time = median(batch, repeats) / BENCH_DECODE,
               batch_flops = BENCH_BATCH * (prefill_flops + 2 * D * c->V);
        double floor = fmax((double)decode_bytes / gb, batch_flops / gflops) / 1e9;
        printf("decode x%-4d %10.1f tokens/s  %5.1f%% of the floor (%s), %.2f times decode\n",
               BENCH_BATCH, BENCH_BATCH / batch_time, 100 * floor / batch_time,
               (double)decode_bytes / gb > batch_flops / gflops ? "bandwidth" : "float32 rate",
               BENCH_BATCH * write_time / batch_time);
    }
    for (int i = 0; i < BENCH_BATCH; i++) mamba_state_free(states[i]);
    mamba_acts_free(acts);
    free_aligned(probe);
    return result;
}

// The scan alone, N = 16: by the definition, over channels, and over channels and time.
static int bench_scan(const char *text, int threads, int repeats) {
    int B, E, L, N = 16;
    char extra;
    if (sscanf(text, "%d,%d,%d%c", &B, &E, &L, &extra) != 3 || B < 1 || E < 1 || L < 1 ||
        (double)B * L * ((double)E + 2 * N) > 1e9 || E > 1 << 20)
        return fail(
            "--scan needs B,E,L with B * L * (E + 32) at most 1e9 and E at most 1048576, not '%s'",
            text);
    size_t BLE = (size_t)B * E * L, NE = (size_t)N * E;
    float *u = alloc_aligned(BLE * 4), *delta = alloc_aligned(BLE * 4), *y = alloc_aligned(BLE * 4),
          *A_neg = alloc_aligned(NE * 4);
    float *BC = alloc_aligned((size_t)B * L * 2 * N * 4), *h = alloc_aligned(NE * 4),
          *skip = alloc_aligned((size_t)E * 4);
    float *carry = alloc_aligned(scan_carry_floats(E, N) * 4);
    int result = u && delta && y && A_neg && BC && h && skip && carry ? 0 : -1;
    uint64_t seed = 7;
    if (result == 0) {
        for (size_t i = 0; i < BLE; i++)
            u[i] = (float)random_unit(&seed) - 0.5f, delta[i] = 0.1f * (float)random_unit(&seed);
        for (size_t i = 0; i < NE; i++) A_neg[i] = -(float)(i / (size_t)E + 1);
        for (size_t i = 0; i < (size_t)B * L * 2 * N; i++) BC[i] = (float)random_unit(&seed) - 0.5f;
        int shapes_say = scan_pieces(L, E),
            time_pieces = shapes_say > 1 ? shapes_say : SCAN_TASKS / 2;
        const struct {
            const char *name;
            int pieces;
        } way[] = {{"definition, 1 thread", 0},
                   {"over channels", 1},
                   {"over channels and time", time_pieces}};
        for (int k = 0; k < 3; k++) {
            double time[BENCH_MAX];
            for (int round = 0; round < repeats; round++) {
                double start = seconds();
#pragma omp parallel num_threads(way[k].pieces ? threads : 1)
                for (int b = 0; b < B; b++) {
                    size_t at = (size_t)b * L * E;
                    const float *B_ssm = BC + (size_t)b * L * 2 * N;
                    Scan one = {u + at,        delta + at, A_neg, B_ssm, B_ssm + N, skip,
                                2 * (size_t)N, 1,          L,     E,     N};
                    LayerState seq = {NULL, h};
                    if (way[k].pieces == 0) recurrence_plain(y + at, h, NULL, &one, 0, E, 0, L);
                    else if (way[k].pieces == 1) scan(y + at, &seq, &one, NULL);
                    else scan_in_pieces(y + at, h, &one, way[k].pieces, carry);
                }
                time[round] = seconds() - start;
            }
            double t = median(time, repeats);
            printf("%-24s %9.3f ms  %8.1f million exponentials/s  %6.2f GB/s\n", way[k].name,
                   t * 1e3, (double)BLE * N / t / 1e6, (double)BLE * 12 / t / 1e9);
        }
        printf("%d threads; for this shape the model cuts time into %d piece%s\n", threads,
               shapes_say, shapes_say > 1 ? "s" : "");
    }
    free_aligned(u), free_aligned(delta), free_aligned(y), free_aligned(A_neg), free_aligned(BC),
        free_aligned(h);
    free_aligned(skip), free_aligned(carry);
    return result;
}

// --- bench on a GPU: prefill by length, generation by batch, a training step, each beside its
// floor

static int bench_gpu_prefill(const Model *m, Acts *a, State *s, int L, int repeats,
                             double flops_token, double peak) {
    double time[BENCH_MAX];
    int32_t *ids = malloc((size_t)L * sizeof *ids);
    uint64_t seed = 1;
    if (!ids) return fail("out of memory");
    for (int i = 0; i < L; i++) ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)m->config.V);
    int result = 0;
    for (int round = -1; round < repeats && result == 0; round++) {
        double start = seconds();
        result = mamba_prefill(m, a, s, ids, (size_t)L, NULL, NULL);
        time[round < 0 ? 0 : round] = seconds() - start;
    }
    free(ids);
    if (result == 0 && s->logits[0] - s->logits[0] != 0) result = fail("the logits are not finite");
    if (result) return -1;
    double t = median(time, repeats), used = 0;
    char name[256];
    if (GPU->measure(NULL, NULL, &used, name)) return gpu_failed();
    printf("prefill %-8d %10.2f ms  %12.0f tokens/s  %5.1f%% of the products' floor, %.2f GB\n", L,
           t * 1e3, L / t, 100 * flops_token * L / peak / t, used / 1e9);
    return 0;
}

static int bench_gpu_generate(const Model *m, Acts *a, int S, int repeats, double bytes,
                              double state_bytes, double copy) {
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int steps = GPU->generate_max, result = -1;
    double time[BENCH_MAX];
    uint64_t *random = calloc((size_t)S, sizeof *random);
    int32_t recent[RECENT] = {0}, *ids = malloc((size_t)S * steps * sizeof *ids);
    unsigned char *allowed = malloc((size_t)m->config.V);
    if (random && ids && allowed) {
        memset(allowed, 1, (size_t)m->config.V);
        result = GPU->generate_start(a->gpu, S, &greedy, random, 1, recent, 1, allowed)
                     ? gpu_failed()
                     : 0;
        for (int round = -1; round < repeats && result == 0; round++) {
            double start = seconds();
            if (GPU->generate(a->gpu, ids, steps)) result = gpu_failed();
            time[round < 0 ? 0 : round] = (seconds() - start) / steps;
        }
        if (result == 0 && ids[0] < 0) result = fail("the logits are not finite");
    }
    free(random), free(ids), free(allowed);
    if (result) return -1;
    double t = median(time, repeats);
    printf("generate x%-6d %10.3f ms  %12.0f tokens/s  %5.1f%% of the bytes' floor\n", S, t * 1e3,
           S / t, 100 * (bytes + 2 * S * state_bytes) / copy / t);
    return 0;
}

// End to end: S prompts of L random tokens, each its own, read one after the other from zero
// states, then `steps` tokens for all together. Everything that this takes is in the time.
static int bench_gpu_dialogues(const Model *m, Acts *a, int S, int L, int steps, int repeats) {
    const Sampling greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    int V = m->config.V, most = GPU->generate_max, result = -1;
    double time[BENCH_MAX], reading[BENCH_MAX];
    State *zero = mamba_state_new(m);
    uint64_t *random = calloc((size_t)S, sizeof *random), seed = 5;
    int32_t *prompts = malloc((size_t)S * L * sizeof *prompts),
            *ids = malloc((size_t)S * most * sizeof *ids);
    unsigned char *allowed = malloc((size_t)V);
    if (zero && random && prompts && ids && allowed) {
        memset(allowed, 1, (size_t)V);
        for (size_t i = 0; i < (size_t)S * L; i++)
            prompts[i] = (int32_t)(random_u64(&seed) % (uint64_t)V);
        result = GPU->set_state(a->gpu, zero->conv, zero->h, zero->logits);
        for (int round = -1; round < repeats && result == 0; round++) {
            double start = seconds(), read = 0;
            for (int s = 0; s < S && result == 0; s++)
                if (GPU->prefill(a->gpu, prompts + (size_t)s * L, (size_t)L, NULL, NULL) ||
                    GPU->gather(a->gpu, s, S))
                    result = -1;
            read = seconds() - start;
            if (result == 0)
                result = GPU->generate_start(a->gpu, S, &greedy, random, (uint64_t)L, zero->recent,
                                             1, allowed);
            for (int done = 0; done < steps && result == 0; done += most)
                result = GPU->generate(a->gpu, ids, steps - done < most ? steps - done : most);
            time[round < 0 ? 0 : round] = seconds() - start, reading[round < 0 ? 0 : round] = read;
            if (result == 0) result = GPU->set_state(a->gpu, zero->conv, zero->h, zero->logits);
        }
        if (result) result = gpu_failed();
        for (int s = 0; s < S && result == 0; s++)
            if (ids[s] < 0) result = fail("the logits are not finite");
    }
    mamba_state_free(zero);
    free(random), free(prompts), free(ids), free(allowed);
    if (result) return -1;
    double t = median(time, repeats), r = median(reading, repeats);
    printf("prompt %d + %d, x%-3d %9.1f ms  %12.0f tokens/s generated, all counted (%.1f ms of it "
           "reads the prompts)\n",
           L, steps, S, t * 1e3, S * steps / t, r * 1e3);
    return 0;
}

static int bench_gpu_train(const Config *shape, int B, int L, int repeats, double peak) {
    Config c = *shape;
    c.type = F32;
    Model *m = mamba_random_model(&c, 42);
    Trainer *x = m ? mamba_trainer_new_gpu(m, B, L, backend.float32) : NULL;
    int32_t *ids = malloc((size_t)B * L * sizeof *ids),
            *targets = malloc((size_t)B * L * sizeof *ids);
    const AdamW how = {1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};
    double time[BENCH_MAX], norm = 0, sum = 0, used = 0;
    char name[256];
    uint64_t seed = 3;
    int result = x && ids && targets ? 0 : -1;
    for (int i = 0; i < B * L && result == 0; i++)
        ids[i] = (int32_t)(random_u64(&seed) % (uint64_t)c.V),
        targets[i] = (int32_t)(random_u64(&seed) % (uint64_t)c.V);
    for (int round = -2; round < repeats && result == 0; round++) {
        double start = seconds();
        sum = mamba_train_pass(x, ids, targets, 1.0f / (float)(B * L), true);
        result = mamba_train_step(x, &how, &norm);
        time[round < 0 ? 0 : round] = seconds() - start;
    }
    if (result == 0) {
        double t = median(time, repeats), tokens = (double)B * L;
        GPU->measure(NULL, NULL, &used, name);
        printf("train %dx%-7d %10.2f ms  %12.0f tokens/s  %5.1f%% of 6 operations a weight, %.2f "
               "GB, loss %.3f\n",
               B, L, t * 1e3, tokens / t, 100 * 6 * (double)m->n_params * tokens / peak / t,
               used / 1e9, sum / tokens);
    }
    mamba_trainer_free(x);
    mamba_free(m);
    free(ids), free(targets);
    return result;
}

static int bench_gpu(const Model *m, int repeats, const char *only) {
    const Config *c = &m->config;
    const int lengths[] = {512, 2048, 16384, 1 << 20}, batches[] = {1, 8, 64, 256},
              dialogues[] = {1, 8, 64}, train[][2] = {{8, 2048}, {1, 16384}};
    double copy = 0, flops = 0, used = 0, D = c->D, E = c->E;
    double flops_token = 2 * c->n_layer * (2 * E * D + E * (c->R + 2.0 * c->N) + E * c->R + E * D);
    double state_bytes = 4.0 * (c->N + c->K - 1) * c->n_layer * E,
           bytes = (double)m->tensors_bytes -
                   (c->flags & FLAG_TIED ? 0 : (double)tensor_bytes(&m->embedding));
    if (is_quantized(c->type))
        bytes = (double)m->n_params * (backend.float32 ? 4 : 2); // there they are unpacked
    char name[256];
    Acts *a = mamba_acts_new(m, 1);
    State *s = mamba_state_new(m);
    int result = a && s ? mamba_acts_gpu(a, m, backend.float32) : -1;
    if (result == 0 && GPU->measure(&copy, &flops, &used, name)) result = gpu_failed();
    if (result == 0) {
        double peak = (c->type == BF16 || is_quantized(c->type)) && !backend.float32
                          ? flops
                          : flops / 15; // float32 units of the same chip, roughly
        printf("%zu parameters in %s on %s: copies %.2f TB/s, bf16 products %.0f TFLOP/s; medians "
               "of %d\n",
               m->n_params, type_name(c->type), name, copy / 1e12, flops / 1e12, repeats);
        for (int i = 0; i < COUNT(lengths) && result == 0 && strchr(only, 'p'); i++) {
            bool very_long = lengths[i] > 1 << 16; // small models only, and not too often
            if (very_long && m->n_params > 500 * 1000 * 1000) continue;
            result = bench_gpu_prefill(m, a, s, lengths[i], very_long && repeats > 3 ? 3 : repeats,
                                       flops_token, peak);
        }
        for (int i = 0; i < COUNT(batches) && result == 0 && strchr(only, 'g'); i++)
            result = bench_gpu_generate(m, a, batches[i], repeats, bytes, state_bytes, copy);
        for (int i = 0; i < COUNT(dialogues) && result == 0 && strchr(only, 'd'); i++)
            result = bench_gpu_dialogues(m, a, dialogues[i], 2048, 128, repeats < 3 ? repeats : 3);
    }
    mamba_state_free(s);
    mamba_acts_free(a);
    for (int i = 0; i < COUNT(train) && result == 0 && strchr(only, 't'); i++)
        if (bench_gpu_train(c, train[i][0], train[i][1], repeats < 5 ? repeats : 5, flops))
            printf("train %dx%-7d %s\n", train[i][0], train[i][1], error_text);
    return result;
}

static int bench_gpu_scan(const char *text, int repeats) {
    int B, E, L;
    char dtype[8] = "bf16", extra;
    double t[4];
    int n = sscanf(text, "%d,%d,%d,%7[a-z0-9]%c", &B, &E, &L, dtype, &extra);
    if ((n != 3 && n != 4) || B < 1 || E < 1 || L < 1 ||
        (strcmp(dtype, "bf16") && strcmp(dtype, "f32")))
        return fail("--scan needs B,E,L or B,E,L,f32, not '%s'", text);
    if (GPU->time_scan(B, E, L, 16, !strcmp(dtype, "f32"), repeats, t)) return gpu_failed();
    double cells = (double)B * E * L, width = !strcmp(dtype, "f32") ? 4 : 2,
           bytes = cells * 4 * width;
    printf("copy of the same bytes %9.4f ms  %6.3f TB/s\n", t[2] * 1e3, bytes / t[2] / 1e12);
    printf("scan forward           %9.4f ms  %6.3f TB/s  %6.2f trillion exponentials/s\n",
           t[0] * 1e3, bytes / t[0] / 1e12, cells * 16 / t[0] / 1e12);
    if (t[1] > 0)
        printf("scan backward          %9.4f ms  %6.3f TB/s  %6.2f trillion exponentials/s\n",
               t[1] * 1e3, 2 * bytes / t[1] / 1e12, cells * 16 / t[1] / 1e12);
    return 0;
}

static int command_bench(int argc, char **argv) {
    const char *shape = NULL, *dtype = "f32", *scan = NULL, *path = NULL, *only = "pgt";
    long threads = default_threads(), repeats = 7;
    const Option options[] = {
        {"--shape", "S", "random weights of this shape instead of a model", OPT_TEXT, &shape, 0, 0},
        {"--dtype", "T", "their storage type", OPT_TEXT, &dtype, 0, 0},
        {"--scan", "B,E,L", "time the scan alone: sequences, channels, length", OPT_TEXT, &scan, 0,
         0},
        {"--only", "LETTERS",
         "on a GPU: p prefill, g generation, t training, d 1, 8, 64 prompts of 2048 and 128 more",
         OPT_TEXT, &only, 0, 0},
        {"-r", "N", "repeats, of which the median is shown", OPT_INT, &repeats, 1, BENCH_MAX},
        BACKEND_OPTIONS,
        {"-T", "N", "threads", OPT_INT, &threads, 1, 1024},
    };
    if (wants_help(argc, argv)) return print_help(BENCH_USAGE, options, COUNT(options)), 0;
    int n = parse_options(argc, argv, options, COUNT(options), &path, 1);
    if (n < 0) return -1;
    if (n + (shape != NULL) + (scan != NULL) != 1)
        return fail("bench needs one of: a model.bin, --shape, --scan");
    bool gpu = GPU && !backend.cpu;
    if (scan)
        return gpu ? bench_gpu_scan(scan, (int)repeats)
                   : bench_scan(scan, (int)threads, (int)repeats);
    Config c;
    if (shape && parse_shape(shape, dtype, &c)) return -1;
    Model *m = shape ? mamba_random_model(&c, 42) : mamba_load(path);
    int result = !m    ? -1
                 : gpu ? bench_gpu(m, (int)repeats, only)
                       : bench_model(m, (int)threads, (int)repeats);
    mamba_free(m);
    return result;
}

static int run_command(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(int, char **);
    } command[] = {{"info", command_info},        {"tokenize", command_tokenize},
                   {"eval", command_eval},        {"logits", command_logits},
                   {"train", command_train},      {"bench", command_bench},
                   {"quantize", command_quantize}};
    if (argc > 1 && !strcmp(argv[1], "--version")) return printf("mamba.c %s\n", MAMBA_VERSION), 0;
    for (int i = 0; i < COUNT(command) && argc > 1; i++)
        if (!strcmp(argv[1], command[i].name)) return command[i].run(argc - 1, argv + 1);
    return command_generate(argc, argv);
}

#ifndef TESTING
int main(int argc, char **argv) {
    static const int deadly[] = {
        SIGINT,
        SIGTERM,
#ifdef SIGHUP
        SIGHUP,
#endif
    };
    for (int i = 0; i < COUNT(deadly); i++)
        if (signal(deadly[i], on_kill) == SIG_IGN) signal(deadly[i], SIG_IGN); // nohup
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a file beyond `ulimit -f` is a failed write, which gets a sentence
#endif
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY); // bytes, not lines
#endif
    int result = run_command(argc, argv);
    if ((fflush(stdout) || ferror(stdout)) && !result)
        result = fail("stdout: cannot write: %s", strerror(errno));
    if (result) fprintf(stderr, "mamba: %s\n", error_text);
    return result ? 1 : 0;
}
#endif
COLD_END
#endif // MAMBA_NO_MAIN
#endif // MAMBA_TYPES_ONLY
