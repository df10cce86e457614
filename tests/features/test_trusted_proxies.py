"""Which address a client behind proxies has."""

from collections.abc import Callable
from ipaddress import ip_network
from typing import Any

import pytest

from inference_api.feature import Feature
from inference_api.features.trusted_proxies import Options, TrustedProxies
from inference_api.observe.account import Record
from inference_api.settings import SettingsError, load_settings

Start = Callable[..., Any]
PROXIES = TrustedProxies([ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")])


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (b"203.0.113.7", "203.0.113.7"),
        # A client can send the header itself: only what a trusted proxy has added counts.
        (b"1.1.1.1, 203.0.113.7", "203.0.113.7"),
        (b"203.0.113.7, 10.2.0.1", "203.0.113.7"),
        (b"203.0.113.7,10.2.0.1 , 10.3.0.1", "203.0.113.7"),
        (b"10.4.0.1, 10.2.0.1", "10.4.0.1"),
        (b"203.0.113.7, unknown", "10.0.0.1"),
        (b"203.0.113.7, nonsense, 10.2.0.1", "10.2.0.1"),
        (b"203.0.113.7, , 10.2.0.1", "10.2.0.1"),
        (b"", "10.0.0.1"),
        (b"::ffff:203.0.113.7", "203.0.113.7"),
        (b"203.0.113.7, ::ffff:10.2.0.1", "203.0.113.7"),
        (b"2606:4700::1, 2001:db8::5", "2606:4700::1"),
        (b"[2606:4700::1]:443", "2606:4700::1"),
        (b"203.0.113.7:55123", "203.0.113.7"),
    ],
)
def test_the_client_is_the_nearest_address_that_is_no_trusted_proxy(forwarded: bytes, client: str) -> None:
    assert PROXIES.client("10.0.0.1", forwarded) == client


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("trusted", "client"), [("127.0.0.0/8", "203.0.113.7"), ("127.0.0.1", "203.0.113.7"), ("10.0.0.0/8", "127.0.0.1")]
)
async def test_only_a_trusted_peer_names_the_client(
    trusted: str, client: str, start_engine: Start, start_router: Start
) -> None:
    records: list[Record] = []
    settings: Any = {"trusted_proxies": trusted}
    served = await start_router(await start_engine(), features=[Feature("seen", record=records.append)], **settings)

    answer = await served.client.post(
        "/v1/chat/completions",
        json={"model": "m", "messages": [{"role": "user", "content": "hello"}]},
        headers=[("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "203.0.113.7")],
    )

    assert answer.status_code == 200
    assert records[0].client is not None
    assert records[0].client[0] == client


def test_a_network_that_is_none_stops_the_start() -> None:
    environ = {"INFERENCE_API_TRUSTED_PROXIES": "10.0.0.0/8,proxy.example"}

    with pytest.raises(SettingsError, match=r"TRUSTED_PROXIES.*must be addr"):
        load_settings(environ, [Options])
