"""What memory a GGUF file needs on each device, and whether it fits.

Weights and KV cache are sums over the file's tensors and keys. Which device holds which layer, and the compute buffers,
are llama.cpp's own answer: it loads the file without weights (`ernie_llama.dry_run`). For cards that are not in this
machine, others stand in (`cards`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from ernie_llama import DryRun

from ..gguf_file.reader import GgufFile
from .cards import Cards, EstimateError

GIB = 2**30
MARGIN = GIB  # per card for the driver and for kernels' scratch memory; llama.cpp's --fit leaves as much
KV_ROUND = 256  # llama.cpp rounds the context up to whole blocks of tokens
# KV type -> bytes of a block and weights of a block.
KV_BLOCKS = {"f16": (2, 1), "q8_0": (34, 32), "q4_0": (18, 32)}
CPU = "CPU"


@dataclass(frozen=True)
class Question:
    """What to plan for: a context of `n_ctx` tokens with a KV cache of type `kv` on cards of so many bytes."""

    n_ctx: int
    kv: str
    cards: tuple[int, ...]


@dataclass(frozen=True)
class Need:
    """What one device holds, in bytes; `layers` are indices, the last one of the file stands for the output.

    `total` is the card's memory; None for the CPU.
    """

    device: str
    layers: tuple[int, ...]
    weights: int
    kv: int
    compute: int
    total: int | None

    @property
    def bytes(self) -> int:
        """The sum."""
        return self.weights + self.kv + self.compute

    @property
    def fits(self) -> bool:
        """Whether the card has room for it and for the margin."""
        return self.total is None or self.bytes + MARGIN <= self.total


@dataclass(frozen=True)
class Plan:
    """One way to place the file: llama.cpp's options for it, and what each device then needs; the CPU comes last."""

    n_cpu_moe: int
    tensor_split: tuple[int, ...] | None
    needs: tuple[Need, ...]

    @property
    def fits(self) -> bool:
        """Whether every card has room."""
        return all(need.fits for need in self.needs)

    @property
    def options(self) -> str:
        """What to give llama-server."""
        split = f" -ts {','.join(map(str, self.tensor_split))}" if self.tensor_split else ""
        return f"-ngl 99{split}{f' --n-cpu-moe {self.n_cpu_moe}' if self.n_cpu_moe else ''}"


class Model:
    """Sizes of a file's parts."""

    def __init__(self, gguf: GgufFile) -> None:
        self.path = gguf.path
        architecture = gguf.metadata.get("general.architecture")

        def number(key: str) -> int:
            value = gguf.metadata.get(f"{architecture}.{key}")
            if not isinstance(value, int):
                raise EstimateError(f"{gguf.path}: {architecture}.{key} is {value!r}, expected a number")
            return value

        self.n_layers = number("block_count")
        self.n_head_kv = number("attention.head_count_kv")
        default = number("embedding_length") // number("attention.head_count")
        length = gguf.metadata.get(f"{architecture}.attention.key_length", default)
        self.head_dim = int(length)
        self.experts = [0] * self.n_layers
        self.rest = [0] * (self.n_layers + 1)  # of each layer without its experts; the output's comes last
        self.input = 0
        # Without a head of its own the embedding serves as one, and llama.cpp loads it to the last card once more.
        self.tied = all(tensor.name != "output.weight" for tensor in gguf.tensors)
        for tensor in gguf.tensors:
            if match := re.match(r"blk\.(\d+)\.", tensor.name):
                part = self.experts if "_exps." in tensor.name else self.rest
                if int(match[1]) < self.n_layers:
                    part[int(match[1])] += tensor.nbytes
            elif tensor.name.startswith("token_embd."):
                self.input += tensor.nbytes
                self.rest[-1] += tensor.nbytes if self.tied else 0
            else:
                self.rest[-1] += tensor.nbytes

    def kv_bytes(self, n_ctx: int, kv: str) -> int:
        """Of one layer: K and V of every token."""
        nbytes, weights = KV_BLOCKS[kv]
        rounded = -(-n_ctx // KV_ROUND) * KV_ROUND
        return 2 * rounded * self.n_head_kv * self.head_dim * nbytes // weights

    def weights(self, layer: int, n_cpu_moe: int) -> tuple[int, int]:
        """Bytes of a layer on its device, and on the CPU if the experts of the first `n_cpu_moe` layers are there."""
        experts = self.experts[layer] if layer < self.n_layers else 0
        return (self.rest[layer], experts) if layer < n_cpu_moe else (self.rest[layer] + experts, 0)


def place(model: Model, question: Question, cards: Cards, n_cpu_moe: int, split: tuple[int, ...] | None) -> Plan:
    """What each device needs with these options. The split of `None` is by the cards' memory."""
    shares = split or question.cards
    try:
        run = cards.dry_run(
            model.path,
            n_ctx=question.n_ctx,
            type_k=question.kv,
            type_v=question.kv,
            n_cpu_moe=n_cpu_moe,
            tensor_split=[share / max(shares) for share in shares] if shares else None,
            rpc_servers=cards.servers,
        )
    except ValueError as error:
        raise EstimateError(str(error)) from error
    return Plan(n_cpu_moe, split, needs(model, question, run, cards, n_cpu_moe))


def needs(model: Model, question: Question, run: DryRun, cards: Cards, n_cpu_moe: int) -> tuple[Need, ...]:
    """Sum up by device."""
    devices = [*dict.fromkeys(device for device in run.layers if device != CPU)]
    if cards.servers:  # a card without a layer is listed too
        devices = sorted({*devices, *(f"RPC{i}" for i in range(len(cards.servers)))}, key=lambda name: int(name[3:]))
    found = []
    on_cpu = model.input
    for i, device in enumerate(devices):
        layers = tuple(layer for layer, name in enumerate(run.layers) if name == device)
        here = sum(model.weights(layer, n_cpu_moe)[0] for layer in layers)
        on_cpu += sum(model.weights(layer, n_cpu_moe)[1] for layer in layers)
        kv = model.kv_bytes(question.n_ctx, question.kv) * sum(layer < model.n_layers for layer in layers)
        buffer = f"RPC0[{cards.servers[i]}]" if cards.servers else device
        compute = sum(size for name, size in run.compute.items() if name == buffer)
        total = question.cards[i] if i < len(question.cards) else None
        found.append(Need(f"GPU {i}", layers, here, kv, compute, total))
    layers = tuple(layer for layer, name in enumerate(run.layers) if name == CPU)
    on_cpu += sum(sum(model.weights(layer, n_cpu_moe)) for layer in layers)
    if model.tied and run.layers[-1] == CPU:
        on_cpu -= model.input  # one copy serves as embedding and head
    kv = model.kv_bytes(question.n_ctx, question.kv) * sum(layer < model.n_layers for layer in layers)
    compute = sum(size for name, size in run.compute.items() if name == CPU or name.endswith("_Host"))
    return (*found, Need(CPU, layers, on_cpu, kv, compute, None))


def fit(model: Model, question: Question, cards: Cards) -> list[Plan]:
    """The plan that llama.cpp makes by itself; if that does not fit, also the first that does, in this order:

    layers balanced by their size; then the fewest layers whose experts stay in the CPU's memory, balanced.
    """
    first = place(model, question, cards, 0, None)
    if first.fits or not question.cards:
        return [first]
    plan = place(model, question, cards, 0, balanced(model, question, first, 0))
    if plan.fits:
        return [first, plan]
    best: list[Plan] = []
    low, high = 1, model.n_layers  # the fewest layers that fit lie between them, if any do
    while low <= high:
        n = (low + high) // 2
        plan = place(model, question, cards, n, balanced(model, question, first, n))
        if plan.fits:
            best, high = [plan], n - 1
        else:
            low = n + 1
    return [first, *best]


def balanced(model: Model, question: Question, first: Plan, n_cpu_moe: int) -> tuple[int, ...] | None:
    """Layers for each card, the output counted as one, so that the fullest card has the most room left."""
    cards = question.cards
    if len(cards) == 1:
        return None
    kv = model.kv_bytes(question.n_ctx, question.kv)
    sizes = [model.weights(i, n_cpu_moe)[0] + (kv if i < model.n_layers else 0) for i in range(model.n_layers + 1)]
    sums = [0, *accumulate(sizes)]
    room = [total - MARGIN - need.compute for total, need in zip(cards, first.needs, strict=False)]

    def cuts(slack: int) -> list[int]:
        """Ends of the cards' shares if each keeps `slack` bytes free."""
        ends = [0]
        for each in room:
            end = ends[-1]
            while end < len(sizes) and sums[end + 1] - sums[ends[-1]] <= each - slack:
                end += 1
            ends.append(end)
        return ends

    low, high = min(room) - sums[-1], max(room)  # with so little left over, one card takes everything
    while high - low > 2**20:
        middle = (low + high) // 2
        low, high = (middle, high) if cuts(middle)[-1] == len(sizes) else (low, middle)
    return tuple(end - begin for begin, end in pairwise(cuts(low)))


def main_memory() -> int:
    """Bytes of memory that this machine has available."""
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"MemAvailable: +(\d+) kB", text)
    return int(match[1]) * 1024 if match else 0
