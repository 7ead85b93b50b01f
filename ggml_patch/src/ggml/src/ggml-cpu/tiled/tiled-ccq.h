// ccq2 in the tiled matmul: the unpacking of src0. Included by tiled.cpp.
#pragma once

#include "ccq-unpack.h"
#include "ggml-ccq.h"
#include "tiled-kernel.h"

#include <cstring>

static_assert(QK_CCQ == TILED_TILE_K, "a ccq2 block is one slab");

// Names the type in the templates. A row has no structs of blocks: its codes and its scales are apart.
struct ccq2_row {};

// With AVX-512 a subblock is a whole group and the kernel takes the offset off (BIAS). The AVX2 kernel knows no subblocks
// of 64, and takes the offset off as the minimum of a subblock of 32.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
static constexpr int  CCQ2_SUBBLK  = CCQ_GROUP;
static constexpr bool CCQ2_HAS_MIN = false;
static constexpr int  CCQ2_BIAS    = CCQ_OFFSET;
#else
static constexpr int  CCQ2_SUBBLK  = 32;
static constexpr bool CCQ2_HAS_MIN = true;
static constexpr int  CCQ2_BIAS    = 0;
#endif

// the windows of one block
static void ccq2_unpack_block(const uint8_t * codes, const ccq_row_header & h, uint8_t * q) {
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
    const __m512i M = _mm512_set1_epi32((int) h.M);
    const __m512i Z = _mm512_set1_epi32((int) h.Z);
    for (int i = 0; i < CCQ2_CODE_SIZE; i += 16) {
        _mm512_storeu_si512(q + 4 * i, ccq2_unpack_avx512(codes + i, M, Z));
    }
#elif defined(__AVX2__)
    const __m256i M = _mm256_set1_epi32((int) h.M);
    const __m256i Z = _mm256_set1_epi32((int) h.Z);
    for (int i = 0; i < CCQ2_CODE_SIZE; i += 8) {
        _mm256_storeu_si256((__m256i *) (q + 4 * i), ccq2_unpack_avx2(codes + i, M, Z));
    }
#else
    for (int i = 0; i < CCQ2_CODE_SIZE; i++) {
        const uint32_t c = ccq2_code(codes[i], h.M, h.Z);
        for (int j = 0; j < 4; j++) {
            q[4 * i + j] = (uint8_t) (ccq2_value(c, j) + CCQ_OFFSET);
        }
    }
#endif
}

// blocks [kblk, kblk + num_k) of rows that are row_size bytes apart and hold k weights each
static void
tiled_unpack_src0_ccq2(const char * rows, size_t row_size, int64_t k, int kblk, int n_rows, tiled_tile_src0 * tile, int num_k) {
    GGML_ASSERT(n_rows <= TILED_TILE_ROWS);
    constexpr int NB = TILED_TILE_K / CCQ2_SUBBLK;

    for (int r = 0; r < n_rows; r++) {
        const char *   row = rows + r * row_size;
        ccq_row_header h;
        memcpy(&h, row, sizeof(h));
        const uint8_t * codes  = ccq2_codes(row);
        const uint8_t * scales = ccq2_scales(row, k);

        for (int slab = 0; slab < num_k; slab++) {
            const int block   = kblk + slab;
            const int d_off   = slab * TILED_MICRO + r;
            const int s_off   = (r * num_k + slab) * NB;
            tile->d[d_off]    = h.d;
            tile->dmin[d_off] = h.d;
            for (int s = 0; s < NB; s++) {
                const int scale         = ccq2_scale(scales + block * CCQ2_SCALE_SIZE, s * CCQ2_SUBBLK / CCQ_GROUP);
                tile->scales[s_off + s] = scale;
                tile->mins[s_off + s]   = CCQ_OFFSET * scale;
            }
            ccq2_unpack_block(codes + block * CCQ2_CODE_SIZE, h, &tile->q[(r * num_k + slab) * TILED_TILE_K]);
        }
    }
}
