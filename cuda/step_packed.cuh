// step_packed.cuh - a token of up to 16 sequences with matrices in 8 or 4 bits. Included by
// step_portable.cuh, whose thin_kernel this is with W in tiles (quantized.cuh). Codes are unpacked
// in registers into bf16, which is exact, on their way to the tensor cores; each tile's sums are
// multiplied by the scales.
//
// A block takes 8 NT rows, a warp a part of the inputs, tile by tile. NT = 4: a warp reads whole
// tiles, 16 bytes a lane, four neighbouring rows of a word; which of 32 rows is which column of a
// product follows from that: row 4c + n is column c of product n. NT = 1: a quarter of the rows,
// for matrices with few.

// Eight weights of a lane as a product's operand, two bf16 a word. The order of the inputs in it is
// that of operand_inputs.
template <int BITS> struct Codes { // of one row
    uint32_t word[BITS / 4];
};
template <int BITS> __device__ inline uint4 operand_weights(Codes<BITS> c) {
    if constexpr (BITS == 4) { // code + 128 is bf16 0x4300 + code, exact
        const uint32_t w = c.word[0] ^ tile_signs(4);
        uint32_t out[4];
        const __nv_bfloat162 zero =
            __halves2bfloat162(__float2bfloat16_rn(136.f), __float2bfloat16_rn(136.f));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t pair = (w >> (4 * i) & 0x000f000fu) | 0x43004300u;
            __nv_bfloat162 x = __hsub2(*(__nv_bfloat162 *)&pair, zero);
            out[i] = *(uint32_t *)&x;
        }
        return make_uint4(out[0], out[1], out[2], out[3]);
    } else { // code + 2^23 is float 0x4b000000 + code
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = __uint_as_float(
                       __byte_perm(c.word[i / 4] ^ tile_signs(8), 0x4b000000u, 0x7440 + i % 4)) -
                   8388736.f;
        return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    }
}
template <int BITS> __device__ inline uint4 operand_inputs(uint4 x) {
    if (BITS == 8) return x;
    // Weights come as pairs i, i + 4.
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                      __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
}

// STAGED, for few sequences: the block computes all its inputs first, in shared memory, by all
// threads. Otherwise lanes compute them as they are used, where one in eight has work.
enum { STAGED_INPUTS = 16384 }; // of all sequences, at the most: 32 kB

template <int BITS, int NT, int AHEAD, bool STAGED, class Source, class Sink>
__global__ void __launch_bounds__(32 * THIN_WARPS)
    packed_kernel(Source source, Sink sink, const unsigned char *__restrict__ W, int S, int O,
                  int I) {
    constexpr int COLS = 8 * NT, PITCH = COLS + 1, WORDS = BITS / 4,
                  BYTES = 2 * TILE + BITS * TILE * TILE / 8;
    // Which is faster: doc/SPEED.md.
    constexpr bool ROTATES = !STAGED || BITS == 8;
    extern __shared__ float sums[]; // (THIN_WARPS, 16, PITCH), then the squares (THIN_WARPS, 16)
    float *squares = sums + THIN_WARPS * 16 * PITCH;
    uint4 *staged = (uint4 *)(squares + THIN_WARPS * 16); // (S, inputs of the block / 8)
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, s = lane / 4, j = lane % 4,
              o0 = blockIdx.x * COLS, steps = (I + TILE - 1) / TILE, parts = gridDim.y * THIN_WARPS,
              part = blockIdx.y * THIN_WARPS + warp, end = steps * (part + 1) / parts;
    int step = steps * part / parts;
    // Where the lane reads in a tile: words of row `row` on, scales of its columns of the product.
    const int row = NT == 4 ? 4 * s : o0 % TILE + s, column = NT == 4 ? 8 * j : o0 % TILE + 2 * j,
              place = tile_word(BITS, WORDS * j, row);
    const unsigned char *tiles = W + ((size_t)(o0 / TILE) * steps + step) * BYTES; // from `step` on
    float c[NT][4] = {}, square[2] = {};
    Codes<BITS> w[AHEAD][NT];
    uint32_t scale[AHEAD][NT];
    auto load_tile = [&](int i, int ahead) { // tile step + ahead to place i
        const unsigned char *tile = tiles + ahead * BYTES;
        const uint32_t *words = (const uint32_t *)(tile + 2 * TILE) + place;
        const bool inside = step + ahead < end;
        if constexpr (NT == 4) {
#pragma unroll
            for (int k = 0; k < WORDS; k++) {
                uint4 v =
                    inside ? __ldcs((const uint4 *)(words + 128 * k)) : make_uint4(0, 0, 0, 0);
                if constexpr (BITS == 4)
                    w[i][0].word[0] = v.x, w[i][1].word[0] = v.y, w[i][2].word[0] = v.z,
                    w[i][3].word[0] = v.w;
                else // two words of two rows
                    w[i][2 * k].word[0] = v.x, w[i][2 * k + 1].word[0] = v.y,
                             w[i][2 * k].word[1] = v.z, w[i][2 * k + 1].word[1] = v.w;
            }
            uint4 v = inside ? *(const uint4 *)(tile + 2 * column) : make_uint4(0, 0, 0, 0);
            scale[i][0] = v.x, scale[i][1] = v.y, scale[i][2] = v.z, scale[i][3] = v.w;
        } else {
#pragma unroll
            for (int k = 0; k < WORDS; k++) w[i][0].word[k] = inside ? __ldcs(words + 2 * k) : 0;
            scale[i][0] = inside ? *(const uint32_t *)(tile + 2 * column) : 0;
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load_tile(i, i);
    wait_for_input();
    // The inputs of the block: of all its warps.
    const int begin = steps * (int)(blockIdx.y * THIN_WARPS) / parts * TILE,
              stop = min(steps * (int)((blockIdx.y + 1) * THIN_WARPS) / parts * TILE, I),
              groups = (stop - begin + 7) / 8;
    if constexpr (STAGED) {
        for (int s = 0; s < S; s++) {
            float mine = 0;
            for (int i = threadIdx.x; i < groups; i += 32 * THIN_WARPS)
                staged[s * groups + i] =
                    operand_inputs<BITS>(source.eight(s, begin + 8 * i, I, &mine));
            if (Source::norm) {
                mine = warp_sum(mine);
                if (lane == 0) squares[warp * 16 + s] = mine;
            }
        }
        __syncthreads();
    }
    while (step < end) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = (step + i) * TILE + 8 * j;
            const bool inside = step + i < end && at < I;
            uint4 a = make_uint4(0, 0, 0, 0), b = a;
            if constexpr (STAGED) {
                if (inside && s < S) a = staged[s * groups + (at - begin) / 8];
            } else {
                if (inside && s < S) a = source.eight(s, at, I, &square[0]);
                if (inside && s + 8 < S) b = source.eight(s + 8, at, I, &square[1]);
                a = operand_inputs<BITS>(a), b = operand_inputs<BITS>(b);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint4 v = operand_weights<BITS>(w[i][n]);
                float sum[4] = {};
                tensor_product(sum, a.x, b.x, a.y, b.y, v.x, v.y);
                tensor_product(sum, a.z, b.z, a.w, b.w, v.z, v.w);
                // Columns 2j and 2j + 1 of product n.
                float s0, s1;
                if constexpr (NT == 4) { // rows 8j + n and 8j + 4 + n
                    const uint32_t p = scale[i][n / 2], q = scale[i][2 + n / 2];
                    s0 = n % 2 ? high_half(p) : low_half(p),
                    s1 = n % 2 ? high_half(q) : low_half(q);
                } else s0 = low_half(scale[i][0]), s1 = high_half(scale[i][0]);
                c[n][0] += s0 * sum[0], c[n][1] += s1 * sum[1];
                if (!STAGED) c[n][2] += s0 * sum[2], c[n][3] += s1 * sum[3];
            }
            if (ROTATES) load_tile(i, AHEAD + i); // AHEAD tiles are always on the way
        }
        step += AHEAD, tiles += AHEAD * BYTES;
        if (!ROTATES && step < end)
#pragma unroll
            for (int i = 0; i < AHEAD; i++) load_tile(i, i);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int of = 8 * half + s;
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 2; i++)
                sums[(warp * 16 + of) * PITCH + (NT == 4 ? 4 * (2 * j + i) + n : 2 * j + i)] =
                    c[n][2 * half + i];
        if (Source::norm && !STAGED) {
            float x = square[half];
            x += __shfl_xor_sync(0xffffffffu, x, 1);
            x += __shfl_xor_sync(0xffffffffu, x, 2);
            if (j == 0) squares[warp * 16 + of] = x;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < S * COLS; i += 32 * THIN_WARPS) {
        const int of = i / COLS, o = i % COLS;
        if (o0 + o >= O) continue;
        float x = 0, square_sum = 0;
#pragma unroll
        for (int v = 0; v < THIN_WARPS; v++) {
            x += sums[(v * 16 + of) * PITCH + o];
            if (Source::norm) square_sum += squares[v * 16 + of];
        }
        if constexpr (Source::norm) x *= rsqrtf(square_sum / (float)I + source.eps);
        sink.take(of, o0 + o, S, O, x);
    }
}

template <int BITS, int NT, int AHEAD, bool STAGED, class Source, class Sink>
static void packed_launch(Device *d, Source source, Sink sink, const void *W, const ThinSize &n) {
    size_t shared = (size_t)THIN_WARPS * 16 * (8 * NT + 2) * sizeof(float);
    // A part has at most a tile more than its share of the inputs.
    if (STAGED) shared += ((size_t)n.I / n.parts + 2 * TILE) * n.S * sizeof(bf16);
    launch_dependent(d, packed_kernel<BITS, NT, AHEAD, STAGED, Source, Sink>,
                     dim3(blocks_for((size_t)n.O, 8 * NT), (unsigned)n.parts),
                     32 * (unsigned)THIN_WARPS, shared, source, sink, (const unsigned char *)W, n.S,
                     n.O, n.I);
}
// Whole tiles where there are blocks enough for all multiprocessors.
template <int BITS, bool STAGED, class Source, class Sink>
static void packed_choice(Device *d, Source source, Sink sink, const void *W, const ThinSize &n) {
    if (n.O >= 64 * d->processors)
        packed_launch<BITS, 4, BITS == 4 ? 4 : 3, STAGED>(d, source, sink, W, n);
    else if (n.parts > 1) packed_launch<BITS, 1, 2, STAGED>(d, source, sink, W, n);
    else packed_launch<BITS, 1, 8, STAGED>(d, source, sink, W, n);
}
template <int BITS, class Source, class Sink>
static void packed_bits(Device *d, Source source, Sink sink, const void *W, const ThinSize &n) {
    if (n.S <= 2 && n.S * (n.I / n.parts) <= STAGED_INPUTS)
        packed_choice<BITS, true>(d, source, sink, W, n);
    else packed_choice<BITS, false>(d, source, sink, W, n);
}
