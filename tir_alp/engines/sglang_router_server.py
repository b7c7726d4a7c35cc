"""The entry of a router's own process: `python -m tir_alp.engines.sglang_router_server ARGUMENTS`.

It is `sglang_router.launch_router`; it dies with whoever started it, and has its key from the
environment.
"""

from __future__ import annotations

import os
import runpy
import sys

from tir_alp.engines.lifetime import die_with_parent

KEY_VARIABLE = "TIR_ALP_ROUTER_KEY"
"""What the router asks of its clients; a command line could be read by every user of the machine.
"""

if __name__ == "__main__":
    die_with_parent()
    if key := os.environ.pop(KEY_VARIABLE, None):
        sys.argv.append(f"--api-key={key}")  # one word: a key may begin with a dash
    runpy.run_module("sglang_router.launch_router", run_name="__main__")
