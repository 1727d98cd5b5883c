// files/random.h: random numbers, the same on every machine.

// SplitMix64 (Steele, Lea & Flood 2014): one 64-bit word of state, the same stream on every
// machine.
static uint64_t random_u64(uint64_t *state) {
    uint64_t x = *state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Uniform in [0, 1).
static double random_unit(uint64_t *state) { return (double)(random_u64(state) >> 11) * 0x1p-53; }
