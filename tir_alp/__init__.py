"""tir_alp: reinforcement learning of language models that use tools, stable off-policy."""

import sys

__version__ = "0.2.0"

# `python -m tir_alp.COMMAND` imports this package first; only then is the first argument `-m`.
if sys.argv[:1] == ["-m"]:
    from tir_alp.process import begin_command_of

    begin_command_of(sys.orig_argv)
