// Kernels of the panels, of 32 rows with AVX-512 and of 16 with AVX2 and NEON; what depends on the vectors is in
// panels-avx512.h, panels-avx2.h and panels-neon.h. There
//
//   ivec, fvec       hold an int32 (or four bytes), or a float, of each of LANES rows; VECTORS of them make a panel
//   COLUMNS          is how many columns are multiplied at a time: as the registers allow
//   load_transposed  16 bytes of each row, vector i holds bytes 4i ... 4i+3
//   ccq2_windows     the windows of one of the four codes in each lane
//   q8_0_bytes       the bytes of q8_0 as dot_bytes takes them: unsigned (q + Q8_0_OFFSET), if that is not 0
//   dot_bytes, dot_windows    sum[c][v] += weights . activations of column c; windows are below 64

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of its own intrinsics of AVX-512
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "panels-kernel.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-ccq.h"
#include "ggml-common.h"
#include "quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <numeric>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "panels-avx512.h"
#define PANELS
#define PANELS_FEW_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "panels-avx2.h"
#define PANELS
#define PANELS_FEW_AVX2
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include "panels-neon.h"
#define PANELS
#endif

#if defined(PANELS)

static constexpr int PANEL_ROWS = VECTORS * LANES;

// The rows of a panel. The last panel of a matrix has fewer: it takes its last row again, and stores fewer.
struct panel_rows {
    const uint8_t * row[PANEL_ROWS];

    panel_rows(const uint8_t * rows, size_t row_size, int64_t n) {
        for (int64_t i = 0; i < PANEL_ROWS; ++i) {
            row[i] = rows + std::min(i, n - 1) * row_size;
        }
    }
};

// Prefetch weights of a later panel in the order of memory, a part with each step through this one: row by row, as they
// are used, they come more slowly (ccq2 20 GB/s instead of 22; 10 without).
static inline void fetch(const uint8_t * weights, size_t size) {
    for (size_t line = 0; line < size; line += 64) {
        __builtin_prefetch(weights + line);
    }
}

// Panels of a type T, whose panel unpacks PANEL_STEP weights of its rows at a time and multiplies C columns with them.
template <typename T, int C>
static void multiply_columns(const T & panel, const panel_activations * const * y, int64_t at, float * sums, int64_t ncols) {
    int64_t c = 0;
    for (; c + C <= ncols; c += C) {
        const panel_activations * column[C];
        for (int i = 0; i < C; ++i) {
            column[i] = y[c + i] + at;
        }
        panel.template multiply<C>(column, sums + c * PANEL_ROWS);
    }
    if constexpr (C > 1) {
        multiply_columns<T, C / 2>(panel, y + c, at, sums + c * PANEL_ROWS, ncols - c);
    }
}

template <typename T> static void multiply_panels(panel_product p) {
    alignas(64) float sums[PANEL_COLUMNS * PANEL_ROWS];
    const int64_t     steps = (p.k + PANEL_STEP - 1) / PANEL_STEP;
    for (int64_t r = 0; r < p.nrows; r += PANEL_ROWS) {
        const uint8_t * first = p.rows + r * p.row_size;
        const size_t    part  = PANEL_ROWS * p.row_size / steps;
        T               panel(p.k, first, p.row_size, p.nrows - r);
        std::fill(sums, sums + p.ncols * PANEL_ROWS, 0.0f);
        for (int64_t step = 0; step < steps; ++step) {
            panel.unpack(step);
            fetch(first + PANEL_ROWS * p.row_size + step * part, part);
            multiply_columns<T, COLUMNS>(panel, p.columns, step * p.stride, sums, p.ncols);
        }
        const int64_t n = std::min<int64_t>(PANEL_ROWS, p.nrows - r);
        for (int64_t c = 0; c < p.ncols; ++c) {
            panel.finish(sums + c * PANEL_ROWS);
            std::copy(sums + c * PANEL_ROWS, sums + c * PANEL_ROWS + n, p.dst[c] + r);
        }
    }
}

// sum[c][v] = the offsets of a group
template <int C> static inline void set_offsets(const panel_activations * const (&y)[C], int group, ivec (&sum)[C][VECTORS]) {
    for (int c = 0; c < C; ++c) {
        for (int v = 0; v < VECTORS; ++v) {
            sum[c][v] = iset(y[c]->offset[group]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// q8_0: groups and blocks of 32, stored as q + Q8_0_OFFSET; the offset of a group is -Q8_0_OFFSET * sum(activations).

static void quantize_q8_0(const float * x, panel_activations * y, int64_t n) {
    block_q8_0 blocks[PANEL_STEP / QK8_0];
    quantize_row_q8_0(x, blocks, n);
    for (int b = 0; b < n / QK8_0; ++b) {
        memcpy(y->q + b * QK8_0, blocks[b].qs, QK8_0);
        y->d[b]      = GGML_CPU_FP16_TO_FP32(blocks[b].d);
        y->offset[b] = -Q8_0_OFFSET * std::accumulate(blocks[b].qs, blocks[b].qs + QK8_0, 0);
    }
}

struct panel_q8_0 {
    static constexpr int QUADS = QK8_0 / 4;

    int64_t    blocks;  // of a row
    int        n;       // of this step
    panel_rows x;
    fvec       scale[PANEL_STEP / QK8_0][VECTORS];
    alignas(64) uint8_t w[PANEL_STEP * PANEL_ROWS];  // [4 weights][row][weight]

    panel_q8_0(int64_t k, const uint8_t * rows, size_t row_size, int64_t nrows) : blocks(k / QK8_0), x(rows, row_size, nrows) {}

    void unpack(int64_t step) {
        const int64_t first = step * (PANEL_STEP / QK8_0);
        n                   = (int) std::min<int64_t>(PANEL_STEP / QK8_0, blocks - first);
        for (int b = 0; b < n; ++b) {
            const size_t at = (first + b) * sizeof(block_q8_0);
            for (int v = 0; v < VECTORS; ++v) {
                const uint8_t * const * row = x.row + v * LANES;
                for (int half = 0; half < 2; ++half) {
                    ivec four[4];
                    load_transposed(row, at + offsetof(block_q8_0, qs) + half * 16, four);
                    for (int i = 0; i < 4; ++i) {
                        four[i] = q8_0_bytes(four[i]);
                    }
                    store_weights(w + ((b * QUADS + half * 4) * VECTORS + v) * LANES * 4, four);
                }
                scale[b][v] = load_halves(row, at);
            }
        }
    }

    template <int C> void multiply(const panel_activations * const (&y)[C], float * sums) const {
        fvec total[C][VECTORS];
        for (int c = 0; c < C; ++c) {
            for (int v = 0; v < VECTORS; ++v) {
                total[c][v] = fload(sums + c * PANEL_ROWS + v * LANES);
            }
        }
        for (int b = 0; b < n; ++b) {
            ivec sum[C][VECTORS];
            set_offsets<C>(y, b, sum);
            dot_bytes<C, QUADS>(w + b * QUADS * PANEL_ROWS * 4, y, b * QK8_0, sum);
            for (int c = 0; c < C; ++c) {
                for (int v = 0; v < VECTORS; ++v) {
                    total[c][v] = fmadd(to_float(sum[c][v]), fmul(scale[b][v], fset(y[c]->d[b])), total[c][v]);
                }
            }
        }
        for (int c = 0; c < C; ++c) {
            for (int v = 0; v < VECTORS; ++v) {
                fstore(sums + c * PANEL_ROWS + v * LANES, total[c][v]);
            }
        }
    }

    void finish(float * /* sums */) const {}
};

// ---------------------------------------------------------------------------------------------------------------------
// ccq2: groups of 64, blocks of 256, stored as windows (weight + CCQ_OFFSET); the offset of a group is
// -CCQ_OFFSET * sum(activations).

static_assert(QK_CCQ == PANEL_STEP, "a block of ccq2 is a step");

// As quantize_row_q8_K, which gives the scale the sign of the largest activation: that cancels out.
static void quantize_ccq2(const float * x, panel_activations * y, int64_t /* n */) {
    uint32_t largest = 0;  // as bits: compilers make vectors of that
    for (int i = 0; i < QK_CCQ; ++i) {
        uint32_t size;
        memcpy(&size, x + i, sizeof(size));
        largest = std::max(largest, size & 0x7fffffff);
    }
    float max;
    memcpy(&max, &largest, sizeof(max));
    const float inverse = max > 0.0f ? 127.0f / max : 0.0f;
    y->d[0]             = max > 0.0f ? 1.0f / inverse : 0.0f;
    for (int i = 0; i < QK_CCQ; i += LANES) {
        store_rounded(y->q + i, fmul(fload(x + i), fset(inverse)));
    }
    for (int g = 0; g < QK_CCQ / CCQ_GROUP; ++g) {
        y->offset[g] = -CCQ_OFFSET * std::accumulate(y->q + g * CCQ_GROUP, y->q + (g + 1) * CCQ_GROUP, 0);
    }
}

struct panel_ccq2 {
    static constexpr int GROUPS = QK_CCQ / CCQ_GROUP;
    static constexpr int QUADS  = CCQ_GROUP / 4;

    int64_t    k;
    panel_rows x;
    ivec       M[VECTORS], Z[VECTORS];
    fvec       d[VECTORS];
    ivec       scales[VECTORS][4];
    fvec       scale[GROUPS][VECTORS];
    alignas(64) uint8_t w[PANEL_STEP * PANEL_ROWS];  // [4 weights][row][weight]

    panel_ccq2(int64_t k, const uint8_t * rows, size_t row_size, int64_t nrows) : k(k), x(rows, row_size, nrows) {
        for (int v = 0; v < VECTORS; ++v) {
            ivec header[4];
            load_transposed(x.row + v * LANES, 0, header);
            M[v] = header[0];
            Z[v] = header[1];
            d[v] = as_float(header[2]);
        }
    }

    void unpack(int64_t step) {
        for (int v = 0; v < VECTORS; ++v) {
            for (int g = 0; g < GROUPS; ++g) {
                ivec codes[4];
                load_transposed(x.row + v * LANES, sizeof(ccq_row_header) + step * CCQ2_CODE_SIZE + g * QUADS, codes);
                for (int i = 0; i < 4; ++i) {
                    ivec four[4];
                    for (int j = 0; j < 4; ++j) {
                        four[j] = ccq2_windows(codes[i], j, M[v], Z[v]);
                    }
                    store_weights(w + ((g * QUADS + 4 * i) * VECTORS + v) * LANES * 4, four);
                }
            }
            load_scales(step, v);
        }
    }

    // the scales of a block; 16 bytes of a row hold those of 8 blocks, and the padding makes every row as long
    void load_scales(int64_t block, int v) {
        constexpr int AT_ONCE = 16 / CCQ2_SCALE_SIZE;
        if (block % AT_ONCE == 0) {
            load_transposed(x.row + v * LANES, sizeof(ccq_row_header) + k / 4 + block * CCQ2_SCALE_SIZE, scales[v]);
        }
        // two bytes with the nibbles of groups 1 0 3 2
        const ivec nibbles = scales[v][block % AT_ONCE / 2];
        if (block % 2 == 0) {
            scale[0][v] = to_float(bits(nibbles, 4, 4));
            scale[1][v] = to_float(bits(nibbles, 0, 4));
            scale[2][v] = to_float(bits(nibbles, 12, 4));
            scale[3][v] = to_float(bits(nibbles, 8, 4));
        } else {
            scale[0][v] = to_float(bits(nibbles, 20, 4));
            scale[1][v] = to_float(bits(nibbles, 16, 4));
            scale[2][v] = to_float(bits(nibbles, 28, 4));
            scale[3][v] = to_float(bits(nibbles, 24, 4));
        }
    }

    template <int C> void multiply(const panel_activations * const (&y)[C], float * sums) const {
        fvec total[C][VECTORS];  // of integers below 2^24: exact
        for (int c = 0; c < C; ++c) {
            for (int v = 0; v < VECTORS; ++v) {
                total[c][v] = fset(0.0f);
            }
        }
        for (int g = 0; g < GROUPS; ++g) {
            ivec sum[C][VECTORS];
            set_offsets<C>(y, g, sum);
            dot_windows<C, QUADS>(w + g * QUADS * PANEL_ROWS * 4, y, g * CCQ_GROUP, sum);
            for (int c = 0; c < C; ++c) {
                for (int v = 0; v < VECTORS; ++v) {
                    total[c][v] = fmadd(to_float(sum[c][v]), scale[g][v], total[c][v]);
                }
            }
        }
        for (int c = 0; c < C; ++c) {
            for (int v = 0; v < VECTORS; ++v) {
                float * s = sums + c * PANEL_ROWS + v * LANES;
                fstore(s, fmadd(total[c][v], fset(y[c]->d[0]), fload(s)));
            }
        }
    }

    void finish(float * sums) const {
        for (int v = 0; v < VECTORS; ++v) {
            fstore(sums + v * LANES, fmul(fload(sums + v * LANES), d[v]));
        }
    }
};

#if defined(PANELS_FEW_AVX512)
#include "panels-few-avx512.h"
#elif defined(PANELS_FEW_AVX2)
#include "panels-few-avx2.h"
#else
static constexpr panel_few FEW_Q8_0 = {};
static constexpr panel_few FEW_CCQ2 = {};
#endif

static const panel_type PANELS_Q8_0 = { PANEL_ROWS, QK8_0, quantize_q8_0, multiply_panels<panel_q8_0>, FEW_Q8_0 };
static const panel_type PANELS_CCQ2 = { PANEL_ROWS, QK_CCQ, quantize_ccq2, multiply_panels<panel_ccq2>, FEW_CCQ2 };

const panel_type * panels_type(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q8_0:
            return &PANELS_Q8_0;
        case GGML_TYPE_CCQ2:
            return &PANELS_CCQ2;
        default:
            return nullptr;
    }
}

#else

const panel_type * panels_type(enum ggml_type /* type */) {
    return nullptr;
}

#endif
