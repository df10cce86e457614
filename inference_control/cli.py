"""The command line: RESOURCE VERB [NAME], and `inspect REF`."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from inference_api import __version__
from inference_control.client import Client, NotReachable, Refused, is_safe
from inference_control.inspection import as_report, source_of
from inference_control.output import as_json, as_lines, as_table
from inference_control.resources import RESOURCES, Resource

URL, TOKEN = "INFERENCE_CONTROL_URL", "INFERENCE_CONTROL_TOKEN"
_INSPECT = "inspect"
_MEASURES = ("requests", "errors", "input_tokens", "output_tokens", "latency_p95_ms", "ttft_p95_ms")
_DEFAULT_URL = "http://127.0.0.1:8081"
_ABOUT = f"""\
The command line of the control plane, over its API /api/v1.

{URL} is its URL (default: {_DEFAULT_URL}), {TOKEN} a management token (mt-ia-...).
"""
_EXAMPLES = """\
examples:
  inference-control models list
  inference-control models create gpt2 --set 'backends=["http://10.0.0.1:8000"]'
  inference-control models get gpt2 --json > gpt2.json;  inference-control models set gpt2 --file gpt2.json
  inference-control keys create --set name=batch --set organisation=team-a --set 'models=["llama-*"]'
  inference-control keys rotate k3v9Qm2XbT7a --set overlap=3600
  inference-control overrides create --set backend=10.0.0.21:8000 --set action=drain --set reason=driver
  inference-control members set team-a/ana --set role=admin
  inference-control requests list --filter model=gpt2 --filter outcome=upstream_timeout --limit 20
  inference-control usage get --filter group_by=model --filter bucket=1d
  inference-control inspect meta-llama/Llama-3.1-8B;  inference-control inspect /models/llama-3-8b

exit codes: 0; 1 refused, with the reason on stderr; 2 usage; 3 the control plane cannot be reached
"""


class Usage(Exception):
    """The command cannot be carried out as it is written."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        with _client() as client:
            if arguments.resource == _INSPECT:
                _inspect(client, arguments)
            else:
                _run(client, RESOURCES[arguments.resource], arguments)
    except Usage as exc:
        return _failed(exc, 2)
    except Refused as exc:
        return _failed(exc, 1)
    except NotReachable as exc:
        return _failed(exc, 3)
    except BrokenPipeError:
        # `| head` has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _failed(error: Exception, code: int) -> int:
    print(f"inference-control: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("inference-control", description=_ABOUT, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"inference-control {__version__}")
    resources = parser.add_subparsers(dest="resource", required=True, metavar="RESOURCE", title="resources")
    for resource in RESOURCES.values():
        part = resources.add_parser(resource.name, help=", ".join(resource.verbs))
        verbs = part.add_subparsers(dest="verb", required=True, metavar="VERB")
        for verb in resource.verbs:
            _add(verbs.add_parser(verb), resource, verb)
    _add_inspect(resources.add_parser(_INSPECT, help="look into a model: parameters, memory, GPUs that hold it"))
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="REF", help="org/name or org/name/FILE.gguf of a hub, or an absolute path")
    parser.add_argument("--source", choices=("hub", "folder", "file"), help="default: by REF")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _add(parser: argparse.ArgumentParser, resource: Resource, verb: str) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    if resource.name not in ("usage", "me"):
        needed = verb in ("get", "set", "delete", "rotate") or resource.create == "put" or resource.inside is not None
        optional = verb == "list" and resource.inside is None
        if not optional:
            outer = verb == "list" or (verb == "create" and resource.create == "post")
            name = resource.inside[:-1].upper() if resource.inside and outer else _named(resource)
            parser.add_argument("name", metavar=name, nargs=None if needed else "?")
    if verb == "list" or resource.name == "usage":
        parser.add_argument("--filter", action="append", default=[], metavar="NAME=VALUE", help="a query of the list")
    if verb == "list":
        parser.add_argument("--limit", type=_count, metavar="N", help="objects at most (default: all)")
    if verb in ("create", "set", "rotate"):
        text = "a member of the body: JSON, or else text; null removes it"
        parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
        parser.add_argument("--file", metavar="FILE", help="body as YAML or JSON; - is stdin")


def _named(resource: Resource) -> str:
    return resource.key.upper() if resource.inside is None else f"{resource.inside[:-1].upper()}/{resource.key.upper()}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _client() -> Client:
    url, token = os.environ.get(URL, _DEFAULT_URL), os.environ.get(TOKEN, "").strip()
    if not token:
        raise Usage(f"{TOKEN} is not set; set it to a management token (mt-ia-...)")
    if not url.startswith(("http://", "https://")):
        raise Usage(f"{URL}={url!r}: must be an http:// or https:// URL")
    if not (token.isascii() and token.isprintable()):
        raise Usage(f"{TOKEN} is no token: it has other characters than ASCII")
    if not is_safe(url):
        print(f"inference-control: warning: the token is sent to {url} unencrypted; use https://", file=sys.stderr)
    return Client(url, token)


def _run(client: Client, resource: Resource, arguments: argparse.Namespace) -> None:
    name: str | None = getattr(arguments, "name", None)
    match arguments.verb:
        case "list":
            query = _pairs("--filter", arguments.filter)
            _print_list(resource, list(client.listed(resource, name, query, arguments.limit)), arguments.json)
        case "get" if resource.name == "usage":
            _print_usage(client.get(resource, None, _span(_pairs("--filter", arguments.filter))), arguments.json)
        case "get":
            _print(client.get(resource, name), arguments.json)
        case "create":
            body = _body(arguments)
            if resource.create == "put" and resource.inside is None:
                body.setdefault(resource.key, name)
            _print(client.create(resource, name, body), arguments.json)
        case "set":
            _print(client.change(resource, name, _body(arguments), whole=arguments.file is not None), arguments.json)
        case "rotate":
            assert name is not None
            _print(client.rotate(resource, name, _body(arguments, empty=True)), arguments.json)
        case "delete":
            assert name is not None
            client.delete(resource, name)


def _inspect(client: Client, arguments: argparse.Namespace) -> None:
    body = {"source": arguments.source or source_of(arguments.ref), "ref": arguments.ref}
    if arguments.revision is not None:
        body["revision"] = arguments.revision
    found = client.create(RESOURCES["inspections"], None, body)
    print(as_json(found) if arguments.json else as_report(found))


def _span(query: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The last 24 hours, unless the query says otherwise."""
    now = datetime.now(UTC).replace(microsecond=0)
    span = {"start": now - timedelta(days=1), "end": now}
    given = {name for name, _ in query}
    return [*query, *((name, _time(one)) for name, one in span.items() if name not in given)]


def _body(arguments: argparse.Namespace, empty: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {} if arguments.file is None else _read(arguments.file)
    for name, text in _pairs("--set", arguments.set):
        found[name] = _value(text)
    if not found and not empty:
        raise Usage("there is nothing to send; give --set NAME=VALUE or --file FILE")
    return found


def _read(file: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise Usage(f"{file!r} cannot be read: {getattr(exc, 'strerror', None) or exc}") from None
    except yaml.YAMLError as exc:
        raise Usage(f"{file!r} is neither YAML nor JSON: {' '.join(str(exc).split())}") from None
    if not isinstance(found, dict):
        raise Usage(f"{file!r} must have one object")
    # YAML reads times, JSON has none.
    body: dict[str, Any] = json.loads(json.dumps(found, default=_time))
    return body


def _time(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z") if value.tzinfo else f"{value.isoformat()}Z"
    return str(value)


def _pairs(option: str, given: list[str]) -> list[tuple[str, str]]:
    found = []
    for one in given:
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise Usage(f"{option} {one!r}: must be NAME=VALUE")
        found.append((name, value))
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _print_list(resource: Resource, objects: list[Mapping[str, Any]], as_text: bool) -> None:
    print(as_json(objects) if as_text else as_table(objects, resource.columns))


def _print_usage(found: Mapping[str, Any], as_text: bool) -> None:
    if as_text:
        print(as_json(found))
        return
    grouped = [{**row["group"], **row} for row in found["rows"] if row.get("group")] if found["group_by"] else []
    total = {**dict.fromkeys(found["group_by"], "total"), **found["totals"]}
    columns = [*found["group_by"], *_MEASURES, "cost"]
    print(as_table([_measured(row, found["currency"]) for row in [*grouped, total]], columns))


def _measured(row: Mapping[str, Any], currency: str) -> dict[str, Any]:
    """A row with its 95th percentiles and its cost as people write it."""
    late, first, cost = row.get("latency_ms") or {}, row.get("ttft_ms") or {}, row.get("cost_nanos")
    shown = None if cost is None else f"{cost / 10**9:.4f} {currency}"
    return {**row, "latency_p95_ms": late.get("p95"), "ttft_p95_ms": first.get("p95"), "cost": shown}


def _print(found: Mapping[str, Any], as_text: bool) -> None:
    print(as_json(found) if as_text else as_lines(found))
