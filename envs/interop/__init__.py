"""Environments of other libraries for tir_alp, and environments of tir_alp for other libraries.

A library runs in a process of its own, with an interpreter of its own: its pinned dependencies need
not agree with those of tir_alp, and the process can be killed. The code in `host/` runs there and
imports nothing from tir_alp.
"""
