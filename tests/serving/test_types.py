"""`info CHECKPOINT`: which type fits, from headers alone, with llama.cpp's own placement of the file as it would be."""

import json
from pathlib import Path

import pytest
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.serving import types as weighing
from ernie_gguf.serving.cards import GIB, OWN_CARDS
from ernie_gguf.serving.memory import Question
from ernie_gguf.serving.types import best, possible, weigh, weightless
from reference.specimens import TINY
from released import bf16_21b, two_bits_300b, write_sparse
from support.checkpoints import Spec, make
from support.command_line import Command
from support.models import convert
from support.paddle import make_two_bits

pytestmark = [pytest.mark.build, pytest.mark.usefixtures("built_library")]


@pytest.fixture(scope="module")
def ernie_21b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 21B's headers and no weights."""
    return write_sparse(tmp_path_factory.mktemp("21b") / "ERNIE-4.5-21B-A3B-PT", bf16_21b())


@pytest.mark.parametrize("outtype", ["bf16", "q8_0", "ccq2"])
def test_the_weightless_file_has_the_headers_of_the_real_one(tmp_path: Path, outtype: str) -> None:
    real = convert(TINY, tmp_path / f"{outtype}.gguf", outtype)
    with weightless(TINY, Outtype(outtype)) as path:
        found = read_gguf(path)
        assert found.metadata == real.metadata
        assert [(t.name, t.type_name, t.ne, t.offset) for t in found.tensors] == [
            (t.name, t.type_name, t.ne, t.offset) for t in real.tensors
        ]
        assert path.stat().st_size == real.path.stat().st_size
        assert path.stat().st_blocks * 512 < 400_000
    assert not path.exists()


def test_which_types_are_asked_for(tmp_path: Path) -> None:
    assert possible(TINY) == [Outtype.BF16, Outtype.Q8_0, Outtype.Q4_0, Outtype.CCQ2]
    make_two_bits(tmp_path / "two bits")
    assert possible(tmp_path / "two bits") == [Outtype.AUTO]
    dense = make(tmp_path / "dense", Spec(architecture="Ernie4_5_ForCausalLM", layers=1))
    assert possible(dense) == [Outtype.BF16, Outtype.Q8_0, Outtype.Q4_0]


@pytest.mark.parametrize(("cards", "chosen"), [("24", "q8_0"), ("12", "ccq2")])
def test_the_21b(
    ernie_gguf: Command, ernie_21b: Path, monkeypatch: pytest.MonkeyPatch, cards: str, chosen: str
) -> None:
    monkeypatch.setattr(weighing, "main_memory", lambda: 64 * GIB)
    done = ernie_gguf("info", ernie_21b, "--gpus", cards, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["best"] == chosen
    sizes = [each["bytes"] for each in found["types"]]
    assert sizes == sorted(sizes, reverse=True)
    assert [each["outtype"] for each in found["types"]] == ["bf16", "q8_0", "q4_0", "ccq2"]
    fits = [each["fits_on_cards"] for each in found["types"]]
    assert fits == sorted(fits)  # what fits, fits in every smaller type


def test_the_300b_for_people(ernie_gguf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "main_memory", lambda: 64 * GIB)
    folder = write_sparse(tmp_path / "ERNIE-4.5-300B-A47B-2Bits-Paddle", two_bits_300b())
    done = ernie_gguf("info", folder, "--gpus", "24,24,24,24", "-c", "32768")
    assert done.code == 0, done.err
    assert "cards of 24, 24, 24, 24 GiB; context of 32768 tokens, KV cache q8_0" in done.out
    (row,) = [line for line in done.out.splitlines() if line.startswith("auto")]
    assert "96.2 GB" in row
    assert "--n-cpu-moe 4" in row
    assert f"The most exact type that fits: ernie-gguf convert {folder} --outtype auto" in done.out


def test_nothing_fits(ernie_21b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "main_memory", lambda: 2 * GIB)
    found = weigh(ernie_21b, Question(8192, "q8_0", ()), OWN_CARDS)
    assert best(found) is None
    assert all(each.verdict.startswith("needs ") for each in found)
