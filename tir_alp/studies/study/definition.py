"""The file of a study: the question, the hypotheses, the runs, and how they are judged."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tir_alp.algorithm.section import Section, merge
from tir_alp.config import Config
from tir_alp.run.command_line import overlay, parse_as, read_toml
from tir_alp.run.describe import flat

_NAME = r"^[\w.-]+$"
_NOT_THE_RUN = ("name", "trackers")
"""Settings that change nothing of what a run computes."""


class MeasuresConfig(Section):
    """What a run came to. Take-off, collapse and level are judged by one metric."""

    metric: str = "rollout/reward"
    """The metric, which is logged in every step; larger is better."""
    window: int = Field(default=5, ge=1)
    """Steps over which its moving mean is taken."""
    take_off: float
    """A run takes off in the first step at which the moving mean is at least this."""
    collapse: float = Field(default=0.5, gt=0.0, lt=1.0)
    """A run that has taken off collapses if the moving mean falls below this share of the largest
    one before; so does a run that a guard stops, or that ends before its last step."""
    level_from: int = Field(default=0, ge=0)
    """The level of a run is the mean of the metric after this step."""
    landscape: bool = False
    """Whether sharpness and sensitivity to rounding of the last policy are columns too."""


class StudyConfig(Section):
    """A study."""

    question: str = Field(min_length=1)
    """What is asked."""
    hypotheses: tuple[str, ...] = Field(min_length=1)
    """What is expected, written before the runs."""
    analysis: str = Field(min_length=1)
    """Which numbers decide, and how, written before the runs."""
    base: str
    """Config file of every run, relative to the file of the study; `compare.toml` comes with the
    package."""
    baseline: str
    """The method with which the others are compared, seed by seed."""
    seeds: int = Field(ge=1)
    """Number of seeds; all methods and settings have the same ones, from 0."""
    threads: int = Field(default=1, ge=1)
    """Threads of each run. Sums of numbers depend on it in the last digit, and so do rows."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Settings of all runs, laid over the base."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> settings of a method, e.g. `{ algorithm = "alp_sequence" }`."""
    settings: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> settings of a condition under which all methods are tried."""
    measures: MeasuresConfig

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if self.baseline not in self.methods:
            raise ValueError(
                f"the baseline {self.baseline!r} is not a method; there are "
                f"{', '.join(self.methods)}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Planned:
    """A run of a study."""

    method: str
    setting: str
    seed: int
    values: Mapping[str, Any]
    """Its settings over the base, nested."""
    config: Config
    """All its settings."""
    threads: int
    """Threads with which it computes."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What names it within the study."""
        return self.setting, self.method, self.seed

    @property
    def digest(self) -> str:
        """A hash of everything that the run computes from."""
        settings = self.config.model_dump(mode="json", exclude=set(_NOT_THE_RUN))
        text = json.dumps([settings, self.threads], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def words(self) -> list[str]:
        """Its settings over the base, as words of a command line."""
        found = []
        for key, value in flat(self.values).items():
            found += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        return found


@dataclass(frozen=True, slots=True)
class Study:
    """A study that has been read, with its runs."""

    name: str
    config: StudyConfig
    base: Path
    runs: tuple[Planned, ...]
    """By seed, setting and method, so that an unfinished study has all of them for some seeds."""


def read_study(file: Path) -> Study:
    """Read a study, and the settings of all its runs.

    Raises:
        ValueError: With one line for each mistake, of the study or of a run.
    """
    if file.suffix != ".toml":
        raise ValueError(f"the file of a study is TOML, but {str(file)!r} does not end with .toml")
    config = parse_as(StudyConfig, read_toml(file))
    base = _base(file, config.base)
    below = tomllib.loads(base.read_text())
    return Study(file.stem, config, base, tuple(_planned(file.stem, config, below)))


def _base(file: Path, name: str) -> Path:
    for folder in (file.parent, Path(__file__).parents[1]):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"base: there is no file {name!r} beside {file}")


def _planned(name: str, config: StudyConfig, below: Mapping[str, Any]) -> Iterator[Planned]:
    for seed in range(config.seeds):
        for setting, of_setting in config.settings.items():
            for method, of_method in config.methods.items():
                values: dict[str, Any] = {}
                folder = f"{name}/{setting}/{method}-seed{seed}"
                for each in (config.common, of_setting, of_method, {"name": folder, "seed": seed}):
                    values = merge(values, _spelled(each))
                try:
                    whole = overlay(values, below)
                    yield Planned(method, setting, seed, values, whole, config.threads)
                except ValueError as error:
                    raise ValueError(f"{setting}, {method}: {error}") from error


def _spelled(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A preset may be given by its name alone."""
    named = values.get("algorithm")
    return {**values, "algorithm": {"name": named}} if isinstance(named, str) else values
