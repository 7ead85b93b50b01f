// A few columns, for panels-kernel.cpp with AVX2.
#pragma once

#include "panels-few.h"

static constexpr int FEW_STEPS = 32;  // of ccq2's columns, which lie on the stack in an order of their own

// With more, panels are faster: those have AVX-VNNI where that is. Panels against this, ns for 64 weights from memory, one
// thread of a Xeon (Emerald Rapids) without AVX-VNNI: q8_0 11.7 and 8.7 for 2 columns, 15.0 and 11.6 for 4, 20.9 and 24.2 for
// 8; ccq2 5.9 and 4.7, 7.5 and 7.3, 11.1 and 13.9. One column against the dot products of ggml: 12.4 and 7.7, 6.0 and 3.9.
#if defined(__AVXVNNI__)
static constexpr int FEW_COLUMNS = 2;
#else
static constexpr int FEW_COLUMNS = 4;
#endif

static inline float sum_of_lanes(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum        = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Four rows of q8_0 by C columns. What gains here is the order in which the rows to come are fetched.
template <int C> struct few_q8_0 {
    static constexpr int ROWS = 4;

    int64_t                           k;
    const panel_activations * const * columns;
    int64_t                           stride;

    void multiply(const uint8_t * tile, size_t row_size, float (&sums)[C][ROWS]) const {
        const panel_activations * y[C];
        fvec                      total[C][ROWS] = {};
        std::copy(columns, columns + C, y);
        const uint8_t * ahead = tile + ROWS * row_size;
        const size_t    part  = ROWS * row_size / (k / QK8_0);
        for (int64_t left = k / QK8_0; left > 0; left -= PANEL_GROUPS) {
            for (int b = 0; b < std::min<int64_t>(left, PANEL_GROUPS); ++b) {
                multiply_block(tile, row_size, y, b, total);
                fetch(ahead, part);
                tile += sizeof(block_q8_0);
                ahead += part;
            }
            for (int c = 0; c < C; ++c) {
                y[c] += stride;
            }
        }
        for (int c = 0; c < C; ++c) {
            for (int r = 0; r < ROWS; ++r) {
                sums[c][r] = sum_of_lanes(total[c][r]);
            }
        }
    }

    static void multiply_block(const uint8_t * tile,
                               size_t          row_size,
                               const panel_activations * const (&y)[C],
                               int b,
                               fvec (&total)[C][ROWS]) {
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t * at = tile + r * row_size;
            uint16_t        half;
            memcpy(&half, at + offsetof(block_q8_0, d), sizeof(half));
            const __m128 scale = _mm_cvtph_ps(_mm_cvtsi32_si128(half));
            const ivec   w     = _mm256_loadu_si256((const __m256i *) (at + offsetof(block_q8_0, qs)));
            const ivec   size  = _mm256_abs_epi8(w);
            for (int c = 0; c < C; ++c) {
                const ivec q   = _mm256_loadu_si256((const __m256i *) (y[c]->q + b * QK8_0));
                const ivec two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(q, w));
                const ivec sum = _mm256_madd_epi16(two, _mm256_set1_epi16(1));
                const fvec d   = _mm256_broadcastss_ps(_mm_mul_ss(scale, _mm_load_ss(&y[c]->d[b])));
                total[c][r]    = fmadd(to_float(sum), d, total[c][r]);
            }
        }
    }
};

// The code map of a row of ccq2: the upper halves of b*M + Z for bytes b in 16-bit lanes.
//
// Let M_lo and Z_lo be the lower halves, and s such that s*M_lo is Z_lo modulo 2^16. Then the upper half of (b + s)*M_lo has
// the carry of b*M_lo + Z_lo in it: two products, neither a third nor a comparison. As many low bits as are zero in M_lo
// are zero in every b*M_lo and take no part in a carry; without them M_lo is odd and s exists.
struct ccq2_map {
    ivec s, M_lo, M_hi, rest;
    bool fits;  // b + s in 16 bits, for every b; one random map of 256 does not

    ccq2_map(uint32_t M, uint32_t Z) {
        const uint32_t lo      = M & 0xffff;
        const int      zeros   = __builtin_ctz(lo | 0x10000);
        const uint32_t odd     = lo >> zeros;
        uint32_t       inverse = (3 * odd) ^ 2;  // Newton's method modulo 2^32, from 5 bits
        inverse *= 2 - odd * inverse;
        inverse *= 2 - odd * inverse;
        const uint32_t shift = (((Z & 0xffff) >> zeros) * inverse) & (0xffffu >> zeros);
        fits                 = shift + 255 <= 0xffff;
        s                    = _mm256_set1_epi16((short) shift);
        M_lo                 = _mm256_set1_epi16((short) lo);
        M_hi                 = _mm256_set1_epi16((short) (M >> 16));
        rest                 = _mm256_set1_epi16((short) ((Z >> 16) - (shift * lo >> 16) - shift * (M >> 16)));
    }

    ivec operator()(ivec b) const {
        const ivec x = _mm256_add_epi16(b, s);
        return _mm256_add_epi16(_mm256_add_epi16(_mm256_mullo_epi16(x, M_hi), _mm256_mulhi_epu16(x, M_lo)), rest);
    }
};

// The same for any row, more slowly.
struct ccq2_map_with_carry {
    ivec M_lo, M_hi, most, rest;

    ccq2_map_with_carry(uint32_t M, uint32_t Z) {
        M_lo = _mm256_set1_epi16((short) M);
        M_hi = _mm256_set1_epi16((short) (M >> 16));
        most = _mm256_set1_epi16((short) ~Z);  // that b*M_lo may be without a carry
        rest = _mm256_set1_epi16((short) ((Z >> 16) + 1));
    }

    ivec operator()(ivec b) const {
        const ivec lo       = _mm256_mullo_epi16(b, M_lo);
        const ivec no_carry = _mm256_cmpeq_epi16(_mm256_min_epu16(lo, most), lo);  // -1 or 0
        const ivec hi       = _mm256_add_epi16(_mm256_mullo_epi16(b, M_hi), _mm256_mulhi_epu16(b, M_lo));
        return _mm256_add_epi16(hi, _mm256_add_epi16(rest, no_carry));
    }
};

// Rows of ccq2 by C columns. A vector holds 32 codes, of two groups, taken apart into even and odd ones and those into their
// first two and last two windows; the activations are put in that order once. With the offset off, the products of eight
// weights are at most 8*32*127: they are added in 16 bits, modulo 2^16, and meet the scales there.
template <int C> struct few_ccq2 {
    static constexpr int ROWS  = 4;
    static constexpr int PAIRS = QK_CCQ / CCQ_GROUP / 2;  // of groups, in a step

    struct pair {
        ivec q[4];  // two activations of each even code, the other two, those of the odd codes
        ivec offset;
    };

    int64_t                           k;
    const panel_activations * const * columns;
    int64_t                           stride;
    pair                              y[C][FEW_STEPS][PAIRS];

    few_ccq2(int64_t k, const panel_activations * const * columns, int64_t stride) : k(k), columns(columns), stride(stride) {
        for (int c = 0; c < C; ++c) {
            for (int64_t step = 0; step < k / QK_CCQ; ++step) {
                for (int i = 0; i < PAIRS; ++i) {
                    y[c][step][i] = reordered(columns[c][step * stride].q + i * 2 * CCQ_GROUP);
                }
            }
        }
    }

    static pair reordered(const int8_t * q) {
        int16_t two[4][16];  // activations
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 4; ++j) {
                memcpy(&two[j][i], q + 8 * i + 2 * j, sizeof(two[j][i]));
            }
        }
        pair to;
        to.offset = _mm256_setzero_si256();
        for (int j = 0; j < 4; ++j) {
            to.q[j]   = _mm256_loadu_si256((const __m256i *) two[j]);
            to.offset = _mm256_add_epi16(to.offset, _mm256_maddubs_epi16(_mm256_set1_epi8(CCQ_OFFSET), to.q[j]));
        }
        return to;
    }

    void multiply(const uint8_t * tile, size_t row_size, float (&sums)[C][ROWS]) const {
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t * row = tile + r * row_size;
            ccq_row_header  header;
            memcpy(&header, row, sizeof(header));
            fvec           total[C] = {};
            const ccq2_map map(header.M, header.Z);
            if (map.fits) {
                multiply_row(row, row_size, map, total);
            } else {
                multiply_row(row, row_size, ccq2_map_with_carry(header.M, header.Z), total);
            }
            for (int c = 0; c < C; ++c) {
                sums[c][r] = header.d * sum_of_lanes(total[c]);
            }
        }
    }

    template <typename Map> void multiply_row(const uint8_t * row, size_t row_size, const Map & map, fvec (&total)[C]) const {
        const uint8_t * ahead = row + 16 * row_size;
        const size_t    part  = row_size / (k / QK_CCQ);
        for (int64_t step = 0; step < k / QK_CCQ; ++step) {
            int16_t nibbles;
            memcpy(&nibbles, row + sizeof(ccq_row_header) + k / 4 + step * CCQ2_SCALE_SIZE, sizeof(nibbles));
            ivec sum[C] = {};
            for (int i = 0; i < PAIRS; ++i) {
                const uint8_t * codes_at = row + sizeof(ccq_row_header) + step * CCQ2_CODE_SIZE + i * CCQ_GROUP / 2;
                const ivec      codes    = _mm256_loadu_si256((const __m256i *) codes_at);
                multiply_pair(codes, scales_of(nibbles, i), map, step, i, sum);
            }
            for (int c = 0; c < C; ++c) {
                total[c] = fmadd(to_float(sum[c]), fset(columns[c][step * stride].d[0]), total[c]);
            }
            fetch(ahead + step * part, part);
        }
    }

    template <typename Map>
    void multiply_pair(ivec codes, ivec scales, const Map & map, int64_t step, int i, ivec (&sum)[C]) const {
        const ivec even = map(_mm256_and_si256(codes, _mm256_set1_epi16(255)));
        const ivec odd  = map(_mm256_srli_epi16(codes, 8));
        const ivec w[4] = { first_windows(even), last_windows(even), first_windows(odd), last_windows(odd) };
        for (int c = 0; c < C; ++c) {
            const pair & p   = y[c][step][i];
            const auto   dot = [&](int j) { return _mm256_maddubs_epi16(w[j], p.q[j]); };
            const ivec   all = _mm256_add_epi16(_mm256_add_epi16(dot(0), dot(1)), _mm256_add_epi16(dot(2), dot(3)));
            sum[c]           = _mm256_add_epi32(sum[c], _mm256_madd_epi16(_mm256_sub_epi16(all, p.offset), scales));
        }
    }

    // the upper halves of the map have the windows at bits 10, 7, 4 and 1
    static ivec first_windows(ivec x) {
        const ivec second = _mm256_and_si256(_mm256_add_epi16(x, x), _mm256_set1_epi16(0x3f00));
        return _mm256_or_si256(_mm256_srli_epi16(x, 10), second);
    }

    static ivec last_windows(ivec x) {
        const ivec third  = _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi16(0x003f));
        const ivec fourth = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(0x3f00));
        return _mm256_or_si256(third, fourth);
    }

    // the scales of pair i, one in each half, of the nibbles of groups 1 0 3 2: shifted to the top, then down
    static ivec scales_of(int16_t nibbles, int i) {
        const ivec up = i == 0 ? _mm256_setr_m128i(_mm_set1_epi16(1 << 8), _mm_set1_epi16(1 << 12)) :
                                 _mm256_setr_m128i(_mm_set1_epi16(1 << 0), _mm_set1_epi16(1 << 4));
        return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_set1_epi16(nibbles), up), 12);
    }
};

static constexpr panel_few FEW_Q8_0 = { multiply_few<few_q8_0, FEW_COLUMNS>, few_q8_0<1>::ROWS, FEW_COLUMNS, INT64_MAX };
static constexpr panel_few FEW_CCQ2 = { multiply_few<few_ccq2, FEW_COLUMNS>, few_ccq2<1>::ROWS, FEW_COLUMNS,
                                        FEW_STEPS * PANEL_STEP };
