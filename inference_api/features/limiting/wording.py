"""What clients see of limits: the message of a refusal, and the values of headers."""

from inference_api.policy.rules import Rule

_UNITS = {"input_tokens": "input tokens", "output_tokens": "output tokens"}
# The unit of a rule -> `type` of the error
KINDS = {"requests": "requests", "streams": "requests"}
# The texts of durations: of whole seconds, and of the milliseconds beside them. Each answer has one, and to look it up
# takes a third of the time that writing it takes.
SECONDS: list[bytes] = []
FRACTIONS: list[bytes] = []
# Two windows of an hour
_LONGEST = 7200


def go_duration(ms: int) -> bytes:
    """A duration as Go writes it, which clients parse: `0s`, `12ms`, `1.5s`, `1m45s`, `1h0m0s`."""
    if ms < 1000:
        return b"%dms" % ms if ms else b"0s"
    return b"%b%bs" % (_whole(ms // 1000), _fraction(ms % 1000))


def prepare() -> None:
    """Fill SECONDS and FRACTIONS."""
    if not SECONDS:
        SECONDS.extend(map(_whole, range(_LONGEST + 1)))
        FRACTIONS.extend(map(_fraction, range(1000)))


def _whole(seconds: int) -> bytes:
    """Without the unit of the seconds."""
    minutes, seconds = divmod(seconds, 60)
    if not minutes:
        return b"%d" % seconds
    hours, minutes = divmod(minutes, 60)
    return b"%dm%d" % (minutes, seconds) if not hours else b"%dh%dm%d" % (hours, minutes, seconds)


def _fraction(ms: int) -> bytes:
    return (b".%03d" % ms).rstrip(b"0") if ms else b""


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
