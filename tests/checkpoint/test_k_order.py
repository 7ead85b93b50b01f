"""The order of K of 2-bit checkpoints: found from trained weights, else refused, and converted exactly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from ernie_gguf.checkpoint.config import read_config
from ernie_gguf.checkpoint.find_k_order import CLEAR, KOrderFinding, find_k_order
from ernie_gguf.checkpoint.k_order import SHUFFLED, KOrder
from ernie_gguf.checkpoint.names import collect
from ernie_gguf.checkpoint.shards import read_headers
from ernie_gguf.convert import prepare
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.plan import Plan
from ernie_gguf.reorder import NEITHER, READS, RESTORED, WRITES
from reference.specimens import MINI, TINY
from support.checkpoints import F32, Spec
from support.command_line import Command
from support.models import convert
from support.paddle import TWO_BITS, Quantized, make_two_bits, split_names
from support.trained import ORDERS, channels, make_trained
from support.vl import make_vl

from checkpoint.test_paddle import dequantized

Trained = Callable[[str], tuple[Path, Quantized]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """ernie-tiny in two bits, in an order of K: layer 0 dense, 1 int4, 2 two bits."""
    made: dict[str, tuple[Path, Quantized]] = {}

    def find(order: str) -> tuple[Path, Quantized]:
        if order not in made:
            folder = tmp_path_factory.mktemp("trained") / f"ERNIE-tiny-2Bits-{order}"
            made[order] = folder, make_trained(folder, TINY, order, int4_end=1)
        return made[order]

    return find


def finding(folder: Path) -> KOrderFinding:
    config = read_config(folder)
    found = find_k_order(config, collect(read_headers(folder), config).sources)
    assert found is not None
    return found


def test_the_order_by_hand() -> None:
    # Channels 0, 1 come first, then 8, 9 (b = 1), …; channel 2 is the first of the second sixteen (a = 1).
    assert SHUFFLED[:6] == (0, 1, 8, 9, 16, 17)
    assert SHUFFLED[14:20] == (56, 57, 2, 3, 10, 11)
    assert sorted(SHUFFLED) == list(range(64))
    assert [SHUFFLED[RESTORED[channel]] for channel in range(64)] == list(range(64))
    assert channels("shuffled", 128).tolist() == [*SHUFFLED, *(64 + channel for channel in SHUFFLED)]


@pytest.mark.parametrize("order", ORDERS)
def test_trained_weights_tell(trained: Trained, order: str) -> None:
    found = finding(trained(order)[0])
    assert found.order.value == order
    assert abs(found.sigmas) > CLEAR
    right, wrong = (found.neurons.natural, found.neurons.shuffled)[:: 1 if order == "natural" else -1]
    assert right > 0.5
    assert wrong < 0.2


@pytest.mark.skipif(MINI is None, reason="ERNIE_MINI names no folder: the checkpoint ernie-mini is not shipped")
@pytest.mark.parametrize("order", ORDERS)
def test_every_layer_of_a_larger_model_tells(tmp_path: Path, order: str) -> None:
    assert MINI is not None
    make_trained(tmp_path / "mini", MINI, order)
    found = finding(tmp_path / "mini")
    assert found.order.value == order
    assert len(found.layers) == 3
    assert all(abs(layer.sigmas) > CLEAR for layer in found.layers)


def test_random_weights_do_not_tell(tmp_path: Path) -> None:
    """The figure is in standard deviations of exactly this."""
    sigmas = []
    for seed in range(12):
        spec = replace(TWO_BITS, layers=3, experts=2, shards=1, seed=seed)
        make_two_bits(tmp_path / str(seed), spec, int4_end=0)
        found = finding(tmp_path / str(seed))
        assert found.order is KOrder.AUTO
        sigmas += [sign.sigmas for layer in found.layers for sign in (layer.neurons, layer.channels)]
    assert np.abs(sigmas).max() < 4  # of 48
    assert 0.7 < np.std(sigmas) < 1.4


def test_unclear_is_refused_naming_the_option_and_obeyed_with_it(ernie_gguf: Command, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out.gguf"
    make_two_bits(source, replace(TWO_BITS, layers=3, experts=2, shards=1))
    code, _, err = ernie_gguf("convert", source, "--outfile", out)
    assert code == 1
    assert "cannot tell in which order of K its 2-bit experts were quantized (unclear, by " in err
    assert "say --ccq-k-order natural or --ccq-k-order shuffled" in err
    assert not list(tmp_path.glob("*gguf*"))
    assert "convert needs --ccq-k-order" in ernie_gguf("convert", source, "--outfile", out, "--dry-run").out
    for order in ORDERS:
        assert ernie_gguf("convert", source, "--outfile", out, "--ccq-k-order", order, "--overwrite").code == 0
        done = ernie_gguf("verify", source, out)
        assert done.code == 0
        assert f"unclear, taken as the file's, the file's channels {order}" in " ".join(done.out.split())


def test_layers_that_disagree_are_refused_by_number(tmp_path: Path, ernie_gguf: Command) -> None:
    make_trained(tmp_path / "mixed", TINY, "natural")
    other = make_trained(tmp_path / "other", TINY, "shuffled")
    path = tmp_path / "mixed" / "model.safetensors"
    found, data = read_headers(tmp_path / "mixed"), bytearray(path.read_bytes())
    for name, header in found.items():
        if ".layers.2.mlp.experts." in name:
            data[header.offset : header.offset + header.nbytes] = other.tensors[name].data
    path.write_bytes(data)
    code, _, err = ernie_gguf("convert", tmp_path / "mixed", "--outfile", tmp_path / "out.gguf")
    assert code == 1
    assert "its 2-bit experts do not agree about their order of K: layers " in err


def test_an_option_against_the_weights_is_obeyed_with_a_warning_and_verify_fails(
    trained: Trained, ernie_gguf: Command, tmp_path: Path
) -> None:
    for order, other in (ORDERS, ORDERS[::-1]):
        source, out = trained(order)[0], tmp_path / f"{order}.gguf"
        code, _, err = ernie_gguf("convert", source, "--outfile", out, "--ccq-k-order", other)
        assert code == 0
        assert err.startswith(f"warning: {source}: read as {other}, as asked, but its weights say {order}, by ")
        done = ernie_gguf("verify", source, out)
        assert done.code == 1
        assert "blk.2.ffn_down_exps.weight: MISMATCH" in done.out
        assert f"the checkpoint's 2-bit experts {order}, the file's channels {other}" in " ".join(done.out.split())
        assert ernie_gguf("verify", source, out, "--ccq-k-order", other).code == 0


def test_the_option_says_when_it_changes_nothing(ernie_gguf: Command, tmp_path: Path) -> None:
    done = ernie_gguf("convert", TINY, "--outfile", tmp_path / "out.gguf", "--ccq-k-order", "shuffled")
    assert done == (0, ANY, f"note: {TINY} has no 2-bit experts: --ccq-k-order shuffled changes nothing\n")


def _source_name(name: str, expert: int) -> str:
    """The checkpoint's name of a GGUF tensor's part."""
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem = name.removesuffix(".weight").removesuffix(".bias")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, layer, part = stem.split(".")
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.gate",
        "exp_probs_b": "mlp.moe_statics.e_score_correction_bias",
    }
    if part in names:
        module = names[part]
    elif part.startswith("attn"):
        module = f"self_attn.{part[-1]}_proj"
    else:
        kind, _, where = part.removeprefix("ffn_").partition("_")
        module = f"mlp.{ {'': '', 'exps': f'experts.{expert}.', 'shexp': 'shared_experts.'}[where] }{kind}_proj"
    return f"model.layers.{layer}.{module}" + ("" if part == "exp_probs_b" else ".weight")


def _rows(values: F32) -> F32:
    return values.reshape(-1, values.shape[-1])


@pytest.mark.parametrize("order", ORDERS)
def test_every_value_stays_and_stands_where_the_file_says(trained: Trained, tmp_path: Path, order: str) -> None:
    """The residual stream of a shuffled file is in stored order, and so are the neurons of 2-bit experts."""
    source, made = trained(order)
    file = convert(source, tmp_path / "out.gguf", k_order="auto")
    assert file.metadata.get("ernie_gguf.ccq.k_order") == (None if order == "natural" else "shuffled")
    weights, config = split_names(made.weights, replace(TWO_BITS, heads=4)), read_config(source)
    assert config.moe is not None
    at, neurons = channels(order, config.hidden), channels(order, config.moe.width)
    for tensor in file.tensors:
        experts = config.moe.experts if "_exps" in tensor.name else 1
        want = np.stack([_rows(weights[_source_name(tensor.name, e)]) for e in range(experts)])
        part = tensor.name.split(".")[-2].partition("_exps")[0]
        if part in ("ffn_down", "ffn_down_shexp", "attn_output"):
            want = want[:, at]
        elif part != "exp_probs_b":
            want = want[:, :, at]
        if tensor.type_name == "ccq2":
            want = want[:, :, neurons] if part == "ffn_down" else want[:, neurons]
        assert np.array_equal(dequantized(file, tensor), _rows(want)), tensor.name


@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0"])
def test_decoded_files_keep_the_channels_in_their_own_order(trained: Trained, tmp_path: Path, outtype: str) -> None:
    source, made = trained("shuffled")
    file = convert(source, tmp_path / "out.gguf", outtype, k_order="auto")
    assert "ernie_gguf.ccq.k_order" not in file.metadata
    weights = split_names(made.weights, replace(TWO_BITS, heads=4))
    for kind in ("gate", "up", "down"):
        tensor = next(t for t in file.tensors if t.name == f"blk.2.ffn_{kind}_exps.weight")
        want = np.concatenate([weights[f"model.layers.2.mlp.experts.{e}.{kind}_proj.weight"] for e in range(8)])
        found = dequantized(file, tensor)
        assert np.abs(found - want).max() <= {"f32": 0, "bf16": 2**-8, "q8_0": 2**-7}[outtype] * np.abs(want).max()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("outtype", ["auto", "f32", "q8_0", "ccq2", "q4_0"])
def test_verify_reads_both_orders(
    trained: Trained, ernie_gguf: Command, tmp_path: Path, order: str, outtype: str
) -> None:
    source, out = trained(order)[0], tmp_path / "out.gguf"
    assert ernie_gguf("convert", source, "--outfile", out, "--outtype", outtype).code == 0
    done = ernie_gguf("verify", source, out)
    assert done.code == 0, done.out


def test_verify_refuses_an_order_that_it_does_not_know(trained: Trained, ernie_gguf: Command, tmp_path: Path) -> None:
    source, out = trained("shuffled")[0], tmp_path / "out.gguf"
    convert(source, out, k_order="auto")
    out.write_bytes(out.read_bytes().replace(b"\x08\0\0\0\0\0\0\0shuffled", b"\x08\0\0\0\0\0\0\0shuttled"))
    assert read_gguf(out).metadata["ernie_gguf.ccq.k_order"] == "shuttled"
    code, _, err = ernie_gguf("verify", source, out)
    assert (code, "ernie_gguf.ccq.k_order is 'shuttled', expected 'shuffled'" in err) == (1, True)


def _axes(plan: Plan, hidden: int) -> dict[str, str]:
    """Which axis of each tensor has the hidden size."""
    return {
        t.name: "columns" if t.shape[-1] == hidden else "rows" if hidden in t.shape[-2:] else "neither"
        for t in plan.tensors
    }


def test_the_tables_of_reorder_name_every_tensor_by_its_axes(tmp_path: Path) -> None:
    """With a hidden size that nothing else has, shapes tell what reads and what writes the residual stream."""
    hidden = 384
    job = prepare(make_vl(tmp_path / "vl", Spec(hidden=hidden)), Outtype.BF16)
    assert job.projector is not None
    found = _axes(job.plan, hidden) | _axes(job.projector, hidden)
    for name, axis in found.items():
        tables = {"columns": READS, "rows": WRITES, "neither": NEITHER}
        assert [each for each, table in tables.items() if table.fullmatch(name)] == [axis], name
