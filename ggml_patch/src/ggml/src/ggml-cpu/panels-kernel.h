// The kernels of panels.cpp: a panel of rows of weights by a few columns of activations.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

static constexpr int PANEL_STEP    = 256;  // weights of a row that are unpacked at a time
static constexpr int PANEL_GROUPS  = 8;    // at most, in a step
static constexpr int PANEL_COLUMNS = 128;  // that share an unpacked panel

// PANEL_STEP activations of a column. A group of weights has an offset (what to add for the weights being stored as
// unsigned bytes), a block a scale.
struct panel_activations {
    int8_t  q[PANEL_STEP];
    int32_t offset[PANEL_GROUPS];
    float   d[PANEL_GROUPS];
};

// dst[c][r] = row r . column c for nrows rows of k weights, row_size bytes apart, and at most PANEL_COLUMNS columns, whose
// steps are `stride` apart
struct panel_product {
    int64_t                           k;
    const uint8_t *                   rows;
    size_t                            row_size;
    int64_t                           nrows;
    const panel_activations * const * columns;
    int64_t                           stride;
    float * const *                   dst;
    int64_t                           ncols;
};

typedef void panel_multiply(panel_product p);

// A kernel for few columns: up to so many, of so many weights, and whole tiles of rows.
struct panel_few {
    panel_multiply * multiply;  // null where panels, or the dot product of ggml for one column, serve better
    int              rows;
    int              columns;
    int64_t          k;
};

// How a type is done.
struct panel_type {
    int rows;                                                             // of a panel
    int block;                                                            // weights; k is a multiple of it
    void (*quantize)(const float * x, panel_activations * y, int64_t n);  // n elements, whole blocks, at most PANEL_STEP
    panel_multiply * multiply;
    panel_few        few;
};

// null if this machine has no kernel for the type
const panel_type * panels_type(enum ggml_type type);
