// step_one_hopper.cuh - one token of one sequence in bf16 on Hopper: one kernel for the whole step.
// Included by mamba_cuda.cu.
//
// Neither bytes nor arithmetic bound such a step, but how often all multiprocessors must hear from
// each other. A block takes its channels through a whole layer, from in_proj to out_proj. So only
// two sums over all channels are left in a layer: the outputs of x_proj and those of out_proj.
//
//   block i: x of all  -> in_proj of its channels -> conv -> its part of x_proj
//            ----- sum over blocks: x_proj's outputs to all -----
//            dt_proj, step of the scan, gate of its channels -> its part of out_proj
//            ----- sum over blocks: the residual stream to all -----
//
// Each sum goes the same way. A block sends its part to the 8 blocks of its cluster, an eighth of
// the outputs each (exchange.cuh, 4). Each block adds up its eighth and writes it to device memory
// with a tag (5), polls for the same eighth from all clusters, adds up, and sends the sum to the 8
// blocks of its cluster (4).
//
// For such parts x_proj and out_proj are read by channel, so they lie transposed. All that a block
// reads of a layer, weights, vectors and the state of its channels, comes through the ring (3) in
// the order of use, layers ahead. The state, too, for plain loads return in order, and polls would
// wait behind them. A slot holds 8 rows of in_proj, of out_proj's transpose or of the head, or the
// small things of a layer. The products run on tensor cores: with plain arithmetic, unpacking the
// weights took longest. An input is the sum of two bf16, in two of the product's 8 or 16 columns.
// Outputs are handled by pairs i, i + 8 of each 16, which one lane has.

enum { SOLO_WARPS = 8, SOLO_THREADS = 32 * SOLO_WARPS }; // and the warp that feeds the ring
enum { SOLO_ROWS = 8 };                                  // of a matrix, in a slot of the ring
enum { SOLO_STATES = 16 };                               // N at the most
enum { SOLO_TAPS = 4 };                                  // K at the most
enum { SOLO_PAD = 8 };        // elements after each row, against bank conflicts
enum { SOLO_X_TILES = 2 };    // tiles of 16 outputs of x_proj of a block of a cluster, at the most
enum { SOLO_FLYING = 49152 }; // bytes on their way to a block. More do not come faster; polls wait
enum { SOLO_BARRIERS = 2 * RING_SLOTS + 4 };

struct SoloLayer {
    const bf16 *W_in, *W_dt;                             // (2E,D), (E,R)
    const unsigned char *tiles_in, *tiles_x, *tiles_out; // of step_one_packed.cuh
};
struct SoloArgs {
    const SoloLayer *layers; // (n_layer)
    const bf16 *W_x;         // (n_layer,E,P + PAD), transposed
    const bf16 *W_out;       // (n_layer,E,D + PAD), transposed
    const bf16 *head;        // (V,D)
    float *vectors;          // (n_layer,blocks,vector_floats), see SoloVectors
    const float *res;        // (D): the embedding of the token
    const float *norm;       // (D): of the first layer
    float *logits;           // (V)
    ulonglong2 *xdb_words;   // (8,CLUSTERS_MAX,8 X_TILES): pairs, each number with a tag
    ulonglong2 *res_words;   // (8,CLUSTERS_MAX,D/16): the same
    uint32_t *turn;          // steps so far
    int clusters;
    int channels; // of a block, at the most
    int slots, slot_bytes;
    int flying; // slots that are being filled
    int vector_floats, n_layer, D, E, N, K, R;
    int P; // R + 2 N, rounded up to a multiple of 16
    int V;
    float eps;
    float mixer_eps;                 // of FalconMamba's norms, or 0
    int unit;                        // channels of a block are a multiple of it
    int pair;                        // outputs are handled by pairs i, i + pair of each 2 pair
    const unsigned char *tiles_head; // of step_one_packed.cuh, and the bytes of its small place
    int small_bytes;
};

// Offsets in the vectors of a block and a layer: A and h (channels,N), conv and window
// (taps,channels), and of the next norm the pairs that the block adds up.
struct SoloVectors {
    int A, conv, conv_bias, dt_bias, D_skip, h, window, norm, floats;
    __host__ __device__ SoloVectors(int channels, int N, int K, int D) {
        A = 0, conv = A + channels * N, conv_bias = conv + channels * K,
        dt_bias = conv_bias + channels;
        D_skip = dt_bias + channels, h = D_skip + channels, window = h + channels * N;
        norm = (window + channels * (K - 1) + 3) / 4 * 4, floats = norm + D / CLUSTER_BLOCKS;
    }
};

// Offsets in shared memory, in bytes.
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

// The first channel of a block. Blocks have equally many, or one more.
__host__ __device__ inline int solo_first(int block, int blocks, int E) {
    return (int)((int64_t)block * E / blocks);
}

#if __CUDA_ARCH__ >= 900
__device__ inline uint32_t split(float x) { // into two bf16, the larger below
    bf16 high = __float2bfloat16_rn(x), low = __float2bfloat16_rn(x - value(high));
    return (uint32_t)__bfloat16_as_ushort(low) << 16 | __bfloat16_as_ushort(high);
}
// The operand of a product from two such numbers: lanes 0..3 have the larger parts, lanes 4..7 the
// smaller ones, the others 0.
__device__ inline uint32_t operand(uint32_t x, uint32_t y) {
    int lane = threadIdx.x % 32;
    return lane < 8 ? __byte_perm(x, y, lane < 4 ? 0x5410 : 0x7632) : 0;
}

// Feeds the ring with all that the block reads of the weights, in the order of use. By a warp, a
// row a lane.
__device__ inline void solo_fetch(const SoloArgs &p, Ring ring, int first, int n) {
    const int D = p.D, E = p.E, R = p.R, P = p.P + SOLO_PAD, lane = threadIdx.x % 32,
              pitch = (D + SOLO_PAD) * 2;
    Ring landed = ring;
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

// x's operands for 16 inputs; in memory x lies by pairs.
__device__ inline uint2 x_operands(const uint4 *x, int sixteen) {
    uint4 v = x[4 * sixteen + threadIdx.x % 4]; // inputs 2j, 2j + 8, 2j + 1, 2j + 9
    return make_uint2(operand(v.x, v.z), operand(v.y, v.w));
}
// The sums of two columns of a product, in lanes 0..3: those of the larger parts plus those of the
// smaller ones, which lanes 4..7 have.
__device__ inline float2 both_parts(const float c[4]) {
    return make_float2(c[0] + __shfl_down_sync(0xffffffffu, c[0], 4),
                       c[1] + __shfl_down_sync(0xffffffffu, c[1], 4));
}

// sums (8,sum_rows) of each warp: `rows` rows of W, which come through the ring, times x. A warp
// takes every eighth group of 32 inputs. GROUP slots at a time.
template <int WIDTH, int GROUP>
__device__ inline void solo_in_proj(Ring &ring, float *sums, int sum_rows, const uint4 *x,
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
        Ring ahead = ring;
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            at[i] = shared_address(block_memory) + ahead.at + mine;
            if (base + i * SOLO_ROWS < rows) ahead.wait(), ahead.next();
            else at[i] = at[0]; // sums that nobody uses
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

// D = 256 WIDTH. Of the scan, 16 lanes take a channel, a state each, so 16 channels at a time, in
// ROUNDS rounds. GROUP: slots of in_proj at a time.
template <int WIDTH, int ROUNDS, int GROUP>
__global__ void __launch_bounds__(SOLO_THREADS + 32, 1)
    solo_kernel(const __grid_constant__ SoloArgs p) {
#if __CUDA_ARCH__ >= 900
    constexpr int D = 256 * WIDTH, TILES = D / 128;
    unsigned char *memory = block_memory;
    const int E = p.E, N = p.N, K = p.K, R = p.R, P = p.P, tid = threadIdx.x, warp = tid / 32,
              half = tid / 16, lane = tid % 16, rank = blockIdx.x % CLUSTER_BLOCKS,
              cluster = blockIdx.x / CLUSTER_BLOCKS, channels = p.channels,
              first = solo_first(blockIdx.x, gridDim.x, E),
              n = solo_first(blockIdx.x + 1, gridDim.x, E) - first;
    const SoloShared place(p.slots, p.slot_bytes, channels, D, P);
    const SoloVectors vector(channels, N, K, D);
    uint64_t *barriers = (uint64_t *)memory, *x_here = barriers + 2 * RING_SLOTS,
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
    Ring ring = {(uint32_t)place.ring, (uint32_t)p.slot_bytes, (uint32_t)place.ring, p.slots, 0, 0};
    // Pairs of outputs that this block adds up: of x_proj 8 of every eighth tile from `rank` on, of
    // out_proj D/16.
    const int x_mine =
                  P / 16 > rank ? (P / 16 - rank + CLUSTER_BLOCKS - 1) / CLUSTER_BLOCKS * 8 : 0,
              res_each = D / (2 * CLUSTER_BLOCKS); // 16 WIDTH
    const int x_bytes = D * 4 + 128 * 4, xdb_bytes = P * 4,
              x_part_bytes = CLUSTER_BLOCKS * x_mine * 8, res_part_bytes = D * 4;
    if (tid == 0) {
        for (int i = 0; i < p.slots; i++)
            barrier_init(barriers + i, 1),
                barrier_init(barriers + RING_SLOTS + i, RELEASERS * SOLO_WARPS);
        for (int i = 0; i < 4; i++) barrier_init(x_here + i, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        barrier_expect(x_here, x_bytes), barrier_expect(xdb_here, xdb_bytes);
        barrier_expect(xdb_parts_here, x_part_bytes),
            barrier_expect(res_parts_here, res_part_bytes);
    }
    for (int i = tid; i < 16 * ROUNDS && i < (channels + 15) / 16 * 16; i += SOLO_THREADS)
        y_words[i] = 0, u_words[i] = 0; // beyond n they stay 0
    __syncthreads();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::
                     : "memory"); // the barriers of the others are ready
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (warp == SOLO_WARPS) {
        solo_fetch(p, ring, first, n);
        return;
    }
    // Warp i computes the parts that block i of the cluster adds up. Every fourth lane has a pair
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
            gather_pairs<WIDTH>(sum, gathered, p.res_words + rank * CLUSTERS_MAX * res_each,
                                res_each, p.clusters, tag - 1);
#pragma unroll
            for (int r = 0; r < WIDTH; r++) res[r].x += sum[r].x, res[r].y += sum[r].y;
        }
        float square = 0;
        const uint32_t to = address_in(shared_address(x), lane % CLUSTER_BLOCKS),
                       bar = address_in(shared_address(x_here), lane % CLUSTER_BLOCKS);
#pragma unroll
        for (int r = 0; r < WIDTH; r++) {
            int q = half + 16 * r;
            if (lane < CLUSTER_BLOCKS)
                send(to + (uint32_t)(rank * res_each + q) * 8, split(res[r].x * norm[r].x),
                     split(res[r].y * norm[r].y), bar);
            square += res[r].x * res[r].x + res[r].y * res[r].y;
        }
        if (lane < CLUSTER_BLOCKS)
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
        sync_workers<SOLO_THREADS>();
        if (tid < n) {
            float v = 0, z = 0;
            Group<float, 1> conv = {vectors[vector.conv_bias + tid]};
#pragma unroll
            for (int i = 0; i < SOLO_WARPS; i++)
                v += sums[i * place.sum_rows + tid], z += sums[i * place.sum_rows + n + tid];
            v *= scale;
#pragma unroll
            for (int k = 0; k < SOLO_TAPS; k++) {
                if (k >= K) break;
                Group<float, 1> tap = {vectors[vector.conv + k * channels + tid]},
                                input = {k + 1 < K ? vectors[vector.window + k * channels + tid]
                                                   : v};
                conv = conv_sum<1>(conv, &tap, &input);
                if (k) state[vector.window + (k - 1) * channels + tid] = input.v[0];
            }
            float out = silu(conv.v[0]);
            u[tid] = out, u_words[tid] = split(out), gate[tid] = silu(z * scale);
        }
        sync_workers<SOLO_THREADS>();
        // A transposed product of tiles of 16 outputs by 16 channels. Channels beyond n are masked
        // out.
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
            for (int i = 0; i < CLUSTER_BLOCKS; i++)
                sum.x += xdb_parts[i * SOLO_X_TILES * 8 + tid].x,
                    sum.y += xdb_parts[i * SOLO_X_TILES * 8 + tid].y;
            put_tagged(p.xdb_words + (rank * CLUSTERS_MAX + cluster) * SOLO_X_TILES * 8 + tid,
                       __float_as_uint(sum.x), __float_as_uint(sum.y), tag);
        }
        if (tid == 0) barrier_expect(xdb_parts_here, x_part_bytes);
        float2 xdb_sum[1];
        gather_pairs<1>(xdb_sum, gathered, p.xdb_words + rank * CLUSTERS_MAX * SOLO_X_TILES * 8,
                        x_mine, p.clusters, tag);
        if (half < x_mine && lane < CLUSTER_BLOCKS) {
            uint32_t there = address_in(
                         shared_address(xdb + (rank + half / 8 * CLUSTER_BLOCKS) * 16 + half % 8),
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
            float d = c < n ? softplus(delta[r] * dt_scale + vectors[vector.dt_bias + c]) : 0, h;
            out[r] = 0;
            if (c < n && lane < N) {
                h = vectors[vector.h + c * N + lane];
                step_state(h, out[r], __expf(d * vectors[vector.A + c * N + lane]), d * u[c] * B,
                           C);
                state[vector.h + c * N + lane] = h;
            }
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
        sync_workers<SOLO_THREADS>();
        float part[TILES][4] = {}; // this block's part of out_proj
#pragma unroll 1
        for (int from = 0; from < n; from += 16) {
            Ring second = ring;
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
            for (int i = 0; i < CLUSTER_BLOCKS; i++)
                sum.x += res_parts[i * res_each + q].x, sum.y += res_parts[i * res_each + q].y;
            put_tagged(p.res_words + (rank * CLUSTERS_MAX + cluster) * res_each + q,
                       __float_as_uint(sum.x), __float_as_uint(sum.y), tag);
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
    if (blockIdx.x == 0 && tid == 0)
        *p.turn += 1; // every block has read it: this one has numbers from all of them
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

// A layer's vectors as blocks read them; norm: the next layer's.
__global__ void solo_vectors_kernel(SoloArgs p, LayerWeights w, int layer, const float *norm) {
    const SoloVectors at(p.channels, p.N, p.K, p.D);
    const int E = p.E, N = p.N, K = p.K,
              first = solo_first(blockIdx.x, gridDim.x, E / p.unit) * p.unit,
              n = solo_first(blockIdx.x + 1, gridDim.x, E / p.unit) * p.unit - first,
              pairs = p.D / (2 * CLUSTER_BLOCKS);
    float *to = p.vectors + ((size_t)layer * gridDim.x + blockIdx.x) * at.floats;
    const float *conv_bias = (const float *)w.conv_bias;
    for (int c = threadIdx.x, e = first + c; c < n; c += blockDim.x, e += blockDim.x) {
        for (int i = 0; i < N; i++) to[at.A + c * N + i] = w.A_neg[(size_t)i * E + e];
        for (int k = 0; k < K; k++) to[at.conv + k * p.channels + c] = w.conv_t[(size_t)k * E + e];
        to[at.conv_bias + c] = conv_bias ? conv_bias[e] : 0;
        to[at.dt_bias + c] = ((const float *)w.dt_bias)[e];
        to[at.D_skip + c] = ((const float *)w.D_skip)[e];
    }
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        int q = blockIdx.x % CLUSTER_BLOCKS * pairs + i,
            column = q / p.pair * 2 * p.pair + q % p.pair;
        to[at.norm + 2 * i] = norm[column];
        to[at.norm + 2 * i + 1] = norm[column + p.pair];
    }
}

// h (n_layer,N,E) and window (n_layer,K-1,E) to where the blocks have them, or back.
__global__ void solo_state_kernel(SoloArgs p, float *h, float *window, bool back) {
    const SoloVectors at(p.channels, p.N, p.K, p.D);
    const int E = p.E, N = p.N, K = p.K, e = blockIdx.x * blockDim.x + threadIdx.x,
              layer = blockIdx.y, blocks = p.clusters * CLUSTER_BLOCKS;
    if (e >= E || (back && stuck[STUCK_STEP])) return; // the state before the steps is kept
    const int units = E / p.unit;
    int block = (int)(((int64_t)(e / p.unit + 1) * blocks - 1) / units),
        c = e - solo_first(block, blocks, units) * p.unit;
    float *of_block = p.vectors + ((size_t)layer * blocks + block) * at.floats;
    for (int i = 0; i < N + K - 1; i++) {
        float *here = i < N ? h + ((size_t)layer * N + i) * E + e
                            : window + ((size_t)layer * (K - 1) + i - N) * E + e;
        float *there = of_block + (i < N ? at.h + c * N + i : at.window + (i - N) * p.channels + c);
        if (back) *here = *there;
        else *there = *here;
    }
}
static void solo_state(Gpu *g, const Solo *q, bool back) {
    dim3 grid(blocks_for((size_t)q->args.E, 128), (unsigned)q->args.n_layer);
    solo_state_kernel<<<grid, 128, 0, g->device.stream>>>(q->args, g->at->h, g->at->window, back);
    check_launch(&g->device, "state");
}

// The vectors of all layers. They lie where activations come and go, if that is large enough.
static size_t vectors_bytes(const SoloArgs &p) {
    return (size_t)p.n_layer * p.clusters * CLUSTER_BLOCKS * p.vector_floats * sizeof(float);
}
static void take_vectors(const Gpu *g, Arena *a, SoloArgs *p) {
    if (vectors_bytes(*p) <= (size_t)((char *)g->unpacking.end - g->work))
        p->vectors = (float *)g->work;
    else a->take(p->vectors, vectors_bytes(*p), 1);
}
static void solo_vectors(Gpu *g, const SoloArgs &p) {
    Device *d = &g->device;
    const unsigned blocks = (unsigned)(p.clusters * CLUSTER_BLOCKS);
    clear(d, p.vectors, vectors_bytes(p), "weights");
    for (int layer = 0; layer < p.n_layer; layer++) {
        const LayerWeights *w = &g->w.layer[(size_t)layer];
        const void *norm = layer + 1 < p.n_layer ? w[1].norm : g->w.norm_f;
        solo_vectors_kernel<<<blocks, 64, 0, d->stream>>>(p, *w, layer, (const float *)norm);
        check_launch(d, "weights");
    }
}

// Before steps: what a pass has overwritten comes again, and the state.
static void solo_prepare(Gpu *g, const Solo *q) {
    if (g->work_of != q) solo_vectors(g, q->args);
    g->work_of = q;
    solo_state(g, q, false);
}

static void solo_free(Solo *q) {
    if (q) cudaFree(q->memory);
    delete q;
}

// How many of these clusters of 8 blocks run at once; -1 if the kernel does not run at all.
template <class... Parameters>
static int clusters_at_once(void (*kernel)(Parameters...), int clusters, int threads,
                            size_t shared) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = CLUSTER_BLOCKS, attribute.val.clusterDim.y = 1,
    attribute.val.clusterDim.z = 1;
    config.gridDim = (unsigned)(clusters * CLUSTER_BLOCKS), config.blockDim = (unsigned)threads;
    config.dynamicSmemBytes = shared, config.attrs = &attribute, config.numAttrs = 1;
    int at_once = 0;
    if (allow_shared(kernel, shared) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&at_once, kernel, &config) == cudaSuccess)
        return at_once;
    return cudaGetLastError(), -1;
}

// NULL if the shape does not fit (a D that there is a kernel for, rows of whole 16 bytes, a ring of
// 4 slots at least), or the GPU, or its memory.
static Solo *solo_new(Gpu *g) {
    const Config *c = &g->config;
    Device *d = &g->device;
    int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R, P = (R + 2 * N + 15) / 16 * 16;
    if (!d->hopper || !g->bf16_compute || g->unpacking.bits ||
        c->flags & (FLAG_PROJ_BIAS | FLAG_LAYER_NORM) || D % 256 || R % 8 || N > SOLO_STATES ||
        K > SOLO_TAPS)
        return NULL;
    Solo q = {};
    SoloArgs *p = &q.args;
    p->D = D, p->E = E, p->N = N, p->K = K, p->R = R, p->P = P, p->V = c->V,
    p->n_layer = c->n_layer, p->eps = c->norm_eps, p->unit = 1, p->pair = 8;
    p->mixer_eps = c->flags & FLAG_MIXER_NORM ? c->mixer_eps : 0;
    for (int clusters = CLUSTERS_MAX;; clusters--) { // as many as run at once
        p->channels =
            std::max(4, (E + CLUSTER_BLOCKS * clusters - 1) / (CLUSTER_BLOCKS * clusters));
        p->clusters = (E + CLUSTER_BLOCKS * p->channels - 1) / (CLUSTER_BLOCKS * p->channels);
        p->vector_floats = SoloVectors(p->channels, N, K, D).floats;
        int small = p->channels * (P + SOLO_PAD + R) * 2 + p->vector_floats * 4;
        p->slot_bytes = (std::max(SOLO_ROWS * (D + SOLO_PAD) * 2, small) + 127) / 128 * 128;
        p->slots = RING_SLOTS, p->flying = std::max(1, SOLO_FLYING / p->slot_bytes);
        while (p->slots &&
               (q.shared = SoloShared(p->slots, p->slot_bytes, p->channels, D, P).bytes) >
                   (size_t)d->shared_limit)
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
    const size_t L = (size_t)c->n_layer;
    SoloLayer *layers = NULL;
    bf16 *W_x = NULL, *W_out = NULL;
    for (int measure = 1; measure >= 0; measure--) {
        Arena a = {(char *)q.memory, 0};
        a.take(layers, L), a.take(W_x, L * E * (P + SOLO_PAD)),
            a.take(W_out, L * E * (D + SOLO_PAD));
        a.take(p->xdb_words, (size_t)SOLO_X_TILES * 8 * CLUSTER_BLOCKS * CLUSTERS_MAX);
        a.take(p->res_words, (size_t)D / 2 * CLUSTERS_MAX), a.take(p->turn, 1);
        take_vectors(g, &a, p);
        if (!measure) break;
        if (cudaMalloc(&q.memory, a.used) != cudaSuccess) return cudaGetLastError(), (Solo *)NULL;
        clear(d, q.memory, a.used, "weights");
    }
    p->layers = layers, p->W_x = W_x, p->W_out = W_out;
    std::vector<SoloLayer> host(L);
    for (size_t layer = 0; layer < L; layer++) {
        const LayerWeights *w = &g->w.layer[layer];
        host[layer] = {(const bf16 *)w->in_proj, (const bf16 *)w->dt_proj, NULL, NULL, NULL};
        transpose(d, W_x + layer * E * (P + SOLO_PAD), P + SOLO_PAD, (const bf16 *)w->x_proj,
                  R + 2 * N, E);
        transpose(d, W_out + layer * E * (D + SOLO_PAD), D + SOLO_PAD, (const bf16 *)w->out_proj, D,
                  E);
    }
    copy(d, layers, host.data(), L * sizeof(SoloLayer), "weights");
    check_cuda(d, cudaStreamSynchronize(d->stream), "weights"); // host goes
    p->res = g->res, p->norm = (const float *)g->w.layer[0].norm, p->logits = g->at->logits,
    p->head = (const bf16 *)g->w.head;
    g->work_of = NULL;
    return new Solo(q);
}

// network() and the head for one token; res has its embedding.
static void solo_step(Gpu *g, const Solo *q) {
    launch_cluster(&g->device, CLUSTER_BLOCKS, q->kernel,
                   (unsigned)(q->args.clusters * CLUSTER_BLOCKS), SOLO_THREADS + 32, q->shared,
                   q->args);
}
