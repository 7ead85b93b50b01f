// What the two kernels for a few columns of ccq2 share: which rows and lanes a thread has, the sums, the results.
//
// LANES lanes share a row, and each of them takes NUM_ROWS rows at a time: a workgroup has
// BLOCK_SIZE / LANES * NUM_ROWS rows. LANES is at most a subgroup, so that short rows leave no lane idle and no sum
// needs a barrier where the device has shuffles.

#ifdef USE_SHUFFLE
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#endif

#include "mul_mat_vec_base.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;

layout (constant_id = 3) const uint LANES = 8;

FLOAT_TYPE temp[NUM_COLS][NUM_ROWS];

// of the first row that this thread works on, and of its share of every row
uint first_row, lane;

uint     row_unit[NUM_ROWS];  // where the rows begin, in units
uvec4    header[NUM_ROWS];

uint a_offset, b_offset, d_offset;

// Rows beyond the last are read as the last one.
void begin_rows() {
    get_offsets(a_offset, b_offset, d_offset);

#ifdef USE_SHUFFLE
    lane = gl_SubgroupInvocationID % LANES;
    const uint team = gl_SubgroupID * (gl_SubgroupSize / LANES) + gl_SubgroupInvocationID / LANES;
#else
    lane = gl_LocalInvocationID.x % LANES;
    const uint team = gl_LocalInvocationID.x / LANES;
#endif
    const uint teams = BLOCK_SIZE / LANES;
    first_row = ((gl_WorkGroupID.x + gl_NumWorkGroups.x * gl_WorkGroupID.z) * teams + team) * NUM_ROWS;

    [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
        row_unit[n] = a_offset + min(first_row + n, p.stride_d - 1) * (p.stride_a / QUANT_K);
        header[n]   = data_a[row_unit[n]];
        [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
            temp[j][n] = FLOAT_TYPE(0);
        }
    }
}

// the scale of weight i of a row
float group_scale(const uint n, const uint i) {
    const uint word = data_a_packed32[4 * row_unit[n] + ccq2_scale_word(p.ncols, i)];
    return float(bitfieldExtract(word, int(ccq2_scale_bit(i)), 4));
}

#ifndef USE_SHUFFLE
shared FLOAT_TYPE lane_sums[BLOCK_SIZE];
#endif

// the sum over the lanes that share a row, in the first of them
FLOAT_TYPE sum_of_lanes(FLOAT_TYPE v) {
#ifdef USE_SHUFFLE
    [[unroll]] for (uint s = LANES / 2; s > 0; s >>= 1) {
        v += subgroupShuffleXor(v, s);
    }
    return v;
#else
    const uint tid = gl_LocalInvocationID.x;
    barrier();
    lane_sums[tid] = v;
    barrier();
    [[unroll]] for (uint s = LANES / 2; s > 0; s >>= 1) {
        if (lane < s) {
            lane_sums[tid] += lane_sums[tid + s];
        }
        barrier();
    }
    return lane_sums[tid];
#endif
}

// Write the sums of all lanes times the super scales of the rows and `factor`, with what is fused into the product.
void end_rows(const float factor) {
    [[unroll]] for (uint j = 0; j < NUM_COLS; ++j) {
        [[unroll]] for (uint n = 0; n < NUM_ROWS; ++n) {
            FLOAT_TYPE v = sum_of_lanes(temp[j][n] * (factor * uintBitsToFloat(header[n].z)));
            const uint row = first_row + n;
            if (lane == 0 && row < p.stride_d) {
                const uint i = j * p.batch_stride_d + d_offset + row;
#ifdef MUL_MAT_ID
                const uint expert_i0 = gl_WorkGroupID.y;
                if ((p.fusion_flags & MAT_VEC_FUSION_FLAGS_BIAS0) != 0) {
                    v += FLOAT_TYPE(data_fuse0[expert_id * p.stride_d + row]);
                }
                if ((p.fusion_flags & MAT_VEC_FUSION_FLAGS_SCALE0) != 0) {
                    v *= FLOAT_TYPE(data_fuse0[expert_i0]);
                }
                if ((p.fusion_flags & MAT_VEC_FUSION_FLAGS_SCALE1) != 0) {
                    v *= FLOAT_TYPE(data_fuse1[expert_i0]);
                }
#else
                if ((p.fusion_flags & MAT_VEC_FUSION_FLAGS_BIAS0) != 0) {
                    v += FLOAT_TYPE(data_fuse0[i]);
                }
                if ((p.fusion_flags & MAT_VEC_FUSION_FLAGS_BIAS1) != 0) {
                    v += FLOAT_TYPE(data_fuse1[i]);
                }
#endif
                data_d[i] = D_TYPE(v);
            }
        }
    }
}
