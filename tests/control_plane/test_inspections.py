"""/inspections: a hub that answers as hubs do and as they should not, folders with what does not belong there."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from control_plane.clients.folders import Roots
from control_plane.clients.hub import Hub, is_public
from control_plane.connections import Connections
from control_plane.errors import Refused
from control_plane.pure.reading import SourceError, Unreadable
from control_plane.services import inspections, sweeping
from control_plane.services.inspections import Wanted
from control_plane.services.measuring import measure
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import Running
from tests.control_plane.hub import COMMIT, FakeHub
from tests.control_plane.model_writers import GGUF_SHAPES, LLAMA_CONFIG, LLAMA_GGUF, LLAMA_SHAPES, gguf, safetensors
from tests.control_plane.people import error
from tests.fakes import FakeEngine, in_background, until

pytestmark = pytest.mark.anyio
TOKEN = "hf_secret"
PARAMETERS = 128 * 64 + 2 * 64 * 64
CONFIG = json.dumps(LLAMA_CONFIG).encode()
Start = Callable[..., Awaitable[Running]]


def sharded() -> dict[str, bytes]:
    """The same tensors in two files, with their index."""
    names = list(LLAMA_SHAPES)
    parts = {"model-00001-of-00002.safetensors": names[:1], "model-00002-of-00002.safetensors": names[1:]}
    weights = {name: file for file, those in parts.items() for name in those}
    files = {file: safetensors({name: LLAMA_SHAPES[name] for name in those}) for file, those in parts.items()}
    index = json.dumps({"metadata": {}, "weight_map": weights}).encode()
    return {**files, "model.safetensors.index.json": index, "config.json": CONFIG}


WHOLE = {"config.json": CONFIG, "model.safetensors": safetensors(LLAMA_SHAPES), "README.md": b"# Model"}
PARTS = {
    f"big-0000{number}-of-00002.gguf": gguf(
        {**LLAMA_GGUF, "split.no": number - 1, "split.count": 2}, dict([list(GGUF_SHAPES.items())[number - 1]])
    )
    for number in (1, 2)
}


@pytest.fixture
async def served() -> AsyncIterator[Callable[[FakeHub], Awaitable[str]]]:
    """`await served(hub)` -> its URL."""
    engines: list[FakeEngine] = []

    async def serve(hub: FakeHub) -> str:
        engine = await FakeEngine().__aenter__()
        engine.page = hub
        engines.append(engine)
        return engine.url

    yield serve
    for engine in engines:
        await engine.stop()


Served = Callable[[FakeHub], Awaitable[str]]
Asking = Callable[..., Awaitable[Hub]]


@pytest.fixture
async def asking(served: Served) -> AsyncIterator[Asking]:
    """`await asking(hub, token)` -> a client of it."""
    clients: list[Hub] = []

    async def ask(hub: FakeHub, token: str | None = None, loopback: bool = False) -> Hub:
        clients.append(Hub(await served(hub), token, loopback))
        return clients[-1]

    yield ask
    for client in clients:
        await client.close()


async def posted(plane: Running, source: str, ref: str, **more: Any) -> Any:
    return await plane.admin.post("/api/v1/inspections", json={"source": source, "ref": ref, **more})


async def test_a_model_of_a_hub_is_inspected_and_kept(start_sqlite: Start, served: Served) -> None:
    hub = FakeHub(WHOLE, safetensors={"parameters": {"BF16": PARAMETERS}, "total": PARAMETERS})
    plane = await start_sqlite(hub_endpoint=await served(hub), hub_token=TOKEN)
    made = await posted(plane, "hub", "org/model")
    again = await posted(plane, "hub", "org/model", revision="main")

    assert made.status_code == 201, made.text
    found = made.json()
    result = found["result"]
    assert (result["parameters"], result["weights_bytes"], result["commit"]) == (PARAMETERS, 2 * PARAMETERS, COMMIT)
    assert result["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert result["suggestion"]["max_model_len"] == 2048
    assert again.json()["result"]["parameters"] == PARAMETERS
    # A description each time, and a config of a commit once: the hub has counted the numbers.
    targets = [one.target.partition("?")[0].rpartition("/")[2] for one in hub.received]
    assert targets == ["main", "config.json", "main"]
    assert {one.header("authorization") for one in hub.received} == {f"Bearer {TOKEN}"}

    listed = (await plane.admin.get("/api/v1/inspections?limit=1")).json()
    assert [one["id"] for one in listed["data"]] == [again.json()["id"]]
    rest = (await plane.admin.get(f"/api/v1/inspections?after={listed['next']}")).json()
    assert [one["id"] for one in rest["data"]] == [found["id"]]
    assert (await plane.admin.get(f"/api/v1/inspections/{found['id']}")).json() == found
    rows = (await plane.admin.get("/api/v1/audit?action=inspection.create")).json()["data"]
    assert rows[-1]["after"] == {"source": "hub", "ref": "org/model", "commit": COMMIT}

    plane.clock.advance(31 * 86_400)
    assert (await plane.admin.get(f"/api/v1/inspections/{found['id']}")).status_code == 404
    await sweeping.sweep(plane.plane)
    plane.clock.advance(-31 * 86_400)
    assert (await plane.admin.get("/api/v1/inspections")).json()["data"] == []


async def test_headers_are_read_where_the_hub_has_not_counted(asking: Asking) -> None:
    """By parts: of the tensors, nothing is read."""
    large = {**LLAMA_SHAPES, "rest": ("BF16", (1024, 4096))}
    hub = FakeHub({"config.json": CONFIG, "model.safetensors": safetensors(large)})
    repository = await (await asking(hub, None)).repository("org/model")
    found = await measure(repository)

    assert found.numbers == {"BF16": PARAMETERS + 1024 * 4096}
    assert hub.sent < 10_000


async def test_a_server_without_parts_sends_no_more_than_is_read(asking: Asking) -> None:
    hub = FakeHub({"model.safetensors": safetensors({"a": ("BF16", (4096, 8192))})})
    hub.ranges = False
    found = await measure(await (await asking(hub, None)).repository("org/model"))

    assert found.weights == 64 * 1024**2
    assert hub.sent < 16 * 1024**2
    assert found.architecture is None


@pytest.mark.parametrize("files", [sharded(), PARTS], ids=["safetensors", "gguf"])
async def test_shards_are_one_model(asking: Asking, files: dict[str, bytes]) -> None:
    found = await measure(await (await asking(FakeHub(files), None)).repository("org/model"))

    assert found.files == 2
    assert sum(found.numbers.values()) == (PARAMETERS if "config.json" in files else 64 * 128 + 64 * 64)


@pytest.mark.parametrize("files", [sharded(), PARTS], ids=["safetensors", "gguf"])
async def test_missing_shards_are_told(asking: Asking, files: dict[str, bytes]) -> None:
    gone = next(name for name in files if "00002-of" in name)
    rest = {name: content for name, content in files.items() if name != gone}
    repository = await (await asking(FakeHub(rest), None)).repository("org/model")

    with pytest.raises(Unreadable, match=gone):
        await measure(repository)


async def test_a_part_that_is_another_is_refused(asking: Asking) -> None:
    first, second = PARTS
    hub = FakeHub({first: PARTS[second], second: PARTS[first]})
    with pytest.raises(Unreadable, match="another part"):
        await measure(await (await asking(hub, None)).repository("org/model"))


async def test_redirects_lead_to_files_without_the_token(asking: Asking, served: Served) -> None:
    other = FakeHub(WHOLE)
    hub = FakeHub(WHOLE)
    hub.elsewhere = await served(other)
    client = await asking(hub, TOKEN, loopback=True)
    # A repository that has another name now, at the same host
    found = await measure(await client.repository("org/model"))
    renamed = await client.repository("old/name")

    assert sum(found.numbers.values()) == PARAMETERS
    assert renamed.files == {name: len(content) for name, content in WHOLE.items()}
    assert [one.header("authorization") for one in other.received] == [None] * len(other.received)
    assert len(other.received) > 1
    assert {one.header("authorization") for one in hub.received} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("elsewhere", "clause"),
    [
        ("http://93.184.216.34", "not https"),
        ("https://user:password@93.184.216.34", "not https"),
        ("https://127.0.0.1:1", "not public"),
        ("https://localhost:1", "not public"),
        ("https://10.0.0.1", "not public"),
        ("https://169.254.169.254", "not public"),
        ("https://[::1]:1", "not public"),
        ("https://[::ffff:10.0.0.1]", "not public"),
        ("https://[64:ff9b::a00:1]", "not public"),
        ("file:///etc", "not https"),
        ("https://", "no address"),
    ],
)
async def test_redirects_to_what_is_not_public_are_refused(asking: Asking, elsewhere: str, clause: str) -> None:
    hub = FakeHub(WHOLE)
    hub.elsewhere = elsewhere
    repository = await (await asking(hub, TOKEN)).repository("org/model")

    with pytest.raises(SourceError, match=clause) as caught:
        await measure(repository)
    assert "10.0.0.1" not in str(caught.value)


def test_addresses_that_are_public() -> None:
    private = "10.1.1.1 127.0.0.1 169.254.1.1 192.168.0.1 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fe80::1 fc00::1 ff02::1"
    standing_for_private = "::ffff:10.0.0.1 64:ff9b::a00:1 2002:a00:1:: ::10.0.0.1 fec0::1 192.0.0.192"
    assert not any(is_public(ip_address(one)) for one in (*private.split(), *standing_for_private.split()))
    assert all(is_public(ip_address(one)) for one in ("93.184.216.34", "2606:2800:220:1::1"))


async def test_redirects_end(asking: Asking) -> None:
    hub = FakeHub(WHOLE)
    hub.refusals["/api/"] = 302, {"location": "/api/again"}
    with pytest.raises(SourceError, match="again and again"):
        await (await asking(hub, None)).repository("org/model")

    assert len(hub.received) == 5


# Status and headers of the hub, then status and code here, and a part of the sentence
REFUSALS: tuple[tuple[int, dict[str, str], int, str, str], ...] = (
    (401, {}, 403, "source_refused", "asks for a token"),
    (401, {"x-error-code": "RepoNotFound"}, 404, "not_found", "no model"),
    (401, {"x-error-code": "GatedRepo"}, 403, "source_refused", "gated"),
    (403, {}, 403, "source_refused", "gated"),
    (404, {}, 404, "not_found", "no model"),
    (429, {"retry-after": "77"}, 503, "source_busy", "77 s"),
    (429, {"retry-after": "soon"}, 503, "source_busy", "30 s"),
    (500, {}, 503, "source_away", "500"),
    (418, {}, 502, "source_failed", "418"),
    (302, {}, 502, "source_failed", "where to"),
)


async def test_what_a_hub_refuses_is_said(start_sqlite: Start, served: Served) -> None:
    hub = FakeHub(WHOLE)
    plane = await start_sqlite(hub_endpoint=await served(hub))
    for status, headers, expected, code, clause in REFUSALS:
        hub.refusals["/api/"] = status, headers
        answer = await posted(plane, "hub", "org/model")
        assert error(answer) == (expected, code, "ref")
        assert clause in answer.json()["error"]["message"]
        assert ("retry-after" in answer.headers) is (expected == 503)

    assert (await plane.admin.get("/api/v1/inspections")).json()["data"] == []


async def test_a_hub_that_breaks_off_is_said(asking: Asking) -> None:
    hub = FakeHub(WHOLE)
    client = await asking(hub, None)
    repository = await client.repository("org/model")
    hub.cut = 100
    with pytest.raises(SourceError, match="broke off"):
        await measure(repository)
    hub.cut, hub.files = None, {**WHOLE, "model.safetensors": WHOLE["model.safetensors"] + b"more"}
    with pytest.raises(Unreadable, match="description says"):
        await measure(repository)


@pytest.mark.parametrize(
    "described",
    [
        {"sha": None},
        {"sha": "../../x"},
        {"siblings": None},
        {"siblings": [{"rfilename": str(number), "size": 1} for number in range(10_001)]},
        {"siblings": [], "x": "y" * 17 * 1024**2},
    ],
    ids=["none", "path", "no-files", "many", "large"],
)
async def test_a_description_that_cannot_be_used_is_refused(asking: Asking, described: Any) -> None:
    with pytest.raises(SourceError, match="hub"):
        await (await asking(FakeHub(WHOLE, **described), None)).repository("org/model")


async def test_counts_that_cannot_be_are_not_believed(asking: Asking) -> None:
    for counts in ({"BF16": -1}, {"BF16": "many"}, {"ODD": 7}):
        hub = FakeHub(WHOLE, safetensors={"parameters": counts})
        found = await measure(await (await asking(hub, None)).repository("org/model"))
        assert found.numbers == {"BF16": PARAMETERS}


@pytest.mark.parametrize("name", ["../x/y", "org/..", "a b", "/org/model", "org//model", "https://x/y", "org/model?x"])
async def test_what_names_no_repository_is_not_asked_for(asking: Asking, name: str) -> None:
    hub = FakeHub(WHOLE)
    with pytest.raises(SourceError, match="no repository"):
        await (await asking(hub, None)).repository(name)
    assert hub.received == []


async def test_an_inspection_is_bounded_in_time_and_in_files_at_once(start_sqlite: Start, served: Served) -> None:
    one = safetensors({"a": ("BF16", (4,))})
    hub = FakeHub({f"model-{number:05}-of-00020.safetensors": one for number in range(1, 21)})
    plane = await start_sqlite(hub_endpoint=await served(hub))
    assert plane.plane.connections.hub is not None
    repository = await plane.plane.connections.hub.repository("org/model")
    hub.gate = asyncio.Event()
    async with in_background(measure(repository)) as task:
        await until(lambda: len(hub.received) == 9)
        hub.gate.set()
        assert (await task).files == 20
    hub.gate = asyncio.Event()
    with pytest.raises(Refused, match="took more than") as caught:
        await inspections.create(plane.plane, act_of(plane, platform_role="admin"), Wanted("hub", "org/model"), 0.2)

    assert caught.value.status == 503


async def test_a_source_that_is_off_names_its_setting(sqlite_plane: Running) -> None:
    for source, setting in (("hub", "HUB_ENDPOINT"), ("folder", "MODEL_ROOTS"), ("file", "MODEL_ROOTS")):
        answer = await posted(sqlite_plane, source, "/models/x")
        assert error(answer) == (403, "inspection_disabled", "source")
        assert f"CONTROL_PLANE_{setting}" in answer.json()["error"]["message"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "models"
    for name, content in WHOLE.items():
        (found / "whole").mkdir(parents=True, exist_ok=True)
        (found / "whole" / name).write_bytes(content)
    (found / "gguf").mkdir()
    for name, content in PARTS.items():
        (found / "gguf" / name).write_bytes(content)
    return found


async def test_folders_and_files_are_inspected(start_sqlite: Start, root: Path) -> None:
    plane = await start_sqlite(model_roots=str(root))
    folder = await posted(plane, "folder", str(root / "whole"))
    shard = await posted(plane, "file", str(root / "gguf" / next(iter(PARTS))))
    several = await posted(plane, "folder", str(root))
    revised = await posted(plane, "folder", str(root / "whole"), revision="main")
    config = await posted(plane, "file", str(root / "whole" / "config.json"))

    assert folder.status_code == 201, folder.text
    assert folder.json()["result"]["parameters"] == PARAMETERS
    assert shard.json()["result"]["files"] == 2
    assert shard.json()["result"]["quantization"] == "Q8_0"
    # The one with a config, of several
    assert several.json()["result"]["format"] == "safetensors"
    assert error(revised) == (422, "validation_error", "revision")
    assert error(config) == (422, "validation_error", "ref")


async def test_what_nobody_sees_is_not_kept(start_plane: Start, root: Path) -> None:
    """PostgreSQL refuses JSON with a NUL."""
    hostile = {"architectures": ["Lla\0ma\u202e"], "quantization_config": {"quant_method": "a\0wq"}}
    (root / "whole" / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **hostile}))
    plane = await start_plane(model_roots=str(root))

    found = await posted(plane, "folder", str(root / "whole"))

    assert found.status_code == 201, found.text
    assert (found.json()["result"]["architecture"]["name"], found.json()["result"]["quantization"]) == ("Llama", "awq")


async def refused(made: Awaitable[Any], *words: str) -> None:
    with pytest.raises((SourceError, Unreadable)) as caught:
        await made
    assert any(word in str(caught.value) for word in words), str(caught.value)


async def test_nothing_outside_of_the_roots_is_opened(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "secret.safetensors").write_bytes(WHOLE["model.safetensors"])
    (root / "link").symlink_to(outside)
    (root / "file.safetensors").symlink_to(outside / "secret.safetensors")
    (root / "whole" / "more.safetensors").symlink_to(outside / "secret.safetensors")
    roots = Roots([root])
    for ref in (outside, root / "link", root / "link" / "secret.safetensors", root / "file.safetensors"):
        await refused(roots.folder(str(ref)), "not below")
        await refused(roots.beside(str(ref)), "not below")
    for text in (f"{root}/../outside", "whole", f"{root}/whole/..", f"{root}/\0", "/etc/passwd", ""):
        await refused(roots.folder(text), "absolute path", "not below")
    await refused(roots.folder(str(root / "nothing")), "nothing at")
    await refused(roots.folder(str(root / "whole" / "config.json")), "no folder")
    await refused(roots.beside(str(root / "whole")), "no file")

    listed = await roots.folder(str(root / "whole"))
    assert listed.files.keys() == WHOLE.keys()
    assert "leads out" in listed.notes[0]


async def test_a_folder_that_becomes_a_link_out_while_a_file_is_opened(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "model.safetensors").write_bytes(WHOLE["model.safetensors"])
    folder = await Roots([root]).folder(str(root / "whole"))
    real = os.open

    def swapped(path: Any, *flags: Any, **more: Any) -> int:
        """As somebody with a right to write there would, between the look and the opening."""
        if str(path).endswith("model.safetensors"):
            (root / "whole").rename(root / "before")
            (root / "whole").symlink_to(outside)
        return real(path, *flags, **more)

    monkeypatch.setattr(os, "open", swapped)
    await refused(measure(folder), "something else")


async def test_links_within_the_roots_hold(root: Path) -> None:
    """As the cache of a hub has them."""
    (root / "snapshot").mkdir()
    for name in WHOLE:
        (root / "snapshot" / name).symlink_to(root / "whole" / name)
    found = await measure(await Roots([root]).folder(str(root / "snapshot")))

    assert sum(found.numbers.values()) == PARAMETERS


async def test_pipes_and_devices_are_not_opened(root: Path) -> None:
    os.mkfifo(root / "whole" / "pipe.safetensors")
    (root / "whole" / "zero.gguf").symlink_to("/dev/zero")
    folder = await Roots([root, Path("/dev")]).folder(str(root / "whole"))
    assert folder.files.keys() == WHOLE.keys()
    assert len(folder.notes) == 2

    # One that takes the place of a file meanwhile
    (root / "whole" / "model.safetensors").unlink()
    os.mkfifo(root / "whole" / "model.safetensors")
    async with asyncio.timeout(10):
        await refused(measure(folder), "something else")


async def test_a_file_that_becomes_shorter_is_said(root: Path) -> None:
    folder = await Roots([root]).folder(str(root / "whole"))
    async with folder.open("model.safetensors") as reader:
        os.truncate(root / "whole" / "model.safetensors", 10)
        with pytest.raises(Unreadable, match="shorter"):
            await reader.read(0, 100)


async def test_folders_are_bounded_in_depth_and_entries(root: Path) -> None:
    deep = root / "a" / "b" / "c" / "d" / "e"
    deep.mkdir(parents=True)
    (deep.parent / "x.gguf").write_bytes(PARTS[next(iter(PARTS))])
    (deep / "y.gguf").write_bytes(b"")
    (root / "a" / "loop").symlink_to(root / "a")
    found = await Roots([root]).folder(str(root))
    assert any(path.endswith("d/x.gguf") for path in found.files)
    assert not any(path.endswith("e/y.gguf") for path in found.files)
    await refused(Roots([root], most=9).folder(str(root)), "More than 9 entries")


async def test_several_models_are_told_by_name(root: Path) -> None:
    (root / "whole" / "config.json").unlink()
    roots = Roots([root])
    await refused(measure(await roots.folder(str(root))), "whole/model.safetensors")
    (root / "empty").mkdir()
    await refused(measure(await roots.folder(str(root / "empty"))), "none of them is a model")


async def test_without_a_source_there_is_no_client(sqlite_plane: Running) -> None:
    found = sqlite_plane.plane.connections
    assert (found.hub, found.roots) == (Connections().hub, None)
