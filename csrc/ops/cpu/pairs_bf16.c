/* Products of bfloat16 pairs: vdpbf16ps adds a pair of products to an fp32 sum. Compiled for AVX512_BF16. */
#define B2_SIMD_AVX512
#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

enum { TILE_ROWS = 14, TILE_VECTORS = 2 };

/* Sixteen pairs of one row, zeros behind `count` values. */
B2_INLINE __m512 load_pairs(const float *x, int64_t count)
{
    __m512 low, high;
    if (count >= 32) {
        low = _mm512_loadu_ps(x);
        high = _mm512_loadu_ps(x + 16);
    } else {
        uint32_t some = (1u << count) - 1;
        low = _mm512_maskz_loadu_ps((__mmask16)some, x);
        high = _mm512_maskz_loadu_ps((__mmask16)(some >> 16), x + 16);
    }
    __m512 both;
    __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
    return both;
}

static void pack_rows(uint16_t *dst, const float *x, int64_t ld, int rows, int64_t k)
{
    __mmask16 stored = (__mmask16)((1u << rows) - 1);
    for (int64_t i = 0; i < k; i += 32) {
        int64_t pairs = k - i < 32 ? (k - i + 1) / 2 : 16;
        __m512 t[16];
        B2_UNROLL
        for (int r = 0; r < 16; r++)
            t[r] = r < rows ? load_pairs(x + r * ld + i, k - i) : _mm512_setzero_ps();
        v_transpose(t);
        B2_UNROLL
        for (int j = 0; j < 16; j++)
            if (j < pairs)
                _mm512_mask_storeu_ps(dst + (i + 2 * j) * rows, stored, t[j]);
    }
}

/* Written out because the compiler would spend a register and an instruction on the broadcast. */
B2_INLINE __m512 dot(__m512 acc, __m512 b, const uint16_t *pair)
{
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*(const uint16_t(*)[2])pair));
    return acc;
}

B2_INLINE void tile_body(float *restrict c, const uint16_t *restrict a, const char *restrict b0,
                         const char *restrict b1, int64_t steps, int first, const char *next, size_t next_distance,
                         const int rows)
{
    __m512 acc[TILE_ROWS][TILE_VECTORS];
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            acc[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + (r * TILE_VECTORS + v) * B2_PANEL);
    }
    for (int64_t i = 0; i < steps; i++) {
        __m512 x = _mm512_loadu_ps(b0 + i * 64), y = _mm512_loadu_ps(b1 + i * 64);
        if (next) {
            __builtin_prefetch(next + i * 64, 0, 2);
            __builtin_prefetch(next + next_distance + i * 64, 0, 2);
        }
        B2_UNROLL
        for (int r = 0; r < rows; r++) {
            acc[r][0] = dot(acc[r][0], x, a + (i * rows + r) * 2);
            acc[r][1] = dot(acc[r][1], y, a + (i * rows + r) * 2);
        }
    }
    B2_UNROLL
    for (int r = 0; r < rows; r++) {
        B2_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            _mm512_storeu_ps(c + (r * TILE_VECTORS + v) * B2_PANEL, acc[r][v]);
    }
}

#define DEFINE_TILE(R)                                                                                              \
    static void tile_##R(float *c, const uint16_t *a, const char *b0, const char *b1, int64_t steps, int first,     \
                         const char *next, size_t next_distance)                                                    \
    {                                                                                                               \
        if (next)                                                                                                   \
            tile_body(c, a, b0, b1, steps, first, next, next_distance, R);                                          \
        else                                                                                                        \
            tile_body(c, a, b0, b1, steps, first, NULL, 0, R);                                                      \
    }

DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)
DEFINE_TILE(7)
DEFINE_TILE(8)
DEFINE_TILE(9)
DEFINE_TILE(10)
DEFINE_TILE(11)
DEFINE_TILE(12)
DEFINE_TILE(13)
DEFINE_TILE(14)

typedef void (*tile_fn)(float *, const uint16_t *, const char *, const char *, int64_t, int, const char *, size_t);

static const tile_fn tiles_of[TILE_ROWS] = {tile_1, tile_2, tile_3,  tile_4,  tile_5,  tile_6,  tile_7,
                                            tile_8, tile_9, tile_10, tile_11, tile_12, tile_13, tile_14};

static void tile(float *c, const uint16_t *a, const char *b0, const char *b1, int rows, int64_t steps, int first,
                 const char *next, size_t next_distance)
{
    tiles_of[rows - 1](c, a, b0, b1, steps, first, next, next_distance);
}

/* Ones times zeros: no sum may become subnormal or infinite. */
static double peak(int64_t rounds, float *sink)
{
    enum { CHAINS = 20 };
    __m512 acc[CHAINS], ones = _mm512_castsi512_ps(_mm512_set1_epi16(0x3f80)), zeros = _mm512_setzero_ps();
    B2_UNROLL
    for (int i = 0; i < CHAINS; i++)
        acc[i] = _mm512_set1_ps((float)i);
    for (int64_t n = 0; n < rounds; n++) {
        B2_UNROLL
        for (int i = 0; i < CHAINS; i++)
            __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(acc[i]) : "v"(ones), "v"(zeros));
    }
    *sink = 0;
    B2_UNROLL
    for (int i = 0; i < CHAINS; i++)
        *sink += _mm512_cvtss_f32(acc[i]);
    return 2.0 * 32 * CHAINS * (double)rounds;
}

const b2_pair_kernels b2_pair_kernels_bf16 = {.pack_rows = pack_rows, .tile = tile, .peak = peak};
