"""The vision half of a VL checkpoint's config.json.

Baidu's repositories are flat, and what differs between text and vision is a list of two, text first. transformers 5
writes `text_config` and `vision_config`, and there only `moe_intermediate_size` is such a list.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .json_object import JsonObject, read_object, shown

# Ids of ERNIE's tokenizer, for files that do not state them.
PLACEHOLDER, FIRST_MARK, LAST_MARK = 100295, 101304, 101307
MAX_SIZE = 1 << 20
MAX_PIXELS = 1 << 30
MAX_FRAMES = 1 << 12  # ffmpeg is told each by its number


@dataclass(frozen=True)
class VisionConfig:
    """The tower, the resampler and the vision experts. `sections`: pairs of a head that turn by time, row and column.

    Tokens from `placeholder` on are an image's for Baidu's engine; for transformers only the `marks`, first and last.
    """

    expert_width: int
    sections: tuple[int, int, int]
    placeholder: int
    marks: tuple[int, int]
    depth: int
    width: int
    heads: int
    mlp_width: int
    patch: int


@dataclass(frozen=True)
class VideoPreprocessor:
    """Which frames of a video the model is shown, and how: pixels of a frame after resizing, frames per second."""

    min_pixels: int = 299 * 28 * 28
    max_pixels: int = 1196 * 28 * 28
    min_frames: int = 16
    max_frames: int = 180
    fps: float = 2.0
    draw_time: bool = True


@dataclass(frozen=True)
class Preprocessor:
    """How an image becomes patches: pixels after resizing, and the normalization of values from 0 to 1.

    `video` is None if the checkpoint says nothing of videos.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 6177 * 28 * 28
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    video: VideoPreprocessor | None = None


def merged_values(values: dict[str, Any], where: str) -> dict[str, Any]:
    """All keys of the language model and of the whole: those of `text_config`, if there is one, win."""
    nested = _child(JsonObject(values, where), "text_config").values
    return {**values, **{key: value for key, value in nested.items() if key != "architectures"}}


def text_values(merged: dict[str, Any], where: str) -> dict[str, Any]:
    """The language model's values as a text checkpoint states them."""
    pairs = {k: v for k, v in merged.items() if k.startswith("moe_") and isinstance(v, list) and len(v) == 2}
    out = {**merged, **{key: pair[0] for key, pair in pairs.items()}}
    if (types := merged.get("mlp_layer_types")) is not None:
        out["moe_layer_start_index"] = _first_sparse(types, merged.get("num_hidden_layers"), where)
    return out


def _first_sparse(types: object, layers: object, where: str) -> int:
    """The number of dense layers that a list of "dense" and "sparse" begins with."""
    if isinstance(types, list) and len(types) == layers:
        first = types.index("sparse") if "sparse" in types else len(types)
        if types == ["dense"] * first + ["sparse"] * (len(types) - first):
            return first
    raise ConfigError(
        f"{where}: mlp_layer_types: expected {layers} of 'dense', then 'sparse' to the end (llama.cpp has no dense "
        f"layers after MoE layers), found {shown(types)}"
    )


def vision_experts(merged: dict[str, Any], where: str, most: int) -> int:
    """Vision experts of a layer: the second of the pair; a single number counts each modality's."""
    experts = merged.get("moe_num_experts")
    pair = isinstance(experts, list) and len(experts) == 2
    count = experts[1] if isinstance(experts, list) and pair else experts
    return JsonObject({"moe_num_experts": count}, where).integer("moe_num_experts", 0, most)


def _child(config: JsonObject, key: str) -> JsonObject:
    """A nested object; an empty one if it is absent."""
    return config.child(key) or JsonObject({}, f"{config.where}.{key}")


def _pair(config: JsonObject, key: str) -> tuple[Any, Any] | None:
    value = config.values.get(key)
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else None


def _refuse(config: JsonObject) -> None:
    """What no checkpoint of the family has, and what llama.cpp would run wrongly."""
    for key in ("moe_num_experts", "moe_layer_start_index", "moe_k"):
        pair = _pair(config, key)
        if pair is not None and pair[0] != pair[1]:
            raise config.error(key, "the same for text and vision")
    if config.integer("mm_vocab_size", 0, MAX_SIZE, default=0):
        raise config.error("mm_vocab_size", "0: image tokens as embeddings of their own are not supported")
    if not config.boolean("rope_3d", default=True):
        raise config.error("rope_3d", "true")


def _sections(config: JsonObject, head_dim: int) -> tuple[int, int, int]:
    """From `mrope_section` (h, w, t) or `freq_allocation` (t)."""
    pairs = head_dim // 2
    for key in ("rope_parameters", "rope_scaling"):
        rope = _child(config, key)
        if (found := rope.values.get("mrope_section")) is not None:
            whole = isinstance(found, list) and len(found) == 3 and all(type(n) is int and n > 0 for n in found)
            if not whole or found[0] != found[1] or sum(found) != pairs:
                raise rope.error("mrope_section", f"[h, w, t] of which h = w and the sum is {pairs}")
            return found[2], found[0], found[1]
    t = config.integer("freq_allocation", 1, pairs - 2, default=20)
    if (pairs - t) % 2:
        raise config.error("freq_allocation", f"a number that leaves an even part of a head's {pairs} pairs")
    return t, (pairs - t) // 2, (pairs - t) // 2


def parse_vision(merged: dict[str, Any], where: str, head_dim: int, vocab: int) -> VisionConfig:
    """Check the vision half of config.json; raises ConfigError."""
    config = JsonObject(merged, where)
    _refuse(config)
    if not isinstance(merged.get("vision_config"), dict):
        raise config.error("vision_config", "an object")
    tower = _child(config, "vision_config")
    for key, expected in (
        ("in_channels", 3),
        ("spatial_merge_size", 2),
        ("temporal_merge_size", 2),
        ("hidden_act", "quick_gelu"),
    ):
        tower.only(key, (expected,))
    width = tower.integer("embed_dim" if "embed_dim" in tower.values else "hidden_size", 1, MAX_SIZE)
    heads = tower.integer("num_heads", 1, width)
    if width % heads or width // heads % 4:
        raise tower.error("num_heads", f"a divisor of {width} that leaves a multiple of 4: RoPE turns rows and columns")
    widths = _pair(config, "moe_intermediate_size")
    if widths is None:
        raise config.error("moe_intermediate_size", "a list of two: of text and of vision experts")
    names = ("image_token_id", "im_patch_id")
    placeholder = next((name for name in names if merged.get(name) is not None), "im_patch_id")
    return VisionConfig(
        expert_width=JsonObject({"moe_intermediate_size": widths[1]}, where).integer(
            "moe_intermediate_size", 1, MAX_SIZE
        ),
        sections=_sections(config, head_dim),
        placeholder=config.integer(placeholder, 0, vocab - 1, default=min(PLACEHOLDER, vocab - 1)),
        marks=(
            config.integer("image_start_token_id", 0, vocab - 1, default=min(FIRST_MARK, vocab - 1)),
            config.integer("video_end_token_id", 0, vocab - 1, default=min(LAST_MARK, vocab - 1)),
        ),
        depth=tower.integer("depth", 1, 512),
        width=width,
        heads=heads,
        mlp_width=tower.integer(
            "intermediate_size", 1, MAX_SIZE, default=tower.integer("mlp_ratio", 1, 64, default=4) * width
        ),
        patch=tower.integer("patch_size", 1, 1024, default=14),
    )


def _processor(folder: Path, names: tuple[str, ...], child: str) -> JsonObject | None:
    """The first of these files, or the part of it that a file of several processors has for this one."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None
    config = JsonObject(read_object(path, ConfigError), path.name)
    return _child(config, child) if child in config.values else config


def _pixels(config: JsonObject, low: int, high: int) -> tuple[int, int]:
    """The least and the most pixels of an image, under the names that transformers 4 and 5 give them."""
    size = _child(config, "size")
    low = size.integer("shortest_edge", 1, MAX_PIXELS, default=config.integer("min_pixels", 1, MAX_PIXELS, default=low))
    most = config.integer("max_pixels", low, MAX_PIXELS, default=high)
    return low, size.integer("longest_edge", low, MAX_PIXELS, default=most)


def read_preprocessor(folder: Path) -> Preprocessor:
    """The image numbers of preprocessor_config.json, or of processor_config.json, or ERNIE's own; the video's."""
    config = _processor(folder, ("preprocessor_config.json", "processor_config.json"), "image_processor")
    default = Preprocessor(video=_video_preprocessor(folder))
    if config is None:
        return default
    pixels = _pixels(config, default.min_pixels, default.max_pixels)
    mean, std = _three(config, "image_mean", default.mean), _three(config, "image_std", default.std)
    return Preprocessor(*pixels, mean, std, default.video)


def _video_preprocessor(folder: Path) -> VideoPreprocessor | None:
    """The video's numbers of video_preprocessor_config.json or processor_config.json; None if neither has any."""
    config = _processor(folder, ("video_preprocessor_config.json", "processor_config.json"), "video_processor")
    if config is None or config.where == "processor_config.json":
        return None
    default = VideoPreprocessor()
    config.only("temporal_patch_size", (2,))
    least = config.integer("min_frames", 1, MAX_FRAMES, default=default.min_frames)
    return VideoPreprocessor(
        *_pixels(config, default.min_pixels, default.max_pixels),
        least,
        config.integer("max_frames", least, MAX_FRAMES, default=max(least, default.max_frames)),
        config.number("fps") if "fps" in config else default.fps,
        config.boolean("draw_on_frames", default=default.draw_time),
    )


def _three(config: JsonObject, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A number per colour."""
    value = config.values.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(type(x) in (int, float) and x > 0 for x in value):
        raise config.error(key, "three numbers above 0")
    return tuple(float(x) for x in value)
