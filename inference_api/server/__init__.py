"""The sockets of clients: server, connection, one request's cycle, flow control, request heads."""
