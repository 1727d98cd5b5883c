// clang-format off
/* mamba_cuda.cu - the GPU backend of mamba.c, chosen at build time by `make cuda`.

   What it is: the same model, the same files and the same steps as mamba.c, on the device. cuBLAS
   computes the matrix products; the scan, which no library has, is what this file is about.
   What it is not: a second definition. mamba.c says what is computed. scan_plain is its
   recurrence() in the simplest way for a GPU. Names are those of mamba.c's glossary.

   A LANE IS A CHANNEL (or 2 or 4 neighbours). The paper's kernel gives one channel of one sequence
   to a block, whose threads stand along time: each computes a few steps, and a parallel scan
   joins their pairs, (a1,b1) then (a2,b2) = (a1 a2, a2 b1 + b2), for every state. Here a lane is a
   channel, and time runs in its registers: the recurrence is the plain loop, one multiply-add a
   step, no pair is joined across lanes, and 32 channels share each B_ssm and C_ssm that is loaded.
   The price is parallelism: it takes many channels to fill a GPU. Where there are few, scan_tiles
   gives 16 steps to a warp and 64 to a block; warps join their pairs, blocks hand the state on. A
   tile is a stretch of time: 16 steps in scan_walk, 32 in scan_relay, 64 in the other two.

   WHERE h GOES, in each form of the scan. An arrow is a load or a store; x2: two buffers, of this
   tile and of its neighbour. The states of all times, (B,L,N,E), never exist in any of them.
     device memory                  shared memory                    registers of a lane
   ---------------------------------------------------------------------------------------------
   scan_plain: the definition. A thread is a channel; one step after the other.
     delta, u, z, B_ssm, C_ssm  ------------------------------->     decay, inject, y
     h (N)  <-------------------------------------------------->     one state at a time
   ---------------------------------------------------------------------------------------------
   scan_step: one token. The warps of a block share the states of 32 or 128 channels.
     delta, u, B_ssm, C_ssm  ---------------------------------->     decay, inject
     h (N)  <-------------------------------------------------->     N / warps states
     g  <-----------------------    y of each warp  <-----------     y
   ---------------------------------------------------------------------------------------------
   scan_walk: short texts, or many states. A block is 32 channels and walks through time in tiles
   of 16 steps; its S warps share the states. h stays in registers from the first step to the last.
     delta_raw, u  ------------>    delta, delta*u (32,16) x2   ->   4 steps at a time
     B_ssm, C_ssm  ------------>    B, C (N,16) x2  ------------>    4 steps at a time
     h0, h_final, h_starts  <----------------------------------->    h (N/S)
     g  <----  z, gate  <-------    y of each warp (S,32,16) x2  <-  y of 4 steps
   ---------------------------------------------------------------------------------------------
   scan_relay: many channels, N = 8 or 16. A block is 32 or 64 channels; its 4 warps take turns of
   8 steps. A warp does all states of its turn, a quarter at a time, then hands the quarter to the
   next warp: h goes through shared memory between turns.
     delta_raw, u, z  ------------------------------------------>    delta, delta u, y of 8 steps
     B_ssm, C_ssm  ------------>    B, C (N,8) of each warp  --->    4 steps at a time
                                    A_neg (N)  ----------------->    a quarter
     h0  ---------------------->    h (N) of warp w - 1  ------->    h (N/4)
     h_starts  <-------------------------------------------------    h at every 64th step
     h_final  <-----------------    h (N) of warp w  <-----------    h after 8 steps
     g  <--------------------------------------------------------    gate of 8 steps
   ---------------------------------------------------------------------------------------------
   scan_tiles: few channels, or any other N. A block is 32 or 64 channels and one tile of 64 steps,
   a warp 16 of them. For each state, a warp runs its 16 steps from h = 0, joins the results of the
   warps before it to get its true h, and runs the steps again. The true h passes from tile to tile
   through a mailbox in device memory. Tiles take numbers as their blocks start, so a tile waits
   only for one that already runs (exchange.cuh).
     delta_raw, u  --------------------------------------------->    delta, delta u, y of 16 steps
     B_ssm, C_ssm, A_neg  ----->    16 states of a tile  ------->    one state at a time
                                    (decay of 16, end)   <------     16 decays, kept for run two
     h0, mail of tile i - 1  -->    h before the tile  --------->    h before the warp
     mailbox of tile i  <----------------------------------------    h after the last warp
     h_starts, h_final  <----------------------------------------    h at every 64th step
     z  ----------------------->    z  ------------------------->    gate
     g  <--------------------------------------------------------    y
   ---------------------------------------------------------------------------------------------
   scan_back: the backward. A block is 32 channels and one tile of 64 steps, a warp 8 of them. h is
   computed again from the state that the forward saved every 64 steps; d_h comes from the tile
   after it in time through a mailbox in device memory, so later tiles run first.
     delta_raw, u, z, d_g  ------------------------------------->    delta, delta u, d_y of 8 steps
     B_ssm, C_ssm, A_neg  ----->    16 states of a tile  ------->    one state at a time
                                    ends of h and d_h  <---------    from h = 0 and d_h = 0
     h_starts, mail of i + 1 -->    starts of h and d_h  ------->    8 h, d_h
     mail of tile i  <-----------------------------------------      d_h before the tile
     d_delta, d_u, d_z  <----------------------------------------    sums over states
     parts of d_B, d_C  <----------------------------------------    sums over lanes (tensor cores)
     parts of d_A, d_D, d_bias <-   d_A of each warp  <----------    sums over steps
   ---------------------------------------------------------------------------------------------

   PRECISION. T is the type of matrices and of activations between kernels: float, bf16, or, where
   a file has such weights, f16. The residual stream, h, delta after softplus, A, every sum and the
   loss are float32 in all, and so are the trainer's weights and moments. An activation beyond
   65,504 is infinite in f16, and the logits are then no numbers, which ends a text with an error.

   CONTENTS. This file:                            What it includes from cuda/, where it is needed:
     1 the scan: arguments, arithmetic, definition   device.cuh      errors, memory, launches, sums
     2 the scan of one token                         exchange.cuh    how blocks tell each other
     3 the scan of a text, and which form runs       scan_relay.cuh, scan_tiles.cuh
     4 [train] the scan's backward
     5 the model: weights, block                     layers.cuh      embedding, norm, conv, loss
                                                     conv_back.cuh   backward of conv and x_proj
                                                     products.cuh    matrix products
                                                     step_portable.cuh    a token on any GPU
     6 the model on the device, its state, prefill
     7 generation: a step, its graph; texts          sampling.cuh    the next token
                                                     step_one_hopper.cuh  a step of 1 sequence
                                                     step_many_hopper.cuh a step of 2 to 64
     8 what mamba.c calls                            train.cuh       pass and AdamW
                                                     bench.cuh       times, the scan's check    */
// clang-format on

#define MAMBA_TYPES_ONLY
#include "mamba.c"

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

typedef __nv_bfloat16 bf16;
typedef __half f16;

#include "cuda/device.cuh"

// ------------------------------------------------------------------------------------------------
// 1 The scan: arguments, arithmetic, definition
//     delta = softplus(delta_raw + dt_bias)      h_t = exp(delta A_neg) h_{t-1} + delta B_ssm u
//     g = silu(z) (sum over n of C_ssm h_t + D_skip u)
//
// A form reads a row of delta_raw, u and z once and writes a row of g once: 4 elements a token and
// channel, 8 bytes in bf16. B_ssm and C_ssm come once per 32 or 64 channels, mostly from L2. Bytes
// are not the limit. A multiprocessor has special-function units for 16 results a clock, and 16
// decays a token and channel take twice the time of the bytes. So do the instructions around them.
//   - A_neg is scaled by log2(e) once. A decay is one multiplication and one ex2, computed once.
//   - softplus is one ex2 and a polynomial; two gates share one reciprocal. That makes 18.5 special
//     functions a token and channel instead of 20.
//   - The address of a row is one multiply-add (row_at). 64-bit indices and clamps add a third
//     to scan_walk's time (660 us instead of 499).
// With one channel a lane a row's loads are contiguous, so all alignments take one path.

enum { SCAN_SAVE = 64 }; // h_starts holds the state before each step t with t % SCAN_SAVE = 0

template <typename T> struct ScanArgs {
    T *out;                    // (B*L,E)
    float *h_final, *h_starts; // (B,N,E), (B,ceil(L/SCAN_SAVE),N,E); NULL: not wanted
    const T *delta_raw, *u, *z, *B_ssm, *C_ssm;   // (B*L,E) three times, (B*L,N) twice
    const float *A_neg, *D_skip, *dt_bias, *h0;   // (N,E), (E), (E), (B,N,E) or NULL: zeros
    int ld_out, ld_delta, ld_u, ld_z, ld_B, ld_C; // elements from a row to the next
    int B, L, E, N;
    struct ScanMail *mail; // of scan_tiles, see exchange.cuh
};

#include "cuda/exchange.cuh"

#define LOG2E 1.44269504f

template <typename T> __device__ __forceinline__ T to(float x);
template <> __device__ __forceinline__ float to<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 to<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 to<f16>(float x) { return __float2half_rn(x); }

// 2^x, off by 2 units in the last place, in one instruction; 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log1p(e) / e for e in [0,1]: a polynomial of degree 8, off by 3e-8 at most, or, where inputs are
// bf16, of degree 6, off by 1.3e-6. log(1 + e) would lose a small e.
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
// max(x, 0) + log1p(exp(-|x|))
template <typename T = float> __device__ __forceinline__ float softplus(float x) {
    float e = exp2_fast(-LOG2E * fabsf(x));
    return fmaf(e, log1p_ratio<T>(e), fmaxf(x, 0.f));
}

// One step of one state, which is the whole recurrence:
//     h_t = decay_t h_{t-1} + inject_t        y_t = D_skip u_t + sum over n of C_ssm h_t
__device__ __forceinline__ void step_state(float &h, float &y, float decay, float inject, float C) {
    h = fmaf(decay, h, inject);
    y = fmaf(C, h, y);
}

// y0 silu(z0) and y1 silu(z1) by one reciprocal, of (1 + exp(-z0)) (1 + exp(-z1)). Below z = -43,
// where |silu| is under 1e-17, the exponential stops growing so that the product stays finite.
__device__ __forceinline__ void gate_pair(float &y0, float &y1, float z0, float z1) {
    float a = 1.f + exp2_fast(-LOG2E * fmaxf(z0, -43.f)),
          b = 1.f + exp2_fast(-LOG2E * fmaxf(z1, -43.f));
    float r = rcp_fast(a * b);
    y0 *= z0 * (r * b);
    y1 *= z1 * (r * a);
}

// Row i of rows that lie `bytes` apart: one 32 x 32 + 64 bit multiply-add. A 64-bit index costs as
// much as the arithmetic of a step.
template <typename T> __device__ __forceinline__ T *row_at_bytes(T *p, int i, int bytes) {
    return (T *)((char *)p + (long long)i * bytes);
}
// The same of rows ld elements apart, for an i that the compiler knows.
template <typename T> __device__ __forceinline__ T *row_at(T *p, int i, int ld) {
    return row_at_bytes(p, i * (int)sizeof(T), ld);
}

template <int R> struct alignas(R >= 4 ? 16 : 4 * R) Row {
    float v[R];
};

__device__ __forceinline__ float4 load4(const float *p) { return *(const float4 *)p; }
__device__ __forceinline__ void unpack(float *to, float4 v) {
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// The reference, for any N: a thread is a channel and takes one step after the other. time_scan()
// compares the form that runs for a shape with it: out, h_final, h_starts, within 1e-4 (bf16: 1e-2)
// of the largest number. mamba.c's gradients check the backward. h_final, which holds h, must be
// given.
template <typename T> __global__ void scan_plain(ScanArgs<T> p) {
    const int e = blockIdx.y * blockDim.x + threadIdx.x, E = p.E, N = p.N;
    const size_t b = blockIdx.x, saves = (p.L + SCAN_SAVE - 1) / SCAN_SAVE;
    if (e >= E) return;
    float *h = p.h_final + b * N * E + e; // h_n lies at h[n * E]
    for (int n = 0; n < N; n++) h[(size_t)n * E] = p.h0 ? p.h0[(b * N + n) * E + e] : 0.f;
    for (int t = 0; t < p.L; t++) {
        const size_t row = b * p.L + t;
        if (p.h_starts && t % SCAN_SAVE == 0)
            for (int n = 0; n < N; n++)
                p.h_starts[((b * saves + t / SCAN_SAVE) * N + n) * E + e] = h[(size_t)n * E];
        float x = value(p.delta_raw[row * p.ld_delta + e]) + p.dt_bias[e];
        float delta = x > 20.f ? x : log1pf(expf(x));
        float u = value(p.u[row * p.ld_u + e]), z = value(p.z[row * p.ld_z + e]);
        float y = p.D_skip[e] * u;
        for (int n = 0; n < N; n++) {
            float B = value(p.B_ssm[row * p.ld_B + n]), C = value(p.C_ssm[row * p.ld_C + n]);
            float decay = expf(delta * p.A_neg[(size_t)n * E + e]);
            h[(size_t)n * E] = decay * h[(size_t)n * E] + delta * B * u;
            y += C * h[(size_t)n * E];
        }
        p.out[row * p.ld_out + e] = to<T>(y * z / (1.f + expf(-z)));
    }
}
template <typename T> static cudaError_t scan_plain_forward(Device *d, const ScanArgs<T> &p) {
    scan_plain<<<dim3(p.B, blocks_for(p.E, 32)), 32, 0, d->stream>>>(p);
    return cudaGetLastError();
}

// ------------------------------------------------------------------------------------------------
// 2 The scan of one token
// One token of each of p.B sequences (L = 1). h0 and h_final (B,N,E) must be given and may be the
// same array. The state is nearly all the traffic: it is read and written once. A lane has CHANNELS
// neighbouring channels, so that the accesses are of 16 bytes; the WARPS of a block share the
// states. A_neg comes from L2.

template <typename T, int CHANNELS, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) scan_step(ScanArgs<T> p) {
    __shared__ float part[WARPS][32 * CHANNELS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, E = p.E, N = p.N,
              chunks = (p.E + 32 * CHANNELS - 1) / (32 * CHANNELS),
              e = (blockIdx.x % chunks * 32 + lane) * CHANNELS;
    const size_t b = blockIdx.x / chunks;
    const bool live = e < E; // CHANNELS divides E
    float delta[CHANNELS], delta_u[CHANNELS], y[CHANNELS];
    if (live) {
#pragma unroll
        for (int v = 0; v < CHANNELS; v++) {
            delta[v] = softplus(value(p.delta_raw[b * p.ld_delta + e + v]) + p.dt_bias[e + v]);
            delta_u[v] = delta[v] * value(p.u[b * p.ld_u + e + v]), y[v] = 0.f, delta[v] *= LOG2E;
        }
#pragma unroll 4
        for (int n = warp; n < N; n += WARPS) {
            size_t at = (b * N + n) * E + e;
            float h[CHANNELS], A[CHANNELS], B = value(p.B_ssm[b * p.ld_B + n]),
                                            C = value(p.C_ssm[b * p.ld_C + n]);
            if constexpr (CHANNELS == 4)
                unpack(h, load4(p.h0 + at)), unpack(A, load4(p.A_neg + (size_t)n * E + e));
            else h[0] = p.h0[at], A[0] = p.A_neg[(size_t)n * E + e];
#pragma unroll
            for (int v = 0; v < CHANNELS; v++)
                step_state(h[v], y[v], exp2_fast(delta[v] * A[v]), delta_u[v] * B, C);
            if constexpr (CHANNELS == 4)
                *(float4 *)(p.h_final + at) = make_float4(h[0], h[1], h[2], h[3]);
            else p.h_final[at] = h[0];
        }
#pragma unroll
        for (int v = 0; v < CHANNELS; v++) part[warp][v * 32 + lane] = y[v];
    }
    __syncthreads();
    // The sum over warps and the gate: warp v does channel v of each lane.
    for (int v = warp; v < CHANNELS; v += WARPS)
        if (live) {
            float sum = p.D_skip[e + v] * value(p.u[b * p.ld_u + e + v]),
                  zv = value(p.z[b * p.ld_z + e + v]), none = 0.f;
#pragma unroll
            for (int s = 0; s < WARPS; s++) sum += part[s][v * 32 + lane];
            gate_pair(sum, none, zv, 0.f);
            p.out[b * p.ld_out + e + v] = to<T>(sum);
        }
}

template <typename T, int CHANNELS, int WARPS>
static cudaError_t scan_step_launch(Device *d, const ScanArgs<T> &p) {
    scan_step<T, CHANNELS, WARPS>
        <<<p.B *((p.E + 32 * CHANNELS - 1) / (32 * CHANNELS)), 32 * WARPS, 0, d->stream>>>(p);
    return cudaGetLastError();
}

template <typename T> static cudaError_t scan_step_forward(Device *d, const ScanArgs<T> &p) {
    bool fours =
        p.E % 4 == 0 && ((uintptr_t)p.h0 | (uintptr_t)p.h_final | (uintptr_t)p.A_neg) % 16 == 0;
    if (!fours) return scan_step_launch<T, 1, 4>(d, p);
    if ((size_t)p.B * p.E < as_on_h100(d, 1 << 18))
        return scan_step_launch<T, 4, 4>(d, p); // more warps: latency
    return scan_step_launch<T, 4, 1>(d, p);     // enough warps: fewer of everything else
}

// ------------------------------------------------------------------------------------------------
// 3 The scan of a text, and which form runs
// The walk: a block is 32 channels of a sequence and goes through time in tiles of 16 steps. Its
// WARPS share the states of a channel, STATES each, in registers. Softplus, conversions and the
// gate are the same for all states, so the warps share the rows of a tile for those. Between two
// barriers a warp prepares its rows of tile i + 1, does its states of tile i and gates its rows of
// tile i - 1: loads are in flight for the time of a tile, and the units for states, conversions and
// memory are all busy. Rows in shared memory are STEPS + 4 floats long, so that the 16-byte
// accesses of 8 neighbouring lanes fall into 32 different banks. UNROLL is of the loop over 4
// steps; MIN_BLOCKS, blocks a multiprocessor, limits the registers.

template <typename T, int WARPS, int STATES, int UNROLL, int MIN_BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_walk(ScanArgs<T> p) {
    constexpr int STEPS = 16, PITCH = STEPS + 4, ROWS = STEPS / WARPS, N = WARPS * STATES,
                  BC_FLOATS = 2 * N * PITCH, E_FLOATS = 32 * PITCH;
    extern __shared__ float4 shared[];
    float *bc = (float *)shared;         // [2][2N][PITCH]    B_ssm, then C_ssm
    float *deltas = bc + 2 * BC_FLOATS;  // [2][2][32][PITCH] delta, then delta*u
    float *part = deltas + 4 * E_FLOATS; // [2][WARPS][32][PITCH] y over the states of a warp
    wait_for_input();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, groups = (p.E + 31) / 32;
    const int b = blockIdx.x / groups, e_true = blockIdx.x % groups * 32 + lane, L = p.L, E = p.E;
    const bool live = e_true < E;
    const int e = live ? e_true : E - 1, tiles = (L + STEPS - 1) / STEPS;
    const size_t row = (size_t)b * L + warp * ROWS; // of softplus and gate: ROWS a warp and tile
    const T *delta_raw = p.delta_raw + row * p.ld_delta + e, *u = p.u + row * p.ld_u + e,
            *z = p.z + row * p.ld_z + e;
    T *out = p.out + row * p.ld_out + e;
    const float bias = p.dt_bias[e], skip = p.D_skip[e];
    // A warp loads units of 4 steps x 8 states, the first half of the warps of B_ssm, the others of
    // C_ssm. Unit k begins 4 (k % 4) steps and 8 (k / 4) states after the first.
    constexpr int UNITS = STATES < 4 ? STATES : 4;
    const int bc_t = warp * STATES % 4 * 4 + lane / 8, bc_n = warp * STATES / 4 * 8 + lane % 8,
              ld_bc = warp < WARPS / 2 ? p.ld_B : p.ld_C;
    const T *bc_from =
        (warp < WARPS / 2 ? p.B_ssm + bc_n : p.C_ssm + bc_n - N) + ((size_t)b * L + bc_t) * ld_bc;

    float A[STATES], h[STATES];
#pragma unroll
    for (int j = 0; j < STATES; j++) {
        int n = warp * STATES + j;
        A[j] = LOG2E * p.A_neg[(size_t)n * E + e];
        h[j] = p.h0 ? p.h0[((size_t)b * N + n) * E + e] : 0.f;
    }
    T raw_delta[ROWS], raw_u[ROWS], raw_bc[STATES], z_now[ROWS], z_before[ROWS];
    float u_before[ROWS], u_now[ROWS], u_next[ROWS];

    // Called for tile 0, 1, 2, ... in order: it advances its pointers.
    auto load_raw = [&](int tile) {
        const T *delta_from = delta_raw, *u_from = u, *bc_at = bc_from;
        delta_raw = row_at(delta_from, STEPS, p.ld_delta), u = row_at(u_from, STEPS, p.ld_u),
        bc_from = row_at(bc_at, STEPS, ld_bc);
        if (tile * STEPS + STEPS <= L) {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                raw_delta[i] = *row_at(delta_from, i, p.ld_delta),
                raw_u[i] = *row_at(u_from, i, p.ld_u);
#pragma unroll
            for (int k = 0; k < STATES; k++)
                raw_bc[k] = row_at(bc_at, k % UNITS * 4, ld_bc)[k / 4 * 8];
        } else {
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                bool in = tile * STEPS + warp * ROWS + i < L;
                raw_delta[i] = in ? *row_at(delta_from, i, p.ld_delta) : to<T>(0.f),
                raw_u[i] = in ? *row_at(u_from, i, p.ld_u) : to<T>(0.f);
            }
#pragma unroll
            for (int k = 0; k < STATES; k++)
                raw_bc[k] = tile * STEPS + bc_t + k % UNITS * 4 < L
                                ? row_at(bc_at, k % UNITS * 4, ld_bc)[k / 4 * 8]
                                : to<T>(0.f);
        }
    };
    auto load_z = [&](int tile) {
        const T *at = z;
        z = row_at(at, STEPS, p.ld_z);
        if (tile * STEPS + STEPS <= L) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) z_now[i] = *row_at(at, i, p.ld_z);
        } else {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                z_now[i] = tile * STEPS + warp * ROWS + i < L ? *row_at(at, i, p.ld_z) : to<T>(0.f);
        }
    };
    // Past the end of time delta is 0: decay 1, inject 0, the state stays.
    auto prepare = [&](int tile) {
        float *delta_to = deltas + (tile & 1) * 2 * E_FLOATS + lane * PITCH + warp * ROWS;
        float *bc_to = bc + (tile & 1) * BC_FLOATS + bc_n * PITCH + bc_t;
        Row<ROWS> delta, delta_u;
#pragma unroll
        for (int i = 0; i < ROWS; i++) delta.v[i] = softplus<T>(value(raw_delta[i]) + bias);
        if (tile * STEPS + STEPS > L)
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                delta.v[i] = tile * STEPS + warp * ROWS + i < L ? delta.v[i] : 0.f;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            u_next[i] = value(raw_u[i]);
            delta_u.v[i] = delta.v[i] * u_next[i];
        }
        *(Row<ROWS> *)delta_to = delta;
        *(Row<ROWS> *)(delta_to + E_FLOATS) = delta_u;
#pragma unroll
        for (int k = 0; k < STATES; k++)
            bc_to[k / 4 * 8 * PITCH + k % UNITS * 4] = value(raw_bc[k]);
    };
    auto walk = [&](int tile) {
        const float *delta_at = deltas + (tile & 1) * 2 * E_FLOATS + lane * PITCH;
        const float *B_at = bc + (tile & 1) * BC_FLOATS + warp * STATES * PITCH,
                    *C_at = B_at + N * PITCH;
        float *part_to = part + ((tile & 1) * WARPS + warp) * E_FLOATS + lane * PITCH;
        if (p.h_starts && tile * STEPS % SCAN_SAVE == 0 && live) {
            size_t chunks = (L + SCAN_SAVE - 1) / SCAN_SAVE,
                   at = ((size_t)b * chunks + tile * STEPS / SCAN_SAVE) * N + warp * STATES;
            for (int j = 0; j < STATES; j++) p.h_starts[(at + j) * E + e] = h[j];
        }
#pragma unroll UNROLL
        for (int t = 0; t < STEPS; t += 4) {
            float delta[4], delta_u[4], y[4] = {0, 0, 0, 0};
            unpack(delta, load4(delta_at + t)), unpack(delta_u, load4(delta_at + E_FLOATS + t));
#pragma unroll
            for (int j = 0; j < STATES; j++) {
                float B[4], C[4];
                unpack(B, load4(B_at + j * PITCH + t)), unpack(C, load4(C_at + j * PITCH + t));
#pragma unroll
                for (int i = 0; i < 4; i++)
                    step_state(h[j], y[i], exp2_fast(delta[i] * A[j]), delta_u[i] * B[i], C[i]);
            }
            *(float4 *)(part_to + t) = make_float4(y[0], y[1], y[2], y[3]);
        }
    };
    auto gate = [&](int tile) { // of the rows in z_before, u_before
        const float *part_at = part + (tile & 1) * WARPS * E_FLOATS + lane * PITCH + warp * ROWS;
        T *to_row = out;
        out = row_at(to_row, STEPS, p.ld_out);
        float y[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) y[i] = skip * u_before[i];
#pragma unroll
        for (int s = 0; s < WARPS; s++) {
            Row<ROWS> one = *(const Row<ROWS> *)(part_at + s * E_FLOATS);
#pragma unroll
            for (int i = 0; i < ROWS; i++) y[i] += one.v[i];
        }
#pragma unroll
        for (int i = 0; i < ROWS; i += 2)
            gate_pair(y[i], y[i + 1], value(z_before[i]), value(z_before[i + 1]));
        int rows = live ? L - tile * STEPS - warp * ROWS : 0;
        if (rows >= ROWS) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) *row_at(to_row, i, p.ld_out) = to<T>(y[i]);
        } else {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                if (i < rows) *row_at(to_row, i, p.ld_out) = to<T>(y[i]);
        }
    };
    auto shift = [&]() {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
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
        prepare(tile + 1); // after the last tile: rows that nobody uses
        load_raw(tile + 2);
        if (tile > 0) gate(tile - 1);
        shift();
        __syncthreads();
    }
    gate(tiles - 1);
    if (p.h_final && live)
        for (int j = 0; j < STATES; j++)
            p.h_final[((size_t)b * N + warp * STATES + j) * E + e] = h[j];
}

template <typename T, int WARPS, int STATES, int UNROLL, int MIN_BLOCKS>
cudaError_t scan_walk_launch(Device *d, const ScanArgs<T> &p) {
    constexpr int bytes = (2 * 2 * WARPS * STATES + 4 * 32 + 2 * WARPS * 32) * 20 * 4;
    return launch_dependent(d, scan_walk<T, WARPS, STATES, UNROLL, MIN_BLOCKS>,
                            p.B * blocks_for(p.E, 32), 32 * WARPS, bytes, p);
}

#include "cuda/scan_relay.cuh"
#include "cuda/scan_tiles.cuh"

// Which form runs for a text; times are an H100's. A relay takes as long as the multiprocessor with
// most blocks: 88 us for 2,048 steps of one block, 134 of two, 187 of three. Tiles spread over all
// multiprocessors and take 0.76 us a block of 32 channels. So tiles take few channels, and what is
// a little over one block a multiprocessor, unless the text is too short to pay for their start.
// Everything else goes to the relay for N = 8 and 16 (short texts to the walk), to the walk for N =
// 32 and 64, to tiles for any other N. With two channels a lane the relay does a block of 64
// channels in 0.9 of the time of two blocks of 32, but its blocks spread less evenly: 192 blocks
// over 132 multiprocessors are two for some. Tiles gain 4 to 8% by two channels a lane. Shape,
// alignment and machine alone decide, so every run gives the same bits.
template <typename T> static cudaError_t scan_forward(Device *d, const ScanArgs<T> &p) {
    size_t blocks = (size_t)p.B * ((p.E + 31) / 32), pairs = (size_t)p.B * ((p.E + 63) / 64),
           processors = (size_t)d->processors;
    bool few_channels = 20 * blocks < 18 * processors ||
                        (blocks > processors && 20 * blocks < 27 * processors),
         short_text = p.L <= 128;
    if (p.N != 8 && p.N != 16) few_channels = 2 * blocks < 3 * processors;
    bool paired = false; // two channels of bf16 are 4 bytes
    if constexpr (sizeof(T) == 2) {
        uintptr_t bases =
            (uintptr_t)p.out | (uintptr_t)p.delta_raw | (uintptr_t)p.u | (uintptr_t)p.z;
        paired = bases % 4 == 0 && (p.ld_out | p.ld_delta | p.ld_u | p.ld_z | p.E) % 2 == 0;
    }
    if (!few_channels && !short_text && (p.N == 8 || p.N == 16)) {
        if (p.N == 8) return scan_relay_launch<T, 2, 1, 4, 4>(d, p);
        if constexpr (sizeof(T) == 2)
            if (paired && blocks > 2 * processors &&
                9 * 2 * ((pairs + processors - 1) / processors) <=
                    10 * ((blocks + processors - 1) / processors))
                return scan_relay_launch<T, 4, 2, 1, 3>(d, p);
        if (blocks <= 3 * processors) return scan_relay_launch<T, 4, 1, 4, 3>(d, p);
        return scan_relay_launch<T, 4, 1, 4, 4>(d, p);
    }
    if (!few_channels || short_text) {
        if (p.N == 8) return scan_walk_launch<T, 4, 2, 4, 4>(d, p);
        if (p.N == 16) return scan_walk_launch<T, 4, 4, 4, 4>(d, p);
        if (p.N == 32) return scan_walk_launch<T, 4, 8, 2, 4>(d, p);
        if (p.N == 64) return scan_walk_launch<T, 8, 8, 2, 2>(d, p);
    }
    if constexpr (sizeof(T) == 2)
        if (paired && pairs * (((size_t)p.L + 63) / 64) >= 12 * processors)
            return scan_tiles_launch<T, 16, 4, 2, 3>(d, p);
    return scan_tiles_launch<T, 16, 4, 1, 4>(d, p);
}

// ------------------------------------------------------------------------------------------------
// 4 [train] The scan's backward
//     forward   h_t = decay_t h_{t-1} + delta_t B_t u_t     decay_t = exp(delta_t A_neg)
//               y_t = sum over n of C_t h_t + D_skip u_t    g = y silu(z)
//     backward  d_y = d_g silu(z)                           d_h_t = d_y C_t + decay_{t+1} d_h_{t+1}
//               d_C_t = sum over e of d_y h_t               d_B_t = sum over e of d_h_t delta u
//     d_log is the gradient of the exponent, delta_t A_neg:
//               d_log = d_h_t decay_t h_{t-1}               d_A_neg += d_log delta
//               d_delta = sum over n of d_log A_neg + u sum over n of d_h_t B_t
//               d_u = delta sum over n of d_h_t B_t + D_skip d_y          d_z = d_g y silu'(z)
//
// A block takes one tile, 32 channels by 64 steps, cut into 8 pieces of 8 steps, a warp each, and
// goes through it three times, a state after the other:
//   1 each piece from h = 0 and d_h = 0; its ends go to shared memory: h after the last step, and
//     decay_t d_h_t at the first step, which is what the step before receives;
//   2 the ends are joined to starts. h starts from the state that the forward saved, d_h from the
//     mail of the tile after, and the tile leaves its own d_h for the tile before;
//   3 the pieces from their true starts: h forward into registers, d_h backward, all gradients.
// A counter hands out the tiles in the order of reversed time. A tile waits only for one with a
// smaller ticket. A block does its tickets in rising order, so the smallest unfinished one is
// always being worked on and waits for nothing: the chain cannot stop.
// Registers hold what all states of a step share: delta, delta*u, d_y, and the sums over states for
// d_delta, d_u and y, 6 floats a step; and of one state 8 decays and 8 h. Shared memory holds
// B_ssm, C_ssm and the starts (43 kB), and what the end needs again (24 kB).
// Bytes a token and channel, bf16, N = 16: 8 read, 6 written; h_starts 1 and mail 2; the parts of
// d_B_ssm and d_C_ssm 4 written, 4 read; d_A_neg of a tile 1.1 written and read. Instructions are
// the limit, not those 27 bytes: about 37 a token, channel and state, of which 17 are the
// algorithm's. doc/SPEED.md has what each trick gained: sums over lanes on the tensor cores, decays
// computed twice instead of kept, strides in bytes, inputs kept in shared memory for the end, the
// rows of the next tile prefetched into L2. No sum depends on which block ran when.

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

// Sums over the 32 lanes of 16 values a lane, in two steps. First tensor cores add up lanes
// 4g..4g+3 (group g). Left matrix: v0, v2 in row g, v1, v3 in row g + 8. The right one has ones
// in rows 0..3 of column 2j (v0, v1) and 4..7 of column 2j+1 (v2, v3): ones[2j], ones[2j+1].
// After slots j = 0..3, d in lane 4g+q holds the sums over group g of values 4q..4q+3. TF32 cuts
// values to 11 bits; EXACT (float) adds the rest, cut to 11 bits again. 18 instructions, not 62.
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
// Then the sum over the 8 groups, of value 4(lane%4) + 2(lane/16) + lane/8%2. The first two
// exchanges halve the number of values, the third adds the last two parts.
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

enum { BACK_STATES = 16, BACK_STEPS = 8 }; // states at a time, steps of a piece

struct ScanBackPlan {
    int blocks, tiles;                            // blocks of 32 channels, tiles of time
    size_t flags, mail, partial2, partial, bytes; // offsets in 4-byte words; the whole
};

template <int WARPS> constexpr size_t scan_back_shared() {
    return sizeof(float) *
           (BACK_STATES * (2 * WARPS * BACK_STEPS + 4) + BACK_STATES * (2 * WARPS * 32 + 32) +
            3 * WARPS * 32 + 3 * BACK_STEPS * WARPS * 32);
}

// The workspace, in words:
//   flags     tickets given; (blocks, B, tiles) how often BACK_STATES states of mail have come
//   mail      (B, tiles, N, E) d_h that a tile leaves to the tile before it
//   partial2  (B, tiles, N + 2, E) a tile's d_A_neg, d_D_skip, d_dt_bias
//   partial   (blocks, B, tiles, N, WARPS, 2 BACK_STEPS) d_C in order of time, then d_B reversed
template <typename T, int WARPS, int MIN_BLOCKS, int UNROLL>
__global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    scan_back(ScanBackArgs<T> p, ScanBackPlan q) {
    constexpr int STEPS = WARPS * BACK_STEPS, THREADS = 32 * WARPS, STATES = BACK_STATES / WARPS,
                  LANES = WARPS * 32, BC_ROW = 2 * STEPS + 4, PIECE_ROW = 2 * LANES + 32;
    static_assert(STEPS % SCAN_SAVE == 0, "a tile starts at a saved state");
    extern __shared__ float4 shared[];
    __shared__ int4 next;        // group of 32 channels, b, tile; whether there is one
    float *bc = (float *)shared; // [BACK_STATES] rows: B_ssm, C_ssm (STEPS)
    float *pieces = bc + BACK_STATES * BC_ROW;      // [BACK_STATES] rows, see below
    float *sums = pieces + BACK_STATES * PIECE_ROW; // [3][WARPS][32] delta, d_D_skip, d_dt_bias
    float *kept = sums + 3 * LANES; // [3][BACK_STEPS][WARPS][32] u, slope of softplus, d_g silu'(z)
    // A row of `pieces`: h of each piece (WARPS,32), first its end, then its start, last its d_A;
    // d_h of each piece (WARPS,32), its end, then its start; A_neg log2(e) (32).
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, L = p.L, E = p.E, N = p.N;
    const int ld_delta = p.ld_delta * sizeof(T), ld_u = p.ld_u * (int)sizeof(T),
              ld_z = p.ld_z * sizeof(T), ld_d_g = p.ld_d_g * sizeof(T), ld_B = p.ld_B * sizeof(T),
              ld_C = p.ld_C * sizeof(T), ld_d_delta = p.ld_d_delta * sizeof(T),
              ld_d_u = p.ld_d_u * (int)sizeof(T),
              ld_d_z = p.ld_d_z * sizeof(T); // all in bytes
    const int tiles = q.tiles, items = q.blocks * p.B * tiles,
              saves = (L + SCAN_SAVE - 1) / SCAN_SAVE;
    int *flags = (int *)p.workspace + q.flags;
    float *mail = (float *)p.workspace + q.mail, *partial = (float *)p.workspace + q.partial;

    // Tickets are given in the order of reversed time.
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
        const int group = item.x, b = item.y, tile = item.z;
        const int e_true = group * 32 + lane, e = min(e_true, E - 1),
                  t0 = tile * STEPS + warp * BACK_STEPS;
        const bool live = e_true < E;
        const size_t bt = (size_t)b * tiles + tile;
        int *flag = flags + 1 + ((size_t)group * p.B + b) * tiles + tile;
        const int left = L - 1 - t0; // steps after t0
        const int row0 = b * L, r0 = row0 + min(t0, L - 1);
        const T *delta_raw = row_at_bytes(p.delta_raw + e, r0, ld_delta),
                *u = row_at_bytes(p.u + e, r0, ld_u);
        const T *z = row_at_bytes(p.z + e, r0, ld_z), *d_g = row_at_bytes(p.d_g + e, r0, ld_d_g);
        int ticket = 0;
        if (tid == 0) ticket = atomicAdd(flags, 1);

        // What all states share. Past the end delta is 0: such steps change nothing.
        float delta[BACK_STEPS], delta_u[BACK_STEPS], dy[BACK_STEPS], sum_A[BACK_STEPS],
            sum_B[BACK_STEPS], y[BACK_STEPS], sum = 0.f;
        {
            T raw_[BACK_STEPS], u_[BACK_STEPS], z_[BACK_STEPS], g_[BACK_STEPS];
#pragma unroll
            for (int k = 0; k < BACK_STEPS; k++) {
                int i = max(0, min(k, left));
                raw_[k] = *row_at_bytes(delta_raw, i, ld_delta), u_[k] = *row_at_bytes(u, i, ld_u);
                z_[k] = *row_at_bytes(z, i, ld_z), g_[k] = *row_at_bytes(d_g, i, ld_d_g);
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
                sum_A[k] = 0.f, sum_B[k] = 0.f, y[k] = 0.f;
                sum += delta[k];
            }
        }
        sums[tid] = sum;

        // d_A_neg of the tile: the pieces' parts in order, after a barrier. A warp adds up
        // STATES states.
        auto add_d_A = [&](int n0) {
            float *out =
                (float *)p.workspace + q.partial2 + (bt * (N + 2) + n0 + warp * STATES) * E + e;
#pragma unroll
            for (int i = 0; i < STATES; i++) {
                float d_A = 0.f;
#pragma unroll
                for (int j = 0; j < WARPS; j++)
                    d_A += pieces[(warp * STATES + i) * PIECE_ROW + j * 32 + lane];
                if (n0 + warp * STATES + i < N && live) out[(size_t)i * E] = d_A;
            }
        };
        for (int n0 = 0; n0 < N; n0 += BACK_STATES) {
            const int count = min(BACK_STATES, N - n0);
            const int n_mine = min(n0 + tid % BACK_STATES, N - 1), first = tile * STEPS;
            const T *B_ssm = row_at_bytes(p.B_ssm + n_mine, row0, ld_B),
                    *C_ssm = row_at_bytes(p.C_ssm + n_mine, row0, ld_C);
#pragma unroll
            for (int i = 0; i < BACK_STATES * STEPS; i += THREADS) {
                int k = (i + tid) / BACK_STATES, t = min(first + k, L - 1);
                bool in = n0 + tid % BACK_STATES < N && first + k < L;
                float Bv = value(*row_at_bytes(B_ssm, t, ld_B)),
                      Cv = value(*row_at_bytes(C_ssm, t, ld_C));
                float *to = bc + tid % BACK_STATES * BC_ROW + k;
                to[0] = in ? Bv : 0.f;
                to[STEPS] = in ? Cv : 0.f;
            }
            float h_start[STATES], A_mine[STATES];
            const float *starts =
                p.h_starts + ((size_t)b * saves + tile * (STEPS / SCAN_SAVE)) * N * E + e;
#pragma unroll
            for (int i = 0; i < STATES; i++) {
                size_t at = (size_t)min(n0 + warp * STATES + i, N - 1) * E;
                A_mine[i] = LOG2E * p.A_neg[at + e], h_start[i] = starts[at];
                pieces[(warp * STATES + i) * PIECE_ROW + 2 * LANES + lane] = A_mine[i];
            }
            __syncthreads();
            // 1. The ends of each piece of 8 steps, from h = 0 and d_h = 0.
            const float *row_bc = bc + warp * BACK_STEPS, *row_A = pieces + 2 * LANES + lane;
            float *row_piece = pieces + tid;
#pragma unroll 2
            for (int n = 0; n < count;
                 n++, row_bc += BC_ROW, row_A += PIECE_ROW, row_piece += PIECE_ROW) {
                float A_scaled = *row_A, h = 0.f, d_h = 0.f, decay[BACK_STEPS], Bv[BACK_STEPS],
                      Cv[BACK_STEPS];
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k += 4) {
                    *(float4 *)(Bv + k) = *(const float4 *)(row_bc + k);
                    *(float4 *)(Cv + k) = *(const float4 *)(row_bc + STEPS + k);
                }
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k++) {
                    decay[k] = exp2_fast(delta[k] * A_scaled);
                    h = fmaf(decay[k], h, delta_u[k] * Bv[k]);
                }
#pragma unroll
                for (int k = BACK_STEPS - 1; k >= 0; k--) d_h = fmaf(dy[k], Cv[k], d_h) * decay[k];
                row_piece[0] = h, row_piece[LANES] = d_h;
            }
            if (tid == 0) next = take(ticket);
            __syncthreads();
            // 2. Join the pieces: ends become starts. The decay of a piece is exp(A_neg sum delta).
            // A warp joins STATES states.
            if (tile + 1 < tiles) {
                const int *later = flag + 1;
                if (lane == 0) {
                    Patience wait;
                    while (load_acquire(later) <= n0 / BACK_STATES &&
                           !wait.gives_up(STUCK_SCAN, STUCK_BACK))
                        __nanosleep(64);
                }
                __syncwarp();
            }
#pragma unroll
            for (int i = 0; i < STATES; i++) {
                const int n = n0 + warp * STATES + i;
                if (n >= N) break;
                float A_scaled = A_mine[i], h = h_start[i], decay[WARPS],
                      *h_ends = pieces + (warp * STATES + i) * PIECE_ROW + lane,
                      *d_h_ends = h_ends + LANES;
                float d_h = tile + 1 < tiles ? __ldcg(mail + ((bt + 1) * N + n) * E + e)
                            : p.d_h_final    ? p.d_h_final[((size_t)b * N + n) * E + e]
                                             : 0.f;
#pragma unroll
                for (int j = 0; j < WARPS; j++) {
                    decay[j] = exp2_fast(A_scaled * sums[j * 32 + lane]);
                    float end = h_ends[j * 32];
                    h_ends[j * 32] = h;
                    h = fmaf(decay[j], h, end);
                }
#pragma unroll
                for (int j = WARPS - 1; j >= 0; j--) {
                    float end = d_h_ends[j * 32];
                    d_h_ends[j * 32] = d_h;
                    d_h = fmaf(decay[j], d_h, end);
                }
                if (live && tile) mail[(bt * N + n) * E + e] = d_h;
                else if (live && p.d_h0) p.d_h0[((size_t)b * N + n) * E + e] = d_h;
            }
            __syncthreads();
            if (tid == 0 && tile) store_release(flag, n0 / BACK_STATES + 1);
            // The rows of the next tile into L2: 4 tensors of STEPS rows, a row a thread.
            if (n0 == 0 && next.w) {
                const int which = tid / STEPS,
                          r = next.y * L + min(next.z * STEPS + tid % STEPS, L - 1);
                const T *row = which == 0   ? p.delta_raw
                               : which == 1 ? p.u
                               : which == 2 ? p.z
                                            : p.d_g;
                prefetch_L2(row_at_bytes(row + next.x * 32, r,
                                         which == 0   ? ld_delta
                                         : which == 1 ? ld_u
                                         : which == 2 ? ld_z
                                                      : ld_d_g));
            }
            // 3. The pieces from their true starts, forward, then backward. The sums of d_B_ssm and
            // d_C_ssm of a state are stored during the next, whose arithmetic hides their latency.
            constexpr bool EXACT = sizeof(T) == 4;
            float *part =
                partial +
                (((group * (size_t)p.B * tiles + bt) * N + n0) * WARPS + warp) * 2 * BACK_STEPS +
                lane % 4 * 4 + lane / 16 * 2 + lane / 8 % 2;
            float d_BC[4] = {};
            row_bc = bc + warp * BACK_STEPS, row_A = pieces + 2 * LANES + lane,
            row_piece = pieces + tid;
#pragma unroll UNROLL
            for (int n = 0; n < count;
                 n++, row_bc += BC_ROW, row_A += PIECE_ROW, row_piece += PIECE_ROW) {
                float A_scaled = *row_A, d_h = row_piece[LANES], d_A = 0.f, decay[BACK_STEPS],
                      h[BACK_STEPS + 1], Bv[BACK_STEPS], Cv[BACK_STEPS], v[4];
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k += 4) {
                    *(float4 *)(Bv + k) = *(const float4 *)(row_bc + k);
                    *(float4 *)(Cv + k) = *(const float4 *)(row_bc + STEPS + k);
                }
                float s = group_sums(d_BC, lane);
                if (!(lane & 4)) *part = s; // at n = 0 nothing yet, soon overwritten
                part += n ? 2 * BACK_STEPS * WARPS : 0;
                h[0] = row_piece[0];
#pragma unroll
                for (int i = 0; i < 4; i++) d_BC[i] = 0.f;
#pragma unroll
                for (int k = 0; k < BACK_STEPS; k++) {
                    decay[k] = exp2_fast(delta[k] * A_scaled);
                    h[k + 1] = h[k];
                    step_state(h[k + 1], y[k], decay[k], delta_u[k] * Bv[k], Cv[k]);
                    v[k % 4] = dy[k] * h[k + 1];
                    if (k % 4 == 3)
                        lane_sums<EXACT>(d_BC, v[0], v[1], v[2], v[3], ones + k / 4 * 2);
                }
#pragma unroll
                for (int k = BACK_STEPS - 1; k >= 0; k--) {
                    d_h = fmaf(dy[k], Cv[k], d_h);
                    sum_B[k] = fmaf(d_h, Bv[k], sum_B[k]);
                    v[3 - k % 4] = d_h * delta_u[k];
                    if (k % 4 == 0)
                        lane_sums<EXACT>(d_BC, v[0], v[1], v[2], v[3], ones + (k ? 4 : 6));
                    d_h *= decay[k];
                    float d_log = d_h * h[k]; // gradient of delta A_neg
                    sum_A[k] = fmaf(d_log, A_scaled, sum_A[k]);
                    d_A = fmaf(d_log, delta[k], d_A);
                }
                row_piece[0] = d_A;
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
        T *d_delta_raw = row_at_bytes(p.d_delta_raw + e, r0, ld_d_delta),
          *d_u = row_at_bytes(p.d_u + e, r0, ld_d_u), *d_z = row_at_bytes(p.d_z + e, r0, ld_d_z);
        const int steps = live ? left : -1;
#pragma unroll
        for (int k = 0; k < BACK_STEPS; k++) {
            float ut = kept[k * THREADS + tid], d_raw = fmaf(LN2, sum_A[k], ut * sum_B[k]) *
                                                        kept[(BACK_STEPS + k) * THREADS + tid];
            if (k <= steps) {
                *row_at_bytes(d_delta_raw, k, ld_d_delta) = to<T>(d_raw);
                *row_at_bytes(d_u, k, ld_d_u) = to<T>(fmaf(delta[k], sum_B[k], skip * dy[k]));
                *row_at_bytes(d_z, k, ld_d_z) =
                    to<T>(fmaf(skip, ut, y[k]) * kept[(2 * BACK_STEPS + k) * THREADS + tid]);
            }
            d_bias += d_raw;
            d_skip = fmaf(dy[k], ut, d_skip);
        }
        sums[LANES + tid] = d_skip, sums[2 * LANES + tid] = d_bias;
        __syncthreads();
        item = next;
        add_d_A((N - 1) / BACK_STATES * BACK_STATES);
        if (warp < 2 && live) {
            float s = 0.f;
#pragma unroll
            for (int j = 0; j < WARPS; j++) s += sums[(1 + warp) * LANES + j * 32 + lane];
            ((float *)p.workspace)[q.partial2 + (bt * (N + 2) + N + warp) * E + e] = s;
        }
    }
}

// d_B_ssm and d_C_ssm: the channel blocks' parts in order. One thread an element.
template <typename T>
__global__ void scan_back_sum_BC(ScanBackArgs<T> p, const float *partial, int blocks, int tiles,
                                 int WARPS) {
    size_t count = (size_t)p.B * tiles * p.N * WARPS * 16,
           i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= count) return;
    int v = i % 16, warp = i / 16 % WARPS, n = i / (16 * WARPS) % p.N,
        k = v < BACK_STEPS ? v : 2 * BACK_STEPS - 1 - v; // d_C_ssm upwards, d_B_ssm downwards
    size_t bt = i / ((size_t)16 * WARPS * p.N);
    int t = (int)(bt % tiles) * WARPS * BACK_STEPS + warp * BACK_STEPS + k;
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

template <int WARPS> static ScanBackPlan scan_back_plan(int B, int L, int E, int N) {
    ScanBackPlan q = {};
    q.blocks = (E + 31) / 32, q.tiles = (L + WARPS * BACK_STEPS - 1) / (WARPS * BACK_STEPS);
    size_t bt = (size_t)B * q.tiles, items = bt * q.blocks;
    q.mail = q.flags + (1 + items + 31) / 32 * 32;
    q.partial2 = q.mail + bt * N * E;
    q.partial = q.partial2 + (bt * (N + 2) * E + 31) / 32 * 32;
    q.bytes = 4 * (q.partial + items * N * WARPS * 2 * BACK_STEPS);
    return q;
}

template <typename T, int WARPS, int MIN_BLOCKS, int UNROLL>
static cudaError_t scan_back_launch(Device *d, const ScanBackArgs<T> &p) {
    const ScanBackPlan q = scan_back_plan<WARPS>(p.B, p.L, p.E, p.N);
    auto kernel = scan_back<T, WARPS, MIN_BLOCKS, UNROLL>;
    float *words = (float *)p.workspace;
    cudaError_t error = allow_shared(kernel, scan_back_shared<WARPS>());
    if (error == cudaSuccess)
        error = cudaMemsetAsync(words + q.flags, 0, (q.mail - q.flags) * 4, d->stream);
    if (error != cudaSuccess) return error;
    size_t items = (size_t)p.B * q.tiles * q.blocks,
           sums = (size_t)p.B * q.tiles * p.N * WARPS * 2 * BACK_STEPS;
    // More blocks than run at once would find no tickets left.
    const int fit = std::min(MIN_BLOCKS, blocks_that_fit(d, scan_back_shared<WARPS>()));
    unsigned grid = (unsigned)std::min(items, (size_t)d->processors * fit);
    kernel<<<grid, 32 * WARPS, scan_back_shared<WARPS>(), d->stream>>>(p, q);
    scan_back_sum_BC<<<blocks_for(sums, 256), 256, 0, d->stream>>>(p, words + q.partial, q.blocks,
                                                                   q.tiles, WARPS);
    scan_back_sum_A<<<dim3(blocks_for(p.E, 32), p.N + 2), dim3(32, 8), 0, d->stream>>>(
        p, words + q.partial2, p.B * q.tiles);
    return cudaGetLastError();
}

// One shape of block serves all sizes: 8 warps, 71 kB, 2 blocks a multiprocessor or, where it has
// 100 kB, 1; phase 3 unrolled twice
// for bf16. The workspace is aligned to 16 bytes, needs no initial value and may be used for
// something else between calls.
static size_t scan_backward_workspace(int B, int L, int E, int N) {
    return scan_back_plan<8>(B, L, E, N).bytes;
}
template <typename T> static cudaError_t scan_backward(Device *d, const ScanBackArgs<T> &p) {
    constexpr int UNROLL = sizeof(T) == 2 ? 2 : 1;
    return scan_back_launch<T, 8, 2, UNROLL>(d, p);
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

// ------------------------------------------------------------------------------------------------
// 5 The model: weights, block
// The file's tensors are copied as they lie; matrices of another type than T are converted once.

#include "cuda/layers.cuh"
#include "cuda/conv_back.cuh"
#include "cuda/padding.cuh"
#include "cuda/products.cuh"
#include "cuda/quantized.cuh"

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

struct TensorPlace { // one for each tensor that the model has
    const Tensor *host;
    void **device; // its pointer in Weights
    bool matrix;   // of type T on the device
    bool decays;   // weight decay applies
    const char *name;
    int layer; // -1: not in a layer
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

// The arrays of one block, as in mamba.c's glossary. In training the layer keeps those that its
// backward needs; the others are shared by all layers.
template <class T> struct BlockActs {
    T *xn;           // (B*L,D)  norm of the residual stream
    T *xz;           // (B*L,2E) x, then the gate z
    T *u;            // (B*L,E)  silu(conv(x))
    T *xdb;          // (B*L,P)  dt_low (R), B_ssm (N), C_ssm (N)
    T *raw;          // (B*L,P)  xdb before FalconMamba's norms; NULL: not wanted
    T *delta;        // (B*L,E)  before dt_bias and softplus
    T *g;            // (B*L,E)  y silu(z)
    float *h_starts; // see ScanArgs; NULL: not wanted
    ScanMail *mail;
    Unpacking unpacking;
};

enum { GPU_PIECE = 16384 };          // tokens of a text that are read at once, at the most
enum { GPU_LOGIT_FLOATS = 1 << 26 }; // logits that exist at once, at the most
enum { GENERATE_MAX = 64 };          // steps of one gpu_generate()

// Sequences side by side: their states, and what generates from them.
struct Places {
    int S;                         // 0: none
    float *window;                 // (n_layer,S,K-1,E)
    float *h;                      // (n_layer,S,N,E)
    float *logits;                 // (S,V), after the last token of each
    struct Generation *generation; // or NULL
};

struct Texts {      // several texts from their start, see texts.cuh
    int S;          // at the most; 0: no memory yet
    ScanMail mail;  // its words are device memory
    Places prompts; // states after the prompts that were read last
};

struct Converted {
    void *to;
    const void *from;
    int rows, cols;
    Type type;
};
struct PackedPlace {
    void **device; // its pointer in Weights
    int rows, cols;
};

struct Gpu {
    Device device;
    Config config;
    bool bf16_compute; // T is bf16
    bool f16_compute;  // T is f16; else float
    Weights w;
    std::vector<void *> memory; // everything to free
    int piece;                  // rows that the activations have room for
    int logit_rows;             // rows that the logits have room for
    float *res;                 // (piece,D)
    float *logits;              // (logit_rows,V)
    BlockActs<float> acts;      // its pointers are T's
    ScanMail mail;
    Unpacking unpacking;
    char *raw;                        // the file's tensors
    std::vector<PackedPlace> packed;  // the matrices that are quantised
    std::vector<Converted> converted; // those that have a copy of another type
    int32_t *ids, *targets;           // (piece)
    float *losses;                    // (piece), of gpu_score()
    int32_t *likeliest;               // (piece), the same
    Texts texts;
    Places one;         // the sequence that reads prompts
    Places many;        // several texts
    Places *at;         // of these: what runs now
    bool gathered;      // many was filled by gpu_gather()
    bool portable_only; // the one-kernel steps got stuck: see gpu_generate()
};

template <class T> static BlockActs<T> acts_of(const Gpu *g) {
    const BlockActs<float> &a = g->acts;
    return {(T *)a.xn,    (T *)a.xz, (T *)a.u, (T *)a.xdb, NULL,
            (T *)a.delta, (T *)a.g,  NULL,     a.mail,     g->unpacking};
}

static float *window_of(const Gpu *g, int layer) {
    return g->at->window + (size_t)layer * g->at->S * (g->config.K - 1) * g->config.E;
}
static float *h_of(const Gpu *g, int layer) {
    return g->at->h + (size_t)layer * g->at->S * g->config.N * g->config.E;
}

struct Sequence { // the sampler's state of one sequence
    uint64_t position, random;
    int32_t recent[RECENT], n_recent; // the last tokens, a ring by position
    int32_t step;                     // row of `tokens` that is next
};

struct Solo;
struct Wide;
static void solo_free(Solo *q);
static void wide_free(Wide *q);

struct Generation;
static float *x_proj_parts(const Gpu *g); // (K_SPLIT_MAX,S,P): parts of x_proj's sums

#include "cuda/step_portable.cuh"

template <class T>
static ScanArgs<T> scan_args(const Config *c, const LayerWeights *w, BlockActs<T> a, int B, int L) {
    int E = c->E, N = c->N, R = c->R, P = R + 2 * N;
    ScanArgs<T> p = {};
    p.delta_raw = a.delta, p.u = a.u, p.z = a.xz + E, p.B_ssm = a.xdb + R, p.C_ssm = a.xdb + R + N,
    p.mail = a.mail;
    p.A_neg = w->A_neg, p.D_skip = (const float *)w->D_skip, p.dt_bias = (const float *)w->dt_bias;
    p.ld_out = E, p.ld_delta = E, p.ld_u = E, p.ld_z = 2 * E, p.ld_B = P, p.ld_C = P;
    p.B = B, p.L = L, p.E = E, p.N = N;
    return p;
}

// What a block is applied to. window and h move on; where given: B = 1, L = 1, text or lengths.
struct BlockRun {
    float *out;       // (B*L,D) = res + block(res)
    const float *res; // (B*L,D), may be out
    int B, L;         // sequences, tokens of each
    float *window;    // (B,K-1,E); NULL: zeros before the first token
    float *h;         // (B,N,E); NULL: from zero
    bool text;        // training: B texts of L tokens from such states; L = 1 is no step
    // (B), on the device: tokens of each text, all from zero; the rest of L is padding. NULL: L.
    const int32_t *lengths = NULL;
};

// The block of the paper, in its order: norm, in_proj, convolution, x_proj, dt_proj, scan,
// out_proj.
template <class T>
static void block(Device *d, const Config *c, const LayerWeights *w, BlockActs<T> a,
                  const BlockRun &run) {
    const int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = R + 2 * N;
    const int B = run.B, L = run.L, rows = B * L;
    const float *conv_bias = (const float *)w->conv_bias, *res = run.res;
    float *out = run.out, *h = run.h;
    const bool step = L == 1 && h && !run.text && !run.lengths; // of a text, not a text
    norm_rows(d, Rows(a.xn, D), Rows(res, D), w->norm, w->norm_bias, c->norm_eps, rows, D);
    matmul(d, Rows(a.xz, 2 * E), Rows(a.xn, D), dense<T>(d, a.unpacking, w->in_proj, 2 * E, D),
           rows, 2 * E, D);
    add_bias(d, a.xz, 2 * (size_t)E, (const float *)w->in_bias, rows, 2 * E);
    float *window = run.lengths ? NULL : run.window;
    conv1d_silu(d, ConvArgs<T>{a.u, a.xz, window, w->conv_t, conv_bias, B, L, E, K, run.text});
    if (run.lengths) text_windows(d, run.window, a.xz, run.lengths, B, L, E, K);
    matmul(d, Rows(a.xdb, P), Rows(a.u, E), dense<T>(d, a.unpacking, w->x_proj, P, E), rows, P, E);
    // One token in bf16: dt_proj, FalconMamba's norms and the scan are one kernel where that pays.
    if (std::is_same<T, bf16>::value && step && dt_step_pays(d, B, E, N, R)) {
        DtStepArgs dt = {};
        dt.out = (bf16 *)a.g, dt.h = h, dt.W_dt = (const bf16 *)w->dt_proj;
        dt.xdb = (const bf16 *)a.xdb, dt.u = (const bf16 *)a.u;
        dt.z = (const bf16 *)a.xz + E, dt.A_neg = w->A_neg;
        dt.dt_bias = (const float *)w->dt_bias, dt.D_skip = (const float *)w->D_skip;
        dt.S = B, dt.E = E, dt.N = N, dt.R = R;
        dt.norm_eps = c->flags & FLAG_MIXER_NORM ? c->mixer_eps : 0;
        dt_step(d, dt);
    } else {
        if (c->flags & FLAG_MIXER_NORM) {
            if (a.raw) copy(d, a.raw, a.xdb, (size_t)rows * P * sizeof(T), "xdb");
            mixer_norms(d, a.xdb, c->mixer_eps, rows, R, N);
        }
        matmul(d, Rows(a.delta, E), Rows(a.xdb, P), (const T *)w->dt_proj, rows, E, R);
        if (run.lengths) pad_delta(d, a.delta, run.lengths, B, L, E);
        ScanArgs<T> scan = scan_args(c, w, a, B, L);
        scan.out = a.g, scan.h0 = run.lengths ? NULL : h, scan.h_final = h;
        scan.h_starts = a.h_starts;
        check_cuda(d, step ? scan_step_forward(d, scan) : scan_forward(d, scan), "scan");
    }
    const T *out_proj = dense<T>(d, a.unpacking, w->out_proj, D, E);
    if (out == res) matmul(d, Rows(out, D), Rows(a.g, E), out_proj, rows, D, E, true);
    else matmul_onto(d, out, res, a.g, out_proj, rows, D, E);
    add_bias(d, out, (size_t)D, (const float *)w->out_bias, rows, D);
}

// ------------------------------------------------------------------------------------------------
// 6 The model on the device, its state, prefill
// A piece of text is up to GPU_PIECE tokens, so memory does not depend on the prompt's length:
// window and h go from one piece to the next.

static void *gpu_take(Gpu *g, size_t bytes) {
    void *p = device_alloc(bytes);
    if (p) g->memory.push_back(p);
    return p;
}

// What gpu_open() takes for the weights: the file's tensors, a copy of each matrix that needs
// another type, what is derived, and scratch. base NULL: only counts.
template <class T> static size_t lay_out_weights(Gpu *g, const Model *m, char *base) {
    const Config *c = &m->config;
    const char *host = (const char *)m->embedding.data;
    const Type compute = sizeof(T) == 4 ? F32 : std::is_same<T, bf16>::value ? BF16 : F16;
    // Of the embedding and the head, a part at a time is unpacked: as much as of in_proj.
    const size_t largest = (size_t)2 * c->E * c->D + (size_t)TILE * c->D;
    Unpacking *u = &g->unpacking;
    Arena a = {base, 0};
    a.take(g->raw, m->tensors_bytes);
    u->bits = c->type == Q8 ? 8 : c->type == Q4 ? 4 : 0;
    u->elements = u->bits ? (size_t)TILE * c->D : 0;
    g->packed.clear(), g->converted.clear();
    for (const TensorPlace &p : tensor_places(m, &g->w)) {
        const size_t n = (size_t)p.host->rows * (size_t)p.host->cols;
        const char *from = g->raw + ((const char *)p.host->data - host);
        *p.device = (void *)from;
        if (!p.matrix || p.host->type == compute) continue;
        if (u->bits && strcmp(p.name, "dt_proj")) { // stays as it is
            u->elements = std::max(u->elements, std::min(n, largest));
            g->packed.push_back({p.device, p.host->rows, p.host->cols});
            continue;
        }
        T *to;
        a.take(to, n);
        g->converted.push_back({to, from, p.host->rows, p.host->cols, p.host->type});
        *p.device = to;
    }
    if (c->flags & FLAG_TIED) g->w.head = g->w.embedding;
    a.take(u->scratch, u->elements, sizeof(T));
    float *derived;
    const size_t each = (size_t)c->E * (size_t)(c->N + c->K);
    a.take(derived, (size_t)c->n_layer * each);
    for (LayerWeights &w : g->w.layer) {
        w.A_neg = derived, w.conv_t = derived ? derived + (size_t)c->E * c->N : NULL;
        if (derived) derived += each;
    }
    return a.used;
}

// After the file's tensors are there: the copies and what is derived.
template <class T> static int convert_weights(Gpu *g) {
    Device *d = &g->device;
    const int bits = g->unpacking.bits;
    for (const PackedPlace &p : g->packed) arrange(d, *p.device, bits, p.rows, p.cols);
    for (const Converted &p : g->converted) {
        const size_t n = (size_t)p.rows * p.cols;
        T *to = (T *)p.to;
        if (p.type == F32) convert(d, to, (const float *)p.from, n);
        else if (p.type == BF16) convert(d, to, (const bf16 *)p.from, n);
        else if (p.type == F16) convert(d, to, (const uint16_t *)p.from, n);
        else {
            arrange(d, (void *)p.from, bits, p.rows, p.cols);
            unpack(d, to, p.from, bits, p.rows, p.cols);
        }
    }
    for (LayerWeights &w : g->w.layer) derive(d, &g->config, &w);
    return finish(d);
}

static int places_open(Gpu *g, Places *p, int S);
static void places_free(Places *p);
static void texts_free(Texts *x);
static void generation_free(Generation *n);

// A batch of more than THIN_MAX sequences reads a dense copy of quantised matrices, where memory
// holds it: there arithmetic counts, not bytes. The copy stays. Without the memory nothing changes.
template <class T> static void unpack_for_batches(Gpu *g, int spare) {
    size_t bytes = 0, free_bytes = 0, total = 0;
    for (const PackedPlace &p : g->packed) bytes += ((size_t)p.rows * p.cols + 128) * sizeof(T);
    if (!g->unpacking.bits) return;
    free_bytes = free_memory(&total);
    // States need memory, too. spare: how many times the copy must be free.
    if (free_bytes < spare * bytes + bytes / 2 + ((size_t)1 << 30)) return;
    T *to = (T *)gpu_take(g, bytes);
    if (!to) return;
    for (const PackedPlace &p : g->packed) {
        unpack(&g->device, to, *p.device, g->unpacking.bits, p.rows, p.cols);
        *p.device = to;
        to += ((size_t)p.rows * p.cols + 127) / 128 * 128;
    }
    if (g->config.flags & FLAG_TIED) g->w.head = g->w.embedding;
    g->unpacking.bits = 0;
    // The steps of one text have the old pointers.
    generation_free(g->one.generation);
    g->one.generation = NULL;
}

static void gpu_close(Gpu *g) {
    if (!g) return;
    device_use(&g->device);
    if (g->device.stream) cudaStreamSynchronize(g->device.stream);
    for (void *p : g->memory) cudaFree(p);
    places_free(&g->one), places_free(&g->many), texts_free(&g->texts);
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
    a.take(g->targets, M), a.take(g->losses, M), a.take(g->likeliest, M);
    a.take(b->xn, M * D, sizeof(T)), a.take(b->xz, M * 2 * E, sizeof(T)),
        a.take(b->u, M * E, sizeof(T));
    a.take(b->xdb, M * P, sizeof(T)), a.take(b->delta, M * E, sizeof(T)),
        a.take(b->g, M * E, sizeof(T));
    b->mail = &g->mail, g->mail = {};
    a.take(g->mail.words, g->mail.bytes = scan_forward_workspace(1, c->E, c->N), 1);
    return a.used;
}

#include "cuda/places.cuh"

template <class T> static EmbeddingOf<T> embedding_of(const Gpu *g) {
    return {g->w.embedding, g->config.D, g->unpacking.bits};
}

// logits (rows,V) of the normed xn (rows,D)
template <class T> static void head_product(Gpu *g, float *logits, const T *xn, int rows) {
    Device *d = &g->device;
    const int V = g->config.V, D = g->config.D;
    const Unpacking &u = g->unpacking;
    if constexpr (std::is_same<T, bf16>::value)
        if (u.bits && rows <= THIN_MAX && D % 8 == 0) {
            thin_or_packed(d, u.bits, PlainSource{xn}, LogitSink{logits}, g->w.head, rows, V, D, 1);
            return check_launch(d, "head");
        }
    // What the scratch holds of a quantised head, in rows of whole tiles.
    const int most = u.bits ? (int)(std::min(u.elements / D, (size_t)V + TILE) / TILE * TILE) : V;
    const size_t row_of_tiles =
        (size_t)((D + TILE - 1) / TILE) * (2 * TILE + (size_t)u.bits * TILE * TILE / 8);
    for (int v = 0; v < V; v += most) {
        const int n = std::min(most, V - v);
        const char *W = (const char *)g->w.head + (u.bits ? v / TILE * row_of_tiles : 0);
        matmul(d, Rows(logits + v, V), Rows((T *)xn, D), dense<T>(d, u, W, n, D), rows, n, D);
    }
}

// The network for B sequences of L tokens whose ids are on the device: B = 1 (a piece of text) or
// L = 1 (a step of S = B). ids NULL: res has the embeddings already. The normed residual stream
// ends in xn.
template <class T> static void network(Gpu *g, const int32_t *ids, int B, int L) {
    Device *d = &g->device;
    const Config *c = &g->config;
    BlockActs<T> a = acts_of<T>(g);
    if (ids) embed(d, g->res, ids, embedding_of<T>(g), B * L);
    for (int layer = 0; layer < c->n_layer; layer++)
        block(d, c, &g->w.layer[(size_t)layer], a,
              {g->res, g->res, B, L, window_of(g, layer), h_of(g, layer), false});
    norm_rows(d, Rows(a.xn, c->D), Rows(g->res, c->D), g->w.norm_f, g->w.norm_f_bias, c->norm_eps,
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
        copy(d, g->ids, ids + done, (size_t)L * sizeof *ids, "ids");
        network<T>(g, g->ids, 1, L);
        T *xn = acts_of<T>(g).xn;
        for (int t = 0; t < L && visit; t += g->logit_rows) {
            int rows = std::min(g->logit_rows, L - t);
            head_product(g, g->logits, xn + (size_t)t * D, rows);
            copy(d, host.data(), g->logits, (size_t)rows * V * sizeof(float), "logits");
            if (finish(d)) return -1;
            for (int r = 0; r < rows; r++) visit(context, host.data() + (size_t)r * V);
        }
        done += (size_t)L;
        if (done == n) head_product(g, g->one.logits, xn + (size_t)(L - 1) * D, 1);
    }
    return finish_scans(d);
}

// Reads n tokens, ids below V, into the state of the one sequence. visit, if not NULL, gets the
// logits (V) of every position. 0, or -1 with a sentence.
static int gpu_prefill(Gpu *g, const int32_t *ids, size_t n, void (*visit)(void *, const float *),
                       void *context) {
    device_use(&g->device);
    if (check_tokens(ids, n, g->config.V)) return -1;
    g->at = &g->one;
    return g->bf16_compute  ? prefill<bf16>(g, ids, n, visit, context)
           : g->f16_compute ? prefill<f16>(g, ids, n, visit, context)
                            : prefill<float>(g, ids, n, visit, context);
}

#include "cuda/open.cuh"

// ------------------------------------------------------------------------------------------------
// 7 Generation: a step, its graph
// A step draws a token for each of S sequences from its logits and reads it, so ids never wait for
// the host: they are collected on the device and fetched after some steps. The whole step is one
// graph, captured once for each S and kind of sampling.

#include "cuda/sampling.cuh"
#include "cuda/step_one_hopper.cuh"
#include "cuda/step_one_packed.cuh"
#include "cuda/step_many_hopper.cuh"

#include "cuda/generate.cuh"
#include "cuda/texts.cuh"

// ------------------------------------------------------------------------------------------------
// 8 What mamba.c calls
// Training, measuring, and the table of GpuBackend.

#include "cuda/train.cuh"
#include "cuda/bench.cuh"

extern "C" const GpuBackend mamba_gpu = {
    gpu_error,           gpu_open,        gpu_close,         gpu_set_state,
    gpu_get_state,       gpu_prefill,     gpu_gather,        gpu_generate_start,
    gpu_generate,        GENERATE_MAX,    gpu_trainer_open,  gpu_trainer_close,
    gpu_trainer_resize,  gpu_trainer_set, gpu_trainer_get,   gpu_train_pass,
    gpu_train_step,      gpu_measure,     gpu_time_scan,     gpu_step_form,
    gpu_places,          gpu_place_begin, gpu_place_move,    gpu_places_sampling,
    gpu_places_generate, gpu_step,        gpu_texts,         gpu_score,
    gpu_read_prompts,    gpu_pretend,     gpu_trainer_chunk, gpu_trainer_carry,
    gpu_trainer_states};
