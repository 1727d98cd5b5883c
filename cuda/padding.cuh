// padding.cuh - texts of different lengths in rows of L tokens. Included by mamba_cuda.cu.
//
// A text is padded at its end, where no number of the text depends on it. Only the state after the
// text does. So delta of a padded token is 0, of which decay is 1 and inject 0, and the window is
// taken at the end of the text.

// So low that softplus makes 0 of it, whatever dt_bias is added. float16 reaches to 65,504.
#define DELTA_NONE (-60000.f)

// delta (B*L,E), before softplus, of the tokens after the end of each text
template <class T>
__global__ void pad_delta_kernel(T *delta, const int32_t *lengths, int L, int E) {
    const size_t row = blockIdx.x;
    if ((int)(row % L) < lengths[row / L]) return;
    for (int e = threadIdx.x; e < E; e += blockDim.x) put(delta + row * E + e, DELTA_NONE);
}
template <class T>
static void pad_delta(Device *d, T *delta, const int32_t *lengths, int B, int L, int E) {
    pad_delta_kernel<<<(unsigned)(B * L), 128, 0, d->stream>>>(delta, lengths, L, E);
    check_launch(d, "padding");
}

// window (B,K-1,E): the last K-1 inputs of each text, from xz (B*L,2E); zeros before the first one
template <class T>
__global__ void text_windows_kernel(float *window, const T *xz, const int32_t *lengths, int L,
                                    int E, int K) {
    const int e = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t b = blockIdx.y;
    if (e >= E) return;
    for (int j = 0; j < K - 1; j++) {
        const int t = lengths[b] - (K - 1) + j;
        window[(b * (K - 1) + j) * E + e] = t < 0 ? 0 : value(xz[(b * L + t) * 2 * E + e]);
    }
}
template <class T>
static void text_windows(Device *d, float *window, const T *xz, const int32_t *lengths, int B,
                         int L, int E, int K) {
    const dim3 grid(blocks_for((size_t)E, 128), (unsigned)B);
    text_windows_kernel<<<grid, 128, 0, d->stream>>>(window, xz, lengths, L, E, K);
    check_launch(d, "padding");
}
