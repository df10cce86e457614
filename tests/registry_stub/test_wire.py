import socket
import threading
from collections.abc import Callable

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry_stub.app import create_app
from registry_stub.store import Store

Mount = Callable[[ASGIApp], httpx.Client]
JSON = {"Content-Type": "application/json"}


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)


def test_a_client_that_leaves_in_its_body_is_not_a_crash(mount: Mount, store: Store) -> None:
    ended, statuses = threading.Event(), []
    app = create_app(store)

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            statuses.append(message.get("status"))
            await send(message)

        try:
            await app(scope, receive, noted)
            statuses.append("no exception")
        finally:
            ended.set()

    with connect(mount(watched)) as connection:
        connection.sendall(
            b"PUT /models/a HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    assert ended.wait(20)
    assert statuses == [400, None, "no exception"]
