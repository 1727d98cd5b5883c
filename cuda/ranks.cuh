// ranks.cuh - several cards train one model, by NCCL. Included by mamba_cuda.cu where the build has
// it (make cuda NCCL=1).
//
// One process a card (files/ranks.h). Every card holds the whole model in the type of its products
// and a whole gradient in float32, and computes its rows of the batch. The float32 weights and the
// moments of AdamW are split: each card keeps and updates 1 / size of them (ZeRO stage 1). Bytes a
// weight, bf16 products: 2 + 4 + 12 / size, on one card 18.
//
// The arena is cut into buckets, from its end to its start, which is the order in which backward
// completes the gradients. A bucket is divided among the ranks; the last one also takes what does
// not divide.
//   backward     as soon as a bucket is complete, reduce-scatter on a stream of its own: each rank
//                gets the sum of its part, while the layers below are still computed
//   norm         squares of the own parts; the ranks' sums are added in the order of ranks
//   AdamW        on the own parts, bucket by bucket, each followed by an
//   all-gather   of the weights in the type of the products
// Norms, biases, A_log, D_skip and the convolution are float32 in a pass: these "small" tensors lie
// in an arena of their own, each rank writes its parts of them among zeros, and the bits are added.

#include <nccl.h>

enum { BUCKET_LEAST = 1 << 21 }; // floats

struct Bucket {
    size_t from, to; // in the arena, floats
    size_t each;     // a rank's part; the last rank's also has the rest
    size_t own, n;   // this rank's part: from `own`, n floats
    size_t at;       // of it in the arenas that are split
    cudaEvent_t updated;
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
// As squares_kernel, of the parts that n moves name.
__global__ void own_squares_kernel(float *parts, const float *x, const Move *own, int n) {
    __shared__ float scratch[33];
    float sum = 0;
    for (int k = 0; k < n; k++)
        for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < own[k].n;
             i += (size_t)gridDim.x * blockDim.x)
            sum += x[own[k].from + i] * x[own[k].from + i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
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
    size_t next = 0; // bucket to be added up next
    float *small_arena = NULL;
    Move *moves = NULL, *own_parts = NULL; // device
    int n_moves = 0;
    ncclResult_t failed = ncclSuccess;

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

    // Waits for both streams, as finish(), but not for ever: other ranks may have ended.
    int wait() {
        bool good = true;
        mamba_ranks_waiting(ranks, true);
        follow(d->stream, stream, there);
        for (int turn = 0; good && cudaStreamQuery(d->stream) == cudaErrorNotReady; turn++) {
            ncclResult_t state = ncclSuccess;
            if (failed == ncclSuccess && ncclCommGetAsyncError(comm, &state) == ncclSuccess)
                check(state);
            good = failed == ncclSuccess && mamba_ranks_check(ranks) == 0;
            if (turn < 2000) std::this_thread::yield();
            else std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
        for (int i = 0; failed != ncclSuccess && i < 30 && mamba_ranks_check(ranks) == 0; i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(100)); // it knows who has ended
        if (mamba_ranks_check(ranks)) good = false;
        mamba_ranks_waiting(ranks, false);
        if (good && failed == ncclSuccess) return finish(d);
        const bool known = mamba_ranks_check(ranks) != 0;
        if (comm) ncclCommAbort(comm); // else NCCL's kernels wait for ever
        comm = NULL;
        return known ? gpu_fail("%s", ranks->text)
                     : gpu_fail("rank %d of %d: NCCL: %s", ranks->rank, ranks->size,
                                ncclGetErrorString(failed));
    }

    int open(const Model *m) {
        int low = 0, high = 0;
        Weights unused;
        const std::vector<TensorPlace> places = tensor_places(m, &unused);
        const float *host = (const float *)m->embedding.data;
        std::vector<Move> all, parts;
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
        for (const Bucket &b : buckets) parts.push_back({b.own, 0, b.n});
        n_moves = (int)all.size();
        all.push_back({}); // no array of nothing
        small_arena = (float *)device_alloc(small_floats * sizeof(float));
        if (small_arena) moves = (Move *)device_alloc(all.size() * sizeof(Move));
        if (moves) own_parts = (Move *)device_alloc(parts.size() * sizeof(Move));
        if (!own_parts) return -1;
        copy(d, moves, all.data(), all.size() * sizeof(Move), "ranks");
        copy(d, own_parts, parts.data(), parts.size() * sizeof(Move), "ranks");
        check_cuda(d, cudaDeviceGetStreamPriorityRange(&low, &high), "ranks");
        check_cuda(d, cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high), "ranks");
        for (cudaEvent_t *event : {&here, &there})
            check_cuda(d, cudaEventCreateWithFlags(event, cudaEventDisableTiming), "ranks");
        for (Bucket &b : buckets)
            check_cuda(d, cudaEventCreateWithFlags(&b.updated, cudaEventDisableTiming), "ranks");
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
        const bool well = failed == ncclSuccess && mamba_ranks_check(ranks) == 0 &&
                          (!stream || cudaStreamQuery(stream) == cudaSuccess);
        if (comm && well) ncclCommDestroy(comm);
        else if (comm) ncclCommAbort(comm);
        for (Bucket &b : buckets)
            if (b.updated) cudaEventDestroy(b.updated);
        for (cudaEvent_t event : {here, there})
            if (event) cudaEventDestroy(event);
        if (stream) cudaStreamDestroy(stream);
        cudaFree(small_arena), cudaFree(moves), cudaFree(own_parts);
    }

    size_t own_floats() const override { return own; }
    void *small_tensor(size_t i) override { return small_arena + small[i]; }

    // --- a step

    void ready(int layer) override {
        const size_t from = layer < 0 ? 0 : start[(size_t)layer];
        if (!last_pass || next == buckets.size() || buckets[next].from < from) return;
        follow(stream, d->stream, here);
        for (; next < buckets.size() && buckets[next].from >= from; next++) {
            const Bucket &b = buckets[next];
            float *g = x->gradient + b.from;
            const int size = ranks->size, rank = ranks->rank;
            const size_t even = b.each * (size_t)size, rest = b.to - b.from - even;
            check(ncclGroupStart());
            if (even)
                check(ncclReduceScatter(g, g + (size_t)rank * b.each, b.each, ncclFloat, ncclSum,
                                        comm, stream));
            if (rest)
                check(ncclReduce(g + even, g + even, rest, ncclFloat, ncclSum, size - 1, comm,
                                 stream));
            check(ncclGroupEnd());
        }
    }

    int norm(float clip, float *length) override {
        float mine = 0;
        last_pass = true;
        ready(-1);
        last_pass = false, next = 0;
        follow(d->stream, stream, there);
        own_squares_kernel<<<NORM_PARTS, 256, 0, d->stream>>>(x->norms + 2, x->gradient, own_parts,
                                                              (int)buckets.size());
        norm_kernel<<<1, 1024, 0, d->stream>>>(x->norms, x->norms + 2, NORM_PARTS, 0);
        check_launch(d, "norm");
        if (wait()) return -1;
        copy(d, &mine, x->norms, sizeof mine, "norm");
        if (finish(d)) return -1;
        double sum = (double)mine * mine;
        if (mamba_ranks_sum(ranks, &sum, 1)) return gpu_fail("%s", ranks->text);
        *length = (float)sqrt(sum);
        const float both[] = {*length,
                              clip > 0 && *length > clip ? clip / (*length + 1e-6f) : 1.0f};
        copy(d, x->norms, both, sizeof both, "norm");
        return 0;
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
            float *gradient = x->gradient + b.own, *moment = x->moment + b.at,
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
            follow(stream, d->stream, b.updated);
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
        clear(d, x->gradient, x->floats * sizeof(float), "gradient");
        follow(d->stream, stream, there);
        derive_all(x);
        return wait();
    }

    // --- weights and moments from the host and back

    // Rank 0's weights count. The gradient's arena holds the whole model on the way.
    int set(const float *weights, const float *moment, const float *moment2) override {
        const size_t bytes = x->floats * sizeof(float);
        float *whole = split_weights() ? x->gradient : x->weights;
        copy(d, whole, weights, bytes, "weights");
        follow(stream, d->stream, here);
        check(ncclBroadcast(whole, whole, x->floats, ncclFloat, 0, comm, stream));
        follow(d->stream, stream, there);
        const float *host = (const float *)x->places[0].host->data;
        for (size_t i = 0; i < x->places.size() && split_weights(); i++) {
            const Tensor *t = x->places[i].host;
            if (!x->places[i].matrix)
                copy(d, small_tensor(i), whole + ((const float *)t->data - host),
                     (size_t)t->rows * (size_t)t->cols * sizeof(float), "weights");
        }
        if (split_weights()) convert(d, (bf16 *)x->compute, whole, x->floats);
        auto split = [&](float *to, const float *from) {
            for (const Bucket &b : buckets)
                if (from) copy(d, to + b.at, from + b.own, b.n * sizeof(float), "moments");
            if (!from) clear(d, to, own * sizeof(float), "moments");
        };
        if (split_weights()) split(x->weights, whole);
        split(x->moment, moment), split(x->moment2, moment2);
        clear(d, x->gradient, bytes, "gradient");
        derive_all(x);
        return wait();
    }

    // Rank 0's `to` (floats, host) gets all parts of an arena that is split. They meet in the
    // arena of the gradient, which is zeros between two steps.
    int collect(float *to, const float *arena) {
        follow(stream, d->stream, here);
        for (const Bucket &b : buckets) {
            check(ncclGroupStart());
            for (int r = 1; r < ranks->size && ranks->rank == 0; r++) {
                const size_t from = b.from + (size_t)r * b.each,
                             n = r == ranks->size - 1 ? b.to - from : b.each;
                if (n) check(ncclRecv(x->gradient + from, n, ncclFloat, r, comm, stream));
            }
            if (ranks->rank && b.n) check(ncclSend(arena + b.at, b.n, ncclFloat, 0, comm, stream));
            check(ncclGroupEnd());
            if (ranks->rank == 0)
                copy(d, x->gradient + b.own, arena + b.at, b.n * sizeof(float), "moments");
        }
        if (wait()) return -1;
        if (ranks->rank == 0) copy(d, to, x->gradient, x->floats * sizeof(float), "moments");
        return finish(d);
    }

    int get(float *weights, float *moment, float *moment2) override {
        const size_t bytes = x->floats * sizeof(float);
        if (weights && !split_weights()) copy(d, weights, x->weights, bytes, "weights");
        if ((weights && split_weights() && collect(weights, x->weights)) ||
            (moment && collect(moment, x->moment)) || (moment2 && collect(moment2, x->moment2)))
            return -1;
        clear(d, x->gradient, bytes, "gradient");
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

static void gpu_last_pass(GpuTrainer *x) {
    if (x->cards) x->cards->last_pass = true;
}
