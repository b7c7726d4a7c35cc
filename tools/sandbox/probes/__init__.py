"""Attacks that the sandbox makes on itself before it starts."""
