// scan_tiles.cuh - the scan of few channels, for any number of states. Included by mamba_cuda.cu,
// which has the drawing.
//
// A block is 32 C channels and one tile of WARPS * STEPS steps, a warp STEPS of them. Tiles that
// fit on the GPU run at the same time. A warp does one state after the other. It computes its
// decays and its end state from h = 0, the forecast, and leaves (product of decays, end state) in
// shared memory. After a barrier each warp joins the forecasts of the warps before it to its true h
// and walks its steps again with the decays that it kept: 7 instructions a state and step instead
// of 5, but no second exponential. The first state of a tile comes from the tile before by mail
// (exchange.cuh, 2), about a microsecond behind it. B_ssm, C_ssm and A_neg are staged for 16 states
// at a time. Blocks that did several tiles were slower: the loop takes registers from the states.

// A load from shared memory that the compiler does not move behind a condition, so that several are
// in flight.
__device__ __forceinline__ Row<2> load_always(const Row<2> *p) {
    Row<2> r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(r.v[0]), "=f"(r.v[1])
                 : "r"((unsigned)__cvta_generic_to_shared(p))
                 : "memory");
    return r;
}
__device__ __forceinline__ Row<4> load_always(const Row<4> *p) {
    Row<4> r;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r.v[0]), "=f"(r.v[1]), "=f"(r.v[2]), "=f"(r.v[3])
                 : "r"((unsigned)__cvta_generic_to_shared(p))
                 : "memory");
    return r;
}

// WARPS pieces of STEPS steps. C: channels a lane.
template <typename T, int STEPS, int WARPS, int C, int MIN_BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_tiles(ScanArgs<T> p, ScanMail m) {
    constexpr int TILE = STEPS * WARPS;
    constexpr int STAGED = 16; // states whose B_ssm, C_ssm and A_neg are staged at a time
    // An odd multiple of 4 modulo 32, so that staging has no bank conflicts.
    constexpr int ROW_FLOATS = 2 * TILE + 32 * C + 4;
    constexpr int A_IN_ROW = 2 * TILE, JOIN = 2 * WARPS * 32;
    typedef Pack<T, C> Packed;
    extern __shared__ float4 shared[];
    // [STAGED][ROW_FLOATS]: B_ssm [TILE], C_ssm [TILE], A_neg [32][C] of a state
    float *rows = (float *)shared;
    // [2][2 WARPS][32] pairs (x, y), each the map h -> x h + y: WARPS-1 times (0, 0), then (0,
    // state before the tile), then (product of decays, end state from 0) of each warp. Applied in
    // order, the WARPS pairs from number w on give the first state of warp w from any h.
    auto join = (Row<2 * C> *)(rows + STAGED * ROW_FLOATS);
    Packed *zs = (Packed *)(join + 2 * JOIN); // [TILE][32], each thread its own
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5,
              groups = (p.E + 32 * C - 1) / (32 * C), L = p.L, E = p.E, N = p.N;
    // The order in which blocks start: the tile that a tile waits for has started before it.
    __shared__ unsigned ticket;
    wait_for_input();
    if (threadIdx.x == 0)
        ticket = atomicAdd((unsigned *)m.words, 1u) - m.ticket; // modulo 2^32, as the counter
    __syncthreads();
    const int tile = ticket / (p.B * groups), in_tile = ticket % (p.B * groups),
              b = in_tile / groups, e_true = (in_tile % groups * 32 + lane) * C,
              tile_t = tile * TILE, t0 = tile_t + warp * STEPS;
    const bool live = e_true < E, last_tile = tile_t + TILE >= L;
    const uint32_t tag = m.tag + tile; // of the mail that this tile waits for
    // C divides E. Lanes beyond E do what the last lane within does.
    const int e = live ? e_true : E - C;
    const size_t row0 = (size_t)b * L, box_words = (size_t)p.B * N * E;
    float bias[C], skip[C];
#pragma unroll
    for (int c = 0; c < C; c++) bias[c] = p.dt_bias[e + c], skip[c] = p.D_skip[e + c];

    const T *delta_at = p.delta_raw + (row0 + t0) * p.ld_delta + e,
            *u_at = p.u + (row0 + t0) * p.ld_u + e, *z_at = p.z + (row0 + t0) * p.ld_z + e;
    Packed raw_d[STEPS], raw_u[STEPS], raw_z[STEPS];
    if (t0 + STEPS <= L) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            raw_d[i] = *(const Packed *)row_at(delta_at, i, p.ld_delta),
            raw_u[i] = *(const Packed *)row_at(u_at, i, p.ld_u),
            raw_z[i] = *(const Packed *)row_at(z_at, i, p.ld_z);
    } else {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            raw_d[i].zero(), raw_u[i].zero(), raw_z[i].zero();
            if (t0 + i < L)
                raw_d[i] = *(const Packed *)row_at(delta_at, i, p.ld_delta),
                raw_u[i] = *(const Packed *)row_at(u_at, i, p.ld_u),
                raw_z[i] = *(const Packed *)row_at(z_at, i, p.ld_z);
        }
    }
    // A warp stages units of 4 steps and 8 states. Of four warps two do B_ssm and two C_ssm, 8 of
    // the 16 states each.
    const bool is_C = warp % 4 >= 2;
    const int bc_n = warp % 2 * 8 + lane % 8, bc_t = warp / 4 * 4 + lane / 8,
              ld_bc = is_C ? p.ld_C : p.ld_B;
    const T *bc_from = (is_C ? p.C_ssm : p.B_ssm) + (row0 + tile_t + bc_t) * ld_bc + bc_n;
    float *bc_to = rows + (is_C ? TILE : 0) + bc_n * ROW_FLOATS + bc_t;
    auto stage = [&](int n0) {
        if (tile_t + TILE <= L && n0 + STAGED <= N) {
            T raw[STEPS];
#pragma unroll
            for (int v = 0; v < STEPS; v++) raw[v] = row_at(bc_from, v * WARPS, ld_bc)[n0];
#pragma unroll
            for (int v = 0; v < STEPS; v++) bc_to[v * WARPS] = value(raw[v]);
        } else
#pragma unroll 4
            for (int v = 0; v < STEPS; v++) {
                bool in = tile_t + bc_t + v * WARPS < L && n0 + bc_n < N;
                bc_to[v * WARPS] = in ? value(row_at(bc_from, v * WARPS, ld_bc)[n0]) : 0.f;
            }
        for (int n = warp; n < STAGED; n += WARPS) {
            Row<C> a;
#pragma unroll
            for (int c = 0; c < C; c++)
                a.v[c] = n0 + n < N ? LOG2E * p.A_neg[(size_t)(n0 + n) * E + e + c] : 0.f;
            ((Row<C> *)(rows + n * ROW_FLOATS + A_IN_ROW))[lane] = a;
        }
    };
    stage(0);
    if (warp < WARPS - 1) {
        join[JOIN + warp * 32 + lane] = {};
        join[warp * 32 + lane] = {};
    }
    float delta[STEPS][C], delta_u[STEPS][C], y[STEPS][C], elapsed[C];
#pragma unroll
    for (int c = 0; c < C; c++) elapsed[c] = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        zs[(warp * STEPS + i) * 32 + lane] = raw_z[i];
#pragma unroll
        for (int c = 0; c < C; c++) delta[i][c] = softplus<T>(raw_d[i].get(c) + bias[c]);
    }
    if (t0 + STEPS > L) // past the end of time delta is 0: decay 1, inject 0
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int c = 0; c < C; c++) delta[i][c] = t0 + i < L ? delta[i][c] : 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int c = 0; c < C; c++) {
            float u = raw_u[i].get(c);
            delta_u[i][c] = delta[i][c] * u, y[i][c] = skip[c] * u, elapsed[c] += delta[i][c];
        }
#pragma unroll
    for (int c = 0; c < C; c++)
        asm("" : "+f"(elapsed[c])); // else the compiler sums it again for every state

    // The first warp reads the mailbox of the tile before, the last warp writes this tile's.
    uint64_t *box =
        m.words + MAIL_BOXES + ((tile - (warp == 0)) & 1) * box_words + (size_t)b * N * E + e;
    float *starts =
        p.h_starts && t0 % SCAN_SAVE == 0 && t0 < L
            ? p.h_starts +
                  ((size_t)b * ((L + SCAN_SAVE - 1) / SCAN_SAVE) + t0 / SCAN_SAVE) * N * E + e
            : NULL;
    float decay[STEPS][C], prod[C], end[C]; // of one state; their product and the end state from 0
    Mail<C> mail = {};
    const float *row = rows + warp * STEPS,
                *A_at = rows + A_IN_ROW + lane * C; // of the state in hand
    int joined = warp * 32 + lane; // this lane's place in the half of join of the state in hand
    const bool stores_states = warp == WARPS - 1 || starts;

    // The forecast of a state goes to shared memory before the barrier after which it is joined.
    auto publish = [&](int n) {
        Row<2 * C> forecast;
#pragma unroll
        for (int c = 0; c < C; c++) forecast.v[c] = prod[c], forecast.v[C + c] = end[c];
        join[joined + WARPS * 32] = forecast;
        if (warp == 0) {
            auto before = Row<2 * C>();
            if (tile > 0) {
                Patience wait;
                while (!mail.all(tag) && !wait.gives_up(STUCK_SCAN, KERNEL_TILES)) mail.read(box);
#pragma unroll
                for (int c = 0; c < C; c++)
                    before.v[C + c] = __uint_as_float((uint32_t)mail.word[c]);
            } else if (p.h0)
#pragma unroll
                for (int c = 0; c < C; c++) before.v[C + c] = p.h0[((size_t)b * N + n) * E + e + c];
            join[joined + (WARPS - 1) * 32] = before;
        }
    };
    auto forecast = [&](const float *B, int i, Row<C> A) { // a step of the end state from 0
#pragma unroll
        for (int c = 0; c < C; c++) {
            decay[i][c] = exp2_fast(delta[i][c] * A.v[c]);
            end[c] = i ? fmaf(decay[i][c], end[c], delta_u[i][c] * B[i % 4]) : delta_u[0][c] * B[0];
        }
    };
    // State n from its true start. Its steps leave the special-function unit idle, so the forecast
    // of the next state is computed between them. The new decays take the places of those already
    // used.
    auto state_step = [&](auto more, int n) {
        Row<2 * C> part[WARPS];
        Row<C> h, A;
#pragma unroll
        for (int v = 0; v < WARPS; v++) part[v] = load_always(join + joined + v * 32);
        if (more.value) A = *(const Row<C> *)(A_at + ROW_FLOATS);
        if (more.value && warp == 0 && tile > 0) mail.read(box += E);
#pragma unroll
        for (int c = 0; c < C; c++) h.v[c] = part[0].v[C + c];
#pragma unroll
        for (int v = 1; v < WARPS; v++)
#pragma unroll
            for (int c = 0; c < C; c++) h.v[c] = fmaf(part[v].v[c], h.v[c], part[v].v[C + c]);
        if (stores_states) {
            if (warp == WARPS - 1) {
                float after[C];
#pragma unroll
                for (int c = 0; c < C; c++) after[c] = fmaf(prod[c], h.v[c], end[c]);
                if (!last_tile) {
#pragma unroll
                    for (int c = 0; c < C; c++)
                        mail_write(box + c, (uint64_t)(tag + 1) << 32 | __float_as_uint(after[c]));
                    box += E;
                } else if (p.h_final)
#pragma unroll
                    for (int c = 0; c < C; c++)
                        p.h_final[((size_t)b * N + n) * E + e + c] = after[c];
            }
            if (starts) {
#pragma unroll
                for (int c = 0; c < C; c++) starts[c] = h.v[c];
                starts += E;
            }
        }
        if (more.value)
#pragma unroll
            for (int c = 0; c < C; c++) prod[c] = exp2_fast(elapsed[c] * A.v[c]);
#pragma unroll
        for (int i = 0; i < STEPS; i += 4) {
            float B[4], C_row[4], B_next[4];
            if (more.value) unpack(B_next, load4(row + ROW_FLOATS + i));
            unpack(B, load4(row + i)), unpack(C_row, load4(row + TILE + i));
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int c = 0; c < C; c++) {
                    step_state(h.v[c], y[i + k][c], decay[i + k][c], delta_u[i + k][c] * B[k],
                               C_row[k]);
                }
                if (more.value) forecast(B_next, i + k, A);
            }
        }
        if (more.value) {
            row += ROW_FLOATS, A_at += ROW_FLOATS;
            joined = JOIN + 2 * (warp * 32 + lane) - joined;
            publish(n + 1);
            __syncthreads();
        }
    };
    for (int n0 = 0; n0 < N; n0 += STAGED) {
        if (n0) {
            __syncthreads(); // all warps have walked the states before
            stage(n0);
            row = rows + warp * STEPS, A_at = rows + A_IN_ROW + lane * C;
            if (warp == 0) box += E;
        }
        __syncthreads();
        const int count = min(STAGED, N - n0);
        if (warp == 0 && tile > 0) mail.read(box);
        const Row<C> A = *(const Row<C> *)A_at;
#pragma unroll
        for (int c = 0; c < C; c++) prod[c] = exp2_fast(elapsed[c] * A.v[c]);
#pragma unroll
        for (int i = 0; i < STEPS; i += 4) {
            float B[4];
            unpack(B, load4(row + i));
#pragma unroll
            for (int k = 0; k < 4; k++) forecast(B, i + k, A);
        }
        publish(n0);
        __syncthreads();
        for (int g = 0; g + 1 < count; g++) state_step(std::true_type(), n0 + g);
        state_step(std::false_type(), n0 + count - 1);
    }
    T *out = p.out + (row0 + t0) * p.ld_out + e;
    const int steps = live ? L - t0 : 0;
#pragma unroll
    for (int i = 0; i < STEPS; i += 2) {
        Packed z0 = zs[(warp * STEPS + i) * 32 + lane], z1 = zs[(warp * STEPS + i + 1) * 32 + lane];
#pragma unroll
        for (int c = 0; c < C; c++) gate_pair(y[i][c], y[i + 1][c], z0.get(c), z1.get(c));
    }
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        Packed g;
        g.set(y[i]);
        if (i < steps) *(Packed *)row_at(out, i, p.ld_out) = g;
    }
}

// Bytes of a mailbox for scans of up to (B,E,N): two words for each state, and the tickets.
static size_t scan_forward_workspace(int B, int E, int N) {
    return sizeof(uint64_t) * (2 * (size_t)B * N * E + MAIL_BOXES);
}

template <typename T, int STEPS, int WARPS, int C, int MIN_BLOCKS>
static cudaError_t scan_tiles_launch(Device *d, const ScanArgs<T> &p) {
    constexpr int bytes = (16 * (2 * STEPS * WARPS + 32 * C + 4) + 2 * 2 * WARPS * 32 * 2 * C) * 4 +
                          STEPS * WARPS * 32 * C * (int)sizeof(T);
    const size_t tiles = ((size_t)p.L + STEPS * WARPS - 1) / (STEPS * WARPS),
                 items = (size_t)p.B * ((p.E + 32 * C - 1) / (32 * C)) * tiles;
    ScanMail *m = p.mail;
    if (items > INT32_MAX || m->bytes < scan_forward_workspace(p.B, p.E, p.N))
        return cudaErrorInvalidValue;
    // Before tags would wrap, the boxes are cleared and tags begin again. Tickets may wrap: only
    // their difference to the first of the launch is used.
    if (!m->cleared || m->tag > UINT32_MAX - tiles) {
        cudaError_t err = cudaMemsetAsync(m->words, 0, m->bytes, d->stream);
        if (err != cudaSuccess) return err;
        m->ticket = 0, m->tag = 0, m->cleared = true;
    }
    cudaError_t err = launch_dependent(d, scan_tiles<T, STEPS, WARPS, C, MIN_BLOCKS>,
                                       (unsigned)items, 32 * WARPS, bytes, p, *m);
    if (err != cudaSuccess) return err;
    m->tag += (uint32_t)tiles, m->ticket += (uint32_t)items;
    return cudaSuccess;
}
