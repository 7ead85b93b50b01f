"""Measures, with a compiled program, the layout that the C headers give to the declarations of `ernie_llama`.

Both layouts are dictionaries of short strings, so that a difference names the field:
`{"sizeof llama_batch": "56", "llama_batch.token": "at 8 p", "llama_n_ctx": "u4(llama_context_p)", ...}`.
A type code is `i`/`u`/`f`/`b`/`s` (integer, unsigned, float, bool, struct) with its size, `p` for a pointer, or the
name of a handle class.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_llama._lib import structs

HANDLES: dict[type[ctypes.c_void_p], str] = {
    structs.llama_model_p: "struct llama_model *",
    structs.llama_context_p: "struct llama_context *",
    structs.llama_vocab_p: "struct llama_vocab *",
    structs.llama_memory_p: "llama_memory_t",
    structs.llama_sampler_p: "struct llama_sampler *",
    structs.llama_adapter_lora_p: "struct llama_adapter_lora *",
    structs.ggml_context_p: "struct ggml_context *",
    structs.ggml_tensor_p: "struct ggml_tensor *",
    structs.ggml_backend_buffer_type_t: "ggml_backend_buffer_type_t",
    structs.ggml_backend_dev_t: "ggml_backend_dev_t",
    structs.ggml_backend_reg_t: "ggml_backend_reg_t",
}
POINTER_CODES = {"P", "z"}  # c_void_p, c_char_p
Functions = Mapping[str, tuple[Any, Sequence[Any]]]


def type_code(declared: type[Any] | None) -> str:
    """The code of a ctypes type."""
    if declared is None:
        return "void"
    if declared in HANDLES:
        return str(declared.__name__)
    size = ctypes.sizeof(declared)
    if issubclass(declared, ctypes.Structure):
        return f"s{size}"
    code = getattr(declared, "_type_", None)
    if not isinstance(code, str) or code in POINTER_CODES:  # POINTER(...) has a class there, CFUNCTYPE(...) nothing
        return "p"
    letter = {"?": "b", "f": "f", "d": "f"}.get(code) or ("i" if code.islower() else "u")
    return f"{letter}{size}"


def declared_layout(
    structs: Sequence[type[ctypes.Structure]], constants: Mapping[str, int], functions: Functions
) -> dict[str, str]:
    """The layout of the ctypes declarations."""
    layout = {name: str(value) for name, value in constants.items()}
    for struct in structs:
        name = struct.__name__
        layout[f"sizeof {name}"] = str(ctypes.sizeof(struct))
        layout[f"fields {name}"] = str(len(struct._fields_))
        for field, declared, *_ in struct._fields_:
            layout[f"{name}.{field}"] = f"at {getattr(struct, field).offset} {type_code(declared)}"
    for name, (result, arguments) in functions.items():
        layout[name] = f"{type_code(result)}({','.join(map(type_code, arguments))})"
    return layout


def source(structs: Sequence[type[ctypes.Structure]], constants: Mapping[str, int], functions: Functions) -> str:
    """A C++ program that prints the layout of the headers, one `key=value` per line."""
    lines = [f'emit("{name}", std::to_string((long long) {name}));' for name in constants]
    for struct in structs:
        name = struct.__name__
        lines.append(f'emit("sizeof {name}", std::to_string(sizeof({name})));')
        lines.append(f'emit("fields {name}", std::to_string(count_fields<{name}>()));')
        lines += [
            f'emit("{name}.{field}", "at " + std::to_string(offsetof({name}, {field})) + " "'
            f" + type_code<decltype({name}::{field})>());"
            for field, *_ in struct._fields_
        ]
    lines += [f'emit("{name}", signature<decltype({name})>::text());' for name in functions]
    handles = "\n".join(
        f'    if constexpr (std::is_same_v<bare<T>, bare<{c_type}>>) return "{handle.__name__}";'
        for handle, c_type in HANDLES.items()
    )
    return TEMPLATE.replace("HANDLES", handles).replace("LINES", "\n".join(f"    {line}" for line in lines))


TEMPLATE = r"""
#include "llama.h"
#include <cstddef>
#include <iostream>
#include <string>
#include <type_traits>

template <class T> using bare = std::remove_cv_t<std::remove_pointer_t<T>>;

template <class T> std::string type_code() {
    if constexpr (std::is_void_v<T>) return "void";
    else if constexpr (std::is_pointer_v<T>) {
HANDLES
        return "p";
    } else {
        const char * letter = std::is_same_v<T, bool>  ? "b"
            : std::is_floating_point_v<T>              ? "f"
            : std::is_class_v<T>                       ? "s"
            : std::is_enum_v<T> || std::is_signed_v<T> ? "i" // ctypes has one class for every enum
                                                       : "u";
        return letter + std::to_string(sizeof(T));
    }
}

template <class F> struct signature; // of a type, so that the program needs no library
template <class R, class... A> struct signature<R(A...)> {
    static std::string text() {
        std::string arguments;
        ((arguments += (arguments.empty() ? "" : ",") + type_code<A>()), ...);
        return type_code<R>() + "(" + arguments + ")";
    }
};

// The number of initialisers that an aggregate takes: sees a field that was added where there was padding.
struct anything { template <class T> operator T() const; };
template <class T, class... A> constexpr std::size_t count_fields() {
    if constexpr (requires { T{A{}..., anything{}}; }) return count_fields<T, A..., anything>();
    else return sizeof...(A);
}

void emit(const char * key, const std::string & value) { std::cout << key << "=" << value << "\n"; }

int main() {
LINES
}
"""


def measured_layout(tree: Path, folder: Path, text: str) -> dict[str, str]:
    """The layout of the headers in the llama.cpp `tree`: the output of the program `text`, compiled in `folder`."""
    program = folder / "probe"
    (folder / "probe.cpp").write_text(text)
    includes = [f"-I{tree / 'include'}", f"-I{tree / 'ggml' / 'include'}"]
    command = [
        "c++",
        "-std=c++20",
        "-Wno-deprecated-declarations",
        *includes,
        str(folder / "probe.cpp"),
        "-o",
        str(program),
    ]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, f"the probe does not compile:\n{compiled.stderr[:4000]}"
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in output.splitlines())
