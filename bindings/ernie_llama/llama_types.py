"""Types of requests and results, as in llama-cpp-python and the OpenAI API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:  # in the standard library from Python 3.11 on
    from typing_extensions import NotRequired

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


class EmbeddingUsage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """The embedding of a text, or one for each of its tokens."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | list[list[float]]


class CreateEmbeddingResponse(TypedDict):
    """The result of `Llama.create_embedding`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class CompletionLogprobs(TypedDict):
    """Lists with one entry per token; `text_offset` counts characters from the start of the prompt."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    """One generated text."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionUsage(TypedDict):
    """Token counts, without the token that ended generation."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CreateCompletionResponse(TypedDict):
    """The result of `Llama.create_completion`; streamed chunks have no usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[CompletionUsage]


CreateCompletionStreamResponse = CreateCompletionResponse


class ChatCompletionTopLogprobToken(TypedDict):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionLogprobToken(ChatCompletionTopLogprobToken):
    """A generated token, with the likeliest tokens at its position."""

    top_logprobs: list[ChatCompletionTopLogprobToken]


class ChatCompletionLogprobs(TypedDict):
    """The generated tokens, including those of reasoning and markers."""

    content: list[ChatCompletionLogprobToken] | None
    refusal: None


class ChatCompletionMessageToolCallFunction(TypedDict):
    """The function to call; `arguments` is JSON text."""

    name: str
    arguments: str


class ChatCompletionMessageToolCall(TypedDict):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: ChatCompletionMessageToolCallFunction


class ChatCompletionResponseMessage(TypedDict):
    """The answer; `content` is None if it contains only tool calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ChatCompletionMessageToolCall]]


class ChatCompletionResponseChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatCompletionResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: FinishReason


class CreateChatCompletionResponse(TypedDict):
    """The result of `Llama.create_chat_completion`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: CompletionUsage


class ChatCompletionMessageToolCallChunk(ChatCompletionMessageToolCall):
    """A call in a stream, always complete."""

    index: int


class ChatCompletionStreamResponseDelta(TypedDict):
    """What a chunk adds to the answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ChatCompletionMessageToolCallChunk]]


class ChatCompletionStreamResponseChoice(TypedDict):
    """The part of an answer in one chunk."""

    index: int
    delta: ChatCompletionStreamResponseDelta
    logprobs: ChatCompletionLogprobs | None
    finish_reason: FinishReason | None


class CreateChatCompletionStreamResponse(TypedDict):
    """A chunk of a streamed `Llama.create_chat_completion`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatCompletionStreamResponseChoice]


class ChatCompletionRequestMessage(TypedDict):
    """A message; `content` is text, or a list of parts `{"type": "text", "text": ...}`."""

    role: str
    content: NotRequired[str | list[dict[str, Any]] | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ChatCompletionMessageToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class ChatCompletionToolFunction(TypedDict):
    """A function; `parameters` is a JSON schema."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class ChatCompletionTool(TypedDict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ChatCompletionToolFunction


class ChatCompletionNamedToolChoiceFunction(TypedDict):
    """The name of a function."""

    name: str


class ChatCompletionNamedToolChoice(TypedDict):
    """The function that the model must call."""

    type: Literal["function"]
    function: ChatCompletionNamedToolChoiceFunction


ChatCompletionToolChoiceOption: TypeAlias = Literal["none", "auto", "required"] | ChatCompletionNamedToolChoice


class ChatCompletionRequestResponseFormat(TypedDict):
    """The format of the answer; `schema` is llama-cpp-python's key for a schema, `json_schema` is OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    schema: NotRequired[dict[str, Any]]
    json_schema: NotRequired[dict[str, Any]]


# --- more names of llama-cpp-python: parts of requests, and other names for the types above

JsonType: TypeAlias = int | str | bool | list[Any] | dict[str, Any] | None


class ChatCompletionResponseFunctionCall(TypedDict):
    """The call of a function, in the form that preceded tool calls."""

    name: str
    arguments: str


class ChatCompletionFunctionCallOption(TypedDict):
    """The name of a function to call, in the form that preceded tool_choice."""

    name: str


class ChatCompletionStreamResponseDeltaEmpty(TypedDict):
    """The delta of a chunk without text."""


class ChatCompletionRequestMessageContentPartText(TypedDict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ChatCompletionRequestMessageContentPartImageImageUrl(TypedDict):
    """The address of an image."""

    url: str
    detail: NotRequired[Literal["auto", "low", "high"]]


class ChatCompletionRequestMessageContentPartImage(TypedDict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: str | ChatCompletionRequestMessageContentPartImageImageUrl


class ChatCompletionRequestMessageContentPartVideoUrl(TypedDict):
    """A video file in a message."""

    type: Literal["video_url"]
    video_url: str | dict[Literal["url"], str]


class ChatCompletionRequestMessageContentPartVideo(TypedDict):
    """Frames of a video in a message: images of Pillow or arrays, and how many there are in a second."""

    type: Literal["video"]
    video: Any
    fps: float


ChatCompletionRequestMessageContentPart: TypeAlias = (
    ChatCompletionRequestMessageContentPartText
    | ChatCompletionRequestMessageContentPartImage
    | ChatCompletionRequestMessageContentPartVideoUrl
    | ChatCompletionRequestMessageContentPartVideo
)
ChatCompletionFunction = ChatCompletionFunctions = ChatCompletionToolFunction
ChatCompletionRequestFunctionCallOption = ChatCompletionFunctionCallOption
ChatCompletionRequestFunctionCall: TypeAlias = Literal["none", "auto"] | ChatCompletionFunctionCallOption
ChatCompletionFunctionParameters: TypeAlias = dict[str, Any]
ChatCompletionMessageToolCallChunkFunction = ChatCompletionMessageToolCallFunction
ChatCompletionMessageToolCalls: TypeAlias = list[ChatCompletionMessageToolCall]
ChatCompletionStreamResponseDeltaFunctionCall = ChatCompletionResponseFunctionCall
ChatCompletionRequestAssistantMessageFunctionCall = ChatCompletionResponseFunctionCall
ChatCompletionRequestSystemMessage = ChatCompletionRequestMessage
ChatCompletionRequestUserMessage = ChatCompletionRequestMessage
ChatCompletionRequestAssistantMessage = ChatCompletionRequestMessage
ChatCompletionRequestToolMessage = ChatCompletionRequestMessage
ChatCompletionRequestFunctionMessage = ChatCompletionRequestMessage
EmbeddingData = Embedding
Completion = CompletionChunk = CreateCompletionResponse
ChatCompletion = CreateChatCompletionResponse
ChatCompletionChoice = ChatCompletionResponseChoice
ChatCompletionMessage = ChatCompletionResponseMessage
ChatCompletionChunk = ChatCompletionStreamResponse = CreateChatCompletionStreamResponse
ChatCompletionChunkChoice = ChatCompletionStreamResponseChoice
ChatCompletionChunkDelta = ChatCompletionStreamResponseDelta
ChatCompletionChunkDeltaEmpty = ChatCompletionStreamResponseDeltaEmpty
ChatCompletionResponseFunction = ChatCompletionFunction
ChatCompletionFunctionCall = ChatCompletionResponseFunctionCall
