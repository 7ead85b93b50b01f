"""`Llama`: a model and a context behind the interface of llama-cpp-python's class of the same name."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from . import _rare_options
from ._chat.chats import Chats
from ._chat.completion import Completion, CompletionRequest
from ._chat.completion_results import CompletionResults
from ._chat.logprobs import log_softmax
from ._chat.media_parts import ImageLoader, Loaders, VideoLoader
from ._engine import checks, params, scoring
from ._engine.context import Context
from ._engine.embedding import embed, embedding_tokens
from ._engine.engine import Engine
from ._engine.generation import generate
from ._engine.model import Model
from ._engine.rpc import add_rpc_servers
from ._engine.sampling import Sampling, SamplingOptions
from ._engine.seeds import Seeds
from ._engine.sequence import longest_token_prefix
from ._engine.state import LlamaState
from ._engine.vision import VisionEncoder
from ._lib import structs
from ._lib.library import load as load_library
from ._lib.log import LOG
from ._rare_options import CompletionOptions, LlamaOptions
from .llama_cache import BaseLlamaCache
from .llama_speculative import LlamaDraftModel
from .llama_tokenizer import LlamaTokenizer
from .llama_types import (
    ChatCompletionRequestMessage,
    ChatCompletionRequestResponseFormat,
    ChatCompletionTool,
    ChatCompletionToolChoiceOption,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
    CreateCompletionStreamResponse,
    CreateEmbeddingResponse,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from typing_extensions import Self, Unpack  # in the standard library from Python 3.11 on


class Llama:
    """A GGUF model that tokenizes, evaluates, generates and chats. Names are those of llama-cpp-python.

    A Llama does one thing at a time. Threads that share one wait for each other; a stream counts as one thing from
    its first chunk to its last. While its reader rests, other calls may come between; then it continues where it was.
    `docs/python-api.md` lists the differences from llama-cpp-python.

    Attributes:
        model_path: path of the file.
        metadata: scalar metadata of the file, as text by key.
        n_batch: tokens passed to llama.cpp at once.
        last_n_tokens_size: number of tokens the penalties look back.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        split_mode: int | str = structs.LLAMA_SPLIT_MODE_LAYER,
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        n_cpu_moe: int = 0,
        tensor_buft_overrides: Mapping[str, str] | str = "",
        rpc_servers: str | Sequence[str] = "",
        use_mmap: bool = True,
        use_mlock: bool = False,
        seed: int = structs.LLAMA_DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        flash_attn: bool | None = None,
        offload_kqv: bool = True,
        logits_all: bool = False,
        embedding: bool = False,
        pooling_type: int = structs.LLAMA_POOLING_TYPE_UNSPECIFIED,
        last_n_tokens_size: int = 64,
        lora_path: str | os.PathLike[str] | None = None,
        lora_scale: float = 1.0,
        chat_template: str | None = None,
        mmproj_path: str | os.PathLike[str] | None = None,
        image_max_tokens: int = 0,
        image_loader: ImageLoader | None = None,
        video_loader: VideoLoader | None = None,
        cache_prompt: bool = True,
        draft_model: LlamaDraftModel | None = None,
        verbose: bool = False,
        **options: Unpack[LlamaOptions],
    ) -> None:
        """Load a model and make a context.

        Args:
            model_path: the GGUF file; for a split model, its first file.
            n_gpu_layers: number of layers to keep on the GPU; -1 for all.
            split_mode: how several GPUs share the model: "none", "layer", "row", "tensor", or llama.cpp's number.
            main_gpu: the GPU to use if `split_mode` is "none".
            tensor_split: the share of each GPU.
            n_cpu_moe: keep the experts of the first N layers in CPU memory.
            tensor_buft_overrides: where tensors go: a dictionary from a regular expression of their names to a buffer
                type, or the text of llama.cpp's `--override-tensor`: `{"ffn_down_exps": "CPU"}`, "ffn_down_exps=CPU".
            rpc_servers: HOST:PORT of RPC servers whose devices to use as GPUs, as a list or separated by commas. They
                stay in use until the process ends.
            use_mmap: map the file into memory instead of reading it.
            use_mlock: keep the model from being swapped out.
            seed: seed of the random draws; -1 or the default for a random one.
            n_ctx: context size in tokens, prompt and answer together; 0 for the size the model was trained with.
                llama.cpp rounds up to a multiple of 256; `n_ctx()` returns the result.
            n_batch: tokens passed to llama.cpp at once; a longer prompt takes several batches.
            n_ubatch: tokens computed at once.
            n_seq_max: texts that `score_many` evaluates at once, up to 256; they share the context.
            n_threads: threads for generation; default one per physical core.
            n_threads_batch: threads for prompts; default `n_threads`.
            type_k: type of the keys in the KV cache, by name ("q8_0") or number; default f16.
            type_v: type of the values in the KV cache; a quantized one needs flash attention.
            flash_attn: use flash attention; default where the device supports it.
            offload_kqv: keep the KV cache on the GPU.
            logits_all: keep the logits of all tokens in `scores`, not only those of the last one.
            embedding: enable `embed`.
            pooling_type: pool the tokens into one embedding per text: 1 mean, 2 first token, 3 last token; 0 for one
                embedding per token.
            last_n_tokens_size: number of tokens the penalties look back; 0 disables them.
            lora_path: a LoRA adapter in a GGUF file.
            lora_scale: strength of the adapter.
            chat_template: Jinja text to use instead of the file's template.
            mmproj_path: the GGUF file of the model's vision encoder, for messages with images and videos.
            image_max_tokens: maximum number of tokens per image; larger images are scaled down. 0 for the file's limit.
            image_loader: returns the bytes of an image whose URL is not a data: URL; `load_local_image` reads local
                files. Without a loader, such URLs are refused.
            video_loader: the same for videos, with `load_local_video`.
            cache_prompt: evaluate only what follows the prefix shared with the last prompt (if that has 32 tokens or
                more). llama.cpp uses other kernels for other batch sizes, so the logits may differ in their last bits
                from those of a fresh start; False starts every call afresh.
            draft_model: guesses tokens to evaluate several at once; see `llama_speculative`.
            verbose: let llama.cpp log to stderr. Its log is global: the newest Llama decides for the process.
            options: rarely needed options of llama-cpp-python, see `LlamaOptions`.

        Raises:
            LibraryNotFoundError: there is no libllama; lists the places that were searched.
            ValueError: the file is missing, is not GGUF, or is refused by llama.cpp, with the reason; or an option is
                out of range or cannot be obeyed.
            TypeError: an option is unknown or has the wrong type.
        """
        rare = _rare_options.accepted("Llama", options, _rare_options.LLAMA, LlamaOptions.__annotations__)
        _rare_options.warn_of_chat_format(rare.get("chat_format"))
        context_fields = params.context_fields(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch,
            type_k=type_k,
            type_v=type_v,
            flash_attn=flash_attn,
            offload_kqv=offload_kqv,
            embedding=embedding,
            pooling_type=pooling_type,
        )
        self.last_n_tokens_size = checks.integer("last_n_tokens_size", last_n_tokens_size, 0)
        self.model_path = os.fspath(model_path)
        self.verbose = LOG.verbose = verbose
        self._seeds = Seeds(seed)
        library = load_library()
        params.init_numa(library, rare.get("numa") or False)
        if rpc_servers:
            add_rpc_servers(library, rpc_servers)
        model_fields = params.model_fields(
            library,
            n_gpu_layers=n_gpu_layers,
            split_mode=split_mode,
            main_gpu=main_gpu,
            tensor_split=tensor_split,
            n_cpu_moe=n_cpu_moe,
            tensor_buft_overrides=tensor_buft_overrides,
            use_mmap=use_mmap,
            use_mlock=use_mlock,
            kv_overrides=rare.get("kv_overrides"),
        )
        image_max_tokens = checks.integer("image_max_tokens", image_max_tokens, 0)
        self._model = Model(library, self.model_path, model_fields, rare.get("kv_overrides"))
        self.metadata = self._model.metadata()
        context_fields |= _rare_options.context_fields(rare, self.metadata, context_fields["n_batch"])
        if n_seq_max > 1 and self._model.is_recurrent():
            raise ValueError(f"n_seq_max is {n_seq_max}, expected 1: texts cannot share the state of a recurrent model")
        self._ctx = Context(library, self._model, context_fields)
        if lora_path is not None:
            self._ctx.set_lora(self._model.load_lora(os.fspath(lora_path)), lora_scale)
        mmproj = mmproj_path or _rare_options.mmproj_of(rare.get("chat_handler"))
        self._engine = Engine(
            library,
            self._model,
            self._ctx,
            logits_all=checks.flag("logits_all", logits_all),
            cache_prompt=checks.flag("cache_prompt", cache_prompt) and not embedding,
            draft_model=draft_model,
            encoder=None if mmproj is None else VisionEncoder(mmproj, self._model, n_threads, image_max_tokens),
        )
        self._chats = Chats(self._engine, self.model_path, chat_template, Loaders(image_loader, video_loader))
        self.n_batch = self._ctx.n_batch

    def close(self) -> None:
        """Free the model and the context. A second call does nothing; any other later use raises RuntimeError.

        Waits for a thread that computes; an open stream ends.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- the model

    def n_ctx(self) -> int:
        """Context size in tokens."""
        return self._ctx.n_ctx

    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._model.n_vocab()

    def n_embd(self) -> int:
        """Width of the hidden state."""
        return self._model.n_embd()

    def token_bos(self) -> int:
        """Id of the beginning-of-sequence token, or -1."""
        return self._model.token_bos()

    def token_eos(self) -> int:
        """Id of the end-of-sequence token, or -1. Other tokens may end generation too."""
        return self._model.token_eos()

    def token_nl(self) -> int:
        """Id of the line feed token, or -1."""
        return self._model.token_nl()

    def pooling_type(self) -> int:
        """How embeddings are pooled; 0 for not at all."""
        return self._ctx.pooling_type

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: the text in UTF-8.
            add_bos: add BOS and EOS if the model's metadata asks for them; False adds none.
            special: read special tokens that are spelled out in the text; otherwise they are plain text.
        """
        return self._model.tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The text of `tokens` in UTF-8; control tokens have text only if `special`.

        The text may begin or end inside a character. It begins with a space if the tokenizer puts one before texts.
        `prev_tokens` exists for compatibility with llama-cpp-python and has no effect.
        """
        return self._model.tokens_to_pieces(tokens, special)

    def tokenizer(self) -> LlamaTokenizer:
        """The tokenizer as an object of its own."""
        return LlamaTokenizer(self)

    @property
    def model(self) -> ctypes.c_void_p:
        """The `struct llama_model *`, for the functions of the module `llama_cpp`."""
        return self._model.pointer

    @property
    def ctx(self) -> ctypes.c_void_p:
        """The `struct llama_context *`, for the functions of the module `llama_cpp`.

        This Llama does not notice what they change in the KV cache: call `reset` before you use it again.
        """
        return self._ctx.pointer

    @property
    def model_params(self) -> structs.llama_model_params:
        """The parameters that the model was loaded with."""
        return self._model.params

    @property
    def context_params(self) -> structs.llama_context_params:
        """The parameters that the context was made with."""
        return self._ctx.params

    # --- evaluation

    def set_seed(self, seed: int) -> None:
        """Set the seed of the next draw, from which the seeds of later draws derive; -1 for a random one."""
        self._seeds.set(seed)

    @property
    def n_tokens(self) -> int:
        """Number of evaluated tokens, which are in the KV cache."""
        return len(self._engine.sequence)

    @property
    def eval_tokens(self) -> list[int]:
        """The evaluated tokens."""
        return list(self._engine.sequence.ids)

    def reset(self) -> None:
        """Forget all evaluated tokens."""
        with self._engine.lock.one_step():
            self._engine.sequence.keep(0)

    @property
    def input_ids(self) -> npt.NDArray[np.intc]:
        """The evaluated tokens as an array, [n_tokens]."""
        import numpy as np  # see Context.logits

        return np.array(self._engine.sequence.ids, np.intc)

    @property
    def eval_logits(self) -> list[list[float]]:
        """Logits after each evaluated token, or only after the last one without `logits_all`, as lists."""
        logits: list[list[float]] = (self.scores if self._engine.logits_all else self.logits[None]).tolist()
        return logits

    @staticmethod
    def logits_to_logprobs(logits: npt.ArrayLike, axis: int = -1) -> npt.NDArray[np.float32]:
        """Log probabilities of `logits` along an axis."""
        import numpy as np  # see Context.logits

        return log_softmax(np.asarray(logits, np.float32), axis)

    longest_token_prefix = staticmethod(longest_token_prefix)

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Keep the state after each completion in `cache`, and start from the one with the longest prefix.

        Worth it for prompts that take turns; the prefix shared with the last prompt is kept without a cache.
        """
        self._engine.cache = cache

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate `tokens`, which follow those evaluated before.

        Raises:
            ValueError: they do not fit into the context.
            RuntimeError: llama.cpp fails, or this Llama is closed.
        """
        with self._engine.lock.one_step():
            self._engine.eval([checks.integer("a token", token) for token in tokens])

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """A view of the logits after each evaluated token, [n_tokens, n_vocab]; the next `eval` may overwrite it.

        Raises:
            ValueError: the Llama was made without `logits_all=True`.
        """
        return self._engine.scores(len(self._engine.sequence))

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """A copy of the logits after the last evaluated token, [n_vocab].

        Raises:
            RuntimeError: nothing has been evaluated yet.
        """
        with self._engine.lock.between_steps():
            return self._engine.sequence.logits()

    def score(self, tokens: Sequence[int], n_scored: int) -> list[tuple[float, bool]]:
        """Log probabilities of the last `n_scored` tokens after those before them, as evaluations of models need them.

        What the evaluated tokens share with `tokens` is not evaluated again.

        Args:
            tokens: the context and the tokens to score.
            n_scored: how many to score; the first token has no context and cannot be scored.

        Returns:
            For each scored token its log probability, and whether it is the likeliest token at its position.

        Raises:
            ValueError: `n_scored` is not less than the number of tokens, or they exceed the context by more than one.
        """
        return dict(self.score_many([(tokens, n_scored)]))[0]

    def score_many(self, texts: Sequence[tuple[Sequence[int], int]]) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """As `score` for many texts, in the fastest order: yields the index of a text and its scores.

        What texts share at their beginning is evaluated once, and up to `n_seq_max` texts are evaluated in one batch.
        Logits may differ in their last bits from those of `score`: other batch sizes use other kernels.

        Args:
            texts: tokens and `n_scored` of each.

        Raises:
            ValueError: as `score`, before anything is evaluated.
        """
        self._engine.check_ids([token for tokens, _ in texts for token in tokens], images=False)
        requests = [scoring.Request.checked(self._engine, i, tokens, n) for i, (tokens, n) in enumerate(texts)]
        return scoring.score(self._engine, requests)

    def save_state(self) -> LlamaState:
        """The state to return to with `load_state`; about as large as the used part of the KV cache."""
        with self._engine.lock.between_steps():
            return self._engine.state(self._seeds.following)

    def load_state(self, state: LlamaState) -> None:
        """Return to a state of this Llama, or of another one with the same file and options.

        Raises:
            ValueError: the state belongs to another model or to other options.
        """
        with self._engine.lock.one_step():
            self._engine.set_state(state)
            self._seeds.following = state.seed

    def sample(self, *, temp: float = 0.8, **options: Unpack[CompletionOptions]) -> int:
        """Choose the token that follows the last evaluated one, without evaluating it; greedy if `temp <= 0`.

        Raises:
            RuntimeError: nothing has been evaluated yet.
        """
        with self._engine.lock.one_step():
            sampler = self._engine.sampler(self._sampling(options, temp), self._seeds.next())
            try:
                return self._engine.sequence.sample(sampler, self._engine.sequence.ids)
            finally:
                sampler.close()

    def _sampling(self, options: CompletionOptions, temp: float) -> Sampling:
        given = _rare_options.accepted(
            "this method of Llama", options, _rare_options.COMPLETION, SamplingOptions.__annotations__
        )
        return Sampling.from_options(given, temp=temp, penalty_last_n=min(self.last_n_tokens_size, self.n_ctx()))

    def generate(
        self, tokens: Sequence[int], *, temp: float = 0.8, reset: bool = True, **options: Unpack[CompletionOptions]
    ) -> Generator[int, None, None]:
        """Evaluate `tokens`, then choose and evaluate one token after the other; greedy if `temp <= 0`.

        Yields end-of-generation tokens like any others: the caller decides when to stop.

        Args:
            tokens: the prompt.
            temp: temperature.
            reset: start with the prompt; False continues after the tokens evaluated before.
            options: see `SamplingOptions` and `CompletionOptions`.

        Raises:
            ValueError: there is nothing to continue from, or the context is full.
        """
        return generate(self._engine, tokens, self._sampling(options, temp), self._seeds.next(), reset)

    # --- completions

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        temperature: float = ...,
        logprobs: int | None = ...,
        echo: bool = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[False] = ...,
        seed: int | None = ...,
        model: str | None = ...,
        **options: Unpack[CompletionOptions],
    ) -> CreateCompletionResponse: ...

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        temperature: float = ...,
        logprobs: int | None = ...,
        echo: bool = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[True],
        seed: int | None = ...,
        model: str | None = ...,
        **options: Unpack[CompletionOptions],
    ) -> Iterator[CreateCompletionStreamResponse]: ...

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        seed: int | None = None,
        model: str | None = None,
        **options: Unpack[CompletionOptions],
    ) -> CreateCompletionResponse | Iterator[CreateCompletionStreamResponse]:
        """Generate text that follows `prompt`.

        Args:
            prompt: text, in which special tokens are recognised, or token ids.
            max_tokens: maximum number of tokens to generate; None or <= 0 for as many as fit into the context.
            temperature: 0 or less is greedy.
            logprobs: report the log probabilities of the tokens, and of the N likeliest tokens at each position.
            echo: put the prompt before the text; together with `logprobs` this needs `logits_all=True`.
            stop: strings that end the text and are not part of it; the first to occur wins.
            stream: return an iterator of chunks instead of one result.
            seed: seed of the draws; default the next seed of this Llama.
            model: name of the model in the result; default its path.
            options: see `SamplingOptions` and `CompletionOptions`.

        Raises:
            ValueError: the prompt is empty or leaves no room for a token in the context, or an option is out of range.
            RuntimeError: llama.cpp fails, or this Llama is closed.
            TypeError: the prompt is bytes, or an option is unknown.
        """
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise TypeError(f"the prompt is {type(prompt).__name__}, expected str or token ids")
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt.encode(), special=True)
        else:
            tokens = [checks.integer("a token", token) for token in prompt]
            self._engine.check_ids(tokens)
        text = prompt if isinstance(prompt, str) else self._prompt_text(tokens)
        request = CompletionRequest.checked(
            self._engine,
            tokens,
            self._sampling(options, temperature),
            max_tokens=max_tokens,
            stop=stop,
            seeds=self._seeds,
            seed=seed,
            logprobs=logprobs,
            echo=echo,
        )
        name = model if model is not None else self.model_path
        results = CompletionResults(Completion(self._engine, request), name, text)
        return results.chunks() if stream else results.response()

    __call__ = create_completion

    def _prompt_text(self, tokens: list[int]) -> str:
        """The text of prompt tokens, without the BOS token that `tokenize` puts before texts."""
        begin = 1 if tokens[:1] == [self.token_bos()] else 0
        return self.detokenize(tokens[begin:], special=True).decode(errors="replace")

    # --- chats

    def apply_chat_template(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        tools: Sequence[ChatCompletionTool] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that `create_chat_completion` makes from `messages`.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        return self._chats.template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=chat_template_kwargs
        )

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        tools: Sequence[ChatCompletionTool] | None = ...,
        tool_choice: ChatCompletionToolChoiceOption | None = ...,
        temperature: float = ...,
        stream: Literal[False] = ...,
        stop: str | Sequence[str] | None = ...,
        seed: int | None = ...,
        response_format: ChatCompletionRequestResponseFormat | None = ...,
        max_tokens: int | None = ...,
        model: str | None = ...,
        logprobs: bool | None = ...,
        top_logprobs: int | None = ...,
        chat_template_kwargs: Mapping[str, Any] | None = ...,
        **options: Unpack[CompletionOptions],
    ) -> CreateChatCompletionResponse: ...

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        tools: Sequence[ChatCompletionTool] | None = ...,
        tool_choice: ChatCompletionToolChoiceOption | None = ...,
        temperature: float = ...,
        stream: Literal[True],
        stop: str | Sequence[str] | None = ...,
        seed: int | None = ...,
        response_format: ChatCompletionRequestResponseFormat | None = ...,
        max_tokens: int | None = ...,
        model: str | None = ...,
        logprobs: bool | None = ...,
        top_logprobs: int | None = ...,
        chat_template_kwargs: Mapping[str, Any] | None = ...,
        **options: Unpack[CompletionOptions],
    ) -> Iterator[CreateChatCompletionStreamResponse]: ...

    def create_chat_completion(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        tools: Sequence[ChatCompletionTool] | None = None,
        tool_choice: ChatCompletionToolChoiceOption | None = None,
        temperature: float = 0.2,
        stream: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        response_format: ChatCompletionRequestResponseFormat | None = None,
        max_tokens: int | None = None,
        model: str | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CompletionOptions],
    ) -> CreateChatCompletionResponse | Iterator[CreateChatCompletionStreamResponse]:
        """Answer `messages`, rendered with the file's chat template.

        ERNIE's `<think>`, `<response>` and `<tool_call>` are removed from the text; what they enclose becomes
        `reasoning_content`, `content` and `tool_calls` of the message.

        Args:
            messages: the conversation; a last message of the assistant's is the beginning of the answer.
            tools: what the model may call; passed to the template.
            tool_choice: "none" hides the tools; "required" or the name of a function forces a call.
            temperature: 0 or less is greedy.
            stream: return an iterator of chunks instead of one result.
            stop: strings that end the text and are not part of it.
            seed: seed of the draws; default the next seed of this Llama.
            response_format: force JSON content, which follows the schema if there is one.
            max_tokens: maximum number of tokens to generate; None or <= 0 for as many as fit into the context.
            model: name of the model in the result; default its path.
            logprobs: report the log probabilities of the tokens.
            top_logprobs: with `logprobs`, also those of the N likeliest tokens at each position.
            chat_template_kwargs: more variables for the template, such as `enable_thinking`.
            options: see `SamplingOptions` and `CompletionOptions`.

        Raises:
            ValueError: the template, the schema or the context refuses the request, or an option is out of range.
            RuntimeError: llama.cpp fails, or this Llama is closed.
        """
        prompt = self._chats.prompt(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            response_format=response_format,
            grammar=options.pop("grammar", None),
            variables=chat_template_kwargs,
        )
        request = CompletionRequest.checked(
            self._engine,
            prompt.ids,
            self._sampling(options, temperature),
            max_tokens=max_tokens,
            stop=stop,
            seeds=self._seeds,
            seed=seed,
            logprobs=(top_logprobs or 0) if logprobs else None,
        )
        results = self._chats.results(prompt, request, model if model is not None else self.model_path)
        return results.chunks() if stream else results.response()

    def create_chat_completion_openai_v1(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        **options: Any,  # noqa: ANN401
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """As `create_chat_completion`, with the classes of the package `openai` as results."""
        from openai.types.chat import ChatCompletion, ChatCompletionChunk

        result = self.create_chat_completion(messages, **options)
        if isinstance(result, dict):
            return ChatCompletion.model_validate(result)
        return (ChatCompletionChunk.model_validate(chunk) for chunk in result)

    @classmethod
    def from_pretrained(cls, repo_id: str, *_args: object, **_options: object) -> NoReturn:
        """Not available: raises NotImplementedError, which says how to download and convert a checkpoint."""
        raise NotImplementedError(
            f"Llama downloads nothing: `huggingface-cli download {repo_id}`, convert a checkpoint with `ernie-gguf "
            "convert`, then Llama(FILE)"
        )

    # --- embeddings

    # A list of Any because llama-cpp-python's shapes depend on the input and on the pooling.
    def embed(
        self,
        input: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],  # noqa: A002 - llama-cpp-python's name
        normalize: bool = False,
        truncate: bool = True,
    ) -> list[Any]:
        """The embedding of a text, or a list of the embeddings of several texts; a text may be its token ids.

        With pooling an embedding is a list of numbers, [n_embd]; without, there is one per token: [n_tokens][n_embd].

        Args:
            input: a text or several, as str or as token ids.
            normalize: scale each embedding to length 1.
            truncate: drop what exceeds `n_batch` tokens.

        Raises:
            RuntimeError: the Llama was made without `embedding=True`.
            ValueError: a text is empty or too long.
        """
        texts, single = checks.texts("input", input)
        embeddings = [embed(self._engine, embedding_tokens(self._engine, each, truncate), normalize) for each in texts]
        return embeddings[0] if single else embeddings

    def create_embedding(
        self,
        input: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],  # noqa: A002 - llama-cpp-python's name
        model: str | None = None,
    ) -> CreateEmbeddingResponse:
        """As `embed`, as a dictionary of the OpenAI API."""
        texts, _ = checks.texts("input", input)
        tokens = [embedding_tokens(self._engine, text, truncate=True) for text in texts]
        n = sum(map(len, tokens))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "embedding": embed(self._engine, each, normalize=False), "index": i}
                for i, each in enumerate(tokens)
            ],
            "model": model if model is not None else self.model_path,
            "usage": {"prompt_tokens": n, "total_tokens": n},
        }
