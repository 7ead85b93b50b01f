// Matrix products by panels of rows (panels.cpp), for types that have a kernel for them on this machine.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// true if the product (MUL_MAT or MUL_MAT_ID) is done by panels
bool ggml_panels_use(const struct ggml_tensor * dst);

// bytes of wdata that it needs
size_t ggml_panels_wdata_size(const struct ggml_tensor * dst);

void ggml_compute_forward_mul_mat_panels(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mul_mat_id_panels(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
