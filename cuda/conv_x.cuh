// conv_x.cuh - [train] the convolution and x_proj in one kernel, in bf16. Included by mamba_cuda.cu.
//
// u = silu(conv(x)) is written and goes to x_proj's product from shared memory, not by way of device
// memory. A block takes 64 steps and goes through the channels, 128 at a time, as two teams of 4
// warps with 64 channels each; a warp has 16 steps, a lane two channels. The teams' sums of xdb meet
// at the end. The next channels are on their way while these are computed.

enum { CONV_X_STEPS = 64, CONV_X_LANES = 64, CONV_X_TEAMS = 2, CONV_X_PART = 16 };

struct ConvX {
    bf16 *u;             // (B*L,E)
    bf16 *xdb;           // (B*L,P)
    const bf16 *x;       // rows of ld
    const bf16 *W;       // (P,E)
    const float *conv_t; // (K,E)
    const float *bias;   // (E) or NULL
    float *window;       // (B,K-1,E), moves on; NULL: zeros before the first token
    int ld, L, E, tiles; // tiles: of CONV_X_STEPS, of a sequence
};

template <int PARTS> struct ConvXShared { // P = 16 PARTS; 16 bytes more a row: no bank conflicts
    enum { P = 16 * PARTS, LANES = CONV_X_LANES * CONV_X_TEAMS, ROW = 2 * LANES, PITCH = ROW + 16,
           U_PITCH = 2 * CONV_X_LANES + 16 };
    struct {
        unsigned char x[(CONV_X_STEPS + CONV_TAPS - 1) * ROW];
        unsigned char W[P * PITCH];
    } stage[2];
    unsigned char u[4 * CONV_X_TEAMS][CONV_X_PART * U_PITCH]; // of a warp
};

template <int PARTS>
__global__ void __launch_bounds__(128 * CONV_X_TEAMS, 2) conv_x_kernel(ConvX p) {
    typedef ConvXShared<PARTS> Shared;
    enum { P = Shared::P, LANES = Shared::LANES, ROW = Shared::ROW, PITCH = Shared::PITCH,
           U_PITCH = Shared::U_PITCH, THREADS = 128 * CONV_X_TEAMS, K = CONV_TAPS, HALO = K - 1 };
    extern __shared__ float4 shared_floats[];
    Shared &s = *(Shared *)shared_floats;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, team = warp / 4, part = warp % 4,
              t0 = blockIdx.x % p.tiles * CONV_X_STEPS, L = p.L, E = p.E;
    const size_t row0 = (size_t)(blockIdx.x / p.tiles) * L;
    const bf16 *x = p.x + row0 * p.ld;
    auto load = [&](int e0, int turn) {
        for (int i = tid; i < (CONV_X_STEPS + HALO) * (ROW / 16); i += THREADS) {
            const int t = t0 - HALO + i / (ROW / 16);
            const bool is = t >= 0 && t < L;
            copy_16_or_zero(shared_address(s.stage[turn].x) + i * 16,
                            x + (size_t)(is ? t : 0) * p.ld + e0 + i % (ROW / 16) * 8, is);
        }
        for (int i = tid; i < P * (ROW / 16); i += THREADS)
            copy_16(shared_address(s.stage[turn].W) + i / (ROW / 16) * PITCH + i % (ROW / 16) * 16,
                    p.W + (size_t)(i / (ROW / 16)) * E + e0 + i % (ROW / 16) * 8);
        copies_end_group();
    };
    wait_for_input();
    load(0, 0);
    float sum[2 * PARTS][4] = {};
    const int t = t0 + part * CONV_X_PART;
    bf16 *u_row = p.u + (row0 + t) * E + team * CONV_X_LANES + 2 * lane;
    const float *window = p.window ? p.window + (size_t)(blockIdx.x / p.tiles) * HALO * E : NULL;
    const uint32_t u_at = shared_address(s.u[warp]);
    for (int e0 = 0, turn = 0; e0 < E; e0 += LANES, turn ^= 1) {
        const int e = e0 + team * CONV_X_LANES + 2 * lane;
        Group<float, 2> tap[K], start = {};
        if (p.bias) start = *(const Group<float, 2> *)(p.bias + e);
#pragma unroll
        for (int k = 0; k < K; k++) tap[k] = *(const Group<float, 2> *)(p.conv_t + (size_t)k * E + e);
        if (e0 + LANES < E) load(e0 + LANES, turn ^ 1);
        else copies_end_group();
        copies_wait<1>();
        __syncthreads();
        const unsigned char *x_row =
            s.stage[turn].x + part * CONV_X_PART * ROW + team * 2 * CONV_X_LANES + lane * 4;
        Group<float, 2> past[K];
#pragma unroll
        for (int k = 0; k < HALO; k++) {
            const uint32_t two = *(const uint32_t *)(x_row + k * ROW);
            past[k + 1].v[0] = low_half(two), past[k + 1].v[1] = high_half(two);
            if (window && t == 0)
                past[k + 1] = *(const Group<float, 2> *)(window + (size_t)k * E + e);
        }
#pragma unroll
        for (int i = 0; i < CONV_X_PART; i++) {
            const uint32_t two = *(const uint32_t *)(x_row + (i + HALO) * ROW);
#pragma unroll
            for (int k = 0; k < HALO; k++) past[k] = past[k + 1];
            past[HALO].v[0] = low_half(two), past[HALO].v[1] = high_half(two);
            const Group<float, 2> c = conv_sum<K>(start, tap, past);
            const uint32_t u = pack(silu(c.v[0]), silu(c.v[1]));
            *(uint32_t *)(s.u[warp] + i * U_PITCH + lane * 4) = u;
            if (t + i < L) *(uint32_t *)(u_row + (size_t)i * E) = u;
        }
        u_row += LANES;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < CONV_X_LANES / 16; k++) {
            uint32_t a[4];
            load_matrices(a, u_at + lane % 16 * U_PITCH + k * 32 + lane / 16 * 16);
#pragma unroll
            for (int j = 0; j < PARTS; j++) {
                uint32_t w[4];
                load_matrices(w, shared_address(s.stage[turn].W) +
                                     (j * 16 + lane % 8 + lane / 16 * 8) * PITCH +
                                     team * 2 * CONV_X_LANES + k * 32 + lane / 8 % 2 * 16);
                tensor_product(sum[2 * j], a[0], a[1], a[2], a[3], w[0], w[1]);
                tensor_product(sum[2 * j + 1], a[0], a[1], a[2], a[3], w[2], w[3]);
            }
        }
        __syncthreads(); // before these places are filled again
    }
    // The second team's sums, thread by thread.
    float *others = (float *)shared_floats + tid % 128;
    if (team)
#pragma unroll
        for (int i = 0; i < 8 * PARTS; i++) others[i * 128] = sum[i / 4][i % 4];
    __syncthreads();
    if (team) return;
#pragma unroll
    for (int j = 0; j < 2 * PARTS; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = t + lane / 4 + 8 * half, at = j * 4 + 2 * half;
            if (row < L)
                *(uint32_t *)(p.xdb + (row0 + row) * P + j * 8 + lane % 4 * 2) =
                    pack(sum[j][2 * half] + others[at * 128],
                         sum[j][2 * half + 1] + others[(at + 1) * 128]);
        }
}

// Whether the kernel serves this shape, and fills the GPU well enough.
static bool conv_x_serves(const Device *d, int B, int L, int E, int P, int K) {
    const int tiles = (L + CONV_X_STEPS - 1) / CONV_X_STEPS;
    return K == CONV_TAPS && E % (CONV_X_LANES * CONV_X_TEAMS) == 0 && (P == 80 || P == 96) &&
           8 * (size_t)B * tiles >= (size_t)d->processors;
}
static void conv_x(Device *d, ConvX p, int B, int P) {
    p.tiles = (p.L + CONV_X_STEPS - 1) / CONV_X_STEPS;
    check_cuda(d,
               launch_dependent(d, P == 80 ? conv_x_kernel<5> : conv_x_kernel<6>,
                                (unsigned)(B * p.tiles), 128 * CONV_X_TEAMS,
                                P == 80 ? sizeof(ConvXShared<5>) : sizeof(ConvXShared<6>), p),
               "conv_x");
    if (!p.window) return;
    conv_window_kernel<<<(unsigned)B * blocks_for((size_t)p.E, 128), 128, 0, d->stream>>>(
        p.window, p.x, p.L, p.E, CONV_TAPS);
    check_launch(d, "conv_x");
}
