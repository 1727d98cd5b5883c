// sampling.cuh - the next token of each sequence, drawn on the device. Included by mamba_cuda.cu.
//
// The rules are mamba.c's draw(): repeat penalty, temperature, top-k, top-p, min-p. From the tokens
// that they keep, the one with the highest logit + Gumbel noise is a draw from the softmax; the
// noise depends on seed, position and token only. All kernels but the last spread a sequence over
// `slices` blocks:
//   1 likeliest    the repeat penalty, the highest logit. Greedy: kernel 4 is all that is left, and
//                  so it is where no rule drops a token: noise is added here.
//   2 bins         with top-k or top-p: tokens counted, and their probabilities added up, in 2,048
//                  bins of x = (logit - highest) / temperature, each 1/64 wide
//   3 keep         the bins in which top-k and top-p end. Tokens above these bins are kept, and the
//                  best is found; tokens in these bins are listed
//   4 choose       the same once more for the listed tokens, in 2,048 finer bins, and, in the bin
//                  where a rule ends, token by token. The embedding of the token starts the
//                  residual stream.
// Probabilities are whole numbers of 2^-32 of the likeliest token's, so a sum does not depend on
// its order, and two runs draw the same tokens.

enum Draw { DRAW_LIKELIEST, DRAW_ANY, DRAW_KEPT }; // kernels 1, 4; the same; all four
enum { SLICES_MAX = 32, SLICE_MOST = 32768 };      // tokens of a slice, so that sums fit 32 bits
enum { BINS = 2048, BIN_THREADS = 256, BINS_A_UNIT = 64 };
enum { CHOOSE_THREADS = 512, TIES = 1024 }; // tokens of the last bin that are told apart

struct Slice { // the best token of a part of the vocabulary
    float best;
    int32_t index, bad; // bad: a logit is not finite
};
struct Listed {
    float x;
    int32_t index;
};
struct Cut {                   // where top-k and top-p end, for kernel 4
    int first, last;           // bins whose tokens are listed
    uint32_t count_before;     // tokens before bin `first`
    unsigned long long before; // their mass
    unsigned long long whole;  // of all tokens
    bool by_count, by_mass;
};
struct DrawArgs {
    const Sampling *how;
    Sequence *sequences;          // (S)
    const float *logits;          // (S,V)
    const unsigned char *allowed; // (V): whether an id may be drawn
    float *scratch;               // (S,V): logits after the penalty, -infinity: not allowed
    Slice *best, *kept;           // (S,slices) of kernels 1 and 3
    uint32_t *counts;             // (S,BINS)
    unsigned long long *mass;     // (S,BINS)
    Cut *cut;                     // (S)
    Listed *list;                 // (S,V)
    uint32_t *listed;             // (S)
    int32_t *current, *tokens;    // (S), (GENERATE_MAX,S): the token drawn
    float *res;                   // (S,D): its embedding
    int S, V, D, slices;
    Draw draw;
};

// The highest x and its lowest index, over the block.
__device__ inline void block_argmax(float *best, int *index, float *values, int *indices) {
    auto better = [&](float x, int i) {
        if (x > *best || (x == *best && i < *index)) *best = x, *index = i;
    };
    for (int lane = 16; lane; lane /= 2) {
        float x = __shfl_xor_sync(0xffffffffu, *best, lane);
        int i = __shfl_xor_sync(0xffffffffu, *index, lane);
        better(x, i);
    }
    int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) values[warp] = *best, indices[warp] = *index;
    __syncthreads();
    for (int w = 0; w < warps; w++) better(values[w], indices[w]);
}

// The best token so far, by x + Gumbel noise: -log(-log of a uniform number), computed from u, 1
// minus that number, which is exact where the noise is large. The noise is at most -log(u), so most
// tokens are out before its two logarithms.
struct Best {
    float noisy = -INFINITY;
    int choice;
    __device__ void consider(float x, int v, uint64_t stream) {
        const uint32_t bits =
            (uint32_t)(mix(stream + 0x9E3779B97F4A7C15u * (uint64_t)(v + 1)) >> 32);
        const float u = fminf(((float)bits + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
        if (u * 0.999f > __expf(x - noisy)) return;
        const float y = x - logf(-log1pf(-u));
        if (y > noisy || (y == noisy && v < choice)) noisy = y, choice = v;
    }
};
__device__ inline uint64_t noise_stream(const Sequence *q) {
    return mix(q->random + 0x9E3779B97F4A7C15u * (q->position + 1));
}
__device__ inline unsigned long long mass_of(float x) { // x at most 0
    return (unsigned long long)__float2ull_rn(__expf(x) * 0x1p32f);
}
__device__ inline int bin_of(float x) {
    return (int)fminf(-x * (float)BINS_A_UNIT, (float)(BINS - 1));
}
__device__ inline float highest_of(const Slice *slices, int n) { // by whole warps
    const int lane = threadIdx.x % 32;
    return warp_max(lane < n ? slices[lane].best : -INFINITY);
}

// --- 1

__global__ void __launch_bounds__(BIN_THREADS) likeliest_kernel(DrawArgs p) {
    __shared__ float values[32];
    __shared__ int indices[32], bad;
    wait_for_input();
    const int V = p.V, slice = blockIdx.x, s = blockIdx.y, chunk = (V + p.slices - 1) / p.slices,
              first = slice * chunk, last = min(first + chunk, V);
    const Sampling *how = p.how;
    const Sequence *q = &p.sequences[s];
    const float *in = p.logits + (size_t)s * V, penalty = how->repeat_penalty,
                temperature = how->temperature;
    float *x = p.scratch + (size_t)s * V;
    Best best = {-INFINITY, V};
    const uint64_t stream = noise_stream(q);
    const bool noisy = p.draw == DRAW_ANY, again = p.draw == DRAW_KEPT || penalty != 1;
    auto consider = [&](float l, int v) {
        if (noisy) best.consider(l / temperature, v, stream);
        else if (l > best.noisy) best.noisy = l, best.choice = v;
    };
    if (threadIdx.x == 0) bad = 0;
    if (p.draw == DRAW_KEPT) { // the slices of a sequence share the clearing
        const int bins = BINS / p.slices, from = s * BINS + slice * bins;
        for (int i = threadIdx.x; i < bins; i += blockDim.x)
            p.counts[from + i] = 0, p.mass[from + i] = 0;
        if (slice == 0 && threadIdx.x == 0) p.listed[s] = 0;
    }
    __syncthreads();
    for (int v = first + threadIdx.x; v < last;
         v += 4 * blockDim.x) { // four loads on the way at once
        float l[4];
        bool may[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = v + i * (int)blockDim.x;
            l[i] = at < last ? in[at] : 0, may[i] = at < last && p.allowed[at];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = v + i * (int)blockDim.x;
            if (!(l[i] - l[i] == 0)) bad = 1;
            if (again && at < last) x[at] = may[i] ? l[i] : -INFINITY;
            if (may[i] && penalty == 1) consider(l[i], at);
        }
    }
    __syncthreads();
    if (penalty != 1) { // a token is penalised once, however often it occurs
        if (threadIdx.x < (unsigned)q->n_recent) {
            int v = q->recent[threadIdx.x];
            bool mine = v >= first && v < last;
            for (int j = 0; j < (int)threadIdx.x && mine; j++) mine = q->recent[j] != v;
            if (mine) x[v] = x[v] > 0 ? x[v] / penalty : x[v] * penalty;
        }
        __syncthreads();
        for (int v = first + threadIdx.x; v < last; v += blockDim.x)
            if (x[v] > -INFINITY) consider(x[v], v);
    }
    block_argmax(&best.noisy, &best.choice, values, indices);
    if (threadIdx.x == 0) p.best[s * p.slices + slice] = {best.noisy, best.choice, bad};
}

// --- 2

// take(logit, its index) for a block's part of the vocabulary, four loads on the way at once.
template <class Take>
__device__ inline void each_of_slice(const float *l, int first, int last, Take take) {
    for (int v = first + threadIdx.x; v < last; v += 4 * blockDim.x) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = v + i * (int)blockDim.x;
            x[i] = at < last ? l[at] : -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) take(x[i], v + i * (int)blockDim.x);
    }
}

// Counts and masses of a block's tokens. A mass has its upper and its lower 16 bits in two sums, as
// the units of shared memory add 32 bits.
struct BlockBins {
    uint32_t count[BINS], low[BINS], high[BINS];
    __device__ void clear() {
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) count[i] = 0, low[i] = 0, high[i] = 0;
        __syncthreads();
    }
    __device__ void add(int bin, float x) {
        const unsigned long long m = mass_of(x);
        atomicAdd(count + bin, 1u);
        if (m)
            atomicAdd(low + bin, (uint32_t)m & 0xffff), atomicAdd(high + bin, (uint32_t)(m >> 16));
    }
    __device__ unsigned long long mass(int bin) const {
        return ((unsigned long long)high[bin] << 16) + low[bin];
    }
};

__global__ void __launch_bounds__(BIN_THREADS) bins_kernel(DrawArgs p) {
    __shared__ BlockBins bins;
    bins.clear();
    wait_for_input();
    const int V = p.V, slice = blockIdx.x, s = blockIdx.y, chunk = (V + p.slices - 1) / p.slices,
              first = slice * chunk, last = min(first + chunk, V);
    const float *l = p.scratch + (size_t)s * V,
                highest = highest_of(p.best + s * p.slices, p.slices),
                temperature = p.how->temperature;
    if (!(highest - highest == 0)) return; // nothing can be drawn
    each_of_slice(l, first, last, [&](float logit, int) {
        const float x = (logit - highest) / temperature;
        if (x > -INFINITY) bins.add(bin_of(x), x);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x)
        if (bins.count[i]) {
            atomicAdd(p.counts + s * BINS + i, bins.count[i]);
            const unsigned long long m = bins.mass(i);
            if (m) atomicAdd(p.mass + s * BINS + i, m);
        }
}

// --- 3

struct Sums { // of tokens, in the order of bins
    uint32_t count;
    unsigned long long mass;
};
// The sums of all threads before this one, and of all. scratch: 33.
__device__ inline Sums sums_before(Sums mine, Sums *all, Sums *scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    Sums to = mine;
    for (int step = 1; step < 32; step *= 2) {
        uint32_t c = __shfl_up_sync(0xffffffffu, to.count, step);
        unsigned long long m = __shfl_up_sync(0xffffffffu, to.mass, step);
        if (lane >= step) to.count += c, to.mass += m;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = to;
    __syncthreads();
    Sums before = {0, 0}, whole = {0, 0};
    for (int w = 0; w < warps; w++) {
        if (w == warp) before = whole;
        whole.count += scratch[w].count, whole.mass += scratch[w].mass;
    }
    *all = whole;
    return {before.count + to.count - mine.count, before.mass + to.mass - mine.mass};
}
// A token is kept by top-p if the mass before it is less than this. The likeliest always is.
__device__ inline double mass_limit(float top_p, unsigned long long whole) {
    return fmax((double)top_p * (double)whole, 1.0);
}

// The bins in which the rules end. By all threads of a block of BIN_THREADS.
__device__ inline Cut find_cut(const DrawArgs &p, int s, Sums *scratch) {
    constexpr int EACH = BINS / BIN_THREADS;
    __shared__ int count_bin, first, last;
    __shared__ Sums at_count, at_first;
    const uint32_t *counts = p.counts + s * BINS + threadIdx.x * EACH;
    const unsigned long long *mass = p.mass + s * BINS + threadIdx.x * EACH;
    const int top_k = p.how->top_k;
    const float top_p = p.how->top_p;
    Sums bin[EACH], mine = {0, 0}, all;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        bin[i] = {counts[i], mass[i]};
        mine.count += bin[i].count, mine.mass += bin[i].mass;
    }
    const Sums start = sums_before(mine, &all, scratch);
    Cut cut = {};
    cut.by_count = top_k > 0 && (uint32_t)top_k < all.count;
    cut.by_mass = top_p < 1;
    cut.whole = all.mass;
    if (threadIdx.x == 0) count_bin = BINS - 1, first = BINS, last = -1;
    __syncthreads();
    auto each_bin = [&](auto take) { // take(bin, sums before it, sums with it)
        Sums before = start;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            Sums with = {before.count + bin[i].count, before.mass + bin[i].mass};
            take((int)threadIdx.x * EACH + i, before, with);
            before = with;
        }
    };
    if (cut.by_count)
        each_bin([&](int i, Sums before, Sums with) {
            if (before.count < (uint32_t)top_k && with.count >= (uint32_t)top_k)
                count_bin = i, at_count = before;
        });
    __syncthreads();
    // What top-k keeps has a mass between that before its last bin and that with it.
    const unsigned long long least = cut.by_count ? at_count.mass : all.mass;
    unsigned long long most = all.mass;
    if (cut.by_count) most = at_count.mass + p.mass[s * BINS + count_bin];
    const double low = mass_limit(top_p, least), high = mass_limit(top_p, most);
    int open = BINS, end = -1;
    each_bin([&](int i, Sums before, Sums with) {
        if (with.count == before.count || i > count_bin) return;
        const bool sure = (!cut.by_mass || (double)with.mass <= low) &&
                          !(cut.by_count && i == count_bin),
                   none = cut.by_mass && (double)before.mass >= high && before.count > 0;
        if (!sure && !none) open = min(open, i), end = max(end, i);
    });
    // Where both rules end, what top-k keeps must be known exactly, so its last bin is listed too.
    if (open < BINS && cut.by_count && cut.by_mass) end = max(end, count_bin);
    if (open < BINS) atomicMin(&first, open), atomicMax(&last, end);
    __syncthreads();
    cut.first = first, cut.last = last;
    each_bin([&](int i, Sums before, Sums) {
        if (i == cut.first) at_first = before;
    });
    __syncthreads();
    if (cut.first < BINS) cut.count_before = at_first.count, cut.before = at_first.mass;
    return cut;
}

__device__ inline float lowest_of(const Sampling *how) { // min-p
    return how->min_p > 0 ? fminf(logf(how->min_p), 0) : -INFINITY;
}

__global__ void __launch_bounds__(BIN_THREADS) keep_kernel(DrawArgs p) {
    __shared__ float values[32];
    __shared__ int indices[32];
    __shared__ Sums scratch[33];
    wait_for_input();
    const int V = p.V, slice = blockIdx.x, s = blockIdx.y, chunk = (V + p.slices - 1) / p.slices,
              begin = slice * chunk, stop = min(begin + chunk, V);
    const float *l = p.scratch + (size_t)s * V,
                highest = highest_of(p.best + s * p.slices, p.slices),
                temperature = p.how->temperature, lowest = lowest_of(p.how);
    const uint64_t stream = noise_stream(&p.sequences[s]);
    Best best = {-INFINITY, V};
    if (highest - highest == 0) {
        Cut cut = find_cut(p, s, scratch);
        if (slice == 0 && threadIdx.x == 0) p.cut[s] = cut;
        each_of_slice(l, begin, stop, [&](float logit, int v) {
            const float x = (logit - highest) / temperature;
            if (!(x > -INFINITY)) return;
            const int bin = bin_of(x);
            // Without bins in which a rule ends, all tokens are kept.
            if (bin < cut.first) {
                if (x >= lowest) best.consider(x, v, stream);
            } else if (bin <= cut.last) {
                p.list[(size_t)s * V + atomicAdd(p.listed + s, 1u)] = {x, v};
            }
        });
    }
    block_argmax(&best.noisy, &best.choice, values, indices);
    if (threadIdx.x == 0) p.kept[s * p.slices + slice] = {best.noisy, best.choice, 0};
}

// --- 4

struct Choosing { // shared memory of kernel 4
    BlockBins bins;
    Sums scratch[33];
    float values[32], tie_x[TIES];
    int indices[32];
    int count_bin, mass_bin;
    Sums at_count, at_mass; // before these bins
    unsigned int ties;
    unsigned long long tie_mass;
};

// The listed tokens of a sequence, bin by bin of a finer kind: best and choice become the best of
// those that are kept. Where more than TIES tokens share the bin of 1e-5 in which a rule ends, all
// of these are kept.
__device__ inline void choose_listed(const DrawArgs &p, int s, Choosing &c, Best &best) {
    constexpr int EACH = BINS / CHOOSE_THREADS;
    const Cut cut = p.cut[s];
    const Listed *list = p.list + (size_t)s * p.V;
    const uint32_t n = p.listed[s];
    if (n == 0) return;
    const uint64_t stream = noise_stream(&p.sequences[s]);
    const uint32_t top_k = (uint32_t)p.how->top_k;
    const float start = (float)cut.first / BINS_A_UNIT,
                scale = (float)BINS * BINS_A_UNIT / (float)(cut.last - cut.first + 1);
    auto fine_bin = [&](float x) {
        return (int)fmaxf(0, fminf((-x - start) * scale, (float)(BINS - 1)));
    };
    c.bins.clear();
    if (threadIdx.x == 0) c.count_bin = BINS, c.mass_bin = BINS;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
        c.bins.add(fine_bin(list[i].x), list[i].x);
    __syncthreads();
    Sums mine = {0, 0}, all, before;
    for (int i = 0; i < EACH; i++)
        mine.count += c.bins.count[threadIdx.x * EACH + i],
            mine.mass += c.bins.mass(threadIdx.x * EACH + i);
    before = sums_before(mine, &all, c.scratch);
    before.count += cut.count_before, before.mass += cut.before;
    auto each_bin = [&](auto take) {
        Sums from = before;
        for (int i = 0; i < EACH; i++) {
            const int bin = threadIdx.x * EACH + i;
            Sums with = {from.count + c.bins.count[bin], from.mass + c.bins.mass(bin)};
            if (with.count > from.count) take(bin, from, with);
            from = with;
        }
    };
    // The tokens of one bin to tie_x, so that each can be compared with all. False: too many.
    auto gather_ties = [&](int bin) {
        if (threadIdx.x == 0) c.ties = 0, c.tie_mass = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
            if (fine_bin(list[i].x) == bin) {
                unsigned int at = atomicAdd(&c.ties, 1u);
                if (at < TIES) c.tie_x[at] = list[i].x;
            }
        __syncthreads();
        return c.ties <= TIES;
    };
    auto ahead_of = [&](float x) { // of the gathered: those likelier than x
        Sums sum = {0, 0};
        for (unsigned int i = 0; i < c.ties; i++)
            if (c.tie_x[i] > x) sum.count++, sum.mass += mass_of(c.tie_x[i]);
        return sum;
    };
    unsigned long long whole = cut.whole;
    bool told = true;
    if (cut.by_count) {
        each_bin([&](int bin, Sums from, Sums with) {
            if (from.count < top_k && with.count >= top_k) c.count_bin = bin, c.at_count = from;
        });
        __syncthreads();
        told = gather_ties(c.count_bin);
        if (told && threadIdx.x < c.ties &&
            c.at_count.count + ahead_of(c.tie_x[threadIdx.x]).count < top_k)
            atomicAdd(&c.tie_mass, mass_of(c.tie_x[threadIdx.x]));
        __syncthreads();
        whole = c.at_count.mass + (told ? c.tie_mass : c.bins.mass(c.count_bin));
    }
    const double limit = mass_limit(p.how->top_p, whole);
    const float lowest = lowest_of(p.how);
    auto consider = [&](Listed t) {
        if (t.x >= lowest) best.consider(t.x, t.index, stream);
    };
    auto kept_by_count = [&](float x, int bin) { // while the bin's ties are gathered
        return !cut.by_count || bin < c.count_bin ||
               (bin == c.count_bin && (!told || c.at_count.count + ahead_of(x).count < top_k));
    };
    if (!cut.by_mass) {
        for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
            if (kept_by_count(list[i].x, fine_bin(list[i].x))) consider(list[i]);
        return;
    }
    if ((double)cut.before >= limit) return;
    each_bin([&](int bin, Sums from, Sums with) {
        if ((double)from.mass < limit && (double)with.mass >= limit)
            c.mass_bin = bin, c.at_mass = from;
    });
    __syncthreads();
    // A bin in which both rules end is gathered already.
    const bool gathered = cut.by_count && c.count_bin == c.mass_bin;
    const int count_bin = c.count_bin, mass_bin = c.mass_bin;
    const Sums at_mass = c.at_mass;
    if (cut.by_count && !gathered && count_bin < mass_bin) { // top-p drops nothing of top-k's
        for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
            if (kept_by_count(list[i].x, fine_bin(list[i].x))) consider(list[i]);
        return;
    }
    const bool told_mass = gathered ? told : mass_bin == BINS || gather_ties(mass_bin);
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
        const float x = list[i].x;
        const int bin = fine_bin(x);
        bool kept = bin < mass_bin;
        if (bin == mass_bin) {
            const Sums ahead = told_mass ? ahead_of(x) : Sums{0, 0};
            kept = (double)(at_mass.mass + ahead.mass) < limit;
            if (gathered) kept = kept && (!told || at_mass.count + ahead.count < top_k);
        }
        if (kept) consider(list[i]);
    }
}

template <class T>
__global__ void __launch_bounds__(CHOOSE_THREADS)
    choose_kernel(DrawArgs p, EmbeddingOf<T> embedding) {
    __shared__ Choosing c;
    wait_for_input();
    const int S = p.S, V = p.V, D = p.D, s = blockIdx.x;
    Sequence *q = &p.sequences[s];
    Best best = {-INFINITY, V};
    int bad = 0;
    // Every warp reads the slices, a lane each. Of equal ones the lowest index.
    auto best_slice = [&](const Slice *from) {
        const int lane = threadIdx.x % 32;
        Slice mine = lane < p.slices ? from[lane] : Slice{-INFINITY, V, 0};
        for (int step = 16; step; step /= 2) {
            const float x = __shfl_xor_sync(0xffffffffu, mine.best, step);
            const int i = __shfl_xor_sync(0xffffffffu, mine.index, step);
            if (x > mine.best || (x == mine.best && i < mine.index)) mine.best = x, mine.index = i;
        }
        bad |= __any_sync(0xffffffffu, mine.bad);
        best = {mine.best, mine.index};
    };
    best_slice(p.best + s * p.slices);
    if (!(best.noisy <= 3.402823466e38f)) bad = 1;
    if (p.draw == DRAW_KEPT && !bad && best.choice < V) {
        best_slice(p.kept + s * p.slices);
        choose_listed(p, s, c, best);
        block_argmax(&best.noisy, &best.choice, c.values, c.indices);
    }
    int choice = best.choice;
    if (choice >= V) bad = 1;
    if (bad) choice = 0;
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        p.res[(size_t)s * D + i] = embedding.at(choice, i);
    __syncthreads(); // all have read q
    if (threadIdx.x) return;
    p.tokens[(size_t)q->step * S + s] = bad ? -1 : choice;
    q->step = (q->step + 1) % GENERATE_MAX;
    p.current[s] = choice;
    q->recent[q->position % RECENT] = choice;
    q->position++;
    q->n_recent = q->position < RECENT ? (int32_t)q->position : RECENT;
}

// Queues the draw of a token for each sequence. res gets the embeddings.
template <class T> static void draw_tokens(Device *d, const DrawArgs &p, EmbeddingOf<T> embedding) {
    const dim3 spread((unsigned)p.slices, (unsigned)p.S);
    launch_dependent(d, likeliest_kernel, spread, BIN_THREADS, 0, p);
    if (p.draw == DRAW_KEPT) {
        launch_dependent(d, bins_kernel, spread, BIN_THREADS, 0, p);
        launch_dependent(d, keep_kernel, spread, BIN_THREADS, 0, p);
    }
    launch_dependent(d, choose_kernel<T>, (unsigned)p.S, CHOOSE_THREADS, 0, p, embedding);
    check_launch(d, "sample");
}

// Which kernels a setting needs. Where the temperature is so small that a logit divided by it
// overflows, the highest logit is subtracted first.
static Draw draw_of(const Sampling *how, int V) {
    const bool any = (how->top_k <= 0 || how->top_k >= V) && how->top_p >= 1 && how->min_p <= 0;
    return how->temperature == 0              ? DRAW_LIKELIEST
           : any && how->temperature >= 1e-3f ? DRAW_ANY
                                              : DRAW_KEPT;
}
// Blocks a sequence: all multiprocessors for a few, and powers of two, which divide BINS.
static int slices_of(int S, int V) {
    int slices = S < 4 ? 32 : S < 16 ? 16 : S < 96 ? 8 : 4;
    while (slices < SLICES_MAX && (V + slices - 1) / slices > SLICE_MOST) slices *= 2;
    return slices;
}
