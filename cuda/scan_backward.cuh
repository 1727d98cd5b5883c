// scan_backward.cuh - the scan's backward. Included by mamba_cuda.cu, which has the mathematics,
// the plain form and the drawing.
//
// A block is 32 C channels of a sequence and a segment of its time; it walks from the segment's
// last tile of SCAN_SAVE steps to its first. Its warps (4; 8 or 16 for N > 16) share the states,
// STATES each; d_h and d_A_neg of a lane's channels stay in registers from the first step to the
// last. A tile:
//   1 prepare: what all states share, 4 steps (a quad) at a time: delta, delta u, d_y and what the
//     end needs, into shared memory; B_ssm and C_ssm too.
//   2 the states at the starts of pieces of 8 steps, from the one that the forward saved.
//   3 pieces, the last first. For each state h forward into registers, then d_h backward with the
//     same decays, and every sum: over states per step (registers), over steps per state
//     (registers), over channels (tensor cores, then shared memory).
//   4 finish, after every second piece: the warps' sums over states become d_delta, d_u, d_z. After
//     the first finish nobody needs the upper half of the tile: with two channels a lane, rows of
//     the next tile are copied there while the lower half is walked.
// One segment where there are channels enough. Else d_h at the end of each segment must be known
// before: scan_back_ends walks all segments but the first from d_h = 0, and a block joins the ends
// of the segments behind its own. It walks segments in BACK_PARTS parts, to have more blocks. That
// costs a quarter more, and no block ever waits for another.
//
// Instructions are the limit, not bytes (read 8, written 6, states 2, parts of d_B_ssm and d_C_ssm
// 4 or 2 each way, a token and channel). Of a token, channel and state: 27 with one channel a lane,
// 23 with two, of which 13 are step 3's arithmetic and 4 step 2's. Registers are the other limit:
// they have two banks, even and odd, and an instruction seems to take as many cycles as it reads
// registers of one bank. doc/SPEED.md counts both. No sum depends on which block ran when.

enum { BACK_STEPS = 8 }; // of a piece

struct ScanBackPlan {
    int blocks, tiles, segments, segment_tiles; // blocks of 32 C channels; tiles of SCAN_SAVE steps
    int n0;                                     // first state of this launch
    int part_tiles, parts, ends_count;          // scan_back_ends: of a part, a segment, all parts
    int ld_delta, ld_u, ld_z, ld_d_g, ld_B, ld_C, ld_d_delta, ld_d_u, ld_d_z; // in bytes
    size_t ends, sums, slabs, partial2, partial, bytes; // offsets in 4-byte words; the whole
};
// The workspace, in words of 4 bytes:
//   ends      (parts of segments, B, N, E) d_h before a part, from 0 behind it
//   sums      (parts of segments, B, E) its sum of delta
//   slabs     (3, B*L, E) sums over the states of the launches before, where there are any
//   partial2  (B, segments, N + 2, E) a segment's d_A_neg, d_D_skip, d_dt_bias
//   partial   (blocks, B, pieces, N, 16) d_C of a piece in order of time, then d_B reversed

// d += a b, (16,8) times (8,8): lane 4g+q holds a[g][q], a[g+8][q], a[g][q+4], a[g+8][q+4];
// b[q][g], b[q+4][g]; d[g][2q], d[g][2q+1], d[g+8][2q], d[g+8][2q+1]. TF32 cuts a, b to 11 bits.
__device__ __forceinline__ void tf32_product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Row i of rows that lie `bytes` apart in device memory. Written in this way it is one instruction;
// the compiler would make three to five of it where it knows how i or p came about.
template <typename T> __device__ __forceinline__ T *row_of(T *p, int i, int bytes) {
    size_t row;
    asm("{ .reg .s64 x; mul.wide.s32 x, %1, %2; add.s64 %0, x, %3; }"
        : "=l"(row)
        : "r"(i), "r"(bytes), "l"(__cvta_generic_to_global(p)));
    return (T *)__cvta_global_to_generic(row);
}
template <typename T> __device__ __forceinline__ T *device_memory(T *p) { // p, known to point there
    return (T *)__cvta_global_to_generic(__cvta_generic_to_global(p));
}
__device__ __forceinline__ uint32_t opaque(uint32_t x) { // kept, not computed again at each use
    asm("" : "+r"(x));
    return x;
}
// Adds up 16 values over groups of 4 lanes, values 4j..4j+3 a call: afterwards lane 4g+q holds the
// sums over group g (lanes 4g..4g+3) of values 4q..4q+3. In the left matrix v0 is row g, v2 row
// g + 8 of columns 0..3, v1 and v3 of columns 4..7. The right one has ones in rows 0..3 of column
// 2j and in rows 4..7 of column 2j+1: ones[2j], ones[2j+1]. EXACT (float) adds what TF32 cut off.
template <bool EXACT>
__device__ __forceinline__ void add_groups(float (&d)[4], int j, const float (&v)[4],
                                           const uint32_t (&ones)[8]) {
    const float in_order[4] = {v[0], v[2], v[1], v[3]};
#pragma unroll
    for (int rest = 0; rest <= EXACT; rest++) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float high = __uint_as_float(__float_as_uint(in_order[i]) & 0xffffe000u);
            a[i] = __float_as_uint(!EXACT ? in_order[i] : rest ? in_order[i] - high : high);
        }
        tf32_product(d, a, ones[2 * j], ones[2 * j + 1]);
    }
}

// Four values of type T.
template <typename T> struct alignas(4 * sizeof(T)) Quad {
    T v[4];
};

template <typename T, int WARPS, int STATES, int C> constexpr size_t scan_back_shared() {
    constexpr int NP = WARPS * STATES, ROW = 32 * C;
    return 4 * (5 * SCAN_SAVE * ROW + SCAN_SAVE * 2 * NP + SCAN_SAVE / BACK_STEPS * NP * ROW +
                WARPS * 16 * 3 * ROW) +
           sizeof(T) * SCAN_SAVE * ROW;
}

// C: channels a lane; two are for a T of 2 bytes and rows aligned to 16. SLABS: N > 32; a launch
// does WARPS * STATES states, and sums over states go on from launch to launch.
template <typename T, int WARPS, int STATES, int C, bool SLABS, int MIN_BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    scan_back(ScanBackArgs<T> p, ScanBackPlan q) {
    constexpr int K = BACK_STEPS, NP = WARPS * STATES, ROW = 32 * C, QUADS = SCAN_SAVE / 4,
                  MINE = (QUADS + WARPS - 1) / WARPS, PIECES = SCAN_SAVE / K,
                  BC = (2 * NP + 31) / 32, // of B and C, a lane and quad
        SCRATCH = 36;                      // float4s of a state's sums over groups, and a gap
    static_assert(PIECES == 4 && WARPS % 4 == 0 && STATES <= 4, "shape of a block");
    constexpr bool COPIES = C == 2;
    static_assert(!COPIES || (sizeof(T) == 2 && WARPS == 4 && STATES == 4), "what is copied");
    typedef Pack<T, C> Packed;
    extern __shared__ float4 shared[];
    float4 *deltas = shared, *dus = deltas + QUADS * ROW, *dys = dus + QUADS * ROW,
           *slopes = dys + QUADS * ROW, *dgs = slopes + QUADS * ROW; // [QUADS][C][32]
    float4 *bc = dgs + QUADS * ROW;                                  // [QUADS][2 NP] B, C
    float4 *sums = bc + QUADS * 2 * NP;                              // [WARPS][4][3][C][32]
    Row<C> *starts = (Row<C> *)(sums + WARPS * 4 * 3 * ROW);         // [PIECES][NP][32]
    Quad<T> *us = (Quad<T> *)(starts + PIECES * NP * 32);            // [QUADS][C][32]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, L = p.L, E = p.E, N = p.N;
    const int group = blockIdx.x % q.blocks, b = blockIdx.x / q.blocks % p.B,
              segment = blockIdx.x / (q.blocks * p.B);
    const int e_true = (group * 32 + lane) * C, row0 = b * L;
    const bool live = e_true < E;
    const int e = live ? e_true : E - C; // C divides E
    const int first = segment * q.segment_tiles, last = min(first + q.segment_tiles, q.tiles) - 1;
    const int n_warp = warp * STATES, n_first = SLABS ? q.n0 + n_warp : n_warp;
    float *words = (float *)p.workspace;
    float A[STATES][C], d_h[STATES][C], d_A[STATES][C], bias[C], skip[C], d_skip[C], d_bias[C];
#pragma unroll
    for (int c = 0; c < C; c++) {
        // A channel beyond the last has delta = 0 for ever.
        bias[c] = live ? p.dt_bias[e + c] : -INFINITY, skip[c] = p.D_skip[e + c];
        d_skip[c] = d_bias[c] = 0.f;
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            const int n = n_first + i;
            const bool in = n < N;
            A[i][c] = in ? LOG2E * p.A_neg[(size_t)n * E + e + c] : 0.f;
            d_h[i][c] = in && p.d_h_final ? p.d_h_final[((size_t)b * N + n) * E + e + c] : 0.f;
            d_A[i][c] = 0.f;
        }
    }
    // d_h behind this segment, through the segments after it.
    for (int s = q.ends_count - 1; s >= (segment + 1) * q.parts; s--) {
        const size_t sb = (size_t)s * p.B + b;
#pragma unroll
        for (int c = 0; c < C; c++) {
            const float elapsed = words[q.sums + sb * E + e + c];
#pragma unroll
            for (int i = 0; i < STATES; i++)
                d_h[i][c] = fmaf(exp2_fast(A[i][c] * elapsed), d_h[i][c],
                                 words[q.ends + (sb * N + min(n_first + i, N - 1)) * E + e + c]);
        }
    }
    uint32_t ones[8];
#pragma unroll
    for (int i = 0; i < 8; i++) ones[i] = opaque(lane >> 2 == i ? __float_as_uint(1.f) : 0);
    float *parts = words + q.partial +
                   ((size_t)(group * p.B + b) * q.tiles * PIECES * N + n_first) * 16 + 2 * lane;
    // Row 0 of this sequence and channel. Seldom used: better in memory than in registers.
    const T *volatile in_rows[4] = {row_of(p.delta_raw + e, row0, q.ld_delta),
                                    row_of(p.u + e, row0, q.ld_u), row_of(p.z + e, row0, q.ld_z),
                                    row_of(p.d_g + e, row0, q.ld_d_g)};
    T *volatile out_rows[3] = {row_of(p.d_delta_raw + e, row0, q.ld_d_delta),
                               row_of(p.d_u + e, row0, q.ld_d_u),
                               row_of(p.d_z + e, row0, q.ld_d_z)};
    float4 *const my_sums = sums + warp * 4 * 3 * ROW + lane;

    // 1. A warp fetches and prepares the quads that it will finish: warp, warp + WARPS, ... of the
    // tile. (Fetching rows into registers before `finish` was slower.)
    struct Fetched {
        Packed rows[4][MINE][4]; // of delta_raw, u, z, d_g
        T bc[MINE][BC][4];
    };
    // A tile's saved states lie where the last piece's start will be. Rows that are copied, those
    // of quad `warp` and then of quad 4 + warp, lie in place of the latter: of tensor i in array i
    // of deltas, dus, dys, slopes.
    Row<C> *const saved = starts + ((PIECES - 1) * NP + n_warp) * 32;
    auto rows_place = [&](int i) { return (T *)(shared + (i * QUADS + 4 + warp) * ROW); };
    auto copy = [&](int tile) {
        const float *h = p.h_starts + ((size_t)b * q.tiles + tile) * N * E;
#pragma unroll
        for (int i = 0; i < STATES * ROW; i += 128) {
            const int at = i + 4 * lane, n = min(n_first + at / ROW, N - 1),
                      e_h = group * ROW + at % ROW;
            copy_16_or_zero(shared_address((float *)saved + at),
                            h + (size_t)n * E + min(e_h, E - 4), e_h < E);
        }
#pragma unroll
        for (int i = 0; i < 8 * ROW; i += 256) {
            const int at = i + 8 * lane, row = at / ROW,
                      t = tile * SCAN_SAVE + 4 * (warp + row / 4 * WARPS) + row % 4,
                      r = row0 + min(t, L - 1), e_row = min(group * ROW + at % ROW, E - 8);
            copy_16(shared_address(rows_place(0) + at), row_of(p.delta_raw + e_row, r, q.ld_delta));
            copy_16(shared_address(rows_place(1) + at), row_of(p.u + e_row, r, q.ld_u));
            copy_16(shared_address(rows_place(2) + at), row_of(p.z + e_row, r, q.ld_z));
            copy_16(shared_address(rows_place(3) + at), row_of(p.d_g + e_row, r, q.ld_d_g));
        }
    };
    auto fetch_BC = [&](int tile, Fetched &to) {
#pragma unroll
        for (int m = 0; m < BC; m++) {
            const int n2 = min(lane + 32 * m, 2 * NP - 1),
                      n = min(n_first - n_warp + n2 % NP, N - 1), ld = n2 < NP ? q.ld_B : q.ld_C;
            const T *from = row_of((n2 < NP ? p.B_ssm : p.C_ssm) + n, row0, ld);
#pragma unroll
            for (int j = 0; j < MINE; j++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    to.bc[j][m][k] = *row_of(
                        from, min(tile * SCAN_SAVE + 4 * (warp + j * WARPS) + k, L - 1), ld);
        }
    };
    auto fetch_rows = [&](int tile, Fetched &to) {
        if (COPIES) {
            copies_done();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < MINE; j++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        to.rows[i][j][k] = ((Packed *)rows_place(i))[(4 * j + k) * 32 + lane];
            __syncwarp();
            return;
        }
        const int t_tile = tile * SCAN_SAVE, lds[4] = {q.ld_delta, q.ld_u, q.ld_z, q.ld_d_g};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const T *from = device_memory(in_rows[i]);
#pragma unroll
            for (int j = 0; j < MINE; j++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    to.rows[i][j][k] = *(const Packed *)row_of(
                        from, min(t_tile + 4 * (warp + j * WARPS) + k, L - 1), lds[i]);
        }
        const float *h = p.h_starts + ((size_t)b * q.tiles + tile) * N * E;
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            Row<C> x = *(const Row<C> *)(h + (size_t)min(n_first + i, N - 1) * E + e);
#pragma unroll
            for (int c = 0; c < C; c++) x.v[c] = live ? x.v[c] : 0.f;
            saved[i * 32 + lane] = x;
        }
        // The tile before, into L2: its states, and its rows, a tensor a warp.
        if (tile == first) return;
        if (lane < STATES * C)
            prefetch_L2(h - (size_t)N * E + (size_t)min(n_first + lane / C, N - 1) * E +
                        min(group * ROW + lane % C * 32, E - 1));
        if (warp >= 4) return;
        const T *from = warp == 0 ? p.delta_raw : warp == 1 ? p.u : warp == 2 ? p.z : p.d_g;
        const int ld = warp == 0 ? q.ld_delta : warp == 1 ? q.ld_u : warp == 2 ? q.ld_z : q.ld_d_g;
#pragma unroll
        for (int i = 0; i < SCAN_SAVE; i += 32)
            if (lane < SCAN_SAVE)
                prefetch_L2(row_of(from + group * ROW, row0 + t_tile - SCAN_SAVE + i + lane, ld));
    };
    const float never[2] = {-INFINITY, -INFINITY}, zero[2] = {};
    auto prepare = [&](int tile, Fetched &x) {
#pragma unroll
        for (int j = 0; j < MINE; j++) {
            const int Q = warp + j * WARPS, left = L - tile * SCAN_SAVE - 4 * Q;
            if (QUADS % WARPS && Q >= QUADS) break;
#pragma unroll
            for (int k = 0; k < 4; k++) // past the end of time delta and d_y are 0
                if (k >= left) x.rows[0][j][k].set(never), x.rows[3][j][k].set(zero);
#pragma unroll
            for (int c = 0; c < C; c++) {
                float delta[4], du[4], dy[4], slope[4], dg[4];
                Quad<T> u_quad;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float ut = x.rows[1][j][k].get(c), zt = x.rows[2][j][k].get(c),
                                s = rcp_fast(1.f + exp2_fast(-LOG2E * zt)),
                                dg_s = x.rows[3][j][k].get(c) * s;
                    delta[k] = softplus<T>(x.rows[0][j][k].get(c) + bias[c], slope[k]);
                    du[k] = delta[k] * ut, dy[k] = dg_s * zt;
                    dg[k] = fmaf(dy[k], 1.f - s, dg_s); // d_g silu'(z)
                    u_quad.v[k] = to<T>(ut);
                }
                const int at = (Q * C + c) * 32 + lane;
                deltas[at] = make_float4(delta[0], delta[1], delta[2], delta[3]);
                dus[at] = make_float4(du[0], du[1], du[2], du[3]);
                dys[at] = make_float4(dy[0], dy[1], dy[2], dy[3]);
                slopes[at] = make_float4(slope[0], slope[1], slope[2], slope[3]);
                dgs[at] = make_float4(dg[0], dg[1], dg[2], dg[3]);
                us[at] = u_quad;
            }
#pragma unroll
            for (int m = 0; m < BC; m++) {
                const int n2 = lane + 32 * m;
                const bool in = n_first - n_warp + n2 % NP < N;
                float v[4];
#pragma unroll
                for (int k = 0; k < 4; k++) v[k] = in ? value(x.bc[j][m][k]) : 0.f;
                if (n2 < 2 * NP) bc[Q * 2 * NP + n2] = make_float4(v[1], v[0], v[3], v[2]);
            }
        }
    };
    auto load = [&](float(&to)[K][C], const float4 *from, int piece) {
#pragma unroll
        for (int c = 0; c < C; c++)
#pragma unroll
            for (int k = 0; k < K; k += 4) {
                float v[4];
                unpack(v, from[((piece * K + k) / 4 * C + c) * 32 + lane]);
#pragma unroll
                for (int j = 0; j < 4; j++) to[k + j][c] = v[j];
            }
    };
    // B and C of steps 0, 1 and of 2, 3 change places in a quad, so that a step's B and C come into
    // odd registers where its delta u, d_y and sums are in even ones, and the other way round.
    auto load_BC = [&](float(&to)[K], int piece, int n2) {
#pragma unroll
        for (int k = 0; k < K; k += 4) {
            const float4 v = bc[(piece * K + k) / 4 * 2 * NP + n2];
            to[k] = v.y, to[k + 1] = v.x, to[k + 2] = v.w, to[k + 3] = v.z;
        }
    };

    // 3. All states of a warp over the 8 steps of a piece.
    auto walk = [&](int tile, unsigned piece) {
        float delta[K][C], du[K][C], dy[K][C], y[K][C], sum_A[K][C], sum_B[K][C];
        load(delta, deltas, piece), load(du, dus, piece), load(dy, dys, piece);
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int c = 0; c < C; c++) y[k][c] = sum_A[k][c] = sum_B[k][c] = 0.f;
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            constexpr bool EXACT = sizeof(T) == 4;
            const int n = n_warp + i;
            float decay[K][C], h[K + 1][C], Bv[K], Cv[K], v[4], d_BC[4] = {};
            load_BC(Bv, piece, n), load_BC(Cv, piece, NP + n);
            const Row<C> start = starts[(piece * NP + n) * 32 + lane];
#pragma unroll
            for (int c = 0; c < C; c++) h[0][c] = start.v[c];
#pragma unroll
            for (int k = 0; k < K; k++) {
#pragma unroll
                for (int c = 0; c < C; c++) {
                    decay[k][c] = exp2_fast(delta[k][c] * A[i][c]);
                    h[k + 1][c] = h[k][c];
                    step_state(h[k + 1][c], y[k][c], decay[k][c], du[k][c] * Bv[k], Cv[k]);
                    v[k % 4] = c ? fmaf(dy[k][c], h[k + 1][c], v[k % 4]) : dy[k][c] * h[k + 1][c];
                }
                if (k % 4 == 3) add_groups<EXACT>(d_BC, k / 4, v, ones);
            }
#pragma unroll
            for (int k = K - 1; k >= 0; k--) {
#pragma unroll
                for (int c = 0; c < C; c++) {
                    float &g = d_h[i][c];
                    g = fmaf(dy[k][c], Cv[k], g);
                    sum_B[k][c] = fmaf(g, Bv[k], sum_B[k][c]);
                    v[3 - k % 4] = c ? fmaf(g, du[k][c], v[3 - k % 4]) : g * du[k][c];
                    g *= decay[k][c];
                    const float d_log = g * h[k][c]; // gradient of delta A_neg
                    sum_A[k][c] = fmaf(d_log, A[i][c], sum_A[k][c]);
                    d_A[i][c] = fmaf(d_log, delta[k][c], d_A[i][c]);
                }
                if (k % 4 == 0) add_groups<EXACT>(d_BC, k ? 2 : 3, v, ones);
            }
            my_sums[i * SCRATCH] = make_float4(d_BC[0], d_BC[1], d_BC[2], d_BC[3]);
        }
        // The sums over channels: 8 groups. A lane adds up 2 of the 16 values of a state. They pass
        // through the place of this warp's sums of quads 0 and 1, which are stored last.
        __syncwarp();
        const float *from = (float *)(my_sums - lane) + lane / 8 * 4 * SCRATCH + lane % 8 * 2;
        float2 d_BC = *(const float2 *)from;
#pragma unroll
        for (int g = 1; g < 8; g++) {
            const float2 x = *(const float2 *)(from + 16 * g);
            d_BC.x += x.x, d_BC.y += x.y;
        }
        if (lane / 8 < STATES && n_first + lane / 8 < N)
            __stcg((float2 *)row_of(parts, tile * PIECES + piece, N * 64), d_BC);
        __syncwarp();
        float4 *to = my_sums + piece % 2 * 2 * 3 * ROW;
#pragma unroll
        for (int k = 0; k < K; k += 4, to += 3 * ROW)
#pragma unroll
            for (int c = 0; c < C; c++) {
                auto four = [&](const float(&x)[K][C]) {
                    return make_float4(x[k][c], x[k + 1][c], x[k + 2][c], x[k + 3][c]);
                };
                to[c * 32] = four(sum_A), to[ROW + c * 32] = four(sum_B),
                       to[2 * ROW + c * 32] = four(y);
            }
    };

    // 4. The gradients of 4 steps, of one of the 4 quads from Q on, from the sums over states of
    // all warps.
    auto finish = [&](int tile, int Q) {
        const int mine = (warp - Q) & (WARPS - 1);
        if (WARPS > 4 && mine >= 4) return;
        Q += mine;
        const int t0 = tile * SCAN_SAVE + 4 * Q;
        float out[3][4][C];
#pragma unroll
        for (int c = 0; c < C; c++) {
            const float4 *from = sums + (Q % 4 * 3 * C + c) * 32 + lane;
            float sum[3][4], delta[4], dy[4], slope[4], dg[4]; // sum: of d_log A_neg, d_h B, C h
#pragma unroll
            for (int w = 0; w < WARPS; w++)
#pragma unroll
                for (int i = 0; i < 3; i++) {
                    float x[4];
                    unpack(x, from[(w * 4 * 3 + i) * ROW]);
#pragma unroll
                    for (int k = 0; k < 4; k++) sum[i][k] = w ? sum[i][k] + x[k] : x[k];
                }
            if (SLABS) { // with those of the launches before
                const size_t plane = (size_t)p.B * L * E;
                float *slab = words + q.slabs + (size_t)(row0 + t0) * E + e;
#pragma unroll
                for (int i = 0; i < 3; i++)
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        if (!live || t0 + k >= L) continue;
                        float *at = slab + i * plane + (size_t)k * E;
                        if (q.n0) sum[i][k] += *at;
                        if (q.n0 + NP < N) *at = sum[i][k];
                    }
                if (q.n0 + NP < N) return;
            }
            const int at = (Q * C + c) * 32 + lane;
            unpack(delta, deltas[at]), unpack(dy, dys[at]);
            unpack(slope, slopes[at]), unpack(dg, dgs[at]);
            const Quad<T> u = us[at];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float ut = value(u.v[k]),
                            d_raw = fmaf(LN2, sum[0][k], ut * sum[1][k]) * slope[k];
                out[0][k][c] = d_raw;
                out[1][k][c] = fmaf(delta[k], sum[1][k], skip[c] * dy[k]);
                out[2][k][c] = fmaf(skip[c], ut, sum[2][k]) * dg[k];
                d_bias[c] += d_raw;
                d_skip[c] = fmaf(dy[k], ut, d_skip[c]);
            }
        }
        T *d_delta_raw = device_memory(out_rows[0]), *d_u = device_memory(out_rows[1]),
          *d_z = device_memory(out_rows[2]);
        auto store = [&](int k) {
            Packed x[3];
#pragma unroll
            for (int i = 0; i < 3; i++) x[i].set(out[i][k]);
            *(Packed *)row_of(d_delta_raw, t0 + k, q.ld_d_delta) = x[0];
            *(Packed *)row_of(d_u, t0 + k, q.ld_d_u) = x[1];
            *(Packed *)row_of(d_z, t0 + k, q.ld_d_z) = x[2];
        };
        if (!live) return;
        if (t0 + 4 <= L)
#pragma unroll
            for (int k = 0; k < 4; k++) store(k);
        else
#pragma unroll
            for (int k = 0; k < 3; k++)
                if (t0 + k < L) store(k);
    };

    {
        Fetched x;
        if (COPIES) copy(last);
        fetch_BC(last, x), fetch_rows(last, x), prepare(last, x);
    }
    __syncthreads();
    for (int tile = last; tile >= first; tile--) {
        // 2. The states at the starts of the pieces.
        Row<C> h[STATES];
#pragma unroll
        for (int i = 0; i < STATES; i++)
            starts[(n_warp + i) * 32 + lane] = h[i] = saved[i * 32 + lane];
#pragma unroll 1
        for (int piece = 0; piece < PIECES - 1; piece++) {
            float delta[K][C], du[K][C];
            load(delta, deltas, piece), load(du, dus, piece);
#pragma unroll
            for (int i = 0; i < STATES; i++) {
                float Bv[K];
                load_BC(Bv, piece, n_warp + i);
#pragma unroll
                for (int c = 0; c < C; c++)
#pragma unroll
                    for (int k = 0; k < K; k++)
                        h[i].v[c] =
                            fmaf(exp2_fast(delta[k][c] * A[i][c]), h[i].v[c], du[k][c] * Bv[k]);
                starts[((piece + 1) * NP + n_warp + i) * 32 + lane] = h[i];
            }
        }
#pragma unroll 1
        for (int piece = PIECES - 1; piece >= 0; piece--) {
            walk(tile, piece);
            if (piece % 2 || piece == 0) continue;
            __syncthreads();
            finish(tile, 2 * piece);
            __syncwarp();
            if (COPIES && tile > first) copy(tile - 1);
            __syncthreads();
        }
        __syncthreads();
        Fetched x;
        if (COPIES && tile > first) fetch_BC(tile - 1, x);
        finish(tile, 0);
        if (tile > first) {
            if (!COPIES) fetch_BC(tile - 1, x);
            fetch_rows(tile - 1, x), prepare(tile - 1, x);
        }
        __syncthreads();
    }

    float *out = words + q.partial2 + ((size_t)b * q.segments + segment) * (N + 2) * E + e;
    float *skips = (float *)sums; // [2][WARPS][C][32]
#pragma unroll
    for (int c = 0; c < C; c++) {
        skips[(warp * C + c) * 32 + lane] = d_skip[c];
        skips[((WARPS + warp) * C + c) * 32 + lane] = d_bias[c];
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            const int n = n_first + i;
            if (n >= N || !live) break;
            out[(size_t)n * E + c] = d_A[i][c];
            if (p.d_h0 && segment == 0) p.d_h0[((size_t)b * N + n) * E + e + c] = d_h[i][c];
        }
    }
    __syncthreads();
    if (warp < 2 && live)
#pragma unroll
        for (int c = 0; c < C; c++) {
            float s = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) s += skips[((warp * WARPS + w) * C + c) * 32 + lane];
            out[(size_t)(N + warp) * E + c] = s;
        }
}

// d_h at the start of each part of all segments but the first, from d_h = 0 behind it, and its sum
// of delta. A lane is a channel, a tile 32 steps; while the warps walk one, the next is prepared.
template <typename T, int STATES>
__global__ void __launch_bounds__(128, 6) scan_back_ends(ScanBackArgs<T> p, ScanBackPlan q) {
    constexpr int WARPS = 4, NP = WARPS * STATES, STEPS = 8 * WARPS, QUADS = 2 * WARPS;
    static_assert(2 * NP <= 32 && SCAN_SAVE % 4 == 0, "shape of a block");
    __shared__ float4 deltas[2][QUADS][32], dys[2][QUADS][32], Cs[2][QUADS][NP];
    __shared__ float total[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, L = p.L, E = p.E, N = p.N;
    const int groups = (E + 31) / 32, group = blockIdx.x % groups, b = blockIdx.x / groups % p.B,
              part = blockIdx.x / (groups * p.B) + q.parts, row0 = b * L;
    const int e_true = group * 32 + lane, e = min(e_true, E - 1), n0 = q.n0 + blockIdx.y * NP,
              n_first = n0 + warp * STATES;
    const bool live = e_true < E;
    const int segment_first = part / q.parts * q.segment_tiles,
              before = part % q.parts * q.part_tiles,
              t_first = (segment_first + before) * SCAN_SAVE,
              t_end =
                  min((segment_first + min(before + q.part_tiles, q.segment_tiles)) * SCAN_SAVE, L),
              tiles = (t_end - t_first + STEPS - 1) / STEPS;
    float *words = (float *)p.workspace;
    const float bias = p.dt_bias[e];
    // NP lanes load C_ssm for quad `warp` of a tile, the next NP for the other quad.
    const int C_quad = warp + lane / NP * WARPS, n_mine = min(n0 + lane % NP, N - 1);
    const T *delta_raw = row_of(p.delta_raw + e, row0, q.ld_delta),
            *z = row_of(p.z + e, row0, q.ld_z), *d_g = row_of(p.d_g + e, row0, q.ld_d_g),
            *C_ssm = row_of(p.C_ssm + n_mine, row0, q.ld_C);
    float A[STATES], d_h[STATES], sum = 0.f;
#pragma unroll
    for (int i = 0; i < STATES; i++) {
        const int n = n_first + i;
        A[i] = n < N ? LOG2E * p.A_neg[(size_t)n * E + e] : 0.f, d_h[i] = 0.f;
    }
    auto prepare = [&](int tile) {
        const int t_tile = t_first + tile * STEPS;
        T raw_[2][4], z_[2][4], g_[2][4], C_[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int t = min(t_tile + 4 * (warp + j * WARPS) + k, L - 1);
                raw_[j][k] = *row_of(delta_raw, t, q.ld_delta);
                z_[j][k] = *row_of(z, t, q.ld_z), g_[j][k] = *row_of(d_g, t, q.ld_d_g);
            }
            C_[k] = *row_of(C_ssm, min(t_tile + 4 * C_quad + k, L - 1), q.ld_C);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int Q = warp + j * WARPS, left = t_end - t_tile - 4 * Q;
            float delta[4], dy[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float zt = value(z_[j][k]), s = rcp_fast(1.f + exp2_fast(-LOG2E * zt));
                delta[k] = softplus<T>(value(raw_[j][k]) + (k < left ? bias : -INFINITY));
                dy[k] = k < left ? value(g_[j][k]) * s * zt : 0.f;
                sum += delta[k];
            }
            deltas[tile & 1][Q][lane] = make_float4(delta[0], delta[1], delta[2], delta[3]);
            dys[tile & 1][Q][lane] = make_float4(dy[0], dy[1], dy[2], dy[3]);
        }
        if (lane < 2 * NP)
            Cs[tile & 1][C_quad][lane % NP] =
                make_float4(value(C_[1]), value(C_[0]), value(C_[3]), value(C_[2]));
    };
    prepare(tiles - 1);
    __syncthreads();
    for (int tile = tiles - 1; tile >= 0; tile--) {
        if (tile) prepare(tile - 1);
        const float4 *delta_at = &deltas[tile & 1][0][lane], *dy_at = &dys[tile & 1][0][lane],
                     *C_at = &Cs[tile & 1][0][warp * STATES];
#pragma unroll 4
        for (int Q = QUADS - 1; Q >= 0; Q--) {
            float delta[4], dy[4];
            unpack(delta, delta_at[Q * 32]), unpack(dy, dy_at[Q * 32]);
#pragma unroll
            for (int i = 0; i < STATES; i++) {
                float Cv[4];
                unpack(Cv, C_at[Q * NP + i]);
#pragma unroll
                for (int k = 3; k >= 0; k--)
                    d_h[i] = fmaf(dy[k], Cv[k ^ 1], d_h[i]) * exp2_fast(delta[k] * A[i]);
            }
        }
        __syncthreads();
    }
    total[warp][lane] = sum;
    __syncthreads();
    if (!live) return;
    const size_t sb = (size_t)part * p.B + b;
#pragma unroll
    for (int i = 0; i < STATES; i++)
        if (n_first + i < N) words[q.ends + (sb * N + n_first + i) * E + e] = d_h[i];
    if (warp) return;
    float s = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) s += total[w][lane];
    words[q.sums + sb * E + e] = s;
}

// d_B_ssm and d_C_ssm: the channel blocks' parts in order. A thread does 4 of the 16 values of a
// piece and state.
template <typename T>
__global__ void scan_back_sum_BC(ScanBackArgs<T> p, const float *partial, int blocks, int pieces) {
    const size_t count = (size_t)p.B * pieces * p.N * 4,
                 i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int v = i % 4 * 4, n = i / 4 % p.N;
    const size_t bp = i / 4 / p.N;
    float s[4] = {};
#pragma unroll 8
    for (int j = 0; j < blocks; j++) {
        float x[4];
        unpack(x, __ldcs((const float4 *)partial + j * count + i));
#pragma unroll
        for (int k = 0; k < 4; k++) s[k] += x[k];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) { // d_C_ssm upwards, d_B_ssm downwards
        const int t = (int)(bp % pieces) * BACK_STEPS + (v < 8 ? v + k : 15 - v - k);
        const size_t r = bp / pieces * p.L + t;
        if (t >= p.L) continue;
        if (v < 8) p.d_C_ssm[r * p.ld_d_C + n] = to<T>(s[k]);
        else p.d_B_ssm[r * p.ld_d_B + n] = to<T>(s[k]);
    }
}

// d_A_log, d_D_skip, d_dt_bias += sums over sequences and segments: 32 channels and 8 strands of a
// fixed order a block.
template <typename T>
__global__ void scan_back_sum_A(ScanBackArgs<T> p, const float *partial2, int parts) {
    __shared__ float strands[8][32];
    int e = blockIdx.x * 32 + threadIdx.x, n = blockIdx.y, rows = p.N + 2;
    float s = 0.f;
    if (e < p.E)
#pragma unroll 4
        for (int i = threadIdx.y; i < parts; i += 8)
            s += partial2[((size_t)i * rows + n) * p.E + e];
    strands[threadIdx.y][threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.y || e >= p.E) return;
    for (int i = 1; i < 8; i++) s += strands[i][threadIdx.x];
    if (n < p.N) p.d_A_log[(size_t)e * p.N + n] += s * p.A_neg[(size_t)n * p.E + e];
    else if (n == p.N) p.d_D_skip[e] += s;
    else p.d_dt_bias[e] += s;
}

enum { BACK_PARTS = 2 }; // of a segment, in scan_back_ends: so it fills a GPU more evenly
// C: channels a lane; segments: so many at the most.
static ScanBackPlan scan_back_plan(int B, int L, int E, int N, int C, int segments) {
    ScanBackPlan q = {};
    q.blocks = (E + 32 * C - 1) / (32 * C), q.tiles = (L + SCAN_SAVE - 1) / SCAN_SAVE;
    segments = std::max(1, std::min(segments, q.tiles));
    q.segment_tiles = (q.tiles + segments - 1) / segments;
    q.segments = (q.tiles + q.segment_tiles - 1) / q.segment_tiles;
    q.part_tiles = (q.segment_tiles + BACK_PARTS - 1) / BACK_PARTS;
    q.parts = (q.segment_tiles + q.part_tiles - 1) / q.part_tiles;
    const int of_last = q.tiles - (q.segments - 1) * q.segment_tiles;
    q.ends_count = (q.segments - 1) * q.parts + (of_last + q.part_tiles - 1) / q.part_tiles;
    const size_t sb = (size_t)q.segments * B;
    q.sums = q.ends + BACK_PARTS * sb * N * E, q.slabs = q.sums + BACK_PARTS * sb * E;
    q.partial2 = q.slabs + (N > 32 ? 3 * (size_t)B * L * E : 0);
    q.partial = q.partial2 + sb * (N + 2) * E;
    q.partial = (q.partial + 31) / 32 * 32;
    q.bytes = 4 * (q.partial + (size_t)q.blocks * B * q.tiles * SCAN_SAVE * 2 * N);
    return q;
}

// Segments for so many channel blocks of all sequences, where `places` run at once: one where they
// fill half of the GPU, else as many as fit. Not more than BACK_BLOCKS blocks, for which there is
// room in the workspace.
enum { BACK_BLOCKS = 1024 };
static int scan_back_segments(size_t blocks, size_t places) {
    return (int)std::max((size_t)1, std::min(places, (size_t)BACK_BLOCKS) / blocks);
}
// The workspace is aligned to 16 bytes, needs no initial value and may be used for something else
// between calls.
static size_t scan_backward_workspace(int B, int L, int E, int N) {
    const size_t blocks = (size_t)B * ((E + 63) / 64);
    return scan_back_plan(B, L, E, N, 1, scan_back_segments(blocks, BACK_BLOCKS)).bytes;
}

template <typename T, int WARPS, int STATES, int C, bool SLABS, int MIN_BLOCKS>
static cudaError_t scan_back_launch(Device *d, const ScanBackArgs<T> &p, int segments) {
    constexpr int size = sizeof(T), threads = 32 * WARPS;
    constexpr size_t shared = scan_back_shared<T, WARPS, STATES, C>();
    ScanBackPlan q = scan_back_plan(p.B, p.L, p.E, p.N, C, segments);
    auto kernel = scan_back<T, WARPS, STATES, C, SLABS, MIN_BLOCKS>;
    const float *words = (const float *)p.workspace;
    const int pieces = q.tiles * SCAN_SAVE / BACK_STEPS;
    q.ld_delta = p.ld_delta * size, q.ld_u = p.ld_u * size, q.ld_z = p.ld_z * size;
    q.ld_d_g = p.ld_d_g * size, q.ld_B = p.ld_B * size, q.ld_C = p.ld_C * size;
    q.ld_d_delta = p.ld_d_delta * size, q.ld_d_u = p.ld_d_u * size, q.ld_d_z = p.ld_d_z * size;
    cudaError_t error = allow_shared(kernel, shared);
    if (error != cudaSuccess) return error;
    for (q.n0 = 0; q.n0 < p.N; q.n0 += WARPS * STATES) {
        if (q.segments > 1)
            scan_back_ends<T, STATES>
                <<<dim3((q.ends_count - q.parts) * blocks_for(p.E, 32) * p.B, WARPS / 4), 128, 0,
                   d->stream>>>(p, q);
        kernel<<<q.segments * q.blocks * p.B, threads, shared, d->stream>>>(p, q);
    }
    scan_back_sum_BC<<<blocks_for((size_t)p.B * pieces * p.N * 4, 256), 256, 0, d->stream>>>(
        p, words + q.partial, q.blocks, pieces);
    scan_back_sum_A<<<dim3(blocks_for(p.E, 32), p.N + 2), dim3(32, 8), 0, d->stream>>>(
        p, words + q.partial2, p.B * q.segments);
    return cudaGetLastError();
}

// Which form runs. Blocks that run at the same time are a wave. For the same time of text, a wave
// of 3 blocks of one channel a lane on each multiprocessor costs 10, one of 2 blocks of two
// channels 12.2: the form whose waves cost less is taken. Where shared memory is short, blocks of 4
// warps and one channel run on any GPU.
template <typename T> static cudaError_t scan_backward(Device *d, const ScanBackArgs<T> &p) {
    const size_t blocks = (size_t)p.B * ((p.E + 31) / 32), pairs = (size_t)p.B * ((p.E + 63) / 64);
    auto segments = [&](size_t n, size_t fit) { // of n blocks, fit on a multiprocessor
        return scan_back_segments(n, fit * d->processors);
    };
    auto cost = [&](size_t n, size_t fit, double wave) {
        const size_t s = segments(n, fit), places = fit * d->processors;
        return wave * (double)((n * s + places - 1) / places) / (double)s;
    };
    if (p.N <= 8) return scan_back_launch<T, 4, 2, 1, false, 4>(d, p, segments(blocks, 4));
    if (p.N > 16) {
        if (p.N > 32) {
            if (scan_back_shared<T, 16, 4, 1>() <= (size_t)d->shared_limit)
                return scan_back_launch<T, 16, 4, 1, true, 1>(d, p, segments(blocks, 1));
            return scan_back_launch<T, 8, 4, 1, true, 2>(d, p, segments(blocks, 2));
        }
        return scan_back_launch<T, 8, 4, 1, false, 2>(d, p, segments(blocks, 2));
    }
    if constexpr (sizeof(T) == 2) { // 8 elements are 16 bytes
        const uintptr_t in = (uintptr_t)p.delta_raw | (uintptr_t)p.u | (uintptr_t)p.z |
                             (uintptr_t)p.d_g | (uintptr_t)p.h_starts,
                        out = (uintptr_t)p.d_delta_raw | (uintptr_t)p.d_u | (uintptr_t)p.d_z;
        const size_t in_rows = p.ld_delta | p.ld_u | p.ld_z | p.ld_d_g | (size_t)p.E,
                     out_rows = p.ld_d_delta | p.ld_d_u | p.ld_d_z;
        if (in % 16 == 0 && in_rows % 8 == 0 && out % 4 == 0 && out_rows % 2 == 0 &&
            cost(pairs, 2, 12.2) <= cost(blocks, 3, 10) &&
            scan_back_shared<T, 4, 4, 2>() <= (size_t)d->shared_limit)
            return scan_back_launch<T, 4, 4, 2, false, 2>(d, p, segments(pairs, 2));
    }
    return scan_back_launch<T, 4, 4, 1, false, 3>(d, p, segments(blocks, 3));
}
