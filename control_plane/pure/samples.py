"""Code that asks a router, to be copied: it works as it stands once the variable KEY has the key."""

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from control_plane.pure.chat import Question, Turn

KEY = "INFERENCE_API_KEY"
# In the place of what is not known
ROUTER, MODEL = "https://ROUTER", "MODEL"
_HELLO = Question((Turn("user", "Say hello."),))


class Samples(NamedTuple):
    """`export`: sets the variable; None: the secret is not known. `router`, `model`: what to replace, if anything."""

    export: str | None
    codes: "tuple[Code, ...]"
    router: str | None
    model: str | None


def samples(url: str | None, model: str | None, secret: str | None = None) -> Samples:
    """Of a first request. `url`: of the routers, without /v1."""
    return Samples(
        None if secret is None else f"export {KEY}={shlex.quote(secret)}",
        codes(_HELLO, model or MODEL, url),
        None if url else ROUTER,
        None if model else MODEL,
    )


class Code(NamedTuple):
    """`name`: of the language, for people."""

    name: str
    text: str


def codes(question: Question, model: str, url: str | None) -> tuple[Code, ...]:
    """The same request as curl, Python and JavaScript. `url`: of the routers, without /v1. The key is a variable."""
    body, base = question.body(model), f"{url or ROUTER}/v1"
    return (
        Code("curl", _curl(body, base)),
        Code("Python", _python(body, base)),
        Code("JavaScript", _javascript(body, base)),
    )


def _curl(body: Mapping[str, Any], base: str) -> str:
    # JSON has no raw line ends in texts, so that no line of it ends the document.
    return (
        f"curl -sSN {shlex.quote(f'{base}/chat/completions')} \\\n"
        f'  -H "Authorization: Bearer ${KEY}" \\\n'
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d @- <<'EOF'\n{_json({**body, 'stream': True})}\nEOF\n"
    )


def _python(body: Mapping[str, Any], base: str) -> str:
    # Texts and numbers in JSON are those of Python, too.
    given = {name: value for name, value in body.items() if name != "prompt"}
    lines = [f"    {name}={_indented(value)}," for name, value in given.items()]
    if "prompt" in body:
        lines.append(f"    extra_body={_indented({'prompt': body['prompt']})},")
    arguments = "\n".join([*lines, "    stream=True,"])
    return (
        "import os\n\nfrom openai import OpenAI\n\n"
        f'client = OpenAI(base_url={json.dumps(base)}, api_key=os.environ["{KEY}"])\n'
        f"answer = client.chat.completions.create(\n{arguments}\n)\n"
        "for chunk in answer:\n"
        "    if chunk.choices:\n"
        '        print(chunk.choices[0].delta.content or "", end="", flush=True)\n'
    )


def _javascript(body: Mapping[str, Any], base: str) -> str:
    return (
        'import OpenAI from "openai";\n\n'
        f"const client = new OpenAI({{ baseURL: {json.dumps(base)}, apiKey: process.env.{KEY} }});\n"
        f"const answer = await client.chat.completions.create({_json({**body, 'stream': True})});\n"
        "for await (const chunk of answer) {\n"
        '  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");\n'
        "}\n"
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _indented(value: Any) -> str:
    return json.dumps(value, indent=4, ensure_ascii=False).replace("\n", "\n    ")
