"""The inference routes: an allow-list. No other path reaches a backend."""

from inference_api.http import bodies
from inference_api.models import Route

_CHAT = bodies.JSONReader(bodies.Chat)
# Where a stored prompt may stand instead
_CHAT_COMPLETION = bodies.JSONReader(bodies.Chat, stored=("messages",))
_COMPLETION = bodies.JSONReader(bodies.Completion, one_of=("prompt", "prompt_embeds"), stored=("prompt",))
_EMBEDDING = bodies.JSONReader(bodies.Embedding, one_of=("input", "messages"))
_RESPONSES = bodies.JSONReader(bodies.Responses, kept=("store",), stored=("input",))
_RERANK = bodies.JSONReader(bodies.Rerank)
_ANY = bodies.JSONReader(bodies.Named)
_SCORE = _ANY
_TOKENIZE = bodies.JSONReader(bodies.Tokenize, one_of=("prompt", "messages"))
_UPLOAD = bodies.FormReader()
_RESPONSE_ENDS = (b"response.completed", b"response.incomplete", b"response.failed")

# May store its response: never sent twice.
RESPONSES = Route("/v1/responses", "responses", _RESPONSES, False, False, _RESPONSE_ENDS, token_type=b'.delta"')
# A stored response, by its id: see `stored`.
STORED = RESPONSES._replace(label="response")

# A session over a WebSocket, whose model is in the query: see `features.realtime`.
REALTIME = Route("/v1/realtime", "realtime", _ANY, repeatable=False, method="GET")

INFERENCE_ROUTES = (
    Route("/v1/chat/completions", "chat_completions", _CHAT_COMPLETION, end_marks=(b"[DONE]",)),
    Route("/v1/chat/completions/batch", "chat_completions_batch", _CHAT),
    Route("/v1/completions", "completions", _COMPLETION, end_marks=(b"[DONE]",)),
    Route("/v1/embeddings", "embeddings", _EMBEDDING),
    RESPONSES,
    Route("/v1/messages", "messages", _CHAT, end_marks=(b"message_stop",), token_type=b'"content_block_delta"'),
    Route("/v1/messages/count_tokens", "count_tokens", _CHAT),
    Route("/v1/rerank", "rerank", _RERANK),
    Route("/rerank", "rerank", _RERANK),
    Route("/v1/score", "score", _SCORE),
    Route("/score", "score", _SCORE),
    Route("/tokenize", "tokenize", _TOKENIZE),
    Route("/detokenize", "detokenize", bodies.JSONReader(bodies.Detokenize)),
    Route("/v1/moderations", "moderations", bodies.JSONReader(bodies.Moderation)),
    Route("/classify", "classify", _EMBEDDING),
    Route("/pooling", "pooling", bodies.JSONReader(bodies.Pooling, one_of=("input", "messages", "data"))),
    # SageMaker's single route: vLLM chooses the API by the fields.
    Route("/invocations", "invocations", _ANY, end_marks=(b"[DONE]",)),
    Route("/v1/audio/speech", "speech", bodies.JSONReader(bodies.Speech)),
    Route("/v1/images/generations", "images_generations", bodies.JSONReader(bodies.Image)),
    Route("/v1/images/edits", "images_edits", _UPLOAD, multipart=True),
    Route("/v1/audio/transcriptions", "transcriptions", _UPLOAD, multipart=True),
    Route("/v1/audio/translations", "translations", _UPLOAD, multipart=True),
)


def normal_path(path: str) -> str:
    """The path without doubled or trailing slashes: base URLs often end in one, and a redirect would lose the body."""
    return "/" + "/".join(part for part in path.split("/") if part)
