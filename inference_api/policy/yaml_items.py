"""Walks through the text of a YAML policy item by item, as `json_items` does: its nodes are never all in memory."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import yaml
from yaml.composer import Composer

from inference_api.routing.catalogue import YamlLoader


def items_of_yaml(pieces: Iterable[str], lists: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """(name, index, item) for each item of the lists of these names, and (name, -1, value) for every other member.

    A list ends with (name, -1, []). `pieces`: the text, in order. Raises ValueError.
    """
    try:
        yield from _Walk(_Stream(pieces)).items(lists)
    except (yaml.YAMLError, RecursionError) as exc:
        raise ValueError(" ".join(str(exc).split())) from None


class _Stream:
    """A file for the scanner."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)

    def read(self, size: int) -> str:
        return next(self._pieces, "")


_Loader: Any = YamlLoader


class _Walk(Composer, _Loader):  # type: ignore[misc]
    """The C scanner, the composer in Python, which composes one node at a time, and the loader's own constructor."""

    def __init__(self, stream: _Stream) -> None:
        _Loader.__init__(self, stream)
        self.anchors = {}

    def items(self, lists: Collection[str]) -> Iterator[tuple[str, int, Any]]:
        seen: set[str] = set()
        self._enter(yaml.StreamStartEvent)
        self._enter(yaml.DocumentStartEvent)
        self._enter(yaml.MappingStartEvent)
        while not self.check_event(yaml.MappingEndEvent):
            name = str(self._value())
            if name in seen:
                raise ValueError(f"the key {name[:64]!r} is given twice")
            seen.add(name)
            if name in lists and self.check_event(yaml.SequenceStartEvent):
                yield from self._elements(name)
            else:
                yield name, -1, self._value()
        self.get_event()
        self._enter(yaml.DocumentEndEvent)
        if not self.check_event(yaml.StreamEndEvent):
            raise ValueError("it has more than one document")

    def _elements(self, name: str) -> Iterator[tuple[str, int, Any]]:
        self.get_event()
        index = 0
        while not self.check_event(yaml.SequenceEndEvent):
            yield name, index, self._value()
            index += 1
        self.get_event()
        yield name, -1, []

    def _value(self) -> Any:
        return self.construct_document(self.compose_node(None, 0))

    def _enter(self, kind: type[yaml.Event]) -> None:
        if not self.check_event(kind):
            raise ValueError("a policy is a mapping")
        self.get_event()
