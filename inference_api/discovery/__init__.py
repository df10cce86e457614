"""Who serves a model: host names, EndpointSlices, and the engines' own answers."""
