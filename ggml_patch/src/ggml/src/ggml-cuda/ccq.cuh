// ccq2 on CUDA: see ggml-ccq.h for the rows, ccq.cu for the kernels, mmq-ccq.cuh for large batches.
#pragma once

#include "common.cuh"
#include "../ggml-ccq.h"

// (a & b) ^ c in one instruction: with two constants the compiler makes two of it
static __device__ __forceinline__ int ccq2_and_xor(const uint32_t a, const uint32_t b, const uint32_t c) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    return (int) ((a & b) ^ c);
#else
    int out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
#endif
}

// Decode code byte i of four: the weights times four, as signed bytes in order.
//
// With u = b*M + Z the windows lie at bits 26, 23, 20 and 17. A window in the top six bits of a byte is four times its
// value; u and u << 6 bring two of them to the top of their high halves, a further << 3 the other two. Flipping the top
// bit takes the offset of 32 off. Left shifts can run on the multiply pipe, so this is four instructions of each pipe
// together with the dot product that follows.
static __device__ __forceinline__ int ccq2_unpack(const uint32_t codes, const int i, const uint32_t M, const uint32_t Z) {
    const uint32_t b     = __byte_perm(codes, 0, 0x4440 + i);
    const uint32_t u     = b * M + Z;
    const uint32_t pairs = __byte_perm(u, u << 6, 0x7632);
    const uint32_t bytes = __byte_perm(pairs, pairs << 3, 0x7351);
    return ccq2_and_xor(bytes, 0xfcfcfcfc, 0x80808080);
}

// Decode the code bytes 2i and 2i+1 of four: x holds the first two weights of either byte, y the others. The shifts do for
// both bytes, so this is seven instructions a byte where ccq2_unpack takes eight.
static __device__ __forceinline__ int2 ccq2_unpack_pair(const uint32_t codes, const int i, const uint32_t M, const uint32_t Z) {
    const uint32_t u0   = __byte_perm(codes, 0, 0x4440 + 2 * i) * M + Z;
    const uint32_t u1   = __byte_perm(codes, 0, 0x4441 + 2 * i) * M + Z;
    const uint32_t pair = __byte_perm(u0, u1, 0x7632);
    const uint32_t x    = __byte_perm(pair, pair << 3, 0x7351);
    const uint32_t y    = __byte_perm(pair << 6, pair << 9, 0x7351);
    return make_int2(ccq2_and_xor(x, 0xfcfcfcfc, 0x80808080), ccq2_and_xor(y, 0xfcfcfcfc, 0x80808080));
}

// (a & b) | c, likewise
static __device__ __forceinline__ uint32_t ccq2_and_or(const uint32_t a, const uint32_t b, const uint32_t c) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    return (a & b) | c;
#else
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
#endif
}

// Byte i of four, by the pipe that multiplies: the one for logic is the busier.
static __device__ __forceinline__ uint32_t ccq2_byte(const uint32_t codes, const int i) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    return codes >> (8 * i) & 255;
#else
    uint32_t out;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(codes), "r"(1u << (8 * i)), "r"(0));
    return out;
#endif
}

// Decode the code bytes 2i and 2i+1 of four as half2: w[j] holds window j of either byte, 1024 + 16 v for even and
// 1024 + 2 v for odd j, where v is the weight plus 32. A mask and an or put a window into the mantissa, and one shift
// serves two windows: five instructions a byte.
static __device__ __forceinline__ void ccq2_unpack_half2(const uint32_t codes,
                                                         const int      i,
                                                         const uint32_t M,
                                                         const uint32_t Z,
                                                         uint32_t (&w)[4]) {
    const uint32_t u0   = ccq2_byte(codes, 2 * i) * M + Z;
    const uint32_t u1   = ccq2_byte(codes, 2 * i + 1) * M + Z;
    const uint32_t low  = __byte_perm(u0, u1, 0x7632);
    const uint32_t high = low >> 6;
    w[0]                = ccq2_and_or(high, 0x03f003f0, 0x64006400);
    w[1]                = ccq2_and_or(high, 0x007e007e, 0x64006400);
    w[2]                = ccq2_and_or(low, 0x03f003f0, 0x64006400);
    w[3]                = ccq2_and_or(low, 0x007e007e, 0x64006400);
}

// what the unpacked weights are too large by
static constexpr float CCQ2_UNPACKED = 4.0f;

// the row header as it lies in memory: M, Z, d, 0
static __device__ __forceinline__ uint4 ccq2_header(const char * row) {
    return *(const uint4 *) row;
}

// the scale of group g of a row
static __device__ __forceinline__ float ccq2_group_scale(const char * row, const int groups, const int g) {
    const int pair = ((const uint8_t *) row)[sizeof(ccq_row_header) + groups * (CCQ_GROUP / 4) + g / 2];
    return (float) (g % 2 == 0 ? pair >> 4 : pair & 15);
}

// at most MMVQ_MAX_BATCH_SIZE columns, or tokens with ids
void ggml_cuda_mul_mat_vec_ccq2(ggml_backend_cuda_context &           ctx,
                                const ggml_tensor *                   src0,
                                const ggml_tensor *                   src1,
                                const ggml_tensor *                   ids,
                                ggml_tensor *                         dst,
                                const ggml_cuda_mm_fusion_args_host * fusion);

// Whether the experts' few tokens are done by tensor cores with weights in registers: a batch that is neither a token or two
// nor a prompt, see ccq-mma.cu.
bool ggml_cuda_should_use_mma_ccq2(const ggml_tensor * src0,
                                   const ggml_tensor * src1,
                                   const ggml_tensor * ids,
                                   const ggml_tensor * dst);

void ggml_cuda_mul_mat_mma_ccq2(ggml_backend_cuda_context &           ctx,
                                const ggml_tensor *                   src0,
                                const ggml_tensor *                   src1,
                                const ggml_tensor *                   ids,
                                ggml_tensor *                         dst,
                                const ggml_cuda_mm_fusion_args_host * fusion);

// as get_rows_cuda, for src0 of type ccq2
// clang-format off
void get_rows_ccq2_cuda(
        const void * src0_d, const int32_t * src1_d, void * dst_d, ggml_type dst_type,
        int64_t ne00, size_t nb01, size_t nb02, size_t nb03,
        int64_t ne10, int64_t ne11, int64_t ne12, size_t nb10, size_t nb11, size_t nb12,
        size_t nb1, size_t nb2, size_t nb3, cudaStream_t stream);
// clang-format on
