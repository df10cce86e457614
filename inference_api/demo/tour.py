"""What the demo prints with its control plane: every command in it works as printed, from another terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from inference_api.demo.guide import HELLO, curl
from inference_api.demo.seed import ADMIN, IDLE, OWNER, PROMPT, SLEEPER, SLOW, VIEWER

_TOUR = """\
The demo runs. Open its console; this link logs you in as an admin, once, within 15 minutes:

{admin}

The same as the owner of one organisation, and as one who only looks:

{owner}
{viewer}

Another link, for {users} or mei:

sh {login} ana

Two routers answer, {first} and {second}, in front of demo engines:
programs that repeat what you say, without a GPU or a neural network. Routers, control plane, keys, limits and numbers
are real. Sample callers send about two requests a second: some are refused, some fail, some clients leave. The usage
of the day before is made up.

Ask, with a key that was made for this demo:

export KEY={key}
{ask}
{stream}
{prompt}

Ask with the OpenAI SDK (pip install openai):

import os
from openai import OpenAI
client = OpenAI(base_url="{first}/v1", api_key=os.environ["KEY"])
answer = client.chat.completions.create(model="chat", messages=[{{"role": "user", "content": "Hello"}}])
print(answer.choices[0].message.content)

Three incidents to look into:

1. A backend dies, and requests go on with the other one of llama-3-8b. Find it, drain it, start it again as the demo
   then says, and let it return: {console}/backends

kill {backend}

2. "My request failed": gpt2 has one backend, and that fails now and then; mistral-7b has another one that answers for
   it. This prints ids of requests, which say what happened: {console}/requests

{failing}

3. A key leaked: end `nightly`. Both routers refuse it within a second; what it did stays: {console}/keys

Nothing runs for {sleeper}: its first request starts the engine and waits for it, and after {idle} seconds without
another one it stops. See it, its log and its tests: {console}/models/{sleeper}?tab=engine

{wake}

Slow, not broken: one backend of llama-3-8b takes {slow:g} s more to its first token. What all of it costs, and whom:
{console}/usage. Ask from the browser: {console}/playground

The output of every process is in {logs} until the demo ends. Ctrl-C ends it.
"""


def tour(
    console: str,
    routers: Sequence[str],
    links: Mapping[str, str],
    key: str,
    backends: Mapping[str, int],
    login: Path,
) -> str:
    """The text. `backends`: processes of engines by their role; `login`: what makes another link."""
    first = routers[0]
    prompt: dict[str, object] = {"model": "mistral-7b", "prompt": {"id": PROMPT}, "messages": HELLO}
    failing = curl("curl -si", first, {"model": "gpt2", "max_tokens": 1, "messages": HELLO}, "$KEY")
    return _TOUR.format(
        console=f"{console}/console",
        admin=links[ADMIN],
        owner=links[OWNER],
        viewer=links[VIEWER],
        users=f"{ADMIN}, {OWNER}, {VIEWER}",
        login=login,
        first=first,
        second=routers[1],
        key=key,
        ask=curl("curl", first, {"model": "chat", "messages": HELLO}, "$KEY"),
        stream=curl("curl -N", routers[1], {"model": "llama-3-8b", "stream": True, "messages": HELLO}, "$KEY"),
        prompt=curl("curl", first, prompt, "$KEY"),
        backend=backends["quick"],
        failing=f"for n in $(seq 20); do {failing} | grep -iE '^HTTP|^x-request-id'; done",
        sleeper=SLEEPER,
        idle=IDLE,
        wake=curl("curl", first, {"model": SLEEPER, "messages": HELLO}, "$KEY"),
        slow=SLOW,
        logs=login.parent,
    )
