"""The answer on its way down: relay, pump, events, usage."""
