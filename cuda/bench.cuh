// bench.cuh - ceilings of the machine, the scan's check against its definition, and its times.
// Included by mamba_cuda.cu.

// Random numbers for benchmarks, uniform between low and high.
template <class T>
__global__ void random_kernel(T *x, size_t n, uint64_t seed, float low, float high) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        put(x + i,
            low + (high - low) * ((float)(mix(i + seed * 0x9E3779B97F4A7C15u) >> 40) * 0x1p-24f));
}

// The ceilings of the machine: bytes a second that a copy reads and writes, operations a second of
// a product in bf16 (copy_bytes NULL: neither is measured); device memory in use by all programs;
// the name of the GPU. 0, or -1 with a sentence.
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
        copy(&d, buffer + bytes, buffer, bytes, "copy");
    }
    cudaEventRecord(event[1], d.stream);
    for (int round = -1; round < ROUNDS; round++) {
        if (round == 0) cudaEventRecord(event[1], d.stream);
        if (round == -1)
            cudaEventRecord(event[2], d.stream), cudaStreamSynchronize(d.stream),
                cudaEventElapsedTime(&milliseconds[0], event[0], event[1]);
        matmul(&d, Rows(c, SIZE), Rows(a, SIZE), b, SIZE, SIZE, SIZE);
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

// The largest |a - b| and |b| of each block's share; infinity where a number is not finite.
enum { DIFFERENCE_BLOCKS = 512 };
template <class A>
__global__ void difference_kernel(float *parts, const A *a, const A *b, size_t n) {
    __shared__ float scratch[33];
    float difference = 0, largest = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        float x = fabsf(value(a[i]) - value(b[i]));
        difference = fmaxf(difference, x - x == 0 ? x : INFINITY);
        largest = fmaxf(largest, fabsf(value(b[i])));
    }
    difference = block_max(difference, scratch);
    largest = block_max(largest, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = difference, parts[gridDim.x + blockIdx.x] = largest;
}

// max |a - b| / max |b|, or -1 with a sentence. parts: 2 DIFFERENCE_BLOCKS floats on the device.
template <class A>
static double difference(Device *d, float *parts, const A *a, const A *b, size_t n) {
    float host[2 * DIFFERENCE_BLOCKS];
    difference_kernel<<<DIFFERENCE_BLOCKS, 256, 0, d->stream>>>(parts, a, b, n);
    check_launch(d, "compare");
    copy(d, host, parts, sizeof host, "compare");
    if (finish(d)) return -1;
    float worst = *std::max_element(host, host + DIFFERENCE_BLOCKS),
          largest = *std::max_element(host + DIFFERENCE_BLOCKS, host + 2 * DIFFERENCE_BLOCKS);
    return worst == 0 ? 0 : worst / largest;
}

// The scan alone on random inputs: what time_scan() allocates on the device.
template <class T> struct ScanBench {
    int B, E, L, N;
    size_t cells, states, starts, rows_BC; // elements of (B,L,E), (B,N,E), h_starts, (B,L,2N)
    bool backward;                         // there is memory for it
    T *inputs, *out, *plain_out, *gradients;
    float *constants, *h, *plain_h, *h_starts, *plain_starts, *parts; // h: h0, then h_final
    char *scratch;
    size_t mail_bytes;
    ScanMail mail;
    ScanArgs<T> scan;
    ScanBackArgs<T> back;
};

template <class T> static void scan_bench_free(ScanBench<T> *x) {
    cudaFree(x->inputs), cudaFree(x->out), cudaFree(x->plain_out), cudaFree(x->gradients);
    cudaFree(x->constants), cudaFree(x->h), cudaFree(x->h_starts), cudaFree(x->scratch);
}

template <class T> static int scan_bench_open(Device *d, ScanBench<T> *x) {
    const int B = x->B, E = x->E, L = x->L, N = x->N;
    const size_t NE = (size_t)N * E;
    x->cells = (size_t)B * L * E, x->states = B * NE, x->rows_BC = (size_t)B * L * 2 * N;
    x->starts = (size_t)B * ((L + SCAN_SAVE - 1) / SCAN_SAVE) * NE;
    x->backward = (double)x->cells < 3e9;
    x->mail_bytes = (scan_forward_workspace(B, E, N) + 255) / 256 * 256;
    const size_t scratch_bytes =
        x->mail_bytes + (x->backward ? scan_backward_workspace(B, L, E, N) : 0);
    auto take = [](auto *&p, size_t n) {
        p = (std::remove_reference_t<decltype(p)>)device_alloc(n * sizeof *p);
        return p != NULL;
    };
    if (!take(x->inputs, 3 * x->cells + x->rows_BC) || !take(x->out, x->cells) ||
        !take(x->plain_out, x->cells) || !take(x->constants, 2 * NE + 4 * (size_t)E) ||
        !take(x->h, 3 * x->states + 2 * DIFFERENCE_BLOCKS) || !take(x->scratch, scratch_bytes) ||
        (x->backward &&
         (!take(x->gradients, 4 * x->cells + x->rows_BC) || !take(x->h_starts, 2 * x->starts))))
        return -1;
    x->plain_h = x->h + 2 * x->states, x->parts = x->plain_h + x->states;
    x->plain_starts = x->h_starts ? x->h_starts + x->starts : NULL;

    float *A_neg = x->constants, *D_skip = A_neg + NE, *dt_bias = D_skip + E, *d_A = dt_bias + E;
    auto random = [&](auto *p, size_t n, uint64_t seed, float low, float high) {
        random_kernel<<<1024, 256, 0, d->stream>>>(p, n, seed, low, high);
    };
    random(x->inputs, 3 * x->cells + x->rows_BC, 1, -1, 1), random(A_neg, NE, 2, -(float)N, -0.5f);
    random(D_skip, (size_t)E, 3, 0.5f, 1.5f), random(dt_bias, (size_t)E, 4, -6, -2);
    random(x->h, x->states, 6, -1, 1);
    clear(d, x->scratch, scratch_bytes, "scratch");
    clear(d, d_A, (NE + 2 * (size_t)E) * sizeof(float), "scratch");
    if (x->backward) random(x->gradients, x->cells, 5, -1, 1);

    x->mail = {(uint64_t *)x->scratch, x->mail_bytes, 0, 0, false};
    ScanArgs<T> &p = x->scan;
    p.out = x->out, p.h_starts = x->h_starts, p.mail = &x->mail;
    p.delta_raw = x->inputs, p.u = p.delta_raw + x->cells, p.z = p.u + x->cells;
    p.B_ssm = p.z + x->cells, p.C_ssm = p.B_ssm + N;
    p.A_neg = A_neg, p.D_skip = D_skip, p.dt_bias = dt_bias;
    p.ld_out = E, p.ld_delta = E, p.ld_u = E, p.ld_z = E, p.ld_B = 2 * N, p.ld_C = 2 * N;
    p.B = B, p.L = L, p.E = E, p.N = N;
    ScanBackArgs<T> &q = x->back;
    q = scan_back_args(p, x->h_starts, (const T *)x->gradients, E, x->scratch + x->mail_bytes);
    q.d_delta_raw = x->gradients + x->cells, q.d_u = q.d_delta_raw + x->cells;
    q.d_z = q.d_u + x->cells, q.d_B_ssm = q.d_z + x->cells, q.d_C_ssm = q.d_B_ssm + N;
    q.d_A_log = d_A, q.d_D_skip = d_A + NE, q.d_dt_bias = q.d_D_skip + E;
    q.ld_d_delta = E, q.ld_d_u = E, q.ld_d_z = E, q.ld_d_B = 2 * N, q.ld_d_C = 2 * N;
    return finish(d);
}

// The form that scan_forward() chooses (and of one step the step's, too) against scan_plain: the
// largest difference of out, h_final and h_starts, relative to the largest number of each; -1 with
// a sentence.
template <class T> static double scan_error(Device *d, ScanBench<T> *x) {
    double worst = 0;
    auto compare = [&](const auto *fast, const auto *plain, size_t n) {
        double off = difference(d, x->parts, fast, plain, n);
        worst = worst < 0 || off < 0 ? -1 : std::max(worst, off);
    };
    ScanArgs<T> plain = x->scan;
    plain.h0 = x->h, plain.h_final = x->plain_h, plain.out = x->plain_out;
    plain.h_starts = x->plain_starts;
    check_cuda(d, scan_plain_forward(d, plain), "plain scan");
    for (int step = 0; step < (x->L == 1 ? 2 : 1); step++) {
        ScanArgs<T> fast = x->scan;
        fast.h0 = x->h, fast.h_final = x->h + x->states;
        clear(d, x->out, x->cells * sizeof(T), "scan", 0xff); // not a number
        clear(d, fast.h_final, x->states * sizeof(float), "scan", 0xff);
        check_cuda(d, step ? scan_step_forward(d, fast) : scan_forward(d, fast), "scan");
        compare(x->out, x->plain_out, x->cells);
        compare(fast.h_final, x->plain_h, x->states);
        if (x->h_starts && !step) compare(x->h_starts, x->plain_starts, x->starts);
    }
    return worst;
}

// Checks the scan against its definition, then times it. seconds: forward, backward, a copy of the
// forward's bytes; [3] is the error of scan_error().
template <class T>
static int time_scan(int B, int E, int L, int N, int repeats, double seconds[4]) {
    Device d;
    ScanBench<T> x = {};
    x.B = B, x.E = E, x.L = L, x.N = N;
    if (device_open(&d)) return device_close(&d), -1;
    int result = scan_bench_open(&d, &x);
    if (result == 0) {
        const double limit = sizeof(T) == 2 ? 1e-2 : 1e-4;
        seconds[3] = scan_error(&d, &x);
        if (seconds[3] < 0) result = -1;
        else if (!(seconds[3] <= limit))
            result = gpu_fail("GPU: the scan is off its definition by %g of the largest number, "
                              "more than %g",
                              seconds[3], limit);
    }
    cudaEvent_t event[2];
    for (cudaEvent_t &e : event) cudaEventCreate(&e);
    for (int what = 0; what < 3 && result == 0; what++) { // forward, backward, copy
        std::vector<float> time;
        seconds[what] = 0;
        if (what == 1 && !x.backward) continue;
        for (int round = -2; round < repeats && result == 0; round++) {
            cudaEventRecord(event[0], d.stream);
            if (what == 0) check_cuda(&d, scan_forward(&d, x.scan), "scan");
            if (what == 1) check_cuda(&d, scan_backward(&d, x.back), "backward scan");
            if (what == 2) {
                copy(&d, x.inputs, x.inputs + 2 * x.cells, x.cells * sizeof(T), "copy");
                copy(&d, x.out, x.inputs + x.cells, x.cells * sizeof(T), "copy");
            }
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
    scan_bench_free(&x);
    device_close(&d);
    return result;
}

// On random inputs, in seconds: medians of the scan's forward, its backward (0 where memory is
// short), and a copy of as many bytes as the forward reads and writes; [3] gets the largest
// difference between the forward and scan_plain, relative to the largest number. 0, or -1 with a
// sentence, also where that difference is more than rounding. repeats 0: checks, times nothing.
static int gpu_time_scan(int B, int E, int L, int N, int float32, int repeats, double seconds[4]) {
    return float32 ? time_scan<float>(B, E, L, N, repeats, seconds)
                   : time_scan<bf16>(B, E, L, N, repeats, seconds);
}
