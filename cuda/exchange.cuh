// exchange.cuh - how warps, blocks and clusters tell each other something.
// Included by mamba_cuda.cu.

// What the blocks of scan_tiles tell each other through, for one launch after the other on one
// stream. Cleared once: tickets and tags go on from launch to launch, so a word of an earlier
// launch is never taken for one of this. Launches cannot be captured in a graph, which would replay
// the same numbers.
struct ScanMail {
    // Device, `bytes`: scan_forward_workspace(). The first word holds the tickets given, boxes
    // begin at MAIL_BOXES.
    uint64_t *words;
    size_t bytes;
    uint32_t ticket, tag; // of the next launch: tickets given before it, highest tag before it
    bool cleared;         // false when new
};
enum { MAIL_BOXES = 16 };

// Ends a kernel that waits for another block some ten seconds with an error instead of for ever:
// only a defect can cause that.
__device__ __forceinline__ void give_up_after(int polls) {
    if (polls > 1 << 24) __trap();
}

// (tag, state) in one 8-byte word: it arrives whole, so neither flag nor fence is needed to read
// it. It is written by a maximum, the tag on top, because a tile and the one two after it share a
// word, and nothing orders plain stores by two multiprocessors, though the second waits for a
// reader of the first: with such stores, once in some hundred million tiles of 2.8B prompts, a tile
// waited for ever. Costs nothing that can be measured.
template <int C> struct Mail {
    uint64_t word[C];
}; // of C neighbouring channels
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

__device__ __forceinline__ void wait_for(int barrier) {
    asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void send_to(int barrier) {
    asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ int load_acquire(const int *p) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_release(int *p, int v) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
#if __CUDA_ARCH__ >= 900
__device__ inline void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
__device__ inline void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and the phase lasts until so many bytes have too.
__device__ inline void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
__device__ inline void barrier_wait(uint64_t *barrier, int phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], "
                 "%1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
                 "r"(phase)
                 : "memory");
}
__device__ inline void
barrier_watch(uint64_t *barrier,
              int phase) { // the same, and no sleep, from which it takes 0.7 us to wake up
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.test_wait.parity.shared.b64 done, [%0], "
                 "%1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
                 "r"(phase)
                 : "memory");
}
__device__ inline void copy_bulk(void *to, const void *from, int bytes,
                                 uint64_t *barrier) { // a multiple of 16, or 0
    if (bytes)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                     "[%1], %2, [%3];" ::"r"(shared_address(to)),
                     "l"(from), "r"(bytes), "r"(shared_address(barrier))
                     : "memory");
}
__device__ inline uint32_t address_in(uint32_t address,
                                      int rank) { // the same place in another block of the cluster
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
__device__ inline void send(uint32_t to, uint32_t x, uint32_t y,
                            uint32_t barrier) { // to another block, whose barrier counts bytes
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
// Two numbers, each with its tag in an 8-byte word: a word arrives whole.
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
    ulonglong2 v;
    int polls = 0;
    do {
        v = get_words(from);
        give_up_after(++polls);
    } while (!both_tagged(v, tag));
    return make_uint2((uint32_t)v.x, (uint32_t)v.y);
}
#endif
