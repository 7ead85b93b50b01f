// A few columns, for panels-kernel.cpp: rows go from memory through registers, no panel is made. What a Few does with one tile
// of rows is in panels-few-avx512.h and panels-few-avx2.h.
#pragma once

// C columns at a time
template <template <int> class Few, int C> static void multiply_few(panel_product p) {
    if constexpr (C > 1) {
        if (p.ncols < C) {
            return multiply_few<Few, C - 1>(p);
        }
    }
    constexpr int ROWS = Few<C>::ROWS;
    const Few<C>  few{ p.k, p.columns, p.stride };
    for (int64_t r = 0; r < p.nrows; r += ROWS) {
        float sums[C][ROWS];
        few.multiply(p.rows + r * p.row_size, p.row_size, sums);
        for (int c = 0; c < C; ++c) {
            std::copy(sums[c], sums[c] + ROWS, p.dst[c] + r);
        }
    }
    if (p.ncols > C) {
        p.columns += C;
        p.dst += C;
        p.ncols -= C;
        multiply_few<Few, C>(p);
    }
}
