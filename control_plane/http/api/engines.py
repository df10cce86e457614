"""/api/v1/deployments, /model-actions, /pods, /logs: what runs the engines of models."""

import asyncio
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints
from starlette.types import Receive, Scope, Send

from control_plane.errors import Invalid, NotFound, Problem, Refused, envelope
from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import OUTSIDE
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import etag_of, require
from control_plane.http.leaving import while_there
from control_plane.plane import Act, Plane
from control_plane.pure.lifecycle import LINES, MOST_LINES, DriverName, Event, Instance
from control_plane.pure.model_tests import Kind
from control_plane.pure.times import shown
from control_plane.services import deployments, lifecycle, logs, model_tests
from control_plane.services.deployments import Deployment
from control_plane.services.lifecycle import Looked
from inference_api.routing.entries import ModelName

router = APIRouter(tags=["engines"])
Count = Annotated[int, Field(strict=True, ge=0, le=deployments.LARGEST)]
# An object of Kubernetes, or the name of a process
ObjectName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9._]{0,251}[A-Za-z0-9])?$")]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True)]


class DeploymentBody(BaseModel):
    """`min` to `max`: instances while it runs. `idle_seconds`: without a request, until it stops; null: for ever."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    driver: DriverName
    namespace: Annotated[str, StringConstraints(max_length=63)] | None = None
    object: ObjectName
    min: Count = 1
    max: Count = 1
    idle_seconds: Annotated[int, Field(strict=True, ge=10, le=30 * 86_400)] | None = None
    scale_to_zero: StrictBool = False

    def wanted(self, model: str) -> Deployment:
        return Deployment(model=model, **self.model_dump())


class Action(BaseModel):
    """`replicas`: for `scale`. `reason`: for those who read the audit log. `kind`, `backend`: for `test`."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    model: ModelName
    action: Literal["start", "stop", "scale", "test"]
    replicas: Count | None = None
    reason: Reason | None = None
    kind: Kind | None = None
    backend: Annotated[str, StringConstraints(max_length=2048)] | None = None


@router.get("/deployments")
async def list_deployments(
    act: Acting, plane: ThePlane, place: Paging, model: Annotated[str | None, Query(max_length=128)] = None
) -> Page[dict[str, Any]]:
    """What runs the engines of models, by model, each as its driver sees it now."""
    after = place.key(str)
    rows = await deployments.listed(plane, after and after[0], None if model is not None else place.limit + 1)
    chosen = [one for one in rows if model in (None, one.model)]
    looked = await asyncio.gather(*(lifecycle.look_at(plane, one) for one in chosen))
    return page(looked, place, lambda one: [one.deployment.model], lambda one: shown_deployment(act, one))


@router.get("/deployments/{model:path}")
async def read_deployment(model: str, act: Acting, plane: ThePlane, response: Response) -> dict[str, Any]:
    """The ETag stands for what people say of it, not for its state."""
    return _tagged(response, act, await lifecycle.look(plane, model))


@router.put("/deployments/{model:path}", responses={201: {"description": "Created"}})
async def put_deployment(
    model: str, body: DeploymentBody, act: Acting, plane: ThePlane, request: Request, response: Response
) -> dict[str, Any]:
    """Say what runs the engines of a model. Nothing is started or stopped by it."""

    def check(found: Deployment | None) -> None:
        require(request, None if found is None else etag_of(found.body), creates=True)

    if await deployments.put(plane, act, body.wanted(model), check):
        response.status_code = 201
        response.headers["Location"] = f"/api/v1/deployments/{model}"
    return _tagged(response, act, await lifecycle.look(plane, model))


@router.delete("/deployments/{model:path}", status_code=204)
async def delete_deployment(model: str, act: Acting, plane: ThePlane, request: Request) -> None:
    """What runs goes on."""

    def check(found: Deployment | None) -> None:
        if found is None:
            raise NotFound("deployment of the model", model)
        require(request, etag_of(found.body))

    await deployments.remove(plane, act, model, check)


@router.post("/model-actions", status_code=202, responses={**OUTSIDE, 200: {"description": "The result of a test"}})
async def act_on_model(body: Action, act: Acting, plane: ThePlane, response: Response) -> dict[str, Any]:
    """Start, stop or scale; instances come and go later. A test is answered with 200, once it has ended."""
    if (body.replicas is not None) != (body.action == "scale"):
        raise Invalid(Problem("replicas", "is needed for the action scale, and for no other"))
    match body.action:
        case "test":
            response.status_code = 200
            return await model_tests.test(plane, act, body.model, body.kind, body.backend)
        case "start":
            found = await lifecycle.start(plane, act, body.model, body.reason)
        case "stop":
            found = await lifecycle.stop(plane, act, body.model, body.reason)
        case _:
            found = await lifecycle.scale(plane, act, body.model, body.replicas or 0, body.reason)
    # Answers to POSTs are kept for a day, and no line of a log is.
    return shown_deployment(act, found, tails=False)


@router.get("/pods", responses=OUTSIDE)
async def list_pods(
    act: Acting, plane: ThePlane, place: Paging, model: Annotated[str | None, Query(max_length=128)] = None
) -> Page[dict[str, Any]]:
    """Pods and processes of the engines of a model, or of all."""
    after = place.key(str, str)
    looked = [await lifecycle.look(plane, model)] if model is not None else await lifecycle.look_at_all(plane)
    rows = sorted(
        (one.deployment.model, instance.name, instance) for one in looked for instance in one.observed.instances
    )
    if after is not None:
        rows = [row for row in rows if row[:2] > tuple(after)]
    return page(rows[: place.limit + 1], place, lambda row: [*row[:2]], lambda row: shown_instance(act, row[2], row[0]))


@router.get("/logs", response_model=None, responses={**OUTSIDE, 200: {"content": {"text/event-stream": {}}}})
async def read_logs(
    act: Acting,
    plane: ThePlane,
    pod: Annotated[str, Query(min_length=1, max_length=253)],
    model: Annotated[str | None, Query(max_length=128)] = None,
    container: Annotated[str | None, Query(max_length=253)] = None,
    tail: Annotated[int, Query(ge=1, le=MOST_LINES)] = LINES,
    previous: bool = False,
    follow: bool = False,
) -> dict[str, Any] | Response:
    """The last lines of a pod or process; with `follow` events: `line`, each a JSON string, and at last `end`."""
    wanted = logs.Wanted(pod, model, container, tail, previous)
    if follow:
        return Followed(plane, await logs.source(plane, wanted), act.request_id)
    found = await logs.read(plane, wanted)
    query = found.source.query
    return {
        "model": found.source.model,
        "pod": query.instance,
        "container": query.container,
        "previous": query.previous,
        "lines": found.lines,
        "truncated": found.truncated,
    }


class Followed(Response):
    """A log as server-sent events, as its lines come; whoever leaves ends it."""

    def __init__(self, plane: Plane, source: logs.Source, request_id: str | None) -> None:
        super().__init__()
        self._plane = plane
        self._source = source
        self._request_id = request_id or ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_there(receive, self._follow(send))

    async def _follow(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def take(line: str | None) -> None:
            await _event(send, None if line is None else "line", line)

        try:
            await _event(send, "end", {"why": await logs.follow(self._plane, self._source, take)})
        except Refused as exc:
            await _event(send, "error", envelope(exc, self._request_id))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _event(send: Send, kind: str | None, value: Any) -> None:
    """None: a comment, by which it is seen that the reader is still there."""
    body = b": \n\n" if kind is None else f"event: {kind}\ndata: ".encode() + orjson.dumps(value) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


def shown_deployment(act: Act, found: Looked, tails: bool = True) -> dict[str, Any]:
    one, standing, instances = found.deployment, found.standing, found.observed.instances
    if not tails:
        instances = tuple(instance._replace(tail=()) for instance in instances)
    return {
        **one.body,
        "last_activation_at": shown(one.last_activation_at),
        "was_ready_at": shown(one.was_ready_at),
        "state": standing.state,
        "ready": standing.ready,
        "wanted": standing.wanted,
        "reason": standing.reason,
        "since": shown(standing.since),
        "owner": found.observed.owner,
        "instances": [shown_instance(act, instance, one.model) for instance in instances],
        "events": [_shown_event(event) for event in found.observed.events],
    }


def shown_instance(act: Act, one: Instance, model: str) -> dict[str, Any]:
    """`tail` is for those who may read logs."""
    last = one.last_exit
    return {
        **one._asdict(),
        "tail": one.tail if act.principal.may("backends.operate") else (),
        "model": model,
        "since": shown(one.since),
        "last_exit": None if last is None else {**last._asdict(), "at": shown(last.at)},
    }


def _shown_event(one: Event) -> dict[str, Any]:
    return {**one._asdict(), "at": shown(one.at)}


def _tagged(response: Response, act: Act, found: Looked) -> dict[str, Any]:
    response.headers["ETag"] = etag_of(found.deployment.body)
    return shown_deployment(act, found)
