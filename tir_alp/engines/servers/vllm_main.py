"""The entry of a vLLM server's own process, by the path of this file and with vLLM's own Python.

It is vLLM's server, and it dies with whoever started it, as do the processes that it starts: those
import this file again, as `__mp_main__`. The package of this file is not there, and must not be:
its dependencies are others than vLLM's.
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
