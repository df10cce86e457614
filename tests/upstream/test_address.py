"""A connection to an address that was looked up before, under the name it was looked up for."""

import asyncio
import ssl
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_api.upstream.transport import Transport
from tests.fakes import FakeEngine, body_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


async def get(transport: Transport, url: str, origin: str) -> int:
    async with asyncio.timeout(10):
        response = await transport.handle_async_request(httpx.Request("GET", url, extensions={"origin": origin}))
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await body_of(response.stream)
        return response.status_code


async def test_the_connection_goes_to_the_address_and_the_request_names_the_host(
    start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine()
    # Nobody could look this name up.
    url = f"http://backend.invalid:{engine.port}"
    request = httpx.Request("POST", f"{url}/v1/x", content=b"{}", extensions={"origin": f"{url}#127.0.0.1"})
    response = await transport.handle_async_request(request)

    assert response.status_code == 200
    assert engine.requests[0].header("host") == f"backend.invalid:{engine.port}"
    assert f"<Pool 127.0.0.1:{engine.port}:" in repr(transport)
    assert isinstance(response.stream, httpx.AsyncByteStream)
    await response.stream.aclose()


async def test_a_fragment_of_a_url_is_no_address(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine()
    request = httpx.Request("GET", f"{engine.url}/v1/models#127.0.0.9")
    response = await transport.handle_async_request(request)

    assert response.status_code == 200
    assert f"127.0.0.1:{engine.port}" in repr(transport)
    assert isinstance(response.stream, httpx.AsyncByteStream)
    await response.stream.aclose()


async def test_two_addresses_of_a_name_have_connections_of_their_own(start_engine: Start, transport: Transport) -> None:
    first = await start_engine()
    async with FakeEngine(host="127.0.0.2", port=first.port) as second:
        url = f"http://backend.invalid:{first.port}"
        for address in ("127.0.0.1", "127.0.0.2", "127.0.0.1"):
            assert await get(transport, url, f"{url}#{address}") == 200

        assert (first.connections, second.connections) == (1, 1)
        transport.retain({f"{url}#127.0.0.1"})
        assert "127.0.0.2" not in repr(transport)


# TLS


@asynccontextmanager
async def secure_engine(certificate: Path, names: list[str | None]) -> Any:
    """An engine behind TLS; `names` are the server names that clients asked for."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    tls.sni_callback = lambda _, name, __: names.append(name)
    engine = FakeEngine()
    engine._server = await asyncio.start_server(engine._accept, "127.0.0.1", engine.port, ssl=tls)
    try:
        yield engine
    finally:
        await engine.stop()


async def test_tls_asks_for_the_name_and_two_names_behind_an_address_share_no_connection(certificate: Path) -> None:
    transport = Transport(tls=lambda: ssl.create_default_context(cafile=certificate))
    names: list[str | None] = []
    async with secure_engine(certificate, names) as engine:
        one, two = (f"https://{name}.test:{engine.port}" for name in ("one", "two"))
        assert await get(transport, one, f"{one}#127.0.0.1") == 200
        # Its certificate is for the other name: an open connection to the same address is no way around that.
        with pytest.raises(httpx.ConnectError):
            await get(transport, two, f"{two}#127.0.0.1")

        assert names == ["one.test", "two.test"]
        await transport.aclose()
