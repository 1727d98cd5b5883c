// step_many_hopper.cuh - one token of 2 to 64 sequences in bf16 on Hopper: one kernel for all
// layers. Included by mamba_cuda.cu. It needs code for sm_90a, which alone has wgmma.
//
// Clusters of 8 blocks run all at once, with three exchanges among all of them in a layer. A block
// reads parts of the matrices that no other block reads, but for x_proj and dt_proj:
//   1 in_proj: a quarter of the inputs (block r: quarter r % 4) times some rows. The four sums for
//     an output meet in one block of the cluster (exchange.cuh, 4), which writes xz to device
//     memory as words with a tag (5); a block that needs some polls for them.
//   2 From here on a cluster has sequences of its own, up to 5, and a block an eighth of the
//     channels, the slice: convolution; x_proj, of whose outputs all blocks of the cluster send
//     each other 8 sums; dt_proj, the step of the scan, the gate. y goes to device memory; all
//     blocks meet (6).
//   3 out_proj: of the slice, of all sequences, times the columns of the cluster. Block r adds up
//     sequences 8r..8r+7 and the residual stream, which stays in registers. Times the norm's weight
//     it goes to device memory, and so do its squares; all blocks meet (6).
// All that a block reads of weights and states comes through the ring (3), layers ahead, in boxes
// that the copy engine puts in the order in which tensor cores read them.

enum { WIDE_SEQUENCES = 64 };                             // at the most
enum { WIDE_EACH = 5 };                                   // sequences of a cluster, at the most
enum { WIDE_PARTS = 4 };                                  // parts of the inputs of in_proj
enum { WIDE_WARPS = 12, WIDE_THREADS = 32 * WIDE_WARPS }; // and the warp that feeds the ring
enum { WIDE_GROUP = 48 };                                 // rows that four warps multiply at once
// Rows of a slot, at the most; a slot has 64 inputs of each. Of x_proj and dt_proj: a tile a warp.
enum { WIDE_ROWS = 144, WIDE_ROWS_FEW = 8 * WIDE_WARPS };

// What follows from D. SLICE: channels of a block; CHUNKS: of 64 of them. SUB: channels of the
// slice at a time. PAIRS: pairs of columns of a cluster, a lane. ITEMS: groups of four channels of
// the convolution, a thread. TEAM: warps that take a sequence of the step of the scan.
template <int D> struct WideShape {
    static constexpr int E = 2 * D, SLICE = E / CLUSTER_BLOCKS, CHUNKS = SLICE / 64,
                         PITCH = SLICE * 2 + 16;
    static constexpr int SUB = D == 2560 ? 160 : D % 768 == 0 ? 192 : 128, SUBS = SLICE / SUB;
    static constexpr int PAIRS = D == 768 ? 1 : D <= 1536 ? 2 : 3;
    static constexpr int QUADS = SLICE / 4,
                         ITEMS = (WIDE_EACH * QUADS + WIDE_THREADS - 1) / WIDE_THREADS;
    static constexpr int TEAM = SUB / 32, TEAMS = WIDE_WARPS / TEAM;
};

struct WideLayer {
    CUtensorMap in, x, dt, out; // (2E,D), (P,E), (E,R), (D,E), in boxes of rows by 64
};
// The rows of a matrix that a block has, at the most: tiles of 8, in so many slots of so many rows.
struct WideCut {
    int tiles, blocks, rows;
    void set(int tiles_, int rows_) {
        tiles = tiles_, blocks = (tiles * 8 + rows_ - 1) / rows_;
        rows = (tiles + blocks - 1) / blocks * 8;
    }
};
struct WideArgs {
    const WideLayer *layers;   // (n_layer)
    const float *conv;         // (n_layer,8,subs,K + 1,sub): taps, then the bias
    const float *scan;         // (n_layer,8,subs,N + 2,sub): dt_bias, D_skip, A
    const float *const *norms; // (n_layer)
    float *res;                // (S,D)
    bf16 *x;                   // (S,D): the residual stream times the norm's weight
    bf16 *y;                   // (S,E)
    uint4 *xz;                 // (S,2E / 4): two pairs, each with a tag
    float *squares;            // (clusters,SEQUENCES)
    float *h;                  // (n_layer,S,N,E)
    float *window;             // (n_layer,S,K - 1,E)
    uint32_t *flags;           // (blocks,FLAG_STRIDE)
    uint32_t *turn;            // steps so far
    WideCut in;                // rows of in_proj of half a cluster
    WideCut x_proj;            // all rows
    WideCut dt;                // rows of dt_proj of a slice
    WideCut out;               // rows of out_proj of a cluster
    int S, clusters, slots, slot_bytes, slice, subs, sub;
    int n_layer, N, K, R, P;
    uint32_t P_inverse; // 2^20 / P, rounded up
    float eps;
};

// Offsets in shared memory. Most places hold several things in turn:
//   sums   sums of out_proj (8,8,columns); of in_proj (PARTS,16,rows) in bf16; u, gate, delta
//          (most,slice) each
//   bc     B_ssm, C_ssm (most,2N)
//   scale  of the norm (8)
//   end    x or y (SEQUENCES,slice); sums of x_proj (8,most,P); behind them, at u and low, what is
//          multiplied next, in bf16
//   then the ring. `end` and the ring are rounded up to a multiple of 1024, from which the copy
//   engine counts its order of 16 bytes.
struct WideShared {
    size_t sums, bc, scale, end, a_bytes, u, low, bytes;
    int most; // sequences of a cluster
    __host__ __device__ WideShared(const WideArgs &p) {
        most = (p.S + p.clusters - 1) / p.clusters;
        size_t out = (size_t)64 * p.out.tiles * 8 * 4,
               in = (size_t)WIDE_PARTS * 16 * p.in.tiles * 8 * 2,
               scan = (size_t)3 * most * p.slice * 4, xdb = (size_t)CLUSTER_BLOCKS * most * p.P * 4,
               pitch = p.slice * 2 + 16, low_pitch = (p.slice / 4 + 63) / 64 * 128 + 16;
        if (out < scan) out = scan;
        if (out < in) out = in;
        sums = ((2 * RING_SLOTS + 4) * 8 + 127) / 128 * 128, bc = sums + out;
        scale = bc + (size_t)most * 2 * p.N * 4, end = scale + 32;
        u = xdb, low = u + 8 * pitch, a_bytes = low + 8 * low_pitch;
        if (a_bytes < (size_t)WIDE_SEQUENCES * p.slice * 2)
            a_bytes = (size_t)WIDE_SEQUENCES * p.slice * 2;
        a_bytes = (a_bytes + 1023) / 1024 * 1024;
        bytes = end + 1023 + a_bytes + (size_t)p.slots * p.slot_bytes;
        bytes += WIDE_GROUP * 128; // a product may read beyond its rows
    }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A box of a matrix of rows: from input k and row on.
__device__ inline void copy_box(void *to, const CUtensorMap *map, int k, int row,
                                uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, "
                 "%3}], [%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(k), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}
// Feeds the ring with all that the block reads of weights and states, in the order of use.
template <int D>
__device__ inline void wide_fetch(const WideArgs &p, const CUtensorMap *map_h, Ring ring, int rank,
                                  int in_first, int out_first, int s_first, int n_s) {
    using Q = WideShape<D>;
    constexpr int SUB = Q::SUB;
    const int lane = threadIdx.x % 32, channel = rank * Q::SLICE, conv_floats = (p.K + 1) * SUB,
              scan_floats = (p.N + 2) * SUB;
    auto boxes = [&](const CUtensorMap *map, const WideCut &cut, int chunks, int k, int row) {
#pragma unroll 1
        for (int i = 0, left = chunks; i < cut.blocks * chunks; i++, ring.next()) {
            unsigned char *to = ring.claim(cut.rows * 128);
            if (lane == 0) copy_box(to, map, k, row, ring.full());
            k += 64;
            if (--left == 0) left = chunks, k -= chunks * 64, row += cut.rows;
        }
    };
    auto vectors = [&](const float *from, int floats) {
        unsigned char *to = ring.claim(floats * 4);
        if (lane == 0) copy_bulk(to, from, floats * 4, ring.full());
        ring.next();
    };
#pragma unroll 1
    for (int layer = 0; layer < p.n_layer; layer++) {
        const WideLayer *w = p.layers + layer;
        const size_t place = ((size_t)layer * CLUSTER_BLOCKS + rank) * Q::SUBS;
        boxes(&w->in, p.in, Q::CHUNKS, rank % WIDE_PARTS * Q::SLICE, in_first);
        if (layer == 0)
            asm volatile("griddepcontrol.wait;" ::: "memory"); // states are of the step before
        if (n_s) {
            const int rows = n_s * (p.K - 1);
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                vectors(p.conv + (place + q) * conv_floats, conv_floats);
                unsigned char *to = ring.claim(rows * SUB * 4);
                if (lane < rows)
                    copy_bulk(to + lane * SUB * 4,
                              p.window +
                                  (((size_t)layer * p.S + s_first) * (p.K - 1) + lane) * Q::E +
                                  channel + q * SUB,
                              SUB * 4, ring.full());
                ring.next();
            }
            boxes(&w->x, p.x_proj, Q::CHUNKS, channel, 0);
            boxes(&w->dt, p.dt, (D / 16 + 63) / 64, 0, channel);
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                vectors(p.scan + (place + q) * scan_floats, scan_floats);
#pragma unroll 1
                for (int s = 0; s < n_s; s++, ring.next()) {
                    unsigned char *to = ring.claim(p.N * SUB * 4);
                    if (lane == 0)
                        copy_box(to, map_h, channel + q * SUB, (layer * p.S + s_first + s) * p.N,
                                 ring.full());
                }
            }
        }
        boxes(&w->out, p.out, Q::CHUNKS, channel, out_first);
    }
}

// The activations of all sequences, at `a` in boxes of (SEQUENCES,64), times a block of rows of a
// matrix that comes through the ring, 64 inputs a slot. Four warps take 48 rows; their tensor cores
// read both from shared memory. take(m, tile, sums) gets the sums of sequences 16m + lane / 4 and 8
// more, of rows 8 tile + 2 (lane % 4) and one more.
__host__ __device__ constexpr int wide_group(int chunks) { // slots at a time
    return chunks % 4 == 0 ? 4 : chunks % 3 == 0 ? 3 : chunks % 2 == 0 ? 2 : 1;
}
// The descriptor of rows of 128 bytes, whose 16-byte units lie in the order that repeats after 8
// rows.
__device__ inline uint64_t wide_operand(uint32_t at) {
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)64 << 32 |
           (uint64_t)1 << 62;
}
template <int CHUNKS, class Take>
__device__ inline void wide_product(Ring &ring, int tid, uint32_t a, int m_tiles, int tiles,
                                    Take take) {
    constexpr int GROUP = wide_group(CHUNKS);
    const int first = tid / 128 * (WIDE_GROUP / 8), m = tid / 32 % 4;
    const uint32_t rows =
        first < tiles ? first * 1024 : 0; // a group without rows: sums that nobody uses
    float c[24] = {};
#pragma unroll 1
    for (int i = 0; i < CHUNKS; i += GROUP) {
        Ring ahead = ring;
        uint32_t slot[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++, ahead.next()) slot[g] = shared_address(ahead.wait()) + rows;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4 * GROUP; k++)
            asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
                         "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,"
                         "%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, %24, %25, 1, 1, 1, 0, 0;"
                         : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                           "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                           "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
                           "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]),
                           "+f"(c[22]), "+f"(c[23])
                         : "l"(wide_operand(a + (i + k / 4) * WIDE_SEQUENCES * 128 + k % 4 * 32)),
                           "l"(wide_operand(slot[k / 4] + k % 4 * 32)));
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::
                         : "memory");
#pragma unroll
        for (int g = 0; g < GROUP; g++) ring.release();
    }
    if (m < m_tiles)
#pragma unroll
        for (int n = 0; n < WIDE_GROUP / 8; n++)
            if (first + n < tiles) take(m, first + n, c + 4 * n);
}

// The same for up to 8 sequences, whose activations lie at `a` in rows of PITCH bytes. A tile a
// warp. take(sums) gets those of sequence lane / 4, of rows 8 warp + 2 (lane % 4) and one more.
template <int PITCH, int CHUNKS, class Take>
__device__ inline void wide_few(Ring &ring, int tid, uint32_t a, int tiles, Take take) {
    constexpr int GROUP = wide_group(CHUNKS);
    const int lane = tid % 32, warp = tid / 32;
    const uint32_t a_row = a + lane % 8 * PITCH + lane / 8 * 16, row = warp * 1024 + lane % 8 * 128;
    float c[2][4] = {};
#pragma unroll 1
    for (int i = 0; i < CHUNKS; i += GROUP) {
        Ring ahead = ring;
        uint32_t slot[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++, ahead.next()) slot[g] = shared_address(ahead.wait());
#pragma unroll
        for (int g = 0; g < GROUP; g++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (warp < tiles) {
                    uint4 v = matrices<false>(a_row + (i + g) * 128 + half * 64),
                          w = matrices<false>(slot[g] + row +
                                              ((lane / 8 + half * 4) ^ (lane % 8)) * 16);
                    tensor_product(c[0], v.x, 0, v.y, 0, w.x, w.y);
                    tensor_product(c[1], v.z, 0, v.w, 0, w.z, w.w);
                }
#pragma unroll
        for (int g = 0; g < GROUP; g++) ring.release();
    }
    if (warp < tiles) take(make_float2(c[0][0] + c[1][0], c[0][1] + c[1][1]));
}

// Rows of activations, a slice of their inputs, to shared memory. Rows beyond S keep what they
// have.
template <int D>
__device__ inline void wide_load(int S, int tid, uint32_t a, const bf16 *from, int ld) {
    constexpr int PIECES = WideShape<D>::SLICE / 8;
    const int lane = tid % 32;
#pragma unroll 2
    for (int s = tid / 32; s < S; s += WIDE_WARPS)
#pragma unroll
        for (int i = 0; i < PIECES; i += 32) {
            int k = lane + i; // of 16 bytes, in the order of the boxes
            if (k < PIECES)
                copy_16(a + k / 8 * WIDE_SEQUENCES * 128 + s * 128 + (k % 8 ^ s % 8) * 16,
                        from + (uint32_t)(s * ld) + k * 8);
        }
}
__device__ inline void wide_loaded() { // and the tensor cores may read it
    asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
    sync_workers<WIDE_THREADS>();
}
#endif

template <int D>
__global__ void __launch_bounds__(WIDE_THREADS + 32, 1)
    wide_kernel(const __grid_constant__ WideArgs p, const __grid_constant__ CUtensorMap map_h) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    unsigned char *memory = block_memory;
    int tid = threadIdx.x;
    const int rank = blockIdx.x % CLUSTER_BLOCKS, cluster = blockIdx.x / CLUSTER_BLOCKS, N = p.N,
              K = p.K, R = p.R, P = p.P, m_tiles = (p.S + 15) / 16;
    using Q = WideShape<D>;
    constexpr int E = Q::E, SLICE = Q::SLICE, SUB = Q::SUB, PITCH = Q::PITCH, CHUNKS = Q::CHUNKS,
                  LOW_CHUNKS = (D / 16 + 63) / 64, LOW_PITCH = LOW_CHUNKS * 128 + 16;
    const WideShared place(p);
    const int most = place.most;
    // Who has what: half a cluster some rows of in_proj, a cluster some columns of out_proj and
    // some sequences.
    auto cut = [](int i, int of, int n) { return (int)((int64_t)i * n / of); };
    const int half = cluster * 2 + rank / WIDE_PARTS, halves = p.clusters * 2,
              in_first = cut(half, halves, E / 4),
              in_tiles = cut(half + 1, halves, E / 4) - in_first,
              out_first = cut(cluster, p.clusters, D / 8),
              out_tiles = cut(cluster + 1, p.clusters, D / 8) - out_first,
              s_first = cut(cluster, p.clusters, p.S),
              n_s = cut(cluster + 1, p.clusters, p.S) - s_first, columns = out_tiles * 8;
    uint64_t *xdb_here = (uint64_t *)memory + 2 * RING_SLOTS, *sums_here = xdb_here + 1,
             *parts_here = xdb_here + 2, *x_read = xdb_here + 3;
    const uint32_t a = (shared_address(memory + place.end) + 1023) / 1024 * 1024,
                   a_at = a - shared_address(memory), ring_at = a_at + (uint32_t)place.a_bytes;
    Ring ring = {ring_at, (uint32_t)p.slot_bytes, ring_at, p.slots, 0, 0};
    bf16 *parts = (bf16 *)(memory + place.sums);
    float *xdb_parts = (float *)(memory + a_at), *sums = (float *)(memory + place.sums), *u = sums,
          *gate = u + most * SLICE, *delta = gate + most * SLICE,
          *bc = (float *)(memory + place.bc), *scale = (float *)(memory + place.scale);
    const int xdb_bytes = CLUSTER_BLOCKS * n_s * P * 4,
              sums_bytes = rank < 2 * m_tiles ? 64 * columns * 4 : 0,
              parts_bytes = rank % WIDE_PARTS < m_tiles ? WIDE_PARTS * 16 * in_tiles * 8 * 2 : 0;
    if (tid == 0) {
        uint64_t *barriers = (uint64_t *)memory;
        for (int i = 0; i < p.slots; i++)
            barrier_init(barriers + i, 1),
                barrier_init(barriers + RING_SLOTS + i, RELEASERS * WIDE_WARPS);
        barrier_init(xdb_here, 1), barrier_init(sums_here, 1), barrier_init(parts_here, 1);
        barrier_init(x_read, CLUSTER_BLOCKS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        barrier_expect(xdb_here, xdb_bytes), barrier_expect(sums_here, sums_bytes);
        barrier_expect(parts_here, parts_bytes);
    }
    __syncthreads();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::
                     : "memory"); // the barriers of the others are ready
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (tid / 32 == WIDE_WARPS) {
        wide_fetch<D>(p, &map_h, ring, rank, in_first * 8, out_first * 8, s_first, n_s);
        return;
    }
    wait_for_input();
    uint32_t tag = *(volatile uint32_t *)p.turn * (uint32_t)(3 * p.n_layer) + 1;
    // The sequence whose residual stream this warp keeps, of the columns of the cluster.
    const int own = tid < 256 ? rank * 8 + tid / 32 : WIDE_SEQUENCES;
    float2 res[Q::PAIRS], norm[Q::PAIRS];
    auto pairs = [&](auto each) {
        const int lane = tid % 32;
#pragma unroll
        for (int i = 0; i < Q::PAIRS; i++)
            if (own < p.S && 2 * (lane + 32 * i) < columns)
                each(i, out_first * 8 + 2 * (lane + 32 * i));
    };
    pairs([&](int i, int at) {
        res[i] = *(const float2 *)(p.res + (size_t)own * D + at);
        norm[i] = *(const float2 *)(p.norms[0] + at);
    });

#pragma unroll 1
    for (int layer = 0;; layer++) {
        // The compiler must compute what depends on tid where it is used. It would do so once for
        // all layers, which needs more registers than there are; and what 12 warps spill does not
        // fit into the first-level cache that shared memory leaves.
        asm volatile("" : "+r"(tid));
        const int phase = layer & 1, warp = tid / 32, lane = tid % 32;
        if (layer) {
            if (sums_bytes) barrier_watch(sums_here, phase ^ 1);
            pairs([&](int i, int) {
#pragma unroll
                for (int part = 0; part < CLUSTER_BLOCKS; part++) {
                    float2 v = *(const float2 *)(sums + (part * 8 + warp) * columns +
                                                 2 * (tid % 32 + 32 * i));
                    res[i].x += v.x, res[i].y += v.y;
                }
            });
            if (tid == 0) barrier_expect(sums_here, sums_bytes);
        }
        if (layer == p.n_layer) break;
        float square = 0;
        pairs([&](int i, int at) {
            *(uint32_t *)(p.x + (size_t)own * D + at) =
                pack(res[i].x * norm[i].x, res[i].y * norm[i].y);
            square += res[i].x * res[i].x + res[i].y * res[i].y;
        });
        square = warp_sum(square);
        if (lane == 0 && own < p.S) p.squares[cluster * WIDE_SEQUENCES + own] = square;
        raise_flag<WIDE_THREADS>(p.flags, tag);
        wait_for_flags<WIDE_THREADS>(p.flags, tag++);
        wide_load<D>(p.S, tid, a, p.x + rank % WIDE_PARTS * SLICE, D);
        if (warp < n_s) {
            float v =
                lane < p.clusters ? __ldcg(p.squares + lane * WIDE_SEQUENCES + s_first + warp) : 0;
            v = rsqrtf(warp_sum(v) / (float)D + p.eps);
            if (lane == 0) scale[warp] = v;
        }
        wide_loaded();
#pragma unroll 1
        for (int b = 0; b < p.in.blocks; b++) // the four parts of 16 sequences meet in one block
            wide_product<CHUNKS>(
                ring, tid, a, m_tiles, min(p.in.rows / 8, in_tiles - b * p.in.rows / 8),
                [&](int m, int tile, const float *c) {
                    uint32_t to = shared_address(parts +
                                                 ((rank % WIDE_PARTS * 16 + lane / 4) * in_tiles +
                                                  b * p.in.rows / 8 + tile) *
                                                     8 +
                                                 lane % 4 * 2),
                             block = rank / WIDE_PARTS * WIDE_PARTS + m,
                             bar = address_in(shared_address(parts_here), block);
                    to = address_in(to, block);
                    send(to, pack(c[0], c[1]), bar),
                        send(to + in_tiles * 128, pack(c[2], c[3]), bar);
                });
        if (parts_bytes) barrier_watch(parts_here, phase);
        if (tid == 0) barrier_expect(parts_here, parts_bytes);
        for (int s = warp; s < 16 && rank % WIDE_PARTS * 16 + s < p.S; s += WIDE_WARPS)
#pragma unroll 1
            for (int i = lane; i < in_tiles; i += 32) {
                float v[8] = {};
#pragma unroll
                for (int part = 0; part < WIDE_PARTS; part++) {
                    uint4 w = *(const uint4 *)(parts + ((part * 16 + s) * in_tiles + i) * 8);
                    v[0] += low_half(w.x), v[1] += high_half(w.x), v[2] += low_half(w.y),
                        v[3] += high_half(w.y);
                    v[4] += low_half(w.z), v[5] += high_half(w.z), v[6] += low_half(w.w),
                        v[7] += high_half(w.w);
                }
                uint4 *to = p.xz + (rank % WIDE_PARTS * 16 + s) * (E / 2) + (in_first + i) * 2;
                put_tagged(to, pack(v[0], v[1]), pack(v[2], v[3]), tag),
                    put_tagged(to + 1, pack(v[4], v[5]), pack(v[6], v[7]), tag);
            }
        sync_workers<WIDE_THREADS>(); // all warps have multiplied from x
        if (tid < CLUSTER_BLOCKS)     // so the cluster's blocks may overwrite it with x_proj's sums
            arrive_at(address_in(shared_address(x_read), tid));
        if (n_s) {
            float4 x[Q::ITEMS], z[Q::ITEMS];
#pragma unroll
            for (int j = 0; j < Q::ITEMS; j++) { // a sequence's four channels
                int i = tid + j * WIDE_THREADS, item_s = i / Q::QUADS, c = i % Q::QUADS * 4;
                if (item_s >= n_s) break;
                const uint4 *from = p.xz + (s_first + item_s) * (E / 2) + (rank * SLICE + c) / 4;
                uint2 xs = get_tagged(from, tag), zs = get_tagged(from + E / 4, tag);
                float r = scale[item_s];
                x[j] = make_float4(low_half(xs.x) * r, high_half(xs.x) * r, low_half(xs.y) * r,
                                   high_half(xs.y) * r);
                z[j] = make_float4(low_half(zs.x) * r, high_half(zs.x) * r, low_half(zs.y) * r,
                                   high_half(zs.y) * r);
            }
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                const float *conv = (const float *)ring.wait();
                Ring second = ring;
                second.next();
                const float *window = (const float *)second.wait();
#pragma unroll
                for (int j = 0; j < Q::ITEMS; j++) {
                    int i = tid + j * WIDE_THREADS, item_s = i / Q::QUADS,
                        c = i % Q::QUADS * 4 - q * SUB;
                    if (item_s >= n_s || c < 0 || c >= SUB) continue;
                    float *keep = p.window +
                                  (((size_t)layer * p.S + s_first + item_s) * (K - 1)) * E +
                                  rank * SLICE + q * SUB + c;
                    typedef Group<float, 4> Four;
                    Four sum = *(const Four *)(conv + K * SUB + c),
                         now = {x[j].x, x[j].y, x[j].z, x[j].w};
#pragma unroll
                    for (int k = 0; k < SOLO_TAPS; k++) {
                        if (k >= K) break;
                        Four tap = *(const Four *)(conv + k * SUB + c),
                             input =
                                 k + 1 < K
                                     ? *(const Four *)(window + (item_s * (K - 1) + k) * SUB + c)
                                     : now;
                        sum = conv_sum<1>(sum, &tap, &input);
                        if (k) *(Four *)(keep + (size_t)(k - 1) * E) = input;
                    }
                    float4 v =
                        make_float4(silu(sum.v[0]), silu(sum.v[1]), silu(sum.v[2]), silu(sum.v[3]));
                    *(float4 *)(u + i * 4) = v;
                    *(float4 *)(gate + i * 4) =
                        make_float4(silu(z[j].x), silu(z[j].y), silu(z[j].z), silu(z[j].w));
                    *(uint2 *)(memory + a_at + place.u + item_s * PITCH + (q * SUB + c) * 2) =
                        make_uint2(pack(v.x, v.y), pack(v.z, v.w));
                }
                ring.release(), ring.release();
            }
            barrier_watch(x_read, phase);
            sync_workers<WIDE_THREADS>();
#pragma unroll 1
            for (int b = 0; b < p.x_proj.blocks; b++)
                wide_few<PITCH, CHUNKS>(
                    ring, tid, shared_address(memory + a_at + place.u),
                    min(p.x_proj.rows / 8, p.x_proj.tiles - b * p.x_proj.rows / 8), [&](float2 c) {
                        if (lane / 4 >= n_s) return;
                        uint32_t to = shared_address(xdb_parts + (rank * n_s + lane / 4) * P +
                                                     b * p.x_proj.rows + warp * 8 + lane % 4 * 2);
#pragma unroll 2
                        for (int i = 0; i < CLUSTER_BLOCKS; i++)
                            send(address_in(to, i), __float_as_uint(c.x), __float_as_uint(c.y),
                                 address_in(shared_address(xdb_here), i));
                    });
            barrier_watch(xdb_here, phase);
            if (tid == 0) barrier_expect(xdb_here, xdb_bytes);
            bf16 *low = (bf16 *)(memory + a_at + place.low);
            for (int i = tid; i < n_s * P; i += WIDE_THREADS) {
                float v = 0;
#pragma unroll
                for (int part = 0; part < CLUSTER_BLOCKS; part++)
                    v += xdb_parts[part * n_s * P + i];
                int item_s = (int)((uint32_t)i * p.P_inverse >> 20), o = i - item_s * P;
                if (o < R) low[item_s * (LOW_PITCH / 2) + o] = __float2bfloat16_rn(v);
                else bc[item_s * 2 * N + o - R] = v;
            }
            for (int o = R + tid; o < LOW_PITCH / 2 - 8;
                 o += WIDE_THREADS) // up to a multiple of 64
                for (int row = 0; row < n_s; row++)
                    low[row * (LOW_PITCH / 2) + o] = __float2bfloat16_rn(0);
            sync_workers<WIDE_THREADS>();
#pragma unroll 1
            for (int b = 0; b < p.dt.blocks; b++)
                wide_few<LOW_PITCH, LOW_CHUNKS>(
                    ring, tid, shared_address(memory + a_at + place.low),
                    min(p.dt.rows / 8, p.dt.tiles - b * p.dt.rows / 8), [&](float2 c) {
                        if (lane / 4 < n_s)
                            *(float2 *)(delta + lane / 4 * SLICE + b * p.dt.rows + warp * 8 +
                                        lane % 4 * 2) = c;
                    });
            sync_workers<WIDE_THREADS>();
            // The step of the scan: a lane is a channel with all its states. Teams of warps take
            // turns with the sequences.
            const int team = warp / Q::TEAM, c = warp % Q::TEAM * 32 + lane;
#pragma unroll 1
            for (int q = 0; q < Q::SUBS; q++) {
                const float *vectors = (const float *)ring.wait() + c;
                const int at = q * SUB + c;
                float A[SOLO_STATES], dt_bias = vectors[0], D_skip = vectors[SUB];
#pragma unroll
                for (int n = 0; n < SOLO_STATES; n++)
                    A[n] = n < N ? vectors[(n + 2) * SUB] * LOG2E : 0;
                ring.release();
                int turn = 0;
#pragma unroll 1
                for (int s = 0; s < n_s; s++) {
                    const float *h_in = (const float *)ring.wait() + c;
                    if (turn == team) {
                        float d = softplus(delta[s * SLICE + at] + dt_bias), x = u[s * SLICE + at],
                              dx = d * x, sum = D_skip * x;
                        float *h_out =
                            p.h + ((size_t)layer * p.S + s_first + s) * N * E + rank * SLICE + at;
                        const float4 *B = (const float4 *)(bc + s * 2 * N),
                                     *C = (const float4 *)(bc + s * 2 * N + N);
#pragma unroll
                        for (int n = 0; n < SOLO_STATES; n += 4) {
                            if (n >= N) break;
                            float4 b4 = B[n / 4], c4 = C[n / 4];
                            const float bs[4] = {b4.x, b4.y, b4.z, b4.w},
                                        cs[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                float state = h_in[(n + j) * SUB];
                                step_state(state, sum, exp2_fast(d * A[n + j]), dx * bs[j], cs[j]);
                                h_out[(n + j) * E] = state;
                            }
                        }
                        p.y[(s_first + s) * E + rank * SLICE + at] =
                            __float2bfloat16_rn(sum * gate[s * SLICE + at]);
                    }
                    if (++turn == Q::TEAMS) turn = 0;
                    ring.release();
                }
            }
        }
        tag++;
        raise_flag<WIDE_THREADS>(p.flags, tag);
        wait_for_flags<WIDE_THREADS>(p.flags, tag++);
        wide_load<D>(p.S, tid, a, p.y + rank * SLICE, E);
        if (layer + 1 < p.n_layer)
            pairs([&](int i, int at) { norm[i] = *(const float2 *)(p.norms[layer + 1] + at); });
        wide_loaded();
#pragma unroll 1
        for (int b = 0; b < p.out.blocks; b++)
            wide_product<CHUNKS>(
                ring, tid, a, m_tiles, min(p.out.rows / 8, out_tiles - b * p.out.rows / 8),
                [&](int m, int tile, const float *c) {
                    uint32_t to = shared_address(sums + (rank * 8 + lane / 4) * columns +
                                                 b * p.out.rows + tile * 8 + lane % 4 * 2),
                             bar = shared_address(sums_here);
                    send(address_in(to, 2 * m), __float_as_uint(c[0]), __float_as_uint(c[1]),
                         address_in(bar, 2 * m));
                    send(address_in(to, 2 * m + 1), __float_as_uint(c[2]), __float_as_uint(c[3]),
                         address_in(bar, 2 * m + 1));
                });
    }
    pairs([&](int i, int at) { *(float2 *)(p.res + (size_t)own * D + at) = res[i]; });
    if (blockIdx.x == 0 && tid == 0) *p.turn += 1; // every block has read it: all have met since
#endif
}

// Whether this build has the kernel: wgmma is in code for sm_90a only.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ const int wide_there = 1;
#else
__device__ const int wide_there = 0;
#endif
static bool code_has_wgmma() {
    int there = 0;
    if (cudaMemcpyFromSymbol(&there, wide_there, sizeof there) == cudaSuccess) return there != 0;
    cudaGetLastError();
    return false;
}

struct Wide {
    WideArgs args;
    CUtensorMap h;
    void (*kernel)(WideArgs, CUtensorMap);
    size_t shared;
    void *memory;
};

// The driver's function for such maps; NULL: it has none. Asked for once, whatever thread comes
// first: the driver may write NULL before the address, and another thread would call that.
static PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder(void) {
    static const auto encode = [] {
        void *function = NULL;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSuccess;
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        return (PFN_cuTensorMapEncodeTiled_v12000)function;
    }();
    return encode;
}

// A map of rows of `cols` numbers, bf16 or float, for boxes (box_rows,box_cols); false if there is
// none. bf16 lies in shared memory with its 16 bytes in the order that tensor cores read.
static bool tensor_map(CUtensorMap *map, bool bf16_, const void *x, size_t rows, size_t cols,
                       int box_rows, int box_cols) {
    const auto encode = tensor_map_encoder();
    cuuint64_t size[2] = {cols, rows}, bytes[1] = {cols * (bf16_ ? 2 : 4)};
    cuuint32_t box[2] = {(cuuint32_t)box_cols, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    return encode &&
           !encode(map, bf16_ ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                   2, (void *)x, size, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   bf16_ ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// The vectors of a layer as blocks read them. Grid (8, subs).
__global__ void wide_vectors_kernel(float *conv, float *scan, LayerWeights w, int sub, int E, int N,
                                    int K) {
    const int place = blockIdx.x * gridDim.y + blockIdx.y;
    const float *conv_bias = (const float *)w.conv_bias, *dt_bias = (const float *)w.dt_bias,
                *D_skip = (const float *)w.D_skip;
    conv += (size_t)place * (K + 1) * sub, scan += (size_t)place * (N + 2) * sub;
    for (int c = threadIdx.x; c < sub; c += blockDim.x) {
        int e = place * sub + c;
        for (int k = 0; k < K; k++) conv[k * sub + c] = w.conv_t[(size_t)k * E + e];
        conv[K * sub + c] = conv_bias ? conv_bias[e] : 0;
        scan[c] = dt_bias[e], scan[sub + c] = D_skip[e];
        for (int n = 0; n < N; n++) scan[(n + 2) * sub + c] = w.A_neg[(size_t)n * E + e];
    }
}

static void wide_free(Wide *q) {
    if (q) cudaFree(q->memory);
    delete q;
}

// NULL if the shape does not fit, or the GPU, or its memory.
static Wide *wide_new(Gpu *g, int S) {
    const Config *c = &g->config;
    Device *d = &g->device;
    int D = c->D, E = c->E, N = c->N, K = c->K, R = c->R;
    if (!d->hopper || !g->bf16_compute || g->unpacking.bits ||
        c->flags & (FLAG_PROJ_BIAS | FLAG_MIXER_NORM | FLAG_LAYER_NORM) || S > WIDE_SEQUENCES ||
        E != 2 * D || R % 8 || R > D / 16 || N % 4 || N > SOLO_STATES || K > SOLO_TAPS)
        return NULL;
    if (!code_has_wgmma()) return NULL;
    Wide q = {};
    WideArgs *p = &q.args;
    p->S = S, p->N = N, p->K = K, p->R = R, p->P = R + 2 * N, p->n_layer = c->n_layer;
    p->eps = c->norm_eps, p->P_inverse = (uint32_t)(((1 << 20) + p->P - 1) / p->P);
    int pairs = 0;
    auto choose = [&](auto shape) {
        p->slice = shape.SLICE, p->sub = shape.SUB, p->subs = shape.SUBS, pairs = shape.PAIRS;
        q.kernel = wide_kernel<shape.SLICE * 4>;
    };
    switch (D) {
    case 768:
        choose(WideShape<768>());
        break;
    case 1024:
        choose(WideShape<1024>());
        break;
    case 1536:
        choose(WideShape<1536>());
        break;
    case 2048:
        choose(WideShape<2048>());
        break;
    case 2560:
        choose(WideShape<2560>());
        break;
    default:
        return NULL;
    }
    // Where little memory is left for the ring, smaller slots keep more bytes on their way.
    const int rows_most = D >= 2048 ? WIDE_ROWS_FEW : WIDE_ROWS;
    p->x_proj.set((p->P + 7) / 8, WIDE_ROWS_FEW), p->dt.set(p->slice / 8, WIDE_ROWS_FEW);
    for (p->clusters = CLUSTERS_MAX;; p->clusters--) { // as many as run at once
        if (!p->clusters) return NULL;
        p->in.set((E / 4 + 2 * p->clusters - 1) / (2 * p->clusters), rows_most);
        p->out.set((D / 8 + p->clusters - 1) / p->clusters, rows_most);
        int most = (S + p->clusters - 1) / p->clusters,
            rows =
                std::max(std::max(p->in.rows, p->out.rows), std::max(p->x_proj.rows, p->dt.rows));
        p->slot_bytes =
            (std::max(std::max(rows * 128, (N + 2) * p->sub * 4), most * (K - 1) * p->sub * 4) +
             1023) /
            1024 * 1024;
        p->slots = RING_SLOTS;
        while (p->slots && (q.shared = WideShared(*p).bytes) > (size_t)d->shared_limit) p->slots--;
        if (p->slots < 4 || most > WIDE_EACH || p->out.tiles * 8 > 64 * pairs) return NULL;
        int at_once = clusters_at_once(q.kernel, p->clusters, WIDE_THREADS + 32, q.shared);
        if (at_once < 0) return NULL;
        if (at_once >= p->clusters) break;
    }
    size_t L = (size_t)c->n_layer, places = (size_t)CLUSTER_BLOCKS * p->subs;
    WideLayer *layers = NULL;
    float *conv = NULL, *scan = NULL;
    const float **norms = NULL;
    for (int measure = 1; measure >= 0; measure--) {
        Arena a = {(char *)q.memory, 0};
        a.take(layers, L), a.take(norms, L), a.take(conv, L * E * (K + 1)),
            a.take(scan, L * E * (N + 2));
        a.take(p->xz, (size_t)S * E / 2), a.take(p->x, (size_t)S * D), a.take(p->y, (size_t)S * E);
        a.take(p->squares, (size_t)CLUSTERS_MAX * WIDE_SEQUENCES);
        a.take(p->flags, (size_t)CLUSTERS_MAX * CLUSTER_BLOCKS * FLAG_STRIDE), a.take(p->turn, 1);
        if (!measure) break;
        if (cudaMalloc(&q.memory, a.used) != cudaSuccess) return cudaGetLastError(), (Wide *)NULL;
        clear(d, q.memory, a.used, "weights");
    }
    std::vector<WideLayer> host(L);
    std::vector<const float *> host_norms(L);
    bool good = tensor_map(&q.h, false, g->at->h, L * S * N, (size_t)E, N, p->sub);
    for (size_t layer = 0; layer < L; layer++) {
        const LayerWeights *w = &g->w.layer[layer];
        good =
            good &&
            tensor_map(&host[layer].in, true, w->in_proj, (size_t)2 * E, (size_t)D, p->in.rows,
                       64) &&
            tensor_map(&host[layer].x, true, w->x_proj, (size_t)p->P, (size_t)E, p->x_proj.rows,
                       64) &&
            tensor_map(&host[layer].dt, true, w->dt_proj, (size_t)E, (size_t)R, p->dt.rows, 64) &&
            tensor_map(&host[layer].out, true, w->out_proj, (size_t)D, (size_t)E, p->out.rows, 64);
        host_norms[layer] = (const float *)w->norm;
        wide_vectors_kernel<<<dim3(CLUSTER_BLOCKS, (unsigned)p->subs), 128, 0, d->stream>>>(
            conv + layer * places * (K + 1) * p->sub, scan + layer * places * (N + 2) * p->sub, *w,
            p->sub, E, N, K);
        check_launch(d, "weights");
    }
    copy(d, layers, host.data(), L * sizeof(WideLayer), "weights");
    copy(d, norms, host_norms.data(), L * sizeof *norms, "weights");
    check_cuda(d, cudaStreamSynchronize(d->stream), "weights"); // host goes
    p->layers = layers, p->conv = conv, p->scan = scan, p->norms = norms;
    p->res = g->res, p->h = g->at->h, p->window = g->at->window;
    if (!good) return cudaFree(q.memory), (Wide *)NULL;
    return new Wide(q);
}

// network() for one token of each sequence; res has their embeddings.
static void wide_step(Gpu *g, const Wide *q) {
    const Config *c = &g->config;
    launch_cluster(&g->device, CLUSTER_BLOCKS, q->kernel,
                   (unsigned)(q->args.clusters * CLUSTER_BLOCKS), WIDE_THREADS + 32, q->shared,
                   q->args, q->h);
    norm_rows(&g->device, Rows(acts_of<bf16>(g).xn, c->D), Rows(g->res, c->D), g->w.norm_f, NULL,
              c->norm_eps, q->args.S, c->D);
}
