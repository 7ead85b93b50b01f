#include "ccq.cuh"

#include "convert.cuh"
#include "unary.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Whole rows to floats: the plain path, used by GET_ROWS.

// clang-format off
template <typename dst_t>
static __global__ void ccq2_get_rows(
        const char * __restrict__ x, const int32_t * __restrict__ ids, char * __restrict__ dst,
        const int64_t ne00, const size_t nb01, const size_t nb02, const size_t nb03,
        const int64_t ne11, const size_t nb10, const size_t nb11, const size_t nb12,
        const size_t nb1, const size_t nb2, const size_t nb3) {
    // clang-format on
    const int64_t i10 = blockIdx.x;
    const int64_t i11 = blockIdx.z % ne11;
    const int64_t i12 = blockIdx.z / ne11;
    const int64_t i01 = *(const int32_t *) ((const char *) ids + i10 * nb10 + i11 * nb11 + i12 * nb12);

    const char * row = x + i01 * nb01 + i11 * nb02 + i12 * nb03;
    dst_t *      y   = (dst_t *) (dst + i10 * nb1 + i11 * nb2 + i12 * nb3);

    const uint4     h      = ccq2_header(row);
    const uint8_t * code   = (const uint8_t *) row + sizeof(ccq_row_header);
    const int       groups = ne00 / CCQ_GROUP;

    for (int64_t i = blockIdx.y * (int64_t) blockDim.x + threadIdx.x; i < ne00 / 4; i += (int64_t) gridDim.y * blockDim.x) {
        const float    scale = ccq2_group_scale(row, groups, i / (CCQ_GROUP / 4)) * __uint_as_float(h.z);
        const uint32_t c     = ccq2_code(code[i], h.x, h.y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            y[4 * i + j] = ggml_cuda_cast<dst_t>(scale * (float) ccq2_value(c, j));
        }
    }
}

// clang-format off
void get_rows_ccq2_cuda(
        const void * src0_d, const int32_t * src1_d, void * dst_d, ggml_type dst_type,
        int64_t ne00, size_t nb01, size_t nb02, size_t nb03,
        int64_t ne10, int64_t ne11, int64_t ne12, size_t nb10, size_t nb11, size_t nb12,
        size_t nb1, size_t nb2, size_t nb3, cudaStream_t stream) {
    // clang-format on
    const dim3 threads(256);
    const dim3 blocks(ne10, std::min<int64_t>((ne00 / 4 + threads.x - 1) / threads.x, 1024), ne11 * ne12);
    GGML_ASSERT(ne11 * ne12 <= UINT16_MAX);

    // clang-format off
    const auto launch = [&](auto zero) {
        ccq2_get_rows<decltype(zero)><<<blocks, threads, 0, stream>>>(
            (const char *) src0_d, src1_d, (char *) dst_d,
            ne00, nb01, nb02, nb03, ne11, nb10, nb11, nb12, nb1, nb2, nb3);
    };
    // clang-format on
    switch (dst_type) {
        case GGML_TYPE_F32:
            launch(float());
            break;
        case GGML_TYPE_F16:
            launch(half());
            break;
        case GGML_TYPE_BF16:
            launch(nv_bfloat16());
            break;
        default:
            GGML_ABORT("%s: unsupported dst type: %s\n", __func__, ggml_type_name(dst_type));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations for the kernel below: int8 with one scale per group of 64, the same group that shares a weight scale.
// A row of G groups is four arrays of G chunks of 16 bytes (chunk q holds the activations 16q ... 16q+15 of its group),
// then G float scales: threads that work on neighbouring groups read neighbouring chunks.

static constexpr int CCQ2_Y_GROUP_SIZE = CCQ_GROUP + sizeof(float);

// clang-format off
static __global__ void ccq2_quantize_y(
        const float * __restrict__ x, char * __restrict__ y, const int groups,
        const int64_t s1, const int64_t s2, const int64_t s3, const int ne1, const int ne2) {
    // clang-format on
    const int g = blockIdx.x * blockDim.y + threadIdx.y;
    if (g >= groups) {
        return;
    }
    const int row = blockIdx.y;
    const int i1  = row % ne1;
    const int i2  = row / ne1 % ne2;
    const int i3  = row / ne1 / ne2;

    // two loads: a view may begin at any float
    const float * v  = x + i3 * s3 + i2 * s2 + i1 * s1 + g * CCQ_GROUP + 2 * threadIdx.x;
    const float   v0 = v[0];
    const float   v1 = v[1];

    const float amax = warp_reduce_max(fmaxf(fabsf(v0), fabsf(v1)));
    const float inv  = amax > 0.0f ? 127.0f / amax : 0.0f;

    char *    y_row      = y + (int64_t) row * groups * CCQ2_Y_GROUP_SIZE;
    const int chunk      = threadIdx.x / 8;
    char2 *   dst        = (char2 *) (y_row + (chunk * groups + g) * 16);
    dst[threadIdx.x % 8] = make_char2((char) roundf(v0 * inv), (char) roundf(v1 * inv));
    if (threadIdx.x == 0) {
        ((float *) (y_row + groups * CCQ_GROUP))[g] = amax / 127.0f;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Single tokens and small batches.
//
// A thread works on one group of 64 weights at a time, the 16 code bytes that it loads at once, and keeps the
// activations of that group in registers for all of its rows. As many threads as a row has groups work on a row, so
// that no lane idles for row lengths like 3584 or 2560; several such teams make a block. As many blocks start as the
// device holds at once, and each walks over an equal share of the rows: waves of short blocks leave a tail.

struct ccq2_mmv_args {
    const char *    x;
    const char *    gate;  // of the same shape as x, or null
    const char *    y;
    const int32_t * ids;  // or null
    float *         dst;
    const float *   x_bias;     // or null
    const float *   gate_bias;  // or null
    ggml_glu_op     glu_op;
    float           glu_limit;

    int    groups;  // per row
    int    nrows;
    int    team;  // threads per row
    int    teams;
    size_t row_size, nb02, nb03;
    int    ratio2, ratio3;  // channels and samples of y per one of x
    int    ne11, ne12;      // rows and channels of y
    int    ids_stride;      // tokens, in ids
    int    s1, s2, s3;      // columns, channels and samples of dst
};

// What a block of threads computes: blockIdx.y and .z are a slot and a token (with ids) or a channel and a sample.
struct ccq2_mmv_place {
    size_t x;     // bytes
    size_t y;     // rows
    size_t dst;   // floats
    size_t bias;  // floats
};

static __device__ __forceinline__ ccq2_mmv_place ccq2_mmv_locate(const ccq2_mmv_args & a) {
    const int i2 = blockIdx.y;
    const int i3 = blockIdx.z;
    if (a.ids) {
        const int expert = a.ids[i3 * a.ids_stride + i2];
        return { expert * a.nb02, (size_t) i3 * a.ne11 + i2 % a.ne11, (size_t) i3 * a.s2 + (size_t) i2 * a.s1,
                 (size_t) expert * a.s1 };
    }
    const size_t dst = (size_t) i3 * a.s3 + (size_t) i2 * a.s2;
    return { i2 / a.ratio2 * a.nb02 + i3 / a.ratio3 * a.nb03, ((size_t) i3 * a.ne12 + i2) * a.ne11, dst, dst };
}

// the activations of one group of a column, and their scale
struct ccq2_y_group {
    int4  q[4];
    float d;
};

static __device__ __forceinline__ ccq2_y_group ccq2_load_y(const char * y_row, const int groups, const int g) {
    ccq2_y_group out;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        out.q[q] = ((const int4 *) y_row)[q * groups + g];
    }
    out.d = ((const float *) (y_row + groups * CCQ_GROUP))[g];
    return out;
}

// one group of a row as loaded: header, 16 code bytes, scale
struct ccq2_x_group {
    uint4 header;
    uint4 codes;
    float scale;
};

static __device__ __forceinline__ ccq2_x_group ccq2_load_x(const char * row, const int groups, const int g) {
    return { ccq2_header(row), ((const uint4 *) (row + sizeof(ccq_row_header)))[g], ccq2_group_scale(row, groups, g) };
}

// weights . activations of one group, for several columns that share the unpacked weights
template <int ncols>
static __device__ __forceinline__ void ccq2_dot_group(const ccq2_x_group & x,
                                                      const ccq2_y_group (&y)[ncols],
                                                      float (&sum)[ncols]) {
    const uint32_t words[4] = { x.codes.x, x.codes.y, x.codes.z, x.codes.w };

    int dot[ncols] = { 0 };
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        int v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = ccq2_unpack(words[w], i, x.header.x, x.header.y);
        }
#pragma unroll
        for (int col = 0; col < ncols; ++col) {
            dot[col] = ggml_cuda_dp4a(v[0], y[col].q[w].x, dot[col]);
            dot[col] = ggml_cuda_dp4a(v[1], y[col].q[w].y, dot[col]);
            dot[col] = ggml_cuda_dp4a(v[2], y[col].q[w].z, dot[col]);
            dot[col] = ggml_cuda_dp4a(v[3], y[col].q[w].w, dot[col]);
        }
    }
    const float d = x.scale * __uint_as_float(x.header.z) * (1.0f / CCQ2_UNPACKED);
#pragma unroll
    for (int col = 0; col < ncols; ++col) {
        sum[col] += d * y[col].d * (float) dot[col];
    }
}

static __device__ __forceinline__ float ccq2_glu(const ggml_glu_op op, const float limit, const float x, const float gate) {
    switch (op) {
        case GGML_GLU_OP_SWIGLU:
            return x * ggml_cuda_op_silu_single(gate);
        case GGML_GLU_OP_GEGLU:
            return x * ggml_cuda_op_gelu_single(gate);
        case GGML_GLU_OP_SWIGLU_OAI:
            return ggml_cuda_op_swiglu_oai_single(gate, x);
        case GGML_GLU_OP_SWIGLU_CLAMP:
            return ggml_cuda_op_swiglu_clamp_single(gate, x, limit);
        default:
            return x * gate;
    }
}

static constexpr int CCQ2_MMV_THREADS = 256;
static constexpr int CCQ2_MMV_BLOCKS  = 4;  // per multiprocessor: 64 registers for a thread, a few percent more speed than 80

// Rows that a thread sums up before the team adds its sums, and how many of them it loads at once.
template <int ncols, bool has_gate> struct ccq2_mmv_shape {
    static constexpr int rows      = ncols > 1 ? 2 : has_gate ? 4 : 8;
    static constexpr int in_flight = ncols > 1 ? 2 : has_gate ? 1 : 2;
    static constexpr int matrices  = has_gate ? 2 : 1;
};

// add up the partial sums of a team for `nouts` rows and columns, and write them
template <int ncols, bool has_gate>
static __device__ __forceinline__ void ccq2_mmv_write(const ccq2_mmv_args &  a,
                                                      const ccq2_mmv_place & place,
                                                      const float *          partial,
                                                      const int              nouts,
                                                      const int              row0,
                                                      const int              end) {
    constexpr int matrices = ccq2_mmv_shape<ncols, has_gate>::matrices;

    for (int out = threadIdx.x / WARP_SIZE; out < nouts; out += blockDim.x / WARP_SIZE) {
        const int row = row0 + out / ncols;
        if (row >= end) {
            break;
        }
        float total[matrices] = {};
#pragma unroll
        for (int m = 0; m < matrices; ++m) {
            for (int i = threadIdx.x % WARP_SIZE; i < a.team; i += WARP_SIZE) {
                total[m] += partial[(m * nouts + out) * a.team + i];
            }
            total[m] = warp_reduce_sum(total[m]);
        }
        if (threadIdx.x % WARP_SIZE != 0) {
            continue;
        }
        float result = total[0];
        if (a.x_bias) {
            result += a.x_bias[place.bias + row];
        }
        if (has_gate) {
            const float gate = total[matrices - 1] + (a.gate_bias ? a.gate_bias[place.bias + row] : 0.0f);
            result           = ccq2_glu(a.glu_op, a.glu_limit, result, gate);
        }
        a.dst[place.dst + (size_t) (out % ncols) * a.s1 + row] = result;
    }
}

template <int ncols, bool has_gate>
static __global__ void __launch_bounds__(CCQ2_MMV_THREADS, 4) ccq2_mul_mat_vec(const ccq2_mmv_args a) {
    constexpr int           rows      = ccq2_mmv_shape<ncols, has_gate>::rows;
    constexpr int           in_flight = ccq2_mmv_shape<ncols, has_gate>::in_flight;
    constexpr int           matrices  = ccq2_mmv_shape<ncols, has_gate>::matrices;
    extern __shared__ float partial[];  // two of [matrices][rows of the block][ncols][team]

    const ccq2_mmv_place place = ccq2_mmv_locate(a);

    const int team  = threadIdx.x / a.team;
    const int lane  = threadIdx.x - team * a.team;
    const int nouts = a.teams * rows * ncols;
    const int begin = (int64_t) a.nrows * blockIdx.x / gridDim.x;
    const int end   = (int64_t) a.nrows * (blockIdx.x + 1) / gridDim.x;

    ccq2_y_group y[ncols];
    int y_group = -1;  // the group that y holds: always the same one unless rows have more groups than a team has threads
    int buffer  = 0;
    for (int row0 = begin; row0 < end; row0 += a.teams * rows) {
        float * sums = partial + buffer * matrices * nouts * a.team;
        if (team < a.teams) {
            float sum[matrices][rows][ncols] = {};
            for (int g = lane; g < a.groups; g += a.team) {
                if (g != y_group) {
#pragma unroll
                    for (int col = 0; col < ncols; ++col) {
                        y[col] = ccq2_load_y(a.y + (place.y + col) * a.groups * CCQ2_Y_GROUP_SIZE, a.groups, g);
                    }
                    y_group = g;
                }
#pragma unroll
                for (int first = 0; first < rows; first += in_flight) {
                    if (row0 + first * a.teams >= end) {
                        break;
                    }
                    ccq2_x_group x[matrices][in_flight];
#pragma unroll
                    for (int r = 0; r < in_flight; ++r) {
                        const int    row    = min(row0 + (first + r) * a.teams + team, end - 1);
                        const size_t offset = place.x + row * a.row_size;
                        x[0][r]             = ccq2_load_x(a.x + offset, a.groups, g);
                        if (has_gate) {
                            x[matrices - 1][r] = ccq2_load_x(a.gate + offset, a.groups, g);
                        }
                    }
#pragma unroll
                    for (int m = 0; m < matrices; ++m) {
#pragma unroll
                        for (int r = 0; r < in_flight; ++r) {
                            ccq2_dot_group<ncols>(x[m][r], y, sum[m][first + r]);
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < matrices; ++m) {
#pragma unroll
                for (int r = 0; r < rows; ++r) {
#pragma unroll
                    for (int col = 0; col < ncols; ++col) {
                        const int out                           = (r * a.teams + team) * ncols + col;
                        sums[(m * nouts + out) * a.team + lane] = sum[m][r][col];
                    }
                }
            }
        }
        __syncthreads();
        ccq2_mmv_write<ncols, has_gate>(a, place, sums, nouts, row0, end);
        buffer ^= 1;  // the next sums may come while slower warps still read these
    }
}

template <int ncols, bool has_gate>
static void ccq2_mul_mat_vec_launch(const ccq2_mmv_args & a, const int channels, const int samples, cudaStream_t stream) {
    constexpr int rows      = ccq2_mmv_shape<ncols, has_gate>::rows;
    constexpr int in_flight = ccq2_mmv_shape<ncols, has_gate>::in_flight;
    constexpr int matrices  = ccq2_mmv_shape<ncols, has_gate>::matrices;
    const int     threads   = GGML_PAD(a.teams * a.team, WARP_SIZE);
    const size_t  shared    = 2 * matrices * a.teams * rows * ncols * a.team * sizeof(float);

    int blocks_per_sm = 1;
    CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, ccq2_mul_mat_vec<ncols, has_gate>, threads, shared));
    const int  nsm   = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    const int  share = std::max(1, nsm * blocks_per_sm / (channels * samples));
    const int  steps = (a.nrows + a.teams * in_flight - 1) / (a.teams * in_flight);
    const dim3 blocks(std::min(share, steps), channels, samples);
    ccq2_mul_mat_vec<ncols, has_gate><<<blocks, threads, shared, stream>>>(a);
}

static void ccq2_mul_mat_vec_switch(const ccq2_mmv_args & a,
                                    const int             ncols,
                                    const int             channels,
                                    const int             samples,
                                    cudaStream_t          stream) {
    if (a.gate) {
        GGML_ASSERT(ncols == 1);
        return ccq2_mul_mat_vec_launch<1, true>(a, channels, samples, stream);
    }
    switch (ncols) {
            // clang-format off
        case 1: return ccq2_mul_mat_vec_launch<1, false>(a, channels, samples, stream);
        case 2: return ccq2_mul_mat_vec_launch<2, false>(a, channels, samples, stream);
        case 3: return ccq2_mul_mat_vec_launch<3, false>(a, channels, samples, stream);
        case 4: return ccq2_mul_mat_vec_launch<4, false>(a, channels, samples, stream);
        case 5: return ccq2_mul_mat_vec_launch<5, false>(a, channels, samples, stream);
        case 6: return ccq2_mul_mat_vec_launch<6, false>(a, channels, samples, stream);
        case 7: return ccq2_mul_mat_vec_launch<7, false>(a, channels, samples, stream);
        case 8: return ccq2_mul_mat_vec_launch<8, false>(a, channels, samples, stream);
        // clang-format on
        default:
            GGML_ABORT("%s: %d columns are too many\n", __func__, ncols);
    }
}

void ggml_cuda_mul_mat_vec_ccq2(ggml_backend_cuda_context &           ctx,
                                const ggml_tensor *                   src0,
                                const ggml_tensor *                   src1,
                                const ggml_tensor *                   ids,
                                ggml_tensor *                         dst,
                                const ggml_cuda_mm_fusion_args_host * fusion) {
    GGML_TENSOR_BINARY_OP_LOCALS;

    GGML_ASSERT(src1->type == GGML_TYPE_F32 && nb10 == sizeof(float));
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && nb0 == sizeof(float));
    GGML_ASSERT(nb01 == ggml_row_size(src0->type, ne00));
    GGML_ASSERT(!ids || (ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t)));

    cudaStream_t stream = ctx.stream();
    const int    groups = ne00 / CCQ_GROUP;
    const int    team   = std::min(groups, CCQ2_MMV_THREADS);

    const int64_t y_rows = ne11 * ne12 * ne13;
    GGML_ASSERT(y_rows <= UINT16_MAX);
    ggml_cuda_pool_alloc<char> y(ctx.pool(), y_rows * groups * CCQ2_Y_GROUP_SIZE);
    {
        const dim3 threads(WARP_SIZE, 8);
        const dim3 blocks((groups + threads.y - 1) / threads.y, y_rows);
        ccq2_quantize_y<<<blocks, threads, 0, stream>>>((const float *) src1->data, y.get(), groups, nb11 / sizeof(float),
                                                        nb12 / sizeof(float), nb13 / sizeof(float), ne11, ne12);
    }

    ccq2_mmv_args a = {};
    a.x             = (const char *) src0->data;
    a.y             = y.get();
    a.ids           = ids ? (const int32_t *) ids->data : nullptr;
    a.dst           = (float *) dst->data;
    a.groups        = groups;
    a.nrows         = ne01;
    a.team          = team;
    a.teams         = CCQ2_MMV_THREADS / team;
    a.row_size      = nb01;
    a.nb02          = nb02;
    a.nb03          = nb03;
    a.ratio2        = ids ? 1 : ne12 / ne02;
    a.ratio3        = ids ? 1 : ne13 / ne03;
    a.ne11          = ne11;
    a.ne12          = ne12;
    a.ids_stride    = ids ? ids->nb[1] / sizeof(int32_t) : 0;
    a.s1            = nb1 / sizeof(float);
    a.s2            = nb2 / sizeof(float);
    a.s3            = nb3 / sizeof(float);
    if (fusion) {
        GGML_ASSERT(!fusion->x_scale && !fusion->gate_scale);
        GGML_ASSERT(!fusion->gate || (fusion->gate->type == src0->type && ggml_are_same_stride(fusion->gate, src0)));
        a.gate      = fusion->gate ? (const char *) fusion->gate->data : nullptr;
        a.x_bias    = fusion->x_bias ? (const float *) fusion->x_bias->data : nullptr;
        a.gate_bias = fusion->gate_bias ? (const float *) fusion->gate_bias->data : nullptr;
        a.glu_op    = fusion->glu_op;
        a.glu_limit = fusion->glu_limit;
    }
    // with ids: a slot and a token per block; without: a channel and a sample, all columns at once
    ccq2_mul_mat_vec_switch(a, ids ? 1 : ne1, ids ? ne1 : ne2, ids ? ne2 : ne3, stream);
}
