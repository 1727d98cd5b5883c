// Ladder of the fused scan backward: every variant checked against a float64 reference, then timed.
//   nvcc -O3 -std=c++17 -arch=sm_90 -o /tmp/bench dev/scan_backward.cu -lcublasLt -lcublas &&
//   /tmp/bench check | ladder [all] | one (a single launch, for a profiler)
#include "../mamba_cuda.cu"
#include <algorithm>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#define CHECK(x) \
    do { \
        cudaError_t e_ = (x); \
        if (e_) { \
            printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); \
            exit(1); \
        } \
    } while (0)

static Device device; // with the default stream

static __host__ __device__ uint64_t hash64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull, x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull,
                                x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}
static __host__ __device__ float uniform(uint64_t seed, uint64_t i) {
    return (hash64(seed * 0x51ed2701 + i) >> 40) * (1.f / 16777216);
}
static __host__ __device__ float normal(uint64_t seed, uint64_t i) {
    return sqrtf(-2 * logf(uniform(seed, 2 * i) + 1e-7f)) * cospif(2 * uniform(seed, 2 * i + 1));
}
// kind 0: normal * scale; 1: delta_raw, softplus of it log-uniform in 0.001..0.1
template <typename T>
__global__ void fill(T *x, size_t count, uint64_t seed, int kind, float scale) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        float v =
            kind ? logf(expm1f(0.001f * expf(4.6f * uniform(seed, i)))) : normal(seed, i) * scale;
        x[i] = to<T>(v);
    }
}
__global__ void fill_A(float *A_neg, int N, int E) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N * E) A_neg[i] = -(float)(i / E + 1) * expf(0.3f * normal(99, i));
}

// --- The float64 reference, one thread a chain or a sum, states kept.
struct Ref {
    double *d_delta_raw, *d_u, *d_z, *d_B, *d_C, *d_A_log, *d_D, *d_bias, *d_h0, *h_final, *H, *G,
        *y; // H, G (B,L,N,E)
};
template <typename T> __device__ double ref_delta(const ScanBackArgs<T> &p, size_t r, int e) {
    double x = (double)value(p.delta_raw[r * p.ld_delta + e]) + p.dt_bias[e];
    return fmax(x, 0.) + log1p(exp(-fabs(x)));
}
template <typename T> __global__ void ref_chain(ScanBackArgs<T> p, Ref q, const float *h0) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, states = (size_t)p.N * p.E;
    if (i >= p.B * states) return;
    int b = i / states, n = i % states / p.E, e = i % p.E;
    double A = p.A_neg[n * (size_t)p.E + e], h = h0 ? h0[i] : 0,
           g = p.d_h_final ? p.d_h_final[i] : 0, dA = 0;
    for (int t = 0; t < p.L; t++) {
        size_t r = (size_t)b * p.L + t;
        double d = ref_delta(p, r, e);
        h = exp(d * A) * h + d * value(p.B_ssm[r * p.ld_B + n]) * value(p.u[r * p.ld_u + e]);
        q.H[(r * p.N + n) * p.E + e] = h;
    }
    if (q.h_final) q.h_final[i] = h;
    for (int t = p.L - 1; t >= 0; t--) {
        size_t r = (size_t)b * p.L + t;
        double d = ref_delta(p, r, e), z = value(p.z[r * p.ld_z + e]),
               dy = value(p.d_g[r * p.ld_d_g + e]) * z / (1 + exp(-z));
        g += dy * value(p.C_ssm[r * p.ld_C + n]);
        q.G[(r * p.N + n) * p.E + e] = g;
        g *= exp(d * A);
        dA += g * (t ? q.H[((r - 1) * p.N + n) * p.E + e] : h0 ? h0[i] : 0) * d;
    }
    q.d_h0[i] = g;
    atomicAdd(&q.d_A_log[(size_t)e * p.N + n], dA * A);
}
template <typename T> __global__ void ref_rows(ScanBackArgs<T> p, Ref q, const float *h0) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= (size_t)p.B * p.L * p.E) return;
    size_t r = i / p.E;
    int e = i % p.E;
    double y = 0, sA = 0, sB = 0, d = ref_delta(p, r, e), u = value(p.u[r * p.ld_u + e]),
           z = value(p.z[r * p.ld_z + e]);
    double dg = value(p.d_g[r * p.ld_d_g + e]), s = 1 / (1 + exp(-z)), dy = dg * z * s;
    for (int n = 0; n < p.N; n++) {
        size_t at = (r * p.N + n) * p.E + e;
        double A = p.A_neg[n * (size_t)p.E + e], before = r % p.L ? q.H[at - (size_t)p.N * p.E]
                                                          : h0 ? h0[(r / p.L * p.N + n) * p.E + e]
                                                               : 0;
        y += value(p.C_ssm[r * p.ld_C + n]) * q.H[at];
        sB += q.G[at] * value(p.B_ssm[r * p.ld_B + n]);
        sA += q.G[at] * exp(d * A) * before * A;
    }
    double x = (double)value(p.delta_raw[r * p.ld_delta + e]) + p.dt_bias[e],
           d_raw = (sA + u * sB) / (1 + exp(-x));
    q.d_delta_raw[i] = d_raw, q.d_u[i] = d * sB + p.D_skip[e] * dy;
    q.d_z[i] = dg * (y + p.D_skip[e] * u) * s * (1 + z * (1 - s));
    q.y[i] = (y + p.D_skip[e] * u) * z * s;
    atomicAdd(&q.d_bias[e], d_raw), atomicAdd(&q.d_D[e], dy * u);
}
template <typename T> __global__ void ref_BC(ScanBackArgs<T> p, Ref q) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= (size_t)p.B * p.L * p.N) return;
    size_t r = i / p.N;
    double dB = 0, dC = 0;
    for (int e = 0; e < p.E; e++) {
        double z = value(p.z[r * p.ld_z + e]),
               dy = value(p.d_g[r * p.ld_d_g + e]) * z / (1 + exp(-z));
        dB += q.G[i * p.E + e] * ref_delta(p, r, e) * value(p.u[r * p.ld_u + e]);
        dC += dy * q.H[i * p.E + e];
    }
    q.d_B[i] = dB, q.d_C[i] = dC;
}
// Saved states, by a float walk.
template <typename T>
__global__ void make_starts(ScanBackArgs<T> p, float *starts, const float *h0) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, states = (size_t)p.N * p.E;
    if (i >= p.B * states) return;
    int b = i / states, n = i % states / p.E, e = i % p.E,
        saves = (p.L + SCAN_SAVE - 1) / SCAN_SAVE;
    float A2 = LOG2E * p.A_neg[n * (size_t)p.E + e], h = h0 ? h0[i] : 0;
    for (int t = 0; t < p.L; t++) {
        size_t r = (size_t)b * p.L + t;
        if (t % SCAN_SAVE == 0)
            starts[((size_t)b * saves + t / SCAN_SAVE) * states + i % states] = h;
        float slope, d = softplus(value(p.delta_raw[r * p.ld_delta + e]) + p.dt_bias[e], slope);
        h = fmaf(exp2_fast(d * A2), h,
                 d * value(p.u[r * p.ld_u + e]) * value(p.B_ssm[r * p.ld_B + n]));
    }
}
template <typename T> struct Problem {
    ScanBackArgs<T> p = {};
    float *h0, *starts, *A_log_grad;
    T *outs, *ins;
    size_t out_count, in_count;
    std::vector<void *> owned;
    void *take(size_t bytes) {
        void *x;
        CHECK(cudaMalloc(&x, bytes + 256));
        owned.push_back(x);
        return x;
    }
    // odd: strides are odd and bases misaligned
    Problem(int B, int L, int E, int N, bool odd, bool with_h) {
        size_t rows = (size_t)B * L, o = odd ? 1 : 0;
        p.B = B, p.L = L, p.E = E, p.N = N;
        int Rk = odd ? 3 : 48;
        size_t P = Rk + 2 * N;
        auto in = [&](size_t ld, int kind, float scale, uint64_t seed) {
            T *x = (T *)take((rows * ld + 8) * sizeof(T)) + o;
            fill<<<512, 256>>>(x, rows * ld, seed, kind, scale);
            return (const T *)x;
        };
        p.ld_delta = E + 2 * o, p.ld_u = E + 3 * o, p.ld_z = 2 * E + o, p.ld_d_g = E + o;
        p.delta_raw = in(p.ld_delta, 1, 0, 1), p.u = in(p.ld_u, 0, 1, 2),
        p.z = in(p.ld_z, 0, 1, 3) + E, p.d_g = in(p.ld_d_g, 0, 1, 4);
        p.ld_B = p.ld_C = P;
        p.B_ssm = in(P, 0, 1, 5) + Rk, p.C_ssm = p.B_ssm + N;
        p.ld_d_delta = E + o, p.ld_d_u = E + 2 * o, p.ld_d_z = 2 * E + 3 * o,
        p.ld_d_B = p.ld_d_C = P;
        p.d_delta_raw = (T *)take((rows * p.ld_d_delta + 8) * sizeof(T)) + o,
        p.d_u = (T *)take((rows * p.ld_d_u + 8) * sizeof(T)) + o;
        p.d_z = (T *)take((rows * p.ld_d_z + 8) * sizeof(T)) + E;
        p.d_B_ssm = (T *)take((rows * P + 8) * sizeof(T)) + Rk, p.d_C_ssm = p.d_B_ssm + N;
        auto floats = [&](size_t count, uint64_t seed, float scale) {
            float *x = (float *)take(count * 4);
            fill<<<64, 256>>>(x, count, seed, 0, scale);
            return x;
        };
        p.d_A_log = floats((size_t)E * N, 6, 1), p.d_D_skip = floats(E, 7, 1),
        p.d_dt_bias = floats(E, 8, 1);
        float *A = (float *)take((size_t)N * E * 4);
        fill_A<<<(N * E + 255) / 256, 256>>>(A, N, E);
        p.A_neg = A, p.D_skip = floats(E, 9, 1), p.dt_bias = floats(E, 10, 0.1f);
        size_t states = (size_t)B * N * E;
        h0 = with_h ? floats(states, 11, 1) : NULL;
        p.d_h_final = with_h ? floats(states, 12, 1) : NULL;
        p.d_h0 = with_h ? (float *)take(states * 4) : NULL;
        p.h_starts = starts = (float *)take(states * ((L + SCAN_SAVE - 1) / SCAN_SAVE) * 4);
        make_starts<<<(unsigned)((states + 127) / 128), 128>>>(p, starts, h0);
        CHECK(cudaDeviceSynchronize());
    }
    ~Problem() {
        for (void *x : owned) cudaFree(x);
    }
    void poison() {
        size_t rows = (size_t)p.B * p.L;
        CHECK(cudaMemset2D(p.d_delta_raw, p.ld_d_delta * sizeof(T), 0xff, p.E * sizeof(T), rows));
        CHECK(cudaMemset2D(p.d_u, p.ld_d_u * sizeof(T), 0xff, p.E * sizeof(T), rows));
        CHECK(cudaMemset2D(p.d_z, p.ld_d_z * sizeof(T), 0xff, p.E * sizeof(T), rows));
        CHECK(cudaMemset2D(p.d_B_ssm, p.ld_d_B * sizeof(T), 0xff, 2 * p.N * sizeof(T), rows));
        if (p.d_h0) CHECK(cudaMemset(p.d_h0, 0xff, (size_t)p.B * p.N * p.E * 4));
        fill<<<64, 256>>>(p.d_A_log, (size_t)p.E * p.N, 6, 0, 1.f);
        fill<<<64, 256>>>(p.d_D_skip, p.E, 7, 0, 1.f);
        fill<<<64, 256>>>(p.d_dt_bias, p.E, 8, 0, 1.f);
    }
    // All outputs, as doubles.
    std::vector<std::vector<double>> outputs() {
        std::vector<std::vector<double>> all;
        auto take_T = [&](const T *x, size_t ld, int cols) {
            size_t rows = (size_t)p.B * p.L;
            std::vector<T> raw(rows * cols);
            CHECK(cudaMemcpy2D(raw.data(), cols * sizeof(T), x, ld * sizeof(T), cols * sizeof(T),
                               rows, cudaMemcpyDeviceToHost));
            std::vector<double> d(raw.size());
            for (size_t i = 0; i < d.size(); i++) d[i] = (float)raw[i];
            all.push_back(d);
        };
        auto take_f = [&](const float *x, size_t count, uint64_t seed) {
            std::vector<float> raw(count);
            CHECK(cudaMemcpy(raw.data(), x, count * 4, cudaMemcpyDeviceToHost));
            all.emplace_back(count);
            for (size_t i = 0; i < count; i++)
                all.back()[i] = seed ? raw[i] - normal(seed, i) : raw[i];
        };
        take_T(p.d_delta_raw, p.ld_d_delta, p.E), take_T(p.d_u, p.ld_d_u, p.E),
            take_T(p.d_z, p.ld_d_z, p.E);
        take_T(p.d_B_ssm, p.ld_d_B, p.N), take_T(p.d_C_ssm, p.ld_d_C, p.N);
        take_f(p.d_A_log, (size_t)p.E * p.N, 6), take_f(p.d_D_skip, p.E, 7),
            take_f(p.d_dt_bias, p.E, 8);
        if (p.d_h0) take_f(p.d_h0, (size_t)p.B * p.N * p.E, 0);
        return all;
    }
    std::vector<std::vector<double>> reference(double *loss = NULL) {
        size_t rE = (size_t)p.B * p.L * p.E, rN = (size_t)p.B * p.L * p.N, EN = (size_t)p.E * p.N,
               st = p.B * EN, E = p.E;
        size_t sizes[] = {rE, rE, rE, rN, rN, EN, E, E, st, st, rN * E, rN * E, rE};
        Ref q;
        double **at = (double **)&q;
        for (int i = 0; i < 13; i++) {
            CHECK(cudaMalloc((void **)&at[i], sizes[i] * 8));
            CHECK(cudaMemset(at[i], 0, sizes[i] * 8));
        }
        ref_chain<<<(unsigned)((st + 127) / 128), 128>>>(p, q, h0);
        ref_rows<<<(unsigned)((rE + 127) / 128), 128>>>(p, q, h0);
        ref_BC<<<(unsigned)((rN + 127) / 128), 128>>>(p, q);
        CHECK(cudaDeviceSynchronize());
        std::vector<std::vector<double>> all;
        for (int i = 0; i < 13; i++) {
            if (i < (p.d_h0 ? 9 : 8)) {
                all.emplace_back(sizes[i]);
                CHECK(cudaMemcpy(all.back().data(), at[i], sizes[i] * 8, cudaMemcpyDeviceToHost));
            }
        }
        if (loss) { // sum of d_g g + d_h_final h_final
            std::vector<double> g(rE), hf(st);
            std::vector<T> dg(rE);
            std::vector<float> dhf(st);
            CHECK(cudaMemcpy(g.data(), q.y, rE * 8, cudaMemcpyDeviceToHost));
            CHECK(cudaMemcpy(hf.data(), q.h_final, st * 8, cudaMemcpyDeviceToHost));
            CHECK(cudaMemcpy2D(dg.data(), E * sizeof(T), p.d_g, p.ld_d_g * sizeof(T), E * sizeof(T),
                               (size_t)p.B * p.L, cudaMemcpyDeviceToHost));
            CHECK(cudaMemcpy(dhf.data(), p.d_h_final, st * 4, cudaMemcpyDeviceToHost));
            *loss = 0;
            for (size_t i = 0; i < rE; i++) *loss += g[i] * (float)dg[i];
            for (size_t i = 0; i < st; i++) *loss += hf[i] * dhf[i];
        }
        for (int i = 0; i < 13; i++) cudaFree(at[i]);
        return all;
    }
};
static const char *out_names[] = {"d_delta_raw", "d_u", "d_z",    "d_B", "d_C",
                                  "d_A_log",     "d_D", "d_bias", "d_h0"};

// The reference against central differences: each input element is a float, moved by about 2^-9,
// the outputs in float64.
static int check_reference() {
    const int B = 2, L = 5, E = 3, N = 4;
    Problem<float> q(B, L, E, N, false, true);
    auto ref = q.reference();
    double worst = 0;
    auto probe = [&](float *x, size_t index, double want) {
        float v, s = 0x1p-9f;
        double up, down;
        CHECK(cudaMemcpy(&v, x + index, 4, cudaMemcpyDeviceToHost));
        float plus = v + s, minus = v - s;
        CHECK(cudaMemcpy(x + index, &plus, 4, cudaMemcpyHostToDevice));
        q.reference(&up);
        CHECK(cudaMemcpy(x + index, &minus, 4, cudaMemcpyHostToDevice));
        q.reference(&down);
        CHECK(cudaMemcpy(x + index, &v, 4, cudaMemcpyHostToDevice));
        double got = (up - down) / ((double)plus - minus);
        worst = fmax(worst, fabs(got - want) / (1e-2 + fabs(want)));
        if (!(fabs(got - want) <= 1e-4 * (0.1 + fabs(want))))
            printf("  difference %g reference %g\n", got, want);
    };
    for (int i = 0; i < B * L * E; i += 4) {
        int r = i / E, e = i % E;
        probe((float *)q.p.delta_raw, r * q.p.ld_delta + e, ref[0][i]);
        probe((float *)q.p.u, r * q.p.ld_u + e, ref[1][i]);
        probe((float *)q.p.z, r * q.p.ld_z + e, ref[2][i]);
    }
    for (int i = 0; i < B * L * N; i += 5) {
        probe((float *)q.p.B_ssm, i / N * q.p.ld_B + i % N, ref[3][i]);
        probe((float *)q.p.C_ssm, i / N * q.p.ld_C + i % N, ref[4][i]);
    }
    for (int i = 0; i < E * N; i += 2) { // d_A_log = d_A_neg A_neg
        int e = i / N, n = i % N;
        float A;
        CHECK(cudaMemcpy(&A, q.p.A_neg + n * E + e, 4, cudaMemcpyDeviceToHost));
        probe((float *)q.p.A_neg, n * E + e, ref[5][i] / A);
    }
    for (int e = 0; e < E; e++)
        probe((float *)q.p.D_skip, e, ref[6][e]), probe((float *)q.p.dt_bias, e, ref[7][e]);
    for (int i = 0; i < B * N * E; i += 3) probe(q.h0, i, ref[8][i]);
    printf("reference against central differences: worst %.2g %s\n", worst,
           worst < 1e-4 ? "ok" : "FAIL");
    return worst < 1e-4 ? 0 : 1;
}

// What is checked and timed: C channels a lane, MINB blocks a multiprocessor, so many segments of
// time at the most. C = 0: the form and the segments that scan_backward() chooses.
template <int C_, int MINB_> struct Form {
    static constexpr int C = C_, MINB = MINB_;
};
typedef Form<0, 0> Chosen;
typedef Form<1, 4> One;
typedef Form<1, 3> One3; // more registers, fewer blocks
typedef Form<2, 2> Two;  // copies rows
template <typename T, class F> static size_t workspace_of(const ScanBackArgs<T> &p, int segments) {
    return F::C ? scan_back_plan(p.B, p.L, p.E, p.N, F::C, segments).bytes
                : scan_backward_workspace(p.B, p.L, p.E, p.N);
}
// Of a form that is named, up to 16 states.
template <typename T, class F> static cudaError_t launch(const ScanBackArgs<T> &p, int segments) {
    if constexpr (F::C == 0) return scan_backward(&device, p);
    else
        return p.N > 16 ? cudaErrorInvalidValue
               : p.N > 8 || F::C == 2
                   ? scan_back_launch<T, 4, 4, F::C, false, F::MINB>(&device, p, segments)
                   : scan_back_launch<T, 4, 2, 1, false, F::MINB>(&device, p, segments);
}
template <typename T, class F> static void name_of(char *name, int segments) {
    if (F::C == 0) snprintf(name, 60, "%s chosen", sizeof(T) == 4 ? "f32 " : "bf16");
    else
        snprintf(name, 60, "%s C%d M%d segments %d", sizeof(T) == 4 ? "f32 " : "bf16", F::C,
                 F::MINB, segments);
}

// The plain form against float64, once a type and shape: sums by atomics, so not to the bit.
template <typename T> static std::vector<std::vector<double>> run_plain(Problem<T> &x) {
    const size_t rows_N = (size_t)x.p.B * x.p.L * x.p.N, states = (size_t)x.p.B * x.p.N * x.p.E;
    float *sums;
    CHECK(cudaMalloc(&sums, (2 * rows_N + states) * 4));
    CHECK(cudaMemset(sums, 0, (2 * rows_N + states) * 4));
    x.poison();
    ScanBackArgs<T> p = x.p;
    if (!p.d_h0) p.d_h0 = sums + 2 * rows_N;
    scan_plain_back<<<dim3(p.B, (p.E + 31) / 32), 32>>>(p, sums, sums + rows_N);
    CHECK(cudaDeviceSynchronize());
    auto all = x.outputs();
    std::vector<float> raw(2 * rows_N);
    CHECK(cudaMemcpy(raw.data(), sums, 2 * rows_N * 4, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < 2 * rows_N; i++) all[3 + i / rows_N][i % rows_N] = raw[i];
    cudaFree(sums);
    return all;
}

// How many outputs are wrong. again: those of a second run, or NULL.
static int compare(const std::vector<std::vector<double>> &want,
                   const std::vector<std::vector<double>> &got,
                   const std::vector<std::vector<double>> *again, bool is_float, const char *name,
                   const char *shape, bool loud) {
    int bad = 0;
    double tol = is_float ? 1e-5 : 1e-2;
    char line[512] = "";
    for (size_t o = 0; o < want.size(); o++) {
        double num = 0, den = 0;
        for (size_t i = 0; i < want[o].size(); i++)
            num += (got[o][i] - want[o][i]) * (got[o][i] - want[o][i]),
                den += want[o][i] * want[o][i];
        double err = sqrt(num) / (sqrt(den) + 1e-30);
        // float outputs that were added to a random start keep only its rounding
        if (o >= 5 && o < 8)
            err =
                sqrt(num) / (sqrt(den) + 1e-2 * sqrt((double)want[o].size()) * (is_float ? 10 : 1));
        bool same = !again || !memcmp(got[o].data(), (*again)[o].data(), got[o].size() * 8);
        if (!(err <= tol) || !same)
            bad++, snprintf(line + strlen(line), sizeof line - strlen(line), " %s=%.2g%s!",
                            out_names[o], err, same ? "" : " bits");
        else if (loud)
            snprintf(line + strlen(line), sizeof line - strlen(line), " %s=%.1e", out_names[o],
                     err);
    }
    if (bad || loud) printf("%s %s %s:%s\n", bad ? "FAIL" : "ok", name, shape, line);
    return bad;
}

template <typename T, class F>
static int check_one(int B, int L, int E, int N, bool odd, bool with_h, int segments, bool loud) {
    Problem<T> x(B, L, E, N, odd, with_h);
    const size_t bytes = workspace_of<T, F>(x.p, segments);
    CHECK(cudaMalloc(&x.p.workspace, bytes));
    auto want = x.reference();
    std::vector<std::vector<double>> got, again;
    for (int run = 0; run < 2; run++) {
        CHECK(cudaMemset(x.p.workspace, 0xff, bytes));
        x.poison();
        CHECK((launch<T, F>(x.p, segments)));
        CHECK(cudaDeviceSynchronize());
        (run ? again : got) = x.outputs();
    }
    cudaFree(x.p.workspace);
    char name[60], shape[80];
    name_of<T, F>(name, segments);
    snprintf(shape, sizeof shape, "B%d L%d E%d N%d odd%d h%d", B, L, E, N, odd, with_h);
    int bad = compare(want, got, &again, sizeof(T) == 4, name, shape, loud);
    if (F::C == 0) bad += compare(want, run_plain(x), NULL, sizeof(T) == 4, "plain", shape, loud);
    return bad;
}
// aligned: of a form that copies rows, 16 bytes at a time.
template <typename T, class F> static void check_all() {
    const bool aligned = F::C == 2, any_N = F::C == 0;
    const int Ls[] = {1, 2, 31, 33, 63, 65, 200, 1000},
              Es[2][5] = {{1, 31, 33, 100, 130}, {8, 40, 64, 104, 136}},
              Ns[2][7] = {{1, 4, 8, 16, 17, 32, 64}, {1, 4, 8, 16, 7, 12, 15}};
    int bad = 0, count = 0;
    auto check = [&](int B, int L, int E, int N, bool odd, bool h, int segments, bool loud) {
        bad += check_one<T, F>(B, L, E, N, odd, h, segments, loud), count++;
    };
    check(2, 300, 200, 16, false, true, 1, true);
    for (int i = 0; i < 24; i++)
        check(1 + i % 3, Ls[i % 8], Es[aligned][i % 5], Ns[!any_N][i % 7], !aligned && i % 2,
              i / 2 % 2, 1 + i % 4, false);
    check(3, 1000, 1536, 16, false, true, 1, true), check(1, 2049, 64, 16, false, true, 11, false);
    check(2, 70, 1536, 16, false, false, 2, false);
    if (any_N)
        check(1, 130, 40, 256, true, true, 3, false), check(1, 66, 33, 100, true, true, 1, false);
    char name[60];
    name_of<T, F>(name, 0);
    printf("check %s: %d cases, %d wrong outputs\n", name, count, bad);
    fflush(stdout);
}

template <class F> static double median_ms(F f, int reps) {
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    std::vector<float> ms(reps);
    f(), f();
    for (int i = 0; i < reps; i++) {
        CHECK(cudaEventRecord(a));
        f();
        CHECK(cudaEventRecord(b));
        CHECK(cudaEventSynchronize(b));
        CHECK(cudaEventElapsedTime(&ms[i], a, b));
    }
    std::sort(ms.begin(), ms.end());
    cudaEventDestroy(a), cudaEventDestroy(b);
    return ms[reps / 2];
}
template <typename T, class F> static void time_one(Problem<T> &x, int segments) {
    const size_t bytes = workspace_of<T, F>(x.p, segments);
    CHECK(cudaMalloc(&x.p.workspace, bytes));
    x.poison();
    double all = median_ms([&] { CHECK((launch<T, F>(x.p, segments))); }, 21);
    double states = (double)x.p.B * x.p.L * x.p.E * x.p.N;
    char name[60];
    name_of<T, F>(name, segments);
    printf("%d,%d,%d N%d %s: %.3f ms, %.2f ps a state and step, workspace %.0f MB\n", x.p.B, x.p.E,
           x.p.L, x.p.N, name, all, all * 1e9 / states, bytes * 1e-6);
    fflush(stdout);
    cudaFree(x.p.workspace);
}
template <typename T> static void same_bits(Problem<T> &x) {
    const size_t rows = (size_t)x.p.B * x.p.L;
    CHECK(cudaMalloc(&x.p.workspace, workspace_of<T, Chosen>(x.p, 0)));
    std::vector<char> first, again;
    for (int run = 0; run < 6; run++) {
        x.poison();
        CHECK((launch<T, Chosen>(x.p, 0)));
        again.clear();
        auto add = [&](const void *p, size_t bytes) {
            again.resize(again.size() + bytes);
            CHECK(
                cudaMemcpy(again.data() + again.size() - bytes, p, bytes, cudaMemcpyDeviceToHost));
        };
        add(x.p.d_B_ssm, (rows * x.p.ld_d_B - 64) * sizeof(T)),
            add(x.p.d_delta_raw, rows * x.p.ld_d_delta * sizeof(T) / 4);
        add(x.p.d_A_log, (size_t)x.p.E * x.p.N * 4), add(x.p.d_dt_bias, x.p.E * 4),
            add(x.p.d_D_skip, x.p.E * 4);
        add(x.p.d_h0, (size_t)x.p.B * x.p.N * x.p.E * 4);
        if (!run) first = again;
        else if (memcmp(first.data(), again.data(), first.size()))
            printf("FAIL: other bits in run %d\n", run);
    }
    cudaFree(x.p.workspace);
    printf("six runs of %d,%d,%d compared bit by bit\n", x.p.B, x.p.E, x.p.L);
}
template <typename T> static void time_plain(Problem<T> &x) {
    float *sums;
    CHECK(cudaMalloc(&sums, (size_t)x.p.B * x.p.L * 2 * x.p.N * 4));
    double ms = median_ms(
        [&] {
            scan_plain_back<<<dim3(x.p.B, (x.p.E + 31) / 32), 32>>>(
                x.p, sums, sums + (size_t)x.p.B * x.p.L * x.p.N);
        },
        1);
    CHECK(cudaDeviceSynchronize());
    printf("plain: %.3f ms\n", ms);
    fflush(stdout);
    cudaFree(sums);
}
template <typename T> static void time_copy(double bytes) {
    char *a, *b;
    size_t n = (size_t)bytes / 2;
    CHECK(cudaMalloc((void **)&a, n));
    CHECK(cudaMalloc((void **)&b, n));
    CHECK(cudaMemset(a, 1, n));
    double ms = median_ms([&] { cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice); }, 21);
    printf("copy of the same bytes (%.0f MB read and written together): %.3f ms, %.2f TB/s\n",
           bytes * 1e-6, ms, bytes / ms * 1e-9);
    cudaFree(a), cudaFree(b);
}
int main(int argc, char **argv) {
    if (device_open(&device)) return printf("%s\n", gpu_error()), 1;
    device.stream = 0;
    const char *what = argc > 1 ? argv[1] : "check";
    if (!strcmp(what, "check")) {
        check_reference();
        check_all<float, Chosen>(), check_all<bf16, Chosen>();
        check_all<float, One>(), check_all<bf16, One>(), check_all<bf16, One3>();
        check_all<bf16, Two>();
    }
    if (!strcmp(what, "ladder")) {
        const struct {
            int B, E, L, N;
        } shapes[] = {{8, 2048, 4096, 16}, {8, 1536, 2048, 16},   {1, 1536, 16384, 16},
                      {64, 1536, 512, 16}, {1, 1536, 131072, 16}, {1, 5120, 32768, 16},
                      {1, 1536, 2048, 16}, {8, 1536, 2048, 8},    {8, 1536, 2048, 32},
                      {8, 1536, 2048, 64}};
        for (auto &s : shapes) {
            Problem<bf16> x(s.B, s.L, s.E, s.N, false, true);
            time_one<bf16, Chosen>(x, 0);
            if (s.N > 16) continue;
            for (int segments : {1, 2, 4, 11}) {
                const int blocks = (s.E + 31) / 32 * s.B;
                if (segments > 1 ? blocks * (segments - 1) > 1000 : blocks < 100) continue;
                time_one<bf16, One>(x, segments), time_one<bf16, One3>(x, segments);
                time_one<bf16, Two>(x, segments);
            }
            if (s.L == 4096) same_bits(x);
            if (s.L == 4096 && argc > 2)
                time_plain(x), time_copy<bf16>(8. * 2048 * 4096 * 14 + 2 * 8. * 2048 * 4096 * 2);
        }
        {
            Problem<float> x(8, 4096, 2048, 16, false, true);
            time_one<float, Chosen>(x, 0), time_one<float, One>(x, 1), time_one<float, One3>(x, 1);
        }
        for (int E : {1535, 1100}) {
            Problem<bf16> x(8, 2048, E, 16, true, true);
            time_one<bf16, Chosen>(x, 0);
        }
    }
    if (!strcmp(what, "one")) {
        Problem<bf16> x(8, 4096, 2048, 16, false, true);
        CHECK(cudaMalloc(&x.p.workspace, workspace_of<bf16, Chosen>(x.p, 0)));
        launch<bf16, Chosen>(x.p, 0);
        CHECK(cudaDeviceSynchronize());
    }
    return 0;
}
