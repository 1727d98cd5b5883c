// cpu/matmul.h: the fast forms of tensor_widen, matmul_floats, matmul and matmul_backward.
//
// There are two ways to multiply. Few rows of x (tokens being generated): every weight is used for
// few rows, so the product runs at the speed of memory, and each thread streams its own rows of W.
// Many rows (prefill, training): the blocked product, which keeps packed parts of both factors in
// the caches. Rows.step or fewer than MATMUL_FEW rows choose the first way.
//
// Names: T rows of x, I inputs, O outputs, as in mamba.c. G is a number of rows of x that share one
// reading of the weights (a group), R the number of rows of W that are taken at once; g and r are
// their indices. A panel is TILE rows of a Q8 or Q4 matrix. A strip is a packed part of a factor.

// --- few rows of x: the inner loops, and what is special to a storage type

enum { PAIR_LANES = 2 * VL }; // inputs that dots takes at a time: two vectors, c = 0 and 1
enum { GROUP = 8 };           // rows of x in a group, at the most
enum { R_MAX = 4 };           // rows of W taken at once, at the most

// G of the next group where `rows` rows of x remain, and R for this G.
INLINE int group_size(int rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }
INLINE int weight_rows(int G) { return G == 1 ? R_MAX : GROUP / G; }

// Of a pair of vectors of halves, lanes c, c + 2, c + 4 ..., each widened to 32 bits: one load and
// one operation. In the order of memory it would be a load, one or two shuffles and a shift.
INLINE uvec every_second_half(const half *p, int c) {
    uvec words;
    memcpy(&words, p, sizeof words);
    return host_is_little_endian() == (c == 0) ? words << 16 : words & 0xFFFF0000u;
}

// Vector c of the pair of weights at p, and of the pair of inputs at x that belongs to it.
INLINE vec pair_of_weights(const void *p, int c, const Type type) {
    if (type == F32) return load((const float *)p + c * VL);
    uvec wide = every_second_half(p, c);
    return type == F16 ? from_f16(wide) : from_bf16(wide);
}
INLINE vec pair_of_inputs(const float *x, int c, bool halves) {
    return halves ? every_second(x, c) : load(x + c * VL);
}

// sums (R,G) += n weights of R rows times G rows of x; n is a multiple of PAIR_LANES. One row of x
// is read as it lies; more are packed by pack_groups().
// A sum is one chain of multiply-adds, in the same order for any G, so a row's bits do not depend
// on its group. 4 rows by 1 input, 4 by 2, 2 by 4 or 1 by 8 are chains enough to hide the latency.
// prefetch_bytes, unless 0: from these weights to those of the next call, which are fetched
// meanwhile. The processor's own prefetch does not find them, because rows are too short.
INLINE void dots_of(vec *sums, const void *const *rows, const float *x, int n,
                    size_t prefetch_bytes, const Type type, const int R, const int G) {
    const int bytes = type == F32 ? 4 : 2, line = 64 / bytes; // weights of a cache line
    const char *w[R_MAX];
    vec sum[GROUP];
    UNROLLED_FOR (int r = 0; r < R; r++) w[r] = rows[r];
    UNROLLED_FOR (int k = 0; k < R * G; k++) sum[k] = sums[k];
    for (int i = 0; i < n; i += PAIR_LANES, x += PAIR_LANES * G) {
        for (int k = 0; G > 1 && k < PAIR_LANES; k += line)
            UNROLLED_FOR (int r = 0; r < R; r++)
                if (i % line == 0) PREFETCH(w[r] + (size_t)(i + k) * bytes, prefetch_bytes);
        UNROLLED_FOR (int c = 0; c < 2; c++) {
            vec a[R_MAX];
            UNROLLED_FOR (int r = 0; r < R; r++)
                a[r] = pair_of_weights(w[r] + (size_t)i * bytes, c, type);
            UNROLLED_FOR (int g = 0; g < G; g++) {
                vec xg = G == 1 ? pair_of_inputs(x, c, type != F32) : load(x + (c * G + g) * VL);
                UNROLLED_FOR (int r = 0; r < R; r++)
                    sum[r * G + g] = MULTIPLY_ADD(sum[r * G + g], a[r], xg);
            }
        }
    }
    UNROLLED_FOR (int k = 0; k < R * G; k++) sums[k] = sum[k];
}

INLINE void dots_by_group(vec *sums, const void *const *rows, const float *x, int n,
                          size_t prefetch_bytes, int G, const Type type) {
    if (G == 1) dots_of(sums, rows, x, n, prefetch_bytes, type, 4, 1);
    else if (G == 2) dots_of(sums, rows, x, n, prefetch_bytes, type, 4, 2);
    else if (G == 4) dots_of(sums, rows, x, n, prefetch_bytes, type, 2, 4);
    else dots_of(sums, rows, x, n, prefetch_bytes, type, 1, 8);
}
static void dots_f32(vec *sums, const void *const *rows, const float *x, int n,
                     size_t prefetch_bytes, int G) {
    dots_by_group(sums, rows, x, n, prefetch_bytes, G, F32);
}
static void dots_f16(vec *sums, const void *const *rows, const float *x, int n,
                     size_t prefetch_bytes, int G) {
    dots_by_group(sums, rows, x, n, prefetch_bytes, G, F16);
}
static void dots_bf16(vec *sums, const void *const *rows, const float *x, int n,
                      size_t prefetch_bytes, int G) {
    dots_by_group(sums, rows, x, n, prefetch_bytes, G, BF16);
}

// out (n) = n weights at p as float32, in the order of memory.
INLINE vec widen_vector(const void *p, const Type type) {
    if (type == F32) return load(p);
    return type == F16 ? read_f16(p) : read_bf16(p);
}
INLINE void widen_of(float *out, const void *p, int n, const Type type) {
    const int bytes = type == F32 ? 4 : 2;
    const char *w = p;
    int i = 0;
    for (; i + VL <= n; i += VL) store(out + i, widen_vector(w + (size_t)i * bytes, type));
    if (i < n) {
        float tail[VL] = {0};
        memcpy(tail, w + (size_t)i * bytes, (size_t)(n - i) * bytes);
        store_n(out + i, widen_vector(tail, type), n - i);
    }
}
static void widen_f32(float *out, const void *p, int n) { widen_of(out, p, n, F32); }
static void widen_f16(float *out, const void *p, int n) { widen_of(out, p, n, F16); }
static void widen_bf16(float *out, const void *p, int n) { widen_of(out, p, n, BF16); }

// All that the products must know of a storage type. A new type adds a line here.
static const struct {
    // F32, F16, BF16: dots_of() and widen_of().
    void (*dots)(vec *sums, const void *const *rows, const float *x, int n, size_t prefetch_bytes,
                 int G);
    void (*widen)(float *out, const void *p, int n);
    // Q8, Q4: tile_prepare(), tile_dots_up_to() and tile_unpack() of cpu/quantized.h.
    void (*prepare)(float *xs, float *sum_start, const float *x, int n);
    int (*tile_dots)(float *out, const TileDots *d, int rows);
    void (*unpack)(float *strip, const unsigned char *tile, int r, int tiles);
} TYPE_KERNELS[N_TYPES] = {
    [F32] = {.dots = dots_f32, .widen = widen_f32},
    [F16] = {.dots = dots_f16, .widen = widen_f16},
    [BF16] = {.dots = dots_bf16, .widen = widen_bf16},
    [Q8] = {.prepare = prepare_q8, .tile_dots = dots_q8, .unpack = unpack_q8},
    [Q4] = {.prepare = prepare_q4, .tile_dots = dots_q4, .unpack = unpack_q4},
};

// Where weight `from` of row `row` lies, of a matrix of F32, F16 or BF16 with ld weights a row.
static const void *weights_at(const void *data, Type type, size_t ld, size_t row, int from) {
    return (const char *)data + (row * ld + (size_t)from) * type_bytes(type);
}

static void tensor_widen(float *out, const Tensor *w, int row, int from, int n) {
    if (is_quantized(w->type)) tensor_widen_plain(out, w, row, from, n);
    else
        TYPE_KERNELS[w->type].widen(
            out, weights_at(w->data, w->type, (size_t)w->cols, (size_t)row, from), n);
}

static int team_size(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// How many of a product's tasks always go to the same thread, in whose caches their weights may
// still be. With 5 or more rows of x the product computes more than it reads. Then the last eighth
// of the tasks goes to the threads that are done first.
static int fixed_tasks(int tasks, int T) { return T > 4 ? tasks - tasks / 8 : tasks; }

// --- few rows of x, Q8 and Q4
// Threads share the panels of W, and each prepares x for itself: X_PREPARED rows and X_BLOCK inputs
// at a time. One row of x takes two panels at once, one from each half of W, so that two streams of
// memory run side by side.

typedef struct {
    float *out; // (rows,O), rows ldo apart
    size_t ldo;
    const Tensor *w;             // (O,I)
    const float *bias;           // (O) or NULL
    const float *xs, *sum_start; // the rows of x that are prepared, see tile_prepare()
    int i0, tiles;               // their inputs: from i0 on, so many tiles
    int rows;                    // how many
    int panels;                  // of W
    int pair_distance;           // panels from the first of a pair to the second; 0: no pairs
} TileRows;

static void tile_panel(const TileRows *p, int panel) {
    const size_t bytes = tile_bytes(p->w->type), panel_bytes = tiles_of((size_t)p->w->cols) * bytes;
    const unsigned char *first = (const unsigned char *)p->w->data + (size_t)panel * panel_bytes +
                                 (size_t)(p->i0 / TILE) * bytes;
    const int pair = p->pair_distance && panel + p->pair_distance < p->panels ? 2 : 1;
    float sum[TILE_X_ROWS][TILE];
    for (int t = 0, G; t < p->rows; t += G) {
        TileDots d = {first, pair == 2 ? (size_t)p->pair_distance * panel_bytes : 0,
                      p->xs + t * p->tiles * TILE, p->sum_start + t * p->tiles, p->tiles};
        G = TYPE_KERNELS[p->w->type].tile_dots(sum[0], &d, p->rows - t);
        for (int k = 0; k < pair; k++)
            for (int g = 0; g < G; g++) {
                int o = (panel + k * p->pair_distance) * TILE;
                float *to = p->out + (size_t)(t + g) * p->ldo + o;
                for (int r = 0; r < TILE && o + r < p->w->rows; r++)
                    to[r] = sum[k * G + g][r] + (p->i0 ? to[r] : p->bias ? p->bias[o + r] : 0);
            }
    }
}

// Whether a task is a pair of panels. It is not where some thread would get over 9/8 as many
// panels.
static bool tiles_in_pairs(int panels, int T) {
    int team = team_size(), pairs = (panels + 1) / 2;
    int by_pairs = (pairs + team - 1) / team * 2, by_ones = (panels + team - 1) / team;
    return T == 1 && VL > 4 && by_pairs <= by_ones * 9 / 8;
}

static void matmul_few_tiles(float *out, size_t ldo, const float *x, size_t ldx, const Tensor *w,
                             const float *bias, int T) {
    float xs[X_PREPARED * X_BLOCK], sum_start[X_PREPARED * X_BLOCK / TILE];
    const int panels = (int)tiles_of((size_t)w->rows);
    const int pair_distance = tiles_in_pairs(panels, T) ? (panels + 1) / 2 : 0;
    const int tasks = pair_distance ? pair_distance : panels, fixed = fixed_tasks(tasks, T);
    for (int t0 = 0; t0 < T; t0 += X_PREPARED)
        for (int i0 = 0; i0 < w->cols; i0 += X_BLOCK) {
            int n = w->cols - i0 < X_BLOCK ? w->cols - i0 : X_BLOCK;
            int rows = T - t0 < X_PREPARED ? T - t0 : X_PREPARED;
            int tiles = (int)tiles_of((size_t)n);
            for (int t = 0; t < rows; t++)
                TYPE_KERNELS[w->type].prepare(xs + t * tiles * TILE, sum_start + t * tiles,
                                              x + (size_t)(t0 + t) * ldx + i0, n);
            TileRows p = {
                out + (size_t)t0 * ldo, ldo, w, bias, xs, sum_start, i0, tiles, rows, panels,
                pair_distance};
#pragma omp for nowait
            for (int panel = 0; panel < fixed; panel++) tile_panel(&p, panel);
#pragma omp for schedule(dynamic)
            for (int panel = fixed; panel < tasks; panel++) tile_panel(&p, panel);
        }
}

// --- few rows of x, F32, F16 and BF16
// Every weight is read from memory once, and a row's bits do not depend on the rows beside it.

// packed[group][pair of vectors][c][g][lane]: the product reads a group in one run. Rows beyond the
// last are zero. A group of one row is not packed: it is read where it lies.
INLINE size_t padded_inputs(int I) {
    return (size_t)((I + PAIR_LANES - 1) / PAIR_LANES) * PAIR_LANES;
}
static void pack_groups(float *packed, const float *x, size_t ldx, int I, int T, bool halves) {
#pragma omp for
    for (int t = 0; t < (T + GROUP - 1) / GROUP * GROUP; t++) {
        int t0 = t / GROUP * GROUP, G = group_size(T - t0);
        float *to = packed + (size_t)t0 * padded_inputs(I) + (size_t)(t - t0) * VL;
        for (int i = 0; G > 1 && t - t0 < G && i < I; i += PAIR_LANES, to += PAIR_LANES * G) {
            float padded[PAIR_LANES] = {0};
            const float *from = x + (size_t)t * ldx + i;
            if (t < T && I - i < PAIR_LANES) memcpy(padded, from, (size_t)(I - i) * sizeof *padded);
            if (t >= T || I - i < PAIR_LANES) from = padded;
            store(to, pair_of_inputs(from, 0, halves));
            store(to + G * VL, pair_of_inputs(from, 1, halves));
        }
    }
}

// sums (R,G) += n weights of R rows times G rows of x. The last weights of a row, fewer than
// PAIR_LANES, go through zero-padded copies.
static void add_dots(vec *sums, const void *const *rows, Type type, const float *x, int n,
                     size_t prefetch_bytes, int G) {
    const int whole = n / PAIR_LANES * PAIR_LANES, tail = n - whole;
    const size_t bytes = type_bytes(type);
    TYPE_KERNELS[type].dots(sums, rows, x, whole, prefetch_bytes, G);
    if (tail == 0) return;
    float w_tail[R_MAX][PAIR_LANES] = {{0}}, x_tail[PAIR_LANES] = {0};
    for (int r = 0; r < weight_rows(G); r++)
        memcpy(w_tail[r], (const char *)rows[r] + (size_t)whole * bytes, (size_t)tail * bytes);
    if (G == 1) memcpy(x_tail, x + whole, (size_t)tail * sizeof *x);
    const void *tails[R_MAX] = {w_tail[0], w_tail[1], w_tail[2], w_tail[3]};
    TYPE_KERNELS[type].dots(sums, tails, G == 1 ? x_tail : x + whole * G, PAIR_LANES, 0, G);
}

// A task is some rows of W, R at a time. Up to GROUP rows of x: these R rows are 1 / R of W away
// from each other, so a task reads R streams of memory that each run on without a gap. More rows of
// x: neighbours, which the next group finds in the L2 cache. A task takes all its rows of W for as
// many inputs as leave x in the L1 cache.
enum { TASK_ROWS_MAX = 16 }; // rows of W in a task
enum { FEW_L1 = 6144 };      // floats of x that stay in the L1 cache

typedef struct {
    float *out;          // (T,O), rows ldo apart
    const float *x;      // (T,I), rows ldx apart
    const float *packed; // the groups of x, see pack_groups()
    const Tensor *w;     // (O,I)
    const float *bias;   // (O) or NULL
    size_t ldo, ldx;
    int T;
    int task_rows;   // rows of W in a task
    int streams;     // parts of W that a task reads side by side; 1: neighbouring rows
    int stream_rows; // rows of each part
    int row_stride;  // from one of R rows to the next
} FewRows;

// The rows of W that task number `task` takes: `from` is the first one in the first stream; the
// next R follow `step` rows later.
typedef struct {
    int from, R, step;
} TaskRows;

static TaskRows task_rows(const FewRows *f, int task, int G) {
    int R = weight_rows(G);
    return (TaskRows){task * f->task_rows / f->streams, R, f->row_stride == 1 ? R : 1};
}

// sums (task_rows,G) of one group, the rows of x from t0 on.
static void few_sums(vec *sums, const FewRows *f, TaskRows k, int t0, int G) {
    const Tensor *w = f->w;
    const int O = w->rows, I = w->cols, n_max = FEW_L1 / G;
    const size_t row_bytes = (size_t)I * type_bytes(w->type);
    const float *x = G == 1 ? f->x + (size_t)t0 * f->ldx : f->packed + t0 * padded_inputs(I);
    for (int j = 0; j < f->task_rows * G; j++) sums[j] = splat(0);
    for (int i = 0; i < I; i += n_max)
        for (int j = 0, o = k.from; j < f->task_rows && o < f->stream_rows; j += k.R, o += k.step) {
            const void *rows[R_MAX];
            for (int r = 0; r < k.R; r++) {
                int row = o + r * f->row_stride;
                rows[r] = weights_at(w->data, w->type, (size_t)I, (size_t)(row < O ? row : o), i);
            }
            add_dots(sums + j * G, rows, w->type, x + (size_t)i * G, I - i < n_max ? I - i : n_max,
                     k.step * row_bytes, G);
        }
}

// The outputs of row t of x: sum (task_rows), G vectors between them.
static void few_outputs(const vec *sum, const FewRows *f, TaskRows k, int t, int G) {
    const int O = f->w->rows;
    float *to = f->out + (size_t)t * f->ldo;
    if (k.R == 1 && k.from + f->task_rows <= O) { // neighbours: outputs side by side
        for (int j = 0, o = k.from; j < f->task_rows; j += 4, o += 4)
            sum_lanes4(to + o, sum + j * G, G, f->bias ? f->bias + o : NULL);
        return;
    }
    for (int j = 0, o = k.from; j < f->task_rows && o < f->stream_rows; j += k.R, o += k.step)
        for (int r = 0, row = o; r < k.R; r++, row += f->row_stride, sum += G)
            if (row < O) to[row] = sum_lanes(*sum) + (f->bias ? f->bias[row] : 0);
}

static void few_task(const FewRows *f, int task) {
    vec sums[TASK_ROWS_MAX * GROUP];
    for (int t0 = 0, G; t0 < f->T; t0 += G) {
        G = group_size(f->T - t0);
        TaskRows k = task_rows(f, task, G);
        few_sums(sums, f, k, t0, G);
        for (int g = 0; g < G && t0 + g < f->T; g++) few_outputs(sums + g, f, k, t0 + g, G);
    }
}

// packed: T rounded up to GROUP rows, of padded_inputs() each. For T = 1 none.
static void matmul_few(float *out, size_t ldo, const float *x, size_t ldx, const Tensor *w,
                       const float *bias, int T, float *packed) {
    if (is_quantized(w->type)) {
        matmul_few_tiles(out, ldo, x, ldx, w, bias, T);
        return;
    }
    const int streams = T > GROUP ? 1 : weight_rows(group_size(T));
    const int stream_rows = (w->rows + streams - 1) / streams;
    if (T > 1) pack_groups(packed, x, ldx, w->cols, T, type_bytes(w->type) == 2);
    FewRows f = {.out = out,
                 .x = x,
                 .packed = packed,
                 .w = w,
                 .bias = bias,
                 .ldo = ldo,
                 .ldx = ldx,
                 .T = T,
                 .task_rows = T > 4 ? TASK_ROWS_MAX : 4,
                 .streams = streams,
                 .stream_rows = stream_rows,
                 .row_stride = T > GROUP ? 1 : stream_rows};
    const int tasks = (stream_rows * streams + f.task_rows - 1) / f.task_rows;
    const int fixed = fixed_tasks(tasks, T);
#pragma omp for nowait
    for (int task = 0; task < fixed; task++) few_task(&f, task);
#pragma omp for schedule(dynamic)
    for (int task = fixed; task < tasks; task++) few_task(&f, task);
}

// --- many rows: the blocked product
//
// clang-format off
//        j0..j0+NR
//       +---------+     A task is NR outputs, a strip of W, times a block of rows of x.
//    KC |  strip  |     For KC inputs at a time the thread widens its strip of W to float32,
//       +---------+     transposed, so that NR outputs are side by side (L1 cache). Then for
//    MR |  tile   |     every MR rows of x, packed the same way beforehand: load NR weights,
//       +---------+     multiply by MR single inputs, add into MR x NR sums. The sums stay in
//                       registers until KC is done. A step of MR NR multiply-adds needs only
//                       NR / VL + MR loads, so the multiply-add units are the limit.
// clang-format on

#if defined(__AVX512F__) || defined(__aarch64__)
#define MR 12 // 12 x 2 sums + 2 weights + 1 input of 32 registers
#else
#define MR 6 // 6 x 2 sums + 2 + 1 of 16
#endif
#define KC 512
enum { MATMUL_FEW = 4 };     // below so many rows, packing costs more than it saves
enum { PRODUCT_TASKS = 32 }; // for a team: at least so many tasks, where the rows allow it

// A factor of a product, (rows,depth): element (r,k) is data[r * ld + k], or data[k * ld + r] if
// by_depth. The forward product needs only the first kind. With the second the same code computes
// both gradients.
typedef struct {
    const void *data;
    size_t ld;
    Type type;
    bool by_depth;
} Factor;

// out (rows,columns) = a (rows,depth) b (columns,depth)^T (+ bias (columns)), or += where add.
typedef struct {
    float *out;
    size_t ldo; // between rows of out
    Factor a, b;
    const float *bias; // or NULL
    bool add;
    int rows, columns, depth;
    float *packed; // room for rows rounded up to MR, times depth
} Product;

// packed[strip][k][r]: strips of MR rows of a, float32. Missing rows of the last strip are zero.
static void pack_rows(float *packed, const Factor *a, int rows, int depth) {
#pragma omp for
    for (int strip = 0; strip < (rows + MR - 1) / MR; strip++) {
        float *to = packed + (size_t)strip * MR * depth;
        int n = rows - strip * MR < MR ? rows - strip * MR : MR;
        const float *from = (const float *)a->data + (size_t)strip * MR * (a->by_depth ? 1 : a->ld);
        if (n < MR) memset(to, 0, (size_t)MR * depth * sizeof *to);
        if (a->by_depth)
            for (int k = 0; k < depth; k++)
                memcpy(to + (size_t)k * MR, from + k * a->ld, (size_t)n * sizeof *to);
        else
            for (int r = 0; r < n; r++)
                for (int k = 0; k < depth; k++) to[(size_t)k * MR + r] = from[r * a->ld + k];
    }
}

// The next two: strip[k][j] = b(j0 + j, k0 + k) for j < n and k < kc.

static void pack_by_depth(float *strip, const Factor *b, int n, int j0, int k0, int kc) {
    if (b->type == F32 && n == NR) // training: a call a row would cost 10% of a step
        for (int k = 0; k < kc; k++)
            memcpy(strip + k * NR, (const float *)b->data + (size_t)(k0 + k) * b->ld + j0,
                   NR * sizeof(float));
    else
        for (int k = 0; k < kc; k++)
            TYPE_KERNELS[b->type].widen(
                strip + k * NR, weights_at(b->data, b->type, b->ld, (size_t)(k0 + k), j0), n);
}

// Rows of b are widened WIDENED inputs at a time, so that the part of the strip that is written to
// stays in the L1 cache.
static void pack_transposed(float *strip, const Factor *b, int n, int j0, int k0, int kc) {
    enum { ROWS = NR < 4 ? NR : 4, WIDENED = 64 };
    float rows[ROWS][WIDENED] = {{0}};
    for (int k = 0; k < kc; k += WIDENED)
        for (int j = 0; j < n; j += ROWS) {
            int width = kc - k < WIDENED ? kc - k : WIDENED;
            for (int i = 0; i < ROWS && j + i < n; i++)
                TYPE_KERNELS[b->type].widen(
                    rows[i], weights_at(b->data, b->type, b->ld, (size_t)(j0 + j + i), k0 + k),
                    width);
            if (j + ROWS > n) memset(rows[n - j], 0, (size_t)(j + ROWS - n) * sizeof rows[0]);
            float *to = strip + (size_t)k * NR + j;
            for (int i = 0; ROWS == 4 && i < width; i += 4)
                transpose4(to + (size_t)i * NR, NR, rows[0] + i, WIDENED);
            for (int i = 0; ROWS < 4 && i < width; i++)
                for (int r = 0; r < ROWS; r++) to[(size_t)i * NR + r] = rows[r][i];
        }
}

// strip (kc,NR) = rows j0 .. j0 + NR of b, as float32, for the depths k0 .. k0 + kc. b has b_rows
// rows; missing ones are zero.
static void pack_strip(float *strip, const Factor *b, int b_rows, int j0, int k0, int kc) {
    const int n = b_rows - j0 < NR ? b_rows - j0 : NR;
    if (is_quantized(b->type)) { // NR divides TILE, TILE divides KC
        size_t tile = (size_t)(j0 / TILE) * tiles_of(b->ld) + (size_t)(k0 / TILE);
        const unsigned char *at = (const unsigned char *)b->data + tile * tile_bytes(b->type);
        TYPE_KERNELS[b->type].unpack(strip, at, j0 % TILE, (int)tiles_of((size_t)kc));
        return;
    }
    if (n < NR) memset(strip, 0, (size_t)kc * NR * sizeof *strip);
    if (b->by_depth) pack_by_depth(strip, b, n, j0, k0, kc);
    else pack_transposed(strip, b, n, j0, k0, kc);
}

// tile (MR,NR) = a (kc,MR)^T b (kc,NR). Prefill spends its time in this loop.
static void micro_kernel(float *tile, const float *a, const float *b, int kc) {
    vec sum[MR][2];
    UNROLLED_FOR (int r = 0; r < MR; r++) {
        sum[r][0] = splat(0);
        sum[r][1] = splat(0);
    }
    for (int k = 0; k < kc; k++, a += MR, b += NR) {
        vec b0 = load(b), b1 = load(b + VL);
        UNROLLED_FOR (int r = 0; r < MR; r++) {
            sum[r][0] += a[r] * b0;
            sum[r][1] += a[r] * b1;
        }
    }
    UNROLLED_FOR (int r = 0; r < MR; r++) {
        store(tile + r * NR, sum[r][0]);
        store(tile + r * NR + VL, sum[r][1]);
    }
}

// One task: columns j0 .. j0 + NR of rows r0 .. r1 of out, the whole depth.
static void product_task(const Product *p, int r0, int r1, int j0) {
    float strip[KC * NR], tile[MR * NR];
    const int depth = p->depth, columns = p->columns;
    const int width = columns - j0 < NR ? columns - j0 : NR;
    const float *bias = p->bias;
    for (int k0 = 0; k0 < depth; k0 += KC) {
        int kc = depth - k0 < KC ? depth - k0 : KC;
        bool add = k0 || p->add;
        pack_strip(strip, &p->b, columns, j0, k0, kc);
        for (int r = r0; r < r1; r += MR) {
            micro_kernel(tile, p->packed + (size_t)r * depth + (size_t)k0 * MR, strip, kc);
            for (int i = 0; i < MR && r + i < r1; i++) {
                float *to = p->out + (size_t)(r + i) * p->ldo + j0;
                for (int j = 0; j < width; j++)
                    to[j] = tile[i * NR + j] + (add ? to[j] : bias ? bias[j0 + j] : 0);
            }
        }
    }
}

// Few strips: the rows are cut into blocks too, although each block then packs its strip again.
static void product(const Product *p) {
    pack_rows(p->packed, &p->a, p->rows, p->depth);
    const int strips = (p->columns + NR - 1) / NR, tasks = team_size() > 1 ? PRODUCT_TASKS : 1;
    int blocks = (tasks + strips - 1) / strips;
    int block_rows = ((p->rows + blocks - 1) / blocks + MR - 1) / MR * MR;
    if (block_rows < 4 * MR) block_rows = 4 * MR;
    blocks = (p->rows + block_rows - 1) / block_rows;
#pragma omp for schedule(guided) // a thread that is held up leaves the rest to the others
    for (int task = 0; task < strips * blocks; task++) {
        int r0 = task % blocks * block_rows;
        int r1 = r0 + block_rows < p->rows ? r0 + block_rows : p->rows;
        product_task(p, r0, r1, task / blocks * NR);
    }
}

// --- the operations

// Room for the packed factor of matmul() and matmul_backward() with T rows and matrices whose sides
// are at most `widest`. Either factor may be packed; its rows and its depth are rounded up.
static size_t matmul_floats(size_t T, size_t widest) {
    return size_mul(size_add(T, 16), size_add(widest, 32));
}

static void matmul(float *out, size_t ldo, const float *x, size_t ldx, const Tensor *w,
                   const float *bias, Rows rows) {
    if (rows.step || rows.T < MATMUL_FEW) {
        matmul_few(out, ldo, x, ldx, w, bias, rows.T, rows.packed);
        return;
    }
    Factor a = {x, ldx, F32, false}, b = {w->data, (size_t)w->cols, w->type, false};
    product(&(Product){out, ldo, a, b, bias, false, rows.T, w->rows, w->cols, rows.packed});
}

static void matmul_backward(const MatmulGrad *d, const float *d_out, size_t ldo, const float *x,
                            size_t ldx, const Tensor *w, Rows rows) {
    const int O = w->rows, I = w->cols, T = rows.T;
    if (d->d_x) {
        Factor a = {d_out, ldo, F32, false}, b = {w->data, (size_t)I, w->type, true};
        product(&(Product){d->d_x, ldx, a, b, NULL, d->add, T, I, O, rows.packed});
    }
    if (d->d_W) {
        Factor a = {d_out, ldo, F32, true}, b = {x, ldx, F32, true};
        product(&(Product){d->d_W, (size_t)I, a, b, NULL, true, O, I, T, rows.packed});
    }
    if (d->d_bias) sum_rows(d->d_bias, d_out, ldo, T, O);
}
