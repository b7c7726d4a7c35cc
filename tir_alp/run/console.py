"""What a run shows in a terminal: a progress bar and a live table of the last steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = {
    "reward": ("rollout/reward", ".3f"),
    "tools": ("rollout/tool_calls", ".2f"),
    "P2": ("ratio/p2", ".3f"),
    "P50": ("ratio/p50", ".3f"),
    "P98": ("ratio/p98", ".3f"),
    "KL": ("kl/rollout", ".1e"),
    "clip": ("loss/clip_fraction", ".3f"),
    "sigma": ("alp/sigma_mean", ".4f"),
    "tok/s": ("tokens/per_second", ".0f"),
    "roll s": ("time/rollout", ".2f"),
    "gen s": ("time/generate", ".2f"),
    "tool s": ("time/tool", ".2f"),
    "train s": ("time/train", ".2f"),
}
"""What is shown of a step: heading -> metric, format."""
LEGEND = (
    "columns: reward, mean per trajectory; tools, calls per trajectory; P2 P50 P98, percentiles of "
    "the ratio of trained to sampling policy; KL between them; clip, clipped share of the tokens; "
    "sigma, ALP's noise; tok/s; seconds of rollouts, sampling, tools and training "
    "(docs/metrics.md)"
)
_ROWS = 10
_COLUMN_WIDTH = 8  # a narrow terminal shows only the first columns


class RunConsole:
    """Shows one run. Where there is no terminal, one plain line per step.

    Args:
        columns: What is shown of a step; see `COLUMNS`.
        legend: What the columns mean.
    """

    def __init__(
        self, columns: Mapping[str, tuple[str, str]] = COLUMNS, legend: str = LEGEND
    ) -> None:
        self.console = Console()
        self._columns, self._legend = columns, legend
        self._rows: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=_ROWS)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._live: Live | None = None

    @contextmanager
    def training(self, first_step: int, num_steps: int) -> Iterator[None]:
        """Show the table while the steps go on."""
        task = self._progress.add_task("training", total=num_steps, completed=first_step)
        self._task, self._num_steps = task, num_steps
        self._first_step, self._began = first_step, time.monotonic()
        if first_step < num_steps:
            self.print(self._legend)
        if not self.console.is_terminal:
            yield
            return
        with Live(self._picture(), console=self.console, refresh_per_second=4) as self._live:
            yield
        self._live = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the step that has just ended; `step` counts it."""
        self._rows.append((step, metrics))
        self._progress.update(self._task, completed=step)
        if self._live is not None:
            self._live.update(self._picture())
        else:
            cells = [f"{name} {self._cell(metrics, name)}" for name in self._columns]
            self.print(f"{self._progress_of(step)}  " + "  ".join(cells))

    def _progress_of(self, step: int) -> str:
        """The time of day, the step, the mean duration of steps, and how long the rest may take."""
        seconds = (time.monotonic() - self._began) / max(step - self._first_step, 1)
        left = timedelta(seconds=round(seconds * (self._num_steps - step)))
        now = datetime.now().strftime("%H:%M:%S")
        return f"{now} step {step}/{self._num_steps}  {seconds:.1f} s per step, {left} left"

    def print(self, text: str) -> None:
        """Write lines that stay."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _picture(self) -> Group:
        shown = [*self._columns][: max(1, self.console.width // _COLUMN_WIDTH - 1)]
        table = Table("step", *shown, box=None, header_style="bold", padding=(0, 1))
        for step, metrics in self._rows:
            table.add_row(str(step), *(self._cell(metrics, name) for name in shown))
        return Group(table, self._progress)

    def _cell(self, metrics: Mapping[str, float], name: str) -> str:
        metric, form = self._columns[name]
        return format(metrics[metric], form) if metric in metrics else "-"
