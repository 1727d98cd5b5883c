// Vectors: every function against the C library in double precision, over all binades.

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

// The worst error, in units of the last place of the exact answer.
static void check_function(const char *name, vec (*f)(vec), double (*exact)(double), float lowest,
                           float highest, double ulps) {
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
            double error = fabs((double)apply(f, x) - want) / unit;
            if (!(error <= worst)) {
                worst = error;
                at = x;
            }
            count++;
        }
    report(worst <= ulps && count > 10000, name, "error %.2f ulp of %.1f, at x = %.9g, %ld values",
           worst, ulps, (double)at, count);
}

static void test_vectors(void) {
    check_function("exp", exp_call, exp, -86, 88, 1.5);
    check_function("2^x", exp2_call, exp2, -126, 0, 2.5);
    expect(apply(exp2_call, 0) == 1 && apply(exp2_call, -1e-9f) == 1 &&
               isnan(apply(exp2_call, NAN)),
           "2^0 is 1, and a NaN stays NaN");
    check_function("silu", silu_call, silu_double, -80, 100, 3);
    check_function("softplus", softplus_call, softplus_double, -86, 100, 3);
    expect(apply(exp_call, -1000) < 1e-37f && apply(exp_call, -1000) >= 0,
           "exp of very negative is nearly 0");
    expect(apply(exp_call, 0) == 1, "exp(0) is 1");
    expect(isnan(apply(exp_call, NAN)) && isnan(apply(silu_call, NAN)) &&
               isnan(apply(softplus_call, NAN)),
           "NaN stays NaN");
    expect(apply(softplus_call, 89) == 89 && isfinite(apply(softplus_call, 1e30f)),
           "softplus does not overflow");
    expect(apply(silu_call, -1e30f) <= 0 && isfinite(apply(silu_call, -1e30f)),
           "silu does not overflow");
    expect(crc32_of(0, "123456789", 9) == 0xCBF43926u, "CRC-32 check value");
    expect(crc32_of(crc32_of(0, "1234", 4), "56789", 5) == 0xCBF43926u, "CRC-32 in pieces");
}
