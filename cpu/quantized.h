// cpu/quantized.h: Q8 and Q4 weights for the products in cpu/matmul.h. It replaces no operation by
// itself: its functions are the entries of these two types in TYPE_KERNELS.
//
// mamba.c describes the tiles: a word of 32 bits holds 4 or 8 codes of one row of W. The codes stay
// where they lie in their word. `word & mask`, taken as an int32, is (code + shift) 2^(bits j) for
// code j of the word. The power of two is divided out of x beforehand, which is exact. The shift
// (128 or 8, and 0 for the last code of a word) costs the sum of a tile shift * x for each input.
// This is the same for all rows, so it is computed once, as the value that the sum starts with. So
// a weight costs an `and`, a conversion and a multiply-add: 3 / VL instructions, besides 1 / VL
// loads of x for two vectors of rows.
//
// In this file: a panel is TILE rows of W, which is one line of tiles. G is a number of rows of x
// that are multiplied together, index g. `bits` is 8 or 4, a constant wherever it matters.

enum { X_BLOCK = 4096 };               // inputs that are prepared at a time
enum { TILE_X_ROWS = VL > 4 ? 4 : 8 }; // most rows of x that share the conversion of the codes
enum { X_PREPARED = 8 };               // rows of x that are prepared at a time
#define NR (2 * VL)                    // rows of W in a packed strip, see cpu/matmul.h

INLINE uint32_t code_mask(int j, int bits) { return (uint32_t)((1 << bits) - 1) << (bits * j); }
INLINE float code_power(int j, int bits) { return 1.0f / (float)((uint32_t)1 << (bits * j)); }
INLINE float code_shift(int j, int bits) {
    return j == 32 / bits - 1 ? 0 : (float)(1 << (bits - 1));
}
// VL words from word i of a tile on.
INLINE uvec load_words(const unsigned char *tile, int i) {
    uvec words;
    memcpy(&words, tile + TILE_SCALES + (size_t)i * 4, sizeof words);
    return words;
}
// The scales of VL rows of a tile, from row r on.
INLINE vec load_scales(const unsigned char *tile, int r) {
    return read_bf16((const half *)(const void *)tile + r);
}

// xs (n rounded up to TILE) = x (n), each input divided by the power of two of its code.
// sum_start (tiles of n) = minus what the shifts add to the sum over a tile.
INLINE void tile_prepare(float *xs, float *sum_start, const float *x, int n, int bits) {
    float power[TILE], shift[TILE];
    for (int i = 0; i < TILE; i++) {
        power[i] = code_power(i % (32 / bits), bits);
        shift[i] = code_shift(i % (32 / bits), bits);
    }
    for (int i0 = 0; i0 < n; i0 += TILE) {
        vec sum = splat(0);
        for (int i = 0; i < TILE; i += VL) {
            vec v = i0 + i < n ? load_n(x + i0 + i, lanes_left(i0 + i, n)) : splat(0);
            store(xs + i0 + i, v * load(power + i));
            sum -= v * load(shift + i);
        }
        sum_start[i0 / TILE] = sum_lanes(sum);
    }
}

typedef struct {               // one or two panels times some rows of x
    const unsigned char *tile; // the first tile of the panel
    size_t pair_bytes;         // from it to the first tile of a second panel; 0: there is none
    const float *xs;           // (G,tiles TILE) rows of x, see tile_prepare()
    const float *sum_start;    // (G,tiles)
    int tiles;                 // of a panel
} TileDots;

// out (panels,G,TILE) = the TILE rows of each panel times G rows of x. Writing text with Q8 and Q4
// spends its time in this loop.
//
// A row's sum over a tile is one chain of multiply-adds, in the same order for any G and any number
// of panels. A multiply-add takes 4 cycles and two may start in each cycle, so 8 chains must be
// under way at once: vectors of rows times rows of x, which share the conversion. One row of x
// times the vectors of a panel may be fewer than 8. Then two panels are taken at once.
INLINE void tile_dots(float *out, const TileDots *d, int bits, const int panels, const int G) {
    enum { CHAINS = 8, WIDEST = TILE / VL < CHAINS ? TILE / VL : CHAINS };
    enum { PREFETCH_BYTES = 3072 }; // three tiles of Q8: 25% more tokens/s (Q8), 40% (Q4)
    const int vectors = CHAINS / (panels * G) < WIDEST ? CHAINS / (panels * G) : WIDEST;
    const unsigned char *tile = d->tile;
    const size_t pair_bytes = d->pair_bytes;
    const float *xs = d->xs, *sum_start = d->sum_start;
    const int tiles = d->tiles;
    vec total[2][TILE / VL][TILE_X_ROWS];
    for (int p = 0; p < panels; p++)
        for (int v = 0; v < TILE / VL; v++)
            UNROLLED_FOR (int g = 0; g < G; g++) total[p][v][g] = splat(0);
    for (int k = 0; k < tiles; k++, tile += TILE_SCALES + bits * TILE * 4, xs += TILE)
        for (int v0 = 0; v0 < TILE / VL; v0 += vectors) {
            vec sum[2][WIDEST][TILE_X_ROWS];
            UNROLLED_FOR (int p = 0; p < panels; p++)
                UNROLLED_FOR (int v = 0; v < vectors; v++)
                    UNROLLED_FOR (int g = 0; g < G; g++)
                        sum[p][v][g] = splat(sum_start[g * tiles + k]);
            for (int i = 0; i < bits; i++)
                UNROLLED_FOR (int p = 0; p < panels; p++) {
                    const unsigned char *at = tile + p * pair_bytes;
                    uvec word[WIDEST];
                    if (v0 == 0) {
                        PREFETCH(at, TILE_SCALES + i * TILE * 4 + PREFETCH_BYTES);
                        PREFETCH(at, TILE_SCALES + i * TILE * 4 + PREFETCH_BYTES + 64);
                    }
                    UNROLLED_FOR (int v = 0; v < vectors; v++)
                        word[v] = load_words(at, i * TILE + (v0 + v) * VL);
                    UNROLLED_FOR (int j = 0; j < 32 / bits; j++)
                        UNROLLED_FOR (int v = 0; v < vectors; v++) {
                            vec code = LANES_OF(vec, (ivec)(word[v] & code_mask(j, bits)));
                            UNROLLED_FOR (int g = 0; g < G; g++)
                                sum[p][v][g] = MULTIPLY_ADD(
                                    sum[p][v][g], code, xs[g * tiles * TILE + i * (32 / bits) + j]);
                        }
                }
            UNROLLED_FOR (int p = 0; p < panels; p++)
                UNROLLED_FOR (int v = 0; v < vectors; v++)
                    UNROLLED_FOR (int g = 0; g < G; g++)
                        total[p][v0 + v][g] = MULTIPLY_ADD(
                            total[p][v0 + v][g], load_scales(tile + p * pair_bytes, (v0 + v) * VL),
                            sum[p][v][g]);
        }
    for (int p = 0; p < panels; p++)
        for (int v = 0; v < TILE / VL; v++)
            UNROLLED_FOR (int g = 0; g < G; g++)
                store(out + (p * G + g) * TILE + v * VL, total[p][v][g]);
}

// The form of tile_dots() for at most `rows` rows of x, or for two panels. Returns its G.
INLINE int tile_dots_up_to(float *out, const TileDots *d, int rows, int bits) {
    if (d->pair_bytes) {
        tile_dots(out, d, bits, 2, 1);
        return 1;
    }
    if (rows >= 8 && TILE_X_ROWS == 8) {
        tile_dots(out, d, bits, 1, TILE_X_ROWS);
        return 8;
    }
    if (rows >= 4) {
        tile_dots(out, d, bits, 1, 4);
        return 4;
    }
    if (rows >= 2) {
        tile_dots(out, d, bits, 1, 2);
        return 2;
    }
    tile_dots(out, d, bits, 1, 1);
    return 1;
}

// strip (tiles TILE,NR) = rows r .. r + NR of a panel's tiles, as float32: one input a row.
INLINE void tile_unpack(float *strip, const unsigned char *tile, int r, int tiles, int bits) {
    for (int k = 0; k < tiles; k++, tile += TILE_SCALES + bits * TILE * 4, strip += TILE * NR)
        for (int v = 0; v < NR; v += VL) {
            vec scale = load_scales(tile, r + v);
            for (int i = 0; i < bits; i++) {
                uvec word = load_words(tile, i * TILE + r + v);
                UNROLLED_FOR (int j = 0; j < 32 / bits; j++) {
                    vec shifted = LANES_OF(vec, (ivec)(word & code_mask(j, bits)));
                    vec code = shifted * code_power(j, bits) - code_shift(j, bits);
                    store(strip + (i * (32 / bits) + j) * NR + v, code * scale);
                }
            }
        }
}

static void prepare_q8(float *xs, float *sum_start, const float *x, int n) {
    tile_prepare(xs, sum_start, x, n, 8);
}
static void prepare_q4(float *xs, float *sum_start, const float *x, int n) {
    tile_prepare(xs, sum_start, x, n, 4);
}
static int dots_q8(float *out, const TileDots *d, int rows) {
    return tile_dots_up_to(out, d, rows, 8);
}
static int dots_q4(float *out, const TileDots *d, int rows) {
    return tile_dots_up_to(out, d, rows, 4);
}
static void unpack_q8(float *strip, const unsigned char *tile, int r, int tiles) {
    tile_unpack(strip, tile, r, tiles, 8);
}
static void unpack_q4(float *strip, const unsigned char *tile, int r, int tiles) {
    tile_unpack(strip, tile, r, tiles, 4);
}
