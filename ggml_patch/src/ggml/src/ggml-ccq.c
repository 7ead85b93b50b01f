#include "ggml-ccq.h"

#include "ggml-ccq-encode.h"
#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

void dequantize_row_ccq2(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_CCQ == 0);

    ccq_row_header h;
    memcpy(&h, x, sizeof(h));
    const uint8_t * codes  = ccq2_codes(x);
    const uint8_t * scales = ccq2_scales(x, k);

    for (int64_t g = 0; g < k / CCQ_GROUP; ++g) {
        const float scale = (float) ccq2_scale(scales, g) * h.d;
        for (int64_t i = g * CCQ_GROUP / 4; i < (g + 1) * CCQ_GROUP / 4; ++i) {
            const uint32_t c = ccq2_code(codes[i], h.M, h.Z);
            for (int j = 0; j < 4; ++j) {
                y[4 * i + j] = scale * (float) ccq2_value(c, j);
            }
        }
    }
}

// ignore an imatrix with negative or non-finite entries
static bool ccq2_usable(const float * imatrix, int64_t n) {
    for (int64_t i = 0; imatrix && i < n; ++i) {
        if (!isfinite(imatrix[i]) || imatrix[i] < 0.0f) {
            return false;
        }
    }
    return imatrix != NULL;
}

static bool ccq2_finite(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

size_t quantize_ccq2(const float * GGML_RESTRICT src,
                     void * GGML_RESTRICT        dst,
                     int64_t                     nrows,
                     int64_t                     n_per_row,
                     const float *               imatrix) {
    const size_t row_size = ggml_row_size(GGML_TYPE_CCQ2, n_per_row);
    if (ccq2_finite(src, nrows * n_per_row)) {
        const float * importance = ccq2_usable(imatrix, n_per_row) ? imatrix : NULL;
        ccq2_encode_rows(ccq2_vector_width(), nrows, n_per_row, src, importance, (uint8_t *) dst);
    } else {
        memset(dst, 0xff, nrows * row_size);  // validation refuses these rows: their super scales are NaN
    }
    return nrows * row_size;
}

void quantize_row_ccq2_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_ccq2(x, y, 1, k, NULL);
}

bool validate_row_ccq2(const void * data, size_t nbytes) {
    // the padding is smaller than a block, so the size of a row gives its length
    const size_t block = CCQ2_CODE_SIZE + CCQ2_SCALE_SIZE;
    const size_t nb    = nbytes < sizeof(ccq_row_header) ? 0 : (nbytes - sizeof(ccq_row_header)) / block;
    if (nb == 0 || ggml_row_size(GGML_TYPE_CCQ2, nb * QK_CCQ) != nbytes) {
        fprintf(stderr, "%s: no ccq2 row has %zu bytes\n", __func__, nbytes);
        return false;
    }

    ccq_row_header h;
    memcpy(&h, data, sizeof(h));
    if (!isfinite(h.d)) {
        fprintf(stderr, "%s: super scale %f is not finite\n", __func__, (double) h.d);
        return false;
    }
    if (h.zero != 0) {
        fprintf(stderr, "%s: reserved word of the row header is %u, not 0\n", __func__, h.zero);
        return false;
    }
    for (size_t i = sizeof(h) + nb * block; i < nbytes; ++i) {
        if (((const uint8_t *) data)[i] != 0) {
            fprintf(stderr, "%s: padding byte %zu of the row is %u, not 0\n", __func__, i, ((const uint8_t *) data)[i]);
            return false;
        }
    }
    return true;
}
