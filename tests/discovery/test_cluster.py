"""How the router talks to an API server: where it is, as whom, how safely, and how much of it it believes."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.discovery.api import Api, ApiError, Event, Lines, read_event
from inference_api.discovery.cluster import ApiLimits, ClusterError, in_cluster
from tests.discovery.kube import WATCH_HEAD, FakeApi, document, event
from tests.fakes import chunk, json_response, raw, until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeApi]:
    async with FakeApi(tmp_path) as server:
        yield server


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("models\n")
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}, "https://10.0.0.1:6443"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "https://10.0.0.1:443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}, "https://[fd00::1]:443"),
    ],
)
def test_a_pod_knows_its_api_server_and_its_namespace(environ: dict[str, str], url: str, account: Path) -> None:
    found = in_cluster(environ, account)

    assert (found.url, found.namespace) == (url, "models")
    assert (found.token, found.ca) == (account / "token", account / "ca.crt")


def test_what_is_no_pod_says_so(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="KUBERNETES_SERVICE_HOST is not set"):
        in_cluster({}, tmp_path)


@pytest.mark.parametrize("missing", ["token", "namespace"])
def test_a_pod_without_an_account_says_what_to_set(missing: str, account: Path) -> None:
    (account / missing).unlink()

    with pytest.raises(ClusterError, match=rf"No such file.*{missing}.*automountServiceAccountToken"):
        in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, account)


def test_an_account_whose_namespace_is_none_is_refused(account: Path) -> None:
    (account / "namespace").write_text("../secrets")

    with pytest.raises(ClusterError, match="namespace"):
        in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, account)


# What is read


@given(st.lists(st.binary(max_size=6).filter(lambda line: b"\n" not in line), max_size=5), st.randoms())
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], rand: Any) -> None:
    data = b"".join(line + b"\n" for line in lines)
    cuts = sorted(rand.randrange(len(data) + 1) for _ in range(4))
    found, splitter = [], Lines(6)
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        found += splitter.feed(data[begin:end])

    assert found == [line for line in lines if line.strip()]


@pytest.mark.parametrize("parts", [[b"1234567"], [b"1234", b"567"], [b"12345", b"67\n"], [b"a\n1234567\nb"]])
def test_a_line_that_is_too_long_is_not_kept(parts: list[bytes]) -> None:
    *before, last = parts
    splitter = Lines(6)
    assert [line for part in before for line in splitter.feed(part)] == []

    with pytest.raises(ApiError, match="more than 6 bytes"):
        splitter.feed(last)


def test_an_event_is_what_happened_to_whom_and_when() -> None:
    slice = document("s", "llama")
    slice["metadata"]["resourceVersion"] = "7"

    assert read_event(event("ADDED", slice)) == Event("ADDED", slice, "7")


async def test_a_list_that_is_too_long_is_not_kept(api: FakeApi) -> None:
    for number in range(4):
        api.put(document(f"s-{number}", "llama", "10.0.0.1"))
    api.page_size = 1
    for limits, message in ((ApiLimits(slices=2), "more than 2 slices"), (ApiLimits(page=100), "more than 100 bytes")):
        async with Api(api.cluster._replace(limits=limits)) as client:
            with pytest.raises(ApiError, match=message):
                await client.slices("models", ["llama"])


async def test_the_answer_to_a_watch_that_is_refused_is_not_read_for_ever(api: FakeApi) -> None:
    head = b"HTTP/1.1 403 Forbidden\r\ntransfer-encoding: chunked\r\n\r\n"
    api.on_watch.append(raw(head, *[chunk(b"x" * 65536)] * 3))
    async with Api(api.cluster) as client:
        with pytest.raises(ApiError, match="403: 'no reason given'"):
            await client.watch("models", ["llama"], "1", 60, lambda events: None)


async def test_what_it_says_of_a_refusal_is_told(api: FakeApi) -> None:
    said = json_response({"message": "endpointslices is forbidden: User cannot list"}, "403 Forbidden")
    api.on_list.append(raw(said))
    async with Api(api.cluster) as client:
        with pytest.raises(ApiError, match="403: 'endpointslices is forbidden: User cannot list'"):
            await client.slices("models", ["llama"])


async def test_a_watch_ends_when_its_time_is_over(api: FakeApi) -> None:
    seen: list[Event] = []
    async with Api(api.cluster) as client:
        await client.watch("models", ["llama"], "1", 0.05, seen.extend)

    assert seen == []
    await until(lambda: api.open == 0)
    # The server is asked to end it by itself; it counts in whole seconds.
    assert "timeoutSeconds=1" in api.requests[0].target


async def test_a_watch_says_what_happened_since(api: FakeApi) -> None:
    seen: list[Event] = []
    api.put(document("s", "llama", "10.0.0.1"))
    async with Api(api.cluster) as client:
        _, version = await client.slices("models", ["llama"])
        watch = asyncio.create_task(client.watch("models", ["llama"], version, 60, seen.extend))
        api.put(document("s", "llama", "10.0.0.2"))
        api.put(document("x", "other", "10.0.0.3"))
        api.remove("s")
        await until(lambda: len(seen) == 2)
        api.close_watches()
        await watch

    assert [one.kind for one in seen] == ["MODIFIED", "DELETED"]
    assert int(seen[1].version) == int(version) + 3


async def test_events_that_come_together_are_told_together(api: FakeApi) -> None:
    slices = [document(name, "llama") for name in "ab"]
    for version, slice in enumerate(slices):
        slice["metadata"]["resourceVersion"] = str(version)
    together = b"".join(event("ADDED", slice) for slice in slices)
    api.on_watch.append(raw(WATCH_HEAD, chunk(together), b"0\r\n\r\n", close=True))
    seen: list[int] = []
    async with Api(api.cluster) as client:
        await client.watch("models", ["llama"], "1", 60, lambda events: seen.append(len(events)))

    assert seen == [0, 2]


# To whom it talks


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key and its self-signed certificate for 127.0.0.1, and another one's certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("server", "other"):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=kube", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.crt"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


async def test_the_server_is_held_to_the_clusters_ca_and_the_file_is_read_each_time(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the machine trusts is of no matter.
    monkeypatch.setenv("SSL_CERT_FILE", str(keys / "server.crt"))
    api = FakeApi(tmp_path)
    api.put(document("s", "llama", "10.0.0.1"))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(keys / "server.crt", keys / "server.key")
    server = await asyncio.start_server(api._accept, "127.0.0.1", api.port, ssl=tls)
    cluster = api.cluster._replace(url=api.url.replace("http", "https"))
    async with server:
        with pytest.raises(ApiError, match="the certificate of its CA cannot be read"):
            Api(cluster)
        shutil.copy(keys / "other.crt", cluster.ca)
        async with Api(cluster) as client:
            with pytest.raises(ApiError, match="cannot be reached"):
                await client.slices("models", ["llama"])
        # Nothing was said to it, the token least of all.
        assert api.requests == []
        shutil.copy(keys / "server.crt", cluster.ca)
        async with Api(cluster) as client:
            found, _ = await client.slices("models", ["llama"])
    await api.stop()

    assert len(found) == 1


async def test_no_proxy_of_the_environment_gets_to_see_the_token(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with Api(api.cluster) as client:
        await client.slices("models", ["llama"])

    assert api.lists == 1
