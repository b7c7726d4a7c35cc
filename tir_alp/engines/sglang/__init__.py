"""The engine that drives SGLang servers."""
