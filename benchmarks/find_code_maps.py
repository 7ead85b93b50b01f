"""Find the pool of code maps, `ernie_gguf.ccq2.code_maps`: `python benchmarks/find_code_maps.py` prints it.

A map (M, Z) turns a code byte into four weights, so it is a codebook of 256 points in four dimensions. A row takes the
map that suits it best, so a pool should hold maps that are good by themselves and err at different places. Random maps
of two families are screened by their mean squared error on Gaussian weights: affine ones (the codes step through the
15 bits once) and ones that wrap around many times. The best of each family then compete to be added, one after another,
to the pool: the winner is the one that lowers most the mean over rows of the error of the row's best map.

Five minutes on one core.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from ernie_gguf.ccq2.code_maps import CODE_MAPS
from ernie_gguf.ccq2.encode import BOOK_RMS
from ernie_gguf.ccq2.rows import codebook
from rich.progress import track

F32 = npt.NDArray[np.float32]
Map = tuple[int, int]

FIRST: Map = CODE_MAPS[0]  # the affine map that a search over all of them found best; the pool begins with it
AFFINE_M = 2**32 / 256 * np.array([0.93, 0.95])  # 256 codes times M stay within 32 bits


def candidates(count: int, rng: np.random.Generator) -> Iterator[tuple[str, Map]]:
    """Random maps, of both families in turn."""
    for _ in range(count):
        yield "affine", (int(rng.integers(*AFFINE_M.astype(np.int64))), int(rng.integers(2**28)))
        yield "wrapping", (int(rng.integers(2**32)), int(rng.integers(2**32)))


def errors(y: F32, maps: Map) -> F32:
    """Squared distance of each target y [n, 4] to its nearest codeword, in units of a Gaussian's variance."""
    book = codebook(*maps).astype(np.float32)
    scores = y @ book.T - (book * book).sum(1) / 2
    distance: F32 = (y * y).sum(1) - 2 * scores.max(1)
    return distance / np.float32(4 * BOOK_RMS**2)


def screen(count: int, keep: int, rng: np.random.Generator) -> list[Map]:
    """The best maps of each family on a sample of Gaussian weights."""
    y = rng.standard_normal((2048, 4), np.float32) * np.float32(BOOK_RMS)
    found: dict[str, list[tuple[float, Map]]] = {"affine": [], "wrapping": []}
    for family, maps in track(candidates(count, rng), "screening", total=2 * count):
        found[family].append((float(errors(y, maps).mean()), maps))
    return [maps for scored in found.values() for _, maps in sorted(scored)[:keep]]


def row_errors(maps: list[Map], rows: int, weights: int, rng: np.random.Generator) -> F32:
    """Mean squared error of each map on each row of Gaussian weights: [maps, rows]."""
    y = rng.standard_normal((rows * weights // 4, 4), np.float32) * np.float32(BOOK_RMS)
    return np.stack([errors(y, each).reshape(rows, -1).mean(1) for each in track(maps, "measuring")])


def choose(error: F32, size: int) -> list[int]:
    """Greedy: begins with map 0, then each time the one that makes the rows' best errors smallest on average."""
    chosen, best = [0], error[0]
    while len(chosen) < size:
        gains = np.minimum(error, best).mean(1)
        chosen.append(int(gains.argmin()))
        best = np.minimum(best, error[chosen[-1]])
    return chosen


def main() -> None:
    """Find and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=16, help="maps in the pool")
    parser.add_argument("--candidates", type=int, default=40000, help="random maps of each family")
    parser.add_argument("--finalists", type=int, default=400, help="of each family that compete")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--weights", type=int, default=512, help="in a row: the shorter, the more rows differ")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    maps = [FIRST, *screen(options.candidates, options.finalists, rng)]
    error = row_errors(maps, options.rows, options.weights, rng)
    best = np.full(options.rows, np.inf, np.float32)
    chosen = choose(error, options.size)
    for i in chosen:
        best = np.minimum(best, error[i])
        m, z = maps[i]
        print(f"    ({m}, {z}),  # alone {error[i].mean():.4f}, best of the pool so far {best.mean():.4f}")
    fresh = np.random.default_rng(options.seed + 1)  # rows that nothing was chosen by
    found = row_errors([maps[i] for i in chosen], options.rows, options.weights, fresh)
    given = row_errors(list(CODE_MAPS), options.rows, options.weights, np.random.default_rng(options.seed + 1))
    print(f"on other rows: this pool {found.min(0).mean():.4f}, CODE_MAPS {given.min(0).mean():.4f}")


if __name__ == "__main__":
    main()
