"""The pool of code maps, and the script that found it."""

import sys

import find_code_maps
import numpy as np
import pytest
from ernie_gguf.ccq2.code_maps import CODE_MAPS
from ernie_gguf.ccq2.rows import codebook


def test_sixteen_different_maps() -> None:
    assert len(set(CODE_MAPS)) == len(CODE_MAPS) == 16
    assert all(0 <= m < 2**32 and 0 <= z < 2**32 for m, z in CODE_MAPS)


def test_each_is_good_alone_and_each_adds_something() -> None:
    errors = find_code_maps.row_errors(list(CODE_MAPS), rows=256, weights=512, rng=np.random.default_rng(5))
    assert errors.mean(1).max() < 0.112
    best = np.minimum.accumulate(errors, 0).mean(1)
    assert (np.diff(best) < 0).all()
    assert best[-1] < 0.104
    assert best[0] > 0.107


def test_errors_are_distances_to_the_nearest_word() -> None:
    y = np.random.default_rng(6).standard_normal((40, 4), np.float32) * np.float32(16.5)
    words = codebook(*CODE_MAPS[3]).astype(np.float32)
    squares = ((y[:, None] - words) ** 2).sum(2).min(1) / (4 * 16.5**2)
    assert find_code_maps.errors(y, CODE_MAPS[3]) == pytest.approx(squares, rel=1e-4)


def test_greedy_choice() -> None:
    error = np.array([[3, 3, 3, 3], [1, 4, 4, 4], [4, 1, 1, 4], [4, 4, 2, 2]], np.float32)
    assert find_code_maps.choose(error, 3) == [0, 2, 1]  # 3+1+1+3, then 1+1+1+3 against 3+1+1+2


def test_the_search_prefers_good_maps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--size", "3", "--candidates", "60", "--finalists", "10", "--rows", "32", "--weights", "128"]
    monkeypatch.setattr(sys, "argv", ["find_code_maps.py", *arguments])
    find_code_maps.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    (")]
    assert len(lines) == 3
    assert lines[0].startswith(f"    {CODE_MAPS[0]}")
    assert [float(line.split()[-1]) for line in lines] == sorted(
        (float(line.split()[-1]) for line in lines), reverse=True
    )
