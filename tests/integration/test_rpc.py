"""llama.cpp's RPC backend with ccq2 files: layers split over two rpc-servers on loopback write the same text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import llama_completion
from support.servers import accepts, free_port, running

pytestmark = pytest.mark.build

PROMPTS = ("def main():", "import os\n")
# A server multiplies q8_0 without the repacking of the local CPU backend, which rounds activations differently: the
# perplexity of ernie-tiny in ccq2 differs by .1 %, with llama.cpp's --no-repack by nothing. So near ties fall
# differently; bf16 is not repacked, and is sampled from too.
COMPLETE = """
import sys
from ernie_llama import Llama, info
model, servers, *prompts = sys.argv[1:]
with Llama(model, n_ctx=512, n_threads=1, rpc_servers=servers, n_gpu_layers=-1 if servers else 0) as llm:
    for prompt in prompts:
        print(repr(llm(prompt, max_tokens=32, temperature=0)["choices"][0]["text"]))
        if "bf16" in model:
            print(repr(llm(prompt, max_tokens=32, seed=42)["choices"][0]["text"]))
print([device.name for device in info().devices if "RPC" in device.name], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def servers(llama_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The addresses of two rpc-servers."""
    program = llama_bin / "ggml-rpc-server"
    if not program.exists():
        pytest.skip(f"{program} is not built: configure llama.cpp with -DGGML_RPC=ON")
    folder = tmp_path_factory.mktemp("rpc")
    ports = [free_port(), free_port()]
    commands: list[list[str | Path]] = [[program, "-H", "127.0.0.1", "-p", str(port), "-t", "1"] for port in ports]
    with (
        running(commands[0], folder / "first.log", lambda: accepts(ports[0])),
        running(commands[1], folder / "second.log", lambda: accepts(ports[1])),
    ):
        yield ",".join(f"127.0.0.1:{port}" for port in ports)


@pytest.mark.parametrize("gguf", ["tiny_ccq2_gguf", "tiny_bf16_gguf"])
def test_two_servers_share_the_layers_and_write_the_same(
    llama_bin: Path, request: pytest.FixtureRequest, gguf: str, servers: str
) -> None:
    model = request.getfixturevalue(gguf)
    # As on the servers: the AMX kernels of a CPU that has them round otherwise.
    alone = llama_completion(llama_bin, model, PROMPTS[0], 32, "--temp", "0", "--no-repack")
    shared = llama_completion(llama_bin, model, PROMPTS[0], 32, "--temp", "0", "-v", "--rpc", servers, "-ngl", "99")
    assert shared.stdout == alone.stdout
    assert len(shared.stdout) > 20
    layers = re.findall(r"layer +\d+ assigned to device (\w+)", shared.stderr)
    assert layers[-4:] == ["RPC0", "RPC0", "RPC1", "RPC1"]  # three layers and the output
    for server in servers.split(","):
        assert re.search(rf"RPC\d\[{server}\] model buffer size = +[1-9]", shared.stderr)


@pytest.mark.parametrize("gguf", ["tiny_ccq2_gguf", "tiny_bf16_gguf"])
@pytest.mark.usefixtures("built_library")
def test_the_bindings_do_it_too(request: pytest.FixtureRequest, gguf: str, servers: str) -> None:
    def write(where: str) -> subprocess.CompletedProcess[str]:
        # A process of its own: servers stay for the rest of a process.
        command = [sys.executable, "-c", COMPLETE, str(request.getfixturevalue(gguf)), where, *PROMPTS]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    # A server's kernels are the same for all layers; those of this process may be AMX's, which round otherwise.
    shared, alone = write(servers), write(servers.split(",", maxsplit=1)[0])
    assert shared.stdout == alone.stdout
    assert alone.stderr == "['RPC0']\n"
    assert shared.stderr == "['RPC0', 'RPC1']\n"
