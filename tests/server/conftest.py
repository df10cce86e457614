"""One engine and one router for all tests of a module."""

from tests.one_router import _one_catalogue, _one_engine, _one_router, anyio_backend, engine, served

__all__ = ["_one_catalogue", "_one_engine", "_one_router", "anyio_backend", "engine", "served"]
