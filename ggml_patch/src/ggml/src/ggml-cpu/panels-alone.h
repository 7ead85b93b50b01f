// One column alone, for panels-kernel.cpp: with AVX-512, generating tokens is faster so than with ggml's dot products.
#pragma once

// q8_0 row by row, with prefetching over the ends of pages, at which the hardware stops: 35 GB/s instead of 29 where pages
// are small.
static constexpr int Q8_0_AHEAD = 8192;  // bytes

// blocks of a step, or as many as `valid` has bits, with the activations
static inline __m512 q8_0_dot_step(const block_q8_0 * x, const panel_activations & y, __mmask8 valid, __m512 sum) {
    uint16_t h[PANEL_GROUPS] = {};
    for (int i = 0; i < PANEL_GROUPS; ++i) {
        if (valid >> i & 1) {
            memcpy(&h[i], &x[i].d, sizeof(h[i]));
        }
    }
    const __m256 d     = _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]));
    const __m512 scale = _mm512_castps256_ps512(_mm256_mul_ps(d, _mm256_maskz_loadu_ps(valid, y.d)));
    const __m512 start = to_float(_mm512_maskz_loadu_epi32(valid, y.offset));
    sum                = _mm512_mask3_fmadd_ps(scale, start, sum, 0xff);  // of the offsets
#pragma GCC unroll 4
    for (int i = 0; i < PANEL_GROUPS; i += 2) {
        if (!(valid >> i & 1)) {
            break;
        }
        const bool    both = valid >> (i + 1) & 1;
        const __m256i lo   = _mm256_loadu_si256((const __m256i *) x[i].qs);
        const __m256i hi   = both ? _mm256_loadu_si256((const __m256i *) x[i + 1].qs) : _mm256_setzero_si256();
        _mm_prefetch((const char *) x[i].qs + Q8_0_AHEAD, _MM_HINT_T0);
        const __m512i w    = q8_0_bytes(_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(lo), hi, 1));
        const __m512i q    = _mm512_loadu_si512(y.q + i * QK8_0);
        const __m512i pick = _mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(i), _mm512_set1_epi32(i + 1));
        sum                = _mm512_fmadd_ps(to_float(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w, q)),
                                             _mm512_maskz_permutexvar_ps(0xffff, pick, scale), sum);
    }
    return sum;
}

static float q8_0_dot(int64_t k, const uint8_t * row, const panel_activations * y, int64_t stride) {
    const block_q8_0 * x   = (const block_q8_0 *) row;
    __m512             sum = _mm512_setzero_ps();
    for (; k >= PANEL_STEP; k -= PANEL_STEP, x += PANEL_GROUPS, y += stride) {
        sum = q8_0_dot_step(x, *y, 0xff, sum);
    }
    if (k > 0) {
        sum = q8_0_dot_step(x, *y, (1u << (k / QK8_0)) - 1, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

static void multiply_alone_q8_0(int64_t                   k,
                                const uint8_t *           rows,
                                size_t                    row_size,
                                int64_t                   nrows,
                                const panel_activations * y,
                                int64_t                   stride,
                                float *                   dst) {
    for (int64_t r = 0; r < nrows; ++r) {
        dst[r] = q8_0_dot(k, rows + r * row_size, y, stride);
    }
}

// ccq2 by panels whose weights never leave the registers. The panel after next is fetched.
static void multiply_alone_ccq2(int64_t                   k,
                                const uint8_t *           rows,
                                size_t                    row_size,
                                int64_t                   nrows,
                                const panel_activations * y,
                                int64_t                   stride,
                                float *                   dst) {
    const size_t part = LANES * row_size / (k / CCQ_GROUP);
    for (int64_t r = 0; r < nrows; r += LANES) {
        const uint8_t * ahead = rows + (r + 2 * LANES) * row_size;
        panel_ccq2      panel(k, rows + r * row_size, row_size, nrows - r);
        __m512          sum = _mm512_setzero_ps();
        for (int64_t step = 0; step < k / PANEL_STEP; ++step) {
            panel.load_scales(step, 0);
            __m512 total = _mm512_setzero_ps();
            for (int g = 0; g < panel_ccq2::GROUPS; ++g) {
                ivec codes[4];
                load_transposed(panel.x.row, sizeof(ccq_row_header) + step * CCQ2_CODE_SIZE + g * panel_ccq2::QUADS, codes);
                // two sums: the latency of the product is four times what it occupies
                ivec two[2] = { iset(y[step * stride].offset[g]), iset(0) };
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    int32_t four;
                    memcpy(&four, y[step * stride].q + g * CCQ_GROUP + 4 * i, sizeof(four));
                    two[i % 2] =
                        _mm512_dpbusd_epi32(two[i % 2], ccq2_windows(codes[i / 4], i % 4, panel.M[0], panel.Z[0]), iset(four));
                }
                total = fmadd(to_float(_mm512_add_epi32(two[0], two[1])), panel.scale[g][0], total);
                fetch(ahead + (step * panel_ccq2::GROUPS + g) * part, part);
            }
            sum = fmadd(total, fset(y[step * stride].d[0]), sum);
        }
        _mm512_mask_storeu_ps(dst + r, (1u << std::min<int64_t>(LANES, nrows - r)) - 1, fmul(sum, panel.d[0]));
    }
}
