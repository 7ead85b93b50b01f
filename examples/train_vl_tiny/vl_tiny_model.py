"""The model of examples/ernie-vl-tiny: its sizes, a forward pass over whole batches of pictures, its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from vl_tiny_batches import Pictures
from vl_tiny_pictures import (
    BEGIN,
    CHAT_TEMPLATE,
    END,
    FIRST_VISION,
    IMAGE,
    VISION_TOKENS,
    VOCAB,
    Tokenizer,
    placeholder,
    prompt,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MARKERS = {
    "image": IMAGE,
    "image_start": "<|IMAGE_START|>",
    "image_end": "<|IMAGE_END|>",
    "video_start": "<|VIDEO_START|>",
    "video_end": "<|VIDEO_END|>",
}


def make_config() -> Ernie4_5_VLMoeConfig:
    """Three layers, one of them dense; 4 + 4 experts; a tower of two blocks. 5.6 M parameters."""
    return Ernie4_5_VLMoeConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "moe_intermediate_size": [256, 256],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={"depth": 2, "hidden_size": 96, "num_heads": 2, "intermediate_size": 384},
        **{f"{name}_token_id": FIRST_VISION + VISION_TOKENS.index(token) for name, token in MARKERS.items()},
        video_token_id=VOCAB - 1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def see(tower: torch.nn.Module, pixels: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[pictures, patches, 588] of one size -> [pictures, patches, width]: the tower's own modules on a whole batch."""
    rows, columns = (torch.arange(n, device=pixels.device) for n in grid[1:])
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    place = place.reshape(2, len(rows) // 2, 2, len(columns) // 2, 2).transpose(2, 3).reshape(2, -1).T
    x = tower.patch_embed(pixels)
    cos, sin = (part[:, None] for part in tower.rotary_pos_emb(x, place))
    for block in tower.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
        q, k = (
            part * cos
            + torch.cat(part.chunk(2, -1)[::-1], -1) * torch.cat((-sin.chunk(2, -1)[0], sin.chunk(2, -1)[1]), -1)
            for part in (q, k)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return tower.ln(x)


def resample(resampler: torch.nn.Module, seen: torch.Tensor) -> torch.Tensor:
    """[pictures, patches, width] -> [pictures, tokens, hidden]."""
    s = resampler.spatial_linear(seen.reshape(len(seen), -1, 4 * seen.shape[-1]))
    return resampler.after_norm(resampler.mlp(resampler.temporal_linear(torch.cat([s, s], -1))))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """8-bit patches as the tower takes them."""
    mean, std = (torch.tensor(part, device=pixels.device).repeat_interleave(196) * 255 for part in (MEAN, STD))
    return (pixels - mean) / std


def embeddings(model: Ernie4_5_VLMoeForConditionalGeneration, pictures: Pictures) -> torch.Tensor:
    """Of pictures of one size, [pictures, tokens, hidden]."""
    seen = see(model.model.vision_tower, normalized(pictures.patches), pictures.grid)
    return resample(model.model.resampler_model, seen)


def forward(
    model: Ernie4_5_VLMoeForConditionalGeneration,
    ids: torch.Tensor,
    grids: list[tuple[int, int, int]],
    seen: list[torch.Tensor],
) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary]; `seen` are the embeddings of each row's pictures."""
    x = model.model.get_input_embeddings()(ids)
    position = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if seen:
        first = ids[:1].cpu()
        position = model.model.get_rope_index(
            first, (first == FIRST_VISION).long(), image_grid_thw=torch.tensor(grids)
        )[0]
        x = x.masked_scatter((ids == FIRST_VISION)[..., None], torch.cat(seen, 1))
    hidden = model.model.language_model(
        inputs_embeds=x,
        position_ids=position.to(ids.device).expand(3, len(ids), -1),
        moe_mm_token_type_ids=(ids >= FIRST_VISION).long(),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)


def all_experts(
    experts: torch.nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token [n, hidden]: twice the arithmetic of the two chosen, but a GPU never waits."""
    share = torch.zeros(len(hidden), experts.num_experts, device=hidden.device, dtype=weights.dtype)
    share = share.scatter_add(1, chosen, weights)
    gate, up = torch.matmul(hidden, experts.gate_up_proj.transpose(1, 2)).chunk(2, -1)  # [experts, n, width]
    inner = experts.act_fn(gate) * up * share.T[:, :, None]
    return torch.matmul(inner, experts.down_proj.transpose(1, 2)).sum(0)


ALL_EXPERTS_FUNCTIONS.register("all", all_experts)


def initialize(model: Ernie4_5_VLMoeForConditionalGeneration) -> None:
    """Weights of variance 1 / inputs: a model this small hardly starts to learn from ERNIE's 0.02."""
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() >= 2 and "e_score_correction_bias" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith(("after_norm.weight", "language_model.norm.weight")):
            torch.nn.init.constant_(parameter, 0.4)


def new_model() -> Ernie4_5_VLMoeForConditionalGeneration:
    """An untrained model."""
    model = Ernie4_5_VLMoeForConditionalGeneration._from_config(make_config(), experts_implementation="all")
    initialize(model)
    return model


def load(folder: Path, experts: str = "eager") -> Ernie4_5_VLMoeForConditionalGeneration:
    """What a run has written, in float32."""
    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts, local_files_only=True
    )
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = None  # or it would be written beside the type of the file
    return model


def answer(model: Ernie4_5_VLMoeForConditionalGeneration, tokenizer: Tokenizer, *content: Image.Image | str) -> str:
    """What the model answers to pictures and texts, by transformers' own preprocessing and forward pass."""
    pictures = [each for each in content if not isinstance(each, str)]
    seen = Ernie4_5_VLMoeImageProcessorPil()(images=pictures, return_tensors="pt").to(model.device)
    shown = iter([placeholder(i + 1, int(grid.prod()) // 4) for i, grid in enumerate(seen["image_grid_thw"])])
    start = tokenizer.encode(prompt("".join(each if isinstance(each, str) else next(shown) for each in content)))
    ids = list(start)
    while len(ids) < len(start) + 12 and (len(ids) == len(start) or ids[-1] != tokenizer.encode(END)[0]):
        tokens = torch.tensor([ids], device=model.device)
        kinds = {
            "mm_token_type_ids": (tokens == FIRST_VISION).long(),
            "moe_mm_token_type_ids": (tokens >= FIRST_VISION).long(),
        }
        with torch.no_grad():
            ids.append(int(model(input_ids=tokens, **kinds, **seen).logits[0, -1].argmax()))
    return tokenizer.decode(ids[len(start) :]).removesuffix(END)


def write(out: Path, model: Ernie4_5_VLMoeForConditionalGeneration, tokenizer_model: bytes) -> None:
    """The checkpoint as transformers writes it, with the tokenizer in the form of Baidu's repositories."""
    model.save_pretrained(out, max_shard_size="5MB")
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    decoder = {
        str(FIRST_VISION + i): {
            "content": token,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(VISION_TOKENS)
    }
    values = {
        "tokenizer_class": "Ernie4_5_Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": BEGIN,
        "sep_token": END,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "model_max_length": 4096,
        "added_tokens_decoder": decoder,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(values, indent=1) + "\n")
    Ernie4_5_VLMoeImageProcessorPil().save_pretrained(out)
