// cpu/vectors.h: the words that the fast forms are written in. It replaces no operation of mamba.c.
//
// A vec is VL floats side by side. With gcc and clang it is a vector of the compiler's, and
// ordinary arithmetic works on all its lanes. Elsewhere VL = 1: a vec is a float, and the same
// lines are plain C. The name of a function says what it does to each lane.
//
// Everything in cpu/ knows the types of mamba.c, and nothing of cli/.
//
// Accuracy, which tests/test_vectors.h checks: exp_vec 1.5 ulp for x in [-86, 88]; softplus_vec and
// silu_vec 3 ulp where the answer is above 1e-37, and smaller answers stop near 1e-37. A NaN stays
// a NaN.

#ifndef VL // -DVL=1, 4, 8 or 16 chooses another width; 1 works everywhere
#if !defined(__GNUC__)
#define VL 1
#elif defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#elif defined(__SSE2__) || defined(__ARM_NEON) || defined(__VSX__) || defined(__riscv_vector) || \
    defined(__wasm_simd128__)
#define VL 4
#else
#define VL 1
#endif
#endif
// exp_vec() rounds by adding a large float. That needs sums that are rounded to float.
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float sums are kept in a wider format; on 32-bit x86 add -msse2 -mfpmath=sse"
#endif

// vec, ivec, uvec: VL floats, int32_t, uint32_t. hvec: VL halves. vec4: always 4 floats.
// LANES_OF converts each lane to another type.
#if VL > 1
typedef float vec __attribute__((vector_size(4 * VL)));
typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(4 * VL)));
typedef uint32_t uvec __attribute__((vector_size(4 * VL)));
typedef uint16_t hvec __attribute__((vector_size(2 * VL)));
#define LANES_OF(type, v) __builtin_convertvector(v, type)
#define MASK(condition) ((ivec)(condition)) // -1 in each lane where the condition holds, else 0
// For load_halves() with gcc, little-endian: the lanes of a vector of halves, each after a zero.
#if __GNUC__ >= 12 && !defined(__clang__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#if VL == 16
#define HALVES_ORDER \
    16, 0, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16, 8, 16, 9, 16, 10, 16, 11, 16, 12, \
        16, 13, 16, 14, 16, 15
#elif VL == 8
#define HALVES_ORDER 8, 0, 8, 1, 8, 2, 8, 3, 8, 4, 8, 5, 8, 6, 8, 7
#else
#define HALVES_ORDER 4, 0, 4, 1, 4, 2, 4, 3
#endif
#endif
// Lanes c, c + 2, c + 4 ... of two vectors in a row.
#if VL == 16
#define EVERY_SECOND(c) \
    c, 2 + c, 4 + c, 6 + c, 8 + c, 10 + c, 12 + c, 14 + c, 16 + c, 18 + c, 20 + c, 22 + c, 24 + c, \
        26 + c, 28 + c, 30 + c
#elif VL == 8
#define EVERY_SECOND(c) c, 2 + c, 4 + c, 6 + c, 8 + c, 10 + c, 12 + c, 14 + c
#else
#define EVERY_SECOND(c) c, 2 + c, 4 + c, 6 + c
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#else
typedef float vec;
typedef int32_t ivec;
typedef uint32_t uvec;
typedef uint16_t hvec;
#define LANES_OF(type, v) ((type)(v))
#define MASK(condition) (-(ivec)(condition))
#endif
// A task of scan_backward() has SCAN_WIDTH channels: SCAN_VECTORS vectors.
enum { SCAN_VECTORS = 4, SCAN_WIDTH = SCAN_VECTORS * VL };
#if defined(MAMBA_LEVELS) || defined(MAMBA_LEVEL)
enum { SCAN_WIDEST = 64 }; // of all levels in the program
#else
enum { SCAN_WIDEST = SCAN_WIDTH };
#endif

#if defined(__has_builtin) // gcc from 12, clang
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif
// INLINE: always inlined, so that constant arguments make a kernel of their own.
// NO_INLINE: one piece of machine code, wherever it is called from.
// PREFETCH: the cache line `bytes` after p is fetched while other work goes on.
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(p, bytes) __builtin_prefetch((const void *)((uintptr_t)(p) + (bytes)))
#if defined(__clang__)
#define NO_INLINE static __attribute__((noinline))
#else
#define NO_INLINE static __attribute__((noinline, noclone))
#endif
#else
#define INLINE static inline
#define PREFETCH(p, bytes) ((void)0)
#define NO_INLINE static
#endif

// A short loop over registers: gcc unrolls it at -O2 too. clang does so without being told.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define UNROLLED_FOR(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)
#else
#define UNROLLED_FOR(...) for (__VA_ARGS__)
#endif

// --- memory

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

// load_n, store_n: the first n lanes. Lanes that are not loaded are zero; floats that are not
// stored stay as they were. n < VL is the rare case, kept out of line.
NO_INLINE vec load_part(const float *p, int n) {
    vec v = splat(0);
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
}
NO_INLINE void store_part(float *p, vec v, int n) { memcpy(p, &v, (size_t)n * sizeof(float)); }
INLINE vec load_n(const float *p, int n) { return n == VL ? load(p) : load_part(p, n); }
INLINE void store_n(float *p, vec v, int n) {
    if (n == VL) store(p, v);
    else store_part(p, v, n);
}

// sum + a b, fused where a float has a fused multiply-add. `sum += a * b` on single floats is up to
// the compiler: gcc fuses it in one form of a loop and not in another, where it vectorizes products
// and then adds them one by one. Two forms that must have the same bits use this.
#if VL == 1 && defined(FP_FAST_FMAF)
#define MULTIPLY_ADD(sum, a, b) fmaf(a, b, sum)
#else
#define MULTIPLY_ADD(sum, a, b) ((sum) + (a) * (b))
#endif

// How many lanes a vector that starts at element `at` of `count` has.
INLINE int lanes_left(int at, int count) { return count - at < VL ? count - at : VL; }

// p[c], p[c + 2], p[c + 4] ... with c 0 or 1.
INLINE vec every_second(const float *p, int c) {
#if VL > 1
    vec first = load(p), second = load(p + VL);
    return c ? SHUFFLE(first, second, EVERY_SECOND(1)) : SHUFFLE(first, second, EVERY_SECOND(0));
#else
    return p[c];
#endif
}

// --- across lanes

#if VL > 1
// Adds the upper half of the lanes to the lower half, until four are left.
INLINE vec4 fold_lanes(vec v) {
    vec4 part[VL / 4];
    memcpy(part, &v, sizeof v);
    for (int parts = VL / 8; parts; parts /= 2)
        for (int i = 0; i < parts; i++) part[i] += part[i + parts];
    return part[0];
}
#endif

INLINE float sum_lanes(vec v) {
#if VL > 1
    vec4 p = fold_lanes(v);
    return (p[0] + p[2]) + (p[1] + p[3]);
#else
    return v;
#endif
}

// to (4,4) = from (4,4)^T; ldt and ldf floats between their rows. Scalar code cost 20% of prefill.
INLINE void transpose4(float *to, size_t ldt, const float *from, size_t ldf) {
#if VL > 1 && defined(HAS_SHUFFLE)
    vec4 row[4], pair[4];
    for (int i = 0; i < 4; i++) memcpy(&row[i], from + i * ldf, sizeof row[i]);
    for (int i = 0; i < 2; i++) {
        pair[2 * i] = __builtin_shufflevector(row[i], row[i + 2], 0, 4, 1, 5);
        pair[2 * i + 1] = __builtin_shufflevector(row[i], row[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; i++) {
        row[2 * i] = __builtin_shufflevector(pair[i], pair[i + 2], 0, 4, 1, 5);
        row[2 * i + 1] = __builtin_shufflevector(pair[i], pair[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 4; i++) memcpy(to + i * ldt, &row[i], sizeof row[i]);
#else
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) to[i * ldt + j] = from[j * ldf + i];
#endif
}

// to[i] = sum_lanes(v[i * stride]) (+ bias[i]) for i = 0 .. 3, in one store. Four single sums cost
// 10% of a step of 8 sequences.
INLINE void sum_lanes4(float *to, const vec *v, int stride, const float *bias) {
#if VL > 1
    vec4 p[4], b = {0};
    float lanes[16], across[16];
    for (int i = 0; i < 4; i++) p[i] = fold_lanes(v[i * stride]);
    memcpy(lanes, p, sizeof p);
    transpose4(across, 4, lanes, 4);
    memcpy(p, across, sizeof p);
    if (bias) memcpy(&b, bias, sizeof b);
    p[0] = (p[0] + p[2]) + (p[1] + p[3]) + b;
    memcpy(to, p, sizeof p[0]);
#else
    for (int i = 0; i < 4; i++) to[i] = v[i * stride] + (bias ? bias[i] : 0);
#endif
}

// --- bits and masks

INLINE ivec as_int(vec v) {
    ivec bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
INLINE vec as_float(ivec bits) {
    vec v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
INLINE vec choose(ivec mask, vec yes, vec no) {
    return as_float((as_int(yes) & mask) | (as_int(no) & ~mask));
}
INLINE vec at_least(vec x, float lowest) { return choose(MASK(x < lowest), splat(lowest), x); }

// Whether the condition, a MASK, holds in any lane.
INLINE bool any_lane(ivec mask) {
    int32_t lane[VL], any = 0;
    memcpy(lane, &mask, sizeof mask);
    for (int i = 0; i < VL; i++) any |= lane[i];
    return any != 0;
}

// --- functions

// y, or x where x is a NaN. A NaN of x86, Arm, POWER, RISC-V or s390x has no low bits, and the
// shifts below leave it a NaN. A NaN of MIPS is all ones there. Vectors of one float run anywhere.
INLINE vec keep_nan(vec y, vec x) {
#if VL == 1
    return x == x ? y : x;
#else
    (void)x;
    return y;
#endif
}

// e^x = 2^n e^r with |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves this integer
// in the low bits, from where a shift moves it to the exponent. x is limited to [-86, 88], so that
// 2^n is a normal float: the smallest answer is 4e-38.
INLINE vec exp_vec(vec x) {
    x = choose(MASK(x < -86.0f), splat(-86.0f), choose(MASK(x > 88.0f), splat(88.0f), x));
    vec n = x * 1.44269504f + 12582912.0f;
    ivec exponent = (ivec)((uvec)as_int(n) << 23);
    n = n - 12582912.0f;
    // ln2 has two parts, so that the first product is exact.
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
    // Minimax on [-ln2 / 2, ln2 / 2], relative error 3e-9.
    vec p = 0.0083687101f + r * 0.00138146128f;
    p = 0.0416683890f + r * p;
    p = 0.166665211f + r * p;
    p = 0.499999940f + r * p;
    p = 1.0f + (r + r * r * p);
    return keep_nan(as_float((ivec)((uvec)as_int(p) + (uvec)exponent)), x);
}

// 2^x for -126 <= x <= 0, which the caller must see to. Relative error 2e-7, and half the work of
// exp_vec: the scan takes E N of these a token. Exactly 1 at 0. Near 0, 1 - 2^x is right to 3e-7:
// this difference decides how long a state remembers.
INLINE vec exp2_negative(vec x) {
    vec n = x + 12582912.0f, r = x - (n - 12582912.0f);
    // Minimax on [-1/2, 1/2].
    vec p = 0.00967151299f + r * 0.00132647273f;
    p = 0.0555073359f + r * p;
    p = 0.240222424f + r * p;
    p = 0.693147004f + r * p;
    return keep_nan(as_float((ivec)((uvec)as_int(1.0f + r * p) + ((uvec)as_int(n) << 23))), x);
}

INLINE vec silu_vec(vec x) { return x / (1.0f + exp_vec(-x)); }

// softplus(x) = log(1 + e^x) = max(x, 0) + log1p(e^-|x|), which never overflows.
// log1p(e) = 2 atanh(e / (2 + e)) keeps full relative accuracy where e is tiny. Trained models have
// their delta there (0.001 to 0.1).
INLINE vec softplus_vec(vec x) {
    vec e = exp_vec(as_float(as_int(x) | INT32_MIN));
    vec s = e / (2.0f + e), z = s * s;
    // Minimax for z in [0, 1/9], relative error 4e-9.
    vec p = 0.28001806f + z * 0.28011987f;
    p = 0.400215268f + z * p;
    p = 0.666664183f + z * p;
    vec log1p = s * 2.0f + s * (z * p);
    return choose(MASK(x > 0.0f), x, splat(0)) + log1p;
}

// 1 - e^-x for x >= 0: the derivative of softplus at the point where softplus is x. Below 1/4 the
// difference would cancel, so a series takes its place.
INLINE vec one_minus_exp_minus(vec x) {
    vec p = 0.00833333333f - x * 0.00138888889f;
    p = 0.0416666667f - x * p;
    p = 0.166666667f - x * p;
    p = 0.5f - x * p;
    vec series = x * (1.0f - x * p);
    return choose(MASK(x < 0.25f), series, 1.0f - exp_vec(-x));
}

// --- storage types: VL weights become float32

// VL halves, each as the upper 16 of 32 bits; the lower 16 are 0. gcc's conversion takes the vector
// apart and puts it together again: the shuffle made decoding of bf16 15% faster.
INLINE uvec load_halves(const half *p) {
    hvec bits;
    memcpy(&bits, p, sizeof bits);
#ifdef HALVES_ORDER
    return (uvec)__builtin_shufflevector(bits, (hvec){0}, HALVES_ORDER);
#else
    return LANES_OF(uvec, bits) << 16;
#endif
}

// A bf16 is the upper half of a float32.
INLINE vec from_bf16(uvec wide) { return as_float((ivec)wide); }

// f16: exponent and mantissa move to where float32 has them. Multiplying by 2^(127 - 15) corrects
// the bias of the exponent and makes subnormal numbers exact. Infinities do not occur: export.py
// refuses weights beyond the range of f16.
INLINE vec from_f16(uvec wide) {
    vec magnitude = as_float((ivec)((wide & 0x7FFF0000u) >> 3)) * 0x1p112f;
    return as_float(as_int(magnitude) | (ivec)(wide & 0x80000000u));
}

INLINE vec read_bf16(const half *p) { return from_bf16(load_halves(p)); }
INLINE vec read_f16(const half *p) { return from_f16(load_halves(p)); }
