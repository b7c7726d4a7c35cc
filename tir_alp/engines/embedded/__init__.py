"""Components of the embedded engine: its requests, its forward, its cache, its rounding."""
