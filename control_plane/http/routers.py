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
from control_plane.pure.reports import Instance, RouterReport, merged
from control_plane.services import models, reports

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
    """POST /activations/{model}: 200 if it has a backend; there is nothing yet that could start one."""
    service_act(request, "activate")
    plane, name = plane_of(request), request.path_params["name"]
    _validated(_ACTIVATION, await request.body(), "body")
    if name not in models.catalogue(plane).owners:
        raise Refused(404, "model_not_found", f"The model {name[:128]!r} is not in the catalogue.", param="model")
    async with plane.database.main.read() as connection:
        known = merged(await reports.present(connection, plane.clock()))
    if any(one.model == name and one.state == "ready" for one in known):
        return json(orjson.dumps({"model": name, "state": "ready"}))
    message = f"Nothing can start the model {name!r}: no deployment of it is known to the control plane."
    raise Refused(409, "activation_disabled", message, param="model")


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
