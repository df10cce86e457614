"""Finds the backends of a model: by host names, EndpointSlices, and the engines' own answers."""
