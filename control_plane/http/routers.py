"""What routers push: reports of their state, and requests to start a model."""

import asyncio
import re
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from control_plane.errors import Invalid, Problem, Refused
from control_plane.http.identity import plane_of, service_act
from control_plane.http.snapshots import json
from control_plane.pure.reports import Instance, RouterReport
from control_plane.services import activations, models, reports

_INSTANCE: TypeAdapter[str] = TypeAdapter(Instance)
# Larger ones are read in a thread: there may be thousands of models.
_SMALL = 32 * 1024
_SHOWN = 20
# The escape of NUL, after any number of escaped backslashes
_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")


class Activation(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    router: Instance
    reason: Annotated[str, StringConstraints(max_length=500)] = "hold"
    waiting: Annotated[int, Field(ge=0)] = 0


async def report(request: Request) -> Response:
    """PUT /routers/{instance}: 200 with the ETags of the documents as they are now."""
    service_act(request, "report")
    plane = plane_of(request)
    instance = _validated(_INSTANCE, orjson.dumps(request.path_params["instance"]), "instance")
    # PostgreSQL stores no NUL; one in what an engine answered must not make the router look lost.
    body = _NUL.sub(rb"\1?", await request.body())
    read = _REPORT.validate_json
    try:
        found = read(body) if len(body) <= _SMALL else await asyncio.to_thread(read, body)
    except ValidationError as exc:
        raise _refused(exc) from None
    await reports.store(plane, instance, found.model_dump(mode="json", exclude_unset=True))
    return json(orjson.dumps({"etags": reports.etags(plane)}))


async def activate(request: Request) -> Response:
    """POST /activations/{model}: 200 if it has a backend, 202 if it starts."""
    act = service_act(request, "activate")
    plane, name = plane_of(request), request.path_params["name"]
    asked: Activation = _validated(_ACTIVATION, await request.body(), "body")
    model = models.catalogue(plane).owners.get(name)
    if model is None:
        raise Refused(404, "model_not_found", f"The model {name[:128]!r} is not in the catalogue.", param="model")
    state = await activations.activate(plane, act, model, asked.router, asked.waiting)
    return json(orjson.dumps({"model": name, "state": state}), status=200 if state == "ready" else 202)


ROUTES = (
    Route("/routers/{instance}", report, methods=["PUT"]),
    Route("/activations/{name:path}", activate, methods=["POST"]),
)
_REPORT: TypeAdapter[RouterReport] = TypeAdapter(RouterReport)
_ACTIVATION: TypeAdapter[Activation] = TypeAdapter(Activation)


def _validated(adapter: TypeAdapter[Any], body: bytes, place: str) -> Any:
    try:
        return adapter.validate_json(body)
    except ValidationError as exc:
        raise _refused(exc, place) from None


def _refused(exc: ValidationError, place: str = "body") -> Refused:
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return Refused(400, "invalid_json", f"The body is not JSON: {errors[0]['msg']}.")
    problems = [Problem(".".join(map(str, one["loc"])) or place, one["msg"]) for one in errors[:_SHOWN]]
    return Invalid(*problems)
