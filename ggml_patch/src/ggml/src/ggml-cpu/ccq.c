#include "ccq.h"

#include "ccq-unpack.h"
#include "ggml-cpu-impl.h"
#include "ggml-ccq.h"
#include "ggml-impl.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <assert.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

_Static_assert(QK_CCQ == QK_K, "a ccq2 block meets one q8_K block");

// Both kernels sum scale * (window . y - 32 * sum(y)) over the groups of a block: the windows are unsigned bytes, and the
// sums of the activations come with q8_K (bsums, one per 16 elements).

// clang-format off
void ggml_vec_dot_ccq2_q8_K_generic(
    int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    // clang-format on
    assert(n % QK_CCQ == 0);
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);

    ccq_row_header h;
    memcpy(&h, vx, sizeof(h));
    const uint8_t *    codes  = ccq2_codes(vx);
    const uint8_t *    scales = ccq2_scales(vx, n);
    const block_q8_K * y      = vy;

    float sum = 0.0f;
    for (int ib = 0; ib < n / QK_CCQ; ++ib) {
        int32_t block_sum = 0;
        for (int g = 0; g < QK_CCQ / CCQ_GROUP; ++g) {
            int32_t group_sum = 0;
            for (int i = g * CCQ_GROUP / 4; i < (g + 1) * CCQ_GROUP / 4; ++i) {
                const uint32_t c = ccq2_code(codes[ib * CCQ2_CODE_SIZE + i], h.M, h.Z);
                for (int j = 0; j < 4; ++j) {
                    group_sum += ccq2_value(c, j) * y[ib].qs[4 * i + j];
                }
            }
            block_sum += ccq2_scale(scales + ib * CCQ2_SCALE_SIZE, g) * group_sum;
        }
        sum += y[ib].d * (float) block_sum;
    }
    *s = h.d * sum;
}

#if defined(__AVX2__)

// the four group scales of a block as int16: lanes 4g ... 4g+3 hold the scale of group g
static inline __m256i ccq2_scales_avx2(const uint8_t * scales) {
    uint16_t nibbles;
    memcpy(&nibbles, scales, sizeof(nibbles));
    // shift each group's nibble to the top of its lanes, then down
    const __m256i up = _mm256_setr_epi16(1 << 8, 1 << 8, 1 << 8, 1 << 8, 1 << 12, 1 << 12, 1 << 12, 1 << 12, 1 << 0, 1 << 0,
                                         1 << 0, 1 << 0, 1 << 4, 1 << 4, 1 << 4, 1 << 4);
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_set1_epi16((short) nibbles), up), 12);
}

// sum over the 64 weights of group g of scale * window * y, in 8 lanes
static inline __m256i ccq2_group_avx2(const uint8_t * codes, const int8_t * y, __m256i M, __m256i Z, __m256i scale) {
    const __m256i p0 = _mm256_maddubs_epi16(ccq2_unpack_avx2(codes + 0, M, Z), _mm256_loadu_si256((const __m256i *) (y + 0)));
    const __m256i p1 = _mm256_maddubs_epi16(ccq2_unpack_avx2(codes + 8, M, Z), _mm256_loadu_si256((const __m256i *) (y + 32)));
    // four products per int16: at most 4*63*127 = 32004
    return _mm256_madd_epi16(_mm256_add_epi16(p0, p1), scale);
}

// the same for a block of four groups
static inline __m256i ccq2_block_avx2(const uint8_t * codes, const int8_t * y, __m256i M, __m256i Z, __m256i scale) {
    const __m256i s0 = ccq2_group_avx2(codes + 0, y + 0, M, Z, _mm256_permute4x64_epi64(scale, 0x00));
    const __m256i s1 = ccq2_group_avx2(codes + 16, y + 64, M, Z, _mm256_permute4x64_epi64(scale, 0x55));
    const __m256i s2 = ccq2_group_avx2(codes + 32, y + 128, M, Z, _mm256_permute4x64_epi64(scale, 0xaa));
    const __m256i s3 = ccq2_group_avx2(codes + 48, y + 192, M, Z, _mm256_permute4x64_epi64(scale, 0xff));
    return _mm256_add_epi32(_mm256_add_epi32(s0, s1), _mm256_add_epi32(s2, s3));
}

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)

// the same with 16 code bytes, a whole group, at once
static inline __m256i ccq2_block_avx512(const uint8_t * codes, const int8_t * y, __m256i M, __m256i Z, __m256i scale) {
    const __m512i M2 = _mm512_broadcastd_epi32(_mm256_castsi256_si128(M));
    const __m512i Z2 = _mm512_broadcastd_epi32(_mm256_castsi256_si128(Z));

    __m512i sum = _mm512_setzero_si512();
    for (int g = 0; g < QK_CCQ / CCQ_GROUP; ++g) {
        const __m512i windows     = ccq2_unpack_avx512(codes + g * CCQ_GROUP / 4, M2, Z2);
        const __m512i p           = _mm512_maddubs_epi16(windows, _mm512_loadu_si512(y + g * CCQ_GROUP));
        const __m512i group_scale = _mm512_permutexvar_epi64(_mm512_set1_epi64(g), _mm512_castsi256_si512(scale));
        sum                       = _mm512_add_epi32(sum, _mm512_madd_epi16(p, group_scale));
    }
    return _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
}

#endif  // __AVX512VBMI__ && __AVX512BW__

static inline float ccq2_hsum_avx2(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum        = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    sum        = _mm_add_ss(sum, _mm_movehdup_ps(sum));
    return _mm_cvtss_f32(sum);
}

static void ccq2_vec_dot_x86(int n, float * s, const void * vx, const block_q8_K * y) {
    ccq_row_header h;
    memcpy(&h, vx, sizeof(h));
    const uint8_t * codes  = ccq2_codes(vx);
    const uint8_t * scales = ccq2_scales(vx, n);
    const __m256i   M      = _mm256_set1_epi32((int) h.M);
    const __m256i   Z      = _mm256_set1_epi32((int) h.Z);

    __m256 sum = _mm256_setzero_ps();
    for (int ib = 0; ib < n / QK_CCQ; ++ib) {
        const __m256i scale = ccq2_scales_avx2(scales + ib * CCQ2_SCALE_SIZE);
        const __m256i bsums = _mm256_loadu_si256((const __m256i *) y[ib].bsums);

        const uint8_t * c = codes + ib * CCQ2_CODE_SIZE;
        const int8_t *  q = y[ib].qs;
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
        const __m256i windows = ccq2_block_avx512(c, q, M, Z, scale);
#else
        const __m256i windows = ccq2_block_avx2(c, q, M, Z, scale);
#endif
        const __m256i offsets = _mm256_slli_epi32(_mm256_madd_epi16(bsums, scale), 5);  // 32 * scale * sum(y)
        const __m256i block   = _mm256_sub_epi32(windows, offsets);
        sum                   = _mm256_fmadd_ps(_mm256_set1_ps(y[ib].d), _mm256_cvtepi32_ps(block), sum);
    }
    *s = h.d * ccq2_hsum_avx2(sum);
}

#endif  // __AVX2__

#if defined(__ARM_NEON)

static void ccq2_vec_dot_neon(int n, float * s, const void * vx, const block_q8_K * y) {
    ccq_row_header h;
    memcpy(&h, vx, sizeof(h));
    const uint8_t *  codes  = ccq2_codes(vx);
    const uint8_t *  scales = ccq2_scales(vx, n);
    const uint32x4_t M      = vdupq_n_u32(h.M);
    const uint32x4_t Z      = vdupq_n_u32(h.Z);

    float sum = 0.0f;
    for (int ib = 0; ib < n / QK_CCQ; ++ib) {
        int32x4_t block = vdupq_n_s32(0);
        for (int g = 0; g < QK_CCQ / CCQ_GROUP; ++g) {
            const uint8x16x4_t w     = ccq2_unpack_neon(codes + ib * CCQ2_CODE_SIZE + g * CCQ_GROUP / 4, M, Z);
            const int8x16x4_t  q     = vld4q_s8(y[ib].qs + g * CCQ_GROUP);
            const int32_t      scale = ccq2_scale(scales + ib * CCQ2_SCALE_SIZE, g);
            int32x4_t          group = vdupq_n_s32(0);
            for (int j = 0; j < 4; ++j) {
                group = ggml_vdotq_s32(group, vreinterpretq_s8_u8(w.val[j]), q.val[j]);
            }
            const int32x4_t sums = vpaddlq_s16(vcombine_s16(vld1_s16(y[ib].bsums + 4 * g), vdup_n_s16(0)));
            group                = vmlsq_n_s32(group, sums, CCQ_OFFSET);
            block                = vmlaq_n_s32(block, group, scale);
        }
        sum += y[ib].d * (float) vaddvq_s32(block);
    }
    *s = h.d * sum;
}

#endif  // __ARM_NEON

void ggml_vec_dot_ccq2_q8_K(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
#if defined(__AVX2__) || defined(__ARM_NEON)
    assert(n % QK_CCQ == 0);
    assert(nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
#if defined(__AVX2__)
    ccq2_vec_dot_x86(n, s, vx, vy);
#else
    ccq2_vec_dot_neon(n, s, vx, vy);
#endif
#else
    ggml_vec_dot_ccq2_q8_K_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
