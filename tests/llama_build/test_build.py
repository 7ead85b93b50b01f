"""`ernie-gguf build` on a small stand-in for llama.cpp: a build that goes well, and everything that can go wrong."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ernie_llama
import pytest
from ernie_gguf.llama_build import build as steps
from ernie_gguf.llama_build import install, recipe, search, tools, vulkan
from support.command_line import Command, snapshot

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")

CMAKE_LISTS = f"""\
cmake_minimum_required(VERSION 3.18)
project(stand_in C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
add_library(llama SHARED llama.c)
foreach(name {" ".join(recipe.PROGRAMS + recipe.TESTS)})
    add_executable(${{name}} main.c)
endforeach()
"""


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that builds are installed in; a series without patches; no npm."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    patches = tmp_path / "package" / "ggml_patch"
    patches.mkdir(parents=True)
    shutil.copy(ROOT / "ggml_patch" / "tree.py", patches)
    encoder = patches / "src" / "ggml" / "src"
    encoder.mkdir(parents=True)
    for path in (ROOT / "ggml_patch" / "src" / "ggml" / "src").glob("ggml-ccq*"):
        shutil.copy(path, encoder)
    (patches / "series").write_text("# none\n")
    (patches / "upstream.txt").write_text(f"llama-cpp-python==0.0.1 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(recipe, "PACKAGE", tmp_path / "package")
    # The encoders take a minute to compile with optimization; `make build` has done so.
    monkeypatch.setattr(search, "FLAGS", ("-std=c++17", "-O0", "-fPIC"))
    return ernie_llama.data_folder()


@pytest.fixture
def _small_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the encoders."""
    (tmp_path / "search.cpp").write_text('extern "C" int search() { return 1; }\n')
    monkeypatch.setattr(search, "SEARCHES", (tmp_path / "search.cpp",))
    (tmp_path / "package" / "ggml_patch" / "src" / "ggml" / "src" / "ggml-ccq-encode.cpp").write_text("")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What is built in place of llama.cpp."""
    folder = tmp_path / "upstream"
    (folder / "ggml" / "include").mkdir(parents=True)
    (folder / "ggml" / "include" / "ggml.h").write_text("")
    (folder / "CMakeLists.txt").write_text(CMAKE_LISTS)
    (folder / "llama.c").write_text("int llama(void) { return 1; }\n")
    (folder / "main.c").write_text("int main(void) { return 0; }\n")
    return folder


@pytest.fixture
def _any_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "check_loads", lambda _: None)


def edit(file: Path, text: str) -> None:
    """Write a file as an editor does, later than every build before."""
    file.write_text(text)
    later = file.stat().st_mtime + 2
    os.utime(file, (later, later))


@pytest.mark.usefixtures("_any_library_loads")
def test_it_is_installed_for_the_user_and_found(source: Path, data: Path, ernie_gguf: Command) -> None:
    done = ernie_gguf("build", "--llama-cpp", source, "--jobs", "2")
    assert (done.code, done.out) == (0, f"{data / 'cpu'}\n"), done.err
    assert "compile 100 %" in done.err
    assert "note: llama-server has no page for browsers" in done.err
    assert (data / "cpu" / "llama-server").is_file()
    assert not (data / "cpu" / "test-backend-ops").exists()
    assert [path.name for path in (data / "search").iterdir()] == ["libccq_search.so"]
    built = json.loads((data / "cpu" / "build.json").read_text())
    assert (built["llama_cpp"], built["flavour"]) == (str(source), "cpu")
    shutil.rmtree(data / "build")  # programs find their libraries without it
    subprocess.run([data / "cpu" / "llama-server"], check=True)


@pytest.mark.usefixtures("_any_library_loads", "_small_search")
def test_a_second_build_replaces_the_first_in_one_step(source: Path, data: Path, ernie_gguf: Command) -> None:
    ernie_gguf("build", "--llama-cpp", source)
    first = (data / "cpu").resolve()
    done = ernie_gguf("build", "--llama-cpp", source)
    assert done.code == 0
    assert "compile" not in done.err  # nothing has changed
    assert (data / "cpu").resolve() != first
    assert not first.exists()


@pytest.mark.usefixtures("_any_library_loads", "_small_search")
def test_the_encoders_are_compiled_once(
    source: Path, data: Path, tmp_path: Path, ernie_gguf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Path] = []
    compile_search = search.compile_search

    def counted(folder: Path) -> Path:
        compiled.append(folder)
        return compile_search(folder)

    monkeypatch.setattr(search, "compile_search", counted)
    for _ in range(2):
        assert ernie_gguf("build", "--llama-cpp", source).code == 0
    assert len(compiled) == 1
    (tmp_path / "search.cpp").write_text('extern "C" int search() { return 2; }\n')
    assert ernie_gguf("build", "--llama-cpp", source).code == 0
    assert len(compiled) == 2
    assert (data / "search" / search.LIBRARY).read_bytes() == (data / "build" / "search" / search.LIBRARY).read_bytes()


def test_a_folder_is_built_in_place_with_the_tests_and_nothing_is_installed(
    source: Path, data: Path, tmp_path: Path, ernie_gguf: Command
) -> None:
    done = ernie_gguf("build", "--llama-cpp", source, "--folder", tmp_path / "b", "--", "-DCMAKE_C_FLAGS=-DX")
    assert (done.code, done.out) == (0, f"{tmp_path / 'b' / 'cpu' / 'bin'}\n")
    assert (tmp_path / "b" / "cpu" / "bin" / "test-backend-ops").is_file()
    assert "CMAKE_C_FLAGS:STRING=-DX" in (tmp_path / "b" / "cpu" / "CMakeCache.txt").read_text()
    assert not data.exists()


def test_an_edit_in_the_tree_is_built(source: Path, tmp_path: Path, ernie_gguf: Command) -> None:
    arguments = ("build", "--llama-cpp", source, "--folder", tmp_path / "b")
    ernie_gguf(*arguments)
    edit(tmp_path / "b" / "llama.cpp" / "main.c", "int main(void) { return 7; }\n")
    ernie_gguf(*arguments)
    assert subprocess.run([tmp_path / "b" / "cpu" / "bin" / "llama-server"], check=False).returncode == 7


@pytest.mark.usefixtures("_any_library_loads", "_small_search")
def test_a_compiler_error_is_one_line_and_the_next_run_goes_on(source: Path, data: Path, ernie_gguf: Command) -> None:
    (source / "main.c").write_text("int main(void) { return nothing; }\n")
    done = ernie_gguf("build", "--llama-cpp", source)
    assert done.code == 1
    assert done.err.count("error: ") == 2  # ours, which quotes the compiler's
    assert "ninja failed: " in done.err
    assert f"its output is in {data / 'build' / 'build-cpu.log'}" in done.err
    assert not (data / "cpu").is_symlink()
    edit(data / "build" / "llama.cpp" / "main.c", "int main(void) { return 0; }\n")
    again = ernie_gguf("build", "--llama-cpp", source)
    assert again.code == 0
    assert "configure" not in again.err


def test_a_library_that_does_not_load_is_not_installed(source: Path, data: Path, ernie_gguf: Command) -> None:
    done = ernie_gguf("build", "--llama-cpp", source)
    assert done.code == 1
    assert "error: the library was built but does not load: OSError: " in done.err
    assert [path.name for path in data.iterdir()] == ["build"]


def test_two_builds_at_once_are_refused(source: Path, data: Path, ernie_gguf: Command) -> None:
    (data / "build").mkdir(parents=True)
    with (data / "build" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = ernie_gguf("build", "--llama-cpp", source)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: another build is running in {data / 'build'}: ")


def program(folder: Path, name: str, output: str) -> None:
    """A program that prints `output`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{output}'\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all of PATH; nothing lies beside this Python."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    return tmp_path / "bin"


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", "apt-get install g++ cmake ninja-build git\n"),
        ("dnf", "dnf install gcc-c++ cmake ninja-build git\n"),
        ("pacman", "pacman -S gcc cmake ninja git\n"),
    ],
)
def test_missing_tools_are_named_with_the_command(path: Path, ernie_gguf: Command, manager: str, command: str) -> None:
    program(path, manager, "")
    done = ernie_gguf("build")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: c++ and cmake and ninja and git not found; {command}"


@pytest.fixture
def _tools(path: Path) -> None:
    for name, output in {"c++": "c++ 12", "cmake": "cmake version 3.25.1", "ninja": "1.11", "git": ""}.items():
        program(path, name, output)


@pytest.mark.usefixtures("_tools")
def test_an_old_cmake_is_named(path: Path, ernie_gguf: Command) -> None:
    program(path, "cmake", "cmake version 3.10.2")
    assert f"error: {path / 'cmake'} has version 3.10, too old: 3.18 is needed" in ernie_gguf("build").err


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        ((11, 5), "80;86"),
        ((12, 4), "80;86;89;90"),
        ((12, 8), "80;86;89;90;120a-real"),
        ((13, 0), "80;86;89;90;120a-real;121a-real"),
    ],
)
def test_every_architecture_that_the_compiler_knows(compiler: tuple[int, int], expected: str) -> None:
    assert tools.every_architecture(compiler) == expected


@pytest.mark.usefixtures("_tools")
def test_cuda_newer_than_the_driver_is_named(path: Path, ernie_gguf: Command) -> None:
    program(path, "nvcc", "Cuda compilation tools, release 13.0, V13.0.48")
    program(path, "nvidia-smi", "| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4 |")
    assert "error: nvcc is of CUDA 13.0, but the driver supports CUDA 12.4 at most" in ernie_gguf("build", "--cuda").err
    tools.check_cuda((12, 8), (12, 4))  # the driver runs a newer minor version
    tools.check_cuda((13, 0), None)  # for another machine


@pytest.mark.usefixtures("_tools")
def test_cuda_without_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ernie_gguf: Command) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "error: nvcc not found; " in ernie_gguf("build", "--cuda").err


@pytest.mark.usefixtures("_tools")
def test_what_vulkan_needs_is_named_with_the_command(path: Path, ernie_gguf: Command) -> None:
    program(path, "apt-get", "")
    (path / "c++").write_text("#!/bin/sh\nexit 1\n")
    assert ernie_gguf("build", "--vulkan").err == (
        "error: glslc and vulkan.hpp and spirv.hpp and libvulkan not found; "
        "apt-get install glslc libvulkan-dev spirv-headers\n"
    )


GLSLC = """\
#!/bin/sh
case "$*" in
    --version) echo "shaderc 2023.2" ;;
    *coopmat2.comp | *integer_dot.comp) echo "error: extension not supported: GL_X" >&2; exit 1 ;;
esac
"""


@pytest.mark.usefixtures("_any_library_loads", "_small_search")
def test_a_build_with_vulkan_says_what_the_shader_compiler_lacks(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ernie_gguf: Command
) -> None:
    program(tmp_path / "bin", "glslc", "")
    (tmp_path / "bin" / "glslc").write_text(GLSLC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(vulkan, "missing_headers", lambda _: [])
    done = ernie_gguf("build", "--vulkan", "--llama-cpp", source)
    assert (done.code, done.out) == (0, f"{data / 'vulkan'}\n"), done.err
    (note,) = [line for line in done.err.splitlines() if "shaderc 2023.2" in line]
    assert f"{vulkan.FEATURES['integer_dot']}; for {vulkan.FEATURES['coopmat2']}. " in note
    assert vulkan.FEATURES["coopmat"] not in note
    assert "-DGGML_VULKAN=ON" in json.loads((data / "vulkan" / "build.json").read_text())["options"]
    (tmp_path / "bin" / "glslc").write_text("#!/bin/sh\n")
    assert "too old" not in ernie_gguf("build", "--vulkan", "--llama-cpp", source).err


def test_headers_are_looked_for_with_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an SDK whose folder VULKAN_SDK names; the other header and the loader are missing."""
    (tmp_path / "include" / "vulkan").mkdir(parents=True)
    (tmp_path / "include" / "vulkan" / "vulkan.hpp").write_text("")
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-lvulkan*) exit 1 ;; esac\nexec c++ -nostdinc "$@"\n')
    compiler.chmod(0o755)
    assert vulkan.missing_headers(str(compiler)) == ["spirv.hpp", "libvulkan"]


def test_cuda_and_vulkan_are_two_builds(ernie_gguf: Command) -> None:
    done = ernie_gguf("build", "--cuda", "--vulkan")
    assert done.code == 2
    assert "two builds" in done.err


@pytest.mark.usefixtures("_tools")
def test_a_full_disk_is_told_beforehand(data: Path, monkeypatch: pytest.MonkeyPatch, ernie_gguf: Command) -> None:
    monkeypatch.setattr(tools, "free_bytes", lambda _: 5 * 10**8)
    done = ernie_gguf("build")
    assert done.err == f"error: {data / 'build'} has 0.5 GB free, and the build takes 1 GB\n"
    assert not data.exists()


def test_without_network_nothing_is_left(data: Path, monkeypatch: pytest.MonkeyPatch, ernie_gguf: Command) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    done = ernie_gguf("build")
    assert done.code == 1
    assert "error: pip could not download llama_cpp_python-0.0.1.tar.gz" in done.err
    assert not list(data.rglob("*.tar.gz"))
    assert not (data / "build" / "llama.cpp").exists()


def test_a_wrong_hash_is_named(data: Path, ernie_gguf: Command) -> None:
    (data / "build").mkdir(parents=True)
    (data / "build" / "llama_cpp_python-0.0.1.tar.gz").write_bytes(b"another file")
    done = ernie_gguf("build")
    assert done.code == 1
    assert "has sha256 " in done.err
    assert f"expected {'0' * 64}" in done.err


@pytest.mark.usefixtures("_any_library_loads", "_small_search")
def test_clean_removes_everything(source: Path, data: Path, ernie_gguf: Command) -> None:
    ernie_gguf("build", "--llama-cpp", source)
    done = ernie_gguf("build", "--clean")
    assert done.out.startswith(f"removed {data.parent}: ")
    assert not data.parent.exists()
    assert ernie_gguf("build", "--clean").code == 0


def test_an_interrupted_build_leaves_what_was_installed(source: Path, data: Path, tmp_path: Path) -> None:
    """SIGTERM during the compilation: one line, exit code 143, and the build of before is still in use."""
    installed = data / "cpu-1"
    installed.mkdir(parents=True)
    (installed / "libllama.so").write_bytes(b"the old one")
    (data / "cpu").symlink_to("cpu-1")
    before = snapshot(installed)
    (source / "CMakeLists.txt").write_text(CMAKE_LISTS + "add_custom_command(TARGET llama PRE_LINK COMMAND sleep 60)\n")
    code = f"""
import sys
from pathlib import Path
from ernie_gguf.llama_build import recipe
recipe.PACKAGE = Path({str(recipe.PACKAGE)!r})
from ernie_gguf.cli import main
sys.argv = ["ernie-gguf", "build", "--llama-cpp", {str(source)!r}]
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "compile" in line:
            process.terminate()
            break
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "error: stopped by SIGTERM" in rest
    assert snapshot(installed) == before
    assert (data / "cpu").resolve() == installed


def test_remove_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").write_bytes(b"1234")
    assert steps.remove(tmp_path / "x") == 4


@pytest.mark.parametrize("flavour", recipe.Flavour)
def test_llama_cpp_takes_the_options(llama_tree: Path, tmp_path: Path, flavour: recipe.Flavour) -> None:
    """Of every flavour, without the GPUs' own code, which needs their tools. The stand-in above takes any option."""
    options = [each for each in recipe.FLAVOUR_OPTIONS[flavour] if each not in {"-DGGML_CUDA=ON", "-DGGML_VULKAN=ON"}]
    options += [f"-DLLAMA_BUILD_{each}=OFF" for each in ("TOOLS", "TESTS", "UI")]
    command = ["cmake", "-S", llama_tree, "-B", tmp_path / "build", *recipe.OPTIONS, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
