// The dot product of ccq2 that this machine's build has against the plain one: any code map, largest scales and codes.

#include "ccq.h"
#include "ggml-ccq.h"
#include "ggml.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

int main() {
    std::mt19937 random(1);
    int          failed = 0;
    int          done   = 0;
    for (int k : { 256, 512, 768, 1280, 2304, 8192 }) {
        for (int trial = 0; trial < 40; ++trial) {
            std::vector<uint8_t>    row(ggml_row_size(GGML_TYPE_CCQ2, k));
            std::vector<block_q8_K> y(k / QK_K);
            for (auto & byte : row) {
                byte = trial == 0 ? 255 : (uint8_t) random();
            }
            const float d = 1e-3f;
            memcpy(row.data() + offsetof(ccq_row_header, d), &d, sizeof(d));
            for (auto & block : y) {
                block.d = 1e-2f * (float) (random() % 100);
                for (int i = 0; i < QK_K; ++i) {
                    block.qs[i] = trial == 0 ? -127 : (int8_t) (random() % 255 - 127);
                }
                for (int i = 0; i < QK_K / 16; ++i) {
                    block.bsums[i] = 0;
                    for (int j = 0; j < 16; ++j) {
                        block.bsums[i] += block.qs[16 * i + j];
                    }
                }
            }
            float expected = 0.0f;
            float found    = 0.0f;
            ggml_vec_dot_ccq2_q8_K_generic(k, &expected, 0, row.data(), 0, y.data(), 0, 1);
            ggml_vec_dot_ccq2_q8_K(k, &found, 0, row.data(), 0, y.data(), 0, 1);
            // the sums of a block are exact; those of the blocks, up to 100, are rounded in another order
            if (!(fabsf(found - expected) <= 1e-5f * (fabsf(expected) + 100.0f))) {
                printf("k=%d trial=%d: %g, expected %g\n", k, trial, (double) found, (double) expected);
                failed += 1;
            }
            done += 1;
        }
    }
    printf("%d of %d dot products differ\n", failed, done);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
