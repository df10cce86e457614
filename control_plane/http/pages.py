"""The first pages of the console: log in, and choose a password with a one-time URL. They work without a script."""

from starlette.routing import Route

ROUTES: tuple[Route, ...] = ()
