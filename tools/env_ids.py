"""Why an environment may be unknown by its id: what Gymnasium's own message does not say."""

from __future__ import annotations

import sys


def hint(id: str) -> str:
    """Say what to do about an id that Gymnasium does not know; empty if nothing can be told.

    Args:
        id: As `gymnasium.make` takes it, which has been tried.
    """
    module, colon, _ = id.partition(":")
    if not colon:
        return f". Name the module that registers it, as my_module:{id}"
    found = sys.modules.get(module)
    if found is not None and getattr(found, "__file__", None) is None:
        return (
            f". {module} was found as a folder without code: install the package that is in it "
            f"(pip install -e {module}), or start the command elsewhere"
        )
    if found is not None:
        return f" after the import of {found.__file__}, which should register it"
    return ""
