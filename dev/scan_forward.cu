// The ladder of the fused scan's forward and step: checks every rung against a float64 kernel, then
// times it.
//   nvcc -O3 -std=c++17 -arch=sm_90 -cudart static -o /tmp/bench dev/scan_forward.cu -lcublasLt
//   -lcublas && /tmp/bench [check | ladder [start of a rung's name] | step | mini | prof]
// mini: a few checks, for compute-sanitizer; prof: one launch each, for ncu. No argument: check,
// ladder, step. Inputs are like a trained model's: delta from 0.001 to 0.1, A_neg near -(1..N), the
// rest random. Outputs are poisoned before every check. Times are medians of CUDA events around
// single launches (step: of 20 launches).
#include "../mamba_cuda.cu"
#include <algorithm>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <vector>

#define CUDA(call) \
    do { \
        cudaError_t err = (call); \
        if (err != cudaSuccess) \
            printf("line %d: %s\n", __LINE__, cudaGetErrorString(err)), exit(1); \
    } while (0)

// Rung 1: a thread is a channel, 16 states in registers, everything from global memory, expf.
template <typename T, int N> __global__ void naive(ScanArgs<T> p) {
    int at = blockIdx.x * blockDim.x + threadIdx.x, b = at / p.E, e = at % p.E;
    if (b >= p.B) return;
    float h[N];
    for (int n = 0; n < N; n++) h[n] = p.h0 ? p.h0[((size_t)b * N + n) * p.E + e] : 0.f;
    for (int t = 0; t < p.L; t++) {
        size_t row = (size_t)b * p.L + t;
        float d = log1pf(expf(value(p.delta_raw[row * p.ld_delta + e]) + p.dt_bias[e]));
        float u = value(p.u[row * p.ld_u + e]), z = value(p.z[row * p.ld_z + e]),
              y = p.D_skip[e] * u;
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (p.h_starts && t % SCAN_SAVE == 0)
                p.h_starts[(((size_t)b * ((p.L + SCAN_SAVE - 1) / SCAN_SAVE) + t / SCAN_SAVE) * N +
                            n) *
                               p.E +
                           e] = h[n];
            h[n] = expf(d * p.A_neg[(size_t)n * p.E + e]) * h[n] +
                   d * value(p.B_ssm[row * p.ld_B + n]) * u;
            y += value(p.C_ssm[row * p.ld_C + n]) * h[n];
        }
        p.out[row * p.ld_out + e] = to<T>(y * z / (1.f + expf(-z)));
    }
    for (int n = 0; n < N && p.h_final; n++) p.h_final[((size_t)b * N + n) * p.E + e] = h[n];
}
template <typename T, int N> cudaError_t naive_launch(Device *d, const ScanArgs<T> &p) {
    naive<T, N><<<(p.B * p.E + 63) / 64, 64, 0, d->stream>>>(p);
    return cudaGetLastError();
}

// The definition in float64. sum: squares of (difference, reference) for out, h_final, h_starts.
template <typename T> __global__ void check(ScanArgs<T> p, double *sum) {
    int at = blockIdx.x * blockDim.x + threadIdx.x, b = at / p.E, e = at % p.E, N = p.N;
    if (b >= p.B) return;
    double h[64], diff[3] = {0, 0, 0}, ref[3] = {0, 0, 0};
    auto compare = [&](int i, double x, double r) {
        diff[i] += (x - r) * (x - r), ref[i] += r * r;
    };
    for (int n = 0; n < N; n++) h[n] = p.h0 ? p.h0[((size_t)b * N + n) * p.E + e] : 0.;
    for (int t = 0; t < p.L; t++) {
        size_t row = (size_t)b * p.L + t;
        double d = log1p(exp((double)value(p.delta_raw[row * p.ld_delta + e]) + p.dt_bias[e]));
        double u = value(p.u[row * p.ld_u + e]), z = value(p.z[row * p.ld_z + e]),
               y = p.D_skip[e] * u;
        for (int n = 0; n < N; n++) {
            if (p.h_starts && t % SCAN_SAVE == 0)
                compare(
                    2,
                    p.h_starts[(((size_t)b * ((p.L + SCAN_SAVE - 1) / SCAN_SAVE) + t / SCAN_SAVE) *
                                    N +
                                n) *
                                   p.E +
                               e],
                    h[n]);
            h[n] = exp(d * p.A_neg[(size_t)n * p.E + e]) * h[n] +
                   d * value(p.B_ssm[row * p.ld_B + n]) * u;
            y += value(p.C_ssm[row * p.ld_C + n]) * h[n];
        }
        compare(0, value(p.out[row * p.ld_out + e]), y * z / (1 + exp(-z)));
    }
    for (int n = 0; n < N && p.h_final; n++)
        compare(1, p.h_final[((size_t)b * N + n) * p.E + e], h[n]);
    for (int i = 0; i < 3; i++) atomicAdd(sum + 2 * i, diff[i]), atomicAdd(sum + 2 * i + 1, ref[i]);
}

__device__ float noise(uint64_t i, uint32_t seed) { // uniform in (0,1)
    uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull + (uint64_t)seed * 0xD1B54A32D192ED03ull;
    x ^= x >> 30, x *= 0xBF58476D1CE4E5B9ull, x ^= x >> 27, x *= 0x94D049BB133111EBull,
        x ^= x >> 31;
    return ((x >> 40) + 0.5f) * (1.f / 16777216.f);
}
// kind 0: near normal  1: delta_raw for softplus in 0.001..0.1 after a bias of -1  2: A_neg  3:
// dt_bias -1
template <typename T> __global__ void fill(T *to_, size_t count, int kind, uint32_t seed, int E) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        float a = noise(i, seed), g = 1.7f * (a + noise(i, seed + 77) + noise(i, seed + 99) - 1.5f),
              v = g;
        if (kind == 1) v = logf(expm1f(0.001f * expf(4.6f * a))) + 1.f;
        if (kind == 2) v = -(float)(i / E + 1) * expf(0.3f * g);
        if (kind == 3) v = -1.f;
        to_[i] = to<T>(v);
    }
}
template <typename T> void fill_with(T *p, size_t count, int kind, uint32_t seed, int E = 1) {
    fill<<<2048, 256>>>(p, count, kind, seed, E);
    CUDA(cudaGetLastError());
}

static Device device; // with the default stream
static char *pool;
static size_t pool_bytes, pool_used;
template <typename T>
T *take(size_t count, int shift = 0) { // shift: elements off the 256-byte boundary
    char *p = pool + pool_used;
    pool_used += ((count + 64) * sizeof(T) + 255) / 256 * 256;
    if (pool_used > pool_bytes) printf("pool too small: %zu\n", pool_used), exit(1);
    return (T *)p + shift;
}

// One problem. odd: every stride and base odd.
template <typename T> struct Case {
    ScanArgs<T> p;
    ScanMail mail;
    size_t out_count, state_count, starts_count;
    Case(int B, int L, int E, int N, bool h0, bool starts, bool odd) {
        pool_used = 0;
        size_t rows = (size_t)B * L, ld = odd ? E + 3 : E, P = odd ? 2 * N + 7 : 2 * N + 48,
               s = odd;
        state_count = (size_t)B * N * E,
        starts_count = (size_t)B * ((L + SCAN_SAVE - 1) / SCAN_SAVE) * N * E, out_count = rows * ld;
        T *delta = take<T>(rows * ld, s), *u = take<T>(rows * ld, s),
          *xz = take<T>(rows * 2 * ld, s), *xdb = take<T>(rows * P, s);
        float *A = take<float>(N * E), *D = take<float>(E), *bias = take<float>(E),
              *h = take<float>(state_count);
        fill_with(delta, rows * ld, 1, 1), fill_with(u, rows * ld, 0, 2),
            fill_with(xz, rows * 2 * ld, 0, 3);
        fill_with(xdb, rows * P, 0, 4), fill_with(A, (size_t)N * E, 2, 5, E),
            fill_with(D, (size_t)E, 0, 6);
        fill_with(bias, (size_t)E, 3, 7), fill_with(h, state_count, 0, 8);
        size_t R = odd ? 7 : 48;
        p.delta_raw = delta, p.u = u, p.z = xz + ld, p.B_ssm = xdb + R, p.C_ssm = xdb + R + N;
        p.A_neg = A, p.D_skip = D, p.dt_bias = bias, p.h0 = h0 ? h : NULL;
        p.out = take<T>(out_count, s), p.h_final = take<float>(state_count);
        p.h_starts = starts ? take<float>(starts_count) : NULL;
        p.ld_out = p.ld_delta = p.ld_u = ld, p.ld_z = 2 * ld, p.ld_B = p.ld_C = P;
        p.B = B, p.L = L, p.E = E, p.N = N;
        size_t bytes = scan_forward_workspace(B, E, N);
        mail = {take<uint64_t>(bytes / 8), bytes, 0, 0, false}, p.mail = &mail;
    }
    Case(const Case &) = delete; // p.mail points into it
    void near_wrap() {           // tickets and tags as after four thousand million tiles
        uint32_t given = UINT32_MAX - 5;
        CUDA(cudaMemset(mail.words, 0, mail.bytes));
        CUDA(cudaMemcpy(mail.words, &given, sizeof given, cudaMemcpyHostToDevice));
        mail.ticket = given, mail.tag = UINT32_MAX - 3, mail.cleared = true;
    }
    void poison() {
        CUDA(cudaMemset(p.out, 0xff, out_count * sizeof(T)));
        CUDA(cudaMemset(p.h_final, 0xff, state_count * 4));
        if (p.h_starts) CUDA(cudaMemset(p.h_starts, 0xff, starts_count * 4));
    }
    // Largest relative error of the three outputs, and whether it passes.
    double error(bool *ok, const ScanArgs<T> &q) {
        double *sum = (double *)(pool + pool_used), s[6], worst = 0;
        CUDA(cudaMemset(sum, 0, sizeof s));
        check<<<(q.B * q.E + 31) / 32, 32>>>(q, sum);
        CUDA(cudaMemcpy(s, sum, sizeof s, cudaMemcpyDeviceToHost));
        for (int i = 0; i < 3; i++) {
            double rel = s[2 * i + 1] > 0 ? sqrt(s[2 * i] / s[2 * i + 1]) : s[2 * i] == 0 ? 0 : NAN;
            double limit = i == 0 && sizeof(T) == 2 ? 1e-2 : 1e-5;
            if (!(rel <= limit)) *ok = false;
            if (i == 0 && !(rel <= worst)) worst = rel;
            if (i > 0 && !(rel <= limit)) worst = rel;
        }
        return worst;
    }
};

template <typename T> struct Rung {
    std::string name;
    cudaError_t (*launch)(Device *, const ScanArgs<T> &);
    int N; // 0: any
};

static float time_us(int repeats, int inner, void (*go)(void *), void *arg) {
    cudaEvent_t t0, t1;
    CUDA(cudaEventCreate(&t0));
    CUDA(cudaEventCreate(&t1));
    std::vector<float> ms(repeats);
    for (int i = 0; i < 2; i++) go(arg);
    for (float &m : ms) {
        CUDA(cudaEventRecord(t0));
        for (int i = 0; i < inner; i++) go(arg);
        CUDA(cudaEventRecord(t1));
        CUDA(cudaEventSynchronize(t1));
        CUDA(cudaEventElapsedTime(&m, t0, t1));
    }
    CUDA(cudaEventDestroy(t0));
    CUDA(cudaEventDestroy(t1));
    std::sort(ms.begin(), ms.end());
    return ms[repeats / 2] * 1000 / inner;
}
template <typename T> struct Call {
    cudaError_t (*launch)(Device *, const ScanArgs<T> &);
    ScanArgs<T> *p;
};
template <typename T> void call(void *arg) {
    Call<T> *c = (Call<T> *)arg;
    CUDA(c->launch(&device, *c->p));
}

// Two channels a lane need the alignment of two: one channel elsewhere.
template <typename T, int NS, int C, int U, int M>
cudaError_t relay_paired(Device *d, const ScanArgs<T> &p) {
    uintptr_t bases = (uintptr_t)p.out | (uintptr_t)p.delta_raw | (uintptr_t)p.u | (uintptr_t)p.z;
    bool ok =
        bases % (C * sizeof(T)) == 0 && (p.ld_out | p.ld_delta | p.ld_u | p.ld_z | p.E) % C == 0;
    return ok ? scan_relay_launch<T, NS, C, U, M>(d, p) : scan_relay_launch<T, NS, 1, 4, 4>(d, p);
}
template <typename T, int K, int W, int C, int M>
cudaError_t tiles_paired(Device *d, const ScanArgs<T> &p) {
    uintptr_t bases = (uintptr_t)p.out | (uintptr_t)p.delta_raw | (uintptr_t)p.u | (uintptr_t)p.z;
    bool ok =
        bases % (C * sizeof(T)) == 0 && (p.ld_out | p.ld_delta | p.ld_u | p.ld_z | p.E) % C == 0;
    return ok ? scan_tiles_launch<T, K, W, C, M>(d, p) : scan_tiles_launch<T, K, W, 1, M>(d, p);
}
struct Shape {
    int B, E, L, N, bf;
};
#define WALK(T, S, NS, U, M) \
    {"walk S" #S " NS" #NS " u" #U " m" #M, scan_walk_launch<T, S, NS, U, M>, S * NS}
#define RELAY(T, NS, C, U, M) \
    {"relay NS" #NS " C" #C " u" #U " m" #M, relay_paired<T, NS, C, U, M>, NS * 4}
#define TILES(T, K, W, C, M) {"tiles K" #K " W" #W " C" #C " m" #M, tiles_paired<T, K, W, C, M>, 0}
#define STEP(T, V, Y) {#V "x" #Y, scan_step_launch<T, V, Y>, 0}
template <typename T> std::vector<Rung<T>> ladder_rungs() {
    std::vector<Rung<T>> rungs = {{"naive", naive_launch<T, 16>, 16},
                                  WALK(T, 2, 8, 1, 4),
                                  WALK(T, 8, 2, 4, 2),
                                  WALK(T, 4, 4, 4, 4),
                                  WALK(T, 4, 2, 4, 4),
                                  WALK(T, 4, 8, 2, 4),
                                  WALK(T, 8, 8, 2, 2),
                                  RELAY(T, 4, 1, 4, 4),
                                  RELAY(T, 2, 1, 4, 4),
                                  RELAY(T, 8, 1, 1, 4),
                                  TILES(T, 16, 4, 1, 4),
                                  {"auto", scan_forward<T>, 0}};
    if constexpr (sizeof(T) == 2) {
        rungs.push_back(Rung<T> RELAY(T, 4, 2, 1, 3));
        rungs.push_back(Rung<T> TILES(T, 16, 4, 2, 3));
        rungs.push_back(Rung<T> RELAY(T, 4, 1, 4, 3));
    }
    return rungs;
}
template <typename T> std::vector<Rung<T>> check_rungs() {
    std::vector<Rung<T>> rungs = {
        {"auto", scan_forward<T>, 0}, TILES(T, 16, 4, 1, 4), WALK(T, 4, 2, 4, 4),
        WALK(T, 4, 4, 4, 4),          WALK(T, 4, 8, 2, 4),   WALK(T, 8, 8, 2, 2),
        RELAY(T, 4, 1, 4, 4),         RELAY(T, 4, 1, 4, 3),  RELAY(T, 2, 1, 4, 4)};
    if constexpr (sizeof(T) == 2) {
        rungs.push_back(Rung<T> RELAY(T, 4, 2, 1, 3));
        rungs.push_back(Rung<T> TILES(T, 16, 4, 2, 3));
    }
    return rungs;
}
template <typename T> std::vector<Rung<T>> step_rungs() {
    return {STEP(T, 1, 4),
            STEP(T, 4, 1),
            STEP(T, 4, 2),
            STEP(T, 4, 4),
            {"auto", scan_step_forward<T>, 0}};
}
static const Shape shapes[] = {
    {8, 2048, 4096, 16, 1},    {8, 1536, 2048, 16, 1},  {64, 1536, 512, 16, 1},
    {1, 1536, 2048, 16, 1},    {1, 1536, 16384, 16, 1}, {1, 1536, 131072, 16, 1},
    {1, 1536, 1048576, 16, 1}, {1, 5120, 32768, 16, 1}, {1, 5120, 2048, 16, 1},
    {8, 2048, 4096, 16, 0},    {2, 1536, 2048, 16, 1},  {4, 1536, 2048, 16, 1},
    {6, 1536, 2048, 16, 1},    {8, 2048, 2048, 8, 1},   {8, 2048, 2048, 16, 1},
    {8, 2048, 2048, 32, 1},    {8, 2048, 2048, 64, 1},  {8, 1530, 2048, 16, 1},
    {5, 1536, 2048, 16, 1},    {3, 4096, 2048, 16, 1},  {4, 5120, 2048, 16, 1},
    {2, 5120, 2048, 16, 1},    {8, 2560, 2048, 16, 1},  {8, 100, 2048, 16, 1},
    {64, 1536, 32, 16, 1},     {64, 1536, 128, 16, 1},  {1, 1536, 64, 16, 1},
    {1, 1536, 256, 16, 1},     {1, 1536, 2048, 64, 1}};

template <typename T> void sweep_odd(const char *type, std::vector<Rung<T>> rungs, bool mini) {
    const int Es[] = {1, 31, 33, 100, 1536}, Ls[] = {1, 2, 31, 33, 63, 65, 1000, 2049},
              Ns[] = {1, 4, 8, 16, 17, 32, 64};
    for (Rung<T> r : rungs) {
        int k = 0, passed = 0, failed = 0;
        double worst = 0;
        for (int E : Es)
            for (int L : Ls)
                for (int N : Ns) {
                    k++;
                    if (r.N && r.N != N) continue;
                    if (mini && (E > 33 || L > 65 || L == 31 || L == 2 || N > 17)) continue;
                    if (E == 1536 && L == 2049 && N != 16 && N != 17) continue;
                    bool odd =
                        k % 2 && r.name.find("C2") ==
                                     std::string::npos; // two channels a lane: where they can be
                    Case<T> c(1 + k % 3, L, E, N, k / 2 % 2, k / 3 % 2, odd);
                    if (k % 4 == 0) c.near_wrap();
                    for (int again = 0; again < 2;
                         again++) { // twice: the second must not take the first's mail
                        c.poison();
                        CUDA(r.launch(&device, c.p));
                    }
                    bool ok = true;
                    double err = c.error(&ok, c.p);
                    if (ok) passed++;
                    else if (failed++ < 5)
                        printf("FAIL %s %s B %d L %d E %d N %d: %.2g\n", type, r.name.c_str(),
                               c.p.B, L, E, N, err);
                    if (!(err <= worst)) worst = err;
                }
        printf("check %s %-20s %3d passed %d failed, worst %.2g\n", type, r.name.c_str(), passed,
               failed, worst);
    }
    fflush(stdout);
}

template <typename T> void ladder(Shape s, std::vector<Rung<T>> rungs, std::string only) {
    Case<T> c(s.B, s.L, s.E, s.N, true, false, false);
    double bytes = (double)s.B * s.L * (4. * s.E + 2 * s.N) * sizeof(T);
    bool long_ = s.L > 200000;
    struct CopyArg {
        void *to, *from;
        size_t n;
    } copy = {c.p.out, (void *)c.p.u, (size_t)(bytes / 2)};
    // the copy moves the same bytes: half read, half written (from the pool's start, over inputs;
    // so it comes last)
    std::vector<std::pair<float, std::string>> rows;
    for (Rung<T> &r : rungs) {
        if ((r.N && r.N != s.N) || r.name.substr(0, only.size()) != only) continue;
        if (s.L > 20000 && r.name.substr(0, 5) != "tiles" && r.name != "auto") continue;
        c.poison();
        CUDA(r.launch(&device, c.p));
        bool ok = true;
        double err = long_ ? 0 : c.error(&ok, c.p);
        Call<T> k = {r.launch, &c.p};
        float first = time_us(1, 1, call<T>, &k);
        float us = time_us(first > 20000 ? 5 : first > 3000 ? 11 : 21, 1, call<T>, &k);
        char text[128];
        snprintf(text, sizeof text, "%-20s %9.1f us %6.2f Texp/s err %.1e %s", r.name.c_str(), us,
                 (double)s.B * s.E * s.L * s.N / us * 1e-6, err, ok ? "" : "WRONG");
        rows.push_back({us, text});
    }
    copy.from = pool, copy.to = pool + (size_t)(bytes / 2 + 255) / 256 * 256;
    float us = time_us(
        21, 1,
        [](void *a) {
            CopyArg *x = (CopyArg *)a;
            CUDA(cudaMemcpyAsync(x->to, x->from, x->n, cudaMemcpyDeviceToDevice));
        },
        &copy);
    std::sort(rows.begin(), rows.end());
    printf("== %s B %d E %d L %d N %d: copy of the same %.0f MB %.1f us (%.2f TB/s)\n",
           s.bf ? "bf16" : "f32", s.B, s.E, s.L, s.N, bytes * 1e-6, us, bytes / us * 1e-6);
    for (auto &r : rows) printf("  %s\n", r.second.c_str());
    fflush(stdout);
}

template <typename T> void steps(const char *type, std::vector<Rung<T>> rungs) {
    for (int E : {33, 1536, 5120})
        for (int B : {1, 8, 64, 256}) {
            Case<T> c(B, 1, E, 16, true, false, false);
            ScanArgs<T> q = c.p, in_place = c.p;
            float *state = take<float>(c.state_count);
            CUDA(cudaMemcpy(state, c.p.h0, c.state_count * 4, cudaMemcpyDeviceToDevice));
            in_place.h0 = in_place.h_final = state, q.h_final = state;
            double bytes = c.state_count * 8. + B * (4. * E + 32) * sizeof(T);
            struct CopyArg {
                void *to, *from;
                size_t n;
            } copy = {c.p.h_final, state, c.state_count * 4};
            float copy_us = time_us(
                21, 20,
                [](void *a) {
                    CopyArg *x = (CopyArg *)a;
                    CUDA(cudaMemcpyAsync(x->to, x->from, x->n, cudaMemcpyDeviceToDevice));
                },
                &copy);
            printf("step %s B %3d E %4d N 16: copy of the state %.2f us %.2f TB/s", type, B, E,
                   copy_us, c.state_count * 8. / copy_us * 1e-6);
            for (Rung<T> &r : rungs) {
                if (r.name[0] == '4' && E % 4) continue; // 16-byte accesses
                CUDA(cudaMemcpy(state, c.p.h0, c.state_count * 4, cudaMemcpyDeviceToDevice));
                CUDA(cudaMemset(c.p.out, 0xff, c.out_count * sizeof(T)));
                CUDA(r.launch(&device, in_place));
                bool ok = true;
                double err = c.error(&ok, q);
                Call<T> k = {r.launch, &in_place};
                float us = time_us(21, 20, call<T>, &k);
                printf(" | %s %.2f us %.2f TB/s%s", r.name.c_str(), us, bytes / us * 1e-6,
                       ok ? "" : " WRONG");
                if (!ok) printf(" %.2g", err);
            }
            printf("\n");
        }
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (device_open(&device)) return printf("%s\n", gpu_error()), 1;
    device.stream = 0;
    pool_bytes = (size_t)30 << 30;
    CUDA(cudaMalloc(&pool, pool_bytes));
    cudaDeviceProp prop;
    CUDA(cudaGetDeviceProperties(&prop, 0));
    printf("%s, %d SMs, L2 %d MB\n", prop.name, prop.multiProcessorCount, prop.l2CacheSize >> 20);
    std::string what = argc > 1 ? argv[1] : "", only = argc > 2 ? argv[2] : "";
    if (what == "check" || what == "")
        sweep_odd<float>("f32", check_rungs<float>(), false),
            sweep_odd<bf16>("bf16", check_rungs<bf16>(), false);
    if (what == "mini") sweep_odd<bf16>("bf16", check_rungs<bf16>(), true);
    if (what == "ladder" || what == "")
        for (Shape s : shapes) {
            if (s.bf) ladder<bf16>(s, ladder_rungs<bf16>(), only);
            else ladder<float>(s, ladder_rungs<float>(), only);
        }
    if (what == "prof") {
        Case<bf16> c(8, 1024, 2048, 16, true, false, false);
        for (const Rung<bf16> &r : ladder_rungs<bf16>())
            if (r.name == "walk S4 NS4 u4 m4" || r.name == "relay NS4 C1 u4 m4" ||
                r.name == "relay NS4 C2 u1 m3" || r.name == "tiles K16 W4 C1 m4")
                CUDA(r.launch(&device, c.p));
    }
    if (what == "step" || what == "")
        steps<bf16>("bf16", step_rungs<bf16>()), steps<float>("f32", step_rungs<float>());
    CUDA(cudaDeviceSynchronize());
    return 0;
}
