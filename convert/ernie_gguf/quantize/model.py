"""The pieces of ERNIE-4.5's forward pass in torch, float32 throughout, one decoder layer's weights in memory at a time.

Weights come from a conversion's plan, by their GGUF names, so every checkpoint that `convert` reads runs here. The
caller loops over the layers and over the experts of each, which it quantizes. Nothing depends on the order of atomics,
so the same inputs on one machine give the same bytes; the caller keeps TF32 off.

Shapes: T tokens, S sequences of L tokens each, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from ..checkpoint.config import ErnieConfig
from ..checkpoint.shards import ShardReader
from ..checkpoint.values import FloatRows, Values
from ..mapping import Part
from ..plan import Plan
from ..transform import dequantize

_NORM_MIN = 1e-12  # moe_norm_min of every released checkpoint: all-zero weights are not divided by 0


def _widened(values: Values, device: torch.device | str) -> torch.Tensor:
    """Float32 on the device. bfloat16 is copied as it is and widened there."""
    if not isinstance(values, FloatRows):
        return torch.from_numpy(dequantize(values)).to(device)
    if values.dtype == "BF16":  # its bits, as uint16
        return torch.from_numpy(values.rows.view(np.int16)).view(torch.bfloat16).to(device).float()
    return torch.from_numpy(values.rows).to(device).float()


class Weights:
    """The tensors of a plan by their GGUF names, float32 on `device`.

    Opens the shards in `reader`, which the caller closes.
    """

    def __init__(self, plan: Plan, reader: ShardReader, device: torch.device | str = "cpu") -> None:
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._reader = reader
        self._device = device
        reader.open({path for tensor in plan.tensors for part in tensor.parts for path in part.source.paths})

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _read(self, part: Part, row: int, rows: int) -> torch.Tensor:
        return _widened(part.source.storage.read(self._reader, part.source, part.row + row, rows), self._device)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in its shape."""
        tensor = self._tensors[name]
        return torch.cat([self._read(part, 0, part.rows) for part in tensor.parts]).reshape(tensor.shape)

    def expert(self, name: str, expert: int) -> torch.Tensor:
        """The matrix [N, K] of one expert of a stacked tensor [E, N, K]."""
        part = self._tensors[name].parts[expert]
        return self._read(part, 0, part.rows)

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows [n, K] of a matrix, read one by one."""
        (part,) = self._tensors[name].parts
        return torch.cat([self._read(part, row, 1) for row in rows])


def embed(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """[S, L] int64 -> [S, L, hidden]; reads only the rows of the tokens that occur."""
    used, places = tokens.unique(return_inverse=True)
    table = weights.rows("token_embd.weight", used.tolist())
    return table[places.to(table.device)]


def head(weights: Weights, config: ErnieConfig, x: torch.Tensor) -> torch.Tensor:
    """[..., hidden] after the last layer -> logits [..., vocab]. Loads the whole table."""
    name = "output.weight" if "output.weight" in weights else "token_embd.weight"
    return linear(rms_norm(x, weights.tensor("output_norm.weight"), config.rms_eps), weights.tensor(name))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE on [..., L, d]: at position p the pair (2i, 2i+1) turns by p * theta^(-2i/d)."""
    length, d = x.shape[-2:]
    frequencies = 1 / theta ** (torch.arange(0, d, 2, device=x.device).float() / d)
    angles = torch.arange(length, device=x.device).float()[:, None] * frequencies  # [L, d/2]
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def expert_hidden(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The input of `down`: [T, hidden] -> [T, width]."""
    return silu(linear(x, gate)) * linear(x, up)


@dataclass(frozen=True)
class _Mlp:
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(expert_hidden(x, self.gate, self.up), self.down)


class Layer:
    """One decoder layer without its experts.

    With x = attend(x) and h = ffn_norm(x), a dense layer's output is x + mlp(h); an MoE layer's is x + shared(h) + the
    sum of its experts' outputs for h, chosen and weighted by route(h).
    """

    def __init__(self, weights: Weights, config: ErnieConfig, layer: int) -> None:
        def load(name: str) -> torch.Tensor:
            return weights.tensor(f"blk.{layer}.{name}")

        def load_mlp(suffix: str) -> _Mlp:
            return _Mlp(*(load(f"ffn_{letter}{suffix}.weight") for letter in ("gate", "up", "down")))

        self._config = config
        self._attn_norm, self._ffn_norm = load("attn_norm.weight"), load("ffn_norm.weight")
        self._qkv = [load(f"attn_{letter}.weight") for letter in "qkv"]
        self._output = load("attn_output.weight")
        self.moe = config.moe if config.is_moe_layer(layer) else None
        if self.moe is None:
            self._mlp = load_mlp("")
            return
        self._used = self.moe.used
        self._router = load("ffn_gate_inp.weight")
        self._bias = load("exp_probs_b.bias") if self.moe.has_bias else None
        self._shared = load_mlp("_shexp") if self.moe.shared else None

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """x + attention(norm(x)), causal, each sequence on its own: [S, L, hidden] -> [S, L, hidden]."""
        config = self._config
        normed = rms_norm(x, self._attn_norm, config.rms_eps)
        q, k, v = (linear(normed, w).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for w in self._qkv)
        q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)  # [S, heads, L, d], [S, kv_heads, L, d]
        k, v = (t.repeat_interleave(config.heads // config.kv_heads, 1) for t in (k, v))
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)  # [S, heads, L, d]
        return x + linear(heads.transpose(1, 2).flatten(2), self._output)

    def ffn_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the MLP, the router and the experts, [..., hidden]."""
        return rms_norm(x, self._ffn_norm, self._config.rms_eps)

    def mlp(self, h: torch.Tensor) -> torch.Tensor:
        """The MLP of a dense layer, [..., hidden] -> [..., hidden]."""
        return self._mlp(h)

    def shared(self, h: torch.Tensor) -> torch.Tensor:
        """The shared experts of an MoE layer, [..., hidden] -> [..., hidden]; zeros if it has none."""
        return torch.zeros_like(h) if self._shared is None else self._shared(h)

    def route(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The router of an MoE layer: h [T, hidden] -> experts int64 [T, used] and their weights [T, used].

        Experts are chosen by probability plus correction bias; ties go to the lowest number. Their weights are the
        probabilities without the bias, normalised over the chosen.
        """
        probabilities = linear(h, self._router).softmax(-1)  # [T, E]
        scores = probabilities if self._bias is None else probabilities + self._bias
        experts = scores.sort(dim=-1, descending=True, stable=True).indices[:, : self._used]
        chosen = probabilities.gather(-1, experts)
        return experts, chosen / chosen.sum(-1, keepdim=True).clamp(min=_NORM_MIN)
