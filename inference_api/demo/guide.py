"""What the demo prints once it runs: every command in it works as printed, from another terminal."""

_GUIDE = """\
The demo runs at {url}.

llama-3-8b (two replicas), mistral-7b and gpt2 are toys: programs that repeat what you say at {pace:g} tokens a second,
without a GPU, a neural network or any intelligence. What stands in front of them is real: this project's router,
which reads its catalogue from this project's model registry.

Ask:

curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{{"model": "llama-3-8b", {hello}}}'

Ask, and watch the answer come:

curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{{"model": "mistral-7b", "stream": true, {hello}}}'

Ask with the OpenAI SDK (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="unused")
answer = client.chat.completions.create(model="gpt2", {hello_python})
print(answer.choices[0].message.content)

Take a replica of llama-3-8b away and ask again, the other one answers:

kill {replica}

The output of every process is in {logs} until the demo ends. Ctrl-C ends it.
"""


def guide(url: str, tokens_per_second: float, replica: int, logs: str) -> str:
    return _GUIDE.format(
        url=url,
        pace=tokens_per_second,
        hello='"messages": [{"role": "user", "content": "Hello"}]',
        hello_python='messages=[{"role": "user", "content": "Hello"}]',
        replica=replica,
        logs=logs,
    )


def base_url(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
