// layers.cuh - embedding, norms, convolution, bias, loss: forward, step and backward. Included by
// mamba_cuda.cu.
//
// Each kernel passes over its data once. Neighbouring threads take neighbouring channels.

template <class To, class From>
__global__ void convert_kernel(To *__restrict__ to, const From *__restrict__ from, size_t n) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        put(to + i, value(from[i]));
}
template <class To, class From> static void convert(Device *d, To *to, const From *from, size_t n) {
    convert_kernel<<<std::min(blocks_for(n, 256), 4096u), 256, 0, d->stream>>>(to, from, n);
    check_launch(d, "convert");
}

__device__ inline uint64_t mix(uint64_t x) { // SplitMix64's output function
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The embedding (V,D): of type T, or in tiles of `bits` bits (quantized.cuh).
template <class T> struct EmbeddingOf {
    const void *rows;
    int D, bits;
    __device__ float at(int v, int i) const {
        if (!bits) return value(((const T *)rows)[(size_t)v * D + i]);
        const int codes = 32 / bits, across = (D + TILE - 1) / TILE, r = v % TILE;
        const unsigned char *tile =
            (const unsigned char *)rows +
            ((size_t)(v / TILE) * across + i / TILE) * (2 * TILE + bits * TILE * TILE / 8);
        const uint32_t word =
            ((const uint32_t *)(tile + 2 * TILE))[tile_word(bits, i % TILE / codes, r)] ^
            tile_signs(bits);
        const int code = (int)(word >> (bits * (i % codes)) & ((1u << bits) - 1));
        return (float)(code - (1 << (bits - 1))) *
               __uint_as_float((uint32_t)((const uint16_t *)tile)[r] << 16);
    }
};

// res (rows,D) = rows of the embedding
template <class T>
__global__ void embed_kernel(float *__restrict__ res, const int32_t *__restrict__ ids,
                             EmbeddingOf<T> embedding, int D) {
    size_t row = blockIdx.x;
    for (int i = threadIdx.x; i < D; i += blockDim.x) res[row * D + i] = embedding.at(ids[row], i);
}
template <class T>
static void embed(Device *d, float *res, const int32_t *ids, EmbeddingOf<T> embedding, int rows) {
    embed_kernel<<<(unsigned)rows, 128, 0, d->stream>>>(res, ids, embedding, embedding.D);
    check_launch(d, "embed");
}
// Token ids index device memory. 0, or -1 with a sentence.
static int check_tokens(const int32_t *ids, size_t n, int V, bool none_allowed = false) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= V || ids[i] < (none_allowed ? -1 : 0))
            return gpu_fail("token id %d at position %zu is not in the vocabulary of %d", ids[i], i,
                            V);
    return 0;
}

// V neighbouring numbers that are read or written at once.
template <class T, int V> struct alignas(sizeof(T) * V) Group {
    T v[V];
};

// out = (in - m) / sqrt(mean((in - m)^2) + eps) * weight + bias, for rows of `cols` numbers, a
// multiple of V. CENTRED: LayerNorm, where m is the row's mean; else RMSNorm, m is 0 and there is
// no bias. weight NULL: without; in may be out. TEAM threads share a row and keep it in PER groups
// of V each, or read it again (PER = 0). Where a block has one row, the weights are loaded before
// the sum is known.
template <class T, class In, int PER, int TEAM, int V, bool CENTRED = false>
__global__ void __launch_bounds__(256)
    norm_kernel(T *out, size_t ld_out, const In *in, size_t ld_in, const float *__restrict__ weight,
                const float *__restrict__ bias, float eps, int rows, int cols) {
    __shared__ float scratch[33];
    typedef Group<In, V> Read;
    typedef Group<float, V> Weights;
    size_t row = (size_t)blockIdx.x * (256 / TEAM) + threadIdx.x / TEAM;
    const int first = threadIdx.x % TEAM * V, step = TEAM * V;
    if (row >= (size_t)rows) return; // never part of a block of one row
    const In *x = in + row * ld_in;
    out += row * ld_out;
    float squares = 0, mean = 0;
    Read kept[PER + 1];
    Weights early[PER + 1];
#pragma unroll
    for (int k = 0; k < PER; k++)
        if (TEAM > 32 && weight && first + step * k < cols)
            early[k] = *(const Weights *)(weight + first + step * k);
    wait_for_input();
#pragma unroll
    for (int k = 0; k < PER; k++)
        if (first + step * k < cols) kept[k] = *(const Read *)(x + first + step * k);
    if (CENTRED) {
        auto add = [&](const Read &r) {
#pragma unroll
            for (int v = 0; v < V; v++) mean += value(r.v[v]);
        };
#pragma unroll
        for (int k = 0; k < PER; k++)
            if (first + step * k < cols) add(kept[k]);
        for (int i = first + step * PER; i < cols; i += step) add(*(const Read *)(x + i));
        mean = (TEAM > 32 ? block_sum(mean, scratch) : warp_sum(mean)) / (float)cols;
    }
    auto centred = [&](In x) { return CENTRED ? value(x) - mean : value(x); };
    auto add = [&](const Read &r) {
#pragma unroll
        for (int v = 0; v < V; v++) squares += centred(r.v[v]) * centred(r.v[v]);
    };
#pragma unroll
    for (int k = 0; k < PER; k++)
        if (first + step * k < cols) add(kept[k]);
    for (int i = first + step * PER; i < cols; i += step) add(*(const Read *)(x + i));
    squares = TEAM > 32 ? block_sum(squares, scratch) : warp_sum(squares);
    float scale = rsqrtf(squares / (float)cols + eps);
    auto store = [&](int i, const Read &r, const Weights &w) {
        Group<T, V> g;
#pragma unroll
        for (int v = 0; v < V; v++) {
            float x = centred(r.v[v]) * scale * (weight ? w.v[v] : 1.0f);
            put(&g.v[v], CENTRED ? x + bias[i + v] : x);
        }
        *(Group<T, V> *)(out + i) = g;
    };
    Weights none = {};
#pragma unroll
    for (int k = 0; k < PER; k++) {
        int i = first + step * k;
        if (i < cols)
            store(i, kept[k],
                  TEAM > 32 ? early[k]
                  : weight  ? *(const Weights *)(weight + i)
                            : none);
    }
    for (int i = first + step * PER; i < cols; i += step)
        store(i, *(const Read *)(x + i), weight ? *(const Weights *)(weight + i) : none);
}
enum { NORM_FEW = 2048 }; // rows, on an H100: a warp a row would leave multiprocessors idle

// The kernel of this shape. Rows that are not whole groups of 4, which no published model has, are
// read twice by a warp each. Only the residual stream (In: float) has rows so long that a block
// takes one.
template <class T, class In>
static auto norm_choice(bool fours, bool block, int cols, bool centred) {
    int each = (cols + (block ? 255 : 31)) / (block ? 256 : 32); // numbers of a thread
    if (centred && block) return norm_kernel<T, In, 6, 256, 4, true>;
    if (centred)
        return fours ? norm_kernel<T, In, 6, 32, 4, true> : norm_kernel<T, In, 0, 32, 1, true>;
    if (!fours) return norm_kernel<T, In, 0, 32, 1>;
    if constexpr (sizeof(In) == 4) {
        if (block)
            return each <= 4    ? norm_kernel<T, In, 1, 256, 4>
                   : each <= 12 ? norm_kernel<T, In, 3, 256, 4>
                   : each <= 24 ? norm_kernel<T, In, 6, 256, 4>
                                : norm_kernel<T, In, 0, 256, 4>;
        if (each > 12 && each <= 80)
            return each <= 24 ? norm_kernel<T, In, 6, 32, 4> : norm_kernel<T, In, 20, 32, 4>;
    }
    return each <= 12 ? norm_kernel<T, In, 3, 32, 4> : norm_kernel<T, In, 0, 32, 4>;
}
// bias NULL: RMSNorm, else LayerNorm.
template <class T, class InRow>
static void norm_rows(Device *d, Rows<T> out, Rows<InRow> in, const void *weights,
                      const void *biases, float eps, int rows, int cols) {
    const float *weight = (const float *)weights, *bias = (const float *)biases;
    typedef std::remove_const_t<InRow> In;
    bool fours = (out.ld | in.ld | (size_t)cols) % 4 == 0 &&
                 (uintptr_t)in.p % (4 * sizeof(In)) == 0 && (uintptr_t)weight % 16 == 0 &&
                 (uintptr_t)out.p % (4 * sizeof(T)) == 0;
    bool block = fours && sizeof(In) == 4 && (size_t)rows <= as_on_h100(d, NORM_FEW) && cols > 256;
    launch_dependent(d, norm_choice<T, In>(fours, block, cols, bias != NULL),
                     blocks_for((size_t)rows, block ? 1 : 8), 256, 0, out.p, out.ld, in.p, in.ld,
                     weight, bias, eps, rows, cols);
    check_launch(d, "norm_rows");
}

// FalconMamba scales dt_low (R), B_ssm (N) and C_ssm (N) of a row of xdb to a mean square of 1
// each.
struct MixerPart {
    int at, n;
};
__host__ __device__ inline MixerPart mixer_part(int part, int R, int N) {
    return part == 0 ? MixerPart{0, R} : MixerPart{R + (part - 1) * N, N};
}
template <class T> static void mixer_norms(Device *d, T *xdb, float eps, int rows, int R, int N) {
    for (int part = 0; part < 3; part++) {
        MixerPart m = mixer_part(part, R, N);
        size_t ld = (size_t)(R + 2 * N);
        norm_rows(d, Rows(xdb + m.at, ld), Rows(xdb + m.at, ld), NULL, NULL, eps, rows, m.n);
    }
}
__device__ inline void mixer_norm(float *row, MixerPart m, float eps) { // by a warp
    float squares = 0, *x = row + m.at;
    for (int i = threadIdx.x % 32; i < m.n; i += 32) squares += x[i] * x[i];
    float scale = rsqrtf(warp_sum(squares) / (float)m.n + eps);
    for (int i = threadIdx.x % 32; i < m.n; i += 32) x[i] *= scale;
}

// x (rows,cols) += bias (cols)
template <class T> __global__ void add_bias_kernel(T *x, size_t ld, const float *bias, int cols) {
    size_t row = blockIdx.x;
    for (int i = threadIdx.x; i < cols; i += blockDim.x)
        put(x + row * ld + i, value(x[row * ld + i]) + bias[i]);
}
template <class T>
static void add_bias(Device *d, T *x, size_t ld, const float *bias, int rows, int cols) {
    if (!bias) return;
    add_bias_kernel<<<(unsigned)rows, 256, 0, d->stream>>>(x, ld, bias, cols);
    check_launch(d, "add_bias");
}

// ------------------------------------------------------------------------------------------------
// conv1d + SiLU: u_t = silu(bias + sum over k of conv[k] x_{t-K+1+k}). Before the first token x is
// the window, or 0. A thread takes V channels for some steps, with their last inputs in registers;
// for K > 4 it reads them again from the cache. The threads that read the window also move it on to
// the last K-1 inputs (K > 4: conv_window_kernel does, afterwards).
enum { CONV_TAPS = 4 };

// sum + tap_k input_k of V neighbouring channels, over TAPS of the K taps, one after the other.
template <int TAPS, int V>
__device__ __forceinline__ Group<float, V> conv_sum(Group<float, V> sum, const Group<float, V> *tap,
                                                    const Group<float, V> *input) {
#pragma unroll
    for (int k = 0; k < TAPS; k++)
#pragma unroll
        for (int v = 0; v < V; v++) sum.v[v] += tap[k].v[v] * input[k].v[v];
    return sum;
}

template <class T, int V>
__global__ void conv1d_silu_kernel(T *__restrict__ u, const T *__restrict__ xz, float *window,
                                   const float *__restrict__ conv_t, const float *__restrict__ bias,
                                   int L, int E, int K, int steps, int tiles) {
    // Channels first: neighbouring blocks share rows. All in x, which alone takes 2^31 blocks.
    const int chunks = (E / V + (int)blockDim.x - 1) / (int)blockDim.x, rest = blockIdx.x / chunks,
              e = (blockIdx.x % chunks * blockDim.x + threadIdx.x) * V, t0 = rest % tiles * steps;
    if (e >= E) return;
    size_t b = rest / tiles;
    const T *x = xz + b * L * 2 * E + e;
    float *before = window ? window + b * (K - 1) * E + e : NULL;
    u += b * L * E + e;
    wait_for_input();
    auto input = [&](int t, int v) { // x_t of channel e + v
        return t >= 0                ? value(x[(size_t)t * 2 * E + v])
               : before && t + K > 0 ? before[(size_t)(t + K - 1) * E + v]
                                     : 0.0f;
    };
    int t1 = min(t0 + steps, L);
    if (K <= CONV_TAPS) {
        Group<float, V> tap[CONV_TAPS], past[CONV_TAPS],
            start; // the last K of four; past[3] is x_t
#pragma unroll
        for (int v = 0; v < V; v++) {
            start.v[v] = bias ? bias[e + v] : 0;
#pragma unroll
            for (int k = 0; k < CONV_TAPS; k++) {
                int from = k - (CONV_TAPS - K);
                tap[k].v[v] = from >= 0 ? conv_t[(size_t)from * E + e + v] : 0;
                past[k].v[v] = k ? input(t0 - CONV_TAPS + k, v) : 0;
            }
        }
#pragma unroll 8
        for (int t = t0; t < t1; t++) {
            Group<T, V> in = *(const Group<T, V> *)(x + (size_t)t * 2 * E), out;
#pragma unroll
            for (int k = 0; k + 1 < CONV_TAPS; k++) past[k] = past[k + 1];
#pragma unroll
            for (int v = 0; v < V; v++) past[CONV_TAPS - 1].v[v] = value(in.v[v]);
            Group<float, V> sum = conv_sum<CONV_TAPS>(start, tap, past);
#pragma unroll
            for (int v = 0; v < V; v++) put(&out.v[v], silu(sum.v[v]));
            *(Group<T, V> *)(u + (size_t)t * E) = out;
        }
        if (before && t0 == 0)
            for (int k = 0; k < K - 1; k++)
                for (int v = 0; v < V; v++) before[(size_t)k * E + v] = input(L - K + 1 + k, v);
    } else {
        for (int t = t0; t < t1; t++)
            for (int v = 0; v < V; v++) {
                Group<float, 1> sum = {bias ? bias[e + v] : 0};
                for (int k = 0; k < K; k++) {
                    Group<float, 1> tap = {conv_t[(size_t)k * E + e + v]},
                                    past = {input(t - K + 1 + k, v)};
                    sum = conv_sum<1>(sum, &tap, &past);
                }
                put(u + (size_t)t * E + v, silu(sum.v[0]));
            }
    }
}

// The window of each sequence after L tokens: their last K-1 inputs, older ones where L is short.
// In place: slot j reads slots from j + L on.
template <class T>
__global__ void conv_window_kernel(float *window, const T *xz, int L, int E, int K) {
    const int across = (E + (int)blockDim.x - 1) / (int)blockDim.x,
              e = blockIdx.x % across * blockDim.x + threadIdx.x;
    const size_t b = blockIdx.x / across;
    if (e >= E) return;
    window += b * (K - 1) * E + e;
    xz += b * L * 2 * E + e;
    for (int j = 0; j < K - 1; j++) {
        int t = L - (K - 1) + j;
        window[(size_t)j * E] = t >= 0 ? value(xz[(size_t)t * 2 * E]) : window[(size_t)(j + L) * E];
    }
}

// One token of each of S sequences. The window (S,K-1,E) moves on. A thread takes V channels and
// loads everything before its first store.
template <class T, int V>
__global__ void conv1d_silu_step_kernel(T *__restrict__ u, float *__restrict__ window,
                                        const T *__restrict__ xz, const float *__restrict__ conv_t,
                                        const float *__restrict__ bias, int E, int K) {
    typedef Group<float, V> Floats;
    int e = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    size_t s = blockIdx.y; // at most GPU_PIECE
    if (e >= E) return;
    float *w = window + s * (K - 1) * E + e;
    const Group<T, V> *in = (const Group<T, V> *)(xz + s * 2 * E + e);
    Floats past[CONV_TAPS] = {}, tap[CONV_TAPS] = {}, x, sum = {};
#pragma unroll
    for (int k = 0; k < CONV_TAPS - 1; k++)
        if (k < K - 1 && K <= CONV_TAPS)
            past[k] = *(const Floats *)(w + (size_t)k * E),
            tap[k] = *(const Floats *)(conv_t + (size_t)k * E + e);
    Floats last = *(const Floats *)(conv_t + (size_t)(K - 1) * E + e);
    if (bias) sum = *(const Floats *)(bias + e);
    wait_for_input();
    Group<T, V> raw = *in, out;
#pragma unroll
    for (int v = 0; v < V; v++) x.v[v] = value(raw.v[v]);
    sum = conv_sum<CONV_TAPS - 1>(conv_sum<1>(sum, &last, &x), tap, past);
    if (K <= CONV_TAPS) {
#pragma unroll
        for (int k = 0; k < CONV_TAPS - 1; k++)
            if (k < K - 1) *(Floats *)(w + (size_t)k * E) = k + 2 < K ? past[k + 1] : x;
    } else
#pragma unroll 1
        for (int k = 0; k < K - 1; k++) {
            Floats *slot = (Floats *)(w + (size_t)k * E);
            sum = conv_sum<1>(sum, (const Floats *)(conv_t + (size_t)k * E + e), slot);
            *slot = k + 2 < K ? *(const Floats *)(w + (size_t)(k + 1) * E) : x;
        }
#pragma unroll
    for (int v = 0; v < V; v++) put(&out.v[v], silu(sum.v[v]));
    *(Group<T, V> *)(u + s * E + e) = out;
}

template <class T> struct ConvArgs {
    T *u;                       // (B*L,E)
    const T *xz;                // (B*L,2E), of which x is the first half
    float *window;              // (B,K-1,E), moves on; NULL: zeros before the first token
    const float *conv_t, *bias; // (K,E), (E) or NULL
    int B, L, E, K;
    bool text; // one token is a text, too, not a step
};
template <class T> static void conv1d_silu(Device *d, const ConvArgs<T> &p) {
    const int E = p.E, pair = E % 2 == 0 ? 2 : 1,
              steps = p.L > 4096 ? 32 : 16; // 16: more blocks, each reads 3 inputs more
    auto of_text = pair == 2 ? conv1d_silu_kernel<T, 2> : conv1d_silu_kernel<T, 1>;
    auto of_token = E % 4 == 0 ? conv1d_silu_step_kernel<T, 4> : conv1d_silu_step_kernel<T, 1>;
    if (p.L == 1 && p.window && !p.text) {
        dim3 grid(blocks_for((size_t)E / (E % 4 == 0 ? 4 : 1), 128), (unsigned)p.B);
        launch_dependent(d, of_token, grid, 128, 0, p.u, p.window, p.xz, p.conv_t, p.bias, E, p.K);
    } else {
        const unsigned tiles = blocks_for((size_t)p.L, (size_t)steps);
        dim3 grid(tiles * (unsigned)p.B * blocks_for((size_t)E / pair, 128));
        launch_dependent(d, of_text, grid, 128, 0, p.u, p.xz, p.window, p.conv_t, p.bias, p.L, E,
                         p.K, steps, (int)tiles);
        if (p.window && p.K > CONV_TAPS)
            conv_window_kernel<<<(unsigned)p.B * blocks_for((size_t)E, 128), 128, 0, d->stream>>>(
                p.window, p.xz, p.L, E, p.K);
    }
    check_launch(d, "conv1d_silu");
}

// ------------------------------------------------------------------------------------------------
// [train] Column sums: out (cols) += sum over rows of x (rows,cols), in two passes of fixed order.

enum { SUM_CHUNK = 256 };

template <class T>
__global__ void sum_rows_kernel(float *out, const T *x, size_t ld, int rows, int cols, int chunk,
                                bool add) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * chunk,
        last = min(first + chunk, rows);
    if (i >= cols) return;
    float sum = 0;
    for (int r = first; r < last; r++) sum += value(x[(size_t)r * ld + i]);
    float *to = out + (size_t)blockIdx.y * cols + i;
    *to = add ? *to + sum : sum;
}
static size_t sum_rows_floats(size_t rows, size_t cols) {
    return (rows + SUM_CHUNK - 1) / SUM_CHUNK * cols;
}

template <class T>
static void sum_rows(Device *d, float *out, const T *x, size_t ld, int rows, int cols,
                     float *partial) {
    if (!out) return;
    unsigned wide = blocks_for((size_t)cols, 128), chunks = blocks_for((size_t)rows, SUM_CHUNK);
    sum_rows_kernel<<<dim3(wide, chunks), 128, 0, d->stream>>>(partial, x, ld, rows, cols,
                                                               SUM_CHUNK, false);
    sum_rows_kernel<<<dim3(wide, 1), 128, 0, d->stream>>>(out, partial, (size_t)cols, (int)chunks,
                                                          cols, (int)chunks, true);
    check_launch(d, "sum_rows");
}

// out += the sum over rows of parts (rows,cols), in a fixed order. A block takes 32 columns, each
// of its STRANDS every STRANDS-th row. Column i goes to out[i % width * K + i / width], and from K
// width on to `last`: so the convolution's parts (K+1,E) get to conv (E,K) and its bias.
enum { STRANDS = 16 };
__global__ void __launch_bounds__(32 * STRANDS)
    sum_parts_kernel(float *out, float *last, const float *__restrict__ parts, int rows, int cols,
                     int width, int K) {
    __shared__ float strands[STRANDS][32];
    const int i = blockIdx.x * 32 + threadIdx.x % 32, strand = threadIdx.x / 32;
    float sum = 0;
    wait_for_input();
    if (i < cols)
#pragma unroll 8
        for (int r = strand; r < rows; r += STRANDS) sum += parts[(size_t)r * cols + i];
    strands[strand][threadIdx.x % 32] = sum;
    __syncthreads();
    if (strand || i >= cols) return;
    for (int k = 1; k < STRANDS; k++) sum += strands[k][threadIdx.x];
    if (i < K * width) out[(size_t)(i % width) * K + i / width] += sum;
    else if (last) last[i - K * width] += sum;
}
static void sum_parts(Device *d, float *out, float *last, const float *parts, int rows, int cols,
                      int width, int K) {
    launch_dependent(d, sum_parts_kernel, blocks_for((size_t)cols, 32), 32 * STRANDS, 0, out, last,
                     parts, rows, cols, width, K);
    check_launch(d, "sum_parts");
}

// ------------------------------------------------------------------------------------------------
// [train] Backward of norm_rows: out_i = x_i s w_i with s = (mean(x^2) + eps)^-1/2, so
//     d_x_i = s (w_i d_out_i - x_i s^2 mean over j of w_j d_out_j x_j)
//     d_w_i = sum over rows of d_out_i x_i s
// With CENTRED, x is the row without its mean, and the mean of w_j d_out_j is taken from w_i
// d_out_i. A warp takes some of the rows. A lane keeps its numbers of a row and its share of d_w in
// PER registers (PER = 0: in memory). With ADD the result is added to d_x, the gradient of the
// residual stream. copy, if not NULL, gets d_x in T, which the layer before starts from.
enum { NORM_WARPS = 8 };
static unsigned norm_blocks(const Device *d) { return 2 * (unsigned)d->processors; }

template <class T, class In, class Out, bool ADD, int PER, bool CENTRED = false>
__global__ void __launch_bounds__(32 * NORM_WARPS)
    norm_backward_kernel(Out *d_x, T *copy, float *__restrict__ partial, const T *d_out,
                         size_t ld_d, const In *in, size_t ld, const float *__restrict__ weight,
                         float eps, int rows, int cols) {
    // A row of `partial` is a block's share of d_w, or, in memory, a warp's.
    __shared__ float shares[NORM_WARPS][32 * PER + 1];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *mine =
              partial && !PER ? partial + ((size_t)blockIdx.x * NORM_WARPS + warp) * cols : NULL,
          d_w[PER + 1], w[PER + 1];
#pragma unroll
    for (int k = 0; k < PER; k++)
        d_w[k] = 0, w[k] = weight && lane + 32 * k < cols ? weight[lane + 32 * k] : 1;
    wait_for_input();
    for (int i = lane + 32 * PER; i < cols && mine; i += 32) mine[i] = 0;
    for (size_t row = (size_t)blockIdx.x * NORM_WARPS + warp; row < (size_t)rows;
         row += (size_t)gridDim.x * NORM_WARPS) {
        const In *x = in + row * ld;
        const T *d = d_out + row * ld_d;
        Out *to = d_x + row * (ADD ? (size_t)cols : ld_d);
        float squares = 0, dot = 0, mean = 0, level = 0;
        float xs[PER + 1], ds[PER + 1], before[PER + 1];
#pragma unroll
        for (int k = 0; k < PER; k++) {
            int i = lane + 32 * k;
            xs[k] = i < cols ? value(x[i]) : 0, ds[k] = i < cols ? value(d[i]) : 0;
            before[k] = ADD && i < cols ? value(to[i]) : 0;
        }
        if (CENTRED) { // PER is 0
            for (int i = lane; i < cols; i += 32)
                mean += value(x[i]), level += value(d[i]) * (weight ? weight[i] : 1.0f);
            mean = warp_sum(mean) / (float)cols, level = warp_sum(level) / (float)cols;
        }
#pragma unroll
        for (int k = 0; k < PER; k++) squares += xs[k] * xs[k], dot += xs[k] * ds[k] * w[k];
        for (int i = lane + 32 * PER; i < cols; i += 32) {
            float xi = CENTRED ? value(x[i]) - mean : value(x[i]);
            squares += xi * xi, dot += xi * value(d[i]) * (weight ? weight[i] : 1.0f);
        }
        float scale = rsqrtf(warp_sum(squares) / (float)cols + eps);
        dot = warp_sum(dot) * scale * scale / (float)cols;
#pragma unroll
        for (int k = 0; k < PER; k++) {
            int i = lane + 32 * k;
            float sum = before[k] + scale * (ds[k] * w[k] - xs[k] * dot);
            if (i < cols) put(to + i, sum);
            if (i < cols && copy) put(copy + row * cols + i, sum);
            d_w[k] += ds[k] * xs[k] * scale;
        }
        for (int i = lane + 32 * PER; i < cols; i += 32) {
            float xi = CENTRED ? value(x[i]) - mean : value(x[i]), di = value(d[i]);
            float g = di * (weight ? weight[i] : 1.0f);
            float sum = scale * ((CENTRED ? g - level : g) - xi * dot);
            if (ADD) sum += value(to[i]);
            put(to + i, sum);
            if (copy) put(copy + row * cols + i, sum);
            if (mine) mine[i] += di * xi * scale;
        }
    }
    if constexpr (PER > 0) {
        if (!partial) return;
#pragma unroll
        for (int k = 0; k < PER; k++) shares[warp][lane + 32 * k] = d_w[k];
        __syncthreads();
        for (int i = threadIdx.x; i < cols; i += 32 * NORM_WARPS) {
            float sum = 0;
            for (int k = 0; k < NORM_WARPS; k++) sum += shares[k][i];
            partial[(size_t)blockIdx.x * cols + i] = sum;
        }
    }
}

// ------------------------------------------------------------------------------------------------
// [train] Backward of conv1d + SiLU. With c_t the convolution before SiLU:
//     d_c_t = d_u_t silu'(c_t)      d_x_t = sum over k of conv[k] d_c_{t+K-1-k}
//                                   d_conv[k] = sum over t of d_c_t x_{t-K+1+k}
// A thread takes V channels for CONV_BACK steps. It also computes d_c of the next K-1 steps, for
// its own d_x only. The last MAX_TAPS values of x and d_c are registers. Its sums go to partial
// (tiles, K+1, E), that of the bias last.
//
// At the ends of a chunk: x before t = 0 is the window. Steps t >= L belong to the next chunk,
// whose d_c reach this chunk's last K-1 inputs as d_after, the gradient of the window that it
// starts from. d_x of t = -K+1 .. -1, of inputs that the chunk before has read, becomes d_before,
// for that chunk. Slot j of a window is t = j - (K-1) of the chunk that starts from it.
enum { CONV_BACK = 64 };

struct ConvEnds {         // (B,K-1,E) each; all NULL: the sequence begins and ends here
    const float *window;  // before the first step
    const float *d_after; // gradient of the window after the last step
    float *d_before;      // gradient of `window`: is set
};

// ENDS: there is a chunk before or after; without, the kernel needs 8 registers less.
template <class T, int MAX_TAPS, int V, bool ENDS>
__global__ void conv1d_silu_backward_kernel(T *__restrict__ d_xz, float *__restrict__ partial,
                                            const T *__restrict__ d_u, const T *__restrict__ xz,
                                            const float *__restrict__ conv_t,
                                            const float *__restrict__ bias, ConvEnds ends, int L,
                                            int E, int K) {
    const int chunks = (E / V + (int)blockDim.x - 1) / (int)blockDim.x, // as in the forward
        rest = blockIdx.x / chunks, tiles = (L + CONV_BACK - 1) / CONV_BACK,
              e = (blockIdx.x % chunks * blockDim.x + threadIdx.x) * V,
              t0 = rest % tiles * CONV_BACK, t1 = min(t0 + CONV_BACK, L);
    if (e >= E) return;
    const size_t b = rest / tiles;
    const T *x = xz + b * L * 2 * E + e, *d = d_u + b * L * E + e;
    T *d_x = d_xz + b * L * 2 * E + e;
    const size_t of_window = b * (K - 1) * E + e;
    const float *before = ENDS ? ends.window + of_window : NULL,
                *d_after = ENDS ? ends.d_after + of_window : NULL;
    float *d_before = ENDS && t0 == 0 ? ends.d_before + of_window : NULL;
    auto input = [&](int t, int v) { // x_t of channel e + v
        return t >= 0                ? value(x[(size_t)t * 2 * E + v])
               : before && t + K > 0 ? before[(size_t)(t + K - 1) * E + v]
                                     : 0.0f;
    };
    Group<float, 1> tap[V][MAX_TAPS], past[V][MAX_TAPS], start[V];
    float d_c[MAX_TAPS][V], d_tap[MAX_TAPS][V], d_bias[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
        start[v].v[0] = bias ? bias[e + v] : 0;
        d_bias[v] = 0;
#pragma unroll
        for (int k = 0; k < MAX_TAPS;
             k++) { // tap[0] belongs to x_t, tap[k] to x_{t-k}; d_c[k] to t-k
            tap[v][k].v[0] = k < K ? conv_t[(size_t)(K - 1 - k) * E + e + v] : 0;
            d_tap[k][v] = 0, d_c[k][v] = 0;
            past[v][k].v[0] = k < MAX_TAPS - 1 ? input(t0 - 1 - k, v) : 0;
        }
    }
    auto step =
        [&](int t, bool own, bool inside,
            bool write) { // own: in this tile; inside: in the text; write: d_x_{t-K+1} is due
            Group<T, V> in = {}, d_in = {}, out;
            if (inside)
                in = *(const Group<T, V> *)(x + (size_t)t * 2 * E),
                d_in = *(const Group<T, V> *)(d + (size_t)t * E);
#pragma unroll
            for (int v = 0; v < V; v++) {
#pragma unroll
                for (int k = MAX_TAPS - 1; k > 0; k--)
                    past[v][k] = past[v][k - 1], d_c[k][v] = d_c[k - 1][v];
                past[v][0].v[0] = inside ? value(in.v[v]) : 0;
                const float c = conv_sum<MAX_TAPS>(start[v], tap[v], past[v]).v[0];
                float s = sigmoid(c);
                d_c[0][v] = inside ? value(d_in.v[v]) * s * (1 + c * (1 - s)) : 0;
                if (own) {
#pragma unroll
                    for (int k = 0; k < MAX_TAPS; k++) d_tap[k][v] += d_c[0][v] * past[v][k].v[0];
                    d_bias[v] += d_c[0][v];
                }
                // d_x_{t-K+1}: tap[k] meets d_c of k steps later, which is d_c[K-1-k]; after the
                // last step also what the next chunk adds to it
                float sum = inside || !d_after ? 0 : d_after[(size_t)(t - L) * E + v];
#pragma unroll
                for (int k = 0; k < MAX_TAPS; k++)
#pragma unroll
                    for (int j = 0; j < MAX_TAPS; j++)
                        if (j == K - 1 - k) sum += tap[v][k].v[0] * d_c[j][v];
                put(&out.v[v], sum);
                if (!write && d_before) d_before[(size_t)t * E + v] = sum; // t < K-1
            }
            if (write) *(Group<T, V> *)(d_x + (size_t)(t - (K - 1)) * 2 * E) = out;
        };
    int t = t0;
    for (; t < min(t0 + K - 1, t1); t++) step(t, true, true, false);
    // 16 taps are rare: unrolled, their four kernels cost 5 s of the build.
#pragma unroll(MAX_TAPS <= 4 ? 4 : 1)
    for (; t < t1; t++) step(t, true, true, true);
    for (; t < t1 + K - 1; t++) step(t, false, t < L, t - (K - 1) >= t0);
    float *to = partial + (size_t)rest * (K + 1) * E + e;
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int k = 0; k < MAX_TAPS; k++)
            if (k < K) to[(size_t)(K - 1 - k) * E + v] = d_tap[k][v];
        to[(size_t)K * E + v] = d_bias[v];
    }
}

// ------------------------------------------------------------------------------------------------
// [train] Cross-entropy: losses_t = -log p(target), d_logits = weight (p - 1 at the target); both 0
// where the target is -1. d_logits may be the logits. A block takes a row. With KEEP it holds the
// row in shared memory for the gradient, so that device memory is read once.

template <class T, bool KEEP>
__global__ void __launch_bounds__(1024)
    cross_entropy_kernel(float *__restrict__ losses, T *d_logits, const float *logits,
                         const int32_t *__restrict__ targets, float weight, int V) {
    constexpr int EACH = 16 / sizeof(float); // numbers that a thread takes at once
    typedef Group<float, EACH> Read;
    extern __shared__ float4 shared_row[];
    __shared__ float scratch[33];
    Read *kept = (Read *)shared_row;
    size_t row = blockIdx.x;
    wait_for_input();
    const float *x = logits + row * V;
    T *out = d_logits ? d_logits + row * V : NULL;
    int target = targets[row];
    if (target < 0) {
        if (out)
            for (int v = threadIdx.x; v < V; v += blockDim.x) put(out + v, 0.0f);
        if (threadIdx.x == 0) losses[row] = 0;
        return;
    }
    const float of_target = value(x[target]); // before the gradient takes its place
    float highest = -INFINITY, sum = 0;
    const bool whole = V % EACH == 0;
#pragma unroll 4
    for (int v = threadIdx.x; v < V / EACH && whole; v += blockDim.x) {
        Read some = ((const Read *)x)[v];
        if (KEEP) kept[v] = some; // read again by the same thread
        float top = value(some.v[0]);
#pragma unroll
        for (int k = 1; k < EACH; k++) top = fmaxf(top, value(some.v[k]));
        // One reading: the sum is rescaled when a higher logit appears.
        if (top > highest) sum *= __expf(highest - top), highest = top;
#pragma unroll
        for (int k = 0; k < EACH; k++) sum += __expf(value(some.v[k]) - highest);
    }
    for (int v = threadIdx.x; v < V && !whole; v += blockDim.x) {
        float xv = value(x[v]);
        if (xv > highest) sum *= __expf(highest - xv), highest = xv;
        sum += __expf(xv - highest);
    }
    float top = block_max(highest, scratch);
    sum = block_sum(highest == -INFINITY ? 0 : sum * __expf(highest - top), scratch);
    float log_sum = top + logf(sum);
    if (threadIdx.x == 0) losses[row] = log_sum - of_target;
    if (!out) return;
    auto gradient = [&](float xv, int v) {
        return weight * (__expf(xv - log_sum) - (v == target ? 1.0f : 0.0f));
    };
#pragma unroll 4
    for (int v = threadIdx.x; v < V / EACH && whole; v += blockDim.x) {
        Read some = KEEP ? kept[v] : ((const Read *)x)[v];
        Group<T, EACH> to;
#pragma unroll
        for (int k = 0; k < EACH; k++) put(&to.v[k], gradient(value(some.v[k]), EACH * v + k));
        ((Group<T, EACH> *)out)[v] = to;
    }
    for (int v = threadIdx.x; v < V && !whole; v += blockDim.x)
        put(out + v, gradient(value(x[v]), v));
}
template <class T>
static void cross_entropy(Device *d, float *losses, T *d_logits, const float *logits,
                          const int32_t *targets, float weight, int rows, int V) {
    const int bytes = V * (int)sizeof(float);
    const bool keep = d_logits && bytes % 16 == 0 && bytes + 2048 <= d->shared_limit;
    auto kernel = keep ? cross_entropy_kernel<T, true> // 2048: scratch, the system's
                       : cross_entropy_kernel<T, false>;
    launch_dependent(d, kernel, (unsigned)rows,
                     !keep      ? 512
                     : V < 4096 ? 256
                                : 1024,
                     keep ? (size_t)bytes : 0, losses, d_logits, logits, targets, weight, V);
    check_launch(d, "cross_entropy");
}

// One block adds n floats to *sum (double) in a fixed order.
__global__ void sum_losses_kernel(double *sum, const float *x, int n) {
    __shared__ double part[256];
    double mine = 0;
    for (int i = threadIdx.x; i < n; i += 256) mine += (double)x[i];
    part[threadIdx.x] = mine;
    __syncthreads();
    for (int half = 128; half; half /= 2) {
        if ((int)threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *sum += part[0];
}

// ------------------------------------------------------------------------------------------------
// [train] Backward of embed. Rows of the same token are summed in pieces of EMBED_PIECE, then the
// pieces are, so the order is fixed. `order` lists the rows by token; piece i is
// order[start[i]..start[i+1]), all of one token.

enum { EMBED_PIECE = 64 };

__global__ void embed_pieces_kernel(float *__restrict__ partial, const float *__restrict__ d_res,
                                    const int32_t *__restrict__ order,
                                    const int32_t *__restrict__ start, int D) {
    int piece = blockIdx.x;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        float sum = 0;
        for (int r = start[piece]; r < start[piece + 1]; r++)
            sum += d_res[(size_t)order[r] * D + i];
        partial[(size_t)piece * D + i] = sum;
    }
}
__global__ void embed_add_kernel(float *d_embedding, const float *partial, const int32_t *token,
                                 const int32_t *first, int D) {
    size_t id = (size_t)token[blockIdx.x];
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        float sum = 0;
        for (int p = first[blockIdx.x]; p < first[blockIdx.x + 1]; p++)
            sum += partial[(size_t)p * D + i];
        d_embedding[id * D + i] += sum;
    }
}
