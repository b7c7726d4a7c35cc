"""A run as the page asks for it. Everything that is returned can be written as JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tir_alp.inspector.curves import Curve, Curves
from tir_alp.inspector.episode import episode_of
from tir_alp.inspector.findings import AuditRunner
from tir_alp.inspector.index import Query, TrajectoryIndex
from tir_alp.inspector.pieces import load_pieces, pieces_of, without_secrets
from tir_alp.records.folder import ADVICE, read_command, read_records, read_run_config
from tir_alp.records.provenance import PROVENANCE
from tir_alp.records.readable import redacted_values, secret_values
from tir_alp.records.token_values import read_values


@dataclass(slots=True)
class RunSource:
    """One run.

    Args:
        path: The run folder. Raises ValueError if it is none.
    """

    path: Path
    config: dict[str, Any] = field(init=False)
    index: TrajectoryIndex = field(init=False)
    curves: Curves = field(init=False)
    audit: AuditRunner = field(init=False)
    _secrets: tuple[str, ...] = field(init=False)
    _tokenizer: Tokenizer | None = None
    _no_tokenizer: str = ""

    def __post_init__(self) -> None:
        self.config = read_run_config(self.path)
        self.index = TrajectoryIndex(self.path)
        self.curves = Curves(self.path / "metrics.jsonl")
        self.audit = AuditRunner(self.path)
        self._secrets = secret_values(os.environ)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    def about(self) -> dict[str, Any]:
        """Return what does not change often: config, provenance, objective, events."""
        objective = self.path / "objective.txt"
        told = {
            "name": self.name,
            "command": read_command(self.path),
            "algorithm": self._algorithm(),
            "seed": self.config.get("seed", 0),
            "seeds_of": self._without_seed(),
            "config": self.config,
            "objective": objective.read_text().strip() if objective.is_file() else "",
            "provenance": self._json(PROVENANCE),
            "events": read_records(self.path / "events.jsonl")[0][-1000:],
            "advice": read_records(self.path / ADVICE)[0][-1000:],
        }
        return redacted_values(told, self._secrets)

    def state(self) -> dict[str, Any]:
        """Return what changes while the run goes on, to see whether there is anything new."""
        total, _ = self.index.select(Query(limit=0))
        times = self._json(PROVENANCE).get("times") or [{}]
        return {
            "name": self.name,
            "metrics": self.curves.size,
            "trajectories": total,
            "unreadable": self.index.num_unreadable,
            "ended": bool(times[-1].get("ended")) if isinstance(times[-1], dict) else False,
            "audit": self.audit.state["state"],
        }

    def metrics(self, names: list[str] | None) -> dict[str, Any]:
        """Return the names of all metrics, and the curves of some; None: of all."""
        found: Mapping[str, Curve] = self.curves.all()
        return {
            "names": [*found],
            "size": self.curves.size,
            "curves": found if names is None else self.curves.some(names),
        }

    def trajectories(self, query: Query) -> dict[str, Any]:
        """Return rows of the index, and what all rows of the query have in common."""
        total, rows = self.index.select(query)
        found = {"total": total, "offset": query.offset, "rows": rows}
        return redacted_values(found, self._secrets) | {"summary": self.index.summary(query)}

    def trajectory(self, kind: str, step: int, line: int, sequence: int = 0) -> dict[str, Any]:
        """Return one trajectory; see `episode_of`. Raises ValueError if there is none."""
        row = self.index.row(kind, step, line)
        if row is None:
            raise ValueError(f"there is no trajectory in {kind}, step {step}, line {line}")
        tokenizer = self._tokens()
        found = episode_of(
            self.index.record(row),
            row,
            sequence,
            None if tokenizer is None else lambda ids: self._read(tokenizer, ids),
            lambda uid: read_values(self.path, step, uid) if kind == "trajectories" else None,
            self._secrets,
        )
        place = f"{kind}/step_{step:06d}.jsonl"
        found["findings"] = [
            each
            for each in self.audit.state["drifts"]
            if each["file"] == place and each["line"] in (None, line)
        ]
        return found | {"no_tokenizer": self._no_tokenizer}

    def _read(self, tokenizer: Tokenizer, ids: Any) -> list[str]:
        return without_secrets(pieces_of(tokenizer, ids), self._secrets)

    def _tokens(self) -> Tokenizer | None:
        if self._tokenizer is None and not self._no_tokenizer:
            try:
                self._tokenizer = load_pieces(self.path, self.config)
            except ValueError as error:
                self._no_tokenizer = str(error)
        return self._tokenizer

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _algorithm(self) -> str:
        section = self.config.get("algorithm")
        return str(section.get("name", "custom")) if isinstance(section, dict) else "sft"

    def _without_seed(self) -> str:
        """A digest of the config without what differs between seeds of one setting."""
        rest = {name: each for name, each in self.config.items() if name not in ("seed", "name")}
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]
