// device.cuh - errors, memory, launches, conversions, sums over warps and blocks. Included by
// mamba_cuda.cu.
//
// Kernels are queued on one stream, so an error of a kernel shows at the next finish(). The first
// error is kept, with where it happened, until the caller asks; work queued after it does no harm.

static thread_local char gpu_error_text[400]; // of the last call of this thread that failed

static const char *gpu_error(void) { return gpu_error_text; }

static int gpu_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(gpu_error_text, sizeof gpu_error_text, format, args);
    va_end(args);
    return -1;
}

// c (m,n) = op_a(a) op_b(b), column-major as cuBLAS sees matrices. ld: elements from a column to
// the next.
struct ProductShape {
    cublasOperation_t op_a, op_b;
    int m, n, k;
    size_t ld_a, ld_b, ld_c;
};
// A matrix product prepared by cublasLt for one shape, see gemm().
struct Product {
    ProductShape shape;
    cudaDataType_t in, out; // of a and b, of c
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
    bool ready;
};

// The rows of a matrix. ld: elements from the start of a row to the next.
template <class T> struct Rows {
    T *p;
    size_t ld;
    Rows(T *p_, size_t ld_) : p(p_), ld(ld_) {}
};

struct Device { // what every kernel launch needs
    cudaStream_t stream;
    cublasHandle_t blas;
    void *workspace;     // cuBLAS's, so that graphs can be captured
    const char *failed;  // the first thing that went wrong since finish()
    cudaError_t error;   // its error, or cudaSuccess: cuBLAS's status tells
    const char *running; // what an error at finish() belongs to; NULL: "a kernel"
    int device;          // its number: every call from outside begins with device_use()
    uint32_t *stuck;     // device (2): a kernel that waited too long, see exchange.cuh
    int blas_status, processors, shared_limit; // multiprocessors; bytes of a block at the most
    bool hopper; // the code that runs was compiled for sm_90 or later: kernels wait for their input
    std::vector<Product> *products;
};

// Blocks or rows that fill this GPU, where so many fill an H100 of 132 multiprocessors, on which
// the numbers were found.
static size_t as_on_h100(const Device *d, size_t n) { return n * (size_t)d->processors / 132; }

// How many blocks of so much shared memory a multiprocessor holds: it has 1 kB more than a block
// may take, and keeps 1 kB for itself for each block.
static int blocks_that_fit(const Device *d, size_t shared) {
    return std::max(1, (int)(((size_t)d->shared_limit + 1024) / (shared + 1024)));
}

// A kernel whose blocks waited too long for each other: of the scans [0], of the one-kernel steps
// [1]; 0: none. wait_limit: milliseconds. See exchange.cuh.
enum { STUCK_SCAN, STUCK_STEP };
__device__ uint32_t stuck[2];
__device__ uint32_t wait_limit = 20000;

static void check_blas(Device *d, cublasStatus_t status, const char *where) {
    if (status != CUBLAS_STATUS_SUCCESS && !d->failed)
        d->failed = where, d->blas_status = (int)status;
}

static void check_cuda(Device *d, cudaError_t error, const char *where) {
    if (error != cudaSuccess && !d->failed) d->failed = where, d->error = error;
}

// After a launch. The error is taken, so that the next check does not name the wrong kernel.
static void check_launch(Device *d, const char *where) { check_cuda(d, cudaGetLastError(), where); }

// Queued copies and fills, of any direction; rows: of `width` bytes, to_ld and from_ld bytes apart.
static void copy(Device *d, void *to, const void *from, size_t bytes, const char *where) {
    if (bytes) check_cuda(d, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, d->stream), where);
}
static void copy_rows(Device *d, void *to, size_t to_ld, const void *from, size_t from_ld,
                      size_t width, size_t rows, const char *where) {
    if (width && rows)
        check_cuda(
            d,
            cudaMemcpy2DAsync(to, to_ld, from, from_ld, width, rows, cudaMemcpyDefault, d->stream),
            where);
}
static void clear(Device *d, void *p, size_t bytes, const char *where, int byte = 0) {
    if (bytes) check_cuda(d, cudaMemsetAsync(p, byte, bytes, d->stream), where);
}

// The calling thread's current GPU may be another one.
static void device_use(const Device *d) { cudaSetDevice(d->device); }

// Waits for everything queued. 0, or -1 with a sentence.
static int finish(Device *d) {
    cudaError_t error = cudaStreamSynchronize(d->stream), last = cudaGetLastError();
    if (error == cudaSuccess) error = last;
    const char *where = d->failed ? d->failed : d->running ? d->running : "a kernel";
    const bool bad = d->failed || error != cudaSuccess;
    if (d->error != cudaSuccess) error = d->error; // the first one
    d->failed = NULL, d->error = cudaSuccess;
    if (!bad) return 0;
    if (error != cudaSuccess) return gpu_fail("GPU: %s: %s", where, cudaGetErrorString(error));
    return gpu_fail("GPU: %s: cuBLAS status %d", where, d->blas_status);
}

// The same after scans: also -1 where one of their waits was in vain.
static int finish_scans(Device *d) {
    static const char *const name[] = {"", "scan_tiles"};
    uint32_t kernel = 0;
    copy(d, &kernel, d->stuck + STUCK_SCAN, sizeof kernel, "scan");
    if (finish(d)) return -1;
    if (kernel == 0) return 0;
    clear(d, d->stuck + STUCK_SCAN, sizeof kernel, "scan");
    return gpu_fail("GPU: %s: its blocks waited for each other in vain; the result is no use",
                    name[kernel]);
}

static void *device_alloc(size_t bytes) { // NULL with a sentence
    void *p = NULL;
    size_t free_bytes = 0, total = 0;
    // An error of earlier work stays pending for the check that knows its name.
    cudaError_t error = cudaPeekAtLastError();
    if (error != cudaSuccess) {
        gpu_fail("GPU: before memory was taken: %s", cudaGetErrorString(error));
        return NULL;
    }
    error = cudaMalloc(&p, bytes ? bytes : 1);
    if (error == cudaSuccess) return p;
    if (error != cudaErrorMemoryAllocation) { // of a kernel before it
        gpu_fail("GPU: while memory was taken: %s", cudaGetErrorString(error));
        return NULL;
    }
    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total);
    gpu_fail("GPU memory: %.1f MB are needed, %.1f of %.1f MB are free", (double)bytes / 1e6,
             (double)free_bytes / 1e6, (double)total / 1e6);
    return NULL;
}

static size_t pretended_memory; // for tests: this much is free; 0: what is
static size_t free_memory(size_t *total) {
    size_t free_bytes = 0;
    if (cudaMemGetInfo(&free_bytes, total) != cudaSuccess) cudaGetLastError();
    return pretended_memory ? std::min(pretended_memory, free_bytes) : free_bytes;
}

// Lays arrays out one after the other: without a base it measures, with one it sets pointers.
struct Arena {
    char *base;
    size_t used;
    template <class P> void take(P *&p, size_t elements, size_t width = sizeof(P)) {
        p = base ? (P *)(base + used) : NULL;
        used += (elements * width + 255) / 256 * 256;
    }
};

enum { CUBLAS_WORKSPACE = 32 << 20 };

// cuBLAS would take twice as much again when it starts, which it then does not use. It asks the
// environment, so this is said before main().
static void __attribute__((constructor)) no_blas_pool(void) {
    setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0", 0);
}

// Tests pretend a smaller GPU: the choices that follow from its size are made for that one. 0: the
// true number.
static int pretended_processors, pretended_shared;
static bool pretended_portable; // only portable steps
static int pretended(int is, int pretend) { return pretend && pretend < is ? pretend : is; }

__global__ void probe_kernel() {}

// The architecture that the running code was compiled for: 80, 90, ... The card may be newer.
static cudaError_t code_version(int *version) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, (const void *)probe_kernel);
    if (error == cudaSuccess) *version = attributes.ptxVersion;
    else cudaGetLastError();
    return error;
}

// cublasDestroy() waits for the whole context (cuCtxSynchronize). The driver can crash in it while
// another thread captures: `sh tests/soak_gpu.sh 180 6` did without this lock. So the two wait for
// each other, and cublasCreate() too.
static std::mutex capture_mutex;

static int device_open(Device *d) {
    memset(d, 0, sizeof *d);
    const std::lock_guard<std::mutex> no_capture(capture_mutex);
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
    if ((error = cudaGetDevice(&d->device)) != cudaSuccess ||
        (error = cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount,
                                        d->device)) != cudaSuccess ||
        (error = cudaDeviceGetAttribute(&d->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        d->device)) != cudaSuccess ||
        (error = cudaGetSymbolAddress((void **)&d->stuck, stuck)) != cudaSuccess)
        return gpu_fail("GPU: %s", cudaGetErrorString(error));
    d->processors = pretended(d->processors, pretended_processors);
    d->shared_limit = pretended(d->shared_limit, pretended_shared);
    if ((error = cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking)) != cudaSuccess)
        return gpu_fail("GPU: %s", cudaGetErrorString(error));
    if (cublasCreate(&d->blas) != CUBLAS_STATUS_SUCCESS)
        return gpu_fail("GPU: cuBLAS does not start");
    if (!(d->workspace = device_alloc(CUBLAS_WORKSPACE))) return -1;
    if (cublasSetStream(d->blas, d->stream) != CUBLAS_STATUS_SUCCESS ||
        cublasSetWorkspace(d->blas, d->workspace, CUBLAS_WORKSPACE) != CUBLAS_STATUS_SUCCESS)
        return gpu_fail("GPU: cuBLAS does not take its workspace");
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
    const std::lock_guard<std::mutex> no_capture(capture_mutex);
    products_free(d);
    if (d->blas) cublasDestroy(d->blas);
    cudaFree(d->workspace);
    if (d->stream) cudaStreamDestroy(d->stream);
}

__device__ inline float value(float x) { return x; }
__device__ inline float value(bf16 x) { return __bfloat162float(x); }
__device__ inline float value(f16 x) { return __half2float(x); }
__device__ inline float value(uint16_t half_bits) {
    return __half2float(__ushort_as_half(half_bits));
}
__device__ inline void put(float *p, float x) { *p = x; }
__device__ inline void put(bf16 *p, float x) { *p = __float2bfloat16_rn(x); }
__device__ inline void put(f16 *p, float x) { *p = __float2half_rn(x); }

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

// The sum over a block of up to 1024 threads, which all of them get. The order is fixed. scratch:
// 33 floats.
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

// Waits until the kernel ahead has ended and what it wrote is visible. Then the next kernel may
// start, and load what no kernel writes.
__device__ inline void wait_for_input() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Shared memory beyond 48 kB must be asked for, kernel by kernel. What one thread asks for holds
// for all threads. So it only grows: less would refuse a launch that another thread prepares.
static std::mutex shared_mutex;

template <class... Parameters>
static cudaError_t allow_shared(void (*kernel)(Parameters...), size_t bytes) {
    if (bytes <= 48 << 10) return cudaSuccess;
    if (pretended_shared && bytes > (size_t)pretended_shared) return cudaErrorInvalidValue;
    const std::lock_guard<std::mutex> lock(shared_mutex);
    cudaFuncAttributes now;
    cudaError_t error = cudaFuncGetAttributes(&now, kernel);
    if (error != cudaSuccess || now.maxDynamicSharedSizeBytes >= (int)bytes) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}

static unsigned blocks_for(size_t n, size_t a_block) {
    return (unsigned)((n + a_block - 1) / a_block);
}

// Launches a kernel that begins with wait_for_input(): it may start while the kernel before it
// still runs, where the code was compiled for that. cluster: blocks of a thread block cluster.
template <class... Parameters, class... Arguments>
static cudaError_t launch_cluster(Device *d, unsigned cluster, void (*kernel)(Parameters...),
                                  dim3 grid, unsigned threads, size_t shared,
                                  Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = d->stream;
    config.attrs = attributes;
    config.numAttrs = !d->hopper ? 0 : cluster > 1 ? 2 : 1;
    cudaError_t error = allow_shared(kernel, shared);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    return error;
}
template <class... Parameters, class... Arguments>
static cudaError_t launch_dependent(Device *d, void (*kernel)(Parameters...), dim3 grid,
                                    unsigned threads, size_t shared, Arguments... arguments) {
    return launch_cluster(d, 1, kernel, grid, threads, shared, arguments...);
}

__device__ inline uint32_t pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&both;
}
__device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The same of two numbers of type T.
template <class T> __device__ inline uint32_t pack_of(float low, float high) {
    if constexpr (std::is_same<T, bf16>::value) {
        return pack(low, high);
    } else {
        __half2 both = __floats2half2_rn(low, high);
        return *(uint32_t *)&both;
    }
}
template <class T> __device__ inline float low_of(uint32_t pair) {
    if constexpr (std::is_same<T, bf16>::value) return low_half(pair);
    else return __low2float(*(__half2 *)&pair);
}
template <class T> __device__ inline float high_of(uint32_t pair) {
    if constexpr (std::is_same<T, bf16>::value) return high_half(pair);
    else return __high2float(*(__half2 *)&pair);
}

__device__ inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ inline void copy_16(uint32_t to, const void *from) { // bytes, to a shared address
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same, or zeros where `is` is false.
__device__ inline void copy_16_or_zero(uint32_t to, const void *from, bool is) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(is ? 16 : 0)
                 : "memory");
}
__device__ inline void copies_done(void) { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void prefetch_L2(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Bytes that a later kernel reads. A kernel asks for them before it has its own input, so that they
// come to L2 while memory has little else to do. A thread of the grid asks for each 128 bytes.
struct Ahead {
    const char *from;
    size_t bytes;
};
__device__ inline void ask(Ahead a) {
    const size_t threads = (size_t)gridDim.x * gridDim.y * blockDim.x,
                 block = blockIdx.y * gridDim.x + blockIdx.x;
    for (size_t i = block * blockDim.x + threadIdx.x; i < a.bytes / 128; i += threads)
        prefetch_L2(a.from + 128 * i);
}

// Four matrices of 8 x 8 numbers of 16 bits from shared memory; lane 8 i + r has the address of row
// r of matrix i. Lane l gets columns 2 (l % 4) and the next of row l / 4; turned: rows and columns
// change places.
template <bool TURNED> __device__ inline uint4 matrices(uint32_t row) {
    uint4 m;
    if (TURNED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                     : "r"(row));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                     : "r"(row));
    return m;
}

__device__ inline void tensor_product(float c[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <class T>
__device__ inline void tensor_product_of(float c[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<T, bf16>::value) tensor_product(c, a0, a1, a2, a3, b0, b1);
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c = a b^T of bytes with a sign, (16,32) times (8,32)
__device__ inline void integer_product(int c[4], uint4 a, uint2 b) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%10,%10,%10,%10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(0));
}

// Of a tile of Q8 or Q4 on the device (quantized.cuh): the place of word (g,r), and which bits of
// it differ from code + 2^(bits - 1).
__device__ inline int tile_word(int bits, int g, int r) {
    if (bits == 4) return (r / 4 * 4 + g) * 4 + r % 4;
    return (r / 2 % 2 * 32 + r / 4 * 4 + g / 2) * 4 + g % 2 * 2 + r % 2;
}
__device__ inline uint32_t tile_signs(int bits) { return bits == 4 ? 0x88888888u : 0x80808080u; }
