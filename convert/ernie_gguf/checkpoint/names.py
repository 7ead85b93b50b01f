"""A checkpoint's tensor names -> sources under canonical names, those of the -PT files.

Paddle files call the model `ernie.` instead of `model.`, store Linear weights as [in, out], bfloat16 sometimes as raw
uint16, and spread a quantized module `X.weight` over `X.quant_weight`, `X.weight_scale` and others. The vision tower is
`vision_model.` in Baidu's files and `model.vision_model.` in those that transformers writes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import PlanError
from .config import MAX_EXPERTS, ErnieConfig
from .quantized import STORAGES
from .shards import TensorHeader
from .storage import COLUMNS, PER_MODALITY, ROWS, Source, Storage

# Tensors that llama.cpp has no use for. (pattern, reason)
DROPPED: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"(model|ernie)\.mtp_(block|emb_norm|hidden_norm|linear_proj)\.\d+\."),
        "multi-token prediction: llama.cpp does not use it",
    ),
    (re.compile(r"(.*\.)?rotary_emb\.inv_freq$"), "recomputed from rope_theta"),
    (re.compile(r".*\.activation_scale$"), "scale of 8-bit activations: llama.cpp chooses its own"),
    (re.compile(r".*\.cachek?v?_[a-z_]*(scale|zp)[a-z_]*$|.*\.cache[kv]_matmul\."), "scale of an 8-bit KV cache"),
)
_VISION: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(model\.|ernie\.)?(vision_model|vision_tower|visual)\."), "vision encoder (--text-only)"),
    (re.compile(r"(model\.|ernie\.)?(resampler_model|mm_resampler)\."), "vision resampler (--text-only)"),
    (re.compile(r".*\.mlp\.gate\.weight_1$"), "router of the vision experts (--text-only)"),
)

_LINEAR = re.compile(
    r"(_proj|\.mlp\.gate|^lm_head)\.weight$"
    r"|^vision_model\..*\.(proj|qkv|fc1|fc2)\.weight$"
    r"|^model\.resampler_model\.((spatial|temporal)_linear\.[02]|mlp)\.weight$"
)
_TOWER = re.compile(r"(?:model\.|ernie\.)?(?:vision_model|vision_tower)\.(.*)")
_QUANTIZED = re.compile(r"(.*)\.(quant_weight|weight_scale|super_scales|code_scale|code_zp)$")
# Experts of a layer in one tensor [experts, rows, K], as transformers 5 holds them: gate's rows above up's in each.
_FUSED = re.compile(r"((?:model|ernie)\.layers\.\d+\.mlp\.experts)\.(gate_up|up_gate|gate|up|down)_proj(?:\.weight)?")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r".*\.mlp\.experts\.(\d+)\.")


@dataclass
class Names:
    """All tensors of a checkpoint, each in a source or dropped for a reason."""

    sources: dict[str, Source] = field(default_factory=dict)
    dropped: list[tuple[TensorHeader, str]] = field(default_factory=list)


def _reason_to_drop(name: str, config: ErnieConfig) -> str | None:
    patterns = DROPPED if config.vision_experts is None else DROPPED + _VISION
    for pattern, reason in patterns:
        if pattern.match(name):
            return reason
    expert = _EXPERT.match(name)
    if expert and config.moe is not None and config.vision_experts:
        number = int(expert[1][:9])
        if config.moe.experts <= number < config.moe.experts + config.vision_experts:
            return "vision expert (--text-only)"
    return None


def _quantized_storage(module: str, name: str, config: ErnieConfig) -> Storage:
    """How config.json says that a module with a `quant_weight` is stored."""
    layer = _LAYER.match(module + ".")
    if config.quant is None:
        raise PlanError(f"tensor {name}: quantized, but config.json has no quantization_config that says how")
    quant_type = config.quant.of(int(layer[1][:9]) if layer else 0, ".mlp.experts." in module)
    if quant_type not in STORAGES:
        raise PlanError(f"tensor {name}: quantized, but quantization_config says {quant_type} for it")
    return STORAGES[quant_type].of_block(config.quant.block)


def collect(tensors: Mapping[str, TensorHeader], config: ErnieConfig) -> Names:
    """Sources by canonical name. Raises PlanError for names that contradict each other or config.json."""
    out = Names()
    kept: dict[str, TensorHeader] = {}
    for name, header in _each_expert(tensors).items():
        if (reason := _reason_to_drop(name, config)) is not None:
            out.dropped.append((header, reason))
        else:
            kept[name] = header
    if inner := next((name for name in kept if ".text_moe." in name), None):
        raise PlanError(
            f"tensor {inner}: a name of transformers' own modules; save the model with save_pretrained, which writes "
            "the published names"
        )
    paddle = any(name.startswith("ernie.") for name in kept)
    if paddle and (other := next((name for name in kept if name.startswith("model.")), None)):
        raise PlanError(f"tensor {other}: a -PT name among Paddle names (ernie.…): two checkpoints in one folder?")
    grouped: dict[str, tuple[Storage, dict[str, TensorHeader]]] = {}
    for name, header in kept.items():
        canonical = _canonical(name, config)
        if paddle and (quantized := _QUANTIZED.fullmatch(canonical)):
            module, part = quantized.groups()
            storage = grouped[module][0] if module in grouped else _quantized_storage(module, name, config)
            grouped.setdefault(module, (storage, {}))[1][part] = _raw_bf16(header, paddle)
            continue
        if canonical in out.sources:
            raise PlanError(f"tensor {name}: a second {canonical}; two checkpoints in one folder?")
        out.sources[canonical] = Source(
            _float_storage(canonical, paddle, config), {"weight": _raw_bf16(header, paddle)}
        )
    for module, (storage, parts) in grouped.items():
        if f"{module}.weight" in out.sources:
            raise PlanError(f"tensor {next(iter(parts.values())).name}: {module} has both a weight and a quant_weight")
        out.sources[f"{module}.weight"] = Source(storage, parts)
    return out


def _each_expert(tensors: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The tensors, those of all experts of a layer cut into one each, in place; a part's header is called NAME[e]."""
    out: dict[str, TensorHeader] = {}
    for name, header in tensors.items():
        fused = _FUSED.fullmatch(name)
        if fused is None:
            out[name] = header
            continue
        if len(header.shape) != 3:
            raise PlanError(f"tensor {name}: shape {list(header.shape)}, expected [experts, rows, columns]")
        experts, *shape = header.shape
        part = fused[2].replace("gate_up", "up_gate")
        for e in range(min(experts, MAX_EXPERTS)):
            size = header.nbytes // experts
            each = replace(
                header, name=f"{name}[{e}]", shape=tuple(shape), offset=header.offset + e * size, nbytes=size
            )
            if (single := f"{fused[1]}.{e}.{part}_proj.weight") in tensors or single in out:
                raise PlanError(f"tensor {name}: holds expert {e}, which {single} holds too; one of them is stale")
            out[single] = each
    return out


def _canonical(name: str, config: ErnieConfig) -> str:
    """The name in Baidu's -PT files."""
    name = name.replace(".mlp.gate.moe_statics.", ".mlp.moe_statics.")  # as transformers' modules are nested
    if config.vision is not None and (tower := _TOWER.fullmatch(name)):
        return f"vision_model.{tower[1]}"
    return "model." + name.removeprefix("ernie.") if name.startswith("ernie.") else name


def _raw_bf16(header: TensorHeader, paddle: bool) -> TensorHeader:
    """Paddle's older writer has no bfloat16: it stores the bits as uint16."""
    return replace(header, dtype="BF16") if paddle and header.dtype == "U16" else header


def _float_storage(canonical: str, paddle: bool, config: ErnieConfig) -> Storage:
    if config.is_vl and canonical.endswith(".mlp.moe_statics.e_score_correction_bias"):
        return PER_MODALITY
    if paddle and _LINEAR.search(canonical):
        return COLUMNS
    # The routers of the VL models are bare parameters, [in, out] in the -PT files too.
    routers = (".mlp.gate.weight", ".mlp.gate.weight_1")
    return COLUMNS if config.is_vl and canonical.endswith(routers) else ROWS
