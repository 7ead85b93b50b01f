// ccq2 in the tiled matmul: the microtile with AMX.

#include "amx/amx.h"
#include "ggml-ccq.h"
#include "tiled-kernel.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__AVX512DQ__)

#include <immintrin.h>

// A group of 64 weights is as wide as an AMX tile, and the layout that VNNI wants of src1 is the one that AMX wants: one
// tile product per group. The tile of the results starts at -CCQ_OFFSET * sum(y), which takes the offset off. Of the tiles
// that amx/mmq.cpp configures, three are whole ones.
// clang-format off
bool tiled_run_microtile_amx(const tiled_tile_src0 & src0, const tiled_tile_src1 & src1,
                             int i0, int j0, int num_k, int slab, float * buf, int buf_stride) {
    // clang-format on
    if (!ggml_amx_init()) {
        return false;
    }
    ggml_amx_tile_config_init();

    constexpr int NB = TILED_TILE_K / CCQ_GROUP;
    constexpr int NS = CCQ_GROUP / 16;  // sums of src1 per group

    const int64_t   qk_stride = num_k * TILED_TILE_K;
    const int       bs_stride = num_k == 1 ? TILED_TILE_ROWS : TILED_MICRO;
    const uint8_t * q0        = &src0.q[i0 * qk_stride + slab * TILED_TILE_K];
    const int8_t *  q1        = &src1.q[j0 * qk_stride + slab * TILED_TILE_K];

    alignas(64) int32_t offsets[NB][TILED_MICRO];
    alignas(64) int32_t sums[NB][TILED_MICRO][TILED_MICRO];
    for (int s = 0; s < NB; s++) {
        __m512i sum = _mm512_setzero_si512();
        for (int u = 0; u < NS; u++) {
            sum = _mm512_add_epi32(sum, _mm512_load_si512(&src1.bsums[((slab * NB + s) * NS + u) * bs_stride + j0]));
        }
        _mm512_store_si512(offsets[s], _mm512_mullo_epi32(sum, _mm512_set1_epi32(-CCQ_OFFSET)));
    }
    // gcc 12 does not know that the loads of tiles read memory
    __asm__ __volatile__("" : : "r"(offsets), "r"(q0), "r"(q1) : "memory");
    for (int s = 0; s < NB; s++) {
        _tile_loadd(4, offsets[s], 0);  // all rows alike
        _tile_loadd(5, q0 + s * CCQ_GROUP, qk_stride);
        _tile_loadd(6, q1 + s * CCQ_GROUP, qk_stride);
        _tile_dpbusd(4, 5, 6);
        _tile_stored(4, sums[s], sizeof(sums[s][0]));
    }
    __asm__ __volatile__("" : : "r"(sums) : "memory");

    const __m512 d1 = _mm512_load_ps(&src1.d[slab * TILED_MICRO + j0]);
    for (int t = 0; t < TILED_MICRO; t++) {
        const int32_t * scales = &src0.scales[((i0 + t) * num_k + slab) * NB];
        __m512i         sum    = _mm512_setzero_si512();
        for (int s = 0; s < NB; s++) {
            sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(_mm512_load_si512(sums[s][t]), _mm512_set1_epi32(scales[s])));
        }
        const __m512 d0     = _mm512_set1_ps(src0.d[slab * TILED_MICRO + i0 + t]);
        const __m512 result = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, sum), d0);
        float *      p      = &buf[(i0 + t) * buf_stride + j0];
        _mm512_store_ps(p, _mm512_add_ps(_mm512_load_ps(p), _mm512_mul_ps(result, d1)));
    }
    return true;
}

#else

// clang-format off
bool tiled_run_microtile_amx(const tiled_tile_src0 & /* src0 */, const tiled_tile_src1 & /* src1 */,
                             int /* i0 */, int /* j0 */, int /* num_k */, int /* slab */, float * /* buf */, int /* buf_stride */) {
    return false;
}
// clang-format on

#endif
