// sampling.cuh - the next token of each sequence, drawn on the device. Included by mamba_cuda.cu.

// Floats as unsigned integers of the same order, and back.
__device__ inline uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float unordered(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The highest x and its lowest index, over the block.
__device__ inline void block_argmax(float *best, int *index, float *values, int *indices) {
    for (int lane = 16; lane; lane /= 2) {
        float x = __shfl_xor_sync(0xffffffffu, *best, lane);
        int i = __shfl_xor_sync(0xffffffffu, *index, lane);
        if (x > *best || (x == *best && i < *index)) *best = x, *index = i;
    }
    int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) values[warp] = *best, indices[warp] = *index;
    __syncthreads();
    *best = values[0], *index = indices[0];
    for (int w = 1; w < warps; w++)
        if (values[w] > *best || (values[w] == *best && indices[w] < *index))
            *best = values[w], *index = indices[w];
}

// The repeat penalty, and the likeliest token of each of SLICES parts of the vocabulary, so that
// the work on V logits is spread over the multiprocessors. If a token will be drawn, its logits go
// to scratch, -infinity where a token is not allowed.
enum { SLICES = 32 };
struct Slice {
    float best;
    int32_t index, bad;
};

__global__ void __launch_bounds__(256)
    likeliest_kernel(const Sampling *how, const Sequence *sequences, const float *logits,
                     const unsigned char *allowed, float *scratch, Slice *slices, int V) {
    __shared__ float values[32];
    __shared__ int indices[32], bad;
    wait_for_input();
    const Sequence *q = &sequences[blockIdx.y];
    int chunk = (V + SLICES - 1) / SLICES, first = blockIdx.x * chunk, last = min(first + chunk, V);
    const float *in = logits + (size_t)blockIdx.y * V;
    float *x = scratch + (size_t)blockIdx.y * V, penalty = how->repeat_penalty, best = -INFINITY;
    int likeliest = V;
    if (threadIdx.x == 0) bad = 0;
    __syncthreads();
    const bool again =
        how->temperature != 0 || penalty != 1; // whether logits are needed after this
    for (int v = first + threadIdx.x; v < last;
         v += 4 * blockDim.x) { // four loads on the way at once
        float l[4];
        bool may[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = v + i * (int)blockDim.x;
            l[i] = at < last ? in[at] : 0, may[i] = at < last && allowed[at];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = v + i * (int)blockDim.x;
            if (!(l[i] - l[i] == 0)) bad = 1;
            if (again && at < last) x[at] = may[i] ? l[i] : -INFINITY;
            if (may[i] && l[i] > best) best = l[i], likeliest = at;
        }
    }
    __syncthreads();
    if (penalty != 1 &&
        threadIdx.x < (unsigned)q->n_recent) { // a token is penalised once, however often it occurs
        int v = q->recent[threadIdx.x];
        bool mine = v >= first && v < last;
        for (int j = 0; j < (int)threadIdx.x && mine; j++) mine = q->recent[j] != v;
        if (mine) x[v] = x[v] > 0 ? x[v] / penalty : x[v] * penalty;
    }
    if (penalty != 1) {
        __syncthreads();
        best = -INFINITY, likeliest = V;
        for (int v = first + threadIdx.x; v < last; v += blockDim.x)
            if (x[v] > best) best = x[v], likeliest = v;
    }
    block_argmax(&best, &likeliest, values, indices);
    if (threadIdx.x == 0) slices[blockIdx.y * SLICES + blockIdx.x] = {best, likeliest, bad};
}

// One block draws the token of one sequence. It divides by the temperature and finds the lowest
// logit that top-k, top-p and min-p keep, by bisection over the 2^32 floats. Of the kept tokens it
// takes the one with the highest logit + Gumbel noise, which is a draw from the softmax. The noise
// depends on seed, position and token only. The embedding of the token starts the residual stream.
template <class T> struct SampleArgs {
    const Sampling *how;
    Sequence *sequences; // (S)
    const Slice *slices; // (S,SLICES)
    float *scratch;      // (S,V): the logits as likeliest_kernel left them
    int32_t *current;    // (S): the token drawn
    int32_t *tokens;     // (GENERATE_MAX,S)
    float *res;          // (S,D): its embedding
    const T *embedding;  // (V,D)
    int S, V, D;
};
template <class T> __global__ void __launch_bounds__(1024) sample_kernel(SampleArgs<T> p) {
    const int S = p.S, V = p.V, D = p.D;
    const Sampling *how = p.how;
    const Slice *slices = p.slices;
    __shared__ float sums[33], values[32];
    __shared__ int indices[32];
    wait_for_input();
    Sequence *q = &p.sequences[blockIdx.x];
    float *x = p.scratch + (size_t)blockIdx.x * V, best = -INFINITY, temperature = how->temperature;
    int choice = V, bad = 0;
    for (int i = 0; i < SLICES; i++) {
        Slice slice = slices[blockIdx.x * SLICES + i];
        if (slice.best > best)
            best = slice.best, choice = slice.index; // of equal ones the lowest index
        bad |= slice.bad;
    }
    if (temperature != 0 && !bad && choice < V) {
        float highest = best, lowest = -INFINITY, whole = 1;
        for (int v = threadIdx.x; v < V; v += blockDim.x)
            x[v] = (x[v] - highest) / temperature; // now at most 0
        __syncthreads();
        bool by_count = how->top_k > 0 && how->top_k < V, by_mass = how->top_p < 1;
        for (int rule = 0; rule < 2; rule++) {
            if (!(rule ? by_mass : by_count)) continue;
            if (rule) { // the mass of what top-k left
                float mass = 0;
                for (int v = threadIdx.x; v < V; v += blockDim.x)
                    mass += x[v] >= lowest ? __expf(x[v]) : 0.0f;
                whole = block_sum(mass, sums);
            }
            uint32_t yes = ordered(-INFINITY),
                     no = ordered(0) + 1; // enough is kept above yes, too little above no
            while (no - yes > 1) {
                uint32_t middle = yes + (no - yes) / 2;
                float threshold = fmaxf(unordered(middle), lowest), sum = 0;
                for (int v = threadIdx.x; v < V; v += blockDim.x)
                    if (x[v] >= threshold) sum += rule ? __expf(x[v]) : 1.0f;
                sum = block_sum(sum, sums);
                if (rule ? sum >= how->top_p * whole : sum >= (float)how->top_k) yes = middle;
                else no = middle;
            }
            lowest = fmaxf(lowest, unordered(yes));
        }
        if (how->min_p > 0) lowest = fmaxf(lowest, __logf(how->min_p));
        if (lowest > 0) lowest = 0;
        best = -INFINITY, choice = V;
        uint64_t stream = mix(q->random + 0x9E3779B97F4A7C15u * (q->position + 1));
        for (int v = threadIdx.x; v < V; v += blockDim.x) {
            if (x[v] == -INFINITY || !(x[v] >= lowest)) continue;
            float unit =
                ((float)(mix(stream + 0x9E3779B97F4A7C15u * (uint64_t)(v + 1)) >> 40) + 0.5f) *
                0x1p-24f;
            float noisy = x[v] - __logf(-__logf(unit));
            if (noisy > best) best = noisy, choice = v;
        }
        block_argmax(&best, &choice, values, indices);
    }
    if (choice >= V) bad = 1;
    if (bad) choice = 0;
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        p.res[(size_t)blockIdx.x * D + i] = value(p.embedding[(size_t)choice * D + i]);
    __syncthreads(); // all have read q
    if (threadIdx.x) return;
    p.tokens[(size_t)q->step * S + blockIdx.x] = bad ? -1 : choice;
    q->step = (q->step + 1) % GENERATE_MAX;
    p.current[blockIdx.x] = choice;
    q->recent[q->position % RECENT] = choice;
    q->position++;
    q->n_recent = q->position < RECENT ? (int32_t)q->position : RECENT;
}
