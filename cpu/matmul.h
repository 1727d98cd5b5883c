// The products of few rows take PAIR weights and inputs at a time, in two parts of VL, c = 0 and 1:
// of halves every second, so that one load and one operation make VL of them wide, where in order
// it is a load, a shuffle or two and a shift.
INLINE uvec every_second_half(const half *p, int c) {
    uvec words;
    memcpy(&words, p, sizeof words);
    return host_is_little_endian() == (c == 0) ? words << 16 : words & 0xFFFF0000u;
}
INLINE vec weights_f32(const float *p, int c) { return load(p + c * VL); }
INLINE vec weights_f16(const half *p, int c) { return from_f16(every_second_half(p, c)); }
INLINE vec weights_bf16(const half *p, int c) { return from_bf16(every_second_half(p, c)); }
INLINE vec inputs_of(const float *x, int c, bool halves) {
    return halves ? every_second(x, c) : load(x + c * VL);
}

// For one storage type: dots adds n weights of R rows times T rows of x to sums (R,T), n a multiple
// of PAIR; widen turns n weights of a row, from input `from` on, into float32; ld is the length of
// a row. A sum is one chain of multiply-adds, in the same order for any T, so that the bits are the
// same; 4 rows by 1 input, 4 by 2, 2 by 4 or 1 by 8 are chains enough to hide their latency. One
// row of x is read as it lies; more are packed, see pack_few. ahead, unless 0: the distance in
// bytes to the weights of the next call, which are fetched meanwhile: rows are too short for the
// processor to foresee them.
enum { FEW = 8 };                                           // rows of x that dots takes at the most
INLINE int few_rows(int T) { return T == 1 ? 4 : FEW / T; } // R for this T
#define KERNELS_OF(name, stored) \
    INLINE void dots_##name##_of(vec *sums, const void *const *rows, const float *x, int n, \
                                 size_t ahead, const int R, const int T) { \
        enum { LINE = 64 / sizeof(stored) }; /* weights of a cache line */ \
        const stored *w[4]; \
        vec sum[FEW]; \
        UNROLLED_FOR (int r = 0; r < R; r++) w[r] = rows[r]; \
        UNROLLED_FOR (int k = 0; k < R * T; k++) sum[k] = sums[k]; \
        for (int i = 0; i < n; i += PAIR, x += PAIR * T) { \
            for (int k = 0; T > 1 && k < PAIR; k += LINE) \
                UNROLLED_FOR (int r = 0; r < R; r++) \
                    if (i % LINE == 0) PREFETCH(w[r] + i + k, ahead); \
            UNROLLED_FOR (int c = 0; c < 2; c++) { \
                vec a[4]; \
                UNROLLED_FOR (int r = 0; r < R; r++) a[r] = weights_##name(w[r] + i, c); \
                UNROLLED_FOR (int t = 0; t < T; t++) { \
                    vec xt = T == 1 ? inputs_of(x, c, sizeof(stored) == 2) \
                                    : load(x + (c * T + t) * VL); \
                    UNROLLED_FOR (int r = 0; r < R; r++) sum[r * T + t] += a[r] * xt; \
                } \
            } \
        } \
        UNROLLED_FOR (int k = 0; k < R * T; k++) sums[k] = sum[k]; \
    } \
    static void dots_##name(vec *sums, const void *const *rows, const float *x, int n, \
                            size_t ahead, int T) { \
        if (T == 1) dots_##name##_of(sums, rows, x, n, ahead, 4, 1); \
        else if (T == 2) dots_##name##_of(sums, rows, x, n, ahead, 4, 2); \
        else if (T == 4) dots_##name##_of(sums, rows, x, n, ahead, 2, 4); \
        else dots_##name##_of(sums, rows, x, n, ahead, 1, 8); \
    } \
    static void widen_##name(float *out, const void *data, size_t ld, size_t row, int from, \
                             int n) { \
        const stored *w = (const stored *)data + row * ld + from; \
        int i = 0; \
        for (; i + VL <= n; i += VL) store(out + i, read_##name(w + i)); \
        if (i < n) { \
            stored tail[VL] = {0}; \
            memcpy(tail, w + i, (size_t)(n - i) * sizeof(stored)); \
            store_n(out + i, read_##name(tail), n - i); \
        } \
    }
KERNELS_OF(f32, float)
KERNELS_OF(f16, half)
KERNELS_OF(bf16, half)

static const struct {
    void (*dots)(vec *sums, const void *const *rows, const float *x, int n, size_t ahead,
                 int T); // of F32, F16, BF16
    void (*widen)(float *out, const void *data, size_t ld, size_t row, int from, int n);
    void (*prepare)(float *xs, float *start, const float *x, int n); // this and the rest of Q8, Q4
    int (*tile_dots)(float *out, const unsigned char *tile, size_t apart, const float *xs,
                     const float *start, int tiles,
                     int T); // rows of x done; apart, unless 0: two panels by one of them
    void (*unpack)(float *panel, const unsigned char *tile, int r, int groups);
} TYPE_KERNELS[N_TYPES] = {{dots_f32, widen_f32, NULL, NULL, NULL},
                           {dots_f16, widen_f16, NULL, NULL, NULL},
                           {dots_bf16, widen_bf16, NULL, NULL, NULL},
                           {NULL, NULL, prepare_q8, dots_q8, unpack_q8},
                           {NULL, NULL, prepare_q4, dots_q4, unpack_q4}};

// out (n) = weights from.. of row `row` of w.
static void tensor_widen(float *out, const Tensor *w, int row, int from, int n) {
    if (is_quantized(w->type)) tensor_widen_plain(out, w, row, from, n);
    else TYPE_KERNELS[w->type].widen(out, w->data, (size_t)w->cols, (size_t)row, from, n);
}

// --- matmul: out (L,O) = x (L,I) W^T (+ bias), W (O,I) of any storage type; rows of x are ldx
// apart. The one entry for every product in the model. Few rows (a token being generated): every
// weight is used once, so the product runs at the speed of memory; each thread streams its own rows
// of W. Many rows: the blocked product.
//
// clang-format off
//        o0..o0+NR
//       +---------+        A task is NR outputs (a panel of W) times a block of rows of x. For KC inputs at a time the
//    KC | panel   |        thread widens its panel of W to float32, transposed, so that NR outputs are side by side (L1
//       +---------+        cache). Then for every MR rows of x, packed the same way beforehand: load NR weights, multiply
//   MR |  tile    |        by MR single inputs, add into MR x NR sums that never leave the registers until KC is done.
//       +---------+        Per step MR*NR multiply-adds need only NR/VL + MR loads, so the FMA units are the limit.
// clang-format on

#if defined(__AVX512F__) || defined(__aarch64__)
#define MR 12 // 12 x 2 sums + 2 weights + 1 input of 32 registers
#else
#define MR 6 // 6 x 2 sums + 2 + 1 of 16
#endif
#define KC 512
#define MATMUL_FEW 4     // below this many rows, packing costs more than it saves
#define PRODUCT_TASKS 32 // at least so many tasks for a team, where the rows allow it

static const void *tensor_row(const Tensor *w, int row) {
    return (const char *)w->data + (size_t)row * (size_t)w->cols * type_bytes(w->type);
}

static int team_size(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Of the tasks of a product with few rows, those that always go to the same thread, in whose caches
// their weights may still be. From 5 rows on it computes more than it reads, and the last eighth
// goes to whoever is done first.
static int own_tasks(int tasks, int L) { return L > 4 ? tasks - tasks / 8 : tasks; }

// Q8 and Q4: threads share panels of rows, and each prepares x for itself, TILES_FEW rows of it for
// one reading of the weights. One row alone takes two panels half of W apart at once, unless some
// thread would get an eighth more of them to do for that.
enum { TILES_FEW = 8 };
typedef struct {
    float *out; // (rows,O), of these rows of x
    size_t ldo;
    const Tensor *w; // (O,I)
    const float *bias, *xs,
        *start; // (O); rows of x and what they begin with, as the type prepares them
    int k0, tiles, rows, panels,
        half; // tiles from input k0; half: panels from one of a pair to the other, or 0
} TileRows;

static void tile_panel(const TileRows *p, int panel) {
    float sum[TILES_AT_ONCE][TILE];
    size_t panel_bytes = tiles_of((size_t)p->w->cols) * tile_bytes(p->w->type);
    const unsigned char *at =
        (const unsigned char *)p->w->data + (size_t)(p->k0 / TILE) * tile_bytes(p->w->type);
    for (int t = 0, T; t < p->rows; t += T) {
        int P = p->half && panel + p->half < p->panels ? 2 : 1;
        T = TYPE_KERNELS[p->w->type].tile_dots(
            sum[0], at + (size_t)panel * panel_bytes, P == 2 ? (size_t)p->half * panel_bytes : 0,
            p->xs + t * p->tiles * TILE, p->start + t * p->tiles, p->tiles, p->rows - t);
        for (int k = 0; k < P; k++)
            for (int i = 0; i < T; i++) {
                int o = (panel + k * p->half) * TILE;
                float *to = p->out + (size_t)(t + i) * p->ldo + o;
                for (int r = 0; r < TILE && o + r < p->w->rows; r++)
                    to[r] = sum[k * T + i][r] + (p->k0 ? to[r] : p->bias ? p->bias[o + r] : 0);
            }
    }
}

static void matmul_few_tiles(float *out, size_t ldo, const float *x, size_t ldx, const Tensor *w,
                             const float *bias, int L) {
    float xs[TILES_FEW * X_BLOCK], start[TILES_FEW * X_BLOCK / TILE];
    int panels = (int)tiles_of((size_t)w->rows), half = (panels + 1) / 2, team = team_size();
    bool pairs =
        L == 1 && VL > 4 && (half + team - 1) / team * 2 <= (panels + team - 1) / team * 9 / 8;
    int tasks = pairs ? half : panels, own = own_tasks(tasks, L);
    for (int t0 = 0; t0 < L; t0 += TILES_FEW)
        for (int k0 = 0; k0 < w->cols; k0 += X_BLOCK) {
            int n = w->cols - k0 < X_BLOCK ? w->cols - k0 : X_BLOCK,
                rows = L - t0 < TILES_FEW ? L - t0 : TILES_FEW;
            int tiles = (int)tiles_of((size_t)n);
            for (int t = 0; t < rows; t++)
                TYPE_KERNELS[w->type].prepare(xs + t * tiles * TILE, start + t * tiles,
                                              x + (size_t)(t0 + t) * ldx + k0, n);
            TileRows p = {out + (size_t)t0 * ldo, ldo, w, bias, xs, start, k0, tiles, rows, panels,
                          pairs ? half : 0};
#pragma omp for nowait
            for (int panel = 0; panel < own; panel++) tile_panel(&p, panel);
#pragma omp for schedule(dynamic)
            for (int panel = own; panel < tasks; panel++) tile_panel(&p, panel);
        }
}

// sums (R,T) += n weights of R rows times T rows of x, the end of a row through zero-padded copies.
static void add_dots(vec *sums, const void *const *rows, Type type, const float *x, int n,
                     size_t ahead, int T) {
    int whole = n / PAIR * PAIR, left = n - whole;
    TYPE_KERNELS[type].dots(sums, rows, x, whole, ahead, T);
    if (left) {
        float end[4][PAIR] = {{0}}, x_end[PAIR] = {0};
        for (int r = 0; r < few_rows(T); r++)
            memcpy(end[r], (const char *)rows[r] + (size_t)whole * type_bytes(type),
                   (size_t)left * type_bytes(type));
        if (T == 1) memcpy(x_end, x + whole, (size_t)left * sizeof *x);
        TYPE_KERNELS[type].dots(sums, (const void *[]){end[0], end[1], end[2], end[3]},
                                T == 1 ? x_end : x + whole * T, PAIR, 0, T);
    }
}

// Rows of x go in groups of T = 8, 4, 2 or 1. packed: packed[group][pair of vectors][c][row][lane],
// rows beyond the last zero, so that the product reads a group in one run; a group of one row is
// read where it lies.
INLINE int few_group(int left) {
    return left > 4 ? 8 : left > 2 ? 4 : left;
} // T where so many rows are left
INLINE size_t few_padded(int I) { return (size_t)((I + PAIR - 1) / PAIR) * PAIR; }
static void pack_few(float *packed, const float *x, size_t ldx, int I, int L, bool halves) {
#pragma omp for
    for (int t = 0; t < (L + FEW - 1) / FEW * FEW; t++) {
        int t0 = t / FEW * FEW, T = few_group(L - t0);
        float *to = packed + (size_t)t0 * few_padded(I) + (size_t)(t - t0) * VL;
        for (int i = 0; T > 1 && t - t0 < T && i < I; i += PAIR, to += PAIR * T) {
            float end[PAIR] = {0};
            const float *from = x + (size_t)t * ldx + i;
            if (t >= L) from = end;
            else if (I - i < PAIR) memcpy(end, from, (size_t)(I - i) * sizeof *end), from = end;
            store(to, inputs_of(from, 0, halves)), store(to + T * VL, inputs_of(from, 1, halves));
        }
    }
}

// One token, or one of each of some sequences: every weight is read from memory once, and a row's
// bits do not depend on the rows beside it. A task is some rows of W, R at a time: up to 8 rows of
// x, R a half or a quarter of W apart, which makes streams that each run on without a gap; for
// more, neighbours, which the next group finds in the L2 cache. The task takes all its rows for as
// many inputs as leave x in the L1 cache. packed: room for L rounded up to 8 rows, each rounded up
// to PAIR; for L = 1 none.
enum { FEW_TASK = 16, FEW_L1 = 6144 }; // rows of W at the most; floats of x
typedef struct {
    float *out;
    size_t ldo, ldx;
    const float *x, *packed, *bias;
    const Tensor *w;
    int L, rows, streams, apart,
        end; // rows: of W in a task; end: of the first rows that streams take
} FewRows;   // out (L,O), x (L,I), packed as pack_few() leaves it, bias (O), w (O,I)

static void few_task(const FewRows *f, int task) {
    const Tensor *w = f->w;
    int O = w->rows, I = w->cols, rows = f->rows, apart = f->apart, end = f->end;
    size_t bytes = type_bytes(w->type);
    for (int t0 = 0, T; t0 < f->L; t0 += T) {
        T = few_group(f->L - t0);
        const float *xs =
            T == 1 ? f->x + (size_t)t0 * f->ldx : f->packed + (size_t)t0 * few_padded(I);
        int R = few_rows(T), step = apart == 1 ? R : 1, inputs = FEW_L1 / T,
            o0 = task * rows / f->streams;
        vec sums[FEW_TASK * FEW];
        for (int k = 0; k < rows * T; k++) sums[k] = splat(0);
        for (int i = 0; i < I; i += inputs)
            for (int k = 0, o = o0; k < rows && o < end; k += R, o += step) {
                const void *row[4];
                for (int r = 0; r < R; r++)
                    row[r] = (const char *)tensor_row(w, o + r * apart < O ? o + r * apart : o) +
                             (size_t)i * bytes;
                add_dots(sums + k * T, row, w->type, xs + (size_t)i * T,
                         I - i < inputs ? I - i : inputs, (size_t)step * I * bytes, T);
            }
        for (int t = 0; t < T && t0 + t < f->L; t++) {
            const vec *sum = sums + t;
            float *to = f->out + (size_t)(t0 + t) * f->ldo;
            if (R == 1 && o0 + rows <= O) { // neighbours: outputs side by side
                for (int k = 0, o = o0; k < rows; k += 4, o += 4)
                    sum_lanes4(to + o, sum + k * T, T, f->bias ? f->bias + o : NULL);
                continue;
            }
            for (int k = 0, o = o0; k < rows && o < end; k += R, o += step)
                for (int r = 0, at = o; r < R; r++, at += apart, sum += T)
                    if (at < O) to[at] = sum_lanes(*sum) + (f->bias ? f->bias[at] : 0);
        }
    }
}

static void matmul_few(float *out, size_t ldo, const float *x, size_t ldx, const Tensor *w,
                       const float *bias, int L, float *packed) {
    if (is_quantized(w->type)) {
        matmul_few_tiles(out, ldo, x, ldx, w, bias, L);
        return;
    }
    int O = w->rows, rows = L > 4 ? FEW_TASK : 4, streams = L > FEW ? 1 : few_rows(few_group(L)),
        apart = L > FEW ? 1 : (O + streams - 1) / streams, end = L > FEW ? O : apart;
    if (L > 1) pack_few(packed, x, ldx, w->cols, L, type_bytes(w->type) == 2);
    FewRows f = {out, ldo, ldx, x, packed, bias, w, L, rows, streams, apart, end};
    int tasks = (end * streams + rows - 1) / rows, own = own_tasks(tasks, L);
#pragma omp for nowait
    for (int task = 0; task < own; task++) few_task(&f, task);
#pragma omp for schedule(dynamic)
    for (int task = own; task < tasks; task++) few_task(&f, task);
}

// A factor of a product, (rows, depth): element (r,k) lies at data[r * ld + k], or at data[k * ld +
// r] if by_depth. The forward product needs only the first kind; the second is what makes the same
// code serve both gradients.
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

// packed: panels of MR rows of a (float32), depth-major: packed[panel][k][row]. Missing rows of the
// last panel are zero.
static void pack_rows(float *packed, const Factor *a, int rows, int depth) {
#pragma omp for
    for (int panel = 0; panel < (rows + MR - 1) / MR; panel++) {
        float *to = packed + (size_t)panel * MR * depth;
        int n = rows - panel * MR < MR ? rows - panel * MR : MR;
        const float *from = (const float *)a->data + (size_t)panel * MR * (a->by_depth ? 1 : a->ld);
        if (n < MR) memset(to, 0, (size_t)MR * depth * sizeof *to);
        if (a->by_depth)
            for (int k = 0; k < depth; k++)
                memcpy(to + (size_t)k * MR, from + k * a->ld, (size_t)n * sizeof *to);
        else
            for (int r = 0; r < n; r++)
                for (int k = 0; k < depth; k++) to[(size_t)k * MR + r] = from[r * a->ld + k];
    }
}

// panel[k][j] = b(j0 + j, k0 + k), float32; missing rows of b are zero.
static void pack_panel(float *panel, const Factor *b, int b_rows, int j0, int k0, int kc) {
    enum {
        ROWS = NR < 4 ? NR : 4,
        STRETCH = 64
    }; // inputs at a time, so that the part of the panel that is written to stays in the L1 cache
    void (*widen)(float *, const void *, size_t, size_t, int, int) = TYPE_KERNELS[b->type].widen;
    int n = b_rows - j0 < NR ? b_rows - j0 : NR;
    float rows[ROWS][STRETCH] = {{0}};
    if (is_quantized(b->type)) { // NR divides TILE, TILE divides KC
        size_t tile = (size_t)(j0 / TILE) * tiles_of(b->ld) + (size_t)(k0 / TILE);
        TYPE_KERNELS[b->type].unpack(panel,
                                     (const unsigned char *)b->data + tile * tile_bytes(b->type),
                                     j0 % TILE, (int)tiles_of((size_t)kc));
        return;
    }
    if (n < NR) memset(panel, 0, (size_t)kc * NR * sizeof *panel);
    if (b->by_depth && b->type == F32 &&
        n == NR) // training: a call a row would cost a tenth of a step
        for (int k = 0; k < kc; k++)
            memcpy(panel + k * NR, (const float *)b->data + (size_t)(k0 + k) * b->ld + j0,
                   NR * sizeof(float));
    else if (b->by_depth)
        for (int k = 0; k < kc; k++) widen(panel + k * NR, b->data, b->ld, (size_t)(k0 + k), j0, n);
    else
        for (int k = 0; k < kc; k += STRETCH)
            for (int j = 0; j < n; j += ROWS) {
                int width = kc - k < STRETCH ? kc - k : STRETCH;
                for (int i = 0; i < ROWS && j + i < n; i++)
                    widen(rows[i], b->data, b->ld, (size_t)(j0 + j + i), k0 + k, width);
                if (j + ROWS > n) memset(rows[n - j], 0, (size_t)(j + ROWS - n) * sizeof rows[0]);
                float *to = panel + (size_t)k * NR + j;
                for (int i = 0; ROWS == 4 && i < width; i += 4)
                    transpose4(to + (size_t)i * NR, NR, rows[0] + i, STRETCH);
                for (int i = 0; ROWS < 4 && i < width; i++)
                    for (int r = 0; r < ROWS; r++) to[(size_t)i * NR + r] = rows[r][i];
            }
}

// tile (MR,NR) = a (kc,MR)^T b (kc,NR): the loop where prefill spends its time.
static void micro_kernel(float *tile, const float *a, const float *b, int kc) {
    vec sum[MR][2];
    UNROLLED_FOR (int r = 0; r < MR; r++) sum[r][0] = sum[r][1] = splat(0);
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

// One task: columns j0.. of rows r0..r1 of out, the whole depth.
static void product_task(const Product *p, int r0, int r1, int j0) {
    float panel[KC * NR], tile[MR * NR];
    const int depth = p->depth, columns = p->columns;
    const int width = columns - j0 < NR ? columns - j0 : NR;
    const float *bias = p->bias;
    for (int k0 = 0; k0 < depth; k0 += KC) {
        int kc = depth - k0 < KC ? depth - k0 : KC;
        bool add = k0 || p->add;
        pack_panel(panel, &p->b, columns, j0, k0, kc);
        for (int r = r0; r < r1; r += MR) {
            micro_kernel(tile, p->packed + (size_t)r * depth + (size_t)k0 * MR, panel, kc);
            for (int i = 0; i < MR && r + i < r1; i++) {
                float *to = p->out + (size_t)(r + i) * p->ldo + j0;
                for (int j = 0; j < width; j++)
                    to[j] = tile[i * NR + j] + (add ? to[j] : bias ? bias[j0 + j] : 0);
            }
        }
    }
}

static void product(const Product *p) {
    pack_rows(p->packed, &p->a, p->rows, p->depth);
    int panels = (p->columns + NR - 1) / NR, tasks = team_size() > 1 ? PRODUCT_TASKS : 1;
    int blocks = (tasks + panels - 1) / panels;                     // few panels: cut the rows too,
    int cut = ((p->rows + blocks - 1) / blocks + MR - 1) / MR * MR; // though each packs its panel
    if (cut < 4 * MR) cut = 4 * MR;
    blocks = (p->rows + cut - 1) / cut;
#pragma omp for schedule(guided) // a thread that was held up leaves the rest to others
    for (int task = 0; task < panels * blocks; task++) {
        int r0 = task % blocks * cut, r1 = r0 + cut < p->rows ? r0 + cut : p->rows;
        product_task(p, r0, r1, task / blocks * NR);
    }
}

static Factor weight_factor(const Tensor *w, bool by_depth) {
    return (Factor){w->data, (size_t)w->cols, w->type, by_depth};
}

// Floats of scratch for products, forward and backward, of T rows with matrices whose sides are at
// most `widest`: either factor may be packed, its rows rounded up and its depth too.
static size_t matmul_floats(size_t T, size_t widest) {
    return size_mul(size_add(T, 16), size_add(widest, 32));
}

static void matmul(float *out, size_t ldo, const float *x, size_t ldx, const Tensor *w,
                   const float *bias, Rows rows) {
    if (rows.step || rows.T < MATMUL_FEW) {
        matmul_few(out, ldo, x, ldx, w, bias, rows.T, rows.packed);
        return;
    }
    Factor a = {x, ldx, F32, false}, b = weight_factor(w, false);
    product(&(Product){out, ldo, a, b, bias, false, rows.T, w->rows, w->cols, rows.packed});
}

static void matmul_backward(const MatmulGrad *d, const float *d_out, size_t ldo, const float *x,
                            size_t ldx, const Tensor *w, Rows rows) {
    const int O = w->rows, I = w->cols, T = rows.T;
    if (d->d_x) {
        Factor a = {d_out, ldo, F32, false}, b = weight_factor(w, true);
        product(&(Product){d->d_x, ldx, a, b, NULL, d->add, T, I, O, rows.packed});
    }
    if (d->d_W) {
        Factor a = {d_out, ldo, F32, true}, b = {x, ldx, F32, true};
        product(&(Product){d->d_W, (size_t)I, a, b, NULL, true, O, I, T, rows.packed});
    }
    if (d->d_bias) sum_rows(d->d_bias, d_out, ldo, T, O);
}
