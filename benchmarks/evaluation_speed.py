"""How fast do the bindings score texts beside llama-perplexity, on the same tokens: a running text, and four choices.

    python benchmarks/evaluation_speed.py FILE.gguf ... --text TEXT [--threads N] [--rounds N]
    python benchmarks/evaluation_speed.py --layers 4 --folder /tmp --text TEXT

`perplexity` scores the second half of each window of --ctx tokens, as `llama-perplexity -f TEXT`. `choices` scores four
endings after a common beginning, as `llama-perplexity --hellaswag`; the questions are lines of the text, the wrong
endings those of other lines. Both sides compute the same sums, which the table shows. --layers adds a synthetic model:
that many layers of the 21B with its vocabulary.

The bindings run in this process, after loading; llama-perplexity is timed from the end of its loading. They take turns.
"""

import argparse
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from common import (
    add_folder,
    add_llama_cpp,
    add_rounds,
    add_threads,
    benchmark_parser,
    leave,
    machine,
    positive,
    progress,
    report,
)
from ernie_gguf.checkpoint.config import read_config
from ernie_gguf.checkpoint.vocab import read_vocab
from ernie_llama import Llama
from released import SHAPES, TOKENIZER
from rich.table import Table
from synthetic import TYPES, Mix, write_model

BEGINNING, ENDING = 40, 10  # words of a question and of each choice
SEQUENCES = 16  # at once; with more, llama-perplexity wants 0.2 GB of memory for each
Text = tuple[list[int], int]  # tokens, and how many of the last are scored


@dataclass
class Speed:
    """Tokens per second of one file and one kind of work, with the result that both sides must agree on."""

    file: str
    work: str
    tokens: int
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    their_result: float = 0.0
    our_result: float = 0.0

    @property
    def share(self) -> float:
        """The bindings' speed over llama-perplexity's, median of the rounds."""
        return statistics.median(our / their for our, their in zip(self.ours, self.theirs, strict=True))


def questions(text: str, n: int) -> list[tuple[str, int, list[str]]]:
    """Beginnings, which ending is right, and four endings, cut from a text."""
    words, draw = text.split(), random.Random(1)
    size = BEGINNING + ENDING
    pieces = [words[i : i + size] for i in range(0, min(len(words), n * size) - size + 1, size)]
    result = []
    for piece in pieces:
        endings = [" ".join(each[BEGINNING:]) for each in draw.sample(pieces, 4)]
        right = draw.randrange(4)
        endings[right] = " ".join(piece[BEGINNING:])
        result.append((" ".join(piece[:BEGINNING]), right, endings))
    return result


def windows(llm: Llama, text: str, options: argparse.Namespace) -> list[Text]:
    """The windows of a text as llama-perplexity makes them: each begins with BOS if the model wants one."""
    tokens, n = llm.tokenize(text.encode(), special=True), options.ctx
    begin = llm.token_bos() if tokens[0] == llm.token_bos() else None
    cut = [tokens[i : i + n] for i in range(0, len(tokens) - n + 1, n)][: options.windows]
    return [([begin if begin is not None else each[0], *each[1:]], n - n // 2 - 1) for each in cut]


def choices(llm: Llama, asked: Sequence[tuple[str, int, list[str]]]) -> list[Text]:
    """Four texts for each question; what all four have in common is not scored."""
    result = []
    for question, _, endings in asked:
        texts = [llm.tokenize(f"{question} {ending}".encode(), special=True) for ending in endings]
        shared = min(Llama.longest_token_prefix(texts[0], text) for text in texts[1:])
        result += [(text, len(text) - shared) for text in texts]
    return result


def run_peer(command: Sequence[str | Path]) -> tuple[float, str]:
    """Seconds that llama-perplexity took after loading, and what it printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None  # noqa: S101 - narrows the type
    begin, lines = time.perf_counter(), []
    for line in process.stdout:
        if ": calculating" in line:
            begin = time.perf_counter()
        lines.append(line)
    seconds = time.perf_counter() - begin
    output = "".join(lines)
    if process.wait():
        leave(command, process.returncode, output)
    return seconds, output


def perplexity(scores: Sequence[Sequence[tuple[float, bool]]]) -> float:
    """exp of the mean negative log probability of all scored tokens."""
    return float(np.exp(-np.mean([logprob for each in scores for logprob, _ in each])))


def accuracy(scores: Sequence[Sequence[tuple[float, bool]]], asked: Sequence[tuple[str, int, list[str]]]) -> float:
    """Percent of questions whose right ending has the best mean log probability, as HellaSwag's acc_norm."""
    means = np.array([np.mean([logprob for logprob, _ in each]) for each in scores]).reshape(-1, 4)
    return 100 * float(np.mean(means.argmax(axis=1) == [right for _, right, _ in asked]))


def measure(path: Path, options: argparse.Namespace, folder: Path) -> list[Speed]:
    """Both kinds of work on one file."""
    text = options.text.read_text(errors="replace")
    asked = questions(text, options.questions)
    tasks = folder / "questions.txt"
    tasks.write_text(
        "".join(f"{question}\n{right}\n" + "".join(f"{e}\n" for e in ends) for question, right, ends in asked)
    )
    common = ("-m", path, "-c", str(options.ctx), "-b", str(options.batch), "-t", str(options.threads))
    program = options.llama_cpp / "llama-perplexity"
    hellaswag = ("--hellaswag", "--hellaswag-tasks", str(len(asked)), "-np", str(SEQUENCES))
    peers: dict[str, list[str | Path]] = {
        "perplexity": [program, *common, "-f", options.text, "--chunks", str(options.windows)],
        "choices": [program, *common, "-f", tasks, *hellaswag],
    }
    n_ctx = max(options.ctx, options.batch)
    with Llama(path, n_ctx=n_ctx, n_batch=options.batch, n_seq_max=SEQUENCES, n_threads=options.threads) as llm:
        texts = {"perplexity": windows(llm, text, options), "choices": choices(llm, asked)}
        speeds = {work: Speed(path.name, work, sum(len(each) for each, _ in texts[work])) for work in texts}
        for _ in progress(range(options.rounds), path.name):
            for work, speed in speeds.items():
                seconds, output = run_peer(peers[work])
                speed.theirs.append(speed.tokens / seconds)
                begin = time.perf_counter()
                by_index = dict(llm.score_many(texts[work]))
                speed.ours.append(speed.tokens / (time.perf_counter() - begin))
                scores = [by_index[i] for i in range(len(by_index))]
                if work == "perplexity":
                    speed.their_result = float(output.split("PPL =")[1].split()[0])
                    speed.our_result = perplexity(scores)
                else:
                    speed.their_result = float(output.strip().splitlines()[-1].split("\t")[1].rstrip("%"))
                    speed.our_result = accuracy(scores, asked)
    return list(speeds.values())


def write_synthetic(path: Path, layers: int) -> Path:
    """Some layers of the 21B with its vocabulary: the example's tokens, padded."""
    shape = replace(SHAPES["21b"], layers=layers)
    config = replace(read_config(TOKENIZER), vocab=shape.vocab)
    return write_model(path, shape, Mix(TYPES["ccq2"]), vocab=read_vocab(TOKENIZER, config))


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--text", type=Path, required=True, help="the text to score")
    parser.add_argument("--layers", type=positive, help="also a synthetic model with that many layers of the 21B")
    parser.add_argument("--ctx", type=positive, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=512, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--windows", type=positive, default=40, help="windows to score (default: %(default)s)")
    parser.add_argument("--questions", type=positive, default=100, help="questions to score (default: %(default)s)")
    add_llama_cpp(parser)
    add_threads(parser, 1)
    add_rounds(parser, 3)
    add_folder(parser, "0.6 GB per layer of --layers")
    options = parser.parse_args()
    os.environ["ERNIE_LLAMA_LIB_PATH"] = str(options.llama_cpp)  # the bindings and llama-perplexity use one build
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, files = Path(name), list(options.files)
        if options.layers:
            files.append(write_synthetic(folder / f"21b-{options.layers}-layers.gguf", options.layers))
        speeds = [speed for file in files for speed in measure(file, options, folder)]
    table = Table(
        "file",
        "work",
        "tokens",
        "llama-perplexity t/s",
        "bindings t/s",
        "share",
        "PPL or % right: theirs",
        "ours",
        title=f"threads: {options.threads}, window: {options.ctx}, batch: {options.batch}",
    )
    for each in speeds:
        table.add_row(
            each.file,
            each.work,
            str(each.tokens),
            f"{statistics.median(each.theirs):,.0f}",
            f"{statistics.median(each.ours):,.0f}",
            f"{each.share:.2f}",
            f"{each.their_result:.2f}",
            f"{each.our_result:.2f}",
        )
    report({"machine": machine(), "speeds": speeds}, table, options)


if __name__ == "__main__":
    main()
