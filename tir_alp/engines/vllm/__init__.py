"""The engine that drives a vLLM server."""
