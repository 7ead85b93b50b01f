"""`ernie-gguf verify`: every weight of a GGUF against the checkpoint it was made from, decoded by other code.

The mapping says which source belongs to which tensor; `decode` decodes every value anew. A tensor is exact, or
differs by no more than its type explains, or is a mismatch.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np

from ..checkpoint.k_order import KOrder
from ..checkpoint.shards import ShardReader
from ..errors import GgufError
from ..gguf_file.reader import GgufFile, GgufTensor
from ..gguf_file.types import MIX_KEY
from ..mapping import MappedTensor, TensorMap
from ..workers import in_order
from . import decode
from .chunk import Chunk, chunks_of, orders_of
from .finding import Finding, Verdict
from .rows import compare_rows


def planned_types(file: GgufFile) -> dict[str, str]:
    """The types that a mix gives its tensors, by the file's own metadata; nothing if it is not a mix."""
    entries = file.metadata.get(MIX_KEY, [])
    if not isinstance(entries, list) or not all(isinstance(each, str) and "=" in each for each in entries):
        raise GgufError(f"{file.path}: {MIX_KEY} is damaged: expected a list of NAME=TYPE")
    return dict(each.rsplit("=", 1) for each in entries)


def _mismatch(tensor: GgufTensor | None, mapped: MappedTensor, planned: Mapping[str, str]) -> str:
    """Why a tensor cannot be compared at all, if so."""
    if tensor is None:
        return "missing from the GGUF"
    ne = tuple(reversed(mapped.expected.stored_shape))
    if tensor.ne not in (ne, (*ne, 1)):
        return f"ne is {list(tensor.ne)}, expected {list(ne)}"
    if tensor.type_name != planned.get(tensor.name, tensor.type_name):
        return f"type {tensor.type_name}, but the file's own plan says {planned[tensor.name]}"
    if tensor.type_name not in decode.GGUF_DECODERS:
        return f"type {tensor.type_name} is not one that ernie-gguf writes"
    return ""


def _unread(mapped: MappedTensor, tensor: GgufTensor | None, planned: Mapping[str, str]) -> Verdict:
    """The verdict before any weight is compared: fine so far, or why it cannot be compared."""
    problem, type_name = _mismatch(tensor, mapped, planned), tensor.type_name if tensor else ""
    if mapped.expected.computed:
        return Verdict(mapped.name, "computed", type_name, True, Finding(problem=problem))
    source = mapped.parts[0].source
    return Verdict(mapped.name, source.label, type_name, type_name in source.exact_types, Finding(problem=problem))


def _compare_computed(file: GgufFile, tensor: GgufTensor, mapped: MappedTensor) -> Finding:
    """A tensor that no checkpoint has; tests derive its values in another way."""
    found = decode.gguf_rows(np.array(file.rows(tensor)), tensor.type_name, tensor.ne[0]).reshape(-1)
    return Finding(values=found.size, wrong=int((found != np.array(mapped.expected.computed, np.float32)).sum()))


def tensors_of(mapping: TensorMap, file: GgufFile) -> tuple[MappedTensor, ...]:
    """The tensors that a file should hold: those of the mmproj if it is one, else the model's."""
    return mapping.projector if file.metadata.get("general.architecture") == "clip" else mapping.tensors


def verify(
    wanted: Iterable[MappedTensor],
    file: GgufFile,
    threads: int,
    progress: Callable[[int], None],
    k_order: KOrder = KOrder.AUTO,
) -> list[Verdict]:
    """Compare all tensors; one verdict each, in the plan's order, then those that only the GGUF has.

    `k_order` is that of the checkpoint's 2-bit experts; AUTO takes what the file says.

    `progress` is called with the number of weights compared. Memory is bounded by threads times a chunk.
    """
    mapping, orders = tuple(wanted), orders_of(file, k_order)
    tensors, planned = {tensor.name: tensor for tensor in file.tensors}, planned_types(file)
    verdicts = {mapped.name: _unread(mapped, tensors.get(mapped.name), planned) for mapped in mapping}

    def compared(mapped: MappedTensor, chunk: Chunk) -> tuple[str, Finding]:
        return mapped.name, compare_rows(reader, file, tensors[mapped.name], chunk)

    with ShardReader() as reader, ThreadPoolExecutor(threads) as executor:
        reader.open({path for mapped in mapping for part in mapped.parts for path in part.source.paths})
        comparable = [mapped for mapped in mapping if verdicts[mapped.name].ok]
        for mapped in comparable:
            if mapped.expected.computed:
                found = _compare_computed(file, tensors[mapped.name], mapped)
                verdicts[mapped.name] = replace(verdicts[mapped.name], finding=found)
        chunks = partial(chunks_of, orders=orders, calibrated=bool(planned))
        calls = (partial(compared, mapped, chunk) for mapped in comparable for chunk in chunks(mapped))
        with closing(in_order(calls, executor, 2 * threads)) as results:
            for name, found in results:
                verdicts[name] = replace(verdicts[name], finding=verdicts[name].finding + found)
                progress(found.values)
    extra = [tensor for name, tensor in tensors.items() if name not in verdicts]
    missing = Finding(problem="not in the checkpoint")
    return [*verdicts.values(), *(Verdict(tensor.name, "", tensor.type_name, False, missing) for tensor in extra)]
