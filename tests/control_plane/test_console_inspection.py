"""The page New model with an inspection first: what is offered, what is shown, and what the form has of it."""

import re
from collections.abc import Awaitable, Callable
from html import unescape
from pathlib import Path

import httpx
import pytest

from tests.control_plane.conftest import Running
from tests.control_plane.model_writers import GGUF_SHAPES, LLAMA_GGUF, gguf
from tests.control_plane.pages import figures_of, page, part, rows_of, text_of
from tests.control_plane.people import SAME_ORIGIN, begin_session, make_user

pytestmark = pytest.mark.anyio
NEW = "/console/new-model"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny <b>.gguf").write_bytes(gguf(LLAMA_GGUF, GGUF_SHAPES))
    return tmp_path / "models"


async def as_operator(plane: Running) -> None:
    await make_user(plane, "olga", "operator", password=None)
    await begin_session(plane, "olga")


async def sent(plane: Running, path: str, **fields: str) -> httpx.Response:
    return await plane.client.post(path, data=fields, headers=SAME_ORIGIN)


def values_of(html: str) -> dict[str, str]:
    """The fields of the form."""
    found = re.findall(r'<input id="(\w+)"[^>]* value="([^"]*)"', html)
    return {name: unescape(value) for name, value in found if value}


async def test_an_inspection_fills_the_form_and_stores_nothing(
    start_sqlite: Callable[..., Awaitable[Running]], root: Path
) -> None:
    plane = await start_sqlite(model_roots=str(root))
    await as_operator(plane)
    first = await page(plane, NEW)
    assert re.findall(r'<option value="(\w+)"', part(first, "source")) == ["folder", "file"]
    assert "CONTROL_PLANE_HUB_ENDPOINT" in first

    answer = await sent(plane, NEW, source="file", ref=str(root / "tiny <b>.gguf"), do="inspect")
    assert answer.status_code == 303, answer.text
    where = answer.headers["location"]
    assert "inspection=ins_" in where
    shown = await page(plane, where)
    # The name of a file is a stranger's.
    assert "tiny &lt;b" in shown
    assert "tiny <b" not in shown
    figures = figures_of(shown)
    assert figures["Parameters"].startswith("12.4k")
    assert figures["Quantisation"].startswith("Q8_0 llama")
    assert "2 x 2 layers x 2 KV heads x 16" in text_of(shown)
    rows = {row[0]: row for row in rows_of(part(shown, "gpus"))}
    assert rows["NVIDIA T4"][2].startswith("fits")
    assert "does not divide its heads" in rows["NVIDIA T4"][5]
    assert values_of(shown) == {
        "name": "tiny--b-",
        "gpu": "NVIDIA T4",
        "gpu_count": "1",
        "gpu_memory_gib": "15.0",
        "max_model_len": "2048",
    }
    assert (await plane.admin.get("/api/v1/models")).json()["data"] == []

    form = {**values_of(shown), "backends": "http://10.0.0.1:8000", "engine": "vllm"}
    checked = await sent(plane, where, do="check", **form)
    assert checked.status_code == 200
    assert figures_of(checked.text) == figures
    saved = await sent(plane, where, do="save", **form)
    assert saved.status_code == 303
    (stored,) = (await plane.admin.get("/api/v1/models")).json()["data"]
    assert stored["hardware"] == {"gpu": "NVIDIA T4", "gpu_count": 1, "gpu_memory_gib": 15.0}
    assert stored["max_model_len"] == 2048


async def test_what_is_wrong_is_said_where_it_was_typed(
    start_sqlite: Callable[..., Awaitable[Running]], root: Path
) -> None:
    plane = await start_sqlite(model_roots=str(root))
    await as_operator(plane)
    outside = await sent(plane, NEW, source="folder", ref="/etc", do="inspect")
    nothing = await sent(plane, NEW, source="file", ref="", do="inspect")
    off = await sent(plane, NEW, source="hub", ref="org/model", do="inspect")
    gone = await plane.client.get(f"{NEW}?way=form&inspection=ins_gone")
    numbers = await sent(
        plane, f"{NEW}?way=form", name="m", backends="http://10.0.0.1:1", gpu_count="-1", max_model_len="0"
    )

    assert (outside.status_code, nothing.status_code, off.status_code, gone.status_code) == (422, 422, 403, 404)
    assert "CONTROL_PLANE_MODEL_ROOTS" in part(outside.text, "ref-wrong")
    assert part(nothing.text, "ref-wrong")
    assert "CONTROL_PLANE_HUB_ENDPOINT" in off.text
    assert 'name="backends"' in gone.text
    assert numbers.status_code == 422
    assert part(numbers.text, "gpu_count-wrong")
    assert part(numbers.text, "max_model_len-wrong")


async def test_without_a_source_the_page_says_how_to_get_one(sqlite_plane: Running) -> None:
    await as_operator(sqlite_plane)
    usual, inspect = await page(sqlite_plane, NEW), await page(sqlite_plane, f"{NEW}?way=inspect")

    assert 'name="backends"' in usual
    assert 'name="ref"' not in inspect
    assert "CONTROL_PLANE_HUB_ENDPOINT" in inspect
    assert "CONTROL_PLANE_MODEL_ROOTS" in inspect
