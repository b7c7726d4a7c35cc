"""tir_alp: reinforcement learning of language models that use tools, stable off-policy."""

import sys

__version__ = "0.2.0"

# `python -m tir_alp.COMMAND` imports this package first; only then is the first argument `-m`.
if sys.argv[:1] == ["-m"]:
    from tir_alp.run.early_interrupt import exit_on_interrupt_of_command

    exit_on_interrupt_of_command(sys.orig_argv)
