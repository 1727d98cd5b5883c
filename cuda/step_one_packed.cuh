// step_one_packed.cuh - one token of one sequence on Hopper, with matrices in 8 or 4 bits: the plan
// of solo_kernel (step_one_hopper.cuh), which meets twice a layer, with tiles (quantized.cuh) in
// the ring. Included by mamba_cuda.cu.
//
// Nothing is copied or transposed. A block has whole tiles of 32 channels: of in_proj and the head
// it reads panels of 32 rows, which lie in one piece, of x_proj and out_proj the tiles of its
// channels. So blocks are fewer than multiprocessors (80 for E = 5120).
//
// Unpacking must not cost more than the bytes take to come. A code is used as the integer that it
// is: an input becomes a whole number of 22 bits, the largest of the vector 4,190,000, in three
// digits of 8 bits, each a column of a product of tensor cores
//     sums (16,8) = codes (16,32) digits (8,32)^T        columns 3.. are 0
// A tile of 32 rows is two such products. With lane = 4 m + j, row m of product k is row 4 m + 2 k
// of the tile, row m + 8 the next one, and digit m of an input belongs to this lane. quantized.cuh
// puts what a lane needs side by side. In 4 bits a code is taken times 16, where it lies in its
// byte. Lanes of j = 0 get the sums of digits 0 and 1, of j = 1 those of digit 2. The sums, exact,
// become float32 and are multiplied by the row's scale. A warp takes every eighth tile of a panel
// of in_proj, or every tile of its own eighth of out_proj's panels. 32 instructions a lane and tile
// in 4 bits, 21 in 8: one a weight, and less.

enum { PACKED_FLYING = 81920 }; // bytes on their way to a block: fewer blocks, more each

// How work is cut for a width of 256 WIDTH.
template <int BITS, int WIDTH> struct PackedPlan {
    static constexpr int TILE_SIZE = 2 * TILE + BITS * TILE * TILE / 8; // bytes
    static constexpr int NT = WIDTH <= 6 ? 1 : WIDTH <= 10 ? 2 : 3;     // tiles of channels
    static constexpr int X_PANELS = WIDTH <= 10 ? 1 : 2; // of x_proj, for a warp, at the most
    // Tiles of a panel that a slot of the ring has for a warp; panels of out_proj, likewise.
    static constexpr int PER = BITS == 4 && WIDTH == 10  ? 5
                               : BITS == 4 && WIDTH != 6 ? (WIDTH < 4 ? WIDTH : 4)
                               : WIDTH % 3 == 0          ? 3
                                                         : 2;
    static constexpr int PER_OUT = PER >= 2 * NT && WIDTH % 2 == 0 ? 2 : 1;
    static constexpr int SLOT = 8 * (PER > PER_OUT * NT ? PER : PER_OUT * NT) * TILE_SIZE;
    static_assert(WIDTH % PER == 0 && WIDTH % PER_OUT == 0, "slots of equal size");
};

// Offsets in shared memory, in bytes. `small`: the vectors of a layer, then its tiles of x_proj.
struct PackedShared {
    size_t ring, small, x, res_parts, gathered, xdb_parts, xdb, squares, sums, u, gate, y, bytes;
    int sum_rows;
    __host__ __device__ PackedShared(int slots, int slot_bytes, int small_bytes, int channels,
                                     int D, int P, int x_panels) {
        sum_rows = 2 * channels + 8;
        ring = ((2 * RING_SLOTS + 6) * 8 + 127) / 128 * 128;
        small = ring + (size_t)slots * slot_bytes;
        x = small + (size_t)small_bytes;                 // (D)
        res_parts = x + (size_t)D * 4;                   // (8, D/16, 2)
        gathered = res_parts + (size_t)D * 4;            // (8, D/16, 2)
        xdb_parts = gathered + (size_t)D * 4;            // (8, 16 x_panels, 2)
        xdb = xdb_parts + (size_t)8 * 16 * x_panels * 8; // (P)
        squares = xdb + (size_t)P * 4; // (8, 16, 2): of half-warps, and their peaks
        sums = squares + 128 * 8;      // (8 warps, sum_rows)
        u = sums + (size_t)SOLO_WARPS * sum_rows * 4;
        gate = u + (size_t)channels * 4, y = gate + (size_t)channels * 4,
        bytes = y + (size_t)channels * 4;
    }
};

#if __CUDA_ARCH__ >= 900
// The largest of 32 numbers that are not negative, a lane one each; NaN if one is.
__device__ inline float warp_peak(uint32_t bits) {
    return __uint_as_float(__reduce_max_sync(0xffffffffu, bits));
}
__device__ inline uint32_t size_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// What turns numbers up to `peak` into digits, and what a sum of this lane counts.
struct DigitScale {
    float factor, weight;
};
template <int BITS> __device__ inline DigitScale digit_scale(float peak) {
    const float unit = peak * (1 / 4190000.f) * (BITS == 4 ? 0.0625f : 1.f);
    return {peak > 1e-30f ? 4190000.f / peak : 0.f, threadIdx.x % 4 == 1 ? 65536.f * unit : unit};
}
// The operand of this lane: digit lane / 4 of the inputs of columns 8j..8j+7 of a tile. A number x
// times `factor` is rounded by adding 1.5 2^23. Of that + 0x808080 each byte is a digit + 128.
template <int BITS> __device__ inline uint2 digits_of(const float *x, float factor) {
    const int digit = threadIdx.x % 32 / 4;
    const uint32_t pick = 0x40 + 0x11 * (uint32_t)min(digit, 2), keep = digit < 3 ? ~0u : 0;
    const float4 a = ((const float4 *)x)[0], b = ((const float4 *)x)[1];
    const float in[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    uint32_t t[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        t[i] = __float_as_uint(fmaf(in[i], factor, 12582912.f)) + (0x00808080u - 0x4b400000u);
    auto four = [&](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        const uint32_t low = __byte_perm(a, b, pick), high = __byte_perm(c, d, pick);
        return (__byte_perm(low, high, 0x5410) ^ 0x80808080u) & keep;
    };
    if (BITS == 8) return make_uint2(four(t[0], t[1], t[2], t[3]), four(t[4], t[5], t[6], t[7]));
    return make_uint2(four(t[0], t[2], t[4], t[6]), four(t[1], t[3], t[5], t[7]));
}

// sum[i] += row 4 m + i of a tile times 32 inputs, the digits of this lane.
template <int BITS>
__device__ inline void tile_product(float sum[4], const unsigned char *tile, uint2 digits) {
    const int lane = threadIdx.x % 32;
    const uint4 *words = (const uint4 *)(tile + 2 * TILE) + lane;
    const uint2 scales = ((const uint2 *)tile)[lane / 4];
    const uint4 v = words[0], w = BITS == 8 ? words[32] : v;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        uint4 codes = k ? w : v;
        if (BITS == 4) { // in a byte: columns 8 j + 2 i below, 8 j + 2 i + 1 above
            const uint32_t a = k ? v.z : v.x, b = k ? v.w : v.y, above = 0xf0f0f0f0u;
            codes = make_uint4((a << 4) & above, (b << 4) & above, a & above, b & above);
        }
        const uint32_t scale = k ? scales.y : scales.x;
        int c[4];
        integer_product(c, codes, digits);
        sum[2 * k] += low_half(scale) * (float)(c[1] * 256 + c[0]);
        sum[2 * k + 1] += high_half(scale) * (float)(c[3] * 256 + c[2]);
    }
}
// The sums of all digits: a lane gets that of its row, 4 m + j.
__device__ inline float all_digits(const float sum[4], float weight) {
    const bool up = threadIdx.x & 2, odd = threadIdx.x & 1;
    float kept[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const float mine = up ? sum[2 + k] : sum[k], other = up ? sum[k] : sum[2 + k];
        kept[k] = weight * mine + __shfl_xor_sync(0xffffffffu, weight * other, 2);
    }
    const float mine = odd ? kept[1] : kept[0], other = odd ? kept[0] : kept[1];
    return mine + __shfl_xor_sync(0xffffffffu, other, 1);
}

// The small things of a layer have a place of their own, beside the ring, with two barriers.
struct PackedSmall {
    unsigned char *at;
    uint64_t *full, *empty;
};

// Feeds ring and small place in the order of use. By a warp.
template <int BITS, int WIDTH>
__device__ inline void packed_fetch(const SoloArgs &p, Ring ring, PackedSmall small, int first,
                                    int n) {
    typedef PackedPlan<BITS, WIDTH> Plan;
    constexpr size_t BYTES = Plan::TILE_SIZE, PANEL = 8 * WIDTH * BYTES; // a panel of in_proj
    const int lane = threadIdx.x % 32, across = p.E / TILE, from_tile = first / TILE,
              tiles = n / TILE, x_panels = p.P / TILE, run = tiles * (int)BYTES,
              vector_bytes = p.vector_floats * 4;
    Ring landed = ring;
    int flying = 0;
    auto claim = [&](int bytes) {
        if (flying++ >= p.flying) barrier_wait(landed.full(), landed.phase), landed.next();
        return ring.claim(bytes);
    };
    auto panels = [&](const unsigned char *W, int count) {
        constexpr int slot = 8 * Plan::PER * (int)BYTES;
#pragma unroll 1
        for (int i = 0; i < count * (WIDTH / Plan::PER); i++, ring.next()) {
            unsigned char *to = claim(slot);
            if (lane == 0) copy_bulk(to, W + (size_t)i * slot, slot, ring.full());
        }
    };
#pragma unroll 1
    for (int layer = 0; layer < p.n_layer; layer++) {
        const SoloLayer w = p.layers[layer];
        panels(w.tiles_in + from_tile * PANEL, tiles);            // x
        panels(w.tiles_in + (across + from_tile) * PANEL, tiles); // z
        if (layer == 0) step_before_ended();                      // the state is of that step
        barrier_wait(small.empty, (layer & 1) ^ 1);               // passes the first time
        if (lane == 0) barrier_expect(small.full, vector_bytes + x_panels * run);
        __syncwarp();
        if (lane == 0)
            copy_bulk(small.at,
                      p.vectors + ((size_t)layer * gridDim.x + blockIdx.x) * p.vector_floats,
                      vector_bytes, small.full);
#pragma unroll 1
        for (int i = lane; i < x_panels; i += 32)
            copy_bulk(small.at + vector_bytes + i * run,
                      w.tiles_x + ((size_t)i * across + from_tile) * BYTES, run, small.full);
#pragma unroll 1
        for (int t = 0; t < tiles; t++, ring.next()) {
            const int bytes = TILE * p.R * 2;
            unsigned char *to = claim(bytes);
            if (lane == 0)
                copy_bulk(to, w.W_dt + (size_t)(first + TILE * t) * p.R, bytes, ring.full());
        }
#pragma unroll 1
        for (int s = 0; s < WIDTH / Plan::PER_OUT; s++, ring.next()) {
            constexpr int PER_OUT = Plan::PER_OUT, COUNT = SOLO_WARPS * PER_OUT;
            unsigned char *to = claim(COUNT * run);
            const int panel = lane / PER_OUT * WIDTH + s * PER_OUT + lane % PER_OUT;
            if (lane < COUNT)
                copy_bulk(to + lane * run,
                          w.tiles_out + ((size_t)panel * across + from_tile) * BYTES, run,
                          ring.full());
        }
    }
    const int all = (p.V + TILE - 1) / TILE, each = (all + (int)gridDim.x - 1) / (int)gridDim.x,
              from = blockIdx.x * each;
    panels(p.tiles_head + from * PANEL, max(0, min(each, all - from)));
}

// sums (8,sum_rows) of each warp: panels of W, which come through the ring, times x.
template <int BITS, int WIDTH>
__device__ inline void packed_panels(Ring &ring, float *sums, int sum_rows, const float *x,
                                     float peak, int panels) {
    typedef PackedPlan<BITS, WIDTH> Plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, j = lane % 4;
    const DigitScale scale = digit_scale<BITS>(peak);
    float *to = sums + warp * sum_rows + lane;
    uint2 digits[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
        digits[i] = digits_of<BITS>(x + TILE * (warp + SOLO_WARPS * i) + 8 * j, scale.factor);
#pragma unroll 1
    for (int panel = 0; panel < panels; panel++, to += TILE) {
        float sum[4] = {};
#pragma unroll
        for (int s = 0; s < WIDTH; s += Plan::PER) {
            const unsigned char *tile = ring.wait() + warp * Plan::TILE_SIZE;
#pragma unroll
            for (int i = 0; i < Plan::PER; i++)
                tile_product<BITS>(sum, tile + i * SOLO_WARPS * Plan::TILE_SIZE, digits[s + i]);
            ring.release();
        }
        to[0] = all_digits(sum, scale.weight);
    }
}
#endif

// D = 256 WIDTH.
template <int BITS, int WIDTH>
__global__ void __launch_bounds__(SOLO_THREADS + 32, 1)
    solo_packed_kernel(const __grid_constant__ SoloArgs p) {
#if __CUDA_ARCH__ >= 900
    typedef PackedPlan<BITS, WIDTH> Plan;
    constexpr int D = 256 * WIDTH, BYTES = Plan::TILE_SIZE, NT = Plan::NT, ROUNDS = 2 * NT,
                  X_PANELS = Plan::X_PANELS, X_PAIRS = 16 * X_PANELS;
    unsigned char *memory = block_memory;
    const int E = p.E, N = p.N, K = p.K, R = p.R, P = p.P, tid = threadIdx.x, warp = tid / 32,
              half = tid / 16, lane = tid % 16, rank = blockIdx.x % CLUSTER_BLOCKS,
              cluster = blockIdx.x / CLUSTER_BLOCKS, channels = p.channels,
              first = solo_first(blockIdx.x, gridDim.x, E / TILE) * TILE,
              n = solo_first(blockIdx.x + 1, gridDim.x, E / TILE) * TILE - first, tiles = n / TILE,
              x_panels = P / TILE;
    const PackedShared place(p.slots, p.slot_bytes, p.small_bytes, channels, D, P, X_PANELS);
    const SoloVectors vector(channels, N, K, D);
    uint64_t *barriers = (uint64_t *)memory, *x_here = barriers + 2 * RING_SLOTS,
             *xdb_here = x_here + 1, *xdb_parts_here = x_here + 2, *res_parts_here = x_here + 3;
    auto floats = [&](size_t at) { return (float *)(memory + at); };
    float *x = floats(place.x), *squares = floats(place.squares), *xdb = floats(place.xdb),
          *sums = floats(place.sums), *u = floats(place.u), *gate = floats(place.gate),
          *y = floats(place.y);
    float2 *xdb_parts = (float2 *)(memory + place.xdb_parts),
           *res_parts = (float2 *)(memory + place.res_parts),
           *gathered = (float2 *)(memory + place.gathered);
    Ring ring = {(uint32_t)place.ring, (uint32_t)p.slot_bytes, (uint32_t)place.ring, p.slots, 0, 0};
    const PackedSmall small = {memory + place.small, x_here + 4, x_here + 5};
    // Pairs of outputs that this block adds up: of x_proj 16 of every eighth panel from `rank` on,
    // of out_proj D/16.
    const int x_mine = x_panels > rank
                           ? (x_panels - rank + CLUSTER_BLOCKS - 1) / CLUSTER_BLOCKS * 16
                           : 0,
              res_each = D / (2 * CLUSTER_BLOCKS);
    const int x_bytes = D * 4 + 128 * 8, xdb_bytes = P * 4,
              x_part_bytes = CLUSTER_BLOCKS * x_mine * 8, res_part_bytes = D * 4;
    if (tid == 0) {
        for (int i = 0; i < p.slots; i++)
            barrier_init(barriers + i, 1),
                barrier_init(barriers + RING_SLOTS + i, RELEASERS * SOLO_WARPS);
        for (int i = 0; i < 5; i++) barrier_init(x_here + i, 1);
        barrier_init(small.empty, RELEASERS * SOLO_WARPS);
        barriers_begin();
        barrier_expect(x_here, x_bytes), barrier_expect(xdb_here, xdb_bytes);
        barrier_expect(xdb_parts_here, x_part_bytes),
            barrier_expect(res_parts_here, res_part_bytes);
    }
    __syncthreads();
    cluster_meets(); // the barriers of the others are ready
    if (warp == SOLO_WARPS) {
        packed_fetch<BITS, WIDTH>(p, ring, small, first, n);
        return;
    }
    // Warp i computes the parts that block i of the cluster adds up.
    const int warp_lane = tid % 32, j = warp_lane % 4, pair = warp_lane / 2;
    const uint32_t x_part_to = address_in(shared_address(xdb_parts + rank * X_PAIRS + pair), warp),
                   res_part_to =
                       address_in(shared_address(res_parts + rank * res_each + pair), warp),
                   x_part_bar = address_in(shared_address(xdb_parts_here), warp),
                   res_part_bar = address_in(shared_address(res_parts_here), warp);
    auto send_pair = [&](uint32_t to, float x, uint32_t bar) { // by the even lane of two
        const float y = __shfl_xor_sync(0xffffffffu, x, 1);
        if (warp_lane % 2 == 0) send(to, __float_as_uint(x), __float_as_uint(y), bar);
    };
    auto channel_peak = [&](const float *v) {
        uint32_t largest = 0;
#pragma unroll
        for (int t = 0; t < NT; t++)
            if (t < tiles) largest = max(largest, size_bits(v[TILE * t + warp_lane]));
        return warp_peak(largest);
    };
    wait_for_input();
    const uint32_t first_tag = *(volatile uint32_t *)p.turn * (uint32_t)(p.n_layer + 1) + 1;
    float2 res[WIDTH], norm[WIDTH];
    float scale, peak; // of the normed residual stream
#pragma unroll
    for (int r = 0; r < WIDTH; r++) {
        int at = 2 * (rank * res_each + half + 16 * r);
        res[r] = make_float2(p.res[at], p.res[at + 1]);
        norm[r] = make_float2(p.norm[at], p.norm[at + 1]);
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
        {
            float square = 0;
            uint32_t largest = 0;
            const uint32_t to = address_in(shared_address(x), lane % CLUSTER_BLOCKS),
                           bar = address_in(shared_address(x_here), lane % CLUSTER_BLOCKS);
#pragma unroll
            for (int r = 0; r < WIDTH; r++) {
                const float a = res[r].x * norm[r].x, b = res[r].y * norm[r].y;
                if (lane < CLUSTER_BLOCKS)
                    send(to + (uint32_t)(rank * res_each + half + 16 * r) * 8, __float_as_uint(a),
                         __float_as_uint(b), bar);
                square += res[r].x * res[r].x + res[r].y * res[r].y;
                largest = max(largest, max(size_bits(a), size_bits(b)));
            }
            if (lane < CLUSTER_BLOCKS)
                send(address_in(shared_address(squares + 2 * (rank * 16 + half)), lane),
                     __float_as_uint(square), largest, bar);
        }
        barrier_watch(x_here, phase);
        if (tid == 0) barrier_expect(x_here, x_bytes);
        {
            const float4 a = ((const float4 *)squares)[warp_lane],
                         b = ((const float4 *)squares)[32 + warp_lane];
            scale = rsqrtf(warp_sum(a.x + a.z + b.x + b.z) / (float)D + p.eps);
            peak = warp_peak(
                max(max(size_bits(a.y), size_bits(a.w)), max(size_bits(b.y), size_bits(b.w))));
        }
        if (layer == p.n_layer) break;
        packed_panels<BITS, WIDTH>(ring, sums, place.sum_rows, x, peak, 2 * tiles);
        barrier_watch(small.full, phase); // kept until the step of the scan
        float *vectors = (float *)small.at,
              *state = p.vectors + ((size_t)layer * gridDim.x + blockIdx.x) * p.vector_floats;
        const unsigned char *x_tiles = small.at + p.vector_floats * 4;
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
            u[tid] = silu(conv.v[0]), gate[tid] = silu(z * scale);
        }
        sync_workers<SOLO_THREADS>();
        { // this block's part of x_proj
            const DigitScale of_u = digit_scale<BITS>(channel_peak(u));
#pragma unroll
            for (int q = 0; q < X_PANELS; q++) {
                const int panel = warp + SOLO_WARPS * q;
                if (panel >= x_panels) break;
                float sum[4] = {};
#pragma unroll 1
                for (int t = 0; t < tiles; t++)
                    tile_product<BITS>(sum, x_tiles + (panel * tiles + t) * BYTES,
                                       digits_of<BITS>(u + TILE * t + 8 * j, of_u.factor));
                send_pair(x_part_to + q * 16 * 8, all_digits(sum, of_u.weight), x_part_bar);
            }
        }
        if (tid < x_mine) { // the cluster's part of the sums that are this block's
            float2 sum = {};
            barrier_watch(xdb_parts_here, phase);
#pragma unroll
            for (int i = 0; i < CLUSTER_BLOCKS; i++)
                sum.x += xdb_parts[i * X_PAIRS + tid].x, sum.y += xdb_parts[i * X_PAIRS + tid].y;
            put_tagged(p.xdb_words + (rank * CLUSTERS_MAX + cluster) * X_PAIRS + tid,
                       __float_as_uint(sum.x), __float_as_uint(sum.y), tag);
        }
        if (tid == 0) barrier_expect(xdb_parts_here, x_part_bytes);
        float2 xdb_sum[X_PANELS];
        gather_pairs<X_PANELS>(xdb_sum, gathered, p.xdb_words + rank * CLUSTERS_MAX * X_PAIRS,
                               x_mine, p.clusters, tag);
#pragma unroll
        for (int q = 0; q < X_PANELS; q++)
            if (half + 16 * q < x_mine && lane < CLUSTER_BLOCKS) {
                const int at = (rank + q * CLUSTER_BLOCKS) * TILE + 2 * half;
                uint32_t there = address_in(shared_address(xdb + at), lane),
                         bar = address_in(shared_address(xdb_here), lane);
                send(there, __float_as_uint(xdb_sum[q].x), __float_as_uint(xdb_sum[q].y), bar);
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
#pragma unroll
        for (int t = 0; t < NT; t++) { // 32 channels, two rounds, a slot
            if (t >= tiles) break;
            const uint32_t *W_dt = (const uint32_t *)ring.wait() + half * (R / 2);
#pragma unroll 2
            for (int k = lane; k < R / 2; k += 16) {
                const float2 low = ((const float2 *)xdb)[k];
                const uint32_t w = W_dt[k], v = W_dt[16 * (R / 2) + k];
                delta[2 * t] += low_half(w) * low.x + high_half(w) * low.y;
                delta[2 * t + 1] += low_half(v) * low.x + high_half(v) * low.y;
            }
            ring.release();
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
            if (c < n && lane == 0) y[c] = (out[r] + vectors[vector.D_skip + c] * u[c]) * gate[c];
        }
#pragma unroll
        for (int r = 0; r < WIDTH; r++)
            norm[r] = ((const float2 *)(vectors + vector.norm))[half + 16 * r];
        __syncwarp();
        if (warp_lane < RELEASERS) barrier_arrive(small.empty);
        sync_workers<SOLO_THREADS>();
        { // this block's part of out_proj
            const DigitScale of_y = digit_scale<BITS>(channel_peak(y));
            uint2 digits[NT];
#pragma unroll
            for (int t = 0; t < NT; t++)
                if (t < tiles) digits[t] = digits_of<BITS>(y + TILE * t + 8 * j, of_y.factor);
#pragma unroll 1
            for (int s = 0; s < WIDTH; s += Plan::PER_OUT) {
                const unsigned char *at = ring.wait() + warp * Plan::PER_OUT * tiles * BYTES;
                float total[Plan::PER_OUT];
#pragma unroll
                for (int i = 0; i < Plan::PER_OUT; i++) {
                    float sum[4] = {};
#pragma unroll
                    for (int t = 0; t < NT; t++)
                        if (t < tiles)
                            tile_product<BITS>(sum, at + (i * tiles + t) * BYTES, digits[t]);
                    total[i] = all_digits(sum, of_y.weight);
                }
                ring.release();
#pragma unroll
                for (int i = 0; i < Plan::PER_OUT; i++)
                    send_pair(res_part_to + (s + i) * 16 * 8, total[i], res_part_bar);
            }
        }
        if (tid < res_each) {
            float2 sum = {};
            barrier_watch(res_parts_here, phase);
#pragma unroll
            for (int i = 0; i < CLUSTER_BLOCKS; i++)
                sum.x += res_parts[i * res_each + tid].x, sum.y += res_parts[i * res_each + tid].y;
            put_tagged(p.res_words + (rank * CLUSTERS_MAX + cluster) * res_each + tid,
                       __float_as_uint(sum.x), __float_as_uint(sum.y), tag);
        }
        if (tid == 0) barrier_expect(res_parts_here, res_part_bytes);
    }
    { // the head: as many panels at once as the sums have room for
        const int all = (p.V + TILE - 1) / TILE, each = (all + (int)gridDim.x - 1) / (int)gridDim.x,
                  from = blockIdx.x * each, count = max(0, min(each, all - from)),
                  at_once = 2 * channels / TILE;
#pragma unroll 1
        for (int done = 0; done < count; done += at_once) {
            const int now = min(at_once, count - done), row = (from + done) * TILE + tid;
            packed_panels<BITS, WIDTH>(ring, sums, place.sum_rows, x, peak, now);
            sync_workers<SOLO_THREADS>();
            if (tid < TILE * now && row < p.V) {
                float v = 0;
#pragma unroll
                for (int i = 0; i < SOLO_WARPS; i++) v += sums[i * place.sum_rows + tid];
                p.logits[row] = v * scale;
            }
            sync_workers<SOLO_THREADS>();
        }
    }
    if (blockIdx.x == 0 && tid == 0)
        *p.turn += 1; // every block has read it: this one has numbers from all of them
#endif
}

// The shape of the launch: as few channels a block as clusters run at once. False where it does not
// fit the model or the GPU.
template <int BITS, int WIDTH> static bool packed_plan(const Device *d, const Config *c, Solo *q) {
    typedef PackedPlan<BITS, WIDTH> Plan;
    SoloArgs *p = &q->args;
    const int units = c->E / TILE;
    p->P = (c->R + 2 * c->N + TILE - 1) / TILE * TILE;
    p->slot_bytes = (std::max((int)Plan::SLOT, TILE * c->R * 2) + 127) / 128 * 128;
    q->kernel = solo_packed_kernel<BITS, WIDTH>;
    if (p->P > Plan::X_PANELS * SOLO_WARPS * TILE) return false;
    for (int tiles = 1; tiles <= Plan::NT; tiles++) { // of channels, of a block
        p->channels = tiles * TILE;
        p->clusters = ((units + tiles - 1) / tiles + CLUSTER_BLOCKS - 1) / CLUSTER_BLOCKS;
        if (p->clusters > CLUSTERS_MAX) continue;
        p->vector_floats = SoloVectors(p->channels, c->N, c->K, c->D).floats;
        const int small = p->vector_floats * 4 + p->P / TILE * tiles * Plan::TILE_SIZE;
        p->small_bytes = (small + 127) / 128 * 128;
        for (p->slots = RING_SLOTS; p->slots; p->slots--) {
            q->shared = PackedShared(p->slots, p->slot_bytes, p->small_bytes, p->channels, c->D,
                                     p->P, Plan::X_PANELS)
                            .bytes;
            if (q->shared <= (size_t)d->shared_limit) break;
        }
        if (p->slots < 4) return false;
        p->flying = std::min(p->slots, std::max(2, PACKED_FLYING / p->slot_bytes));
        const int at_once = clusters_at_once(q->kernel, p->clusters, SOLO_THREADS + 32, q->shared);
        if (at_once < 0) return false;
        if (at_once >= p->clusters) return true;
    }
    return false;
}
template <int BITS> static bool packed_plan(const Device *d, const Config *c, Solo *q) {
    switch (c->D % 256 ? 0 : c->D / 256) {
    case 3:
        return packed_plan<BITS, 3>(d, c, q);
    case 4:
        return packed_plan<BITS, 4>(d, c, q);
    case 6:
        return packed_plan<BITS, 6>(d, c, q);
    case 8:
        return packed_plan<BITS, 8>(d, c, q);
    case 10:
        return packed_plan<BITS, 10>(d, c, q);
    case 16:
        return packed_plan<BITS, 16>(d, c, q);
    default:
        return false;
    }
}
// Whether one sequence takes this kernel. The one rule: 8 or 4 bits, Hopper, and a shape that fits.
static bool solo_packed_fits(const Gpu *g, Solo *q) {
    const Config *c = &g->config;
    const int bits = g->unpacking.bits;
    *q = {}, q->args.n_layer = c->n_layer;
    return bits && !g->portable_only && g->device.hopper && g->bf16_compute &&
           !(c->flags & (FLAG_PROJ_BIAS | FLAG_LAYER_NORM)) && c->E % TILE == 0 && c->R % 8 == 0 &&
           c->N <= SOLO_STATES && c->K <= SOLO_TAPS &&
           (bits == 8 ? packed_plan<8>(&g->device, c, q) : packed_plan<4>(&g->device, c, q));
}

// What it keeps among the activations, in bytes; 0: it does not run.
static size_t solo_packed_bytes(const Gpu *g) {
    Solo q;
    return solo_packed_fits(g, &q) ? vectors_bytes(q.args) : 0;
}

// NULL if it does not fit, or the memory does not suffice.
static Solo *solo_packed_new(Gpu *g) {
    Solo q;
    if (!solo_packed_fits(g, &q)) return NULL;
    const Config *c = &g->config;
    Device *d = &g->device;
    SoloArgs *p = &q.args;
    p->D = c->D, p->E = c->E, p->N = c->N, p->K = c->K, p->R = c->R, p->V = c->V;
    p->eps = c->norm_eps, p->unit = TILE, p->pair = 1;
    p->mixer_eps = c->flags & FLAG_MIXER_NORM ? c->mixer_eps : 0;
    const size_t L = (size_t)c->n_layer;
    SoloLayer *layers = NULL;
    for (int measure = 1; measure >= 0; measure--) {
        Arena a = {(char *)q.memory, 0};
        a.take(layers, L), take_vectors(g, &a, p);
        a.take(p->xdb_words, (size_t)32 * CLUSTER_BLOCKS * CLUSTERS_MAX);
        a.take(p->res_words, (size_t)c->D / 2 * CLUSTERS_MAX), a.take(p->turn, 1);
        if (!measure) break;
        if (cudaMalloc(&q.memory, a.used) != cudaSuccess) return cudaGetLastError(), (Solo *)NULL;
        clear(d, q.memory, a.used, "weights");
    }
    p->layers = layers;
    std::vector<SoloLayer> host(L);
    for (size_t layer = 0; layer < L; layer++) {
        const LayerWeights *w = &g->w.layer[layer];
        host[layer] = {NULL, (const bf16 *)w->dt_proj, (const unsigned char *)w->in_proj,
                       (const unsigned char *)w->x_proj, (const unsigned char *)w->out_proj};
    }
    copy(d, layers, host.data(), L * sizeof(SoloLayer), "weights");
    check_cuda(d, cudaStreamSynchronize(d->stream), "weights"); // host goes
    p->res = g->res, p->norm = (const float *)g->w.layer[0].norm, p->logits = g->at->logits,
    p->tiles_head = (const unsigned char *)g->w.head;
    g->work_of = NULL;
    return new Solo(q);
}
