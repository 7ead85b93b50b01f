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
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from vl_tiny_batches import IGNORED, KINDS, Batch, Drawer, Pictures
from vl_tiny_pictures import (
    BEGIN,
    CELL,
    CHAT_TEMPLATE,
    COLOR,
    DIGITS,
    END,
    FIRST_VISION,
    IMAGE,
    LETTERS,
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
)

RATE = 1e-3
EYES_OPEN = 0.15  # loss of the tower and resampler alone at which the language model begins to learn
NEXT_LENGTH = 0.25  # loss of answers at which texts get a character longer
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The twenty pictures of the example: characters and length of what is written on each.
SHOWN = [(DIGITS, 2)] * 7 + [(DIGITS, 3)] * 4 + [(DIGITS, 4)] * 3 + [(DIGITS, 5)] * 2 + [(LETTERS, 4), (LETTERS, 5)] * 2


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


def see(tower: torch.nn.Module, pixels: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[pictures, patches, 588] of one size -> [pictures, patches, width]: the tower's own modules on a whole batch."""
    rows, columns = (torch.arange(n, device=pixels.device) for n in grid[1:])
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


def embeddings(model: Ernie4_5_VLMoeForConditionalGeneration, pictures: Pictures) -> torch.Tensor:
    """Of pictures of one size, [pictures, tokens, hidden]."""
    seen = see(model.model.vision_tower, normalized(pictures.patches), pictures.grid)
    return resample(model.model.resampler_model, seen)


def forward(
    model: Ernie4_5_VLMoeForConditionalGeneration,
    ids: torch.Tensor,
    grids: list[tuple[int, int, int]],
    seen: list[torch.Tensor],
) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary]; `seen` are the embeddings of each row's pictures."""
    x = model.model.get_input_embeddings()(ids)
    position = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if seen:
        first = ids[:1].cpu()
        position = model.model.get_rope_index(
            first, (first == FIRST_VISION).long(), image_grid_thw=torch.tensor(grids)
        )[0]
        x = x.masked_scatter((ids == FIRST_VISION)[..., None], torch.cat(seen, 1))
    hidden = model.model.language_model(
        inputs_embeds=x,
        position_ids=position.to(ids.device).expand(3, len(ids), -1),
        moe_mm_token_type_ids=(ids >= FIRST_VISION).long(),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)


def all_experts(
    experts: torch.nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token [n, hidden]: twice the arithmetic of the two chosen, but a GPU never waits."""
    share = torch.zeros(len(hidden), experts.num_experts, device=hidden.device, dtype=weights.dtype)
    share = share.scatter_add(1, chosen, weights)
    gate, up = torch.matmul(hidden, experts.gate_up_proj.transpose(1, 2)).chunk(2, -1)  # [experts, n, width]
    inner = experts.act_fn(gate) * up * share.T[:, :, None]
    return torch.matmul(inner, experts.down_proj.transpose(1, 2)).sum(0)


ALL_EXPERTS_FUNCTIONS.register("all", all_experts)


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
    model = Ernie4_5_VLMoeForConditionalGeneration._from_config(make_config(), experts_implementation="all")
    initialize(model)
    return model


def load(folder: Path, experts: str = "eager") -> Ernie4_5_VLMoeForConditionalGeneration:
    """What a run has written, in float32."""
    return Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts, local_files_only=True
    )


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
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
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


def write(out: Path, model: Ernie4_5_VLMoeForConditionalGeneration, tokenizer_model: bytes) -> None:
    """The checkpoint as transformers writes it, with the tokenizer in the form of Baidu's repositories."""
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
    """Write twenty new pictures of texts kept for tests, named by what they say, and what the model reads on them."""
    rng = random.Random("pictures")
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    read: dict[str, str] = {}
    for number, (characters, length) in enumerate(SHOWN):
        text = random_text(rng, characters, length, test=True)
        width, height = rng.choice([each for each in SIZES if each[0] >= CELL * length])
        resized = number % 5 == 0
        size = (width + rng.randint(1, 4), height + rng.randint(0, 3)) if resized else (width, height)
        picture = draw(rng, text, size)
        name = f"{text}-{picture.color}-{number:02d}"
        picture.image.save(folder / f"{name}.png", optimize=True)
        read[name] = answer(model, tokenizer, picture, READ)
        color = answer(model, tokenizer, picture, COLOR)
        print(f"{text:{LONGEST}} read as {read[name]:{LONGEST}} {picture.color:6} seen as {color}", flush=True)
    (out / "read.json").write_text(json.dumps(read, indent=1) + "\n")
    print(f"{sum(answer == name.split('-')[0] for name, answer in read.items())} of {len(read)} right")


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
