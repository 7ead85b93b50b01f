"""benchmarks/quality.py: reads llama-perplexity strictly, refuses a file that is not what its row says, measures."""

import json
from pathlib import Path

import pytest
import quality
from ernie_gguf.gguf_file.reader import GgufFile, GgufTensor

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "ernie-tiny"
# llama-perplexity's own words, shortened
OUTPUT = """\
   1      28.1234 ±    9.1234       0.10110 ±    0.00423       0.22448 ±    0.00157    13.438 ±  0.106 %

====== Perplexity statistics ======
Mean PPL(Q)                   :   9.726118 ±   0.154908
Mean PPL(base)                :   8.790917 ±   0.138509
Mean PPL(Q)/PPL(base)         :   1.106383 ±   0.004676

====== KL divergence statistics ======
Mean    KLD:   0.224482 ±   0.001571
Maximum KLD:   6.166984
99.9%   KLD:   2.514575
99.0%   KLD:   1.386323
Minimum KLD:  -0.000001

====== Token probability statistics ======
Mean    Δp: -2.034 ± 0.066 %
99.0%   Δp: 36.845%
Same top p: 80.367 ± 0.199 %
"""


def test_parses_llama_perplexity() -> None:
    assert quality.parse_divergence(OUTPUT) == quality.Divergence(
        ppl=9.726118,
        ppl_error=0.154908,
        kld=0.224482,
        kld_error=0.001571,
        kld_99=1.386323,
        same_top=80.367,
        same_top_error=0.199,
    )


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("Mean PPL(Q)                   :   9.726118 ±   0.154908", "", "no mean PPL"),
        ("0.224482 ±   0.001571", "nan ±       -nan", "no mean KLD"),
        ("99.0%   KLD", "98.0%   KLD", "no 99 % KLD"),
        ("80.367 ± 0.199 %\n", "80.367\n", "no same top token"),
    ],
)
def test_a_missing_figure_is_an_error(line: str, instead: str, message: str) -> None:
    assert line in OUTPUT
    with pytest.raises(SystemExit, match=message):
        quality.parse_divergence(OUTPUT.replace(line, instead))


def file_of(**types: str) -> GgufFile:
    """A header with one expert matrix, the router, the head and a norm, of the types given."""
    found = {"ffn_up_exps": "iq2_xxs", "ffn_gate_inp": "f32", "attn_q": "q8_0", "attn_norm": "f32"} | types
    path = Path("model.gguf")
    tensors = (
        GgufTensor(f"blk.1.{name}.weight", kind, 0, (512,) if "norm" in name else (512, 8), 0, 1, path)
        for name, kind in found.items()
    )
    return GgufFile(path, 3, {}, tuple(tensors), 0)


def test_types_as_asked_pass() -> None:
    quality.check_types(file_of(), "iq2_xxs", "q8_0")
    quality.check_types(file_of(ffn_up_exps="q2_k"), "q2_K", "q8_0")


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (
            {"ffn_up_exps": "iq4_nl"},
            "ffn_up_exps.weight with rows of 512 is iq4_nl, expected iq2_xxs: leave iq2_xxs out",
        ),
        ({"ffn_gate_inp": "q8_0"}, "ffn_gate_inp.weight with rows of 512 is q8_0, expected f32"),
        ({"attn_q": "bf16"}, "attn_q.weight with rows of 512 is bf16, expected q8_0"),
    ],
)
def test_other_types_are_refused(types: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        quality.check_types(file_of(**types), "iq2_xxs", "q8_0")


def test_a_dense_model_is_refused() -> None:
    dense = GgufFile(Path("dense.gguf"), 3, {}, file_of().tensors[2:], 0)
    with pytest.raises(SystemExit, match=r"dense\.gguf: no expert tensor"):
        quality.check_types(dense, "ccq2", "q8_0")


def test_experts_without_importance_are_refused() -> None:
    said = "====== llama_model_quantize_impl: did not find weights for {}.weight\nconverting to q4_0 .. "
    quality.check_imatrix_was_used(said.format("token_embd"))
    with pytest.raises(SystemExit, match=r"collected nothing for blk.1.ffn_up_exps.weight: give more"):
        quality.check_imatrix_was_used(said.format("blk.1.ffn_up_exps"))


def test_text_is_cut_between_characters() -> None:
    text = "aé漢".encode()
    assert [quality.head(text, n).decode() for n in range(8)] == ["", "a", "a", "aé", "aé", "aé", "aé漢", "aé漢"]
    for damaged in (b"a\xffb", text[:-1]):
        with pytest.raises(UnicodeDecodeError):
            quality.head(damaged, 100)


def test_calibrated_row_runs_our_quantizer() -> None:
    texts = ["--calibration", "a.txt", "b.txt", "--evaluate", "c.txt"]
    options = ["--threads", "3", "--quantize-args=--device cuda --report r"]
    arguments = quality.make_parser().parse_args(["model", *texts, *options])
    path = Path("out/ccq2-calibrated.gguf")
    command = [str(part) for part in quality.command_to_make("ccq2-calibrated", path, arguments)]
    assert " ".join(command[1:]) == (
        "quantize model --calibration out/calibration.txt --outfile out/ccq2-calibrated.gguf --threads 3 "
        "--device cuda --report r"
    )
    assert quality.types_of("ccq2-calibrated") == ("ccq2", "q8_0")


def test_imatrix_row_runs_llama_quantize() -> None:
    texts = ["--calibration", "a.txt", "--evaluate", "c.txt"]
    arguments = quality.make_parser().parse_args(["model", *texts, "--threads", "3", "--llama-cpp", "bin"])
    command = quality.command_to_make("ccq2-imatrix", Path("out/ccq2-imatrix.gguf"), arguments)
    assert " ".join(map(str, command)) == (
        "bin/llama-quantize --imatrix out/imatrix.gguf out/bf16.gguf out/ccq2-imatrix.gguf CCQ2 3"
    )
    assert quality.types_of("ccq2-imatrix") == ("ccq2", "q8_0")


def test_a_folder_means_its_python_files(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "a/data.txt", "d.py"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(f"{name}\n")
    (tmp_path / "text.txt").write_text("text\n")
    files = quality.files_of([tmp_path / "text.txt", tmp_path / "source"])
    assert "".join(path.read_text() for path in files) == "text\na/c.py\nb.py\nd.py\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Calibration and evaluation, 20 kB each, of Python that both are alike in: the options that name them."""
    source = b"".join(path.read_bytes() for path in sorted((ROOT / "convert" / "ernie_gguf").glob("*.py")))
    folder = tmp_path_factory.mktemp("texts")
    (folder / "calibration.py").write_bytes(source[:20_000])
    (folder / "evaluation.py").write_bytes(source[20_000:60_000])
    return ["--calibration", str(folder / "calibration.py"), "--evaluate", str(folder / "evaluation.py")]


@pytest.mark.build
def test_measures_ernie_tiny(
    llama_bin: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """bf16 is itself; experts of 2 bits are far, of 4 near; nothing is left behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = ["--evaluate-bytes", "20000", "--threads", "1", "--llama-cpp", str(llama_bin), "--json"]
    quality.main([str(TINY), *texts, *options, "--only", "bf16", "q4_0", "ccq2", "iq2_xxs"])
    results = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in results["rows"]}
    assert 19_997 <= results["evaluation_bytes"] <= 20_000
    assert {name: row["expert_bits"] for name, row in rows.items()} == {
        "bf16": 16.0,
        "q4_0": 4.5,
        "ccq2": 3.0,  # rows of 256
        "iq2_xxs": 2.0625,
    }
    assert rows["bf16"]["file_bits"] > rows["q4_0"]["file_bits"] > rows["iq2_xxs"]["file_bits"]
    kld = {name: row["divergence"]["kld"] for name, row in rows.items()}
    assert abs(kld["bf16"]) < 1e-4
    assert kld["bf16"] < kld["q4_0"] < 0.1 < kld["ccq2"] < 1
    assert kld["q4_0"] < kld["iq2_xxs"] < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.build
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluate", "CALIBRATION"], "this text is empty or was used for calibration"),
        (["--evaluate", "tests", "CALIBRATION"], "this text is empty or was used for calibration"),
        (["--evaluate-bytes", "-1"], "--evaluate-bytes: invalid positive value: '-1'"),
        (["--evaluate", "missing.txt"], "missing.txt: No such file or directory"),
        (["--llama-cpp", "missing"], "missing holds no llama-perplexity"),
    ],
)
def test_unusable_arguments(
    llama_bin: Path, texts: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option.replace("CALIBRATION", texts[1]) for option in options]
    with pytest.raises(SystemExit):
        quality.main([str(TINY), *texts, "--llama-cpp", str(llama_bin), *given])
    assert message in capsys.readouterr().err


@pytest.mark.build
def test_too_short_a_text_is_a_clear_error(llama_bin: Path, texts: list[str]) -> None:
    options = ["--evaluate-bytes", "500", "--threads", "1", "--llama-cpp", str(llama_bin)]
    with pytest.raises(SystemExit, match=r"(?s)no perplexity of .*evaluation.py:.*you need at least 1024 tokens"):
        quality.main([str(TINY), *texts, *options, "--only", "bf16"])
