// One token against a matrix of q8_0 or q4_0 is as fast as memory if enough bytes are under way. Blocks of 34 or 18 bytes
// make small, crooked loads, and the loads of a short-lived block of threads begin anew with each row. Here every warp
// has rows of its own and a ring in shared memory that bulk copies fill: the copies cost no registers, run ahead over the
// ends of rows, and begin before the kernel that makes the activations has ended. The activations are quantized by each
// block of threads for itself, so that no kernel does it in between.
#include "mmv-stream.cuh"

#include "mmv-glu.cuh"

#include <algorithm>

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
#define STREAM_AVAILABLE
#endif  // !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER

static constexpr int STREAM_WARPS  = 8;
static constexpr int STREAM_BLOCKS = 2;  // per multiprocessor
static constexpr int STREAM_STAGES = 8;  // of a warp's ring

// A stage of the ring holds `lane_blocks` quantized blocks for each lane of the warp.
template <ggml_type type> struct stream_type;

template <> struct stream_type<GGML_TYPE_Q8_0> {
    static constexpr int block_size  = sizeof(block_q8_0);
    static constexpr int lane_blocks = 1;
    static constexpr int words       = 8;  // 32-bit words of quants
};

template <> struct stream_type<GGML_TYPE_Q4_0> {
    static constexpr int block_size  = sizeof(block_q4_0);
    static constexpr int lane_blocks = 2;
    static constexpr int words       = 4;
};

template <ggml_type type>
static constexpr int stream_stage_size = WARP_SIZE * stream_type<type>::lane_blocks * stream_type<type>::block_size;

struct stream_matrix {
    const char * x;
    float *      dst;
    int          nrows;
};

struct stream_args {
    stream_matrix   m[STREAM_MATRICES];  // with the same y, one after the other; unused ones have no rows
    const char *    gate;                // of the same shape as the only matrix, or null
    const float *   y;
    const int32_t * ids;        // or null
    const float *   x_bias;     // or null
    const float *   gate_bias;  // or null
    ggml_glu_op     glu_op;
    float           glu_limit;
    bool            early;  // x and gate are there before the kernels that run now

    int     nblocks;  // per row
    int     nrows;    // of all matrices
    size_t  nb02;
    int64_t sy1, s1;  // floats from slot to slot of y (0 if they share it) and of dst
};

// of the activations in shared memory: int8, a scale and a sum
static constexpr size_t STREAM_Y_SIZE = 32 + 2 * sizeof(float);  // per block of 32

#ifdef STREAM_AVAILABLE
// Where row r of all matrices lies: its own number in its matrix.
struct stream_row {
    const char * x;
    float *      dst;
    int          row;
};

static __device__ __forceinline__ stream_row stream_locate(const stream_args & a, const int r) {
    stream_row out = { a.m[0].x, a.m[0].dst, r };
#pragma unroll
    for (int i = 1; i < STREAM_MATRICES; ++i) {
        if (out.row < a.m[i - 1].nrows) {
            break;
        }
        out = { a.m[i].x, a.m[i].dst, out.row - a.m[i - 1].nrows };
    }
    return out;
}

// Activations in shared memory: int8 with a scale and a sum per 32. The two halves of a block lie in two arrays, so that
// lanes that work on neighbouring blocks read neighbouring 16 bytes.
struct stream_y {
    int4 *  q;  // [2][nblocks]
    float * d;
    float * sum;
};

static __device__ __forceinline__ stream_y stream_y_at(char * shared, const int nblocks) {
    return { (int4 *) shared, (float *) (shared + 32 * nblocks), (float *) (shared + 36 * nblocks) };
}

static __device__ __forceinline__ void stream_quantize(const float * x, const stream_y & y, const int nblocks) {
    const int quarter = threadIdx.x % 4;  // of the block that four lanes quantize
    for (int b = threadIdx.x / 4; b < nblocks; b += STREAM_WARPS * WARP_SIZE / 4) {
        const float4 * from = (const float4 *) (x + b * 32 + quarter * 8);
        const float4   lo   = from[0];
        const float4   hi   = from[1];
        const float    v[8] = { lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w };
        float          amax = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            amax = fmaxf(amax, fabsf(v[i]));
        }
        amax            = warp_reduce_max<4>(amax);
        const float inv = amax > 0.0f ? 127.0f / amax : 0.0f;
        char        q[8];
        float       sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            q[i] = (char) __float2int_rn(v[i] * inv);
            sum += q[i];
        }
        sum        = warp_reduce_sum<4>(sum);
        char4 * to = (char4 *) (y.q + quarter / 2 * nblocks + b) + quarter % 2 * 2;
        to[0]      = make_char4(q[0], q[1], q[2], q[3]);
        to[1]      = make_char4(q[4], q[5], q[6], q[7]);
        if (quarter == 0) {
            y.d[b]   = amax / 127.0f;
            y.sum[b] = sum;
        }
    }
}

// One block of weights times its activations. `block` lies in shared memory at an even address: the 32-bit words that
// hold it begin with its scale, or two bytes before it.
template <ggml_type type>
static __device__ __forceinline__ float stream_dot(const char * block, const stream_y & y, const int b, const int nblocks) {
    const int        odd  = (uintptr_t) block % 4 != 0;
    const uint32_t * w    = (const uint32_t *) (block - 2 * odd);
    const int4       lo   = y.q[b];
    const int4       hi   = y.q[nblocks + b];
    const int        v[8] = { lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w };

    uint32_t    word = w[0];
    const float d    = __half2float(__ushort_as_half((unsigned short) (word >> (16 * odd))));
    int         sum  = 0;
#pragma unroll
    for (int i = 0; i < stream_type<type>::words; ++i) {
        const uint32_t next = w[i + 1];
        const int      q    = (int) __funnelshift_rc(word, next, odd ? 32 : 16);
        word                = next;
        if constexpr (type == GGML_TYPE_Q8_0) {
            sum = ggml_cuda_dp4a(q, v[i], sum);
        } else {
            sum = ggml_cuda_dp4a(q & 0x0f0f0f0f, v[i], sum);
            sum = ggml_cuda_dp4a((q >> 4) & 0x0f0f0f0f, v[i + 4], sum);
        }
    }
    if constexpr (type == GGML_TYPE_Q4_0) {
        return d * y.d[b] * ((float) sum - 8.0f * y.sum[b]);
    }
    return d * y.d[b] * (float) sum;
}

static __device__ __forceinline__ uint32_t stream_shared_address(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void stream_barrier_init(uint64_t * barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(stream_shared_address(barrier)) : "memory");
}

// Copy to shared memory; the barrier's phase ends when all bytes are there.
static __device__ __forceinline__ void stream_copy(char * to, const char * from, const int nbytes, uint64_t * barrier) {
    const uint32_t b = stream_shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(nbytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     stream_shared_address(to)),
                 "l"(from), "r"(nbytes), "r"(b)
                 : "memory");
}

static __device__ __forceinline__ void stream_wait(uint64_t * barrier, const uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "WAIT_%=:\n"
                 "mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                 "@!p bra WAIT_%=;\n"
                 "}\n" ::"r"(stream_shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}
#endif  // STREAM_AVAILABLE

template <ggml_type type, bool has_gate>
static __global__ void __launch_bounds__(STREAM_WARPS * WARP_SIZE, STREAM_BLOCKS) stream_mul_mat_vec(const stream_args a) {
#ifdef STREAM_AVAILABLE
    constexpr int     matrices     = has_gate ? 2 : 1;
    constexpr int     block_size   = stream_type<type>::block_size;
    constexpr int     stage_blocks = WARP_SIZE * stream_type<type>::lane_blocks;
    constexpr int     stage_size   = stream_stage_size<type>;
    extern __shared__ __align__(128) char shared[];  // rings, activations, barriers

    const int      warp     = threadIdx.x / WARP_SIZE;
    const int      lane     = threadIdx.x % WARP_SIZE;
    char *         ring     = shared + warp * STREAM_STAGES * stage_size;
    char *         y_shared = shared + STREAM_WARPS * STREAM_STAGES * stage_size;
    const stream_y y        = stream_y_at(y_shared, a.nblocks);
    uint64_t *     barriers = (uint64_t *) (y_shared + a.nblocks * STREAM_Y_SIZE) + warp * STREAM_STAGES;

    // An item is one stage: of a row, of x and then gate. The rows of a block of threads go to its warps in turn.
    const int    row_items = (a.nblocks + stage_blocks - 1) / stage_blocks;
    const size_t row_size  = (size_t) a.nblocks * block_size;
    const int    first     = (int64_t) a.nrows * blockIdx.x / gridDim.x + warp;
    const int    end       = (int64_t) a.nrows * (blockIdx.x + 1) / gridDim.x;
    const int    items     = max(0, (end - first + STREAM_WARPS - 1) / STREAM_WARPS) * matrices * row_items;

    size_t     channel   = 0;      // bytes
    int        row       = first;  // of the next item to copy, as are the next two
    int        matrix    = 0;
    int        part      = 0;
    const auto copy_next = [&](const int stage) {
        const int        begin  = part * stage_blocks;
        const stream_row at     = stream_locate(a, row);
        const char *     from   = (matrix == 0 ? at.x : a.gate) + channel + at.row * row_size + begin * block_size;
        const int        nbytes = min(stage_blocks, a.nblocks - begin) * block_size;
        stream_copy(ring + stage * stage_size, from, nbytes, barriers + stage);
        if (++part == row_items) {
            part = 0;
            if (++matrix == matrices) {
                matrix = 0;
                row += STREAM_WARPS;
            }
        }
    };

    if (lane == 0) {
        for (int s = 0; s < STREAM_STAGES; ++s) {
            stream_barrier_init(barriers + s);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (!a.early) {
        ggml_cuda_pdl_sync();
        channel = a.ids ? a.ids[blockIdx.y] * a.nb02 : 0;
    }
    if (lane == 0) {
        for (int s = 0; s < min(STREAM_STAGES, items); ++s) {
            copy_next(s);
        }
    }
    if (a.early) {
        ggml_cuda_pdl_sync();
    }
    stream_quantize(a.y + blockIdx.y * a.sy1, y, a.nblocks);
    __syncthreads();
    ggml_cuda_pdl_lc();

    int      stage  = 0;
    uint32_t parity = 0;
    int      copied = STREAM_STAGES;  // items
    for (int r = first; r < end; r += STREAM_WARPS) {
        float total[matrices];
#pragma unroll
        for (int m = 0; m < matrices; ++m) {
            float sum = 0.0f;
            for (int begin = 0; begin < a.nblocks; begin += stage_blocks) {
                stream_wait(barriers + stage, parity);
#pragma unroll
                for (int i = 0; i < stream_type<type>::lane_blocks; ++i) {
                    const int block = i * WARP_SIZE + lane;
                    if (begin + block < a.nblocks) {
                        sum += stream_dot<type>(ring + stage * stage_size + block * block_size, y, begin + block, a.nblocks);
                    }
                }
                __syncwarp();
                if (copied < items) {
                    if (lane == 0) {
                        copy_next(stage);
                    }
                    ++copied;
                }
                if (++stage == STREAM_STAGES) {
                    stage = 0;
                    parity ^= 1;
                }
            }
            total[m] = warp_reduce_sum(sum);
        }
        if (lane == 0) {
            const size_t bias   = (a.ids ? a.ids[blockIdx.y] * a.s1 : 0) + r;
            float        result = total[0];
            if (a.x_bias) {
                result += a.x_bias[bias];
            }
            if (has_gate) {
                const float gate = total[matrices - 1] + (a.gate_bias ? a.gate_bias[bias] : 0.0f);
                result           = ggml_cuda_mmv_glu(a.glu_op, a.glu_limit, result, gate);
            }
            const stream_row at                = stream_locate(a, r);
            at.dst[blockIdx.y * a.s1 + at.row] = result;
        }
    }
#else
    GGML_UNUSED(a);
    NO_DEVICE_CODE;
#endif  // STREAM_AVAILABLE
}

static size_t stream_shared_size(const ggml_type type, const int64_t nblocks) {
    const int stage = type == GGML_TYPE_Q8_0 ? stream_stage_size<GGML_TYPE_Q8_0> : stream_stage_size<GGML_TYPE_Q4_0>;
    return STREAM_WARPS * STREAM_STAGES * (stage + sizeof(uint64_t)) + nblocks * STREAM_Y_SIZE;
}

bool ggml_cuda_can_stream_mul_mat_vec(const ggml_tensor *                   src0,
                                      const ggml_tensor *                   src1,
                                      const ggml_tensor *                   ids,
                                      const ggml_tensor *                   dst,
                                      const ggml_cuda_mm_fusion_args_host * fusion) {
    const auto & device = ggml_cuda_info().devices[ggml_cuda_get_device()];
    if (!GGML_CUDA_CC_IS_NVIDIA(device.cc) || ggml_cuda_highest_compiled_arch(device.cc) < GGML_CUDA_CC_HOPPER) {
        return false;
    }
    if (src0->type != GGML_TYPE_Q8_0 && src0->type != GGML_TYPE_Q4_0) {
        return false;
    }
    // bulk copies move multiples of 16 bytes from and to addresses that are such
    const size_t row_size = ggml_row_size(src0->type, src0->ne[0]);
    const auto   aligned  = [](const ggml_tensor * t) { return (uintptr_t) t->data % 16 == 0 && t->nb[2] % 16 == 0; };
    if (row_size % 16 != 0 || src0->nb[1] != row_size || !aligned(src0) || (fusion && fusion->gate && !aligned(fusion->gate))) {
        return false;
    }
    if (!aligned(src1) || src1->nb[1] % 16 != 0 || src1->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float)) {
        return false;
    }
    // the scales of experts are for types that this is not
    if (fusion && (fusion->x_scale || fusion->gate_scale)) {
        return false;
    }
    const bool one_token = ids ? dst->ne[2] == 1 && dst->ne[3] == 1 && (src1->ne[1] == 1 || src1->ne[1] == dst->ne[1]) :
                                 dst->ne[1] == 1 && dst->ne[2] == 1 && dst->ne[3] == 1 && src0->ne[2] == 1 && src0->ne[3] == 1;
    return one_token && stream_shared_size(src0->type, src0->ne[0] / 32) <= device.smpbo;
}

template <ggml_type type, bool has_gate>
static void stream_launch(const stream_args & a, const int slots, const size_t shared, cudaStream_t stream) {
    const auto & device = ggml_cuda_info().devices[ggml_cuda_get_device()];
    CUDA_SET_SHARED_MEMORY_LIMIT((stream_mul_mat_vec<type, has_gate>), device.smpbo);

    int blocks_per_sm = 1;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, stream_mul_mat_vec<type, has_gate>,
                                                             STREAM_WARPS * WARP_SIZE, shared));
    const int                            share = std::max(1, device.nsm * blocks_per_sm / slots);
    const dim3                           blocks(std::min(share, (a.nrows + STREAM_WARPS - 1) / STREAM_WARPS), slots, 1);
    const ggml_cuda_kernel_launch_params params = { blocks, dim3(STREAM_WARPS * WARP_SIZE, 1, 1), shared, stream };
    ggml_cuda_kernel_launch(stream_mul_mat_vec<type, has_gate>, params, a);
}

static void stream_switch(const stream_args & a, const ggml_type type, const int slots, cudaStream_t stream) {
    const size_t shared = stream_shared_size(type, a.nblocks);
    if (type == GGML_TYPE_Q8_0) {
        return a.gate ? stream_launch<GGML_TYPE_Q8_0, true>(a, slots, shared, stream) :
                        stream_launch<GGML_TYPE_Q8_0, false>(a, slots, shared, stream);
    }
    return a.gate ? stream_launch<GGML_TYPE_Q4_0, true>(a, slots, shared, stream) :
                    stream_launch<GGML_TYPE_Q4_0, false>(a, slots, shared, stream);
}

static stream_args stream_args_of(const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    GGML_ASSERT(src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32);

    stream_args a = {};
    a.m[0]        = { (const char *) src0->data, (float *) dst->data, (int) src0->ne[1] };
    a.y           = (const float *) src1->data;
    a.early       = ggml_backend_buffer_get_usage(src0->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
    a.nblocks     = src0->ne[0] / ggml_blck_size(src0->type);
    a.nrows       = src0->ne[1];
    a.nb02        = src0->nb[2];
    a.s1          = dst->nb[1] / sizeof(float);
    return a;
}

void ggml_cuda_stream_mul_mat_vec(ggml_backend_cuda_context &           ctx,
                                  const ggml_tensor *                   src0,
                                  const ggml_tensor *                   src1,
                                  const ggml_tensor *                   ids,
                                  ggml_tensor *                         dst,
                                  const ggml_cuda_mm_fusion_args_host * fusion) {
    GGML_ASSERT(!ids || (ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t)));

    stream_args a = stream_args_of(src0, src1, dst);
    if (ids) {
        a.ids   = (const int32_t *) ids->data;
        a.early = false;  // which weights they are is an outcome
        a.sy1   = src1->ne[1] > 1 ? src1->nb[1] / sizeof(float) : 0;
    }
    if (fusion) {
        GGML_ASSERT(!fusion->gate || (fusion->gate->type == src0->type && ggml_are_same_stride(fusion->gate, src0)));
        a.gate      = fusion->gate ? (const char *) fusion->gate->data : nullptr;
        a.x_bias    = fusion->x_bias ? (const float *) fusion->x_bias->data : nullptr;
        a.gate_bias = fusion->gate_bias ? (const float *) fusion->gate_bias->data : nullptr;
        a.glu_op    = fusion->glu_op;
        a.glu_limit = fusion->glu_limit;
    }
    stream_switch(a, src0->type, ids ? dst->ne[1] : 1, ctx.stream());
}

// Queries, keys and values of one token are three products with the same activations, of which two are so small that
// starting them costs as much as doing them.
int ggml_cuda_stream_siblings(const ggml_cgraph * cgraph, const int node_idx, int * siblings) {
    constexpr int       window = 24;  // nodes: rotary, views and cache rotations lie in between
    const ggml_tensor * first  = cgraph->nodes[node_idx];
    const auto          fits   = [&](const ggml_tensor * node) {
        return node->op == GGML_OP_MUL_MAT && (node->flags & GGML_TENSOR_FLAG_COMPUTE) && node->src[1] == first->src[1] &&
               node->src[0]->type == first->src[0]->type && node->src[0]->ne[0] == first->src[0]->ne[0] &&
               ggml_cuda_can_stream_mul_mat_vec(node->src[0], node->src[1], nullptr, node, nullptr);
    };
    int count = 0;
    if (!fits(first)) {
        return count;
    }
    for (int i = node_idx + 1; i < std::min(cgraph->n_nodes, node_idx + window) && count < STREAM_MATRICES - 1; ++i) {
        if (fits(cgraph->nodes[i])) {
            siblings[count++] = i;
        }
    }
    return count;
}

// whether the result of node `later` can be written when node `now` is computed: nothing in between uses its memory
static bool stream_can_be_early(const ggml_cgraph * cgraph, const int now, const int later) {
    const char * begin    = (const char *) cgraph->nodes[later]->data;
    const char * end      = begin + ggml_nbytes(cgraph->nodes[later]);
    const auto   overlaps = [&](const ggml_tensor * t) {
        return t && (const char *) t->data < end && begin < (const char *) t->data + ggml_nbytes(t);
    };
    for (int i = now; i < later; ++i) {
        const ggml_tensor * node = cgraph->nodes[i];
        if (overlaps(node) || std::any_of(node->src, node->src + GGML_MAX_SRC, overlaps)) {
            return false;
        }
    }
    return true;
}

int ggml_cuda_stream_mul_mats_vec(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph, const int node_idx, int * done) {
    int           siblings[STREAM_MATRICES];
    const int     found = ggml_cuda_stream_siblings(cgraph, node_idx, siblings);
    ggml_tensor * first = cgraph->nodes[node_idx];
    if (found == 0) {
        return 0;
    }
    stream_args a     = stream_args_of(first->src[0], first->src[1], first);
    int         count = 0;
    for (int i = 0; i < found; ++i) {
        if (stream_can_be_early(cgraph, node_idx, siblings[i])) {
            ggml_tensor *     node = cgraph->nodes[siblings[i]];
            const stream_args b    = stream_args_of(node->src[0], node->src[1], node);
            done[count++]          = siblings[i];
            a.m[count]             = b.m[0];
            a.nrows += b.nrows;
            a.early = a.early && b.early;
        }
    }
    if (count > 0) {
        stream_switch(a, first->src[0]->type, 1, ctx.stream());
    }
    return count;
}
