// scan_relay.cuh - the scan of many channels with 8 or 16 states. Included by mamba_cuda.cu, which
// has the drawing.
//
// A block is 32 C channels of a sequence. Its 4 warps take turns of 8 steps in time, and a warp
// does all states of its steps. So delta, delta*u and y are registers of one thread: nothing is
// prepared twice, y has no parts to add, and each warp stages B_ssm and C_ssm for itself alone.
// About 145 instructions a token and channel instead of the walk's 160 (477 us instead of 500).
// With two channels a lane, which share the loads of B_ssm and C_ssm and the addresses, 130 (437
// us).
//
// The state goes from warp to warp through shared memory, a quarter of the states at a time, as
// soon as the quarter is done: all four warps work at a time. Sixteen named barriers, of each warp
// and quarter, do that (exchange.cuh, 1); nothing stops the block as a whole. Two limits follow. A
// multiprocessor has 64 such barriers, so at most four blocks run on it. And the way of a quarter
// around the ring, the time it takes in every warp, must be shorter than a turn of a warp with its
// softplus and gate, or all wait: six and eight warps were slower.

// C neighbouring channels of a row: one load, one store.
template <typename T, int C> struct Pack {
    T v;
    __device__ __forceinline__ void zero() { v = to<T>(0.f); }
    __device__ __forceinline__ float get(int) const { return value(v); }
    __device__ __forceinline__ void set(const float *x) { v = to<T>(x[0]); }
};
template <> struct Pack<bf16, 2> {
    uint32_t v;
    __device__ __forceinline__ void zero() { v = 0; }
    __device__ __forceinline__ float get(int c) const { return c ? high_half(v) : low_half(v); }
    __device__ __forceinline__ void set(const float *x) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(x[1]), "f"(x[0]));
    }
};

template <> struct Pack<f16, 2> {
    uint32_t v;
    __device__ __forceinline__ void zero() { v = 0; }
    __device__ __forceinline__ float get(int c) const {
        return c ? high_of<f16>(v) : low_of<f16>(v);
    }
    __device__ __forceinline__ void set(const float *x) { v = pack_of<f16>(x[0], x[1]); }
};

// STATES: of a quarter. UNROLL: of the loop over quarters.
template <typename T, int STATES, int C, int UNROLL, int MIN_BLOCKS>
__global__ void __launch_bounds__(128, MIN_BLOCKS) scan_relay(ScanArgs<T> p) {
    constexpr int WARPS = 4, QUARTERS = 4, STEPS = 8, N = STATES * QUARTERS, PITCH = STEPS + 4,
                  WIDTH = STATES * C < 4 ? STATES * C : 4, GROUPS = STATES * C / WIDTH;
    constexpr int UNITS = N / 4;
    typedef Pack<T, C> Packed;
    extern __shared__ float4 shared[];
    Row<WIDTH> *handed = (Row<WIDTH> *)shared; // [WARPS][QUARTERS][GROUPS][32] h handed on
    Row<WIDTH> *As = handed + WARPS * QUARTERS * GROUPS * 32; // [QUARTERS][GROUPS][32] A_neg
    float *bc = (float *)(As + QUARTERS * GROUPS * 32); // [WARPS][2N][PITCH] B_ssm, then C_ssm
    wait_for_input();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5,
              groups = (p.E + 32 * C - 1) / (32 * C), L = p.L, E = p.E;
    const int b = blockIdx.x / groups, e_true = (blockIdx.x % groups * 32 + lane) * C,
              tiles = (L + WARPS * STEPS - 1) / (WARPS * STEPS);
    const bool live = e_true < E;
    const int e = live ? e_true : E - C; // C divides E
    const size_t row = (size_t)b * L + warp * STEPS;
    const T *delta_at = p.delta_raw + row * p.ld_delta + e, *u_at = p.u + row * p.ld_u + e,
            *z_at = p.z + row * p.ld_z + e;
    T *out = p.out + row * p.ld_out + e;
    // A warp loads units of 4 steps x 8 states of B_ssm and C_ssm. Unit k begins 4 (k % 2) steps
    // and 8 (k / 2) states after the first.
    const int bc_n = lane % 8, bc_t = lane / 8;
    const T *B_at = p.B_ssm + (row + bc_t) * p.ld_B + bc_n,
            *C_at = p.C_ssm + (row + bc_t) * p.ld_C + bc_n;
    bc += warp * 2 * N * PITCH;
    float *bc_to = bc + bc_n * PITCH + bc_t;
    float bias[C], skip[C];
#pragma unroll
    for (int c = 0; c < C; c++) bias[c] = p.dt_bias[e + c], skip[c] = p.D_skip[e + c];
    // A quarter is STATES * C floats: number f is state f / C of channel f % C. They are accessed
    // as GROUPS rows of WIDTH. Warp w fetches A_neg of quarter w.
#pragma unroll
    for (int m = 0; m < GROUPS; m++) {
        Row<WIDTH> a;
#pragma unroll
        for (int v = 0; v < WIDTH; v++)
            a.v[v] = LOG2E * p.A_neg[(size_t)(warp * STATES + (m * WIDTH + v) / C) * E + e +
                                     (m * WIDTH + v) % C];
        As[(warp * GROUPS + m) * 32 + lane] = a;
    }
    __syncthreads();
    Row<WIDTH> *h_in = handed + ((warp + WARPS - 1) % WARPS) * QUARTERS * GROUPS * 32 + lane,
               *h_out = handed + warp * QUARTERS * GROUPS * 32 + lane;
    const int id_in = (warp + WARPS - 1) % WARPS * QUARTERS, id_out = warp * QUARTERS;
    if (warp == WARPS - 1) // the first states come as from the last warp
        for (int q = 0; q < QUARTERS; q++) {
#pragma unroll
            for (int m = 0; m < GROUPS; m++) {
                Row<WIDTH> a;
#pragma unroll
                for (int v = 0; v < WIDTH; v++)
                    a.v[v] = p.h0 ? p.h0[((size_t)b * N + q * STATES + (m * WIDTH + v) / C) * E +
                                         e + (m * WIDTH + v) % C]
                                  : 0.f;
                h_out[(q * GROUPS + m) * 32] = a;
            }
            turn_done(id_out + q);
        }
    Packed raw_d[STEPS], raw_u[STEPS], raw_z[STEPS];
    T raw_B[UNITS], raw_C[UNITS];
    float delta[STEPS][C], delta_u[STEPS][C], y[STEPS][C];

    // Called for the turns of this warp in order: it advances its pointers.
    auto load_raw = [&](int t0) {
        if (t0 + STEPS <= L) {
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                raw_d[i] = *(const Packed *)row_at(delta_at, i, p.ld_delta),
                raw_u[i] = *(const Packed *)row_at(u_at, i, p.ld_u);
#pragma unroll
            for (int k = 0; k < UNITS; k++)
                raw_B[k] = row_at(B_at, k % 2 * 4, p.ld_B)[k / 2 * 8],
                raw_C[k] = row_at(C_at, k % 2 * 4, p.ld_C)[k / 2 * 8];
        } else {
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                raw_d[i].zero(), raw_u[i].zero();
                if (t0 + i < L)
                    raw_d[i] = *(const Packed *)row_at(delta_at, i, p.ld_delta),
                    raw_u[i] = *(const Packed *)row_at(u_at, i, p.ld_u);
            }
#pragma unroll
            for (int k = 0; k < UNITS; k++) {
                raw_B[k] = to<T>(0.f), raw_C[k] = to<T>(0.f);
                if (t0 + bc_t + k % 2 * 4 < L)
                    raw_B[k] = row_at(B_at, k % 2 * 4, p.ld_B)[k / 2 * 8],
                    raw_C[k] = row_at(C_at, k % 2 * 4, p.ld_C)[k / 2 * 8];
            }
        }
        delta_at = row_at(delta_at, WARPS * STEPS, p.ld_delta),
        u_at = row_at(u_at, WARPS * STEPS, p.ld_u);
        B_at = row_at(B_at, WARPS * STEPS, p.ld_B), C_at = row_at(C_at, WARPS * STEPS, p.ld_C);
    };
    auto load_z = [&](int t0) {
        if (t0 + STEPS <= L) {
#pragma unroll
            for (int i = 0; i < STEPS; i++) raw_z[i] = *(const Packed *)row_at(z_at, i, p.ld_z);
        } else {
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                raw_z[i].zero();
                if (t0 + i < L) raw_z[i] = *(const Packed *)row_at(z_at, i, p.ld_z);
            }
        }
        z_at = row_at(z_at, WARPS * STEPS, p.ld_z);
    };
    // Past the end of time delta is 0: decay 1, inject 0, the state stays.
    auto prepare = [&](int t0) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int c = 0; c < C; c++) delta[i][c] = softplus<T>(raw_d[i].get(c) + bias[c]);
        if (t0 + STEPS > L)
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int c = 0; c < C; c++) delta[i][c] = t0 + i < L ? delta[i][c] : 0.f;
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int c = 0; c < C; c++) {
                float u = raw_u[i].get(c);
                delta_u[i][c] = delta[i][c] * u, y[i][c] = skip[c] * u;
            }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            bc_to[k / 2 * 8 * PITCH + k % 2 * 4] = value(raw_B[k]);
            bc_to[(N + k / 2 * 8) * PITCH + k % 2 * 4] = value(raw_C[k]);
        }
        __syncwarp();
    };

    int t0 = warp * STEPS;
    load_raw(t0);
    prepare(t0);
    for (int tile = 0; tile < tiles; tile++, t0 += WARPS * STEPS) {
        load_z(t0); // for the end of this turn
        load_raw(t0 + WARPS * STEPS);
        const bool save = p.h_starts && t0 % SCAN_SAVE == 0 && t0 < L && live;
#pragma unroll UNROLL
        for (int q = 0; q < QUARTERS; q++) {
            float A[STATES * C], h[STATES * C];
#pragma unroll
            for (int m = 0; m < GROUPS; m++) {
                Row<WIDTH> a = As[(q * GROUPS + m) * 32 + lane];
#pragma unroll
                for (int v = 0; v < WIDTH; v++) A[m * WIDTH + v] = a.v[v];
            }
            turn_wait(id_in + q);
#pragma unroll
            for (int m = 0; m < GROUPS; m++) {
                Row<WIDTH> a = h_in[(q * GROUPS + m) * 32];
#pragma unroll
                for (int v = 0; v < WIDTH; v++) h[m * WIDTH + v] = a.v[v];
            }
            if (save) {
                float *start =
                    p.h_starts +
                    (((size_t)b * ((L + SCAN_SAVE - 1) / SCAN_SAVE) + t0 / SCAN_SAVE) * N +
                     q * STATES) *
                        E +
                    e;
                for (int f = 0; f < STATES * C; f++) start[(size_t)(f / C) * E + f % C] = h[f];
            }
            const float *B_row = bc + q * STATES * PITCH, *C_row = B_row + N * PITCH;
#pragma unroll
            for (int j = 0; j < STATES; j++)
#pragma unroll
                for (int i = 0; i < STEPS; i += 4) {
                    float Bs[4], Cs[4];
                    unpack(Bs, load4(B_row + j * PITCH + i)),
                        unpack(Cs, load4(C_row + j * PITCH + i));
#pragma unroll
                    for (int k = 0; k < 4; k++)
#pragma unroll
                        for (int c = 0; c < C; c++) {
                            step_state(h[j * C + c], y[i + k][c],
                                       exp2_fast(delta[i + k][c] * A[j * C + c]),
                                       delta_u[i + k][c] * Bs[k], Cs[k]);
                        }
                }
#pragma unroll
            for (int m = 0; m < GROUPS; m++) {
                Row<WIDTH> a;
#pragma unroll
                for (int v = 0; v < WIDTH; v++) a.v[v] = h[m * WIDTH + v];
                h_out[(q * GROUPS + m) * 32] = a;
            }
            turn_done(id_out + q);
        }
#pragma unroll
        for (int f = 0; f < STEPS * C; f += 2)
            gate_pair(y[f / C][f % C], y[(f + 1) / C][(f + 1) % C], raw_z[f / C].get(f % C),
                      raw_z[(f + 1) / C].get((f + 1) % C));
        const int rows = live ? L - t0 : 0;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            Packed g;
            g.set(y[i]);
            if (i < rows) *(Packed *)row_at(out, i, p.ld_out) = g;
        }
        out = row_at(out, WARPS * STEPS, p.ld_out);
        prepare(t0 + WARPS * STEPS);
    }
    if (warp == 0) // the last states go as to the first warp
        for (int q = 0; q < QUARTERS; q++) {
            turn_wait(id_in + q);
#pragma unroll
            for (int m = 0; m < GROUPS; m++) {
                Row<WIDTH> a = h_in[(q * GROUPS + m) * 32];
                if (p.h_final && live)
#pragma unroll
                    for (int v = 0; v < WIDTH; v++)
                        p.h_final[((size_t)b * N + q * STATES + (m * WIDTH + v) / C) * E + e +
                                  (m * WIDTH + v) % C] = a.v[v];
            }
        }
}

template <typename T, int STATES, int C, int UNROLL, int MIN_BLOCKS>
cudaError_t scan_relay_launch(Device *d, const ScanArgs<T> &p) {
    constexpr int bytes = (20 * STATES * C * 32 + 32 * STATES * 12) * 4;
    return launch_dependent(d, scan_relay<T, STATES, C, UNROLL, MIN_BLOCKS>,
                            p.B * blocks_for(p.E, 32 * C), 128, bytes, p);
}
