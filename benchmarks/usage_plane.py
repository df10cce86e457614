"""A control plane that stores usage records in a journal: it may be killed at any moment, and never stores one twice.

    python -m benchmarks.usage_plane PORT JOURNAL MODELS    # MODELS: a catalogue, as JSON

A line of the journal is `id request_id status input_tokens output_tokens`; -1 is null. A batch is one write, before its
answer: what is stored and not acknowledged is sent again, and is a duplicate then.
"""

import asyncio
import gzip
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson
import uvloop


class Line(NamedTuple):
    """A stored record."""

    id: str
    request_id: str
    status: int
    input_tokens: int
    output_tokens: int


def read(journal: Path) -> Iterator[Line]:
    """The records; not what a kill tore."""
    if not journal.exists():
        return
    with journal.open("rb") as file:
        for text in file:
            words = text.decode().split()
            if text.endswith(b"\n") and len(words) == 5:
                yield Line(words[0], words[1], *map(int, words[2:]))


class Plane:
    """Answers GET /models and POST /usage on keep-alive connections."""

    def __init__(self, journal: Path, models: bytes) -> None:
        self._ids = {line.id for line in read(journal)}
        size = journal.stat().st_size if journal.exists() else 0
        self._fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if size and journal.read_bytes()[-1:] != b"\n":
            os.write(self._fd, b"\n")
        self._models = models

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[16:]) for line in head.lower().split(b"\r\n") if line[:16] == b"content-length: "), 0
                )
                body = await reader.readexactly(length)
                answer = self._store(gzip.decompress(body)) if head.startswith(b"POST /usage ") else self._models
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                    % (len(answer), answer)
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _store(self, text: bytes) -> bytes:
        records = orjson.loads(text)["records"]
        new = {record["id"]: record for record in records if record["id"] not in self._ids}
        os.write(self._fd, b"".join(_line(record) for record in new.values()))
        self._ids |= new.keys()
        return orjson.dumps({"accepted": len(new), "duplicates": len(records) - len(new), "refused": []})


def _line(record: dict[str, object]) -> bytes:
    values = (record[name] for name in ("id", "request_id", "status", "input_tokens", "output_tokens"))
    return (" ".join(str(-1 if value is None else value) for value in values) + "\n").encode()


async def main(port: int, journal: Path, models: bytes) -> None:
    server = await asyncio.start_server(Plane(journal, models).serve, "127.0.0.1", port, limit=1 << 22)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].encode()))
