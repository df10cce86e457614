"""Code that asks a router, to be copied: it works as it stands once the variable KEY has the key."""

import json
import shlex
from typing import NamedTuple

KEY = "INFERENCE_API_KEY"
# In the place of what is not known
ROUTER, MODEL = "https://ROUTER", "MODEL"


class Samples(NamedTuple):
    """`export`: sets the variable; None: the secret is not known. `router`, `model`: what to replace, if anything."""

    export: str | None
    curl: str
    python: str
    router: str | None
    model: str | None


def samples(url: str | None, model: str | None, secret: str | None = None) -> Samples:
    """`url`: of the routers, without /v1."""
    base, name = f"{url or ROUTER}/v1", model or MODEL
    return Samples(
        None if secret is None else f"export {KEY}={shlex.quote(secret)}",
        _curl(base, name),
        _python(base, name),
        None if url else ROUTER,
        None if model else MODEL,
    )


def _curl(base: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}]}
    return (
        f"curl -sS {shlex.quote(f'{base}/chat/completions')} \\\n"
        f'  -H "Authorization: Bearer ${KEY}" \\\n'
        "  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body))}"
    )


def _python(base: str, model: str) -> str:
    return (
        "import os\n"
        "\n"
        "from openai import OpenAI\n"
        "\n"
        "client = OpenAI(\n"
        f"    base_url={json.dumps(base)},\n"
        f'    api_key=os.environ["{KEY}"],\n'
        ")\n"
        "answer = client.chat.completions.create(\n"
        f"    model={json.dumps(model)},\n"
        '    messages=[{"role": "user", "content": "Say hello."}],\n'
        ")\n"
        "print(answer.choices[0].message.content)"
    )
