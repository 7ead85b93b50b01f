"""The errors a user can meet: one line each: what was found, what was expected, what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ErnieGgufError(Exception):
    """Base of every error that the command line prints as `error: …` and exits 1 for."""


class CheckpointError(ErnieGgufError):
    """The checkpoint's files cannot be read: missing, truncated, or their headers contradict themselves."""


class ConfigError(ErnieGgufError):
    """config.json is missing or holds a value this converter cannot honour."""


class ArchitectureError(ConfigError):
    """config.json names an architecture that is no ERNIE-4.5."""


class PlanError(ErnieGgufError):
    """The checkpoint's tensors are not those that config.json promises, or do not fit the output type."""


class TokenizerError(ErnieGgufError):
    """The tokenizer's files are missing or inconsistent with config.json."""


class EncodeError(ErnieGgufError):
    """A value has no place in the output type: NaN, infinity, or out of range.

    `row` and `column` count from the first row given; a caller that knows the tensor adds its name.
    """

    def __init__(self, row: int, column: int, problem: str, tensor: str = "") -> None:
        super().__init__(f"{f'tensor {tensor}: ' if tensor else ''}row {row}, column {column}: {problem}")
        self.row = row
        self.column = column
        self.problem = problem


class OutputError(ErnieGgufError):
    """The output cannot be written: it exists, its folder does not, no permission, or the disk is full."""


class GgufError(ErnieGgufError):
    """A GGUF file cannot be read: truncated, malformed, or of a layout this version does not know."""


class Ccq2Error(GgufError):
    """Bytes that do not form a ccq2 row, or a row length that ccq2 cannot hold."""


class ExtraError(ErnieGgufError):
    """`quantize` lacks a package of its extra."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"quantize needs {package}: pip install 'ernie-gguf[quantize]', or `make quantizer` in a checkout"
        )


class CalibrationError(ErnieGgufError):
    """The calibration text cannot be read, is not UTF-8, or is too short."""


class QuantizeError(ErnieGgufError):
    """The checkpoint has nothing to quantize, or is quantized already, or the GPU's memory is too small."""


class ActivationError(ErnieGgufError):
    """The forward pass of the calibration text gave NaN or infinity."""


class WorkspaceError(ErnieGgufError):
    """An interrupted run cannot be resumed: its inputs differ, it is in use, or its folder is damaged."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. `left` says what the command has left behind, and how to go on."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.left = ""


@contextmanager
def leaving(what: str | Callable[[], str]) -> Iterator[None]:
    """Say of a `Stopped` that passes what the block leaves behind, unless a block within has said it."""
    try:
        yield
    except Stopped as stop:
        stop.left = stop.left or (what if isinstance(what, str) else what())
        raise


def one_line(error: Exception) -> str:
    """An error's message without line breaks, for messages that list what was tried."""
    head, *lines = str(error).splitlines()
    tried = [line.strip() for line in lines if line.startswith("  ")]
    rest = [line for line in lines if not line.startswith("  ")]
    return "; ".join([" ".join(filter(None, [head, ", ".join(tried)])), *rest])
