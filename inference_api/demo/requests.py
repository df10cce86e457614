"""The fields of requests that the engine reads, checked as leniently as vLLM does: unknown fields are ignored."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, AliasPath, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from inference_api.demo import model

_Some = Field(min_length=1)
_Text = str | Annotated[list[str], _Some] | Annotated[list[int], _Some] | Annotated[list[list[int]], _Some]
_Asked = TypeVar("_Asked", bound="ModelRequest")
# Names of pydantic's own, in the place of an error.
_INTERNAL = re.compile(r"\W|^(str|int|dict|list|constrained)")


class EngineError(Exception):
    """A rejection in vLLM's envelope; unlike OpenAI's, its `code` is the status as a number."""

    def __init__(self, status: int, type: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> EngineError:
    return EngineError(400, "BadRequestError", message, param)


class Prompt:
    """A text and its tokens; ids of another tokenizer count as sent."""

    def __init__(self, given: str | list[int]) -> None:
        tokens = model.tokenize(given) if isinstance(given, str) else [model.token_text(number) for number in given]
        self.text = "".join(tokens)
        self.length = len(tokens)


class StreamOptions(BaseModel):
    include_usage: bool | None = False


def _as_text(given: Any) -> Any:
    return "".join(part.get("text", "") for part in given) if isinstance(given, list) else given or ""


class Part(BaseModel):
    """A part of a message; what a tool gave back has its text under `content`."""

    type: str = "text"
    text: Annotated[str, BeforeValidator(_as_text), Field(validation_alias=AliasChoices("text", "content"))] = ""


class Message(BaseModel):
    """A message of the chat or Messages API, or an item of the Responses API."""

    role: str = ""
    type: str = "message"
    content: Annotated[str | list[Part] | None, Field(validation_alias=AliasChoices("content", "output"))] = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])

    @property
    def is_result(self) -> bool:
        """Whether it is what a tool gave back."""
        kinds = {part.type for part in self.content} if isinstance(self.content, list) else set()
        return self.role == "tool" or self.type == "function_call_output" or "tool_result" in kinds


def _as_messages(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


Messages = Annotated[list[Message], _Some, BeforeValidator(_as_messages)]


class Tool(BaseModel):
    """A function, as the chat, Responses or Messages API declares it."""

    name: str = Field(validation_alias=AliasChoices(AliasPath("function", "name"), "name"))
    parameters: dict[str, Any] = Field(
        default={}, validation_alias=AliasChoices(AliasPath("function", "parameters"), "parameters", "input_schema")
    )


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] = Field(
        default={"properties": {"answer": {"const": "This is JSON."}}},
        validation_alias=AliasChoices(AliasPath("json_schema", "schema"), "schema"),
    )


class ModelRequest(BaseModel):
    # vLLM takes a missing, null or empty name for its one model.
    model: str | None = None


class GenerationRequest(ModelRequest):
    """The fields that all routes that generate have in common."""

    limit: int | None = Field(
        default=None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens", "max_output_tokens")
    )
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: str | list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    user: str | None = None
    response_format: ResponseFormat | None = Field(
        default=None,
        validation_alias=AliasChoices(
            "response_format", AliasPath("text", "format"), AliasPath("output_config", "format")
        ),
    )

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise ValueError("`stream_options` can only be given with `stream: true`.")
        return self

    @property
    def stops(self) -> list[str]:
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def prompts(self) -> list[Prompt]:
        raise NotImplementedError

    @property
    def said(self) -> list[str]:
        """What each answer repeats."""
        return [prompt.text for prompt in self.prompts]

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """What the answer must fit; None: it is text."""
        form = self.response_format
        return form.json_schema if isinstance(form, ResponseFormat) and form.type != "text" else None

    @property
    def alternatives(self) -> int | None:
        """How many tokens are wanted with their log probabilities in each place; None: no log probabilities."""
        return None

    def tool(self, said: str) -> Tool | None:
        """The tool that is called instead of an answer."""
        return None


class CompletionRequest(GenerationRequest):
    prompt: _Text
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        return texts(self.prompt)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class ConversationRequest(GenerationRequest):
    """A chat; the Responses and Messages APIs have other names for the same fields."""

    messages: Messages
    system: Message | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _chosen_tool_is_there(self) -> "ConversationRequest":
        name = self._chosen_name
        if name and name not in [tool.name for tool in self.tools or []]:
            raise ValueError(f"`tool_choice` names {name!r}, which is not among the `tools`.")
        if not self.tools and self._choice in ("required", "any"):
            raise ValueError("When using `tool_choice`, `tools` must be set.")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(transcript([self.system, *self.messages] if self.system else self.messages))]

    @property
    def said(self) -> list[str]:
        return [last_words(self.messages)]

    @property
    def _choice(self) -> str:
        choice = self.tool_choice or "auto"
        return choice if isinstance(choice, str) else str(choice.get("type"))

    @property
    def _chosen_name(self) -> str | None:
        choice = self.tool_choice if isinstance(self.tool_choice, dict) else {}
        name = choice.get("function", choice).get("name")
        return name and str(name)

    def tool(self, said: str) -> Tool | None:
        """The chosen one; else the first with a word of its name in what was said, unless that is answered already."""
        tools, name = self.tools or [], self._chosen_name
        if name:
            return next(tool for tool in tools if tool.name == name)
        meant = [tool for tool in tools if any(len(word) > 3 for word in model.words(tool.name) & model.words(said))]
        if self._choice in ("required", "any"):
            return (meant or tools)[0]
        return meant[0] if meant and self._choice == "auto" and not self.messages[-1].is_result else None


class ChatRequest(ConversationRequest):
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("when using `top_logprobs`, `logprobs` must be set to true.")
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class BatchRequest(GenerationRequest):
    """Several chats at once: one choice for each."""

    messages: Annotated[list[Messages], _Some]
    n: Literal[1] | None = None
    stream: Literal[False] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(transcript(messages)) for messages in self.messages]

    @property
    def said(self) -> list[str]:
        return [last_words(messages) for messages in self.messages]


def _as_system(given: Any) -> Any:
    return {"role": "system", "content": given} if given is not None else None


class ResponsesRequest(ConversationRequest):
    messages: Messages = Field(validation_alias="input")
    system: Annotated[Message | None, BeforeValidator(_as_system)] = Field(None, validation_alias="instructions")


class MessagesRequest(ConversationRequest):
    limit: int = Field(validation_alias="max_tokens")
    system: Annotated[Message | None, BeforeValidator(_as_system)] = None


class CountRequest(MessagesRequest):
    limit: int = 1


class TranscriptionRequest(GenerationRequest):
    """A form; `file` is what Starlette makes of an upload, `size` its bytes."""

    size: int
    response_format: Literal["json", "text", "verbose_json"] | None = None  # type: ignore[assignment]
    language: str | None = None

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(f"{self.size} bytes of audio")]


class InputRequest(ModelRequest):
    """Embeddings, pooling, classification, moderation."""

    input: _Text | None = None
    messages: Messages | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=4096)] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        return texts(self.input) if self.input is not None else [Prompt(transcript(self.messages or []))]


class ScoreRequest(ModelRequest):
    """Each text of the first kind with each of the second; `top_n` is of reranking."""

    one: str | Annotated[list[str], _Some] = Field(validation_alias=AliasChoices("text_1", "queries", "query"))
    many: str | Annotated[list[str], _Some] = Field(validation_alias=AliasChoices("text_2", "documents", "items"))
    top_n: Annotated[int, Field(ge=0)] = 0


class SpeechRequest(ModelRequest):
    input: Annotated[str, _Some]
    response_format: Literal["wav", "pcm"] = "wav"


class ImageRequest(ModelRequest):
    prompt: Annotated[str, _Some]
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(pattern=r"^\d{1,4}x\d{1,4}$")] | None = None


class TokenizeRequest(ModelRequest):
    prompt: str | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _something_to_count(self) -> "TokenizeRequest":
        if self.prompt is None and self.messages is None:
            raise ValueError("`prompt` or `messages` is needed.")
        return self

    @property
    def text(self) -> str:
        return self.prompt if self.prompt is not None else transcript(self.messages or [])


class DetokenizeRequest(ModelRequest):
    tokens: list[int]


def parse(kind: type[_Asked], body: bytes | dict[str, Any]) -> _Asked:
    """Read JSON, or the fields of a form, as `kind`. Raises EngineError with vLLM's status, type and `param`."""
    try:
        return kind.model_validate(body) if isinstance(body, dict) else kind.model_validate_json(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(["body", *(str(part) for part in first["loc"] if not _INTERNAL.search(str(part)))])
        message = f"{param}: {first['msg'].removeprefix('Value error, ')}"
        raise EngineError(400, "Bad Request", message, param) from None


def transcript(messages: list[Message]) -> str:
    """The text that a chat template makes of the messages."""
    return "".join(f"{message.role}: {message.text}\n" for message in messages)


def last_words(messages: list[Message]) -> str:
    """The last text of the user, or of a tool."""
    spoken = [message.text for message in messages if message.role == "user" or message.is_result]
    return spoken[-1] if spoken else ""


def texts(given: _Text) -> list[Prompt]:
    """One Prompt for a text or its ids, several for a list of them."""
    if isinstance(given, str):
        return [Prompt(given)]
    many: list[Any] = list(given)
    return [Prompt(many)] if isinstance(many[0], int) else [Prompt(one) for one in many]
