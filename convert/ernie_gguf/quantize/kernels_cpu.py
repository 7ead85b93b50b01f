"""The inner loops compiled for CPUs, ccq2/search.cpp: six to eight times as fast as torch (quantize_speed.py)."""

import ctypes

import torch

from ..ccq2 import native
from .hessian import GroupHessian
from .kernels import Codebooks, RowGroup


class CpuKernels:
    """See Kernels for what each method does. `width` of the vector registers, in bytes; None: the widest."""

    def __init__(self, library: ctypes.CDLL, width: int | None = None) -> None:
        self._library = library
        self._width = ctypes.c_int(width or native.vector_width(library))

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        tables = codebooks.tables(hessian.block_root)
        small = [a.contiguous() for a in (hessian.block_root, hessian.feedback, tables)]
        outputs = (rows.codes, rows.scales, rows.e, cost)
        self._call("ccq_feedback_group", rows, codebooks, (rows.w, target, rows.d, *small, rows.map_index, *outputs))

    def descend_group(
        self, rows: RowGroup, eh: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        tables = codebooks.tables(hessian.diag_root)
        small = [a.contiguous() for a in (hessian.h, hessian.diag_inverse, hessian.diag_root, tables)]
        outputs = (rows.codes, rows.scales, rows.e, cost)
        self._call("ccq_descend_group", rows, codebooks, (rows.w, eh, rows.d, *small, rows.map_index, *outputs))

    def _call(self, name: str, rows: RowGroup, codebooks: Codebooks, arrays: tuple[torch.Tensor, ...]) -> None:
        """Call `name`(register width, rows, stride of columns, code maps, arrays …) for each matrix."""
        function = getattr(self._library, name)
        code_maps = codebooks.code_maps.to(torch.uint32)
        n, stride = rows.w.shape[2], rows.w.stride(1)
        for b in range(len(rows.w)):
            pointers = (ctypes.c_void_p(a[b].data_ptr()) for a in arrays)
            sizes = (self._width, ctypes.c_int64(n), ctypes.c_int64(stride))
            function(*sizes, ctypes.c_void_p(code_maps.data_ptr()), *pointers)
