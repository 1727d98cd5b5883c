// scan_relay.cuh - the scan of many channels with few states.
// Included by mamba_cuda.cu.

// ------------------------------------------------------------------------------------------------
// Many channels, few states: the relay. A block is 32 C channels of a sequence; its 4 warps take
// turns of 8 steps in time, and a warp does all states of its steps. delta, delta*u and y are then
// registers of one thread: nothing is prepared twice, y has no parts to add, and a warp stages
// B_ssm and C_ssm for itself alone. What goes from warp to warp is the state: each quarter of the
// states is handed on as soon as it is through, so all four warps work at a time. Sixteen named
// barriers (warp x quarter; one warp arrives, the next waits) do that, and nothing stops the block
// as a whole. A warp cannot overwrite states that the next one has not taken yet: it comes back to
// a quarter only after that went through all other warps. The limits: 64 barriers a multiprocessor,
// so at most four blocks; and four warps, since the way of a quarter around the ring (its own time
// in every warp) must be shorter than a warp's turn, softplus and gate included, or all wait; six
// and eight warps (with mbarriers) were slower.

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
    __device__ __forceinline__ float get(int c) const {
        return __uint_as_float(c ? v & 0xffff0000u : v << 16);
    }
    __device__ __forceinline__ void set(const float *x) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(x[1]), "f"(x[0]));
    }
};

template <typename T, int NS, int C, int UNROLL, int MIN_BLOCKS> // NS: a quarter of the states
__global__ void __launch_bounds__(128, MIN_BLOCKS) scan_relay(ScanArgs<T> p) {
    constexpr int W = 4, Q = 4, K = 8, N = NS * Q, PITCH = K + 4, V = NS * C < 4 ? NS * C : 4,
                  M = NS * C / V;
    constexpr int UNITS = N / 4;
    typedef Pack<T, C> P;
    extern __shared__ float4 shared[];
    Row<V> *hand = (Row<V> *)shared,
           *As = hand + W * Q * M * 32; // [W][Q][M][32] states handed on, [Q][M][32] A_neg
    float *bc =
        (float *)(As + Q * M * 32); // [W][2N][PITCH] B_ssm, then C_ssm, of each warp's steps
    wait_for_input();
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, groups = (p.E + 32 * C - 1) / (32 * C),
              L = p.L, E = p.E;
    const int b = blockIdx.x / groups, e_true = (blockIdx.x % groups * 32 + lane) * C,
              tiles = (L + W * K - 1) / (W * K);
    const bool live = e_true < E;
    const int e = live ? e_true : E - C; // C divides E
    const size_t row = (size_t)b * L + w * K;
    const T *d_at = p.delta_raw + row * p.ld_delta + e, *u_at = p.u + row * p.ld_u + e,
            *z_at = p.z + row * p.ld_z + e;
    T *out = p.out + row * p.ld_out + e;
    // Units of 4 steps x 8 states of B_ssm and C_ssm: unit k is 4 (k % 2) steps and 8 (k / 2)
    // states on.
    const int bc_n = lane % 8, bc_t = lane / 8;
    const T *B_at = p.B_ssm + (row + bc_t) * p.ld_B + bc_n,
            *C_at = p.C_ssm + (row + bc_t) * p.ld_C + bc_n;
    bc += w * 2 * N * PITCH;
    float *bc_to = bc + bc_n * PITCH + bc_t;
    float bias[C], skip[C];
#pragma unroll
    for (int c = 0; c < C; c++) bias[c] = p.dt_bias[e + c], skip[c] = p.D_skip[e + c];
    // Floats of a quarter: number m V + v is state (m V + v) / C of channel (m V + v) % C. A_neg of
    // quarter w comes from warp w.
#pragma unroll
    for (int m = 0; m < M; m++) {
        Row<V> a;
#pragma unroll
        for (int v = 0; v < V; v++)
            a.v[v] = LOG2E * p.A_neg[(size_t)(w * NS + (m * V + v) / C) * E + e + (m * V + v) % C];
        As[(w * M + m) * 32 + lane] = a;
    }
    __syncthreads();
    Row<V> *h_in = hand + ((w + W - 1) % W) * Q * M * 32 + lane,
           *h_out = hand + w * Q * M * 32 + lane;
    const int id_in = (w + W - 1) % W * Q, id_out = w * Q;
    if (w == W - 1) // the first states come as if from the last warp
        for (int q = 0; q < Q; q++) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a;
#pragma unroll
                for (int v = 0; v < V; v++)
                    a.v[v] = p.h0 ? p.h0[((size_t)b * N + q * NS + (m * V + v) / C) * E + e +
                                         (m * V + v) % C]
                                  : 0.f;
                h_out[(q * M + m) * 32] = a;
            }
            turn_done(id_out + q);
        }
    P raw_d[K], raw_u[K], raw_z[K];
    T raw_B[UNITS], raw_C[UNITS];
    float d[K][C], du[K][C], y[K][C];

    // Called for this warp's turns in order: pointers go on by themselves.
    auto load_raw = [&](int t0) {
        if (t0 + K <= L) {
#pragma unroll
            for (int i = 0; i < K; i++)
                raw_d[i] = *(const P *)row_at(d_at, i, p.ld_delta),
                raw_u[i] = *(const P *)row_at(u_at, i, p.ld_u);
#pragma unroll
            for (int k = 0; k < UNITS; k++)
                raw_B[k] = row_at(B_at, k % 2 * 4, p.ld_B)[k / 2 * 8],
                raw_C[k] = row_at(C_at, k % 2 * 4, p.ld_C)[k / 2 * 8];
        } else {
#pragma unroll
            for (int i = 0; i < K; i++) {
                raw_d[i].zero(), raw_u[i].zero();
                if (t0 + i < L)
                    raw_d[i] = *(const P *)row_at(d_at, i, p.ld_delta),
                    raw_u[i] = *(const P *)row_at(u_at, i, p.ld_u);
            }
#pragma unroll
            for (int k = 0; k < UNITS; k++) {
                raw_B[k] = raw_C[k] = to<T>(0.f);
                if (t0 + bc_t + k % 2 * 4 < L)
                    raw_B[k] = row_at(B_at, k % 2 * 4, p.ld_B)[k / 2 * 8],
                    raw_C[k] = row_at(C_at, k % 2 * 4, p.ld_C)[k / 2 * 8];
            }
        }
        d_at = row_at(d_at, W * K, p.ld_delta), u_at = row_at(u_at, W * K, p.ld_u);
        B_at = row_at(B_at, W * K, p.ld_B), C_at = row_at(C_at, W * K, p.ld_C);
    };
    auto load_z = [&](int t0) {
        if (t0 + K <= L) {
#pragma unroll
            for (int i = 0; i < K; i++) raw_z[i] = *(const P *)row_at(z_at, i, p.ld_z);
        } else {
#pragma unroll
            for (int i = 0; i < K; i++) {
                raw_z[i].zero();
                if (t0 + i < L) raw_z[i] = *(const P *)row_at(z_at, i, p.ld_z);
            }
        }
        z_at = row_at(z_at, W * K, p.ld_z);
    };
    // Past the end of time delta is 0: decay 1, inject 0, the state stays.
    auto prepare = [&](int t0) {
#pragma unroll
        for (int i = 0; i < K; i++)
#pragma unroll
            for (int c = 0; c < C; c++) d[i][c] = softplus<T>(raw_d[i].get(c) + bias[c]);
        if (t0 + K > L)
#pragma unroll
            for (int i = 0; i < K; i++)
#pragma unroll
                for (int c = 0; c < C; c++) d[i][c] = t0 + i < L ? d[i][c] : 0.f;
#pragma unroll
        for (int i = 0; i < K; i++)
#pragma unroll
            for (int c = 0; c < C; c++) {
                float u = raw_u[i].get(c);
                du[i][c] = d[i][c] * u, y[i][c] = skip[c] * u;
            }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < UNITS; k++) {
            bc_to[k / 2 * 8 * PITCH + k % 2 * 4] = value(raw_B[k]);
            bc_to[(N + k / 2 * 8) * PITCH + k % 2 * 4] = value(raw_C[k]);
        }
        __syncwarp();
    };

    int t0 = w * K;
    load_raw(t0);
    prepare(t0);
    for (int tile = 0; tile < tiles; tile++, t0 += W * K) {
        load_z(t0); // for the end of this turn
        load_raw(t0 + W * K);
        const bool save = p.h_starts && t0 % SCAN_SAVE == 0 && t0 < L && live;
#pragma unroll UNROLL
        for (int q = 0; q < Q; q++) {
            float A[NS * C], h[NS * C];
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a = As[(q * M + m) * 32 + lane];
#pragma unroll
                for (int v = 0; v < V; v++) A[m * V + v] = a.v[v];
            }
            turn_wait(id_in + q);
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a = h_in[(q * M + m) * 32];
#pragma unroll
                for (int v = 0; v < V; v++) h[m * V + v] = a.v[v];
            }
            if (save) {
                float *start =
                    p.h_starts +
                    (((size_t)b * ((L + SCAN_SAVE - 1) / SCAN_SAVE) + t0 / SCAN_SAVE) * N +
                     q * NS) *
                        E +
                    e;
                for (int f = 0; f < NS * C; f++) start[(size_t)(f / C) * E + f % C] = h[f];
            }
            const float *B_row = bc + q * NS * PITCH, *C_row = B_row + N * PITCH;
#pragma unroll
            for (int j = 0; j < NS; j++)
#pragma unroll
                for (int i = 0; i < K; i += 4) {
                    float Bs[4], Cs[4];
                    unpack(Bs, load4(B_row + j * PITCH + i)),
                        unpack(Cs, load4(C_row + j * PITCH + i));
#pragma unroll
                    for (int k = 0; k < 4; k++)
#pragma unroll
                        for (int c = 0; c < C; c++) {
                            step_state(h[j * C + c], y[i + k][c],
                                       exp2_fast(d[i + k][c] * A[j * C + c]), du[i + k][c] * Bs[k],
                                       Cs[k]);
                        }
                }
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a;
#pragma unroll
                for (int v = 0; v < V; v++) a.v[v] = h[m * V + v];
                h_out[(q * M + m) * 32] = a;
            }
            turn_done(id_out + q);
        }
#pragma unroll
        for (int f = 0; f < K * C; f += 2)
            gate_pair(y[f / C][f % C], y[(f + 1) / C][(f + 1) % C], raw_z[f / C].get(f % C),
                      raw_z[(f + 1) / C].get((f + 1) % C));
        const int rows = live ? L - t0 : 0;
#pragma unroll
        for (int i = 0; i < K; i++) {
            P g;
            g.set(y[i]);
            if (i < rows) *(P *)row_at(out, i, p.ld_out) = g;
        }
        out = row_at(out, W * K, p.ld_out);
        prepare(t0 + W * K);
    }
    if (w == 0) // the last states end as if for the first warp
        for (int q = 0; q < Q; q++) {
            turn_wait(id_in + q);
#pragma unroll
            for (int m = 0; m < M; m++) {
                Row<V> a = h_in[(q * M + m) * 32];
                if (p.h_final && live)
#pragma unroll
                    for (int v = 0; v < V; v++)
                        p.h_final[((size_t)b * N + q * NS + (m * V + v) / C) * E + e +
                                  (m * V + v) % C] = a.v[v];
            }
        }
}

template <typename T, int NS, int C, int UNROLL, int MIN_BLOCKS>
cudaError_t scan_relay_launch(Device *d, const ScanArgs<T> &p) {
    constexpr int bytes = (20 * NS * C * 32 + 32 * NS * 12) * 4;
    return launch_dependent(d, scan_relay<T, NS, C, UNROLL, MIN_BLOCKS>,
                            p.B * blocks_for(p.E, 32 * C), 128, bytes, p);
}
