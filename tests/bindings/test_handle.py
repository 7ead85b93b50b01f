"""C objects are freed once, and never before what depends on them."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys

import pytest
from ernie_llama._lib.handle import Handle


def test_closed_once_and_unusable_afterwards() -> None:
    freed: list[object] = []
    pointer = ctypes.c_void_p(16)
    handle = Handle("model", pointer, freed.append)
    assert handle.pointer is pointer
    handle.close()
    handle.close()
    assert freed == [pointer]
    with pytest.raises(RuntimeError, match="the model is closed: create a new Llama to go on"):
        _ = handle.pointer


def test_freed_when_collected() -> None:
    freed: list[object] = []
    Handle("model", ctypes.c_void_p(16), freed.append)
    gc.collect()
    assert len(freed) == 1


def test_kept_objects_outlive_the_c_object_even_in_a_cycle() -> None:
    freed: list[str] = []

    def open_both() -> None:
        model = Handle("model", ctypes.c_void_p(16), lambda _: freed.append("model"))
        context = Handle("context", ctypes.c_void_p(32), lambda _: freed.append("context"), model)
        both: list[object] = [model, context]
        both.append(both)

    open_both()
    for _ in range(2):  # the model becomes garbage when its context is gone
        gc.collect()
    assert freed == ["context", "model"]


def test_at_exit_the_newest_is_freed_first() -> None:
    code = """
from ctypes import c_void_p
from ernie_llama._lib.handle import Handle
model = Handle("model", c_void_p(16), lambda _: print("model"))
context = Handle("context", c_void_p(32), lambda _: print("context"), model)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "context\nmodel\n"
