"""The audit of a run for the page, in a process of its own: `python -m tir_alp.inspector.findings`.

An audit imports torch and plays environments; what serves the page does neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_MOST = 1000  # drifts that are shown


@dataclass(slots=True)
class AuditRunner:
    """Audits a run when it is asked to, once at a time.

    Args:
        path: The run folder.
    """

    path: Path
    _state: dict[str, Any] = field(default_factory=lambda: {"state": "none", "drifts": []})
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin an audit, unless one is running."""
        if self._state["state"] != "running":
            self._state = {"state": "running", "drifts": []}
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    @property
    def state(self) -> dict[str, Any]:
        """What is known: `state` (none, running, done or failed), `drifts`, `totals`, `notes`."""
        return self._state

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of the audit."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        command = [sys.executable, "-m", __spec__.name, str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            self._state = {"state": "done", **json.loads(done.stdout)}
        except ValueError:
            lines = done.stderr.strip().splitlines() or ["the audit ended without a word"]
            self._state = {"state": "failed", "reason": lines[-1], "drifts": []}


def main(path: Path) -> int:
    """Print the findings of an audit as JSON; return the exit code."""
    # Imported here because the page's process needs only what is above.
    from tir_alp.audit import audit_run
    from tir_alp.audit.evaluation import audit_evaluation
    from tir_alp.audit.sft import audit_sft
    from tir_alp.records.folder import read_command

    audits = {"sft": audit_sft, "evaluate": audit_evaluation}
    try:
        findings = audits.get(read_command(path), audit_run)(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    drifts = [
        {**asdict(each.location), "check": each.check, "what": each.what}
        for each in findings.drifts[:_MOST]
    ]
    found = {"drifts": drifts, "notes": findings.notes, "totals": findings.totals()}
    print(json.dumps({**found, "num_drifts": len(findings.drifts)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
