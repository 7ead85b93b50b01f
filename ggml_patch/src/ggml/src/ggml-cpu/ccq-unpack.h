// ccq2: code bytes -> windows as unsigned bytes (the weights plus CCQ_OFFSET), in order
#pragma once

#include "ggml-ccq.h"

#if defined(__ARM_NEON)

#include <arm_neon.h>

// 16 code bytes -> 64 windows in four planes: plane j holds window j of each code, as vld4q_s8 loads activations
static inline uint8x16x4_t ccq2_unpack_neon(const uint8_t * codes, uint32x4_t M, uint32x4_t Z) {
    const uint8x16_t window = vdupq_n_u8(63);
    const uint8x16_t b      = vld1q_u8(codes);
    const uint16x8_t b0     = vmovl_u8(vget_low_u8(b));
    const uint16x8_t b1     = vmovl_u8(vget_high_u8(b));
    const uint32x4_t u0     = vmlaq_u32(Z, vmovl_u16(vget_low_u16(b0)), M);
    const uint32x4_t u1     = vmlaq_u32(Z, vmovl_u16(vget_high_u16(b0)), M);
    const uint32x4_t u2     = vmlaq_u32(Z, vmovl_u16(vget_low_u16(b1)), M);
    const uint32x4_t u3     = vmlaq_u32(Z, vmovl_u16(vget_high_u16(b1)), M);
    // the high half of u has the windows at bits 10, 7, 4 and 1
    const uint16x8_t h0     = vcombine_u16(vshrn_n_u32(u0, 16), vshrn_n_u32(u1, 16));
    const uint16x8_t h1     = vcombine_u16(vshrn_n_u32(u2, 16), vshrn_n_u32(u3, 16));

    uint8x16x4_t out;
    out.val[0] = vshrq_n_u8(vcombine_u8(vshrn_n_u16(h0, 8), vshrn_n_u16(h1, 8)), 2);
    out.val[1] = vandq_u8(vcombine_u8(vshrn_n_u16(h0, 7), vshrn_n_u16(h1, 7)), window);
    out.val[2] = vandq_u8(vcombine_u8(vshrn_n_u16(h0, 4), vshrn_n_u16(h1, 4)), window);
    out.val[3] = vandq_u8(vcombine_u8(vshrn_n_u16(h0, 1), vshrn_n_u16(h1, 1)), window);
    return out;
}

#endif  // __ARM_NEON

#if defined(__AVX2__)

#include <immintrin.h>

// 8 codes, one a lane -> their windows
static inline __m256i ccq2_windows_avx2(__m256i codes, __m256i M, __m256i Z) {
    // the high half of u, doubled into both halves of its lane, has the windows at bits 10, 7, 4 and 1
    const __m256i high_half_twice =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));
    const __m256i shift_even = _mm256_set1_epi32((1 << 6) | (1 << (16 + 12)));  // >> 10 and >> 4, as the high half of a product
    const __m256i shift_odd  = _mm256_set1_epi32((1 << 1) | (1 << (16 + 7)));   // << 1 and << 7
    const __m256i even       = _mm256_set1_epi16(0x003f);
    const __m256i odd        = _mm256_set1_epi16(0x3f00);

    const __m256i u = _mm256_add_epi32(_mm256_mullo_epi32(codes, M), Z);
    const __m256i h = _mm256_shuffle_epi8(u, high_half_twice);
    return _mm256_or_si256(_mm256_and_si256(_mm256_mulhi_epu16(h, shift_even), even),
                           _mm256_and_si256(_mm256_mullo_epi16(h, shift_odd), odd));
}

// 8 code bytes -> 32 windows
static inline __m256i ccq2_unpack_avx2(const uint8_t * codes, __m256i M, __m256i Z) {
    return ccq2_windows_avx2(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) codes)), M, Z);
}

#endif  // __AVX2__

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)

// 16 code bytes -> 64 windows
static inline __m512i ccq2_unpack_avx512(const uint8_t * codes, __m512i M, __m512i Z) {
    // (maskz with all lanes: gcc 12 warns of the plain intrinsics)
    // the windows of u lie at bits 26, 23, 20 and 17, and those of the odd u of a pair 32 higher
    const __m512i window_bits = _mm512_set1_epi64(0x3134373a1114171a);

    const __m512i b       = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i *) codes));
    const __m512i u       = _mm512_add_epi32(_mm512_mullo_epi32(b, M), Z);
    const __m512i windows = _mm512_maskz_multishift_epi64_epi8(UINT64_MAX, window_bits, u);
    return _mm512_and_si512(windows, _mm512_set1_epi8(63));
}

#endif  // __AVX512VBMI__ && __AVX512BW__
