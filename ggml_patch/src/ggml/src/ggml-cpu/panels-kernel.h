// The kernels of panels.cpp: 16 rows of weights by a few columns of activations.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

static constexpr int PANEL_ROWS    = 16;
static constexpr int PANEL_COLUMNS = 128;  // that share an unpacked panel

// A column of activations: k int8, then for each group of them an offset (int32: what to add for the weights being stored
// as unsigned bytes), then for each block a scale (float). See panels_quantize.
struct panel_column {
    const int8_t *  q;
    const int32_t * offset;
    const float *   d;
};

// How a type is done: the sizes of its groups and blocks of activations, and its kernel.
struct panel_type {
    int group;
    int block;
    // quantize n elements, whole blocks, of a column
    void (*quantize)(const float * x, int8_t * q, int32_t * offset, float * d, int64_t n);
    // dst[c][r] = row r . column c for nrows rows of k weights, row_size bytes apart, and at most PANEL_COLUMNS columns
    void (*mul)(int64_t              k,
                const void *         rows,
                size_t               row_size,
                int64_t              nrows,
                const panel_column * columns,
                float * const *      dst,
                int64_t              ncols);
};

// null if this machine has no kernel for the type
const panel_type * panels_type(enum ggml_type type);
