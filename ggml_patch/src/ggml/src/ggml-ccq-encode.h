// The encoder of ccq2, for ggml's quantize_ccq2 and for the converter: floats in, rows out. It leans on nothing of ggml.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// the widest vector registers of this machine that the encoder has code for, in bytes: 16, 32 or 64
int ccq2_vector_width(void);

// Encodes `n` rows of `k` finite floats, k a positive multiple of 256, with vector registers of `width` bytes; the result
// does not depend on the width. `importance` says how much the errors of the k columns matter: finite numbers, none
// negative, such as the mean squares of what the columns are multiplied with. NULL: all alike.
void ccq2_encode_rows(int width, int64_t n, int64_t k, const float * x, const float * importance, uint8_t * rows);

#ifdef __cplusplus
}
#endif
