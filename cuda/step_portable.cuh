// step_portable.cuh - one token in bf16 or f16 on any GPU. Included by mamba_cuda.cu.
//   1 bf16: dt_proj, FalconMamba's norms and the step of the scan in one kernel
//   2 up to 16 sequences: four kernels a layer
// More sequences take block(), whose products are cuBLAS's.

// ------------------------------------------------------------------------------------------------
// 1 delta = softplus(W_dt dt_low + dt_bias) comes from the tensor cores and stays in shared memory.
// That saves a launch and a product that are all latency. A block is 128 channels of four
// sequences: a lane 4 channels, a warp a sequence. W_dt, A_neg and the states are loaded before the
// input is there.

enum { DT_STEP_STATES = 16, DT_STEP_WIDTH = 128, DT_STEP_ROWS = 4 };
struct DtStepArgs {
    bf16 *out;                             // (S,E)
    float *h;                              // (S,N,E)
    const bf16 *xdb, *u, *z, *W_dt;        // (S,R+2N), (S,E), (S,E) of rows 2 E apart, (E,R)
    const float *dt_bias, *A_neg, *D_skip; // (E), (N,E), (E)
    int S, E, N, R;
    float norm_eps;
};
__global__ void __launch_bounds__(128) dt_scan_step(DtStepArgs p) {
    constexpr int NS = DT_STEP_STATES, WIDTH = DT_STEP_WIDTH, ROWS = DT_STEP_ROWS;
    extern __shared__ float4 shared[];
    const int S = p.S, E = p.E, N = p.N, R = p.R, P = R + 2 * N, pitch = R + 8,
              warp = threadIdx.x / 32, lane = threadIdx.x % 32, channels = blockIdx.x * WIDTH,
              s0 = blockIdx.y * ROWS, e = channels + 4 * lane;
    float *A = (float *)shared, *xdb = A + NS * WIDTH,
          *dt = xdb + ROWS * P;                  // (N,WIDTH), (ROWS,P), (ROWS,WIDTH+4)
    bf16 *W = (bf16 *)(dt + ROWS * (WIDTH + 4)); // (WIDTH,pitch)
    const bool live = e < E && s0 + warp < S;
    const size_t at = (size_t)(live ? e : 0), s = (size_t)(live ? s0 + warp : s0);
    for (int i = threadIdx.x; i < WIDTH * (R / 8); i += 128) {
        int row = i / (R / 8), k = i % (R / 8) * 8;
        if (channels + row < E)
            copy_16(shared_address(W + row * pitch + k), p.W_dt + (size_t)(channels + row) * R + k);
    }
    for (int i = threadIdx.x; i < N * (WIDTH / 4); i += 128) {
        int n = i / (WIDTH / 4), c = i % (WIDTH / 4) * 4;
        if (channels + c < E)
            copy_16(shared_address(A + n * WIDTH + c), p.A_neg + (size_t)n * E + channels + c);
    }
    float *state = p.h + s * N * E + at;
    float4 before[NS], bias = load4(p.dt_bias + at), skip = load4(p.D_skip + at);
#pragma unroll
    for (int n = 0; n < NS; n++)
        if (n < N) before[n] = load4(state + (size_t)n * E);
    wait_for_input();
    for (int i = threadIdx.x; i < ROWS * P / 8; i += 128) {
        uint4 x = s0 + i / (P / 8) < S ? ((const uint4 *)(p.xdb + (size_t)s0 * P))[i]
                                       : make_uint4(0, 0, 0, 0);
        float4 *to = (float4 *)(xdb + 8 * i);
        to[0] = make_float4(low_half(x.x), high_half(x.x), low_half(x.y), high_half(x.y));
        to[1] = make_float4(low_half(x.z), high_half(x.z), low_half(x.w), high_half(x.w));
    }
    uint2 u_pairs = *(const uint2 *)(p.u + s * E + at),
          z_pairs = *(const uint2 *)(p.z + s * 2 * E + at);
    copies_done();
    __syncthreads();
    if (p.norm_eps > 0) { // dt_low, B_ssm, C_ssm each to a mean square of 1
        for (int part = 0; part < 3; part++)
            mixer_norm(xdb + warp * P, mixer_part(part, R, N), p.norm_eps);
        __syncthreads();
    }
    float sum[4][4] =
        {}; // of 32 channels a warp, eight at a time; the order of inputs is thin_kernel's
    for (int k = lane % 4 * 8; k < (R + 31) / 32 * 32; k += 32) {
        uint4 x = make_uint4(0, 0, 0, 0); // four of the 16 rows of the product exist
        if (lane / 4 < ROWS && k < R) {
            float4 a = load4(xdb + lane / 4 * P + k), b = load4(xdb + lane / 4 * P + k + 4);
            x = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int row = 32 * warp + 8 * n + lane / 4;
            uint4 w = k < R && channels + row < E ? *(const uint4 *)(W + row * pitch + k)
                                                  : make_uint4(0, 0, 0, 0);
            tensor_product(sum[n], x.x, 0, x.y, 0, w.x, w.y);
            tensor_product(sum[n], x.z, 0, x.w, 0, w.z, w.w);
        }
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
        for (int i = 0; i < 2; i++)
            if (lane / 4 < ROWS)
                dt[lane / 4 * (WIDTH + 4) + 32 * warp + 8 * n + lane % 4 * 2 + i] = sum[n][i];
    __syncthreads();
    if (!live) return;
    float raw[4], start[4], y[4], delta[4], inject[4],
        u[4] = {low_half(u_pairs.x), high_half(u_pairs.x), low_half(u_pairs.y),
                high_half(u_pairs.y)};
    unpack(raw, load4(dt + warp * (WIDTH + 4) + 4 * lane)), unpack(start, bias), unpack(y, skip);
#pragma unroll
    for (int v = 0; v < 4; v++)
        delta[v] = softplus(raw[v] + start[v]), inject[v] = delta[v] * u[v], y[v] *= u[v],
        delta[v] *= LOG2E;
    const float *B_ssm = xdb + warp * P + R, *C_ssm = B_ssm + N;
#pragma unroll
    for (int n = 0; n < NS; n++)
        if (n < N) {
            float a[4], h[4], B = B_ssm[n], C = C_ssm[n];
            unpack(a, load4(A + n * WIDTH + 4 * lane)), unpack(h, before[n]);
#pragma unroll
            for (int v = 0; v < 4; v++) {
                step_state(h[v], y[v], exp2_fast(delta[v] * a[v]), inject[v] * B, C);
            }
            *(float4 *)(state + (size_t)n * E) = make_float4(h[0], h[1], h[2], h[3]);
        }
    gate_pair(y[0], y[1], low_half(z_pairs.x), high_half(z_pairs.x));
    gate_pair(y[2], y[3], low_half(z_pairs.y), high_half(z_pairs.y));
    *(uint2 *)(p.out + s * E + e) = make_uint2(pack(y[0], y[1]), pack(y[2], y[3]));
}

static size_t dt_step_shared(int R, int N) {
    return 4 * (DT_STEP_STATES * DT_STEP_WIDTH +
                DT_STEP_ROWS * ((size_t)R + 2 * N + DT_STEP_WIDTH + 4)) +
           2 * (size_t)DT_STEP_WIDTH * (R + 8);
}
// Where it fits, and where channels are so few that launches cost more than bytes. It gains 5% of a
// step of 130M with 64 sequences and 2% of 370M; 2.8B gained nothing, 256 sequences lost up to 10%.
static bool dt_step_pays(const Device *d, int S, int E, int N, int R) {
    return (size_t)S * E < as_on_h100(d, 1 << 18) && E % 8 == 0 && R % 8 == 0 &&
           (R + 2 * N) % 8 == 0 && N <= DT_STEP_STATES &&
           dt_step_shared(R, N) < std::min((size_t)100000, (size_t)d->shared_limit);
}
static void dt_step(Device *d, const DtStepArgs &p) {
    dim3 grid(blocks_for((size_t)p.E, DT_STEP_WIDTH), blocks_for((size_t)p.S, DT_STEP_ROWS));
    check_cuda(d, launch_dependent(d, dt_scan_step, grid, 128, dt_step_shared(p.R, p.N), p),
               "scan");
}

// ------------------------------------------------------------------------------------------------
// 2 At batch 1 a step is 0.26 GB of weights and a hundred kernels that depend on each other. So
// what counts is their number, and that each has its weights on the way before its input is there:
// they start while the kernel ahead still runs, and load their first weights before they wait for
// it.
//   1 in_proj    of the residual stream. The norm's weight is applied to the inputs, its factor to
//                the sums (f16: the norm is a kernel of its own)
//   2 x_proj     of silu(conv(x)), computed as it is read; sums of n_parts parts of the channels
//   3 dt_proj, the step of the scan, the gate. Moves the window on, which kernel 2 has read
//   4 out_proj   added to the residual stream
// Kernels 1, 2, 4 and the head are one, thin_kernel: S rows of activations times W (O,I). A warp
// takes 8*NT outputs and a part of I. Two m16n8k16 tensor-core products, with activations as the 16
// rows, do 32 inputs. Both sides must agree which of the 32 inputs is which k of a product; lane j
// of 4 takes inputs 8j..8j+7, one load of 16 bytes. AHEAD: such groups of weights are on the way.

enum { THIN_MAX = 16, THIN_WARPS = 8, K_SPLIT_MAX = 16 };

template <class T> struct PlainSourceOf { // rows of T
    const T *x;
    static constexpr bool norm = false;
    __device__ uint4 eight(int s, int k, int I, float *) const {
        return *(const uint4 *)(x + (size_t)s * I + k);
    }
};
// Rows of the residual stream times the norm's weight. Their squares are summed for its factor.
template <class T> struct NormSourceOf {
    const float *res, *weight;
    float eps;
    static constexpr bool norm = true;
    __device__ uint4 eight(int s, int k, int I, float *squares) const {
        const float4 *x = (const float4 *)(res + (size_t)s * I + k),
                     *w = (const float4 *)(weight + k);
        float4 a = x[0], b = x[1], c = w[0], d = w[1];
        *squares += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y +
                    b.z * b.z + b.w * b.w;
        return make_uint4(pack_of<T>(a.x * c.x, a.y * c.y), pack_of<T>(a.z * c.z, a.w * c.w),
                          pack_of<T>(b.x * d.x, b.y * d.y), pack_of<T>(b.z * d.z, b.w * d.w));
    }
};
template <class T> struct ConvSourceOf { // u = silu(conv(x)) of the x half of xz and the window
    const T *xz;
    const float *window, *conv_t, *bias;
    int K;
    static constexpr bool norm = false;
    __device__ uint4 eight(int s, int k, int E, float *) const {
        uint4 x = *(const uint4 *)(xz + (size_t)s * 2 * E + k);
        Group<float, 4> v[2] = {{low_of<T>(x.x), high_of<T>(x.x), low_of<T>(x.y), high_of<T>(x.y)},
                                {low_of<T>(x.z), high_of<T>(x.z), low_of<T>(x.w), high_of<T>(x.w)}};
        typedef const Group<float, 4> *Four;
        Group<float, 4> sum[2] = {};
        float out[8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float *tap = conv_t + (size_t)(K - 1) * E + k + 4 * half;
            Group<float, 4> last = {tap[0], tap[1], tap[2], tap[3]};
            for (int i = 0; i < 4; i++) sum[half].v[i] = bias ? bias[k + 4 * half + i] : 0;
            sum[half] = conv_sum<1>(sum[half], &last, v + half);
        }
        for (int j = 0; j < K - 1; j++) {
            Four taps = (Four)(conv_t + (size_t)j * E + k),
                 inputs = (Four)(window + ((size_t)s * (K - 1) + j) * E + k);
            Group<float, 4> tap[2] = {taps[0], taps[1]}, input[2] = {inputs[0], inputs[1]};
#pragma unroll
            for (int half = 0; half < 2; half++)
                sum[half] = conv_sum<1>(sum[half], tap + half, input + half);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = silu(sum[i / 4].v[i % 4]);
        return make_uint4(pack_of<T>(out[0], out[1]), pack_of<T>(out[2], out[3]),
                          pack_of<T>(out[4], out[5]), pack_of<T>(out[6], out[7]));
    }
};

template <class T> struct StoreSinkOf { // out (S,O) = sums, as T
    T *out;
    __device__ void take(int s, int o, int, int O, float x) const {
        put(out + (size_t)s * O + o, x);
    }
};
typedef PlainSourceOf<bf16> PlainSource;
typedef NormSourceOf<bf16> NormSource;
typedef ConvSourceOf<bf16> ConvSource;
typedef StoreSinkOf<bf16> StoreSink;
struct AddSink { // out (S,O) += sums
    float *out;
    __device__ void take(int s, int o, int, int O, float x) const { out[(size_t)s * O + o] += x; }
};
struct LogitSink { // out (S,O) = sums
    float *out;
    __device__ void take(int s, int o, int, int O, float x) const { out[(size_t)s * O + o] = x; }
};
struct PartSink { // out (parts,S,O) = sums
    float *out;
    __device__ void take(int s, int o, int S, int O, float x) const {
        out[((size_t)blockIdx.y * S + s) * O + o] = x;
    }
};

template <class T, int NT, int AHEAD, class Source, class Sink>
__global__ void __launch_bounds__(32 * THIN_WARPS)
    thin_kernel(Source source, Sink sink, const T *__restrict__ W, int S, int O, int I,
                Ahead ahead) {
    constexpr int COLS = 8 * NT, PITCH = COLS + 1;
    extern __shared__ float sums[]; // (THIN_WARPS, 16, PITCH), then the squares (THIN_WARPS, 16)
    float *squares = sums + THIN_WARPS * 16 * PITCH;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, s = lane / 4, o0 = blockIdx.x * COLS;
    int steps = (I + 31) / 32, parts = gridDim.y * THIN_WARPS,
        part = blockIdx.y * THIN_WARPS + warp;
    int step = steps * part / parts, end = steps * (part + 1) / parts, k = step * 32 + lane % 4 * 8;
    float c[NT][4] = {}, square[2] = {};
    uint4 w[AHEAD][NT];
    auto load_weights = [&]() { // of the next AHEAD steps: 8 of each of NT outputs
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int n = 0; n < NT; n++) {
                int o = o0 + 8 * n + s, at = k + 32 * i;
                bool inside = o < O && step + i < end && at < I;
                w[i][n] = inside ? __ldcs((const uint4 *)(W + (size_t)o * I + at))
                                 : make_uint4(0, 0, 0, 0);
            }
    };
    load_weights();
    ask(ahead);
    wait_for_input();
    while (step < end) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int at = k + 32 * i;
            bool inside = step + i < end && at < I;
            uint4 a = inside && s < S ? source.eight(s, at, I, &square[0]) : make_uint4(0, 0, 0, 0);
            uint4 b = inside && s + 8 < S ? source.eight(s + 8, at, I, &square[1])
                                          : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                tensor_product_of<T>(c[n], a.x, b.x, a.y, b.y, w[i][n].x, w[i][n].y);
                tensor_product_of<T>(c[n], a.z, b.z, a.w, b.w, w[i][n].z, w[i][n].w);
            }
        }
        step += AHEAD, k += 32 * AHEAD;
        if (step < end) load_weights();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = 8 * half + s;
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 2; i++)
                sums[(warp * 16 + row) * PITCH + 8 * n + lane % 4 * 2 + i] = c[n][2 * half + i];
        if (Source::norm) {
            float x = square[half];
            x += __shfl_xor_sync(0xffffffffu, x, 1);
            x += __shfl_xor_sync(0xffffffffu, x, 2);
            if (lane % 4 == 0) squares[warp * 16 + row] = x;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < S * COLS; i += 32 * THIN_WARPS) {
        int row = i / COLS, o = i % COLS;
        if (o0 + o >= O) continue;
        float x = 0, square_sum = 0;
#pragma unroll
        for (int v = 0; v < THIN_WARPS; v++) {
            x += sums[(v * 16 + row) * PITCH + o];
            if (Source::norm) square_sum += squares[v * 16 + row];
        }
        if constexpr (Source::norm) x *= rsqrtf(square_sum / (float)I + source.eps);
        sink.take(row, o0 + o, S, O, x);
    }
}

// Kernel 3. A thread is a channel, a block 128 channels of one sequence. It adds up the parts of
// xdb, applies FalconMamba's norms, then delta = softplus(W_dt dt_low + bias), the step of the
// recurrence and the gate.
template <class T> struct ThinScanArgs {
    T *g;                                  // (S,E)
    float *h, *window;                     // (S,N,E), (S,K-1,E)
    const float *parts;                    // (n_parts,S,P): sums of parts of x_proj
    const T *xz, *W_dt;                    // (S,2E), (E,R)
    const float *conv_t, *conv_bias;       // (K,E), (E) or NULL
    const float *dt_bias, *A_neg, *D_skip; // (E), (N,E), (E)
    int n_parts, E, N, K, R;
    float norm_eps; // of FalconMamba's norms, or 0
    Ahead ahead;
};
// Loaded before the input is there: NS states, RV groups of 8 weights of dt_proj.
template <class T, int NS, int RV>
__global__ void __launch_bounds__(128) thin_scan_kernel(ThinScanArgs<T> p) {
    const int E = p.E, N = p.N, K = p.K, R = p.R, n_parts = p.n_parts;
    const float norm_eps = p.norm_eps;
    T *__restrict__ g = p.g;
    float *__restrict__ h = p.h, *__restrict__ window = p.window;
    const T *__restrict__ xz = p.xz, *__restrict__ W_dt = p.W_dt;
    const float *__restrict__ parts = p.parts, *__restrict__ conv_t = p.conv_t,
                              *__restrict__ conv_bias = p.conv_bias,
                              *__restrict__ dt_bias = p.dt_bias, *__restrict__ A_neg = p.A_neg,
                              *__restrict__ D_skip = p.D_skip;
    extern __shared__ float xdb[]; // (P)
    int P = R + 2 * N, s = blockIdx.y, S = gridDim.y, e = blockIdx.x * 128 + threadIdx.x;
    bool live = e < E;
    size_t at = (size_t)(live ? e : 0);
    float A[NS];
#pragma unroll
    for (int n = 0; n < NS; n++) A[n] = n < N ? A_neg[(size_t)n * E + at] : 0;
    uint4 weights[RV];
    const T *row = W_dt + at * R;
#pragma unroll
    for (int i = 0; i < RV; i++)
        weights[i] = R % 8 == 0 && 8 * i < R ? ((const uint4 *)row)[i] : make_uint4(0, 0, 0, 0);
    float bias = conv_bias ? conv_bias[at] : 0, dt_start = dt_bias[at], skip = D_skip[at];
    float last_tap = conv_t[(size_t)(K - 1) * E + at];
    float ahead[NS], past[3], conv = bias, *state = h + (size_t)s * N * E + at;
    float *inputs = window + (size_t)s * (K - 1) * E + at;
#pragma unroll
    for (int n = 0; n < NS; n++) ahead[n] = n < N ? state[(size_t)n * E] : 0;
#pragma unroll
    for (int k = 0; k < 3; k++) past[k] = k < K - 1 ? inputs[(size_t)k * E] : 0;
    if (K <= 4)
#pragma unroll
        for (int k = 0; k < 3; k++) conv += k < K - 1 ? conv_t[(size_t)k * E + at] * past[k] : 0;
    else
        for (int k = 0; k < K - 1; k++) conv += conv_t[(size_t)k * E + at] * inputs[(size_t)k * E];
    ask(p.ahead);
    wait_for_input();
    float x = value(xz[(size_t)s * 2 * E + at]), z = value(xz[(size_t)s * 2 * E + E + at]);
    for (int i = threadIdx.x; i < P; i += 128) {
        float sum = 0;
#pragma unroll 8
        for (int part = 0; part < n_parts; part++) sum += parts[((size_t)part * S + s) * P + i];
        xdb[i] = sum;
    }
    __syncthreads();
    if (norm_eps > 0) { // FalconMamba: a warp a part
        if (threadIdx.x / 32 < 3) mixer_norm(xdb, mixer_part(threadIdx.x / 32, R, N), norm_eps);
        __syncthreads();
    }
    if (!live) return;
    // u once more. The window moves on only now, after kernel 2 has read it.
#pragma unroll
    for (int k = 0; k < 3; k++)
        if (K <= 4 && k < K - 1) inputs[(size_t)k * E] = k + 2 < K ? past[k < 2 ? k + 1 : 2] : x;
    for (int k = 0; k < K - 1 && K > 4; k++)
        inputs[(size_t)k * E] = k + 2 < K ? inputs[(size_t)(k + 1) * E] : x;
    float u = value(to<T>(silu(conv + last_tap * x)));
    auto eight = [&](uint4 w, const float *in) {
        return low_of<T>(w.x) * in[0] + high_of<T>(w.x) * in[1] + low_of<T>(w.y) * in[2] +
               high_of<T>(w.y) * in[3] + low_of<T>(w.z) * in[4] + high_of<T>(w.z) * in[5] +
               low_of<T>(w.w) * in[6] + high_of<T>(w.w) * in[7];
    };
    int ready = R % 8 == 0 ? min(R, 8 * RV) : 0;
    float dt = dt_start;
#pragma unroll
    for (int i = 0; i < RV; i++)
        if (8 * i < ready) dt += eight(weights[i], xdb + 8 * i);
    if (R % 8 == 0)
        for (int r = ready; r < R; r += 8) dt += eight(*(const uint4 *)(row + r), xdb + r);
    else
        for (int r = 0; r < R; r++) dt += value(row[r]) * xdb[r];
    float delta = softplus(dt), y = skip * u, inject = delta * u;
    const float *B_ssm = xdb + R, *C_ssm = B_ssm + N;
#pragma unroll
    for (int n = 0; n < NS; n++)
        if (n < N) {
            step_state(ahead[n], y, __expf(delta * A[n]), inject * B_ssm[n], C_ssm[n]);
            state[(size_t)n * E] = ahead[n];
        }
    for (int n = NS; n < N; n++) {
        float next = state[(size_t)n * E], decay = __expf(delta * A_neg[(size_t)n * E + e]);
        step_state(next, y, decay, inject * B_ssm[n], C_ssm[n]);
        state[(size_t)n * E] = next;
    }
    put(g + (size_t)s * E + e, y * silu(z));
}

struct ThinSize {       // of a product y (S,O) = x (S,I) W^T, W (O,I)
    int S, O, I, parts; // parts: I is cut into so many, each with sums of its own
    Ahead ahead;
};

// Few outputs a block, so that every multiprocessor has blocks. A warp loads as many groups of
// weights ahead as it has.
template <int NT, int AHEAD, class T, class Source, class Sink>
static void thin_launch(Device *d, Source source, Sink sink, const T *W, const ThinSize &n) {
    size_t shared = (size_t)THIN_WARPS * 16 * (8 * NT + 2) * sizeof(float);
    launch_dependent(d, thin_kernel<T, NT, AHEAD, Source, Sink>,
                     dim3(blocks_for((size_t)n.O, 8 * NT), (unsigned)n.parts),
                     32 * (unsigned)THIN_WARPS, shared, source, sink, W, n.S, n.O, n.I, n.ahead);
}
template <class T, class Source, class Sink>
static void thin_product(Device *d, Source source, Sink sink, const T *W, const ThinSize &n) {
    int steps = (n.I + 31) / 32 / (THIN_WARPS * n.parts); // of a warp
    const size_t rows = (size_t)n.O;
    if (n.parts > 1 && steps > 1) thin_launch<2, 2>(d, source, sink, W, n);
    else if (rows >= as_on_h100(d, 16384)) thin_launch<4, 3>(d, source, sink, W, n);
    else if (rows >= as_on_h100(d, 8192)) thin_launch<2, 5>(d, source, sink, W, n);
    else if (steps <= 1) thin_launch<1, 1>(d, source, sink, W, n);
    else if (steps <= 3) thin_launch<1, 3>(d, source, sink, W, n);
    else if (steps <= 4) thin_launch<1, 4>(d, source, sink, W, n);
    else if (steps == 7 || steps == 8) thin_launch<1, 8>(d, source, sink, W, n);
    else thin_launch<1, 6>(d, source, sink, W, n);
}

#include "step_packed.cuh"

// W: of type T, or with bf16 sources in tiles of `bits` bits.
template <class T = bf16, class Source, class Sink>
static void thin_or_packed(Device *d, int bits, Source source, Sink sink, const void *W,
                           const ThinSize &n) {
    if constexpr (std::is_same<T, bf16>::value) {
        if (bits == 8) return packed_bits<8>(d, source, sink, W, n);
        if (bits == 4) return packed_bits<4>(d, source, sink, W, n);
    }
    thin_product(d, source, sink, (const T *)W, n);
}

// Whether these kernels fit: 16-byte loads need rows of whole groups of 8 weights, and the norm
// must be a factor of the sums.
static bool thin_fits(const Gpu *g, int S) {
    const Config *c = &g->config;
    return (g->bf16_compute || g->f16_compute) && S <= THIN_MAX && c->D % 8 == 0 && c->E % 8 == 0 &&
           !(c->flags & (FLAG_PROJ_BIAS | FLAG_LAYER_NORM)) &&
           (c->R + 2 * c->N) * sizeof(float) < 48000;
}

// network() and the head for one token of each of S sequences; res has their embeddings.
template <class T> static void thin_step(Gpu *g, int S) {
    Device *d = &g->device;
    const Config *c = &g->config;
    BlockActs<T> a = acts_of<T>(g);
    int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N;
    int parts = std::max(1, std::min((int)K_SPLIT_MAX, (E / 32 + THIN_WARPS - 1) / THIN_WARPS));
    float *sums = x_proj_parts(g); // (K_SPLIT_MAX,S,P)
    float eps = c->flags & FLAG_MIXER_NORM ? c->mixer_eps : 0;
    const int bits = g->unpacking.bits;
    dim3 scan_grid(blocks_for((size_t)E, 128), (unsigned)S);
    // The product of W (O,D) and the norm of the residual stream.
    auto normed = [&](const void *weight, auto sink, const void *W, int O) {
        if constexpr (std::is_same<T, bf16>::value) {
            NormSource source{g->res, (const float *)weight, c->norm_eps};
            thin_or_packed<T>(d, bits, source, sink, W, {S, O, D, 1, {}});
        } else { // float16 may not reach to numbers before their norm
            norm_rows(d, Rows(a.xn, D), Rows(g->res, D), weight, NULL, c->norm_eps, S, D);
            thin_or_packed<T>(d, bits, PlainSourceOf<T>{a.xn}, sink, W, {S, O, D, 1, {}});
        }
    };
    for (int layer = 0; layer < c->n_layer; layer++) {
        const LayerWeights *w = &g->w.layer[(size_t)layer];
        const float *conv_bias = (const float *)w->conv_bias;
        float *window = window_of(g, layer), *h = h_of(g, layer);
        // Kernels 2 and 3 leave memory idle: each asks for an eighth of out_proj's weights.
        const size_t eighth = bits ? 0 : (size_t)D * E * sizeof(T) / 8;
        const char *next = (const char *)w->out_proj;
        normed(w->norm, StoreSinkOf<T>{a.xz}, w->in_proj, 2 * E);
        thin_or_packed<T>(d, bits, ConvSourceOf<T>{a.xz, window, w->conv_t, conv_bias, K},
                          PartSink{sums}, w->x_proj, {S, P, E, parts, {next, eighth}});
        ThinScanArgs<T> scan = {a.g,
                                h,
                                window,
                                sums,
                                a.xz,
                                (const T *)w->dt_proj,
                                w->conv_t,
                                conv_bias,
                                (const float *)w->dt_bias,
                                w->A_neg,
                                (const float *)w->D_skip,
                                parts,
                                E,
                                N,
                                K,
                                R,
                                eps,
                                {next + eighth, eighth}};
        launch_dependent(d,
                         R <= 64    ? thin_scan_kernel<T, 16, 8>
                         : R <= 160 ? thin_scan_kernel<T, 16, 20>
                                    : thin_scan_kernel<T, 16, 32>,
                         scan_grid, 128, (size_t)P * sizeof(float), scan);
        thin_or_packed<T>(d, bits, PlainSourceOf<T>{a.g}, AddSink{g->res}, w->out_proj,
                          {S, D, E, 1, {}});
    }
    normed(g->w.norm_f, LogitSink{g->at->logits}, g->w.head, c->V);
}
