"""What a run should say about the sandbox that its programs ran in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxReport:
    """Which backend was taken, and why none that is stronger.

    Example: `SandboxReport(backend="landlock", refused={"namespaces": "no bubblewrap: ..."})`.
    """

    backend: str
    refused: dict[str, str] = field(default_factory=dict)
    """Stronger backends and what kept each from starting."""
    warnings: tuple[str, ...] = ()
    """What must not be overlooked, in sentences."""
