"""`inference-api keys`: makes an API key, and says whether one is valid."""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from inference_api.commands.configuration import settings_of
from inference_api.policy.document import Key, shown_time
from inference_api.policy.keys import digests, id_of, is_well_formed, new_key
from inference_api.policy.options import REGISTRY, Options
from inference_api.policy.reading import PolicyError
from inference_api.policy.snapshot import Policy
from inference_api.policy.source import read_file
from inference_api.settings import SettingsError

# Bytes of stdin that are read: more is no key.
_MOST = 1024
# What every reader of YAML takes for text
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def new(arguments: argparse.Namespace) -> int:
    """Print a new key once, and its entry for a policy."""
    peppers = settings_of(arguments).of(Options).peppers
    made = new_key(peppers[0] if peppers else None)
    given = {
        "organisation": arguments.organisation,
        "user": arguments.user,
        "models": arguments.models,
        "expires": arguments.expires,
    }
    entry = {"id": made.id, "name": arguments.name, "digest": made.digest}
    entry |= {name: value for name, value in given.items() if value is not None}
    try:
        Key.model_validate(entry)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        reason = error["msg"].removeprefix("Value error, ").replace("String should", "must")
        raise SettingsError(f"--{error['loc'][0]}: {reason}") from None
    if arguments.json:
        print(json.dumps({"key": made.key, "entry": entry}))
    else:
        print(f"{made.key}\n\n- {flow(entry)}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """0: valid, 1: not. Raises SettingsError if the policy cannot be read."""
    if arguments.source not in (None, "-"):
        # Not shown: it may be a key.
        raise SettingsError("keys verify reads the key from stdin: others see the arguments of a command")
    options = settings_of(arguments).of(Options)
    policy = _policy(arguments.policy or (None if options.policy == REGISTRY else options.policy), options)
    key = sys.stdin.buffer.read(_MOST).strip()
    if not is_well_formed(key):
        return _invalid("checksum")
    if policy is None:
        print(f"well-formed {id_of(key)}")
        return 0
    peppers = [pepper.encode() for pepper in options.peppers]
    found = next((found for one in digests(key, policy.kinds, peppers) if (found := policy.find(one))), None)
    if found is None:
        return _invalid("unknown")
    caller, is_replaced = found
    if (end := caller.end(time.time(), is_replaced)) is not None:
        return _invalid("disabled" if end.kind == "disabled" else f"expired {shown_time(end.at)}")
    print(" ".join(["valid", caller.id, caller.name, *([caller.organisation] if caller.organisation else [])]))
    return 0


def _invalid(why: str) -> int:
    print(f"invalid: {why}")
    return 1


def _policy(path: str | None, options: Options) -> Policy | None:
    if path is None:
        return None
    try:
        return read_file(Path(path), peppered=bool(options.peppers))
    except PolicyError as exc:
        raise SettingsError(str(exc)) from None


def flow(value: Any) -> str:
    """YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {flow(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    is_text = _PLAIN.fullmatch(value) and yaml.safe_load(value) == value
    return value if is_text or _TIME.fullmatch(value) else json.dumps(value)
