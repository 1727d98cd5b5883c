// clang-format off
/* mamba_cuda.cu - the GPU backend of mamba.c, chosen at build time by `make cuda`.

   What it is: the same model, the same files and the same steps as mamba.c, with everything of one piece of text, one step or
   one training pass on the device. Matrix products are cuBLAS's; the scan, which no library has, is in section 4 and is what
   this file is about. Names are those of mamba.c's glossary; its section 3 is included for the types and for TENSORS.
   What it is not: a second definition. mamba.c's scan_sequential says what is computed; tests compare with it.

   PRECISION. T is what matrices and activations between kernels are: float, or __nv_bfloat16. The residual stream, the state
   h, delta after softplus, A, every sum and the loss are float32 in both, and so are master weights and the optimizer.

   WHAT LIVES WHERE, of a block of L tokens. Device memory: the residual stream (float), and the products' inputs and outputs
   xn, xz, u, xdb, delta, g (T). Registers: h, the state of the scan, (E,N) for every sequence, never written but at the ends.
   Shared memory: B_ssm and C_ssm of a tile of time steps, which all channels of a block read.
   Bytes a token and layer, forward: 4D + 4D read and written by the residual stream, 2D T for xn, 2*2E for xz, E*3 read by
   the scan (delta, u, z) and E written (g), 2E for u, which is all that is moved except by the products' own reading.

   CONTENTS
     1 errors, arenas, conversions      4 the scan: forward, step, [train] backward
     2 small kernels                    5 model: weights, block, prefill, state
     3 matrix products                  6 generation: step, sampling, graph
                                        7 [train] pass, AdamW                                                          */
// clang-format on

#define MAMBA_TYPES_ONLY
#include "mamba.c"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

typedef __nv_bfloat16 bf16;

// ---------------------------------------------------------------------------------------------------------------------
// 1 Errors, arenas, conversions
// The first thing that goes wrong is kept, with where, until the caller asks; work queued after it
// does no harm. Kernels are queued on one stream, so an error of a launch shows at the next
// synchronisation.

static char gpu_error_text[400];

static const char *gpu_error(void) { return gpu_error_text; }

static int gpu_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(gpu_error_text, sizeof gpu_error_text, format, args);
    va_end(args);
    return -1;
}

// A matrix product prepared by cublasLt for one shape, see gemm().
struct Product {
    cublasOperation_t op_a, op_b;
    cudaDataType_t in, out;
    int m, n, k;
    size_t lda, ldb, ldc;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
    bool ready;
};

struct Device { // what every kernel launch needs
    cudaStream_t stream;
    cublasHandle_t blas;
    void *workspace; // cuBLAS's, so that graphs can be captured
    const char *failed;
    int blas_status, processors;
    bool hopper; // the code that runs was compiled for sm_90 or later: kernels wait for their input
    std::vector<Product> *products;
};

static void check_blas(Device *d, cublasStatus_t status, const char *where) {
    if (status != CUBLAS_STATUS_SUCCESS && !d->failed)
        d->failed = where, d->blas_status = (int)status;
}

static void check_cuda(Device *d, cudaError_t error, const char *where) {
    if (error != cudaSuccess && !d->failed) d->failed = where;
}

static void check_launch(Device *d, const char *where) {
    if (cudaPeekAtLastError() != cudaSuccess && !d->failed) d->failed = where;
}

// Waits for everything queued. 0, or -1 with a sentence.
static int finish(Device *d) {
    cudaError_t error = cudaStreamSynchronize(d->stream), last = cudaGetLastError();
    if (error == cudaSuccess) error = last;
    const char *where = d->failed ? d->failed : "a kernel";
    bool bad = d->failed || error != cudaSuccess;
    d->failed = NULL;
    if (!bad) return 0;
    if (error != cudaSuccess) return gpu_fail("GPU: %s: %s", where, cudaGetErrorString(error));
    return gpu_fail("GPU: %s: cuBLAS status %d", where, d->blas_status);
}

static void *device_alloc(size_t bytes) { // NULL with a sentence
    void *p = NULL;
    cudaError_t error = cudaMalloc(&p, bytes ? bytes : 1);
    if (error == cudaSuccess) return p;
    size_t free_bytes = 0, total = 0;
    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total);
    gpu_fail("GPU memory: %.1f MB are needed, %.1f of %.1f MB are free", (double)bytes / 1e6,
             (double)free_bytes / 1e6, (double)total / 1e6);
    return NULL;
}

// Lays arrays out one after the other: first without a base, to measure, then with one.
struct Arena {
    char *base;
    size_t used;
    template <class P> void take(P *&p, size_t elements, size_t width = sizeof(P)) {
        p = base ? (P *)(base + used) : NULL;
        used += (elements * width + 255) / 256 * 256;
    }
};

enum { CUBLAS_WORKSPACE = 32 << 20 };

__global__ void probe_kernel() {}

// What the code that runs on this GPU was compiled for: 80, 90, ... The card may be newer.
static cudaError_t code_version(int *version) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, (const void *)probe_kernel);
    if (error == cudaSuccess) *version = attributes.ptxVersion;
    else cudaGetLastError();
    return error;
}

static int device_open(Device *d) {
    memset(d, 0, sizeof *d);
    int n = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess || n == 0) {
        cudaGetLastError();
        return gpu_fail("no GPU can be used (%s): --cpu runs on the processor",
                        error != cudaSuccess ? cudaGetErrorString(error) : "none is there");
    }
    int version = 0;
    if ((error = code_version(&version)) != cudaSuccess)
        return gpu_fail(
            "this build has no code for this GPU (%s): make cuda CUDA_ARCH=..., or --cpu",
            cudaGetErrorString(error));
    d->hopper = version >= 90;
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount, device);
    if ((error = cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking)) != cudaSuccess)
        return gpu_fail("GPU: %s", cudaGetErrorString(error));
    if (cublasCreate(&d->blas) != CUBLAS_STATUS_SUCCESS)
        return gpu_fail("GPU: cuBLAS does not start");
    if (!(d->workspace = device_alloc(CUBLAS_WORKSPACE))) return -1;
    cublasSetStream(d->blas, d->stream);
    cublasSetWorkspace(d->blas, d->workspace, CUBLAS_WORKSPACE);
    return 0;
}

static void products_free(Device *d) {
    if (!d->products) return;
    for (Product &p : *d->products) {
        if (p.product) cublasLtMatmulDescDestroy(p.product);
        for (cublasLtMatrixLayout_t layout : {p.a, p.b, p.c})
            if (layout) cublasLtMatrixLayoutDestroy(layout);
    }
    delete d->products;
    d->products = NULL;
}

static void device_close(Device *d) {
    products_free(d);
    if (d->blas) cublasDestroy(d->blas);
    cudaFree(d->workspace);
    if (d->stream) cudaStreamDestroy(d->stream);
}

__device__ inline float value(float x) { return x; }
__device__ inline float value(bf16 x) { return __bfloat162float(x); }
__device__ inline float value(uint16_t half_bits) {
    return __half2float(__ushort_as_half(half_bits));
}
__device__ inline void put(float *p, float x) { *p = x; }
__device__ inline void put(bf16 *p, float x) { *p = __float2bfloat16_rn(x); }

__device__ inline float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }
__device__ inline float sigmoid(float x) { return __fdividef(1, 1 + __expf(-x)); }

__device__ inline float warp_sum(float x) {
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// The sum over a block of up to 1024 threads, the same in each; scratch: 33 floats. Every sum here
// has one fixed order.
__device__ inline float block_sum(float x, float *scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float y = warp_sum(lane < warps ? scratch[lane] : 0);
        if (lane == 0) scratch[32] = y;
    }
    __syncthreads();
    return scratch[32];
}
__device__ inline float block_max(float x, float *scratch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float y = warp_max(lane < warps ? scratch[lane] : -INFINITY);
        if (lane == 0) scratch[32] = y;
    }
    __syncthreads();
    return scratch[32];
}

// The kernel before has written everything; the next may start its own loading.
__device__ inline void wait_for_input() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

static unsigned blocks_for(size_t n, size_t a_block) {
    return (unsigned)((n + a_block - 1) / a_block);
}

// Starts while the kernel before still runs, which it awaits by wait_for_input(); in clusters of so
// many blocks.
template <class... Parameters, class... Arguments>
static void launch_cluster(Device *d, unsigned cluster, void (*kernel)(Parameters...), dim3 grid,
                           unsigned threads, size_t shared, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster,
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared,
    config.stream = d->stream;
    config.attrs = attributes, config.numAttrs = !d->hopper ? 0 : cluster > 1 ? 2 : 1;
    cudaLaunchKernelEx(&config, kernel,
                       static_cast<Parameters>(arguments)...); // callers check, by their own name
}
template <class... Parameters, class... Arguments>
static void launch_dependent(Device *d, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                             size_t shared, Arguments... arguments) {
    launch_cluster(d, 1, kernel, grid, threads, shared, arguments...);
}

__device__ inline uint32_t pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&both;
}
__device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ inline void tensor_product(float c[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 Small kernels
// One pass over their data each, neighbouring threads on neighbouring channels.

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

// Random numbers for benchmarks, uniform between low and high.
template <class T>
__global__ void random_kernel(T *x, size_t n, uint64_t seed, float low, float high) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        put(x + i,
            low + (high - low) * ((float)(mix(i + seed * 0x9E3779B97F4A7C15u) >> 40) * 0x1p-24f));
}

// res (rows,D) = rows of the embedding (V,D)
template <class T>
__global__ void embed_kernel(float *__restrict__ res, const int32_t *__restrict__ ids,
                             const T *__restrict__ embedding, int D) {
    size_t row = blockIdx.x, id = (size_t)ids[row];
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        res[row * D + i] = value(embedding[id * D + i]);
}

// V neighbouring numbers that are read or written at once.
template <class T, int V> struct alignas(sizeof(T) * V) Group {
    T v[V];
};

// out = in / sqrt(mean(in^2) + eps) * weight, rows of `cols` numbers, a multiple of V; weight NULL:
// without. TEAM threads a row, which they keep in PER groups of V each where it fits (PER = 0:
// reads it twice). in may be out. A team of a block, for few rows, has the weights on their way
// before it knows the sum.
template <class T, class In, int PER, int TEAM, int V>
__global__ void __launch_bounds__(256)
    rmsnorm_kernel(T *out, size_t ld_out, const In *in, size_t ld_in,
                   const float *__restrict__ weight, float eps, int rows, int cols) {
    __shared__ float scratch[33];
    typedef Group<In, V> Read;
    typedef Group<float, V> Weights;
    size_t row = (size_t)blockIdx.x * (256 / TEAM) + threadIdx.x / TEAM;
    const int first = threadIdx.x % TEAM * V, step = TEAM * V;
    if (row >= (size_t)rows) return; // never part of a block of one row
    const In *x = in + row * ld_in;
    out += row * ld_out;
    float squares = 0;
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
    auto add = [&](const Read &r) {
#pragma unroll
        for (int v = 0; v < V; v++) squares += value(r.v[v]) * value(r.v[v]);
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
        for (int v = 0; v < V; v++) put(&g.v[v], value(r.v[v]) * scale * (weight ? w.v[v] : 1.0f));
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
template <class T, class In, int TEAM, int V> static auto rmsnorm_choice(int cols) {
    int each = (cols + TEAM - 1) / TEAM;
    if constexpr (V == 1)
        return each <= 12 ? rmsnorm_kernel<T, In, 12, TEAM, 1> : rmsnorm_kernel<T, In, 0, TEAM, 1>;
    else
        return each <= 4    ? rmsnorm_kernel<T, In, 4 / V, TEAM, V>
               : each <= 12 ? rmsnorm_kernel<T, In, 12 / V, TEAM, V>
               : each <= 24 ? rmsnorm_kernel<T, In, 24 / V, TEAM, V>
               : each <= 80 ? rmsnorm_kernel<T, In, 80 / V, TEAM, V>
                            : rmsnorm_kernel<T, In, 0, TEAM, V>;
}
enum { NORM_FEW = 2048 }; // rows: 8 a block would leave multiprocessors idle
template <class T, class In>
static void rmsnorm(Device *d, T *out, size_t ld_out, const In *in, size_t ld_in,
                    const float *weight, float eps, int rows, int cols) {
    bool block = rows <= NORM_FEW && cols > 256; // a row of 256 or less is a warp's in any case
    bool fours = (ld_out | ld_in | (size_t)cols) % 4 == 0 &&
                 (uintptr_t)in % (4 * sizeof(In)) == 0 && ((uintptr_t)weight) % 16 == 0 &&
                 (uintptr_t)out % (4 * sizeof(T)) == 0;
    auto kernel =
        block   ? fours ? rmsnorm_choice<T, In, 256, 4>(cols) : rmsnorm_choice<T, In, 256, 1>(cols)
          : fours ? rmsnorm_choice<T, In, 32, 4>(cols)
                : rmsnorm_choice<T, In, 32, 1>(cols);
    launch_dependent(d, kernel, dim3(blocks_for((size_t)rows, block ? 1 : 8)), 256, 0, out, ld_out,
                     in, ld_in, weight, eps, rows, cols);
    check_launch(d, "rmsnorm");
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

// --- conv1d + SiLU: u_t = silu(bias + sum over k of conv[k] x_{t-K+1+k}), before the first token
// the window, or zeros. A thread takes V channels for so many steps, their last inputs in
// registers; K > 4 reads them again from the cache. Whoever has read the window moves it on to the
// last K-1 inputs (K > 4: conv_window_kernel does, afterwards).
enum { CONV_TAPS = 4 };

template <class T, int V>
__global__ void conv1d_silu_kernel(T *__restrict__ u, const T *__restrict__ xz, float *window,
                                   const float *__restrict__ conv_t, const float *__restrict__ bias,
                                   int L, int E, int K, int steps) {
    int e = (blockIdx.x * blockDim.x + threadIdx.x) * V, t0 = blockIdx.y * steps;
    if (e >= E) return;
    size_t b = blockIdx.z;
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
        float tap[CONV_TAPS][V], past[CONV_TAPS][V],
            start[V]; // the last K of four taps are used; past[3] is x_t
#pragma unroll
        for (int v = 0; v < V; v++) {
            start[v] = bias ? bias[e + v] : 0;
#pragma unroll
            for (int k = 0; k < CONV_TAPS; k++) {
                int from = k - (CONV_TAPS - K);
                tap[k][v] = from >= 0 ? conv_t[(size_t)from * E + e + v] : 0;
                past[k][v] = k ? input(t0 - CONV_TAPS + k, v) : 0;
            }
        }
#pragma unroll 8
        for (int t = t0; t < t1; t++) {
            Group<T, V> in = *(const Group<T, V> *)(x + (size_t)t * 2 * E), out;
#pragma unroll
            for (int v = 0; v < V; v++) {
                past[0][v] = past[1][v], past[1][v] = past[2][v], past[2][v] = past[3][v],
                past[3][v] = value(in.v[v]);
                float sum = start[v];
#pragma unroll
                for (int k = 0; k < CONV_TAPS; k++) sum += tap[k][v] * past[k][v];
                put(&out.v[v], silu(sum));
            }
            *(Group<T, V> *)(u + (size_t)t * E) = out;
        }
        if (before && t0 == 0)
            for (int k = 0; k < K - 1; k++)
                for (int v = 0; v < V; v++) before[(size_t)k * E + v] = input(L - K + 1 + k, v);
    } else {
        for (int t = t0; t < t1; t++)
            for (int v = 0; v < V; v++) {
                float sum = bias ? bias[e + v] : 0;
                for (int k = 0; k < K; k++)
                    sum += conv_t[(size_t)k * E + e + v] * input(t - K + 1 + k, v);
                put(u + (size_t)t * E + v, silu(sum));
            }
    }
}

// The window after L tokens: their last K-1 inputs, older ones where L is short. In place: slot j
// reads slots from j + L on.
template <class T>
__global__ void conv_window_kernel(float *window, const T *xz, int L, int E, int K) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= E) return;
    for (int j = 0; j < K - 1; j++) {
        int t = L - (K - 1) + j;
        window[(size_t)j * E + e] =
            t >= 0 ? value(xz[(size_t)t * 2 * E + e]) : window[(size_t)(j + L) * E + e];
    }
}

// One token of each of S sequences; the window (S,K-1,E) moves on. A thread takes V channels, all
// loads before the first store.
template <class T, int V>
__global__ void conv1d_silu_step_kernel(T *__restrict__ u, float *__restrict__ window,
                                        const T *__restrict__ xz, const float *__restrict__ conv_t,
                                        const float *__restrict__ bias, int E, int K) {
    typedef Group<float, V> Floats;
    int e = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    size_t s = blockIdx.y;
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
    for (int v = 0; v < V; v++) x.v[v] = value(raw.v[v]), sum.v[v] += last.v[v] * x.v[v];
#pragma unroll
    for (int k = 0; k < CONV_TAPS - 1; k++)
#pragma unroll
        for (int v = 0; v < V; v++) sum.v[v] += tap[k].v[v] * past[k].v[v];
    if (K <= CONV_TAPS) {
#pragma unroll
        for (int k = 0; k < CONV_TAPS - 1; k++)
            if (k < K - 1) *(Floats *)(w + (size_t)k * E) = k + 2 < K ? past[k + 1] : x;
    } else
        for (int k = 0; k < K - 1; k++)
            for (int v = 0; v < V; v++) {
                size_t at = (size_t)k * E + v;
                sum.v[v] += conv_t[at + e] * w[at];
                w[at] = k + 2 < K ? w[at + E] : x.v[v];
            }
#pragma unroll
    for (int v = 0; v < V; v++) put(&out.v[v], silu(sum.v[v]));
    *(Group<T, V> *)(u + s * E + e) = out;
}

template <class T>
static void conv1d_silu(Device *d, T *u, float *window, const T *xz, const float *conv_t,
                        const float *bias, int B, int L, int E, int K) {
    int V = E % 2 == 0 ? 2 : 1,
        steps = L > 4096 ? 32 : 16; // 16: more blocks, and 3 inputs more for each
    dim3 grid(blocks_for((size_t)E / V, 128), blocks_for((size_t)L, (size_t)steps), (unsigned)B);
    if (L == 1 && window) {
        if (E % 4 == 0)
            launch_dependent(d, conv1d_silu_step_kernel<T, 4>,
                             dim3(blocks_for((size_t)E / 4, 128), (unsigned)B), 128, 0, u, window,
                             xz, conv_t, bias, E, K);
        else
            launch_dependent(d, conv1d_silu_step_kernel<T, 1>,
                             dim3(blocks_for((size_t)E, 128), (unsigned)B), 128, 0, u, window, xz,
                             conv_t, bias, E, K);
    } else
        launch_dependent(d, V == 2 ? conv1d_silu_kernel<T, 2> : conv1d_silu_kernel<T, 1>, grid, 128,
                         0, u, xz, window, conv_t, bias, L, E, K, steps);
    if (L > 1 && window && K > CONV_TAPS) // one sequence: prefill
        conv_window_kernel<<<blocks_for((size_t)E, 128), 128, 0, d->stream>>>(window, xz, L, E, K);
    check_launch(d, "conv1d_silu");
}

// --- [train] column sums: out (cols) += sum over rows of x (rows,cols), in two passes of fixed
// order

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

// --- [train] backward of rmsnorm: out_i = x_i s w_i with s = (mean(x^2) + eps)^-1/2, so
//     d_x_i = s (w_i d_out_i - x_i s^2 mean_j(w_j d_out_j x_j))        d_w_i = sum over rows of
//     d_out_i x_i s
// A warp takes every so many rows, a row's numbers and its share of d_w in PER registers a lane
// (PER = 0: in memory). With ADD d_x is added to d_out's residual, and `copy`, if not NULL, gets
// the sum in T, which is what the layer before starts from.
enum { NORM_BLOCKS = 264, NORM_WARPS = 8 };

template <class T, class In, class Out, bool ADD, int PER>
__global__ void __launch_bounds__(32 * NORM_WARPS)
    rmsnorm_backward_kernel(Out *d_x, T *copy, float *__restrict__ partial, const T *d_out,
                            size_t ld_d, const In *in, size_t ld, const float *__restrict__ weight,
                            float eps, int rows, int cols) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *mine = partial ? partial + ((size_t)blockIdx.x * NORM_WARPS + warp) * cols : NULL,
          d_w[PER + 1], w[PER + 1];
#pragma unroll
    for (int k = 0; k < PER; k++)
        d_w[k] = 0, w[k] = weight && lane + 32 * k < cols ? weight[lane + 32 * k] : 1;
    for (int i = lane + 32 * PER; i < cols && mine; i += 32) mine[i] = 0;
    for (size_t row = (size_t)blockIdx.x * NORM_WARPS + warp; row < (size_t)rows;
         row += (size_t)gridDim.x * NORM_WARPS) {
        const In *x = in + row * ld;
        const T *d = d_out + row * ld_d;
        Out *to = d_x + row * (ADD ? (size_t)cols : ld_d);
        float squares = 0, dot = 0, xs[PER + 1], ds[PER + 1], before[PER + 1];
#pragma unroll
        for (int k = 0; k < PER; k++) {
            int i = lane + 32 * k;
            xs[k] = i < cols ? value(x[i]) : 0, ds[k] = i < cols ? value(d[i]) : 0;
            before[k] = ADD && i < cols ? value(to[i]) : 0;
        }
#pragma unroll
        for (int k = 0; k < PER; k++) squares += xs[k] * xs[k], dot += xs[k] * ds[k] * w[k];
        for (int i = lane + 32 * PER; i < cols; i += 32) {
            float xi = value(x[i]);
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
            float xi = value(x[i]), di = value(d[i]),
                  sum = scale * (di * (weight ? weight[i] : 1.0f) - xi * dot);
            if (ADD) sum += value(to[i]);
            put(to + i, sum);
            if (copy) put(copy + row * cols + i, sum);
            if (mine) mine[i] += di * xi * scale;
        }
    }
#pragma unroll
    for (int k = 0; k < PER; k++)
        if (mine && lane + 32 * k < cols) mine[lane + 32 * k] = d_w[k];
}

// --- [train] backward of conv1d + SiLU. With c_t the convolution before SiLU:
//     d_c_t = d_u_t silu'(c_t)    d_x_t = sum over k of conv[k] d_c_{t+K-1-k}    d_conv[k] = sum
//     over t of d_c_t x_{t-K+1+k}
// A thread takes a channel for CONV_BACK steps and K-1 more, whose d_c it computes for its own d_x
// only; the last MAX_TAPS values of x and d_c are in registers. Its sums go to partial (tiles, K+1,
// E), the bias's last.
enum { CONV_BACK = 64 };

template <class T, int MAX_TAPS, int V>
__global__ void conv1d_silu_backward_kernel(T *__restrict__ d_xz, float *__restrict__ partial,
                                            const T *__restrict__ d_u, const T *__restrict__ xz,
                                            const float *__restrict__ conv_t,
                                            const float *__restrict__ bias, int L, int E, int K) {
    int e = (blockIdx.x * blockDim.x + threadIdx.x) * V, t0 = blockIdx.y * CONV_BACK,
        t1 = min(t0 + CONV_BACK, L);
    if (e >= E) return;
    size_t b = blockIdx.z;
    const T *x = xz + b * L * 2 * E + e, *d = d_u + b * L * E + e;
    T *d_x = d_xz + b * L * 2 * E + e;
    float tap[MAX_TAPS][V], past[MAX_TAPS][V], d_c[MAX_TAPS][V], d_tap[MAX_TAPS][V], d_bias[V],
        start[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
        start[v] = bias ? bias[e + v] : 0, d_bias[v] = 0;
#pragma unroll
        for (int k = 0; k < MAX_TAPS;
             k++) { // tap[0] belongs to x_t, tap[k] to x_{t-k}; d_c[k] to t-k
            tap[k][v] = k < K ? conv_t[(size_t)(K - 1 - k) * E + e + v] : 0;
            d_tap[k][v] = d_c[k][v] = 0;
            past[k][v] = k < MAX_TAPS - 1 && t0 - 1 - k >= 0
                             ? value(x[(size_t)(t0 - 1 - k) * 2 * E + v])
                             : 0;
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
                    past[k][v] = past[k - 1][v], d_c[k][v] = d_c[k - 1][v];
                past[0][v] = inside ? value(in.v[v]) : 0;
                float c = start[v];
#pragma unroll
                for (int k = 0; k < MAX_TAPS; k++) c += tap[k][v] * past[k][v];
                float s = sigmoid(c);
                d_c[0][v] = inside ? value(d_in.v[v]) * s * (1 + c * (1 - s)) : 0;
                if (own) {
#pragma unroll
                    for (int k = 0; k < MAX_TAPS; k++) d_tap[k][v] += d_c[0][v] * past[k][v];
                    d_bias[v] += d_c[0][v];
                }
                float sum =
                    0; // d_x_{t-K+1}: tap[k] meets d_c of k steps later, which is d_c[K-1-k]
#pragma unroll
                for (int k = 0; k < MAX_TAPS; k++)
#pragma unroll
                    for (int j = 0; j < MAX_TAPS; j++)
                        if (j == K - 1 - k) sum += tap[k][v] * d_c[j][v];
                put(&out.v[v], sum);
            }
            if (write) *(Group<T, V> *)(d_x + (size_t)(t - (K - 1)) * 2 * E) = out;
        };
    int t = t0;
    for (; t < min(t0 + K - 1, t1); t++) step(t, true, true, false);
#pragma unroll 4
    for (; t < t1; t++) step(t, true, true, true);
    for (; t < t1 + K - 1; t++) step(t, false, t < L, t - (K - 1) >= t0);
    float *to = partial + (b * gridDim.y + blockIdx.y) * (K + 1) * E + e;
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int k = 0; k < MAX_TAPS; k++)
            if (k < K) to[(size_t)(K - 1 - k) * E + v] = d_tap[k][v];
        to[(size_t)K * E + v] = d_bias[v];
    }
}

// --- [train] cross-entropy: losses_t = -log p(target), d_logits = weight (p - 1 at the target);
// zero where the target is -1 A block takes a row, which it reads from device memory once: KEEP
// holds it in shared memory (V floats) for the gradient.

template <class T, bool KEEP>
__global__ void __launch_bounds__(1024)
    cross_entropy_kernel(float *__restrict__ losses, T *__restrict__ d_logits,
                         const float *__restrict__ logits, const int32_t *__restrict__ targets,
                         float weight, int V) {
    extern __shared__ float4 kept[];
    __shared__ float scratch[33];
    size_t row = blockIdx.x;
    const float *x = logits + row * V;
    int target = targets[row];
    if (target < 0) {
        if (d_logits)
            for (int v = threadIdx.x; v < V; v += blockDim.x) put(d_logits + row * V + v, 0.0f);
        if (threadIdx.x == 0) losses[row] = 0;
        return;
    }
    float highest = -INFINITY, sum = 0;
    auto take = [&](float xv) { // one reading: the sum is rescaled when a higher logit appears
        if (xv > highest) sum *= __expf(highest - xv), highest = xv;
        sum += __expf(xv - highest);
    };
    bool quads = V % 4 == 0;
#pragma unroll 4
    for (int v = threadIdx.x; v < V / 4 && quads; v += blockDim.x) {
        float4 four = ((const float4 *)x)[v];
        if (KEEP) kept[v] = four; // read again by the same thread
        take(four.x), take(four.y), take(four.z), take(four.w);
    }
    for (int v = threadIdx.x; v < V && !quads; v += blockDim.x) take(x[v]);
    float top = block_max(highest, scratch);
    sum = block_sum(highest == -INFINITY ? 0 : sum * __expf(highest - top), scratch);
    float log_sum = top + logf(sum);
    if (threadIdx.x == 0) losses[row] = log_sum - x[target];
    if (!d_logits) return;
    auto gradient = [&](float xv, int v) {
        return weight * (__expf(xv - log_sum) - (v == target ? 1.0f : 0.0f));
    };
#pragma unroll 4
    for (int v = threadIdx.x; v < V / 4 && quads; v += blockDim.x) {
        float4 four = KEEP ? kept[v] : ((const float4 *)x)[v];
        Group<T, 4> out;
        put(&out.v[0], gradient(four.x, 4 * v)), put(&out.v[1], gradient(four.y, 4 * v + 1));
        put(&out.v[2], gradient(four.z, 4 * v + 2)), put(&out.v[3], gradient(four.w, 4 * v + 3));
        ((Group<T, 4> *)(d_logits + row * V))[v] = out;
    }
    for (int v = threadIdx.x; v < V && !quads; v += blockDim.x)
        put(d_logits + row * V + v, gradient(x[v], v));
}
template <class T>
static void cross_entropy(Device *d, float *losses, T *d_logits, const float *logits,
                          const int32_t *targets, float weight, int rows, int V) {
    int device = 0, most = 0, bytes = V * (int)sizeof(float);
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (d_logits && V % 4 == 0 && bytes + 2048 <= most) { // 2048: scratch and the system's
        auto kernel = cross_entropy_kernel<T, true>;
        check_cuda(d,
                   cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                   "cross_entropy");
        int threads = V < 4096 ? 256 : 1024;
        kernel<<<(unsigned)rows, threads, bytes, d->stream>>>(losses, d_logits, logits, targets,
                                                              weight, V);
    } else
        cross_entropy_kernel<T, false>
            <<<(unsigned)rows, 512, 0, d->stream>>>(losses, d_logits, logits, targets, weight, V);
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

// --- [train] backward of embed: rows of the same token are summed in pieces of EMBED_PIECE, then
// the pieces, so that the order is fixed. order lists rows by token; piece i is
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

// ---------------------------------------------------------------------------------------------------------------------
// 3 Matrix products
// Row-major (rows, depth) products as cuBLAS sees them: its column-major matrices are ours
// transposed, so the outputs come first. float: plain float32 multiply-adds. bf16: tensor cores,
// summed in float32.

template <class T> static cudaDataType_t blas_type() {
    return sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_16BF;
}

enum {
    LONG_ROWS = 8192,
    PRODUCTS_MAX = 64
}; // rows from which algorithms are chosen; products kept

// The product of this shape, prepared when it is met first. The algorithm is a matter of shape and
// machine alone, so that runs agree to the bit: the heuristic's first, or for many rows in bf16
// times a small matrix that is not too deep the first whose tile is 128 x 128, else 128 x 160: up
// to 30% faster for in_proj, out_proj and out_proj's gradient of 130M and 370M (doc/SPEED.md).
static Product *product_of(Device *d, const Product &shape) {
    if (d->products && d->products->size() >= PRODUCTS_MAX)
        products_free(d); // prompts of ever new lengths
    if (!d->products) d->products = new std::vector<Product>();
    for (Product &p : *d->products)
        if (p.op_a == shape.op_a && p.op_b == shape.op_b && p.in == shape.in &&
            p.out == shape.out && p.m == shape.m && p.n == shape.n && p.k == shape.k &&
            p.lda == shape.lda && p.ldb == shape.ldb && p.ldc == shape.ldc)
            return &p;
    d->products->push_back(shape);
    Product *p = &d->products->back();
    cublasLtMatmulPreference_t limits = NULL;
    cublasLtMatmulHeuristicResult_t found[8] = {};
    size_t workspace = CUBLAS_WORKSPACE;
    uint32_t alignment = 16; // of a weight within the arena
    int count = 0, best = 0, flip_a = p->op_a == CUBLAS_OP_T, flip_b = p->op_b == CUBLAS_OP_T;
    p->ready = !cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) &&
               !cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &p->op_a,
                                               sizeof p->op_a) &&
               !cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &p->op_b,
                                               sizeof p->op_b) &&
               !cublasLtMatrixLayoutCreate(&p->a, p->in, (uint64_t)(flip_a ? p->k : p->m),
                                           (uint64_t)(flip_a ? p->m : p->k), (int64_t)p->lda) &&
               !cublasLtMatrixLayoutCreate(&p->b, p->in, (uint64_t)(flip_b ? p->n : p->k),
                                           (uint64_t)(flip_b ? p->k : p->n), (int64_t)p->ldb) &&
               !cublasLtMatrixLayoutCreate(&p->c, p->out, (uint64_t)p->m, (uint64_t)p->n,
                                           (int64_t)p->ldc) &&
               !cublasLtMatmulPreferenceCreate(&limits) &&
               !cublasLtMatmulPreferenceSetAttribute(
                   limits, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    for (auto which :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        p->ready = p->ready && !cublasLtMatmulPreferenceSetAttribute(limits, which, &alignment,
                                                                     sizeof alignment);
    p->ready = p->ready &&
               !cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)d->blas, p->product, p->a, p->b,
                                               p->c, p->c, limits, 8, found, &count) &&
               count > 0 && found[0].state == CUBLAS_STATUS_SUCCESS;
    bool wide = p->n >= LONG_ROWS && p->in == CUDA_R_16BF && !flip_b && p->m >= 512 &&
                p->k >= 512 && p->k <= 2 * p->m && (size_t)p->m * p->k <= 1 << 22;
    for (auto wanted : {CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_128x128})
        for (int i = count - 1; i >= 0 && wide; i--) {
            uint32_t tile = 0;
            cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID,
                                                 &tile, sizeof tile, NULL);
            if (tile == (uint32_t)wanted && found[i].state == CUBLAS_STATUS_SUCCESS) best = i;
        }
    p->algorithm = found[best].algo;
    if (limits) cublasLtMatmulPreferenceDestroy(limits);
    return p;
}

// c (m,n) = op_a(a) op_b(b), or += with add; `from`, where given, is what it is added to instead of
// c.
template <class T, class Out>
static void gemm(Device *d, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                 const T *a, size_t lda, const T *b, size_t ldb, Out *c, size_t ldc, bool add,
                 const Out *from = NULL) {
    float one = 1, beta = add ? 1.0f : 0.0f;
    if (m == 0 || n == 0) return;
    uintptr_t bases = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)from;
    if (bases % 16 == 0 && (from || (n >= LONG_ROWS && sizeof(T) == 2))) {
        Product shape = {};
        shape.op_a = op_a, shape.op_b = op_b, shape.in = blas_type<T>(),
        shape.out = blas_type<Out>();
        shape.m = m, shape.n = n, shape.k = k, shape.lda = lda, shape.ldb = ldb, shape.ldc = ldc;
        Product *p = product_of(d, shape);
        if (p->ready) {
            check_blas(d,
                       cublasLtMatmul((cublasLtHandle_t)d->blas, p->product, &one, a, p->a, b, p->b,
                                      &beta, from ? from : c, p->c, c, p->c, &p->algorithm,
                                      d->workspace, CUBLAS_WORKSPACE, d->stream),
                       "matrix product");
            return;
        }
    }
    if (from)
        cudaMemcpy2DAsync(c, ldc * sizeof *c, from, ldc * sizeof *c, (size_t)m * sizeof *c,
                          (size_t)n, cudaMemcpyDeviceToDevice, d->stream);
    check_blas(d,
               cublasGemmEx(d->blas, op_a, op_b, m, n, k, &one, a, blas_type<T>(), (int)lda, b,
                            blas_type<T>(), (int)ldb, &beta, c, blas_type<Out>(), (int)ldc,
                            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "matrix product");
}

// out (rows,O) = x (rows,I) W^T, W (O,I); add: += instead
template <class T, class Out>
static void matmul(Device *d, Out *out, size_t ld_out, const T *x, size_t ldx, const T *W, int rows,
                   int O, int I, bool add = false) {
    gemm(d, CUBLAS_OP_T, CUBLAS_OP_N, O, rows, I, W, (size_t)I, x, ldx, out, ld_out, add);
}
// out (rows,O) = from (rows,O) + x (rows,I) W^T, rows without gaps: the copy of `from` that +=
// would need moves 2.4 GB in a training step of 130m with 8 x 2048 tokens.
template <class T>
static void matmul_onto(Device *d, float *out, const float *from, const T *x, const T *W, int rows,
                        int O, int I) {
    gemm(d, CUBLAS_OP_T, CUBLAS_OP_N, O, rows, I, W, (size_t)I, x, (size_t)I, out, (size_t)O, true,
         from);
}
// d_x (rows,I) = d_out (rows,O) W; add: += instead
template <class T>
static void matmul_d_x(Device *d, T *d_x, size_t ldx, const T *d_out, size_t ld_out, const T *W,
                       int rows, int O, int I, bool add = false) {
    gemm(d, CUBLAS_OP_N, CUBLAS_OP_N, I, rows, O, W, (size_t)I, d_out, ld_out, d_x, ldx, add);
}
// d_W (O,I) += d_out^T x, over rows
template <class T>
static void matmul_d_W(Device *d, float *d_W, const T *d_out, size_t ld_out, const T *x, size_t ldx,
                       int rows, int O, int I) {
    gemm(d, CUBLAS_OP_N, CUBLAS_OP_T, I, O, rows, x, ldx, d_out, ld_out, d_W, (size_t)I, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4 The scan
//     delta = softplus(delta_raw + dt_bias)      h_t = exp(delta A_neg) h_{t-1} + delta B_ssm u
//     g = silu(z) (sum over n of C_ssm h_t + D_skip u)
//
// WHAT LIVES WHERE. The states h (B,N,E) of all times never exist: they are registers, and global
// memory sees only h0, h_final and every SAVE-th state. A row of delta_raw, u, z is read once and a
// row of g written once: 4 elements a token and channel (8 bytes in bf16, 16 in float), plus B_ssm
// and C_ssm once per 32 or 64 channels (2N/32 or 2N/64 elements, mostly from L2) and 4N/SAVE bytes
// of h_starts. Bytes are not the limit: 16 decays a token and channel on a special-function unit of
// 16 a clock and multiprocessor take twice as long, and so do the instructions around them. So
//   - A_neg is scaled by log2(e) once: a decay is one multiplication and one ex2, and no decay is
//   computed twice;
//   - softplus is one ex2 and a polynomial for log1p (exact for small arguments too, where log(1 +
//   e) is not), and two gates share
//     one reciprocal: 18.5 special functions a token and channel instead of 20;
//   - a row's address is one multiply-add (down()): 64-bit indices and clamps cost a third of the
//   time before (660 to 499 us).
// A lane is a channel (in scan_relay and scan_tiles also two neighbouring ones, where alignment and
// shape allow) in every kernel: a row's loads are contiguous whatever its stride and base, so there
// is one path for all alignments, and no sum crosses lanes.
//
// scan_relay, for many channels and N = 8 or 16: four warps take turns in time and hand the states
// on; delta, delta*u and y are
//   registers. About 145 instructions a token and channel instead of 160 (477 instead of 500 us);
//   with two channels a lane, which share the loads of B_ssm and C_ssm and the addresses, 130 (437
//   us).
// scan_walk, for many channels and N = 32 or 64, or short texts: a block is 32 channels of a
// sequence and walks through time in tiles
//   of 16 steps. Its S warps share the states of a channel (N/S each, in registers) and, in time,
//   what all states need: softplus, conversions and the gate, which otherwise every warp would
//   repeat. Shared memory holds delta and delta*u, B_ssm, C_ssm, and the warps' parts of y.
// scan_tiles, for few channels: a block is 32 C channels and one tile of W*K steps, a warp a piece
// of K steps, whose delta, delta*u
//   and y are registers. For each state a warp computes its K decays and its end state from h = 0
//   (the forecast), keeps the decays, leaves (product of decays, end state) in shared memory, joins
//   the pieces before its own and walks the piece again with the decays it kept: 7 instructions a
//   state and step instead of 5, but no second exponential. All tiles run in parallel; a tile's
//   first state comes from the tile before through a mailbox in global memory, about a microsecond
//   behind it.

enum { SCAN_SAVE = 64 }; // h_starts holds the state before each step t with t % SCAN_SAVE = 0

template <typename T> struct ScanArgs {
    T *out;                    // (B*L,E)
    float *h_final, *h_starts; // (B,N,E), (B,ceil(L/SCAN_SAVE),N,E); NULL: not wanted
    const T *delta_raw, *u, *z, *B_ssm, *C_ssm;   // (B*L,E) three times, (B*L,N) twice
    const float *A_neg, *D_skip, *dt_bias, *h0;   // (N,E), (E), (E), (B,N,E) or NULL: zeros
    int ld_out, ld_delta, ld_u, ld_z, ld_B, ld_C; // elements from a row to the next
    int B, L, E, N;
    struct ScanMail *mail; // the host's; scan_tiles alone needs it
};

// What the blocks of scan_tiles tell each other through, for one launch after the other on one
// stream. Cleared once: tickets and tags go on from launch to launch, so a word of an earlier
// launch is never taken for one of this. Launches cannot be captured in a graph, which would replay
// the same numbers.
struct ScanMail {
    // Device, `bytes`: scan_forward_workspace(). The first word holds the tickets given, boxes
    // begin at MAIL_BOXES.
    uint64_t *words;
    size_t bytes;
    uint32_t ticket, tag; // of the next launch: tickets given before it, highest tag before it
    bool cleared;         // false when new
};
enum { MAIL_BOXES = 16 };

#define LOG2E 1.44269504f

// Every kernel of the scan waits for its input first, where it was compiled for that.
template <class... Parameters, class... Arguments>
static cudaError_t scan_launch(Device *d, void (*kernel)(Parameters...), size_t blocks, int threads,
                               int shared, Arguments... arguments) {
    cudaError_t err =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (err) return err;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = (unsigned)blocks, config.blockDim = (unsigned)threads,
    config.dynamicSmemBytes = (size_t)shared;
    config.stream = d->stream, config.attrs = &early, config.numAttrs = d->hopper;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Ends a kernel that waits for another block some ten seconds with an error instead of for ever:
// only a defect can cause that.
__device__ __forceinline__ void give_up_after(int polls) {
    if (polls > 1 << 24) __trap();
}

template <typename T> __device__ __forceinline__ T to(float x);
template <> __device__ __forceinline__ float to<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 to<bf16>(float x) { return __float2bfloat16_rn(x); }

__device__ __forceinline__ float
exp2_fast(float x) { // 2^x to 2 ulp, one instruction; 0 below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log1p(e) / e on [0,1]: a polynomial of degree 8 within 3e-8, or of degree 6 within 1.3e-6, which
// is enough for what comes in bf16.
template <typename T> __device__ __forceinline__ float log1p_ratio(float e) {
    float q;
    if (sizeof(T) == 2) {
        q = fmaf(0.0141410241f, e, -0.0664018009f);
        q = fmaf(q, e, 0.149223876f);
        q = fmaf(q, e, -0.235038604f);
        q = fmaf(q, e, 0.33109449f);
        q = fmaf(q, e, -0.499869656f);
        return fmaf(q, e, 0.999998732f);
    }
    q = fmaf(0.00523268789f, e, -0.0295052132f);
    q = fmaf(q, e, 0.0782259103f);
    q = fmaf(q, e, -0.136632423f);
    q = fmaf(q, e, 0.191060051f);
    q = fmaf(q, e, -0.248429818f);
    q = fmaf(q, e, 0.333190968f);
    q = fmaf(q, e, -0.499994931f);
    return fmaf(q, e, 0.99999997f);
}
template <typename T = float>
__device__ __forceinline__ float softplus(float x) { // max(x, 0) + log1p(exp(-|x|))
    float e = exp2_fast(-LOG2E * fabsf(x));
    return fmaf(e, log1p_ratio<T>(e), fmaxf(x, 0.f));
}

// y0 silu(z0) and y1 silu(z1) by one reciprocal, of (1 + exp(-z0)) (1 + exp(-z1)). Below z = -43,
// where silu is under 1e-17, the exponential stops growing so that the product stays finite.
__device__ __forceinline__ void gate_pair(float &y0, float &y1, float z0, float z1) {
    float a = 1.f + exp2_fast(-LOG2E * fmaxf(z0, -43.f)),
          b = 1.f + exp2_fast(-LOG2E * fmaxf(z1, -43.f));
    float r = rcp_fast(a * b);
    y0 *= z0 * (r * b);
    y1 *= z1 * (r * a);
}

// (tag, state) in one 8-byte word: it arrives whole, so neither flag nor fence is needed to read
// it. It is written by a maximum, the tag on top, because a tile and the one two after it share a
// word, and nothing orders plain stores by two multiprocessors, though the second waits for a
// reader of the first: with such stores, once in some hundred million tiles of 2.8B prompts, a tile
// waited for ever. Costs nothing that can be measured.
template <int C> struct Mail {
    uint64_t word[C];
}; // of C neighbouring channels
template <> struct Mail<1> {
    uint64_t word[1];
    __device__ __forceinline__ void read(const uint64_t *p) {
        asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(word[0]) : "l"(p) : "memory");
    }
    __device__ __forceinline__ bool all(uint32_t tag) const {
        return (uint32_t)(word[0] >> 32) == tag;
    }
};
template <> struct Mail<2> {
    uint64_t word[2];
    __device__ __forceinline__ void read(const uint64_t *p) {
        asm volatile("ld.relaxed.gpu.v2.u64 {%0, %1}, [%2];"
                     : "=l"(word[0]), "=l"(word[1])
                     : "l"(p)
                     : "memory");
    }
    __device__ __forceinline__ bool all(uint32_t tag) const {
        return (uint32_t)(word[0] >> 32) == tag && (uint32_t)(word[1] >> 32) == tag;
    }
};
__device__ __forceinline__ void mail_write(uint64_t *p, uint64_t v) {
    asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// i rows of ld elements on, as one 32 x 32 + 64 bit multiply-add. Addresses would otherwise cost as
// much as the arithmetic.
template <typename T> __device__ __forceinline__ T *down(T *p, int i, int ld) {
    return (T *)((char *)p + (long long)(i * (int)sizeof(T)) * ld);
}

template <int R> struct alignas(R >= 4 ? 16 : 4 * R) Row {
    float v[R];
};

// A shared load that the compiler leaves outside of conditions, so that several are in flight.
__device__ __forceinline__ Row<2> load_always(const Row<2> *p) {
    Row<2> r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(r.v[0]), "=f"(r.v[1])
                 : "r"((unsigned)__cvta_generic_to_shared(p))
                 : "memory");
    return r;
}
__device__ __forceinline__ Row<4> load_always(const Row<4> *p) {
    Row<4> r;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r.v[0]), "=f"(r.v[1]), "=f"(r.v[2]), "=f"(r.v[3])
                 : "r"((unsigned)__cvta_generic_to_shared(p))
                 : "memory");
    return r;
}

__device__ __forceinline__ float4 load4(const float *p) { return *(const float4 *)p; }
__device__ __forceinline__ void unpack(float *to, float4 v) {
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// ---------------------------------------------------------------------------------------------------------------------
// Many channels, many states: the walk. Between two barriers a warp does tile i's states, prepares
// its rows of tile i+1 and gates its rows of tile i-1, so that loads are in flight for a tile's
// time and the units for states, conversions and memory are all busy. Shared rows have a time pitch
// of TT+4 floats: 16-byte accesses of 8 neighbouring lanes then fall into 32 different banks.

template <typename T, int S, int NS, int UNROLL, int MINB>
__global__ void __launch_bounds__(32 * S, MINB) scan_walk(ScanArgs<T> p) {
    constexpr int TT = 16, PITCH = TT + 4, R = TT / S, N = S * NS, TILE_BC = 2 * N * PITCH,
                  TILE_E = 32 * PITCH;
    extern __shared__ float4 shared[];
    float *bc = (float *)shared;   // [2][2N][PITCH]    B_ssm, then C_ssm
    float *dt = bc + 2 * TILE_BC;  // [2][2][32][PITCH] delta, then delta*u
    float *part = dt + 4 * TILE_E; // [2][S][32][PITCH] y, summed over the states of a warp
    wait_for_input();
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, groups = (p.E + 31) / 32;
    const int b = blockIdx.x / groups, e_true = blockIdx.x % groups * 32 + lane, L = p.L, E = p.E;
    const bool live = e_true < E;
    const int e = live ? e_true : E - 1, tiles = (L + TT - 1) / TT;
    const size_t row =
        (size_t)b * L + w * R; // this warp's rows of a tile: R for softplus and gate,
    const T *delta_raw = p.delta_raw + row * p.ld_delta + e, *u = p.u + row * p.ld_u + e,
            *z = p.z + row * p.ld_z + e;
    T *out = p.out + row * p.ld_out + e;
    const float bias = p.dt_bias[e], skip = p.D_skip[e];
    // and 4-step x 8-state units of B_ssm (first half of the warps) or C_ssm: unit k is 4 (k % 4)
    // steps and 8 (k / 4) states on.
    constexpr int UNITS = NS < 4 ? NS : 4;
    const int bc_t = w * NS % 4 * 4 + lane / 8, bc_n = w * NS / 4 * 8 + lane % 8,
              ld_bc = w < S / 2 ? p.ld_B : p.ld_C;
    const T *bc_from =
        (w < S / 2 ? p.B_ssm + bc_n : p.C_ssm + bc_n - N) + ((size_t)b * L + bc_t) * ld_bc;

    float A[NS], h[NS];
#pragma unroll
    for (int j = 0; j < NS; j++) {
        int n = w * NS + j;
        A[j] = LOG2E * p.A_neg[(size_t)n * E + e];
        h[j] = p.h0 ? p.h0[((size_t)b * N + n) * E + e] : 0.f;
    }
    T raw_delta[R], raw_u[R], raw_bc[NS], z_now[R], z_before[R];
    float u_before[R], u_now[R], u_next[R];

    // Called for tile 0, 1, 2, ...: pointers go on by themselves.
    auto load_raw = [&](int tile) {
        const T *d_at = delta_raw, *u_at = u, *bc_at = bc_from;
        delta_raw = down(d_at, TT, p.ld_delta), u = down(u_at, TT, p.ld_u),
        bc_from = down(bc_at, TT, ld_bc);
        if (tile * TT + TT <= L) {
#pragma unroll
            for (int i = 0; i < R; i++)
                raw_delta[i] = *down(d_at, i, p.ld_delta), raw_u[i] = *down(u_at, i, p.ld_u);
#pragma unroll
            for (int k = 0; k < NS; k++) raw_bc[k] = down(bc_at, k % UNITS * 4, ld_bc)[k / 4 * 8];
        } else {
#pragma unroll
            for (int i = 0; i < R; i++) {
                bool in = tile * TT + w * R + i < L;
                raw_delta[i] = in ? *down(d_at, i, p.ld_delta) : to<T>(0.f),
                raw_u[i] = in ? *down(u_at, i, p.ld_u) : to<T>(0.f);
            }
#pragma unroll
            for (int k = 0; k < NS; k++)
                raw_bc[k] = tile * TT + bc_t + k % UNITS * 4 < L
                                ? down(bc_at, k % UNITS * 4, ld_bc)[k / 4 * 8]
                                : to<T>(0.f);
        }
    };
    auto load_z = [&](int tile) {
        const T *at = z;
        z = down(at, TT, p.ld_z);
        if (tile * TT + TT <= L) {
#pragma unroll
            for (int i = 0; i < R; i++) z_now[i] = *down(at, i, p.ld_z);
        } else {
#pragma unroll
            for (int i = 0; i < R; i++)
                z_now[i] = tile * TT + w * R + i < L ? *down(at, i, p.ld_z) : to<T>(0.f);
        }
    };
    // Past the end of time delta is 0: decay 1, inject 0, the state stays.
    auto prepare = [&](int tile) {
        float *dt_to = dt + (tile & 1) * 2 * TILE_E + lane * PITCH + w * R;
        float *bc_to = bc + (tile & 1) * TILE_BC + bc_n * PITCH + bc_t;
        Row<R> d, du;
#pragma unroll
        for (int i = 0; i < R; i++) d.v[i] = softplus<T>(value(raw_delta[i]) + bias);
        if (tile * TT + TT > L)
#pragma unroll
            for (int i = 0; i < R; i++) d.v[i] = tile * TT + w * R + i < L ? d.v[i] : 0.f;
#pragma unroll
        for (int i = 0; i < R; i++) u_next[i] = value(raw_u[i]), du.v[i] = d.v[i] * u_next[i];
        *(Row<R> *)dt_to = d, *(Row<R> *)(dt_to + TILE_E) = du;
#pragma unroll
        for (int k = 0; k < NS; k++) bc_to[k / 4 * 8 * PITCH + k % UNITS * 4] = value(raw_bc[k]);
    };
    auto walk = [&](int tile) {
        const float *dt_at = dt + (tile & 1) * 2 * TILE_E + lane * PITCH;
        const float *B_at = bc + (tile & 1) * TILE_BC + w * NS * PITCH, *C_at = B_at + N * PITCH;
        float *part_to = part + ((tile & 1) * S + w) * TILE_E + lane * PITCH;
        if (p.h_starts && tile * TT % SCAN_SAVE == 0 && live) {
            size_t chunks = (L + SCAN_SAVE - 1) / SCAN_SAVE,
                   at = ((size_t)b * chunks + tile * TT / SCAN_SAVE) * N + w * NS;
            for (int j = 0; j < NS; j++) p.h_starts[(at + j) * E + e] = h[j];
        }
#pragma unroll UNROLL
        for (int t = 0; t < TT; t += 4) {
            float d[4], du[4], y[4] = {0, 0, 0, 0};
            unpack(d, load4(dt_at + t)), unpack(du, load4(dt_at + TILE_E + t));
#pragma unroll
            for (int j = 0; j < NS; j++) {
                float B[4], C[4];
                unpack(B, load4(B_at + j * PITCH + t)), unpack(C, load4(C_at + j * PITCH + t));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    h[j] = fmaf(exp2_fast(d[i] * A[j]), h[j], du[i] * B[i]);
                    y[i] = fmaf(C[i], h[j], y[i]);
                }
            }
            *(float4 *)(part_to + t) = make_float4(y[0], y[1], y[2], y[3]);
        }
    };
    auto gate = [&](int tile) { // rows of z_before, u_before
        const float *part_at = part + (tile & 1) * S * TILE_E + lane * PITCH + w * R;
        T *to_row = out;
        out = down(to_row, TT, p.ld_out);
        float y[R];
#pragma unroll
        for (int i = 0; i < R; i++) y[i] = skip * u_before[i];
#pragma unroll
        for (int s = 0; s < S; s++) {
            Row<R> one = *(const Row<R> *)(part_at + s * TILE_E);
#pragma unroll
            for (int i = 0; i < R; i++) y[i] += one.v[i];
        }
#pragma unroll
        for (int i = 0; i < R; i += 2)
            gate_pair(y[i], y[i + 1], value(z_before[i]), value(z_before[i + 1]));
        int rows = live ? L - tile * TT - w * R : 0;
        if (rows >= R) {
#pragma unroll
            for (int i = 0; i < R; i++) *down(to_row, i, p.ld_out) = to<T>(y[i]);
        } else {
#pragma unroll
            for (int i = 0; i < R; i++)
                if (i < rows) *down(to_row, i, p.ld_out) = to<T>(y[i]);
        }
    };
    auto shift = [&]() {
#pragma unroll
        for (int i = 0; i < R; i++)
            z_before[i] = z_now[i], u_before[i] = u_now[i], u_now[i] = u_next[i];
    };

    load_raw(0);
    prepare(0);
    shift();
    load_raw(1);
    __syncthreads();
    for (int tile = 0; tile < tiles; tile++) {
        load_z(tile);
        walk(tile);
        prepare(tile + 1); // of the tile after the last: rows clamped, never used
        load_raw(tile + 2);
        if (tile > 0) gate(tile - 1);
        shift();
        __syncthreads();
    }
    gate(tiles - 1);
    if (p.h_final && live)
        for (int j = 0; j < NS; j++) p.h_final[((size_t)b * N + w * NS + j) * E + e] = h[j];
}

template <typename T, int S, int NS, int UNROLL, int MINB>
cudaError_t scan_walk_launch(Device *d, const ScanArgs<T> &p) {
    constexpr int bytes = (2 * 2 * S * NS + 4 * 32 + 2 * S * 32) * 20 * 4;
    return scan_launch(d, scan_walk<T, S, NS, UNROLL, MINB>, (size_t)p.B * ((p.E + 31) / 32),
                       32 * S, bytes, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// Many channels, few states: the relay. A block is 32 C channels of a sequence; its 4 warps take
// turns of 8 steps in time, and a warp does all states of its steps. delta, delta*u and y are then
// registers of one thread: nothing is prepared twice, y has no parts to add, and a warp stages
// B_ssm and C_ssm for itself alone. What goes from warp to warp is the state: each quarter of the
// states is handed on as soon as it is through, so all four warps work at a time. Sixteen named
// barriers (warp x quarter; one warp arrives, the next waits) do that, and nothing stops the block
// as a whole. A warp cannot overwrite states that the next one has not taken yet: it comes back to
// a quarter only after that went through all other warps. The limits: 64 barriers a multiprocessor,
// so at most four blocks; and four warps, since the way of a quarter around the ring (its own time
// in every warp) must be shorter than a warp's turn, softplus and gate included, or all wait; six
// and eight warps (with mbarriers) were slower.

// C neighbouring channels of a row: one load, one store.
template <typename T, int C> struct Pack {
    T v;
    __device__ __forceinline__ void zero() { v = to<T>(0.f); }
    __device__ __forceinline__ float get(int) const { return value(v); }
    __device__ __forceinline__ void set(const float *x) { v = to<T>(x[0]); }
};
template <> struct Pack<bf16, 2> {
    uint32_t v;
    __device__ __forceinline__ void zero() { v = 0; }
    __device__ __forceinline__ float get(int c) const {
        return __uint_as_float(c ? v & 0xffff0000u : v << 16);
    }
    __device__ __forceinline__ void set(const float *x) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(x[1]), "f"(x[0]));
    }
};

__device__ __forceinline__ void wait_for(int barrier) {
    asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void send_to(int barrier) {
    asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}

template <typename T, int NS, int C, int UNROLL, int MINB> // NS: a quarter of the states
__global__ void __launch_bounds__(128, MINB) scan_relay(ScanArgs<T> p) {
    constexpr int W = 4, Q = 4, K = 8, N = NS * Q, PITCH = K + 4, V = NS * C < 4 ? NS * C : 4,
                  M = NS * C / V;
    constexpr int UNITS = N / 4;
    typedef Pack<T, C> P;
    extern __shared__ float4 shared[];
    Row<V> *hand = (Row<V> *)shared,
           *As = hand + W * Q * M * 32; // [W][Q][M][32] states handed on, [Q][M][32] A_neg
    float *bc =
        (float *)(As + Q * M * 32); // [W][2N][PITCH] B_ssm, then C_ssm, of each warp's steps
    wait_for_input();
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, groups = (p.E + 32 * C - 1) / (32 * C),
              L = p.L, E = p.E;
    const int b = blockIdx.x / groups, e_true = (blockIdx.x % groups * 32 + lane) * C,
              tiles = (L + W * K - 1) / (W * K);
    const bool live = e_true < E;
    const int e = live ? e_true : E - C; // C divides E
    const size_t row = (size_t)b * L + w * K;
    const T *d_at = p.delta_raw + row * p.ld_delta + e, *u_at = p.u + row * p.ld_u + e,
            *z_at = p.z + row * p.ld_z + e;
    T *out = p.out + row * p.ld_out + e;
    // Units of 4 steps x 8 states of B_ssm and C_ssm: unit k is 4 (k % 2) steps and 8 (k / 2)
    // states on.
    const int bc_n = lane % 8, bc_t = lane / 8;
    const T *B_at = p.B_ssm + (row + bc_t) * p.ld_B + bc_n,
            *C_at = p.C_ssm + (row + bc_t) * p.ld_C + bc_n;
    bc += w * 2 * N * PITCH;
    float *bc_to = bc + bc_n * PITCH + bc_t;
    float bias[C], skip[C];
#pragma unroll
    for (int c = 0; c < C; c++) bias[c] = p.dt_bias[e + c], skip[c] = p.D_skip[e + c];
    // Floats of a quarter: number m V + v is state (m V + v) / C of channel (m V + v) % C. A_neg of
    // quarter w comes from warp w.
#pragma unroll
    for (int m = 0; m < M; m++) {
        Row<V> a;
#pragma unroll
        for (int v = 0; v < V; v++)
            a.v[v] = LOG2E * p.A_neg[(size_t)(w * NS + (m * V + v) / C) * E + e + (m * V + v) % C];
        As[(w * M + m) * 32 + lane] = a;
    }
    __syncthreads();
    Row<V> *h_in = hand + ((w + W - 1) % W) * Q * M * 32 + lane,
           *h_out = hand + w * Q * M * 32 + lane;
    const int id_in = (w + W - 1) % W * Q, id_out = w * Q;
    if (w == W - 1) // the first states come as if from the last warp
        for (int q = 0; q < Q; q++) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a;
#pragma unroll
                for (int v = 0; v < V; v++)
                    a.v[v] = p.h0 ? p.h0[((size_t)b * N + q * NS + (m * V + v) / C) * E + e +
                                         (m * V + v) % C]
                                  : 0.f;
                h_out[(q * M + m) * 32] = a;
            }
            send_to(id_out + q);
        }
    P raw_d[K], raw_u[K], raw_z[K];
    T raw_B[UNITS], raw_C[UNITS];
    float d[K][C], du[K][C], y[K][C];

    // Called for this warp's turns in order: pointers go on by themselves.
    auto load_raw = [&](int t0) {
        if (t0 + K <= L) {
#pragma unroll
            for (int i = 0; i < K; i++)
                raw_d[i] = *(const P *)down(d_at, i, p.ld_delta),
                raw_u[i] = *(const P *)down(u_at, i, p.ld_u);
#pragma unroll
            for (int k = 0; k < UNITS; k++)
                raw_B[k] = down(B_at, k % 2 * 4, p.ld_B)[k / 2 * 8],
                raw_C[k] = down(C_at, k % 2 * 4, p.ld_C)[k / 2 * 8];
        } else {
#pragma unroll
            for (int i = 0; i < K; i++) {
                raw_d[i].zero(), raw_u[i].zero();
                if (t0 + i < L)
                    raw_d[i] = *(const P *)down(d_at, i, p.ld_delta),
                    raw_u[i] = *(const P *)down(u_at, i, p.ld_u);
            }
#pragma unroll
            for (int k = 0; k < UNITS; k++) {
                raw_B[k] = raw_C[k] = to<T>(0.f);
                if (t0 + bc_t + k % 2 * 4 < L)
                    raw_B[k] = down(B_at, k % 2 * 4, p.ld_B)[k / 2 * 8],
                    raw_C[k] = down(C_at, k % 2 * 4, p.ld_C)[k / 2 * 8];
            }
        }
        d_at = down(d_at, W * K, p.ld_delta), u_at = down(u_at, W * K, p.ld_u);
        B_at = down(B_at, W * K, p.ld_B), C_at = down(C_at, W * K, p.ld_C);
    };
    auto load_z = [&](int t0) {
        if (t0 + K <= L) {
#pragma unroll
            for (int i = 0; i < K; i++) raw_z[i] = *(const P *)down(z_at, i, p.ld_z);
        } else {
#pragma unroll
            for (int i = 0; i < K; i++) {
                raw_z[i].zero();
                if (t0 + i < L) raw_z[i] = *(const P *)down(z_at, i, p.ld_z);
            }
        }
        z_at = down(z_at, W * K, p.ld_z);
    };
    // Past the end of time delta is 0: decay 1, inject 0, the state stays.
    auto prepare = [&](int t0) {
#pragma unroll
        for (int i = 0; i < K; i++)
#pragma unroll
            for (int c = 0; c < C; c++) d[i][c] = softplus<T>(raw_d[i].get(c) + bias[c]);
        if (t0 + K > L)
#pragma unroll
            for (int i = 0; i < K; i++)
#pragma unroll
                for (int c = 0; c < C; c++) d[i][c] = t0 + i < L ? d[i][c] : 0.f;
#pragma unroll
        for (int i = 0; i < K; i++)
#pragma unroll
            for (int c = 0; c < C; c++) {
                float u = raw_u[i].get(c);
                du[i][c] = d[i][c] * u, y[i][c] = skip[c] * u;
            }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            bc_to[k / 2 * 8 * PITCH + k % 2 * 4] = value(raw_B[k]);
            bc_to[(N + k / 2 * 8) * PITCH + k % 2 * 4] = value(raw_C[k]);
        }
        __syncwarp();
    };

    int t0 = w * K;
    load_raw(t0);
    prepare(t0);
    for (int tile = 0; tile < tiles; tile++, t0 += W * K) {
        load_z(t0); // for the end of this turn
        load_raw(t0 + W * K);
        const bool save = p.h_starts && t0 % SCAN_SAVE == 0 && t0 < L && live;
#pragma unroll UNROLL
        for (int q = 0; q < Q; q++) {
            float A[NS * C], h[NS * C];
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a = As[(q * M + m) * 32 + lane];
#pragma unroll
                for (int v = 0; v < V; v++) A[m * V + v] = a.v[v];
            }
            wait_for(id_in + q);
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a = h_in[(q * M + m) * 32];
#pragma unroll
                for (int v = 0; v < V; v++) h[m * V + v] = a.v[v];
            }
            if (save) {
                float *start =
                    p.h_starts +
                    (((size_t)b * ((L + SCAN_SAVE - 1) / SCAN_SAVE) + t0 / SCAN_SAVE) * N +
                     q * NS) *
                        E +
                    e;
                for (int f = 0; f < NS * C; f++) start[(size_t)(f / C) * E + f % C] = h[f];
            }
            const float *B_row = bc + q * NS * PITCH, *C_row = B_row + N * PITCH;
#pragma unroll
            for (int j = 0; j < NS; j++)
#pragma unroll
                for (int i = 0; i < K; i += 4) {
                    float Bs[4], Cs[4];
                    unpack(Bs, load4(B_row + j * PITCH + i)),
                        unpack(Cs, load4(C_row + j * PITCH + i));
#pragma unroll
                    for (int k = 0; k < 4; k++)
#pragma unroll
                        for (int c = 0; c < C; c++) {
                            float &s = h[j * C + c];
                            s = fmaf(exp2_fast(d[i + k][c] * A[j * C + c]), s,
                                     du[i + k][c] * Bs[k]);
                            y[i + k][c] = fmaf(Cs[k], s, y[i + k][c]);
                        }
                }
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a;
#pragma unroll
                for (int v = 0; v < V; v++) a.v[v] = h[m * V + v];
                h_out[(q * M + m) * 32] = a;
            }
            send_to(id_out + q);
        }
#pragma unroll
        for (int f = 0; f < K * C; f += 2)
            gate_pair(y[f / C][f % C], y[(f + 1) / C][(f + 1) % C], raw_z[f / C].get(f % C),
                      raw_z[(f + 1) / C].get((f + 1) % C));
        const int rows = live ? L - t0 : 0;
#pragma unroll
        for (int i = 0; i < K; i++) {
            P g;
            g.set(y[i]);
            if (i < rows) *(P *)down(out, i, p.ld_out) = g;
        }
        out = down(out, W * K, p.ld_out);
        prepare(t0 + W * K);
    }
    if (w == 0) // the last states end as if for the first warp
        for (int q = 0; q < Q; q++) {
            wait_for(id_in + q);
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a = h_in[(q * M + m) * 32];
                if (p.h_final && live)
#pragma unroll
                    for (int v = 0; v < V; v++)
                        p.h_final[((size_t)b * N + q * NS + (m * V + v) / C) * E + e +
                                  (m * V + v) % C] = a.v[v];
            }
        }
}

template <typename T, int NS, int C, int UNROLL, int MINB>
cudaError_t scan_relay_launch(Device *d, const ScanArgs<T> &p) {
    constexpr int bytes = (20 * NS * C * 32 + 32 * NS * 12) * 4;
    return scan_launch(d, scan_relay<T, NS, C, UNROLL, MINB>,
                       (size_t)p.B * ((p.E + 32 * C - 1) / (32 * C)), 128, bytes, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// Few channels: time is cut into tiles, tiles into pieces. Tickets give the blocks of a time before
// those of the next, so the block that a block waits for always runs or is done, in whatever order
// they start. Blocks that stay for many tiles were slower: the loop takes registers from the
// states. N is a run-time size; states are staged NB at a time.

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

template <typename T, int K, int W, int C, int MINB>
__global__ void __launch_bounds__(32 * W, MINB) scan_tiles(ScanArgs<T> p, ScanMail m) {
    constexpr int TILE = K * W,
                  NB = 16; // NB: states whose B_ssm, C_ssm and A_neg are staged at a time
    constexpr int ROW = 2 * TILE + 32 * C +
                        4; // odd multiples of 4 modulo 32, so that staging has no bank conflicts
    constexpr int A_IN_ROW = 2 * TILE, JOIN = 2 * W * 32;
    typedef Pack<T, C> P;
    extern __shared__ float4 shared[];
    float *rows =
        (float *)shared; // [NB][ROW]: B_ssm [TILE], C_ssm [TILE], A_neg [32][C] of a state
    // [2][2 W][32] pairs (x, y) of a map h -> x h + y: W-1 times nothing, the state before the tile
    // as (0, state), then of each warp (product of its decays, its end state from 0). So warp w's
    // first state is what W pairs from w on make of anything.
    auto join = (Row<2 * C> *)(rows + NB * ROW);
    P *zs = (P *)(join + 2 * JOIN); // [TILE][32], each thread its own
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, groups = (p.E + 32 * C - 1) / (32 * C),
              L = p.L, E = p.E, N = p.N;
    // The order in which blocks really start: whoever a tile waits for has started before it.
    __shared__ unsigned ticket;
    wait_for_input();
    if (threadIdx.x == 0)
        ticket = atomicAdd((unsigned *)m.words, 1u) - m.ticket; // modulo 2^32, as the counter
    __syncthreads();
    const int tile = ticket / (p.B * groups), in_tile = ticket % (p.B * groups),
              b = in_tile / groups, e_true = (in_tile % groups * 32 + lane) * C,
              tile_t = tile * TILE, t0 = tile_t + w * K;
    const bool live = e_true < E, last_tile = tile_t + TILE >= L;
    const uint32_t tag = m.tag + tile; // of the mail that this tile waits for
    const int e =
        live ? e_true : E - C; // C divides E; lanes beyond E do what the last lane within does
    const size_t row0 = (size_t)b * L, half = (size_t)p.B * N * E;
    float bias[C], skip[C];
#pragma unroll
    for (int c = 0; c < C; c++) bias[c] = p.dt_bias[e + c], skip[c] = p.D_skip[e + c];

    const T *d_at = p.delta_raw + (row0 + t0) * p.ld_delta + e,
            *u_at = p.u + (row0 + t0) * p.ld_u + e, *z_at = p.z + (row0 + t0) * p.ld_z + e;
    P raw_d[K], raw_u[K], raw_z[K];
    if (t0 + K <= L) {
#pragma unroll
        for (int i = 0; i < K; i++)
            raw_d[i] = *(const P *)down(d_at, i, p.ld_delta),
            raw_u[i] = *(const P *)down(u_at, i, p.ld_u),
            raw_z[i] = *(const P *)down(z_at, i, p.ld_z);
    } else {
#pragma unroll
        for (int i = 0; i < K; i++) {
            raw_d[i].zero(), raw_u[i].zero(), raw_z[i].zero();
            if (t0 + i < L)
                raw_d[i] = *(const P *)down(d_at, i, p.ld_delta),
                raw_u[i] = *(const P *)down(u_at, i, p.ld_u),
                raw_z[i] = *(const P *)down(z_at, i, p.ld_z);
        }
    }
    // Warps stage 4-step x 8-state units: states 8 (w % 4).. of the 2 NB of B_ssm and C_ssm.
    const bool is_C = w % 4 >= 2;
    const int bc_n = w % 2 * 8 + lane % 8, bc_t = w / 4 * 4 + lane / 8,
              ld_bc = is_C ? p.ld_C : p.ld_B;
    const T *bc_from = (is_C ? p.C_ssm : p.B_ssm) + (row0 + tile_t + bc_t) * ld_bc + bc_n;
    float *bc_to = rows + (is_C ? TILE : 0) + bc_n * ROW + bc_t;
    auto stage = [&](int n0) {
        if (tile_t + TILE <= L && n0 + NB <= N) {
            T raw[K];
#pragma unroll
            for (int v = 0; v < K; v++) raw[v] = down(bc_from, v * W, ld_bc)[n0];
#pragma unroll
            for (int v = 0; v < K; v++) bc_to[v * W] = value(raw[v]);
        } else
#pragma unroll 4
            for (int v = 0; v < K; v++) {
                bool in = tile_t + bc_t + v * W < L && n0 + bc_n < N;
                bc_to[v * W] = in ? value(down(bc_from, v * W, ld_bc)[n0]) : 0.f;
            }
        for (int n = w; n < NB; n += W) {
            Row<C> a;
#pragma unroll
            for (int c = 0; c < C; c++)
                a.v[c] = n0 + n < N ? LOG2E * p.A_neg[(size_t)(n0 + n) * E + e + c] : 0.f;
            ((Row<C> *)(rows + n * ROW + A_IN_ROW))[lane] = a;
        }
    };
    stage(0);
    if (w < W - 1) join[w * 32 + lane] = join[JOIN + w * 32 + lane] = {};
    float d[K][C], du[K][C], y[K][C], elapsed[C];
#pragma unroll
    for (int c = 0; c < C; c++) elapsed[c] = 0.f;
#pragma unroll
    for (int i = 0; i < K; i++) {
        zs[(w * K + i) * 32 + lane] = raw_z[i];
#pragma unroll
        for (int c = 0; c < C; c++) d[i][c] = softplus<T>(raw_d[i].get(c) + bias[c]);
    }
    if (t0 + K > L) // past the end of time delta is 0: decay 1, inject 0
#pragma unroll
        for (int i = 0; i < K; i++)
#pragma unroll
            for (int c = 0; c < C; c++) d[i][c] = t0 + i < L ? d[i][c] : 0.f;
#pragma unroll
    for (int i = 0; i < K; i++)
#pragma unroll
        for (int c = 0; c < C; c++) {
            float u = raw_u[i].get(c);
            du[i][c] = d[i][c] * u, y[i][c] = skip[c] * u, elapsed[c] += d[i][c];
        }
#pragma unroll
    for (int c = 0; c < C; c++)
        asm("" : "+f"(elapsed[c])); // or the compiler sums it again for every state

    // The first warp reads the mailbox of the tile before, the last warp writes this tile's.
    uint64_t *box = m.words + MAIL_BOXES + ((tile - (w == 0)) & 1) * half + (size_t)b * N * E + e;
    float *starts =
        p.h_starts && t0 % SCAN_SAVE == 0 && t0 < L
            ? p.h_starts +
                  ((size_t)b * ((L + SCAN_SAVE - 1) / SCAN_SAVE) + t0 / SCAN_SAVE) * N * E + e
            : NULL;
    float decay[K][C], prod[C], end[C]; // of one state; their product and the end state from 0
    Mail<C> mail = {};
    const float *row = rows + w * K, *A_at = rows + A_IN_ROW + lane * C; // of the state in hand
    int joined = w * 32 + lane;               // in the half of join with the state in hand
    const bool seldom = w == W - 1 || starts; // has more to do than its part of y

    // The forecast of a state lies in shared memory before the barrier that joins it.
    auto leave = [&](int n) {
        Row<2 * C> forecast;
#pragma unroll
        for (int c = 0; c < C; c++) forecast.v[c] = prod[c], forecast.v[C + c] = end[c];
        join[joined + W * 32] = forecast;
        if (w == 0) {
            auto before = Row<2 * C>();
            if (tile > 0) {
                for (int polls = 0; !mail.all(tag); polls++) {
                    mail.read(box);
                    give_up_after(polls);
                }
#pragma unroll
                for (int c = 0; c < C; c++)
                    before.v[C + c] = __uint_as_float((uint32_t)mail.word[c]);
            } else if (p.h0)
#pragma unroll
                for (int c = 0; c < C; c++) before.v[C + c] = p.h0[((size_t)b * N + n) * E + e + c];
            join[joined + (W - 1) * 32] = before;
        }
    };
    auto forecast = [&](const float *B, int i, Row<C> A) { // a step of the end state from 0
#pragma unroll
        for (int c = 0; c < C; c++) {
            decay[i][c] = exp2_fast(d[i][c] * A.v[c]);
            end[c] = i ? fmaf(decay[i][c], end[c], du[i][c] * B[i % 4]) : du[0][c] * B[0];
        }
    };
    // State n from its true start, and between its steps, which leave the special-function unit
    // idle, the forecast of the next state, whose decays take the places of those that have been
    // used.
    auto state_step = [&](auto more, int n) {
        Row<2 * C> part[W];
        Row<C> h, A;
#pragma unroll
        for (int v = 0; v < W; v++) part[v] = load_always(join + joined + v * 32);
        if (more.value) A = *(const Row<C> *)(A_at + ROW);
        if (more.value && w == 0 && tile > 0) mail.read(box += E);
#pragma unroll
        for (int c = 0; c < C; c++) h.v[c] = part[0].v[C + c];
#pragma unroll
        for (int v = 1; v < W; v++)
#pragma unroll
            for (int c = 0; c < C; c++) h.v[c] = fmaf(part[v].v[c], h.v[c], part[v].v[C + c]);
        if (seldom) {
            if (w == W - 1) {
                float after[C];
#pragma unroll
                for (int c = 0; c < C; c++) after[c] = fmaf(prod[c], h.v[c], end[c]);
                if (!last_tile) {
#pragma unroll
                    for (int c = 0; c < C; c++)
                        mail_write(box + c, (uint64_t)(tag + 1) << 32 | __float_as_uint(after[c]));
                    box += E;
                } else if (p.h_final)
#pragma unroll
                    for (int c = 0; c < C; c++)
                        p.h_final[((size_t)b * N + n) * E + e + c] = after[c];
            }
            if (starts) {
#pragma unroll
                for (int c = 0; c < C; c++) starts[c] = h.v[c];
                starts += E;
            }
        }
        if (more.value)
#pragma unroll
            for (int c = 0; c < C; c++) prod[c] = exp2_fast(elapsed[c] * A.v[c]);
#pragma unroll
        for (int i = 0; i < K; i += 4) {
            float B[4], C_row[4], B_next[4];
            if (more.value) unpack(B_next, load4(row + ROW + i));
            unpack(B, load4(row + i)), unpack(C_row, load4(row + TILE + i));
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int c = 0; c < C; c++) {
                    h.v[c] = fmaf(decay[i + k][c], h.v[c], du[i + k][c] * B[k]);
                    y[i + k][c] = fmaf(C_row[k], h.v[c], y[i + k][c]);
                }
                if (more.value) forecast(B_next, i + k, A);
            }
        }
        if (more.value) {
            row += ROW, A_at += ROW;
            joined = JOIN + 2 * (w * 32 + lane) - joined;
            leave(n + 1);
            __syncthreads();
        }
    };
    for (int n0 = 0; n0 < N; n0 += NB) {
        if (n0) {
            __syncthreads(); // all are done with the states before
            stage(n0);
            row = rows + w * K, A_at = rows + A_IN_ROW + lane * C;
            if (w == 0) box += E;
        }
        __syncthreads();
        const int count = min(NB, N - n0);
        if (w == 0 && tile > 0) mail.read(box);
        const Row<C> A = *(const Row<C> *)A_at;
#pragma unroll
        for (int c = 0; c < C; c++) prod[c] = exp2_fast(elapsed[c] * A.v[c]);
#pragma unroll
        for (int i = 0; i < K; i += 4) {
            float B[4];
            unpack(B, load4(row + i));
#pragma unroll
            for (int k = 0; k < 4; k++) forecast(B, i + k, A);
        }
        leave(n0);
        __syncthreads();
        for (int g = 0; g + 1 < count; g++) state_step(Yes(), n0 + g);
        state_step(No(), n0 + count - 1);
    }
    T *out = p.out + (row0 + t0) * p.ld_out + e;
    const int steps = live ? L - t0 : 0;
#pragma unroll
    for (int i = 0; i < K; i += 2) {
        P z0 = zs[(w * K + i) * 32 + lane], z1 = zs[(w * K + i + 1) * 32 + lane];
#pragma unroll
        for (int c = 0; c < C; c++) gate_pair(y[i][c], y[i + 1][c], z0.get(c), z1.get(c));
    }
#pragma unroll
    for (int i = 0; i < K; i++) {
        P g;
        g.set(y[i]);
        if (i < steps) *(P *)down(out, i, p.ld_out) = g;
    }
}

// Bytes of a mailbox for scans of up to (B,E,N): two words for each state, and the tickets.
static size_t scan_forward_workspace(int B, int E, int N) {
    return sizeof(uint64_t) * (2 * (size_t)B * N * E + MAIL_BOXES);
}

template <typename T, int K, int W, int C, int MINB>
static cudaError_t scan_tiles_launch(Device *d, const ScanArgs<T> &p) {
    constexpr int bytes = (16 * (2 * K * W + 32 * C + 4) + 2 * 2 * W * 32 * 2 * C) * 4 +
                          K * W * 32 * C * (int)sizeof(T);
    const size_t tiles = ((size_t)p.L + K * W - 1) / (K * W),
                 items = (size_t)p.B * ((p.E + 32 * C - 1) / (32 * C)) * tiles;
    ScanMail *m = p.mail;
    if (items > INT32_MAX || m->bytes < scan_forward_workspace(p.B, p.E, p.N))
        return cudaErrorInvalidValue;
    // Tags rise until they would wrap, which clears the boxes and starts again: a tag is then never
    // older than it looks. Tickets may wrap: only their difference to the launch's first is used.
    if (!m->cleared || m->tag > UINT32_MAX - tiles) {
        cudaError_t err = cudaMemsetAsync(m->words, 0, m->bytes, d->stream);
        if (err != cudaSuccess) return err;
        m->ticket = m->tag = 0, m->cleared = true;
    }
    cudaError_t err = scan_launch(d, scan_tiles<T, K, W, C, MINB>, items, 32 * W, bytes, p, *m);
    if (err != cudaSuccess) return err;
    m->tag += (uint32_t)tiles, m->ticket += (uint32_t)items;
    return cudaSuccess;
}

// A relay's time is that of the multiprocessor with most blocks: 88 us for 2,048 steps of one, 134
// of two, 187 of three; tiles spread over all and take 0.76 us a block of 32 channels. So tiles
// take few channels and what is a little over one block a multiprocessor, unless the text is too
// short to pay for their start. Else the relay for N = 8 and 16 (the walk where the text is short),
// the walk for 32 and 64, and tiles for any other N. With two channels a lane the relay does a
// block of 64 in 0.9 of the time of two blocks of 32, but its blocks spread less evenly: 192 over
// 132 multiprocessors are two for some, where 384 of 32 channels are three. Tiles gain 4 to 8% by
// two channels a lane where there are enough of them. Shape, alignment and machine alone decide, so
// every run gives the same bits.

template <typename T> static cudaError_t scan_forward(Device *d, const ScanArgs<T> &p) {
    size_t blocks = (size_t)p.B * ((p.E + 31) / 32), pairs = (size_t)p.B * ((p.E + 63) / 64),
           each = (size_t)d->processors;
    bool few = 20 * blocks < 18 * each || (blocks > each && 20 * blocks < 27 * each),
         brief = p.L <= 128;
    if (p.N != 8 && p.N != 16) few = 2 * blocks < 3 * each;
    bool paired = false; // two channels of bf16 are 4 bytes
    if constexpr (sizeof(T) == 2) {
        uintptr_t bases =
            (uintptr_t)p.out | (uintptr_t)p.delta_raw | (uintptr_t)p.u | (uintptr_t)p.z;
        paired = bases % 4 == 0 && (p.ld_out | p.ld_delta | p.ld_u | p.ld_z | p.E) % 2 == 0;
    }
    if (!few && !brief && (p.N == 8 || p.N == 16)) {
        if (p.N == 8) return scan_relay_launch<T, 2, 1, 4, 4>(d, p);
        if constexpr (sizeof(T) == 2)
            if (paired && blocks > 2 * each &&
                9 * 2 * ((pairs + each - 1) / each) <= 10 * ((blocks + each - 1) / each))
                return scan_relay_launch<T, 4, 2, 1, 3>(d, p);
        if (blocks <= 3 * each) return scan_relay_launch<T, 4, 1, 4, 3>(d, p);
        return scan_relay_launch<T, 4, 1, 4, 4>(d, p);
    }
    if (!few || brief) {
        if (p.N == 8) return scan_walk_launch<T, 4, 2, 4, 4>(d, p);
        if (p.N == 16) return scan_walk_launch<T, 4, 4, 4, 4>(d, p);
        if (p.N == 32) return scan_walk_launch<T, 4, 8, 2, 4>(d, p);
        if (p.N == 64) return scan_walk_launch<T, 8, 8, 2, 2>(d, p);
    }
    if constexpr (sizeof(T) == 2)
        if (paired && pairs * (((size_t)p.L + 63) / 64) >= 12 * each)
            return scan_tiles_launch<T, 16, 4, 2, 3>(d, p);
    return scan_tiles_launch<T, 16, 4, 1, 4>(d, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// One token of each of p.B sequences (L = 1): h (B,N,E), given as h0, becomes h_final, which may be
// the same array; both must be given. The state is all the traffic, read and written once; V
// neighbouring channels a lane make it 16-byte accesses, the Y warps of a block share the states.
// A_neg comes from L2. p.mail and p.h_starts are not used.

template <typename T, int V, int Y>
__global__ void __launch_bounds__(32 * Y) scan_step(ScanArgs<T> p) {
    __shared__ float part[Y][32 * V];
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, E = p.E, N = p.N,
              e = (blockIdx.x * 32 + lane) * V;
    const size_t b = blockIdx.y;
    const bool live = e < E; // V divides E
    float d[V], du[V], y[V];
    if (live) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            d[v] = softplus(value(p.delta_raw[b * p.ld_delta + e + v]) + p.dt_bias[e + v]);
            du[v] = d[v] * value(p.u[b * p.ld_u + e + v]), y[v] = 0.f, d[v] *= LOG2E;
        }
#pragma unroll 4
        for (int n = w; n < N; n += Y) {
            size_t at = (b * N + n) * E + e;
            float h[V], A[V], B = value(p.B_ssm[b * p.ld_B + n]),
                              C = value(p.C_ssm[b * p.ld_C + n]);
            if constexpr (V == 4)
                unpack(h, load4(p.h0 + at)), unpack(A, load4(p.A_neg + (size_t)n * E + e));
            else h[0] = p.h0[at], A[0] = p.A_neg[(size_t)n * E + e];
#pragma unroll
            for (int v = 0; v < V; v++) {
                h[v] = fmaf(exp2_fast(d[v] * A[v]), h[v], du[v] * B);
                y[v] = fmaf(C, h[v], y[v]);
            }
            if constexpr (V == 4) *(float4 *)(p.h_final + at) = make_float4(h[0], h[1], h[2], h[3]);
            else p.h_final[at] = h[0];
        }
#pragma unroll
        for (int v = 0; v < V; v++) part[w][v * 32 + lane] = y[v];
    }
    __syncthreads();
    for (int v = w; v < V;
         v += Y) // the sum over warps and the gate: warp v does each lane's channel v
        if (live) {
            float sum = p.D_skip[e + v] * value(p.u[b * p.ld_u + e + v]),
                  zv = value(p.z[b * p.ld_z + e + v]), none = 0.f;
#pragma unroll
            for (int s = 0; s < Y; s++) sum += part[s][v * 32 + lane];
            gate_pair(sum, none, zv, 0.f);
            p.out[b * p.ld_out + e + v] = to<T>(sum);
        }
}

template <typename T, int V, int Y>
static cudaError_t scan_step_launch(Device *d, const ScanArgs<T> &p) {
    scan_step<T, V, Y><<<dim3((p.E + 32 * V - 1) / (32 * V), p.B), 32 * Y, 0, d->stream>>>(p);
    return cudaGetLastError();
}

template <typename T> static cudaError_t scan_step_forward(Device *d, const ScanArgs<T> &p) {
    bool wide =
        p.E % 4 == 0 && ((uintptr_t)p.h0 | (uintptr_t)p.h_final | (uintptr_t)p.A_neg) % 16 == 0;
    if (!wide) return scan_step_launch<T, 1, 4>(d, p);
    if ((size_t)p.B * p.E < 1 << 18) return scan_step_launch<T, 4, 4>(d, p); // more warps: latency
    return scan_step_launch<T, 4, 1>(d, p); // enough warps: fewer of everything else
}

// The same in bf16 with dt_proj before it and FalconMamba's norms (norm_eps > 0): delta =
// softplus(W_dt dt_low + dt_bias) comes from the tensor cores and stays in shared memory, which
// saves a launch and a product that are all latency. A block is 128 channels of four sequences: a
// lane 4 channels, a warp a sequence. W_dt, A_neg and the states are on their way before the input
// is there.
__device__ inline void copy_async(void *to, const void *from) { // 16 bytes into shared memory
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(from)
        : "memory");
}

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
            copy_async(W + row * pitch + k, p.W_dt + (size_t)(channels + row) * R + k);
    }
    for (int i = threadIdx.x; i < N * (WIDTH / 4); i += 128) {
        int n = i / (WIDTH / 4), c = i % (WIDTH / 4) * 4;
        if (channels + c < E) copy_async(A + n * WIDTH + c, p.A_neg + (size_t)n * E + channels + c);
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
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if (p.norm_eps > 0) { // dt_low, B_ssm, C_ssm each to a mean square of 1
        for (int part = 0; part < 3; part++) {
            int n = part == 0 ? R : N;
            float squares = 0, *x = xdb + warp * P + (part == 0 ? 0 : R + (part - 1) * N);
            for (int i = lane; i < n; i += 32) squares += x[i] * x[i];
            float scale = rsqrtf(warp_sum(squares) / (float)n + p.norm_eps);
            for (int i = lane; i < n; i += 32) x[i] *= scale;
        }
        __syncthreads();
    }
    float sum[4][4] =
        {}; // of 32 channels a warp, eight at a time; which inputs are which k is as in thin_kernel
    for (int k = lane % 4 * 8; k < (R + 31) / 32 * 32; k += 32) {
        uint4 x = make_uint4(0, 0, 0, 0); // of the product's 16 rows there are four
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
                h[v] = fmaf(exp2_fast(delta[v] * a[v]), h[v], inject[v] * B);
                y[v] = fmaf(C, h[v], y[v]);
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
// Where it fits, and channels are few enough that launches weigh more than bytes: 5% of a step of
// 130M with 64 sequences, 2% of 370M; 2.8B gained nothing, and 256 sequences lost up to 10%.
static bool dt_step_pays(int S, int E, int N, int R) {
    return (size_t)S * E < 1 << 18 && E % 8 == 0 && R % 8 == 0 && (R + 2 * N) % 8 == 0 &&
           N <= DT_STEP_STATES && dt_step_shared(R, N) < 100000;
}
static void dt_step(Device *d, const DtStepArgs &p) {
    size_t shared = dt_step_shared(p.R, p.N);
    check_cuda(d,
               cudaFuncSetAttribute(dt_scan_step, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared),
               "scan");
    launch_dependent(
        d, dt_scan_step,
        dim3(blocks_for((size_t)p.E, DT_STEP_WIDTH), blocks_for((size_t)p.S, DT_STEP_ROWS)), 128,
        shared, p);
    check_launch(d, "scan");
}

// --- [train] the scan's backward
//
//     forward   h_t = decay_t h_{t-1} + delta_t B_t u_t, decay_t = exp(delta_t A_neg);  y_t = sum_n
//     C_t h_t + D_skip u_t;  g = y silu(z) backward  d_y = d_g silu(z);  d_h_t = d_y C_t +
//     decay_{t+1} d_h_{t+1};  d_C_t = sum_e d_y h_t;  d_B_t = sum_e d_h_t delta u
//               d_log = d_h_t decay_t h_{t-1};  d_A_neg += d_log delta;  d_delta = sum_n d_log
//               A_neg + u sum_n d_h_t B_t d_u = delta sum_n d_h_t B_t + D_skip d_y;  d_z = d_g y
//               silu'(z)
//
// WHAT LIVES WHERE. A block takes one tile, 32 channels (a lane each) by 64 steps (a piece of K = 8
// for each of 8 warps), and goes through it three times, a state after the other:
//   1 what a piece makes of zeros: the end of h forward, the end of d_h backward: (16,8,32) twice
//   into shared memory; 2 the ends joined to starts, two states a warp: h comes from the forward's
//   saved states, d_h from the tile after it through
//     global memory (mail), and goes on to the tile before it. A piece's decay is exp(A_neg times
//     its sum of delta);
//   3 the pieces from their true starts: h forward into registers, d_h backward, all gradients.
// Registers hold what all states of a step share: delta, delta*u, d_y, and the sums over states for
// d_delta, d_u and y, 6 floats a step; and of one state 8 decays and 8 h. Shared memory holds
// B_ssm, C_ssm and starts (44 kB) and what the end needs again (24 kB). h of all steps never
// exists. Tiles are handed out in the order of reversed time by a counter, so the one that a tile
// waits for has always started, any number of sequences and channels fills the machine, and the
// last round is short.
//
// BYTES a token and channel, bf16, N = 16: 8 read, 6 written; h_starts 1 and mail 2 (float, a 64th
// each way); the parts of d_B_ssm and d_C_ssm summed over 32 channels 4 written, 4 read; d_A_neg of
// a tile 1.1 written and read. What limits is not those 27 but instructions: about 37 a token,
// channel and state, of which 17 are the algorithm's.
//
// WHAT EACH TRICK BOUGHT (doc/SPEED.md has the ladder): sums over lanes on the tensor cores, a step
// behind the arithmetic; all states between two barriers, decays computed twice instead of kept;
// strides in bytes so that an address is one instruction; the end's inputs kept in shared memory
// instead of read again; the next tile's rows prefetched into L2. Deterministic: no sum depends on
// which block ran when.

#define LN2 0.693147181f

template <typename T> struct ScanBackArgs {
    T *d_delta_raw, *d_u, *d_z, *d_B_ssm, *d_C_ssm;    // (B*L,E) three times, (B*L,N) twice
    float *d_A_log, *d_D_skip, *d_dt_bias;             // (E,N), (E), (E): added to
    float *d_h0;                                       // (B,N,E) or NULL
    const T *d_g, *delta_raw, *u, *z, *B_ssm, *C_ssm;  // as in the forward
    const float *A_neg, *D_skip, *dt_bias, *h_starts;  // (N,E), (E), (E), (B,ceil(L/SCAN_SAVE),N,E)
    const float *d_h_final;                            // (B,N,E) or NULL: zeros
    size_t ld_d_delta, ld_d_u, ld_d_z, ld_d_B, ld_d_C; // elements from a row to the next
    size_t ld_d_g, ld_delta, ld_u, ld_z, ld_B, ld_C;
    int B, L, E, N;
    void *workspace; // scan_backward_workspace() bytes
};

// softplus and its derivative from the same exponential.
__device__ __forceinline__ float softplus(float x, float &slope) {
    float e = exp2_fast(-LOG2E * fabsf(x)), r = rcp_fast(1.f + e);
    slope = x < 0.f ? e * r : r;
    return fmaf(e, log1p_ratio<float>(e), fmaxf(x, 0.f));
}

// Sums over the 32 lanes of 16 values a lane, in two steps. Tensor cores add up lanes 4g..4g+3:
// four values are the left matrix of a product whose right one has ones in the two columns of slot
// j (ones[2j], ones[2j+1]); after slots 0..3, d in lane 4g+q holds values 4q..4q+3 of the lanes of
// group g. Products are cut to 11 bits (TF32), sums are float; EXACT: the rest of a value goes the
// same way. 18 instructions where an exchange of all 16 takes 62.
template <bool EXACT>
__device__ __forceinline__ void lane_sums(float (&d)[4], float v0, float v1, float v2, float v3,
                                          const uint32_t *ones) {
    const float v[4] = {v0, v1, v2, v3};
#pragma unroll
    for (int rest = 0; rest <= EXACT; rest++) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float high = __uint_as_float(__float_as_uint(v[i]) & 0xffffe000u);
            x[i] = __float_as_uint(!EXACT ? v[i] : rest ? v[i] - high : high);
        }
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[2]), "+f"(d[1]), "+f"(d[3])
            : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(ones[0]), "r"(ones[1]));
    }
}
// The sum over the 8 groups of value 4(lane%4) + 2(lane/16) + lane/8%2: an exchange in which each
// step halves the values.
__device__ __forceinline__ float group_sums(const float (&d)[4], int lane) {
    const bool up = lane & 16, up2 = lane & 8;
    float k0 = up ? d[2] : d[0], g0 = up ? d[0] : d[2], k1 = up ? d[3] : d[1],
          g1 = up ? d[1] : d[3];
    k0 += __shfl_xor_sync(~0u, g0, 16), k1 += __shfl_xor_sync(~0u, g1, 16);
    float k = up2 ? k1 : k0, give = up2 ? k0 : k1;
    k += __shfl_xor_sync(~0u, give, 8);
    return k + __shfl_xor_sync(~0u, k, 4);
}

__device__ __forceinline__ void prefetch_L2(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
__device__ __forceinline__ int load_acquire(const int *p) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_release(int *p, int v) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Row k of a column whose rows are `ld` bytes apart: one multiply-add.
template <typename T> __device__ __forceinline__ const T *row_at(const T *p, int k, int ld) {
    return (const T *)((const char *)p + (long long)k * ld);
}
template <typename T> __device__ __forceinline__ T *row_at(T *p, int k, int ld) {
    return (T *)((char *)p + (long long)k * ld);
}

enum { BACK_STATES = 16, BACK_STEPS = 8 }; // states at a time, steps of a piece

struct ScanBackPlan {
    int blocks, tiles;                            // blocks of 32 channels, tiles of time
    size_t flags, mail, partial2, partial, bytes; // offsets in 4-byte words; the whole
};

template <int W> constexpr size_t scan_back_shared() {
    return sizeof(float) * (BACK_STATES * (2 * W * BACK_STEPS + 4) +
                            BACK_STATES * (2 * W * 32 + 32) + 3 * W * 32 + 3 * BACK_STEPS * W * 32);
}

// The workspace, in words:
//   flags     tickets given; (blocks, B, tiles) groups of BACK_STATES states whose mail has come
//   mail      (B, tiles, N, E) d_h that a tile leaves to the tile before it
//   partial2  (B, tiles, N + 2, E) a tile's d_A_neg, d_D_skip, d_dt_bias
//   partial   (blocks, B, tiles, N, W, 2K) d_C_ssm, d_B_ssm summed over 32 channels
template <typename T, int W, int MINB, int U>
__global__ void __launch_bounds__(32 * W, MINB) scan_back(ScanBackArgs<T> p, ScanBackPlan q) {
    constexpr int TT = W * BACK_STEPS, THREADS = 32 * W, NS = BACK_STATES / W, XW = W * 32,
                  BC_ROW = 2 * TT + 4, X_ROW = 2 * XW + 32;
    static_assert(TT % SCAN_SAVE == 0, "a tile starts at a saved state");
    extern __shared__ float4 shared[];
    __shared__ int4 next;        // cb, b, tile; whether there is one
    float *bc = (float *)shared; // [BACK_STATES] rows: B_ssm (TT), C_ssm (TT)
    float *x = bc + BACK_STATES *
                        BC_ROW; // [BACK_STATES] rows: piece's end of h from zero, then its start,
                                // then its d_A (W,32); the same of d_h (W,32); A_neg log2(e) (32)
    float *sums = x + BACK_STATES * X_ROW; // [3][W][32] a piece's sums: delta, d_D_skip, d_dt_bias
    float *kept =
        sums + 3 * XW; // [3][BACK_STEPS][W][32] u, slope of softplus, d_z / (y + D_skip u)
    const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, L = p.L, E = p.E, N = p.N;
    const int tiles = q.tiles, items = q.blocks * p.B * tiles,
              saves = (L + SCAN_SAVE - 1) / SCAN_SAVE;
    int *flags = (int *)p.workspace + q.flags;
    float *mail = (float *)p.workspace + q.mail, *partial = (float *)p.workspace + q.partial;
    const int ld_delta = p.ld_delta * sizeof(T), ld_u = p.ld_u * sizeof(T),
              ld_z = p.ld_z * sizeof(T), ld_g = p.ld_d_g * sizeof(T);
    const int ld_B = p.ld_B * sizeof(T), ld_C = p.ld_C * sizeof(T);
    const int ld_d_delta = p.ld_d_delta * sizeof(T), ld_d_u = p.ld_d_u * sizeof(T),
              ld_d_z = p.ld_d_z * sizeof(T);

    // Tickets are given in the order of reversed time, so whoever a tile waits for has started.
    auto take = [&](int i) {
        return make_int4(i % q.blocks, i / q.blocks % p.B, tiles - 1 - i / (q.blocks * p.B),
                         i < items);
    };
    uint32_t ones[8];
#pragma unroll
    for (int i = 0; i < 8; i++) ones[i] = lane >> 2 == i ? 0x3f800000u : 0;
    if (tid == 0) next = take(atomicAdd(flags, 1));
    __syncthreads();
    for (int4 item = next; item.w;) {
        const int cb = item.x, b = item.y, tile = item.z;
        const int e_true = cb * 32 + lane, e = min(e_true, E - 1), t0 = tile * TT + w * BACK_STEPS;
        const bool live = e_true < E;
        const size_t bt = (size_t)b * tiles + tile;
        int *flag = flags + 1 + ((size_t)cb * p.B + b) * tiles + tile;
        const int left = L - 1 - t0; // steps after t0
        const int row0 = b * L, r0 = row0 + min(t0, L - 1);
        const T *delta_raw = row_at(p.delta_raw + e, r0, ld_delta), *u = row_at(p.u + e, r0, ld_u);
        const T *z = row_at(p.z + e, r0, ld_z), *d_g = row_at(p.d_g + e, r0, ld_g);
        int ticket = 0;
        if (tid == 0) ticket = atomicAdd(flags, 1);

        // What all states share. Steps past the end have delta = 0 and leave everything as it is.
        float delta[BACK_STEPS], delta_u[BACK_STEPS], dy[BACK_STEPS], sA[BACK_STEPS],
            sB[BACK_STEPS], y[BACK_STEPS], sum = 0.f;
        {
            T raw_[BACK_STEPS], u_[BACK_STEPS], z_[BACK_STEPS], g_[BACK_STEPS];
#pragma unroll
            for (int k = 0; k < BACK_STEPS; k++) {
                int i = max(0, min(k, left));
                raw_[k] = *row_at(delta_raw, i, ld_delta), u_[k] = *row_at(u, i, ld_u);
                z_[k] = *row_at(z, i, ld_z), g_[k] = *row_at(d_g, i, ld_g);
            }
            const float bias = p.dt_bias[e];
#pragma unroll
            for (int k = 0; k < BACK_STEPS; k++) {
                bool in = k <= left && live;
                float ut = value(u_[k]), zt = value(z_[k]), dgt = value(g_[k]), s = sigmoid(zt),
                      slope;
                float dt = softplus(value(raw_[k]) + bias, slope), dg_s = in ? dgt * s : 0.f;
                delta[k] = in ? dt : 0.f;
                delta_u[k] = delta[k] * ut, dy[k] = dg_s * zt;
                kept[k * THREADS + tid] = ut;
                kept[(BACK_STEPS + k) * THREADS + tid] = in ? slope : 0.f;
                kept[(2 * BACK_STEPS + k) * THREADS + tid] = fmaf(dy[k], 1.f - s, dg_s);
                sA[k] = sB[k] = y[k] = 0.f;
                sum += delta[k];
            }
        }
        sums[tid] = sum;

        // d_A_neg of the tile: the pieces' parts in order, after a barrier. A warp has NS states.
        auto add_d_A = [&](int n0) {
            float *out = (float *)p.workspace + q.partial2 + (bt * (N + 2) + n0 + w * NS) * E + e;
#pragma unroll
            for (int i = 0; i < NS; i++) {
                float d_A = 0.f;
#pragma unroll
                for (int j = 0; j < W; j++) d_A += x[(w * NS + i) * X_ROW + j * 32 + lane];
                if (n0 + w * NS + i < N && live) out[(size_t)i * E] = d_A;
            }
        };
        for (int n0 = 0; n0 < N; n0 += BACK_STATES) {
            const int count = min(BACK_STATES, N - n0);
            const int n_mine = min(n0 + tid % BACK_STATES, N - 1), first = tile * TT;
            const T *B_ssm = row_at(p.B_ssm + n_mine, row0, ld_B),
                    *C_ssm = row_at(p.C_ssm + n_mine, row0, ld_C);
#pragma unroll
            for (int i = 0; i < BACK_STATES * TT; i += THREADS) {
                int k = (i + tid) / BACK_STATES, t = min(first + k, L - 1);
                bool in = n0 + tid % BACK_STATES < N && first + k < L;
                float Bv = value(*row_at(B_ssm, t, ld_B)), Cv = value(*row_at(C_ssm, t, ld_C));
                bc[tid % BACK_STATES * BC_ROW + k] = in ? Bv : 0.f,
                                                bc[tid % BACK_STATES * BC_ROW + TT + k] =
                                                    in ? Cv : 0.f;
            }
            float h_start[NS], A2_mine[NS];
            const float *starts =
                p.h_starts + ((size_t)b * saves + tile * (TT / SCAN_SAVE)) * N * E + e;
#pragma unroll
            for (int i = 0; i < NS; i++) {
                size_t at = (size_t)min(n0 + w * NS + i, N - 1) * E;
                A2_mine[i] = LOG2E * p.A_neg[at + e], h_start[i] = starts[at];
                x[(w * NS + i) * X_ROW + 2 * XW + lane] = A2_mine[i];
            }
            __syncthreads();
            // 1. What a piece makes of zeros, forward and backward.
            const float *row_bc = bc + w * BACK_STEPS, *row_A = x + 2 * XW + lane;
            float *row_x = x + tid;
#pragma unroll 2
            for (int n = 0; n < count; n++, row_bc += BC_ROW, row_A += X_ROW, row_x += X_ROW) {
                float A2 = *row_A, h = 0.f, d_h = 0.f, a[BACK_STEPS], Bv[BACK_STEPS],
                      Cv[BACK_STEPS];
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k += 4) {
                    *(float4 *)(Bv + k) = *(const float4 *)(row_bc + k);
                    *(float4 *)(Cv + k) = *(const float4 *)(row_bc + TT + k);
                }
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k++) {
                    a[k] = exp2_fast(delta[k] * A2);
                    h = fmaf(a[k], h, delta_u[k] * Bv[k]);
                }
#pragma unroll
                for (int k = BACK_STEPS - 1; k >= 0; k--) d_h = fmaf(dy[k], Cv[k], d_h) * a[k];
                row_x[0] = h, row_x[XW] = d_h;
            }
            if (tid == 0) next = take(ticket);
            __syncthreads();
            // 2. Join the pieces: ends become starts. A piece's decay is that of its sum of delta.
            // A warp has NS states.
            if (tile + 1 < tiles) {
                const int *later = flag + 1;
                if (lane == 0)
                    for (int polls = 0; load_acquire(later) <= n0 / BACK_STATES; polls++) {
                        give_up_after(polls);
                        __nanosleep(64);
                    }
                __syncwarp();
            }
#pragma unroll
            for (int i = 0; i < NS; i++) {
                const int n = n0 + w * NS + i;
                if (n >= N) break;
                float A2 = A2_mine[i], h = h_start[i], decay[W],
                      *ends = x + (w * NS + i) * X_ROW + lane, *ends2 = ends + XW;
                float d_h = tile + 1 < tiles ? __ldcg(mail + ((bt + 1) * N + n) * E + e)
                            : p.d_h_final    ? p.d_h_final[((size_t)b * N + n) * E + e]
                                             : 0.f;
#pragma unroll
                for (int j = 0; j < W; j++) {
                    decay[j] = exp2_fast(A2 * sums[j * 32 + lane]);
                    float end = ends[j * 32];
                    ends[j * 32] = h;
                    h = fmaf(decay[j], h, end);
                }
#pragma unroll
                for (int j = W - 1; j >= 0; j--) {
                    float end = ends2[j * 32];
                    ends2[j * 32] = d_h;
                    d_h = fmaf(decay[j], d_h, end);
                }
                if (live && tile) mail[(bt * N + n) * E + e] = d_h;
                else if (live && p.d_h0) p.d_h0[((size_t)b * N + n) * E + e] = d_h;
            }
            __syncthreads();
            if (tid == 0 && tile) store_release(flag, n0 / BACK_STATES + 1);
            if (n0 == 0 &&
                next.w) { // the next tile's rows, into L2: 4 tensors of TT rows, one row a thread
                const int which = tid / TT, r = next.y * L + min(next.z * TT + tid % TT, L - 1);
                const T *row = which == 0   ? p.delta_raw
                               : which == 1 ? p.u
                               : which == 2 ? p.z
                                            : p.d_g;
                prefetch_L2(row_at(row + next.x * 32, r,
                                   which == 0   ? ld_delta
                                   : which == 1 ? ld_u
                                   : which == 2 ? ld_z
                                                : ld_g));
            }
            // 3. The pieces from their true starts: forward, then backward. A state's d_B_ssm and
            // d_C_ssm leave during the next state, whose arithmetic hides the latency of the sums.
            constexpr bool EXACT = sizeof(T) == 4;
            float *part = partial +
                          (((cb * (size_t)p.B * tiles + bt) * N + n0) * W + w) * 2 * BACK_STEPS +
                          lane % 4 * 4 + lane / 16 * 2 + lane / 8 % 2;
            float d_BC[4] = {};
            row_bc = bc + w * BACK_STEPS, row_A = x + 2 * XW + lane, row_x = x + tid;
#pragma unroll U
            for (int n = 0; n < count; n++, row_bc += BC_ROW, row_A += X_ROW, row_x += X_ROW) {
                float A2 = *row_A, d_h = row_x[XW], d_A = 0.f, a[BACK_STEPS], h[BACK_STEPS + 1],
                      Bv[BACK_STEPS], Cv[BACK_STEPS], v[4];
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k += 4) {
                    *(float4 *)(Bv + k) = *(const float4 *)(row_bc + k);
                    *(float4 *)(Cv + k) = *(const float4 *)(row_bc + TT + k);
                }
                float s = group_sums(d_BC, lane);
                if (!(lane & 4)) *part = s; // at n = 0 nothing yet, soon overwritten
                part += n ? 2 * BACK_STEPS * W : 0;
                h[0] = row_x[0];
#pragma unroll
                for (int i = 0; i < 4; i++) d_BC[i] = 0.f;
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k++) {
                    a[k] = exp2_fast(delta[k] * A2);
                    h[k + 1] = fmaf(a[k], h[k], delta_u[k] * Bv[k]);
                    y[k] = fmaf(Cv[k], h[k + 1], y[k]);
                    v[k % 4] = dy[k] * h[k + 1];
                    if (k % 4 == 3)
                        lane_sums<EXACT>(d_BC, v[0], v[1], v[2], v[3], ones + k / 4 * 2);
                }
#pragma unroll
                for (int k = BACK_STEPS - 1; k >= 0; k--) {
                    d_h = fmaf(dy[k], Cv[k], d_h);
                    sB[k] = fmaf(d_h, Bv[k], sB[k]);
                    v[3 - k % 4] = d_h * delta_u[k];
                    if (k % 4 == 0)
                        lane_sums<EXACT>(d_BC, v[0], v[1], v[2], v[3], ones + (k ? 4 : 6));
                    d_h *= a[k];
                    float d_log = d_h * h[k]; // gradient of delta A_neg
                    sA[k] = fmaf(d_log, A2, sA[k]);
                    d_A = fmaf(d_log, delta[k], d_A);
                }
                row_x[0] = d_A;
            }
            float s = group_sums(d_BC, lane);
            if (!(lane & 4)) *part = s;
            if (n0 + BACK_STATES < N) {
                __syncthreads();
                add_d_A(n0);
            }
        }
        float d_bias = 0.f, d_skip = 0.f;
        const float skip = p.D_skip[e];
        T *d_delta_raw = row_at(p.d_delta_raw + e, r0, ld_d_delta),
          *d_u = row_at(p.d_u + e, r0, ld_d_u), *d_z = row_at(p.d_z + e, r0, ld_d_z);
        const int steps = live ? left : -1;
#pragma unroll
        for (int k = 0; k < BACK_STEPS; k++) {
            float ut = kept[k * THREADS + tid],
                  d_raw = fmaf(LN2, sA[k], ut * sB[k]) * kept[(BACK_STEPS + k) * THREADS + tid];
            if (k <= steps) {
                *row_at(d_delta_raw, k, ld_d_delta) = to<T>(d_raw);
                *row_at(d_u, k, ld_d_u) = to<T>(fmaf(delta[k], sB[k], skip * dy[k]));
                *row_at(d_z, k, ld_d_z) =
                    to<T>(fmaf(skip, ut, y[k]) * kept[(2 * BACK_STEPS + k) * THREADS + tid]);
            }
            d_bias += d_raw;
            d_skip = fmaf(dy[k], ut, d_skip);
        }
        sums[XW + tid] = d_skip, sums[2 * XW + tid] = d_bias;
        __syncthreads();
        item = next;
        add_d_A((N - 1) / BACK_STATES * BACK_STATES);
        if (w < 2 && live) {
            float s = 0.f;
#pragma unroll
            for (int j = 0; j < W; j++) s += sums[(1 + w) * XW + j * 32 + lane];
            ((float *)p.workspace)[q.partial2 + (bt * (N + 2) + N + w) * E + e] = s;
        }
    }
}

// d_B_ssm and d_C_ssm: the channel blocks' parts in order. One thread an element.
template <typename T>
__global__ void scan_back_sum_BC(ScanBackArgs<T> p, const float *partial, int blocks, int tiles,
                                 int W) {
    size_t count = (size_t)p.B * tiles * p.N * W * 16,
           i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= count) return;
    int v = i % 16, w = i / 16 % W, n = i / (16 * W) % p.N,
        k = v < BACK_STEPS ? v : 2 * BACK_STEPS - 1 - v; // d_C_ssm upwards, d_B_ssm downwards
    size_t bt = i / ((size_t)16 * W * p.N);
    int t = (int)(bt % tiles) * W * BACK_STEPS + w * BACK_STEPS + k;
    if (t >= p.L) return;
    float s = 0.f;
#pragma unroll 8
    for (int c = 0; c < blocks; c++) s += partial[c * count + i];
    size_t r = bt / tiles * p.L + t;
    if (v < BACK_STEPS) p.d_C_ssm[r * p.ld_d_C + n] = to<T>(s);
    else p.d_B_ssm[r * p.ld_d_B + n] = to<T>(s);
}

// d_A_log, d_D_skip, d_dt_bias += sums over sequences and tiles: 32 channels and 8 strands of a
// fixed order a block.
template <typename T>
__global__ void scan_back_sum_A(ScanBackArgs<T> p, const float *partial2, int parts) {
    __shared__ float strands[8][32];
    int e = blockIdx.x * 32 + threadIdx.x, n = blockIdx.y, rows = p.N + 2;
    float s = 0.f;
    if (e < p.E)
#pragma unroll 4
        for (int i = threadIdx.y; i < parts; i += 8)
            s += partial2[((size_t)i * rows + n) * p.E + e];
    strands[threadIdx.y][threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.y || e >= p.E) return;
    for (int i = 1; i < 8; i++) s += strands[i][threadIdx.x];
    if (n < p.N) p.d_A_log[(size_t)e * p.N + n] += s * p.A_neg[(size_t)n * p.E + e];
    else if (n == p.N) p.d_D_skip[e] += s;
    else p.d_dt_bias[e] += s;
}

template <int W> static ScanBackPlan scan_back_plan(int B, int L, int E, int N) {
    ScanBackPlan q = {};
    q.blocks = (E + 31) / 32, q.tiles = (L + W * BACK_STEPS - 1) / (W * BACK_STEPS);
    size_t bt = (size_t)B * q.tiles, items = bt * q.blocks, at = 0;
    q.flags = at, at += (1 + items + 31) / 32 * 32;
    q.mail = at, at += bt * N * E;
    q.partial2 = at, at += (bt * (N + 2) * E + 31) / 32 * 32;
    q.partial = at, at += items * N * W * 2 * BACK_STEPS;
    q.bytes = at * 4;
    return q;
}

template <typename T, int W, int MINB, int U>
static cudaError_t scan_back_launch(const ScanBackArgs<T> &p, cudaStream_t stream) {
    const ScanBackPlan q = scan_back_plan<W>(p.B, p.L, p.E, p.N);
    auto kernel = scan_back<T, W, MINB, U>;
    constexpr size_t shared = scan_back_shared<W>();
    int device, processors;
    cudaError_t err = cudaGetDevice(&device);
    if (!err) err = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!err)
        err =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (!err)
        err = cudaMemsetAsync((int *)p.workspace + q.flags, 0, (q.mail - q.flags) * 4, stream);
    if (err) return err;
    size_t items = (size_t)p.B * q.tiles * q.blocks;
    int grid = items < (size_t)processors * MINB ? (int)items : processors * MINB;
    kernel<<<grid, 32 * W, shared, stream>>>(p, q);
    size_t sums = (size_t)p.B * q.tiles * p.N * W * 2 * BACK_STEPS;
    scan_back_sum_BC<<<(unsigned)((sums + 255) / 256), 256, 0, stream>>>(
        p, (float *)p.workspace + q.partial, q.blocks, q.tiles, W);
    scan_back_sum_A<<<dim3((p.E + 31) / 32, p.N + 2), dim3(32, 8), 0, stream>>>(
        p, (float *)p.workspace + q.partial2, p.B * q.tiles);
    return cudaGetLastError();
}

// One shape of block serves all sizes: 8 warps, 2 blocks a multiprocessor; phase 3 unrolled twice
// for bf16. The workspace is aligned to 16 bytes, needs no initial value and may be used for
// something else between calls.
static size_t scan_backward_workspace(int B, int L, int E, int N) {
    return scan_back_plan<8>(B, L, E, N).bytes;
}
template <typename T>
static cudaError_t scan_backward(const ScanBackArgs<T> &p, cudaStream_t stream) {
    constexpr int UNROLL = sizeof(T) == 2 ? 2 : 1;
    return scan_back_launch<T, 8, 2, UNROLL>(p, stream);
}

// The backward's inputs that are the forward's; outputs are the caller's to set.
template <class T>
static ScanBackArgs<T> scan_back_args(const ScanArgs<T> &p, const float *h_starts, const T *d_g,
                                      int ld_d_g, void *workspace) {
    ScanBackArgs<T> q = {};
    q.delta_raw = p.delta_raw, q.u = p.u, q.z = p.z, q.B_ssm = p.B_ssm, q.C_ssm = p.C_ssm;
    q.A_neg = p.A_neg, q.D_skip = p.D_skip, q.dt_bias = p.dt_bias, q.h_starts = h_starts;
    q.ld_delta = p.ld_delta, q.ld_u = p.ld_u, q.ld_z = p.ld_z, q.ld_B = p.ld_B, q.ld_C = p.ld_C;
    q.d_g = d_g, q.ld_d_g = ld_d_g, q.workspace = workspace;
    q.B = p.B, q.L = p.L, q.E = p.E, q.N = p.N;
    return q;
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 Model: weights, block, prefill, state
// The file's tensors are copied as they lie; matrices of another type than T are converted once. A
// piece of text is up to PIECE_MAX tokens, so memory does not depend on the prompt's length: window
// and h go from one piece to the next.

#define POINTER(name, rows, cols, type, init, decays, present) void *name;
struct LayerWeights { // matrices of type T, vectors float
    TENSORS_LAYER(POINTER)
    float *A_neg, *conv_t; // (N,E), (K,E), derived
};
struct Weights {
    TENSORS_FIRST(POINTER)
    TENSORS_LAST(POINTER)
    std::vector<LayerWeights> layer;
};
#undef POINTER

// One line for each tensor there is: its host tensor, its device pointer's place, whether it is a
// matrix.
struct TensorPlace {
    const Tensor *host;
    void **device;
    bool matrix, decays;
    const char *name;
    int layer;
};

static std::vector<TensorPlace> tensor_places(const Model *m, Weights *w) {
    const Config *c = &m->config;
    std::vector<TensorPlace> all;
    const Type matrix_type = c->type;
    (void)matrix_type;
    w->layer.resize((size_t)c->n_layer);
#define PLACE(owner, device_owner, index, name, rows_, cols_, type, init, decays, present) \
    (device_owner)->name = NULL; \
    if (present) \
        all.push_back( \
            {&(owner)->name, &(device_owner)->name, #type[0] == 'c', decays, #name, index});
#define PLACE_MODEL(name, rows_, cols_, type, init, decays, present) \
    PLACE(m, w, -1, name, rows_, cols_, type, init, decays, present)
#define PLACE_LAYER(name, rows_, cols_, type, init, decays, present) \
    PLACE(&m->layer[i], &w->layer[(size_t)i], i, name, rows_, cols_, type, init, decays, present)
    TENSORS_FIRST(PLACE_MODEL)
    for (int i = 0; i < c->n_layer; i++) {
        TENSORS_LAYER(PLACE_LAYER)
    }
    TENSORS_LAST(PLACE_MODEL)
#undef PLACE
#undef PLACE_MODEL
#undef PLACE_LAYER
    return all;
}

// A_neg (N,E) = -exp(A_log) transposed, and conv (E,K) transposed, of one layer.
__global__ void derive_kernel(float *A_neg, float *conv_t, const float *A_log, const float *conv,
                              int E, int N, int K) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < E * N) A_neg[(size_t)(i % N) * E + i / N] = -expf(A_log[i]);
    if (i < E * K) conv_t[(size_t)(i % K) * E + i / K] = conv[i];
}
static void derive(Device *d, const Config *c, const LayerWeights *w) {
    int n = c->E * std::max(c->N, c->K);
    derive_kernel<<<blocks_for((size_t)n, 256), 256, 0, d->stream>>>(
        w->A_neg, w->conv_t, (const float *)w->A_log, (const float *)w->conv, c->E, c->N, c->K);
    check_launch(d, "derive");
}

// The arrays of one block; in training those that backward needs are of the layer, the others
// shared.
template <class T> struct BlockActs {
    T *xn, *xz, *u, *xdb, *raw, *delta,
        *g;          // as in the glossary; raw: xdb before FalconMamba's norms, or NULL
    float *h_starts; // or NULL
    ScanMail *mail;  // of the scan
};

template <class T>
static ScanArgs<T> scan_args(const Config *c, const LayerWeights *w, BlockActs<T> a, int B, int L) {
    int E = c->E, N = c->N, R = c->R, P = R + 2 * N;
    ScanArgs<T> p = {};
    p.delta_raw = a.delta, p.u = a.u, p.z = a.xz + E, p.B_ssm = a.xdb + R, p.C_ssm = a.xdb + R + N,
    p.mail = a.mail;
    p.A_neg = w->A_neg, p.D_skip = (const float *)w->D_skip, p.dt_bias = (const float *)w->dt_bias;
    p.ld_out = p.ld_delta = p.ld_u = E, p.ld_z = 2 * E, p.ld_B = p.ld_C = P;
    p.B = B, p.L = L, p.E = E, p.N = N;
    return p;
}

// out (B*L,D) = res + block(res), out may be res. B = 1 or L = 1: with the states in window and h,
// which move on; else (both NULL) from zero.
template <class T>
static void block(Device *d, const Config *c, const LayerWeights *w, BlockActs<T> a, float *out,
                  const float *res, int B, int L, float *window, float *h) {
    int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N, rows = B * L;
    rmsnorm(d, a.xn, (size_t)D, res, (size_t)D, (const float *)w->norm, c->norm_eps, rows, D);
    matmul(d, a.xz, 2 * (size_t)E, a.xn, (size_t)D, (const T *)w->in_proj, rows, 2 * E, D);
    add_bias(d, a.xz, 2 * (size_t)E, (const float *)w->in_bias, rows, 2 * E);
    conv1d_silu(d, a.u, window, a.xz, w->conv_t, (const float *)w->conv_bias, B, L, E, K);
    matmul(d, a.xdb, (size_t)P, a.u, (size_t)E, (const T *)w->x_proj, rows, P, E);
    if (sizeof(T) == 2 && L == 1 && h && dt_step_pays(B, E, N, R)) {
        const float *dt_bias = (const float *)w->dt_bias, *D_skip = (const float *)w->D_skip;
        dt_step(d, {(bf16 *)a.g, h, (const bf16 *)a.xdb, (const bf16 *)a.u, (const bf16 *)a.xz + E,
                    (const bf16 *)w->dt_proj, dt_bias, w->A_neg, D_skip, B, E, N, R,
                    c->flags & FLAG_MIXER_NORM ? c->mixer_eps : 0});
    } else {
        if (c->flags & FLAG_MIXER_NORM) {
            if (a.raw)
                cudaMemcpyAsync(a.raw, a.xdb, (size_t)rows * P * sizeof(T),
                                cudaMemcpyDeviceToDevice, d->stream);
            rmsnorm(d, a.xdb, (size_t)P, a.xdb, (size_t)P, NULL, c->mixer_eps, rows, R);
            rmsnorm(d, a.xdb + R, (size_t)P, a.xdb + R, (size_t)P, NULL, c->mixer_eps, rows, N);
            rmsnorm(d, a.xdb + R + N, (size_t)P, a.xdb + R + N, (size_t)P, NULL, c->mixer_eps, rows,
                    N);
        }
        matmul(d, a.delta, (size_t)E, a.xdb, (size_t)P, (const T *)w->dt_proj, rows, E, R);
        ScanArgs<T> scan = scan_args(c, w, a, B, L);
        scan.out = a.g, scan.h0 = scan.h_final = h, scan.h_starts = a.h_starts;
        check_cuda(d, L == 1 && h ? scan_step_forward(d, scan) : scan_forward(d, scan), "scan");
    }
    if (out == res)
        matmul(d, out, (size_t)D, a.g, (size_t)E, (const T *)w->out_proj, rows, D, E, true);
    else matmul_onto(d, out, res, a.g, (const T *)w->out_proj, rows, D, E);
    add_bias(d, out, (size_t)D, (const float *)w->out_bias, rows, D);
}

enum { GPU_PIECE = 16384, GPU_LOGIT_FLOATS = 1 << 26 };

struct States { // of S sequences
    int S;
    float *window, *h, *logits; // (n_layer,S,K-1,E), (n_layer,S,N,E), (S,V)
};

struct Gpu {
    Device device;
    Config config;
    bool bf16_compute;
    Weights w;
    std::vector<void *> memory; // everything to free
    int piece, logit_rows;      // rows that the activations, the logits have room for
    float *res, *logits;        // (piece,D), (logit_rows,V)
    BlockActs<float> acts;      // its pointers are T's
    ScanMail mail;
    int32_t *ids;       // (piece)
    int S;              // sequences in the state
    float *window, *h;  // (n_layer,S,K-1,E), (n_layer,S,N,E)
    float *step_logits; // (S,V), after the last token of each
    States gathered;    // by gpu_gather(), or S = 0
    struct Generation *generation;
};

static void *gpu_take(Gpu *g, size_t bytes) {
    void *p = device_alloc(bytes);
    if (p) g->memory.push_back(p);
    return p;
}

template <class T> static BlockActs<T> acts_of(const Gpu *g) {
    const BlockActs<float> &a = g->acts;
    return {(T *)a.xn, (T *)a.xz, (T *)a.u, (T *)a.xdb, NULL, (T *)a.delta, (T *)a.g, NULL, a.mail};
}

// out (rows, cols) = the tiles of Q8 or Q4 (mamba.c, section 3), one thread a weight.
template <class T>
__global__ void dequantize_kernel(T *out, const unsigned char *tiles, int bits, int rows,
                                  int cols) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)rows * cols) return;
    int row = (int)(i / cols), col = (int)(i % cols), codes = 32 / bits, j = col % codes;
    size_t at = (size_t)(row / TILE) * ((cols + TILE - 1) / TILE) + col / TILE;
    const unsigned char *tile = tiles + at * (size_t)(2 * TILE + bits * TILE * 4);
    uint32_t word =
        ((const uint32_t *)(tile + 2 * TILE))[col % TILE / codes * TILE + row % TILE] ^ 0x80000000u;
    int code = (int)(word >> (j * bits) & ((1u << bits) - 1)) - (1 << (bits - 1));
    out[i] =
        (T)((float)code * __uint_as_float((uint32_t)((const uint16_t *)tile)[row % TILE] << 16));
}

template <class T> static int upload_weights(Gpu *g, const Model *m) {
    const Config *c = &m->config;
    Device *d = &g->device;
    const char *host = (const char *)m->embedding.data;
    char *raw = (char *)gpu_take(g, m->tensors_bytes);
    Type compute = sizeof(T) == 4 ? F32 : BF16;
    if (!raw) return -1;
    // On the stream: a plain cudaMemcpy may return before its last bytes have landed, and this
    // stream does not wait for it.
    check_cuda(d, cudaMemcpyAsync(raw, host, m->tensors_bytes, cudaMemcpyHostToDevice, d->stream),
               "weights");
    std::vector<TensorPlace> places = tensor_places(m, &g->w);
    for (const TensorPlace &p : places) {
        const void *from = raw + ((const char *)p.host->data - host);
        size_t n = (size_t)p.host->rows * (size_t)p.host->cols;
        *p.device = (void *)from;
        if (!p.matrix || p.host->type == compute) continue;
        T *to = (T *)gpu_take(g, n * sizeof(T));
        if (!to) return -1;
        if (p.host->type == F32) convert(d, to, (const float *)from, n);
        else if (p.host->type == BF16) convert(d, to, (const bf16 *)from, n);
        else if (p.host->type == F16) convert(d, to, (const uint16_t *)from, n);
        else
            dequantize_kernel<<<blocks_for(n, 256), 256, 0, d->stream>>>(
                to, (const unsigned char *)from, p.host->type == Q8 ? 8 : 4, p.host->rows,
                p.host->cols);
        check_launch(d, "weights");
        *p.device = to;
    }
    if (c->flags & FLAG_TIED) g->w.head = g->w.embedding;
    float *derived =
        (float *)gpu_take(g, (size_t)c->n_layer * c->E * (size_t)(c->N + c->K) * sizeof(float));
    if (!derived) return -1;
    for (LayerWeights &w : g->w.layer) {
        w.A_neg = derived, w.conv_t = derived + (size_t)c->E * c->N;
        derived += (size_t)c->E * (size_t)(c->N + c->K);
        derive(d, c, &w);
    }
    return finish(d);
}

static int gpu_sequences(Gpu *g, int S);
static void generation_free(Gpu *g);

static void states_free(States *s) {
    cudaFree(s->window), cudaFree(s->h), cudaFree(s->logits);
    *s = {};
}

static void gpu_close(Gpu *g) {
    if (!g) return;
    if (g->device.stream) cudaStreamSynchronize(g->device.stream);
    generation_free(g);
    for (void *p : g->memory) cudaFree(p);
    cudaFree(g->window), cudaFree(g->h), cudaFree(g->step_logits);
    states_free(&g->gathered);
    device_close(&g->device);
    delete g;
}

template <class T> static size_t lay_out_acts(Gpu *g, char *base) {
    const Config *c = &g->config;
    size_t M = (size_t)g->piece, D = (size_t)c->D, E = (size_t)c->E, P = (size_t)(c->R + 2 * c->N),
           V = (size_t)c->V;
    Arena a = {base, 0};
    BlockActs<float> *b = &g->acts;
    a.take(g->res, M * D), a.take(g->logits, (size_t)g->logit_rows * V), a.take(g->ids, M);
    a.take(b->xn, M * D, sizeof(T)), a.take(b->xz, M * 2 * E, sizeof(T)),
        a.take(b->u, M * E, sizeof(T));
    a.take(b->xdb, M * P, sizeof(T)), a.take(b->delta, M * E, sizeof(T)),
        a.take(b->g, M * E, sizeof(T));
    b->mail = &g->mail, g->mail = {};
    a.take(g->mail.words, g->mail.bytes = scan_forward_workspace(1, c->E, c->N), 1);
    return a.used;
}

// The model on the GPU; float32: compute so whatever the weights are stored as. Zero states. NULL
// with a sentence.
static Gpu *gpu_open(const Model *m, int float32) {
    Gpu *g = new Gpu();
    const Config *c = &m->config;
    g->config = *c;
    g->bf16_compute = (c->type == BF16 || c->type == Q8 || c->type == Q4) && !float32;
    size_t row = (size_t)c->D * 8 + (size_t)c->E * 24,
           most = ((size_t)3 << 30) / row; // 3 GB of activations at the most
    g->piece = (int)std::min((size_t)GPU_PIECE, std::max((size_t)64, most / 64 * 64));
    g->logit_rows = std::max(1, std::min(1024, GPU_LOGIT_FLOATS / c->V));
    char *arena = NULL;
    if (device_open(&g->device) == 0 &&
        (g->bf16_compute ? upload_weights<bf16>(g, m) : upload_weights<float>(g, m)) == 0 &&
        (arena = (char *)gpu_take(g, g->bf16_compute ? lay_out_acts<bf16>(g, NULL)
                                                     : lay_out_acts<float>(g, NULL)))) {
        if (g->bf16_compute) lay_out_acts<bf16>(g, arena);
        else lay_out_acts<float>(g, arena);
        if (gpu_sequences(g, 1) == 0) return g;
    }
    gpu_close(g);
    return NULL;
}

static float *window_of(const Gpu *g, int layer) {
    return g->window + (size_t)layer * g->S * (g->config.K - 1) * g->config.E;
}
static float *h_of(const Gpu *g, int layer) {
    return g->h + (size_t)layer * g->S * g->config.N * g->config.E;
}

// States of S sequences from now on, each a copy of the first; logits too. 0, or -1 with a
// sentence.
static int gpu_sequences(Gpu *g, int S) {
    const Config *c = &g->config;
    size_t window = (size_t)(c->K - 1) * c->E * sizeof(float),
           h = (size_t)c->N * c->E * sizeof(float), logits = (size_t)c->V * sizeof(float),
           layers = (size_t)c->n_layer;
    float *new_window = (float *)device_alloc(layers * S * window),
          *new_h = (float *)device_alloc(layers * S * h),
          *new_logits = (float *)device_alloc(S * logits);
    if (!new_window || !new_h || !new_logits) {
        cudaFree(new_window), cudaFree(new_h), cudaFree(new_logits);
        return -1;
    }
    cudaStream_t stream = g->device.stream;
    for (int s = 0; s < S; s++) {
        if (!g->window) {
            cudaMemset2DAsync((char *)new_window + s * window, S * window, 0, window, layers,
                              stream);
            cudaMemset2DAsync((char *)new_h + s * h, S * h, 0, h, layers, stream);
            cudaMemsetAsync((char *)new_logits + s * logits, 0, logits, stream);
            continue;
        }
        if (window)
            cudaMemcpy2DAsync((char *)new_window + s * window, S * window, g->window, g->S * window,
                              window, layers, cudaMemcpyDeviceToDevice, stream);
        cudaMemcpy2DAsync((char *)new_h + s * h, S * h, g->h, g->S * h, h, layers,
                          cudaMemcpyDeviceToDevice, stream);
        cudaMemcpyAsync((char *)new_logits + s * logits, g->step_logits, logits,
                        cudaMemcpyDeviceToDevice, stream);
    }
    int result = finish(&g->device);
    cudaFree(g->window), cudaFree(g->h), cudaFree(g->step_logits);
    g->window = new_window, g->h = new_h, g->step_logits = new_logits;
    g->S = S;
    generation_free(g);
    return result;
}

// Moves the present sequence's state and logits to place s of S and leaves a zero state, for
// another prompt. The next gpu_generate_start, of S sequences, goes on from those gathered. 0, or
// -1 with a sentence.
static int gpu_gather(Gpu *g, int s, int S) {
    const Config *c = &g->config;
    size_t window = (size_t)(c->K - 1) * c->E * sizeof(float),
           h = (size_t)c->N * c->E * sizeof(float), logits = (size_t)c->V * sizeof(float),
           layers = (size_t)c->n_layer;
    cudaStream_t stream = g->device.stream;
    States *to = &g->gathered;
    if (s < 0 || s >= S) return gpu_fail("place %d of %d sequences", s, S);
    if (g->S != 1 && gpu_sequences(g, 1)) return -1;
    if (to->S != S) {
        states_free(to);
        to->window = (float *)device_alloc(layers * S * window),
        to->h = (float *)device_alloc(layers * S * h);
        to->logits = (float *)device_alloc(S * logits);
        if (!to->window || !to->h || !to->logits) return states_free(to), -1;
        to->S = S;
        cudaMemsetAsync(to->window, 0, layers * S * window, stream);
        cudaMemsetAsync(to->h, 0, layers * S * h, stream),
            cudaMemsetAsync(to->logits, 0, S * logits, stream);
    }
    if (window)
        cudaMemcpy2DAsync((char *)to->window + s * window, S * window, g->window, window, window,
                          layers, cudaMemcpyDeviceToDevice, stream);
    cudaMemcpy2DAsync((char *)to->h + s * h, S * h, g->h, h, h, layers, cudaMemcpyDeviceToDevice,
                      stream);
    cudaMemcpyAsync((char *)to->logits + s * logits, g->step_logits, logits,
                    cudaMemcpyDeviceToDevice, stream);
    cudaMemsetAsync(g->window, 0, layers * window, stream),
        cudaMemsetAsync(g->h, 0, layers * h, stream);
    cudaMemsetAsync(g->step_logits, 0, logits, stream);
    return finish(&g->device);
}

// One sequence's state from host arrays window (n_layer,K-1,E), h (n_layer,N,E), logits (V). 0, or
// -1 with a sentence.
static int gpu_set_state(Gpu *g, const float *window, const float *h, const float *logits) {
    const Config *c = &g->config;
    if (g->S != 1 && gpu_sequences(g, 1)) return -1;
    size_t layers = (size_t)c->n_layer * c->E * sizeof(float);
    cudaMemcpyAsync(g->window, window, layers * (size_t)(c->K - 1), cudaMemcpyHostToDevice,
                    g->device.stream);
    cudaMemcpyAsync(g->h, h, layers * (size_t)c->N, cudaMemcpyHostToDevice, g->device.stream);
    cudaMemcpyAsync(g->step_logits, logits, (size_t)c->V * sizeof(float), cudaMemcpyHostToDevice,
                    g->device.stream);
    return finish(&g->device);
}

// The state of the first sequence to host arrays; NULL ones are left out.
static int gpu_get_state(Gpu *g, float *window, float *h, float *logits) {
    const Config *c = &g->config;
    size_t bw = (size_t)(c->K - 1) * c->E * sizeof(float), bh = (size_t)c->N * c->E * sizeof(float),
           n = (size_t)c->n_layer;
    cudaStream_t stream = g->device.stream;
    if (window && bw)
        cudaMemcpy2DAsync(window, bw, g->window, g->S * bw, bw, n, cudaMemcpyDeviceToHost, stream);
    if (h) cudaMemcpy2DAsync(h, bh, g->h, g->S * bh, bh, n, cudaMemcpyDeviceToHost, stream);
    if (logits)
        cudaMemcpyAsync(logits, g->step_logits, (size_t)c->V * sizeof(float),
                        cudaMemcpyDeviceToHost, stream);
    return finish(&g->device);
}

// The network for B sequences of L tokens whose ids are on the device: B = 1 (a piece of text) or L
// = 1 (a step of S = B). ids NULL: res has the embeddings already. Leaves the normed residual
// stream in xn.
template <class T> static void network(Gpu *g, const int32_t *ids, int B, int L) {
    Device *d = &g->device;
    const Config *c = &g->config;
    BlockActs<T> a = acts_of<T>(g);
    if (ids)
        embed_kernel<<<(unsigned)(B * L), 128, 0, d->stream>>>(g->res, ids,
                                                               (const T *)g->w.embedding, c->D);
    for (int layer = 0; layer < c->n_layer; layer++)
        block(d, c, &g->w.layer[(size_t)layer], a, g->res, g->res, B, L, window_of(g, layer),
              h_of(g, layer));
    rmsnorm(d, a.xn, (size_t)c->D, g->res, (size_t)c->D, (const float *)g->w.norm_f, c->norm_eps,
            B * L, c->D);
}

template <class T>
static int prefill(Gpu *g, const int32_t *ids, size_t n, void (*visit)(void *, const float *),
                   void *context) {
    Device *d = &g->device;
    const Config *c = &g->config;
    size_t D = (size_t)c->D, V = (size_t)c->V;
    std::vector<float> host(visit ? (size_t)g->logit_rows * V : 0);
    for (size_t done = 0; done < n;) {
        int L = (int)std::min(n - done, (size_t)g->piece);
        cudaMemcpyAsync(g->ids, ids + done, (size_t)L * sizeof *ids, cudaMemcpyHostToDevice,
                        d->stream);
        network<T>(g, g->ids, 1, L);
        const T *xn = acts_of<T>(g).xn;
        for (int t = 0; t < L && visit; t += g->logit_rows) {
            int rows = std::min(g->logit_rows, L - t);
            matmul(d, g->logits, V, xn + (size_t)t * D, D, (const T *)g->w.head, rows, c->V, c->D);
            cudaMemcpyAsync(host.data(), g->logits, (size_t)rows * V * sizeof(float),
                            cudaMemcpyDeviceToHost, d->stream);
            if (finish(d)) return -1;
            for (int r = 0; r < rows; r++) visit(context, host.data() + (size_t)r * V);
        }
        done += (size_t)L;
        if (done == n)
            matmul(d, g->step_logits, V, xn + (size_t)(L - 1) * D, D, (const T *)g->w.head, 1, c->V,
                   c->D);
    }
    return finish(d);
}

// Reads n tokens into the first sequence's state (ids must be below V); visit gets every position's
// logits (V), if it is not NULL. 0, or -1 with a sentence.
static int gpu_prefill(Gpu *g, const int32_t *ids, size_t n, void (*visit)(void *, const float *),
                       void *context) {
    if (g->S != 1 && gpu_sequences(g, 1)) return -1;
    return g->bf16_compute ? prefill<bf16>(g, ids, n, visit, context)
                           : prefill<float>(g, ids, n, visit, context);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 Generation: step, sampling, graph
// A step samples a token for each of S sequences from its logits and reads it, so ids never wait
// for the host: they are collected on the device and fetched after some steps. The whole step is
// one graph, captured once for each S.

struct Sequence { // of the sampler, for each sequence
    uint64_t position, random;
    int32_t recent[RECENT], n_recent, step; // step: which row of tokens is next
};

struct Slice;
struct Solo;
struct Wide;
static void solo_free(Solo *q);
static void wide_free(Wide *q);

struct Generation {
    Sampling *how;          // device
    Sequence *sequences;    // (S), device
    unsigned char *allowed; // (V): ids that may be drawn
    Slice *slices;          // (S,SLICES)
    int32_t *tokens;        // (GENERATE_MAX,S): what was drawn
    int32_t *current;       // (S): the token being read
    float *scratch, *parts; // (S,V); (K_SPLIT_MAX,S,P), sums of parts of x_proj
    struct Solo *solo;      // or NULL
    struct Wide *wide;      // or NULL
    cudaGraphExec_t graph;
    int S;
};

enum { GENERATE_MAX = 64 };

// Floats as unsigned integers of the same order, and back.
__device__ inline uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The highest x and its lowest index, over the block.
__device__ inline void block_argmax(float *best, int *index, float *values, int *indices) {
    for (int lane = 16; lane; lane /= 2) {
        float x = __shfl_xor_sync(0xffffffffu, *best, lane);
        int i = __shfl_xor_sync(0xffffffffu, *index, lane);
        if (x > *best || (x == *best && i < *index)) *best = x, *index = i;
    }
    int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) values[warp] = *best, indices[warp] = *index;
    __syncthreads();
    *best = values[0], *index = indices[0];
    for (int w = 1; w < warps; w++)
        if (values[w] > *best || (values[w] == *best && indices[w] < *index))
            *best = values[w], *index = indices[w];
}

// Repeat penalty, and the likeliest of each of SLICES parts of the vocabulary: what a greedy step
// needs of V logits is spread over the multiprocessors. Logits as they will be drawn from go to
// scratch, -inf where no token can be drawn, unless nothing will be drawn.
enum { SLICES = 32 };
struct Slice {
    float best;
    int32_t index, bad;
};

__global__ void __launch_bounds__(256)
    likeliest_kernel(const Sampling *how, const Sequence *sequences, const float *logits,
                     const unsigned char *allowed, float *scratch, Slice *slices, int V) {
    __shared__ float values[32];
    __shared__ int indices[32], bad;
    wait_for_input();
    const Sequence *q = &sequences[blockIdx.y];
    int chunk = (V + SLICES - 1) / SLICES, first = blockIdx.x * chunk, last = min(first + chunk, V);
    const float *in = logits + (size_t)blockIdx.y * V;
    float *x = scratch + (size_t)blockIdx.y * V, penalty = how->repeat_penalty, best = -INFINITY;
    int likeliest = V;
    if (threadIdx.x == 0) bad = 0;
    __syncthreads();
    const bool again =
        how->temperature != 0 || penalty != 1; // whether logits are needed after this
    for (int v = first + threadIdx.x; v < last;
         v += 4 * blockDim.x) { // four loads on the way at once
        float l[4];
        bool may[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = v + i * (int)blockDim.x;
            l[i] = at < last ? in[at] : 0, may[i] = at < last && allowed[at];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = v + i * (int)blockDim.x;
            if (!(l[i] - l[i] == 0)) bad = 1;
            if (again && at < last) x[at] = may[i] ? l[i] : -INFINITY;
            if (may[i] && l[i] > best) best = l[i], likeliest = at;
        }
    }
    __syncthreads();
    if (penalty != 1 &&
        threadIdx.x < (unsigned)q->n_recent) { // a token is penalised once, however often it occurs
        int v = q->recent[threadIdx.x];
        bool mine = v >= first && v < last;
        for (int j = 0; j < (int)threadIdx.x && mine; j++) mine = q->recent[j] != v;
        if (mine) x[v] = x[v] > 0 ? x[v] / penalty : x[v] * penalty;
    }
    if (penalty != 1) {
        __syncthreads();
        best = -INFINITY, likeliest = V;
        for (int v = first + threadIdx.x; v < last; v += blockDim.x)
            if (x[v] > best) best = x[v], likeliest = v;
    }
    block_argmax(&best, &likeliest, values, indices);
    if (threadIdx.x == 0) slices[blockIdx.y * SLICES + blockIdx.x] = {best, likeliest, bad};
}

// One block draws one sequence's token: temperature, then the lowest logit that top-k, top-p and
// min-p leave, found by bisection over the 2^32 floats, and of what is left the highest logit +
// Gumbel noise, which is a draw from the softmax. The noise depends on seed, position and token
// only. The residual stream starts with the token's embedding.
template <class T>
__global__ void __launch_bounds__(1024)
    sample_kernel(const Sampling *how, Sequence *sequences, const Slice *slices, float *scratch,
                  int32_t *current, int32_t *tokens, float *res, const T *embedding, int S, int V,
                  int D) {
    __shared__ float sums[33], values[32];
    __shared__ int indices[32];
    wait_for_input();
    Sequence *q = &sequences[blockIdx.x];
    float *x = scratch + (size_t)blockIdx.x * V, best = -INFINITY, temperature = how->temperature;
    int choice = V, bad = 0;
    for (int i = 0; i < SLICES; i++) {
        Slice slice = slices[blockIdx.x * SLICES + i];
        if (slice.best > best)
            best = slice.best, choice = slice.index; // of equal ones the lowest index
        bad |= slice.bad;
    }
    if (temperature != 0 && !bad && choice < V) {
        float highest = best, lowest = -INFINITY, whole = 1;
        for (int v = threadIdx.x; v < V; v += blockDim.x)
            x[v] = (x[v] - highest) / temperature; // now at most 0
        __syncthreads();
        bool by_count = how->top_k > 0 && how->top_k < V, by_mass = how->top_p < 1;
        for (int rule = 0; rule < 2; rule++) {
            if (!(rule ? by_mass : by_count)) continue;
            if (rule) { // the mass of what top-k left
                float mass = 0;
                for (int v = threadIdx.x; v < V; v += blockDim.x)
                    mass += x[v] >= lowest ? __expf(x[v]) : 0.0f;
                whole = block_sum(mass, sums);
            }
            uint32_t yes = ordered(-INFINITY),
                     no = ordered(0) + 1; // enough is kept above yes, too little above no
            while (no - yes > 1) {
                uint32_t middle = yes + (no - yes) / 2;
                float threshold = fmaxf(unordered(middle), lowest), sum = 0;
                for (int v = threadIdx.x; v < V; v += blockDim.x)
                    if (x[v] >= threshold) sum += rule ? __expf(x[v]) : 1.0f;
                sum = block_sum(sum, sums);
                if (rule ? sum >= how->top_p * whole : sum >= (float)how->top_k) yes = middle;
                else no = middle;
            }
            lowest = fmaxf(lowest, unordered(yes));
        }
        if (how->min_p > 0) lowest = fmaxf(lowest, __logf(how->min_p));
        if (lowest > 0) lowest = 0;
        best = -INFINITY, choice = V;
        uint64_t stream = mix(q->random + 0x9E3779B97F4A7C15u * (q->position + 1));
        for (int v = threadIdx.x; v < V; v += blockDim.x) {
            if (x[v] == -INFINITY || !(x[v] >= lowest)) continue;
            float unit =
                ((float)(mix(stream + 0x9E3779B97F4A7C15u * (uint64_t)(v + 1)) >> 40) + 0.5f) *
                0x1p-24f;
            float noisy = x[v] - __logf(-__logf(unit));
            if (noisy > best) best = noisy, choice = v;
        }
        block_argmax(&best, &choice, values, indices);
    }
    if (choice >= V) bad = 1;
    if (bad) choice = 0;
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        res[(size_t)blockIdx.x * D + i] = value(embedding[(size_t)choice * D + i]);
    __syncthreads(); // all have read q
    if (threadIdx.x) return;
    tokens[(size_t)q->step * S + blockIdx.x] = bad ? -1 : choice;
    q->step = (q->step + 1) % GENERATE_MAX;
    current[blockIdx.x] = choice;
    q->recent[q->position % RECENT] = choice;
    q->position++;
    q->n_recent = q->position < RECENT ? (int32_t)q->position : RECENT;
}

static void generation_free(Gpu *g) {
    Generation *n = g->generation;
    if (!n) return;
    if (n->graph) cudaGraphExecDestroy(n->graph);
    cudaFree(n->how), cudaFree(n->sequences), cudaFree(n->allowed), cudaFree(n->tokens),
        cudaFree(n->slices);
    cudaFree(n->current), cudaFree(n->scratch), cudaFree(n->parts), solo_free(n->solo),
        wide_free(n->wide);
    delete n;
    g->generation = NULL;
}

// --- The step in bf16 for up to THIN_MAX sequences (more: network(), whose products are cuBLAS's):
// four kernels a layer. At batch 1 a step is 0.26 GB of weights and a hundred dependent kernels, so
// what counts is their number, and that each has its weights in flight before its input is there:
// they are launched with programmatic dependence and load their first weights before waiting for
// the kernel before.
//   1 in_proj      of the residual stream; the norm's factor is applied to the sums, its weight to
//   the inputs 2 x_proj       of silu(conv(x)), computed as it is read; sums of K_SPLIT parts of
//   the channels 3 dt_proj, the scan's step, the gate; moves the window on, which kernel 2 has read
//   4 out_proj     added to the residual stream
// Kernels 1, 2 and 4 and the head are one, thin_kernel: S rows of activations times W (O,I). A warp
// takes 8*NT outputs and a part of I, 32 inputs at a time by two m16n8k16 tensor-core products with
// activations as the 16 rows. Which of the 32 inputs is which k of a product is ours to choose, as
// long as both sides agree: lane j of 4 takes inputs 8j..8j+7, one 16-byte load.

enum { THIN_MAX = 16, THIN_WARPS = 8, K_SPLIT_MAX = 16 };

struct PlainSource { // rows of bf16
    const bf16 *x;
    static constexpr bool norm = false;
    __device__ uint4 eight(int s, int k, int I, float *) const {
        return *(const uint4 *)(x + (size_t)s * I + k);
    }
};
struct NormSource { // rows of the residual stream, times the norm's weight; their squares are
                    // summed for the norm's factor
    const float *res, *weight;
    float eps;
    static constexpr bool norm = true;
    __device__ uint4 eight(int s, int k, int I, float *squares) const {
        const float4 *x = (const float4 *)(res + (size_t)s * I + k),
                     *w = (const float4 *)(weight + k);
        float4 a = x[0], b = x[1], c = w[0], d = w[1];
        *squares += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y +
                    b.z * b.z + b.w * b.w;
        return make_uint4(pack(a.x * c.x, a.y * c.y), pack(a.z * c.z, a.w * c.w),
                          pack(b.x * d.x, b.y * d.y), pack(b.z * d.z, b.w * d.w));
    }
};
struct ConvSource { // u = silu(conv(x)) of the x half of xz and the window
    const bf16 *xz;
    const float *window, *conv_t, *bias;
    int K;
    static constexpr bool norm = false;
    __device__ uint4 eight(int s, int k, int E, float *) const {
        uint4 x = *(const uint4 *)(xz + (size_t)s * 2 * E + k);
        float v[8] = {low_half(x.x), high_half(x.x), low_half(x.y), high_half(x.y),
                      low_half(x.z), high_half(x.z), low_half(x.w), high_half(x.w)},
              sum[8];
        for (int i = 0; i < 8; i++)
            sum[i] = (bias ? bias[k + i] : 0) + conv_t[(size_t)(K - 1) * E + k + i] * v[i];
        for (int j = 0; j < K - 1; j++) {
            const float4 *w = (const float4 *)(window + ((size_t)s * (K - 1) + j) * E + k),
                         *c = (const float4 *)(conv_t + (size_t)j * E + k);
            float4 w0 = w[0], w1 = w[1], c0 = c[0], c1 = c[1];
            sum[0] += w0.x * c0.x, sum[1] += w0.y * c0.y, sum[2] += w0.z * c0.z,
                sum[3] += w0.w * c0.w;
            sum[4] += w1.x * c1.x, sum[5] += w1.y * c1.y, sum[6] += w1.z * c1.z,
                sum[7] += w1.w * c1.w;
        }
        for (int i = 0; i < 8; i++) sum[i] = silu(sum[i]);
        return make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]),
                          pack(sum[6], sum[7]));
    }
};

struct StoreSink { // out (S,O) = sums, in bf16
    bf16 *out;
    __device__ void take(int s, int o, int, int O, float x) const {
        out[(size_t)s * O + o] = __float2bfloat16_rn(x);
    }
};
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

template <int NT, int AHEAD, class Source, class Sink>
__global__ void __launch_bounds__(32 * THIN_WARPS)
    thin_kernel(Source source, Sink sink, const bf16 *__restrict__ W, int S, int O, int I) {
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
                tensor_product(c[n], a.x, b.x, a.y, b.y, w[i][n].x, w[i][n].y);
                tensor_product(c[n], a.z, b.z, a.w, b.w, w[i][n].z, w[i][n].w);
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

// Kernel 3, a thread a channel and a block 128 channels of one sequence: xdb from its parts,
// FalconMamba's norms, delta = softplus(W_dt dt_low + bias), the step of the recurrence, the gate.
template <int NS, int RV> // states, and groups of 8 weights of dt_proj, that are loaded before the
                          // input is there
__global__ void __launch_bounds__(128)
    thin_scan_kernel(bf16 *__restrict__ g, float *__restrict__ h, float *__restrict__ window,
                     const float *__restrict__ parts, int K_SPLIT, const bf16 *__restrict__ xz,
                     const float *__restrict__ conv_t, const float *__restrict__ conv_bias,
                     const bf16 *__restrict__ W_dt, const float *__restrict__ dt_bias,
                     const float *__restrict__ A_neg, const float *__restrict__ D_skip, int E,
                     int N, int K, int R, float norm_eps) {
    extern __shared__ float xdb[]; // (P)
    int P = R + 2 * N, s = blockIdx.y, S = gridDim.y, e = blockIdx.x * 128 + threadIdx.x;
    bool live = e < E;
    size_t at = (size_t)(live ? e : 0);
    float A[NS];
#pragma unroll
    for (int n = 0; n < NS; n++) A[n] = n < N ? A_neg[(size_t)n * E + at] : 0;
    uint4 weights[RV];
    const bf16 *row = W_dt + at * R;
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
    wait_for_input();
    float x = value(xz[(size_t)s * 2 * E + at]), z = value(xz[(size_t)s * 2 * E + E + at]);
    for (int i = threadIdx.x; i < P; i += 128) {
        float sum = 0;
#pragma unroll 8
        for (int part = 0; part < K_SPLIT; part++) sum += parts[((size_t)part * S + s) * P + i];
        xdb[i] = sum;
    }
    __syncthreads();
    if (norm_eps > 0) { // FalconMamba: dt_low, B_ssm, C_ssm each to a mean square of 1; a warp each
        int part = threadIdx.x / 32, first = part == 0 ? 0 : R + (part - 1) * N,
            n = part == 0 ? R : N;
        float squares = 0;
        for (int i = threadIdx.x % 32; i < n && part < 3; i += 32)
            squares += xdb[first + i] * xdb[first + i];
        float scale = rsqrtf(warp_sum(squares) / (float)n + norm_eps);
        for (int i = threadIdx.x % 32; i < n && part < 3; i += 32) xdb[first + i] *= scale;
        __syncthreads();
    }
    if (!live) return;
    // u again, and only now the window moves on, which kernel 2 has read
#pragma unroll
    for (int k = 0; k < 3; k++)
        if (K <= 4 && k < K - 1) inputs[(size_t)k * E] = k + 2 < K ? past[k < 2 ? k + 1 : 2] : x;
    for (int k = 0; k < K - 1 && K > 4; k++)
        inputs[(size_t)k * E] = k + 2 < K ? inputs[(size_t)(k + 1) * E] : x;
    float u = value(__float2bfloat16_rn(silu(conv + last_tap * x)));
    auto eight = [&](uint4 w, const float *in) {
        return low_half(w.x) * in[0] + high_half(w.x) * in[1] + low_half(w.y) * in[2] +
               high_half(w.y) * in[3] + low_half(w.z) * in[4] + high_half(w.z) * in[5] +
               low_half(w.w) * in[6] + high_half(w.w) * in[7];
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
            float next = __expf(delta * A[n]) * ahead[n] + inject * B_ssm[n];
            state[(size_t)n * E] = next, y += C_ssm[n] * next;
        }
    for (int n = NS; n < N; n++) {
        float next =
            __expf(delta * A_neg[(size_t)n * E + e]) * state[(size_t)n * E] + inject * B_ssm[n];
        state[(size_t)n * E] = next, y += C_ssm[n] * next;
    }
    put(g + (size_t)s * E + e, y * silu(z));
}

// Few outputs a block, so that there are blocks for every multiprocessor, and as many steps of a
// warp ahead as it has.
template <int NT, int AHEAD, class Source, class Sink>
static void thin_launch(Device *d, Source source, Sink sink, const bf16 *W, int S, int O, int I,
                        int parts) {
    size_t shared = (size_t)THIN_WARPS * 16 * (8 * NT + 2) * sizeof(float);
    launch_dependent(d, thin_kernel<NT, AHEAD, Source, Sink>,
                     dim3(blocks_for((size_t)O, 8 * NT), (unsigned)parts),
                     32 * (unsigned)THIN_WARPS, shared, source, sink, W, S, O, I);
}
template <class Source, class Sink>
static void thin_product(Device *d, Source source, Sink sink, const bf16 *W, int S, int O, int I,
                         int parts) {
    int steps = (I + 31) / 32 / (THIN_WARPS * parts); // of a warp
    if (O >= 16384) thin_launch<4, 3>(d, source, sink, W, S, O, I, parts);
    else if (O >= 8192) thin_launch<2, 5>(d, source, sink, W, S, O, I, parts);
    else if (steps <= 1) thin_launch<1, 1>(d, source, sink, W, S, O, I, parts);
    else if (steps <= 3) thin_launch<1, 3>(d, source, sink, W, S, O, I, parts);
    else if (steps <= 4) thin_launch<1, 4>(d, source, sink, W, S, O, I, parts);
    else if (steps == 7 || steps == 8) thin_launch<1, 8>(d, source, sink, W, S, O, I, parts);
    else thin_launch<1, 6>(d, source, sink, W, S, O, I, parts);
}

// Whether the kernels above fit: 16-byte loads need rows of whole 8 weights.
static bool thin_fits(const Gpu *g, int S) {
    const Config *c = &g->config;
    return g->bf16_compute && S <= THIN_MAX && c->D % 8 == 0 && c->E % 8 == 0 &&
           !(c->flags & FLAG_PROJ_BIAS) && (c->R + 2 * c->N) * sizeof(float) < 48000;
}

// network() and the head for one token of each of S sequences; res has their embeddings.
static void thin_step(Gpu *g, int S) {
    Device *d = &g->device;
    const Config *c = &g->config;
    BlockActs<bf16> a = acts_of<bf16>(g);
    int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N;
    int parts = std::max(1, std::min((int)K_SPLIT_MAX, (E / 32 + THIN_WARPS - 1) / THIN_WARPS));
    float *sums = g->generation->parts; // (K_SPLIT_MAX,S,P)
    float eps = c->flags & FLAG_MIXER_NORM ? c->mixer_eps : 0;
    dim3 scan_grid(blocks_for((size_t)E, 128), (unsigned)S);
    for (int layer = 0; layer < c->n_layer; layer++) {
        const LayerWeights *w = &g->w.layer[(size_t)layer];
        const float *conv_bias = (const float *)w->conv_bias;
        float *window = window_of(g, layer), *h = h_of(g, layer);
        thin_product(d, NormSource{g->res, (const float *)w->norm, c->norm_eps}, StoreSink{a.xz},
                     (const bf16 *)w->in_proj, S, 2 * E, D, 1);
        thin_product(d, ConvSource{a.xz, window, w->conv_t, conv_bias, K}, PartSink{sums},
                     (const bf16 *)w->x_proj, S, P, E, parts);
        launch_dependent(d, R <= 64 ? thin_scan_kernel<16, 8> : thin_scan_kernel<16, 20>, scan_grid,
                         128, (size_t)P * sizeof(float), a.g, h, window, sums, parts, a.xz,
                         w->conv_t, conv_bias, (const bf16 *)w->dt_proj, (const float *)w->dt_bias,
                         w->A_neg, (const float *)w->D_skip, E, N, K, R, eps);
        thin_product(d, PlainSource{a.g}, AddSink{g->res}, (const bf16 *)w->out_proj, S, D, E, 1);
    }
    thin_product(d, NormSource{g->res, (const float *)g->w.norm_f, c->norm_eps},
                 LogitSink{g->step_logits}, (const bf16 *)g->w.head, S, c->V, D, 1);
}

// --- The step in bf16 of one sequence on Hopper: one kernel. What bounds such a step is neither
// bytes nor arithmetic but how often all multiprocessors must hear from each other. A block takes
// its channels through a whole layer, in_proj to out_proj, so that only two sums over all channels
// are left a layer: x_proj's outputs and out_proj's. Each goes the same way:
//   every block computes its channels' part and sends it to the blocks of its cluster of 8, each of
//   which adds up an eighth, writes that to global memory, every number with a tag that says of
//   which layer and step it is (no other barrier is needed), polls for the same eighth from all
//   clusters, adds up, and sends the sum to the 8 blocks of its cluster.
// For such parts x_proj and out_proj are read by channel, so they lie transposed. All that a block
// reads of a layer (weights, vectors, its channels' state) is fetched in order, layers ahead, by
// the copy engine, which a warp of its own feeds, into a ring of slots in shared memory. (Plain
// loads would do for the state, but polls wait behind them, for loads return in order.) A slot
// holds 8 rows of in_proj, of out_proj's transpose or of the head, or a layer's small things.
// Products are the tensor cores' (with plain arithmetic, unpacking the weights was what took
// longest), inputs as the sum of two bf16, in two of the product's 8 or 16 columns. Outputs go by
// pairs i, i + 8 of each 16, which one lane has.

enum {
    SOLO_CLUSTER = 8,
    SOLO_CLUSTERS = 16,
    SOLO_THREADS = 256,
    SOLO_WARPS = 8,
    SOLO_ROWS = 8,
    SOLO_STATES = 16,
    SOLO_TAPS = 4
};
enum {
    SOLO_SLOTS = 24,
    SOLO_BARRIERS = 2 * SOLO_SLOTS + 4,
    SOLO_PAD = 8,
    SOLO_X_TILES = 2,
    SOLO_FLYING = 49152
};
// PAD: of rows, against bank conflicts; X_TILES: of x_proj, for each block of a cluster, at the
// most; FLYING: bytes on their way to a block: more do not come faster, and polls wait behind them

struct SoloLayer {
    const bf16 *W_in, *W_dt; // (2E,D), (E,R)
};
struct SoloArgs {
    const SoloLayer *layers;        // (n_layer)
    const bf16 *W_x, *W_out, *head; // (n_layer,E,P+PAD), (n_layer,E,D+PAD): transposed; (V,D)
    float *vectors;                 // (n_layer,blocks,vector_floats), see SoloVectors
    const float *res, *norm;        // (D): the token's embedding; the first layer's norm
    float *logits;                  // (V)
    ulonglong2 *xdb_words,
        *res_words; // (8,CLUSTERS,8 X_TILES), (8,CLUSTERS,D/16): pairs, each number with a tag
    uint32_t *turn; // steps so far
    int clusters, channels, slots, slot_bytes,
        flying; // channels: of a block; flying: slots that are being filled
    int vector_floats, n_layer, D, E, N, K, R, P, V; // P: R + 2 N as a multiple of 16
    float eps, mixer_eps;                            // mixer_eps: of FalconMamba's norms, or 0
};

// Where what lies in a block's vectors of a layer: A and h (channels,N), conv and window
// (taps,channels), and of the next norm the pairs that the block adds up.
struct SoloVectors {
    int A, conv, conv_bias, dt_bias, D_skip, h, window, norm, floats;
    __host__ __device__ SoloVectors(int channels, int N, int K, int D) {
        A = 0, conv = A + channels * N, conv_bias = conv + channels * K,
        dt_bias = conv_bias + channels;
        D_skip = dt_bias + channels, h = D_skip + channels, window = h + channels * N;
        norm = (window + channels * (K - 1) + 3) / 4 * 4, floats = norm + D / SOLO_CLUSTER;
    }
};

// Shared memory, in the order in which it lies.
struct SoloShared {
    size_t ring, x, res_parts, gathered, xdb_parts, xdb, squares, sums, u, gate, u_words, y_words,
        bytes;
    int sum_rows;
    __host__ __device__ SoloShared(int slots, int slot_bytes, int channels, int D, int P) {
        size_t padded = (size_t)(channels + 15) / 16 * 16;
        sum_rows = 2 * channels + SOLO_ROWS;
        ring = (SOLO_BARRIERS * 8 + 127) / 128 * 128;
        x = ring + (size_t)slots * slot_bytes;      // (D), by pairs: each as two bf16
        res_parts = x + (size_t)D * 4;              // (8, D/16, 2)
        gathered = res_parts + (size_t)D * 4;       // (8, D/16, 2)
        xdb_parts = gathered + (size_t)D * 4;       // (8, 8 X_TILES, 2)
        xdb = xdb_parts + 8 * 8 * SOLO_X_TILES * 8; // (P)
        squares = xdb + (size_t)P * 4;              // of (8, 16) half-warps
        sums = squares + 128 * 4;                   // (8 warps, sum_rows)
        u = sums + (size_t)SOLO_WARPS * sum_rows * 4;
        gate = u + padded * 4, u_words = gate + padded * 4, y_words = u_words + padded * 4,
        bytes = y_words + padded * 4;
    }
};

// The first channel of a block: all have as many, or one more.
__host__ __device__ inline int solo_first(int block, int blocks, int E) {
    return (int)((int64_t)block * E / blocks);
}

#if __CUDA_ARCH__ >= 900
__device__ inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ inline void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
__device__ inline void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and the phase lasts until so many bytes have too.
__device__ inline void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
__device__ inline void barrier_wait(uint64_t *barrier, int phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], "
                 "%1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
                 "r"(phase)
                 : "memory");
}
__device__ inline void
barrier_watch(uint64_t *barrier,
              int phase) { // the same, and no sleep, from which it takes 0.7 us to wake up
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.test_wait.parity.shared.b64 done, [%0], "
                 "%1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
                 "r"(phase)
                 : "memory");
}
__device__ inline void copy_bulk(void *to, const void *from, int bytes,
                                 uint64_t *barrier) { // a multiple of 16, or 0
    if (bytes)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                     "[%1], %2, [%3];" ::"r"(shared_address(to)),
                     "l"(from), "r"(bytes), "r"(shared_address(barrier))
                     : "memory");
}
__device__ inline uint32_t address_in(uint32_t address,
                                      int rank) { // the same place in another block of the cluster
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
__device__ inline void send(uint32_t to, uint32_t x, uint32_t y,
                            uint32_t barrier) { // to another block, whose barrier counts bytes
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(
            to),
        "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
__device__ inline void send(uint32_t to, uint32_t x, uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(x), "r"(barrier)
        : "memory");
}
__device__ inline void send(uint32_t to, float x, uint32_t barrier) {
    send(to, __float_as_uint(x), barrier);
}
__device__ inline void put_words(ulonglong2 *to, float x, float y, uint32_t tag) {
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1,%2};" ::"l"(to),
                 "l"((uint64_t)tag << 32 | __float_as_uint(x)),
                 "l"((uint64_t)tag << 32 | __float_as_uint(y))
                 : "memory");
}
__device__ inline ulonglong2
get_words(const ulonglong2 *from) { // each of the two numbers is whole, with its tag
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0,%1}, [%2];"
                 : "=l"(v.x), "=l"(v.y)
                 : "l"(from)
                 : "memory");
    return v;
}
extern __shared__ __align__(128) unsigned char solo_memory[];
__device__ inline void sync_workers() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
// Four 8 x 8 matrices of bf16, whose rows the lanes 8i..8i+7 point at.
template <bool TRANSPOSED> __device__ inline uint4 matrices(uint32_t row) {
    uint4 v;
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(row));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(row));
    return v;
}
__device__ inline uint32_t split(float x) { // into two bf16, the larger below
    bf16 high = __float2bfloat16_rn(x), low = __float2bfloat16_rn(x - value(high));
    return (uint32_t)__bfloat16_as_ushort(low) << 16 | __bfloat16_as_ushort(high);
}
// Of two such numbers, as operand of a product: in lanes 0..3 the larger parts, in 4..7 the
// smaller, elsewhere 0.
__device__ inline uint32_t operand(uint32_t x, uint32_t y) {
    int lane = threadIdx.x % 32;
    return lane < 8 ? __byte_perm(x, y, lane < 4 ? 0x5410 : 0x7632) : 0;
}

struct SoloRing {              // a place in the ring, the same in all threads that pass through it
    uint32_t slots, bytes, at; // offsets in shared memory
    int n, slot, phase;
    __device__ uint64_t *full() const { return (uint64_t *)solo_memory + slot; }
    __device__ uint64_t *empty() const { return full() + SOLO_SLOTS; }
    __device__ void next() {
        at += bytes;
        if (++slot == n) slot = 0, at = slots, phase ^= 1;
    }
    __device__ unsigned char *wait() const {
        return barrier_watch(full(), phase), solo_memory + at;
    }
    __device__ void release() { // by a warp
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty());
        next();
    }
    __device__ unsigned char *claim(int expected) {
        barrier_wait(empty(), phase ^ 1); // passes the first time round
        if (threadIdx.x % 32 == 0) barrier_expect(full(), expected);
        __syncwarp();
        return solo_memory + at;
    }
};

// Fetches everything that the block reads of the weights, in the order in which it is used; a warp,
// a row a lane.
__device__ inline void solo_fetch(const SoloArgs &p, SoloRing ring, int first, int n) {
    const int D = p.D, E = p.E, R = p.R, P = p.P + SOLO_PAD, lane = threadIdx.x % 32,
              pitch = (D + SOLO_PAD) * 2;
    SoloRing landed = ring;
    int flying = 0;
    auto claim = [&](int bytes) {
        if (flying++ >= p.flying) barrier_wait(landed.full(), landed.phase), landed.next();
        return ring.claim(bytes);
    };
    auto rows = [&](const bf16 *above, int count_above, const bf16 *below, int count) {
#pragma unroll 1
        for (int from = 0; from < count; from += SOLO_ROWS, ring.next()) {
            int row = from + lane, n_rows = min(SOLO_ROWS, count - from);
            unsigned char *to = claim(n_rows * D * 2);
            const bf16 *W = row < count_above ? above + (size_t)row * D
                                              : below + (size_t)(row - count_above) * D;
            if (lane < n_rows) copy_bulk(to + lane * pitch, W, D * 2, ring.full());
        }
    };
#pragma unroll 1
    for (int layer = 0; layer < p.n_layer; layer++) {
        SoloLayer w = p.layers[layer];
        rows(w.W_in + (size_t)first * D, n, w.W_in + (size_t)(E + first) * D, 2 * n); // x, then z
        if (layer == 0)
            asm volatile("griddepcontrol.wait;" ::: "memory"); // the state is of the step before
        int x_bytes = n * P * 2, dt_bytes = n * R * 2, vector_bytes = p.vector_floats * 4;
        size_t channel = (size_t)layer * E + first;
        unsigned char *to = claim(x_bytes + dt_bytes + vector_bytes);
        if (lane == 0) copy_bulk(to, p.W_x + channel * P, x_bytes, ring.full());
        if (lane == 1) copy_bulk(to + x_bytes, w.W_dt + (size_t)first * R, dt_bytes, ring.full());
        if (lane == 2)
            copy_bulk(to + x_bytes + dt_bytes,
                      p.vectors + ((size_t)layer * gridDim.x + blockIdx.x) * p.vector_floats,
                      vector_bytes, ring.full());
        ring.next();
#pragma unroll 1
        for (int from = 0; from < n; from += SOLO_ROWS, ring.next()) {
            int bytes = min(SOLO_ROWS, n - from) * pitch;
            to = claim(bytes);
            if (lane == 0)
                copy_bulk(to, p.W_out + (channel + from) * (D + SOLO_PAD), bytes, ring.full());
        }
    }
    int rows_each = (p.V + (int)gridDim.x - 1) / (int)gridDim.x, row = blockIdx.x * rows_each;
    rows(p.head + (size_t)row * D, p.V, NULL, max(0, min(rows_each, p.V - row)));
}

// sum[r] = the sums of a pair of numbers over the clusters, in all 16 lanes of half-warp i for
// pairs i, i + 16, ... below `pairs`. words: (clusters, 16 ROUNDS), of which a warp watches two
// clusters', by 16 neighbours each: a cluster's words fill lines that nobody else writes. (A line
// that is polled and that many write is slow: 0.34 ms a step of 130M instead of 0.22.) scratch: (8,
// 16 ROUNDS).
template <int ROUNDS>
__device__ inline void solo_gather(float2 sum[ROUNDS], float2 *scratch, const ulonglong2 *words,
                                   int pairs, int clusters, uint32_t tag) {
    const int warp = threadIdx.x / 32, half = threadIdx.x / 16, lane = threadIdx.x % 16;
    ulonglong2 v[ROUNDS];
    int polls = 0;
    bool all;
    do {
        all = true;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            v[r] = make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
            if (lane + 16 * r < pairs && half < clusters)
                v[r] = get_words(words + half * 16 * ROUNDS + lane + 16 * r);
        }
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
            all = all && (uint32_t)(v[r].x >> 32) == tag && (uint32_t)(v[r].y >> 32) == tag;
        if (++polls > 1 << 24) __trap(); // seconds: a block is gone
    } while (!__all_sync(0xffffffffu, all));
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        float2 x =
            make_float2(__uint_as_float((uint32_t)v[r].x), __uint_as_float((uint32_t)v[r].y));
        x.x += __shfl_xor_sync(0xffffffffu, x.x, 16), x.y += __shfl_xor_sync(0xffffffffu, x.y, 16);
        if (threadIdx.x % 32 < 16) scratch[warp * 16 * ROUNDS + lane + 16 * r] = x;
    }
    sync_workers();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) sum[r] = scratch[lane % 8 * 16 * ROUNDS + half + 16 * r];
#pragma unroll
    for (int step = 4; step; step /= 2)
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            sum[r].x += __shfl_xor_sync(0xffffffffu, sum[r].x, step);
            sum[r].y += __shfl_xor_sync(0xffffffffu, sum[r].y, step);
        }
}

// x's operands for 16 inputs; in memory x lies by pairs.
__device__ inline uint2 x_operands(const uint4 *x, int sixteen) {
    uint4 v = x[4 * sixteen + threadIdx.x % 4]; // inputs 2j, 2j + 8, 2j + 1, 2j + 9
    return make_uint2(operand(v.x, v.z), operand(v.y, v.w));
}
// The sums of two columns of a product in lanes 0..3, where the larger parts' are: add those of the
// smaller.
__device__ inline float2 both_parts(const float c[4]) {
    return make_float2(c[0] + __shfl_down_sync(0xffffffffu, c[0], 4),
                       c[1] + __shfl_down_sync(0xffffffffu, c[1], 4));
}

// sums (8,sum_rows): of W's rows (`rows` of them come through the ring) times x, by warps, each of
// which takes every eighth group of 32 inputs; GROUP slots at a time.
template <int WIDTH, int GROUP>
__device__ inline void solo_in_proj(SoloRing &ring, float *sums, int sum_rows, const uint4 *x,
                                    int rows) {
    constexpr int pitch = (256 * WIDTH + SOLO_PAD) * 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t mine = lane % 8 * pitch + warp * 64 + lane / 8 * 16;
    float *out = sums + warp * sum_rows + 2 * lane;
    uint2 a[2 * WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        int sixteens = 2 * (warp + SOLO_WARPS * i);
        a[2 * i] = x_operands(x, sixteens), a[2 * i + 1] = x_operands(x, sixteens + 1);
    }
#pragma unroll 1
    for (int base = 0; base < rows; base += GROUP * SOLO_ROWS) {
        float c[GROUP][4] = {};
        uint32_t at[GROUP];
        SoloRing ahead = ring;
#pragma unroll
        for (int i = 0; i < GROUP;
             i++) { // beyond the last row: anything, for sums that nobody takes
            at[i] = shared_address(solo_memory) + ahead.at + mine;
            if (base + i * SOLO_ROWS < rows) ahead.wait(), ahead.next();
        }
#pragma unroll
        for (int k = 0; k < WIDTH; k++)
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                uint4 w = matrices<false>(at[i] + k * SOLO_WARPS * 64);
                tensor_product(c[i], a[2 * k].x, 0, a[2 * k].y, 0, w.x, w.y);
                tensor_product(c[i], a[2 * k + 1].x, 0, a[2 * k + 1].y, 0, w.z, w.w);
            }
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            if (base + i * SOLO_ROWS < rows) ring.release();
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            float2 sum = both_parts(c[i]);
            if (lane < 4 && base + i * SOLO_ROWS < rows)
                *(float2 *)(out + base + i * SOLO_ROWS) = sum;
        }
    }
}
#endif

// D = 256 WIDTH. 16 lanes a channel, a state each: at most 16 ROUNDS channels a block. GROUP: slots
// of in_proj at a time.
template <int WIDTH, int ROUNDS, int GROUP>
__global__ void __launch_bounds__(SOLO_THREADS + 32, 1)
    solo_kernel(const __grid_constant__ SoloArgs p) {
#if __CUDA_ARCH__ >= 900
    constexpr int D = 256 * WIDTH, TILES = D / 128;
    unsigned char *memory = solo_memory;
    const int E = p.E, N = p.N, K = p.K, R = p.R, P = p.P, tid = threadIdx.x, warp = tid / 32,
              half = tid / 16, lane = tid % 16, rank = blockIdx.x % SOLO_CLUSTER,
              cluster = blockIdx.x / SOLO_CLUSTER, channels = p.channels,
              first = solo_first(blockIdx.x, gridDim.x, E),
              n = solo_first(blockIdx.x + 1, gridDim.x, E) - first;
    const SoloShared place(p.slots, p.slot_bytes, channels, D, P);
    const SoloVectors vector(channels, N, K, D);
    uint64_t *barriers = (uint64_t *)memory, *x_here = barriers + 2 * SOLO_SLOTS,
             *xdb_here = x_here + 1, *xdb_parts_here = x_here + 2, *res_parts_here = x_here + 3;
    auto floats = [&](size_t at) { return (float *)(memory + at); };
    const uint4 *x = (uint4 *)(memory + place.x);
    float *squares = floats(place.squares), *xdb = floats(place.xdb), *sums = floats(place.sums),
          *u = floats(place.u), *gate = floats(place.gate);
    uint32_t *u_words = (uint32_t *)(memory + place.u_words),
             *y_words = (uint32_t *)(memory + place.y_words);
    float2 *xdb_parts = (float2 *)(memory + place.xdb_parts),
           *res_parts = (float2 *)(memory + place.res_parts),
           *gathered = (float2 *)(memory + place.gathered);
    SoloRing ring = {
        (uint32_t)place.ring, (uint32_t)p.slot_bytes, (uint32_t)place.ring, p.slots, 0, 0};
    // Pairs of x_proj's and out_proj's outputs that this block sums up: of every eighth tile from
    // `rank` on, 8 of each; D/16.
    const int x_mine = P / 16 > rank ? (P / 16 - rank + SOLO_CLUSTER - 1) / SOLO_CLUSTER * 8 : 0,
              res_each = D / (2 * SOLO_CLUSTER); // 16 WIDTH
    const int x_bytes = D * 4 + 128 * 4, xdb_bytes = P * 4,
              x_part_bytes = SOLO_CLUSTER * x_mine * 8, res_part_bytes = D * 4;
    if (tid == 0) {
        for (int i = 0; i < p.slots; i++)
            barrier_init(barriers + i, 1), barrier_init(barriers + SOLO_SLOTS + i, SOLO_WARPS);
        for (int i = 0; i < 4; i++) barrier_init(x_here + i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        barrier_expect(x_here, x_bytes), barrier_expect(xdb_here, xdb_bytes);
        barrier_expect(xdb_parts_here, x_part_bytes),
            barrier_expect(res_parts_here, res_part_bytes);
    }
    for (int i = tid; i < 16 * ROUNDS && i < (channels + 15) / 16 * 16; i += SOLO_THREADS)
        u_words[i] = y_words[i] = 0; // beyond n: for good
    __syncthreads();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::
                     : "memory"); // the others' barriers are there
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (warp == SOLO_WARPS) {
        solo_fetch(p, ring, first, n);
        return;
    }
    // Warp i computes the parts that block i of the cluster sums up; every fourth lane has a pair
    // of a tile.
    const uint32_t x_part_to = address_in(
                       shared_address(xdb_parts + rank * SOLO_X_TILES * 8 + tid % 32 / 4), warp),
                   res_part_to =
                       address_in(shared_address(res_parts + rank * res_each + tid % 32 / 4), warp);
    const int k_first = 2 * (tid % 4);                       // a product's first input in this lane
    auto column = [&](int q) { return q / 8 * 16 + q % 8; }; // of a pair's first
    auto norm_scale = [&]() {
        float4 a = ((const float4 *)squares)[tid % 32];
        return rsqrtf(warp_sum(a.x + a.y + a.z + a.w) / (float)D + p.eps);
    };
    wait_for_input();
    const uint32_t first_tag = *(volatile uint32_t *)p.turn * (uint32_t)(p.n_layer + 1) + 1;
    float2 res[WIDTH], norm[WIDTH];
#pragma unroll
    for (int r = 0; r < WIDTH; r++) {
        int q = half + 16 * r, at = column(rank * res_each + q);
        res[r] = make_float2(p.res[at], p.res[at + 8]);
        norm[r] = make_float2(p.norm[at], p.norm[at + 8]);
    }

#pragma unroll 1
    for (int layer = 0;; layer++) {
        const int phase = layer & 1;
        const uint32_t tag = first_tag + (uint32_t)layer;
        if (layer) { // the residual stream, and what out_proj of the layer before adds to it
            float2 sum[WIDTH];
            solo_gather<WIDTH>(sum, gathered, p.res_words + rank * SOLO_CLUSTERS * res_each,
                               res_each, p.clusters, tag - 1);
#pragma unroll
            for (int r = 0; r < WIDTH; r++) res[r].x += sum[r].x, res[r].y += sum[r].y;
        }
        float square = 0;
        const uint32_t to = address_in(shared_address(x), lane % SOLO_CLUSTER),
                       bar = address_in(shared_address(x_here), lane % SOLO_CLUSTER);
#pragma unroll
        for (int r = 0; r < WIDTH; r++) {
            int q = half + 16 * r;
            if (lane < SOLO_CLUSTER)
                send(to + (uint32_t)(rank * res_each + q) * 8, split(res[r].x * norm[r].x),
                     split(res[r].y * norm[r].y), bar);
            square += res[r].x * res[r].x + res[r].y * res[r].y;
        }
        if (lane < SOLO_CLUSTER)
            send(address_in(shared_address(squares + rank * 16 + half), lane), square, bar);
        barrier_watch(x_here, phase);
        if (tid == 0) barrier_expect(x_here, x_bytes);
        if (layer == p.n_layer) break;
        solo_in_proj<WIDTH, GROUP>(ring, sums, place.sum_rows, x, 2 * n);
        const float scale = norm_scale();
        const unsigned char *small = ring.wait(); // kept until the step of the scan
        const uint32_t *W_dt = (const uint32_t *)(small + n * (P + SOLO_PAD) * 2);
        float *vectors = (float *)(W_dt + n * (R / 2)),
              *state = p.vectors + ((size_t)layer * gridDim.x + blockIdx.x) * p.vector_floats;
        sync_workers();
        if (tid < n) {
            float v = 0, z = 0, conv = vectors[vector.conv_bias + tid];
#pragma unroll
            for (int i = 0; i < SOLO_WARPS; i++)
                v += sums[i * place.sum_rows + tid], z += sums[i * place.sum_rows + n + tid];
            v *= scale;
#pragma unroll
            for (int k = 0; k < SOLO_TAPS; k++) {
                if (k >= K) break;
                float input = k + 1 < K ? vectors[vector.window + k * channels + tid] : v;
                conv += vectors[vector.conv + k * channels + tid] * input;
                if (k) state[vector.window + (k - 1) * channels + tid] = input;
            }
            float out = silu(conv);
            u[tid] = out, u_words[tid] = split(out), gate[tid] = silu(z * scale);
        }
        sync_workers();
        // A transposed product of tiles of 16 outputs by 16 channels; those beyond n count 0,
        // whatever lies there.
        auto transposed = [&](auto *sums, int tiles, uint32_t at, int stride, const uint32_t *words,
                              int from) {
            const uint32_t *in = words + from + k_first, b0 = operand(in[0], in[1]),
                           b1 = operand(in[8], in[9]);
            const int left = n - from - k_first;
            const uint32_t keep0 = (left > 0 ? 0xffffu : 0) | (left > 1 ? 0xffff0000u : 0),
                           keep1 = (left > 8 ? 0xffffu : 0) | (left > 9 ? 0xffff0000u : 0);
#pragma unroll
            for (int i = 0; i < (int)(sizeof *sums / sizeof **sums); i++) {
                if (i >= tiles) break;
                uint4 w = matrices<true>(at + i * stride);
                tensor_product((*sums)[i], w.x & keep0, w.y & keep0, w.z & keep1, w.w & keep1, b0,
                               b1);
            }
        };
        const int k_row = tid % 8 + tid % 32 / 16 * 8,
                  m_half = tid / 8 % 2 * 16; // what ldmatrix wants from this lane
        float x_part[SOLO_X_TILES][4] = {};  // this block's part of x_proj
        const int x_tiles = (P / 16 - warp + SOLO_WARPS - 1) / SOLO_WARPS;
#pragma unroll 1
        for (int from = 0; from < n; from += 16) {
            int row = min(from + k_row, n - 1);
            transposed(&x_part, x_tiles,
                       shared_address(small) +
                           (uint32_t)(row * (P + SOLO_PAD) * 2 + warp * 32 + m_half),
                       SOLO_WARPS * 32, u_words, from);
        }
#pragma unroll
        for (int i = 0; i < SOLO_X_TILES; i++)
            if (i < x_tiles && tid % 4 == 0)
                send(x_part_to + i * 64, __float_as_uint(x_part[i][0] + x_part[i][1]),
                     __float_as_uint(x_part[i][2] + x_part[i][3]),
                     address_in(shared_address(xdb_parts_here), warp));
        if (tid < x_mine) { // the cluster's part of the sums that are this block's
            float2 sum = {};
            barrier_watch(xdb_parts_here, phase);
#pragma unroll
            for (int i = 0; i < SOLO_CLUSTER; i++)
                sum.x += xdb_parts[i * SOLO_X_TILES * 8 + tid].x,
                    sum.y += xdb_parts[i * SOLO_X_TILES * 8 + tid].y;
            put_words(p.xdb_words + (rank * SOLO_CLUSTERS + cluster) * SOLO_X_TILES * 8 + tid,
                      sum.x, sum.y, tag);
        }
        if (tid == 0) barrier_expect(xdb_parts_here, x_part_bytes);
        float2 xdb_sum[1];
        solo_gather<1>(xdb_sum, gathered, p.xdb_words + rank * SOLO_CLUSTERS * SOLO_X_TILES * 8,
                       x_mine, p.clusters, tag);
        if (half < x_mine && lane < SOLO_CLUSTER) {
            uint32_t there = address_in(
                         shared_address(xdb + (rank + half / 8 * SOLO_CLUSTER) * 16 + half % 8),
                         lane),
                     bar = address_in(shared_address(xdb_here), lane);
            send(there, xdb_sum[0].x, bar), send(there + 32, xdb_sum[0].y, bar);
        }
        barrier_watch(xdb_here, phase);
        if (tid == 0) barrier_expect(xdb_here, xdb_bytes);
        float dt_scale = 1, B_scale = 1, C_scale = 1;
        if (p.mixer_eps > 0) { // FalconMamba: dt_low, B_ssm, C_ssm each to a mean square of 1
            float dt_square = 0, B_square = lane < N ? xdb[R + lane] : 0,
                  C_square = lane < N ? xdb[R + N + lane] : 0;
#pragma unroll 1
            for (int i = lane; i < R; i += 16) dt_square += xdb[i] * xdb[i];
            B_square *= B_square, C_square *= C_square;
#pragma unroll
            for (int step = 8; step; step /= 2) {
                dt_square += __shfl_xor_sync(0xffffffffu, dt_square, step),
                    B_square += __shfl_xor_sync(0xffffffffu, B_square, step);
                C_square += __shfl_xor_sync(0xffffffffu, C_square, step);
            }
            dt_scale = rsqrtf(dt_square / (float)R + p.mixer_eps),
            B_scale = rsqrtf(B_square / (float)N + p.mixer_eps);
            C_scale = rsqrtf(C_square / (float)N + p.mixer_eps);
        }
        float delta[ROUNDS], out[ROUNDS];
        auto sum_lanes = [](float *v) { // of 16, all rounds at once
#pragma unroll
            for (int step = 8; step; step /= 2)
#pragma unroll
                for (int r = 0; r < ROUNDS; r++) v[r] += __shfl_xor_sync(0xffffffffu, v[r], step);
        };
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) delta[r] = 0;
#pragma unroll 1
        for (int k = lane; k < R / 2; k += 16) {
            float2 low = ((const float2 *)xdb)[k];
#pragma unroll
            for (int r = 0; r < ROUNDS; r++) {
                int c = 16 * r + half;
                uint32_t w = c < n ? W_dt[c * (R / 2) + k] : 0;
                delta[r] += low_half(w) * low.x + high_half(w) * low.y;
            }
        }
        sum_lanes(delta);
        const float B = lane < N ? xdb[R + lane] * B_scale : 0,
                    C = lane < N ? xdb[R + N + lane] * C_scale : 0;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int c = 16 * r + half;
            float d = c < n ? softplus(delta[r] * dt_scale + vectors[vector.dt_bias + c]) : 0,
                  h = 0;
            if (c < n && lane < N) {
                h = __expf(d * vectors[vector.A + c * N + lane]) *
                        vectors[vector.h + c * N + lane] +
                    d * u[c] * B;
                state[vector.h + c * N + lane] = h;
            }
            out[r] = C * h;
        }
        sum_lanes(out);
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int c = 16 * r + half;
            if (c < n && lane == 0)
                y_words[c] = split((out[r] + vectors[vector.D_skip + c] * u[c]) * gate[c]);
        }
#pragma unroll
        for (int r = 0; r < WIDTH; r++)
            norm[r] = ((const float2 *)(vectors + vector.norm))[half + 16 * r];
        ring.release();
        sync_workers();
        float part[TILES][4] = {}; // this block's part of out_proj
#pragma unroll 1
        for (int from = 0; from < n; from += 16) {
            SoloRing second = ring;
            unsigned char *rows = ring.wait(), *more = rows;
            if (from + SOLO_ROWS < n) second.next(), more = second.wait();
            transposed(&part, D / 128,
                       shared_address(k_row < 8 ? rows : more) +
                           (uint32_t)(tid % 8 * (D + SOLO_PAD) * 2 + m_half + warp * (D / 4)),
                       32, y_words, from);
            ring.release();
            if (from + SOLO_ROWS < n) ring.release();
        }
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (tid % 4 == 0)
                send(res_part_to + i * 64, __float_as_uint(part[i][0] + part[i][1]),
                     __float_as_uint(part[i][2] + part[i][3]),
                     address_in(shared_address(res_parts_here), warp));
#pragma unroll 1
        for (int q = tid; q < res_each; q += SOLO_THREADS) {
            float2 sum = {};
            barrier_watch(res_parts_here, phase);
#pragma unroll
            for (int i = 0; i < SOLO_CLUSTER; i++)
                sum.x += res_parts[i * res_each + q].x, sum.y += res_parts[i * res_each + q].y;
            put_words(p.res_words + (rank * SOLO_CLUSTERS + cluster) * res_each + q, sum.x, sum.y,
                      tag);
        }
        if (tid == 0) barrier_expect(res_parts_here, res_part_bytes);
    }
    { // the head: a slot a warp
        const float scale = norm_scale();
        int rows_each = (p.V + (int)gridDim.x - 1) / (int)gridDim.x, row = blockIdx.x * rows_each,
            rows = max(0, min(rows_each, p.V - row)), pitch = (D + SOLO_PAD) * 2, turn = 0;
        for (int from = 0; from < rows; from += SOLO_ROWS, turn = (turn + 1) % SOLO_WARPS) {
            uint32_t at =
                shared_address(ring.wait()) + (uint32_t)(tid % 8 * pitch + tid % 32 / 8 * 16);
            if (turn == warp) {
                float c[4] = {}, d[4] = {};
#pragma unroll 4
                for (int k = 0; k < D / 32; k++) {
                    uint4 w = matrices<false>(at + k * 64);
                    uint2 a = x_operands(x, 2 * k), b = x_operands(x, 2 * k + 1);
                    tensor_product(c, a.x, 0, a.y, 0, w.x, w.y);
                    tensor_product(d, b.x, 0, b.y, 0, w.z, w.w);
                }
                c[0] += d[0], c[1] += d[1];
                float2 sum = both_parts(c);
                int i = from + 2 * (tid % 32);
                if (tid % 32 < 4 && i < rows) p.logits[row + i] = sum.x * scale;
                if (tid % 32 < 4 && i + 1 < rows) p.logits[row + i + 1] = sum.y * scale;
            }
            ring.release();
        }
    }
    if (blockIdx.x == 0 && tid == 0) *p.turn += 1; // all have read it, for all have been heard from
#endif
}

// What the kernel needs beside the model.
struct Solo {
    SoloArgs args;
    void (*kernel)(SoloArgs);
    size_t shared;
    void *memory;
};

// to (cols,pitch) = from (rows,cols), transposed by squares of 32.
__global__ void transpose_kernel(bf16 *to, int pitch, const bf16 *from, int rows, int cols) {
    __shared__ bf16 square[32][33];
    int row = blockIdx.y * 32, col = blockIdx.x * 32, x = threadIdx.x;
    for (int i = threadIdx.y; i < 32; i += blockDim.y)
        if (row + i < rows && col + x < cols)
            square[i][x] = from[(size_t)(row + i) * cols + col + x];
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += blockDim.y)
        if (col + i < cols && row + x < rows)
            to[(size_t)(col + i) * pitch + row + x] = square[x][i];
}
static void transpose(Device *d, bf16 *to, int pitch, const bf16 *from, int rows, int cols) {
    dim3 grid(blocks_for((size_t)cols, 32), blocks_for((size_t)rows, 32));
    transpose_kernel<<<grid, dim3(32, 8), 0, d->stream>>>(to, pitch, from, rows, cols);
    check_launch(d, "weights");
}

// A layer's vectors as blocks read them; norm: the next one.
__global__ void solo_vectors_kernel(float *vectors, SoloVectors at, LayerWeights w,
                                    const float *norm, int channels, int D, int E, int N, int K) {
    float *to = vectors + (size_t)blockIdx.x * at.floats;
    const float *conv_bias = (const float *)w.conv_bias, *dt_bias = (const float *)w.dt_bias,
                *D_skip = (const float *)w.D_skip;
    const int first = solo_first(blockIdx.x, gridDim.x, E),
              n = solo_first(blockIdx.x + 1, gridDim.x, E) - first;
    for (int c = threadIdx.x, e = first + c; c < n; c += blockDim.x, e += blockDim.x) {
        for (int i = 0; i < N; i++) to[at.A + c * N + i] = w.A_neg[(size_t)i * E + e];
        for (int k = 0; k < K; k++) to[at.conv + k * channels + c] = w.conv_t[(size_t)k * E + e];
        to[at.conv_bias + c] = conv_bias ? conv_bias[e] : 0, to[at.dt_bias + c] = dt_bias[e],
                          to[at.D_skip + c] = D_skip[e];
    }
    int pairs = D / (2 * SOLO_CLUSTER);
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        int q = blockIdx.x % SOLO_CLUSTER * pairs + i, column = q / 8 * 16 + q % 8;
        to[at.norm + 2 * i] = norm[column], to[at.norm + 2 * i + 1] = norm[column + 8];
    }
}

// h (n_layer,N,E) and window (n_layer,K-1,E) to where the blocks have them, or back.
__global__ void solo_state_kernel(float *vectors, SoloVectors at, float *h, float *window,
                                  int channels, int blocks, int E, int N, int K, bool back) {
    int e = blockIdx.x * blockDim.x + threadIdx.x, layer = blockIdx.y;
    if (e >= E) return;
    int block = (int)(((int64_t)(e + 1) * blocks - 1) / E), c = e - solo_first(block, blocks, E);
    float *of_block = vectors + ((size_t)layer * blocks + block) * at.floats;
    for (int i = 0; i < N + K - 1; i++) {
        float *here = i < N ? h + ((size_t)layer * N + i) * E + e
                            : window + ((size_t)layer * (K - 1) + i - N) * E + e,
              *there = of_block + (i < N ? at.h + c * N + i : at.window + (i - N) * channels + c);
        if (back) *here = *there;
        else *there = *here;
    }
}
static void solo_state(Gpu *g, const Solo *q, bool back) {
    const SoloArgs *p = &q->args;
    SoloVectors at(p->channels, p->N, p->K, p->D);
    solo_state_kernel<<<dim3(blocks_for((size_t)p->E, 128), (unsigned)p->n_layer), 128, 0,
                        g->device.stream>>>(p->vectors, at, g->h, g->window, p->channels,
                                            p->clusters * SOLO_CLUSTER, p->E, p->N, p->K, back);
    check_launch(&g->device, "state");
}

static void solo_free(Solo *q) {
    if (q) cudaFree(q->memory);
    delete q;
}

// How many of so many clusters of 8 blocks run at once; -1 where the kernel does not run at all.
template <class... Parameters>
static int clusters_at_once(void (*kernel)(Parameters...), int clusters, int threads,
                            size_t shared) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = SOLO_CLUSTER,
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = (unsigned)(clusters * SOLO_CLUSTER), config.blockDim = (unsigned)threads;
    config.dynamicSmemBytes = shared, config.attrs = &attribute, config.numAttrs = 1;
    int at_once = 0;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&at_once, kernel, &config) == cudaSuccess)
        return at_once;
    return cudaGetLastError(), -1;
}

// NULL where shapes do not fit (a D that there is a kernel for, rows of whole 16 bytes, a ring of 4
// slots at least), or the GPU, or its memory.
static Solo *solo_new(Gpu *g) {
    const Config *c = &g->config;
    Device *d = &g->device;
    int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = (R + 2 * N + 15) / 16 * 16;
    if (!d->hopper || !g->bf16_compute || c->flags & FLAG_PROJ_BIAS || D % 256 || R % 8 ||
        N > SOLO_STATES || K > SOLO_TAPS)
        return NULL;
    Solo q = {};
    SoloArgs *p = &q.args;
    p->D = D, p->E = E, p->N = N, p->K = K, p->R = R, p->P = P, p->V = c->V,
    p->n_layer = c->n_layer, p->eps = c->norm_eps;
    p->mixer_eps = c->flags & FLAG_MIXER_NORM ? c->mixer_eps : 0;
    int limit = 0, device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    for (int clusters = SOLO_CLUSTERS;; clusters--) { // as many as run at once
        p->channels = std::max(4, (E + SOLO_CLUSTER * clusters - 1) / (SOLO_CLUSTER * clusters));
        p->clusters = (E + SOLO_CLUSTER * p->channels - 1) / (SOLO_CLUSTER * p->channels);
        p->vector_floats = SoloVectors(p->channels, N, K, D).floats;
        int small = p->channels * (P + SOLO_PAD + R) * 2 + p->vector_floats * 4;
        p->slot_bytes = (std::max(SOLO_ROWS * (D + SOLO_PAD) * 2, small) + 127) / 128 * 128;
        p->slots = SOLO_SLOTS, p->flying = std::max(1, SOLO_FLYING / p->slot_bytes);
        while (p->slots &&
               (q.shared = SoloShared(p->slots, p->slot_bytes, p->channels, D, P).bytes) >
                   (size_t)limit)
            p->slots--;
        if (p->slots < 4 || p->channels > 48 || P > 128 * SOLO_X_TILES) return NULL;
        switch (D / 256) {
        case 3:
            q.kernel = p->channels <= 16 ? solo_kernel<3, 1, 4> : solo_kernel<3, 3, 4>;
            break;
        case 4:
            q.kernel = p->channels <= 32 ? solo_kernel<4, 2, 4> : solo_kernel<4, 3, 4>;
            break;
        case 6:
            q.kernel = solo_kernel<6, 3, 1>;
            break;
        case 8:
            q.kernel = solo_kernel<8, 3, 1>;
            break;
        case 10:
            q.kernel = solo_kernel<10, 3, 1>;
            break;
        default:
            return NULL;
        }
        int at_once = clusters_at_once(q.kernel, p->clusters, SOLO_THREADS + 32, q.shared);
        if (at_once < 0) return NULL;
        if (at_once >= p->clusters) break;
        if (clusters == 1) return NULL;
    }
    size_t L = (size_t)c->n_layer, blocks = (size_t)p->clusters * SOLO_CLUSTER;
    SoloLayer *layers = NULL;
    bf16 *W_x = NULL, *W_out = NULL;
    for (int measure = 1; measure >= 0; measure--) {
        Arena a = {(char *)q.memory, 0};
        a.take(layers, L), a.take(W_x, L * E * (P + SOLO_PAD)),
            a.take(W_out, L * E * (D + SOLO_PAD));
        a.take(p->vectors, L * blocks * p->vector_floats),
            a.take(p->xdb_words, (size_t)SOLO_X_TILES * 8 * SOLO_CLUSTER * SOLO_CLUSTERS);
        a.take(p->res_words, (size_t)D / 2 * SOLO_CLUSTERS), a.take(p->turn, 1);
        if (!measure) break;
        if (cudaMalloc(&q.memory, a.used) != cudaSuccess) return cudaGetLastError(), (Solo *)NULL;
        cudaMemsetAsync(q.memory, 0, a.used, d->stream);
    }
    p->layers = layers, p->W_x = W_x, p->W_out = W_out;
    std::vector<SoloLayer> host(L);
    for (size_t layer = 0; layer < L; layer++) {
        const LayerWeights *w = &g->w.layer[layer];
        host[layer] = {(const bf16 *)w->in_proj, (const bf16 *)w->dt_proj};
        transpose(d, W_x + layer * E * (P + SOLO_PAD), P + SOLO_PAD, (const bf16 *)w->x_proj,
                  R + 2 * N, E);
        transpose(d, W_out + layer * E * (D + SOLO_PAD), D + SOLO_PAD, (const bf16 *)w->out_proj, D,
                  E);
        const float *norm =
            (const float *)(layer + 1 < L ? g->w.layer[layer + 1].norm : g->w.norm_f);
        solo_vectors_kernel<<<(unsigned)blocks, 64, 0, d->stream>>>(
            p->vectors + layer * blocks * p->vector_floats, SoloVectors(p->channels, N, K, D), *w,
            norm, p->channels, D, E, N, K);
        check_launch(d, "weights");
    }
    check_cuda(d,
               cudaMemcpyAsync(layers, host.data(), L * sizeof(SoloLayer), cudaMemcpyHostToDevice,
                               d->stream),
               "weights");
    check_cuda(d, cudaStreamSynchronize(d->stream), "weights"); // host goes
    p->res = g->res, p->norm = (const float *)g->w.layer[0].norm, p->logits = g->step_logits,
    p->head = (const bf16 *)g->w.head;
    return new Solo(q);
}

// network() and the head for one token; res has its embedding.
static void solo_step(Gpu *g, const Solo *q) {
    launch_cluster(&g->device, SOLO_CLUSTER, q->kernel, (unsigned)(q->args.clusters * SOLO_CLUSTER),
                   SOLO_THREADS + 32, q->shared, q->args);
}

// --- The step in bf16 of 2 to 64 sequences on Hopper: one kernel for all layers. Clusters of 8
// blocks, all at once, and three exchanges among all of them a layer. Of a matrix a block reads a
// part that nobody else reads, but for x_proj and dt_proj:
//   1 in_proj: a quarter of the inputs (block r: quarter r % 4) times rows. The four sums of an
//   output meet in one block of the cluster, which
//     writes xz to global memory, in words with a tag that says of which layer and step they are,
//     so that whoever needs some polls those.
//   2 From here on a cluster has sequences of its own, up to 5, and a block an eighth of the
//   channels, the slice: the convolution; x_proj,
//     whose 8 sums of an output all blocks of the cluster send each other; dt_proj, the scan's
//     step, the gate; y to global memory. Meeting: a block says that it has come in a word of its
//     own, in a line of its own, and polls those of all.
//   3 out_proj: of the slice, of all sequences, times the cluster's columns. Block r adds up
//   sequences 8r..8r+7 and the residual
//     stream, which stays in registers; times the norm's weight it goes to global memory, and so do
//     its squares. Meeting.
// All that a block reads of weights and states comes through the ring (see above), layers ahead, in
// boxes that the copy engine puts in the order in which tensor cores read them. Products of all
// sequences are wgmma's, which needs code for sm_90a.

enum {
    WIDE_SEQUENCES = 64,
    WIDE_ROWS = 144, // of a slot, at the most: a slot has 64 inputs of so many rows of a matrix
    WIDE_PARTS = 4,  // of in_proj's inputs
    WIDE_LINE = 32,  // words from a block's to the next one's
    WIDE_WARPS = 12,
    WIDE_THREADS = 32 * WIDE_WARPS,
    WIDE_ROWS_FEW = 8 * WIDE_WARPS, // the same of x_proj and dt_proj: a tile a warp
    WIDE_GROUP = 48,                // rows that a group of four warps multiplies at once
    WIDE_EACH = 5                   // sequences of a cluster, at the most
};

// What follows from D. SUB: channels at a time, of the slice; PAIRS: of a cluster's columns, in a
// lane; ITEMS: four channels each, of the convolution, a thread; TEAM: warps that take a sequence
// of the scan's step.
template <int D> struct WideShape {
    static constexpr int E = 2 * D, SLICE = E / SOLO_CLUSTER, CHUNKS = SLICE / 64,
                         PITCH = SLICE * 2 + 16;
    static constexpr int SUB = D == 2560 ? 160 : D % 768 == 0 ? 192 : 128, SUBS = SLICE / SUB;
    static constexpr int PAIRS = D == 768 ? 1 : D <= 1536 ? 2 : 3;
    static constexpr int QUADS = SLICE / 4,
                         ITEMS = (WIDE_EACH * QUADS + WIDE_THREADS - 1) / WIDE_THREADS;
    static constexpr int TEAM = SUB / 32, TEAMS = WIDE_WARPS / TEAM;
};

struct WideLayer {
    CUtensorMap in, x, dt, out; // (2E,D), (P,E), (E,R), (D,E), in boxes of rows by 64
};
// How many rows a block has at the most, in how many slots, and how many a slot.
struct WideCut {
    int tiles, blocks, rows;
    void set(int tiles_, int rows_) {
        tiles = tiles_, blocks = (tiles * 8 + rows_ - 1) / rows_;
        rows = (tiles + blocks - 1) / blocks * 8;
    }
};
struct WideArgs {
    const WideLayer *layers; // (n_layer)
    const float *conv,
        *scan; // (n_layer,8,subs,K + 1,sub): conv, its bias; (.., N + 2,sub): dt_bias, D_skip, A
    const float *const *norms; // (n_layer)
    float *res;                // (S,D)
    bf16 *x, *y;               // (S,D): the residual stream times the norm's weight; (S,E)
    uint4 *xz; // (S,2E / 4): two pairs, each with a tag that says of which layer and step it is
    float *squares;              // (clusters,SEQUENCES)
    float *h, *window;           // (n_layer,S,N,E), (n_layer,S,K - 1,E)
    uint32_t *words, *turn;      // (blocks,LINE); steps so far
    WideCut in, x_proj, dt, out; // of W_in a half cluster, W_x all, W_dt a slice, W_out a cluster
    int S, clusters, slots, slot_bytes, slice, subs, sub;
    int n_layer, N, K, R, P;
    uint32_t P_inverse; // 2^20 / P, up
    float eps;
};

// Where things lie in shared memory, most of it several things in turn:
//   sums  out_proj's (8,8,columns), or in_proj's (PARTS,16,rows) in bf16, or u, gate, delta
//   (most,slice) bc    (most,2N)      scale (8) end   x or y (SEQUENCES,slice), or x_proj's sums
//   (8,most,P), then, at u and low from there, what is multiplied next in bf16 then the ring. These
//   two begin at a multiple of 1024, from which the boxes' order of 16 bytes counts.
struct WideShared {
    size_t sums, bc, scale, end, a_bytes, u, low, bytes;
    int most; // sequences of a cluster
    __host__ __device__ WideShared(const WideArgs &p) {
        most = (p.S + p.clusters - 1) / p.clusters;
        size_t out = (size_t)64 * p.out.tiles * 8 * 4,
               in = (size_t)WIDE_PARTS * 16 * p.in.tiles * 8 * 2,
               scan = (size_t)3 * most * p.slice * 4, xdb = (size_t)SOLO_CLUSTER * most * p.P * 4,
               pitch = p.slice * 2 + 16, low_pitch = (p.slice / 4 + 63) / 64 * 128 + 16;
        if (out < scan) out = scan;
        if (out < in) out = in;
        sums = ((2 * SOLO_SLOTS + 4) * 8 + 127) / 128 * 128, bc = sums + out;
        scale = bc + (size_t)most * 2 * p.N * 4, end = scale + 32;
        u = xdb, low = u + 8 * pitch, a_bytes = low + 8 * low_pitch;
        if (a_bytes < (size_t)WIDE_SEQUENCES * p.slice * 2)
            a_bytes = (size_t)WIDE_SEQUENCES * p.slice * 2;
        a_bytes = (a_bytes + 1023) / 1024 * 1024;
        bytes = end + 1023 + a_bytes + (size_t)p.slots * p.slot_bytes;
        bytes += WIDE_GROUP * 128; // a product may read beyond its rows
    }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A box of a matrix of rows: from input k and row on.
__device__ inline void copy_box(void *to, const CUtensorMap *map, int k, int row,
                                uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, "
                 "%3}], [%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(k), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}
__device__ inline void copy_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void wide_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"((int)WIDE_THREADS) : "memory");
}

// Fetches everything that the block reads of weights and states, in the order in which it is used.
template <int D>
__device__ inline void wide_fetch(const WideArgs &p, const CUtensorMap *map_h, SoloRing ring,
                                  int rank, int in_first, int out_first, int s_first, int n_s) {
    using Q = WideShape<D>;
    constexpr int SUB = Q::SUB;
    const int lane = threadIdx.x % 32, channel = rank * Q::SLICE, conv_floats = (p.K + 1) * SUB,
              scan_floats = (p.N + 2) * SUB;
    auto boxes = [&](const CUtensorMap *map, const WideCut &cut, int chunks, int k, int row) {
#pragma unroll 1
        for (int i = 0, left = chunks; i < cut.blocks * chunks; i++, ring.next()) {
            unsigned char *to = ring.claim(cut.rows * 128);
            if (lane == 0) copy_box(to, map, k, row, ring.full());
            k += 64;
            if (--left == 0) left = chunks, k -= chunks * 64, row += cut.rows;
        }
    };
    auto vectors = [&](const float *from, int floats) {
        unsigned char *to = ring.claim(floats * 4);
        if (lane == 0) copy_bulk(to, from, floats * 4, ring.full());
        ring.next();
    };
#pragma unroll 1
    for (int layer = 0; layer < p.n_layer; layer++) {
        const WideLayer *w = p.layers + layer;
        const size_t place = ((size_t)layer * SOLO_CLUSTER + rank) * Q::SUBS;
        boxes(&w->in, p.in, Q::CHUNKS, rank % WIDE_PARTS * Q::SLICE, in_first);
        if (layer == 0)
            asm volatile("griddepcontrol.wait;" ::: "memory"); // states are of the step before
        if (n_s) {
            const int rows = n_s * (p.K - 1);
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                vectors(p.conv + (place + q) * conv_floats, conv_floats);
                unsigned char *to = ring.claim(rows * SUB * 4);
                if (lane < rows)
                    copy_bulk(to + lane * SUB * 4,
                              p.window +
                                  (((size_t)layer * p.S + s_first) * (p.K - 1) + lane) * Q::E +
                                  channel + q * SUB,
                              SUB * 4, ring.full());
                ring.next();
            }
            boxes(&w->x, p.x_proj, Q::CHUNKS, channel, 0);
            boxes(&w->dt, p.dt, (D / 16 + 63) / 64, 0, channel);
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                vectors(p.scan + (place + q) * scan_floats, scan_floats);
#pragma unroll 1
                for (int s = 0; s < n_s; s++, ring.next()) {
                    unsigned char *to = ring.claim(p.N * SUB * 4);
                    if (lane == 0)
                        copy_box(to, map_h, channel + q * SUB, (layer * p.S + s_first + s) * p.N,
                                 ring.full());
                }
            }
        }
        boxes(&w->out, p.out, Q::CHUNKS, channel, out_first);
    }
}

// Sums of all sequences, whose activations lie at `a` (boxes of (SEQUENCES,64)), times a block of
// rows of a matrix that comes through the ring, 64 inputs a slot; 48 rows a group of four warps,
// whose tensor cores read both from shared memory. take(m, tile, sums): of sequences 16m + lane / 4
// and 8 more, rows 8 tile + 2 (lane % 4) and one more.
__host__ __device__ constexpr int wide_group(int chunks) { // slots at a time
    return chunks % 4 == 0 ? 4 : chunks % 3 == 0 ? 3 : chunks % 2 == 0 ? 2 : 1;
}
// Rows of 128 bytes, 8 of them a period of the order of their 16 bytes.
__device__ inline uint64_t wide_operand(uint32_t at) {
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)64 << 32 |
           (uint64_t)1 << 62;
}
template <int CHUNKS, class Take>
__device__ inline void wide_product(SoloRing &ring, int tid, uint32_t a, int m_tiles, int tiles,
                                    Take take) {
    constexpr int GROUP = wide_group(CHUNKS);
    const int first = tid / 128 * (WIDE_GROUP / 8), m = tid / 32 % 4;
    const uint32_t rows =
        first < tiles ? first * 1024 : 0; // a group without rows: sums that nobody takes
    float c[24] = {};
#pragma unroll 1
    for (int i = 0; i < CHUNKS; i += GROUP) {
        SoloRing ahead = ring;
        uint32_t slot[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++, ahead.next()) slot[g] = shared_address(ahead.wait()) + rows;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4 * GROUP; k++)
            asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
                         "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,"
                         "%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, %24, %25, 1, 1, 1, 0, 0;"
                         : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                           "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                           "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
                           "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]),
                           "+f"(c[22]), "+f"(c[23])
                         : "l"(wide_operand(a + (i + k / 4) * WIDE_SEQUENCES * 128 + k % 4 * 32)),
                           "l"(wide_operand(slot[k / 4] + k % 4 * 32)));
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::
                         : "memory");
#pragma unroll
        for (int g = 0; g < GROUP; g++) ring.release();
    }
    if (m < m_tiles)
#pragma unroll
        for (int n = 0; n < WIDE_GROUP / 8; n++)
            if (first + n < tiles) take(m, first + n, c + 4 * n);
}

// The same of up to 8 sequences, whose activations lie at `a` in rows of PITCH bytes; a tile a
// warp. take(sums): of sequence lane / 4, rows 8 warp + 2 (lane % 4) and one more.
template <int PITCH, int CHUNKS, class Take>
__device__ inline void wide_few(SoloRing &ring, int tid, uint32_t a, int tiles, Take take) {
    constexpr int GROUP = wide_group(CHUNKS);
    const int lane = tid % 32, warp = tid / 32;
    const uint32_t a_row = a + lane % 8 * PITCH + lane / 8 * 16, row = warp * 1024 + lane % 8 * 128;
    float c[2][4] = {};
#pragma unroll 1
    for (int i = 0; i < CHUNKS; i += GROUP) {
        SoloRing ahead = ring;
        uint32_t slot[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++, ahead.next()) slot[g] = shared_address(ahead.wait());
#pragma unroll
        for (int g = 0; g < GROUP; g++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (warp < tiles) {
                    uint4 v = matrices<false>(a_row + (i + g) * 128 + half * 64),
                          w = matrices<false>(slot[g] + row +
                                              ((lane / 8 + half * 4) ^ (lane % 8)) * 16);
                    tensor_product(c[0], v.x, 0, v.y, 0, w.x, w.y);
                    tensor_product(c[1], v.z, 0, v.w, 0, w.z, w.w);
                }
#pragma unroll
        for (int g = 0; g < GROUP; g++) ring.release();
    }
    if (warp < tiles) take(make_float2(c[0][0] + c[1][0], c[0][1] + c[1][1]));
}

__device__ inline void arrive_at(uint32_t barrier) { // of any block of the cluster
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
                 : "memory");
}
__device__ inline void put_tagged(uint4 *to, uint32_t x, uint32_t y, uint32_t tag) {
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1,%2};" ::"l"(to),
                 "l"((uint64_t)tag << 32 | x), "l"((uint64_t)tag << 32 | y)
                 : "memory");
}
__device__ inline uint2 get_tagged(const uint4 *from, uint32_t tag) { // once they are there
    uint64_t x, y;
    int polls = 0;
    do {
        asm volatile("ld.relaxed.gpu.global.v2.b64 {%0,%1}, [%2];"
                     : "=l"(x), "=l"(y)
                     : "l"(from)
                     : "memory");
        if (++polls > 1 << 24) __trap(); // seconds: a block is gone
    } while ((uint32_t)(x >> 32) != tag || (uint32_t)(y >> 32) != tag);
    return make_uint2((uint32_t)x, (uint32_t)y);
}
// All blocks have written what they had to. To hear is no acquire, which would empty the
// first-level cache: what was written is read past it (cg).
__device__ inline void wide_say(const WideArgs &p, uint32_t tag) {
    wide_sync();
    if (threadIdx.x == 0)
        asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p.words + blockIdx.x * WIDE_LINE),
                     "r"(tag)
                     : "memory");
}
__device__ inline void wide_hear(const WideArgs &p, uint32_t tag) {
    if (threadIdx.x < gridDim.x) {
        uint32_t word;
        int polls = 0;
        do {
            asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];"
                         : "=r"(word)
                         : "l"(p.words + threadIdx.x * WIDE_LINE)
                         : "memory");
            if (++polls > 1 << 24) __trap(); // seconds: a block is gone
        } while ((int32_t)(word - tag) < 0);
    }
    wide_sync();
}

// Rows of activations, a slice of their inputs, to shared memory; rows of sequences that there are
// not stay what they are.
template <int D>
__device__ inline void wide_load(int S, int tid, uint32_t a, const bf16 *from, int ld) {
    constexpr int PIECES = WideShape<D>::SLICE / 8;
    const int lane = tid % 32;
#pragma unroll 2
    for (int s = tid / 32; s < S; s += WIDE_WARPS)
#pragma unroll
        for (int i = 0; i < PIECES; i += 32) {
            int k = lane + i; // of 16 bytes, in the order of the boxes
            if (k < PIECES)
                copy_16(a + k / 8 * WIDE_SEQUENCES * 128 + s * 128 + (k % 8 ^ s % 8) * 16,
                        from + (uint32_t)(s * ld) + k * 8);
        }
}
__device__ inline void wide_loaded() { // and the tensor cores may read it
    asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
    wide_sync();
}
#endif

template <int D>
__global__ void __launch_bounds__(WIDE_THREADS + 32, 1)
    wide_kernel(const __grid_constant__ WideArgs p, const __grid_constant__ CUtensorMap map_h) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    unsigned char *memory = solo_memory;
    int tid = threadIdx.x;
    const int rank = blockIdx.x % SOLO_CLUSTER, cluster = blockIdx.x / SOLO_CLUSTER, N = p.N,
              K = p.K, R = p.R, P = p.P, m_tiles = (p.S + 15) / 16;
    using Q = WideShape<D>;
    constexpr int E = Q::E, SLICE = Q::SLICE, SUB = Q::SUB, PITCH = Q::PITCH, CHUNKS = Q::CHUNKS,
                  LOW_CHUNKS = (D / 16 + 63) / 64, LOW_PITCH = LOW_CHUNKS * 128 + 16;
    const WideShared place(p);
    const int most = place.most;
    // What is whose: rows of in_proj of half a cluster, columns of out_proj and sequences of a
    // cluster.
    auto cut = [](int i, int of, int n) { return (int)((int64_t)i * n / of); };
    const int half = cluster * 2 + rank / WIDE_PARTS, halves = p.clusters * 2,
              in_first = cut(half, halves, E / 4),
              in_tiles = cut(half + 1, halves, E / 4) - in_first,
              out_first = cut(cluster, p.clusters, D / 8),
              out_tiles = cut(cluster + 1, p.clusters, D / 8) - out_first,
              s_first = cut(cluster, p.clusters, p.S),
              n_s = cut(cluster + 1, p.clusters, p.S) - s_first, columns = out_tiles * 8;
    uint64_t *xdb_here = (uint64_t *)memory + 2 * SOLO_SLOTS, *sums_here = xdb_here + 1,
             *parts_here = xdb_here + 2, *x_read = xdb_here + 3;
    const uint32_t a = (shared_address(memory + place.end) + 1023) / 1024 * 1024,
                   a_at = a - shared_address(memory), ring_at = a_at + (uint32_t)place.a_bytes;
    SoloRing ring = {ring_at, (uint32_t)p.slot_bytes, ring_at, p.slots, 0, 0};
    bf16 *parts = (bf16 *)(memory + place.sums);
    float *xdb_parts = (float *)(memory + a_at), *sums = (float *)(memory + place.sums), *u = sums,
          *gate = u + most * SLICE, *delta = gate + most * SLICE,
          *bc = (float *)(memory + place.bc), *scale = (float *)(memory + place.scale);
    const int xdb_bytes = SOLO_CLUSTER * n_s * P * 4,
              sums_bytes = rank < 2 * m_tiles ? 64 * columns * 4 : 0,
              parts_bytes = rank % WIDE_PARTS < m_tiles ? WIDE_PARTS * 16 * in_tiles * 8 * 2 : 0;
    if (tid == 0) {
        uint64_t *barriers = (uint64_t *)memory;
        for (int i = 0; i < p.slots; i++)
            barrier_init(barriers + i, 1), barrier_init(barriers + SOLO_SLOTS + i, WIDE_WARPS);
        barrier_init(xdb_here, 1), barrier_init(sums_here, 1), barrier_init(parts_here, 1);
        barrier_init(x_read, SOLO_CLUSTER);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        barrier_expect(xdb_here, xdb_bytes), barrier_expect(sums_here, sums_bytes);
        barrier_expect(parts_here, parts_bytes);
    }
    __syncthreads();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::
                     : "memory"); // the others' barriers are there
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (tid / 32 == WIDE_WARPS) {
        wide_fetch<D>(p, &map_h, ring, rank, in_first * 8, out_first * 8, s_first, n_s);
        return;
    }
    wait_for_input();
    uint32_t tag = *(volatile uint32_t *)p.turn * (uint32_t)(3 * p.n_layer) + 1;
    // The sequence whose residual stream, of the cluster's columns, this warp has.
    const int own = tid < 256 ? rank * 8 + tid / 32 : WIDE_SEQUENCES;
    float2 res[Q::PAIRS], norm[Q::PAIRS];
    auto pairs = [&](auto each) {
        const int lane = tid % 32;
#pragma unroll
        for (int i = 0; i < Q::PAIRS; i++)
            if (own < p.S && 2 * (lane + 32 * i) < columns)
                each(i, out_first * 8 + 2 * (lane + 32 * i));
    };
    pairs([&](int i, int at) {
        res[i] = *(const float2 *)(p.res + (size_t)own * D + at);
        norm[i] = *(const float2 *)(p.norms[0] + at);
    });

#pragma unroll 1
    for (int layer = 0;; layer++) {
        // What is computed of tid is computed where it is used: the compiler would do so once for
        // all layers, and more than fits into registers, and 12 warps' spilled registers do not fit
        // into what shared memory leaves of the first-level cache.
        asm volatile("" : "+r"(tid));
        const int phase = layer & 1, warp = tid / 32, lane = tid % 32;
        if (layer) {
            if (sums_bytes) barrier_watch(sums_here, phase ^ 1);
            pairs([&](int i, int) {
#pragma unroll
                for (int part = 0; part < SOLO_CLUSTER; part++) {
                    float2 v = *(const float2 *)(sums + (part * 8 + warp) * columns +
                                                 2 * (tid % 32 + 32 * i));
                    res[i].x += v.x, res[i].y += v.y;
                }
            });
            if (tid == 0) barrier_expect(sums_here, sums_bytes);
        }
        if (layer == p.n_layer) break;
        float square = 0;
        pairs([&](int i, int at) {
            *(uint32_t *)(p.x + (size_t)own * D + at) =
                pack(res[i].x * norm[i].x, res[i].y * norm[i].y);
            square += res[i].x * res[i].x + res[i].y * res[i].y;
        });
        square = warp_sum(square);
        if (lane == 0 && own < p.S) p.squares[cluster * WIDE_SEQUENCES + own] = square;
        wide_say(p, tag);
        wide_hear(p, tag++);
        wide_load<D>(p.S, tid, a, p.x + rank % WIDE_PARTS * SLICE, D);
        if (warp < n_s) {
            float v =
                lane < p.clusters ? __ldcg(p.squares + lane * WIDE_SEQUENCES + s_first + warp) : 0;
            v = rsqrtf(warp_sum(v) / (float)D + p.eps);
            if (lane == 0) scale[warp] = v;
        }
        wide_loaded();
#pragma unroll 1
        for (int b = 0; b < p.in.blocks; b++) // the four parts of 16 sequences meet in one block
            wide_product<CHUNKS>(
                ring, tid, a, m_tiles, min(p.in.rows / 8, in_tiles - b * p.in.rows / 8),
                [&](int m, int tile, const float *c) {
                    uint32_t to = shared_address(parts +
                                                 ((rank % WIDE_PARTS * 16 + lane / 4) * in_tiles +
                                                  b * p.in.rows / 8 + tile) *
                                                     8 +
                                                 lane % 4 * 2),
                             block = rank / WIDE_PARTS * WIDE_PARTS + m,
                             bar = address_in(shared_address(parts_here), block);
                    to = address_in(to, block);
                    send(to, pack(c[0], c[1]), bar),
                        send(to + in_tiles * 128, pack(c[2], c[3]), bar);
                });
        if (parts_bytes) barrier_watch(parts_here, phase);
        if (tid == 0) barrier_expect(parts_here, parts_bytes);
        for (int s = warp; s < 16 && rank % WIDE_PARTS * 16 + s < p.S; s += WIDE_WARPS)
#pragma unroll 1
            for (int i = lane; i < in_tiles; i += 32) {
                float v[8] = {};
#pragma unroll
                for (int part = 0; part < WIDE_PARTS; part++) {
                    uint4 w = *(const uint4 *)(parts + ((part * 16 + s) * in_tiles + i) * 8);
                    v[0] += low_half(w.x), v[1] += high_half(w.x), v[2] += low_half(w.y),
                        v[3] += high_half(w.y);
                    v[4] += low_half(w.z), v[5] += high_half(w.z), v[6] += low_half(w.w),
                        v[7] += high_half(w.w);
                }
                uint4 *to = p.xz + (rank % WIDE_PARTS * 16 + s) * (E / 2) + (in_first + i) * 2;
                put_tagged(to, pack(v[0], v[1]), pack(v[2], v[3]), tag),
                    put_tagged(to + 1, pack(v[4], v[5]), pack(v[6], v[7]), tag);
            }
        wide_sync();            // all warps have multiplied from x
        if (tid < SOLO_CLUSTER) // so the cluster's blocks may overwrite it with x_proj's sums
            arrive_at(address_in(shared_address(x_read), tid));
        if (n_s) {
            float4 x[Q::ITEMS], z[Q::ITEMS];
#pragma unroll
            for (int j = 0; j < Q::ITEMS; j++) { // a sequence's four channels
                int i = tid + j * WIDE_THREADS, item_s = i / Q::QUADS, c = i % Q::QUADS * 4;
                if (item_s >= n_s) break;
                const uint4 *from = p.xz + (s_first + item_s) * (E / 2) + (rank * SLICE + c) / 4;
                uint2 xs = get_tagged(from, tag), zs = get_tagged(from + E / 4, tag);
                float r = scale[item_s];
                x[j] = make_float4(low_half(xs.x) * r, high_half(xs.x) * r, low_half(xs.y) * r,
                                   high_half(xs.y) * r);
                z[j] = make_float4(low_half(zs.x) * r, high_half(zs.x) * r, low_half(zs.y) * r,
                                   high_half(zs.y) * r);
            }
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                const float *conv = (const float *)ring.wait();
                SoloRing second = ring;
                second.next();
                const float *window = (const float *)second.wait();
#pragma unroll
                for (int j = 0; j < Q::ITEMS; j++) {
                    int i = tid + j * WIDE_THREADS, item_s = i / Q::QUADS,
                        c = i % Q::QUADS * 4 - q * SUB;
                    if (item_s >= n_s || c < 0 || c >= SUB) continue;
                    float *keep = p.window +
                                  (((size_t)layer * p.S + s_first + item_s) * (K - 1)) * E +
                                  rank * SLICE + q * SUB + c;
                    float4 v = *(const float4 *)(conv + K * SUB + c);
#pragma unroll
                    for (int k = 0; k < SOLO_TAPS; k++) {
                        if (k >= K) break;
                        float4 w = *(const float4 *)(conv + k * SUB + c),
                               in = k + 1 < K ? *(const float4 *)(window +
                                                                  (item_s * (K - 1) + k) * SUB + c)
                                              : x[j];
                        v.x += w.x * in.x, v.y += w.y * in.y, v.z += w.z * in.z, v.w += w.w * in.w;
                        if (k) *(float4 *)(keep + (size_t)(k - 1) * E) = in;
                    }
                    v = make_float4(silu(v.x), silu(v.y), silu(v.z), silu(v.w));
                    *(float4 *)(u + i * 4) = v;
                    *(float4 *)(gate + i * 4) =
                        make_float4(silu(z[j].x), silu(z[j].y), silu(z[j].z), silu(z[j].w));
                    *(uint2 *)(memory + a_at + place.u + item_s * PITCH + (q * SUB + c) * 2) =
                        make_uint2(pack(v.x, v.y), pack(v.z, v.w));
                }
                ring.release(), ring.release();
            }
            barrier_watch(x_read, phase);
            wide_sync();
#pragma unroll 1
            for (int b = 0; b < p.x_proj.blocks; b++)
                wide_few<PITCH, CHUNKS>(
                    ring, tid, shared_address(memory + a_at + place.u),
                    min(p.x_proj.rows / 8, p.x_proj.tiles - b * p.x_proj.rows / 8), [&](float2 c) {
                        if (lane / 4 >= n_s) return;
                        uint32_t to = shared_address(xdb_parts + (rank * n_s + lane / 4) * P +
                                                     b * p.x_proj.rows + warp * 8 + lane % 4 * 2);
#pragma unroll 2
                        for (int i = 0; i < SOLO_CLUSTER; i++)
                            send(address_in(to, i), __float_as_uint(c.x), __float_as_uint(c.y),
                                 address_in(shared_address(xdb_here), i));
                    });
            barrier_watch(xdb_here, phase);
            if (tid == 0) barrier_expect(xdb_here, xdb_bytes);
            bf16 *low = (bf16 *)(memory + a_at + place.low);
            for (int i = tid; i < n_s * P; i += WIDE_THREADS) {
                float v = 0;
#pragma unroll
                for (int part = 0; part < SOLO_CLUSTER; part++) v += xdb_parts[part * n_s * P + i];
                int item_s = (int)((uint32_t)i * p.P_inverse >> 20), o = i - item_s * P;
                if (o < R) low[item_s * (LOW_PITCH / 2) + o] = __float2bfloat16_rn(v);
                else bc[item_s * 2 * N + o - R] = v;
            }
            for (int o = R + tid; o < LOW_PITCH / 2 - 8;
                 o += WIDE_THREADS) // up to a multiple of 64
                for (int row = 0; row < n_s; row++)
                    low[row * (LOW_PITCH / 2) + o] = __float2bfloat16_rn(0);
            wide_sync();
#pragma unroll 1
            for (int b = 0; b < p.dt.blocks; b++)
                wide_few<LOW_PITCH, LOW_CHUNKS>(
                    ring, tid, shared_address(memory + a_at + place.low),
                    min(p.dt.rows / 8, p.dt.tiles - b * p.dt.rows / 8), [&](float2 c) {
                        if (lane / 4 < n_s)
                            *(float2 *)(delta + lane / 4 * SLICE + b * p.dt.rows + warp * 8 +
                                        lane % 4 * 2) = c;
                    });
            wide_sync();
            // The scan's step: a channel a lane, all its states; teams of warps take the sequences
            // in turn.
            const int team = warp / Q::TEAM, c = warp % Q::TEAM * 32 + lane;
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                const float *vectors = (const float *)ring.wait() + c;
                const int at = q * SUB + c;
                float A[SOLO_STATES], dt_bias = vectors[0], D_skip = vectors[SUB];
#pragma unroll
                for (int n = 0; n < SOLO_STATES; n++)
                    A[n] = n < N ? vectors[(n + 2) * SUB] * LOG2E : 0;
                ring.release();
                int turn = 0;
#pragma unroll 1
                for (int s = 0; s < n_s; s++) {
                    const float *h_in = (const float *)ring.wait() + c;
                    if (turn == team) {
                        float d = softplus(delta[s * SLICE + at] + dt_bias), x = u[s * SLICE + at],
                              dx = d * x, sum = D_skip * x;
                        float *h_out =
                            p.h + ((size_t)layer * p.S + s_first + s) * N * E + rank * SLICE + at;
                        const float4 *B = (const float4 *)(bc + s * 2 * N),
                                     *C = (const float4 *)(bc + s * 2 * N + N);
#pragma unroll
                        for (int n = 0; n < SOLO_STATES; n += 4) {
                            if (n >= N) break;
                            float4 b4 = B[n / 4], c4 = C[n / 4];
                            const float bs[4] = {b4.x, b4.y, b4.z, b4.w},
                                        cs[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                float state =
                                    exp2_fast(d * A[n + j]) * h_in[(n + j) * SUB] + dx * bs[j];
                                h_out[(n + j) * E] = state;
                                sum += cs[j] * state;
                            }
                        }
                        p.y[(s_first + s) * E + rank * SLICE + at] =
                            __float2bfloat16_rn(sum * gate[s * SLICE + at]);
                    }
                    if (++turn == Q::TEAMS) turn = 0;
                    ring.release();
                }
            }
        }
        tag++;
        wide_say(p, tag);
        wide_hear(p, tag++);
        wide_load<D>(p.S, tid, a, p.y + rank * SLICE, E);
        if (layer + 1 < p.n_layer)
            pairs([&](int i, int at) { norm[i] = *(const float2 *)(p.norms[layer + 1] + at); });
        wide_loaded();
#pragma unroll 1
        for (int b = 0; b < p.out.blocks; b++)
            wide_product<CHUNKS>(
                ring, tid, a, m_tiles, min(p.out.rows / 8, out_tiles - b * p.out.rows / 8),
                [&](int m, int tile, const float *c) {
                    uint32_t to = shared_address(sums + (rank * 8 + lane / 4) * columns +
                                                 b * p.out.rows + tile * 8 + lane % 4 * 2),
                             bar = shared_address(sums_here);
                    send(address_in(to, 2 * m), __float_as_uint(c[0]), __float_as_uint(c[1]),
                         address_in(bar, 2 * m));
                    send(address_in(to, 2 * m + 1), __float_as_uint(c[2]), __float_as_uint(c[3]),
                         address_in(bar, 2 * m + 1));
                });
    }
    pairs([&](int i, int at) { *(float2 *)(p.res + (size_t)own * D + at) = res[i]; });
    if (blockIdx.x == 0 && tid == 0) *p.turn += 1; // all have read it, for all have been heard from
#endif
}

// Whether this build has the kernel: wgmma is in code for sm_90a only.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ const int wide_there = 1;
#else
__device__ const int wide_there = 0;
#endif
static bool code_has_wgmma() {
    int there = 0;
    if (cudaMemcpyFromSymbol(&there, wide_there, sizeof there) == cudaSuccess) return there != 0;
    cudaGetLastError();
    return false;
}

struct Wide {
    WideArgs args;
    CUtensorMap h;
    void (*kernel)(WideArgs, CUtensorMap);
    size_t shared;
    void *memory;
};

// A map of rows of `cols` numbers, bf16 or float, for boxes (box_rows,box_cols); false if there is
// none. bf16 lies in shared memory with its 16 bytes in the order that tensor cores read.
static bool tensor_map(CUtensorMap *map, bool bf16_, const void *x, size_t rows, size_t cols,
                       int box_rows, int box_cols) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = NULL;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSuccess;
    if (!encode)
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000,
                                         cudaEnableDefault, &found);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void **)&encode, cudaEnableDefault,
                                &found);
#endif
    cuuint64_t size[2] = {cols, rows}, bytes[1] = {cols * (bf16_ ? 2 : 4)};
    cuuint32_t box[2] = {(cuuint32_t)box_cols, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    return encode &&
           !encode(map, bf16_ ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                   2, (void *)x, size, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   bf16_ ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A layer's vectors as blocks read them; grid (8, subs).
__global__ void wide_vectors_kernel(float *conv, float *scan, LayerWeights w, int sub, int E, int N,
                                    int K) {
    const int place = blockIdx.x * gridDim.y + blockIdx.y;
    const float *conv_bias = (const float *)w.conv_bias, *dt_bias = (const float *)w.dt_bias,
                *D_skip = (const float *)w.D_skip;
    conv += (size_t)place * (K + 1) * sub, scan += (size_t)place * (N + 2) * sub;
    for (int c = threadIdx.x; c < sub; c += blockDim.x) {
        int e = place * sub + c;
        for (int k = 0; k < K; k++) conv[k * sub + c] = w.conv_t[(size_t)k * E + e];
        conv[K * sub + c] = conv_bias ? conv_bias[e] : 0;
        scan[c] = dt_bias[e], scan[sub + c] = D_skip[e];
        for (int n = 0; n < N; n++) scan[(n + 2) * sub + c] = w.A_neg[(size_t)n * E + e];
    }
}

static void wide_free(Wide *q) {
    if (q) cudaFree(q->memory);
    delete q;
}

// NULL where shapes do not fit, or the GPU, or its memory.
static Wide *wide_new(Gpu *g, int S) {
    const Config *c = &g->config;
    Device *d = &g->device;
    int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, limit = 0, device = 0;
    if (!d->hopper || !g->bf16_compute || c->flags & (FLAG_PROJ_BIAS | FLAG_MIXER_NORM) ||
        S > WIDE_SEQUENCES || E != 2 * D || R % 8 || R > D / 16 || N % 4 || N > SOLO_STATES ||
        K > SOLO_TAPS)
        return NULL;
    if (!code_has_wgmma()) return NULL;
    Wide q = {};
    WideArgs *p = &q.args;
    p->S = S, p->N = N, p->K = K, p->R = R, p->P = R + 2 * N, p->n_layer = c->n_layer;
    p->eps = c->norm_eps, p->P_inverse = (uint32_t)(((1 << 20) + p->P - 1) / p->P);
    int pairs = 0;
    auto choose = [&](auto shape) {
        p->slice = shape.SLICE, p->sub = shape.SUB, p->subs = shape.SUBS, pairs = shape.PAIRS;
        q.kernel = wide_kernel<shape.SLICE * 4>;
    };
    switch (D) {
    case 768:
        choose(WideShape<768>());
        break;
    case 1024:
        choose(WideShape<1024>());
        break;
    case 1536:
        choose(WideShape<1536>());
        break;
    case 2048:
        choose(WideShape<2048>());
        break;
    case 2560:
        choose(WideShape<2560>());
        break;
    default:
        return NULL;
    }
    // Where little is left for the ring, smaller slots keep more bytes on their way; elsewhere they
    // only are more.
    const int rows_most = D >= 2048 ? WIDE_ROWS_FEW : WIDE_ROWS;
    p->x_proj.set((p->P + 7) / 8, WIDE_ROWS_FEW), p->dt.set(p->slice / 8, WIDE_ROWS_FEW);
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    for (p->clusters = SOLO_CLUSTERS;; p->clusters--) { // as many as run at once
        if (!p->clusters) return NULL;
        p->in.set((E / 4 + 2 * p->clusters - 1) / (2 * p->clusters), rows_most);
        p->out.set((D / 8 + p->clusters - 1) / p->clusters, rows_most);
        int most = (S + p->clusters - 1) / p->clusters,
            rows =
                std::max(std::max(p->in.rows, p->out.rows), std::max(p->x_proj.rows, p->dt.rows));
        p->slot_bytes =
            (std::max(std::max(rows * 128, (N + 2) * p->sub * 4), most * (K - 1) * p->sub * 4) +
             1023) /
            1024 * 1024;
        p->slots = SOLO_SLOTS;
        while (p->slots && (q.shared = WideShared(*p).bytes) > (size_t)limit) p->slots--;
        if (p->slots < 4 || most > WIDE_EACH || p->out.tiles * 8 > 64 * pairs) return NULL;
        int at_once = clusters_at_once(q.kernel, p->clusters, WIDE_THREADS + 32, q.shared);
        if (at_once < 0) return NULL;
        if (at_once >= p->clusters) break;
    }
    size_t L = (size_t)c->n_layer, places = (size_t)SOLO_CLUSTER * p->subs;
    WideLayer *layers = NULL;
    float *conv = NULL, *scan = NULL;
    const float **norms = NULL;
    for (int measure = 1; measure >= 0; measure--) {
        Arena a = {(char *)q.memory, 0};
        a.take(layers, L), a.take(norms, L), a.take(conv, L * E * (K + 1)),
            a.take(scan, L * E * (N + 2));
        a.take(p->xz, (size_t)S * E / 2), a.take(p->x, (size_t)S * D), a.take(p->y, (size_t)S * E);
        a.take(p->squares, (size_t)SOLO_CLUSTERS * WIDE_SEQUENCES);
        a.take(p->words, (size_t)SOLO_CLUSTERS * SOLO_CLUSTER * WIDE_LINE), a.take(p->turn, 1);
        if (!measure) break;
        if (cudaMalloc(&q.memory, a.used) != cudaSuccess) return cudaGetLastError(), (Wide *)NULL;
        cudaMemsetAsync(q.memory, 0, a.used, d->stream);
    }
    std::vector<WideLayer> host(L);
    std::vector<const float *> host_norms(L);
    bool good = tensor_map(&q.h, false, g->h, L * S * N, (size_t)E, N, p->sub);
    for (size_t layer = 0; layer < L; layer++) {
        const LayerWeights *w = &g->w.layer[layer];
        good =
            good &&
            tensor_map(&host[layer].in, true, w->in_proj, (size_t)2 * E, (size_t)D, p->in.rows,
                       64) &&
            tensor_map(&host[layer].x, true, w->x_proj, (size_t)p->P, (size_t)E, p->x_proj.rows,
                       64) &&
            tensor_map(&host[layer].dt, true, w->dt_proj, (size_t)E, (size_t)R, p->dt.rows, 64) &&
            tensor_map(&host[layer].out, true, w->out_proj, (size_t)D, (size_t)E, p->out.rows, 64);
        host_norms[layer] = (const float *)w->norm;
        wide_vectors_kernel<<<dim3(SOLO_CLUSTER, (unsigned)p->subs), 128, 0, d->stream>>>(
            conv + layer * places * (K + 1) * p->sub, scan + layer * places * (N + 2) * p->sub, *w,
            p->sub, E, N, K);
        check_launch(d, "weights");
    }
    cudaMemcpyAsync(layers, host.data(), L * sizeof(WideLayer), cudaMemcpyHostToDevice, d->stream);
    cudaMemcpyAsync(norms, host_norms.data(), L * sizeof *norms, cudaMemcpyHostToDevice, d->stream);
    check_cuda(d, cudaStreamSynchronize(d->stream), "weights"); // host goes
    p->layers = layers, p->conv = conv, p->scan = scan, p->norms = norms;
    p->res = g->res, p->h = g->h, p->window = g->window;
    if (!good) return cudaFree(q.memory), (Wide *)NULL;
    return new Wide(q);
}

// network() for one token of each sequence; res has their embeddings.
static void wide_step(Gpu *g, const Wide *q) {
    const Config *c = &g->config;
    launch_cluster(&g->device, SOLO_CLUSTER, q->kernel, (unsigned)(q->args.clusters * SOLO_CLUSTER),
                   WIDE_THREADS + 32, q->shared, q->args, q->h);
    rmsnorm(&g->device, acts_of<bf16>(g).xn, (size_t)c->D, g->res, (size_t)c->D,
            (const float *)g->w.norm_f, c->norm_eps, q->args.S, c->D);
}

template <class T> static void generation_step(Gpu *g) {
    Generation *n = g->generation;
    Device *d = &g->device;
    const Config *c = &g->config;
    launch_dependent(d, likeliest_kernel, dim3(SLICES, (unsigned)n->S), 256, 0, n->how,
                     n->sequences, g->step_logits, n->allowed, n->scratch, n->slices, c->V);
    launch_dependent(d, sample_kernel<T>, (unsigned)n->S, 1024, 0, n->how, n->sequences, n->slices,
                     n->scratch, n->current, n->tokens, g->res, (const T *)g->w.embedding, n->S,
                     c->V, c->D);
    if (n->solo) {
        solo_step(g, n->solo);
    } else if (!n->wide && thin_fits(g, n->S)) {
        thin_step(g, n->S);
    } else {
        if (n->wide) wide_step(g, n->wide);
        else network<T>(g, NULL, n->S, 1);
        matmul(d, g->step_logits, (size_t)c->V, acts_of<T>(g).xn, (size_t)c->D,
               (const T *)g->w.head, n->S, c->V, c->D);
    }
    check_launch(d, "step");
}

// Prepares the generation of S sequences that go on from those gathered, or else all from the first
// one's state: each with a random generator of its own, `random` (S) numbers; recent: the last
// n_recent tokens as a ring (position modulo RECENT). 0, or -1 with a sentence.
static int gpu_generate_start(Gpu *g, int S, const Sampling *how, const uint64_t *random,
                              uint64_t position, const int32_t *recent, int n_recent,
                              const unsigned char *allowed) {
    const Config *c = &g->config;
    Device *d = &g->device;
    if (S > g->piece) return gpu_fail("%d sequences are too many: %d at the most", S, g->piece);
    States *from = &g->gathered;
    if (from->S) {
        if (from->S != S) return gpu_fail("%d sequences were gathered, not %d", from->S, S);
        cudaFree(g->window), cudaFree(g->h), cudaFree(g->step_logits);
        g->S = S, g->window = from->window, g->h = from->h, g->step_logits = from->logits;
        *from = {};
        generation_free(g); // whose graph knows the old addresses
    } else if ((S != g->S || S > 1) && gpu_sequences(g, S)) return -1;
    if (!g->generation) {
        Generation *n = g->generation = new Generation();
        n->S = S;
        n->how = (Sampling *)device_alloc(sizeof *n->how);
        n->sequences = (Sequence *)device_alloc((size_t)S * sizeof *n->sequences);
        n->allowed = (unsigned char *)device_alloc((size_t)c->V);
        n->tokens = (int32_t *)device_alloc((size_t)GENERATE_MAX * S * sizeof *n->tokens);
        n->slices = (Slice *)device_alloc((size_t)S * SLICES * sizeof(Slice));
        n->current = (int32_t *)device_alloc((size_t)S * sizeof *n->current);
        n->scratch = (float *)device_alloc((size_t)S * c->V * sizeof(float));
        n->parts = (float *)device_alloc((size_t)K_SPLIT_MAX * S * (size_t)(c->R + 2 * c->N) *
                                         sizeof(float));
        if (!n->how || !n->sequences || !n->allowed || !n->tokens || !n->slices || !n->current ||
            !n->scratch || !n->parts) {
            generation_free(g);
            return -1;
        }
        n->solo = S == 1 ? solo_new(g) : NULL;
        n->wide = S > 1 ? wide_new(g, S) : NULL;
        cudaGraph_t graph = NULL;
        cudaError_t error = cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal);
        if (error == cudaSuccess) {
            if (g->bf16_compute) generation_step<bf16>(g);
            else generation_step<float>(g);
            error = cudaStreamEndCapture(d->stream, &graph);
        }
        if (error == cudaSuccess) error = cudaGraphInstantiate(&n->graph, graph, 0);
        if (graph) cudaGraphDestroy(graph);
        if (error != cudaSuccess) cudaGetLastError(), d->failed = NULL;
        if (error != cudaSuccess)
            return generation_free(g),
                   gpu_fail("GPU: capturing a step: %s", cudaGetErrorString(error));
    }
    Generation *n = g->generation;
    std::vector<Sequence> sequences((size_t)S);
    for (int s = 0; s < S; s++) {
        Sequence *q = &sequences[(size_t)s];
        memset(q, 0, sizeof *q);
        q->position = position, q->random = random[s], q->n_recent = n_recent;
        memcpy(q->recent, recent, sizeof q->recent);
    }
    cudaMemcpyAsync(n->allowed, allowed, (size_t)c->V, cudaMemcpyHostToDevice, d->stream);
    cudaMemcpyAsync(n->how, how, sizeof *how, cudaMemcpyHostToDevice, d->stream);
    cudaMemcpyAsync(n->sequences, sequences.data(), (size_t)S * sizeof(Sequence),
                    cudaMemcpyHostToDevice, d->stream);
    return finish(d);
}

// How the steps of gpu_generate_start are computed, for tests. g NULL: the forms beside the
// portable ones that this build has code for on this GPU, one after the other.
static const char *gpu_step_form(const Gpu *g) {
    if (!g) {
        int version = 0;
        if (code_version(&version) != cudaSuccess || version < 90) return "";
        return code_has_wgmma() ? "one kernel for one sequence, one kernel for several sequences"
                                : "one kernel for one sequence";
    }
    const Generation *n = g->generation;
    return !n                   ? "none"
           : n->solo            ? "one kernel for one sequence"
           : n->wide            ? "one kernel for several sequences"
           : thin_fits(g, n->S) ? "four kernels a layer"
                                : "the library's products";
}

// Draws and reads `steps` tokens (at most GENERATE_MAX) for each sequence: ids (steps,S), -1 where
// logits were not finite.
static int gpu_generate(Gpu *g, int32_t *ids, int steps) {
    Generation *n = g->generation;
    Device *d = &g->device;
    cudaMemset2DAsync(&n->sequences->step, sizeof(Sequence), 0, sizeof n->sequences->step,
                      (size_t)n->S, d->stream);
    if (n->solo) solo_state(g, n->solo, false);
    for (int i = 0; i < steps; i++)
        if (cudaGraphLaunch(n->graph, d->stream) != cudaSuccess && !d->failed) d->failed = "a step";
    if (n->solo) solo_state(g, n->solo, true);
    cudaMemcpyAsync(ids, n->tokens, (size_t)steps * n->S * sizeof *ids, cudaMemcpyDeviceToHost,
                    d->stream);
    return finish(d);
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 [train] Training: pass, AdamW
// Master weights, gradients and the two moments are four float arenas laid out as the file is;
// matrices are read through a copy in T, made again after every step. What a block's backward needs
// of its forward is kept, h as chunk starts only.

struct GpuTrainer {
    Device device;
    Config config;
    bool bf16_compute;
    int B, L;
    size_t floats;                                // of an arena
    float *weights, *gradient, *moment, *moment2; // (floats)
    void *compute;         // (floats) T, the weights themselves where T is float
    unsigned char *decays; // (floats / 16): weight decay applies
    Weights w, d;          // pointers into compute or weights, into gradient
    std::vector<TensorPlace> places;
    std::vector<void *> memory;
    char *arena;                        // activations
    std::vector<float *> res;           // (B*L,D), n_layer + 1 of them
    std::vector<BlockActs<float>> acts; // n_layer; their pointers are T's
    ScanMail mail;
    float *d_res, *logits, *losses, *partial, *norms;
    void *d_o, *d_xz, *d_u, *d_xdb, *d_delta, *d_g, *d_xn, *d_logits;
    double *sum;
    int32_t *ids, *targets, *order, *start, *token, *first;
    char *scan;
    int loss_rows;
};

enum { NORM_PARTS = 1024 };

// Squares of x in NORM_PARTS parts, then their sum: norm[0] = its root, norm[1] = the factor that
// clipping leaves.
__global__ void squares_kernel(float *parts, const float *x, size_t n) {
    __shared__ float scratch[33];
    float sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        sum += x[i] * x[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
__global__ void norm_kernel(float *norm, const float *parts, int n, float clip) {
    __shared__ float scratch[33];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        norm[0] = sqrtf(sum);
        norm[1] = clip > 0 && norm[0] > clip ? clip / (norm[0] + 1e-6f) : 1;
    }
}

// AdamW on all weights at once; nothing happens where the norm is not finite. The gradient is
// cleared.
template <class T>
__global__ void adamw_kernel(float *weights, T *compute, float *__restrict__ gradient,
                             float *__restrict__ moment, float *__restrict__ moment2,
                             const unsigned char *__restrict__ decays, const float *norm, size_t n,
                             float rate, float beta1, float beta2, float epsilon, float keep,
                             float root) {
    if (!(norm[0] - norm[0] == 0)) return;
    float scale = norm[1];
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        float g = gradient[i] * scale, m = beta1 * moment[i] + (1 - beta1) * g,
              v = beta2 * moment2[i] + (1 - beta2) * g * g;
        float w =
            weights[i] * (decays[i / 16] ? keep : 1.0f) - rate * m / (sqrtf(v) * root + epsilon);
        moment[i] = m, moment2[i] = v, weights[i] = w, gradient[i] = 0;
        if ((void *)compute != (void *)weights) put(compute + i, w);
    }
}

template <class T> static size_t lay_out_trainer(GpuTrainer *x, char *base) {
    const Config *c = &x->config;
    size_t M = (size_t)x->B * x->L, D = (size_t)c->D, E = (size_t)c->E,
           P = (size_t)(c->R + 2 * c->N), V = (size_t)c->V, N = (size_t)c->N, t = sizeof(T),
           chunks = (size_t)x->B * ((x->L + SCAN_SAVE - 1) / SCAN_SAVE);
    Arena a = {base, 0};
    BlockActs<float> shared;
    x->res.resize((size_t)c->n_layer + 1), x->acts.resize((size_t)c->n_layer);
    a.take(shared.xn, M * D, t);
    shared.mail = &x->mail, x->mail = {};
    a.take(x->mail.words, x->mail.bytes = scan_forward_workspace(x->B, c->E, c->N), 1);
    for (int layer = 0; layer <= c->n_layer; layer++) {
        a.take(x->res[(size_t)layer], M * D);
        if (layer == c->n_layer) break;
        BlockActs<float> *b = &x->acts[(size_t)layer];
        *b = shared;
        a.take(b->xz, M * 2 * E, t), a.take(b->u, M * E, t), a.take(b->xdb, M * P, t);
        b->raw = NULL;
        if (c->flags & FLAG_MIXER_NORM) a.take(b->raw, M * P, t);
        a.take(b->delta, M * E, t), a.take(b->g, M * E, t), a.take(b->h_starts, chunks * N * E);
    }
    size_t conv_tiles = (size_t)x->B * ((x->L + CONV_BACK - 1) / CONV_BACK),
           partial = conv_tiles * (size_t)(c->K + 1) * E;
    partial += sum_rows_floats(conv_tiles, (size_t)(c->K + 1) * E);
    partial = std::max(partial, sum_rows_floats(M, 2 * E));
    partial = std::max(partial, (size_t)NORM_BLOCKS * NORM_WARPS * D +
                                    sum_rows_floats(NORM_BLOCKS * NORM_WARPS, D));
    size_t pieces = M / EMBED_PIECE + std::min(M, V) + 1;
    partial = std::max(partial, pieces * D);
    x->loss_rows = (int)std::max(
        (size_t)1, std::min(std::min((size_t)2048, M), (size_t)((size_t)1 << 27) / V));
    a.take(x->d_res, M * D), a.take(x->losses, M), a.take(x->d_o, M * D, t),
        a.take(x->d_xn, M * D, t);
    a.take(x->partial, partial), a.take(x->norms, NORM_PARTS + 2), a.take(x->sum, 1);
    a.take(x->ids, M), a.take(x->targets, M), a.take(x->order, M), a.take(x->start, pieces + 1),
        a.take(x->token, pieces);
    a.take(x->first, pieces + 1);
    Arena loss = a; // logits are done with before the blocks' backward begins: one place for both
    loss.take(x->logits, (size_t)x->loss_rows * V),
        loss.take(x->d_logits, (size_t)x->loss_rows * V, t);
    a.take(x->d_xz, M * 2 * E, t), a.take(x->d_u, M * E, t), a.take(x->d_xdb, M * P, t);
    a.take(x->d_delta, M * E, t), a.take(x->d_g, M * E, t);
    a.take(x->scan, scan_backward_workspace(x->B, x->L, c->E, c->N), 1);
    return std::max(a.used, loss.used);
}

static size_t trainer_bytes(GpuTrainer *x) {
    return x->bf16_compute ? lay_out_trainer<bf16>(x, NULL) : lay_out_trainer<float>(x, NULL);
}

// Passes from now on have B sequences of L tokens. 0, or -1 with a sentence.
static int gpu_trainer_resize(GpuTrainer *x, int B, int L) {
    cudaStreamSynchronize(x->device.stream);
    cudaFree(x->arena);
    x->arena = NULL;
    x->B = B, x->L = L;
    if (!(x->arena = (char *)device_alloc(trainer_bytes(x)))) return -1;
    if (x->bf16_compute) lay_out_trainer<bf16>(x, x->arena);
    else lay_out_trainer<float>(x, x->arena);
    return 0;
}

static void gpu_trainer_close(GpuTrainer *x) {
    if (!x) return;
    if (x->device.stream) cudaStreamSynchronize(x->device.stream);
    for (void *p : x->memory) cudaFree(p);
    cudaFree(x->arena);
    device_close(&x->device);
    delete x;
}

template <class T> __global__ void refresh_kernel(T *compute, const float *weights, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        put(compute + i, weights[i]);
}

static void derive_all(GpuTrainer *x) {
    for (const LayerWeights &w : x->w.layer) derive(&x->device, &x->config, &w);
}

// Weights and both moments (NULL: zeros) from host arenas of the model's layout. 0, or -1 with a
// sentence.
static int gpu_trainer_set(GpuTrainer *x, const float *weights, const float *moment,
                           const float *moment2) {
    size_t bytes = x->floats * sizeof(float);
    cudaStream_t stream = x->device.stream;
    cudaMemcpyAsync(x->weights, weights, bytes, cudaMemcpyHostToDevice, stream);
    if (moment) cudaMemcpyAsync(x->moment, moment, bytes, cudaMemcpyHostToDevice, stream);
    else cudaMemsetAsync(x->moment, 0, bytes, stream);
    if (moment2) cudaMemcpyAsync(x->moment2, moment2, bytes, cudaMemcpyHostToDevice, stream);
    else cudaMemsetAsync(x->moment2, 0, bytes, stream);
    cudaMemsetAsync(x->gradient, 0, bytes, stream);
    if (x->bf16_compute) convert(&x->device, (bf16 *)x->compute, x->weights, x->floats);
    derive_all(x);
    return finish(&x->device);
}

// The same back to the host, and the gradient; NULL ones are left out.
static int gpu_trainer_get(GpuTrainer *x, float *weights, float *moment, float *moment2,
                           float *gradient) {
    size_t bytes = x->floats * sizeof(float);
    cudaStream_t stream = x->device.stream;
    if (weights) cudaMemcpyAsync(weights, x->weights, bytes, cudaMemcpyDeviceToHost, stream);
    if (moment) cudaMemcpyAsync(moment, x->moment, bytes, cudaMemcpyDeviceToHost, stream);
    if (moment2) cudaMemcpyAsync(moment2, x->moment2, bytes, cudaMemcpyDeviceToHost, stream);
    if (gradient) cudaMemcpyAsync(gradient, x->gradient, bytes, cudaMemcpyDeviceToHost, stream);
    return finish(&x->device);
}

// A trainer of m's shape (its weights must be float32 and of one arena), B sequences of L tokens a
// pass; float32: products in float32 instead of bf16. NULL with a sentence.
static GpuTrainer *gpu_trainer_open(const Model *m, int B, int L, int float32) {
    GpuTrainer *x = new GpuTrainer();
    const Config *c = &m->config;
    x->config = *c, x->bf16_compute = !float32;
    x->floats = m->tensors_bytes / sizeof(float);
    size_t bytes = m->tensors_bytes, flags = x->floats / 16 + 1;
    bool good = c->K <= 16 && device_open(&x->device) == 0;
    if (c->K > 16)
        gpu_fail("training on the GPU needs d_conv of 16 or less, not %d: --cpu trains any", c->K);
    auto take = [&](size_t n) -> void * {
        void *p = good ? device_alloc(n) : NULL;
        if (p) x->memory.push_back(p);
        else good = false;
        return p;
    };
    x->weights = (float *)take(bytes), x->gradient = (float *)take(bytes),
    x->moment = (float *)take(bytes);
    x->moment2 = (float *)take(bytes), x->decays = (unsigned char *)take(flags);
    x->compute = x->bf16_compute ? take(bytes / 2) : x->weights;
    float *derived =
        (float *)take((size_t)c->n_layer * c->E * (size_t)(c->N + c->K) * sizeof(float));
    if (!good) return gpu_trainer_close(x), (GpuTrainer *)NULL;
    const float *host = (const float *)m->embedding.data;
    std::vector<unsigned char> decays(flags, 0);
    std::vector<TensorPlace> gradients = tensor_places(m, &x->d);
    x->places = tensor_places(m, &x->w);
    for (size_t i = 0; i < x->places.size(); i++) {
        const TensorPlace &p = x->places[i];
        size_t at = (size_t)((const float *)p.host->data - host),
               n = (size_t)p.host->rows * (size_t)p.host->cols;
        *gradients[i].device = x->gradient + at;
        *p.device = p.matrix && x->bf16_compute ? (void *)((bf16 *)x->compute + at)
                                                : (void *)(x->weights + at);
        for (size_t k = at / 16; k < (at + n + 15) / 16; k++) decays[k] = p.decays;
    }
    if (c->flags & FLAG_TIED) x->w.head = x->w.embedding, x->d.head = x->d.embedding;
    for (LayerWeights &w : x->w.layer) {
        w.A_neg = derived, w.conv_t = derived + (size_t)c->E * c->N;
        derived += (size_t)c->E * (size_t)(c->N + c->K);
    }
    check_cuda(
        &x->device,
        cudaMemcpyAsync(x->decays, decays.data(), flags, cudaMemcpyHostToDevice, x->device.stream),
        "weights");
    if (gpu_trainer_resize(x, B, L) == 0 &&
        gpu_trainer_set(x, (const float *)m->weights, NULL, NULL) == 0)
        return x;
    gpu_trainer_close(x);
    return NULL;
}

template <class T> static BlockActs<T> trainer_acts(const GpuTrainer *x, int layer) {
    const BlockActs<float> &a = x->acts[(size_t)layer];
    return {(T *)a.xn,    (T *)a.xz, (T *)a.u,   (T *)a.xdb, (T *)a.raw,
            (T *)a.delta, (T *)a.g,  a.h_starts, a.mail};
}

// d_x of rmsnorm over `rows`, d_weight (or NULL) added to.
template <bool ADD, class T, class In, class Out>
static void rmsnorm_backward(Device *d, Out *d_x, T *copy, float *d_weight, const T *d_out,
                             size_t ld_d, const In *in, size_t ld, const float *weight, float eps,
                             int rows, int cols, float *partial) {
    unsigned blocks = std::min((unsigned)NORM_BLOCKS, blocks_for((size_t)rows, NORM_WARPS));
    size_t parts = (size_t)blocks * NORM_WARPS;
    auto kernel = cols <= 256    ? rmsnorm_backward_kernel<T, In, Out, ADD, 8>
                  : cols <= 768  ? rmsnorm_backward_kernel<T, In, Out, ADD, 24>
                  : cols <= 1024 ? rmsnorm_backward_kernel<T, In, Out, ADD, 32>
                                 : rmsnorm_backward_kernel<T, In, Out, ADD, 0>;
    kernel<<<blocks, 32 * NORM_WARPS, 0, d->stream>>>(d_x, copy, d_weight ? partial : NULL, d_out,
                                                      ld_d, in, ld, weight, eps, rows, cols);
    check_launch(d, "rmsnorm_backward");
    sum_rows(d, d_weight, partial, (size_t)cols, (int)parts, cols, partial + parts * (size_t)cols);
}

__global__ void add_conv_kernel(float *d_conv, float *d_bias, const float *sums, int E,
                                int K) { // sums (K+1,E)
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= E) return;
    for (int k = 0; k < K; k++) d_conv[(size_t)e * K + k] += sums[(size_t)k * E + e];
    if (d_bias) d_bias[e] += sums[(size_t)K * E + e];
}

template <class T>
static void conv1d_silu_backward(GpuTrainer *x, T *d_xz, float *d_conv, float *d_bias, const T *d_u,
                                 const T *xz, const LayerWeights *w) {
    Device *d = &x->device;
    int E = x->config.E, K = x->config.K, tiles = x->B * ((x->L + CONV_BACK - 1) / CONV_BACK);
    int V = E % 2 == 0 && K <= 4 ? 2 : 1;
    dim3 grid(blocks_for((size_t)E / V, 128), blocks_for((size_t)x->L, CONV_BACK), (unsigned)x->B);
    auto kernel = K > 4    ? conv1d_silu_backward_kernel<T, 16, 1>
                  : V == 2 ? conv1d_silu_backward_kernel<T, 4, 2>
                           : conv1d_silu_backward_kernel<T, 4, 1>;
    kernel<<<grid, 128, 0, d->stream>>>(d_xz, x->partial, d_u, xz, w->conv_t,
                                        (const float *)w->conv_bias, x->L, E, K);
    size_t cols = (size_t)(K + 1) * E;
    float *sums = x->partial + (size_t)tiles * cols; // of chunks, then, in the first row, of all
    unsigned wide = blocks_for(cols, 128), chunks = blocks_for((size_t)tiles, SUM_CHUNK);
    sum_rows_kernel<<<dim3(wide, chunks), 128, 0, d->stream>>>(sums, x->partial, cols, tiles,
                                                               (int)cols, SUM_CHUNK, false);
    sum_rows_kernel<<<dim3(wide, 1), 128, 0, d->stream>>>(x->partial, sums, cols, (int)chunks,
                                                          (int)cols, (int)chunks, false);
    add_conv_kernel<<<blocks_for((size_t)E, 128), 128, 0, d->stream>>>(d_conv, d_bias, x->partial,
                                                                       E, K);
    check_launch(d, "conv1d_silu_backward");
}

// d_res, the gradient after the layer, and d_o, the same in T, become those before it; weights'
// gradients are added to.
template <class T> static void block_backward(GpuTrainer *x, int layer) {
    Device *d = &x->device;
    const Config *c = &x->config;
    const LayerWeights *w = &x->w.layer[(size_t)layer], *dw = &x->d.layer[(size_t)layer];
    BlockActs<T> a = trainer_acts<T>(x, layer);
    const float *res = x->res[(size_t)layer];
    int D = c->D, E = c->E, N = c->N, R = c->R, P = R + 2 * N, rows = x->B * x->L;
    size_t lE = (size_t)E, lP = (size_t)P, lD = (size_t)D;
    T *d_o = (T *)x->d_o, *d_xz = (T *)x->d_xz, *d_u = (T *)x->d_u, *d_xdb = (T *)x->d_xdb,
      *d_delta = (T *)x->d_delta, *d_g = (T *)x->d_g, *d_xn = (T *)x->d_xn;
    sum_rows(d, (float *)dw->out_bias, x->d_res, lD, rows, D, x->partial);
    matmul_d_x(d, d_g, lE, d_o, lD, (const T *)w->out_proj, rows, D, E);
    matmul_d_W(d, (float *)dw->out_proj, d_o, lD, a.g, lE, rows, D, E);
    ScanArgs<T> scan = scan_args(c, w, a, x->B, x->L);
    ScanBackArgs<T> back = scan_back_args(scan, a.h_starts, (const T *)d_g, E, x->scan);
    back.d_delta_raw = d_delta, back.d_u = d_u, back.d_z = d_xz + E, back.d_B_ssm = d_xdb + R,
    back.d_C_ssm = d_xdb + R + N;
    back.d_A_log = (float *)dw->A_log, back.d_D_skip = (float *)dw->D_skip,
    back.d_dt_bias = (float *)dw->dt_bias;
    back.ld_d_delta = back.ld_d_u = E, back.ld_d_z = 2 * E, back.ld_d_B = back.ld_d_C = P;
    check_cuda(d, scan_backward(back, d->stream), "backward scan");
    matmul_d_x(d, d_xdb, lP, d_delta, lE, (const T *)w->dt_proj, rows, E, R);
    matmul_d_W(d, (float *)dw->dt_proj, d_delta, lE, a.xdb, lP, rows, E, R);
    if (c->flags & FLAG_MIXER_NORM)
        for (int part = 0; part < 3; part++) {
            int at = part ? R + (part - 1) * N : 0, n = part ? N : R;
            rmsnorm_backward<false>(d, d_xdb + at, (T *)NULL, (float *)NULL, d_xdb + at, lP,
                                    a.raw + at, lP, NULL, c->mixer_eps, rows, n, x->partial);
        }
    matmul_d_x(d, d_u, lE, d_xdb, lP, (const T *)w->x_proj, rows, P, E, true);
    matmul_d_W(d, (float *)dw->x_proj, d_xdb, lP, a.u, lE, rows, P, E);
    conv1d_silu_backward(x, d_xz, (float *)dw->conv, (float *)dw->conv_bias, d_u, a.xz, w);
    sum_rows(d, (float *)dw->in_bias, d_xz, 2 * lE, rows, 2 * E, x->partial);
    rmsnorm(d, a.xn, lD, res, lD, (const float *)w->norm, c->norm_eps, rows, D);
    matmul_d_x(d, d_xn, lD, d_xz, 2 * lE, (const T *)w->in_proj, rows, 2 * E, D);
    matmul_d_W(d, (float *)dw->in_proj, d_xz, 2 * lE, a.xn, lD, rows, 2 * E, D);
    rmsnorm_backward<true>(d, x->d_res, d_o, (float *)dw->norm, d_xn, lD, res, lD,
                           (const float *)w->norm, c->norm_eps, rows, D, x->partial);
}

// Adds the embedding's gradient: rows ordered by token on the host, which needs no more than the
// ids.
static void embed_backward(GpuTrainer *x, const int32_t *ids) {
    Device *d = &x->device;
    int rows = x->B * x->L, V = x->config.V, D = x->config.D;
    std::vector<int32_t> count((size_t)V + 1, 0), order((size_t)rows), start, token, first;
    for (int r = 0; r < rows; r++) count[(size_t)ids[r] + 1]++;
    for (int v = 0; v < V; v++) {
        int n = count[(size_t)v + 1], at = count[(size_t)v];
        if (n) token.push_back(v), first.push_back((int32_t)start.size());
        for (int i = 0; i < n; i += EMBED_PIECE) start.push_back(at + i);
        count[(size_t)v + 1] += at;
    }
    first.push_back((int32_t)start.size()), start.push_back(rows);
    for (int r = 0; r < rows; r++) order[(size_t)count[(size_t)ids[r]]++] = r;
    auto upload =
        [&](int32_t *to,
            const std::vector<int32_t> &from) { // from pageable memory: copied before it returns
            cudaMemcpyAsync(to, from.data(), from.size() * sizeof(int32_t), cudaMemcpyHostToDevice,
                            d->stream);
        };
    upload(x->order, order), upload(x->start, start), upload(x->token, token),
        upload(x->first, first);
    embed_pieces_kernel<<<(unsigned)start.size() - 1, 128, 0, d->stream>>>(x->partial, x->d_res,
                                                                           x->order, x->start, D);
    embed_add_kernel<<<(unsigned)token.size(), 128, 0, d->stream>>>(
        (float *)x->d.embedding, x->partial, x->token, x->first, D);
    check_launch(d, "embed_backward");
}

template <class T>
static int train_pass(GpuTrainer *x, const int32_t *ids, const int32_t *targets, float weight,
                      bool backward, double *sum) {
    Device *d = &x->device;
    const Config *c = &x->config;
    int rows = x->B * x->L, D = c->D, V = c->V;
    size_t lD = (size_t)D, lV = (size_t)V;
    cudaMemcpyAsync(x->ids, ids, (size_t)rows * sizeof *ids, cudaMemcpyHostToDevice, d->stream);
    cudaMemcpyAsync(x->targets, targets, (size_t)rows * sizeof *ids, cudaMemcpyHostToDevice,
                    d->stream);
    cudaMemsetAsync(x->sum, 0, sizeof *x->sum, d->stream);
    embed_kernel<<<(unsigned)rows, 128, 0, d->stream>>>(x->res[0], x->ids,
                                                        (const T *)x->w.embedding, D);
    for (int layer = 0; layer < c->n_layer; layer++)
        block(d, c, &x->w.layer[(size_t)layer], trainer_acts<T>(x, layer),
              x->res[(size_t)layer + 1], x->res[(size_t)layer], x->B, x->L, (float *)NULL,
              (float *)NULL);
    const float *last = x->res[(size_t)c->n_layer];
    T *xn = trainer_acts<T>(x, 0).xn, *d_xn = (T *)x->d_xn, *d_logits = (T *)x->d_logits;
    rmsnorm(d, xn, lD, last, lD, (const float *)x->w.norm_f, c->norm_eps, rows, D);
    for (int t = 0; t < rows; t += x->loss_rows) { // so many rows of logits exist at a time
        int n = std::min(x->loss_rows, rows - t);
        matmul(d, x->logits, lV, xn + (size_t)t * D, lD, (const T *)x->w.head, n, V, D);
        cross_entropy(d, x->losses + t, backward ? d_logits : (T *)NULL, x->logits, x->targets + t,
                      weight, n, V);
        if (!backward) continue;
        matmul_d_x(d, d_xn + (size_t)t * D, lD, d_logits, lV, (const T *)x->w.head, n, V, D);
        matmul_d_W(d, (float *)x->d.head, d_logits, lV, xn + (size_t)t * D, lD, n, V, D);
    }
    sum_losses_kernel<<<1, 256, 0, d->stream>>>(x->sum, x->losses, rows);
    check_launch(d, "cross_entropy");
    if (backward) {
        rmsnorm_backward<false>(d, x->d_res, (T *)x->d_o, (float *)x->d.norm_f, d_xn, lD, last, lD,
                                (const float *)x->w.norm_f, c->norm_eps, rows, D, x->partial);
        for (int layer = c->n_layer - 1; layer >= 0; layer--) block_backward<T>(x, layer);
        embed_backward(x, ids);
    }
    cudaMemcpyAsync(sum, x->sum, sizeof *sum, cudaMemcpyDeviceToHost, d->stream);
    return finish(d);
}

// As mamba_train_pass: *sum gets the sum of the losses. 0, or -1 with a sentence.
static int gpu_train_pass(GpuTrainer *x, const int32_t *ids, const int32_t *targets, float weight,
                          int backward, double *sum) {
    if (!x->arena) return gpu_fail("the trainer has no memory for a pass");
    return x->bf16_compute ? train_pass<bf16>(x, ids, targets, weight, backward != 0, sum)
                           : train_pass<float>(x, ids, targets, weight, backward != 0, sum);
}

// *norm: the length of n numbers; norms[1] on the device: what clipping leaves. 0, or -1 with a
// sentence.
static int gradient_norm(GpuTrainer *x, const float *from, size_t n, float clip, float *norm) {
    Device *d = &x->device;
    squares_kernel<<<NORM_PARTS, 256, 0, d->stream>>>(x->norms + 2, from, n);
    norm_kernel<<<1, 1024, 0, d->stream>>>(x->norms, x->norms + 2, NORM_PARTS, clip);
    check_launch(d, "norm");
    cudaMemcpyAsync(norm, x->norms, sizeof *norm, cudaMemcpyDeviceToHost, d->stream);
    return finish(d);
}

// As mamba_train_step, for step number `step` (from 1): *norm gets the gradient's length. 0, or -1
// with the name of the first tensor whose gradient is not finite, the weights untouched.
static int gpu_train_step(GpuTrainer *x, const AdamW *how, uint64_t step, double *norm) {
    Device *d = &x->device;
    float length = 0;
    if (!x->arena) return gpu_fail("the trainer has no memory for a pass");
    if (gradient_norm(x, x->gradient, x->floats, how->clip, &length)) return -1;
    *norm = length;
    if (!(*norm - *norm == 0)) {
        const float *host = (const float *)x->places[0].host->data;
        for (const TensorPlace &p : x->places) {
            size_t n = (size_t)p.host->rows * (size_t)p.host->cols;
            float part = 0;
            if (gradient_norm(x, x->gradient + ((const float *)p.host->data - host), n, 0, &part))
                return -1;
            if (part - part == 0) continue;
            if (p.layer < 0)
                return gpu_fail("step %llu: the gradient of %s is not finite",
                                (unsigned long long)step, p.name);
            return gpu_fail("step %llu: the gradient of layer %d %s is not finite",
                            (unsigned long long)step, p.layer, p.name);
        }
        return gpu_fail("step %llu: the norm of the gradient overflows", (unsigned long long)step);
    }
    double unbias = 1 - pow(how->beta1, (double)step), unbias2 = 1 - pow(how->beta2, (double)step);
    float rate = (float)(how->rate / unbias), root = (float)(1 / sqrt(unbias2)),
          keep = 1 - how->rate * how->decay;
    unsigned blocks = (unsigned)d->processors * 8;
    if (x->bf16_compute)
        adamw_kernel<<<blocks, 256, 0, d->stream>>>(
            x->weights, (bf16 *)x->compute, x->gradient, x->moment, x->moment2, x->decays, x->norms,
            x->floats, rate, how->beta1, how->beta2, how->epsilon, keep, root);
    else
        adamw_kernel<<<blocks, 256, 0, d->stream>>>(
            x->weights, x->weights, x->gradient, x->moment, x->moment2, x->decays, x->norms,
            x->floats, rate, how->beta1, how->beta2, how->epsilon, keep, root);
    check_launch(d, "adamw");
    derive_all(x);
    return finish(d);
}

// ---------------------------------------------------------------------------------------------------------------------
// 8 What mamba.c calls

// The machine's ceilings: bytes read and written a second by a copy, operations a second of a bf16
// product (either NULL: not asked), device memory in use by everybody, the GPU's name. 0, or -1
// with a sentence.
static int gpu_measure(double *copy_bytes, double *flops, double *used_bytes, char name[256]) {
    cudaDeviceProp properties;
    size_t free_bytes = 0, total = 0;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaGetDeviceProperties(&properties, device) != cudaSuccess)
        return gpu_fail("no GPU can be used: --cpu runs on the processor");
    snprintf(name, 256, "%s", properties.name);
    cudaMemGetInfo(&free_bytes, &total);
    *used_bytes = (double)(total - free_bytes);
    if (!copy_bytes) return 0;
    enum { SIZE = 8192, ROUNDS = 10 };
    const size_t bytes = (size_t)1 << 30, elements = (size_t)SIZE * SIZE;
    Device d;
    char *buffer = NULL;
    cudaEvent_t event[3];
    float milliseconds[2] = {1, 1};
    if (device_open(&d) || !(buffer = (char *)device_alloc(2 * bytes))) return device_close(&d), -1;
    bf16 *a = (bf16 *)buffer, *b = a + elements, *c = b + elements;
    for (cudaEvent_t &e : event) cudaEventCreate(&e);
    random_kernel<<<1024, 256, 0, d.stream>>>((bf16 *)buffer, bytes, 1, -1.0f, 1.0f);
    for (int round = -1; round < ROUNDS; round++) {
        if (round == 0) cudaEventRecord(event[0], d.stream);
        cudaMemcpyAsync(buffer + bytes, buffer, bytes, cudaMemcpyDeviceToDevice, d.stream);
    }
    cudaEventRecord(event[1], d.stream);
    for (int round = -1; round < ROUNDS; round++) {
        if (round == 0) cudaEventRecord(event[1], d.stream);
        if (round == -1)
            cudaEventRecord(event[2], d.stream), cudaStreamSynchronize(d.stream),
                cudaEventElapsedTime(&milliseconds[0], event[0], event[1]);
        matmul(&d, c, (size_t)SIZE, a, (size_t)SIZE, b, SIZE, SIZE, SIZE);
    }
    cudaEventRecord(event[2], d.stream);
    int result = finish(&d);
    cudaEventElapsedTime(&milliseconds[1], event[1], event[2]);
    *copy_bytes = 2.0 * (double)bytes * ROUNDS / milliseconds[0] * 1e3;
    *flops = 2.0 * SIZE * (double)elements * ROUNDS / milliseconds[1] * 1e3;
    for (cudaEvent_t &e : event) cudaEventDestroy(e);
    cudaFree(buffer);
    device_close(&d);
    return result;
}

template <class T>
static int time_scan(int B, int E, int L, int N, int repeats, double seconds[4]) {
    Device d;
    size_t rows = (size_t)B * L, cells = rows * E, NE = (size_t)N * E, P = 2 * (size_t)N;
    bool backward = (double)cells < 3e9; // its memory
    T *x = NULL, *out = NULL, *gradients = NULL;
    float *constants = NULL, *h_starts = NULL;
    char *scratch = NULL;
    if (device_open(&d)) return device_close(&d), -1;
    size_t chunks = (size_t)B * ((L + SCAN_SAVE - 1) / SCAN_SAVE),
           constant_floats = 2 * NE + 4 * (size_t)E;
    size_t mail = (scan_forward_workspace(B, E, N) + 255) / 256 * 256,
           bytes = mail + (backward ? scan_backward_workspace(B, L, E, N) : 0);
    x = (T *)device_alloc((3 * cells + rows * P) * sizeof(T)),
    out = (T *)device_alloc(cells * sizeof(T));
    constants = (float *)device_alloc(constant_floats * sizeof(float));
    scratch = (char *)device_alloc(bytes + 256);
    if (backward) {
        gradients = (T *)device_alloc((4 * cells + rows * P) * sizeof(T));
        h_starts = (float *)device_alloc(chunks * NE * sizeof(float));
    }
    int result =
        x && out && constants && scratch && (!backward || (gradients && h_starts)) ? 0 : -1;
    if (result == 0) {
        T *delta = x, *u = x + cells, *z = u + cells, *BC = z + cells;
        float *A_neg = constants, *D_skip = constants + NE, *dt_bias = D_skip + E,
              *d_A = dt_bias + E, *d_D = d_A + NE, *d_bias = d_D + E;
        random_kernel<<<1024, 256, 0, d.stream>>>(x, 3 * cells + rows * P, 1, -1.0f, 1.0f);
        random_kernel<<<1024, 256, 0, d.stream>>>(A_neg, NE, 2, -(float)N, -0.5f);
        random_kernel<<<64, 256, 0, d.stream>>>(D_skip, (size_t)E, 3, 0.5f, 1.5f);
        random_kernel<<<64, 256, 0, d.stream>>>(dt_bias, (size_t)E, 4, -6.0f, -2.0f);
        cudaMemsetAsync(scratch, 0, bytes + 256, d.stream);
        cudaMemsetAsync(d_A, 0, (NE + 2 * (size_t)E) * sizeof(float), d.stream);
        if (backward) random_kernel<<<1024, 256, 0, d.stream>>>(gradients, cells, 5, -1.0f, 1.0f);
        ScanMail box = {(uint64_t *)scratch, mail, 0, 0, false};
        ScanArgs<T> scan = {};
        scan.out = out, scan.delta_raw = delta, scan.u = u, scan.z = z, scan.B_ssm = BC,
        scan.C_ssm = BC + N;
        scan.A_neg = A_neg, scan.D_skip = D_skip, scan.dt_bias = dt_bias, scan.h_starts = h_starts;
        scan.ld_out = scan.ld_delta = scan.ld_u = scan.ld_z = E, scan.ld_B = scan.ld_C = 2 * N;
        scan.B = B, scan.L = L, scan.E = E, scan.N = N, scan.mail = &box;
        ScanBackArgs<T> back =
            scan_back_args(scan, h_starts, (const T *)gradients, E, scratch + mail);
        back.d_delta_raw = gradients + cells, back.d_u = back.d_delta_raw + cells,
        back.d_z = back.d_u + cells;
        back.d_B_ssm = back.d_z + cells, back.d_C_ssm = back.d_B_ssm + N;
        back.d_A_log = d_A, back.d_D_skip = d_D, back.d_dt_bias = d_bias;
        back.ld_d_delta = back.ld_d_u = back.ld_d_z = E, back.ld_d_B = back.ld_d_C = 2 * N;
        cudaEvent_t event[2];
        for (cudaEvent_t &e : event) cudaEventCreate(&e);
        for (int what = 0; what < 3 && result == 0; what++) { // forward, backward, copy
            std::vector<float> time;
            seconds[what] = 0;
            if (what == 1 && !backward) continue;
            for (int round = -2; round < repeats && result == 0; round++) {
                cudaEventRecord(event[0], d.stream);
                if (what == 0) check_cuda(&d, scan_forward(&d, scan), "scan");
                if (what == 1) check_cuda(&d, scan_backward(back, d.stream), "backward scan");
                if (what == 2)
                    cudaMemcpyAsync(x, x + 2 * cells, cells * sizeof(T), cudaMemcpyDeviceToDevice,
                                    d.stream),
                        cudaMemcpyAsync(out, x + cells, cells * sizeof(T), cudaMemcpyDeviceToDevice,
                                        d.stream);
                cudaEventRecord(event[1], d.stream);
                result = finish(&d);
                float milliseconds = 0;
                cudaEventElapsedTime(&milliseconds, event[0], event[1]);
                if (round >= 0) time.push_back(milliseconds);
            }
            std::sort(time.begin(), time.end());
            if (!time.empty()) seconds[what] = time[time.size() / 2] * 1e-3;
        }
        for (cudaEvent_t &e : event) cudaEventDestroy(e);
    }
    cudaFree(x), cudaFree(out), cudaFree(constants), cudaFree(scratch), cudaFree(gradients),
        cudaFree(h_starts);
    device_close(&d);
    return result;
}

// Medians of the scan's forward, its backward (0 where memory is short), and a copy of as many
// bytes as the forward reads and writes, on random inputs. 0, or -1 with a sentence.
static int gpu_time_scan(int B, int E, int L, int N, int float32, int repeats, double seconds[4]) {
    return float32 ? time_scan<float>(B, E, L, N, repeats, seconds)
                   : time_scan<bf16>(B, E, L, N, repeats, seconds);
}

extern "C" const GpuBackend mamba_gpu = {
    gpu_error,        gpu_open,          gpu_close,          gpu_set_state,   gpu_get_state,
    gpu_prefill,      gpu_gather,        gpu_generate_start, gpu_generate,    GENERATE_MAX,
    gpu_trainer_open, gpu_trainer_close, gpu_trainer_resize, gpu_trainer_set, gpu_trainer_get,
    gpu_train_pass,   gpu_train_step,    gpu_measure,        gpu_time_scan,   gpu_step_form};
