"""Options of llama-cpp-python that `Llama` obeys only because programs pass them, or cannot obey.

At a neutral value, one that changes nothing, an option is accepted. At another value it is obeyed if llama.cpp can,
otherwise refused by name with what to do instead.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypedDict

from ._engine import checks
from ._engine.sampling import SamplingOptions
from .llama_chat_format import ChatHandler


class LlamaOptions(TypedDict, total=False):
    """Options of `Llama` that few programs need; the defaults follow the file.

    Attributes:
        rope_scaling_type: llama.cpp's number of a RoPE scaling method.
        rope_freq_base: RoPE base frequency; 0 for the file's. 10000 is ignored, with a warning, if the file has another
            value: LangChain always passes it.
        rope_freq_scale: RoPE frequency scale; 0 for the file's. 1 is ignored in the same way.
        yarn_ext_factor: YaRN extrapolation mix factor.
        yarn_attn_factor: YaRN magnitude scale.
        yarn_beta_fast: YaRN low correction dimension.
        yarn_beta_slow: YaRN high correction dimension.
        yarn_orig_ctx: YaRN original context size.
        attention_type: attention for embeddings: 0 causal, 1 not causal.
        op_offload: let the GPU compute large batches with weights that are in CPU memory.
        swa_full: keep the full cache for sliding-window attention.
        no_perf: measure no times.
        numa: True, or llama.cpp's number of a NUMA strategy; for the process.
        kv_overrides: metadata to use instead of the file's: int, float, bool or str by key.
        chat_format: ignored, with a warning: prompts are rendered with a template, not with a format.
        vocab_only: only False.
        lora_base: only None.
        chat_handler: an object with the path of an mmproj, see `llama_chat_format`; as `mmproj_path`.
        tokenizer: only None.
        spm_infill: only False.
        n_parts: only -1.
        f16_kv: ignored; LangChain passes both values.
        low_vram: only False.
        mul_mat_q: only True.
        device: only None.
    """

    rope_scaling_type: int | None
    rope_freq_base: float
    rope_freq_scale: float
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int
    attention_type: int
    op_offload: bool | None
    swa_full: bool | None
    no_perf: bool
    numa: bool | int
    kv_overrides: Mapping[str, bool | int | float | str] | None
    chat_format: str | None
    vocab_only: bool
    lora_base: str | None
    chat_handler: ChatHandler | None
    tokenizer: None
    spm_infill: bool
    n_parts: int
    f16_kv: bool
    low_vram: bool
    mul_mat_q: bool
    device: None


class CompletionOptions(SamplingOptions, total=False):
    """Sampling options, and options of llama-cpp-python's completions that are accepted at one value only.

    Attributes:
        suffix: only None.
        tfs_z: only 1.
        penalize_nl: only True.
        functions: only None.
        function_call: only None.
    """

    suffix: str | None
    tfs_z: float
    penalize_nl: bool
    functions: None
    function_call: None


class Refused(NamedTuple):
    """An option that cannot be obeyed: its neutral values, and what to do instead."""

    neutral: tuple[object, ...]
    instead: str


LLAMA = {
    "vocab_only": Refused((False, None), "load the model: its weights are mapped into memory, not read"),
    "lora_base": Refused((None, ""), "llama.cpp applies an adapter to any model; pass lora_path only"),
    "tokenizer": Refused((None,), "the file has the tokenizer that the model was trained with"),
    "spm_infill": Refused((False, None), "ERNIE has no fill-in-the-middle tokens"),
    "n_parts": Refused((-1, None), "llama.cpp finds the parts of a split file by itself"),
    "f16_kv": Refused((True, False, None), "type_k and type_v set the types of the KV cache"),
    "low_vram": Refused((False, None), "offload_kqv=False keeps the KV cache in CPU memory"),
    "mul_mat_q": Refused((True, None), "llama.cpp chooses its kernels by itself"),
    "device": Refused((None,), "main_gpu, split_mode and n_gpu_layers choose the devices"),
}  # fmt: skip
COMPLETION = {
    "suffix": Refused((None, ""), "ERNIE has no fill-in-the-middle tokens"),
    "tfs_z": Refused((1.0, None), "llama.cpp has no tail-free sampling any more; use min_p or top_p"),
    "penalize_nl": Refused((True, None), "llama.cpp has no such option any more; use logit_bias"),
    "functions": Refused((None, []), "pass tools, which replaced functions in the OpenAI API"),
    "function_call": Refused((None,), "pass tool_choice, which replaced function_call in the OpenAI API"),
}


def _attention_type(name: str, value: Any) -> int:  # noqa: ANN401
    return checks.int32(name, value, 0, 1)


# Fields of llama_context_params: their type, and the values that keep llama.cpp's default, which follows the file.
CONTEXT_FIELDS: dict[str, tuple[Callable[[str, Any], Any], tuple[object, ...]]] = {
    "rope_scaling_type": (checks.int32, (None, -1)),
    "rope_freq_base": (checks.number, (None, 0.0)),
    "rope_freq_scale": (checks.number, (None, 0.0)),
    "yarn_ext_factor": (checks.number, (None, -1.0)),
    "yarn_attn_factor": (checks.number, (None, 1.0)),
    "yarn_beta_fast": (checks.number, (None, 32.0)),
    "yarn_beta_slow": (checks.number, (None, 1.0)),
    "yarn_orig_ctx": (checks.int32, (None, 0)),
    "attention_type": (_attention_type, (None, -1)),
    "op_offload": (checks.flag, (None,)),
    "swa_full": (checks.flag, (None,)),
    "no_perf": (checks.flag, (None,)),
}
# LangChain passes these whether or not its user has set them. (option, its value, metadata key, value without the key)
LANGCHAIN_ROPE = (
    ("rope_freq_base", 10000.0, "rope.freq_base", 10000.0),
    ("rope_freq_scale", 1.0, "rope.scaling.factor", 1.0),
)


def accepted(
    name: str, options: Mapping[str, Any], refused: Mapping[str, Refused], known: Iterable[str]
) -> dict[str, Any]:
    """`options` without those of `refused`.

    Args:
        name: the class or method that has the options, for messages.
        options: the options of a call.
        refused: options that are accepted at their neutral values only.
        known: the other options.

    Raises:
        ValueError: an option of `refused` has another value.
        TypeError: an option is unknown.
    """
    known = [*known]
    for option, value in options.items():
        if option in refused and value not in refused[option].neutral:
            raise ValueError(f"{option} is {value!r}, which is not possible here: {refused[option].instead}")
        if option not in refused and option not in known:
            close = difflib.get_close_matches(option, [*known, *refused], 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{name} has no option {option!r}{hint}")
    return {option: value for option, value in options.items() if option not in refused}


def context_fields(options: Mapping[str, Any], metadata: Mapping[str, str], n_batch: int) -> dict[str, Any]:
    """The fields of `llama_context_params` that the options set, for a model with this metadata.

    Attention that is not causal needs the whole batch, of `n_batch` tokens, in one micro-batch.

    Raises:
        TypeError: an option has another type than its field.
    """
    options = _without_langchains_rope(options, metadata)
    fields: dict[str, Any] = {}
    for name, (checked, keeps_default) in CONTEXT_FIELDS.items():
        if name in options and options[name] not in keeps_default:
            fields[name] = checked(name, options[name])
    if fields.get("attention_type") == 1:
        fields["n_ubatch"] = n_batch
    return fields


def _without_langchains_rope(options: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    kept = dict(options)
    architecture = metadata.get("general.architecture", "")
    for option, value, key, default in LANGCHAIN_ROPE:
        if options.get(option) == value:
            del kept[option]
            in_file = float(metadata.get(f"{architecture}.{key}", default))
            if not math.isclose(in_file, value):
                warnings.warn(
                    f"{option}={value} is ignored: the file has {in_file:g}, and its answers need that. "
                    "LangChain always passes this value; elsewhere, leave the option out",
                    stacklevel=4,
                )
    return kept


def mmproj_of(handler: object) -> str | None:
    """The path of the mmproj that a `chat_handler` holds; None without a handler.

    Raises:
        ValueError: it holds none, so it wants to render prompts by itself.
    """
    path: str | None = getattr(handler, "clip_model_path", None)
    if handler is not None and path is None:
        raise ValueError(
            f"chat_handler is {handler!r}: expected one that holds the path of an mmproj; prompts are rendered with "
            "the chat template of the file, or with chat_template="
        )
    return path


def warn_of_chat_format(chat_format: str | None) -> None:
    """Say that a chat format is ignored."""
    if chat_format is not None:
        warnings.warn(
            f"chat_format={chat_format!r} is ignored: the file's own chat template is used; chat_template= replaces it",
            stacklevel=3,
        )
