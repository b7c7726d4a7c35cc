"""Processes that serve a model, whichever kind they are."""
