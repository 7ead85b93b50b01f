"""Train examples/ernie-vl-tiny: a small ERNIE-4.5-VL-MoE that reads the number or the word on a picture.

    python examples/train_vl_tiny/train.py OUT --minutes 60
    python examples/train_vl_tiny/train.py OUT --from examples/ernie-vl-tiny --minutes 6 --batch 512   # on a GPU

It needs the extra `reference` and runs on a GPU if there is one. First the eyes learn alone which character each token
shows, as the answers teach them too slowly; then everything learns to answer, from one character to five. The learning
rate follows the clock, so that a slower machine ends in time with a worse model; the script says what share of texts
that it never trains on the model reads, while it learns and at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import Ernie4_5_VLMoeForConditionalGeneration
from vl_tiny_batches import IGNORED, KINDS, Batch, Drawer
from vl_tiny_model import answer, embeddings, forward, load, new_model, write
from vl_tiny_pictures import (
    CELL,
    COLOR,
    DIGITS,
    LETTERS,
    LONGEST,
    READ,
    SIZES,
    Tokenizer,
    draw,
    make_tokenizer,
    random_text,
    read_of,
)

RATE = 1e-3
EYES_OPEN = 0.15  # loss of the tower and resampler alone at which the language model begins to learn
NEXT_LENGTH = 0.25  # loss of answers at which texts get a character longer
# The twenty pictures of the example: characters and length of what is written on each.
SHOWN = [(DIGITS, 2)] * 7 + [(DIGITS, 3)] * 4 + [(DIGITS, 4)] * 3 + [(DIGITS, 5)] * 2 + [(LETTERS, 4), (LETTERS, 5)] * 2


def losses_of(
    model: Ernie4_5_VLMoeForConditionalGeneration, batch: Batch, alone: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of the embeddings, which should be those of the characters that their cells show; loss of the answers; and
    the share of answers that are right in every token. The last two are zero if the eyes learn alone.
    """
    seen = [embeddings(model, each) for each in batch.pictures]
    cells = answers = right = torch.zeros((), device=batch.ids.device)
    for each, pictures in zip(seen, batch.pictures, strict=True):
        logits = model.lm_head(each).flatten(0, 1)
        cells = cells + torch.nn.functional.cross_entropy(logits, pictures.cells.flatten()) / len(seen)
    if not alone:
        logits = forward(model, batch.ids, [each.grid for each in batch.pictures], seen)[:, :-1]
        labels = batch.labels[:, 1:]
        answers = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).float().mean()
    return cells, answers, right


class Balance:
    """Moves the routers' biases towards equal load, as ERNIE's training does, instead of a loss of its own."""

    def __init__(self, model: Ernie4_5_VLMoeForConditionalGeneration, step: float = 1e-3) -> None:
        self.step = step
        for module in model.modules():
            if type(module).__name__ == "Ernie4_5_VLMoeMoeTopKRouter":
                module.moe_statics.e_score_correction_bias.requires_grad_(False)
                module.register_forward_hook(self.after)

    def after(self, router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        """One step of one router, while training."""
        if router.training:
            load = torch.nn.functional.one_hot(output[2], router.num_experts).float().sum((0, 1))
            router.moe_statics.e_score_correction_bias += self.step * torch.sign(load.mean() - load)


class Curriculum:
    """What the model learns next: first the eyes alone, then texts of one character to LONGEST, then all questions."""

    def __init__(self, drawer: Drawer, size: int, new: bool) -> None:
        self.drawer, self.size = drawer, size
        self.alone, self.longest = new, 0 if new else LONGEST

    def batch(self) -> Batch:
        """The next one to learn from."""
        if self.alone:
            return self.drawer.read(self.size, LONGEST - 1, plain=True)
        if self.longest < LONGEST:
            return self.drawer.read(self.size, self.longest, plain=True)
        return self.drawer.mixed(self.size)

    def go_on(self, cells: float, answers: float) -> bool:
        """Whether losses are low enough for something harder, which then begins."""
        if self.longest == LONGEST or (cells >= EYES_OPEN if self.alone else answers >= NEXT_LENGTH):
            return False
        self.alone = False
        self.longest += 1
        return True


def accuracy(model: Ernie4_5_VLMoeForConditionalGeneration, drawer: Drawer, size: int) -> dict[str, float]:
    """Share of right answers about new pictures, of texts that are never trained on, by kind of question."""
    model.eval()
    batches = {
        f"{length} {'digits' if characters is DIGITS else 'letters'}": drawer.read(size, kind=kind, plain=True)
        for kind, (characters, length) in enumerate(KINDS)
        if length > 1
    }
    batches |= {"color": drawer.color(size), "of two": drawer.pair(size)}
    with torch.no_grad():
        found = {name: losses_of(model, batch)[2].item() for name, batch in batches.items()}
    model.train()
    return found


def train(out: Path, minutes: float, size: int, start_from: Path | None = None) -> None:
    """Train for `minutes`, write the checkpoint to `out` and read pictures that were not trained on."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (new_model() if start_from is None else load(start_from, "all")).to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    Balance(model)
    tokenizer_model = make_tokenizer() if start_from is None else (start_from / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer(tokenizer_model)
    curriculum = Curriculum(Drawer(tokenizer, device), size, start_from is None)
    tests = Drawer(tokenizer, device, test=True)
    loss = torch.tensor([5.0, 5.0], device=device)  # running means of cells and answers
    start = shown = examined = time.monotonic()
    step = 0
    while (done := (time.monotonic() - start) / (60 * minutes) if minutes else 1) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100, 1.25 * (1 - done))
        cells, answers, _ = losses_of(model, curriculum.batch(), curriculum.alone)
        optimizer.zero_grad()
        (cells + answers).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss += 0.03 * (torch.stack([cells, answers]).detach() - loss)
        if step % 20 == 0 and curriculum.go_on(*loss.tolist()):
            loss[1] = 1.0
        step += 1
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            by_name = ", ".join(
                f"{name} {value:.4f}" for name, value in zip(("cells", "answers"), loss.tolist(), strict=True)
            )
            print(f"{100 * done:5.1f} % step {step} length {curriculum.longest} loss of {by_name}", flush=True)
        if time.monotonic() - examined > max(30.0, 3 * minutes):
            examined = time.monotonic()
            report(accuracy(model, tests, min(size, 256)))
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate.weight", "e_score_correction_bias")):  # routers stay float32, as in ERNIE's files
            parameter.data = parameter.data.to(torch.bfloat16)
    write(out, model, tokenizer_model)
    model = model.to(torch.float32).eval()
    report(accuracy(model, tests, 256))
    examine(out, model.eval(), tokenizer)


def report(shares: dict[str, float]) -> None:
    """Print one line of accuracies."""
    print(
        "read of texts kept for tests: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()),
        flush=True,
    )


def draw_examples(folder: Path) -> dict[str, Image.Image]:
    """Twenty new pictures of texts kept for tests, by names that say what is written and in which colour."""
    rng = random.Random("pictures")
    folder.mkdir(exist_ok=True)
    out: dict[str, Image.Image] = {}
    for number, (characters, length) in enumerate(SHOWN):
        text = random_text(rng, characters, length, test=True)
        while any(f"-{text}-" in name for name in out):
            text = random_text(rng, characters, length, test=True)
        width, height = rng.choice([each for each in SIZES if each[0] >= CELL * length])
        resized = number % 5 == 0
        size = (width + rng.randint(1, 4), height + rng.randint(0, 3)) if resized else (width, height)
        picture = draw(rng, text, size)
        name = f"{number:02d}-{text}-{picture.color}"
        picture.image.save(folder / f"{name}.png", optimize=True)
        out[name] = picture.image
    return out


def right_answer(question: str, name: str) -> str:
    """What should be answered about a picture of this name, or about two, their names with a blank between them."""
    names = name.split()
    _, text, color = names[question == read_of(2)].split("-")
    return color if question == COLOR else text


def examine(out: Path, model: Ernie4_5_VLMoeForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Write the pictures of the example, and what the model answers about each and about pairs of them."""
    images = draw_examples(out / "pictures")
    names = list(images)
    pairs = [f"{name} {names[(i + len(names) // 2) % len(names)]}" for i, name in enumerate(names)]
    read: dict[str, dict[str, str]] = {}
    for question in (READ, COLOR, read_of(1), read_of(2)):
        read[question] = {
            name: answer(model, tokenizer, *(images[each] for each in name.split()), question)
            for name in (names if question in (READ, COLOR) else pairs)
        }
        right = sum(found == right_answer(question, name) for name, found in read[question].items())
        print(f"{question} {right} of {len(read[question])} right", flush=True)
    (out / "read.json").write_text(json.dumps(read, indent=1) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="start_from", type=Path, help="go on with what another run has written")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=16, help="pictures in a batch")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 for its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.minutes, arguments.batch, arguments.start_from)


if __name__ == "__main__":
    main()
