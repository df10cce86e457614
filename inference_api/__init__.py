"""A thin OpenAI-compatible inference router in front of vLLM and TGI pods."""

__version__ = "0.1.0"
