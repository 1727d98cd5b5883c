// exchange.cuh - the protocols: how warps, blocks and clusters tell each other something, and why
// their order holds. Included by mamba_cuda.cu.
//
//   1 turns of warps             scan_relay       named barriers of a block
//   2 mail from tile to tile     scan_tiles       tagged words in device memory, tickets
//   3 a ring of slots            steps, Hopper    copy engine to warps, full and empty barriers
//   4 numbers in a cluster       steps, Hopper    stores into another block's shared memory
//   5 numbers of all clusters    steps, Hopper    tagged words in device memory
//   6 all blocks meet            step of many     a flag of each block
// One more: a kernel may start before the one ahead of it has ended, see wait_for_input() in
// device.cuh.

// HOW LONG A WAIT LASTS. Only a defect, or blocks of the same kernel that get no multiprocessor,
// can make a wait last. Time counts, not polls, since a tool or a shared GPU may make a healthy run
// slow. After wait_limit (20 s, device.cuh) a wait raises `stuck` and ends; so do all other waits
// of that kernel and of the kernels behind it, soon after. All blocks then run to their end on
// numbers that nobody uses, the host sees `stuck`, and takes another form of the kernel or tells
// which one it was. Waits inside a block or a cluster (barriers in shared memory) depend on the
// copy engine and on blocks that run at the same time by the rules of clusters. They outlast the
// others fourfold, then the kernel traps: their barriers could not be used after a wait in vain.
// The turns of warps (1) have no limit: warps of one block always run.
struct Patience {
    uint32_t polls = 0, start = 0; // start: milliseconds
    // After a poll in vain: whether waiting has lasted `times` wait_limit, or somebody gave up.
    __device__ __forceinline__ bool over(int which, uint32_t times = 1) {
        if (++polls & 1023) return false;
        uint64_t now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        const uint32_t ms = (uint32_t)(now >> 20); // of 2^20 ns
        if (!start) start = ms | 1;
        if (times == 1 && *(volatile uint32_t *)(stuck + which)) return true;
        return (int32_t)(ms - start) > (int32_t)(wait_limit * times);
    }
    // The same; gives up with the number `kernel`.
    __device__ __forceinline__ bool gives_up(int which, uint32_t kernel) {
        if (!over(which)) return false;
        *(volatile uint32_t *)(stuck + which) = kernel;
        return true;
    }
};
enum { KERNEL_TILES = 1, KERNEL_STEP = 2 }; // what is written to `stuck`: which kernel gave up

// ------------------------------------------------------------------------------------------------
// 1 Turns. Warp w writes a quarter of the states to its place in shared memory and arrives at the
// barrier of (warp, quarter); warp w + 1 waits there, then reads. 32 threads arrive and 32 wait.
// Why it holds: bar.arrive and bar.sync order the writes before the reads. The place is written
// again in the next turn of warp w. Before that, warp w receives the quarter from warp w - 1, so
// the quarter has passed through all other warps, of which warp w + 1 was the first to read it.
__device__ __forceinline__ void turn_wait(int barrier) {
    asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void turn_done(int barrier) {
    asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}

// ------------------------------------------------------------------------------------------------
// 2 Mail from tile to tile, of scan_tiles: a word of 8 bytes holds a state and a tag.
// Why it holds:
//   - A word arrives whole, so a reader that sees the tag has the state; no flag, no fence.
//   - The tag is a number that rises from tile to tile and from launch to launch, so a word of an
//     earlier tile or launch is never taken for one of this. Before the tags would wrap, the words
//     are cleared and the tags begin again.
//   - Tile i and tile i + 2 share a word. Tile i + 2 has its state from tile i + 1, which wrote it
//     only after it had read the word of tile i, so nothing is overwritten unread. But nothing
//     orders plain stores of two multiprocessors to one word: the older one may land last, and did,
//     once in some hundred million tiles. So a word is written by a maximum, with the tag on top.
//   - A tile waits only for one with an earlier ticket. Tickets are drawn when a block starts, so
//     that tile is running or done, whatever the order in which the GPU starts blocks.
// A launch cannot be captured in a graph, which would replay its tickets and tags.
struct ScanMail {
    uint64_t *words;      // device: tickets given (word 0), boxes from MAIL_BOXES on
    size_t bytes;         // of words: scan_forward_workspace()
    uint32_t ticket, tag; // before the next launch: tickets given, highest tag
    bool cleared;         // words and numbers have begun; false when new
};
enum { MAIL_BOXES = 16 };

// The words of C neighbouring channels.
template <int C> struct Mail {
    uint64_t word[C];
};
template <> struct Mail<1> {
    uint64_t word[1];
    __device__ __forceinline__ void read(const uint64_t *p) {
        asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(word[0]) : "l"(p) : "memory");
    }
    __device__ __forceinline__ bool all(uint32_t tag) const {
        return (uint32_t)(word[0] >> 32) == tag;
    }
};
template <> struct Mail<2> {
    uint64_t word[2];
    __device__ __forceinline__ void read(const uint64_t *p) {
        asm volatile("ld.relaxed.gpu.v2.u64 {%0, %1}, [%2];"
                     : "=l"(word[0]), "=l"(word[1])
                     : "l"(p)
                     : "memory");
    }
    __device__ __forceinline__ bool all(uint32_t tag) const {
        return (uint32_t)(word[0] >> 32) == tag && (uint32_t)(word[1] >> 32) == tag;
    }
};
__device__ __forceinline__ void mail_write(uint64_t *p, uint64_t v) {
    asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

enum { CLUSTER_BLOCKS = 8, CLUSTERS_MAX = 16 }; // of the kernels for a whole step
enum { RING_SLOTS = 24 };                       // at the most
enum { FLAG_STRIDE = 32 };                      // words from the flag of a block to the next

#if __CUDA_ARCH__ >= 900
// ------------------------------------------------------------------------------------------------
// Barriers in shared memory (mbarrier). A phase ends when all have arrived and all bytes are there;
// a waiting thread names the parity of the phase.
__device__ inline void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
__device__ inline void barriers_begin() { // after barrier_init(), for the others to see
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives; the phase also waits for so many bytes.
__device__ inline void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
__device__ inline void barrier_wait(uint64_t *barrier, int phase) {
    uint32_t done;
    Patience wait;
    for (;;) {
        asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(phase)
                     : "memory");
        if (done) break;
        if (wait.over(STUCK_STEP, 4)) __trap();
    }
}
// The same without sleeping: waking up takes 0.7 us.
__device__ inline void barrier_watch(uint64_t *barrier, int phase) {
    uint32_t done;
    Patience wait;
    for (;;) {
        asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(phase)
                     : "memory");
        if (done) break;
        if (wait.over(STUCK_STEP, 4)) __trap();
    }
}

// All threads of a cluster.
__device__ inline void cluster_meets() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// wait_for_input() without the start of the next kernel.
__device__ inline void step_before_ended() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// All warps of a block but the one that feeds the ring.
template <int THREADS> __device__ inline void sync_workers() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// ------------------------------------------------------------------------------------------------
// 3 A ring of slots in shared memory. One warp feeds it: it waits until a slot is empty, announces
// how many bytes come, and lets the copy engine write them. The others wait until the slot is full,
// read it, and release it, a lane a warp.
// Why it holds: the copy engine's bytes end the phase of the full barrier, so who has waited sees
// them all. A warp releases after __syncwarp(), so all of its lanes have read. A slot is filled
// again only after all warps have released it, so a waiting warp is never two phases behind, and
// the parity of a phase tells enough. Everybody passes the slots in the same order.
// racecheck does not follow __syncwarp. For it, every lane releases: -DRELEASERS=32.
#ifndef RELEASERS
#define RELEASERS 1 // lanes of a warp
#endif
extern __shared__ __align__(128) unsigned char block_memory[];

// bytes: a multiple of 16, or 0
__device__ inline void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier) {
    if (bytes)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                     "[%1], %2, [%3];" ::"r"(shared_address(to)),
                     "l"(from), "r"(bytes), "r"(shared_address(barrier))
                     : "memory");
}

struct Ring {                  // a place in the ring, the same in all threads that pass through it
    uint32_t slots, bytes, at; // offsets in shared memory
    int n, slot, phase;
    __device__ uint64_t *full() const { return (uint64_t *)block_memory + slot; }
    __device__ uint64_t *empty() const { return full() + RING_SLOTS; }
    __device__ void next() {
        at += bytes;
        if (++slot == n) slot = 0, at = slots, phase ^= 1;
    }
    __device__ unsigned char *wait() const {
        return barrier_watch(full(), phase), block_memory + at;
    }
    __device__ void release() { // by a warp
        __syncwarp();
        if (threadIdx.x % 32 < RELEASERS) barrier_arrive(empty());
        next();
    }
    __device__ unsigned char *claim(int expected) {
        barrier_wait(empty(), phase ^ 1); // passes the first time round
        if (threadIdx.x % 32 == 0) barrier_expect(full(), expected);
        __syncwarp();
        return block_memory + at;
    }
};

// ------------------------------------------------------------------------------------------------
// 4 Numbers in a cluster: a store into the shared memory of another block, whose barrier counts the
// bytes.
// Why it holds: a store and its bytes at the barrier are one operation (st.async), so who has
// waited for the bytes sees the numbers. One thread announces the bytes of the next phase after its
// wait; they may come earlier, for the phase cannot end before that thread has arrived. A place is
// written again in the next layer. Before a block gets there, it takes part in an exchange of all
// blocks (5 or 6) that no warp of this block joins before it has read the place. Where no such
// exchange lies between, the reader says that it is done: arrive_at(), after a barrier of its
// block, so that no warp still reads.

// The same place in block `rank` of the cluster.
__device__ inline uint32_t address_in(uint32_t address, int rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
__device__ inline void send(uint32_t to, uint32_t x, uint32_t y, uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(
            to),
        "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
__device__ inline void send(uint32_t to, uint32_t x, uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(x), "r"(barrier)
        : "memory");
}
__device__ inline void send(uint32_t to, float x, uint32_t barrier) {
    send(to, __float_as_uint(x), barrier);
}
__device__ inline void arrive_at(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
                 : "memory");
}

// ------------------------------------------------------------------------------------------------
// 5 Numbers of all clusters: pairs of words in device memory, each a number and a tag.
// Why it holds: a word arrives whole, and the tag says of which layer and step it is, so who sees
// the tag has the number. A block writes the words of a layer only after it has the numbers of an
// exchange that every block entered after it had read the words of the layer before. That order
// needs no fence: the numbers of the exchange are computed from the words read, so a read that saw
// the later words would depend on itself.
//
// WHO RUNS. 5 and 6 need all blocks of the launch at once. As many are launched as the GPU holds
// when nothing else runs (clusters_at_once), and one_kernel_lock lets one such kernel of the
// process run at a time. Whatever else occupies multiprocessors ends without waiting for us:
// kernels of other streams wait only for blocks that already run (2), other processes take turns
// with ours. Where that does not hold, beside another client of an MPS server, say, the waits end
// after wait_limit, and gpu_generate() repeats the tokens by the portable step.
__device__ inline void put_tagged(void *to, uint32_t x, uint32_t y, uint32_t tag) {
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1,%2};" ::"l"(to),
                 "l"((uint64_t)tag << 32 | x), "l"((uint64_t)tag << 32 | y)
                 : "memory");
}
__device__ inline ulonglong2 get_words(const void *from) {
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0,%1}, [%2];"
                 : "=l"(v.x), "=l"(v.y)
                 : "l"(from)
                 : "memory");
    return v;
}
__device__ inline bool both_tagged(ulonglong2 v, uint32_t tag) {
    return (uint32_t)(v.x >> 32) == tag && (uint32_t)(v.y >> 32) == tag;
}
__device__ inline uint2 get_tagged(const void *from, uint32_t tag) { // waits for them
    ulonglong2 v = get_words(from);
    Patience wait;
    while (!both_tagged(v, tag) && !wait.gives_up(STUCK_STEP, KERNEL_STEP)) v = get_words(from);
    return make_uint2((uint32_t)v.x, (uint32_t)v.y);
}

// sum[r] = the sums of a pair over the clusters, in all 16 lanes of half-warp i, for pairs i, i +
// 16, ... below `pairs`. words: (clusters, 16 ROUNDS). A warp polls the words of two clusters, 16
// neighbouring lanes each. The words of a cluster fill lines that nobody else writes: a line that
// is polled and that many write is slow (0.34 ms a step of 130M instead of 0.22). scratch: (8, 16
// ROUNDS). By 256 threads.
template <int ROUNDS>
__device__ inline void gather_pairs(float2 sum[ROUNDS], float2 *scratch, const ulonglong2 *words,
                                    int pairs, int clusters, uint32_t tag) {
    const int warp = threadIdx.x / 32, half = threadIdx.x / 16, lane = threadIdx.x % 16;
    ulonglong2 v[ROUNDS];
    Patience wait;
    bool all;
    do {
        all = true;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            v[r] = make_ulonglong2((uint64_t)tag << 32, (uint64_t)tag << 32);
            if (lane + 16 * r < pairs && half < clusters)
                v[r] = get_words(words + half * 16 * ROUNDS + lane + 16 * r);
        }
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) all = all && both_tagged(v[r], tag);
        // All lanes have polled as often, and one that gives up takes the warp along.
        all = __all_sync(0xffffffffu, all) ||
              __any_sync(0xffffffffu, wait.gives_up(STUCK_STEP, KERNEL_STEP));
    } while (!all);
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        float2 x =
            make_float2(__uint_as_float((uint32_t)v[r].x), __uint_as_float((uint32_t)v[r].y));
        x.x += __shfl_xor_sync(0xffffffffu, x.x, 16), x.y += __shfl_xor_sync(0xffffffffu, x.y, 16);
        if (threadIdx.x % 32 < 16) scratch[warp * 16 * ROUNDS + lane + 16 * r] = x;
    }
    sync_workers<256>();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) sum[r] = scratch[lane % 8 * 16 * ROUNDS + half + 16 * r];
#pragma unroll
    for (int step = 4; step; step /= 2)
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            sum[r].x += __shfl_xor_sync(0xffffffffu, sum[r].x, step);
            sum[r].y += __shfl_xor_sync(0xffffffffu, sum[r].y, step);
        }
}

// ------------------------------------------------------------------------------------------------
// 6 All blocks meet. A block sets a flag of its own to the tag of the meeting, and waits until the
// flags of all blocks have come so far. Flags are FLAG_STRIDE words apart, in separate lines.
// Why it holds: a barrier of the block orders the stores of its threads before the release of its
// flag. Each poll is an acquire load, so the thread that sees the flag also sees what was stored
// before it; the barrier of the block after it orders the reads of all threads behind. (Relaxed
// polls and one fence after the last were slower.) What the others wrote is read past the
// first-level cache (ld.cg, cp.async.cg).
template <int THREADS> __device__ inline void raise_flag(uint32_t *flags, uint32_t tag) {
    sync_workers<THREADS>();
    if (threadIdx.x == 0)
        asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(flags + blockIdx.x * FLAG_STRIDE),
                     "r"(tag)
                     : "memory");
}
template <int THREADS> __device__ inline void wait_for_flags(const uint32_t *flags, uint32_t tag) {
    if (threadIdx.x < gridDim.x) {
        uint32_t flag;
        Patience wait;
        do {
            asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                         : "=r"(flag)
                         : "l"(flags + threadIdx.x * FLAG_STRIDE)
                         : "memory");
        } while ((int32_t)(flag - tag) < 0 && !wait.gives_up(STUCK_STEP, KERNEL_STEP));
    }
    sync_workers<THREADS>();
}
#endif
