// Bandwidth of the ccq2 matrix-vector kernel alone, against a bare read of the same bytes in the same run.
//
// One token, 8 of 64 experts, the two expert shapes of the 300B; every launch reads other experts, so that no cache
// holds them. Build in a patched tree (no library is called, so none is linked; as a position-independent program it would
// not start):
//
//   nvcc -std=c++17 -O3 -use_fast_math -extended-lambda -arch=sm_90 -I ggml/include -I ggml/src -I ggml/src/ggml-cuda \
//        -Xlinker --unresolved-symbols=ignore-all -Xcompiler -no-pie ccq2_kernel.cu -o ccq2_kernel
#include "ccq.cu"

#include <cstdio>
#include <vector>

// what ccq.cu asks of the library
int ggml_cuda_get_device() {
    return 0;
}

const ggml_cuda_device_info & ggml_cuda_info() {
    static ggml_cuda_device_info info = {};
    if (info.device_count == 0) {
        cudaDeviceProp device;
        cudaGetDeviceProperties(&device, 0);
        info.device_count     = 1;
        info.devices[0].nsm   = device.multiProcessorCount;
        info.devices[0].smpbo = device.sharedMemPerBlockOptin;
    }
    return info;
}

static constexpr int EXPERTS = 64;
static constexpr int USED    = 8;
static constexpr int ROUNDS  = EXPERTS / USED;  // launches that read all experts once
static constexpr int REPEATS = 20;

#define CHECK(call)                                                      \
    do {                                                                 \
        const cudaError_t err = (call);                                  \
        if (err != cudaSuccess) {                                        \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(err)); \
            exit(1);                                                     \
        }                                                                \
    } while (0)

static __device__ __host__ uint32_t scramble(uint64_t i) {
    i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9ull;
    i = (i ^ (i >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t) (i >> 32);
}

static __global__ void fill(uint32_t * x, const size_t words_per_row, const size_t words, const uint64_t seed) {
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < words; i += (size_t) gridDim.x * blockDim.x) {
        const size_t column = i % words_per_row;
        x[i]                = column == 2 ? __float_as_uint(1e-3f) : column == 3 ? 0 : scramble(i + seed);
    }
}

// each block reads a contiguous piece of one expert
static __global__ void read_experts(const uint4 *   x,
                                    const int32_t * ids,
                                    const size_t    units,
                                    const int       units_per_block,
                                    float *         dst) {
    const uint4 * expert = x + ids[blockIdx.y] * units;
    const size_t  begin  = blockIdx.x * (size_t) units_per_block;
    const size_t  end    = min(begin + units_per_block, units);
    uint32_t      sum    = 0;
#pragma unroll 8
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const uint4 v = expert[i];
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345678) {
        dst[0] = 1.0f;  // keeps the loads
    }
}

template <typename launch_t> static double gigabytes_per_second(const double bytes, const launch_t & launch) {
    cudaStream_t    stream;
    cudaGraph_t     graph;
    cudaGraphExec_t exec;
    cudaEvent_t     start, stop;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int round = 0; round < ROUNDS; ++round) {
        launch(round, stream);
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(start, stream));
    for (int i = 0; i < REPEATS; ++i) {
        CHECK(cudaGraphLaunch(exec, stream));
    }
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaStreamSynchronize(stream));
    float ms = 0.0f;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    return bytes * ROUNDS * REPEATS / (ms * 1e6);
}

struct shape {
    const char * name;
    int          nrows;
    int          k;
    int          ne11;  // one activation for all experts, or one each
    bool         gate;
};

// the largest error of some rows against exact sums over the quantized activations, relative to the sum of magnitudes
static double error_of(const shape &                s,
                       const char *                 x,
                       const std::vector<float> &   y,
                       const std::vector<int32_t> & ids,
                       const std::vector<float> &   dst,
                       const size_t                 row_size) {
    double worst = 0.0;
    for (int slot = 0; slot < USED; ++slot) {
        for (int row = slot; row < s.nrows; row += s.nrows / 5) {
            std::vector<char> bytes(row_size);
            CHECK(cudaMemcpy(bytes.data(), x + (ids[slot] * (size_t) s.nrows + row) * row_size, row_size,
                             cudaMemcpyDeviceToHost));
            ccq_row_header h;
            memcpy(&h, bytes.data(), sizeof(h));
            const float * y_row = y.data() + (size_t) (slot % s.ne11) * s.k;
            double        sum = 0.0, size = 0.0;
            for (int i = 0; i < s.k; ++i) {
                const int g    = i / CCQ_GROUP;
                const int v    = ccq2_value(ccq2_code(ccq2_codes(bytes.data())[i / 4], h.M, h.Z), i % 4);
                float     amax = 0.0f;
                for (int j = 0; j < CCQ_GROUP; ++j) {
                    amax = fmaxf(amax, fabsf(y_row[g * CCQ_GROUP + j]));
                }
                const double d = amax / 127.0;
                const double w = (double) h.d * ccq2_scale(ccq2_scales(bytes.data(), s.k), g) * v;
                const double p = w * d * rint(y_row[i] / d);
                sum += p;
                size += fabs(p);
            }
            worst = fmax(worst, fabs(sum - dst[(size_t) slot * s.nrows + row]) / size);
        }
    }
    return worst;
}

static void measure(const shape & s) {
    const int    groups   = s.k / CCQ_GROUP;
    const size_t row_size = GGML_PAD(sizeof(ccq_row_header) + s.k / 256 * (CCQ2_CODE_SIZE + CCQ2_SCALE_SIZE), CCQ_ROW_ALIGN);
    const size_t matrix   = row_size * s.nrows;
    const size_t total    = matrix * EXPERTS;

    char *    x[2] = {};
    float *   input, *dst;
    int32_t * ids;
    for (int m = 0; m < (s.gate ? 2 : 1); ++m) {
        CHECK(cudaMalloc(&x[m], total));
        fill<<<4096, 256>>>((uint32_t *) x[m], row_size / 4, total / 4, m * total);
    }
    CHECK(cudaMalloc(&input, s.ne11 * s.k * sizeof(float)));
    CHECK(cudaMalloc(&dst, (size_t) USED * s.nrows * sizeof(float)));
    CHECK(cudaMalloc(&ids, EXPERTS * sizeof(int32_t)));

    std::vector<float> host_input(s.ne11 * s.k);
    for (size_t i = 0; i < host_input.size(); ++i) {
        host_input[i] = (int32_t) scramble(i) * 0x1p-31f;
    }
    std::vector<int32_t> host_ids(EXPERTS);
    for (int i = 0; i < EXPERTS; ++i) {
        host_ids[i] = i * 37 % EXPERTS;
    }
    CHECK(cudaMemcpy(input, host_input.data(), host_input.size() * sizeof(float), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(ids, host_ids.data(), EXPERTS * sizeof(int32_t), cudaMemcpyHostToDevice));

    ccq2_mmv_args a = {};
    a.x             = x[0];
    a.gate          = x[1];
    a.y             = input;
    a.dst           = dst;
    a.glu_op        = GGML_GLU_OP_SWIGLU;
    a.groups        = groups;
    a.nrows         = s.nrows;
    a.row_size      = row_size;
    a.nb02          = matrix;
    a.nb03          = total;
    a.ratio2        = 1;
    a.ratio3        = 1;
    a.ne11          = s.ne11;
    a.sy1           = s.k;
    a.sy2           = s.k * s.ne11;
    a.s1            = s.nrows;

    a.ids = ids;
    ccq2_mul_mat_vec_switch(a, 1, USED, 1, 0);
    CHECK(cudaDeviceSynchronize());
    double error = NAN;
    if (!s.gate) {
        std::vector<float> host_dst((size_t) USED * s.nrows);
        CHECK(cudaMemcpy(host_dst.data(), dst, host_dst.size() * sizeof(float), cudaMemcpyDeviceToHost));
        error = error_of(s, x[0], host_input, host_ids, host_dst, row_size);
    }

    const double bytes  = (double) matrix * USED * (s.gate ? 2 : 1);
    const double kernel = gigabytes_per_second(bytes, [&](const int round, cudaStream_t stream) {
        ccq2_mmv_args b = a;
        b.ids           = ids + round * USED;
        ccq2_mul_mat_vec_switch(b, 1, USED, 1, stream);
    });

    double best_read = 0.0;
    for (const int units_per_block : { 1024, 2048, 4096, 8192 }) {
        const double read = gigabytes_per_second(bytes, [&](const int round, cudaStream_t stream) {
            for (int m = 0; m < (s.gate ? 2 : 1); ++m) {
                const size_t units = matrix / 16;
                const dim3   blocks((units + units_per_block - 1) / units_per_block, USED);
                read_experts<<<blocks, 256, 0, stream>>>((const uint4 *) x[m], ids + round * USED, units, units_per_block, dst);
            }
        });
        best_read         = fmax(best_read, read);
    }
    printf("%-34s %6.1f MB  ccq2 %6.0f GB/s  bare read %6.0f GB/s  %5.1f %%  error %.1e\n", s.name, bytes / 1e6, kernel,
           best_read, 100.0 * kernel / best_read, error);
    for (void * each : { (void *) x[0], (void *) x[1], (void *) input, (void *) dst, (void *) ids }) {
        CHECK(cudaFree(each));
    }
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    printf("%s, one token, %d of %d experts\n", device.name, USED, EXPERTS);
    const shape shapes[] = {
        { "300B gate or up, 3584 x 8192", 3584, 8192, 1,    false },
        { "300B gate and up and swiglu",  3584, 8192, 1,    true  },
        { "300B down, 8192 x 3584",       8192, 3584, USED, false },
        { "21B gate and up and swiglu",   1536, 2560, 1,    true  },
        { "21B down, 2560 x 1536",        2560, 1536, USED, false },
    };
    for (const shape & s : shapes) {
        measure(s);
    }
    return 0;
}
