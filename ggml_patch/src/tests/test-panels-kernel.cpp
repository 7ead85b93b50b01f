// The kernels of panels.cpp, compiled for any instruction set that this machine has, against decoded weights times decoded
// activations: shapes that fill no panel, and every number of columns up to the most that share one.
//
// usage: test-panels-kernel, linked with panels-kernel.cpp as compiled for the instruction set

#include "ggml-ccq.h"
#include "ggml-cpu.h"
#include "panels-kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

struct problem {
    ggml_type type;
    int64_t   k, rows, columns;
};

struct matrix {
    std::vector<uint8_t> rows;
    std::vector<float>   decoded;
};

static std::vector<float> normal(int64_t n, std::mt19937 & random) {
    std::normal_distribution<float> distribution;
    std::vector<float>              x(n);
    std::generate(x.begin(), x.end(), [&] { return distribution(random); });
    return x;
}

// Any code map for a row of ccq2: whole words, fewer and fewer bits in the lower half of M down to none, and a Z
// that is the lower half of M times more than 16 bits less a byte, which kernels that shift the codes for Z must see.
static void random_map(uint8_t * row, int64_t r, std::mt19937 & random) {
    uint32_t M = (uint32_t) random();
    uint32_t Z = (uint32_t) random();
    if (r % 3 == 1) {
        M = (M & 0xffff0000) | (M << r / 3 % 17 & 0xffff);
    } else if (r % 3 == 2) {
        M |= 1;
        Z = (Z & 0xffff0000) | ((0xffff - (uint32_t) random() % 255) * M & 0xffff);
    }
    memcpy(row + offsetof(ccq_row_header, M), &M, sizeof(M));
    memcpy(row + offsetof(ccq_row_header, Z), &Z, sizeof(Z));
}

// what is beyond the last row may be fetched, never read
static matrix random_matrix(const problem & p, std::mt19937 & random) {
    const std::vector<float> weights = normal(p.k * p.rows, random);
    matrix                   m       = { std::vector<uint8_t>(ggml_row_size(p.type, p.k) * p.rows), weights };
    ggml_quantize_chunk(p.type, weights.data(), m.rows.data(), 0, p.rows, p.k, nullptr);
    for (int64_t r = 0; r < p.rows; ++r) {
        if (p.type == GGML_TYPE_CCQ2) {
            random_map(m.rows.data() + r * ggml_row_size(p.type, p.k), r, random);
        }
        ggml_get_type_traits(p.type)->to_float(m.rows.data() + r * ggml_row_size(p.type, p.k), m.decoded.data() + r * p.k, p.k);
    }
    return m;
}

// [step][column], as panels.cpp has them; returns what they stand for, or nothing if one is too far from x
static std::vector<float> quantize(const panel_type & type, const problem & p, std::vector<float> x, panel_activations * y) {
    for (int64_t c = 0; c < p.columns; ++c) {
        for (int64_t k0 = 0; k0 < p.k; k0 += PANEL_STEP) {
            const int64_t       n  = std::min<int64_t>(PANEL_STEP, p.k - k0);
            panel_activations & to = y[k0 / PANEL_STEP * p.columns + c];
            float *             at = x.data() + c * p.k + k0;
            type.quantize(at, &to, n);
            for (int64_t i = 0; i < n; ++i) {
                const float d     = to.d[i / type.block];
                const float value = d * (float) to.q[i];
                if (!(std::fabs(value - at[i]) <= 0.57f * d)) {  // half a step, and 127 times what float16 took of d
                    return {};
                }
                at[i] = value;
            }
        }
    }
    return x;
}

static bool is_product(const problem & p, const matrix & m, const std::vector<float> & x, const std::vector<float> & found) {
    for (int64_t c = 0; c < p.columns; ++c) {
        for (int64_t r = 0; r < p.rows; ++r) {
            double expected = 0.0;
            double size     = 0.0;
            for (int64_t i = 0; i < p.k; ++i) {
                const double term = (double) m.decoded[r * p.k + i] * x[c * p.k + i];
                expected += term;
                size += std::fabs(term);
            }
            if (!(std::fabs(found[c * p.rows + r] - expected) <= 1e-6 * size)) {
                printf("row %d of column %d: %g, expected %g\n", (int) r, (int) c, (double) found[c * p.rows + r], expected);
                return false;
            }
        }
    }
    return true;
}

static bool check(const panel_type & type, panel_multiply * multiply, const problem & p, std::mt19937 & random) {
    struct alignas(64) aligned {
        panel_activations y;
    };

    const int64_t        steps = (p.k + PANEL_STEP - 1) / PANEL_STEP;
    std::vector<aligned> y(steps * p.columns);
    const matrix         m = random_matrix(p, random);

    const std::vector<float> x = quantize(type, p, normal(p.k * p.columns, random), &y[0].y);
    if (x.empty()) {
        printf("activations are not rounded to the nearest\n");
        return false;
    }
    std::vector<const panel_activations *> columns;
    std::vector<float *>                   dst;
    std::vector<float>                     found(p.rows * p.columns, NAN);
    for (int64_t c = 0; c < p.columns; ++c) {
        columns.push_back(&y[c].y);
        dst.push_back(found.data() + c * p.rows);
    }
    multiply({ p.k, m.rows.data(), ggml_row_size(p.type, p.k), p.rows, columns.data(), p.columns, dst.data(), p.columns });
    return is_product(p, m, x, found);
}

static bool takes(const panel_few & few, const problem & p) {
    return p.columns <= few.columns && p.k <= few.k && p.rows % few.rows == 0;
}

int main() {
    ggml_cpu_init();  // the table of float16
    std::mt19937 random(1);
    int          done   = 0;
    int          failed = 0;
    for (ggml_type name : { GGML_TYPE_Q8_0, GGML_TYPE_CCQ2 }) {
        const panel_type * type = panels_type(name);
        if (!type) {
            printf("no kernel for %s\n", ggml_type_name(name));
            return EXIT_FAILURE;
        }
        for (int64_t k : { 32, 96, 256, 768, 2304, 8448 }) {
            for (int64_t rows : { 1, 8, 24, 67 }) {
                for (int64_t columns : { 1, 2, 3, 4, 7, 8, 9, 16, 128 }) {
                    for (panel_multiply * multiply : { type->multiply, type->few.multiply }) {
                        const problem p = { name, k, rows, columns };
                        if (k % type->block != 0 || !multiply || (multiply == type->few.multiply && !takes(type->few, p))) {
                            continue;
                        }
                        const bool right = check(*type, multiply, p, random);
                        if (!right) {
                            printf("%s k=%d rows=%d columns=%d%s\n", ggml_type_name(name), (int) k, (int) rows, (int) columns,
                                   multiply == type->few.multiply ? " few" : "");
                        }
                        failed += !right;
                        done += 1;
                    }
                }
            }
        }
    }
    printf("%d of %d products differ\n", failed, done);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
