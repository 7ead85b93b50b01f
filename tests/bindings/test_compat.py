"""Options, names and types of llama-cpp-python: accepted, obeyed, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ernie_llama
import numpy as np
import pytest
from ernie_llama import (
    Llama,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteriaList,
    _rare_options,
    llama_cpp,
)
from ernie_llama.llama_cache import LlamaRAMCache
from ernie_llama.llama_chat_format import Llava15ChatHandler
from ernie_llama.llama_speculative import LlamaPromptLookupDecoding

from .test_chat import MESSAGES, TOOLS, writes
from .test_completion import PROMPT, text
from .test_options import LONG, n_decoded

pytestmark = pytest.mark.build

# What LangChain, LlamaIndex, llama-cpp-agent and others pass whether or not their user has set it.
NEUTRAL: dict[str, Any] = {name: refused.neutral[0] for name, refused in _rare_options.LLAMA.items()} | {
    "rope_freq_scale": 1.0,
    "rope_scaling_type": None,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_orig_ctx": 0,
    "attention_type": -1,
    "op_offload": None,
    "swa_full": None,
    "no_perf": False,
    "numa": False,
    "kv_overrides": None,
    "chat_format": None,
    "draft_model": None,
}


def test_neutral_options_change_nothing(bf16: str, llm: Llama) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Llama(bf16, n_threads=1, **NEUTRAL) as other:
            assert text(other(PROMPT, max_tokens=8, temperature=0, suffix=None, tfs_z=1.0)) == text(
                llm(PROMPT, max_tokens=8, temperature=0)
            )


@pytest.mark.parametrize("option", _rare_options.LLAMA)
def test_other_values_are_refused_with_what_to_do(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is 'x', which is not possible here: "):
        Llama("model.gguf", **{option: "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", _rare_options.COMPLETION)
def test_other_values_of_completions_are_refused_too(llm: Llama, option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is 'x', which is not possible here: "):
        llm(PROMPT, **{option: "x"})  # type: ignore[call-overload]


def test_an_unknown_option_is_named_with_the_nearest_one(llm: Llama) -> None:
    with pytest.raises(TypeError, match="Llama has no option 'rope_freq_bas'; did you mean rope_freq_base"):
        Llama("model.gguf", rope_freq_bas=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="this method of Llama has no option 'topk'; did you mean top_k"):
        llm(PROMPT, topk=1)  # type: ignore[call-overload]


def logits(path: str, **options: Any) -> Any:  # noqa: ANN401
    with Llama(path, n_threads=1, **options) as llm:
        llm.eval(llm.tokenize(LONG.encode()))
        return llm.logits


def test_langchains_rope_frequency_is_ignored_and_others_are_obeyed(bf16: str) -> None:
    plain = logits(bf16)
    with pytest.warns(UserWarning, match=r"rope_freq_base=10000.0 is ignored: the file has 500000"):
        assert np.array_equal(logits(bf16, rope_freq_base=10000.0), plain)
    assert np.abs(logits(bf16, rope_freq_base=10001.0) - plain).max() > 0.1
    assert np.abs(logits(bf16, rope_freq_scale=0.25) - plain).max() > 0.1


def test_a_chat_handler_that_holds_no_mmproj_is_refused(bf16: str) -> None:
    handler: Any = lambda **_options: None  # noqa: E731 - a function is what llama-cpp-python takes
    with pytest.raises(
        ValueError, match=r"chat_handler is <function .*: expected one that holds the path of an mmproj"
    ):
        Llama(bf16, n_threads=1, chat_handler=handler)


def test_a_chat_format_is_ignored_with_a_warning(bf16: str) -> None:
    with pytest.warns(UserWarning, match="chat_format='chatml' is ignored: the file's own chat template is used"):
        Llama(bf16, n_threads=1, chat_format="chatml").close()


def test_metadata_can_be_overridden(bf16: str) -> None:
    with Llama(bf16, n_threads=1, kv_overrides={"tokenizer.ggml.add_bos_token": False}) as llm:
        assert llm.token_bos() not in llm.tokenize(b"x")
    with Llama(bf16, n_threads=1, kv_overrides={"tokenizer.ggml.add_bos_token": True}) as llm:
        assert llm.tokenize(b"x")[0] == llm.token_bos()
    with pytest.raises(ValueError, match=r"kv_overrides: a is \[\], expected a bool, an int of 64 bits, a float or at"):
        Llama(bf16, kv_overrides={"a": []})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2.5}, "max_tokens is 2.5, expected an integer"),
        ({"max_tokens": "a"}, "max_tokens is 'a', expected an integer"),
        ({"top_k": "z"}, "top_k is 'z', expected an integer"),
        ({"top_k": 2.5}, "top_k is 2.5, expected an integer"),
        ({"top_p": "a"}, "top_p is 'a', expected a number"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"stop": 5}, "stop is 5, expected a string or a list of strings"),
        ({"stop": [5]}, r"stop is \[5\], expected a string or a list of strings"),
        ({"grammar": 5}, "grammar is 5, expected a LlamaGrammar or GBNF text"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\], expected a dictionary from token ids to numbers"),
        ({"logits_processor": [1]}, r"logits_processor is \[1\], expected a function or a list of functions"),
        ({"seed": "x"}, "seed is 'x', expected an integer"),
        ({"logprobs": 1.5}, "logprobs is 1.5, expected an integer"),
    ],
)
def test_wrong_types_are_named(llm: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        llm(PROMPT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": "512"}, "n_ctx is '512', expected an integer"),
        ({"n_gpu_layers": None}, "n_gpu_layers is None, expected an integer"),
        ({"use_mmap": "yes"}, "use_mmap is 'yes', expected True or False"),
        ({"rope_freq_base": "x"}, "rope_freq_base is 'x', expected a number"),
        ({"logits_all": 2}, "logits_all is 2, expected True or False"),
    ],
)
def test_wrong_types_of_loading_are_named(bf16: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        Llama(bf16, n_threads=1, **options)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("hi", TypeError, r"messages is 'hi', expected a list of dictionaries such as"),
        (["hi"], TypeError, r"messages is \['hi'\], expected a list of dictionaries"),
        ([], ValueError, "there are no messages to answer"),
        ([{"role": "user"}], ValueError, "message 0, of the user, has no content"),
        ([{"role": "assistant"}], ValueError, "message 0, of the assistant, has no content"),
        (
            [{"content": "x"}],
            ValueError,
            "message 0 has the role None, expected one of system, developer, user, assistant, tool",
        ),
        ([{"role": "robot", "content": "x"}], ValueError, "message 0 has the role 'robot', expected one of"),
    ],
)
def test_wrong_messages_are_named(llm: Llama, messages: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=message):
        llm.create_chat_completion(messages)


def test_a_grammar_may_be_text(llm: Llama) -> None:
    assert text(llm(PROMPT, max_tokens=8, grammar='root ::= "yes" | "no"')) in {"yes", "no"}


def test_a_forced_call_that_is_cut_is_a_call_with_the_arguments_so_far(llm: Llama) -> None:
    for max_tokens, arguments in ((48, None), (400, dict)):
        chat = llm.create_chat_completion(
            MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=max_tokens, temperature=0
        )
        choice = chat["choices"][0]
        call = choice["message"]["tool_calls"][0]["function"]
        assert call["name"] in {tool["function"]["name"] for tool in TOOLS}
        if arguments is None:
            assert choice["finish_reason"] == "length"
        else:
            assert isinstance(json.loads(call["arguments"]), arguments)


def test_an_unforced_call_that_the_model_leaves_open_is_content(llm: Llama) -> None:
    written = '<tool_call>\n{"name": "f", "arguments": {"x"'
    chat = llm.create_chat_completion(MESSAGES, logits_processor=[writes(llm, written)], max_tokens=100)
    assert chat["choices"][0]["message"]["content"] == written


def test_stopping_criteria_end_generation(llm: Llama) -> None:
    n_prompt = len(llm.tokenize(PROMPT.encode(), special=True))
    seen: list[int] = []

    def third(input_ids: Any, scores: Any) -> bool:  # noqa: ANN401
        assert scores.shape == (llm.n_vocab(),)
        seen.append(len(input_ids) - n_prompt)
        return len(input_ids) - n_prompt >= 3

    full = text(llm(PROMPT, max_tokens=8, temperature=0))
    completion = llm(PROMPT, max_tokens=8, temperature=0, stopping_criteria=StoppingCriteriaList([third]))
    assert completion["usage"]["completion_tokens"] == 3
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert full.startswith(text(completion))
    assert seen == [0, 1, 2, 3]


def test_lists_of_processors_and_a_minimum_of_tokens(llm: Llama) -> None:
    eos = llm.token_eos()

    def only_eos(_input_ids: Any, scores: Any) -> Any:  # noqa: ANN401
        scores[eos] = scores.max() + 1
        return scores

    processors = LogitsProcessorList([only_eos, MinTokensLogitsProcessor(3, eos)])
    assert llm(PROMPT, max_tokens=8, temperature=0, logits_processor=processors)["usage"]["completion_tokens"] == 3
    assert llm(PROMPT, max_tokens=8, temperature=0, logits_processor=only_eos)["usage"]["completion_tokens"] == 0


REPEATED = "x = 1\ny = 2\nz = 3\n" * 4


@pytest.fixture(scope="module")
def drafting(bf16: str) -> Any:  # noqa: ANN401
    with Llama(bf16, n_threads=1, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=6), cache_prompt=False) as llm:
        yield llm


def test_a_draft_model_saves_evaluations_and_keeps_the_text(
    llm: Llama, drafting: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = n_decoded(drafting, monkeypatch)
    drafted = drafting(REPEATED, max_tokens=48, temperature=0, logprobs=1)
    plain = llm(REPEATED, max_tokens=48, temperature=0, logprobs=1)
    assert text(drafted) == text(plain)
    assert len(counts) < 40
    ours, theirs = (completion["choices"][0]["logprobs"] for completion in (drafted, plain))
    assert ours is not None
    assert theirs is not None
    both = np.array([ours["token_logprobs"], theirs["token_logprobs"]], float)
    np.testing.assert_allclose(both[0], both[1], atol=0.1)
    assert drafting.n_tokens <= len(drafting.tokenize(REPEATED.encode(), special=True)) + 48 + 6


def test_a_draft_model_keeps_seeds_grammars_and_stop_strings(llm: Llama, drafting: Llama) -> None:
    examples: list[dict[str, Any]] = [
        {"temperature": 0.5, "seed": 3},
        {"temperature": 0, "grammar": 'root ::= ("x = 1\\n" | "y = 2\\n")+'},
        {"temperature": 0, "stop": ["z"]},
        {"temperature": 0, "repeat_penalty": 1.3},
    ]
    for options in examples:
        assert text(drafting(REPEATED, max_tokens=24, **options)) == text(llm(REPEATED, max_tokens=24, **options))


def test_a_draft_stays_within_the_context(bf16: str) -> None:
    with Llama(bf16, n_threads=1, n_ctx=256, draft_model=LlamaPromptLookupDecoding()) as llm:
        completion = llm("x = 1\n" * 20, max_tokens=None, temperature=0, logit_bias={llm.token_eos(): -100.0})
        assert completion["usage"]["total_tokens"] == llm.n_ctx() or completion["choices"][0]["finish_reason"] == "stop"


def test_prompt_lookup_takes_what_followed_the_longest_earlier_match() -> None:
    draft = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=3)
    assert draft(np.array([1, 2, 3, 4, 5, 1, 2], np.intc)).tolist() == [3, 4, 5]
    assert draft(np.array([7, 2, 3, 4, 1, 2], np.intc)).tolist() == [3, 4, 1]
    assert draft(np.array([1, 2, 3], np.intc)).tolist() == []


def test_a_cache_brings_back_prompts_that_take_turns(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [LONG + "a = ", "# other\n" + LONG]
    llm.set_cache(LlamaRAMCache())
    try:
        for prompt in prompts:
            llm(prompt, max_tokens=1, temperature=0)
        counts = n_decoded(llm, monkeypatch)
        llm(prompts[0] + "1\nb = ", max_tokens=1, temperature=0)
        assert counts[0] < 16
    finally:
        llm.set_cache(None)


def test_a_cache_drops_the_oldest_states() -> None:
    cache = LlamaRAMCache(capacity_bytes=25)
    for i in range(3):
        cache[[i, 1]] = ernie_llama.LlamaState((i, 1), bytes(10), 0)
    assert [0, 1] not in cache
    assert cache[[2, 1, 5]].input_ids == (2, 1)
    with pytest.raises(KeyError, match="no cached state shares a prefix"):
        cache[[9]]


def test_the_functions_of_llama_h(llm: Llama) -> None:
    vocab = ernie_llama.llama_model_get_vocab(llm.model)
    assert llama_cpp.llama_vocab_n_tokens(vocab) == llm.n_vocab()
    assert llama_cpp.llama_token_get_attr(vocab, llm.token_eos()) & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
    batch = llama_cpp.llama_batch_init(4, 0, 1)
    llama_cpp.llama_batch_free(batch)
    assert llama_cpp.llama_n_ctx(llm.ctx) == llm.context_params.n_ctx == 512
    with pytest.raises(AttributeError, match="llama_model_quantize is not declared here"):
        _ = llama_cpp.llama_model_quantize
    assert {"llama_decode", "LLAMA_DEFAULT_SEED", "llama_batch"} <= set(dir(llama_cpp))


def test_further_names(llm: Llama) -> None:
    assert llm.tokenizer().encode("x") == llm.tokenize(b"x", special=True)
    assert llm.tokenizer().decode(llm.tokenize(b"def f", add_bos=False)) == "def f"
    assert Llama.longest_token_prefix([1, 2, 3], [1, 2, 4]) == 2
    np.testing.assert_allclose(np.exp(Llama.logits_to_logprobs(np.zeros(4, np.float32))).sum(), 1)
    llm.eval([5, 6])
    assert llm.input_ids.tolist() == [5, 6]
    assert np.shape(llm.eval_logits) == (1, llm.n_vocab())
    assert llm.n_batch == 512
    answer: Any = llm.create_chat_completion_openai_v1(MESSAGES, max_tokens=1)
    assert answer.choices[0].message.role == "assistant"
    chunks: list[Any] = list(llm.create_chat_completion_openai_v1(MESSAGES, max_tokens=1, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert Llava15ChatHandler(clip_model_path="eyes.gguf", verbose=False).clip_model_path == "eyes.gguf"
    handler: Any = ernie_llama.llama_chat_format
    assert handler.LlamaChatCompletionHandler.__name__ == "LlamaChatCompletionHandler"  # in autogen's annotations
    absent: list[Any] = [Llama.from_pretrained, ernie_llama.LlamaHFTokenizer]
    for call in absent:
        with pytest.raises(NotImplementedError, match=r"downloads nothing|is not available"):
            call("x")
    with pytest.raises(NotImplementedError, match="LlamaDiskCache is not available: use LlamaRAMCache"):
        ernie_llama.LlamaDiskCache()


SHIMMED = """
import subprocess, sys
import llama_cpp
from llama_cpp.llama import Llama
from llama_cpp.llama_types import ChatCompletionChunk
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp import llama_chat_format, LlamaGrammar, CreateChatCompletionResponse
print(llama_cpp.__name__, Llama.__module__, sys.argv[1:], llama_cpp.LLAMA_POOLING_TYPE_MEAN)
if sys.argv[1:] == ["outer"]:
    print(subprocess.run([sys.executable, __file__, "inner"], capture_output=True, text=True).stdout, end="")
"""


def test_a_program_runs_with_ernie_llama_as_llama_cpp(built_library: None, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SHIMMED)
    command = [sys.executable, "-m", "ernie_llama.as_llama_cpp"]
    done = subprocess.run([*command, tmp_path / "program.py", "outer"], capture_output=True, text=True, check=True)
    lines = [f"ernie_llama ernie_llama.llama ['{each}'] 1" for each in ("outer", "inner")]
    assert done.stdout.splitlines() == lines
    done = subprocess.run(
        [*command, "-m", "program", "inner"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == lines[1:]
    folder = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert (Path(folder) / "llama_cpp" / "__init__.py").is_file()
