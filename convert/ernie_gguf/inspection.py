"""What `inspect` prints of a GGUF file: rich tables for people, a dictionary for --json."""

import json
import re
from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .gguf_file.reader import GgufFile
from .gguf_file.types import MIX_KEY
from .tables import bpw, by_type, right, shape_of, table, types_table, whole
from .units import human

_LONG_LIST = 8  # metadata lists above this are shown by their length
_LONG_TEXT = 120


def _size_of(file: GgufFile) -> int:
    """Bytes of all files of a model."""
    return sum(path.stat().st_size for path in {file.path, *(tensor.path for tensor in file.tensors)})


def file_json(file: GgufFile) -> dict[str, Any]:
    """A GGUF file for --json: metadata whole, tensors with absolute offsets."""
    types = by_type((tensor.type_name, tensor.elements, tensor.nbytes) for tensor in file.tensors)
    return {
        "file": str(file.path),
        "version": file.version,
        "bytes": _size_of(file),
        "metadata": file.metadata,
        "tensors": [
            {
                "name": tensor.name,
                "ne": list(tensor.ne),
                "type": tensor.type_name,
                "offset": tensor.offset,
                "bytes": tensor.nbytes,
                "bpw": round(8 * tensor.nbytes / tensor.elements, 4),
            }
            for tensor in file.tensors
        ],
        "types": types,
        "bits_per_weight": bpw(types),
    }


_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")


def experts_by_layer(tensors: Iterable[tuple[str, str, int]]) -> Table | None:
    """(name, type, bytes) of tensors -> the types of the experts, a row per run of layers that have the same.

    None if there are no experts.
    """
    layers: dict[int, dict[str, str]] = {}
    sizes: dict[int, int] = {}
    for name, type_name, nbytes in tensors:
        if match := _EXPERT.fullmatch(name):
            layer = int(match[1])
            layers.setdefault(layer, {})[match[2]] = type_name
            sizes[layer] = sizes.get(layer, 0) + nbytes
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layers[runs[-1][-1]] == layers[layer]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    rows = table("layers", "gate", "up", "down", right("size"))
    for run in runs:
        types = (layers[run[0]].get(projection, "") for projection in ("gate", "up", "down"))
        name = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
        rows.add_row(name, *types, human(sum(sizes[layer] for layer in run)))
    return rows if runs else None


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > _LONG_LIST:
        return f"[{len(value)} values]"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _LONG_TEXT else f"{text[:_LONG_TEXT]}… ({len(text)} characters)"


def file_table(file: GgufFile) -> list[RenderableType]:
    """A GGUF file for people."""
    metadata = table(whole("key"), "value")
    for key, value in file.metadata.items():
        metadata.add_row(Text(key), Text(_brief(value)))
    tensors = table(whole("tensor"), right("ne"), "type", right("size"), right("bits/weight"))
    for tensor in file.tensors:
        bits = f"{8 * tensor.nbytes / tensor.elements:.4g}"
        tensors.add_row(Text(tensor.name), shape_of(tensor.ne), tensor.type_name, human(tensor.nbytes), bits)
    types = by_type((tensor.type_name, tensor.elements, tensor.nbytes) for tensor in file.tensors)
    experts = (
        experts_by_layer((t.name, t.type_name, t.nbytes) for t in file.tensors) if MIX_KEY in file.metadata else None
    )
    size = f"{human(_size_of(file))}, {bpw(types):.4g} bits per weight"
    total = f"{file.path}: GGUF version {file.version}, {len(file.tensors)} tensors, {size}"
    mix: list[RenderableType] = [experts, ""] if experts else []
    return [metadata, "", tensors, "", *mix, types_table(types), "", Text(total)]
