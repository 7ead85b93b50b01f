#version 450

// ccq2 times one to eight columns of floats, or times one token with ids.

#extension GL_EXT_shader_explicit_arithmetic_types_int32 : require

#include "mul_mat_vec_ccq2.glsl"

void main() {
    begin_rows();

    // a lane takes 16 weights, one word of codes
    for (uint i = 16 * lane; i < p.ncols; i += 16 * LANES) {
        uint  codes[NUM_ROWS];
        float scale[NUM_ROWS];
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            codes[n] = data_a_packed32[4 * (row_unit[n] + CCQ2_HEADER) + i / 16];
            scale[n] = group_scale(n, i);
        }

        FLOAT_TYPE sum[NUM_COLS][NUM_ROWS];  // of the columns times the weights plus CCQ2_ABOVE
        FLOAT_TYPE above[NUM_COLS];          // of the columns
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            above[j] = FLOAT_TYPE(0);
            [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
                sum[j][n] = FLOAT_TYPE(0);
            }
        }
        [[unroll]] for (uint l = 0; l < 4; ++l) {
            vec4 v[NUM_ROWS];
            [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
                v[n] = ccq2_values(codes[n], l, header[n].x, header[n].y);
            }
            [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
                const vec4 b = vec4(data_b_v4[(j * p.batch_stride_b + b_offset + i) / 4 + l]);
                above[j] += (b.x + b.y) + (b.z + b.w);
                [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
                    sum[j][n] = fma(b.x, v[n].x, fma(b.y, v[n].y, fma(b.z, v[n].z, fma(b.w, v[n].w, sum[j][n]))));
                }
            }
        }
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
                temp[j][n] = fma(scale[n], fma(-CCQ2_ABOVE, above[j], sum[j][n]), temp[j][n]);
            }
        }
    }

    end_rows(1.0);
}
