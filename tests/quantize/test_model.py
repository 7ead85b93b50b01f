"""The forward pass in torch against transformers' logits (golden files and live), then each piece on its own.

Errors of logits are relative to their spread (standard deviation over the vocabulary) at the same position.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.checkpoint.config import ErnieConfig
from ernie_gguf.checkpoint.shards import ShardReader
from ernie_gguf.convert import prepare
from ernie_gguf.gguf_file.outtype import Outtype
from reference import specimens
from reference.golden import Golden
from support.checkpoints import F32, Spec, from_bf16, make, to_bf16, weights
from support.paddle import make_plain

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`): the forward pass needs it")

import torch
from ernie_gguf.quantize.model import Layer, Weights, embed, expert_hidden, head, rotate

MODELS = ("ernie-tiny", "ernie-mini", "moe-bias", "moe-fused", "dense", "two-bits")
LARGEST = 2e-5  # measured: 3e-6; a zeroed correction bias moves logits by more than the spread


@contextmanager
def opened(checkpoint: Path, device: str = "cpu") -> Iterator[tuple[Weights, ErnieConfig]]:
    job = prepare(checkpoint, Outtype.AUTO)
    with ShardReader() as reader, torch.inference_mode():
        yield Weights(job.plan, reader, device), job.config


def experts_result(weights: Weights, layer: Layer, number: int, h: torch.Tensor) -> torch.Tensor:
    """[T, hidden] -> the weighted sum of each token's experts."""
    out = torch.zeros_like(h)
    chosen, share = layer.route(h)
    for e in chosen.unique().tolist():
        tokens, place = (chosen == e).nonzero(as_tuple=True)
        gate, up, down = (weights.expert(f"blk.{number}.ffn_{p}_exps.weight", e) for p in ("gate", "up", "down"))
        out[tokens] += share[tokens, place, None] * (expert_hidden(h[tokens], gate, up) @ down.T)
    return out


def torch_logits(checkpoint: Path, tokens: list[list[int]], device: str = "cpu") -> F32:
    """[S, L] -> [S, L, vocab]."""
    with opened(checkpoint, device) as (weights, config):
        x = embed(weights, torch.tensor(tokens))
        for number in range(config.layers):
            layer = Layer(weights, config, number)
            x = layer.attend(x)
            h = layer.ffn_norm(x)
            if layer.moe is None:
                x = x + layer.mlp(h)
            else:
                result = experts_result(weights, layer, number, h.flatten(0, 1))
                x = x + layer.shared(h) + result.unflatten(0, h.shape[:2])
        logits: F32 = head(weights, config, x).cpu().numpy()
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    """Trained; tied and untied head; with and without bias, shared experts, fused names; dense; all quantized."""
    for prompt in Golden.load(name).prompts:
        (logits,) = torch_logits(checkpoint_of(name), [prompt.tokens.tolist()])
        found = prompt.compare(logits, LARGEST)
        assert found.largest < LARGEST, found
        assert found.wrong_top == [], found


TWO_DENSE = replace(specimens.MOE_BIAS, name="two-dense", layers=4, first_moe_layer=2, shared_experts=1, tied=True)


@pytest.mark.parametrize("specimen", [None, specimens.MOE_BIAS, TWO_DENSE])
def test_transformers_live(specimen: specimens.Random | None, tmp_path: Path) -> None:
    pytest.importorskip(
        "transformers", reason="transformers is not installed (extra `reference`); golden files are tested"
    )
    from reference.transformers_logits import transformers_logits

    checkpoint = specimens.make(specimen, tmp_path) if specimen else specimens.TINY
    prompts = [ids for _, ids in specimens.prompts(checkpoint)]
    for ids, (want, _) in zip(prompts, transformers_logits(checkpoint, prompts), strict=True):
        (found,) = torch_logits(checkpoint, [ids])
        assert (np.abs(found - want).max(1) / want.std(1)).max() < LARGEST


def test_sequences_do_not_see_each_other_nor_what_comes_later() -> None:
    first, second = [5, 300, 17, 299, 4095], [5, 300, 17, 600, 7]
    both = torch_logits(specimens.TINY, [first, second])
    alone = torch_logits(specimens.TINY, [second])
    spread = alone.std()
    assert np.abs(both[1] - alone[0]).max() < LARGEST * spread
    assert np.abs(both[0, :3] - both[1, :3]).max() < LARGEST * spread
    assert np.abs(both[0, 3] - both[1, 3]).max() > spread


def test_the_same_input_gives_the_same_bytes() -> None:
    tokens = [[5, 300, 17, 299, 4095], [5, 300, 17, 600, 7]]
    assert torch_logits(specimens.TINY, tokens).tobytes() == torch_logits(specimens.TINY, tokens).tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the CPU's results are tested")
@pytest.mark.parametrize("specimen", [None, specimens.MOE_BIAS])
def test_cuda_agrees(specimen: specimens.Random | None, tmp_path: Path) -> None:
    checkpoint = specimens.make(specimen, tmp_path) if specimen else specimens.TINY
    tokens = [specimens.IDS, specimens.IDS[::-1]]
    want, found, again = (torch_logits(checkpoint, tokens, device) for device in ("cpu", "cuda", "cuda"))
    assert (np.abs(found - want).max(-1) / want.std(-1)).max() < 5 * LARGEST
    assert found.tobytes() == again.tobytes()


def test_experts_are_chosen_with_the_bias_and_weighted_without_it(tmp_path: Path) -> None:
    """A bias of 1 outweighs every probability: expert 2 always comes first."""
    spec = Spec(layers=2, bias=(30.0, 30.0, 31.0, 30.0))
    h = np.random.default_rng(0).standard_normal((50, spec.hidden), dtype=np.float32)
    logits = h @ weights(spec)["model.layers.1.mlp.gate.weight"].T
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    others = np.where(np.arange(4) == 2, 0, probabilities)
    second = others.argmax(1)
    chosen = np.stack((probabilities[:, 2], others.max(1)), 1)
    with opened(make(tmp_path / "source", spec)) as (tensors, config):
        experts, share = Layer(tensors, config, 1).route(torch.from_numpy(h))
    assert experts.dtype == torch.int64
    assert experts.tolist() == [[2, e] for e in second]
    np.testing.assert_allclose(share.numpy(), chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
    assert (probabilities[:, 2] < probabilities.max(1)).any()  # the bias mattered


def test_of_equal_experts_the_first_are_chosen(tmp_path: Path) -> None:
    spec = Spec(layers=2, experts=40, used=3, bias=(0.0,) * 40)
    with opened(make(tmp_path / "source", spec)) as (tensors, config):
        experts, share = Layer(tensors, config, 1).route(torch.zeros(2, spec.hidden))
    assert experts.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(share.numpy(), 1 / 3, rtol=1e-6)


def test_no_shared_experts_give_zeros(tmp_path: Path) -> None:
    with opened(make(tmp_path / "source", Spec(layers=2, shared=0))) as (tensors, config):
        assert Layer(tensors, config, 1).shared(torch.ones(5, 256)).tolist() == torch.zeros(5, 256).tolist()


def test_rope_turns_neighbours() -> None:
    """Position p turns pair i by p / 100^(2i/d): with d = 4 by p and by p / 10."""
    turned = rotate(torch.tensor([[9.0, 9, 9, 9], [9, 9, 9, 9], [1, 0, 0, 1]]), 100.0)
    assert turned[0].tolist() == [9, 9, 9, 9]
    want = [math.cos(2), math.sin(2), -math.sin(0.2), math.cos(0.2)]
    np.testing.assert_allclose(turned[2].numpy(), want, rtol=1e-6)


def all_tensors(checkpoint: Path) -> dict[str, bytes]:
    job = prepare(checkpoint, Outtype.AUTO)
    with opened(checkpoint) as (tensors, _):
        found = {}
        for tensor in job.plan.tensors:
            value = tensors.tensor(tensor.name)
            assert (value.dtype, tuple(value.shape)) == (torch.float32, tensor.shape)
            found[tensor.name] = value.numpy().tobytes()
    return found


SPEC = Spec(layers=2, heads=6, shared=2, tied=False)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_form_of_a_checkpoint_has_the_same_tensors(tmp_path: Path, dtype: str) -> None:
    spec = replace(SPEC, dtype=dtype)
    want = all_tensors(make(tmp_path / "pt", spec))
    assert all_tensors(make(tmp_path / "fused", replace(spec, fused=True, shards=3))) == want
    assert all_tensors(make_plain(tmp_path / "paddle", replace(spec, mtp=True))) == want
    assert all_tensors(make_plain(tmp_path / "raw", spec, raw_uint16=True)) == want


@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_those_stored(tmp_path: Path, fused: bool) -> None:
    values = {name: from_bf16(to_bf16(value)) for name, value in weights(SPEC).items()}
    with opened(make(tmp_path / "source", replace(SPEC, fused=fused))) as (tensors, _):
        layer = "model.layers.1"
        for gguf, hf in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.1.attn_k.weight", f"{layer}.self_attn.k_proj.weight"),
            ("blk.1.ffn_up_shexp.weight", f"{layer}.mlp.shared_experts.up_proj.weight"),
            ("blk.1.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight"),
        ):
            assert np.array_equal(tensors.tensor(gguf).numpy(), values[hf])
        for e in range(SPEC.experts):
            for part in ("gate", "up", "down"):
                want = values[f"{layer}.mlp.experts.{e}.{part}_proj.weight"]
                name = f"blk.1.ffn_{part}_exps.weight"
                assert np.array_equal(tensors.expert(name, e).numpy(), want)
                assert np.array_equal(tensors.tensor(name)[e].numpy(), want)
        router = tensors.tensor("blk.1.ffn_gate_inp.weight").numpy()
        assert np.array_equal(router, weights(SPEC)[f"{layer}.mlp.gate.weight"])  # float32, not rounded


def test_a_tied_model_has_no_head_of_its_own(tmp_path: Path) -> None:
    with opened(make(tmp_path / "source", Spec(layers=2))) as (tensors, _):
        assert "token_embd.weight" in tensors
        assert "output.weight" not in tensors


def test_embedding_takes_the_rows_of_the_tokens() -> None:
    tokens = torch.tensor([[4095, 0, 7], [7, 7, 4095]])
    with opened(specimens.TINY) as (tensors, _):
        table = tensors.tensor("token_embd.weight")
        assert torch.equal(embed(tensors, tokens), table[tokens])
