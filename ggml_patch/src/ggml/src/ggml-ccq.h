// ccq2: 2-bit weights as Baidu's Convolutional Code Quantization stores them (ERNIE-4.5-300B-A47B-2Bits).
//
// A row of K weights (K a multiple of 256) is self-contained; all integers are little-endian:
//
//   offset    size    field
//   0         16      header: M, Z (uint32), d (float32, the row's super scale), zero
//   16        K/4     codes: byte i holds the weights 4i ... 4i+3
//   16 + K/4  K/128   group scales, 4 bits each: byte g holds group 2g in its high and 2g+1 in its low nibble
//   ...       -       zeros up to a multiple of 16
//
// The affine map b -> (b*M + Z) >> 17 turns a byte into a 15-bit code, and four overlapping 6-bit windows of the
// code are the weights, plus 32, of its group of four. One multiply-add and a shift decode four weights.
#pragma once

#include "ggml-ccq-code.h"
#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// the decoding of single values serves the GPU code too
#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#define CCQ_FUNC static inline __host__ __device__
#else
#define CCQ_FUNC static inline
#endif

typedef struct {
    uint32_t M;
    uint32_t Z;
    float    d;
    uint32_t zero;
} ccq_row_header;

#ifndef __cplusplus
_Static_assert(sizeof(ccq_row_header) == 16, "wrong ccq row header size");
#endif

// decode one code: 15 bits, in the low bits of the result
CCQ_FUNC uint32_t ccq2_code(uint8_t b, uint32_t M, uint32_t Z) {
    return (b * M + Z) >> 17;
}

// decode one weight: window j = 0...3 of a code
CCQ_FUNC int ccq2_value(uint32_t c, int j) {
    return (int) ((c >> (9 - 3 * j)) & 63) - CCQ_OFFSET;
}

static inline const uint8_t * ccq2_codes(const void * row) {
    return (const uint8_t *) row + sizeof(ccq_row_header);
}

static inline const uint8_t * ccq2_scales(const void * row, int64_t k) {
    return ccq2_codes(row) + k / 4;
}

// the scale of group g of a row
static inline int ccq2_scale(const uint8_t * scales, int64_t g) {
    return g % 2 == 0 ? scales[g / 2] >> 4 : scales[g / 2] & 15;
}

// one row each
GGML_API void dequantize_row_ccq2(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_ccq2_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// clang-format off
GGML_API size_t quantize_ccq2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst,
    int64_t nrows, int64_t n_per_row, const float * imatrix);
// clang-format on

// true if the bytes are one valid row
GGML_API bool validate_row_ccq2(const void * data, size_t nbytes);

#ifdef __cplusplus
}
#endif
