// clang-format off
/* mamba_cuda.cu - the GPU backend of mamba.c, chosen at build time by `make cuda`.

   What it is: the same model, the same files and the same steps as mamba.c, on the device. cuBLAS
   computes the products of texts and of training; the kernels of a step mostly have their own. The
   scan, which no library has, is what this file is about.
   What it is not: a second definition. mamba.c says what is computed. scan_plain is its
   recurrence() in the simplest way for a GPU. Names are those of mamba.c's glossary, but T is also
   a type and S a number of sequences, or of warps in a drawing. block() is a layer.

   A LANE IS A CHANNEL (or 2 or 4 neighbours). The paper's kernel gives one channel of one sequence
   to a block, whose threads stand along time: each runs a few steps and leaves a pair (a,b), the
   product of its decays and its end state from h = 0. A parallel scan joins two pairs, (a1,b1) and
   the later (a2,b2), to (a1 a2, a2 b1 + b2), for every state. Here a lane is a channel and walks
   through time with h in registers: the recurrence is the plain loop, one multiply-add a step, no
   pair is joined across lanes, and 32 channels share each B_ssm and C_ssm that is loaded. The price
   is parallelism: it takes many channels to fill a GPU. Where there are few, scan_tiles gives 16
   steps to a warp and 64 to a block; warps join their pairs, blocks hand the state on. A tile is a
   stretch of time: 16 steps in scan_walk, 32 in scan_relay and scan_back, 64 in scan_tiles.

   WHERE h GOES, in the kernels that do only the scan. An arrow is a load or a store; x2: two
   buffers, of this tile and of its neighbour. Some of A_neg, D_skip and dt_bias, which every form
   but scan_plain loads once, are left out. The states of all times, (B,L,N,E), never exist.
     device memory                  shared memory                    registers of a lane
   ---------------------------------------------------------------------------------------------
   scan_plain: the reference; only checks run it. A thread is a channel; one step after the other.
     delta_raw, u, z, B_ssm, C_ssm  --------------------------->     decay, inject, y
     h (N)  <-------------------------------------------------->     one state at a time
   ---------------------------------------------------------------------------------------------
   scan_step: one token. The 1 or 4 warps of a block share the states of 32 or 128 channels. Most
   steps run in kernels that do more than the scan, with the same recurrence: see section 7.
   scan_step is for what fits none of them.
     delta_raw, u, B_ssm, C_ssm  ------------------------------>     decay, inject
     h (N)  <-------------------------------------------------->     one state at a time
     z  ------------------------------------------------------->     gate
     g  <-----------------------    y of each warp  <-----------     y
   ---------------------------------------------------------------------------------------------
   scan_walk: texts of up to 128 tokens with N = 8, 16, 32 or 64, and longer ones of many channels
   with N = 32 or 64. A block is 32 channels and walks through time in tiles of 16 steps; its S
   warps share the states. h stays in registers from the first step to the last.
     delta_raw, u  ------------>    delta, delta*u (32,16) x2   ->   4 steps at a time
     B_ssm, C_ssm  ------------>    B, C (N,16) x2  ------------>    4 steps at a time
     h0, h_final, h_starts  <----------------------------------->    h (N/S)
     z  ------------------------------------------------------->     gate of the warp's rows
     g  <-----------------------    y of each warp (S,32,16) x2  <-  y of 4 steps
   ---------------------------------------------------------------------------------------------
   scan_relay: long texts of many channels, N = 8 or 16. A block is 32 or 64 channels; its 4 warps
   take turns of 8 steps. A warp does all states of its turn, a quarter at a time, then hands the
   quarter to the next warp: h goes through shared memory between turns.
     delta_raw, u, z  ------------------------------------------>    delta, delta u, y of 8 steps
     B_ssm, C_ssm  ------------>    B, C (N,8) of each warp  --->    4 steps at a time
                                    A_neg (N)  ----------------->    a quarter
     h0  ---------------------->    h (N) of warp w - 1  ------->    h (N/4)
     h_starts  <-------------------------------------------------    h at every 32nd step
     h_final  <-----------------    h (N) of warp w  <-----------    h after 8 steps
     g  <--------------------------------------------------------    gate of 8 steps
   ---------------------------------------------------------------------------------------------
   scan_tiles: long texts of few channels, or any other N. A block is 32 or 64 channels and one tile
   of 64 steps, a warp 16 of them. For each state, a warp runs its 16 steps from h = 0, joins the
   state before the tile and the results of the warps before it to get its true h, and runs the
   steps again. The true h passes from tile to tile through a mailbox in device memory. Tiles take
   numbers, the tickets, as their blocks start, so a tile waits only for one that already runs
   (exchange.cuh).
     delta_raw, u  --------------------------------------------->    delta, delta u, y of 16 steps
     B_ssm, C_ssm, A_neg  ----->    16 states of a tile  ------->    one state at a time
                                    (16 decays, end)     <------     16 decays, kept for run two
     h0, mail of tile i - 1  -->    h before the tile  --------->    h before the warp
     mailbox of tile i  <----------------------------------------    h after the last warp
     h_starts  <-------------------------------------------------    h at every 32nd step
     h_final  <--------------------------------------------------    h after the last step
     z  ----------------------->    z  ------------------------->    gate
     g  <--------------------------------------------------------    y
   ---------------------------------------------------------------------------------------------
   scan_back: the backward. A block is 32 or 64 channels and walks backward through a segment of
   time in tiles of 32 steps, pieces of 8; its 4 warps (8 or 16 for N > 16) share the states. h
   is computed again from the state that the forward saved every 32 steps; d_h stays in
   registers. For N > 32 a launch does 64 states, or 32 where shared memory is short. Where there
   are many channels, all time is one segment. Where there are few, scan_back_ends first computes
   what each later segment adds to d_h, from d_h = 0, and the blocks join that.
     delta_raw, u, z, d_g  ---->    delta, delta u, u, d_y,  --->    those of 8 steps
                                    slope of softplus,
                                    d_g silu'(z), of 32 steps
     B_ssm, C_ssm  ------------>    B, C (N,32)  --------------->    8 steps of a state
     h_starts  ---------------->    h before each piece (N)  <-->    8 h and 8 decays of a state
     d_h_final, d_h0  <----------------------------------------->    d_h of the warp's states
     d_delta, d_u, d_z  <-------    3 of each warp, 16 steps  <--    sums over states
     parts of d_B, d_C  <-------    of 8 groups of lanes  <------    sums over 4 lanes (by mma)
     parts of d_A, d_D, d_bias  <-  d_D, d_bias of each warp  <-     sums over steps
   A part is one block's; scan_back_sum_BC and scan_back_sum_A add the parts in order.
   ---------------------------------------------------------------------------------------------

   PRECISION. T is the type of matrices and of activations between kernels: float, bf16, or, where a
   file has such weights, f16. The residual stream, h, delta after softplus, A, every sum and the
   loss are float32 in all, and so are the trainer's weights and moments; only the terms of d_B and
   d_C are cut to TF32 where T has 16 bits. An activation beyond 65,504 is infinite in f16, and the
   logits are then no numbers, which ends a text with an error.

   CONTENTS. This file:                            What it includes from cuda/, where it is needed:
     1 the scan: arguments, arithmetic, reference    device.cuh      errors, memory, launches, sums
                                                     exchange.cuh    how blocks tell each other
     2 the scan of one token
     3 the scan of a text, and which form runs       scan_relay.cuh, scan_tiles.cuh
     4 the scan's backward                           scan_backward.cuh
     5 the model: weights, block                     layers.cuh      embedding, norm, conv, loss
                                                     conv_back.cuh   backward of conv and x_proj
                                                     padding.cuh     prompts of different lengths
                                                     products.cuh    matrix products
                                                     quantized.cuh   matrices of 8 and 4 bits
                                                     step_portable.cuh, step_packed.cuh
                                                                     a token on any GPU
     6 the model on the device, its state, prefill   places.cuh      several sequences
                                                     open.cuh        memory for a model, its loading
     7 generation: a step, its graph; texts          generate.cuh    which step runs, bursts
                                                     sampling.cuh    the next token
                                                     step_one_hopper.cuh, step_one_packed.cuh
                                                                     one sequence, one kernel
                                                     step_many_hopper.cuh    2 to 64, one kernel
                                                     texts.cuh       scores, prompts side by side
     8 what mamba.c calls                            train.cuh       pass and AdamW
                                                     ranks.cuh       several cards (NCCL=1)
                                                     bench.cuh       times, the scan's check
   What only training needs is headed [train]. */
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
#include <chrono>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

typedef __nv_bfloat16 bf16;
typedef __half f16;

#include "cuda/device.cuh"

// ------------------------------------------------------------------------------------------------
// 1 The scan: arguments, arithmetic, reference
//     delta = softplus(delta_raw + dt_bias)      h_t = exp(delta A_neg) h_{t-1} + delta B_ssm u
//     g = silu(z) (sum over n of C_ssm h_t + D_skip u)
//
// A form for texts reads a row of delta_raw, u and z once and writes a row of g once: 4 elements a
// token and channel, 8 bytes in bf16. B_ssm and C_ssm come once per 32 or 64 channels, mostly from
// L2. Bytes are not the limit. A multiprocessor has special-function units for 16 results a clock,
// and the 16 decays a token and channel of N = 16 take twice the time of the bytes in bf16 (H100).
// So do the instructions around them.
//   - A_neg is scaled by log2(e) once. A decay is one multiplication and one ex2, computed once.
//   - softplus is one ex2 and a polynomial; two gates share one reciprocal. That makes 18.5 special
//     functions a token and channel instead of 20.
//   - The address of a row is one multiply-add (row_at). 64-bit indices and clamps add a third
//     to scan_walk's time (660 us instead of 499 in one shape).
// With one channel a lane a row's loads are contiguous, so all alignments take one path. Two
// channels a lane need aligned pairs.

enum { SCAN_SAVE = 32 }; // h_starts holds the state before each step t with t % SCAN_SAVE = 0

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

// log1p(e) / e for e in [0,1]: a polynomial of degree 8, off by 3e-8 at most, or, where inputs have
// 16 bits, of degree 6, off by 1.3e-6. log(1 + e) would lose a small e.
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
// The same of rows ld elements apart: i sizeof(T) times ld. Where i is a constant, i sizeof(T) is
// one too.
template <typename T> __device__ __forceinline__ T *row_at(T *p, int i, int ld) {
    return row_at_bytes(p, i * (int)sizeof(T), ld);
}

// R neighbouring floats, in one load or store.
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
// neighbouring channels; with 4 its accesses are of 16 bytes. The WARPS of a block share the
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
        return scan_step_launch<T, 4, 4>(d, p); // few channels: more warps hide latency
    return scan_step_launch<T, 4, 1>(d, p);     // many: no sums across warps
}

// ------------------------------------------------------------------------------------------------
// 3 The scan of a text, and which form runs
// The walk: a block is 32 channels of a sequence and goes through time in tiles of 16 steps. Its
// WARPS share the states of a channel, STATES each, in registers. Softplus, conversions and the
// gate are the same for all states, so the warps share the rows of a tile for those. Between two
// barriers a warp prepares its rows of tile i + 1, does its states of tile i and gates its rows of
// tile i - 1: loads are in flight for the time of a tile, and the units for states, conversions and
// memory are all busy. Rows in shared memory are STEPS + 4 floats long, so that the 16-byte
// accesses of 8 neighbouring lanes fall into 32 different banks. UNROLL: of the loop over groups of
// 4 steps. MIN_BLOCKS, blocks a multiprocessor, limits the registers.

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

// Which form runs for a text. Few channels: so many blocks of 32 channels for each multiprocessor.
//     N           up to 128 steps   longer, few channels   longer, many   few channels
//     8, 16       walk              tiles                  relay          below 0.9, or 1 to 1.35
//     32, 64      walk              tiles                  walk           below 1.5
//     any other   tiles             tiles                  tiles
// Why: on an H100, bf16, N = 16, 2,048 steps, a relay takes as long as the multiprocessor with most
// blocks: 88 us for one block, 134 for two, 187 for three. Tiles spread over all multiprocessors
// and need 0.76 us for a block of 32 channels. With two channels a lane the relay does a block of
// 64 channels in 0.9 of the time of two blocks of 32, but its blocks spread less evenly: 192 blocks
// over 132 multiprocessors are two for some. Tiles gain 4 to 8% by two channels a lane, where there
// are 12 tiles for each multiprocessor. With N = 16 and one channel a lane, a relay has 168
// registers a thread up to 3 blocks a multiprocessor, else 128. Shape, type, alignment and machine
// alone decide, so every run gives the same bits.
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
// The plain form comes first; cuda/scan_backward.cuh has the one that runs. Neither keeps the
// states of all times: each computes them again from those that the forward saved, the last stretch
// first.

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
template <typename T = float> __device__ __forceinline__ float softplus(float x, float &slope) {
    const float e = exp2_fast(-LOG2E * fabsf(x)), r = rcp_fast(1.f + e);
    slope = x < 0.f ? e * r : r;
    return fmaf(e, log1p_ratio<T>(e), fmaxf(x, 0.f));
}

// The reference, for any N: a thread is a channel. It takes the stretches of SCAN_SAVE steps from
// the last to the first, and in each one state after the other: forward, then backward. p.d_h0,
// which holds d_h, must be given; d_B, d_C (B*L,N) are added to. Sums over channels are atomic, so
// their last bits differ from run to run. dev/scan_backward.cu compares it with float64, and the
// fast form with both.
template <typename T> __global__ void scan_plain_back(ScanBackArgs<T> p, float *d_B, float *d_C) {
    const int e = blockIdx.y * blockDim.x + threadIdx.x, L = p.L, E = p.E, N = p.N;
    const size_t b = blockIdx.x, saves = (L + SCAN_SAVE - 1) / SCAN_SAVE;
    if (e >= E) return;
    float h[SCAN_SAVE + 1], sum_A[SCAN_SAVE], sum_B[SCAN_SAVE], y[SCAN_SAVE], slope;
    auto delta_at = [&](size_t row, float &slope) {
        return softplus(value(p.delta_raw[row * p.ld_delta + e]) + p.dt_bias[e], slope);
    };
    for (int save = (int)saves - 1; save >= 0; save--) {
        const int first = save * SCAN_SAVE, steps = min(SCAN_SAVE, L - first);
        const size_t row0 = b * L + first;
        for (int k = 0; k < steps; k++) sum_A[k] = sum_B[k] = y[k] = 0.f;
        for (int n = 0; n < N; n++) {
            const size_t at = (b * N + n) * E + e;
            const float A = p.A_neg[(size_t)n * E + e];
            float d_A = 0.f, d_h = save + 1 < saves ? p.d_h0[at]
                                   : p.d_h_final    ? p.d_h_final[at]
                                                    : 0.f;
            h[0] = p.h_starts[((b * saves + save) * N + n) * E + e];
            for (int k = 0; k < steps; k++) {
                const size_t row = row0 + k;
                const float delta = delta_at(row, slope), u = value(p.u[row * p.ld_u + e]);
                h[k + 1] = expf(delta * A) * h[k] + delta * value(p.B_ssm[row * p.ld_B + n]) * u;
            }
            for (int k = steps - 1; k >= 0; k--) {
                const size_t row = row0 + k;
                const float delta = delta_at(row, slope), u = value(p.u[row * p.ld_u + e]),
                            B = value(p.B_ssm[row * p.ld_B + n]),
                            C = value(p.C_ssm[row * p.ld_C + n]),
                            d_y = value(p.d_g[row * p.ld_d_g + e]) *
                                  silu(value(p.z[row * p.ld_z + e]));
                d_h += d_y * C;
                sum_B[k] += d_h * B, y[k] += C * h[k + 1];
                atomicAdd(d_B + row * N + n, d_h * delta * u);
                atomicAdd(d_C + row * N + n, d_y * h[k + 1]);
                d_h *= expf(delta * A);
                const float d_log = d_h * h[k];
                sum_A[k] += d_log * A, d_A += d_log * delta;
            }
            p.d_h0[at] = d_h;
            atomicAdd(p.d_A_log + (size_t)e * N + n, d_A * A);
        }
        for (int k = 0; k < steps; k++) {
            const size_t row = row0 + k;
            const float delta = delta_at(row, slope), u = value(p.u[row * p.ld_u + e]),
                        z = value(p.z[row * p.ld_z + e]), d_g = value(p.d_g[row * p.ld_d_g + e]),
                        s = sigmoid(z), d_y = d_g * z * s,
                        d_raw = (sum_A[k] + u * sum_B[k]) * slope;
            p.d_delta_raw[row * p.ld_d_delta + e] = to<T>(d_raw);
            p.d_u[row * p.ld_d_u + e] = to<T>(delta * sum_B[k] + p.D_skip[e] * d_y);
            p.d_z[row * p.ld_d_z + e] =
                to<T>(d_g * (y[k] + p.D_skip[e] * u) * s * (1 + z * (1 - s)));
            atomicAdd(p.d_dt_bias + e, d_raw), atomicAdd(p.d_D_skip + e, d_y * u);
        }
    }
}

#include "cuda/scan_backward.cuh"

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
// The file's tensors are copied as they lie; matrices of another type than T are converted once. Q8
// and Q4 stay quantised, their words in another order (quantized.cuh), except dt_proj.

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
    w->layer.resize((size_t)c->n_layer);
// A matrix is what TENSORS_LAYER stores as c->type, so #type begins with a c.
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

struct Converted { // a matrix that has another type on the device
    void *to;
    const Tensor *from;
};
struct Run { // tensors of the file that the device has as they are, side by side
    char *to;
    const char *from;
    size_t bytes;
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
    char *work;                       // what comes and goes: see lay_out_acts()
    const void *work_of;              // whose numbers must stay there for now, see solo_prepare()
    size_t solo_bytes;                // of a one-kernel step: solo_packed_bytes(), asked once
    std::vector<Run> runs;            // what is copied from the file
    std::vector<PackedPlace> packed;  // the matrices that are quantised
    std::vector<Converted> converted; // those of another type
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

// For a pass, which overwrites what was there.
template <class T> static BlockActs<T> acts_of(Gpu *g) {
    const BlockActs<float> &a = g->acts;
    g->work_of = NULL;
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
static size_t solo_packed_bytes(const Gpu *g);
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

// What block() is applied to. window and h move on; with lengths they are only written. They may be
// given where B = 1 (a text), where L = 1 (a step), in training, and with lengths.
struct BlockRun {
    float *out;       // (B*L,D) = res + block(res)
    const float *res; // (B*L,D), may be out
    int B, L;         // sequences, tokens of each
    float *window;    // (B,K-1,E); NULL: zeros before the first token
    float *h;         // (B,N,E); NULL: from zero
    bool text;        // training: B texts from window and h; with L = 1 texts of one token
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
    const bool step = L == 1 && h && !run.text && !run.lengths; // else texts, maybe of one token
    norm_rows(d, Rows(a.xn, D), Rows(res, D), w->norm, w->norm_bias, c->norm_eps, rows, D);
    // A matrix in bits is unpacked into an array that is free at that moment.
    const Unpacking &bits = a.unpacking;
    project(d, Rows(a.xz, 2 * E), Rows(a.xn, D), w->in_proj, rows, 2 * E, D, bits, a.u, bits.end);
    add_bias(d, a.xz, 2 * (size_t)E, (const float *)w->in_bias, rows, 2 * E);
    float *window = run.lengths ? NULL : run.window;
    conv1d_silu(d, ConvArgs<T>{a.u, a.xz, window, w->conv_t, conv_bias, B, L, E, K, run.text});
    if (run.lengths) text_windows(d, run.window, a.xz, run.lengths, B, L, E, K);
    project(d, Rows(a.xdb, P), Rows(a.u, E), w->x_proj, rows, P, E, bits, a.delta, bits.end);
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
    // Adds to res. Between a.xz and a.g there is room to unpack out_proj.
    if (out == res)
        project(d, Rows(out, D), Rows(a.g, E), w->out_proj, rows, D, E, bits, a.xz, a.g, true);
    else matmul_onto(d, out, res, a.g, (const T *)w->out_proj, rows, D, E);
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

// What gpu_open() takes for the weights: room for the file's tensors, or, where a matrix needs
// another type, for its converted copy. base NULL: only counts.
template <class T> static size_t lay_out_weights(Gpu *g, const Model *m, char *base) {
    const Config *c = &m->config;
    const Type compute = sizeof(T) == 4 ? F32 : std::is_same<T, bf16>::value ? BF16 : F16;
    const std::vector<TensorPlace> places = tensor_places(m, &g->w);
    const char *end = (const char *)m->embedding.data + m->tensors_bytes;
    Arena a = {base, 0};
    g->unpacking.bits = c->type == Q8 ? 8 : c->type == Q4 ? 4 : 0;
    g->runs.clear(), g->packed.clear(), g->converted.clear();
    bool runs = false; // the tensor before this one is the last of a run
    for (size_t i = 0; i < places.size(); i++) {
        const TensorPlace &p = places[i];
        const char *from = (const char *)p.host->data,
                   *next = i + 1 < places.size() ? (const char *)places[i + 1].host->data : end;
        const bool packed = p.host->type >= Q8 && strcmp(p.name, "dt_proj");
        if (p.matrix && p.host->type != compute && !packed) {
            T *to;
            a.used = (a.used + 255) / 256 * 256, runs = false;
            a.take(to, (size_t)p.host->rows * (size_t)p.host->cols);
            g->converted.push_back({to, p.host}), *p.device = to;
            continue;
        }
        char *to = base ? base + a.used : NULL;
        if (!runs) g->runs.push_back({to, from, 0}), runs = true;
        if (packed) g->packed.push_back({p.device, p.host->rows, p.host->cols});
        g->runs.back().bytes += (size_t)(next - from), a.used += (size_t)(next - from);
        *p.device = to;
    }
    if (c->flags & FLAG_TIED) g->w.head = g->w.embedding;
    for (LayerWeights &w : g->w.layer) w.A_neg = (float *)w.A_log, w.conv_t = (float *)w.conv;
    return a.used;
}

// A matrix from the file as T, by way of g->work.
template <class T> static void convert_matrix(Gpu *g, T *to, const Tensor *from) {
    Device *d = &g->device;
    const int rows = from->rows, cols = from->cols, bits = g->unpacking.bits;
    const size_t n = (size_t)rows * (size_t)cols, width = from->type == F32 ? 4 : 2;
    if (from->type >= Q8) {
        copy(d, g->work, from->data, tiles_bytes(bits, rows, cols), "weights");
        arrange(d, g->work, bits, rows, cols);
        return unpack(d, to, g->work, bits, rows, cols);
    }
    const size_t most = (size_t)((const char *)g->unpacking.end - g->work) / width;
    for (size_t done = 0; done < n; done += most) {
        const size_t now = std::min(most, n - done);
        copy(d, g->work, (const char *)from->data + done * width, now * width, "weights");
        if (from->type == F32) convert(d, to + done, (const float *)g->work, now);
        else if (from->type == BF16) convert(d, to + done, (const bf16 *)g->work, now);
        else convert(d, to + done, (const uint16_t *)g->work, now);
    }
}

// After the file's tensors are there: the other types, and what is derived, which takes the place
// of what it comes from.
template <class T> static int convert_weights(Gpu *g) {
    Device *d = &g->device;
    const Config *c = &g->config;
    const size_t A_floats = (size_t)c->E * (size_t)c->N, conv_floats = (size_t)c->E * (size_t)c->K;
    for (const PackedPlace &p : g->packed) arrange(d, *p.device, g->unpacking.bits, p.rows, p.cols);
    for (const Converted &p : g->converted) convert_matrix(g, (T *)p.to, p.from);
    for (const LayerWeights &w : g->w.layer) {
        LayerWeights there = w;
        there.A_neg = (float *)g->work, there.conv_t = there.A_neg + A_floats;
        derive(d, c, &there);
        copy(d, w.A_neg, there.A_neg, A_floats * sizeof(float), "derive");
        copy(d, w.conv_t, there.conv_t, conv_floats * sizeof(float), "derive");
    }
    return finish(d);
}

static int places_open(Gpu *g, Places *p, int S);
static void places_free(Places *p);
static void texts_free(Texts *x);
static void generation_free(Generation *n);

// A dense copy of quantised matrices, where memory holds it: for more than THIN_MAX sequences,
// where arithmetic counts and not bytes, and in 8 bits for the one-kernel steps, which need bf16.
// The copy stays. Without the memory nothing changes.
template <class T> static void unpack_for_batches(Gpu *g, int spare) {
    size_t bytes = 0, free_bytes = 0, total = 0;
    for (const PackedPlace &p : g->packed) bytes += ((size_t)p.rows * p.cols + 128) * sizeof(T);
    if (!g->unpacking.bits) return;
    free_bytes = free_memory(&total);
    // States need memory, too: free memory must hold the copy spare + 1/2 times, and a GiB more.
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

// The activations of a piece. What is not needed at the same time shares its place, `work`: the
// arrays of a block, with a part of a quantised matrix that is unpacked; logits of several rows,
// with a part of the head; what a one-kernel step of one text keeps.
template <class T> static size_t lay_out_acts(Gpu *g, char *base) {
    const Config *c = &g->config;
    const size_t M = (size_t)g->piece, D = (size_t)c->D, E = (size_t)c->E,
                 P = (size_t)(c->R + 2 * c->N), V = (size_t)c->V;
    // Room to unpack all of out_proj at once, or half of in_proj.
    const size_t part = g->unpacking.bits ? (E + TILE) * D * sizeof(T) : 0;
    Arena a = {base, 0};
    BlockActs<float> *b = &g->acts;
    a.take(g->res, M * D), a.take(g->ids, M), a.take(g->targets, M), a.take(g->losses, M);
    a.take(g->likeliest, M), a.take(b->xn, M * D, sizeof(T));
    b->mail = &g->mail, g->mail = {};
    a.take(g->mail.words, g->mail.bytes = scan_forward_workspace(1, c->E, c->N), 1);
    const Arena start = a;
    Arena logits = a, solo = a, other = a;
    a.take(b->xz, M * 2 * E, sizeof(T));
    const size_t unpacked = a.used + part; // in_proj is unpacked behind xz, out_proj before g
    a.take(b->u, M * E, sizeof(T)), a.take(b->xdb, M * P, sizeof(T));
    a.take(b->delta, M * E, sizeof(T));
    a.used = std::max(a.used, start.used + part);
    a.take(b->g, M * E, sizeof(T));
    logits.take(g->logits, (size_t)g->logit_rows * V);
    solo.take(g->work, g->solo_bytes, 1);
    other.take(g->work, E * (size_t)(c->N + c->K) * sizeof(float) + tiles_bytes(8, c->E, c->R), 1);
    a.used = std::max({a.used, unpacked, logits.used + part, solo.used, other.used});
    g->unpacking.end = base ? base + a.used : NULL;
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
            thin_or_packed(d, u.bits, PlainSource{xn}, LogitSink{logits}, g->w.head,
                           {rows, V, D, 1, {}});
            return check_launch(d, "head");
        }
    // After the logits, where these are not a place's own.
    T *scratch = (T *)(logits == g->logits ? (char *)(logits + (size_t)rows * V) : g->work);
    project(d, Rows(logits, V), Rows((T *)xn, D), g->w.head, rows, V, D, u, scratch, u.end);
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
// graph, captured again where S or the kind of sampling changes. Its kernels:
//   - The draw (sampling.cuh): likeliest_kernel; bins_kernel and keep_kernel for top-k, top-p and
//     min-p, or a tiny temperature; choose_kernel, which also writes the embedding.
// Then the token is read, by the first of these that fits (generate.cuh). Names call code for sm_90
// and later "Hopper".
//   - solo_kernel (bf16), solo_packed_kernel (Q8, Q4): one sequence, all layers; sm_90 and later.
//   - wide_kernel: 2 to 64 sequences in bf16, all layers; sm_90a. Then head_product().
//   - thin_kernel (bf16, f16), packed_kernel (Q8, Q4): up to 16 sequences, any GPU. A layer is four
//     kernels: norm and in_proj (in f16 the norm by itself); convolution and x_proj;
//     thin_scan_kernel, which has dt_proj, scan and gate; out_proj. Then norm and head.
//   - block(): float32, more sequences, or sizes that thin_fits() refuses; products by cuBLAS. In
//     bf16, where it pays, dt_scan_step does dt_proj and the scan; else scan_step does the scan.
//     Then norm and head_product().
// gpu_step(), which reads given tokens, takes one of the last two, without a graph.

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
#ifdef MAMBA_NCCL
#include "cuda/ranks.cuh"
#else
static int (*const gpu_ranks)(Ranks *r) = NULL;
#endif
#include "cuda/bench.cuh"

extern "C" const GpuBackend mamba_gpu = { // in the order of files/gpu_backend.h
    gpu_error,           gpu_open,
    gpu_close,           gpu_set_state,
    gpu_get_state,       gpu_prefill,
    gpu_gather,          gpu_generate_start,
    gpu_generate,        GENERATE_MAX,
    gpu_places,          gpu_place_begin,
    gpu_place_move,      gpu_places_sampling,
    gpu_places_generate, gpu_step,
    gpu_texts,           gpu_score,
    gpu_read_prompts,    gpu_trainer_open,
    gpu_trainer_close,   gpu_trainer_resize,
    gpu_trainer_set,     gpu_trainer_get,
    gpu_trainer_chunk,   gpu_trainer_carry,
    gpu_trainer_states,  gpu_train_pass,
    gpu_train_step,      gpu_ranks,
    gpu_measure,         gpu_time_scan,
    gpu_step_form,       gpu_pretend};
