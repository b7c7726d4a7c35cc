"""What samples completions: the protocol in `base`, one module an engine."""
