"""What llama.cpp's loaders look for: the tensors of the model and of the mmproj, and where a checkpoint has them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from . import rope
from .checkpoint.config import ErnieConfig, MoeConfig
from .checkpoint.vision_config import VisionConfig


class Role(Enum):
    """What decides a tensor's type."""

    LINEAR = "linear"  # attention, dense and shared-expert MLPs, embedding, head
    EXPERT = "expert"  # the stacked expert matrices
    VISION_EXPERT = "vision expert"  # those for image tokens
    PROJECTOR = "projector"  # matrices of the vision tower and its resampler, in the mmproj
    EXACT = "exact"  # norms, router, correction bias: always f32


@dataclass(frozen=True)
class Expected:
    """A GGUF tensor and where it may come from: `sources` are concatenated along their rows, each from `row` on.

    `shape` is outermost first, so its last entry is K = ne[0]; the file states `file_shape` where it is given. With
    `fused`, the rows may instead be those from `fused_row` on of one tensor of `fused_rows` rows. With `head_order`
    row i of each head is the source's row `head_order[i]` of it. `computed` are the values of a tensor that no
    checkpoint has; it has no sources.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[str, ...]
    fused: tuple[str, ...] = ()
    fused_row: int = 0
    fused_rows: int = 0
    row: int = 0
    head_order: tuple[int, ...] = ()
    computed: tuple[float, ...] = ()
    file_shape: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the file states."""
        return self.file_shape or self.shape

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)


def _attention(config: ErnieConfig, gguf: str, hf: str) -> Iterator[Expected]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    order = () if config.vision is None else rope.head_order(config.vision.sections)
    row = 0
    for letter, rows in (("q", q), ("k", kv), ("v", kv)):
        yield Expected(
            f"{gguf}.attn_{letter}.weight",
            (rows, config.hidden),
            Role.LINEAR,
            (f"{hf}.self_attn.{letter}_proj.weight",),
            (f"{hf}.self_attn.qkv_proj.weight",),
            row,
            q + 2 * kv,
            head_order=() if letter == "v" else order,
        )
        row += rows
    yield Expected(f"{gguf}.attn_output.weight", (config.hidden, q), Role.LINEAR, (f"{hf}.self_attn.o_proj.weight",))


def mlp(name: str, modules: list[str], hidden: int, width: int, stacked: Role | None = None) -> Iterator[Expected]:
    """Gate, up and down of one MLP (`modules` holds one path), or of a layer's experts `stacked` in that role.

    `name` is the GGUF name with {} for gate, up or down.
    """
    role, stack = (stacked, (len(modules),)) if stacked else (Role.LINEAR, ())
    for half, letter in enumerate(("gate", "up")):  # up_gate_proj: gate in the first half of the rows, up in the second
        yield Expected(
            name.format(letter),
            (*stack, width, hidden),
            role,
            tuple(f"{module}.{letter}_proj.weight" for module in modules),
            tuple(f"{module}.up_gate_proj.weight" for module in modules),
            half * width,
            2 * width,
        )
    down = tuple(f"{module}.down_proj.weight" for module in modules)
    yield Expected(name.format("down"), (*stack, hidden, width), role, down)


def _moe(moe: MoeConfig, hidden: int, gguf: str, hf: str) -> Iterator[Expected]:
    yield Expected(f"{gguf}.ffn_gate_inp.weight", (moe.experts, hidden), Role.EXACT, (f"{hf}.mlp.gate.weight",))
    if moe.has_bias:
        bias = f"{hf}.mlp.moe_statics.e_score_correction_bias"
        yield Expected(f"{gguf}.exp_probs_b.bias", (moe.experts,), Role.EXACT, (bias,))
    experts = [f"{hf}.mlp.experts.{e}" for e in range(moe.experts)]
    yield from mlp(gguf + ".ffn_{}_exps.weight", experts, hidden, moe.width, stacked=Role.EXPERT)
    if moe.shared:
        yield from mlp(gguf + ".ffn_{}_shexp.weight", [f"{hf}.mlp.shared_experts"], hidden, moe.shared_width)


def _vision_moe(moe: MoeConfig, vision: VisionConfig, hidden: int, gguf: str, hf: str) -> Iterator[Expected]:
    """The second router, bias and experts: those are numbered after the text experts."""
    router = f"{hf}.mlp.gate.weight_1"
    yield Expected(f"{gguf}.ffn_gate_inp_vl.weight", (moe.experts, hidden), Role.EXACT, (router,))
    bias = f"{hf}.mlp.moe_statics.e_score_correction_bias"
    yield Expected(f"{gguf}.exp_probs_b_vl.bias", (moe.experts,), Role.EXACT, (bias,), row=1)
    experts = [f"{hf}.mlp.experts.{moe.experts + e}" for e in range(moe.experts)]
    yield from mlp(gguf + ".ffn_{}_exps_vl.weight", experts, hidden, vision.expert_width, stacked=Role.VISION_EXPERT)


def model_tensors(config: ErnieConfig, has_head: bool) -> Iterator[Expected]:
    """Every tensor that llama.cpp's loader looks for in the model, in its order."""
    embedding = (config.vocab, config.hidden)
    norm = (config.hidden,)
    yield Expected("token_embd.weight", embedding, Role.LINEAR, ("model.embed_tokens.weight",))
    for layer in range(config.layers):
        gguf, hf = f"blk.{layer}", f"model.layers.{layer}"
        yield Expected(f"{gguf}.attn_norm.weight", norm, Role.EXACT, (f"{hf}.input_layernorm.weight",))
        yield from _attention(config, gguf, hf)
        yield Expected(f"{gguf}.ffn_norm.weight", norm, Role.EXACT, (f"{hf}.post_attention_layernorm.weight",))
        if config.moe is not None and config.is_moe_layer(layer):
            yield from _moe(config.moe, config.hidden, gguf, hf)
            if config.vision is not None:
                yield from _vision_moe(config.moe, config.vision, config.hidden, gguf, hf)
        else:
            yield from mlp(gguf + ".ffn_{}.weight", [f"{hf}.mlp"], config.hidden, config.ffn_width)
    yield Expected("output_norm.weight", norm, Role.EXACT, ("model.norm.weight",))
    if has_head:
        yield Expected("output.weight", embedding, Role.LINEAR, ("lm_head.weight",))
    if config.vision is not None:
        factors = rope.factors(config.vision.sections, config.rope_theta)
        yield Expected("rope_freqs.weight", (len(factors),), Role.EXACT, (), computed=factors)


def projector_tensors(vision: VisionConfig, hidden: int) -> Iterator[Expected]:
    """Every tensor of the mmproj: the tower `v.`, the resampler `mm.`."""
    width, merged = vision.width, 4 * vision.width

    def linear(gguf: str, hf: str, n: int, k: int) -> Iterator[Expected]:
        yield Expected(f"{gguf}.weight", (n, k), Role.PROJECTOR, (f"{hf}.weight",))
        yield Expected(f"{gguf}.bias", (n,), Role.EXACT, (f"{hf}.bias",))

    def norm(gguf: str, hf: str, k: int) -> Iterator[Expected]:
        for part in ("weight", "bias"):
            yield Expected(f"{gguf}.{part}", (k,), Role.EXACT, (f"{hf}.{part}",))

    yield Expected(
        "v.patch_embd.weight",
        (width, 3 * vision.patch * vision.patch),
        Role.EXACT,
        ("vision_model.patch_embed.proj.weight",),
        file_shape=(width, 3, vision.patch, vision.patch),
    )
    for i in range(vision.depth):
        gguf, hf = f"v.blk.{i}", f"vision_model.blocks.{i}"
        yield from norm(f"{gguf}.ln1", f"{hf}.norm1", width)
        yield from linear(f"{gguf}.attn_qkv", f"{hf}.attn.qkv", 3 * width, width)
        yield from linear(f"{gguf}.attn_out", f"{hf}.attn.proj", width, width)
        yield from norm(f"{gguf}.ln2", f"{hf}.norm2", width)
        yield from linear(f"{gguf}.ffn_up", f"{hf}.mlp.fc1", vision.mlp_width, width)
        yield from linear(f"{gguf}.ffn_down", f"{hf}.mlp.fc2", width, vision.mlp_width)
    yield from norm("v.post_ln", "vision_model.ln", width)
    for stage, k in (("spatial", merged), ("temporal", 2 * merged)):  # the temporal one sees two frames side by side
        hf = f"model.resampler_model.{stage}_linear"
        yield from linear(f"mm.{stage}.fc1", f"{hf}.0", merged, k)
        yield from linear(f"mm.{stage}.fc2", f"{hf}.2", merged, merged)
        yield from norm(f"mm.{stage}.norm", f"{hf}.3", merged)
    yield from linear("mm.model.fc", "model.resampler_model.mlp", hidden, merged)
    yield Expected("mm.post_norm.weight", (hidden,), Role.EXACT, ("model.resampler_model.after_norm.weight",))
