// Matrix-vector products of q8_0 and q4_0 whose rows stream through shared memory (Hopper and newer).
#pragma once

#include "common.cuh"

static constexpr int STREAM_MATRICES = 3;  // at most, with the same activations

// one column, or the experts of one token with ids
bool ggml_cuda_can_stream_mul_mat_vec(const ggml_tensor *                   src0,
                                      const ggml_tensor *                   src1,
                                      const ggml_tensor *                   ids,
                                      const ggml_tensor *                   dst,
                                      const ggml_cuda_mm_fusion_args_host * fusion);

void ggml_cuda_stream_mul_mat_vec(ggml_backend_cuda_context &           ctx,
                                  const ggml_tensor *                   src0,
                                  const ggml_tensor *                   src1,
                                  const ggml_tensor *                   ids,
                                  ggml_tensor *                         dst,
                                  const ggml_cuda_mm_fusion_args_host * fusion);

// The products that follow node_idx soon and have the same activations, fewer than STREAM_MATRICES. Returns how many.
int ggml_cuda_stream_siblings(const ggml_cgraph * cgraph, int node_idx, int * siblings);

// Compute node_idx together with such of its siblings as no memory hinders, which come back in `done`. Returns how many;
// with none, nothing was computed.
int ggml_cuda_stream_mul_mats_vec(ggml_backend_cuda_context & ctx, ggml_cgraph * cgraph, int node_idx, int * done);
