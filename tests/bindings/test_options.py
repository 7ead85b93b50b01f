"""Options of `Llama`: placement, KV cache types, adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from ernie_llama import Llama
from ernie_llama._engine import params

from .test_completion import PROMPT, text

pytestmark = pytest.mark.build

LONG = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 2


def greedy(llm: Llama, prompt: str = PROMPT, n: int = 32) -> str:
    return text(llm(prompt, max_tokens=n, temperature=0))


@pytest.mark.parametrize(("kv", "size"), [("f16", 2.0), ("q8_0", 34 / 32), (8, 34 / 32), ("Q4_0", 18 / 32)])
def test_the_kv_cache_has_the_requested_type(bf16: str, kv: int | str, size: float) -> None:
    """The cache of a token: keys and values of 3 layers with 2 heads of 64."""
    with Llama(bf16, n_threads=1, type_k=kv, type_v=kv) as llm:
        llm.eval([5] * 128)
        cache = 128 * 3 * 2 * 64 * 2 * size
        assert cache < llm.save_state().llama_state_size < cache * 1.1 + 8192


def test_a_quantized_v_cache_needs_flash_attention(bf16: str) -> None:
    with pytest.raises(ValueError, match=r"no context of 512 tokens can be made: .*V cache.*flash"):
        Llama(bf16, n_threads=1, type_v="q8_0", flash_attn=False)


def test_flash_attention_changes_little(bf16: str) -> None:
    logits = []
    for flash_attn in (True, False):
        with Llama(bf16, n_threads=1, flash_attn=flash_attn) as llm:
            llm.eval(llm.tokenize(LONG.encode()))
            logits.append(llm.logits)
    np.testing.assert_allclose(logits[0], logits[1], atol=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"n_cpu_moe": 2},
        {"tensor_buft_overrides": {r"blk\.1\.ffn_.*_exps": "CPU"}},
        {"tensor_buft_overrides": "ffn_down_exps=CPU,attn_q=CPU"},
        {"split_mode": "none", "main_gpu": 0},
        {"split_mode": 2, "tensor_split": [1.0]},
        {"use_mmap": False},
        {"n_gpu_layers": -1, "offload_kqv": False},
    ],
    ids=str,
)
def test_placement_does_not_change_the_text(bf16: str, llm: Llama, options: dict[str, object]) -> None:
    with Llama(bf16, n_threads=1, **options) as placed:  # type: ignore[arg-type]  # options of several types
        assert greedy(placed) == greedy(llm)


def test_the_experts_of_the_first_layers_go_to_the_cpu(bf16: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Llama(bf16, n_threads=1, n_cpu_moe=2, verbose=True):
        pass
    said = capfd.readouterr().err
    assert "blk.1.ffn_gate_exps.weight" in said
    assert "buffer type overridden to CPU" in said
    assert "blk.2.ffn_gate_exps.weight" not in "".join(line for line in said.splitlines() if "overridden" in line)
    Llama(bf16, n_threads=1).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type_k": "q2"}, r"type_k is 'q2', expected one of f32 \(0\), f16 \(1\)"),
        ({"type_v": 180}, "type_v is 180, expected one of"),
        ({"split_mode": "rows"}, r"split_mode is 'rows', expected one of none \(0\), layer \(1\)"),
        ({"n_cpu_moe": -1}, "n_cpu_moe is -1, expected at least 0"),
        ({"tensor_buft_overrides": {"x": "CUDA7"}}, "there is no buffer type 'CUDA7'; there are CPU"),
        ({"tensor_buft_overrides": "x"}, "tensor_buft_overrides: found 'x', expected PATTERN=BUFFER_TYPE"),
        ({"tensor_split": [1.0] * 1000}, "tensor_split has 1000 shares, llama.cpp knows at most"),
        ({"lora_path": "nowhere.gguf"}, "nowhere.gguf does not exist"),
    ],
)
def test_invalid_options_are_refused(bf16: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama(bf16, n_threads=1, **options)  # type: ignore[arg-type]  # options of several types


def test_a_bad_pattern_is_refused(bf16: str) -> None:
    with pytest.raises(ValueError, match=r"tensor_buft_overrides: '[(]' is not a valid regular expression"):
        Llama(bf16, n_threads=1, tensor_buft_overrides={"(": "CPU"})


def lora(path: Path, scale: float) -> Path:
    """An adapter of the query projection of block 0, made of noise."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "ernie4_5-moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", rng.normal(size=(4, 256)).astype(np.float32) * scale)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", rng.normal(size=(256, 4)).astype(np.float32) * scale)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_lora_adapter_changes_the_logits_by_its_scale(bf16: str, llm: Llama, tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora.gguf", 0.1)
    tokens = llm.tokenize(LONG.encode())
    llm.eval(tokens)
    plain = llm.logits
    with Llama(bf16, n_threads=1, lora_path=adapter, lora_scale=0.0) as off:
        off.eval(tokens)
        np.testing.assert_allclose(off.logits, plain, atol=1e-3)
    with Llama(bf16, n_threads=1, lora_path=adapter) as on:
        on.eval(tokens)
        assert np.abs(on.logits - plain).max() > 0.1


def test_a_file_that_is_not_an_adapter_is_refused(bf16: str) -> None:
    with pytest.raises(ValueError, match=r"the LoRA adapter .* cannot be loaded: "):
        Llama(bf16, n_threads=1, lora_path=bf16)


def n_decoded(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that collects the number of tokens of every later evaluation."""
    counts: list[int] = []
    decode = llm._ctx.decode

    def counting(tokens: list[int], n_past: int, n_outputs: int) -> None:
        counts.append(len(tokens))
        decode(tokens, n_past, n_outputs)

    monkeypatch.setattr(llm._ctx, "decode", counting)
    return counts


def test_an_unreachable_rpc_server_is_refused(bf16: str, llama_bin: Path) -> None:
    if (llama_bin / "libggml-rpc.so").exists():
        pattern = r"no RPC server answers at 127.0.0.1:1 .*: start `ggml-rpc-server"
    else:
        pattern = "this libllama has no RPC backend: build it with -DGGML_RPC=ON"
    with pytest.raises(ValueError, match=pattern):
        Llama(bf16, rpc_servers="127.0.0.1:1")


def test_the_expert_pattern_is_that_of_llama_cpp() -> None:
    assert params.EXPERTS.format(layer=3) == r"blk\.3\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def test_import_is_quick() -> None:
    """The import loads neither numpy, jinja2 nor the library; it takes 100 ms on an idle machine."""
    code = "import sys; before = set(sys.modules); import ernie_llama; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "jinja2", "rich", "typer", "gguf", "asyncio"} & set(done.stdout.split())
