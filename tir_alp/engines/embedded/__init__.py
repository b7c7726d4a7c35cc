"""What the embedded engine is made of: its cache, its sampling, its rounding."""
