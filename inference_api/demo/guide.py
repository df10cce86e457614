"""What the demo prints once it runs: every command in it works as printed, from another terminal."""

import json

from inference_api.demo.policy import ALLOWED, REQUESTS, TOKENS, Keys

HELLO = [{"role": "user", "content": "Hello"}]

_WEATHER = [{"role": "user", "content": "How is the weather in Rome?"}]
_CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": _CITY}}

_GUIDE = """\
The demo runs at {url}.

llama-3-8b (two backends, alias llama3), mistral-7b and gpt2 are demo models: programs that repeat what you say at
{pace:g} tokens a second, without a GPU, a neural network or any intelligence. They call a tool when you say a word of
its name, and fill in JSON schemas. What stands in front of them is real: this project's router, which reads its
catalogue from this project's model registry.
{keys}
Ask:

{ask}

Ask, and watch the answer come:

{stream}

Have it call a tool:

{tool}

Ask with the OpenAI SDK (pip install openai):

{imports}from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key={api_key})
answer = client.chat.completions.create(model="gpt2", messages={hello})
print(answer.choices[0].message.content)

Stop one backend of llama-3-8b, ask again, and the other one answers; the demo then prints how to start it again:

kill {backend}

The output of every process is in {logs} until the demo ends. Ctrl-C ends it.
"""


# The keys are shown here and nowhere else: the policy has digests.
_KEYS = """
The router asks for API keys. These two were made for this demo; copy them into the other terminal first:

export TEAM_A={team_a}
export TEAM_B={team_b}

TEAM_A may use {allowed} only, {requests} requests a minute; TEAM_B every model, {tokens} tokens a minute. Without a key
the answer is 401, for another model 403, past the limit 429 with the time to wait:

{none}
{forbidden}
{limited}

Each key sees its own models:

curl {url}/v1/models -H "authorization: Bearer $TEAM_A"

Each request is a usage record, with its tokens and what they cost:

grep '"event":"usage".*"status":200' {logs}/router.log | tail -n 1

Edit the policy, and the router takes it within 5 s: {logs}/policy.yaml
"""


def guide(url: str, tokens_per_second: float, backend: int, logs: str, keys: Keys | None = None) -> str:
    """The text; `backend` is the process to kill, `logs` a directory, `keys` those of a router that asks for them."""
    key = "$TEAM_B" if keys else None
    return _GUIDE.format(
        url=url,
        pace=tokens_per_second,
        keys=_keys(url, logs, keys) if keys else "",
        ask=curl("curl", url, {"model": "llama-3-8b", "messages": HELLO}, key),
        stream=curl("curl -N", url, {"model": "mistral-7b", "stream": True, "messages": HELLO}, key),
        tool=curl("curl", url, {"model": "llama3", "messages": _WEATHER, "tools": [_TOOL]}, key),
        imports="import os\n" if keys else "",
        api_key='os.environ["TEAM_B"]' if keys else '"unused"',
        hello=json.dumps(HELLO),
        backend=backend,
        logs=logs,
    )


def base_url(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _keys(url: str, logs: str, keys: Keys) -> str:
    short: dict[str, object] = {"model": ALLOWED, "max_tokens": 1, "messages": HELLO}
    again = f"{curl('curl -si', url, short, '$TEAM_A')} | grep -iE '^HTTP|^x-ratelimit|^retry-after|Rate limit'"
    return _KEYS.format(
        url=url,
        logs=logs,
        team_a=keys.team_a.key,
        team_b=keys.team_b.key,
        allowed=ALLOWED,
        requests=REQUESTS,
        tokens=TOKENS,
        none=curl("curl -i", url, short),
        forbidden=curl("curl -i", url, {**short, "model": "gpt2"}, "$TEAM_A"),
        limited=f"for n in $(seq {REQUESTS + 1}); do {again}; done",
    )


def curl(command: str, url: str, body: dict[str, object], key: str | None = None) -> str:
    """`key`: a variable of the shell."""
    authorization = f' -H "authorization: Bearer {key}"' if key else ""
    content = f"-H 'content-type: application/json' -d '{json.dumps(body)}'"
    return f"{command} {url}/v1/chat/completions{authorization} {content}"
