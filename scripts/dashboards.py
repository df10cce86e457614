"""Prints a dashboard of the chart by name, made from control_plane/panels.yaml; `--write` replaces all files."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from control_plane.panels import Dashboard, Panel, dashboards
from control_plane.pure.promql import Places, placed

FILES = Path(__file__).parents[1] / "k8s/charts/inference-api/files/dashboards"
Json = dict[str, Any]

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SITE = 'cluster=~"$cluster", namespace=~"$namespace"'
_MODEL = f'{_SITE}, model_name=~"$model_name"'
_PLACES = Places(
    site=_SITE,
    model=_MODEL,
    names="$model_name",
    engine=_MODEL,
    host='cluster=~"$cluster", instance=~"$instance"',
    window="$__rate_interval",
)
_LABELS = {"cluster": "Cluster", "namespace": "Namespace", "model_name": "Model", "instance": "Host"}
_UNITS = {
    "requests/s": "reqps",
    "tokens/s": "suffix: tok/s",
    "events/s": "ops",
    "bytes/s": "Bps",
    "bytes": "bytes",
    "seconds": "s",
    "share": "percentunit",
    "cores": "percentunit",
    "count": "short",
    "degrees": "celsius",
    "watts": "watt",
    "yes or no": "bool",
}
# Of a panel, in the 24 columns of a dashboard
_SIZES = {"row": (24, 1), "text": (24, 6), "table": (24, 8), "stat": (4, 4), "timeseries": (8, 8)}


def made(name: str) -> str:
    """The file of a dashboard."""
    return json.dumps(_dashboard(name, dashboards()[name]), indent=2) + "\n"


def _dashboard(name: str, dashboard: Dashboard) -> Json:
    return {
        "uid": f"inference-api-{name}",
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["inference-api"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "Inference dashboards",
                "tags": ["inference-api"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": list(_variables(dashboard.choices))},
        "panels": list(_laid_out(dashboard)),
    }


def _variables(choices: Mapping[str, str]) -> Iterator[Json]:
    """Each offers the values that series have which the ones before it select."""
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}
    matchers: list[str] = []
    for name, selector in choices.items():
        yield {
            "name": name,
            "label": _LABELS[name],
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": f"label_values({_narrowed(selector, matchers)}, {name})", "refId": "A"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }
        matchers.append(f'{name}=~"${name}"')


def _narrowed(selector: str, matchers: list[str]) -> str:
    if not matchers:
        return selector
    name, _, own = selector.removesuffix("}").partition("{")
    return f"{name}{{{', '.join([own, *matchers] if own else matchers)}}}"


def _laid_out(dashboard: Dashboard) -> Iterator[Json]:
    """From left to right, a row of the file below the one before."""
    number, bottom = 0, 0
    for row in dashboard.rows:
        title = {"type": "row", "title": row.title, "collapsed": False, "panels": []}
        across, top = 0, bottom
        for panel in (title, *map(_panel, row.panels)):
            width, height = _SIZES[panel["type"]]
            if across + width > 24:
                across, top = 0, bottom
            number += 1
            yield {"id": number, **panel, "gridPos": {"x": across, "y": top, "w": width, "h": height}}
            across, bottom = across + width, max(bottom, top + height)


def _panel(panel: Panel) -> Json:
    if panel.markdown:
        options = {"mode": "markdown", "content": panel.markdown.strip()}
        return {"type": "text", "title": panel.title, "options": options}
    kind = panel.kind
    return {
        "type": kind,
        "title": panel.title,
        **({"description": panel.text} if panel.text else {}),
        "datasource": _SOURCE,
        **_LOOKS[kind](panel),
        "targets": [
            {
                "refId": letter,
                "datasource": _SOURCE,
                "expr": placed(template, _PLACES),
                "legendFormat": "" if kind == "table" else legend,
                **({"range": True} if kind == "timeseries" else {"instant": True}),
                **({"format": "table"} if kind == "table" else {}),
            }
            for letter, (legend, template) in zip(ascii_uppercase, panel.templates.items(), strict=False)
        ],
    }


def _timeseries(panel: Panel) -> Json:
    defaults = {
        "unit": _UNITS[panel.unit],
        "min": 0,
        "custom": {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"},
        **({"max": 1} if panel.unit in ("share", "yes or no") else {}),
    }
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return {"fieldConfig": {"defaults": defaults, "overrides": []}, "options": options}


def _stat(panel: Panel) -> Json:
    defaults: Json = {"unit": _UNITS[panel.unit]}
    if panel.steps:
        steps = [{"color": colour, "value": value} for colour, value in panel.steps.items()]
        defaults |= {"color": {"mode": "thresholds"}, "thresholds": {"mode": "absolute", "steps": steps}}
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return {"fieldConfig": {"defaults": defaults, "overrides": []}, "options": options}


def _table(panel: Panel) -> Json:
    """A row for each backend; the legends are the columns."""
    columns = {"cluster": "Cluster", "namespace": "Namespace", "model_name": "Model", "backend": "Backend"}
    columns |= {f"Value #{letter}": legend for letter, legend in zip(ascii_uppercase, panel.lines, strict=False)}
    share = {"id": "unit", "value": _UNITS["share"]}
    return {
        "fieldConfig": {
            "defaults": {"unit": _UNITS[panel.unit]},
            "overrides": [{"matcher": {"id": "byName", "options": "KV cache"}, "properties": [share]}],
        },
        "options": {},
        "transformations": [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": columns}},
        ],
    }


_LOOKS = {"timeseries": _timeseries, "stat": _stat, "table": _table}


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for each in dashboards():
            (FILES / f"{each}.json").write_text(made(each))
    else:
        print(made(sys.argv[1]), end="")
