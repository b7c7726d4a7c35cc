"""Checks the engine's contract by comparing it with a forward of the trainer's model.

The logprobs of the tokens that the engine itself sampled are compared, so any engine can be
checked, wherever it runs. A deliberate mismatch (`engine.precision`, `engine.logit_noise`) widens
the tolerance; a wrong temperature, a missing truncation or weights of another version exceed it by
far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tir_alp.config import LOGPROB_TOLERANCE, Config
from tir_alp.doctor.check_result import CheckResult
from tir_alp.engines.base import Completion, Engine, LogprobSource, Sampling
from tir_alp.types import StopReason

_NUM_TOKENS = 16  # length of a completion that is sampled for a check
_DEADLINE_S = 300.0
_MAX_OVER_MEAN = 20  # tolerance of a single token over that of the mean
_SHIFT = 10  # how far a change of the weights should move logprobs, in tolerances


def tolerance_of(config: Config) -> float:
    """Return the largest acceptable mean |difference of logprobs|, in nats."""
    own = config.trainer.dtype
    rounding = 0.0 if own == "float32" else LOGPROB_TOLERANCE[own]
    return config.engine.logprob_tolerance + rounding


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion, and the prompt that it continues."""

    prompt: tuple[int, ...]
    sampling: Sampling
    completion: Completion


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """Checks one engine.

    Args:
        engine: The engine to check.
        trainer: Source of the logprobs to compare with; it has the same weights as the engine.
        num_rows: Number of rows in the model's embedding: token ids are below it.
        prompts: Prompts as token ids. Some should be random ids, which no text would encode to.
        temperature: Sampling temperature of the run.
        stop_token_ids: Token ids that end a completion in the run.
        tolerance: Largest acceptable mean |difference of logprobs|, in nats; see `tolerance_of`.
    """

    engine: Engine
    trainer: LogprobSource
    num_rows: int
    prompts: Sequence[tuple[int, ...]]
    temperature: float
    stop_token_ids: frozenset[int]
    tolerance: float

    async def logprobs(self) -> tuple[CheckResult, CheckResult]:
        """Sample at several temperatures and truncations, and check the ids and their logprobs."""
        settings = {(each, 1.0) for each in (self.temperature, 0.7, 1.0)}
        settings.add((self.temperature, 0.9))
        sampled = [
            each
            for temperature, top_p in sorted(settings)
            for each in await self._sample(temperature=temperature, top_p=top_p)
        ]
        return self._ids(sampled), await asyncio.to_thread(self._logprobs, sampled)

    async def _sample(self, **sampling: Any) -> list[Sampled]:
        """Sample one completion of each prompt."""
        given = {"max_tokens": _NUM_TOKENS, "stop_token_ids": self.stop_token_ids, "seed": 1}
        wanted = [
            Sampling(**given | sampling, sequence_uid=index) for index in range(len(self.prompts))
        ]
        async with asyncio.timeout(_DEADLINE_S):
            completions = await asyncio.gather(*map(self.engine.generate, self.prompts, wanted))
        return [Sampled(*each) for each in zip(self.prompts, wanted, completions, strict=True)]

    def _ids(self, sampled: Sequence[Sampled]) -> CheckResult:
        rows = self.num_rows
        wrong: dict[str, bool] = {}
        for each in sampled:
            ids, reason = each.completion.token_ids, each.completion.stop_reason
            ends = [index for index, token in enumerate(ids) if token in self.stop_token_ids]
            is_end = reason is StopReason.EOS
            wrong |= {
                f"{len(ids)} tokens (max_tokens {_NUM_TOKENS})": not 0 < len(ids) <= _NUM_TOKENS,
                f"ids outside the model's {rows} rows": not all(0 <= each < rows for each in ids),
                f"end tokens at positions {ends} of {len(ids)}, but the reason is {reason}": ends
                != ([len(ids) - 1] if is_end else []),
                f"the reason is {reason} at {len(ids)} of {_NUM_TOKENS} tokens": not is_end
                and (reason is not StopReason.LENGTH or len(ids) != _NUM_TOKENS),
            }
        failures = [what for what, is_wrong in wrong.items() if is_wrong]
        num_tokens = sum(len(each.completion.token_ids) for each in sampled)
        return CheckResult(
            "ids",
            not failures,
            failures[0] if failures else f"{len(sampled)} completions, {num_tokens} tokens",
            "the engine must return exactly the ids that it sampled, including the end token",
        )

    def _logprobs(self, sampled: Sequence[Sampled]) -> CheckResult:
        mean, most, num_tokens = self._distance(sampled)
        figure = f"mean |difference| {mean:.2g}, largest {most:.2g} over {num_tokens} tokens"
        holds = mean <= self.tolerance and most <= _MAX_OVER_MEAN * self.tolerance
        fix = "" if holds else self._likely_mistake(sampled)
        return CheckResult("logprobs", holds, f"{figure}; tolerance {self.tolerance:g}", fix)

    def _likely_mistake(self, sampled: Sequence[Sampled]) -> str:
        """Say what may be wrong with logprobs that are not those of the trainer."""
        distances = {name: self._distance(sampled, at)[0] for name, at in _MISTAKES.items()}
        nearest = min(distances, key=lambda name: distances[name])
        if distances[nearest] <= self.tolerance:
            return (
                f"the engine's logprobs are {nearest}: it must return those of the distribution "
                "that it samples from"
            )
        return "the engine uses other weights, another temperature or other tokens than the trainer"

    def _distance(
        self,
        sampled: Sequence[Sampled],
        computed_at: Callable[[Sampling], tuple[float, float]] = lambda each: (
            each.temperature,
            each.top_p,
        ),
    ) -> tuple[float, float, int]:
        """Return mean and largest |engine - trainer| over all logprobs, and their number.

        Args:
            sampled: Completions of the engine.
            computed_at: Maps the engine's sampling to the temperature and top_p at which the
                trainer computes its logprobs.
        """
        differences = torch.cat(
            [
                torch.tensor(each.completion.logprobs)
                - torch.tensor(
                    self.trainer.completion_logprobs(
                        each.prompt, each.completion.token_ids, *computed_at(each.sampling)
                    )
                )
                for each in sampled
            ]
        ).abs()
        return float(differences.mean()), float(differences.max()), len(differences)

    async def stop(self) -> CheckResult:
        """Force both kinds of stop: a token declared an end token, and a matcher that counts."""
        free = await self._sample(temperature=0.0, stop_token_ids=frozenset())
        ids = free[0].completion.token_ids
        end = ids[min(3, len(ids) - 1)]
        (by_token, *_) = await self._sample(temperature=0.0, stop_token_ids=frozenset({end}))
        (by_rule, *_) = await self._sample(
            temperature=0.0, stop_token_ids=frozenset(), stop_matcher=_third_token
        )
        stopped, ruled = by_token.completion, by_rule.completion
        wrong = {
            f"{end} was declared an end token; it is at positions "
            f"{[i for i, token in enumerate(stopped.token_ids) if token == end]} of "
            f"{len(stopped.token_ids)}, and the reason is {stopped.stop_reason}": (
                end in stopped.token_ids[:-1]
                or (stopped.token_ids[-1] == end) != (stopped.stop_reason is StopReason.EOS)
            ),
            f"the rule holds at the third token; there are {len(ruled.token_ids)} tokens, and the "
            f"reason is {ruled.stop_reason}": len(ruled.token_ids) != 3
            or ruled.stop_reason is not StopReason.STOP,
        }
        failures = [what for what, is_wrong in wrong.items() if is_wrong]
        return CheckResult(
            "stop",
            not failures,
            "; ".join(failures) or "stops exactly at the end token, and at the token of the rule",
            "the engine must cut its completions by token: nothing follows the one that ends them",
        )

    async def sync(self, weights: Callable[[], Any], version: int) -> CheckResult:
        """Perturb the model, sync, check that the engine's logprobs follow, and undo it.

        Args:
            weights: Returns the trainer's current weights in the form that `load_weights` takes.
            version: Policy version of the unperturbed weights.
        """
        probe = await self._sample(temperature=self.temperature)
        in_thread = asyncio.to_thread  # the trainer's answer may take long, or never come
        try:
            shift = await in_thread(self._perturb, probe)
            await self.engine.load_weights(await in_thread(weights), version=version + 1)
            changed = await self._sample(temperature=self.temperature)
            ahead, _, _ = await in_thread(self._distance, changed)
        finally:
            await in_thread(self.trainer.perturb_weights, 0.0)  # restores every bit
        await self.engine.load_weights(await in_thread(weights), version=version)
        restored = await self._sample(temperature=self.temperature)
        back, _, num_tokens = await in_thread(self._distance, restored)
        versions = [
            {each.completion.policy_version for each in sampled} for sampled in (changed, restored)
        ]
        holds = max(ahead, back) <= self.tolerance and versions == [{version + 1}, {version}]
        return CheckResult(
            "sync",
            holds,
            f"difference {ahead:.2g} after a change of the weights that moves logprobs by "
            f"{shift:.2g}, {back:.2g} after undoing it, over {num_tokens} tokens; versions "
            + " and ".join(", ".join(map(str, sorted(each))) for each in versions),
            "the engine still uses some old weights after load_weights: check that it copies every "
            "tensor, empties its cache and updates the version",
        )

    def _perturb(self, probe: Sequence[Sampled]) -> float:
        """Perturb some weights until logprobs have moved far enough; return how far, in nats."""
        shift = 0.0
        for scale in (0.05, 0.1, 0.2, 0.4, 0.8):
            self.trainer.perturb_weights(scale)
            shift = self._distance(probe)[0]
            if shift >= _SHIFT * self.tolerance:
                break
        return shift


_MISTAKES: dict[str, Callable[[Sampling], tuple[float, float]]] = {
    "raw, at temperature 1 and not truncated": lambda sampling: (1.0, 1.0),
    "not truncated to top_p": lambda sampling: (sampling.temperature, 1.0),
    "those of temperature 1": lambda sampling: (1.0, sampling.top_p),
}


def _third_token() -> Callable[[int], bool]:
    count = 0

    def feed(token_id: int) -> bool:
        nonlocal count
        count += 1
        return count == 3

    return feed
