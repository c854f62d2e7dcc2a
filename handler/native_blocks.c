/* The blocks of an encoder or a decoder in one call, for x86 processors with AVX-512; see native_blocks.py.
 *
 * A step of few rows is limited by reading the weights once, so each weight is stored in the order in which it is
 * read, and all other work (norms, rounding, attention, sums) is done while its rows are in the cache, by threads
 * that only wait for each other between the products.
 *
 * Every row is computed independently of the others, in the same order of additions: the result of a photo never
 * depends on its batch, nor on the number of threads.
 *
 * Weights: panels of PANEL outputs; in each, one step after the other; in each step the 4 bytes of every output:
 * one float32, two bfloat16 or four int8 inputs. Inputs: tiles of at most ROWS rows; in each, the same 4 bytes of
 * every row, step after step. For a matrix unit (AMX), which takes 16 steps of 16 rows at a time, inputs are stored
 * row by row instead.
 */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PANEL 32 /* outputs: two registers */
#define ROWS 11 /* of inputs that share a weight in registers; with 12, gcc spills the sums for some processors */
#define DEPTH 16 /* steps, and most rows, of a tile of the matrix unit */
#define QUERIES 8 /* that share a key in registers */
#define PLACES 32 /* keys: two registers */
#define AHEAD 2048 /* bytes of weights that are fetched before they are needed */
#define ALWAYS static inline __attribute__((always_inline))

enum { FP32, BF16, INT8 };
enum { NONE, GELU, GELU_TANH, QUICK_GELU };

typedef struct {
    const char *weight;
    const float *scale;    /* of each output; NULL for none, never in int8 */
    const int32_t *offset; /* 128 times the sum of each output's weights; int8 only */
    const float *bias;     /* NULL for none */
    int64_t kind, inputs, outputs, activation;
} Linear;

typedef struct {
    const float *weight, *bias; /* NULL where there is no norm */
    double eps;
} Norm;

typedef struct {
    Norm before[3], after[3]; /* of self-attention, cross-attention, MLP */
    Linear qkv, out, cross_q, cross_out, up, down; /* cross: weight NULL where there is none */
} Block;

/* Keys of photos are stored by channel, (B, H, d, places), places a multiple of PLACES. */
typedef struct {
    const Block *blocks;
    int64_t layers, photos, queries, width, heads, hidden, threads;
    int64_t tokens, places, bfloat16; /* of a photo; 0 for none; the type of its keys and values */
    int64_t prefix, image;        /* the photo stands before the text; or x is the photo, and there is no text */
    int64_t used, slots;          /* of the cache: filled before this call, and its size */
    const uint8_t *mask;          /* (B, Q, used + Q), whether a query sees a slot */
    int64_t mask_photo, mask_query;
    void **photo_keys, **photo_values; /* of each layer */
    float **cache_keys, **cache_values; /* (B, H, slots, d) */
    float *weights;                     /* (layers, B, H, Q, tokens) of the photo's tokens, or NULL */
    float *x;                           /* (B * Q, width), replaced */
    char *scratch;
} Run;

#ifdef __AVX512BF16__
ALWAYS __m256i to_bfloat16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
ALWAYS __m512 add_products(__m512 sum, __m512i v, __m512i w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)v, (__m512bh)w);
}
#else /* the same rounding to the nearest, and each product by itself */
ALWAYS __m256i to_bfloat16(__m512 x) {
    __m512i bits = (__m512i)x, odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 broken = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); /* which rounding could make a number */
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(bits, broken, _mm512_set1_epi32(0x7fc0)));
}
ALWAYS __m512 add_products(__m512 sum, __m512i v, __m512i w) {
    __m512i high = _mm512_set1_epi32(0xffff0000);
    sum = _mm512_fmadd_ps((__m512)_mm512_and_epi32(v, high), (__m512)_mm512_and_epi32(w, high), sum);
    return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(v, 16), (__m512)_mm512_slli_epi32(w, 16), sum);
}
#endif

ALWAYS int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define TILE_UNIT 1
static int has_tiles;

/* Whether Linux lets this process use the matrix unit: it must be asked once (ARCH_REQ_XCOMP_PERM, XTILEDATA). */
__attribute__((constructor)) static void ask_for_tiles(void) { has_tiles = !syscall(SYS_arch_prctl, 0x1023, 18); }
#else
#define TILE_UNIT 0
#define has_tiles 0
#endif

/* Where there may be a matrix unit, the last inputs are padded with zeros, to whole tiles. This is decided when it is
 * compiled, not by has_tiles: processes share packed weights. */
ALWAYS int64_t steps_of(int64_t kind, int64_t inputs) {
    int64_t each = kind == FP32 ? 1 : kind == BF16 ? 2 : 4, steps = (inputs + each - 1) / each;
    return TILE_UNIT && kind != FP32 ? up_to(steps, DEPTH) : steps;
}

/* In int8, both ways have the same sums, and few rows are faster without the matrix unit. */
ALWAYS int uses_tiles(int64_t kind, int64_t rows) {
    return has_tiles && (kind == BF16 || (kind == INT8 && rows > ROWS));
}

/* From one row of inputs to the next for the matrix unit; 64 bytes more, or rows would share few sets of the cache. */
ALWAYS int64_t pitch_of(int64_t steps) { return steps * 4 + 64; }

/* Bytes of converted inputs of any kind; the matrix unit reads whole tiles. */
ALWAYS int64_t input_bytes(int64_t rows, int64_t inputs) { return (rows + DEPTH) * 4 * (inputs + 2 * DEPTH); }

int64_t packed_bytes(int64_t kind, int64_t inputs, int64_t outputs) {
    return steps_of(kind, inputs) * 4 * up_to(outputs, PANEL);
}

/* Fewer and larger pages, of which the processor remembers more; where the system has none, nothing changes. */
void use_large_pages(char *memory, int64_t bytes) {
    char *from = (char *)up_to((int64_t)memory, 4096);
    if (memory + bytes > from) madvise(from, memory + bytes - from, MADV_HUGEPAGE);
}

/* Plain (outputs, inputs) to panels. */
void pack(int64_t kind, int64_t inputs, int64_t outputs, const char *plain, char *packed) {
    int64_t size = kind == FP32 ? 4 : kind == BF16 ? 2 : 1, steps = steps_of(kind, inputs);
    for (int64_t o = 0; o < up_to(outputs, PANEL); o++)
        for (int64_t k = 0; k < steps; k++) {
            char *to = packed + ((o / PANEL * steps + k) * PANEL + o % PANEL) * 4;
            int64_t rest = inputs * size - 4 * k;
            memset(to, 0, 4);
            if (o < outputs && rest > 0) memcpy(to, plain + o * inputs * size + 4 * k, rest < 4 ? rest : 4);
        }
}

/* exp, with a relative error of 1e-7: x = n ln 2 + r, and a polynomial in r. NaN, the second operand, stays NaN. */
ALWAYS __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(88.3f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(_mm512_mul_ps(r, r), y, _mm512_add_ps(r, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(y, n);
}

ALWAYS __m512 sigmoid16(__m512 x) {
    __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* The error function by formula 7.1.26 of Abramowitz and Stegun 1964, with an error of 1.5e-7. */
ALWAYS __m512 erf16(__m512 x) {
    __m512 a = _mm512_abs_ps(x), one = _mm512_set1_ps(1);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), one));
    __m512 y = _mm512_set1_ps(1.061405429f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-1.453152027f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f));
    y = _mm512_mul_ps(_mm512_mul_ps(y, t), exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a))));
    y = _mm512_sub_ps(one, y);
    return _mm512_mask_sub_ps(y, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), y);
}

ALWAYS __m512 activate(int64_t which, __m512 x) {
    __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    if (which == GELU) return _mm512_fmadd_ps(half, erf16(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), half);
    if (which == QUICK_GELU) return _mm512_mul_ps(x, sigmoid16(_mm512_mul_ps(x, _mm512_set1_ps(1.702f))));
    if (which == GELU_TANH) {
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
        return _mm512_mul_ps(x, sigmoid16(_mm512_mul_ps(_mm512_add_ps(x, cube), _mm512_set1_ps(1.59576912f))));
    }
    return x;
}

ALWAYS __mmask16 lanes(int64_t rest) { return rest >= 16 ? 0xffff : (__mmask16)((1u << rest) - 1); }

/* How many rows a tile of at most `most` has, if `rows` are divided evenly. */
ALWAYS int64_t tile_of(int64_t rows, int64_t most) {
    int64_t tiles = (rows + most - 1) / most;
    return tiles ? (rows + tiles - 1) / tiles : 0;
}

/* Row `r` of `rows`, as input of a product; `scale` receives that of an int8 row. */
static void convert(int64_t kind, const float *x, int64_t n, int64_t r, int64_t rows, char *inputs, float *scale) {
    int64_t steps = steps_of(kind, n), bytes = steps * 4, tile = tile_of(rows, ROWS);
    int by_row = uses_tiles(kind, rows);
    char own_row[bytes], *to = by_row ? inputs + r * pitch_of(steps) : own_row;
    if (kind == FP32) {
        memcpy(to, x, n * 4);
    } else if (kind == BF16) {
        for (int64_t i = 0; i < n; i += 16) {
            __m256i h = to_bfloat16(_mm512_maskz_loadu_ps(lanes(n - i), x + i));
            _mm256_mask_storeu_epi16(to + 2 * i, lanes(n - i), h);
        }
        if (bytes > 2 * n) memset(to + 2 * n, 0, bytes - 2 * n);
    } else {
        __m512 most = _mm512_setzero_ps();
        __mmask16 broken = 0;
        for (int64_t i = 0; i < n; i += 16) {
            __m512 v = _mm512_maskz_loadu_ps(lanes(n - i), x + i);
            most = _mm512_max_ps(most, _mm512_abs_ps(v));
            broken |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        }
        float step = fmaxf(_mm512_reduce_max_ps(most), 1e-10f) / 127;
        *scale = broken ? NAN : step; /* 8 bits have no NaN */
        for (int64_t i = 0; i < n; i += 16) {
            __m512 y = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i), _mm512_set1_ps(step));
            __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(y), _mm512_set1_epi32(128));
            _mm_mask_storeu_epi8(to + i, lanes(n - i), _mm512_cvtepi32_epi8(q));
        }
        if (bytes > n) memset(to + n, 0, bytes - n); /* their weights are 0 */
    }
    if (by_row) return;
    int64_t first = r / tile * tile, width = rows - first < tile ? rows - first : tile;
    char *own = inputs + (first * steps + r - first) * 4;
    for (int64_t k = 0; k < steps; k++) memcpy(own + k * width * 4, to + 4 * k, 4);
}

static void normalise(const Norm *norm, const float *x, int64_t n, float *to) {
    __m512 sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(n - i), x + i));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / n);
    for (int64_t i = 0; i < n; i += 16) {
        __m512 d = _mm512_maskz_sub_ps(lanes(n - i), _mm512_maskz_loadu_ps(lanes(n - i), x + i), mean);
        square = _mm512_fmadd_ps(d, d, square);
    }
    __m512 gain = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(square) / n + (float)norm->eps));
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 m = lanes(n - i);
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), mean), gain);
        y = _mm512_fmadd_ps(y, _mm512_maskz_loadu_ps(m, norm->weight + i), _mm512_maskz_loadu_ps(m, norm->bias + i));
        _mm512_mask_storeu_ps(to + i, m, y);
    }
}

/* The products of a tile of `rows` rows with one panel; meanwhile `ahead`, so many bytes a step, is fetched. */
ALWAYS void product(int64_t kind, int rows, const char *w, const char *x, int64_t steps, const char *ahead,
                    int64_t bytes, __m512i to[][2]) {
    __m512i sums[ROWS][2]; /* in registers */
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < steps; k++, w += PANEL * 4, x += 4 * rows, ahead += bytes) {
        __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
        _mm_prefetch(ahead, _MM_HINT_T0);
        if (bytes > 64) _mm_prefetch(ahead + 64, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + 4 * r, 4);
            __m512i v = _mm512_set1_epi32(four);
            if (kind == INT8) {
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], v, w0);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], v, w1);
            } else if (kind == BF16) {
                sums[r][0] = (__m512i)add_products((__m512)sums[r][0], v, w0);
                sums[r][1] = (__m512i)add_products((__m512)sums[r][1], v, w1);
            } else {
                sums[r][0] = (__m512i)_mm512_fmadd_ps((__m512)v, (__m512)w0, (__m512)sums[r][0]);
                sums[r][1] = (__m512i)_mm512_fmadd_ps((__m512)v, (__m512)w1, (__m512)sums[r][1]);
            }
        }
    }
    for (int r = 0; r < rows; r++) to[r][0] = sums[r][0], to[r][1] = sums[r][1];
}

#define TILE(n)                                            \
    case n:                                                \
        product(kind, n, w, x, steps, ahead, bytes, sums); \
        break;

ALWAYS void products(int64_t kind, int rows, const char *w, const char *x, int64_t steps, const char *ahead,
                     int64_t bytes, __m512i sums[][2]) {
    switch (rows) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11)
    }
}

#if TILE_UNIT
/* Configures the matrix unit: tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 inputs; all but weights have `rows`. */
static void use_tiles(int64_t rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = i == 4 || i == 5 ? DEPTH : rows;
    /* Not _tile_loadconfig: gcc 12.2 believes that it reads 8 bytes, and may leave the rest unset. */
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

#define TILE_PRODUCT(to, x, w)                \
    if (kind == INT8) _tile_dpbusd(to, x, w); \
    else _tile_dpbf16ps(to, x, w);

/* The products of one tile or `two` with one panel. */
static void tile_products(int64_t kind, int two, int64_t tile, const char *w, const char *x, int64_t steps,
                          const char *ahead, int64_t bytes, __m512i sums[][2]) {
    int64_t pitch = pitch_of(steps);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; k += DEPTH, w += DEPTH * PANEL * 4, x += 4 * DEPTH, ahead += bytes) {
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
        _tile_loadd(4, w, PANEL * 4);
        _tile_loadd(5, w + 64, PANEL * 4);
        _tile_loadd(6, x, pitch);
        if (two) _tile_loadd(7, x + tile * pitch, pitch);
        TILE_PRODUCT(0, 6, 4)
        TILE_PRODUCT(1, 6, 5)
        if (!two) continue;
        TILE_PRODUCT(2, 7, 4)
        TILE_PRODUCT(3, 7, 5)
    }
    _tile_stored(0, sums[0], sizeof sums[0]);
    _tile_stored(1, &sums[0][1], sizeof sums[0]);
    if (!two) return;
    _tile_stored(2, sums[tile], sizeof sums[0]);
    _tile_stored(3, &sums[tile][1], sizeof sums[0]);
}
#else
static void use_tiles(int64_t rows) { (void)rows; }
#define tile_products(...) (void)0
#define _tile_release() (void)0
#endif

/* One thread's part of y = f(x W' + b), or y += with `add`; x converted, with one scale a row in int8. */
static void project(const Linear *l, const char *x, const float *scales, int64_t rows, float *y, int64_t y_stride,
                    int add, int64_t thread, int64_t threads) {
    int64_t steps = steps_of(l->kind, l->inputs), panels = up_to(l->outputs, PANEL) / PANEL;
    int by_tiles = uses_tiles(l->kind, rows), depth = by_tiles ? DEPTH : 1;
    int64_t tile = tile_of(rows, by_tiles ? DEPTH : ROWS), size = steps * PANEL * 4;
    int64_t pitch = by_tiles ? pitch_of(steps) : steps * 4, most = by_tiles ? 2 * tile : tile;
    if (!rows) return;
    if (by_tiles) use_tiles(tile);
    for (int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; p++) {
        const char *w = l->weight + p * size;
        for (int64_t row = 0; row < rows; row += most) {
            int count = rows - row < most ? rows - row : most;
            const char *part = x + row * pitch;
            /* With one round what it needs soon, with several each a part of the next panel. */
            const char *ahead = most >= rows ? w + AHEAD : w + size + size / rows * row;
            int64_t bytes = depth * PANEL * 4 * (most >= rows ? rows : most) / rows;
            __m512i sums[2 * DEPTH][2];
            if (by_tiles) tile_products(l->kind, count > tile, tile, w, part, steps, ahead, bytes, sums);
            else if (l->kind == INT8) products(INT8, count, w, part, steps, ahead, bytes, sums);
            else if (l->kind == BF16) products(BF16, count, w, part, steps, ahead, bytes, sums);
            else products(FP32, count, w, part, steps, ahead, bytes, sums);
            for (int side = 0; side < 2; side++) {
                int64_t column = p * PANEL + side * 16;
                if (column >= l->outputs) break;
                __mmask16 m = lanes(l->outputs - column);
                __m512 bias = l->bias ? _mm512_maskz_loadu_ps(m, l->bias + column) : _mm512_setzero_ps();
                for (int r = 0; r < count; r++) {
                    __m512 v = (__m512)sums[r][side];
                    if (l->kind == INT8) {
                        __m512i exact = _mm512_sub_epi32(sums[r][side], _mm512_maskz_loadu_epi32(m, l->offset + column));
                        __m512 scale = _mm512_maskz_loadu_ps(m, l->scale + column);
                        scale = _mm512_mul_ps(scale, _mm512_set1_ps(scales[row + r]));
                        v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, bias);
                    } else if (l->scale) {
                        v = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(m, l->scale + column), bias);
                    } else {
                        v = _mm512_add_ps(v, bias);
                    }
                    v = activate(l->activation, v);
                    float *to = y + (row + r) * y_stride + column;
                    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(m, to));
                    _mm512_mask_storeu_ps(to, m, v);
                }
            }
        }
    }
    if (by_tiles) _tile_release();
}

ALWAYS __m512 load16(int bfloat16, __mmask16 m, const void *base, int64_t index) {
    if (!bfloat16) return _mm512_maskz_loadu_ps(m, (const float *)base + index);
    __m256i h = _mm256_maskz_loadu_epi16(m, (const uint16_t *)base + index);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}

/* Logits of `count` queries for the tokens of a photo, whose keys are stored by channel. */
ALWAYS void dense_logits(int bfloat16, int count, const float *q, int64_t q_stride, const void *keys, int64_t places,
                         int64_t d, float *logits, int64_t stride) {
    for (int64_t p = 0; p < places; p += PLACES) {
        __m512 sums[QUERIES][2];
        for (int i = 0; i < count; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        for (int64_t j = 0; j < d; j++) {
            __m512 k0 = load16(bfloat16, 0xffff, keys, j * places + p), k1 = load16(bfloat16, 0xffff, keys, j * places + p + 16);
            for (int i = 0; i < count; i++) {
                __m512 one = _mm512_set1_ps(q[i * q_stride + j]);
                sums[i][0] = _mm512_fmadd_ps(one, k0, sums[i][0]);
                sums[i][1] = _mm512_fmadd_ps(one, k1, sums[i][1]);
            }
        }
        for (int i = 0; i < count; i++) {
            _mm512_storeu_ps(logits + i * stride + p, sums[i][0]);
            _mm512_storeu_ps(logits + i * stride + p + 16, sums[i][1]);
        }
    }
}

ALWAYS void dense_values(int bfloat16, int count, const float *weights, int64_t stride, const void *values, int64_t tokens,
                         int64_t d, float *out, int64_t out_stride) {
    for (int64_t j = 0; j < d; j += 32) {
        __m512 sums[QUERIES][2];
        __mmask16 m0 = lanes(d - j), m1 = d - j > 16 ? lanes(d - j - 16) : 0;
        for (int i = 0; i < count; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        for (int64_t p = 0; p < tokens; p++) {
            __m512 v0 = load16(bfloat16, m0, values, p * d + j), v1 = load16(bfloat16, m1, values, p * d + j + 16);
            for (int i = 0; i < count; i++) {
                __m512 w = _mm512_set1_ps(weights[i * stride + p]);
                sums[i][0] = _mm512_fmadd_ps(w, v0, sums[i][0]);
                sums[i][1] = _mm512_fmadd_ps(w, v1, sums[i][1]);
            }
        }
        for (int i = 0; i < count; i++) {
            _mm512_mask_storeu_ps(out + i * out_stride + j, m0, sums[i][0]);
            _mm512_mask_storeu_ps(out + i * out_stride + j + 16, m1, sums[i][1]);
        }
    }
}

/* Either of the two, of photos in either type. */
#define CASES(name, ...) \
    CASE(1, name, __VA_ARGS__) CASE(2, name, __VA_ARGS__) CASE(3, name, __VA_ARGS__) CASE(4, name, __VA_ARGS__) \
    CASE(5, name, __VA_ARGS__) CASE(6, name, __VA_ARGS__) CASE(7, name, __VA_ARGS__) CASE(8, name, __VA_ARGS__)
#define CASE(n, name, ...)                      \
    case n:                                     \
        if (bfloat16) name(1, n, __VA_ARGS__);  \
        else name(0, n, __VA_ARGS__);           \
        break;

static void logits_of(int bfloat16, int count, const float *q, const void *keys, int64_t places, int64_t d,
                      float *logits, int64_t stride) {
    switch (count) { CASES(dense_logits, q, d, keys, places, d, logits, stride) }
}

static void values_of(int bfloat16, int count, const float *weights, int64_t stride, const void *values,
                      int64_t tokens, int64_t d, float *out, int64_t out_stride) {
    switch (count) { CASES(dense_values, weights, stride, values, tokens, d, out, out_stride) }
}

/* Softmax of a row in place; places from `count` up to a multiple of 16 become 0. */
static void softmax(float *x, int64_t count) {
    __m512 low = _mm512_set1_ps(-INFINITY), most = low, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16)
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(low, lanes(count - i), x + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 m = lanes(count - i);
        __m512 y = _mm512_maskz_mov_ps(m, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), most)));
        sum = _mm512_add_ps(sum, y);
        _mm512_storeu_ps(x + i, y);
    }
    __m512 gain = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < count; i += 16) _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), gain));
}

/* Attention of all queries of photo `b` in head `h`, from q to out, rows of which belong to a query. The logits of
 * a query are those of the photo's tokens, then those of the slots that it sees: `counts` of them, in `lists`. */
static void attend(const Run *run, int64_t layer, int64_t b, int64_t h, int photo, int text, const float *q,
                   int64_t q_stride, float *out, const int32_t *lists, const int32_t *counts, float *logits) {
    int64_t d = run->width / run->heads, queries = run->queries, end = run->used + queries;
    int64_t tokens = photo ? run->tokens : 0, stride = up_to(tokens, PLACES) + up_to(end, 16) + 16;
    int64_t unit = b * run->heads + h, size = run->bfloat16 ? 2 : 4;
    const char *keys = photo ? (char *)run->photo_keys[layer] + unit * d * run->places * size : 0;
    const char *values = photo ? (char *)run->photo_values[layer] + unit * d * tokens * size : 0;
    const float *cache_keys = text ? run->cache_keys[layer] + unit * run->slots * d : 0;
    const float *cache_values = text ? run->cache_values[layer] + unit * run->slots * d : 0;
    float scaled[QUERIES * d], root = 1 / sqrtf(d);
    for (int64_t first = 0; first < queries; first += QUERIES) {
        int count = queries - first < QUERIES ? queries - first : QUERIES;
        for (int i = 0; i < count; i++)
            for (int64_t j = 0; j < d; j++)
                scaled[i * d + j] = q[(b * queries + first + i) * q_stride + h * d + j] * root;
        if (photo) logits_of(size == 2, count, scaled, keys, run->places, d, logits, stride);
        for (int i = 0; i < count; i++) {
            int64_t row = b * queries + first + i;
            const int32_t *list = lists + row * end;
            float *own = logits + i * stride;
            int64_t visible = text ? counts[row] : 0;
            for (int64_t s = 0; s < visible; s++) {
                const float *k = cache_keys + list[s] * d;
                __m512 sum = _mm512_setzero_ps();
                for (int64_t j = 0; j < d; j += 16) {
                    __mmask16 m = lanes(d - j);
                    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, scaled + i * d + j), _mm512_maskz_loadu_ps(m, k + j), sum);
                }
                own[tokens + s] = _mm512_reduce_add_ps(sum);
            }
            softmax(own, tokens + visible);
            if (run->weights && photo)
                memcpy(run->weights + (((layer * run->photos + b) * run->heads + h) * queries + first + i) * tokens, own,
                       tokens * 4);
        }
        float *to = out + (b * queries + first) * run->width + h * d;
        if (photo) values_of(size == 2, count, logits, stride, values, tokens, d, to, run->width);
        for (int i = 0; text && i < count; i++) {
            int64_t row = b * queries + first + i;
            const int32_t *list = lists + row * end;
            const float *own = logits + i * stride + tokens;
            for (int64_t j = 0; j < d; j += 16) {
                __mmask16 m = lanes(d - j);
                __m512 sum = photo ? _mm512_maskz_loadu_ps(m, to + i * run->width + j) : _mm512_setzero_ps();
                for (int64_t s = 0; s < counts[row]; s++)
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(own[s]), _mm512_maskz_loadu_ps(m, cache_values + list[s] * d + j), sum);
                _mm512_mask_storeu_ps(to + i * run->width + j, m, sum);
            }
        }
    }
}

/* The keys and values of new tokens, from qkv, to where attention reads them. */
static void keep(const Run *run, int64_t layer, int64_t b, int64_t h, const float *qkv) {
    int64_t width = run->width, d = width / run->heads, unit = b * run->heads + h;
    for (int64_t i = 0; i < run->queries; i++) {
        const float *k = qkv + (b * run->queries + i) * 3 * width + width + h * d, *v = k + width;
        if (run->image) {
            float *keys = (float *)run->photo_keys[layer] + unit * d * run->places;
            for (int64_t j = 0; j < d; j++) keys[j * run->places + i] = k[j];
            memcpy((float *)run->photo_values[layer] + (unit * run->tokens + i) * d, v, d * 4);
        } else {
            int64_t slot = unit * run->slots + run->used + i;
            memcpy(run->cache_keys[layer] + slot * d, k, d * 4);
            memcpy(run->cache_values[layer] + slot * d, v, d * 4);
        }
    }
}

/* Row by row: the norm behind the last branch, the one before the next, and its inputs. */
static void ready(const Norm *after, const Norm *before, int64_t kind, float *x, int64_t width, int64_t from, int64_t to,
                  int64_t rows, char *inputs, float *scales) {
    float row[width];
    for (int64_t r = from; r < to; r++) {
        float *own = x + r * width;
        if (after && after->weight) normalise(after, own, width, own);
        if (!before) continue;
        if (before->weight) normalise(before, own, width, row);
        convert(kind, before->weight ? row : own, width, r, rows, inputs, scales + r);
    }
}

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Parts of the scratch memory, each at a multiple of 64 bytes. */
typedef struct {
    char *inputs;
    float *scales, *qkv, *attended, *hidden, *logits;
    int32_t *lists, *counts;
    int64_t bytes, logits_each;
} Parts;

static Parts parts_of(const Run *run) {
    int64_t rows = run->photos * run->queries, end = run->used + run->queries, at = 0;
    Parts p;
#define PART(name, type, count)                      \
    p.name = (type *)(run->scratch + at);            \
    at += up_to((count) * (int64_t)sizeof(type), 64);
    PART(inputs, char, input_bytes(rows, largest(run->width, run->hidden)))
    PART(scales, float, rows)
    PART(qkv, float, rows * 3 * run->width)
    PART(attended, float, rows * run->width)
    PART(hidden, float, rows * run->hidden)
    p.logits_each = QUERIES * (up_to(run->tokens, PLACES) + up_to(end, 16) + 32);
    PART(logits, float, p.logits_each * run->threads)
    PART(lists, int32_t, run->image ? 0 : rows * end)
    PART(counts, int32_t, rows)
    p.bytes = at;
    return p;
}

int64_t scratch_bytes(const Run *run) { return parts_of(run).bytes; }

enum { READY, PRODUCTS, ATTENTION };

/* For an account of where a step's time goes (tests/benchmarks/account.py), as the first thread sees it. */
#ifdef ACCOUNT
double account[3];
#define START double now = omp_get_wtime();
#define BARRIER(part)                           \
    _Pragma("omp barrier") if (t == 0) {        \
        account[part] -= now;                   \
        account[part] += now = omp_get_wtime(); \
    }
#else
#define START
#define BARRIER(part) _Pragma("omp barrier")
#endif

void run_blocks(const Run *run) {
    int64_t rows = run->photos * run->queries, width = run->width, units = run->photos * run->heads;
    int64_t end = run->used + run->queries;
    Parts s = parts_of(run);
#pragma omp parallel num_threads(run->threads)
    {
        int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
        START
        int64_t from = rows * t / n, to = rows * (t + 1) / n;
        int64_t first = units * t / n, last = units * (t + 1) / n;
        float *logits = s.logits + t * s.logits_each;
        for (int64_t r = from; !run->image && r < to; r++) {
            const uint8_t *mask = run->mask + r / run->queries * run->mask_photo + r % run->queries * run->mask_query;
            int32_t count = 0;
            for (int64_t i = 0; i < end; i++)
                if (mask[i]) s.lists[r * end + count++] = i;
            s.counts[r] = count;
        }
        const Norm *after = NULL;
        for (int64_t layer = 0; layer < run->layers; layer++) {
            const Block *block = run->blocks + layer;
            int64_t kind = block->qkv.kind;
            for (int branch = 0; branch < 3; branch++) { /* self-attention, cross-attention, MLP */
                const Linear *in = (const Linear *[]){&block->qkv, &block->cross_q, &block->up}[branch];
                const Linear *out = (const Linear *[]){&block->out, &block->cross_out, &block->down}[branch];
                if (!in->weight) continue;
                float *made = branch == 2 ? s.hidden : s.qkv, *inside = branch == 2 ? s.hidden : s.attended;
                ready(after, &block->before[branch], kind, run->x, width, from, to, rows, s.inputs, s.scales);
                BARRIER(READY)
                project(in, s.inputs, s.scales, rows, made, in->outputs, 0, t, n);
                BARRIER(PRODUCTS)
                if (branch < 2) {
                    int photo = branch == 1 || run->prefix || run->image, text = branch == 0 && !run->image;
                    for (int64_t unit = first; unit < last; unit++) {
                        int64_t b = unit / run->heads, h = unit % run->heads;
                        if (branch == 0) keep(run, layer, b, h, s.qkv);
                        attend(run, layer, b, h, photo, text, s.qkv, in->outputs, s.attended, s.lists, s.counts,
                               logits);
                    }
                    BARRIER(ATTENTION)
                }
                ready(NULL, &(Norm){0}, kind, inside, out->inputs, from, to, rows, s.inputs, s.scales);
                BARRIER(READY)
                project(out, s.inputs, s.scales, rows, run->x, width, 1, t, n);
                after = &block->after[branch];
                BARRIER(PRODUCTS)
            }
        }
        ready(after, NULL, FP32, run->x, width, from, to, rows, NULL, NULL);
    }
}

int64_t linear_scratch_bytes(const Linear *l, int64_t rows) { return up_to(rows * 4, 64) + input_bytes(rows, l->inputs); }

/* What the structures in native_library.py have to be. */
int64_t layout(int64_t which) { return (int64_t[]){sizeof(Block), sizeof(Run), PLACES, PANEL}[which]; }

/* y (rows, outputs) of x (rows, inputs). */
void run_linear(const Linear *l, const float *x, int64_t rows, float *y, char *scratch, int64_t threads) {
    float *scales = (float *)scratch;
    char *inputs = scratch + up_to(4 * rows, 64);
#pragma omp parallel num_threads(threads)
    {
        int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
        for (int64_t r = rows * t / n; r < rows * (t + 1) / n; r++)
            convert(l->kind, x + r * l->inputs, l->inputs, r, rows, inputs, scales + r);
#pragma omp barrier
        project(l, inputs, scales, rows, y, l->outputs, 0, t, n);
    }
}

/* Recomputes the `count` greatest logits of each row from float32 weights. */
void rescore(float *logits, int64_t rows, int64_t outputs, int64_t count, const float *x, int64_t width,
             const float *weight, const float *bias, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        float *row = logits + r * outputs, best[count];
        int64_t where[count], filled = 0;
        for (int64_t i = 0; i < outputs; i += 16) {
            __mmask16 m = lanes(outputs - i);
            __m512 v = _mm512_maskz_loadu_ps(m, row + i);
            if (filled == count) m = _mm512_mask_cmp_ps_mask(m, v, _mm512_set1_ps(best[count - 1]), _CMP_GT_OQ);
            for (; m; m &= m - 1) {
                int64_t index = i + __builtin_ctz(m), at = filled;
                if (filled < count) filled++;
                else if (row[index] > best[count - 1]) at = count - 1;
                else continue; /* an earlier one of these 16 was greater */
                for (; at > 0 && best[at - 1] < row[index]; at--) best[at] = best[at - 1], where[at] = where[at - 1];
                best[at] = row[index], where[at] = index;
            }
        }
        for (int64_t c = 0; c < filled; c++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < width; j += 16) {
                __mmask16 m = lanes(width - j);
                sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, x + r * width + j),
                                      _mm512_maskz_loadu_ps(m, weight + where[c] * width + j), sum);
            }
            row[where[c]] = _mm512_reduce_add_ps(sum) + bias[where[c]];
        }
    }
}
