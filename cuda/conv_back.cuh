// conv_back.cuh - [train] backward of x_proj and of the convolution in one kernel, in bf16.
// Included by mamba_cuda.cu.
//
// As three steps they move d_u three times, x and u once each and d_x once:
//     d_u += d_xdb W_x      d_W_x += d_xdb^T u      d_x, d_conv from d_u and x (layers.cuh)
// Here a block takes 64 channels and walks through a segment of time, its later tiles of 64 steps
// first. A warp has 16 steps of a tile; a lane is two channels.
//   1 d_xdb W_x of 16 steps and 64 channels on the tensor cores, then to the lanes;
//   2 c, u and d_c of the 16 steps; u goes to shared memory, d_c of the first 3 steps too;
//   3 d_x of the 16 steps, with d_c of the 3 steps after them;
//   4 d_W_x of 16 channels, over the 64 steps, on the tensor cores.
// d_u is read once and not written, u is computed again from x. Before the last tile of a segment,
// 16 steps of the segment after it give the d_c that reach back.

enum { BACK_LANES = 64, BACK_TILE = 64, BACK_WARPS = 4, BACK_PART = 16, BACK_TAPS = 4 };

struct ConvBack {
    bf16 *d_x;           // rows of ld
    float *d_taps;       // (B*segments,K+1,E) parts of d_conv, the last row of d_bias
    float *d_W;          // (B*segments,P,E) parts of d_W_x
    const bf16 *d_u;     // (B*L,E) from the scan
    const bf16 *x;       // rows of ld
    const bf16 *d_xdb;   // (B*L,P)
    const bf16 *W;       // (P,E)
    const float *conv_t; // (K,E)
    const float *bias;   // (E) or NULL
    int ld, L, E;
    int segment, segments; // steps, a multiple of BACK_TILE; of a sequence
    ConvEnds ends;         // of a chunk, see layers.cuh
};

template <int PARTS> struct ConvBackShared { // P = 16 PARTS; 16 bytes more a row: no bank conflicts
    enum { P = 16 * PARTS, PITCH = 2 * P + 16, ROW = 2 * BACK_LANES, ROW_PITCH = ROW + 16 };
    unsigned char d_xdb[2][BACK_TILE * PITCH];
    unsigned char W[P * ROW_PITCH];
    unsigned char x[(BACK_TILE + BACK_TAPS - 1) * ROW];
    unsigned char d_u[BACK_TILE * ROW];
    // Of a warp: first the product, (16,72) floats, then u in rows of ROW_PITCH.
    float handed[BACK_WARPS][BACK_PART][BACK_LANES + 8];
    float d_c[2][BACK_WARPS][BACK_TAPS - 1][BACK_LANES]; // of this tile and of the one after it
};

template <int PARTS, bool ENDS>
__global__ void __launch_bounds__(32 * BACK_WARPS, PARTS <= 6 ? 3 : 2)
    conv_back_kernel(ConvBack p) {
    typedef ConvBackShared<PARTS> Shared;
    enum {
        P = Shared::P,
        PITCH = Shared::PITCH,
        ROW = Shared::ROW,
        ROW_PITCH = Shared::ROW_PITCH,
        THREADS = 32 * BACK_WARPS,
        K = BACK_TAPS,
        HALO = BACK_TAPS - 1
    };
    extern __shared__ float4 shared_floats[];
    Shared &s = *(Shared *)shared_floats;
    const int groups = p.E / BACK_LANES, group = blockIdx.x % groups, part = blockIdx.x / groups,
              b = part / p.segments, tid = threadIdx.x, lane = tid % 32, warp = tid / 32, L = p.L,
              first = part % p.segments * p.segment, end = min(first + p.segment, L),
              e = group * BACK_LANES + 2 * lane;
    const size_t row0 = (size_t)b * L, of_window = (size_t)b * HALO * p.E + e;
    const bf16 *x = p.x + row0 * p.ld + group * BACK_LANES,
               *d_u = p.d_u + row0 * p.E + group * BACK_LANES, *d_xdb = p.d_xdb + row0 * P;

    auto load = [&](int t0, int rows, int turn) { // of a tile
        for (int i = tid; i < (rows + HALO) * (ROW / 16); i += THREADS) {
            const int t = t0 - HALO + i / (ROW / 16), at = i % (ROW / 16);
            const bool is = t >= 0 && t < L;
            copy_16_or_zero(shared_address(s.x) + i * 16, x + (size_t)(is ? t : 0) * p.ld + at * 8,
                            is);
        }
        for (int i = tid; i < rows * (ROW / 16); i += THREADS) {
            const int t = t0 + i / (ROW / 16), at = i % (ROW / 16);
            const bool is = t < L;
            copy_16_or_zero(shared_address(s.d_u) + i * 16,
                            d_u + (size_t)(is ? t : 0) * p.E + at * 8, is);
        }
        for (int i = tid; i < rows * (P / 8); i += THREADS) {
            const int t = t0 + i / (P / 8), at = i % (P / 8);
            const bool is = t < L;
            copy_16_or_zero(shared_address(s.d_xdb[turn]) + i / (P / 8) * PITCH + at * 16,
                            d_xdb + (size_t)(is ? t : 0) * P + at * 8, is);
        }
    };
    wait_for_input();
    const bool reaches = end < L; // the segment after this one reaches back
    const int last = first + (end - first - 1) / BACK_TILE * BACK_TILE;
    for (int i = tid; i < P * (ROW / 16); i += THREADS)
        copy_16(shared_address(s.W) + i / (ROW / 16) * ROW_PITCH + i % (ROW / 16) * 16,
                p.W + (size_t)(i / (ROW / 16)) * p.E + group * BACK_LANES + i % (ROW / 16) * 8);
    load(reaches ? end : last, reaches ? BACK_PART : BACK_TILE, 0);
    for (int i = tid; i < HALO * BACK_LANES; i += THREADS) (&s.d_c[1][0][0][0])[i] = 0;

    float tap[K][2], bias[2], d_tap[K][2] = {}, d_bias[2] = {}, d_W[PARTS][2][4] = {};
#pragma unroll
    for (int v = 0; v < 2; v++) {
        bias[v] = p.bias ? p.bias[e + v] : 0;
#pragma unroll
        for (int k = 0; k < K; k++) tap[k][v] = p.conv_t[(size_t)k * p.E + e + v];
    }
    int turn = 0;
    for (int t0 = reaches ? end : last; t0 >= first; turn ^= 1) {
        const bool before = t0 == end; // only d_c of its first steps is wanted
        copies_done();
        __syncthreads();
        float d_c[BACK_PART + HALO][2]; // first d_u
        if (!before || warp == 0) {
            float sum[8][4] = {};
#pragma unroll
            for (int k = 0; k < PARTS; k++) {
                uint4 a = matrices<false>(shared_address(s.d_xdb[turn]) +
                                          (warp * BACK_PART + lane % 16) * PITCH + k * 32 +
                                          lane / 16 * 16);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint4 w =
                        matrices<true>(shared_address(s.W) + (k * 16 + lane % 16) * ROW_PITCH +
                                       j * 32 + lane / 16 * 16);
                    tensor_product(sum[2 * j], a.x, a.y, a.z, a.w, w.x, w.y);
                    tensor_product(sum[2 * j + 1], a.x, a.y, a.z, a.w, w.z, w.w);
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                Group<float, 2> low = {sum[j][0], sum[j][1]}, high = {sum[j][2], sum[j][3]};
                *(Group<float, 2> *)&s.handed[warp][lane / 4][8 * j + lane % 4 * 2] = low;
                *(Group<float, 2> *)&s.handed[warp][lane / 4 + 8][8 * j + lane % 4 * 2] = high;
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < BACK_PART; i++) {
                Group<float, 2> two = *(const Group<float, 2> *)&s.handed[warp][i][2 * lane];
                d_c[i][0] = two.v[0], d_c[i][1] = two.v[1];
            }
            __syncwarp(); // u takes their place
            const unsigned char *x_row = s.x + warp * BACK_PART * ROW + lane * 4,
                                *d_u_row = s.d_u + warp * BACK_PART * ROW + lane * 4;
            float past[K][2];
#pragma unroll
            for (int k = 0; k < HALO; k++) {
                uint32_t two = *(const uint32_t *)(x_row + k * ROW);
                past[k + 1][0] = low_half(two), past[k + 1][1] = high_half(two);
                if (ENDS && t0 == 0 && warp == 0)
                    for (int v = 0; v < 2; v++)
                        past[k + 1][v] = p.ends.window[of_window + (size_t)k * p.E + v];
            }
#pragma unroll
            for (int i = 0; i < BACK_PART; i++) {
                const uint32_t in = *(const uint32_t *)(x_row + (i + HALO) * ROW),
                               d = *(const uint32_t *)(d_u_row + i * ROW);
#pragma unroll
                for (int k = 0; k < HALO; k++)
                    past[k][0] = past[k + 1][0], past[k][1] = past[k + 1][1];
                past[HALO][0] = low_half(in), past[HALO][1] = high_half(in);
                float u[2];
#pragma unroll
                for (int v = 0; v < 2; v++) {
                    float c = bias[v];
#pragma unroll
                    for (int k = 0; k < K; k++) c += tap[k][v] * past[k][v];
                    const float sig = sigmoid(c);
                    u[v] = c * sig;
                    const float d_total = d_c[i][v] + (v ? high_half(d) : low_half(d));
                    d_c[i][v] = d_total * fmaf(u[v], 1 - sig, sig);
                    if (!before) {
#pragma unroll
                        for (int k = 0; k < K; k++) d_tap[k][v] += d_c[i][v] * past[k][v];
                        d_bias[v] += d_c[i][v];
                    }
                }
                *(uint32_t *)((unsigned char *)s.handed[warp] + i * ROW_PITCH + lane * 4) =
                    pack(u[0], u[1]);
                if (i < HALO)
                    *(Group<float, 2> *)&s.d_c[turn][warp][i][2 * lane] = {d_c[i][0], d_c[i][1]};
            }
        }
        __syncthreads();
        const int next = before ? last : t0 - BACK_TILE;
        if (next >= first) load(next, BACK_TILE, turn ^ 1);
        if (!before) {
            // The first steps of the warp after this one, or of the tile after.
            const float(*after)[BACK_LANES] =
                warp + 1 < BACK_WARPS ? s.d_c[turn][warp + 1] : s.d_c[turn ^ 1][0];
#pragma unroll
            for (int i = 0; i < HALO; i++) {
                Group<float, 2> two = *(const Group<float, 2> *)&after[i][2 * lane];
                d_c[BACK_PART + i][0] = two.v[0], d_c[BACK_PART + i][1] = two.v[1];
            }
            const int t = t0 + warp * BACK_PART;
            bf16 *to = p.d_x + (row0 + t) * p.ld + e;
            // What the chunk after this one adds to d_x of step i, one of the last HALO.
            auto from_after = [&](int i, int v) {
                const int slot = i - (L - HALO);
                return ENDS && slot >= 0 && i < L
                           ? p.ends.d_after[of_window + (size_t)slot * p.E + v]
                           : 0.0f;
            };
#pragma unroll
            for (int i = 0; i < BACK_PART; i++) {
                float d[2] = {from_after(t + i, 0), from_after(t + i, 1)};
#pragma unroll
                for (int k = 0; k < K; k++)
#pragma unroll
                    for (int v = 0; v < 2; v++) d[v] += tap[HALO - k][v] * d_c[i + k][v];
                if (t + i < L) *(uint32_t *)(to + (size_t)i * p.ld) = pack(d[0], d[1]);
            }
            if (ENDS && t == 0) // of the window's inputs, for the chunk before
#pragma unroll
                for (int j = 0; j < HALO; j++)
                    for (int v = 0; v < 2; v++) {
                        float d = from_after(j - HALO, v);
#pragma unroll
                        for (int k = HALO - j; k < K; k++)
                            d += tap[HALO - k][v] * d_c[j - HALO + k][v];
                        p.ends.d_before[of_window + (size_t)j * p.E + v] = d;
                    }
#pragma unroll
            for (int k = 0; k < BACK_WARPS; k++) { // 16 steps, those of warp k
                uint4 u = matrices<true>(shared_address(s.handed[k]) + lane % 16 * ROW_PITCH +
                                         warp * 32 + lane / 16 * 16);
#pragma unroll
                for (int m = 0; m < PARTS; m++) {
                    uint4 a = matrices<true>(shared_address(s.d_xdb[turn]) +
                                             (k * 16 + lane % 8 + lane / 16 * 8) * PITCH + m * 32 +
                                             lane / 8 % 2 * 16);
                    tensor_product(d_W[m][0], a.x, a.y, a.z, a.w, u.x, u.y);
                    tensor_product(d_W[m][1], a.x, a.y, a.z, a.w, u.z, u.w);
                }
            }
        }
        t0 = next;
    }
    // d_W of 16 channels; sums of the warps for the taps.
    float *to_W = p.d_W + (size_t)part * P * p.E + group * BACK_LANES + warp * 16;
#pragma unroll
    for (int m = 0; m < PARTS; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float *at = to_W + (size_t)(m * 16 + lane / 4) * p.E + j * 8 + lane % 4 * 2;
            *(Group<float, 2> *)at = {d_W[m][j][0], d_W[m][j][1]};
            *(Group<float, 2> *)(at + 8 * (size_t)p.E) = {d_W[m][j][2], d_W[m][j][3]};
        }
    __syncthreads();
    float(*sums)[K + 1][BACK_LANES] = (float(*)[K + 1][BACK_LANES]) s.handed;
#pragma unroll
    for (int v = 0; v < 2; v++) {
#pragma unroll
        for (int k = 0; k < K; k++) sums[warp][k][2 * lane + v] = d_tap[k][v];
        sums[warp][K][2 * lane + v] = d_bias[v];
    }
    __syncthreads();
    for (int i = tid; i < (K + 1) * BACK_LANES; i += THREADS) {
        float sum = 0;
        for (int w = 0; w < BACK_WARPS; w++) sum += sums[w][i / BACK_LANES][i % BACK_LANES];
        p.d_taps[((size_t)part * (K + 1) + i / BACK_LANES) * p.E + group * BACK_LANES +
                 i % BACK_LANES] = sum;
    }
}

// Steps of a segment: 1,024, fewer where the blocks would not fill the GPU twice. A shape and a
// machine have one order of sums.
enum { SEGMENT_MOST = 1024, SEGMENT_LEAST = 128 };
static int conv_back_segment(const Device *d, int B, int L, int E) {
    const size_t rows = (size_t)B * (E / BACK_LANES), enough = 2 * (size_t)d->processors;
    int steps = SEGMENT_MOST;
    while (steps > SEGMENT_LEAST && rows * ((L + steps - 1) / steps) < enough) steps /= 2;
    return steps;
}
// Floats of the parts of d_taps and d_W.
static size_t conv_back_floats(const Device *d, int B, int L, int E, int P) {
    const int steps = conv_back_segment(d, B, L, E);
    return (size_t)B * ((L + steps - 1) / steps) * (size_t)(P + BACK_TAPS + 1) * E;
}
// Whether the kernel serves this shape.
static bool conv_back_serves(int E, int P, int K) {
    return K == BACK_TAPS && E % BACK_LANES == 0 && (P == 80 || P == 96 || P == 128);
}
template <int PARTS> static void conv_back_launch(Device *d, const ConvBack &p, unsigned blocks) {
    check_cuda(d,
               launch_dependent(d,
                                p.ends.d_before ? conv_back_kernel<PARTS, true>
                                                : conv_back_kernel<PARTS, false>,
                                blocks, 32 * BACK_WARPS, sizeof(ConvBackShared<PARTS>), p),
               "conv_back");
}
static void conv_back(Device *d, const ConvBack &p, int B, int P) {
    const unsigned blocks = (unsigned)(B * p.segments * (p.E / BACK_LANES));
    if (P == 80) conv_back_launch<5>(d, p, blocks);
    else if (P == 96) conv_back_launch<6>(d, p, blocks);
    else conv_back_launch<8>(d, p, blocks);
}
