// The activations that llama.cpp fuses with a pair of matrix-vector products.
#pragma once

#include "unary.cuh"

static __device__ __forceinline__ float ggml_cuda_mmv_glu(const ggml_glu_op op,
                                                          const float       limit,
                                                          const float       x,
                                                          const float       gate) {
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
