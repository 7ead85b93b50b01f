"""The inner loops for llama.cpp's types compiled for CPUs, stock/search.cpp."""

import ctypes
from collections.abc import Callable

import numpy as np
import torch

from ..arrays import F32
from ..ccq2 import native
from ..stock.types import StockType
from .hessian import GroupHessian, diagonal_blocks
from .stock_kernels import StockGroup
from .stock_torch import middle


class StockKind(ctypes.Structure):
    """`stock_kind` of search.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dim", "sub", "words", "signs", "pair", "ruled", "tries", "uniform")),
        *((name, ctypes.c_float) for name in ("a", "c", "low", "high", "guess", "middle", "min_high")),
        ("grid", ctypes.c_void_p),
        ("trials", ctypes.c_void_p),
    ]


class StockRowsStruct(ctypes.Structure):
    """`stock_rows` of search.cpp."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("w", "e", "d", "dmin", "codes", "step", "minimum", "scales", "mins", "fed", "cost")
        ),
    ]


class _Described:
    """A type as search.cpp has it; keeps its tables alive."""

    def __init__(self, kind: StockType) -> None:
        words, rule = kind.codewords(), kind.rule
        self._grid: F32 = np.ascontiguousarray(words.T)
        self._trials = np.array(kind.trials.each, np.float32)
        steps = np.diff(words[:, 0])
        self.struct = StockKind(
            kind.dim,
            kind.sub,
            len(words),
            kind.signs,
            kind.pair,
            rule is not None,
            len(self._trials),
            bool(kind.dim == 1 and (steps == 1).all()),
            *((rule.a, rule.c, rule.low, rule.high) if rule else (1, 0, 0, 0)),
            kind.trials.guess,
            middle(kind) if kind.levels else 0,
            kind.min_high,
            self._grid.ctypes.data,
            self._trials.ctypes.data,
        )


class CpuStockKernels:
    """See StockKernels for what each method does. `width` of the vector registers, in bytes; None: the widest."""

    def __init__(self, library: ctypes.CDLL, width: int | None = None) -> None:
        self._library = library
        self._width = ctypes.c_int(width or native.vector_width(library))
        self._kinds: dict[str, _Described] = {}

    def feedback_group(
        self, kind: StockType, rows: StockGroup, target: torch.Tensor, hessian: GroupHessian, cost: torch.Tensor
    ) -> None:
        """See StockKernels."""
        root = hessian.block_root
        own = (root @ root.mT, root.contiguous(), hessian.feedback.contiguous())
        self._call(self._library.stock_feedback_group, kind, rows, target, cost, own)

    def descend_group(self, kind: StockType, rows: StockGroup, eh: torch.Tensor, hessian: GroupHessian) -> None:
        """See StockKernels."""
        h = hessian.h.contiguous()
        own = (diagonal_blocks(h, kind.dim), h, hessian.diag_inverse.contiguous())
        self._call(self._library.stock_descend_group, kind, rows, eh, None, own)

    def _call(  # noqa: PLR0917 - two calls
        self,
        function: Callable[..., object],
        kind: StockType,
        rows: StockGroup,
        fed: torch.Tensor,
        cost: torch.Tensor | None,
        own: tuple[torch.Tensor, ...],
    ) -> None:
        """Call `function`(register width, type, rows, own arrays …) for each matrix. Works in a copy of `fed`."""
        described = self._kinds.setdefault(kind.name, _Described(kind))
        fed, n, stride = fed.clone(memory_format=torch.contiguous_format), rows.w.shape[2], rows.w.stride(1)
        names = ("w", "e", "d", "dmin", "codes", "step", "minimum", "scales", "mins")
        for b in range(len(rows.w)):
            arrays = (getattr(rows, name)[b].data_ptr() for name in names)
            matrix = StockRowsStruct(
                n, stride, *arrays, fed[b].data_ptr(), None if cost is None else cost[b].data_ptr()
            )
            tables = (ctypes.c_void_p(a[b].data_ptr()) for a in own)
            function(self._width, ctypes.byref(described.struct), ctypes.byref(matrix), *tables)
