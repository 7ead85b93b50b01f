"""SRC as people give it -> the folder of a checkpoint, or what it is instead and what to do with it."""

import re
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..recognise import HEAD_BYTES, what_is
from .json_object import read_object

_URL = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_CACHED = "models--"  # how the Hub's cache calls the folder of a repository
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z", ".rar", ".bz2")


def checkpoint_folder(source: Path) -> Path:
    """The folder that `source` means. Raises CheckpointError that says what it is, if it is not a folder."""
    if _URL.match(str(source)):
        return _from_address(source)
    if source.is_file():
        raise CheckpointError(_file(source))
    if not source.exists():
        if _HUB_ID.fullmatch(str(source)) and not source.parent.exists():
            return _from_hub(str(source))
        raise CheckpointError(f"{source}: no such folder; expected a checkpoint folder with config.json")
    repository = source.parent if source.name == "snapshots" else source
    cached = repository.name.startswith(_CACHED) or (repository / "snapshots").is_dir()
    return _snapshot(repository) if cached and not (source / "config.json").exists() else source


def _from_hub(name: str) -> Path:
    repository = name.partition("@")[0]
    raise CheckpointError(
        f"{name}: no such folder; if it is a name on the Hugging Face Hub, download it first, "
        f"`hf download {repository} --local-dir {repository.rpartition('/')[2]}`, and give that folder"
    )


def _from_address(source: Path) -> Path:
    raise CheckpointError(f"{source}: this is an address: download the repository and give its folder")


def _file(path: Path) -> str:
    """What a file is that was given in place of a folder."""
    try:
        with path.open("rb") as file:
            what = what_is(file.read(HEAD_BYTES))
    except OSError as exc:
        return f"{path}: {exc.strerror}"
    if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".bin", ".pdparams"):
        return f"{path}: this is one file of a checkpoint; give its folder, {path.parent}"
    return f"{path}: this is {what or 'a file'}; SRC is the folder of a checkpoint"


def _snapshot(repository: Path) -> Path:
    """The checkpoint in a repository's folder of the Hub's cache: what `main` points to, else the only one."""
    found = sorted(path for path in (repository / "snapshots").glob("*") if path.is_dir())
    try:
        main = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        main = ""
    named = [path for path in found if path.name == main]
    if len(chosen := named or found) == 1:
        return chosen[0]
    if not found:
        raise CheckpointError(f"{repository}: a folder of the Hub's cache without a snapshot: download it again")
    raise CheckpointError(
        f"{repository}: a folder of the Hub's cache with {len(found)} snapshots; give one: {', '.join(map(str, found))}"
    )


def why_no_checkpoint(folder: Path) -> str | None:
    """What a folder holds that lacks config.json or safetensors, and what to do with it; None if that is unknown."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as exc:
        return exc.strerror
    return next((what for kind in _KINDS if (what := kind(folder, names)) is not None), None)


def _ending(names: list[str], *endings: str) -> str | None:
    return next((name for name in names if name.lower().endswith(endings)), None)


def _empty(_: Path, names: list[str]) -> str | None:
    return None if [name for name in names if not name.startswith(".")] else "the folder is empty"


def _adapter(folder: Path, names: list[str]) -> str | None:
    if "adapter_config.json" not in names or "config.json" in names:
        return None
    base = read_object(folder / "adapter_config.json", CheckpointError).get("base_model_name_or_path")
    return (
        f"this is a LoRA adapter{f' of {base}' if isinstance(base, str) and base else ''}, not a model: merge it into "
        "its base (peft: merge_and_unload, then save_pretrained) and convert the result; or make a GGUF of it with "
        "llama.cpp's convert_lora_to_gguf.py"
    )


def _cache(_: Path, names: list[str]) -> str | None:
    repository = next((name for name in names if name.startswith(_CACHED)), None)
    return repository and f"this is a cache of the Hub; give one of its folders, such as {repository}"


def _unfinished(folder: Path, names: list[str]) -> str | None:
    parts = _ending(names, ".incomplete", ".part", ".crdownload", ".aria2", ".download")
    hidden = next((folder / ".cache" / "huggingface" / "download").glob("*.incomplete"), None)
    name = parts or (hidden and hidden.name)
    return f"a download is not finished ({name}): run it again" if name else None


def _deeper(folder: Path, _: list[str]) -> str | None:
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if not inner or (folder / "config.json").exists():
        return None
    return f"config.json is in {inner[0]}; give that folder" + (f" ({len(inner)} such)" if len(inner) > 1 else "")


def _gguf(_: Path, names: list[str]) -> str | None:
    name = _ending(names, ".gguf")
    return name and f"there is a GGUF file instead, {name}, which is converted already: llama.cpp's programs take it"


def _other_weights(_: Path, names: list[str]) -> str | None:
    """Weights of other formats, where there are no safetensors."""
    if _ending(names, ".safetensors"):
        return None
    kinds: tuple[tuple[tuple[str, ...], str], ...] = (
        ((".pdparams", ".pdiparams"), "Paddle's pickles; the -PT and the -Paddle repositories have safetensors"),
        (
            (".bin", ".pt", ".pth", ".ckpt"),
            "pickles of PyTorch, which can run code and are not read: load them with transformers and save the model "
            "with save_pretrained, or take the repository's safetensors",
        ),
        ((".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".nemo"), "weights in another format: take the safetensors"),
        (_ARCHIVES, "an archive: unpack it"),
    )
    for endings, what in kinds:
        if name := _ending(names, *endings):
            return f"there are no safetensors, only {name}: {what}"
    return None


_KINDS: tuple[Callable[[Path, list[str]], str | None], ...] = (
    *(_empty, _adapter, _cache, _unfinished, _deeper, _other_weights, _gguf),
)
