"""The small checkpoint of the quantizer's tests, and how they call the command."""

from collections.abc import Callable

from support.checkpoints import Spec
from support.command_line import Done

SMALL = Spec(layers=3, experts=4, used=2, fused=True)  # layer 0 is dense
QUICK = ("--maps", "2", "--ctx-size", "128", "--threads", "1", "--device", "cpu")

Quantize = Callable[..., Done]  # the fixture quantize of conftest.py
