#include "models.h"

// ERNIE-4.5-VL: the tower of Qwen2-VL without its doubled patch convolution, then a resampler of three linear stages

ggml_tensor * clip_graph_ernie4_5vl::build_resampler_mlp(ggml_tensor * cur, const clip_model::resampler_mlp & mlp) const {
    cur = build_ffn(cur, mlp.fc1_w, mlp.fc1_b, nullptr, nullptr, mlp.fc2_w, mlp.fc2_b, FFN_GELU_ERF, -1);
    return build_norm(cur, mlp.norm_w, mlp.norm_b, NORM_TYPE_NORMAL, eps, -1);
}

ggml_cgraph * clip_graph_ernie4_5vl::build() {
    // y, x, y, x of each patch, in raster order
    ggml_tensor * positions = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_patches * 4);
    ggml_set_name(positions, "positions");
    ggml_set_input(positions);

    int  sections[4] = { d_head / 4, d_head / 4, d_head / 4, d_head / 4 };
    auto add_pos     = [&](ggml_tensor * cur, const clip_layer &) {
        return ggml_rope_multi(ctx0, cur, positions, nullptr, d_head / 2, sections, GGML_ROPE_TYPE_VISION, 32768, 10000, 1, 0,
                               1, 32, 1);
    };

    ggml_tensor * cur = build_vit(build_inp(), n_patches, NORM_TYPE_NORMAL, hparams.ffn_op, nullptr, add_pos);
    cb(cur, "vit_out", -1);

    // the four patches of a block side by side: [4*n_embd, n_patches/4], of each frame of a pair
    GGML_ASSERT(n_batch <= 2);
    ggml_tensor * frames[2];
    for (int i = 0; i < n_batch; i++) {
        ggml_tensor * frame = ggml_view_2d(ctx0, cur, n_embd, n_patches, cur->nb[1], i * cur->nb[2]);
        frames[i]           = build_resampler_mlp(build_patch_merge_permute(frame, hparams.n_merge), model.mm_spatial);
        cb(frames[i], "spatial_out", i);
    }

    // a picture is a pair of equal frames: [8*n_embd, n_patches/4]
    cur = ggml_concat(ctx0, frames[0], frames[n_batch - 1], 0);
    cur = build_resampler_mlp(cur, model.mm_temporal);
    cb(cur, "temporal_out", -1);

    cur = ggml_add(ctx0, build_mm(model.mm_fc_w, cur), model.mm_fc_b);
    cur = build_norm(cur, model.mm_post_norm_w, nullptr, NORM_TYPE_RMS, hparams.proj_eps, -1);

    ggml_build_forward_expand(gf, cur);

    return gf;
}
