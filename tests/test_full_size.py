"""The 300B at its full shapes, headers over holes: a dry run is quick, and says how large the file will be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from released import paddle_300b, two_bits_300b, write_sparse

# Peak memory from /proc: ru_maxrss begins with the memory of the process that forked, which is all of pytest's.
MEASURED = """
import sys
from pathlib import Path
from ernie_gguf.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    sys.stderr.write(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("300B") / "ERNIE-4.5-300B-A47B-2Bits-Paddle", two_bits_300b())


def dry_run(source: Path, *options: str) -> tuple[str, float, int]:
    """Output, seconds of CPU and peak memory in kB of a process."""
    before = os.times()
    command = [sys.executable, "-c", MEASURED, "convert", str(source), "--dry-run", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, seconds, int(done.stderr)


def test_the_whole_300b(whole: Path) -> None:
    out, seconds, peak = dry_run(whole)
    assert seconds < 10  # measured: 1
    assert peak < 300_000  # measured: 105,000
    lines = out.splitlines()
    totals = lines[lines.index("type  tensors          weights      size   share  bits/weight") + 1 : -2]
    rows = {line.split()[0]: line.split() for line in totals}
    assert rows["ccq2"][1:] == ["141", "264,945,795,072", "69.1", "GB", "71.8", "%", "2.088"]
    assert rows["q4_0"][1:] == ["12", "22,548,578,304", "12.7", "GB", "13.2", "%", "4.5"]
    assert rows["q8_0"][1:] == ["225", "10,267,656,192", "10.9", "GB", "11.3", "%", "8.5"]
    assert rows["bf16"][1:] == ["2", "1,694,498,816", "3.4", "GB", "3.5", "%", "16"]
    assert "-CCQ2.gguf: 591 tensors, 96.2 GB, 2.571 bits per weight; nothing was written (--dry-run)" in lines[-1]


# By the listing of the real checkpoint's names and shapes that was published in 2025.
LISTED = {
    "ernie.embed_tokens.weight": (103424, 8192),
    "ernie.layers.0.self_attn.qkv_proj.weight": (8192, 10240),
    "ernie.layers.0.self_attn.o_proj.weight": (8192, 8192),
    "ernie.layers.0.mlp.up_gate_proj.weight": (8192, 57344),
    "ernie.layers.0.mlp.down_proj.weight": (28672, 8192),
    "ernie.layers.3.mlp.experts.0.up_gate_proj.weight": (8192, 7168),
    "ernie.layers.53.mlp.experts.63.down_proj.weight": (3584, 8192),
    "ernie.layers.3.mlp.gate.weight": (8192, 64),
    "ernie.layers.3.mlp.moe_statics.e_score_correction_bias": (1, 64),
    "lm_head.weight": (8192, 103424),
}


def test_the_names_and_shapes_of_the_300b_in_bf16(tmp_path: Path) -> None:
    frame = paddle_300b()
    made = {entry.name: entry.shape for entries in frame.files for entry in entries}
    assert {name: made[name] for name in LISTED} == LISTED
    out, _, _ = dry_run(write_sparse(tmp_path / "ERNIE-4.5-300B-A47B-Paddle", frame))
    assert "-BF16.gguf: 591 tensors, " in out.splitlines()[-1]
    assert not [line for line in out.splitlines() if line.startswith("dropped")]


def test_embedding_and_head_in_q8_0(whole: Path) -> None:
    types = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
    plan = json.loads(dry_run(whole, "--json", "--split-max-size", "40G", *types)[0])
    assert plan["bytes"] == pytest.approx(94.6e9, rel=0.001)
    assert "bf16" not in plan["types"]
    assert [Path(file).name[-20:] for file in plan["files"]] == [f"-0000{i}-of-00003.gguf"[-20:] for i in (1, 2, 3)]


def test_memory_does_not_grow_with_layers(tmp_path: Path, whole: Path) -> None:
    small = write_sparse(tmp_path / "small", two_bits_300b(1, 1, 1))
    assert dry_run(whole)[2] - dry_run(small)[2] < 100_000  # kB; the headers of 30,000 tensors
