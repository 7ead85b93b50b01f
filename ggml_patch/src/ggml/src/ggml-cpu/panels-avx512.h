// Vectors of panels-kernel.cpp: AVX-512 with its byte dot product (VNNI).
#pragma once

#include <immintrin.h>

typedef __m512i ivec;  // an int32, or four bytes, of each of 16 rows
typedef __m512  fvec;

static constexpr int LANES       = 16;
static constexpr int VECTORS     = 2;  // of a panel
static constexpr int COLUMNS     = 4;  // multiplied at a time
static constexpr int Q8_0_OFFSET = 128;

static inline ivec iset(int32_t x) {
    return _mm512_set1_epi32(x);
}

static inline fvec fset(float x) {
    return _mm512_set1_ps(x);
}

static inline fvec fmul(fvec a, fvec b) {
    return _mm512_mul_ps(a, b);
}

// a * b + c
static inline fvec fmadd(fvec a, fvec b, fvec c) {
    return _mm512_fmadd_ps(a, b, c);
}

static inline fvec to_float(ivec x) {
    return _mm512_cvtepi32_ps(x);
}

static inline fvec as_float(ivec x) {
    return _mm512_castsi512_ps(x);
}

static inline fvec fload(const float * x) {
    return _mm512_loadu_ps(x);
}

static inline void fstore(float * x, fvec v) {
    _mm512_storeu_ps(x, v);
}

// LANES integers of [-127, 127]
static inline void store_rounded(int8_t * q, fvec x) {
    _mm_storeu_si128((__m128i *) q, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

// byte i of each lane. Shuffles occupy two of four ports; where a mask or a shift will do, it gives ccq2 8 % more.
static inline ivec byte_of(ivec x, int i) {
    if (i == 0) {
        return _mm512_and_si512(x, _mm512_set1_epi32(255));
    }
    if (i == 3) {
        return _mm512_srli_epi32(x, 24);
    }
    const int at = (int) (0x80808000 + i);  // 0x80 gives zero
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi32(at, at + 4, at + 8, at + 12)));
}

// bits [at, at + n) of each lane
static inline ivec bits(ivec x, int at, int n) {
    const ivec low = at ? _mm512_srli_epi32(x, at) : x;
    return at + n == 32 ? low : _mm512_and_si512(low, _mm512_set1_epi32((1 << n) - 1));
}

// 16 bytes of each of the rows at at(0) ... at(3)
template <typename At> static inline __m512i load_four(At at) {
    const auto    load = [&](int i) { return _mm_loadu_si128((const __m128i *) at(i)); };
    const __m512i x    = _mm512_inserti32x4(_mm512_castsi128_si512(load(0)), load(1), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(x, load(2), 2), load(3), 3);
}

// 16 bytes of each row: vector i holds bytes 4i ... 4i+3
static inline void load_transposed(const uint8_t * const * row, size_t offset, ivec (&out)[4]) {
    __m512i x[4];
    for (int i = 0; i < 4; ++i) {
        x[i] = load_four([&](int j) { return row[i + 4 * j] + offset; });
    }
    const __m512i lo01 = _mm512_unpacklo_epi32(x[0], x[1]);
    const __m512i hi01 = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i lo23 = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i hi23 = _mm512_unpackhi_epi32(x[2], x[3]);

    out[0] = _mm512_unpacklo_epi64(lo01, lo23);
    out[1] = _mm512_unpackhi_epi64(lo01, lo23);
    out[2] = _mm512_unpacklo_epi64(hi01, hi23);
    out[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

// a float16 of each row
static inline fvec load_halves(const uint8_t * const * row, size_t offset) {
    uint16_t v[LANES];
    for (int i = 0; i < LANES; ++i) {
        memcpy(&v[i], row[i] + offset, sizeof(v[i]));
    }
    // not a load of v: it would wait for all the stores
    return _mm512_cvtph_ps(_mm256_setr_epi16(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12],
                                             v[13], v[14], v[15]));
}

// bytes of q8_0 -> as dot_bytes takes them
static inline ivec q8_0_bytes(ivec x) {
    return _mm512_xor_si512(x, _mm512_set1_epi8((char) 0x80));
}

// code i of the four in each lane -> its windows
static inline ivec ccq2_windows(ivec codes, int i, ivec M, ivec Z) {
    const __m512i u = _mm512_add_epi32(_mm512_mullo_epi32(byte_of(codes, i), M), Z);
#if defined(__AVX512VBMI__)
    // the windows of u lie at bits 26, 23, 20 and 17, and those of the odd u of a pair 32 higher
    const __m512i at = _mm512_set1_epi64(0x3134373a1114171a);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(at, u), _mm512_set1_epi8(63));
#else
    // as ccq2_windows_avx2 does it
    const __m512i twice = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));
    const __m512i h     = _mm512_shuffle_epi8(u, twice);
    const __m512i even  = _mm512_mulhi_epu16(h, _mm512_set1_epi32((1 << 6) | (1 << (16 + 12))));
    const __m512i odd   = _mm512_mullo_epi16(h, _mm512_set1_epi32((1 << 1) | (1 << (16 + 7))));
    return _mm512_or_si512(_mm512_and_si512(even, _mm512_set1_epi16(0x003f)), _mm512_and_si512(odd, _mm512_set1_epi16(0x3f00)));
#endif
}

static inline void store_weights(uint8_t * w, const ivec (&four)[4]) {
    for (int i = 0; i < 4; ++i) {
        _mm512_store_si512(w + i * VECTORS * 64, four[i]);
    }
}

// sum[c][v] += weights . activations [first, first + 4 * QUADS) of column c, for bytes that q8_0_bytes has made.
// Four broadcasts from memory cost more than one of 16 bytes and four shuffles: 440 G multiply-adds a second become 505, of
// 522 possible.
template <int C, int QUADS>
static inline void dot_bytes(const uint8_t * w, const panel_activations * const (&y)[C], int first, ivec (&sum)[C][VECTORS]) {
#pragma GCC        unroll 4
    for (int i = 0; i < QUADS; i += 4) {
        __m512i sixteen[C];
        for (int c = 0; c < C; ++c) {
            sixteen[c] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) (y[c]->q + first + 4 * i)));
        }
        const auto multiply = [&](int j, auto shuffle) {
            __m512i weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                weights[v] = _mm512_load_si512(w + ((i + j) * VECTORS + v) * 64);
            }
            for (int c = 0; c < C; ++c) {
                const __m512i four = shuffle(sixteen[c]);
                for (int v = 0; v < VECTORS; ++v) {
                    sum[c][v] = _mm512_dpbusd_epi32(sum[c][v], weights[v], four);
                }
            }
        };
        multiply(0, [](__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_AAAA); });
        multiply(1, [](__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_BBBB); });
        multiply(2, [](__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_CCCC); });
        multiply(3, [](__m512i x) { return _mm512_shuffle_epi32(x, _MM_PERM_DDDD); });
    }
}

// the same for windows
template <int C, int QUADS>
static inline void dot_windows(const uint8_t * w, const panel_activations * const (&y)[C], int first, ivec (&sum)[C][VECTORS]) {
    dot_bytes<C, QUADS>(w, y, first, sum);
}
