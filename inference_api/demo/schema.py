"""What a toy engine reads of a request, checked as leniently as vLLM does: unknown fields are ignored."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from inference_api.demo.toy import token_text, tokenize

_Some = Field(min_length=1)
_Text = str | Annotated[list[str], _Some] | Annotated[list[int], _Some] | Annotated[list[list[int]], _Some]
_Stop = Annotated[str, StringConstraints(min_length=1)]
_Asked = TypeVar("_Asked", bound="ModelRequest")


class EngineError(Exception):
    """A refusal in vLLM's envelope; unlike OpenAI's, its `code` is the status as a number."""

    def __init__(self, status: int, type: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> EngineError:
    return EngineError(400, "BadRequestError", message, param)


class Prompt:
    """A text and its tokens; ids of another tokenizer count as sent."""

    def __init__(self, given: str | list[int]) -> None:
        tokens = tokenize(given) if isinstance(given, str) else [token_text(number) for number in given]
        self.text = "".join(tokens)
        self.length = len(tokens)


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Part(BaseModel):
    text: str = ""


class Message(BaseModel):
    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class ModelRequest(BaseModel):
    # vLLM takes a missing, null or empty name for its one model.
    model: str | None = None


class GenerationRequest(ModelRequest):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: _Stop | list[_Stop] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options and not self.stream:
            raise ValueError("`stream_options` can only be given with `stream: true`.")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], _Some]

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(transcript(self.messages))]

    @property
    def said(self) -> list[str]:
        spoken = [message.text for message in self.messages if message.role == "user"]
        return [spoken[-1] if spoken else ""]


class CompletionRequest(GenerationRequest):
    prompt: _Text

    @property
    def prompts(self) -> list[Prompt]:
        return texts(self.prompt)

    @property
    def said(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]


class EmbeddingRequest(ModelRequest):
    input: _Text
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=4096)] | None = None


class TokenizeRequest(ModelRequest):
    prompt: str | None = None
    messages: list[Message] | None = None

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


def parse(kind: type[_Asked], body: bytes, content_type: str) -> _Asked:
    """Read a body as `kind`. Raises EngineError with vLLM's status, type and `param`."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise EngineError(
            400, "Bad Request", f"The content type must be application/json, not {content_type!r}.", "body"
        )
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(["body", *map(str, first["loc"])])
        message = f"{param}: {first['msg'].removeprefix('Value error, ')}"
        raise EngineError(400, "Bad Request", message, param) from None


def transcript(messages: list[Message]) -> str:
    """What a chat template makes of the messages: one text."""
    return "".join(f"{message.role}: {message.text}\n" for message in messages)


def texts(given: _Text) -> list[Prompt]:
    """One Prompt for a text or its ids, several for a list of them."""
    if isinstance(given, str):
        return [Prompt(given)]
    many: list[Any] = list(given)
    return [Prompt(many)] if isinstance(many[0], int) else [Prompt(one) for one in many]
