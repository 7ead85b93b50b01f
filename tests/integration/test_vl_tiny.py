"""The example that reads pictures: llama-server and the bindings give the answers that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_llama import Llama

from integration.test_picture_server import messages, serving

pytestmark = [pytest.mark.build, pytest.mark.usefixtures("built_library")]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ernie-vl-tiny"
LEAST, LEAST_CCQ2 = 16, 14  # of twenty pictures
QUESTION = "What is written here?"
# What transformers reads in float32, by picture; the picture's name says what is right.
READ: dict[str, str] = json.loads((EXAMPLE / "read.json").read_text())
PICTURES = sorted((EXAMPLE / "pictures").glob("*.png"))


def right(answers: dict[str, str]) -> int:
    """How many answers are what the picture's name says."""
    return sum(answer == name.split("-")[0] for name, answer in answers.items())


def same(answers: dict[str, str]) -> int:
    """How many answers are what transformers reads."""
    return sum(answer == READ[name] for name, answer in answers.items())


def files(folder: Path, outtype: Outtype) -> tuple[Path, Path]:
    model, eyes = folder / f"{outtype.value}.gguf", folder / f"{outtype.value}-eyes.gguf"
    write_gguf(prepare(EXAMPLE, outtype), model, 1, False, lambda _: None, mmproj=eyes)
    return model, eyes


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Outtype], tuple[Path, Path]]]:
    folder = tmp_path_factory.mktemp("ernie-vl-tiny")
    made: dict[Outtype, tuple[Path, Path]] = {}

    def find(outtype: Outtype) -> tuple[Path, Path]:
        if outtype not in made:
            made[outtype] = files(folder, outtype)
        return made[outtype]

    yield find


def asked(model: Path, eyes: Path) -> dict[str, str]:
    """What the bindings answer about each picture."""
    with Llama(model, mmproj_path=eyes, n_ctx=512, n_threads=1) as llm:
        found = {}
        for path in PICTURES:
            answer = llm.create_chat_completion(messages(path.read_bytes(), QUESTION), temperature=0, max_tokens=8)
            found[path.stem] = answer["choices"][0]["message"]["content"] or ""
        return found


def test_there_are_twenty_pictures() -> None:
    assert sorted(READ) == [path.stem for path in PICTURES]
    assert len(PICTURES) == 20
    assert right(READ) >= LEAST


def test_bindings(converted: Callable[[Outtype], tuple[Path, Path]]) -> None:
    answers = asked(*converted(Outtype.BF16))
    assert same(answers) >= 19
    assert right(answers) >= LEAST - 1


def test_server(converted: Callable[[Outtype], tuple[Path, Path]], tmp_path: Path) -> None:
    with serving(*converted(Outtype.BF16), tmp_path / "log") as server:
        answers = {path.stem: server.text(path.read_bytes(), QUESTION) for path in PICTURES}
        with ThreadPoolExecutor(3) as executor:  # as many as slots, a text every fourth time
            jobs = [
                executor.submit(server.text, *((path.read_bytes(), QUESTION) if i % 4 else (QUESTION,)))
                for i, path in enumerate(PICTURES)
            ]
            at_once = {path.stem: job.result() for path, job in zip(PICTURES, jobs, strict=True)}
    assert same(answers) >= 19
    pictures = [path.stem for i, path in enumerate(PICTURES) if i % 4]
    # a near tie may fall the other way in a larger batch
    assert sum(at_once[name] == answers[name] for name in pictures) >= len(pictures) - 1


def test_two_bits(converted: Callable[[Outtype], tuple[Path, Path]]) -> None:
    """Text experts in ccq2 read most of what bf16 reads."""
    assert right(asked(*converted(Outtype.CCQ2))) >= LEAST_CCQ2


def test_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """read.json is what transformers reads today."""
    pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(EXAMPLE.with_name("train_vl_tiny"))
    train = pytest.importorskip("train")
    model = train.load(EXAMPLE).eval()
    tokenizer = train.Tokenizer((EXAMPLE / "tokenizer.model").read_bytes())
    for path in PICTURES[:4]:
        shown = image.open(path)
        assert train.answer(model, tokenizer, shown, QUESTION) == READ[path.stem]


def test_training_sees_the_pictures_that_pillow_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training puts pictures together by itself; the same choices make the same pixels."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXAMPLE.with_name("train_vl_tiny"))
    batches, pictures = pytest.importorskip("vl_tiny_batches"), pytest.importorskip("vl_tiny_pictures")
    drawer = batches.Drawer(pictures.Tokenizer((EXAMPLE / "tokenizer.model").read_bytes()), "cpu")

    class First:
        """Takes the first of all choices, as do the random numbers below."""

        def randint(self, low: int, _: int) -> int:
            return low

        def randrange(self, _: int) -> int:
            return 0

        def choice(self, values: list[object]) -> object:
            return values[0]

    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.zeros(*shape, device=device))
    for text, size in (("70951", (140, 28)), ("WORD", (112, 56)), ("8", (84, 56))):
        numbers = [batches.CHARACTERS.index(each) for each in text] + [batches.BLANK] * (batches.LONGEST - len(text))
        made = drawer.draw(torch.tensor([numbers]), torch.tensor([len(text)]), size)
        image = pictures.draw(First(), text, size).image
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)
        cell = pixels[:14, :14].permute(2, 0, 1).flatten()
        assert (made.patches[0, 0] == cell).all()
        corner = pixels[14:28, size[0] - 14 :].permute(2, 0, 1).flatten()
        assert (made.patches[0, 4 * (size[0] // 28) - 1] == corner).all()
        assert int((made.cells[0] > 0).sum()) == len(text)
