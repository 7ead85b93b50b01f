"""`ernie-gguf verify`: every weight of a GGUF against the checkpoint it was made from, decoded by other code.

The mapping says which source belongs to which tensor; `decode` decodes every value anew. A tensor is exact, or
differs by no more than its type explains, or is a mismatch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..arrays import F32, I64, U8, AnyArray, Bool
from ..checkpoint.k_order import GROUP, KOrder
from ..checkpoint.shards import ShardReader
from ..errors import GgufError
from ..gguf_file.reader import GgufFile, GgufTensor
from ..gguf_file.types import K_ORDER_KEY, MIX_KEY
from ..mapping import MappedTensor, Part, TensorMap
from ..workers import in_order
from . import decode

_CHUNK_VALUES = 4 << 20  # weights compared at once: some ten float32 and int64 arrays of that size per thread
FEW_BITS = ("ccq2", "q2_0", *decode.BY_GGUF_PY)  # values may be off by more than half a step: see _lossy_rows
_NONE = np.float32(0)
Tolerance = F32 | np.float32  # of each value, or of all
_SEARCH = 64  # how far around code_scale * 2^17 an exact M is looked for before a missed code counts as explained


@dataclass(frozen=True)
class Finding:
    """What comparing some rows gave; findings of a tensor add up.

    `explained` counts differing values that the type accounts for, `wrong` the others. `missed_rows` have no exact
    integer code map, `rounded_rows` a scale that f16 cannot hold. `square` and `square_error` are the sums of W² and
    (W - Ŵ)² of rows in a type of few bits, 0 of others.
    """

    values: int = 0
    explained: int = 0
    wrong: int = 0
    largest: float = 0.0
    relative: float = 0.0
    missed_rows: int = 0
    rounded_rows: int = 0
    square: float = 0.0
    square_error: float = 0.0
    problem: str = ""

    def __add__(self, other: "Finding") -> "Finding":
        return Finding(
            self.values + other.values,
            self.explained + other.explained,
            self.wrong + other.wrong,
            max(self.largest, other.largest),
            max(self.relative, other.relative),
            self.missed_rows + other.missed_rows,
            self.rounded_rows + other.rounded_rows,
            self.square + other.square,
            self.square_error + other.square_error,
            self.problem or other.problem,
        )


@dataclass(frozen=True)
class Orders:
    """Whether the checkpoint's 2-bit experts are shuffled, and whether the file's residual stream is in that order."""

    source_shuffled: bool
    file_shuffled: bool


def orders_of(file: GgufFile, k_order: KOrder) -> Orders:
    """What a file says, and what is known of the checkpoint; raises GgufError for an order that is not known here."""
    named = file.metadata.get(K_ORDER_KEY)
    if named not in (None, KOrder.SHUFFLED.value):
        raise GgufError(f"{file.path}: {K_ORDER_KEY} is {named!r}, expected 'shuffled' or no such key")
    file_shuffled = named is not None
    return Orders(file_shuffled if k_order is KOrder.AUTO else k_order is KOrder.SHUFFLED, file_shuffled)


@dataclass(frozen=True)
class Verdict:
    """The result for one tensor. `exact`: its type holds the source's values, so nothing should differ."""

    name: str
    source: str
    type_name: str
    exact: bool
    finding: Finding

    @property
    def ok(self) -> bool:
        """Whether nothing differs beyond what the type explains."""
        return not self.finding.wrong and not self.finding.problem


def _code_misses(data: U8, cs: F32, cz: F32) -> tuple[Bool, int]:
    """Code bytes [n, 256] that the GGUF's M, Z do not reproduce for a reason, and how many rows have such."""
    table = decode.source_codes(cs, cz)
    m, z, _ = decode.ccq2_header(data)
    found = (np.arange(256) * m[:, None] + z[:, None]) % 2**32 // 2**17
    missed = found != table % 2**15
    one_off = np.isin((found - table) % 2**15, (1, 2**15 - 1))
    for row in np.flatnonzero(missed.any(1)):
        # Not explained if a better map exists, or if a code is off by more than the nearest map would be.
        if (missed[row] & ~one_off[row]).any() or _has_exact_map(table[row], float(cs[row])):
            missed[row] = False
    return missed, int(missed.any(1).sum())


def _has_exact_map(codes: I64, cs: float) -> bool:
    centre = round(cs * 2**17)
    m = np.arange(centre - _SEARCH, centre + _SEARCH + 1)[:, None]
    low = (codes * 2**17 - np.arange(256) * m).max(1)
    high = ((codes + 1) * 2**17 - 1 - np.arange(256) * m).min(1)
    return bool((low <= high).any())


def _bound(expected: F32, type_name: str) -> F32:
    """The largest error that rounding to a type explains, value by value."""
    size = np.abs(expected).astype(np.float32)
    if type_name == "bf16":
        return size * np.float32(2.0**-8) + np.float32(2.0**-134)
    if type_name == "f16":
        return size * np.float32(2.0**-11) + np.float32(2.0**-25)
    block = size.reshape(len(size), -1, 32).max(2, keepdims=True)
    # half a step (q8_0) or a whole one (q4_0 cannot hold the largest value with the other sign), and the f16 scale
    steps, levels = (0.5, 127) if type_name == "q8_0" else (1.0, 8)
    bound = block * np.float32(steps / levels + 2.0**-10) + np.float32(levels * 2.0**-25)
    return np.repeat(bound, 32, axis=2).reshape(expected.shape)


def _code_tolerance(reader: ShardReader, chunk: "_Chunk", data: U8, k: int) -> tuple[Tolerance, Finding]:
    """Any error where a code byte has no place in an integer code map; rows with such a byte are counted."""
    missed, rows = _code_misses(data, *decode.ccq_map(reader, chunk.part.source, chunk.row, len(data)))
    if not rows:
        return _NONE, Finding()
    hit = np.take_along_axis(missed, data[:, 16 : 16 + k // 4].astype(np.int64), axis=1)
    return np.where(np.repeat(hit, 4, axis=1), np.float32(np.inf), _NONE), Finding(missed_rows=rows)


def _scale_tolerance(reader: ShardReader, chunk: "_Chunk", data: U8, _k: int) -> tuple[Tolerance, Finding]:
    """What rounding the channel's scale to f16 explains; rows with such a scale are counted."""
    q, scale = decode.channel_ints(reader, chunk.part.source, chunk.row, len(data))
    if chunk.move:
        q = chunk.move(q)
    off = np.abs(scale - scale.astype(np.float16).astype(np.float32)) * np.float32(1 + 2.0**-20)
    return np.abs(q).astype(np.float32) * off[:, None], Finding(rounded_rows=int((off > 0).sum()))


# (storage, ggml type) of exact repacks that may differ here and there -> the error allowed for each value, and why
_TOLERATED = {
    ("ccq wint2", "ccq2"): _code_tolerance,
    ("wint8", "q8_0"): _scale_tolerance,
    ("wint4", "q8_0"): _scale_tolerance,
    ("wint4", "q4_0"): _scale_tolerance,
}


def _tolerated(reader: ShardReader, chunk: "_Chunk", data: U8, type_name: str, k: int) -> tuple[Tolerance, Finding]:
    """The error of each value that an exact repack is allowed, 0 nearly everywhere, and the rows that have any."""
    tolerance = _TOLERATED.get((chunk.part.source.storage.name, type_name))
    return tolerance(reader, chunk, data, k) if tolerance else (_NONE, Finding())


def _not_finite(values: F32, where: str, chunk: "_Chunk") -> str:
    """That a value is NaN or infinity, and which one: no model works with it, even if both sides have it."""
    if (finite := np.abs(values) <= np.finfo(np.float32).max).all():
        return ""
    row, column = (int(i) for i in np.argwhere(~finite)[0])
    return f"row {chunk.at + row}, column {column} is {values[row, column]:g}{where}: not a finite number"


def _compare(reader: ShardReader, file: GgufFile, tensor: GgufTensor, chunk: "_Chunk") -> Finding:
    k, type_name = chunk.k, tensor.type_name
    rows = tensor.elements // k
    data = np.array(file.rows(tensor).reshape(rows, -1)[chunk.at : chunk.at + chunk.rows])
    if chunk.rows_moved:
        data = decode.rows_to_channels(data)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be anything in a damaged file
        expected = decode.source_rows(reader, chunk.part.source, chunk.row, chunk.rows)
        if chunk.head:
            expected = decode.to_sections(expected, chunk.head, chunk.slow)
        if chunk.move:
            expected = chunk.move(expected)
        found = decode.gguf_rows(data, type_name, k)
    same = found == expected
    if not same.all():
        same |= np.isnan(found) & np.isnan(expected)
    counted = Finding(
        values=found.size, problem=_not_finite(found, "", chunk) or _not_finite(expected, " in SRC", chunk)
    )
    if type_name == "ccq2" and not decode.ccq2_is_clean(data, k):
        counted = replace(counted, problem="padding or reserved word is not zero")
    exact = type_name in chunk.part.source.exact_types
    if same.all():
        # Rows without an exact map are counted even where none of the missed bytes occurs.
        return counted + (
            _tolerated(reader, chunk, data, type_name, k)[1] if exact and type_name == "ccq2" else Finding()
        )
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, np.float32(0), np.abs(found - expected))
        ratio = np.divide(error, np.abs(expected), out=np.zeros_like(error), where=expected != 0)
    error[np.isnan(error)] = np.inf
    if exact:
        tolerated, extra = _tolerated(reader, chunk, data, type_name, k)
        counted += extra
        wrong = int((error > tolerated).sum())
    elif type_name in FEW_BITS or (type_name == "q4_0" and chunk.calibrated):
        wrong = _lossy_rows(expected, found, error)
        counted += _squares(expected, error)
    else:
        wrong = int((error > _bound(expected, type_name)).sum())
    differing = int((~same).sum())
    return counted + Finding(0, differing - wrong, wrong, float(error.max()), float(ratio.max()))


def _squares(expected: F32, error: F32) -> Finding:
    """The sums that a tensor's relative error is made of."""
    power = float(np.square(expected, dtype=np.float64).sum())
    return Finding(square=power, square_error=float(np.square(error, dtype=np.float64).sum()))


def _lossy_rows(expected: F32, found: F32, error: F32) -> int:
    """How many values lie in rows of another direction or size than the source's.

    The plain encoder's rows have a cosine of 0.9 or more, the calibrated one's go down to 0.65 where few inputs say
    all; another row's cosine is about 0.
    """
    x, y = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        dot, power, size = (x * y).sum(1), (x * x).sum(1), (y * y).sum(1)
    right = (dot >= 0.5 * np.sqrt(power * size)) & (size >= power / 4) & (size <= power * 4)
    return int((error[~right] > 0).sum())


@dataclass(frozen=True)
class _Chunk:
    part: Part
    row: int  # in the source
    rows: int
    at: int  # in the GGUF tensor
    k: int
    head: int = 0  # rows of a head whose rows are permuted for M-RoPE, 0 if they are not
    slow: int = 0  # pairs of it that turn by time
    rows_moved: bool = False  # the file has each 64 rows in stored order
    move: Callable[[AnyArray], AnyArray] | None = None  # what takes the source's columns to where the file has them
    calibrated: bool = False  # in a mix q4_0 is not rounded to nearest


def _chunks(tensor: MappedTensor, orders: Orders, calibrated: bool) -> Iterator[_Chunk]:
    step = max(1, _CHUNK_VALUES // tensor.shape[-1])
    step = step // GROUP * GROUP or GROUP
    head, slow = len(tensor.head_order), 0
    if head:
        step = max(1, step // head) * head
        slow = head // 2 - tensor.head_order[0] // 2  # the first pair is the first of those that turn by time
    at = 0
    for part in tensor.parts:
        rows_moved = orders.file_shuffled and decode.rows_move(part.source)
        move = decode.column_mover(part.source, orders.source_shuffled, orders.file_shuffled)
        for row in range(part.row, part.row + part.rows, step):
            rows = min(step, part.row + part.rows - row)
            yield _Chunk(part, row, rows, at, tensor.shape[-1], head, slow, rows_moved, move, calibrated)
            at += rows


def planned_types(file: GgufFile) -> dict[str, str]:
    """The types that a mix gives its tensors, by the file's own metadata; nothing if it is no mix."""
    entries = file.metadata.get(MIX_KEY, [])
    if not isinstance(entries, list) or not all(isinstance(each, str) and "=" in each for each in entries):
        raise GgufError(f"{file.path}: {MIX_KEY} is damaged: expected a list of NAME=TYPE")
    return dict(each.rsplit("=", 1) for each in entries)


def _mismatch(tensor: GgufTensor | None, mapped: MappedTensor, planned: Mapping[str, str]) -> str:
    """Why a tensor cannot be compared at all, if so."""
    if tensor is None:
        return "missing from the GGUF"
    ne = tuple(reversed(mapped.file_shape or mapped.shape))
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
    if mapped.computed:
        return Verdict(mapped.name, "computed", type_name, True, Finding(problem=problem))
    source = mapped.parts[0].source
    return Verdict(mapped.name, source.label, type_name, type_name in source.exact_types, Finding(problem=problem))


def _compare_computed(file: GgufFile, tensor: GgufTensor, mapped: MappedTensor) -> Finding:
    """A tensor that no checkpoint has; tests derive its values in another way."""
    found = decode.gguf_rows(np.array(file.rows(tensor)), tensor.type_name, tensor.ne[0]).reshape(-1)
    return Finding(values=found.size, wrong=int((found != np.array(mapped.computed, np.float32)).sum()))


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

    def compared(mapped: MappedTensor, chunk: _Chunk) -> tuple[str, Finding]:
        return mapped.name, _compare(reader, file, tensors[mapped.name], chunk)

    with ShardReader() as reader, ThreadPoolExecutor(threads) as executor:
        reader.open({path for mapped in mapping for part in mapped.parts for path in part.source.paths})
        comparable = [mapped for mapped in mapping if verdicts[mapped.name].ok]
        for mapped in comparable:
            if mapped.computed:
                found = _compare_computed(file, tensors[mapped.name], mapped)
                verdicts[mapped.name] = replace(verdicts[mapped.name], finding=found)
        chunks = partial(_chunks, orders=orders, calibrated=bool(planned))
        calls = (partial(compared, mapped, chunk) for mapped in comparable for chunk in chunks(mapped))
        with closing(in_order(calls, executor, 2 * threads)) as results:
            for name, found in results:
                verdicts[name] = replace(verdicts[name], finding=verdicts[name].finding + found)
                progress(found.values)
    extra = [tensor for name, tensor in tensors.items() if name not in verdicts]
    missing = Finding(problem="not in the checkpoint")
    return [*verdicts.values(), *(Verdict(tensor.name, "", tensor.type_name, False, missing) for tensor in extra)]
