"""Checks a GGUF file's metadata before llama.cpp loads it.

llama.cpp asserts some of what it reads, and a failed assertion ends the Python process. CHECKS repeats those assertions
(llama-model.cpp load_hparams, llama-vocab.cpp, models/ernie4-5*.cpp), so that they become a ValueError. Whatever else
is wrong with a file, llama.cpp refuses it by itself: this module does not judge what it cannot read.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

# GGUF's value types that are single numbers: struct format by type id.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_SIZE = 1 << 20  # far above any model; products of two sizes stay within 64 bits, and rows within memory
ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")
MMPROJ = "clip"  # the architecture of every mmproj
# What an mmproj of ERNIE-4.5-VL holds (docs/formats.md): of each block, and once. llama.cpp takes any as optional.
VISION_BLOCK = ("ln1", "attn_qkv", "attn_out", "ln2", "ffn_up", "ffn_down")
VISION_ONCE = (
    "v.post_ln",
    "mm.model.fc",
    *(f"mm.{way}.{part}" for way in ("spatial", "temporal") for part in ("fc1", "fc2", "norm")),
)
VISION_WEIGHTS = ("v.patch_embd.weight", "mm.post_norm.weight")  # that have no bias
SIZES = (
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)


class _Reader:
    """Reads values one after the other; struct.error or IndexError at the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def number(self, code: str) -> Any:  # noqa: ANN401 - int, float or bool
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def text(self) -> bytes:
        size = self.number("Q")
        if self._at + size > len(self._data):
            raise IndexError
        self._at += size
        return self._data[self._at - size : self._at]

    def value(self, value_type: int) -> Any:  # noqa: ANN401
        if value_type == STRING:
            return self.text()
        if value_type != ARRAY:
            return self.number(SCALARS[value_type])
        value_type, n = self.number("I"), self.number("Q")
        if value_type == STRING:
            return [self.text() for _ in range(n)]
        code = SCALARS[value_type]
        size = n * struct.calcsize("<" + code)
        if self._at + size > len(self._data):
            raise IndexError
        self._at += size
        return struct.unpack_from(f"<{n}{code}", self._data, self._at - size)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The metadata of a GGUF file by key (numbers, bytes, or sequences of them) and the shapes of its tensors by name.

    Both as far as they can be read.
    """
    values: dict[str, Any] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        try:
            _magic, _version, n_tensors, n_values = (reader.number(code) for code in "IIQQ")
            for _ in range(n_values):
                key = reader.text().decode(errors="replace")
                values[key] = reader.value(reader.number("I"))
            for _ in range(n_tensors):
                name = reader.text().decode(errors="replace")
                tensors[name] = tuple(reader.number("Q") for _dimension in range(reader.number("I")))
                reader.number("I"), reader.number("Q")  # type, offset
        except (struct.error, IndexError, KeyError, MemoryError, OverflowError):
            pass  # llama.cpp refuses the file, with its own reason
    return values, tensors


class Metadata:
    """The values that checks need. Those of a type that llama.cpp refuses count as absent."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._values = values
        self.tensors = tensors or {}
        architecture = values.get("general.architecture", b"")
        self.architecture = architecture.decode(errors="replace") if isinstance(architecture, bytes) else ""

    def numbers(self, key: str, default: int = 0) -> Sequence[int]:
        """The value of an architecture's key, one per layer or one for all."""
        value = self._values.get(f"{self.architecture}.{key}", default)
        numbers = value if isinstance(value, Sequence) and not isinstance(value, bytes) else [value]
        return [each for each in numbers if type(each) is int] or [default]

    def number(self, key: str, default: int = 0) -> int:
        """The value of an architecture's key."""
        return self.numbers(key, default)[0]

    def real(self, key: str, default: float) -> float:
        """The value of an architecture's key that is not an integer."""
        value = self._values.get(f"{self.architecture}.{key}", default)
        return value if isinstance(value, float) else default

    def text(self, key: str, default: str) -> str:
        """The text of an architecture's key."""
        value = self._values.get(f"{self.architecture}.{key}", default)
        return value.decode(errors="replace") if isinstance(value, bytes) else default

    def tokens(self) -> Sequence[bytes]:
        """The texts of the vocabulary, as llama.cpp sees them: up to a zero byte; it gives empty ones a name."""
        tokens = self._values.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, list) or not all(isinstance(each, bytes) for each in tokens):
            return []
        return [text for text in (token.partition(b"\0")[0] for token in tokens) if text]


def _sizes(of: Metadata) -> str | None:
    for key in SIZES:
        for value in of.numbers(key, 1):
            if not 0 <= value <= MAX_SIZE:
                return f"{key} is {value}, expected at most {MAX_SIZE}"
    return None


def _layers(of: Metadata) -> str | None:
    n, n_nextn = of.number("block_count", 1), of.number("nextn_predict_layers")
    if not 1 <= n <= MAX_LAYERS:
        return f"block_count is {n}, expected 1 to {MAX_LAYERS}"
    if n_nextn > n:
        return f"nextn_predict_layers is {n_nextn}, expected at most block_count, which is {n}"
    return None


def _experts(of: Metadata) -> str | None:
    n, used = of.number("expert_count"), max(of.numbers("expert_used_count"))
    if not 0 <= n <= MAX_EXPERTS:
        return f"expert_count is {n}, expected at most {MAX_EXPERTS}"
    if not min(n, 1) <= used <= n:
        return f"expert_used_count is {used}, expected {min(n, 1)} to expert_count, which is {n}"
    groups, group_used = of.number("expert_group_count"), of.number("expert_group_used_count")
    if groups >= max(n, 1) or (groups > 1 and n % groups):
        return f"expert_group_count is {groups}, expected a divisor of expert_count, which is {n}, and less"
    if groups > 1 and not 0 < group_used < groups:
        return f"expert_group_used_count is {group_used}, expected 1 to {groups - 1}"
    return None


def _heads(of: Metadata) -> str | None:
    n, n_kv = of.number("attention.head_count", 1), of.number("attention.head_count_kv", 1)
    if of.architecture.startswith("ernie4_5"):
        if not 1 <= n_kv <= n or n % n_kv:
            return f"attention.head_count_kv is {n_kv}, expected a divisor of attention.head_count, which is {n}"
        size = of.number("embedding_length") // n
        sizes = [
            of.number("attention.key_length", size),
            of.number("attention.value_length", size),
            of.number("rope.dimension_count", of.number("attention.key_length", size)),
        ]
        if len(set(sizes)) > 1:
            return f"key_length, value_length and rope.dimension_count are {sizes}, expected the same size"
    return None


def _moe_step(of: Metadata) -> str | None:
    step = of.number("interleave_moe_layer_step", 1)
    n = of.number("block_count", 1)
    if of.architecture.startswith("ernie4_5") and not 1 <= step <= n:
        return f"interleave_moe_layer_step is {step}, expected 1 to block_count, which is {n}"
    return None


def _rope(of: Metadata) -> str | None:
    scaling = of.text("rope.scaling.type", "none")
    if scaling not in ROPE_SCALING_TYPES:
        return f"rope.scaling.type is {scaling!r}, expected one of {', '.join(ROPE_SCALING_TYPES)}"
    return None


def _epsilon(of: Metadata) -> str | None:
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if not (value := of.real(key, 0.0)) >= 0.0:  # nor NaN
            return f"{key} is {value}, expected at least 0"
    return None


def _vision(of: Metadata) -> str | None:
    n, width = of.number("vision.attention.head_count", 1), of.number("vision.embedding_length")
    if of.architecture != MMPROJ:
        return f"general.architecture is {of.architecture!r}, expected {MMPROJ!r}, that of an mmproj"
    if n < 1 or width % n:
        return f"vision.attention.head_count is {n}, expected a divisor of vision.embedding_length, which is {width}"
    for key in ("vision.attention.layer_norm_epsilon", "vision.projector.norm_epsilon"):
        if not (value := of.real(key, 0.0)) >= 0.0:  # nor NaN
            return f"{key} is {value}, expected at least 0"
    return None


def _vision_tensors(of: Metadata) -> str | None:
    if of.text("projector_type", "") != "ernie4_5vl":
        return None
    blocks = (f"v.blk.{i}.{part}" for i in range(of.number("vision.block_count")) for part in VISION_BLOCK)
    both = (f"{name}.{kind}" for name in chain(VISION_ONCE, blocks) for kind in ("weight", "bias"))
    missing = next((name for name in chain(VISION_WEIGHTS, both) if name not in of.tensors), None)
    if missing is not None:
        return f"it holds no tensor {missing}"
    width = of.number("vision.embedding_length")
    merged = width * of.number("vision.spatial_merge_size") ** 2
    sizes = (
        ("vision.patch_size", "v.patch_embd.weight", of.number("vision.patch_size")),
        ("vision.embedding_length", "v.post_ln.weight", width),
        ("vision.spatial_merge_size", "mm.spatial.fc1.weight", merged),
        ("vision.projection_dim", "mm.post_norm.weight", of.number("vision.projection_dim")),
    )
    for key, name, size in sizes:
        if of.tensors[name][:1] != (size,):
            return f"{key} asks for a {name} of {size}, found {of.tensors[name]}"
    return None


def _vocabulary(of: Metadata) -> str | None:
    tokens = of.tokens()
    if len(set(tokens)) == len(tokens):
        return None
    seen: set[bytes] = set()
    again = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
    return f"the vocabulary has the token {again.decode(errors='replace')!r} twice"


CHECKS: tuple[Callable[[Metadata], str | None], ...] = (
    _sizes,
    _layers,
    _experts,
    _heads,
    _moe_step,
    _rope,
    _epsilon,
    _vocabulary,
)
MMPROJ_CHECKS = (_vision, _vision_tensors)


def check(
    path: str | os.PathLike[str],
    checks: Sequence[Callable[[Metadata], str | None]] = CHECKS,
    overrides: Mapping[str, bool | int | float | str] | None = None,
) -> None:
    """Check the metadata of a model's GGUF file, or of an mmproj with `MMPROJ_CHECKS`; `overrides` replace values.

    Raises:
        ValueError: llama.cpp would end the process because of a value or a missing tensor; says which and
            what was expected.
    """
    values, tensors = read(path)
    values |= {key: value.encode() if isinstance(value, str) else value for key, value in (overrides or {}).items()}
    metadata = Metadata(values, tensors)
    for problem in (each(metadata) for each in checks):
        if problem:
            raise ValueError(f"{path} cannot be loaded: {problem}; the file is damaged, or not for this llama.cpp")
