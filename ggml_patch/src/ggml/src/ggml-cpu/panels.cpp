// Matrix products by panels of rows.
//
// The product of a quantized matrix with a few columns is bound by the unpacking of the weights, and ggml's dot products
// unpack a row anew for each column. Here 16 or 32 rows are unpacked together, into the layout that byte dot products want
// (rows by 4 weights), and multiplied with all columns: MUL_MAT in blocks of rows and columns, MUL_MAT_ID
// expert by expert. The results are those of the dot products: exact integer sums per block, added up as floats.

#include "panels.h"

#include "ggml-impl.h"
#include "panels-kernel.h"

#include <algorithm>

// The activations in wdata: [step][column], so that the columns that meet an unpacked panel lie together.
struct panel_columns {
    panel_activations * y;
    int64_t             steps, n;

    panel_columns(void * wdata, int64_t k, int64_t n)
        : y((panel_activations *) GGML_PAD((uintptr_t) wdata, 64)), steps((k + PANEL_STEP - 1) / PANEL_STEP), n(n) {}

    const panel_activations * operator[](int64_t i) const { return y + i; }

    void * end() const { return y + steps * n; }
};

static int64_t n_columns(const ggml_tensor * src1) {
    return src1->ne[1] * src1->ne[2] * src1->ne[3];
}

bool ggml_panels_use(const ggml_tensor * dst) {
    const ggml_tensor * src0  = dst->src[0];
    const ggml_tensor * src1  = dst->src[1];
    const panel_type *  type  = panels_type(src0->type);
    const bool          alone = n_columns(src1) == 1 || (dst->op == GGML_OP_MUL_MAT_ID && src1->ne[2] == 1);
    return type && (type->few.multiply || !alone) && src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) &&
           src0->ne[0] % type->block == 0 && src0->nb[0] == ggml_type_size(src0->type) && !src0->extra;
}

// the rows of src1 that an expert multiplies: slot and token
struct panel_pair {
    int32_t slot;
    int32_t token;
};

// wdata of MUL_MAT_ID after the columns: the first pair of each expert (and the end), the first chunk, the pairs
struct panel_experts {
    int64_t *    first_pair;
    int64_t *    first_chunk;
    panel_pair * pairs;

    panel_experts(void * wdata, int64_t n_experts) {
        first_pair  = (int64_t *) GGML_PAD((uintptr_t) wdata, 64);
        first_chunk = first_pair + n_experts + 1;
        pairs       = (panel_pair *) (first_chunk + n_experts + 1);
    }
};

size_t ggml_panels_wdata_size(const ggml_tensor * dst) {
    size_t size = (size_t) panel_columns(nullptr, dst->src[0]->ne[0], n_columns(dst->src[1])).end() + 64;
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        const int64_t n_experts = dst->src[0]->ne[2];
        size += (size_t) (panel_experts(nullptr, n_experts).pairs + ggml_nelements(dst->src[2])) + 64;
    }
    return size;
}

// every thread quantizes its part of the steps of all columns
static void quantize_columns(const ggml_compute_params * params,
                             const ggml_tensor *         src1,
                             const panel_type &          type,
                             const panel_columns &       columns) {
    const int64_t total = columns.n * columns.steps;
    const int64_t last  = total * (params->ith + 1) / params->nth;
    for (int64_t part = total * params->ith / params->nth; part < last; ++part) {
        const int64_t column = part / columns.steps;
        const int64_t step   = part % columns.steps;
        const int64_t i1     = column % src1->ne[1];
        const int64_t i2     = column / src1->ne[1] % src1->ne[2];
        const int64_t i3     = column / src1->ne[1] / src1->ne[2];
        const float * row =
            (const float *) ((const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3]);
        const int64_t k0 = step * PANEL_STEP;
        type.quantize(row + k0, columns.y + step * columns.n + column, std::min<int64_t>(PANEL_STEP, src1->ne[0] - k0));
    }
}

// whole tiles of rows by the kernel for few columns where there is one, the rest by panels
static void multiply(const panel_type & type, panel_product p) {
    const panel_few & few   = type.few;
    const int64_t     tiles = few.multiply && p.ncols <= few.columns && p.k <= few.k ? p.nrows / few.rows * few.rows : 0;
    if (tiles > 0) {
        panel_product whole = p;
        whole.nrows         = tiles;
        few.multiply(whole);
    }
    if (tiles < p.nrows) {
        float * rest[PANEL_COLUMNS];
        std::transform(p.dst, p.dst + p.ncols, rest, [tiles](float * column) { return column + tiles; });
        p.rows += tiles * p.row_size;
        p.nrows -= tiles;
        p.dst = rest;
        type.multiply(p);
    }
}

static int64_t chunks_of(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

// Rows in a chunk of work: eight chunks for every thread, as threads are not equally fast, but long ones, as each begins
// with rows that nobody fetched (two threads generate 119 tokens a second with up to 256 rows, 108 with 64).
static int64_t chunk_rows(const panel_type & type, int64_t rows, int nth) {
    return std::clamp<int64_t>(rows / (8 * nth) / type.rows * type.rows, type.rows, 256);
}

void ggml_compute_forward_mul_mat_panels(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    GGML_TENSOR_BINARY_OP_LOCALS

    GGML_ASSERT(ne0 == ne01 && ne1 == ne11 && ne2 == ne12 && ne3 == ne13);
    GGML_ASSERT(nb0 == sizeof(float));

    const panel_type &  type = *panels_type(src0->type);
    const panel_columns columns(params->wdata, ne00, n_columns(src1));
    quantize_columns(params, src1, type, columns);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t rows_at_once  = chunk_rows(type, ne01, params->nth);
    const int64_t row_chunks    = chunks_of(ne01, rows_at_once);
    const int64_t column_chunks = chunks_of(ne11, PANEL_COLUMNS);
    const int64_t chunks        = row_chunks * column_chunks * ne12 * ne13;
    for (int64_t chunk = params->ith; chunk < chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t row = chunk % row_chunks * rows_at_once;
        const int64_t i1  = chunk / row_chunks % column_chunks * PANEL_COLUMNS;
        const int64_t i2  = chunk / row_chunks / column_chunks % ne12;
        const int64_t i3  = chunk / row_chunks / column_chunks / ne12;
        const int64_t n   = std::min<int64_t>(PANEL_COLUMNS, ne11 - i1);

        const panel_activations * column[PANEL_COLUMNS];
        float *                   out[PANEL_COLUMNS];
        for (int64_t c = 0; c < n; ++c) {
            column[c] = columns[(i3 * ne12 + i2) * ne11 + i1 + c];
            out[c]    = (float *) ((char *) dst->data + (i1 + c) * nb1 + i2 * nb2 + i3 * nb3) + row;
        }
        const uint8_t * rows =
            (const uint8_t *) src0->data + row * nb01 + i2 / (ne12 / ne02) * nb02 + i3 / (ne13 / ne03) * nb03;
        multiply(type, { ne00, rows, nb01, std::min(rows_at_once, ne01 - row), column, columns.n, out, n });
    }
}

// sort the (slot, token) pairs by expert, and count the chunks that each expert's rows make
static void group_by_expert(const ggml_tensor *   ids,
                            int64_t               n_experts,
                            int64_t               chunks_per_expert,
                            const panel_experts & experts) {
    const auto expert_of = [ids](int64_t slot, int64_t token) {
        return *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + slot * ids->nb[0]);
    };
    int64_t * first = experts.first_pair;
    std::fill(first, first + n_experts + 1, 0);
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            GGML_ASSERT(expert_of(slot, token) >= 0 && expert_of(slot, token) < n_experts);
            first[expert_of(slot, token) + 1] += 1;
        }
    }
    experts.first_chunk[0] = 0;
    for (int64_t e = 0; e < n_experts; ++e) {
        experts.first_chunk[e + 1] = experts.first_chunk[e] + (first[e + 1] > 0 ? chunks_per_expert : 0);
        first[e + 1] += first[e];
    }
    // `first` of an expert runs to its end while its pairs are entered, and is moved back
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            experts.pairs[first[expert_of(slot, token)]++] = { (int32_t) slot, (int32_t) token };
        }
    }
    for (int64_t e = n_experts; e > 0; --e) {
        first[e] = first[e - 1];
    }
    first[0] = 0;
}

void ggml_compute_forward_mul_mat_id_panels(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];
    GGML_TENSOR_BINARY_OP_LOCALS

    GGML_ASSERT(ne13 == 1 && ne03 == 1);
    GGML_ASSERT(nb0 == sizeof(float));

    const panel_type &  type = *panels_type(src0->type);
    const panel_columns columns(params->wdata, ne00, n_columns(src1));
    const panel_experts experts(columns.end(), ne02);
    const int64_t       rows_at_once      = chunk_rows(type, ne01 * std::min(ne02, ggml_nelements(ids)), params->nth);
    const int64_t       chunks_per_expert = chunks_of(ne01, rows_at_once);
    quantize_columns(params, src1, type, columns);
    if (params->ith == 0) {
        group_by_expert(ids, ne02, chunks_per_expert, experts);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    int64_t expert = 0;
    for (int64_t chunk = params->ith; chunk < experts.first_chunk[ne02];
         chunk         = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        while (chunk >= experts.first_chunk[expert + 1]) {
            ++expert;
        }
        const int64_t   row  = (chunk - experts.first_chunk[expert]) * rows_at_once;
        const uint8_t * rows = (const uint8_t *) src0->data + expert * nb02 + row * nb01;
        for (int64_t first = experts.first_pair[expert]; first < experts.first_pair[expert + 1]; first += PANEL_COLUMNS) {
            const int64_t             n = std::min<int64_t>(PANEL_COLUMNS, experts.first_pair[expert + 1] - first);
            const panel_activations * column[PANEL_COLUMNS];
            float *                   out[PANEL_COLUMNS];
            for (int64_t c = 0; c < n; ++c) {
                const panel_pair pair = experts.pairs[first + c];
                column[c]             = columns[pair.token * ne11 + pair.slot % ne11];
                out[c]                = (float *) ((char *) dst->data + pair.slot * nb1 + pair.token * nb2) + row;
            }
            multiply(type, { ne00, rows, nb01, std::min(rows_at_once, ne01 - row), column, columns.n, out, n });
        }
    }
}
