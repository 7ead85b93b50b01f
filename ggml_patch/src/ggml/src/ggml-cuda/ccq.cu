#include "ccq.cuh"

#include "convert.cuh"
#include "mmv-glu.cuh"

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
// Single tokens and small batches.
//
// A lane works on one group of 64 weights of a row at a time, the 16 code bytes that it loads at once. A warp works on one
// row, or on four, with eight lanes each, so that none of them idles for row lengths like 3584 or 2560. The activations
// lie in shared memory, quantized by each block of threads for itself: that costs less than a kernel that does it once.
// As many blocks start as the device holds at once, and each walks over an equal share of the rows: waves of short blocks
// leave a tail.

struct ccq2_mmv_args {
    const char *    x;
    const char *    gate;  // of the same shape as x, or null
    const float *   y;
    const int32_t * ids;  // or null
    float *         dst;
    const float *   x_bias;     // or null
    const float *   gate_bias;  // or null
    ggml_glu_op     glu_op;
    float           glu_limit;

    int     groups;  // per row
    int     nrows;
    size_t  row_size, nb02, nb03;
    int     ratio2, ratio3;  // channels and samples of y per one of x
    int     ne11;            // rows of y, with ids
    int     ids_stride;      // tokens, in ids
    int64_t sy1, sy2, sy3;   // rows, channels and samples of y
    int     s1, s2, s3;      // columns, channels and samples of dst
};

// What a block of threads computes: blockIdx.y and .z are a slot and a token (with ids) or a channel and a sample.
struct ccq2_mmv_place {
    size_t  x;     // bytes
    int64_t y;     // floats
    size_t  dst;   // floats
    size_t  bias;  // floats
};

static __device__ __forceinline__ ccq2_mmv_place ccq2_mmv_locate(const ccq2_mmv_args & a) {
    const int i2 = blockIdx.y;
    const int i3 = blockIdx.z;
    if (a.ids) {
        const int expert = a.ids[i3 * a.ids_stride + i2];
        return { expert * a.nb02, i3 * a.sy2 + i2 % a.ne11 * a.sy1, (size_t) i3 * a.s2 + (size_t) i2 * a.s1,
                 (size_t) expert * a.s1 };
    }
    const size_t dst = (size_t) i3 * a.s3 + (size_t) i2 * a.s2;
    return { i2 / a.ratio2 * a.nb02 + i3 / a.ratio3 * a.nb03, i3 * a.sy3 + i2 * a.sy2, dst, dst };
}

// The activations of a column in shared memory: int8 with one scale per group of 64, the same group that shares a weight
// scale. A row of G groups is four arrays of G chunks of 16 bytes (chunk q holds the activations 16q ... 16q+15 of its
// group), then G float scales: lanes that work on neighbouring groups read neighbouring chunks. Each eight activations
// are stored in the order 0 1 4 5 2 3 6 7, that of ccq2_unpack_pair.
static constexpr int CCQ2_Y_GROUP_SIZE = CCQ_GROUP + sizeof(float);

static __device__ __forceinline__ void ccq2_quantize_y(const float * x, char * y, const int groups) {
    const int  lane    = threadIdx.x % 8;                      // of the eight that quantize a group
    const bool aligned = (uintptr_t) x % sizeof(float4) == 0;  // a view may begin at any float
    for (int g = threadIdx.x / 8; g < groups; g += blockDim.x / 8) {
        alignas(16) float v[8];
        const float *     from = x + g * CCQ_GROUP + 8 * lane;
        if (aligned) {
            *(float4 *) v       = ((const float4 *) from)[0];
            *(float4 *) (v + 4) = ((const float4 *) from)[1];
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                v[i] = from[i];
            }
        }
        float amax = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            amax = fmaxf(amax, fabsf(v[i]));
        }
        amax            = warp_reduce_max<8>(amax);
        const float inv = amax > 0.0f ? 127.0f / amax : 0.0f;
        char        q[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            q[i] = (char) __float2int_rn(v[i] * inv);
        }
        char4 * to = (char4 *) (y + (lane / 2 * groups + g) * 16 + lane % 2 * 8);
        to[0]      = make_char4(q[0], q[1], q[4], q[5]);
        to[1]      = make_char4(q[2], q[3], q[6], q[7]);
        if (lane == 0) {
            ((float *) (y + groups * CCQ_GROUP))[g] = amax / 127.0f;
        }
    }
}

// one group of a row as loaded
struct ccq2_x_group {
    uint4    codes;
    uint32_t scales;  // of this group and its neighbour
};

// Codes are read once: they leave the caches first. HIP has no such load of 16 bytes.
static __device__ __forceinline__ uint4 ccq2_load_codes(const uint4 * codes) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    return *codes;
#else
    return __ldcs(codes);
#endif  // defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
}

static __device__ __forceinline__ ccq2_x_group ccq2_load_x(const char * row, const int groups, const int g) {
    const char * codes = row + sizeof(ccq_row_header);
    return { ccq2_load_codes((const uint4 *) codes + g), ((const uint8_t *) codes)[groups * (CCQ_GROUP / 4) + g / 2] };
}

static constexpr int CCQ2_MMV_THREADS = 512;

// Blocks per multiprocessor: 64 registers for a thread unless that spills.
static constexpr __host__ __device__ int ccq2_mmv_blocks(const int ncols) {
    return ncols > 2 ? 1 : 2;
}

// `lanes` work on a row
template <int ncols, bool has_gate, int lanes> struct ccq2_mmv_shape {
    static constexpr int matrices = has_gate ? 2 : 1;
    static constexpr int rows = ncols == 1 && !has_gate ? 2 : 1;  // that a lane works on at once: they share its activations
    static constexpr int warp_rows = rows * WARP_SIZE / lanes;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= GGML_CUDA_CC_BLACKWELL
    static constexpr int flight =
        has_gate && lanes < WARP_SIZE ? 1 : 2;  // groups of a row that a lane loads at once: more spill
#else
    static constexpr int flight = 2;
#endif  // defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= GGML_CUDA_CC_BLACKWELL
};

template <int ncols, bool has_gate, int lanes>
static __global__ void __launch_bounds__(CCQ2_MMV_THREADS, ccq2_mmv_blocks(ncols)) ccq2_mul_mat_vec(const ccq2_mmv_args a) {
    using shape                     = ccq2_mmv_shape<ncols, has_gate, lanes>;
    constexpr int          rows     = shape::rows;
    constexpr int          matrices = shape::matrices;
    extern __shared__ char y[];  // ncols columns
    const int              column_size = a.groups * CCQ2_Y_GROUP_SIZE;

    ggml_cuda_pdl_sync();
    const ccq2_mmv_place place = ccq2_mmv_locate(a);
#pragma unroll
    for (int col = 0; col < ncols; ++col) {
        ccq2_quantize_y(a.y + place.y + col * a.sy1, y + col * column_size, a.groups);
    }
    __syncthreads();
    ggml_cuda_pdl_lc();

    const int lane  = threadIdx.x % lanes;
    const int team  = threadIdx.x % WARP_SIZE / lanes;
    const int shift = lane % 2 == 0 ? 4 : 0;  // of the scale of the groups of this lane
    const int steps = (a.nrows + shape::warp_rows - 1) / shape::warp_rows;
    const int end   = (int64_t) steps * (blockIdx.x + 1) / gridDim.x;

    for (int step = (int64_t) steps * blockIdx.x / gridDim.x + threadIdx.x / WARP_SIZE; step < end;
         step += CCQ2_MMV_THREADS / WARP_SIZE) {
        const char * x[matrices][rows];
        uint32_t     M[matrices][rows];
        uint32_t     Z[matrices][rows];
        float        d[matrices][rows];
        float        sum[matrices][rows][ncols] = {};
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const int row = min((step * rows + r) * (WARP_SIZE / lanes) + team, a.nrows - 1);
            x[0][r]       = a.x + place.x + row * a.row_size;
            if (has_gate) {
                x[matrices - 1][r] = a.gate + place.x + row * a.row_size;
            }
#pragma unroll
            for (int m = 0; m < matrices; ++m) {
                const uint4 h = ccq2_header(x[m][r]);
                M[m][r]       = h.x;
                Z[m][r]       = h.y;
                d[m][r]       = __uint_as_float(h.z);
            }
        }
        for (int g0 = lane; g0 < a.groups; g0 += lanes * shape::flight) {
            ccq2_x_group group[shape::flight][matrices][rows];
#pragma unroll
            for (int f = 0; f < shape::flight; ++f) {
                const int g = g0 + f * lanes;
                if (f == 0 || g < a.groups) {
#pragma unroll
                    for (int m = 0; m < matrices; ++m) {
#pragma unroll
                        for (int r = 0; r < rows; ++r) {
                            group[f][m][r] = ccq2_load_x(x[m][r], a.groups, g);
                        }
                    }
                }
            }
#pragma unroll
            for (int f = 0; f < shape::flight; ++f) {
                const int g = g0 + f * lanes;
                if (f > 0 && g >= a.groups) {
                    break;
                }
                int dot[matrices][rows][ncols] = {};
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    int4 v[ncols];
#pragma unroll
                    for (int col = 0; col < ncols; ++col) {
                        v[col] = *(const int4 *) (y + col * column_size + (w * a.groups + g) * 16);
                    }
#pragma unroll
                    for (int m = 0; m < matrices; ++m) {
#pragma unroll
                        for (int r = 0; r < rows; ++r) {
                            const uint4 &  c    = group[f][m][r].codes;
                            const uint32_t word = w == 0 ? c.x : w == 1 ? c.y : w == 2 ? c.z : c.w;
                            const int2     lo   = ccq2_unpack_pair(word, 0, M[m][r], Z[m][r]);
                            const int2     hi   = ccq2_unpack_pair(word, 1, M[m][r], Z[m][r]);
#pragma unroll
                            for (int col = 0; col < ncols; ++col) {
                                int & sumi = dot[m][r][col];
                                sumi       = ggml_cuda_dp4a(lo.x, v[col].x, sumi);
                                sumi       = ggml_cuda_dp4a(lo.y, v[col].y, sumi);
                                sumi       = ggml_cuda_dp4a(hi.x, v[col].z, sumi);
                                sumi       = ggml_cuda_dp4a(hi.y, v[col].w, sumi);
                            }
                        }
                    }
                }
#pragma unroll
                for (int col = 0; col < ncols; ++col) {
                    const float dy = ((const float *) (y + col * column_size + a.groups * CCQ_GROUP))[g];
#pragma unroll
                    for (int m = 0; m < matrices; ++m) {
#pragma unroll
                        for (int r = 0; r < rows; ++r) {
                            const float scale = (float) (group[f][m][r].scales >> shift & 15);
                            sum[m][r][col] += dy * scale * (float) dot[m][r][col];
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const int row = (step * rows + r) * (WARP_SIZE / lanes) + team;
#pragma unroll
            for (int col = 0; col < ncols; ++col) {
                float total[matrices];
#pragma unroll
                for (int m = 0; m < matrices; ++m) {
                    total[m] = warp_reduce_sum<lanes>(sum[m][r][col]) * d[m][r] * (1.0f / CCQ2_UNPACKED);
                }
                if (lane != 0 || row >= a.nrows) {
                    continue;
                }
                float result = total[0];
                if (a.x_bias) {
                    result += a.x_bias[place.bias + row];
                }
                if (has_gate) {
                    const float gate = total[matrices - 1] + (a.gate_bias ? a.gate_bias[place.bias + row] : 0.0f);
                    result           = ggml_cuda_mmv_glu(a.glu_op, a.glu_limit, result, gate);
                }
                a.dst[place.dst + (size_t) col * a.s1 + row] = result;
            }
        }
    }
}

template <int ncols, bool has_gate, int lanes>
static void ccq2_mul_mat_vec_launch(const ccq2_mmv_args & a, const int channels, const int samples, cudaStream_t stream) {
    const auto & device = ggml_cuda_info().devices[ggml_cuda_get_device()];
    const size_t shared = (size_t) ncols * a.groups * CCQ2_Y_GROUP_SIZE;
    CUDA_SET_SHARED_MEMORY_LIMIT((ccq2_mul_mat_vec<ncols, has_gate, lanes>), device.smpbo);

    int blocks_per_sm = 1;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, ccq2_mul_mat_vec<ncols, has_gate, lanes>,
                                                             CCQ2_MMV_THREADS, shared));
    const int                            share     = std::max(1, device.nsm * blocks_per_sm / (channels * samples));
    const int                            warp_rows = ccq2_mmv_shape<ncols, has_gate, lanes>::warp_rows;
    const dim3                           blocks(std::min(share, (a.nrows + warp_rows - 1) / warp_rows), channels, samples);
    const ggml_cuda_kernel_launch_params params = { blocks, dim3(CCQ2_MMV_THREADS, 1, 1), shared, stream };
    ggml_cuda_kernel_launch(ccq2_mul_mat_vec<ncols, has_gate, lanes>, params, a);
}

// columns that find room for their activations at once
static void ccq2_mul_mat_vec_columns(const ccq2_mmv_args & a,
                                     const int             ncols,
                                     const int             channels,
                                     const int             samples,
                                     cudaStream_t          stream) {
    if (a.gate) {
        GGML_ASSERT(ncols == 1);
        return a.groups % WARP_SIZE == 0 ? ccq2_mul_mat_vec_launch<1, true, WARP_SIZE>(a, channels, samples, stream) :
                                           ccq2_mul_mat_vec_launch<1, true, 8>(a, channels, samples, stream);
    }
    switch (ncols) {
            // clang-format off
        case 1:
            return a.groups % WARP_SIZE == 0 ? ccq2_mul_mat_vec_launch<1, false, WARP_SIZE>(a, channels, samples, stream) :
                                               ccq2_mul_mat_vec_launch<1, false, 8>(a, channels, samples, stream);
        case 2: return ccq2_mul_mat_vec_launch<2, false, 8>(a, channels, samples, stream);
        case 3: return ccq2_mul_mat_vec_launch<3, false, 8>(a, channels, samples, stream);
        case 4: return ccq2_mul_mat_vec_launch<4, false, 8>(a, channels, samples, stream);
        case 5: return ccq2_mul_mat_vec_launch<5, false, 8>(a, channels, samples, stream);
        case 6: return ccq2_mul_mat_vec_launch<6, false, 8>(a, channels, samples, stream);
        case 7: return ccq2_mul_mat_vec_launch<7, false, 8>(a, channels, samples, stream);
        case 8: return ccq2_mul_mat_vec_launch<8, false, 8>(a, channels, samples, stream);
        // clang-format on
        default:
            GGML_ABORT("%s: %d columns are too many\n", __func__, ncols);
    }
}

static void ccq2_mul_mat_vec_switch(const ccq2_mmv_args & a,
                                    const int             ncols,
                                    const int             channels,
                                    const int             samples,
                                    cudaStream_t          stream) {
    const size_t room    = ggml_cuda_info().devices[ggml_cuda_get_device()].smpbo;
    const int    at_once = room / (a.groups * CCQ2_Y_GROUP_SIZE);
    GGML_ASSERT(at_once > 0);  // rows of 200,000 weights and more
    for (int col = 0; col < ncols; col += at_once) {
        ccq2_mmv_args b = a;
        b.y += col * a.sy1;
        b.dst += (size_t) col * a.s1;
        ccq2_mul_mat_vec_columns(b, std::min(at_once, ncols - col), channels, samples, stream);
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

    ccq2_mmv_args a = {};
    a.x             = (const char *) src0->data;
    a.y             = (const float *) src1->data;
    a.ids           = ids ? (const int32_t *) ids->data : nullptr;
    a.dst           = (float *) dst->data;
    a.groups        = ne00 / CCQ_GROUP;
    a.nrows         = ne01;
    a.row_size      = nb01;
    a.nb02          = nb02;
    a.nb03          = nb03;
    a.ratio2        = ids ? 1 : ne12 / ne02;
    a.ratio3        = ids ? 1 : ne13 / ne03;
    a.ne11          = ne11;
    a.ids_stride    = ids ? ids->nb[1] / sizeof(int32_t) : 0;
    a.sy1           = nb11 / sizeof(float);
    a.sy2           = nb12 / sizeof(float);
    a.sy3           = nb13 / sizeof(float);
    a.s1            = nb1 / sizeof(float);
    a.s2            = nb2 / sizeof(float);
    a.s3            = nb3 / sizeof(float);
    if (fusion) {
        GGML_ASSERT(!fusion->x_scale && !fusion->gate_scale && !fusion->shared_up);
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
