"""The trainer of a run in other processes: every call goes to all ranks, and rank 0 answers.

A rank that is lost is not replaced on its own: its state is in the run's newest checkpoint, from
which all ranks start again. So its loss ends the calls with `RoleLost`, and the run goes on from
that checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from tir_alp.cluster.engine_pool import WeightsRef
from tir_alp.cluster.watched_actor import WatchedActor, reason_of
from tir_alp.roles import RoleLost
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.ranks import RankFailed
from tir_alp.training.step_report import StepReport
from tir_alp.types import Sample


class RemoteTrainer:
    """A `roles.TrainerRole` whose calls block, each with a deadline.

    Args:
        ranks: The ranks' actors, which have started.
        timeout_s: Deadline of a call.
    """

    def __init__(self, ranks: Sequence[WatchedActor], timeout_s: float) -> None:
        self._ranks, self._timeout_s = ranks, timeout_s

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> StepReport:
        """As `LocalTrainer.step`."""
        return self._call("step", ray.put(groups), step)

    def mean_loss(self, samples: Sequence[Sample]) -> float:
        """As `LocalTrainer.mean_loss`."""
        return self._call("mean_loss", ray.put(samples))

    def completion_logprobs(
        self, prompt: Sequence[int], completion: Sequence[int], temperature: float, top_p: float
    ) -> list[float]:
        """As `LocalTrainer.completion_logprobs`."""
        return self._call("completion_logprobs", prompt, completion, temperature, top_p)

    def perturb_weights(self, scale: float) -> None:
        """As `LocalTrainer.perturb_weights`."""
        self._call("perturb_weights", scale)

    def weights(self) -> WeightsRef:
        """A handle to the weights, which outlives the trainer: this process owns the object."""
        answers = self._ask("weights")
        self._wait([is_there for _, is_there in answers])
        return WeightsRef(answers[0][0])

    def save(
        self,
        folder: Path,
        position: Position,
        rollouts: Mapping[str, Any],
        keep: int,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> Path:
        """As `LocalTrainer.save`, to a folder that ranks and run share."""
        return self._call("save", folder.resolve(), position, rollouts, keep, end_token_ids)

    def load(self, path: Path) -> None:
        """As `LocalTrainer.load`."""
        self._call("load", path.resolve())

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._wait(self._ask(method, *arguments))[0]

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        actors = [rank.actor for rank in self._ranks]
        for rank, actor in zip(self._ranks, actors, strict=True):
            if actor is None:
                raise RoleLost(f"{rank.name} was lost")
        return [getattr(actor, method).remote(*arguments) for actor in actors]

    def _wait(self, refs: Sequence[Any]) -> list[Any]:
        try:
            return ray.get(list(refs), timeout=self._timeout_s)
        except RayActorError as error:
            raise RoleLost(f"a rank of the trainer was lost: {reason_of(error)}") from error
        except GetTimeoutError as error:
            limit = f"{self._timeout_s:g} s"
            raise RoleLost(f"the trainer did not answer within {limit}") from error
        except RayTaskError as error:
            if isinstance(error.cause, RankFailed):
                raise RoleLost(f"a rank of the trainer was lost: {error.cause}") from error
            raise error.cause from None

    def close(self) -> None:
        """Do nothing: the cluster ends the ranks."""
