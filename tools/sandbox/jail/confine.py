"""What an interpreter gives up before the first foreign instruction. The order matters.

A session has two processes. Its *keeper* runs no foreign code: it furnishes the session's room
(`room_*.py`), reaps processes, and reports their deaths to the host. The interpreter is the
keeper's child. It gives up limits, capabilities, the privileges that an exec could give, files
(Landlock) and system calls (seccomp), in this order, because each step needs something that a later
one takes away.
"""

from __future__ import annotations

import resource

from tir_alp.tools.sandbox.jail import kernel
from tir_alp.tools.sandbox.jail.spec import JailSpec

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def confine(spec: JailSpec, ruleset: int | None) -> int | None:
    """In the interpreter: give up every right; return the descriptor of seccomp's questions."""
    for name, value in spec.rlimits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        kernel.landlock_restrict_self(ruleset)
    if not spec.seccomp:
        return None
    return kernel.install_seccomp(bytes.fromhex(spec.seccomp), asks=spec.asks_host)
