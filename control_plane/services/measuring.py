"""Reads what a folder of a model says of it: its config, and the headers of its files, some at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from control_plane.pure import gguf, gguf_config, model_config, safetensors
from control_plane.pure.architecture import Architecture
from control_plane.pure.inspected import Measured, counted, typed, weighed
from control_plane.pure.model_files import MOST_FILES, Model, chosen, told
from control_plane.pure.reading import LARGEST_HEADER, MOST_TENSORS, Folder, Reader, SourceError, Unreadable

T = TypeVar("T")
AT_ONCE = 8
_CONFIG = "config.json"
_UNKNOWN = "no config.json is beside it: its cache is not known, only the weights are"


class _Counted(NamedTuple):
    """Of one file. `tensors`: how many. `names`: where they are compared with an index."""

    numbers: Mapping[str, int]
    size: int
    tensors: int
    names: frozenset[str] = frozenset()


async def measure(folder: Folder, pick: str | None = None) -> Measured:
    """`pick`: a file of the model that is meant. Raises Unreadable, SourceError."""
    at, model = chosen(folder.files, pick)
    if model.missing:
        raise Unreadable(
            f"{len(model.files)} of its files are there, and these are missing: {', '.join(model.missing)}"
        )
    if model.format == "gguf":
        return await _of_gguf(folder, at, model)
    architecture, notes = await _configured(folder, at)
    numbers = folder.counts if not at and pick is None else {}
    weights = weighed(numbers) if numbers else None
    files = len(model.files) or sum(path.startswith(f"{model.name}-") for path in folder.files)
    if weights is None:
        listing = await _listed(folder, at, model)
        parts = await _each(folder, [at + name for name in listing], _safetensors(len(listing)))
        _check_listing(listing, parts)
        numbers, weights = _together(parts)
        files = len(parts)
    if architecture is not None:
        architecture = typed(architecture, numbers)
    return Measured("safetensors", files, numbers, weights, architecture, (*folder.notes, *notes), folder.commit)


async def _of_gguf(folder: Folder, at: str, model: Model) -> Measured:
    async def read(reader: Reader) -> gguf.Part:
        return await gguf.read(reader)

    parts = await _each(folder, [at + name for name in model.files], read)
    for number, part in enumerate(parts):
        count = part.metadata.get("split.count", 0)
        if (count > 1 or len(parts) > 1) and (count, part.metadata.get("split.no")) != (len(parts), number):
            raise Unreadable(f"{model.files[number]}: says that it is another part than its name does")
    tensors = [tensor for part in parts for tensor in part.tensors]
    if len(tensors) > MOST_TENSORS:
        raise Unreadable(f"{len(tensors):,} tensors in all files: at most {MOST_TENSORS:,}")
    numbers, weights = counted(tensors)
    architecture = gguf_config.of(parts[0].metadata, tensors)
    return Measured("gguf", len(parts), numbers, weights, architecture, folder.notes, folder.commit)


async def _configured(folder: Folder, at: str) -> tuple[Architecture | None, Sequence[str]]:
    if at + _CONFIG not in folder.files:
        return None, (_UNKNOWN,)
    return model_config.read(await _whole(folder, at + _CONFIG, model_config.LARGEST)), ()


async def _listed(folder: Folder, at: str, model: Model) -> Mapping[str, set[str]]:
    """Files, and the tensors that an index says they have; none where there is no index. Raises Unreadable."""
    if model.listing is None:
        return {name: set() for name in model.files}
    listing = safetensors.read_index(await _whole(folder, at + model.listing, safetensors.LARGEST_INDEX))
    missing = sorted(name for name in listing if at + name not in folder.files)
    if missing:
        found = f"{len(listing) - len(missing)} of {len(listing)} files are there"
        raise Unreadable(f"{found}, and these are missing: {', '.join(told(missing))}")
    if len(listing) > MOST_FILES:
        raise Unreadable(f"{len(listing):,} files: at most {MOST_FILES:,} are read")
    return listing


def _safetensors(files: int) -> Callable[[Reader], Awaitable[_Counted]]:
    """Reads one of so many files. The headers of those that are read at once are bounded together."""
    most = LARGEST_HEADER if files == 1 else LARGEST_HEADER // AT_ONCE

    async def read(reader: Reader) -> _Counted:
        tensors = await safetensors.read(reader, most)
        numbers, size = counted(tensors)
        return _Counted(
            numbers, size, len(tensors), frozenset(one.name for one in tensors) if files > 1 else frozenset()
        )

    return read


def _check_listing(listing: Mapping[str, set[str]], parts: Sequence[_Counted]) -> None:
    for (name, tensors), part in zip(listing.items(), parts, strict=True):
        if len(parts) > 1 and (lost := sorted(tensors - part.names)):
            raise Unreadable(f"{name}: the tensor {lost[0][:80]!r} is not in it, though the index says so")


def _together(parts: Sequence[_Counted]) -> tuple[dict[str, int], int]:
    """Raises Unreadable."""
    if sum(part.tensors for part in parts) > MOST_TENSORS:
        raise Unreadable(f"more than {MOST_TENSORS:,} tensors in all files")
    numbers: dict[str, int] = {}
    for part in parts:
        for dtype, count in part.numbers.items():
            numbers[dtype] = numbers.get(dtype, 0) + count
    return dict(sorted(numbers.items(), key=lambda pair: -pair[1])), sum(part.size for part in parts)


async def _whole(folder: Folder, path: str, most: int) -> bytes:
    if folder.files[path] > most:
        raise Unreadable(f"{path}: {folder.files[path]:,} bytes, at most {most:,}")
    async with folder.open(path) as reader:
        return await reader.read(0, min(reader.size, most))


async def _each(folder: Folder, paths: Sequence[str], read: Callable[[Reader], Awaitable[T]]) -> list[T]:
    """What `read` makes of each file, in their order. Raises what the first of them that fails does."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(path: str) -> T:
        async with turns, folder.open(path) as reader:
            try:
                return await read(reader)
            except Unreadable as exc:
                raise Unreadable(f"{path[-120:]}: {exc}") from None

    try:
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[Any]] = [group.create_task(one(path)) for path in paths]
    except* (Unreadable, SourceError) as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
