"""Whom TLS trusts, when that changes while the router runs."""

import asyncio
import logging
import subprocess
from pathlib import Path

import httpx
import pytest

from inference_api.upstream.transport import Transport
from inference_api.upstream.trust import Trust
from tests.fakes import FakeEngine, body_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def stranger(tmp_path: Path) -> str:
    """The certificate of somebody else."""
    made = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subject = ("-days", "2", "-subj", "/CN=stranger", "-keyout", "s.key", "-out", "s.pem")
    subprocess.run([*made, *subject], cwd=tmp_path, check=True, capture_output=True)
    return (tmp_path / "s.pem").read_text()


async def get(transport: Transport, engine: FakeEngine) -> int:
    async with asyncio.timeout(10):
        url = f"{engine.url}/v1/models"
        request = httpx.Request("GET", url, extensions={"fresh": True})
        response = await transport.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await body_of(response.stream)
        return response.status_code


def poll(trust: Trust, now: bool = False) -> bool:
    """Whether something was found to do."""
    take = trust.poll(now)
    if take is not None:
        take()
    return take is not None


async def test_a_new_file_of_trusted_certificates_holds_for_new_connections(
    certificate: Path,
    stranger: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "inference_api")
    trusted = tmp_path / "trusted.pem"
    trusted.write_text(stranger)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    trust = Trust()
    async with FakeEngine(certificate=certificate) as engine, Transport(tls=trust) as transport:
        with pytest.raises(httpx.ConnectError):
            await get(transport, engine)
        trusted.write_text(certificate.with_name("cert.pem").read_text())
        assert [poll(trust) for _ in range(3)] == [False, True, False]
        assert await get(transport, engine) == 200

        # What is broken, or gone, keeps the last ones; the system's own loader would trust nobody without a word.
        for broken in ("no certificate", "", None):
            if broken is None:
                trusted.unlink()
            else:
                trusted.write_text(broken)
            assert [poll(trust) for _ in range(2)] == [False, True]
            poll(trust, now=True)
            assert await get(transport, engine) == 200
        told = [message for message in caplog.messages if "the previous ones stay" in message]
        assert len(told) == len(set(told)) >= 2
        assert all(str(trusted) in message for message in told)

        trusted.write_text(stranger)
        assert poll(trust, now=True)
        with pytest.raises(httpx.ConnectError):
            await get(transport, engine)


def test_what_nobody_has_asked_for_is_not_read() -> None:
    assert Trust().poll(True) is None
