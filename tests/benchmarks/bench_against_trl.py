"""One training step beside TRL's: the same model, prompts, tool and lengths, in turns.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 'trl==1.16.*'
    python tests/benchmarks/bench_against_trl.py --trl-python trl/bin/python [--smollm2 FOLDER]

TRL has its own Python, because it needs another version of transformers. Each row of the table is
one case: a model (a random Qwen3 of 3.4 M parameters; SmolLM2-135M if its folder is given), a
number of completions per sequence with or without tool calls between them, and a precision. Both
sides make each step one after the other, so that other load on the machine affects both; the first
step warms up. Before a row is printed, prompts are compared token for token, and the lengths of all
completions.

`float32` is equal work in equal precision, with both sides' defaults otherwise; `bfloat16` is
`bf16=True` of TRL, and `trainer.dtype` and the engine's precision of ours. TRL's gradient
checkpointing, on by default, is off. Ours has ALP's noise, its sandbox and all that a run records;
TRL's tool runs in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.against_trl.worker import Case, as_message  # noqa: E402
from tir_alp.process import OPENMP  # noqa: E402

SIDES = ("ours", "theirs")
SHAPES = {
    "one": (1, False),
    "one call": (2, True),
    "three": (3, False),
    "three, two calls": (3, True),
}
"""Name for the command line -> completions of a sequence, and whether tool calls are between."""
SETTINGS = {
    "float32": ("float32", True),
    "bfloat16": ("bfloat16", True),
    "float32-unshared": ("float32", False),
}
"""Name for the command line -> precision, and whether our trainer shares prompts."""

NUM_EXAMPLES = {"qwen3-3.4m": 0, "smollm2-135m": 4}
"""Model -> worked examples in its prompts, which have about 280 tokens then."""


@dataclass(slots=True)
class Worker:
    """One side's process."""

    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, message: Mapping[str, Any]) -> None:
        """Send a message. Raises RuntimeError if the side has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise RuntimeError(
                f"the worker ended; the end of {self.log}:\n{tail(self.log)}"
            ) from error

    def answer(self) -> dict[str, Any]:
        """Wait for a message.

        Raises:
            RuntimeError: The side failed, or ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended; the end of {self.log}:\n{tail(self.log)}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{found['error']}; the end of {self.log}:\n{tail(self.log)}")
        return found


@dataclass(slots=True)
class Side:
    """What one side reported of a case."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    peak_mb: float = 0.0

    def median(self, name: str) -> float:
        """Return the median of a figure over the steps after the one that warms up."""
        return statistics.median(each[name] for each in self.steps[1:])

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second of a step."""
        tokens = sum(sum(each) for each in self.steps[-1]["sampled"])
        return tokens / self.median("seconds")


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def check_python(path: Path | None) -> Path:
    """Return the Python of TRL. Raises ValueError if it cannot import TRL."""
    how = (
        "make a virtual environment for it (python3 -m venv trl; trl/bin/pip install "
        "torch==2.13.0 'trl==1.16.*') and give --trl-python trl/bin/python"
    )
    if path is None:
        raise ValueError(f"--trl-python is missing: TRL needs a Python of its own; {how}")
    if not os.access(path, os.X_OK):
        raise ValueError(f"--trl-python {path} is no program; {how}")
    found = subprocess.run(
        [path, "-c", "import importlib.metadata as m; print(m.version('trl'), m.version('torch'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:]
        raise ValueError(f"--trl-python {path} has no TRL ({' '.join(reason)}); {how}")
    print(f"TRL and its torch: {found.stdout.strip()}", flush=True)
    return path.absolute()  # not resolved: a link in a virtual environment says which one it is


@contextlib.contextmanager
def started(python: Path, side: str, folder: Path, threads: int) -> Iterator[Worker]:
    """Start a side's process, and end it."""
    log = folder / f"{side}.log"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= OPENMP if side == "ours" else {}  # as our commands have it
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [python, "-m", f"tests.benchmarks.against_trl.{side}"],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            worker = Worker(process, log)
            worker.answer()
            yield worker
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a fork that computes, too
            process.wait()


def reason_against(case: Case) -> str:
    """Return why TRL cannot do a case; empty if it can."""
    if case.num_completions > 1 and not case.has_tool:
        return "TRL samples a further completion only after a tool call"
    return ""


def measure(case: Case, workers: Mapping[str, Worker]) -> dict[str, Side]:
    """Make the steps of a case, the sides in turns; those that take part are in the result."""
    names = SIDES[:1] if reason_against(case) else SIDES
    found = {name: Side() for name in names}
    for name in names:
        workers[name].ask(as_message(case))
        opened = workers[name].answer()
        if name == "ours":  # it decides about the order of the questions
            case = replace(case, questions=tuple(opened["questions"]))
    for step in range(case.steps):
        order = names if step % 2 else names[::-1]
        for name in order:
            workers[name].ask({"do": "step"})
            found[name].steps.append(workers[name].answer())
        compare(step, {name: side.steps[-1] for name, side in found.items()}, case)
    for name, side in found.items():
        side.peak_mb = workers[name].answer()["peak_mb"]
    return found


def compare(step: int, reports: Mapping[str, Mapping[str, Any]], case: Case) -> None:
    """See that the work of a step was the same. Raises RuntimeError."""
    expected = [[case.num_tokens] * case.num_completions] * case.num_sequences
    prompts = reports["ours"]["prompts"]
    for name, found in reports.items():
        if found["sampled"] != expected:
            raise RuntimeError(
                f"step {step}: the completions of {name} have the lengths {found['sampled']} and "
                f"not {expected}"
            )
        if found["prompts"] != prompts:
            raise RuntimeError(
                f"step {step}: the prompts differ: {name} has {found['prompts'][0][:20]}..., and "
                f"ours {prompts[0][:20]}..."
            )


def row(case: Case, setting: str, found: Mapping[str, Side]) -> list[str]:
    """Return the cells of a case."""
    ours = found["ours"]
    cells = [case.model, str(case.num_completions), "yes" if case.has_tool else "no", setting]
    for name in reversed(SIDES):
        if name not in found:
            cells += ["-"] * 3
            continue
        side = found[name]
        parts = f"{side.median('rollout_s'):.2f} + {side.median('update_s'):.2f}"
        cells += [
            f"{side.median('seconds'):.2f} ({parts})",
            f"{side.tokens_per_second:.0f}",
            f"{side.peak_mb:.0f}",
        ]
    if "theirs" in found:
        ratio = found["theirs"].median("seconds") / ours.median("seconds")
        cells.append(f"{ratio:.2f}")
    else:
        cells.append(reason_against(case))
    return cells


HEAD = [
    *("model", "completions", "tool", "setting"),
    *("TRL: s per step (rollout + update)", "tokens/s", "peak MB"),
    *("ours: s per step (rollout + update)", "tokens/s", "peak MB"),
    "TRL / ours",
]


def line(cells: Sequence[str]) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def lengths(found: Mapping[str, Side]) -> str:
    """Describe the work of a step: lengths that were compared, and those of observations."""
    last = found["ours"].steps[-1]
    prompt = [len(each) for each in last["prompts"]]
    shown = {name: side.steps[-1]["observed"] for name, side in found.items()}
    return (
        f"prompts of {prompt} tokens; {len(last['sampled'])} sequences, completions of "
        f"{sorted({tuple(each) for each in last['sampled']})} tokens on both sides; tokens shown "
        f"per sequence: { ({name: sorted(set(each)) for name, each in shown.items()}) }"
    )


def at_best(results: Sequence[tuple[Case, Mapping[str, Side]]]) -> list[str]:
    """Return a line per model and shape: both sides, each with its fastest setting."""
    fastest: dict[tuple[str, int, bool], dict[str, float]] = {}
    for case, found in results:
        each = fastest.setdefault((case.model, case.num_completions, case.has_tool), {})
        for name, side in found.items():
            each[name] = min(each.get(name, float("inf")), side.median("seconds"))
    return [
        f"{model}, {number} completions, {'with' if tool else 'without'} tool: each at its best, "
        f"TRL {each['theirs']:.2f} s, ours {each['ours']:.2f} s: "
        f"{each['theirs'] / each['ours']:.2f}"
        for (model, number, tool), each in fastest.items()
        if "theirs" in each
    ]


def cases_of(options: argparse.Namespace, folder: Path) -> list[tuple[str, Case]]:
    """Make the models' folders; return the cases with the names of their settings."""
    from tests.benchmarks.against_trl.models import link_smollm2, write_tiny

    folders = {"qwen3-3.4m": write_tiny(folder / "qwen3")} if "tiny" in options.models else {}
    if options.smollm2 is not None and "smollm2" in options.models:
        folders["smollm2-135m"] = link_smollm2(options.smollm2.resolve(), folder / "smollm2")
    return [
        (
            setting,
            Case(
                model=model,
                folder=str(path),
                num_completions=SHAPES[shape][0],
                has_tool=SHAPES[shape][1],
                precision=SETTINGS[setting][0],
                share_prompts=SETTINGS[setting][1],
                num_groups=options.groups,
                group_size=options.group_size,
                num_tokens=options.tokens,
                steps=options.steps + 1,
                threads=options.threads,
                num_examples=NUM_EXAMPLES[model] if options.examples is None else options.examples,
            ),
        )
        for model, path in folders.items()
        for shape in options.shapes
        for setting in options.settings
    ]


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--trl-python", type=Path, help="Python that has TRL")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M; none: left out")
    parser.add_argument("--models", nargs="+", choices=["tiny", "smollm2"], default=None)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument(
        "--settings", nargs="+", choices=[*SETTINGS], default=["float32", "bfloat16"]
    )
    parser.add_argument("--groups", type=int, default=1, help="groups per step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each completion")
    parser.add_argument(
        "--examples", type=int, help="worked examples per prompt; by default about 280 tokens"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps that are measured")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    options.models = options.models or ["tiny", "smollm2"]
    try:
        python = check_python(options.trl_python)
    except ValueError as error:
        print(f"bench_against_trl: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        results, rows = run_cases(cases_of(options, Path(name)), python, options, Path(name))
    print("\n".join([line(HEAD), "|" + "---|" * len(HEAD), *rows, "", *at_best(results)]))
    print(f"{time.monotonic() - began:.0f} s in all")
    if options.json is not None:
        figures = [
            {"case": as_message(case), "sides": {n: asdict(side) for n, side in found.items()}}
            for case, found in results
        ]
        options.json.write_text(json.dumps(figures) + "\n")
    return 0 if len(results) == len(rows) else 1


def run_cases(
    cases: Sequence[tuple[str, Case]], python: Path, options: argparse.Namespace, folder: Path
) -> tuple[list[tuple[Case, Mapping[str, Side]]], list[str]]:
    """Measure all cases; return what was found, and a row for each, a failed one included."""
    results: list[tuple[Case, Mapping[str, Side]]] = []
    rows: list[str] = []
    left = list(cases)
    while left:
        with (
            started(Path(sys.executable), "ours", folder, options.threads) as ours,
            started(python, "theirs", folder, options.threads) as theirs,
        ):
            while left:
                setting, case = left.pop(0)
                what = f"{case.model}, {case.num_completions} completions, {setting}"
                try:
                    found = measure(case, {"ours": ours, "theirs": theirs})
                except RuntimeError as error:
                    print(f"{what}: {error}", file=sys.stderr, flush=True)
                    reason = str(error).splitlines()[0]
                    rows.append(line([case.model, str(case.num_completions), "failed", reason]))
                    break  # the workers are in the middle of something: others take their place
                results.append((case, found))
                rows.append(line(row(case, setting, found)))
                print(f"{what}: {lengths(found)}\n{rows[-1]}", flush=True)
    return results, rows


if __name__ == "__main__":
    sys.exit(main())
