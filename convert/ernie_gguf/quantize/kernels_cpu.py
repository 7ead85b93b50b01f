"""The inner loops compiled for CPUs, ccq2/search.cpp: six to eight times as fast as torch (quantize_speed.py)."""

import ctypes
from collections.abc import Callable

import torch

from ..ccq2 import native
from .hessian import GroupHessian
from .kernels import Codebooks, RowGroup


class CcqRows(ctypes.Structure):
    """`ccq_rows` of search.cpp: what both kernels read and write of one matrix."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("w", ctypes.c_void_p),
        ("d", ctypes.c_void_p),
        ("member", ctypes.c_void_p),
        ("maps", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("metric", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("e", ctypes.c_void_p),
        ("cost", ctypes.c_void_p),
    ]


class CpuKernels:
    """See Kernels for what each method does. `width` of the vector registers, in bytes; None: the widest."""

    def __init__(self, library: ctypes.CDLL, width: int | None = None) -> None:
        self._library = library
        self._width = ctypes.c_int(width or native.vector_width(library))

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        own = (target, hessian.feedback.contiguous())
        self._call(self._library.ccq_feedback_group, rows, hessian.block_root, codebooks, cost=cost, own=own)

    def descend_group(
        self, rows: RowGroup, eh: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        own = (eh, hessian.h.contiguous(), hessian.diag_inverse.contiguous())
        self._call(self._library.ccq_descend_group, rows, hessian.diag_root, codebooks, cost=cost, own=own)

    def _call(
        self,
        function: Callable[..., object],
        rows: RowGroup,
        metric: torch.Tensor,
        codebooks: Codebooks,
        *,
        cost: torch.Tensor,
        own: tuple[torch.Tensor, ...],
    ) -> None:
        """Call `function`(register width, rows, own arrays …) for each matrix."""
        code_maps, tables, metric = codebooks.code_maps.to(torch.uint32), codebooks.tables(metric), metric.contiguous()
        n, stride = rows.w.shape[2], rows.w.stride(1)
        outputs = (rows.codes, rows.scales, rows.e, cost)
        for b in range(len(rows.w)):
            before = (a[b].data_ptr() for a in (rows.w, rows.d, rows.map_index))
            after = (a[b].data_ptr() for a in (tables, metric, *outputs))
            matrix = CcqRows(n, stride, *before, code_maps.data_ptr(), *after)
            function(self._width, ctypes.byref(matrix), *(ctypes.c_void_p(a[b].data_ptr()) for a in own))
