// Tiles of ccq2 for the matrix-multiplication kernels (mmq.cuh): decoded into the int8 layout of q8_0, but a scale serves
// 64 weights and 64 activations.
#pragma once

#include "ccq.cuh"
#include "cp-async.cuh"

// Start to copy `n16` times 16 bytes to shared memory, with all threads of the block.
template <int n16, int nthreads>
static __device__ __forceinline__ void ggml_cuda_mmq_copy_async(int * dst, const int * __restrict__ src) {
    const unsigned int dst_shared = ggml_cuda_cvta_generic_to_shared(dst);
    const int          thread     = threadIdx.y * ggml_cuda_get_physical_warp_size() + threadIdx.x;
#pragma unroll
    for (int l0 = 0; l0 < n16; l0 += nthreads) {
        const int l = l0 + thread;
        if (l0 + nthreads <= n16 || l < n16) {
            cp_async_cg_16<0>(dst_shared + 16 * l, src + 4 * l);
        }
    }
}

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
        // Lanes 2 and 3 begin with their second half: of eight threads that store 16 bytes each no two meet in a bank.
        const bool     second   = lane >= threads_per_row / 2;
        const uint32_t words[4] = { second ? codes.z : codes.x, second ? codes.w : codes.y, second ? codes.x : codes.z,
                                    second ? codes.y : codes.w };

#pragma unroll
        for (int w = 0; w < 4; ++w) {
            int v[4];
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                v[b] = ccq2_unpack(words[w], b, h.x, h.y);
            }
            const int k = 16 * lane + ((4 * w) ^ (second ? 8 : 0));
#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
            *(int4 *) &x_qs[i * sram_stride + k] = make_int4(v[0], v[1], v[2], v[3]);
#else
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                x_qs[i * (2 * MMQ_TILE_NE_K + 1) + k + b] = v[b];
            }
#endif  // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
        }
        // the layout has a scale per 32 weights; the second is read only where there are no tensor cores of NVIDIA's
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

// The dot product of q8_0 tiles with one scale per 64 values on both sides: two products share a sum of integers.
template <ggml_type type, int J, bool fallback>
static __device__ __forceinline__ void ggml_cuda_mmq_vec_dot_ccq2_q8_1_mma(const int * __restrict__ x,
                                                                           const int * __restrict__ y,
                                                                           float * __restrict__ sum,
                                                                           const int k00) {
#if defined(AMD_MFMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    ggml_cuda_mmq_vec_dot_q8_0_q8_1_mma<type, J, fallback, MMQ_Q8_1_DS_LAYOUT_D4>(x, y, sum, k00);
#else
    typedef tile<16, 8, int> tile_A;
    typedef tile<8, 8, int>  tile_B;
    typedef tile<16, 8, int> tile_C;

    constexpr int sram_stride   = ggml_cuda_mmq_get_sram_stride(type, J, fallback);
    constexpr int rows_per_warp = ggml_cuda_mmq_get_rows_per_warp(type, J, fallback);
    constexpr int ntx           = rows_per_warp / tile_C::I;  // number of x minitiles per warp
    constexpr int group         = CCQ_GROUP / sizeof(int);
    constexpr int ngroups       = MMQ_TILE_NE_K / group;
    static_assert(group == 2 * QI8_0, "two products per scale");

    y += (threadIdx.y % ntx) * (tile_C::J * MMQ_TILE_Y_K);

    const int *   x_qs = x;
    const float * x_df = (const float *) x_qs + 2 * MMQ_TILE_NE_K;
    const int *   y_qs = y + 4;
    const float * y_df = (const float *) y;

    tile_A A[ntx][ngroups][2];
    float  dA[ntx][ngroups][tile_C::ne / 2];

    const int i0 = (threadIdx.y / ntx) * rows_per_warp;

#pragma unroll
    for (int n = 0; n < ntx; ++n) {
#pragma unroll
        for (int g = 0; g < ngroups; ++g) {
            const int k0 = k00 + g * group;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                load_ldmatrix(A[n][g][h], x_qs + (i0 + n * tile_A::I) * sram_stride + k0 + h * QI8_0, sram_stride);
            }
#pragma unroll
            for (int l = 0; l < tile_C::ne / 2; ++l) {
                dA[n][g][l] = x_df[(i0 + n * tile_A::I + tile_C::get_i(2 * l)) * sram_stride + k0 / QI8_0];
            }
        }
    }

#pragma unroll
    for (int j0 = 0; j0 < J; j0 += ntx * tile_C::J) {
#pragma unroll
        for (int g = 0; g < ngroups; ++g) {
            tile_B B[2];
            float  dB[tile_C::ne / 2];

#pragma unroll
            for (int h = 0; h < 2; ++h) {
                load_generic(B[h], y_qs + j0 * MMQ_TILE_Y_K + g * group + h * QI8_0,
                             MMQ_TILE_Y_K);  // faster than load_ldmatrix
            }
#pragma unroll
            for (int l = 0; l < tile_C::ne / 2; ++l) {
                dB[l] = y_df[(j0 + tile_C::get_j(l)) * MMQ_TILE_Y_K + g * group / QI8_1];
            }

#pragma unroll
            for (int n = 0; n < ntx; ++n) {
                tile_C C;
                mma(C, A[n][g][0], B[0]);
                mma(C, A[n][g][1], B[1]);
#pragma unroll
                for (int l = 0; l < tile_C::ne; ++l) {
                    sum[(j0 / tile_C::J + n) * tile_C::ne + l] += C.x[l] * dA[n][g][l / 2] * dB[l % 2];
                }
            }
        }
    }
#endif  // defined(AMD_MFMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
}
