"""Runs all parts one after the other, each in its own process and time, and writes what they found.

    python -m tests.gpu --out FOLDER [--seconds 480] [--smollm2 FOLDER] [--only PART ...]

Without a GPU the parts are reduced. `results.json` and `results.md` are written again after each
part, so that they are there whatever happens to the machine. Exit code 0: every part is ok.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.gpu.page import page

ROOT = Path(__file__).parents[2]
PARTS: Mapping[str, float] = {
    "marked": 90.0,
    "training": 130.0,
    "decode": 60.0,
    "noise": 60.0,
    "collectives": 40.0,
    "curve": 180.0,
}
"""Part, in their order -> its time limit in seconds, where the whole run has `SECONDS`. Not all of
them can take that long: the end of the whole run may come sooner."""
SECONDS = 480.0
LEAST_S = 10.0  # a part with less time is not started
GRACE_S = 8.0  # between asking a part to end and killing it


@dataclass(frozen=True, slots=True)
class Plan:
    """What all parts have in common."""

    folder: Path
    """Where parts write their figures, and read those of parts before them."""
    is_reduced: bool
    smollm2: Path | None
    seconds: float
    """Limit of the whole run; those of the parts are in proportion."""
    deadline: float
    """When everything has to be done, on the clock of `time.monotonic`."""


def environment() -> dict[str, Any]:
    """Return what the figures depend on."""
    found: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count()}
    for package in ("torch", "transformers", "numpy"):
        found[package] = importlib.metadata.version(package)
    found["device"], found["cuda"] = "cpu", torch.version.cuda
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory_gb": card.total_memory / 1e9}
        found["num_devices"] = torch.cuda.device_count()
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
            found["driver"] = said.stdout.strip()
        except OSError:
            found["driver"] = "unknown: there is no nvidia-smi"
    return found


def run_part(name: str, plan: Plan, log: Path) -> dict[str, Any]:
    """Run one part; return its status, its seconds and what it wrote."""
    own = PARTS[name] * plan.seconds / SECONDS
    limit = min(own, plan.deadline - time.monotonic() - GRACE_S)
    if limit < LEAST_S:
        return {"status": "not run", "reason": "no time was left", "seconds": 0.0, "figures": {}}
    file = plan.folder / f"{name}.json"
    words = ["--out", str(file), "--seconds", f"{limit:.1f}"]
    words += ["--reduced"] if plan.is_reduced else []
    words += ["--smollm2", str(plan.smollm2)] if plan.smollm2 is not None else []
    began = time.monotonic()
    with log.open("a") as output:
        output.write(f"\n==== {name}, at most {limit:.0f} s\n")
        output.flush()
        part = subprocess.Popen(
            [sys.executable, "-m", f"tests.gpu.{name}", *words],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = ended(part, limit)
    written = json.loads(file.read_text()) if file.exists() else {"figures": {}, "errors": {}}
    errors = [f"{what}: {why}" for what, why in written["errors"].items()]
    if code is None:
        status, reason = "timed out", f"stopped after {limit:.0f} s"
    elif code == 0 and not errors:
        status, reason = "ok", None
    else:
        status, reason = "failed", "; ".join(errors) or f"exit code {code}; see log.txt"
    return {
        "status": status,
        "reason": reason,
        "seconds": time.monotonic() - began,
        "figures": written["figures"],
    }


def ended(part: subprocess.Popen[bytes], limit: float) -> int | None:
    """Wait for a part, and end it with all of its children; None: it had to be stopped."""
    code: int | None = None
    try:
        code = part.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(part.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            part.wait(GRACE_S / 2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(part.pid, signal.SIGKILL)  # what it left, too
    part.wait()
    return code


def main() -> int:
    """Run the parts; return the exit code."""
    parser = argparse.ArgumentParser("python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of the whole run")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            Path(folder),
            not torch.cuda.is_available(),
            options.smollm2.resolve() if options.smollm2 is not None else None,
            options.seconds,
            time.monotonic() + options.seconds,
        )
        return run_parts(
            [name for name in PARTS if name in options.only], plan, options.out.resolve()
        )


def run_parts(names: Sequence[str], plan: Plan, out: Path) -> int:
    """Run some parts, and write the results after each; return the exit code."""
    began, log = time.monotonic(), out / "log.txt"
    log.write_text("")
    results: dict[str, Any] = {
        "environment": environment(),
        "is_reduced": plan.is_reduced,
        "seconds": 0.0,
        "parts": {},
    }
    for name in names:
        results["parts"][name] = found = run_part(name, plan, log)
        results["seconds"] = time.monotonic() - began
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "results.md").write_text(page(results))
        reason = f": {found['reason']}" if found["reason"] else ""
        print(f"{name}: {found['status']} after {found['seconds']:.0f} s{reason}", flush=True)
    print(f"{out / 'results.md'} has the results", flush=True)
    return 0 if all(each["status"] == "ok" for each in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
