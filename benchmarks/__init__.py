"""Benchmarks: what a request and a streamed event cost a router in CPU time. README.md has the method."""
