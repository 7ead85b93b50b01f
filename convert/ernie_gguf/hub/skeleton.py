"""A folder that looks like a checkpoint to every reader of headers: the small files whole, of each shard the header.

The shards are sparse files of their true sizes, so a checkpoint of 600 GB takes a few megabytes of disk, and what reads
folders plans a repository without knowing of it.
"""

import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint.shards import INDEX_NAME, MAX_HEADER_BYTES, SINGLE_NAME
from .names import HubError
from .repository import RemoteFile, Repository

# What a conversion, a quantization or a check reads of a repository beside the shards.
SMALL = (
    *(
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        INDEX_NAME,
    ),
    *("tokenizer.model", "tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json"),
)
TEMPLATES = "additional_chat_templates/"
FIRST = 1 << 18  # bytes; of the 21B and the 2-bit 300B most headers are shorter


def small_files(repository: Repository) -> list[str]:
    """The small files that the repository has."""
    templates = [path for path in repository.files if path.startswith(TEMPLATES) and path.endswith(".jinja")]
    return [path for path in SMALL if path in repository.files] + templates


def shards(repository: Repository) -> list[RemoteFile]:
    """The safetensors files that hold the weights, by the rules of `checkpoint.shards`.

    Raises:
        HubError: there is none; says what there is instead.
    """
    files = repository.files
    if SINGLE_NAME in files:
        return [files[SINGLE_NAME]]
    found = sorted(path for path in files if path.endswith(".safetensors") and "/" not in path)
    if found:
        return [files[path] for path in found]
    raise HubError(f"{repository.name}: no safetensors file{_instead(files)}")


def _instead(files: Iterable[str]) -> str:
    """What a repository without safetensors holds."""
    endings = {".gguf": "GGUF", ".pdparams": "Paddle's own (.pdparams)", ".bin": "PyTorch's", ".nemo": "NeMo's"}
    names = list(files)
    inside = next((name for name in names if name.endswith(".safetensors")), None)
    if inside is not None:
        return f" at its top, only in folders ({inside}): a split for several GPUs?"
    kinds = [kind for ending, kind in endings.items() if any(name.endswith(ending) for name in names)]
    held = f"; it holds {' and '.join(kinds)} files" if kinds else f"; it holds {len(names)} other files"
    hint = ", which need no conversion: download one and run it" if kinds == ["GGUF"] else ""
    return f"{held}{hint}"


def read_header(repository: Repository, shard: RemoteFile) -> bytes:
    """The beginning of a shard: its header, and the 8 bytes before it that give the length."""
    begin = bytearray()
    repository.read(shard.path, 0, min(FIRST, shard.nbytes), begin.extend)
    if len(begin) < 8:
        return bytes(begin)  # the reader of shards says what is wrong
    length = 8 + struct.unpack("<Q", begin[:8])[0]
    if length > min(MAX_HEADER_BYTES + 8, shard.nbytes):
        return bytes(begin)
    if length > len(begin):
        repository.read(shard.path, len(begin), length, begin.extend)
    return bytes(begin[:length])


def make(repository: Repository, parent: Path, check: Callable[[Path], object]) -> Path:
    """The skeleton, in folders named as those of a download cache, so that a model gets the repository's name.

    `check` sees the folder before the shards are looked at: a model that nobody can convert costs no more requests.
    """
    if "config.json" not in repository.files:
        raise HubError(f"{repository.name}: config.json is missing: not a checkpoint in the form of transformers")
    owner, name = repository.name.repo.split("/")
    folder = parent / f"models--{owner}--{name}" / "snapshots" / repository.commit
    folder.mkdir(parents=True)
    for path in small_files(repository):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(repository.small(path).read_bytes())
    for path in repository.files:
        if "/" in path and path.startswith("rank"):  # of a repository that was split for several GPUs
            (folder / path.split("/", 1)[0]).mkdir(exist_ok=True)
    check(folder)
    for shard in shards(repository):
        with (folder / shard.path).open("wb") as file:
            file.write(read_header(repository, shard))
            file.truncate(shard.nbytes)
    return folder
