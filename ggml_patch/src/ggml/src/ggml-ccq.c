#include "ggml-ccq.h"

#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

// The map of every row that quantize_row_ccq2_ref writes. Among affine maps this one has the codebook that fits normally
// distributed weights best (mean squared error 0.1087 at unit variance; the best of any kind found: 0.1083).
#define CCQ2_REF_M 15853988u
#define CCQ2_REF_Z 162772864u

// Weights of standard deviation sigma are fitted best by scale*d = sigma/CCQ2_BOOK_RMS.
#define CCQ2_BOOK_RMS 16.5f

// d is chosen so that the largest group scale starts here: high enough for precise small scales, with room above.
#define CCQ2_TOP_SCALE 13.5f

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

// the 256 groups of four weights that a byte can stand for; transposed, so that a search runs over contiguous floats
typedef struct {
    float v[4][256];
} ccq2_book;

static void ccq2_make_book(ccq2_book * book) {
    for (int b = 0; b < 256; ++b) {
        const uint32_t c = ccq2_code((uint8_t) b, CCQ2_REF_M, CCQ2_REF_Z);
        for (int j = 0; j < 4; ++j) {
            book->v[j][b] = (float) ccq2_value(c, j);
        }
    }
}

// the byte whose four values, times scale, are nearest to x; returns the weighted squared distance
static float ccq2_nearest(const ccq2_book * book, const float * x, const float * weight, float scale, uint8_t * byte) {
    float dist[256];
    for (int b = 0; b < 256; ++b) {
        const float e0 = x[0] - scale * book->v[0][b];
        const float e1 = x[1] - scale * book->v[1][b];
        const float e2 = x[2] - scale * book->v[2][b];
        const float e3 = x[3] - scale * book->v[3][b];
        dist[b]        = weight[0] * e0 * e0 + weight[1] * e1 * e1 + weight[2] * e2 * e2 + weight[3] * e3 * e3;
    }
    int best = 0;
    for (int b = 1; b < 256; ++b) {
        best = dist[b] < dist[best] ? b : best;
    }
    *byte = (uint8_t) best;
    return dist[best];
}

static float ccq2_encode_group(const ccq2_book * book, const float * x, const float * weight, float scale, uint8_t * codes) {
    float error = 0.0f;
    for (int i = 0; i < CCQ_GROUP / 4; ++i) {
        error += ccq2_nearest(book, x + 4 * i, weight + 4 * i, scale, codes + i);
    }
    return error;
}

static float ccq2_rms(const float * x, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) {
        sum += x[i] * x[i];
    }
    return sqrtf(sum / n);
}

// the best scale of the five around the expected one, with its codes
static int ccq2_search_scale(const ccq2_book * book, const float * x, const float * weight, float d, uint8_t * codes) {
    const int expected = (int) roundf(ccq2_rms(x, CCQ_GROUP) / (CCQ2_BOOK_RMS * d));

    int     best       = 0;
    float   best_error = INFINITY;
    uint8_t trial[CCQ_GROUP / 4];
    for (int s = MAX(0, expected - 2); s <= MIN(15, expected + 2); ++s) {
        const float error = ccq2_encode_group(book, x, weight, s * d, trial);
        if (error < best_error) {
            best       = s;
            best_error = error;
            memcpy(codes, trial, sizeof(trial));
        }
    }
    return best;
}

// adds x.y and x.x of a group to the sums, where y is its decoded form
static void ccq2_add_products(const ccq2_book * book,
                              const float *     x,
                              float             scale,
                              const uint8_t *   codes,
                              double *          xy,
                              double *          xx) {
    for (int i = 0; i < CCQ_GROUP; ++i) {
        *xy += (double) (x[i] * scale * book->v[i % 4][codes[i / 4]]);
        *xx += (double) (x[i] * x[i]);
    }
}

static void ccq2_encode_row(const ccq2_book * book, const float * x, const float * imatrix, void * row, int64_t k) {
    memset(row, 0, ggml_row_size(GGML_TYPE_CCQ2, k));

    float top = 0.0f;
    for (int64_t g = 0; g < k / CCQ_GROUP && isfinite(top); ++g) {
        const float rms = ccq2_rms(x + g * CCQ_GROUP, CCQ_GROUP);
        top             = rms <= top ? top : rms;
    }
    ccq_row_header h = { CCQ2_REF_M, CCQ2_REF_Z, top / (CCQ2_BOOK_RMS * CCQ2_TOP_SCALE), 0 };
    memcpy(row, &h, sizeof(h));
    if (!(h.d > 0.0f) || !isfinite(h.d)) {
        return;  // a row of zeros decodes to zeros; one that is not finite has a d that is not, which validation refuses
    }

    uint8_t * codes  = (uint8_t *) row + sizeof(h);
    uint8_t * scales = codes + k / 4;
    float     weight[CCQ_GROUP];
    double    xy = 0.0;
    double    xx = 0.0;
    for (int64_t g = 0; g < k / CCQ_GROUP; ++g) {
        for (int i = 0; i < CCQ_GROUP; ++i) {
            weight[i] = imatrix ? imatrix[g * CCQ_GROUP + i] : 1.0f;
        }
        const int s = ccq2_search_scale(book, x + g * CCQ_GROUP, weight, h.d, codes + g * CCQ_GROUP / 4);
        scales[g / 2] |= (uint8_t) (g % 2 == 0 ? s << 4 : s);
        ccq2_add_products(book, x + g * CCQ_GROUP, s * h.d, codes + g * CCQ_GROUP / 4, &xy, &xx);
    }

    // The nearest codes shrink the row, to a slope xy/xx of about 0.95. Taking half of it back makes better models than
    // taking back none or all (KL divergence of a small ERNIE 0.203 instead of 0.237).
    if (xy > 0.0) {
        h.d /= (float) sqrt(xy / xx);
        memcpy(row, &h, sizeof(h));
    }
}

// clang-format off
size_t quantize_ccq2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst,
    int64_t nrows, int64_t n_per_row, const float * imatrix) {
    // clang-format on
    const size_t row_size = ggml_row_size(GGML_TYPE_CCQ2, n_per_row);

    ccq2_book book;
    ccq2_make_book(&book);
    for (int64_t row = 0; row < nrows; ++row) {
        ccq2_encode_row(&book, src + row * n_per_row, imatrix, (char *) dst + row * row_size, n_per_row);
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
