"""Train examples/ernie-vl-tiny: a small ERNIE-4.5-VL-MoE that reads the number on a picture.

    python examples/train_vl_tiny/train.py OUT --minutes 60

It needs the extra `reference` and runs on a GPU if there is one. First the eyes learn alone which digit each token
shows, as the answers teach them too slowly; then everything learns to answer, from one digit to four. The learning
rate follows the clock, so that a slower machine ends in time with a worse model; the script says how many of twenty
new pictures it reads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from vl_tiny_pictures import (
    BEGIN,
    CELL,
    CHAT_TEMPLATE,
    COLOR,
    END,
    FIRST_VISION,
    IMAGE,
    LONGEST,
    READ,
    SIZES,
    VISION_TOKENS,
    VOCAB,
    Picture,
    Tokenizer,
    draw,
    make_tokenizer,
    placeholder,
    prompt,
    random_text,
    read_of,
)

Batch = dict[str, torch.Tensor]
RATE, IGNORED = 1e-3, -100
EYES_OPEN = 0.15  # loss of the tower and resampler alone at which the language model begins to learn
NEXT_LENGTH = 0.25  # loss of answers at which texts get a digit longer
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_config() -> Ernie4_5_VLMoeConfig:
    """Three layers, one of them dense; 4 + 4 experts; a tower of two blocks. 5.6 M parameters."""
    return Ernie4_5_VLMoeConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "moe_intermediate_size": [256, 256],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={"depth": 2, "hidden_size": 96, "num_heads": 2, "intermediate_size": 384},
        **{f"{name}_token_id": FIRST_VISION + VISION_TOKENS.index(token) for name, token in MARKERS.items()},
        video_token_id=VOCAB - 1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


MARKERS = {
    "image": IMAGE,
    "image_start": "<|IMAGE_START|>",
    "image_end": "<|IMAGE_END|>",
    "video_start": "<|VIDEO_START|>",
    "video_end": "<|VIDEO_END|>",
}


def patches(image: np.ndarray) -> np.ndarray:
    """[height, width, 3] pixels -> [patches, 588]: blocks of four in raster order, a patch as channel, row, column."""
    rows, columns = image.shape[0] // 28, image.shape[1] // 28
    split = image.reshape(rows, 2, 14, columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(split.reshape(rows * columns * 4, 588))


def question(rng: random.Random, pictures: list[tuple[Picture, ...]], tokens: int, easy: bool) -> tuple[str, list[str]]:
    """A question about each of the equally many pictures of a batch, the same for all, and its answers."""
    shown = [placeholder(i + 1, tokens) for i in range(len(pictures[0]))]
    if len(shown) == 2:
        number = rng.randrange(2)
        return prompt("".join(shown) + read_of(number + 1)), [pair[number].text for pair in pictures]
    asked = COLOR if rng.random() < 0.05 and not easy else READ
    answers = [one.color if asked is COLOR else one.text for (one,) in pictures]
    return prompt(shown[0] + asked if easy or rng.random() < 0.8 else asked + shown[0]), answers


class Samples(torch.utils.data.IterableDataset):  # type: ignore[misc]
    """Batches without end; in one of them all pictures have the same size and all prompts the same length."""

    def __init__(self, model: bytes, size: int, longest: torch.Tensor) -> None:
        self.model, self.size, self.longest = model, size, longest

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"training {worker.id if worker else 0} {self.longest}")
        torch.set_num_threads(1)
        tokenizer = Tokenizer(self.model)
        while True:
            repeat = int(self.longest) == LONGEST and rng.random() < 0.03
            yield self.text(rng, tokenizer) if repeat else self.pictures(rng, tokenizer)

    def pictures(self, rng: random.Random, tokenizer: Tokenizer) -> Batch:
        """Questions about pictures."""
        width, height = rng.choice(SIZES)
        easy = int(self.longest) < LONGEST
        each = 2 if rng.random() < 0.05 and not easy else 1
        longest = min(int(self.longest), width // CELL)
        groups = [
            tuple(draw(rng, random_text(rng, longest), (width, height)) for _ in range(each))
            for _ in range(self.size // each)
        ]
        start, answers = question(rng, groups, width * height // 784, easy)
        batch = self.tokens(tokenizer, [start] * len(groups), answers)
        pixels = np.stack([patches(np.asarray(one.image)) for group in groups for one in group])
        cells = [
            [tokenizer.encode(cell)[-1] if cell else 0 for cell in one.cells()] for group in groups for one in group
        ]
        grid = torch.tensor([[1, height // 14, width // 14]])
        return batch | {"pixels": torch.from_numpy(pixels), "grid": grid, "cells": torch.tensor(cells)}

    def text(self, rng: random.Random, tokenizer: Tokenizer) -> Batch:
        """Words to repeat, without a picture."""
        length = rng.randint(1, LONGEST)
        words: list[str] = []
        while len(words) < self.size:
            if len(word := random_text(rng, length)) == length:
                words.append(word)
        return self.tokens(tokenizer, [prompt(f"Write {word}.") for word in words], words)

    @staticmethod
    def tokens(tokenizer: Tokenizer, prompts: list[str], answers: list[str]) -> Batch:
        """Ids and labels, padded at the end."""
        rows = [
            (tokenizer.encode(start), tokenizer.encode(answer + END))
            for start, answer in zip(prompts, answers, strict=True)
        ]
        length = max(len(start) + len(end) for start, end in rows)
        ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), IGNORED)
        for i, (start, end) in enumerate(rows):
            ids[i, : len(start) + len(end)] = torch.tensor(start + end)
            labels[i, len(start) : len(start) + len(end)] = torch.tensor(end)
        return {"ids": ids, "labels": labels}


def see(tower: torch.nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """[pictures, patches, 588] of one size -> [pictures, patches, width]: the tower's own modules on a whole batch."""
    rows, columns = (torch.arange(int(n), device=pixels.device) for n in grid[0, 1:])
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    place = place.reshape(2, len(rows) // 2, 2, len(columns) // 2, 2).transpose(2, 3).reshape(2, -1).T
    x = tower.patch_embed(pixels)
    cos, sin = (part[:, None] for part in tower.rotary_pos_emb(x, place))
    for block in tower.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
        q, k = (
            part * cos
            + torch.cat(part.chunk(2, -1)[::-1], -1) * torch.cat((-sin.chunk(2, -1)[0], sin.chunk(2, -1)[1]), -1)
            for part in (q, k)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return tower.ln(x)


def resample(resampler: torch.nn.Module, seen: torch.Tensor) -> torch.Tensor:
    """[pictures, patches, width] -> [pictures, tokens, hidden]."""
    s = resampler.spatial_linear(seen.reshape(len(seen), -1, 4 * seen.shape[-1]))
    return resampler.after_norm(resampler.mlp(resampler.temporal_linear(torch.cat([s, s], -1))))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """8-bit patches as the tower takes them."""
    mean, std = (torch.tensor(part, device=pixels.device).repeat_interleave(196) * 255 for part in (MEAN, STD))
    return (pixels - mean) / std


def forward(model: Ernie4_5_VLMoeForConditionalGeneration, batch: Batch, pictures: torch.Tensor | None) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary]; `pictures` are the embeddings of the batch's pictures."""
    ids = batch["ids"]
    x = model.model.get_input_embeddings()(ids)
    position = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if pictures is not None:
        kind = (ids[:1] == FIRST_VISION).long().cpu()
        grids = batch["grid"].repeat(len(pictures) // len(ids), 1)
        position = model.model.get_rope_index(ids[:1].cpu(), kind, image_grid_thw=grids)[0]
        x = x.masked_scatter((ids == FIRST_VISION)[..., None], pictures)
    hidden = model.model.language_model(
        inputs_embeds=x,
        position_ids=position.to(ids.device).expand(3, len(ids), -1),
        moe_mm_token_type_ids=(ids >= FIRST_VISION).long(),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)


def initialize(model: Ernie4_5_VLMoeForConditionalGeneration) -> None:
    """Weights of variance 1 / inputs: a model this small hardly starts to learn from ERNIE's 0.02."""
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() >= 2 and "e_score_correction_bias" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith(("after_norm.weight", "language_model.norm.weight")):
            torch.nn.init.constant_(parameter, 0.4)


def new_model() -> Ernie4_5_VLMoeForConditionalGeneration:
    """An untrained model."""
    model = Ernie4_5_VLMoeForConditionalGeneration._from_config(make_config(), experts_implementation="eager")
    initialize(model)
    return model


def load(folder: Path) -> Ernie4_5_VLMoeForConditionalGeneration:
    """What a run has written, in float32."""
    return Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", local_files_only=True
    )


def losses_of(model: Ernie4_5_VLMoeForConditionalGeneration, batch: Batch, alone: bool) -> dict[str, torch.Tensor]:
    """Losses of the embeddings, which should be those of the digits that their cells show, and of the answers."""
    out, pictures = {}, None
    if "pixels" in batch:
        seen = see(model.model.vision_tower, normalized(batch["pixels"]), batch["grid"])
        pictures = resample(model.model.resampler_model, seen)
        logits = model.lm_head(pictures).flatten(0, 1)
        out["cells"] = torch.nn.functional.cross_entropy(logits, batch["cells"].flatten())
    if not alone:
        logits = forward(model, batch, pictures)[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        out["answers"] = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    return out


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


def answer(model: Ernie4_5_VLMoeForConditionalGeneration, tokenizer: Tokenizer, picture: Picture, asked: str) -> str:
    """What the model answers, by transformers' own preprocessing and forward pass."""
    device = model.device
    seen = Ernie4_5_VLMoeImageProcessorPil()(images=[picture.image], return_tensors="pt")
    start = tokenizer.encode(prompt(placeholder(1, int(seen["image_grid_thw"].prod()) // 4) + asked))
    ids = list(start)
    while len(ids) < len(start) + 12 and (len(ids) == len(start) or ids[-1] != tokenizer.encode(END)[0]):
        tokens = torch.tensor([ids], device=device)
        with torch.no_grad():
            logits = model(
                input_ids=tokens,
                pixel_values=seen["pixel_values"].to(device),
                image_grid_thw=seen["image_grid_thw"].to(device),
                mm_token_type_ids=(tokens == FIRST_VISION).long(),
                moe_mm_token_type_ids=(tokens >= FIRST_VISION).long(),
            ).logits
        ids.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(ids[len(start) :]).removesuffix(END)


def train(out: Path, minutes: float, size: int, workers: int, start_from: Path | None = None) -> None:
    """Train for `minutes`, write the checkpoint to `out` and read pictures that were not trained on."""
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (new_model() if start_from is None else load(start_from)).to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    Balance(model)
    tokenizer_model = make_tokenizer()
    longest = torch.full((), LONGEST - 1).share_memory_()
    batches = torch.utils.data.DataLoader(Samples(tokenizer_model, size, longest), batch_size=None, num_workers=workers)
    start = shown = time.monotonic()
    loss = {"cells": 5.0, "answers": 5.0}  # running means
    alone = start_from is None
    if not alone:
        longest.fill_(LONGEST)
    for step, cpu_batch in enumerate(batches):
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100, 1.02 - done)
        batch = {name: part if name == "grid" else part.to(device) for name, part in cpu_batch.items()}
        losses = losses_of(model, batch, alone)
        for name, value in losses.items():
            loss[name] += 0.03 * (value.item() - loss[name])
        if losses:
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if alone and loss["cells"] < EYES_OPEN:
            alone = False
            longest.fill_(1)
        elif not alone and loss["answers"] < NEXT_LENGTH and int(longest) < LONGEST:
            longest += 1
            loss["answers"] = 1.0
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            shares = ", ".join(f"{name} {value:.3f}" for name, value in loss.items())
            print(f"{100 * done:5.1f} % step {step} length {int(longest)} loss of {shares}", flush=True)
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate.weight", "e_score_correction_bias")):  # routers stay float32, as in ERNIE's files
            parameter.data = parameter.data.to(torch.bfloat16)
    write(out, model, tokenizer_model)
    examine(out, model.to(torch.float32).eval(), Tokenizer(tokenizer_model))


def write(out: Path, model: Ernie4_5_VLMoeForConditionalGeneration, tokenizer_model: bytes) -> None:
    """The checkpoint as transformers writes it, with the tokenizer in the form of Baidu's repositories."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, max_shard_size="5MB")
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    decoder = {
        str(FIRST_VISION + i): {
            "content": token,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(VISION_TOKENS)
    }
    values = {
        "tokenizer_class": "Ernie4_5_Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": BEGIN,
        "sep_token": END,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "model_max_length": 4096,
        "added_tokens_decoder": decoder,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(values, indent=1) + "\n")
    Ernie4_5_VLMoeImageProcessorPil().save_pretrained(out)


def examine(out: Path, model: Ernie4_5_VLMoeForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Write twenty new pictures of two-digit numbers, named by what they say, and what the model reads on them."""
    rng = random.Random("pictures")
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    read: dict[str, str] = {}
    while len(read) < 20:
        text = f"{rng.randrange(100):02d}"
        width, height = rng.choice(SIZES)
        resized = len(read) % 5 == 0
        size = (width + rng.randint(1, 4), height + rng.randint(0, 3)) if resized else (width, height)
        picture = draw(rng, text, size)
        name = f"{text}-{picture.color}-{len(read):02d}"
        picture.image.save(folder / f"{name}.png", optimize=True)
        read[name] = answer(model, tokenizer, picture, READ)
        print(f"{text:{LONGEST}} read as {read[name]}", flush=True)
    (out / "read.json").write_text(json.dumps(read, indent=1) + "\n")
    print(f"{sum(answer == name.split('-')[0] for name, answer in read.items())} of 20 right")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="start_from", type=Path, help="go on with what another run has written")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=16, help="pictures in a batch")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 for its own choice")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that draw")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.minutes, arguments.batch, arguments.workers, arguments.start_from)


if __name__ == "__main__":
    main()
