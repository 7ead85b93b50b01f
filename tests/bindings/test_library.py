"""Where the library is searched, and the errors if it is not found. These tests need no library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ernie_llama import LibraryNotFoundError
from ernie_llama._lib import library

VARIABLES = ("ERNIE_LLAMA_LIB_PATH", "LLAMA_CPP_LIB_PATH")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(library, "CHECKOUT_BIN", tmp_path / "checkout")
    monkeypatch.setattr(library, "has_nvidia_device", lambda: False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def library_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    file = folder / library.LIBRARY_NAME
    file.write_bytes(b"not really")
    return file


def test_the_order_is_variable_variable_package_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, theirs, package, checkout = (
        library_in(tmp_path / name) for name in ("ours", "theirs", "package/lib", "checkout")
    )
    monkeypatch.setenv("ERNIE_LLAMA_LIB_PATH", str(ours.parent))
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(theirs.parent))
    assert library.find()[1] == ours
    monkeypatch.delenv("ERNIE_LLAMA_LIB_PATH")
    assert library.find()[1] == theirs
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH")
    assert library.find()[1] == package
    package.unlink()
    assert library.find()[1] == checkout


def test_what_the_user_built_goes_before_the_package_and_gpus_before_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = library_in(tmp_path / "package" / "lib")
    cpu, cuda = (library_in(library.data_folder() / name) for name in ("cpu", "cuda"))
    assert library.find()[1] == cpu
    vulkan = library_in(library.data_folder() / "vulkan")
    assert library.find()[1] == vulkan
    monkeypatch.setattr(library, "has_nvidia_device", lambda: True)
    assert library.find()[1] == cuda
    for file in (cuda, vulkan):
        file.unlink()
        file.parent.rmdir()
    cpu.unlink()
    assert library.find()[1] == package


def test_a_checkout_uses_its_own_build(tmp_path: Path) -> None:
    built = library_in(tmp_path / "build" / "cpu" / "bin")
    library_in(library.data_folder() / "cpu")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "lib").symlink_to(built.parent)
    assert library.find()[1].resolve() == built


def test_a_build_of_another_version_is_named_and_not_used(tmp_path: Path) -> None:
    other = library.data_folder().parent / "0.0.1"
    library_in(other / "cpu-abc")
    (other / "cpu").symlink_to("cpu-abc")
    with pytest.raises(LibraryNotFoundError, match=rf"{other}/cpu \(.*\): of version 0.0.1, not this one"):
        library.find()


def test_a_variable_may_name_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = library_in(tmp_path / "x").rename(tmp_path / "libllama-other.so")
    monkeypatch.setenv("ERNIE_LLAMA_LIB_PATH", str(other))
    assert library.find()[1] == other


def test_not_found_lists_every_place(tmp_path: Path) -> None:
    (tmp_path / "package" / "lib").mkdir(parents=True)
    with pytest.raises(LibraryNotFoundError) as raised:
        library.find()
    assert str(raised.value) == (
        f"{library.LIBRARY_NAME} was not found; tried:\n"
        f"  {library.data_folder()}/cpu (built by `ernie-gguf build`): does not exist\n"
        f"  {tmp_path}/package/lib (lib folder of the package): holds no {library.LIBRARY_NAME}\n"
        f"  {tmp_path}/checkout (build of the checkout): does not exist\n"
        "run `ernie-gguf build`, or `make build` in the ernie-gguf checkout, or set ERNIE_LLAMA_LIB_PATH to the "
        "build's bin folder"
    )


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_that_names_no_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    library_in(tmp_path / "package" / "lib")
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(
        LibraryNotFoundError, match=rf"{tmp_path}/nowhere \(environment variable {variable}\)"
    ) as raised:
        library.find()
    assert "package" not in str(raised.value)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a new interpreter: a process keeps the first library that it loads."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


LOAD = """
from ernie_llama import Llama
try:
    Llama({path!r})
except OSError as error:
    print(type(error).__name__, error)
"""


def test_import_needs_neither_library_nor_numpy(tmp_path: Path) -> None:
    done = python(
        "import sys, ernie_llama; ernie_llama.Llama; print('numpy' in sys.modules)",
        ERNIE_LLAMA_LIB_PATH=str(tmp_path / "nowhere"),
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_first_llama_searches_the_library(tmp_path: Path) -> None:
    done = python(LOAD.format(path="model.gguf"), ERNIE_LLAMA_LIB_PATH=str(tmp_path / "nowhere"))
    assert done.stdout.startswith(f"LibraryNotFoundError {library.LIBRARY_NAME} was not found; tried:\n  {tmp_path}")


def test_a_file_that_is_not_a_library_is_named(tmp_path: Path) -> None:
    file = library_in(tmp_path / "broken")
    done = python(LOAD.format(path="model.gguf"), ERNIE_LLAMA_LIB_PATH=str(file))
    assert done.stdout.startswith(f"OSError {file} cannot be loaded: ")


def test_a_library_of_another_version_is_refused_with_the_missing_names() -> None:
    import _ctypes

    done = python(LOAD.format(path="model.gguf"), ERNIE_LLAMA_LIB_PATH=_ctypes.__file__)
    assert done.stdout.startswith(
        f"OSError {_ctypes.__file__} is not the version of llama.cpp that these bindings need: "
        "it lacks llama_backend_init, llama_log_set, "
    )
    assert "build that version with `ernie-gguf build`" in done.stdout
