"""Where a run's metrics go besides `metrics.jsonl`: TensorBoard, W&B, trackio, MLflow.

Each tracker works in a thread of its own, so that a slow network never holds up the run, and what
waits for it is bounded. A tracker that fails is reported once, and ends nothing: `metrics.jsonl`
has every record.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Say = Callable[[str], None]

_MOST_WAITING = 1000  # records; a run with more has a tracker that is stuck
_CLOSE_TIMEOUT_S = 30.0
_PROJECT = "tir_alp"
_IDS = "trackers"  # folder of a run; one file per tracker that has an id of its own


class Tracker(Protocol):
    """Takes the metrics of one run. Methods are called in one thread, and may block or raise."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one record of metrics."""
        ...

    def close(self) -> None:
        """Hand over everything."""
        ...


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run."""

    path: Path
    """The run's folder; its name is the run's name."""
    config: Mapping[str, Any]
    step: int | None
    """Number of steps after which a resumed run goes on; None: it is new."""

    def id_of(self, tracker: str) -> str | None:
        """Return the id that a tracker knows this run by; None: it does not know it."""
        file = self.path / _IDS / f"{tracker}.id"
        return file.read_text().strip() if file.is_file() else None

    def keep_id(self, tracker: str, value: str) -> None:
        """Write down an id, so that a resumed run goes on in the same place."""
        (self.path / _IDS).mkdir(exist_ok=True)
        (self.path / _IDS / f"{tracker}.id").write_text(value + "\n")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of tracker."""

    module: str
    """The module that it needs."""
    package: str
    """What to give to pip, if the module is missing."""
    open: Callable[[TrackedRun, Say], Tracker]
    check: Callable[[], None] = lambda: None
    """Raises ValueError if its settings are wrong; called before a run starts."""


# ------------------------------------------------------------------------------------ the trackers


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, run: TrackedRun, say: Say) -> None:
        from tir_alp.records.event_file import EventFile  # its imports take a second

        self._file = EventFile(run.path / "tensorboard", run.step or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        self._file.log(step, metrics)

    def close(self) -> None:
        """As of `Tracker`."""
        self._file.close()


class Wandb:
    """A run of Weights & Biases; `WANDB_MODE=offline` writes it into the run's folder."""

    def __init__(self, run: TrackedRun, say: Say) -> None:
        import wandb

        known = run.id_of("wandb") or secrets.token_hex(8)
        run.keep_id("wandb", known)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.path.name,
            id=known,
            resume="allow",
            dir=str(run.path),
            config=dict(run.config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=2 * _CLOSE_TIMEOUT_S,
                finish_timeout=_CLOSE_TIMEOUT_S / 2,
            ),
        )
        # Its own count of steps cannot go back to that of a checkpoint.
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            say(f"wandb: offline, in {run.path / 'wandb'}; send it with: wandb sync --append DIR")
        else:
            say(f"wandb: {self._run.url}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        """As of `Tracker`."""
        self._run.finish()


def _check_wandb() -> None:
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run"):
        return
    import wandb
    from wandb.errors import Error

    try:
        wandb.login()
    except Error as error:
        raise ValueError(
            f"trackers: W&B is not logged in ({error}): run `wandb login`, or set "
            "WANDB_MODE=offline, which needs neither a login nor a network"
        ) from error


class Trackio:
    """A run of trackio, on this machine unless its environment variables name a server."""

    def __init__(self, run: TrackedRun, say: Say) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        # trackio knows a run by its name, which another folder below `runs/` may have had before.
        known = run.id_of("trackio") or f"{run.path.name}-{secrets.token_hex(3)}"
        run.keep_id("trackio", known)
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._run = trackio.init(
            project=project, name=known, resume="allow", config=dict(run.config), embed=False
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """As of `Tracker`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at the server or in the data base that `MLFLOW_TRACKING_URI` names."""

    def __init__(self, run: TrackedRun, say: Say) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        known = run.id_of("mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            of = experiment.experiment_id if experiment else self._client.create_experiment(name)
            known = self._client.create_run(of, run_name=run.path.name).info.run_id
            run.keep_id("mlflow", known)
            for key, value in _flat(run.config):
                self._client.log_param(known, key, value)
        else:
            self._client.update_run(known, status="RUNNING")
        self._id = known
        say(f"mlflow: run {known}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        for start in range(0, len(batch), 1000):  # the most that a request may have
            self._client.log_batch(self._id, metrics=batch[start : start + 1000])

    def close(self) -> None:
        """As of `Tracker`."""
        self._client.set_terminated(self._id)


def _check_mlflow() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "trackers: set MLFLOW_TRACKING_URI for MLflow: http://HOST:PORT of a server, or "
            "sqlite:///FILE (for which the package mlflow is needed, not only mlflow-skinny)"
        )
    from mlflow import MlflowClient

    try:
        MlflowClient()
    except Exception as error:  # what a store raises is its own affair
        raise ValueError(f"trackers: MLflow cannot be used: {error}") from error


def _flat(config: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """The settings of nested mappings, with dotted keys."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        is_section = isinstance(value, Mapping) and value
        found += _flat(value, f"{before}{key}.") if is_section else [(f"{before}{key}", value)]
    return found


TRACKERS: Mapping[str, Kind] = {
    "tensorboard": Kind("tensorboard", "tensorboard", TensorBoard),
    "wandb": Kind("wandb", "'tir_alp[wandb]'", Wandb, _check_wandb),
    "trackio": Kind("trackio", "'tir_alp[trackio]'", Trackio),
    "mlflow": Kind("mlflow", "'tir_alp[mlflow]'", MLflow, _check_mlflow),
}
"""Choice of `trackers` in the config -> the kind."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers can be used, before anything is started.

    Raises:
        ValueError: A package is missing, or a setting is wrong.
    """
    for name in names:
        kind = TRACKERS[name]
        if importlib.util.find_spec(kind.module) is None:
            raise ValueError(
                f"trackers: {name!r} needs a package that is not installed: "
                f"pip install {kind.package}"
            )
        kind.check()


# ---------------------------------------------------------------------------------- their threads


class Trackers:
    """The trackers of a run, each in its thread. No method raises or waits without a bound.

    Args:
        names: Keys of `TRACKERS`.
        run: The run.
        say: Called with a line for people, from any thread.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun, say: Say) -> None:
        self._threads = [
            TrackerThread(name, lambda of=TRACKERS[name].open: of(run, say), say)
            for name in dict.fromkeys(names)
        ]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one record of metrics to each tracker."""
        for each in self._threads:
            each.log(step, metrics)

    def close(self) -> None:
        """Give all trackers together half a minute to take what is left."""
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for each in self._threads:
            each.finish()
        for each in self._threads:
            each.join(deadline)


class TrackerThread:
    """The thread of one tracker.

    Args:
        name: Name of the tracker.
        open_tracker: Opens it; called in the thread.
        say: Called with a line for people.
        most_waiting: Number of records that may wait for the tracker; others are left out.
    """

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        say: Say,
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        self._name, self._open, self._say = name, open_tracker, say
        self._records: queue.Queue[tuple[int, Mapping[str, float]]] = queue.Queue(most_waiting)
        self._is_ending = threading.Event()
        self._is_reported = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one record of metrics; it is left out if too many wait."""
        try:
            self._records.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._report(f"does not keep up: from step {step} on, records are left out")

    def finish(self) -> None:
        """Let the thread end when no record is left."""
        self._is_ending.set()

    def join(self, deadline: float) -> None:
        """Wait for the end of the thread.

        Args:
            deadline: Until when, on the clock of `time.monotonic`.
        """
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._report(f"has not taken {self._records.qsize() or 'all'} records in time")

    def _work(self) -> None:
        try:
            tracker = self._open()
        except BaseException as error:  # a library may even call sys.exit
            self._report(f"could not be opened ({_reason(error)})")
            return
        while (record := self._next()) is not None:
            step, metrics = record
            try:
                tracker.log(step, metrics)
            except BaseException as error:
                self._report(f"failed at step {step} ({_reason(error)})")
        try:
            tracker.close()
        except BaseException as error:
            self._report(f"failed at its end ({_reason(error)})")

    def _next(self) -> tuple[int, Mapping[str, float]] | None:
        """The next record; None at the end."""
        while True:
            try:
                return self._records.get(timeout=0.05)
            except queue.Empty:
                if self._is_ending.is_set() and self._records.empty():
                    return None

    def _report(self, what: str) -> None:
        if not self._is_reported:
            self._is_reported = True
            self._say(
                f"the tracker {self._name} {what}; the run goes on, and metrics.jsonl has all of it"
            )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
