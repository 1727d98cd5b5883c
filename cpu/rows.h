// cpu/rows.h: the fast forms of the operations on rows: norm_rows, add_rows, sum_rows, sum_squares,
// log_sum_exp, cross_entropy, conv1d_silu, softplus_bias and gate, and of their backward passes.
//
// The idea is the same everywhere: the channels of a row are taken VL at a time, and the last
// vector of a row has fewer lanes. mamba.c has the definitions, the shapes and the equations.
// Sums over a row are made lane by lane, so their order depends on VL and not on the threads.
// In this file n is the number of lanes of the vector in hand.

// --- sums and norms

static void sum_rows(float *out, const float *x, size_t ld, int T, int D) {
#pragma omp for
    for (int d = 0; d < D; d += VL) {
        int n = lanes_left(d, D);
        vec sum = load_n(out + d, n);
        for (int t = 0; t < T; t++) sum += load_n(x + (size_t)t * ld + d, n);
        store_n(out + d, sum, n);
    }
}

// One over the root of the mean square of a row; where it is centred, around its mean. The forms of
// norms have `centred` as a constant: RMSNorm does not pay for what LayerNorm needs.
INLINE float norm_scale(const float *row, float eps, int D, bool centred, float *mean) {
    vec sum = splat(0), squares = splat(0);
    for (int d = 0; d < D && centred; d += VL) sum += load_n(row + d, lanes_left(d, D));
    *mean = centred ? sum_lanes(sum) / (float)D : 0;
    for (int d = 0; d < D; d += VL) {
        int n = lanes_left(d, D);
        vec v = load_n(row + d, n);
        if (centred) {
            float lane[VL] = {0}; // the lanes beyond the end stay 0
            store_n(lane, v - *mean, n);
            v = load(lane);
        }
        squares += v * v;
    }
    return 1.0f / sqrtf(sum_lanes(squares) / (float)D + eps);
}

INLINE void norm_row(float *xn, const float *row, const float *weight, const float *bias, float eps,
                     int D, bool centred) {
    float mean, scale = norm_scale(row, eps, D, centred, &mean);
    for (int d = 0; d < D; d += VL) {
        int n = lanes_left(d, D);
        vec v = load_n(row + d, n);
        if (centred) v -= mean;
        v *= scale;
        if (weight) v = v * load_n(weight + d, n);
        store_n(xn + d, centred ? v + load_n(bias + d, n) : v, n);
    }
}

static void norm_rows(float *xn, const float *x, const float *weight, const float *bias, float eps,
                      int T, int D, size_t ld) {
#pragma omp for
    for (int t = 0; t < T; t++) {
        const size_t at = (size_t)t * ld;
        if (bias) norm_row(xn + at, x + at, weight, bias, eps, D, true);
        else norm_row(xn + at, x + at, weight, NULL, eps, D, false);
    }
}

INLINE void norm_rows_backward_of(const NormGrad *d, const float *d_xn, const float *x,
                                  const float *weight, float eps, int T, int D, size_t ld,
                                  bool centred) {
    float *scale = d->scale, *means = d->scale + T;
#pragma omp for
    for (int t = 0; t < T; t++)
        scale[t] = norm_scale(x + (size_t)t * ld, eps, D, centred, &means[t]);
    if (weight) {
#pragma omp for
        for (int i = 0; i < D; i += VL) {
            int n = lanes_left(i, D);
            vec sum = load_n(d->d_weight + i, n);
            for (int t = 0; t < T; t++) {
                vec v = load_n(x + (size_t)t * ld + i, n);
                if (centred) v -= means[t];
                sum += load_n(d_xn + (size_t)t * ld + i, n) * v * scale[t];
            }
            store_n(d->d_weight + i, sum, n);
        }
    }
    if (centred) sum_rows(d->d_bias, d_xn, ld, T, D);
#pragma omp for
    for (int t = 0; t < T; t++) {
        const float *dy = d_xn + (size_t)t * ld, *row = x + (size_t)t * ld;
        float *to = d->d_x + (size_t)t * ld;
        vec dot = splat(0), sum = splat(0);
        for (int i = 0; i < D; i += VL) {
            int n = lanes_left(i, D);
            vec v = load_n(row + i, n);
            if (centred) v -= means[t];
            vec dv = load_n(dy + i, n) * v;
            dot += weight ? dv * load_n(weight + i, n) : dv;
            if (centred) sum += load_n(dy + i, n) * (weight ? load_n(weight + i, n) : splat(1));
        }
        float r = scale[t], shared = sum_lanes(dot) / (float)D * r * r * r;
        float level = centred ? sum_lanes(sum) / (float)D : 0;
        bool add = d->add;
        for (int i = 0; i < D; i += VL) {
            int n = lanes_left(i, D);
            vec dv = load_n(dy + i, n) * r;
            if (weight) dv = dv * load_n(weight + i, n);
            if (centred) {
                vec g = weight ? load_n(dy + i, n) * load_n(weight + i, n) : load_n(dy + i, n);
                dv = (g - level) * r - (load_n(row + i, n) - means[t]) * shared;
            } else dv -= load_n(row + i, n) * shared;
            store_n(to + i, add ? load_n(to + i, n) + dv : dv, n);
        }
    }
}

NO_INLINE void layer_norm_backward(const NormGrad *d, const float *d_xn, const float *x,
                                   const float *weight, float eps, int T, int D, size_t ld) {
    norm_rows_backward_of(d, d_xn, x, weight, eps, T, D, ld, true);
}

static void norm_rows_backward(const NormGrad *d, const float *d_xn, const float *x,
                               const float *weight, float eps, int T, int D, size_t ld) {
    if (d->d_bias) layer_norm_backward(d, d_xn, x, weight, eps, T, D, ld);
    else norm_rows_backward_of(d, d_xn, x, weight, eps, T, D, ld, false);
}

static void add_rows(float *out, const float *a, const float *b, int T, int D) {
#pragma omp for
    for (int t = 0; t < T; t++)
        for (int d = 0; d < D; d += VL) {
            size_t i = (size_t)t * D + d;
            int n = lanes_left(d, D);
            store_n(out + i, load_n(a + i, n) + load_n(b + i, n), n);
        }
}

// Floats within 4096 numbers, doubles beyond.
static double sum_squares(const float *x, size_t n) {
    enum { IN_FLOAT = 4096 };
    double sum = 0;
    for (size_t start = 0; start < n; start += IN_FLOAT) {
        vec squares = splat(0);
        for (size_t i = start; i < n && i < start + IN_FLOAT; i += VL) {
            vec v = load_n(x + i, n - i < VL ? (int)(n - i) : VL);
            squares += v * v;
        }
        sum += (double)sum_lanes(squares);
    }
    return sum;
}

// --- cross-entropy

// Floats within 64 vectors, doubles beyond: a vocabulary of 50,000 loses nothing.
static double log_sum_exp(const float *logits, int V) {
    float highest = logits[0];
    for (int v = 1; v < V; v++) highest = logits[v] > highest ? logits[v] : highest;
    double sum = 0;
    for (int start = 0; start < V; start += 64 * VL) {
        vec part = splat(0);
        int end = V - start < 64 * VL ? V : start + 64 * VL, v = start;
        for (; v + VL <= end; v += VL) part += exp_vec(load(logits + v) - highest);
        sum += (double)sum_lanes(part);
        for (; v < end; v++) sum += exp((double)(logits[v] - highest));
    }
    return highest + log(sum);
}

static void cross_entropy(float *losses, float *logits, const int32_t *targets, float weight, int T,
                          int V) {
#pragma omp for
    for (int t = 0; t < T; t++) {
        float *row = logits + (size_t)t * V;
        double log_sum = targets[t] < 0 ? 0 : log_sum_exp(row, V);
        losses[t] = targets[t] < 0 ? 0 : (float)(log_sum - (double)row[targets[t]]);
        for (int v = 0; v < V; v += VL) {
            int n = lanes_left(v, V);
            vec p = exp_vec(load_n(row + v, n) - (float)log_sum);
            store_n(row + v, targets[t] < 0 ? splat(0) : weight * p, n);
        }
        if (targets[t] >= 0) row[targets[t]] -= weight;
    }
}

// --- conv1d + SiLU

// Prefill and training: threads share rows.
static void conv1d_silu_rows(float *u, const LayerState *seq, const Conv *c) {
    const int L = c->L, E = c->E, K = c->K;
    const float *conv_t = c->conv_t, *bias = c->bias;
#pragma omp for
    for (int row = 0; row < c->B * L; row++) {
        int b = row / L, t = row % L, e = 0;
        const float *window = seq[b].window;
        // What the first tap meets. The input of the next tap lies 2 E floats later, unless some of
        // the K inputs are still in the window.
        const float *past = conv_input(c, window, b, t < K - 1 ? 0 : t - K + 1);
        float *to = u + (size_t)row * E;
        for (; t >= K - 1 && e + VL <= E; e += VL) { // nearly all
            vec sum = bias ? load(bias + e) : splat(0);
            for (int k = 0; k < K; k++)
                sum += load(conv_t + (size_t)k * E + e) * load(past + (size_t)k * 2 * E + e);
            store(to + e, sum);
        }
        for (; e < E; e += VL) {
            int n = lanes_left(e, E);
            vec sum = bias ? load_n(bias + e, n) : splat(0);
            for (int k = 0; k < K; k++)
                sum += load_n(conv_t + (size_t)k * E + e, n) *
                       load_n(conv_input(c, window, b, t - K + 1 + k) + e, n);
            store_n(to + e, sum, n);
        }
        // SiLU has its own loop: two short chains overlap better than one long one.
        for (e = 0; e + VL <= E; e += VL) store(to + e, silu_vec(load(to + e)));
        if (e < E) store_n(to + e, silu_vec(load_n(to + e, E - e)), E - e);
    }
    conv_shift(seq, c);
}

// One token of one sequence, a vector of channels from e on. The window moves on in the same pass.
INLINE void conv1d_silu_token(float *u, float *window, const float *x, const Conv *c, int e) {
    const int E = c->E, K = c->K, n = lanes_left(e, E);
    vec now = load_n(x + e, n), sum = now * load_n(c->conv_t + (size_t)(K - 1) * E + e, n);
    if (c->bias) sum += load_n(c->bias + e, n);
    for (int k = 0; k < K - 1; k++) {
        vec past = load_n(window + (size_t)k * E + e, n);
        sum += load_n(c->conv_t + (size_t)k * E + e, n) * past;
        if (k) store_n(window + (size_t)(k - 1) * E + e, past, n);
    }
    if (K > 1) store_n(window + (size_t)(K - 2) * E + e, now, n);
    store_n(u + e, silu_vec(sum), n);
}

static void conv1d_silu(float *u, const LayerState *seq, const Conv *c) {
    if (c->L > 1) {
        conv1d_silu_rows(u, seq, c);
        return;
    }
    const int E = c->E, row_tasks = (E + STEP_LANES - 1) / STEP_LANES;
#pragma omp for
    for (int task = 0; task < c->B * row_tasks; task++) {
        int b = task / row_tasks, e0 = task % row_tasks * STEP_LANES;
        for (int e = e0; e < E && e < e0 + STEP_LANES; e += VL)
            conv1d_silu_token(u + (size_t)b * E, seq[b].window, c->xz + (size_t)b * 2 * E, c, e);
    }
}

// One sequence, a vector of channels from e on. c is computed again, then its gradient d_c; from
// d_c come d_bias, d_conv and d_x.
INLINE void conv1d_silu_backward_lanes(const ConvGrad *d, const float *d_u, const float *window,
                                       const Conv *c, int b, int e) {
    const int L = c->L, E = c->E, K = c->K, n = lanes_left(e, E);
    const float *conv_t = c->conv_t;
    size_t row = (size_t)b * L;
    float *d_c = d->d_c;
    vec d_b = splat(0);
    for (int t = 0; t < L; t++) { // d_c = d_u silu'(c)
        vec sum = c->bias ? load_n(c->bias + e, n) : splat(0);
        for (int k = 0; k < K; k++)
            sum += load_n(conv_t + (size_t)k * E + e, n) *
                   load_n(conv_input(c, window, b, t - K + 1 + k) + e, n);
        vec s = 1.0f / (1.0f + exp_vec(-sum));
        vec dc = load_n(d_u + (row + t) * E + e, n) * s * (1.0f + sum * (1.0f - s));
        store_n(d_c + (size_t)t * E + e, dc, n);
        d_b += dc;
    }
    if (c->bias) store_n(d->d_bias + e, load_n(d->d_bias + e, n) + d_b, n);
    for (int k = 0; k < K; k++) { // d_conv[k] += sum over t of d_c_t x_{t-K+1+k}
        float lane[VL];
        vec sum = splat(0);
        for (int t = 0; t < L; t++)
            sum += load_n(d_c + (size_t)t * E + e, n) *
                   load_n(conv_input(c, window, b, t - K + 1 + k) + e, n);
        store(lane, sum);
        for (int i = 0; i < n; i++) d->d_conv[(size_t)(e + i) * K + k] += lane[i];
    }
    // d_x_t = sum over k of conv[k] d_c_{t+K-1-k}; inputs before t = 0 are the window's. The last
    // K-1 inputs are also the window at the end.
    float *d_window = d->d_window + (size_t)b * (K - 1) * E;
    for (int t = L - 1; t > -K; t--) {
        vec dx = t > L - K ? load_n(d_window + (size_t)(t - L + K - 1) * E + e, n) : splat(0);
        for (int k = K - 1; k >= 0; k--) {
            int later = t + K - 1 - k;
            if (later < 0 || later >= L) continue;
            dx += load_n(conv_t + (size_t)k * E + e, n) * load_n(d_c + (size_t)later * E + e, n);
        }
        if (t >= 0) store_n(d->d_xz + (row + t) * 2 * E + e, dx, n);
        else store_n(d_window + (size_t)(K - 1 + t) * E + e, dx, n);
    }
}

static void conv1d_silu_backward(const ConvGrad *d, const float *d_u, const float *window,
                                 const Conv *c) {
    const int E = c->E;
#pragma omp for
    for (int e = 0; e < E; e += VL)
        for (int b = 0; b < c->B; b++)
            conv1d_silu_backward_lanes(d, d_u, window + (size_t)b * (c->K - 1) * E, c, b, e);
}

// --- delta and the gate
//
// In a step the operations softplus_bias, scan and gate need no barrier between them. A task of
// each is STEP_LANES channels of one row. All three loops have the same number of tasks, a static
// schedule and the same team, so OpenMP gives the same tasks to the same thread. A task reads only
// what the same task of the operation before has written: delta and y of its channels. (B_ssm and
// C_ssm come from matmul, which ends with a barrier.) gate ends with the barrier.

INLINE void softplus_lanes(float *p, const float *dt_bias, int n) {
    store_n(p, softplus_vec(load_n(p, n) + load_n(dt_bias, n)), n);
}

// Channels e .. end of a row. The last vector is apart: a test of n in every load doubles the time.
INLINE void softplus_channels(float *delta, const float *dt_bias, int e, int end) {
    for (; e + VL <= end; e += VL) softplus_lanes(delta + e, dt_bias + e, VL);
    if (e < end) softplus_lanes(delta + e, dt_bias + e, end - e);
}

static void softplus_bias(float *delta, const float *dt_bias, Rows rows, int E) {
    const int row_tasks = (E + STEP_LANES - 1) / STEP_LANES;
    if (rows.step) {
#pragma omp for schedule(static) nowait
        for (int task = 0; task < rows.T * row_tasks; task++) {
            int e = task % row_tasks * STEP_LANES, end = E - e < STEP_LANES ? E : e + STEP_LANES;
            softplus_channels(delta + (size_t)(task / row_tasks) * E, dt_bias, e, end);
        }
    } else {
#pragma omp for
        for (int t = 0; t < rows.T; t++) softplus_channels(delta + (size_t)t * E, dt_bias, 0, E);
    }
}

static void softplus_backward(float *d_delta, const float *delta, int T, int E) {
#pragma omp for
    for (int t = 0; t < T; t++)
        for (int e = 0; e < E; e += VL) {
            int n = lanes_left(e, E);
            float *p = d_delta + (size_t)t * E + e;
            vec delta_te = load_n(delta + (size_t)t * E + e, n);
            store_n(p, load_n(p, n) * one_minus_exp_minus(delta_te), n);
        }
}

INLINE void gate_lanes(float *g, const float *y, const float *z, int n) {
    store_n(g, load_n(y, n) * silu_vec(load_n(z, n)), n);
}

INLINE void gate_channels(float *g, const float *y, const float *z, int e, int end) {
    for (; e + VL <= end; e += VL) gate_lanes(g + e, y + e, z + e, VL);
    if (e < end) gate_lanes(g + e, y + e, z + e, end - e);
}

static void gate(float *g, const float *y, const float *xz, Rows rows, int E) {
    const int row_tasks = (E + STEP_LANES - 1) / STEP_LANES;
    if (rows.step) {
#pragma omp for schedule(static)
        for (int task = 0; task < rows.T * row_tasks; task++) {
            size_t t = (size_t)(task / row_tasks);
            int e = task % row_tasks * STEP_LANES, end = E - e < STEP_LANES ? E : e + STEP_LANES;
            gate_channels(g + t * E, y + t * E, xz + (t * 2 + 1) * E, e, end);
        }
    } else {
#pragma omp for
        for (size_t t = 0; t < (size_t)rows.T; t++) {
            gate_channels(g + t * E, y + t * E, xz + (t * 2 + 1) * E, 0, E);
        }
    }
}

static void gate_backward(float *d_y, float *d_xz, float *g, const float *d_g, const float *y,
                          const float *xz, int T, int E) {
#pragma omp for
    for (int t = 0; t < T; t++)
        for (int e = 0; e < E; e += VL) {
            int n = lanes_left(e, E);
            size_t te = (size_t)t * E + e, at_z = ((size_t)t * 2 + 1) * E + e;
            vec z = load_n(xz + at_z, n), s = 1.0f / (1.0f + exp_vec(-z));
            vec dg = load_n(d_g + te, n), yt = load_n(y + te, n);
            store_n(d_xz + at_z, dg * yt * s * (1.0f + z * (1.0f - s)), n);
            store_n(g + te, yt * z * s, n);
            store_n(d_y + te, dg * z * s, n);
        }
}
