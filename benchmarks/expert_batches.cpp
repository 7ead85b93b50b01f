// Microseconds that the experts of one layer take for batches of tokens, through ggml: gate, up, SwiGLU and down.
//
// Each token takes experts at random, eight layers' choices in turn, so that the weights of a layer (1.5 GB for the 300B)
// come from memory. Beside the time stands the number of experts that a batch reads on average. Build in a patched tree
// that is built with CUDA, here in the folder `build`:
//
//   g++ -O2 -I ggml/include expert_batches.cpp -o expert_batches -L build/bin -lggml -lggml-base -Wl,-rpath,build/bin
//   ./expert_batches [TYPE [HIDDEN INNER EXPERTS USED]]      ccq2 8192 3584 64 8 unless given
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

static constexpr int LAYERS  = 8;  // that choose their experts, all with the same weights
static constexpr int REPEATS = 9;

struct layer {
    ggml_type type   = (ggml_type) 0;
    int64_t   hidden = 8192, inner = 3584, experts = 64, used = 8;
};

static ggml_type type_called(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (ggml_type_name((ggml_type) i) && !strcmp(ggml_type_name((ggml_type) i), name)) {
            return (ggml_type) i;
        }
    }
    fprintf(stderr, "no type is called %s\n", name);
    exit(1);
}

// Fill a matrix with random rows, some of which repeat: that changes no time.
static void fill(ggml_tensor * t, std::mt19937 & rng) {
    const int64_t                   rows = std::min<int64_t>(64, t->ne[1]);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float>              values(rows * t->ne[0]);
    std::vector<float>              importance(t->ne[0], 1.0f);
    std::generate(values.begin(), values.end(), [&] { return normal(rng); });
    const size_t      row_size = ggml_row_size(t->type, t->ne[0]);
    std::vector<char> bytes(row_size * t->ne[1]);
    ggml_quantize_chunk(t->type, values.data(), bytes.data(), 0, rows, t->ne[0], importance.data());
    for (int64_t row = rows; row < t->ne[1]; ++row) {
        memcpy(bytes.data() + row * row_size, bytes.data() + row % rows * row_size, row_size);
    }
    for (int64_t e = 0; e < t->ne[2]; ++e) {
        ggml_backend_tensor_set(t, bytes.data(), e * t->nb[2], bytes.size());
    }
}

static std::vector<int32_t> choose(const layer & l, const int64_t tokens, std::mt19937 & rng) {
    std::vector<int32_t> all(l.experts), ids;
    for (int64_t i = 0; i < l.experts; ++i) {
        all[i] = i;
    }
    for (int64_t t = 0; t < tokens; ++t) {
        std::shuffle(all.begin(), all.end(), rng);
        ids.insert(ids.end(), all.begin(), all.begin() + l.used);
    }
    return ids;
}

static void measure(const layer & l, ggml_backend_t backend, ggml_tensor * const (&w)[3], const int64_t tokens) {
    std::mt19937           rng(tokens);
    const ggml_init_params params = { ggml_tensor_overhead() * 256 + ggml_graph_overhead(), nullptr, true };
    ggml_context *         ctx    = ggml_init(params);
    ggml_cgraph *          graph  = ggml_new_graph(ctx);
    ggml_tensor *          x      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, l.hidden, 1, tokens);
    ggml_tensor *          ids[LAYERS];
    ggml_set_input(x);
    for (ggml_tensor *& each : ids) {
        each = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, l.used, tokens);
        ggml_set_input(each);
        ggml_tensor * up   = ggml_mul_mat_id(ctx, w[0], x, each);
        ggml_tensor * gate = ggml_mul_mat_id(ctx, w[1], x, each);
        ggml_tensor * down = ggml_mul_mat_id(ctx, w[2], ggml_swiglu_split(ctx, gate, up), each);
        ggml_set_output(down);
        ggml_build_forward_expand(graph, down);
    }
    ggml_gallocr_t memory = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
    if (!ggml_gallocr_alloc_graph(memory, graph)) {
        fprintf(stderr, "no memory for %lld tokens\n", (long long) tokens);
        exit(1);
    }
    std::normal_distribution<float> normal;
    std::vector<float>              values(l.hidden * tokens);
    std::generate(values.begin(), values.end(), [&] { return normal(rng); });
    ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
    int64_t distinct = 0;
    for (ggml_tensor * each : ids) {
        const std::vector<int32_t> chosen = choose(l, tokens, rng);
        std::vector<bool>          seen(l.experts);
        for (const int32_t id : chosen) {
            seen[id] = true;
        }
        distinct += std::count(seen.begin(), seen.end(), true);
        ggml_backend_tensor_set(each, chosen.data(), 0, ggml_nbytes(each));
    }
    std::vector<double> micros;
    for (int i = -3; i < REPEATS; ++i) {  // the first runs capture a CUDA graph
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        ggml_backend_synchronize(backend);
        if (i >= 0) {
            micros.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() /
                             LAYERS);
        }
    }
    std::sort(micros.begin(), micros.end());
    printf("| %6lld | %7.1f | %8.1f |\n", (long long) tokens, (double) distinct / LAYERS, micros[REPEATS / 2]);
    fflush(stdout);
    ggml_gallocr_free(memory);
    ggml_free(ctx);
}

int main(int argc, char ** argv) {
    if (argc != 1 && argc != 2 && argc != 6) {
        fprintf(stderr, "usage: %s [TYPE [HIDDEN INNER EXPERTS USED]]\n", argv[0]);
        return 1;
    }
    layer l;
    l.type = type_called(argc > 1 ? argv[1] : "ccq2");
    if (argc == 6) {
        l.hidden  = atoll(argv[2]);
        l.inner   = atoll(argv[3]);
        l.experts = atoll(argv[4]);
        l.used    = atoll(argv[5]);
    }
    ggml_backend_load_all();
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr);
    if (!backend) {
        fprintf(stderr, "no GPU\n");
        return 1;
    }
    const ggml_init_params params = { ggml_tensor_overhead() * 4, nullptr, true };
    ggml_context *         ctx    = ggml_init(params);
    ggml_tensor * const    w[3]   = { ggml_new_tensor_3d(ctx, l.type, l.hidden, l.inner, l.experts),
                                      ggml_new_tensor_3d(ctx, l.type, l.hidden, l.inner, l.experts),
                                      ggml_new_tensor_3d(ctx, l.type, l.inner, l.hidden, l.experts) };
    ggml_backend_buffer_t  buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    std::mt19937 rng(1);
    for (ggml_tensor * each : w) {
        fill(each, rng);
    }
    printf("%s, %s, %lld of %lld experts, %lld x %lld\n\n", ggml_backend_name(backend), ggml_type_name(l.type),
           (long long) l.used, (long long) l.experts, (long long) l.inner, (long long) l.hidden);
    printf("| tokens | experts | microseconds |\n|-------:|--------:|-------------:|\n");
    for (const int64_t tokens : { 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512 }) {
        measure(l, backend, w, tokens);
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    ggml_backend_free(backend);
    return 0;
}
