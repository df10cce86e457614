"""Decides which pipeline, or page, answers a request."""

from collections.abc import Awaitable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from inference_api.http.routes import normal_path


class Dispatch:
    """The innermost ASGI app. An inference route is one dictionary look-up away; everything else goes to `pages`."""

    def __init__(self, pipelines: Mapping[str, ASGIApp], pages: ASGIApp) -> None:
        self.pipelines = pipelines
        self._pages = pages

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            pipeline = self.pipelines.get(scope["path"])
            if pipeline is None:
                scope["path"] = normal_path(scope["path"])
                pipeline = self.pipelines.get(scope["path"])
            if pipeline is not None and scope["method"] == "POST":
                return pipeline(scope, receive, send)
        return self._pages(scope, receive, send)
