// cpu/scan.h: the fast forms of recurrence, recurrence_again and recurrence_backward.
//
// mamba.c has the equations and calls these three. VL channels lie side by side in a vector, so no
// sum over states crosses lanes:
//
//     state n    h[n]  | e | e+1 | ... | e+VL-1 |     one vector of each n, through all of time
//     step t     dt_t  | e | e+1 | ... | e+VL-1 |     h[n] = 2^(dt A[n]) h[n] + dt u B[n]
//     B, C       one number for all lanes             sum += h[n] C[n]
//
// exp(delta A) is computed as 2^(delta (A log2 e)): exp2_negative() costs half of exp_vec().

#define LOG2_E 1.44269504f

// The recurrence for one vector of channels from e on, rows row0 .. row1. A scan spends its time in
// this loop; h and A stay in registers or the L1 cache. y NULL: only the states; then delta_sum,
// unless NULL, gets the sum of delta.
INLINE void recurrence_lanes(float *y, float *h_at, float *delta_sum, const Scan *s, int e,
                             int row0, int row1) {
    const int E = s->E, N = s->N, lanes = lanes_left(e, E);
    const size_t ld_bc = s->ld_bc;
    const float *u = s->u + e, *delta = s->delta + e, *A_neg = s->A_neg + e;
    const float *B_ssm = s->B_ssm, *C_ssm = s->C_ssm;
    vec h[N_MAX], A[N_MAX];
    vec skip = load_n(s->D_skip + e, lanes), sum_delta = splat(0), steepest = splat(0);
    for (int n = 0; n < N; n++) {
        h[n] = load_n(h_at + (size_t)n * E + e, lanes);
        A[n] = load_n(A_neg + (size_t)n * E, lanes) * LOG2_E;
        steepest = choose(MASK(A[n] < steepest), A[n], steepest);
    }
    for (int t = row0; t < row1; t++) {
        vec dt = load_n(delta + (size_t)t * E, lanes), ut = load_n(u + (size_t)t * E, lanes);
        vec dt_u = dt * ut, sum = skip * ut;
        const float *B = B_ssm + t * ld_bc, *C = C_ssm + t * ld_bc;
        // exp2_negative() takes nothing below -126. The condition is also true for a NaN.
        if (any_lane(~MASK(dt * steepest >= -126.0f)))
            for (int n = 0; n < N; n++) {
                h[n] = exp2_negative(at_least(dt * A[n], -126.0f)) * h[n] + dt_u * B[n];
                sum += h[n] * C[n];
            }
        else
            for (int n = 0; n < N; n++) {
                h[n] = exp2_negative(dt * A[n]) * h[n] + dt_u * B[n];
                sum += h[n] * C[n];
            }
        if (y) store_n(y + (size_t)t * E + e, sum, lanes);
        else sum_delta += dt;
    }
    for (int n = 0; n < N; n++) store_n(h_at + (size_t)n * E + e, h[n], lanes);
    if (delta_sum) store_n(delta_sum + e, sum_delta, lanes);
}

// One token, channels e0 .. e1. Each state is used once, so h and A_neg come from memory: RUN
// channels of a state are read in one run, then those of the next state. The run of the next RUN
// channels is fetched meanwhile, because h has left the caches since the last token.
INLINE void recurrence_step(float *y, float *h, const Scan *s, int e0, int e1, int row) {
    enum { RUN_VECTORS = 8, RUN = RUN_VECTORS * VL };
    const int E = s->E, N = s->N;
    const float *u = s->u + (size_t)row * E, *delta = s->delta + (size_t)row * E;
    const float *A_neg = s->A_neg, *D_skip = s->D_skip;
    const float *B = s->B_ssm + row * s->ld_bc, *C = s->C_ssm + row * s->ld_bc;
    for (int r0 = e0; r0 < e1; r0 += RUN) {
        int r1 = e1 - r0 < RUN ? e1 : r0 + RUN;
        vec sum[RUN_VECTORS];
        for (int e = r0, i = 0; e < r1; e += VL, i++)
            sum[i] = load_n(D_skip + e, lanes_left(e, E)) * load_n(u + e, lanes_left(e, E));
        for (int n = 0; n < N; n++)
            for (int e = r0, i = 0; e < r1; e += VL, i++) {
                int lanes = lanes_left(e, E);
                float *state = h + (size_t)n * E + e;
                PREFETCH(state, RUN * sizeof(float));
                PREFETCH(A_neg + (size_t)n * E + e, RUN * sizeof(float));
                vec dt = load_n(delta + e, lanes);
                vec A = load_n(A_neg + (size_t)n * E + e, lanes) * LOG2_E;
                vec decay = exp2_negative(at_least(dt * A, -126.0f));
                vec now = decay * load_n(state, lanes) + dt * load_n(u + e, lanes) * B[n];
                store_n(state, now, lanes);
                sum[i] += now * C[n];
            }
        for (int e = r0, i = 0; e < r1 && y; e += VL, i++)
            store_n(y + (size_t)row * E + e, sum[i], lanes_left(e, E));
    }
}

static void recurrence(float *y, float *h, float *delta_sum, const Scan *s, int e0, int e1,
                       int row0, int row1) {
    if (row1 - row0 == 1 && !delta_sum) recurrence_step(y, h, s, e0, e1, row0);
    else if (y) // two calls: in the second the compiler leaves y out
        for (int e = e0; e < e1; e += VL) recurrence_lanes(y, h, NULL, s, e, row0, row1);
    else
        for (int e = e0; e < e1; e += VL) recurrence_lanes(NULL, h, delta_sum, s, e, row0, row1);
}

// --- backward: arrays (N,SCAN_WIDTH) of the task's channels, `vectors` vectors of them in use

static void recurrence_again(float *h, float *decay, const float *before, const ScanTask *k,
                             const Scan *s, size_t row) {
    const int N = s->N, width = k->width, vectors = (width + VL - 1) / VL;
    const float *A = k->A, *B = s->B_ssm + row * s->ld_bc;
    const float *u = s->u + row * s->E + k->e0, *delta = s->delta + row * s->E + k->e0;
    vec dt[SCAN_VECTORS], dt_u[SCAN_VECTORS];
    for (int i = 0; i < vectors; i++) {
        dt[i] = load_n(delta + i * VL, lanes_left(i * VL, width));
        dt_u[i] = dt[i] * load_n(u + i * VL, lanes_left(i * VL, width));
    }
    for (int n = 0; n < N; n++)
        for (int i = 0; i < vectors; i++) {
            size_t at = (size_t)n * SCAN_WIDTH + i * VL;
            vec a = exp_vec(dt[i] * load(A + at));
            if (decay) store(decay + at, a);
            store(h + at, a * load(before + at) + dt_u[i] * B[n]);
        }
}

static void recurrence_backward(ScanTask *k, const ScanGrad *d, const float *d_y, const Scan *s,
                                size_t row, const float *h, const float *decay,
                                const float *before) {
    const int N = s->N, width = k->width, vectors = (width + VL - 1) / VL;
    const size_t first = row * s->E + k->e0;
    const float *A = k->A, *B = s->B_ssm + row * s->ld_bc, *C = s->C_ssm + row * s->ld_bc;
    float *d_h = k->d_h, *d_A = k->d_A, *part = k->parts + row * 2 * N;
    float *d_u = d->d_u + first, *d_delta = d->d_delta + first;
    vec dy[SCAN_VECTORS], dt[SCAN_VECTORS], ut[SCAN_VECTORS], d_ut[SCAN_VECTORS],
        d_dt[SCAN_VECTORS];
    for (int i = 0; i < vectors; i++) {
        int e = i * VL, lanes = lanes_left(e, width);
        dy[i] = load_n(d_y + first + e, lanes);
        dt[i] = load_n(s->delta + first + e, lanes);
        ut[i] = load_n(s->u + first + e, lanes);
        d_ut[i] = load_n(s->D_skip + k->e0 + e, lanes) * dy[i];
        d_dt[i] = splat(0);
        store(k->d_D_skip + e, load(k->d_D_skip + e) + dy[i] * ut[i]);
    }
    for (int n = 0; n < N; n++) {
        vec d_B = splat(0), d_C = splat(0);
        for (int i = 0; i < vectors; i++) {
            size_t at = (size_t)n * SCAN_WIDTH + i * VL;
            vec d_ht = load(d_h + at) + dy[i] * C[n], a = load(decay + at);
            vec d_dtA = d_ht * a * load(before + at), d_h_u = d_ht * ut[i];
            d_C += dy[i] * load(h + at);
            d_B += d_h_u * dt[i];
            d_dt[i] += d_dtA * load(A + at) + d_h_u * B[n];
            d_ut[i] += d_ht * dt[i] * B[n];
            store(d_A + at, load(d_A + at) + d_dtA * dt[i]);
            store(d_h + at, d_ht * a);
        }
        part[n] = sum_lanes(d_B);
        part[N + n] = sum_lanes(d_C);
    }
    for (int i = 0; i < vectors; i++) {
        store_n(d_u + i * VL, d_ut[i], lanes_left(i * VL, width));
        store_n(d_delta + i * VL, d_dt[i], lanes_left(i * VL, width));
    }
}
