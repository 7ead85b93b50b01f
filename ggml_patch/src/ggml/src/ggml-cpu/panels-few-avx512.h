// A few columns, for panels-kernel.cpp with AVX-512: rows go from memory through registers, no panel is made. One column
// alone, a generated token, reads q8_0 at 42 GB/s and ccq2 at 31. Against panels, one thread of Zen 5: q8_0 2.5 times as
// fast with 2 columns, 1.9 with 8, 1.2 with 16; ccq2 1.4 with 2, 1.1 with 4.
#pragma once

#include "panels-few.h"

static constexpr int FEW_STEPS = 32;  // of ccq2's columns, which lie on the stack in an order of their own

// Eight rows of q8_0 by C columns. A vector holds 16 bytes of each of four rows, so that both halves of a block add up in
// the same lanes: one conversion to float for two byte dot products.
template <int C> struct few_q8_0 {
    static constexpr int ROWS    = 8;
    static constexpr int VECTORS = 2;

    int64_t                           k;
    const panel_activations * const * columns;
    int64_t                           stride;

    void multiply(const uint8_t * tile, size_t row_size, float (&sums)[C][ROWS]) const {
        const panel_activations * y[C];
        fvec                      total[C][VECTORS] = {};
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
            _mm256_storeu_ps(sums[c], sums_of_rows(total[c]));
        }
    }

    static void multiply_block(const uint8_t * tile,
                               size_t          row_size,
                               const panel_activations * const (&y)[C],
                               int b,
                               fvec (&total)[C][VECTORS]) {
        __m512i w[VECTORS][2];
        fvec    scale[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            for (int half = 0; half < 2; ++half) {
                const uint8_t * at = tile + 4 * v * row_size + offsetof(block_q8_0, qs) + half * 16;
                w[v][half]         = q8_0_bytes(load_four([&](int i) { return at + i * row_size; }));
            }
        }
        load_scales(tile, row_size, scale);
        for (int c = 0; c < C; ++c) {
            const __m512i lo     = repeat(y[c]->q + b * QK8_0);
            const __m512i hi     = repeat(y[c]->q + b * QK8_0 + 16);
            const __m512i offset = _mm512_maskz_set1_epi32(0x1111, y[c]->offset[b]);  // once per row
            const fvec    d      = fset(y[c]->d[b]);
            for (int v = 0; v < VECTORS; ++v) {
                const __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(offset, w[v][0], lo), w[v][1], hi);
                total[c][v]       = fmadd(to_float(sum), fmul(scale[v], d), total[c][v]);
            }
        }
    }

    // 16 bytes of a column, for each of four rows
    static __m512i repeat(const int8_t * q) { return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) q)); }

    // the scale of a block, in the four lanes of each row
    static void load_scales(const uint8_t * tile, size_t row_size, fvec (&scale)[VECTORS]) {
        uint16_t h[ROWS];
        for (int i = 0; i < ROWS; ++i) {
            memcpy(&h[i], tile + i * row_size + offsetof(block_q8_0, d), sizeof(h[i]));
        }
        const __m256 d      = _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]));
        const fvec   both   = _mm512_castps256_ps512(d);
        const auto   rows   = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const auto   second = _mm512_add_epi32(rows, _mm512_set1_epi32(4));
        scale[0]            = _mm512_permutexvar_ps(rows, both);
        scale[1]            = _mm512_permutexvar_ps(second, both);
    }

    static __m256 sums_of_rows(const fvec (&x)[VECTORS]) {
        const fvec pairs = _mm512_add_ps(_mm512_shuffle_ps(x[0], x[1], _MM_SHUFFLE(2, 0, 2, 0)),
                                         _mm512_shuffle_ps(x[0], x[1], _MM_SHUFFLE(3, 1, 3, 1)));
        const fvec fours = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, _MM_SHUFFLE(2, 3, 0, 1)));
        const auto order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        return _mm512_castps512_ps256(_mm512_permutexvar_ps(order, fours));
    }
};

// Rows of ccq2 by C columns. A vector holds the 64 codes of a block of one row, four groups of 16: no transposition, and
// code j of each lane meets four activations of its own. Those are put in that order first.
template <int C> struct few_ccq2 {
    static constexpr int ROWS = C <= 2 ? 4 : 2;

    int64_t                           k;
    const panel_activations * const * columns;
    int64_t                           stride;
    __m512i                           q[C][FEW_STEPS][4];  // of code j: activations 4j ... 4j+3 of each 16

    few_ccq2(int64_t k, const panel_activations * const * columns, int64_t stride) : k(k), columns(columns), stride(stride) {
        for (int c = 0; c < C; ++c) {
            for (int64_t step = 0; step < k / QK_CCQ; ++step) {
                const uint8_t * fours[16];
                for (int i = 0; i < 16; ++i) {
                    fours[i] = (const uint8_t *) columns[c][step * stride].q + 16 * i;
                }
                load_transposed(fours, 0, q[c][step]);
            }
        }
    }

    void multiply(const uint8_t * tile, size_t row_size, float (&sums)[C][ROWS]) const {
        __m512i        M[ROWS], Z[ROWS];
        ccq_row_header header[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            memcpy(&header[r], tile + r * row_size, sizeof(header[r]));
            M[r] = iset(header[r].M);
            Z[r] = iset(header[r].Z);
        }
        fvec         total[ROWS][C] = {};
        const size_t part           = ROWS * row_size / (k / QK_CCQ);
        for (int64_t step = 0; step < k / QK_CCQ; ++step) {
            multiply_block(tile, row_size, step, M, Z, total);
            fetch(tile + 16 * row_size + step * part, part);
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < C; ++c) {
                sums[c][r] = header[r].d * _mm512_reduce_add_ps(total[r][c]);
            }
        }
    }

    void multiply_block(const uint8_t * tile,
                        size_t          row_size,
                        int64_t         step,
                        const __m512i (&M)[ROWS],
                        const __m512i (&Z)[ROWS],
                        fvec (&total)[ROWS][C]) const {
        const uint8_t * codes_at  = tile + sizeof(ccq_row_header) + step * CCQ2_CODE_SIZE;
        const uint8_t * scales_at = tile + sizeof(ccq_row_header) + k / 4 + step * CCQ2_SCALE_SIZE;
        __m512i         codes[ROWS], sum[ROWS][C];
        for (int r = 0; r < ROWS; ++r) {
            codes[r] = _mm512_loadu_si512(codes_at + r * row_size);
        }
        fvec steps[C];
        for (int c = 0; c < C; ++c) {
            const panel_activations & y = columns[c][step * stride];
            steps[c]                    = fmul(zero_to_fifteen(), fset(y.d[0]));
            const __m512i offset        = first_of_four(y.offset);
            for (int r = 0; r < ROWS; ++r) {
                sum[r][c] = offset;
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            for (int r = 0; r < ROWS; ++r) {
                const __m512i w = ccq2_windows(codes[r], j, M[r], Z[r]);
                for (int c = 0; c < C; ++c) {
                    sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], w, q[c][step][j]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const __m512i scale = load_scales(scales_at + r * row_size);
            for (int c = 0; c < C; ++c) {
                total[r][c] = fmadd(to_float(sum[r][c]), _mm512_permutexvar_ps(scale, steps[c]), total[r][c]);
            }
        }
    }

    // one of the four integers in the first lane of each four
    static __m512i first_of_four(const int32_t * x) {
        const __m512i group = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_maskz_permutexvar_epi32(0x1111, group, _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) x)));
    }

    // two bytes with the nibbles of groups 1 0 3 2 -> the low bits of each four lanes
    static __m512i load_scales(const uint8_t * at) {
        int16_t nibbles;
        memcpy(&nibbles, at, sizeof(nibbles));
        const __m512i shift = _mm512_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0, 12, 12, 12, 12, 8, 8, 8, 8);
        return _mm512_srlv_epi32(_mm512_set1_epi16(nibbles), shift);
    }

    static fvec zero_to_fifteen() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
};

static constexpr panel_few FEW_Q8_0 = { multiply_few<few_q8_0, 8>, few_q8_0<1>::ROWS, 16, INT64_MAX };
static constexpr panel_few FEW_CCQ2 = { multiply_few<few_ccq2, 4>, few_ccq2<1>::ROWS, 4, FEW_STEPS * PANEL_STEP };
