"""The OpenAPI document is valid, has every route, and tells the truth: a real router is held to it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from inference_api.demo.engine import create_engine
from inference_api.http.openapi import Document
from inference_api.http.routes import INFERENCE_ROUTES
from tests.conftest import Served
from tests.demo.conftest import _served
from tests.ports import free_port

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def router() -> Iterator[str]:
    """The URL of a router process whose model `m` is a fake engine's."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("INFERENCE_API_")}
    port = free_port()
    with _served(create_engine("m", tokens_per_second=1e6)) as engine:
        options = ("--backend", f"m={engine}", "--port", str(port))
        process = subprocess.Popen(
            [sys.executable, "-m", "inference_api", "serve", *options],
            env=environ | {"INFERENCE_API_LOG_LEVEL": "warning"},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"{url}/readyz", trust_env=False).raise_for_status()
                    break
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait(10)


SCHEMA = schemathesis.openapi.from_dict(Document(INFERENCE_ROUTES, ops=True).document)
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations() if isinstance(found, Ok)]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_the_router_does_as_its_document_says(operation: Any, router: str) -> None:
    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(operation.as_strategy())
    def hold(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "m"
        case.call_and_validate(base_url=router, checks=CHECKS)

    hold()


def test_the_document_has_every_route_and_valid_schemas() -> None:
    document = Document(INFERENCE_ROUTES, ops=True).document

    assert document["openapi"] == "3.1.0"
    assert {path for path, operations in document["paths"].items() if "post" in operations} == {
        "/v1/responses/{id}/cancel",
        *(route.path for route in INFERENCE_ROUTES),
    }
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for route in INFERENCE_ROUTES:
        Draft202012Validator.check_schema(route.reader.schema())
    for part in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(part)


def test_what_is_for_operators_is_not_told_to_clients() -> None:
    chat = Document(INFERENCE_ROUTES, ops=False).document["paths"]["/v1/chat/completions"]["post"]

    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["required"]) == {"model", "messages"}
    assert set(body["properties"]) == {"model", "messages", "stream"}
    assert "/backends" not in Document(INFERENCE_ROUTES, ops=False).document["paths"]


@pytest.mark.anyio
async def test_the_pages_need_nothing_from_elsewhere(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine())

    document, page = [await served.client.get(path) for path in ("/openapi.json", "/docs")]
    assert (document.status_code, document.headers["content-type"]) == (200, "application/json")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"https?://|<script|<link|<img", page.text)
    assert all(f"<code>{path}</code>" in page.text for path in document.json()["paths"])
