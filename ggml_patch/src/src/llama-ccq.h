// ccq2: what the loader checks of a file, and what llama-quantize checks and writes
#pragma once

#include "ggml.h"
#include "gguf.h"
#include "llama-impl.h"

#include <cinttypes>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

static const char *   CCQ_LAYOUT_KEY = "ernie_gguf.ccq.layout";
static const uint32_t CCQ_LAYOUT     = 1;

// Files with ccq2 tensors say which layout their rows have; any other layout would decode to garbage without an error.
inline void check_ccq_layout(const gguf_context * metadata, const ggml_tensor * tensor) {
    const char *   key       = CCQ_LAYOUT_KEY;
    const uint32_t supported = CCQ_LAYOUT;

    if (tensor->type != GGML_TYPE_CCQ2) {
        return;
    }
    const std::string problem =
        format("tensor '%s' has type %s, but the metadata key %s", ggml_get_name(tensor), ggml_type_name(tensor->type), key);
    const std::string advice = format(
        "this build reads layout %u: convert the checkpoint again with the ernie-gguf that belongs to this build", supported);

    const int64_t id = gguf_find_key(metadata, key);
    if (id < 0) {
        throw std::runtime_error(format("%s is missing; %s", problem.c_str(), advice.c_str()));
    }
    if (gguf_get_kv_type(metadata, id) != GGUF_TYPE_UINT32) {
        throw std::runtime_error(format("%s has type %s, not u32; %s", problem.c_str(),
                                        gguf_type_name(gguf_get_kv_type(metadata, id)), advice.c_str()));
    }
    if (gguf_get_val_u32(metadata, id) != supported) {
        throw std::runtime_error(format("%s is %u; %s", problem.c_str(), gguf_get_val_u32(metadata, id), advice.c_str()));
    }
}

// Each file of a split model has the key if it has ccq2 tensors.
inline void set_ccq_layout(gguf_context * metadata, bool has_ccq2) {
    if (has_ccq2) {
        gguf_set_val_u32(metadata, CCQ_LAYOUT_KEY, CCQ_LAYOUT);
    } else {
        gguf_remove_key(metadata, CCQ_LAYOUT_KEY);
    }
}

// Whether the imatrix has values for a tensor. A wrong number of them shows that it belongs to another model.
inline bool find_ccq_importance(const std::unordered_map<std::string, std::vector<float>> & imatrix,
                                const std::string &                                         name,
                                const ggml_tensor *                                         tensor) {
    const auto    it       = imatrix.find(name);
    const int64_t expected = tensor->ne[0] * tensor->ne[2];
    if (it != imatrix.end() && (int64_t) it->second.size() != expected) {
        throw std::runtime_error(format("the imatrix belongs to another model: it has %zu values for tensor '%s', not %" PRId64,
                                        it->second.size(), ggml_get_name(tensor), expected));
    }
    return it != imatrix.end();
}
