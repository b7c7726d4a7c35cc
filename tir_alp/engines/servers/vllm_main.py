"""Entry point of a vLLM server's own process, run by this file's path with vLLM's own Python.

It runs vLLM's server, which ends when the process that started it ends. So do the processes that
the server starts: they import this file again, as `__mp_main__`. This file's package cannot be
imported here, and must not be: it depends on other packages than vLLM.
"""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):
    _file = Path(__file__).with_name("lifetime.py")
    _spec = importlib.util.spec_from_file_location("lifetime", _file)
    assert _spec is not None and _spec.loader is not None
    _lifetime = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_lifetime)
    _lifetime.die_with_parent()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=False)
