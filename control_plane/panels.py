"""The panels of the chart's dashboards, as panels.yaml has them; some of them are queries of the console, by name."""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from control_plane.pure.promql import quantiles

Unit = Literal[
    "requests/s", "tokens/s", "events/s", "bytes/s", "bytes", "seconds", "share", "cores", "count", "degrees", "watts",
    "yes or no",
]  # fmt: skip
# Who exports the series
Source = Literal["routers", "engines", "node exporter", "DCGM exporter"]
Template = str


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Panel(_Part):
    """`lines`: templates of PromQL by legend, which may have labels: `{{instance}} p99`. The file says the rest."""

    title: str
    text: str = ""
    query: str = ""
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    unit: Unit = "count"
    shown: tuple[str, ...] = ()
    quantiles: str = ""
    lines: Mapping[str, Template] = {}
    steps: Mapping[str, float | None] = {}
    markdown: str = ""

    @property
    def templates(self) -> Mapping[str, Template]:
        return {**(quantiles(self.quantiles) if self.quantiles else {}), **self.lines}


class Row(_Part):
    title: str
    source: Source
    panels: tuple[Panel, ...]


class Dashboard(_Part):
    title: str
    text: str
    choices: Mapping[str, str]
    rows: tuple[Row, ...]


class Query(_Part):
    """A panel as the console asks for it, and who exports its series."""

    panel: Panel
    source: Source

    @property
    def lines(self) -> Mapping[str, Template]:
        templates = self.panel.templates
        return {legend: templates[legend] for legend in self.panel.shown or templates}


@cache
def dashboards() -> Mapping[str, Dashboard]:
    text = resources.files("control_plane").joinpath("panels.yaml").read_text()
    return TypeAdapter(dict[str, Dashboard]).validate_python(yaml.safe_load(text))


@cache
def queries() -> Mapping[str, Query]:
    """Those of the console, by name, in the order of the file."""
    return {
        panel.query: Query(panel=panel, source=row.source)
        for dashboard in dashboards().values()
        for row in dashboard.rows
        for panel in row.panels
        if panel.query
    }
