"""The model registry: stores the catalogue in SQLite and serves it to the routers over HTTP."""
