"""Environments of other libraries, and ours for other libraries.

A library runs in a process of its own, with an interpreter of its own: its pins need not agree with
ours, and whatever it does can be ended. `host/` is what runs there, and imports nothing of ours.
"""
