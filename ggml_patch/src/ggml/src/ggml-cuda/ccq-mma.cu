// Experts of ccq2 with few tokens each: batches of some six to some hundred tokens.
//
// Such a batch reads most experts, but each expert meets a handful of tokens. A warp works on 32 rows of one expert (with
// gate and up together, on 16 of either) and on up to 16 of its tokens, for whole rows and without a barrier. It decodes the
// weights into registers as the A operand of the tensor cores, so that one decode serves eight tokens, and its code bytes
// come through a ring in shared memory of its own.
//
// A window of a code becomes a half by a mask and an or (ccq2_unpack_half2): an integer with an offset, exact. The
// activations are halves too, so the products need one scale per group of 64 weights and none for the activations. What
// the offsets of a group add is the same for every row, so it is what the accumulators begin with.
#include "ccq.cuh"
#include "cp-async.cuh"
#include "mmv-glu.cuh"

#include <algorithm>

// ---------------------------------------------------------------------------------------------------------------------
// The activations and the tokens of each expert.

// Activations are stored in the order in which the warp holds the weights: chunk (h, t) of a group, 16 bytes, has the
// activations 16 t + 8 h ... + 7 in the order 0 4 1 5 2 6 3 7. Of an odd one it is eight times the value: odd windows
// come out of ccq2_unpack_half2 eight times smaller. A row is scaled so that its largest value becomes CCQ2_MMA_LARGEST.
static constexpr float CCQ2_MMA_LARGEST = 1024.0f;
static constexpr float CCQ2_MMA_EVEN    = 16.0f;                                 // what a weight is multiplied by
static constexpr float CCQ2_MMA_ODD     = 2.0f;                                  // likewise, in odd windows
static constexpr float CCQ2_MMA_OFFSET0 = 1024.0f + CCQ2_MMA_EVEN * CCQ_OFFSET;  // what is added then
static constexpr float CCQ2_MMA_OFFSET1 = 1024.0f + CCQ2_MMA_ODD * CCQ_OFFSET;

struct ccq2_mma_columns {
    half *    y;       // [row of y][k]
    float *   offset;  // [row of y][group]: what to begin with
    float *   scale;   // [row of y]
    int32_t * pairs;   // token * used + slot, sorted by expert
    int32_t * bounds;  // of each expert in pairs, and their end
};

struct ccq2_mma_prepare_args {
    const float *    y;
    const int32_t *  ids;
    ccq2_mma_columns out;

    int     k;
    int     ne11;      // rows of y per token
    int     rows;      // of y
    int64_t sy1, sy2;  // rows and tokens of y, in floats
    int     pairs;     // of a token and an expert
    int     used;      // experts per token
    int     ids_stride;
    int     experts;
};

static constexpr int CCQ2_MMA_PREPARE_THREADS = 1024;

// list the tokens of expert e; their order does not matter
static __device__ __forceinline__ void ccq2_mma_sort(const ccq2_mma_prepare_args & a, const int e) {
    __shared__ int before;  // pairs of the experts before e
    __shared__ int found;
    if (threadIdx.x == 0) {
        before = 0;
        found  = 0;
    }
    __syncthreads();
    int less = 0;
    for (int i = threadIdx.x; i < a.pairs; i += CCQ2_MMA_PREPARE_THREADS) {
        less += a.ids[i / a.used * a.ids_stride + i % a.used] < e;
    }
    less = warp_reduce_sum(less);
    if (threadIdx.x % WARP_SIZE == 0) {
        atomicAdd(&before, less);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.pairs; i += CCQ2_MMA_PREPARE_THREADS) {
        if (a.ids[i / a.used * a.ids_stride + i % a.used] == e) {
            a.out.pairs[before + atomicAdd(&found, 1)] = i;
        }
    }
    if (threadIdx.x == 0) {
        a.out.bounds[e] = before;
        if (e == a.experts - 1) {
            a.out.bounds[e + 1] = a.pairs;
        }
    }
}

static __device__ __forceinline__ void ccq2_mma_load8(const float * y, float (&v)[8]) {
    *(float4 *) v       = ((const float4 *) y)[0];
    *(float4 *) (v + 4) = ((const float4 *) y)[1];
}

static __device__ __forceinline__ void ccq2_mma_convert(const ccq2_mma_prepare_args & a, const int row) {
    __shared__ float  of_warp[CCQ2_MMA_PREPARE_THREADS / WARP_SIZE];
    const float *     y = a.y + row / a.ne11 * a.sy2 + row % a.ne11 * a.sy1;
    alignas(16) float v[8];
    float             amax = 0.0f;
    for (int k = 8 * threadIdx.x; k < a.k; k += 8 * CCQ2_MMA_PREPARE_THREADS) {
        ccq2_mma_load8(y + k, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            amax = fmaxf(amax, fabsf(v[i]));
        }
    }
    amax = warp_reduce_max(amax);
    if (threadIdx.x % WARP_SIZE == 0) {
        of_warp[threadIdx.x / WARP_SIZE] = amax;
    }
    __syncthreads();
    static_assert(CCQ2_MMA_PREPARE_THREADS / WARP_SIZE == WARP_SIZE, "one lane for each warp");
    amax            = warp_reduce_max(of_warp[threadIdx.x % WARP_SIZE]);
    const float inv = amax > 0.0f ? CCQ2_MMA_LARGEST / amax : 0.0f;

    // eight threads have a group
    for (int k = 8 * threadIdx.x; k < a.k; k += 8 * CCQ2_MMA_PREPARE_THREADS) {
        ccq2_mma_load8(y + k, v);
        alignas(16) half2 out[4];
        float             offset = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float times = inv * (j % 2 == 0 ? 1.0f : CCQ2_MMA_EVEN / CCQ2_MMA_ODD);
            out[j]            = __floats2half2_rn(v[j] * times, v[j + 4] * times);
            const float2 sum  = __half22float2(out[j]);
            offset -= (sum.x + sum.y) * (j % 2 == 0 ? CCQ2_MMA_OFFSET0 : CCQ2_MMA_OFFSET1);
        }
        const int group                                                         = k / CCQ_GROUP;
        const int chunk                                                         = k / 8 % 2 * 4 + k / 16 % 4;
        *((uint4 *) (a.out.y + (size_t) row * a.k + group * CCQ_GROUP) + chunk) = *(const uint4 *) out;

        offset = warp_reduce_sum<8>(offset);
        if (k % CCQ_GROUP == 0) {
            a.out.offset[(size_t) row * (a.k / CCQ_GROUP) + group] = offset;
        }
    }
    if (threadIdx.x == 0) {
        a.out.scale[row] = amax * (1.0f / (CCQ2_MMA_LARGEST * CCQ2_MMA_EVEN));
    }
}

// a block of threads for each row of y and for each expert
static __global__ void __launch_bounds__(CCQ2_MMA_PREPARE_THREADS, 1) ccq2_mma_prepare(const ccq2_mma_prepare_args a) {
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();
    if (blockIdx.x < a.rows) {
        ccq2_mma_convert(a, blockIdx.x);
    } else {
        ccq2_mma_sort(a, blockIdx.x - a.rows);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The product.

struct ccq2_mma_args {
    const char *     x;
    const char *     gate;       // of the same shape as x, or null
    const float *    x_bias;     // or null
    const float *    gate_bias;  // or null
    ccq2_mma_columns in;
    float *          dst;
    ggml_glu_op      glu_op;
    float            glu_limit;

    int     groups;  // per row
    int     nrows;
    int     row_size;
    size_t  nb02;
    int     used;    // experts per token
    bool    shared;  // a token's experts share its row of y
    int     passes;  // over the tokens of an expert, if it has the most that it can
    int64_t s1, s2;  // slots and tokens of dst, in floats
};

static constexpr int CCQ2_MMA_WARPS  = 4;   // of a block
static constexpr int CCQ2_MMA_ROWS   = 32;  // of a warp
static constexpr int CCQ2_MMA_GROUPS = 8;   // per row in a stage of a warp's ring
static constexpr int CCQ2_MMA_STAGES = 2;
static constexpr int CCQ2_MMA_CHUNK  = 16;  // bytes: the codes of a group
static constexpr int CCQ2_MMA_STAGE  = CCQ2_MMA_ROWS * CCQ2_MMA_GROUPS * CCQ2_MMA_CHUNK;

// bytes of a row of group scales in shared memory: an odd number of chunks, so that rows lie in different banks
static __device__ __host__ __forceinline__ int ccq2_mma_scale_stride(const int groups) {
    return (((groups / 2 + CCQ2_MMA_CHUNK - 1) / CCQ2_MMA_CHUNK) | 1) * CCQ2_MMA_CHUNK;
}

// bytes of shared memory of a warp: the ring, then the scales
static __device__ __host__ __forceinline__ int ccq2_mma_warp_size(const int groups) {
    return CCQ2_MMA_STAGES * CCQ2_MMA_STAGE + CCQ2_MMA_ROWS * ccq2_mma_scale_stride(groups);
}

#ifdef CP_ASYNC_AVAILABLE
template <int n> static __device__ __forceinline__ void ccq2_mma_wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

static __device__ __forceinline__ void ccq2_mma_commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// d = a b + c: 16 x 16 weights, 16 x 8 activations
static __device__ __forceinline__ void ccq2_mma_m16n8k16(float (&d)[4],
                                                         const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2],
                                                         const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The rows of a warp: two halves of 16, of one matrix or of two. A lane decodes for the rows lane / 4 and 8 more of either.
struct ccq2_mma_rows {
    const char * half[2];
    int          size;

    __device__ const char * of_lane(const int m) const {  // m = 0 ... 3
        return half[m / 2] + (m % 2 * 8 + threadIdx.x % WARP_SIZE / 4) * size;
    }
};

// A ring of code bytes: a stage holds CCQ2_MMA_GROUPS groups of each row. The chunks of a row are permuted, so that those
// of one group lie in different banks.
struct ccq2_mma_ring {
    static constexpr int rows_at_once = WARP_SIZE / CCQ2_MMA_GROUPS;

    uint32_t     shared;
    const char * from[2];  // the next chunk of this lane in either half
    int          read, write;

    static __device__ int position(const int row, const int group) {
        return (row * CCQ2_MMA_GROUPS + (group ^ row % CCQ2_MMA_GROUPS)) * CCQ2_MMA_CHUNK;
    }

    __device__ ccq2_mma_ring(const char * memory, const ccq2_mma_rows & rows)
        : shared(ggml_cuda_cvta_generic_to_shared((void *) memory)), read(0), write(0) {
        const int lane = threadIdx.x % WARP_SIZE;
        for (int i = 0; i < 2; ++i) {
            from[i] = rows.half[i] + lane / CCQ2_MMA_GROUPS * rows.size + sizeof(ccq_row_header) +
                      lane % CCQ2_MMA_GROUPS * CCQ2_MMA_CHUNK;
        }
    }

    static __device__ int after(const int stage) { return stage + 1 == CCQ2_MMA_STAGES ? 0 : stage + 1; }

    // start to copy the next stage, of which `groups` exist
    __device__ void copy(const int row_size, const int groups) {
        const int lane = threadIdx.x % WARP_SIZE;
        if (lane % CCQ2_MMA_GROUPS < groups) {
            const uint32_t to = shared + write * CCQ2_MMA_STAGE;
#pragma unroll
            for (int i = 0; i < CCQ2_MMA_ROWS / rows_at_once; ++i) {
                constexpr int in_half = CCQ2_MMA_ROWS / 2 / rows_at_once;
                const int     row     = i * rows_at_once + lane / CCQ2_MMA_GROUPS;
                cp_async_cg_16<0>(to + position(row, lane % CCQ2_MMA_GROUPS),
                                  from[i / in_half] + i % in_half * rows_at_once * row_size);
            }
        }
        from[0] += CCQ2_MMA_GROUPS * CCQ2_MMA_CHUNK;
        from[1] += CCQ2_MMA_GROUPS * CCQ2_MMA_CHUNK;
        write = after(write);
        ccq2_mma_commit_copies();
    }

    // the codes of a group of the stage that is read: of each lane's four rows a quarter
    __device__ void load(const int group, uint32_t (&codes)[4]) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(codes[0]), "=r"(codes[1]), "=r"(codes[2]), "=r"(codes[3])
                     : "r"(shared + read * CCQ2_MMA_STAGE + position(threadIdx.x % WARP_SIZE, group)));
    }
};

// The columns of a warp, 8 N of them; what is missing is column 0 once more.
template <int N> struct ccq2_mma_lane_columns {
    static constexpr int begin_size = 4 * sizeof(float4);  // of a group

    const char * y[N];      // this lane's chunks of column lane / 4 of each eight
    const char * begin[N];  // in shared memory: what the accumulators begin with

    // the operand and the beginning of a group of this stage
    __device__ void load(const int n, const int group, uint32_t (&b)[4][2], float (&c)[4]) const {
        const uint4 * chunk = (const uint4 *) (y[n] + group * (CCQ_GROUP * sizeof(half)));
        *(uint4 *) b[0]     = __ldg(chunk);
        *(uint4 *) b[2]     = __ldg(chunk + 4);
        *(float4 *) c       = *(const float4 *) (begin[n] + group * begin_size);
    }

    __device__ void next_stage() {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            y[n] += CCQ2_MMA_GROUPS * CCQ_GROUP * sizeof(half);
            begin[n] += CCQ2_MMA_GROUPS * begin_size;
        }
    }
};

// a row of y for a pair of token and slot
static __device__ __forceinline__ int ccq2_mma_row_of_y(const ccq2_mma_args & a, const int pair) {
    return a.shared ? pair / a.used : pair;
}

// What the accumulators of each group begin with, as they lie in registers: columns 2 i and 2 i + 1, twice.
template <int N>
static __device__ __forceinline__ void ccq2_mma_copy_offsets(const ccq2_mma_args & a,
                                                             const int *           pairs,
                                                             const int             ncols,
                                                             float *               to) {
    constexpr int threads = CCQ2_MMA_WARPS * WARP_SIZE / 8;  // for a column
    const int     col     = threadIdx.x / threads;
    for (int n = 0; n < N && n * 8 + col < ncols; ++n) {
        const float * from = a.in.offset + (size_t) ccq2_mma_row_of_y(a, pairs[n * 8 + col]) * a.groups;
        for (int g = threadIdx.x % threads; g < a.groups; g += threads) {
            float * begin = to + (n * a.groups + g) * 16 + col / 2 * 4 + col % 2;
            begin[0]      = from[g];
            begin[2]      = from[g];
        }
    }
}

// Group g of four whose scales are given, 4 bits each: a mask and an or make it a float, too large by 2^23.
static __device__ __forceinline__ float ccq2_mma_scale(const uint32_t scales, const int g) {
    const int   shift = g / 2 * 8 + (g % 2 == 0 ? 4 : 0);
    const float value = __uint_as_float(ccq2_and_or(scales, 15u << shift, 0x4b000000));
    return fmaf(value, 1.0f / (1 << shift), -8388608.0f / (1 << shift));
}

// One group of the warp's rows times its activations.
template <int N>
static __device__ __forceinline__ void ccq2_mma_group(const uint32_t (&codes)[4],
                                                      const uint32_t (&M)[4],
                                                      const uint32_t (&Z)[4],
                                                      const float (&scale)[4],
                                                      const ccq2_mma_lane_columns<N> & columns,
                                                      const int                        group,
                                                      float (&sum)[2][N][4]) {
    uint32_t w[4][2][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        ccq2_unpack_half2(codes[m], 0, M[m], Z[m], w[m][0]);
        ccq2_unpack_half2(codes[m], 1, M[m], Z[m], w[m][1]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        alignas(16) uint32_t b[4][2];
        alignas(16) float    begin[4];
        columns.load(n, group, b, begin);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto & upper = w[2 * half];
            const auto & lower = w[2 * half + 1];
            float        c[4]  = { begin[0], begin[1], begin[2], begin[3] };
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int      j    = i % 2 * 2;
                const uint32_t A[4] = { upper[i / 2][j], lower[i / 2][j], upper[i / 2][j + 1], lower[i / 2][j + 1] };
                ccq2_mma_m16n8k16(c, A, b[i], c);
            }
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                sum[half][n][l] += scale[2 * half + l / 2] * c[l];
            }
        }
    }
}

template <int N, bool has_gate>
static __device__ __forceinline__ void ccq2_mma_write(const ccq2_mma_args & a,
                                                      const ccq2_mma_rows & rows,
                                                      const int             row0,
                                                      const int             expert,
                                                      const int *           pairs,
                                                      const int             ncols,
                                                      const float (&sum)[2][N][4]) {
    const int lane = threadIdx.x % WARP_SIZE;
    float     d[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        d[m] = __uint_as_float(ccq2_header(rows.of_lane(m)).z);
    }
    const auto bias = [&](const float * from, const int row) { return from ? from[expert * (int64_t) a.nrows + row] : 0.0f; };
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int col = n * 8 + lane % 4 * 2 + i;
            if (col >= ncols) {
                continue;
            }
            const int   pair  = pairs[col];
            const float scale = a.in.scale[ccq2_mma_row_of_y(a, pair)];
            float *     dst   = a.dst + pair / a.used * a.s2 + pair % a.used * a.s1;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int   row    = row0 + h * 8 + lane / 4;
                const float first  = sum[0][n][2 * h + i] * scale * d[h];
                const float second = sum[1][n][2 * h + i] * scale * d[2 + h];
                if (has_gate) {
                    dst[row] =
                        ggml_cuda_mmv_glu(a.glu_op, a.glu_limit, first + bias(a.x_bias, row), second + bias(a.gate_bias, row));
                } else {
                    dst[row]                     = first + bias(a.x_bias, row);
                    dst[row + CCQ2_MMA_ROWS / 2] = second + bias(a.x_bias, row + CCQ2_MMA_ROWS / 2);
                }
            }
        }
    }
}

// The rows from row0 on times ncols columns.
template <int N, bool has_gate>
static __device__ __forceinline__ void ccq2_mma_tile(const ccq2_mma_args & a,
                                                     const int             row0,
                                                     const int             expert,
                                                     const int *           pairs,
                                                     const int             ncols,
                                                     char *                memory,
                                                     const char *          begin) {
    const int           lane = threadIdx.x % WARP_SIZE;
    const char *        x    = a.x + expert * a.nb02 + (int64_t) row0 * a.row_size;
    const ccq2_mma_rows rows = {
        { x, has_gate ? a.gate + (x - a.x) : x + CCQ2_MMA_ROWS / 2 * a.row_size },
        a.row_size
    };

    ccq2_mma_ring ring(memory, rows);
    char *        scales = memory + CCQ2_MMA_STAGES * CCQ2_MMA_STAGE;
    const int     stride = ccq2_mma_scale_stride(a.groups);
    {
        const char *   from = (lane < 16 ? rows.half[0] : rows.half[1]) + lane % 16 * rows.size + sizeof(ccq_row_header) +
                              a.groups * CCQ2_MMA_CHUNK;
        const uint32_t to   = ggml_cuda_cvta_generic_to_shared(scales + lane * stride);
        for (int i = 0; i < a.groups / 2; i += CCQ2_MMA_CHUNK) {
            cp_async_cg_16<0>(to + i, from + i);
        }
    }
    for (int s = 0; s < CCQ2_MMA_STAGES - 1; ++s) {
        ring.copy(rows.size, a.groups - s * CCQ2_MMA_GROUPS);
    }

    uint32_t M[4], Z[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        const uint4 h = ccq2_header(rows.of_lane(m));
        M[m]          = h.x;
        Z[m]          = h.y;
    }
    ccq2_mma_lane_columns<N> columns;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int col    = n * 8 + lane / 4;
        const int row    = ccq2_mma_row_of_y(a, pairs[col < ncols ? col : 0]);
        columns.y[n]     = (const char *) a.in.y + ((size_t) row * a.groups * 8 + lane % 4) * sizeof(uint4);
        columns.begin[n] = begin + n * a.groups * columns.begin_size + lane % 4 * sizeof(float4);
    }

    float sum[2][N][4] = {};
    for (int g0 = 0; g0 < a.groups; g0 += CCQ2_MMA_GROUPS) {
        ccq2_mma_wait_copies<CCQ2_MMA_STAGES - 2>();
        __syncwarp();
        ring.copy(rows.size, a.groups - g0 - (CCQ2_MMA_STAGES - 1) * CCQ2_MMA_GROUPS);
#pragma unroll
        for (int four = 0; four < CCQ2_MMA_GROUPS; four += 4) {
            if (four > 0 && g0 + four >= a.groups) {
                break;
            }
            uint32_t of_four[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                of_four[m] = *(const uint16_t *) (scales + (m * 8 + lane / 4) * stride + (g0 + four) / 2);
            }
#pragma unroll
            for (int g = 0; g < 4; ++g) {
                uint32_t codes[4];
                ring.load(four + g, codes);
                float scale[4];
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    scale[m] = ccq2_mma_scale(of_four[m], g);
                }
                ccq2_mma_group<N>(codes, M, Z, scale, columns, four + g, sum);
            }
        }
        ring.read = ring.after(ring.read);
        columns.next_stage();
    }
    ccq2_mma_write<N, has_gate>(a, rows, row0, expert, pairs, ncols, sum);
}
#endif  // CP_ASYNC_AVAILABLE

// blocks per multiprocessor that the registers are for
static constexpr int ccq2_mma_blocks(const int N) {
    return N == 1 ? 4 : 3;
}

// up to 8 N columns at once
template <int N, bool has_gate>
static __global__ void __launch_bounds__(CCQ2_MMA_WARPS * WARP_SIZE, ccq2_mma_blocks(N)) ccq2_mma(const ccq2_mma_args a) {
#ifdef CP_ASYNC_AVAILABLE
    extern __shared__ __align__(128) char memory[];

    ggml_cuda_pdl_sync();
    const int warp   = threadIdx.x / WARP_SIZE;
    const int expert = blockIdx.y;
    const int first  = a.in.bounds[expert] + blockIdx.x % a.passes * (8 * N);
    const int ncols  = min(a.in.bounds[expert + 1] - first, 8 * N);
    ggml_cuda_pdl_lc();
    if (ncols <= 0) {
        return;
    }
    char * begin = memory + CCQ2_MMA_WARPS * ccq2_mma_warp_size(a.groups);
    ccq2_mma_copy_offsets<N>(a, a.in.pairs + first, ncols, (float *) begin);
    __syncthreads();

    // the last rows may be done twice
    constexpr int rows = has_gate ? CCQ2_MMA_ROWS / 2 : CCQ2_MMA_ROWS;
    const int     row  = (blockIdx.x / a.passes * CCQ2_MMA_WARPS + warp) * rows;
    if (row >= a.nrows) {
        return;
    }
    char * mine = memory + warp * ccq2_mma_warp_size(a.groups);
    if (N > 1 && ncols <= 8) {
        ccq2_mma_tile<1, has_gate>(a, min(row, a.nrows - rows), expert, a.in.pairs + first, ncols, mine, begin);
    } else {
        ccq2_mma_tile<N, has_gate>(a, min(row, a.nrows - rows), expert, a.in.pairs + first, ncols, mine, begin);
    }
#else
    GGML_UNUSED(a);
    NO_DEVICE_CODE;
#endif  // CP_ASYNC_AVAILABLE
}

static size_t ccq2_mma_shared_size(const int N, const int groups) {
    return CCQ2_MMA_WARPS * ccq2_mma_warp_size(groups) + (size_t) N * groups * 4 * sizeof(float4);
}

template <int N, bool has_gate>
static void ccq2_mma_launch(ccq2_mma_args a, const int tokens, const int experts, cudaStream_t stream) {
    const size_t shared = ccq2_mma_shared_size(N, a.groups);
    CUDA_SET_SHARED_MEMORY_LIMIT((ccq2_mma<N, has_gate>), ggml_cuda_info().devices[ggml_cuda_get_device()].smpbo);

    constexpr int rows = CCQ2_MMA_WARPS * (has_gate ? CCQ2_MMA_ROWS / 2 : CCQ2_MMA_ROWS);
    a.passes           = (tokens + 8 * N - 1) / (8 * N);
    const dim3 blocks((a.nrows + rows - 1) / rows * a.passes, experts, 1);

    const ggml_cuda_kernel_launch_params params = { blocks, dim3(CCQ2_MMA_WARPS * WARP_SIZE, 1, 1), shared, stream };
    ggml_cuda_kernel_launch(ccq2_mma<N, has_gate>, params, a);
}

// ---------------------------------------------------------------------------------------------------------------------

bool ggml_cuda_should_use_mma_ccq2(const ggml_tensor * src0,
                                   const ggml_tensor * src1,
                                   const ggml_tensor * ids,
                                   const ggml_tensor * dst) {
    const auto & device = ggml_cuda_info().devices[ggml_cuda_get_device()];
    if (src0->type != GGML_TYPE_CCQ2 || !ids || !GGML_CUDA_CC_IS_NVIDIA(device.cc) || !cp_async_available(device.cc)) {
        return false;
    }
    // one block on a multiprocessor would leave it idle; 1 KB of each is CUDA's
    const size_t shared =
        std::max(ccq2_mma_shared_size(1, src0->ne[0] / CCQ_GROUP), ccq2_mma_shared_size(2, src0->ne[0] / CCQ_GROUP));
    if (src0->ne[1] < CCQ2_MMA_ROWS || src0->ne[3] != 1 || 2 * (shared + 1024) > device.smpbo + 1024) {
        return false;
    }
    // activations are loaded 16 bytes at once
    if ((uintptr_t) src1->data % 16 != 0 || src1->nb[1] % 16 != 0 || src1->nb[2] % 16 != 0) {
        return false;
    }
    if (src1->ne[1] != 1 && src1->ne[1] != dst->ne[1]) {
        return false;
    }
    // Fewer tokens seldom meet on an expert, so the kernel for single tokens loses nothing (H200: 262 and 286 microseconds
    // with 4 tokens and 8 of 64 experts, 416 and 373 with 6). More are the business of MMQ (1828 and 1324 with 128 tokens,
    // 2414 and 2287 with 256). GeForce cards add halves up as floats at half the speed: there the limit is an estimate.
    const int64_t pairs   = dst->ne[2] * dst->ne[1];
    const int64_t experts = src0->ne[2];
    const bool    full_rate =
        device.cc == GGML_CUDA_CC_AMPERE || (device.cc >= GGML_CUDA_CC_HOPPER && device.cc < GGML_CUDA_CC_BLACKWELL);
    return 4 * pairs >= 3 * experts && pairs <= (full_rate ? 32 : 8) * experts;
}

void ggml_cuda_mul_mat_mma_ccq2(ggml_backend_cuda_context &           ctx,
                                const ggml_tensor *                   src0,
                                const ggml_tensor *                   src1,
                                const ggml_tensor *                   ids,
                                ggml_tensor *                         dst,
                                const ggml_cuda_mm_fusion_args_host * fusion) {
    GGML_ASSERT(src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float));
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && dst->nb[0] == sizeof(float));
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t));

    cudaStream_t  stream  = ctx.stream();
    const int64_t k       = src0->ne[0];
    const int64_t used    = dst->ne[1];
    const int64_t tokens  = dst->ne[2];
    const int64_t experts = src0->ne[2];
    const int64_t rows    = src1->ne[1] * tokens;

    ggml_cuda_pool_alloc<half>    y(ctx.pool(), rows * k);
    ggml_cuda_pool_alloc<float>   offset(ctx.pool(), rows * (k / CCQ_GROUP));
    ggml_cuda_pool_alloc<float>   scale(ctx.pool(), rows);
    ggml_cuda_pool_alloc<int32_t> pairs(ctx.pool(), tokens * used);
    ggml_cuda_pool_alloc<int32_t> bounds(ctx.pool(), experts + 1);
    const ccq2_mma_columns        columns = { y.get(), offset.get(), scale.get(), pairs.get(), bounds.get() };

    ccq2_mma_prepare_args p                     = {};
    p.y                                         = (const float *) src1->data;
    p.ids                                       = (const int32_t *) ids->data;
    p.out                                       = columns;
    p.k                                         = k;
    p.ne11                                      = src1->ne[1];
    p.rows                                      = rows;
    p.sy1                                       = src1->nb[1] / sizeof(float);
    p.sy2                                       = src1->nb[2] / sizeof(float);
    p.pairs                                     = tokens * used;
    p.used                                      = used;
    p.ids_stride                                = ids->nb[1] / sizeof(int32_t);
    p.experts                                   = experts;
    const ggml_cuda_kernel_launch_params params = { dim3(rows + experts, 1, 1), dim3(CCQ2_MMA_PREPARE_THREADS, 1, 1),
                                                    (size_t) 0, stream };
    ggml_cuda_kernel_launch(ccq2_mma_prepare, params, p);

    ccq2_mma_args a = {};
    a.x             = (const char *) src0->data;
    a.in            = columns;
    a.dst           = (float *) dst->data;
    a.groups        = k / CCQ_GROUP;
    a.nrows         = src0->ne[1];
    a.row_size      = src0->nb[1];
    a.nb02          = src0->nb[2];
    a.used          = used;
    a.shared        = src1->ne[1] == 1;
    a.s1            = dst->nb[1] / sizeof(float);
    a.s2            = dst->nb[2] / sizeof(float);
    if (fusion) {
        GGML_ASSERT(!fusion->x_scale && !fusion->gate_scale && !fusion->shared_up);
        GGML_ASSERT(!fusion->gate || (fusion->gate->type == src0->type && ggml_are_same_stride(fusion->gate, src0)));
        a.gate      = fusion->gate ? (const char *) fusion->gate->data : nullptr;
        a.x_bias    = fusion->x_bias ? (const float *) fusion->x_bias->data : nullptr;
        a.gate_bias = fusion->gate_bias ? (const float *) fusion->gate_bias->data : nullptr;
        a.glu_op    = fusion->glu_op;
        a.glu_limit = fusion->glu_limit;
    }
    // more than eight columns at once cost registers: where most experts have fewer, two passes are better
    if (2 * tokens * used <= 8 * experts) {
        a.gate ? ccq2_mma_launch<1, true>(a, tokens, experts, stream) : ccq2_mma_launch<1, false>(a, tokens, experts, stream);
    } else {
        a.gate ? ccq2_mma_launch<2, true>(a, tokens, experts, stream) : ccq2_mma_launch<2, false>(a, tokens, experts, stream);
    }
}
