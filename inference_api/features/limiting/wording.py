"""What clients see of limits: the message of a refusal, and the values of headers."""

from inference_api.policy.rules import Rule

_UNITS = {"input_tokens": "input tokens", "output_tokens": "output tokens"}
# The unit of a rule -> `type` of the error
KINDS = {"requests": "requests", "streams": "requests"}


def go_duration(ms: int) -> bytes:
    """A duration as Go writes it, which clients parse: `0s`, `12ms`, `1.5s`, `1m45s`, `1h0m0s`."""
    if ms < 1000:
        return b"%dms" % ms if ms else b"0s"
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    text = b"%ds" % seconds if not ms else (b"%d.%03d" % (seconds, ms)).rstrip(b"0") + b"s"
    if not minutes:
        return text
    hours, minutes = divmod(minutes, 60)
    return b"%dm%b" % (minutes, text) if not hours else b"%dh%dm%b" % (hours, minutes, text)


def seconds(ms: int) -> str:
    """`12` or `1.2`"""
    return f"{ms / 1000:.3f}".rstrip("0").rstrip(".")


def message(rule: Rule, amount: int, wanted: int, wait: int) -> str:
    """The message of a refusal. `amount`: of the limit, as it is enforced; `wanted`: by the request."""
    if rule.unit == "streams":
        limit = f"{amount} streams at once"
    else:
        limit = f"{amount} {_UNITS.get(rule.unit, rule.unit)} per {rule.per} s"
    if rule.models is not None:
        limit += " for these models"
    if rule.unit not in KINDS:
        limit += f", {wanted} requested"
    return f"Rate limit reached for {rule.shown}: {limit}. Try again in {seconds(wait)} s."
