"""What a checkpoint holds, for `inspect`: its configuration and its tensors, from headers alone."""

from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ..checkpoint.config import ErnieConfig, read_config
from ..checkpoint.shards import TensorHeader, read_headers
from ..report import by_type, right, table, whole
from ..units import human
from .source import Place


def _config(config: ErnieConfig) -> dict[str, Any]:
    """Sizes, without the parts that this checkpoint lacks."""
    values = asdict(config)
    found: dict[str, Any] = {"architecture": values.pop("arch")}
    return found | {key: value for key, value in values.items() if value is not None}


def _label(place: Place) -> str:
    return str(place.name or place.folder)


def _dtypes(headers: dict[str, TensorHeader]) -> dict[str, dict[str, Any]]:
    """Totals per dtype as it is stored: of packed matrices the numbers are those of the stored bytes."""
    elements = dict.fromkeys(headers, 1)
    for name, header in headers.items():
        for n in header.shape:
            elements[name] *= n
    return by_type((header.dtype, elements[name], header.nbytes) for name, header in headers.items())


def checkpoint_json(place: Place) -> dict[str, Any]:
    """For --json."""
    config, headers = read_config(place.folder, text_only=True), read_headers(place.folder)
    return {
        "checkpoint": _label(place),
        "commit": place.repository.commit if place.repository else None,
        "config": _config(config),
        "bytes": place.shard_bytes,
        "dtypes": _dtypes(headers),
        "tensors": [
            {
                "name": name,
                "shape": list(header.shape),
                "dtype": header.dtype,
                "bytes": header.nbytes,
                "file": header.path.name,
            }
            for name, header in headers.items()
        ],
    }


def checkpoint_table(place: Place) -> list[RenderableType]:
    """For people."""
    found = checkpoint_json(place)
    sizes = table(whole("config.json"), "value")
    for key, value in found["config"].items():
        if not isinstance(value, dict):
            sizes.add_row(Text(key), Text(str(value)))
        for inner, each in value.items() if isinstance(value, dict) else ():
            sizes.add_row(Text(f"{key}.{inner}"), Text(str(each)))
    tensors = table(whole("tensor"), right("shape"), "dtype", right("size"))
    for tensor in found["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        tensors.add_row(Text(tensor["name"]), shape, tensor["dtype"], human(tensor["bytes"]))
    dtypes = table("dtype", right("tensors"), right("numbers"), right("size"))
    for dtype, entry in found["dtypes"].items():
        dtypes.add_row(dtype, str(entry["tensors"]), f"{entry['elements']:,}", human(entry["bytes"]))
    total = f"{found['checkpoint']}: {len(found['tensors'])} tensors, {human(found['bytes'])}"
    return [sizes, "", tensors, "", dtypes, "", Text(total)]
