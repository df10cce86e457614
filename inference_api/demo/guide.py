"""What the demo prints once it runs: every command in it works as printed, from another terminal."""

import json

_HELLO = [{"role": "user", "content": "Hello"}]

_WEATHER = [{"role": "user", "content": "How is the weather in Rome?"}]
_CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": _CITY}}

_GUIDE = """\
The demo runs at {url}.

llama-3-8b (two backends, alias llama3), mistral-7b and gpt2 are demo models: programs that repeat what you say at
{pace:g} tokens a second, without a GPU, a neural network or any intelligence. They call a tool when you say a word of
its name, and fill in JSON schemas. What stands in front of them is real: this project's router, which reads its
catalogue from this project's model registry.

Ask:

{ask}

Ask, and watch the answer come:

{stream}

Have it call a tool:

{tool}

Ask with the OpenAI SDK (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="unused")
answer = client.chat.completions.create(model="gpt2", messages={hello})
print(answer.choices[0].message.content)

Stop one backend of llama-3-8b, ask again, and the other one answers; the demo then prints how to start it again:

kill {backend}

The output of every process is in {logs} until the demo ends. Ctrl-C ends it.
"""


def guide(url: str, tokens_per_second: float, backend: int, logs: str) -> str:
    """The text; `backend` is the process to kill, `logs` a directory."""
    return _GUIDE.format(
        url=url,
        pace=tokens_per_second,
        ask=_curl("curl", url, {"model": "llama-3-8b", "messages": _HELLO}),
        stream=_curl("curl -N", url, {"model": "mistral-7b", "stream": True, "messages": _HELLO}),
        tool=_curl("curl", url, {"model": "llama3", "messages": _WEATHER, "tools": [_TOOL]}),
        hello=json.dumps(_HELLO),
        backend=backend,
        logs=logs,
    )


def base_url(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _curl(command: str, url: str, body: dict[str, object]) -> str:
    return f"{command} {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(body)}'"
