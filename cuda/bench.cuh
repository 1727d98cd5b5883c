// bench.cuh - ceilings of the machine and times of the scan.
// Included by mamba_cuda.cu.

// Random numbers for benchmarks, uniform between low and high.
template <class T>
__global__ void random_kernel(T *x, size_t n, uint64_t seed, float low, float high) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        put(x + i,
            low + (high - low) * ((float)(mix(i + seed * 0x9E3779B97F4A7C15u) >> 40) * 0x1p-24f));
}

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
                if (what == 1) check_cuda(&d, scan_backward(&d, back), "backward scan");
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
