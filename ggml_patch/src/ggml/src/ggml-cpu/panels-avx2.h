// Vectors of panels-kernel.cpp: AVX2, with the byte dot product of AVX-VNNI where that is.
#pragma once

#include "ccq-unpack.h"

#include <immintrin.h>

typedef __m256i ivec;  // an int32, or four bytes, of each of 8 rows
typedef __m256  fvec;

static constexpr int LANES   = 8;
static constexpr int VECTORS = 2;  // of a panel
static constexpr int COLUMNS = 4;  // multiplied at a time
#if defined(__AVXVNNI__)
static constexpr int Q8_0_OFFSET = 128;
#else
static constexpr int Q8_0_OFFSET = 0;
#endif

static inline ivec iset(int32_t x) {
    return _mm256_set1_epi32(x);
}

static inline fvec fset(float x) {
    return _mm256_set1_ps(x);
}

static inline fvec fmul(fvec a, fvec b) {
    return _mm256_mul_ps(a, b);
}

// a * b + c
static inline fvec fmadd(fvec a, fvec b, fvec c) {
    return _mm256_fmadd_ps(a, b, c);
}

static inline fvec to_float(ivec x) {
    return _mm256_cvtepi32_ps(x);
}

static inline fvec as_float(ivec x) {
    return _mm256_castsi256_ps(x);
}

static inline fvec fload(const float * x) {
    return _mm256_loadu_ps(x);
}

static inline void fstore(float * x, fvec v) {
    _mm256_storeu_ps(x, v);
}

// LANES integers of [-127, 127]
static inline void store_rounded(int8_t * q, fvec x) {
    const __m256i i = _mm256_cvtps_epi32(x);
    const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i *) q, _mm_packs_epi16(s, s));
}

// bits [at, at + n) of each lane
static inline ivec bits(ivec x, int at, int n) {
    const ivec low = at ? _mm256_srli_epi32(x, at) : x;
    return at + n == 32 ? low : _mm256_and_si256(low, _mm256_set1_epi32((1 << n) - 1));
}

// 16 bytes of each row: vector i holds bytes 4i ... 4i+3
static inline void load_transposed(const uint8_t * const * row, size_t offset, ivec (&out)[4]) {
    __m256i x[4];
    for (int i = 0; i < 4; ++i) {
        const auto load = [&](int r) { return _mm_loadu_si128((const __m128i *) (row[r] + offset)); };
        x[i]            = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(i + 4), 1);
    }
    const __m256i lo01 = _mm256_unpacklo_epi32(x[0], x[1]);
    const __m256i hi01 = _mm256_unpackhi_epi32(x[0], x[1]);
    const __m256i lo23 = _mm256_unpacklo_epi32(x[2], x[3]);
    const __m256i hi23 = _mm256_unpackhi_epi32(x[2], x[3]);

    out[0] = _mm256_unpacklo_epi64(lo01, lo23);
    out[1] = _mm256_unpackhi_epi64(lo01, lo23);
    out[2] = _mm256_unpacklo_epi64(hi01, hi23);
    out[3] = _mm256_unpackhi_epi64(hi01, hi23);
}

// a float16 of each row
static inline fvec load_halves(const uint8_t * const * row, size_t offset) {
    uint16_t v[LANES];
    for (int i = 0; i < LANES; ++i) {
        memcpy(&v[i], row[i] + offset, sizeof(v[i]));
    }
    // not a load of v: it would wait for all the stores
    return _mm256_cvtph_ps(_mm_setr_epi16(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]));
}

// bytes of q8_0 -> as dot_bytes takes them
static inline ivec q8_0_bytes(ivec x) {
    return Q8_0_OFFSET ? _mm256_xor_si256(x, _mm256_set1_epi8((char) Q8_0_OFFSET)) : x;
}

// code i of the four in each lane -> its windows
static inline ivec ccq2_windows(ivec codes, int i, ivec M, ivec Z) {
    return ccq2_windows_avx2(bits(codes, 8 * i, 8), M, Z);
}

static inline void store_weights(uint8_t * w, const ivec (&four)[4]) {
    for (int i = 0; i < 4; ++i) {
        _mm256_store_si256((__m256i *) (w + i * VECTORS * 32), four[i]);
    }
}

static inline ivec load_weights(const uint8_t * w, int i, int v) {
    return _mm256_load_si256((const __m256i *) (w + (i * VECTORS + v) * 32));
}

// activations i ... i+3 in every lane
static inline ivec four_of(const int8_t * q, int i) {
    int32_t four;
    memcpy(&four, q + i, sizeof(four));
    return _mm256_set1_epi32(four);
}

// sum[c][v] += weights . activations [first, first + 4 * QUADS) of column c, for bytes that q8_0_bytes has made
template <int C, int QUADS>
static inline void dot_bytes(const uint8_t * w, const panel_activations * const (&y)[C], int first, ivec (&sum)[C][VECTORS]) {
#pragma GCC        unroll 8
    for (int i = 0; i < QUADS; ++i) {
        for (int c = 0; c < C; ++c) {
            const ivec four = four_of(y[c]->q + first, 4 * i);
            for (int v = 0; v < VECTORS; ++v) {
                const ivec weights = load_weights(w, i, v);
#if defined(__AVXVNNI__)
                sum[c][v] = _mm256_dpbusd_avx_epi32(sum[c][v], weights, four);
#else
                // |weight| * (sign of the weight * activation): two products are at most 2 * 128 * 127
                const ivec two = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(four, weights));
                sum[c][v]      = _mm256_add_epi32(sum[c][v], _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
#endif
            }
        }
    }
}

// the same for windows
template <int C, int QUADS>
static inline void dot_windows(const uint8_t * w, const panel_activations * const (&y)[C], int first, ivec (&sum)[C][VECTORS]) {
#if defined(__AVXVNNI__)
    dot_bytes<C, QUADS>(w, y, first, sum);
#else
#pragma GCC unroll 8
    for (int i = 0; i < QUADS; i += 2) {
        for (int c = 0; c < C; ++c) {
            const ivec four0 = four_of(y[c]->q + first, 4 * i);
            const ivec four1 = four_of(y[c]->q + first, 4 * i + 4);
            for (int v = 0; v < VECTORS; ++v) {
                // four products: at most 4 * 63 * 127
                const ivec two0 = _mm256_maddubs_epi16(load_weights(w, i, v), four0);
                const ivec two1 = _mm256_maddubs_epi16(load_weights(w, i + 1, v), four1);
                const ivec four = _mm256_madd_epi16(_mm256_add_epi16(two0, two1), _mm256_set1_epi16(1));
                sum[c][v]       = _mm256_add_epi32(sum[c][v], four);
            }
        }
    }
#endif
}
