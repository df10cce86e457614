"""From the socket to a validated Call: server, HTTP surface, wire format."""
