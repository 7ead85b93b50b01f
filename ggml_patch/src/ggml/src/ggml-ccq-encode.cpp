// Each row takes the code map of a pool that suits it best, tried with estimated group scales. Then, for each of a few
// super scales, the group scales are searched around their estimates and the code bytes exhaustively; the cheapest wins.
// ernie_gguf/ccq2/encode.py states the same in numpy, and tests hold the two to the same bytes.
//
// Sums have a fixed order, and nothing may be contracted to fused multiply-adds (-ffp-contract=off): the bytes are the
// same on every machine. Without importance all scores are integers below 2^24, exact in any order.

#include "ggml-ccq-encode.h"

#include "ggml-ccq-code.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))  // into functions that may use wider registers

namespace {

const int GROUP  = CCQ_GROUP;
const int QUADS  = CCQ2_QUADS;
const int MAPS   = 16;
const int TRIES  = 5;  // group scales, around the estimate
const int SUPERS = 4;  // super scales
const int HEADER = CCQ_HEADER;

// The group scale (0-15) of the row's loudest group. Trying four super scales instead of the first lowers the
// squared error by half a percent.
const double TOP_SCALE[SUPERS] = { 13.5, 14.25, 12.75, 12 };

const double BOOK_RMS = CCQ2_BOOK_RMS;
const double GRID     = 256;                           // targets are integers in units of 1/256 codebook step
const double CLIP     = 128 * GRID;                    // four times the largest codeword
const double D_LIMIT  = (double) FLT_MAX / (15 * 32);  // above it a decoded weight could overflow

const uint32_t POOL[MAPS][2] = {
    // M, Z; ernie_gguf/ccq2/code_maps.py says where they come from
    { 15853988, 162772864 },
    { 15854200, 104768176 },
    { 15854556, 145604437 },
    { 15851775, 156617283 },
    { 15855805, 86642051  },
    { 15853722, 139349495 },
    { 15856215, 95456369  },
    { 15854098, 151161730 },
    { 15852762, 113384479 },
    { 15855678, 163626508 },
    { 15852496, 138301591 },
    { 15722959, 104104122 },
    { 15855576, 124804606 },
    { 15850735, 90165521  },
    { 15852621, 215650152 },
    { 15849299, 146561678 },
};

struct codeword {
    float v[4];
    float half[4];  // -v*v/2, in units of the grid
};

struct book {
    codeword words[256];
};

std::vector<book> make_books() {
    std::vector<book> books(MAPS);
    for (int p = 0; p < MAPS; p++) {
        for (uint32_t b = 0; b < 256; b++) {
            const uint32_t c = (b * POOL[p][0] + POOL[p][1]) >> 17;
            for (int j = 0; j < 4; j++) {
                const int v               = (int) ((c >> (9 - 3 * j)) & 63) - 32;
                books[p].words[b].v[j]    = (float) v;
                books[p].words[b].half[j] = (float) (-v * v * (int) GRID / 2);
            }
        }
    }
    return books;
}

// 16 quads side by side: value j of quad q is at [j][q]
struct quads {
    float x[4][QUADS];
};

struct matches {
    int32_t code[QUADS];
    float   score[QUADS];
};

template <int WIDTH> struct simd {
    typedef float   floats __attribute__((vector_size(WIDTH)));
    typedef int32_t ints __attribute__((vector_size(WIDTH)));
};

// For N groups of targets in the grid, already times their weights: the bytes with the greatest scores, of equals the
// lowest. The score is the sum over four of a*t*v - a*v*v/2; the weighted squared distance is that of 0 less twice the
// score. `weights` are those of each group, or one for all.
template <int WIDTH, int N>
INLINE void nearest(const book & book, const quads * targets, const quads * weights, bool one_weight, matches * found) {
    typedef typename simd<WIDTH>::floats floats;
    typedef typename simd<WIDTH>::ints   ints;
    for (int first = 0; first < QUADS; first += WIDTH / 4) {
        floats y[N][4], a[N][4], top[N];
        ints   best[N];
        for (int i = 0; i < N; i++) {
            for (int j = 0; j < 4; j++) {
                memcpy(&y[i][j], &targets[i].x[j][first], WIDTH);
                memcpy(&a[i][j], &weights[one_weight ? 0 : i].x[j][first], WIDTH);
            }
            top[i]  = -INFINITY - floats{};
            best[i] = ints{};
        }
        for (int code = 0; code < 256; code++) {
            const float * v    = book.words[code].v;
            const float * half = book.words[code].half;
            const ints    here = code - ints{};
            floats        less = {};
            for (int i = 0; i < N; i++) {
                if (i == 0 || !one_weight) {
                    less = (a[i][0] * half[0] + a[i][1] * half[1]) + (a[i][2] * half[2] + a[i][3] * half[3]);
                }
                const floats score  = ((y[i][0] * v[0] + y[i][1] * v[1]) + (y[i][2] * v[2] + y[i][3] * v[3])) + less;
                const ints   better = score > top[i];
                top[i]              = better ? score : top[i];
                best[i]             = better ? here : best[i];
            }
        }
        for (int i = 0; i < N; i++) {
            memcpy(&found[i].code[first], &best[i], WIDTH);
            memcpy(&found[i].score[first], &top[i], WIDTH);
        }
    }
}

INLINE double round_even(double x) {  // |x| < 2^51
    return (x + 6755399441055744.0) - 6755399441055744.0;
}

INLINE double clamp(double x, double low, double high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

// The sum of n numbers, a multiple of 8, in the order of numpy's.
INLINE double sum(const double * x, int n) {
    double part[8];
    memcpy(part, x, sizeof(part));
    for (int i = 8; i < n; i += 8) {
        for (int j = 0; j < 8; j++) {
            part[j] += x[i + j];
        }
    }
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

INLINE double weighted_product(const double * a, const double * x, const double * y) {
    double part[GROUP];
    for (int i = 0; i < GROUP; i++) {
        part[i] = a[i] * (x[i] * y[i]);
    }
    return sum(part, GROUP);
}

struct encoding {
    double               d;
    std::vector<uint8_t> codes, scales;
    std::vector<double>  value;  // of the weights, in units of d
    double               cost;   // weighted squared error

    encoding(int64_t k) : d(0), codes(k / 4), scales(k / GROUP), value(k), cost(INFINITY) {}
};

// What is known of the rows' columns and, row by row, of a row.
struct workspace {
    const int64_t       k, groups;
    std::vector<quads>  weights, targets;  // per group
    std::vector<double> weight;            // the same weights, per column
    std::vector<double> w, unit;           // the row, and the row divided by d
    std::vector<double> rms, guess;        // per group: weighted root mean square, estimated scale
    encoding            best, trial;

    workspace(int64_t k, const float * importance)
        : k(k), groups(k / GROUP), weights(groups), targets(groups), weight(k), w(k), unit(k), rms(groups), guess(groups),
          best(k), trial(k) {
        double mean = 0;
        for (int64_t i = 0; i < k && importance; i++) {
            mean += importance[i];
        }
        mean /= (double) k;
        for (int64_t i = 0; i < k; i++) {
            // Two parts all alike and one by importance: of a small ERNIE, KL divergence .185; one to one .186, without .187.
            const float a = mean > 0 ? (float) ((2 + importance[i] / mean) / 3) : 1;

            weight[i]                                  = a;
            weights[i / GROUP].x[i % 4][i % GROUP / 4] = a;
        }
    }
};

INLINE void set_unit(workspace & s, double d) {
    for (int64_t i = 0; i < s.k; i++) {
        s.unit[i] = s.w[i] / d;
    }
    for (int64_t g = 0; g < s.groups; g++) {
        s.guess[g] = round_even(clamp(s.rms[g] / (BOOK_RMS * d), 0, 100));
    }
}

// The targets of a group that is given `scale`.
INLINE void set_targets(const workspace & s, int64_t g, double scale, quads & targets) {
    const double * unit = &s.unit[g * GROUP];
    for (int j = 0; j < 4; j++) {
        for (int q = 0; q < QUADS; q++) {
            const float t   = (float) round_even(clamp(unit[4 * q + j] / scale * GRID, -CLIP, CLIP));
            targets.x[j][q] = t * s.weights[g].x[j][q];
        }
    }
}

// The book that meets the row best with the estimated scales.
template <int WIDTH> INLINE int choose_book(const std::vector<book> & books, workspace & s) {
    const int AT_ONCE = 4;  // groups; a row has a multiple of four
    for (int64_t g = 0; g < s.groups; g++) {
        set_targets(s, g, clamp(s.guess[g], 1, 15), s.targets[g]);
    }
    int    chosen   = 0;
    double greatest = -INFINITY;
    for (int p = 0; p < MAPS; p++) {
        double total = 0;
        for (int64_t g = 0; g < s.groups; g += AT_ONCE) {
            matches found[AT_ONCE];
            nearest<WIDTH, AT_ONCE>(books[p], &s.targets[g], &s.weights[g], false, found);
            for (int i = 0; i < AT_ONCE; i++) {
                double score[QUADS];
                for (int q = 0; q < QUADS; q++) {
                    score[q] = found[i].score[q];
                }
                const double scale = clamp(s.guess[g + i], 1, 15);
                total += (scale * scale) * sum(score, QUADS);
            }
        }
        if (total > greatest) {
            greatest = total;
            chosen   = p;
        }
    }
    return chosen;
}

// The best scale around the estimate and its codes; returns the cost in units of d*d. Scale 0 stands for 64 zeros.
template <int WIDTH> INLINE double encode_group(const book & book, const workspace & s, int64_t g, encoding & out) {
    double  scale[TRIES];
    quads   targets[TRIES];
    matches found[TRIES];
    for (int i = 0; i < TRIES; i++) {
        scale[i] = clamp(s.guess[g] + i - TRIES / 2, 0, 15);
        set_targets(s, g, scale[i] > 1 ? scale[i] : 1, targets[i]);
    }
    nearest<WIDTH, TRIES>(book, targets, &s.weights[g], true, found);

    double least = INFINITY;
    for (int i = 0; i < TRIES; i++) {
        double value[GROUP], error[GROUP];
        for (int q = 0; q < QUADS; q++) {
            for (int j = 0; j < 4; j++) {
                value[4 * q + j] = scale[i] * book.words[found[i].code[q]].v[j];
                error[4 * q + j] = s.unit[g * GROUP + 4 * q + j] - value[4 * q + j];
            }
        }
        const double cost = weighted_product(&s.weight[g * GROUP], error, error);
        if (cost < least) {
            least         = cost;
            out.scales[g] = (uint8_t) scale[i];
            memcpy(&out.value[g * GROUP], value, sizeof(value));
            for (int q = 0; q < QUADS; q++) {
                out.codes[g * QUADS + q] = (uint8_t) (scale[i] > 0 ? found[i].code[q] : 0);
            }
        }
    }
    return least;
}

// Least squares shrinks the row, to a slope of about .95. Half of that is undone: d divided by the root of the slope.
// Makes better models than none or all (KL divergence of a small ERNIE .203 instead of .237).
INLINE double undo_half_of_the_shrinkage(const workspace & s) {
    double power = 0, dot = 0;
    for (int64_t g = 0; g < s.groups; g++) {
        const int64_t i = g * GROUP;
        power += weighted_product(&s.weight[i], &s.w[i], &s.w[i]);
        dot += weighted_product(&s.weight[i], &s.w[i], &s.best.value[i]);
    }
    const double slope = power > 0 ? dot * s.best.d / power : 1;
    const double grown = s.best.d / sqrt(clamp(slope, 0.25, 1));
    return grown < D_LIMIT ? grown : D_LIMIT;
}

INLINE void pack(const encoding & e, const uint32_t * map, float d, int64_t k, uint8_t * row) {
    memset(row, 0, ccq2_row_bytes(k));
    memcpy(row, map, 8);
    memcpy(row + 8, &d, 4);
    if (d > 0) {
        memcpy(row + HEADER, e.codes.data(), k / 4);
        for (int64_t g = 0; g < k / GROUP; g++) {
            row[HEADER + k / 4 + g / 2] |= (uint8_t) (g % 2 == 0 ? e.scales[g] << 4 : e.scales[g]);
        }
    }
}

template <int WIDTH> INLINE void encode_row(const std::vector<book> & books, workspace & s, const float * x, uint8_t * row) {
    double loudest = 0;
    for (int64_t i = 0; i < s.k; i++) {
        s.w[i] = x[i];  // squares of the largest float do not overflow
    }
    for (int64_t g = 0; g < s.groups; g++) {
        const double * w = &s.w[g * GROUP];
        s.rms[g]         = sqrt(weighted_product(&s.weight[g * GROUP], w, w) / sum(&s.weight[g * GROUP], GROUP));
        loudest          = s.rms[g] > loudest ? s.rms[g] : loudest;
    }
    int chosen  = 0;
    s.best.d    = 0;
    s.best.cost = INFINITY;
    for (int i = 0; i < SUPERS; i++) {
        const double wanted = loudest / BOOK_RMS / TOP_SCALE[i];
        s.trial.d           = (float) (wanted < D_LIMIT ? wanted : D_LIMIT);
        if (s.trial.d == 0) {  // a row of zeros, or one too quiet for float32
            break;
        }
        set_unit(s, s.trial.d);
        if (i == 0) {
            chosen = choose_book<WIDTH>(books, s);
        }
        s.trial.cost = 0;
        for (int64_t g = 0; g < s.groups; g++) {
            s.trial.cost += encode_group<WIDTH>(books[chosen], s, g, s.trial);
        }
        s.trial.cost *= s.trial.d * s.trial.d;
        if (s.trial.cost < s.best.cost) {
            std::swap(s.best, s.trial);
        }
    }
    pack(s.best, POOL[chosen], s.best.d > 0 ? (float) undo_half_of_the_shrinkage(s) : 0, s.k, row);
}

template <int WIDTH> INLINE void encode_rows(int64_t n, int64_t k, const float * x, const float * importance, uint8_t * rows) {
    static const std::vector<book> books = make_books();
    const int64_t                  size  = ccq2_row_bytes(k);
    workspace                      s(k, importance);
    for (int64_t i = 0; i < n; i++) {
        encode_row<WIDTH>(books, s, x + i * k, rows + i * size);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void encode_rows_64(int64_t       n,
                                                                                  int64_t       k,
                                                                                  const float * x,
                                                                                  const float * importance,
                                                                                  uint8_t *     rows) {
    encode_rows<64>(n, k, x, importance, rows);
}

__attribute__((target("avx2"))) void encode_rows_32(int64_t       n,
                                                    int64_t       k,
                                                    const float * x,
                                                    const float * importance,
                                                    uint8_t *     rows) {
    encode_rows<32>(n, k, x, importance, rows);
}
#endif

}  // namespace

int ccq2_vector_width(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return 64;
    }
    if (__builtin_cpu_supports("avx2")) {
        return 32;
    }
#endif
    return 16;
}

void ccq2_encode_rows(int width, int64_t n, int64_t k, const float * x, const float * importance, uint8_t * rows) {
#if defined(__x86_64__)
    if (width == 64) {
        return encode_rows_64(n, k, x, importance, rows);
    }
    if (width == 32) {
        return encode_rows_32(n, k, x, importance, rows);
    }
#else
    (void) width;
#endif
    encode_rows<16>(n, k, x, importance, rows);
}
