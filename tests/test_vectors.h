// Vectors: every function against the C library in double precision, over all binades.

#ifndef PLAIN
static float apply(vec (*f)(vec), float x) {
    float lane[VL];
    vec v = f(splat(x));
    memcpy(lane, &v, sizeof v);
    for (int i = 1; i < VL; i++)
        if (memcmp(&lane[i], &lane[0], sizeof(float))) return NAN; // lanes must agree
    return lane[0];
}
static vec exp_call(vec x) { return exp_vec(x); }
static vec exp2_call(vec x) { return exp2_negative(x); }
static vec silu_call(vec x) { return silu_vec(x); }
static vec softplus_call(vec x) { return softplus_vec(x); }
static float fast_exp(float x) { return apply(exp_call, x); }
static float fast_exp2(float x) { return apply(exp2_call, x); }
static float fast_silu(float x) { return apply(silu_call, x); }
static float fast_softplus(float x) { return apply(softplus_call, x); }
#endif

// The worst error, in units of the last place of the exact answer.
static void check_function(const char *name, float (*f)(float), double (*exact)(double),
                           float lowest, float highest, double ulps) {
    double worst = 0;
    float at = 0;
    long count = 0;
    for (int sign = 0; sign < 2; sign++)
        for (uint32_t bits = 0x20000000; bits < 0x43000000; bits += test_everything ? 97 : 4999) {
            float x;
            uint32_t signed_bits = bits | (uint32_t)sign << 31;
            memcpy(&x, &signed_bits, sizeof x);
            if (x < lowest || x > highest) continue;
            double want = exact((double)x), unit = ldexp(1, ilogb(want) - 23);
            double error = fabs((double)f(x) - want) / unit;
            if (!(error <= worst)) {
                worst = error;
                at = x;
            }
            count++;
        }
    report(worst <= ulps && count > 10000, name, "error %.2f ulp of %.1f, at x = %.9g, %ld values",
           worst, ulps, (double)at, count);
}

// What every form of softplus and SiLU must do at the ends of their range.
static void check_ends(float (*softplus_of)(float), float (*silu_of)(float), const char *form) {
    char name[96];
    snprintf(name, sizeof name, "softplus does not overflow, %s", form);
    expect(softplus_of(89) == 89 && isfinite(softplus_of(1e30f)), name);
    snprintf(name, sizeof name, "silu does not overflow, %s", form);
    expect(silu_of(-1e30f) <= 0 && isfinite(silu_of(-1e30f)), name);
    snprintf(name, sizeof name, "NaN stays NaN, %s", form);
    expect(isnan(silu_of(NAN)) && isnan(softplus_of(NAN)), name);
}

static void test_vectors(void) {
#ifndef PLAIN
    check_function("exp", fast_exp, exp, -86, 88, 1.5);
    check_function("2^x", fast_exp2, exp2, -126, 0, 2.5);
    expect(fast_exp2(0) == 1 && fast_exp2(-1e-9f) == 1 && isnan(fast_exp2(NAN)),
           "2^0 is 1, and a NaN stays NaN");
    check_function("silu", fast_silu, silu_double, -80, 100, 3);
    check_function("softplus", fast_softplus, softplus_double, -86, 100, 3);
    check_ends(fast_softplus, fast_silu, "fast");
    expect(fast_exp(-1000) < 1e-37f && fast_exp(-1000) >= 0, "exp of very negative is nearly 0");
    expect(fast_exp(0) == 1 && isnan(fast_exp(NAN)), "exp(0) is 1, and a NaN stays NaN");
#endif
    check_function("silu, plain", silu, silu_double, -80, 100, 3);
    check_function("softplus, plain", softplus, softplus_double, -86, 100, 3);
    check_ends(softplus, silu, "plain");
    expect(crc32_of(0, "123456789", 9) == 0xCBF43926u, "CRC-32 check value");
    expect(crc32_of(crc32_of(0, "1234", 4), "56789", 5) == 0xCBF43926u, "CRC-32 in pieces");
}
