"""The fields of requests that the engine reads, checked as leniently as vLLM does: unknown fields are ignored."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, AliasPath, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from inference_api.demo import model
from inference_api.demo.instances import Schema, schema_in

_Some = Field(min_length=1)
_Texts = str | Annotated[list[str], _Some]
_Tokens = Annotated[list[int], _Some] | Annotated[list[list[int]], _Some]
_ANY_OBJECT: Schema = {"properties": {"answer": {"const": "This is JSON."}}}
_Read = TypeVar("_Read", bound="Asked")
# Names of pydantic's own, in the place of an error.
_INTERNAL = re.compile(r"\W|^(str|int|dict|list|constrained)")


class EngineError(Exception):
    """A rejection in vLLM's envelope; unlike OpenAI's, its `code` is the status as a number."""

    def __init__(self, message: str, param: str | None, type: str = "BadRequestError", status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": type, "param": param, "code": status}


def parse(kind: type[_Read], body: bytes | dict[str, Any]) -> _Read:
    """Read JSON, or the fields of a form, as `kind`. Raises EngineError with vLLM's status, type and `param`."""
    try:
        return kind.model_validate(body) if isinstance(body, dict) else kind.model_validate_json(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(["body", *(str(part) for part in first["loc"] if not _INTERNAL.search(str(part)))])
        raise EngineError(f"{param}: {first['msg'].removeprefix('Value error, ')}", param, "Bad Request") from None


class Prompt:
    """A text and its tokens; ids of another tokenizer count as sent."""

    def __init__(self, given: str | list[int]) -> None:
        tokens = model.tokenize(given) if isinstance(given, str) else [model.token_text(number) for number in given]
        self.text = "".join(tokens)
        self.length = len(tokens)


def prompts_of(given: _Texts | _Tokens) -> list[Prompt]:
    """One Prompt for a text or its ids, several for a list of them."""
    if isinstance(given, str):
        return [Prompt(given)]
    many: list[Any] = list(given)
    return [Prompt(many)] if isinstance(many[0], int) else [Prompt(one) for one in many]


# Messages


def _as_text(given: Any) -> Any:
    return "".join(part.get("text", "") for part in given) if isinstance(given, list) else given or ""


def _as_messages(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _as_system(given: Any) -> Any:
    return {"role": "system", "content": given} if given is not None else None


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
        parts = self.content if isinstance(self.content, list) else []
        kinds = {self.role, self.type, *(part.type for part in parts)}
        return bool(kinds & {"tool", "function_call_output", "tool_result"})


Messages = Annotated[list[Message], _Some, BeforeValidator(_as_messages)]
System = Annotated[Message | None, BeforeValidator(_as_system)]


def transcript(messages: list[Message]) -> Prompt:
    """What a chat template makes of the messages."""
    return Prompt("".join(f"{message.role}: {message.text}\n" for message in messages))


def last_words(messages: list[Message]) -> str:
    """The last text of the user, or of a tool."""
    return next((one.text for one in reversed(messages) if one.role == "user" or one.is_result), "")


# Generation


class Tool(BaseModel):
    """A function, as the chat, Responses or Messages API declares it."""

    name: str = Field(validation_alias=AliasChoices(AliasPath("function", "name"), "name"))
    parameters: dict[str, Any] = Field(
        default={}, validation_alias=AliasChoices(AliasPath("function", "parameters"), "parameters", "input_schema")
    )


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] = Field(
        default={}, validation_alias=AliasChoices(AliasPath("json_schema", "schema"), "schema")
    )


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Asked(BaseModel):
    # vLLM takes a missing, null or empty name for its one model.
    model: str | None = None


class Generate(Asked):
    """What all routes that generate have in common, under the names of each."""

    limit: int | None = Field(None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: _Texts | None = Field(None, validation_alias=AliasChoices("stop", "stop_sequences"))
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    # A number of tokens in completions, yes or no in chats.
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    format: ResponseFormat | None = Field(None, validation_alias="response_format")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Generate":
        if self.stream_options and not self.stream:
            raise ValueError("`stream_options` can only be given with `stream: true`.")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        raise NotImplementedError

    @property
    def said(self) -> list[str]:
        """The words that each answer repeats."""
        return [prompt.text for prompt in self.prompts]

    @property
    def schema_asked(self) -> Schema | None:
        """The schema that the answer must fit; None: it is text."""
        form = self.format
        if not isinstance(form, ResponseFormat) or form.type == "text":
            return None
        return form.json_schema if form.type == "json_schema" else schema_in(self.prompts[0].text) or _ANY_OBJECT

    def tool(self, said: str) -> Tool | None:
        """The tool that is called instead of an answer."""
        return None


class Complete(Generate):
    prompt: _Texts | _Tokens

    @property
    def prompts(self) -> list[Prompt]:
        return prompts_of(self.prompt)


class Chat(Generate):
    """A chat; the Responses and Messages APIs have other names for the same fields."""

    messages: Messages
    system: System = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fields_fit(self) -> "Chat":
        kind, name = self._choice
        if name and name not in [tool.name for tool in self.tools or []]:
            raise ValueError(f"`tool_choice` names {name!r}, which is not among the `tools`.")
        if not self.tools and kind in ("required", "any"):
            raise ValueError("When using `tool_choice`, `tools` must be set.")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        return [transcript([self.system, *self.messages] if self.system else self.messages)]

    @property
    def said(self) -> list[str]:
        return [last_words(self.messages)]

    def tool(self, said: str) -> Tool | None:
        """The chosen one; else the first with a word of its name in what was said, unless that is answered already."""
        kind, name = self._choice
        tools = [tool for tool in self.tools or [] if name in (None, tool.name)]
        meant = [tool for tool in tools if any(len(word) > 3 for word in model.words(tool.name) & model.words(said))]
        if name or kind in ("required", "any"):
            return (meant or tools)[0]
        return meant[0] if meant and kind == "auto" and not self.messages[-1].is_result else None

    @property
    def _choice(self) -> tuple[str, str | None]:
        """The kind of choice, and the name of the chosen tool."""
        choice = self.tool_choice or "auto"
        if isinstance(choice, str):
            return choice, None
        return str(choice.get("type")), choice.get("function", choice).get("name")


class Respond(Chat):
    n: Literal[1] | None = None
    messages: Messages = Field(validation_alias="input")
    system: System = Field(None, validation_alias="instructions")
    limit: int | None = Field(None, validation_alias="max_output_tokens")
    format: ResponseFormat | None = Field(None, validation_alias=AliasPath("text", "format"))


class Anthropic(Chat):
    n: Literal[1] | None = None
    limit: int | None = Field(validation_alias="max_tokens")
    format: ResponseFormat | None = Field(None, validation_alias=AliasPath("output_config", "format"))


class Batch(Generate):
    """Several chats at once: one choice for each."""

    messages: Annotated[list[Messages], _Some]
    n: Literal[1] | None = None
    stream: Literal[False] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        return [transcript(messages) for messages in self.messages]

    @property
    def said(self) -> list[str]:
        return [last_words(messages) for messages in self.messages]


class Transcribe(Generate):
    """A form; `size`: the bytes of its file."""

    size: int = Field(validation_alias="file")
    format: Literal["json", "text", "verbose_json"] = Field("json", validation_alias="response_format")  # type: ignore[assignment]
    language: str = "en"

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(f"{self.size} bytes of audio")]


# The rest


class Pool(Asked):
    """Embeddings, pooling, classification, moderation, tokenization."""

    input: _Texts | _Tokens | None = Field(None, validation_alias=AliasChoices("input", "prompt"))
    messages: Messages | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=4096)] | None = None

    @model_validator(mode="after")
    def _there_is_something(self) -> "Pool":
        if self.input is None and self.messages is None:
            raise ValueError("`input`, `prompt` or `messages` is needed.")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        return prompts_of(self.input) if self.input is not None else [transcript(self.messages or [])]


class Score(Asked):
    """Each text of the first kind with each of the second; `top_n` is of reranking."""

    one: _Texts = Field(validation_alias=AliasChoices("text_1", "queries", "query"))
    many: _Texts = Field(validation_alias=AliasChoices("text_2", "documents", "items"))
    top_n: Annotated[int, Field(ge=0)] = 0


class Speak(Asked):
    input: Annotated[str, _Some]
    response_format: Literal["wav", "pcm"] = "wav"


class Draw(Asked):
    prompt: Annotated[str, _Some]
    n: Annotated[int, Field(ge=1, le=10)] = 1
    size: Annotated[str, Field(pattern=r"^\d{1,4}x\d{1,4}$")] = "64x64"


class Detokenize(Asked):
    tokens: list[int]
