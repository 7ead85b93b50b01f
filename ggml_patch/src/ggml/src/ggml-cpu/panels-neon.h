// Vectors of panels-kernel.cpp: NEON with its byte dot product, and with the product of byte matrices (i8mm) where that is.
#pragma once

#include <arm_neon.h>

typedef int32x4_t   ivec;  // an int32, or four bytes, of each of 4 rows
typedef float32x4_t fvec;

static constexpr int LANES       = 4;
static constexpr int VECTORS     = 4;  // of a panel
static constexpr int COLUMNS     = 4;  // multiplied at a time
static constexpr int Q8_0_OFFSET = 0;

static inline ivec iset(int32_t x) {
    return vdupq_n_s32(x);
}

static inline fvec fset(float x) {
    return vdupq_n_f32(x);
}

static inline fvec fmul(fvec a, fvec b) {
    return vmulq_f32(a, b);
}

// a * b + c
static inline fvec fmadd(fvec a, fvec b, fvec c) {
    return vfmaq_f32(c, a, b);
}

static inline fvec to_float(ivec x) {
    return vcvtq_f32_s32(x);
}

static inline fvec as_float(ivec x) {
    return vreinterpretq_f32_s32(x);
}

static inline fvec fload(const float * x) {
    return vld1q_f32(x);
}

static inline void fstore(float * x, fvec v) {
    vst1q_f32(x, v);
}

// LANES integers of [-127, 127]
static inline void store_rounded(int8_t * q, fvec x) {
    const int16x4_t s     = vmovn_s32(vcvtnq_s32_f32(x));
    const int8x8_t  bytes = vmovn_s16(vcombine_s16(s, s));
    memcpy(q, &bytes, LANES);
}

// bits [at, at + n) of each lane
static inline ivec bits(ivec x, int at, int n) {
    const uint32x4_t low = vreinterpretq_u32_s32(x) >> at;
    return vreinterpretq_s32_u32(at + n == 32 ? low : vandq_u32(low, vdupq_n_u32((1u << n) - 1)));
}

// 16 bytes of each row: vector i holds bytes 4i ... 4i+3
static inline void load_transposed(const uint8_t * const * row, size_t offset, ivec (&out)[4]) {
    const auto      load   = [&](int r) { return vreinterpretq_s32_u8(vld1q_u8(row[r] + offset)); };
    const int64x2_t even01 = vreinterpretq_s64_s32(vtrn1q_s32(load(0), load(1)));
    const int64x2_t odd01  = vreinterpretq_s64_s32(vtrn2q_s32(load(0), load(1)));
    const int64x2_t even23 = vreinterpretq_s64_s32(vtrn1q_s32(load(2), load(3)));
    const int64x2_t odd23  = vreinterpretq_s64_s32(vtrn2q_s32(load(2), load(3)));

    out[0] = vreinterpretq_s32_s64(vtrn1q_s64(even01, even23));
    out[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd01, odd23));
    out[2] = vreinterpretq_s32_s64(vtrn2q_s64(even01, even23));
    out[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd01, odd23));
}

// a float16 of each row
static inline fvec load_halves(const uint8_t * const * row, size_t offset) {
    uint16_t v[LANES];
    for (int i = 0; i < LANES; ++i) {
        memcpy(&v[i], row[i] + offset, sizeof(v[i]));
    }
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(v)));
}

// bytes of q8_0 -> as dot_bytes takes them
static inline ivec q8_0_bytes(ivec x) {
    return x;
}

// code i of the four in each lane -> its windows
static inline ivec ccq2_windows(ivec codes, int i, ivec M, ivec Z) {
    // the high half of u, doubled into both halves of its lane, has the windows at bits 10, 7, 4 and 1
    const uint8x16_t high_half_twice = { 2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15 };
    const int16x8_t  shift_even      = { -10, -4, -10, -4, -10, -4, -10, -4 };
    const int16x8_t  shift_odd       = { 1, 7, 1, 7, 1, 7, 1, 7 };

    const uint8x16_t u    = vreinterpretq_u8_s32(vmlaq_s32(Z, bits(codes, 8 * i, 8), M));
    const uint16x8_t h    = vreinterpretq_u16_u8(vqtbl1q_u8(u, high_half_twice));
    const uint16x8_t even = vshlq_u16(h, shift_even);
    const uint16x8_t odd  = vshlq_u16(h, shift_odd);
    return vreinterpretq_s32_u16(vandq_u16(vbslq_u16(vdupq_n_u16(0x00ff), even, odd), vdupq_n_u16(0x3f3f)));
}

static inline int8x16_t load_weights(const uint8_t * w, int i, int v) {
    return vreinterpretq_s8_u8(vld1q_u8(w + (i * VECTORS + v) * 16));
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Of each two vectors, one comes to hold eight weights of rows 0 and 1, the other those of rows 2 and 3.
static inline void store_weights(uint8_t * w, const ivec (&four)[4]) {
    for (int i = 0; i < 4; i += 2) {
        vst1q_u8(w + (i + 0) * VECTORS * 16, vreinterpretq_u8_s32(vzip1q_s32(four[i], four[i + 1])));
        vst1q_u8(w + (i + 1) * VECTORS * 16, vreinterpretq_u8_s32(vzip2q_s32(four[i], four[i + 1])));
    }
}

// sum[c][v] += weights . activations [first, first + 4 * QUADS) of column c
template <int C, int QUADS>
static inline void dot_bytes(const uint8_t * w, const panel_activations * const (&y)[C], int first, ivec (&sum)[C][VECTORS]) {
    constexpr int PAIRS = (C + 1) / 2;         // of columns; one alone is its own partner
    int32x4_t     product[PAIRS][VECTORS][2];  // two rows of a vector by two columns
    for (int p = 0; p < PAIRS; ++p) {
        for (int v = 0; v < VECTORS; ++v) {
            product[p][v][0] = product[p][v][1] = vdupq_n_s32(0);
        }
    }
    for (int i = 0; i < QUADS; i += 2) {
        int8x16_t pair[PAIRS];
        for (int p = 0; p < PAIRS; ++p) {
            const int at = first + 4 * i;
            pair[p]      = vcombine_s8(vld1_s8(y[2 * p]->q + at), vld1_s8(y[std::min(2 * p + 1, C - 1)]->q + at));
        }
        for (int v = 0; v < VECTORS; ++v) {
            for (int p = 0; p < PAIRS; ++p) {
                product[p][v][0] = vmmlaq_s32(product[p][v][0], load_weights(w, i, v), pair[p]);
                product[p][v][1] = vmmlaq_s32(product[p][v][1], load_weights(w, i + 1, v), pair[p]);
            }
        }
    }
    for (int c = 0; c < C; ++c) {
        for (int v = 0; v < VECTORS; ++v) {
            const auto & rows = product[c / 2][v];
            sum[c][v]         = vaddq_s32(sum[c][v], c % 2 == 0 ? vuzp1q_s32(rows[0], rows[1]) : vuzp2q_s32(rows[0], rows[1]));
        }
    }
}

#else

static inline void store_weights(uint8_t * w, const ivec (&four)[4]) {
    for (int i = 0; i < 4; ++i) {
        vst1q_u8(w + i * VECTORS * 16, vreinterpretq_u8_s32(four[i]));
    }
}

// sum[c][v] += weights . activations [first, first + 4 * QUADS) of column c
template <int C, int QUADS>
static inline void dot_bytes(const uint8_t * w, const panel_activations * const (&y)[C], int first, ivec (&sum)[C][VECTORS]) {
    for (int i = 0; i < QUADS; i += 4) {
        int8x16_t sixteen[C];
        for (int c = 0; c < C; ++c) {
            sixteen[c] = vld1q_s8(y[c]->q + first + 4 * i);
        }
        for (int v = 0; v < VECTORS; ++v) {
            for (int c = 0; c < C; ++c) {
                sum[c][v] = vdotq_laneq_s32(sum[c][v], load_weights(w, i + 0, v), sixteen[c], 0);
                sum[c][v] = vdotq_laneq_s32(sum[c][v], load_weights(w, i + 1, v), sixteen[c], 1);
                sum[c][v] = vdotq_laneq_s32(sum[c][v], load_weights(w, i + 2, v), sixteen[c], 2);
                sum[c][v] = vdotq_laneq_s32(sum[c][v], load_weights(w, i + 3, v), sixteen[c], 3);
            }
        }
    }
}

#endif

// the same for windows
template <int C, int QUADS>
static inline void dot_windows(const uint8_t * w, const panel_activations * const (&y)[C], int first, ivec (&sum)[C][VECTORS]) {
    dot_bytes<C, QUADS>(w, y, first, sum);
}
