#version 450

// ccq2 times one to eight columns, or times one token with ids, in integers: the columns are quantized to q8_1.

#extension GL_EXT_shader_explicit_arithmetic_types_int32 : require
#extension GL_EXT_integer_dot_product : require

#define B_TYPE block_q8_1_x4_packed128

#include "mul_mat_vec_ccq2.glsl"

// Two partial sums of the 32 weights each that share a scale of the column, of weights times four.
ivec2 dot_unit(const int32_t a[16], const ivec4 b[4]) {
    ivec2 sum = ivec2(0);
    [[unroll]] for (uint h = 0; h < 2; ++h) {
        [[unroll]] for (uint w = 0; w < 2; ++w) {
            [[unroll]] for (uint l = 0; l < 4; ++l) {
                sum[h] += dotPacked4x8EXT(a[8 * h + 4 * w + l], b[2 * h + w][l]);
            }
        }
    }
    return sum;
}

void main() {
    begin_rows();

    // a lane takes a unit: 64 weights, half a block of the quantized column
    const uint units = p.ncols / QUANT_K;
    for (uint unit = lane; unit < units; unit += LANES) {
        int32_t a[NUM_ROWS][16];
        float   scale[NUM_ROWS];
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            const uvec4 codes = data_a[row_unit[n] + CCQ2_HEADER + unit];
            [[unroll]] for (uint w = 0; w < 4; ++w) {
                [[unroll]] for (uint l = 0; l < 4; ++l) {
                    a[n][4 * w + l] = ccq2_unpack(codes[w], l, header[n].x, header[n].y);
                }
            }
            scale[n] = group_scale(n, QUANT_K * unit);
        }

        const uint h = unit % 2;
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            const uint ib = (j * p.batch_stride_b + b_offset) / (4 * QUANT_K_Q8_1) + unit / 2;
            const vec2 d  = vec2(data_b[ib].ds[2 * h].x, data_b[ib].ds[2 * h + 1].x);
            ivec4 b[4];
            [[unroll]] for (uint w = 0; w < 4; ++w) {
                b[w] = data_b[ib].qs[4 * h + w];
            }
            [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
                temp[j][n] = fma(scale[n], dot(d, vec2(dot_unit(a[n], b))), temp[j][n]);
            }
        }
    }

    end_rows(1.0 / CCQ2_UNPACKED);
}
