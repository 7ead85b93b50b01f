"""One encoder per GGML type: what the experts of a run need of `encoder` and `stock_encoder`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from ..arrays import U8
from ..ccq2.code_maps import CODE_MAPS
from ..checkpoint.values import Values
from ..errors import EncodeError
from ..gguf_file.types import GgmlType
from ..stock.types import STOCK_TYPES
from ..transform import ALL_EXACT, ENCODERS, Inexact, encode_values
from ..transform import dequantize as transform_dequantize
from .encoder import Encoded, Pipeline
from .hessian import damped
from .kernels import Kernels, make_codebooks
from .settings import Settings, stock_kernels_for
from .stock_encoder import StockPipeline
from .workers import Workers


class Encoder(Protocol):
    """Encodes matrices into one type."""

    @property
    def name(self) -> str:
        """The type's."""

    def encode(self, w: torch.Tensor, h: torch.Tensor) -> Encoded:
        """Encode w [B, N, K], N a multiple of 16, for inputs with the Hessians h [B, K, K]."""


@dataclass(frozen=True)
class Rounding:
    """Types so fine that rounding serves them: floats and q8_0. The Hessians only measure."""

    ggml_type: GgmlType

    @property
    def name(self) -> str:
        """The type's."""
        return self.ggml_type.name.lower()

    def encode(self, w: torch.Tensor, h: torch.Tensor) -> Encoded:
        """See Encoder."""
        rows = w.flatten(0, 1).cpu().numpy()
        data = np.ascontiguousarray(ENCODERS[self.ggml_type](rows)).view(np.uint8)
        value = dequantize(data, GGMLQuantizationType(self.ggml_type)).reshape(w.shape)
        found = torch.from_numpy(np.ascontiguousarray(value, np.float32)).to(w.device)
        wide, error, metric = w.double(), (w - found).double(), damped(h, 0.0)
        cost = ((error @ metric) * error).sum(2)
        return Encoded(
            list(data.reshape(*w.shape[:2], -1)),
            found,
            torch.zeros(len(w), 0, w.shape[1], dtype=torch.uint8),
            wide.square().sum(2),
            error.square().sum(2),
            ((wide @ metric) * wide).sum(2),
            cost,
            cost,
        )


def make_encoders(
    types: Iterable[GgmlType], settings: Settings, kernels: Kernels, workers: Workers
) -> Mapping[GgmlType, Encoder]:
    """The encoder of each type; `kernels` are ccq2's. Only what is needed is set up."""
    found: dict[GgmlType, Encoder] = {}
    for ggml_type in set(types):
        if ggml_type is GgmlType.CCQ2:
            codebooks = make_codebooks(CODE_MAPS[: settings.maps], settings.device)
            own = workers.stoppable(kernels)
            found[ggml_type] = Pipeline(codebooks, own, settings.passes, settings.percdamp)
        elif (kind := STOCK_TYPES.get(ggml_type.name.lower())) is not None:
            found[ggml_type] = StockPipeline(kind, workers.stoppable_stock(stock_kernels_for(settings.device)))
        else:
            found[ggml_type] = Rounding(ggml_type)
    return found


def encode_rest(values: Values, ggml_type: GgmlType) -> tuple[U8, Inexact]:
    """What `write_tensors` asks for: as `convert` does, and llama.cpp's other types by squared error, on the CPU."""
    if ggml_type in ENCODERS or (kind := STOCK_TYPES.get(ggml_type.name.lower())) is None:
        return encode_values(values, ggml_type)
    rows = transform_dequantize(values)
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise EncodeError(
            row, column, f"{rows[row, column]:g} does not fit {kind.name}, which holds finite values only"
        )
    return StockPipeline(kind, stock_kernels_for("cpu")).round(rows), ALL_EXACT
