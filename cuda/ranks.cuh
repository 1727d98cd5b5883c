// ranks.cuh - several cards train one model, by NCCL. Included by mamba_cuda.cu where the build has
// it (make cuda NCCL=1).
//
// One process a card (files/ranks.h). Every card holds the whole model in the type of its products
// and computes its rows of the batch. The rest is split, each card keeps and updates 1 / size of
// it: the float32 weights, the moments of AdamW, and the gradient (ZeRO stage 2). Bytes a weight,
// bf16 products: 2 + 16 / size, on one card 18.
//
// The arena is cut into buckets, from its end to its start, which is the order in which backward
// completes the gradients. A bucket is divided among the ranks; the last one also takes what does
// not divide.
//   backward     adds the gradients of a bucket to one of two buffers, in turn; those of the
//                embedding, which may be the head too and so come first and last, to a third one.
//                As soon as a bucket is complete, reduce-scatter on a stream of its own: each rank
//                gets the sum of its part, while the layers below are still computed
//   norm         squares of the own parts; the ranks' sums are added in the order of ranks
//   AdamW        on the own parts, bucket by bucket, each followed by an
//   all-gather   of the weights in the type of the products
// Norms, biases, A_log, D_skip and the convolution are float32 in a pass: these "small" tensors lie
// in an arena of their own, each rank writes its parts of them among zeros, and the bits are added.
//
// A collective waits for the other ranks, and one of them may have ended. So this process never
// waits for the device with such a wait in it, but polls, and looks at the ranks.

#include <nccl.h>

enum { BUCKET_LEAST = 1 << 25, BUFFERS = 3 }; // floats

struct Bucket {
    size_t from, to;             // in the arena, floats
    size_t each;                 // a rank's part; the last rank's also has the rest
    size_t own, n;               // this rank's part: from `own`, n floats
    size_t at;                   // of it in the arenas that are split
    int buffer;                  // where backward adds its gradients
    cudaEvent_t complete, added; // here; over all ranks, and the buffer is clear again
};

struct Move { // of n floats
    size_t from, to, n;
};
__global__ void move_kernel(float *to, const float *from,
                            const Move *moves) { // a row of blocks each
    const Move m = moves[blockIdx.y];
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < m.n;
         i += (size_t)gridDim.x * blockDim.x)
        to[m.to + i] = from[m.from + i];
}
__global__ void add_kernel(float *to, const float *from, size_t n) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] += from[i];
}

static Ranks *run_ranks; // of gpu_ranks()

// Cuts the arena at the starts of its layers (start[layer], then the start of what follows the last
// one), so that no bucket but the last is smaller than `least`. The own parts lie one after
// another.
static std::vector<Bucket> cut_buckets(size_t floats, const std::vector<size_t> &start, int rank,
                                       int size, size_t least) {
    std::vector<Bucket> all;
    size_t to = floats, at = 0;
    for (size_t i = start.size() + 1; i-- > 0;) {
        const size_t from = i ? start[i - 1] : 0;
        if (to == from || (to - from < least && i)) continue;
        Bucket b = {};
        b.from = from, b.to = to, b.each = (to - from) / (size_t)size / 16 * 16;
        b.own = from + (size_t)rank * b.each, b.at = at;
        b.n = rank == size - 1 ? to - b.own : b.each;
        b.buffer = i ? (int)(all.size() % 2) : 2;
        at += b.n, to = from;
        all.push_back(b);
    }
    return all;
}

// The parts of a tensor, n floats from `at`, that this rank owns: from its place in the split
// arenas to `to` and on.
static void own_moves(std::vector<Move> *all, const std::vector<Bucket> &buckets, size_t at,
                      size_t n, size_t to) {
    for (const Bucket &b : buckets) {
        const size_t low = std::max(at, b.own), high = std::min(at + n, b.own + b.n);
        if (low < high) all->push_back({b.at + low - b.own, to + low - at, high - low});
    }
}

struct NcclCards : Cards {
    Ranks *ranks = run_ranks;
    GpuTrainer *x;
    Device *d;
    ncclComm_t comm = NULL;
    cudaStream_t stream = NULL; // of NCCL
    cudaEvent_t here = NULL, there = NULL;
    std::vector<size_t> start;   // of each layer, and of what follows the last
    std::vector<Bucket> buckets; // from the arena's end to its start
    std::vector<size_t> small;   // where each tensor lies in small_arena; none of a matrix
    size_t small_floats = 0, own = 0;
    size_t next = 0;   // bucket of this pass to be added up next
    size_t seen = 0;   // so many of this pass, or of the last one, have been
    bool more = false; // the step has had a pass before this one
    float *buffer[BUFFERS] = {}, *small_arena = NULL;
    Move *moves = NULL; // device
    int n_moves = 0;
    ncclResult_t failed = ncclSuccess;
    bool broken = false; // NCCL is of no more use

    explicit NcclCards(GpuTrainer *trainer) : x(trainer), d(&trainer->device) {}

    void check(ncclResult_t result) {
        if (failed == ncclSuccess && result != ncclInProgress) failed = result;
    }
    bool split_weights() const { return x->bf16_compute; } // else they are the compute copy

    // What `to` does from here on comes after what `from` has been given so far.
    void follow(cudaStream_t to, cudaStream_t from, cudaEvent_t event) {
        check_cuda(d, cudaEventRecord(event, from), "ranks");
        check_cuda(d, cudaStreamWaitEvent(to, event, 0), "ranks");
    }

    bool well() { return !broken && failed == ncclSuccess && mamba_ranks_check(ranks) == 0; }

    // Returns when `pending` says no, or the run is broken: then NCCL's kernels end too.
    template <class Pending> void poll(Pending pending) {
        for (int turn = 0; well() && pending(); turn++) {
            ncclResult_t state = ncclSuccess;
            if (ncclCommGetAsyncError(comm, &state) == ncclSuccess) check(state);
            if (turn < 2000) std::this_thread::yield();
            else std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
        if (broken || well()) return;
        for (int i = 0; failed != ncclSuccess && i < 30 && mamba_ranks_check(ranks) == 0; i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(100)); // it knows who has ended
        if (comm) ncclCommAbort(comm);
        comm = NULL, broken = true;
    }

    // Waits for both streams, as finish().
    int wait() {
        mamba_ranks_waiting(ranks, true);
        follow(d->stream, stream, there);
        poll([&] { return cudaStreamQuery(d->stream) == cudaErrorNotReady; });
        mamba_ranks_waiting(ranks, false);
        if (!broken) return finish(d);
        return mamba_ranks_check(ranks) ? gpu_fail("%s", ranks->text)
                                        : gpu_fail("rank %d of %d: NCCL: %s", ranks->rank,
                                                   ranks->size, ncclGetErrorString(failed));
    }

    // Waits until the first n buckets of this pass are added up. It waits for others only once they
    // are complete here.
    void see(size_t n) {
        for (; seen < n; seen++) {
            const Bucket &b = buckets[seen];
            poll([&] {
                if (cudaEventQuery(b.added) != cudaErrorNotReady) return false;
                mamba_ranks_waiting(ranks, cudaEventQuery(b.complete) == cudaSuccess);
                return true;
            });
            mamba_ranks_waiting(ranks, false);
        }
    }

    int open(const Model *m) {
        int low = 0, high = 0;
        Weights unused;
        const std::vector<TensorPlace> places = tensor_places(m, &unused);
        const float *host = (const float *)m->embedding.data;
        std::vector<Move> all;
        size_t room[BUFFERS] = {};
        start.assign((size_t)x->config.n_layer + 1, x->floats);
        for (const TensorPlace &p : places) {
            const size_t at = (size_t)((const float *)p.host->data - host),
                         n = (size_t)p.host->rows * (size_t)p.host->cols;
            const size_t after = (size_t)x->config.n_layer; // of norm_f, norm_f_bias, head
            if (at) {
                size_t &first = start[p.layer < 0 ? after : (size_t)p.layer];
                first = std::min(first, at);
            }
            small.push_back(small_floats);
            if (!p.matrix) small_floats += (n + 63) / 64 * 64;
        }
        buckets = cut_buckets(x->floats, start, ranks->rank, ranks->size, BUCKET_LEAST);
        own = buckets.back().at + buckets.back().n;
        for (size_t i = 0; i < places.size(); i++) {
            const Tensor *t = places[i].host;
            if (!places[i].matrix)
                own_moves(&all, buckets, (size_t)((const float *)t->data - host),
                          (size_t)t->rows * (size_t)t->cols, small[i]);
        }
        for (const Bucket &b : buckets)
            room[b.buffer] = std::max(room[b.buffer], (b.to - b.from) * sizeof(float));
        seen = buckets.size();
        n_moves = (int)all.size();
        all.push_back({}); // no array of nothing
        small_arena = (float *)device_alloc(small_floats * sizeof(float));
        if (small_arena) moves = (Move *)device_alloc(all.size() * sizeof(Move));
        if (!moves) return -1;
        for (int i = 0; i < BUFFERS; i++) {
            if (room[i] && !(buffer[i] = (float *)device_alloc(room[i]))) return -1;
            if (room[i]) clear(d, buffer[i], room[i], "ranks");
        }
        copy(d, moves, all.data(), all.size() * sizeof(Move), "ranks");
        check_cuda(d, cudaDeviceGetStreamPriorityRange(&low, &high), "ranks");
        check_cuda(d, cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high), "ranks");
        for (cudaEvent_t *event : {&here, &there})
            check_cuda(d, cudaEventCreateWithFlags(event, cudaEventDisableTiming), "ranks");
        for (Bucket &b : buckets)
            for (cudaEvent_t *event : {&b.complete, &b.added})
                check_cuda(d, cudaEventCreateWithFlags(event, cudaEventDisableTiming), "ranks");
        if (finish(d)) return -1;
        return meet();
    }

    // Rank 0's id makes them one communicator.
    int meet() {
        ncclUniqueId id;
        memset(&id, 0, sizeof id);
        if (ranks->rank == 0) check(ncclGetUniqueId(&id));
        if (failed == ncclSuccess && mamba_ranks_share(ranks, &id, sizeof id))
            return gpu_fail("%s", ranks->text);
        mamba_ranks_waiting(ranks, true); // the watch ends the process where this does not return
        if (failed == ncclSuccess) check(ncclCommInitRank(&comm, ranks->size, id, ranks->rank));
        mamba_ranks_waiting(ranks, false);
        if (failed == ncclSuccess) return 0;
        return gpu_fail("rank %d of %d: NCCL does not start: %s (%s)", ranks->rank, ranks->size,
                        ncclGetErrorString(failed), ncclGetLastError(NULL));
    }

    ~NcclCards() override {
        if (comm && well() && (!stream || cudaStreamQuery(stream) == cudaSuccess))
            ncclCommDestroy(comm);
        else if (comm) ncclCommAbort(comm);
        for (Bucket &b : buckets)
            for (cudaEvent_t event : {b.complete, b.added})
                if (event) cudaEventDestroy(event);
        for (cudaEvent_t event : {here, there})
            if (event) cudaEventDestroy(event);
        if (stream) cudaStreamDestroy(stream);
        for (float *p : buffer) cudaFree(p);
        cudaFree(small_arena), cudaFree(moves);
    }

    size_t own_floats() const override { return own; }
    void *small_tensor(size_t i) override { return small_arena + small[i]; }
    float *gradient(size_t at) override {
        for (const Bucket &b : buckets)
            if (at >= b.from && at < b.to) return buffer[b.buffer] + (at - b.from);
        return NULL;
    }

    // --- a step

    void begin() override {
        see(buckets.size()); // of the pass before: the buffers are clear
        next = seen = 0;
    }

    void ready(int layer) override {
        const size_t from = layer < 0 ? 0 : start[(size_t)layer];
        for (; next < buckets.size() && buckets[next].from >= from; next++) {
            if (next > 1) see(next - 1); // then the device waits for others in no stream but NCCL's
            if (!broken) add_up(buckets[next]);
            if (next && next + 2 < buckets.size()) // the next bucket's buffer must be clear
                check_cuda(d, cudaStreamWaitEvent(d->stream, buckets[next - 1].added, 0), "ranks");
        }
        if (layer < 0) more = true;
    }

    void add_up(const Bucket &b) {
        float *all = buffer[b.buffer], *sum = x->gradient + b.at;
        const int last = ranks->size - 1;
        const size_t even = b.each * (size_t)ranks->size, rest = b.to - b.from - even;
        follow(stream, d->stream, b.complete);
        if (more && b.n)
            add_kernel<<<(unsigned)d->processors, 256, 0, stream>>>(all + (b.own - b.from), sum,
                                                                    b.n);
        check_launch(d, "ranks");
        check(ncclGroupStart());
        if (even) check(ncclReduceScatter(all, sum, b.each, ncclFloat, ncclSum, comm, stream));
        if (rest)
            check(ncclReduce(all + even, ranks->rank == last ? sum + b.each : all + even, rest,
                             ncclFloat, ncclSum, last, comm, stream));
        check(ncclGroupEnd());
        check_cuda(d, cudaMemsetAsync(all, 0, (b.to - b.from) * sizeof(float), stream), "ranks");
        check_cuda(d, cudaEventRecord(b.added, stream), "ranks");
    }

    // The sum over all ranks of the squares of some numbers, whose root this one has. 0, or -1 with
    // a sentence.
    int sum_squares(double mine, float *length) {
        mine *= mine;
        if (mamba_ranks_sum(ranks, &mine, 1)) return gpu_fail("%s", ranks->text);
        *length = (float)sqrt(mine);
        return 0;
    }

    int norm(float clip, float *length) override {
        float mine = 0;
        follow(d->stream, stream, there);
        squares_kernel<<<NORM_PARTS, 256, 0, d->stream>>>(x->norms + 2, x->gradient, own);
        norm_kernel<<<1, 1024, 0, d->stream>>>(x->norms, x->norms + 2, NORM_PARTS, 0);
        check_launch(d, "norm");
        if (wait()) return -1;
        copy(d, &mine, x->norms, sizeof mine, "norm");
        if (finish(d) || sum_squares(mine, length)) return -1;
        const float both[] = {*length,
                              clip > 0 && *length > clip ? clip / (*length + 1e-6f) : 1.0f};
        copy(d, x->norms, both, sizeof both, "norm");
        return 0;
    }

    int tensor_norm(size_t i, float *length) override {
        const Tensor *t = x->places[i].host;
        const float *host = (const float *)x->places[0].host->data;
        std::vector<Move> parts;
        double sum = 0;
        own_moves(&parts, buckets, (size_t)((const float *)t->data - host),
                  (size_t)t->rows * (size_t)t->cols, 0);
        for (const Move &m : parts) {
            float part = 0;
            if (gradient_norm(x, x->gradient + m.from, m.n, 0, &part)) return -1;
            sum += (double)part * part;
        }
        return sum_squares(sqrt(sum), length);
    }

    // Sends this rank's part of a bucket of an arena to all others.
    template <class T> void gather(const Bucket &b, T *arena, ncclDataType_t type) {
        T *a = arena + b.from;
        const size_t even = b.each * (size_t)ranks->size, rest = b.to - b.from - even;
        check(ncclGroupStart());
        if (even)
            check(ncclAllGather(a + (size_t)ranks->rank * b.each, a, b.each, type, comm, stream));
        if (rest)
            check(ncclBroadcast(a + even, a + even, rest, type, ranks->size - 1, comm, stream));
        check(ncclGroupEnd());
    }

    int update(const AdamStep &how) override {
        const unsigned blocks = (unsigned)d->processors * 8;
        for (const Bucket &b : buckets) {
            float *gradient = x->gradient + b.at, *moment = x->moment + b.at,
                  *moment2 = x->moment2 + b.at;
            const unsigned char *decays = x->decays + b.own / 16;
            float *weights = x->weights + (split_weights() ? b.at : b.own);
            if (b.n && split_weights())
                adamw_kernel<<<blocks, 256, 0, d->stream>>>(weights, (bf16 *)x->compute + b.own,
                                                            gradient, moment, moment2, decays, b.n,
                                                            how);
            else if (b.n)
                adamw_kernel<<<blocks, 256, 0, d->stream>>>(weights, weights, gradient, moment,
                                                            moment2, decays, b.n, how);
            check_launch(d, "adamw");
            follow(stream, d->stream, here);
            if (split_weights()) gather(b, (bf16 *)x->compute, ncclBfloat16);
            else gather(b, x->weights, ncclFloat);
        }
        if (split_weights()) {
            clear(d, small_arena, small_floats * sizeof(float), "weights");
            if (n_moves)
                move_kernel<<<dim3(16, (unsigned)n_moves), 256, 0, d->stream>>>(small_arena,
                                                                                x->weights, moves);
            check_launch(d, "small weights");
            follow(stream, d->stream, here);
            check(ncclAllReduce(small_arena, small_arena, small_floats, ncclUint32, ncclSum, comm,
                                stream)); // bits + 0 are the bits
        }
        more = false;
        follow(d->stream, stream, there);
        derive_all(x);
        return wait();
    }

    // --- weights and moments from the host and back

    // Rank 0's weights count. A bucket at a time, in its buffer.
    int set(const float *weights, const float *moment, const float *moment2) override {
        const float *host = (const float *)x->places[0].host->data;
        for (const Bucket &b : buckets) {
            float *all = buffer[b.buffer];
            const size_t n = b.to - b.from, own_bytes = b.n * sizeof(float);
            copy(d, all, weights + b.from, n * sizeof(float), "weights");
            follow(stream, d->stream, here);
            check(ncclBroadcast(all, all, n, ncclFloat, 0, comm, stream));
            if (wait()) return -1;
            if (split_weights()) {
                convert(d, (bf16 *)x->compute + b.from, all, n);
                copy(d, x->weights + b.at, all + (b.own - b.from), own_bytes, "weights");
            } else copy(d, x->weights + b.from, all, n * sizeof(float), "weights");
            for (size_t i = 0; i < x->places.size() && split_weights(); i++) {
                const Tensor *t = x->places[i].host;
                const size_t at = (size_t)((const float *)t->data - host);
                if (!x->places[i].matrix && at >= b.from && at < b.to)
                    copy(d, small_tensor(i), all + (at - b.from),
                         (size_t)t->rows * (size_t)t->cols * sizeof(float), "weights");
            }
            clear(d, all, n * sizeof(float), "weights");
            if (moment) copy(d, x->moment + b.at, moment + b.own, own_bytes, "moments");
            if (moment2) copy(d, x->moment2 + b.at, moment2 + b.own, own_bytes, "moments");
        }
        if (!moment) clear(d, x->moment, own * sizeof(float), "moments");
        if (!moment2) clear(d, x->moment2, own * sizeof(float), "moments");
        clear(d, x->gradient, own * sizeof(float), "gradient");
        more = false;
        derive_all(x);
        return wait();
    }

    // Rank 0's `to` (floats, host) gets all parts of an arena that is split, bucket by bucket.
    int collect(float *to, const float *arena) {
        for (const Bucket &b : buckets) {
            float *all = buffer[b.buffer];
            follow(stream, d->stream, here);
            check(ncclGroupStart());
            for (int r = 1; r < ranks->size && ranks->rank == 0; r++) {
                const size_t from = (size_t)r * b.each,
                             n = r == ranks->size - 1 ? b.to - b.from - from : b.each;
                if (n) check(ncclRecv(all + from, n, ncclFloat, r, comm, stream));
            }
            if (ranks->rank && b.n) check(ncclSend(arena + b.at, b.n, ncclFloat, 0, comm, stream));
            check(ncclGroupEnd());
            if (wait()) return -1;
            if (ranks->rank) continue;
            copy(d, to + b.from, arena + b.at, b.n * sizeof(float), "moments");
            copy(d, to + b.from + b.n, all + b.n, (b.to - b.from - b.n) * sizeof(float), "moments");
            clear(d, all, (b.to - b.from) * sizeof(float), "moments");
        }
        return finish(d);
    }

    int get(float *weights, float *moment, float *moment2) override {
        if (weights && !split_weights())
            copy(d, weights, x->weights, x->floats * sizeof(float), "weights");
        if ((weights && split_weights() && collect(weights, x->weights)) ||
            (moment && collect(moment, x->moment)) || (moment2 && collect(moment2, x->moment2)))
            return -1;
        return finish(d);
    }
};

static Cards *nccl_cards_open(GpuTrainer *x, const Model *m) {
    NcclCards *cards = new NcclCards(x);
    if (cards->open(m) == 0) return cards;
    delete cards;
    return NULL;
}

// From now on trainers are those of a rank, on the GPU of its number on this host. 0, or -1 with a
// sentence.
static int gpu_ranks(Ranks *r) {
    int n = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess || n == 0)
        return gpu_fail("rank %d of %d: no GPU can be used", r->rank, r->size);
    // Where the launcher shows each rank one GPU, that is its own.
    const int device = n == 1 ? 0 : r->local >= 0 ? r->local : r->rank % n;
    if (device >= n)
        return gpu_fail("rank %d of %d is number %d of its host, which has %d GPUs", r->rank,
                        r->size, r->local, n);
    if ((error = cudaSetDevice(device)) != cudaSuccess)
        return gpu_fail("rank %d of %d: GPU %d: %s", r->rank, r->size, device,
                        cudaGetErrorString(error));
    run_ranks = r, cards_open = nccl_cards_open, cards_number = r->size;
    return 0;
}
