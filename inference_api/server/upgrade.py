"""Offers to upgrade. Servers may ignore them (RFC 9110 7.8): parsing then continues, though httptools stops there."""

from typing import Any, Protocol

import httptools

from inference_api.models import RawHeaders


class Callbacks(Protocol):
    """The callbacks of httptools that a connection has."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_chunk_header(self) -> None: ...
    def on_message_complete(self) -> None: ...


class Upgraded(Protocol):
    """What talks to a client whose connection has left HTTP. Called from the event loop; must not raise."""

    def received(self, data: bytes) -> None: ...
    def client_writable(self, is_writable: bool) -> None:
        """False: the write buffer is full."""
        ...

    def lost(self) -> None:
        """The client has gone, also with half of the connection."""
        ...

    def stop(self) -> None:
        """The server stops."""
        ...


class DeclinedUpgrade:
    """Replays the framing of a head to a new parser, which then parses the body and later requests for `connection`."""

    __slots__ = ("_connection", "_replaying", "on_body", "on_chunk_header", "parser", "whole")

    def __init__(self, connection: Callbacks, headers: RawHeaders, keep_alive: bool) -> None:
        self._connection = connection
        # The replay has no body.
        self.on_body, self.on_chunk_header = connection.on_body, connection.on_chunk_header
        framing = [pair for pair in headers if pair[0] in (b"content-length", b"transfer-encoding")]
        lines = [b"%b: %b\r\n" % pair for pair in framing]
        if not keep_alive:
            lines.append(b"connection: close\r\n")
        # The request has no body.
        self.whole = not framing
        self._replaying = True
        self.parser: Any = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(lines) + b"\r\n")
        self._replaying = False

    def on_message_begin(self) -> None:
        if not self._replaying:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._replaying:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._replaying:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._replaying:
            self._connection.on_headers_complete()

    def on_message_complete(self) -> None:
        if self._replaying:
            self.whole = True
        else:
            self._connection.on_message_complete()
