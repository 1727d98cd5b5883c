// --- Q8 and Q4: codes stay where they lie in their words. word & mask, as an int32, is the code
// (plus `shift`, but for the last of a word) times 2^(bits * j); the power of two goes into x
// beforehand, exactly, and the shift out of a group's sum, the same for all rows. So a weight costs
// and, convert, multiply-add: 3/VL instructions, besides 1/VL loads of x for two vectors of rows.

enum {
    X_BLOCK = 4096,
    TILES_AT_ONCE = VL > 4 ? 4 : 8
}; // inputs that are prepared at a time; rows of x that share a conversion
#define NR (2 * VL) // rows of W in a packed panel, see matmul

INLINE uint32_t code_mask(int j, int bits) { return (uint32_t)((1 << bits) - 1) << (bits * j); }
INLINE float code_power(int j, int bits) { return 1.0f / (float)((uint32_t)1 << (bits * j)); }
INLINE float code_shift(int j, int bits) {
    return j == 32 / bits - 1 ? 0 : (float)(1 << (bits - 1));
}
INLINE uvec load_words(const unsigned char *tile, int i) {
    uvec words;
    memcpy(&words, tile + TILE_SCALES + (size_t)i * 4, sizeof words);
    return words;
}
INLINE vec load_scales(const unsigned char *tile, int r) {
    return read_bf16((const half *)(const void *)tile + r);
}

// xs (n rounded up to TILE) = x, each input divided by its code's power of two; start[tile] = minus
// what the shifts add up to.
INLINE void tile_prepare(float *xs, float *start, const float *x, int n, int bits) {
    float power[TILE], shift[TILE];
    for (int k = 0; k < TILE; k++)
        power[k] = code_power(k % (32 / bits), bits), shift[k] = code_shift(k % (32 / bits), bits);
    for (int k0 = 0; k0 < n; k0 += TILE) {
        vec sum = splat(0);
        for (int k = 0; k < TILE; k += VL) {
            vec v = k0 + k < n ? load_n(x + k0 + k, lanes_left(k0 + k, n)) : splat(0);
            store(xs + k0 + k, v * load(power + k));
            sum -= v * load(shift + k);
        }
        start[k0 / TILE] = sum_lanes(sum);
    }
}

// out (T,TILE) = the TILE rows of a panel times T rows of x, each `tiles` tiles: the loop where
// writing text spends its time. A row's sum over a tile is one chain of multiply-adds, in the same
// order for any T and P; one takes 4 cycles and two may start in each, so 8 chains are on the way
// at once: some vectors of rows by some rows of x, which share the conversion. One row of x by the
// vectors of a panel may be fewer; then P = 2 panels, `apart` bytes from each other, are taken at
// once: out (P,TILE).
INLINE void tile_dots(float *out, const unsigned char *tile, size_t apart, const float *xs,
                      const float *start, int tiles, int bits, const int P, const int T) {
    enum { CHAINS = 8, WIDEST = TILE / VL < CHAINS ? TILE / VL : CHAINS };
    const int vectors = CHAINS / (P * T) < WIDEST ? CHAINS / (P * T) : WIDEST;
    vec total[2][TILE / VL][TILES_AT_ONCE];
    for (int p = 0; p < P; p++)
        for (int v = 0; v < TILE / VL; v++)
            UNROLLED_FOR (int t = 0; t < T; t++) total[p][v][t] = splat(0);
    for (int g = 0; g < tiles; g++, tile += TILE_SCALES + bits * TILE * 4, xs += TILE)
        for (int v0 = 0; v0 < TILE / VL; v0 += vectors) {
            vec sum[2][WIDEST][TILES_AT_ONCE];
            UNROLLED_FOR (int p = 0; p < P; p++)
                UNROLLED_FOR (int v = 0; v < vectors; v++)
                    UNROLLED_FOR (int t = 0; t < T; t++) sum[p][v][t] = splat(start[t * tiles + g]);
            for (int i = 0; i < bits; i++)
                UNROLLED_FOR (int p = 0; p < P; p++) {
                    const unsigned char *at = tile + p * apart;
                    uvec word[WIDEST];
                    if (v0 == 0) { // what comes three tiles on: a quarter (q8) to two fifths (q4)
                                   // more tokens a second
                        PREFETCH(at, TILE_SCALES + i * TILE * 4 + 3072);
                        PREFETCH(at, TILE_SCALES + i * TILE * 4 + 3072 + 64);
                    }
                    UNROLLED_FOR (int v = 0; v < vectors; v++)
                        word[v] = load_words(at, i * TILE + (v0 + v) * VL);
                    UNROLLED_FOR (int j = 0; j < 32 / bits; j++)
                        UNROLLED_FOR (int v = 0; v < vectors; v++) {
                            vec code = LANES_OF(vec, (ivec)(word[v] & code_mask(j, bits)));
                            UNROLLED_FOR (int t = 0; t < T; t++)
                                sum[p][v][t] += code * xs[t * tiles * TILE + i * (32 / bits) + j];
                        }
                }
            UNROLLED_FOR (int p = 0; p < P; p++)
                UNROLLED_FOR (int v = 0; v < vectors; v++)
                    UNROLLED_FOR (int t = 0; t < T; t++)
                        total[p][v0 + v][t] +=
                            load_scales(tile + p * apart, (v0 + v) * VL) * sum[p][v][t];
        }
    for (int p = 0; p < P; p++)
        for (int v = 0; v < TILE / VL; v++)
            UNROLLED_FOR (int t = 0; t < T; t++)
                store(out + (p * T + t) * TILE + v * VL, total[p][v][t]);
}

// panel (tiles * TILE, NR) = NR rows, from row r of the tiles on, as float32 and depth-major.
INLINE void tile_unpack(float *panel, const unsigned char *tile, int r, int tiles, int bits) {
    for (int g = 0; g < tiles; g++, tile += TILE_SCALES + bits * TILE * 4, panel += TILE * NR)
        for (int v = 0; v < NR; v += VL) {
            vec scale = load_scales(tile, r + v);
            for (int i = 0; i < bits; i++) {
                uvec word = load_words(tile, i * TILE + r + v);
                UNROLLED_FOR (int j = 0; j < 32 / bits; j++) {
                    vec code =
                        LANES_OF(vec, (ivec)(word & code_mask(j, bits))) * code_power(j, bits) -
                        code_shift(j, bits);
                    store(panel + (i * (32 / bits) + j) * NR + v, code * scale);
                }
            }
        }
}

#define TILE_KERNELS(name, bits) \
    static void prepare_##name(float *xs, float *start, const float *x, int n) { \
        tile_prepare(xs, start, x, n, bits); \
    } \
    static int dots_##name(float *out, const unsigned char *tile, size_t apart, const float *xs, \
                           const float *start, int tiles, int T) { \
        if (apart) return tile_dots(out, tile, apart, xs, start, tiles, bits, 2, 1), 1; \
        if (T >= 8 && TILES_AT_ONCE == 8) \
            return tile_dots(out, tile, 0, xs, start, tiles, bits, 1, TILES_AT_ONCE), 8; \
        if (T >= 4) return tile_dots(out, tile, 0, xs, start, tiles, bits, 1, 4), 4; \
        if (T >= 2) return tile_dots(out, tile, 0, xs, start, tiles, bits, 1, 2), 2; \
        return tile_dots(out, tile, 0, xs, start, tiles, bits, 1, 1), 1; \
    } \
    static void unpack_##name(float *panel, const unsigned char *tile, int r, int tiles) { \
        tile_unpack(panel, tile, r, tiles, bits); \
    }
TILE_KERNELS(q8, 8)
TILE_KERNELS(q4, 4)
