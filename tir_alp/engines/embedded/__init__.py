"""Parts of the embedded engine."""
