"""From a model name to the backend that will answer: registry, backends, balancing."""
