// MUL_MAT and MUL_MAT_ID of the CPU backend (panels.cpp where the machine has it) against its reference path, which is one
// dot product per row and column: shapes that fill no panel, experts without a token, 1, 2 and 3 threads.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct cpu_backend {
    ggml_backend_ptr backend{ ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };

    template <typename F> F function(const char * name) const {
        void * address =
            ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get())), name);
        GGML_ASSERT(address);
        return (F) address;
    }

    void set_threads(int n) const { function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend.get(), n); }

    void set_reference(bool use) const {
        function<void (*)(ggml_backend_t, bool)>("ggml_backend_cpu_set_use_ref")(backend.get(), use);
    }
};

struct problem {
    ggml_type type;
    int64_t   k, rows, columns;
    int64_t   experts, used;  // 0: MUL_MAT

    std::string name() const {
        char text[128];
        snprintf(text, sizeof(text), "%s k=%d rows=%d columns=%d experts=%d used=%d", ggml_type_name(type), (int) k, (int) rows,
                 (int) columns, (int) experts, (int) used);
        return text;
    }
};

// 16 rows of k weights, to be repeated: to quantize takes longer than to multiply
static std::vector<uint8_t> some_rows(ggml_type type, int64_t k, std::mt19937 & random) {
    const int64_t                   n = 16;
    std::normal_distribution<float> normal;
    std::vector<float>              rows(k * n);
    std::generate(rows.begin(), rows.end(), [&] { return normal(random); });
    std::vector<uint8_t> quantized(ggml_row_size(type, k) * n);
    ggml_quantize_chunk(type, rows.data(), quantized.data(), 0, n, k, nullptr);
    return quantized;
}

// Activations of any size, all zero in some blocks, that quantize alike however products are rounded: integers below
// 127 and up to 0.4, times a scale, and the largest 127. Nearer to a half, FMA decides: on ARM gcc makes one of the
// reference's product and rounding, and one step in an activation is an error of 1e-8.
static std::vector<float> some_activations(int64_t n, std::mt19937 & random) {
    std::uniform_int_distribution<int>    integer(-126, 126);
    std::uniform_real_distribution<float> rest(-0.4f, 0.4f);
    std::uniform_real_distribution<float> scale(0.01f, 1.0f);
    std::vector<float>                    x(n);
    float                                 block_scale = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        if (i % 256 == 0) {
            block_scale = i / 256 % 7 == 3 ? 0.0f : scale(random);
        }
        x[i] = block_scale * (i % 32 == 5 ? 127.0f : integer(random) + rest(random));
    }
    return x;
}

// weights, activations, ids that leave some experts out
struct inputs {
    std::vector<uint8_t> weights;
    std::vector<float>   activations;
    std::vector<int32_t> ids;

    inputs(const problem & p, const std::vector<uint8_t> & rows, std::mt19937 & random)
        : weights(ggml_row_size(p.type, p.k) * p.rows * std::max<int64_t>(1, p.experts)),
          activations(some_activations(p.k * p.columns * std::max<int64_t>(1, p.used), random)) {
        for (size_t i = 0; i < weights.size(); ++i) {
            weights[i] = rows[i % rows.size()];
        }
        for (int64_t token = 0; token < p.columns; ++token) {
            for (int64_t slot = 0; slot < p.used; ++slot) {
                ids.push_back((int32_t) ((token * 3 + slot) % std::max<int64_t>(p.used, p.experts - 1)));
            }
        }
    }
};

static std::vector<float> compute(const cpu_backend & cpu, const problem & p, const inputs & in) {
    ggml_init_params params = { 16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx(ggml_init(params));

    ggml_tensor * a     = p.experts ? ggml_new_tensor_3d(ctx.get(), p.type, p.k, p.rows, p.experts) :
                                      ggml_new_tensor_2d(ctx.get(), p.type, p.k, p.rows);
    ggml_tensor * b     = p.experts ? ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, p.k, p.used, p.columns) :
                                      ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, p.k, p.columns);
    ggml_tensor * ids   = p.experts ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, p.used, p.columns) : nullptr;
    ggml_tensor * out   = p.experts ? ggml_mul_mat_id(ctx.get(), a, b, ids) : ggml_mul_mat(ctx.get(), a, b);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, out);

    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), cpu.backend.get()));
    ggml_backend_tensor_set(a, in.weights.data(), 0, in.weights.size());
    ggml_backend_tensor_set(b, in.activations.data(), 0, in.activations.size() * sizeof(float));
    if (ids) {
        ggml_backend_tensor_set(ids, in.ids.data(), 0, in.ids.size() * sizeof(int32_t));
    }
    GGML_ASSERT(ggml_backend_graph_compute(cpu.backend.get(), graph) == GGML_STATUS_SUCCESS);

    std::vector<float> result(ggml_nelements(out));
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    return result;
}

static bool check(const cpu_backend & cpu, const problem & p, const inputs & in) {
    cpu.set_threads(1);
    cpu.set_reference(true);
    const std::vector<float> expected = compute(cpu, p, in);
    cpu.set_reference(false);
    const std::vector<float> found = compute(cpu, p, in);

    double error = 0.0;
    double size  = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        error += (expected[i] - found[i]) * (double) (expected[i] - found[i]);
        size += expected[i] * (double) expected[i];
    }
    if (!(error <= 1e-9 * size)) {
        printf("%s: normalized error %g\n", p.name().c_str(), error / size);
        return false;
    }
    for (int threads = 2; threads <= 3; ++threads) {
        cpu.set_threads(threads);
        if (compute(cpu, p, in) != found) {
            printf("%s: %d threads give another result than 1\n", p.name().c_str(), threads);
            return false;
        }
    }
    return true;
}

int main() {
    ggml_backend_load_all();
    const cpu_backend cpu;
    std::mt19937      random(1);

    int done   = 0;
    int failed = 0;
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_CCQ2 }) {
        for (int64_t k : { 32, 96, 256, 768, 1280, 2304 }) {
            if (k % ggml_blck_size(type) != 0) {
                continue;
            }
            const std::vector<uint8_t> weights = some_rows(type, k, random);
            for (int64_t rows : { 1, 15, 16, 67 }) {
                for (int64_t columns : { 1, 2, 3, 4, 8, 9, 15, 131 }) {
                    for (int64_t used : { 0, 3 }) {
                        const problem p = { type, k, rows, columns, used ? 5 : 0, used };
                        failed += !check(cpu, p, inputs(p, weights, random));
                        done += 1;
                    }
                }
            }
        }
    }
    printf("%d of %d products differ\n", failed, done);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
