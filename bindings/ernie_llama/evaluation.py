"""An adapter for EleutherAI's lm-evaluation-harness (`lm_eval`, the extra `eval`): MMLU, GSM8K and hundreds more.

    ernie-gguf eval ernie.gguf --tasks gsm8k,mmlu
    python -m ernie_llama.evaluation run --model ernie_llama --model_args model_path=ernie.gguf,n_ctx=4096 --tasks mmlu

The second form takes all of lm_eval's own arguments; `--model_args` are arguments of `Llama`. What requests share at
their beginning is evaluated once, and several are evaluated in one batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, setup_logging
from tqdm import tqdm

from .llama import Llama

DEFAULT_MAX_TOKENS = 256  # lm_eval's own models have the same limit


@register_model("ernie_llama")
class ErnieLlamaLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """A `Llama` as lm_eval's model; the arguments are those of `Llama`, with a context of 4096 tokens by default."""

    def __init__(self, model_path: str, n_ctx: int = 4096, batch_size: object = None, **options: Any) -> None:  # noqa: ANN401
        """Load a model.

        Args:
            model_path: the GGUF file.
            n_ctx: context size in tokens; longer requests lose their beginning.
            batch_size: ignored; `n_batch` is the number of tokens evaluated at once.
            options: options of `Llama`.
        """
        super().__init__()
        options.pop("device", None)  # lm_eval passes a device of torch's
        options.pop("max_batch_size", None)
        defaults = {"n_gpu_layers": -1, "n_batch": 512, "n_seq_max": 64}
        self.llm = Llama(model_path, n_ctx=n_ctx, **{**defaults, **options})

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.llm.token_eos()

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS in a vocabulary without BOS."""
        bos = self.llm.token_bos()
        return bos if bos >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of rendered requests."""
        return self.llm.model_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: object) -> list[int]:
        """Token ids of a text; BOS if the file asks for it, unless `add_special_tokens` is False."""
        return self.llm.tokenize(string.encode(), add_bos=add_special_tokens is not False, special=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the file, for lm_eval's records."""
        return self.llm.metadata.get("tokenizer.chat_template") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a chat, rendered with the template of the file."""
        return self.llm.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)  # type: ignore[arg-type]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_options: object
    ) -> list[tuple[float, bool]]:
        """(log probability, whether greedy) of each continuation; a request is (key, context, continuation)."""
        texts = [self._text(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for i, scores in tqdm(self.llm.score_many(texts), desc="loglikelihood", total=len(texts), disable=disable_tqdm):
            results[i] = sum(logprob for logprob, _ in scores), all(greedy for _, greedy in scores)
            if (key := requests[i][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[i])
        return results

    def _text(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """Tokens to evaluate and how many to score; a text that is too long loses its beginning."""
        tokens = (context + continuation)[-self.llm.n_ctx() - 1 :]
        return tokens, min(len(continuation), len(tokens) - 1)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each text, in windows of the context's size."""
        windows = [(i, window) for i, request in enumerate(requests) for window in self._windows(request.args[0])]
        scores = self._loglikelihood_tokens([(None, *window) for _, window in windows], disable_tqdm)
        results = [0.0] * len(requests)
        for (i, _), (logprob, _) in zip(windows, scores, strict=True):
            results[i] += logprob
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) of windows that cover the text once."""
        tokens = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.llm.n_ctx(), 1)
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, greedy unless a task asks for sampling."""
        results = []
        for request in tqdm(list(requests), desc="generate_until", disable=disable_tqdm):
            prompt, options = request.args
            results.append(self._generate(prompt, options))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _generate(self, prompt: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or []
        max_tokens = int(options.get("max_gen_toks", DEFAULT_MAX_TOKENS))
        room = self.llm.n_ctx() - max_tokens
        if room < 1:
            raise ValueError(f"the task generates up to {max_tokens} tokens: n_ctx must be larger than that")
        completion = self.llm.create_completion(
            self.tok_encode(prompt)[-room:],
            max_tokens=max_tokens,
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
            stop=[until] if isinstance(until, str) else list(until),
        )
        return completion["choices"][0]["text"]


def main(arguments: Sequence[str]) -> None:
    """Run lm_eval's command line, which knows the model `ernie_llama` then."""
    setup_logging()
    sys.argv = ["lm_eval", *arguments]
    cli = HarnessCLI()
    cli.execute(cli.parse_args())


if __name__ == "__main__":
    main(sys.argv[1:])
