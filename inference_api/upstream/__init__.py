"""The way to a backend: attempts, retries, transport, connections, headers, bodies."""
