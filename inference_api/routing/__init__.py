"""From a model name to the replica that will answer: registry, backends, balancing."""
