"""The ctypes declarations agree with the C headers, field by field."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from ernie_llama._lib import functions, structs

from .probe import declared_layout, measured_layout, source


@pytest.fixture(scope="module")
def measured(llama_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    text = source(structs.STRUCTS, structs.CONSTANTS, functions.FUNCTIONS)
    return measured_layout(llama_tree, tmp_path_factory.mktemp("probe"), text)


@pytest.mark.build
def test_declarations_agree_with_the_headers(measured: dict[str, str]) -> None:
    assert declared_layout(structs.STRUCTS, structs.CONSTANTS, functions.FUNCTIONS) == measured


@pytest.mark.build
def test_the_probe_agrees_with_values_typed_by_hand(measured: dict[str, str]) -> None:
    # Typed by hand from llama.h, so that an empty or constant probe cannot pass.
    assert measured["llama_token_data.p"] == "at 8 f4"
    assert measured["sizeof llama_token_data_array"] == "32"
    assert measured["fields llama_batch"] == "7"
    assert measured["llama_get_memory"] == "llama_memory_p(llama_context_p)"
    assert measured["LLAMA_DEFAULT_SEED"] == "4294967295"


def wrong(name: str, fields: list[tuple[str, type]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


TOKEN_DATA = [("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float)]


@pytest.mark.build
@pytest.mark.parametrize(
    ("fields", "differing"),
    [
        (TOKEN_DATA, set()),
        ([TOKEN_DATA[0], TOKEN_DATA[2], TOKEN_DATA[1]], {"llama_token_data.logit", "llama_token_data.p"}),
        ([("id", ctypes.c_uint32), *TOKEN_DATA[1:]], {"llama_token_data.id"}),
        (TOKEN_DATA[:2], {"sizeof llama_token_data", "fields llama_token_data"}),
    ],
    ids=["right", "reordered", "sign", "missing"],
)
def test_the_probe_finds_a_wrong_struct(
    measured: dict[str, str], fields: list[tuple[str, type]], differing: set[str]
) -> None:
    declared = declared_layout([wrong("llama_token_data", fields)], {}, {})
    assert {key for key, value in declared.items() if measured[key] != value} == differing


@pytest.mark.build
def test_the_probe_finds_swapped_handles_and_wrong_constants(measured: dict[str, str]) -> None:
    functions = {
        "llama_sampler_sample": (ctypes.c_int32, [structs.llama_context_p, structs.llama_sampler_p, ctypes.c_int32])
    }
    declared = declared_layout([], {"GGML_LOG_LEVEL_WARN": 2}, functions)
    assert {key for key, value in declared.items() if measured[key] != value} == {
        "llama_sampler_sample",
        "GGML_LOG_LEVEL_WARN",
    }
