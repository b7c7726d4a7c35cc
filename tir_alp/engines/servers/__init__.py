"""Processes that serve a model, and what every kind of them has in common."""
