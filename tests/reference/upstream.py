"""The other converter as an oracle: upstream's convert_hf_to_gguf.py, and what a GGUF holds in comparable form.

Remake the golden file (what upstream makes of examples/ernie-tiny, for those who have no torch):

    LLAMA_CPP_TREE=... PYTHONPATH=tests:benchmarks:ggml_patch python -m reference.upstream
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
from tree import pinned

from reference.golden import FOLDER, checkpoint_sha256
from reference.specimens import TINY

OUTTYPES = ("f32", "f16", "bf16", "q8_0")
GOLDEN = FOLDER / "upstream-ernie-tiny.json"
LONGEST = 80  # values longer than this are kept as a hash


@dataclass(frozen=True)
class Contents:
    """What a GGUF holds: value types and values by key; type, shape (innermost first) and hash of each tensor by name.

    Trailing ones of a shape are dropped: GGUF readers take [8] and [8, 1] for the same.
    """

    metadata: dict[str, str]
    tensors: dict[str, str]

    @classmethod
    def of(cls, path: Path) -> Contents:
        """Read a file with gguf-py."""
        reader = gguf.GGUFReader(path)
        metadata = {key: _value(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        tensors = {}
        for tensor in reader.tensors:
            shape = [int(n) for n in tensor.shape]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()
            tensors[tensor.name] = f"{tensor.tensor_type.name} {shape} {digest}"
        return cls(metadata, tensors)


def _value(field: gguf.ReaderField) -> str:
    kinds = " ".join(kind.name for kind in field.types)
    text = json.dumps(field.contents(), ensure_ascii=False)
    if len(text) > LONGEST:
        text = f"sha256 of {len(text)} characters of JSON: {hashlib.sha256(text.encode()).hexdigest()}"
    return f"{kinds} {text}"


def convert(tree: Path, checkpoint: Path, outtype: str, outfile: Path) -> Contents:
    """Run upstream's converter, by this Python, from a llama.cpp source tree."""
    command: list[str | Path] = [
        sys.executable,
        tree / "convert_hf_to_gguf.py",
        checkpoint,
        "--outfile",
        outfile,
        "--outtype",
        outtype,
    ]
    # its own gguf-py, not the installed one
    environment = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"convert_hf_to_gguf.py ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return Contents.of(outfile)


def main() -> None:
    """Write golden/upstream-ernie-tiny.json."""
    tree = Path(os.environ["LLAMA_CPP_TREE"])
    with tempfile.TemporaryDirectory() as folder:
        made = {o: asdict(convert(tree, TINY, o, Path(folder) / f"{o}.gguf")) for o in OUTTYPES}
    golden = {
        "made_with": f"convert_hf_to_gguf.py of the llama.cpp in {pinned()[0].removesuffix('.tar.gz')}",
        "checkpoint_sha256": checkpoint_sha256(TINY),
        "outtypes": made,
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
