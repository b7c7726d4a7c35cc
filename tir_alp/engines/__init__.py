"""What samples completions: the protocol in `base`, and one module or folder per engine."""
