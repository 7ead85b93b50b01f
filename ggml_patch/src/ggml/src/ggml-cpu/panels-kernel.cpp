// Kernels of the panels with AVX-512 and its byte dot product (VNNI).
//
// GB/s of weights that one thread takes at 2560 weights a row (EPYC 9005; it reads 35 GB/s at most), by columns:
//
//              dot product of ggml   1    2    4    8    48
//   q8_0       28                    35   24   22   18   5.7 (257 G multiply-adds a second)
//   ccq2       18                    22   13   10   7    1.8 (319 G)

#include "panels-kernel.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-ccq.h"
#include "ggml-common.h"
#include "quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include <immintrin.h>

// (with a mask of all lanes: gcc 12 warns of the plain intrinsics)
static inline __m512 to_float(__m512i x) {
    return _mm512_maskz_cvtepi32_ps(0xffff, x);
}

// four activations in every lane
static inline __m512i broadcast4(const int8_t * q) {
    int32_t four;
    memcpy(&four, q, sizeof(four));
    return _mm512_set1_epi32(four);
}

// The rows of a panel. The last panel of a matrix has fewer: it takes its last row again, and stores fewer.
struct panel_rows {
    const uint8_t * row[PANEL_ROWS];

    panel_rows(const void * rows, size_t row_size, int64_t n) {
        for (int64_t i = 0; i < PANEL_ROWS; ++i) {
            row[i] = (const uint8_t *) rows + std::min(i, n - 1) * row_size;
        }
    }
};

// Four vectors whose 128-bit lanes hold four dwords of a row: transposes each lane, so that vector i holds dword i of all.
static inline void transpose4(__m512i (&x)[4]) {
    const __m512i lo01 = _mm512_unpacklo_epi32(x[0], x[1]);
    const __m512i hi01 = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i lo23 = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i hi23 = _mm512_unpackhi_epi32(x[2], x[3]);

    x[0] = _mm512_unpacklo_epi64(lo01, lo23);
    x[1] = _mm512_unpackhi_epi64(lo01, lo23);
    x[2] = _mm512_unpacklo_epi64(hi01, hi23);
    x[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

// 16 bytes of each row as four vectors: vector i holds bytes 4i ... 4i+3 of all rows
static inline void load_transposed(const panel_rows & x, size_t offset, __m512i (&out)[4]) {
    for (int i = 0; i < 4; ++i) {
        const auto load = [&](int row) { return _mm_loadu_si128((const __m128i *) (x.row[row] + offset)); };
        out[i]          = _mm512_inserti32x4(_mm512_castsi128_si512(load(i)), load(i + 4), 1);
        out[i]          = _mm512_inserti32x4(out[i], load(i + 8), 2);
        out[i]          = _mm512_inserti32x4(out[i], load(i + 12), 3);
    }
    transpose4(out);
}

// 16-bit values of the 16 rows
static inline __m256i load16(const panel_rows & x, size_t offset) {
    uint16_t v[PANEL_ROWS];
    for (int i = 0; i < PANEL_ROWS; ++i) {
        memcpy(&v[i], x.row[i] + offset, sizeof(v[i]));
    }
    // not a load of v: it would wait for all the stores
    return _mm256_setr_epi16(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14],
                             v[15]);
}

// Prefetch weights of a later panel in the order of memory, a part with each step through this one: row by row, as they
// are used, they come more slowly (ccq2 20 GB/s instead of 22; 10 without).
static inline void fetch(const uint8_t * weights, size_t size) {
    for (size_t line = 0; line < size; line += 64) {
        _mm_prefetch((const char *) weights + line, _MM_HINT_T0);
    }
}

// store the results of at most n rows
static inline void store(float * dst, int64_t n, __m512 x) {
    _mm512_mask_storeu_ps(dst, (1u << std::min<int64_t>(PANEL_ROWS, n)) - 1, x);
}

// Panels of a type T, whose panel unpacks STEP weights of 16 rows at a time and multiplies C columns with them.
template <typename T, int C>
static void multiply_columns(const T & panel, int64_t k0, const panel_column * columns, float * sums, int64_t ncols) {
    int64_t c = 0;
    for (; c + C <= ncols; c += C) {
        panel.template multiply<C>(k0, columns + c, sums + c * PANEL_ROWS);
    }
    if constexpr (C > 1) {
        multiply_columns<T, C / 2>(panel, k0, columns + c, sums + c * PANEL_ROWS, ncols - c);
    }
}

template <typename T>
static void multiply_panels(int64_t              k,
                            const void *         rows,
                            size_t               row_size,
                            int64_t              nrows,
                            const panel_column * columns,
                            float * const *      dst,
                            int64_t              ncols) {
    if (ncols == 1) {
        T::alone(k, rows, row_size, nrows, columns[0], dst[0]);
        return;
    }
    alignas(64) float sums[PANEL_COLUMNS * PANEL_ROWS];
    for (int64_t r = 0; r < nrows; r += PANEL_ROWS) {
        T panel(k, (const uint8_t *) rows + r * row_size, row_size, nrows - r);
        memset(sums, 0, ncols * PANEL_ROWS * sizeof(float));
        for (int64_t k0 = 0; k0 < k; k0 += T::STEP) {
            panel.unpack(k0);
            multiply_columns<T, 8>(panel, k0, columns, sums, ncols);
        }
        for (int64_t c = 0; c < ncols; ++c) {
            store(dst[c] + r, nrows - r, panel.result(_mm512_load_ps(sums + c * PANEL_ROWS)));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// q8_0: groups and blocks of 32, stored as q + 128; the offset of a group is -128 * sum(activations).

static void quantize_q8_0(const float * x, int8_t * q, int32_t * offset, float * d, int64_t n) {
    for (int64_t b = 0; b < n / QK8_0; ++b) {
        block_q8_0 block;
        quantize_row_q8_0(x + b * QK8_0, &block, QK8_0);
        memcpy(q + b * QK8_0, block.qs, QK8_0);
        d[b]      = GGML_CPU_FP16_TO_FP32(block.d);
        offset[b] = -128 * std::accumulate(block.qs, block.qs + QK8_0, 0);
    }
}

struct panel_q8_0 {
    static constexpr int STEP   = 256;
    static constexpr int BLOCKS = STEP / QK8_0;

    // how far ahead a row alone is fetched: over two pages, at whose ends the hardware stops; 35 GB/s instead of 29
    static constexpr int AHEAD = 8192;

    int64_t    blocks;
    size_t     next;  // panel, in bytes
    panel_rows x;
    alignas(64) uint8_t w[STEP * PANEL_ROWS];  // [4 weights][row][weight]
    __m512 scale[BLOCKS];

    panel_q8_0(int64_t k, const void * rows, size_t row_size, int64_t n)
        : blocks(k / QK8_0), next(PANEL_ROWS * row_size), x(rows, row_size, n) {}

    void unpack(int64_t k0) {
        const __m512i flip = _mm512_set1_epi8((char) 0x80);  // adds 128
        const int64_t b0   = k0 / QK8_0;
        for (int64_t b = b0; b < std::min(b0 + BLOCKS, blocks); ++b) {
            for (int half = 0; half < 2; ++half) {
                __m512i four[4];
                load_transposed(x, b * sizeof(block_q8_0) + offsetof(block_q8_0, qs) + half * 16, four);
                for (int i = 0; i < 4; ++i) {
                    _mm512_store_si512(w + (((b - b0) * 2 + half) * 4 + i) * 64, _mm512_xor_si512(four[i], flip));
                }
            }
            scale[b - b0] = _mm512_cvtph_ps(load16(x, b * sizeof(block_q8_0)));
        }
        const size_t step = next / blocks;
        fetch(x.row[0] + next + b0 * step, BLOCKS * step);
    }

    template <int C> void multiply(int64_t k0, const panel_column * y, float * sums) const {
        __m512 sum[C];
        for (int c = 0; c < C; ++c) {
            sum[c] = _mm512_load_ps(sums + c * PANEL_ROWS);
        }
        const int64_t b0 = k0 / QK8_0;
        for (int64_t b = b0; b < std::min(b0 + BLOCKS, blocks); ++b) {
            __m512i dot[C];
            for (int c = 0; c < C; ++c) {
                dot[c] = _mm512_set1_epi32(y[c].offset[b]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < QK8_0 / 4; ++i) {
                const __m512i weights = _mm512_load_si512(w + ((b - b0) * (QK8_0 / 4) + i) * 64);
                for (int c = 0; c < C; ++c) {
                    dot[c] = _mm512_dpbusd_epi32(dot[c], weights, broadcast4(y[c].q + b * QK8_0 + 4 * i));
                }
            }
            for (int c = 0; c < C; ++c) {
                sum[c] = _mm512_fmadd_ps(to_float(dot[c]), _mm512_mul_ps(scale[b - b0], _mm512_set1_ps(y[c].d[b])), sum[c]);
            }
        }
        for (int c = 0; c < C; ++c) {
            _mm512_store_ps(sums + c * PANEL_ROWS, sum[c]);
        }
    }

    __m512 result(__m512 sum) const { return sum; }

    // blocks [b, b + 16) of a row with those of a column, or as many as `valid` has bits
    static inline __m512 dot16(const uint8_t * row, const panel_column & y, int64_t b, __mmask16 valid, __m512 sum) {
        const __m512i flip = _mm512_set1_epi8((char) 0x80);
        uint16_t      h[16];
        for (int i = 0; i < 16; ++i) {
            h[i] = 0;
            if (valid >> i & 1) {
                memcpy(&h[i], row + (b + i) * sizeof(block_q8_0), sizeof(h[i]));
            }
        }
        const __m512 scale =
            _mm512_mul_ps(_mm512_cvtph_ps(_mm256_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9], h[10],
                                                            h[11], h[12], h[13], h[14], h[15])),
                          _mm512_maskz_loadu_ps(valid, y.d + b));
        sum = _mm512_fmadd_ps(scale, to_float(_mm512_maskz_loadu_epi32(valid, y.offset + b)), sum);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            if (!(valid >> i & 1)) {
                break;
            }
            const uint8_t * p    = row + (b + i) * sizeof(block_q8_0) + offsetof(block_q8_0, qs);
            const bool      both = valid >> (i + 1) & 1;
            const __m256i   lo   = _mm256_loadu_si256((const __m256i *) p);
            const __m256i   hi = both ? _mm256_loadu_si256((const __m256i *) (p + sizeof(block_q8_0))) : _mm256_setzero_si256();
            const __m512i   q  = both ? _mm512_loadu_si512(y.q + (b + i) * QK8_0) :
                                        _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *) (y.q + (b + i) * QK8_0)));
            _mm_prefetch((const char *) p + AHEAD, _MM_HINT_T0);
            const __m512i w    = _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1), flip);
            const __m512i pick = _mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(i), _mm512_set1_epi32(i + 1));
            sum                = _mm512_fmadd_ps(to_float(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w, q)),
                                                 _mm512_permutexvar_ps(pick, scale), sum);
        }
        return sum;
    }

    static float dot(int64_t k, const uint8_t * row, const panel_column & y) {
        const int64_t blocks = k / QK8_0;
        __m512        sum    = _mm512_setzero_ps();
        int64_t       b      = 0;
        for (; b + 16 <= blocks; b += 16) {
            sum = dot16(row, y, b, 0xffff, sum);
        }
        if (b < blocks) {
            sum = dot16(row, y, b, (1u << (blocks - b)) - 1, sum);
        }
        return _mm512_reduce_add_ps(sum);
    }

    static void alone(int64_t k, const void * rows, size_t row_size, int64_t nrows, const panel_column & y, float * dst) {
        for (int64_t r = 0; r < nrows; ++r) {
            dst[r] = dot(k, (const uint8_t *) rows + r * row_size, y);
        }
    }
};

static const panel_type PANELS_Q8_0 = { QK8_0, QK8_0, quantize_q8_0, multiply_panels<panel_q8_0> };

// ---------------------------------------------------------------------------------------------------------------------
// ccq2: groups of 64, blocks of 256, stored as windows (weight + CCQ_OFFSET); the offset of a group is
// -CCQ_OFFSET * sum(activations).

#if defined(__AVX512VBMI__)

static void quantize_ccq2(const float * x, int8_t * q, int32_t * offset, float * d, int64_t n) {
    constexpr int GROUPS = QK_CCQ / CCQ_GROUP;
    for (int64_t b = 0; b < n / QK_CCQ; ++b) {
        block_q8_K block;
        quantize_row_q8_K(x + b * QK_CCQ, &block, QK_CCQ);
        memcpy(q + b * QK_CCQ, block.qs, QK_CCQ);
        d[b] = block.d;
        for (int g = 0; g < GROUPS; ++g) {
            const int16_t * sums   = block.bsums + g * CCQ_GROUP / 16;
            offset[b * GROUPS + g] = -CCQ_OFFSET * (sums[0] + sums[1] + sums[2] + sums[3]);
        }
    }
}

// code i of the four in each lane
static inline __m512i ccq2_code_of(__m512i codes, int i) {
    const __m512i low = _mm512_set1_epi32(255);
    switch (i) {
        case 0:
            return _mm512_and_si512(codes, low);
        case 3:
            return _mm512_srli_epi32(codes, 24);
        default:
            return _mm512_and_si512(_mm512_srli_epi32(codes, 8 * i), low);
    }
}

// codes, one a lane -> their windows
static inline __m512i ccq2_windows(__m512i codes, __m512i M, __m512i Z) {
    // the windows of u lie at bits 26, 23, 20 and 17, and those of the odd u of a pair 32 higher
    const __m512i bits = _mm512_set1_epi64(0x3134373a1114171a);
    const __m512i u    = _mm512_add_epi32(_mm512_mullo_epi32(codes, M), Z);
    return _mm512_and_si512(_mm512_maskz_multishift_epi64_epi8(UINT64_MAX, bits, u), _mm512_set1_epi8(63));
}

struct panel_ccq2 {
    static constexpr int STEP   = QK_CCQ;
    static constexpr int GROUPS = QK_CCQ / CCQ_GROUP;

    int64_t    k;
    size_t     next;  // panel, in bytes
    panel_rows x;
    __m512i    M, Z;
    __m512     d;
    alignas(64) uint8_t w[STEP * PANEL_ROWS];  // [4 weights][row][weight]
    __m512i scales[4];
    __m512i scale[GROUPS];

    panel_ccq2(int64_t k, const void * rows, size_t row_size, int64_t n)
        : k(k), next(PANEL_ROWS * row_size), x(rows, row_size, n) {
        __m512i header[4];
        load_transposed(x, 0, header);
        M = header[0];
        Z = header[1];
        d = _mm512_castsi512_ps(header[2]);
    }

    void unpack(int64_t k0) {
        const size_t codes = sizeof(ccq_row_header) + k0 / 4;
        for (int g = 0; g < GROUPS; ++g) {
            __m512i four[4];
            load_transposed(x, codes + g * (CCQ_GROUP / 4), four);
            for (int i = 0; i < 16; ++i) {
                _mm512_store_si512(w + (g * 16 + i) * 64, ccq2_windows(ccq2_code_of(four[i / 4], i % 4), M, Z));
            }
        }
        fetch(x.row[0] + next + k0 / QK_CCQ * (next / (k / QK_CCQ)), next / (k / QK_CCQ));
        load_scales(k0);
    }

    // the scales of the block at k0; 16 bytes of a row hold those of 8 blocks, and the padding makes every row as long
    void load_scales(int64_t k0) {
        constexpr int AT_ONCE = 16 / CCQ2_SCALE_SIZE;
        const int     block   = k0 / QK_CCQ % AT_ONCE;
        if (block == 0) {
            load_transposed(x, sizeof(ccq_row_header) + k / 4 + k0 / QK_CCQ * CCQ2_SCALE_SIZE, scales);
        }
        // two bytes with the nibbles of groups 1 0 3 2
        const __m512i nibbles = _mm512_srli_epi32(scales[block / 2], block % 2 * 16);
        const __m512i nibble  = _mm512_set1_epi32(15);
        scale[0]              = _mm512_and_si512(_mm512_srli_epi32(nibbles, 4), nibble);
        scale[1]              = _mm512_and_si512(nibbles, nibble);
        scale[2]              = _mm512_and_si512(_mm512_srli_epi32(nibbles, 12), nibble);
        scale[3]              = _mm512_and_si512(_mm512_srli_epi32(nibbles, 8), nibble);
    }

    template <int C> void multiply(int64_t k0, const panel_column * y, float * sums) const {
        __m512i total[C];
        for (int c = 0; c < C; ++c) {
            total[c] = _mm512_setzero_si512();
        }
        for (int g = 0; g < GROUPS; ++g) {
            __m512i dot[C];
            for (int c = 0; c < C; ++c) {
                dot[c] = _mm512_set1_epi32(y[c].offset[k0 / CCQ_GROUP + g]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < CCQ_GROUP / 4; ++i) {
                const __m512i weights = _mm512_load_si512(w + (g * (CCQ_GROUP / 4) + i) * 64);
                for (int c = 0; c < C; ++c) {
                    dot[c] = _mm512_dpbusd_epi32(dot[c], weights, broadcast4(y[c].q + k0 + g * CCQ_GROUP + 4 * i));
                }
            }
            for (int c = 0; c < C; ++c) {
                total[c] = _mm512_add_epi32(total[c], _mm512_mullo_epi32(dot[c], scale[g]));
            }
        }
        for (int c = 0; c < C; ++c) {
            float *      sum = sums + c * PANEL_ROWS;
            const __m512 yd  = _mm512_set1_ps(y[c].d[k0 / QK_CCQ]);
            _mm512_store_ps(sum, _mm512_fmadd_ps(to_float(total[c]), yd, _mm512_load_ps(sum)));
        }
    }

    __m512 result(__m512 sum) const { return _mm512_mul_ps(sum, d); }

    // all rows by one column, whose weights never leave the registers
    __m512 multiply_alone(const panel_column & y) {
        const size_t step = next / (k / CCQ_GROUP);
        __m512       sum  = _mm512_setzero_ps();
        for (int64_t k0 = 0; k0 < k; k0 += QK_CCQ) {
            load_scales(k0);
            __m512i total = _mm512_setzero_si512();
            for (int g = 0; g < GROUPS; ++g) {
                const int8_t * q     = y.q + k0 + g * CCQ_GROUP;
                const size_t   codes = sizeof(ccq_row_header) + (k0 + g * CCQ_GROUP) / 4;
                __m512i        four[4];
                load_transposed(x, codes, four);
                // two sums: the latency of the product is four times what it occupies
                __m512i dot[2] = { _mm512_set1_epi32(y.offset[k0 / CCQ_GROUP + g]), _mm512_setzero_si512() };
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    dot[i % 2] = _mm512_dpbusd_epi32(dot[i % 2], ccq2_windows(ccq2_code_of(four[i / 4], i % 4), M, Z),
                                                     broadcast4(q + 4 * i));
                }
                total = _mm512_add_epi32(total, _mm512_mullo_epi32(_mm512_add_epi32(dot[0], dot[1]), scale[g]));
                fetch(x.row[0] + 2 * next + (k0 / CCQ_GROUP + g) * step, step);
            }
            sum = _mm512_fmadd_ps(to_float(total), _mm512_set1_ps(y.d[k0 / QK_CCQ]), sum);
        }
        return result(sum);
    }

    static void alone(int64_t k, const void * rows, size_t row_size, int64_t nrows, const panel_column & y, float * dst) {
        for (int64_t r = 0; r < nrows; r += PANEL_ROWS) {
            panel_ccq2 panel(k, (const uint8_t *) rows + r * row_size, row_size, nrows - r);
            store(dst + r, nrows - r, panel.multiply_alone(y));
        }
    }
};

static const panel_type PANELS_CCQ2 = { CCQ_GROUP, QK_CCQ, quantize_ccq2, multiply_panels<panel_ccq2> };

#endif  // __AVX512VBMI__

const panel_type * panels_type(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q8_0:
            return &PANELS_Q8_0;
#if defined(__AVX512VBMI__)
        case GGML_TYPE_CCQ2:
            return &PANELS_CCQ2;
#endif
        default:
            return nullptr;
    }
}

#else

const panel_type * panels_type(enum ggml_type /* type */) {
    return nullptr;
}

#endif
