"""One request from its head to its Call: dispatch, pipeline, bodies, pages, errors."""
