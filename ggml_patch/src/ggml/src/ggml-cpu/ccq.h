#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Dot product of a ccq2 row with a q8_K row of n elements. The generic kernel is the reference that the fast one of
// this machine is tested against; both are exact integer sums per block of 256, added up as floats.
void ggml_vec_dot_ccq2_q8_K(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
// clang-format off
void ggml_vec_dot_ccq2_q8_K_generic(
    int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
// clang-format on

#ifdef __cplusplus
}
#endif
