// ccq2: what the loader checks of a file
#pragma once

#include "ggml.h"
#include "gguf.h"
#include "llama-impl.h"

#include <cstdint>
#include <stdexcept>
#include <string>

// Files with ccq2 tensors say which layout their rows have; any other layout would decode to garbage without an error.
inline void check_ccq_layout(const gguf_context * metadata, const ggml_tensor * tensor) {
    static const char *   key       = "ernie_gguf.ccq.layout";
    static const uint32_t supported = 1;

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
