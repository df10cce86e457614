"""The parts of `split`."""
