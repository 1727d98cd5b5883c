// quantized.cuh - matrices in 8 or 4 bits, as the file has them: in_proj, x_proj, out_proj, the
// embedding and the head. Included by mamba_cuda.cu. dt_proj, a fiftieth of the weights, is
// unpacked when it is loaded.
//
// A matrix (rows,cols) is cut into tiles of 32 x 32, mamba.c's TILE. A tile has 32 bf16 scales, one
// a row, then words: word (g,r) has the codes of row r, columns 8g.. (4 bits) or 4g.. (8 bits).
// On the device all codes are in two's complement, and the words of a tile have another order than
// in the file: lane 4 m + j of a warp finds the codes of rows 4 m..4 m + 3, columns 8 j..8 j + 7,
// in 16 bytes beside those of its neighbours, or in 8 bits in two times 16, two rows each. So a
// warp reads a tile from shared memory without conflicts.
//   - A few tokens multiply with the codes: they are unpacked in registers into bf16 (exactly)
//     on their way to the tensor cores, and each tile's sums are multiplied by the scales.
//   - For more tokens a matrix is unpacked into scratch, one at a time.

// A word's codes as numbers: 8 or 4.
template <int BITS> __device__ inline void codes_of(uint32_t word, float *to) {
    word ^= tile_signs(BITS);
#pragma unroll
    for (int i = 0; i < 32 / BITS; i++)
        to[i] = (float)((int)(word >> (BITS * i) & ((1u << BITS) - 1)) - (1 << (BITS - 1)));
}

// out (rows,cols) from tiles. A block takes UNPACK_TILES tiles side by side, a thread a word of
// each: of 8 rows and 4 words, so that both its reads and its writes fill sectors of 32 bytes.
enum { UNPACK_TILES = 4 };
template <class T, int BITS>
__global__ void __launch_bounds__(BITS * 32)
    unpack_kernel(T *__restrict__ out, const unsigned char *__restrict__ tiles, int rows,
                  int cols) {
    constexpr int CODES = 32 / BITS, BYTES = 2 * TILE + BITS * TILE * TILE / 8;
    const int t = threadIdx.x, r = t / 32 % 4 * 8 + t % 8, group = t / 8 % 4 + t / 128 * 4,
              row = blockIdx.y * TILE + r, across = (cols + TILE - 1) / TILE;
#pragma unroll
    for (int i = 0; i < UNPACK_TILES; i++) {
        const int at = blockIdx.x * UNPACK_TILES + i, col = at * TILE + group * CODES;
        if (at >= across || row >= rows) break;
        const unsigned char *tile = tiles + ((size_t)blockIdx.y * across + at) * BYTES;
        const float scale = __uint_as_float((uint32_t)((const uint16_t *)tile)[r] << 16);
        float code[CODES];
        codes_of<BITS>(((const uint32_t *)(tile + 2 * TILE))[tile_word(BITS, group, r)], code);
        T *to = out + (size_t)row * cols + col;
        if (cols % CODES == 0 && col < cols) {
            Group<T, CODES> g;
#pragma unroll
            for (int k = 0; k < CODES; k++) put(&g.v[k], code[k] * scale);
            *(Group<T, CODES> *)to = g;
        } else
            for (int k = 0; k < CODES && col + k < cols; k++) put(to + k, code[k] * scale);
    }
}
template <class T>
static void unpack(Device *d, T *out, const void *tiles, int bits, int rows, int cols) {
    const dim3 grid(blocks_for((size_t)cols, TILE * UNPACK_TILES), blocks_for((size_t)rows, TILE));
    auto kernel = bits == 8 ? unpack_kernel<T, 8> : unpack_kernel<T, 4>;
    kernel<<<grid, bits * 32, 0, d->stream>>>(out, (const unsigned char *)tiles, rows, cols);
    check_launch(d, "unpack");
}

// Tiles from the file's form to the device's, in place. A thread a word.
template <int BITS>
__global__ void __launch_bounds__(BITS * 32) arrange_kernel(unsigned char *tiles, size_t count) {
    constexpr int BYTES = 2 * TILE + BITS * TILE * TILE / 8;
    const int g = threadIdx.x / TILE, r = threadIdx.x % TILE, place = tile_word(BITS, g, r);
    for (size_t i = blockIdx.x; i < count; i += gridDim.x) {
        uint32_t *words = (uint32_t *)(tiles + i * BYTES + 2 * TILE);
        const uint32_t word = words[threadIdx.x] ^ (tile_signs(BITS) & 0x7fffffffu);
        __syncthreads();
        words[place] = word;
    }
}
static void arrange(Device *d, void *tiles, int bits, int rows, int cols) {
    const size_t count = (size_t)((rows + TILE - 1) / TILE) * ((cols + TILE - 1) / TILE);
    auto kernel = bits == 8 ? arrange_kernel<8> : arrange_kernel<4>;
    kernel<<<(unsigned)std::min(count, (size_t)8192), bits * 32, 0, d->stream>>>(
        (unsigned char *)tiles, count);
    check_launch(d, "weights");
}

// How many bytes a matrix in bits has.
static size_t tiles_bytes(int bits, int rows, int cols) {
    return (size_t)((rows + TILE - 1) / TILE) * (size_t)((cols + TILE - 1) / TILE) *
           (2 * TILE + (size_t)bits * TILE * TILE / 8);
}

struct Unpacking {
    int bits;  // 0: nothing is quantised
    void *end; // of the memory in which matrices are unpacked for a while
};
// out (rows,O) = x (rows,I) W^T, or += with add. W (O,I) as T, or in bits: then as many of its rows
// as there is room for are unpacked at a time, from scratch to end.
template <class T, class Out>
static void project(Device *d, Rows<Out> out, Rows<T> x, const void *W, int rows, int O, int I,
                    const Unpacking &u, T *scratch, const void *end, bool add = false) {
    if (!u.bits) return matmul(d, out, x, (const T *)W, rows, O, I, add);
    scratch = (T *)(((uintptr_t)scratch + 255) / 256 * 256);
    const size_t room = (size_t)((const T *)end - scratch) / (size_t)I,
                 row_of_tiles = tiles_bytes(u.bits, TILE, I);
    const int panels = (O + TILE - 1) / TILE, most = (int)std::min(room / TILE, (size_t)panels),
              parts = (panels + most - 1) / most, each = (panels + parts - 1) / parts * TILE;
    for (int o = 0; o < O; o += each) {
        const int n = std::min(each, O - o);
        unpack(d, scratch, (const char *)W + (size_t)(o / TILE) * row_of_tiles, u.bits, n, I);
        matmul(d, Rows(out.p + o, out.ld), x, (const T *)scratch, rows, n, I, add);
    }
}
