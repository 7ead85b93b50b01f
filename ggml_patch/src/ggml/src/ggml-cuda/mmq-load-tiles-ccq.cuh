// Tiles of ccq2 for the matrix-multiplication kernels (mmq.cuh): decoded into the int8 layout of q8_0.
#pragma once

#include "ccq.cuh"

// A row of ccq2 is no multiple of a block, so strides count units of CCQ_ROW_ALIGN bytes. `x` is the tile's first row and
// kb0 the block in it, of blocks_per_row.
// clang-format off
template <ggml_type type, int J, bool fallback>
static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_ccq2(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kb0, const int blocks_per_row, const int i_max, const int stride) {
    // clang-format on
    constexpr int warp_size       = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps          = ggml_cuda_mmq_get_nthreads(type, J, fallback) / warp_size;
    constexpr int I               = ggml_cuda_mmq_get_I(type, J, fallback);
    constexpr int threads_per_row = QK_CCQ / CCQ_GROUP;  // a thread decodes one group of 64 weights
    constexpr int nrows           = warp_size / threads_per_row;

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    constexpr int sram_stride = ggml_cuda_mmq_get_sram_stride(type, J, fallback);
    int *         x_qs        = (int *) x_tile;
    float *       x_df        = (float *) (x_qs + MMQ_TILE_NE_K * 2);
#else
    constexpr tile_x_sizes txs  = mmq_get_dp4a_tile_x_sizes(type, I);
    int *                  x_qs = (int *) x_tile;
    float *                x_df = (float *) (x_qs + txs.qs);
#endif  // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

    const int groups = blocks_per_row * threads_per_row;
    const int lane   = threadIdx.x % threads_per_row;
    const int g      = kb0 * threads_per_row + lane;

#pragma unroll
    for (int i0 = 0; i0 < I; i0 += nwarps * nrows) {
        int i = i0 + threadIdx.y * nrows + threadIdx.x / threads_per_row;
        if (fallback) {
            i = min(i, i_max);
        }

        const char *   row      = x + (int64_t) i * stride * CCQ_ROW_ALIGN;
        const uint4    h        = ccq2_header(row);
        const uint4    codes    = ((const uint4 *) (row + sizeof(ccq_row_header)))[g];
        const float    scale    = ccq2_group_scale(row, groups, g) * __uint_as_float(h.z) * (1.0f / CCQ2_UNPACKED);
        const uint32_t words[4] = { codes.x, codes.y, codes.z, codes.w };

#pragma unroll
        for (int w = 0; w < 4; ++w) {
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const int v = ccq2_unpack(words[w], b, h.x, h.y);
#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
                x_qs[i * sram_stride + 16 * lane + 4 * w + b] = v;
#else
                x_qs[i * (2 * MMQ_TILE_NE_K + 1) + 16 * lane + 4 * w + b] = v;
#endif  // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
            }
        }
        // the layout has a scale per 32 weights
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
            x_df[i * sram_stride + 2 * lane + half] = scale;
#else
            x_df[i * (MMQ_TILE_NE_K / 4) + i / 4 + 2 * lane + half] = scale;
#endif  // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
        }
    }
}
