/* What every kernel shares: the blocks of rows it works on, stored numbers as vectors of 16 floats, and (in row.inc, once
 * for each pair of types) how a row is measured and brought into its ball.
 *
 * The promise is that of docs/exactness.md. Sums are taken in an order that depends on the length of a row alone, so
 * that results have the same bits on any number of threads. Nothing here needs -ffast-math: vectors are explicit. A
 * compiler may contract a * b + c to one rounding; every bound below holds with it and without.
 */
#ifndef TETHERTUNE_BALL_H
#define TETHERTUNE_BALL_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

#define ERROR 0x1p-16  /* the largest relative error of a measured sum: at most 128 roundings of 2^-24 */
#define AIM 0x1p-15    /* the share of the radius by which scaling in float32 aims inside */
#define MARGIN 0x1p-40 /* the same for arithmetic in double, whose sums may be taken in any order */
#define FAR 1e15       /* times the radius; from there a scale could lose digits */
#define NEAR 0x1p8     /* times the radius; up to there float32 finds the threshold of the Euclidean projection */
#define SMALLEST 1e-15 /* a distance whose square float32 still holds with all its digits */

enum { LANES = 16, FLUSH = 2048 }; /* 2048 / 16: at most 128 additions a lane, then on to double */
enum { PART = 4 * LANES };         /* what a measure adds up in float32 */
enum { PIECE = 1 << 15 };          /* elements of a row of a Frobenius ball that have a sum of their own */
enum { F32, BF16, F16, ZERO };     /* types; ZERO for a centre that is 0 */
enum { INSIDE, CHANGED, BROKEN };  /* what has been found of a row */
enum { RADIAL, EUCLIDEAN };

/* A block of rows. Each row is a gapless stretch of memory, in the same order in weights and centre; pointers need be
 * aligned to their own type only. native.py has the same struct. */
struct block {
    void *w;              /* weights; changed where a row is outside */
    const void *c;        /* centre; NULL: 0 */
    const double *radius; /* of each row; for a Frobenius ball the first is that of the block's layer */
    double size;          /* the largest norm of a row of the centre (of the layer, Frobenius); INFINITY: not known */
    int64_t rows, columns, w_step, c_step; /* steps from row to row in elements */
    int32_t w_type, c_type;
    int64_t outside, broken; /* counted by the kernels: rows that were outside, rows (layers) that are not finite */
};

static inline int64_t pieces_of(const struct block *block) {
    return block->rows * ((block->columns + PIECE - 1) / PIECE);
}

/* Bring layers into their Frobenius balls whose pieces have been measured (`measure`, power 2) into `sums`, in order;
 * project.c. Returns the number of layers that are not finite, or -1 without memory. */
int64_t settle_frobenius(struct block *blocks, int64_t count, double *sums, int threads);

/* The least radius that scaling in float32 surely reaches around a centre of this norm. It rounds a weight w with the
 * displacement t by at most u|w| + 4u|t|, u = 2^-24, a row by u (size + 5 radius); there is room for AIM / 4. */
static inline double least_radius(double size) {
    return fmax(0x1p-24 * size / (AIM / 4 - 5 * 0x1p-24), 1e-30);
}

/* ------------------------------------------------------------------------------------------------------- vectors */

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t masks __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef float eight_floats __attribute__((vector_size(32)));
typedef double doubles __attribute__((vector_size(64)));
typedef int64_t longs __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline, unused))

INLINE floats choose(masks mask, floats yes, floats no) { return (floats)(((masks)yes & mask) | ((masks)no & ~mask)); }
INLINE words choose_words(masks mask, words yes, words no) { return (yes & (words)mask) | (no & ~(words)mask); }
INLINE floats absolute(floats x) { return (floats)((words)x & 0x7fffffffu); }
INLINE doubles absolute_doubles(doubles x) { return (doubles)((longs)x & INT64_MAX); }

/* The 16 floats as two vectors of 8 doubles, and back to the nearest floats. */
INLINE void widen(floats x, doubles *low, doubles *high) {
    eight_floats half[2];
    memcpy(half, &x, sizeof x);
    *low = __builtin_convertvector(half[0], doubles);
    *high = __builtin_convertvector(half[1], doubles);
}

INLINE floats narrow(doubles low, doubles high) {
    eight_floats half[2] = {__builtin_convertvector(low, eight_floats), __builtin_convertvector(high, eight_floats)};
    floats x;
    memcpy(&x, half, sizeof x);
    return x;
}

INLINE double add_up_doubles(doubles x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE double add_up(floats x) {
    doubles low, high;
    widen(x, &low, &high);
    return add_up_doubles(low + high);
}

/* ------------------------------------------------------------------------------------- stored numbers as 16 floats */

typedef float f32;
typedef uint16_t bf16;
typedef uint16_t f16;
typedef char zero; /* a centre that is not stored */

/* Up to 16 numbers of memory, the rest 0; or back. Fewer than 16 go in pieces of a fixed size, which are plain moves;
 * where there are masked moves these read them, because a vector is slow to read right after its pieces were written
 * (and memory near a masked write is slow to read after it). */
INLINE void copy_part(char *to, const char *from, int64_t n, const size_t size) {
    if (n & 8) memcpy(to, from, 8 * size), to += 8 * size, from += 8 * size;
    if (n & 4) memcpy(to, from, 4 * size), to += 4 * size, from += 4 * size;
    if (n & 2) memcpy(to, from, 2 * size), to += 2 * size, from += 2 * size;
    if (n & 1) memcpy(to, from, size);
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
INLINE floats take_part_32(const void *p, int64_t n) { return (floats)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
INLINE shorts take_part_16(const void *p, int64_t n) { return (shorts)_mm256_maskz_loadu_epi16((1u << n) - 1, p); }
#else
INLINE floats take_part_32(const void *p, int64_t n) {
    floats x = {0};
    copy_part((char *)&x, p, n, 4);
    return x;
}
INLINE shorts take_part_16(const void *p, int64_t n) {
    shorts x = {0};
    copy_part((char *)&x, p, n, 2);
    return x;
}
#endif

INLINE floats take_32(const void *p, int64_t n) {
    floats x;
    if (n < LANES) return take_part_32(p, n);
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE words take_16(const void *p, int64_t n) {
    shorts x;
    if (n < LANES) {
        x = take_part_16(p, n);
    } else {
        memcpy(&x, p, sizeof x);
    }
    return __builtin_convertvector(x, words);
}

INLINE void put_32(void *p, int64_t n, floats x) {
    if (n < LANES) {
        copy_part(p, (const char *)&x, n, 4);
    } else {
        memcpy(p, &x, sizeof x);
    }
}

INLINE void put_16(void *p, int64_t n, words x) {
    shorts h = __builtin_convertvector(x, shorts);
    if (n < LANES) {
        copy_part(p, (const char *)&h, n, 2);
    } else {
        memcpy(p, &h, sizeof h);
    }
}

/* load_T(p, n): the first min(n, 16) stored numbers, the rest of the vector 0. */
INLINE floats load_f32(const f32 *p, int64_t n) { return take_32(p, n); }

INLINE floats load_bf16(const bf16 *p, int64_t n) { return (floats)(take_16(p, n) << 16); }

INLINE floats load_f16(const f16 *p, int64_t n) {
    words h = take_16(p, n), size = h & 0x7fffu;
    words normal = (size << 13) + (112u << 23);
    words infinite = (size << 13) | 0x7f800000u;
    floats subnormal = __builtin_convertvector((masks)size, floats) * 0x1p-24f;
    words x = choose_words(size < 0x400u, (words)subnormal, choose_words(size >= 0x7c00u, infinite, normal));
    return (floats)(x | ((h & 0x8000u) << 16));
}

INLINE floats load_zero(const zero *p, int64_t n) {
    (void)p, (void)n;
    return (floats){0};
}

/* store_T(p, n, x): the first min(n, 16) numbers, rounded to the nearest stored ones, ties to even. */
INLINE void store_f32(f32 *p, int64_t n, floats x) { put_32(p, n, x); }

INLINE void store_bf16(bf16 *p, int64_t n, floats x) {
    words bits = (words)x;
    words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    put_16(p, n, choose_words((bits & 0x7fffffffu) > 0x7f800000u, (bits >> 16) | 0x40u, rounded));
}

INLINE void store_f16(f16 *p, int64_t n, floats x) {
    words bits = (words)x, size = bits & 0x7fffffffu;
    words shifted = size - (112u << 23);
    words normal = (shifted + 0xfffu + ((shifted >> 13) & 1u)) >> 13;
    words subnormal = (words)((floats)size + 0.5f) - 0x3f000000u; /* 0.5 has the unit of the subnormal numbers */
    words h = choose_words(size < 0x38800000u, subnormal, normal);
    h = choose_words(size >= 0x477ff000u, (words){0} + 0x7c00u, h);
    h = choose_words(size > 0x7f800000u, (words){0} + 0x7e00u, h);
    put_16(p, n, h | ((bits >> 16) & 0x8000u));
}

#define is_f32 F32
#define is_bf16 BF16
#define is_f16 F16

/* Whether the first type has every number of the second. */
#define holds_f32(C_TYPE) 1
#define holds_bf16(C_TYPE) ((C_TYPE) == BF16 || (C_TYPE) == ZERO)
#define holds_f16(C_TYPE) ((C_TYPE) == F16 || (C_TYPE) == ZERO)

/* The stored number after the given one in the direction of its centre; sign and magnitude as ordered integers. */
#define STEP(T, integer, lowest)                                            \
    INLINE T step_##T(T w, int direction) {                                 \
        integer bits;                                                       \
        memcpy(&bits, &w, sizeof bits);                                     \
        integer ordered = (integer)(bits < 0 ? (lowest) - bits : bits);     \
        ordered = (integer)(ordered + direction);                           \
        bits = (integer)(ordered < 0 ? (lowest) - ordered : ordered);       \
        memcpy(&w, &bits, sizeof w);                                        \
        return w;                                                           \
    }
STEP(f32, int32_t, INT32_MIN)
STEP(bf16, int16_t, INT16_MIN)
STEP(f16, int16_t, INT16_MIN)
#undef STEP

/* ------------------------------------------------------------------------------------------------- shrinking */

/* How displacements t shrink in double: to t * scale; Euclidean, to sign(t) * max(height - (top - |t|), 0) * scale. */
struct shrinking {
    double scale, top, height;
};

INLINE doubles kept_of(doubles t, struct shrinking by) {
    doubles kept = by.height - (by.top - absolute_doubles(t));
    return (doubles)((longs)kept & (kept > 0));
}

INLINE doubles shrunk(doubles w, doubles c, struct shrinking by, const int projection) {
    doubles t = w - c;
    if (projection == RADIAL) return c + t * by.scale;
    longs sign = (longs)t & INT64_MIN;
    return c + (doubles)((longs)(kept_of(t, by) * by.scale) | sign);
}

/* ------------------------------------------------------------------------------------------- rows, by pair of types */

#define PASTE(a, b, c) a##_##b##_##c
#define EXPAND(a, b, c) PASTE(a, b, c)
#define NAME(function) EXPAND(function, W, C) /* e.g. measure_f32_bf16 */
#define PASTE_TWO(a, b) a##b
#define OF(prefix, type) PASTE_TWO(prefix, type)

/* pairs.inc includes PAIR_BODY once for each pair, with W, C and C_TYPE defined. */
#define PAIR_BODY "row.inc"
#include "pairs.inc"
#undef PAIR_BODY

#endif
