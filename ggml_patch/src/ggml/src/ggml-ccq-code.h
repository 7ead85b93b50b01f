// The numbers of a ccq2 row (ggml-ccq.h says what they count): for the kernels, and for encoders without ggml.
#pragma once

#include <stdint.h>

#define QK_CCQ        256  // weights in a block
#define CCQ_GROUP     64   // weights that share a group scale
#define CCQ_OFFSET    32   // what the windows of a code are above the weights
#define CCQ_ROW_ALIGN 16
#define CCQ_HEADER    16  // bytes

// bytes of codes and of group scales that a block adds to a row
#define CCQ2_CODE_SIZE  (QK_CCQ / 4)
#define CCQ2_SCALE_SIZE (QK_CCQ / CCQ_GROUP / 2)

#define CCQ2_QUADS    (CCQ_GROUP / 4)  // code bytes of a group
#define CCQ2_BOOK_RMS 16.5             // a group of rms r is met best with r/16.5 per codebook step

static inline int64_t ccq2_row_bytes(int64_t k) {
    const int64_t scales = (k / (2 * CCQ_GROUP) + CCQ_ROW_ALIGN - 1) / CCQ_ROW_ALIGN * CCQ_ROW_ALIGN;
    return CCQ_HEADER + k / 4 + scales;
}
